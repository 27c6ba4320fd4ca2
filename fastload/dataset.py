"""The dataset: from indices to pictures and labels.

`ImageDataset.__getitems__` is the one read path. torch's own fetcher calls it with a batch of indices, so the stock
DataLoader, Accelerate and Lightning get its speed. How a batch is read is told in `batch_reading`; here are
the options, what torch and the loaders ask of a dataset, and images on their own.

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
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from . import decode, record
from .batch import Batch
from .batch_reading import PART, OnError, Reading
from .buffers import BatchBuffers
from .cache import ImageCache
from .errors import DecodeError
from .failures import Failures
from .fields import leaves
from .geometry import MAX_PIXELS, REDUCTIONS, Box, Plan
from .layout import Layout
from .order import Drawn
from .placeholders import IGNORE_LABEL, check_ignore_label
from .store import Store, Verify
from .stored_images import draw, name_of, sizes_of, stored_image
from .transforms import Compose, Normalize, full_scale
from .values import Decoder, ImageType, Value, packed_type, set_decoders

if TYPE_CHECKING:
    import PIL.Image

_GATHER_BYTES = 4 << 20
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
        pixel.) A few bytes of a stranger's store can be one of any size, which takes up to 12 bytes of memory a pixel.

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
        classes = [] if return_valid else self.store.classes or []
        check_ignore_label(ignore_label, schema, self.store.columns["label"].dtype.kind == "f", classes)
        self.ignore_label, self.return_valid = ignore_label, return_valid
        self._layout = Layout(self.store, image_type, return_valid)
        self.fields = self._layout.names
        set_decoders(self._layout.values, decoder)
        others = [spec.name for spec in schema.of_kind("image")[1:]]
        if others and self.transform.geometric:
            warnings.warn(
                f"{self.transform} moves the first picture of each sample alone; {', '.join(others)} come as they were "
                "packed",
                stacklevel=2,
            )
        if not self._layout.has_images and self.transform.transforms:
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
        size = sizes_of(self.store, np.array([index]))[0]
        box = Plan.whole(size).box if region is None else _box(region)
        if not box.inside(size):
            stored_image(self.store, index, size)  # an error of its own, if it is damaged or too large
            raise ValueError(f"region {region} is not inside image {index}, {size[1]} x {size[0]} (width x height)")
        if reduce == 1 and not gray:
            out = np.empty((box.height, box.width, self.channels), self.image_dtype)
            plan = Plan(box, (box.height, box.width))
            draw(self.store, index, size, [plan], out, cache=self.cache, scaled=self.scaled_decode)
        else:
            # Out of the store, not the cache: pixels must not depend on what it holds. Scaled by the DCT, or by luma
            # alone, a JPEG has others than its RGB pixels at full size would give.
            out = decode.reduced(stored_image(self.store, index, size), box, reduce, gray=gray)
            out = decode.with_channels(out, 1 if gray else self.channels)
        image, scale = torch.from_numpy(out).permute(2, 0, 1), full_scale(own)
        return image if dtype == own else image.to(torch.promote_types(dtype, torch.float32)).div_(scale).to(dtype)

    def _check_images(self) -> None:
        if not self._layout.has_images:
            raise ValueError(f"{self.store.path} has no images; its fields are {', '.join(self.fields)}")

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
        view._layout = copy.copy(self._layout)
        view._layout.values = [Value(value.spec._replace(format=""), None) for value in self._layout.values]
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
            return f"{index}{name_of(self.store, index)}"
        label = self.store.columns["label"][index].tolist()
        if label == -1:
            return f"{index}{name_of(self.store, index)}"
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
        return [*batch] if isinstance(self._layout.sample, str) else batch  # bare pictures: torch stacks lists alone

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
        return Reading(self, self._layout, self._buffers, self._checked(indices), Drawn.draws(indices))

    def parts(self, count: int) -> int:
        """Into how many parts the reading of `count` samples falls."""
        return 1 if self._layout.gathered(self.transform) is not None else max(1, -(-count // PART))

    def batches_per_read(self, batch_size: int) -> int:
        """How many batches a worker thread does well to read together.

        More than one where a batch is a single gather: handing one from thread to thread costs as much as gathering it.
        """
        column = self._layout.gathered(self.transform)
        return 1 if column is None else max(1, _GATHER_BYTES // (batch_size * math.prod(column.shape)))

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _buffers=BatchBuffers())

    def __repr__(self) -> str:
        return f"ImageDataset({self.store.path!r}, {len(self)} samples, {self.transform})"


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
