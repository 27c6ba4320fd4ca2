"""Transforms that say what they need before a byte is decoded.

A geometric transform (`RandomResizedCrop`, `RandomCrop`, `RandomScale`, `Resize`, `CenterCrop`,
`RandomHorizontalFlip`) is a function from one `Plan` to the next: it never sees pixels. `Compose` folds the geometric
transforms at its front into as few plans as possible, nearly always one, and the decoder carries that out: read the
box, mirror, resize, keep the window. The masks of an image follow the same plans. What follows (`Normalize`, or any
callable) gets the finished picture.

Arguments, defaults and pixels are torchvision's: antialiased bilinear, within 1 level of 255 of what it makes of a
tensor. (Of a PIL image it makes Pillow's pixels; torch and Pillow round to different sides at a pixel in 10,000.)

Random numbers come from the sample's (seed, epoch, index), so the same picture comes out for any number of workers, and
global generators are neither read nor advanced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from . import geometry
from .geometry import Box, Plan, Size
from .order import SampleRandom

PIXELS = (torch.uint8, torch.uint16, torch.int16)
"""What images are before they are normalised."""

MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]


@runtime_checkable
class Geometric(Protocol):
    """A transform of plans."""

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        """The plan that follows; None if that takes a second pass, over the pixels that `plan` gives."""


class RandomResizedCrop:
    """Crop a random box and resize it: torchvision's `RandomResizedCrop`, antialiased bilinear.

    size: (height, width) of the result, or one int for both. scale: bounds of the box's share of the area.
    ratio: bounds of the box's width / height.

    A box that is at least twice as large as the result has its edges at even pixels, and much larger ones at multiples
    of 4 or 8: there a JPEG can be decoded at a half, a quarter or an eighth of its size.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = _pair(size)
        for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}; it takes two numbers, 0 < smallest <= largest")
        self.scale, self.ratio = scale, ratio

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        box = geometry.random_resized_box(plan.output_size, self.scale, self.ratio, random.uniform, random.integer)
        cropped = plan.cropped(geometry.on_grid(box, self.size))
        return cropped and cropped.resized(self.size)

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.size}, scale={self.scale}, ratio={self.ratio})"


class RandomCrop:
    """Crop a box of `size` at a random place: torchvision's `RandomCrop`.

    size: (height, width) of the result, or one int for both. padding: pixels added on all sides, or (left and right,
    top and bottom), or (left, top, right, bottom); they are black, in a mask 255. pad_if_needed: pad images that are
    smaller than `size`; without it they are an error.
    """

    def __init__(
        self, size: int | Sequence[int], padding: int | Sequence[int] | None = None, pad_if_needed: bool = False
    ) -> None:
        self.size = _pair(size)
        sides = (padding or 0,) if isinstance(padding, int | None) else tuple(padding)
        if len(sides) not in (1, 2, 4) or min(sides) < 0:
            raise ValueError(f"padding is {padding}; it takes 1, 2 or 4 numbers of pixels, none below 0")
        self.padding = sides * (4 // len(sides))
        self.pad_if_needed = pad_if_needed

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        left, top, right, bottom = self.padding
        height, width = plan.output_size
        height, width = height + top + bottom, width + left + right
        if self.pad_if_needed:
            more = max(0, self.size[0] - height), max(0, self.size[1] - width)
            top, left, height, width = top + more[0], left + more[1], height + 2 * more[0], width + 2 * more[1]
        if height < self.size[0] or width < self.size[1]:
            raise ValueError(f"RandomCrop({self.size}) of an image of {height} x {width}; pass pad_if_needed=True")
        y = random.integer(height - self.size[0] + 1)
        x = random.integer(width - self.size[1] + 1)
        return plan.cropped(Box(x - left, y - top, self.size[1], self.size[0]))

    def __repr__(self) -> str:
        return f"RandomCrop({self.size}, padding={self.padding}, pad_if_needed={self.pad_if_needed})"


class RandomScale:
    """Resize both sides by a random factor, uniform between the bounds `scale`; for segmentation, before a crop."""

    def __init__(self, scale: tuple[float, float] = (0.5, 2.0)) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; it takes two numbers, 0 < smallest <= largest")
        self.scale = scale

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        factor = random.uniform(*self.scale)
        height, width = plan.output_size
        return plan.resized((max(1, int(height * factor)), max(1, int(width * factor))))

    def __repr__(self) -> str:
        return f"RandomScale({self.scale})"


class Resize:
    """Resize: one int is the new length of the shorter side (torchvision's rule), a pair is (height, width).

    Where one of the pair is None, that side follows and the image keeps its ratio.
    max_size: a limit for the longer side, with an int only.
    """

    def __init__(self, size: int | Sequence[int | None], max_size: int | None = None) -> None:
        if not isinstance(size, int) and len(size) == 1 and size[0] is not None:
            size = size[0]
        self.size: int | Size | tuple[int | None, int | None]
        if isinstance(size, int):
            self.size = _positive(size)
        elif len(size) == 2 and None in size and size[0] != size[1]:
            height, width = (length if length is None else _positive(int(length)) for length in size)
            self.size = height, width
        else:
            self.size = _pair(size)
        if max_size is not None and (not isinstance(size, int) or max_size <= size):
            raise ValueError(f"max_size is {max_size}; it goes with one int as size and must be larger than that")
        self.max_size = max_size

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        if isinstance(self.size, int):
            return plan.resized(geometry.short_side_size(plan.output_size, self.size, self.max_size))
        height, width = plan.output_size
        wanted_height, wanted_width = self.size
        return plan.resized(
            (
                max(1, int(height * (wanted_width or width) / width)) if wanted_height is None else wanted_height,
                max(1, int(width * (wanted_height or height) / height)) if wanted_width is None else wanted_width,
            )
        )

    def __repr__(self) -> str:
        return f"Resize({self.size}" + (f", max_size={self.max_size})" if self.max_size else ")")


class CenterCrop:
    """Keep the centre; what lies outside a smaller image is black. size: (height, width), or one int for both."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _pair(size)

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        return plan.cropped(geometry.center_box(plan.output_size, self.size))

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"


class RandomHorizontalFlip:
    """Mirror left to right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; a probability lies between 0 and 1")
        self.p = p

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        return plan.mirrored() if random.random() < self.p else plan

    def __repr__(self) -> str:
        return f"RandomHorizontalFlip(p={self.p})"


class Normalize:
    """(x / 255 - mean) / std per channel, to `dtype`; uint16 is divided by 65535, int16 is taken as it is.

    Takes tensors (..., 3, height, width) and gives floating ones: of uint8 four times the bytes. Where there is an
    accelerator, leave it to `DevicePrefetcher(mean=, std=)`, which does it there after the copy.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        check_mean_and_std(mean, std)
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(images, self.mean, self.std, self.dtype)

    def __repr__(self) -> str:
        return f"Normalize({self.mean}, {self.std}, {self.dtype})"


class Compose:
    """Transforms in a row: geometric ones first, then any callables.

    Attribute `output_size` is the (height, width) that the geometric ones give, None if that depends on the image.

    Raises:
        ValueError: a geometric transform comes after one that needs pixels.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        if not isinstance(transforms, Iterable):
            raise TypeError(f"Compose takes a list of transforms, got {transforms!r}; write Compose([{transforms!r}])")
        self.transforms = tuple(_flat(transforms))
        for transform in self.transforms:
            if isinstance(transform, type) and hasattr(transform, "plan"):
                raise TypeError(f"{transform.__name__} is a class; make a transform of it: {transform.__name__}(...)")
        geometric = [isinstance(t, Geometric) for t in self.transforms]
        first = geometric.index(False) if False in geometric else len(geometric)
        if any(geometric[first:]):
            late = self.transforms[geometric.index(True, first)]
            raise ValueError(
                f"{late} comes after {self.transforms[first]}; fastload's crops, resizes and flips are decided before "
                "decoding, so put them first, or use torchvision's at that place"
            )
        for transform in self.transforms[first:]:
            if not callable(transform):
                raise TypeError(f"{transform!r} is no transform: it can't be called")
        self.geometric: tuple[Geometric, ...] = self.transforms[:first]
        self.output_size = _output_size(self.geometric)
        self.rest: tuple[Callable[[Any], Any], ...] = self.transforms[first:]

    @classmethod
    def of(cls, transform: Any) -> Compose:
        """`transform` as a Compose: None is the empty one."""
        if isinstance(transform, Compose):
            return transform
        return cls([] if transform is None else [transform])

    def plans(self, size: Size, random: SampleRandom) -> list[Plan]:
        """What to do with an image of `size`; each plan after the first works on the result of the one before."""
        plans = [Plan.whole(size)]
        for transform in self.geometric:
            following = transform.plan(plans[-1], random)
            if following is not None:
                plans[-1] = following
                continue
            following = transform.plan(Plan.whole(plans[-1].output_size), random)
            assert following is not None, f"{transform} can't plan on a whole image"
            plans.append(following)
        return plans

    def __repr__(self) -> str:
        return f"Compose({list(self.transforms)})"


def _output_size(transforms: Sequence[Geometric]) -> Size | None:
    for transform in reversed(transforms):
        if type(transform) in (RandomResizedCrop, RandomCrop, CenterCrop, Resize):
            size = transform.size  # type: ignore[attr-defined]
            return size if isinstance(size, tuple) and None not in size else None
        if type(transform) is not RandomHorizontalFlip:
            return None
    return None


def normalize(
    images: torch.Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype = torch.float32,
    *,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Return `(images - mean) / std` per channel as a new tensor.

    The arithmetic is `images * scale + bias` in float32.

    Args:
        images: `(..., C, H, W)`, uint8 (divided by 255 first), uint16 (by 65535), int16 or floating (taken as they
            are: int16 are physical values, of CT scans say).
        mean, std: C numbers each, in units of [0, 1] as in torchvision; both None mean 0 and 1.
        dtype: floating type of the result.
        memory_format: layout of the result; `torch.channels_last` needs 4 dimensions.

    Raises ValueError where mean and std don't fit each other or the images, TypeError for images of other types.

    >>> normalize(torch.zeros(1, 2, 2, dtype=torch.uint8), [0.5], [0.25]).tolist()
    [[[-2.0, -2.0], [-2.0, -2.0]]]
    """
    if images.dtype not in PIXELS and not images.is_floating_point():
        raise TypeError(
            f"images are {images.dtype}, but only uint8, uint16, int16 and floating types can be normalised"
        )
    mean_and_std = check_mean_and_std(mean, std)
    if mean is not None and (images.dim() < 3 or images.shape[-3] != len(mean)):
        raise ValueError(
            f"images of shape {tuple(images.shape)} don't have the {len(mean)} channels of mean {tuple(mean)} at "
            "(..., C, H, W); uint8 masks in a batch are left alone as (N, H, W) or in another type"
        )
    scale, bias = _scale_and_bias(mean_and_std, full_scale(images.dtype), images.device)
    result = torch.empty_like(images, dtype=dtype, memory_format=memory_format)
    if not images.is_cpu:
        return torch.addcmul(bias, images, scale, out=result)  # one kernel reads `images` and writes `result`
    # The CPU takes five times as long for that as for a plain pass after another over long rows.
    values = result if dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
    values.copy_(images)
    pixels = values.movedim(-3, -1)
    if pixels.is_contiguous():
        channels, width = images.shape[-3], images.shape[-1]
        row_scale, row_bias = (factor.expand(channels, 1, 1).flatten().repeat(width) for factor in (scale, bias))
        pixels.view(-1, width * channels).mul_(row_scale).add_(row_bias)
    else:
        values.mul_(scale).add_(bias)
    return result if values is result else result.copy_(values)


def full_scale(dtype: torch.dtype) -> int:
    """What pixels of this type are divided by, so that 1 is white; 1 for those that are taken as they are."""
    return {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)


@functools.cache
def _scale_and_bias(
    mean_and_std: MeanAndStd | None, divisor: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 scale and bias, (C, 1, 1) each. Their upload is synchronous, so any stream may use them."""
    mean, std = mean_and_std or ((0.0,), (1.0,))
    scale = torch.tensor([1 / (divisor * s) for s in std], dtype=torch.float32, device=device)
    bias = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return scale.view(-1, 1, 1), bias.view(-1, 1, 1)


def check_mean_and_std(mean: Sequence[float] | None, std: Sequence[float] | None) -> MeanAndStd | None:
    """The two as tuples of floats, None if both are; ValueError unless they are one number per channel."""
    if mean is None and std is None:
        return None
    if mean is None or std is None or not len(mean) == len(std) > 0:
        raise ValueError(f"mean is {mean} and std is {std}, but both need one number per channel, or both are None")
    if not all(value > 0 for value in std):
        raise ValueError(f"std is {std}, but every one must be positive (in units of [0, 1], as in torchvision)")
    return tuple(map(float, mean)), tuple(map(float, std))


def _flat(transforms: Sequence[Any]) -> Iterator[Any]:
    for transform in transforms:
        yield from transform.transforms if isinstance(transform, Compose) else (transform,)


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    return size


def _pair(size: int | Sequence[int | None]) -> Size:
    if isinstance(size, int):
        return _positive(size), size
    lengths = [int(length) for length in size if length is not None]
    if len(size) not in (1, 2) or len(lengths) != len(size):
        raise ValueError(f"size is {size}; it takes an int or (height, width)")
    return _positive(lengths[0]), _positive(lengths[-1])
