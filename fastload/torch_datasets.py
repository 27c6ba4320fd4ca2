"""Any Dataset of torch's as a source: map-style or iterable, read in this process or by a loader's worker processes.

What its samples consist of is learned from a few of them (see `fields`). A sample that can't be read, or is unlike
those, is left out with its reason. The dataset itself is read by one thread, in order, or by as many processes as are
asked for, each with a copy of it as with a loader; encoding is done by threads, or by those processes.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import arrays, record
from .errors import PackError, SourceError
from .fields import Schema, learn
from .items import Item, Source
from .prepare import LeftOut, Prepared, libraries_for_packing
from .workers import ordered_map

_LOOKED_AT = 32
_AHEAD = 4

One = Callable[[Item, Source], Prepared | LeftOut]
"""What packs an item of a source."""


def open_dataset(dataset: Any, kinds: Mapping[str, str], workers: int) -> Source:
    """A dataset as a source. kinds: of fields whose values don't tell theirs, see `fields`. workers: processes, or 0.

    Raises:
        TypeError: it is no dataset.
        SourceError: it is empty, its first samples can't be read, or are nothing that can be stored.
    """
    reader = _Reader(dataset, kinds, workers)
    classes = getattr(dataset, "classes", None)
    named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    fields = [(spec.name, spec.kind) for spec in reader.schema.specs]
    has_classes = named and (("label", "integer") in fields or any(kind == "mask" for _, kind in fields))
    return Source(
        *("dataset", _Items(reader.count or 0), list(classes) if has_classes and classes else None, 1),
        notes=_remarks(reader, kinds),
        schema=reader.schema,
        masks={spec.name: spec.fill for spec in reader.schema.of_kind("mask")},
        read=reader.read,
        first=reader.first,
        content=reader.content,
        outcomes=reader.outcomes,
    )


def _remarks(reader: _Reader, kinds: Mapping[str, str]) -> list[str]:
    """What whoever packs may not expect."""
    pictures = [spec.name for spec in reader.schema.of_kind("image")[1:]]
    modes = {value.mode for values in reader.first for value in values.values() if isinstance(value, Image.Image)}
    lost = sorted(modes - {"L", "RGB", "P", "1", "I", "F"} - {mode for mode in modes if mode.startswith("I;")})
    remarks = []
    if pictures:
        remarks.append(
            f"transforms move the first picture alone, {', '.join(pictures)} come as they are; a mask moves along if "
            "it is said to be one, with kinds={NAME: 'mask'}"
        )
    if "boxes" in kinds.values():
        remarks.append("boxes are taken as (x, y, width, height); for corners (x1, y1, x2, y2) the kind is boxes:XYXY")
    if lost:
        remarks.append(f"pictures of mode {', '.join(lost)} are kept as RGB, without alpha; arrays keep all channels")
    return remarks


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Say what to do when a process that reads a dataset is killed: torch raises that anywhere in the main thread.

    Raises:
        PackError: one was.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise PackError(
            f"a process that reads the dataset was lost ({error}); run the same command again: it goes on from what is "
            "already packed"
        ) from error


class _Items(Sequence[Item]):
    """Numbered items, made when they are asked for: a dataset may have more samples than fit into a list."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        numbers = range(self._count)[index]
        return _item(numbers) if isinstance(numbers, int) else [_item(number) for number in numbers]


def _item(number: int) -> Item:
    return Item(f"{number:08d}", "", sample=number)


class _Reader:
    """A dataset and what its samples are. It goes to worker processes as a whole. What may be iterable once is.

    schema: of the samples. first: the values of some. count: how many there are, None where nobody knows. content: what
    changes with the dataset, as far as its first sample shows.
    """

    def __init__(self, dataset: Any, kinds: Mapping[str, str], workers: int) -> None:
        self.dataset, self.workers = dataset, workers
        self.iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if isinstance(dataset, bytes) or (self.iterable and not hasattr(dataset, "__iter__")):
            raise TypeError(
                f"source is a {type(dataset).__name__}; it may be a path, or a dataset: something with __getitem__ and "
                "__len__, or with __iter__"
            )
        self.count = _length(dataset)
        if self.count is None and not self.iterable:
            raise TypeError(f"{type(dataset).__name__} has no length; a map-style dataset needs __len__")
        self._whole: Iterator[Any] = iter(())
        samples = self._first_samples()
        self.schema: Schema = learn(samples, kinds)
        self.first = [self.schema.flatten(sample) for sample in samples]
        known = (type(dataset).__qualname__, self.count, self.schema, _digest(self.first[0]))
        self.content = f"{record.checksum(repr(known).encode('utf-8', 'surrogatepass')):016x}"

    def _first_samples(self) -> list[Any]:
        samples, errors = [], []
        if self.iterable:
            try:
                stream = iter(self.dataset)
                if self.workers and iter(self.dataset) is stream:
                    raise TypeError(
                        f"{type(self.dataset).__name__} gives its samples once, and each worker reads it anew; leave "
                        "workers out, or let __iter__ start again"
                    )
                samples = list(itertools.islice(stream, _LOOKED_AT))
            except Exception as error:  # the user's own code; it may raise anything
                raise SourceError(f"the dataset's first samples can't be read: {_told(error)}") from error
            self._whole = itertools.chain(samples, stream)
        count = 0 if self.iterable else self.count or 0
        for place in range(min(count, _LOOKED_AT)):
            try:
                samples.append(self.dataset[place * count // min(count, _LOOKED_AT)])
            except Exception as error:
                errors.append(error)
        if not samples:
            reason = f"none of the samples looked at can be read: {_told(errors[0])}" if errors else "it is empty"
            raise SourceError(f"there is nothing to pack in the dataset, a {type(self.dataset).__name__}: {reason}")
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"first": [], "_whole": None}

    def read(self, item: Item) -> dict[str, Any]:
        """The values of a sample, by field."""
        try:
            sample = self.dataset[item.sample]
        except Exception as error:
            raise SourceError(_told(error)) from error
        return self.schema.flatten(sample)

    def outcomes(self, one: One, source: Source, start: int, threads: int) -> Iterator[Prepared | LeftOut]:
        """The items from `start` on, packed by `one`, in order.

        Raises:
            PackError: the dataset's iterator failed.
        """
        if self.workers:
            return self._by_processes(one, source, start)
        return ordered_map(
            lambda pair: one(pair[0], source._replace(read=pair[1])),
            itertools.islice(self.streamed(self._whole), start, None) if self.iterable else self._loaded(start),
            threads=threads,
            ahead=_AHEAD * threads,
            name="fastload-pack",
        )

    def _loaded(self, start: int) -> Iterator[tuple[Item, Callable[[Item], dict[str, Any]]]]:
        """Items of a map-style dataset, read already."""
        for number in range(start, self.count or 0):
            item = _item(number)
            try:
                contents = self.read(item)
            except SourceError as error:
                yield item._replace(problem=str(error)), lambda _: {}
            else:
                yield item, lambda _, contents=contents: contents  # type: ignore[misc]

    def streamed(self, samples: Iterator[Any]) -> Iterator[tuple[Item, Callable[[Item], dict[str, Any]]]]:
        """Items of an iterable dataset."""
        numbered = enumerate(samples)
        number = -1
        while True:
            try:
                number, sample = next(numbered)
            except StopIteration:
                return
            except Exception as error:
                raise PackError(f"the dataset failed after {number + 1} samples: {_told(error)}") from error
            yield _item(number), lambda _, sample=sample: self.schema.flatten(sample)  # type: ignore[misc]

    def _by_processes(self, one: One, source: Source, start: int) -> Iterator[Prepared | LeftOut]:
        work: Dataset[Any] = _Streamed(self, one, source) if self.iterable else _Indexed(one, source)
        loader = DataLoader(
            work,
            batch_size=None,
            sampler=None if self.iterable else range(start, self.count or 0),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
        )
        try:
            outcomes = iter(loader)
        except Exception as error:  # where processes are not forked, a dataset has to be sent there
            raise PackError(f"worker processes can't be started with this dataset: {_told(error)}") from error
        first: Prepared | LeftOut | None = None
        for number, outcome in enumerate(outcomes):  # those of several processes come in turn
            if self.iterable and number == 1 and self.workers > 1 and _same(outcome, first):
                raise SourceError(
                    f"{type(self.dataset).__name__} gives the same first sample in two workers: each would pack all of "
                    "it; let __iter__ give each its share, by torch's get_worker_info, or leave workers out"
                )
            first = outcome if number == 0 else first
            if not self.iterable:
                yield outcome
            elif number >= start:
                item = _item(number)
                is_left_out = isinstance(outcome, LeftOut)
                yield outcome._replace(**({"item": item} if is_left_out else {"name": item.name}))


class _Indexed(Dataset[Any]):
    """Packs a map-style dataset's samples where they are read."""

    def __init__(self, one: One, source: Source) -> None:
        self.one, self.source = one, source

    def __getitem__(self, index: int) -> Prepared | LeftOut:
        return self.one(_item(index), self.source)


class _Streamed(IterableDataset[Any]):
    """Packs an iterable dataset's samples where they are read."""

    def __init__(self, reader: _Reader, one: One, source: Source) -> None:
        self.reader, self.one, self.source = reader, one, source

    def __iter__(self) -> Iterator[Prepared | LeftOut]:
        for item, read in self.reader.streamed(iter(self.reader.dataset)):
            yield self.one(item, self.source._replace(read=read))


def _same(outcome: Prepared | LeftOut, other: Prepared | LeftOut | None) -> bool:
    if not isinstance(outcome, Prepared) or not isinstance(other, Prepared):
        return False
    return (outcome.fields, repr(outcome.cells)) == (other.fields, repr(other.cells))


def _as_it_is(outcome: Any) -> Any:
    return outcome


def _start_worker(_: int) -> None:
    libraries_for_packing().__enter__()
    threading.Thread(target=_end_with_parent, name="fastload-parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process with a killed parent; torch's own watch waits forever for somebody to take the last results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _digest(values: Mapping[str, Any]) -> list[Any]:
    """What a sample is known by."""
    return [_known(value) for value in values.values()]


def _known(value: Any) -> Any:
    if isinstance(value, Image.Image):
        # Of a damaged file the first `load` fails, and others give what was read of it: that one is not for here.
        is_open = bool(getattr(value, "tile", None))
        return value.mode, value.size, 0 if is_open else record.checksum(value.tobytes())
    if isinstance(value, np.ndarray | torch.Tensor):
        with contextlib.suppress(SourceError):  # it is left out, with its reason
            return record.checksum(arrays.field_of(value).payload)
    return repr(value)
