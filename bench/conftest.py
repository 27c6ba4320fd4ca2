"""Options, the images, their store, and what is printed and written at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
import pictures
from contest import Contest, Results

_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastload")
    group.addoption("--images", type=Path, help="class folders of JPEGs; by default 400 photograph-like ones are made")
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
    sizes = [file.stat().st_size for file in folder.glob("*/*")]
    pytestconfig.stash[_RESULTS].images = {
        "source": "a folder given by --images" if given else "generated",
        "count": len(sizes),
        "median_bytes": int(np.median(sizes)),
    }
    return Path(folder)


@pytest.fixture(scope="session")
def store(images: Path, workspace: Path) -> Path:
    """The images, packed with their bytes kept."""
    path = workspace / "kept.lmdb"
    report = fastload.pack(images, path)
    assert not report.quarantined, "some images can't be packed: contenders would differ in what they read"
    return path


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Contest:
    """This benchmark's contest. Its question is the benchmark's docstring."""
    name = request.node.name.removeprefix("bench_")
    question = " ".join((request.function.__doc__ or "").split())
    results = request.config.stash[_RESULTS]
    return Contest(name, question, benchmark, results, request.config.getoption("--rounds"))
