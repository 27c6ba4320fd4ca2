"""Images to measure with, and an independent opinion of what should come out."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

import fastload
from fastload import record
from fastload.geometry import Plan, read_for
from fastload.order import SampleRandom

Pixels = npt.NDArray[np.uint8]

_Item = TypeVar("_Item")

_CLASSES = 8
_SIZES = ((375, 500), (375, 500), (333, 500), (500, 375))


def photograph(seed: int, height: int, width: int) -> Pixels:
    """A picture with a photograph's spectrum: noise of many sizes, the finer the fainter, colour coarser than light."""
    rng = np.random.default_rng(seed)
    light = np.zeros((height, width), np.float32)
    colour = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 8):
        rows, columns = 3 * 2**octave // 2, 2 ** (octave + 1)
        strength = 90 / 2 ** (0.75 * octave)
        grid = rng.standard_normal((rows, columns), dtype=np.float32)
        light += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        if octave < 5:
            tint = rng.standard_normal((rows, columns, 3), dtype=np.float32)
            colour += strength / 3 * cv2.resize(tint, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 5, (height, width)).astype(np.float32)
    pixels: Pixels = np.clip(120 + (light + grain)[..., None] + colour, 0, 255).astype(np.uint8)
    return pixels


def make_folder(folder: Path, count: int) -> None:
    """Fill `folder` with photograph-like JPEGs of about 110 KB in eight classes, always the same ones."""
    for label in range(_CLASSES):
        (folder / f"class{label}").mkdir(parents=True)

    def make(seed: int) -> None:
        path = folder / f"class{seed % _CLASSES}" / f"{seed:04d}.jpg"
        picture = photograph(seed, *_SIZES[seed % len(_SIZES)])
        Image.fromarray(picture).save(path, quality=96, subsampling=2 if seed % 5 == 0 else 0)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))


def files(folder: Path) -> list[Path]:
    """The files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def some(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """At most so many of them, evenly spread."""
    return items[:: -(-len(items) // most)]


def pixel_count(file: Path) -> int:
    """How many pixels a picture has, by its header."""
    with Image.open(file) as image:
        return image.width * image.height


def mosaic(file: Path, height: int, width: int) -> Image.Image:
    """A picture repeated to fill that size."""
    image = np.asarray(Image.open(file).convert("RGB"))
    times = (-(-height // image.shape[0]), -(-width // image.shape[1]), 1)
    return Image.fromarray(np.tile(image, times)[:height, :width])


def decoded(field: record.Field) -> Pixels:
    """A stored JPEG's pixels as they are stored, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(field.payload)).convert("RGB"))


def expected(store: fastload.Store, index: int, plan: Plan) -> Pixels:
    """What a plan should make of a sample, by Pillow alone."""
    field = store[index].fields.get("image")
    if field is None:
        image = Image.fromarray(store.columns["image"][index])
    elif field.codec == record.RAW:
        image = Image.frombytes("RGB", (field.width, field.height), bytes(field.payload))
    else:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(field.payload))).convert("RGB")
    x, y, width, height = plan.box
    image = image.crop((x, y, x + width, y + height))
    if plan.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize(plan.size[::-1], Image.Resampling.BILINEAR)
    if plan.window is not None:
        x, y, width, height = plan.window
        image = image.crop((x, y, x + width, y + height))
    return np.asarray(image)


def check(dataset: fastload.ImageDataset, epoch: int, indices: Iterable[int], images: torch.Tensor) -> None:
    """Fail unless each picture of a uint8 batch (n, 3, height, width) is Pillow's, or near it where DCT-scaled."""
    for index, image in zip(indices, images, strict=True):
        size = tuple(dataset.store.columns["size"][index].tolist())
        (plan,) = dataset.transform.plans(size, SampleRandom(dataset.seed, epoch, index))
        pixels = expected(dataset.store, index, plan)
        if _is_scaled(dataset, index, plan):
            apart = np.square(image.permute(1, 2, 0).numpy().astype(np.float32) - pixels).mean()
            assert 10 * np.log10(255**2 / apart) > 33, f"picture {index} is too far off: {apart} levels squared"
        else:
            assert_like(image, pixels, f"picture {index}")


def _is_scaled(dataset: fastload.ImageDataset, index: int, plan: Plan) -> bool:
    field = dataset.store[index].fields.get("image")
    if field is None or field.codec != record.JPEG or not dataset.scaled_decode:
        return False
    return read_for(plan, (field.height, field.width), field.orientation, scaled=True, tiled=False).reduction > 1


def assert_like(image: torch.Tensor, pixels: Pixels, what: str) -> None:
    """Fail unless a (3, height, width) tensor is within 1 level of (height, width, 3) pixels.

    One value in 10,000 may be 2 levels off: torch and Pillow round after each of the two passes of a resize.
    """
    apart = np.abs(image.permute(1, 2, 0).numpy().astype(np.int16) - pixels)
    beyond = np.count_nonzero(apart > 1)
    assert apart.max() <= 2, f"{what} is {apart.max()} levels off"
    assert beyond <= 1e-4 * apart.size, f"{what} is 2 levels off in {beyond} of {apart.size} values"
