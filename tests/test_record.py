"""The record format: golden bytes that hold it, round trips, and damage of every kind that must be noticed."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import record
from fastload.errors import ChecksumError, FastloadError, StoreFormatError
from fastload.record import Field

IMAGE = Field(record.JPEG, b"\xff\xd8image", 6, 3, record.REENCODED, 640, 480, b"\x01\x02\x03")
NAME = Field(record.TEXT, "käfer/1.jpg".encode())
RAW = Field(record.RAW, bytes(range(12)), 1, 3, record.REENCODED, 2, 2)

GOLDEN = bytes.fromhex(
    "464c523102000000312b0749f44527be0206030180020000e0010000030000000700000000000000a95ca461dbe51480"
    "0000000000000000010000000000000000000000000000000c00000000000000e96ff7cd014391860000000000000000"
    "010203ffd8696d6167656bc3a46665722f312e6a7067"
)
"""IMAGE and NAME as format version 1 writes them. After the first release these bytes never change."""

u8, u32 = st.integers(0, 255), st.integers(0, (1 << 32) - 1)
codecs = st.sampled_from((record.BYTES, record.TEXT, record.JPEG, record.ENCODED, record.RAW, record.BLOCKS))


@st.composite
def fields(draw: st.DrawFn) -> Field:
    codec = draw(codecs)
    orientation = draw(st.integers(1, 8)) if codec >= record.JPEG else draw(u8)
    payload, tiles = draw(st.binary(max_size=40)), draw(st.binary(max_size=12))
    return Field(codec, payload, orientation, draw(u8), draw(u8), draw(u32), draw(u32), tiles)


records = st.lists(fields(), min_size=1, max_size=4)


def plain(parsed: Sequence[Field]) -> list[tuple[object, ...]]:
    return [tuple(bytes(v) if isinstance(v, memoryview) else v for v in field) for field in parsed]


def head_length(data: bytes) -> int:
    """Where the payloads begin, by the format's definition."""
    (count,) = struct.unpack_from("<H", data, 4)
    return 16 + sum(40 + struct.unpack_from("<I", data, 16 + 40 * i + 12)[0] for i in range(count))


def sealed(data: bytes, checked: int | None = None) -> bytes:
    """The bytes with the head checksum that belongs to them: damage by someone who knows the format."""
    end = head_length(data) if checked is None else checked
    return data[:8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:8] + data[16:end])) + data[16:]


# ---- the format


def test_golden_bytes() -> None:
    """A record is written as the docstring of `record` defines it, to the byte, and read back."""
    assert record.build([IMAGE, NAME]).hex() == GOLDEN.hex()
    image, name = record.parse(GOLDEN)
    assert plain([image]) == [(*IMAGE[:8], xxhash.xxh3_64_intdigest(IMAGE.payload), True)]
    assert bytes(name.payload).decode() == "käfer/1.jpg"
    assert (name.codec, name.orientation, name.channels, name.width, name.height) == (record.TEXT, 0, 0, 0, 0)


def test_golden_bytes_are_what_the_definition_says() -> None:
    """The golden bytes taken apart by hand: head, directory, indexes, payloads, little-endian and unaligned."""
    magic, count, zero, head_checksum = struct.unpack_from("<4sHHQ", GOLDEN)
    assert (magic, count, zero) == (b"FLR1", 2, 0)
    payload, name = IMAGE.payload, NAME.payload
    first = struct.unpack_from("<BBBBIIIQQQ", GOLDEN, 16)
    assert first == (2, 6, 3, 1, 640, 480, 3, len(payload), xxhash.xxh3_64_intdigest(payload), 0)
    second = struct.unpack_from("<BBBBIIIQQQ", GOLDEN, 56)
    assert second == (1, 0, 0, 0, 0, 0, 0, len(name), xxhash.xxh3_64_intdigest(name), 0)
    assert GOLDEN[96:] == b"\x01\x02\x03" + payload + name
    assert head_checksum == xxhash.xxh3_64_intdigest(GOLDEN[:8] + GOLDEN[16:99])


def test_the_numbers_of_codecs_and_flags_are_the_formats() -> None:
    """Codes that are on disk don't move."""
    assert (record.BYTES, record.TEXT, record.JPEG, record.ENCODED, record.RAW, record.BLOCKS) == (0, 1, 2, 3, 4, 5)
    assert record.CODEC_NAMES == ("bytes", "text", "jpeg", "encoded", "raw", "blocks", "array")
    assert (record.MAGIC, record.REENCODED) == (b"FLR1", 1)


@given(records)
def test_what_is_built_is_parsed(written: list[Field]) -> None:
    """All values come back, with the checksum of the payload whatever the field carried before."""
    parsed = record.parse(record.build([field._replace(checksum=7) for field in written]))
    assert plain(parsed) == [(*field[:8], xxhash.xxh3_64_intdigest(field.payload), True) for field in written]
    for field in parsed:
        field.verify()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_parsed_without_copying(kind: type) -> None:
    """Payloads and tiles are views of the very memory that was given, as the store's map needs."""
    data = kind(record.build([IMAGE, RAW]))
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    image, raw = record.parse(data)
    for view, offset in ((image.tiles, 96), (image.payload, 99), (raw.payload, 99 + len(IMAGE.payload))):
        assert np.frombuffer(view, np.uint8).__array_interface__["data"][0] == start + offset


def test_views_are_written_like_bytes() -> None:
    """A field parsed from one record goes to another as it is, which is what unpacking and packing again does."""
    data = record.build([IMAGE, NAME, RAW])
    assert record.build(record.parse(data)) == data


@pytest.mark.parametrize("count", [0, 65, 1000])
def test_a_record_of_no_or_too_many_fields_is_not_built(count: int) -> None:
    """The limits of the format are a ValueError that names them and the number that was given."""
    with pytest.raises(ValueError, match=f"1 to 64 fields, got {count}"):
        record.build([NAME] * count)


def test_a_record_of_64_fields_is_built_and_parsed() -> None:
    """The largest number of fields."""
    assert plain(record.parse(record.build([NAME] * 64))) == plain(record.parse(record.build([NAME]))) * 64


# ---- damage


def test_every_flipped_bit_is_noticed() -> None:
    """In the head, the directory and the indexes by `parse`, in a payload by that field's `verify` and no other's."""
    data = record.build([IMAGE, NAME, RAW])
    payloads = head_length(data)
    owners = [i for i, field in enumerate((IMAGE, NAME, RAW)) for _ in field.payload]
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            if place < payloads:
                with pytest.raises((ChecksumError, StoreFormatError)):
                    record.parse(damaged)
                continue
            for i, field in enumerate(record.parse(damaged)):
                if i == owners[place - payloads]:
                    with pytest.raises(ChecksumError, match="differ from what was packed"):
                        field.verify()
                else:
                    field.verify()


def test_every_truncation_is_noticed() -> None:
    """A record cut at any length, or followed by anything, is refused by name."""
    data = record.build([IMAGE, NAME, RAW])
    for length in range(len(data)):
        with pytest.raises(StoreFormatError, match="store is damaged"):
            record.parse(data[:length])
    for more in (b"\0", data):
        with pytest.raises(StoreFormatError, match="do not add up"):
            record.parse(data + more)


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"FLR1" + rest))
def test_random_bytes_are_no_record(data: bytes) -> None:
    """Whatever the bytes, the error is one of ours."""
    with pytest.raises(FastloadError):
        record.parse(data)


@settings(max_examples=300)
@given(records, st.data())
def test_a_forged_directory_reaches_nothing_outside_the_record(written: list[Field], data: st.DataObject) -> None:
    """Directory bytes replaced by someone who can compute the checksum: an error of ours, or fields that fit inside."""
    whole = bytearray(record.build(written))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(4, len(whole) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        whole[place : place + len(new)] = new
    end = data.draw(st.sampled_from((None, len(whole))))
    try:
        forged = sealed(bytes(whole), end)
    except struct.error:  # as many fields as the record has no room for
        forged = bytes(whole)
    try:
        parsed = record.parse(forged)
    except FastloadError:
        return
    total = 16 + sum(40 + len(field.tiles) + len(field.payload) for field in parsed)
    assert total == len(forged)


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (4, b"\0\0"),  # no fields
        (4, b"\xff\xff"),  # 65535 fields
        (16 + 12, b"\xff\xff\xff\xff"),  # tiles of 4 GB
        (16 + 16, b"\xff" * 8),  # a payload of 2**64 bytes
        (16, b"\x40"),  # a codec that does not exist yet
        (16 + 1, b"\0"),  # an image without orientation
        (16 + 1, b"\x09"),  # an orientation that EXIF does not have
    ],
)
def test_numbers_that_no_record_has_are_refused(offset: int, new: bytes) -> None:
    """Even with a right checksum."""
    data = bytearray(record.build([IMAGE, NAME]))
    end = head_length(bytes(data))
    data[offset : offset + len(new)] = new
    with pytest.raises(StoreFormatError, match=r"damaged|update fastload"):
        record.parse(sealed(bytes(data), end))


def test_the_two_errors_say_what_to_do() -> None:
    """A damaged head points to `fastload verify`, a damaged payload to a copy of the store."""
    data = bytearray(record.build([IMAGE]))
    data[20] ^= 1
    with pytest.raises(ChecksumError, match="fastload verify"):
        record.parse(data)
    field = record.parse(record.build([IMAGE]))[0]._replace(payload=b"something else")
    with pytest.raises(ChecksumError, match="restore the store from a copy or pack again"):
        field.verify()
