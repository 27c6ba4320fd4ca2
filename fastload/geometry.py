"""Where a picture's pixels come from: boxes, sizes, orientations and the plan of a read. Plain integers only.

A `Plan` says everything about one sample's geometry before a byte is decoded: which rectangle of the image is read,
whether it is mirrored as it is read, which size it is resized to, and which window of the result is kept. Each
transform takes a plan and returns the next one (`cropped`, `resized`, `mirrored`); only the last plan is carried out.
Because the read rectangle is known first, a decoder may touch nothing outside it.

Coordinates are of the upright picture: EXIF orientation has been applied in the mind, not in memory. `stored_box`
and `TURNED` translate to the frame in which the file keeps its pixels. A mirror is one more of the same eight
orientations (`MIRRORED`), so turning and flipping cost one pass over the crop, together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Size = tuple[int, int]
"""(height, width), as torchvision writes it."""

MIRRORED = (0, 2, 1, 4, 3, 6, 5, 8, 7)
"""EXIF orientation -> the orientation that shows the same picture mirrored left to right (index 0 is unused)."""

TURNED = frozenset((5, 6, 7, 8))
"""The EXIF orientations that swap height and width."""


class Box(NamedTuple):
    """A rectangle of pixels: left edge, top edge, width, height."""

    x: int
    y: int
    width: int
    height: int

    def inside(self, size: Size) -> bool:
        """True if the box is not empty and lies within an image of `size`."""
        height, width = size
        return (
            self.width > 0
            and self.height > 0
            and self.x >= 0
            and self.y >= 0
            and self.x + self.width <= width
            and self.y + self.height <= height
        )


class Plan(NamedTuple):
    """What is read and what becomes of it: box, then mirror, then resize, then window.

    box: the rectangle of the upright image that is read.
    size: what the box is resized to; the box's own size where nothing is resized.
    window: the rectangle of the resized picture that is kept, None for all of it. What lies outside is zero.
    mirror: whether the box is mirrored left to right as it is read (so `window` counts in mirrored coordinates).
    """

    box: Box
    size: Size
    window: Box | None = None
    mirror: bool = False

    @classmethod
    def whole(cls, size: Size) -> Plan:
        """The plan that reads an image of `size` as it is."""
        return cls(Box(0, 0, size[1], size[0]), size)

    @property
    def resizes(self) -> bool:
        """Whether any pixel is interpolated."""
        return self.size != (self.box.height, self.box.width)

    @property
    def output_size(self) -> Size:
        """(height, width) of the picture that comes out."""
        return self.size if self.window is None else (self.window.height, self.window.width)

    def cropped(self, box: Box) -> Plan | None:
        """This plan with its output cropped to `box`, or None if that takes a second pass.

        A box that reaches beyond the picture pads it with zeros, as torchvision's CenterCrop does.
        """
        if self.window is not None:
            return None
        if self.resizes or not box.inside(self.size):
            return self._replace(window=box)
        read = self.box
        left = read.width - box.x - box.width if self.mirror else box.x
        return self._replace(
            box=Box(read.x + left, read.y + box.y, box.width, box.height), size=(box.height, box.width)
        )

    def resized(self, size: Size) -> Plan | None:
        """This plan with its output resized to `size`, or None if that takes a second pass."""
        if size == self.output_size:
            return self
        if self.window is not None or self.resizes:
            return None
        return self._replace(size=size)

    def mirrored(self) -> Plan:
        """This plan with its output mirrored left to right."""
        window = self.window
        if window is not None:
            window = window._replace(x=self.size[1] - window.x - window.width)
        return self._replace(mirror=not self.mirror, window=window)


Scales = tuple[float | None, float | None]
"""Output / input of a resize along height and width; None where the two lengths say it."""


def trim(plan: Plan) -> tuple[Plan, Scales]:
    """Leave out of a plan what its window doesn't show: pixels right of it and below are not read.

    What lies left and above stays, since a resize starts at whole pixels. The resize that remains has fewer pixels on
    both sides and needs the scales of the whole one.
    """
    window = plan.window
    if window is None or not plan.resizes:
        return plan, (None, None)
    box, size = plan.box, plan.size
    height, bottom = _reach(box.height, size[0], min(window.y + window.height, size[0]))
    width, right = _reach(box.width, size[1], min(window.x + window.width, size[1]))
    left = box.x + (box.width - width if plan.mirror else 0)
    trimmed = plan._replace(box=Box(left, box.y, width, height), size=(bottom, right))
    return trimmed, (size[0] / box.height, size[1] / box.width)


def _reach(length: int, resized: int, end: int) -> tuple[int, int]:
    """How much of `length` source pixels the first `end` of `resized` pixels need, and how many then come out.

    An antialiased bilinear filter reaches one step (source pixels per output pixel, at least 1) beyond an output
    pixel's centre. torch's kernel takes equal lengths for "nothing to do" along that axis, whatever the scale: then
    one more pixel comes out.
    """
    if length == resized:
        return end, end
    step = length / resized
    needed = min(length, int(end * step + max(step, 1)) + 2)
    return (needed, end) if needed != end else _reach(length, resized, end + 1)


def stored_box(box: Box, orientation: int, size: Size) -> Box:
    """Translate a box of the upright picture to the frame in which the file keeps it.

    orientation: EXIF, 1 to 8. size: (height, width) of the upright picture.
    """
    if orientation == 1:
        return box
    height, width = size
    x, y, w, h = box
    right, bottom = width - x - w, height - y - h
    return (
        Box(right, y, w, h),
        Box(right, bottom, w, h),
        Box(x, bottom, w, h),
        Box(y, x, h, w),
        Box(y, right, h, w),
        Box(bottom, right, h, w),
        Box(bottom, x, h, w),
    )[orientation - 2]


def upright_size(size: Size, orientation: int) -> Size:
    """(height, width) of the upright picture whose file says `size`; its own inverse."""
    return (size[1], size[0]) if orientation in TURNED else size


def short_side_size(size: Size, short: int, max_size: int | None = None) -> Size:
    """(height, width) after resizing the shorter side to `short` pixels: torchvision's `Resize(int)` rule.

    The longer side is truncated, not rounded, and at least 1. max_size: a limit for the longer side.
    """
    height, width = size
    smaller, larger = min(size), max(size)
    new_small, new_large = short, max(1, int(short * larger / smaller))
    if max_size is not None and new_large > max_size:
        new_small, new_large = max(1, int(max_size * new_small / new_large)), max_size
    return (new_large, new_small) if width <= height else (new_small, new_large)


def center_box(size: Size, crop: Size) -> Box:
    """The centred box of `crop` (height, width) in an image of `size`: torchvision's `CenterCrop` rule.

    Where the crop is larger it reaches beyond, by a pixel less on the left and top if the difference is odd.
    """
    top, left = (
        round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)
        for length, wanted in zip(size, crop, strict=True)
    )
    return Box(left, top, crop[1], crop[0])


def random_resized_box(
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: Callable[[float, float], float],
    integer: Callable[[int], int],
) -> Box:
    """Draw the box of torchvision's `RandomResizedCrop.get_params`: ten tries, then the largest centred fit.

    scale: bounds of the box's share of the area. ratio: bounds of width / height, drawn log-uniformly.
    uniform(a, b) draws a float, integer(n) an int in [0, n).
    """
    height, width = size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * uniform(*scale)
        aspect = math.exp(uniform(log_low, log_high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y = integer(height - h + 1)
            return Box(integer(width - w + 1), y, w, h)
    if width / height < ratio[0]:
        w, h = width, min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = min(width, max(1, round(height * ratio[1]))), height
    else:
        w, h = width, height
    return Box((width - w) // 2, (height - h) // 2, w, h)
