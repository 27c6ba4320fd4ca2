"""How many workers? Measured on the very dataset, on this machine, now.

`measure` runs the loader with 1, 2, ... threads for a moment each; `recommend` reads the table. `default_workers` is
what `make_loader` can afford at start: the cost of a few samples on one thread says how many threads are of use, and
how many one interpreter lock can keep busy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from .dataset import ImageDataset
from .doctor import usable_cores
from .loader import DataLoader
from .monitor import Monitor

GIL_SECONDS = 60e-6
"""Time that a decoded sample holds the interpreter lock (measured: about 50 us); threads beyond cost / this wait."""

_HEADROOM = 1.25
_LOCK_SHARE = 0.75
_QUICK_SECONDS = 0.15


class Rate(NamedTuple):
    """One row of the table: threads, samples per second, CPU use in per cent of one core."""

    workers: int
    samples_per_second: float
    cpu_percent: float


class EndlessSampler(Sampler[list[int]]):
    """Batches of shuffled indices for ever, epochs strung together: for measuring a steady state."""

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        rest: list[int] = []
        while True:
            rest += torch.randperm(self.count, generator=generator).tolist()
            whole = len(rest) // self.batch_size * self.batch_size
            for start in range(0, whole, self.batch_size):
                yield rest[start : start + self.batch_size]
            rest = rest[whole:]


def measure(
    dataset: ImageDataset, batch_size: int = 64, *, seconds: float = 2.0, workers: Sequence[int] | None = None
) -> list[Rate]:
    """Samples per second with each number of threads, after a warm-up of one batch for each thread.

    seconds: how long each is measured. workers: the numbers to try; 1 to all usable cores, in doublings, by default.
    """
    rates = []
    for count in workers or _doublings(usable_cores()):
        sampler = EndlessSampler(len(dataset), batch_size)
        loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=sampler, num_workers=count)
        batches: Any = iter(loader)
        with contextlib.closing(batches):
            for _ in range(count):
                next(batches)
            with Monitor() as monitor:
                deadline = time.perf_counter() + seconds
                for _ in monitor.watch(batches):
                    if time.perf_counter() > deadline:
                        break
        report = monitor.report()
        rates.append(Rate(count, report.samples_per_second, report.cpu_percent))
    return rates


def recommend(rates: Sequence[Rate], pace: float | None = None) -> int:
    """The fewest workers that give `pace` samples per second and a quarter more; without a pace, 95% of the best rate.

    Where no number of workers is enough: the fastest.
    """
    best = max(rate.samples_per_second for rate in rates)
    wanted = 0.95 * best if pace is None else _HEADROOM * pace
    enough = [rate.workers for rate in rates if rate.samples_per_second >= wanted]
    return min(enough) if enough else max(rates, key=lambda rate: rate.samples_per_second).workers


class Workers(NamedTuple):
    """`num_workers` and `threads_per_worker` for a loader: threads alone where the latter is None."""

    num_workers: int
    threads_per_worker: int | None


def default_workers(dataset: ImageDataset, pace: float | None = None) -> int:
    """Threads for a dataset, from the cost of a few of its samples on one thread (0.15 s at most).

    At most the cores that this rank may use: the usable ones, divided among the ranks on this node (`LOCAL_WORLD_SIZE`,
    as torchrun sets it). pace: samples per second that the consumer takes; None for as many as it gets.
    """
    cost = _sample_cost(dataset)
    return max(1, min(_wanted(cost, pace), math.ceil(cost / GIL_SECONDS)))


def default_processes(dataset: ImageDataset, pace: float | None = None) -> Workers:
    """`default_workers`, spread over processes where one interpreter lock would be held over 75% of the time."""
    cost = _sample_cost(dataset)
    wanted = _wanted(cost, pace)
    processes = math.ceil(wanted / max(1, int(_LOCK_SHARE * cost / GIL_SECONDS)))
    return Workers(wanted, None) if processes == 1 else Workers(processes, math.ceil(wanted / processes))


def _wanted(cost: float, pace: float | None) -> int:
    """How many cores would be busy with samples of `cost` seconds."""
    cores = max(1, usable_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return cores if pace is None else max(1, min(cores, math.ceil(_HEADROOM * pace * cost)))


def _sample_cost(dataset: ImageDataset) -> float:
    """Seconds for one sample on one thread: the second half of growing batches, evenly spread over the dataset."""
    started = time.perf_counter()
    for size in itertools.accumulate(itertools.repeat(2), lambda a, b: a * b, initial=4):
        step = max(1, len(dataset) // size)
        before = time.perf_counter()
        dataset.__getitems__([i * step % len(dataset) for i in range(size)])
        now = time.perf_counter()
        if now - started > _QUICK_SECONDS / 2 or size >= 4096:
            break
    return (now - before) / size


def _doublings(limit: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < limit:
        counts.append(counts[-1] * 2)
    return counts if limit == 1 else [*counts, limit]
