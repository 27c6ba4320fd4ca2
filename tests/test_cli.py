"""The command line: exit status, JSON on standard output, words on standard error, interruption, terminals, pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edits import seal
from mounts import small_disk
from PIL import Image

import fastload
from fastload import printing, record
from fastload.cli import main
from fastload.store import ColumnSpec, Store
from fastload.store_writer import StoreWriter

Run = Callable[..., "Outcome"]

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
LAUNCH = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from fastload.cli import main; sys.exit(main())"
)
"""What the `fastload` script does; a test runner in the background would hand down an ignored SIGINT."""


class Outcome:
    """What a run of `fastload` gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        """The one JSON value on standard output; an error if there is anything else."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `fastload` with these arguments in this process; a traceback in its words is never right."""

    def run(*arguments: str | os.PathLike[str]) -> Outcome:
        capsys.readouterr()
        try:
            status = main([os.fspath(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own
            status = int(exit.code or 0)
        outcome = Outcome(status, *capsys.readouterr())
        assert "Traceback" not in outcome.out + outcome.err
        return outcome

    return run


def start(*arguments: str | os.PathLike[str], **options: Any) -> subprocess.Popen[str]:
    """A process of its own, with buffered output as everywhere outside of tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", LAUNCH, *map(os.fspath, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


def altered(store: Path, copy: Path, old: bytes, new: bytes) -> Path:
    """A copy of a store with some bytes replaced, wherever they are."""
    data = store.read_bytes()
    assert old in data
    assert len(old) == len(new)
    copy.write_bytes(data.replace(old, new))
    return copy


def damaged_copy(store: Path, copy: Path, index: int) -> Path:
    """A copy of a store with a byte in the middle of an image's payload flipped."""
    payload = bytes(fastload.Store(store)[index]["image"].payload)
    middle = len(payload) // 2
    return altered(store, copy, payload, payload[:middle] + bytes([payload[middle] ^ 255]) + payload[middle + 1 :])


@pytest.fixture
def folder(tmp_path: Path, class_folders: Path) -> Path:
    """A copy of the class folders that a test may spoil."""
    shutil.copytree(class_folders, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def hostile_store(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """A store whose name, reason and manifest carry terminal escapes; its one image's checksum is wrong."""
    path = tmp_path_factory.mktemp("hostile") / "evil.lmdb"
    data = (class_folders / "ant" / "0.jpg").read_bytes()
    columns = {
        "label": ColumnSpec.of("<i8"),
        "size": ColumnSpec.of("<u4", (2,)),
        "bytes": ColumnSpec.of("<u8"),
        "checksum": ColumnSpec.of("<u8"),
    }
    fields = [{"name": "image", "kind": "image", "in": "record"}, {"name": "name", "kind": "text", "in": "record"}]
    with StoreWriter(path, columns, "hostile") as writer:
        sample = [record.Field(record.JPEG, data, 1, 3, 0, 80, 60), record.Field(record.TEXT, b"\x1b[31mred\n\xff.jpg")]
        writer.add(sample, {"label": 0, "size": (60, 80), "bytes": len(data), "checksum": 1})
        writer.advance()
        writer.leave_out("\x1b]0;title\x07.jpg", "it is \x1b[2J bad")
        writer.advance()
        about = {"classes": ["a"], "source": "folders", "options": {}, "created": "\x1b[31mred", "fastload": "0"}
        writer.finish({"fields": fields, **about})
    return path


# ---- pack


def test_pack_says_what_it_packed(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """A whole pack is status 0, one line on standard output and silence on standard error."""
    outcome = run("pack", class_folders, tmp_path / "db.lmdb")
    assert outcome.status == 0
    assert re.fullmatch(r".*db\.lmdb: 12 samples, 3 classes, .*\n", outcome.out)
    assert outcome.err == ""
    assert len(fastload.Store(tmp_path / "db.lmdb")) == 12


def test_pack_gives_its_figures_as_json(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """`--json` has the five figures and no others, as numbers, and they are true."""
    figures = run("pack", class_folders, tmp_path / "db.lmdb", "--json").json
    assert set(figures) == {"samples", "classes", "quarantined", "bytes", "seconds"}
    assert (figures["samples"], figures["classes"], figures["quarantined"]) == (12, 3, 0)
    assert figures["bytes"] == (tmp_path / "db.lmdb").stat().st_size
    assert figures["seconds"] > 0


def test_pack_with_files_left_out_is_status_3(run: Run, folder: Path, tmp_path: Path) -> None:
    """Bad files are counted, the others packed, and the message names the command that lists them."""
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "bee" / "empty.jpg").touch()
    (folder / "readme.md").write_text("no class")
    store = tmp_path / "db.lmdb"
    outcome = run("pack", folder, store, "--json")
    assert outcome.status == 3
    assert (outcome.json["samples"], outcome.json["quarantined"]) == (12, 2)
    assert f"fastload info --quarantine {store}" in outcome.err
    assert "'readme.md'" in outcome.err
    listed = run("info", "--quarantine", store)
    assert listed.status == 0
    assert [line.split("\t")[0] for line in listed.out.splitlines()] == ["ant/notes.txt", "bee/empty.jpg"]
    assert "0 bytes" in listed.out
    as_json = run("info", store, "--quarantine", "--json").json
    assert [entry["name"] for entry in as_json] == ["ant/notes.txt", "bee/empty.jpg"]
    assert all(entry["reason"] for entry in as_json)


def test_pack_twice_needs_overwrite(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """An existing store is never replaced unasked; --overwrite puts the new one in its place."""
    store = tmp_path / "db.lmdb"
    assert run("pack", class_folders / "ant", store).status == 0
    before = store.read_bytes()
    again = run("pack", class_folders, store)
    assert again.status == 2
    assert str(store) in again.err
    assert "--overwrite" in again.err
    assert again.out == ""
    assert store.read_bytes() == before
    assert run("pack", class_folders, store, "--overwrite").status == 0
    assert len(fastload.Store(store)) == 12


def test_a_failed_overwrite_leaves_the_old_store(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """Nothing to pack is no reason to lose what is there."""
    store, junk = tmp_path / "db.lmdb", tmp_path / "junk" / "a"
    junk.mkdir(parents=True)
    (junk / "x.txt").write_text("no image")
    run("pack", class_folders, store)
    assert run("pack", junk.parent, store, "--overwrite").status == 2
    assert len(fastload.Store(store)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db.lmdb", "junk"]


def test_pack_options_reach_the_packer(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """Sides, encodings, EXIF, limits, formats and roots given on the command line make the store that they ask for."""
    small, raw, jpeg = (tmp_path / f"{name}.lmdb" for name in ("small", "raw", "jpeg"))
    run("pack", class_folders, small, "--short-side", "32", "--workers", "1", "--exif", "ignore")
    assert np.asarray(fastload.Store(small).columns["size"]).min(axis=1).tolist() == [32] * 12
    assert fastload.Store(small).manifest["options"]["exif"] == "ignore"
    run("pack", class_folders, raw, "--encode", "raw", "--max-side", "20")
    assert fastload.Store(raw)[0]["image"].codec == record.RAW
    assert np.asarray(fastload.Store(raw).columns["size"]).max() == 20
    outcome = run("pack", class_folders, jpeg, "--quality", "30", "--max-pixels", "5000", "--format", "flat")
    assert outcome.status == 3
    assert fastload.Store(jpeg)[0]["image"].flags & record.REENCODED
    assert fastload.Store(jpeg).manifest["source"] == "flat"
    run("pack", class_folders, tmp_path / "plain.lmdb", "--no-tiles")
    run("pack", class_folders, tmp_path / "stripped.lmdb", "--strip")
    chosen = [fastload.Store(tmp_path / f"{name}.lmdb").manifest["options"] for name in ("plain", "stripped", "raw")]
    assert [(options["tiles"], options["strip"]) for options in chosen] == [(False, False), (True, True), (True, False)]
    (tmp_path / "list.txt").write_text("0.jpg 7\n")
    assert run("pack", tmp_path / "list.txt", tmp_path / "l.lmdb", "--root", class_folders / "bee").status == 0
    assert fastload.Store(tmp_path / "l.lmdb").columns["label"][0] == 7


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pack {tmp}/missing {tmp}/x.lmdb", ["{tmp}/missing", "no such file or folder", "give a folder"]),
        ("pack {tmp}/empty {tmp}/x.lmdb", ["{tmp}/empty", "give a folder of images"]),
        ("pack {tmp}/junk {tmp}/x.lmdb", ["none of the 1 files", "'a/x.txt'", "not an image"]),
        ("pack {tmp}/junk/a {tmp}/x.lmdb", ["{tmp}/junk/a", "give a folder of images"]),
        ("pack {images} {tmp}/no/x.lmdb", ["{tmp}/no", "does not exist", "make it first"]),
        ("pack {images} {tmp}/empty", ["{tmp}/empty", "is a folder", "db.lmdb"]),
        ("pack {images} {tmp}/x.lmdb --quality 101", ["quality is 101", "1 to 100"]),
        ("pack {images} {tmp}/x.lmdb --quality 0", ["quality is 0", "1 to 100"]),
        ("pack {images} {tmp}/x.lmdb --short-side 0", ["short_side is 0", "at least 1"]),
        ("pack {images} {tmp}/x.lmdb --encode raw --quality 9", ["quality goes with JPEG"]),
        ("pack {images} {tmp}/x.lmdb --no-tiles --strip", ["strip goes with tiles"]),
        ("pack {images} {tmp}/x.lmdb --workers 0", ["workers is 0", "at least 1"]),
        ("pack {images} {tmp}/x.lmdb --format list", ["is a folder", "leave the format out"]),
        ("info {tmp}/missing.lmdb", ["missing.lmdb", "no such file", "fastload pack"]),
        ("info {images}", ["is a folder", "fastload pack"]),
        ("info {tmp}/junk/a/x.txt", ["x.txt", "not a fastload store", "fastload pack"]),
        ("info {tmp}/zero.lmdb", ["zero.lmdb", "not a fastload store"]),
        ("info {tmp}/cut.lmdb", ["cut.lmdb", "cut short", "copy it again"]),
        ("verify {tmp}/cut.lmdb", ["cut.lmdb", "cut short"]),
        ("unpack {tmp}/cut.lmdb {tmp}/new", ["cut.lmdb", "cut short"]),
        ("bench {tmp}/cut.lmdb", ["cut.lmdb", "cut short"]),
        ("tune {tmp}/cut.lmdb", ["cut.lmdb", "cut short"]),
        ("info {tmp}/newer.lmdb", ["newer.lmdb", "version 9", "pip install -U fastload"]),
        ("unpack {store} {tmp}/junk", ["{tmp}/junk", "not an empty folder", "choose another"]),
        ("unpack {store} {tmp}/zero.lmdb", ["zero.lmdb", "not an empty folder"]),
        ("unpack {store} {tmp}/new --format tar", ["{tmp}/new", "end it in .tar"]),
        ("unpack {store} {tmp}/new.tar --format tar --shard-size 0", ["shard_size is 0", "at least 1"]),
        ("unpack {store} {tmp}/new --shard-size 5", ["shard_size is 5", "goes with tar"]),
        ("bench {store} --batch-size 0", ["batch size is 0", "at least 1"]),
        ("tune {store} --batch-size -3", ["batch size is -3", "at least 1"]),
        ("bench {store} --size 0", ["size is 0", "at least 1"]),
        ("bench {store} --workers -1", ["num_workers", "non-negative"]),
        ("bench {store} --cache 5XB", ["'5XB'", "4GB"]),
        ("bench {store} --consumer simulated --workers 1", ["'simulated'", "step_ms"]),
        ("bench {store} --consumer network --step-ms 5 --workers 1", ["'network'", "step_ms"]),
        ("bench {store} --step-ms -5 --workers 1 --seconds 0.01", ["step", "-5"]),
        ("", ["COMMAND"]),
        ("fly", ["invalid choice: 'fly'"]),
        ("pack", ["SRC", "DST"]),
        ("pack {images} {tmp}/x.lmdb --encode webp", ["--encode", "'webp'", "keep"]),
        ("bench {store} --consumer gpu", ["--consumer", "'gpu'", "network"]),
        ("bench {store} --batch-size many", ["--batch-size", "'many'"]),
    ],
)
def test_wrong_input_is_status_2_and_a_helpful_message(
    run: Run, class_folders: Path, store_path: Path, tmp_path: Path, arguments: str, words: list[str]
) -> None:
    """The message names what is wrong and says what would be right; standard output stays empty, nothing is left."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk" / "a").mkdir(parents=True)
    (tmp_path / "junk" / "a" / "x.txt").write_text("no image")
    (tmp_path / "zero.lmdb").touch()
    (tmp_path / "cut.lmdb").write_bytes(store_path.read_bytes()[:20_000])
    seal(altered(store_path, tmp_path / "newer.lmdb", b'"format_version": 1,', b'"format_version": 9,'))
    there = sorted(tmp_path.rglob("*"))
    names = {"tmp": tmp_path, "images": class_folders, "store": store_path}
    outcome = run(*(word.format(**names) for word in arguments.split()))
    assert outcome.status == 2
    assert outcome.out == ""
    for word in words:
        assert str(Path(word.format(**names))) in outcome.err if word.startswith("{") else word in outcome.err
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(run: Run, store_path: Path) -> None:
    """`--device cuda` without CUDA says so, and how to go on without it."""
    outcome = run("bench", store_path, "--device", "cuda", "--workers", "1", "--seconds", "0.05")
    assert outcome.status in (1, 2)
    assert "'cuda'" in outcome.err
    assert "nvidia-smi" in outcome.err
    assert outcome.out == ""


def test_pictures_of_different_sizes_are_an_error_in_words(run: Run, store_path: Path) -> None:
    """`--transform none` on such a store says what to do, and doesn't show the worker's traceback."""
    outcome = run(
        "bench", store_path, "--transform", "none", "--workers", "1", "--batch-size", "8", "--seconds", "0.05"
    )
    assert outcome.status in (1, 2)
    assert "different shapes" in outcome.err


@pytest.mark.timeout(10)
def test_verify_refuses_a_negative_number_of_workers(run: Run, store_path: Path) -> None:
    """`verify --workers -1` is refused, as `pack` refuses it, instead of waiting for no thread at all."""
    outcome = run("verify", store_path, "--workers", "-1")
    assert outcome.status == 2
    assert "-1" in outcome.err


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("command", "seconds"), [("bench", "nan"), ("tune", "-1")])
def test_a_length_of_time_that_is_none_is_refused(run: Run, raw_store_path: Path, command: str, seconds: str) -> None:
    """Measuring for nan seconds would never end, for -1 there is nothing to measure."""
    outcome = run(command, raw_store_path, "--transform", "none", "--seconds", seconds)
    assert outcome.status == 2
    assert seconds in outcome.err


# ---- info, verify, unpack


def test_info_tells_what_is_in_a_store(run: Run, store_path: Path) -> None:
    """The table has counts, sizes and a histogram; `--json` the same as one value."""
    outcome = run("info", store_path)
    assert outcome.status == 0
    for words in ("12, ", "3, 12 samples with a label", "4 to 4, median 4", "shorter side, pixels", "█"):
        assert words in outcome.out
    facts = run("info", store_path, "--json").json
    assert (facts["samples"], facts["classes"], facts["quarantined"]) == (12, 3, 0)
    assert facts["digest"] in outcome.out


def test_info_tells_what_became_of_the_images(run: Run, tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """Re-cut ones first, then the reasons of the others, by number; as JSON the same counts."""
    (tmp_path / "images").mkdir()
    for number, side in enumerate((120, 30, 31, 32)):
        Image.fromarray(make_picture(side, 130)).save(tmp_path / "images" / f"{number}.jpg")
    Image.fromarray(make_picture(30, 40)).save(tmp_path / "images" / "4.png")
    run("pack", tmp_path / "images", tmp_path / "db.lmdb")
    line = r"^ tiles +1 re-cut, 3 smaller than a few tiles, 1 no JPEG that libjpeg-turbo decodes to RGB *$"
    assert re.search(line, run("info", tmp_path / "db.lmdb").out, re.MULTILINE)
    counts = run("info", tmp_path / "db.lmdb", "--json").json["tiles"]
    no_jpeg = "no JPEG that libjpeg-turbo decodes to RGB"
    assert counts == {"re-cut": 1, "smaller than a few tiles": 3, no_jpeg: 1}
    run("pack", tmp_path / "images", tmp_path / "plain.lmdb", "--no-tiles")
    assert re.search(r"^ tiles +4 --no-tiles, 1 no JPEG ", run("info", tmp_path / "plain.lmdb").out, re.MULTILINE)


def test_info_says_nothing_of_tiles_where_a_store_does_not(run: Run, hostile_store: Path) -> None:
    """A store without that column."""
    outcome = run("info", hostile_store)
    assert outcome.status == 0
    assert not re.search(r"^ *tiles\b", outcome.out, re.MULTILINE)
    assert run("info", hostile_store, "--json").json["tiles"] == {}


def test_info_prints_on_a_stream_that_is_not_unicode(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirected to a file on Windows, output is cp1252: what that lacks is replaced, not an error."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["info", str(store_path)]) == 0
    stream.flush()
    assert b"shorter side" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_info_without_anything_left_out(run: Run, store_path: Path) -> None:
    """An empty quarantine list is no output, and an empty JSON list."""
    assert run("info", "--quarantine", store_path).out == ""
    assert run("info", "--quarantine", store_path, "--json").json == []


def test_verify_of_a_whole_store_is_status_0(run: Run, store_path: Path) -> None:
    """Nothing damaged: one line in words, an empty list in JSON; --decode finds nothing more."""
    outcome = run("verify", store_path, "--decode", "--workers", "2")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"{store_path}: 12 samples checked, 0 damaged\n"
    assert run("verify", store_path, "--json").json == {"samples": 12, "damaged": []}


def test_verify_of_a_damaged_store_is_status_1(run: Run, store_path: Path, tmp_path: Path) -> None:
    """The damaged sample is listed by index and reason, in words and in JSON."""
    damaged = damaged_copy(store_path, tmp_path / "damaged.lmdb", 5)
    outcome = run("verify", damaged)
    assert outcome.status == 1
    first, last = outcome.out.splitlines()
    assert first.startswith("sample 5 ")
    assert "checksum mismatch" in first
    assert last == f"{damaged}: 12 samples checked, 1 damaged"
    as_json = run("verify", damaged, "--json")
    assert as_json.status == 1
    assert [entry["index"] for entry in as_json.json["damaged"]] == [5]


def test_a_full_disk_is_said_with_the_picture(run: Run, store_path: Path, tmp_path: Path) -> None:
    """Status 1, and half a picture isn't left."""
    with small_disk(tmp_path / "disk", 1):
        (tmp_path / "disk" / "other").write_bytes(bytes((1 << 20) - 8192))
        outcome = run("show", store_path, "-o", tmp_path / "disk" / "sheet.png")
        assert outcome.status == 1
        assert f"No space left on device: '{tmp_path / 'disk' / 'sheet.png'}'" in outcome.err
        assert not (tmp_path / "disk" / "sheet.png").exists()


def test_max_pixels_holds_for_whatever_reads_a_store(run: Run, store_path: Path, tmp_path: Path) -> None:
    """Larger images than a stranger's store should have are not decoded, and are named; also when it is packed."""
    limit, more = ("--max-pixels", "5000"), "pixels are more than the limit of 5000; max_pixels= (--max-pixels) raises"
    large = int((np.asarray(Store(store_path).columns["size"]).astype(int).prod(axis=1) > 5000).sum())
    count = len(Store(store_path))
    assert 0 < large < count
    outcome = run("verify", store_path, *limit)
    assert (outcome.status, outcome.out.count(more)) == (1, large)
    outcome = run("unpack", store_path, tmp_path / "out", *limit)
    assert (outcome.status, len([*(tmp_path / "out").rglob("*.jpg")])) == (1, count - large)
    assert f"{large} of {count} samples are damaged" in outcome.err
    assert more in outcome.err
    outcome = run("info", "--stats", "--json", store_path, *limit)
    assert json.loads(outcome.out)["stats"]["failures"] == large
    outcome = run("show", store_path, "-o", tmp_path / "a.png", "--failures", *limit)
    assert (outcome.status, outcome.out) == (0, f"{tmp_path / 'a.png'}: {large} of {large} samples\n")
    outcome = run("pack", store_path, tmp_path / "new.lmdb", *limit)
    assert (outcome.status, len(Store(tmp_path / "new.lmdb"))) == (3, count - large)
    assert run("info", "--quarantine", tmp_path / "new.lmdb").out.count("more than the limit of 5000") == large


def test_verify_names_a_damaged_column(run: Run, store_path: Path, tmp_path: Path) -> None:
    """A column is listed as one, since no sample's index goes with it."""
    labels = np.asarray(fastload.Store(store_path).columns["label"]).tobytes()
    damaged = altered(store_path, tmp_path / "damaged.lmdb", labels, labels[:-8] + bytes(8))
    outcome = run("verify", damaged)
    assert outcome.status == 1
    assert outcome.out.startswith("column label: ")


def test_unpack_gives_the_files_back(run: Run, class_folders: Path, tmp_path: Path) -> None:
    """Every file of the source is there again, byte for byte where it was packed so."""
    run("pack", class_folders, tmp_path / "db.lmdb", "--no-tiles")
    outcome = run("unpack", tmp_path / "db.lmdb", tmp_path / "new" / "folder")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"{tmp_path / 'new' / 'folder'}: 12 samples\n"
    for file in class_folders.rglob("*.jpg"):
        assert (tmp_path / "new" / "folder" / file.relative_to(class_folders)).read_bytes() == file.read_bytes()


def test_unpack_writes_shards(run: Run, store_path: Path, tmp_path: Path) -> None:
    """One tar file, or several, which are named."""
    outcome = run("unpack", store_path, tmp_path / "out.tar", "--format", "tar")
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{tmp_path / 'out.tar'}: 12 samples\n", "")
    outcome = run("unpack", store_path, tmp_path / "s" / "o.tar", "--format", "tar", "--shard-size", "5")
    assert outcome.out == f"{tmp_path / 's' / 'o-000000.tar'} to o-000002.tar: 12 samples\n"
    names = [*(f"o-00000{number}.tar" for number in range(3)), "o.classes.txt"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == names


def test_unpack_of_a_damaged_store_is_status_1(run: Run, store_path: Path, tmp_path: Path) -> None:
    """The message names the sample and says that bytes differ; all others are there."""
    outcome = run("unpack", damaged_copy(store_path, tmp_path / "damaged.lmdb", 5), tmp_path / "new")
    assert outcome.status == 1
    assert "1 of 12 samples are damaged" in outcome.err
    assert "sample 5" in outcome.err
    assert "checksum mismatch" in outcome.err
    assert sum(path.is_file() for path in (tmp_path / "new").rglob("*")) == 11


# ---- bench, tune, doctor


BENCH_KEYS = {"samples_per_second", "stall_fraction", "cpu_percent", "accelerator_busy", "gpu_utilization"}


def test_bench_gives_its_figures_as_json(run: Run, store_path: Path) -> None:
    """All the figures of the contract are there; without a consumer nothing keeps an accelerator busy."""
    outcome = run(
        "bench", store_path, "--batch-size", "4", "--workers", "1", "--seconds", "0.1", "--json", "--size", "32"
    )
    assert (outcome.status, outcome.err) == (0, "")
    figures = outcome.json
    assert set(figures) >= BENCH_KEYS | {"workers", "batch_size", "samples", "batches", "seconds"}
    assert (figures["workers"], figures["batch_size"]) == (1, 4)
    assert figures["samples"] == 4 * figures["batches"] > 0
    assert 0 <= figures["stall_fraction"] <= 1
    assert figures["accelerator_busy"] is None
    if not torch.cuda.is_available():
        assert figures["gpu_utilization"] is None


def test_bench_against_a_simulated_accelerator(run: Run, store_path: Path) -> None:
    """--step-ms alone chooses the simulated consumer, whose busy share is reported."""
    arguments = ("--batch-size", "4", "--workers", "1", "--seconds", "0.1", "--size", "32", "--cache", "10MB")
    figures = run("bench", store_path, "--step-ms", "5", *arguments, "--transform", "eval", "--json").json
    assert 0 < figures["accelerator_busy"] <= 1


def test_bench_against_a_network_draws_a_plot(run: Run, store_path: Path, tmp_path: Path) -> None:
    """--consumer network trains; --plot writes a PNG and names it after the table, which has a row for each figure."""
    arguments = ("--batch-size", "4", "--workers", "1", "--seconds", "0.1", "--size", "32", "--device", "cpu")
    outcome = run("bench", store_path, "--consumer", "network", *arguments, "--plot", tmp_path / "out.png")
    assert outcome.status == 0
    assert all(key.replace("_", " ") in outcome.out for key in BENCH_KEYS)
    assert outcome.out.splitlines()[-1] == str(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert (image.format, *image.size) == ("PNG", 1080, 720)


def test_bench_chooses_the_workers_itself(run: Run, raw_store_path: Path) -> None:
    """Without --workers their number is measured, and is within the cores that there are."""
    outcome = run("bench", raw_store_path, "--transform", "none", "--seconds", "0.05", "--json")
    assert 1 <= outcome.json["workers"] <= (os.cpu_count() or 1)


def test_tune_measures_and_recommends(run: Run, raw_store_path: Path) -> None:
    """A row for each number of threads, and one of them recommended, in JSON and as a table."""
    arguments = ("tune", raw_store_path, "--transform", "none", "--batch-size", "8", "--seconds", "0.05")
    outcome = run(*arguments, "--json")
    assert outcome.status == 0
    rates = outcome.json["rates"]
    assert rates[0]["workers"] == 1
    assert all(set(rate) == {"workers", "samples_per_second", "cpu_percent"} for rate in rates)
    assert outcome.json["num_workers"] in [rate["workers"] for rate in rates]
    table = run(*arguments, "--pace", "1").out
    assert "samples/s" in table
    assert [line.split()[0] for line in table.splitlines() if "num_workers" in line] == ["1"]


def test_doctor_lists_findings_as_json(run: Run) -> None:
    """Each finding has a name, a value, a status and an advice; the status of the command follows theirs."""
    outcome = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in outcome.json}
    assert all(set(finding) == {"name", "value", "status", "advice"} for finding in outcome.json)
    assert findings["torch"]["value"] == torch.__version__
    assert outcome.status == any(finding["status"] == "missing" for finding in findings.values())
    table = run("doctor")
    assert table.status == outcome.status
    assert torch.__version__ in table.out


def test_version_and_help(run: Run) -> None:
    """`--version` tells it, and the help of every command says what each option is for."""
    from importlib.metadata import version

    assert run("--version").out == f"fastload {version('fastload')}\n"
    commands = re.search(r"COMMAND\n(.*?)\n\n", run("--help").out, re.DOTALL)
    assert commands is not None
    names = re.findall(r"^    (\w+)", commands[1], re.MULTILINE)
    assert names == ["pack", "info", "verify", "show", "unpack", "bench", "tune", "doctor", "memory"]
    for name in names:
        outcome = run(name, "--help")
        assert outcome.status == 0
        assert outcome.out.startswith(f"usage: fastload {name}")


# ---- what is printed


def test_control_characters_in_names_are_escaped(run: Run, hostile_store: Path) -> None:
    """Names and reasons from a store reach a terminal without their escapes, line breaks and stray bytes."""
    quarantine = run("info", "--quarantine", hostile_store).out
    assert quarantine == "\\x1b]0;title\\x07.jpg\tit is \\x1b[2J bad\n"
    verify = run("verify", hostile_store).out
    assert verify.startswith("sample 0 \\x1b[31mred\\n\\udcff.jpg: ")
    assert "\x1b" not in verify


def test_control_characters_in_a_manifest_are_escaped(run: Run, hostile_store: Path) -> None:
    """What a stranger's store says of itself can't steer the terminal either."""
    assert "\x1b" not in run("info", hostile_store).out


def test_control_characters_in_a_list_are_escaped(run: Run, tmp_path: Path) -> None:
    """Names that a list makes up are shown, not obeyed."""
    (tmp_path / "list.txt").write_text("\x1b[31mred.jpg 1\n")
    outcome = run("pack", tmp_path / "list.txt", tmp_path / "x.lmdb")
    assert outcome.status == 2
    assert "\x1b" not in outcome.err


def test_progress_is_plain_lines_where_there_is_no_terminal(
    run: Run, class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piped to a log, progress is a line now and then on standard error, without escapes or carriage returns."""
    monkeypatch.setattr(printing, "_PLAIN_SECONDS", 1e-6)
    outcome = run("pack", class_folders, tmp_path / "db.lmdb", "--json")
    lines = outcome.err.splitlines()
    assert lines
    assert all(re.fullmatch(r"fastload: packing: \d+ of 12(, \d+/s, \d+ s left)?", line) for line in lines)
    assert lines[-1].endswith("s left")
    assert outcome.json["samples"] == 12


@posix
def test_progress_is_a_bar_on_a_terminal(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a pseudo-terminal a bar is drawn, up to the last image, and standard output has the result alone."""
    import pty

    controller, terminal = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
            while data := os.read(controller, 65536):
                seen.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as context:
        context.setattr(sys, "stderr", stream)
        status = main(["pack", str(class_folders), str(tmp_path / "db.lmdb"), "--json"])
    reader.join()
    os.close(controller)
    drawn = b"".join(seen).decode()
    assert status == 0
    assert "packing" in drawn
    assert "12/12" in drawn
    assert "━" in drawn
    assert "\x1b[" in drawn
    assert json.loads(capsys.readouterr().out)["samples"] == 12


@posix
def test_output_into_a_closed_pipe_is_no_traceback(store_path: Path) -> None:
    """`fastload info DB --json | head -0`: whoever reads has gone, and nobody is told about a broken pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    with start("info", store_path, "--json", stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate()
    assert err == ""
    assert process.returncode in (1, 128 + signal.SIGPIPE, -signal.SIGPIPE)


# ---- interruption


@posix
def test_ctrl_c_leaves_a_partial_store_that_the_next_run_completes(
    tmp_path: Path, make_picture: Callable[..., Any]
) -> None:
    """SIGINT in the middle of a pack: words instead of a traceback, no store under the final name, and no damage."""
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    Image.fromarray(make_picture(600, 600)).save(images / "000.jpg")
    for i in range(1, 300):
        os.link(images / "000.jpg", images / f"{i:03}.jpg")
    store, partial = tmp_path / "db.lmdb", tmp_path / "db.lmdb.partial"
    arguments = ("pack", images.parent, store, "--encode", "jpeg", "--quality", "50")
    with start(*arguments, "--workers", "1", stdout=subprocess.PIPE) as process:
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("fastload: interrupted")
    assert "Traceback" not in err
    assert "run again" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db.lmdb.partial", "images"]
    assert main([str(argument) for argument in arguments]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db.lmdb", "images"]
    assert main(["verify", str(store)]) == 0
    assert len(fastload.Store(store)) == 300


# ---- show


@pytest.fixture(scope="module")
def masks_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with masks of the classes 0 and 1, 0 and 2, 0 and 255; 2 is called `dog`."""
    root = tmp_path_factory.mktemp("masks")
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i, value in enumerate((1, 2, 255)):
        image = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 10:40] = value
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    (root / "labels.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    fastload.pack(root, root / "db.lmdb", format="pairs", labels=root / "labels.txt")
    return root / "db.lmdb"


def drawn(store: Path, tmp_path: Path, run: Run, *options: str) -> tuple[int, int, int]:
    """(samples drawn, samples found, pictures in a row) of `show` with these options."""
    outcome = run("show", store, "-o", tmp_path / "sheet.png", *options)
    assert (outcome.status, outcome.err) == (0, "")
    found = re.fullmatch(r".*sheet\.png: (\d+) of (\d+) samples?\n", outcome.out)
    assert found is not None
    with Image.open(tmp_path / "sheet.png") as sheet:
        return int(found[1]), int(found[2]), (sheet.width - 8) // 168


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", (12, 12, 8)),
        ("--count 5", (5, 12, 5)),
        ("--columns 3", (12, 12, 3)),
        ("--columns 0", (12, 12, 1)),
        ("--index 0,5,10-11", (4, 4, 4)),
        ("--index 3-3", (1, 1, 1)),
        ("--class bee", (4, 4, 4)),
        ("--class 1", (4, 4, 4)),
        ("--class bee --index 0-5", (2, 2, 2)),
        ("--class bee --count 3", (3, 4, 3)),
        ("--transform none", (12, 12, 8)),
        ("--transform train --index 0-1", (2, 2, 4)),
        ("--transform eval --size 32 --index 2", (1, 1, 2)),
        ("--transform train --columns 5", (12, 12, 4)),
    ],
)
def test_show_draws_what_was_asked_for(
    run: Run, store_path: Path, tmp_path: Path, options: str, expected: tuple[int, int, int]
) -> None:
    """Status 0, one line that counts, a PNG file; a transform doubles the pictures, not the samples."""
    assert drawn(store_path, tmp_path, run, *options.split()) == expected


@pytest.mark.parametrize(
    ("of_class", "count"), [("cat", 1), ("2", 1), ("dog", 1), ("255", 1), ("0", 3), ("_background_", 3)]
)
def test_show_finds_classes_in_masks(run: Run, masks_store: Path, tmp_path: Path, of_class: str, count: int) -> None:
    """By name, by number, and 255, which has no name."""
    assert drawn(masks_store, tmp_path, run, "--class", of_class)[:2] == (count, count)


def test_show_goes_around_a_damaged_mask(run: Run, masks_store: Path, tmp_path: Path) -> None:
    """What it shows nobody knows: it is in no class; it is a failure; the others are found as ever."""
    payload = bytes(fastload.Store(masks_store)[1]["mask"].payload)
    data, middle = masks_store.read_bytes(), len(payload) // 2
    assert data.count(payload) == 1
    wrong = payload[:middle] + bytes([payload[middle] ^ 255]) + payload[middle + 1 :]
    (tmp_path / "db.lmdb").write_bytes(data.replace(payload, wrong))
    assert drawn(tmp_path / "db.lmdb", tmp_path, run)[0] == 3
    assert drawn(tmp_path / "db.lmdb", tmp_path, run, "--class", "cat")[0] == 1
    assert drawn(tmp_path / "db.lmdb", tmp_path, run, "--failures")[0] == 1
    assert run("show", tmp_path / "db.lmdb", "-o", tmp_path / "x.png", "--class", "dog").status == 2


def test_show_draws_failures(run: Run, store_path: Path, tmp_path: Path) -> None:
    """Only damaged samples, crossed out; none at all is status 2, and no picture is left."""
    damaged = damaged_copy(store_path, tmp_path / "damaged.lmdb", 7)
    assert drawn(damaged, tmp_path, run, "--failures") == (1, 1, 1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((12, 12)) == (200, 0, 0)
    assert drawn(damaged, tmp_path, run, "--failures", "--transform", "train") == (1, 1, 2)
    assert drawn(damaged, tmp_path, run) == (12, 12, 8)
    outcome = run("show", store_path, "-o", tmp_path / "none.png", "--failures")
    assert (outcome.status, outcome.out) == (2, "")
    assert "nothing is drawn" in outcome.err
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{store}", ["-o/--output"]),
        ("{store} -o {tmp}/no/x.png", ["{tmp}/no", "does not exist", "make it first"]),
        ("{store} -o {tmp}/x.xyz", ["{tmp}/x.xyz", ".png"]),
        ("{store} -o {tmp}/x", ["{tmp}/x", ".png"]),
        ("{store} -o {tmp}", ["{tmp}", ".png"]),
        ("{tmp}/missing.lmdb -o {tmp}/x.png", ["missing.lmdb", "no such file", "fastload pack"]),
        ("{images} -o {tmp}/x.png", ["is a folder", "fastload pack"]),
        ("{images}/ant/0.jpg -o {tmp}/x.png", ["0.jpg", "not a fastload store"]),
        ("{store} -o {tmp}/x.png --class zebra", ["'zebra'", "ant, bee, cat"]),
        ("{store} -o {tmp}/x.png --class 7", ["no such samples"]),
        ("{store} -o {tmp}/x.png --class 0.5", ["'0.5'"]),
        ("{store} -o {tmp}/x.png --index 12", ["no sample 12", "has 12"]),
        ("{store} -o {tmp}/x.png --index 3,x", ["--index", "'3,x'", "0,5,10-19"]),
        ("{store} -o {tmp}/x.png --index -1", ["--index", "'-1'", "0,5,10-19"]),
        ("{store} -o {tmp}/x.png --index 5-2", ["--index", "'5-2'", "0,5,10-19"]),
        ("{store} -o {tmp}/x.png --index 0-2000000", ["--index", "0,5,10-19"]),
        ("{store} -o {tmp}/x.png --index 0-99999999999999999999", ["--index", "0,5,10-19"]),
        ("{store} -o {tmp}/x.png --count 0", ["count is 0"]),
        ("{store} -o {tmp}/x.png --transform train --size 0", ["size is 0"]),
        ("{store} -o {tmp}/x.png --transform random", ["--transform", "'random'"]),
    ],
)
def test_show_says_what_is_wrong(
    run: Run, store_path: Path, class_folders: Path, tmp_path: Path, arguments: str, words: list[str]
) -> None:
    """Status 2, words, no output, no picture."""
    names = {"tmp": tmp_path, "images": class_folders, "store": store_path}
    outcome = run("show", *(word.format(**names) for word in arguments.split()))
    assert (outcome.status, outcome.out) == (2, "")
    for word in words:
        assert word.format(**names) in outcome.err
    assert list(tmp_path.iterdir()) == []


@posix
def test_show_of_names_that_no_font_has(run: Run, tmp_path: Path, class_folders: Path) -> None:
    """Classes that are called with a line break, an escape sequence or stray bytes are drawn, and named in errors."""
    for name in ("two\nlines", "\x1b[31mred", os.fsdecode(b"stray\xff"), "日本"):
        (tmp_path / "images" / name).mkdir(parents=True)
        shutil.copy(class_folders / "ant" / "0.jpg", tmp_path / "images" / name)
    run("pack", tmp_path / "images", tmp_path / "db.lmdb")
    assert drawn(tmp_path / "db.lmdb", tmp_path, run) == (4, 4, 4)
    assert drawn(tmp_path / "db.lmdb", tmp_path, run, "--class", "two\nlines")[0] == 1
    outcome = run("show", tmp_path / "db.lmdb", "-o", tmp_path / "x.png", "--class", "x")
    assert outcome.status == 2
    assert "\x1b" not in outcome.err


def test_the_module_is_the_command(store_path: Path, tmp_path: Path) -> None:
    """`python -m fastload` ends with the command's exit status."""
    damaged = damaged_copy(store_path, tmp_path / "damaged.lmdb", 5)
    for path, status in ((store_path, 0), (damaged, 1)):
        done = subprocess.run([sys.executable, "-m", "fastload", "verify", path], capture_output=True, check=False)
        assert (done.returncode, b"12 samples" in done.stdout) == (status, True)
