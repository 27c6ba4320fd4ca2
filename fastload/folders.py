"""Folders as sources: class folders, flat ones, pairs of image and mask, labelme's; and the signs that tell them apart.

Files that are hidden are left alone, links are followed, and no folder is entered from within itself. What is in the
files is seen when they are packed: here they are listed, and their names say which belong together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from . import labelme
from .errors import SourceError
from .items import Item, Source, read_file

_JUNK = frozenset(("thumbs.db", "desktop.ini"))
_JSON_TRIED = 20  # files at a folder's top, before it is none of labelme's
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
_MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "segmentationclass")


def class_folders(path: str, ignore: Sequence[str]) -> Source:
    """One sub-folder per class, and in index order class, then path: exactly torchvision's ImageFolder."""
    entries = sorted(
        (e for e in os.scandir(path) if _visible(e.name) and not _is_one_of(e, ignore)), key=lambda e: e.name
    )
    classes = [e.name for e in entries if os.path.isdir(e.path)]
    outside = [e.name for e in entries if not os.path.isdir(e.path)]
    if not classes:
        raise SourceError(
            f"{path} has no images at its top and no sub-folders to be classes; give a folder of images, "
            "or a folder with one sub-folder per class"
        )
    items, notes = [], []
    for label, name in enumerate(classes):
        files = files_below(os.path.join(path, name), path, ignore)
        if not files:
            notes.append(f"class {name!r} has no files")
        items += [Item(file, file_path, (label,)) for file, file_path in files]
    if outside:
        notes.append(f"{len(outside)} files outside the class folders belong to no class, the first is {outside[0]!r}")
    return Source("folders", items, classes, 1, notes)


def flat_folder(path: str, ignore: Sequence[str]) -> Source:
    """All files below a folder, without labels."""
    return Source("flat", [Item(name, file_path) for name, file_path in files_below(path, path, ignore)], None, 0, [])


def pairs(path: str, masks: str | None, class_list: str | os.PathLike[str] | None, ignore: Sequence[str]) -> Source:
    """Images and masks in two folders, by the same names, or `img` and `label` in a folder for each pair."""
    classes = None if class_list is None else labelme.read_classes(class_list)
    folders = (os.path.normpath(path), os.path.normpath(masks)) if masks is not None else two_folders(path)
    items, notes = [], []
    if folders is not None:
        if not os.path.isdir(folders[1]):
            raise SourceError(f"{folders[1]} is no folder; give the folder that holds the masks")
        by_stem: dict[str, list[str]] = {}
        for name, file in files_below(folders[1], folders[1], (*ignore, folders[0])):
            by_stem.setdefault(os.path.splitext(name)[0], []).append(file)
        for name, file in files_below(folders[0], folders[0], (*ignore, folders[1])):
            items.append(_pair(name, file, by_stem.pop(os.path.splitext(name)[0], []), folders[1]))
        if by_stem:
            notes.append(f"{len(by_stem)} masks belong to no image, the first is {min(by_stem)!r}")
    else:
        for folder, images, found in pair_folders(path):
            items += [_pair(f"{folder}/{os.path.basename(image)}", image, found, path) for image in images]
            if not images:
                notes.append(f"folder {folder!r} holds no img")
    if not any(item.mask for item in items):
        raise SourceError(
            f"{path}: no image has a mask; give two folders with the same names (--masks FOLDER), or folders that "
            "hold img.png and label.png"
        )
    return Source("pairs", items, classes, 0, notes, masks={"mask": labelme.ignore_value(classes or [])})


def _pair(name: str, image: str, masks: list[str], where: str) -> Item:
    if len(masks) == 1:
        return Item(name, image, mask=masks[0])
    if masks:
        return Item(name, image, (), f"there are several masks of this name, {masks[0]} and {masks[1]}")
    return Item(name, image, (), f"there is no mask of this name in {where}")


def labelme_files(
    path: str, class_list: str | os.PathLike[str] | None, max_pixels: int, ignore: Sequence[str]
) -> Source:
    """The JSON files below a folder; masks are drawn when they are read."""
    files = [file for file in files_below(path, path, ignore) if file[0].endswith(".json")]
    if class_list is None:
        classes, where = labelme.list_classes([file for _, file in files]), "the list of classes"
    else:
        classes, where = labelme.read_classes(class_list), os.fspath(class_list)

    def read(item: Item) -> dict[str, Any]:
        found = labelme.read(item.path, classes, root=path, max_pixels=max_pixels, class_list=where)
        image = found.image if isinstance(found.image, bytes) else read_file(found.image, max_pixels)
        return {"image": image, "mask": found.mask, "instances": found.instances}

    masks = {"mask": labelme.ignore_value(classes), "instances": 0}
    return Source(
        *("labelme", [Item(*file) for file in files], classes, 0, []),
        masks=masks,
        read=read,
        image_path=lambda item: labelme.image_path(item.path, path),
    )


def has_image_at_top(folder: str) -> bool:
    """Whether a file of the folder, not of one below it, begins as an image does."""
    files = (entry for entry in os.scandir(folder) if _visible(entry.name) and os.path.isfile(entry.path))
    return any(_looks_like_image(entry.path) for entry in files)


def _looks_like_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(16).startswith(_MAGIC)
    except OSError:
        return False


def has_annotations(folder: str) -> bool:
    """Whether there are labelme's files in a folder, or in one below it that is called as those of masks are."""
    below = [entry.path for entry in os.scandir(folder) if entry.name.lower() in _MASK_FOLDERS and entry.is_dir()]
    return any(_has_annotation_at_top(path) for path in (folder, *below))


def _has_annotation_at_top(folder: str) -> bool:
    names = (e.name for e in os.scandir(folder) if _visible(e.name) and e.name.endswith(".json") and e.is_file())
    return any(labelme.looks_like_annotation(os.path.join(folder, name)) for name in sorted(names)[:_JSON_TRIED])


def two_folders(path: str) -> tuple[str, str] | None:
    """The folders of images and of masks, if `path` holds these two by names that say so, and no other."""
    found = [entry for entry in os.scandir(path) if _visible(entry.name) and os.path.isdir(entry.path)]
    found = [entry for entry in found if entry.name != "instances"]  # what unpacking adds
    images = [entry.path for entry in found if entry.name.lower() in _IMAGE_FOLDERS]
    masks = [entry.path for entry in found if entry.name.lower() in _MASK_FOLDERS]
    if any(_has_annotation_at_top(folder) for folder in masks):
        return None
    return (images[0], masks[0]) if len(found) == 2 and len(images) == len(masks) == 1 else None


def pair_folders(path: str) -> list[tuple[str, list[str], list[str]]]:
    """Each sub-folder, its files `img` and its files `label`, whatever their suffixes; none if no folder has both.

    That is what labelme's converter writes.
    """
    found = []
    for folder in sorted(entry.name for entry in os.scandir(path) if _visible(entry.name) and entry.is_dir()):
        current = os.path.join(path, folder)
        try:
            names = sorted(entry.name for entry in os.scandir(current) if _visible(entry.name))
        except OSError as error:
            raise SourceError(f"{current} can't be listed: {error.strerror}; check its permissions") from error
        images, masks = (
            [os.path.join(current, name) for name in names if os.path.splitext(name)[0] == stem]
            for stem in ("img", "label")
        )
        found.append((folder, images, masks))
    return found if any(images and masks for _, images, masks in found) else []


def files_below(folder: str, root: str, ignore: Sequence[str]) -> list[tuple[str, str]]:
    """(name relative to root, path) of every file below `folder`, in ImageFolder's order: by folder, then file."""
    found = []
    for current, files in sorted(_walk(folder, root, ignore)):
        prefix = os.path.relpath(current, root).replace(os.sep, "/")
        found += [(f if prefix == "." else f"{prefix}/{f}", os.path.join(current, f)) for f in files]
    return found


def _walk(folder: str, root: str, ignore: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, sorted visible file names) below `folder`, links followed, no folder entered from within itself."""
    pending: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(root), os.path.realpath(folder)))]
    while pending:
        current, above = pending.pop()
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            raise SourceError(f"{current} can't be listed: {error.strerror}; check its permissions") from error
        files = []
        for entry in entries:
            if not _visible(entry.name) or _is_one_of(entry, ignore):
                continue
            if os.path.isdir(entry.path):
                real = os.path.realpath(entry.path)
                if real not in above:
                    pending.append((entry.path, (*above, real)))
            else:
                files.append(entry.name)
        yield current, sorted(files)


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _JUNK


def _is_one_of(entry: os.DirEntry[str], files: Sequence[str]) -> bool:
    same_name = [file for file in files if os.path.basename(file) == entry.name and os.path.exists(file)]
    return any(os.path.exists(entry.path) and os.path.samefile(entry.path, file) for file in same_name)
