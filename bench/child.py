"""What `bench_start` runs in fresh processes: python child.py fastload|torch|memory SOURCE STARTED, JSON on stdout.

SOURCE is a store, or for torch a folder; STARTED the `time.time()` at which the process was asked for. Nothing is
imported before its time is taken, so the imports stand in the functions.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BATCH = 64


def with_fastload(store: str) -> tuple[float, float, list[Any]]:
    """Seconds of `import fastload`, seconds from then to the first batch of 2 threads, and that batch."""
    before = time.perf_counter()
    import fastload

    imported = time.perf_counter()
    crop = fastload.transforms.RandomResizedCrop(224)
    transform = fastload.transforms.Compose([crop, fastload.transforms.RandomHorizontalFlip()])
    dataset = fastload.ImageDataset(store, transform)
    batch = next(iter(fastload.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)))
    return imported - before, time.perf_counter() - imported, batch


def with_torch(folder: str) -> tuple[float, float, list[Any]]:
    """The same for torch's loader with 2 processes over the folder."""
    before = time.perf_counter()
    from torch.utils.data import DataLoader

    import rivals

    imported = time.perf_counter()
    dataset = rivals.Folder(Path(folder), rivals.random_crop())
    batch = next(iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=2)))
    return imported - before, time.perf_counter() - imported, batch


def memory(store: str) -> dict[str, Any]:
    """Bytes of resident memory after `import fastload`, and at most during three epochs of a loader of 2 threads."""
    import threading

    import fastload

    before = _resident()
    peak = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for kind, size in _resident().items():
                peak[kind] = max(peak[kind], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    crop = fastload.transforms.RandomResizedCrop(224)
    dataset = fastload.ImageDataset(store, crop)
    loader = fastload.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)
    samples = sum(len(labels) for _ in range(3) for _, labels in loader)
    done.set()
    watcher.join()
    assert samples == 3 * len(dataset)
    return {"before": before, "peak": peak}


def _resident() -> dict[str, int]:
    """Resident bytes; those of the program's own memory, apart from mapped files, where the system tells (Linux)."""
    import psutil

    found = {"rss": psutil.Process().memory_info().rss}
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                found["anonymous"] = 1024 * int(line.split()[1])
    return found


def main() -> None:
    """Run what the first argument names."""
    kind, source, started = sys.argv[1], sys.argv[2], float(sys.argv[3])
    if kind == "memory":
        print(json.dumps(memory(source)))
        return
    importing, first, (images, labels) = {"fastload": with_fastload, "torch": with_torch}[kind](source)
    since_start = time.time() - started
    assert images.shape[1:] == (3, 224, 224)
    assert len(labels) == len(images)
    figures = {"import_seconds": importing, "first_batch_seconds": first, "since_start_seconds": since_start}
    print(json.dumps(figures | {"samples": len(images)}))


if __name__ == "__main__":
    main()
