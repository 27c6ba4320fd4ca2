"""Whole epochs of a loader as a contender, and the check of what came out of the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

import fastload
from rivals import RememberedOrder


class Epochs:
    """A contender: run a loader to its end, `count` times. What came last is kept for a check.

    before: called first, such as to choose the epoch again whose crops another contender has.
    """

    def __init__(self, loader: DataLoader[Any], count: int = 1, before: Callable[[], None] | None = None) -> None:
        self._loader, self._count, self._before = loader, count, before

    def __call__(self) -> int:
        if self._before is not None:
            self._before()
        samples = 0
        for _ in range(self._count):
            if self._loader.generator is not None:
                self._state = self._loader.generator.get_state()
            self._labels: list[torch.Tensor] = []
            for images, labels in self._loader:
                if not self._labels:
                    self.images: torch.Tensor = images
                self._labels.append(labels)
                samples += len(labels)
        return samples

    @property
    def first_labels(self) -> torch.Tensor:
        """What came with `images`, the first batch of the last epoch."""
        return self._labels[0]

    def order(self) -> list[int]:
        """The last epoch's order of samples."""
        if isinstance(self._loader.sampler, RememberedOrder):
            return self._loader.sampler.order
        generator = torch.Generator()
        generator.set_state(self._state)
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # each iterator of a loader draws a seed first
        return torch.randperm(len(self._loader.dataset), generator=generator).tolist()  # type: ignore[arg-type]

    def check_labels(self, targets: npt.NDArray[np.int64]) -> None:
        """Fail unless the last epoch brought every sample once, in its order, told by the labels."""
        assert torch.cat(self._labels).tolist() == targets[self.order()].tolist()


def fast_loader(dataset: fastload.ImageDataset, batch_size: int = 64, num_workers: int = 2) -> fastload.DataLoader[Any]:
    """fastload's loader as a training script makes it, with a generator, so that its order can be known."""
    generator = torch.Generator().manual_seed(0)
    return fastload.DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers, generator=generator)
