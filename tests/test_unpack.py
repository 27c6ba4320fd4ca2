"""`unpack` gives back what was packed, and writes nowhere else, whatever names a store has."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounts import small_disk
from PIL import Image

import fastload
from fastload import record
from fastload.errors import StoreError
from fastload.record import Field
from fastload.store import ColumnSpec
from fastload.store_writer import StoreWriter
from fastload.tar_shards import read_shards
from fastload.unpack import LABELS, safe_name, unpack

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
windows = pytest.mark.skipif(os.name != "nt", reason="Windows only")
FIELDS = [{"name": "image", "kind": "image", "in": "record"}, {"name": "name", "kind": "text", "in": "record"}]


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name with forward slashes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def image_of(number: int) -> Field:
    """An image that the number can be told from: packed bytes are never looked at by `unpack`."""
    return Field(record.JPEG, b"image %d" % number, 1, 3, 0, 30, 20)


def build(
    path: Path,
    names: Sequence[str],
    images: Sequence[Field] | None = None,
    source: str = "folders",
    classes: Sequence[str] | None = None,
) -> Path:
    """A store by hand, with any names."""
    columns = {
        "label": ColumnSpec.of("<i8"),
        "size": ColumnSpec.of("<u4", (2,)),
        "bytes": ColumnSpec.of("<u8"),
        "checksum": ColumnSpec.of("<u8"),
    }
    with StoreWriter(path, columns, "by hand") as writer:
        for number, name in enumerate(names):
            image = image_of(number) if images is None else images[number]
            row = {"label": number, "size": (20, 30), "bytes": len(image.payload)}
            name_field = Field(record.TEXT, name.encode("utf-8", "surrogateescape"))
            writer.add([image, name_field], row | {"checksum": record.checksum(image.payload)})
            writer.advance()
        writer.finish({"fields": FIELDS, "classes": classes, "source": source, "options": {}, "created": "now"})
    return path


def unpacked(tmp_path: Path, names: Sequence[str], **options: Any) -> dict[str, bytes]:
    """What comes out of a store with these names; an error if anything is written outside of the folder."""
    store = build(tmp_path / "db.lmdb", names, **options)
    folder = tmp_path / "deep" / "er" / "out"
    assert unpack(store, folder) == len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db.lmdb", "deep"]
    assert [path.name for path in (tmp_path / "deep").rglob("*") if out_of(path, folder)] == ["er"]
    return files_below(folder)


def out_of(path: Path, folder: Path) -> bool:
    return path != folder and folder not in path.parents


# ---- what comes back


def test_kept_files_come_back_byte_for_byte(class_folders: Path, tmp_path: Path) -> None:
    """The same names with the same bytes, no file more: class folders tell the labels by themselves."""
    fastload.pack(class_folders, tmp_path / "db.lmdb", tiles=False)
    assert unpack(tmp_path / "db.lmdb", tmp_path / "out") == 12
    assert files_below(tmp_path / "out") == files_below(class_folders)


@pytest.fixture
def photographs(tmp_path: Path, make_picture: Callable[..., Any]) -> Path:
    """JPEGs that are large enough for tiles, with orientations, profiles and comments, one of them progressive."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        tags = Image.Exif()
        tags[0x0112], tags[0x010F] = 1 + 2 * number, "a camera's maker"
        options = {"quality": 80, "exif": tags, "comment": b"number %d" % number, "icc_profile": bytes(500)}
        image = Image.fromarray(make_picture(140, 180, seed=number))
        image.save(tmp_path / "images" / f"{number}.jpg", progressive=number == 2, subsampling=number % 3, **options)
    return tmp_path / "images"


def test_recut_files_come_back_with_their_pixels_and_metadata(photographs: Path, tmp_path: Path) -> None:
    """JPEGs that any program reads: other bytes, but the same picture, EXIF, profile and comment."""
    fastload.pack(photographs, tmp_path / "db.lmdb")
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    before, after = files_below(photographs), files_below(tmp_path / "out")
    assert list(before) == list(after)
    for name, data in before.items():
        assert after[name] != data
        with Image.open(io.BytesIO(data)) as old, Image.open(io.BytesIO(after[name])) as new:
            assert new.format == "JPEG"
            assert dict(new.getexif()) == dict(old.getexif())
            assert (new.info["icc_profile"], new.info["comment"]) == (old.info["icc_profile"], old.info["comment"])
            assert np.array_equal(np.asarray(new), np.asarray(old))


def test_recut_files_pack_again_to_the_same_store(photographs: Path, tmp_path: Path) -> None:
    """Re-cutting what was re-cut changes nothing any more."""
    fastload.pack(photographs, tmp_path / "db.lmdb")
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    fastload.pack(tmp_path / "out", tmp_path / "again.lmdb")
    first, second = (fastload.Store(tmp_path / f"{name}.lmdb") for name in ("db", "again"))
    assert second.manifest["digest"] == first.manifest["digest"]


def test_without_tiles_photographs_come_back_byte_for_byte(photographs: Path, tmp_path: Path) -> None:
    """`tiles=False` is there for whoever needs the very files."""
    fastload.pack(photographs, tmp_path / "db.lmdb", tiles=False)
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(photographs)


def test_stripped_files_come_back_upright(photographs: Path, tmp_path: Path) -> None:
    """Without anything that does not change the picture; the orientation does."""
    fastload.pack(photographs, tmp_path / "db.lmdb", strip=True)
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    for name, data in files_below(photographs).items():
        with Image.open(io.BytesIO(data)) as old, Image.open(tmp_path / "out" / name) as new:
            assert new.getexif().get(0x0112, 1) == old.getexif()[0x0112]
            assert 0x010F not in new.getexif()
            assert np.array_equal(np.asarray(new), np.asarray(old))


def test_other_formats_come_back_byte_for_byte(tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """PNG and BMP are kept like JPEGs, under their own names."""
    (tmp_path / "images").mkdir()
    for suffix in ("png", "bmp", "JPG"):
        Image.fromarray(make_picture(20, 30)).save(tmp_path / "images" / f"x.{suffix}")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "images")


def test_raw_columns_come_back_as_png(raw_store_path: Path, tmp_path: Path) -> None:
    """The pixels are equal, in RGB order, under the names that the files had."""
    unpack(raw_store_path, tmp_path / "out")
    store = fastload.Store(raw_store_path)
    assert len(files_below(tmp_path / "out")) == 40
    for index in range(40):
        with Image.open(tmp_path / "out" / store[index].name) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(image), store.columns["image"][index])


def test_raw_records_come_back_as_png(class_folders: Path, tmp_path: Path) -> None:
    """Raw images of different sizes are records; a JPEG's name gets the suffix of what the file is now."""
    fastload.pack(class_folders, tmp_path / "db.lmdb", encode="raw")
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    dataset = fastload.ImageDataset(tmp_path / "db.lmdb", image_type="numpy")
    assert "bee/1.png" in files_below(tmp_path / "out")
    for index in range(len(dataset)):
        name = PurePosixPath(dataset.store[index].name).with_suffix(".png")
        with Image.open(tmp_path / "out" / name) as image:
            assert np.array_equal(np.asarray(image), dataset[index][0])


def test_reencoded_files_get_the_suffix_of_a_jpeg(tmp_path: Path, make_picture: Callable[..., Any]) -> None:
    """PNGs that were packed with a quality are JPEGs now, and called so; JPEGs keep the spelling of their suffix."""
    for folder, suffix in {"a": "png", "b": "jpeg", "c": "JPG", "d": "jpg"}.items():
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.fromarray(make_picture(20, 30)).save(tmp_path / "images" / folder / f"x.y.{suffix}")
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb", quality=80)
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    files = files_below(tmp_path / "out")
    assert set(files) == {"a/x.y.jpg", "b/x.y.jpeg", "c/x.y.JPG", "d/x.y.jpg"}
    for data in files.values():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"


def test_a_list_packs_again_to_the_same_labels(class_folders: Path, tmp_path: Path) -> None:
    """`labels.tsv` holds several labels per sample, none, and negative ones, and names with spaces and quotes."""
    names = ["plain.jpg", "with space.jpg", "comma,.jpg", "deep/er.jpg", "b.jpg"]
    names += ['quo"te.jpg', "tab\t.jpg", "\udcff.jpg"] if os.name == "posix" and os.uname().sysname == "Linux" else []
    lines = []
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes((class_folders / "ant" / "0.jpg").read_bytes())
        quoted = '"' + name.replace('"', '""') + '"'
        lines.append("\t".join([quoted, *["7", str(-number)][: number % 3]]) + "\n")
    (tmp_path / "in" / "list.txt").write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    fastload.pack(tmp_path / "in" / "list.txt", tmp_path / "a.lmdb")
    unpack(tmp_path / "a.lmdb", tmp_path / "out")
    report = fastload.pack(tmp_path / "out" / LABELS, tmp_path / "b.lmdb")
    assert (report.samples, report.quarantined) == (len(names), 0)
    first, second = fastload.Store(tmp_path / "a.lmdb"), fastload.Store(tmp_path / "b.lmdb")
    assert np.array_equal(np.asarray(first.columns["label"]), np.asarray(second.columns["label"]))
    assert [second[i].name for i in range(len(second))] == [first[i].name for i in range(len(first))] == names


@pytest.mark.parametrize("name", ["#1.jpg", "#/1.jpg", " leading.jpg"])
def test_names_that_a_list_would_misread_pack_again(class_folders: Path, tmp_path: Path, name: str) -> None:
    """A name that begins like a comment or with a space is written so that `pack` finds it."""
    data = (class_folders / "ant" / "0.jpg").read_bytes()
    images = [Field(record.JPEG, data, 1, 3, 0, 80, 60)] * 2
    unpack(build(tmp_path / "a.lmdb", ["first.jpg", name], images, source="list"), tmp_path / "out")
    report = fastload.pack(tmp_path / "out" / LABELS, tmp_path / "b.lmdb")
    assert (report.samples, report.quarantined) == (2, 0)
    assert [fastload.Store(tmp_path / "b.lmdb")[i].name for i in range(2)] == ["first.jpg", name]


def test_folders_pack_again_to_an_equal_store(store_path: Path, tmp_path: Path) -> None:
    """What was kept survives the round trip: images, labels, classes and their order, by the store's digest."""
    unpack(store_path, tmp_path / "out")
    fastload.pack(tmp_path / "out", tmp_path / "again.lmdb")
    assert fastload.Store(tmp_path / "again.lmdb").manifest["digest"] == fastload.Store(store_path).manifest["digest"]


def test_progress_counts_every_file(store_path: Path, tmp_path: Path) -> None:
    """Called once for each sample, in order, with the number of all."""
    calls: list[tuple[int, int]] = []
    unpack(store_path, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


# ---- what is refused


def test_a_target_that_is_not_empty_is_refused(store_path: Path, tmp_path: Path) -> None:
    """A folder with anything in it, hidden files included, and a file: nothing is written, nothing is lost."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            unpack(store_path, tmp_path / name)
    assert files_below(tmp_path) == {"full/.hidden": b"", "file": b""}


def test_an_empty_folder_will_do(store_path: Path, tmp_path: Path) -> None:
    """A target that exists and is empty is used as it is."""
    (tmp_path / "out").mkdir()
    assert unpack(store_path, tmp_path / "out") == 12


@pytest.mark.parametrize("target", ["out", "out.tar"])
def test_a_full_disk_is_said_with_the_file(tmp_path: Path, target: str) -> None:
    """What has a final name is whole: some files of a folder, no shard."""
    source = tmp_path / "images"
    source.mkdir()
    noise = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(noise.integers(0, 256, (200, 300, 3), np.uint8)).save(source / f"{number}.bmp")
    fastload.pack(source, tmp_path / "db.lmdb")
    with small_disk(tmp_path / "disk", 2):
        with pytest.raises(OSError, match=rf"No space left on device.*{target}") as caught:
            unpack(tmp_path / "db.lmdb", tmp_path / "disk" / target, format="tar" if "." in target else "folder")
        assert caught.value.errno == errno.ENOSPC
        left = files_below(tmp_path / "disk")
    whole = {f"out/{path.name}": path.read_bytes() for path in source.iterdir()}
    assert left.items() <= whole.items()
    assert bool(left) == (target == "out")


def spoiled(store: Path, copy: Path, bytes_of_it: bytes) -> Path:
    """A copy of a store with the first byte of `bytes_of_it` changed."""
    assert bytes_of_it in store.read_bytes()
    copy.write_bytes(store.read_bytes().replace(bytes_of_it, bytes([bytes_of_it[0] ^ 1]) + bytes_of_it[1:]))
    return copy


def test_a_damaged_sample_stops_it(store_path: Path, tmp_path: Path) -> None:
    """Bytes that are not what was packed are not passed off as the file."""
    payload = bytes(fastload.Store(store_path)[5]["image"].payload)
    with pytest.raises(StoreError, match="checksum"):
        unpack(spoiled(store_path, tmp_path / "damaged.lmdb", payload), tmp_path / "out")
    assert "bee/1.jpg" not in files_below(tmp_path / "out")


def test_a_damaged_row_of_a_raw_column_stops_it(raw_store_path: Path, tmp_path: Path) -> None:
    """Pixels of a column are held against their checksums like everything else."""
    pixels = fastload.Store(raw_store_path).columns["image"][17].tobytes()
    with pytest.raises(StoreError, match="checksum"):
        unpack(spoiled(raw_store_path, tmp_path / "damaged.lmdb", pixels), tmp_path / "out")


def test_a_raw_image_of_impossible_length_is_an_error_of_the_store(tmp_path: Path) -> None:
    """A raw record whose length and size contradict each other, as no packer writes it, raises a FastloadError."""
    image = Field(record.RAW, bytes(20 * 30 * 3 + 1), 1, 3, 0, 30, 20)
    with pytest.raises(fastload.FastloadError):
        unpack(build(tmp_path / "db.lmdb", ["x.png"], [image]), tmp_path / "out")


# ---- names


def is_inside(name: str) -> bool:
    """Whether a relative path stays below its folder here, by the operating system's own rules."""
    root = os.path.abspath("root")
    whole = os.path.abspath(os.path.join(root, name))
    return not os.path.isabs(name) and whole.startswith(root + os.sep)


pieces = st.sampled_from(
    ["..", ".", "", "a", "C:", "\\", "/", "//", "\0", "~", " ", "b.jpg", "\udcff", "x" * 260, "..."]
)
names = st.one_of(st.lists(pieces, max_size=7).map("/".join), st.lists(pieces, max_size=7).map("".join))
any_text = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))


@settings(deadline=None)
@given(names | any_text, st.integers(0, 10**12), st.sampled_from([None, ".jpg", ".png"]))
def test_a_safe_name_stays_in_its_folder(name: str, index: int, suffix: str | None) -> None:
    """Whatever the name: below the folder, no part too long or forbidden, and with the suffix that it has to have."""
    safe = safe_name(name, index, suffix)
    assert is_inside(safe)
    path = PurePosixPath(safe)
    assert str(path) == safe
    assert not path.is_absolute()
    assert path.parts
    assert ".." not in path.parts
    assert "\0" not in safe
    assert all(0 < len(os.fsencode(part)) <= 255 for part in path.parts)
    if suffix == ".jpg":
        assert path.suffix.lower() in (".jpg", ".jpeg")
    elif suffix == ".png":
        assert path.suffix.lower() == ".png"


@settings(deadline=None)
@given(
    st.lists(st.text("abc.-_é ", min_size=1, max_size=8).filter(lambda part: part.strip(". ")), min_size=1, max_size=4)
)
def test_a_harmless_name_is_left_alone(parts: list[str]) -> None:
    """An ordinary relative path comes back as it is."""
    assert safe_name("/".join(parts), 7, None) == "/".join(parts)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/../../b", "a/..", "..", ".", "", "nul\0byte", "/", "x" * 251, "a/" + "é" * 126 + "/b"]
)
def test_a_name_that_can_not_be_used_becomes_the_number(name: str) -> None:
    """Climbing, absolute, empty and impossible names are replaced by the sample's index."""
    assert safe_name(name, 42, None) == "00000042"
    assert safe_name(name, 42, ".png") == "00000042.png"


@pytest.mark.parametrize("name", ["../x.jpg", "/abs/x.jpg", "x" * 251 + ".jpg"])
def test_a_replaced_name_keeps_its_suffix(name: str) -> None:
    """A number instead of a name is still the name of a JPEG."""
    assert safe_name(name, 42, None) == "00000042.jpg"


@windows
@pytest.mark.parametrize(
    "name",
    [
        "C:\\x.jpg",
        "C:x.jpg",
        "\\\\host\\share\\x.jpg",
        "a\\..\\..\\b.jpg",
        "a:b.jpg",
        "a?.jpg",
        "a/CON",
        "aux.jpg",
        "Lpt1.b.jpg",
        "a\n.jpg",
    ],
)
def test_windows_paths_become_the_number(name: str) -> None:
    """Drives, shares, backslashes and what Windows forbids in names."""
    assert safe_name(name, 42, ".jpg") == "00000042.jpg"


@posix
def test_windows_paths_are_names_like_others_here() -> None:
    """A backslash is no separator here, so the name is a file in the folder."""
    assert safe_name("C:\\x.jpg", 42, None) == "C:\\x.jpg"


def test_a_hostile_store_stays_in_its_folder(tmp_path: Path) -> None:
    """Every image of a store with the worst of names is written once, below the folder, and to nowhere else."""
    hostile = [
        "../../x.jpg",
        "/abs.jpg",
        f"{tmp_path.as_posix()}/y.jpg",
        "a/../../b.jpg",
        "",
        "nul\0.jpg",
        ".",
        "..",
        "~/z",
    ]
    hostile += ["x" * 300, "é" * 200, "a//b///c.jpg", "./d.jpg", "00000001", "C:\\windows.jpg", "..\\up.jpg"]
    files = unpacked(tmp_path, hostile)
    assert sorted(files.values()) == sorted(bytes(image_of(i).payload) for i in range(len(hostile)))
    assert files["a/b/c.jpg"] == b"image 11"
    assert files["d.jpg"] == b"image 12"


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    """Duplicates, names that differ in case alone, and names that look like our own variants: all files are there."""
    files = unpacked(tmp_path, ["a.jpg", "A.JPG", "a.jpg", "a~2.jpg", "b/x", "B/X", "ß", "SS"])
    assert sorted(files.values()) == [b"image %d" % number for number in range(8)]
    assert len({name.casefold() for name in files}) == 8
    assert files["a.jpg"] == b"image 0"
    assert files["b/x"] == b"image 4"


def test_equal_names_after_a_change_of_suffix_are_told_apart(tmp_path: Path) -> None:
    """x.png and x.bmp, both re-encoded, would both be x.jpg."""
    images = [image_of(number)._replace(flags=record.REENCODED) for number in range(2)]
    files = unpacked(tmp_path, ["x.png", "x.bmp"], images=images)
    assert files == {"x.jpg": b"image 0", "x~2.jpg": b"image 1"}


@pytest.mark.parametrize("names", [["a", "a/b.jpg"], ["a/b.jpg", "a"], ["a/b", "A/B/c"]], ids=" ".join)
def test_a_file_where_another_needs_a_folder(tmp_path: Path, names: list[str]) -> None:
    """One name can't be both: one of the two gets another place, and both images are there."""
    assert sorted(unpacked(tmp_path, names).values()) == [b"image 0", b"image 1"]


def test_long_equal_names_are_told_apart(tmp_path: Path) -> None:
    """Names at the limit of what a file system takes have no room for a suffix and a number."""
    images = [Field(record.RAW, bytes([number]) * 1800, 1, 3, 0, 30, 20) for number in range(2)]
    files = unpacked(tmp_path, ["x" * 250] * 2, images=images)
    assert sorted(cv2.imdecode(np.frombuffer(data, np.uint8), -1)[0, 0, 0] for data in files.values()) == [0, 1]


def test_a_path_that_is_too_long_becomes_the_number(tmp_path: Path) -> None:
    """Every part is short enough, the whole is not: it can't be a file here."""
    files = unpacked(tmp_path, ["/".join(["x" * 200] * 30), "b.jpg"])
    assert sorted(files.values()) == [b"image 0", b"image 1"]


def test_an_image_called_like_the_list_is_not_overwritten(tmp_path: Path) -> None:
    """The list that is written beside the images leaves a file of its name alone."""
    files = unpacked(tmp_path, [LABELS, "b.jpg"], source="list")
    assert len(files) == 3
    assert {b"image 0", b"image 1"} <= set(files.values())


# ---- tar shards


def members_of(path: Path) -> dict[str, bytes]:
    """The files in a tar file, in its order."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_a_tar_file_holds_what_the_folder_would(store_path: Path, tmp_path: Path) -> None:
    """The same bytes under the same names, each with its label, in the store's order; the classes lie beside it."""
    assert unpack(store_path, tmp_path / "new" / "out.tar", format="tar") == 12
    unpack(store_path, tmp_path / "folder")
    found, labels = members_of(tmp_path / "new" / "out.tar"), fastload.Store(store_path).columns["label"]
    assert {name: data for name, data in found.items() if name.endswith(".jpg")} == files_below(tmp_path / "folder")
    assert list(found)[:4] == ["ant/0.jpg", "ant/0.cls", "ant/1.jpg", "ant/1.cls"]
    assert [int(data) for name, data in found.items() if name.endswith(".cls")] == np.asarray(labels).tolist()
    assert (tmp_path / "new" / "out.classes.txt").read_bytes() == b"ant\nbee\ncat\n"
    assert sorted(os.listdir(tmp_path / "new")) == ["out.classes.txt", "out.tar"]


@pytest.mark.parametrize("size", [None, 5, 12, 100])
def test_shards_read_again_are_the_store(store_path: Path, tmp_path: Path, size: int | None) -> None:
    """Images, labels and classes, in as many shards as are needed."""
    unpack(store_path, tmp_path / "out.tar", format="tar", shard_size=size)
    shards = {None: ["out.tar"], 5: [f"out-00000{n}.tar" for n in range(3)]}.get(size, ["out-000000.tar"])
    assert sorted(os.listdir(tmp_path)) == sorted([*shards, "out.classes.txt"])
    found, store = read_shards(tmp_path), fastload.Store(store_path)
    assert (found.classes, found.problems, found.notes) == (["ant", "bee", "cat"], {}, [])
    assert found.names == [str(PurePosixPath(store[i].name).with_suffix("")) for i in range(12)]
    for index in range(12):
        image, label = bytes(store[index]["image"].payload), store.columns["label"][index]
        assert found.read(index) == {"image": image, "label": label}


def test_webdataset_reads_the_shards(store_path: Path, tmp_path: Path) -> None:
    """With its own decoders, key by key."""
    webdataset = pytest.importorskip("webdataset")
    unpack(store_path, tmp_path / "out.tar", format="tar", shard_size=7)
    urls = [str(tmp_path / name) for name in ("out-000000.tar", "out-000001.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    dataset = fastload.ImageDataset(store_path, image_type="numpy")
    assert [sample["__key__"] for sample in samples[:5]] == ["ant/0", "ant/1", "ant/2", "ant/3", "bee/0"]
    assert [sample["cls"] for sample in samples] == [label for _, label in dataset]
    assert samples[0]["jpg"].shape[2] == 3


def test_the_same_store_makes_the_same_bytes(store_path: Path, tmp_path: Path) -> None:
    """Times are that of the store; users and rights are nobody's in particular."""
    for name in ("a", "b"):
        unpack(store_path, tmp_path / f"{name}.tar", format="tar")
        os.utime(tmp_path / "a.tar", (5, 5))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    created = datetime.fromisoformat(fastload.Store(store_path).manifest["created"]).timestamp()
    with tarfile.open(tmp_path / "a.tar") as tar:
        facts = {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert facts == {(int(created), 0o644, 0, 0, "", "")}


def test_raw_pixels_are_png_in_shards(raw_store_path: Path, tmp_path: Path) -> None:
    """The same pixels again."""
    unpack(raw_store_path, tmp_path / "out.tar", format="tar")
    found, store = read_shards(tmp_path / "out.tar"), fastload.Store(raw_store_path)
    for index in range(40):
        pixels = cv2.imdecode(np.frombuffer(found.read(index)["image"], np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(pixels[..., ::-1], store.columns["image"][index])


def test_several_labels_real_ones_and_none_at_all(class_folders: Path, tmp_path: Path) -> None:
    """Lists are JSON; -1 is a label that is missing; a folder without labels gets none."""
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes((class_folders / "ant" / "0.jpg").read_bytes())
    lists = {
        "one": "a.jpg 3\nb.jpg\nc.jpg 0\n",
        "two": "a.jpg 3 4\nb.jpg 5\n",
        "real": "file,x,y\na.jpg,0.5,\nb.jpg,1,2\n",
    }
    expected = {"one": [3, -1, 0], "two": [[3, 4], [5, -1]], "real": [[0.5, np.nan], [1, 2]]}
    for name, text in lists.items():
        (tmp_path / f"{name}.csv").write_text(text)
        fastload.pack(tmp_path / f"{name}.csv", tmp_path / f"{name}.lmdb")
        unpack(tmp_path / f"{name}.lmdb", tmp_path / f"{name}.tar", format="tar")
        samples = read_shards(tmp_path / f"{name}.tar")
        labels = [samples.read(index)["label"] for index in range(len(samples.names))]
        assert np.array_equal(labels, expected[name], equal_nan=True)
    (tmp_path / "flat").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "flat" / "a.jpg")
    fastload.pack(tmp_path / "flat", tmp_path / "flat.lmdb")
    unpack(tmp_path / "flat.lmdb", tmp_path / "flat.tar", format="tar")
    assert list(members_of(tmp_path / "flat.tar")) == ["a.jpg"]


def test_masks_are_members_of_their_sample(tmp_path: Path) -> None:
    """As PNGs of the same values, with the names of these beside the file."""
    random = np.random.default_rng(5)
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    masks = [random.integers(0, 3, (40, 50), np.uint8) for _ in range(3)]
    for number, mask in enumerate(masks):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "in/images" / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "in/masks" / f"{number}.png")
    (tmp_path / "names").write_text("_background_\ncat\ndog\n")
    fastload.pack(tmp_path / "in", tmp_path / "db.lmdb", labels=tmp_path / "names")
    unpack(tmp_path / "db.lmdb", tmp_path / "out.tar", format="tar")
    found = read_shards(tmp_path / "out.tar")
    assert list(members_of(tmp_path / "out.tar"))[:2] == ["0.jpg", "0.mask.png"]
    assert (found.kinds, found.classes) == ({"mask": "mask"}, ["_background_", "cat", "dog"])
    for number, mask in enumerate(masks):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.read(number)["mask"]))), mask)


hostile = [
    "../../x.jpg",
    "/abs.jpg",
    "",
    "nul\0.jpg",
    ".",
    "a\nb.jpg",
    "__a__.jpg",
    "__b__/c.jpg",
    ".d.jpg",
    "a.b.c.jpg",
]
hostile += [
    "a_b_c.jpg",
    "A_b_c.jpg",
    "é" * 100 + ".JPEG",
    "\udcff.jpg",
    "x" * 300,
    "a.b/c.jpg",
    "f",
    "f/g.jpg",
    "___.png",
]


def test_any_names_make_keys_that_are_read_as_they_are(tmp_path: Path) -> None:
    """Each sample once, none in the place of another, no path that climbs, nothing that WebDataset would skip."""
    photo = io.BytesIO()
    Image.new("RGB", (3, 2)).save(photo, "PNG")
    images = [Field(record.JPEG, photo.getvalue() + b"%d" % n, 1, 3, 0, 30, 20) for n in range(len(hostile))]
    unpack(build(tmp_path / "db.lmdb", hostile, images), tmp_path / "out.tar", format="tar")
    found = read_shards(tmp_path / "out.tar")
    assert [bytes(found.read(n)["image"]) for n in range(len(hostile))] == [image.payload for image in images]
    assert found.problems == {}
    assert found.names[5:12] == ["a_b", "_a__", "_b__/c", "_d", "a_b_c", "a_b_c~2", "A_b_c~3"]
    for name in found.names:
        assert is_inside(name)
        assert name.isprintable() or "\udcff" in name


def test_webdataset_reads_any_names(tmp_path: Path) -> None:
    """Its own idea of keys finds as many samples."""
    webdataset = pytest.importorskip("webdataset")
    names = [name for name in hostile if "\udcff" not in name and PurePosixPath(name).suffix]
    unpack(build(tmp_path / "db.lmdb", names), tmp_path / "out.tar", format="tar")
    found = list(webdataset.WebDataset(str(tmp_path / "out.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == read_shards(tmp_path / "out.tar").names


def test_damaged_samples_are_left_out_of_shards(store_path: Path, tmp_path: Path) -> None:
    """And named; all others are there."""
    payload = bytes(fastload.Store(store_path)[5]["image"].payload)
    store = spoiled(store_path, tmp_path / "damaged.lmdb", payload)
    with pytest.raises(StoreError, match="1 of 12 samples are damaged"):
        unpack(store, tmp_path / "out.tar", format="tar", shard_size=4)
    found = read_shards(tmp_path / "out-{000000..000002}.tar")
    assert "bee/1" not in found.names
    assert (len(found.names), found.problems) == (11, {})


def test_nothing_is_there_before_all_of_it_is(store_path: Path, tmp_path: Path) -> None:
    """Interrupted at the last sample, not one shard is left; killed, what is left has another name, and is replaced."""

    def interrupt(done: int, total: int) -> None:
        if done == total:
            left.extend(os.listdir(tmp_path))
            raise KeyboardInterrupt

    left: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        unpack(store_path, tmp_path / "out.tar", format="tar", shard_size=5, progress=interrupt)
    assert sorted(left) == [f"out.tar.{number}.partial" for number in range(3)]
    assert os.listdir(tmp_path) == []
    (tmp_path / "out.tar.0.partial").write_bytes(b"of a process that was killed" * 10000)
    unpack(store_path, tmp_path / "out.tar", format="tar")
    assert len(members_of(tmp_path / "out.tar")) == 24
    assert sorted(os.listdir(tmp_path)) == ["out.classes.txt", "out.tar"]


@pytest.mark.parametrize(
    ("there", "size"), [("out.tar", None), ("out-000007.tar", 5), ("out.classes.txt", 5), ("out.classes.txt", None)]
)
def test_shards_that_are_there_are_refused(store_path: Path, tmp_path: Path, there: str, size: int | None) -> None:
    """Also those that would only be taken for more of the same."""
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=f"{there} exists"):
        unpack(store_path, tmp_path / "out.tar", format="tar", shard_size=size)
    assert files_below(tmp_path) == {there: b"mine"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("out.zip", {"format": "tar"}, "end it in .tar"),
        ("out", {"format": "zip"}, "it may be folder or tar"),
        ("out", {"shard_size": 5}, "goes with tar"),
        ("out.tar", {"format": "tar", "shard_size": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(
    store_path: Path, tmp_path: Path, name: str, options: dict[str, Any], words: str
) -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match=words):
        unpack(store_path, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_a_store_without_a_time_or_samples(tmp_path: Path) -> None:
    """An empty tar file, and times of zero."""
    unpack(build(tmp_path / "none.lmdb", []), tmp_path / "none.tar", format="tar", shard_size=5)
    assert members_of(tmp_path / "none-000000.tar") == {}
    unpack(build(tmp_path / "one.lmdb", ["a.jpg"]), tmp_path / "one.tar", format="tar")
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [member.mtime for member in tar] == [0, 0]


@pytest.mark.parametrize(("name", "written"), [("caf\udce9", b"caf\xe9\n"), ("half\ud800", b"half?\n")])
def test_classes_that_are_no_text(tmp_path: Path, name: str, written: bytes) -> None:
    """Bytes that are no UTF-8 come back as they were; half a character, as JSON may have, becomes a ?."""
    unpack(build(tmp_path / "db.lmdb", ["a.jpg"], classes=[name]), tmp_path / "out.tar", format="tar")
    assert (tmp_path / "out.classes.txt").read_bytes() == written
