"""Giving the files back: byte for byte where they were kept, re-cut and re-encoded images as what they are now.

They become a folder of files, or WebDataset's shards. Names come from the store and are not trusted: one that is
absolute, climbs out of the target folder or can't be a file name here is replaced by the sample's number.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch

from . import blocks, decode, headers, record
from .blocks import Values
from .errors import DecodeError, FastloadError, StoreError, writing
from .fields import Spec, restore
from .geometry import MAX_PIXELS
from .member_values import IMAGES, is_known
from .store import Record, Store
from .values import Value

Target = Literal["folder", "tar"]

_FORBIDDEN = re.compile(
    r'(?i)[\x00-\x1f<>:"|?*\\]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)' if os.name == "nt" else r"\x00"
)
_ODD = re.compile(r"[^A-Za-z0-9_.-]")
_EXTENSION = 100  # file systems take 255 bytes, the sample's own name among them
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MASK_FOLDERS = {"mask": "masks"}
CLASSES = "classes.txt"
_LISTED = ("list", "mnist", "cifar", "tar", "parquet", "dicom", "dataset")
LABELS = "labels.tsv"
"""The list that is written beside the files where folders don't tell the labels."""


def unpack(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Target = "folder",
    shard_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the samples of a store to files.

    Kept files come back byte for byte, re-cut JPEGs as JPEGs of the same pixels, with their EXIF data and profiles.
    Images that were re-encoded get the suffix of what they are; raw ones are written as PNG, those of 16 bits too,
    upright, with the same values. PNG has no negative ones: int16 images are written as .npy, which `numpy.load` reads.

    `folder`: `target` is a new or empty folder, where images get the names that they had. A store that was packed from
    a list also gets `labels.tsv`, which `fastload pack` reads. Where there are masks, images go to `images`, and masks,
    as PNG with the same names, to `masks` and `instances`. A file `classes.txt` names the values of masks, for
    `fastload pack --labels`.

    `tar`: `target` is a new file `NAME.tar`, or stands for `NAME-000000.tar` and so on, of `shard_size` samples each.
    Members are `KEY.jpg` or what the image is, `KEY.mask.png` and `KEY.instances.png`, `KEY.cls` with the label where
    any sample has one, -1 where this one has none, `KEY.label.json` where labels are several or real. The same store
    makes the same bytes. `NAME.classes.txt` names the classes. Nothing is there before all of it is.

    Other fields lie beside the image as `NAME.FIELD.txt`, `.npy`, `.json` or `.bin`, in shards as such members.

    Returns the number of samples. max_pixels: larger images count as damaged. progress: called with (samples done,
    samples in all).

    Raises:
        FileExistsError: the target is there already.
        StoreError: samples are damaged, and left out; all others are there.
        ValueError: the format is another, `target` doesn't end in .tar, or `shard_size` makes no sense.
    """
    if format not in get_args(Target):
        raise ValueError(f"format is {format!r}; it may be {' or '.join(get_args(Target))}")
    if shard_size is not None and (format != "tar" or shard_size < 1):
        raise ValueError(f"shard_size is {shard_size} for format {format!r}; it goes with tar, and is at least 1")
    store = Store(path, max_pixels=max_pixels)
    target = Path(target)
    damaged: list[str] = []
    with _Folder(store, target) if format == "folder" else _Shards(store, target, shard_size) as files:
        for index in range(len(store)):
            if progress is not None:
                progress(index + 1, len(store))
            try:
                files.add(_sample(store, index))
            except FastloadError as error:
                damaged.append(f"{_described(store, index)}: {error}")
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(store)} samples are damaged and left out, the others are in {target}; the first "
            f"is {damaged[0]} (`fastload verify` lists them all)"
        )
    return len(store)


def shard_names(target: str | os.PathLike[str], count: int) -> list[str]:
    """The names of so many shards: `out-000000.tar` and so on for `out.tar`."""
    stem = os.fspath(target).removesuffix(".tar")
    return [f"{stem}-{number:06d}.tar" for number in range(count)]


def _described(store: Store, index: int) -> str:
    try:
        return f"sample {index} ({store.name(index)})"
    except FastloadError:
        return f"sample {index}"


class _Sample(NamedTuple):
    """A sample as files.

    name: that it had. suffix: what the image must have now; None: its own. image: empty where there is none. masks:
    PNGs by field. labels: all of them. others: the other fields by extension.
    """

    number: int
    name: str
    suffix: str | None
    image: bytes
    masks: dict[str, bytes]
    labels: list[int] | list[float]
    others: dict[str, bytes]


def _sample(store: Store, index: int) -> _Sample:
    fields = store[index]
    image, suffix = (b"", "") if store.schema.image is None else _image(store, index, fields)
    masks = {mask: cv2.imencode(".png", blocks.read(fields[mask]))[1].tobytes() for mask in store.masks}
    labels = np.atleast_1d(store.columns["label"][index]).tolist()
    others: dict[str, bytes] = {}
    for spec in store.schema.others:
        if spec.column != "label":
            extension, data = _other(store, spec, index, fields)
            while extension in others:
                extension = f"_{extension}"
            others[extension] = data
    return _Sample(index, fields.name, suffix, image, masks, labels, others)


def _other(store: Store, spec: Spec, index: int, sample: Record) -> tuple[str, bytes]:
    """A field as a file: its extension and bytes. An extension that says what it is stays as it is."""
    name = _ODD.sub("_", spec.name).strip(".")[:_EXTENSION]
    if spec.kind == "image":
        return f"{name}.png", _png(decode.upright(sample[spec.name]))
    if spec.kind == "bytes":
        data, extension = bytes(sample[spec.name].payload), "bin"
    elif spec.kind == "text":
        data, extension = bytes(sample[spec.name].payload), "txt"
    else:
        if spec.column is not None:
            value = restore(spec, store.columns[spec.column][index][None])[0]
        else:
            value = Value(spec, None).read(sample[spec.name], [])
        if spec.kind in ("array", "boxes", "vector"):
            data, extension = _npy(value), "npy"
        else:
            value = value.item() if hasattr(value, "item") else value
            data, extension = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), "json"
    known = name.rpartition(".")[2] == extension or (spec.kind == "bytes" and not is_known(name))
    return (name if known else f"{name}.{extension}"), data


def _npy(value: np.ndarray[Any, Any] | torch.Tensor) -> bytes:
    file = io.BytesIO()
    if isinstance(value, torch.Tensor):
        is_known = value.dtype.itemsize > 2 or value.dtype == torch.float16 or not value.is_floating_point()
        value = (value if is_known else value.float()).numpy()  # bfloat16 and smaller ones aren't NumPy's
    np.save(file, value)
    return file.getvalue()


def _image(store: Store, index: int, fields: Record) -> tuple[bytes, str | None]:
    """The bytes of a sample's image file, and the suffix that it must have now; None: its own."""
    if "image" in store.columns:
        return _png(store.raw_image(index)), ".png"
    image = fields["image"]
    if image.codec in (record.RAW, record.BLOCKS):
        try:
            pixels = decode.upright(image)
            if pixels.dtype == np.int16:
                return _npy(pixels[..., 0] if pixels.shape[2] == 1 else pixels), ".npy"
            return _png(pixels), ".png"
        except DecodeError as error:
            raise StoreError(f"sample {index} ({fields.name}): {error}") from error
    suffix = (".jpg" if image.codec == record.JPEG else ".png") if image.flags & record.REENCODED else None
    if store.manifest["source"] in ("labelme", "tar"):  # the names are no image files'
        suffix = _suffix_of(bytes(image.payload))
    return bytes(image.payload), suffix


def _suffix_of(image: bytes) -> str:
    """What a file with these bytes is called."""
    try:
        with headers.opened(image) as opened:
            kind = opened.format
    except DecodeError as error:
        raise StoreError(f"the image is of no known format: {error}") from error
    return ".jpg" if kind in (None, "JPEG", "MPO") else f".{kind.lower()}"


class _Folder(contextlib.AbstractContextManager["_Folder"]):
    """A folder of files under the names that they had, with lists of what names don't tell."""

    def __init__(self, store: Store, target: Path) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} is not an empty folder; choose another one")
        target.mkdir(parents=True, exist_ok=True)
        self._store, self._target = store, target
        labels = store.columns["label"]
        from_list, unlabelled = store.manifest["source"] == "list", all((c == -1).all() for c in labels.chunks())
        self._listed = from_list or (store.manifest["source"] in _LISTED and not (store.masks or unlabelled))
        self._real = self._listed and labels.dtype.kind == "f"
        self._names, self._mask_names = _Names({LABELS} if self._listed else set()), _Names(set())
        columns = range(labels.shape[0] if labels.shape else 1)
        self._lines = ["\t".join(["file", *(f"label {column}" for column in columns)])] if self._real else []

    def add(self, sample: _Sample) -> None:
        safe = PurePosixPath(safe_name(sample.name, sample.number, sample.suffix))
        if self._store.masks:  # masks are found by the name without its suffix
            taken = self._mask_names.take(str(safe.with_suffix(".png")), sample.number)
            safe = PurePosixPath(taken).with_suffix(safe.suffix)
        name = self._names.take(str(safe), sample.number)
        if sample.image:
            self._write(f"images/{name}" if self._store.masks else name, sample.image)
        for extension, content in sample.others.items():
            self._write(f"{PurePosixPath(name).with_suffix('')}.{extension}", content)
        for field, mask in sample.masks.items():
            self._write(f"{_MASK_FOLDERS.get(field, field)}/{PurePosixPath(name).with_suffix('.png')}", mask)
        texts = ("" if self._real and math.isnan(value) else str(value) for value in sample.labels)
        self._lines.append("\t".join([_quoted(name), *texts]))

    def _write(self, name: str, content: bytes) -> None:
        file = self._target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file):
            try:
                file.write_bytes(content)
            except OSError:
                file.unlink(missing_ok=True)  # half of it
                raise

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._listed:
            self._write(LABELS, _lines(self._lines))
        if error is None and self._store.masks and self._store.classes:
            self._write(CLASSES, _lines(self._store.classes))


class _Shards(contextlib.AbstractContextManager["_Shards"]):
    """Tar files as WebDataset has them, which get their names when all of them are complete."""

    def __init__(self, store: Store, target: Path, shard_size: int | None) -> None:
        if target.suffix != ".tar":
            raise ValueError(f"{target} is no name of a tar file; end it in .tar")
        self._store, self._target, self._shard_size = store, target, shard_size
        self._classes = target.with_suffix(".classes.txt")
        shards = (
            [target] if shard_size is None else sorted(target.parent.glob(f"{glob.escape(target.stem)}-[0-9]*.tar"))
        )
        there = [path for path in (*shards, self._classes) if path.exists()]
        if there:
            raise FileExistsError(f"{there[0]} exists; choose another name, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._names = _Names(set())
        self._time = _creation_time(store)
        columns = store.columns["label"]
        self._several = bool(columns.shape) or columns.dtype.kind == "f"
        self._labelled = self._several or any((chunk != -1).any() for chunk in columns.chunks())
        self._count = 0
        self._unfinished: list[str] = []
        self._tar = self._next_shard()

    def add(self, sample: _Sample) -> None:
        name = safe_name(sample.name, sample.number, sample.suffix)
        members = {f"{field}.png": mask for field, mask in sample.masks.items()} | sample.others
        if sample.image:
            own = PurePosixPath(name).suffix.lower()
            image = own[1:] if own[1:] in (*IMAGES, "npy") else _suffix_of(sample.image)[1:]
            members = {image: sample.image} | members
        if self._several:
            numbers = [None if math.isnan(label) else label for label in sample.labels]
            members["label.json"] = json.dumps(numbers).encode()
        elif self._labelled:
            members["cls"] = str(sample.labels[0]).encode()
        if self._count and self._shard_size and self._count % self._shard_size == 0:
            self._close()
            self._tar = self._next_shard()
        self._count += 1
        key = self._names.take(_key(name), sample.number)
        for extension, content in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # of no user, and readable by all
            member.size, member.mtime = len(content), self._time
            with writing(self._unfinished[-1]):
                self._tar.addfile(member, io.BytesIO(content))

    def _next_shard(self) -> tarfile.TarFile:
        self._unfinished.append(f"{self._target}.{len(self._unfinished)}.partial")
        return tarfile.open(self._unfinished[-1], "w", format=tarfile.PAX_FORMAT, encoding="utf-8")

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            with contextlib.suppress(OSError):  # a full disk says so once more
                self._tar.fileobj.close()
            for path in self._unfinished:
                Path(path).unlink(missing_ok=True)

    def _close(self) -> None:
        with writing(self._unfinished[-1]):
            self._tar.close()

    def _finish(self) -> None:
        self._close()
        if self._store.classes:
            with writing(self._classes):
                self._classes.write_bytes(_lines([name.replace("\n", " ") for name in self._store.classes]))
        names = [os.fspath(self._target)]
        if self._shard_size is not None:
            names = shard_names(self._target, len(self._unfinished))
        for path, name in zip(self._unfinished, names, strict=True):
            os.replace(path, name)


def _key(name: str) -> str:
    """What is before the first dot of the names of a sample's members; WebDataset skips what begins as __NAME__."""
    path = PurePosixPath(name)
    key = _CONTROL.sub("_", str(path.with_name(path.stem.replace(".", "_"))))
    return "_" + key.lstrip("_") if key.startswith("__") else key


def _creation_time(store: Store) -> int:
    try:
        return max(0, int(datetime.fromisoformat(store.manifest["created"]).timestamp()))
    except (TypeError, ValueError, OverflowError, OSError):
        return 0


def _lines(texts: Sequence[str]) -> bytes:
    """Texts as a file, with the bytes of names that are no UTF-8. Other half characters, as JSON may have, become ?."""
    joined = "".join(text + "\n" for text in texts)
    try:
        return joined.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return joined.encode("utf-8", "replace")


def _png(pixels: Values) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()  # OpenCV's order is BGR


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
