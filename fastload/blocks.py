"""Blocks: masks and images of 16 bits, which must stay exact, cut into squares that are compressed each by itself.

A crop reads only the squares that it touches. Of a mask most squares are of one value, and take a few bytes.

The payload is the blocks, row after row; those at the right and lower edge are as large as what is left. Each is one
pixel's bytes, if all its pixels are equal, or a raw DEFLATE stream (RFC 1951, from zlib) of its pixels: rows first,
channels last; where a value has two bytes, all low bytes first and then all high bytes. Zeros follow a stream that
would be no longer than a pixel, to make it so. The index, little-endian:

    u8  1 (its version) | u8 bytes of a value, 1 or 2 (unsigned) | u16 the squares' side in pixels, at most 4096
    u32, u32 for each block     its length, and the lower half of its XXH3 checksum

Signed values (int16) are kept as value + 32768; the record's flags say so.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ChecksumError, DecodeError
from .geometry import Box
from .record import BLOCKS, REENCODED, SIGNED, Field, checksum

SIDE = 128

_HEAD = struct.Struct("<BBH")
_VERSION = 1
_LARGEST_SIDE = 4096  # what a block of a hostile store may unpack to has to end somewhere
_LEVEL = 6

Values = npt.NDArray[np.uint8 | np.uint16 | np.int16]


def field_of(values: Values) -> Field:
    """A field that holds `values`, uint8, uint16 or int16, (height, width) or (height, width, channels)."""
    flags = REENCODED
    if values.dtype.kind == "i":
        values, flags = as_unsigned(values), flags | SIGNED
    height, width, channels = (*values.shape, 1)[:3]
    blocks = [_compressed(values[y : y + SIDE, x : x + SIDE]) for y, x in _corners(height, width, SIDE)]
    rows = [(len(block), checksum(block) & 0xFFFFFFFF) for block in blocks]
    index = _HEAD.pack(_VERSION, values.dtype.itemsize, SIDE) + np.array(rows, "<u4").tobytes()
    return Field(BLOCKS, b"".join(blocks), 1, channels, flags, width, height, index)


def read(field: Field, box: Box | None = None) -> Values:
    """The values in a box of the image, or all: (height, width), with several channels (height, width, channels).

    Raises:
        ChecksumError: bytes that it takes were altered.
        DecodeError: the index contradicts the image, or a block can't be decompressed.
    """
    dtype, side = _head(field)
    box = box or Box(0, 0, field.width, field.height)
    in_row = -(-field.width // side)
    table = np.frombuffer(field.tiles, "<u4", offset=_HEAD.size).reshape(-1, 2)
    if not len(table) or len(table) != in_row * -(-field.height // side):
        raise DecodeError("its block index does not fit its size; pack it again")
    ends = np.add.accumulate(table[:, 0], dtype=np.int64)
    if ends[-1] != len(field.payload):
        raise DecodeError("its block index does not add up to its bytes; pack it again")
    below, right = box.ends
    try:
        out = np.empty((box.height, box.width, field.channels), dtype)
    except (MemoryError, ValueError) as error:
        raise DecodeError(f"there is no memory for {box.width} x {box.height} pixels") from error
    for row, column in itertools.product(
        range(box.y // side, -(-below // side)), range(box.x // side, -(-right // side))
    ):
        number = row * in_row + column
        length, expected = table[number].tolist()
        data = field.payload[int(ends[number]) - length : int(ends[number])]
        if field.checked and checksum(data) & 0xFFFFFFFF != expected:
            raise ChecksumError(
                "the bytes differ from what was packed (checksum mismatch); restore the store from a copy or pack again"
            )
        y, x = row * side, column * side
        height, width = min(side, field.height - y), min(side, field.width - x)
        block = _decompressed(data, (height, width, field.channels), dtype)
        top, left = max(y, box.y), max(x, box.x)
        end_y, end_x = min(y + height, below), min(x + width, right)
        place = out[top - box.y : end_y - box.y, left - box.x : end_x - box.x]
        place[...] = block if block.ndim == 1 else block[top - y : end_y - y, left - x : end_x - x]
    if field.flags & SIGNED:
        out ^= 0x8000
        out = out.view(np.int16)
    return out[..., 0] if field.channels == 1 else out


def dtype_of(field: Field) -> np.dtype[Any]:
    """The type of the values in a field."""
    return np.dtype(np.int16) if field.flags & SIGNED else _head(field)[0]


def as_unsigned(values: Values) -> npt.NDArray[np.uint16]:
    """int16 values as they are kept."""
    unsigned: npt.NDArray[np.uint16] = values.astype(np.int16, copy=False).view(np.uint16) ^ np.uint16(0x8000)
    return unsigned


def _head(field: Field) -> tuple[np.dtype[Any], int]:
    if len(field.tiles) < _HEAD.size or (len(field.tiles) - _HEAD.size) % 8:
        raise DecodeError("its block index is cut short; pack it again")
    version, itemsize, side = _HEAD.unpack_from(field.tiles)
    itemsizes = (2,) if field.flags & SIGNED else (1, 2)
    if version != _VERSION or itemsize not in itemsizes or not 0 < side <= _LARGEST_SIDE or not field.channels:
        raise DecodeError(f"its block index is none of version {_VERSION}; update fastload, or pack it again")
    return np.dtype(f"<u{itemsize}"), side


def _corners(height: int, width: int, side: int) -> itertools.product[tuple[int, int]]:
    return itertools.product(range(0, height, side), range(0, width, side))


def _compressed(block: Values) -> bytes:
    pixels = np.ascontiguousarray(block).reshape(block.shape[0] * block.shape[1], -1)
    if (pixels == pixels[0]).all():
        return bytes(pixels[0].astype(pixels.dtype.newbyteorder("<")).data)
    data = pixels.astype(pixels.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, block.dtype.itemsize)
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = deflate.compress(data.T.tobytes()) + deflate.flush()
    return stream if len(stream) > pixels[0].nbytes else stream + b"\0" * (pixels[0].nbytes + 1 - len(stream))


def _decompressed(data: bytes | memoryview, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A block's pixels; of one pixel, where all are equal, the channels alone."""
    height, width, channels = shape
    if len(data) == channels * dtype.itemsize:
        return np.frombuffer(data, dtype)
    count = height * width * channels
    try:
        raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, count * dtype.itemsize)
    except zlib.error as error:
        raise DecodeError(f"a block can't be decompressed: {error}") from error
    if len(raw) != count * dtype.itemsize:
        raise DecodeError(f"a block decompresses to {len(raw)} bytes of {count * dtype.itemsize}; pack it again")
    if dtype.itemsize == 1:
        return np.frombuffer(raw, np.uint8).reshape(shape)
    low, high = np.frombuffer(raw, np.uint8).reshape(2, -1)
    return (low | high.astype(np.uint16) << 8).reshape(shape)
