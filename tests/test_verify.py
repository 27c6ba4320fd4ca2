"""`verify` finds what is damaged, names it, and nothing else: one flipped byte at every kind of place."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from edits import edited
from PIL import Image

import fastload
from fastload import record
from fastload.errors import StoreFormatError
from fastload.record import Field
from fastload.recut import recut
from fastload.store import ColumnSpec
from fastload.store_writer import StoreWriter
from fastload.verify import Damage, VerifyReport, verify

NAME_5 = "bee/1.jpg"


def flipped(store: Path, copy: Path, within: bytes, offset: int) -> Path:
    """A copy of a store with one bit flipped at `offset` of the bytes `within`, wherever these are in the file."""
    data = bytearray(store.read_bytes())
    place = data.find(within)
    assert place >= 0
    while place >= 0:  # a page that was freed may hold an older copy
        data[place + offset] ^= 1
        place = data.find(within, place + 1)
    copy.write_bytes(data)
    return copy


def only(report: VerifyReport) -> Damage:
    """The one thing that a report lists."""
    assert len(report.damaged) == 1, report.damaged
    return report.damaged[0]


def jpeg(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def build(path: Path, images: Sequence[Field], **wrong: Any) -> Path:
    """A store by hand, whose columns say of each image what is so, except where `wrong` says otherwise."""
    columns = {
        "label": ColumnSpec.of("<i8"),
        "size": ColumnSpec.of("<u4", (2,)),
        "bytes": ColumnSpec.of("<u8"),
        "checksum": ColumnSpec.of("<u8"),
    }
    with StoreWriter(path, columns, "by hand") as writer:
        for label, image in enumerate(images):
            row = {"label": label, "size": (image.height, image.width), "bytes": len(image.payload)}
            row |= {"checksum": record.checksum(image.payload)} | wrong
            writer.add([image, Field(record.TEXT, f"{label}.jpg".encode())], row)
            writer.advance()
        fields = [{"name": "image", "kind": "image", "in": "record"}, {"name": "name", "kind": "text", "in": "record"}]
        about = {"classes": None, "source": "list", "options": {}, "created": "now", "fastload": "0"}
        writer.finish({"fields": fields, **about})
    return path


@pytest.mark.parametrize("decode_images", [False, True])
def test_a_whole_store_has_no_damage(store_path: Path, raw_store_path: Path, decode_images: bool) -> None:
    """Records and columns as they were packed: every sample checked, nothing listed."""
    assert verify(store_path, decode_images=decode_images) == VerifyReport(12, ())
    assert verify(raw_store_path, decode_images=decode_images, workers=1) == VerifyReport(40, ())


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_damaged_image_is_listed(store_path: Path, tmp_path: Path, place: str) -> None:
    """One bit of a payload differs: that sample is listed, and no other."""
    payload = bytes(fastload.Store(store_path)[5]["image"].payload)
    offset = {"first": 0, "middle": len(payload) // 2, "last": len(payload) - 1}[place]
    report = verify(flipped(store_path, tmp_path / "damaged.lmdb", payload, offset))
    assert report.samples == 12
    assert only(report).index == 5
    assert "checksum mismatch" in only(report).reason


def test_a_damaged_image_is_listed_by_name(store_path: Path, tmp_path: Path) -> None:
    """Where the image is damaged its name is still legible, and says which file to fetch again."""
    payload = bytes(fastload.Store(store_path)[5]["image"].payload)
    assert only(verify(flipped(store_path, tmp_path / "damaged.lmdb", payload, 50))).name == NAME_5


@pytest.mark.parametrize("offset", [0, 4, 8, 16 + 1, 16 + 4, 16 + 16, 16 + 24, 16 + 40])
def test_a_damaged_head_is_listed(store_path: Path, tmp_path: Path, offset: int) -> None:
    """Magic, field count, head checksum and everything in the directory are covered: that sample alone is listed."""
    sample = fastload.Store(store_path)[5]
    whole = record.build([sample["image"], sample["name"]])
    report = verify(flipped(store_path, tmp_path / "damaged.lmdb", whole, offset))
    assert report.samples == 12
    assert only(report).index == 5
    assert "record" in only(report).reason


def test_a_damaged_name_is_listed(store_path: Path, tmp_path: Path) -> None:
    """The name is a field like the image, with a checksum of its own; what is not legible isn't shown."""
    sample = fastload.Store(store_path)[5]
    whole = record.build([sample["image"], sample["name"]])
    report = verify(flipped(store_path, tmp_path / "damaged.lmdb", whole, len(whole) - 1))
    assert (only(report).index, only(report).name) == (5, "")


@pytest.mark.parametrize("column", ["label", "bytes"])
def test_a_damaged_column_is_listed(store_path: Path, tmp_path: Path, column: str) -> None:
    """Labels and lengths are held against the manifest's checksums; the samples themselves are whole."""
    values = np.asarray(fastload.Store(store_path).columns[column]).tobytes()
    damage = only(verify(flipped(store_path, tmp_path / "damaged.lmdb", values, 40)))
    assert (damage.index, damage.name) == (None, column)
    assert repr(column) in damage.reason
    assert "checksum mismatch" in damage.reason


@pytest.mark.parametrize(("column", "row_bytes"), [("size", 8), ("checksum", 8)])
def test_a_damaged_column_that_contradicts_a_record(
    store_path: Path, tmp_path: Path, column: str, row_bytes: int
) -> None:
    """Sizes and checksums are also held against the records: the column is listed, and the sample it is wrong about."""
    values = np.asarray(fastload.Store(store_path).columns[column]).tobytes()
    report = verify(flipped(store_path, tmp_path / "damaged.lmdb", values, 5 * row_bytes))
    assert [(damage.index, damage.name) for damage in report.damaged] == [(None, column), (5, NAME_5)]


def test_damage_in_several_places_is_listed_in_order(store_path: Path, tmp_path: Path) -> None:
    """Columns first, then samples by index, however many threads looked."""
    store = fastload.Store(store_path)
    path = flipped(store_path, tmp_path / "a.lmdb", np.asarray(store.columns["label"]).tobytes(), 0)
    for index in (9, 2, 11):
        path = flipped(path, tmp_path / f"{index}.lmdb", bytes(store[index]["image"].payload), 99)
    for workers in (1, 4):
        assert [damage.index for damage in verify(path, workers=workers).damaged] == [None, 2, 9, 11]


def test_a_damaged_row_of_a_raw_column(raw_store_path: Path, tmp_path: Path) -> None:
    """Raw images of one shape have a checksum each: the sample is listed, not the column."""
    store = fastload.Store(raw_store_path)
    pixels = store.columns["image"][17].tobytes()
    damage = only(verify(flipped(raw_store_path, tmp_path / "damaged.lmdb", pixels, 300)))
    assert (damage.index, damage.name) == (17, store[17].name)
    assert "pixels" in damage.reason


def test_a_damaged_record_beside_a_raw_column(raw_store_path: Path, tmp_path: Path) -> None:
    """The names of raw images are records, and are checked too."""
    sample = fastload.Store(raw_store_path)[17]
    whole = record.build([sample["name"]])
    assert only(verify(flipped(raw_store_path, tmp_path / "damaged.lmdb", whole, 8))).index == 17


def test_a_column_that_is_cut_short_is_listed(store_path: Path, tmp_path: Path) -> None:
    """A chunk of which the manifest expects other rows than there are is damage of the column, not an exception."""
    shutil.copy(store_path, tmp_path / "damaged.lmdb")
    with edited(tmp_path / "damaged.lmdb") as transaction:
        manifest = json.loads(transaction.get(b"manifest"))
        manifest["columns"]["label"]["rows_per_chunk"] = 5
        transaction.put(b"manifest", json.dumps(manifest).encode())
    damage = only(verify(tmp_path / "damaged.lmdb"))
    assert (damage.index, damage.name) == (None, "label")
    assert "cut short" in damage.reason


def test_only_decoding_finds_what_was_packed_damaged(tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """Bytes with a right checksum that are no image pass without `decode_images`, and are listed with it."""
    good = jpeg(make_picture(20, 30))
    images = [Field(record.JPEG, data, 1, 3, 0, 30, 20) for data in (good, good[: len(good) // 2], good)]
    images.append(Field(record.ENCODED, b"no image", 1, 3, 0, 30, 20))
    images.append(Field(record.RAW, b"short", 1, 3, 0, 30, 20))
    path = build(tmp_path / "db.lmdb", images)
    assert verify(path).damaged == ()
    report = verify(path, decode_images=True)
    assert [(damage.index, damage.name) for damage in report.damaged] == [(1, "1.jpg"), (3, "3.jpg"), (4, "4.jpg")]


@pytest.fixture(scope="module")
def tiled() -> Field:
    """A re-cut JPEG with several tiles in a row."""
    cut = recut(jpeg(picture(150, 300)))
    return Field(record.JPEG, cut.data, 1, 3, 0, 300, 150, cut.tiles)


@pytest.mark.parametrize("decode_images", [False, True])
def test_tiles_as_they_were_cut_are_no_damage(tiled: Field, tmp_path: Path, decode_images: bool) -> None:
    """A tile index is verified with its image, and what is whole isn't listed."""
    assert verify(build(tmp_path / "db.lmdb", [tiled]), decode_images=decode_images) == VerifyReport(1, ())


@pytest.mark.parametrize("place", [0, 9, 17, -1])
def test_a_damaged_tile_index_is_listed(tiled: Field, tmp_path: Path, place: int) -> None:
    """It belongs to the record's head, whose checksum covers it: no decoding is needed to find that."""
    index = bytes(tiled.tiles)
    store = flipped(build(tmp_path / "db.lmdb", [tiled]), tmp_path / "damaged.lmdb", index, place % len(index))
    damage = only(verify(store))
    assert damage.index == 0
    assert "head was altered" in damage.reason


def test_decoding_finds_tiles_that_show_another_picture(tiled: Field, tmp_path: Path) -> None:
    """An index whose checksums are right and whose contents are wrong: decoded whole the image is as it should be."""
    index = bytes(tiled.tiles)
    lead_in = index[:-1] + bytes([index[-1] ^ 0x08])
    missing = index[: len(index) // 2]
    path = build(tmp_path / "db.lmdb", [tiled, tiled._replace(tiles=lead_in), tiled._replace(tiles=missing), tiled])
    assert verify(path).damaged == ()
    damaged = verify(path, decode_images=True).damaged
    assert [damage.index for damage in damaged] == [1, 2]
    assert "tiles decode to other pixels" in damaged[0].reason
    assert "tile index" in damaged[1].reason


def test_an_image_that_belongs_elsewhere_is_listed(tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """A record that is whole in itself, at another record's place, is found by the checksum column."""
    image = Field(record.JPEG, jpeg(make_picture(20, 30)), 1, 3, 0, 30, 20)
    damage = only(verify(build(tmp_path / "db.lmdb", [image], checksum=1)))
    assert (damage.index, damage.name) == (0, "0.jpg")
    assert "not the one that was packed" in damage.reason


def test_a_size_that_contradicts_the_record_is_listed(tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """The size column is of upright images: turned by 90 degrees, width and height change places."""
    data = jpeg(make_picture(20, 30))
    upright, turned = (Field(record.JPEG, data, orientation, 3, 0, 30, 20) for orientation in (1, 6))
    assert only(verify(build(tmp_path / "a.lmdb", [upright], size=(30, 20)))).index == 0
    assert verify(build(tmp_path / "b.lmdb", [turned], size=(30, 20))).damaged == ()
    assert only(verify(build(tmp_path / "c.lmdb", [turned], size=(20, 30)))).index == 0


def test_progress_counts_every_sample(store_path: Path) -> None:
    """Called once for each sample, in order, with the number of all."""
    calls: list[tuple[int, int]] = []
    verify(store_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def test_what_is_no_store_is_refused(store_path: Path, tmp_path: Path) -> None:
    """A missing file, a foreign one and one that is cut short are errors, not lists of damage."""
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "missing.lmdb")
    for name, data in {"foreign": b"no store", "cut": store_path.read_bytes()[:30_000]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StoreFormatError):
            verify(tmp_path / name)
