"""`ImageDataset.read`: regions, smaller and grey pictures, floats, against Pillow's whole images."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import torch
from conftest import Pixels, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import fastload
from fastload import ImageDataset, geometry, tiles
from fastload.errors import ChecksumError, DecodeError
from fastload.geometry import Box
from fastload.store import Store

LUMA = np.array([0.299, 0.587, 0.114])
REDUCTIONS = (1, 2, 4, 8)
ROUNDED = 0.67
"""By how much Pillow's rounded means may differ from exact ones: it cuts off where an odd number of pixels is left."""

SHAPES = {
    "420": (147, 203),
    "444": (133, 122),
    "progressive": (101, 150),
    "gray": (139, 126),
    "small": (37, 43),
    "even": (128, 160),
    "flat": (8, 41),
    "thin": (50, 3),
    "one": (1, 1),
}
"""Names of JPEGs and their sizes as stored; the larger ones are cut into tiles."""


def as_array(image: torch.Tensor) -> npt.NDArray[Any]:
    return image.permute(1, 2, 0).numpy()


def jpeg(name: str, orientation: int) -> bytes:
    """A JPEG with the EXIF orientation."""
    image = Image.fromarray(picture(*SHAPES[name], seed=orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"subsampling": 0 if name == "444" else 2, "progressive": name == "progressive"}
    image.convert("L" if name == "gray" else "RGB").save(file, "JPEG", quality=88, exif=exif, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of all shapes and orientations, PNGs of all orientations, and stores of them: tiled, whole and raw."""
    root = tmp_path_factory.mktemp("read")
    (root / "images").mkdir()
    for orientation in range(1, 9):
        for name in SHAPES:
            (root / "images" / f"{name}-{orientation}.jpg").write_bytes(jpeg(name, orientation))
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture(53, 70, seed=orientation)).save(root / "images" / f"png-{orientation}.png", exif=exif)
    fastload.pack(root / "images", root / "tiled.lmdb")
    fastload.pack(root / "images", root / "whole.lmdb", tiles=False)
    fastload.pack(root / "images", root / "raw.lmdb", encode="raw")
    return root


@pytest.fixture(scope="module")
def datasets(folder: Path) -> dict[str, ImageDataset]:
    """The stores as datasets; of the tiled one another whose cache holds every image."""
    opened = {name: ImageDataset(folder / f"{name}.lmdb") for name in ("tiled", "whole", "raw")}
    opened["cached"] = ImageDataset(folder / "tiled.lmdb", cache="50MB")
    list(opened["cached"])
    return opened


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    """The images' files, in index order."""
    return sorted((folder / "images").iterdir())


def by_libjpeg(path: Path, reduction: int, gray: bool) -> npt.NDArray[Any]:
    """What Pillow makes of a JPEG at a reduced size: DCT scaling, and the luma that is stored."""
    with Image.open(path) as image:
        width, height = image.size
        image.draft("L" if gray else "RGB", (max(1, width // reduction), max(1, height // reduction)))
        assert image.size == (math.ceil(width / reduction), math.ceil(height / reduction))
        upright = np.asarray(ImageOps.exif_transpose(image).convert("L" if gray else "RGB"))
    return upright.reshape(*upright.shape[:2], 1 if gray else 3)


def averaged(image: npt.NDArray[Any], reduction: int) -> npt.NDArray[Any]:
    """The means of squares; at the right and below of what is left of them."""
    for axis in (0, 1):
        starts = np.arange(0, image.shape[axis], reduction)
        counts = np.minimum(reduction, image.shape[axis] - starts)
        image = np.add.reduceat(image, starts, axis) / np.expand_dims(counts, (1, 2) if axis == 0 else (0, 2))
    return image


def expected_of(path: Path, raw: bool, reduction: int, gray: bool) -> tuple[npt.NDArray[Any], float]:
    """The whole upright image at 1 / reduction of its size, and by how much what is read may differ from it."""
    with Image.open(path) as image:
        if not raw and path.suffix == ".jpg" and (min(image.size) > 8 or reduction == 1):
            return by_libjpeg(path, reduction, gray), 0
        of_jpeg = path.suffix == ".jpg" and gray and not raw
        if of_jpeg:
            image.draft("L", image.size)
        upright = np.asarray(ImageOps.exif_transpose(image)).astype(np.float64)
    upright = upright.reshape(*upright.shape[:2], -1)
    if gray and upright.shape[2] == 3:
        return averaged((upright * LUMA).sum(2, keepdims=True), reduction), 0.5 + ROUNDED  # rounded twice
    if not gray and upright.shape[2] == 1:
        upright = upright.repeat(3, 2)
    return averaged(upright, reduction), 0 if reduction == 1 else ROUNDED


@settings(deadline=None, max_examples=500)
@given(
    which=st.sampled_from(("tiled", "whole", "raw", "cached")), number=st.integers(0, 79),
    reduction=st.sampled_from(REDUCTIONS), gray=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_region_is_cut_from_the_whole_image_at_that_size(
    datasets: dict[str, ImageDataset], files: list[Path],
    which: str, number: int, reduction: int, gray: bool, data: st.DataObject,
) -> None:  # fmt: skip
    """Of JPEGs bit for bit what libjpeg makes of the whole file; of others, and of tiny ones, the means of squares."""
    whole, difference = expected_of(files[number], which == "raw", reduction, gray)
    height, width = datasets[which].store.columns["size"][number].tolist()
    w, h = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    x, y = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
    got = as_array(datasets[which].read(number, (x, y, w, h), reduce=reduction, gray=gray))
    wanted = whole[y // reduction : math.ceil((y + h) / reduction), x // reduction : math.ceil((x + w) / reduction)]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=difference)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_whole_images_are_read_in_every_orientation(
    datasets: dict[str, ImageDataset], files: list[Path], reduction: int, gray: bool
) -> None:
    """All files, smaller and grey, from every store."""
    for which, dataset in datasets.items():
        for number, path in enumerate(files):
            whole, difference = expected_of(path, which == "raw", reduction, gray)
            got = as_array(dataset.read(number, reduce=reduction, gray=gray))
            assert got.shape == whole.shape
            np.testing.assert_allclose(got, whole, rtol=0, atol=difference, err_msg=f"{which} {path.name}")


def test_the_stores_are_what_the_tests_take_them_for(datasets: dict[str, ImageDataset], files: list[Path]) -> None:
    """Large JPEGs lie in tiles in one store and in no other, and regions of them take a part of these."""
    for number, path in enumerate(files):
        image = datasets["tiled"].store[number]["image"]
        tiled = path.suffix == ".jpg" and image.width * image.height >= 96 * 96
        assert bool(len(image.tiles)) == tiled
        assert not tiled or tiles.splice(image, Box(image.width - 8, 8, 8, 8)) is not None
        assert not len(datasets["whole"].store[number]["image"].tiles)
    assert sum(len(datasets["tiled"].store[number]["image"].tiles) > 0 for number in range(80)) == 40


def test_a_cache_changes_no_pixel(datasets: dict[str, ImageDataset], files: list[Path]) -> None:
    """The cache holds RGB at full size, from which other pixels would come; what is read does not depend on it."""
    cached, fresh = datasets["cached"], datasets["tiled"]
    assert all(cached.cache.get(number) is not None for number in range(len(files)))  # type: ignore[union-attr]
    for number in range(len(files)):
        for options in ({"gray": True}, {"reduce": 2}, {"reduce": 8, "gray": True}):
            assert torch.equal(cached.read(number, **options), fresh.read(number, **options))  # type: ignore[arg-type]


def test_a_column_of_raw_images(raw_store_path: Path) -> None:
    """Small images of one size, which have no records: regions, means of squares, luma."""
    dataset = ImageDataset(raw_store_path)
    assert "image" in dataset.store.columns
    image = as_array(dataset.read(7)).astype(np.float64)
    small = as_array(dataset.read(7, (3, 5, 9, 4), reduce=4))
    np.testing.assert_allclose(small, averaged(image, 4)[1:3, :3], rtol=0, atol=ROUNDED)
    gray = as_array(dataset.read(7, (3, 5, 9, 4), gray=True))
    np.testing.assert_allclose(gray, (image * LUMA).sum(2, keepdims=True)[5:9, 3:12], rtol=0, atol=0.51)
    dataset.read(7)[:] = 0  # memory of its own, not the store's
    assert dataset.read(7, reduce=2).max() > 0


def test_raw_grey_images_stay_as_they_are(tmp_path: Path) -> None:
    """One channel, asked for or not; smaller ones are averaged."""
    (tmp_path / "images").mkdir()
    pixels = picture(11, 13)[..., 0]
    for number in range(2):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb", encode="raw")
    dataset = ImageDataset(tmp_path / "db.lmdb")
    for number in range(2):
        assert np.array_equal(as_array(dataset.read(number, gray=True))[..., 0], pixels)
        small = as_array(dataset.read(number, reduce=2, gray=True))
        np.testing.assert_allclose(small, averaged(pixels[..., None].astype(float), 2), rtol=0, atol=ROUNDED)


@given(
    x=st.integers(0, 50), y=st.integers(0, 50), w=st.integers(1, 50), h=st.integers(1, 50), r=st.sampled_from((2, 4, 8))
)
def test_a_reduced_box_holds_all_pixels_of_the_box_and_no_more(x: int, y: int, w: int, h: int, r: int) -> None:
    box = geometry.reduced_box(Box(x, y, w, h), r)
    columns, rows = ({place // r for place in range(start, start + n)} for start, n in ((x, w), (y, h)))
    assert columns == set(range(box.x, box.ends[1]))
    assert rows == set(range(box.y, box.ends[0]))


# --- luma


def test_a_jpeg_s_luma_is_its_colours_luma_to_one_level_unless_they_are_clipped() -> None:
    """RGB is rounded, which makes a level of difference; where it is cut off at 0 or 255 the luma keeps what it was."""
    rng = np.random.default_rng(0)
    calm = np.clip(picture(160, 200).astype(int) // 2 + 64, 0, 255).astype(np.uint8)
    garish = np.where(rng.integers(0, 2, (20, 25, 3)) == 1, 255, 0).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    worst = []
    for pixels in (calm, garish):
        data = simplejpeg.encode_jpeg(pixels, quality=60, colorsubsampling="420")
        colours = simplejpeg.decode_jpeg(data).astype(int)
        luma = simplejpeg.decode_jpeg(data, "GRAY")[..., 0].astype(int)
        apart = np.abs(np.rint((colours * LUMA).sum(2)) - luma)
        inside = ((colours > 0) & (colours < 255)).all(2)
        assert apart[inside].max() <= 1
        worst.append(apart.max())
    assert worst[0] <= 1
    assert worst[1] > 10


# --- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_are_from_0_to_1(datasets: dict[str, ImageDataset], dtype: torch.dtype) -> None:
    """Every level is itself divided by 255, to the type's precision, whatever else is asked for."""
    for options in ({}, {"reduce": 2}, {"gray": True, "region": (0, 0, 1, 1)}):
        levels = datasets["tiled"].read(0, **options)  # type: ignore[arg-type]
        got = datasets["tiled"].read(0, dtype=dtype, **options)  # type: ignore[arg-type]
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), levels.double() / 255, rtol=torch.finfo(dtype).eps, atol=0)
        assert got.min() >= 0
        assert got.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": 3}, "reduce is 3; it may be 1, 2, 4 or 8"),
        ({"reduce": 0}, "reduce is 0; it may be"),
        ({"dtype": torch.int64}, "dtype is torch.int64; it may be torch.uint8, torch.float32"),
        ({"region": (0, 0, 9999, 1), "reduce": 8}, "is not inside image 0"),
        ({"region": (0, 0, 0, 1), "gray": True}, "is not inside image 0"),
        ({"region": (-1, 0, 4, 4), "reduce": 2}, "is not inside image 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    datasets: dict[str, ImageDataset], options: dict[str, Any], message: str
) -> None:
    """With what was got and what is allowed; regions are judged at full size."""
    with pytest.raises(ValueError, match=message):
        datasets["tiled"].read(0, **options)


def test_regions_are_whole_numbers(datasets: dict[str, ImageDataset]) -> None:
    """As a tuple, a list or an array, but no floats."""
    expected = datasets["whole"].read(0, (1, 2, 3, 4))
    assert torch.equal(datasets["whole"].read(0, np.array([1, 2, 3, 4])), expected)  # type: ignore[arg-type]
    for wrong in ((0.5, 0, 4, 4), (1, 2, 3)):
        with pytest.raises(ValueError, match="it takes 4 whole numbers"):
            datasets["whole"].read(0, wrong)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="out of range for a dataset of"):
        datasets["whole"].read(10_000)


# --- damage


def changed(source: Path, target: Path, old: bytes, place: int) -> ImageDataset:
    """A copy of a store with a bit flipped in some bytes of it."""
    new = old[:place] + bytes([old[place] ^ 4]) + old[place + 1 :]
    target.write_bytes(source.read_bytes().replace(old, new))
    return ImageDataset(target)


@pytest.mark.parametrize("options", [{"gray": True}, {"reduce": 2}, {"reduce": 8, "gray": True}])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_checksums_are_checked(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    """Of what is read: damage beside the tiles of a region is passed over, any other is an error."""
    (tmp_path / "images").mkdir()
    pixels: Pixels = picture(700, 500, seed=1)
    Image.fromarray(pixels).save(tmp_path / "images" / f"0.{suffix}")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    payload = bytes(Store(tmp_path / "db.lmdb")[0]["image"].payload)
    damaged = changed(tmp_path / "db.lmdb", tmp_path / "damaged.lmdb", payload, len(payload) - 9000)
    with pytest.raises(ChecksumError):
        damaged.read(0, **options)
    with pytest.raises(ChecksumError):
        damaged.read(0, (100, 600, 80, 80), **options)
    top = (16, 16, 100, 60)
    if suffix == "png":
        with pytest.raises(ChecksumError):
            damaged.read(0, top, **options)
    else:
        assert torch.equal(damaged.read(0, top, **options), ImageDataset(tmp_path / "db.lmdb").read(0, top, **options))


def test_bytes_that_are_no_picture_are_a_decode_error(tmp_path: Path) -> None:
    """Where the checksum holds, and the bytes are not the JPEG that the record describes."""
    from fastload import decode, record

    data = b"\xff\xd8 no picture"
    field = record.Field(record.JPEG, data, 1, 3, 0, 40, 40, b"", record.checksum(data))
    with pytest.raises(DecodeError):
        decode.reduced(field, Box(0, 0, 9, 9), 2, gray=True)
