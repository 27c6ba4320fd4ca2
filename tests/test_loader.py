"""The loader: torch's DataLoader in every respect, with threads that are seen only by their speed and their errors."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import Numbers
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import DataLoader, ImageDataset
from fastload.errors import DecodeError, TooManyFailures
from fastload.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Signed(Numbers):
    """Numbers, each with what computes it: sample i is (i, process, thread)."""

    def __getitem__(self, index: int) -> Any:
        return index, os.getpid(), threading.get_ident()


class Fails(Numbers):
    """Numbers, of which one raises."""

    def __init__(self, bad: int, error: Callable[[], BaseException]) -> None:
        super().__init__(20, bad)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            self.refuse()
        return index

    def refuse(self) -> None:
        raise self.error()


class Foreign(Dataset[Any]):
    """A dataset that says nothing of threads: sample i is (i, the process that computes it)."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


class Stream(IterableDataset[int]):
    """Ten numbers, shared out among torch's worker processes."""

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        return iter(range(worker.id if worker else 0, 10, worker.num_workers if worker else 1))


def images_of(path: Path, size: int = 16, **options: Any) -> ImageDataset:
    return ImageDataset(path, Compose([RandomResizedCrop(size), RandomHorizontalFlip()]), **options)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(got: Any, expected: Any) -> None:
    """The same structure, types and values."""
    assert type(got) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert_same(list(got.values()), list(expected.values()))
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got == expected


def threads() -> list[str]:
    """The names of the threads that load."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload-worker")]


def soon(condition: Callable[[], object]) -> bool:
    """Whether the condition comes true in time: dropped threads finish what is in their hands."""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every test here ends without a worker thread."""
    yield
    if threads():
        gc.collect()
    assert soon(lambda: not threads()), threads()


# --- the signature


def test_every_parameter_of_torch_has_its_kind_and_default() -> None:
    """A drop-in has the same parameters in the same places; what is added can only be given by name."""
    torchs = inspect.signature(TorchLoader.__init__).parameters
    ours = inspect.signature(DataLoader.__init__).parameters
    for name, parameter in torchs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    positional = [name for name, p in torchs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    extras = [p for name, p in ours.items() if name not in torchs]
    assert [p.name for p in extras] == ["worker_type", "threads_per_worker"]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in extras)


def test_it_is_a_dataloader_with_torchs_attributes(store_path: Path) -> None:
    """Libraries recognise it, read its attributes and find what they expect."""
    dataset = images_of(store_path)
    ours = DataLoader(dataset, 5, True, num_workers=2, drop_last=True, prefetch_factor=3, timeout=30)
    torchs = TorchLoader(dataset, 5, True, num_workers=2, drop_last=True, prefetch_factor=3, timeout=30)
    assert isinstance(ours, TorchLoader)
    assert len(ours) == len(torchs) == 2
    for name in ("batch_size", "num_workers", "drop_last", "prefetch_factor", "timeout", "pin_memory", "in_order"):
        assert getattr(ours, name) == getattr(torchs, name), name
    assert type(ours.sampler) is type(torchs.sampler)
    assert type(ours.batch_sampler) is type(torchs.batch_sampler)
    assert ours.dataset is dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_type": "fiber"}, "worker_type is 'fiber'; it may be auto, thread, process"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"timeout": -1}, "timeout"),
        ({"prefetch_factor": 2}, "prefetch_factor"),
        ({"persistent_workers": True}, "persistent_workers"),
        ({"shuffle": True, "sampler": [1, 2]}, "sampler"),
        ({"batch_size": 2, "batch_sampler": [[1]]}, "batch_sampler"),
        ({"batch_size": None, "drop_last": True}, "drop_last"),
    ],
)
def test_wrong_options_are_value_errors(options: dict[str, Any], message: str) -> None:
    """Ours and torch's own, all before the first batch."""
    with pytest.raises(ValueError, match=message):
        DataLoader(Numbers(), **options)


# --- the same batches as torch


class Weighted(Sampler[int]):
    """A sampler of a user: indices in an order of its own, some twice."""

    def __iter__(self) -> Iterator[int]:
        return iter([5, 5, 0, 11, 3, -1, 2])

    def __len__(self) -> int:
        return 7


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "defaults": dict,
    "batches": lambda: {"batch_size": 5},
    "drop_last": lambda: {"batch_size": 5, "drop_last": True},
    "larger than the data": lambda: {"batch_size": 50},
    "larger than the data, dropped": lambda: {"batch_size": 50, "drop_last": True},
    "shuffle": lambda: {"batch_size": 5, "shuffle": True, "generator": generator()},
    "shuffle, drop_last": lambda: {"batch_size": 5, "shuffle": True, "drop_last": True, "generator": generator()},
    "shuffle=False": lambda: {"batch_size": 4, "shuffle": False},
    "a user's sampler": lambda: {"batch_size": 3, "sampler": Weighted()},
    "a list as sampler": lambda: {"batch_size": 3, "sampler": [3, 1, 2, 0]},
    "random sampler": lambda: {"batch_size": 3, "sampler": RandomSampler(range(12), generator=generator())},
    "more than all": lambda: {
        "batch_size": 5,
        "sampler": RandomSampler(range(12), num_samples=30, generator=generator()),
    },
    "replacement": lambda: {
        "batch_size": 5,
        "sampler": RandomSampler(range(12), replacement=True, generator=generator()),
    },
    "sequential sampler of fewer": lambda: {"batch_size": 3, "sampler": SequentialSampler(range(5))},
    "random sampler of fewer": lambda: {"batch_size": 3, "sampler": RandomSampler(range(5), generator=generator())},
    "random sampler of fewer, twice": lambda: {
        "batch_size": 3,
        "sampler": RandomSampler(range(6), num_samples=12, generator=generator()),
    },
    "weighted": lambda: {
        "batch_size": 3,
        "sampler": WeightedRandomSampler([1.0] * 11 + [9.0], 10, generator=generator()),
    },
    "batch_sampler": lambda: {"batch_sampler": BatchSampler(SequentialSampler(range(12)), 5, drop_last=False)},
    "a list as batch_sampler": lambda: {"batch_sampler": [[1, 2], [3], [4, 5, 6, 0, 0, -1, 1, 2, 3, 4]]},
    "tensors as batches": lambda: {"batch_sampler": [torch.tensor([1, 2]), torch.tensor([3])]},
    "no batches": lambda: {"batch_size": None},
    "no batches, shuffled": lambda: {"batch_size": None, "shuffle": True, "generator": generator()},
    "no batches, a user's sampler": lambda: {"batch_size": None, "sampler": Weighted()},
    "collate_fn": lambda: {"batch_size": 5, "collate_fn": lambda samples: [label for _, label in samples]},
    "prefetch_factor": lambda: {"batch_size": 2, "prefetch_factor": 5},
    "persistent_workers": lambda: {"batch_size": 5, "persistent_workers": True},
    "in_order": lambda: {"batch_size": 2, "in_order": False},
    "timeout": lambda: {"batch_size": 5, "timeout": 60},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_those_of_torchs_loader(store_path: Path, name: str, workers: int) -> None:
    """For every option, and for two epochs, the stock loader over the same dataset gives equal batches."""
    ours, torchs = OPTIONS[name](), OPTIONS[name]()
    if not workers:
        for options in (ours, torchs):
            for option in ("prefetch_factor", "persistent_workers", "timeout"):
                options.pop(option, None)
    dataset = images_of(store_path)
    loader = DataLoader(images_of(store_path), num_workers=workers, **ours)
    for option in ("prefetch_factor", "persistent_workers", "timeout"):
        torchs.pop(option, None)
    expected = TorchLoader(dataset, **torchs)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches, wanted = list(loader), list(expected)
        if not loader.in_order:
            for several in (batches, wanted):
                several.sort(key=lambda batch: int(batch[0].sum()))
        assert_same(batches, wanted)
    if hasattr(loader.sampler, "__len__"):
        assert len(loader) == len(expected)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"drop_last": True}, {"sampler": [3, 39, -1, 0, 7, 7]}])
@pytest.mark.parametrize("workers", [0, 2])
def test_raw_batches_are_those_of_torchs_loader(raw_store_path: Path, options: dict[str, Any], workers: int) -> None:
    """Batches of a raw column, which are gathered several at a time, come out one by one and equal."""
    normalized = ImageDataset(raw_store_path, Normalize([0.5] * 3, [0.25] * 3))
    for dataset in (ImageDataset(raw_store_path), normalized):
        loader = DataLoader(dataset, 7, num_workers=workers, generator=generator(), **options)
        expected = TorchLoader(dataset, 7, generator=generator(), **options)
        assert_same(list(loader), list(expected))


def test_shuffling_without_a_generator_follows_torchs(store_path: Path) -> None:
    """After torch.manual_seed the order is that of the stock loader, epoch after epoch, and so is what comes next."""
    orders, after = [], []
    for loader_type, options in ((DataLoader, {"num_workers": 2}), (TorchLoader, {})):
        loader = loader_type(images_of(store_path), 5, shuffle=True, **options)
        torch.manual_seed(3)
        orders.append([torch.cat([images.flatten(1).sum(1) for images, _ in loader]) for _ in range(1)])
        torch.manual_seed(3)
        labels = [torch.cat([labels for _, labels in loader]) for _ in range(3)]
        orders[-1] += labels
        after.append(torch.rand(1))
    assert_same(orders[0], orders[1])
    assert torch.equal(*after)


@pytest.mark.parametrize("size", [12, 16])
def test_batches_are_channels_last(store_path: Path, size: int) -> None:
    """Images are uint8 (n, 3, h, w) in channels-last memory and labels int64, with threads and without."""
    for workers in (0, 2):
        for images, labels in DataLoader(images_of(store_path, size), 5, num_workers=workers):
            assert images.dtype == torch.uint8
            assert images.shape[1:] == (3, size, size)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    "target",
    [lambda label: {"class": label, "half": label / 2}, lambda label: torch.full((2,), label), float, str],
    ids=["dict", "tensor", "float", "str"],
)
def test_transformed_labels_are_collated(store_path: Path, target: Callable[[int], Any]) -> None:
    """What a target transform returns is collated as torch does it."""
    dataset = ImageDataset(store_path, Resize((8, 8)), target)
    assert_same(list(DataLoader(dataset, 5, num_workers=2)), list(TorchLoader(dataset, 5)))


# --- memory


def test_the_datasets_buffer_is_handed_on(store_path: Path) -> None:
    """`fastload.collate` copies no picture: what the loader gives is the memory that was decoded into."""
    pointers: dict[int, int] = {}

    def collate(samples: Any) -> Any:
        pointers[samples.images.data_ptr()] = len(pointers)
        return fastload.collate(samples)

    batches = list(DataLoader(images_of(store_path), 5, num_workers=2, collate_fn=collate))
    assert {images.data_ptr() for images, _ in batches} == set(pointers)
    batch = images_of(store_path).__getitems__([0, 1])
    assert fastload.collate(batch)[0].data_ptr() == batch.images.data_ptr()
    assert fastload.collate(batch)[1].data_ptr() == batch.labels.data_ptr()


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_stay_valid(store_path: Path, raw_store_path: Path, workers: int) -> None:
    """`list(loader)` holds what was decoded: nothing is overwritten by later batches, of this epoch or another."""
    for dataset in (images_of(store_path), ImageDataset(raw_store_path)):
        loader = DataLoader(dataset, 3, num_workers=workers)
        epochs = [list(loader) for _ in range(4)]
        for epoch, batches in enumerate(epochs):
            dataset.set_epoch(epoch)
            start = 0
            for images, labels in batches:
                for image, label in zip(images, labels, strict=True):
                    fresh, expected = dataset[start]
                    assert torch.equal(image, fresh)
                    assert int(label) == expected
                    start += 1
            assert start == len(dataset)


def test_a_batch_may_be_changed_by_its_user(store_path: Path, raw_store_path: Path) -> None:
    """Writing to a batch changes no other batch and no later one."""
    for dataset in (ImageDataset(store_path, Resize((8, 8)), cache="1MB"), ImageDataset(raw_store_path)):
        expected = [images.clone() for images, _ in TorchLoader(dataset, 4)]
        loader = DataLoader(dataset, 4, num_workers=2)
        for _ in range(2):
            for images, plain in zip([images for images, _ in loader], expected, strict=True):
                assert torch.equal(images, plain)
                images.zero_()


def test_pin_memory_without_an_accelerator_changes_nothing(store_path: Path) -> None:
    """On a machine without one, the same script runs and gives the same batches."""
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    loader = DataLoader(images_of(store_path), 5, num_workers=2, pin_memory=True)
    assert_same(list(loader), list(TorchLoader(images_of(store_path), 5)))


@pytest.mark.gpu
def test_pin_memory_gives_page_locked_batches(store_path: Path) -> None:
    """With an accelerator batches are page-locked, of the same pixels, and stay valid."""
    loader = DataLoader(images_of(store_path), 5, num_workers=2, pin_memory=True)
    batches = list(loader)
    assert all(images.is_pinned() and labels.is_pinned() for images, labels in batches)
    assert_same([list(batch) for batch in batches], list(TorchLoader(images_of(store_path), 5)))


# --- iterators


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_has_torchs_length_and_end(store_path: Path, workers: int) -> None:
    """`len(iter(loader))` is the number of batches, and an exhausted iterator stays exhausted."""
    iterator = iter(DataLoader(images_of(store_path), 5, num_workers=workers))
    assert iter(iterator) is iterator
    assert len(iterator) == 3
    assert len(list(iterator)) == 3
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_two_iterators_live_side_by_side(store_path: Path) -> None:
    """Two epochs drawn in turns give each its own pictures, and ending one leaves the other alone."""
    loader = DataLoader(images_of(store_path), 4, num_workers=2)
    one, other = iter(loader), iter(loader)
    drawn: tuple[list[Any], list[Any]] = ([next(one)], [next(other)])
    drawn[0].append(next(one))
    drawn[1].append(next(other))
    one.close()
    drawn[1].append(next(other))
    plain = images_of(store_path)
    for epoch, batches in enumerate(drawn):
        plain.set_epoch(epoch)
        assert_same(batches, list(TorchLoader(plain, 4))[: len(batches)])


def test_nested_loops_over_one_loader(store_path: Path) -> None:
    """A loop inside a loop over the same loader, as in an all-pairs evaluation."""
    loader = DataLoader(ImageDataset(store_path, Resize((8, 8))), 6, num_workers=1)
    seen = [(outer.tolist()[0], inner.tolist()[0]) for _, outer in loader for _, inner in loader]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def leave_by_break(loader: DataLoader[Any]) -> None:
    for _ in loader:
        break


def leave_by_error(loader: DataLoader[Any]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in loader:
            _ = 1 / 0


def leave_by_close(loader: DataLoader[Any]) -> None:
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert threads() == []
    iterator.close()
    assert list(iterator) == []


def leave_by_del(loader: DataLoader[Any]) -> None:
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert soon(lambda: not threads())


def leave_untouched(loader: DataLoader[Any]) -> None:
    iter(loader)


def leave_to_a_cycle(loader: DataLoader[Any]) -> None:
    cycle: dict[str, Any] = {"iterator": iter(loader)}
    cycle["self"] = cycle


def leave_exhausted(loader: DataLoader[Any]) -> None:
    list(loader)


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_error,
        leave_by_close,
        leave_by_del,
        leave_untouched,
        leave_to_a_cycle,
        leave_exhausted,
    ],
)
def test_leaving_an_iterator_ends_its_threads(store_path: Path, raw_store_path: Path, leave: Any) -> None:
    """However a loop is left, no thread is, and the loader can be used again."""
    for dataset in (images_of(store_path), ImageDataset(raw_store_path), Numbers()):
        loader = DataLoader(dataset, 2, num_workers=2)
        leave(loader)
        gc.collect()
        assert soon(lambda: not threads()), threads()
        assert len(list(loader)) == len(loader)


def test_a_dropped_loader_is_freed_soon(store_path: Path) -> None:
    """No cycle keeps loader and dataset until the garbage collector comes by, after a whole epoch or a break."""
    gc.collect()
    gc.disable()
    try:
        for leave in (leave_exhausted, leave_by_break):
            dataset = images_of(store_path)
            loader = DataLoader(dataset, 5, num_workers=2)
            leave(loader)
            references = [weakref.ref(loader), weakref.ref(dataset)]
            del loader, dataset
            assert soon(lambda of=references: not any(reference() for reference in of))
    finally:
        gc.enable()


def test_no_more_is_drawn_than_may_be_under_way() -> None:
    """`prefetch_factor * num_workers` batches of indices are drawn ahead, and one more for each batch taken."""
    drawn: list[list[int]] = []

    def batches() -> Iterator[list[int]]:
        for start in range(0, 18, 2):
            drawn.append([start, start + 1])
            yield drawn[-1]

    loader = DataLoader(Numbers(), batch_sampler=batches(), num_workers=2, prefetch_factor=3)
    with contextlib.closing(iter(loader)) as iterator:
        assert len(drawn) == 6
        next(iterator)
        assert len(drawn) == 7


def test_no_more_raw_batches_are_drawn_than_may_be_under_way(raw_store_path: Path) -> None:
    """Where several batches are gathered at a time, those of the gather in hand count as taken."""
    drawn: list[int] = []

    class Watched(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            for index in range(40):
                drawn.append(index)
                yield index

        def __len__(self) -> int:
            return 40

    loader = DataLoader(ImageDataset(raw_store_path), 2, sampler=Watched(), num_workers=2, prefetch_factor=3)
    with contextlib.closing(iter(loader)) as iterator:
        next(iterator)
        assert len(drawn) <= 2 * (3 * 2 + 3)


# --- errors


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, ZeroDivisionError, DecodeError])
def test_an_error_of_a_users_dataset_comes_with_type_index_and_traceback(error: type[Exception]) -> None:
    """In its batch's place come its type, the index and the lines that raised it; then the batches after it."""
    batches = iter(DataLoader(Fails(bad=9, error=lambda: error("sample nine")), 4, num_workers=2))
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(error) as caught:
        next(batches)
    text = str(caught.value)
    assert "sample nine" in text
    assert "index 9" in text
    assert "in refuse" in text
    assert "worker thread fastload-worker-" in text
    assert [batch.tolist() for batch in batches] == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_an_error_without_batches_comes_with_its_index() -> None:
    """batch_size=None names the index too."""
    batches = iter(DataLoader(Fails(2, lambda: LookupError("gone")), batch_size=None, num_workers=1))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(LookupError, match="index 2"):
        next(batches)


def test_an_error_in_getitems_names_the_batch(store_path: Path) -> None:
    """A batch that is read as a whole fails as a whole, with its indices."""
    loader = DataLoader(images_of(store_path), batch_sampler=[[0, 1], [3, 12]], num_workers=2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(IndexError, match=r"indices \[3, 12\](.|\n)*index 12 is out of range for a dataset of 12"):
        next(batches)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_error_that_is_no_exception_reaches_the_user(error: type[BaseException]) -> None:
    """A dataset that exits the program does, instead of losing a thread."""
    with pytest.raises(error):
        list(DataLoader(Fails(3, error), 4, num_workers=2))


def test_a_stop_iteration_of_the_dataset_does_not_end_the_epoch_early() -> None:
    """A stray StopIteration in a dataset is an error to be seen, not a shorter epoch."""
    with pytest.raises(RuntimeError):
        list(DataLoader(Fails(9, StopIteration), 4, num_workers=2))


def test_an_error_in_collate_fn_reaches_the_user(store_path: Path) -> None:
    """It comes with its type and the traceback of the thread."""

    def collate(samples: Any) -> Any:
        raise TypeError("this can't be stacked")

    for dataset in (images_of(store_path), Numbers()):
        with pytest.raises(TypeError, match="this can't be stacked") as caught:
            next(iter(DataLoader(dataset, 4, num_workers=2, collate_fn=collate)))
        assert "in collate" in str(caught.value)


def test_pictures_that_do_not_stack_are_explained(store_path: Path) -> None:
    """Without a transform that makes sizes equal, the message says what to do."""
    with pytest.raises(RuntimeError, match="pictures have different shapes"):
        next(iter(DataLoader(ImageDataset(store_path), 4, num_workers=2)))


@pytest.mark.parametrize("kind", ["jpeg", "raw", "numbers"])
def test_an_error_of_the_sampler_comes_after_the_batches_before_it(
    store_path: Path, raw_store_path: Path, kind: str
) -> None:
    """A sampler that fails while the loader draws ahead still gives the batches that it was whole for."""

    class Broken(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(6)
            raise OSError("no more indices")

        def __len__(self) -> int:
            return 12

    dataset = {"jpeg": images_of(store_path), "raw": ImageDataset(raw_store_path), "numbers": Numbers()}[kind]
    batches = iter(DataLoader(dataset, 2, sampler=Broken(), num_workers=2))
    for _ in range(3):
        next(batches)
    with pytest.raises(OSError, match="no more indices"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_of_a_raw_batch_comes_after_the_batches_before_it(raw_store_path: Path) -> None:
    """A batch that can't be gathered does not take those before it along."""
    batches = iter(DataLoader(ImageDataset(raw_store_path), 2, sampler=[0, 1, 2, 3, 4, 40, 5, 6], num_workers=2))
    for _ in range(2):
        next(batches)
    with pytest.raises(IndexError, match="index 40 is out of range"):
        next(batches)


def test_a_result_that_does_not_come_is_a_timeout() -> None:
    """As in torch a RuntimeError that names the limit."""
    release = threading.Event()

    class Hangs(Numbers):
        def __getitem__(self, index: int) -> Any:
            release.wait(1.5)
            return index

    with pytest.raises(RuntimeError, match="timed out after"):
        next(iter(DataLoader(Hangs(), num_workers=1, timeout=0.1)))
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("fastload-worker"):
            thread.join(20)


@pytest.mark.parametrize("on_error", ["placeholder", "raise"])
def test_damage_is_met_by_threads_as_by_one(store_path: Path, tmp_path: Path, on_error: Any) -> None:
    """A sample with flipped bytes is listed once however many threads read it, or raised by name."""
    data = store_path.read_bytes()
    payload = bytes(fastload.Store(store_path)[5]["image"].payload)
    assert payload in data
    path = tmp_path / "damaged.lmdb"
    path.write_bytes(data.replace(payload, payload[:500] + bytes(100) + payload[600:]))
    dataset = images_of(path, on_error=on_error)
    loader = DataLoader(dataset, batch_sampler=[[4, 5], [5, 6], [5, 5]] * 4, num_workers=3)
    if on_error == "raise":
        with pytest.raises(DecodeError, match="sample 5"):
            list(loader)
        return
    labels = [labels.tolist() for _, labels in loader]
    assert labels == [[1, -100], [-100, 1], [-100, -100]] * 4
    assert list(dataset.failures) == [5]
    limited = images_of(path, max_failures=0)
    with pytest.raises(TooManyFailures, match=r"1 samples? failed, max_failures allows 0"):
        list(DataLoader(limited, 4, num_workers=2))


INTERRUPTED = """
import sys
import fastload

dataset = fastload.ImageDataset(sys.argv[1], fastload.transforms.RandomResizedCrop(32))
loader = fastload.DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2)
while True:
    for batch in loader:
        print("batch", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent otherwise on Windows")
def test_ctrl_c_ends_the_program(store_path: Path, tmp_path: Path) -> None:
    """SIGINT in an endless loop is a KeyboardInterrupt with its traceback, and the process ends, threads and all."""
    script = tmp_path / "endless.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(store_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGINT)
        drain = threading.Thread(target=process.stdout.read, name="drain")
        drain.start()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
        drain.join()
        errors = process.stderr.read()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert errors.endswith("KeyboardInterrupt\n"), errors
    assert "for batch in loader" in errors or "print(" in errors, errors


# --- worker threads


def test_worker_init_fn_is_called_in_each_thread(store_path: Path) -> None:
    """Once with each worker's number, in a thread of its own, before it reads."""
    called: dict[int, int] = {}
    everybody = threading.Event()

    def start(number: int) -> None:
        called[number] = threading.get_ident()
        if len(called) == 3:
            everybody.set()
        assert everybody.wait(20)

    batches = list(DataLoader(Signed(), 1, num_workers=3, worker_init_fn=start))
    assert sorted(called) == [0, 1, 2]
    assert len(set(called.values())) == 3
    assert threading.get_ident() not in called.values()
    assert {int(thread) for _, _, thread in batches} <= set(called.values())
    assert len(list(DataLoader(images_of(store_path), 4, num_workers=3, worker_init_fn=called.__getitem__))) == 3


def test_an_error_in_worker_init_fn_reaches_the_user() -> None:
    """Instead of a loader without workers."""

    def start(number: int) -> None:
        raise PermissionError("no GPU for this worker")

    with pytest.raises(PermissionError, match="no GPU for this worker"):
        next(iter(DataLoader(Numbers(), 4, num_workers=2, worker_init_fn=start)))


def workers_of(loader: DataLoader[Any]) -> str:
    """Who computes the samples of `Signed`: this thread, other threads, or other processes."""
    pids, idents = set(), set()
    for _, pid, ident in loader:
        pids.update(pid.tolist())
        idents.update(ident.tolist())
    if pids != {os.getpid()}:
        return "process"
    return "main" if idents == {threading.get_ident()} else "thread"


class Quiet(Signed):
    """Numbers that say nothing of threads."""

    thread_safe = False


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        (Signed(), {"num_workers": 2}, "thread"),
        (Signed(), {"num_workers": 0}, "main"),
        (Signed(), {"num_workers": 2, "worker_type": "process"}, "process"),
        (Quiet(), {"num_workers": 2}, "process"),
        (Quiet(), {"num_workers": 2, "worker_type": "thread"}, "thread"),
        (Subset(Signed(), [1, 2, 3, 5]), {"num_workers": 2}, "thread"),
        (Subset(Quiet(), [1, 2, 3, 5]), {"num_workers": 2}, "process"),
        (ConcatDataset([Signed(), Subset(Signed(), [1])]), {"num_workers": 2}, "thread"),
        (ConcatDataset([Signed(), Quiet()]), {"num_workers": 2}, "process"),
    ],
)
def test_who_works(dataset: Any, options: dict[str, Any], expected: str) -> None:
    """Threads for what says that it is safe, also inside torch's Subset and ConcatDataset; processes for the rest."""
    assert workers_of(DataLoader(dataset, 4, **options)) == expected


def test_subsets_and_concatenations_of_images_use_threads(store_path: Path, raw_store_path: Path) -> None:
    """They give what torch gives for them, in every epoch, and threads do the work."""
    both = [images_of(store_path), images_of(raw_store_path)]
    for dataset in (Subset(both[0], [11, 3, 5, 3]), ConcatDataset(both), Subset(ConcatDataset(both), range(6, 20))):
        loader = DataLoader(dataset, 3, num_workers=2)
        loader.set_epoch(0)
        for epoch in range(2):
            batches = []
            for batch in loader:
                batches.append(batch)
                if len(batches) == 1:
                    assert threads()
            for part in both:
                part.set_epoch(epoch)
            assert_same(batches, list(TorchLoader(dataset, 3)))
        loader.set_epoch(0)


def test_foreign_datasets_get_torchs_processes() -> None:
    """A dataset that says nothing of threads is read by torch's own workers, with torch's result."""
    batches = list(DataLoader(Foreign(), 3, num_workers=2))
    assert [numbers.tolist() for numbers, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert os.getpid() not in {pid for _, pids in batches for pid in pids.tolist()}


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets_get_torchs_processes(workers: int) -> None:
    """An iterable dataset goes torch's way, worker_info and all."""
    batches = list(DataLoader(Stream(), 2, num_workers=workers))
    assert_same(batches, list(TorchLoader(Stream(), 2, num_workers=workers)))


def test_an_iterable_dataset_that_is_thread_safe_is_still_iterable() -> None:
    """Saying `thread_safe` does not make a stream something that can be indexed."""

    class SafeStream(Stream):
        thread_safe = True

    assert sorted(int(n) for n in DataLoader(SafeStream(), batch_size=None, num_workers=1)) == list(range(10))


def test_process_workers_give_the_same_pictures(store_path: Path) -> None:
    """An ImageDataset with worker_type="process" gives in each epoch what threads give."""
    threaded = DataLoader(images_of(store_path), 5, num_workers=2)
    forked = DataLoader(images_of(store_path), 5, num_workers=2, worker_type="process", persistent_workers=True)
    for _ in range(3):
        assert_same(list(forked), list(threaded))
    assert forked.dataset.epoch == threaded.dataset.epoch == 2


class Doubled(ImageDataset):
    """A user's subclass that returns something of its own for a sample and for a batch of them."""

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Any) -> Any:
        return [label * 2 for _, label in super().__getitems__(indices)]


def test_a_subclass_is_read_by_its_own_methods(store_path: Path) -> None:
    """What a subclass overrides holds for threads as it does without workers."""
    dataset = Doubled(store_path, Resize((8, 8)))
    expected = [torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([2, 2, 4, 4, 4, 4])]
    for workers in (0, 2):
        assert_same(list(DataLoader(dataset, 6, num_workers=workers)), expected)


# --- epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_has_other_pictures(store_path: Path, workers: int) -> None:
    """Each pass is a new epoch; the same seed gives the same epochs; another seed gives others."""
    first = DataLoader(images_of(store_path), 12, num_workers=workers)
    epochs = [next(iter(first))[0] for _ in range(3)]
    assert first.dataset.epoch == 2
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(x, y) for x, y in zip(epochs[a], epochs[b], strict=True))
    again = DataLoader(images_of(store_path), 12, num_workers=workers)
    assert_same([next(iter(again))[0] for _ in range(3)], epochs)
    other = DataLoader(images_of(store_path, seed=1), 12, num_workers=workers)
    assert not torch.equal(next(iter(other))[0], epochs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_brings_an_epoch_back(store_path: Path, workers: int) -> None:
    """After `set_epoch(e)` the next pass is epoch e, also twice in a row, and the one after it is e + 1."""
    loader = DataLoader(images_of(store_path), 12, num_workers=workers)
    epochs = [list(loader) for _ in range(4)]
    for epoch in (1, 1, 0, 3, 2):
        loader.set_epoch(epoch)
        assert_same(list(loader), epochs[epoch])
    assert_same(list(loader), epochs[3])


def test_an_epoch_set_on_the_dataset_holds(store_path: Path) -> None:
    """The habit of `dataset.set_epoch(e)` at the head of each epoch, as with torch's samplers, works too."""
    loader = DataLoader(images_of(store_path), 12, num_workers=2)
    epochs = [list(loader) for _ in range(4)]
    for epoch in (2, 0, 1, 3):
        loader.dataset.set_epoch(epoch)
        assert_same(list(loader), epochs[epoch])


class Epochs(Sampler[int]):
    """A sampler with an epoch, as torch's DistributedSampler has."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch, 12))

    def __len__(self) -> int:
        return 12 - self.epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_set_epoch_reaches_the_sampler(store_path: Path) -> None:
    """One call serves dataset and sampler."""
    sampler = Epochs()
    loader = DataLoader(images_of(store_path), sampler=sampler)
    loader.set_epoch(4)
    assert sampler.epoch == loader.dataset.epoch == 4


def test_set_epoch_reaches_the_sampler_of_a_batch_sampler(store_path: Path) -> None:
    """As torch's DistributedSampler is used where batches are made by hand."""
    inner = Epochs()
    DataLoader(images_of(store_path), batch_sampler=BatchSampler(inner, 3, drop_last=False)).set_epoch(5)
    assert inner.epoch == 5


def test_set_epoch_reaches_a_batch_sampler(store_path: Path) -> None:
    """A batch sampler that has an epoch itself gets it."""

    class Batches(BatchSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    batches = Batches(SequentialSampler(range(12)), 3, drop_last=False)
    DataLoader(images_of(store_path), batch_sampler=batches).set_epoch(5)
    assert batches.epoch == 5


def test_epochs_of_live_iterators_stay_apart_without_workers(store_path: Path) -> None:
    """A second iterator does not change the pictures of the first, which are those that threads give."""
    pictures = []
    for workers in (0, 2):
        loader = DataLoader(images_of(store_path), 6, num_workers=workers)
        one = iter(loader)
        first = next(one)
        other = iter(loader)
        pictures.append([first, next(other), next(one), next(other)])
        assert next(one, None) is next(other, None) is None
    assert_same(pictures[0], pictures[1])


@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_what_a_dropped_iterator_read_ahead_is_not_missing(worker_type: Any) -> None:
    """Lightning forgets a loader's persistent iterator: the next one begins its epoch at the start."""
    loader = DataLoader(Foreign(), 1, num_workers=2, persistent_workers=True, worker_type=worker_type)
    for _ in range(2):
        assert [int(index) for index, _ in loader] == list(range(7))
        loader._iterator = None


def test_a_loader_without_epochs_needs_none() -> None:
    """Datasets that know no epoch are left alone."""
    loader = DataLoader(Numbers(4), 2, num_workers=1)
    loader.set_epoch(3)
    assert [numbers.tolist() for numbers in loader] == [[0, 1], [2, 3]]


def test_threads_see_the_dataset_itself(store_path: Path) -> None:
    """No copy is made: the cache is shared by all threads and kept from epoch to epoch."""
    dataset = images_of(store_path, cache="1MB")
    loader = DataLoader(dataset, 3, num_workers=2, shuffle=True)
    for _ in range(3):
        list(loader)
    assert dataset.cache is not None
    assert (dataset.cache.misses, dataset.cache.hits) == (12, 24)


def test_batches_come_in_order_though_threads_differ() -> None:
    """A slow batch holds up those behind it and nothing else: order is the sampler's."""

    class Slow(Numbers):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.02 if index % 4 == 0 else 0)
            return index

    loader = DataLoader(Slow(20), 2, num_workers=3)
    assert [batch.tolist() for batch in loader] == [[i, i + 1] for i in range(0, 20, 2)]
