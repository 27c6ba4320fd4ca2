"""Any dataset of torch's, packed and read back: by index, in batches, by loaders, with workers, and after damage."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anything import picture, same, samples
from edits import edited
from hypothesis import HealthCheck, assume, settings
from hypothesis import given as given_any
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import fastload
from fastload import DataLoader, EncodedImage, ImageDataset, Store, pack, record
from fastload.cli import main
from fastload.errors import DecodeError, FastloadError, PackError, SourceError, StoreFormatError
from fastload.fields import KINDS, learn, leaves
from fastload.info import info
from fastload.transforms import CenterCrop, RandomHorizontalFlip, Resize
from fastload.unpack import unpack
from fastload.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only: signals, fork")
Stock = torch.utils.data.DataLoader


class Made(Dataset[Any]):
    """A map-style dataset of what a function makes of an index."""

    def __init__(self, make: Callable[[int], Any], count: int = 12) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def digest(path: Path) -> str:
    return str(Store(path).manifest["digest"])


def reasons(path: Path) -> dict[int, str]:
    return {int(entry["name"]): entry["reason"] for entry in Store(path).quarantine()}


def names_of(path: Path) -> list[int]:
    store = Store(path)
    return [int(store.name(index)) for index in range(len(store))]


def rich(index: int) -> dict[str, Any]:
    """A sample with a field of every kind that stacks."""
    rng = np.random.default_rng(index)
    return {
        "image": torch.from_numpy(rng.integers(0, 256, (3, 8, 10), np.uint8)),
        "label": index % 3,
        "t": (0.5 * index, torch.tensor(index, dtype=torch.int16), np.float32(index), index % 2 == 0),
        "a": {"grid": rng.random((3, 2)), "zeros": torch.zeros(40, 40), "b": torch.full((2,), index).bfloat16()},
        "a.grid": f"text {index} \udcff",
        7: b"bytes" * index,
        "j": {"x": [index, None, "é"]} if index % 2 else [index],
        "grey": rng.integers(0, 256, (4, 5, 1), np.uint8),
    }


# ---- what comes back


def read_all(path: Path, **options: Any) -> list[Any]:
    dataset = ImageDataset(path, on_error="raise", **options)
    one_by_one = [dataset[index] for index in range(len(dataset))]
    together = dataset.__getitems__(list(range(len(dataset))))
    assert all(map(same, one_by_one, list(together)))
    assert all(map(same, one_by_one, together[:]))
    return one_by_one


@pytest.mark.parametrize("workers", [None, 2])
def test_a_rich_sample_comes_back(tmp_path: Path, workers: int | None) -> None:
    """Every kind of field, whoever packs it; ints stay ints and tensors without dimensions tensors."""
    pack(Made(rich, 40), tmp_path / "db.lmdb", workers=workers)
    assert all(map(same, read_all(tmp_path / "db.lmdb"), map(rich, range(40))))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given_any(sample=samples(), data=st.data())
def test_any_sample_comes_back(tmp_path_factory: pytest.TempPathFactory, sample: Any, data: st.DataObject) -> None:
    """Whatever its structure."""
    path = tmp_path_factory.mktemp("any") / "db.lmdb"
    count = data.draw(st.integers(1, 4))
    try:
        assume(not learn([sample]).of_kind("image"))
    except SourceError:
        assume(False)
    pack([sample] * count, path)
    expected = json_free(sample)
    assert all(same(found, expected) for found in read_all(path))
    assert verify(path, decode_images=True).damaged == ()


def json_free(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_free(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(json_free, value))
    return value.detach() if isinstance(value, torch.Tensor) else value


def stackable(index: int) -> tuple[Any, ...]:
    """What torch's default_collate takes."""
    sample = rich(index)
    nested = {
        "t": sample["t"],
        "a": sample["a"],
        "s": (f"{index}", {"u": "v" * index}),
        "d": {"k": index, "l": [index]},
    }
    return sample["image"], index % 3, nested, sample["grey"], bytes([index])


def equal_batches(ours: Any, theirs: Any) -> bool:
    """Of the same structure, dtypes and values; a column of texts may be a tuple or a list."""
    if isinstance(theirs, (tuple, list)) and theirs and isinstance(theirs[0], (str, bytes)):
        return list(ours) == list(theirs)
    if isinstance(theirs, (tuple, list)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(equal_batches, ours, theirs))
    if isinstance(theirs, Mapping):
        return [*ours] == [*theirs] and all(equal_batches(ours[key], theirs[key]) for key in theirs)
    return same(ours, theirs)


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (DataLoader, {}),
        (DataLoader, {"num_workers": 2, "worker_type": "thread"}),
        pytest.param(DataLoader, {"num_workers": 2, "worker_type": "process"}, marks=posix),
        (Stock, {}),
        pytest.param(Stock, {"num_workers": 2}, marks=posix),
    ],
    ids=str,
)
def test_batches_are_those_of_the_original(tmp_path: Path, loader: Any, options: dict[str, Any]) -> None:
    """What torch's loader gives of the dataset itself is what every loader gives of the store."""
    pack(Made(stackable), tmp_path / "db.lmdb")
    theirs = list(Stock(Made(stackable), batch_size=5))
    ours = list(loader(ImageDataset(tmp_path / "db.lmdb"), batch_size=5, **options))
    assert len(ours) == 3
    assert all(map(equal_batches, ours, theirs))


@pytest.mark.parametrize("make", [lambda i: i, lambda i: f"{i}", lambda i: [float(i)], lambda i: (torch.tensor(i),)])
def test_batches_of_small_samples(tmp_path: Path, make: Callable[[int], Any]) -> None:
    """One number, one text, one list of JSON, a tuple of one."""
    pack(Made(make), tmp_path / "db.lmdb")
    for loader in (DataLoader, Stock):
        ours = list(loader(ImageDataset(tmp_path / "db.lmdb"), batch_size=5))
        assert all(map(equal_batches, ours, Stock(Made(make), batch_size=5)))


MODES = ("L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "PA", "YCbCr", "HSV", "LAB", "I", "F", "I;16")


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode(tmp_path: Path, mode: str) -> None:
    """Grey and RGB come back as they are, others as RGB; what 8 bits don't hold is an array."""
    pack([(picture(mode, i), i) for i in range(3)], tmp_path / "db.lmdb")
    for index, (image, label) in enumerate(read_all(tmp_path / "db.lmdb")):
        original = picture(mode, index)
        if mode in ("I", "F", "I;16"):
            assert same(image, np.asarray(original))
        else:
            assert same(image, original if mode in ("L", "RGB") else original.convert("RGB"))
        assert label == index


@pytest.mark.parametrize(
    "options", [{"encode": "jpeg"}, {"encode": "raw"}, {"short_side": 20}, {"max_side": 16}], ids=str
)
@pytest.mark.parametrize("kind", ["L", "RGB", "array", "tensor", "grey array", "grey tensor", "file"])
def test_pictures_that_are_stored_otherwise(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    """They keep their type, their channels and, nearly, their looks; a second one of a sample does too."""

    def make(index: int) -> Any:
        pixels = np.asarray(picture("RGB", index, (6, 5)).resize((48, 40)))
        grey = np.ascontiguousarray(pixels[..., :1])
        if kind == "file":
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            return EncodedImage(file.getvalue())
        return {
            "L": Image.fromarray(grey[..., 0]),
            "RGB": Image.fromarray(pixels),
            "array": pixels,
            "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
            "grey array": grey,
            "grey tensor": torch.from_numpy(grey).permute(2, 0, 1),
        }[kind]

    pack(Made(lambda i: (make(i), make(i + 1), i), 3), tmp_path / "db.lmdb", **options)
    whole = {"encode": (40, 48), "short_side": (20, 24), "max_side": (13, 16)}[next(iter(options))]
    for transform, size in ((None, whole), (CenterCrop(8), (8, 8))):
        dataset = ImageDataset(tmp_path / "db.lmdb", transform, on_error="raise", cache="1MB")
        for index in (0, 1, 2, 0):
            for picture_, given, expected in zip(
                dataset[index], (make(index), make(index + 1)), (size, whole), strict=False
            ):
                original = given
                if kind == "file":
                    original = torch.from_numpy(np.array(Image.open(io.BytesIO(given)))).permute(2, 0, 1)
                assert type(picture_) is type(original)
                assert not isinstance(original, Image.Image) or picture_.mode == original.mode
                image, first = np.atleast_3d(np.asarray(picture_)), np.atleast_3d(np.asarray(original))
                if isinstance(picture_, torch.Tensor):
                    image, first = image.transpose(1, 2, 0), first.transpose(1, 2, 0)
                assert image.shape == (*expected, first.shape[2])
                if transform is None and expected == (40, 48):
                    assert np.abs(image.astype(int) - first).mean() < (12 if options == {"encode": "jpeg"} else 1e-9)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF"])
def test_encoded_images_of_every_format(tmp_path: Path, format: str) -> None:
    """Their own bytes are kept, but for JPEGs, which are re-cut."""
    files = []
    for index in range(3):
        file = io.BytesIO()
        picture("RGB", index, (40, 30)).save(file, format)
        files.append(EncodedImage(file.getvalue()))
    pack([(file, index) for index, file in enumerate(files)], tmp_path / "db.lmdb")
    if format != "JPEG":
        store = Store(tmp_path / "db.lmdb")
        assert [bytes(store[index]["image"].payload) for index in range(3)] == files
    for (image, label), file in zip(read_all(tmp_path / "db.lmdb"), files, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 4  # decoders differ by rounding
        assert type(label) is int


def test_a_long_thin_picture_and_a_mirrored_one(tmp_path: Path) -> None:
    """No PNG is so wide; views with negative strides are pictures too."""
    for name, pixels in {
        "wide": np.zeros((1, 1_000_001, 3), np.uint8),
        "mirrored": np.arange(300, dtype=np.uint8).reshape(10, 10, 3)[::-1, ::-1],
        "read-only": np.broadcast_to(np.uint8(7), (9, 9, 3)),
    }.items():
        pack([pixels], tmp_path / name)
        assert same(read_all(tmp_path / name), [np.ascontiguousarray(pixels)])


# ---- datasets that misbehave


def test_samples_that_raise_are_left_out(tmp_path: Path) -> None:
    """Whatever they raise, with it as the reason; so are those unlike the first ones."""

    class StrangeError(Exception):
        pass

    def make(index: int) -> Any:
        if index in (0, 51):
            raise StrangeError(f"no sample {index}")
        if index == 53:
            raise StopIteration
        if index == 55:
            raise SystemError
        return {49: None, 57: ("x", 1), 59: (np.zeros(2), 1, 2)}.get(index, (np.zeros(3), index))

    pack(Made(make, 60), tmp_path / "db.lmdb")
    found = reasons(tmp_path / "db.lmdb")
    assert [*found] == [0, 49, 51, 53, 55, 57, 59]
    assert found[51] == "StrangeError: no sample 51"
    assert (found[53], found[55]) == ("StopIteration", "SystemError")
    assert all("first samples" in found[index] for index in (49, 57, 59))
    assert names_of(tmp_path / "db.lmdb") == [i for i in range(60) if i not in found]
    pack(Made(make, 60), tmp_path / "by-workers.lmdb", workers=2)
    assert digest(tmp_path / "by-workers.lmdb") == digest(tmp_path / "db.lmdb")
    assert reasons(tmp_path / "by-workers.lmdb") == found


def test_a_dataset_that_lies_about_its_length(tmp_path: Path) -> None:
    """What is not there is left out; what is said not to be there is not asked for."""
    values = [float(i) for i in range(45)]
    pack(Made(values.__getitem__, 50), tmp_path / "long.lmdb")
    assert read_all(tmp_path / "long.lmdb") == values
    assert set(reasons(tmp_path / "long.lmdb").values()) == {"IndexError: list index out of range"}
    pack(Made(values.__getitem__, 40), tmp_path / "short.lmdb")
    assert read_all(tmp_path / "short.lmdb") == values[:40]


def damaged_file(format: str = "PNG") -> Image.Image:
    file = io.BytesIO()
    picture("RGB", 1, (60, 60)).save(file, format)
    data = bytearray(file.getvalue())
    half = len(data) // 2
    data[half : half + 40] = bytes(byte ^ 0x55 for byte in data[half : half + 40])
    return Image.open(io.BytesIO(bytes(data)))


@pytest.mark.parametrize("encode", ["keep", "raw", "jpeg"])
@pytest.mark.parametrize("place", [0, 40])
def test_an_opened_file_that_is_damaged_is_left_out(tmp_path: Path, encode: Any, place: int) -> None:
    """Pillow reads it only when its pixels are asked for, and at a second time gives half a picture."""
    values = [(picture("RGB", i, (60, 60)), i) for i in range(45)]
    values[place] = (damaged_file(), place)
    pack(values, tmp_path / "db.lmdb", encode=encode)
    assert [*reasons(tmp_path / "db.lmdb")] == [place]
    assert "damaged" in reasons(tmp_path / "db.lmdb")[place]


ODD_PICTURES: dict[str, Any] = {
    "bfloat16": torch.zeros(3, 4, 4, dtype=torch.bfloat16),
    "sparse": torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(),
    "without data": torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"),
    "four channels": torch.zeros(4, 4, 4, dtype=torch.uint8),
    "no pixels": torch.zeros(3, 0, 4, dtype=torch.uint8),
    "two dimensions": torch.zeros(4, 4, dtype=torch.uint8),
    "an array": np.zeros((4, 4, 3), np.float32),
    "a text": "x",
    "None": None,
}
ODD_MASKS: dict[str, Any] = {
    "of another size": np.zeros((4, 5), np.uint8),
    "ragged": [[1], [2, 3]],
    "negative": np.full((4, 4), -1),
    "too large": np.full((4, 4), 1 << 16),
    "real": np.zeros((4, 4)),
    "bfloat16": torch.zeros(4, 4).bfloat16(),
    "damaged": b"\x89PNG\r\n\x1a\n",
    "objects": object(),
}
ODD_BOXES: dict[str, Any] = {
    "three numbers": np.zeros((1, 3)),
    "beyond the image": [[0, 0, 9, 9]],
    "not finite": [[0, 0, float("nan"), 1]],
    "ragged": [[1], [2, 3]],
    "a text": "x",
}


def test_odd_pictures_masks_and_boxes_are_left_out(tmp_path: Path) -> None:
    """Each for itself: nothing that a dataset gives stops the others."""
    good = (torch.zeros(3, 4, 4, dtype=torch.uint8), np.zeros((4, 4), np.uint8), np.zeros((0, 4)), 1)
    odd = [(value, *good[1:]) for value in ODD_PICTURES.values()]
    odd += [(good[0], value, *good[2:]) for value in ODD_MASKS.values()]
    odd += [(*good[:2], value, 1) for value in ODD_BOXES.values()]
    pack([*[good] * 992, *odd, good], tmp_path / "db.lmdb", kinds={"1": "mask", "2": "boxes"})
    assert [*reasons(tmp_path / "db.lmdb")] == list(range(992, 992 + len(odd)))
    assert len(Store(tmp_path / "db.lmdb")) == 993


@pytest.mark.parametrize("source", [[], (), 5, object(), Made(str, 0), torch.utils.data.Sampler()], ids=repr)
def test_what_is_no_dataset_is_refused(tmp_path: Path, source: Any) -> None:
    """By an error that says what may be."""
    with pytest.raises((TypeError, SourceError), match=r"dataset|__iter__|first samples"):
        pack(source, tmp_path / "db.lmdb")
    assert os.listdir(tmp_path) == []


def test_a_map_style_dataset_needs_a_length(tmp_path: Path) -> None:
    """Nobody knows where it ends."""

    class Endless(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(TypeError, match="Endless has no length"):
        pack(Endless(), tmp_path / "db.lmdb")


# ---- iterable datasets


class Stream(IterableDataset[Any]):
    """The numbers up to `count`, shared out among workers; `fails` is where it raises."""

    def __init__(self, count: int, fails: int | None = None) -> None:
        self.count, self.fails = count, fails

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for number in range(worker.id if worker else 0, self.count, worker.num_workers if worker else 1):
            if number == self.fails:
                raise ValueError(f"no number {number}")
            yield number, f"text {number}"


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize("kind", [Stream, Sized])
@pytest.mark.parametrize("count", [1, 32, 33, 100])
def test_streams_are_packed_once_and_in_order(tmp_path: Path, kind: type[Stream], count: int) -> None:
    """By this process, or by workers that share it: the same store."""
    seen: list[tuple[int, int]] = []
    pack(kind(count), tmp_path / "db.lmdb", progress=lambda *pair: seen.append(pair))
    assert read_all(tmp_path / "db.lmdb") == [(i, f"text {i}") for i in range(count)]
    assert seen[-1] == (count, count)
    pack(kind(count), tmp_path / "by-workers.lmdb", workers=2)
    assert digest(tmp_path / "by-workers.lmdb") == digest(tmp_path / "db.lmdb")


@pytest.mark.parametrize("count", [4, 32, 50])
def test_what_can_be_iterated_once_is_read_once(tmp_path: Path, count: int) -> None:
    """A generator; and a dataset that hands on the same iterator each time."""

    class Once(IterableDataset[int]):
        def __init__(self) -> None:
            self.numbers = iter(range(count))

        def __iter__(self) -> Iterator[int]:
            return self.numbers

    pack((number for number in range(count)), tmp_path / "generator.lmdb")
    pack(Once(), tmp_path / "once.lmdb")
    for name in ("generator.lmdb", "once.lmdb"):
        assert read_all(tmp_path / name) == list(range(count))
    for source in (iter(range(count)), Once()):
        with pytest.raises(SourceError, match=r"gives its samples once.*leave workers out"):
            pack(source, tmp_path / "db.lmdb", workers=2)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_stream_that_fails_stops_the_pack(tmp_path: Path, workers: int | None) -> None:
    """It says where and why; what is packed is kept. Among its first samples, it is the source's error."""
    with pytest.raises(PackError, match=r"the dataset failed after \d+ samples: ValueError: no number 70"):
        pack(Stream(100, fails=70), tmp_path / "db.lmdb", workers=workers)
    assert not (tmp_path / "db.lmdb").exists()
    with pytest.raises(SourceError, match="first samples can't be read: ValueError: no number 3"):
        pack(Stream(100, fails=3), tmp_path / "db.lmdb", workers=workers)


# ---- workers, interruption


@posix
def test_workers_make_the_same_store(tmp_path: Path) -> None:
    """Byte for byte in its content, of a dataset that can't be pickled too."""
    unpicklable = Made(lambda i: (picture("RGB", i, (40, 30)), i), 70)
    for workers in (None, 1, 2):
        pack(unpicklable, tmp_path / f"{workers}.lmdb", workers=workers)
    assert len({digest(tmp_path / f"{workers}.lmdb") for workers in (None, 1, 2)}) == 1


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_dataset_that_can_not_be_sent_to_workers_is_an_error(tmp_path: Path) -> None:
    """Where processes are not forked; without workers it is packed."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(PackError, match="worker processes can't be started with this dataset"):
            pack(Made(lambda i: i), tmp_path / "db.lmdb", workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert pack(Made(lambda i: i), tmp_path / "db.lmdb").samples == 12


@posix
def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    """Not a hang, and no half store; the same command goes on."""

    def make(index: int) -> Any:
        if index == 50 and get_worker_info() is not None and (tmp_path / "deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return index, "x"

    (tmp_path / "deadly").touch()
    with pytest.raises(PackError, match=r"process that reads the dataset was lost.*(killed|exited)"):
        pack(Made(make, 100), tmp_path / "db.lmdb", workers=2)
    (tmp_path / "deadly").unlink()
    pack(Made(make, 100), tmp_path / "db.lmdb", workers=2)
    assert len(Store(tmp_path / "db.lmdb")) == 100


PROGRAM = """
    import os, time
    import numpy as np, torch, fastload

    if hasattr(os, "sched_setaffinity"):  # more threads would read so far ahead that nothing is written yet
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            if os.environ.get("SLOW") and index == 85:  # none that is looked at first
                open("reached", "w").close()
                time.sleep(600)
            return np.random.default_rng(index).integers(0, 256, 5 << 17, np.uint8), index

    def make():
        return Slow()

    if __name__ == "__main__":
        workers = int(os.environ["WORKERS"]) or None
        fastload.pack(Slow(), os.environ["DB"], workers=workers)
"""


@posix
@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 0), (signal.SIGINT, 2)])
def test_an_interrupted_pack_goes_on(tmp_path: Path, how: signal.Signals, workers: int) -> None:
    """After a kill or Ctrl-C the same command makes the store that it would have made undisturbed."""
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "WORKERS": str(workers), "DB": "db.lmdb"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(fastload.__file__))])
    run = [sys.executable, "program.py"]
    with subprocess.Popen(
        run, cwd=tmp_path, env=environment | {"SLOW": "1"}, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            while not (tmp_path / "reached").exists():
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, how)
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "db.lmdb").exists()
    size = os.path.getsize(tmp_path / "db.lmdb.partial")
    assert size > 32 << 20, "a step is committed"
    subprocess.run(run, cwd=tmp_path, env=environment, check=True)
    subprocess.run(run, cwd=tmp_path, env=environment | {"DB": "whole.lmdb", "WORKERS": "0"}, check=True)
    assert digest(tmp_path / "db.lmdb") == digest(tmp_path / "whole.lmdb")


def test_the_command_line_packs_what_a_function_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`module:factory`, a class or the dataset itself; kinds by name."""
    (tmp_path / "some_samples.py").write_text(
        "import numpy as np\nclass Masks(list):\n    pass\n"
        "def make():\n    return [(np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8))] * 3\n"
        "made = make()\ndef nothing():\n    return 5\ndef fails():\n    raise OSError('no disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, name in enumerate(("make", "made")):
        assert main(["pack", f"some_samples:{name}", f"{number}.lmdb", "--kind", "1=mask"]) == 0
        assert ImageDataset(f"{number}.lmdb").fields == ("image", "mask")
    capsys.readouterr()
    for name, words in {
        "nothing": "name a function that returns a dataset",
        "fails": "OSError: no disk",
        "other": "name a function that returns a dataset",
        "Masks": "there is nothing to pack in the dataset",
    }.items():
        assert main(["pack", f"some_samples:{name}", "db.lmdb"]) in (1, 2)
        assert words in capsys.readouterr().err
    assert main(["pack", "no_such_module:make", "db.lmdb"]) == 2
    assert "there is no module 'no_such_module'" in capsys.readouterr().err


# ---- transforms


def test_masks_and_boxes_move_with_their_image(tmp_path: Path) -> None:
    """Crops, sizes and flips: what a box frames in the image, it frames in the picture."""

    def make(index: int) -> dict[str, Any]:
        image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
        image[10:20, 5 + index : 35] = mask[10:20, 5 + index : 35] = 200
        return {"i": image, "m": mask, "b": torch.tensor([[5.0 + index, 10, 30 - index, 10]]), "n": index}

    pack(Made(make), tmp_path / "db.lmdb", kinds={"m": "mask", "b": "boxes"})
    for transform in (None, CenterCrop(30), [Resize(20), RandomHorizontalFlip(1.0)], RandomHorizontalFlip()):
        chosen = fastload.transforms.Compose(transform) if isinstance(transform, list) else transform
        dataset = ImageDataset(tmp_path / "db.lmdb", chosen, on_error="raise")
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample["n"] == index
            rows, columns = np.nonzero(sample["m"] == 200)
            x, y, width, height = sample["b"][0].tolist()
            assert abs(columns.min() - x) <= 1
            assert abs(rows.min() - y) <= 1
            assert abs(columns.max() + 1 - x - width) <= 1
            assert abs(rows.max() + 1 - y - height) <= 1
            assert (sample["i"][rows, columns] > 90).mean() > 0.9


@pytest.mark.parametrize(
    ("make", "place"),
    [(lambda i: (picture("RGB", i), i), 1), (lambda i: (i, picture("RGB", i)), 0), (lambda i: (2.5, i), 1)],
)
def test_a_target_transform_works_on_the_target(tmp_path: Path, make: Callable[[int], Any], place: int) -> None:
    """The second value, or the one that is no image; not on what stands for a damaged sample."""
    pack(Made(make), tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", target_transform=lambda value: f"class {value}")
    for index in range(12):
        sample = dataset[index]
        assert sample[place] == f"class {index}"
        assert same(sample[1 - place], make(index)[1 - place])
    if make(0)[0] != 2.5:
        change(tmp_path / "db.lmdb", field="image")
        damaged = ImageDataset(tmp_path / "db.lmdb", target_transform=lambda value: f"class {value}")
        assert not str(damaged[1][place]).startswith("class")
        assert damaged[2][place] == "class 2"


def test_boxes_shrink_with_their_image(tmp_path: Path) -> None:
    """When it is packed, and packed again."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    pack([(image, torch.tensor([[6.0, 8, 20, 10]]))] * 2, tmp_path / "a.lmdb", kinds={"1": "boxes"}, short_side=20)
    assert read_all(tmp_path / "a.lmdb")[0][1].tolist() == [[3, 4, 10, 5]]
    pack(tmp_path / "a.lmdb", tmp_path / "b.lmdb", short_side=10)
    assert read_all(tmp_path / "b.lmdb")[0][1].tolist() == [[1.5, 2, 5, 2.5]]


# ---- stores without images; decoders


def test_a_store_without_images(tmp_path: Path) -> None:
    """Read, described and checked like any other; what needs images says so."""
    pack([(np.arange(i), f"{i}") for i in range(5)], tmp_path / "db.lmdb")
    for image_type in (None, "numpy", "pil", "tensor"):
        assert all(
            map(same, read_all(tmp_path / "db.lmdb", image_type=image_type), [(np.arange(i), f"{i}") for i in range(5)])
        )
    assert info(tmp_path / "db.lmdb")["fields"] == [{"name": "0", "kind": "array"}, {"name": "1", "kind": "text"}]
    assert verify(tmp_path / "db.lmdb", decode_images=True).damaged == ()
    dataset = ImageDataset(tmp_path / "db.lmdb")
    for call in (lambda: dataset.read(0), dataset.show, lambda: ImageDataset(tmp_path / "db.lmdb", CenterCrop(3))):
        with pytest.raises(ValueError, match="has no images"):
            call()
    assert main(["show", str(tmp_path / "db.lmdb"), "-o", str(tmp_path / "a.png")]) == 2
    assert main(["info", str(tmp_path / "db.lmdb")]) == 0


def test_a_decoder_gets_the_stores_own_memory(tmp_path: Path) -> None:
    """A view of the map, not a copy, whoever reads; what it returns is the sample's value."""
    pack([(os.urandom(100_000), i) for i in range(9)], tmp_path / "db.lmdb")
    views: list[Any] = []

    def keep(view: memoryview) -> int:
        views.append(view)
        return len(view)

    dataset = ImageDataset(tmp_path / "db.lmdb", decoder=keep)
    assert list(dataset.__getitems__(range(9))) == [(100_000, i) for i in range(9)]
    store = dataset.store
    for index, view in enumerate(views):
        assert type(view) is memoryview
        assert view.readonly
        mapped = np.frombuffer(store.view(index), np.uint8)
        start = np.frombuffer(view, np.uint8).__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
        assert 0 < start < len(mapped), "within the record, in the map"
    for options in ({"worker_type": "thread"}, {"worker_type": "process"}):
        loader = DataLoader(ImageDataset(tmp_path / "db.lmdb", decoder=len), batch_size=3, num_workers=2, **options)
        assert [batch[0].tolist() for batch in loader] == [[100_000] * 3] * 3


def test_decoders_of_several_fields(tmp_path: Path) -> None:
    """By name; what has none stays bytes."""
    pack([{"a": b"1", "b": b"22", "t": "x"}] * 2, tmp_path / "db.lmdb")
    assert ImageDataset(tmp_path / "db.lmdb", decoder={"b": len})[0] == {"a": b"1", "b": 2, "t": "x"}
    assert ImageDataset(tmp_path / "db.lmdb", decoder={"b": len, "a": bytes})[1] == {"a": b"1", "b": 2, "t": "x"}
    for wrong, words in ((len, "there are a, b: pass"), ({"t": len}, "decoder names t; the fields of bytes are: a, b")):
        with pytest.raises(ValueError, match=words):
            ImageDataset(tmp_path / "db.lmdb", decoder=wrong)  # type: ignore[arg-type]


# ---- other commands


def test_a_store_of_any_fields_can_be_packed_again(tmp_path: Path) -> None:
    """All of them, and once more; only its images may change."""
    pack(Made(rich), tmp_path / "a.lmdb")
    pack(tmp_path / "a.lmdb", tmp_path / "b.lmdb")
    assert digest(tmp_path / "b.lmdb") == digest(tmp_path / "a.lmdb")
    pack(tmp_path / "b.lmdb", tmp_path / "c.lmdb", short_side=5)
    for found, sample in zip(read_all(tmp_path / "c.lmdb"), map(rich, range(12)), strict=True):
        assert found.pop("image").shape == (3, 5, 6)
        del sample["image"], found["grey"], sample["grey"]
        assert same(found, sample)


@pytest.mark.parametrize("format", ["folder", "tar"])
def test_a_store_of_any_fields_can_be_unpacked(tmp_path: Path, format: Any) -> None:
    """A file for each field: as many as there are, though names differ only in what no file name has."""
    sample = {"a:b": "one", "a/b": "two", "a_b": "three", "n": 5, "v": torch.ones(2).bfloat16(), "x" * 300: b"long"}
    pack([sample] * 2, tmp_path / "db.lmdb")
    assert unpack(tmp_path / "db.lmdb", tmp_path / "out.tar", format=format) == 2
    if format == "folder":
        files = sorted(os.listdir(tmp_path / "out.tar"))
        assert len(files) == 12
        texts = [(tmp_path / "out.tar" / name).read_text() for name in files if name.endswith(".txt")]
        assert sorted(texts) == ["one", "one", "three", "three", "two", "two"]
    else:
        import tarfile

        with tarfile.open(tmp_path / "out.tar") as tar:
            assert len(set(tar.getnames())) == 12


# ---- damage


def change(path: Path, how: Callable[[dict[str, Any]], Any] | None = None, field: str | None = None) -> None:
    """Alter a store in place: its manifest, or the last byte of a field of sample 1, whose checksum stays."""
    store = Store(path)
    names = store.field_names
    copy = path.with_suffix(".copy")  # the store itself is mapped
    shutil.copy(path, copy)
    if how is not None:
        with edited(copy) as transaction:
            manifest = json.loads(transaction.get(b"manifest"))
            text = how(manifest)
            transaction.put(b"manifest", text if isinstance(text, bytes) else json.dumps(manifest).encode())
    if field is not None:
        with edited(copy, b"samples") as transaction:
            key = (1).to_bytes(8, "big")
            data = bytearray(transaction.get(key))
            sizes = [len(f.payload) for f in record.parse(bytes(data))]
            behind = sum(sizes[names.index(field) + 1 :])
            data[len(data) - behind - 1] ^= 1
            transaction.put(key, bytes(data))
    os.replace(copy, path)


DAMAGED = ("text", "array", "json", "bytes", "boxes", "grey")


@pytest.mark.parametrize("field", DAMAGED)
def test_a_damaged_field_is_an_event(tmp_path: Path, field: str) -> None:
    """A placeholder of its type for the whole sample, another sample, or an error, as for images; verify finds it."""

    def make(index: int) -> dict[str, Any]:
        image = torch.full((3, 6, 6), 9, dtype=torch.uint8)
        return {
            **{"image": image, "label": index, "text": f"{index}", "array": torch.full((3,), index), "bytes": b"b"},
            **{"json": [index], "boxes": np.float32([[0, 0, 2, 2]]), "grey": np.ones((2, 2, 1), np.uint8)},
        }

    path = tmp_path / "db.lmdb"
    pack(Made(make, 6), path, kinds={"boxes": "boxes"})
    change(path, field=field)
    assert [damage.index for damage in verify(path).damaged] == [1]
    with pytest.raises(DecodeError, match=r"sample 1 .*checksum"):
        ImageDataset(path, on_error="raise").__getitems__(range(6))
    dataset = ImageDataset(path)
    found = dataset.__getitems__(range(6))
    assert [*dataset.failures] == [1]
    assert (found[1]["label"], found[1]["text"], found[1]["json"], found[1]["bytes"]) == (-100, "", None, b"")
    assert not found[1]["image"].any()
    assert found[1]["boxes"].shape == (0, 4)
    assert type(found[1]["array"]) is torch.Tensor
    assert all(same(found[i], make(i)) for i in (0, 2, 3, 4, 5))
    other = ImageDataset(path, on_error="skip")[1]
    assert same(other, make(other["label"]))
    assert other["label"] != 1
    with pytest.raises(FastloadError, match="1 of 6 samples are damaged"):
        unpack(path, tmp_path / "out")
    pack(path, tmp_path / "again.lmdb")
    assert len(Store(tmp_path / "again.lmdb")) == 5


def set_field(name: str, /, **members: Any) -> Callable[[dict[str, Any]], None]:
    def how(manifest: dict[str, Any]) -> None:
        next(field for field in manifest["fields"] if field["name"] == name).update(members)

    return how


def nested(depth: int) -> Callable[[dict[str, Any]], bytes]:
    def how(manifest: dict[str, Any]) -> bytes:
        tree = '{"tuple": [' * depth + '"image"' + "]}" * depth
        return json.dumps(manifest | {"sample": "TREE"}).replace('"TREE"', tree).encode()

    return how


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tree 100 deep": nested(100),
    "a tree 100,000 deep": nested(100_000),
    "a tree of an unknown name": lambda m: m.update(sample={"tuple": ["image", "other"]}),
    "a tree of the record's name": lambda m: m.update(sample={"tuple": ["image", "name"]}),
    "a tree of nothing": lambda m: m.update(sample={"tuple": []}),
    "a tree that is none": lambda m: m.update(sample=[["image"]]),
    "keys that are lists": lambda m: m.update(sample={"dict": [[["a"], "image"]]}),
    "two fields of one name": lambda m: m["fields"].append(m["fields"][1]),
    "a name that is none": lambda m: m["fields"][0].update(name=["image"]),
    "an unknown kind": set_field("a", kind="picture"),
    "an unknown type": set_field("a", type="torch"),
    "a type that is a list": set_field("a", type=["tensor"]),
    "no place": set_field("a", **{"in": "nowhere"}),
    "text in a column": set_field("a", **{"in": "column"}),
    "a number in the record": set_field("n", **{"in": "record"}),
    "a number without a column": set_field("n", column=None),
    "a column that is not there": set_field("n", column="field_99"),
    "a column that is a list": set_field("n", column=["field_2"]),
    "a number that is a text": set_field("n", type="str"),
    "a tensor of no dtype": set_field("n", type="tensor", dtype=""),
    "a dtype that is code": set_field("n", dtype="O"),
    "a dtype that is a number": set_field("n", dtype=5),
    "a dtype of records": set_field("n", dtype="i4,i4"),
    "another shape": set_field("n", shape=[3]),
    "a huge shape": set_field("v", shape=[1 << 31] * 8),
    "a negative shape": set_field("v", shape=[-1]),
    "a shape that is none": set_field("v", shape="3"),
    "an unsigned label": set_field("n", column="label", type="numpy", dtype="|u1"),
    "no channels": set_field("image", channels=0),
    "many channels": set_field("image", channels=1 << 40),
    "channels in words": set_field("image", channels="three"),
    "boxes of no format": set_field("a", kind="boxes", format="XYZ"),
    "a fill that no mask has": set_field("a", fill=1 << 20),
    "sizes of no pair": lambda m: m["columns"]["size"].update(shape=[]),
    "no checksum of the others": lambda m: m["columns"].pop("others_checksum"),
    "checksums of several": lambda m: m["columns"]["others_checksum"].update(shape=[2]),
    "fields that are a dict": lambda m: m.update(fields={"image": {}}),
    "columns that are a list": lambda m: m.update(columns=[]),
    "no fields": lambda m: m.pop("fields"),
}


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "db.lmdb"
    sample = {"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "a": np.zeros(3), "n": np.int16(5), "v": np.ones(2)}
    pack([sample] * 3, path, kinds={"v": "vector"})
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(plain_store: Path, tmp_path: Path, name: str) -> None:
    """When it is opened, by an error that says what the matter is."""
    shutil.copy(plain_store, tmp_path / "db.lmdb")
    assert len(ImageDataset(tmp_path / "db.lmdb")[0]) == 4
    change(tmp_path / "db.lmdb", HOSTILE[name])
    with pytest.raises(StoreFormatError, match="manifest"):
        Store(tmp_path / "db.lmdb")


VALUES: list[Any] = [*KINDS, "", "tensor", "pil", "scalar", "numpy", "bool", "record", "column", "<f8", "|b1", "<u8"]
VALUES += ["|u1", "a", "n", "name", "label", "size"]
VALUES += ["field_2", "XYXY", 0, 1, 3, -1, 1.5, None, True, [], [2], [0], [[]], {}]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given_any(
    name=st.sampled_from(["image", "a", "n", "v", "name"]),
    member=st.sampled_from(["name", "kind", "type", "dtype", "shape", "column", "fill", "format", "channels", "in"]),
    value=st.sampled_from(VALUES),
)
def test_any_manifest_is_read_or_refused(
    plain_store: Path, tmp_path_factory: Any, name: str, member: str, value: Any
) -> None:
    """One member of a field replaced: samples, or an error of ours, when it is opened or read."""
    path = tmp_path_factory.mktemp("changed") / "db.lmdb"
    shutil.copy(plain_store, path)
    change(path, set_field(name, **{member: value}))
    for on_error in ("placeholder", "raise"):
        try:
            ImageDataset(path, on_error=on_error).__getitems__([0, 1, 2])[0]  # type: ignore[arg-type]
        except FastloadError:
            continue


def test_names_of_fields_are_all_different(tmp_path: Path) -> None:
    """In the tree of every store that is packed."""
    random.seed(0)
    keys = ["a", "a.b", "image", "image_", "name", "label", "others", "0", 0, "", "."]
    for number in range(4):
        sample = {key: {"b": number, "": "x"} if random.random() < 0.5 else "y" for key in random.sample(keys, 8)}
        pack([sample] * 2, tmp_path / f"{number}.lmdb")
        names: Sequence[str] = [*leaves(Store(tmp_path / f"{number}.lmdb").schema.sample)]
        assert len({*names}) == len(names)
        assert all(same(found, sample) for found in read_all(tmp_path / f"{number}.lmdb"))


# ---- what a stranger stumbled over


def test_pictures_of_other_channels_are_never_changed(tmp_path: Path) -> None:
    """Among the first samples they are arrays; later ones are left out, with the reason."""
    mixed = [(torch.full((3 - 2 * (i % 2), 20, 30), i, dtype=torch.uint8), i) for i in range(4)]
    pack(mixed, tmp_path / "a.lmdb")
    assert same([ImageDataset(tmp_path / "a.lmdb")[i] for i in range(4)], mixed)
    late = [(torch.full((3, 20, 30), i, dtype=torch.uint8), i) for i in range(200)]
    late[38] = (torch.zeros((1, 20, 30), dtype=torch.uint8), 38)
    assert pack(late, tmp_path / "b.lmdb").quarantined == 1
    (entry,) = Store(tmp_path / "b.lmdb").quarantine()
    assert "1 channels, the first samples 3" in entry["reason"]


def test_instance_masks_of_any_number_are_arrays(tmp_path: Path) -> None:
    """(n, height, width), as torchvision's detection models take them, one or three of them too."""
    samples = [{"masks": torch.ones((n, 8, 9), dtype=torch.uint8)} for n in (1, 3, 2, 3, 1)]
    pack(samples, tmp_path / "db.lmdb")
    assert same([ImageDataset(tmp_path / "db.lmdb")[i] for i in range(5)], samples)


def test_a_second_picture_is_told_of(tmp_path: Path) -> None:
    """When it is packed, and when a transform would move the first one alone."""
    pictures = [(Image.new("RGB", (20, 10), (i, 0, 0)), Image.new("RGB", (20, 10), (0, i, 0))) for i in range(3)]
    report = pack(pictures, tmp_path / "db.lmdb")
    assert any("1 come as they are" in note for note in report.notes)
    with pytest.warns(UserWarning, match="first picture of each sample alone; 1 come"):
        sample = ImageDataset(tmp_path / "db.lmdb", Resize(5), image_type="tensor")[0]
    assert [picture.shape for picture in sample] == [(3, 5, 10), (3, 10, 20)]


def test_boxes_of_corners(tmp_path: Path) -> None:
    """`boxes:XYXY` are torchvision's: they come back as corners, moved; plain boxes are told of."""
    samples = [(Image.new("RGB", (200, 200)), {"boxes": torch.tensor([[10.0, 20.0, 30.0, 50.0]])})] * 3
    report = pack(samples, tmp_path / "db.lmdb", kinds={"1.boxes": "boxes:XYXY"})
    flipped = ImageDataset(tmp_path / "db.lmdb", RandomHorizontalFlip(1.0))[0]
    assert flipped[1]["boxes"].tolist() == [[170, 20, 190, 50]]
    assert report.notes == ()
    report = pack(samples, tmp_path / "db.lmdb", kinds={"1.boxes": "boxes"}, overwrite=True)
    assert any("boxes:XYXY" in note for note in report.notes)


class _Whole(IterableDataset[Any]):
    """Gives all of its samples in every worker."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((3,), float(i)), i) for i in range(10)])


def test_a_stream_that_workers_do_not_share_is_refused(tmp_path: Path) -> None:
    """Else all of it would be packed twice; nothing is left behind under the final name."""
    with pytest.raises(SourceError, match="same first sample in two workers"):
        pack(_Whole(), tmp_path / "db.lmdb", workers=2)
    assert not (tmp_path / "db.lmdb").exists()
    assert pack(_Whole(), tmp_path / "db.lmdb", workers=1).samples == 10


def test_labels_go_into_a_list_when_files_are_unpacked(tmp_path: Path) -> None:
    """And come back from it."""
    pack([(Image.new("RGB", (20, 10), (i, 0, 0)), i % 3) for i in range(6)], tmp_path / "db.lmdb")
    unpack(tmp_path / "db.lmdb", tmp_path / "files")
    pack(tmp_path / "files" / "labels.tsv", tmp_path / "again.lmdb")
    assert ImageDataset(tmp_path / "again.lmdb").targets.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_label_that_is_missing_late_costs_its_sample(tmp_path: Path) -> None:
    """None among whole numbers, after the samples that were looked at."""
    samples: list[Any] = [(torch.ones(2), i) for i in range(200)]
    samples[38] = (torch.ones(2), None)
    assert pack(samples, tmp_path / "db.lmdb").quarantined == 1


def test_targets_that_are_dicts_stay_dicts_in_lists(tmp_path: Path) -> None:
    """`as_list` gives images and targets as torchvision's detection models take them."""
    samples = [
        (torch.full((3, 8, 8), i, dtype=torch.uint8), {"boxes": torch.ones((i, 4)), "id": i}) for i in range(1, 5)
    ]
    pack(samples, tmp_path / "db.lmdb", kinds={"1.boxes": "array"})
    loader = DataLoader(ImageDataset(tmp_path / "db.lmdb"), batch_size=4, collate_fn=fastload.collate.as_list)
    images, targets = next(iter(loader))
    assert same([*zip(images, targets, strict=True)], samples)
    made = fastload.make_loader(tmp_path / "db.lmdb", 4, train=False, size=8, collate_fn=fastload.collate.as_list)
    assert [target["id"] for target in next(iter(made))[1]] == [1, 2, 3, 4]


def test_captions_of_any_number_are_padded_around(tmp_path: Path) -> None:
    """What can't be padded, lists of texts, stays a list."""
    samples = [{"x": torch.ones(i), "texts": ["a"] * i} for i in range(1, 4)]
    pack(samples, tmp_path / "db.lmdb")
    batch = next(iter(DataLoader(ImageDataset(tmp_path / "db.lmdb"), 3, collate_fn=fastload.collate.pad)))
    assert batch["texts"] == [["a"], ["a", "a"], ["a", "a", "a"]]
    assert batch["x"].shape == (3, 3)


def test_make_loader_says_what_it_takes() -> None:
    """A dataset that isn't packed is none of it."""
    with pytest.raises(TypeError, match=r"make_loader takes a store or an ImageDataset, got a list; fastload\.pack"):
        fastload.make_loader([1, 2], 4, train=True)  # type: ignore[arg-type]


def test_bare_pictures_are_stacked_by_any_loader(tmp_path: Path) -> None:
    """Samples that are pictures and nothing else: torch's own collate function stacks lists of tensors alone."""
    pictures = [np.full((8, 9, 3), shade, np.uint8) for shade in range(6)]
    pack(pictures, tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", image_type="tensor")
    for loader in (TorchLoader, DataLoader):
        for workers in (0, 1):
            batches = torch.cat(list(loader(dataset, batch_size=4, num_workers=workers)))
            assert batches.permute(0, 2, 3, 1).numpy().tolist() == np.stack(pictures).tolist()
