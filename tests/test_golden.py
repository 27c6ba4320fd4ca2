"""Stores of format version 1, as they were packed once: every later fastload reads them, with the same pixels."""

from __future__ import annotations

import gzip
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload import Store
from fastload.verify import verify

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.lmdb.gz"))
make = runpy.run_path(str(Path(__file__).parent / "golden" / "make.py"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name.removesuffix(".lmdb.gz"))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A store, and what must come out of it."""
    packed: Path = request.param
    path = tmp_path / "db.lmdb"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path, json.loads(packed.with_name(packed.name.removesuffix(".lmdb.gz") + ".json").read_text())


def test_there_are_golden_stores_of_every_kind() -> None:
    """One for each function that makes one."""
    assert [path.name for path in GOLDEN] == sorted(f"v1-{function.__name__}.lmdb.gz" for function in make["STORES"])


def test_it_is_read_as_ever(golden: tuple[Path, dict[str, Any]]) -> None:
    """All samples, names and classes, what was left out, and the digest; every checksum holds."""
    path, expected = golden
    assert make["contents"](path) == expected
    assert verify(path, decode_images=True).damaged == ()


@pytest.mark.parametrize("kind", make["STORES"], ids=lambda function: function.__name__)
def test_packing_the_same_elsewhere_makes_the_same_store(
    kind: Callable[[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, by another number of threads: the same contents and manifest, and no path of this machine."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    manifests, made = [], []
    for name, workers in (("here", 1), ("there", 3)):
        (tmp_path / name).mkdir()
        options = kind(tmp_path / name)
        fastload.pack(**options, destination=tmp_path / f"{name}.lmdb", workers=None if "kinds" in options else workers)
        manifests.append(Store(tmp_path / f"{name}.lmdb").manifest)
        made.append(make["contents"](tmp_path / f"{name}.lmdb"))
        assert str(tmp_path).encode() not in (tmp_path / f"{name}.lmdb").read_bytes()
    assert made[0] == made[1]
    assert {**manifests[0], "packed": ""} == {**manifests[1], "packed": ""}  # which knows when files were changed
