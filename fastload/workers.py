"""Threads that work ahead, in order, and what each of them keeps.

`OrderedJobs` is the one way in which fastload uses threads, for loading and for packing. Jobs are drawn by the
consumer's thread, one whenever a result is taken, so samplers run where they always ran; at most `ahead` are under way;
results come out in the jobs' order. A job may fall into parts, and then all threads work on it together: a batch is
ready soonest, fewer unfinished ones take up memory, and no thread is idle while another has a whole batch to go.

Who owns what: the consumer's iterator owns the threads. They know only the shared queue, never the iterator, so that an
iterator which is closed, dropped or left by an exception stops them: each finishes the part in its hands, and no
more. Threads are daemons, and are stopped and joined before the interpreter ends.

`context` is what the code below a worker may ask about the work it is part of.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_PATIENCE = 10  # seconds that a thread gets to finish the item in its hands; it is a daemon, so the program can end


class Context(threading.local):
    """What a thread works on, set by the loader and read by the dataset.

    epoch: the epoch of the batch in hand, None outside a loader. pin: whether batches go to page-locked memory.
    """

    epoch: int | None = None
    pin: bool = False


context = Context()


class Job(Protocol[R_co]):
    """A piece of work that several threads may share.

    parts: into how many it falls. `run` is called once for each, by any thread, at any time; `result` once after that.
    """

    parts: int

    def run(self, part: int) -> None: ...

    def result(self) -> R_co: ...


class _Call(Generic[T, R]):
    """A function call as a job of one part."""

    parts = 1

    def __init__(self, function: Callable[[T], R], item: T) -> None:
        self._function, self._item = function, item

    def run(self, part: int) -> None:
        self._result = self._function(self._item)

    def result(self) -> R:
        return self._result


class _Task(Generic[R]):
    """A job on its way to its result. `ready` is held until it has a result or an error."""

    __slots__ = ("error", "job", "left", "lock", "ready", "result")

    def __init__(self, job: Job[R]) -> None:
        self.job = job
        self.left = job.parts
        self.lock = threading.Lock()
        self.result: R
        self.error: BaseException | None = None
        self.ready = threading.Lock()
        self.ready.acquire()

    def run(self, part: int, failed: BaseException | None) -> None:
        """Do one part, and what follows the last one. failed: why this thread can't."""
        try:
            if failed is not None:
                raise failed
            if self.error is None:
                self.job.run(part)
        except BaseException as error:
            self.error = error
        with self.lock:
            self.left -= 1
            last = self.left == 0
        if last:
            try:
                if self.error is None:
                    self.result = self.job.result()
            except BaseException as error:
                self.error = error
            self.ready.release()


_Tasks = queue.SimpleQueue[tuple[_Task[Any], int] | None]


def _work(tasks: _Tasks, start: Callable[[], None] | None, stopped: threading.Event) -> None:
    failed: BaseException | None = None
    if start is not None:
        try:
            start()
        except BaseException as error:
            failed = error
    while (work := tasks.get()) is not None and not stopped.is_set():
        task, part = work
        task.run(part, failed)
        del task, work


def _stop(tasks: _Tasks, threads: list[threading.Thread], stopped: threading.Event, patience: float) -> None:
    stopped.set()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(patience)


class OrderedJobs(Iterator[R]):
    """The results of jobs, in order, computed by `threads` threads that are at most `ahead` jobs ahead.

    All threads work on the earliest job that has parts left. name: what the threads are called, followed by their
    number. timeout: seconds to wait for a result before raising RuntimeError, 0 to wait forever. start: called in
    each thread first, with its number.

    An error of a job is raised where its result would have come, with the worker's traceback, and closes the
    iterator. An error of `jobs` is raised after the results of the jobs before it. `close` stops the threads after the
    part in hand; leaving the object to the garbage collector does the same.
    """

    def __init__(
        self,
        jobs: Iterable[Job[R]],
        *,
        threads: int,
        ahead: int,
        name: str = "fastload",
        timeout: float = 0,
        start: Callable[[int], None] | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"{threads} threads can't do any work; it takes at least 1")
        self._jobs = iter(jobs)
        self._timeout = timeout or math.inf
        self._waiting: deque[_Task[R]] = deque()
        self._tasks: _Tasks = queue.SimpleQueue()
        self._end: Exception | None = None
        stopped = threading.Event()
        workers = [
            threading.Thread(
                target=_work,
                args=(self._tasks, start and functools.partial(start, i), stopped),
                name=f"{name}-{i}",
                daemon=True,
            )
            for i in range(threads)
        ]
        self._stop = weakref.finalize(self, _stop, self._tasks, workers, stopped, _PATIENCE)
        for worker in workers:
            worker.start()
        for _ in range(max(ahead, 1)):
            self._submit()

    def _submit(self) -> None:
        if self._end is None:
            try:
                task = _Task(next(self._jobs))
            except Exception as error:  # StopIteration, or an error of the jobs: raised in its turn
                # Without the traceback's first frame, which is this one and holds `self`.
                self._end = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            else:
                self._waiting.append(task)
                for part in range(task.job.parts):
                    self._tasks.put((task, part))

    def __next__(self) -> R:
        if not self._waiting:
            end = self._end or StopIteration()
            self.close()
            try:
                raise end
            finally:
                del end  # the traceback holds this frame: keep it from holding itself
        task = self._waiting.popleft()
        deadline = time.monotonic() + self._timeout
        while not task.ready.acquire(timeout=1):  # in slices: an untimed wait can't be interrupted on Windows
            if time.monotonic() > deadline:
                self._abandon()
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
        if task.error is not None:
            self.close()
            try:
                if isinstance(task.error, StopIteration):
                    raise RuntimeError("a job raised StopIteration, which would pass for the end") from task.error
                raise task.error
            finally:
                del task  # for the same reason
        self._submit()
        return task.result

    def _abandon(self) -> None:
        """Close without waiting for stuck threads: they are daemons, which end with their part or the program."""
        stop = self._stop.detach()
        if stop is not None:
            tasks, threads, stopped, _ = stop[2]
            _stop(tasks, threads, stopped, 0)
        self.close()

    def close(self) -> None:
        """Stop the threads, each after the part in its hands, and drop all results; harmless when repeated."""
        self._stop()
        self._waiting.clear()
        self._end = StopIteration()


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int, name: str
) -> OrderedJobs[R]:
    """`function` of each item, in order; see `OrderedJobs`."""
    return OrderedJobs((_Call(function, item) for item in items), threads=threads, ahead=ahead, name=name)
