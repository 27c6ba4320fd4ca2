"""The loader: torch's DataLoader, with threads for the datasets that can take them.

`DataLoader` is a subclass with torch's signature and defaults. What it adds is one choice, `worker_type`. With process
workers (foreign datasets), with none, and for iterable datasets torch's own machinery runs, untouched. With thread
workers each batch of an `ImageDataset` is read by all threads together, eight samples at a time, into one buffer,
which is what comes out; a batch of another dataset is one thread's. Batches arrive in order,
`prefetch_factor * num_workers` of them under way at most.

Threads start in a millisecond, share one cache and one store, and see the dataset itself, not a copy of it. They
run in parallel as far as the dataset's work releases the interpreter lock, as decoding and resizing do.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data
from torch._utils import ExceptionWrapper
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data._utils.pin_memory import pin_memory

from .batch import collate
from .dataset import ImageDataset, Reading
from .workers import OrderedJobs, context

WorkerType = Literal["auto", "thread", "process"]

T_co = TypeVar("T_co", covariant=True)


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """`torch.utils.data.DataLoader` with thread workers.

    All of torch's arguments, with torch's defaults and meaning, and one more:

    worker_type: "thread", "process" (torch's workers), or "auto": threads for datasets that say `thread_safe = True`
        (`ImageDataset` does, and Subset and ConcatDataset of such), processes for all others.

    For an `ImageDataset` each `iter()` is a new epoch, so random transforms differ from epoch to epoch; `set_epoch`
    chooses one. Batches are `[images, labels]`: uint8 (n, 3, height, width), channels-last in memory, and int64 (n,).
    With pin_memory=True threads decode straight into page-locked memory.

    With threads `persistent_workers` has nothing to keep alive, `multiprocessing_context` nothing to start, and
    results are in order whatever `in_order` says. An error in the dataset is raised again with its type, its index
    and the thread's traceback.

    Raises:
        ValueError: torch's own errors; an unknown worker type; threads asked for with an iterable dataset.

    Example:
        >>> loader = fastload.DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)
        >>> for images, labels in loader: ...
    """

    def __init__(
        self,
        dataset: Dataset[T_co],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        worker_type: WorkerType = "auto",
    ) -> None:
        if worker_type not in get_args(WorkerType):
            raise ValueError(f"worker_type is {worker_type!r}; it may be {', '.join(get_args(WorkerType))}")
        if worker_type == "thread" and isinstance(dataset, IterableDataset):
            raise ValueError("worker_type is 'thread', but the dataset is iterable: leave it out to use processes")
        self.worker_type: WorkerType = worker_type
        batched = batch_size is not None or batch_sampler is not None
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate if collate_fn is None and batched else collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        self._last_epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch, for the dataset and for samplers that have a `set_epoch`."""
        self._last_epoch = None
        samplers = (self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None))
        for part in (*_datasets_below(self.dataset), *samplers):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Any:
        epoch = self._advance_epoch()
        if self.num_workers > 0 and self._uses_threads():
            return _ThreadIterator(self, epoch)
        batches = super().__iter__()
        return batches if self.num_workers > 0 or epoch is None else _InEpoch(batches, epoch)

    def check_worker_number_rationality(self) -> None:
        """torch's warning about more worker processes than cores; threads don't deserve it."""
        if not self._uses_threads():
            super().check_worker_number_rationality()

    def _uses_threads(self) -> bool:
        if self.worker_type == "auto":
            return _is_thread_safe(self.dataset) and not isinstance(self.dataset, IterableDataset)
        return self.worker_type == "thread"

    def _advance_epoch(self) -> int | None:
        """Make this the dataset's next epoch, unless its epoch was set by hand since the last one."""
        datasets = [d for d in _datasets_below(self.dataset) if hasattr(d, "set_epoch") and hasattr(d, "epoch")]
        if not datasets:
            return None
        epoch: int = max(dataset.epoch for dataset in datasets)
        if epoch == self._last_epoch:
            epoch += 1
        for dataset in datasets:
            dataset.set_epoch(epoch)
        self._last_epoch = epoch
        return epoch


def _datasets_below(dataset: Any) -> Iterator[Any]:
    """The dataset and, for torch's Subset and ConcatDataset, those inside it."""
    yield dataset
    if isinstance(dataset, Subset):
        yield from _datasets_below(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _datasets_below(part)


def _is_thread_safe(dataset: Any) -> bool:
    if isinstance(dataset, (Subset, ConcatDataset)):
        return all(_is_thread_safe(part) for part in _datasets_below(dataset) if part is not dataset)
    return bool(getattr(dataset, "thread_safe", False))


class _InEpoch(Iterator[Any]):
    """An iterator without workers that reads all of its batches in one epoch, whatever other iterators do."""

    def __init__(self, batches: Iterator[Any], epoch: int) -> None:
        self._batches, self._epoch = batches, epoch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # torch's iterators have a length

    def __next__(self) -> Any:
        outer, context.epoch = context.epoch, self._epoch
        try:
            return next(self._batches)
        finally:
            context.epoch = outer


class _ThreadIterator(Iterator[Any]):
    """One pass over a loader with thread workers. Dropping it stops them: they know only what `_Reader` holds."""

    def __init__(self, loader: DataLoader[Any], epoch: int | None) -> None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # torch's iterators draw a seed here
        self._loader = loader
        prefetch = loader.prefetch_factor or 2
        per_read = min(_batches_per_read(loader), prefetch)
        self._ready: deque[Any] = deque()
        self._reads: OrderedJobs[Any] = OrderedJobs(
            map(_Reader(loader, epoch), _groups(_index_batches(loader), per_read)),
            threads=loader.num_workers,
            ahead=prefetch * loader.num_workers // per_read,
            name="fastload-worker",
            timeout=loader.timeout,
            start=loader.worker_init_fn,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        if not self._ready:
            self._ready.extend(next(self._reads))
        batch = self._ready.popleft()
        if isinstance(batch, ExceptionWrapper):
            self.close()
            if issubclass(batch.exc_type, StopIteration):  # it would pass for the end of the epoch
                raise RuntimeError(f"Caught StopIteration {batch.where}.\nOriginal {batch.exc_msg}")
            batch.reraise()
        return batch

    def close(self) -> None:
        """Stop the threads, each after the part in its hands, and drop what they read."""
        self._reads.close()
        self._ready.clear()


def _batches_per_read(loader: DataLoader[Any]) -> int:
    dataset: Any = loader.dataset
    if _reads_whole_batches(dataset) and loader.batch_size and loader.collate_fn is collate:
        return int(dataset.batches_per_read(loader.batch_size))
    return 1


def _reads_whole_batches(dataset: Any) -> bool:
    return isinstance(dataset, ImageDataset) and dataset.reads_whole_batches


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` batches; an error of the sampler comes after the batches before it."""
    batches = iter(batches)
    error: Exception | None = None
    while error is None:
        group: list[Any] = []
        try:
            group += itertools.islice(batches, size)
        except Exception as failed:
            error = failed
        if group:
            yield group
        elif error is None:
            return
    raise error


def _index_batches(loader: DataLoader[Any]) -> Iterable[Any]:
    """What the loader's sampler gives; for an `ImageDataset` and torch's plain samplers the same order as arrays.

    torch makes a Python int of each index first, 0.1 us and 32 bytes each while the workers wait for the interpreter.
    """
    batches, sampler = loader.batch_sampler, loader.sampler
    if _reads_whole_batches(loader.dataset) and type(batches) is BatchSampler and batches.sampler is sampler:
        if type(sampler) is SequentialSampler:
            return _slices(np.arange, len(sampler), batches)
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
            return _shuffled(len(sampler), sampler.generator, batches)
    given: Iterable[Any] = loader._index_sampler
    return given


def _shuffled(count: int, generator: torch.Generator | None, batches: BatchSampler) -> Iterator[npt.NDArray[np.int64]]:
    """RandomSampler's order, with its draws: a seed or the user's generator first, and at the end an unused one."""
    own = generator or torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    order = torch.randperm(count, generator=own).numpy()
    yield from _slices(lambda start, stop: order[start:stop], count, batches)
    if generator is not None:
        torch.randperm(count, generator=generator)


def _slices(
    of: Callable[[int, int], npt.NDArray[np.int64]], count: int, batches: BatchSampler
) -> Iterator[npt.NDArray[np.int64]]:
    size = batches.batch_size
    end = count // size * size if batches.drop_last else count
    for start in range(0, end, size):
        yield of(start, min(start + size, end))


class _Reader:
    """What thread workers know of a loader. Calling it with what the sampler gave makes a job of it."""

    def __init__(self, loader: DataLoader[Any], epoch: int | None) -> None:
        self.dataset: Any = loader.dataset
        self.collate, self.batched, self.epoch = loader.collate_fn, loader._auto_collation, epoch
        self.pinned = loader.pin_memory and torch.accelerator.is_available()
        self.device = loader.pin_memory_device or None

    def __call__(self, group: list[Any]) -> _Read:
        return _Read(self, group)


class _Read:
    """A group of batches to be read (see `Job`); its result is a list of batches, up to the first error."""

    def __init__(self, reader: _Reader, group: list[Any]) -> None:
        self._reader, self._group = reader, group
        shared = reader.batched and _reads_whole_batches(reader.dataset)
        self.parts: int = reader.dataset.parts(sum(map(len, group))) if shared else 1
        self._shared = shared
        self._reading: Reading | None = None
        self._samples: Any = None
        self._lock = threading.Lock()
        self._error: ExceptionWrapper | None = None

    def run(self, part: int) -> None:
        reader = self._reader
        context.epoch, context.pin = reader.epoch, reader.pinned
        try:
            if self._error is not None:
                return
            if self._shared:
                self._begun().fill(part)
            else:
                read = _samples if reader.batched else _sample
                self._samples = read(reader.dataset, self._group[0])
        except _SampleError as error:
            self._error = error.wrapped
        except Exception:
            self._error = self._wrapped()

    def result(self) -> list[Any]:
        if self._error is not None and len(self._group) > 1:
            return self._one_by_one()
        try:
            if self._error is None:
                samples = [self._samples]
                if self._reading is not None:
                    samples = self._reading.finish().split([len(indices) for indices in self._group])
                return [self._finished(batch) for batch in samples]
        except Exception:
            self._error = self._wrapped()
        return [self._error]

    def _one_by_one(self) -> list[Any]:
        """What comes out where a group can't be read together: the batches before the one that fails, and its error."""
        results: list[Any] = []
        for indices in self._group:
            read = _Read(self._reader, [indices])
            for part in range(read.parts):
                read.run(part)
            results += read.result()
            if isinstance(results[-1], ExceptionWrapper):
                break
        return results

    def _finished(self, samples: Any) -> Any:
        batch = self._reader.collate(samples)
        return pin_memory(batch, self._reader.device) if self._reader.pinned else batch

    def _begun(self) -> Reading:
        with self._lock:
            if self._reading is None:
                group = self._group
                self._reading = self._reader.dataset.begin(np.concatenate(group) if len(group) > 1 else group[0])
            return self._reading

    def _wrapped(self) -> ExceptionWrapper:
        return ExceptionWrapper(where=f"in a DataLoader worker thread, for indices {_shortened(self._group[0])}")


class _SampleError(Exception):
    """An error of the dataset for one index, on its way to the consumer."""

    def __init__(self, index: Any) -> None:
        super().__init__(index)
        self.wrapped = ExceptionWrapper(where=f"in a DataLoader worker thread, for index {index}")


def _samples(dataset: Any, indices: Any) -> Any:
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(indices)
    return [_sample(dataset, index) for index in indices]


def _sample(dataset: Any, index: Any) -> Any:
    try:
        return dataset[index]
    except Exception as error:
        raise _SampleError(index) from error


def _shortened(indices: Any) -> str:
    text = repr(indices)
    return text if len(text) <= 200 else f"{text[:200]}..."
