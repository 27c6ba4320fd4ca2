"""Sources whose samples are more than an image and a label, from their files to batches, pictures, and back.

The tests of `tar_shards`, `parquet`, `dicom` and `coco` say what is read. These say what becomes of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from edits import edited
from PIL import Image

import fastload
from fastload import DataLoader, ImageDataset, Store, pack, pack_splits
from fastload.cli import main
from fastload.errors import SourceError
from fastload.info import find, info
from fastload.store import sample_key
from fastload.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize
from fastload.verify import verify

Picture = Callable[..., npt.NDArray[Any]]


def png(pixels: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def pictures(make_picture: Picture) -> list[npt.NDArray[Any]]:
    return [make_picture(20, 24, seed=i) for i in range(12)]


def same_pixels(dataset: ImageDataset, pictures: list[npt.NDArray[Any]]) -> bool:
    return all(np.array_equal(dataset.read(i).permute(1, 2, 0).numpy(), picture) for i, picture in enumerate(pictures))


# Tar shards


@pytest.fixture
def shards(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> Path:
    """Twelve samples of image, class, text, JSON and array, in two shards of a folder."""
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = {
        f"{i:04d}": {
            "png": png(picture),
            "cls": str(i % 3).encode(),
            "txt": f"caption {i}".encode(),
            "json": json.dumps({"i": i, "tags": ["a"] * i}).encode(),
            "npy": npy(np.arange(i, dtype=np.float32)),
        }
        for i, picture in enumerate(pictures)
    }
    for number in range(2):
        some = dict([*samples.items()][number * 6 : number * 6 + 6])
        tar(folder / f"s-{number:06d}.tar", some)
    return folder


@pytest.mark.parametrize("which", ["", "s-{000000..000001}.tar", "s-*.tar"])
def test_shards_become_dicts(tmp_path: Path, shards: Path, pictures: list[npt.NDArray[Any]], which: str) -> None:
    """A folder of shards, or a pattern: all fields come back under their extensions, image and label by their names."""
    report = pack(shards / which, tmp_path / "db.lmdb")
    assert (report.samples, report.classes, report.quarantined) == (12, 3, 0)
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert same_pixels(dataset, pictures)
    assert dataset.targets.tolist() == [i % 3 for i in range(12)]
    for i, sample in enumerate(dataset[i] for i in range(12)):
        assert sample.keys() == {"image", "label", "txt", "json", "npy"}
        assert (sample["label"], sample["txt"]) == (i % 3, f"caption {i}")
        assert sample["json"] == {"i": i, "tags": ["a"] * i}
        assert np.array_equal(sample["npy"], np.arange(i, dtype=np.float32))
    assert dataset.store[7].name == "0007"


def test_images_and_classes_alone_are_pairs(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """(image, label), as of any other source; class names are found."""
    samples = {str(i): {"cls": b"cat" if i % 2 else b"ant", "png": png(p)} for i, p in enumerate(pictures)}
    pack(tar(tmp_path / "s.tar", samples), tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", Resize(16))
    assert dataset.classes == ["ant", "cat"]
    images, labels = next(iter(DataLoader(dataset, batch_size=12, num_workers=2)))
    assert labels.tolist() == [0, 1] * 6
    assert images.shape == (12, 3, 16, 19)


def test_a_damaged_member_costs_its_sample_alone(
    tmp_path: Path, pictures: list[npt.NDArray[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out with its reason, by name; status 3."""
    samples = {str(i): {"png": png(p), "cls": b"1"} for i, p in enumerate(pictures)}
    samples["3"]["png"] = samples["3"]["png"][:100]
    samples["5"]["cls"] = b"\xff"
    tar(tmp_path / "s.tar", samples)
    assert main(["pack", str(tmp_path / "s.tar"), str(tmp_path / "db.lmdb")]) == 3
    assert "Traceback" not in capsys.readouterr().err
    reasons = {entry["name"]: entry["reason"] for entry in Store(tmp_path / "db.lmdb").quarantine()}
    assert reasons.keys() == {"3", "5"}
    assert "damaged" in reasons["3"]
    assert "UTF-8" in reasons["5"]


def test_unpacked_shards_packed_again_are_the_same(tmp_path: Path, shards: Path) -> None:
    """`unpack --format tar` gives all fields back: the second store has the first one's content digest."""
    pack(shards, tmp_path / "db.lmdb")
    assert main(["unpack", str(tmp_path / "db.lmdb"), str(tmp_path / "out.tar"), "--format", "tar"]) == 0
    pack(tmp_path / "out.tar", tmp_path / "again.lmdb")
    assert info(tmp_path / "again.lmdb")["digest"] == info(tmp_path / "db.lmdb")["digest"]


def test_the_digest_knows_all_fields(tmp_path: Path, shards: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """Another caption is another store; `verify` sees a record that lies at another one's place."""
    pack(shards, tmp_path / "db.lmdb")
    samples = {"0": {"png": png(pictures[0]), "txt": b"one"}, "1": {"png": png(pictures[0]), "txt": b"two"}}
    others = {"0": samples["0"], "1": {**samples["1"], "txt": b"TWO"}}
    for name, some in (("a", samples), ("b", others)):
        pack(tar(tmp_path / f"{name}.tar", some), tmp_path / f"{name}.lmdb")
    assert info(tmp_path / "a.lmdb")["digest"] != info(tmp_path / "b.lmdb")["digest"]
    assert not verify(tmp_path / "db.lmdb", decode_images=True).damaged


@contextlib.contextmanager
def edited_copy(path: Path) -> Iterator[tuple[Path, Any]]:
    """A copy of a store, and a transaction on its samples."""
    copy = path.with_name("edited.lmdb")
    shutil.copy(path, copy)
    with edited(copy, b"samples") as transaction:
        yield copy, transaction


def test_records_at_each_other_s_place_are_found(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """Two samples of the same picture whose records were exchanged: `verify` knows their texts."""
    samples = {str(i): {"png": png(pictures[0]), "txt": f"text {i}".encode()} for i in range(2)}
    pack(tar(tmp_path / "s.tar", samples), tmp_path / "db.lmdb")
    with edited_copy(tmp_path / "db.lmdb") as (path, samples_of):
        records = [samples_of.get(sample_key(i)) for i in range(2)]
        for i in range(2):
            samples_of.put(sample_key(i), records[1 - i])
    damaged = verify(path).damaged
    assert [damage.index for damage in damaged] == [0, 1]
    assert all("its fields are not those" in damage.reason for damage in damaged)


@pytest.mark.parametrize("on_error", ["placeholder", "skip"])
def test_a_damaged_record_costs_its_sample_alone(
    tmp_path: Path, pictures: list[npt.NDArray[Any]], on_error: Any
) -> None:
    """Whatever its fields are, a batch can be made: of arrays with zeros of the others' shape, of JSON with None."""
    samples = {
        str(i): {"png": png(p), "npy": npy(np.full(3, i + 1.0)), "json": b'{"a": 1}', "txt": b"text"}
        for i, p in enumerate(pictures)
    }
    pack(tar(tmp_path / "s.tar", samples), tmp_path / "db.lmdb")
    with edited_copy(tmp_path / "db.lmdb") as (path, samples_of):
        broken = bytearray(samples_of.get(sample_key(4)))
        broken[20] ^= 1
        samples_of.put(sample_key(4), bytes(broken))
    dataset = ImageDataset(path, on_error=on_error)
    batch = next(iter(DataLoader(dataset, batch_size=12, num_workers=2)))
    assert [*dataset.failures] == [4]
    assert batch["npy"].shape == (12, 3)
    if on_error == "placeholder":
        assert batch["npy"][4].tolist() == [0, 0, 0]
        assert batch["json"][4] is None
        assert batch["txt"][4] == ""
        assert not batch["image"][4].any()
    else:
        assert (batch["npy"] > 0).all()


def test_a_store_packed_again_keeps_all_fields(tmp_path: Path, shards: Path) -> None:
    """With smaller images, everything else as it was."""
    pack(shards, tmp_path / "db.lmdb")
    pack(tmp_path / "db.lmdb", tmp_path / "small.lmdb", short_side=10)
    before, after = ImageDataset(tmp_path / "db.lmdb"), ImageDataset(tmp_path / "small.lmdb")
    assert after[0]["image"].shape == (3, 10, 12)
    for i in range(12):
        one, other = before[i], after[i]
        assert {**one, "image": 0, "npy": one["npy"].tolist()} == {**other, "image": 0, "npy": other["npy"].tolist()}


def test_shards_are_split_by_class(tmp_path: Path, shards: Path) -> None:
    """Their labels are read for that: each part has every class."""
    pack_splits(shards, tmp_path / "db.lmdb", "train=0.5,val=0.5")
    for part in ("train", "val"):
        assert sorted(ImageDataset(tmp_path / f"db-{part}.lmdb").targets.tolist()) == [0, 0, 1, 1, 2, 2]


def test_kinds_say_what_members_are(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """Boxes and masks that a shard has as arrays and pictures move again."""
    mask = np.zeros((20, 24), np.uint8)
    mask[:, :12] = 1
    files = {"png": png(pictures[0]), "boxes.npy": npy(np.array([[2, 3, 4, 5]], np.float32)), "target.png": png(mask)}
    shard = tar(tmp_path / "s.tar", {"0": files})
    kinds = ["--kind", "boxes.npy=boxes", "--kind", "target.png=mask"]
    assert main(["pack", str(shard), str(tmp_path / "db.lmdb"), *kinds]) == 0
    sample = ImageDataset(tmp_path / "db.lmdb", RandomHorizontalFlip(1.0))[0]
    assert sample["boxes.npy"].tolist() == [[18, 3, 4, 5]]
    assert np.array_equal(sample["target.png"].numpy(), mask[:, ::-1])


# COCO's lists


@pytest.fixture
def coco(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> Path:
    """Four images with up to three boxes each."""
    images, annotations = [], []
    for i, picture in enumerate(pictures[:4]):
        (tmp_path / f"{i}.png").write_bytes(png(picture))
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 20, "width": 24})
        for k in range(i):
            box = [2.5 * k, 1, 8, 10 + k]
            annotations.append({"id": len(annotations), "image_id": 10 + i, "category_id": 7 + k % 2, "bbox": box})
    categories = [{"id": 8, "name": "dog"}, {"id": 7, "name": "cat"}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_boxes_move_with_their_image(tmp_path: Path, coco: Path) -> None:
    """Resized by half, then mirrored: exactly the boxes that a detector has to find there."""
    assert pack(coco, tmp_path / "db.lmdb").samples == 4
    plain = ImageDataset(tmp_path / "db.lmdb")
    sample = plain[3]
    assert sample.keys() == {"image", "boxes", "labels"}
    assert np.asarray(sample["boxes"]).tolist() == [[0, 1, 8, 10], [2.5, 1, 8, 11], [5, 1, 8, 12]]
    assert np.asarray(sample["labels"]).tolist() == [0, 1, 0]
    assert plain.classes == ["cat", "dog"]
    assert np.asarray(plain[0]["boxes"]).shape == (0, 4)
    half = ImageDataset(tmp_path / "db.lmdb", Compose([Resize((10, 12)), RandomHorizontalFlip(1.0)]))
    assert np.asarray(half[3]["boxes"]).tolist() == [[8, 0.5, 4, 5], [6.75, 0.5, 4, 5.5], [5.5, 0.5, 4, 6]]
    assert half[3]["image"].shape == (3, 10, 12)


def test_images_are_found_by_the_classes_of_their_boxes(tmp_path: Path, coco: Path) -> None:
    """`show --class`: the third and fourth image have a dog."""
    pack(coco, tmp_path / "db.lmdb")
    assert find(tmp_path / "db.lmdb", of_class="cat") == [1, 2, 3]
    assert find(tmp_path / "db.lmdb", of_class="dog") == [2, 3]


def test_boxes_are_stored_for_images_that_are_shrunk(tmp_path: Path, coco: Path) -> None:
    """In pixels of what is stored."""
    pack(coco, tmp_path / "db.lmdb", short_side=10)
    assert np.asarray(ImageDataset(tmp_path / "db.lmdb")[1]["boxes"]).tolist() == [[0, 0.5, 4, 5]]
    pack(tmp_path / "db.lmdb", tmp_path / "again.lmdb", short_side=5)
    assert np.asarray(ImageDataset(tmp_path / "again.lmdb")[1]["boxes"]).tolist() == [[0, 0.25, 2, 2.5]]


def test_batches_of_boxes(tmp_path: Path, coco: Path) -> None:
    """Lists, as detection models take them; padded with zeros on request."""
    pack(coco, tmp_path / "db.lmdb")
    dataset = ImageDataset(tmp_path / "db.lmdb", RandomCrop(16))
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=fastload.collate.as_list)))
    assert [len(boxes) for boxes in batch["boxes"]] == [0, 1, 2, 3]
    padded = next(iter(DataLoader(dataset, batch_size=4, collate_fn=fastload.collate.pad)))
    assert padded["boxes"].shape == (4, 3, 4)
    assert padded["image"].shape == (4, 3, 16, 16)


def test_boxes_are_drawn(tmp_path: Path, coco: Path) -> None:
    """`fastload show` draws them: the sheet differs from that of the images alone, and names the classes."""
    pack(coco, tmp_path / "db.lmdb")
    pack(coco.parent, tmp_path / "bare.lmdb", format="flat", overwrite=True)
    sheets = [ImageDataset(tmp_path / f"{name}.lmdb").show([3]) for name in ("db", "bare")]
    assert sheets[0].height > sheets[1].height  # by the legend
    assert np.array(sheets[0].crop((0, 0, 176, 168))).tobytes() != np.array(sheets[1].crop((0, 0, 176, 168))).tobytes()


# Parquet


def parquet(path: Path, pictures: list[npt.NDArray[Any]], **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": png(picture), "path": f"{i}.png"} for i, picture in enumerate(pictures)]
    pq.write_table(pa.table({"image": pa.array(images, struct), **columns}), path, row_group_size=5)
    return path


def test_parquet_files_become_samples(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """Images and labels are pairs; with more columns dicts."""
    labels = [i % 2 for i in range(12)]
    pack(parquet(tmp_path / "a.parquet", pictures, label=labels), tmp_path / "a.lmdb")
    pairs = ImageDataset(tmp_path / "a.lmdb")
    assert same_pixels(pairs, pictures)
    assert [pairs[i][1] for i in range(12)] == labels
    texts = [None if i == 4 else f"text {i}" for i in range(12)]
    pack(parquet(tmp_path / "b.parquet", pictures, label=labels, text=texts), tmp_path / "b.lmdb")
    assert [ImageDataset(tmp_path / "b.lmdb")[i]["text"] for i in range(12)] == texts


def test_a_split_of_parquet_files(tmp_path: Path, pictures: list[npt.NDArray[Any]]) -> None:
    """Several splits in a folder are not mixed: one has to be chosen."""
    folder = tmp_path / "hub"
    folder.mkdir()
    parquet(folder / "train-00000-of-00001.parquet", pictures[:8], label=[0] * 8)
    parquet(folder / "test-00000-of-00001.parquet", pictures[8:], label=[1] * 4)
    with pytest.raises(SourceError, match="'test', 'train'"):
        pack(folder, tmp_path / "db.lmdb")
    assert pack(folder, tmp_path / "db.lmdb", part="test").samples == 4
    assert main(["pack", str(folder), str(tmp_path / "train.lmdb"), "--split", "train"]) == 0
    assert len(Store(tmp_path / "train.lmdb")) == 8


# DICOM


def dicom(path: Path, pixels: npt.NDArray[np.uint16], modality: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    dataset.Modality, dataset.PatientName, dataset.KVP = modality, "Somebody", "120"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Path, list[npt.NDArray[np.uint16]]]:
    """Six scans of 12 bits."""
    folder = tmp_path / "scans"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 4096, (16, 18)).astype(np.uint16) for _ in range(6)]
    for i, values in enumerate(pixels):
        dicom(folder / f"{i}.dcm", values, "MR" if i % 2 else "CT")
    return folder, pixels


def test_dicom_with_a_window(tmp_path: Path, scans: tuple[Path, list[npt.NDArray[np.uint16]]]) -> None:
    """8 bits, labels and values from the header, and nobody's name."""
    folder, pixels = scans
    arguments = ["--window", "auto", "--label-from", "Modality", "--header", "KVP"]
    assert main(["pack", str(folder), str(tmp_path / "db.lmdb"), *arguments]) == 0
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.classes == ["CT", "MR"]
    assert dataset.targets.tolist() == [0, 1] * 3
    for i, values in enumerate(pixels):
        sample = dataset[i]
        assert sample.keys() == {"image", "label", "KVP"}
        assert sample["KVP"] == 120.0
        assert sample["image"].dtype == torch.uint8
        expected = values / 4095 * 255
        assert np.abs(sample["image"][0].numpy() - expected).max() <= 1
    assert b"Somebody" not in (tmp_path / "db.lmdb").read_bytes()


@pytest.mark.parametrize("rescale", [False, True])
def test_dicom_is_kept_whole(tmp_path: Path, scans: tuple[Path, list[npt.NDArray[np.uint16]]], rescale: bool) -> None:
    """All 12 bits, or int16 in Hounsfield units; without labels -1, as of any folder of images."""
    folder, pixels = scans
    pack(folder, tmp_path / "db.lmdb", rescale=rescale)
    dataset = ImageDataset(tmp_path / "db.lmdb")
    for i, values in enumerate(pixels):
        image, label = dataset[i]
        assert (image.dtype, label) == (torch.int16 if rescale else torch.uint16, -1)
        assert np.array_equal(image[0].numpy(), values)


@pytest.mark.parametrize("option", ["--label-from", "--window", "--header", "--rescale"])
def test_options_of_dicom_go_with_dicom(
    tmp_path: Path, shards: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar has no header of that kind."""
    value = {"--window": ["auto"], "--rescale": []}.get(option, ["Modality"])
    assert main(["pack", str(shards), str(tmp_path / "db.lmdb"), option, *value]) == 2
    assert "it goes with dicom" in capsys.readouterr().err
