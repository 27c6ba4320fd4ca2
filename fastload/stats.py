"""Mean and standard deviation of a store's pixels, and how often each class comes. Exact, by whole numbers alone.

Every image is counted into a histogram of 256 bins a channel, 65,536 for 16 bits, from which all else follows. Counts
are added as int64, so that the result is the same to the last bit for any number of threads. Images are decoded at full
size, whole; raw images of one shape are counted block by block, without a look at single samples (or at their
checksums: `verify`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from . import decode, masks, record
from .blocks import Values, as_unsigned
from .doctor import usable_cores
from .errors import DecodeError, FastloadError, StoreError
from .geometry import MAX_PIXELS, Plan, upright_size
from .jpeg import Pixels
from .store import Column, Store
from .transforms import full_scale
from .workers import ordered_map

Counts = npt.NDArray[np.int64]

_BLOCK_PIXELS = 1 << 20
_PART_PIXELS = 1 << 23  # cv2 gives counts as float32, which are exact up to 2**24


@dataclass(frozen=True)
class Statistics:
    """What the images of a store have in common.

    samples, pixels: how many were counted. mean, std: for each channel, over all pixels of all images, of values in
    [0, 1], as Normalize takes them (of int16 the values themselves); std is that of the population. min, max: for each
    channel, in the images' own units: 0 to 255, or what 16 bits hold. failures: how
    many samples can't be decoded; they are left out of all the rest. counted: what `class_counts` counts, by name or,
    where classes have no names, by number: "samples" (one with several labels counts for each), or, where there are
    masks, "pixels" of each value, without what lies outside. Real-valued labels and unlabelled samples count for none.
    """

    samples: int
    pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[int, ...]
    max: tuple[int, ...]
    failures: int
    counted: Literal["samples", "pixels"]
    class_counts: dict[str | int, int]


class _Part(NamedTuple):
    """What was counted in some samples: the image's values, (channels, bins), None if it failed; the mask's."""

    samples: int
    image: Counts | None
    mask: Counts


def statistics(
    path: str | os.PathLike[str],
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Read all images of a store, and their masks, and count their values.

    workers: threads, all usable cores by default. max_pixels: larger images are not decoded. progress: called with
    (samples done, samples in all).

    Raises:
        FileNotFoundError, StoreFormatError: see `Store`.
        StoreError: no sample can be decoded.

    Example:
        >>> found = fastload.stats.statistics("db.lmdb")  # after `import fastload.stats`
        >>> normalize = fastload.transforms.Normalize(found.mean, found.std)
    """
    store = Store(path, max_pixels=max_pixels)
    if store.schema.image is None:
        raise StoreError(f"{store.path} has no images; its fields are {', '.join(s.name for s in store.schema.specs)}")
    dtype = store.image_dtype
    pixels = np.zeros((store.image_channels, 1 << 8 * dtype.itemsize), np.int64)
    mask_values = np.zeros(1 << 16, np.int64)
    failed: list[int] = []
    done = 0
    parts = _parts(store, workers or usable_cores())
    with contextlib.closing(parts):
        for part in parts:
            if part.image is None:
                failed.append(done)
            else:
                pixels += part.image
                mask_values[: len(part.mask)] += part.mask
            done += part.samples
            if progress is not None:
                progress(done, len(store))
    if len(failed) == len(store):
        raise StoreError(f"none of the {len(store)} samples of {store.path} can be decoded; `fastload verify` them")
    by_pixel = "mask" in store.masks
    if by_pixel:
        mask_values[store.masks["mask"]] = 0
    lowest, scale = int(np.iinfo(dtype).min), full_scale(getattr(torch, dtype.name))
    channels = [_moments(counts, lowest, scale) for counts in pixels.tolist()]
    filled = [np.nonzero(counts)[0] for counts in pixels]
    return Statistics(
        samples=len(store) - len(failed),
        pixels=int(pixels[0].sum()),
        mean=tuple(mean for mean, _ in channels),
        std=tuple(std for _, std in channels),
        min=tuple(lowest + int(values[0]) for values in filled),
        max=tuple(lowest + int(values[-1]) for values in filled),
        failures=len(failed),
        counted="pixels" if by_pixel else "samples",
        class_counts=_named(store.classes, _nonzero(mask_values) if by_pixel else _label_counts(store, failed)),
    )


def _parts(store: Store, threads: int) -> Any:
    """The counts of all samples, in their order: one by one, or of blocks of raw images."""
    options: dict[str, Any] = {"threads": threads, "ahead": 16 * threads, "name": "fastload-stats"}
    column = store.columns.get("image")
    if column is None or store.masks:
        return ordered_map(functools.partial(_of_sample, store), range(len(store)), **options)
    return ordered_map(_of_block, _blocks(column), **options)


def _blocks(column: Column) -> Iterator[Pixels]:
    count = max(1, _BLOCK_PIXELS // math.prod(column.shape[:2]))
    for chunk in column.chunks():
        for start in range(0, len(chunk), count):
            yield chunk[start : start + count]


def _of_block(images: Pixels) -> _Part:
    return _Part(len(images), histogram(images), np.zeros(0, np.int64))


def _of_sample(store: Store, index: int) -> _Part:
    nothing = np.zeros(0, np.int64)
    try:
        size = tuple(store.columns["size"].view(index).tolist())
        column = store.columns.get("image")
        fields = dict(zip(store.field_names, store.fields(index), strict=True))
        image = histogram(_pixels(store, fields["image"], size) if column is None else column.view(index))
        mask = _mask_values(store, index, fields["mask"], size) if "mask" in store.masks else nothing
    except (FastloadError, KeyError):
        return _Part(1, None, nothing)
    return _Part(1, image, mask)


def _pixels(store: Store, field: record.Field, size: tuple[int, ...]) -> Values:
    """A stored image, not turned upright: that changes no count."""
    if upright_size((field.height, field.width), field.orientation) != size:
        raise DecodeError(f"the record says {field.width} x {field.height} pixels, the size column another size")
    field.verify()
    pixels = decode.with_channels(decode.pixels(field), store.image_channels)
    if pixels.dtype != store.image_dtype or pixels.shape[2] != store.image_channels:
        raise DecodeError(f"the record holds {pixels.dtype}, the store's images are {store.image_dtype}")
    return pixels


def _mask_values(store: Store, index: int, field: record.Field, size: tuple[int, ...]) -> Counts:
    height, width = size
    largest = int(store.columns["mask_max"].view(index))
    values = np.empty((height, width), np.uint8 if largest <= 0xFF else np.uint16)
    masks.render(field, (height, width), [Plan.whole((height, width))], values, store.masks["mask"])
    return histogram(values[..., None]).ravel()


def histogram(values: npt.NDArray[Any]) -> Counts:
    """How often each value comes in each channel, the last axis: (channels, 256 or 65536), the lowest value first."""
    if values.dtype == np.int16:
        values = as_unsigned(values)
    bins = 1 << 8 * values.itemsize
    flat = np.ascontiguousarray(values).reshape(-1, 1, values.shape[-1])
    counts = np.zeros((flat.shape[2], bins), np.int64)
    for start in range(0, len(flat), _PART_PIXELS):
        part = flat[start : start + _PART_PIXELS]
        for channel in range(len(counts)):
            counts[channel] += cv2.calcHist([part], [channel], None, [bins], [0, bins]).ravel().astype(np.int64)
    return counts


def _moments(counts: list[int], lowest: int, scale: int) -> tuple[float, float]:
    """Mean and standard deviation of values / scale. Python's whole numbers don't overflow, and it divides exactly.

    counts: of the values from `lowest` on.
    """
    n = sum(counts)
    total = sum(value * count for value, count in enumerate(counts, lowest))
    squares = sum(value * value * count for value, count in enumerate(counts, lowest))
    return total / (scale * n), math.sqrt((n * squares - total * total) / (scale * n) ** 2)


def _label_counts(store: Store, failed: list[int]) -> dict[int, int]:
    labels = np.delete(np.asarray(store.columns["label"]), failed, axis=0)
    if labels.dtype.kind == "f":
        return {}
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _nonzero(counts: Counts) -> dict[int, int]:
    (values,) = np.nonzero(counts)
    return dict(zip(values.tolist(), counts[values].tolist(), strict=True))


def _named(names: list[str] | None, counts: dict[int, int]) -> dict[str | int, int]:
    """Counts by name, all names first, with 0 where none comes; by number what has no name, or one like another's."""
    known = names if names is not None and len(set(names)) == len(names) else []
    return {
        **{name: counts.get(number, 0) for number, name in enumerate(known)},
        **{number: count for number, count in counts.items() if number >= len(known)},
    }
