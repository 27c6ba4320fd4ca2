"""Boxes: what plans make of them against painted masks and scalar fractions, formats, and all that is refused."""

from __future__ import annotations

import copy
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spied import Spied

from fastload import blocks, boxes, masks
from fastload.errors import SourceError
from fastload.geometry import Box, Plan, Size
from fastload.order import SampleRandom
from fastload.transforms import (
    CenterCrop,
    Compose,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomScale,
    Resize,
)

lengths = st.integers(1, 60)
sizes = st.tuples(lengths, lengths)
paddings = st.none() | st.integers(0, 12) | st.tuples(st.integers(0, 9), st.integers(0, 9))
transforms = st.one_of(
    st.builds(Resize, sizes | st.integers(1, 40)),
    st.builds(Resize, st.tuples(lengths, st.none()) | st.tuples(st.none(), lengths)),
    st.builds(CenterCrop, sizes),
    st.builds(lambda size, padding: RandomCrop(size, padding, pad_if_needed=True), sizes, paddings),
    st.builds(RandomScale, st.sampled_from([(0.3, 0.9), (1.0, 1.0), (0.5, 2.0), (1.5, 1.7)])),
    st.builds(RandomHorizontalFlip, st.sampled_from([0.0, 1.0, 0.5])),
    st.builds(RandomResizedCrop, sizes, st.sampled_from([(0.08, 1.0), (0.5, 0.5)])),
)
chains = st.lists(transforms, max_size=5)
indices = st.integers(0, 1 << 40)


def array(*rows: Any) -> boxes.Boxes:
    return np.array(rows, np.float32).reshape(-1, 4)


@st.composite
def boxes_in(draw: Any, size: Size, step: int = 1) -> boxes.Boxes:
    """Some boxes within an image, their edges at multiples of 1 / step pixels."""
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        spans = [sorted(draw(st.tuples(*2 * [st.integers(0, step * size[axis])]))) for axis in (1, 0)]
        rows.append([spans[0][0], spans[1][0], spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]])
    return array(*rows) / np.float32(step)


# ---- plans, against pixels: a box and what a rectangle that is painted there becomes


def painted(box: Any, size: Size, plans: list[Plan]) -> tuple[int, int, int, int] | None:
    """Where a rectangle of a mask is seen in the picture: (left, top, right, bottom)."""
    x, y, width, height = map(int, box)
    values = np.zeros(size, np.uint8)
    values[y : y + height, x : x + width] = 1
    out = np.empty(plans[-1].output_size, np.uint8)
    masks.render(blocks.field_of(values), size, plans, out, 255)
    rows, columns = np.nonzero(out == 1)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def rounding(plans: list[Plan]) -> float:
    """How far apart edges of pixels and boxes may be: half a pixel for each resize, enlarged by those that follow."""
    error = 0.0
    for plan in plans:
        if plan.resizes:
            error = error * max(plan.size[0] / plan.box.height, plan.size[1] / plan.box.width, 1) + 0.5
    return error


@settings(deadline=None, max_examples=300)
@given(st.data(), chains, sizes, indices)
def test_a_box_is_where_its_pixels_are(data: Any, chain: list[Any], size: Size, index: int) -> None:
    """Any transforms in any order: half a pixel apart after a resize (a pixel after two), equal without one."""
    plans = Compose(chain).plans(size, SampleRandom(1, 0, index))
    assume(all(max(plan.size) <= 2000 and max(plan.output_size) <= 400 for plan in plans))
    before = data.draw(boxes_in(size))
    after = boxes.moved(before, plans)
    assert after.shape == before.shape
    error = rounding(plans) + 1e-4 if any(plan.resizes for plan in plans) else 0
    for old, (x, y, width, height) in zip(before, after.astype(np.float64), strict=True):
        seen = painted(old, size, plans)
        if seen is None:
            assert min(width, height) <= 2 * error
        elif not (width and height):
            assert sum(plan.resizes for plan in plans) > 1, "what is seen through one resize has a box"
            assert min(seen[2] - seen[0], seen[3] - seen[1]) <= 2 * error
        else:
            assert np.abs(np.array((x, y, x + width, y + height)) - seen).max() <= error


def test_the_pixels_of_a_large_image() -> None:
    """A photograph's size, the usual transforms: within 1 pixel; what is 2 pixels or more wide and high is found."""
    size, found = (480, 640), 0
    before = array((0, 0, 640, 480), (100, 50, 300, 200), (600, 440, 40, 40), (10, 10, 30, 300), (320, 0, 1, 480))
    for index in range(60):
        chain = [RandomScale((0.5, 2.0)), RandomCrop(224, 16, pad_if_needed=True), RandomHorizontalFlip()]
        chain = [[RandomResizedCrop(224), RandomHorizontalFlip()], chain, [Resize(256), CenterCrop(300)]][index % 3]
        plans = Compose(chain).plans(size, SampleRandom(0, 0, index))
        for old, (x, y, width, height) in zip(before, boxes.moved(before, plans), strict=True):
            seen = painted(old, size, plans)
            if seen is not None:
                assert np.abs(np.array((x, y, x + width, y + height)) - seen).max() <= 0.5 + 1e-3
                found += 1
            else:
                assert min(width, height) <= 1
    assert found > 150


# ---- plans, against torchvision's rules for boxes, applied to one number at a time


Edges = list[Fraction]
"""Left, top, right, bottom."""


def cropped(box: Edges, left: int, top: int, width: int, height: int) -> Edges:
    """`crop_bounding_boxes`, which clamps to the canvas."""
    moved = [box[0] - left, box[1] - top, box[2] - left, box[3] - top]
    limits = width, height, width, height
    return [min(max(edge, Fraction(0)), Fraction(limit)) for edge, limit in zip(moved, limits, strict=True)]


def resized(box: Edges, old: Size, new: Size) -> Edges:
    """`resize_bounding_boxes`: each axis by its own ratio."""
    across, down = Fraction(new[1], old[1]), Fraction(new[0], old[0])
    return [box[0] * across, box[1] * down, box[2] * across, box[3] * down]


def step_by_step(box: Any, chain: list[Spied], size: Size) -> list[float]:
    """A box as it leaves a chain that makes a picture of its own at each step."""
    x, y, width, height = (Fraction(float(value)) for value in box)
    edges = [x, y, x + width, y + height]
    for spied in chain:
        plan = spied.transform.plan(Plan.whole(size), copy.copy(spied.chance))
        edges = cropped(edges, *plan.box)
        if plan.mirror:
            edges = [plan.box.width - edges[2], edges[1], plan.box.width - edges[0], edges[3]]
        edges = resized(edges, (plan.box.height, plan.box.width), plan.size)
        if plan.window is not None:
            edges = cropped(edges, *plan.window)
        size = plan.output_size
    sides = edges[2] - edges[0], edges[3] - edges[1]
    return [*map(float, edges[:2]), *(map(float, sides) if all(sides) else (0.0, 0.0))]


@settings(deadline=None, max_examples=300)
@given(st.data(), chains, sizes, indices)
def test_folded_plans_do_what_their_steps_do(data: Any, chain: list[Any], size: Size, index: int) -> None:
    """Few plans or many pictures: the same boxes, to float32's precision, and within the picture."""
    spied = [Spied(transform) for transform in chain]
    plans = Compose(spied).plans(size, SampleRandom(1, 0, index))
    before = data.draw(boxes_in(size, 8))
    after = boxes.moved(before, plans)
    largest = max(plans[-1].output_size)
    for old, new in zip(before, after, strict=True):
        assert np.abs(new - step_by_step(old, spied, size)).max() <= 2e-6 * largest
    assert ((after[:, :2] >= 0) & (after[:, :2] + after[:, 2:] <= plans[-1].output_size[::-1])).all()
    assert ((after[:, 2:] > 0).all(1) | (after[:, 2:] == 0).all(1)).all()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan.whole((10, 20)), (2, 1, 8, 4)),
        (Plan.whole((10, 20)).mirrored(), (10, 1, 8, 4)),
        (Plan(Box(4, 2, 10, 6), (6, 10)), (0, 0, 6, 3)),
        (Plan(Box(4, 2, 10, 6), (6, 10), mirror=True), (4, 0, 6, 3)),
        (Plan(Box(4, 2, 10, 6), (12, 5)), (0, 0, 3, 6)),
        (Plan(Box(0, 0, 20, 10), (10, 20), Box(-3, -2, 30, 30)), (5, 3, 8, 4)),
        (Plan(Box(0, 0, 20, 10), (20, 40), Box(10, 4, 8, 3)), (0, 0, 8, 3)),
        (Plan(Box(0, 0, 20, 10), (20, 40), Box(10, 4, 8, 3), mirror=True), (8, 0, 0, 0)),
        (Plan(Box(10, 0, 10, 10), (10, 10)), (0, 1, 0, 0)),
    ],
)
def test_each_part_of_a_plan(plan: Plan, expected: Any) -> None:
    """Worked out by hand for the box (2, 1, 8, 4); nothing is written to the boxes that were given."""
    before = array((2, 1, 8, 4))
    after = boxes.moved(before, [plan])
    assert after.tolist() == [list(expected)]
    assert after.dtype == np.float32
    assert before.tolist() == [[2, 1, 8, 4]]


def test_boxes_that_vanish_keep_their_place() -> None:
    """So their labels stay beside them; `keep` finds those that are left."""
    before = array((0, 0, 5, 5), (50, 50, 10, 10), (4, 4, 3, 3), (5, 0, 0, 9), (5, 8, 2, 2))
    after = boxes.moved(before, [Plan(Box(4, 4, 4, 4), (4, 4))])
    keep = (after[:, 2:] > 0).all(1)
    assert keep.tolist() == [True, False, True, False, False]
    assert after[keep].tolist() == [[0, 0, 1, 1], [0, 0, 3, 3]]
    assert not after[~keep, 2:].any()


def test_no_boxes_stay_none() -> None:
    """And none of plans changes nothing."""
    for empty in (np.zeros((0, 4), np.float32), boxes.checked((), (5, 5)), boxes.from_format([], "XYXY")):
        assert boxes.moved(empty, [Plan.whole((5, 5)).mirrored()]).shape == (0, 4)
    assert boxes.moved(array((1, 2, 3, 4)), []).tolist() == [[1, 2, 3, 4]]


# ---- formats


@pytest.mark.parametrize(
    ("format", "given"), [("XYWH", (10, 20, 30, 50)), ("XYXY", (10, 20, 40, 70)), ("CXCYWH", (25, 45, 30, 50))]
)
def test_the_formats(format: str, given: Any) -> None:
    """Of any type of number, and back."""
    for values in ([given], np.array([given], np.uint8), np.array([given], np.float16), torch.tensor([given])):
        ours = boxes.from_format(values, format)
        assert ours.dtype == np.float32
        assert ours.tolist() == [[10, 20, 30, 50]]
        back = boxes.to_format(ours, format)
        assert back.dtype == np.float32
        assert back.tolist() == [list(given)]


@settings(deadline=None)
@given(st.data(), sizes, st.sampled_from(["XYWH", "XYXY", "CXCYWH"]))
def test_formats_come_back(data: Any, size: Size, format: str) -> None:
    """Fractions that float32 holds exactly come back exactly, others within its rounding."""
    ours = data.draw(boxes_in(size, 8))
    theirs = boxes.to_format(ours, format)
    assert np.array_equal(boxes.from_format(theirs, format), ours)
    uneven = theirs / np.float32(7)
    back = boxes.to_format(boxes.from_format(uneven, format), format)
    assert np.abs(back - uneven).max(initial=0) <= 1e-6 * max(size)


def test_other_formats_are_refused() -> None:
    """torchvision has rotated ones too."""
    for call in (lambda: boxes.from_format([(1, 2, 3, 4)], "XYWHR"), lambda: boxes.to_format(array(), "xyxy")):
        with pytest.raises(SourceError, match="it may be XYWH, XYXY, CXCYWH"):
            call()


# ---- what is packed


def test_what_is_packed_is_kept_as_it_is() -> None:
    """A pixel beyond the image at the most, as rounding leaves it; sides of 0; any type of number."""
    given = [(0, 0, 640, 480), (-1, -1, 642, 482), (639.5, 0, 1.5, 0), (640, 480, 0, 0)]
    for values in (given, np.array(given), torch.tensor(given)):
        got = boxes.checked(values, (480, 640))
        assert got.dtype == np.float32
        assert np.array_equal(got, np.array(given, np.float32))
    assert boxes.checked(np.zeros((0, 4), np.int64), (1, 1)).shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((600, 10, 50, 20), r"box 2 \(x, y, width, height\) = \(600, 10, 50, 20\) reaches beyond the image, 640 x 480"),
        ((10, 470, 5, 11.5), r"box 2 .* = \(10, 470, 5, 11.5\) reaches beyond"),
        ((-1.5, 0, 5, 5), r"\(-1.5, 0, 5, 5\) reaches beyond"),
        ((0, -2, 5, 5), "reaches beyond"),
        ((1e300, 0, 1e300, 0), "reaches beyond"),
        ((1.7e308, 0, 1.7e308, 0), "reaches beyond"),
        ((30, 10, -5, 20), r"box 2 .* = \(30, 10, -5, 20\) has a side below 0"),
        ((30, 10, 5, -0.001), "has a side below 0"),
        ((0, 0, np.nan, 1), r"\(0, 0, nan, 1\) is not finite"),
        ((-np.inf, 0, np.inf, 1), "is not finite"),
    ],
)
def test_boxes_that_make_no_sense_are_named(box: Any, message: str) -> None:
    """The first of them, by its place and numbers; in words, not in warnings."""
    values = np.array([(0, 0, 1, 1), (1, 1, 1, 1), box, box])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SourceError, match=message):
            boxes.checked(values, (480, 640))
        with pytest.raises(SourceError):
            boxes.checked(boxes.from_format(values, "XYWH"), (480, 640))
        for format in ("XYXY", "CXCYWH"):
            boxes.from_format(values, format)


def test_corners_out_of_order_are_refused() -> None:
    """Right of left, below of above, or they aren't corners."""
    with pytest.raises(SourceError, match=r"box 0 .* has a side below 0"):
        boxes.checked(boxes.from_format([(10, 10, 5, 20)], "XYXY"), (100, 100))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2, 3, 4), r"\(n, 4\), got int\d+ \(4,\)"),
        ([(1, 2, 3)], r"got int\d+ \(1, 3\)"),
        (np.zeros((0, 5)), r"got float64 \(0, 5\)"),
        (np.zeros((2, 4), np.bool_), "got bool"),
        (np.zeros((2, 4), np.complex64), "got complex64"),
        ([("1", "2", "3", "4")], "got <U1"),
        ([(1, 2, 3, None)], "got object"),
        ([(1, 2, 3, 10**30)], "got object"),
        ([(1, 2, 3, 4), (1, 2, 3)], "can't be an array"),
        (None, r"got object \(\)"),
        (torch.zeros((2, 4), dtype=torch.bfloat16), "can't be an array"),
        (torch.zeros((2, 4), requires_grad=True), "can't be an array"),
    ],
)
def test_what_is_no_boxes_is_refused(values: Any, message: str) -> None:
    """Whatever a data set may hold under that name."""
    for call in (lambda: boxes.checked(values, (9, 9)), lambda: boxes.from_format(values, "XYXY")):
        with pytest.raises(SourceError, match=message):
            call()
