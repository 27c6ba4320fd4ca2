"""Arrays and tensors as fields of a record: every dtype, shape and layout, compressed or not, and hostile indexes."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from anything import TORCH_DTYPES, arrays, same, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import record
from fastload.arrays import field_of, read, tensor
from fastload.errors import DecodeError, SourceError
from fastload.record import Field


def kept(value: Any) -> Field:
    """The field as it comes out of a record."""
    (field,) = record.parse(record.build([field_of(value)]))
    field.verify()
    return field


@settings(max_examples=150, deadline=None)
@given(arrays())
def test_an_array_comes_back(array: np.ndarray[Any, Any]) -> None:
    """Dtype with its byte order, shape and every bit, in memory that may be written to and lies in C order."""
    found = read(kept(array))
    assert same(found, np.ascontiguousarray(array).reshape(array.shape))
    assert found.flags.writeable
    assert found.flags.c_contiguous


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_a_tensor_comes_back(value: torch.Tensor) -> None:
    """Those that NumPy lacks too, and those that follow gradients, which nothing stored does."""
    found = tensor(kept(value))
    assert same(found, value.detach())
    assert found.is_contiguous()
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_of_torch_that_can_be_kept(dtype: torch.dtype) -> None:
    """A few plain values of each, and none of them at all."""
    for value in (torch.arange(2).to(dtype), torch.zeros((0, 3), dtype=dtype), torch.ones((), dtype=dtype)):
        assert same(tensor(kept(value)), value)


def test_lazy_conjugates_and_negatives_are_carried_out() -> None:
    """Torch only notes these in a flag."""
    value = torch.tensor([1 + 2j])
    assert tensor(kept(value.conj())).tolist() == [1 - 2j]
    assert tensor(kept(value.conj().imag)).tolist() == [-2]


COMPRESSIBLE = {
    "zeros": np.zeros((300, 40), np.float32),
    "a ramp of 8 bytes": np.arange(20_000),
    "a mask": np.repeat(np.arange(9, dtype=np.uint8), 1000).reshape(90, 100),
    "big-endian": np.arange(9_000, dtype=">u2"),
    "texts": np.array(["ant", "bee"] * 500),
    "large items": np.array(["a" * 30_000, "b" * 20_000]),
    "noise under zeros": np.arange(4000, dtype="<f8") / 7,
}


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_what_compresses_is_compressed(name: str) -> None:
    """It takes at most 70% of the bytes, and comes back."""
    array = COMPRESSIBLE[name]
    field = kept(array)
    assert len(field.payload) <= 0.7 * array.nbytes
    assert same(read(field), array)


def test_a_tensor_is_compressed_as_an_array_is() -> None:
    """bfloat16 by its two bytes."""
    value = torch.arange(5000).to(torch.bfloat16)
    field = kept(value)
    assert len(field.payload) < value.nbytes / 2
    assert same(tensor(field), value)


@pytest.mark.parametrize("count", [100, 10_000, 200_000])
def test_noise_is_kept_as_it_is(count: int) -> None:
    """So that reading it takes no time; the bytes are the array's own, in C order."""
    array = np.random.default_rng(0).integers(0, 256, (count, 2), np.uint8)
    assert bytes(kept(array).payload) == array.tobytes()
    assert bytes(kept(np.asfortranarray(array)).payload) == array.tobytes()


def test_what_begins_as_noise_is_kept_as_it_is() -> None:
    """The first 64 KiB say what compresses, so that noise is not compressed in vain."""
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    assert len(kept(np.concatenate((noise, np.zeros(1 << 20, np.uint8)))).payload) == (1 << 16) + (1 << 20)
    assert len(kept(np.concatenate((np.zeros(1 << 20, np.uint8), noise))).payload) < 1 << 17


def test_small_arrays_are_kept_as_they_are() -> None:
    """Below 128 bytes nothing pays."""
    assert len(kept(np.zeros(127, np.uint8)).payload) == 127
    assert len(kept(np.zeros(128, np.uint8)).payload) < 30


def test_the_format_is_this() -> None:
    """Golden bytes: the index, and the stream that holds all first bytes, then all second ones."""
    field = field_of(np.arange(6, dtype=">i4").reshape(2, 3))
    assert bytes(field.tiles) == struct.pack("<BBBB3sQQ", 1, 0, 2, 3, b">i4", 2, 3)
    assert bytes(field.payload) == bytes.fromhex("00000000 00000001 00000002 00000003 00000004 00000005")
    array = np.arange(512, dtype="<u2")
    field = field_of(array)
    assert bytes(field.tiles) == struct.pack("<BBBB3sQ", 1, 1, 1, 3, b"<u2", 512)
    columns = array.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()
    assert zlib.decompress(bytes(field.payload), -15) == columns
    assert bytes(field_of(torch.ones(1, dtype=torch.bfloat16)).tiles) == struct.pack(
        "<BBBB8sQ", 1, 0, 1, 8, b"bfloat16", 1
    )
    assert record.CODEC_NAMES[field.codec] == "array"


UNSTORABLE: dict[str, Any] = {
    "objects": np.array([None, {}]),
    "records": np.zeros(3, [("a", "<i4"), ("b", "<f8")]),
    "raw bytes": np.zeros(3, "V5"),
    "a masked array": np.ma.array([1, 2], mask=[True, False]),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor without data": torch.empty(3, device="meta"),
    "65 dimensions": torch.zeros([1] * 65),
}
if np.dtype(np.longdouble).itemsize > 8:
    UNSTORABLE["a long double"] = np.zeros(2, np.longdouble)


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_is_no_plain_array_is_refused(name: str) -> None:
    """With what it is; nothing of it is stored half."""
    with pytest.raises(SourceError, match="can't be stored"):
        field_of(UNSTORABLE[name])


def test_sixty_four_dimensions_come_back() -> None:
    """As many as NumPy has, if this one has them."""
    value = torch.zeros([1] * 32)
    assert tensor(kept(value)).shape == value.shape


# ---- hostile indexes


def index(
    dtype: bytes = b"<f4", shape: tuple[int, ...] = (4,), packing: int = 0, version: int = 1, length: int | None = None
) -> bytes:
    head = struct.pack("<BBBB", version, packing, len(shape), len(dtype) if length is None else length)
    return head + dtype + struct.pack(f"<{len(shape)}Q", *shape)


SQUEEZED = zlib.compress(bytes(1 << 20))[2:-4]
HOSTILE: dict[str, tuple[bytes, bytes]] = {
    "none": (b"", bytes(16)),
    "cut in its head": (index()[:3], bytes(16)),
    "cut in its name": (index()[:6], bytes(16)),
    "cut in its shape": (index()[:-1], bytes(16)),
    "too long": (index() + b"\0", bytes(16)),
    "of another version": (index(version=2), bytes(16)),
    "packed in another way": (index(b"|u1", (1 << 20,), 2), SQUEEZED),
    "objects": (index(b"|O", (2,)), bytes(16)),
    "records": (index(b"i4,f8", (1,)), bytes(12)),
    "a comma": (index(b"<i4,<i4", (2,)), bytes(16)),
    "void": (index(b"|V4"), bytes(16)),
    "no such unit of time": (index(b"<M8[xyz]", (2,)), bytes(16)),
    "no step of time": (index(b"<M8[0s]", (2,)), bytes(16)),
    "no order of bytes": (index(b"f4"), bytes(16)),
    "not ASCII": (index("<ƒ4".encode()), bytes(16)),
    "a name that is none": (index(b""), bytes(16)),
    "too few bytes": (index(shape=(5,)), bytes(16)),
    "too many bytes": (index(shape=(3,)), bytes(16)),
    "2**64 values": (index(shape=(1 << 63, 2)), bytes(16)),
    "2**64 of no bytes": (index(shape=(0, 1 << 63)), b""),
    "texts of 4 GB": (index(b"<U999999999", (1,)), bytes(16)),
    "65 dimensions": (index(shape=(1,) * 65), bytes(4)),
    "compressed noise": (index(packing=1, shape=(64,)), bytes(range(100))),
    "compressed and cut": (index(b"|u1", (1 << 20,), 1), SQUEEZED[:-9]),
    "more than it says": (index(b"|u1", (1 << 19,), 1), SQUEEZED),
    "less than it says": (index(b"|u1", ((1 << 20) + 1,), 1), SQUEEZED),
    "none of what it has": (index(b"|u1", (0,), 1), SQUEEZED),
    "a bomb": (index(b"|u1", (1 << 50,), 1), SQUEEZED),
}
"""An index and a payload; both have right checksums, as someone would make them who can compute these."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_a_decode_error(name: str) -> None:
    """And takes no memory worth mentioning."""
    tiles, payload = HOSTILE[name]
    for decoded in (read, tensor):
        tracemalloc.start()
        try:
            with pytest.raises(DecodeError):
                decoded(Field(record.ARRAY, payload, tiles=tiles))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 4 << 20


def test_no_array_is_more_than_its_bytes_can_hold() -> None:
    """DEFLATE makes 1032 bytes of one at most: what says more is refused before anything is decompressed."""
    with pytest.raises(DecodeError, match="are no array"):
        read(Field(record.ARRAY, SQUEEZED, tiles=index(b"|u1", (len(SQUEEZED) * 1101,), 1)))


def test_another_kind_of_field_is_no_array() -> None:
    """Text, say; and texts as an array are no tensor."""
    with pytest.raises(DecodeError, match="none of version 1"):
        read(Field(record.TEXT, bytes(16), tiles=index()))
    for array in (np.array(["a"]), np.array(["2020"], "M8[D]"), np.array([1], ">i4")):
        with pytest.raises(DecodeError, match="no tensors of dtype"):
            tensor(field_of(array))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=64))
@example(index(b"<m8[25s]", (2,)), bytes(16))
def test_any_bytes_are_an_array_or_a_decode_error(tiles: bytes, payload: bytes) -> None:
    """Never another exception."""
    for decoded in (read, tensor):
        try:
            decoded(Field(record.ARRAY, payload, tiles=tiles))
        except DecodeError:
            continue


@settings(max_examples=200, deadline=None)
@given(arrays(), st.data())
def test_a_changed_index_is_an_array_or_a_decode_error(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    """A byte of it replaced, its checksum right."""
    field = field_of(array)
    tiles = bytearray(field.tiles)
    tiles[data.draw(st.integers(0, len(tiles) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(field._replace(tiles=bytes(tiles)))
    except DecodeError:
        return
    assert found.nbytes <= 1100 * len(field.payload)
