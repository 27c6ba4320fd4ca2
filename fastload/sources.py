"""What can be packed: class folders, folders without labels, lists, image and mask pairs, labelme folders, stores.

A `Source` is a list of items in index order: class, then path, for class folders (exactly torchvision's ImageFolder);
path for a flat folder, pairs and labelme; line for a list; a store's own order. Every file that is not hidden is an
item: what turns out to be no image is quarantined by name when it is packed, so nothing is left out silently. Here
files are only listed; `Source.read`, which packing calls in its threads, reads what an item consists of.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import coco, dicom, fields, hub_files, label_lists, labelme, parquet, record, small_images, tar_shards
from .errors import SourceError
from .fields import Schema, Spec
from .geometry import MAX_PIXELS
from .samples import Samples
from .store import Store, looks_like_store

Format = Literal[
    "auto",
    "folders",
    "flat",
    "list",
    "pairs",
    "labelme",
    "mnist",
    "cifar",
    "coco",
    "tar",
    "parquet",
    "dicom",
    "store",
]

_FILES = {
    "list": "file of `name label` lines",
    "coco": "JSON file of COCO's",
    "store": "file that `fastload pack` made",
}
"""What formats need that are no folders."""
_EITHER = frozenset(("mnist", "tar", "parquet", "dicom"))  # a file, or a folder of them
_GO_WITH: dict[str, tuple[Format, ...]] = {
    "root": ("list", "coco"),
    "image_column": ("list", "parquet"),
    "label_columns": ("list", "parquet"),
    "part": ("mnist", "cifar", "parquet"),
    "label_from": ("dicom",),
    "header": ("dicom",),
    "window": ("dicom",),
    "rescale": ("dicom",),
    "kinds": ("tar", "parquet"),
}
"""The formats that an option goes with, where not all of them have it."""
_JUNK = frozenset(("thumbs.db", "desktop.ini"))
_LOOKED_AT = 32
_JSON_TRIED = 20  # files at a folder's top, before it is none of labelme's
_SPARE_BYTES, _BYTES_PER_PIXEL = 64 << 20, 4  # of a file: metadata, pixels
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6")


class Item(NamedTuple):
    """One file, or one sample of a store, to pack.

    name: relative path with forward slashes, kept in the record. path: where it is read. labels: integers, or all
    floats; none where the source has none. problem: why it can't be packed, if that is known already. sample: its place
    in a file of many; if that is a store, its record has the name. mask: the file of the mask that goes with it.
    """

    name: str
    path: str
    labels: label_lists.Labels = ()
    problem: str | None = None
    sample: int | None = None
    mask: str | None = None


def read_files(item: Item, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """The bytes of an item's image, and of its mask if it has one.

    Raises:
        SourceError, OSError: a file is empty, larger than any image of so many pixels, no regular file, or can't be
            read.
    """
    contents = {"image": _read(item.path, max_pixels)}
    if item.mask is not None:
        contents["mask"] = _read(item.mask, max_pixels)
    return contents


def _read(path: str, max_pixels: int) -> bytes:
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL in the name, say
        raise SourceError(f"its name can't be one of a file: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("it is no regular file")
    if status.st_size == 0:
        raise SourceError("the file is empty (0 bytes)")
    if status.st_size > _SPARE_BYTES + _BYTES_PER_PIXEL * max_pixels:
        raise SourceError(
            f"the file has {status.st_size} bytes, more than {_BYTES_PER_PIXEL} for each of {max_pixels} pixels, which "
            "is the limit; --max-pixels raises it"
        )
    return Path(path).read_bytes()


class Source(NamedTuple):
    """Items in index order, and the names of their classes where labels have names.

    format: what the files came from, any of `Format` but auto and store. store: the store that they are in now, if any.
    schema: what a sample consists of, where that is more than an image with a label or masks. masks: the masks that
    come with each image, and the value of what lies outside of them. read: gives what an item
    consists of, by name: the bytes of an image file, or its pixels (height, width, channels); the bytes or values of
    masks. real: labels are floats. encode: how the images are stored unless something else is asked for. content: a
    checksum of what is in memory already. outcomes: packs the items itself, see
    `torch_datasets`. first: the values of samples that it has looked at.
    """

    format: str
    items: Sequence[Item]
    classes: list[str] | None
    label_count: int
    notes: list[str]
    store: Store | None = None
    schema: Schema | None = None
    masks: Mapping[str, int] = {}
    read: Callable[[Item], dict[str, Any]] = read_files
    real: bool = False
    encode: Literal["keep", "raw"] = "keep"
    image_path: Callable[[Item], str] = operator.attrgetter("path")
    content: str = ""
    outcomes: Callable[..., Iterator[Any]] | None = None
    first: Sequence[Mapping[str, Any]] = ()

    @property
    def fields(self) -> Schema:
        """What a sample consists of."""
        if self.schema is not None:
            return self.schema
        masks = tuple(Spec(name, "mask", fill=fill) for name, fill in self.masks.items())
        label = Spec("label", "real" if self.real else "integer", column="label")
        specs = (Spec("image", "image"), *(masks or (label,)))
        names = [spec.name for spec in specs]
        return Schema({"tuple": [*names]} if len(names) < 3 else {"dict": [[name, name] for name in names]}, specs)

    def image_of(self, item: Item) -> Hashable:
        """What tells the image of an item from those of others: two items may be the same file."""
        return item.sample if item.sample is not None else os.path.realpath(self.image_path(item))

    def digest(self) -> str:
        """A hash of names, labels, sizes and modification times: what tells an unchanged source from another one."""
        known = repr((self.format, self.classes, self.content))
        digest = hashlib.blake2b(known.encode("utf-8", "surrogatepass"), digest_size=16)
        for item in self.items if self.outcomes is None else ():
            paths = {item.path: None, self.image_path(item): None, item.mask: None}
            files = [_stamp(path) for path in paths if path is not None]
            digest.update(repr((item.name, item.labels, *files)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def open_source(
    path: str | os.PathLike[str],
    format: Format = "auto",
    root: str | os.PathLike[str] | None = None,
    *,
    masks: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    image_column: str | int | None = None,
    label_columns: Sequence[str] | None = None,
    part: str | None = None,
    label_from: str | None = None,
    header: Sequence[str] = (),
    window: str | tuple[float, float] | None = None,
    rescale: bool = False,
    kinds: Mapping[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
    ignore: Sequence[str] = (),
) -> Source:
    """List what is at `path`.

    format: `folders` (one sub-folder per class), `flat` (all images below, no labels), `list` (a text file that
        `label_lists` reads: of names and labels, or of names of images and masks), `pairs` (images and masks in two
        folders of the same names, or one folder with `img` and `label` in it for each pair), `labelme` (a folder of its
        JSON files), `mnist` and `cifar` (see `small_images`), `coco` (its JSON file of boxes), `tar` (WebDataset's
        shards: a file, a folder of them, or a pattern with braces), `parquet` (Hugging Face's: a file, or a folder of
        them), `dicom` (the same), `store`, or `auto`: a file is known by how it begins; a folder by MNIST's or CIFAR's
        files in it, by shards, by a labelme file, DICOM or an image at its top (which makes it flat), by Parquet files,
        by the names of folders of pairs; any other folder has classes.
    root: where the names of a list, or of COCO's, start; its own folder by default.
    masks: a folder with a mask for each image at `path`, of the same name but for the suffix.
    labels: a text file with the names of a mask's values, a line each, as labelme has it.
    image_column, label_columns: of a list with a header, see `label_lists.read_list`, or of Parquet files.
    part: `train` or `test` of MNIST and CIFAR, or a split of Parquet files; all there is by default.
    label_from, header, window, rescale: of DICOM, see `dicom.read_dicom`.
    kinds: of the fields of tar shards and Parquet files, where these don't say it, see `fields`.
    max_pixels: no mask is drawn for a larger image, and no file is read that is larger than such an image can be.
    ignore: files that are no items wherever they lie, such as the store that is being written.

    Raises:
        SourceError: nothing is there, it is empty, or it is not of the format that was asked for.
        StoreFormatError: it is a store that can't be read.
    """
    path = os.fspath(path)
    if format not in get_args(Format):
        raise SourceError(f"format is {format!r}; it may be one of {', '.join(get_args(Format))}")
    if not os.path.exists(path) and not tar_shards.looks_like_tar(path):
        raise SourceError(f"{path}: no such file or folder; give a folder of images or a list of `name label` lines")
    is_folder = os.path.isdir(path)
    if is_folder and not os.access(path, os.R_OK | os.X_OK):
        raise SourceError(f"{path} can't be listed; check its permissions")
    if masks is not None and format not in ("auto", "pairs"):
        raise SourceError(f"a folder of masks makes pairs, format is {format!r}; leave one of them out")
    if masks is not None:
        format = "pairs"
    if format == "auto":
        format = _recognised(path, is_folder)
    needed = _FILES.get(format, "folder")
    if format not in _EITHER and is_folder != (needed == "folder"):
        raise SourceError(
            f"{path} is a {'folder' if is_folder else 'file'}, format {format!r} needs "
            f"a {needed}; leave the format out to have it recognised"
        )
    given: dict[str, object] = {
        **{"root": root and os.fspath(root), "part": part, "image_column": image_column},
        **{"label_columns": label_columns, "label_from": label_from, "header": tuple(header) or None},
        **{"window": window, "rescale": rescale or None, "kinds": kinds or None},
    }
    for option, value in given.items():
        if value is not None and format not in _GO_WITH[option]:
            raise SourceError(
                f"{option} is {value!r}; it goes with {', '.join(_GO_WITH[option])}, and {path} is of format {format}"
            )
    start = os.path.dirname(path) or "." if root is None else os.fspath(root)
    builders: dict[str, Callable[[], Source]] = {
        "folders": lambda: _class_folders(path, ignore),
        "flat": lambda: _flat_folder(path, ignore),
        "list": lambda: _list(path, start, labels, image_column, label_columns),
        "pairs": lambda: _pairs(path, None if masks is None else os.fspath(masks), labels, ignore),
        "labelme": lambda: _labelme(path, labels, max_pixels, ignore),
        "mnist": lambda: _small_images(path, small_images.read_mnist(path, part), "mnist"),
        "cifar": lambda: _small_images(path, small_images.read_cifar(path, part), "cifar"),
        "coco": lambda: _of_samples(path, coco.read_coco(path, start, max_pixels=max_pixels), "coco"),
        "tar": lambda: _of_samples(path, tar_shards.read_shards(path), "tar", kinds),
        "parquet": lambda: _parquet(path, part, image_column, label_columns, kinds),
        "dicom": lambda: _dicom(path, ignore, label_from, header, window, rescale, max_pixels),
        "store": lambda: _store(path, max_pixels),
    }
    source = builders[format]()
    if source.read is read_files:
        source = source._replace(read=functools.partial(read_files, max_pixels=max_pixels))
    if labels is not None and not source.masks:
        raise SourceError(f"{os.fspath(labels)} names a mask's values, and there are no masks in {path}")
    if not source.items:
        raise SourceError(
            f"{path}: there is nothing to pack in it; is it the right {'folder' if is_folder else 'file'}?"
        )
    return source


def _recognised(path: str, is_folder: bool) -> Format:
    mode = os.stat(path).st_mode if os.path.exists(path) else 0  # a pattern of shards does not
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):  # but a list may come through a pipe
        raise SourceError(f"{path} is a device or a socket; give a folder of images, or a regular file")
    return next(format for format, is_it in _SIGNS[is_folder].items() if is_it(path))


def _has_annotation_at_top(folder: str) -> bool:
    names = (e.name for e in os.scandir(folder) if _visible(e.name) and e.name.endswith(".json") and e.is_file())
    return any(labelme.looks_like_annotation(os.path.join(folder, name)) for name in sorted(names)[:_JSON_TRIED])


def _has_image_at_top(folder: str) -> bool:
    files = (entry for entry in os.scandir(folder) if _visible(entry.name) and os.path.isfile(entry.path))
    return any(_looks_like_image(entry.path) for entry in files)


def _looks_like_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(16).startswith(_MAGIC)
    except OSError:
        return False


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _JUNK


def _is_one_of(entry: os.DirEntry[str], files: Sequence[str]) -> bool:
    same_name = [file for file in files if os.path.basename(file) == entry.name and os.path.exists(file)]
    return any(os.path.exists(entry.path) and os.path.samefile(entry.path, file) for file in same_name)


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


def _files_below(folder: str, root: str, ignore: Sequence[str]) -> list[tuple[str, str]]:
    """(name relative to root, path) of every file below `folder`, in ImageFolder's order: by folder, then file."""
    found = []
    for current, files in sorted(_walk(folder, root, ignore)):
        prefix = os.path.relpath(current, root).replace(os.sep, "/")
        found += [(f if prefix == "." else f"{prefix}/{f}", os.path.join(current, f)) for f in files]
    return found


def _class_folders(path: str, ignore: Sequence[str]) -> Source:
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
        files = _files_below(os.path.join(path, name), path, ignore)
        if not files:
            notes.append(f"class {name!r} has no files")
        items += [Item(file, file_path, (label,)) for file, file_path in files]
    if outside:
        notes.append(f"{len(outside)} files outside the class folders belong to no class, the first is {outside[0]!r}")
    return Source("folders", items, classes, 1, notes)


def _flat_folder(path: str, ignore: Sequence[str]) -> Source:
    return Source("flat", [Item(name, file_path) for name, file_path in _files_below(path, path, ignore)], None, 0, [])


_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
_MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "segmentationclass")


def _ignored(classes: list[str] | None) -> int:
    return labelme.ignore_value(classes or [])


def _pairs(path: str, masks: str | None, class_list: str | os.PathLike[str] | None, ignore: Sequence[str]) -> Source:
    classes = None if class_list is None else labelme.read_classes(class_list)
    folders = (os.path.normpath(path), os.path.normpath(masks)) if masks is not None else _two_folders(path)
    items, notes = [], []
    if folders is not None:
        if not os.path.isdir(folders[1]):
            raise SourceError(f"{folders[1]} is no folder; give the folder that holds the masks")
        by_stem: dict[str, list[str]] = {}
        for name, file in _files_below(folders[1], folders[1], (*ignore, folders[0])):
            by_stem.setdefault(os.path.splitext(name)[0], []).append(file)
        for name, file in _files_below(folders[0], folders[0], (*ignore, folders[1])):
            items.append(_pair(name, file, by_stem.pop(os.path.splitext(name)[0], []), folders[1]))
        if by_stem:
            notes.append(f"{len(by_stem)} masks belong to no image, the first is {min(by_stem)!r}")
    else:
        for folder, images, found in _pair_folders(path):
            items += [_pair(f"{folder}/{os.path.basename(image)}", image, found, path) for image in images]
            if not images:
                notes.append(f"folder {folder!r} holds no img")
    if not any(item.mask for item in items):
        raise SourceError(
            f"{path}: no image has a mask; give two folders with the same names (--masks FOLDER), or folders that "
            "hold img.png and label.png"
        )
    return Source("pairs", items, classes, 0, notes, masks={"mask": _ignored(classes)})


def _pair(name: str, image: str, masks: list[str], where: str) -> Item:
    if len(masks) == 1:
        return Item(name, image, mask=masks[0])
    if masks:
        return Item(name, image, (), f"there are several masks of this name, {masks[0]} and {masks[1]}")
    return Item(name, image, (), f"there is no mask of this name in {where}")


def _two_folders(path: str) -> tuple[str, str] | None:
    """The folders of images and of masks, if `path` holds these two by names that say so, and no other."""
    found = [entry for entry in os.scandir(path) if _visible(entry.name) and os.path.isdir(entry.path)]
    found = [entry for entry in found if entry.name != "instances"]  # what unpacking adds
    images = [entry.path for entry in found if entry.name.lower() in _IMAGE_FOLDERS]
    masks = [entry.path for entry in found if entry.name.lower() in _MASK_FOLDERS]
    if any(_has_annotation_at_top(folder) for folder in masks):
        return None
    return (images[0], masks[0]) if len(found) == 2 and len(images) == len(masks) == 1 else None


def _pair_folders(path: str) -> list[tuple[str, list[str], list[str]]]:
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


def _has_annotations(folder: str) -> bool:
    """Whether there are labelme's files in a folder, or in one below it that is called as those of masks are."""
    below = [entry.path for entry in os.scandir(folder) if entry.name.lower() in _MASK_FOLDERS and entry.is_dir()]
    return any(_has_annotation_at_top(path) for path in (folder, *below))


_SIGNS: dict[bool, dict[Format, Callable[[str], object]]] = {
    True: {
        "mnist": small_images.looks_like_mnist,
        "cifar": small_images.looks_like_cifar,
        "tar": tar_shards.looks_like_tar,
        "labelme": _has_annotations,
        "dicom": dicom.looks_like_dicom,
        "flat": _has_image_at_top,
        "parquet": hub_files.looks_like_parquet,
        "pairs": lambda path: _two_folders(path) or _pair_folders(path),
        "folders": lambda path: True,
    },
    False: {
        "tar": tar_shards.looks_like_tar,
        "parquet": hub_files.looks_like_parquet,
        "store": looks_like_store,
        "mnist": small_images.looks_like_mnist,
        "coco": coco.looks_like_coco,
        "dicom": dicom.looks_like_dicom,
        "list": lambda path: True,
    },
}
"""What a folder (True) or a file is, by the first sign that it shows."""


def _labelme(path: str, class_list: str | os.PathLike[str] | None, max_pixels: int, ignore: Sequence[str]) -> Source:
    files = [file for file in _files_below(path, path, ignore) if file[0].endswith(".json")]
    if class_list is None:
        classes, where = labelme.list_classes([file for _, file in files]), "the list of classes"
    else:
        classes, where = labelme.read_classes(class_list), os.fspath(class_list)

    def read(item: Item) -> dict[str, Any]:
        found = labelme.read(item.path, classes, root=path, max_pixels=max_pixels, class_list=where)
        image = found.image if isinstance(found.image, bytes) else _read(found.image, max_pixels)
        return {"image": image, "mask": found.mask, "instances": found.instances}

    masks = {"mask": _ignored(classes), "instances": 0}
    return Source(
        *("labelme", [Item(*file) for file in files], classes, 0, []),
        masks=masks,
        read=read,
        image_path=lambda item: labelme.image_path(item.path, path),
    )


def _store(path: str, max_pixels: int) -> Source:
    """The samples of a store, and after them what was left out of it, with the old reasons."""
    store = Store(path, max_pixels=max_pixels)
    column = store.columns["label"]
    rows = itertools.chain.from_iterable(chunk.reshape(len(chunk), -1).tolist() for chunk in column.chunks())
    items = [Item(f"sample {index}", path, tuple(labels), None, index) for index, labels in enumerate(rows)]
    items += [Item(entry["name"], path, (), entry["reason"]) for entry in store.quarantine()]
    label_count = column.shape[0] if column.shape else 1
    raw = store.manifest["options"].get("encode") == "raw"
    return Source(
        *(store.manifest["source"], items, store.classes, label_count, [], store, store.schema, store.masks),
        real=column.dtype.kind == "f",
        encode="raw" if raw else "keep",
    )


def _list(
    path: str,
    root: str,
    class_list: str | os.PathLike[str] | None,
    image_column: str | int | None,
    label_columns: Sequence[str] | None,
) -> Source:
    listed = label_lists.read_list(path, root, image_column=image_column, label_columns=label_columns)
    if _names_masks(listed, root):
        items = [_listed_pair(entry, root, listed.classes or []) for entry in listed.entries]
        classes = None if class_list is None else labelme.read_classes(class_list)
        return Source("pairs", items, classes, 0, listed.notes, masks={"mask": _ignored(classes)})
    items = [Item(entry.name, os.path.join(root, entry.name), entry.labels, entry.problem) for entry in listed.entries]
    packed = [item.labels for item in items if item.problem is None]
    bare = sum(all(label == -1 or math.isnan(label) for label in labels) for labels in packed)
    if bare and listed.label_count:
        listed.notes.append(
            f"{bare} of {len(packed)} samples have no label ({'NaN' if listed.real else -1} in the store)"
        )
    return Source("list", items, listed.classes, listed.label_count, listed.notes, real=listed.real)


def _names_masks(listed: label_lists.LabelList, root: str) -> bool:
    """Whether most labels of a list are files: lines of `image mask`."""
    names = (listed.classes or [])[:100] if listed.label_count == 1 else []
    return 2 * sum(os.path.isfile(os.path.join(root, name)) for name in names) > len(names)


def _listed_pair(entry: label_lists.Entry, root: str, names: list[str]) -> Item:
    name, image = entry.name, os.path.join(root, entry.name)
    if entry.problem is not None or int(entry.labels[0]) < 0:
        return Item(name, image, (), entry.problem or f"line {entry.line}: there is no mask")
    mask = os.path.join(root, names[int(entry.labels[0])])
    missing = None if os.path.isfile(mask) else f"line {entry.line}: there is no mask {mask}"
    return Item(name, image, (), missing, mask=mask)


def _parquet(
    path: str,
    part: str | None,
    image_column: str | int | None,
    label_columns: Sequence[str] | None,
    kinds: Mapping[str, str] | None,
) -> Source:
    if isinstance(image_column, int):
        raise SourceError(f"image_column is {image_column}; columns of Parquet files have names")
    found = parquet.read_parquet(path, part, image_column=image_column, label_columns=label_columns)
    return _of_samples(path, found, "parquet", kinds)


def _dicom(
    path: str,
    ignore: Sequence[str],
    label_from: str | None,
    header: Sequence[str],
    window: str | tuple[float, float] | None,
    rescale: bool,
    max_pixels: int,
) -> Source:
    files = _files_below(path, path, ignore) if os.path.isdir(path) else [(os.path.basename(path), path)]
    found = dicom.read_dicom(
        files, label_from=label_from, header=header, window=window, rescale=rescale, max_pixels=max_pixels
    )
    return _of_samples(path, found, "dicom")


def _of_samples(path: str, found: Samples, format: str, kinds: Mapping[str, str] | None = None) -> Source:
    """A source whose samples are dicts; what they consist of is learned from some that are spread over it."""
    items = [Item(name, path, (), found.problems.get(i), i) for i, name in enumerate(found.names)]
    whole = [item.sample for item in items if item.problem is None and item.sample is not None]
    first: list[dict[str, Any]] = []
    error: Exception | None = None
    for sample in (whole[place * len(whole) // _LOOKED_AT] for place in range(_LOOKED_AT) if whole):
        try:
            first.append(found.read(sample))
        except (OSError, SourceError) as reason:
            error = error or reason
    if items and not first:
        why = str(error) if error else found.problems[0]
        raise SourceError(f"{path}: none of the samples looked at can be read; the first: {why}")
    schema = _learned(first, {**found.kinds, **(kinds or {})}) if first else None

    def read(item: Item) -> dict[str, Any]:
        assert item.sample is not None
        assert schema is not None
        return schema.flatten(found.read(item.sample))

    return Source(
        *(format, items, found.classes, 1, found.notes),
        schema=schema and _as_pair(schema),
        masks={spec.name: spec.fill for spec in schema.of_kind("mask")} if schema else {},
        read=read,
        content=found.content,
    )


def _learned(samples: Sequence[dict[str, Any]], kinds: Mapping[str, str]) -> Schema:
    """The schema of dicts whose values are fields each. Pictures and boxes are tensors, whatever they come in."""
    values = [item for sample in samples for item in sample.items()]
    plain = {name for name, value in values if value is None or type(value) in (dict, list)}
    schema = fields.learn(samples, dict.fromkeys(plain, "json") | dict(kinds))
    types = {"image": "file", "boxes": "tensor"}
    return schema._replace(specs=tuple(s._replace(type=types.get(s.kind, s.type)) for s in schema.specs))


def _as_pair(schema: Schema) -> Schema:
    """The schema with pairs instead of dicts, where these hold an image and no more than a label or a mask."""
    names = [spec.name for spec in schema.specs]
    if names == ["image"]:
        return schema._replace(sample={"tuple": ["image", "label"]})
    return schema._replace(sample={"tuple": names}) if names in (["image", "label"], ["image", "mask"]) else schema


def _small_images(path: str, found: small_images.SmallImages, format: str) -> Source:
    labels = found.labels.tolist()
    items = [Item(found.name(index), path, (label,), None, index) for index, label in enumerate(labels)]

    def read(item: Item) -> dict[str, Any]:
        assert item.sample is not None
        return {"image": found.images[item.sample]}

    content = f"{record.checksum(found.images.data):016x}"
    return Source(format, items, found.classes, 1, found.notes, read=read, encode="raw", content=content)
