"""Failures: each sample counted once, by threads, processes and ranks, in one table, against one limit."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import multiprocessing
import pickle
import re
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import failures as module
from fastload.errors import TooManyFailures
from fastload.failures import Failures, check_states

LOST = 'reason not kept; on_error="raise" tells it again'
MANY = 100_000_000


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastload"]


def failed(samples: int, indices: Sequence[int], limit: int | None = None) -> Failures:
    """Failures in which these samples have failed, each for a reason of its own."""
    failures = Failures(samples, limit)
    for index in indices:
        failures.report(index, f"reason {index}")
    return failures


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "fastload")


# --- one process


def test_failures_read_like_a_dict() -> None:
    """Index and reason of each sample that failed, by index; what did not fail is a KeyError."""
    failures = Failures(MANY)
    assert isinstance(failures, Mapping)
    assert dict(failures) == {}
    for index, reason in ((7, "damaged"), (0, "cut short"), (MANY - 1, "the last one")):
        failures.report(index, reason)
    assert dict(failures) == {0: "cut short", 7: "damaged", MANY - 1: "the last one"}
    assert list(failures) == [0, 7, MANY - 1]
    assert len(failures) == 3
    assert 7 in failures
    assert failures[np.int64(7)] == "damaged"  # type: ignore[index]
    for none in (8, -1, MANY, 1 << 70, "7", None):
        assert none not in failures
    with pytest.raises(KeyError):
        failures[8]
    assert repr(failures) == "Failures({0: 'cut short', 7: 'damaged', 99999999: 'the last one'})"
    assert repr(failed(9, range(8))) == f"Failures({ {i: f'reason {i}' for i in range(5)} } and 3 more)"
    assert repr(Failures(0)) == "Failures({})"


def test_a_sample_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    """Failing in every epoch is one failure: counted once, logged once, with its first reason."""
    failures = Failures(10)
    for epoch in range(3):
        failures.report(5, f"reason {epoch}")
    failures.report(6, "another")
    assert dict(failures) == {5: "reason 0", 6: "another"}
    assert logged(caplog) == ["sample 5: reason 0", "sample 6: another"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9_999) | st.integers(4_090, 4_100)))
def test_the_table_holds_any_set_of_indices(indices: list[int]) -> None:
    """Whatever indices fail, in whatever order, exactly these are listed, in order, and come through a state."""
    failures = failed(10_000, indices)
    expected = {index: f"reason {index}" for index in sorted(set(indices))}
    assert dict(failures) == expected
    other = Failures(10_000)
    other.load_state_dict(json.loads(json.dumps(failures.state_dict())))
    assert dict(other) == expected
    assert len(other) == len(expected)


@pytest.mark.usefixtures("_quiet")
def test_a_report_costs_a_page_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred thousand reports, none looks at more than one page of marks, or at it more than twice."""
    looked: list[int] = []
    count = np.count_nonzero

    def counted(marks: Any) -> Any:
        looked.append(marks.size)
        return count(marks)

    failures = Failures(333_333, limit=100_000)
    monkeypatch.setattr(np, "count_nonzero", counted)
    for index in range(0, 300_000, 3):
        failures.report(index, "bad")
    assert len(looked) <= 200_000
    assert max(looked) <= 4096
    monkeypatch.undo()
    assert len(failures) == 100_000
    assert list(failures) == list(range(0, 300_000, 3))
    failures.report(3, "again")
    with pytest.raises(TooManyFailures, match="100001 samples failed, max_failures allows 100000"):
        failures.report(333_332, "one too many")


def test_a_large_table_takes_up_no_memory() -> None:
    """A table of a hundred million samples takes some pages for each that fails, and not a byte for each that there is.

    Listing them, saying whether one is there, and a state that comes and goes look at these pages only.
    """
    process = psutil.Process()
    Failures(10).report(1, "what is loaded on first use")
    before = process.memory_info().rss
    tables = [failed(MANY, (5, 12_345_678, MANY - 1), 3) for _ in range(3)]
    for failures in tables:
        assert list(failures) == [5, 12_345_678, MANY - 1]
        assert not any(index in failures for index in range(0, MANY, 12_000))
        other = Failures(MANY)
        state = failures.state_dict()
        assert len(json.dumps(state)) < 1000
        other.load_state_dict(state)
        assert dict(other) == dict(failures)
    assert process.memory_info().rss - before < 20 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory that is shared has names")
def test_the_table_lies_in_memory_without_a_name() -> None:
    """So /dev/shm, 64 MB in a container, needs no room for it."""
    failures = Failures(MANY)
    address = failures._memory.data_ptr()
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    (name,) = [m[5] for m in maps if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16)]
    assert name.startswith("/memfd:fastload")


# --- reasons and log


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("", ""),
        ("x" * 300, "x" * 256),
        ("ä" * 128, "ä" * 128),
        ("x" + "ä" * 128, "x" + "ä" * 127),
        ("a\0b\0", "a\0b"),
        ("name \udcff", "name ?"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_reasons_are_kept_in_256_bytes(reason: str, kept: str) -> None:
    """As UTF-8, cut between characters; what UTF-8 can't say is a question mark."""
    failures = Failures(5000)
    failures.report(4999, reason)
    assert failures[4999] == kept
    assert failures.state_dict()["reasons"] == [[4999, kept]]


@pytest.mark.usefixtures("_quiet")
def test_the_first_reasons_are_kept() -> None:
    """1,024 of them; later ones say how to get at the reason."""
    failures = failed(5000, range(5000))
    assert [failures[i] for i in range(1024)] == [f"reason {i}" for i in range(1024)]
    assert {failures[i] for i in range(1024, 5000)} == {LOST}


def test_a_reason_that_two_processes_wrote_is_lost_not_mixed_up() -> None:
    """One half from here and the other from there belongs to neither sample."""
    failures = failed(10, [3, 4])
    reasons = failures._table().reasons
    (place,) = np.flatnonzero(reasons["index"] == 3 + 1)
    reasons["text"][place] = b"another's reason"
    assert dict(failures) == {3: LOST, 4: "reason 4"}
    assert failures.state_dict()["reasons"] == [[4, "reason 4"]]
    other = pickle.loads(pickle.dumps(failures))
    assert dict(other) == {3: LOST, 4: "reason 4"}


def test_the_log_tells_the_first_hundred_and_each_doubling(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand failures are 99 lines of a kind, and then the 100th, 200th, 400th and 800th, which says so."""
    failed(1000, range(1000))
    lines = logged(caplog)
    assert lines[:99] == [f"sample {i}: reason {i}" for i in range(99)]
    assert lines[99] == (
        "sample 99: reason 99. That makes 100 failed samples; from here on, one is logged each time that their number "
        "has doubled, and dataset.failures lists all"
    )
    counts = [re.findall(r"sample (\d+): .* makes (\d+) failed", line) for line in lines[99:]]
    assert counts == [[("99", "100")], [("199", "200")], [("399", "400")], [("799", "800")]]


# --- the limit


def test_the_limit_is_how_many_may_fail() -> None:
    """The failure after the last allowed one is an error that says how many, which first, and what to do."""
    failures = Failures(10, limit=2)
    failures.report(4, "damaged")
    failures.report(4, "damaged")
    failures.report(2, "cut short")
    message = (
        "3 samples failed, max_failures allows 2. The first: sample 2: cut short; sample 4: damaged; sample 9: empty. "
        "To go on, put the store in order (`fastload verify --decode` lists all that is damaged) or raise "
        "max_failures, and load the loader's last state"
    )
    with pytest.raises(TooManyFailures, match=re.escape(message)):
        failures.report(9, "empty")
    with pytest.raises(TooManyFailures, match="3 samples failed"):
        failures.report(4, "damaged")
    assert len(failures) == 3


def test_the_error_names_five() -> None:
    """However many have failed, and says where the others are."""
    failures = failed(100, range(50, 0, -1))
    failures.limit = 50
    with pytest.raises(
        TooManyFailures, match=r"sample 4: reason 4; and 46 more, which dataset.failures lists\. To go on"
    ):
        failures.report(0, "reason 0")


def test_a_limit_of_zero_allows_none() -> None:
    """The first failure is one too many."""
    with pytest.raises(TooManyFailures, match="1 samples failed, max_failures allows 0"):
        Failures(1, limit=0).report(0, "damaged")


# --- threads


def in_threads(count: int, target: Any) -> None:
    threads = [threading.Thread(target=target, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_count_each_sample_once(caplog: pytest.LogCaptureFixture) -> None:
    """Four threads that all report the same ninety samples give ninety failures, log lines and reasons."""
    failures = Failures(90)

    def report(number: int) -> None:
        for index in range(90):
            failures.report((index + 20 * number) % 90, f"reason {number}")

    in_threads(4, report)
    assert list(failures) == list(range(90))
    assert len(logged(caplog)) == 90
    assert set(failures.values()) <= {f"reason {number}" for number in range(4)}


def test_threads_share_the_limit() -> None:
    """Whichever thread reports the one too many gets the error; no more failures than threads come after it."""
    failures = Failures(10_000, limit=10)
    errors: list[str] = []

    def report(number: int) -> None:
        try:
            for index in range(100):
                failures.report(1000 * number + index, "bad")
        except TooManyFailures as error:
            errors.append(str(error))

    in_threads(3, report)
    assert len(errors) == 3
    assert 10 < len(failures) <= 13


# --- processes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_report_into_one_table(method: str) -> None:
    """What two other processes report is counted here, once per sample, and their reasons can be read here."""
    failures = Failures(MANY)
    failures.report(3, "seen here")
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=failures.report, args=(index, "seen there")) for index in (3, MANY - 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert dict(failures) == {3: "seen here", MANY - 1: "seen there"}
    failures.report(MANY - 1, "seen here too")
    assert len(failures) == 2


def test_the_limit_counts_all_processes() -> None:
    """A process learns from the table what others found: the third failure is one too many wherever it happens."""
    failures = Failures(10, limit=2)
    context = multiprocessing.get_context("fork")
    exits = []
    for index in range(3):
        process = context.Process(target=failures.report, args=(index, "damaged"))
        process.start()
        process.join()
        exits.append(process.exitcode)
    assert exits == [0, 0, 1]
    with pytest.raises(TooManyFailures, match="3 samples failed, max_failures allows 2"):
        failures.report(0, "damaged here too")


@pytest.mark.parametrize("over", [0, 1])
def test_processes_that_report_at_once_neither_miss_the_limit_nor_see_it_early(over: int) -> None:
    """Four processes mark the same page, sample by sample, twice over: with the last sample, and only with it, it is
    one too many, and at least one of them learns so."""
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        failures = Failures(4096, limit=1000 - over)
        start = context.Barrier(4)
        processes = [context.Process(target=_report_all, args=(failures, start, number)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len(failures) == len(list(failures)) == 1000
        exits = {process.exitcode for process in processes}
        assert exits == {0} if not over else 1 in exits


def test_a_count_that_is_overtaken_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process marks and counts between this one's counting and its writing is not lost."""
    failures, other = Failures(100), []
    count = np.count_nonzero

    def overtaken(marks: Any) -> Any:
        found = count(marks)
        if not other:
            other.append(threading.Thread(target=_mark_and_count, args=(failures, 7)))
            other[0].start()
            other[0].join()
        return found

    monkeypatch.setattr(np, "count_nonzero", overtaken)
    failures.report(3, "bad")
    assert len(failures) == len(list(failures)) == 2


def _mark_and_count(failures: Failures, index: int) -> None:
    """What another process does, without the lock that is this one's."""
    table = failures._table()
    table.failed[0, index] = True
    table.settle(0)


def _report_all(failures: Failures, start: Any, number: int) -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    start.wait()
    for index in range(1000):
        if (index + number) % 4 < 2:
            failures.report(index, "bad")


def test_a_killed_process_blocks_no_other() -> None:
    """A worker that dies in the middle of its reports leaves a table that others can use, and a list that is right."""
    failures = Failures(3000)
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_report_forever, args=(failures,))
        before = len(failures)
        process.start()
        while len(failures) == before:
            assert process.is_alive()
        process.kill()
        process.join()
        found = list(failures)
        assert len(failures) == len(found)
        assert set(failures.values()) <= {"bad", "afterwards", LOST}
        failures.report(2999 - len(found), "afterwards")
        assert len(failures) == len(found) + 1


def test_a_mark_that_was_not_counted_is_counted_later() -> None:
    """By whoever lists the failures, or by the next report in its page."""
    for listed in (False, True):
        failures = failed(100, [3])
        failures._table().failed[0, 7] = True  # and here the worker was killed
        assert len(failures) == 1
        if listed:
            assert list(failures) == [3, 7]
        else:
            failures.report(3, "again")
        assert len(failures) == 2


def _report_forever(failures: Failures) -> None:
    logging.disable(logging.CRITICAL)
    index = len(failures)
    while True:
        failures.report(index, "bad")
        index = (index + 1) % 1000


def test_a_process_that_is_forked_during_a_report_can_report() -> None:
    """The lock among threads was taken by one that did not come along."""
    failures = Failures(10)
    with module._lock:
        process = multiprocessing.get_context("fork").Process(target=failures.report, args=(3, "bad"))
        process.start()
        process.join(20)
    process.kill()
    assert list(failures) == [3]


# --- copies and states


def test_copies_count_for_themselves() -> None:
    """A dataset that is saved, or copied, keeps its failures and limit, and goes on by itself."""
    failures = failed(MANY, [8], 3)
    assert len(pickle.dumps(failures)) < 1000
    for other in (pickle.loads(pickle.dumps(failures)), copy.deepcopy(failures)):
        assert dict(other) == {8: "reason 8"}
        assert other.limit == 3
        other.report(9, "damaged")
        assert list(other) == [8, 9]
        assert list(failures) == [8]


@pytest.mark.usefixtures("_quiet")
def test_states_are_texts_and_numbers() -> None:
    """They survive JSON, and torch.save with weights_only; 30% of 50,000 samples are 8 KB, and the reasons."""
    rng = np.random.default_rng(0)
    indices = np.flatnonzero(rng.random(50_000) < 0.3).tolist()
    failures = failed(50_000, indices)
    state = failures.state_dict()
    text = json.dumps(state)
    assert len(state["samples"]) < 9_000
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for read in (json.loads(text), torch.load(file, weights_only=True)):
        other = Failures(50_000)
        other.load_state_dict(read)
        assert list(other) == indices
        assert other.state_dict() == state


def test_loading_adds_to_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    """Both lists together, each sample once, the first reason kept; nothing is logged, and no limit raised yet."""
    state = failed(9000, [1, 5000, 8999]).state_dict()
    failures = Failures(9000, limit=3)
    failures.report(5000, "here")
    failures.report(7, "here")
    caplog.clear()
    for _ in range(2):
        failures.load_state_dict(state)
        assert dict(failures) == {1: "reason 1", 7: "here", 5000: "here", 8999: "reason 8999"}
    assert np.count_nonzero(failures._table().reasons["index"]) == 4
    assert not logged(caplog)
    with pytest.raises(TooManyFailures, match="4 samples failed, max_failures allows 3"):
        failures.report(7, "again")


def packed(*pages: int, bit: int = 0, behind: bytes = b"") -> str:
    """The text of a state in which one sample of each of these pages failed."""
    marks = np.packbits(np.arange(4096) == bit).tobytes()
    content = np.array(pages, "<i8").tobytes() + marks * len(pages) + behind
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    "state",
    [
        None,
        7,
        [],
        {},
        "samples",
        {"samples": packed(0)},
        {"samples": packed(0), "reasons": None},
        {"samples": packed(0), "reasons": [1]},
        {"samples": packed(0), "reasons": [["1", "text"]]},
        {"samples": packed(0), "reasons": [[1, 2]]},
        {"samples": packed(0), "reasons": [[True, "text"]]},
        {"samples": None, "reasons": []},
        {"samples": "%%%", "reasons": []},
        {"samples": "ä", "reasons": []},
        {"samples": base64.b64encode(b"no zlib").decode(), "reasons": []},
        {"samples": base64.b64encode(zlib.compress(bytes(520))[:-3]).decode(), "reasons": []},
        {"samples": base64.b64encode(zlib.compress(bytes(1 << 20))).decode(), "reasons": []},
        {"samples": packed(0, behind=b"x"), "reasons": []},
        {"samples": packed(3), "reasons": []},
        {"samples": packed(-1), "reasons": []},
        {"samples": packed(1 << 52), "reasons": []},
        {"samples": packed(1, 0), "reasons": []},
        {"samples": packed(1, 1), "reasons": []},
        {"samples": packed(2, bit=4000), "reasons": []},
    ],
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    """With nothing taken over from it; a state is from a file."""
    failures = Failures(12_000)
    with pytest.raises(
        ValueError, match="list of failed samples is damaged, or of a dataset that has not 12000 samples"
    ):
        failures.load_state_dict(state)
    assert not failures
    failures.load_state_dict({"samples": packed(0, 2), "reasons": [[0, "why"], [3, "which did not fail"], [-1, ""]]})
    assert dict(failures) == {0: "why", 8192: LOST}


def test_states_of_several_datasets_fit_or_are_refused() -> None:
    """As many as there are datasets, each of its own; none at all where a state says nothing of failures."""
    one, two = failed(10, [1]), failed(9000, [8000])
    for state in (None, {}, {"order": {}}, {"failures": [one.state_dict(), two.state_dict()]}):
        check_states([one, two], state)
    for states in (None, 3, [], [one.state_dict()], {"0": 1}):
        with pytest.raises(ValueError, match="this loader has 2 that note theirs"):
            check_states([one, two], {"failures": states})
    with pytest.raises(ValueError, match="has not 10 samples"):
        check_states([one, two], {"failures": [two.state_dict(), one.state_dict()]})


# --- ranks


def test_one_rank_is_all_ranks() -> None:
    """Without a process group the failures across ranks are those of this process."""
    assert failed(10, [3, 1]).across_ranks() == {1: "reason 1", 3: "reason 3"}


def test_ranks_tell_each_other(tmp_path: Path) -> None:
    """Two real ranks, some of whose failures are the same: both get the union, and each keeps its own."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    union = {"1": "reason 1", "2": "reason 2", "8000": "reason 8000"}
    assert found == [[union, [1, 2]], [union, [2, 8000]]]


def _rank(rank: int, folder: Path) -> None:
    where = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    failures = failed(9000, [[1, 2], [2, 8000]][rank])
    union = failures.across_ranks()
    (folder / f"{rank}.json").write_text(json.dumps([union, list(failures)]))
    torch.distributed.destroy_process_group()
