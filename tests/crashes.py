"""Packs that end in every way, and what must be there afterwards: the old store or the whole new one, and a way on.

For some dozens of each in `test_crash.py`, and for as many as one likes in `tools/crash`.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from conftest import picture
from PIL import Image
from torch.utils.data import Dataset

import fastload
from fastload import Store, store, store_writer
from fastload.errors import FastloadError

CLEAN = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
"""Children with no threads and no open stores of ours; a kill hits nothing but the child."""

NAME = "db.lmdb"
ALLOWED = {NAME, f"{NAME}.partial", f"{NAME}.partial.lock"}
PATIENCE = 60.0
_STEP_BYTES = 30_000
_COLUMN_CHUNK = 4 * 24 * 24 * 3

if os.name == "posix":
    multiprocessing.set_forkserver_preload(["fastload", "fastload.recut", "pytest", "cv2", "torch"])


class Case(NamedTuple):
    """What is packed, and how. source: a path; of a dataset, None. user: by whom, if not by who asks."""

    source: Path | None
    options: dict[str, Any]
    user: int | None = None


class Fault(NamedTuple):
    """How a pack is ended.

    kind: `call` (kill -9 before or after the so-manyth call that changes a file), `delay` (after so many seconds),
    `write` (in the write that reaches so many bytes), `limit` (that write fails), `worker` (kill -9 of a worker process
    when so many items are done), `interrupt` (Ctrl-C then) or `none`.
    """

    kind: str = "none"
    number: float = 0


@dataclass(frozen=True)
class Ending:
    """What a pack said until it ended.

    code: its exit status, negative for a signal. group: of its processes. first: the first item that it dealt with,
    None for none. committed: how many items were on disk as far as it said. calls: how many calls changed files.
    error: that it gave.
    """

    code: int
    group: int
    first: int | None
    committed: int
    calls: int
    error: str


class Numbers(Dataset[Any]):
    """Sixty samples of several fields, some larger than what a pipe takes; one can't be read."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 41:
            raise OSError("the disk has a scratch here")
        random = np.random.default_rng(index)
        return {"wave": random.bytes(3000 if index % 4 else 90_000), "text": f"number {index}", "label": index % 7}


def make_cases(folder: Path) -> dict[str, Case]:
    """Every kind of source, made of a few small files, some of them damaged."""
    photos, small, scans, masks = (folder / name for name in ("photos", "small", "scans", "masks"))
    for i in range(24):
        path = photos / f"class{i % 3}" / f"{i:02}.jpg"
        _save(path, picture(150 + i, 210, i), quality=92, progressive=i % 4 == 1)
        if i in (5, 23):
            path.write_bytes(path.read_bytes()[:700])
    for i in range(40):
        path = small / f"class{i % 3}" / f"{i:02}.png"
        _save(path, picture(24, 24, i))
        if i in (0, 13, 39):
            path.write_bytes(b"damaged")
    for i in range(20):
        _save(scans / f"{i:02}.jpg", picture(90, 80, i), quality=92)
        _save(masks / f"{i:02}.png", np.random.default_rng(i).integers(0, 5, (90, 80 + (i == 7)), dtype=np.uint8))
    fastload.pack(photos, folder / "photos.lmdb")
    return {
        "tiles": Case(photos, {}),
        "raw": Case(small, {"encode": "raw"}),
        "masks": Case(scans, {"masks": masks}),
        "dataset": Case(None, {"workers": 2}),
        "store": Case(folder / "photos.lmdb", {"short_side": 120}),
    }


def _save(path: Path, pixels: npt.NDArray[np.uint8], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def contents(path: Path) -> dict[str, Any]:
    """All that a store holds, read with its checksums."""
    whole = Store(path)
    return {
        "manifest": whole.manifest,
        "records": [bytes(whole.view(i)) for i in range(len(whole))],
        "samples": [{name: field.payload for name, field in whole[i].fields.items()} for i in range(len(whole))],
        "columns": {name: np.asarray(column).tobytes() for name, column in whole.columns.items()},
        "quarantine": whole.quarantine(),
    }


def pack_until(case: Case, destination: Path, fault: Fault = Fault()) -> Ending:  # noqa: B008, it is immutable
    """Pack in a process of its own, in small steps, which `fault` ends; wait for it, but not for its workers."""
    receiver, sender = CLEAN.Pipe(duplex=False)
    child = CLEAN.Process(target=_pack, args=(case, destination, fault, sender))
    child.start()
    sender.close()
    told: dict[str, Any] = {"first": None, "committed": 0, "calls": 0, "error": ""}
    try:
        while receiver.poll(PATIENCE):
            told.update(receiver.recv())
        raise AssertionError(f"{fault}: the pack hangs, or a process of it")
    except (EOFError, ConnectionResetError):
        pass
    finally:
        receiver.close()
        child.join(PATIENCE)
    assert child.exitcode is not None, f"{fault}: the pack doesn't end"
    return Ending(child.exitcode, child.pid or 0, **told)


def strays(group: int) -> bool:
    """Whether a process of the group is alive after a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    return True


def _pack(case: Case, destination: Path, fault: Fault, connection: Connection) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of a dataset's workers, to have all in one group
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    store_writer._STEP_BYTES = _STEP_BYTES
    store.COLUMN_CHUNK = _COLUMN_CHUNK
    if case.user is not None:
        os.setgroups([])
        os.setegid(case.user)
        os.seteuid(case.user)
    tell = _Teller(connection, fault)
    _install(fault, tell)
    try:
        fastload.pack(
            case.source or Numbers(),
            destination,
            overwrite=True,
            progress=tell.progress,
            **{"workers": 2} | case.options,
        )
    except (FastloadError, OSError, KeyboardInterrupt) as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


class _Teller:
    """Says how far the pack is, and sets off what happens at an item."""

    def __init__(self, connection: Connection, fault: Fault) -> None:
        self.connection, self.fault = connection, fault
        self.first: int | None = None

    def progress(self, done: int, _: int) -> None:
        if self.first is None:
            self.first = done
            self.connection.send({"first": done})
        if self.fault == ("interrupt", done):
            raise KeyboardInterrupt
        if self.fault == ("worker", done):
            for child in multiprocessing.active_children()[:1]:
                os.kill(child.pid or 0, signal.SIGKILL)


def _install(fault: Fault, tell: _Teller) -> None:
    """Make this process meet its fault, and say what it has written."""
    calls = itertools.count(1)

    def step() -> None:
        call = next(calls)
        tell.connection.send({"calls": call})
        if fault == ("call", call):
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            result = function(*arguments, **options)
            if function is write:
                tell.connection.send({"committed": arguments[0].done})
            step()
            return result

        return call

    write = store_writer.StoreWriter._write
    owners: list[tuple[Any, str]] = [(store_writer.StoreWriter, "_write"), (store_writer.StoreWriter, "_open")]
    for owner, name in (*owners, (os, "fsync"), (os, "replace"), (os, "unlink")):
        setattr(owner, name, hooked(getattr(owner, name)))
    if fault.kind == "delay":
        timer = threading.Timer(fault.number, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    if fault.kind in ("write", "limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.number), resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault.kind == "write" else signal.SIG_IGN)


class Trial:
    """Packs of one case into one folder, disturbed one after the other, until one gives the store.

    whole: what an undisturbed run gives. old: what lay under the final name before, or None.
    """

    def __init__(self, case: Case, folder: Path, whole: dict[str, Any], old: Path | None = None) -> None:
        self.case, self.folder, self.whole, self.old = case, folder, whole, old
        self.path = folder / NAME
        self.committed = self.endings = 0
        self.groups: list[int] = []
        folder.mkdir(exist_ok=True)
        if old is not None:
            self.path.write_bytes(old.read_bytes())

    def end(self, fault: Fault) -> bool:
        """Pack until the fault; whether the new store is there. AssertionError for half a store, or lost work."""
        ending = self.last = pack_until(self.case, self.path, fault)
        self.groups.append(ending.group)
        self.endings += 1
        assert ending.first is None or ending.first > self.committed, f"{fault}: packed items again, {ending}"
        assert set(os.listdir(self.folder)) <= ALLOWED, os.listdir(self.folder)
        done = self.is_new()
        self.committed = 0 if done else max(self.committed, ending.committed)
        assert done or ending.code, f"{fault}: it ended well, and there is no new store"
        return done

    def is_new(self) -> bool:
        """Whether the new store lies under the final name; AssertionError if it is neither that nor the old one."""
        if not self.path.exists():
            assert self.old is None, "the old store is gone"
            return False
        if self.old is not None and self.path.read_bytes() == self.old.read_bytes():
            return False
        found = contents(self.path)
        differing = [part for part in found if found[part] != self.whole[part]]
        assert not differing, f"the store differs from an undisturbed run's in {differing}"
        return True

    def finish(self) -> None:
        """Pack once more, undisturbed: it must go on and give the undisturbed run's store, and leave nothing behind."""
        self.end(Fault())
        assert self.last.code == 0, self.last
        assert os.listdir(self.folder) == [NAME], os.listdir(self.folder)
        assert not any(map(strays, self.groups)), "a process of a pack is left over"
