"""Resizing: torch's own antialiased bilinear kernel, the one behind torchvision's tensors.

The one for uint8 runs on channels-last memory without the GIL: a third of Pillow's time for pixels within 1 level of
it. It takes no offset, so a window of a resized picture is cut from a resize that ends where the window ends. Pictures
of 16 bits go through float64: in float32 the kernel is off by up to 20 of 65,536 levels. Large ones go there some rows
at a time, their width first, which is the kernel's own order: the pixels are the same, bit for bit.

For one channel the uint8 kernel is slow: it is vectorised over channels. But rows are resized independently of each
other, and so are columns. So four columns are handed to it as if they were channels, which resizes the height; the same
on the transposed picture resizes the width. The pixels are those of the plain call, bit for bit, in a quarter of its
time.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from .blocks import Values
from .buffers import scratch
from .geometry import Scales, Size

# As torch.nn.functional calls it, 3 us less than through torch.ops; its stub lacks the form with `out`.
_kernel: Any = torch._C._nn._upsample_bilinear2d_aa
_LANES = 4
_VALUES_AT_ONCE = 1 << 22

Floats = npt.NDArray[np.float64]


def resize(picture: Values, scales: Scales, out: Values) -> None:
    """Write `picture` to `out`, at its size.

    picture, out: C-contiguous (height, width, 1 or 3), uint8, uint16 or int16. scales: of height and width, output /
    input, where they are not those of the sizes.
    """
    if out.dtype != np.uint8:
        _resize_deep(picture, scales, out)
    elif picture.shape[2] == 1:
        _resize_grey(picture[..., 0], scales, out[..., 0])
    else:
        _kernel(_as_images(picture), out.shape[:2], False, *scales, out=_as_images(out))


def _resize_deep(picture: Values, scales: Scales, out: Values) -> None:
    if out.shape[1] == 1:  # torch's floating kernel mixes up the rows of a single column; a single row comes out right
        picture, out, scales = picture.swapaxes(0, 1), out.swapaxes(0, 1), scales[::-1]
    source: Values | Floats = picture
    if source.size > _VALUES_AT_ONCE:
        source, scales = _narrowed(picture, out.shape[1], scales[1]), (scales[0], None)
    resized = _as_floats(source, out.shape[:2], scales)
    np.copyto(out, np.rint(resized, out=resized), casting="unsafe")


def _narrowed(picture: Values, width: int, scale: float | None) -> Floats:
    height, _, channels = picture.shape
    rows = max(1, _VALUES_AT_ONCE // picture[0].size)
    out = np.empty((height, width, channels))
    for top in range(0, height, rows):
        band = picture[top : top + rows]
        out[top : top + rows] = _as_floats(band, (len(band), width), (None, scale))
    return out


def _as_floats(picture: Values | Floats, size: Size, scales: Scales) -> Floats:
    """The picture at another size, in float64."""
    resized = _kernel(_as_images(np.ascontiguousarray(picture, np.float64)), size, False, *scales)
    floats: Floats = resized[0].permute(1, 2, 0).numpy()
    return floats


def _resize_grey(grey: Values, scales: Scales, out: Values) -> None:
    (height, width), (new_height, new_width) = grey.shape, out.shape
    if new_width != width or scales[1] is not None:
        columns = _vertically(_transposed(grey, "columns"), new_width, scales[1], "resized columns")
        grey = _transposed(columns[:, :height], "rows")
    else:
        grey = _padded(grey)
    if new_height != height or scales[0] is not None:
        grey = _vertically(grey, new_height, scales[0], "resized rows")
    np.copyto(out, grey[:, :new_width])


def _vertically(grey: Values, height: int, scale: float | None, name: str) -> Values:
    """A picture (height, width) whose width is a multiple of four, at another height."""
    width = grey.shape[1]
    out = scratch(name, height * width).reshape(height, width)
    lanes = width // _LANES
    as_colours = (array.reshape(-1, lanes, _LANES) for array in (grey, out))
    picture, resized = map(_as_images, as_colours)
    _kernel(picture, (height, lanes), False, scale, None, out=resized)
    return out


def _transposed(grey: Values, name: str) -> Values:
    """Rows as columns, their length rounded up to a multiple of four."""
    height, width = grey.shape
    out = _lanes(name, width, height)
    if out.shape[1] == height and grey.flags.c_contiguous:
        cv2.transpose(grey, out)
    else:
        np.copyto(out[:, :height], grey.T)
    return out


def _padded(grey: Values) -> Values:
    """The rows, their length rounded up to a multiple of four."""
    height, width = grey.shape
    if width % _LANES == 0:
        return grey
    out = _lanes("rows", height, width)
    np.copyto(out[:, :width], grey)
    return out


def _lanes(name: str, height: int, width: int) -> Values:
    whole = -(-width // _LANES) * _LANES
    return scratch(name, height * whole).reshape(height, whole)


def _as_images(array: Values | Floats) -> torch.Tensor:
    """A (height, width, channels) array as a batch of one channels-last tensor, sharing its memory."""
    height, width, channels = array.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.from_numpy(array).as_strided((1, channels, height, width), strides)
