"""What it costs to stop and to go on, and what an order costs that can be entered anywhere."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
from contest import Contest, Work
from synthetic import Free, as_it_is, samples

BATCH = 64
LARGE = 10_000_000
LARGE_BATCH = 50_000  # divides 90% of it
ORDER = 1_000_000
BLOCK = 1 << 14

_CHILD = Path(__file__).with_name("open_child.py")

Make = Callable[..., fastload.DataLoader[Any]]


def _shuffle_sampler(dataset: Free, batch_size: int = BATCH, **options: Any) -> fastload.DataLoader[Any]:
    sampler = fastload.ShuffleSampler(dataset, seed=1)
    return fastload.DataLoader(dataset, batch_size, sampler=sampler, **options)


def _random_sampler(dataset: Free, batch_size: int = BATCH, **options: Any) -> fastload.DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return fastload.DataLoader(dataset, batch_size, shuffle=True, generator=generator, **options)


def _prefetched(dataset: Free) -> fastload.DevicePrefetcher[Any]:
    return fastload.DevicePrefetcher(_shuffle_sampler(dataset, num_workers=2), "cpu")


def _stateful(dataset: Free) -> Any:
    """torchdata's loader, where it is installed."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, BATCH, shuffle=True, num_workers=2)


class _States:
    """A contender: take the state of a loader that is 10 batches into an epoch, `count` times."""

    def __init__(self, make: Callable[[Free], Any], count: int) -> None:
        self._make, self._count = make, count
        self._dataset = Free(ORDER)
        self._loader = make(self._dataset)
        self._batches: Iterator[Any] = iter(self._loader)
        for _ in range(10):
            next(self._batches)

    def __call__(self) -> int:
        for _ in range(self._count):
            self._state = self._loader.state_dict()
        return self._count

    def check(self) -> None:
        """Fail unless another loader goes on from the last state as this one does."""
        other = self._make(self._dataset)
        other.load_state_dict(self._state)
        resumed = iter(other)
        for _ in range(10):
            assert samples([next(resumed)]) == samples([next(self._batches)])


def bench_state(contest: Contest) -> None:
    """How long does state_dict() take in the middle of an epoch of a million samples?"""
    contenders = {
        "ShuffleSampler": _States(lambda dataset: _shuffle_sampler(dataset, num_workers=2), 1000),
        "RandomSampler": _States(lambda dataset: _random_sampler(dataset, num_workers=2), 1000),
        "through DevicePrefetcher": _States(_prefetched, 1000),
    }
    ours = list(contenders)
    if importlib.util.find_spec("torchdata") is not None:
        contenders["torchdata"] = _States(_stateful, 1000)
    rounds = contest.run(contenders, rounds=9)
    for name in contenders:
        microseconds = [1e6 * cost for cost in rounds.costs(name, "seconds")]
        if name in ours:
            contest.target(f"{name}: us", microseconds, at_most=50)
        else:
            contest.measure(f"{name}: us", microseconds)
    for contender in contenders.values():
        contender.check()


class _Resume:
    """A contender: load a state, if there is one, into a new loader with 2 threads, and take its first batch."""

    def __init__(self, make: Make, dataset: Free, state: Any) -> None:
        self._make, self._dataset, self._state = make, dataset, state
        self.seconds: list[float] = []

    def __call__(self) -> int:
        loader = self._make(self._dataset, num_workers=2)
        started = time.perf_counter()
        if self._state is not None:
            loader.load_state_dict(self._state)
        self.first = next(iter(loader))
        self.seconds.append(time.perf_counter() - started)
        return BATCH


@pytest.mark.parametrize("make", [_shuffle_sampler, _random_sampler], ids=["ShuffleSampler", "RandomSampler"])
def bench_resume(make: Make, contest: Contest) -> None:
    """How long does the first batch take at 90% of an epoch of 10 million samples, and how long at its start?"""
    dataset = Free(LARGE)
    loader = make(dataset, LARGE_BATCH, collate_fn=as_it_is)
    batches = iter(loader)
    wanted = {"at its start": next(batches)[:BATCH]}
    for _ in range(1, LARGE * 9 // 10 // LARGE_BATCH):
        next(batches)
    contenders = {
        "at 90%": _Resume(make, dataset, loader.state_dict()),
        "at its start": _Resume(make, dataset, None),
    }
    wanted["at 90%"] = next(batches)[:BATCH]
    contest.run(contenders, rounds=5)
    late, early = (contenders[where].seconds[1:] for where in contenders)
    contest.measure("time at 90%, of that at the start", [a / b for a, b in zip(late, early, strict=True)])
    contest.measure("ms at 90%", [1000 * seconds for seconds in late])
    contest.measure("ms at the start", [1000 * seconds for seconds in early])
    for where, contender in contenders.items():
        assert samples([contender.first]) == wanted[where], where


def _opened(kind: str, count: int) -> dict[str, Any]:
    """Seconds and megabytes to the first batch of a shuffled epoch of `count` samples, in a fresh process."""
    command = [sys.executable, str(_CHILD), kind, str(count)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def bench_opening(contest: Contest) -> None:
    """How long, and how much memory, does the first batch of a shuffled epoch take, by the number of samples?

    From the sampler to the batch, with 2 workers, after the imports of a fresh process. torch at 10^8 only where ten
    times what it took at 10^7 is below 20 s and 3 GB.
    """
    sizes = {"fastload": (8, 4, 6), "torch": (7,)}  # powers of ten
    found: dict[str, list[dict[str, Any]]] = {}

    def opening(kind: str, power: int) -> Work:
        results = found.setdefault(f"{kind}, 10^{power}", [])
        turns = itertools.count()

        def work() -> int:
            if next(turns) > 0:  # the turn that isn't timed: a fresh process has nothing to warm up
                results.append(_opened(kind, 10**power))
            return BATCH

        return work

    contest.run({f"{kind}, 10^{p}": opening(kind, p) for kind, powers in sizes.items() for p in powers}, rounds=2)
    torchs = found["torch, 10^7"]
    if 10 * max(each["seconds"] for each in torchs) < 20 and 10 * max(each["megabytes"] for each in torchs) < 3000:
        found["torch, 10^8"] = [_opened("torch", 10**8)]
    for name, results in found.items():
        seconds, megabytes = ([each[figure] for each in results] for figure in ("seconds", "megabytes"))
        if name == "fastload, 10^8":
            contest.target(f"{name}: s", seconds, at_most=0.2)
            contest.target(f"{name}: MB", megabytes, at_most=50)
        else:
            contest.measure(f"{name}: s", seconds)
            contest.measure(f"{name}: MB", megabytes)


class _Order:
    """A contender: all indices of an epoch, in the blocks in which a sampler takes them."""

    def __init__(self, **options: Any) -> None:
        self._sampler = fastload.ShuffleSampler(ORDER, **options)

    def __call__(self) -> int:
        share = self._sampler.share()
        self.blocks = [share.take(start, min(start + BLOCK, ORDER)) for start in range(0, ORDER, BLOCK)]
        return ORDER


def bench_order(contest: Contest) -> None:
    """How many nanoseconds does an index take in the shuffled order of a million, against torch.randperm?"""
    weights = np.random.default_rng(0).random(ORDER)
    weights[::2] = 0
    orders = {"whole": _Order(), "window": _Order(window=4096), "weights": _Order(weights=weights)}
    as_tensor = torch.from_numpy(weights)
    drawn: dict[str, torch.Tensor] = {}

    def randperm() -> int:
        drawn["torch.randperm"] = torch.randperm(ORDER)
        return ORDER

    def multinomial() -> int:
        drawn["torch.multinomial"] = torch.multinomial(as_tensor, ORDER, replacement=True)
        return ORDER

    rivals: dict[str, Work] = {"torch.randperm": randperm, "torch.multinomial": multinomial}
    rounds = contest.run({**orders, **rivals}, rounds=5)
    for name in rounds.turns:
        contest.measure(f"{name}: ns per index", [1e9 * cost for cost in rounds.costs(name, "seconds")])
    for name in orders:
        contest.measure(f"{name}: times as fast as torch.randperm", rounds.ratios(name, "torch.randperm"))
    contest.measure("weights: times as fast as torch.multinomial", rounds.ratios("weights", "torch.multinomial"))
    indices = {name: np.concatenate(order.blocks) for name, order in orders.items()}
    for name in ("whole", "window"):
        assert np.array_equal(np.sort(indices[name]), np.arange(ORDER))
        assert not np.array_equal(indices[name], np.arange(ORDER))
    assert torch.equal(drawn["torch.randperm"].sort().values, torch.arange(ORDER))
    for found in (indices["weights"], drawn["torch.multinomial"].numpy()):
        assert len(found) == ORDER
        assert weights[found].min() > 0
        assert weights[found].mean() == pytest.approx((weights**2).sum() / weights.sum(), rel=0.01)
