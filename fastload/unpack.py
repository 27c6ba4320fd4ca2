"""Giving the files back: byte for byte where they were kept, re-cut and re-encoded images as what they are now.

Names come from the store and are not trusted: one that is absolute, climbs out of the target folder or can't be a file
name here is replaced by the sample's number.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image

from . import blocks, decode, record
from .blocks import Values
from .errors import ChecksumError, DecodeError, FastloadError, StoreError
from .store import Store

_FORBIDDEN = re.compile(r'[\x00<>:"|?*\\]' if os.name == "nt" else r"\x00")
_MASK_FOLDERS = {"mask": "masks"}
CLASSES = "classes.txt"
LABELS = "labels.tsv"
"""The list that is written beside the files where folders don't tell the labels."""


def unpack(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the images of a store to files below `folder`, under the names that they had.

    Kept files come back byte for byte, re-cut JPEGs as JPEGs of the same pixels, with their EXIF data and profiles.
    Images that were re-encoded get the suffix of what they are; raw ones are written as PNG, those of 16 bits too,
    upright, with the same values. PNG has no negative ones: int16 images are written as .npy, which `numpy.load` reads.
    A store that was packed from a list also gets `labels.tsv`, which `fastload pack` reads. Where there are masks,
    images go to `images`, and masks, as PNG with the same names, to `masks` and `instances`.

    A file `classes.txt` names the values of masks, for `fastload pack --labels`.

    Returns the number of samples. progress: called with (samples done, samples in all).

    Raises:
        FileExistsError: `folder` is a file, or is not empty.
        StoreError: samples are damaged, and left out; all others are there.
    """
    target = Path(folder)
    store = Store(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder; choose another one")
    target.mkdir(parents=True, exist_ok=True)
    labels = store.columns["label"]
    listed = store.manifest["source"] in ("list", "mnist", "cifar")
    names, mask_names = _Names({LABELS} if listed else set()), _Names(set())
    count = labels.shape[0] if labels.shape else 1
    real = listed and labels.dtype.kind == "f"
    lines = ["\t".join(["file", *(f"label {number}" for number in range(count))])] if real else []
    damaged: list[str] = []
    for index in range(len(store)):
        if progress is not None:
            progress(index + 1, len(store))
        try:
            data, suffix, name = _file(store, index)
            masks = list(_masks(store, index))
        except FastloadError as error:
            damaged.append(f"sample {index}: {error}")
            continue
        safe = PurePosixPath(safe_name(name, index, suffix))
        if store.masks:  # masks are found by the name without its suffix
            safe = PurePosixPath(mask_names.take(str(safe.with_suffix(".png")), index)).with_suffix(safe.suffix)
        relative = names.take(str(safe), index)
        for part, content in (("images" if store.masks else "", data), *masks):
            file = target / part / (relative if content is data else str(PurePosixPath(relative).with_suffix(".png")))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        values = np.atleast_1d(labels[index]).tolist()
        texts = ("" if real and math.isnan(value) else str(value) for value in values)
        lines.append("\t".join([_quoted(relative), *texts]))
    if listed:
        text = "".join(line + "\n" for line in lines)
        (target / LABELS).write_bytes(text.encode("utf-8", "surrogateescape"))
    if store.masks and store.classes:
        text = "".join(name + "\n" for name in store.classes)
        (target / CLASSES).write_bytes(text.encode("utf-8", "surrogateescape"))
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(store)} samples are damaged and left out, the others are in {target}; the first "
            f"is {damaged[0]} (`fastload verify` lists them all)"
        )
    return len(store)


def _file(store: Store, index: int) -> tuple[bytes, str | None, str]:
    """The bytes of a sample's file, the suffix that it must have now (None: its own), and the name that it had."""
    sample = store[index]
    column = store.columns.get("image")
    if column is not None:
        pixels = column[index]
        if record.checksum(pixels.data) != store.columns["checksum"][index]:
            raise ChecksumError(f"sample {index} ({sample.name}): the pixels differ from what was packed (checksum)")
        return _png(pixels), ".png", sample.name
    image = sample["image"]
    if image.codec in (record.RAW, record.BLOCKS):
        try:
            pixels = decode.upright(image)
        except DecodeError as error:
            raise StoreError(f"sample {index} ({sample.name}): {error}") from error
        if pixels.dtype == np.int16:
            return _npy(pixels), ".npy", sample.name
        return _png(pixels), ".png", sample.name
    suffix = (".jpg" if image.codec == record.JPEG else ".png") if image.flags & record.REENCODED else None
    if store.manifest["source"] == "labelme":  # the names are those of its JSON files
        kind = Image.open(io.BytesIO(image.payload)).format
        suffix = ".jpg" if kind in (None, "JPEG", "MPO") else f".{kind.lower()}"
    return bytes(image.payload), suffix, sample.name


def _masks(store: Store, index: int) -> Iterator[tuple[str, bytes]]:
    """The folder of each mask of a sample, and the mask as PNG."""
    sample = store[index]
    for name in store.masks:
        yield _MASK_FOLDERS.get(name, name), cv2.imencode(".png", blocks.read(sample[name]))[1].tobytes()


def _png(pixels: Values) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()  # OpenCV's order is BGR


def _npy(pixels: Values) -> bytes:
    """An array as NumPy's own file: (height, width), or (height, width, 3)."""
    file = io.BytesIO()
    np.save(file, pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return file.getvalue()


def safe_name(name: str, index: int, suffix: str | None) -> str:
    """A relative path that stays inside its folder: `name`, with `suffix` if one is given, or the sample's number."""
    path = PurePosixPath(name)
    climbs = path.is_absolute() or ".." in path.parts or not path.parts or os.path.splitdrive(name)[0]
    too_long = len(os.fsencode(name)) > 1000 or any(len(os.fsencode(part)) > 240 for part in path.parts)
    if climbs or too_long or _FORBIDDEN.search(name):
        path = PurePosixPath(_number(index, path.suffix))
    if suffix is not None and path.suffix.lower() not in ((".jpg", ".jpeg") if suffix == ".jpg" else (suffix,)):
        path = path.with_suffix(suffix)
    return str(path)


def _number(index: int, suffix: str) -> str:
    return f"{index:08d}" + (suffix if suffix[1:].isalnum() and len(suffix) < 10 else "")


class _Names:
    """Names given out so far, so that no file overwrites another, on file systems that ignore case too."""

    def __init__(self, files: set[str]) -> None:
        self._files, self._folders = set(files), set[str]()

    def take(self, name: str, index: int) -> str:
        """`name`, or a variant of it that no earlier file of this store has."""
        path = PurePosixPath(name)
        if any(str(folder).casefold() in self._files for folder in path.parents):
            path = PurePosixPath(_number(index, path.suffix))
        candidate, number = str(path), 1
        while candidate.casefold() in self._files or candidate.casefold() in self._folders:
            number += 1
            candidate = str(path.with_name(f"{path.stem}~{number}{path.suffix}"))
        self._files.add(candidate.casefold())
        self._folders.update(str(folder).casefold() for folder in path.parents)
        return candidate


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in '\t"\n\r') or name != name.strip() else name
