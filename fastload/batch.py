"""A batch of samples: what `ImageDataset.__getitems__` returns, and how it becomes tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate


class Batch(Sequence[tuple[Any, Any]]):
    """The samples of a batch: item i is (picture, label). Samples are made when they are asked for.

    images: a uint8 (or normalised) tensor (n, 3, height, width), or a list of pictures where they don't stack.
    labels: int64 tensor (n,) or (n, labels), or a list of what a target transform returned.
    """

    def __init__(self, images: torch.Tensor | list[Any], labels: torch.Tensor | list[Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        label = self.labels[index]
        if isinstance(label, torch.Tensor) and label.dim() == 0:
            label = int(label)
        return self.images[index], label

    def split(self, lengths: list[int]) -> list[Batch]:
        """Consecutive batches of these lengths, which share this one's memory."""
        ends = list(itertools.accumulate(lengths, initial=0))
        return [Batch(self.images[a:b], self.labels[a:b]) for a, b in itertools.pairwise(ends)]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        labels = (
            self.labels.tolist() if isinstance(self.labels, torch.Tensor) and self.labels.dim() == 1 else self.labels
        )
        return zip(self.images, labels, strict=True)


def collate(samples: Any) -> Any:
    """torch's default_collate, except that a `Batch` is not copied: its tensors are handed on as [images, labels].

    Raises:
        RuntimeError: the pictures have different sizes, as in torch.
    """
    if not isinstance(samples, Batch):
        return default_collate(samples)
    images, labels = samples.images, samples.labels
    if not isinstance(images, torch.Tensor):
        shapes = {tuple(image.shape) for image in images if hasattr(image, "shape")}
        if len(shapes) > 1:
            raise RuntimeError(
                f"the batch's pictures have different shapes, {' and '.join(map(str, sorted(shapes)[:2]))} among them; "
                "give the dataset a transform that makes them equal, RandomResizedCrop(224) say, or pass a collate_fn"
            )
        images = default_collate(images)
    if not isinstance(labels, torch.Tensor):
        columns: Any = tuple(labels)  # as torch's own collate hands them on: texts stay a tuple
        labels = default_collate(columns)
    return [images, labels]
