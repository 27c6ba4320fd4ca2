"""COCO's format: what comes out of a file, which images are left out and why, and all that ends it at once."""

from __future__ import annotations

import io
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload.coco import looks_like_coco, read_coco
from fastload.errors import SourceError
from fastload.samples import EncodedImage, Samples

HEIGHT, WIDTH = 12, 16


def jpeg(size: tuple[int, int] = (HEIGHT, WIDTH), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (10, 200, 30)).save(file, "JPEG", **options)
    return file.getvalue()


IMAGE = jpeg()


def image(id: Any, name: Any = None, **more: Any) -> dict[str, Any]:
    return {
        **{"license": 1, "file_name": f"{id}.jpg" if name is None else name, "coco_url": "http://a/b.jpg"},
        **{"height": HEIGHT, "width": WIDTH, "date_captured": "2013-11-14", "id": id, **more},
    }


def annotation(image: Any, category: Any = 1, bbox: Any = (1, 2, 3, 4), **more: Any) -> dict[str, Any]:
    outline = {"segmentation": [[1.5, 2.5] * 4], "area": 12.0}
    return {**outline, "iscrowd": 0, "image_id": image, "bbox": bbox, "category_id": category, "id": 1, **more}


CATEGORIES = [{"supercategory": "animal", "id": id, "name": name} for id, name in ((90, "cat"), (1, "dog"), (7, "ant"))]


def write(folder: Path, images: Any, annotations: Any = (), categories: Any = CATEGORIES, **more: Any) -> Path:
    """A list beside its images, of which those are made that have a plain name."""
    for entry in images or ():
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if isinstance(name, str) and re.fullmatch(r"[a-z0-9]+\.jpg", name):
            (folder / name).write_bytes(IMAGE)
    content = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": annotations}
    path = folder / "instances.json"
    path.write_text(json.dumps({**content, "categories": categories, **more}), encoding="utf-8")
    return path


def listed(folder: Path, *args: Any, **more: Any) -> Samples:
    return read_coco(write(folder, *args, **more), folder)


def reason(folder: Path, *args: Any, **more: Any) -> str:
    """Why a list can't be read; the message begins with its path."""
    path = write(folder, *args, **more)
    with pytest.raises(SourceError) as caught:
        read_coco(path, folder)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# ---- what comes out


def test_boxes_and_labels_lie_beside_their_images(tmp_path: Path) -> None:
    """Annotations in any order, ids of any order: samples in the images' order, labels by the categories' ids."""
    annotations = [
        annotation(5, 90, [0, 0, 16, 12]),
        annotation(3, 1, [1.5, 2.25, 3, 4]),
        annotation(5, 7, [2, 3, 0, 5]),
        annotation(3, 90, [15.5, 0, 1, 12.5]),
    ]
    samples = listed(tmp_path, [image(5), image(4), image(3, "three.jpg")], annotations)
    assert samples.names == ["5.jpg", "4.jpg", "three.jpg"]
    assert samples.classes == ["dog", "ant", "cat"]
    assert samples.kinds == {"boxes": "boxes"}
    assert (samples.problems, samples.notes) == ({}, [])
    expected: list[Any] = [([[0, 0, 16, 12], [2, 3, 0, 5]], [2, 1]), ([], [])]
    expected += [([[1.5, 2.25, 3, 4], [15.5, 0, 1, 12.5]], [0, 2])]
    for index, (boxes, labels) in enumerate(expected):
        sample = samples.read(index)
        assert list(sample) == ["image", "boxes", "labels"]
        assert isinstance(sample["image"], EncodedImage)
        assert sample["image"] == IMAGE
        assert (sample["boxes"].dtype, sample["labels"].dtype) == (np.float32, torch.int64)
        assert (sample["boxes"].shape, sample["labels"].shape) == ((len(boxes), 4), (len(labels),))
        assert (sample["boxes"].tolist(), sample["labels"].tolist()) == (boxes, labels)


def test_crowds_are_left_out_with_a_note(tmp_path: Path) -> None:
    """A box around many people is no box of one; its outline comes in another form, which is not looked at."""
    crowd = annotation(1, iscrowd=1, segmentation={"counts": [3, 5], "size": [HEIGHT, WIDTH]}, bbox=None)
    samples = listed(tmp_path, [image(1), image(2)], [annotation(1), crowd, annotation(2, 7)])
    assert samples.notes == ["boxes around crowds (iscrowd) are left out: 1"]
    assert samples.read(0)["labels"].tolist() == [0]
    assert samples.read(1)["labels"].tolist() == [1]


def test_names_are_below_the_root(tmp_path: Path) -> None:
    """Folders in them, texts as ids, no size: as other programs write it. Categories may be called alike."""
    (tmp_path / "train" / "a b").mkdir(parents=True)
    (tmp_path / "train" / "a b" / "1.jpg").write_bytes(IMAGE)
    entry = {"id": "x1", "file_name": "a b/1.jpg"}
    path = write(tmp_path, [entry], [annotation("x1", 1)], [{"id": 1, "name": "fish"}, {"id": 0, "name": "fish"}])
    samples = read_coco(str(path), tmp_path / "train")
    assert samples.names == ["a b/1.jpg"]
    assert samples.classes == ["fish", "fish"]
    assert samples.read(0)["labels"].tolist() == [1]


def test_the_content_changes_with_the_files(tmp_path: Path) -> None:
    """And only with them: the list's bytes, an image's size or time; a missing image changes it too."""
    found = [listed(tmp_path, [image(1), image(2)]).content]
    os.utime(tmp_path / "1.jpg", ns=(5, 5))
    path = tmp_path / "instances.json"
    found += [read_coco(path, tmp_path).content for _ in range(2)]
    assert found[1] == found[2]
    path.write_bytes(path.read_bytes() + b" ")
    found.append(read_coco(path, tmp_path).content)
    (tmp_path / "2.jpg").unlink()
    found.append(read_coco(path, tmp_path).content)
    assert len(set(found)) == 4


def test_what_is_not_needed_takes_no_memory(tmp_path: Path) -> None:
    """Outlines are nine tenths of COCO's files; they are dropped while it is parsed."""
    outline = [float(number) + 0.5 for number in range(2000)]
    path = write(tmp_path, [image(1)], [annotation(1, segmentation=[outline]) for _ in range(300)])
    assert path.stat().st_size > 4 << 20
    tracemalloc.start()
    try:
        read_coco(path, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size, "the file, its text and little more; its numbers take 20 MB"


# ---- images that are left out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bbox": None}, r"annotations\[1\]: bbox is None; it must be four numbers, \[x, y, width, height\]"),
        ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
        ({"bbox": {"x": 1}}, "bbox is {}"),
        ({"bbox": [1, 2, 3, "4"]}, r"bbox is \[1, 2, 3, '4'\]"),
        ({"bbox": [1, 2, 3, True]}, "bbox is"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox is"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox is"),
        ({"category": 2}, r"annotations\[1\]: category_id is 2; it must be the id of a category"),
        ({"category": None}, "category_id is None"),
        ({"category": [1]}, r"category_id is \[1\]"),
        ({"category": True}, "category_id is True"),
    ],
)
def test_an_annotation_that_makes_no_sense_costs_its_image(tmp_path: Path, wrong: Any, message: str) -> None:
    """And no other; where it is said."""
    annotations = [annotation(1), annotation(2, **wrong), annotation(1, 7), annotation(2, 90)]
    samples = listed(tmp_path, [image(1), image(2)], annotations)
    assert list(samples.problems) == [1]
    with pytest.raises(SourceError, match=message):
        raise SourceError(samples.problems[1])
    assert samples.read(0)["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("entry", "bbox", "message"),
    [
        ({}, [10, 2, 8, 4], r"box 0 \(x, y, width, height\) = \(10, 2, 8, 4\) reaches beyond the image, 16 x 12"),
        ({}, [1, 2, 3, -4], r"\(1, 2, 3, -4\) has a side below 0"),
        ({"height": WIDTH, "width": HEIGHT}, [0, 0, 1, 1], "listed as 12 x 16 pixels, but the image has 16 x 12"),
        ({"height": "12"}, [0, 0, 1, 1], "listed as 16 x '12' pixels"),
        ({"width": None, "height": 13}, [0, 0, 1, 1], "listed as None x 13 pixels"),
    ],
)
def test_boxes_that_do_not_fit_the_image_cost_it(tmp_path: Path, entry: Any, bbox: Any, message: str) -> None:
    """Held against the image itself, once it is read."""
    samples = listed(tmp_path, [image(1, **entry), image(2)], [annotation(1, bbox=bbox)])
    with pytest.raises(SourceError, match=message):
        samples.read(0)
    assert samples.read(1)["boxes"].shape == (0, 4)


def test_the_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    """A list that was made of pictures as they lie in their files is found out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path, [image(1), image(2, height=WIDTH, width=HEIGHT)], [annotation(2, bbox=[0, 0, 12, 16])])
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(exif=exif))
    samples = read_coco(path, tmp_path)
    with pytest.raises(
        SourceError, match="listed as 16 x 12 pixels, but the image has 12 x 16; was it replaced, or turne"
    ):
        samples.read(0)
    assert samples.read(1)["boxes"].tolist() == [[0, 0, 12, 16]]


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "b/../../a.jpg", "b/..", "//host/a.jpg", ".."])
def test_names_that_lead_out_of_the_root_are_refused(tmp_path: Path, name: str) -> None:
    """Before anything is looked up there."""
    folder = tmp_path / "root"
    (folder / "b").mkdir(parents=True)
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    samples = listed(folder, [image(1), image(2, name)])
    assert list(samples.problems) == [1]
    assert "leads out of" in samples.problems[1]
    with pytest.raises(SourceError, match="leads out of"):
        samples.read(1)


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    """Of files and of folders, even if they are made after the list was read; links within it are as good as files."""
    root, other = tmp_path / "root", tmp_path / "root2"
    root.mkdir()
    other.mkdir()
    (other / "x.jpg").write_bytes(IMAGE)
    path = write(root, [image(1), image(2, "link.jpg"), image(3, "folder/x.jpg"), image(4, "within.jpg")])
    (root / "link.jpg").unlink()
    (root / "within.jpg").unlink()
    try:
        (root / "link.jpg").symlink_to(other / "x.jpg")
    except OSError:
        pytest.skip("this system lets nobody make links")
    (root / "folder").symlink_to(other, target_is_directory=True)
    (root / "within.jpg").symlink_to(root / "1.jpg")
    samples = read_coco(path, root)
    assert list(samples.problems) == [1, 2]
    assert all("is a link that leads out of" in problem for problem in samples.problems.values())
    assert samples.read(3)["image"] == IMAGE
    (root / "1.jpg").unlink()
    (root / "1.jpg").symlink_to(other / "x.jpg")
    with pytest.raises(SourceError, match="is a link that leads out of"):
        samples.read(0)


@pytest.mark.parametrize("name", ["none.jpg", "folder", "sub/none.jpg", "\udc80.jpg", "a" * 5000])
def test_a_missing_image_is_left_out(tmp_path: Path, name: str) -> None:
    """Or what is no file."""
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, [image(1)])
    content = json.loads(path.read_text())
    content["images"].append(image(2, name))
    path.write_text(json.dumps(content))
    samples = read_coco(path, tmp_path)
    assert list(samples.problems) == [1]
    assert "there is no such file" in samples.problems[1]


def test_damaged_and_too_large_images_say_so(tmp_path: Path) -> None:
    """When they are read."""
    path = write(tmp_path, [image(1), image(2)])
    (tmp_path / "1.jpg").write_bytes(b"")
    samples = read_coco(path, tmp_path)
    with pytest.raises(SourceError, match=r"the image '1\.jpg': it has 0 bytes"):
        samples.read(0)
    with pytest.raises(SourceError, match="16 x 12 pixels, more than the limit of 100"):
        read_coco(path, tmp_path, max_pixels=100).read(1)


# ---- lists that can't be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": {}}, "it has no list `images`"),
        ({"annotations": None}, "it has no list `annotations`"),
        ({"categories": "cat"}, "it has no list `categories`"),
        ({"images": [image(1), 5]}, r"images\[1\] is 5; it must be an object with an id"),
        ({"images": [image(1), {"file_name": "a.jpg"}]}, r"images\[1\] is .*an object with an id"),
        ({"images": [image(1), image([2], "b.jpg")]}, r"images\[1\] is"),
        ({"images": [image(1), image(2.0, "b.jpg")]}, r"images\[1\] is"),
        ({"images": [image(1), image(2), image(1, "b.jpg")]}, r"images\[2\] has the id 1, and so has images\[0\]"),
        (
            {"images": [image(1, "a.jpg"), image(2, "a.jpg")]},
            r"images\[1\] has the file_name 'a.jpg', and so has images",
        ),
        ({"images": [image(1), image(2, 5)]}, r"images\[1\] has the file_name 5; it must be the name of a file"),
        ({"images": [image(1), image(2, "")]}, "has the file_name ''"),
        ({"images": [image(1), image(2, "a\0b")]}, "has the file_name"),
        ({"images": [image(1), image(2, "\ud800")]}, "has the file_name"),
        ({"categories": [3]}, r"categories\[0\] is 3; it must be an object with a number as id and a name"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] is"),
        ({"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\] is"),
        ({"categories": [{"id": True, "name": "a"}]}, r"categories\[0\] is"),
        ({"categories": [{"id": 1, "name": None}]}, r"categories\[0\] is"),
        ({"categories": [*CATEGORIES, CATEGORIES[1]]}, r"categories\[3\] has the id 1, and so has categories\[1\]"),
        (
            {"annotations": [annotation(1), annotation(2)]},
            r"annotations\[1\] is .* its image_id must be the id of an im",
        ),
        ({"annotations": [annotation(True)]}, r"annotations\[0\] is"),
        ({"annotations": [annotation([1])]}, r"annotations\[0\] is"),
        ({"annotations": [None]}, r"annotations\[0\] is None"),
        (
            {"annotations": [annotation(1, 3)]},
            r"none of its 1 images can be packed; 1.jpg: annotations\[0\]: category_id",
        ),
    ],
)
def test_lists_that_make_no_sense_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    """With the place in them."""
    with pytest.raises(SourceError, match=message):
        raise SourceError(reason(tmp_path, **{"images": [image(1)], **content}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"[]", "no list `images`"),
        (b"5", "no list `images`"),
        (b"\xff\xfe\xfd", "it is not JSON"),
        (b'{"images": [], "annotations": [], "categories": [' + b"[" * 100_000, "nested too deeply"),
        (b'{"images": ' + b'{"images":' * 100_000, "nested too deeply"),
        (b'{"images": [], "annotations": [], "categories": [', "it is not JSON: .*; was it cut short"),
        (b'{"images": [{"id": 1' + b"0" * 5000 + b"}]}", "it"),
    ],
)
def test_what_is_no_such_list_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """Whatever is in the file."""
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_coco(path, tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, nothing at all, and a pipe, at which others would wait for ever."""
    paths = [tmp_path, tmp_path / "none.json"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        paths.append(tmp_path / "pipe.json")
    for path in paths:
        assert not looks_like_coco(path)
        with pytest.raises(SourceError, match=r"it is no regular file|it can't be read"):
            read_coco(path, tmp_path)


def test_a_list_of_no_images_has_no_samples(tmp_path: Path) -> None:
    """Which is for others to mind."""
    samples = listed(tmp_path, [])
    assert (samples.names, dict(samples.problems)) == ([], {})


def test_a_list_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    """Never half of its boxes."""
    data = write(tmp_path, [image(1), image(2)], [annotation(1), annotation(2)]).read_bytes()
    path = tmp_path / "cut.json"
    for end in range(0, len(data) - 1, 7):
        path.write_bytes(data[:end])
        with pytest.raises(SourceError):
            read_coco(path, tmp_path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3)
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), anything)
def test_any_value_anywhere_is_no_crash(tmp_path: Path, data: Any, value: Any) -> None:
    """One value of a good list replaced by anything: the list is refused, an image is, or it is still a good one."""
    content: Any = {"images": [image(1), image(2)], "annotations": [annotation(1), annotation(2)]}
    content = json.loads(json.dumps({**content, "categories": CATEGORIES}))
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGE)
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = value
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    try:
        samples = read_coco(path, tmp_path)
    except SourceError:
        return
    for index in set(range(len(samples.names))) - set(samples.problems):
        try:
            sample = samples.read(index)
        except SourceError:
            continue
        assert sample["boxes"].shape == (len(sample["labels"]), 4)
        assert np.isfinite(sample["boxes"]).all()
        assert samples.classes is not None
        assert ((sample["labels"] >= 0) & (sample["labels"] < len(samples.classes))).all()


# ---- by its look


def test_its_look_is_known(tmp_path: Path) -> None:
    """COCO's own order and others', in one line or many, with a mark at its start; without being read whole."""
    path = write(tmp_path, [image(1)], [annotation(1)])
    assert looks_like_coco(path)
    content = json.loads(path.read_text())
    other = tmp_path / "other.json"
    for keys in (
        ["images", "annotations", "categories"],
        ["categories", "images"],
        ["annotations"],
        ["info", "images"],
    ):
        text = json.dumps({key: content[key] for key in keys}, indent=2)
        for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text[: text.index("[") + 8].encode()):
            other.write_bytes(data)
            assert looks_like_coco(other)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xd8\xff\xe0",
        b"a.jpg 1\nb.jpg 0\n",
        b'{"file": "a.jpg", "label": 1}\n{"file": "b.jpg", "label": 0}\n',
        b'{"file": "a.jpg", "annotations": [{"bbox": [1, 2, 3, 4]}]}\n',
        b'{"images": ["a.jpg", "b.jpg"], "label": 1}\n',
        b'{"version": "5.5.0", "shapes": [], "imagePath": "a.jpg"}',
        b'{"info": {"description": "images"}}',
    ],
)
def test_other_files_are_not_taken_for_it(tmp_path: Path, data: bytes) -> None:
    """Lists of other kinds, in JSON too."""
    path = tmp_path / "list.json"
    path.write_bytes(data)
    assert not looks_like_coco(path)
