"""Where a picture's pixels come from: boxes, sizes, orientations and the plan of a read. Plain integers only.

A `Plan` says everything about one sample's geometry before a byte is decoded: which rectangle of the image is read,
whether it is mirrored as it is read, which size it is resized to, and which window of the result is kept. Each
transform takes a plan and returns the next one (`cropped`, `resized`, `mirrored`); only the last plan is carried out.
Because the read rectangle is known first, a decoder may touch nothing outside it.

Coordinates are of the upright picture: EXIF orientation has been applied in the mind, not in memory. `read_for`
translates a plan to the frame in which the file keeps its pixels, at the size at which the decoder is to decode them. A
mirror is one more of the same eight orientations (`MIRRORED`), so turning and flipping cost one pass over the crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Size = tuple[int, int]
"""(height, width), as torchvision writes it."""

MAX_PIXELS = 1 << 28
"""Larger images are left out when they are packed, unless another limit is given."""

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

    @property
    def ends(self) -> Size:
        """Where the box ends, (below, right)."""
        return self.y + self.height, self.x + self.width

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

    @property
    def most_pixels(self) -> int:
        """How many pixels the largest picture has that is made on the way: of a resize, all up to the window's end."""
        if self.window is None:
            return self.size[0] * self.size[1]
        below, right = self.window.ends
        up_to_its_end = max(0, min(below, self.size[0])) * max(0, min(right, self.size[1]))
        return max(up_to_its_end, self.window.height * self.window.width)

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


REDUCTIONS = (8, 4, 2)
"""What JPEG's DCT scaling can divide an image's sides by, the largest first."""

_FLIPPED = {2: (1,), 3: (0, 1), 4: (0,), 6: (0,), 7: (0, 1), 8: (1,)}
"""EXIF orientation -> the stored axes (0 down, 1 across) that run backwards in the upright picture."""

Scales = tuple[float | None, float | None]
"""Output / input of a resize along height and width; None where the two lengths say it."""


def reduced_box(box: Box, reduction: int) -> Box:
    """The pixels of an image at 1 / reduction of its size in which those of a box lie, at its edges in part."""
    x, y = box.x // reduction, box.y // reduction
    below, right = box.ends
    return Box(x, y, -(-right // reduction) - x, -(-below // reduction) - y)


class Read(NamedTuple):
    """What a decoder has to do for a plan.

    box: the rectangle to decode, in the stored frame, in pixels of the image at 1 / reduction of its size.
    reduction: 1, or by how much DCT scaling divides both sides.
    turn: the EXIF orientation that turns the box upright, the plan's mirror included.
    source: size of the picture that is resized. The turned box is its lower right part; what is left of it and above
        only influences what the window doesn't show.
    size: what it is resized to; the same size means that it isn't. scales: of that resize.
    window: as in `Plan`.
    """

    box: Box
    reduction: int
    turn: int
    source: Size
    size: Size
    scales: Scales
    window: Box | None


def read_for(plan: Plan, size: Size, orientation: int, *, scaled: bool, tiled: bool) -> Read:
    """Turn a plan for the upright picture into a read of the stored one.

    size: (height, width) as stored. orientation: EXIF, 1 to 8, as stored. scaled: whether DCT scaling may be used.
    tiled: whether fewer columns are cheaper to read.

    What the window doesn't show is not read. Sides of up to 8 pixels are not reduced: libjpeg-turbo is told no scale
    but the size that should come out, which several scales of a tiny image share.
    """
    turn = MIRRORED[orientation] if plan.mirror else orientation
    box = stored_box(plan.box, orientation, upright_size(size, orientation))
    reduction = _reduction(plan, box, turn) if scaled and min(size) > 8 else 1
    if reduction > 1:
        box = Box(box.x // reduction, box.y // reduction, -(-box.width // reduction), -(-box.height // reduction))
    source = upright_size((box.height, box.width), turn)
    scales = plan.size[0] * reduction / plan.box.height, plan.size[1] * reduction / plan.box.width
    window = plan.window
    if window is None:
        return Read(box, reduction, turn, source, plan.size, scales if reduction > 1 else (None, None), None)
    top, height, bottom = _reach(source[0], plan.size[0], scales[0], window.y, window.y + window.height)
    left, width, right = _reach(source[1], plan.size[1], scales[1], window.x, window.x + window.width)
    if not tiled and turn == 1 and source[1] == -(-size[1] // reduction) != right:
        top, left, width = 0, 0, source[1]  # whole rows lie in memory as one piece: that saves a copy
    inner = stored_box(Box(left, top, width - left, height - top), turn, source)
    box = Box(box.x + inner.x, box.y + inner.y, inner.width, inner.height)
    return Read(box, reduction, turn, (height, width), (bottom, right), scales, window)


def reduction_for(box: Size, target: Size) -> int:
    """By how much DCT scaling may divide a box that is then resized to `target`.

    It gets no smaller than that. Division by 4 and 8 blurs more, and has to leave it an eighth larger: without that,
    the worst of thirty photographs came out at 33 dB from its picture at full size, with it at 39 dB.
    """
    for reduction in REDUCTIONS:
        least = reduction if reduction == 2 else reduction * 9 / 8
        if box[0] >= least * target[0] and box[1] >= least * target[1]:
            return reduction
    return 1


def _reduction(plan: Plan, box: Box, turn: int) -> int:
    """The largest reduction at which the turned box begins on a whole pixel, which is all that a resize can start at.

    Where it ends within one, the resize's scale says so.
    """
    most = reduction_for((plan.box.height, plan.box.width), plan.size)
    backwards = [(box.height, box.width)[axis] for axis in _FLIPPED.get(turn, ())]
    whole = (box.x, box.y, *backwards)
    return next((r for r in REDUCTIONS if r <= most and all(edge % r == 0 for edge in whole)), 1)


def on_grid(box: Box, target: Size) -> Box:
    """A random box that is to be resized to `target`, moved and cut to where DCT scaling can read exactly it."""
    step = reduction_for((box.height, box.width), target)
    return Box(*(length - length % step for length in box))


def _reach(length: int, resized: int, scale: float, start: int, end: int) -> tuple[int, int, int]:
    """Which of `length` source pixels a window from `start` to `end` of `resized` pixels needs.

    Returns the first, where they end, and how many pixels come out of a resize of all up to that end.

    An antialiased bilinear filter reaches one step (source pixels per output pixel, at least 1) beyond an output
    pixel's centre. torch's kernel takes equal lengths for "nothing to do" along that axis, whatever the scale: then
    one more pixel comes out.
    """
    end = max(1, min(end, resized))
    start = min(max(start, 0), end - 1)
    if length == resized:
        return start, end, end
    step = 1 / scale
    first = max(0, int(start * step - max(step, 1)) - 1)
    while True:
        needed = min(length, int(end * step + max(step, 1)) + 2)
        if needed != end:
            return min(first, needed - 1), needed, end
        end += 1


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
