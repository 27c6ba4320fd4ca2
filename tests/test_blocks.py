"""Blocks: what goes in comes out, whole and box by box, and damaged bytes give errors, never other values."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import blocks, record
from fastload.blocks import SIDE
from fastload.errors import ChecksumError, DecodeError, FastloadError
from fastload.geometry import Box
from fastload.record import Field

Values = npt.NDArray[Any]

KINDS = ("constant", "noise", "regions", "ramp", "channels")
lengths = st.sampled_from([1, 2, 3, 127, 128, 129, 200, 255, 256, 257]) | st.integers(1, 300)
dtypes = st.sampled_from([np.uint8, np.uint16])
channel_counts = st.sampled_from([None, 1, 2, 3, 4])
kinds = st.sampled_from(KINDS)


def field(
    codec_payload: bytes, shape: tuple[int, int, int], side: int, rows: list[tuple[int, int]], size: int
) -> Field:
    """A field of (height, width, channels) written by hand: its payload, and the index with these lengths and sums."""
    height, width, channels = shape
    index = struct.pack("<BBH", 1, size, side) + b"".join(struct.pack("<II", *row) for row in rows)
    return Field(record.BLOCKS, codec_payload, 1, channels, 1, width, height, index)


def hand_made(shape: tuple[int, int, int], side: int, parts: list[bytes], size: int = 1) -> Field:
    """A field of these blocks, with right lengths and checksums."""
    return field(b"".join(parts), shape, side, [(len(part), lower_half(part)) for part in parts], size)


def lower_half(data: bytes) -> int:
    return int(xxhash.xxh3_64(data).intdigest()) & 0xFFFFFFFF


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def values_of(kind: str, height: int, width: int, channels: int | None, dtype: Any, seed: int = 0) -> Values:
    """Values of one kind: (height, width) without channels, else (height, width, channels)."""
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels is None else (height, width, channels)
    largest = np.iinfo(dtype).max
    if kind == "noise":
        return rng.integers(0, largest, shape, dtype, endpoint=True)
    if kind == "ramp":
        return (np.arange(np.prod(shape)) % (largest + 1)).astype(dtype).reshape(shape)
    if kind == "regions":
        return np.kron(values_of("noise", -(-height // 60), -(-width // 60), channels, dtype, seed), _cells(shape))[
            :height, :width
        ]
    values = np.empty(shape, dtype)
    values[...] = rng.integers(0, largest, shape[2:] if kind == "channels" else (), dtype, endpoint=True)
    return values


def _cells(shape: tuple[int, ...]) -> Values:
    return np.ones((60, 60, 1)[: len(shape)], np.uint8)


def assert_same(got: Values, expected: Values) -> None:
    """Equal in values, shape and type; one channel comes without its axis."""
    if expected.ndim == 3 and expected.shape[2] == 1:
        expected = expected[..., 0]
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


def stored(values: Values) -> Field:
    """The field as a record gives it back."""
    (parsed,) = record.parse(record.build([blocks.field_of(values)]))
    return parsed


# --- what goes in comes out


@settings(deadline=None, max_examples=150)
@given(kinds, lengths, lengths, channel_counts, dtypes, st.integers(0, 9), st.data())
@example("noise", 1, 1, 4, np.uint16, 0, None)
@example("noise", 129, 257, None, np.uint16, 0, None)
@example("noise", 128, 128, 3, np.uint8, 0, None)
def test_values_come_back_whole_and_box_by_box(
    kind: str, height: int, width: int, channels: int | None, dtype: Any, seed: int, data: st.DataObject | None
) -> None:
    """Every type, shape and size around the blocks' own; every box equals the slice."""
    values = values_of(kind, height, width, channels, dtype, seed)
    kept = values.copy()
    got = stored(values)
    assert (got.width, got.height, got.channels, got.orientation) == (width, height, channels or 1, 1)
    assert blocks.dtype_of(got) == values.dtype
    assert_same(blocks.read(got), values)
    assert np.array_equal(values, kept)
    for _ in range(3 if data else 0):
        assert data is not None
        y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        box = Box(x, y, data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y)))
        assert_same(blocks.read(got, box), values[box.y : box.ends[0], box.x : box.ends[1]])


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), channel_counts, dtypes)
def test_tiny_fields_come_back(data: st.DataObject, height: int, width: int, channels: int | None, dtype: Any) -> None:
    """Few pixels, where a stream is hardly longer than a pixel: any values at all, extremes preferred."""
    shape = (height, width) if channels is None else (height, width, channels)
    one = st.sampled_from([0, 1, 255, int(np.iinfo(dtype).max)]) | st.integers(0, int(np.iinfo(dtype).max))
    count = int(np.prod(shape))
    values = np.array(data.draw(st.lists(one, min_size=count, max_size=count)), dtype).reshape(shape)
    assert_same(blocks.read(stored(values)), values)


def test_every_box_of_a_small_field_is_the_slice() -> None:
    """All boxes with edges near those of the blocks."""
    values = values_of("ramp", 2 * SIDE + 3, SIDE + 2, None, np.uint16)
    got = stored(values)
    rows, columns = (0, 1, SIDE - 1, SIDE, SIDE + 1, 2 * SIDE, 2 * SIDE + 3), (0, 1, SIDE - 1, SIDE, SIDE + 1, SIDE + 2)
    boxes = [
        Box(x, y, right - x, below - y) for y in rows for below in rows for x in columns for right in columns
        if y < below and x < right
    ]  # fmt: skip
    assert len(boxes) == 21 * 15
    for box in boxes:
        assert np.array_equal(blocks.read(got, box), values[box.y : box.ends[0], box.x : box.ends[1]])


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[::-1],
        lambda v: v[:, ::-2],
        lambda v: v.T,
        np.asfortranarray,
        lambda v: v.astype(v.dtype.newbyteorder(">")),
    ],
)
def test_values_in_any_memory_layout(change: Any) -> None:
    """Turned, strided, column by column or big-endian in memory: the values count."""
    values = change(values_of("noise", 150, 140, None, np.uint16))
    got = blocks.read(stored(values))
    assert got.dtype == np.uint16
    assert np.array_equal(got, values)


def test_read_only_values_are_packed_and_what_is_read_may_be_changed() -> None:
    values = values_of("regions", 140, 140, None, np.uint8)
    values.flags.writeable = False
    got = stored(values)
    first = blocks.read(got)
    first += 1
    assert np.array_equal(blocks.read(got), values)


# --- the format


def test_golden_bytes() -> None:
    """A field of 3 x 2 values, as the docstring says it: one block, stored here as DEFLATE without compression."""
    values = np.array([[1, 2], [3, 4], [5, 6]], np.uint8)
    stream = bytes((1, 6, 0, 0xF9, 0xFF)) + values.tobytes()  # RFC 1951: last block, stored, its length and complement
    made = hand_made((3, 2, 1), 128, [stream])
    assert made.tiles[:4] == b"\x01\x01\x80\x00"
    assert np.array_equal(blocks.read(made), values)
    got = blocks.field_of(values)
    assert (got.codec, got.orientation, got.channels, got.flags, got.width, got.height) == (5, 1, 1, 1, 2, 3)
    assert zlib.decompress(got.payload, -15) == bytes((1, 2, 3, 4, 5, 6))
    assert bytes(got.tiles) == b"\x01\x01\x80\x00" + struct.pack("<II", len(got.payload), lower_half(got.payload))


def test_golden_bytes_of_constants() -> None:
    """All bytes of a field of four blocks, each of one value: two bytes each, little-endian."""
    values = np.zeros((129, 130), np.uint16)
    values[:128, :128], values[:128, 128:], values[128:, :128], values[128:, 128:] = 0x0102, 7, 0xFFFE, 0
    got = blocks.field_of(values)
    assert bytes(got.payload).hex() == "02010700feff0000"
    lengths_and_sums = "0200000078ef537c02000000ec0edfee0200000037e3a95d020000000555281f"
    assert bytes(got.tiles).hex() == "01028000" + lengths_and_sums


def test_two_bytes_are_low_bytes_then_high_bytes_and_channels_come_last() -> None:
    values = np.arange(0x0101, 0x0101 + 2 * 2 * 3, dtype=np.uint16).reshape(2, 2, 3)
    values[0, 0, 0] = 0xABCD
    got = blocks.field_of(values)
    low, high = bytes((0xCD, *range(2, 13))), bytes((0xAB, *[1] * 11))
    assert zlib.decompress(got.payload, -15) == low + high
    assert np.array_equal(blocks.read(hand_made((2, 2, 3), 128, [deflated(low + high)], size=2)), values)


@pytest.mark.parametrize("side", [1, 2, 5, 128, 129, 4096])
def test_the_side_is_read_from_the_index(side: int) -> None:
    """Blocks of any side up to the limit: version 1 says it in each index."""
    values = values_of("ramp", 7, 9, None, np.uint8)
    parts = [values[y : y + side, x : x + side].tobytes() for y in range(0, 7, side) for x in range(0, 9, side)]
    made = hand_made((7, 9, 1), side, [part if len(part) == 1 else deflated(part) for part in parts])
    assert np.array_equal(blocks.read(made), values)
    assert np.array_equal(blocks.read(made, Box(1, 2, 6, 4)), values[2:6, 1:7])


@pytest.mark.parametrize(("channels", "dtype"), [(None, np.uint8), (None, np.uint16), (3, np.uint8), (4, np.uint16)])
def test_a_constant_block_takes_one_pixels_bytes(channels: int | None, dtype: Any) -> None:
    """So a mask of large regions is a few bytes; a block with one other pixel is a stream, longer than a pixel."""
    values = values_of("channels", 3 * SIDE, 2 * SIDE + 1, channels, dtype, seed=4)
    pixel = (channels or 1) * np.dtype(dtype).itemsize
    assert len(blocks.field_of(values).payload) == 9 * pixel
    values[SIDE + 5, 7] = 1
    changed = blocks.field_of(values)
    assert 9 * pixel < len(changed.payload) < 9 * pixel + 400
    assert_same(blocks.read(changed), values)


def test_no_stream_is_taken_for_a_constant() -> None:
    """A pixel of eight bytes, as long as some streams and longer than others: these get zeros behind them."""
    natural = set()
    for y, x, channel, value in itertools.product(range(3), range(3), range(4), (1, 0x100, 0x101, 0xFFFE)):
        values = np.zeros((3, 3, 4), np.uint16)
        values[y, x, channel] = value
        got = blocks.field_of(values)
        assert len(got.payload) > 8
        assert np.array_equal(blocks.read(got), values)
        low_and_high = values.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()
        natural.add(len(deflated(low_and_high)))
    assert {7, 8, 9} <= natural


# --- damage


def small_fields() -> list[tuple[Values, Field]]:
    regions = np.zeros((130, 129), np.uint8)
    regions[40:60, 30:50] = 3
    noise = values_of("noise", 5, 4, None, np.uint16)
    colours = values_of("noise", 3, 3, 3, np.uint8)
    return [(values, blocks.field_of(values)) for values in (regions, noise, colours)]


@pytest.mark.parametrize("number", range(3))
def test_each_bit_that_flips_is_an_error(number: int) -> None:
    """In the payload a checksum error, in the index an error; where what is read is right all the same, it is right."""
    values, whole = small_fields()[number]
    for place in range(8 * len(whole.payload)):
        with pytest.raises(ChecksumError):
            blocks.read(whole._replace(payload=flipped(bytes(whole.payload), place)))
    for place in range(8 * len(whole.tiles)):
        try:
            got = blocks.read(whole._replace(tiles=flipped(bytes(whole.tiles), place)))
        except (ChecksumError, DecodeError):
            continue
        assert 16 <= place < 32, "another side that still is one block is no damage to see here"
        assert np.array_equal(got, values)


@pytest.mark.parametrize("number", range(3))
def test_each_bit_of_a_record_that_flips_is_an_error(number: int) -> None:
    """Through `record.parse`, whose checksum covers sizes and indexes: no flip anywhere gives values."""
    whole = record.build([small_fields()[number][1]])
    for place in range(8 * len(whole)):
        with pytest.raises(FastloadError):
            blocks.read(*record.parse(flipped(whole, place)))


@pytest.mark.parametrize("number", range(3))
def test_what_is_cut_short_is_an_error(number: int) -> None:
    """Payload, index or record: every length below the whole."""
    _, whole = small_fields()[number]
    for length in range(len(whole.payload)):
        with pytest.raises((ChecksumError, DecodeError)):
            blocks.read(whole._replace(payload=whole.payload[:length]))
    for length in range(len(whole.tiles)):
        with pytest.raises(DecodeError):
            blocks.read(whole._replace(tiles=whole.tiles[:length]))
    built = record.build([whole])
    for length in range(len(built)):
        with pytest.raises(FastloadError):
            blocks.read(*record.parse(built[:length]))


def test_damage_is_only_seen_where_it_is_read() -> None:
    """A crop beside a damaged block is whole, one that touches it fails."""
    values = values_of("noise", 2 * SIDE, 2 * SIDE, None, np.uint8)
    whole = blocks.field_of(values)
    damaged = whole._replace(payload=flipped(bytes(whole.payload), 8 * len(whole.payload) - 9))
    assert np.array_equal(blocks.read(damaged, Box(0, 0, 2 * SIDE, SIDE)), values[:SIDE])
    assert np.array_equal(blocks.read(damaged, Box(0, 0, SIDE, 2 * SIDE)), values[:, :SIDE])
    for box in (None, Box(SIDE, SIDE, 1, 1), Box(SIDE - 1, SIDE - 1, 2, 2)):
        with pytest.raises(ChecksumError, match="restore the store"):
            blocks.read(damaged, box)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (hand_made((2, 2, 1), 0, [b"x"]), "none of version 1"),
        (hand_made((2, 2, 1), 4097, [b"x"]), "none of version 1"),
        (hand_made((2, 2, 1), 65535, [b"x"]), "none of version 1"),
        (hand_made((2, 2, 1), 128, [b"x"], size=3), "none of version 1"),
        (hand_made((2, 2, 0), 128, [b""]), "none of version 1"),
        (hand_made((0, 2, 1), 128, []), "does not fit its size"),
        (hand_made((2, 0, 1), 128, []), "does not fit its size"),
        (hand_made((0, 0, 1), 128, []), "does not fit its size"),
        (hand_made((2, 2, 1), 128, []), "does not fit its size"),
        (hand_made((2, 2, 1), 128, [b"x", b"x"]), "does not fit its size"),
        (hand_made((60000, 60000, 1), 128, [b"x"]), "does not fit its size"),
        (hand_made((0xFFFFFFFF, 0xFFFFFFFF, 1), 128, [b"x"]), "does not fit its size"),
        (field(b"x", (2, 2, 1), 128, [(0xFFFFFFFF, 0)], 1), "add up"),
        (field(b"x", (2, 200, 1), 128, [(0xFFFFFFFF, 0), (2, 0)], 1), "add up"),
        (hand_made((2, 2, 1), 128, [b""]), "a block decompresses to 0 bytes of 4"),
        (hand_made((2, 2, 1), 128, [b"\xff\xff"]), "can't be decompressed"),
        (hand_made((2, 2, 1), 128, [deflated(b"abc")]), "a block decompresses to 3 bytes of 4"),
        (hand_made((2, 2, 1), 128, [deflated(b"abcd")], size=2), "a block decompresses to 4 bytes of 8"),
        (hand_made((2, 2, 1), 128, [deflated(b"abcd")[:-2]]), "a block decompresses to . bytes of 4"),
    ],
)
def test_hostile_fields_are_decode_errors(made: Field, message: str) -> None:
    """Indexes that contradict their field, and blocks that are no streams, with right checksums."""
    with pytest.raises(DecodeError, match=message):
        blocks.read(made)


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=40),
    st.integers(0, 5),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 3),
    st.lists(st.binary(max_size=12), max_size=4),
)
def test_any_bytes_give_values_or_an_error_of_ours(
    index: bytes, lead: int, height: int, width: int, channels: int, parts: list[bytes]
) -> None:
    """Indexes of any bytes and blocks of any bytes with right checksums: a DecodeError or an array of that size."""
    payload = b"".join(parts)
    right = hand_made((height, width, channels), 128, parts, size=1 + lead % 2)
    for made in (
        right,
        right._replace(tiles=(b"\x01\x01\x80\x00" * (lead > 2)) + index),
        right._replace(payload=index),
    ):
        try:
            got = blocks.read(made)
        except (DecodeError, ChecksumError):
            continue
        assert got.shape[:2] == (height, width)
        assert len(made.payload) in (len(payload), len(index))


def test_a_bomb_unpacks_no_more_than_its_block() -> None:
    """64 MB of zeros in 64 KB: a block of 128 x 128 takes 16 KB of them, and no more memory than that."""
    bomb = hand_made((128, 128, 1), 128, [deflated(bytes(64 << 20))])
    tracemalloc.start()
    try:
        got = blocks.read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert not got.any()


def test_a_declared_size_without_the_bytes_takes_no_memory() -> None:
    """60,000 x 60,000 values that are not there are refused before room is made for them, or where the first is."""
    side, count = 4096, 15 * 15
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="does not fit"):
            blocks.read(hand_made((60000, 60000, 1), side, [b""] * (count - 1)))
        with pytest.raises(DecodeError, match="a block decompresses"):
            blocks.read(hand_made((60000, 60000, 1), side, [b""] * count), Box(0, 0, 100, 100))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_no_memory_is_a_decode_error() -> None:
    """A field of constant blocks larger than any memory: its blocks are all there, and a crop of it can be read."""
    lines = 1 << 18
    made = hand_made((lines * 4096, 4096, 1), 4096, [b"\x05"] * lines)
    huge = made._replace(channels=255, payload=b"\x05" * 255 * lines)
    sums = struct.pack("<II", 255, lower_half(b"\x05" * 255)) * lines
    huge = huge._replace(tiles=bytes(made.tiles[:4]) + sums)
    with pytest.raises(DecodeError, match="no memory for 4096 x 1073741824 pixels"):
        blocks.read(huge)
    assert np.array_equal(blocks.read(made, Box(7, 1 << 29, 2, 3)), np.full((3, 2), 5))


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)
