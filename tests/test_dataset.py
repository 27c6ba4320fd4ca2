"""The dataset: the same pictures and labels whoever asks, in whichever way, damaged stores included."""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import Pixels, picture
from edits import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import ImageCache, ImageDataset, Store, record, tiles
from fastload.errors import ChecksumError, ColumnError, DecodeError, StoreError, TooManyFailures
from fastload.geometry import Box
from fastload.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize

# torch's advice, made for processes, on a machine with fewer cores than a test has threads
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BAD = 5
"""The sample that is damaged on purpose: bee/1.jpg, label 1."""


def train_transform(size: int = 24) -> Compose:
    return Compose([RandomResizedCrop(size), RandomHorizontalFlip()])


def upright(path: Path) -> Pixels:
    """What a viewer shows of an image file."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def as_array(image: torch.Tensor) -> Pixels:
    return image.permute(1, 2, 0).numpy()


def assert_same_batch(got: Any, expected: Any) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def fresh(dataset: ImageDataset, indices: Sequence[int]) -> list[torch.Tensor]:
    """[images, labels] of these samples, read one by one and copied."""
    samples = [dataset[index] for index in indices]
    return [torch.stack([image.clone() for image, _ in samples]), torch.tensor([label for _, label in samples])]


def stop_processes(batches: Any) -> None:
    """End the workers of torch's iterator: after an error only the garbage collector would, in 5 s for each."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


@pytest.fixture(scope="session")
def files(class_folders: Path) -> list[Path]:
    """The image files in index order."""
    return sorted(class_folders.glob("*/*.jpg"))


@pytest.fixture(scope="session")
def turned_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat store, so without labels, of one image in each EXIF orientation, 1 to 8; the files lie beside it."""
    root = tmp_path_factory.mktemp("turned")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture(40, 56, seed=orientation)).save(root / f"{orientation}.jpg", exif=exif)
    path = tmp_path_factory.mktemp("stores") / "turned.lmdb"
    fastload.pack(root, path)
    for file in root.iterdir():
        file.rename(path.parent / file.name)
    return path


def patched(source: Path, target: Path, changes: dict[bytes, bytes]) -> Path:
    """A copy of a store in which some bytes, wherever they are, are others of the same length; checksums agree."""
    data = source.read_bytes()
    for old, new in changes.items():
        assert len(old) == len(new)
        assert old in data
        data = data.replace(old, new)
    target.write_bytes(data)
    with edited(target, b"samples"):
        pass
    return target


def damage(source: Path, target: Path, *indices: int) -> Path:
    """A copy of a store in which 20 bytes in the middle of each of these samples' JPEGs are flipped."""
    store = Store(source)
    changes = {}
    for index in indices:
        payload = bytes(store[index]["image"].payload)
        middle = len(payload) // 2
        flipped = bytes(byte ^ 0xFF for byte in payload[middle : middle + 20])
        changes[payload] = payload[:middle] + flipped + payload[middle + 20 :]
    return patched(source, target, changes)


@pytest.fixture
def damaged_path(store_path: Path, tmp_path: Path) -> Path:
    return damage(store_path, tmp_path / "damaged.lmdb", BAD)


# --- one sample


def test_a_sample_is_the_upright_picture_and_its_label(store_path: Path, files: list[Path]) -> None:
    """Without a transform a sample is exactly what a viewer shows, as a uint8 tensor, and its class as an int."""
    dataset = ImageDataset(store_path)
    assert len(dataset) == len(files) == 12
    for index, file in enumerate(files):
        image, label = dataset[index]
        assert image.dtype == torch.uint8
        assert np.array_equal(as_array(image), upright(file))
        assert type(label) is int
        assert label == index // 4


def test_a_sample_is_channels_last_in_memory(store_path: Path) -> None:
    """CHW by shape, rows of RGB pixels in memory: the transposed view is contiguous."""
    image, _ = ImageDataset(store_path)[0]
    channels, _, width = image.shape
    assert channels == 3
    assert image.stride() == (1, 3 * width, 3)
    assert image.permute(1, 2, 0).is_contiguous()


def test_negative_indices_count_from_the_end(store_path: Path) -> None:
    """As in a list, alone and mixed with others."""
    dataset = ImageDataset(store_path, Resize((8, 8)))
    for index in range(1, 13):
        assert_same_batch(fresh(dataset, [-index]), fresh(dataset, [12 - index]))
    batch = dataset.__getitems__([3, -1, -12, 11])
    assert_same_batch((batch.images, batch.labels), fresh(dataset, [3, 11, 0, 11]))


@pytest.mark.parametrize("index", [12, -13, 1 << 40, -(1 << 62)])
def test_an_index_out_of_range_is_an_index_error(store_path: Path, index: int) -> None:
    """It names the index and the length, alone and in a batch; iterating over the dataset therefore ends."""
    dataset = ImageDataset(store_path, Resize((8, 8)))
    for read in (lambda: dataset[index], lambda: dataset.__getitems__([3, index, 0])):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a dataset of 12 samples"):
            read()


def test_a_dataset_can_be_iterated(store_path: Path) -> None:
    """`for image, label in dataset` gives every sample once."""
    assert [label for _, label in ImageDataset(store_path)] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("index", [1.7, "3", None, slice(0, 2)])
def test_what_is_no_index_is_refused(store_path: Path, index: Any) -> None:
    """A list of samples would refuse it too: no number is cut off, no text is read."""
    with pytest.raises(TypeError):
        ImageDataset(store_path)[index]


# --- a batch


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda indices: np.array(indices, np.int32)])
def test_a_batch_is_its_samples(store_path: Path, make: Callable[[list[int]], Any]) -> None:
    """Indices of any kind, repeated or not, give the samples that they give one by one."""
    dataset = ImageDataset(store_path, train_transform())
    indices = [4, 0, 11, 4, 7]
    batch = dataset.__getitems__(make(indices))
    assert len(batch) == 5
    expected = fresh(dataset, indices)
    assert_same_batch((batch.images, batch.labels), expected)
    for samples in (list(batch), [batch[i] for i in range(5)], batch[:], [batch[i - 5] for i in range(5)]):
        assert all(type(label) is int for _, label in samples)
        assert_same_batch(torch.utils.data.default_collate(list(samples)), expected)
    assert [label for _, label in batch[1:3]] == expected[1][1:3].tolist()
    with pytest.raises(IndexError):
        batch[5]


def test_a_batchs_memory_is_channels_last_and_one_buffer(store_path: Path) -> None:
    """Images are uint8 (n, 3, h, w) in channels-last memory, samples are views of it, labels are int64."""
    batch = ImageDataset(store_path, Resize((10, 14))).__getitems__([1, 2, 3])
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, 10, 14)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    start = batch.images.data_ptr()
    assert [image.data_ptr() - start for image, _ in batch] == [0, 10 * 14 * 3, 2 * 10 * 14 * 3]


def test_a_batch_of_many_parts_is_its_samples(store_path: Path) -> None:
    """Batches far longer than what one thread takes at a time are read whole, whatever their length."""
    dataset = ImageDataset(store_path, train_transform(8))
    for count in (1, 7, 8, 9, 16, 41):
        indices = [(5 * i) % 12 for i in range(count)]
        batch = dataset.__getitems__(indices)
        assert_same_batch((batch.images, batch.labels), fresh(dataset, indices))


def test_pictures_of_different_sizes_come_as_a_list(store_path: Path, files: list[Path]) -> None:
    """Where sizes differ a batch holds a list of pictures, and collating it says which sizes."""
    batch = ImageDataset(store_path).__getitems__([0, 5])
    for image, file in zip(batch.images, (files[0], files[5]), strict=True):
        assert np.array_equal(as_array(image), upright(file))
    with pytest.raises(RuntimeError, match=r"different shapes, \(3, 60, 80\) and .* a transform that makes them equal"):
        fastload.collate(batch)


def test_an_empty_batch_is_empty(store_path: Path) -> None:
    """No indices, no samples, no error."""
    batch = ImageDataset(store_path, Resize((8, 8))).__getitems__([])
    assert len(batch) == 0
    assert list(batch) == []


def test_batches_stay_as_they_are(store_path: Path) -> None:
    """Pictures that are held, even one of a batch, never change while others are read."""
    dataset = ImageDataset(store_path, train_transform())
    kept, expected = [], []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__([0, 5, 9])
        expected.append(batch.images.clone())
        kept.append((batch.images, batch[1][0], next(iter(batch))[0])[epoch % 3])
        if epoch % 4 == 3:
            del kept[-2], expected[-2]
    for image, whole in zip(kept, expected, strict=True):
        assert any(torch.equal(image, one) for one in (whole, whole[0], whole[1]))


# --- labels


def test_classes_and_targets_are_image_folders(store_path: Path, class_folders: Path) -> None:
    """What torchvision's ImageFolder gives: sorted folder names, their numbers, and a label for each path in order."""
    names = sorted(entry.name for entry in os.scandir(class_folders))
    targets = [label for label, name in enumerate(names) for _ in sorted((class_folders / name).iterdir())]
    dataset = ImageDataset(store_path)
    assert dataset.classes == names == ["ant", "bee", "cat"]
    assert dataset.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    assert dataset.targets.dtype == np.int64
    assert dataset.targets.tolist() == targets


def test_targets_are_a_copy(store_path: Path) -> None:
    """Changing them changes neither the store nor the labels of samples."""
    dataset = ImageDataset(store_path)
    dataset.targets[:] = 9
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset[0][1] == 0


def test_without_labels_every_label_is_minus_one(turned_path: Path) -> None:
    """A flat folder has no classes; samples and targets say -1."""
    dataset = ImageDataset(turned_path)
    assert dataset.classes is None
    assert dataset.class_to_idx == {}
    assert dataset.targets.tolist() == [-1] * 8
    assert dataset[3][1] == -1
    assert dataset.__getitems__([0]).labels.tolist() == [-1]


@pytest.fixture(scope="session")
def several_labels_path(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a list with up to three labels a line, short lines filled with -1."""
    lists = tmp_path_factory.mktemp("lists")
    lines = ["ant/0.jpg 7 8 9", "bee/1.jpg 1", "cat/2.jpg 0 5"]
    (lists / "list.txt").write_text("\n".join(lines))
    fastload.pack(lists / "list.txt", lists / "several.lmdb", root=class_folders)
    return lists / "several.lmdb"


def test_several_labels_are_a_tensor(several_labels_path: Path) -> None:
    """A sample has its row of labels, a batch has all rows."""
    dataset = ImageDataset(several_labels_path, Resize((8, 8)))
    rows = [[7, 8, 9], [1, -1, -1], [0, 5, -1]]
    assert dataset.targets.tolist() == rows
    _, label = dataset[0]
    assert label.dtype == torch.int64
    assert label.tolist() == rows[0]
    batch = dataset.__getitems__([2, 0])
    assert batch.labels.tolist() == [rows[2], rows[0]]
    assert [row.tolist() for _, row in batch] == [rows[2], rows[0]]
    images, labels = next(iter(TorchLoader(dataset, batch_size=3)))
    assert labels.tolist() == rows
    assert images.shape == (3, 3, 8, 8)


def test_a_target_transform_gets_each_label(store_path: Path, several_labels_path: Path) -> None:
    """It is called with the int (or the row of labels), and what it returns is the label."""
    dataset = ImageDataset(store_path, Resize((8, 8)), lambda label: f"class {label}" if type(label) is int else "no")
    assert dataset[5][1] == "class 1"
    assert [label for _, label in dataset.__getitems__([0, 11])] == ["class 0", "class 2"]
    assert fastload.collate(dataset.__getitems__([0, 11]))[1] == ("class 0", "class 2")
    several = ImageDataset(several_labels_path, Resize((8, 8)), lambda row: int(row.sum()))
    assert [label for _, label in several.__getitems__([0, 1])] == [24, -1]


# --- image types and foreign callables


def test_image_types(store_path: Path, files: list[Path]) -> None:
    """The same pixels as a tensor, as an array (height, width, 3) and as a Pillow image."""
    expected = upright(files[6])
    tensor, array, image = (ImageDataset(store_path, image_type=name)[6][0] for name in ("tensor", "numpy", "pil"))
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(array, np.ndarray)
    assert isinstance(image, Image.Image)
    assert array.dtype == np.uint8
    assert image.mode == "RGB"
    for got in (as_array(tensor), array, np.asarray(image)):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("image_type", "foreign", "plain"),
    [
        ("tensor", lambda t: t.float().flip(-1) / 2, lambda a: np.transpose(a[:, ::-1] / np.float32(2), (2, 0, 1))),
        ("numpy", lambda a: a[::-1].astype(np.int32), lambda a: a[::-1].astype(np.int32)),
        ("pil", lambda i: np.asarray(i.convert("L")), lambda a: np.asarray(Image.fromarray(a).convert("L"))),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_foreign_callables_get_the_picture(
    store_path: Path, image_type: Any, foreign: Callable[[Any], Any], plain: Callable[[Pixels], Any], alone: bool
) -> None:
    """Any callable gets the picture in the type asked for, after fastload's own transforms, once for each sample."""
    ours = [] if alone else [CenterCrop((20, 30))]
    dataset = ImageDataset(store_path, foreign if alone else Compose([*ours, foreign]), image_type=image_type)
    pictures = ImageDataset(store_path, Compose(ours), image_type="numpy")
    batch = dataset.__getitems__([1, 7, 10])
    for index, (got, _) in zip((1, 7, 10), batch, strict=True):
        assert np.array_equal(np.asarray(got), plain(pictures[index][0]))
        assert np.array_equal(np.asarray(got), np.asarray(dataset[index][0]))


def test_foreign_callables_may_change_the_picture_in_place(store_path: Path) -> None:
    """A picture belongs to the callable that gets it: neither the store nor the cache is changed."""

    def spoil(image: torch.Tensor) -> torch.Tensor:
        return image.fill_(1)

    dataset = ImageDataset(store_path, spoil, cache="1MB")
    assert int(dataset[0][0].sum()) == int(dataset[0][0].numel())
    dataset.transform = Compose([])
    assert torch.equal(dataset[0][0], ImageDataset(store_path)[0][0])


def test_normalize_is_applied_to_the_batch(store_path: Path) -> None:
    """(x / 255 - mean) / std in float32, the same in a batch, alone, and behind a foreign callable."""
    crop, normalize = CenterCrop((20, 30)), Normalize(MEAN, STD)
    pictures = ImageDataset(store_path, crop).__getitems__([1, 7]).images
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (pictures.double() / 255 - mean) / std
    dataset = ImageDataset(store_path, Compose([crop, normalize]))
    batch = dataset.__getitems__([1, 7])
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(batch.images.double(), expected, atol=1e-5)
    assert torch.equal(dataset[7][0], batch.images[1])
    behind = ImageDataset(store_path, Compose([crop, torch.clone, normalize]))
    assert torch.equal(behind[7][0], batch.images[1])


# --- randomness


def test_pictures_depend_on_seed_epoch_and_index_alone(store_path: Path) -> None:
    """The same three give the same picture in any batch and order; another seed or epoch gives another."""
    dataset = ImageDataset(store_path, train_transform(), seed=3)
    first = fresh(dataset, range(12))
    batch = dataset.__getitems__(list(range(11, -1, -1)))
    assert torch.equal(batch.images.flip(0), first[0])
    assert torch.equal(fresh(ImageDataset(store_path, train_transform(), seed=3), range(12))[0], first[0])
    dataset.set_epoch(1)
    second = fresh(dataset, range(12))[0]
    other = fresh(ImageDataset(store_path, train_transform(), seed=4), range(12))[0]
    for different in (second, other):
        assert not any(torch.equal(one, two) for one, two in zip(different, first[0], strict=True))
    dataset.set_epoch(0)
    assert_same_batch(fresh(dataset, range(12)), first)


def test_global_generators_do_not_matter(store_path: Path) -> None:
    """Pictures neither depend on torch's generator nor advance it."""
    dataset = ImageDataset(store_path, train_transform())
    first = fresh(dataset, range(12))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_same_batch(fresh(dataset, range(12)), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pictures_are_the_same_for_any_number_of_threads(store_path: Path, workers: int) -> None:
    """fastload's loader with no thread, one or three gives what reading one by one gives, epoch by epoch."""
    dataset = ImageDataset(store_path, train_transform(), seed=1)
    loader = fastload.DataLoader(dataset, batch_size=5, num_workers=workers)
    plain = ImageDataset(store_path, train_transform(), seed=1)
    for epoch in range(2):
        plain.set_epoch(epoch)
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        for start, batch in zip((0, 5, 10), batches, strict=True):
            assert_same_batch(batch, fresh(plain, range(start, min(start + 5, 12))))


@pytest.mark.parametrize("method", ["none", "fork", "spawn", "forkserver"])
def test_torchs_own_loader_gives_the_same(store_path: Path, tmp_path: Path, method: str) -> None:
    """Stock DataLoader, without workers or with two processes of any kind that live for two epochs.

    Pictures are the same as everywhere, `set_epoch` reaches the live workers, and the failure that they meet is
    counted here.
    """
    dataset = ImageDataset(damage(store_path, tmp_path / "damaged.lmdb", BAD), train_transform(), seed=1)
    plain = ImageDataset(dataset.store.path, train_transform(), seed=1)
    assert dataset[0][1] == 0, "the store is open here before any process starts"
    processes = {} if method == "none" else {"multiprocessing_context": method, "persistent_workers": True}
    loader = TorchLoader(dataset, batch_size=5, num_workers=2 if processes else 0, **processes)
    for epoch in (0, 4):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        batches = list(loader)
        for start, batch in zip((0, 5, 10), batches, strict=True):
            assert_same_batch(batch, fresh(plain, range(start, min(start + 5, 12))))
    assert list(dataset.failures) == [BAD]
    assert "checksum mismatch" in dataset.failures[BAD]


def test_epochs_count_from_zero(store_path: Path) -> None:
    """The epoch can be read and set; a negative one is refused."""
    dataset = ImageDataset(store_path)
    assert dataset.epoch == 0
    dataset.set_epoch(7)
    assert dataset.epoch == 7
    with pytest.raises(ValueError, match="epoch is -1; it counts from 0"):
        dataset.set_epoch(-1)
    assert dataset.epoch == 7


# --- read


def test_read_gives_the_upright_image(turned_path: Path) -> None:
    """All eight orientations whole, untouched by the transform, by negative index too."""
    dataset = ImageDataset(turned_path, train_transform())
    for orientation in range(1, 9):
        expected = upright(turned_path.parent / f"{orientation}.jpg")
        assert np.array_equal(as_array(dataset.read(orientation - 1)), expected)
        assert np.array_equal(as_array(dataset.read(orientation - 9)), expected)
        assert np.array_equal(as_array(ImageDataset(turned_path, cache="1MB").read(orientation - 1)), expected)


@pytest.mark.parametrize("cache", [None, "1MB"])
def test_read_gives_regions_of_the_upright_image(turned_path: Path, cache: str | None) -> None:
    """A region (x, y, width, height) is cut from what a viewer shows, whatever the orientation."""
    dataset = ImageDataset(turned_path, cache=cache)
    for orientation in range(1, 9):
        whole = upright(turned_path.parent / f"{orientation}.jpg")
        height, width = whole.shape[:2]
        for x, y, w, h in ((3, 5, 11, 7), (0, 0, 1, 1), (width - 4, height - 9, 4, 9), (0, 0, width, height)):
            region = dataset.read(orientation - 1, (x, y, w, h))
            assert np.array_equal(as_array(region), whole[y : y + h, x : x + w])


@pytest.mark.parametrize(
    "region", [(0, 0, 0, 5), (0, 0, 5, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (52, 0, 5, 5), (0, 0, 5, 41)]
)
def test_read_refuses_regions_outside_the_image(turned_path: Path, region: tuple[int, int, int, int]) -> None:
    """The message names the region and the image's size."""
    with pytest.raises(ValueError, match=r"is not inside image 0, 56 x 40 \(width x height\)"):
        ImageDataset(turned_path).read(0, region)


def test_read_refuses_indices_out_of_range(turned_path: Path) -> None:
    """As indexing does."""
    for index in (8, -9):
        with pytest.raises(IndexError):
            ImageDataset(turned_path).read(index)


def test_read_raises_whatever_on_error_says(damaged_path: Path) -> None:
    """A damaged image is an error here, since the caller asked for this one."""
    for on_error in ("placeholder", "skip", "raise"):
        dataset = ImageDataset(damaged_path, on_error=on_error)
        with pytest.raises(ChecksumError):
            dataset.read(BAD)
        assert dataset.read(BAD + 1).shape[0] == 3


# --- tiles

SAMPLINGS = ("444", "422", "420", "440", "411", "gray")


def turned_jpeg(pixels: Pixels, sampling: str, orientation: int, progressive: bool) -> bytes:
    """A JPEG with an EXIF orientation; Pillow writes no 4:4:0 and 4:1:1, simplejpeg no progressive files."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if sampling in ("440", "411"):
        data = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling=sampling)
        segment = exif.tobytes()
        return bytes(data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    file = io.BytesIO()
    image = Image.fromarray(pixels).convert("L" if sampling == "gray" else "RGB")
    options = {} if sampling == "gray" else {"subsampling": SAMPLINGS.index(sampling)}
    image.save(file, "JPEG", quality=90, exif=exif, progressive=progressive, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def samplings_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in six samplings and eight orientations, `tiled.lmdb` and `whole.lmdb` beside it."""
    root = tmp_path_factory.mktemp("samplings")
    (root / "images").mkdir()
    for number, (sampling, orientation) in enumerate(itertools.product(SAMPLINGS, range(1, 9))):
        pixels = picture(190 + 3 * number % 40, 240 + 7 * number % 50, seed=number)
        data = turned_jpeg(pixels, sampling, orientation, progressive=number % 3 == 1)
        (root / "images" / f"{sampling} {orientation}.jpg").write_bytes(data)
    fastload.pack(root / "images", root / "tiled.lmdb")
    fastload.pack(root / "images", root / "whole.lmdb", tiles=False)
    return root


@pytest.fixture(scope="session")
def shown(samplings_path: Path) -> list[Pixels]:
    """What a viewer shows of them, in index order."""
    return [upright(path) for path in sorted((samplings_path / "images").iterdir())]


def test_pack_cuts_every_sampling_into_tiles_and_none_if_told_so(samplings_path: Path) -> None:
    """Else the tests below would compare a store with itself."""
    tiled, whole = (Store(samplings_path / name) for name in ("tiled.lmdb", "whole.lmdb"))
    assert len(tiled) == len(whole) == 48
    for index in range(48):
        image = tiled[index]["image"]
        assert tiles.splice(image, Box(image.width - 5, 3, 4, 4)) is not None
        assert len(whole[index]["image"].tiles) == 0
    assert set(np.asarray(tiled.columns["tiles"]).tolist()) == {tiles.RECUT}
    assert set(np.asarray(whole.columns["tiles"]).tolist()) == {tiles.OFF}


@pytest.fixture(scope="session")
def tiled_and_whole(samplings_path: Path) -> list[ImageDataset]:
    """The two stores as datasets, untransformed."""
    return [ImageDataset(samplings_path / name) for name in ("tiled.lmdb", "whole.lmdb")]


@settings(deadline=None, max_examples=300)
@given(index=st.integers(0, 47), data=st.data())
def test_any_region_of_any_jpeg_is_cut_from_what_a_viewer_shows(
    tiled_and_whole: list[ImageDataset], shown: list[Pixels], index: int, data: st.DataObject
) -> None:
    """Bit for bit, whichever sampling, orientation and position, with tiles and without; and so is the whole."""
    height, width = shown[index].shape[:2]
    w, h = data.draw(st.integers(1, width) | st.integers(1, 30)), data.draw(st.integers(1, height) | st.integers(1, 30))
    x, y = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
    for dataset in tiled_and_whole:
        assert np.array_equal(as_array(dataset.read(index, (x, y, w, h))), shown[index][y : y + h, x : x + w])


def test_whole_images_are_what_a_viewer_shows(tiled_and_whole: list[ImageDataset], shown: list[Pixels]) -> None:
    """All samplings and orientations, re-cut or not, without a region and as untransformed samples."""
    for dataset, (index, expected) in itertools.product(tiled_and_whole, enumerate(shown)):
        assert np.array_equal(as_array(dataset.read(index)), expected)
        assert np.array_equal(as_array(dataset[index][0]), expected)


@pytest.mark.parametrize("scaled_decode", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        [RandomResizedCrop(20), RandomHorizontalFlip()],
        [RandomResizedCrop((90, 70)), RandomHorizontalFlip()],
        [RandomHorizontalFlip(), RandomResizedCrop(13, scale=(0.5, 1.0))],
        [Resize(64), CenterCrop(56)],
        [Resize(150), CenterCrop(40), RandomHorizontalFlip()],
        [CenterCrop(50)],
        [CenterCrop(300)],
        [CenterCrop((96, 101)), RandomResizedCrop(20)],
        [Resize(100), RandomResizedCrop(24)],
        [Resize((17, 30))],
    ],
    ids=repr,
)
def test_tiles_change_no_picture(samplings_path: Path, transform: list[Any], scaled_decode: bool) -> None:
    """Every transform gives the same bits from a store with tiles and from one without, epoch by epoch."""
    tiled, whole = (
        ImageDataset(samplings_path / name, Compose(transform), scaled_decode=scaled_decode)
        for name in ("tiled.lmdb", "whole.lmdb")
    )
    for epoch in range(2):
        batches = []
        for dataset in (tiled, whole):
            dataset.set_epoch(epoch)
            batches.append(dataset.__getitems__(range(48)))
        assert_same_batch(*((batch.images, batch.labels) for batch in batches))
    assert not tiled.failures
    assert not whole.failures


@pytest.mark.parametrize("workers", [0, 3])
def test_tiles_are_read_by_any_number_of_threads(samplings_path: Path, workers: int) -> None:
    """fastload's loader gives what reading one by one from whole JPEGs gives: no thread disturbs another's buffers."""
    tiled, plain = (
        ImageDataset(samplings_path / name, train_transform(), seed=2) for name in ("tiled.lmdb", "whole.lmdb")
    )
    for epoch, batches in enumerate([fastload.DataLoader(tiled, batch_size=24, num_workers=workers)] * 3):
        plain.set_epoch(epoch)
        for start, batch in zip((0, 24), batches, strict=True):
            assert_same_batch(batch, fresh(plain, range(start, start + 24)))


def photo(height: int, width: int, seed: int) -> Pixels:
    """Detail at every scale, as strong as in photographs: amplitudes fall with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    colours = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        colours.append(np.fft.irfft2(phases / frequency**1.2, (height, width)))
    image = np.stack(colours, -1)
    shared = image.mean(2, keepdims=True) * 2 + image * 0.5  # brightness varies more than colour
    return np.clip(128 + 50 * shared / shared.std(), 0, 255).astype(np.uint8)


def psnr(one: Any, other: Any) -> float:
    error = np.mean((np.asarray(one).astype(float) - np.asarray(other)) ** 2)
    return float("inf") if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(scope="session")
def photos_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six large photograph-like JPEGs, of several samplings and orientations."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    for number, (sampling, orientation) in enumerate(zip(SAMPLINGS, (1, 6, 3, 8, 1, 5), strict=True)):
        size = (904, 1208) if number % 2 else (901, 1203)
        data = turned_jpeg(photo(*size, seed=number), sampling, orientation, progressive=number == 1)
        (root / "images" / f"{number}.jpg").write_bytes(data)
    fastload.pack(root / "images", root / "photos.lmdb")
    return root / "photos.lmdb"


@pytest.mark.parametrize(
    "transform",
    [
        [RandomResizedCrop(224), RandomHorizontalFlip()],
        [RandomResizedCrop(64), RandomHorizontalFlip()],
        [RandomResizedCrop(24, scale=(0.3, 1.0))],
        [RandomResizedCrop((90, 40))],
        [Resize(256), CenterCrop(224)],
        [Resize(96), CenterCrop(80)],
        [Resize((401, 399))],
    ],
    ids=repr,
)
def test_reduced_reads_look_like_full_ones(photos_path: Path, transform: list[Any]) -> None:
    """No picture is further than 34 dB from what full decoding gives, and some differ: reductions were used."""
    scaled, full = (ImageDataset(photos_path, Compose(transform), scaled_decode=on) for on in (True, False))
    values = []
    for epoch in range(4):
        for dataset in (scaled, full):
            dataset.set_epoch(epoch)
        values += [psnr(scaled[index][0], full[index][0]) for index in range(6)]
    assert min(values) >= 34
    assert min(values) < float("inf")


def test_what_is_not_resized_is_never_reduced(photos_path: Path) -> None:
    """Whole pictures and plain crops of any size are decoded in full, whatever `scaled_decode` says."""
    for transform in (None, CenterCrop(500), RandomHorizontalFlip(1.0)):
        scaled, full = (ImageDataset(photos_path, transform, scaled_decode=on) for on in (True, False))
        assert torch.equal(scaled[1][0], full[1][0])


def test_damage_beside_a_crop_does_not_disturb_it(tmp_path: Path) -> None:
    """Of a re-cut JPEG only what a picture needs is checked: a flipped bit elsewhere goes unnoticed, one inside not."""
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(800, 900, seed=1)).save(tmp_path / "images" / "0.jpg", quality=95)
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    image = Store(tmp_path / "db.lmdb")[0]["image"]
    payload = bytes(image.payload)
    assert len(payload) > 10 * tiles.PIECE
    expected = ImageDataset(tmp_path / "db.lmdb", CenterCrop(100))[0]

    def with_flipped(place: int, name: str, value: bytes = payload) -> Path:
        changed = value[:place] + bytes([value[place] ^ 4]) + value[place + 1 :]
        return patched(tmp_path / "db.lmdb", tmp_path / name, {value: changed})

    for place, beside in ((len(payload) - 9000, (400, 700, 100, 100)), (2 * tiles.PIECE + 9, (0, 20, 900, 300))):
        outside = with_flipped(place, f"outside{place}.lmdb")
        crop, everything = ImageDataset(outside, CenterCrop(100)), ImageDataset(outside)
        assert torch.equal(crop[0][0], expected[0])
        assert crop[0][1] == -1
        assert not crop.failures
        assert torch.equal(crop.read(0, (400, 350, 100, 100)), expected[0])
        assert everything[0][1] == -100
        assert "checksum mismatch" in everything.failures[0]
        with pytest.raises(ChecksumError):
            everything.read(0, beside)
        cached = ImageDataset(outside, CenterCrop(100), cache="10MB")
        assert cached[0][1] == -100, "a cache holds whole images, so the whole is checked"

    inside = ImageDataset(with_flipped(len(payload) // 2, "inside.lmdb"), CenterCrop(100))
    image, label = inside[0]
    assert (label, int(image.sum())) == (-100, 0)
    assert "checksum mismatch" in inside.failures[0]
    assert inside.read(0, (0, 0, 50, 50)).any()

    header = ImageDataset(with_flipped(payload.index(b"\xff\xdb") + 9, "header.lmdb"), on_error="raise")
    for region in ((0, 0, 8, 8), (400, 350, 100, 100), (892, 792, 8, 8)):
        with pytest.raises(ChecksumError):
            header.read(0, region)

    index = bytes(Store(tmp_path / "db.lmdb")[0]["image"].tiles)
    for place in (0, 14, 20, len(index) // 2, len(index) - 1):
        damaged = ImageDataset(with_flipped(place, f"index{place}.lmdb", index), CenterCrop(100))
        assert damaged[0][1] == -100
        assert "head was altered" in damaged.failures[0]


# --- cache


@pytest.mark.parametrize("cache", ["1MB", "20kB", 20_000, ImageCache("20kB", "pin")])
def test_a_cache_changes_no_picture(store_path: Path, turned_path: Path, cache: Any) -> None:
    """Whatever its size and policy, in every epoch pictures are those without a cache, decoded at full size."""
    for path in (store_path, turned_path):
        cached = ImageDataset(path, train_transform(), cache=cache)
        plain = ImageDataset(path, train_transform(), scaled_decode=False)
        for epoch in range(3):
            for dataset in (cached, plain):
                dataset.set_epoch(epoch)
            indices = list(range(len(plain)))
            assert_same_batch(fresh(cached, indices), fresh(plain, indices))
        if isinstance(cache, ImageCache):
            cache = ImageCache("20kB", "pin")


@pytest.mark.parametrize("scaled_decode", [False, True])
def test_hits_and_misses_show_the_same(store_path: Path, scaled_decode: bool) -> None:
    """A cached image is whole, so pictures don't depend on what happens to be cached, reduced reads or not."""
    transform = train_transform(10)
    small, large = (
        ImageDataset(store_path, transform, cache=size, scaled_decode=scaled_decode) for size in ("20kB", "1MB")
    )
    fresh(large, range(12))
    expected = fresh(ImageDataset(store_path, transform, scaled_decode=False), range(12))
    for indices in (range(12), range(11, -1, -1)):
        for dataset in (small, large):
            got = fresh(dataset, indices)
            assert_same_batch(got, [values[list(indices)] for values in expected])
    assert large.cache is not None
    assert small.cache is not None
    assert (large.cache.misses, large.cache.hits) == (12, 24)
    assert small.cache.misses > 12
    assert small.cache.hits > 0


def test_a_cache_that_holds_everything_decodes_once(store_path: Path) -> None:
    """Each image is decoded in the first epoch and found in all others."""
    dataset = ImageDataset(store_path, train_transform(), cache="1MB")
    for _ in range(3):
        fresh(dataset, range(12))
    assert dataset.cache is not None
    assert (dataset.cache.misses, dataset.cache.hits) == (12, 24)
    sizes = np.asarray(dataset.store.columns["size"]).astype(int)
    assert dataset.cache.nbytes == int(sizes.prod(axis=1).sum()) * 3


def test_a_damaged_sample_is_not_cached(damaged_path: Path) -> None:
    """What failed is tried again, and the others are kept."""
    dataset = ImageDataset(damaged_path, Resize((8, 8)), cache="1MB")
    for _ in range(2):
        assert dataset.__getitems__(list(range(12))).labels[BAD] == -100
    assert dataset.cache is not None
    assert len(dataset.cache) == 11
    assert dataset.cache.get(BAD) is None


# --- damage


def test_a_damaged_sample_is_a_placeholder(damaged_path: Path, store_path: Path, caplog: Any) -> None:
    """By default it is black with the label that losses ignore; the batch is otherwise whole; one log line says why."""
    dataset = ImageDataset(damaged_path, train_transform())
    for _ in range(2):
        batch = dataset.__getitems__(list(range(12)))
        expected = fresh(ImageDataset(store_path, train_transform()), range(12))
        expected[0][BAD], expected[1][BAD] = 0, -100
        assert_same_batch((batch.images, batch.labels), expected)
    assert list(dataset.failures) == [BAD]
    assert "checksum mismatch" in dataset.failures[BAD]
    assert [record.levelno for record in caplog.records if record.name == "fastload"] == [logging.WARNING]
    assert dataset.targets[BAD] == 1, "the store's labels stay as they are"


def test_a_placeholder_hides_what_the_buffer_held(damaged_path: Path) -> None:
    """Memory is used again, so a placeholder has to be written, not assumed."""
    dataset = ImageDataset(damaged_path, Resize((8, 8)))
    for _ in range(3):
        assert int(dataset[0][0].sum()) > 0
        assert int(dataset[BAD][0].sum()) == 0


def test_a_placeholders_label_is_not_transformed(damaged_path: Path) -> None:
    """A table of labels by class need not know -100."""
    table = {0: 10, 1: 11, 2: 12}
    dataset = ImageDataset(damaged_path, Resize((8, 8)), table.__getitem__)
    assert [label for _, label in dataset.__getitems__([4, BAD, 11])] == [11, -100, 12]


def test_a_placeholder_of_several_labels(several_labels_path: Path, tmp_path: Path) -> None:
    """Every label of its row is -100."""
    dataset = ImageDataset(damage(several_labels_path, tmp_path / "damaged.lmdb", 1), Resize((8, 8)))
    assert dataset.__getitems__([0, 1]).labels.tolist() == [[7, 8, 9], [-100, -100, -100]]


def test_a_placeholder_of_an_untransformed_picture_has_its_size(damaged_path: Path, store_path: Path) -> None:
    """The store knows the size of what it can't decode."""
    image, label = ImageDataset(damaged_path)[BAD]
    assert label == -100
    assert image.shape == ImageDataset(store_path)[BAD][0].shape
    assert int(image.sum()) == 0


def test_skip_gives_another_sample(damaged_path: Path, store_path: Path) -> None:
    """In its place comes another sample, picture and label, always the same for (seed, epoch, index)."""
    whole = ImageDataset(store_path, train_transform())
    chosen = []
    for epoch in range(6):
        dataset = ImageDataset(damaged_path, train_transform(), on_error="skip")
        for each in (dataset, whole):
            each.set_epoch(epoch)
        image, label = dataset[BAD]
        batch = dataset.__getitems__([0, BAD])
        assert torch.equal(batch.images[1], image)
        assert int(batch.labels[1]) == label
        (other,) = (i for i in range(12) if torch.equal(whole[i][0], image))
        assert label == whole[other][1] == other // 4
        assert list(dataset.failures) == [BAD]
        chosen.append(other)
    assert BAD not in chosen
    assert len(set(chosen)) > 1, "the choice depends on the epoch"


def test_skip_needs_another_sample_of_the_same_size(damaged_path: Path) -> None:
    """Where no picture has the size that the batch needs, the message says so."""
    dataset = ImageDataset(damaged_path, on_error="skip")
    with pytest.raises(TooManyFailures, match=f"sample {BAD} failed, and so did 100 others .* other sizes"):
        dataset[BAD]


def test_skip_passes_over_other_damaged_samples(store_path: Path, tmp_path: Path) -> None:
    """With eleven of twelve damaged, every sample is the one that is whole; all are listed."""
    bad = [index for index in range(12) if index != 7]
    path = damage(store_path, tmp_path / "damaged.lmdb", *bad)
    dataset = ImageDataset(path, Resize((8, 8)), on_error="skip")
    batch = dataset.__getitems__(list(range(12)))
    assert all(torch.equal(image, batch.images[7]) for image in batch.images)
    assert batch.labels.tolist() == [1] * 12
    assert list(dataset.failures) == bad


def test_raise_names_the_sample(damaged_path: Path) -> None:
    """The error says index, name and reason, and has the cause; others can still be read."""
    dataset = ImageDataset(damaged_path, train_transform(), on_error="raise")
    for read in (lambda: dataset[BAD], lambda: dataset.__getitems__([0, BAD])):
        with pytest.raises(DecodeError, match=r"sample 5 \(bee/1\.jpg\): .*checksum mismatch") as caught:
            read()
        assert isinstance(caught.value.__cause__, ChecksumError)
    assert dataset[BAD + 1][1] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_reaches_the_user_of_torchs_loader(damaged_path: Path, workers: int) -> None:
    """The type and the sample survive the way out of a worker process."""
    loader = TorchLoader(ImageDataset(damaged_path, train_transform(), on_error="raise"), 4, num_workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(DecodeError, match=r"sample 5 \(bee/1\.jpg\)"):
        next(batches)
    stop_processes(batches)


@pytest.mark.parametrize(
    ("max_failures", "allowed"), [(None, 3), (3, 3), (2, 2), (0, 0), (0.25, 3), (0.2, 2), (0.01, 0), (1.0, 3), (1, 1)]
)
def test_max_failures_is_a_count_or_a_share(
    store_path: Path, tmp_path: Path, max_failures: float | None, allowed: int
) -> None:
    """An int allows as many samples, a float that share of the twelve; one more is TooManyFailures."""
    path = damage(store_path, tmp_path / "damaged.lmdb", 2, 5, 8)
    dataset = ImageDataset(path, Resize((8, 8)), max_failures=max_failures)
    for failed, index in enumerate((2, 5, 8)):
        assert len(dataset.failures) == failed
        if failed == allowed:
            with pytest.raises(TooManyFailures, match=f"{failed + 1} samples failed, max_failures allows {allowed}"):
                dataset[index]
            return
        for _ in range(2):
            assert dataset[index][1] == -100
    assert allowed == 3


def test_max_failures_holds_across_worker_processes(store_path: Path, tmp_path: Path) -> None:
    """Two processes that meet one damaged sample each are together over a limit of one."""
    dataset = ImageDataset(damage(store_path, tmp_path / "d.lmdb", 0, 11), Resize((8, 8)), max_failures=1)
    batches = iter(TorchLoader(dataset, batch_size=6, num_workers=2))
    with pytest.raises(TooManyFailures, match="2 samples failed, max_failures allows 1"):
        list(batches)
    stop_processes(batches)


def test_a_record_that_lies_about_its_size_is_an_error(store_path: Path, tmp_path: Path) -> None:
    """A size that the size column contradicts, or that the JPEG does, is never a picture of other memory."""
    store = Store(store_path)
    (field, name), value = record.parse(store.view(BAD)), bytes(store.view(BAD))
    column = np.asarray(store.columns["size"])
    upright_height, upright_width = column[BAD].tolist()
    assert (field.height, field.width) == (upright_width, upright_height), "the sample is stored turned"
    liar = record.build([field._replace(width=field.width + 8), name])
    sizes = column.copy()
    sizes[BAD, 0] += 8
    lies = {
        "record": ({value: liar}, StoreError, "the size column"),
        "column": ({column.tobytes(): sizes.tobytes()}, StoreError, "the size column"),
        "both": ({value: liar, column.tobytes(): sizes.tobytes()}, DecodeError, "JPEG"),
    }
    for who, (changes, cause, words) in lies.items():
        path = patched(store_path, tmp_path / f"{who}.lmdb", changes)
        with pytest.raises(DecodeError, match=rf"sample 5.*{words}") as caught:
            ImageDataset(path, on_error="raise")[BAD]
        assert isinstance(caught.value.__cause__, cause)
        assert ImageDataset(path, Resize((8, 8))).__getitems__([4, BAD]).labels.tolist() == [1, -100]


def with_sizes(source: Path, copy: Path, size: tuple[int, int]) -> Path:
    """A copy of a store that says of sample 5 that it has this size."""
    column = np.asarray(Store(source).columns["size"])
    sizes = column.copy()
    sizes[BAD] = size
    return patched(source, copy, {column.tobytes(): sizes.tobytes()})


def test_a_size_that_raw_images_do_not_have_is_an_error(raw_store_path: Path, tmp_path: Path) -> None:
    """The size column says how an image is cropped: one that contradicts the column of images is a bad sample."""
    path = with_sizes(raw_store_path, tmp_path / "db.lmdb", (17, 16))
    for transform in (RandomResizedCrop(8), CenterCrop(16), RandomHorizontalFlip()):
        with pytest.raises(DecodeError, match=r"sample 5.*16 x 16 pixels, the size column says"):
            ImageDataset(path, transform, on_error="raise")[BAD]
    assert ImageDataset(path, CenterCrop(8)).__getitems__([4, BAD]).labels.tolist() == [0, -100]
    with pytest.raises(StoreError, match="the size column says"):
        ImageDataset(path).read(BAD)


@pytest.mark.parametrize("transform", [None, RandomResizedCrop(8)])
def test_no_memory_is_taken_for_a_size_that_is_too_large(store_path: Path, tmp_path: Path, transform: Any) -> None:
    """The size column says so, the record doesn't: a bad sample."""
    dataset = ImageDataset(with_sizes(store_path, tmp_path / "db.lmdb", (4278190088, 4278190088)), transform)
    batch = dataset.__getitems__([4, BAD])
    assert (batch.labels == -100).tolist() == [False, True]
    assert "the size column says otherwise" in dataset.failures[BAD]
    for region in (None, (0, 0, 9, 9)):
        with pytest.raises(StoreError, match="the size column says otherwise"):
            dataset.read(BAD, region)


@pytest.mark.parametrize(("transform", "size"), [(None, 1), (RandomResizedCrop(8), 8)])
def test_images_beyond_max_pixels_are_bad_samples(store_path: Path, transform: Any, size: int) -> None:
    """A stranger's store may have any in a few bytes: none is decoded, and no placeholder is of that size."""
    heights, widths = np.asarray(Store(store_path).columns["size"]).T.astype(int)
    areas = heights * widths
    limit, large = int(np.median(areas)), int(areas.argmax())
    dataset = ImageDataset(store_path, transform, max_pixels=limit)
    sides = f"({widths[large]} x {heights[large]}|{heights[large]} x {widths[large]})"  # as stored
    reason = rf"{sides} pixels are more than the limit of {limit}; max_pixels= "
    for opened in (dataset, pickle.loads(pickle.dumps(dataset))):
        batch = opened.__getitems__(range(len(dataset)))
        assert ((batch.labels == -100).numpy() == (areas > limit)).all()
        assert set(opened.failures) == set(np.flatnonzero(areas > limit).tolist())
        assert re.match(reason, opened.failures[large])
    assert dataset[large][0].shape == (3, size, size)
    for options in ({}, {"region": (0, 0, 9, 9)}, {"reduce": 2}, {"gray": True}):
        with pytest.raises(DecodeError, match=reason):
            dataset.read(large, **options)  # type: ignore[arg-type]
    assert dataset.store.name(large) == Store(store_path)[large].name
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"max_pixels is .*; it must be at least 1"):
            ImageDataset(store_path, max_pixels=wrong)


@pytest.mark.parametrize("transform", [Resize(256), Compose([Resize(256), CenterCrop(224)])])
def test_transforms_that_make_too_much_of_an_image(tmp_path: Path, transform: Any) -> None:
    """A line of pixels that is resized by its shorter side would be some gigabytes: that sample can't be had."""
    (tmp_path / "images").mkdir()
    for name, size in (("column", (1, 20_000)), ("line", (20_000, 1)), ("sound", (30, 20))):
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.png")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", transform)
    assert [dataset[index][1] for index in range(3)] == [-100, -100, -1]
    reason = r"the transform makes \d+ pixels of (1 x 20000|20000 x 1), more than the limit of 268435456; max_pixels= "
    assert all(re.match(reason, dataset.failures[index]) for index in range(2))
    assert 2 not in dataset.failures
    with pytest.raises(DecodeError, match=reason):
        ImageDataset(tmp_path / "db.lmdb", transform, on_error="raise")[0]


@pytest.mark.parametrize("size", [(16, 0), (0, 16), (0, 0)])
def test_a_column_of_sizes_with_zeros_is_damaged(store_path: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    """No plan can be made for such an image; the error is one of the store, not of the arithmetic."""
    dataset = ImageDataset(with_sizes(store_path, tmp_path / "db.lmdb", size), RandomResizedCrop(8))
    with pytest.raises(ColumnError, match="images without pixels"):
        dataset.__getitems__([4, BAD])


def test_a_damaged_head_is_an_error_of_its_sample(store_path: Path, tmp_path: Path) -> None:
    """A record whose own description is damaged fails alone, under no name."""
    value = bytes(Store(store_path).view(BAD))
    path = patched(store_path, tmp_path / "head.lmdb", {value: value[:20] + bytes([value[20] ^ 1]) + value[21:]})
    with pytest.raises(DecodeError, match=r"sample 5: "):
        ImageDataset(path, on_error="raise")[BAD]
    assert ImageDataset(path, Resize((8, 8))).__getitems__([4, BAD, 6]).labels.tolist() == [1, -100, 1]


# --- pickling


def test_a_pickled_dataset_gives_the_same(damaged_path: Path) -> None:
    """Options, epoch, failures and pictures come along; the cache comes empty, and the two count for themselves."""
    dataset = ImageDataset(damaged_path, train_transform(), cache="1MB", seed=5, max_failures=2)
    dataset.set_epoch(3)
    expected = fresh(dataset, range(12))
    other = pickle.loads(pickle.dumps(dataset))
    assert other.cache is not None
    assert (len(other.cache), other.cache.budget) == (0, 1_000_000)
    assert list(other.failures) == [BAD]
    assert other.failures.limit == 2
    assert_same_batch(fresh(other, range(12)), expected)
    other.set_epoch(4)
    assert dataset.epoch == 3
    assert other.classes == dataset.classes
    assert repr(other) == repr(dataset)


# --- raw columns


def test_raw_images_are_exact(raw_store_path: Path) -> None:
    """A store of raw images has a column, and gives the packed pixels, alone and gathered."""
    dataset = ImageDataset(raw_store_path)
    assert "image" in dataset.store.columns
    for index in (0, 17, 39):
        expected = picture(16, 16, seed=100 * (index // 10) + index % 10)
        image, label = dataset[index]
        assert label == index // 10
        for got in (image, dataset.read(index), dataset.__getitems__([3, index]).images[1]):
            assert np.array_equal(as_array(got), expected)


def test_gathering_is_reading_one_by_one(raw_store_path: Path) -> None:
    """The gather of a whole batch gives what the path through plans gives, repeated and negative indices included."""
    gathered = ImageDataset(raw_store_path)
    planned = ImageDataset(raw_store_path, CenterCrop(16))
    indices = [39, 0, 0, -1, 20, -40]
    one, other = gathered.__getitems__(indices), planned.__getitems__(indices)
    assert_same_batch((one.images, one.labels), (other.images, other.labels))
    assert one.images.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(IndexError, match="index 40 is out of range for a dataset of 40"):
        gathered.__getitems__([0, 40])


@pytest.mark.parametrize("image_type", ["tensor", "numpy", "pil"])
def test_raw_images_take_all_transforms(raw_store_path: Path, image_type: Any) -> None:
    """Random crops, foreign callables and all image types work on raw columns as on JPEGs."""

    def copied(image: Any) -> Pixels:
        return np.asarray(image).copy()

    dataset = ImageDataset(raw_store_path, Compose([train_transform(8).transforms[0], copied]), image_type=image_type)
    expected = ImageDataset(raw_store_path, RandomResizedCrop(8), image_type="numpy")
    alone = ImageDataset(raw_store_path, copied, image_type=image_type)
    for index in (0, 25):
        got, whole = dataset[index][0], alone.__getitems__([3, index])[1][0]
        if image_type == "tensor":
            got, whole = got.transpose(1, 2, 0), whole.transpose(1, 2, 0)
        assert np.array_equal(got, expected[index][0])
        assert np.array_equal(whole, picture(16, 16, seed=100 * (index // 10) + index % 10))


def test_raw_images_may_be_changed(raw_store_path: Path) -> None:
    """A picture from a raw column is the user's own: writing to it changes no other and not the store."""
    dataset = ImageDataset(raw_store_path)
    for read in (lambda: dataset[0][0], lambda: dataset.read(0), lambda: dataset.__getitems__([0]).images[0]):
        before = read().clone()
        read().zero_()
        assert torch.equal(read(), before)


def test_raw_batches_are_normalised_whole(raw_store_path: Path) -> None:
    """Normalize on gathered images is the plain formula, and the same as one by one."""
    pictures = ImageDataset(raw_store_path).__getitems__([1, 30]).images
    dataset = ImageDataset(raw_store_path, Normalize(MEAN, STD))
    batch = dataset.__getitems__([1, 30])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose(batch.images.double(), (pictures.double() / 255 - mean) / std, atol=1e-5)
    assert torch.equal(dataset[30][0], batch.images[1])


# --- construction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_type": "array"}, ValueError, "image_type is 'array'; it may be tensor, numpy, pil"),
        ({"on_error": "ignore"}, ValueError, "on_error is 'ignore'; it may be placeholder, skip, raise"),
        ({"max_failures": -1}, ValueError, "max_failures is -1; it may be a count, or a share"),
        ({"max_failures": 1.5}, ValueError, "max_failures is 1.5"),
        ({"cache": "4 apples"}, ValueError, "'4 apples' is not a number of bytes"),
        ({"cache": 0}, ValueError, "a cache of 0 bytes holds nothing"),
        ({"cache": 4e6}, TypeError, "cache"),
        ({"transform": 3}, TypeError, "3 is no transform"),
        ({"transform": Normalize(MEAN, STD), "image_type": "numpy"}, (TypeError, ValueError), "tensor"),
    ],
)
def test_wrong_options_are_refused_at_construction(
    store_path: Path, options: dict[str, Any], error: Any, message: str
) -> None:
    """What makes no sense is named before the first sample is read."""
    with pytest.raises(error, match=message):
        ImageDataset(store_path, **options)


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    """A path with nothing there is a FileNotFoundError with that path."""
    with pytest.raises(FileNotFoundError, match="nothing"):
        ImageDataset(tmp_path / "nothing.lmdb")


def test_representation_says_what_it_reads(store_path: Path) -> None:
    """Path, length and transforms."""
    text = repr(ImageDataset(store_path, Resize(8)))
    assert str(store_path) in text
    assert "12 samples" in text
    assert "Resize(8)" in text
