"""Process workers: torch's own, with a guard, and with threads in them where that is asked for.

The iterator is torch's, and so is the loop that a worker runs (`torch.utils.data._utils.worker._worker_loop`): seeds,
signals, order, time-outs, pinning and shutdown are torch's. What is added stands at the edges of that loop:
- the queue of indices opens the `Ticket`s on them, so that each batch is read in its epoch;
- with `threads_per_worker` the same queue keeps the batches to itself, gives them to a crew of threads, and lets only
  through what is not a batch: torch's loop then waits, watches its parent, begins epochs and ends as it always does;
- batches are decoded straight into shared memory, and go to the consumer without a copy;
- what can't be pickled comes out as an error, where torch's loader would wait for ever;
- a worker's death is an error that says who died, of what, and over which batch; then all others are ended too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import queue
import signal
import threading
import traceback
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info
from torch.utils.data._utils.worker import _ResumeIteration
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .iterators import PassIterator, View, open_ticket
from .passes import Pass, Passes
from .reading import Reader
from .workers import Context, Crew, Task


class ProcessIterator(_MultiProcessingDataLoaderIter, PassIterator):
    """One pass over a loader with process workers, or one after another where they are persistent."""

    def __init__(self, loader: Any) -> None:
        self._passes: Passes = loader._index_sampler
        self._ahead: Pass | None = None
        self._numbers: dict[int, int] = {}
        self._last_received = 0
        self._workers: list[Any] = []
        self._index_queues: list[Any] = []
        self._shutdown = True  # until torch's constructor says otherwise
        view = View(
            loader,
            multiprocessing_context=_Context(loader.multiprocessing_context, loader.threads_per_worker),
            worker_init_fn=_Init(loader.worker_init_fn, self._passes.worker_states),
        )
        try:
            super().__init__(view)
        except Exception as error:
            starting = hasattr(self, "_worker_result_queue") and not self._worker_pids_set
            if starting and (isinstance(error, (TypeError, AttributeError)) or "pickl" in type(error).__name__.lower()):
                raise type(error)(f"{error}. {_advice(loader)}") from error
            raise

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """Begin the next pass; the work on it may have begun already."""
        complete = self._ahead is not None and self._rcvd_idx >= self._first_of_ahead
        if self._ahead is not None and not complete:
            self._passes.forget()
        if not first_iter:
            PassIterator._reset(self, loader)
        begun, ahead, self._ahead = self._sampler_iter, self._ahead, None
        if first_iter or begun is not ahead:
            self._numbers.clear()
            self._resumed: Pass | None = begun
            self._index_sampler: Any = begun  # torch takes iter() of it: that is this pass
            super()._reset(loader, first_iter)
            self._index_sampler = self._passes
            return
        while len(self._task_info) < self._prefetch_factor * self._num_workers:
            before = self._send_idx
            self._try_put_index()
            if self._send_idx == before:
                break

    def _try_put_index(self) -> None:
        if self._resumed is not None:
            for _ in range(self._resumed.turn):
                next(self._worker_queue_idx_cycle)
            for worker, state in self._resumed.workers.items():
                self._workers_status[worker] = not state["last"]
            self._resumed = None
        super()._try_put_index()

    def _next_index(self) -> Any:
        drawing = self._ahead or self._sampler_iter
        try:
            index = next(drawing)
        except StopIteration:
            if self._ahead is not None or not (self._persistent_workers and self._in_order):
                raise
            self._ahead = self._passes.ahead()
            if self._ahead is None:
                raise
            drawing, self._first_of_ahead = self._ahead, self._send_idx
            index = next(drawing)
        self._numbers[self._send_idx] = drawing.number
        return index

    def _next_data(self) -> Any:
        if self._ahead is not None and self._rcvd_idx >= self._first_of_ahead:
            raise StopIteration
        return super()._next_data()  # type: ignore[no-untyped-call]  # torch's

    def _get_data(self) -> Any:
        received = super()._get_data()  # type: ignore[no-untyped-call]  # torch's
        self._last_received = received[0]
        return received

    def _process_data(self, data: Any, worker_idx: int) -> Any:
        sent = self._rcvd_idx - 1 if self._in_order else self._last_received
        self._took(self._numbers.pop(sent))
        batch = super()._process_data(data, worker_idx)  # type: ignore[no-untyped-call]  # torch's
        return self._unpacked(batch, worker_idx)

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except RuntimeError as error:
            text = str(error)
            if text.startswith("DataLoader worker (pid"):
                raise RuntimeError(f"{text.strip()}. {self._last_words()}") from error
            if text.startswith("DataLoader timed out"):
                raise RuntimeError(f"{text}: {self._stop_stuck()}") from error
            raise

    def _shutdown_workers(self) -> None:
        if not self._shutdown:
            self._workers_status = [True] * len(self._workers)  # torch tells only those to end that still have work
        super()._shutdown_workers()

    def _last_words(self) -> str:
        """Who died, of what, over which batch. Ends all workers."""
        words = []
        for number, worker in enumerate(self._workers):
            worker.join(0.1)
            if worker.exitcode not in (None, 0):
                words.append(f"Worker {number} (pid {worker.pid}) {_cause(worker.exitcode)}{self._at_work(number)}")
        self._shutdown_workers()
        return f"{'; '.join(words) or 'A worker is gone'}. All workers were ended; iterate anew to start others"

    def _stop_stuck(self) -> str:
        """Who is stuck, over which batch. Ends all workers without waiting for them."""
        at_work = [(f"worker {i} (pid {w.pid}) is", self._at_work(i)) for i, w in enumerate(self._workers)]
        words = [who + what for who, what in at_work if what]
        self._abort()
        return f"{'; '.join(words)}. All workers were ended; raise timeout=, or look for what blocks in the dataset"

    def _abort(self) -> None:
        torch._C._remove_worker_pids(id(self))  # their end is no news
        self._worker_pids_set = False
        for worker in self._workers:
            worker.kill()
        self._shutdown_workers()

    def _at_work(self, worker: int) -> str:
        """The batch that a worker had in its hands, in words."""
        for sent, info in self._task_info.items():
            if len(info) == 1 and info[0] == worker:
                return f" at work on batch {self._numbers.get(sent, sent)}"
        return ""


class _Context:
    """A multiprocessing context whose processes run `_run`."""

    def __init__(self, context: Any, threads: int | None) -> None:
        self._context, self._threads = context or torch.multiprocessing, threads

    def Process(self, *, target: Any, args: tuple[Any, ...]) -> Any:  # noqa: N802, multiprocessing's name
        return self._context.Process(target=_run, args=(target, args, self._threads))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_context"], name)


class _Init:
    """What a worker does first: the user's function, and an iterable dataset is put where it was."""

    def __init__(self, init_fn: Any, states: dict[int, Any]) -> None:
        self._init_fn, self._states = init_fn, states

    def __call__(self, worker: int) -> None:
        if self._init_fn is not None:
            self._init_fn(worker)
        info = get_worker_info()
        if worker in self._states and info is not None:
            dataset: Any = info.dataset
            dataset.load_state_dict(self._states[worker]["state"])


def _run(loop: Any, args: tuple[Any, ...], threads: int | None) -> None:
    """What a worker process runs: torch's loop, between queues of ours."""
    Context.memory = "shared"
    bound = inspect.signature(loop).bind(*args)
    given = bound.arguments
    results = given["data_queue"]
    results._on_queue_feeder_error = functools.partial(_report, results, given["worker_id"])
    if threads is None:
        given["index_queue"] = _OpeningQueue(given["index_queue"])
        loop(*bound.args)
        return
    batches = _CrewQueue(given, threads)
    given["index_queue"], given["init_fn"] = batches, functools.partial(batches.start, given["init_fn"])
    try:
        loop(*bound.args)
    finally:
        batches.close()


class _OpeningQueue:
    """A queue of indices that opens their tickets."""

    def __init__(self, indices: Any) -> None:
        self._indices = indices

    def get(self, timeout: float) -> Any:
        item = self._indices.get(timeout=timeout)
        return (item[0], open_ticket(item[1])) if isinstance(item, tuple) else item


class _CrewQueue:
    """A queue of indices that has batches read by threads, and lets only the rest through."""

    def __init__(self, given: dict[str, Any], threads: int) -> None:
        self._indices, self._results, self._ending = given["index_queue"], given["data_queue"], given["done_event"]
        self._reader = Reader(given["dataset"], given["auto_collation"], given["collate_fn"])
        self._threads, self._name = threads, f"fastload-process-{given['worker_id']}-thread"
        self._crew: Crew | None = None
        self._idle = threading.Condition()
        self._under_way = 0

    def start(self, init_fn: Any, worker: int) -> None:
        """Begin to work, once the worker's own beginning has succeeded; before that, torch's loop reports why not."""
        if init_fn is not None:
            init_fn(worker)
        self._crew = Crew(self._threads, name=self._name)

    def get(self, timeout: float) -> Any:
        item = self._indices.get(timeout=timeout)
        if not isinstance(item, tuple) or self._crew is None or self._ending.is_set():
            if isinstance(item, _ResumeIteration):
                self._wait()  # results of the last epoch must not come after its end
            return item
        with self._idle:
            self._under_way += 1
        self._crew.put(_Batch(self._reader.job([item[1]], self), self, item[0]))
        raise queue.Empty

    def put(self, task: _Batch) -> None:
        """Send what a thread has read to the consumer."""
        with contextlib.suppress(ValueError):  # the queue is closed: the worker is ending
            self._results.put((task.number, task.outcome()))
        with self._idle:
            self._under_way -= 1
            self._idle.notify_all()

    def _wait(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._under_way == 0)

    def close(self) -> None:
        """End the threads."""
        if self._crew is not None:
            self._crew.close()


class _Batch(Task[list[Any]]):
    """A task that reads one batch."""

    def __init__(self, job: Any, sink: Any, number: int) -> None:
        super().__init__(job, sink)
        self.number = number

    def outcome(self) -> Any:
        """The batch, or the error to be raised in its place."""
        if self.error is None:
            return self.result[0]
        return ExceptionWrapper((type(self.error), self.error, self.error.__traceback__), where="in a worker thread")


def _report(results: Any, worker: int, error: Exception, item: Any) -> None:
    """Send an error that can be pickled in place of what can't; called where a queue fails to pickle."""
    number, what = item
    if isinstance(what, ExceptionWrapper):
        text = f"{what.exc_msg}\n{what.exc_type.__name__} can't be pickled ({error}), so it comes as a RuntimeError"
    else:
        text = (
            f"a batch can't be sent from DataLoader worker process {worker}: {error}. Return tensors, arrays, numbers, "
            f'texts and containers of these, or use worker_type="thread"\n{"".join(traceback.format_exception(error))}'
        )
    substitute = RuntimeError(text)
    results.put((number, ExceptionWrapper((RuntimeError, substitute, None), f"in DataLoader worker process {worker}")))


def _cause(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with exit code {exitcode}; what it printed stands above"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}" + (" (by the system, if memory ran out)" if name == "SIGKILL" else "")


def _advice(loader: Any) -> str:
    return (
        f"The worker processes can't be started: {type(loader.dataset).__name__}, collate_fn and worker_init_fn "
        'have to be picklable, defined at the top of a module. Or use worker_type="thread"'
    )
