"""Packing a store otherwise: `fastload pack OLD.lmdb NEW.lmdb`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastload import ImageDataset, Store, pack, record
from fastload.cli import main
from fastload.errors import SourceError, StoreFormatError
from fastload.info import info


@pytest.fixture
def photos(tmp_path: Path, make_picture: Callable[..., np.ndarray]) -> Path:
    """Two classes with JPEGs that have tiles, a turned one among them, a PNG, and a file that is no image."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 2 else 1
            picture = Image.fromarray(make_picture(160 + 16 * i, 200, seed=9 * label + i))
            picture.save(folder / name / f"{i}.jpg", subsampling=2 * label, progressive=i == 1, exif=exif)
    Image.fromarray(make_picture(70, 90, seed=50)).save(folder / "right" / "png.png")
    (folder / "right" / "text.jpg").write_text("no image")
    return folder


def pictures(path: Path) -> list[torch.Tensor]:
    dataset = ImageDataset(path)
    return [dataset.read(i) for i in range(len(dataset))]


def facts(path: Path) -> list[tuple[str, int]]:
    store = Store(path)
    return [(store.name(i), int(store.columns["label"][i])) for i in range(len(store))]


@pytest.mark.parametrize("first", [False, True])
def test_tiles_come_and_go_without_a_change_of_pixels(photos: Path, tmp_path: Path, first: bool) -> None:
    old, new = tmp_path / "old.lmdb", tmp_path / "new.lmdb"
    pack(photos, old, tiles=first)
    report = pack(old, new, tiles=not first)
    assert (report.samples, report.classes, report.quarantined) == (7, 2, 1)
    assert facts(new) == facts(old)
    assert Store(new).classes == ["left", "right"]
    assert all(torch.equal(a, b) for a, b in zip(pictures(old), pictures(new), strict=True))
    assert info(new)["tiles"].get("re-cut", 0) == (0 if first else 6)
    assert Store(new).quarantine() == Store(old).quarantine()


def test_a_store_without_tiles_gives_the_store_that_its_files_give(photos: Path, tmp_path: Path) -> None:
    for name, source, tiles in (("old", photos, False), ("direct", photos, True), ("new", tmp_path / "old.lmdb", True)):
        pack(source, tmp_path / f"{name}.lmdb", tiles=tiles)
    direct, new = Store(tmp_path / "direct.lmdb"), Store(tmp_path / "new.lmdb")
    assert new.manifest["digest"] == direct.manifest["digest"]
    assert all(bytes(new.view(i)) == bytes(direct.view(i)) for i in range(len(direct)))


def test_smaller_images_are_what_the_files_give(photos: Path, tmp_path: Path) -> None:
    """Without tiles or with, the old store holds the same pixels, and so do the shrunk ones."""
    pack(photos, tmp_path / "old.lmdb")
    pack(photos, tmp_path / "direct.lmdb", short_side=100)
    pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb", short_side=100)
    assert facts(tmp_path / "new.lmdb") == facts(tmp_path / "direct.lmdb")
    direct, new = pictures(tmp_path / "direct.lmdb"), pictures(tmp_path / "new.lmdb")
    assert all(torch.equal(a, b) for a, b in zip(direct, new, strict=True))
    assert max(min(image.shape[1:]) for image in new) == 100


def test_a_raw_column_stays_one(raw_store_path: Path, tmp_path: Path) -> None:
    new, shrunk = tmp_path / "new.lmdb", tmp_path / "shrunk.lmdb"
    pack(raw_store_path, new)
    assert Store(new).manifest["digest"] == Store(raw_store_path).manifest["digest"]
    pack(raw_store_path, shrunk, short_side=8)
    assert Store(shrunk).columns["image"].shape == (8, 8, 3)
    assert facts(shrunk) == facts(raw_store_path)


def test_raw_images_of_many_sizes_stay_raw(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "old.lmdb", encode="raw")
    pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb")
    new = Store(tmp_path / "new.lmdb")
    assert {new[i]["image"].codec for i in range(len(new))} == {record.RAW}
    old = pictures(tmp_path / "old.lmdb")
    assert all(torch.equal(a, b) for a, b in zip(old, pictures(tmp_path / "new.lmdb"), strict=True))


def test_labels_of_a_list_and_its_labels_file_survive(photos: Path, tmp_path: Path) -> None:
    (photos / "list.txt").write_text("left/0.jpg 3 4\nright/1.jpg 7\n")
    pack(photos / "list.txt", tmp_path / "old.lmdb")
    pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb")
    assert Store(tmp_path / "new.lmdb").manifest["source"] == "list"
    assert np.asarray(Store(tmp_path / "new.lmdb").columns["label"]).tolist() == [[3, 4], [7, -1]]


def test_a_damaged_sample_is_left_out(photos: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.lmdb"
    pack(photos, old, tiles=False)
    payload = bytes(Store(old)[3]["image"].payload)
    data = old.read_bytes()
    place = data.index(payload) + len(payload) // 2
    old.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    report = pack(old, tmp_path / "new.lmdb")
    assert (report.samples, report.quarantined) == (6, 2)
    assert Store(tmp_path / "new.lmdb").quarantine()[0]["name"] == "right/0.jpg"
    assert "checksum" in Store(tmp_path / "new.lmdb").quarantine()[0]["reason"]


def test_exif_is_ignored_if_asked_for(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "old.lmdb")
    pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb", exif="ignore")
    assert Store(tmp_path / "old.lmdb").columns["size"][2].tolist() == [200, 192]
    assert Store(tmp_path / "new.lmdb").columns["size"][2].tolist() == [192, 200]


def test_too_many_pixels_are_left_out(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "old.lmdb")
    assert pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb", max_pixels=10_000).samples == 1


def test_a_store_is_not_packed_onto_itself(photos: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.lmdb"
    pack(photos, old)
    before = old.read_bytes()
    with pytest.raises(FileExistsError, match="the source too"):
        pack(old, old, overwrite=True)
    assert old.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_wrong_stores_are_refused(photos: Path, tmp_path: Path) -> None:
    old, cut = tmp_path / "old.lmdb", tmp_path / "cut.lmdb"
    pack(photos, old)
    cut.write_bytes(old.read_bytes()[:-8192])
    with pytest.raises(StoreFormatError, match="cut short"):
        pack(cut, tmp_path / "new.lmdb")
    with pytest.raises(SourceError, match="needs a file that `fastload pack` made"):
        pack(photos, tmp_path / "new.lmdb", format="store")
    with pytest.raises(StoreFormatError, match="not a fastload store"):
        pack(photos / "left" / "0.jpg", tmp_path / "new.lmdb", format="store")
    assert not (tmp_path / "new.lmdb").exists()


def test_the_command_line_does_it(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(photos), str(tmp_path / "old.lmdb"), "--no-tiles"]) == 3
    assert main(["pack", str(tmp_path / "old.lmdb"), str(tmp_path / "new.lmdb")]) == 3
    assert "7 samples, 2 classes" in capsys.readouterr().out


def test_an_interrupted_pack_resumes(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "old.lmdb", tiles=False)

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb", progress=stop)
    assert (tmp_path / "new.lmdb.partial").exists()
    pack(tmp_path / "old.lmdb", tmp_path / "new.lmdb")
    assert facts(tmp_path / "new.lmdb") == facts(tmp_path / "old.lmdb")
    assert len(Store(tmp_path / "new.lmdb")) == 7
