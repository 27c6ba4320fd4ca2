"""Batches as jobs for a crew of threads: what a thread does, whatever process it belongs to.

A `Reader` knows the dataset and how samples become a batch. `WholeBatches` are read by all threads together; a `Fetch`
is one thread's. Both give a list of batches; an error of the dataset stands in its batch's place, as ExceptionWrapper
with the thread's traceback and the index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data.dataloader import _DatasetKind
from torch.utils.data.graph_settings import apply_random_seed

from .batch_reading import Reading
from .iterators import collated, open_ticket
from .orders import reads_whole_batches
from .passes import Ticket
from .workers import Job, context


class Reader:
    """How a dataset's batches are read.

    batched: whether indices come in batches. finish: what is done with a collated batch, pinning say. shared_seed: of
    an IterDataPipe in the pass that begins.
    """

    def __init__(
        self,
        dataset: Any,
        batched: bool,
        collate_fn: Callable[[Any], Any],
        drop_last: bool = False,
        finish: Callable[[Any], Any] | None = None,
        pinned: bool = False,
    ) -> None:
        self.dataset, self.batched, self.drop_last = dataset, batched, drop_last
        self.iterable = isinstance(dataset, IterableDataset)
        self.whole = batched and reads_whole_batches(dataset)
        self._collate, self._finish, self._pinned = collate_fn, finish, pinned
        self._local = threading.local()
        self.shared_seed: int | None = None

    def job(self, group: list[Any], turn: object) -> Job[list[Any]]:
        """The job that reads these batches of indices. turn: tells the passes over an iterable dataset apart."""
        return WholeBatches(self, group) if self.whole else Fetch(self, group[0], turn)

    def begin(self, group: list[Any]) -> Reading:
        """Start to read batches together."""
        indices = [open_ticket(index) for index in group]
        if isinstance(group[0], Ticket) and group[0].draws is not None:
            context.draws = np.concatenate([ticket.draws for ticket in group])
        if self._pinned:
            context.memory = "pinned"
        reading: Reading = self.dataset.begin(np.concatenate(indices) if len(indices) > 1 else indices[0])
        return reading

    def samples(self, indices: Any) -> Any:
        """The samples of a batch, or the one sample."""
        if not self.batched:
            return self._sample(indices)
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self._sample(index) for index in indices]

    def _sample(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise _SampleError(index) from error

    def next_of_stream(self, index: Any, turn: object) -> Any:
        """The next batch of this thread's copy of an iterable dataset, collated; StopIteration at its end."""
        local, info = self._local, get_worker_info()
        assert info is not None
        dataset: Any = info.dataset
        if getattr(local, "turn", None) is not turn:
            local.turn = turn
            if self.shared_seed is not None:
                apply_random_seed(dataset, torch.Generator().manual_seed(self.shared_seed))
            local.fetcher = _DatasetKind.create_fetcher(
                _DatasetKind.Iterable, dataset, self.batched, self.collated, self.drop_last
            )
        return local.fetcher.fetch(index)

    def collated(self, samples: Any) -> Any:
        """A batch made of samples."""
        batch = collated(self._collate, samples)
        return batch if self._finish is None else self._finish(batch)


class WholeBatches:
    """Batches that all threads read together (see `Job`)."""

    def __init__(self, reader: Reader, group: list[Any]) -> None:
        self._reader, self._group = reader, group
        self.parts: int = reader.dataset.parts(sum(map(_length, group)))
        self._reading: Reading | None = None
        self._lock = threading.Lock()
        self._error: ExceptionWrapper | None = None

    def run(self, part: int) -> None:
        try:
            if self._error is None:
                self._begun().fill(part)
        except Exception:
            self._error = wrapped(self._group[0])

    def result(self) -> list[Any]:
        if self._error is not None and len(self._group) > 1:
            return self._one_by_one()
        if self._error is not None:
            return [self._error]
        try:
            batches = self._begun().finish().split([_length(index) for index in self._group])
            return [self._reader.collated(batch) for batch in batches]
        except Exception:
            return [wrapped(self._group[0])]

    def _one_by_one(self) -> list[Any]:
        """What comes out where a group can't be read together."""
        results: list[Any] = []
        for index in self._group:
            alone = WholeBatches(self._reader, [index])
            for part in range(alone.parts):
                alone.run(part)
            results += alone.result()
        return results

    def _begun(self) -> Reading:
        with self._lock:
            if self._reading is None:
                self._reading = self._reader.begin(self._group)
            return self._reading


class Fetch:
    """A batch, or a sample, that one thread reads (see `Job`); no batch at the end of a stream."""

    parts = 1

    def __init__(self, reader: Reader, index: Any, turn: object) -> None:
        self._reader, self._index, self._turn = reader, index, turn

    def run(self, part: int) -> None:
        self._result = self._read()

    def result(self) -> list[Any]:
        return self._result

    def _read(self) -> list[Any]:
        reader = self._reader
        indices = open_ticket(self._index)
        try:
            if reader.iterable:
                return [reader.next_of_stream(indices, self._turn)]
            return [reader.collated(reader.samples(indices))]
        except _SampleError as error:
            return [error.wrapped]
        except StopIteration:
            return [] if reader.iterable else [wrapped(self._index)]
        except Exception:
            return [wrapped(self._index)]


class _SampleError(Exception):
    """An error of the dataset for one index, on its way to the consumer."""

    def __init__(self, index: Any) -> None:
        super().__init__(index)
        self.wrapped = ExceptionWrapper(where=f"{here()}, for index {index}")


def wrapped(index: Any) -> ExceptionWrapper:
    """The exception that is being handled, for the consumer to raise again."""
    return ExceptionWrapper(where=f"{here()}, for indices {shortened(index)}")


def here() -> str:
    """This worker thread, in words."""
    return f"in DataLoader worker thread {threading.current_thread().name}"


def shortened(index: Any) -> str:
    """Indices as a text of bearable length."""
    text = repr(index.indices if isinstance(index, Ticket) else index)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _length(index: Any) -> int:
    return len(index.indices if isinstance(index, Ticket) else index)
