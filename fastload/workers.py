"""Threads that work ahead, and what each of them keeps.

A `Crew` is the one way in which fastload uses threads, for loading and for packing. A job may fall into parts, and then
all threads work on it together: a batch is ready soonest, fewer unfinished ones take up memory, and no thread is idle
while another has a whole batch to go. Or each thread has a queue of its own, as torch's workers have.

`OrderedJobs` gives the results of jobs in their order. Jobs are drawn by the consumer's thread, one whenever a result
is taken; at most `ahead` are under way.

Who owns what: the consumer owns the crew. The threads know only their queues, never the consumer, so that a crew which
is closed, dropped or left by an exception stops: each thread finishes the part in its hands, and no more. Threads are
daemons, and are stopped and joined before the interpreter ends; one that is stuck for over a second is left behind.

`context` is what the code below a worker may ask about the work it is part of.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any, Generic, Protocol, TypeVar

from .buffers import Memory

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

PATIENCE = 1.0  # seconds that workers get to finish what is in their hands; they are daemons, so the program can end


class Context(threading.local):
    """What a thread works on, set by the loader and read by the dataset.

    epoch: the epoch of the batch in hand, None outside a loader. draws: int64 (n,) that tells apart the occurrences of
    an index in the epoch, None where none comes twice. memory: where batches go.
    """

    epoch: int | None = None
    draws: Any = None
    memory: Memory = "own"


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


class Sink(Protocol):
    """Where finished tasks are put: a queue, say."""

    def put(self, task: Any, /) -> None: ...


class Task(Generic[R]):
    """A job on its way to its result, or to its error. Whoever finishes it puts it into `sink`."""

    def __init__(self, job: Job[R], sink: Sink) -> None:
        self.job, self.sink = job, sink
        self.result: R
        self.error: BaseException | None = None
        self.finished = False
        self._left = job.parts
        self._lock = threading.Lock() if job.parts > 1 else None

    def cancel(self) -> None:
        """Do no part of it that isn't begun."""
        self.error = CancelledError()

    def run(self, part: int, failed: BaseException | None) -> None:
        """Do one part, and what follows the last one. failed: why this thread can't."""
        try:
            if failed is not None:
                raise failed
            if self.error is None:
                self.job.run(part)
        except BaseException as error:
            self.error = error
        if self._is_last():
            try:
                if self.error is None:
                    self.result = self.job.result()
            except BaseException as error:
                self.error = error
            self.finished = True
            sink = self.sink
            del self.sink  # it may hold this task until it is emptied
            sink.put(self)

    def _is_last(self) -> bool:
        if self._lock is None:
            return True
        with self._lock:
            self._left -= 1
            return self._left == 0


_Queue = queue.SimpleQueue[tuple[Task[Any], int] | None]


class _ForkGate:
    """Lets the process be forked only while no thread is at work that reads samples: those of crews, and prefetchers'.

    One that is in the middle of a cache, of a library or of the user's code may hold a lock there. The child has a copy
    of it, which nobody ever releases. A thread that stays at work for longer than `PATIENCE` is not waited for. One
    that has ended for Python has not for the system: OpenCV takes a lock when a thread goes, and so it has to be gone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._native: set[int] = set()  # the system's numbers of threads that have entered
        self._at_work: dict[int, int] = {}  # how often each thread has entered
        self._forking = 0
        self._held_by: int | None = None

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._forking and me not in self._at_work:
                self._changed.wait()
            self._at_work[me] = self._at_work.get(me, 0) + 1
            self._native.add(threading.get_native_id())

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self._changed:
            left = self._at_work.pop(me, 0) - 1  # 0 - 1 in a child that was forked at work
            if left > 0:
                self._at_work[me] = left
            elif self._forking:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait for the threads at work, keep the others from beginning, and hold the lock: the child has it then."""
        me = threading.get_ident()
        self._changed.acquire()
        self._forking, self._held_by = self._forking + 1, me
        try:
            self._changed.wait_for(lambda: not self._at_work.keys() - {me}, PATIENCE)
            self._wait_for_the_ending()
        finally:
            self._held_by = me  # in the meantime it may have been another's that forks

    def _wait_for_the_ending(self) -> None:
        alive = {thread.native_id for thread in threading.enumerate()}
        deadline = time.monotonic() + PATIENCE
        for ending in [native for native in self._native if native not in alive]:
            while os.path.exists(f"/proc/self/task/{ending}") and time.monotonic() < deadline:  # Linux
                time.sleep(0.0001)
            self._native.discard(ending)

    def after_fork(self) -> None:
        """Let them go on."""
        if self._held_by == threading.get_ident():  # else Ctrl-C kept it from being held
            self._forking, self._held_by = self._forking - 1, None
            self._changed.notify_all()
            self._changed.release()

    def in_child(self) -> None:
        """Forget the threads that were not forked."""
        _ForkGate.__init__(self)


fork_gate = _ForkGate()
if hasattr(os, "register_at_fork"):
    _hooks = {"after_in_parent": fork_gate.after_fork, "after_in_child": fork_gate.in_child}
    os.register_at_fork(before=fork_gate.before_fork, **_hooks)


def _work(tasks: _Queue, start: Callable[[], None] | None, stopped: threading.Event) -> None:
    failed: BaseException | None = None
    again = ""
    if start is not None:
        try:
            start()
        except BaseException as error:
            failed = error
            again = f"{threading.current_thread().name} did not start: {type(error).__name__}: {error}"
    while (work := tasks.get()) is not None and not stopped.is_set():
        task, part = work
        with fork_gate:
            task.run(part, failed or (RuntimeError(again) if again else None))
        del task, work
        failed = None  # raised once: its traceback will hold the consumer, which must not be held by its own threads


def _tell(queues: list[_Queue], stopped: threading.Event) -> None:
    """Have threads stop, each after the part in its hands. Short: Ctrl-C is lost in what runs when an object goes."""
    stopped.set()
    for tasks in queues:
        tasks.put(None)


def _wait_for(threads: Iterable[threading.Thread]) -> None:
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():  # Ctrl-C may have come before it began
            thread.join(max(0.0, deadline - time.monotonic()))


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Let no thread be in the middle of foreign code when the interpreter ends: that can abort the program."""
    for crew in list(_crews):
        crew.abandon()
    _wait_for(list(_threads))


class Crew:
    """`count` threads that do what is put to them; closing or dropping it stops them.

    name: what the threads are called, followed by their number. start: called in each thread first, with its number;
    if it fails, so does everything that the thread is given. apart: each thread has a queue of its own; otherwise all
    take the next part of the earliest task.
    """

    def __init__(
        self, count: int, *, name: str = "fastload", start: Callable[[int], None] | None = None, apart: bool = False
    ) -> None:
        if count < 1:
            raise ValueError(f"{count} threads can't do any work; it takes at least 1")
        shared: _Queue = queue.SimpleQueue()
        self._queues: list[_Queue] = [queue.SimpleQueue() if apart else shared for _ in range(count)]
        self._stopped = threading.Event()
        self.threads = [
            threading.Thread(
                target=_work,
                args=(tasks, start and functools.partial(start, i), self._stopped),
                name=f"{name}-{i}",
                daemon=True,
            )
            for i, tasks in enumerate(self._queues)
        ]
        weakref.finalize(self, _tell, self._queues, self._stopped).atexit = False
        _crews.add(self)
        for thread in self.threads:
            _threads.add(thread)
            thread.start()

    @property
    def closed(self) -> bool:
        """Whether its threads were told to stop."""
        return self._stopped.is_set()

    def put(self, task: Task[Any], worker: int = 0) -> None:
        """Have the task done; by thread `worker`, where threads work apart."""
        for part in range(task.job.parts):
            self._queues[worker].put((task, part))

    def close(self) -> None:
        """Stop the threads, and wait for the parts in their hands; harmless when repeated."""
        self.abandon()
        _wait_for(self.threads)

    def abandon(self) -> None:
        """Stop the threads without waiting: stuck ones end with what is in their hands, or with the program."""
        if not self.closed:
            _tell(self._queues, self._stopped)


class OrderedJobs(Iterator[R]):
    """The results of jobs, in order, computed by `threads` threads that are at most `ahead` jobs ahead.

    All threads work on the earliest job that has parts left. name: see `Crew`.

    An error of a job is raised where its result would have come, with the worker's traceback, and closes the
    iterator. An error of `jobs` is raised after the results of the jobs before it. `close` stops the threads after the
    part in hand; leaving the object to the garbage collector does the same.
    """

    def __init__(self, jobs: Iterable[Job[R]], *, threads: int, ahead: int, name: str = "fastload") -> None:
        self._jobs = iter(jobs)
        self._waiting: deque[Task[R]] = deque()
        self._done: queue.SimpleQueue[Task[R]] = queue.SimpleQueue()
        self._end: Exception | None = None
        self._crew = Crew(threads, name=name)
        for _ in range(max(ahead, 1)):
            self._submit()

    def _submit(self) -> None:
        if self._end is None:
            try:
                task = Task(next(self._jobs), self._done)
            except Exception as error:  # StopIteration, or an error of the jobs: raised in its turn
                # Without the traceback's first frame, which is this one and holds `self`.
                self._end = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            else:
                self._waiting.append(task)
                self._crew.put(task)

    def __next__(self) -> R:
        if not self._waiting:
            end = self._end or StopIteration()
            self.close()
            try:
                raise end
            finally:
                del end  # the traceback holds this frame: keep it from holding itself
        task = self._waiting.popleft()
        forget_finished(self._done)
        while not task.finished:
            wait_for_any(self._done)
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

    def close(self) -> None:
        """Stop the threads, each after the part in its hands, and drop all results; harmless when repeated."""
        self._crew.close()
        self._waiting.clear()
        self._end = StopIteration()


def forget_finished(done: queue.SimpleQueue[Task[R]]) -> None:
    """Empty the queue of finished tasks: they are found finished anyhow, and their results take up memory."""
    while not done.empty():
        done.get()


def wait_for_any(done: queue.SimpleQueue[Task[R]], seconds: float = 1.0) -> None:
    """Wait until another task is finished, for a second at most: an untimed wait can't be interrupted on Windows."""
    with contextlib.suppress(queue.Empty):
        done.get(timeout=min(seconds, 1.0))


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int, name: str
) -> OrderedJobs[R]:
    """`function` of each item, in order; see `OrderedJobs`."""
    return OrderedJobs((_Call(function, item) for item in items), threads=threads, ahead=ahead, name=name)
