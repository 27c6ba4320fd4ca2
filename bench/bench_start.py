"""A fresh process: how soon the first batch is there, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import Contest

_CHILD = Path(__file__).with_name("child.py")


def _child(kind: str, source: Path) -> dict[str, Any]:
    command = [sys.executable, str(_CHILD), kind, str(source), repr(time.time())]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def bench_first_batch(contest: Contest, images: Path, store: Path) -> None:
    """How long does a fresh process take to its first batch, from the end of its imports and from its start?"""
    found: dict[str, list[dict[str, Any]]] = {"fastload": [], "torch": []}

    def started(kind: str, source: Path) -> Callable[[], int]:
        def work() -> int:
            found[kind].append(_child(kind, source))
            return int(found[kind][-1]["samples"])

        return work

    contest.run({"fastload": started("fastload", store), "torch": started("torch", images)}, rounds=5)
    first = [figures["first_batch_seconds"] for figures in found["fastload"][1:]]
    contest.target("from the end of `import fastload` to the first batch, s", first, at_most=1.0)
    for kind, figures in found.items():
        for name in ("import_seconds", "first_batch_seconds", "since_start_seconds"):
            contest.measure(f"{kind}: {name.replace('_', ' ')}", [each[name] for each in figures[1:]])


def bench_memory(contest: Contest, store: Path) -> None:
    """How much resident memory do three epochs with 2 threads add, beside the store's own pages?"""
    found: list[dict[str, Any]] = []

    def epochs() -> int:
        found.append(_child("memory", store))
        return 1

    contest.run({"fastload": epochs}, rounds=3)
    size = store.stat().st_size
    grown = {
        kind: [(each["peak"][kind] - each["before"][kind]) / 1e6 for each in found[1:]] for kind in found[0]["peak"]
    }
    beside = [megabytes - size / 1e6 for megabytes in grown["rss"]]
    contest.target("peak above import, less the store's size, MB", beside, at_most=200)
    contest.measure("store, MB", [size / 1e6])
    for kind, values in grown.items():
        contest.measure(f"peak {kind} above import, MB", values)
