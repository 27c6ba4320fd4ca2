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
from fastload.geometry import MIRRORED, TURNED, Box, Plan, Read, Size
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


# ---- reads


def resized_by_torch(image: npt.NDArray[np.uint8], size: Size, scales: geometry.Scales) -> npt.NDArray[np.uint8]:
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    out = torch.empty((1, 3, *size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    torch.ops.aten._upsample_bilinear2d_aa.out(batch, size, False, *scales, out=out)
    return out[0].permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


def upright(image: Numbers, orientation: int) -> Numbers:
    """The picture that is shown of a stored one, by the definition of EXIF's orientations."""
    swapped = np.swapaxes(image, 0, 1) if orientation in TURNED else image
    down, across = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    return swapped[::down, ::across]


def window_of(picture: Numbers, window: Box | None) -> Numbers:
    """The window, channel by channel, zeros beyond the picture."""
    if window is None:
        return picture
    return np.stack([cut(picture[..., channel], window) for channel in range(picture.shape[2])], -1)


def read_carried_out(
    read: Read, image: Numbers, garbage: Numbers, resize: Callable[[Any, Size, geometry.Scales], Numbers]
) -> Numbers:
    """What `geometry.Read` documents, on a stored image at 1 / reduction of its size."""
    assert read.box.inside(image.shape[:2])  # type: ignore[arg-type]
    x, y, width, height = read.box
    turned_box = upright(image[y : y + height, x : x + width], read.turn)
    assert turned_box.shape[0] <= read.source[0]
    assert turned_box.shape[1] <= read.source[1]
    source = garbage[: read.source[0], : read.source[1]].copy()
    source[read.source[0] - turned_box.shape[0] :, read.source[1] - turned_box.shape[1] :] = turned_box
    if read.source != read.size:
        source = resize(source, read.size, read.scales)
    return window_of(source, read.window)


def overlapping(size: Size) -> st.SearchStrategy[Box]:
    """Windows that show at least a pixel of a picture of `size`, and may reach beyond it."""

    def reaching(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.integers(1, length + 9).flatmap(
            lambda extent: st.tuples(st.integers(1 - extent, length - 1), st.just(extent))
        )

    return st.builds(lambda down, across: Box(across[0], down[0], across[1], down[1]), *map(reaching, size))


@st.composite
def plans_for(draw: st.DrawFn, size: Size, longest: int = 60) -> Plan:
    """Any plan for an upright picture of `size`."""
    box = draw(boxes_in(size))
    target = draw(st.just((box.height, box.width)) | st.tuples(st.integers(1, longest), st.integers(1, longest)))
    return Plan(box, target, draw(st.none() | overlapping(target)), draw(st.booleans()))


@settings(deadline=None, max_examples=400)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)), orientation=st.integers(1, 8), seed=st.integers(0, 99),
    data=st.data(),
)  # fmt: skip
def test_a_read_shows_what_the_plan_says(size: Size, orientation: int, seed: int, data: st.DataObject) -> None:
    """Cut, turn, mirror, resize all, keep the window: reading only what that needs gives the same picture.

    To one level where less is resized than that, for torch's kernel rounds its weights by the largest of them. What
    stands in the part of the source that is not read changes no bit, nor does it whether fewer columns are cheaper.
    """
    rng = np.random.default_rng(seed)
    image, *garbages = rng.integers(0, 256, (3, 60, 60, 3), np.uint8)
    image = image[: size[0], : size[1]]
    shown = upright(image, orientation)
    plan = data.draw(plans_for(shown.shape[:2]))
    x, y, width, height = plan.box
    expected = shown[y : y + height, x : x + width]
    if plan.mirror:
        expected = expected[:, ::-1]
    if plan.resizes:
        expected = resized_by_torch(expected, plan.size, (None, None))
    expected = window_of(expected, plan.window)
    pictures = []
    for tiled, garbage in itertools.product((True, False), garbages):
        read = geometry.read_for(plan, size, orientation, scaled=False, tiled=tiled)
        assert read.reduction == 1
        stored = geometry.stored_box(plan.box, orientation, shown.shape[:2])  # type: ignore[arg-type]
        assert stored.x <= read.box.x
        assert stored.y <= read.box.y
        assert read.box.ends[0] <= stored.ends[0]
        assert read.box.ends[1] <= stored.ends[1]
        pictures.append(read_carried_out(read, image, garbage, resized_by_torch))
    for picture in pictures:
        np.testing.assert_array_equal(picture, pictures[0])
    exact = not plan.resizes or plan.window is None
    np.testing.assert_allclose(pictures[0].astype(int), expected, rtol=0, atol=0 if exact else 1)


def test_a_read_leaves_out_what_a_centre_crop_does_not_show() -> None:
    """All four sides of the photograph are spared; where rows lie whole in memory it is two, which saves a copy."""
    plan = Plan.whole((600, 800)).resized((256, 341))
    assert plan is not None
    read = geometry.read_for(plan, (600, 800), 1, scaled=False, tiled=True)
    assert (read.box, read.source, read.size, read.scales) == (plan.box, (600, 800), (256, 341), (None, None))
    cropped = plan.cropped(Box(58, 16, 224, 224))
    assert cropped is not None
    step = 600 / 256
    for orientation in range(1, 9):
        size = geometry.upright_size((600, 800), orientation)
        read = geometry.read_for(cropped, size, orientation, scaled=False, tiled=True)
        if orientation > 1:
            assert geometry.read_for(cropped, size, orientation, scaled=False, tiled=False) == read
        assert max(read.box.width, read.box.height) <= 224 * step + 2 * step + 6
        assert read.scales == (256 / 600, 341 / 800)
    rows = geometry.read_for(cropped, (600, 800), 1, scaled=False, tiled=False).box
    assert (rows.x, rows.y, rows.width) == (0, 0, 800)
    assert rows.height <= (16 + 224) * step + step + 3
    padded = Plan.whole((10, 10)).cropped(Box(-2, -2, 14, 14))
    assert padded is not None
    assert geometry.read_for(padded, (10, 10), 1, scaled=True, tiled=True).box == Box(0, 0, 10, 10)


# ---- reduced reads


@st.composite
def large_plans(draw: st.DrawFn, size: Size) -> Plan:
    """Plans of upright pictures of `size` whose boxes are resized to much less, some of them on the grid."""
    box = draw(boxes_in(size))
    target = draw(st.integers(1, max(1, box.height // 2))), draw(st.integers(1, max(1, box.width // 2)))
    snapped = geometry.on_grid(box, target)
    return Plan(
        draw(st.sampled_from((box, snapped))), target, draw(st.none() | overlapping(target)), draw(st.booleans())
    )


def places(size: Size, unit: int = 1) -> Numbers:
    """For each pixel of an image the row and column of that pixel, of `unit` times its side, in which it lies."""
    return np.stack(np.meshgrid(np.arange(size[0]) // unit, np.arange(size[1]) // unit, indexing="ij"), -1)


@settings(deadline=None, max_examples=300)
@given(size=st.tuples(st.integers(9, 130), st.integers(9, 130)), orientation=st.integers(1, 8), data=st.data())
def test_a_reduced_read_is_of_the_planned_box(size: Size, orientation: int, data: st.DataObject) -> None:
    """Nothing is rounded silently: pixel (i, j) of the planned box lies in pixel (i / r, j / r) of what is read.

    And a smaller reduction than the box's size allows is chosen only where that takes it.
    """
    shown = geometry.upright_size(size, orientation)
    plan = data.draw(large_plans(shown))._replace(window=None)
    read = geometry.read_for(plan, size, orientation, scaled=True, tiled=data.draw(st.booleans()))
    r = read.reduction
    x, y, width, height = plan.box
    wanted = upright(places(size, r), orientation)[y : y + height, x : x + width]
    wanted = wanted[:, ::-1] if plan.mirror else wanted
    x, y, width, height = read.box
    got = upright(places((-(-size[0] // r), -(-size[1] // r)))[y : y + height, x : x + width], read.turn)
    assert got.shape[:2] == read.source == (-(-plan.box.height // r), -(-plan.box.width // r))
    np.testing.assert_array_equal(got.repeat(r, 0).repeat(r, 1)[: plan.box.height, : plan.box.width], wanted)
    if r > 1:
        assert read.scales == (plan.size[0] * r / plan.box.height, plan.size[1] * r / plan.box.width)
    stored = geometry.stored_box(plan.box, orientation, shown)
    most = geometry.reduction_for((plan.box.height, plan.box.width), plan.size)
    assert max(step for step in (1, 2, 4, 8) if step <= most and all(edge % step == 0 for edge in stored)) <= r <= most


@pytest.mark.parametrize("size", [(8, 80), (80, 8), (1, 1)])
def test_tiny_images_are_not_reduced(size: Size) -> None:
    plan = Plan.whole(size).resized((1, 1))
    assert plan is not None
    assert geometry.read_for(plan, size, 1, scaled=True, tiled=True).reduction == 1


@given(box=sizes.map(lambda size: (40 * size[0], 40 * size[1])), target=st.tuples(*[st.integers(1, 300)] * 2))
def test_a_reduction_leaves_more_pixels_than_come_out(box: Size, target: Size) -> None:
    """At least as many on both sides at a half, and an eighth more at a quarter or an eighth of the size."""
    reduction = geometry.reduction_for(box, target)
    spare = {1: 0, 2: 1, 4: 9 / 8, 8: 9 / 8}
    assert all(length / reduction >= spare[reduction] * wanted for length, wanted in zip(box, target, strict=True))
    if reduction < 8:
        more = 2 * reduction
        assert any(length / more < spare[more] * wanted for length, wanted in zip(box, target, strict=True))


@settings(deadline=None, max_examples=300)
@given(
    size=st.tuples(st.integers(9, 600), st.integers(9, 600)), target=st.tuples(*[st.integers(1, 60)] * 2),
    orientation=st.integers(1, 8), mirror=st.booleans(), data=st.data(),
)  # fmt: skip
def test_boxes_on_the_grid_are_read_reduced(
    size: Size, target: Size, orientation: int, mirror: bool, data: st.DataObject
) -> None:
    """`on_grid` takes less than a step off each edge, and a box that is on the grid is read exactly.

    Counted from the right or from below the grid is the file's only if its sides are whole steps: else less reduction.
    """
    box = data.draw(boxes_in(size))
    snapped = geometry.on_grid(box, target)
    step = geometry.reduction_for((box.height, box.width), target)
    assert all(old - new == old % step for old, new in zip(box, snapped, strict=True))
    assert snapped.inside(size)
    for whole in (size, (size[0] + -size[0] % 8, size[1] + -size[1] % 8)):
        plan = Plan(snapped, target, None, mirror)
        stored_size = geometry.upright_size(whole, orientation)
        stored = geometry.stored_box(snapped, orientation, whole)
        read = geometry.read_for(plan, stored_size, orientation, scaled=True, tiled=True)
        r = read.reduction
        if whole != size or orientation == 1 or step == 1:
            assert r == min(step, geometry.reduction_for((snapped.height, snapped.width), target))
        assert tuple(r * edge for edge in read.box) == stored or any(edge % step for edge in stored)
        assert geometry.read_for(plan, stored_size, orientation, scaled=False, tiled=True).reduction == 1


@pytest.mark.parametrize(
    ("size", "box", "orientation", "mirror", "reduction"),
    [
        ((800, 800), Box(8, 16, 720, 720), 1, False, 8),
        ((800, 800), Box(8, 12, 720, 720), 1, False, 4),
        ((800, 800), Box(8, 14, 720, 720), 1, False, 2),
        ((800, 800), Box(8, 15, 720, 720), 1, False, 1),
        ((800, 800), Box(8, 16, 727, 721), 1, False, 8),
        ((800, 800), Box(8, 16, 727, 721), 1, True, 1),
        ((800, 800), Box(8, 16, 724, 721), 1, True, 4),
        ((800, 804), Box(8, 16, 720, 720), 2, False, 4),
        ((800, 804), Box(8, 16, 720, 720), 4, False, 8),
        ((803, 800), Box(8, 16, 720, 720), 3, True, 1),
        ((800, 806), Box(8, 16, 720, 720), 6, False, 2),
        ((800, 806), Box(8, 16, 720, 720), 8, False, 8),
    ],
)
def test_what_is_off_the_grid_is_reduced_less(
    size: Size, box: Box, orientation: int, mirror: bool, reduction: int
) -> None:
    """A box that begins within a pixel of the reduced image, in the direction in which it is shown, takes a larger one.

    Where it ends within one, nothing is lost. size: (height, width) of the upright picture, resized to 80 x 80.
    """
    stored_size = geometry.upright_size(size, orientation)
    plan = Plan(box, (80, 80), None, mirror)
    assert geometry.read_for(plan, stored_size, orientation, scaled=True, tiled=True).reduction == reduction


def sampled(image: Numbers, size: Size, scales: geometry.Scales) -> Numbers:
    """Values at the centres of a resize's pixels, interpolated: what it shows of a slope, away from filters' edges."""
    for axis, (new, scale) in enumerate(zip(size, scales, strict=True)):
        step = 1 / scale if scale is not None else image.shape[axis] / new
        where = np.clip((np.arange(new) + 0.5) * step - 0.5, 0, image.shape[axis] - 1)
        below = np.floor(where).astype(int)
        above = np.minimum(below + 1, image.shape[axis] - 1)
        share = np.expand_dims(where - below, (1, 2) if axis == 0 else (0, 2))
        image = image.take(below, axis) * (1 - share) + image.take(above, axis) * share
    return image


@settings(deadline=None, max_examples=300)
@given(size=st.tuples(st.integers(8, 130), st.integers(8, 130)), orientation=st.integers(1, 8), data=st.data())
def test_a_reduced_picture_lies_where_the_full_one_does(size: Size, orientation: int, data: st.DataObject) -> None:
    """A slope of grey comes out with the same values: nothing is shifted, stretched or turned, in windows neither."""
    plan = data.draw(large_plans(geometry.upright_size(size, orientation)))
    garbage = np.random.default_rng(0).normal(0, 1e6, (130, 130, 2))
    pictures = []
    for scaled in (False, True):
        read = geometry.read_for(plan, size, orientation, scaled=scaled, tiled=data.draw(st.booleans()))
        r = read.reduction
        slopes = places((-(-size[0] // r), -(-size[1] // r))) * float(r) + (r - 1) / 2
        pictures.append(read_carried_out(read, slopes, garbage, sampled))
    np.testing.assert_allclose(pictures[1], pictures[0], rtol=0, atol=1e-6)
