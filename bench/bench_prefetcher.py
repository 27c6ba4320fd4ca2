"""From the loader to the model: batches prepared in a thread of their own, against a plain loop that prepares them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from contest import Contest
from fastload.factory import train_transform
from fastload.transforms import normalize
from fastload.tune import EndlessSampler

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bench_prefetcher(contest: Contest, store: Path) -> None:
    """How busy is an accelerator that needs 80% of what loader and normalising give, done ahead or in turn?"""
    dataset = fastload.ImageDataset(store, train_transform(224))
    sampler = EndlessSampler(len(dataset), BATCH)
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    prefetcher = fastload.DevicePrefetcher(loader, "cpu", mean=MEAN, std=STD)
    paces: list[float] = []
    busy: dict[str, list[float]] = {"prefetcher": [], "plain loop": []}
    last: dict[str, torch.Tensor] = {}

    def plain() -> Iterable[Any]:
        batches = iter(loader)
        with contextlib.closing(batches):
            for images, labels in batches:
                yield normalize(images, MEAN, STD), labels

    def consume(name: str, batches: Callable[[], Any], step: Callable[[], float]) -> int:
        seconds, count = step(), 20
        iterator = iter(batches())
        with contextlib.closing(iterator):
            for _ in range(3):
                next(iterator)
            started = time.perf_counter()
            for _ in range(count):
                last[name], _ = next(iterator)
                time.sleep(seconds)
            taken = time.perf_counter() - started
        if seconds:
            busy[name].append(count * seconds / taken)
        else:
            paces.append(taken / count)
        return count * BATCH

    contest.run(
        {
            "prefetcher": lambda: consume("prefetcher", lambda: prefetcher, lambda: paces[-1] / 0.8),
            "prefetcher alone": lambda: consume("alone", lambda: prefetcher, lambda: 0.0),
            "plain loop": lambda: consume("plain loop", plain, lambda: paces[-1] / 0.8),
        },
        rounds=4,
    )
    contest.measure("accelerator busy with the prefetcher", busy["prefetcher"][1:])
    contest.measure("accelerator busy with a plain loop", busy["plain loop"][1:])
    images, _ = next(iter(loader))
    wanted = _by_hand(images)
    got, _ = next(_repeated(dataset))
    assert last["prefetcher"].shape == last["plain loop"].shape == wanted.shape
    assert (got - wanted).abs().max() < 1e-5


def _repeated(dataset: fastload.ImageDataset) -> Any:
    """Prefetched batches of the epoch that the dataset is at, in the order of a new endless sampler."""
    sampler = EndlessSampler(len(dataset), BATCH)
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    return iter(fastload.DevicePrefetcher(loader, "cpu", mean=MEAN, std=STD))


def bench_normalize(contest: Contest, store: Path) -> None:
    """What does it cost to normalise a batch on the CPU, against the usual chain of operations?"""
    dataset = fastload.ImageDataset(store, train_transform(224))
    batch: Any = dataset.__getitems__(list(range(min(BATCH, len(dataset)))))
    images = batch.images
    out: dict[str, torch.Tensor] = {}

    def ours() -> int:
        for _ in range(10):
            out["fastload"] = normalize(images, MEAN, STD)
        return 10 * len(images)

    def chain() -> int:
        for _ in range(10):
            out["chain"] = _by_hand(images)
        return 10 * len(images)

    rounds = contest.run({"fastload": ours, "float, div, sub, div": chain}, rounds=9)
    contest.measure("times the chain", rounds.ratios("fastload", "float, div, sub, div"))
    contest.measure("ms per batch", [1000 * BATCH * cost for cost in rounds.costs("fastload", "seconds")])
    assert (out["fastload"] - out["chain"]).abs().max() < 1e-5


def _by_hand(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return images.float().div_(255).sub_(mean).div_(std)


@pytest.mark.gpu
def bench_copy_overlap(contest: Contest) -> None:
    """How much of the copies to a GPU, and of normalising there, hides behind a model's work?"""
    batches = [torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8).pin_memory() for _ in range(8)] * 8
    prefetcher = fastload.DevicePrefetcher(batches, "cuda", mean=MEAN, std=STD)
    weights = torch.randn(4096, 4096, device="cuda")
    out: dict[str, torch.Tensor] = {}

    def work() -> None:
        for _ in range(4):
            torch.mm(weights, weights)

    def overlapped() -> int:
        for out["prefetcher"] in prefetcher:
            work()
        torch.cuda.synchronize()
        return len(batches) * BATCH

    def in_turn() -> int:
        for images in batches:
            out["plain loop"] = normalize(images.to("cuda"), MEAN, STD)
            work()
        torch.cuda.synchronize()
        return len(batches) * BATCH

    def work_alone() -> int:
        for _ in batches:
            work()
        torch.cuda.synchronize()
        return len(batches) * BATCH

    rounds = contest.run({"prefetcher": overlapped, "plain loop": in_turn, "work alone": work_alone})
    contest.measure("accelerator busy with the prefetcher", rounds.ratios("prefetcher", "work alone"))
    contest.measure("accelerator busy with a plain loop", rounds.ratios("plain loop", "work alone"))
    assert torch.allclose(out["prefetcher"], out["plain loop"])
    assert torch.allclose(out["prefetcher"].cpu(), _by_hand(batches[-1]), atol=1e-4)
