"""MNIST's and CIFAR's files: every layout they come in, and nothing but SourceError from whatever else is in them."""

from __future__ import annotations

import contextlib
import copyreg
import gzip
import io
import os
import pickle
import pickletools
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import pickles
from fastload.errors import SourceError
from fastload.small_images import SmallImages, looks_like_cifar, looks_like_mnist, read_cifar, read_mnist

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only: pipes with names, permissions")

Array = npt.NDArray[Any]


def random_bytes(*shape: int, seed: int = 0, below: int = 256) -> Array:
    return np.random.default_rng((seed, *shape)).integers(0, below, shape, np.uint8)


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@contextlib.contextmanager
def little_memory(limit: int = 4 << 20) -> Iterator[None]:
    """The block allocates no more than `limit` bytes at a time, as Python counts them."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# ---- MNIST


def idx(array: Array) -> bytes:
    """The IDX format's definition, by hand: two zeros, 8 for unsigned bytes, dimensions, big-endian sizes, bytes."""
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


TRAIN = (random_bytes(7, 6, 5), random_bytes(7, below=10))
TEST = (random_bytes(3, 6, 5), random_bytes(3, below=10))
IDX = {
    "train-images": idx(TRAIN[0]),
    "train-labels": idx(TRAIN[1]),
    "t10k-images": idx(TEST[0]),
    "t10k-labels": idx(TEST[1]),
}


def mnist(pattern: str, splits: str = "train t10k") -> dict[str, bytes]:
    """IDX files by names like `raw/{}.gz`, where {} is `train-images-idx3-ubyte` and the others."""
    files = {}
    for name, data in IDX.items():
        if name.split("-")[0] in splits.split():
            whole = f"{name}-idx{data[3]}-ubyte"
            files[pattern.format(whole)] = gzip.compress(data) if pattern.endswith(".gz") else data
    return files


def is_mnist(found: SmallImages, *parts: tuple[Array, Array]) -> bool:
    images = np.concatenate([images for images, _ in parts])[..., None]
    labels = np.concatenate([labels for _, labels in parts])
    assert (found.images.dtype, found.labels.dtype, found.classes) == (np.uint8, np.int64, None)
    assert found.images.flags.c_contiguous
    assert found.images.flags.writeable
    return np.array_equal(found.images, images) and np.array_equal(found.labels, labels)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0}",
        "{0}.gz",
        "raw/{0}",
        "MNIST/raw/{0}",
        "FashionMNIST/raw/{0}.gz",
        "{0}/{0}",
        "{0}/{0}.gz",
        "mine-{0}",
    ],
)
def test_mnist_is_found_in_every_layout(tmp_path: Path, pattern: str) -> None:
    """Gzipped or not, torchvision's folders, Kaggle's folder for each file, a prefix: the same arrays, train first."""
    put(tmp_path, mnist(pattern))
    assert looks_like_mnist(tmp_path)
    found = read_mnist(tmp_path)
    assert is_mnist(found, TRAIN, TEST)
    assert (found.splits, found.notes) == ([("train", 7), ("test", 3)], [])
    assert [found.name(index) for index in (0, 6, 7, 9)] == ["train/00000", "train/00006", "test/00000", "test/00002"]
    assert is_mnist(read_mnist(str(tmp_path), "train"), TRAIN)
    assert is_mnist(read_mnist(tmp_path, "test"), TEST)


def test_names_with_a_dot_before_idx_are_known_too(tmp_path: Path) -> None:
    """`train-images.idx3-ubyte`, as unzipping tools and old pages call them."""
    put(tmp_path, {name.replace("-idx", ".idx"): data for name, data in mnist("{}").items()})
    assert looks_like_mnist(tmp_path)
    assert is_mnist(read_mnist(tmp_path), TRAIN, TEST)


def test_gzip_is_known_by_its_magic_number(tmp_path: Path) -> None:
    """Browsers unpack and keep the name, or rename and don't unpack."""
    names = dict(zip(mnist("{}"), mnist("{}.gz").values(), strict=True))
    assert is_mnist(read_mnist(put(tmp_path / "packed", names)), TRAIN, TEST)
    names = dict(zip(mnist("{}.gz"), mnist("{}").values(), strict=True))
    assert is_mnist(read_mnist(put(tmp_path / "unpacked", names)), TRAIN, TEST)


def test_gzip_files_of_several_members_are_one(tmp_path: Path) -> None:
    """As gzip has it."""
    data = IDX["train-images"]
    put(
        tmp_path,
        mnist("{}", "train") | {"train-images-idx3-ubyte": gzip.compress(data[:50]) + gzip.compress(data[50:])},
    )
    assert is_mnist(read_mnist(tmp_path), TRAIN)


def test_a_file_and_its_gzipped_twin_are_no_contradiction(tmp_path: Path) -> None:
    """torchvision leaves what it downloaded beside what it unpacked; the unpacked one is read."""
    put(tmp_path, mnist("raw/{}") | dict.fromkeys(mnist("raw/{}.gz"), b"not read"))
    assert is_mnist(read_mnist(tmp_path), TRAIN, TEST)


@pytest.mark.parametrize("pattern", ["{0}", "{0}.gz", "{0}/{0}"])
def test_an_images_file_brings_its_labels(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given one images file, its labels are found beside it, or beside its folder; the other split is not read."""
    put(tmp_path, mnist(pattern))
    file = tmp_path / pattern.format("t10k-images-idx3-ubyte")
    assert looks_like_mnist(file)
    assert is_mnist(read_mnist(file), TEST)
    monkeypatch.chdir(file.parent)
    assert is_mnist(read_mnist(file.name, "test"), TEST)
    with pytest.raises(SourceError, match="has the test split alone; ask for that, or put the train files beside it"):
        read_mnist(file, "train")


def test_one_split_alone_is_noted(tmp_path: Path) -> None:
    """It is read, and the note says that there is no more."""
    put(tmp_path, mnist("{}", "train"))
    assert read_mnist(tmp_path).notes == ["there is only the train split"]
    assert read_mnist(tmp_path, "train").notes == []
    with pytest.raises(SourceError, match="has the train split alone"):
        read_mnist(tmp_path, "test")


def test_emnist_stays_on_its_side_with_a_note(tmp_path: Path) -> None:
    """The pixels are torchvision's. Several of EMNIST's sets in one folder have to be told apart."""
    put(tmp_path, mnist("emnist-letters-{}.gz"))
    found = read_mnist(tmp_path)
    assert is_mnist(found, TRAIN, TEST)
    assert found.notes == ["EMNIST's images are stored on their side (rows and columns exchanged), and stay so"]
    put(tmp_path, mnist("emnist-digits-{}.gz"))
    with pytest.raises(
        SourceError, match=r"several data sets: .*emnist-digits-, .*emnist-letters-; give an images file"
    ):
        read_mnist(tmp_path)
    assert is_mnist(read_mnist(tmp_path / "emnist-digits-t10k-images-idx3-ubyte.gz"), TEST)


def test_several_data_sets_below_one_folder_are_an_error(tmp_path: Path) -> None:
    """torchvision's root with MNIST and FashionMNIST in it: which one is meant?"""
    put(tmp_path, mnist("MNIST/raw/{}") | mnist("FashionMNIST/raw/{}"))
    assert looks_like_mnist(tmp_path)
    with pytest.raises(SourceError, match=r"several data sets: .*/MNIST/raw/, .*FashionMNIST/raw/; give"):
        read_mnist(tmp_path)
    assert is_mnist(read_mnist(tmp_path / "MNIST"), TRAIN, TEST)


def test_what_is_no_mnist_is_refused(tmp_path: Path) -> None:
    """A missing path, an empty folder, another file, a labels file, another split: each with what is expected."""
    put(tmp_path, {"mnist.zip": b"PK"} | mnist("there/{}"))
    (tmp_path / "empty").mkdir()
    cases = {
        "missing": "no such file or folder; give MNIST's folder",
        "empty": "has no IDX files; MNIST's are called train-images-idx3-ubyte",
        "mnist.zip": "is not called as an images file is; MNIST's is train-images-idx3-ubyte",
        "there/t10k-labels-idx1-ubyte": "is not called as an images file is",
        "nul\0": "no such file or folder",
    }
    for name, message in cases.items():
        assert not looks_like_mnist(tmp_path / name)
        with pytest.raises(SourceError, match=message):
            read_mnist(tmp_path / name)
    with pytest.raises(SourceError, match="split is 'val'; it may be train, test, or None for both"):
        read_mnist(tmp_path / "there", "val")


@pytest.mark.parametrize(("left_out", "there"), [("labels-idx1", "images-idx3"), ("images-idx3", "labels-idx1")])
def test_images_and_labels_go_together(tmp_path: Path, left_out: str, there: str) -> None:
    """One without the other is an error: labels are not made up."""
    files = put(tmp_path, {name: data for name, data in mnist("{}", "train").items() if left_out not in name})
    with pytest.raises(SourceError, match=f"train-{there}-ubyte has no {left_out}-ubyte file of its set beside it"):
        read_mnist(files)


def test_images_and_labels_have_to_be_as_many(tmp_path: Path) -> None:
    """Both files and both numbers are in the message."""
    put(tmp_path, mnist("{}", "train") | {"train-labels-idx1-ubyte": IDX["t10k-labels"]})
    with pytest.raises(
        SourceError, match=r"train-images-idx3-ubyte has 7 images, .*train-labels-idx1-ubyte has 3 labels"
    ):
        read_mnist(tmp_path)


def test_splits_of_different_sizes_are_read_one_by_one(tmp_path: Path) -> None:
    """They don't fit in one array."""
    put(tmp_path, mnist("{}") | {"t10k-images-idx3-ubyte": idx(random_bytes(3, 4, 4))})
    with pytest.raises(SourceError, match="has images of 4 x 4 and 6 x 5, all must have one size; read one split"):
        read_mnist(tmp_path)
    assert read_mnist(tmp_path, "test").images.shape == (3, 4, 4, 1)


GOOD = IDX["train-images"]
BAD_IDX = {
    "begins with the 0 bytes": b"",
    "begins with the 3 bytes 00 00 08": GOOD[:3],
    "begins with the 15 bytes 00 00 08 03": GOOD[:15],
    "the first are 00 00 08 03": b"\0\0\x0d" + GOOD[3:],
    "in 3 dimensions has 16 there": IDX["train-labels"] + bytes(100),
    r"has the shape \(0, 6, 5\); 1 to": GOOD[:4] + struct.pack(">3I", 0, 6, 5),
    r"has the shape \(7, 0, 5\); 1 to": GOOD[:4] + struct.pack(">3I", 7, 0, 5),
    r"\(4294967295, 4294967295, 4294967295\); 1 to": GOOD[:4] + b"\xff" * 12,
    r"\(65536, 65536, 1\), and is cut short after 226 bytes": GOOD[:4]
    + struct.pack(">3I", 65536, 65536, 1)
    + GOOD[16:],
    "which is 210 bytes, and is cut short after 209": GOOD[:-1],
    "which is 210 bytes, and goes on after that": GOOD + b"\0",
}
GZIPPED = gzip.compress(GOOD)
BAD_GZIP = {
    "which is 210 bytes, and is cut short after 209": gzip.compress(GOOD[:-1]),
    "which is 210 bytes, and goes on after that": gzip.compress(GOOD + bytes(1000)),
    "can't be read: Compressed file ended": GZIPPED[:-9],
    "can't be read: Compressed file ended before": GZIPPED[:-1],
    "can't be read: CRC check failed": GZIPPED[:-8] + bytes(4) + GZIPPED[-4:],
    "can't be read: Error -3 while decompressing": GZIPPED[:10] + b"\xff" * 20 + GZIPPED[30:],
    "can't be read: Not a gzipped file": GZIPPED + b"garbage",
    "can't be read: Unknown compression method": b"\x1f\x8b\xff" + GZIPPED[3:],
    r"is cut short after \d+ bytes": gzip.compress(GOOD[:4] + struct.pack(">3I", 65536, 65536, 1) + bytes(100)),
}


@pytest.mark.parametrize(
    ("message", "data"),
    [*BAD_IDX.items(), *BAD_GZIP.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_idx_files_are_refused(tmp_path: Path, message: str, data: bytes) -> None:
    """Cut short, too long, of another type, with sizes that can't be: the message names the file and what it has."""
    put(tmp_path, mnist("{}", "train") | {"train-images-idx3-ubyte": data})
    with little_memory(), pytest.raises(SourceError, match=f"train-images-idx3-ubyte .*{message}.*; download it again"):
        read_mnist(tmp_path)


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    """A kilobyte of images, and then 256 MB of zeros in the same stream, of which one byte more is read."""
    stream = zlib.compressobj(wbits=31)
    bomb = stream.compress(GOOD) + b"".join(stream.compress(bytes(1 << 20)) for _ in range(256)) + stream.flush()
    put(tmp_path, mnist("{}", "train") | {"train-images-idx3-ubyte": bomb})
    with little_memory(), pytest.raises(SourceError, match="which is 210 bytes, and goes on after that"):
        read_mnist(tmp_path)


@posix_only
def test_pipes_and_locked_files_end_in_an_error(tmp_path: Path) -> None:
    """A pipe with an images file's name would be waited for for ever."""
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    assert not looks_like_mnist(tmp_path)
    with pytest.raises(SourceError, match="has no IDX files"):
        read_mnist(tmp_path)
    os.mkfifo(tmp_path / "data_batch_1")
    assert not looks_like_cifar(tmp_path)
    with pytest.raises(SourceError, match="has no CIFAR batches"):
        read_cifar(tmp_path)
    put(tmp_path / "locked", mnist("{}"))
    (tmp_path / "locked" / "train-images-idx3-ubyte").chmod(0)
    if os.geteuid() != 0:
        assert not looks_like_mnist(tmp_path / "locked")
        with pytest.raises(SourceError, match="can't be read: Permission denied"):
            read_mnist(tmp_path / "locked")


def test_a_name_says_the_split_and_the_place() -> None:
    """Five digits, more where a split has more; no name beyond the last sample."""
    images = SmallImages(np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64), None, [("train", 697932)], [])
    assert [images.name(index) for index in (0, 697931)] == ["train/000000", "train/697931"]
    for index in (-1, 697932):
        with pytest.raises(IndexError):
            images.name(index)


# ---- CIFAR


class Python2:
    """A pickler as Python 2's cPickle was, for what a batch holds; `bytes` stand for its `str`."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.count = 0

    def dumps(self, value: object) -> bytes:
        return (b"\x80\x02" if self.protocol == 2 else b"") + self.saved(value) + b"."

    def memo(self) -> bytes:
        self.count += 1
        if self.protocol == 0:
            return b"p%d\n" % self.count
        return b"q%c" % self.count if self.count < 256 else b"r" + struct.pack("<I", self.count)

    def saved(self, value: object) -> bytes:
        return getattr(self, type(value).__name__)(value)  # type: ignore[no-any-return]

    def NoneType(self, _: None) -> bytes:  # noqa: N802 - the type's name
        return b"N"

    def bool(self, value: bool) -> bytes:
        return (b"\x89", b"\x88")[value] if self.protocol == 2 else b"I0%d\n" % value

    def int(self, value: int) -> bytes:
        if self.protocol == 0:
            return b"I%d\n" % value
        return b"K%c" % value if 0 <= value < 256 else b"J" + struct.pack("<i", value)

    def bytes(self, value: bytes) -> bytes:
        if self.protocol == 0:
            return b"S" + repr(value)[1:].encode() + b"\n" + self.memo()
        return (b"U%c" % len(value) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value + self.memo()

    def list(self, value: list[object]) -> bytes:
        items = [self.saved(item) for item in value]
        if self.protocol == 0:
            return b"(l" + self.memo() + b"".join(item + b"a" for item in items)
        return b"]" + self.memo() + b"(" + b"".join(items) + b"e"

    def tuple(self, value: tuple[object, ...]) -> bytes:
        items = b"".join(self.saved(item) for item in value)
        if self.protocol == 2 and 1 <= len(value) <= 3:
            return items + b"%c" % (0x84 + len(value)) + self.memo()
        return b"(" + items + b"t" + self.memo()

    def dict(self, value: dict[object, object]) -> bytes:
        pairs = [self.saved(key) + self.saved(item) for key, item in value.items()]
        if self.protocol == 0:
            return b"(d" + self.memo() + b"".join(pair + b"s" for pair in pairs)
        return b"}" + self.memo() + b"(" + b"".join(pairs) + b"u"

    def ndarray(self, value: Array) -> bytes:
        made = b"cnumpy.core.multiarray\n_reconstruct\n" + self.memo()
        made += b"(cnumpy\nndarray\n" + self.memo() + self.saved((0,)) + self.saved(b"b") + b"tR" + self.memo()
        dtype = b"cnumpy\ndtype\n" + self.memo() + self.saved((value.dtype.str.lstrip("|<").encode(), 0, 1)) + b"R"
        dtype += self.saved((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        state = b"(" + self.saved(1) + self.saved(value.shape) + dtype + self.saved(not value.flags.c_contiguous)
        return made + state + self.saved(value.tobytes("A")) + b"t" + self.memo() + b"b"


ROWS = random_bytes(6, 5, 3072)  # five batches to train with, and one to test with
LABELS = random_bytes(6, 5, below=10).astype(int).tolist()
TEN = [f"class {n}" for n in range(10)]
HUNDRED = [f"kind {n}" for n in range(100)]
TEN_NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
Pickler = Callable[[Any], bytes]
PICKLERS: dict[str, Pickler] = {
    f"python 2, protocol {p}": lambda v, p=p: Python2(p).dumps(as_bytes(v)) for p in range(3)
}
PICKLERS |= {f"python 3, protocol {p}": lambda v, p=p: pickle.dumps(v, p) for p in range(5)}
PICKLERS["python 3, bytes"] = lambda v: pickle.dumps(as_bytes(v), 4)


def as_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [as_bytes(item) for item in value]
    if isinstance(value, dict):
        return {as_bytes(key): as_bytes(item) for key, item in value.items()}
    return value


def batch(rows: Array = ROWS[0], labels: Any = LABELS[0], key: str = "labels") -> dict[str, Any]:
    names = [f"file_{n}.png" for n in range(len(rows))]
    return {"batch_label": "training batch 1 of 5", key: labels, "data": rows, "filenames": names}


def cifar10(dumps: Pickler = PICKLERS["python 2, protocol 2"], folder: str = "") -> dict[str, bytes]:
    files = {name: dumps(batch(*part)) for name, *part in zip(TEN_NAMES, ROWS, LABELS, strict=True)}
    meta = dumps({"num_cases_per_batch": 5, "label_names": TEN, "num_vis": 3072})
    return {folder + name: data for name, data in (files | {"batches.meta": meta}).items()}


def cifar100(dumps: Pickler = PICKLERS["python 2, protocol 2"], folder: str = "") -> dict[str, bytes]:
    coarse = {"coarse_labels": [0] * 5}
    files = {
        "train": dumps(batch(key="fine_labels") | coarse),
        "test": dumps(batch(ROWS[5], LABELS[5], "fine_labels") | coarse),
        "meta": dumps({"fine_label_names": HUNDRED, "coarse_label_names": ["thing"]}),
    }
    return {folder + name: data for name, data in files.items()}


def binary(rows: Array, *labels: list[int]) -> bytes:
    return b"".join(bytes(column) + row.tobytes() for *column, row in zip(*labels, rows, strict=True))


def cifar10_binary(folder: str = "") -> dict[str, bytes]:
    files = {f"{name}.bin": binary(*part) for name, *part in zip(TEN_NAMES, ROWS, LABELS, strict=True)}
    names = {"batches.meta.txt": "\n".join([*TEN, "", ""]).encode()}
    return {folder + name: data for name, data in (files | names).items()}


def cifar100_binary(folder: str = "") -> dict[str, bytes]:
    files = {
        "train.bin": binary(ROWS[0], [19] * 5, LABELS[0]),
        "test.bin": binary(ROWS[5], [19] * 5, LABELS[5]),
        "fine_label_names.txt": "\r\n".join(HUNDRED).encode(),
        "coarse_label_names.txt": b"thing\n",
    }
    return {folder + name: data for name, data in files.items()}


def upright(row: Array) -> Array:
    """An image by the definition: 1024 bytes of red, then of green, then of blue, each row by row."""
    image = np.empty((32, 32, 3), np.uint8)
    for channel in range(3):
        for y in range(32):
            image[y, :, channel] = row[channel * 1024 + y * 32 :][:32]
    return image


def is_cifar(found: SmallImages, batches: list[int], classes: list[str]) -> bool:
    images = np.stack([upright(row) for number in batches for row in ROWS[number]])
    assert (found.images.dtype, found.labels.dtype, found.classes) == (np.uint8, np.int64, classes)
    assert found.images.flags.c_contiguous
    assert found.images.flags.writeable
    return np.array_equal(found.images, images) and found.labels.tolist() == [
        label for number in batches for label in LABELS[number]
    ]


FINE = "the labels are the fine ones; the coarse ones are left out"
CIFARS: dict[str, tuple[Callable[..., dict[str, bytes]], list[int], list[str], list[str]]] = {
    "cifar-10-batches-py": (cifar10, [0, 1, 2, 3, 4], TEN, []),
    "cifar-100-python": (cifar100, [0], HUNDRED, [FINE]),
    "cifar-10-batches-bin": (cifar10_binary, [0, 1, 2, 3, 4], TEN, []),
    "cifar-100-binary": (cifar100_binary, [0], HUNDRED, [FINE]),
}


@pytest.mark.parametrize("folder", ["", "below/"])
@pytest.mark.parametrize("version", CIFARS)
def test_cifar_is_found_in_every_layout(tmp_path: Path, version: str, folder: str) -> None:
    """CIFAR-10 and -100, python and binary, the folder itself and the one above: the same arrays, train first."""
    make, train, classes, notes = CIFARS[version]
    put(tmp_path, make(folder=f"{version}/" if folder else ""))
    assert looks_like_cifar(tmp_path)
    found = read_cifar(tmp_path)
    assert is_cifar(found, [*train, 5], classes)
    assert (found.splits, found.notes) == ([("train", 5 * len(train)), ("test", 5)], notes)
    assert found.name(5 * len(train)) == "test/00000"
    assert is_cifar(read_cifar(str(tmp_path), "train"), train, classes)
    assert is_cifar(read_cifar(tmp_path, "test"), [5], classes)


@pytest.mark.parametrize("pickler", PICKLERS)
@pytest.mark.parametrize("make", [cifar10, cifar100])
def test_batches_of_every_pickle_protocol_are_read(
    tmp_path: Path, make: Callable[[Pickler], dict[str, bytes]], pickler: str
) -> None:
    """As Python 2 wrote them, and as Python 3 writes them again, with text or bytes as keys."""
    put(tmp_path, make(PICKLERS[pickler]))
    assert looks_like_cifar(tmp_path)
    assert is_cifar(read_cifar(tmp_path, "test"), [5], TEN if make is cifar10 else HUNDRED)
    assert is_cifar(
        read_cifar(tmp_path), [0, 1, 2, 3, 4, 5] if make is cifar10 else [0, 5], read_cifar(tmp_path).classes or []
    )


@pytest.mark.parametrize("protocol", range(3))
def test_the_pickles_of_these_tests_are_real_ones(protocol: int) -> None:
    """Python's own unpickler reads what stands for Python 2's files here."""
    for rows in (ROWS[0], np.asfortranarray(ROWS[0])):
        found = pickle.loads(Python2(protocol).dumps(as_bytes(batch(rows))), encoding="latin1")
        assert np.array_equal(found.pop("data"), rows)
        assert found == {key: value for key, value in batch().items() if key != "data"}


@pytest.mark.parametrize("pickler", PICKLERS)
def test_arrays_that_lie_by_columns_are_read(tmp_path: Path, pickler: str) -> None:
    """NumPy pickles an array of Fortran's order as it lies."""
    put(tmp_path, cifar10() | {"test_batch": PICKLERS[pickler](batch(np.asfortranarray(ROWS[5]), LABELS[5]))})
    assert is_cifar(read_cifar(tmp_path, "test"), [5], TEN)


def test_what_is_no_cifar_is_refused(tmp_path: Path) -> None:
    """The archive itself, a missing path, an empty folder, several data sets, another split."""
    put(tmp_path, {"cifar-10-python.tar.gz": b"\x1f\x8b"} | cifar10(folder="one/"))
    put(tmp_path / "two", cifar10(folder="cifar-10-batches-py/") | cifar100(folder="cifar-100-python/"))
    (tmp_path / "empty").mkdir()
    cases = {
        "cifar-10-python.tar.gz": r"is a file; unpack CIFAR's archive \(`tar -xzf`\) and give the folder",
        "missing": "has no CIFAR batches; give a folder like cifar-10-batches-py, or the one above it",
        "empty": "has no CIFAR batches",
        "two": "several CIFAR data sets: .*batches.meta, .*meta; give the folder of one",
        "nul\0": "has no CIFAR batches",
    }
    for name, message in cases.items():
        with pytest.raises(SourceError, match=message):
            read_cifar(tmp_path / name)
    assert not any(looks_like_cifar(tmp_path / name) for name in cases if name != "two")
    with pytest.raises(SourceError, match="split is 'val'; it may be train, test, or None for both"):
        read_cifar(tmp_path / "one", "val")


@pytest.mark.parametrize("version", CIFARS)
def test_an_incomplete_cifar_is_refused(tmp_path: Path, version: str) -> None:
    """A missing batch or missing names are an error; a missing split is a note, or an error if it was asked for."""
    make, train, _, notes = CIFARS[version]
    files = make()
    test = next(name for name in files if name.startswith("test"))
    names = next(name for name in files if "meta" in name or "label_names" in name)
    without = {name: data for name, data in files.items() if name != test}
    put(tmp_path / "no test", without)
    assert read_cifar(tmp_path / "no test").notes == ["there is only the train split", *notes]
    with pytest.raises(SourceError, match="has the train split alone"):
        read_cifar(tmp_path / "no test", "test")
    put(tmp_path / "no names", {name: data for name, data in files.items() if name != names})
    assert not looks_like_cifar(tmp_path / "no names")
    with pytest.raises(SourceError, match=f"{names} is missing; unpack CIFAR's archive again"):
        read_cifar(tmp_path / "no names")
    if len(train) > 1:
        third = next(name for name in files if "_3" in name)
        put(tmp_path / "no third", {name: data for name, data in files.items() if name != third})
        with pytest.raises(SourceError, match=f"{third} is missing; unpack CIFAR's archive again"):
            read_cifar(tmp_path / "no third")


def test_class_folders_called_train_and_test_are_no_cifar(tmp_path: Path) -> None:
    """CIFAR-100's names are common ones: the files have to look like pickles too."""
    put(tmp_path, {"train/cat/1.jpg": b"", "test/cat/2.jpg": b"", "meta/notes.txt": b""})
    assert not looks_like_cifar(tmp_path)
    put(tmp_path / "lists", {"train": b"1.jpg 0\n", "test": b"2.jpg 0\n", "meta": b"text"})
    assert not looks_like_cifar(tmp_path / "lists")
    put(tmp_path / "binaries", {"train.bin": bytes(100), "fine_label_names.txt": b"text"})
    assert not looks_like_cifar(tmp_path / "binaries")


BAD_BATCHES: dict[str, Any] = {
    "5 images and 4 labels": batch(labels=[0] * 4),
    "labels 0 to 10, its 10 classes allow 0 to 9": batch(labels=[0, 1, 2, 3, 10]),
    "labels -1 to 3": batch(labels=[0, 1, 2, 3, -1]),
    "its labels are no list of whole numbers": batch(labels=[0, 1, 2, 3, True]),
    "its labels are no list of whole": batch(labels="01234"),
    "its labels are no list": batch(labels=[0, 1, 2, 3, None]),
    "its labels are": batch(labels=[[0]] * 5),
    "too large": batch(labels=[0, 1, 2, 3, 1 << 80]),
    "no NumPy array of rows of 3072 bytes": batch(ROWS[0, :, :3071]),
    "no NumPy array of rows of 3072": batch(ROWS[0].astype(np.int16)),
    "no NumPy array of rows of": batch(ROWS[0].reshape(5, 3, 1024)),
    "no NumPy array of rows|__builtin__ bytes": batch(ROWS[0, :0], []),
    "no NumPy array of": batch() | {"data": ROWS[0].tobytes()},
    "no NumPy array": batch() | {"data": None},
    "it has no data and labels": {"data": ROWS[0]},
    "it has no data and": [1, 2],
}


@pytest.mark.parametrize("pickler", PICKLERS)
@pytest.mark.parametrize("message", BAD_BATCHES)
def test_batches_that_make_no_sense_are_refused(tmp_path: Path, message: str, pickler: str) -> None:
    """Another shape, type or number, labels without a class: the message names the file and what is wrong with it."""
    value = BAD_BATCHES[message]
    if isinstance(value, dict) and isinstance(value.get("labels"), list) and 1 << 80 in value["labels"]:
        pickler = "python 3, protocol 2"  # what stands for Python 2 above has no long numbers
    put(tmp_path, cifar10() | {"test_batch": PICKLERS[pickler](value)})
    with pytest.raises(SourceError, match=rf"test_batch .*({message}).*; unpack CIFAR's archive again"):
        read_cifar(tmp_path, "test")


@pytest.mark.parametrize("names", [[], "a", None, ["a", 1], ["a", ""], ["a\n"], ["a", "\ud800"], [["a"]]], ids=repr)
def test_class_names_have_to_be_names(tmp_path: Path, names: object) -> None:
    """A list of printable text, not empty."""
    put(tmp_path, cifar10() | {"batches.meta": pickle.dumps({"label_names": names}, 2)})
    with pytest.raises(SourceError, match=r"batches\.meta has no list of printable class names"):
        read_cifar(tmp_path)


def test_damaged_binary_batches_are_refused(tmp_path: Path) -> None:
    """Cut short, empty, with a label that has no class, with names that are no text."""
    whole = cifar10_binary()
    cases = {
        "test_batch.bin": {
            "its 15364 bytes are not a whole number of images of 3073": whole["test_batch.bin"][:-1],
            "has 0 bytes, 1 to 268435456 are allowed": b"",
            "has labels 10 to 10, its 10 classes allow 0 to 9": b"\x0a" + bytes(3072),
        },
        "batches.meta.txt": {"no list of printable class names": b"\xff\xfe\0", "has 0 bytes": b""},
    }
    for file, bad in cases.items():
        for message, data in bad.items():
            put(tmp_path, whole | {file: data})
            with pytest.raises(SourceError, match=f"{file} .*{message}.*; unpack CIFAR's archive again"):
                read_cifar(tmp_path)


def test_a_file_beyond_any_cifar_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 1 TB is refused by its size."""
    put(tmp_path, cifar10())
    os.truncate(tmp_path / "test_batch", 1 << 40)
    with little_memory(), pytest.raises(SourceError, match="test_batch has 1099511627776 bytes, 1 to 268435456 are"):
        read_cifar(tmp_path, "test")


# ---- pickles that mean harm


class Attack:
    """What a pickle of this asks Python to do: make the folder `marker`."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def object_array(marker: bytes) -> bytes:
    array = np.empty(1, object)
    array[0] = Attack(marker.decode())
    return pickle.dumps({"data": array, "labels": [0]}, 2)


def attribute(marker: bytes) -> bytes:
    """builtins.getattr(os, "mkdir")(marker), which asks for no `os.mkdir` by name."""
    module = b"c__builtin__\n__import__\n(Vos\ntR"
    return b"c__builtin__\ngetattr\n(" + module + b"Vmkdir\ntR(V" + marker + b"\ntR."


ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "GLOBAL, REDUCE": lambda marker: b"cos\nmkdir\n(V" + marker + b"\ntR.",
    "STACK_GLOBAL, REDUCE": lambda marker: b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(V" + marker + b"\ntR.",
    "INST": lambda marker: b"(V" + marker + b"\nios\nmkdir\n.",
    "OBJ": lambda marker: b"(cos\nmkdir\nV" + marker + b"\no.",
    "EXT1": lambda marker: b"\x80\x02\x82\xf0(V" + marker + b"\ntR.",
    "EXT2": lambda marker: b"\x80\x02\x83\xf0\x00(V" + marker + b"\ntR.",
    "EXT4": lambda marker: b"\x80\x02\x84\xf0\x00\x00\x00(V" + marker + b"\ntR.",
    "BUILD": lambda marker: b"cfunctools\npartial\n(cbuiltins\nlen\ntR(cos\nmkdir\n(V" + marker + b"\nt}Ntb)R.",
    "NEWOBJ": lambda marker: b"\x80\x02cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nmkdir\n(V" + marker + b"\nlt\x81t\x81.",
    "a module by way of getattr": attribute,
    "eval": lambda marker: b"c__builtin__\neval\n(V__import__('os').mkdir('" + marker + b"')\ntR.",
    "an array of objects": object_array,
}


@pytest.fixture
def extension() -> Iterator[None]:
    """`os.mkdir` registered as the extension 240, so that EXT opcodes could reach it."""
    copyreg.add_extension(os.mkdir.__module__, "mkdir", 240)
    yield
    copyreg.remove_extension(os.mkdir.__module__, "mkdir", 240)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_no_pickle_gets_anything_called(tmp_path: Path, attack: str, file: str) -> None:
    """Each attack makes a folder in Python's own unpickler, to prove that it is one, and none here."""
    marker = tmp_path / "marker"
    data = ATTACKS[attack](os.fsencode(marker))
    pickle.loads(data)
    assert marker.is_dir()
    marker.rmdir()
    put(tmp_path / "cifar", cifar10() | {file: data})
    with pytest.raises(
        SourceError, match=rf"{file} can't be read: the pickle .*unpack.* again, and trust no copy of it"
    ):
        read_cifar(tmp_path / "cifar", "test")
    assert not marker.exists()


NAMES = ["os system", "builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray scalar", "numpy  dtype"]
NAMES += ["numpy.core.multiarray _reconstruct.__globals__", "numpy ndarray.tofile", "numpy f2py", "_codecs lookup"]
NAMES += ["codecs encode", "_codecs  encode", " numpy dtype", "numpy\tdtype", "", "copy_reg _reconstructor"]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_names_of_arrays_are_known(tmp_path: Path, name: str) -> None:
    """No other name, however near, and no attribute of one that is known."""
    module, _, function = name.partition(" ")
    pickles = [
        f"c{module}\n{function}\n.".encode(),
        b"\x80\x04" + b"".join(b"\x8c" + bytes((len(t),)) + t.encode() for t in (module, function)) + b"\x93.",
    ]
    for data in pickles:
        put(tmp_path, cifar10() | {"test_batch": data})
        with pytest.raises(SourceError, match=r"the pickle asks for '.*', which no batch needs and which may do harm"):
            read_cifar(tmp_path, "test")


@pytest.mark.parametrize(
    "opcode",
    [o for o in pickletools.opcodes if o.name not in pickles.NEEDED],
    ids=lambda o: o.name,
)
def test_every_opcode_that_no_batch_needs_is_refused(tmp_path: Path, opcode: Any) -> None:
    """Whatever lies on the stack, by the opcode's name; those that call, import or fetch are among them."""
    put(
        tmp_path,
        cifar10() | {"test_batch": b"(K\0K\0](" + opcode.code.encode("latin-1") + b"1\n1\n" + bytes(20) + b"."},
    )
    with pytest.raises(SourceError, match=f"the pickle has the opcode {opcode.name}, which no batch needs, at byte 8"):
        read_cifar(tmp_path, "test")


def test_the_opcodes_that_are_left_call_nothing() -> None:
    """Of those that build objects the tables have the three that an array takes, and these make no call."""
    dangerous = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER"}
    assert {opcode.name for opcode in pickletools.opcodes} >= pickles.NEEDED
    assert {"GLOBAL", "REDUCE", "BUILD"} <= pickles.NEEDED
    assert dangerous & pickles.NEEDED == set()


LIST_OF_LISTS = b"".join(b"(" + b"h%c" % n * 10 + b"lq%c" % (n + 1) for n in range(40))
OVERSIZED = {
    "a place in the memo": b"\x80\x02]r\xff\xff\xff\xff.",
    "a string's length": b"T\xff\xff\xff\x7fabc.",
    "a text's length": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "bytes' length": b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",
    "a frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "a number's length": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "a number's digits": b"L" + b"9" * 100_000 + b"L\n.",
    "lists of lists of lists": b"(lq\0" + LIST_OF_LISTS + b".",
    "one text encoded again and again": b"c_codecs\nencode\nq\0X\0\0\x10\0"
    + b"a" * 0x100000
    + b"q\1"
    + b"h\0h\1\x85R" * 1000
    + b".",
    "steps": b"N" * (1 << 20) + b"N.",
}
OVERSIZED["a shape beyond its bytes"] = (
    Python2(2)
    .dumps(as_bytes(batch()))
    .replace(
        Python2(2).saved(5) + b"J" + struct.pack("<i", 3072),
        b"\x8a\x08" + b"\xff" * 7 + b"\x7fJ" + struct.pack("<i", 3072),
    )
)


@pytest.mark.parametrize("what", OVERSIZED)
def test_a_small_pickle_takes_little_memory(tmp_path: Path, what: str) -> None:
    """No number in it makes room for what is not there, and what is shared stays shared."""
    put(tmp_path, cifar10() | {"test_batch": OVERSIZED[what]})
    with little_memory(32 << 20), pytest.raises(SourceError, match=r"test_batch can't be read: "):
        read_cifar(tmp_path, "test")


DEPTH = 200_000
DEEP = {
    "lists": b"]" * DEPTH + b"a" * (DEPTH - 1) + b".",
    "tuples": b"N" + b"\x85" * DEPTH + b".",
    "a tuple as a key": b"}N" + b"\x85" * DEPTH + b"Ns.",
    "dicts": b"}" + b"Vkey\n}" * (DEPTH // 2) + b"s" * (DEPTH // 2) + b".",
    "calls": b"cnumpy\ndtype\nq\0" + b"h\0" * DEPTH + b"R" * DEPTH + b".",
    "marks": b"(" * DEPTH + b".",
    "itself": b"]q\0h\0a.",
    "itself as its labels": b"}q\0(Vdata\nh\0Vlabels\nh\0u.",
    "its own state": b"}(Vlabels\n]Vdata\ncnumpy\nndarray\n)Rq\0h\0bu.",
}


@pytest.mark.parametrize("what", DEEP)
def test_nesting_and_recursion_end(tmp_path: Path, what: str) -> None:
    """Hundreds of thousands of levels, and values that hold themselves, without overflowing Python's stack."""
    put(tmp_path, cifar10() | {"test_batch": DEEP[what]})
    with pytest.raises(SourceError, match=r"test_batch can't be read: "):
        read_cifar(tmp_path, "test")


BROKEN = [
    b"",
    b".",
    b"}",
    b"a.",
    b"(.",
    b"]N",
    b"K",
    b"Nu.",
    b"(u.",
    b"t.",
    b"e.",
    b"Na.",
    b"NNNs.",
    b"](Ne",
    b"NNR.",
    b"Nb.",
]
BROKEN += [
    b"}(Nu.",
    b"}NNs.",
    b"(Nd.",
    b"}(Vlabels\nu.",
    b"h\0.",
    b"g1\n.",
    b"gx\n.",
    b"I\n.",
    b"Ix\n.",
    b"Sx\n.",
    b"S'\n.",
    b"S'",
]
BROKEN += [
    b"S'\\x'\n.",
    b"V\\ud\n.",
    b"cnumpy\n",
    b"cnumpy dtype\n\n.",
    b"\x93.",
    b"NN\x93.",
    b"q\0.",
    b"\xff",
    b"\x80",
]
BROKEN += [b"cnumpy\ndtype\n)RNR.", b"cnumpy\ndtype\nNRNb.", b"\x94.", b"\x85.", b"]]\x86", b"X\1\0\0\0\xff."]


@pytest.mark.parametrize("data", BROKEN, ids=repr)
def test_broken_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    """Opcodes without their operands, marks or arguments; text that is none; the end in the middle."""
    put(tmp_path, cifar10() | {"test_batch": data})
    with pytest.raises(SourceError, match=r"test_batch (can't be read: |has 0 bytes)"):
        read_cifar(tmp_path, "test")


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    """An error that quotes a file's line of a megabyte is no message."""
    put(tmp_path, cifar10() | {"test_batch": b"c" + b"x" * (1 << 20) + b"\ny\n."})
    with pytest.raises(SourceError) as caught:
        read_cifar(tmp_path, "test")
    assert len(str(caught.value)) < 1000


# ---- whatever the files hold

Files = dict[str, bytes]
MUTABLE: list[Files] = [mnist("{}", "train"), mnist("{}.gz", "train"), cifar100_binary()]
MUTABLE += [cifar100(PICKLERS[name]) for name in PICKLERS]


def well_formed(found: SmallImages) -> bool:
    count, height, width, channels = found.images.shape
    return (
        min(count, height, width) > 0
        and channels in (1, 3)
        and len(found.labels) == count == sum(number for _, number in found.splits)
        and found.labels.min() >= 0
        and (found.classes is None or int(found.labels.max()) < len(found.classes))
        and isinstance(found.name(count - 1), str)
    )


def read_or_refused(files: Files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = put(Path(folder), files)
        for read, looks in ((read_mnist, looks_like_mnist), (read_cifar, looks_like_cifar)):
            assert looks(root) in (False, True)
            with contextlib.suppress(SourceError):
                assert well_formed(read(root))


@st.composite
def mutated(draw: st.DrawFn) -> Files:
    """A small data set with one file changed: bytes replaced, removed, doubled or put in, near its start or end."""
    files = dict(draw(st.sampled_from(MUTABLE)))
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(data), 400)) | st.integers(max(0, len(data) - 200), len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data = data[:start] + draw(st.binary(max_size=8) | st.just(data[start:end] * 2)) + data[end:]
    return files | {name: data}


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_changed_files_are_read_or_refused(files: Files) -> None:
    """Nothing but SourceError comes out, or a result whose parts fit together."""
    read_or_refused(files)


opcodes = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
pieces = opcodes | st.sampled_from(
    [b"numpy\ndtype\n", b"Vdata\n", b"Vlabels\n", b"K\1", b"h\0", b"q\0", b"1\n", b"\0\0\0\0"]
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.lists(pieces | st.binary(max_size=3), max_size=40).map(b"".join))
@example(b"\x80\x02}q\0.")
@example(b"}(Vdata\nNVlabels\nNu.")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Random bytes and random opcodes, as each of the files."""
    for name in ("train", "meta"):
        read_or_refused(cifar100() | {name: data})
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        read_or_refused(mnist("{}", "train") | {name: data})


class OnlyData(pickle.Unpickler):
    """Python's unpickler, kept from calling anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module} {name}")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_values_are_what_pythons_unpickler_makes(value: object, protocol: int) -> None:
    """Numbers, text, lists, tuples and dicts come out as they went in, whatever the protocol and what they share."""
    data = pickle.dumps([value, value], protocol)
    assert pickles.described(data) == OnlyData(io.BytesIO(data)).load() == [value, value]
