"""Map-style datasets whose samples are their own indices, for tests of what goes on around a dataset."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class Numbers(Dataset[int]):
    """Sample i is i, safe under threads; one of them fails, always, if `bad` says so."""

    thread_safe = True

    def __init__(self, length: int = 23, bad: int | None = None) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise OSError("a bad sample")
        return index


class Counted(Numbers):
    """Numbers whose `reads` count, in all processes, how often each was read."""

    def __init__(self, length: int = 23, bad: int | None = None) -> None:
        super().__init__(length, bad)
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        return super().__getitem__(index)


class Epochs(Counted):
    """Counted numbers with an epoch, one for all processes."""

    def __init__(self, length: int = 23, bad: int | None = None) -> None:
        super().__init__(length, bad)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch
