"""Reading survives: bits flipped anywhere in a finished store, any end missing, whole pages gone."""

from __future__ import annotations

import collections
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flips import ALLOWED, Case, faults, judge, make_cases

CLEAN = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
TRIALS = 200


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("cases"))


def outcomes(case: Case, seed: int, trials: int) -> tuple[collections.Counter[str], list[str]]:
    """How often each outcome came, and those that must not be, with what led to them."""
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (what, data) in zip(range(trials), faults(np.random.default_rng(seed), case), strict=False):
            found = judge(Path(folder, "damaged.lmdb"), case, data, verified=number % 4 == 0)
            counts[found] += 1
            wrong += [] if found in ALLOWED else [f"{what}: {found}"]
    return counts, wrong


@pytest.mark.parametrize("name", ["JPEGs in tiles", "raw column", "equal lengths", "dicts of fields"])
def test_damage_is_an_error_or_a_placeholder_that_is_counted(cases: dict[str, Case], name: str) -> None:
    """Never a crash (it would break the pool), never other pixels, labels, names or fields than were packed."""
    with ProcessPoolExecutor(1, mp_context=CLEAN) as pool:
        counts, wrong = pool.submit(outcomes, cases[name], 1, TRIALS).result(100)
    assert wrong == []
    assert min(counts[outcome] for outcome in ALLOWED) > TRIALS // 20, counts
