"""`torch.utils.data.get_worker_info()` in worker threads: the one place where fastload reaches into torch.

torch keeps the worker's info in a global variable of its process, which threads can't share, and users have imported
the function by name, so that replacing it would not reach them. So it stays the same function and gets another body,
when the first worker thread starts: one that looks at a variable of the thread first. In other threads, and in worker
processes, it answers as before.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import worker as torchs

_here = threading.local()


def set_worker_info(number: int, num_workers: int, seed: int, dataset: Any) -> None:
    """Make this thread worker `number`. Its `rng`, where this torch has one, holds generators of its own."""
    _install()
    more: dict[str, Any] = {}
    if hasattr(torchs, "_RNG"):
        rng = torchs._RNG(
            random_generator=random.Random(seed),
            torch_generator=torch.Generator().manual_seed(seed),
            numpy_generator=np.random.default_rng(seed),
        )
        more = {"rng": rng, "worker_method": "thread"}
    _here.info = torchs.WorkerInfo(id=number, num_workers=num_workers, seed=seed, dataset=dataset, **more)


@contextlib.contextmanager
def hidden_worker_info() -> Iterator[None]:
    """Let torch's default_collate take this for no worker: in one it would make every batch in shared memory."""
    info, _here.info = getattr(_here, "info", None), None
    try:
        yield
    finally:
        _here.info = info


def _get_worker_info() -> Any:
    """The new body: runs with the global variables of torch's module."""
    return getattr(_fastload_thread, "info", None) or _worker_info  # type: ignore[name-defined]  # noqa: F821


def _install() -> None:
    function: Any = torchs.get_worker_info
    if "_fastload_thread" not in function.__globals__:
        function.__globals__["_fastload_thread"] = _here
        function.__code__ = _get_worker_info.__code__


def _forget() -> None:
    """A process that is forked from a worker thread is not that worker."""
    _here.info = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
