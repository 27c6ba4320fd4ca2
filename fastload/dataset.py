"""The dataset: from indices to pictures and labels.

`ImageDataset.__getitems__` is the one read path. torch's own fetcher calls it with a batch of indices, so the stock
DataLoader, Accelerate and Lightning get its speed. For each batch: sizes and labels are gathered from columns, every
picture's plan is made, one buffer is taken, and each sample is decoded into its slot. Raw images of one shape skip
all that: the batch is one gather.

Checksums are checked each time something is read, for as much as is read (2 us for 110 KB). The rows of a raw column
are when a process first reads them: a checksum costs more than the gather.

It returns a `Batch`, a sequence of samples whose pictures are views of the buffer. `collate` hands the buffer on;
torch's default_collate copies it. A batch belongs to the user: its buffer is used again when nobody holds it.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from . import decode, masks, record
from .batch import Batch, Column
from .blocks import Values
from .buffers import BatchBuffers
from .cache import ImageCache
from .errors import ChecksumError, ColumnError, DecodeError, FastloadError, StoreError, TooManyFailures
from .failures import Failures
from .fields import leaves, restore
from .geometry import MAX_PIXELS, REDUCTIONS, Box, Plan, Size, upright_size
from .order import Drawn, SampleRandom, mix64
from .placeholders import IGNORE_LABEL, VALID, check_ignore_label, ignored, placeholder, with_valid
from .store import Column as StoreColumn
from .store import Store, Verify
from .transforms import Compose, Normalize, full_scale
from .values import Decoder, ImageType, Value, as_type, packed_type, set_decoders
from .workers import context

if TYPE_CHECKING:
    import PIL.Image

OnError = Literal["placeholder", "skip", "raise"]

_SKIP_TRIES = 100
_GATHER_BYTES = 4 << 20
_PART = 8
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What `read` gives beside the images' own type."""


class ImageDataset(Dataset[Any]):
    """The samples of a packed store: images and labels, or whatever was packed.

    path: the store, as made by `fastload pack`.
    transform: fastload's transforms, decided before decoding, or any callable on the decoded picture, or a
        `fastload.transforms.Compose` of both. A callable gets the picture alone: what moves pixels, and so a mask, has
        to be fastload's.
    target_transform: a callable on the label, or on the mask of an (image, mask).
    image_type: what callables get and the dataset returns: "tensor" (uint8, 3 x height x width, RGB, channels-last in
        memory), "numpy" (uint8, height x width x 3) or "pil". Of a store of 16 bits tensors and arrays are uint16, or
        int16, with 1 channel or 3; PIL images have one channel, mode "I;16". By default what the packed dataset gave;
        tensors, if files were packed.
    decoder: of a field of bytes: a callable that gets a view of them, in the store's memory, and returns its value;
        where there are several such fields, a dict of these by name. It runs in the workers; a
        `fastload.errors.DecodeError` of it makes the sample one that can't be decoded.
    cache: an `ImageCache`, or a budget such as "4GB" for one that drops the least recently used; None for none. Images
        are kept whole, at full size.
    on_error: what becomes of a sample that can't be decoded: a black "placeholder" with label -100, "skip" (another
        sample, the same in every run), or "raise". With the first two, failed samples are listed in `failures`.
    max_failures: raise `TooManyFailures` when more samples fail: a count, or a share of the dataset (a float below 1).
        The states of `fastload.DataLoader` keep what has failed, so it holds for a run that is resumed as a whole.
    ignore_label: the label of placeholders, where labels are whole numbers; it is not changed by `target_transform`. It
        may be a class only with return_valid.
    return_valid: put a bool behind the rest of each sample, False for a placeholder: (image, label, valid); of a dict
        it is the value "valid", and a sample that is neither becomes (sample, valid). In batches it is a bool tensor.
    scaled_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size where what is read of it is at least so many times as
        large as what it is resized to. Much faster for large photographs; the pixels differ a little. False decodes
        at full size.
    seed: random transforms draw from (seed, epoch, index), for the same picture with any number of workers.
    verify: when what is read is held against its checksum: "sample" (each sample when it's read), "always" (raw ones
        each time too), or "never"; see `Store`.
    max_pixels: larger images can't be decoded. (Where pictures have the size of their image, the placeholder has one
        pixel.) A few bytes of a stranger's store can be one of any size, which takes up to 30 bytes of memory a pixel.

    Labels are int64: an int for each sample (a tensor where the source had several), -1 where it had none. Real-valued
    ones are float32, NaN where there are none, and for placeholders. A store of
    images and masks gives (image, mask), one with more than that dicts: {"image": ..., "mask": ..., "instances": ...}.
    Geometric transforms move masks as they move their image, by nearest values; what lies outside a mask is 255 (0 for
    instances), and so is all of a placeholder's. Masks are uint8, height x width (int32 if there are values above 255):
    losses take `mask.long()`.

    Samples of a dataset that was packed come back with their structure and types (see `fields`). Their first image is
    transformed, and its masks and boxes with it; other images and arrays come as they are. What stands for a damaged
    one's fields is 0, NaN or empty. Attribute `fields` names what a sample consists of.

    `fastload.DataLoader` advances the epoch by itself. With another loader call `set_epoch` before each epoch, as with
    torch's DistributedSampler; otherwise every epoch shows the same crops.

    Raises:
        FileNotFoundError, StoreFormatError: see `Store`.
        ValueError: an option makes no sense.
        IndexError: an index is out of range.
        DecodeError: with on_error="raise", naming the sample.

    Example:
        >>> dataset = fastload.ImageDataset("db.lmdb", fastload.transforms.RandomResizedCrop(224))
        >>> image, label = dataset[0]
    """

    thread_safe = True
    """Loaders may read it from several threads at once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Any], Any] | Any = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        image_type: ImageType | None = None,
        decoder: Decoder | Mapping[str, Decoder] | None = None,
        cache: ImageCache | int | str | None = None,
        on_error: OnError = "placeholder",
        max_failures: int | float | None = None,
        ignore_label: int = IGNORE_LABEL,
        return_valid: bool = False,
        scaled_decode: bool = True,
        seed: int = 0,
        verify: Verify = "sample",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        for name, value, allowed in (("image_type", image_type, ImageType), ("on_error", on_error, OnError)):
            if value is not None and value not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}; it may be {', '.join(get_args(allowed))}")
        self.store = Store(path, verify=verify, max_pixels=max_pixels)
        schema = self.store.schema
        self.transform = Compose.of(transform)
        self.target_transform = target_transform
        self.image_type: ImageType = image_type or packed_type(schema.image)
        if self.image_type != "tensor" and any(isinstance(t, Normalize) for t in self.transform.rest):
            raise ValueError(f"Normalize works on tensors, image_type is {self.image_type!r}; leave one of them out")
        form = (self.image_dtype.name, self.channels)
        if self.image_type == "pil" and form in (("uint16", 3), ("int16", 1), ("int16", 3)):
            raise ValueError(
                f"image_type is 'pil', and the images are {self.image_dtype} with {self.channels} channels, which PIL "
                "has no mode for; take 'tensor' or 'numpy'"
            )
        moving = [t for t in self.transform.rest if type(t).__module__.startswith("torchvision.") and _moves(t)]
        if moving and self.store.masks:
            raise ValueError(
                f"{moving[0]} would move the image and leave its mask; fastload.transforms move both, so use its "
                "RandomCrop, RandomResizedCrop, RandomScale, Resize, CenterCrop and RandomHorizontalFlip"
            )
        self.cache = cache if cache is None or isinstance(cache, ImageCache) else ImageCache(cache)
        self.on_error: OnError = on_error
        self.scaled_decode = scaled_decode
        self.seed = seed
        fields = [*leaves(schema.sample)]
        if target_transform is not None and len(fields) != 2:
            raise ValueError(f"target_transform takes one target; samples of {path} have {', '.join(fields)}")
        self._target = next((name for name in reversed(fields) if name != "image"), "image")
        classes = [] if return_valid else self.store.classes or []
        check_ignore_label(ignore_label, schema, self.store.columns["label"].dtype.kind == "f", classes)
        self.ignore_label, self.return_valid = ignore_label, return_valid
        self._sample = with_valid(schema.sample) if return_valid else schema.sample
        self.fields: tuple[str, ...] = tuple(leaves(self._sample))
        self._is_pair = schema.sample in ({"tuple": ["image", "label"]}, {"tuple": ["image", "mask"]})
        self._has_images = schema.image is not None
        self._columns = [spec for spec in schema.others if spec.column is not None]
        self._values = [Value(spec, image_type) for spec in schema.others if spec.column is None]
        set_decoders(self._values, decoder)
        others = [spec.name for spec in schema.of_kind("image")[1:]]
        if others and self.transform.geometric:
            warnings.warn(
                f"{self.transform} moves the first picture of each sample alone; {', '.join(others)} come as they were "
                "packed",
                stacklevel=2,
            )
        if not self._has_images and self.transform.transforms:
            raise ValueError(f"{path} has no images that {self.transform} could work on; leave the transform out")
        self.failures = Failures(len(self.store), _limit(max_failures, len(self.store)))
        self._buffers = BatchBuffers()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def classes(self) -> list[str] | None:
        """Class names by label; None where the labels have no names."""
        return self.store.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label by class name."""
        return {name: label for label, name in enumerate(self.classes or ())}

    @property
    def targets(self) -> npt.NDArray[Any]:
        """All labels: int64 (float64 if they are real) (n,), or (n, labels). A copy of the column."""
        return np.asarray(self.store.columns["label"])

    @property
    def channels(self) -> int:
        """1 for grey images that are stored raw (MNIST), with 16 bits, or were packed as such, else 3."""
        return self.store.image_channels

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """The type of the images' values: uint8, uint16 or int16."""
        return self.store.image_dtype

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this dataset's data and randomness from another's: 16 hexadecimal digits.

        Of the number of samples, classes and seed, and the sizes, labels and masks of 1,024 samples all over the store.
        """
        rows = np.linspace(0, len(self) - 1, min(len(self), 1024)).astype(np.int64)
        names = ["size", "label", *(f"{mask}_checksum" for mask in self.store.masks)]
        columns = [self.store.columns[name].gather(rows).tobytes() for name in names if name in self.store.columns]
        known = repr((len(self), self.classes, self.seed)).encode()
        return f"{record.checksum(known + b''.join(columns)):016x}"

    @property
    def epoch(self) -> int:
        """The epoch that random transforms draw from."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, 0 or more. It lies in shared memory: persistent worker processes see it too."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it counts from 0")
        self._epoch[0] = epoch

    def read(
        self,
        index: int,
        region: Sequence[int] | None = None,
        *,
        reduce: int = 1,
        gray: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The upright image of a sample, or a region of it, no transform applied: (channels, height, width).

        Of a tiled JPEG, or an image of 16 bits, only the region's tiles are read and decoded. Channels are 3 (RGB), or
        1 if the image is grey and stored raw or with 16 bits.

        region: (x, y, width, height) in pixels of the upright image at full size, whatever `reduce` says.
        reduce: 2, 4 or 8 for a half, a quarter or an eighth of the size, rounded up. JPEGs are decoded at that size;
            of other images, and where a side has up to 8 pixels, squares of pixels are averaged. A region is rounded
            outward to whole pixels of the smaller image: `read(i, (x, y, w, h), reduce=r)` is `read(i, reduce=r)` from
            x // r and y // r up to (x + w) / r and (y + h) / r, rounded up. (Where EXIF mirrors a JPEG's side that is
            no multiple of r, its smaller pixels begin up to r - 1 pixels further left or higher.)
        gray: one channel, luma (ITU-R 601). Of a JPEG it is the one that it stores, decoded without the colours: what
            OpenCV and Pillow's `draft` give. That is within 1 level of the luma of its RGB pixels, and further from it
            where these are clipped, being beyond 0 or 255.
        dtype: None for the store's own, uint8 as a rule. torch.float32, float64, float16 or bfloat16 give values from 0
            to 1; of int16 the values themselves.

        Raises:
            ValueError: the region is empty or not inside the image; reduce or dtype is none of these.
            DecodeError, ChecksumError: the image is damaged, whatever `on_error` says.

        Example:
            >>> corner = dataset.read(0, (0, 0, 512, 512), reduce=4, gray=True)  # uint8, 1 x 128 x 128
        """
        if reduce not in (1, *REDUCTIONS):
            raise ValueError(f"reduce is {reduce!r}; it may be 1, 2, 4 or 8")
        self._check_images()
        own: torch.dtype = getattr(torch, self.image_dtype.name)
        dtype = dtype or own
        if dtype not in (own, *_FLOATS):
            raise ValueError(f"dtype is {dtype!r}; it may be {', '.join(map(str, (own, *_FLOATS)))}")
        index = int(self._checked([operator.index(index)])[0])
        size = self._sizes(np.array([index]))[0]
        box = Plan.whole(size).box if region is None else _box(region)
        if not box.inside(size):
            self._stored(index, size)  # an error of its own, if it is damaged or too large
            raise ValueError(f"region {region} is not inside image {index}, {size[1]} x {size[0]} (width x height)")
        if reduce == 1 and not gray:
            out: Values = np.empty((box.height, box.width, self.channels), self.image_dtype)
            self._draw(index, size, [Plan(box, (box.height, box.width))], out)
        else:
            out = decode.reduced(self._stored(index, size), box, reduce, gray=gray)
            out = decode.with_channels(out, 1 if gray else self.channels)
        image, scale = torch.from_numpy(out).permute(2, 0, 1), full_scale(own)
        return image if dtype == own else image.to(torch.promote_types(dtype, torch.float32)).div_(scale).to(dtype)

    def _check_images(self) -> None:
        if not self._has_images:
            raise ValueError(f"{self.store.path} has no images; its fields are {', '.join(self.fields)}")

    def _stored(self, index: int, size: Size) -> Values | record.Field:
        """Sample `index`, an image of `size`, out of the store, not the cache: pixels must not depend on what it holds.

        Scaled by the DCT, or by luma alone, a JPEG has others than its RGB pixels at full size would give.
        """
        if "image" in self.store.columns:
            return self._raw_image(index, size)
        return self._image_field(self.store.fields(index)[0], size)

    def show(self, indices: Sequence[int] | None = None, *, columns: int = 8) -> PIL.Image.Image:
        """A contact sheet of samples, by default 32 all over the store; a notebook draws a cell's last value by itself.

        Where there is a transform, each picture is followed by what becomes of it. Samples that can't be decoded are
        crossed out.
        """
        from .show import sheet_of

        self._check_images()
        if indices is None:
            count = min(len(self), 32)
            indices = [place * len(self) // count for place in range(count)]
        views = [self._view(Compose([])), *([self._view(self.transform)] if self.transform.transforms else [])]
        samples = [
            (self._caption(index) if number == 0 else "transformed", view._shown(index))
            for index in self._checked(indices).tolist()
            for number, view in enumerate(views)
        ]
        return sheet_of(samples, self.classes, columns if len(views) == 1 else max(2, columns - columns % 2))

    def _view(self, transform: Compose) -> ImageDataset:
        """This dataset with another transform, and errors instead of placeholders; boxes are (x, y, width, height)."""
        view = copy.copy(self)
        view.transform, view.target_transform, view.on_error = transform, None, "raise"
        view._values = [Value(value.spec._replace(format=""), None) for value in self._values]
        return view

    def _shown(self, index: int) -> dict[str, Any] | str:
        """What is drawn of a sample, or why there is nothing."""
        try:
            batch = self._load([operator.index(index)])  # not a subclass's own way
        except DecodeError as error:
            return str(error.__cause__ or error)  # the sample is named below
        values = {name: column[0] for name, column in zip(self.fields, batch.columns, strict=True)}
        shown = {name: values[name] for name in ("image", *self.store.masks)}
        fields = zip(("boxes", "labels"), self.store.schema.boxes_and_labels, strict=True)
        shown |= {name: values[field] for name, field in fields if field is not None}
        return shown

    def _caption(self, index: int) -> str:
        if "label" not in self.fields:
            return f"{index}{self._name_of(index)}"
        label = self.store.columns["label"][index].tolist()
        if label == -1:
            return f"{index}{self._name_of(index)}"
        known = self.classes is not None and isinstance(label, int) and 0 <= label < len(self.classes)
        return f"{index}: {self.classes[label] if known and self.classes else label}"

    def __getitem__(self, index: int) -> Any:
        operator.index(index)
        return self._load([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch | list[Any]:
        """The samples at `indices`, read together; torch's fetcher calls this with a batch of indices.

        In a subclass that has a `__getitem__` of its own, a list of what that returns.
        """
        own, batched = type(self).__getitem__, type(self).__getitems__
        if own is not ImageDataset.__getitem__ and batched is ImageDataset.__getitems__:
            return [self[index] for index in indices]
        batch = self._load(indices)
        return [*batch] if isinstance(self._sample, str) else batch  # bare pictures: torch stacks lists alone

    @property
    def reads_whole_batches(self) -> bool:
        """Whether a loader may read it with `begin`: not a subclass that has ways of its own."""
        own, batched = type(self).__getitem__, type(self).__getitems__
        return own is ImageDataset.__getitem__ and batched is ImageDataset.__getitems__

    def _load(self, indices: Sequence[int]) -> Batch:
        reading = self.begin(indices)
        for part in range(self.parts(len(indices))):
            reading.fill(part)
        return reading.finish()

    def begin(self, indices: Sequence[int]) -> Reading:
        """Start to read a batch whose parts several threads may fill: begin, fill each, finish."""
        return Reading(self, self._checked(indices), Drawn.draws(indices))

    def parts(self, count: int) -> int:
        """Into how many parts the reading of `count` samples falls."""
        return 1 if self._gathered is not None else max(1, -(-count // _PART))

    def batches_per_read(self, batch_size: int) -> int:
        """How many batches a worker thread does well to read together.

        More than one where a batch is a single gather: handing one from thread to thread costs as much as gathering it.
        """
        if self._gathered is None:
            return 1
        return max(1, _GATHER_BYTES // (batch_size * math.prod(self._gathered.shape)))

    @property
    def _gathered(self) -> StoreColumn | None:
        """The column of raw images, if pictures are its rows as they are."""
        as_they_are = not (self.transform.geometric or self._reads_records)
        return self.store.columns.get("image") if as_they_are else None

    @property
    def _reads_records(self) -> bool:
        """Whether a record has more of a sample than its image."""
        return bool(self.store.masks or self._values)

    def _checked(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """The indices as an array, negative ones counted from the end."""
        where = np.asarray(indices)
        if where.dtype.kind not in "iu" and len(where):
            raise TypeError(f"indices are whole numbers, got {where.dtype}: {indices!r:.100}")
        where = where.astype(np.int64, copy=False)
        count = len(self)
        if len(where) and where.view(np.uint64).max() >= count:  # as unsigned, a negative one is out of range too
            wrong = where[(where < -count) | (where >= count)]
            if len(wrong):
                raise IndexError(f"index {wrong[0]} is out of range for a dataset of {count} samples")
            where = np.where(where < 0, where + count, where)
        return where

    def _finished(self, picture: Values) -> Any:
        """A picture in the type that was asked for, with the transforms applied that follow the geometric ones."""
        image: Any = as_type(picture, self.image_type)
        for transform in self.transform.rest:
            image = transform(image)
        return image

    def _targets(self, labels: npt.NDArray[Any]) -> torch.Tensor:
        targets = torch.from_numpy(labels)
        return targets.float() if targets.is_floating_point() else targets

    def _finished_mask(self, mask: npt.NDArray[Any]) -> Any:
        """A mask in the type that was asked for, with the target transform applied."""
        values: Any = mask
        if self.image_type == "tensor":
            values = torch.from_numpy(mask)
        elif self.image_type == "pil":
            from PIL import Image

            values = Image.fromarray(mask)
        return values if self.target_transform is None else self.target_transform(values)

    @functools.cached_property
    def _mask_dtypes(self) -> list[npt.DTypeLike]:
        """The type of each mask's values: int32 where some don't fit into uint8."""
        columns = [self.store.columns[f"{name}_max"] for name in self.store.masks]
        return [np.uint8 if all((chunk <= 255).all() for chunk in column.chunks()) else np.int32 for column in columns]

    def _sizes(self, indices: npt.NDArray[np.int64]) -> list[Size]:
        """What memory is taken for: for images that are too large to be read, that of one pixel."""
        if not self._has_images:
            return [(0, 0)] * len(indices)
        sizes = self.store.columns["size"].gather(indices)
        areas = sizes.prod(axis=1, dtype=np.float64)
        if not areas.all():
            raise ColumnError(f"{self.store.path}: column 'size' has images without pixels; the store is damaged")
        sizes[areas > self.store.max_pixels] = 1
        return [(height, width) for height, width in sizes.tolist()]

    def _draw(
        self, index: int, size: Size, plans: list[Plan], out: Values, fields: Sequence[record.Field] = ()
    ) -> None:
        """Decode sample `index`, an image of `size`, and carry its plans out into `out`. fields: of its record."""
        cache = self.cache
        image: Values | record.Field | None = None
        if "image" in self.store.columns:
            image = self._raw_image(index, size)
        elif cache is not None:
            image = cache.get(index)
        if image is None:
            image = self._image_field((fields or self.store.fields(index))[0], size)
            if cache is not None:
                image = decode.upright(image)
                cache.put(index, image)
        orientation = image.orientation if isinstance(image, record.Field) else 1
        decode.render(image, orientation, plans, out, scaled=self.scaled_decode)

    def _raw_image(self, index: int, size: Size) -> Values:
        image = self.store.raw_image(index)
        _check_size(image.shape[:2], size)
        return image

    def _image_field(self, field: record.Field, size: Size) -> record.Field:
        _check_size(upright_size((field.height, field.width), field.orientation), size)
        return field

    def _name_of(self, index: int) -> str:
        try:
            return f" ({self.store.name(index)})"
        except FastloadError:
            return ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _buffers=BatchBuffers())

    def __repr__(self) -> str:
        return f"ImageDataset({self.store.path!r}, {len(self)} samples, {self.transform})"


class Reading:
    """A batch that is being read. `fill` may run for several parts at once: each writes to its own samples' places."""

    def __init__(self, dataset: ImageDataset, indices: npt.NDArray[np.int64], draws: list[int] | None = None) -> None:
        self._dataset = dataset
        self._labels = dataset.store.columns["label"].gather(indices)
        self._values: dict[str, list[Any]] = {value.spec.name: [None] * len(indices) for value in dataset._values}
        for spec in dataset._columns:
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
        column = dataset._gathered
        self._gathered: npt.NDArray[np.int64] | None = None
        if column is not None:
            self._tensor, self._slots = dataset._buffers.take((len(indices), *column.shape), context.memory)
            column.gather(indices, out=self._slots)
            self._gathered = indices
            self._todo: list[tuple[int, Size]] = []
        else:
            self._todo = list(zip(indices.tolist(), dataset._sizes(indices), strict=True))
            self._take_slots()
        self._masks = self._mask_slots()
        self._whole = (
            self._tensor is not None
            and dataset.image_type == "tensor"
            and all(isinstance(transform, Normalize) for transform in dataset.transform.rest)
            and not (self._masks and dataset.target_transform is not None)
        ) or not dataset._has_images
        self._pictures: list[Any] = [] if self._whole else [None] * len(indices)
        self._finished_masks: list[list[Any]] = [[None] * len(self._pictures) for _ in self._masks]

    def _take_slots(self) -> None:
        """Take one buffer for all pictures if their sizes agree, else one for each.

        Where the transform alone says the size, the plans are left to the threads that carry them out: making them all
        here would keep the interpreter from those for a millisecond.
        """
        dataset = self._dataset
        if not dataset._has_images:
            return
        size = dataset.transform.output_size
        sizes = [size or self._plans(place)[-1].output_size for place in range(len(self._todo))]
        if len(set(sizes)) == 1:
            dtype = dataset.image_dtype
            shape = (len(sizes), *sizes[0], dataset.channels * dtype.itemsize)
            tensor, array = dataset._buffers.take(shape, context.memory)
            self._tensor, self._slots = tensor.view(getattr(torch, dtype.name)), array.view(dtype)
        else:
            self._slots = [np.empty((*size, dataset.channels), dataset.image_dtype) for size in sizes]

    def _mask_slots(self) -> list[tuple[torch.Tensor | None, Any]]:
        """For each mask of the store a buffer for the batch, as `_take_slots` takes one for the pictures."""
        slots: list[tuple[torch.Tensor | None, Any]] = []
        for dtype in self._dataset._mask_dtypes if self._dataset.store.masks else ():
            if self._tensor is None:
                slots.append((None, [np.empty(slot.shape[:2], dtype) for slot in self._slots]))
                continue
            count, height, width, _ = self._slots.shape
            shape = (count, height, width * np.dtype(dtype).itemsize)
            tensor, array = self._dataset._buffers.take(shape, context.memory)
            slots.append((tensor.view(torch.int32 if dtype is np.int32 else torch.uint8), array.view(dtype)))
        return slots

    def _plans(self, place: int) -> list[Plan]:
        index, size = self._todo[place]
        dataset = self._dataset
        return dataset.transform.plans(size, self._random(place, index)) if dataset._has_images else []

    def _random(self, place: int, index: int) -> SampleRandom:
        """The randomness of a sample; of its own for each time that it comes in an epoch."""
        if self._draws is not None:
            index ^= mix64(self._draws[place])
        return SampleRandom(self._dataset.seed, self._epoch, index)

    def fill(self, part: int) -> None:
        """Decode the samples of one part into their slots, and apply what follows if it works on single pictures."""
        dataset = self._dataset
        if self._gathered is not None:
            self._check_gathered(self._gathered)
        for place, (index, size) in enumerate(self._todo[part * _PART : (part + 1) * _PART], part * _PART):
            try:
                self._draw(place, index, size, self._plans(place))
            except ColumnError:
                raise
            except FastloadError as error:
                self._replace(place, index, error)
            except MemoryError as error:
                self._replace(place, index, DecodeError(f"there is no memory for it: {error}"))
        if not self._whole:
            last = (part + 1) * _PART if self._todo else len(self._labels)
            for place in range(part * _PART, min(last, len(self._labels))):
                self._pictures[place] = dataset._finished(self._slots[place])
                for finished, (_, slots) in zip(self._finished_masks, self._masks, strict=True):
                    finished[place] = dataset._finished_mask(slots[place])

    def _check_gathered(self, indices: npt.NDArray[np.int64]) -> None:
        for place in self._dataset.store.damaged_images(indices, self._slots):
            error = ChecksumError("the pixels differ from what was packed (checksum mismatch)")
            self._replace(place, int(indices[place]), error)

    def _draw(self, place: int, index: int, size: Size, plans: list[Plan]) -> None:
        """Decode sample `index` to the place of another, or its own: image, masks and values."""
        dataset = self._dataset
        fields = dataset.store.fields(index) if dataset._reads_records else []
        if self._slots is not None:
            dataset._draw(index, size, plans, self._slots[place], fields)
        others = fields["image" in dataset.store.field_names :]
        for field, fill, (_, slots) in zip(others, dataset.store.masks.values(), self._masks, strict=False):
            masks.render(field, size, plans, slots[place], fill)
        for value, field in zip(dataset._values, others[len(self._masks) :], strict=False):
            self._values[value.spec.name][place] = value.read(field, plans if dataset.transform.geometric else [])

    def finish(self) -> Batch:
        """The batch, once all parts are filled."""
        dataset = self._dataset
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
        names = dataset.fields
        if "label" in names and "label" not in columns:
            columns["label"] = dataset._targets(self._labels)
        if dataset.target_transform is not None and dataset._target not in dataset.store.masks:
            columns[dataset._target] = self._transformed(columns[dataset._target], dataset.target_transform)
        if dataset.return_valid:
            columns[VALID] = valid = torch.ones(len(self._labels), dtype=torch.bool)
            valid[self._placeholders] = False
        if dataset._is_pair:
            return Batch(*(columns[name] for name in names))
        return Batch(*(columns[name] for name in names), names=names, tree=dataset._sample)

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
            raise DecodeError(f"sample {index}{dataset._name_of(index)}: {error}") from error
        dataset.failures.report(index, str(error))
        if dataset.on_error == "skip":
            self._take_another(place, index)
            return
        if self._slots is not None:
            self._slots[place][...] = 0
        for (_, slots), fill in zip(self._masks, dataset.store.masks.values(), strict=True):
            slots[place][...] = fill
        for value in dataset._values:
            self._values[value.spec.name][place] = value.placeholder()
        for spec in dataset._columns:
            self._values[spec.name][place] = placeholder(spec, dataset.ignore_label)
        self._labels[place] = math.nan if self._labels.dtype.kind == "f" else dataset.ignore_label
        self._placeholders.append(place)

    def _take_another(self, place: int, index: int) -> None:
        """Draw another sample in place of a failed one: a choice that depends on (seed, epoch, index) alone."""
        dataset = self._dataset
        random = self._random(place, index)
        for _ in range(_SKIP_TRIES):
            other = random.integer(len(dataset))
            size = dataset._sizes(np.array([other]))[0]
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
            for spec in dataset._columns:
                assert spec.column is not None
                self._values[spec.name][place] = restore(spec, dataset.store.columns[spec.column][other][None])[0]
            return
        raise TooManyFailures(
            f"sample {index} failed, and so did {_SKIP_TRIES} others drawn in its place, or they have other sizes; "
            "run `fastload verify --decode` on the store"
        )


def _check_size(found: tuple[int, ...], size: Size) -> None:
    if found != size:
        raise StoreError(
            f"the image has {found[1]} x {found[0]} pixels, the size column says otherwise; the store is damaged"
        )


def _box(region: Sequence[int]) -> Box:
    try:
        x, y, width, height = map(operator.index, region)
    except (TypeError, ValueError):
        raise ValueError(f"region is {region!r}; it takes 4 whole numbers (x, y, width, height)") from None
    return Box(x, y, width, height)


_MOVING = re.compile(r"Crop|Resize|Flip|Rotation|Affine|Perspective|Elastic|Pad|Zoom|ScaleJitter|ShortestSize")


def _moves(transform: object) -> bool:
    """Whether a transform of torchvision's moves pixels, by its name."""
    return _MOVING.search(type(transform).__name__) is not None


def _limit(max_failures: int | float | None, count: int) -> int | None:
    if max_failures is None:
        return None
    is_share = isinstance(max_failures, float)
    is_number = isinstance(max_failures, int | float | np.integer) and not isinstance(max_failures, bool)
    if not is_number or not 0 <= max_failures <= (1 if is_share else math.inf):
        raise ValueError(f"max_failures is {max_failures!r}; it may be a count, or a share of the dataset up to 1.0")
    return int(max_failures * count) if is_share else int(max_failures)
