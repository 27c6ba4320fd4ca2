"""Nothing grows, however loaders end; and readers beside a pack read what was packed. At length: `tools/soak`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lives import ENDINGS, PATIENCE, Lives, Stores, held, make_stores, read_beside_a_pack

import fastload

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it isn't told what a program holds"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

WARM_UP, LIVES = 20, 25
ALLOWED = {"processes": 0, "threads": 0, "files": 0, "mappings": 0, "objects": 10 * LIVES, "blocks": 50 * LIVES}
ANYWHERE = {"Ctrl-C anywhere"}
"""It may come while an object goes, where Python can only print it: for `tools/soak` and `test_faults`."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Small stores of three kinds."""
    return make_stores(tmp_path_factory.mktemp("soak"))


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("torch_*"))


def grown(before: dict[str, int]) -> dict[str, int]:
    """What is held beyond what was held before, and beyond what may be."""
    growth = {name: count - before[name] for name, count in held().items()}
    return {name: growth[name] for name, most in ALLOWED.items() if growth[name] > most}


def test_loaders_leave_nothing(stores: Stores) -> None:
    """Not a thread, a process, an open or a mapped file, nor shared memory; and of Python's objects next to none."""
    lives = Lives(stores, np.random.default_rng(20261121), endings=sorted(ENDINGS.keys() - ANYWHERE))
    list(fastload.make_loader(stores.raw, 5, train=True, device="cpu", device_resident=True))  # for what NumPy imports
    for _ in range(WARM_UP):
        lives.live()
    before, shared = held(), shared_memory()
    for _ in range(LIVES):
        lives.live()
    deadline = time.monotonic() + PATIENCE
    while grown(before) and time.monotonic() < deadline:  # some may still be about to go
        time.sleep(0.5)
    assert grown(before) == {}
    assert not shared_memory() - shared
    assert lives.loaders == WARM_UP + LIVES < lives.samples


def test_readers_beside_a_pack(stores: Stores) -> None:
    """Four processes of eight threads get each sample, and each region of it, as it was packed."""
    assert read_beside_a_pack(stores, processes=4, threads=8, rounds=1) == 4 * 8 * (24 + 30)
