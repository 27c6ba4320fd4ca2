"""Threads that work ahead, in order, and what each of them keeps.

`OrderedMap` is the one way in which fastload uses threads, for loading and for packing: a function is applied to a
stream of items by several threads, at most `ahead` items are under way, and results come out in the items' order. The
items are drawn by the consumer's thread, one whenever a result is taken, so samplers run where they always ran.

Who owns what: the consumer's iterator owns the threads. They know only the shared queue, never the iterator, so that an
iterator which is closed, dropped or left by an exception stops them: each finishes the item in its hands, and no
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
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 10  # seconds that a thread gets to finish the item in its hands; it is a daemon, so the program can end


class Context(threading.local):
    """What a thread works on, set by the loader and read by the dataset.

    epoch: the epoch of the batch in hand, None outside a loader. pin: whether batches go to page-locked memory.
    """

    epoch: int | None = None
    pin: bool = False


context = Context()


class _Task(Generic[T, R]):
    """One item on its way to its result. `ready` is held until there is one."""

    __slots__ = ("error", "item", "ready", "result")

    def __init__(self, item: T) -> None:
        self.item = item
        self.result: R
        self.error: BaseException | None = None
        self.ready = threading.Lock()
        self.ready.acquire()


def _work(
    tasks: queue.SimpleQueue[_Task[T, R] | None],
    function: Callable[[T], R],
    start: Callable[[], None] | None,
    stopped: threading.Event,
) -> None:
    failed: BaseException | None = None
    if start is not None:
        try:
            start()
        except BaseException as error:
            failed = error
    while (task := tasks.get()) is not None and not stopped.is_set():
        try:
            if failed is not None:
                raise failed
            task.result = function(task.item)
        except BaseException as error:
            task.error = error
        task.ready.release()
        del task


def _stop(
    tasks: queue.SimpleQueue[_Task[T, R] | None], threads: list[threading.Thread], stopped: threading.Event
) -> None:
    stopped.set()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_PATIENCE)


class OrderedMap(Iterator[R], Generic[T, R]):
    """`function` of each item, in order, computed by `threads` threads that are at most `ahead` items ahead.

    name: what the threads are called, followed by their number. timeout: seconds to wait for a result before raising
    RuntimeError, 0 to wait forever. start: called in each thread first, with its number.

    An error of the function is raised where its result would have come, with the worker's traceback, and closes the
    map. An error of `items` is raised after the results of the items before it. `close` stops the threads after the
    item in hand; leaving the object to the garbage collector does the same.
    """

    def __init__(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        *,
        threads: int,
        ahead: int,
        name: str = "fastload",
        timeout: float = 0,
        start: Callable[[int], None] | None = None,
    ) -> None:
        self._items = iter(items)
        self._timeout = timeout or math.inf
        self._waiting: deque[_Task[T, R]] = deque()
        self._tasks: queue.SimpleQueue[_Task[T, R] | None] = queue.SimpleQueue()
        self._end: Exception | None = None
        stopped = threading.Event()
        workers = [
            threading.Thread(
                target=_work,
                args=(self._tasks, function, start and functools.partial(start, i), stopped),
                name=f"{name}-{i}",
                daemon=True,
            )
            for i in range(threads)
        ]
        self._stop = weakref.finalize(self, _stop, self._tasks, workers, stopped)
        for worker in workers:
            worker.start()
        for _ in range(max(ahead, 1)):
            self._submit()

    def _submit(self) -> None:
        if self._end is None:
            try:
                task = _Task[T, R](next(self._items))
            except Exception as error:  # StopIteration, or an error of the items: raised in its turn
                self._end = error
            else:
                self._waiting.append(task)
                self._tasks.put(task)

    def __next__(self) -> R:
        if not self._waiting:
            end = self._end or StopIteration()
            self.close()
            raise end
        task = self._waiting.popleft()
        deadline = time.monotonic() + self._timeout
        while not task.ready.acquire(timeout=1):  # in slices: an untimed wait can't be interrupted on Windows
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
        if task.error is not None:
            self.close()
            try:
                raise task.error
            finally:
                del task  # the traceback holds this frame: keep it from holding itself
        self._submit()
        return task.result

    def close(self) -> None:
        """Stop the threads, each after the item in its hands, and drop all results; harmless when repeated."""
        self._stop()
        self._waiting.clear()
        self._end = StopIteration()
