"""The table of contents behind LMDB's pages, and what `verify=` checks when."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from edits import edited, seal

import fastload
from fastload import DataLoader, ImageDataset, Store, record, toc
from fastload.errors import ChecksumError, ColumnError, DecodeError, FastloadError, StoreFormatError
from fastload.lmdb_pages import Pages
from fastload.store import chunk_key
from fastload.transforms import RandomHorizontalFlip, Resize
from fastload.verify import verify

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows lets no one write to a mapped file")


def parts(data: bytes) -> tuple[bytes, int, dict[str, Any]]:
    """LMDB's pages, where the table begins, and the table."""
    magic, offset, length, _, _ = struct.unpack("<8sQQQQ", data[-40:])
    assert magic == b"FLSTORE1"
    assert offset + length + 40 == len(data)
    return data[:offset], offset, json.loads(data[offset : offset + length])


def test_the_table_is_as_it_is_defined(store_path: Path) -> None:
    """Every value of `meta` with its place and checksum; right behind LMDB's pages."""
    data = store_path.read_bytes()
    _, offset, table = parts(data)
    pages = Pages(memoryview(data))
    assert offset == pages.meta.end
    assert table["transaction"] == pages.meta.transaction
    found = {key.decode(): list(place) for key, place in pages.values(pages.tree(b"meta")).items()}
    assert {key: place[:2] for key, place in table["values"].items()} == found
    for at, length, checksum in table["values"].values():
        assert record.checksum(data[at : at + length]) == checksum
    assert {"manifest", "column/label/00000000", "column/record/00000000"} <= table["values"].keys()


def test_rows_of_a_raw_column_have_their_own_checksums(raw_store_path: Path) -> None:
    """Its chunks are not checked whole: a batch touches them all."""
    _, _, table = parts(raw_store_path.read_bytes())
    assert table["values"]["column/image/00000000"][2] is None
    assert table["values"]["column/label/00000000"][2] is not None


def test_a_table_is_written_again_as_it_was(store_path: Path, tmp_path: Path) -> None:
    """A pack that was killed before the rename ends the file anew: nothing of the first table is left."""
    copy = tmp_path / "db.lmdb"
    shutil.copy(store_path, copy)
    with open(copy, "ab") as file:
        file.write(b"half of a table")
    seal(copy)
    assert copy.read_bytes() == store_path.read_bytes()


def test_every_bit_of_table_and_trailer_counts(store_path: Path, tmp_path: Path) -> None:
    """Any flipped bit there is an error at opening that names the file, as is any missing or added byte."""
    data = store_path.read_bytes()
    pages, offset, _ = parts(data)
    places = [*range(offset, len(data) - 40, 37), *range(len(data) - 40, len(data))]
    copy = tmp_path / "damaged.lmdb"
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        copy.unlink(missing_ok=True)
        copy.write_bytes(damaged)
        with pytest.raises(StoreFormatError, match=r"damaged\.lmdb: "):
            Store(copy)
    for other in (pages, data[:-1], data[:offset] + data[-40:], data + b"\0", data + data[-40:]):
        copy.unlink()
        copy.write_bytes(other)
        with pytest.raises(StoreFormatError, match="cut short"):
            Store(copy)


HOSTILE: list[Any] = [
    None,
    [],
    {},
    {"transaction": 1},
    {"values": {"manifest": [0, 10]}},
    {"values": {"manifest": [0, 10, 0, 0]}},
    {"values": {"manifest": [-1, 10, None]}},
    {"values": {"manifest": [0, 1 << 62, None]}},
    {"values": {"manifest": [1 << 63, 1 << 63, None]}},
    {"values": {"manifest": [0.5, 10, None]}},
    {"values": {"manifest": ["0", 10, None]}},
    {"values": {"manifest": [True, 10, None]}},
    {"values": {"manifest": [0, 10, "x"]}},
    {"values": {"manifest": [0, 10, [[]]]}},
    {"values": [["manifest", 0, 1, 2]]},
]


@pytest.mark.parametrize("table", [*HOSTILE, b"{", b"[" * 100_000, b"\xff"], ids=lambda table: f"{table!r:.50}")
def test_a_stranger_s_table_is_refused(store_path: Path, tmp_path: Path, table: Any) -> None:
    """Tables with right checksums and wrong contents."""
    pages, offset, whole = parts(store_path.read_bytes())
    if isinstance(table, dict):
        table = {"transaction": whole["transaction"], **table}
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    head = struct.pack("<8sQQQ", b"FLSTORE1", offset, len(text), record.checksum(text))
    path = tmp_path / "hostile.lmdb"
    path.write_bytes(pages + text + head + record.checksum(head).to_bytes(8, "little"))
    with pytest.raises(StoreFormatError, match=r"hostile\.lmdb: "):
        Store(path)


def test_a_table_that_leads_elsewhere_gives_no_values_of_others(store_path: Path, tmp_path: Path) -> None:
    """Columns whose chunks are those of another, unchecked: sizes decide, and `verify` knows LMDB's own places."""
    pages, offset, table = parts(store_path.read_bytes())
    values = table["values"]
    values["column/label/00000000"] = [*values["column/checksum/00000000"][:2], None]
    path = tmp_path / "swapped.lmdb"
    path.write_bytes(pages + toc.serialise(values, table["transaction"], offset))
    assert len(np.asarray(Store(path).columns["label"])) == 12
    assert ["other entries than the table" in damage.reason for damage in verify(path).damaged] == [True]


def test_a_store_that_lmdb_changed_says_so(store_path: Path, tmp_path: Path) -> None:
    """LMDB may use pages again whose places are in the table."""
    path = tmp_path / "changed.lmdb"
    shutil.copy(store_path, path)
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=2) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(write=True, db=meta) as transaction:
            transaction.put(b"note", b"by hand")
    with pytest.raises(StoreFormatError, match=r"no table of contents|was changed by another program"):
        Store(path)
    pages, _, table = parts(store_path.read_bytes())
    path = tmp_path / "stale.lmdb"
    path.write_bytes(pages + toc.serialise(table["values"], table["transaction"] - 1, len(pages)))
    with pytest.raises(StoreFormatError, match=r"changed by another program .* \(LMDB's transaction \d+, not \d+\)"):
        Store(path)


def test_lmdb_reads_what_we_packed(store_path: Path) -> None:
    """The file is LMDB's, whatever stands behind its pages."""
    store = Store(store_path)
    with lmdb.open(str(store_path), subdir=False, lock=False, readonly=True, max_dbs=2) as environment:
        samples = environment.open_db(b"samples", create=False)
        with environment.begin(db=samples) as transaction:
            records = [bytes(value) for _, value in transaction.cursor()]
    assert records == [bytes(store.view(i)) for i in range(len(store))]


# ---- columns


def with_a_flip(path: Path, copy: Path, key: str, place: int) -> Path:
    """A copy of a store with a bit of one of the values in `meta` flipped."""
    data = bytearray(path.read_bytes())
    data[parts(bytes(data))[2]["values"][key][0] + place] ^= 1
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("column", ["label", "size", "record"])
@pytest.mark.parametrize("on_error", ["placeholder", "skip", "raise"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_column_ends_the_epoch(
    store_path: Path, tmp_path: Path, column: str, on_error: Any, workers: int
) -> None:
    """No sample is at fault, and all may be wrong: an error that names the column, whatever `on_error` says."""
    path = with_a_flip(store_path, tmp_path / "damaged.lmdb", chunk_key(column, 0), 9)
    loader: Any = DataLoader(ImageDataset(path, Resize((8, 8)), on_error=on_error), 4, num_workers=workers)
    with pytest.raises(ColumnError, match=f"column '{column}' differs from what was packed"):
        list(loader)
    assert (None, column) in [(damage.index, damage.name) for damage in verify(path).damaged]


def test_a_damaged_manifest_is_not_read(store_path: Path, tmp_path: Path) -> None:
    """One bit of it is an error at opening."""
    with pytest.raises(StoreFormatError, match="its manifest differs from what was packed"):
        Store(with_a_flip(store_path, tmp_path / "damaged.lmdb", "manifest", 100))


def test_damaged_trees_are_read_all_the_same_and_verify_knows(store_path: Path, tmp_path: Path) -> None:
    """Zeros instead of every page of LMDB's trees, but for what they hold: all samples come; `verify` says it."""
    data = bytearray(store_path.read_bytes())
    pages = Pages(memoryview(bytes(data)))
    (root, *_) = pages.tree(b"samples")
    data[root * 4096 : root * 4096 + 16] = bytes(16)
    path = tmp_path / "damaged.lmdb"
    path.write_bytes(data)
    expected, found = ImageDataset(store_path), ImageDataset(path, on_error="raise")
    assert all(torch.equal(found[i][0], expected[i][0]) for i in range(12))
    (damage,) = verify(path).damaged
    assert "fastload reads the store without LMDB's trees, other programs can't" in damage.reason


# ---- when what is checked


def test_verify_takes_three_values(store_path: Path) -> None:
    """Others are a ValueError that lists them."""
    with pytest.raises(ValueError, match="verify is 'sometimes'; it may be never, sample, always"):
        Store(store_path, verify="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verify is True"):
        ImageDataset(store_path, verify=True)  # type: ignore[arg-type]


@pytest.fixture
def damaged_raw(raw_store_path: Path, tmp_path: Path) -> Path:
    """A copy of the raw store with one bit of image 3 flipped."""
    row = int(np.prod(Store(raw_store_path).columns["image"].shape))
    return with_a_flip(raw_store_path, tmp_path / "raw.lmdb", "column/image/00000000", 3 * row + 5)


@pytest.mark.parametrize("transform", [None, RandomHorizontalFlip(1.0)], ids=["gathered", "drawn"])
@pytest.mark.parametrize("mode", ["sample", "always"])
def test_damaged_rows_are_found(damaged_raw: Path, mode: Any, transform: Any) -> None:
    """In batches and one by one: a placeholder that is counted, in every epoch; or an error, or another sample."""
    dataset = ImageDataset(damaged_raw, transform, verify=mode)
    for _ in range(2):
        images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))
        assert (labels == -100).nonzero().tolist() == [[3]]
        assert not images[3].any()
        assert images[2].any()
    assert dataset[3][1] == -100
    assert dict(dataset.failures) == {3: "the pixels differ from what was packed (checksum mismatch)"}
    with pytest.raises(DecodeError, match=r"sample 3 \(.*\): the pixels differ"):
        ImageDataset(damaged_raw, transform, verify=mode, on_error="raise")[3]
    other, label = ImageDataset(damaged_raw, transform, verify=mode, on_error="skip")[3]
    assert other.any()
    assert label != -100
    with pytest.raises(ChecksumError):
        dataset.read(3)


def test_never_shows_what_is_there(damaged_raw: Path, raw_store_path: Path) -> None:
    """No checksum is looked at, of rows, records or columns."""
    dataset = ImageDataset(damaged_raw, verify="never")
    assert dataset[3][1] != -100
    assert (dataset[3][0] != ImageDataset(raw_store_path)[3][0]).sum() == 1
    assert len(dataset.failures) == 0


@posix_only
def test_sample_checks_a_row_once_and_always_checks_it_each_time(raw_store_path: Path, tmp_path: Path) -> None:
    """A row that goes bad after it was read is found by "always" alone."""
    path = tmp_path / "raw.lmdb"
    shutil.copy(raw_store_path, path)
    once, each_time = (ImageDataset(path, verify=mode) for mode in ("sample", "always"))
    for dataset in (once, each_time):
        assert len(dataset.__getitems__(range(10))) == 10
    offset, *_ = parts(path.read_bytes())[2]["values"]["column/image/00000000"]
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    assert each_time[0][1] == -100
    assert once[0][1] != -100
    assert once.__getitems__(range(12)).labels.tolist() == ImageDataset(raw_store_path).targets[:12].tolist()


@pytest.mark.parametrize("mode", ["never", "sample", "always"])
def test_structure_is_looked_at_in_every_mode(store_path: Path, tmp_path: Path, mode: Any) -> None:
    """Lengths in a record that don't add up are an error with "never" too; the bytes alone go unchecked."""
    place = Store(store_path).places[5]
    data = bytearray(store_path.read_bytes())
    data[int(place[0]) + 16 + 16] ^= 0xFF  # the payload's length
    path = tmp_path / "damaged.lmdb"
    path.write_bytes(data)
    with pytest.raises(FastloadError, match="do not add up"):
        Store(path, verify=mode).fields(5)
    whole = Store(store_path, verify=mode)
    assert {field.checked for field in whole.fields(5)} == {mode != "never"}


def test_never_decodes_tiles_and_blocks_unchecked(store_path: Path, tmp_path: Path) -> None:
    """A flip in what a crop takes is no error of ours; the decoder may have its own."""
    image = Store(store_path)[0]["image"]
    data = bytearray(store_path.read_bytes())
    at = bytes(data).index(bytes(image.payload))
    data[at + 2 * len(image.payload) // 3] ^= 0x10
    path = tmp_path / "damaged.lmdb"
    path.write_bytes(data)
    assert ImageDataset(path)[0][1] == -100
    shown = ImageDataset(path, verify="never", on_error="raise")
    assert shown[0][1] == ImageDataset(store_path)[0][1]
    assert not torch.equal(shown[0][0], ImageDataset(store_path)[0][0])


def test_places_are_rewritten_by_edits(store_path: Path, tmp_path: Path) -> None:
    """The tests' own forgeries are consistent: `verify` finds nothing wrong with one that changes nothing."""
    path = tmp_path / "db.lmdb"
    shutil.copy(store_path, path)
    with edited(path, b"samples") as transaction:
        key = struct.pack(">Q", 3)
        transaction.put(key, bytes(transaction.get(key)))
    assert verify(path).damaged == ()
    assert fastload.Store(path)[3].name == Store(store_path)[3].name
