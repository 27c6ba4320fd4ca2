"""Shared memory without a name, for worker processes where the system has it (Linux).

torch makes each piece of shared memory as a file in /dev/shm, and takes its name away once all its pages are there. A
worker that is killed in between leaves the file behind for ever, and where /dev/shm is small (64 MB in a container) the
batches have no room. Memory of `memfd_create` never has a name and lies in no file system.
"""

from __future__ import annotations

import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy
from torch.multiprocessing.reductions import reduce_storage

_Storage: Any = torch.UntypedStorage  # of its methods, torch declares few


def install() -> None:
    """Have this process share tensors in memory without names, unless torch is told to share by name."""
    try:
        os.close(os.memfd_create("fastload"))
    except (AttributeError, OSError):  # not on Linux, not in this Python, or a sandbox forbids it
        return
    _Storage._new_using_fd_cpu = _new
    ForkingPickler.register(_Storage, _reduce)


def zeros(nbytes: int) -> torch.Tensor:
    """Shared memory of zeros, as bytes: without a name if possible. There, what was never touched takes up no room."""
    try:
        storage = _new(nbytes)
    except (AttributeError, OSError):
        storage = _Storage._new_shared(nbytes, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _new(nbytes: int) -> Any:
    file = os.memfd_create("fastload")
    try:
        os.ftruncate(file, nbytes)
        return _Storage._new_shared_fd_cpu(file, nbytes)
    finally:
        os.close(file)


def _reduce(storage: Any) -> Any:
    """What goes into a pickle for a storage: torch's own, of a copy if the storage isn't shared yet."""
    if get_sharing_strategy() == "file_descriptor" and storage.device.type == "cpu" and not storage.is_shared():
        storage = _new(storage.nbytes()).copy_(storage)
    return reduce_storage(storage)
