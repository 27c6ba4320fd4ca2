"""MNIST's and CIFAR's own files as arrays: IDX files, and CIFAR's batches, pickled or binary.

What is read is data and stays data: nothing is unpickled (see `pickles`).

Nothing is sized by a number in a file before the file's own length has vouched for it. Whole splits are held in memory,
twice for a moment: either CIFAR takes 450 MB to read.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import SourceError
from .pickles import Call, described

Bytes = npt.NDArray[np.uint8]

_SPLITS = ("train", "test")
_IDX_NAME = re.compile(r"(.*?)(train|t10k|test)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_IMAGES_MAGIC = b"\0\0\x08\x03"
_GZIP = b"\x1f\x8b"
_MAX_GZIP_RATIO = 1032  # deflate's
_MAX_PIXELS = 1 << 32
_MAX_CIFAR_FILE = 256 << 20
_CIFAR_PIXELS = 3 * 32 * 32
_UNPACK_AGAIN = "unpack CIFAR's archive again"


class SmallImages(NamedTuple):
    """All the images of a data set, train before test.

    images: of shape (samples, height, width, channels), 1 channel (grey) or 3 (RGB). labels: of shape (samples,).
    classes: the names of labels 0, 1 and so on; None where the files have none. splits: (name, samples) in order.
    notes: what whoever packs them should know.
    """

    images: Bytes
    labels: npt.NDArray[np.int64]
    classes: list[str] | None
    splits: list[tuple[str, int]]
    notes: list[str]

    def name(self, index: int) -> str:
        """The split and the place in it: `train/00000` is the first."""
        place = index
        for split, count in self.splits:
            if 0 <= place < count:
                return f"{split}/{place:0{max(5, len(str(count - 1)))}}"
            place -= count
        raise IndexError(f"sample {index} of {len(self.labels)}")


def read_mnist(path: str | os.PathLike[str], split: str | None = None) -> SmallImages:
    """MNIST, or what has its format (Fashion-MNIST, KMNIST, EMNIST), gzipped or not.

    path: a folder with the IDX files, the folder above `raw` or `MNIST/raw`, or one images file, with its labels beside
    it. split: `train`, `test` or None for all there is. EMNIST's images lie on their side in its files; they stay so,
    as in torchvision, and a note says it.

    Raises:
        SourceError: there are no such files, several sets of them, or they are damaged or contradictory.
    """
    path = os.fspath(path)
    files = _idx_set(path)
    chosen, notes = _chosen(path, {key.split for key in files}, split)
    if any(key.family.lower().startswith("emnist") for key in files):
        notes.append("EMNIST's images are stored on their side (rows and columns exchanged), and stay so")
    return _joined(path, {name: [_idx_part(files, name)] for name in chosen}, None, notes)


def read_cifar(path: str | os.PathLike[str], split: str | None = None) -> SmallImages:
    """CIFAR-10 or CIFAR-100, the python or the binary version, unpacked.

    path: the folder with the batches, or the one above it. split: `train`, `test` or None for all there is. CIFAR-100's
    labels are its 100 fine ones.

    Raises:
        SourceError: there is no such data set, there are several, or it is incomplete or damaged.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        raise SourceError(f"{path} is a file; unpack CIFAR's archive (`tar -xzf`) and give the folder")
    found = _cifar_folders(path)
    if not found:
        raise SourceError(f"{path} has no CIFAR batches; give a folder like {_CIFAR[0].folder}, or the one above it")
    if len(found) > 1:
        several = ", ".join(os.path.join(folder, version.names) for folder, version in found)
        raise SourceError(f"{path} has several CIFAR data sets: {several}; give the folder of one")
    folder, version = found[0]
    files = {name: version.files(folder, name) for name in _SPLITS}
    chosen, notes = _chosen(folder, [name for name in _SPLITS if any(map(os.path.isfile, files[name]))], split)
    if version.prefix:
        notes.append("the labels are the fine ones; the coarse ones are left out")
    classes = _cifar_classes(os.path.join(folder, version.names), version)
    parts = {name: [_cifar_part(file, version, len(classes)) for file in files[name]] for name in chosen}
    return _joined(path, parts, classes, notes)


def looks_like_mnist(path: str | os.PathLike[str]) -> bool:
    """Whether there are images in IDX files, by their names and first bytes."""
    try:
        files = [file for files in _idx_sets(os.fspath(path)).values() for key, file in files.items() if key.images]
        return any(_first(file, 4).startswith((_IMAGES_MAGIC, _GZIP)) for file in files)
    except (SourceError, OSError):
        return False


def looks_like_cifar(path: str | os.PathLike[str]) -> bool:
    """Whether there are CIFAR's class names and batches, by names, first bytes and sizes."""
    try:
        found = _cifar_folders(os.fspath(path))
        return any(
            os.path.isfile(os.path.join(folder, version.names)) and all(_plausible(file, version) for file in files)
            for folder, version in found
            if (files := [file for split in _SPLITS for file in version.files(folder, split) if os.path.isfile(file)])
        )
    except OSError:
        return False


def _first(path: str, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


class _Part(NamedTuple):
    """The images and labels of one file."""

    images: Bytes
    labels: npt.NDArray[Any]


def _joined(path: str, parts: dict[str, list[_Part]], classes: list[str] | None, notes: list[str]) -> SmallImages:
    flat = [part for of_split in parts.values() for part in of_split]
    shapes = {part.images.shape[1:] for part in flat}
    if len(shapes) > 1:
        sizes = " and ".join(f"{height} x {width}" for height, width, _ in sorted(shapes))
        raise SourceError(f"{path} has images of {sizes}, all must have one size; read one split at a time")
    with _explained(path, "read one split at a time"):
        images = np.empty((sum(len(part.images) for part in flat), *shapes.pop()), np.uint8)
        np.concatenate([part.images for part in flat], out=images)
        labels = np.concatenate([part.labels for part in flat]).astype(np.int64)
    counts = [(split, sum(len(part.images) for part in of_split)) for split, of_split in parts.items()]
    return SmallImages(images, labels, classes, counts, notes)


def _chosen(path: str, there: Collection[str], split: str | None) -> tuple[list[str], list[str]]:
    """The splits to read, and a note if nobody asked for one alone and there is just one."""
    if split not in (None, *_SPLITS):
        raise SourceError(f"split is {split!r}; it may be train, test, or None for both")
    names = [name for name in _SPLITS if name in there]
    if split is None:
        return names, [f"there is only the {names[0]} split"] if len(names) == 1 else []
    if split not in names:
        raise SourceError(f"{path} has the {names[0]} split alone; ask for that, or put the {split} files beside it")
    return [split], []


@contextlib.contextmanager
def _explained(path: str, advice: str) -> Iterator[None]:
    """Whatever goes wrong with a file is a SourceError that names it."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # the standard library's readers raise whatever a damaged file makes them stumble over
        reason = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        raise SourceError(f"{path} can't be read: {reason}; {advice}") from error


# ---- IDX files


class _IdxKey(NamedTuple):
    """What an IDX file's name says. family: what is before the split, such as `emnist-letters-`."""

    family: str
    split: str
    images: bool


def _idx_key(name: str) -> _IdxKey | None:
    match = _IDX_NAME.fullmatch(name)
    return match and _IdxKey(match[1], "train" if match[2] == "train" else "test", match[3].startswith("images"))


def _listed(folder: str) -> list[str]:
    """Names in a folder, short ones first."""
    with _explained(folder, "check its permissions"):
        return sorted(os.listdir(folder), key=lambda name: (len(name), name))


def _idx_files(folder: str) -> dict[_IdxKey, str]:
    """The IDX files in a folder, or alone in a folder of their own name there; of two alike the one of shorter name."""
    found: dict[_IdxKey, str] = {}
    for name in _listed(folder):
        key, path = _idx_key(name), os.path.join(folder, name)
        if key is not None:
            inside = [os.path.join(path, n) for n in _listed(path) if _idx_key(n) == key] if os.path.isdir(path) else []
            for file in filter(os.path.isfile, [path, *inside]):
                found.setdefault(key, file)
    return found


def _idx_sets(path: str) -> dict[str, dict[_IdxKey, str]]:
    """The IDX files of each data set at `path`."""
    if os.path.isfile(path):
        return {path: _idx_pair(path)}
    if not os.path.isdir(path):
        raise SourceError(f"{path}: no such file or folder; give MNIST's folder, or one of its images files")
    above = [path, *(os.path.join(path, name) for name in _listed(path) if name.endswith("MNIST"))]
    folders = [path, *(raw for raw in (os.path.join(folder, "raw") for folder in above) if os.path.isdir(raw))]
    sets: dict[str, dict[_IdxKey, str]] = {}
    for folder in folders:
        for key, file in _idx_files(folder).items():
            sets.setdefault(os.path.join(folder, key.family), {})[key] = file
    return sets


def _idx_set(path: str) -> dict[_IdxKey, str]:
    """The IDX files of the one data set at `path`."""
    sets = _idx_sets(path)
    if len(sets) > 1:
        raise SourceError(f"{path} has several data sets: {', '.join(sets)}; give an images file, or a folder of one")
    if not sets:
        raise SourceError(
            f"{path} has no IDX files; MNIST's are called train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, with or without .gz"
        )
    return sets.popitem()[1]


def _idx_pair(path: str) -> dict[_IdxKey, str]:
    """An images file, and the labels beside it or beside the folder of its own name."""
    path = os.path.abspath(path)
    key = _idx_key(os.path.basename(path))
    if key is None or not key.images:
        raise SourceError(f"{path} is not called as an images file is; MNIST's is train-images-idx3-ubyte")
    wanted = key._replace(images=False)
    folder = os.path.dirname(path)
    labels = _idx_files(folder).get(wanted)
    if labels is None and _idx_key(os.path.basename(folder)) == key:
        labels = _idx_files(os.path.dirname(folder)).get(wanted)
    return {key: path} if labels is None else {key: path, wanted: labels}


def _idx_part(files: dict[_IdxKey, str], split: str) -> _Part:
    image_file, label_file = (
        next((file for key, file in files.items() if key.split == split and key.images == images), None)
        for images in (True, False)
    )
    if image_file is None or label_file is None:
        there, missing = (label_file, "images-idx3") if image_file is None else (image_file, "labels-idx1")
        raise SourceError(f"{there} has no {missing}-ubyte file of its set beside it; put that there")
    images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    if len(images) != len(labels):
        raise SourceError(
            f"{image_file} has {len(images)} images, {label_file} has {len(labels)} labels; download both again"
        )
    return _Part(images[..., np.newaxis], labels)


def _read_idx(path: str, dimensions: int) -> Bytes:
    """The array in an IDX file of bytes, gzipped or not, that is exactly as long as its header says."""
    advice = "download it again"
    with _explained(path, advice), open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        gzipped = raw.read(2) == _GZIP
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if gzipped else raw
        magic = bytes((0, 0, 8, dimensions))
        header = file.read(4 + 4 * dimensions)
        if not magic == header[:4] or len(header) < 4 + 4 * dimensions:
            raise SourceError(
                f"{path} begins with the {len(header)} bytes {header.hex(' ')}; an IDX file of bytes in {dimensions} "
                f"dimensions has {4 + 4 * dimensions} there, the first are {magic.hex(' ')}; {advice}"
            )
        shape = struct.unpack(f">{dimensions}I", header[4:])
        count = math.prod(shape)
        if not 0 < count <= _MAX_PIXELS:
            raise SourceError(f"{path} has the shape {shape}; 1 to {_MAX_PIXELS} bytes are allowed; {advice}")
        if count > (_MAX_GZIP_RATIO * size if gzipped else size):
            raise SourceError(f"{path} has the shape {shape}, and is cut short after {size} bytes; {advice}")
        data = file.read(count + 1)
        if len(data) != count:
            end = "goes on after that" if len(data) > count else f"is cut short after {len(data)}"
            raise SourceError(f"{path} has the shape {shape}, which is {count} bytes, and {end}; {advice}")
        return np.frombuffer(data, np.uint8).reshape(shape)


# ---- CIFAR


class _Cifar(NamedTuple):
    """One version of CIFAR. names: the file of the classes. prefix: of its keys. label_bytes: 0 where it is pickled."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    prefix: str
    label_bytes: int

    def files(self, folder: str, split: str) -> list[str]:
        return [os.path.join(folder, name) for name in (self.train if split == "train" else (self.test,))]


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR = (
    _Cifar("cifar-10-batches-py", _FIVE, "test_batch", "batches.meta", "", 0),
    _Cifar("cifar-100-python", ("train",), "test", "meta", "fine_", 0),
    _Cifar("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _FIVE), "test_batch.bin", "batches.meta.txt", "", 1),
    _Cifar("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", "fine_", 2),
)


def _cifar_folders(path: str) -> list[tuple[str, _Cifar]]:
    """The folders at and right below `path` that have at least one file of images."""
    return [
        (folder, version)
        for version in _CIFAR
        for folder in (path, os.path.join(path, version.folder))
        if any(os.path.isfile(file) for split in _SPLITS for file in version.files(folder, split))
    ]


def _plausible(path: str, version: _Cifar) -> bool:
    if version.label_bytes:
        return os.path.getsize(path) % (version.label_bytes + _CIFAR_PIXELS) == 0
    return _first(path, 1) in (b"\x80", b"(", b"}")


def _cifar_data(path: str) -> bytes:
    with _explained(path, "check its permissions"):
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size is None or not 0 < size <= _MAX_CIFAR_FILE:
            found = "is missing" if size is None else f"has {size} bytes, 1 to {_MAX_CIFAR_FILE} are allowed"
            raise SourceError(f"{path} {found}; {_UNPACK_AGAIN}")
        return Path(path).read_bytes()


def _cifar_classes(path: str, version: _Cifar) -> list[str]:
    data = _cifar_data(path)
    if version.label_bytes:
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        names: object = [line.strip() for line in lines if line.strip()]
    else:
        (names,) = _pickled(path, data, f"{version.prefix}label_names")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n and n.isprintable() for n in names):
        raise SourceError(f"{path} has no list of printable class names; {_UNPACK_AGAIN}")
    return names


def _cifar_part(path: str, version: _Cifar, classes: int) -> _Part:
    data = _cifar_data(path)
    with _explained(path, _UNPACK_AGAIN):
        if version.label_bytes:
            record = version.label_bytes + _CIFAR_PIXELS
            if len(data) % record:
                raise ValueError(f"its {len(data)} bytes are not a whole number of images of {record}")
            rows = np.frombuffer(data, np.uint8).reshape(-1, record)
            pixels, labels = rows[:, version.label_bytes :], rows[:, version.label_bytes - 1].astype(np.int64)
        else:
            described = _pickled(path, data, "data", f"{version.prefix}labels")
            pixels, labels = _pixels(described[0]), _labels(described[1])
    if len(pixels) != len(labels):
        raise SourceError(f"{path} has {len(pixels)} images and {len(labels)} labels; {_UNPACK_AGAIN}")
    if labels.min() < 0 or labels.max() >= classes:
        raise SourceError(
            f"{path} has labels {labels.min()} to {labels.max()}, its {classes} classes allow 0 to {classes - 1}; "
            f"{_UNPACK_AGAIN}"
        )
    return _Part(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def _pickled(path: str, data: bytes, *keys: str) -> list[Any]:
    """The values of these keys of the dict that a pickle describes."""
    with _explained(path, f"{_UNPACK_AGAIN}, and trust no copy of it"):
        value = described(data)
        if not isinstance(value, dict) or not set(keys) <= value.keys():
            raise ValueError(f"it has no {' and '.join(keys)}")
        return [value[key] for key in keys]


def _pixels(value: object) -> Bytes:
    match value:
        case Call(function, _, (_, (int(rows), width), Call("numpy dtype", ("u1" | "|u1", *_)), fortran, raw)):
            match raw:
                case Call("_codecs encode", (text, "latin1")):
                    raw = text
            if function.endswith("_reconstruct") and width == _CIFAR_PIXELS and rows > 0 and isinstance(raw, str):
                data = np.frombuffer(raw.encode("latin-1"), np.uint8)
                return data.reshape((rows, _CIFAR_PIXELS), order="F" if fortran else "C")
    raise ValueError(f"its data are no NumPy array of rows of {_CIFAR_PIXELS} bytes")


def _labels(value: object) -> npt.NDArray[np.int64]:
    if not isinstance(value, list) or not all(type(label) is int for label in value):
        raise ValueError("its labels are no list of whole numbers")
    return np.array(value, np.int64)
