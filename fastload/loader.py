"""The loader: torch's DataLoader, with threads for the datasets that can take them.

`DataLoader` is a subclass with torch's signature and defaults. What it adds is one choice, `worker_type`. With process
workers (foreign datasets), with none, and for iterable datasets torch's own machinery runs, untouched. With thread
workers each batch of indices goes to one thread, which has the dataset read it into one buffer; the buffer is what
comes out. Batches arrive in order, `prefetch_factor * num_workers` of them under way at most.

Threads start in a millisecond, share one cache and one store, and see the dataset itself, not a copy of it. They
run in parallel as far as the dataset's work releases the interpreter lock, as decoding and resizing do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.utils.data
from torch._utils import ExceptionWrapper
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Sampler, Subset
from torch.utils.data._utils.pin_memory import pin_memory

from .dataset import collate
from .workers import OrderedMap, context

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
        """Choose the next epoch, for the dataset and, where it has a `set_epoch`, for the sampler."""
        self._last_epoch = None
        for part in (*_datasets_below(self.dataset), self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Any:
        epoch = self._advance_epoch()
        if self.num_workers > 0 and self._uses_threads():
            return _ThreadIterator(self, epoch)
        return super().__iter__()

    def _uses_threads(self) -> bool:
        if self.worker_type == "auto":
            return _is_thread_safe(self.dataset)
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


class _ThreadIterator(Iterator[Any]):
    """One pass over a loader with thread workers. Dropping it stops them: they know only what `_reader` holds."""

    def __init__(self, loader: DataLoader[Any], epoch: int | None) -> None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # torch's iterators draw a seed here
        self._loader = loader
        self._batches = OrderedMap(
            _reader(loader, epoch),
            loader._index_sampler,
            threads=loader.num_workers,
            ahead=(loader.prefetch_factor or 2) * loader.num_workers,
            name="fastload-worker",
            timeout=loader.timeout,
            start=loader.worker_init_fn,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        batch = next(self._batches)
        if isinstance(batch, ExceptionWrapper):
            self._batches.close()
            batch.reraise()
        return batch

    def close(self) -> None:
        """Stop the threads, each after the batch in its hands."""
        self._batches.close()


def _reader(loader: DataLoader[Any], epoch: int | None) -> Callable[[Any], Any]:
    """A function that reads what the sampler gave: a batch of indices, or one index where batching is off."""
    dataset, collate_fn, batched = loader.dataset, loader.collate_fn, loader._auto_collation
    pinned = loader.pin_memory and torch.accelerator.is_available()
    device = loader.pin_memory_device or None

    def read(indices: Any) -> Any:
        context.epoch, context.pin = epoch, pinned
        try:
            batch = collate_fn(_samples(dataset, indices) if batched else _sample(dataset, indices))
            return pin_memory(batch, device) if pinned else batch
        except _SampleError as error:
            return error.wrapped
        except Exception:
            return ExceptionWrapper(where=f"in a DataLoader worker thread, for indices {_shortened(indices)}")

    return read


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
