"""Packs that are killed anywhere, run out of space, lose their source or their target: old store or whole new one."""

from __future__ import annotations

import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mounts import mounted
from PIL import Image

import fastload
from fastload import Store
from fastload.errors import PackError

if os.name != "posix":
    pytest.skip("kill -9 and limits are POSIX", allow_module_level=True)

from crashes import NAME, Case, Ending, Fault, Trial, contents, make_cases, pack_until

KINDS = ("tiles", "raw", "masks", "dataset", "store")
KILLED = -signal.SIGKILL
STRACE = shutil.which("strace") or "false"
traced = pytest.mark.skipif(
    subprocess.run([STRACE, "-qq", "true"], capture_output=True, check=False).returncode != 0,
    reason="there is no strace, or it may not trace",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def undisturbed(
    sources: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], Ending]]:
    """What an undisturbed run of a case gives, and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    known: dict[str, tuple[dict[str, Any], Ending]] = {}

    def of(kind: str) -> tuple[dict[str, Any], Ending]:
        if kind not in known:
            ending = pack_until(sources[kind], folder / kind)
            assert (ending.code, ending.error) == (0, "")
            known[kind] = contents(folder / kind), ending
        return known[kind]

    return of


@pytest.fixture
def trial(
    sources: dict[str, Case], undisturbed: Callable[[str], tuple[dict[str, Any], Ending]], tmp_path: Path
) -> Callable[..., Trial]:
    def of(kind: str, folder: str = "packed", old: Path | None = None) -> Trial:
        return Trial(sources[kind], tmp_path / folder, undisturbed(kind)[0], old)

    return of


# ---- kill -9


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_that_is_killed_again_and_again_gives_the_store_of_an_undisturbed_run(
    trial: Callable[..., Trial], sources: dict[str, Case], kind: str
) -> None:
    """Before or after any call that changes a file, and at once restarted; the old store stays until the end."""
    packs = trial(kind, old=sources["store"].source)
    moments = random.Random(kind)
    while not packs.end(Fault("call", moments.randrange(3, 25))):
        assert packs.last.code == KILLED
    packs.finish()


def test_a_pack_is_killed_all_along_its_end(
    trial: Callable[..., Trial], undisturbed: Callable[[str], tuple[dict[str, Any], Ending]], tmp_path: Path
) -> None:
    """Before and after calls from the last commit over the sync and the rename to the removal of the lock."""
    last = undisturbed("masks")[1].calls
    first = trial("masks", "first")
    assert not first.end(Fault("call", last - 18))
    partial = (first.folder / f"{NAME}.partial").read_bytes()
    for call in range(3, 40, 3):
        packs = trial("masks", str(call))
        (packs.folder / f"{NAME}.partial").write_bytes(partial)
        ended = packs.end(Fault("call", call))
        assert packs.last.code in (KILLED, 0)
        if packs.last.code == 0:
            break
        if not ended:
            packs.finish()
    assert call > 15


@pytest.mark.parametrize("kind", ["tiles", "raw"])
def test_a_pack_is_killed_in_the_middle_of_a_write(trial: Callable[..., Trial], kind: str) -> None:
    """The system kills it in the very call that makes the file larger than a limit, wherever that is in a commit."""
    packs, sizes = trial(kind), random.Random(kind)
    limit = 0
    while not packs.end(Fault("write", limit)):
        assert packs.last.code in (-signal.SIGXFSZ, 1), packs.last  # 1: the call was cut short instead
        limit += sizes.randrange(1, 100_000)
    packs.finish()


def test_a_dataset_goes_on_when_one_of_its_workers_was_killed(trial: Callable[..., Trial]) -> None:
    """The error says so, the other worker and the partial file are in order."""
    packs = trial("dataset")
    for item in (1, 30):
        assert not packs.end(Fault("worker", item))
        assert re.search(r"PackError: .* was lost \(.*worker.*run the same command again", packs.last.error)
    packs.finish()


# ---- power


def test_what_a_power_cut_leaves_of_the_pages_of_a_commit_is_no_harm(
    sources: dict[str, Case], trial: Callable[..., Trial], tmp_path: Path
) -> None:
    """Before its sync any of a commit's pages may have reached the disk: packing goes on from the commit before.

    A commit writes its pages, syncs them, and only then writes one of the two head pages, synced as well.
    """
    chance = random.Random(0)
    before, after = (trial("tiles", name) for name in ("before", "after"))
    before.end(Fault("call", 6))
    after.end(Fault("call", 7))
    old, new = ((packs.folder / f"{NAME}.partial").read_bytes() for packs in (before, after))
    assert before.committed < after.committed
    size = mmap.PAGESIZE
    pages = [at for at in range(0, len(new), size) if old[at : at + size] != new[at : at + size]]
    assert len([at for at in pages if at < 2 * size]) == 1
    for number in range(4):
        packs = trial("tiles", f"cut{number}")
        torn = bytearray(old.ljust(len(new), b"\0"))
        for at in pages:
            if at >= 2 * size and chance.random() < (0.5 if number else 1):
                torn[at : at + size] = new[at : at + size]
        (packs.folder / f"{NAME}.partial").write_bytes(torn)
        packs.committed = before.committed
        packs.finish()
        assert packs.last.first == before.committed + 1


@traced
def test_the_system_is_told_to_sync_in_the_right_order(sources: dict[str, Case], tmp_path: Path) -> None:
    """Traced: a commit's pages, their sync, a head page written through; then table, sync, rename, folder's sync."""
    code = "import sys, fastload; fastload.pack(sys.argv[1], sys.argv[2], tiles=False)"
    kinds = {
        "pwrite64": "w",
        "pwritev": "w",
        "write": "w",
        "writev": "w",
        "fsync": "s",
        "fdatasync": "s",
        "rename": "r",
    }
    command = [STRACE, "-f", "-y", "-qq", "-e", f"trace=openat,{','.join(kinds)}", "-o", tmp_path / "calls"]
    subprocess.run([*command, sys.executable, "-c", code, sources["tiles"].source, tmp_path / NAME], check=True)
    calls = (tmp_path / "calls").read_text(errors="replace")
    assert re.search(rf"openat.*{NAME}\.partial.*O_DSYNC", calls), "the head pages are not written through"
    order = ""
    for call, target in re.findall(rf"(\w+)\([^<\n]*[<\"]{re.escape(str(tmp_path))}/?([^>\"\n]*)", calls):
        if call in kinds and not target.endswith(".lock"):
            order += kinds[call] if target else "f"
    assert re.fullmatch(r"w(w+sw)+wsrf", order), order


# ---- no space


FULL = "no space left on the device; free some and run the same command again"


@pytest.mark.parametrize("kind", ["tiles", "raw"])
def test_a_disk_that_is_full_again_and_again(trial: Callable[..., Trial], tmp_path: Path, kind: str) -> None:
    """In a first write, in every commit and in the end: it says so, and goes on when there is a little more space."""
    size = 16
    with mounted(tmp_path / "packed", f"size={size}k") as change:
        packs = trial(kind)
        while not packs.end(Fault()):
            assert FULL in packs.last.error
            size += 90
            change(f"size={size}k")
        assert size > 100
        change("size=64m")
        packs.finish()


@pytest.mark.parametrize("kind", ["masks", "store"])
def test_a_file_that_may_not_grow_again_and_again(trial: Callable[..., Trial], kind: str) -> None:
    """The same where the system limits the size of a file: the error names it."""
    packs, limit = trial(kind), 4096
    while not packs.end(Fault("limit", limit)):
        assert "PackError" in packs.last.error
        limit += 90_000
    packs.finish()


@traced
@pytest.mark.parametrize(
    ("call", "number", "error", "said"),
    [("pwrite64", 9, "EDQUOT", FULL), ("fdatasync", 5, "EIO", "can't be written: ")],
)
def test_an_error_of_the_system_in_a_commit(
    sources: dict[str, Case], tmp_path: Path, call: str, number: int, error: str, said: str
) -> None:
    """A quota that is used up, and a disk that fails, as the system's answer to a write or a sync of LMDB's."""
    source = sources["raw"].source or Path()
    code = (
        "import sys, fastload.store_writer\n"
        "fastload.store_writer._STEP_BYTES = 10_000\n"
        "fastload.pack(sys.argv[1], sys.argv[2], workers=1)"
    )
    fault = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}+"]
    command = [STRACE, "-f", "-qq", *fault, "-o", "/dev/null", sys.executable, "-c", code, source, tmp_path / NAME]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.search(f"PackError: .*{said}", ended.stderr)
    assert state(tmp_path).keys() == {f"{NAME}.partial"}
    first: list[int] = []
    fastload.pack(source, tmp_path / NAME, progress=lambda done, _: first.append(done))
    assert first[0] > 1
    fastload.pack(source, tmp_path / "whole.lmdb")
    assert Store(tmp_path / NAME).manifest["digest"] == Store(tmp_path / "whole.lmdb").manifest["digest"]


# ---- targets that can't be written, or go away

NOBODY = 65534
"""A user who owns nothing."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_of_somebody_else(trial: Callable[..., Trial], sources: dict[str, Case]) -> None:
    """It can't be written: the error names the store, and nothing is left there, or changed."""
    packs = trial("raw")
    open_to_all(sources["raw"].source or packs.folder)
    open_to_all(packs.folder)
    assert not packs.end(Fault("call", 9))
    before = state(packs.folder)
    packs.case = packs.case._replace(user=NOBODY)
    assert not packs.end(Fault())
    assert re.search(r"PackError: .*db\.lmdb can't be written: Permission denied", packs.last.error)
    assert state(packs.folder) == before
    packs.case = packs.case._replace(user=None)
    packs.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_the_partial_file_of_somebody_else(trial: Callable[..., Trial], sources: dict[str, Case]) -> None:
    """What may not be read is not thrown away."""
    packs = trial("raw")
    open_to_all(sources["raw"].source or packs.folder)
    open_to_all(packs.folder)
    packs.folder.chmod(0o777)
    assert not packs.end(Fault("call", 9))
    (packs.folder / f"{NAME}.partial.lock").unlink()
    (packs.folder / f"{NAME}.partial").chmod(0o600)
    before = state(packs.folder)
    packs.case = packs.case._replace(user=NOBODY)
    assert not packs.end(Fault())
    assert re.search(r"PackError: .*db\.lmdb\.partial can't be written: .*Permission denied", packs.last.error)
    assert state(packs.folder) == before
    packs.case = packs.case._replace(user=None)
    packs.finish()


def open_to_all(folder: Path) -> None:
    """Let any user read the folder, through those of pytest that lead to it."""
    for parent in (folder, *folder.parents):
        if parent.name.startswith("pytest") or "pytest-of" in str(parent.parent):
            parent.chmod(parent.stat().st_mode | 0o055)


def state(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_file_system_that_becomes_read_only(trial: Callable[..., Trial], tmp_path: Path) -> None:
    """As after an error of its disk; mounted for writing again, it goes on."""
    with mounted(tmp_path / "packed", "size=64m") as change:
        packs = trial("tiles")
        assert not packs.end(Fault("call", 9))
        before = state(packs.folder)
        change("ro")
        assert not packs.end(Fault())
        assert re.search(r"PackError: .*db\.lmdb can't be written: Read-only file system", packs.last.error)
        assert state(packs.folder) == before
        change("rw")
        packs.finish()


def test_a_folder_that_is_removed_in_the_middle(
    sources: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is missing."""
    (tmp_path / "packed").mkdir()
    with pytest.raises(PackError, match=r"db\.lmdb\.partial can't be written: .*No such file"):
        fastload.pack(
            sources["raw"].source or "",
            tmp_path / "packed" / NAME,
            progress=lambda done, _: shutil.rmtree(tmp_path / "packed") if done == 20 else None,
        )
    assert not (tmp_path / "packed").exists()


def test_a_partial_file_of_another_pack_is_never_published(sources: dict[str, Case], tmp_path: Path) -> None:
    """The folder was removed and made anew, and another pack is at work in it: that one's file is left alone."""
    (tmp_path / "packed").mkdir()

    def replace(done: int, _: int) -> None:
        if done == 20:
            shutil.rmtree(tmp_path / "packed")
            (tmp_path / "packed").mkdir()
            (tmp_path / "packed" / f"{NAME}.partial").write_bytes(b"half a store")

    with pytest.raises(PackError, match=r"db\.lmdb\.partial was replaced while it was written"):
        fastload.pack(sources["raw"].source or "", tmp_path / "packed" / NAME, progress=replace)
    assert state(tmp_path / "packed") == {f"{NAME}.partial": b"half a store"}


# ---- sources that change


def test_a_file_that_vanishes_after_it_was_listed_is_left_out(tmp_path: Path) -> None:
    """With its reason; all others are packed."""
    for i in range(100):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:03}.png")

    def remove(done: int, _: int) -> None:
        (tmp_path / "099.png").unlink(missing_ok=True)

    report = fastload.pack(tmp_path, tmp_path / NAME, format="flat", workers=1, progress=remove)
    assert (report.samples, report.quarantined) == (99, 1)
    [left_out] = Store(tmp_path / NAME).quarantine()
    assert left_out["name"] == "099.png"
    assert "No such file" in left_out["reason"]


def test_a_source_that_changes_between_two_runs_is_packed_from_the_start(
    sources: dict[str, Case], undisturbed: Callable[[str], tuple[dict[str, Any], Ending]], tmp_path: Path
) -> None:
    """A file that vanished, and one that is another now: what an undisturbed pack of the present files gives."""
    images = shutil.copytree(sources["raw"].source or "", tmp_path / "images")
    case = sources["raw"]._replace(source=images)
    packs = Trial(case, tmp_path / "packed", {})
    assert not packs.end(Fault("call", 15))
    (images / "class1" / "01.png").unlink()
    (images / "class2" / "02.png").write_bytes((images / "class2" / "05.png").read_bytes())
    assert pack_until(case, tmp_path / "whole.lmdb").code == 0
    packs.whole, packs.committed = contents(tmp_path / "whole.lmdb"), 0
    packs.finish()
    assert packs.last.first == 1


# ---- partial files that are damaged


@pytest.mark.parametrize("kind", ["masks", "raw"])
@pytest.mark.parametrize("moment", ["middle", "complete"])
def test_a_partial_file_that_was_damaged_meanwhile_never_makes_a_wrong_store(
    trial: Callable[..., Trial], kind: str, moment: str
) -> None:
    """Bits flipped, and cut at any length: packed from the start, or gone on with where all that matters is whole."""
    chance = random.Random(f"{kind} {moment}")
    first = trial(kind, "first")
    call = 15
    while not first.end(Fault("call", call)):
        call = 10_000 if moment == "middle" else call + 1
        partial = (first.folder / f"{NAME}.partial").read_bytes()
        if b'"digest": ' in partial or moment == "middle":
            break
    places = places_of(first.whole, partial)
    for number in range(4):
        packs = trial(kind, str(number))
        damaged = bytearray(partial)
        if number < 3:
            for _ in range(3):
                damaged[chance.choice(places)] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(damaged) // 2) :]
        (packs.folder / f"{NAME}.partial").write_bytes(damaged)
        packs.finish()
        assert number < 3 or packs.last.first == 1


def places_of(whole: dict[str, Any], partial: bytes) -> list[int]:
    """Where bytes of records and columns lie in a partial file."""
    values = [*whole["records"], *(column[:64] for column in whole["columns"].values())]
    found = [(partial.find(value), len(value)) for value in values]
    return [place for start, length in found if start >= 0 for place in range(start, start + length)]


# ---- two at once


def test_a_second_pack_says_so_and_touches_nothing(sources: dict[str, Case], tmp_path: Path) -> None:
    """Even of one that is stopped; when that is killed, the name is free at once."""
    script = (
        "import os, signal, sys, fastload\n"
        "stop = lambda done, _: os.kill(os.getpid(), signal.SIGSTOP) if done == 9 else None\n"
        "fastload.pack(sys.argv[1], sys.argv[2], progress=stop)"
    )
    source = sources["raw"].source or Path()
    child = subprocess.Popen([sys.executable, "-c", script, source, tmp_path / NAME])
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        before = {path.name: (path.stat(), path.read_bytes()) for path in tmp_path.iterdir()}
        for _ in range(2):
            with pytest.raises(PackError, match=r"another pack is writing .*db\.lmdb at this moment"):
                fastload.pack(source, tmp_path / NAME)
        after = {path.name: (path.stat(), path.read_bytes()) for path in tmp_path.iterdir()}
        assert set(before) == set(after) == {f"{NAME}.partial", f"{NAME}.partial.lock"}
        for name, (status, data) in before.items():
            assert (status.st_ino, status.st_mtime_ns, data) == (
                after[name][0].st_ino,
                after[name][0].st_mtime_ns,
                after[name][1],
            )
    finally:
        child.kill()
        child.wait()
    assert fastload.pack(source, tmp_path / NAME).samples == 37
    assert os.listdir(tmp_path) == [NAME]


def test_a_store_that_another_pack_finished_meanwhile_is_not_replaced(
    sources: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two begin at once, and the other is done when this one has listed its files: the store stays."""
    source = sources["raw"].source or Path()
    listing = fastload.sources.open_source

    def slowly(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        fastload.pack(source, tmp_path / NAME)
        return listing(*arguments, **options)

    monkeypatch.setattr(sys.modules["fastload.pack"], "open_source", slowly)
    with pytest.raises(FileExistsError, match="exists already"):
        fastload.pack(source, tmp_path / NAME, encode="raw")
    assert os.listdir(tmp_path) == [NAME]
    assert "image" not in Store(tmp_path / NAME).columns
