"""Boxes: rectangles around what is in an image. They follow it through the same plans, and end where the picture does.

Boxes are float32 (n, 4): (x, y, width, height) in pixels of the upright picture, x and y of the left upper corner.
Edges lie between pixels: (0, 0, 1, 1) is the first pixel. Nothing here changes how many boxes there are or their order,
so what else is known of each, such as its label, stays beside it. A box that a crop doesn't show has no width and no
height:

    keep = (boxes[:, 2:] > 0).all(1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import SourceError
from .geometry import Box, Plan, Size

Boxes = npt.NDArray[np.float32]
Format = Literal["XYWH", "XYXY", "CXCYWH"]
"""What the four numbers are, as `torchvision.tv_tensors.BoundingBoxFormat` calls it: ours, corners, or the centre."""

_TOLERANCE = 1.0


def moved(boxes: Boxes, plans: Sequence[Plan]) -> Boxes:
    """Boxes as they lie in the picture that `plans` make of their image, each plan after the first of its forerunner's.

    They are cut off at the picture's edges. One that lies outside, or had no area, is left 0 wide and 0 high.
    """
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)
    corners[:, 1] += corners[:, 0]
    for plan in plans:
        corners = _within(corners, plan.box)
        if plan.mirror:
            corners[..., 0] = plan.box.width - corners[:, ::-1, 0]
        corners = corners * plan.size[::-1] / plan.box[2:]
        if plan.window is not None:
            corners = _within(corners, plan.window)
    result = corners.astype(np.float32)
    result[:, 1] -= result[:, 0]
    result[~(result[:, 1] > 0).all(1), 1] = 0
    return result.reshape(-1, 4)


def _within(corners: npt.NDArray[np.float64], box: Box) -> npt.NDArray[np.float64]:
    """Corners (n, 2, 2) as they lie in a box of the picture, moved to its edges where they are outside."""
    return np.clip(corners - box[:2], 0, box[2:])


def checked(boxes: Any, size: Size) -> Boxes:
    """Boxes of an upright image of `size` as they are packed.

    boxes: an array, tensor or sequence (n, 4) of numbers; () stands for none. They may reach 1 pixel beyond the image,
    as rounding makes them do, and are kept as they are: `moved` cuts them off.

    Raises:
        SourceError: they are no numbers (n, 4), one is not finite, has a side below 0, or reaches beyond the image.
    """
    values = _numbers(boxes)
    height, width = size
    with np.errstate(over="ignore", invalid="ignore"):
        ends = values[:, :2] + values[:, 2:]
    problems = (
        (~np.isfinite(values).all(1), "is not finite"),
        ((values[:, 2:] < 0).any(1), "has a side below 0"),
        (
            (values[:, :2] < -_TOLERANCE).any(1) | (ends > (width + _TOLERANCE, height + _TOLERANCE)).any(1),
            f"reaches beyond the image, {width} x {height}; are these (left, top, right, bottom), or of another size?",
        ),
    )
    for wrong, problem in problems:
        if wrong.any():
            place = int(wrong.argmax())
            numbers = ", ".join(f"{value:g}" for value in values[place])
            raise SourceError(f"box {place} (x, y, width, height) = ({numbers}) {problem}")
    return values.astype(np.float32)


def from_format(boxes: Any, format: str) -> Boxes:
    """Boxes out of another format (see `Format`). boxes: see `checked`, which finds what makes no sense here.

    Raises:
        SourceError: they are no numbers (n, 4), or the format is none of these.
    """
    values = _numbers(boxes)
    first, second = values[:, :2], values[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        if _known(format) == "XYXY":
            values = np.concatenate((first, second - first), 1)
        elif format == "CXCYWH":
            values = np.concatenate((first - second / 2, second), 1)
        return values.astype(np.float32)


def to_format(boxes: Boxes, format: str) -> Boxes:
    """Boxes in another format (see `Format`); what `from_format` was given, but for float32's rounding.

    Raises:
        SourceError: the format is none of these.
    """
    corner, sides = boxes[:, :2], boxes[:, 2:]
    if _known(format) == "XYXY":
        return np.concatenate((corner, corner + sides), 1)
    if format == "CXCYWH":
        return np.concatenate((corner + sides / 2, sides), 1)
    return boxes


def _known(format: str) -> str:
    if format not in get_args(Format):
        raise SourceError(f"the format of boxes is {format!r}; it may be {', '.join(get_args(Format))}")
    return format


def _numbers(boxes: Any) -> npt.NDArray[np.float64]:
    try:
        values = np.asarray(boxes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SourceError(f"boxes are numbers (n, 4), and these can't be an array: {error}") from error
    if values.shape == (0,):
        values = values.reshape(0, 4)
    if values.dtype.kind not in "iuf" or values.ndim != 2 or values.shape[1] != 4:
        raise SourceError(f"boxes are numbers (n, 4), got {values.dtype} {values.shape}")
    return values.astype(np.float64)
