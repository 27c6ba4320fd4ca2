"""What `tools/fuzz` does, without a fuzzer: files that broke a parser once, and files with something wrong in them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import TARGETS, Target, accepts
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
LIBRARIES = {"parquet": "pyarrow", "dicom": "pydicom"}


@functools.cache
def seeds(name: str) -> list[bytes]:
    """The files that a target begins with."""
    pytest.importorskip(LIBRARIES.get(name, "fastload"))
    return list(TARGETS[name].seeds())


@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_are_read(name: str) -> None:
    """A fuzzer that begins with files that are refused gets nowhere."""
    assert [accepts(name, seed) for seed in seeds(name)] == [True] * len(seeds(name))


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_broke_a_parser_is_refused_or_read(file: Path) -> None:
    """Each of these files was a finding once."""
    seeds(file.parent.name)
    accepts(file.parent.name, file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, (1 << 32) - 1))
def test_damaged_files_are_refused_or_read(name: str, seed: int) -> None:
    """With one of fastload's errors, and nothing else, in bytes that are changed anywhere."""
    random = np.random.default_rng(seed)
    files = seeds(name)
    first, other = (files[random.integers(len(files))] for _ in range(2))
    accepts(name, TARGETS[name].damaged(random, first, other))


def test_any_other_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but fastload's own errors counts as a refusal."""

    def run(data: bytes) -> None:
        raise ValueError(data)

    monkeypatch.setitem(TARGETS, "record", Target(run, list))
    with pytest.raises(ValueError, match="x"):
        accepts("record", b"x")
