"""What `bench_resume` runs in fresh processes: python open_child.py fastload|torch COUNT, JSON on stdout.

Seconds from the sampler's construction to the first shuffled batch of 2 workers over COUNT samples that cost nothing,
and by how many megabytes this process's resident memory was larger at its peak (where the system tells; else after it).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import psutil
from torch.utils.data import DataLoader

import fastload
from synthetic import Free, samples

BATCH = 64

_STATUS = Path("/proc/self/status")


def _forget_peak() -> None:
    """Let the peak be counted anew, where the system can (Linux); else the imports' may count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most bytes of resident memory so far."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Open, shuffle, take one batch."""
    kind, count = sys.argv[1], int(sys.argv[2])
    dataset = Free(count)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    sampler = fastload.ShuffleSampler(dataset) if kind == "fastload" else None
    if sampler is None:
        batches = iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=2))
    else:
        batches = iter(fastload.DataLoader(dataset, BATCH, sampler=sampler, num_workers=2))
    first = next(batches)
    seconds = time.perf_counter() - started
    grown = _peak() - before
    got = samples([first])
    assert len(set(got)) == BATCH
    assert 0 <= min(got) <= max(got) < count
    if sampler is not None:
        assert got == fastload.ShuffleSampler(dataset).share().take(0, BATCH).tolist()
    print(json.dumps({"seconds": seconds, "megabytes": grown / 1e6}))


if __name__ == "__main__":
    main()
