"""Thread workers: they start in a millisecond, share one cache and one store, and see the dataset itself, not a copy.

Each batch of an `ImageDataset` is read by all threads together, eight samples at a time, into one buffer, which is what
comes out. Batches of other datasets go to the threads in turn, as torch's loader gives them to its processes, each as
one piece of work. An iterable dataset is copied for each thread.

Threads run in parallel as far as the dataset's work releases the interpreter lock, as decoding and resizing do. The
generators that belong to the process (`random`, `numpy.random`, torch's default) are not seeded for them: which thread
draws when is chance. `get_worker_info()` has a seed for each thread, and in newer versions of torch generators.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, IterDataPipe, MapDataPipe
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _sharding_worker_init_fn

from .batch import collate
from .iterators import PassIterator
from .orders import reads_whole_batches
from .passes import Pass
from .reading import Reader, shortened
from .worker_info import set_worker_info
from .workers import Crew, Job, Task, forget_finished, wait_for_any


class ThreadIterator(PassIterator):
    """One pass over a loader with thread workers, or one after another where they are persistent.

    Dropping it stops the threads: they know only their work, never the iterator.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._in_order, self._init_fn = loader.in_order, loader.worker_init_fn
        if isinstance(self._dataset, IterDataPipe | MapDataPipe):
            self._init_fn = functools.partial(_sharding_worker_init_fn, self._init_fn, self._world_size, self._rank)
        pin = functools.partial(pin_memory, device=self._pin_memory_device) if self._pin_memory else None
        self._reader = Reader(
            self._dataset, self._auto_collation, self._collate_fn, self._drop_last, finish=pin, pinned=self._pin_memory
        )
        self._batches_per_read = min(_batches_per_read(loader), loader.prefetch_factor)
        self._under_way = max(1, loader.prefetch_factor * self._num_workers // self._batches_per_read)
        self._done: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
        self._waiting: collections.deque[_Batches] = collections.deque()
        self._ready: collections.deque[tuple[int, int, Any]] = collections.deque()
        self._ahead: Pass | None = None
        self._crew: Crew | None = None
        self._begin()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._begin()

    def _begin(self) -> None:
        """Get to work on the pass that has just begun, unless that is already under way."""
        if self._crew is None or self._crew.closed:
            self._hire()
        self._reader.shared_seed = self._shared_seed
        self._ready.clear()
        for task in self._waiting:
            if task.turn is not self._sampler_iter:
                task.cancel()
        self._waiting = collections.deque(task for task in self._waiting if task.turn is self._sampler_iter)
        if self._sampler_iter is not self._ahead:
            self._draw_from(self._sampler_iter)
            self._turns = itertools.cycle(range(self._num_workers))
            self._given = [0] * self._num_workers
            last = self._sampler_iter.workers
            self._active = [not last.get(i, {}).get("last") for i in range(self._num_workers)]
            for _ in range(self._sampler_iter.turn % self._num_workers):
                next(self._turns)
        self._ahead = None
        while len(self._waiting) < self._under_way and self._submit():
            pass

    def _hire(self) -> None:
        """Start the threads. A worker_init_fn seeds the process's generators, as a rule: they are put back."""
        started: queue.SimpleQueue[None] = queue.SimpleQueue()
        states = self._sampler_iter.workers
        start = functools.partial(
            _start, self._dataset, self._num_workers, int(self._base_seed), self._init_fn, states, started
        )
        with contextlib.nullcontext() if self._init_fn is None else _generators_kept():
            self._crew = Crew(self._num_workers, name="fastload-worker", start=start, apart=not self._reader.whole)
            for _ in range(self._num_workers if self._init_fn is not None else 0):
                _take(started)

    def _draw_from(self, turn: Pass) -> None:
        self._groups = _groups(turn, self._batches_per_read)
        self._drawing = turn
        self._next: tuple[Job[list[Any]], list[tuple[int, Any]]] | None = None

    def _submit(self) -> bool:
        """Give the next batches to a worker. Not if all are busy, or none are left."""
        if self._next is None:
            self._next = self._draw()
        worker = None if self._next is None else self._free_worker()
        if self._next is None or worker is None:
            return False
        task = _Batches(self._next[0], self._done, self._drawing, self._next[1], worker)
        self._next = None
        self._waiting.append(task)
        self._given[worker] += 1
        assert self._crew is not None
        self._crew.put(task, worker)
        return True

    def _draw(self) -> tuple[Job[list[Any]], list[tuple[int, Any]]] | None:
        """The next job, and the numbered indices that it reads."""
        try:
            group = next(self._groups, None)
        except Exception as error:
            return _Failed(error), [(self._drawing.number, [])]
        if group is None:
            return self._draw() if self._look_ahead() else None
        return self._reader.job([index for _, index in group], self._drawing), group

    def _free_worker(self) -> int | None:
        """Whose turn it is, by torch's rule."""
        most = self._under_way // max(1, sum(self._active))
        for worker in itertools.islice(self._turns, self._num_workers):
            if self._active[worker] and (self._in_order or self._given[worker] < most):
                return worker
        return None

    def _look_ahead(self) -> bool:
        if not self._persistent_workers or self._ahead is not None:
            return False
        self._ahead = self._index_sampler.ahead()
        if self._ahead is not None:
            self._draw_from(self._ahead)
        return self._ahead is not None

    def _next_data(self) -> Any:
        while not self._ready:
            task = self._next_task()
            self._given[task.worker] -= 1
            if task.ended:
                self._active[task.worker] = False
            self._submit()
            self._ready.extend(task.outcome())
        number, worker, data = self._ready.popleft()
        self._took(number)
        return self._unpacked(data, worker)

    def _next_task(self) -> _Batches:
        """The next task of this pass that is done; one may end a worker's part of the data."""
        forget_finished(self._done)
        deadline = None if self._timeout <= 0 else time.monotonic() + self._timeout
        while True:
            task = self._finished_task()
            if task is not None:
                self._waiting.remove(task)
                return task
            if deadline is None:
                wait_for_any(self._done)
            elif time.monotonic() < deadline:
                wait_for_any(self._done, max(0.0, deadline - time.monotonic()))
            else:
                self._time_out()

    def _finished_task(self) -> _Batches | None:
        for task in self._waiting:
            if task.turn is not self._sampler_iter:
                break
            if task.finished:
                return task
            if self._in_order:
                return None
        if not self._waiting or self._waiting[0].turn is not self._sampler_iter:
            if not self._persistent_workers:
                self._shutdown_workers()
            raise StopIteration
        return None

    def _time_out(self) -> None:
        task = self._waiting[0]
        at_work = f"worker thread {task.worker}" if not self._reader.whole else "the worker threads"
        number, index = task.group[0]
        assert self._crew is not None
        self._crew.abandon()
        self._shutdown_workers()
        raise RuntimeError(
            f"DataLoader timed out after {self._timeout} seconds: {at_work} did not finish batch {number} "
            f"(indices {shortened(index)}). Raise timeout=, or look for what blocks in the dataset; a thread "
            "that is stuck can't be ended, and stays until its call returns"
        )

    @property
    def _workers(self) -> list[_Handle]:
        """The threads, in the place where torch's iterator has its processes."""
        return [] if self._crew is None else [_Handle(thread) for thread in self._crew.threads]

    def _shutdown_workers(self) -> None:
        for task in self._waiting:
            task.cancel()
        self._waiting.clear()
        self._ready.clear()
        if self._ahead is not None:
            self._index_sampler.forget()
        if self._crew is not None:
            self._crew.close()


class _Handle:
    """A worker thread with the methods of a worker process."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self.name, self.join, self.is_alive = thread.name, thread.join, thread.is_alive

    @property
    def exitcode(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def terminate(self) -> None:
        """A thread can't be ended from outside; it ends with its iterator."""


class _Batches(Task[list[Any]]):
    """A task that gives batches, in `turn`; worker: who does it, where threads work apart."""

    def __init__(self, job: Any, sink: Any, turn: Pass, group: list[tuple[int, Any]], worker: int) -> None:
        super().__init__(job, sink)
        self.turn, self.group, self.worker = turn, group, worker

    @property
    def ended(self) -> bool:
        """Whether its worker has come to the end of its copy of an iterable dataset."""
        return self.error is None and not self.result

    def outcome(self) -> list[tuple[int, int, Any]]:
        """(number, worker, batch or error) for each batch."""
        if self.error is not None:
            raise self.error
        return [(number, self.worker, batch) for (number, _), batch in zip(self.group, self.result, strict=False)]


def _groups(turn: Pass, size: int) -> Iterator[list[tuple[int, Any]]]:
    """Lists of `size` numbered batches of indices; an error of the sampler comes after the batches before it."""
    group: list[tuple[int, Any]] = []
    try:
        for index in turn:
            group.append((turn.number, index))
            if len(group) == size:
                yield group
                group = []
    except Exception as failed:
        error: Exception | None = failed
    else:
        error = None
    if group:
        yield group
    if error is not None:
        raise error


class _Failed:
    """The job that stands where the sampler failed (see `Job`)."""

    parts = 1

    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, part: int) -> None:
        raise self._error

    def result(self) -> list[Any]:
        return []


def _start(
    dataset: Any,
    num_workers: int,
    base_seed: int,
    init_fn: Callable[[int], None] | None,
    states: dict[int, Any],
    started: queue.SimpleQueue[None],
    number: int,
) -> None:
    """What a worker thread does first."""
    try:
        if isinstance(dataset, IterableDataset):
            dataset = copy.deepcopy(dataset)
        set_worker_info(number, num_workers, base_seed + number, dataset)
        if init_fn is not None:
            init_fn(number)
        if number in states:
            dataset.load_state_dict(copy.deepcopy(states[number]["state"]))
    finally:
        started.put(None)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the random generators of the process back as they were."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)


def _take(queue_: queue.SimpleQueue[None]) -> None:
    """Wait for an item in slices: an untimed wait can't be interrupted on Windows."""
    while True:
        with contextlib.suppress(queue.Empty):
            return queue_.get(timeout=1)


def _batches_per_read(loader: Any) -> int:
    dataset: Any = loader.dataset
    if reads_whole_batches(dataset) and loader.batch_size and loader.collate_fn is collate:
        return int(dataset.batches_per_read(loader.batch_size))
    return 1
