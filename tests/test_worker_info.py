"""get_worker_info in worker threads: torch's own function tells each thread what it tells a worker process."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fastload import DataLoader, ImageDataset
from fastload.transforms import Resize
from fastload.worker_info import hidden_worker_info, set_worker_info

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Asks(Dataset[Any]):
    """A dataset of what get_worker_info says to whoever reads it."""

    thread_safe = True

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return get_worker_info()


def infos_of(loader: Any) -> list[Any]:
    return [info for batch in loader for info in batch]


def asks(samples: Any) -> list[Any]:
    """A collate_fn that keeps what it gets, and adds what it hears itself."""
    return [*samples, get_worker_info()]


def test_threads_are_told_what_processes_are() -> None:
    """By the function as it was imported before any loader: number, how many, a seed each, and the dataset itself."""
    data = Asks()
    loader = DataLoader(data, 2, num_workers=3, collate_fn=asks)
    infos = infos_of(loader)
    assert {info.id for info in infos} == {0, 1, 2}
    assert {info.num_workers for info in infos} == {3}
    assert all(info.dataset is data for info in infos)
    seeds = {info.id: info.seed for info in infos}
    assert [seeds[number] - seeds[0] for number in range(3)] == [0, 1, 2]
    assert infos[::3] == infos[1::3] == infos[2::3]
    assert torch.utils.data.get_worker_info is get_worker_info
    assert torch.utils.data._utils.worker.get_worker_info is get_worker_info


def test_seeds_are_the_loaders() -> None:
    """After torch.manual_seed they are those of torch's worker processes, and of another pass they are others."""

    def seeds(worker_type: Any) -> list[int]:
        torch.manual_seed(4)
        loader = DataLoader(Seeds(), 1, num_workers=2, worker_type=worker_type)
        return [int(seed) for _ in range(2) for seed in loader]

    threads = seeds("thread")
    assert threads == seeds("process")
    assert threads[0] != threads[12]


class Seeds(Asks):
    """A dataset of seeds alone, which go to another process."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return info.seed if info else -1


def test_the_callers_thread_is_no_worker() -> None:
    """Before, while threads work, after, and where the loader has no workers."""
    assert get_worker_info() is None
    loader = DataLoader(Asks(), 2, num_workers=2, collate_fn=asks)
    for _ in loader:
        assert get_worker_info() is None
    assert get_worker_info() is None
    assert set(infos_of(DataLoader(Asks(), 2, collate_fn=asks))) == {None}
    heard: list[Any] = []
    other = threading.Thread(target=lambda: heard.append(get_worker_info()))
    other.start()
    other.join()
    assert heard == [None]


def test_a_worker_init_fn_is_told() -> None:
    """It may change the dataset by it, as torch's documentation does with an iterable one."""
    heard: dict[int, Any] = {}

    def start(number: int) -> None:
        heard[number] = get_worker_info()
        heard[number].dataset.first = 10 * number

    class Stream(IterableDataset[int]):
        first = -1

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.first, self.first + 2))

    stream = Stream()
    loader = DataLoader(stream, 1, num_workers=2, worker_type="thread", worker_init_fn=start)
    assert sorted(int(number) for number in loader) == [0, 1, 10, 11]
    assert [heard[number].id for number in range(2)] == [0, 1]
    assert stream.first == -1


def test_iterable_datasets_are_copied_for_each_thread() -> None:
    """The info holds the copy; copies are distinct, and made anew unless workers are persistent."""

    class Stream(IterableDataset[Any]):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            info = get_worker_info()
            assert info is not None
            assert info.dataset is self
            yield info.dataset, self.passes

    for persistent, second in ((False, 1), (True, 2)):
        stream = Stream()
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=2,
            worker_type="thread",
            persistent_workers=persistent,
            collate_fn=lambda sample: sample,
        )
        first = list(loader)
        assert len({id(dataset) for dataset, _ in first} | {id(stream)}) == 3
        assert [passes for _, passes in first] == [1, 1]
        assert [passes for _, passes in loader] == [second, second]
        assert stream.passes == 0


def test_loaders_in_workers_have_workers_of_their_own() -> None:
    """Inside a worker, a loader without workers is part of it; one with threads tells those of themselves."""

    class Outer(Asks):
        def __getitem__(self, index: int) -> Any:
            before = get_worker_info()
            alone = infos_of(DataLoader(Asks(), 2, collate_fn=asks))
            inner = infos_of(DataLoader(Asks(), 2, num_workers=1, collate_fn=asks))
            return before, set(alone), {(info.id, info.num_workers) for info in inner}, get_worker_info()

        def __len__(self) -> int:
            return 4

    for before, alone, inner, after in DataLoader(Outer(), batch_size=None, num_workers=2, collate_fn=lambda x: x):
        assert before is after
        assert alone == {before}
        assert inner == {(0, 1)}
        assert before.num_workers == 2


def test_worker_processes_are_told_as_ever() -> None:
    """Also those that are forked after threads have worked in this process."""
    infos_of(DataLoader(Asks(), 2, num_workers=2, collate_fn=asks))
    processes = DataLoader(Numbered(), 1, num_workers=2, worker_type="process")
    assert [int(number) for number in processes] == [0, 1] * 6
    within = DataLoader(Numbered(), 1, num_workers=2, threads_per_worker=2)
    assert sorted(int(number) for number in within) == [0] * 6 + [1] * 6


class Numbered(Asks):
    """A dataset of the numbers of workers."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return info.id if info else -1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_from_a_worker_is_none() -> None:
    """What a worker thread forks is not that worker."""

    class Forks(Asks):
        def __getitem__(self, index: int) -> Any:
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()
            child = context.Process(target=lambda: queue.put(get_worker_info() is None))
            child.start()
            child.join()
            return queue.get()

        def __len__(self) -> int:
            return 2

    assert list(DataLoader(Forks(), batch_size=None, num_workers=1)) == [True, True]


def seed_everything(number: int) -> None:
    """The worker_init_fn of many projects."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("worker_init_fn", [None, seed_everything])
@pytest.mark.parametrize("persistent", [False, True])
def test_generators_of_the_process_are_left_alone(store_path: Path, worker_init_fn: Any, persistent: bool) -> None:
    """Threads seed none of them, and what a worker_init_fn seeds is put back; only the loader's own draw is made."""
    for data in (Asks(), ImageDataset(store_path, Resize((8, 8)))):
        loader: Any = DataLoader(
            data,
            4,
            num_workers=2,
            worker_init_fn=worker_init_fn,
            collate_fn=None if data.__class__ is ImageDataset else asks,
            persistent_workers=persistent,
        )
        seed_everything(9)
        expected = (random.getstate(), np.random.get_state()[1].tolist())
        torch.empty((), dtype=torch.int64).random_()
        if not persistent:
            torch.empty((), dtype=torch.int64).random_()
        left = torch.get_rng_state()
        seed_everything(9)
        for _ in range(2):
            list(loader)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == expected
        assert torch.equal(torch.get_rng_state(), left)


def test_torchs_threads_are_left_alone(store_path: Path) -> None:
    """A worker process is limited to one thread; the process that threads belong to is not."""
    before = torch.get_num_threads(), torch.get_num_interop_threads()
    list(DataLoader(ImageDataset(store_path, Resize((8, 8))), 4, num_workers=2))
    list(DataLoader(Asks(), 4, num_workers=2, collate_fn=asks))
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == before


def test_batches_of_threads_are_not_in_shared_memory() -> None:
    """torch's collate makes them there in workers, since they go to another process: here they don't."""

    class Tensors(Asks):
        def __getitem__(self, index: int) -> Any:
            return {"image": torch.full((3, 4), index), "array": np.full(3, index), "number": index}

    for batch in DataLoader(Tensors(), 4, num_workers=2):
        assert not any(value.is_shared() for value in batch.values())


def test_the_info_is_hidden_for_a_while_only() -> None:
    """And comes back after an error; of other threads it hides nothing."""
    heard: list[Any] = []

    def work() -> None:
        set_worker_info(3, 4, 99, "data")
        with contextlib.suppress(ZeroDivisionError), hidden_worker_info():
            heard.append(get_worker_info())
            raise ZeroDivisionError
        heard.append(get_worker_info())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    info = heard[1]
    assert heard[0] is None
    assert (info.id, info.num_workers, info.seed, info.dataset) == (3, 4, 99, "data")
    assert get_worker_info() is None


def test_newer_torch_gets_generators_for_each_thread() -> None:
    """Where WorkerInfo has `rng`: three generators, seeded with the worker's seed, of this thread alone."""
    if not hasattr(torch.utils.data._utils.worker, "_RNG"):
        pytest.skip("this torch has none")
    infos = {info.id: info for info in infos_of(DataLoader(Asks(), 2, num_workers=2, collate_fn=asks))}
    for info in infos.values():
        assert info.worker_method == "thread"
        assert info.rng.torch_generator.initial_seed() == info.seed
        assert info.rng.random_generator.random() == random.Random(info.seed).random()
        assert info.rng.numpy_generator.random() == np.random.default_rng(info.seed).random()
