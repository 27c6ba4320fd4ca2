"""States of loaders and prefetchers: stopped anywhere, a run goes on as if nothing had been, on whatever workers."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numbered import Counted, Epochs, Numbers
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import DataLoader, DevicePrefetcher, ImageDataset, ShuffleSampler
from fastload.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

THREADS: dict[str, Any] = {"num_workers": 2, "worker_type": "thread"}
PROCESSES: dict[str, Any] = {"num_workers": 2, "worker_type": "process"}
WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "threads": THREADS,
    "persistent threads": {**THREADS, "persistent_workers": True},
    "processes": PROCESSES,
    "persistent processes": {**PROCESSES, "persistent_workers": True},
    "threads in processes": {"num_workers": 2, "threads_per_worker": 2},
}
CHEAP = ("none", "threads", "persistent threads")


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Some(Sampler[int]):
    """A sampler of a user: some indices, some of them twice."""

    def __iter__(self) -> Iterator[int]:
        return iter([5, 5, 0, 11, 3, 1, 2])

    def __len__(self) -> int:
        return 7


def images_of(path: Path, **options: Any) -> ImageDataset:
    return ImageDataset(path, Compose([RandomResizedCrop(16), RandomHorizontalFlip()]), **options)


def plain(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def drawn(batches: Any) -> list[Any]:
    return [plain(batch) for batch in batches]


def assert_same(got: Any, expected: Any) -> None:
    """The same batches or states, bit by bit."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for name, value in expected.items():
            assert_same(got[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


# --- every order on every kind of worker

ORDERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ShuffleSampler": lambda data: {"sampler": ShuffleSampler(data, seed=3)},
    "windows": lambda data: {"sampler": ShuffleSampler(data, window=4)},
    "weights": lambda data: {"sampler": ShuffleSampler(data, weights=[9.0, 9.0] + [0.5] * (len(data) - 2))},
    "in order": lambda data: {"sampler": ShuffleSampler(data, shuffle=False)},
    "passes": lambda data: {"sampler": ShuffleSampler(data, seed=3, repeat=2)},
    "passes by weight": lambda data: {"sampler": ShuffleSampler(data, weights=[1.0] * len(data), repeat=2)},
    "passes of one of two ranks": lambda data: {"sampler": ShuffleSampler(data, rank=1, world=2, repeat=3)},
    "one of two ranks": lambda data: {"sampler": ShuffleSampler(data, rank=1, world=2), "batch_size": 2},
    "shuffle": lambda data: {"shuffle": True},
    "shuffle, generator": lambda data: {"shuffle": True, "generator": generator()},
    "shuffle, drop_last": lambda data: {"shuffle": True, "generator": generator(), "drop_last": True},
    "RandomSampler": lambda data: {"sampler": RandomSampler(data, generator=generator())},
    "RandomSampler, replacement": lambda data: {
        "sampler": RandomSampler(data, replacement=True, num_samples=40, generator=generator()),
        "batch_size": 7,
    },
    "RandomSampler, more": lambda data: {
        "sampler": RandomSampler(data, num_samples=len(data) + 5, generator=generator())
    },
    "sequential": lambda data: {},
    "WeightedRandomSampler": lambda data: {
        "sampler": WeightedRandomSampler(range(1, len(data) + 1), 14, generator=generator())
    },
    "WeightedRandomSampler, global": lambda data: {"sampler": WeightedRandomSampler([1.0] * len(data), 12)},
    "SubsetRandomSampler": lambda data: {"sampler": SubsetRandomSampler(range(3, 12), generator=generator())},
    "DistributedSampler": lambda data: {"sampler": DistributedSampler(data, 2, 1), "batch_size": 2},
    "a user's sampler": lambda data: {"sampler": Some(), "batch_size": 3},
    "a list": lambda data: {"sampler": [3, 1, 2, 0, 7], "batch_size": 2},
    "a list of batches": lambda data: {"batch_sampler": [[1, 2], [3], [4, 5, 6, 0, 0, 1]], "batch_size": 1},
    "BatchSampler": lambda data: {
        "batch_sampler": BatchSampler(RandomSampler(data, generator=generator()), 5, False),
        "batch_size": 1,
    },
    "BatchSampler of ShuffleSampler": lambda data: {
        "batch_sampler": BatchSampler(ShuffleSampler(data, seed=3), 5, True),
        "batch_size": 1,
    },
    "no batches": lambda data: {"batch_size": None, "sampler": ShuffleSampler(data, weights=[1.0] * len(data))},
    "no batches, shuffle": lambda data: {"batch_size": None, "shuffle": True, "generator": generator()},
}
COSTLY = (
    "weights",
    "passes",
    "shuffle, generator",
    "DistributedSampler",
    "BatchSampler of ShuffleSampler",
    "no batches",
)


def loader_of(order: str, data: Any, workers: str = "none", **options: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 5, **ORDERS[order](data), **WORKERS[workers], **options})


def begin(loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
    """Begin an epoch as a training loop does: what torch's generator and samplers leave to the loop is set."""
    torch.manual_seed(100 + epoch)
    if type(loader.sampler) is DistributedSampler:
        loader.sampler.set_epoch(epoch)
    return iter(loader)


@functools.cache
def uninterrupted(order: str, path: Path, persistent: bool = False) -> list[list[Any]]:
    """Three epochs in one go. A loader that is not persistent draws a seed for its workers before each of them."""
    loader = loader_of(order, images_of(path), "persistent threads" if persistent else "none")
    return [list(begin(loader, epoch)) for epoch in range(3)]


@pytest.mark.parametrize(
    ("order", "workers"),
    [(order, workers) for order in ORDERS for workers in WORKERS if workers in CHEAP or order in COSTLY],
)
def test_a_run_goes_on_where_its_state_was_made(store_path: Path, order: str, workers: str) -> None:
    """From any batch of any epoch a new loader gives the batches that follow, pictures and all, and the next epoch."""
    expected = uninterrupted(order, store_path, "persistent" in workers)
    length = len(expected[0])
    places = [(0, k) for k in (0, 1, length)] + [(1, k) for k in range(length + 1)]
    for epoch, k in places if workers in CHEAP else [(0, 0), (1, 1), (1, length)]:
        loader = loader_of(order, images_of(store_path), workers)
        for before in range(epoch):
            for _ in begin(loader, before):
                pass
        iterator = begin(loader, epoch)
        for _ in range(k):
            next(iterator)
        state = loader.state_dict()
        del iterator, loader
        resumed = loader_of(order, images_of(store_path), workers)
        resumed.load_state_dict(state)
        torch.manual_seed(100 + epoch if k == 0 else 999)
        assert_same(list(resumed), expected[epoch][k:])
        assert_same(list(begin(resumed, epoch + 1)), expected[epoch + 1])


def test_draws_of_one_picture_differ(store_path: Path) -> None:
    """By weight a picture comes several times in an epoch, each time with a crop of its own."""
    pictures = [images for images, _ in uninterrupted("no batches", store_path)[0]]
    indices = list(ShuffleSampler(12, weights=[1.0] * 12))
    assert len(set(indices)) < 12
    assert len({picture.numpy().tobytes() for picture in pictures}) == 12


def test_pictures_differ_from_pass_to_pass(store_path: Path) -> None:
    """Each pass shows each picture with a crop of its own, the first one that of an epoch without repetition."""
    data = images_of(store_path)
    loader = DataLoader(data, 5, sampler=ShuffleSampler(data, seed=3, repeat=3))
    plain = DataLoader(data, None, sampler=ShuffleSampler(data, seed=3))
    for _ in range(2):
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [5] * 7 + [1]
        pictures = torch.cat([images for images, _ in batches])
        assert len({picture.numpy().tobytes() for picture in pictures}) == 36
        assert torch.equal(pictures[:12], torch.stack([image for image, _ in plain]))


class Around(Dataset[Any]):
    """A user's dataset that reads ours one by one."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        image, label = self.data[index]
        return image.clone(), label


@pytest.mark.parametrize("options", [{"repeat": 3}, {"weights": [1.0] * 12, "repeat": 2}], ids=["passes", "weights"])
def test_indices_that_come_again_show_other_pictures_everywhere(store_path: Path, options: dict[str, Any]) -> None:
    """The same as in fastload's loader by torch's, by batches of a BatchSampler, and through datasets around ours."""
    data = images_of(store_path)

    def pictures(kind: Any, dataset: Any, **more: Any) -> torch.Tensor:
        sampler = ShuffleSampler(data, seed=3, **options)
        given = {"batch_sampler": BatchSampler(sampler, 5, False)} if "batch" in more else {"sampler": sampler}
        loader = kind(dataset, **{"batch_size": 1 if "batch" in more else 5, **given, **WORKERS[more["workers"]]})
        return torch.cat([images for images, _ in loader])

    expected = pictures(DataLoader, data, workers="none")
    assert len({picture.numpy().tobytes() for picture in expected}) == len(expected)
    for dataset in (data, Around(data), Subset(data, range(12))):
        for workers in ("none", "threads", "processes", "threads in processes"):
            assert torch.equal(pictures(DataLoader, dataset, workers=workers), expected)
    assert torch.equal(pictures(DataLoader, data, workers="threads", batch=True), expected)
    for dataset in (data, Around(data)):
        for workers in (0, 2):
            loader = TorchLoader(dataset, 5, sampler=ShuffleSampler(data, seed=3, **options), num_workers=workers)
            assert torch.equal(torch.cat([images for images, _ in loader]), expected)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_endless_loader_goes_on_and_on(store_path: Path, workers: str) -> None:
    """Whole batches, the same on all workers; left by `break`, the next loop is the next epoch; a state resumes."""

    def new(workers: str) -> DataLoader[Any]:
        data = images_of(store_path)
        return DataLoader(data, 5, sampler=ShuffleSampler(data, seed=3, repeat=None), **WORKERS[workers])

    expected_loader, loader = new("none"), new(workers)
    with pytest.raises(TypeError, match="repeat=None"):
        len(loader)
    for steps in (13, 1, 8):
        expected = list(itertools.islice(expected_loader, steps + 3))
        assert all(len(images) == 5 for images, _ in expected)
        batches = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps:
                break
        assert_same(batches, expected[:steps])
        state = loader.state_dict()
        assert state["order"]["sampler"]["position"] == 5 * steps
        resumed = new(workers)
        resumed.load_state_dict(state)
        assert_same(list(itertools.islice(resumed, 3)), expected[steps:])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 12), st.sampled_from(CHEAP), st.data())
def test_passes_go_on_from_any_batch(n: int, repeat: int, size: int, workers: str, data: st.DataObject) -> None:
    """At the borders of passes and elsewhere: the rest of the batches, all of one size but the last, then an epoch."""

    def new() -> DataLoader[Any]:
        return DataLoader(Epochs(n), size, sampler=ShuffleSampler(n, window=4, repeat=repeat), **WORKERS[workers])

    loader = new()
    expected = [drawn(loader), drawn(loader)]
    assert [len(batch) for batch in expected[0][:-1]] == [size] * (len(loader) - 1)
    assert sorted(itertools.chain.from_iterable(expected[0])) == sorted([*range(n)] * repeat)
    taken = data.draw(st.integers(0, len(loader)))
    loader = new()
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    resumed = new()
    resumed.load_state_dict(loader.state_dict())
    assert [drawn(resumed), drawn(resumed)] == [expected[0][taken:], expected[1]]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("order", ["ShuffleSampler", "RandomSampler", "sequential", "a user's sampler"])
def test_nothing_is_read_again(order: str, workers: str) -> None:
    """After a load each sample that is left is read once, and none of those that were consumed."""
    loader = loader_of(order, Numbers(), "none", batch_size=3)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    data = Counted()
    resumed = loader_of(order, data, workers, batch_size=3, persistent_workers=False)
    resumed.load_state_dict(loader.state_dict())
    left = list(itertools.chain.from_iterable(drawn(resumed)))
    assert data.reads.tolist() == [left.count(i) for i in range(len(data))]
    assert left == list(itertools.chain.from_iterable(drawn(iterator)))


@pytest.mark.parametrize("before", WORKERS)
def test_any_kind_of_worker_goes_on_for_any_other(store_path: Path, before: str) -> None:
    """States say nothing of workers."""
    for order in ("weights", "RandomSampler"):
        expected = uninterrupted(order, store_path)
        loader = loader_of(order, images_of(store_path), before)
        next(begin(loader, 0))
        state = loader.state_dict()
        del loader
        for after in WORKERS:
            resumed = loader_of(order, images_of(store_path), after)
            resumed.load_state_dict(state)
            assert_same(list(resumed), expected[0][1:])


@pytest.mark.parametrize("order", ["shuffle", "WeightedRandomSampler, global", "a user's sampler"])
def test_going_on_does_not_touch_torchs_generator(order: str) -> None:
    """Its state goes into a resumed order, and is put back: it is everybody's. The loader's own seed alone is drawn."""
    loader = loader_of(order, Numbers(12))
    next(begin(loader, 0))
    for workers in CHEAP:
        resumed = loader_of(order, Numbers(12), workers)
        resumed.load_state_dict(loader.state_dict())
        torch.manual_seed(7)
        torch.empty((), dtype=torch.int64).random_()
        expected = torch.get_rng_state()
        torch.manual_seed(7)
        next(iter(resumed))
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("order", ["ShuffleSampler", "windows", "weights", "shuffle", "RandomSampler", "sequential"])
def test_another_batch_size_goes_on(order: str) -> None:
    """Samples are what a state counts: batches may have another size after it."""
    torch.manual_seed(3)
    loader = loader_of(order, Numbers())
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = list(itertools.chain.from_iterable(drawn(iterator)))
    for size in (1, 7, 100, None):
        resumed = loader_of(order, Numbers(), "threads", batch_size=size)
        resumed.load_state_dict(state)
        batches = drawn(resumed)
        assert (batches if size is None else list(itertools.chain.from_iterable(batches))) == rest
        assert size is None or all(len(batch) == size for batch in batches[:-1])


# --- batches that come out of order


class Slow(Counted):
    """Numbers of which the first is slow, once."""

    def __getitem__(self, index: int) -> int:
        if index == 0 and not self.reads[0]:
            self.reads[0] += 1
            time.sleep(0.3)
            return index
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", ["threads", "persistent threads", "processes"])
def test_what_came_early_is_not_read_twice(workers: str) -> None:
    """With in_order=False a state names the batches that overtook others; both go on exactly, with states again."""
    options = {"batch_size": 2, "in_order": False}
    for order in ("in order", "sequential"):
        loader = loader_of(order, Slow(14), workers, **options)
        iterator = iter(loader)
        early = drawn(itertools.islice(iterator, 2))
        state = loader.state_dict()
        late = drawn(iterator)
        assert [0, 1] not in early
        assert state["order"]["early"] == sorted(batch[0] // 2 for batch in early)
        assert sorted(early + late) == [[i, i + 1] for i in range(0, 14, 2)]
        for after in ("none", workers):
            data = Counted(14)
            resumed = loader_of(order, data, after, **(options if after != "none" else {"batch_size": 2}))
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            iterator = iter(resumed)
            assert resumed.state_dict() == state
            first = plain(next(iterator))
            again = loader_of(order, Numbers(14), batch_size=2)
            again.load_state_dict(resumed.state_dict())
            assert sorted([*early, first, *drawn(again)]) == sorted(early + late)
            rest = drawn(iterator)
            assert sorted([*early, first, *rest]) == sorted(early + late)
            if "persistent" not in after:
                assert data.reads.tolist() == [int([i - i % 2, i - i % 2 + 1] not in early) for i in range(14)]
            assert sorted(drawn(resumed)) == sorted(early + late)


def test_early_batches_take_the_same_batch_size() -> None:
    """What came early is counted in batches, which other sizes would cut elsewhere."""
    for order in ("in order", "sequential"):
        loader = loader_of(order, Slow(14), "threads", batch_size=2, in_order=False)
        next(iter(loader))
        with pytest.raises(ValueError, match=r"batches of 2.*same batch_size; here it is 5"):
            loader_of(order, Slow(14)).load_state_dict(loader.state_dict())


# --- the moments of a state


@pytest.mark.parametrize("workers", CHEAP)
@pytest.mark.parametrize(
    "order",
    ["ShuffleSampler", "weights", "sequential", "RandomSampler", "a list of batches", "shuffle, generator"],
)
def test_every_moment_has_its_state(order: str, workers: str) -> None:
    """Right after construction, after iter(), after the last batch and after the loop: each goes on as the run did."""

    def new() -> DataLoader[Any]:
        return loader_of(order, Numbers(12), workers)

    def rest(state: Any, epochs: int) -> list[Any]:
        loader = new()
        loader.load_state_dict(state)
        assert_same(loader.state_dict()["order"], state["order"])
        return [drawn(loader) for _ in range(epochs)]

    whole = new()
    expected = [drawn(whole) for _ in range(3)]
    loader = new()
    assert rest(loader.state_dict(), 3) == expected
    iterator = iter(loader)
    assert rest(loader.state_dict(), 3) == expected
    batches = drawn(itertools.islice(iterator, len(loader)))
    assert batches == expected[0]
    assert rest(loader.state_dict(), 3) == [[], *expected[1:]]
    assert next(iterator, None) is None
    assert rest(loader.state_dict(), 2) == expected[1:]
    assert drawn(loader) == expected[1]
    assert rest(loader.state_dict(), 1) == expected[2:]


@pytest.mark.parametrize("order", ["ShuffleSampler", "RandomSampler", "sequential", "DistributedSampler"])
@pytest.mark.parametrize("workers", CHEAP)
def test_a_state_of_a_resumed_run_is_as_good(order: str, workers: str) -> None:
    """A run may be stopped before each batch, its loader made anew each time; the batches are the same."""
    expected = drawn(loader_of(order, Epochs(), workers, batch_size=3))
    state = loader_of(order, Epochs(), workers, batch_size=3).state_dict()
    batches: list[Any] = []
    for _ in expected:
        loader = loader_of(order, Epochs(), workers, batch_size=3)
        loader.load_state_dict(state)
        iterator = iter(loader)
        state = loader.state_dict()
        loader = loader_of(order, Epochs(), workers, batch_size=3)
        loader.load_state_dict(state)
        iterator = iter(loader)
        batches.append(plain(next(iterator)))
        state = loader.state_dict()
        assert_same(loader.state_dict()["order"], state["order"])
    assert batches == expected


@pytest.mark.parametrize("workers", ["none", "threads", "persistent threads", "persistent processes"])
def test_a_state_can_be_loaded_at_any_time(workers: str) -> None:
    """Twice, after another one, in the middle of a pass, and by a loader that is persistent and at work."""
    loader = loader_of("ShuffleSampler", Epochs(), workers)
    expected = [drawn(loader) for _ in range(2)]
    loader = loader_of("ShuffleSampler", Epochs(), workers)
    states = [loader.state_dict() for _ in loader]
    kept = copy.deepcopy(states)
    loader.load_state_dict(states[3])
    loader.load_state_dict(states[1])
    iterator = iter(loader)
    assert plain(next(iterator)) == expected[0][2]
    loader.load_state_dict(states[0])
    assert loader.state_dict() == states[0]
    assert drawn(loader) == expected[0][1:]
    assert drawn(loader) == expected[1]
    loader.load_state_dict(states[0])
    assert drawn(loader) == expected[0][1:]
    assert states == kept
    state = loader.state_dict()
    loader.load_state_dict(state)
    state["order"]["sampler"]["position"] = 22
    loader.state_dict()["order"]["sampler"]["position"] = 21
    assert drawn(loader) == expected[1]


def test_an_iterator_from_before_a_load_does_not_count() -> None:
    """It may be read on, but what it gives does not move the state that was loaded, nor the pass that began from it."""
    for order in ("ShuffleSampler", "sequential", "RandomSampler"):
        loader = loader_of(order, Numbers())
        old = iter(loader)
        next(old)
        state = loader.state_dict()
        second = plain(next(old))
        loader.load_state_dict(state)
        next(old)
        assert_same(loader.state_dict()["order"], state["order"])
        assert plain(next(iter(loader))) == second


def test_the_latest_iterator_counts() -> None:
    """Of two live iterators a state is that of the one that was made last."""
    loader = loader_of("ShuffleSampler", Numbers())
    one, other = iter(loader), iter(loader)
    expected = drawn(itertools.islice(other, 2))
    drawn(one)
    resumed = loader_of("ShuffleSampler", Numbers())
    resumed.load_state_dict(loader.state_dict())
    assert drawn(resumed) == drawn(other)
    assert len(expected) == 2


def test_a_batch_that_failed_is_behind_the_state() -> None:
    """What raised an error is not read again after a load, whoever reads."""
    for workers in ("none", "threads", "processes"):
        loader = loader_of("sequential", Numbers(bad=7), workers)
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(OSError, match="a bad sample"):
            next(iterator)
        resumed = loader_of("sequential", Numbers())
        resumed.load_state_dict(loader.state_dict())
        assert plain(next(iter(resumed))) == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("workers", ["none", "threads"])
def test_a_batch_that_ctrl_c_cut_short_comes_again(workers: str) -> None:
    """A run that is stopped by hand and saves its state loses no batch."""

    class Stopped(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 7:
                raise KeyboardInterrupt
            return index

    loader = loader_of("sequential", Stopped(), workers, in_order=True)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    resumed = loader_of("sequential", Numbers())
    resumed.load_state_dict(loader.state_dict())
    assert plain(next(iter(resumed))) == [5, 6, 7, 8, 9]


# --- states and set_epoch


@pytest.mark.parametrize("workers", CHEAP)
@pytest.mark.parametrize("data", [Numbers, Epochs])
@pytest.mark.parametrize("order", ["ShuffleSampler", "sequential", "RandomSampler", "DistributedSampler"])
def test_a_loop_that_sets_epochs_goes_on(order: str, data: type[Numbers], workers: str) -> None:
    """`for epoch in range(first, ...): loader.set_epoch(epoch)` is resumed in the middle of its first epoch."""
    loader = loader_of(order, data(), workers)
    loader.set_epoch(0)
    drawn(loader)
    loader.set_epoch(1)
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), drawn(iterator)
    loader.set_epoch(2)
    following = drawn(loader)
    resumed = loader_of(order, data(), workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert_same(resumed.state_dict()["order"], state["order"])
    assert drawn(resumed) == rest
    resumed.set_epoch(2)
    assert drawn(resumed) == following


@pytest.mark.parametrize("order", ["ShuffleSampler", "DistributedSampler"])
def test_another_epoch_after_a_load_begins_at_its_beginning(order: str) -> None:
    """By the loader or by its sampler; the state is then that of the epoch that was chosen."""
    for data in (Numbers, Epochs):
        loader = loader_of(order, data())
        next(iter(loader))
        state = loader.state_dict()
        chosen = loader_of(order, data())
        chosen.set_epoch(4)
        fresh, expected = chosen.state_dict(), drawn(chosen)
        for of in (lambda loader: loader, lambda loader: loader.sampler):
            resumed = loader_of(order, data())
            resumed.load_state_dict(state)
            of(resumed).set_epoch(4)
            assert_same(resumed.state_dict()["order"], fresh["order"])
            assert drawn(resumed) == expected


def test_an_epoch_set_on_the_dataset_after_a_load_keeps_the_place(store_path: Path) -> None:
    """The order and the place are the state's, the pictures those of the epoch that was chosen."""
    loader = loader_of("sequential", images_of(store_path))
    next(iter(loader))
    resumed = loader_of("sequential", images_of(store_path))
    resumed.load_state_dict(loader.state_dict())
    resumed.dataset.set_epoch(6)
    whole = images_of(store_path)
    whole.set_epoch(6)
    assert_same(list(resumed), list(torch.utils.data.DataLoader(whole, 5, collate_fn=fastload.collate))[1:])


@pytest.mark.parametrize("workers", [*CHEAP, "persistent processes"])
def test_an_epoch_set_between_iter_and_the_first_batch_holds(workers: str) -> None:
    """As Lightning sets its sampler's: the pass that begins is that epoch, once, and the next one follows it."""
    for order in ("ShuffleSampler", "DistributedSampler"):
        expected = []
        loader = loader_of(order, Numbers(), workers)
        for epoch in range(4):
            loader.set_epoch(epoch)
            expected.append(drawn(loader))
        loader = loader_of(order, Numbers(), workers)
        for epoch in (0, 2, 1, 3):
            iterator = iter(loader)
            loader.sampler.set_epoch(epoch)
            assert drawn(iterator) == expected[epoch]
        if order == "ShuffleSampler":
            loader.sampler.set_epoch(0)
            iterator = iter(loader)
            loader.sampler.set_epoch(0)
            assert [drawn(iterator), drawn(loader)] == expected[:2]


@pytest.mark.parametrize("workers", CHEAP)
def test_an_epoch_set_in_the_middle_is_the_next(store_path: Path, workers: str) -> None:
    """The running pass keeps its order, its pictures and its state."""
    expected = uninterrupted("ShuffleSampler", store_path)
    for choose in (
        lambda loader: loader.set_epoch(0),
        lambda loader: (loader.sampler.set_epoch(0), loader.dataset.set_epoch(0)),
    ):
        loader = loader_of("ShuffleSampler", images_of(store_path), workers)
        list(loader)
        iterator = iter(loader)
        batches = [next(iterator)]
        state = loader.state_dict()
        choose(loader)
        assert_same(loader.state_dict()["order"], state["order"])
        assert loader.state_dict()["epoch"] == 1
        batches += iterator
        assert_same(batches, expected[1])
        assert_same(list(loader), expected[0])


# --- other numbers of ranks


def share_of(data: Numbers, rank: int, world: int, size: int, options: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(data, size, sampler=ShuffleSampler(data, seed=2, rank=rank, world=world, **options))


runs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 4)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70), runs, st.sampled_from([{}, {"drop_last": True}, {"pad": False}, {"window": 5}, {"repeat": 3}])
)
@example(7, [(2, 4, 1)], {"pad": False})
@example(9, [(2, 4, 1), (3, 1, 1)], {"pad": False})
@example(10, [(4, 2, 1), (3, 1, 0)], {})
def test_any_number_of_ranks_goes_on(n: int, runs: list[tuple[int, int, int]], options: dict[str, Any]) -> None:
    """Runs of any ranks, batch size and length, each from the last one's state: an epoch's samples, each once.

    The state is the same on all ranks at the same step. Only the last run repeats samples, or leaves some out.
    """
    order = list(ShuffleSampler(n, seed=2, window=options.get("window"), repeat=options.get("repeat", 1)))
    data, seen = Numbers(n), []
    state: Any = None
    n *= options.get("repeat", 1)
    for world, size, steps in [*runs, (2, 3, n)]:
        ranks = [share_of(data, rank, world, size, options) for rank in range(world)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        iterators = [iter(loader) for loader in ranks]
        for _ in range(steps):
            parts = [plain(next(iterator, [])) for iterator in iterators]
            if not parts[0]:
                break
            states = [loader.state_dict() for loader, part in zip(ranks, parts, strict=True) if part]
            assert all(other == states[0] for other in states)
            state = states[0]
            seen += [index for row in itertools.zip_longest(*parts) for index in row if index is not None]
    extra = 0 if {"drop_last", "pad"} & set(options) else 5
    assert seen[:n] == order[: len(seen[:n])]
    assert len(seen) <= n + extra
    assert len(seen) > n - (6 if "drop_last" in options else 1)


def test_eight_ranks_stop_and_six_go_on(store_path: Path) -> None:
    """With pictures: what six ranks see after eight is what one would have seen, crop by crop."""
    whole = list(DataLoader(images_of(store_path), None, sampler=ShuffleSampler(12, seed=2)))

    def ranks(world: int) -> list[DataLoader[Any]]:
        samplers = [ShuffleSampler(12, seed=2, rank=rank, world=world) for rank in range(world)]
        return [DataLoader(images_of(store_path), 1, sampler=sampler) for sampler in samplers]

    eight = ranks(8)
    seen = [next(iter(loader)) for loader in eight]
    six = ranks(6)
    for loader in six:
        loader.load_state_dict(eight[5].state_dict())
        seen += loader
    for (images, _), (image, _) in zip(seen, whole, strict=False):
        assert torch.equal(images[0], image)
    assert len(seen) == 8 + 6


# --- iterable datasets


class Stream(IterableDataset[int]):
    """A stream with a state: worker w of n has the numbers 100 * w ... of its share; the shares are uneven."""

    shares = (11, 4, 0)

    def __init__(self) -> None:
        self.at = 0
        self.epoch_count = 0
        self.log: list[int] = []

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        number = info.id if info else 0
        for at in range(self.at, self.shares[number] + self.epoch_count):
            self.at = at + 1
            yield 100 * number + 10_000 * self.epoch_count + at
        self.at = 0
        self.epoch_count += 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "epoch_count": self.epoch_count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.epoch_count = state["at"], state["epoch_count"]


class Stateless(Stream):
    """The same without a state."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return super().__getattribute__(name)


STREAMS = {
    "none": {},
    "threads": {"num_workers": 3, "worker_type": "thread"},
    "persistent threads": {"num_workers": 3, "worker_type": "thread", "persistent_workers": True},
    "processes": {"num_workers": 3, "worker_type": "process"},
    "persistent processes": {"num_workers": 3, "worker_type": "process", "persistent_workers": True},
}


@pytest.mark.parametrize("workers", STREAMS)
@pytest.mark.parametrize(
    "options", [{"batch_size": 2}, {"batch_size": 4, "drop_last": True}, {"batch_size": 3}, {"batch_size": None}]
)
@pytest.mark.parametrize("stream", [Stream, Stateless])
def test_streams_go_on(stream: type[Stream], options: dict[str, Any], workers: str) -> None:
    """From any batch, with shares that are uneven, empty or used up, from the copies' states or by reading again."""

    def new() -> DataLoader[Any]:
        return DataLoader(stream(), **options, **STREAMS[workers])

    whole = new()
    expected = [drawn(whole) for _ in range(2)]
    del whole
    places = range(len(expected[0]) + 1)
    for k in places if "processes" not in workers else {1, len(places) // 2, len(places) - 1}:
        loader = new()
        iterator = iter(loader)
        assert drawn(itertools.islice(iterator, k)) == expected[0][:k]
        state = loader.state_dict()
        del iterator, loader
        resumed = new()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        iterator = iter(resumed)
        assert resumed.state_dict()["order"] == state["order"]
        assert drawn(iterator) == expected[0][k:]
        del iterator
        if "persistent" in workers or workers == "none":
            assert drawn(resumed) == expected[1]


@pytest.mark.parametrize("workers", ["none", "threads"])
@pytest.mark.parametrize("stream", [Stream, Stateless])
def test_a_streams_state_can_be_made_again_and_again(stream: type[Stream], workers: str) -> None:
    """A run that is stopped before each batch comes to the same end; a state from before the first batch counts too."""
    expected = drawn(DataLoader(stream(), 2, **STREAMS[workers]))
    state = DataLoader(stream(), 2, **STREAMS[workers]).state_dict()
    batches = []
    for _ in expected:
        for steps in (0, 1):
            loader = DataLoader(stream(), 2, **STREAMS[workers])
            loader.load_state_dict(state)
            iterator = iter(loader)
            batches += drawn(itertools.islice(iterator, steps))
            state = loader.state_dict()
    assert batches == expected


def test_a_stream_with_a_state_is_not_read_again() -> None:
    """What was consumed of it is not; of a stream without, it is read and thrown away."""
    log: list[int] = []

    class Logged(Stream):
        def __iter__(self) -> Iterator[int]:
            for number in super().__iter__():
                log.append(number)
                yield number

    class LoggedStateless(Stateless):
        def __iter__(self) -> Iterator[int]:
            for number in super().__iter__():
                log.append(number)
                yield number

    for stream, read in ((Logged, range(6, 11)), (LoggedStateless, range(11))):
        loader = DataLoader(stream(), 3)
        iterator = iter(loader)
        drawn(itertools.islice(iterator, 2))
        resumed = DataLoader(stream(), 3)
        resumed.load_state_dict(loader.state_dict())
        log.clear()
        assert drawn(resumed) == [[6, 7, 8], [9, 10]]
        assert log == list(read)


class Living(IterableDataset[int]):
    """A stream whose state is the very list that it goes on to change, and that takes what it is given for its own."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[int]:
        for number in range(len(self.seen), 20):
            self.seen.append(number)
            yield number

    def state_dict(self) -> dict[str, list[int]]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "worker_type": "thread"}, {"num_workers": 1}])
def test_a_streams_state_stays_as_it_was_made(workers: dict[str, Any]) -> None:
    """A dataset may go on with the objects in its state: those that the user has do not change, and load twice."""
    loader = DataLoader(Living(), 2, **workers)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    kept = copy.deepcopy(state)
    next(iterator)
    for _ in range(2):
        resumed = DataLoader(Living(), 2, **workers)
        resumed.load_state_dict(state)
        assert plain(next(iter(resumed))) == [2, 3]
        assert state == kept


def test_a_stream_takes_as_many_workers_as_before() -> None:
    """Each has its share of the data: another number is refused, with both named."""
    state = DataLoader(Stream(), 2, **STREAMS["threads"]).state_dict()
    for workers in ({}, {**THREADS, "num_workers": 2}):
        loader = DataLoader(Stream(), 2, **workers)
        with pytest.raises(ValueError, match=f"of 3 workers.*has {loader.num_workers}: use the same num_workers"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="of None workers"):
        DataLoader(Stream(), 2).load_state_dict(DataLoader(Numbers(), 2).state_dict())


def test_a_streams_states_need_a_dataset_that_takes_them() -> None:
    """The same stream without load_state_dict refuses them; the other way round it reads again."""
    loader = DataLoader(Stream(), 3)
    next(iter(loader))
    with pytest.raises(ValueError, match="Stateless has no load_state_dict"):
        DataLoader(Stateless(), 3).load_state_dict(loader.state_dict())
    stateless = DataLoader(Stateless(), 3)
    next(iter(stateless))
    resumed = DataLoader(Stream(), 3)
    resumed.load_state_dict(stateless.state_dict())
    assert plain(next(iter(resumed))) == [3, 4, 5]


# --- what is refused


def test_states_of_other_data_are_refused(store_path: Path, raw_store_path: Path) -> None:
    """Another length, and, of the same length, another store or seed of the pictures."""
    state = loader_of("sequential", images_of(store_path)).state_dict()
    with pytest.raises(ValueError, match="samples is 12, here it is 40"):
        loader_of("sequential", images_of(raw_store_path)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"its fingerprint is '\w{16}', here it is '\w{16}'"):
        loader_of("sequential", images_of(store_path, seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="fingerprint is None"):
        loader_of("sequential", images_of(store_path)).load_state_dict(
            loader_of("sequential", Numbers(12)).state_dict()
        )
    loader_of("sequential", images_of(store_path, cache="1MB")).load_state_dict(state)


def test_a_store_of_other_pictures_is_told_apart(
    store_path: Path, tmp_path: Path, class_folders: Path, make_picture: Any
) -> None:
    """As many pictures, of the same classes and labels, one of them changed: another fingerprint."""
    import shutil

    from PIL import Image

    shutil.copytree(class_folders, tmp_path / "images")
    Image.fromarray(make_picture(50, 70)).save(tmp_path / "images" / "ant" / "0.jpg")
    fastload.pack(tmp_path / "images", tmp_path / "other.lmdb")
    state = loader_of("sequential", images_of(store_path)).state_dict()
    with pytest.raises(ValueError, match="fingerprint"):
        loader_of("sequential", images_of(tmp_path / "other.lmdb")).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "of 'ShuffleSampler', this loader's is of 'RandomSampler'"),
        ({}, "this loader's is of 'SequentialSampler'"),
        ({"sampler": ShuffleSampler(23, seed=4)}, "seed is 3, this sampler's is 4"),
        ({"sampler": ShuffleSampler(23, seed=3, window=4)}, "window is None, this sampler's is 4"),
        ({"sampler": ShuffleSampler(23, seed=3, weights=[1.0] * 23)}, "weights is None"),
        ({"sampler": ShuffleSampler(23, seed=3, shuffle=False)}, "shuffle is True, this sampler's is False"),
        ({"sampler": ShuffleSampler(22, seed=3)}, "n is 23, this sampler's is 22"),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(23)), 5, False)}, "of 'BatchSampler'"),
    ],
)
def test_states_of_other_orders_are_refused(options: dict[str, Any], message: str) -> None:
    """With what the state has and what this loader has; then nothing has changed."""
    loader = loader_of("ShuffleSampler", Epochs())
    drawn(loader)
    next(iter(loader))
    other = DataLoader(Epochs(), **options)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(loader.state_dict())
    assert_same(other.state_dict()["order"], before["order"])
    assert other.dataset.epoch == 0


def test_batches_and_samples_are_not_mistaken_for_each_other() -> None:
    """A sampler that gives batches, and the same one that gives samples, count differently."""
    state = DataLoader(Numbers(), batch_sampler=[[0, 1], [2]]).state_dict()
    with pytest.raises(ValueError, match="counts batches, this loader's sampler gives samples"):
        DataLoader(Numbers(), sampler=[0, 1, 2]).load_state_dict(state)


@pytest.mark.parametrize("state", [None, 3, "state", [], {}, {"epoch": 1}, {"version": 1}, {"version": "1"}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    """Nothing, other types, dicts of other kinds."""
    with pytest.raises(ValueError, match=r"state_dict\(\) return"):
        loader_of("sequential", Numbers()).load_state_dict(state)


def test_newer_states_are_refused() -> None:
    """With both versions."""
    loader = loader_of("ShuffleSampler", Numbers())
    state = loader.state_dict()
    with pytest.raises(ValueError, match="version 2, this fastload reads version 1"):
        loader.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="version is 7, this fastload reads 1"):
        loader.load_state_dict(
            {**state, "order": {**state["order"], "sampler": {**state["order"]["sampler"], "version": 7}}}
        )


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in a nested state, but for what belongs to the dataset."""
    if isinstance(value, dict):
        for name in set(value) - {"state"}:
            yield (*here, name)
            yield from paths(value[name], (*here, name))


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place; `paths` itself as the value takes it away."""
    state = copy.deepcopy(state)
    inner = functools.reduce(lambda part, name: part[name], path[:-1], state)
    inner[path[-1]] = value
    if value is paths:
        del inner[path[-1]]
    return state


damage = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**63, 2**64, "1", paths])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([torch.zeros(3), torch.zeros(5056, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(-1, 3) | st.text(max_size=3), inner),
    max_leaves=3,
)


@functools.cache
def victim(name: str) -> tuple[Callable[[], DataLoader[Any]], Any]:
    """A way to make a loader, and a state of such a one."""
    makers: dict[str, Callable[[], DataLoader[Any]]] = {
        "ShuffleSampler": lambda: loader_of("ShuffleSampler", Epochs()),
        "RandomSampler": lambda: loader_of("RandomSampler", Epochs()),
        "DistributedSampler": lambda: loader_of("DistributedSampler", Epochs()),
        "a list of batches": lambda: loader_of("a list of batches", Epochs()),
        "stream": lambda: DataLoader(Stream(), 2),
        "streams": lambda: DataLoader(Stream(), 2, **STREAMS["threads"]),
        "stateless": lambda: DataLoader(Stateless(), 2),
    }
    loader = makers[name]()
    drawn(itertools.islice(iter(loader), 2))
    state = loader.state_dict()
    if name in ("ShuffleSampler", "RandomSampler"):
        state["order"]["early"] = [2]
    return makers[name], state


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        ["ShuffleSampler", "RandomSampler", "DistributedSampler", "a list of batches", "stream", "streams", "stateless"]
    ),
    st.data(),
)
def test_damaged_states_are_refused_or_harmless(name: str, data: st.DataObject) -> None:
    """Any change to a state is a ValueError that leaves the loader as it was, or a state that can be gone on from."""
    make, state = victim(name)
    path = data.draw(st.sampled_from(list(paths(state))))
    if name == "streams" and path[-1:] == ("discard",):
        return  # it may say that any number of batches are to be thrown away
    value = data.draw(damage)
    if path == ("num_workers",) and isinstance(value, torch.Tensor):
        return
    damaged = changed(state, path, value)
    loader = make()
    loader.load_state_dict(state)
    try:
        loader.load_state_dict(damaged)
    except ValueError:
        assert_same(loader.state_dict()["order"], state["order"])
        assert loader.state_dict()["epoch"] == state["epoch"]
        resumed = make()
        resumed.load_state_dict(state)
        assert drawn(loader) == drawn(resumed)
    else:
        drawn(loader)


# --- states in files


def test_states_of_a_shuffle_sampler_are_json(store_path: Path) -> None:
    """Numbers and texts only."""
    for order in ("ShuffleSampler", "windows", "weights", "in order"):
        loader = loader_of(order, images_of(store_path))
        next(iter(loader))
        state = loader.state_dict()
        assert json.loads(json.dumps(state)) == state
        assert len(json.dumps(state)) < 500
        resumed = loader_of(order, images_of(store_path))
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert_same(list(resumed), uninterrupted(order, store_path)[0][1:])


@pytest.mark.parametrize("order", ORDERS)
def test_states_survive_a_checkpoint(store_path: Path, order: str) -> None:
    """torch.save, and torch.load with weights_only=True, for every order."""
    loader = loader_of(order, images_of(store_path))
    iterator = begin(loader, 0)
    next(iterator)
    file = io.BytesIO()
    torch.save({"loader": loader.state_dict(), "model": torch.ones(3)}, file)
    file.seek(0)
    resumed = loader_of(order, images_of(store_path))
    resumed.load_state_dict(torch.load(file, weights_only=True)["loader"])
    assert_same(list(resumed), uninterrupted(order, store_path)[0][1:])


def test_a_state_is_made_in_no_time(store_path: Path) -> None:
    """After any batch: well below a millisecond."""
    for order in ("ShuffleSampler", "weights", "shuffle, generator"):
        loader = loader_of(order, images_of(store_path))
        iterator = iter(loader)
        next(iterator)
        loader.state_dict()
        begun = time.perf_counter()
        for _ in range(100):
            loader.state_dict()
        assert time.perf_counter() - begun < 0.2


# --- the prefetcher


@pytest.mark.parametrize("workers", CHEAP)
@pytest.mark.parametrize("order", ["ShuffleSampler", "RandomSampler"])
def test_a_prefetchers_state_is_that_of_what_it_handed_over(store_path: Path, order: str, workers: str) -> None:
    """After each batch, though the loader is at its end by then; the next epoch follows."""
    expected = uninterrupted(order, store_path)
    for k in range(4):
        loader = loader_of(order, images_of(store_path), workers)
        prefetcher = DevicePrefetcher(loader, "cpu", buffers=3)
        iterator = iter(prefetcher)
        for _ in range(k):
            next(iterator)
        state = prefetcher.state_dict()
        while k and place_of(loader) == place_of(prefetcher):  # it has not fetched ahead yet
            time.sleep(0.001)
        assert_same(prefetcher.state_dict(), state)
        iterator.close()
        assert_same(prefetcher.state_dict()["order"], state["order"])
        resumed = DevicePrefetcher(loader_of(order, images_of(store_path), workers), "cpu")
        resumed.load_state_dict(state)
        assert_same(resumed.state_dict()["order"], state["order"])
        assert_same(list(resumed), expected[0][k:])
        assert_same(list(resumed), expected[1])


def place_of(loader: Any) -> Any:
    state = loader.state_dict()
    return state["epoch"], state["order"].get("skip"), state["order"].get("sampler")


def test_a_prefetchers_moments_have_their_states() -> None:
    """Before the first iterator, after the loop, after a load, and after an epoch was chosen."""
    prefetcher = DevicePrefetcher(loader_of("ShuffleSampler", Numbers()), "cpu")
    loader = prefetcher.loader
    fresh = prefetcher.state_dict()
    assert fresh == loader.state_dict()
    for number, _ in enumerate(prefetcher, 1):
        assert prefetcher.state_dict()["order"]["sampler"]["position"] == min(23, 5 * number)
    assert prefetcher.state_dict()["order"]["sampler"]["epoch"] == 1
    assert prefetcher.state_dict()["order"]["sampler"]["position"] == 0
    for _ in prefetcher:
        break
    left = prefetcher.state_dict()
    assert (left["order"]["sampler"]["epoch"], left["order"]["sampler"]["position"]) == (1, 5)
    prefetcher.load_state_dict(fresh)
    assert prefetcher.state_dict() == fresh


def test_a_prefetchers_state_follows_set_epoch() -> None:
    """Between epochs, when no iterator is at work, it is that of the epoch that was chosen."""
    prefetcher = DevicePrefetcher(loader_of("ShuffleSampler", Numbers()), "cpu")
    drawn(prefetcher)
    prefetcher.set_epoch(5)
    assert prefetcher.state_dict()["order"]["sampler"]["epoch"] == 5


def test_a_prefetcher_over_what_has_no_state_says_so() -> None:
    """A list, and torch's own loader."""
    for loader in ([torch.zeros(1)], torch.utils.data.DataLoader(Numbers())):
        prefetcher: DevicePrefetcher[Any] = DevicePrefetcher(loader, "cpu")
        list(prefetcher)
        for use in (prefetcher.state_dict, lambda: prefetcher.load_state_dict({})):  # noqa: B023, used at once
            with pytest.raises(TypeError, match=f"{type(loader).__name__} has no state_dict"):
                use()


# --- copies


def test_loaders_can_be_pickled() -> None:
    """Before and after a pass, as torch's can; the copy begins a pass of its own, at the same place."""
    for order in ("ShuffleSampler", "shuffle, generator", "sequential", "a list of batches"):
        for workers in ("none", "threads"):
            loader = loader_of(order, Numbers(), workers)
            first = pickle.loads(pickle.dumps(loader))
            assert drawn(first) == drawn(loader)
            assert drawn(pickle.loads(pickle.dumps(loader))) == drawn(loader)
    loader = loader_of("ShuffleSampler", Numbers())
    next(iter(loader))
    resumed = loader_of("ShuffleSampler", Numbers())
    resumed.load_state_dict(loader.state_dict())
    assert drawn(pickle.loads(pickle.dumps(resumed))) == drawn(resumed)


def test_a_copy_of_a_loader_is_another_loader() -> None:
    """copy.copy of a loader, as libraries make it: its passes don't touch the original's state."""
    loader = loader_of("sequential", Numbers())
    other = copy.copy(loader)
    next(iter(loader))
    drawn(other)
    assert loader.state_dict()["order"]["skip"] == 5


def test_a_loader_is_generic() -> None:
    """`DataLoader[int]` is a type to write down and to call, as torch's is."""

    def count(loader: DataLoader[int]) -> int:
        return len(loader)

    assert count(DataLoader[int](Numbers(), 5)) == 5


def test_no_thread_is_left() -> None:
    """Loading a state ends persistent workers; nothing here leaves any behind."""
    loader = loader_of("sequential", Numbers(), "persistent threads")
    drawn(loader)
    loader.load_state_dict(loader.state_dict())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastload-worker")]
