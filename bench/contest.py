"""How contenders are compared: by turns, in one run, by what each round says.

A machine's speed, a shared one's above all, changes by a factor of two within minutes, so two runs can't be compared.
Here every round gives each contender one turn, one after the other; a ratio is taken within a round, and what counts
is the median over rounds. CPU time is that of the whole process tree, and steadier than wall time.

The main contender's turns are pytest-benchmark's rounds; its rivals run in the set-up of each. Everything goes into
`Results`, which the terminal summary and `--record` print.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

Work = Callable[[], int]
"""A contender: does its work once and says how many samples that was."""

_PACKAGES = ("fastload", "torch", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "lmdb", "torchvision")


class Turn(NamedTuple):
    """One turn of one contender. Seconds of wall time, of CPU time (all processes), and of the calling thread."""

    samples: int
    seconds: float
    cpu: float
    thread: float


class Clock:
    """Times a turn. Workers that live on are known from the start; those that end within it are their parent's."""

    def start(self) -> None:
        """Begin a turn."""
        self._workers = psutil.Process().children(recursive=True)
        self._cpu, self._thread = self._cpu_seconds(), time.thread_time()
        self._wall = time.perf_counter()

    def stop(self, samples: int) -> Turn:
        """End it."""
        seconds = time.perf_counter() - self._wall
        return Turn(samples, seconds, self._cpu_seconds() - self._cpu, time.thread_time() - self._thread)

    def _cpu_seconds(self) -> float:
        ended = os.times()
        seconds = time.process_time() + ended.children_user + ended.children_system
        for worker in self._workers:
            if worker.is_running():
                times = worker.cpu_times()
                seconds += times.user + times.system
        return seconds


@dataclass(frozen=True)
class Rounds:
    """The turns of each contender, round by round."""

    turns: Mapping[str, list[Turn]]

    def rates(self, name: str) -> list[float]:
        """Samples per second."""
        return [turn.samples / turn.seconds for turn in self.turns[name]]

    def costs(self, name: str, clock: str = "cpu") -> list[float]:
        """Seconds per sample by a clock: "seconds" (wall), "cpu" or "thread"."""
        return [getattr(turn, clock) / turn.samples for turn in self.turns[name]]

    def ratios(self, name: str, rival: str) -> list[float]:
        """How many times as fast `name` is as `rival`, in wall time."""
        return [a / b for a, b in zip(self.rates(name), self.rates(rival), strict=True)]

    def cpu_ratios(self, name: str, rival: str) -> list[float]:
        """How many times as many samples `name` gives per CPU second as `rival`."""
        return [b / a for a, b in zip(self.costs(name), self.costs(rival), strict=True)]

    def differences(self, name: str, rival: str, clock: str = "cpu") -> list[float]:
        """How many seconds per sample `name` takes more than `rival`."""
        return [a - b for a, b in zip(self.costs(name, clock), self.costs(rival, clock), strict=True)]


class Target(NamedTuple):
    """A figure that was aimed at, beside what was measured (the median decides)."""

    benchmark: str
    measure: str
    wanted: str
    measured: dict[str, float]
    met: bool


@dataclass
class Results:
    """All that a session measured."""

    images: dict[str, Any] = field(default_factory=dict)
    photos: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write everything as JSON, with the machine and the versions; no paths and no host name."""
        content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
            "machine": machine(),
            "versions": versions(),
            "images": self.images,
            "photos": self.photos,
            "targets": [target._asdict() for target in self.targets],
            "benchmarks": self.benchmarks,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def lines(self) -> list[str]:
        """The table of targets, then every contender's rate."""
        rows = [("benchmark", "measure", "target", "measured", "quartiles", "")]
        for target in self.targets:
            m = target.measured
            quartiles = f"{_short(m['q1'])} - {_short(m['q3'])}"
            verdict = "met" if target.met else "MISSED"
            rows.append((target.benchmark, target.measure, target.wanted, _short(m["median"]), quartiles, verdict))
        others = [("benchmark", "contender", "samples/s", "quartiles", "per CPU second", "rounds")]
        for name, entry in self.benchmarks.items():
            for contender, c in entry["contenders"].items():
                rate = c["samples_per_second"]
                quartiles = f"{_short(rate['q1'])} - {_short(rate['q3'])}"
                per_cpu = _short(c["samples_per_cpu_second"]["median"])
                others.append((name, contender, _short(rate["median"]), quartiles, per_cpu, str(entry["rounds"])))
        values = [("benchmark", "also measured", "median", "quartiles")]
        aimed_at = {(target.benchmark, target.measure) for target in self.targets}
        for name, entry in self.benchmarks.items():
            for measure, m in entry["measures"].items():
                if (name, measure) in aimed_at:
                    continue
                values.append((name, measure, _short(m["median"]), f"{_short(m['q1'])} - {_short(m['q3'])}"))
        return [*_table(rows), "", *_table(others), "", *_table(values)]


class Contest:
    """One benchmark's contenders and targets; the fixture `contest` makes it."""

    def __init__(self, name: str, question: str, benchmark: Any, results: Results, rounds: int | None) -> None:
        self.name, self._benchmark, self._results, self._rounds = name, benchmark, results, rounds
        self._entry: dict[str, Any] = {"question": question, "rounds": 0, "contenders": {}, "measures": {}}

    def run(self, contenders: Mapping[str, Work], rounds: int = 7) -> Rounds:
        """Give each contender `rounds` turns, after one that isn't timed. The first is the main one; it comes last."""
        self._results.benchmarks[self.name] = self._entry
        main, *rivals = contenders
        turns: dict[str, list[Turn]] = {name: [] for name in contenders}
        clock = Clock()
        for name in (*rivals, main):
            contenders[name]()

        def rivals_first() -> None:
            for name in rivals:
                clock.start()
                turns[name].append(clock.stop(contenders[name]()))
            clock.start()

        def timed() -> None:
            turns[main].append(clock.stop(contenders[main]()))

        self._benchmark.pedantic(timed, setup=rivals_first, rounds=self._rounds or rounds)
        measured = Rounds(turns)
        self._entry["rounds"] = len(turns[main])
        for name in contenders:
            self._entry["contenders"][name] = {
                "samples_per_turn": turns[name][0].samples,
                "samples_per_second": spread(measured.rates(name)),
                "samples_per_cpu_second": spread([1 / max(cost, 1e-12) for cost in measured.costs(name)]),
                "seconds_per_turn": [round(turn.seconds, 6) for turn in turns[name]],
            }
        self._benchmark.extra_info.update(self._entry)
        return measured

    def measure(self, measure: str, values: Sequence[float]) -> dict[str, float]:
        """Record a figure, one value per round."""
        measured = spread(values)
        self._entry["measures"][measure] = measured
        self._benchmark.extra_info.update(self._entry)
        return measured

    def target(
        self, measure: str, values: Sequence[float], *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Record a figure that has a target. Missing it fails nothing: the record says so."""
        measured = self.measure(measure, values)
        median = measured["median"]
        if at_least is not None:
            wanted, met = f">= {_short(at_least)}", median >= at_least
        else:
            assert at_most is not None
            wanted, met = f"<= {_short(at_most)}", median <= at_most
        self._results.targets.append(Target(self.name, measure, wanted, measured, met))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range, to five significant digits."""
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    named = {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}
    return {name: float(f"{value:.5g}") for name, value in named.items()}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Python's, the packages', and the commit that was measured."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    here = Path(__file__).parent
    git = ("git", "-C", str(here), "describe", "--always", "--dirty")
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    found["commit"] = described.stdout.strip() or None
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    if len(rows) == 1:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
