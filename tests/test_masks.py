"""Masks: files to values, and plans carried out on them, against references that look at one pixel at a time."""

from __future__ import annotations

import copy
import functools
import io
import struct
import tracemalloc
import warnings
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from spied import Spied

from fastload import blocks, masks, record
from fastload.errors import ChecksumError, DecodeError
from fastload.geometry import Box, Plan, Size
from fastload.order import SampleRandom
from fastload.transforms import (
    CenterCrop,
    Compose,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomScale,
    Resize,
)

Values = npt.NDArray[Any]

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def _quiet_pillow() -> Any:
    """Pillow's remarks on damaged files; packing silences them too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def saved(image: Image.Image | Values, format: str, **options: Any) -> bytes:
    """The bytes of a file that Pillow writes."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format, **options)
    return out.getvalue()


def with_palette(values: Values) -> Image.Image:
    """Values as indices into a palette of colours that have nothing to do with them."""
    image = Image.fromarray(values)
    image.putpalette(bytes((7 * i + c * 31 + 200) % 256 for i in range(256) for c in range(3)))
    return image


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, step of rows, step of columns of each pass (PNG specification, 8.2)."""


def png(values: Values, depth: int = 8, colour: int = 3, interlaced: bool = False, transparent: bytes = b"") -> bytes:
    """A PNG written by hand. depth: bits of a value; colour: 0 grey, 3 palette."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def lines(part: Values) -> bytes:
        if not part.size:
            return b""
        bits = np.unpackbits(part.astype(">u2").view(np.uint8).reshape(*part.shape, 2), axis=2)[:, :, 16 - depth :]
        packed = np.packbits(bits.reshape(len(part), -1), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in packed)

    passes = [values[y::down, x::right] for y, x, down, right in ADAM7] if interlaced else [values]
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = bytes((11 * i + c * 50) % 256 for i in range(1 << min(depth, 8)) for c in range(3))
    parts = [chunk(b"IHDR", header), *([chunk(b"PLTE", palette)] if colour == 3 else [])]
    parts += [chunk(b"tRNS", transparent)] if transparent else []
    parts += [chunk(b"IDAT", zlib.compress(b"".join(map(lines, passes)))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def small(limit: int = 256, shape: Size = (13, 17), dtype: Any = np.uint8) -> Values:
    """Values from 0 to limit - 1, both among them where there is room."""
    values = np.random.default_rng(limit).integers(0, limit, shape).astype(dtype)
    values[0, 0], values[-1, -1] = 0, limit - 1
    return values


# --- files


GOOD: dict[str, tuple[bytes, Values]] = {
    "PNG": (saved(small(), "PNG"), small()),
    "BMP": (saved(small(), "BMP"), small()),
    "TIFF": (saved(small(), "TIFF"), small()),
    "TIFF deflated": (saved(small(), "TIFF", compression="tiff_deflate"), small()),
    "GIF": (saved(with_palette(small(20)), "GIF"), small(20)),
    "grey GIF": (saved(small(20), "GIF", optimize=False), small(20)),
    "PGM": (saved(small(), "PPM"), small()),
    "palette PNG": (saved(with_palette(small(20)), "PNG"), small(20)),
    "palette BMP": (saved(with_palette(small()), "BMP"), small()),
    "palette TIFF": (saved(with_palette(small(20)), "TIFF"), small(20)),
    "transparent palette PNG": (saved(with_palette(small(20)), "PNG", transparency=3), small(20)),
    "transparent grey PNG": (saved(small(20), "PNG", transparency=3), small(20)),
    "1 bit PNG": (saved(Image.fromarray(small(2).astype(bool)), "PNG"), small(2)),
    "1 bit BMP": (saved(Image.fromarray(small(2).astype(bool)), "BMP"), small(2)),
    "1 bit PBM": (saved(Image.fromarray(small(2).astype(bool)), "PPM"), small(2)),
    "1 bit TIFF": (saved(Image.fromarray(small(2).astype(bool)), "TIFF", compression="group4"), small(2)),
    "16 bit PNG": (saved(small(65536, dtype=np.uint16), "PNG"), small(65536, dtype=np.uint16)),
    "16 bit TIFF": (saved(small(65536, dtype=np.uint16), "TIFF"), small(65536, dtype=np.uint16)),
    "16 bit big-endian TIFF": (saved(small(300, dtype=">u2"), "TIFF"), small(300, dtype=np.uint16)),
    "16 bit PGM": (saved(small(65536, dtype=np.uint16), "PPM"), small(65536, dtype=np.uint16)),
    "16 bit PNG of small values": (saved(small(256, dtype=np.uint16), "PNG"), small()),
    "32 bit TIFF": (saved(small(65536, dtype=np.int32), "TIFF"), small(65536, dtype=np.uint16)),
    "32 bit TIFF of small values": (saved(small(7, dtype=np.int32), "TIFF"), small(7)),
}


@pytest.mark.parametrize("name", GOOD)
def test_files_of_values(name: str) -> None:
    """Every format and type that can hold values: these, as narrow as they go, whatever a palette shows."""
    data, expected = GOOD[name]
    got = masks.decode(data, LIMIT)
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("depth", "transparent"), [(1, b""), (2, b""), (4, b""), (8, b""), (2, b"\0\x80"), (8, b"\0")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (9, 13)])
def test_palette_pngs_of_any_depth_give_their_indices(
    shape: Size, depth: int, transparent: bytes, interlaced: bool
) -> None:
    values = small(1 << depth, shape)
    got = masks.decode(png(values, depth, 3, interlaced, transparent), LIMIT)
    assert got.dtype == np.uint8
    assert np.array_equal(got, values)


@pytest.mark.parametrize("depth", [8, 16])
def test_interlaced_grey_pngs(depth: int) -> None:
    values = small(1 << depth, (11, 10), np.uint16 if depth == 16 else np.uint8)
    assert np.array_equal(masks.decode(png(values, depth, 0, interlaced=True), LIMIT), values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(Image.new("LA", (4, 3)), "PNG"), r"2 channels \(LA\); a mask has one"),
        (saved(Image.new("PA", (4, 3)), "TIFF"), r"2 channels \(PA\)"),
        (saved(Image.new("RGB", (4, 3)), "PNG"), r"3 channels \(RGB\).*are image and mask swapped"),
        (saved(Image.new("RGBA", (4, 3)), "PNG"), r"4 channels \(RGBA\)"),
        (saved(Image.new("RGB", (4, 3)), "BMP"), r"3 channels \(RGB\)"),
        (saved(Image.new("RGB", (4, 3)), "PPM"), r"3 channels \(RGB\)"),
        (saved(Image.new("CMYK", (4, 3)), "TIFF"), r"4 channels \(CMYK\)"),
        (saved(Image.new("RGB", (4, 3)), "WEBP"), r"3 channels \(RGB\)"),
        (saved(Image.new("RGB", (4, 3)), "WEBP", lossless=True), r"3 channels \(RGB\)"),
        (saved(Image.new("F", (4, 3)), "TIFF"), "whole numbers .* got float32"),
        (saved(Image.new("RGB", (4, 3)), "JPEG"), "a JPEG, which changes values; save it as PNG"),
        (saved(Image.new("L", (4, 3)), "JPEG"), "a JPEG, which changes values"),
        (saved(Image.new("L", (8, 8)), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))]), "a JPEG, which"),
        (saved(Image.new("L", (16, 16)), "TIFF", compression="jpeg"), "a JPEG, which changes values"),
        (saved(np.full((3, 4), 65536, np.int32), "TIFF"), "0 to 65535, got 65536 to 65536"),
        (saved(np.full((3, 4), -1, np.int32), "TIFF"), "0 to 65535, got -1 to -1"),
        (b"", "is no image|is damaged"),
        (b"no image at all", "is no image|is damaged"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no image|is damaged"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_is_no_mask_is_refused(data: bytes, message: str) -> None:
    """Colours, alpha, fractions, values out of range, lossy files, no image: a DecodeError that says which."""
    with pytest.raises(DecodeError, match=message):
        masks.decode(data, LIMIT)


def test_the_limit_of_pixels() -> None:
    """A mask at the limit is read, and one beyond refused by its header: no room is made for 60,000 x 60,000."""
    assert masks.decode(saved(small(shape=(10, 10)), "PNG"), 100).shape == (10, 10)
    with pytest.raises(DecodeError, match="the mask has 10 x 11 pixels, the limit is 109"):
        masks.decode(saved(small(shape=(11, 10)), "PNG"), 109)
    whole = png(small(shape=(10, 10)))
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + whole[24:29]
    huge = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    tracemalloc.start()
    try:
        for limit in (LIMIT, 1 << 28):
            with pytest.raises(DecodeError):
                masks.decode(huge, limit)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", GOOD)
def test_a_file_cut_short_is_refused_or_whole(name: str) -> None:
    """At any length: a DecodeError, or where only the file's trailer is missing, the values."""
    data, expected = GOOD[name]
    refused = 0
    for length in {*range(0, len(data), 1 + len(data) // 150), *range(max(0, len(data) - 20), len(data))}:
        try:
            got = masks.decode(data[:length], LIMIT)
        except DecodeError:
            refused += 1
            continue
        assert np.array_equal(got, expected)
    assert refused > min(len(data), 150) * 0.6


def test_no_bit_of_a_png_flips_unnoticed() -> None:
    """Its own checksums cover all that counts: a DecodeError for each bit, interlaced or not."""
    values = small(4, (6, 5))
    for interlaced in (False, True):
        data = png(values, 2, 3, interlaced)
        for place in range(8 * len(data)):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            try:
                got = masks.decode(bytes(changed), LIMIT)
            except DecodeError:
                continue
            assert place >= 8 * (len(data) - 12), "the last chunk, which is empty"
            assert np.array_equal(got, values)


MAGIC = [
    b"",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"BM",
    b"GIF89a",
    b"II*\0\x08\0\0\0",
    b"MM\0*",
    b"P5 ",
    b"RIFF",
    b"\xff\xd8",
]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_any_bytes_are_values_or_a_decode_error(magic: bytes, rest: bytes) -> None:
    """No other exception comes out of any parser."""
    try:
        got = masks.decode(magic + rest, LIMIT)
    except DecodeError:
        return
    assert got.dtype in (np.uint8, np.uint16)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_files_are_values_or_a_decode_error(name: str, changes: list[tuple[float, int]]) -> None:
    """Real files with a few bytes replaced: no other exception, and a PNG's values are right if it gives any."""
    data, expected = GOOD[name]
    changed = bytearray(data)
    for share, byte in changes:
        changed[int(share * len(data))] = byte
    try:
        got = masks.decode(bytes(changed), LIMIT)
    except DecodeError:
        return
    assert got.ndim == 2
    assert "PNG" not in name or np.array_equal(got, expected)


# --- values


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([[0, 255]], np.int64), np.uint8),
        (np.array([[0, 256]], np.int64), np.uint16),
        (np.array([[0, 65535]], np.uint64), np.uint16),
        (np.array([[0, 127]], np.int8), np.uint8),
        (np.array([[0, 32767]], np.int16), np.uint16),
        (np.array([[True, False]]), np.uint8),
        (np.array([[1, 2]], ">u2"), np.uint8),
        (np.array([[1, 259]], ">u2"), np.uint16),
        (np.zeros((0, 3), np.int64), np.uint8),
    ],
)
def test_narrowed_takes_the_least_type(values: Values, dtype: Any) -> None:
    got = masks.narrowed(values)
    assert got.dtype == dtype
    assert got.dtype.isnative
    assert np.array_equal(got, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, -1]]), "0 to 65535, got -1 to 0"),
        (np.array([[-1, 0]], np.int8), "got -1 to 0"),
        (np.array([[7, 65536]]), "got 7 to 65536"),
        (np.array([[2**63]], np.uint64), "got 9223372036854775808"),
        (np.array([[0.0]]), r"whole numbers \(height, width\), got float64 \(1, 1\)"),
        (np.array([["a"]]), "whole numbers"),
        (np.array([[None]]), "whole numbers"),
        (np.zeros((2, 2, 1), np.uint8), r"got uint8 \(2, 2, 1\)"),
        (np.zeros(3, np.uint8), r"got uint8 \(3,\)"),
    ],
)
def test_narrowed_refuses_the_rest(values: Values, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        masks.narrowed(values)


# --- plans: the reference looks for the nearest pixel, one at a time

FILL = 65535


@functools.cache
def nearest(place: int, new: int, old: int) -> list[int]:
    """Which of `old` pixels have their centre nearest to that of one of `new`: one, or two as near as each other."""
    centre = Fraction(2 * place + 1, 2 * new)
    distances = [abs(Fraction(2 * i + 1, 2 * old) - centre) for i in range(old)]
    return [i for i, distance in enumerate(distances) if distance == min(distances)]


def source_of(y: int, x: int, plans: list[Plan]) -> tuple[int, int] | None:
    """The pixel of the mask that a pixel of the result shows: of two as near, the one below or to the right."""
    for plan in reversed(plans):
        if plan.window is not None:
            y, x = y + plan.window.y, x + plan.window.x
        if not (0 <= y < plan.size[0] and 0 <= x < plan.size[1]):
            return None
        y = nearest(y, plan.size[0], plan.box.height)[-1]
        x = nearest(x, plan.size[1], plan.box.width)[-1]
        if plan.mirror:
            x = plan.box.width - 1 - x
        y, x = y + plan.box.y, x + plan.box.x
    return y, x


def expected_of(values: Values, plans: list[Plan], fill: int = FILL) -> Values:
    """What `plans` make of a mask, pixel by pixel."""
    out = np.empty(plans[-1].output_size, np.int32)
    for y, x in np.ndindex(out.shape):
        place = source_of(y, x, plans)
        out[y, x] = fill if place is None else values[place]
    return out


def rendered(values: Values, plans: list[Plan], fill: int = FILL, dtype: Any = np.int32) -> Values:
    out = np.full(plans[-1].output_size, 12345 % (np.iinfo(dtype).max + 1), dtype)
    masks.render(blocks.field_of(values), values.shape, plans, out, fill)  # type: ignore[arg-type]
    return out


def numbered(height: int, width: int) -> Values:
    """A mask whose values are all different."""
    return np.arange(height * width, dtype=np.uint16).reshape(height, width)


lengths = st.integers(1, 36)
sizes = st.tuples(lengths, lengths)
paddings = st.none() | st.integers(0, 12) | st.tuples(st.integers(0, 9), st.integers(0, 9))
transforms = st.one_of(
    st.builds(Resize, sizes | st.integers(1, 30)),
    st.builds(Resize, st.tuples(lengths, st.none()) | st.tuples(st.none(), lengths)),
    st.builds(CenterCrop, sizes),
    st.builds(lambda size, padding: RandomCrop(size, padding, pad_if_needed=True), sizes, paddings),
    st.builds(RandomScale, st.sampled_from([(0.3, 0.9), (1.0, 1.0), (0.5, 2.0), (1.5, 1.7)])),
    st.builds(RandomHorizontalFlip, st.sampled_from([0.0, 1.0, 0.5])),
    st.builds(RandomResizedCrop, sizes, st.sampled_from([(0.08, 1.0), (0.5, 0.5)])),
)
chains = st.lists(transforms, max_size=5)
indices = st.integers(0, 1 << 40)


def bounded(chain: list[Any], size: Size, index: int) -> list[Plan]:
    """The plans of a chain, if they stay small enough for the reference."""
    plans = Compose(chain).plans(size, SampleRandom(1, 0, index))
    return plans if all(max(plan.size) <= 120 and max(plan.output_size) <= 60 for plan in plans) else []


@settings(deadline=None, max_examples=150)
@given(chains, sizes, indices)
@example([CenterCrop(36), Resize((5, 7)), RandomHorizontalFlip(1.0)], (20, 11), 0)
@example([RandomCrop(30, 12), RandomScale((0.4, 0.4)), RandomCrop(9, 9), RandomHorizontalFlip(1.0)], (30, 30), 3)
@example([RandomCrop(2, 12)], (1, 1), 1)
@example([RandomCrop(2, 12), Resize(9), RandomCrop(40, pad_if_needed=True), RandomHorizontalFlip(1.0)], (2, 3), 5)
def test_plans_show_what_the_reference_shows(chain: list[Any], size: Size, index: int) -> None:
    """Any geometric transforms in any number and order, several plans included: the same values, pixel for pixel."""
    plans = bounded(chain, size, index)
    if not plans:
        return
    values = numbered(*size)
    got = rendered(values, plans)
    assert np.array_equal(got, expected_of(values, plans))
    assert set(np.unique(got)) <= {*values.ravel().tolist(), FILL}


def sources_step_by_step(chain: list[Spied], size: Size, axis: int) -> list[set[int]]:
    """Which rows or columns each one of the result may show, -1 for none, going from picture to picture."""
    shown: list[set[int]] = [{i} for i in range(size[axis])]
    for spied in chain:
        plan = spied.transform.plan(Plan.whole(size), copy.copy(spied.chance))
        window = plan.window or Box(0, 0, plan.size[1], plan.size[0])
        start, length = (plan.box.y, plan.box.height) if axis == 0 else (plan.box.x, plan.box.width)
        first, count = (window.y, window.height) if axis == 0 else (window.x, window.width)
        shown = shown[start : start + length]
        if plan.mirror and axis == 1:
            shown = shown[::-1]
        new = plan.size[axis]
        shown = [set().union(*(shown[i] for i in nearest(place, new, length))) for place in range(new)]
        shown = [shown[place] if 0 <= place < new else {-1} for place in range(first, first + count)]
        size = plan.output_size
    return shown


@settings(deadline=None, max_examples=150)
@given(chains, sizes, indices)
@example([Resize((8, 8)), RandomHorizontalFlip(1.0)], (16, 16), 0)
@example([Resize((9, 9)), RandomCrop(5, 3), RandomHorizontalFlip(1.0), RandomResizedCrop(7)], (16, 16), 0)
def test_chains_show_what_their_steps_show_one_by_one(chain: list[Any], size: Size, index: int) -> None:
    """Folding transforms into few plans changes nothing but which of two equally near pixels is taken."""
    spied = [Spied(transform) for transform in chain]
    plans = bounded(spied, size, index)
    if not plans:
        return
    got = rendered(numbered(*size), plans)
    rows, columns = (sources_step_by_step(spied, size, axis) for axis in (0, 1))
    assert got.shape == (len(rows), len(columns))
    for (y, x), value in np.ndenumerate(got):
        if value == FILL:
            assert -1 in rows[y] | columns[x]
        else:
            assert value // size[1] in rows[y]
            assert value % size[1] in columns[x]


def test_resizes_are_torchs_nearest_exact() -> None:
    """For all pairs of lengths up to 48, but where two pixels are equally near and float32 decides."""
    ties = 0
    for old in range(1, 49):
        values = numbered(1, old)
        for new in range(1, 49):
            plan = Plan.whole((1, old)).resized((1, new))
            assert plan is not None
            got = rendered(values, [plan])[0]
            torchs = F.interpolate(torch.from_numpy(values.astype(np.float64))[None], new, mode="nearest-exact")[0, 0]
            for place in np.flatnonzero(got != torchs.numpy()).tolist():
                assert len(nearest(place, new, old)) == 2
                assert int(torchs[place]) in nearest(place, new, old)
                ties += 1
            assert np.array_equal(masks.resized(values, (1, new))[0], got)
    assert ties < 48 * 48 // 4


@settings(deadline=None, max_examples=100)
@given(sizes, sizes)
def test_resized_is_a_plain_resize(size: Size, target: Size) -> None:
    """What packing does where images are shrunk: the same pixels that a plan would show."""
    values = numbered(*size)
    kept = values.copy()
    plan = Plan.whole(size).resized(target)
    assert plan is not None
    assert np.array_equal(masks.resized(values, target), expected_of(values, [plan]))
    assert np.array_equal(values, kept)


@settings(deadline=None, max_examples=100)
@given(sizes, st.integers(-40, 40), st.integers(-40, 40), sizes, st.booleans())
@example((5, 5), 5, 0, (2, 2), False)
@example((5, 5), -2, 0, (5, 2), True)
def test_crops_are_slices_of_a_padded_mask(size: Size, x: int, y: int, crop: Size, mirror: bool) -> None:
    """A box anywhere, in part or wholly beyond the edge: NumPy's padding, slicing and flipping."""
    values = numbered(*size)
    whole = Plan.whole(size).mirrored() if mirror else Plan.whole(size)
    plan = whole.cropped(Box(x, y, crop[1], crop[0]))
    assert plan is not None
    wide = np.pad(values[:, ::-1] if mirror else values, 80, constant_values=FILL)
    assert np.array_equal(rendered(values, [plan]), wide[80 + y : 80 + y + crop[0], 80 + x : 80 + x + crop[1]])


@pytest.mark.parametrize(("dtype", "fill"), [(np.uint8, 255), (np.uint8, 0), (np.int32, 255), (np.int32, 65535)])
def test_beyond_the_mask_lies_the_fill(dtype: Any, fill: int) -> None:
    """In the type of the batch, everywhere but where the mask is, whatever lay in its memory before."""
    values = small(9, (4, 5))
    plan = Plan.whole((4, 5)).cropped(Box(-2, -1, 12, 9))
    assert plan is not None
    got = rendered(values, [plan], fill, dtype)
    assert got.dtype == dtype
    expected = np.full((9, 12), fill)
    expected[1:5, 2:7] = values
    assert np.array_equal(got, expected)
    away = Plan.whole((4, 5)).cropped(Box(100, 0, 3, 3))
    assert away is not None
    assert (rendered(values, [away], fill, dtype) == fill).all()


def test_large_masks_across_blocks() -> None:
    """Crops, resizes and flips of a mask of 3 x 3 blocks, against NumPy."""
    values = numbered(300, 217)
    crop = Plan.whole((300, 217)).cropped(Box(100, 90, 80, 130))
    assert crop is not None
    assert np.array_equal(rendered(values, [crop]), values[90:220, 100:180])
    assert np.array_equal(rendered(values, [crop.mirrored()]), values[90:220, 179:99:-1])
    half = Plan.whole((300, 217)).resized((150, 217))
    assert half is not None
    assert np.array_equal(rendered(values, [half]), values[1::2])
    assert np.array_equal(rendered(values, [half.mirrored()]), values[1::2, ::-1])


def test_rendering_changes_neither_its_field_nor_its_plans() -> None:
    """And what it writes is a copy: a constant mask, a whole one and a crop can be changed freely."""
    for values in (np.full((20, 30), 4, np.uint8), small(9, (20, 30))):
        field = blocks.field_of(values)
        plans = [Plan.whole((20, 30)).mirrored()]
        for _ in range(2):
            out = np.empty((20, 30), np.uint8)
            masks.render(field, (20, 30), plans, out, 255)
            assert np.array_equal(out, values[:, ::-1])
            out += 1


# --- damage


def whole_plan(size: Size) -> list[Plan]:
    return [Plan.whole(size)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 6}, "the mask is 5 x 6 pixels, its image 5 x 4"),
        ({"width": 4, "height": 5}, "the mask is 4 x 5 pixels, its image 5 x 4"),
        ({"channels": 3}, "the mask is 5 x 4"),
        ({"codec": record.RAW}, "the mask is 5 x 4"),
        ({"codec": record.TEXT}, "the mask is 5 x 4"),
        ({"tiles": b""}, "cut short"),
    ],
)
def test_another_field_is_refused(change: dict[str, Any], message: str) -> None:
    """What is no mask of the image's size, whatever the store says of it."""
    field = blocks.field_of(small(9, (4, 5)))._replace(**change)
    with pytest.raises(DecodeError, match=message):
        masks.render(field, (4, 5), whole_plan((4, 5)), np.empty((4, 5), np.uint8), 255)


def test_values_that_do_not_fit_the_batch_are_refused() -> None:
    """A mask of two-byte values where the store's column says one: an error, not their low bytes."""
    field = blocks.field_of(np.full((4, 5), 300, np.uint16))
    with pytest.raises(DecodeError, match="values above 255"):
        masks.render(field, (4, 5), whole_plan((4, 5)), np.empty((4, 5), np.uint8), 255)


def test_only_what_is_shown_is_read() -> None:
    """Damage in a block that the crop does not touch goes unnoticed, and elsewhere is an error."""
    values = np.random.default_rng(0).integers(0, 9, (256, 256), np.uint8)
    field = blocks.field_of(values)
    payload = bytes(field.payload)
    damaged = field._replace(payload=payload[:-5] + bytes((payload[-5] ^ 1,)) + payload[-4:])
    for box, whole in ((Box(0, 0, 128, 256), True), (Box(127, 127, 2, 2), False)):
        plan = Plan.whole((256, 256)).cropped(box)
        assert plan is not None
        out = np.empty(plan.output_size, np.uint8)
        if whole:
            masks.render(damaged, (256, 256), [plan], out, 255)
            assert np.array_equal(out, values[:, :128])
        else:
            with pytest.raises(ChecksumError):
                masks.render(damaged, (256, 256), [plan], out, 255)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_pngs_of_few_bits_give_their_values(depth: int) -> None:
    """Pillow spreads them over 0 to 255."""
    values = np.arange(24, dtype=np.uint8).reshape(3, 8) % (1 << depth)
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(3, -1)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 8, 3, depth, 0, 0, 0, 0), b"IDAT": zlib.compress(lines), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )
    np.testing.assert_array_equal(masks.decode(data, 100), values)


@pytest.mark.parametrize("largest", [255, 65535, 20])
def test_pgms_are_masks_where_their_values_are_not_shades(largest: int) -> None:
    """One whose largest value is another comes scaled from Pillow: it is refused."""
    values = bytes((0, 1, 0, 7)) if largest > 255 else bytes((1, 7))
    data = b"P5 # a comment\n2 1\n%d\n" % largest + values
    if largest == 20:
        with pytest.raises(DecodeError, match="PGM of values up to 20"):
            masks.decode(data, 100)
    else:
        assert masks.decode(data, 100).tolist() == [[1, 7]]
