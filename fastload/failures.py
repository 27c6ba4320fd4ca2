"""Samples that failed: counted once each, across threads and worker processes, and held against a limit.

The table is memory that all processes share: a mark for each sample, and a count for each page of marks. Who marks a
sample counts its page anew, until the count is what it finds; the number of failures is the sum of the counts. So
- nobody takes a lock that a killed worker could keep, and nothing is added up, so that nothing can be added twice. A
  count is never more than what is marked, and who writes a stale one finds that out by counting again: once all have
  reported, whoever was last has seen the true number, and a limit is neither missed nor held too early;
- a report costs as much as a page and the sum of the counts, however many samples there are or have failed;
- pages in which nothing failed take up no memory, where the system has memory without names (see `anonymous_memory`).

A worker that is killed between mark and count leaves a sample out until its page is counted again, by the next report
in it or by whoever lists it.

The first reasons, about a thousand, stand in the same memory, each with a checksum: where two processes chose the same
place for theirs, one reason is lost, never mixed up with another.
"""

from __future__ import annotations

import base64
import itertools
import logging
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from . import anonymous_memory, record
from .errors import TooManyFailures
from .order import mix64

_PAGE = 4096
_KEPT = 1024
_REASON = np.dtype([("index", "<i8"), ("checksum", "<u8"), ("text", "S256")])  # index: from 1; 0 is a free place
_LOGGED = 100
_NAMED = 5
_LOST = 'reason not kept; on_error="raise" tells it again'

_log = logging.getLogger("fastload")
_lock = threading.Lock()  # among the threads of one process


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - the one that a fork has copied may be taken, by a thread that was not
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Failures(Mapping[int, str]):
    """The samples that failed so far: index -> reason. Read it like a dict; `len` counts samples, not attempts.

    They are those of this process and of its workers, threads and processes alike, and those of a state that was
    loaded; of all ranks with `across_ranks`. A reason is kept for the first 1,024 or so, up to 256 bytes of it.

    A copy that is pickled, or made by `copy.deepcopy`, counts for itself; what goes to a process that is started shares
    this one's memory.

    samples: how many the dataset has. limit: how many may fail before `TooManyFailures` is raised; None for no limit.
    memory: another process's, to be shared.
    """

    def __init__(self, samples: int, limit: int | None = None, memory: torch.Tensor | None = None) -> None:
        self.samples, self.limit = samples, limit
        self._pages = -(-samples // _PAGE)
        size = self._pages * (_PAGE + 8) + _KEPT * _REASON.itemsize + 8
        self._memory = anonymous_memory.zeros(size) if memory is None else memory

    def report(self, index: int, reason: str) -> None:
        """Note that a sample failed. The first hundred are logged, then one each time that their number has doubled.

        Raises:
            TooManyFailures: there are more than the limit allows.
        """
        table = self._table()
        page, place = divmod(index, _PAGE)
        with _lock:
            new = not table.failed[page, place]
            if new:
                table.keep(index, reason)
                table.failed[page, place] = True
            table.settle(page)
            count = int(table.counts.sum())
            doubled = new and count >= max(_LOGGED, 2 * int(table.logged[0]))
            if doubled:
                table.logged[0] = count
        if doubled:
            _log.warning(
                "sample %d: %s. That makes %d failed samples; from here on, one is logged each time that their number "
                "has doubled, and dataset.failures lists all",
                *(index, reason, count),
            )
        elif new and count < _LOGGED:
            _log.warning("sample %d: %s", index, reason)
        if self.limit is not None and count > self.limit:
            raise TooManyFailures(self._verdict(count))

    def across_ranks(self) -> dict[int, str]:
        """The failures of all ranks of torch.distributed together; without a process group, this process's.

        It is a collective: each rank has to call it, and gets the same. With NCCL it goes over the current CUDA device.

        Example:
            >>> failures = dataset.failures.across_ranks()  # on every rank
            >>> if rank == 0: print(len(failures), "samples failed")
        """
        states: list[Any] = [self.state_dict()]
        if distributed.is_available() and distributed.is_initialized():
            states *= distributed.get_world_size()
            distributed.all_gather_object(states, states[0])
        union = Failures(self.samples)
        for state in states:
            union.load_state_dict(state)
        return dict(union)

    def state_dict(self) -> dict[str, Any]:
        """All failures as texts and numbers: a bit for each sample of the pages that have any, compressed."""
        table = self._table()
        pages = np.flatnonzero(table.counts)
        packed = pages.astype("<i8").tobytes() + np.packbits(table.failed[pages]).tobytes()
        samples = base64.b64encode(zlib.compress(packed)).decode()
        return {"samples": samples, "reasons": [[*pair] for pair in sorted(_legible(table.reasons).items())]}

    def load_state_dict(self, state: Any) -> None:
        """Add the failures of a state to those that there are. Nothing is logged, and no limit looked at.

        Raises:
            ValueError: it is no such state, or one of another number of samples.
        """
        pages, marks, reasons = self._opened(state)
        table = self._table()
        with _lock:
            for page, marked in zip(pages, marks, strict=True):
                table.failed[page][marked] = True
                table.settle(page)
            for index, reason in reasons.items():
                if index in self and table.reason(index) is None:
                    table.keep(index, reason)

    def _opened(self, state: Any) -> tuple[list[int], npt.NDArray[np.bool_], dict[int, str]]:
        """The pages of a state that have failures, which samples of them failed, and reasons."""
        row = 8 + _PAGE // 8
        try:
            inflating = zlib.decompressobj()
            packed = inflating.decompress(base64.b64decode(state["samples"], validate=True), self._pages * row + 1)
            count, rest = divmod(len(packed), row)
            pages = np.frombuffer(packed[: 8 * count], "<i8")
            marks = np.unpackbits(np.frombuffer(packed[8 * count :], np.uint8)).view(np.bool_).reshape(-1, _PAGE)
            reasons = dict(state["reasons"])
            inside = not count or (pages[-1] < self._pages and not marks[-1, self.samples - pages[-1] * _PAGE :].any())
            sound = (
                (inflating.eof and not rest and inside)
                and all(before < page for before, page in itertools.pairwise([-1, *pages.tolist()]))
                and all(type(index) is int and type(reason) is str for index, reason in reasons.items())
            )
        except (TypeError, LookupError, ValueError, zlib.error):
            sound = False
        if not sound:
            raise ValueError(
                f"the state's list of failed samples is damaged, or of a dataset that has not {self.samples} samples: "
                f"{state!r:.100}"
            )
        return pages.tolist(), marks, reasons

    def _table(self) -> _Table:
        """The memory. Made for each use: torch may move it, when it goes to a process by another way than it came."""
        memory = self._memory.numpy()
        counts, reasons = self._pages * _PAGE, self._pages * (_PAGE + 8)
        return _Table(
            memory[:counts].view(np.bool_).reshape(-1, _PAGE),
            memory[counts:reasons].view(np.int64),
            memory[reasons:-8].view(_REASON),
            memory[-8:].view(np.int64),
        )

    def _verdict(self, count: int) -> str:
        first = "; ".join(f"sample {index}: {reason}" for index, reason in itertools.islice(self.items(), _NAMED))
        more = f"; and {count - _NAMED} more, which dataset.failures lists" if count > _NAMED else ""
        return (
            f"{count} samples failed, max_failures allows {self.limit}. The first: {first}{more}. To go on, put the "
            "store in order (`fastload verify --decode` lists all that is damaged) or raise max_failures, and load the "
            "loader's last state"
        )

    def __len__(self) -> int:
        return int(self._table().counts.sum())

    def __iter__(self) -> Iterator[int]:
        table = self._table()
        for page in np.flatnonzero(table.counts).tolist():
            table.settle(page)
            yield from (page * _PAGE + np.flatnonzero(table.failed[page])).tolist()

    def __getitem__(self, index: int) -> str:
        table = self._table()
        inside = isinstance(index, int | np.integer) and 0 <= index < self.samples
        if not (inside and table.counts[index // _PAGE] and table.failed[divmod(index, _PAGE)]):
            raise KeyError(index)
        reason = table.reason(int(index))
        return _LOST if reason is None else reason

    def __repr__(self) -> str:
        first = dict(itertools.islice(self.items(), _NAMED))
        more = f" and {len(self) - _NAMED} more" if len(self) > _NAMED else ""
        return f"Failures({first}{more})"

    def __getstate__(self) -> dict[str, Any]:
        return {"samples": self.samples, "limit": self.limit, "state": self.state_dict()}

    def __setstate__(self, known: dict[str, Any]) -> None:
        Failures.__init__(self, known["samples"], known["limit"])
        self.load_state_dict(known["state"])


def check_states(failures: Sequence[Failures], state: Any) -> None:
    """See to it that what a loader's state says of failed samples fits its datasets' failures.

    Raises:
        ValueError: it doesn't.
    """
    if not isinstance(state, dict) or "failures" not in state:
        return
    states = state["failures"]
    if not isinstance(states, list) or len(states) != len(failures):
        count = len(states) if isinstance(states, list) else f"{states!r:.100}"
        raise ValueError(
            f"the state has the failed samples of {count} datasets, this loader has {len(failures)} that note theirs: "
            "load it into a loader over the same data"
        )
    for each, its_own in zip(failures, states, strict=True):
        Failures(each.samples).load_state_dict(its_own)


def _shared(failures: Failures) -> Any:
    """What goes to another process that is started."""
    return Failures, (failures.samples, failures.limit, failures._memory)


ForkingPickler.register(Failures, _shared)


class _Table(NamedTuple):
    """What lies in the memory.

    failed: (pages, samples of a page). counts: of each page. reasons: those that are kept. logged: how many had failed
    when the last one was logged, once not all are.
    """

    failed: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.int64]
    reasons: npt.NDArray[Any]
    logged: npt.NDArray[np.int64]

    def settle(self, page: int) -> None:
        """Count a page anew until its count is what is found: another process may be writing another one."""
        while self.counts[page] != (found := np.count_nonzero(self.failed[page])):
            self.counts[page] = found

    def keep(self, index: int, reason: str) -> None:
        """Write a reason down if a place is free; at one of its own, lest two processes take the same."""
        free = np.flatnonzero(self.reasons["index"] == 0)
        if len(free):
            text = reason.encode("utf-8", "replace")[: _REASON["text"].itemsize].rstrip(b"\0")
            self.reasons[free[mix64(index) % len(free)]] = (index + 1, _checksum(index, text), text)

    def reason(self, index: int) -> str | None:
        """The reason that is kept of a sample."""
        return _legible(self.reasons[self.reasons["index"] == index + 1]).get(index)


def _legible(entries: npt.NDArray[Any]) -> dict[int, str]:
    """Reasons that are whole, by index."""
    return {
        number - 1: text.decode("utf-8", "ignore")
        for number, checksum, text in entries[entries["index"] != 0].tolist()
        if checksum == _checksum(number - 1, text)
    }


def _checksum(index: int, text: bytes) -> int:
    return record.checksum(index.to_bytes(8, "little") + text)
