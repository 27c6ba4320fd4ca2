"""Images with masks, from folders to batches: masks stay on their images, and nothing is lost, blended or made up."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from edits import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import small_tiles
from PIL import Image
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import ImageDataset, Store, masks, pack, record, tiles
from fastload.errors import DecodeError, SourceError, TooManyFailures
from fastload.geometry import Plan
from fastload.info import info
from fastload.order import SampleRandom
from fastload.sources import open_source
from fastload.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomScale,
    Resize,
)
from fastload.unpack import unpack
from fastload.verify import verify

# torch's advice, made for processes, on a machine with fewer cores than a test has threads
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Values = npt.NDArray[Any]

BEYOND = 255
STEP = 60
"""Red of an image is the class of its mask times this, green is full wherever there is an image."""

TWO = (0, 4)
"""Classes that are far apart in red, so that a blurred edge passes no third one."""

PLAIN = 0
"""EXIF orientation 0 stands for a file without EXIF data."""


def regions(height: int, width: int, seed: int = 0, classes: int = 4, cell: int = 16) -> Values:
    """A mask of squares, each of one class; those at the right and lower edge are larger, never a thin strip."""
    coarse = np.random.default_rng(seed).integers(0, classes, (height // cell, width // cell), np.uint8)
    coarse[0, 0], coarse[-1, -1] = classes - 1, 0
    squares = np.kron(coarse, np.ones((cell, cell), np.uint8))
    return np.pad(squares, [(0, height % cell), (0, width % cell)], mode="edge")


def shows(mask: Values) -> Values:
    """The image of a mask."""
    blue = np.broadcast_to(np.linspace(0, 255, mask.shape[1]), mask.shape)
    return np.dstack([mask * STEP, np.full(mask.shape, 255), blue]).astype(np.uint8)


def stored_as(image: Values, orientation: int) -> Image.Image:
    """The picture that an EXIF orientation turns into `image`."""
    way = Image.Transpose
    back = {2: way.FLIP_LEFT_RIGHT, 3: way.ROTATE_180, 4: way.FLIP_TOP_BOTTOM, 5: way.TRANSPOSE}
    back |= {6: way.ROTATE_90, 7: way.TRANSVERSE, 8: way.ROTATE_270}
    picture = Image.fromarray(image)
    return picture.transpose(back[orientation]) if orientation in back else picture


def write_pair(
    folder: Path, name: str, mask: Values, suffix: str = "png", orientation: int = PLAIN, image: Values | None = None
) -> None:
    """An image and its mask below `folder`, in images/ and masks/."""
    file = folder / "images" / f"{name}.{suffix}"
    target = folder / "masks" / f"{name}.png"
    for path in (file, target):
        path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    options = {"quality": 97, "subsampling": 0} if suffix == "jpg" else {}
    stored_as(shows(mask) if image is None else image, orientation).save(file, exif=exif, **options)
    Image.fromarray(mask).save(target)


def array(image: Any) -> Values:
    """An image of any type as (height, width, 3)."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


def assert_aligned(
    image: Any,
    mask: Any,
    exact: bool = False,
    radius: int = 2,
    slivers: float = 0,
    classes: Sequence[int] = (0, 1, 2, 3, 4),
) -> float:
    """Image and mask show the same, exactly, or wherever the mask is of one class for `radius` pixels around.

    classes: what the mask may show; of these the one whose red is nearest. slivers: the share of pixels that may
    differ, where strips are thinner than a pixel of the result, which a mask loses and an image blends in. Returns the
    share of pixels that were compared and lie in the image.
    """
    got, values = array(image), np.asarray(mask).astype(np.int32)
    assert got.shape[:2] == values.shape
    certain = np.ones(values.shape, bool)
    if not exact:
        around, as_float = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8), values.astype(np.float32)
        certain = cv2.erode(as_float, around) == cv2.dilate(as_float, around)
    inside = got[..., 1] > 127
    distances = np.abs(got[..., :1].astype(np.int32) - np.array(classes) * STEP)
    shown = np.where(inside, np.array(classes)[distances.argmin(-1)], BEYOND)
    assert np.mean((shown != values)[certain]) <= slivers if certain.any() else True
    return float((certain & inside).mean())


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of eight PNG images and masks of four classes, of various sizes."""
    root = tmp_path_factory.mktemp("pairs")
    for i in range(8):
        write_pair(root, str(i), regions(80 + 5 * i, 112 - 7 * i, seed=i))
    return root


@pytest.fixture(scope="session")
def stored(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `pairs`."""
    path = tmp_path_factory.mktemp("stores") / "pairs.lmdb"
    report = pack(pairs, path)
    assert (report.samples, report.quarantined, report.notes) == (8, 0, ())
    return path


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three images of the classes `TWO`."""
    root = tmp_path_factory.mktemp("binary")
    for i in range(3):
        write_pair(root, str(i), regions(96 + 11 * i, 130 - 9 * i, seed=i, classes=2, cell=24) * 4)
    pack(root, root / "db.lmdb")
    return root / "db.lmdb"


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six images of one size whose masks have values above 255."""
    root = tmp_path_factory.mktemp("wide")
    for i in range(6):
        mask = regions(40, 50, seed=i)
        write_pair(root, str(i), mask * np.uint16(300), image=shows(mask))
    pack(root, root / "db.lmdb")
    return root / "db.lmdb"


# --- image and mask together


lengths = st.integers(40, 150)
sizes = st.tuples(lengths, lengths)
flips = st.builds(RandomHorizontalFlip, st.sampled_from([0.5, 1.0]))
paddings = st.none() | st.integers(0, 30) | st.tuples(*[st.integers(0, 20)] * 4)
crops = st.builds(lambda size, padding: RandomCrop(size, padding, pad_if_needed=True), sizes, paddings) | st.builds(
    CenterCrop, sizes
)
resizes = st.one_of(
    st.builds(Resize, sizes | lengths | st.tuples(st.none(), lengths) | st.tuples(lengths, st.none())),
    st.just(RandomScale((0.5, 1.5))),
    st.builds(RandomResizedCrop, st.integers(48, 100), st.just((0.3, 1.0))),
)


@settings(deadline=None, max_examples=60)
@given(chain=st.lists(crops | flips, max_size=4), epoch=st.integers(0, 1000), index=st.integers(0, 7))
def test_crops_and_flips_keep_masks_exactly_on_their_images(
    stored: Path, chain: list[Any], epoch: int, index: int
) -> None:
    """Where nothing is resized each pixel of the mask is that of the image; beyond it lies 255."""
    dataset = ImageDataset(stored, Compose(chain))
    dataset.set_epoch(epoch)
    assert_aligned(*dataset[index], exact=True)


@settings(deadline=None, max_examples=80)
@given(
    chain=st.lists(st.one_of(crops, flips, resizes), min_size=1, max_size=4),
    epoch=st.integers(0, 1000),
    index=st.integers(0, 2),
)
def test_any_chain_keeps_masks_on_their_images(binary: Path, chain: list[Any], epoch: int, index: int) -> None:
    """With resizes in any number and order too: the edges of both lie within pixels of each other."""
    size = tuple(Store(binary).columns["size"][index].tolist())
    plans = Compose(chain).plans(size, SampleRandom(0, epoch, index))
    growth = math.prod(max(p.size[0] / p.box.height, p.size[1] / p.box.width, 1) for p in plans)
    dataset = ImageDataset(binary, Compose(chain))
    dataset.set_epoch(epoch)
    image, mask = dataset[index]
    assert set(mask.unique().tolist()) <= {0, 4, BEYOND}
    assert_aligned(image, mask, radius=1 + math.ceil(growth), slivers=0.02, classes=TWO)


@pytest.mark.parametrize(
    "chain",
    [
        [RandomScale((0.5, 1.2)), RandomCrop(64, pad_if_needed=True), RandomHorizontalFlip()],
        [RandomResizedCrop(64, scale=(0.3, 1.0)), RandomHorizontalFlip()],
        [Resize(70), CenterCrop(64)],
        [RandomHorizontalFlip(1.0), Resize((64, 64))],
        [Resize((90, 90)), RandomCrop(80), Resize(64), RandomHorizontalFlip(1.0)],
    ],
)
def test_usual_chains_show_most_of_the_mask(binary: Path, chain: list[Any]) -> None:
    """What the tests above compare is no empty set: more than a third of all pixels in these."""
    dataset = ImageDataset(binary, Compose(chain))
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for image, mask in dataset:
            assert image.shape[1:] == mask.shape == (64, 64)
            assert assert_aligned(image, mask, slivers=0.01, classes=TWO) > 1 / 3


@pytest.mark.parametrize("encode", ["keep", "jpeg", "raw"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_upright_masks_on_turned_images(tmp_path: Path, suffix: str, encode: Any) -> None:
    """An image in each EXIF orientation, its mask drawn on what a viewer shows; tiled where it is a JPEG."""
    for orientation in range(1, 9):
        write_pair(tmp_path, str(orientation), regions(64, 96, seed=orientation), suffix, orientation)
    with small_tiles():
        assert (
            pack(tmp_path, tmp_path / "db.lmdb", encode=encode, quality=97 if encode == "jpeg" else None).samples == 8
        )
    store = Store(tmp_path / "db.lmdb")
    if suffix == "jpg" and encode == "keep":
        assert set(np.asarray(store.columns["tiles"]).tolist()) == {tiles.RECUT}
    assert ("image" in store.columns) == (encode == "raw")
    radius = 0 if suffix == "png" and encode != "jpeg" else 3
    crop = Compose([RandomCrop((40, 56), padding=3), RandomHorizontalFlip()])
    for transform in (None, crop, CenterCrop((40, 50)), Resize((64, 64))):
        dataset = ImageDataset(tmp_path / "db.lmdb", transform)
        exact = radius == 0 and not isinstance(transform, Resize)
        for image, mask in dataset:
            assert_aligned(image, mask, exact=exact, radius=max(radius, 8 if isinstance(transform, Resize) else 0))


def test_tiled_jpegs_whose_squares_are_their_blocks(tmp_path: Path) -> None:
    """Flat blocks survive JPEG: of crops that decode a few tiles only, each pixel matches."""
    for i in range(2):
        mask = regions(160, 240, seed=i)
        write_pair(
            tmp_path, str(i), mask, "jpg", image=np.dstack([mask * STEP, mask * 0 + 255, mask * 0]).astype(np.uint8)
        )
    with small_tiles():
        pack(tmp_path, tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", Compose([RandomCrop((50, 60), padding=7), RandomHorizontalFlip()]))
    assert set(np.asarray(dataset.store.columns["tiles"]).tolist()) == {tiles.RECUT}
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for image, mask in dataset:
            assert_aligned(image, mask, exact=True)


@pytest.mark.parametrize("scaled", [True, False])
def test_images_decoded_at_a_smaller_size(tmp_path: Path, scaled: bool) -> None:
    """DCT scaling reads a half, a quarter or an eighth of the pixels; the mask lies where it lay."""
    for orientation in (1, 3, 6):
        mask = regions(512, 640, seed=orientation, classes=2, cell=96) * 4
        write_pair(tmp_path, str(orientation), mask, "jpg", orientation)
    pack(tmp_path, tmp_path / "db.lmdb")
    dataset = ImageDataset(
        tmp_path / "db.lmdb", Compose([RandomResizedCrop(64), RandomHorizontalFlip()]), scaled_decode=scaled
    )
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for image, mask in dataset:
            assert assert_aligned(image, mask, radius=3, slivers=0.01, classes=TWO) > 0.2
    small = ImageDataset(tmp_path / "db.lmdb", Resize((64, 80)), scaled_decode=scaled)
    for image, mask in small:
        assert_aligned(image, mask, classes=TWO)


@pytest.mark.parametrize("budget", ["50MB", "20KB"])
def test_a_cache_changes_nothing(stored: Path, budget: str) -> None:
    """Images come from the cache, masks from the store: both as without one, in the first epoch and the next."""
    transform = Compose([RandomScale((0.6, 1.4)), RandomCrop(50, pad_if_needed=True), RandomHorizontalFlip()])
    plain, cached = ImageDataset(stored, transform), ImageDataset(stored, transform, cache=budget)
    for epoch in (0, 1, 1):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        assert_same(batch_of(cached, range(8)), batch_of(plain, range(8)))


@pytest.mark.parametrize("encode", ["keep", "raw"])
def test_images_shrunk_while_packing(binary: Path, tmp_path: Path, encode: Any) -> None:
    """`short_side` takes the mask along, by nearest values; repacked from a store as from files."""
    files = binary.parent
    pack(files, tmp_path / "direct.lmdb", short_side=60, encode=encode)
    pack(binary, tmp_path / "again.lmdb", short_side=60, encode=encode)
    direct, again, whole = (ImageDataset(p) for p in (tmp_path / "direct.lmdb", tmp_path / "again.lmdb", binary))
    for (image, mask), (other, other_mask), (_, before) in zip(direct, again, whole, strict=True):
        assert min(mask.shape) == 60
        assert_aligned(image, mask, classes=TWO)
        assert torch.equal(mask, other_mask)
        assert image.shape == other.shape
        assert np.array_equal(mask.numpy(), masks.resized(before.numpy(), tuple(mask.shape)))


@pytest.mark.parametrize("same", [True, False])
def test_raw_images_with_masks(tmp_path: Path, same: bool) -> None:
    """A column of images where they are of one size, raw records where not; whole batches and crops of both."""
    for i in range(5):
        write_pair(tmp_path, str(i), regions(32, 40 if same else 40 + i, seed=i))
    pack(tmp_path, tmp_path / "db.lmdb", encode="raw")
    assert ("image" in Store(tmp_path / "db.lmdb").columns) == same
    for transform in (None, CenterCrop((20, 50)), Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()])):
        dataset = ImageDataset(tmp_path / "db.lmdb", transform)
        for batch in (dataset.__getitems__(range(5)), dataset.__getitems__([3, -1, 0, 3])):
            for image, mask in batch:
                assert_aligned(image, mask, exact=True)


# --- samples and batches


def batch_of(dataset: ImageDataset, indices: Sequence[int]) -> list[torch.Tensor]:
    """[images, masks] of these samples, read one by one and copied."""
    samples = [dataset[index] for index in indices]
    return [torch.stack([image.clone() for image, _ in samples]), torch.stack([mask.clone() for _, mask in samples])]


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


TRAIN = Compose([RandomScale((0.5, 1.5)), RandomCrop(32, pad_if_needed=True), RandomHorizontalFlip()])


def mask_file(store: Path, index: int) -> Values:
    """The mask that was packed as sample `index`."""
    return np.asarray(Image.open(store.parent / "masks" / f"{index}.png"))


def test_a_sample_is_an_image_and_its_mask(stored: Path, pairs: Path, wide: Path) -> None:
    """A tuple: what a viewer shows, and the file's values, as uint8, or as int32 where some are above 255."""
    dataset = ImageDataset(stored)
    assert len(dataset) == 8
    assert dataset.classes is None
    for index in range(8):
        sample = dataset[index]
        assert type(sample) is tuple
        image, mask = sample
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.uint8)
        assert np.array_equal(array(image), np.asarray(Image.open(pairs / "images" / f"{index}.png")))
        assert np.array_equal(mask.numpy(), np.asarray(Image.open(pairs / "masks" / f"{index}.png")))
    dataset = ImageDataset(wide)
    for index in range(6):
        mask = dataset[index][1]
        assert mask.dtype == torch.int32
        assert np.array_equal(mask.numpy(), mask_file(wide, index))
    assert dataset.__getitems__([0, 1]).columns[1].dtype == torch.int32


@pytest.mark.parametrize("transform", [None, CenterCrop((30, 44)), Compose([CenterCrop(20), lambda image: image])])
def test_image_types(wide: Path, transform: Any) -> None:
    """Masks come in the type of the images: tensors, arrays or Pillow images of the same values."""
    tensors = ImageDataset(wide, transform)
    for name, kind in (("tensor", torch.Tensor), ("numpy", np.ndarray), ("pil", Image.Image)):
        dataset = ImageDataset(wide, transform, image_type=name)  # type: ignore[arg-type]
        for sample in (dataset[2], dataset.__getitems__([1, 2])[1], list(dataset.__getitems__([1, 2]))[1]):
            image, mask = sample
            assert isinstance(image, kind)
            assert isinstance(mask, kind)
            assert np.array_equal(np.asarray(mask), tensors[2][1].numpy())
            assert np.array_equal(array(image), array(tensors[2][0]))


@pytest.mark.parametrize("transform", [None, CenterCrop(24), Compose([CenterCrop(24), torch.clone])])
@pytest.mark.parametrize("image_type", ["tensor", "numpy", "pil"])
def test_a_target_transform_gets_each_mask(wide: Path, transform: Any, image_type: Any) -> None:
    """Alone and in batches, of one size or many, with tensors, arrays or images; the picture is not its business."""
    if image_type != "tensor" and transform is not None and transform.__class__ is Compose:
        transform = Compose([CenterCrop(24), np.asarray])
    dataset = ImageDataset(wide, transform, lambda mask: np.asarray(mask).max() + 1000, image_type=image_type)
    plain = ImageDataset(wide, transform, image_type=image_type)
    expected = [np.asarray(plain[index][1]).max() + 1000 for index in range(6)]
    assert [dataset[index][1] for index in range(6)] == expected
    assert [target for _, target in dataset.__getitems__(range(6))] == expected
    if image_type == "tensor":
        images, targets = fastload.collate(dataset.__getitems__(range(6)))
        assert targets.tolist() == expected
        assert torch.equal(images, fastload.collate(plain.__getitems__(range(6)))[0])


def test_normalize_leaves_masks_alone(wide: Path) -> None:
    """As a transform and on the way to the device: images become float, masks stay what they are."""
    mean, std = [0.5] * 3, [0.25] * 3
    crop = CenterCrop(24)
    plain = batch_of(ImageDataset(wide, crop), range(6))
    dataset = ImageDataset(wide, Compose([crop, Normalize(mean, std)]))
    images, values = fastload.collate(dataset.__getitems__(range(6)))
    assert torch.allclose(images, (plain[0] / 255 - 0.5) / 0.25, atol=1e-5)
    assert torch.equal(values, plain[1])


@pytest.mark.parametrize("name", ["stored", "wide"])
@pytest.mark.parametrize("stock", [False, True])
def test_a_device_prefetcher_normalises_images_only(request: pytest.FixtureRequest, name: str, stock: bool) -> None:
    path = request.getfixturevalue(name)
    dataset = ImageDataset(path, CenterCrop(24))
    loader = TorchLoader(dataset, 4) if stock else fastload.DataLoader(dataset, 4)
    plain = batch_of(dataset, range(len(dataset)))
    batches = list(fastload.DevicePrefetcher(loader, "cpu", mean=[0.5] * 3, std=[0.25] * 3))
    images, values = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    assert torch.allclose(images, (plain[0] / 255 - 0.5) / 0.25, atol=1e-5)
    assert values.dtype == plain[1].dtype == (torch.int32 if name == "wide" else torch.uint8)
    assert torch.equal(values, plain[1])


LOADERS: dict[str, Callable[[ImageDataset], Any]] = {
    "main thread": lambda d: fastload.DataLoader(d, 3),
    "threads": lambda d: fastload.DataLoader(d, 3, num_workers=2),
    "processes": lambda d: fastload.DataLoader(d, 3, num_workers=2, worker_type="process"),
    "processes of threads": lambda d: fastload.DataLoader(d, 3, num_workers=1, threads_per_worker=2),
    "stock, main process": lambda d: TorchLoader(d, 3),
    "stock, processes": lambda d: TorchLoader(d, 3, num_workers=2),
    "stock, fastload's collate": lambda d: TorchLoader(d, 3, collate_fn=fastload.collate),
}


@pytest.mark.parametrize("name", ["stored", "wide"])
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_same_whoever_reads_them(request: pytest.FixtureRequest, loader: str, name: str) -> None:
    """[images, masks], whatever the workers, of the values that come one by one."""
    dataset = ImageDataset(request.getfixturevalue(name), TRAIN, seed=5)
    expected = batch_of(dataset, range(len(dataset)))
    batches = list(LOADERS[loader](dataset))
    for batch in batches:
        assert type(batch) is list
        assert batch[0].shape[2:] == batch[1].shape[1:] == (32, 32)
    assert_same([torch.cat([batch[i] for batch in batches]) for i in (0, 1)], expected)


@pytest.mark.parametrize("image_type", ["tensor", "numpy", "pil"])
@pytest.mark.parametrize("name", ["stored", "wide"])
def test_masks_that_are_held_stay_as_they_are(request: pytest.FixtureRequest, name: str, image_type: Any) -> None:
    """The memory of a batch is used again only when nobody holds any mask of it."""
    dataset = ImageDataset(request.getfixturevalue(name), TRAIN, image_type=image_type)
    kept, expected = [], []
    for epoch in range(24):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__([0, 5, 2])
        mask = (batch[0][1], batch.columns[1][1], next(iter(batch))[1])[epoch % 3]
        kept.append(mask)
        expected.append(np.asarray(mask).copy())
        del batch, mask
    for mask, before in zip(kept, expected, strict=True):
        assert np.array_equal(np.asarray(mask), before)
    assert len({before.tobytes() for before in expected}) > 12


def test_sizes_that_differ(stored: Path) -> None:
    """Without a transform batches are lists, images and masks alike, and collating them says what to do."""
    batch = ImageDataset(stored).__getitems__([0, 3, 0])
    assert [len(column) for column in batch.columns] == [3, 3]
    for image, mask in batch:
        assert_aligned(image, mask, exact=True)
    for loader in (
        fastload.DataLoader(ImageDataset(stored), 2),
        fastload.DataLoader(ImageDataset(stored), 2, num_workers=1),
    ):
        with pytest.raises(RuntimeError, match=r"different shapes.*a transform that makes them equal"):
            next(iter(loader))
    whole = fastload.DataLoader(ImageDataset(stored), 2, collate_fn=list)
    assert [mask.shape for batch in whole for _, mask in batch] == [(80 + 5 * i, 112 - 7 * i) for i in range(8)]


def test_an_empty_batch(wide: Path) -> None:
    for transform in (None, CenterCrop(8)):
        assert list(ImageDataset(wide, transform).__getitems__([])) == []


def test_read_gives_the_image_alone(stored: Path) -> None:
    image = ImageDataset(stored, CenterCrop(4)).read(1, (3, 4, 20, 10))
    assert torch.equal(image, ImageDataset(stored)[1][0][:, 4:14, 3:23])


def test_foreign_callables_get_pictures_only(stored: Path) -> None:
    dataset = ImageDataset(stored, Compose([CenterCrop(20), lambda image: image.float() * 0]))
    image, mask = dataset[3]
    assert image.dtype == torch.float32
    assert not image.any()
    assert torch.equal(mask, ImageDataset(stored, CenterCrop(20))[3][1])


def test_a_run_goes_on_anywhere(stored: Path) -> None:
    """Images and masks of the batch after a state was taken are those that the run would have had."""

    def loader() -> Any:
        dataset = ImageDataset(stored, TRAIN)
        return fastload.DataLoader(dataset, 3, sampler=fastload.ShuffleSampler(dataset, seed=2), num_workers=2)

    first = loader()
    whole = list(first)
    for done in (1, 2):
        stopped = loader()
        batches = iter(stopped)
        for _ in range(done):
            next(batches)
        resumed = loader()
        resumed.load_state_dict(stopped.state_dict())
        for got, expected in zip(resumed, whole[done:], strict=True):
            assert_same(got, expected)


def test_the_fingerprint_knows_the_masks(pairs: Path, stored: Path, tmp_path: Path) -> None:
    """Stores of the same images with other masks are told apart, one packed again is not."""
    shutil.copytree(pairs, tmp_path / "pairs")
    pack(tmp_path / "pairs", tmp_path / "same.lmdb")
    Image.fromarray(regions(80, 112, seed=77)).save(tmp_path / "pairs" / "masks" / "0.png")
    pack(tmp_path / "pairs", tmp_path / "other.lmdb")
    same, other = (ImageDataset(tmp_path / f"{name}.lmdb").fingerprint for name in ("same", "other"))
    assert same == ImageDataset(stored).fingerprint
    assert other != same


@pytest.mark.parametrize("train", [True, False])
def test_make_loader_takes_masks(stored: Path, train: bool) -> None:
    """The standard transforms, on the CPU: images and masks that fit, and normalised images if asked for."""
    loader = fastload.make_loader(stored, 4, train=train, size=32, device="cpu", num_workers=1)
    for images, values in loader:
        assert images.shape == (4, 3, 32, 32)
        assert values.shape == (4, 32, 32)
        assert values.dtype == torch.uint8
        for image, mask in zip(images, values, strict=True):
            assert_aligned(image, mask, radius=8 if train else 4, slivers=0.01)


# --- failures


def damaged(source: Path, target: Path, index: int, field: str = "mask") -> Path:
    """A copy of a store in which one bit in the middle of a sample's field is flipped."""
    payload = bytes(Store(source)[index][field].payload)
    data = source.read_bytes()
    assert data.count(payload) == 1
    place = data.index(payload) + len(payload) // 2
    target.write_bytes(data[:place] + bytes((data[place] ^ 16,)) + data[place + 1 :])
    return target


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose masks are noise, each unlike the others."""
    root = tmp_path_factory.mktemp("noisy")
    for i in range(6):
        write_pair(root, str(i), np.random.default_rng(i).integers(0, 5, (40, 50), np.uint8))
    pack(root, root / "db.lmdb")
    return root / "db.lmdb"


@pytest.mark.parametrize("field", ["mask", "image"])
@pytest.mark.parametrize("transform", [None, CenterCrop((40, 60))])
@pytest.mark.parametrize("workers", [None, 2])
def test_a_damaged_sample_is_a_placeholder(
    noisy: Path, tmp_path: Path, field: str, transform: Any, workers: int | None
) -> None:
    """A bit that flips in the file, in image or mask: a black image, a mask of 255, a failure that is listed."""
    dataset = ImageDataset(damaged(noisy, tmp_path / "bad.lmdb", 2, field), transform)
    plain = batch_of(ImageDataset(noisy, transform), range(6))
    for _ in range(2):
        if workers is None:
            images, values = batch_of(dataset, range(6))
        else:
            ((images, values),) = list(fastload.DataLoader(dataset, 6, num_workers=workers))
        assert not images[2].any()
        assert (values[2] == BEYOND).all()
        whole = [0, 1, 3, 4, 5]
        assert_same([images[whole], values[whole]], [plain[0][whole], plain[1][whole]])
    assert list(dataset.failures) == [2]
    assert dataset.failures[2]


def test_a_damaged_sample_is_skipped_or_raised(noisy: Path, tmp_path: Path) -> None:
    """Another sample, image and mask of one, the same each time; or an error that names it; or too many."""
    bad = damaged(noisy, tmp_path / "bad.lmdb", 2)
    plain = ImageDataset(noisy)
    dataset = ImageDataset(bad, on_error="skip")
    image, mask = dataset[2]
    (other,) = [i for i in range(6) if torch.equal(plain[i][1], mask)]
    assert other != 2
    assert torch.equal(plain[other][0], image)
    assert torch.equal(dataset.__getitems__([0, 2]).columns[1][1], mask)
    assert list(dataset.failures) == [2]
    with pytest.raises(DecodeError, match=r"sample 2 \(2.png\).*checksum"):
        ImageDataset(bad, on_error="raise")[2]
    with pytest.raises(TooManyFailures):
        ImageDataset(bad, max_failures=0)[2]


def test_no_bit_of_a_mask_flips_unnoticed(noisy: Path, tmp_path: Path) -> None:
    """All over the payload: never other values without a failure."""
    payload = bytes(Store(noisy)[1]["mask"].payload)
    data = noisy.read_bytes()
    start = data.index(payload)
    for step, place in enumerate(range(0, len(payload), len(payload) // 12)):
        path = tmp_path / f"{step}.lmdb"
        path.write_bytes(data[: start + place] + bytes((payload[place] ^ 1 << step % 8,)) + data[start + place + 1 :])
        dataset = ImageDataset(path)
        assert (dataset[1][1] == BEYOND).all()
        assert list(dataset.failures) == [1]


def test_a_record_that_lacks_its_mask_is_a_failure(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With right checksums: never what lay in the batch's memory before."""
    view = Store.view

    def shortened(store: Store, index: int) -> Any:
        fields = record.parse(view(store, index))
        return record.build(fields[: 1 if index == 2 else None])

    monkeypatch.setattr(Store, "view", shortened)
    dataset = ImageDataset(wide, CenterCrop((20, 20)))
    for _ in range(3):
        images, values = fastload.collate(dataset.__getitems__([0, 2]))
        assert not images[1].any()
        assert (values[1] == BEYOND).all()
        images[:], values[:] = 7, 7
        del images, values
    assert list(dataset.failures) == [2]


def test_a_crop_beside_the_damage_is_whole(tmp_path: Path) -> None:
    """A mask is checked where it is read: only crops that show a damaged block fail."""
    write_pair(tmp_path, "0", np.random.default_rng(1).integers(0, 5, (128, 300), np.uint8))
    pack(tmp_path, tmp_path / "db.lmdb")
    payload = bytes(Store(tmp_path / "db.lmdb")[0]["mask"].payload)
    data = bytearray((tmp_path / "db.lmdb").read_bytes())
    data[data.index(payload) + len(payload) - 9] ^= 1
    (tmp_path / "bad.lmdb").write_bytes(data)

    class Left(CenterCrop):
        def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
            return plan.cropped(fastload.geometry.Box(0, 0, 256, 128))

    plain = ImageDataset(tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "bad.lmdb", Left((128, 256)), on_error="raise")
    assert torch.equal(dataset[0][1], plain[0][1][:, :256])
    with pytest.raises(DecodeError):
        ImageDataset(tmp_path / "bad.lmdb", on_error="raise")[0]


# --- where pairs come from


def reasons(path: Path) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in Store(path).quarantine()}


def names(path: Path) -> list[str]:
    store = Store(path)
    return [store.name(i) for i in range(len(store))]


@pytest.mark.parametrize(
    ("images", "targets"),
    [("images", "masks"), ("Images", "Labels"), ("imgs", "annotations"), ("JPEGImages", "SegmentationClass")],
)
def test_two_folders_are_told_by_their_names(tmp_path: Path, images: str, targets: str) -> None:
    """The usual names in any case, other files beside them; masks of other suffixes; order by name."""
    for i in range(3):
        write_pair(tmp_path / "src", f"sub{i % 2}/{i}", regions(32, 40, seed=i), "jpg" if i else "png")
    (tmp_path / "src" / "images").rename(tmp_path / "src" / f"{images}.tmp")
    (tmp_path / "src" / "masks").rename(tmp_path / "src" / f"{targets}.tmp")
    for name in (images, targets):
        (tmp_path / "src" / f"{name}.tmp").rename(tmp_path / "src" / name)
    (tmp_path / "src" / "readme.txt").write_text("about")
    report = pack(tmp_path / "src", tmp_path / "db.lmdb")
    assert (report.samples, report.quarantined) == (3, 0)
    assert names(tmp_path / "db.lmdb") == ["sub0/0.png", "sub0/2.jpg", "sub1/1.jpg"]
    store = Store(tmp_path / "db.lmdb")
    assert store.manifest["source"] == "pairs"
    assert store.masks == {"mask": BEYOND}
    for index, seed in enumerate((0, 2, 1)):
        assert np.array_equal(ImageDataset(tmp_path / "db.lmdb")[index][1].numpy(), regions(32, 40, seed=seed))


def test_masks_of_a_folder_that_is_named(tmp_path: Path) -> None:
    """Any two folders, and one within the other: a mask is no image that lacks a mask."""
    for i in range(2):
        write_pair(tmp_path / "src", str(i), regions(32, 40, seed=i))
    (tmp_path / "src" / "images").rename(tmp_path / "photos")
    pack(tmp_path / "photos", tmp_path / "apart.lmdb", masks=tmp_path / "src" / "masks")
    (tmp_path / "src" / "masks").rename(tmp_path / "photos" / "classes")
    report = pack(tmp_path / "photos", tmp_path / "within.lmdb", masks=tmp_path / "photos" / "classes")
    assert (report.samples, report.quarantined) == (2, 0)
    assert Store(tmp_path / "within.lmdb").manifest["digest"] == Store(tmp_path / "apart.lmdb").manifest["digest"]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_folder_for_each_pair(tmp_path: Path, suffix: str) -> None:
    """img and label in a folder, as labelme's converter writes them, with what else it leaves there."""
    for i in range(3):
        folder = tmp_path / "src" / f"shot{i}"
        folder.mkdir(parents=True)
        mask = regions(32, 40, seed=i)
        Image.fromarray(shows(mask)).save(folder / f"img.{suffix}")
        Image.fromarray(mask).save(folder / "label.png")
        Image.fromarray(shows(mask)).save(folder / "label_viz.png")
        (folder / "label_names.txt").write_text("_background_\na\nb\nc\n")
    report = pack(tmp_path / "src", tmp_path / "db.lmdb")
    assert (report.samples, report.quarantined) == (3, 0)
    assert names(tmp_path / "db.lmdb") == [f"shot{i}/img.{suffix}" for i in range(3)]
    for i, (image, mask) in enumerate(ImageDataset(tmp_path / "db.lmdb")):
        assert np.array_equal(mask.numpy(), regions(32, 40, seed=i))
        assert_aligned(image, mask, radius=3)


def test_a_folder_without_its_label_is_left_out_by_name(tmp_path: Path) -> None:
    """Nothing is left out silently: an image without a label, or with two, is quarantined with the reason."""
    for i in range(4):
        folder = tmp_path / "src" / f"shot{i}"
        folder.mkdir(parents=True)
        Image.fromarray(shows(regions(32, 40))).save(folder / "img.png")
        Image.fromarray(regions(32, 40)).save(folder / "label.png")
    (tmp_path / "src" / "shot1" / "label.png").unlink()
    shutil.copy(tmp_path / "src" / "shot2" / "label.png", tmp_path / "src" / "shot2" / "label.bmp")
    report = pack(tmp_path / "src", tmp_path / "db.lmdb")
    assert report.samples == 2
    assert "no mask" in reasons(tmp_path / "db.lmdb")["shot1/img.png"]
    assert "several masks" in reasons(tmp_path / "db.lmdb")["shot2/img.png"]


def test_pairs_that_do_not_fit_are_left_out(pairs: Path, tmp_path: Path) -> None:
    """Each with its reason; masks without an image are a note; what is whole is packed."""
    root = tmp_path / "src"
    shutil.copytree(pairs, root)
    targets = root / "masks"
    (targets / "0.png").unlink()
    shutil.copy(targets / "1.png", targets / "1.bmp")
    Image.fromarray(regions(90, 99)).save(targets / "2.png")
    Image.fromarray(shows(regions(95, 91))).save(targets / "3.png")
    (targets / "4.png").write_bytes(b"")
    (targets / "5.png").write_bytes((targets / "5.png").read_bytes()[:-40])
    Image.fromarray(regions(32, 32)).save(targets / "extra.png")
    Image.fromarray(regions(32, 32)).save(targets / "more.png")
    (targets / "Thumbs.db").write_bytes(b"junk")
    (root / "images" / ".DS_Store").write_bytes(b"junk")
    (root / "images" / "6.png").write_bytes(b"")
    report = pack(root, tmp_path / "db.lmdb")
    assert names(tmp_path / "db.lmdb") == ["7.png"]
    assert report.notes == ("2 masks belong to no image, the first is 'extra'",)
    left = reasons(tmp_path / "db.lmdb")
    assert left.keys() == {f"{i}.png" for i in range(7)}
    assert f"no mask of this name in {targets}" in left["0.png"]
    assert "several masks" in left["1.png"]
    assert "1.bmp" in left["1.png"]
    assert "the mask is 99 x 90 pixels, its image 98 x 90" in left["2.png"]
    assert "3 channels (RGB)" in left["3.png"]
    assert "empty" in left["4.png"]
    assert "the mask is damaged" in left["5.png"]
    assert "empty" in left["6.png"]


def test_swapped_folders_are_refused_with_the_suspicion(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="are image and mask swapped"):
        pack(pairs / "masks", tmp_path / "db.lmdb", masks=pairs / "images")
    assert list(tmp_path.iterdir()) == []


def test_folders_without_any_pair_are_refused(pairs: Path, tmp_path: Path) -> None:
    """No mask at all, no such folder, a file where a folder belongs, labels where there is no mask to name."""
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("a")
    for wrong, message in (("none", "no image has a mask"), ("missing", "is no folder"), ("file", "is no folder")):
        with pytest.raises(SourceError, match=message):
            pack(pairs / "images", tmp_path / "db.lmdb", masks=tmp_path / wrong)
    with pytest.raises(SourceError, match="no image has a mask"):
        open_source(pairs / "images", "pairs")
    with pytest.raises(SourceError, match=r"names a mask's values"):
        open_source(pairs / "images", "flat", labels=tmp_path / "file")


def test_values_beyond_the_classes(pairs: Path, tmp_path: Path) -> None:
    """With a list of names each value has one, or is 255, which means: ignore."""
    root = tmp_path / "src"
    shutil.copytree(pairs, root)
    (tmp_path / "labels.txt").write_text("_background_\ncat\ndog\nbee\n")
    ignored = regions(80, 112, seed=0)
    ignored[:9] = BEYOND
    Image.fromarray(ignored).save(root / "masks" / "0.png")
    Image.fromarray(regions(85, 105, seed=1) + np.uint8(1)).save(root / "masks" / "1.png")
    report = pack(root, tmp_path / "db.lmdb", labels=tmp_path / "labels.txt")
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.classes == ["_background_", "cat", "dog", "bee"]
    assert (report.samples, report.classes) == (7, 4)
    assert np.array_equal(dataset[0][1].numpy(), ignored)
    (left,) = reasons(tmp_path / "db.lmdb").items()
    assert left == ("1.png", "the mask has the value 4, and the 4 classes are 0 to 3 (255 means: ignore)")


def test_a_store_packed_again_keeps_its_masks(stored: Path, wide: Path, tmp_path: Path) -> None:
    """Values, order, names, types; without tiles, raw, as JPEG."""
    for source in (stored, wide):
        for options in ({}, {"tiles": False}, {"encode": "raw"}, {"encode": "jpeg"}):
            target = tmp_path / f"{source.parent.name}{len(list(tmp_path.iterdir()))}.lmdb"
            report = pack(source, target, **options)
            assert (report.samples, report.quarantined) == (len(Store(source)), 0)
            assert names(target) == names(source)
            assert Store(target).masks == {"mask": BEYOND}
            assert Store(target).manifest["source"] == "pairs"
            for (_, mask), (_, before) in zip(ImageDataset(target), ImageDataset(source), strict=True):
                assert mask.dtype == before.dtype
                assert torch.equal(mask, before)


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_packing_again_without_exif_never_turns_an_image_away_from_its_mask(tmp_path: Path, orientation: int) -> None:
    """Masks in a store are upright: an image that is shown as it lies would be mirrored or turned beside them."""
    write_pair(tmp_path, "0", regions(48, 48, seed=3), "png", orientation)
    pack(tmp_path, tmp_path / "db.lmdb")
    try:
        pack(tmp_path / "db.lmdb", tmp_path / "new.lmdb", exif="ignore")
    except (ValueError, SourceError):
        return
    assert_aligned(*ImageDataset(tmp_path / "new.lmdb")[0], exact=True)


def test_a_damaged_mask_is_not_packed_again(noisy: Path, tmp_path: Path) -> None:
    pack(damaged(noisy, tmp_path / "bad.lmdb", 2), tmp_path / "new.lmdb")
    assert names(tmp_path / "new.lmdb") == [f"{i}.png" for i in (0, 1, 3, 4, 5)]
    assert "checksum" in reasons(tmp_path / "new.lmdb")["2.png"]


class Stopped(Exception):  # noqa: N818 - as StopIteration is named
    """What ends a pack in these tests."""


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise Stopped

    return progress


def test_an_interrupted_pack_goes_on_with_its_masks(
    pairs: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is the one that an undisturbed run makes; if a mask changed meanwhile, it is begun anew."""
    root = tmp_path / "src"
    shutil.copytree(pairs, root)
    monkeypatch.setattr("fastload.store_writer._STEP_BYTES", 1)
    counts: Counter[str] = Counter()

    def run(count: int) -> list[int]:
        seen: list[int] = []
        with pytest.raises(Stopped):
            pack(
                root,
                tmp_path / "db.lmdb",
                progress=lambda done, total: (seen.append(done), stop_after(count)(done, total))[1],
            )
        counts["runs"] += 1
        return seen

    assert run(3) == [1, 2, 3]
    assert run(5)[0] > 1, "it goes on"
    mask = root / "masks" / "1.png"
    changed = regions(85, 105, seed=99)
    Image.fromarray(changed).save(mask)
    os.utime(mask, ns=(0, 10**9))
    assert run(2) == [1, 2], "it starts over"
    pack(root, tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert np.array_equal(dataset[1][1].numpy(), changed)
    for index in (0, 2, 3, 4, 5, 6, 7):
        assert_same(batch_of(dataset, [index]), batch_of(ImageDataset(stored), [index]))


def test_class_folders_are_no_pairs(tmp_path: Path) -> None:
    """Two classes by any other name, three folders of which two are called so, images at the top: as ever."""
    for folder in ("images", "masks", "third"):
        (tmp_path / "three" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "three" / folder / "0.png")
    assert open_source(tmp_path / "three").format == "folders"
    shutil.rmtree(tmp_path / "three" / "third")
    assert open_source(tmp_path / "three").format == "pairs"
    assert open_source(tmp_path / "three", "folders").format == "folders"
    Image.new("RGB", (9, 9)).save(tmp_path / "three" / "0.png")
    assert open_source(tmp_path / "three").format == "flat"


# --- the transforms of segmentation


def boxes(crop: RandomCrop, size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """(y, x) of the crops of `count` samples, in the image's coordinates."""
    found = []
    for index in range(count):
        (plan,) = Compose([crop]).plans(size, SampleRandom(3, 0, index))
        box = plan.window or plan.box
        assert (box.height, box.width) == crop.size
        found.append((box.y, box.x))
    return found


@pytest.mark.parametrize(
    ("crop", "size", "ys", "xs"),
    [
        (RandomCrop((4, 6)), (6, 10), range(3), range(5)),
        (RandomCrop(5), (5, 5), range(1), range(1)),
        (RandomCrop(5, padding=1), (5, 5), range(-1, 2), range(-1, 2)),
        (RandomCrop(5, (2, 1)), (5, 5), range(-1, 2), range(-2, 3)),
        (RandomCrop(5, (2, 1, 0, 3)), (5, 5), range(-1, 4), range(-2, 1)),
        (RandomCrop(5, [1]), (5, 6), range(-1, 2), range(-1, 3)),
        (RandomCrop((5, 4), pad_if_needed=True), (3, 6), range(-2, 1), range(3)),
        (RandomCrop((5, 4), 1, pad_if_needed=True), (2, 4), range(-2, 0), range(-1, 2)),
        (RandomCrop((4, 4), (0, 0, 3, 0), pad_if_needed=True), (4, 4), range(1), range(4)),
    ],
)
def test_random_crops_reach_every_place_equally(crop: RandomCrop, size: tuple[int, int], ys: range, xs: range) -> None:
    """torchvision's: the padding, then on both sides what is still missing, then every place with the same chance."""
    places = len(ys) * len(xs)
    counts = Counter(boxes(crop, size, 200 * places))
    assert counts.keys() == {(y, x) for y in ys for x in xs}
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < places + 5 * math.sqrt(2 * places)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(0), "size is 0"),
        (lambda: RandomCrop((3, -1)), "size is -1"),
        (lambda: RandomCrop((1, 2, 3)), r"takes an int or \(height, width\)"),
        (lambda: RandomCrop(4, padding=-1), "padding is -1; it takes 1, 2 or 4 numbers of pixels, none below 0"),
        (lambda: RandomCrop(4, padding=(1, 2, 3)), r"padding is \(1, 2, 3\)"),
        (lambda: RandomCrop(4, padding=(1, 2, 3, -4)), "none below 0"),
        (lambda: RandomCrop(4, padding=()), r"padding is \(\)"),
        (lambda: RandomScale((0, 1)), r"scale is \(0, 1\); it takes two numbers, 0 < smallest <= largest"),
        (lambda: RandomScale((2, 1)), r"scale is \(2, 1\)"),
        (lambda: Resize((None, None)), r"size is \(None, None\); it takes an int or \(height, width\)"),
        (lambda: Resize([None]), r"size is \[None\]"),
        (lambda: Resize((None, 3, 4)), "it takes an int or"),
        (lambda: Resize((0, None)), "size is 0; it must be at least 1"),
        (lambda: Resize((None, -3)), "size is -3"),
        (lambda: Resize((3, None), max_size=9), "max_size is 9; it goes with one int"),
    ],
)
def test_impossible_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_crop_of_a_smaller_image_says_what_to_do(stored: Path) -> None:
    """No placeholder for a wrong argument: an error for the batch, from threads too."""
    message = r"RandomCrop\(\(100, 20\)\) of an image of 80 x 112; pass pad_if_needed=True"
    dataset = ImageDataset(stored, RandomCrop((100, 20)))
    with pytest.raises(ValueError, match=message):
        dataset[0]
    with pytest.raises(ValueError, match=message):
        next(iter(fastload.DataLoader(dataset, 2, num_workers=2)))
    assert not dataset.failures
    assert ImageDataset(stored, RandomCrop((100, 20), (0, 10)))[0][1].shape == (100, 20)


def test_random_scales_fill_their_range() -> None:
    """Both sides by one factor, uniform between the bounds; a side never vanishes."""
    sizes = [
        Compose([RandomScale((0.5, 2.0))]).plans((1000, 2000), SampleRandom(0, 0, i))[0].output_size
        for i in range(1000)
    ]
    factors = np.array([height / 1000 for height, _ in sizes])
    assert all(abs(width - 2 * height) <= 1 for height, width in sizes)
    assert 0.5 <= factors.min() < 0.51
    assert 1.99 < factors.max() < 2.0
    assert abs(factors.mean() - 1.25) < 0.05
    assert Compose([RandomScale((0.1, 0.1))]).plans((3, 40), SampleRandom(0, 0, 0))[0].output_size == (1, 4)
    assert Compose([RandomScale((1, 1))]).plans((3, 40), SampleRandom(0, 0, 0)) == [Plan.whole((3, 40))]


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        (Resize((50, None)), (100, 60), (50, 30)),
        (Resize((None, 50)), (60, 100), (30, 50)),
        (Resize((50, None)), (60, 101), (50, 84)),
        (Resize((None, 7)), (1, 1000), (1, 7)),
        (Resize((2, None)), (1000, 3), (2, 1)),
        (Resize([200, None]), (100, 60), (200, 120)),
        (Resize((100, None)), (100, 61), (100, 61)),
    ],
)
def test_the_other_side_of_a_resize_follows(resize: Resize, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """None for a side keeps the ratio, cut to whole pixels, at least one."""
    assert Compose([resize]).plans(size, SampleRandom(0, 0, 0))[0].output_size == expected


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([RandomCrop((3, 4))], (3, 4)),
        ([Resize((3, None))], None),
        ([Resize((None, 4)), RandomHorizontalFlip()], None),
        ([RandomScale()], None),
        ([RandomCrop(9), RandomScale()], None),
        ([RandomScale(), RandomCrop(9), RandomHorizontalFlip()], (9, 9)),
        ([Resize((3, None)), CenterCrop(9)], (9, 9)),
    ],
)
def test_chains_say_their_size_if_they_know_it(chain: list[Any], expected: tuple[int, int] | None) -> None:
    assert Compose(chain).output_size == expected


def test_representations_show_the_arguments() -> None:
    """A printed chain can be read back as the code that makes it."""
    for transform in (
        *(RandomCrop(8), RandomCrop((8, 9), 2, True), RandomCrop(8, (1, 2)), RandomCrop(8, [1, 2, 3, 4])),
        *(RandomScale(), RandomScale((0.25, 1.0)), Resize((3, None)), Resize((None, 3)), Resize([3, None])),
    ):
        again = eval(repr(transform))
        assert repr(again) == repr(transform)
        assert vars(again) == vars(transform)


def test_arrays_of_bytes_are_not_changed_by_packing(tmp_path: Path) -> None:
    """A mask in a store is the same file's values whatever format it came in: PNG, TIFF, BMP or GIF."""
    mask = regions(40, 48, seed=8)
    for i, suffix in enumerate(("png", "tif", "bmp", "pgm")):
        write_pair(tmp_path, str(i), mask)
        out = io.BytesIO()
        Image.fromarray(mask).save(out, {"tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper()))
        (tmp_path / "masks" / f"{i}.png").unlink()
        (tmp_path / "masks" / f"{i}.{suffix}").write_bytes(out.getvalue())
    assert pack(tmp_path, tmp_path / "db.lmdb").samples == 4
    for _, got in ImageDataset(tmp_path / "db.lmdb"):
        assert np.array_equal(got.numpy(), mask)


def test_masks_are_verified_and_unpacked(tmp_path: Path) -> None:
    """Unpacked, images and masks make the same store again; a mask in another's place is damage."""
    random = np.random.default_rng(5)
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    values = [random.integers(0, 9, (40, 50), np.uint8), random.integers(0, 999, (40, 50)).astype(np.uint16)]
    for i, mask in enumerate(values):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "in" / "images" / f"{i}.jpg")
        Image.fromarray(mask).save(tmp_path / "in" / "masks" / f"{i}.png")
    first, second = tmp_path / "first.lmdb", tmp_path / "second.lmdb"
    fastload.pack(tmp_path / "in", first)
    assert verify(first, decode_images=True).damaged == ()
    assert info(first)["masks"] == {"mask": int(values[1].max())}
    unpack(first, tmp_path / "out")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert names == ["images/0.jpg", "images/1.jpg", "masks/0.png", "masks/1.png"]
    fastload.pack(tmp_path / "out", second)
    assert fastload.Store(first).manifest["digest"] == fastload.Store(second).manifest["digest"]
    for (image, mask), expected in zip(fastload.ImageDataset(second), values, strict=False):
        assert image.shape == (3, 40, 50)
        assert mask.tolist() == expected.tolist()
    swapped = tmp_path / "swapped.lmdb"
    swapped.write_bytes(first.read_bytes())
    with edited(swapped, b"samples") as transaction:
        keys = [(i).to_bytes(8, "big") for i in range(2)]
        fields = [record.parse(bytes(transaction.get(key))) for key in keys]
        transaction.put(keys[0], record.build([fields[0][0], fields[1][1], fields[0][2]]))
    (damage,) = verify(swapped).damaged
    assert (damage.index, damage.reason) == (0, "its mask is not the one that was packed at this place")


@pytest.mark.parametrize(("name", "moves"), [("RandomVerticalFlip", True), ("RandomGrayscale", False)])
def test_transforms_of_others_must_not_move_the_image_alone(tmp_path: Path, name: str, moves: bool) -> None:
    """torchvision's flips and crops after ours would leave the mask where it is; those of colour are welcome."""
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (30, 20)).save(tmp_path / folder / "a.png")
    fastload.pack(tmp_path, tmp_path / "db.lmdb")
    transform = type(name, (), {"__module__": "torchvision.transforms.v2", "__call__": lambda self, picture: picture})()
    if moves:
        with pytest.raises(ValueError, match="would move the image and leave its mask"):
            ImageDataset(tmp_path / "db.lmdb", transform)
    else:
        assert ImageDataset(tmp_path / "db.lmdb", transform)[0][1].shape == (20, 30)
