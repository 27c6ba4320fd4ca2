"""A batch that is being read: from indices, by way of the store, to a `Batch`.

`ImageDataset.begin` makes a `Reading`, its parts are filled, by several threads if there are, and `finish` gives the
batch. A sample's way through it:

    Reading      labels and other columns are gathered for the whole batch, and memory is taken for its pictures
    _plans       what is to become of the picture, drawn from (seed, epoch, index)
    _draw        its record is read; `stored_images.draw` decodes the image into its slot, `masks.render` the masks,
                 `Value.read` the other fields
    _replace     where that fails: a placeholder, another sample, or the error
    _finish_one  what follows geometric transforms, if it works on single pictures
    finish       the columns of the batch, in the order of the samples' fields

Raw images of one shape that no transform moves skip the middle: the batch is one gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from . import masks
from .batch import Batch, Column
from .buffers import BatchBuffers
from .cache import ImageCache
from .errors import ChecksumError, ColumnError, DecodeError, FastloadError, TooManyFailures
from .failures import Failures
from .fields import restore
from .geometry import Plan, Size
from .layout import Layout
from .order import SampleRandom, mix64
from .placeholders import VALID, ignored, placeholder
from .store import Store
from .stored_images import check_plans, draw, name_of, sizes_of
from .transforms import Compose, Normalize
from .values import ImageType, as_targets, as_type, mask_as_type
from .workers import context

OnError = Literal["placeholder", "skip", "raise"]

PART = 8
"""How many samples a part has, which one thread fills."""

_SKIP_TRIES = 100


class Readable(Protocol):
    """An `ImageDataset`, as far as its batches need to know it; what each option says is told there."""

    store: Store
    transform: Compose
    target_transform: Callable[[Any], Any] | None
    image_type: ImageType
    cache: ImageCache | None
    on_error: OnError
    ignore_label: int
    return_valid: bool
    scaled_decode: bool
    seed: int
    failures: Failures

    def __len__(self) -> int: ...

    @property
    def epoch(self) -> int: ...


class Reading:
    """A batch that is being read. `fill` may run for several parts at once: each writes to its own samples' places."""

    def __init__(
        self,
        dataset: Readable,
        layout: Layout,
        buffers: BatchBuffers,
        indices: npt.NDArray[np.int64],
        draws: list[int] | None,
    ) -> None:
        self._dataset, self._layout, self._buffers = dataset, layout, buffers
        self._labels = dataset.store.columns["label"].gather(indices)
        self._values: dict[str, list[Any]] = {value.spec.name: [None] * len(indices) for value in layout.values}
        for spec in layout.columns:
            assert spec.column is not None
            rows = self._labels if spec.column == "label" else dataset.store.columns[spec.column].gather(indices)
            self._values[spec.name] = restore(spec, rows)
        self._epoch = dataset.epoch if context.epoch is None else context.epoch
        # A dataset around this one may read a batch in pieces: then the context's draws are not those of `indices`.
        if draws is None and context.draws is not None and len(context.draws) == len(indices):
            draws = context.draws.tolist()
        self._draws = draws
        self._placeholders: list[int] = []
        self._tensor: torch.Tensor | None = None
        self._slots: Any = None
        column = layout.gathered(dataset.transform)
        self._gathered: npt.NDArray[np.int64] | None = None
        if column is not None:
            self._tensor, self._slots = buffers.take((len(indices), *column.shape), context.memory)
            column.gather(indices, out=self._slots)
            self._gathered = indices
            self._todo: list[tuple[int, Size]] = []
        else:
            self._todo = list(zip(indices.tolist(), sizes_of(dataset.store, indices), strict=True))
            self._take_slots()
        self._masks = self._mask_slots()
        self._whole = (
            self._tensor is not None
            and dataset.image_type == "tensor"
            and all(isinstance(transform, Normalize) for transform in dataset.transform.rest)
            and not (self._masks and dataset.target_transform is not None)
        ) or not layout.has_images
        self._pictures: list[Any] = [] if self._whole else [None] * len(indices)
        self._finished_masks: list[list[Any]] = [[None] * len(self._pictures) for _ in self._masks]

    def _take_slots(self) -> None:
        """Take one buffer for all pictures if their sizes agree, else one for each.

        Where the transform alone says the size, the plans are left to the threads that carry them out: making them all
        here would keep the interpreter from those for a millisecond.
        """
        if not self._layout.has_images:
            return
        channels, dtype = self._dataset.store.image_channels, self._dataset.store.image_dtype
        size = self._dataset.transform.output_size
        sizes = [size or self._planned_size(place) for place in range(len(self._todo))]
        if len(set(sizes)) == 1:
            shape = (len(sizes), *sizes[0], channels * dtype.itemsize)
            tensor, array = self._buffers.take(shape, context.memory)
            self._tensor, self._slots = tensor.view(getattr(torch, dtype.name)), array.view(dtype)
        else:
            self._slots = [np.empty((*size, channels), dtype) for size in sizes]

    def _planned_size(self, place: int) -> Size:
        """What memory is taken for: where plans ask for too much, which fails when they are carried out, one pixel."""
        plans = self._plans(place)
        try:
            check_plans(self._dataset.store, plans)
        except DecodeError:
            return 1, 1
        return plans[-1].output_size

    def _mask_slots(self) -> list[tuple[torch.Tensor | None, Any]]:
        """For each mask of the store a buffer for the batch, as `_take_slots` takes one for the pictures."""
        slots: list[tuple[torch.Tensor | None, Any]] = []
        for dtype in self._layout.mask_dtypes if self._dataset.store.masks else ():
            if self._tensor is None:
                slots.append((None, [np.empty(slot.shape[:2], dtype) for slot in self._slots]))
                continue
            count, height, width, _ = self._slots.shape
            shape = (count, height, width * np.dtype(dtype).itemsize)
            tensor, array = self._buffers.take(shape, context.memory)
            slots.append((tensor.view(torch.int32 if dtype is np.int32 else torch.uint8), array.view(dtype)))
        return slots

    def _plans(self, place: int) -> list[Plan]:
        index, size = self._todo[place]
        return self._dataset.transform.plans(size, self._random(place, index)) if self._layout.has_images else []

    def _random(self, place: int, index: int) -> SampleRandom:
        """The randomness of a sample; of its own for each time that it comes in an epoch."""
        if self._draws is not None:
            index ^= mix64(self._draws[place])
        return SampleRandom(self._dataset.seed, self._epoch, index)

    def fill(self, part: int) -> None:
        """Decode the samples of one part into their slots, and apply what follows if it works on single pictures."""
        if self._gathered is not None:
            self._check_gathered(self._gathered)
        for place, (index, size) in enumerate(self._todo[part * PART : (part + 1) * PART], part * PART):
            try:
                self._draw(place, index, size, self._plans(place))
            except ColumnError:
                raise
            except FastloadError as error:
                self._replace(place, index, error)
            except MemoryError as error:
                self._replace(place, index, DecodeError(f"there is no memory for it: {error}"))
        if not self._whole:
            last = (part + 1) * PART if self._todo else len(self._labels)
            for place in range(part * PART, min(last, len(self._labels))):
                self._finish_one(place)

    def _check_gathered(self, indices: npt.NDArray[np.int64]) -> None:
        for place in self._dataset.store.damaged_images(indices, self._slots):
            error = ChecksumError("the pixels differ from what was packed (checksum mismatch)")
            self._replace(place, int(indices[place]), error)

    def _draw(self, place: int, index: int, size: Size, plans: list[Plan]) -> None:
        """Decode sample `index` to the place of another, or its own: image, masks and values."""
        dataset, store = self._dataset, self._dataset.store
        fields = store.fields(index) if self._layout.reads_records else []
        if self._slots is not None:
            cache, scaled = dataset.cache, dataset.scaled_decode
            draw(store, index, size, plans, self._slots[place], fields=fields, cache=cache, scaled=scaled)
        others = fields["image" in store.field_names :]
        for field, fill, (_, slots) in zip(others, store.masks.values(), self._masks, strict=False):
            masks.render(field, size, plans, slots[place], fill)
        for value, field in zip(self._layout.values, others[len(self._masks) :], strict=False):
            self._values[value.spec.name][place] = value.read(field, plans if dataset.transform.geometric else [])

    def _finish_one(self, place: int) -> None:
        """Give a picture and its masks the type that was asked for, and apply the transforms that follow."""
        dataset = self._dataset
        picture: Any = as_type(self._slots[place], dataset.image_type)
        for transform in dataset.transform.rest:
            picture = transform(picture)
        self._pictures[place] = picture
        for finished, (_, slots) in zip(self._finished_masks, self._masks, strict=True):
            mask = mask_as_type(slots[place], dataset.image_type)
            finished[place] = mask if dataset.target_transform is None else dataset.target_transform(mask)

    def finish(self) -> Batch:
        """The batch, once all parts are filled."""
        dataset, layout = self._dataset, self._layout
        columns: dict[str, Column] = {**self._values, "image": self._pictures}
        columns |= zip(dataset.store.masks, self._finished_masks, strict=True)
        if self._whole and self._tensor is not None:
            images = self._tensor.permute(0, 3, 1, 2)
            for normalize in dataset.transform.rest:
                images = normalize(images)
            columns["image"] = images
            columns |= {
                name: tensor
                for name, (tensor, _) in zip(dataset.store.masks, self._masks, strict=True)
                if tensor is not None
            }
        names = layout.names
        if "label" in names and "label" not in columns:
            columns["label"] = as_targets(self._labels)
        if dataset.target_transform is not None and layout.target not in dataset.store.masks:
            columns[layout.target] = self._transformed(columns[layout.target], dataset.target_transform)
        if dataset.return_valid:
            columns[VALID] = valid = torch.ones(len(self._labels), dtype=torch.bool)
            valid[self._placeholders] = False
        if layout.is_pair:
            return Batch(*(columns[name] for name in names))
        return Batch(*(columns[name] for name in names), names=names, tree=layout.sample)

    def _transformed(self, targets: Column, transform: Callable[[Any], Any]) -> list[Any]:
        """Targets with the transform applied, except placeholders' and labels that say: ignore."""
        skipped = ignored(self._labels)
        skipped[self._placeholders] = True
        values = targets.tolist() if isinstance(targets, torch.Tensor) and targets.dim() == 1 else list(targets)
        return [value if skip else transform(value) for value, skip in zip(values, skipped, strict=True)]

    def _replace(self, place: int, index: int, error: FastloadError) -> None:
        """Deal with a sample that failed: put another one or a placeholder in its place, or raise."""
        dataset = self._dataset
        if dataset.on_error == "raise":
            raise DecodeError(f"sample {index}{name_of(dataset.store, index)}: {error}") from error
        dataset.failures.report(index, str(error))
        if dataset.on_error == "skip":
            self._take_another(place, index)
            return
        if self._slots is not None:
            self._slots[place][...] = 0
        for (_, slots), fill in zip(self._masks, dataset.store.masks.values(), strict=True):
            slots[place][...] = fill
        for value in self._layout.values:
            self._values[value.spec.name][place] = value.placeholder()
        for spec in self._layout.columns:
            self._values[spec.name][place] = placeholder(spec, dataset.ignore_label)
        self._labels[place] = math.nan if self._labels.dtype.kind == "f" else dataset.ignore_label
        self._placeholders.append(place)

    def _take_another(self, place: int, index: int) -> None:
        """Draw another sample in place of a failed one: a choice that depends on (seed, epoch, index) alone."""
        dataset = self._dataset
        random = self._random(place, index)
        for _ in range(_SKIP_TRIES):
            other = random.integer(len(dataset))
            size = sizes_of(dataset.store, np.array([other]))[0]
            plans: list[Plan] = []
            if self._slots is not None:
                plans = dataset.transform.plans(size, SampleRandom(dataset.seed, self._epoch, other))
                if plans[-1].output_size != self._slots[place].shape[:2]:
                    continue
            try:
                self._draw(place, other, size, plans)
            except FastloadError as error:
                dataset.failures.report(other, str(error))
                continue
            self._labels[place] = dataset.store.columns["label"][other]
            for spec in self._layout.columns:
                assert spec.column is not None
                self._values[spec.name][place] = restore(spec, dataset.store.columns[spec.column][other][None])[0]
            return
        raise TooManyFailures(
            f"sample {index} failed, and so did {_SKIP_TRIES} others drawn in its place, or they have other sizes; "
            "run `fastload verify --decode` on the store"
        )
