"""Process workers: torch's own, with a guard, and with threads in them where that is asked for.

The iterator is torch's, and so is the loop that a worker runs (`torch.utils.data._utils.worker._worker_loop`): seeds,
signals, order, time-outs, pinning and shutdown are torch's. What is added stands at the edges of that loop:
- the queue of indices opens the `Ticket`s on them, so that each batch is read in its epoch;
- with `threads_per_worker` the same queue keeps the batches to itself, gives them to a crew of threads, and lets only
  through what is not a batch: torch's loop then waits, watches its parent, begins epochs and ends as it always does;
- batches are decoded straight into shared memory, and go to the consumer without a copy; no file in /dev/shm is needed;
- what can't be pickled comes out as an error, where torch's loader would wait for ever;
- a worker's death is an error that says who died, of what, and over which batch; then all others are ended too;
- workers that are no longer needed get a second to finish what is in their hands;
- workers whose main program was killed end within seconds, be it in the middle of a sample.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import queue
import select
import signal
import threading
import time
import traceback
import weakref
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data._utils.worker import ManagerWatchdog, _ResumeIteration
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from . import anonymous_memory
from .iterators import PassIterator, View, open_ticket
from .passes import Pass, Passes
from .reading import Reader, here
from .workers import PATIENCE, Context, Crew, Task

_SUSPICIONS = {
    "SIGKILL": " (by the system, if memory ran out)",
    "SIGBUS": " (was a store overwritten or cut while it was open? if not, shared memory may have run out)",
}
_TOO_MANY_FILES = (
    "DataLoader can't pass another batch on: too many files are open, and a batch in shared memory is one per tensor. "
    'Raise the limit (ulimit -n 4096), keep fewer batches, or use worker_type="thread"'
)
_WATCH_SECONDS = 1.0  # between two looks whether the main program still runs
_LOOK_SECONDS = 0.1  # between two looks for dead workers, where nothing wakes up who waits


class ProcessIterator(_MultiProcessingDataLoaderIter, PassIterator):
    """One pass over a loader with process workers, or one after another where they are persistent."""

    _owner: int | None = None

    def __init__(self, loader: Any) -> None:
        self._owner = os.getpid()
        self._passes: Passes = loader._index_sampler
        self._ahead: Pass | None = None
        self._numbers: dict[int, int] = {}
        self._readers: dict[int, int] = {}
        self._last_received: Any = None
        self._send_idx = 0
        self._advice = _advice(loader)
        self._workers: list[Any] = []
        self._index_queues: list[Any] = []
        self._shutdown = True  # until torch's constructor says otherwise
        self._ctrl_c = _CtrlC()
        view = View(
            loader,
            multiprocessing_context=_Context(loader.multiprocessing_context, loader.threads_per_worker, self._ctrl_c),
            worker_init_fn=_Init(loader.worker_init_fn, self._passes.worker_states),
        )
        try:
            super().__init__(view)
        except Exception as error:
            starting = hasattr(self, "_worker_result_queue") and len(self._workers) < loader.num_workers
            if starting and (isinstance(error, (TypeError, AttributeError)) or "pickl" in type(error).__name__.lower()):
                raise type(error)(f"{error}. {self._advice}") from error
            raise
        finally:
            self._ctrl_c.release()
        _wait_for_the_living(self, self._timeout)

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """Begin the next pass; the work on it may have begun already."""
        try:
            self._begin(loader, first_iter)
        except BaseException:  # Ctrl-C: what was asked of workers, and what they will answer, is not known any more
            self._abort()
            raise

    def _begin(self, loader: Any, first_iter: bool) -> None:
        if first_iter:
            self._start_feeding()
        if self._worker_pids_set:
            torch._C._remove_worker_pids(id(self))  # see `_try_get_data`
            self._worker_pids_set = False
        self._ctrl_c.release()  # all workers are known now, and can be ended
        complete = self._ahead is not None and self._rcvd_idx >= self._first_of_ahead
        if self._ahead is not None and not complete:
            self._passes.forget()
        if not first_iter:
            PassIterator._reset(self, loader)
        begun, ahead, self._ahead = self._sampler_iter, self._ahead, None
        if first_iter or begun is not ahead:
            self._numbers.clear()
            self._readers.clear()
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

    def _start_feeding(self) -> None:
        """Start the threads of the queues of indices, which Ctrl-C would leave behind if it came in between."""
        for indices in self._index_queues:
            with indices._notempty:
                indices._start_thread()

    def _try_put_index(self) -> None:
        if self._resumed is not None:
            for _ in range(self._resumed.turn % self._num_workers):
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
        try:
            received = super()._get_data()  # type: ignore[no-untyped-call]  # torch's
        except Exception as error:  # what should have come is lost
            raise RuntimeError(self._verdict(error)) from error
        self._last_received = received[0]
        if received[0] in self._task_info:
            self._readers[received[0]] = self._task_info[received[0]][0]
        return received

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> tuple[bool, Any]:
        """What has come from the workers, if anything does in `timeout` seconds. Raises if one died meanwhile.

        Torch has a signal handler raise the news of a death, wherever the program is then: in the middle of the user's
        code, of a queue's, whose lock stays taken, or where a file is being opened, which nobody closes any more.
        """
        if self._pin_memory:
            return self._pinned(timeout)
        results: Any = self._worker_result_queue
        reader = results._reader
        if reader.poll() or reader in wait([reader, *self._sentinels()], timeout):
            return True, self._data_queue.get()
        self._raise_if_dead()
        return False, None

    def _pinned(self, timeout: float) -> tuple[bool, Any]:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return True, self._data_queue.get(timeout=min(left, _LOOK_SECONDS))
            self._raise_if_dead()
        return False, None

    def _sentinels(self) -> list[Any]:
        return [worker.sentinel for worker, needed in zip(self._workers, self._workers_status, strict=True) if needed]

    def _raise_if_dead(self) -> None:
        dead = wait(self._sentinels(), 0)
        if dead:
            pids = ", ".join(str(worker.pid) for worker in self._workers if worker.sentinel in dead)
            raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly")

    def _process_data(self, data: Any, *worker: int) -> Any:  # torch 2.6 doesn't say which worker
        sent = self._rcvd_idx - 1 if self._in_order else self._last_received
        number, reader = self._numbers.pop(sent), self._readers.pop(sent)
        super()._process_data(None, *worker)  # type: ignore[no-untyped-call]  # torch's
        self._took(number)
        if isinstance(data, ExceptionWrapper):
            data.where += f", batch {number}"
        return self._unpacked(data, reader)

    def _mark_worker_as_unavailable(self, worker_id: int, shutdown: bool = False) -> None:
        super()._mark_worker_as_unavailable(worker_id, shutdown)
        if shutdown and worker_id == len(self._workers) - 1:  # all have been told to end
            self._wait_for_workers()
            self._end_workers()

    def _shutdown_workers(self) -> None:
        if os.getpid() != self._owner:  # a fork's copy of an iterator: its workers are another's
            return
        if not hasattr(self, "_workers_done_event"):  # Ctrl-C came before there was anything to end
            return
        if not self._shutdown:
            self._workers_status = [True] * len(self._workers)  # torch tells only those to end that still have work
            self._task_info: dict[int, Any] = {}
            self._rcvd_idx = self._send_idx
            if self._ahead is not None:
                self._passes.forget()
        super()._shutdown_workers()

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _end_workers(self) -> None:
        """End those that still live: a signal lets them leave no shared memory behind, unless they are stuck."""
        for worker in self._workers:
            if worker.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # another thread is about to note its end
                    os.kill(worker.pid, signal.SIGINT)
        self._wait_for_workers()
        for worker in self._workers:
            worker.kill()

    def _abort(self) -> None:
        self._end_workers()
        self._shutdown_workers()

    def _verdict(self, error: Exception) -> str:
        """What became of the workers: who died, of what, or is stuck, and over which batch. Ends them all."""
        dying = wait([worker.sentinel for worker in self._workers], timeout=0.1)  # for the news to be true
        for worker in self._workers:
            if worker.sentinel in dying:  # its files are closed; a moment later it is dead
                worker.join(PATIENCE)
        words = [str(error).strip()]
        timed_out = words[0].startswith("DataLoader timed out")
        if getattr(error, "errno", None) == errno.EMFILE or "ancdata" in words[0]:  # a message without its descriptors
            words = [_TOO_MANY_FILES]
        elif dying and isinstance(error, EOFError | ConnectionError):
            words = ["DataLoader lost what a worker was sending"]
        elif not words[0].startswith(("DataLoader", "Pin memory")):
            words = [f"What a DataLoader worker sent can't be received: {type(error).__name__}: {words[0]}"]
        for number, worker in enumerate(self._workers):
            at_work = self._at_work(number)
            if worker.exitcode is not None:
                words.append(f"Worker {number} (pid {worker.pid}){at_work} {_cause(worker.exitcode)}")
            elif timed_out and at_work:
                words.append(f"Worker {number} (pid {worker.pid}){at_work} did not finish")
        if timed_out:
            words.append("Raise timeout=, or look for what blocks in the dataset")
        elif self._last_received is None and any(worker.exitcode == 1 for worker in self._workers):
            words.append(self._advice)
        self._abort()
        return ". ".join([*words, "All workers were ended; iterate anew to start others"])

    def _at_work(self, worker: int) -> str:
        """The batch that a worker had in its hands, in words."""
        for sent, info in self._task_info.items():
            if len(info) == 1 and info[0] == worker:
                return f", at work on batch {self._numbers.get(sent, sent)},"
        return ""


def _wait_for_the_living(iterator: ProcessIterator, timeout: float) -> None:
    """Have the rest of a message waited for no longer than workers live, or than `timeout` seconds, if not 0.

    A message that ends in the middle is no end of the pipe: the other workers hold it open.
    """
    results: Any = iterator._worker_result_queue
    reader = results._reader
    if not isinstance(reader, Connection):  # a pipe of Windows: messages come whole
        return
    readable = select.poll()
    readable.register(reader, select.POLLIN)
    iterator = weakref.proxy(iterator)

    def read(handle: int, size: int) -> bytes:
        if not readable.poll(0):
            ready = wait([handle, *iterator._sentinels()], timeout or None)
            if not ready:
                raise TimeoutError(f"DataLoader timed out after {timeout} seconds")
            if handle not in ready:
                raise EOFError("it ends in the middle")
        return os.read(handle, size)

    reader._recv = functools.partial(type(reader)._recv, weakref.proxy(reader), read=read)  # type: ignore[attr-defined]


class _CtrlC:
    """Ctrl-C, put off while workers start: in the hooks around a fork Python would swallow it."""

    def __init__(self) -> None:
        self._before: Any = None
        self._came = False

    def hold(self) -> None:
        """Put it off from now on, in the main thread, which is the one that it interrupts."""
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not None:  # None: a handler that is not Python's
                signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: object) -> None:
        self._came = True

    def release(self) -> None:
        """Let it come, if it came meanwhile."""
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if self._came:
            self._came = False
            signal.raise_signal(signal.SIGINT)


class _Context:
    """A multiprocessing context whose processes run `_run`."""

    def __init__(self, context: Any, threads: int | None, ctrl_c: _CtrlC) -> None:
        self._context, self._threads, self._ctrl_c = context or torch.multiprocessing, threads, ctrl_c

    def Process(self, *, target: Any, args: tuple[Any, ...]) -> Any:  # noqa: N802, multiprocessing's name
        self._ctrl_c.hold()
        return self._context.Process(target=_run, args=(target, args, self._threads))

    def Event(self) -> _Flag:  # noqa: N802, multiprocessing's name
        return _Flag()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_context"], name)


class _Flag:
    """What torch uses of an event, without a lock: multiprocessing's has one, which a killed worker may hold."""

    def __init__(self) -> None:
        self._byte = anonymous_memory.zeros(1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return bool(self._byte[0])


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
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # runs between two instructions, and without a word
    anonymous_memory.install()
    Context.memory = "shared"
    threading.Thread(target=_end_with_main_program, name="fastload-watch", daemon=True).start()
    bound = inspect.signature(loop).bind(*args)
    given = bound.arguments
    results = given["data_queue"]
    results._on_queue_feeder_error = functools.partial(_report, results, given["worker_id"])
    if threads is None:
        given["index_queue"] = _OpeningQueue(given["index_queue"])
        loop(*bound.args)
    else:
        batches = _CrewQueue(given, threads)
        given["index_queue"], given["init_fn"] = batches, functools.partial(batches.start, given["init_fn"])
        with contextlib.closing(batches):
            loop(*bound.args)


def _end_with_main_program() -> None:
    """End this process when the main program is gone, whatever it is busy with or waits for.

    A pipe from it tells at once, and even of an end before this began; but where processes are forked, those that were
    forked later hold the pipe open too.
    """
    main_program, watchdog = parent_process(), ManagerWatchdog()
    assert main_program is not None
    while watchdog.is_alive() and not wait([main_program.sentinel], _WATCH_SECONDS):
        pass
    os._exit(1)


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
        return ExceptionWrapper((type(self.error), self.error, self.error.__traceback__), where=here())


def _report(results: Any, worker: int, error: Exception, item: Any) -> None:
    """Send an error that can be pickled in place of what can't; called where a queue fails to pickle."""
    number, what = item
    if isinstance(what, ExceptionWrapper):
        text = f"{what.exc_msg}\n{what.exc_type.__name__} can't be pickled ({error}), so it comes as a RuntimeError"
    elif getattr(error, "errno", None) == errno.EMFILE:
        text = _TOO_MANY_FILES
    else:
        text = (
            f"a batch can't be sent from DataLoader worker process {worker}: {error}. Return tensors, arrays, numbers, "
            f'texts and containers of these, or use worker_type="thread"\n{"".join(traceback.format_exception(error))}'
        )
    substitute = RuntimeError(text)
    results.put((number, ExceptionWrapper((RuntimeError, substitute, None), f"in DataLoader worker process {worker}")))


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}; what it printed stands above"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}{_SUSPICIONS.get(name, '')}"


def _advice(loader: Any) -> str:
    return (
        f"To start worker processes, {type(loader.dataset).__name__}, collate_fn and worker_init_fn have to be "
        'picklable: defined at the top of a module that can be imported. Or use worker_type="thread"'
    )
