"""The loader: torch's DataLoader, with threads for the datasets that can take them, and a state.

`DataLoader` is a subclass with torch's signature and defaults, and its iterators are torch's (`iterators`,
`thread_workers`, `process_workers`): what differs is who reads, and that a pass over the data can be resumed. Which
batches come, in which order and epoch, is the business of `passes`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.utils.data
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Sampler, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .batch import collate
from .buckets import BucketSampler
from .dataset import ImageDataset
from .failures import Failures, check_states
from .iterators import CollateWithState, SingleIterator, View
from .orders import State, datasets_below, reads_whole_batches, same
from .passes import Passes
from .process_workers import ProcessIterator
from .sampler import ShuffleSampler
from .thread_workers import ThreadIterator

WorkerType = Literal["auto", "thread", "process"]

T_co = TypeVar("T_co", covariant=True)


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """`torch.utils.data.DataLoader` with thread workers and a state.

    All of torch's arguments, with torch's defaults and meaning, and two more:

    worker_type: "thread", "process", or "auto": threads for datasets that say `thread_safe = True` (`ImageDataset`
        does, and Subset and ConcatDataset of such), processes for all others.
    threads_per_worker: give each worker process so many threads, for machines where one interpreter lock is too few;
        the workers are processes then. The dataset has to be map-style, and safe under threads.

    For an `ImageDataset` each `iter()` is a new epoch, so random transforms differ from epoch to epoch; `set_epoch`
    chooses one. Batches are `[images, labels]`: uint8 (n, 3, height, width), channels-last in memory, and int64 (n,).
    With pin_memory=True threads decode straight into page-locked memory.

    With persistent_workers=True work on the next epoch begins before it is asked for, where its order is known: for
    `ShuffleSampler` and torch's own samplers.

    `state_dict()` says where the user is, whatever was read ahead; see there.

    Raises:
        ValueError: torch's own errors; an unknown worker type; threads_per_worker that make no sense.

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
        threads_per_worker: int | None = None,
    ) -> None:
        if worker_type not in get_args(WorkerType):
            raise ValueError(f"worker_type is {worker_type!r}; it may be {', '.join(get_args(WorkerType))}")
        if isinstance(sampler, BucketSampler):
            raise ValueError("a BucketSampler gives whole batches; pass it as batch_sampler=")
        if threads_per_worker is not None:
            _check_threads_per_worker(threads_per_worker, worker_type, num_workers, dataset)
            if prefetch_factor is None and not reads_whole_batches(dataset):  # each batch is one thread's
                prefetch_factor = threads_per_worker + 1
        self.worker_type: WorkerType = worker_type
        self.threads_per_worker = threads_per_worker
        batched = batch_size is not None or batch_sampler is not None
        if collate_fn is None and batched and any(isinstance(d, ImageDataset) for d in datasets_below(dataset)):
            collate_fn = collate
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
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
        self._passes = Passes(self.dataset, self.sampler, self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch, for the dataset and for samplers that have a `set_epoch`."""
        self._passes.set_epoch(epoch)

    def state_dict(self) -> State:
        """Where the user is in the data: what comes next is what follows the last batch that `next` gave.

        Of the latest iterator, for any kind of worker. With a `ShuffleSampler` it consists of numbers and texts only,
        and can be loaded with another number of ranks; without failed samples it is the same on all ranks at the same
        step. With torch's samplers it holds the state of their generator. For an iterable dataset that has `state_dict`
        it holds the states of the workers' copies; for one without, the number of batches.

        The failed samples of an `ImageDataset`, or of several below Subset and ConcatDataset, are part of it, if there
        are any: those of this rank. Where all ranks load the state of one of them, each begins with its failures; what
        only others had met counts again once it is met again.

        After the last batch, and before the loop has ended, it resumes as a pass without batches; after the loop it is
        the beginning of the next epoch.
        """
        return self.with_failures(self.progress())

    def progress(self) -> State:
        """`state_dict` without the failed samples: cheap enough for each batch, however many there are."""
        seeding = self.generator if self._iterator is None else None  # kept workers have their seeds
        return self._passes.state_dict(seeding) | {"num_workers": self.num_workers if self._is_stream else None}

    def with_failures(self, progress: State) -> State:
        """A state of `progress`, from now or from before, with the samples that have failed so far."""
        failures = self._failures
        return progress | ({"failures": [each.state_dict() for each in failures]} if any(failures) else {})

    def load_state_dict(self, state: State) -> None:
        """Let the next `iter()` go on where `state` was made; nothing of what was consumed is read again.

        (From an iterable dataset without a `state_dict`, what was consumed is read and thrown away.) The data, the
        order and the seeds have to be the same; workers, batch size and, with `ShuffleSampler`, ranks may differ.
        Failed samples are added to those of the dataset, and count for its `max_failures`.

        Raises:
            ValueError: it is no such state, or one of another dataset or order.
        """
        if self._is_stream and isinstance(state, dict) and not same(state.get("num_workers"), self.num_workers):
            raise ValueError(
                f"the state is that of {state.get('num_workers')} workers, each with a part of the iterable dataset; "
                f"this loader has {self.num_workers}: use the same num_workers"
            )
        failures = self._failures
        check_states(failures, state)
        self._passes.load_state_dict(state)
        for each, failed in zip(failures, state.get("failures", []), strict=False):
            each.load_state_dict(failed)
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]  # only iterators with workers are kept
            self._iterator = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a loader is at a place of its own."""
        self.__dict__.update(state, _passes=copy.copy(state["_passes"]))

    def __iter__(self) -> _BaseDataLoaderIter:
        if self._iterator is not None and getattr(self._iterator, "_shutdown", False):  # its workers have died
            self._iterator = None
        return super().__iter__()

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Whether Accelerate's `prepare` is to hand this loader back as it is.

        It deals every loader's batches out to its processes, and would deal a second time what a `ShuffleSampler` or a
        `BucketSampler` has dealt out, so that each process saw a share of its share.
        """
        samplers: tuple[Any, ...] = (self.batch_sampler, self.sampler)
        return any(isinstance(s, BucketSampler | ShuffleSampler) and s.num_replicas > 1 for s in samplers)

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, prepared: bool) -> None:
        """Accelerate marks what it has prepared."""

    @property
    def _failures(self) -> list[Failures]:
        return [dataset.failures for dataset in datasets_below(self.dataset) if isinstance(dataset, ImageDataset)]

    @property
    def _index_sampler(self) -> Any:
        return self._passes

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.dataset, IterableDataset)

    @property
    def _uses_threads(self) -> bool:
        if self.worker_type == "auto":
            return self.threads_per_worker is None and _is_thread_safe(self.dataset)
        return self.worker_type == "thread"

    def _get_iterator(self) -> _BaseDataLoaderIter:
        view: Any = self
        if self._is_stream and hasattr(self.dataset, "state_dict"):
            view = View(self, collate_fn=CollateWithState(self.collate_fn, self.dataset, self.batch_size))
        if self.num_workers == 0:
            return SingleIterator(view)
        return ThreadIterator(view) if self._uses_threads else ProcessIterator(view)


def _is_thread_safe(dataset: Any) -> bool:
    if isinstance(dataset, (Subset, ConcatDataset)):
        return all(_is_thread_safe(part) for part in datasets_below(dataset) if part is not dataset)
    return bool(getattr(dataset, "thread_safe", False))


def _check_threads_per_worker(threads: int, worker_type: WorkerType, num_workers: int, dataset: Any) -> None:
    if threads < 1:
        raise ValueError(f"threads_per_worker is {threads}; it takes at least 1, or None for workers without threads")
    if worker_type == "thread":
        raise ValueError("threads_per_worker is for worker processes; with worker_type='thread' raise num_workers")
    if num_workers == 0:
        raise ValueError("threads_per_worker is for worker processes, and num_workers is 0; give at least 1")
    if isinstance(dataset, IterableDataset):
        raise ValueError("threads_per_worker is for map-style datasets; this one is iterable: leave it out")
