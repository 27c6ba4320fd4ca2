"""Threads, processes, or threads in processes: images per second over the cores. Runs with `-m sweep` only."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

import fastload
import pictures
from contest import Clock, Contest, Rounds, Turn
from fastload.doctor import usable_cores
from fastload.factory import train_transform
from fastload.tune import EndlessSampler

BATCH = 64
SECONDS = 1.5
WARM_UP = 3


class _Steady:
    """A contender: batches for `SECONDS` from new workers that have warmed up. `turns` are of these seconds alone."""

    def __init__(self, dataset: fastload.ImageDataset, **workers: Any) -> None:
        self._dataset, self._workers = dataset, workers
        self.turns: list[Turn] = []

    def __call__(self) -> int:
        sampler = EndlessSampler(len(self._dataset), BATCH)
        loader: Any = fastload.DataLoader(self._dataset, batch_sampler=sampler, **self._workers)
        clock, self._labels = Clock(), []
        batches = iter(loader)
        with contextlib.closing(batches):
            self._epoch = self._dataset.epoch
            self._first, labels = next(batches)
            self._labels = labels.tolist()
            for _ in range(WARM_UP * loader.num_workers):
                self._labels += next(batches)[1].tolist()
            warm = len(self._labels)
            clock.start()
            deadline = time.perf_counter() + SECONDS
            while time.perf_counter() < deadline:
                self._labels += next(batches)[1].tolist()
            self.turns.append(clock.stop(len(self._labels) - warm))
        return len(self._labels)

    def check(self) -> None:
        """Fail unless the last turn brought every sample once in an epoch, in its order; told by labels and pixels."""
        order = list(itertools.chain.from_iterable(self._order()))
        assert len(set(order[: len(self._dataset)])) == min(len(order), len(self._dataset))
        assert self._labels == self._dataset.targets[order].tolist()
        pictures.check(self._dataset, self._epoch, order[:8], self._first[:8])

    def _order(self) -> Any:
        return itertools.islice(EndlessSampler(len(self._dataset), BATCH), len(self._labels) // BATCH)


def _counts(cores: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and all cores."""
    steps = {times << power for power in range(cores.bit_length()) for times in (1, 3)}
    return sorted({count for count in steps if count < cores} | {cores})


def _pairs(cores: int) -> list[tuple[int, int]]:
    """Processes and threads in each: those that make as many threads as cores, and the smallest."""
    whole = {(processes, cores // processes) for processes in range(1, cores + 1) if cores % processes == 0}
    return sorted(whole | {(1, 2), (2, 1), (2, 2)})


def _named(count: int, kind: str) -> str:
    plural = {"thread": "threads", "process": "processes"}[kind]
    return f"{count} {kind if count == 1 else plural}"


@pytest.mark.sweep
def bench_scaling(contest: Contest, store: Path) -> None:
    """How many random crops per second, and per CPU second, do threads give, processes, and processes of threads?

    The contenders' own rates have their workers' start in them; what counts are the measures, of the steady state.
    """
    cores = usable_cores()
    dataset = fastload.ImageDataset(store, train_transform(224))
    contenders: dict[str, _Steady] = {}
    for count in _counts(cores):
        contenders[_named(count, "thread")] = _Steady(dataset, num_workers=count, worker_type="thread")
    for count in _counts(cores):
        contenders[_named(count, "process")] = _Steady(dataset, num_workers=count, worker_type="process")
    for processes, threads in _pairs(cores):
        name = f"{_named(processes, 'process')} x {_named(threads, 'thread')}"
        contenders[name] = _Steady(dataset, num_workers=processes, threads_per_worker=threads)
    contest.run(contenders, rounds=3)
    rounds = Rounds({name: contender.turns[1:] for name, contender in contenders.items()})
    for name in contenders:
        contest.measure(f"{name}: images per second", rounds.rates(name))
        contest.measure(f"{name}: images per CPU second", [1 / cost for cost in rounds.costs(name)])
        contest.measure(f"{name}: times 1 thread", rounds.ratios(name, "1 thread"))
    for contender in contenders.values():
        contender.check()
