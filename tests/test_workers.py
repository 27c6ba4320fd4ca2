"""Threads that work ahead: order, look-ahead, errors in their place, no thread left; and buffers that come back."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import itertools
import os
import queue
import sys
import threading
import time
import traceback
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from fastload import DataLoader, DevicePrefetcher
from fastload.buffers import BatchBuffers, scratch
from fastload.workers import Crew, OrderedJobs, Task, context, fork_gate, ordered_map

NAME = "fastload-test"


class Call:
    """A job of one part: a function of one item."""

    parts = 1

    def __init__(self, function: Callable[[Any], Any], item: Any) -> None:
        self.function, self.item = function, item

    def run(self, part: int) -> None:
        self.got = self.function(self.item)

    def result(self) -> Any:
        return self.got


class Parts:
    """A job of several parts, each a call of `function(part)`; its result is what they returned, in order."""

    def __init__(self, parts: int, function: Callable[[int], Any]) -> None:
        self.parts, self.function = parts, function
        self.runs: list[int] = []
        self.got: dict[int, Any] = {}
        self.results = 0

    def run(self, part: int) -> None:
        self.runs.append(part)
        self.got[part] = self.function(part)

    def result(self) -> list[Any]:
        self.results += 1
        return [self.got[part] for part in range(self.parts)]


def mapped(function: Callable[[Any], Any], items: Any, threads: int = 2, ahead: int = 4, **options: Any) -> Any:
    """`function` of each item by OrderedJobs."""
    jobs = (Call(function, item) for item in items)
    return OrderedJobs(jobs, threads=threads, ahead=ahead, name=NAME, **options)


class Counter:
    """The numbers 0, 1, ... below `stop`; it knows how many were drawn, and by which threads."""

    def __init__(self, stop: int, error: Exception | None = None) -> None:
        self.stop, self.error = stop, error
        self.drawn = 0
        self.by: set[int] = set()

    def __iter__(self) -> Counter:
        return self

    def __next__(self) -> int:
        self.by.add(threading.get_ident())
        if self.drawn == self.stop:
            raise self.error or StopIteration
        self.drawn += 1
        return self.drawn - 1


def threads() -> list[str]:
    """The names of all threads that the tests here start."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another thread will do; the limit only ends a test that has failed."""
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "waited 20 s in vain"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every test here ends without a thread of its own."""
    yield
    if threads():
        gc.collect()
    assert threads() == []


# --- order and look-ahead


@pytest.mark.parametrize(("count", "workers", "ahead"), [(0, 2, 4), (1, 4, 1), (50, 1, 1), (50, 3, 2), (50, 2, 100)])
def test_results_come_in_the_items_order(count: int, workers: int, ahead: int) -> None:
    """Any number of threads and any look-ahead give all results, in order, None among them."""
    results = list(mapped(lambda n: None if n == 3 else n * n, range(count), workers, ahead))
    assert results == [None if n == 3 else n * n for n in range(count)]


def test_a_slow_item_does_not_lose_its_place() -> None:
    """The second item is done before the first, which waits for it, and still comes second."""
    second_done = threading.Event()

    def function(item: int) -> int:
        if item == 0:
            assert second_done.wait(20), "the items were not worked on at the same time"
        else:
            second_done.set()
        return item

    assert list(mapped(function, range(2))) == [0, 1]


def test_work_is_done_by_named_threads() -> None:
    """Every result is computed by a thread of the name that was asked for, none by the consumer's."""
    names = set(mapped(lambda _: threading.current_thread().name, range(40), threads=2))
    assert names <= {f"{NAME}-0", f"{NAME}-1"}


@pytest.mark.parametrize("ahead", [1, 3, 7])
def test_no_more_is_drawn_than_may_be_under_way(ahead: int) -> None:
    """`ahead` items are drawn at first and one more for each result taken, all by the consumer's thread."""
    items = Counter(20)
    results = mapped(lambda n: n, items, ahead=ahead)
    assert items.drawn == ahead
    for taken in range(1, 21):
        assert next(results) == taken - 1
        assert items.drawn == min(ahead + taken, 20)
    assert items.by == {threading.get_ident()}
    results.close()


def test_an_endless_stream_is_taken_as_it_comes() -> None:
    """Items need no length and no end."""
    items = Counter(-1)
    with contextlib.closing(mapped(lambda n: -n, items)) as results:
        assert [next(results) for _ in range(100)] == [-n for n in range(100)]


def test_ordered_map_is_the_same_for_a_function() -> None:
    """`ordered_map` applies a function to items."""
    assert list(ordered_map(str, range(9), threads=3, ahead=5, name=NAME)) == [str(n) for n in range(9)]


# --- jobs of several parts


def test_all_threads_work_on_one_job() -> None:
    """Two parts that wait for each other are done, so two threads had one each."""
    together = threading.Barrier(2)

    def meet(part: int) -> str:
        together.wait(20)
        return threading.current_thread().name

    (names,) = OrderedJobs([Parts(2, meet)], threads=2, ahead=1, name=NAME)
    assert sorted(names) == [f"{NAME}-0", f"{NAME}-1"]


def test_each_part_runs_once_and_then_the_result_is_made_once() -> None:
    """No part is lost, repeated or still running when the result is asked for."""
    jobs = [Parts(parts, lambda part: part) for parts in (1, 5, 2, 13, 1, 3)]
    results = list(OrderedJobs(jobs, threads=3, ahead=2, name=NAME))
    assert results == [list(range(job.parts)) for job in jobs]
    assert all(sorted(job.runs) == list(range(job.parts)) for job in jobs)
    assert [job.results for job in jobs] == [1] * len(jobs)


def test_a_failing_part_fails_its_job_alone() -> None:
    """The error of one part comes in the job's place; the job before it is whole, and no result is made of the rest."""

    def function(part: int) -> int:
        if part == 1:
            raise ValueError("part 1")
        return part

    good, bad = Parts(4, lambda part: part), Parts(4, function)
    results = OrderedJobs([good, bad], threads=2, ahead=2, name=NAME)
    assert next(results) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="part 1"):
        next(results)
    assert bad.results == 0


def test_an_error_of_the_result_is_raised_in_its_place() -> None:
    """What goes wrong after the last part is the job's error too."""

    class NoResult(Parts):
        def result(self) -> list[Any]:
            raise LookupError("no result")

    with pytest.raises(LookupError, match="no result"):
        list(OrderedJobs([NoResult(3, abs)], threads=2, ahead=1, name=NAME))


# --- errors


class RefusalError(Exception):
    """An error with a constructor of its own."""

    def __init__(self, item: int, reason: str) -> None:
        super().__init__(f"{item}: {reason}")
        self.item = item


@pytest.mark.parametrize("place", [0, 1, 7])
@pytest.mark.parametrize("ahead", [1, 20])
def test_an_error_comes_where_its_result_would_have_come(place: int, ahead: int) -> None:
    """The results before it are given, then the very error with the worker's traceback, then nothing more."""

    def refuse(item: int) -> int:
        if item == place:
            raise RefusalError(item, "not this one")
        return item

    results = mapped(refuse, range(20), ahead=ahead)
    assert [next(results) for _ in range(place)] == list(range(place))
    with pytest.raises(RefusalError) as caught:
        next(results)
    assert caught.value.item == place
    assert "in refuse" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert threads() == []
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("error", [KeyboardInterrupt("in a worker"), SystemExit(3)])
def test_errors_that_are_no_exceptions_reach_the_consumer(error: BaseException) -> None:
    """What would end a program ends the iteration instead of a silent thread."""

    def function(item: int) -> int:
        raise error

    with pytest.raises(type(error)):
        next(mapped(function, range(3)))


def test_a_stop_iteration_in_the_function_does_not_pass_for_the_end() -> None:
    """A stray StopIteration (a bare `next` in user code) is an error, as in a generator, not a short epoch."""

    def function(item: int) -> int:
        return item if item < 2 else next(iter(()))

    with pytest.raises(RuntimeError):
        list(mapped(function, range(10)))


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_an_error_of_the_items_comes_after_the_results_before_it(place: int, ahead: int) -> None:
    """A sampler that fails while items are drawn ahead still gives what it gave."""
    results = mapped(lambda n: n, Counter(place, OSError("no more")), ahead=ahead)
    assert [next(results) for _ in range(place)] == list(range(place))
    with pytest.raises(OSError, match="no more"):
        next(results)
    assert threads() == []
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_of_the_items_is_not_drawn_twice() -> None:
    """Items that ended or failed are not asked again."""
    asked = 0

    def items() -> Iterator[int]:
        nonlocal asked
        for item in range(3):
            asked += 1
            yield item
        asked += 1

    list(mapped(lambda n: n, items(), ahead=10))
    assert asked == 4


# --- the end


def test_threads_end_with_the_items() -> None:
    """After the last result no thread is left, though the iterator still is."""
    results = mapped(lambda n: n, range(5))
    for _ in results:
        pass
    assert threads() == []
    assert next(results, "end") == "end"


def test_close_ends_the_threads_and_may_be_repeated() -> None:
    """After close there is no thread, no result and no harm in closing again."""
    results = mapped(lambda n: n, range(50))
    assert next(results) == 0
    assert threads()
    results.close()
    assert threads() == []
    results.close()
    assert list(results) == []


def test_threads_finish_the_item_in_hand_and_no_more() -> None:
    """On close what is being computed is finished; what waits is never begun."""
    begun: list[int] = []
    ready = threading.Event()

    def function(item: int) -> int:
        begun.append(item)
        assert ready.wait(20)
        results.close()
        return item

    results = mapped(function, range(10), threads=1, ahead=10)
    ready.set()
    wait_for(lambda: threads() == [])
    assert begun == [0]
    assert list(results) == []


def leave_by_break() -> None:
    for _ in mapped(lambda n: n, range(50)):
        break


def leave_by_error() -> None:
    with contextlib.suppress(ZeroDivisionError):
        for n in mapped(lambda n: n, range(50)):
            1 / n


def leave_untouched() -> None:
    mapped(lambda n: n, range(50))


def leave_to_a_cycle() -> None:
    cycle: dict[str, Any] = {"results": mapped(lambda n: n, range(50))}
    cycle["self"] = cycle


def leave_exhausted() -> None:
    list(mapped(lambda n: n, range(5)))


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_untouched, leave_to_a_cycle, leave_exhausted])
def test_leaving_the_iterator_ends_its_threads(leave: Callable[[], None]) -> None:
    """However an iterator is left, its threads end with it."""
    leave()
    gc.collect()
    wait_for(lambda: threads() == [])


def take_one(results: Any) -> None:
    next(results)


def take_all(results: Any) -> None:
    for _ in results:
        pass


def take_all_one_by_one(results: Any) -> None:
    while True:
        try:
            next(results)
        except StopIteration:
            return


@pytest.mark.parametrize("take", [take_one, take_all, take_all_one_by_one])
@pytest.mark.parametrize("count", [50, 3], ids=["items left", "all items drawn"])
def test_a_left_iterator_is_freed_at_once(count: int, take: Callable[[Any], None]) -> None:
    """No cycle keeps the iterator, its threads, items or results until the garbage collector comes by."""
    items = Counter(count)
    results = mapped(lambda n: n, items)
    gc.disable()
    try:
        take(results)
        references = [weakref.ref(results), weakref.ref(items)]
        del results, items
        wait_for(lambda: threads() == [])
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_results_are_not_kept() -> None:
    """A result that was taken and dropped is freed, even while the iteration goes on."""
    results = mapped(lambda n: np.full(8, n), range(20), threads=1, ahead=2)
    reference = weakref.ref(next(results))
    assert next(results) is not None
    wait_for(lambda: reference() is None)
    results.close()


def test_maps_may_be_nested() -> None:
    """A function may use another map, for as long as it lives or only in part."""

    def function(item: int) -> tuple[int, int]:
        inner = ordered_map(lambda n: n * item, range(10), threads=2, ahead=3, name=f"{NAME}-inner")
        left = ordered_map(lambda n: n, range(10), threads=1, ahead=3, name=f"{NAME}-left")
        next(left)
        return item, sum(inner)

    assert list(mapped(function, range(8), threads=2)) == [(n, 45 * n) for n in range(8)]


def test_two_iterators_work_side_by_side() -> None:
    """Iterators share nothing: closing one leaves the other alone."""
    one, other = mapped(lambda n: n, range(6)), mapped(lambda n: -n, range(6))
    assert [next(one), next(other), next(one)] == [0, 0, 1]
    one.close()
    assert list(other) == [-1, -2, -3, -4, -5]


# --- crews


class Note:
    """A job of one part that says which thread did it."""

    parts = 1

    def __init__(self, wait: Callable[[], Any] = lambda: None) -> None:
        self.wait = wait

    def run(self, part: int) -> None:
        self.wait()
        self.name = threading.current_thread().name

    def result(self) -> str:
        return self.name


def done_by(crew: Crew, tasks: list[Task[Any]], finished: queue.SimpleQueue[Task[Any]]) -> list[Task[Any]]:
    """The tasks, once they are finished."""
    for _ in tasks:
        finished.get(timeout=20)
    crew.close()
    return tasks


def test_start_is_called_once_in_each_thread() -> None:
    """Every thread calls it with its own number, before its first task."""
    started: dict[str, int] = {}
    together = threading.Barrier(3)

    def start(number: int) -> None:
        assert threading.current_thread().name not in started
        started[threading.current_thread().name] = number

    finished: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
    crew = Crew(3, name=NAME, start=start)
    tasks = [Task(Note(lambda: together.wait(20)), finished) for _ in range(3)]
    for task in tasks:
        crew.put(task)
    assert {task.result for task in done_by(crew, tasks, finished)} == set(started)
    assert started == {f"{NAME}-{number}": number for number in range(3)}


@pytest.mark.parametrize("error", [ValueError("no start"), SystemExit(1)])
def test_a_thread_that_cannot_start_fails_its_tasks(error: BaseException) -> None:
    """The first with the error, the others with one that names it; nobody waits, and nothing holds the threads."""

    def start(number: int) -> None:
        raise error

    finished: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
    crew = Crew(1, name=NAME, start=start)
    tasks = [Task(Note(), finished) for _ in range(3)]
    for task in tasks:
        crew.put(task)
    assert [type(task.error) for task in done_by(crew, tasks, finished)] == [type(error), RuntimeError, RuntimeError]
    assert f"{NAME}-0 did not start: {type(error).__name__}: {error}" in str(tasks[1].error)
    assert threads() == []


def test_ctrl_c_while_threads_start_ends_those_that_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is printed about the others."""
    started: list[threading.Thread] = []
    start_of_threads = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if started:
            raise KeyboardInterrupt
        started.append(thread)
        start_of_threads(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        Crew(3, name=NAME)
    gc.collect()
    wait_for(lambda: not started[0].is_alive())


def test_threads_that_work_apart_do_what_each_is_given() -> None:
    """A queue for each: a busy thread's tasks wait for it, whoever is free."""
    finished: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
    crew = Crew(2, name=NAME, apart=True)
    tasks = [Task(Note(lambda: time.sleep(0.05)), finished) for _ in range(4)]
    for task in tasks:
        crew.put(task, 1)
    assert {task.result for task in done_by(crew, tasks, finished)} == {f"{NAME}-1"}


def test_a_cancelled_task_is_not_done() -> None:
    """It is finished all the same, with an error, so that nobody waits for it."""
    finished: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
    go_on = threading.Event()
    crew = Crew(1, name=NAME)
    tasks = [Task(Note(lambda: go_on.wait(20)), finished), Task(Note(), finished)]
    for task in tasks:
        crew.put(task)
    tasks[1].cancel()
    go_on.set()
    first, second = done_by(crew, tasks, finished)
    assert first.result == f"{NAME}-0"
    assert isinstance(second.error, CancelledError)
    assert not hasattr(second.job, "name")


def test_a_stuck_thread_can_be_abandoned() -> None:
    """`abandon` returns at once, and `close` within its patience; the thread ends when its call returns."""
    go_on = threading.Event()
    crew = Crew(1, name=NAME)
    crew.put(Task(Note(lambda: go_on.wait(20)), queue.SimpleQueue()))
    crew.abandon()
    assert crew.closed
    assert threads() == [f"{NAME}-0"]
    go_on.set()
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def test_context_is_each_threads_own() -> None:
    """What one thread says of its work is not seen by another, and outside a loader it says nothing."""

    def function(item: int) -> int | None:
        before = context.epoch
        context.epoch = item
        return before

    assert list(mapped(function, range(3), threads=1)) == [None, 0, 1]
    assert (context.epoch, context.draws, context.memory) == (None, None, "own")


# --- buffers

SHAPES = [(1, 2, 3, 3), (2, 2, 3, 3), (4, 5, 5, 3)]

HOLDS: dict[str, Callable[[torch.Tensor, np.ndarray], Any]] = {
    "tensor": lambda tensor, array: tensor,
    "array": lambda tensor, array: array,
    "both": lambda tensor, array: (tensor, array),
    "sample": lambda tensor, array: tensor[-1],
    "permuted": lambda tensor, array: tensor.permute(0, 3, 1, 2),
    "slice of a slice": lambda tensor, array: array[0][1:][:, 1:],
    "one value": lambda tensor, array: array[-1, -1, -1, -1:],
    "flat": lambda tensor, array: tensor.view(-1),
    "iterator": lambda tensor, array: iter(tensor.permute(0, 3, 1, 2)),
    "memoryview": lambda tensor, array: memoryview(array),
    "memoryview of a sample": lambda tensor, array: memoryview(array[0]),
    "storage": lambda tensor, array: tensor.untyped_storage(),
    "numpy of the tensor": lambda tensor, array: tensor[0].numpy(),
    "tensor of the array": lambda tensor, array: torch.from_numpy(array[:1]),
    "dlpack": lambda tensor, array: torch.from_dlpack(tensor),
    "other type": lambda tensor, array: array.view(np.int8),
    "detached": lambda tensor, array: tensor.detach(),
    "cycle": lambda tensor, array: _in_a_cycle(tensor),
}
"""Ways to hold a batch, or a part of it."""


def _in_a_cycle(tensor: torch.Tensor) -> dict[str, Any]:
    cycle: dict[str, Any] = {"tensor": tensor}
    cycle["self"] = cycle
    return cycle


def values(held: Any) -> set[int]:
    """All bytes that can be seen through what is held."""
    if isinstance(held, tuple):
        return values(held[0]) | values(held[1])
    if isinstance(held, dict):
        return values(held["tensor"])
    if isinstance(held, (memoryview, torch.UntypedStorage)):
        return set(bytes(held))
    if isinstance(held, torch.Tensor):
        return set(held.flatten().tolist())
    if isinstance(held, np.ndarray):
        return set(held.view(np.uint8).ravel().tolist())
    return values(next(copy.copy(held))) if isinstance(held, type(iter(()))) else set()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(SHAPES), st.sampled_from(sorted(HOLDS))) | st.integers(0, 20),
        min_size=1,
        max_size=40,
    )
)
def test_a_buffer_is_never_lent_while_anything_refers_to_it(steps: list[Any]) -> None:
    """Whatever is held of a batch, in any order of taking and releasing, keeps the pattern that was written to it."""
    buffers = BatchBuffers()
    held: list[tuple[int, Any]] = []
    for number, now in enumerate(steps):
        if isinstance(now, int):
            if now < len(held):
                del held[now]
            continue
        shape, way = now
        tensor, array = buffers.take(shape)
        assert tuple(tensor.shape) == array.shape == shape
        assert tensor.dtype == torch.uint8
        tensor.fill_(number)
        assert (array == number).all(), "the tensor and the array are not the same bytes"
        held.append((number, HOLDS[way](tensor, array)))
        del tensor, array
        for pattern, kept in held:
            assert values(kept) <= {pattern}, f"{kept!r} was overwritten"


@pytest.mark.parametrize("way", HOLDS)
def test_every_way_to_hold_a_batch_holds_it(way: str) -> None:
    """While it is held the next batch has other memory; when it is released the memory is used again."""
    buffers = BatchBuffers()
    tensor, array = buffers.take((2, 4, 4, 3))
    first = tensor.data_ptr()
    held = HOLDS[way](tensor, array)
    del tensor, array
    other, _ = buffers.take((2, 4, 4, 3))
    assert other.data_ptr() != first
    del held
    gc.collect()
    again, _ = buffers.take((2, 4, 4, 3))
    assert again.data_ptr() == first


def test_a_batch_that_nobody_holds_is_used_again() -> None:
    """A loop that drops each batch runs in one buffer: what was written to the last is still there."""
    buffers = BatchBuffers()
    tensor, array = buffers.take((2, 4, 4, 3))
    for number in range(1, 20):
        tensor.fill_(number)
        before = tensor.data_ptr()
        del tensor, array
        tensor, array = buffers.take((2, 4, 4, 3))
        assert tensor.data_ptr() == before
        assert (array == number).all()


def test_few_unused_buffers_are_kept() -> None:
    """When many batches are released at once, most of their memory is given back."""
    buffers = BatchBuffers()
    tracemalloc.start()
    try:
        tensors = [buffers.take((1, 1000, 1000, 1))[0] for _ in range(30)]
        assert tracemalloc.get_traced_memory()[0] > 30e6
        del tensors
        assert 1e6 < tracemalloc.get_traced_memory()[0] < 10e6
    finally:
        tracemalloc.stop()


def test_memory_comes_back_from_other_threads() -> None:
    """Threads that take, write, pass on and release batches at random never see each other's bytes."""
    buffers = BatchBuffers()
    wrong: list[str] = []

    def use(number: int) -> None:
        kept: list[torch.Tensor] = []
        for step in range(300):
            tensor, array = buffers.take((1 + step % 2, 8, 8, 3))
            array[...] = number
            kept.append(tensor[0])
            if len(kept) > 5:
                del kept[:: 1 + step % 3]
            if any(bool((sample != number).any()) for sample in kept):
                wrong.append(f"thread {number}, step {step}")

    workers = [threading.Thread(target=use, args=(number,), name=f"{NAME}-{number}") for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_scratch_is_one_threads_memory_for_one_purpose() -> None:
    """The same purpose gives the same memory again, grown where needed; another purpose or thread gets other memory."""
    one = scratch("test-one", 100)
    assert (one.shape, one.dtype) == ((100,), np.uint8)
    assert np.shares_memory(one, scratch("test-one", 50))
    assert not np.shares_memory(one, scratch("test-two", 100))
    assert scratch("test-one", 1000).shape == (1000,)
    (elsewhere,) = mapped(lambda _: scratch("test-one", 1000), [0], threads=1)
    assert not np.shares_memory(elsewhere, scratch("test-one", 1000))


# ---- forks


fork_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows forks nothing")


def forked() -> int:
    """The exit status of a child that does nothing but end."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_no_thread_is_at_work_when_the_process_is_forked() -> None:
    """Each child finds the lock free that the threads take for all their work; they go on after each fork."""
    lock, done, wanted = threading.Lock(), [0], threading.Event()

    def work(_: int) -> None:
        with lock:
            time.sleep(0.0005)
            done[0] += 1

    items = itertools.takewhile(lambda _: not wanted.is_set(), itertools.count())
    results = ordered_map(work, items, threads=3, ahead=9, name="busy")
    consumer = threading.Thread(target=lambda: collections.deque(results, maxlen=0))
    consumer.start()
    try:
        for _ in range(60):
            before = done[0]
            pid = os.fork()
            if pid == 0:
                os._exit(int(lock.locked()))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            deadline = time.monotonic() + 20
            while done[0] == before:
                assert time.monotonic() < deadline
                time.sleep(0.0001)
    finally:
        wanted.set()
        consumer.join()


class Locking(Dataset[int]):
    """Reading a sample takes a lock, as caches and libraries do."""

    def __init__(self) -> None:
        self.lock, self.read = threading.Lock(), 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> int:
        with fork_gate:  # a loader in a dataset enters it once more
            pass
        with self.lock:
            time.sleep(0.0005)
            self.read += 1
        return index


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("workers", [0, 2])
def test_no_prefetcher_reads_when_the_process_is_forked(workers: int) -> None:
    """Without workers it is the prefetcher's own thread that reads."""
    dataset = Locking()
    batches = iter(DevicePrefetcher(DataLoader(dataset, 2, num_workers=workers, worker_type="thread"), "cpu"))
    for _ in range(60):
        next(batches)
        pid = os.fork()
        if pid == 0:
            os._exit(int(dataset.lock.locked()))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert dataset.read >= 120
    batches.close()


class Lingering:
    """What a thread keeps, and takes a lock to let go of when it has ended: OpenCV does so."""

    def __init__(self) -> None:
        self.lock, self.going = threading.Lock(), threading.Event()

    def __del__(self) -> None:
        with self.lock:
            self.going.set()
            time.sleep(0.3)


@fork_only
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't known when a thread is gone")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_no_thread_is_about_to_go_when_the_process_is_forked() -> None:
    """For Python it has ended; but it is still there, and takes locks."""
    kept, lingering = threading.local(), [Lingering()]
    lock, going = lingering[0].lock, lingering[0].going

    def keep(_: int) -> None:
        kept.value = lingering.pop()

    results = ordered_map(keep, range(1), threads=1, ahead=1, name="lingering")
    next(results)
    results._crew.abandon()
    assert going.wait(20)
    pid = os.fork()
    if pid == 0:
        os._exit(int(lock.locked()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@fork_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_thread_may_fork_in_its_work_and_one_that_is_stuck_is_not_waited_for() -> None:
    """The first doesn't wait for itself, nor does its child; the second is left alone after a second."""
    assert list(ordered_map(lambda _: forked(), range(4), threads=2, ahead=4, name="forking")) == [7] * 4
    gate = threading.Event()
    stuck = ordered_map(lambda _: gate.wait(30), range(1), threads=1, ahead=1, name="stuck")
    consumer = threading.Thread(target=lambda: list(stuck))
    consumer.start()
    time.sleep(0.1)
    assert forked() == 7
    gate.set()
    consumer.join()
