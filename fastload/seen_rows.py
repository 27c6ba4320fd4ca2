"""Rows of a column that were read and found sound, by this process or one that works for it.

One byte for each row, in memory that worker processes share: those of the next epoch need not check again what those of
the last one have. Where the system has memory without names (see `anonymous_memory`), rows that were not seen take up
none.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import anonymous_memory

_NONE = np.empty(0, np.int64)


class SeenRows:
    """Which of `count` rows were seen.

    A copy that is pickled, or made by `copy.deepcopy`, has seen none; what goes to a process that is started shares
    this one's memory.

    memory: another process's, to be shared.
    """

    _STRETCH = 1 << 16

    def __init__(self, count: int, memory: torch.Tensor | None = None) -> None:
        self._count = count
        self._memory = anonymous_memory.zeros(max(count, 1)) if memory is None else memory
        self._all_below = 0

    def add(self, rows: npt.NDArray[np.int64]) -> None:
        """Note that these were seen."""
        self._memory.numpy()[rows] = True

    def places_of_new(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in `rows` those stand that were not added yet.

        Once all were, it takes no look any more: whoever finds nothing new looks through another stretch of them.
        """
        if self._all_below == self._count:
            return _NONE
        seen, begin = self._memory.numpy(), self._all_below
        new = np.flatnonzero(seen[rows] == 0)
        if not len(new) and (stretch := seen[begin : begin + self._STRETCH]).all():
            self._all_below = begin + len(stretch)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self._count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SeenRows.__init__(self, state["count"])


def _shared(seen: SeenRows) -> Any:
    """What goes to another process that is started."""
    return SeenRows, (seen._count, seen._memory)


ForkingPickler.register(SeenRows, _shared)
