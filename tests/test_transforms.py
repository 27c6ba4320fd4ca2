"""Transforms: what a chain of plans gives is what torchvision's steps on pixels give, and chance is a function."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Pixels, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastload import decode
from fastload.order import SampleRandom
from fastload.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize

Size = tuple[int, int]
Resized = Callable[[Pixels, Size], Pixels]

# --- torchvision's definitions, step by step on pixels


def resized_by_torch(image: Pixels, size: Size) -> Pixels:
    if size == (1, 1):  # there torch 2.13's kernel fails an assertion of its own, unless it is given `out=`
        return resized_by_pillow(image, size)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous()
    return F.interpolate(tensor, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def resized_by_pillow(image: Pixels, size: Size) -> Pixels:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def torchvision_box(
    size: Size, scale: tuple[float, float], ratio: tuple[float, float], chance: SampleRandom
) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params`: (top, left, height, width)."""
    height, width = size
    for _ in range(10):
        area = height * width * chance.uniform(*scale)
        aspect = math.exp(chance.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = chance.integer(height - h + 1)
            return top, chance.integer(width - w + 1), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def on_grid(box: tuple[int, int, int, int], target: Size) -> tuple[int, int, int, int]:
    """Where a box goes that is much larger than its target: its four numbers are cut to multiples of 2, 4 or 8."""
    _, _, height, width = box
    unit = 1
    for reduction, least in ((2, 2.0), (4, 4.5), (8, 9.0)):
        if height >= least * target[0] and width >= least * target[1]:
            unit = reduction
    return tuple(number // unit * unit for number in box)  # type: ignore[return-value]


def torchvision_size(size: Size, wanted: int | Size, max_size: int | None) -> Size:
    """`Resize`'s output size: an int is the shorter side, the longer one is cut off to whole pixels."""
    if not isinstance(wanted, int):
        return wanted
    height, width = size
    short, long = sorted(size)
    new_short, new_long = wanted, int(wanted * long / short)
    if max_size is not None and new_long > max_size:
        new_short, new_long = max(1, int(max_size * new_short / new_long)), max_size  # torchvision fails at 0
    return (new_long, new_short) if width <= height else (new_short, new_long)


def torchvision_center_crop(image: Pixels, size: Size) -> Pixels:
    """`center_crop`: first pad what is too small (the odd pixel right and below), then cut out the middle."""
    (height, width), (crop_height, crop_width) = image.shape[:2], size
    down, right = max(0, crop_height - height), max(0, crop_width - width)
    image = np.pad(image, [(down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2), (0, 0)])
    top, left = round((image.shape[0] - crop_height) / 2), round((image.shape[1] - crop_width) / 2)
    return image[top : top + crop_height, left : left + crop_width]


class Spy:
    """A transform that remembers the random numbers that it was handed, as they were."""

    chance: SampleRandom

    def plan(self, plan: Any, chance: SampleRandom) -> Any:
        self.chance = copy.copy(chance)
        return super().plan(plan, chance)  # type: ignore[misc]  # mixed into a transform below


class SpiedCrop(Spy, RandomResizedCrop):
    """RandomResizedCrop, observed."""


class SpiedFlip(Spy, RandomHorizontalFlip):
    """RandomHorizontalFlip, observed."""


def step(transform: Any, image: Pixels, resized: Resized) -> Pixels:
    """One transform's definition, on pixels, with the random numbers that it was handed."""
    if isinstance(transform, SpiedCrop):
        size = image.shape[:2]
        box = torchvision_box(size, transform.scale, transform.ratio, copy.copy(transform.chance))
        top, left, h, w = on_grid(box, transform.size)
        return resized(np.ascontiguousarray(image[top : top + h, left : left + w]), transform.size)
    if isinstance(transform, Resize):
        return resized(image, torchvision_size(image.shape[:2], transform.size, transform.max_size))
    if isinstance(transform, CenterCrop):
        return torchvision_center_crop(image, transform.size)
    mirrored = copy.copy(transform.chance).random() < transform.p
    return np.ascontiguousarray(image[:, ::-1]) if mirrored else image


# --- running a chain


def upright(image: Pixels, orientation: int) -> Pixels:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = Image.fromarray(image)
    shown.info["exif"] = exif.tobytes()
    return np.asarray(ImageOps.exif_transpose(shown))


def run(transforms: list[Any], image: Pixels, orientation: int = 1, index: int = 0) -> tuple[Pixels, int]:
    """The picture that fastload gives, and how many passes over pixels it took."""
    plans = Compose(transforms).plans(upright(image, orientation).shape[:2], SampleRandom(7, 0, index))
    out = np.full((*plans[-1].output_size, 3), 123, np.uint8)
    decode.render(image, orientation, plans, out)
    return out, len(plans)


def assert_like_torchvision(transforms: list[Any], image: Pixels, orientation: int = 1, index: int = 0) -> int:
    """Within one level of torch per pass over the pixels; the number of passes is returned.

    Pillow is within one level nearly everywhere, and two where it and torch round to different sides of a value.
    """
    got, passes = run(transforms, image, orientation, index)
    for resized in (resized_by_torch, resized_by_pillow):
        expected = upright(image, orientation)
        for transform in transforms:
            expected = step(transform, expected, resized)
        assert got.shape == expected.shape
        difference = np.abs(got.astype(int) - expected)
        limit = 2 * passes if resized is resized_by_pillow else passes
        assert difference.max() <= limit, resized.__name__
        assert difference.mean() <= passes, resized.__name__
    return passes


images = st.builds(picture, st.integers(1, 70), st.integers(1, 70), st.integers(0, 3))
orientations = st.integers(1, 8)
indices = st.integers(0, 1 << 40)
lengths = st.integers(1, 50)
sizes = st.tuples(lengths, lengths)
crops = st.builds(SpiedCrop, sizes) | st.builds(SpiedCrop, lengths, st.just((0.5, 0.6)), st.just((0.3, 3.0)))
flips = st.builds(SpiedFlip, st.sampled_from([0.0, 0.5, 1.0]))
resizes = st.builds(Resize, lengths | sizes) | st.builds(
    lambda size, more: Resize(size, max_size=size + more), st.integers(8, 40), st.integers(1, 30)
)
center_crops = st.builds(CenterCrop, lengths | sizes)


@settings(deadline=None, max_examples=150)
@given(crops, flips, images, orientations, indices)
def test_random_resized_crop_and_flip_are_torchvisions(
    crop: SpiedCrop, flip: SpiedFlip, image: Pixels, orientation: int, index: int
) -> None:
    """The training transforms, on images of any size and orientation, in one pass."""
    assert assert_like_torchvision([crop, flip], image, orientation, index) == 1


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 600), st.integers(1, 600)),
    indices,
)
@example((3000, 2000), (10, 10), 0)
@example((3000, 2000), (224, 224), 1)
@example((500, 375), (224, 224), 2)
def test_boxes_are_torchvisions_until_they_are_twice_as_large(size: Size, target: Size, index: int) -> None:
    """Exactly its boxes below that. Above, each edge moves by less than a step, and so little of the box is lost."""
    crop = SpiedCrop(target)
    (plan,) = Compose([crop]).plans(size, SampleRandom(7, 0, index))
    top, left, h, w = torchvision_box(size, crop.scale, crop.ratio, copy.copy(crop.chance))
    assert (plan.size, plan.window, plan.mirror) == (target, None, False)
    x, y, width, height = plan.box
    if h < 2 * target[0] or w < 2 * target[1]:
        assert plan.box == (left, top, w, h)
    else:
        assert (y, x, height, width) == on_grid((top, left, h, w), target)
        assert plan.box.inside(size)
        assert height >= 2 * target[0]
        assert width >= 2 * target[1]
        assert max(left - x, top - y, w - width, h - height) < 8


@settings(deadline=None, max_examples=150)
@given(resizes, images, orientations)
def test_resize_is_torchvisions(resize: Resize, image: Pixels, orientation: int) -> None:
    """Resize to a short side, with and without a limit, and to a pair, in one pass."""
    assert assert_like_torchvision([resize], image, orientation) == 1


@settings(deadline=None, max_examples=150)
@given(center_crops, images, orientations)
@example(CenterCrop(6), picture(3, 3), 1)
def test_center_crop_is_torchvisions(crop: CenterCrop, image: Pixels, orientation: int) -> None:
    """The middle exactly; images smaller than the crop are padded where torchvision pads them."""
    got, _ = run([crop], image, orientation)
    assert np.array_equal(got, torchvision_center_crop(upright(image, orientation), crop.size))


@settings(deadline=None, max_examples=150)
@given(resizes, center_crops, images, orientations)
def test_resize_and_center_crop_are_torchvisions(
    resize: Resize, crop: CenterCrop, image: Pixels, orientation: int
) -> None:
    """The evaluation transforms, crops larger than the resized image included, in one pass."""
    assert assert_like_torchvision([resize, crop], image, orientation) == 1


@settings(deadline=None, max_examples=150)
@given(st.lists(crops | flips | resizes | center_crops, min_size=2, max_size=4), images, orientations, indices)
@example([Resize((40, 30)), Resize((20, 20))], picture(60, 50), 1, 0)
@example([Resize(40), CenterCrop((30, 30)), SpiedFlip(1.0)], picture(60, 80), 1, 0)
@example([Resize(40), SpiedCrop(20), SpiedFlip(1.0)], picture(60, 50), 6, 0)
def test_any_chain_is_torchvisions(transforms: list[Any], image: Pixels, orientation: int, index: int) -> None:
    """Transforms in any number and order give what they give one after the other, second passes included."""
    assert_like_torchvision(transforms, image, orientation, index)


@pytest.mark.parametrize(
    ("transforms", "passes"),
    [
        ([Resize(40), Resize((20, 20))], 2),
        ([Resize(40), CenterCrop(30), Resize(20)], 2),
        ([CenterCrop(50), Resize(20), CenterCrop(10)], 1),
        ([Resize(40), CenterCrop(30), CenterCrop(10)], 2),
        ([SpiedFlip(1.0), CenterCrop(50), SpiedCrop(20), SpiedFlip(1.0)], 1),
    ],
)
def test_two_resizes_take_a_second_pass(transforms: list[Any], passes: int) -> None:
    """Only what one crop and one resize can't say takes another pass over the pixels."""
    assert assert_like_torchvision(transforms, picture(60, 80)) == passes


def test_usual_chains_on_a_photograph() -> None:
    """At real sizes (375 x 500 to 224) training and evaluation transforms stay within one level too."""
    image = picture(375, 500, seed=3)
    for index in range(3):
        assert_like_torchvision([SpiedCrop(224), SpiedFlip()], image, 6, index)
    assert_like_torchvision([Resize(256), CenterCrop(224)], image, 8)


# --- chance


def test_the_same_numbers_give_the_same_plans() -> None:
    """Plans depend on (seed, epoch, index) and on each of them."""
    compose = Compose([RandomResizedCrop(32), RandomHorizontalFlip()])

    def plans(*numbers: int) -> Any:
        return compose.plans((90, 120), SampleRandom(*numbers))

    assert plans(1, 2, 3) == plans(1, 2, 3)
    assert len({str(plans(*numbers)) for numbers in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))}) == 5


def test_global_generators_are_left_alone() -> None:
    """Planning neither reads nor advances the generators of Python, NumPy and torch."""
    compose = Compose([RandomResizedCrop(32), RandomHorizontalFlip()])
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    first = compose.plans((90, 120), SampleRandom(0, 0, 0))
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
    random.seed(1)
    torch.manual_seed(1)
    assert compose.plans((90, 120), SampleRandom(0, 0, 0)) == first


@pytest.mark.parametrize(("p", "low", "high"), [(0.0, 0, 0), (0.5, 450, 550), (0.9, 860, 940), (1.0, 1000, 1000)])
def test_flips_come_as_often_as_asked(p: float, low: int, high: int) -> None:
    """Of a thousand samples the share `p` is mirrored; 0 and 1 are never and always."""
    compose = Compose([RandomHorizontalFlip(p)])
    mirrored = sum(compose.plans((10, 10), SampleRandom(0, 0, index))[0].mirror for index in range(1000))
    assert low <= mirrored <= high


def test_crops_have_the_scales_and_ratios_asked_for() -> None:
    """A thousand boxes lie inside the image, fill the range of areas and ratios, and reach all of its edges."""
    compose = Compose([RandomResizedCrop(250, scale=(0.2, 0.6), ratio=(0.5, 2.0))])
    boxes = [compose.plans((400, 500), SampleRandom(0, 0, index))[0].box for index in range(1000)]
    assert all(box.inside((400, 500)) for box in boxes)
    areas = np.array([box.width * box.height / (400 * 500) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.19 < areas.min() < 0.22
    assert 0.58 < areas.max() < 0.61
    assert 0.49 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.02
    assert abs(np.log(ratios).mean()) < 0.1, "ratios are drawn log-uniformly: as often wide as tall"
    assert min(box.x for box in boxes) < 5
    assert max(box.x + box.width for box in boxes) > 495
    assert min(box.y for box in boxes) < 5
    assert max(box.y + box.height for box in boxes) > 395


def test_crops_on_the_grid_have_the_scales_asked_for_too() -> None:
    """What the grid takes is a pixel in a hundred or so of each side: areas and positions stay spread out."""
    compose = Compose([RandomResizedCrop(50, scale=(0.2, 0.6), ratio=(0.5, 2.0))])
    boxes = [compose.plans((1600, 2000), SampleRandom(0, 0, index))[0].box for index in range(1000)]
    areas = np.array([box.width * box.height / (1600 * 2000) for box in boxes])
    assert 0.19 < areas.min() < 0.21
    assert 0.58 < areas.max() <= 0.6
    assert abs(areas.mean() - 0.4) < 0.015
    assert {edge % 8 for box in boxes for edge in box} == {0}
    assert min(box.x for box in boxes) == min(box.y for box in boxes) == 0
    assert max(box.ends[0] for box in boxes) > 1590
    assert max(box.ends[1] for box in boxes) > 1990


@pytest.mark.parametrize(("size", "box"), [((10, 1000), (493, 0, 13, 10)), ((1000, 10), (0, 493, 10, 13))])
def test_crops_of_extreme_images_fall_back_to_the_middle(size: Size, box: tuple[int, int, int, int]) -> None:
    """Where no try fits, the largest box of an allowed ratio is taken from the centre (x, y, width, height)."""
    plans = Compose([RandomResizedCrop(8, scale=(0.9, 1.0))]).plans(size, SampleRandom(0, 0, 0))
    assert plans[0].box == box


# --- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize(0), "size is 0; it must be at least 1"),
        (lambda: Resize((10, -1)), "size is -1"),
        (lambda: Resize((1, 2, 3)), r"size is \(1, 2, 3\); it takes an int or \(height, width\)"),
        (lambda: Resize(10, max_size=10), "max_size is 10; it goes with one int as size and must be larger"),
        (lambda: Resize((10, 10), max_size=20), "max_size is 20; it goes with one int"),
        (lambda: CenterCrop(0), "size is 0"),
        (lambda: RandomResizedCrop((10, 0)), "size is 0"),
        (lambda: RandomResizedCrop(10, scale=(0.5, 0.1)), r"scale is \(0.5, 0.1\); it takes two numbers"),
        (lambda: RandomResizedCrop(10, ratio=(0, 1)), r"ratio is \(0, 1\)"),
        (lambda: RandomHorizontalFlip(1.5), "p is 1.5; a probability lies between 0 and 1"),
        (lambda: RandomHorizontalFlip(-0.1), "p is -0.1"),
        (lambda: Normalize([0.5], [0.0]), "std is"),
        (lambda: Normalize([0.5, 0.5], [0.5]), "mean"),
    ],
)
def test_impossible_arguments_are_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    """A ValueError says what was got and what is allowed, before any image is read."""
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_are_written_as_torchvision_writes_them() -> None:
    """One int for a square, one number in a list for the same; a pair is (height, width)."""
    assert CenterCrop(3).size == CenterCrop([3]).size == CenterCrop((3, 3)).size == (3, 3)
    assert RandomResizedCrop((3, 5)).size == (3, 5)
    assert run([Resize((3, 5))], picture(10, 10))[0].shape == (3, 5, 3)


def test_resize_to_a_list_of_one_is_the_short_side() -> None:
    """Resize([n]) is Resize(n) in torchvision, not a square."""
    assert run([Resize([20])], picture(40, 80))[0].shape == (20, 40, 3)


# --- Compose


def test_compose_splits_plans_from_callables() -> None:
    """Geometric transforms come first and are planned; the rest is kept for the picture, in order."""
    crop, normalize = CenterCrop(4), Normalize([0.5] * 3, [0.5] * 3)
    compose = Compose([crop, str, normalize])
    assert compose.geometric == (crop,)
    assert compose.rest == (str, normalize)


def test_compose_of_wraps_what_is_given() -> None:
    """None is the empty chain, one transform is a chain of one, and a Compose is itself."""
    crop = CenterCrop(4)
    compose = Compose([crop])
    assert Compose.of(compose) is compose
    assert Compose.of(crop).transforms == (crop,)
    assert Compose.of(None).transforms == ()
    assert Compose.of(None).plans((3, 5), SampleRandom(0, 0, 0))[0].output_size == (3, 5)


def test_compose_refuses_geometry_after_pixels() -> None:
    """A crop behind a transform of pixels is refused with both names and the way out."""
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"CenterCrop\(\(4, 4\)\) comes after Normalize.*put them first"):
        Compose([normalize, CenterCrop(4)])


def test_compose_refuses_what_is_no_transform() -> None:
    """What can't be called is named in a TypeError."""
    with pytest.raises(TypeError, match="3 is no transform"):
        Compose([CenterCrop(4), 3])


def test_compose_takes_a_compose() -> None:
    """A chain within a chain is what it is in torchvision: its transforms, in their place."""
    inner = Compose([Resize(20), CenterCrop(16)])
    nested = Compose([inner, RandomHorizontalFlip(1.0)]).plans((40, 40), SampleRandom(0, 0, 0))
    flat = Compose([*inner.transforms, RandomHorizontalFlip(1.0)]).plans((40, 40), SampleRandom(0, 0, 0))
    assert nested == flat


def test_representations_show_the_arguments() -> None:
    """A printed chain can be read back as the code that makes it."""
    chain = Compose(
        [RandomResizedCrop(8, scale=(0.5, 1.0)), Resize(9, max_size=12), CenterCrop((3, 4)), RandomHorizontalFlip(0.25)]
    )
    assert repr(eval(repr(chain))) == repr(chain)
    assert "scale=(0.5, 1.0)" in repr(chain)


# --- Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_normalize_is_the_plain_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """(x / 255 - mean) / std per channel, for all 256 levels, in the type asked for, to its precision."""
    images = torch.arange(math.prod(shape), dtype=torch.int64).mul(37).remainder(256).to(torch.uint8).view(shape)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (images.double() / 255 - mean) / std
    got = Normalize(MEAN, STD, dtype)(images)
    assert got.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * 8
    assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_normalize_keeps_the_memory_format_and_its_input() -> None:
    """Channels-last images stay channels-last, and the uint8 picture is not changed."""
    images = torch.from_numpy(picture(6, 5)).permute(2, 0, 1)[None]
    before = images.clone()
    got = Normalize(MEAN, STD)(images)
    assert got.dtype == torch.float32
    assert got.stride() == images.stride()
    assert torch.equal(images, before)


def test_normalize_refuses_other_channels() -> None:
    """A picture without the channels of the mean is refused, not broadcast."""
    with pytest.raises(ValueError, match="channels"):
        Normalize(MEAN, STD)(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_what_is_no_list_of_transforms_is_told() -> None:
    """One transform instead of a list, a class instead of a transform."""
    with pytest.raises(TypeError, match=r"takes a list of transforms, got CenterCrop\(\(8, 8\)\)"):
        Compose(CenterCrop(8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"CenterCrop is a class; make a transform of it: CenterCrop\(\.\.\.\)"):
        Compose.of(CenterCrop)
