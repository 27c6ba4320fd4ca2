"""A batch of samples: what `ImageDataset.__getitems__` returns, and how it becomes tensors.

`collate` takes samples of one size. For others there are `collate.as_list`, which leaves them apart, and `collate.pad`,
which makes them equal. All three keep the samples' structure, and take a `Batch` or a list of any dataset's samples.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, overload

import numpy as np
import torch
from torch.utils.data import default_collate

from .buffers import BatchBuffers
from .fields import Node, build
from .workers import context

Column = torch.Tensor | list[Any]
"""One value for each sample of a batch: a tensor whose first dimension counts samples, or a list."""

Shape = tuple[int, ...]


class Batch(Sequence[Any]):
    """The samples of a batch: item i is (picture, label), or what its store says. Samples are made when asked for.

    columns: the pictures, a uint8 (or normalised) tensor (n, 3, height, width), or a list where they don't stack; then
    what goes with them: labels, an int64 tensor (n,) or (n, labels); masks, (n, height, width); lists of what a target
    transform returned; bools that say which samples are valid. names: of the columns, where a sample is a dict. tree:
    of these names, where it is more than that (see `fields`).
    """

    def __init__(self, *columns: Column, names: Sequence[str] | None = None, tree: Node | None = None) -> None:
        self.columns, self.names, self.tree = columns, names, tree

    @property
    def images(self) -> Column:
        """The pictures."""
        return self.columns[0]

    @property
    def labels(self) -> Column:
        """What goes with them: the second column."""
        return self.columns[1]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._sample(column[index].item() if _are_labels(column) else column[index] for column in self.columns)

    def __iter__(self) -> Iterator[Any]:
        columns = (c.tolist() if _are_labels(c) else c for c in self.columns)
        samples = zip(*columns, strict=True)
        return samples if self.names is None else map(self._sample, samples)

    def _sample(self, values: Iterable[Any]) -> Any:
        if self.names is None:
            return tuple(values)
        named = dict(zip(self.names, values, strict=True))
        return named if self.tree is None else build(self.tree, named)

    def split(self, lengths: list[int]) -> list[Batch]:
        """Consecutive batches of these lengths, which share this one's memory."""
        ends = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        return [Batch(*(c[a:b] for c in self.columns), names=self.names, tree=self.tree) for a, b in ends]


def _are_labels(column: Column) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of whole numbers or truths: a sample has an int or a bool."""
    return isinstance(column, torch.Tensor) and column.dim() == 1 and not column.is_floating_point()


def as_list(samples: Sequence[Any]) -> Any:
    """Samples of any sizes, as detection models take them: pictures and masks stay lists of tensors.

    Numbers become one tensor. Whatever else a sample has (tensors, dicts, texts) is a list with a value for each.
    Of a `Batch`, labels that are a tensor stay one.

    Returns:
        [images, labels] where a sample is a tuple; a dict of such where it is a dict.

    Example:
        >>> loader = fastload.DataLoader(dataset, batch_size=8, collate_fn=fastload.collate.as_list)
    """
    if isinstance(samples, Batch) and samples.tree is not None:
        samples = list(samples)  # dicts within them stay what they are
    return _mapped(samples, lambda values, _: _listed(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad:
    """A collate function that pads samples of different sizes to the largest of their batch.

    - Pictures, tensors (channels, height, width), at the right and lower edges, with `value`. They are copied once,
      into one tensor, channels-last where they are. A `Batch`'s tensor that needs no padding is handed on. Arrays are
      pictures where they are (height, width, channels).
    - What is as high and wide as its sample's picture, in the same way: masks, whole numbers (height, width), with
      `mask_value` (`instances` in a dict with 0); others with `value`.
    - Other tensors and arrays at the end of their first dimension, with `value`: sequences, boxes.
    - All else as in torch's default_collate.

    Give it to a loader as it is, or call it with options first, which makes another one.

    multiple_of: round the height and width of pictures up to a multiple of it, 32 say for networks with strides.
    value: in the pixels' own units, whatever `Normalize` has made of them: 0 is then the mean.
    mask_value: what losses ignore; `dataset.store.masks` tells it where there are more than 255 classes.
    sizes: put what was there before behind the rest: int64 (n, 2), the pictures' heights and widths; without pictures
        (n,), the sequences' lengths. In a dict it is called "sizes".

    Raises:
        ValueError: multiple_of is no int of at least 1.
        RuntimeError: pictures have different channels, sequences differ in more than their length, or a value doesn't
            fit into the tensors' type.

    Example:
        >>> collate_fn = fastload.collate.pad  # or, with options:
        >>> collate_fn = fastload.collate.pad(multiple_of=32, sizes=True)
        >>> for images, labels, sizes in fastload.DataLoader(dataset, batch_size=8, collate_fn=collate_fn):
        ...     shown = torch.arange(images.shape[3]) < sizes[:, 1, None]  # columns of pixels that are no padding
    """

    multiple_of: int = 1
    value: float = 0
    mask_value: int = 255
    sizes: bool = False

    def __post_init__(self) -> None:
        if type(self.multiple_of) is not int or self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of!r}; it has to be an int from 1")

    @overload
    def __call__(
        self, *, multiple_of: int = ..., value: float = ..., mask_value: int = ..., sizes: bool = ...
    ) -> Pad: ...

    @overload
    def __call__(self, samples: Sequence[Any], **options: Any) -> Any: ...

    def __call__(self, samples: Sequence[Any] | None = None, **options: Any) -> Any:
        """The padded batch; without samples a `Pad` with these options."""
        pad = dataclasses.replace(self, **options)
        return pad if samples is None else pad._collated(samples)

    def _collated(self, samples: Sequence[Any]) -> Any:
        shapes = [_shapes(tensors) for tensors in map(_tensors, _leaves(samples)) if tensors is not None]
        pictures = next(([s[1:] for s in column] for column in shapes if {*map(len, column)} == {3}), None)

        def padded(values: Column, name: str) -> Any:
            return _mapped(values, padded, name) if _is_nested(values) else self._padded(values, name, pictures)

        batch = _mapped(samples, padded)
        if not self.sizes:
            return batch
        lengths = next(([s[0] for s in column] for column in shapes if all(column)), None)
        if pictures is None and lengths is None:
            raise ValueError("sizes is True, and the samples have neither pictures nor sequences; leave it out")
        sizes = torch.tensor(lengths if pictures is None else pictures)
        if isinstance(batch, dict):
            return batch | {"sizes": sizes}
        return [*(batch if isinstance(batch, (list, tuple)) else [batch]), sizes]

    def _padded(self, values: Column, name: str, pictures: list[Shape] | None) -> Any:
        """One column. pictures: the heights and widths of the samples' pictures."""
        tensors = _tensors(values)
        if tensors is None:
            return list(values) if isinstance(values[0], (Mapping, tuple, list)) else default_collate(list(values))
        shapes = _shapes(tensors)
        as_pictures = [s[-2:] for s in shapes] == pictures
        if len({(len(s), s[:-2] if as_pictures else s[1:]) for s in shapes}) > 1:
            raise RuntimeError(
                f"{name or 'the values'} of a batch have shapes that padding can't make equal, "
                f"{' and '.join(map(str, sorted(set(shapes))[:2]))} among them; pictures may differ in height and "
                "width, other tensors in their first dimension: fastload.collate.as_list takes any"
            )
        whole = [max(sides) for sides in zip(*shapes, strict=True)]
        if as_pictures:
            whole[-2:] = [-(-side // self.multiple_of) * self.multiple_of for side in whole[-2:]]
        batch = _filled(tensors, shapes, tuple(whole), self._fill(tensors[0], name) if as_pictures else self.value)
        return batch.permute(0, 2, 3, 1) if batch.dim() == 4 and isinstance(values[0], np.ndarray) else batch

    def _fill(self, value: torch.Tensor, name: str) -> float:
        """What goes around a value that is as high and wide as its picture."""
        if value.dim() != 2 or value.is_floating_point() or value.dtype == torch.bool:
            return self.value
        return 0 if name == "instances" else self.mask_value


def _filled(tensors: Sequence[torch.Tensor] | torch.Tensor, shapes: list[Shape], whole: Shape, fill: float) -> Any:
    """Tensors of these shapes in one (n, *whole), each at its beginning, with `fill` behind it."""
    if isinstance(tensors, torch.Tensor) and all(shape == whole for shape in shapes):
        return tensors
    first = tensors[0]
    channels_last = first.dim() == 3 and first.stride(0) < first.stride(2)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    batch = _empty((len(shapes), *(whole[1:] + whole[:1] if channels_last else whole)), dtype, first.device)
    if channels_last:
        batch = batch.permute(0, 3, 1, 2)
    value = torch.tensor(fill, dtype=dtype).item()  # an error where the type can't hold it
    outs, values = _arrays(batch, tensors)
    for number, shape in enumerate(shapes):
        place = (number, *map(slice, shape))
        outs[place] = values[number]
        for side, (length, full) in enumerate(zip(shape, whole, strict=True), 1):
            if length < full:
                behind = (*place[:side], slice(length, full))
                outs[behind] = value
    return batch


def _arrays(batch: torch.Tensor, tensors: Sequence[torch.Tensor] | torch.Tensor) -> tuple[Any, Any]:
    """The same as NumPy's arrays where that can be: torch would copy with all cores, and each worker would wait."""
    if batch.device.type != "cpu" or batch.dtype == torch.bfloat16 or any(tensor.requires_grad for tensor in tensors):
        return batch, tensors
    return batch.numpy(), [tensor.numpy() for tensor in tensors]


def _empty(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory where the batch is to be: what a worker process makes is shared with the consumer."""
    nbytes = math.prod(shape) * dtype.itemsize
    if context.memory == "own" or nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    memory, _ = BatchBuffers().take((nbytes,), context.memory)
    return memory.view(dtype).view(shape)


class _Collate:
    """torch's default_collate, except that a `Batch` is not copied: its tensors are handed on, [images, labels] say.

    as_list, pad, bucket: collate functions for samples of different sizes. `bucket` is `pad`, under the name of what it
    is for: the batches of a `BucketSampler`, where little is left to be padded.

    Raises:
        RuntimeError: the pictures have different sizes, as in torch.
    """

    __name__ = "collate"
    as_list = staticmethod(as_list)
    pad = Pad()
    bucket = pad

    def __call__(self, samples: Any) -> Any:
        """The batch of these samples."""
        if not isinstance(samples, Batch):
            return default_collate(samples)
        return _mapped(samples, _stacked)

    def __reduce__(self) -> str:
        return "collate"  # there is one


collate = _Collate()


def _mapped(samples: Any, of: Callable[[Column, str], Any], name: str = "") -> Any:
    """Each column of samples by of(column, name), in the samples' structure. name: the innermost dict's key."""
    if isinstance(samples, Batch):
        if samples.names is not None:
            named = {key: of(column, key) for key, column in zip(samples.names, samples.columns, strict=True)}
            return named if samples.tree is None else build(samples.tree, named, tuples=list)
        return [of(column, name) for column in samples.columns]
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: of([sample[key] for sample in samples], key) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [of(list(column), name) for column in zip(*samples, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else columns
    return of(samples, name)


def _leaves(samples: Any) -> list[Column]:
    """The columns, those of nested samples too."""
    found: list[Column] = []

    def note(values: Column, name: str) -> None:
        if _is_nested(values):
            _mapped(values, note, name)
        else:
            found.append(values)

    _mapped(samples, note)
    return found


def _is_nested(values: Column) -> bool:
    """Whether these are containers of one structure."""
    if not isinstance(values, list) or not isinstance(values[0], (Mapping, tuple, list)):
        return False
    return all(type(value) is type(values[0]) and len(value) == len(values[0]) for value in values)


def _tensors(values: Column) -> Sequence[torch.Tensor] | torch.Tensor | None:
    """Tensors and arrays as tensors, of arrays (height, width, channels) the channels first; None for all else."""
    if isinstance(values, torch.Tensor) or all(isinstance(value, torch.Tensor) for value in values):
        return values
    if not all(isinstance(value, np.ndarray) for value in values):
        return None
    tensors = [torch.as_tensor(value) for value in values]
    return [tensor.permute(2, 0, 1) if tensor.dim() == 3 else tensor for tensor in tensors]


def _shapes(tensors: Sequence[torch.Tensor] | torch.Tensor) -> list[Shape]:
    if isinstance(tensors, torch.Tensor):
        return [tuple(tensors.shape[1:])] * len(tensors)
    return [tuple(tensor.shape) for tensor in tensors]


def _listed(values: Column) -> Any:
    if isinstance(values, torch.Tensor):
        return values if values.dim() < 3 else list(values)
    if all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in values):
        return torch.stack(values)
    if all(isinstance(value, (int, float, np.number, np.bool_)) for value in values):
        return default_collate(values)
    return list(values)


def _stacked(column: Column, name: str) -> Any:
    if isinstance(column, torch.Tensor):
        return column
    shapes = {tuple(value.shape) for value in column if hasattr(value, "shape")}
    if len(shapes) > 1:
        what, cure = f"values of {name!r}", ""
        if name in ("", "image"):
            what = "pictures"
            cure = "give the dataset a transform that makes them equal, RandomResizedCrop(224) say, or "
        raise RuntimeError(
            f"the batch's {what} have different shapes, {' and '.join(map(str, sorted(shapes)[:2]))} among them; "
            f"{cure}pass a collate_fn: fastload.collate.pad or fastload.collate.as_list"
        )
    if type(column[0]).__module__.startswith("PIL."):
        raise TypeError(
            "the pictures are Pillow's, which make no batch; give the dataset image_type='tensor', or a transform that "
            "makes tensors of them"
        )
    if any(value is None for value in column):
        return list(column)  # JSON's null, or what stands for a damaged sample
    values: Any = tuple(column)  # as torch's own collate hands them on: texts stay a tuple
    return default_collate(values)
