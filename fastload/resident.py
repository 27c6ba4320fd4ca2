"""The whole set on the device: small raw images lie there once, and batches are gathered there.

What travels for a batch is five numbers for each sample: its index, where its crop begins, and where it goes. The
crops and flips are those that `Compose.plans` would make, for all samples of a batch at once (`Moves`): 50 us for 512,
where plans one by one take 3.4 ms. Every image's checksum is checked once, on its way to the device.

The images lie row by row, each row followed by as many black pixels as a crop may reach beyond an image's side. So a
row of a crop, its padding included, is a run of neighbouring pixels, wherever it begins, and what lies above and below
is the black run at the end. Without a crop the run is the whole image. A batch is one gather of runs. Mirrored
pictures come last in it, are turned in one go, and a second gather puts all into their places.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from .dataset import ImageDataset
from .errors import DecodeError
from .geometry import Box, Plan, Size
from .order import Indices, SampleRandom, SampleRandoms, Words, mixed
from .store import Column
from .transforms import CenterCrop, Compose, RandomCrop, RandomHorizontalFlip
from .values import as_targets
from .workers import context


class Resident:
    """All images and labels of a dataset on a device.

    Raises:
        ValueError: the images are not raw and of one size, or a transform does more than move pixels.
        MemoryError: they don't fit.
        DecodeError, TooManyFailures: images are damaged; see `ImageDataset`.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device) -> None:
        column = _raw_column(dataset)
        height, width, channels = column.shape
        self._dataset, self._moves, self._channels = dataset, Moves(dataset.transform, (height, width)), channels
        whole = (1, height * width)
        self._source, (rows, run) = ((height, width), self._moves.size) if self._moves.crops else (whole, whole)
        self._pitch = self._source[1] + self._moves.overhang
        self._black = self._moves.overhang + len(column) * self._source[0] * self._pitch
        size = (self._black + run) * channels
        _check_memory(size + 8 * len(column), device)
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._runs = self._memory.as_strided((self._black + 1, run * channels), (channels, 1))
        self._rows = torch.arange(rows, device=device)
        valid = torch.ones(len(column), dtype=torch.bool)
        self._replace(self._upload(column), labels := dataset.targets, valid)
        targets = [as_targets(labels), *([valid] if dataset.return_valid else [])]
        self._targets = [target.to(device) for target in targets]

    def fetch(self, indices: Indices) -> list[Tensor]:
        """The batch [images, labels] of the samples at `indices`, or one more; the loader's iterator calls it."""
        dataset, device = self._dataset, self._memory.device
        if not self._moves.steps:
            whole = torch.from_numpy(indices).to(device)
            return self._batch(self._runs.index_select(0, whole * self._pitch), whole)
        epoch = dataset.epoch if context.epoch is None else context.epoch
        keys = indices.astype(np.uint64)
        if context.draws is not None:
            keys ^= mixed(context.draws.astype(np.uint64))
        tops, lefts, mirrored = self._moves.of(dataset.seed, epoch, keys)
        order = np.argsort(mirrored, kind="stable")
        numbers = np.stack([indices, indices[order], tops[order], lefts[order], np.argsort(order)])
        plain = len(indices) - int(np.count_nonzero(mirrored))
        return self._gather(torch.from_numpy(numbers).to(device), plain)

    def _gather(self, numbers: Tensor, plain: int) -> list[Tensor]:
        """plain: how many of the pictures, the first ones as they are gathered, are not mirrored."""
        indices, ordered, tops, lefts, places = numbers
        height = self._source[0]
        rows = tops[:, None] + self._rows
        starts = (ordered[:, None] * height + rows) * self._pitch + (lefts[:, None] + self._moves.overhang)
        starts = torch.where((rows >= 0) & (rows < height), starts, self._black)
        images = self._runs.index_select(0, starts.view(-1)).view(len(indices), *self._moves.size, self._channels)
        if plain < len(indices):
            images[plain:] = images[plain:].flip(2)
            images = images.view(len(indices), -1).index_select(0, places)
        return self._batch(images, indices)

    def _batch(self, images: Tensor, indices: Tensor) -> list[Tensor]:
        images = images.view(len(indices), *self._moves.size, self._channels)
        return [images.permute(0, 3, 1, 2), *(target.index_select(0, indices) for target in self._targets)]

    @property
    def _images(self) -> Tensor:
        """The images in memory, without what lies between their rows: (n, rows, columns, channels)."""
        height, width = self._source
        area = self._memory[self._moves.overhang * self._channels : self._black * self._channels]
        return area.view(-1, height, self._pitch, self._channels)[:, :, :width]

    def _upload(self, column: Column) -> list[int]:
        """Fill the memory; returns the indices of damaged images."""
        images, damaged, start = self._images, [], 0
        for chunk in column.chunks():
            end = start + len(chunk)
            damaged += [start + place for place in self._dataset.store.damaged_images(np.arange(start, end), chunk)]
            images[start:end] = torch.tensor(chunk).view(images[start:end].shape)
            start = end
        return damaged

    def _replace(self, damaged: list[int], labels: npt.NDArray[Any], valid: Tensor) -> None:
        """Do with damaged images and their labels what `on_error` says. Another sample takes a place for good."""
        dataset, sound = self._dataset, np.setdiff1d(np.arange(len(labels)), damaged)
        reason = "the pixels differ from what was packed (checksum mismatch)"
        for index in damaged:
            if dataset.on_error == "raise":
                raise DecodeError(f"sample {index}: {reason}; restore the store from a copy, or pack again")
            dataset.failures.report(index, reason)
            if dataset.on_error == "skip" and len(sound):
                other = sound[SampleRandom(dataset.seed, 0, index).integer(len(sound))]
                self._images[index], labels[index] = self._images[other], labels[other]
            else:
                self._images[index], valid[index] = 0, False
                labels[index] = math.nan if labels.dtype.kind == "f" else dataset.ignore_label


class _Crop(NamedTuple):
    """box: the first one that may be drawn. places: how many there are, down and across; empty for a fixed box."""

    box: Box
    places: tuple[int, ...]


class Moves:
    """What `Compose.plans` makes of pictures of one size whose pixels are moved, and never changed.

    size: (height, width) of the images; as an attribute, of what comes out. Attributes `overhang`: by how many columns
    at most a crop reaches beyond the image; `crops`: whether there are any.
    """

    def __init__(self, transform: Compose, size: Size) -> None:
        self.size, self.overhang, self.crops = size, 0, False
        self._width, self._pads = size[1], False
        self.steps: list[_Crop | float] = []
        for step in transform.transforms:
            if type(step) is RandomHorizontalFlip:
                self.steps.append(step.p)
            elif type(step) in (RandomCrop, CenterCrop):
                self._add_crop(step)
            else:
                raise ValueError(
                    f"device_resident=True can't do {step}; it takes RandomCrop, CenterCrop and RandomHorizontalFlip, "
                    "which only move pixels. Resize when packing (`fastload pack --short-side`), normalise by "
                    "make_loader's mean and std, apply other transforms to the batches, or leave device_resident out"
                )

    def _add_crop(self, step: Any) -> None:
        draws = _Noted()
        plan = step.plan(Plan.whole(self.size), draws)
        box = plan.window or plan.box
        down, across = draws.choices or (1, 1)
        last = box._replace(x=box.x + across - 1, y=box.y + down - 1)
        pads = not (box.inside(self.size) and last.inside(self.size))
        if self.crops and (pads or self._pads):
            raise ValueError(
                f"{step} is one of several crops, and one of them reaches beyond its picture; device_resident=True "
                "takes a crop with padding only where it is the only one"
            )
        self._pads, self.overhang = pads, max(0, -box.x, last.ends[1] - self.size[1])
        self.steps.append(_Crop(box, tuple(draws.choices)))
        self.size, self.crops = (box.height, box.width), True

    def of(self, seed: int, epoch: int, keys: Words) -> tuple[Indices, Indices, npt.NDArray[np.bool_]]:
        """Where each picture begins in its image, (rows, columns), and whether it is mirrored then."""
        random = SampleRandoms(seed, epoch, keys)
        tops, lefts = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        mirrored, width = np.zeros(len(keys), np.bool_), self._width
        for step in self.steps:
            if not isinstance(step, _Crop):
                mirrored ^= random.random() < step
                continue
            (x, y, cropped, _), places = step
            down, across = [random.integer(n) for n in places] or (0, 0)
            tops += y + down
            lefts += np.where(mirrored, width - x - across - cropped, x + across)
            width = cropped
        return tops, lefts, mirrored


class _Noted(SampleRandom):
    """Draws zeros, and notes from how many numbers each was drawn."""

    def __init__(self) -> None:
        self.choices: list[int] = []

    def integer(self, n: int) -> int:
        self.choices.append(n)
        return 0


def _raw_column(dataset: ImageDataset) -> Column:
    column = dataset.store.columns.get("image")
    if dataset.image_dtype != np.uint8:
        raise ValueError(
            f"device_resident=True takes images of 8 bits, those of {dataset.store.path} are {dataset.image_dtype}; "
            "leave it out, or pack with `--depth 8 --encode raw`"
        )
    if column is None or dataset.store.schema.sample != {"tuple": ["image", "label"]}:
        raise ValueError(
            f"device_resident=True takes a store of raw images of one size and labels; {dataset.store.path} is "
            "none. Pack MNIST, CIFAR or images of one size with `--encode raw`, large ones with `--short-side N` too"
        )
    if dataset.image_type != "tensor" or dataset.target_transform is not None or not dataset.reads_whole_batches:
        raise ValueError(
            "device_resident=True takes an ImageDataset of tensors, without a target_transform, and no subclass that "
            "reads in a way of its own; change labels in the batches, or leave device_resident out"
        )
    return column


def _check_memory(needed: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        sizes = f"needs {needed / 1e9:.2f} GB on {device}, where {free / 1e9:.2f} GB are free"
        raise MemoryError(f"device_resident=True {sizes}; pack smaller images, or leave device_resident out")
