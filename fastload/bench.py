"""What a loader gives a consumer: no consumer, a simulated accelerator, or a small network that really trains.

The steady state is measured: batches come from an endless sampler (epochs strung together), and the clock starts when
every worker has delivered a batch. The time to the first batch is reported by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .dataset import ImageDataset
from .loader import DataLoader
from .monitor import Monitor, Report
from .prefetch import DevicePrefetcher
from .transforms import full_scale
from .tune import EndlessSampler

Consumer = Literal["none", "simulated", "network"]
Step = Callable[[Any], float | None]


@dataclass(frozen=True)
class BenchResult:
    """The monitor's report of the steady state, and the seconds from asking for the first batch to having it."""

    report: Report
    first_batch_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The figures in plain values, ready for `json.dumps`."""
        return self.report.as_dict() | {"first_batch_seconds": self.first_batch_seconds}


def bench(
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 2,
    consumer: Consumer = "none",
    step_ms: float | None = None,
    seconds: float = 5.0,
    device: torch.device | str | int | None = None,
) -> BenchResult:
    """Run the loader for `seconds` against a consumer.

    consumer: "none" takes batches as fast as they come; "simulated" is an accelerator that is busy for `step_ms` per
        batch without using the CPU; "network" trains a small convolutional network on `device` (CUDA by default where
        there is some; on the CPU it competes with the loader for cores, as it would in earnest).

    Raises:
        ValueError: a simulated consumer without a step, or a step without one.
    """
    if (consumer == "simulated") != (step_ms is not None):
        raise ValueError(f"consumer is {consumer!r}, step_ms is {step_ms}; a simulated accelerator takes a step_ms")
    if step_ms is not None and step_ms < 0:
        raise ValueError(f"step_ms is {step_ms}; a step takes 0 milliseconds or more")
    if not len(dataset):
        raise ValueError("the store is empty; there is nothing to measure")
    if consumer == "network" and (dataset.fields != ("image", "label") or dataset.targets.dtype.kind == "f"):
        raise ValueError("the network learns classes, which this store has none of; simulate a consumer with --step-ms")
    sampler = EndlessSampler(len(dataset), batch_size)
    pinned = torch.cuda.is_available()
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pinned, worker_type="thread"
    )
    batches = iter(DevicePrefetcher(loader, device))
    step = _step(consumer, step_ms, dataset)
    with contextlib.closing(batches):
        started = time.perf_counter()
        step(next(batches))
        first = time.perf_counter() - started
        for _ in range(num_workers):
            step(next(batches))
        with Monitor() as monitor:
            deadline = time.perf_counter() + seconds
            for batch in monitor.watch(batches):
                busy = step(batch)
                if busy is not None:
                    monitor.busy(busy)
                if time.perf_counter() > deadline:
                    break
    return BenchResult(monitor.report(), first)


def _step(consumer: Consumer, step_ms: float | None, dataset: ImageDataset) -> Step:
    """A function that consumes a batch and says how many seconds an accelerator was busy with it."""
    if consumer == "network":
        return _Trainer(int(dataset.targets.max(initial=0)) + 1)
    if step_ms is None:
        return lambda batch: None

    def sleep(batch: Any) -> float:
        time.sleep(step_ms / 1000)
        return step_ms / 1000

    return sleep


class _Trainer:
    """A small convolutional network and its training step, made for the first batch's device."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._model: torch.nn.Module | None = None

    def __call__(self, batch: Any) -> float:
        images, labels = batch
        started = time.perf_counter()
        if self._model is None:
            self._model = _network(self._classes, images.shape[1]).to(images.device)
            self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        logits = self._model(images.float().div_(full_scale(images.dtype)))
        loss = torch.nn.functional.cross_entropy(logits, labels.view(len(labels), -1)[:, 0].clamp_min(0))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started


def _network(classes: int, channels: int) -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(channels, 16, 7, stride=4, padding=3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
