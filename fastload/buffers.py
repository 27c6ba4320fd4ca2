"""Memory that is used again: fresh memory costs page faults, 1.1 ms for 64 pictures of 224 x 224.

`BatchBuffers` lends memory for whole batches. What it lends belongs to whoever holds the tensor, the array or any view
of them; when the last of these is gone, the memory comes back by itself, from whichever thread that was. `scratch` is
memory of one thread for one image at a time.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Memory = Literal["own", "pinned", "shared"]

_FREE_KEPT = 8
_SCRATCH_KEPT = 96 << 20


class BatchBuffers:
    """Memory for batches of pictures, shared by threads; at most eight buffers that nobody uses are kept."""

    def __init__(self) -> None:
        self._free: deque[_Loan] = deque(maxlen=_FREE_KEPT)

    def take(self, shape: tuple[int, ...], memory: Memory = "own") -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
        """Memory for a uint8 batch of `shape`, as a tensor and as an array of the same bytes; contents undefined.

        memory: "own" is used again; "pinned" is page-locked, and left to torch's own allocator, which knows when a copy
        to the device is over; "shared" goes to another process without a copy, and is not used again.
        """
        if memory == "pinned":
            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor, tensor.numpy()
        if memory == "shared":
            storage: Any = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
            tensor = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
            return tensor, tensor.numpy()
        array = self._lend(math.prod(shape)).reshape(shape)
        return torch.from_numpy(array), array

    def _lend(self, nbytes: int) -> npt.NDArray[np.uint8]:
        try:
            memory = self._free.pop().memory
        except IndexError:
            memory = np.empty(nbytes, np.uint8)
        if len(memory) != nbytes:
            memory = np.empty(nbytes, np.uint8)
        return np.asarray(_Holder(memory, self._free))


class _Holder:
    """Bytes as NumPy takes them over: an array of them is the base of all its views, and lives as long as any of them.

    What brings the memory back is `deque.append` itself, no function of Python's: in one that runs when an object goes,
    Python would swallow Ctrl-C.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], free: deque[_Loan]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._loan = _Loan(self, free.append)
        self._loan.memory = memory


class _Loan(weakref.ref[_Holder]):
    """Who holds the memory; given to the callback when nobody does."""

    memory: npt.NDArray[np.uint8]


_scratch = threading.local()


def scratch(purpose: str, nbytes: int) -> npt.NDArray[np.uint8]:
    """A flat uint8 buffer of this thread; what it held is lost at the next call with the same purpose."""
    buffer: npt.NDArray[np.uint8] | None = getattr(_scratch, purpose, None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(nbytes, np.uint8)
        if nbytes <= _SCRATCH_KEPT:
            setattr(_scratch, purpose, buffer)
    return buffer[:nbytes]
