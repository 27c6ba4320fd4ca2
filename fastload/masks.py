"""Masks: images whose pixels are classes or instances. Values are never blended; a crop reads only what it shows.

A mask is stored upright, as `blocks`, and goes with an image of the same upright size. `render` carries out the same
plans as the image's, by asking for each output pixel which pixel of the mask it shows: the one at its centre (as
`interpolation="nearest-exact"` of torch). Several plans in a row are one such question, so a mask is gathered once.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from . import blocks, headers
from .blocks import Values
from .errors import DecodeError
from .geometry import Box, Plan, Size
from .record import BLOCKS, Field

_Indices = npt.NDArray[np.int64]


def decode(data: bytes, max_pixels: int) -> Values:
    """The values of a mask file: uint8 or uint16 (height, width). Of a palette image these are its indices.

    Raises:
        DecodeError: it is damaged, has colours or alpha instead of values, values that don't fit, or is lossy.
    """
    try:
        with headers.read(data) as image:
            image.verify()  # a PNG's checksums, which reading its pixels passes over
        with headers.read(data) as image:
            if image.width * image.height > max_pixels:
                raise DecodeError(f"the mask has {image.width} x {image.height} pixels, the limit is {max_pixels}")
            if image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg":
                raise DecodeError("the mask is a JPEG, which changes values; save it as PNG (or are they swapped?)")
            if len(image.getbands()) != 1:
                raise DecodeError(
                    f"the mask has {len(image.getbands())} channels ({image.mode}); a mask has one, whose values are "
                    "classes: grey or with a palette (or are image and mask swapped?)"
                )
            values = np.array(image) // _scale(data)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("the mask is no image, or none of PNG, BMP, PPM, TIFF, GIF and WebP") from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"the mask is damaged: {error}") from error
    return narrowed(values)


def _scale(data: bytes) -> int:
    """What Pillow has multiplied the values by: grey PNGs of 2 and 4 bits it spreads over 0 to 255, and so PGMs."""
    if data.startswith(b"\x89PNG") and data[25] == 0 and data[24] in (2, 4):
        return 255 // ((1 << data[24]) - 1)
    header = re.match(rb"P[25]\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*(\d+)\s", data)
    if header is not None and int(header[1]) not in (255, 65535):
        raise DecodeError(
            f"the mask is a PGM of values up to {int(header[1])}, which are read as shades; save it as PNG"
        )
    return 1


def narrowed(values: npt.NDArray[Any]) -> Values:
    """Whole numbers as uint8, or as uint16 where they need it; DecodeError where they don't fit."""
    if values.dtype.kind not in "biu" or values.ndim != 2:
        raise DecodeError(f"a mask is whole numbers (height, width), got {values.dtype} {values.shape}")
    if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
        raise DecodeError(f"a mask's values may be 0 to 65535, got {values.min()} to {values.max()}")
    small = values.dtype.itemsize == 1 or not values.size or values.max() <= 0xFF
    return values.astype(np.uint8 if small else np.uint16, copy=False)


def resized(values: Values, size: Size) -> Values:
    """A mask at another (height, width), by the nearest values."""
    whole = Plan.whole(values.shape[:2])
    rows, columns = (_then(np.arange(values.shape[a]), whole._replace(size=size), a) for a in (0, 1))
    return _taken(_taken(values, rows, 0), columns, 1)


def render(field: Field, size: Size, plans: list[Plan], out: npt.NDArray[Any], fill: int) -> None:
    """Write what `plans` make of a mask to `out`; where a window reaches beyond the mask, `fill`.

    size: the upright size of the image that it goes with.

    Raises:
        ChecksumError, DecodeError: the mask is damaged, or of another size.
    """
    if field.codec != BLOCKS or (field.height, field.width) != size or field.channels != 1:
        raise DecodeError(f"the mask is {field.width} x {field.height} pixels, its image {size[1]} x {size[0]}")
    if blocks.dtype_of(field).itemsize > out.itemsize:
        raise DecodeError(f"the mask has values above {np.iinfo(out.dtype).max}, which its column of the store denies")
    rows, columns = (
        functools.reduce(functools.partial(_then, axis=axis), plans, np.arange(size[axis])) for axis in (0, 1)
    )
    shown = _shown(rows), _shown(columns)
    rows, columns = rows[shown[0]], columns[shown[1]]
    if len(rows) * len(columns) < out.size:
        out[...] = fill
    if not len(rows) or not len(columns):
        return
    top, left = int(rows.min()), int(columns.min())
    values = blocks.read(field, Box(left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1))
    out[shown] = _taken(_taken(values, rows - top, 0), columns - left, 1)


def _then(sources: _Indices, plan: Plan, axis: int) -> _Indices:
    """Which row or column each one of a plan's output shows, -1 for none. sources: the same for what it works on."""
    start, length = (plan.box.y, plan.box.height) if axis == 0 else (plan.box.x, plan.box.width)
    places = np.arange(plan.output_size[axis])
    if plan.window is not None:
        places += plan.window.y if axis == 0 else plan.window.x
    size = plan.size[axis]
    nearest = (2 * places + 1) * length // (2 * size)
    if plan.mirror and axis == 1:
        nearest = length - 1 - nearest
    outside = (places < 0) | (places >= size)
    return np.where(outside, -1, sources[np.where(outside, 0, start + nearest)])


def _shown(sources: _Indices) -> slice:
    """The places in a row that show something: they lie together."""
    (places,) = np.nonzero(sources >= 0)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _taken(values: Values, places: _Indices, axis: int) -> Values:
    """The rows or columns at these places; without a copy where they are all of them, in order or reversed."""
    whole = np.arange(values.shape[axis])
    if np.array_equal(places, whole):
        return values
    if np.array_equal(places, whole[::-1]):
        return np.flip(values, axis)
    return values.take(places, axis)
