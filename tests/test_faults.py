"""Nothing hangs: whatever befalls a worker, an error comes soon that says what it was, and nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from fastload import DataLoader, anonymous_memory

resource = pytest.importorskip("resource")  # not on Windows

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.name != "posix", reason="signals and processes are others on Windows"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

THREADS = {"worker_type": "thread"}
PROCESSES = {"worker_type": "process"}
HYBRID = {"worker_type": "process", "threads_per_worker": 2}
BATCHES = 6


def name_of(value: Any) -> str:
    """A parameter in a test's name."""
    if isinstance(value, bool):
        return "persistent" if value else ""
    if isinstance(value, dict):
        return "hybrid" if value == HYBRID else "processes" if value == PROCESSES else "threads"
    return str(value.__name__)


every_kind = pytest.mark.parametrize("kind", [THREADS, PROCESSES, HYBRID], ids=name_of)
every_process = pytest.mark.parametrize("kind", [PROCESSES, HYBRID], ids=name_of)
whether_persistent = pytest.mark.parametrize("persistent", [False, True], ids=name_of)


class Faulty(Dataset[Any]):
    """24 samples, of which one is a fault: `fault()` is what it gives. Batches of four: sample 5 is in batch 1."""

    def __init__(self, fault: Callable[[], Any] | None = None, bad: int = 5) -> None:
        self.fault, self.bad = fault, bad

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> Any:
        if index == self.bad and self.fault is not None:
            return self.fault()
        return torch.full((100,), index)


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 4, "num_workers": 2, **options})


# --- what may be left behind


def children() -> list[psutil.Process]:
    """All processes below this one, but for the helpers that multiprocessing keeps."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(process.cmdline()) and process.pid not in _helpers:
                found.append(process)
    return found


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload-")]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def soon(condition: Callable[[], Any], seconds: float = 10) -> bool:
    """Whether the condition comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Every test here ends without a worker, and without shared memory that was not there before."""
    before = shared_memory()
    _helpers.update(process.pid for process in children())  # a fork server, say, that an earlier test has started
    yield
    if children() or threads():
        gc.collect()
    assert soon(lambda: not children()), children()
    assert soon(lambda: not threads()), threads()
    after = shared_memory() - before
    assert soon(lambda: not after & shared_memory()), after


def drop(loader: DataLoader[Any]) -> None:
    """Let the workers of a persistent loader go."""
    loader._iterator = None


def assert_works(loader: DataLoader[Any]) -> None:
    """The loader can be used again, once its dataset is in order."""
    loader.dataset.fault = None
    assert [int(batch[0, 0]) for batch in loader] == list(range(0, 4 * BATCHES, 4))
    drop(loader)


# --- death


def by_sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def by_sigsegv() -> None:
    faulthandler.disable()  # without pytest's report of it
    ctypes.string_at(0)


def by_os_exit() -> None:
    os._exit(3)


def by_os_exit_0() -> None:
    os._exit(0)


def by_system_exit() -> None:
    sys.exit(4)


CAUSES = {
    by_sigkill: "was killed by SIGKILL",
    by_sigsegv: "was killed by SIGSEGV",
    by_os_exit: "ended with exit code 3",
    by_os_exit_0: "ended with exit code 0",
    by_system_exit: "ended with exit code 4",
}
DEATHS = [
    *((kind, False, death) for kind in (PROCESSES, HYBRID) for death in CAUSES),
    *((kind, True, by_sigkill) for kind in (PROCESSES, HYBRID)),
]
DEATHS.remove((HYBRID, False, by_system_exit))  # raised in a thread it is an error of the dataset


@pytest.mark.parametrize(("kind", "persistent", "death"), DEATHS, ids=name_of)
def test_the_death_of_a_worker_in_a_batch(kind: Any, persistent: bool, death: Any) -> None:
    """The error says who died of what over which batch; all others are ended though it is kept."""
    loader = loader_of(Faulty(death), persistent_workers=persistent, **kind)
    iterator = iter(loader)
    pid = iterator._workers[1].pid
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        list(iterator)
    assert time.monotonic() - begin < 4.5, "found by looking every five seconds"
    assert f"Worker 1 (pid {pid}), at work on batch 1, {CAUSES[death]}" in str(caught.value)
    assert children() == []
    assert list(iterator) == []
    assert_works(loader)


@every_kind
def test_a_dataset_that_exits_in_a_thread_ends_the_program(kind: Any) -> None:
    """SystemExit in a worker's thread is not lost; in a process without threads it is a death."""
    loader = loader_of(Faulty(by_system_exit), **kind)
    with pytest.raises(RuntimeError if kind is PROCESSES else SystemExit):
        list(loader)
    assert soon(lambda: not children() and not threads())
    assert_works(loader)


@every_process
def test_the_others_are_ended_though_they_are_at_work(kind: Any) -> None:
    """One worker dies while the other sleeps for half a minute: that one is not waited for."""
    loader = loader_of(Both(), **kind)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Worker 1 .*SIGKILL"):
        list(loader)
    assert children() == []
    assert time.monotonic() - begin < 15


class Both(Faulty):
    """Worker 0 sleeps, worker 1 dies."""

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            time.sleep(30)
        if index == 4:
            time.sleep(0.3)
            by_sigkill()
        return index


@every_process
@whether_persistent
def test_the_death_of_a_worker_between_batches(kind: Any, persistent: bool) -> None:
    """Killed while the loop's body runs, which it does not disturb: an error of the next batch that has to come."""
    loader = loader_of(Faulty(), persistent_workers=persistent, prefetch_factor=2, **kind)
    iterator = iter(loader)
    next(iterator)
    pid = iterator._workers[1].pid
    end(pid)  # its last batch has not been asked for
    with pytest.raises(RuntimeError, match=rf"Worker 1 \(pid {pid}\)(, at work on batch \d,)? was killed by SIGKILL"):
        list(iterator)
    assert children() == []
    assert len(list(loader)) == BATCHES
    drop(loader)


def end(pid: int) -> None:
    """Kill a process, and give the news of it time to come."""
    os.kill(pid, signal.SIGKILL)
    assert soon(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    time.sleep(0.1)


@every_process
def test_the_news_of_a_death_comes_where_batches_are_awaited(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has a signal handler raise it anywhere: in a file's opening, say, which then is never closed."""
    opened: list[Any] = []
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *_: opened.append(None))
    iterator = iter(loader_of(Faulty(), sampler=[0] * 4000, collate_fn=in_pieces, **kind))  # the end is far
    next(iterator)
    before = signal.getsignal(signal.SIGCHLD)
    raised: list[BaseException] = []

    def handler(*_: Any) -> None:
        try:
            before(*_)  # torch's: it raises where it is, if it knows of the dead
        except RuntimeError as error:
            raised.append(error)

    signal.signal(signal.SIGCHLD, handler)
    try:
        os.kill(iterator._workers[1].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"Worker 1 .* was killed by SIGKILL"):
            list(iterator)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (raised, opened) == ([], [])


def in_pieces(samples: list[Any]) -> list[Any]:
    """Many tensors: most deaths come while some of them are being handed over."""
    return [sample.clone() for sample in samples for _ in range(20)]


@pytest.mark.parametrize("death", [by_sigkill, by_os_exit_0], ids=name_of)
@every_process
def test_the_death_of_a_worker_whose_batches_are_pinned(kind: Any, death: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of torch's stands in between, which this machine may have no accelerator for: a stand-in for that."""
    if not torch.accelerator.is_available():
        for name, result in {"is_available": True, "current_device_index": 0, "set_device_index": None}.items():
            monkeypatch.setattr(torch.accelerator, name, lambda *_, result=result: result)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    loader = loader_of(Faulty(death), pin_memory=True, **kind)
    iterator = iter(loader)
    assert iterator._pin_memory
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"Worker 1 .* at work on batch 1, {CAUSES[death]}"):
        list(iterator)
    assert time.monotonic() - begin < 4.5
    assert_works(loader)


@every_process
def test_too_many_open_files(kind: Any) -> None:
    """Each tensor of a batch from a worker is one; where no more can be had, the error says what to do."""
    loader = loader_of(Faulty(), collate_fn=in_pieces, **kind)
    iterator = iter(loader)
    kept = [next(iterator)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 40, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"too many files are open.* Raise the limit \(ulimit -n 4096\)"):
            kept.extend(iterator)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert children() == []
    del kept
    assert len(list(loader)) == BATCHES


@every_process
def test_the_death_of_an_idle_persistent_worker(kind: Any) -> None:
    """Killed between two epochs it is an error of the next one; the one after that has new workers."""
    loader = loader_of(Faulty(), persistent_workers=True, **kind)
    assert len(list(loader)) == BATCHES
    pid = loader._iterator._workers[0].pid
    end(pid)
    with pytest.raises(RuntimeError, match=rf"Worker 0 \(pid {pid}\)(, at work on batch \d,)? was killed by SIGKILL"):
        list(loader)
    assert children() == []
    assert_works(loader)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("thread", [False, True], ids=["main", "thread"])
@every_process
def test_a_worker_ends_in_the_middle_of_a_message(kind: Any, thread: bool, how: signal.Signals) -> None:
    """Half a batch is in the pipe, which the other worker and this process hold open: the rest is not waited for."""
    timeout = 1 if how is signal.SIGSTOP else 0
    iterator = iter(loader_of(Faulty(), collate_fn=megabytes, num_workers=1, timeout=timeout, **kind))
    next(iterator)
    assert soon(iterator._worker_result_queue._reader.poll)
    os.kill(iterator._workers[0].pid, how)
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            list(iterator)
        except RuntimeError as error:
            caught.append(error)

    if thread:
        consumer = threading.Thread(target=consume, daemon=True)
        consumer.start()
        consumer.join(20)
    else:
        consume()
    assert re.search("did not finish" if timeout else r"Worker 0 .* was killed by SIGKILL", str(caught))
    assert children() == []


def two_views(samples: list[Any]) -> Any:
    """Two parts of one batch, in the same memory."""
    batch = torch.stack(samples)
    return batch[:2], batch[1:]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the memory of this system's batches has names")
@pytest.mark.parametrize("collate_fn", [default_collate, torch.stack, two_views], ids=name_of)
@every_process
def test_memory_without_a_name(kind: Any, collate_fn: Any) -> None:
    """No moment exists in which a death could leave a file in /dev/shm behind, or in which that could be full."""
    batch = next(iter(loader_of(Faulty(), collate_fn=collate_fn, **kind)))
    parts = [batch] if isinstance(batch, torch.Tensor) else batch
    assert all("/memfd:fastload" in mapping_of(part.data_ptr()) for part in parts)
    assert parts[0].is_shared()
    assert [int(part[0, 0]) for part in parts] == list(range(len(parts)))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_memory_has_names_where_the_system_has_no_other(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """In a sandbox, or a Python built for an old system: torch's own way is left alone."""

    def refuse(name: str) -> int:
        raise error

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    before = torch.UntypedStorage._new_using_fd_cpu
    anonymous_memory.install()
    assert torch.UntypedStorage._new_using_fd_cpu == before


def mapping_of(address: int) -> str:
    """The line of /proc/self/maps that an address lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= address < end:
            return line
    raise AssertionError("not mapped")


# --- what a worker may raise


class OddError(Exception):
    """An exception that can't be made from a text."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other} don't match")


def raise_odd() -> None:
    raise OddError(1, 2)


def raise_local() -> None:
    class LocalError(Exception):
        """An exception that can't be pickled."""

    raise LocalError("from inside")


def run_out_of_memory() -> Any:
    return bytearray(1 << 60)


def give_what_cant_be_sent() -> Any:
    return lambda: None


class Unreadable:
    """Can be pickled, but not be read again."""

    def __reduce__(self) -> Any:
        return raise_odd, ()


def give_what_cant_be_received() -> Any:
    return Unreadable()


def plain(samples: list[Any]) -> list[Any]:
    """A collate_fn that takes anything."""
    return samples


RAISED = {
    raise_odd: "1 and 2 don't match",
    raise_local: "from inside",
    run_out_of_memory: "MemoryError",
}


@every_kind
@whether_persistent
@pytest.mark.parametrize("fault", RAISED, ids=name_of)
def test_an_error_of_the_dataset(kind: Any, persistent: bool, fault: Any) -> None:
    """It names worker and batch, whatever its class; batches go on after it; dropped, it holds no worker."""
    loader = loader_of(Faulty(fault), persistent_workers=persistent, **kind)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(Exception, match=RAISED[fault]) as caught:
        next(iterator)
    text = str(caught.value)
    assert re.search(r"in DataLoader worker (process 1|thread fastload-(process|worker)-1)", text)
    assert "batch 1" in text if kind is not THREADS else "index 5" in text
    assert len(list(iterator)) == BATCHES - 2
    gc.collect()
    gc.disable()
    try:
        iterator = iter(loader)
        with pytest.raises(Exception, match=RAISED[fault]):
            list(iterator)
        del iterator, caught
        drop(loader)
        assert soon(lambda: not children() and not threads(), 5), "the error holds the workers"
    finally:
        gc.enable()
    assert_works(loader)


@every_process
def test_a_batch_that_cant_be_pickled(kind: Any) -> None:
    """It comes out as an error that says what to do, and the batches after it come."""
    loader = loader_of(Faulty(give_what_cant_be_sent), collate_fn=plain, **kind)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RuntimeError, match=r'worker process 1(.|\n)*worker_type="thread"'):
        next(iterator)
    assert len(list(iterator)) == BATCHES - 2


@every_process
@whether_persistent
def test_a_batch_that_cant_be_unpickled(kind: Any, persistent: bool) -> None:
    """It is lost on its way, and nobody knows which it was: the workers are ended instead of being waited for."""
    loader = loader_of(Faulty(give_what_cant_be_received), collate_fn=plain, persistent_workers=persistent, **kind)
    with pytest.raises(RuntimeError, match="can't be received: OddError: 1 and 2 don't match") as caught:
        list(loader)
    assert children() == []
    assert isinstance(caught.value.__cause__, OddError)
    assert_of_plain(loader)


def assert_of_plain(loader: DataLoader[Any]) -> None:
    loader.dataset.fault = None
    assert len(list(loader)) == BATCHES
    drop(loader)


@every_process
def test_a_worker_without_memory(kind: Any) -> None:
    """Under a limit of its memory a worker gives a MemoryError, or dies of it; both are told."""
    loader = loader_of(Hungry(), **kind)
    with pytest.raises((MemoryError, RuntimeError), match=r"[Ww]orker (process 1|thread fastload-process-1|1 \(pid)"):
        list(loader)


class Hungry(Faulty):
    """Worker 1 limits itself to the memory it has and 100 MB, and wants a gigabyte."""

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(
                resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), resource.RLIM_INFINITY)
            )
            return bytearray(1 << 30)
        return index


@every_kind
@whether_persistent
def test_an_error_in_collate_fn(kind: Any, persistent: bool) -> None:
    """It comes with worker and traceback, and the batches after it come."""
    loader = loader_of(Faulty(), collate_fn=collate_badly, persistent_workers=persistent, **kind)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ZeroDivisionError, match=r"in DataLoader worker .*1") as caught:
        next(iterator)
    assert "in collate_badly" in str(caught.value)
    assert len(list(iterator)) == BATCHES - 2


def collate_badly(samples: Any) -> Any:
    return samples if int(samples[0][0]) != 4 else 1 / 0


@every_kind
def test_an_error_in_worker_init_fn(kind: Any) -> None:
    """It comes instead of the worker's first batch, and leaves no worker once it is dropped."""
    loader = loader_of(Faulty(), worker_init_fn=start_badly, **kind)
    with pytest.raises(PermissionError, match="worker 1 may not"):
        list(loader)


def start_badly(worker: int) -> None:
    if worker == 1:
        raise PermissionError("worker 1 may not")


class Broken(Sampler[int]):
    """A sampler that fails after two batches."""

    def __iter__(self) -> Iterator[int]:
        yield from range(8)
        raise OSError("no more indices")


@every_kind
@whether_persistent
def test_an_error_in_the_sampler(kind: Any, persistent: bool) -> None:
    """It reaches the user, whoever draws; the next epoch begins anew."""
    loader = loader_of(Faulty(), sampler=Broken(), persistent_workers=persistent, **kind)
    for _ in range(2):
        with pytest.raises(OSError, match="no more indices"):
            list(loader)
    drop(loader)


@every_kind
def test_a_stop_iteration_is_an_error(kind: Any) -> None:
    """A stray StopIteration in a dataset does not shorten the epoch."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(loader_of(Faulty(stop), **kind))


def stop() -> None:
    raise StopIteration


# --- what is stuck


def sleep() -> None:
    time.sleep(1 if in_main_process() else 30)


def sleep_in_c() -> None:
    ctypes.CDLL(None).sleep(1 if in_main_process() else 30)


def hold_the_lock() -> None:
    ctypes.PyDLL(None).sleep(30)


def in_main_process() -> bool:
    return multiprocessing.parent_process() is None


STUCK = [
    *((kind, False, fault) for kind in (THREADS, PROCESSES, HYBRID) for fault in (sleep, sleep_in_c, hold_the_lock)),
    *((kind, True, sleep) for kind in (THREADS, PROCESSES, HYBRID)),
]
STUCK.remove((THREADS, False, hold_the_lock))  # nothing of the program runs then


@pytest.mark.parametrize(("kind", "persistent", "fault"), STUCK, ids=name_of)
def test_what_is_stuck_is_a_timeout(kind: Any, persistent: bool, fault: Any) -> None:
    """The error names worker and batch; processes are ended though it is kept, threads when their call returns."""
    loader = loader_of(Faulty(fault), persistent_workers=persistent, timeout=0.4, **kind)
    iterator = iter(loader)
    who = "worker thread 1" if kind is THREADS else rf"Worker 1 \(pid {iterator._workers[1].pid}\)"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"timed out after 0.4 seconds.*{who}.* batch 1"):
        list(iterator)
    assert time.monotonic() - begin < 5, "those that are stuck were waited for"
    assert children() == []
    assert len(threads()) <= 1
    loader.timeout = 30
    assert list(iterator) == []
    assert_works(loader)


@every_process
def test_ctrl_c_while_workers_start(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in a hook around a fork, where Python would swallow it: it is raised, and no worker stays."""
    armed = [True]

    def interrupt() -> None:
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    os.register_at_fork(after_in_parent=interrupt)
    before = signal.getsignal(signal.SIGINT)
    loader = loader_of(Faulty(), multiprocessing_context="fork", **kind)
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    assert not armed
    assert signal.getsignal(signal.SIGINT) is before
    gc.collect()
    assert soon(lambda: not children()), children()
    assert_works(loader)


# --- over and over


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(THREADS, raise_odd), (PROCESSES, raise_odd), (PROCESSES, by_sigkill), (HYBRID, raise_odd), (HYBRID, by_sigkill)],
    ids=name_of,
)
def test_faults_use_nothing_up(kind: Any, fault: Any) -> None:
    """After twenty faults as many files are open as after one."""
    loader = loader_of(Faulty(fault), **kind)
    counts = []
    for _ in range(21):
        with pytest.raises(RuntimeError):
            list(loader)
        counts.append(psutil.Process().num_fds())
    assert soon(lambda: psutil.Process().num_fds() <= counts[0] + 2), counts


# --- loaders in odd places


@every_kind
def test_several_iterators_are_left_in_the_middle(kind: Any) -> None:
    """Breaks, live iterators side by side and one that was never asked: dropped, none leaves a worker."""
    loader = loader_of(Faulty(), **kind)
    for _ in loader:
        break
    live = [iter(loader) for _ in range(3)]
    assert [int(next(iterator)[0, 0]) for iterator in (live[0], live[0], live[1])] == [0, 4, 0]
    del live
    assert soon(lambda: not children() and not threads())
    assert_works(loader)


@every_kind
def test_a_loader_in_a_thread(kind: Any) -> None:
    """A loop in a thread of the user's works, and an error in it is raised there."""
    outcomes: list[Any] = []

    def loop() -> None:
        loader = loader_of(Faulty(raise_odd), **kind)
        with pytest.raises(RuntimeError, match="don't match"):
            list(loader)
        assert_works(loader)
        outcomes.append("ended")

    thread = threading.Thread(target=loop, name="user")
    thread.start()
    thread.join(30)
    assert outcomes == ["ended"]


class Nested(Faulty):
    """Each sample is the sum of an epoch of another loader."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return sum(int(batch.sum()) for batch in loader_of(Faulty(), **self.options))


@pytest.mark.parametrize(
    ("kind", "inner"),
    [(THREADS, THREADS), (THREADS, PROCESSES), (THREADS, HYBRID), (PROCESSES, THREADS), (HYBRID, THREADS)],
    ids=name_of,
)
def test_a_loader_in_a_worker_of_another(kind: Any, inner: Any) -> None:
    """Only processes in processes are impossible: multiprocessing's workers may have no children."""
    batches = list(loader_of(Nested(inner), batch_size=2, **kind))
    assert [batch.tolist() for batch in batches] == [[100 * sum(range(24))] * 2] * 2


class Forks(Faulty):
    """Each sample comes from a process that is forked where it is asked for, and loads there."""

    def __getitem__(self, index: int) -> Any:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            worker = torch.utils.data.get_worker_info()
            known = worker is not None and in_main_process()
            total = sum(len(batch) for batch in loader_of(Faulty(), **THREADS))
            os.write(writer, f"{known} {total}".encode())
            os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as lines:
            text = lines.read()
        assert os.waitpid(pid, 0)[1] == 0
        return text


@every_kind
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_in_a_worker(kind: Any) -> None:
    """A process that is forked in a worker thread is no worker, and can load by itself."""
    batches = list(loader_of(Forks(), batch_size=3, sampler=range(6), **kind))
    assert batches == [[f"{False} {4 * BATCHES}"] * 3] * 2


# --- whole programs

ZYGOTE = """
import json, os, sys
import fastload, psutil, test_faults
def fork():
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            pid, status = os.waitpid(task["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(os.open(task["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(os.open(task["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            return task["code"]
        print(json.dumps(pid), flush=True)
    os._exit(0)
exec(fork(), globals())
"""


class Program:
    """A program under test: a process with a session of its own, whose output goes to files."""

    def __init__(self, zygote: Any, code: str, folder: Path) -> None:
        self._zygote = zygote
        self.out, self.err = folder / f"{next(_numbers)}.out", folder / f"{next(_numbers)}.err"
        self.out.touch()
        self.err.touch()
        self.pid = self._ask(code=textwrap.dedent(code), out=str(self.out), err=str(self.err))
        self.status: int | None = None

    def _ask(self, **task: Any) -> Any:
        print(json.dumps(task), file=self._zygote.stdin, flush=True)
        return json.loads(self._zygote.stdout.readline())

    def processes(self) -> list[psutil.Process]:
        """All that are left of it, orphans too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def said(self, *words: str) -> None:
        """Wait until it has printed all of these."""
        assert soon(lambda: all(word in self.out.read_text() for word in words), 20), self.err.read_text()

    def ended(self) -> bool:
        if self.status is None:
            self.status = self._ask(wait=self.pid)
        return self.status is not None


_numbers = itertools.count()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Any]:
    """An interpreter with everything imported, which forks the programs under test: that takes no time."""
    command = [sys.executable, "-c", ZYGOTE]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        _helpers.add(process.pid)
        try:
            yield process
        finally:
            process.kill()


_helpers: set[int] = set()


@pytest.fixture
def run(zygote: Any, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program; whatever is left of it at the end is killed."""
    programs: list[Program] = []

    def start(code: str, **values: Any) -> Program:
        preface = f"from test_faults import *\nglobals().update(pickle.loads({pickle.dumps(values)!r}))\n"
        programs.append(Program(zygote, preface + textwrap.dedent(code), tmp_path))
        return programs[-1]

    yield start
    for program in programs:
        for process in program.processes():
            process.kill()
        assert soon(program.ended)


class Sleeper(Faulty):
    """From sample `bad` on, workers sleep, and say so before."""

    def __init__(self, bad: int, seconds: float = 30) -> None:
        super().__init__(bad=bad)
        self.seconds = seconds

    def __getitem__(self, index: int) -> Any:
        if index >= self.bad:
            os.write(1, b"busy\n")
            time.sleep(self.seconds)
        return torch.full((100,), index)


LOOPS = {
    "next": """
        for batch in loader_of(Sleeper(0), **kind):
            pass
        """,
    "body": """
        for batch in loader_of(Sleeper(4), **kind):
            print("body", flush=True)
            time.sleep(30)
        """,
    "kept iterator": """
        loader = loader_of(Sleeper(4), persistent_workers=True, **kind)
        iterator = iter(loader)
        next(iterator)
        print("body", flush=True)
        time.sleep(30)
        """,
}


@every_kind
def test_ctrl_c(run: Any, kind: Any) -> None:
    """It ends the program at once with one traceback, whatever main program and workers are doing."""
    programs = {(loop, kill): run(code, kind=kind) for loop, code in LOOPS.items() for kill in (os.kill, os.killpg)}
    for (loop, _), program in programs.items():
        program.said("busy", *(["body"] if loop != "next" else []))
    time.sleep(0.2)
    for (_, kill), program in programs.items():
        kill(program.pid, signal.SIGINT)
    for which, program in programs.items():
        assert soon(program.ended), which
        assert soon(lambda of=program: not of.processes()), which
        assert program.status == -signal.SIGINT, which
        errors = program.err.read_text()
        assert errors.count("Traceback") == 1, (which, errors)
        assert errors.rstrip().endswith("KeyboardInterrupt"), (which, errors)


@every_kind
def test_ctrl_c_in_a_session_that_goes_on(run: Any, kind: Any) -> None:
    """As in IPython the exception is kept, and with it all frames: the workers are gone nevertheless."""
    programs = []
    for loop in ("next", "body"):
        cell = (
            textwrap.dedent(LOOPS[loop])
            .replace("Sleeper(0)", "Sleeper(0, 0.2)")
            .replace("Sleeper(4)", "Sleeper(4, 0.2)")
        )
        programs.append(run(f"def cell():\n{textwrap.indent(cell, '    ')}\n{SESSION}", kind=kind))
        programs[-1].said("busy", *(["body"] if loop == "body" else []))
    for program in programs:
        os.killpg(program.pid, signal.SIGINT)
    for program in programs:
        assert soon(program.ended)
        assert program.out.read_text().endswith("left: nothing\n")
        assert (program.status, program.err.read_text()) == (0, "")


SESSION = """
try:
    cell()
except KeyboardInterrupt as error:
    kept = error
    print("left:", "nothing" if soon(lambda: not children() and not threads(), 5) else (children(), threads()))
"""


LIVES = {
    "idle": """
        iterator = iter(loader_of(Faulty(), **kind))
        next(iterator)
        print("ready", flush=True)
        time.sleep(60)
        """,
    "sending": """
        iterator = iter(loader_of(Faulty(), collate_fn=megabytes, **kind))
        print("ready", flush=True)
        time.sleep(60)
        """,
    "in a sample": """
        iterator = iter(loader_of(Sleeper(0, 60), **kind))
        print("ready", flush=True)
        time.sleep(60)
        """,
}


def megabytes(samples: Any) -> Any:
    """A batch that does not fit into a pipe."""
    return [b"x" * (1 << 20)]


def test_workers_end_when_the_main_program_is_killed(run: Any) -> None:
    """Within seconds: idle ones, such as can't get rid of their batches, or are in a sample, or have hardly begun."""
    hardly_begun = {"multiprocessing_context": "spawn", "num_workers": 1}  # and the tracker of multiprocessing
    kinds = [(PROCESSES, LIVES), (HYBRID, LIVES), (HYBRID | hardly_begun, ["in a sample"])]
    programs = [run(LIVES[life], kind=kind) for kind, lives in kinds for life in lives]
    for program in programs:
        program.said("ready")
        assert soon(lambda of=program: len(of.processes()) == 3)
    time.sleep(0.3)
    for program in programs:
        os.kill(program.pid, signal.SIGKILL)
    assert soon(lambda: not any(program.processes() for program in programs), 15), [p.processes() for p in programs]


@every_process
def test_a_forks_copy_of_an_iterator_is_none_of_its_business(run: Any, kind: Any) -> None:
    """It goes without a word, and the workers of the program that made it work on."""
    program = run(COPY, kind=kind)
    assert soon(program.ended, 20)
    assert (program.out.read_text(), program.err.read_text()) == (f"{BATCHES - 1} batches more\n", "")


COPY = """
iterator = iter(loader_of(Faulty(), persistent_workers=True, **kind))
next(iterator)
if os.fork() == 0:
    del iterator
    gc.collect()
    os._exit(0)
os.wait()
print(len(list(iterator)), "batches more")
"""


@every_process
def test_ctrl_c_while_workers_begin_anew(kind: Any) -> None:
    """What they answer to the epoch that never began is not taken for batches of the next one."""
    loader = loader_of(Sleeper(8, 0.5), persistent_workers=True, **kind)
    next(iter(loader))
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            iter(loader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    loader.dataset.seconds = 0
    assert_works(loader)
    drop(loader)


@every_process
def test_ctrl_c_while_queues_start_their_threads(kind: Any) -> None:
    """Python's queues forget a thread that was not quite started; none stays."""

    def interrupt(*_: Any) -> None:
        sys.setprofile(None)
        if threading.current_thread().name == "QueueFeederThread":
            os.kill(os.getpid(), signal.SIGINT)

    threading.setprofile(interrupt)  # called in each new thread, while the one that starts it still waits for it
    try:
        with pytest.raises(KeyboardInterrupt):
            iter(loader_of(Faulty(), **kind))
    finally:
        threading.setprofile(None)
    gc.collect()
    assert soon(lambda: "QueueFeederThread" not in [thread.name for thread in threading.enumerate()])


class NoSemaphores(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
    """A system that has none left."""

    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802, multiprocessing's name
        raise OSError("no more semaphores")


def test_an_iterator_that_could_not_be_made() -> None:
    """The error is the user's, and nothing else is said when the iterator goes."""
    with pytest.raises(OSError, match="no more semaphores"):
        iter(loader_of(Faulty(), multiprocessing_context=NoSemaphores(), **PROCESSES))
    gc.collect()


class Watching(Dataset[Any]):
    """Says whether the workers of an iterator have been told to end: two samples before that, two after."""

    def __init__(self, flag: Any) -> None:
        self.flag = flag

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bool:
        if index >= 2:
            assert soon(self.flag.is_set, 20)
        return bool(self.flag.is_set())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_worker_can_hold_no_lock_of_what_tells_workers_to_end(method: str) -> None:
    """It is a byte that all of them see: multiprocessing's Event has a lock, and waiting for that would never end."""
    iterator = iter(loader_of(Faulty(), num_workers=1, **PROCESSES))
    flag = type(iterator._workers_done_event)()
    assert [type(value) for value in vars(flag).values()] == [torch.Tensor]
    options = {"batch_size": 1, "num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": method}
    batches = iter(loader_of(Watching(flag), **options, **PROCESSES))
    assert [bool(next(batches)) for _ in range(2)] == [False, False]
    flag.set()
    assert [bool(batch) for batch in batches] == [True, True]


@every_kind
def test_the_program_ends_with_live_iterators(run: Any, kind: Any) -> None:
    """It does not wait for them, and they say nothing, be they idle or at work."""
    programs = [run(LIVE, kind=kind, dataset=dataset) for dataset in (Faulty(), Sleeper(8))]
    for program in programs:
        assert soon(program.ended, 20)
        assert (program.status, program.err.read_text()) == (0, "")
        assert not program.processes()


LIVE = """
loaders = [loader_of(dataset, persistent_workers=persistent, **kind) for persistent in (False, True)]
iterators = [iter(loader) for loader in loaders]
for iterator in iterators:
    next(iterator)
cycle = [iterators]
cycle.append(cycle)
"""


# --- processes that are started anew

SPAWNED = {
    "of a notebook": """
        class Here(Faulty):
            pass

        loader = loader_of(Here(), num_workers=1, multiprocessing_context="spawn", **kind)
        try:
            list(loader)
        except Exception as error:
            print(f"error: {error}")
        loader = loader_of(Here(), **THREADS)
        print(f"with threads: {len(list(loader))}")
        """,
    "of a module that can't be imported there": """
        sys.path.insert(0, folder)
        import broken

        loader = loader_of(broken.Dataset(), num_workers=1, multiprocessing_context="spawn", **kind)
        try:
            list(loader)
        except Exception as error:
            print(f"error: {error}")
        """,
    "that dies": """
        loader = loader_of(Faulty(by_sigkill), num_workers=1, multiprocessing_context="spawn", **kind)
        try:
            list(loader)
        except Exception as error:
            print(f"error: {error}")
        """,
}
BROKEN = """
import multiprocessing
from test_faults import Faulty as Dataset_
if multiprocessing.current_process().name != "MainProcess":
    raise OSError("not in this process")
class Dataset(Dataset_):
    pass
"""


def test_spawned_workers(run: Any, tmp_path: Path) -> None:
    """What can't be started says so, and what to do; a death is told as that of a forked worker."""
    (tmp_path / "broken.py").write_text(BROKEN)
    programs = {what: run(code, kind=HYBRID, folder=str(tmp_path)) for what, code in SPAWNED.items()}
    said = {}
    for what, program in programs.items():
        assert soon(program.ended, 50), what
        assert program.status == 0, (what, program.status)
        said[what] = program.out.read_text()
        assert re.search(r"error: .*Worker 0 \(pid \d+\), at work on batch [01],", said[what]), (
            said,
            program.err.read_text(),
        )
        assert soon(lambda of=program: not of.processes()), what
    for what in ("of a notebook", "of a module that can't be imported there"):
        assert 'Or use worker_type="thread"' in said[what]
    assert f"with threads: {BATCHES}" in said["of a notebook"]
    assert "OSError: not in this process" in programs["of a module that can't be imported there"].err.read_text()
    assert "SIGKILL" in said["that dies"]
