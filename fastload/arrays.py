"""Arrays of any dtype and shape as fields of a record: as they are, or compressed where that pays.

The payload is the values, C order, or, where that is at most 70% as long, a raw DEFLATE stream (RFC 1951, from zlib) of
the values' first bytes, then all their second bytes, and so on. The index, little-endian:

    u8  1 (its version) | u8 0 as they are, 1 compressed | u8 dimensions | u8 bytes of the dtype's name
    the dtype's name    as NumPy writes it, "<f4" say, or "bfloat16"
    u64 for each dimension

What compresses is known by its first 64 KiB: noise is not compressed only to be thrown away.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from .errors import DecodeError, SourceError
from .record import ARRAY, Field

_HEAD = struct.Struct("<BBBB")
_VERSION = 1
_PAYS = 0.7
_SMALL, _PROBE = 128, 64 << 10
_LEVEL = 6
_MOST_GROWTH = 1100  # DEFLATE makes at most 1032 bytes of one
_DTYPE = re.compile(
    r"\|b1|[|<>][iu][1248]|[<>](f[248]|c(8|16))|[<>][mM]8(\[([1-9]\d{0,8})?[a-zA-Z]{1,3}\])?|[|<>][SU]\d{1,9}"
)
_CARRIERS: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "<i2"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "|i1"),
    "float8_e5m2": (torch.float8_e5m2, "|i1"),
}
"""torch's dtypes that NumPy lacks, and what their bytes travel as."""

Array = npt.NDArray[Any]


def field_of(value: Array | torch.Tensor) -> Field:
    """A field that holds an array or a tensor.

    Raises:
        SourceError: of a dtype that is no numbers, dates or fixed texts, or in a memory layout of its own (sparse).
    """
    name, array = _carried(value) if isinstance(value, torch.Tensor) else (value.dtype.str, value)
    if name not in _CARRIERS and not _DTYPE.fullmatch(name):
        raise SourceError(f"arrays of dtype {array.dtype} can't be stored; numbers, dates and fixed texts can")
    if isinstance(array, np.ma.MaskedArray):
        raise SourceError("masked arrays can't be stored; let the dataset give their `filled()`, or data and mask")
    payload = np.ascontiguousarray(array).tobytes()
    compressed = _compressed(payload, array.dtype.itemsize)
    head = _HEAD.pack(_VERSION, compressed is not None, array.ndim, len(name))
    index = head + name.encode() + struct.pack(f"<{array.ndim}Q", *array.shape)
    return Field(ARRAY, payload if compressed is None else compressed, tiles=index)


def read(field: Field) -> Array:
    """The array in a field, in memory of its own; see `tensor` for tensors.

    Raises:
        DecodeError: the index contradicts the payload, or this can't be decompressed.
    """
    return _read(field)[1]


def tensor(field: Field) -> torch.Tensor:
    """The tensor in a field; see `read`."""
    name, array = _read(field)
    try:
        values = torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"there are no tensors of dtype {array.dtype}; the store is damaged") from error
    return values.view(_CARRIERS[name][0]) if name in _CARRIERS else values


def _read(field: Field) -> tuple[str, Array]:
    index = bytes(field.tiles)
    try:
        version, packing, dimensions, length = _HEAD.unpack_from(index)
        name = index[_HEAD.size : _HEAD.size + length].decode("ascii")
        shape = struct.unpack(f"<{dimensions}Q", index[_HEAD.size + length :])
    except (struct.error, UnicodeDecodeError) as error:
        raise DecodeError("its array index is cut short; pack it again") from error
    if field.codec != ARRAY or version != _VERSION or packing > 1:
        raise DecodeError(f"its array index is none of version {_VERSION}; update fastload, or pack it again")
    if name not in _CARRIERS and not _DTYPE.fullmatch(name):
        raise DecodeError(f"its dtype is {name!r:.40}, which no array here has; the store is damaged")
    try:
        dtype = np.dtype(_CARRIERS[name][1] if name in _CARRIERS else name)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"there is no dtype {name!r:.40}: {error}; the store is damaged") from error
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes > len(field.payload) * _MOST_GROWTH or (not packing and nbytes != len(field.payload)):
        raise DecodeError(f"its {len(field.payload)} bytes are no array of {dtype} {shape}; pack it again")
    try:
        own = _decompressed(field.payload, nbytes, dtype.itemsize) if packing else bytearray(field.payload)
        return name, np.ndarray(shape, dtype, own)
    except (MemoryError, ValueError, TypeError) as error:
        raise DecodeError(f"there can't be an array of {dtype} {shape}: {error}") from error


def _carried(value: torch.Tensor) -> tuple[str, Array]:
    """The name of a tensor's dtype, and its values as an array."""
    try:
        values = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
        for name, (dtype, carrier) in _CARRIERS.items():
            if values.dtype == dtype:
                return name, values.reshape(-1).view(torch.uint8).numpy().view(carrier).reshape(values.shape)
        array = values.numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"tensors of {value.dtype} in the layout {value.layout} can't be stored: {error}") from error
    return array.dtype.str, array


def _compressed(payload: bytes, itemsize: int) -> bytes | None:
    if len(payload) < _SMALL or itemsize == 0:
        return None
    if len(payload) > _PROBE:
        probe = payload[: _PROBE // itemsize * itemsize or len(payload)]
        if len(zlib.compress(_shuffled(probe, itemsize), 1)) > _PAYS * len(probe):
            return None
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = deflate.compress(_shuffled(payload, itemsize)) + deflate.flush()
    return stream if len(stream) <= _PAYS * len(payload) else None


def _shuffled(payload: bytes, itemsize: int) -> bytes:
    columns: npt.NDArray[np.uint8] = np.frombuffer(payload, np.uint8).reshape(-1, itemsize).T
    return columns.tobytes()


def _decompressed(payload: bytes | memoryview, nbytes: int, itemsize: int) -> Array:
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(payload, nbytes + 1)  # one more than belongs there
    except zlib.error as error:
        raise DecodeError(f"the array can't be decompressed: {error}") from error
    if len(data) != nbytes:
        raise DecodeError(f"the array decompresses to other than its {nbytes} bytes; pack it again")
    planes = np.frombuffer(data, np.uint8).reshape(itemsize, -1)
    if 0 < planes.shape[1] < 1 << 31:
        return cv2.transpose(planes)  # in a quarter of NumPy's time
    return np.array(planes.T, order="C")
