"""What the loader itself costs: per batch, to its first batch, and from one epoch to the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import fastload
import pictures
import rivals
from contest import Contest
from fastload.factory import train_transform
from synthetic import Free, Slow, as_it_is, samples

BATCH = 16
IMAGES, IMAGE_BATCH = 128, 8


class _Through:
    """A contender: run a loader to its end."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __call__(self) -> int:
        batches = 0
        for _ in self._loader:
            batches += 1
        return batches * BATCH

    def check(self) -> None:
        """Fail unless every sample comes once, in order, in an epoch like those that were timed."""
        assert samples(self._loader) == list(range(len(self._loader.dataset)))  # type: ignore[arg-type]


@pytest.mark.parametrize("collate", [default_collate, as_it_is], ids=["default_collate", "no_collate"])
def bench_overhead(collate: Callable[[Any], Any], contest: Contest) -> None:
    """How long does a batch of 16 samples take that cost nothing, with 2 persistent workers?"""
    long, shorter, short = (Free(BATCH * batches) for batches in (5000, 2000, 500))
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "collate_fn": collate}
    loaders: dict[str, DataLoader[Any]] = {
        "fastload": fastload.DataLoader(long, BATCH, **options),
        "torch": DataLoader(shorter, BATCH, **options),
        "fastload, processes": fastload.DataLoader(short, BATCH, worker_type="process", **options),
        "fastload, processes of 2 threads": fastload.DataLoader(short, BATCH, threads_per_worker=2, **options),
    }
    contenders = {name: _Through(loader) for name, loader in loaders.items()}
    rounds = contest.run(contenders, rounds=5)
    ours, theirs = rounds.costs("fastload", "seconds"), rounds.costs("torch", "seconds")
    contest.target("time per batch, of torch's", [a / b for a, b in zip(ours, theirs, strict=True)], at_most=1 / 3)
    for name in contenders:
        contest.measure(f"{name}: us per batch", [1e6 * BATCH * cost for cost in rounds.costs(name, "seconds")])
        contest.measure(f"{name}: CPU us per batch", [1e6 * BATCH * cost for cost in rounds.costs(name)])
    for contender in contenders.values():
        contender.check()


def bench_first(contest: Contest) -> None:
    """How long does a loader with 2 workers take from its construction to its first batch, in a warm process?"""
    dataset = Free(BATCH * 1000)
    took: dict[str, list[float]] = {"fastload": [], "torch": []}
    first: dict[str, Any] = {}

    def start(kind: str, loader_type: Callable[..., DataLoader[Any]]) -> int:
        started = time.perf_counter()
        first[kind] = next(iter(loader_type(dataset, BATCH, num_workers=2)))
        took[kind].append(1000 * (time.perf_counter() - started))
        return BATCH

    contest.run(
        {
            "fastload": lambda: start("fastload", fastload.DataLoader),
            "torch": lambda: start("torch", DataLoader),
        },
        rounds=15,
    )
    contest.target("from construction to the first batch, ms", took["fastload"][1:], at_most=20)
    contest.measure("torch: from construction to the first batch, ms", took["torch"][1:])
    for batch in first.values():
        assert samples([batch]) == list(range(BATCH))


class _Gaps:
    """A contender: some epochs of a loader with persistent workers, the arrivals of whose batches are noted.

    An ordinary gap is the mean over a turn: 2 workers may well deliver in pairs. ratios: one for each end of an epoch.
    """

    def __init__(self, loader: DataLoader[Any], epochs: int) -> None:
        self._loader, self._epochs = loader, epochs
        self._count: int = len(loader.dataset)  # type: ignore[arg-type]
        self.ordinary: list[float] = []
        self.between: list[float] = []
        self.ratios: list[float] = []

    def __call__(self) -> int:
        ordinary, between, before = [], [], None
        for _ in range(self._epochs):
            gaps = between
            for _ in self._loader:
                now = time.perf_counter()
                if before is not None:
                    gaps.append(now - before)
                before, gaps = now, ordinary
        self.ordinary.append(1000 * mean(ordinary))
        self.between.append(1000 * median(between))
        self.ratios.append(median(between) / mean(ordinary))
        return self._epochs * self._count

    def next_epoch(self) -> tuple[list[Any], list[int]]:
        """The batches of one more epoch, and the order that its generator has it in."""
        generator = torch.Generator()
        assert self._loader.generator is not None
        generator.set_state(self._loader.generator.get_state())
        return list(self._loader), torch.randperm(self._count, generator=generator).tolist()


def _with_gaps(loader_type: Callable[..., DataLoader[Any]], dataset: Any, batch_size: int, epochs: int) -> _Gaps:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "generator": generator}
    return _Gaps(loader_type(dataset, batch_size, shuffle=True, **options), epochs)


def _run(contest: Contest, contenders: dict[str, _Gaps], rounds: int, at_most: float | None) -> None:
    contest.run(contenders, rounds)
    for name, gaps in contenders.items():
        if name == "fastload" and at_most is not None:
            contest.target("gap between epochs, times the ordinary", gaps.ratios[1:], at_most=at_most)
        else:
            contest.measure(f"{name}: gap between epochs, times the ordinary", gaps.ratios[1:])
        contest.measure(f"{name}: gap between epochs, ms", gaps.between[1:])
        contest.measure(f"{name}: ordinary gap, ms", gaps.ordinary[1:])


@pytest.mark.parametrize(
    ("dataset", "at_most"),
    [(Slow(BATCH * 60), 1.5), (Slow(BATCH * 61), 1.5), (Free(BATCH * 100), None)],
    ids=["1_ms-even", "1_ms-odd", "free"],
)
def bench_gap(dataset: Free, at_most: float | None, contest: Contest) -> None:
    """How long does the first batch of a shuffled epoch come after the last one before, with 2 persistent workers?

    Workers take turns, and each epoch begins with the first: after an odd number of batches it has two in a row.
    """
    loaders = {"fastload": fastload.DataLoader, "torch": DataLoader}
    contenders = {name: _with_gaps(loader, dataset, BATCH, epochs=12) for name, loader in loaders.items()}
    _run(contest, contenders, 4, at_most)
    for gaps in contenders.values():
        batches, order = gaps.next_epoch()
        assert samples(batches) == order


def bench_gap_images(contest: Contest, images: Path, workspace: Path) -> None:
    """The same for random crops of 128 of the images, in batches of 8."""
    folder = _some(images, workspace / "gap")
    path = workspace / "gap.lmdb"
    fastload.pack(folder, path)
    dataset = fastload.ImageDataset(path, train_transform(224))
    ours = _with_gaps(fastload.DataLoader, dataset, IMAGE_BATCH, epochs=5)
    theirs = _with_gaps(DataLoader, rivals.Folder(folder, rivals.random_crop()), IMAGE_BATCH, epochs=3)
    _run(contest, {"fastload": ours, "torch": theirs}, 4, at_most=1.5)
    for gaps in (ours, theirs):
        batches, order = gaps.next_epoch()
        assert torch.cat([labels for _, labels in batches]).tolist() == dataset.targets[order].tolist()
        if gaps is ours:
            pictures.check(dataset, dataset.epoch, order[:IMAGE_BATCH], batches[0][0])


def _some(images: Path, folder: Path) -> Path:
    """A folder with `IMAGES` of the images, in their class folders."""
    files = pictures.files(images)
    for number in np.linspace(0, len(files) - 1, IMAGES).astype(int).tolist():
        target = folder / files[number].relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[number], target)
    return folder
