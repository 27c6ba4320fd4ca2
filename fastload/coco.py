"""Boxes in COCO's format: one JSON file that lists images, the boxes in them, and the categories of what is in these.

    {"images":      [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 9, "category_id": 3, "bbox": [x, y, width, height], "iscrowd": 0}],
     "categories":  [{"id": 3, "name": "car"}]}

The file is read into memory whole, but what is not named here, such as outlines, is dropped while it is parsed.
Nothing in it is believed: names of files stay below the root, and what makes no sense is an error that names the place.
If it is about one image, that image is left out with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from . import boxes, labelme
from .errors import SourceError
from .geometry import MAX_PIXELS, Size
from .samples import EncodedImage, Samples

_MAX_BYTES = 1 << 32
_HEAD = 1 << 16
_LARGEST = 1 << 31
_ENTRY_KEYS = ("id", "file_name", "width", "height", "image_id", "category_id", "bbox", "iscrowd", "name")
_LISTS = ("images", "annotations", "categories")
_KEYS = frozenset((*_ENTRY_KEYS, *_LISTS))
_FIRST_KEY = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:info|licenses|images|annotations|categories|type)"\s*:')
_LIST = re.compile(rb'"(?:images|annotations|categories)"\s*:\s*\[\s*[{\]]')

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100

_Places = dict[int | str, int]
"""Where in a list the object with an id is."""


class _Boxes(NamedTuple):
    """The boxes of all images. image: the place of each one's image, in ascending order. problems: of images."""

    image: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowds: int
    problems: dict[int, str]


def looks_like_coco(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as COCO's do: with an object of its keys, one of which has a list."""
    if not os.path.isfile(path):  # what can be read only once is left for the list that it is
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return _FIRST_KEY.match(head) is not None and _LIST.search(head) is not None


def read_coco(path: str | os.PathLike[str], root: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Samples:
    """The images that a file in COCO's format lists, with their boxes and labels.

    root: the folder that the names of images start at, and don't leave. max_pixels: larger images are left out.

    A sample has `image`, `boxes`, float32 (n, 4) of (x, y, width, height), and `labels`, int64 (n,). Labels count the
    categories in the order of their ids. Crowds, whose boxes are around many things at once, are left out.

    Raises:
        SourceError: the file can't be read, is damaged or contradictory, or none of its images can be packed.
    """
    path, root = os.fspath(path), os.path.realpath(root)
    with _at(path):
        data = labelme.read_bytes(path, _MAX_BYTES)
        content = _content(data)
        images = _places(content["images"], "images")
        names = _names(content["images"])
        classes = _by_id(content["categories"])
        found = _boxes(content["annotations"], images, {id: label for label, (id, _) in enumerate(classes)})
    missing, stamps = _looked_up(root, names)
    problems = {**missing, **found.problems}
    content_hash = hashlib.blake2b(data, digest_size=16)
    content_hash.update(stamps.encode())
    del data
    if names and len(problems) == len(names):
        raise SourceError(
            f"{path}: none of its {len(names)} images can be packed; {names[0]}: {problems[0]}. Names are relative to "
            "the list's folder, or to --root"
        )
    declared = [(entry.get("height"), entry.get("width")) for entry in content["images"]]

    def read(index: int) -> dict[str, Any]:
        file = _file(root, names[index])
        size = labelme.image_size(file, max_pixels)
        _check_size(declared[index], size)
        own = slice(*np.searchsorted(found.image, (index, index + 1)))
        return {
            "image": EncodedImage(Path(file).read_bytes()),
            "boxes": boxes.checked(found.boxes[own], size),
            "labels": torch.from_numpy(found.labels[own]),
        }

    notes = [f"boxes around crowds (iscrowd) are left out: {found.crowds}"] if found.crowds else []
    return Samples(
        names=names,
        read=read,
        problems=problems,
        kinds={"boxes": "boxes"},
        classes=[name for _, name in classes],
        notes=notes,
        content=content_hash.hexdigest(),
    )


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{place}: {error}") from error


def _content(data: bytes) -> dict[str, list[Any]]:
    try:
        content = json.loads(data, object_hook=lambda entry: {k: v for k, v in entry.items() if k in _KEYS})
    except RecursionError as error:
        raise SourceError("its JSON is nested too deeply for COCO's format") from error
    except ValueError as error:
        raise SourceError(f"it is not JSON: {error}; was it cut short?") from error
    for key in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise SourceError(f"it is JSON, but not in COCO's format: it has no list `{key}`")
    return content  # type: ignore[no-any-return]


def _places(entries: list[Any], what: str) -> _Places:
    places: _Places = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("id")) not in (int, str):
            raise SourceError(f"{what}[{place}] is {_brief.repr(entry)}; it must be an object with an id")
        first = places.setdefault(entry["id"], place)
        if first != place:
            raise SourceError(f"{what}[{place}] has the id {_brief.repr(entry['id'])}, and so has {what}[{first}]")
    return places


def _names(images: list[dict[str, Any]]) -> list[str]:
    """The names of the files, each of them once."""
    places: dict[str, int] = {}
    for place, entry in enumerate(images):
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or not _encodable(name):
            raise SourceError(f"images[{place}] has the file_name {_brief.repr(name)}; it must be the name of a file")
        first = places.setdefault(name.replace(os.sep, "/"), place)
        if first != place:
            raise SourceError(f"images[{place}] has the file_name {_brief.repr(name)}, and so has images[{first}]")
    return list(places)


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _by_id(categories: list[Any]) -> list[tuple[int, str]]:
    """(id, name) of the categories in the order of their ids."""
    for place, entry in enumerate(categories):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise SourceError(
                f"categories[{place}] is {_brief.repr(entry)}; it must be an object with a number as id and a name"
            )
    _places(categories, "categories")
    return sorted((entry["id"], entry["name"]) for entry in categories)


def _boxes(annotations: list[Any], images: _Places, labels: _Places) -> _Boxes:
    """The boxes of the annotations, image by image. labels: by the ids of categories."""
    owners, rows, classes, problems, crowds = list[int](), list[list[float]](), list[int](), dict[int, str](), 0
    for place, entry in enumerate(annotations):
        id = entry.get("image_id") if isinstance(entry, dict) else None
        if type(id) not in (int, str) or id not in images:
            raise SourceError(f"annotations[{place}] is {_brief.repr(entry)}; its image_id must be the id of an image")
        if entry.get("iscrowd"):
            crowds += 1
            continue
        box, category = entry.get("bbox"), entry.get("category_id")
        if type(category) is not int or category not in labels:
            problem = f"category_id is {_brief.repr(category)}; it must be the id of a category"
        elif not (isinstance(box, list) and len(box) == 4 and all(map(_is_length, box))):
            problem = f"bbox is {_brief.repr(box)}; it must be four numbers, [x, y, width, height]"
        else:
            owners.append(images[id])
            rows.append(box)
            classes.append(labels[category])
            continue
        problems.setdefault(images[id], f"annotations[{place}]: {problem}")
    order = np.argsort(np.array(owners, np.int64), kind="stable")
    image, label = (np.array(values, np.int64)[order] for values in (owners, classes))
    return _Boxes(image, boxes.from_format(rows, "XYWH")[order], label, crowds, problems)


def _is_length(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[arg-type]  # NaN is not


def _file(root: str, name: str) -> str:
    """The path of an image; SourceError if there is none, or it is not below the root, which has no links in it."""
    known = PureWindowsPath(name) if os.name == "nt" else Path(name)
    if known.anchor or ".." in known.parts:
        raise SourceError(f"file_name {_brief.repr(name)} leads out of {root}; give a root that has all images in it")
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        raise SourceError(f"there is no such file, {path}")
    if not os.path.realpath(path).startswith(os.path.join(root, "")):
        raise SourceError(f"{path} is a link that leads out of {root}; give a root that has all images in it")
    return path


def _looked_up(root: str, names: list[str]) -> tuple[dict[int, str], str]:
    """Why images can't be had, by their places, and what changes when one of the others does."""
    problems, stamps = dict[int, str](), list[tuple[int, int]]()
    for place, name in enumerate(names):
        try:
            status = os.stat(_file(root, name))
        except (SourceError, OSError) as error:
            problems[place] = str(error)
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return problems, repr(stamps)


def _check_size(declared: tuple[Any, Any], size: Size) -> None:
    if any(given not in (None, actual) for given, actual in zip(declared, size, strict=True)):
        height, width = map(_brief.repr, declared)
        raise SourceError(
            f"it is listed as {width} x {height} pixels, but the image has {size[1]} x {size[0]}; was it replaced, or "
            "turned, after it was annotated?"
        )
