"""Shared fixtures: real image files made on the fly, stores packed from them, and the rule for GPU tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import fastload

Pixels = npt.NDArray[np.uint8]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA, unless FASTLOAD_REQUIRE_CUDA=1 asks for them: then they fail."""
    if torch.cuda.is_available() or os.environ.get("FASTLOAD_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device; FASTLOAD_REQUIRE_CUDA=1 makes this a failure"))


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """A photograph-like uint8 RGB image: smooth colours with some detail, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noise = rng.integers(-8, 9, (height, width, 3), dtype=np.int16)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def make_picture() -> Callable[..., Pixels]:
    """The function `picture(height, width, seed)`."""
    return picture


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders (ant, bee, cat) with four JPEGs each, of various sizes, samplings and orientations."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir()
        for i in range(4):
            image = Image.fromarray(picture(60 + 9 * i, 80 + 7 * label, seed=10 * label + i))
            exif = Image.Exif()
            exif[0x0112] = 1 + (5 * i) % 8
            image.save(root / name / f"{i}.jpg", quality=90, subsampling=i % 3, progressive=i == 3, exif=exif)
    return root


@pytest.fixture(scope="session")
def store_path(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store packed from `class_folders`, bytes kept."""
    path = tmp_path_factory.mktemp("stores") / "kept.lmdb"
    fastload.pack(class_folders, path)
    return path


@pytest.fixture(scope="session")
def raw_store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of forty raw 16 x 16 images in four classes: one column."""
    root = tmp_path_factory.mktemp("small")
    for label in range(4):
        (root / f"class{label}").mkdir()
        for i in range(10):
            Image.fromarray(picture(16, 16, seed=100 * label + i)).save(root / f"class{label}" / f"{i}.png")
    path = tmp_path_factory.mktemp("stores") / "raw.lmdb"
    fastload.pack(root, path, encode="raw")
    return path
