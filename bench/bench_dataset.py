"""The read path on one thread: what it adds to decoding, and how much of that holds the interpreter lock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

import fastload
import pictures
import rivals
from bare import BareCalls
from contest import Contest, Work
from fastload import jpeg
from fastload.factory import train_transform

BATCH = 64


class _Batches:
    """A contender: all samples of a dataset by `__getitems__`, in order, a batch at a time."""

    def __init__(self, dataset: fastload.ImageDataset) -> None:
        self.dataset = dataset
        count = len(dataset)
        self._batches = [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]

    def __call__(self) -> int:
        for indices in self._batches:
            self.last: Any = self.dataset.__getitems__(indices)
        return len(self.dataset)

    def check(self) -> None:
        pictures.check(self.dataset, self.dataset.epoch, self._batches[-1], self.last.images)


def bench_dataset(contest: Contest, images: Path, store: Path) -> None:
    """What does a sample cost on one thread, against the bare calls, one sample at a time, and Pillow?"""
    dataset = fastload.ImageDataset(store, train_transform(224))
    batches, bare = _Batches(dataset), BareCalls(dataset)
    folder = rivals.Folder(images, rivals.random_crop())
    singles: list[torch.Tensor] = []

    def one_by_one() -> int:
        for start in range(0, len(dataset), BATCH):
            stop = min(start + BATCH, len(dataset))
            singles[:] = [default_collate([dataset[index] for index in range(start, stop)])[0]]
        return len(dataset)

    def by_pillow() -> int:
        for start in range(0, len(folder), BATCH):
            default_collate([folder[index] for index in range(start, min(start + BATCH, len(folder)))])
        return len(folder)

    contenders: dict[str, Work] = {
        "fastload": batches,
        "bare calls": bare,
        "one by one": one_by_one,
        "torch": by_pillow,
    }
    rounds = contest.run(contenders, rounds=5)
    for name in ("fastload", "bare calls"):
        contest.measure(f"{name}: CPU time per sample, us", [1e6 * cost for cost in rounds.costs(name, "thread")])
    extra = [1e6 * value for value in rounds.differences("fastload", "bare calls", "thread")]
    contest.measure("CPU time per sample beside the bare calls, us", extra)
    contest.measure("share of the bare calls' rate", rounds.ratios("fastload", "bare calls"))
    contest.measure("times one by one", rounds.ratios("fastload", "one by one"))
    contest.measure("times torch", rounds.ratios("fastload", "torch"))
    batches.check()
    bare.check()
    assert torch.equal(singles[0], batches.last.images)


def bench_interpreter_lock(contest: Contest, workspace: Path) -> None:
    """How long does a sample hold the interpreter lock? Pictures of 8 x 8 pixels leave hardly anything else to do."""
    folder = workspace / "tiny" / "class"
    folder.mkdir(parents=True)
    for seed in range(640):
        (folder / f"{seed:03d}.jpg").write_bytes(jpeg.encode(pictures.photograph(seed, 8, 8), 90))
    path = workspace / "tiny.lmdb"
    fastload.pack(folder.parent, path)
    dataset = fastload.ImageDataset(path, train_transform(8))
    batches, bare = _Batches(dataset), BareCalls(dataset)
    rounds = contest.run({"fastload": batches, "bare calls": bare}, rounds=30)
    upper = [1e6 * cost for cost in rounds.costs("fastload", "thread")]
    contest.target("lock held per sample at most, us", upper, at_most=60)
    estimate = [1e6 * value for value in rounds.differences("fastload", "bare calls", "thread")]
    contest.target("lock held per sample, decode and resize calls deducted, us", estimate, at_most=60)
    batches.check()
    bare.check()
