"""Samples of any structure: what two of them have to have in common, and strategies that make them up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    npst.datetime64_dtypes(endianness="?"),
    npst.timedelta64_dtypes(endianness="?"),
    npst.byte_string_dtypes(endianness="?", max_len=5),
    npst.unicode_string_dtypes(endianness="?", max_len=5),
)
TORCH_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
TEXTS = st.text(st.characters(), max_size=8)
"""Of any code points, lone surrogates too."""

REALS = st.floats(allow_nan=True)
INTS = st.integers(-(1 << 63), (1 << 63) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | REALS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """An array of any dtype and a small shape, perhaps not contiguous, with any bytes as its values."""
    dtype = draw(DTYPES)
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    values = draw(npst.arrays(dtype, shape))
    way = draw(st.integers(0, 2))
    return values.T if way == 1 else values[::-1] if way == 2 and values.ndim else values


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype that travels, of any bits."""
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    count = int(np.prod(shape, dtype=int))
    bits = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == torch.bool:
        bits = bytes(byte & 1 for byte in bits)
    flat = torch.frombuffer(bytearray(bits), dtype=dtype) if bits else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()) and dtype in (torch.float32, torch.float64, torch.complex64):
        tensor.requires_grad_()
    return tensor


def picture(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (12, 9)) -> Image.Image:
    """A PIL image of a mode, (width, height), all noise."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.merge("LAB", noise.split())
    if mode in ("I", "F", "I;16"):
        return noise.convert("L").convert(mode)
    if mode in ("LA", "PA"):
        return noise.convert("RGBA").convert("LA") if mode == "LA" else noise.convert("P").convert("PA")
    return noise.convert(mode)


def _bits(value: np.ndarray[Any, Any] | torch.Tensor) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.tobytes()


def same(a: Any, b: Any) -> bool:  # noqa: PLR0911 - one for each kind
    """Whether two samples have the same structure, types and values, to the last bit (any NaN of Python's is one)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and [*map(type, a)] == [*map(type, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (np.ndarray, np.generic, torch.Tensor)):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, Image.Image):
        return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return repr(a) == repr(b)
    return bool(a == b)


def leaves() -> st.SearchStrategy[Any]:
    """Values of every kind of field but pictures, whose types are the same however often they are drawn."""
    return st.one_of(INTS, st.booleans(), REALS, TEXTS, st.binary(max_size=20), JSON, arrays(), tensors())


def samples() -> st.SearchStrategy[Any]:
    """Nested tuples, lists and dicts of such values; keys collide on purpose."""
    keys = st.sampled_from(["a", "b", "a.b", "", ".", "name", "image", "label", "mask", "others", "0", "a_"]) | (
        st.integers(-3, 3) | TEXTS
    )
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(tuple),
            st.lists(inner, max_size=3),
            st.dictionaries(keys, inner, max_size=4),
        ),
        max_leaves=12,
    )
