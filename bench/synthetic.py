"""Datasets without data, for what a loader costs by itself. Their samples are their own indices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import Dataset


class Free(Dataset[int]):
    """`count` samples that cost nothing, a batch at a time."""

    thread_safe = True

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


class Slow(Free):
    """A batch takes from 0.5 to 1.5 ms, by its first index, and no core: as from a disk.

    Batches that all took the same time would come out of two workers in pairs.
    """

    def __getitems__(self, indices: list[int]) -> list[int]:
        time.sleep(0.0005 + 0.001 * (indices[0] * 2654435761 % 2**32) / 2**32)
        return indices


def as_it_is(batch: Any) -> Any:
    """A collate function that leaves a batch a list."""
    return batch


def samples(batches: Iterable[Any]) -> list[int]:
    """All samples of batches, collated or not."""
    return [sample for batch in batches for sample in torch.as_tensor(batch).tolist()]
