"""Images of 16 bits: the values of a file are the values of a tensor, cropped, mirrored and resized or not."""

from __future__ import annotations

import io
import itertools
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastload
from fastload import ImageDataset, Store, blocks, cli, decode, pack, record
from fastload.errors import ChecksumError, DecodeError, SourceError, StoreFormatError
from fastload.geometry import Box, Plan, upright_size
from fastload.items import Item, Source
from fastload.manifest import check as check_manifest
from fastload.options import Options
from fastload.prepare import form_of
from fastload.stats import statistics
from fastload.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    normalize,
)
from fastload.unpack import unpack
from fastload.verify import verify

Values = npt.NDArray[Any]

SHAPE = (37, 53)


def noise(*shape: int, dtype: Any = np.uint16, seed: int = 0) -> Values:
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)


# --- files of 16 bits


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: Values, before: bytes = b"") -> bytes:
    """A PNG of 16 bits by hand: grey, grey with alpha, RGB or RGBA. before: chunks between header and pixels."""
    height, width, channels = (*values.shape, 1)[:3]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: Values, order: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of 16 bits by hand, in one strip or, with planar=2, one for each channel."""
    height, width, channels = (*values.shape, 1)[:3]
    planar = tags.get("planar", 1)
    kept = values.reshape(height, width, channels).astype(order + "u2")
    strips = [kept.tobytes()] if planar == 1 else [kept[..., c].tobytes() for c in range(channels)]
    photometric = tags.get("photometric", 2 if channels > 2 else 1)
    entries: list[tuple[int, int, list[int]]] = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * channels)]
    entries += [(259, 3, [1]), (262, 3, [photometric]), (274, 3, [tags.get("orientation", 1)]), (277, 3, [channels])]
    entries += [(278, 4, [height]), (279, 4, [len(strip) for strip in strips]), (284, 3, [planar])]
    if channels == 4:
        entries.append((338, 3, [tags.get("alpha", 2)]))
    entries.append((339, 3, [tags.get("sample_format", 1)] * channels))
    data_at = 8 + 2 + 12 * (len(entries) + 1) + 4 + 100
    starts = itertools.accumulate((len(strip) for strip in strips[:-1]), initial=data_at)
    entries = sorted([*entries, (273, 4, list(starts))])
    rows, far = b"", b""
    for tag, kind, numbers in entries:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            far, packed = far + packed, struct.pack(order + "I", data_at - 100 + len(far))
        rows += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "IH", 8, len(entries)) + rows + bytes(4)
    return head + far.ljust(100, b"\0") + b"".join(strips)


def by_opencv(values: Values, suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, values if values.ndim == 2 else values[..., ::-1], options)
    assert done
    return data.tobytes()


def by_pillow(values: Values, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format, **options)
    return file.getvalue()


def netpbm(values: Values, largest: int, comment: bytes = b"") -> bytes:
    kind = b"P5" if values.ndim == 2 else b"P6"
    height, width = values.shape[:2]
    return kind + b"\n" + comment + b"%d %d\n%d\n" % (width, height, largest) + values.astype(">u2").tobytes()


GRAY, RGB, RGBA, LA = noise(*SHAPE), noise(*SHAPE, 3), noise(*SHAPE, 4), noise(*SHAPE, 2)
LZW, DEFLATE, PACKBITS = 5, 8, 32773

FILES: dict[str, tuple[bytes, Values]] = {
    "gray.png": (png(GRAY), GRAY),
    "opencv.png": (by_opencv(RGB, ".png"), RGB),
    "rgb.png": (png(RGB), RGB),
    "rgba.png": (png(RGBA), RGBA[..., :3]),
    "la.png": (png(LA), LA[..., 0]),
    "key.png": (png(GRAY, chunk(b"tRNS", struct.pack(">H", int(GRAY[3, 4])))), GRAY),
    "keys.png": (png(RGB, chunk(b"tRNS", struct.pack(">3H", *RGB[3, 4].tolist()))), RGB),
    "gamma.png": (png(GRAY, chunk(b"gAMA", struct.pack(">I", 100000))), GRAY),
    **{f"gray{order}.tif": (tiff(GRAY, order), GRAY) for order in "<>"},
    **{f"rgb{order}.tif": (tiff(RGB, order), RGB) for order in "<>"},
    **{f"rgba{order}.tif": (tiff(RGBA, order), RGBA[..., :3]) for order in "<>"},
    "unnamed.tif": (tiff(RGBA, alpha=0), RGBA[..., :3]),
    "white.tif": (tiff(GRAY, photometric=0), 65535 - GRAY),
    "turned.tif": (tiff(RGB, orientation=6), np.rot90(RGB, -1)),
    **{
        f"{name}{number}.tif": (by_opencv(values, ".tif", cv2.IMWRITE_TIFF_COMPRESSION, number), values)
        for name, values in (("gray", GRAY), ("rgb", RGB))
        for number in (LZW, DEFLATE, PACKBITS)
    },
    "pillow.tif": (by_pillow(GRAY, "TIFF", compression="tiff_lzw"), GRAY),
    "gray.pgm": (netpbm(GRAY, 65535), GRAY),
    "rgb.ppm": (netpbm(RGB, 65535), RGB),
    "twelve.pgm": (netpbm(GRAY & 4095, 4095, b"# a camera's\n"), GRAY & 4095),
    "twelve.ppm": (netpbm(RGB & 4095, 4095), RGB & 4095),
    "nine.pgm": (netpbm(GRAY & 511, 511, b"#\n# 8 8 8\n"), GRAY & 511),
}


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Store]:
    """A function that packs files into a store: `stored({"name.png": bytes}, depth=16)`."""

    def stored(files: dict[str, bytes], name: str = "db.lmdb", **options: Any) -> Store:
        folder = tmp_path / f"{name}-files"
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        pack(folder, tmp_path / name, format="flat", workers=2, **options)
        return Store(tmp_path / name)

    return stored


def read(store: Store, index: int = 0) -> Values:
    """An upright image, (height, width) if it is grey."""
    image = ImageDataset(store.path, on_error="raise").read(index).permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[2] == 1 else image


def reasons(store: Store) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in store.quarantine()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_s_values_are_kept(stored: Callable[..., Store], name: str) -> None:
    """Each alone decides that its store has 16 bits, and how many channels; the values are those that were written."""
    data, values = FILES[name]
    suffix = name.split(".")[1]
    store = stored({f"image.{suffix}": data})
    assert store.image_dtype == np.uint16
    assert store.image_channels == (1 if values.ndim == 2 else 3)
    got = read(store)
    assert got.dtype == np.uint16
    assert np.array_equal(got, values)
    assert store[0]["image"].codec == record.BLOCKS
    image, label = ImageDataset(store.path)[0]
    assert (image.dtype, label) == (torch.uint16, -1)
    assert np.array_equal(image.numpy(), np.atleast_3d(values).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_what_16_bits_show(stored: Callable[..., Store], orientation: int) -> None:
    exif = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, orientation, 0)
    files = {"image.png": png(RGB, chunk(b"eXIf", exif + bytes(4)))}
    expected = np.empty((*upright_size(SHAPE, orientation), 3), np.uint16)
    decode._turn(RGB, orientation, expected)
    assert np.array_equal(read(stored(files)), expected)
    store = stored(files, "ignored.lmdb", exif="ignore")
    assert np.array_equal(read(store), RGB)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RGB, planar=2), "OpenCV and Pillow read differently"),
        (tiff(RGBA, alpha=1), "OpenCV and Pillow read differently"),
        (tiff(GRAY, sample_format=2), "neither of 8 nor of 16 bits without a sign"),
        (by_opencv(GRAY.astype(np.float32), ".tif"), "neither of 8 nor of 16 bits without a sign"),
        (png(GRAY)[:-400], "damaged"),
        (tiff(GRAY)[:-400], ""),
        (netpbm(GRAY, 65535)[:-400], ""),
    ],
)
def test_what_is_not_certain_is_left_out_with_its_reason(
    stored: Callable[..., Store], data: bytes, reason: str
) -> None:
    store = stored({"a.png": png(GRAY), "b.tif": data})
    assert len(store) == 1
    assert reason in reasons(store)["b.tif"]


def test_one_damaged_byte_of_a_file_is_found(stored: Callable[..., Store]) -> None:
    data = bytearray(png(GRAY))
    data[len(data) // 2] ^= 1
    store = stored({"a.png": png(RGB), "b.png": bytes(data)})
    assert list(reasons(store)) == ["b.png"]


# --- mixed sources, and what is asked for


def eight_bits(*shape: int) -> Values:
    return noise(*shape, dtype=np.uint8, seed=5)


def test_8_bits_are_widened_exactly_among_16(stored: Callable[..., Store]) -> None:
    """Colours, grey (three equal channels), a palette's colours, a JPEG's pixels: 255 becomes 65535."""
    colours, gray = eight_bits(20, 30, 3), eight_bits(20, 30)
    palette = Image.fromarray(gray & 3).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 255, 0, 255])
    file = io.BytesIO()
    palette.save(file, "PNG")
    files = {
        "a.png": png(RGB),
        "b.png": by_opencv(colours, ".png"),
        "c.png": by_pillow(gray, "PNG"),
        "d.png": file.getvalue(),
        "e.jpg": by_pillow(colours, "JPEG"),
        "f.png": png(GRAY),
    }
    store = stored(files)
    assert reasons(store) == {}
    assert (store.image_dtype, store.image_channels) == (np.uint16, 3)
    shown = np.array(palette.convert("RGB")).astype(np.uint16) * 257
    jpeg = decode.pixels(record.Field(record.JPEG, files["e.jpg"], 1, 3, 0, 30, 20)).astype(np.uint16) * 257
    expected = [RGB, colours * np.uint16(257), np.repeat((gray * np.uint16(257))[..., None], 3, 2), shown, jpeg]
    expected.append(np.repeat(GRAY[..., None], 3, 2))
    for index, values in enumerate(expected):
        assert np.array_equal(read(store, index), values), index
        assert store[index]["image"].channels == 3


def test_grey_stays_one_channel_and_leaves_colours_out(stored: Callable[..., Store]) -> None:
    """The first image decides: grey of 8 bits and grey JPEGs go with it, colours are named."""
    gray = eight_bits(20, 30)
    files = {"a.png": png(GRAY), "b.png": by_pillow(gray, "PNG"), "c.png": png(RGB), "d.jpg": by_pillow(gray, "JPEG")}
    store = stored(files)
    assert store.image_channels == 1
    assert len(store) == 3
    assert np.array_equal(read(store, 1), gray * np.uint16(257))
    assert "it has colours" in reasons(store)["c.png"]


def test_a_store_of_8_bits_cuts_and_says_so(tmp_path: Path) -> None:
    """A first image of 8 bits, or depth 8: the upper half of each value is shown, and counted in a note."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(by_opencv(eight_bits(20, 30, 3), ".png"))
    (folder / "b.png").write_bytes(png(RGB))
    (folder / "c.png").write_bytes(png(GRAY))
    for name, options in (("first", {}), ("asked", {"depth": 8}), ("jpeg", {"quality": 100})):
        report = pack(folder, tmp_path / name, **options)  # type: ignore[arg-type]
        assert report.notes == ("2 images of 16 bits were cut to 8; --depth 16 keeps all of their bits",)
        store = Store(tmp_path / name)
        assert store.image_dtype == np.uint8
        if name != "jpeg":
            assert np.array_equal(read(store, 1), RGB >> 8)
            assert "dtype" not in store.manifest["fields"][0]
    whole = pack(folder, tmp_path / "whole", depth=16)
    assert whole.notes == ()
    assert np.array_equal(read(Store(tmp_path / "whole"), 1), RGB)
    deep = pack(tmp_path / "first", tmp_path / "deep", depth=16)
    assert deep.notes == ()
    assert np.array_equal(read(Store(tmp_path / "deep"), 1), RGB)  # the file is still there, all of it


def test_no_note_without_images_of_16_bits(stored: Callable[..., Store], tmp_path: Path) -> None:
    store = stored({"a.png": by_opencv(eight_bits(20, 30, 3), ".png")})
    assert (store.image_dtype, store.image_channels) == (np.uint8, 3)
    assert pack(tmp_path / "db.lmdb-files", tmp_path / "again.lmdb").notes == ()


def test_parts_share_one_form_and_the_command_line_says_what_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first image of the whole source decides for every part; notes of all parts are printed."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(RGB))
    for i in range(12):
        (folder / f"b{i}.png").write_bytes(png(noise(9, 9, seed=i)) if i % 2 else by_pillow(eight_bits(9, 9), "PNG"))
    first_in = set()
    for seed in range(4):
        split = ["--split", "train=0.5,val=0.5", "--seed", str(seed)]
        assert cli.main(["pack", str(folder), str(tmp_path / f"{seed}.lmdb"), *split]) == 0
        stores = [Store(tmp_path / f"{seed}-{part}.lmdb") for part in ("train", "val")]
        assert [(store.image_dtype, store.image_channels) for store in stores] == [(np.uint16, 3)] * 2
        first_in.add(stores[0].name(0))
        capsys.readouterr()
        assert cli.main(["pack", str(folder), str(tmp_path / f"{seed}c.lmdb"), *split, "--depth", "8"]) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if "were cut to 8" in line]
        assert sum(int(note.split()[1]) for note in notes) == 7  # an odd number: each part has another share of it
    assert "a.png" in first_in
    assert len(first_in) > 1


@pytest.mark.parametrize(
    "options",
    [{"depth": 12}, {"depth": 16, "quality": 90}, {"depth": 16, "encode": "jpeg"}, {"depth": 0}],
)
def test_depths_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="depth is"):
        Options(**options)
    with pytest.raises(TypeError, match="whole number"):
        Options(depth=16.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparent_images_are_laid_on_a_colour_in_16_bits(
    stored: Callable[..., Store], background: tuple[int, int, int]
) -> None:
    below = np.array(background) * 257.0
    alpha = RGBA[..., 3:] / 65535
    expected = {
        "rgba.png": below + alpha * (RGBA[..., :3] - below),
        "la.png": below + LA[..., 1:] / 65535 * (LA[..., :1] - below),
        "key.png": np.where(GRAY[..., None] == GRAY[3, 4], below, GRAY[..., None]),
        "keys.png": np.where((RGB[3, 4] == RGB).all(axis=2, keepdims=True), below, RGB),
        "gray.png": np.repeat(GRAY[..., None], 3, 2),
    }
    files = {"0.png": png(RGB)} | {name: FILES[name][0] for name in expected}
    store = stored(files, background=background)
    for index in range(1, len(store)):
        assert np.abs(read(store, index) - expected[store.name(index)]).max() <= 0.5 + 1e-6, store.name(index)


def test_pixels_of_a_palette_and_8_bit_transparency_follow_the_rules_of_8_bits(stored: Callable[..., Store]) -> None:
    """A depth of 16 shows what a depth of 8 shows, times 257."""
    translucent = by_pillow(eight_bits(20, 30, 4), "PNG")
    gif = by_pillow(eight_bits(20, 30), "GIF")
    files = {"a.png": translucent, "b.gif": gif, "c.webp": by_pillow(eight_bits(20, 30, 3), "WEBP", lossless=True)}
    for number, options in enumerate(({}, {"background": (9, 90, 200)})):
        deep = stored(files, f"deep{number}", depth=16, **options)
        plain = stored(files, f"plain{number}", depth=8, **options)
        assert (deep.image_channels, len(deep)) == (3, 3)
        for index in range(3):
            assert np.array_equal(read(deep, index), read(plain, index) * np.uint16(257))


# --- arrays that a source hands over


def source_of(images: list[Values], **rest: Any) -> Source:
    items = [Item(f"{number}", "nowhere", (), None, number) for number in range(len(images))]
    return Source("dicom", items, None, 0, [], read=lambda item: {"image": images[item.sample or 0]}, **rest)


def packed_arrays(path: Path, images: list[Values], **options: Any) -> Store:
    """A store of arrays, as packing makes it of what a source reads."""
    from fastload.pack import _pack

    source, chosen = source_of(images), Options(**options)
    _pack(source, str(path), chosen, form_of(source, chosen), 2, False, None)
    return Store(path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_come_back_in_their_type(tmp_path: Path, dtype: Any, channels: int) -> None:
    images = [noise(30 + i, 200, channels, dtype=dtype, seed=i) for i in range(3)]
    images.append(np.full((5, 6, channels), np.iinfo(dtype).min, dtype))
    images.append(noise(7, 150, channels, dtype=dtype).astype(np.dtype(dtype).newbyteorder(">")))
    images.append(np.asfortranarray(noise(140, 5, channels, dtype=dtype)))
    store = packed_arrays(tmp_path / "db.lmdb", images)
    assert (store.image_dtype, store.image_channels) == (dtype, channels)
    dataset = ImageDataset(store.path, on_error="raise", image_type="numpy")
    for index, values in enumerate(images):
        assert np.array_equal(dataset[index][0], values)
        assert dataset[index][0].dtype == dtype
        tensor = ImageDataset(store.path)[index][0]
        assert tensor.dtype == getattr(torch, np.dtype(dtype).name)
        assert np.array_equal(tensor.numpy(), values.transpose(2, 0, 1))
        kept = store[index]["image"]
        raw = blocks.read(kept._replace(flags=record.REENCODED)).reshape(values.shape)
        assert np.array_equal(raw, values if dtype == np.uint16 else values.astype(np.int32) + 32768)
    assert verify(store.path, decode_images=True).damaged == ()


def test_arrays_of_other_types_are_left_out(tmp_path: Path) -> None:
    """Types, shapes and signs that don't go together, one reason each; none of them stops a pack."""
    signed = noise(4, 5, 1, dtype=np.int16)
    wrong: list[Any] = [signed, noise(4, 5, 1).astype(np.float32), noise(4, 5), noise(4, 5, 2), noise(4, 5, 3)]
    wrong.append(noise(0, 5, 1))
    store = packed_arrays(tmp_path / "a.lmdb", [noise(4, 5, 1), *wrong])
    assert len(store) == 1
    found = reasons(store)
    assert found["1"] == "its values are int16, and the store's are uint16; pack it into another store"
    for name in "2346":
        assert "an image is uint8, uint16 or int16" in found[name]
    assert "it has colours" in found["5"]
    store = packed_arrays(tmp_path / "b.lmdb", [signed, noise(4, 5, 1), noise(4, 5, 1, dtype=np.uint8)])
    assert len(store) == 1
    store = packed_arrays(tmp_path / "c.lmdb", [noise(4, 5, 1, dtype=np.uint8), noise(4, 5, 1), signed])
    assert len(store) == 2
    assert np.array_equal(read(store, 1), np.repeat(noise(4, 5, 1) >> 8, 3, 2))
    assert "pack with --depth 16" in reasons(store)["2"]
    with pytest.raises(SourceError, match="limit of 10"):
        packed_arrays(tmp_path / "d.lmdb", [signed], max_pixels=10)


def test_grey_arrays_of_8_bits_and_many_sizes_are_three_equal_channels(tmp_path: Path) -> None:
    """Kept raw, with their one channel, they are repeated as they are read, mirrored, resized and reduced."""
    images = [eight_bits(20 + i, 30, 1) for i in range(3)]
    store = packed_arrays(tmp_path / "db.lmdb", images)
    mirror = ImageDataset(store.path, RandomHorizontalFlip(1), on_error="raise")
    small = ImageDataset(store.path, Resize((10, 12)), on_error="raise")
    for index, values in enumerate(images):
        assert np.array_equal(read(store, index), np.repeat(values, 3, 2))
        assert np.array_equal(mirror[index][0].numpy(), np.repeat(values[:, ::-1], 3, 2).transpose(2, 0, 1))
        assert len({small[index][0][channel].numpy().tobytes() for channel in range(3)}) == 1
        assert ImageDataset(store.path).read(index, reduce=2).shape == (3, -(-(20 + index) // 2), 15)
        assert ImageDataset(store.path).read(index, gray=True).shape == (1, 20 + index, 30)


# --- pictures


FIELDS = st.tuples(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3]), st.sampled_from(["u2", "i2"]))


def turned(values: Values, orientation: int) -> Values:
    """What EXIF's orientation shows, by NumPy."""
    steps: dict[int, Callable[[Values], Values]] = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.swapaxes(0, 1),
        6: lambda v: np.rot90(v, -1),
        7: lambda v: v[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90,
    }
    return steps[orientation](values)


def weights(length: int, wanted: int) -> Values:
    """What each of `length` pixels gives to each of `wanted`: a triangle around its centre, at least a pixel wide."""
    step = length / wanted
    reach = max(step, 1.0)
    centres = (np.arange(wanted)[:, None] + 0.5) * step
    found = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres) / reach)
    return found / found.sum(axis=1, keepdims=True)


def resized(values: Values, size: tuple[int, int]) -> Values:
    """Antialiased bilinear in float64."""
    columns = (
        np.moveaxis(values.astype(np.float64), 1, 0)
        if size[1] == values.shape[1]
        else np.tensordot(weights(values.shape[1], size[1]), values.astype(np.float64), (1, 1))
    )
    return np.moveaxis(np.tensordot(columns, weights(values.shape[0], size[0]), (1, 1)), 2, 0)


@settings(deadline=None, max_examples=120)
@given(FIELDS, st.integers(1, 8), st.data())
def test_pictures_are_those_of_the_whole_image(
    shape: tuple[int, int, int, str], orientation: int, data: st.DataObject
) -> None:
    """A crop, mirrored and resized or not, its window reaching beyond, of an image stored in any orientation."""
    height, width, channels, dtype = shape
    values = noise(height, width, channels, dtype=dtype, seed=height)
    field = blocks.field_of(values)._replace(orientation=orientation)
    upright = turned(values, orientation)
    assert np.array_equal(decode.upright(record.parse(record.build([field]))[0]), upright)
    h, w = upright.shape[:2]
    y, x = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    box = Box(x, y, data.draw(st.integers(1, w - x)), data.draw(st.integers(1, h - y)))
    size = data.draw(st.just((box.height, box.width)) | st.tuples(st.integers(1, 60), st.integers(1, 60)))
    mirror = data.draw(st.booleans())
    window = data.draw(
        st.none() | st.builds(Box, st.integers(-20, 60), st.integers(-20, 60), st.integers(1, 70), st.integers(1, 70))
    )
    plan = Plan(box, size, window, mirror)
    out = np.full((*plan.output_size, channels), 77, dtype)
    decode.render(field, orientation, [plan], out)
    picture = upright[y : box.ends[0], x : box.ends[1]]
    picture = picture[:, ::-1] if mirror else picture
    exact = size == (box.height, box.width)
    picture = picture if exact else resized(picture, size)
    if window is not None:
        shown = np.zeros((window.height, window.width, channels))
        rows, columns = np.arange(window.height) + window.y, np.arange(window.width) + window.x
        inside = np.ix_((rows >= 0) & (rows < size[0]), (columns >= 0) & (columns < size[1]))
        shown[inside] = picture[rows[inside[0][:, 0]]][:, columns[inside[1][0]]]
        picture = shown
    assert np.abs(out.astype(np.float64) - picture).max() <= (0 if exact else 0.501)
    from_pixels = np.empty_like(out)
    decode.render(values, orientation, [plan], from_pixels)
    assert np.abs(from_pixels.astype(int) - out).max() <= (0 if exact else 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_tiny_size_is_resized_right(channels: int) -> None:
    """Single rows and columns, where kernels have their special cases."""
    for height, width, *size in itertools.product((1, 2, 5), (1, 2, 5), (1, 2, 3, 9), (1, 2, 3, 9)):
        values, out = noise(height, width, channels), np.empty((*size, channels), np.uint16)
        plan = Plan.whole((height, width)).resized((size[0], size[1]))
        assert plan is not None
        decode.render(values, 1, [plan], out)
        assert np.abs(out - resized(values, (size[0], size[1]))).max() <= 0.501, (height, width, size)


def test_large_noise_is_resized_within_a_level() -> None:
    """Where float32 would be 20 levels off: a large picture of neighbours that are far apart, made a little smaller."""
    values = noise(3000, 800, 1)
    out = np.empty((2999, 799, 1), np.uint16)
    plan = Plan.whole((3000, 800)).resized((2999, 799))
    assert plan is not None
    decode.render(values, 1, [plan], out)
    assert np.abs(out - resized(values, (2999, 799))).max() <= 0.501


def test_a_crop_reads_only_the_blocks_that_it_touches() -> None:
    """Damage elsewhere is not seen; where it is touched it is an error."""
    values = noise(2 * blocks.SIDE, 2 * blocks.SIDE, 1)
    field = blocks.field_of(values)
    damaged = field._replace(payload=bytes(field.payload)[:-9] + b"\0" + bytes(field.payload)[-8:])
    out = np.empty((blocks.SIDE, 2 * blocks.SIDE, 1), np.uint16)
    upper = Plan.whole(values.shape[:2]).cropped(Box(0, 0, 2 * blocks.SIDE, blocks.SIDE))
    lower = Plan.whole(values.shape[:2]).cropped(Box(0, blocks.SIDE, 2 * blocks.SIDE, blocks.SIDE))
    assert upper is not None
    assert lower is not None
    decode.render(damaged, 1, [upper], out)
    assert np.array_equal(out, values[: blocks.SIDE])
    with pytest.raises(ChecksumError):
        decode.render(damaged, 1, [lower], out)


@pytest.mark.parametrize(
    ("values", "dtype", "channels"),
    [
        (noise(9, 9, 1), np.uint8, 3),
        (noise(9, 9, 1), np.int16, 1),
        (noise(9, 9, 1, dtype=np.int16), np.uint16, 1),
        (noise(9, 9, 3), np.uint16, 1),
        (noise(9, 9, 2), np.uint16, 2),
        (noise(9, 9, 4), np.uint16, 3),
    ],
)
def test_a_record_that_is_not_of_its_store_s_form_is_an_error(values: Values, dtype: Any, channels: int) -> None:
    """Whatever a stranger's record holds, nothing is cut, wrapped or left unwritten in silence."""
    out = np.empty((9, 9, channels), dtype)
    with pytest.raises(DecodeError):
        decode.render(blocks.field_of(values), 1, [Plan.whole((9, 9))], out)


@settings(deadline=None, max_examples=60)
@given(FIELDS, st.integers(1, 8), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(1, 300), st.data())
def test_reduced_pictures_are_exact_means(
    shape: tuple[int, int, int, str], orientation: int, reduction: int, gray: bool, at_once: int, data: st.DataObject
) -> None:
    """Means of squares rounded half up, and luma, of any region, some rows at a time."""
    height, width, channels, dtype = shape
    values = noise(height, width, channels, dtype=dtype, seed=width)
    field = blocks.field_of(values)._replace(orientation=orientation)
    upright = turned(values, orientation).astype(np.float64)
    h, w = upright.shape[:2]
    y, x = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    box = Box(x, y, data.draw(st.integers(1, w - x)), data.draw(st.integers(1, h - y)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_PIXELS_AT_ONCE", at_once)
        got = decode.reduced(field, box, reduction, gray=gray)
    assert got.dtype == np.dtype(dtype)
    if gray and channels == 3:
        upright = np.rint(upright @ np.array([[0.299], [0.587], [0.114]]))
    top, left = y // reduction * reduction, x // reduction * reduction
    below, right = (min(-(-end // reduction) * reduction, side) for end, side in zip(box.ends, (h, w), strict=True))
    part = upright[top:below, left:right]
    means = np.array(
        [
            [part[r : r + reduction, c : c + reduction].mean(axis=(0, 1)) for c in range(0, part.shape[1], reduction)]
            for r in range(0, part.shape[0], reduction)
        ]
    )
    if gray and channels == 3:
        assert np.abs(got - means).max() <= 1.51  # luma is rounded before, in float32
    else:
        assert np.array_equal(got, np.floor(means + 0.5))


# --- datasets and loaders


@pytest.fixture(scope="module")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sixteen grey uint16 images of several sizes, in two classes."""
    root = tmp_path_factory.mktemp("deep")
    for number in range(16):
        (root / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (root / "images" / "ab"[number % 2] / f"{number:02}.png").write_bytes(png(scan(number)))
    pack(root / "images", root / "db.lmdb")
    return root / "db.lmdb"


def scan(number: int) -> Values:
    """A picture of smooth levels all over 16 bits."""
    rows, columns = np.indices((140 + number, 150))
    return ((rows * 311 + columns * (97 + number)) % 65536).astype(np.uint16)


def number_of(store: Store, index: int) -> int:
    return int(store.name(index)[2:4])


@pytest.fixture(scope="module")
def signed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of int16 images of one channel."""
    path = tmp_path_factory.mktemp("signed") / "db.lmdb"
    packed_arrays(path, [(scan(i).astype(np.int32) - 32768).astype(np.int16)[..., None] for i in range(6)])
    return path


AUGMENT = Compose([RandomResizedCrop(48), RandomHorizontalFlip()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 1, "worker_type": "process", "threads_per_worker": 2},
        {"num_workers": 1, "worker_type": "process"},
    ],
)
def test_batches_are_the_same_from_every_loader(deep_path: Path, options: dict[str, Any]) -> None:
    """uint16, channels-last, one buffer: those of torch's own loader, from threads and from processes."""
    dataset = ImageDataset(deep_path, AUGMENT, on_error="raise")
    stock = list(torch.utils.data.DataLoader(dataset, batch_size=5))
    found = list(fastload.DataLoader(dataset, batch_size=5, **options))
    for (images, labels), (expected, expected_labels) in zip(found, stock, strict=True):
        assert images.dtype == torch.uint16
        assert images.shape[1:] == (1, 48, 48)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_stock_workers_collate_16_bits(deep_path: Path) -> None:
    dataset = ImageDataset(deep_path, CenterCrop(32))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=1)
    images = torch.cat([images for images, _ in loader])
    assert images.dtype == torch.uint16
    store = dataset.store
    for index in range(16):
        values = scan(number_of(store, index))
        top, left = round((values.shape[0] - 32) / 2), 59
        assert np.array_equal(images[index, 0].numpy(), values[top : top + 32, left : left + 32])


def test_samples_of_other_sizes_are_padded_and_listed(deep_path: Path) -> None:
    dataset = ImageDataset(deep_path)
    listed, _ = next(iter(fastload.DataLoader(dataset, batch_size=4, collate_fn=fastload.collate.as_list)))
    padded, _, sizes = next(
        iter(fastload.DataLoader(dataset, batch_size=4, collate_fn=fastload.collate.pad(sizes=True, value=65535)))
    )
    assert padded.dtype == torch.uint16
    for image, (height, width), whole in zip(listed, sizes.tolist(), padded, strict=True):
        assert image.dtype == torch.uint16
        assert torch.equal(whole[:, :height, :width], image)
        assert (whole[:, height:].numpy() == 65535).all()


def test_the_cache_keeps_16_bits(deep_path: Path) -> None:
    """Pictures with and without it are equal; bytes are counted as what they are."""
    cache = fastload.ImageCache("10MB")
    dataset, plain = ImageDataset(deep_path, AUGMENT, cache=cache), ImageDataset(deep_path, AUGMENT)
    for _ in range(2):
        for index in range(16):
            assert torch.equal(dataset[index][0], plain[index][0])
    assert cache.hits == 16
    assert cache.nbytes == sum(2 * scan(number).size for number in range(16))


def test_image_types(deep_path: Path, signed_path: Path, stored: Callable[..., Store]) -> None:
    """Arrays, and PIL images of mode I;16, which have one channel and no sign."""
    array, _ = ImageDataset(deep_path, CenterCrop(20), image_type="numpy")[3]
    picture, _ = ImageDataset(deep_path, CenterCrop(20), image_type="pil")[3]
    assert (array.dtype, array.shape) == (np.uint16, (20, 20, 1))
    assert picture.mode == "I;16"
    assert np.array_equal(np.array(picture), array[..., 0])
    for path in (signed_path, stored({"a.png": png(RGB)}).path):
        with pytest.raises(ValueError, match="which PIL has no mode for; take 'tensor' or 'numpy'"):
            ImageDataset(path, image_type="pil")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_read_gives_floats(deep_path: Path, signed_path: Path, dtype: torch.dtype) -> None:
    """uint16 from 0 to 1, in 16-bit floats too; int16 as it is."""
    for path, scale in ((deep_path, 65535), (signed_path, 1)):
        dataset = ImageDataset(path)
        values = dataset.read(2)
        expected = (torch.from_numpy(values.numpy().astype(np.float64)) / scale).to(dtype)
        got = dataset.read(2, dtype=dtype)
        assert got.dtype == dtype
        assert torch.allclose(got, expected, rtol=1e-6, atol=0)
        with pytest.raises(ValueError, match=r"dtype is torch\.uint8; it may be torch\.u?int16, torch\.float32"):
            dataset.read(2, dtype=torch.uint8)


def test_read_gives_regions(deep_path: Path) -> None:
    dataset = ImageDataset(deep_path)
    values = scan(number_of(dataset.store, 5))
    assert np.array_equal(dataset.read(5, (100, 30, 40, 90))[0].numpy(), values[30:120, 100:140])
    small = dataset.read(5, (100, 30, 40, 90), reduce=2, gray=True)
    means = values[30:120, 100:140].astype(np.int64).reshape(45, 2, 20, 2).sum(axis=(1, 3))
    assert np.array_equal(small[0].numpy(), (means + 2) // 4)


def test_normalising(deep_path: Path, signed_path: Path) -> None:
    """uint16 in units of 65535, as torchvision scales it; int16 in its own. On its way to the device too."""
    for path, mean, std, scale in ((deep_path, 0.4, 0.3, 65535), (signed_path, 1000.0, 3000.0, 1)):
        images, _ = next(iter(fastload.DataLoader(ImageDataset(path, CenterCrop(24)), batch_size=4)))
        expected = (torch.from_numpy(images.numpy().astype(np.float64)) / scale - mean) / std
        assert torch.allclose(normalize(images, [mean], [std]).double(), expected, atol=1e-5)
        dataset = ImageDataset(path, Compose([CenterCrop(24), Normalize([mean], [std])]))
        normalised, _ = next(iter(fastload.DataLoader(dataset, batch_size=4)))
        assert torch.allclose(normalised.double(), expected, atol=1e-5)
        dataset = ImageDataset(path, CenterCrop(24))
        loader = fastload.make_loader(dataset, 4, train=False, device="cpu", num_workers=1, mean=[mean], std=[std])
        on_device, _ = next(iter(loader))
        assert on_device.dtype == torch.float32
        assert torch.allclose(on_device.double(), expected, atol=1e-5)
        plain, _ = next(iter(fastload.DevicePrefetcher(fastload.DataLoader(dataset, batch_size=4), "cpu")))
        assert torch.equal(plain, images)
        half, _ = next(
            iter(fastload.DevicePrefetcher(fastload.DataLoader(dataset, batch_size=4), "cpu", dtype=torch.float64))
        )
        assert torch.allclose(half, torch.from_numpy(images.numpy() / scale), atol=1e-6 if scale > 1 else 0)


def test_a_uint16_batch_without_the_channels_of_mean_is_an_error(deep_path: Path) -> None:
    loader = fastload.DataLoader(ImageDataset(deep_path, CenterCrop(24)), batch_size=4)
    with pytest.raises(ValueError, match="3 channels of mean"):
        next(iter(fastload.DevicePrefetcher(loader, "cpu", mean=[0.5] * 3, std=[0.5] * 3)))


def damaged_copy(path: Path, target: Path, index: int) -> Path:
    """A copy of a store in which one byte of an image's payload is another."""
    data = bytearray(path.read_bytes())
    payload = bytes(Store(path)[index]["image"].payload)
    place = data.index(payload[:64])
    data[place + len(payload) // 2] ^= 0xFF
    target.write_bytes(data)
    return target


def test_damage_gives_placeholders_and_is_found(deep_path: Path, signed_path: Path, tmp_path: Path) -> None:
    """Zeros of the store's type with label -100, another sample, or an error; verify names it."""
    for name, path in (("deep", deep_path), ("signed", signed_path)):
        damaged = damaged_copy(path, tmp_path / f"{name}.lmdb", 3)
        dataset = ImageDataset(damaged, Resize((20, 20)))
        image, label = dataset[3]
        assert image.dtype == getattr(torch, dataset.image_dtype.name)
        assert not image.numpy().any()
        assert label == -100
        assert ImageDataset(damaged, Resize((20, 20)), on_error="skip")[3][0].numpy().any()
        with pytest.raises(DecodeError, match="checksum"):
            ImageDataset(damaged, Resize((20, 20)), on_error="raise")[3]
        assert [damage.index for damage in verify(damaged, decode_images=True).damaged] == [3]
        assert statistics(damaged).failures == 1


def test_the_set_does_not_go_to_the_device(deep_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes images of 8 bits.*are uint16"):
        fastload.make_loader(deep_path, 4, train=True, device_resident=True)


def test_transforms_of_others_get_16_bits(deep_path: Path) -> None:
    dataset = ImageDataset(deep_path, Compose([CenterCrop(8), lambda image: image.to(torch.float32) + 1]))
    plain = ImageDataset(deep_path, CenterCrop(8))
    assert torch.equal(dataset[0][0], plain[0][0].float() + 1)


def test_crops_with_padding_are_zero_outside(signed_path: Path) -> None:
    dataset = ImageDataset(signed_path, RandomCrop(400, pad_if_needed=True), on_error="raise")
    image, _ = dataset[0]
    assert image.dtype == torch.int16
    assert (image[0, 0] == 0).all()
    assert int(image.amin()) < 0


# --- everything else


def test_statistics_are_exact(deep_path: Path, signed_path: Path) -> None:
    """Over all pixels: of uint16 in units of the full scale, of int16 in its own; min and max as they are."""
    for path, scale in ((deep_path, 65535), (signed_path, 1)):
        dataset = ImageDataset(path, image_type="numpy")
        values = np.concatenate([image.ravel() for image, _ in dataset]).astype(np.float64)
        found = statistics(path)
        assert found.mean == pytest.approx([values.mean() / scale], rel=1e-12)
        assert found.std == pytest.approx([values.std() / scale], rel=1e-9)
        assert (found.min, found.max) == ((int(values.min()),), (int(values.max()),))
        assert found.pixels == len(values)


def test_unpacked_values_are_the_same(deep_path: Path, signed_path: Path, tmp_path: Path) -> None:
    """uint16 as PNG, which packs to an equal store; int16 as .npy."""
    unpack(deep_path, tmp_path / "png")
    pack(tmp_path / "png", tmp_path / "again.lmdb")
    again, store = Store(tmp_path / "again.lmdb"), Store(deep_path)
    assert again.manifest["digest"] == store.manifest["digest"]
    unpack(signed_path, tmp_path / "npy")
    images = ImageDataset(signed_path, image_type="numpy")
    for index in range(6):
        values = np.load(tmp_path / "npy" / f"{index}.npy")
        assert values.dtype == np.int16
        assert np.array_equal(values, images[index][0][..., 0])


def test_an_unpacked_picture_is_upright(stored: Callable[..., Store], tmp_path: Path) -> None:
    exif = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    store = stored({"image.png": png(RGB, chunk(b"eXIf", exif + bytes(4)))})
    assert store[0]["image"].orientation == 6
    unpack(store.path, tmp_path / "out")
    shown = cv2.imread(str(tmp_path / "out" / "image.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(shown[..., ::-1], np.rot90(RGB, -1))


def test_info_and_show(deep_path: Path, signed_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bits are named; a picture's lowest level is black and its highest white."""
    for path, name in ((deep_path, "uint16"), (signed_path, "int16")):
        capsys.readouterr()
        assert cli.main(["info", str(path), "--json", "--stats"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["bits"], facts["dtype"]) == (16, name)
        assert cli.main(["info", str(path)]) == 0
        assert f"16 ({name})" in capsys.readouterr().out
        assert cli.main(["show", str(path), "-o", str(tmp_path / "sheet.png"), "--index", "0"]) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            shades = np.array(sheet)[8:168, 8:168].reshape(-1, 3)
        assert shades.min() <= 12
        assert len(np.unique(shades)) > 100


def test_repacking_keeps_every_value(
    deep_path: Path, signed_path: Path, stored: Callable[..., Store], tmp_path: Path
) -> None:
    """As it was, in another size (as the dataset's Resize would have it), and cut to 8 bits."""
    turned_path = stored(
        {"a.png": png(RGB, chunk(b"eXIf", b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, 8, 0, 0)))}
    )
    for number, path in enumerate((deep_path, signed_path, turned_path.path)):
        before = Store(path)
        pack(path, tmp_path / f"same{number}.lmdb")
        same = Store(tmp_path / f"same{number}.lmdb")
        assert (same.image_dtype, same.image_channels) == (before.image_dtype, before.image_channels)
        assert same.manifest["digest"] == before.manifest["digest"]
        pack(path, tmp_path / f"small{number}.lmdb", short_side=32)
        expected = ImageDataset(path, Resize(32), on_error="raise", image_type="numpy")
        small = ImageDataset(tmp_path / f"small{number}.lmdb", on_error="raise", image_type="numpy")
        for index in range(len(before)):
            assert np.array_equal(small[index][0], expected[index][0])
    report = pack(deep_path, tmp_path / "eight.lmdb", depth=8)
    assert report.notes[0].startswith("16 images of 16 bits were cut")
    eight, deep = Store(tmp_path / "eight.lmdb"), Store(deep_path)
    for index in range(16):
        assert np.array_equal(read(eight, index)[..., 1], read(deep, index) >> 8)
    pack(deep_path, tmp_path / "jpeg.lmdb", encode="jpeg")
    assert Store(tmp_path / "jpeg.lmdb")[0]["image"].codec == record.JPEG
    pack(deep_path, tmp_path / "raw.lmdb", encode="raw")
    assert "image" not in Store(tmp_path / "raw.lmdb").columns


def test_raw_and_one_size(stored: Callable[..., Store], tmp_path: Path) -> None:
    """encode="raw" keeps 16 bits in blocks; with depth 8 it makes a column of the same pictures' upper halves."""
    files = {f"{i}.png": png(noise(16, 16, seed=i)) for i in range(4)}
    deep, plain = stored(files, encode="raw"), stored(files, "plain.lmdb", encode="raw", depth=8)
    assert "image" not in deep.columns
    assert plain.columns["image"].shape == (16, 16, 3)
    pack(deep.path, tmp_path / "column.lmdb", encode="raw", depth=8)
    column = Store(tmp_path / "column.lmdb").columns["image"]
    for i in range(4):
        assert np.array_equal(read(deep, i), noise(16, 16, seed=i))
        assert np.array_equal(column[i][..., 0], noise(16, 16, seed=i) >> 8)


def test_masks_follow_images_of_16_bits(tmp_path: Path) -> None:
    """Pairs: every crop of the mask lies where the image's lies."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(scan(number)))
        mask = (scan(number) >> 13).astype(np.uint8)
        (tmp_path / "masks" / f"{number}.png").write_bytes(by_pillow(mask, "PNG"))
    pack(tmp_path / "images", tmp_path / "db.lmdb", masks=tmp_path / "masks")
    dataset = ImageDataset(
        tmp_path / "db.lmdb", Compose([RandomCrop(200, pad_if_needed=True), RandomHorizontalFlip()]), on_error="raise"
    )
    for images, masks in fastload.DataLoader(dataset, batch_size=2):
        assert (images.dtype, masks.dtype) == (torch.uint16, torch.uint8)
        pixels, values = images[:, 0].numpy(), masks.numpy()
        assert np.array_equal(pixels[values < 255] >> 13, values[values < 255])
        assert not pixels[values == 255].any()
    assert dataset.show([0]).size[0] > 100
    pack(tmp_path / "db.lmdb", tmp_path / "small.lmdb", short_side=50)
    assert ImageDataset(tmp_path / "small.lmdb")[0][1].shape == ImageDataset(tmp_path / "small.lmdb")[0][0].shape[1:]


@pytest.mark.parametrize("consumer", ["none", "network"])
def test_bench_runs(deep_path: Path, consumer: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(deep_path), "--seconds", "0.1", "--batch-size", "4", "--size", "32", "--json"]
    assert cli.main([*command, "--workers", "1", "--device", "cpu", "--consumer", consumer]) == 0
    assert json.loads(capsys.readouterr().out)


# --- the format


def image_field(**members: Any) -> dict[str, Any]:
    return {"name": "image", "kind": "image", "in": "record", **members}


@pytest.mark.parametrize(
    ("field", "sane"),
    [
        (image_field(), True),
        (image_field(dtype="uint8"), True),
        (image_field(dtype="uint16", channels=1), True),
        (image_field(dtype="int16", channels=3), True),
        (image_field(dtype="uint16", channels=2), False),
        (image_field(dtype="uint16", channels=True), False),
        (image_field(dtype="uint16", channels=1.0), False),
        (image_field(dtype="float32", channels=1), False),
        (image_field(dtype="object", channels=1), False),
        (image_field(dtype=["uint16"], channels=1), False),
        (image_field(dtype=None, channels=1), False),
        (image_field(dtype="uint16", channels=1) | {"in": "column"}, False),
    ],
)
def test_the_manifest_s_form_is_checked(field: dict[str, Any], sane: bool) -> None:
    columns = {"record": {"dtype": "<u8", "shape": [3], "rows_per_chunk": 1}}
    name = {"name": "name", "kind": "text", "in": "record"}
    manifest = {"fields": [field, name], "columns": columns, "classes": None, "count": 1, "digest": ""}
    if sane:
        check_manifest(manifest, "db.lmdb")
    else:
        with pytest.raises(StoreFormatError):
            check_manifest(manifest, "db.lmdb")


def test_golden_bytes_of_signed_values() -> None:
    """-32768 is kept as 0, 0 as 0x8000, 32767 as 0xFFFF; the record's flags say it."""
    for value, kept in ((-32768, "0000"), (0, "0080"), (32767, "ffff")):
        field = blocks.field_of(np.full((2, 3), value, np.int16))
        assert bytes(field.payload).hex() == kept
        assert field.flags == record.REENCODED | record.SIGNED == 3
        assert bytes(field.tiles[:2]) == b"\1\2"
        assert blocks.dtype_of(field) == np.int16
        assert (blocks.read(field) == value).all()
    with pytest.raises(DecodeError, match="none of version 1"):
        blocks.read(blocks.field_of(np.zeros((2, 3), np.uint8))._replace(flags=3))


class Grays(torch.utils.data.Dataset[Any]):
    """Grey arrays of 8 bits, of several sizes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Values, int]:
        if index >= 4:
            raise IndexError(index)
        return eight_bits(20 + index, 30, 1) // 8 + 100, index


def test_grey_pictures_that_were_made_jpegs_stay_one_channel(tmp_path: Path) -> None:
    pack(Grays(), tmp_path / "db.lmdb", quality=95)
    assert Store(tmp_path / "db.lmdb")[0]["image"].codec == record.JPEG
    for cache in (None, "1MB"):
        dataset = ImageDataset(tmp_path / "db.lmdb", cache=cache, on_error="raise", image_type="numpy")
        for index in range(4):
            picture, _ = dataset[index]
            assert picture.shape == (20 + index, 30, 1)
            assert np.abs(picture.astype(int) - Grays()[index][0]).max() < 16
            assert dataset.read(index, reduce=2).shape[0] == 1
    assert statistics(tmp_path / "db.lmdb").mean == pytest.approx([115.5 / 255], abs=0.01)
