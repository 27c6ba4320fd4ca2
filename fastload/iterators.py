"""What all iterators of a loader have in common, and the one that needs no workers.

They are torch's own iterators (`torch.utils.data.dataloader._BaseDataLoaderIter` and below), over a `Pass` instead of a
bare sampler: it says which epoch a batch belongs to, and is told which batches have reached the user.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _profiler_enabled
from torch._utils import ExceptionWrapper
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind, _SingleProcessDataLoaderIter

from .batch import collate
from .orders import State
from .passes import Pass, Ticket
from .worker_info import hidden_worker_info
from .workers import context, fork_gate


class PassIterator(_BaseDataLoaderIter):
    """A pass over a loader's batches, on top of one of torch's iterators."""

    _sampler_iter: Pass
    _index_sampler: Any  # the loader's `Passes`

    def __init__(self, loader: Any) -> None:
        loader._index_sampler.forget()  # what another iterator has begun to read ahead is its own
        self._seeding = None if loader.persistent_workers else loader.generator
        super().__init__(loader)

    @abstractmethod
    def _shutdown_workers(self) -> None:
        """End all workers; no more batches come."""

    def __next__(self) -> Any:
        try:
            if self._sampler_iter.untouched:
                self._settle()
            while self._sampler_iter.discard > 0:
                super().__next__()
                self._sampler_iter.discard -= 1
            if _profiler_enabled() or self._dataset_kind == _DatasetKind.Iterable:
                return super().__next__()
            # torch's __next__ without its entry for the profiler, 20 us that nobody reads
            data: Any = self._next_data()
            self._num_yielded += 1
            return data
        except StopIteration:
            self._sampler_iter.finished = True
            raise
        except Exception:
            raise
        except BaseException:  # Ctrl-C: leave nothing behind, though the traceback may keep this iterator alive
            self._abort()
            raise

    def _settle(self) -> None:
        """Begin anew where an epoch was chosen after `iter`."""
        if not self._index_sampler.still(self._sampler_iter):
            if self._seeding is not None:  # a new iterator draws its seed
                torch.empty((), dtype=torch.int64).random_(generator=self._seeding)
            self._reset(View(None, generator=None, _IterableDataset_len_called=self._IterableDataset_len_called))
        self._sampler_iter.untouched = False

    def _abort(self) -> None:
        """End all workers at once."""
        self._shutdown_workers()

    def close(self) -> None:
        """End the workers now; dropping the iterator does the same."""
        self._shutdown_workers()

    def _took(self, number: int) -> None:
        """Note that batch `number` has reached the user. Those of a stream are counted: some numbers stay unused."""
        self._sampler_iter.take(None if self._dataset_kind == _DatasetKind.Iterable else number)

    def _unpacked(self, data: Any, worker: int) -> Any:
        """The batch, once what came with it from worker `worker` is noted; or its error, raised."""
        if isinstance(data, ExceptionWrapper):
            _reraise(data)
        current = self._sampler_iter
        current.turn = (worker + 1) % max(1, self._num_workers)
        if isinstance(data, Stated):
            current.workers[worker] = {"state": data.state, "last": data.last}
            return data.batch
        return data


def _reraise(wrapper: ExceptionWrapper) -> None:
    """Raise a worker's error, without the frames that torch's `reraise` leaves: they hold the error, and it them."""
    if issubclass(wrapper.exc_type, StopIteration):  # it would pass for the end of the epoch
        raise RuntimeError(f"Caught StopIteration {wrapper.where}.\nOriginal {wrapper.exc_msg}")
    try:
        wrapper.reraise()
    except BaseException as error:
        raise error.with_traceback(None) from None


class SingleIterator(_SingleProcessDataLoaderIter, PassIterator):
    """A pass without workers."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        if self._sampler_iter.workers:
            dataset: Any = self._dataset
            dataset.load_state_dict(copy.deepcopy(self._sampler_iter.workers[0]["state"]))
            self._dataset_fetcher = type(self._dataset_fetcher)(
                self._dataset, self._auto_collation, self._collate_fn, self._drop_last
            )
            self._dataset_fetcher.ended = self._sampler_iter.workers[0]["last"]

    def _shutdown_workers(self) -> None:
        """There are none."""

    def _next_index(self) -> Any:
        return open_ticket(super()._next_index())  # type: ignore[no-untyped-call]  # torch's

    def _next_data(self) -> Any:
        outer = context.epoch, context.draws
        try:
            with fork_gate:  # in a prefetcher's thread, say
                data = super()._next_data()  # type: ignore[no-untyped-call]  # torch's
        except Exception as error:
            if not isinstance(error, StopIteration):  # a batch that fails is behind the user, as with workers
                self._took(self._sampler_iter.number)
            raise
        finally:
            context.epoch, context.draws = outer
        self._took(self._sampler_iter.number)
        return self._unpacked(data, 0)


def open_ticket(index: Any) -> Any:
    """The indices on a ticket, for this thread to read, and what goes with them in `context`."""
    if not isinstance(index, Ticket):
        return index
    context.epoch, context.draws = index.epoch, index.draws
    return index.indices


class Stated(NamedTuple):
    """A batch of an iterable dataset, the dataset's state after it, and whether it was the worker's last one."""

    batch: Any
    state: State
    last: bool


class CollateWithState:
    """A collate_fn for an iterable dataset that has a state: the state of this worker's copy goes with each batch."""

    def __init__(self, collate_fn: Any, dataset: Any, batch_size: int | None) -> None:
        self._collate, self._dataset, self._batch_size = collate_fn, dataset, batch_size

    def __call__(self, samples: Any) -> Stated:
        info = get_worker_info()
        dataset: Any = self._dataset if info is None else info.dataset
        last = self._batch_size is not None and len(samples) < self._batch_size
        batch, state = collated(self._collate, samples), dataset.state_dict()
        return Stated(batch, copy.deepcopy(state), last)  # the dataset may go on to change what it gave


def collated(collate_fn: Any, samples: Any) -> Any:
    """A batch made of samples. torch's default_collate would make it in shared memory, if it saw a worker."""
    if collate_fn not in (collate, default_collate):
        return collate_fn(samples)
    with hidden_worker_info():
        return collate_fn(samples)


class View:
    """A loader as torch's iterators see it, with some attributes that differ."""

    def __init__(self, loader: Any, **others: Any) -> None:
        self.__dict__.update(others, _loader=loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)
