"""labelme's annotation files: what is drawn for each shape, where the image comes from, and all that can be wrong."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import labelme
from fastload.errors import SourceError
from fastload.labelme import Annotation, list_classes, looks_like_annotation, read, read_classes

CLASSES = ["_background_", "cat", "dog"]
HEIGHT, WIDTH = 12, 16

# What labelme 6.3.1 draws, with Pillow 13, for each type of shape in an image of 16 x 12 pixels.
GOLDEN: dict[str, tuple[list[list[float]], str]] = {
    "polygon": (
        [[1.4, 0.6], [14.5, 3.2], [6, 4.5], [9.7, 10.2], [2.2, 8.8]],
        ".#.............."
        ".#####.........."
        ".##########....."
        ".##############."
        "..#####........."
        "..#####........."
        "..######........"
        "..######........"
        "..#######......."
        "......###......."
        ".........#......"
        "................",
    ),
    "rectangle": (
        [[12.6, 8.4], [3.2, 2.5]],
        "................"
        "................"
        "...##########..."
        "...##########..."
        "...##########..."
        "...##########..."
        "...##########..."
        "...##########..."
        "...##########..."
        "................"
        "................"
        "................",
    ),
    "oriented_rectangle": (
        [[2, 6], [8, 1.5], [13, 7], [7, 11.5]],
        "................"
        "........#......."
        ".......###......"
        "......#####....."
        "....#######....."
        "...#########...."
        "..###########..."
        "...###########.."
        "....########...."
        ".....######....."
        "......###......."
        ".......#........",
    ),
    "circle": (
        [[7.5, 5.5], [11.2, 5.5]],
        "................"
        "......###......."
        "....#######....."
        "....#######....."
        "...#########...."
        "...#########...."
        "...#########...."
        "....#######....."
        "....#######....."
        "......###......."
        "................"
        "................",
    ),
    "line": (
        [[-3, 2], [9.5, 14]],
        "###............."
        "####............"
        "#####..........."
        "######.........."
        "#######........."
        "########........"
        "#########......."
        "##########......"
        "###########....."
        "############...."
        "#############..."
        "##############..",
    ),
    "linestrip": (
        [[0, 0], [15, 0], [15.5, 11]],
        "################"
        "################"
        "################"
        "################"
        "################"
        "################"
        "...........#####"
        "...........#####"
        "...........#####"
        "...........#####"
        "...........#####"
        "...........#####",
    ),
    "point": (
        [[11, 3]],
        ".......#########"
        "......##########"
        "......##########"
        "......##########"
        "......##########"
        "......##########"
        ".......#########"
        "........#######."
        ".........#####.."
        "................"
        "................"
        "................",
    ),
}


def png(pixels: Any, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, format, **options)
    return file.getvalue()


def embedded(data: bytes) -> str:
    return base64.b64encode(data).decode()


IMAGE = png(np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def shape(label: Any = "cat", points: Any = ((2, 2), (5, 4)), kind: Any = "rectangle", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def write(folder: Path, *shapes: Any, name: str = "a.json", image: bytes | None = IMAGE, **more: Any) -> Path:
    """An annotation file, with the image a.png beside it."""
    if image is not None:
        (folder / "a.png").write_bytes(image)
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": "a.png", "imageData": None, **more}
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def drawn(folder: Path, *shapes: Any) -> Annotation:
    return read(write(folder, *shapes), CLASSES)


def picture_of(mask: Any) -> str:
    return "".join(".#"[bool(value)] for value in np.asarray(mask).ravel())


def reason(path: Path, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read(path, CLASSES, **options)
    return str(caught.value)


# ---- what is drawn


@pytest.mark.parametrize("kind", GOLDEN)
def test_each_type_of_shape_is_drawn_as_labelme_draws_it(tmp_path: Path, kind: str) -> None:
    """Concave, turned round, and reaching beyond the edges: the very pixels."""
    points, picture = GOLDEN[kind]
    found = drawn(tmp_path, shape("dog", points, kind))
    assert (found.size, found.mask.dtype, found.instances.dtype) == ((HEIGHT, WIDTH), np.uint8, np.uint16)
    assert picture_of(found.mask) == picture
    assert set(np.unique(found.mask)) == {0, 2}
    assert np.array_equal(found.instances, found.mask // 2)


@pytest.mark.parametrize("keys", [{"shape_type": None}, {}], ids=["null", "missing"])
def test_a_shape_without_a_type_is_a_polygon(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Files of labelme 2 to 4 have neither shape_type nor group_id."""
    points, picture = GOLDEN["polygon"]
    assert picture_of(drawn(tmp_path, {"label": "cat", "points": points, **keys}).mask) == picture


@pytest.mark.parametrize("kind", ["bool", "0 and 1", "0 and 128", "palette"])
def test_a_mask_fills_the_box_between_its_points(tmp_path: Path, kind: str) -> None:
    """Where its PNG is not zero; the points are cut to whole numbers."""
    bits = np.array([[0, 1, 1], [1, 0, 0]], bool)
    data = bits if kind == "bool" else bits.astype(np.uint8) * (128 if kind == "0 and 128" else 1)
    file = io.BytesIO()
    image = Image.fromarray(data)
    (image.convert("P") if kind == "palette" else image).save(file, "PNG")
    found = drawn(tmp_path, shape("cat", [[4.9, 3.2], [6.6, 4]], "mask", mask=embedded(file.getvalue())))
    assert np.array_equal(found.mask[3:5, 4:7], bits)
    assert found.mask.sum() == 3


def test_a_mask_is_cut_at_the_edges(tmp_path: Path) -> None:
    """As other shapes are; labelme's converter stops there."""
    data = embedded(png(np.ones((4, 4), np.uint8)))
    for corner, left in (((-2, -1), 2 * 3), ((WIDTH - 1, HEIGHT - 1), 1)):
        points = [corner, [corner[0] + 3, corner[1] + 3]]
        assert drawn(tmp_path, shape("cat", points, "mask", mask=data)).mask.sum() == left


def test_later_shapes_lie_over_earlier_ones(tmp_path: Path) -> None:
    """In the class mask and among the instances; `_background_` is class 0, and an instance, as labelme has it."""
    found = drawn(
        tmp_path,
        shape("cat", [[0, 0], [9, 0]]),
        shape("dog", [[2, 0], [7, 0]]),
        shape("_background_", [[4, 0], [5, 0]]),
        shape("cat", [[5, 0], [6, 0]]),
    )
    assert found.mask[0, :11].tolist() == [1, 1, 2, 2, 0, 1, 1, 2, 1, 1, 0]
    assert found.instances[0, :11].tolist() == [1, 1, 2, 2, 3, 4, 4, 2, 1, 1, 0]


def test_a_group_of_one_label_is_one_instance(tmp_path: Path) -> None:
    """The same group_id with another label is another one; shapes without one are always their own."""
    labels = [("cat", 0), ("dog", 0), ("cat", 0), ("cat", 1), ("cat", None), ("cat", None), ("dog", 0), ("cat", "0")]
    shapes = [shape(label, [[x, 0], [x, 0]], group_id=group) for x, (label, group) in enumerate(labels)]
    assert drawn(tmp_path, *shapes).instances[0, :9].tolist() == [1, 2, 1, 3, 4, 5, 2, 6, 0]


def test_what_is_to_be_ignored_is_255_and_no_instance(tmp_path: Path) -> None:
    """It takes a number of its own, as in labelme; a later shape lies over it."""
    found = drawn(
        tmp_path,
        shape("cat", [[0, 0], [4, 0]]),
        shape("__ignore__", [[1, 0], [3, 0]]),
        shape("dog", [[3, 0], [3, 0]]),
    )
    assert found.mask[0, :6].tolist() == [1, 255, 255, 2, 1, 0]
    assert found.instances[0, :6].tolist() == [1, 0, 0, 3, 1, 0]


def test_more_than_255_instances(tmp_path: Path) -> None:
    """They are drawn in another type of image, masks too."""
    bits = embedded(png(np.eye(2, dtype=bool)))
    dots = [shape("cat", [[i % 10, i // 10 % 10], [i % 10, i // 10 % 10]]) for i in range(298)]
    found = drawn(tmp_path, *dots, shape("dog", [[12, 8], [13, 9]], "mask", mask=bits))
    assert found.instances[9, :10].tolist() == [*range(291, 299), 199, 200]
    assert found.instances[8:10, 12:14].tolist() == [[299, 0], [0, 299]]
    assert (found.mask == 2).sum() == 2


def test_more_than_255_classes(tmp_path: Path) -> None:
    """The mask has 16 bits, and so has the value of what is to be ignored."""
    path = write(tmp_path, shape("c255", [[0, 0], [0, 0]]), shape("__ignore__", [[1, 0], [1, 0]]))
    found = read(path, ["_background_", *(f"c{i}" for i in range(1, 256))])
    assert (found.mask.dtype, found.mask[0, :3].tolist()) == (np.uint16, [255, 65535, 0])
    assert labelme.ignore_value(["_background_"] * 255) == 255
    with pytest.raises(SourceError, match="65536 classes are more than a mask can hold"):
        labelme.ignore_value(["_background_"] * 65536)


def test_an_image_without_shapes_is_all_background(tmp_path: Path) -> None:
    """It shows none of the classes; that is an annotation too."""
    found = drawn(tmp_path)
    assert (found.mask.shape, found.mask.any(), found.instances.any()) == ((HEIGHT, WIDTH), False, False)


# ---- the image


def test_the_image_file_is_preferred_to_embedded_data(tmp_path: Path) -> None:
    """The file wins where both are there; the bytes are for when it is missing."""
    other = png(np.zeros((5, 7, 3), np.uint8))
    path = write(tmp_path, imageData=embedded(other))
    assert read(path, CLASSES)[:2] == (str(tmp_path / "a.png"), (HEIGHT, WIDTH))
    (tmp_path / "a.png").unlink()
    assert read(path, CLASSES)[:2] == (other, (5, 7))


@pytest.mark.parametrize("written", ["../images/a.png", "..\\images\\a.png", "../../data/images/./a.png"])
def test_the_image_may_lie_elsewhere_below_the_root(tmp_path: Path, written: str) -> None:
    """With slashes of either kind."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.png").write_bytes(IMAGE)
    path = write(root, imagePath=written, name="labels/a.json", image=None)
    assert read(path, CLASSES, root=root).image == str(root / "images" / "a.png")
    assert "leads out of" in reason(path, root=root / "labels")
    assert f"leads out of {root / 'labels'}; pack a folder that has the images in it too" in reason(path)


@pytest.mark.parametrize(
    "name", ["../secret.png", "..\\secret.png", "x/../../secret.png", "{absolute}", "../root2/a.png", "..", "."]
)
def test_no_image_is_read_from_outside_the_root(tmp_path: Path, name: str) -> None:
    """Not even one that exists; what is embedded is used instead."""
    for place in ("secret.png", "root2/a.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(IMAGE)
    (tmp_path / "root").mkdir()
    name = name.format(absolute=tmp_path / "secret.png")
    path = write(tmp_path / "root", imagePath=name, image=None)
    assert "leads out of" in reason(path)
    path = write(tmp_path / "root", imagePath=name, image=None, imageData=embedded(IMAGE))
    assert read(path, CLASSES).image == IMAGE


@pytest.mark.parametrize("name", ["b.png", "C:\\images\\a.png", "a\0.png", "\ud800.png", "x" * 5000, "a.png/b", "sub"])
def test_an_image_that_is_nowhere_is_named(tmp_path: Path, name: str) -> None:
    """Names that no file can have, and folders, are missing files."""
    (tmp_path / "sub").mkdir()
    message = reason(write(tmp_path, imagePath=name))
    assert message.endswith("but there is no such file (and no imageData is embedded)")
    assert len(message) < 300


def test_the_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    """labelme turns a photograph by its EXIF orientation before it is annotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(np.zeros((10, 30, 3), np.uint8), "JPEG", exif=exif)
    found = read(write(tmp_path, shape("cat", [[0, 29], [9, 29]]), image=data, imageHeight=30, imageWidth=10), CLASSES)
    assert (found.size, found.mask.shape) == ((30, 10), (30, 10))
    assert found.mask[29].all()
    data = png(np.zeros((10, 30, 3), np.uint8), exif=exif)
    assert read(write(tmp_path, image=data), CLASSES).size == (30, 10)


def test_a_declared_size_must_be_the_image_s(tmp_path: Path) -> None:
    """Both are in the message; null and nothing are no declaration."""
    assert read(write(tmp_path, imageHeight=None), CLASSES).size == (HEIGHT, WIDTH)
    assert read(write(tmp_path, imageHeight=HEIGHT, imageWidth=WIDTH), CLASSES).size == (HEIGHT, WIDTH)
    for height, width in ((WIDTH, HEIGHT), (HEIGHT, 10**9), ("12", WIDTH), (float("nan"), WIDTH), ([12], {})):
        assert reason(write(tmp_path, imageHeight=height, imageWidth=width)).startswith(
            f"imageHeight is {height!r} and imageWidth {width!r}, but the image is 12 pixels high and 16 wide"
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "the image 'a.png': not an image, or none of JPEG, PNG"),
        (IMAGE[:20], "the image 'a.png': damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
        (png(np.zeros((1001, 1000), np.uint8)), "has 1000 x 1001 pixels, more than the limit of 1000000"),
    ],
    ids=["text", "cut", "EPS", "large"],
)
def test_an_image_that_is_none_or_too_large(tmp_path: Path, data: bytes, message: str) -> None:
    """By its header; formats other than those that are packed are not tried."""
    assert message in reason(write(tmp_path, image=data), max_pixels=1000_000)
    embedding = write(tmp_path, imagePath="gone.png", imageData=embedded(data))
    assert message.replace("the image 'a.png'", "the embedded image") in reason(embedding, max_pixels=1000_000)


def test_embedded_data_that_is_no_base64(tmp_path: Path) -> None:
    """The reason says why it was looked at."""
    for data in ("é", "abcde"):
        message = reason(write(tmp_path, imagePath="gone.png", imageData=data))
        assert message.startswith("imageData is not base64: ")
        assert "imagePath is 'gone.png', but there is no such file" in message


# ---- lists of classes


@pytest.mark.parametrize(
    "text",
    [
        "__ignore__\n_background_\ncat\ndog\n",
        "_background_\ncat\ndog",
        "cat\ndog\n",
        "__ignore__\ncat\ndog\n",
        "\ufeff__ignore__\r\n_background_\r\ncat\r\ndog\r\n",
        "# ours\n\n__ignore__\n  \n_background_\n# more\n cat \n\ndog\n\n",
        "_background_\rcat\rdog\r",
    ],
)
def test_a_list_of_classes(tmp_path: Path, text: str) -> None:
    """By value, the background first, whatever the file's line ends, comments, blanks and byte order mark."""
    (tmp_path / "labels.txt").write_bytes(text.encode())
    assert read_classes(tmp_path / "labels.txt") == CLASSES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat\ndog\n\ncat\n", "labels.txt, line 4: 'cat' is on line 1 too"),
        (b"_background_\n_background_\ncat", "line 2: '_background_' is on line 1 too"),
        (b"cat\n__ignore__\n", "line 2: '__ignore__' must come before all classes"),
        (b"_background_\n__ignore__\ncat\n", "line 2: '__ignore__' must come before"),
        (b"cat\n_background_\n", "line 2: '_background_' must come before"),
        (b"__ignore__\n#cat\n", "there is no class in it"),
        (b"", "labels.txt: it has 0 bytes"),
        (b"caf\xe9\n", "labels.txt: it is not UTF-8 text"),
    ],
)
def test_a_list_of_classes_that_makes_no_sense(tmp_path: Path, text: bytes, message: str) -> None:
    """The file and the line are in the message."""
    (tmp_path / "labels.txt").write_bytes(text)
    with pytest.raises(SourceError) as caught:
        read_classes(tmp_path / "labels.txt")
    assert message in str(caught.value)
    with pytest.raises(SourceError, match=r"nowhere\.txt: it can't be read: No such file"):
        read_classes(tmp_path / "nowhere.txt")


def test_classes_are_found_in_the_files(tmp_path: Path) -> None:
    """Sorted after the background, without what is to be ignored; files and shapes that are broken are passed over."""
    paths = [
        write(tmp_path, *map(shape, ("zebra", "__ignore__", "cat")), name="1.json"),
        write(tmp_path, *map(shape, ("ant", "_background_", None, 3, ["x"])), name="2.json"),
        write(tmp_path, "x", None, {}, name="3.json"),
        tmp_path / "gone.json",
    ]
    assert list_classes(paths) == ["_background_", "ant", "cat", "zebra"]


def test_what_looks_like_an_annotation(tmp_path: Path) -> None:
    """By its words, so that a folder with a damaged file is still recognised."""
    path = write(tmp_path)
    assert looks_like_annotation(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert looks_like_annotation(path)
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    assert not looks_like_annotation(path)
    assert not looks_like_annotation(tmp_path)
    assert not looks_like_annotation(tmp_path / "gone.json")


# ---- what is wrong with a file


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"{", "it is not JSON: "),
        (b"\x89PNG\r\n\x1a\n", "it is not UTF-8 text (invalid start byte at byte 0)"),
        ('{"label": "caf\xe9"}'.encode("latin-1"), "it is not UTF-8 text"),
        ('{"shapes": []}'.encode("utf-16"), "it is not UTF-8 text"),
        (b"[" * 100_000, "its JSON is nested too deeply for a labelme annotation"),
        (b'{"a":' * 100_000, "its JSON is nested too deeply for a labelme annotation"),
        (b"[1, 2]", "it is JSON, but no labelme annotation: a list, not an object"),
        (b"null", "it is JSON, but no labelme annotation: a NoneType"),
        (b"1" * 10_000, "it is not JSON"),
        (
            b'{"images": [], "annotations": []}',
            "no labelme annotation: no list `shapes`, but ['images', 'annotations']",
        ),
        (b'{"shapes": {}}', "no list `shapes`, but ['shapes']"),
        (b'{"shapes": []}', "imagePath is None; it must be the name of an image file (and no imageData is embedded)"),
        (b'{"shapes": [], "imagePath": 3, "imageData": 4}', "imagePath is 3; it must be"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_a_file_that_is_no_annotation(tmp_path: Path, data: bytes, message: str) -> None:
    """Each is told apart: damaged text, other JSON such as COCO's, keys that are missing."""
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert message in reason(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Nothing waits for a pipe, or reads a file without end."""
    assert reason(tmp_path) == "it is no regular file"
    assert reason(tmp_path / "gone.json") == "it can't be read: No such file or directory"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        assert reason(tmp_path / "pipe.json") == "it is no regular file"
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 40)
    assert reason(tmp_path / "huge.json").startswith("it has 1099511627776 bytes; 1 to ")


BOMB = IMAGE[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff" + IMAGE[24:29]
BOMB += zlib.crc32(BOMB[12:29]).to_bytes(4, "big") + IMAGE[33:]
BIT = embedded(png(np.ones((1, 1), bool)))
WRONG = {
    "no object": (7, "shape 2: it is 7; it must be an object"),
    "no label": ({"points": []}, "shape 2: its label is None"),
    "a list as label": (shape(["cat"]), "shape 2: its label is ['cat']"),
    "unknown label": (shape("cow"), "shape 2 ('cow'): its label is none of the 3 names in my.txt; add it there"),
    "group": (shape(group_id=[1]), "shape 2 ('cat'): its group_id is [1]"),
    "unknown type": (shape(kind="blob"), "('cat'): its shape_type is 'blob'; it may be polygon, linestrip"),
    "type is a list": (shape(kind=[]), "its shape_type is []"),
    "no points": ({"label": "cat"}, "its points are None; they must be a list of [x, y]"),
    "two": (shape(points=[[1, 1], [5, 5]], kind="polygon"), "a polygon has 2 points, it needs at least 3"),
    "circle": (shape(points=[[1, 1]], kind="circle"), "shape 2 ('cat'): a circle has 1 point, it needs 2"),
    "point": (shape(points=[[1, 1], [2, 2]], kind="point"), "a point has 2 points, it needs 1"),
    "none": (shape(points=[], kind="linestrip"), "a linestrip has 0 points, it needs at least 2"),
    "turned": (shape(points=[[1, 1]] * 3, kind="oriented_rectangle"), "an oriented_rectangle has 3 points, it needs 4"),
    "text": (shape(points=[[1, 1], ["2", 3]]), "point 2 is ['2', 3]; it must be two numbers, [x, y]"),
    "bool": (shape(points=[[True, 1], [2, 3]]), "point 1 is [True, 1]; it must be two numbers"),
    "three": (shape(points=[[1, 1, 1], [2, 3]]), "point 1 is [1, 1, 1]; it must be two numbers"),
    "object": (shape(points=[{"x": 1}, [2, 3]]), "point 1 is {'x': 1}; it must be two numbers"),
    "NaN": (shape(points=[[float("nan"), 1], [2, 3]]), "point 1 is [nan, 1]; it may lie outside the image"),
    "infinite": (shape(points=[[1, 1], [2, float("-inf")]]), "point 2 is [2, -inf]; it may lie outside the image"),
    "1e308": (shape(points=[[1e308, 1], [2, 3]]), "point 1 is [1e+308, 1]; it may lie outside"),
    "10**400": (
        shape(points=[[10**400, 1], [2, 3]]),
        "it may lie outside the image, which has 16 x 12 pixels, but not",
    ),
    "far": (shape(points=[[1, 1], [33, 3]]), "point 2 is [33, 3]; it may lie outside"),
    "all outside": (shape(points=[[17, 1], [20, 3]]), "shape 2 ('cat'): it lies outside the image of 16 x 12 pixels"),
    "no mask": (shape(kind="mask"), "its mask is None; it must be a PNG in base64"),
    "no base64": (shape(kind="mask", mask="é"), "its mask is no PNG in base64, or damaged"),
    "no PNG": (shape(kind="mask", mask=embedded(b"GIF89a")), "its mask is no PNG in base64"),
    "JPEG": (shape(kind="mask", mask=embedded(png(np.ones((1, 1), np.uint8), "JPEG"))), "its mask is no PNG in base64"),
    "cut": (shape(points=[[0, 0], [15, 11]], kind="mask", mask=embedded(IMAGE[:50])), "its mask is no PNG in"),
    "colours": (shape(points=[[0, 0], [15, 11]], kind="mask", mask=embedded(IMAGE)), "an image of 3 channels"),
    "bomb": (shape(kind="mask", mask=embedded(BOMB)), "its mask"),
    "box": (shape(kind="mask", mask=BIT), "its mask has 1 x 1 pixels, the box between its points 4 x 3"),
    "turned box": (shape(points=[[5, 4], [2, 2]], kind="mask", mask=BIT), "its points make a box of -2 x -1 pixels"),
    "large box": (shape(points=[[-9, 0], [9, 0]], kind="mask", mask=BIT), "a box of 19 x 1 pixels, the image has 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_shape_that_makes_no_sense(tmp_path: Path, case: str) -> None:
    """The message says which one, of which label, what it has, and what it may have; it stays short."""
    wrong, message = WRONG[case]
    found = reason(write(tmp_path, shape(), wrong), class_list="my.txt")
    assert message in found
    assert found.startswith("shape 2")
    assert len(found) < 300


def test_long_values_are_cut_short_in_messages(tmp_path: Path) -> None:
    """A label of a megabyte does not fill the quarantine list."""
    assert len(reason(write(tmp_path, shape("x" * 1_000_000)))) < 300
    assert len(reason(write(tmp_path, shape(kind="x" * 1_000_000)))) < 500
    assert len(reason(write(tmp_path, shape(points=[["x" * 100_000] * 9] * 9)))) < 900


def test_too_many_instances_and_too_much_to_draw(tmp_path: Path) -> None:
    """A file of a few megabytes can't keep a thread busy for hours."""
    dot = {"label": "cat", "points": [[0, 0], [0, 0]], "shape_type": "rectangle"}
    assert reason(write(tmp_path, *[dot] * 65536)) == "it has 65536 instances; a mask can hold 65535"
    image = png(np.zeros((4000, 4000), bool))
    zigzag = {"label": "cat", "points": [[0, 0], [3999, 3999]] * 70_000, "shape_type": "polygon"}
    assert reason(write(tmp_path, zigzag, image=image)).startswith("its shapes are too many, too large, or have too ")


NUMBERS = st.integers(-40, 40) | st.floats(-40, 40) | st.floats() | st.integers()
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["cat", "mask", "circle", BIT]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SHAPES = st.fixed_dictionaries(
    {
        "label": st.sampled_from([*CLASSES, "__ignore__"]),
        "points": st.lists(st.lists(st.integers(-15, 30) | st.floats(-12, 24), min_size=2, max_size=2), max_size=6),
        "shape_type": st.sampled_from([*GOLDEN, "mask", None]),
        "group_id": st.none() | st.integers(0, 2),
    },
    optional={"mask": st.sampled_from([BIT, "x"]), "flags": ANY},
)
BROKEN = st.dictionaries(st.sampled_from(["label", "points", "shape_type", "group_id", "mask"]), ANY)
FILES = st.fixed_dictionaries(
    {"shapes": st.lists(SHAPES | BROKEN, max_size=4) | st.lists(SHAPES, max_size=4) | ANY},
    optional={"imageData": ANY, "imagePath": st.just("a.png") | ANY, "imageHeight": st.just(HEIGHT) | ANY},
)


@settings(max_examples=300, deadline=None)
@given(FILES | ANY)
@example({"shapes": [shape("cat", [[16, 12], [16, 12]])], "imagePath": "a.png"})
@example({"shapes": [shape("cat", [[-16, -12], [32, 24]], "circle")], "imagePath": "a.png"})
@example({"shapes": [shape("cat", [[3, 3], [3, 3]], "circle")], "imagePath": "a.png"})
def test_any_json_is_an_annotation_or_a_source_error(content: Any) -> None:
    """Nothing else comes out, and arrays always have the image's size and known values."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.png").write_bytes(IMAGE)
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(content))
        list_classes([path])
        try:
            found = read(path, CLASSES)
        except SourceError:
            return
    assert found.mask.shape == found.instances.shape == found.size == (HEIGHT, WIDTH)
    assert set(np.unique(found.mask)) <= {0, 1, 2, 255}
    assert found.instances.max() <= len(content["shapes"])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100) | st.text(max_size=50).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_source_error(data: bytes) -> None:
    """As an annotation always; as a list of classes they may make sense."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        with pytest.raises(SourceError):
            read(path, CLASSES)
        with contextlib.suppress(SourceError):
            assert read_classes(path)[0] == "_background_"
