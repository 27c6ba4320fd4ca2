"""Lives of loaders that end in every way, readers beside a pack, and what a program holds after them.

For some dozens in `test_soak.py`, and for as many as one likes in `tools/soak`. What all of it obeys: a life leaves
nothing behind. Whatever is raised in it is caught here, nothing refers to its loader afterwards, and what the program
holds is counted when workers have had the time to go.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import itertools
import linecache
import multiprocessing
import os
import random as process_random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
from conftest import picture
from numbered import Numbers
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

import fastload
from fastload import DataLoader, DevicePrefetcher, ImageDataset
from fastload.transforms import CenterCrop, Compose, RandomCrop, RandomHorizontalFlip, RandomResizedCrop

FORKED = {"worker_type": "process", "multiprocessing_context": "fork"}
"""Others than forked ones take seconds to start."""
WORKERS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "threads": {"num_workers": 2, "worker_type": "thread"},
    "processes": {"num_workers": 2, **FORKED},
    "processes of threads": {"num_workers": 1, "threads_per_worker": 2, **FORKED},
}
BATCH = 5
PATIENCE = 15.0
"""Seconds that workers have to be gone; torch's own look for a main process that is gone every five."""


class TroubleError(Exception):
    """What transforms, datasets and loops of users raise here."""


class Troubled:
    """A user's transform that fails now and then."""

    def __call__(self, image: Any) -> Any:
        if process_random.random() < 0.02:
            raise TroubleError("in a transform")
        return image


class TroubledNumbers(Numbers):
    """Sample i is i, but now and then it can't be read."""

    def __getitem__(self, index: int) -> int:
        if process_random.random() < 0.02:
            raise TroubleError("in a dataset")
        return super().__getitem__(index)


class Stream(IterableDataset[int]):
    """The numbers up to 23, shared out among workers, with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        at, self.at = self.at, 0
        for number in range(first + at * step, 23, step):
            self.at = number // step + 1
            yield number
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Stores(NamedTuple):
    """24 JPEGs in tiles; 30 raw images; the JPEGs again, four of them damaged."""

    photos: Path
    raw: Path
    damaged: Path


def make_stores(folder: Path) -> Stores:
    """Pack synthetic images."""
    stores = Stores(*(folder / f"{name}.lmdb" for name in Stores._fields))
    for label, number in itertools.product(range(3), range(10)):
        image = Image.fromarray(picture(64 + number, 80 + 3 * label, seed=100 * label + number))
        for name in ("photos", "raw") if number < 8 else ("raw",):
            file = folder / name / f"class{label}" / f"{number}.{'jpg' if name == 'photos' else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            (image if name == "photos" else image.resize((16, 16))).save(file, quality=90)
    fastload.pack(folder / "photos", stores.photos)
    fastload.pack(folder / "raw", stores.raw, encode="raw")
    data, store = stores.photos.read_bytes(), fastload.Store(stores.photos)
    for index in range(0, len(store), 6):
        payload = bytes(store[index]["image"].payload)
        middle = len(payload) // 2
        data = data.replace(payload, payload[:middle] + bytes(20) + payload[middle + 20 :])
    stores.damaged.write_bytes(data)
    return stores


# --- lives


class Lives:
    """Loaders of random kinds that are used and left in random ways, one after another.

    Attributes: `counts` says how often (workers, data, ending) was lived through, `outcomes` what came of it;
    `loaders`, `epochs`, `batches` and `samples` how many there were. endings: the ways of `ENDINGS`; all by default.
    """

    def __init__(self, stores: Stores, random: np.random.Generator, endings: Iterable[str] = ()) -> None:
        self._stores, self._random, self._endings = stores, random, list(endings or ENDINGS)
        self.counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.loaders = self.epochs = self.batches = self.samples = 0

    def live(self) -> None:
        """Make one loader, use it for some epochs, and drop it."""
        workers = self._choose(WORKERS)
        data = self._choose([*_DATA, *(["stream"] if workers != "processes of threads" else [])])
        made = self._made(workers, data)
        self.loaders += 1
        for _ in range(self._random.integers(1, 5)):
            ending = self._choose(self._endings)
            self.counts[workers, data, ending] += 1
            self.outcomes[self._outcome(ENDINGS[ending], made)] += 1

    def take(self, batches: Iterator[Any], most: int = sys.maxsize) -> None:
        """Take batches, and count them; an epoch is counted where it ends."""
        for batch in itertools.islice(batches, most):
            self.batches += 1
            self.samples += len(batch[-1] if isinstance(batch, list) else batch)
        self.epochs += most == sys.maxsize

    def some(self) -> int:
        """How many batches are taken before something happens."""
        return int(self._random.integers(5))

    def soon(self) -> float:
        """After how many seconds something happens."""
        return float(self._random.random() * 0.03) + 1e-6

    def _choose(self, names: Any) -> str:
        return str(self._random.choice(list(names)))

    def _outcome(self, ending: Callable[[Lives, Any], None], loader: Any) -> str:
        try:
            ending(self, loader)
        except (TroubleError, KeyboardInterrupt, fastload.FastloadError) as error:
            return type(error).__name__
        except RuntimeError as error:
            if "was killed by SIGKILL" not in str(error):
                raise
            return "killed worker"
        return "no error"

    def _made(self, workers: str, data: str) -> Any:
        """A loader: a `DataLoader`, bare or in a `DevicePrefetcher`, or what `make_loader` makes."""
        random, options = self._random, WORKERS[workers]
        dataset = _DATA[data](self._stores, random) if data in _DATA else Stream()
        if workers in ("no workers", "threads") and data in ("photos", "raw", "damaged") and random.random() < 0.3:
            resident = data == "raw" and random.random() < 0.5
            given = {"num_workers": options.get("num_workers", 0), "device_resident": resident}
            return fastload.make_loader(dataset, BATCH, train=random.random() < 0.5, device="cpu", **given)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            BATCH,
            shuffle=None if data == "stream" else random.random() < 0.5,
            persistent_workers=workers != "no workers" and random.random() < 0.5,
            in_order=random.random() < 0.8,
            **options,
        )
        mean = {"mean": [0.5] * 3, "std": [0.2] * 3} if random.random() < 0.5 else {}
        return DevicePrefetcher(loader, "cpu", **mean) if random.random() < 0.3 else loader


_CROPS = Compose([RandomResizedCrop(32), RandomHorizontalFlip()])
_DATA: dict[str, Callable[[Stores, np.random.Generator], Any]] = {
    "photos": lambda stores, random: ImageDataset(stores.photos, _CROPS, cache=str(random.choice(["20KB", "1MB"]))),
    "raw": lambda stores, random: ImageDataset(stores.raw, RandomCrop(16, padding=2)),
    "damaged": lambda stores, random: ImageDataset(
        stores.damaged, _CROPS, on_error=str(random.choice(["placeholder", "skip", "raise"]))
    ),
    "user's transform": lambda stores, random: ImageDataset(stores.photos, Compose([CenterCrop(32), Troubled()])),
    "numbers": lambda stores, random: Numbers(),
    "troubled numbers": lambda stores, random: TroubledNumbers(),
}


def _whole(lives: Lives, loader: Any) -> None:
    lives.take(iter(loader))


def _break(lives: Lives, loader: Any) -> None:
    lives.take(iter(loader), lives.some())


def _error(lives: Lives, loader: Any) -> None:
    batches = iter(loader)
    lives.take(batches, lives.some())
    raise TroubleError("in the loop")


def _ctrl_c(lives: Lives, loader: Any) -> None:
    batches = iter(loader)
    lives.take(batches, lives.some())
    raise KeyboardInterrupt


def _ctrl_c_anywhere(lives: Lives, loader: Any) -> None:
    with _ctrl_c_after(lives.soon()):
        lives.take(iter(loader))


def _abandoned(lives: Lives, loader: Any) -> None:
    kept = [iter(loader) for _ in range(3)]
    for batches in kept[1:]:
        lives.take(batches, lives.some())
    kept.append(kept)  # left to the collector


def _closed(lives: Lives, loader: Any) -> None:
    batches = iter(loader)
    lives.take(batches, lives.some())
    batches.close()


def _resumed(lives: Lives, loader: Any) -> None:
    lives.take(iter(loader), lives.some())
    loader.load_state_dict(loader.state_dict())
    lives.take(iter(loader))


def _killed(lives: Lives, loader: Any) -> None:
    before = {process.pid for process in multiprocessing.active_children()}
    batches = iter(loader)
    lives.take(batches, 1)
    for process in multiprocessing.active_children():
        if process.pid not in before:
            process.kill()
            break
    lives.take(batches)


ENDINGS: dict[str, Callable[[Lives, Any], None]] = {
    "whole epoch": _whole,
    "break": _break,
    "error in the loop": _error,
    "Ctrl-C in the loop": _ctrl_c,
    "Ctrl-C anywhere": _ctrl_c_anywhere,
    "abandoned iterators": _abandoned,
    "closed": _closed,
    "resumed": _resumed,
    "killed worker": _killed,
}


@contextlib.contextmanager
def _ctrl_c_after(seconds: float) -> Iterator[None]:
    """Ctrl-C by a timer, unless the block is over before."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Residents:
    """Loaders with persistent workers, one of each kind, which live as long as this does.

    Worker processes are spawned, so that they share no memory with the main process that grows private bit by bit.
    """

    def __init__(self, stores: Stores) -> None:
        self._loaders = []
        for options in WORKERS.values():
            spawned = {"multiprocessing_context": "spawn"} if "multiprocessing_context" in options else {}
            dataset = ImageDataset(stores.photos, _CROPS)
            self._loaders.append(
                DataLoader(dataset, BATCH, shuffle=True, persistent_workers=bool(options), **options | spawned)
            )

    def use(self, lives: Lives) -> None:
        """Five epochs of each loader, and the beginning of another one."""
        for loader in self._loaders:
            for _ in range(5):
                lives.take(iter(loader))
            lives.take(iter(loader), lives.some())


# --- readers beside a pack


def read_beside_a_pack(stores: Stores, *, processes: int = 4, threads: int = 8, rounds: int = 3) -> int:
    """Have processes of threads read the stores, each sample `rounds` times, while others are packed in their folder.

    Returns how many samples were read, and compared with the files that were packed.

    Raises:
        AssertionError: one is not what was packed.
    """
    folder, beside = stores.photos.parent, stores.photos.parent / "beside.lmdb"
    readers = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    with readers:
        jobs = [readers.submit(read_all, folder, threads, rounds, seed) for seed in range(processes)]
        while not all(job.done() for job in jobs):
            for name in ("photos", "raw"):
                fastload.pack(folder / name, beside, encode="raw" if name == "raw" else "keep", overwrite=True)
                _compare(beside, _pixels(folder / name), np.random.default_rng(0))
    return sum(job.result() for job in jobs)


def read_all(folder: Path, threads: int, rounds: int, seed: int) -> int:
    """What a reading process does; see `read_beside_a_pack`."""
    expected = {folder / f"{name}.lmdb": _pixels(folder / name) for name in ("photos", "raw")}
    datasets = {store: ImageDataset(store) for store in expected}
    with concurrent.futures.ThreadPoolExecutor(threads) as crew:
        jobs = [
            crew.submit(_compare, datasets[store], pixels, np.random.default_rng([seed, number]))
            for number in range(threads * rounds)
            for store, pixels in expected.items()
        ]
    return sum(job.result() for job in jobs)


def _pixels(folder: Path) -> list[npt.NDArray[np.uint8]]:
    """The pictures of a folder, in the order of its store, by Pillow."""
    return [np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.*g"))]


def _compare(source: Path | ImageDataset, expected: list[npt.NDArray[np.uint8]], random: np.random.Generator) -> int:
    """Hold all samples, in any order, and a region of each against what was packed."""
    dataset = source if isinstance(source, ImageDataset) else ImageDataset(source)
    assert len(dataset) == len(expected)
    for index in random.permutation(len(expected)).tolist():
        pixels, (image, label) = expected[index], dataset[index]
        assert np.array_equal(image.permute(1, 2, 0), pixels), f"{dataset}: sample {index} is another"
        assert label == dataset.targets[index]
        x, y = random.integers(8), random.integers(8)
        part = dataset.read(index, (x, y, 8, 8)).permute(1, 2, 0)
        assert np.array_equal(part, pixels[y : y + 8, x : x + 8]), f"{dataset}: a region of sample {index} is another"
    return len(expected)


# --- what is held


def held() -> dict[str, int]:
    """What the program and its workers hold now, once those that are ending have ended.

    `resident` is all memory of all processes together. `own` is what no file on disk stands behind (Linux): it depends
    neither on what the system keeps of files nor on other programs that have mapped the same ones. `objects` and
    `blocks` are those of the main process's Python; `shared` counts the files in /dev/shm.
    """
    _wait_for_the_ending()
    linecache.clearcache()  # the sources of what tracebacks told
    gc.collect()
    tree, shared = _tree(), Path("/dev/shm")
    return {
        "resident": _sum(tree, lambda process: process.memory_info().rss),
        "own": _sum(tree, _own_memory),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "threads": _sum(tree, psutil.Process.num_threads),
        "files": _sum(tree, psutil.Process.num_fds),
        "mappings": _sum(tree, _mapped_files),
        "processes": len(tree),
        "shared": len(os.listdir(shared)) if shared.is_dir() else 0,
    }


def _tree() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _sum(tree: list[psutil.Process], count: Callable[[psutil.Process], int]) -> int:
    """The count of all processes but those that have ended meanwhile."""
    total = 0
    for process in tree:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            total += count(process)
    return total


def _wait_for_the_ending() -> None:
    """Let workers and what they have in hand go: until nothing has changed for a while."""
    deadline, before = time.monotonic() + PATIENCE, None
    while time.monotonic() < deadline:
        gc.collect()
        tree = _tree()
        now = tree, _sum(tree, psutil.Process.num_threads), _sum(tree, psutil.Process.num_fds)
        if now == before:
            return
        before = now
        time.sleep(0.1)


def _own_memory(process: psutil.Process) -> int:
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except FileNotFoundError:  # not Linux, or it has ended
        return int(process.memory_full_info().uss)
    sizes = dict(line.split()[:2] for line in rollup.splitlines()[1:])
    return 1024 * (int(sizes.get("Pss_Anon:", 0)) + int(sizes.get("Pss_Shmem:", 0)))


def _mapped_files(process: psutil.Process) -> int:
    if not hasattr(process, "memory_maps"):  # macOS
        return 0
    return sum(not mapping.path.startswith("[") for mapping in process.memory_maps(grouped=False))
