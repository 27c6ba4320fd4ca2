"""Every kind of source, from the files as people have them to batches, pictures and back: lists, labelme, MNIST, CIFAR.

The tests of `label_lists`, `labelme`, `small_images` and `splits` say what is read. These say what becomes of it.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import fastload
from fastload import DataLoader, ImageDataset, Store, pack, pack_splits
from fastload.cli import main
from fastload.errors import SourceError
from fastload.info import info
from fastload.sources import open_source
from fastload.transforms import CenterCrop, Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only: links, pipes")

Array = npt.NDArray[Any]
Picture = Callable[..., Array]
Run = Callable[..., tuple[int, str, str]]

IGNORED = 255


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`fastload` with these arguments: exit status, standard output, standard error. There is never a traceback."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own
            status = int(exit.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


@pytest.fixture
def photos(tmp_path: Path, make_picture: Picture) -> Path:
    """Six PNG photos of 20 x 24 pixels (so that pixels can be compared), 0.png to 5.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(make_picture(20, 24, seed=i)).save(folder / f"{i}.png")
    return folder


def listed(folder: Path, text: str, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def quarantine(store: Path) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in Store(store).quarantine()}


def only_batch(dataset: ImageDataset) -> list[Any]:
    """All samples as one batch, by fastload's loader; torch's makes the same of them."""
    loader = DataLoader(dataset, batch_size=len(dataset), num_workers=2)
    (batch,) = loader
    (stock,) = torch.utils.data.DataLoader(dataset, batch_size=len(dataset))
    pairs = zip(*(b.values() if isinstance(b, dict) else b for b in (batch, stock)), strict=True)
    assert all(a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)
    return batch  # type: ignore[no-any-return]


# ---- lists


LISTS = {
    "spaces.txt": "0.png 3\n1.png 0\n2.png 3\n",
    "tabs.tsv": "0.png\t3\n1.png\t0\n2.png\t3\n",
    "commas.csv": "0.png,3\n1.png,0\n2.png,3\n",
    "header.csv": "filename,label\n0.png,3\n1.png,0\n2.png,3\n",
    "header.tsv": "label\timage\n3\t0.png\n0\t1.png\n3\t2.png\n",
    "lines.jsonl": '{"y": 3, "f": "0.png"}\n{"f": "1.png", "y": 0}\n{"y": 3, "f": "2.png"}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_any_kind_gives_its_labels(photos: Path, tmp_path: Path, make_picture: Picture, name: str) -> None:
    """Pictures and labels in the order of the lines, whatever stands between the cells."""
    store = tmp_path / "db.lmdb"
    report = pack(listed(photos, LISTS[name], name), store)
    assert (report.samples, report.classes, report.quarantined) == (3, 2, 0)
    images, labels = only_batch(ImageDataset(store))
    assert labels.tolist() == [3, 0, 3]
    assert labels.dtype == torch.int64
    for i in range(3):
        assert np.array_equal(images[i].permute(1, 2, 0), make_picture(20, 24, seed=i))


def test_columns_are_chosen_on_the_command_line(run: Run, photos: Path, tmp_path: Path) -> None:
    """`--image-column` and `--label-columns`, in the order that they are given in; several labels make rows."""
    path = listed(photos, "id,a,photo,b\n7,1,0.png,2\n8,3,1.png,4\n", "table.csv")
    status, _, err = run("pack", path, tmp_path / "db.lmdb")
    assert status == 0
    assert "names are taken from the column 'photo', labels from 'id', 'a', 'b'; --image-column" in err
    for columns, expected in (("b,a", [[2, 1], [4, 3]]), ("b", [2, 4]), ("", [-1, -1])):
        store = tmp_path / f"{columns or 'none'}.lmdb"
        status, _, err = run("pack", path, store, "--image-column", "photo", "--label-columns", columns)
        assert (status, err) == (0, "")
        assert ImageDataset(store).targets.tolist() == expected
    status, _, err = run("pack", path, tmp_path / "x.lmdb", "--label-columns", "a,zebra")
    assert status == 2
    assert "'zebra'" in err
    assert "'photo'" in err


def test_names_of_classes_are_numbered_and_kept(run: Run, photos: Path, tmp_path: Path) -> None:
    """Sorted names; they caption the pictures, and `info` counts them."""
    path = listed(photos, "file,class\n0.png,polar bear\n1.png,ant\n2.png,\n3.png,polar bear\n", "named.csv")
    assert run("pack", path, tmp_path / "db.lmdb")[0] == 0
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.classes == ["ant", "polar bear"]
    assert dataset.targets.tolist() == [1, 0, -1, 1]
    facts = info(tmp_path / "db.lmdb")
    assert (facts["classes"], facts["labelled"], facts["samples_per_class"]) == (2, 3, [1, 1.5, 2])


REAL = "file,steer,gas\n0.png,0.5,1\n1.png,,2\n2.png,-0.25,3e-3\n3.png,0.1,4\n"


@pytest.fixture
def real(photos: Path, tmp_path: Path) -> Path:
    """A store with two real labels each, one of them missing."""
    pack(listed(photos, REAL, "real.csv"), tmp_path / "real.lmdb")
    return tmp_path / "real.lmdb"


def test_real_labels_are_float32_in_batches_and_float64_in_the_store(real: Path) -> None:
    """What losses want is float32; `targets` is what the list said; what is missing is NaN."""
    expected = np.array([[0.5, 1], [np.nan, 2], [-0.25, 3e-3], [0.1, 4]])
    dataset = ImageDataset(real)
    assert dataset.targets.dtype == np.float64
    assert np.array_equal(dataset.targets, expected, equal_nan=True)
    _, labels = only_batch(dataset)
    assert labels.dtype == torch.float32
    assert np.array_equal(labels.numpy(), expected.astype(np.float32), equal_nan=True)
    assert dataset[3][1].dtype == torch.float32
    assert torch.nn.functional.mse_loss(torch.zeros(2, 2), labels[2:]).dtype == torch.float32


def test_info_counts_no_classes_of_real_labels(run: Run, real: Path, photos: Path, tmp_path: Path) -> None:
    """Numbers that are measured are no classes; samples are labelled if they have any number."""
    facts = info(real)
    assert (facts["classes"], facts["labelled"], facts["samples_per_class"]) == (0, 4, None)
    assert "classes     0, 4 samples with a label" in run("info", real)[1]
    assert json.loads(run("info", real, "--json")[1])["classes"] == 0
    pack(listed(photos, "f,y\n0.png,0.5\n1.png,\n", "one.csv"), tmp_path / "one.lmdb", image_column="f")
    assert info(tmp_path / "one.lmdb")["labelled"] == 1


def test_a_placeholder_among_real_labels_is_nan(photos: Path, tmp_path: Path) -> None:
    """-100 would be a label like any other; NaN is left out by `labels[labels == labels]`. Its target isn't changed."""
    path = listed(photos, "0.png 0.5\n1.png 0.25\n2.png 2\n")
    pack(path, tmp_path / "db.lmdb")
    damaged = broken(tmp_path / "db.lmdb", tmp_path / "damaged.lmdb", 1)
    dataset = ImageDataset(damaged, target_transform=lambda value: value * 2)
    labels = [dataset[i][1] for i in range(3)]
    assert labels[0] == 1
    assert {ImageDataset(damaged)[i][1].dtype for i in range(3)} == {torch.float32}
    assert labels[2] == 4
    assert np.isnan(labels[1])
    assert not dataset[1][0].any()
    assert list(dataset.failures) == [1]
    batch = only_batch(ImageDataset(damaged))[1]
    assert batch.dtype == torch.float32
    assert batch.isnan().tolist() == [False, True, False]
    pack(listed(photos, "0.png 0.5 1\n1.png 0.25 2\n"), tmp_path / "two.lmdb")
    pair = only_batch(ImageDataset(broken(tmp_path / "two.lmdb", tmp_path / "two-damaged.lmdb", 0)))[1]
    assert pair.isnan().tolist() == [[True, True], [False, False]]


def broken(store: Path, copy: Path, index: int, name: str = "image") -> Path:
    """A copy of a store with a byte in the middle of a sample's field flipped."""
    payload, data = bytes(Store(store)[index][name].payload), store.read_bytes()
    middle = len(payload) // 2
    assert payload in data  # perhaps twice: pages that were written anew are still there
    copy.write_bytes(data.replace(payload, payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]))
    return copy


def test_samples_without_a_label_are_counted(run: Run, photos: Path, tmp_path: Path) -> None:
    """They are packed, with -1, which a loss must not see."""
    names = [path.name for path in sorted(photos.iterdir()) if path.is_file()][:3]
    source = listed(photos, f"file,label\n{names[0]},cat\n{names[1]},\n{names[2]},dog\n", "some.csv")
    status, _, error = run("pack", source, tmp_path / "db.lmdb")
    assert status == 0
    assert "1 of 3 samples have no label (-1 in the store)" in error
    assert ImageDataset(tmp_path / "db.lmdb").targets.tolist() == [0, -1, 1]


def test_real_labels_can_not_be_balanced(real: Path, photos: Path, tmp_path: Path) -> None:
    """There is no class to draw from; weights of one's own work, NaN among them is refused."""
    pack(listed(photos, "f,y\n0.png,0.5\n1.png,\n2.png,2\n", "one.csv"), tmp_path / "one.lmdb", image_column="f")
    for path in (real, tmp_path / "one.lmdb"):
        with pytest.raises(ValueError, match=r"balanced.*one int for each sample"):
            fastload.ShuffleSampler(ImageDataset(path), weights="balanced")
    dataset = ImageDataset(tmp_path / "one.lmdb")
    with pytest.raises(ValueError, match="finite"):
        fastload.ShuffleSampler(dataset, weights=dataset.targets)
    weights = np.nan_to_num(dataset.targets)
    assert set(fastload.ShuffleSampler(dataset, weights=weights)) <= {0, 2}


def test_packing_again_keeps_real_labels(real: Path, tmp_path: Path) -> None:
    """From store to store: float64, bit by bit."""
    pack(real, tmp_path / "again.lmdb", encode="raw")
    again = ImageDataset(tmp_path / "again.lmdb")
    assert again.targets.tobytes() == ImageDataset(real).targets.tobytes()


@pytest.mark.parametrize("text", [REAL, "f,y\n0.png,0.5\n1.png,\n2.png,1e-300\n3.png,3.0\n"])
def test_unpacked_real_labels_can_be_packed_again(photos: Path, tmp_path: Path, text: str) -> None:
    """`labels.tsv` says the same numbers, and where one is missing, it is missing again."""
    pack(listed(photos, text, "real.csv"), tmp_path / "db.lmdb", image_column=text.partition(",")[0])
    fastload.cli.main(["unpack", str(tmp_path / "db.lmdb"), str(tmp_path / "files")])
    report = pack(tmp_path / "files" / "labels.tsv", tmp_path / "again.lmdb")
    assert report.quarantined == 0
    first, again = (ImageDataset(tmp_path / name) for name in ("db.lmdb", "again.lmdb"))
    assert np.array_equal(first.targets, again.targets, equal_nan=True)
    assert all(torch.equal(first[i][0], again[i][0]) for i in range(len(first)))


def test_repetitions_and_contradictions_name_their_lines(run: Run, photos: Path, tmp_path: Path) -> None:
    """One of two equal lines is packed; of two that differ neither is, and the reason has both numbers."""
    text = "# animals\n0.png cat\n1.png dog\n\n0.png cat\n2.png dog\n./2.png cat\n9.png cat\n3.png ant\n"
    status, out, err = run("pack", listed(photos, text), tmp_path / "db.lmdb")
    assert status == 3
    assert "db.lmdb: 3 samples" in out
    assert "line 5 repeats line 2" in err
    assert "left out: 3 files" in err
    said = "line 6 says dog, line 7 says cat"
    found = quarantine(tmp_path / "db.lmdb")
    assert found.pop("9.png").startswith("line 8: no such file")
    assert found == {"2.png": said, "./2.png": said}
    assert f"2.png\t{said}" in run("info", "--quarantine", tmp_path / "db.lmdb")[1]
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert [dataset.store.name(i) for i in range(3)] == ["0.png", "1.png", "3.png"]
    assert dataset.targets.tolist() == [1, 2, 0]


@pytest.fixture
def masked(photos: Path) -> Path:
    """Masks m0.png to m5.png beside the photos: number i is of i, but for one column of 255."""
    for i in range(6):
        mask = np.full((20, 24), i, np.uint8)
        mask[:, 7] = IGNORED
        Image.fromarray(mask).save(photos / f"m{i}.png")
    return photos


@pytest.mark.parametrize("separator", ["\t", ",", " "])
def test_a_list_of_images_and_masks(masked: Path, tmp_path: Path, separator: str) -> None:
    """Two files on a line are a pair."""
    path = listed(masked, "".join(f"{i}.png{separator}m{i}.png\n" for i in range(6)))
    assert pack(path, tmp_path / "db.lmdb").samples == 6
    images, masks = only_batch(ImageDataset(tmp_path / "db.lmdb"))
    assert images.shape == (6, 3, 20, 24)
    assert masks.dtype == torch.uint8
    assert masks[:, 3, 3].tolist() == list(range(6))
    assert (masks[:, :, 7] == IGNORED).all()


def test_a_mask_that_is_missing_makes_no_classes_of_a_list_of_masks(masked: Path, tmp_path: Path) -> None:
    """One wrong name must not turn a list of pairs into a list of classes that are called like files."""
    path = listed(masked, "".join(f"{i}.png\tm{i}.png\n" for i in range(6)))
    (masked / "m4.png").unlink()
    assert pack(path, tmp_path / "db.lmdb").samples == 5
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.fields == ("image", "mask")
    (reason,) = quarantine(tmp_path / "db.lmdb").values()
    assert "m4.png" in reason


def test_a_line_without_its_mask_is_left_out(masked: Path, tmp_path: Path) -> None:
    """Its number is in the reason."""
    pack(listed(masked, "0.png\tm0.png\n1.png\n2.png\tm2.png\n"), tmp_path / "db.lmdb")
    assert quarantine(tmp_path / "db.lmdb") == {"1.png": "line 2: there is no mask"}


def test_unpacked_masks_do_not_overwrite_each_other(masked: Path, make_picture: Picture, tmp_path: Path) -> None:
    """0.png and 0.bmp have a mask each, and both are PNG: every image finds its own again."""
    Image.fromarray(make_picture(20, 24, seed=9)).save(masked / "0.bmp")
    pack(listed(masked, "0.png\tm1.png\n0.bmp\tm2.png\n"), tmp_path / "db.lmdb")
    fastload.cli.main(["unpack", str(tmp_path / "db.lmdb"), str(tmp_path / "files")])
    assert pack(tmp_path / "files", tmp_path / "again.lmdb").samples == 2
    first, again = (ImageDataset(tmp_path / name) for name in ("db.lmdb", "again.lmdb"))
    assert {(image.sum().item(), mask[0, 0].item()) for image, mask in first} == {
        (image.sum().item(), mask[0, 0].item()) for image, mask in again
    }


# ---- labelme


CAT = {"label": "cat", "points": [[2, 2], [10, 2], [10, 12]], "shape_type": "polygon", "group_id": None}
DOG = {"label": "dog", "points": [[12, 4], [20, 15]], "shape_type": "rectangle", "group_id": None}
VOID = {"label": "__ignore__", "points": [[0, 18], [23, 19]], "shape_type": "rectangle", "group_id": None}


def annotate(path: Path, image: str, *shapes: dict[str, Any], data: bytes | None = None, **more: Any) -> None:
    """A labelme file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = None if data is None else base64.b64encode(data).decode()
    path.write_text(json.dumps({"version": "5", "shapes": shapes, "imagePath": image, "imageData": text, **more}))


def encoded(image: Array, suffix: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(image).save(file, suffix, exif=exif)
    return file.getvalue()


@pytest.fixture
def labelme(tmp_path: Path, make_picture: Picture) -> Path:
    """Annotations: of a file beside, of a file in a sub-folder, with the image embedded, and two that are broken."""
    root = tmp_path / "labelme"
    (root / "images").mkdir(parents=True)
    (root / "a.png").write_bytes(encoded(make_picture(20, 24, seed=0)))
    (root / "images" / "b.png").write_bytes(encoded(make_picture(20, 24, seed=1)))
    annotate(root / "a.json", "a.png", CAT, DOG, VOID)
    annotate(root / "b.json", "images\\b.png", DOG, {**DOG, "points": [[0, 0], [3, 3]]}, imageHeight=20, imageWidth=24)
    annotate(root / "c.json", "C:\\gone\\c.png", CAT, data=encoded(make_picture(20, 24, seed=2)))
    (root / "d.json").write_text('{"shapes": [}, "imagePath": "a.png"')
    annotate(root / "e.json", "a.png", CAT, {**CAT, "points": [[1, 1]]})
    return root


def test_a_labelme_folder_becomes_dicts(run: Run, labelme: Path, make_picture: Picture, tmp_path: Path) -> None:
    """Image, classes and instances of each file, embedded images too; what is broken is left out, the place named."""
    status, _, err = run("pack", labelme, tmp_path / "db.lmdb")
    assert status == 3
    assert "left out: 2 files" in err
    found = quarantine(tmp_path / "db.lmdb")
    assert set(found) == {"d.json", "e.json"}
    assert "line 1 column 13" in found["d.json"]
    assert found["e.json"] == "shape 2 ('cat'): a polygon has 1 point, it needs at least 3"
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.fields == ("image", "mask", "instances")
    assert dataset.classes == ["_background_", "cat", "dog"]
    batch = only_batch(dataset)
    assert isinstance(batch, dict)
    assert batch["image"].shape == (3, 3, 20, 24)
    for i in range(3):
        assert np.array_equal(batch["image"][i].permute(1, 2, 0), make_picture(20, 24, seed=i))
    assert batch["mask"][:, 8, 15].tolist() == [2, 2, 0]
    assert batch["mask"][:, 3, 8].tolist() == [1, 0, 1]
    assert batch["mask"][:, 18, 5].tolist() == [IGNORED, 0, 0]
    assert batch["instances"][:, 8, 15].tolist() == [2, 1, 0]
    assert batch["instances"][:, 1, 1].tolist() == [0, 2, 0]
    assert batch["instances"][:, 18, 5].tolist() == [0, 0, 0]


def test_masks_and_instances_of_labelme_follow_their_image(labelme: Path, tmp_path: Path) -> None:
    """Cropped beyond the edges: black, ignored, no instance; mirrored together; a placeholder is all ignored."""
    pack(labelme, tmp_path / "db.lmdb")
    plain = ImageDataset(tmp_path / "db.lmdb")[0]
    wide = ImageDataset(tmp_path / "db.lmdb", CenterCrop((20, 30)))[0]
    for name, fill in (("image", 0), ("mask", IGNORED), ("instances", 0)):
        assert torch.equal(wide[name][..., 3:27], plain[name])
        assert (wide[name][..., :3] == fill).all()
        assert (wide[name][..., 27:] == fill).all()
    mirrored = ImageDataset(tmp_path / "db.lmdb", RandomHorizontalFlip(1.0))[0]
    assert all(torch.equal(mirrored[name], plain[name].flip(-1)) for name in plain)
    damaged = ImageDataset(broken(tmp_path / "db.lmdb", tmp_path / "damaged.lmdb", 1))[1]
    assert not damaged["image"].any()
    assert (damaged["mask"] == IGNORED).all()
    assert not damaged["instances"].any()


def test_a_file_of_labels_says_the_values(run: Run, labelme: Path, tmp_path: Path) -> None:
    """`--labels` has more classes in another order; a label that isn't there is left out, the file named."""
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ndog\nbird\ncat\n")
    assert run("pack", labelme, tmp_path / "db.lmdb", "--labels", tmp_path / "labels.txt")[0] == 3
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.classes == ["_background_", "dog", "bird", "cat"]
    assert dataset[0]["mask"].unique().tolist() == [0, 1, 3, IGNORED]
    (tmp_path / "few.txt").write_text("dog\n")
    assert run("pack", labelme, tmp_path / "few.lmdb", "--labels", tmp_path / "few.txt")[0] == 3
    reason = quarantine(tmp_path / "few.lmdb")["a.json"]
    assert "shape 1 ('cat')" in reason
    assert "few.txt" in reason
    assert len(Store(tmp_path / "few.lmdb")) == 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_annotations_of_turned_photographs(tmp_path: Path, make_picture: Picture, orientation: int) -> None:
    """labelme shows a photograph upright, and so are its masks."""
    upright = make_picture(20, 24)
    upright[4:16, 12:21] = (255, 0, 0)
    way = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(upright)
    stored = stored.transpose(way[orientation]) if orientation in way else stored
    (tmp_path / "x.png").write_bytes(encoded(np.asarray(stored), orientation=orientation))
    annotate(tmp_path / "x.json", "x.png", DOG, imageHeight=20, imageWidth=24)
    pack(tmp_path, tmp_path / "db.lmdb", format="labelme")
    sample = ImageDataset(tmp_path / "db.lmdb")[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0), upright)
    red = (sample["image"] == torch.tensor([255, 0, 0]).view(3, 1, 1)).all(dim=0)
    assert torch.equal(red, sample["mask"] == 1)


@pytest.mark.parametrize("first", ["", '{"names": ["cat"]}', "[", "[]"], ids=["empty", "another", "broken", "list"])
def test_one_file_does_not_hide_that_a_folder_is_labelme_s(labelme: Path, tmp_path: Path, first: str) -> None:
    """A first JSON file that is none of labelme's must not make a folder of photos of it: all annotations were lost."""
    (labelme / "0.json").write_text(first)
    pack(labelme, tmp_path / "db.lmdb")
    assert Store(tmp_path / "db.lmdb").manifest["source"] == "labelme"
    assert set(quarantine(tmp_path / "db.lmdb")) == {"0.json", "d.json", "e.json"}


def test_a_labelme_store_packed_again_is_the_same(labelme: Path, tmp_path: Path) -> None:
    """Masks, instances, classes and what was left out."""
    pack(labelme, tmp_path / "db.lmdb")
    pack(tmp_path / "db.lmdb", tmp_path / "again.lmdb", encode="raw")
    first, again = (ImageDataset(tmp_path / name) for name in ("db.lmdb", "again.lmdb"))
    assert first.classes == again.classes
    assert all(torch.equal(first[i][name], again[i][name]) for i in range(3) for name in first.fields)
    assert quarantine(tmp_path / "db.lmdb") == quarantine(tmp_path / "again.lmdb")


def test_unpacked_images_are_not_called_as_their_annotations(labelme: Path, tmp_path: Path) -> None:
    """`a.json` with a PNG in it would be of no use to anybody."""
    pack(labelme, tmp_path / "db.lmdb")
    fastload.cli.main(["unpack", str(tmp_path / "db.lmdb"), str(tmp_path / "files")])
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert {(path.suffix, path.read_bytes()[:4]) for path in files if path.name != "classes.txt"} == {
        (".png", b"\x89PNG")
    }
    pack(tmp_path / "files", tmp_path / "again.lmdb", labels=tmp_path / "files" / "classes.txt")
    assert Store(tmp_path / "again.lmdb").classes == Store(tmp_path / "db.lmdb").classes
    assert len(Store(tmp_path / "again.lmdb")) == 3


def test_annotations_beside_their_images_are_labelme_s(tmp_path: Path, make_picture: Picture) -> None:
    """In a folder called annotations, as masks may be, with images elsewhere: told by what the files are."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "a.png").write_bytes(encoded(make_picture(20, 24, seed=0)))
    annotate(tmp_path / "in" / "annotations" / "a.json", "../images/a.png", CAT)
    pack(tmp_path / "in", tmp_path / "db.lmdb")
    assert set(ImageDataset(tmp_path / "db.lmdb")[0]) == {"image", "mask", "instances"}


def test_annotations_of_one_image_stay_in_one_part(tmp_path: Path, make_picture: Picture) -> None:
    """Files that name the same image are never in two parts, and a changed image is another source."""
    for number in range(8):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number % 4}.png").write_bytes(encoded(make_picture(20, 24, seed=number % 4)))
        annotate(tmp_path / "in" / f"{number}.json", f"{number % 4}.png", CAT)
    pack_splits(tmp_path / "in", tmp_path / "db.lmdb", "a=0.5,b=0.5")
    parts = [{int(store[i].name[0]) % 4 for i in range(4)} for store in map(Store, sorted(tmp_path.glob("*.lmdb")))]
    assert sorted(parts[0] | parts[1]) == [0, 1, 2, 3]
    assert not parts[0] & parts[1]
    before = open_source(tmp_path / "in").digest()
    os.utime(tmp_path / "in" / "0.png", (0, 0))
    assert open_source(tmp_path / "in").digest() != before


# ---- MNIST


def idx(array: Array) -> bytes:
    """An IDX file of bytes."""
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def digits(count: int, seed: int) -> Array:
    """Grey images of 28 x 28, smooth enough to be resized."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 7, 7), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((28, 28), Image.Resampling.BICUBIC)) for c in coarse])


TRAIN, TEST = digits(9, seed=1), digits(4, seed=2)
GREY = np.concatenate([TRAIN, TEST])
LABELS = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 7, 2, 1, 0], np.uint8)


@pytest.fixture(scope="module")
def mnist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is downloaded, in part gunzipped."""
    root = tmp_path_factory.mktemp("mnist")
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(TRAIN)))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:9]))
    (root / "t10k-images-idx3-ubyte").write_bytes(idx(TEST))
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[9:])))
    return root


@pytest.fixture(scope="module")
def mnist(mnist_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MNIST's format."""
    path = tmp_path_factory.mktemp("stores") / "mnist.lmdb"
    assert pack(mnist_folder, path).samples == 13
    return path


def test_mnist_comes_in_one_channel_and_one_gather(mnist: Path) -> None:
    """`torch.Size([1, 28, 28])`, the file's pixels, and batches that are one buffer."""
    dataset = ImageDataset(mnist)
    assert dataset.channels == 1
    assert dataset[0][0].shape == torch.Size([1, 28, 28])
    assert dataset.reads_whole_batches
    assert dataset.parts(13) == 1
    images, labels = only_batch(dataset)
    assert images.shape == (13, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert np.array_equal(images[:, 0], GREY)
    assert np.array_equal(labels, LABELS)
    assert labels.dtype == torch.int64
    assert torch.equal(dataset.read(2), images[2])
    assert np.array_equal(dataset.read(2, (3, 5, 10, 7))[0], GREY[2, 5:12, 3:13])
    assert [dataset.store.name(i) for i in (0, 8, 9)] == ["train/00000", "train/00008", "test/00000"]


@pytest.mark.parametrize(("part", "first", "last"), [("train", 0, 9), ("test", 9, 13), (None, 0, 13)])
def test_a_part_of_mnist(run: Run, mnist_folder: Path, tmp_path: Path, part: str | None, first: int, last: int) -> None:
    """`part=` and `--split train` take it as the files have it."""
    pack(mnist_folder, tmp_path / "db.lmdb", part=part)
    images, labels = only_batch(ImageDataset(tmp_path / "db.lmdb"))
    assert np.array_equal(images[:, 0], GREY[first:last])
    assert np.array_equal(labels, LABELS[first:last])
    if part is not None:
        status, out, _ = run("pack", mnist_folder, tmp_path / "cli.lmdb", "--split", part, "--json")
        assert status == 0
        assert json.loads(out)["samples"] == last - first
        assert Store(tmp_path / "cli.lmdb").manifest["digest"] == Store(tmp_path / "db.lmdb").manifest["digest"]


def test_parts_that_are_not_there(run: Run, mnist_folder: Path, photos: Path, tmp_path: Path) -> None:
    """Other names, and sources without parts, are refused in words."""
    for source, words in ((mnist_folder, ["'val'", "train, test"]), (photos, ["'val'", "mnist, cifar, parquet"])):
        status, _, err = run("pack", source, tmp_path / "db.lmdb", "--split", "val")
        assert status == 2
        assert all(word in err for word in words)
    assert not list(tmp_path.glob("db*"))


@pytest.mark.parametrize("image_type", ["tensor", "numpy", "pil"])
@pytest.mark.parametrize("transform", [None, Resize(28)], ids=["gathered", "drawn"])
def test_types_of_grey_images(mnist: Path, image_type: Any, transform: Any) -> None:
    """Tensors (1, 28, 28), arrays (28, 28, 1), PIL images of mode L, gathered or drawn one by one."""
    dataset = ImageDataset(mnist, transform, image_type=image_type)
    for i in (0, 12):
        image = dataset[i][0]
        if image_type == "tensor":
            assert image.shape == (1, 28, 28)
            image = image[0]
        elif image_type == "numpy":
            assert image.shape == (28, 28, 1)
            image = image[..., 0]
        else:
            assert image.mode == "L"
        assert np.array_equal(image, GREY[i])


def test_random_crops_of_grey_images_with_padding(mnist: Path) -> None:
    """Each picture is a window of the padded image, mirrored or not, and all kinds of them come."""
    dataset = ImageDataset(mnist, Compose([RandomCrop(28, padding=4), RandomHorizontalFlip()]), seed=3)
    places = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        images, _ = only_batch(dataset)
        for number, image in enumerate(images[:, 0].numpy()):
            padded = np.pad(GREY[number], 4)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (28, 28))
            found = {
                (y, x, mirrored)
                for mirrored, shown in ((False, image), (True, image[:, ::-1]))
                for y, x in np.argwhere((windows == shown).all((-1, -2))).tolist()
            }
            assert found, number
            places |= found
    assert {mirrored for _, _, mirrored in places} == {False, True}
    assert {y for y, _, _ in places} >= {0, 8} or len({y for y, _, _ in places}) > 6


def test_flips_and_resizes_of_grey_images_are_the_references(mnist: Path) -> None:
    """Mirrored exactly; resized as torch's interpolation does it, antialiased, within one level; all in one channel."""
    flipped, _ = only_batch(ImageDataset(mnist, RandomHorizontalFlip(1.0)))
    assert np.array_equal(flipped[:, 0], GREY[:, :, ::-1])
    whole = torch.from_numpy(GREY)[:, None].float()
    for transform, size in ((Resize((13, 40)), (13, 40)), (Resize(14), (14, 14)), (Resize(64), (64, 64))):
        images, _ = only_batch(ImageDataset(mnist, transform))
        expected = torch.nn.functional.interpolate(whole, size, mode="bilinear", antialias=True)
        assert images.shape == expected.shape
        assert (images.float() - expected).abs().max() <= 1
    centre, _ = only_batch(ImageDataset(mnist, CenterCrop((10, 12))))
    assert np.array_equal(centre[:, 0], GREY[:, 9:19, 8:20])


def test_one_mean_for_one_channel(mnist: Path) -> None:
    """Normalize takes as many numbers as there are channels, and says so."""
    images, _ = only_batch(ImageDataset(mnist, Normalize([0.1307], [0.3081])))
    expected = (torch.from_numpy(GREY)[:, None].float() / 255 - 0.1307) / 0.3081
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=1e-6)
    with pytest.raises(ValueError, match="3 channels of mean"):
        ImageDataset(mnist, Normalize([0.5] * 3, [0.5] * 3))[0]
    loader = fastload.make_loader(
        ImageDataset(mnist, CenterCrop(20)), 4, train=True, num_workers=0, device="cpu", mean=[0.5], std=[0.25]
    )
    batch, labels = next(iter(loader))
    assert batch.shape == (4, 1, 20, 20)
    assert batch.is_floating_point()
    assert labels.shape == (4,)


@pytest.mark.parametrize("on_error", ["placeholder", "skip", "raise"])
def test_a_cache_and_on_error_change_nothing_of_whole_grey_images(mnist: Path, on_error: Any) -> None:
    """A raw column needs no cache and has nothing to fail, but takes both options."""
    dataset = ImageDataset(mnist, RandomCrop(28), cache="1MB", on_error=on_error, max_failures=0)
    for _ in range(2):
        images, labels = only_batch(dataset)
        assert np.array_equal(images[:, 0], GREY)
        assert np.array_equal(labels, LABELS)


def test_verify_finds_a_pixel_that_changed(run: Run, mnist: Path, tmp_path: Path) -> None:
    """Whole: nothing. One byte of one row: that sample, by its name; `unpack` stops there, packing leaves it out."""
    assert run("verify", "--decode", mnist)[0] == 0
    data, row = mnist.read_bytes(), GREY[10].tobytes()
    assert data.count(row) == 1
    damaged = tmp_path / "damaged.lmdb"
    damaged.write_bytes(data.replace(row, bytes([row[0] ^ 1]) + row[1:]))
    status, out, _ = run("verify", damaged)
    assert status == 1
    assert out.startswith("sample 10 test/00001: ")
    status, _, err = run("unpack", damaged, tmp_path / "files")
    assert status == 1
    assert "test/00001" in err
    assert run("pack", damaged, tmp_path / "again.lmdb")[0] == 3
    assert list(quarantine(tmp_path / "again.lmdb")) == ["test/00001"]
    assert np.array_equal(only_batch(ImageDataset(tmp_path / "again.lmdb"))[1], np.delete(LABELS, 10))


def test_unpacked_digits_are_grey_pngs_that_can_be_packed_again(run: Run, mnist: Path, tmp_path: Path) -> None:
    """PNG files and a list; the same pixels and labels come of them, raw or kept."""
    assert run("unpack", mnist, tmp_path / "files")[0] == 0
    files = sorted(path.relative_to(tmp_path / "files").as_posix() for path in (tmp_path / "files").rglob("*.png"))
    assert files == sorted([f"train/{i:05}.png" for i in range(9)] + [f"test/{i:05}.png" for i in range(4)])
    with Image.open(tmp_path / "files" / "test" / "00003.png") as image:
        assert image.mode == "L"
        assert np.array_equal(image, GREY[12])
    for encode in ("keep", "raw"):
        store = tmp_path / f"{encode}.lmdb"
        assert run("pack", tmp_path / "files" / "labels.tsv", store, "--encode", encode)[0] == 0
        images, labels = only_batch(ImageDataset(store))
        assert np.array_equal(images, np.repeat(GREY[:, None], 3, axis=1))
        assert np.array_equal(labels, LABELS)


def test_a_store_of_digits_packed_again(run: Run, mnist: Path, mnist_folder: Path, tmp_path: Path) -> None:
    """From store to store they stay one channel in a column; smaller ones too; as JPEG they get three."""
    assert run("pack", mnist, tmp_path / "again.lmdb")[0] == 0
    images, labels = only_batch(ImageDataset(tmp_path / "again.lmdb"))
    assert np.array_equal(images[:, 0], GREY)
    assert np.array_equal(labels, LABELS)
    assert info(tmp_path / "again.lmdb")["stored"] == "column"
    assert run("pack", mnist_folder, tmp_path / "small.lmdb", "--short-side", "14")[0] == 0
    assert run("pack", mnist, tmp_path / "small-again.lmdb", "--short-side", "14")[0] == 0
    small, small_again = (only_batch(ImageDataset(tmp_path / f"{n}.lmdb"))[0] for n in ("small", "small-again"))
    assert small.shape == (13, 1, 14, 14)
    assert torch.equal(small, small_again)
    whole = torch.from_numpy(GREY)[:, None].float()
    expected = torch.nn.functional.interpolate(whole, (14, 14), mode="bilinear", antialias=True)
    assert (small.float() - expected).abs().max() <= 1
    assert run("pack", mnist_folder, tmp_path / "jpeg.lmdb", "--encode", "jpeg", "--quality", "95")[0] == 0
    jpeg, _ = only_batch(ImageDataset(tmp_path / "jpeg.lmdb"))
    assert jpeg.shape == (13, 3, 28, 28)
    assert np.abs(jpeg.numpy().astype(int) - GREY[:, None]).mean() < 4


def test_digits_that_were_replaced_are_not_mixed_with_an_interrupted_pack(
    mnist_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack that stopped half-way goes on only if the files are still those; here others of the same size came."""
    monkeypatch.setattr("fastload.store.COLUMN_CHUNK", 2 * 784)
    folder = tmp_path / "mnist"
    shutil.copytree(mnist_folder, folder)
    seen = stop_after(folder, tmp_path / "db.lmdb", 6)
    assert seen[0] == 1
    assert stop_after(folder, tmp_path / "db.lmdb", 8)[0] > 1, "it goes on"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(255 - TRAIN)))
    pack(folder, tmp_path / "db.lmdb")
    images, _ = only_batch(ImageDataset(tmp_path / "db.lmdb"))
    assert np.array_equal(images[:9, 0], 255 - TRAIN)


def stop_after(source: Path, destination: Path, count: int) -> list[int]:
    """Interrupt a pack when so many items are done; what its progress said."""
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done >= count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, destination, progress=stop)
    assert not destination.exists()
    return seen


def test_a_network_needs_classes(run: Run, labelme: Path, real: Path, tmp_path: Path) -> None:
    """Masks and real values are no classes: the message says what else can be measured."""
    pack(labelme, tmp_path / "db.lmdb")
    for store in (tmp_path / "db.lmdb", real):
        status, _, error = run("bench", store, "--consumer", "network", "--seconds", "0.1")
        assert status == 2
        assert "--step-ms" in error


def test_a_network_is_measured_on_one_channel(run: Run, mnist: Path) -> None:
    """`bench --consumer network` takes the channels that there are."""
    arguments = ("--consumer", "network", "--workers", "0", "--batch-size", "4", "--seconds", "0.05", "--size", "16")
    status, _, err = run("bench", mnist, *arguments, "--device", "cpu")
    assert (status, err) == (0, "")


# ---- CIFAR


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's binary version, four images in each batch; its number and theirs are in the first byte."""
    root = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels = rng.integers(0, 256, (4, 3, 32, 32), np.uint8)
        pixels[:, 0, 0, 0] = 10 * number + np.arange(4)
        rows = [bytes([(number + i) % 10]) + image.tobytes() for i, image in enumerate(pixels)]
        (root / f"{name}.bin").write_bytes(b"".join(rows))
    (root / "batches.meta.txt").write_text("".join(f"kind{n}\n" for n in range(10)) + "\n")
    return root


def test_cifar_from_its_files_and_back(run: Run, cifar_folder: Path, tmp_path: Path) -> None:
    """Pixels in their planes' order, classes by name, parts, files; all in one column."""
    assert run("pack", cifar_folder.parent, tmp_path / "db.lmdb")[0] == 0
    dataset = ImageDataset(tmp_path / "db.lmdb")
    assert dataset.channels == 3
    assert dataset.classes == [f"kind{n}" for n in range(10)]
    images, labels = only_batch(dataset)
    assert images[:, 0, 0, 0].tolist() == [10 * number + i for number in range(6) for i in range(4)]
    assert labels.tolist() == [(number + i) % 10 for number in range(6) for i in range(4)]
    record = (cifar_folder / "data_batch_2.bin").read_bytes()[3073 + 1 : 2 * 3073]
    assert images[5].contiguous().numpy().tobytes() == record
    assert run("pack", cifar_folder, tmp_path / "test.lmdb", "--split", "test")[0] == 0
    assert torch.equal(only_batch(ImageDataset(tmp_path / "test.lmdb"))[0], images[20:])
    assert run("unpack", tmp_path / "db.lmdb", tmp_path / "files")[0] == 0
    assert run("pack", tmp_path / "files" / "labels.tsv", tmp_path / "again.lmdb", "--encode", "raw")[0] == 0
    again, again_labels = only_batch(ImageDataset(tmp_path / "again.lmdb"))
    assert torch.equal(again, images)
    assert torch.equal(again_labels, labels)


# ---- splits


@pytest.fixture
def animals(tmp_path: Path, make_picture: Picture) -> Path:
    """Three classes of 20, 10 and 5 small PNG files, each of which is another picture."""
    for count, name in ((20, "ant"), (10, "bee"), (5, "cat")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(count):
            image = np.full((8, 8, 3), (count, i, 7), np.uint8)
            Image.fromarray(image).save(tmp_path / "animals" / name / f"{i:02}.png")
    return tmp_path / "animals"


def names_in(store: Path) -> list[str]:
    opened = Store(store)
    return [opened.name(i) for i in range(len(opened))]


def test_parts_are_a_partition_of_each_class(run: Run, animals: Path, tmp_path: Path) -> None:
    """db-train.lmdb and db-val.lmdb: every file in one of them, 4 of 5 of each class, labels and classes as ever."""
    status, out, err = run("pack", animals, tmp_path / "db.lmdb", "--split", "train=0.8,val=0.2", "--seed", "1")
    assert (status, err) == (0, "")
    lines = [line.split(":")[0] for line in out.splitlines()]
    assert lines == [str(tmp_path / "db-train.lmdb"), str(tmp_path / "db-val.lmdb")]
    assert sorted(path.name for path in tmp_path.glob("db*")) == ["db-train.lmdb", "db-val.lmdb"]
    train, val = (names_in(tmp_path / f"db-{part}.lmdb") for part in ("train", "val"))
    assert sorted(train + val) == sorted(p.relative_to(animals).as_posix() for p in animals.rglob("*.png"))
    assert train == sorted(train)
    for part, share in (("train", 0.8), ("val", 0.2)):
        dataset = ImageDataset(tmp_path / f"db-{part}.lmdb")
        assert dataset.classes == ["ant", "bee", "cat"]
        assert np.bincount(dataset.targets).tolist() == [20 * share, 10 * share, 5 * share]
        for name, (image, label) in zip(names_in(tmp_path / f"db-{part}.lmdb"), dataset, strict=False):
            assert dataset.classes[int(label)] == name.split("/")[0]
            assert int(image[1, 0, 0]) == int(name[-6:-4])


def test_the_same_seed_gives_the_same_parts(animals: Path, tmp_path: Path) -> None:
    """Also from a copy elsewhere; another seed gives others."""
    shutil.copytree(animals, tmp_path / "copy" / "elsewhere")
    sources = (animals, tmp_path / "copy" / "elsewhere", animals)
    for number, (source, seed) in enumerate(zip(sources, (1, 1, 2), strict=True)):
        pack_splits(source, tmp_path / f"{number}.lmdb", "train=80,val=20", seed=seed)
    found = [names_in(tmp_path / f"{number}-val.lmdb") for number in range(3)]
    assert found[0] == found[1] != found[2]
    pack_splits(animals, tmp_path / "free.lmdb", {"a": 0.5, "b": 0.5}, stratify=False)
    assert len(Store(tmp_path / "free-a.lmdb")) in (17, 18)


def test_json_of_parts(run: Run, animals: Path, tmp_path: Path) -> None:
    """One object, a part's figures by its name; the exit status counts what any part left out."""
    (animals / "cat" / "99.png").write_bytes(b"junk")
    status, out, err = run("pack", animals, tmp_path / "db.lmdb", "--split", "a=0.5,b=0.25,c=0.25", "--json")
    figures = json.loads(out)
    assert status == 3
    assert list(figures) == ["a", "b", "c"]
    assert all(set(f) == {"samples", "classes", "quarantined", "bytes", "seconds"} for f in figures.values())
    assert sum(f["samples"] for f in figures.values()) == 35
    assert sum(f["quarantined"] for f in figures.values()) == 1
    (part,) = (part for part, f in figures.items() if f["quarantined"])
    assert f"db-{part}.lmdb` says why" in err


@posix
def test_no_file_is_in_two_parts(tmp_path: Path, make_picture: Picture) -> None:
    """Under two names, by a link, or with several spellings: where a file goes, all its names go."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for i in range(20):
        Image.fromarray(make_picture(8, 8, seed=i)).save(folder / f"{i:02}.png")
        (folder / f"link{i:02}.png").symlink_to(folder / f"{i:02}.png")
        lines += [f"{i:02}.png {i % 2}", f"link{i:02}.png {i % 2}", f"../photos/{i:02}.png {i % 2}"]
    path = listed(folder, "\n".join(lines))
    for seed in range(3):
        pack_splits(path, tmp_path / f"db{seed}.lmdb", "train=0.5,val=0.5", seed=seed)
        parts = [{name[-6:] for name in names_in(tmp_path / f"db{seed}-{part}.lmdb")} for part in ("train", "val")]
        assert parts[0].isdisjoint(parts[1])
        assert len(parts[0] | parts[1]) == 20


def test_a_target_that_exists_is_refused_before_anything_is_written(run: Run, animals: Path, tmp_path: Path) -> None:
    """The last part's as well as the first one's; `--overwrite` replaces both, if they are stores."""
    pack(animals, tmp_path / "db-val.lmdb", encode="raw", short_side=4)
    precious = (tmp_path / "db-val.lmdb").read_bytes()
    arguments = ("pack", animals, tmp_path / "db.lmdb", "--split", "train=0.8,val=0.2")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "db-val.lmdb exists already" in err
    assert [path.name for path in tmp_path.glob("db*")] == ["db-val.lmdb"]
    assert (tmp_path / "db-val.lmdb").read_bytes() == precious
    assert run(*arguments, "--overwrite")[0] == 0
    assert len(Store(tmp_path / "db-val.lmdb")) == 7
    (tmp_path / "db-val.lmdb").write_bytes(b"precious")
    assert run(*arguments, "--overwrite")[0] == 2
    assert (tmp_path / "db-val.lmdb").read_bytes() == b"precious"


def test_an_interrupted_split_goes_on(animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first part: the same call takes up the partial store and completes all parts."""
    monkeypatch.setattr("fastload.store_writer._STEP_BYTES", 1)
    done_before: list[int] = []

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_splits(animals, tmp_path / "db.lmdb", "train=0.8,val=0.2", seed=1, progress=stop)
    assert [path.name for path in tmp_path.glob("db*")] == ["db-train.lmdb.partial"]
    pack_splits(
        animals,
        tmp_path / "db.lmdb",
        "train=0.8,val=0.2",
        seed=1,
        progress=lambda done, total: done_before.append(done),
    )
    assert 1 < done_before[0] <= 11, "it goes on"
    assert sorted(path.name for path in tmp_path.glob("db*")) == ["db-train.lmdb", "db-val.lmdb"]
    pack_splits(animals, tmp_path / "whole.lmdb", "train=0.8,val=0.2", seed=1)
    for part in ("train", "val"):
        assert names_in(tmp_path / f"db-{part}.lmdb") == names_in(tmp_path / f"whole-{part}.lmdb")


def test_a_split_interrupted_in_its_second_part_goes_on(animals: Path, tmp_path: Path) -> None:
    """The first part is complete and is kept as it is; another source, other options or another store are refused."""

    def stop(done: int, total: int) -> None:
        if (tmp_path / "db-train.lmdb").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_splits(animals, tmp_path / "db.lmdb", "train=0.8,val=0.2", seed=1, progress=stop)
    before = (tmp_path / "db-train.lmdb").stat()
    for other in ({"seed": 2}, {"seed": 1, "short_side": 5}):
        with pytest.raises(FileExistsError, match=r"db-train\.lmdb exists already"):
            pack_splits(animals, tmp_path / "db.lmdb", "train=0.8,val=0.2", **other)
    reports = pack_splits(animals, tmp_path / "db.lmdb", "train=0.8,val=0.2", seed=1)
    after = (tmp_path / "db-train.lmdb").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert {name: report.samples for name, report in reports.items()} == {
        part: len(Store(tmp_path / f"db-{part}.lmdb")) for part in ("train", "val")
    }


def test_stores_inside_their_source_are_no_samples(run: Run, photos: Path) -> None:
    """Packing a flat folder into itself, again and again."""
    for _ in range(2):
        status, out, _ = run("pack", photos, photos / "db.lmdb", "--split", "a=0.5,b=0.5", "--overwrite", "--json")
        assert status == 0
        assert [part["samples"] for part in json.loads(out).values()] == [3, 3]
    assert sorted(path.name for path in photos.iterdir() if path.suffix != ".png") == ["db-a.lmdb", "db-b.lmdb"]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ("train=0.5", "sum to 0.5"),
        ("train=0.9,val=0.9", "sum to 1.8"),
        ("train=-1,val=2", "'train=-1'"),
        ("train=nan,val=1", "'train=nan'"),
        ("train=,val=1", "'train='"),
        ("=1", "'=1'"),
        ("../x=0.5,y=0.5", "'../x=0.5'"),
        ("a/b=1", "'a/b=1'"),
        ("train=0.5,TRAIN=0.5", "twice"),
        ("train=0.5,val=0.5,", "''"),
        ("train=1,val=0", "'val'"),
        ("train=0.99,val=0.01", "'val'"),
    ],
)
def test_silly_shares_write_nothing(run: Run, animals: Path, tmp_path: Path, shares: str, words: str) -> None:
    """Status 2, the part named, and no store of any part: not even of those that would have had samples."""
    status, out, err = run("pack", animals, tmp_path / "db.lmdb", "--split", shares)
    assert (status, out) == (2, "")
    assert words in err
    assert not list(tmp_path.glob("db*"))


@pytest.mark.parametrize(
    "shares", [{}, {"train": 80, "val": 20}, {"a/b": 1.0}, {"../up": 1.0}, {"a": 0.5, "A": 0.5}, {"": 1.0}]
)
def test_silly_shares_in_python(animals: Path, tmp_path: Path, shares: dict[str, float]) -> None:
    """A dict is held to what the text is held to; each name is a part of a file name."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"share|part|name"):
        pack_splits(animals, tmp_path / "db.lmdb", shares)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_pack_reach_every_part(animals: Path, tmp_path: Path) -> None:
    """And those that `pack` refuses are refused, before anything is written."""
    reports = pack_splits(animals, tmp_path / "db.lmdb", "a=0.5,b=0.5", encode="raw", short_side=4, workers=1)
    assert list(reports) == ["a", "b"]
    for part in "ab":
        assert ImageDataset(tmp_path / f"db-{part}.lmdb")[0][0].shape == (3, 4, 4)
    for wrong in ({"quality": 101}, {"workers": 0}, {"format": "zip"}, {"part": "train"}):
        with pytest.raises((ValueError, SourceError)):
            pack_splits(animals, tmp_path / "x.lmdb", "a=0.5,b=0.5", **wrong)
    with pytest.raises(TypeError):
        pack_splits(animals, tmp_path / "x.lmdb", "a=0.5,b=0.5", sort_side=4)
    assert not list(tmp_path.glob("x*"))


def test_masks_and_digits_are_split_too(mnist: Path, mnist_folder: Path, labelme: Path, tmp_path: Path) -> None:
    """Whatever the source is, nothing is lost between the parts."""
    for number, source in enumerate((mnist, mnist_folder, labelme)):
        reports = pack_splits(source, tmp_path / f"{number}.lmdb", "a=0.5,b=0.5")
        samples = sum(report.samples for report in reports.values())
        assert samples == (3 if source == labelme else 13)
        names = names_in(tmp_path / f"{number}-a.lmdb") + names_in(tmp_path / f"{number}-b.lmdb")
        assert len(set(names)) == samples


# ---- bad input


def junk_folder(root: Path) -> list[str]:
    (root / "junk").mkdir()
    (root / "junk" / "a.txt").write_text("no image")
    (root / "junk" / "b.txt").touch()
    return ["junk", "--format", "flat"]


def junk_mnist(root: Path) -> list[str]:
    (root / "m").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (root / "m" / name).write_bytes(b"junk" * 9)
    return ["m", "--format", "mnist"]


def empty_mnist(root: Path) -> list[str]:
    (root / "m").mkdir()
    (root / "m" / "train-images-idx3-ubyte.gz").touch()
    (root / "m" / "train-labels-idx1-ubyte.gz").touch()
    return ["m", "--format", "mnist"]


def cut_mnist(root: Path) -> list[str]:
    (root / "m").mkdir()
    (root / "m" / "train-images-idx3-ubyte").write_bytes(idx(TRAIN)[:-1])
    (root / "m" / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:9]))
    return ["m"]


def folders_of_mnist(root: Path) -> list[str]:
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (root / "m" / name).mkdir(parents=True)
    return ["m", "--format", "mnist"]


def junk_cifar(root: Path) -> list[str]:
    (root / "c").mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (root / "c" / name).write_bytes(b"\x80junk")
    return ["c"]


def folders_of_cifar(root: Path) -> list[str]:
    (root / "c" / "data_batch_1").mkdir(parents=True)
    return ["c", "--format", "cifar"]


def junk_labelme(root: Path) -> list[str]:
    (root / "l").mkdir()
    (root / "l" / "a.json").write_text('{"shapes": 3, "imagePath": 4}')
    (root / "l" / "b.json").touch()
    return ["l"]


def folders_of_labelme(root: Path) -> list[str]:
    (root / "l" / "a.json").mkdir(parents=True)
    return ["l", "--format", "labelme"]


def binary_list(root: Path) -> list[str]:
    (root / "list.txt").write_bytes(bytes(range(256)) * 20)
    return ["list.txt"]


def list_of_folders(root: Path) -> list[str]:
    (root / "a.png").mkdir()
    (root / "list.txt").write_text("a.png 1\n")
    return ["list.txt"]


def empty_list(root: Path) -> list[str]:
    (root / "list.csv").touch()
    return ["list.csv"]


def list_of_empty_files(root: Path) -> list[str]:
    (root / "a.png").touch()
    (root / "list.txt").write_text("a.png 1\n")
    return ["list.txt"]


def header_only(root: Path) -> list[str]:
    (root / "list.csv").write_text("image,label\n")
    return ["list.csv"]


def ragged_json(root: Path) -> list[str]:
    (root / "list.jsonl").write_text('{"a": 1}\n{"b": \n')
    return ["list.jsonl"]


def binary_labels(root: Path) -> list[str]:
    annotate(root / "l" / "a.json", "a.png", CAT)
    (root / "labels.bin").write_bytes(bytes(range(256)))
    return ["l", "--labels", "labels.bin"]


def folder_of_labels(root: Path) -> list[str]:
    annotate(root / "l" / "a.json", "a.png", CAT)
    (root / "labels").mkdir()
    return ["l", "--labels", "labels"]


def missing_labels(root: Path) -> list[str]:
    annotate(root / "l" / "a.json", "a.png", CAT)
    return ["l", "--labels", "labels.txt"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (junk_folder, ["none of the 2 files", "'a.txt'", "not an image"]),
        (junk_mnist, ["train-images-idx3-ubyte", "6a 75 6e 6b", "download it again"]),
        (empty_mnist, ["train-images-idx3-ubyte.gz", "0 bytes"]),
        (cut_mnist, ["train-images-idx3-ubyte", "cut short"]),
        (folders_of_mnist, ["no IDX files"]),
        (junk_cifar, ["batches.meta", "unpack CIFAR's archive again"]),
        (folders_of_cifar, ["no CIFAR batches"]),
        (junk_labelme, ["none of the 2 files", "'a.json'", "shapes"]),
        (folders_of_labelme, ["nothing to pack"]),
        (binary_list, ["list.txt", "not a text file", "line 1"]),
        (list_of_folders, ["list.txt", "line 1", "a.png"]),
        (empty_list, ["list.csv", "nothing to pack"]),
        (list_of_empty_files, ["'a.png'", "empty (0 bytes)"]),
        (header_only, ["list.csv", "nothing to pack"]),
        (ragged_json, ["list.jsonl", "line 2", "no JSON"]),
        (binary_labels, ["labels.bin", "not UTF-8"]),
        (folder_of_labels, ["labels", "no regular file"]),
        (missing_labels, ["labels.txt", "No such file"]),
    ],
)
def test_bad_input_names_the_file_and_the_reason(
    run: Run, tmp_path: Path, make: Callable[[Path], list[str]], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2, no output, no store, nothing half-written; split or not."""
    arguments = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for more in ((), ("--split", "a=0.5,b=0.5")):
        status, out, err = run("pack", arguments[0], "db.lmdb", *arguments[1:], *more)
        assert (status, out) == (2, ""), err
        if not more:
            assert all(word in err for word in words), err
        assert err.startswith("fastload: ")
        assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_only_named_like_mnist_are_what_they_are(run: Run, photos: Path, tmp_path: Path) -> None:
    """A folder of photos with a file called train-images-idx3-ubyte that is junk stays a folder of photos."""
    (photos / "train-images-idx3-ubyte").write_bytes(b"junk")
    assert run("pack", photos, tmp_path / "db.lmdb")[0] == 3
    assert len(Store(tmp_path / "db.lmdb")) == 6
    assert list(quarantine(tmp_path / "db.lmdb")) == ["train-images-idx3-ubyte"]


def some_good(root: Path, make_picture: Picture) -> Iterator[tuple[str, Path, set[str]]]:
    """(kind, source, what is left out of it): one good sample, and bad ones of every sort."""
    good = encoded(make_picture(20, 24))
    flat = root / "flat"
    flat.mkdir()
    for name, data in (("good.png", good), ("cut.png", good[:-200]), ("empty.png", b""), ("text.png", b"text")):
        (flat / name).write_bytes(data)
    bad = {"cut.png", "empty.png", "text.png"}
    yield "flat", flat, bad
    yield "list", listed(flat, "".join(f"{name} 1\n" for name in ("good.png", *sorted(bad)))), bad
    annotated = root / "annotated"
    shutil.copytree(flat, annotated)
    for name in ("good", "cut", "empty", "text"):
        annotate(annotated / f"{name}.json", f"{name}.png", CAT)
    yield "labelme", annotated, {name.replace("png", "json") for name in bad}


def test_what_is_good_is_packed_and_the_rest_is_left_out(run: Run, tmp_path: Path, make_picture: Picture) -> None:
    """Of every kind of source: status 3, and every file that isn't there is in the quarantine with its reason."""
    for kind, source, bad in some_good(tmp_path, make_picture):
        store = tmp_path / f"{kind}.lmdb"
        status, _, err = run("pack", source, store)
        assert status == 3
        assert Store(store).manifest["source"] == kind
        found = quarantine(store)
        assert set(found) - {"list.txt"} == bad
        assert all(len(reason) > 10 for reason in found.values())
        assert len(Store(store)) == 1
        assert re.search(r"left out: \d files", err)
    assert not list(tmp_path.glob("*.partial*"))
