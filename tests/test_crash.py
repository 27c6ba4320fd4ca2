"""Packs that are killed anywhere, run out of space, lose their source or their target: old store or whole new one."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import PackError

if os.name != "posix":
    pytest.skip("kill -9 and limits are POSIX", allow_module_level=True)

from crashes import NAME, Case, Ending, Fault, Trial, contents, make_cases, pack_until

KINDS = ("tiles", "raw", "masks", "dataset", "store")
KILLED = -signal.SIGKILL


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
    """Before or after any call that changes a file, and at once restarted; until the end the old store stays in place."""
    packs = trial(kind, old=sources["store"].source)
    moments = random.Random(kind)
    while not packs.end(Fault("call", moments.randrange(3, 25))):
        assert packs.last.code == KILLED
    packs.finish()


def test_a_pack_is_killed_at_every_call_of_its_end(
    trial: Callable[..., Trial], undisturbed: Callable[[str], tuple[dict[str, Any], Ending]], tmp_path: Path
) -> None:
    """From the last commit over the sync and the rename to the removal of the lock."""
    last = undisturbed("masks")[1].calls
    first = trial("masks", "first")
    assert not first.end(Fault("call", last - 18))
    partial = (first.folder / f"{NAME}.partial").read_bytes()
    for call in range(3, 30):
        packs = trial("masks", str(call))
        (packs.folder / f"{NAME}.partial").write_bytes(partial)
        ended = packs.end(Fault("call", call))
        assert packs.last.code in (KILLED, 0)
        if packs.last.code == 0:
            break
        if not ended or call % 4 == 0:
            packs.finish()
    assert call > 15


@pytest.mark.parametrize("kind", ["tiles", "raw"])
def test_a_pack_is_killed_in_the_middle_of_a_write(trial: Callable[..., Trial], kind: str) -> None:
    """The system kills it in the very call that makes the file larger than a limit, wherever that is in a commit."""
    packs, sizes = trial(kind), random.Random(kind)
    limit = 0
    while not packs.end(Fault("write", limit)):
        assert packs.last.code == -signal.SIGXFSZ, packs.last
        limit += sizes.randrange(1, 60_000)
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
    pages = [at for at in range(0, len(new), 4096) if old[at : at + 4096] != new[at : at + 4096]]
    assert len([at for at in pages if at < 8192]) == 1
    for number in range(4):
        packs = trial("tiles", f"cut{number}")
        torn = bytearray(old.ljust(len(new), b"\0"))
        for at in pages:
            if at >= 8192 and chance.random() < (0.5 if number else 1):
                torn[at : at + 4096] = new[at : at + 4096]
        (packs.folder / f"{NAME}.partial").write_bytes(torn)
        packs.committed = before.committed
        packs.finish()
        assert packs.last.first == before.committed + 1


def test_the_system_is_told_to_sync_in_the_right_order(sources: dict[str, Case], tmp_path: Path) -> None:
    """Traced: each commit's pages, their sync, a head page that is written through; at last sync, rename, folder's sync."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-qq", "true"], capture_output=True, check=False).returncode:
        pytest.skip("there is no strace, or it may not trace")
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
    command = [strace, "-f", "-y", "-qq", "-e", f"trace=openat,{','.join(kinds)}", "-o", tmp_path / "calls"]
    subprocess.run([*command, sys.executable, "-c", code, sources["tiles"].source, tmp_path / NAME], check=True)
    calls = (tmp_path / "calls").read_text(errors="replace")
    assert re.search(rf"openat.*{NAME}\.partial.*O_DSYNC", calls), "the head pages are not written through"
    order = ""
    for call, target in re.findall(rf"(\w+)\([^<\n]*[<\"]{re.escape(str(tmp_path))}/?([^>\"\n]*)", calls):
        if call in kinds and not target.endswith(".lock"):
            order += kinds[call] if target else "f"
    assert re.fullmatch(r"w(w+sw)+srf", order), order


# ---- no space


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory at `folder`; the function changes its options. Skips where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system takes root on Linux")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here, or knows no such option")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


FULL = "no space left on the device; free some and run the same command again"


@pytest.mark.parametrize("kind", ["tiles", "raw"])
def test_a_disk_that_is_full_again_and_again(trial: Callable[..., Trial], tmp_path: Path, kind: str) -> None:
    """In a first write, in every commit and in the end: it says so, and goes on when there is a little more space."""
    size = 16
    with mounted(tmp_path / "packed", f"size={size}k") as change:
        packs = trial(kind)
        while not packs.end(Fault()):
            assert FULL in packs.last.error
            size += 32
            change(f"size={size}k")
        assert size > 100
        packs.finish()


@pytest.mark.parametrize("kind", ["masks", "store"])
def test_a_file_that_may_not_grow_again_and_again(trial: Callable[..., Trial], kind: str) -> None:
    """The same where the system limits the size of a file: the error names it."""
    packs, limit = trial(kind), 4096
    while not packs.end(Fault("limit", limit)):
        assert "PackError" in packs.last.error
        limit += 40_960
    packs.finish()


NOBODY = 65534


def pack_as_nobody(source: Path, destination: Path) -> str:
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        fastload.pack(source, destination, overwrite=True)
    except (PackError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.seteuid(0)
    return ""
