"""Failures: each sample counted once, by threads and processes, in one table, against one limit."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import re
import threading
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import TooManyFailures
from fastload.failures import Failures


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastload"]


# --- one process


def test_failures_read_like_a_dict() -> None:
    """Index and reason of each sample that failed, by index; what did not fail is a KeyError."""
    failures = Failures()
    assert isinstance(failures, Mapping)
    assert dict(failures) == {}
    for index, reason in ((7, "damaged"), (0, "cut short"), (1 << 40, "far out")):
        failures.report(index, reason)
    assert dict(failures) == {0: "cut short", 7: "damaged", 1 << 40: "far out"}
    assert list(failures) == [0, 7, 1 << 40]
    assert len(failures) == 3
    assert 7 in failures
    assert 8 not in failures
    with pytest.raises(KeyError):
        failures[8]
    assert repr(failures) == "Failures({0: 'cut short', 7: 'damaged', 1099511627776: 'far out'})"


def test_a_sample_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    """Failing in every epoch is one failure: counted once, logged once, with its first reason."""
    failures = Failures()
    for epoch in range(3):
        failures.report(5, f"reason {epoch}")
    failures.report(6, "another")
    assert dict(failures) == {5: "reason 0", 6: "another"}
    assert logged(caplog) == ["sample 5: reason 0", "sample 6: another"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1 << 48) | st.integers(0, 5)))
def test_the_table_holds_any_set_of_indices(indices: list[int]) -> None:
    """Whatever indices fail, in whatever order and number, exactly these are listed, in order."""
    failures = Failures()
    for index in indices:
        failures.report(index, str(index))
    assert dict(failures) == {index: str(index) for index in sorted(set(indices))}


def test_many_failures_are_all_listed(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of failures, so many that their hashes collide, are all found again."""
    caplog.set_level(logging.CRITICAL, "fastload")
    failures = Failures()
    for index in range(0, 10_000, 2):
        failures.report(index, "bad")
    assert list(failures) == list(range(0, 10_000, 2))
    assert len(failures) == 5000
    assert 9_999 not in failures


# --- the limit


def test_the_limit_is_how_many_may_fail() -> None:
    """The failure after the last allowed one is an error that says how many, which first, and what to do."""
    failures = Failures(limit=2)
    failures.report(4, "damaged")
    failures.report(4, "damaged")
    failures.report(2, "cut short")
    message = (
        "3 samples failed, max_failures allows 2. The first: sample 2: cut short; sample 4: damaged; "
        "sample 9: empty. Run `fastload verify --decode` on the store, or raise max_failures"
    )
    with pytest.raises(TooManyFailures, match=re.escape(message)):
        failures.report(9, "empty")
    with pytest.raises(TooManyFailures, match="3 samples failed"):
        failures.report(4, "damaged")
    assert len(failures) == 3


def test_a_limit_of_zero_allows_none() -> None:
    """The first failure is one too many."""
    with pytest.raises(TooManyFailures, match=r"1 samples? failed, max_failures allows 0"):
        Failures(limit=0).report(0, "damaged")


# --- threads


def test_threads_count_each_sample_once(caplog: pytest.LogCaptureFixture) -> None:
    """Four threads that all report the same two hundred samples give two hundred failures and log lines."""
    failures = Failures()

    def report(offset: int) -> None:
        for index in range(200):
            failures.report((index + 50 * offset) % 200, "bad")

    threads = [threading.Thread(target=report, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(failures) == list(range(200))
    assert len(logged(caplog)) == 200


def test_threads_share_the_limit() -> None:
    """Whichever thread reports the one too many gets the error; no more failures than threads come after it."""
    failures = Failures(limit=10)
    errors: list[str] = []

    def report(offset: int) -> None:
        try:
            for index in range(100):
                failures.report(1000 * offset + index, "bad")
        except TooManyFailures as error:
            errors.append(str(error))

    threads = [threading.Thread(target=report, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert 10 < len(failures) <= 13


# --- processes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_report_into_one_table(method: str) -> None:
    """What two other processes report is counted here, once per sample, and the reasons of this one are kept."""
    failures = Failures()
    failures.report(3, "seen here")
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=failures.report, args=(index, "seen there")) for index in (3, 1 << 33)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert dict(failures) == {3: "seen here", 1 << 33: "failed in a worker process"}
    failures.report(1 << 33, "seen here too")
    assert failures[1 << 33] == "seen here too"
    assert len(failures) == 2


def test_the_limit_counts_all_processes() -> None:
    """A process learns from the table what others found: the third failure is one too many wherever it happens."""
    failures = Failures(limit=2)
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


def test_a_killed_process_blocks_no_other() -> None:
    """A worker that dies in the middle of its reports leaves a table that others can use."""
    failures = Failures()
    process = multiprocessing.get_context("fork").Process(target=_report_forever, args=(failures,))
    process.start()
    while not len(failures):
        assert process.is_alive()
    process.kill()
    process.join()
    before = len(failures)
    failures.report(-1 + (1 << 47), "afterwards")
    assert len(failures) == before + 1


def _report_forever(failures: Failures) -> None:
    logging.disable(logging.CRITICAL)
    while True:
        for index in range(1000):
            failures.report(index, "bad")


def test_pickled_failures_are_a_copy() -> None:
    """A saved dataset keeps its failures and limit, and goes on counting by itself."""
    failures = Failures(limit=3)
    failures.report(8, "damaged")
    other = pickle.loads(pickle.dumps(failures))
    assert list(other) == [8]
    assert other.limit == 3
    other.report(9, "damaged")
    assert list(other) == [8, 9]
    assert list(failures) == [8]
