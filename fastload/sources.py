"""What can be packed, and how it is recognised: `open_source` is the one place that chooses.

A source lists items in index order: class, then path, for class folders; path for a flat folder, pairs and labelme
(see `folders`); line for a list; a store's own order. Every file that is not hidden is an item: what turns out to be no
image is quarantined by name when it is packed, so nothing is left out silently. Here files are only listed;
`Source.read`, which packing calls in its threads, reads what an item consists of.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from . import coco, dicom, folders, hub_files, label_lists, labelme, record, sample_sources, small_images, tar_shards
from .errors import SourceError
from .geometry import MAX_PIXELS
from .items import Item, Source, read_files
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
_SIGNS: dict[bool, dict[Format, Callable[[str], object]]] = {
    True: {
        "mnist": small_images.looks_like_mnist,
        "cifar": small_images.looks_like_cifar,
        "tar": tar_shards.looks_like_tar,
        "labelme": folders.has_annotations,
        "dicom": dicom.looks_like_dicom,
        "flat": folders.has_image_at_top,
        "parquet": hub_files.looks_like_parquet,
        "pairs": lambda path: folders.two_folders(path) or folders.pair_folders(path),
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
        "folders": lambda: folders.class_folders(path, ignore),
        "flat": lambda: folders.flat_folder(path, ignore),
        "list": lambda: _list(path, start, labels, image_column, label_columns),
        "pairs": lambda: folders.pairs(path, None if masks is None else os.fspath(masks), labels, ignore),
        "labelme": lambda: folders.labelme_files(path, labels, max_pixels, ignore),
        "mnist": lambda: _small_images(path, small_images.read_mnist(path, part), "mnist"),
        "cifar": lambda: _small_images(path, small_images.read_cifar(path, part), "cifar"),
        "coco": lambda: sample_sources.of_samples(path, coco.read_coco(path, start, max_pixels=max_pixels), "coco"),
        "tar": lambda: sample_sources.of_samples(path, tar_shards.read_shards(path), "tar", kinds),
        "parquet": lambda: sample_sources.parquet_files(path, part, image_column, label_columns, kinds),
        "dicom": lambda: sample_sources.dicom_files(path, ignore, label_from, header, window, rescale, max_pixels),
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
        return Source("pairs", items, classes, 0, listed.notes, masks={"mask": labelme.ignore_value(classes or [])})
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


def _small_images(path: str, found: small_images.SmallImages, format: str) -> Source:
    labels = found.labels.tolist()
    items = [Item(found.name(index), path, (label,), None, index) for index, label in enumerate(labels)]

    def read(item: Item) -> dict[str, Any]:
        assert item.sample is not None
        return {"image": found.images[item.sample]}

    content = f"{record.checksum(found.images.data):016x}"
    return Source(format, items, found.classes, 1, found.notes, read=read, encode="raw", content=content)


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
