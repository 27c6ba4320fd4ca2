"""Samples that failed: counted once each, across threads and worker processes, and held against a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .errors import TooManyFailures
from .order import mix64

_SLOTS = 1 << 15
_log = logging.getLogger("fastload")


class Failures(Mapping[int, str]):
    """The samples that failed so far: index -> reason. Read it like a dict; `len` counts samples, not attempts.

    limit: how many may fail before `TooManyFailures` is raised; None for no limit.

    Worker processes report through a table in shared memory, where an index takes the first free slot from its hash on.
    Writing is idempotent and takes no lock, so a killed worker can't block another. Reasons stay in the process that
    saw them; elsewhere they read "failed in a worker process".
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._table = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._start()

    def _start(self) -> None:
        self._reasons: dict[int, list[str]] = {}

    def report(self, index: int, reason: str) -> None:
        """Note that a sample failed; logged the first time.

        Raises:
            TooManyFailures: this makes it more than the limit.
        """
        entry = [reason]
        if self._reasons.setdefault(index, entry) is entry:  # no lock, which a fork could leave locked
            self._share(index)
            _log.warning("sample %d: %s", index, reason)
        if self.limit is not None and len(self) > self.limit:
            first = "; ".join(f"sample {i}: {why}" for i, why in list(self.items())[:3])
            raise TooManyFailures(
                f"{len(self)} samples failed, max_failures allows {self.limit}. The first: {first}. "
                "Run `fastload verify --decode` on the store, or raise max_failures"
            )

    def _share(self, index: int) -> None:
        start = mix64(index)
        for step in range(_SLOTS):
            slot = (start + step) % _SLOTS
            if self._table[slot] == 0:
                self._table[slot] = index + 1
            if self._table[slot] == index + 1:
                return
        raise TooManyFailures(f"more than {_SLOTS} samples failed; run `fastload verify --decode` on the store")

    def __len__(self) -> int:
        return int(torch.count_nonzero(self._table))

    def __iter__(self) -> Iterator[int]:
        return iter((self._table[self._table != 0] - 1).sort().values.tolist())

    def __getitem__(self, index: int) -> str:
        if index in self._reasons:
            return self._reasons[index][0]
        if not bool((self._table == index + 1).any()):
            raise KeyError(index)
        return "failed in a worker process"

    def __repr__(self) -> str:
        return f"Failures({dict(self)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
