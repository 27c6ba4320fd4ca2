"""What `info` says of a store, held against the store and its sources."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload import record
from fastload.errors import StoreFormatError
from fastload.info import info
from fastload.store import ColumnSpec
from fastload.store_writer import StoreWriter


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def uneven(tmp_path: Path, make_picture: Callable[..., Any]) -> Path:
    """A store of three classes with 1, 2 and 5 images of known sizes, and one file that was left out."""
    for name, heights in {"a": [30], "b": [40, 50], "c": [60, 70, 80, 90, 300]}.items():
        for height in heights:
            save(tmp_path / "images" / name / f"{height}.png", make_picture(height, 200))
    (tmp_path / "images" / "b" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    return tmp_path / "db.lmdb"


def test_counts_classes_and_sizes(uneven: Path) -> None:
    """Every figure follows from the files that were packed."""
    facts = info(uneven)
    assert (facts["samples"], facts["classes"], facts["labelled"], facts["quarantined"]) == (8, 3, 8, 1)
    assert facts["samples_per_class"] == [1, 2, 5]
    assert facts["size"]["height"] == [30, 65, 300]
    assert facts["size"]["width"] == [200, 200, 200]
    assert facts["size"]["megapixels"] == [0.006, 0.013, 0.06]
    assert facts["bytes"] == uneven.stat().st_size
    files = (uneven.parent / "images").rglob("*.png")
    assert facts["image_bytes"] == sum(file.stat().st_size for file in files if file.name != "bad.png")


def test_the_histogram_of_shorter_sides(uneven: Path) -> None:
    """Ranges halve an octave, follow each other without a gap, begin and end with one that is filled."""
    bins = info(uneven)["shorter_side"]
    assert sum(count for _, _, count in bins) == 8
    assert all(next_low == high + 1 for (_, high, _), (next_low, _, _) in itertools.pairwise(bins))
    assert bins[0][2] > 0
    assert bins[-1][2] > 0
    for low, high, count in bins:
        assert count == sum(low <= side <= high for side in (30, 40, 50, 60, 70, 80, 90, 200))
        assert high / low < 1.5


def test_sides_at_the_edges_of_the_histogram(tmp_path: Path) -> None:
    """The smallest image there is, and one at a range's first pixel, are counted once each."""
    for side in (1, 2, 3, 128):
        save(tmp_path / "images" / f"{side}.png", np.zeros((side, 200, 3), np.uint8))
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    filled = {(low, count) for low, _, count in info(tmp_path / "db.lmdb")["shorter_side"] if count}
    assert filled == {(1, 1), (2, 1), (3, 1), (128, 1)}


def test_the_manifest_shows_through(store_path: Path) -> None:
    """Where a store came from, with which options, and its digest, are the manifest's own words."""
    facts, manifest = info(store_path), fastload.Store(store_path).manifest
    assert facts["path"] == str(store_path)
    for key in ("format_version", "digest", "created", "source", "options"):
        assert facts[key] == manifest[key]
    assert (facts["source"], facts["stored"]) == ("folders", "records")


def test_raw_images_lie_in_a_column(raw_store_path: Path) -> None:
    """A column of forty 16 x 16 images is that many bytes of images."""
    facts = info(raw_store_path)
    assert (facts["stored"], facts["image_bytes"]) == ("column", 40 * 16 * 16 * 3)
    assert facts["shorter_side"] == [(16, 22, 40)]


def test_a_store_without_labels(class_folders: Path, tmp_path: Path) -> None:
    """A flat folder has no classes, no labelled samples, and nothing per class."""
    fastload.pack(class_folders / "ant", tmp_path / "db.lmdb")
    facts = info(tmp_path / "db.lmdb")
    assert (facts["samples"], facts["classes"], facts["labelled"], facts["samples_per_class"]) == (4, 0, 0, None)


def test_a_list_with_numbers_and_several_labels(class_folders: Path, tmp_path: Path) -> None:
    """Distinct labels are the classes; a sample with any label is labelled; each label of it counts."""
    (tmp_path / "list.txt").write_text("0.jpg 7 9\n1.jpg 9\n2.jpg\n3.jpg 9 30\n")
    fastload.pack(tmp_path / "list.txt", tmp_path / "db.lmdb", root=class_folders / "bee")
    facts = info(tmp_path / "db.lmdb")
    assert (facts["classes"], facts["labelled"], facts["samples_per_class"]) == (3, 3, [1, 1, 3])


@pytest.fixture
def mixed(tmp_path: Path, make_picture: Callable[..., Any]) -> Path:
    """A folder of three JPEGs that are large enough for tiles, two that are not, and a PNG."""
    for number, side in enumerate((120, 121, 122, 40, 41)):
        save(tmp_path / "mixed" / f"{number}.jpg", make_picture(side, 130, seed=number))
    save(tmp_path / "mixed" / "5.png", make_picture(120, 130))
    return tmp_path / "mixed"


def test_what_became_of_the_images_is_counted(mixed: Path, tmp_path: Path) -> None:
    """The re-cut ones, and for each reason those that are not."""
    no_jpeg = "no JPEG that libjpeg-turbo decodes to RGB"
    fastload.pack(mixed, tmp_path / "tiled.lmdb")
    assert info(tmp_path / "tiled.lmdb")["tiles"] == {no_jpeg: 1, "re-cut": 3, "smaller than a few tiles": 2}
    fastload.pack(mixed, tmp_path / "plain.lmdb", tiles=False)
    assert info(tmp_path / "plain.lmdb")["tiles"] == {no_jpeg: 1, "--no-tiles": 5}
    fastload.pack(mixed, tmp_path / "raw.lmdb", encode="raw")
    assert info(tmp_path / "raw.lmdb")["tiles"] == {no_jpeg: 6}


def by_hand(path: Path, outcomes: list[int] | None, **about: Any) -> Path:
    """A store of three images with any column `tiles`, or none."""
    columns = {
        name: ColumnSpec.of(dtype) for name, dtype in {"label": "<i8", "bytes": "<u8", "checksum": "<u8"}.items()
    }
    columns["size"] = ColumnSpec.of("<u4", (2,))
    if outcomes is not None:
        columns["tiles"] = ColumnSpec.of("|u1")
    fields = [{"name": "image", "kind": "image", "in": "record"}, {"name": "name", "kind": "text", "in": "record"}]
    with StoreWriter(path, columns, "by hand") as writer:
        for i in range(3):
            row = {"label": 0, "size": (20, 30), "bytes": 5, "checksum": record.checksum(b"image")}
            row |= {} if outcomes is None else {"tiles": outcomes[i]}
            sample = [record.Field(record.JPEG, b"image", 1, 3, 0, 30, 20), record.Field(record.TEXT, b"name")]
            writer.add(sample, row)
            writer.advance()
        writer.finish({"fields": fields, "classes": ["a"], "source": "flat", "options": {}, "created": "now"} | about)
    return path


def test_a_store_of_before_has_no_counts_of_tiles(tmp_path: Path) -> None:
    """It has no such column, and nothing is made up."""
    assert info(by_hand(tmp_path / "old.lmdb", None))["tiles"] == {}


def test_outcomes_are_told_in_the_words_of_the_store(tmp_path: Path) -> None:
    """Not in ours: another version may have others; what the store has no words for is a number."""
    store = by_hand(tmp_path / "newer.lmdb", [1, 9, 1], tiles=["zero", "one"])
    assert info(store)["tiles"] == {"one": 2, "outcome 9": 1}
    assert info(by_hand(tmp_path / "wordless.lmdb", [1, 1, 1]))["tiles"] == {"outcome 1": 3}


def test_the_facts_are_json(store_path: Path, raw_store_path: Path) -> None:
    """Only plain values, so that the command line can print them."""
    for path in (store_path, raw_store_path):
        facts = info(path)
        assert json.loads(json.dumps(facts)) == {**facts, "shorter_side": [list(bin) for bin in facts["shorter_side"]]}


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """A missing file and a foreign one raise what `Store` raises."""
    with pytest.raises(FileNotFoundError):
        info(tmp_path / "missing.lmdb")
    (tmp_path / "text").write_text("no store")
    with pytest.raises(StoreFormatError):
        info(tmp_path / "text")
