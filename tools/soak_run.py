"""What tools/soak does once it is inside its environment: lives of loaders, what is held after them, and a verdict.

The first quarter of the time is the warm-up: caches, pools and the allocator's arenas fill. What is left is divided in
three, and the median of its last third is held against that of its first. Memory of the allocator that is free but
scattered counts as if it were in use; nothing is trimmed. 2% of some threads or files is less than one of them.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from contest import machine, versions  # type: ignore[import-not-found]  # of bench/
from lives import (  # type: ignore[import-not-found]  # of tests/
    ENDINGS,
    WORKERS,
    Lives,
    Residents,
    Stores,
    held,
    make_stores,
    read_beside_a_pack,
)
from rich.console import Console
from rich.table import Table

LIVES = 10
"""Loaders between two counts of what is held."""
COUNTS = 30
"""Counts between two times that others read beside a pack."""
FEWEST = 12
"""Counts to judge by, however short the run."""
MOST_GROWTH = 0.02
STUCK = 300.0
"""Seconds for the same few lives that are a failure."""
_POINTS = 100


def soak(minutes: float, seed: int, record: Path | None) -> int:
    """Soak, tell what came of it, and return the exit status."""
    logging.getLogger("fastload").setLevel(logging.ERROR)  # damaged samples are meant to be there
    warnings.filterwarnings("ignore", "This DataLoader will create")
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(),
        "command": f"tools/soak --minutes {minutes:g} --seed {seed}",
    }
    with tempfile.TemporaryDirectory(prefix="fastload-soak-") as folder:
        stores = make_stores(Path(folder))
        lives = Lives(stores, np.random.default_rng(seed))
        series, compared = _live(lives, stores, minutes)
    found = _judged(series)
    grew = [name for name, counter in found.items() if counter["growth"] > MOST_GROWTH]
    _print(found, lives, compared, seed)
    if record is not None:
        lived = _lived(lives, compared) | {"held": found, "grew": grew, "series": series[:: -(-len(series) // _POINTS)]}
        record.write_text(json.dumps(facts | lived, indent=1) + "\n")
    if grew:
        print(f"tools/soak: grew by more than {MOST_GROWTH:.0%}: {', '.join(grew)}", file=sys.stderr)
    return int(bool(grew))


def _live(lives: Lives, stores: Stores, minutes: float) -> tuple[list[dict[str, float]], int]:
    """Live until the time is over; returns what was held, with its minute, and how many samples were compared."""
    residents = Residents(stores)
    faulthandler.register(signal.SIGUSR1)
    series: list[dict[str, float]] = []
    started, compared = time.monotonic(), 0
    while time.monotonic() < started + 60 * minutes or len(series) < FEWEST:
        stuck = threading.Timer(STUCK, _give_up)
        stuck.start()
        for _ in range(LIVES):
            lives.live()
        residents.use(lives)
        if len(series) % COUNTS == 0:
            compared += read_beside_a_pack(stores, rounds=2)
        stuck.cancel()
        series.append({"minute": round((time.monotonic() - started) / 60, 2), **held()})
        if len(series) % COUNTS == 1:
            print(f"{series[-1]['minute']:6.1f} min  {lives.loaders} loaders, {lives.epochs} epochs", flush=True)
    return series, compared


def _give_up() -> None:
    """End the run, and tell where this process and the forked workers stand."""
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGUSR1)
    time.sleep(2)
    faulthandler.dump_traceback()
    os._exit(1)


def _judged(series: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each counter after the warm-up and at the end: medians of the first and of the last third after it."""
    warm = series[len(series) // 4 :]
    third = -(-len(warm) // 3)
    found = {}
    for name in series[0].keys() - {"minute"}:
        before, after = (float(np.median([held[name] for held in part])) for part in (warm[:third], warm[-third:]))
        found[name] = {"after_warm_up": before, "at_end": after, "growth": after / before - 1 if before else after}
    return {name: found[name] for name in series[0] if name in found}


def _print(found: dict[str, dict[str, float]], lives: Lives, compared: int, seed: int) -> None:
    console = Console()
    table = Table("held", "after warm-up", "at the end", "growth", "")
    for name, counter in found.items():
        verdict = "flat" if counter["growth"] <= MOST_GROWTH else "GREW"
        medians = (_short(name, counter[when]) for when in ("after_warm_up", "at_end"))
        table.add_row(name, *medians, f"{counter['growth']:+.2%}", verdict)
    console.print(table)
    endings = _endings(lives)
    table = Table("ending", *WORKERS)
    for ending in ENDINGS:
        table.add_row(ending, *(str(endings[workers][ending]) for workers in WORKERS))
    console.print(table)
    print(
        f"seed {seed}: {lives.loaders} loaders, {lives.epochs} whole epochs, {lives.batches} batches, {lives.samples} "
        f"samples; {compared} samples compared by others beside a pack"
    )
    print(", ".join(f"{outcome}: {count}" for outcome, count in lives.outcomes.most_common()))


def _short(name: str, value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if name in ("resident", "own") else f"{value:,.0f}"


def _endings(lives: Lives) -> dict[str, dict[str, int]]:
    """How often each kind of workers was left in each way."""
    totals: Counter[tuple[str, str]] = Counter()
    for (workers, _, ending), count in lives.counts.items():
        totals[workers, ending] += count
    return {workers: {ending: totals[workers, ending] for ending in ENDINGS} for workers in WORKERS}


def _lived(lives: Lives, compared: int) -> dict[str, Any]:
    data: Counter[str] = Counter()
    for (_, name, _), count in lives.counts.items():
        data[name] += count
    return {
        "loaders": lives.loaders,
        "epochs": lives.epochs,
        "batches": lives.batches,
        "samples": lives.samples,
        "samples_compared_beside_a_pack": compared,
        "endings": _endings(lives),
        "data": dict(sorted(data.items())),
        "outcomes": dict(lives.outcomes.most_common()),
    }
