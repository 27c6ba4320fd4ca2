"""The record: how one sample lies in a store. This docstring is the format's definition (format version 1).

All numbers are little-endian and unsigned; nothing is aligned. A record is

    head        16 bytes                    4s magic b"FLR1" | u16 fields | u16 zero | u64 head checksum
    directory   40 bytes for each field     see below
    indexes     the fields' indexes, back to back (may be empty; `tiles`, `blocks` and `arrays` define them)
    payloads    the fields' bytes, back to back, to the end of the record

    directory entry     u8  codec           0 bytes, 1 text (UTF-8), 2 jpeg, 3 encoded (another image format), 4 raw,
                                            5 blocks, 6 array
                        u8  orientation     EXIF 1 to 8 as the bytes are kept; 0 where the field is no image
                        u8  channels        of the stored image; 0 where the field is no image
                        u8  flags           bit 0: encoded by the packer, not the source's own bytes
                                            bit 1: of blocks: the values are int16, kept as value + 32768
                        u32 width, u32 height   of the stored frame, before orientation; 0 where no image
                        u32 index length    bytes of this field's tile index
                        u64 payload length
                        u64 payload checksum
                        u64 zero            reserved

    raw             uint8, height x width x channels, rows first, channels last, RGB
    blocks, array   see `blocks`, `arrays`
    checksums       XXH3, 64 bits, seed 0. The head checksum covers the head's first 8 bytes, the directory and the
                    indexes: everything that must be trusted before a payload is touched.

Fields have no names here; the store's manifest lists them in this order. `parse` reads nothing beyond the indexes, so a
payload's pages are not read from disk before they are asked for. It trusts no number: every length is held against
the record's own size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from .errors import ChecksumError, StoreFormatError

MAGIC = b"FLR1"
BYTES, TEXT, JPEG, ENCODED, RAW, BLOCKS, ARRAY = range(7)
CODEC_NAMES = ("bytes", "text", "jpeg", "encoded", "raw", "blocks", "array")
IMAGES = range(JPEG, BLOCKS + 1)
REENCODED, SIGNED = 1, 2

_HEAD = struct.Struct("<4sHHQ")
_CHECKED = 8  # the bytes of the head that its checksum covers
_ENTRY = struct.Struct("<BBBBIIIQQQ")
MAX_FIELDS = 64

checksum = xxhash.xxh3_64_intdigest


def joint_checksum(checksums: Iterable[int]) -> int:
    """The checksum of several fields: of their checksums, 8 bytes each."""
    return checksum(b"".join(number.to_bytes(8, "little") for number in checksums))


class Field(NamedTuple):
    """One field of a record. `payload` is a view into the record it was parsed from.

    checked: whether its bytes are held against their checksums when they are read.
    """

    codec: int
    payload: bytes | memoryview
    orientation: int = 0
    channels: int = 0
    flags: int = 0
    width: int = 0
    height: int = 0
    tiles: bytes | memoryview = b""
    checksum: int = 0
    checked: bool = True

    def verify(self) -> None:
        """Raise `ChecksumError` unless the payload is what was written, or isn't to be checked."""
        if self.checked and checksum(self.payload) != self.checksum:
            raise ChecksumError(
                "the bytes differ from what was packed (checksum mismatch); restore the store from a copy or pack again"
            )


def build(fields: Sequence[Field]) -> bytes:
    """Serialise fields to one record; their `checksum` is computed here."""
    if not 0 < len(fields) <= MAX_FIELDS:
        raise ValueError(f"a record holds 1 to {MAX_FIELDS} fields, got {len(fields)}")
    checked = [_HEAD.pack(MAGIC, len(fields), 0, 0)[:_CHECKED]]
    checked += [
        _ENTRY.pack(
            *(f.codec, f.orientation, f.channels, f.flags, f.width, f.height),
            *(len(f.tiles), len(f.payload), checksum(f.payload), 0),
        )
        for f in fields
    ]
    checked += [bytes(f.tiles) for f in fields]
    body = b"".join(checked)
    head = body[:_CHECKED] + checksum(body).to_bytes(8, "little")
    return b"".join((head, body[_CHECKED:], *(f.payload for f in fields)))


def parse(data: bytes | memoryview, checked: bool = True) -> list[Field]:
    """Split a record into its fields without copying or reading payloads.

    checked: False passes over all checksums, here and in the fields; lengths are held against each other nonetheless.

    Raises:
        StoreFormatError: the bytes are no record, or its lengths contradict its size.
        ChecksumError: head, directory or indexes were altered.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise StoreFormatError(f"a record has at least {_HEAD.size} bytes, got {len(view)}; the store is damaged")
    magic, count, _, head_checksum = _HEAD.unpack_from(view)
    directory_end = _HEAD.size + count * _ENTRY.size
    if magic != MAGIC or not 0 < count <= MAX_FIELDS or directory_end > len(view):
        raise StoreFormatError("the bytes are not a fastload record; the store is damaged or of another program")
    entries = [_ENTRY.unpack_from(view, _HEAD.size + i * _ENTRY.size) for i in range(count)]
    start = directory_end
    payload_start = start + sum(entry[6] for entry in entries)
    if payload_start + sum(entry[7] for entry in entries) != len(view):
        raise StoreFormatError(f"a record's lengths do not add up to its {len(view)} bytes; the store is damaged")
    if checked and _checksum_of_head(view, payload_start) != head_checksum:
        raise ChecksumError("a record's head was altered (checksum mismatch); run `fastload verify` on the store")
    fields = []
    for codec, orientation, channels, flags, width, height, tiles_length, length, payload_checksum, _ in entries:
        if codec > ARRAY or (codec in IMAGES and not 1 <= orientation <= 8):
            raise StoreFormatError(
                f"a record has codec {codec} and orientation {orientation}; update fastload to read it"
            )
        fields.append(
            Field(
                *(codec, view[payload_start : payload_start + length], orientation, channels, flags, width, height),
                *(view[start : start + tiles_length], payload_checksum, checked),
            )
        )
        start += tiles_length
        payload_start += length
    return fields


def head_checksum(data: bytes | memoryview) -> int:
    """The checksum that a record says its head has: as the payloads' checksums are in there, a name for all of it."""
    return int.from_bytes(data[_CHECKED : _HEAD.size], "little")


def _checksum_of_head(view: memoryview, payload_start: int) -> int:
    return checksum(b"".join((view[:_CHECKED], view[_HEAD.size : payload_start])))
