"""Geometry against pictures of numbered pixels: what a plan says must be what cutting and flipping them gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastload import geometry
from fastload.geometry import MIRRORED, TURNED, Box, Plan, Size
from fastload.order import SampleRandom

Numbers = npt.NDArray[Any]

ORIENTATION = 0x0112
lengths = st.integers(1, 12)
sizes = st.tuples(lengths, lengths)
photo_sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


def numbered(size: Size) -> Numbers:
    """A picture whose pixels are all different and none is 0, the colour of padding."""
    return np.arange(1.0, 1.0 + size[0] * size[1]).reshape(size)


def cut(image: Numbers, box: Box) -> Numbers:
    """The pixels of a box, 0 where it reaches beyond the image."""
    out = np.zeros((box.height, box.width), image.dtype)
    for row in range(box.height):
        for column in range(box.width):
            y, x = box.y + row, box.x + column
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                out[row, column] = image[y, x]
    return out


def triangle(old: int, new: int) -> Numbers:
    """The matrix of an antialiased bilinear resize of `old` pixels to `new`: a triangle around each new pixel."""
    step = old / new
    centres = (np.arange(new) + 0.5) * step
    distances = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None]) / max(step, 1.0)
    weights = np.clip(1 - distances, 0, None)
    return weights / weights.sum(1, keepdims=True)


def scaled(image: Numbers, size: Size) -> Numbers:
    if image.shape == size:
        return image
    return triangle(image.shape[0], size[0]) @ image @ triangle(image.shape[1], size[1]).T


def carried_out(plans: list[Plan], image: Numbers) -> Numbers:
    """What `geometry.Plan` documents: box, then mirror, then resize, then window; one plan after the other."""
    for plan in plans:
        assert plan.box.inside(image.shape)  # type: ignore[arg-type]
        picture = cut(image, plan.box)
        if plan.mirror:
            picture = np.flip(picture, 1)
        picture = scaled(picture, plan.size)
        image = picture if plan.window is None else cut(picture, plan.window)
    return image


def boxes_in(size: Size) -> st.SearchStrategy[Box]:
    def positions(box_size: Size) -> st.SearchStrategy[Box]:
        x, y = st.integers(0, size[1] - box_size[1]), st.integers(0, size[0] - box_size[0])
        return st.builds(Box, x, y, st.just(box_size[1]), st.just(box_size[0]))

    return st.tuples(st.integers(1, size[0]), st.integers(1, size[1])).flatmap(positions)


def boxes_anywhere(size: Size) -> st.SearchStrategy[Box]:
    far = st.integers(-4, 14)
    return boxes_in(size) | st.builds(Box, far, far, lengths, lengths)


def following(plans: list[Plan], step: Callable[[Plan], Plan | None]) -> list[Plan]:
    """The plans after one more step, which starts a new plan where it doesn't fit in the last one."""
    plan = step(plans[-1])
    if plan is not None:
        return [*plans[:-1], plan]
    plan = step(Plan.whole(plans[-1].output_size))
    assert plan is not None
    return [*plans, plan]


# ---- boxes and plans


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 4)])
def test_a_box_is_inside_an_image_that_has_all_its_pixels(size: Size) -> None:
    """`inside` is what counting the pixels says, for every box in and around the image, empty ones too."""
    there = {(y, x) for y in range(size[0]) for x in range(size[1])}
    for box in itertools.starmap(Box, itertools.product(range(-2, 5), range(-2, 5), range(-1, 6), range(-1, 6))):
        wanted = {(y, x) for y in range(box.y, box.y + box.height) for x in range(box.x, box.x + box.width)}
        assert box.inside(size) == (bool(wanted) and wanted <= there)


@given(size=sizes)
def test_the_whole_plan_changes_nothing(size: Size) -> None:
    """`Plan.whole` reads an image as it is."""
    plan = Plan.whole(size)
    assert (plan.output_size, plan.resizes, plan.mirror, plan.window) == (size, False, False, None)
    np.testing.assert_array_equal(carried_out([plan], numbered(size)), numbered(size))


@settings(max_examples=300, deadline=None)
@given(size=sizes, data=st.data())
def test_a_chain_of_steps_in_plans_shows_what_the_steps_show_one_by_one(size: Size, data: st.DataObject) -> None:
    """Crops (beyond the edge too), resizes and mirrors, in any order, folded in plans or done on the pixels."""
    plans, picture = [Plan.whole(size)], numbered(size)
    for kind in data.draw(st.lists(st.sampled_from(("crop", "resize", "mirror")), max_size=6), label="steps"):
        if kind == "crop":
            box = data.draw(boxes_anywhere(plans[-1].output_size), label="box")
            plans, picture = following(plans, lambda plan, box=box: plan.cropped(box)), cut(picture, box)
        elif kind == "resize":
            new = data.draw(sizes, label="size")
            plans, picture = following(plans, lambda plan, new=new: plan.resized(new)), scaled(picture, new)
        else:
            plans, picture = following(plans, Plan.mirrored), np.flip(picture, 1)
        assert plans[-1].output_size == picture.shape
        assert plans[-1].resizes == (plans[-1].size != (plans[-1].box.height, plans[-1].box.width))
    np.testing.assert_allclose(carried_out(plans, numbered(size)), picture, rtol=1e-9, atol=1e-9)


@given(size=sizes, data=st.data())
def test_crops_and_mirrors_inside_an_image_fold_into_one_box(size: Size, data: st.DataObject) -> None:
    """Without a resize nothing but the innermost box is read, however many crops and mirrors there were."""
    plan = Plan.whole(size)
    picture = numbered(size)
    for _ in range(data.draw(st.integers(1, 5))):
        box = data.draw(boxes_in(plan.output_size))
        cropped = plan.cropped(box)
        assert cropped is not None
        assert (cropped.window, cropped.resizes) == (None, False)
        plan, picture = cropped.mirrored(), np.flip(cut(picture, box), 1)
    assert (plan.box.height, plan.box.width) == picture.shape
    np.testing.assert_array_equal(carried_out([plan], numbered(size)), picture)


@given(size=sizes, target=sizes, crop=sizes, data=st.data())
def test_the_usual_pipelines_take_one_plan(size: Size, target: Size, crop: Size, data: st.DataObject) -> None:
    """Crop-resize-flip, resize-centrecrop-flip and flip first: none of them needs a second pass."""
    box = data.draw(boxes_in(size))
    train = [lambda p: p.cropped(box), lambda p: p.resized(target), Plan.mirrored]
    evaluation = [lambda p: p.resized(target), lambda p: p.cropped(geometry.center_box(target, crop)), Plan.mirrored]
    for steps in (train, evaluation, [Plan.mirrored, *train], [Plan.mirrored, *evaluation]):
        plans = [Plan.whole(size)]
        for step in steps:
            plans = following(plans, step)
        assert len(plans) == 1


def test_a_second_window_or_resize_asks_for_a_second_pass() -> None:
    """What one read can't do is refused with None, never carried out wrongly."""
    resized = Plan.whole((10, 10)).resized((5, 5))
    assert resized is not None
    assert resized.resized((4, 4)) is None
    assert resized.resized((5, 5)) == resized
    window = resized.cropped(Box(1, 1, 3, 3))
    assert window is not None
    assert window.cropped(Box(0, 0, 2, 2)) is None
    assert window.resized((9, 9)) is None


# ---- orientation


def turned(image: Numbers, orientation: int) -> Numbers:
    """Pillow's idea of the upright picture."""
    stored = Image.fromarray(image.astype(np.int32))
    stored.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(stored)
    assert upright is not None
    return np.asarray(upright)


@settings(deadline=None)
@given(size=sizes, orientation=st.integers(1, 8), data=st.data())
def test_a_stored_box_holds_the_pixels_that_pillow_shows_in_the_upright_box(
    size: Size, orientation: int, data: st.DataObject
) -> None:
    """Cutting the stored frame and then turning gives what turning and then cutting gives."""
    stored = numbered(size)
    upright = turned(stored, orientation)
    assert upright.shape == geometry.upright_size(size, orientation)
    box = data.draw(boxes_in(upright.shape))  # type: ignore[arg-type]
    there = geometry.stored_box(box, orientation, upright.shape)  # type: ignore[arg-type]
    assert there.inside(size)
    np.testing.assert_array_equal(turned(cut(stored, there), orientation), cut(upright, box))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tables_say_what_pillow_does(orientation: int) -> None:
    """`TURNED` swaps the sides, `MIRRORED` flips left to right, and both lead back."""
    image = numbered((3, 5))
    assert (turned(image, orientation).shape == (5, 3)) == (orientation in TURNED)
    np.testing.assert_array_equal(turned(image, MIRRORED[orientation]), np.flip(turned(image, orientation), 1))
    assert MIRRORED[MIRRORED[orientation]] == orientation
    assert geometry.upright_size(geometry.upright_size((3, 5), orientation), orientation) == (3, 5)


# ---- torchvision's rules, written down from its documentation and behaviour


def torchvision_resized(size: Size, short: int, max_size: int | None) -> Size:
    """`Resize(int)`: the smaller edge becomes `short`, the other int(short * long / small), capped at `max_size`."""
    height, width = size
    small, large = (width, height) if width <= height else (height, width)
    new_small, new_large = short, int(short * large / small)
    if max_size is not None and new_large > max_size:
        new_small, new_large = int(max_size * new_small / new_large), max_size
    new_width, new_height = (new_small, new_large) if width <= height else (new_large, new_small)
    return new_height, new_width


def torchvision_center_crop(image: Numbers, crop: Size) -> Numbers:
    """`CenterCrop`: zeros around an image that is too small (the odd one right and below), then the middle."""
    height, width = crop
    down, across = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    image = np.pad(image, ((down // 2, (down + 1) // 2), (across // 2, (across + 1) // 2)))
    top = int(round((image.shape[0] - height) / 2.0))  # noqa: RUF046 - as it is written there
    left = int(round((image.shape[1] - width) / 2.0))  # noqa: RUF046
    return image[top : top + height, left : left + width]


def torchvision_random_box(
    size: Size, scale: tuple[float, float], ratio: tuple[float, float], draws: Iterator[float]
) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params`: (top, left, height, width), with uniform numbers in [0, 1) as its generator."""
    height, width = size
    for _ in range(10):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * next(draws))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * next(draws))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(next(draws) * (height - h + 1))
            left = int(next(draws) * (width - w + 1))
            return top, left, h, w
    shape = width / height
    if shape < min(ratio):
        w, h = width, round(width / min(ratio))
    elif shape > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@settings(deadline=None)
@given(size=photo_sizes, short=st.integers(1, 3000), extra=st.none() | st.integers(1, 500))
@example(size=(375, 500), short=256, extra=None)
@example(size=(1, 5000), short=2, extra=1)
def test_the_short_side_follows_torchvisions_resize(size: Size, short: int, extra: int | None) -> None:
    """Equal sizes, but never an empty one: torchvision's own rule gives 0 pixels for extreme shapes."""
    max_size = None if extra is None else short + extra
    height, width = torchvision_resized(size, short, max_size)
    assert geometry.short_side_size(size, short, max_size) == (max(1, height), max(1, width))


@settings(deadline=None, max_examples=300)
@given(size=sizes, crop=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@example(size=(5, 5), crop=(8, 8))
@example(size=(5, 9), crop=(8, 2))
def test_the_centre_box_shows_torchvisions_center_crop(size: Size, crop: Size) -> None:
    """The same pixels and the same padding on every side, for images larger and smaller than the crop."""
    image = numbered(size)
    np.testing.assert_array_equal(cut(image, geometry.center_box(size, crop)), torchvision_center_crop(image, crop))


scales = st.tuples(st.floats(0.001, 1.5), st.floats(0.001, 1.5)).map(sorted).map(tuple)
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted).map(tuple)


class Draws:
    """Uniform numbers, handed out as `random_resized_box` asks for them."""

    def __init__(self, numbers: Iterator[float]) -> None:
        self.numbers = numbers

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.numbers)

    def integer(self, n: int) -> int:
        return int(next(self.numbers) * n)


@settings(deadline=None, max_examples=300)
@given(size=photo_sizes, scale=scales, ratio=ratios, seed=st.integers(0, 1 << 32))
@example(size=(500, 375), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), seed=0)
@example(size=(5000, 10), scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), seed=1)
@example(size=(10, 5000), scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), seed=2)
@example(size=(100, 100), scale=(1.4, 1.5), ratio=(0.5, 2.0), seed=3)
@example(size=(5000, 1), scale=(1.0, 1.0), ratio=(3.0, 4.0), seed=4)
def test_random_boxes_follow_torchvisions_get_params(
    size: Size, scale: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    """The same numbers drawn give the same box, fallbacks too; and no box is ever empty or beyond the image."""
    draws = Draws(iter(np.random.default_rng(seed).random(100).tolist()))
    box = geometry.random_resized_box(size, scale, ratio, draws.uniform, draws.integer)
    assert box.inside(size)
    top, left, h, w = torchvision_random_box(size, scale, ratio, iter(np.random.default_rng(seed).random(100).tolist()))
    if h and w:
        assert box == Box(left, top, w, h)


def test_random_boxes_cover_the_scales_evenly() -> None:
    """With SampleRandom as its source the box's share of the area spreads over all of `scale`, and positions too."""
    shares, lefts = [], []
    for index in range(2000):
        random = SampleRandom(3, 0, index)
        box = geometry.random_resized_box((400, 400), (0.1, 0.5), (3 / 4, 4 / 3), random.uniform, random.integer)
        shares.append(box.width * box.height / 400**2)
        lefts.append(box.x / (400 - box.width))
    assert 0.09 < min(shares) < 0.11
    assert 0.49 < max(shares) < 0.51
    assert np.mean(shares) == pytest.approx(0.3, abs=0.015)
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.03)


# ---- trim


def resized_by_torch(image: npt.NDArray[np.uint8], size: Size, scale: tuple[float | None, float | None]) -> Numbers:
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    out = torch.ops.aten._upsample_bilinear2d_aa(batch, size, False, *scale)
    return out[0].permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=200)
@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), data=st.data())
def test_a_trimmed_plan_shows_the_pixels_of_the_whole_one(size: Size, data: st.DataObject) -> None:
    """A resize that ends where the window ends shows the same window.

    To 1 level of 255, rarely needed: torch's kernel rounds its weights by the largest weight of the whole picture.
    """
    image = np.random.default_rng(size[0] * 100 + size[1]).integers(0, 256, (*size, 3), np.uint8)
    plan = Plan.whole(size)._replace(mirror=data.draw(st.booleans()))
    box = data.draw(boxes_in(size))
    plan = plan._replace(box=box, size=data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60))))
    window = data.draw(boxes_in(plan.size) | st.builds(Box, *[st.integers(-5, 50)] * 2, *[st.integers(1, 50)] * 2))
    plan = plan._replace(window=window)
    trimmed, scale = geometry.trim(plan)

    def shown(plan: Plan, scale: tuple[float | None, float | None]) -> Numbers:
        assert plan.box.inside(size)
        b = plan.box
        crop = image[b.y : b.y + b.height, b.x : b.x + b.width]
        picture = np.flip(crop, 1) if plan.mirror else crop
        picture = resized_by_torch(picture, plan.size, scale) if plan.resizes else picture
        return np.stack([cut(picture[..., channel], window) for channel in range(3)], -1)

    inside = window.x < plan.size[1] and window.y < plan.size[0] and window.x > -window.width
    if inside and window.y > -window.height:
        difference = shown(trimmed, scale).astype(int) - shown(plan, (None, None))
        assert abs(difference).max() <= 1
    assert trimmed.box.width <= box.width
    assert trimmed.box.height <= box.height


def test_trim_leaves_out_what_a_centre_crop_does_not_show() -> None:
    """A window that ends early saves pixels; a plan without a window, or without a resize, stays as it is."""
    plan = Plan.whole((600, 800)).resized((256, 341))
    assert plan is not None
    assert geometry.trim(plan) == (plan, (None, None))
    cropped = plan.cropped(Box(58, 16, 224, 224))
    assert cropped is not None
    trimmed, scale = geometry.trim(cropped)
    assert trimmed.box.width < 800
    assert trimmed.box.height < 600
    assert scale == (256 / 600, 341 / 800)
    padded = Plan.whole((10, 10)).cropped(Box(-2, -2, 14, 14))
    assert padded is not None
    assert geometry.trim(padded) == (padded, (None, None))
