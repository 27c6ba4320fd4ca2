"""Options, the images, their store, and what is printed and written at the end."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
import pictures
from contest import Contest, Results

Pack = Callable[..., Path]
"""Packs a folder, `tiles=False` with its files' own bytes, and says where the store is."""

_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastload")
    group.addoption("--images", type=Path, help="class folders of JPEGs; by default 400 photograph-like ones are made")
    group.addoption(
        "--photos", type=Path, help="a folder of large photographs; without it, what asks for them is skipped"
    )
    group.addoption("--rounds", type=int, help="turns for each contender, instead of each benchmark's own number")
    group.addoption("--record", type=Path, help="write everything that was measured to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = Results()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not results.benchmarks:
        return
    terminalreporter.section("fastload")
    for line in results.lines():
        terminalreporter.write_line(line)
    record = config.getoption("--record")
    if record is not None:
        results.write(record)
        terminalreporter.write_line(f"\nwritten to {record}")


@pytest.fixture(scope="session")
def workspace() -> Iterator[Path]:
    """A folder for stores and pictures, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def images(pytestconfig: pytest.Config, workspace: Path) -> Path:
    """Class folders of JPEGs."""
    folder = pytestconfig.getoption("--images")
    given = folder is not None
    if not given:
        folder = workspace / "images"
        pictures.make_folder(folder, 400)
    source = "a folder given by --images" if given else "generated"
    pytestconfig.stash[_RESULTS].images = {"source": source, **_facts(folder)}
    return Path(folder)


@pytest.fixture(scope="session")
def photos(pytestconfig: pytest.Config) -> Path:
    """A folder of large photographs."""
    folder = pytestconfig.getoption("--photos")
    if folder is None:
        pytest.skip("no folder of photographs is given by --photos")
    pytestconfig.stash[_RESULTS].photos = _facts(folder)
    return Path(folder)


@pytest.fixture(params=["images", "photos"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The images, then the photographs."""
    path: Path = request.getfixturevalue(request.param)
    return path


def _facts(folder: Path) -> dict[str, int]:
    sizes = [file.stat().st_size for file in pictures.files(folder)]
    return {"count": len(sizes), "median_bytes": int(np.median(sizes))}


@pytest.fixture(scope="session")
def packed(workspace: Path) -> Pack:
    """Packs a folder, once with tiles and once without."""
    numbers = itertools.count()

    @functools.cache
    def pack(folder: Path, tiles: bool = True) -> Path:
        path = workspace / f"{next(numbers)}.lmdb"
        report = fastload.pack(folder, path, tiles=tiles)
        assert not report.quarantined, "some images can't be packed: contenders would differ in what they read"
        return path

    return pack


@pytest.fixture(scope="session")
def store(images: Path, packed: Pack) -> Path:
    """The images, packed as by default: re-cut into tiles."""
    return packed(images)


@pytest.fixture(scope="session")
def kept(images: Path, packed: Pack) -> Path:
    """The images, packed with their own bytes."""
    return packed(images, tiles=False)


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Contest:
    """This benchmark's contest. Its question is the benchmark's docstring."""
    name = request.node.name.removeprefix("bench_")
    question = " ".join((request.function.__doc__ or "").split())
    results = request.config.stash[_RESULTS]
    return Contest(name, question, benchmark, results, request.config.getoption("--rounds"))
