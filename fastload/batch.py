"""A batch of samples: what `ImageDataset.__getitems__` returns, and how it becomes tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

Column = torch.Tensor | list[Any]
"""One value for each sample of a batch: a tensor whose first dimension counts samples, or a list."""


class Batch(Sequence[Any]):
    """The samples of a batch: item i is (picture, label), or what its store says. Samples are made when asked for.

    columns: the pictures, a uint8 (or normalised) tensor (n, 3, height, width), or a list where they don't stack; then
    what goes with them: labels, an int64 tensor (n,) or (n, labels); masks, (n, height, width); lists of what a target
    transform returned. names: of the columns, where a sample is a dict.
    """

    def __init__(self, *columns: Column, names: Sequence[str] | None = None) -> None:
        self.columns, self.names = columns, names

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
        return self._sample(
            value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
            for value in (column[index] for column in self.columns)
        )

    def __iter__(self) -> Iterator[Any]:
        columns = (c.tolist() if isinstance(c, torch.Tensor) and c.dim() == 1 else c for c in self.columns)
        samples = zip(*columns, strict=True)
        return samples if self.names is None else map(self._sample, samples)

    def _sample(self, values: Iterable[Any]) -> Any:
        return tuple(values) if self.names is None else dict(zip(self.names, values, strict=True))

    def split(self, lengths: list[int]) -> list[Batch]:
        """Consecutive batches of these lengths, which share this one's memory."""
        ends = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        return [Batch(*(column[a:b] for column in self.columns), names=self.names) for a, b in ends]


def collate(samples: Any) -> Any:
    """torch's default_collate, except that a `Batch` is not copied: its tensors are handed on, [images, labels] say.

    Raises:
        RuntimeError: the pictures have different sizes, as in torch.
    """
    if not isinstance(samples, Batch):
        return default_collate(samples)
    columns = [_stacked(column) for column in samples.columns]
    return columns if samples.names is None else dict(zip(samples.names, columns, strict=True))


def _stacked(column: Column) -> Any:
    if isinstance(column, torch.Tensor):
        return column
    shapes = {tuple(value.shape) for value in column if hasattr(value, "shape")}
    if len(shapes) > 1:
        raise RuntimeError(
            f"the batch's pictures have different shapes, {' and '.join(map(str, sorted(shapes)[:2]))} among them; "
            "give the dataset a transform that makes them equal, RandomResizedCrop(224) say, or pass a collate_fn"
        )
    values: Any = tuple(column)  # as torch's own collate hands them on: texts stay a tuple
    return default_collate(values)
