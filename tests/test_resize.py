"""Resizing: grey pictures, which go through the kernel four columns at a time, have the pixels of the plain call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastload.resize as resize_module
from fastload.resize import resize

Array = npt.NDArray[np.uint8]
sides = st.integers(1, 70)


def plain(picture: Array, size: tuple[int, int], scales: tuple[float | None, float | None] = (None, None)) -> Array:
    """What torch makes of each plane in one call. (It refuses three of a single column.)"""
    planes = [torch.from_numpy(np.ascontiguousarray(plane))[None, None] for plane in picture.transpose(2, 0, 1)]
    kernel: Any = torch._C._nn._upsample_bilinear2d_aa
    return np.stack([kernel(plane, size, False, *scales)[0, 0].numpy() for plane in planes], axis=2)


@given(sides, sides, sides, sides, st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_the_pixels_are_those_of_one_call(
    height: int, width: int, new_height: int, new_width: int, channels: int, seed: int
) -> None:
    """Any sizes, larger and smaller, that are multiples of four or not, or the same."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    out = np.full((new_height, new_width, channels), 7, np.uint8)
    resize(picture, (None, None), out)
    assert np.array_equal(out, plain(picture, (new_height, new_width)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scales", [(0.5, 0.25), (None, 0.5), (1.5, None), (1.0, 0.9)])
def test_a_scale_that_is_not_that_of_the_sizes(channels: int, scales: tuple[float | None, float | None]) -> None:
    """A resize that ends where a window ends, also where input and output are as wide or as high."""
    picture = np.random.default_rng(1).integers(0, 256, (40, 30, channels), dtype=np.uint8)
    for size in ((20, 30), (40, 7), (40, 30), (13, 11)):
        out = np.empty((*size, channels), np.uint8)
        resize(picture, scales, out)
        assert np.array_equal(out, plain(picture, size, scales)), size


def test_a_grey_picture_is_one_of_three_equal_channels() -> None:
    """Which kernel is at work makes no difference."""
    grey = np.random.default_rng(2).integers(0, 256, (101, 67, 1), dtype=np.uint8)
    out, colours = np.empty((33, 45, 1), np.uint8), np.empty((33, 45, 3), np.uint8)
    resize(grey, (None, None), out)
    resize(np.repeat(grey, 3, 2), (None, None), colours)
    assert np.array_equal(np.repeat(out, 3, 2), colours)


small_sides, shares = st.integers(1, 20), st.sampled_from([None, 0.5, 0.9, 1.0])


@given(*[small_sides] * 4, shares, shares, st.integers(1, 200), st.sampled_from([1, 3]), st.booleans())
def test_large_pictures_of_16_bits_are_resized_in_bands(
    height: int, width: int, new_height: int, new_width: int, a: Any, b: Any, at_once: int, channels: int, signed: bool
) -> None:
    """For memory's sake; the pixels are those of one call, whatever fits into a band, of all or a part of the input."""
    dtype = np.int16 if signed else np.uint16
    limits = np.iinfo(dtype)
    picture = np.random.default_rng(at_once).integers(limits.min, limits.max, (height, width, channels), dtype)
    scales = a and new_height / (a * height), b and new_width / (b * width)
    whole, in_bands = (np.empty((new_height, new_width, channels), dtype) for _ in range(2))
    resize(picture, scales, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize_module, "_VALUES_AT_ONCE", at_once)
        resize(picture, scales, in_bands)
    assert np.array_equal(whole, in_bands)
