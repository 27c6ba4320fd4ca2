"""labelme's annotation files: JSON that names an image and lists shapes, read into masks.

The masks are, pixel for pixel, those of labelme's own converter (labelme2voc): Pillow draws the shapes in their order,
a later one over an earlier one, each as an instance; shapes of one label with the same `group_id` are one instance.
`_background_` is class 0. Where `__ignore__` lies, the class is `ignore_value` and the instance 0.

Nothing in a file is believed: the image's header tells the size, paths stay below the root, and all that makes no sense
is a SourceError that names the place in the file, but not the file.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from . import headers
from .errors import FastloadError, SourceError
from .geometry import MAX_PIXELS, Size, upright_size

BACKGROUND = "_background_"
IGNORE = "__ignore__"

_LINE_WIDTH = 10
_POINT_RADIUS = 5
_MAX_BYTES = 1 << 28
_MAX_INSTANCES = 0xFFFF
_MAX_WORK = 1 << 29  # rows times edges: a minute of drawing at the most
_ORIENTATION_TAG = 0x0112
_POINTS = {
    "polygon": range(3, _MAX_BYTES),
    "linestrip": range(2, _MAX_BYTES),
    "oriented_rectangle": range(4, 5),
    "rectangle": range(2, 3),
    "circle": range(2, 3),
    "line": range(2, 3),
    "mask": range(2, 3),
    "point": range(1, 2),
}

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100

Point = tuple[float, float]


class Annotation(NamedTuple):
    """What one annotation file says.

    image: the image file's path, or its bytes where they are embedded and the file is missing. size: upright (height,
    width). mask: class values, uint8, or uint16 for more than 255 classes. instances: uint16 numbers from 1 in the
    order of the shapes, 0 where no shape is.
    """

    image: bytes | str
    size: Size
    mask: npt.NDArray[Any]
    instances: npt.NDArray[np.uint16]


class _Shape(NamedTuple):
    """What is drawn: a class value, and an instance that it may share. extent: left, top, right, bottom of it all.

    data: of a `mask`, decoded only when it is drawn: hundreds of them may be small in a file, and large in memory.
    """

    place: str
    kind: str
    value: int
    instance: object
    points: list[Point]
    extent: tuple[float, float, float, float]
    data: object


def ignore_value(classes: Sequence[str]) -> int:
    """The class value of `__ignore__`: the largest that the mask's type holds."""
    if len(classes) > 65535:
        raise SourceError(f"{len(classes)} classes are more than a mask can hold, which is 65535")
    return 255 if len(classes) <= 255 else 65535


def looks_like_annotation(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the words of a labelme annotation in it, damaged or not."""
    try:
        text = _text(path)
    except SourceError:
        return False
    return '"shapes"' in text and '"imagePath"' in text


def list_classes(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Class names by value, for files that come without a list: `_background_`, then all labels, sorted.

    Files that can't be read are passed over: `read` says why.
    """
    labels: set[str] = set()
    for path in paths:
        try:
            shapes = _content(path)["shapes"]
        except SourceError:
            continue
        found = (shape.get("label") for shape in shapes if isinstance(shape, dict))
        labels.update(label for label in found if isinstance(label, str))
    return [BACKGROUND, *sorted(labels - {BACKGROUND, IGNORE})]


def read_classes(path: str | os.PathLike[str]) -> list[str]:
    """Class names by value from a list as labelme has it: `__ignore__`, `_background_`, then the classes, one a line.

    The first two may be missing. Blank lines, and lines that begin with #, don't count.

    Raises:
        SourceError: the list can't be read, has a name twice, no class, or one of the first two elsewhere.
    """
    path = os.fspath(path)
    try:
        lines = re.split("\r\n|[\r\n]", _text(path))
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if name in names:
            raise SourceError(f"{path}, line {number}: {name!r} is on line {names[name]} too; remove one of them")
        if (name == IGNORE and names) or (name == BACKGROUND and names.keys() - {IGNORE}):
            raise SourceError(f"{path}, line {number}: {name!r} must come before all classes; move it to the top")
        names[name] = number
    classes = [name for name in names if name not in (IGNORE, BACKGROUND)]
    if not classes:
        raise SourceError(f"{path}: there is no class in it; write the names of the classes into it, one a line")
    return [BACKGROUND, *classes]


def read(
    path: str | os.PathLike[str],
    classes: Sequence[str],
    *,
    root: str | os.PathLike[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    class_list: str = "the list of classes",
) -> Annotation:
    """Read one annotation file.

    classes: names by value, from `read_classes` or `list_classes`. root: the folder that image paths may not leave; the
    file's own by default. max_pixels: larger images are an error. class_list: what messages call the list of classes.

    Raises:
        SourceError: the file is damaged, is no labelme annotation, its image is missing, or a shape makes no sense.
    """
    content = _content(path)
    image = _image(content, os.fspath(path), root)
    size = image_size(image, max_pixels)
    declared = (content.get("imageHeight"), content.get("imageWidth"))
    if any(given not in (None, actual) for given, actual in zip(declared, size, strict=True)):
        raise SourceError(
            f"imageHeight is {_brief.repr(declared[0])} and imageWidth {_brief.repr(declared[1])}, but the image is "
            f"{size[0]} pixels high and {size[1]} wide; was it replaced, or turned, after it was annotated?"
        )
    values = {name: value for value, name in enumerate(classes)} | {IGNORE: ignore_value(classes)}
    shapes = [_shape(number, entry, values, size, class_list) for number, entry in enumerate(content["shapes"], 1)]
    return Annotation(image, size, *_masks(shapes, values[IGNORE], size))


def image_path(path: str, root: str) -> str:
    """The image file that an annotation file names, if there is one that may be read; else the annotation file."""
    try:
        image = _image(_content(path), path, root)
    except SourceError:
        return path
    return image if isinstance(image, str) else path


def read_bytes(path: str | os.PathLike[str], most: int = _MAX_BYTES) -> bytes:
    """The bytes of a regular file of up to `most`; SourceError says why there are none."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("it is no regular file")
        if not 0 < status.st_size <= most:
            raise SourceError(f"it has {status.st_size} bytes; 1 to {most} can be read")
        return Path(path).read_bytes()
    except OSError as error:
        raise SourceError(f"it can't be read: {error.strerror or error}") from error


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"it is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _content(path: str | os.PathLike[str]) -> dict[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise SourceError("its JSON is nested too deeply for a labelme annotation") from error
    except ValueError as error:
        raise SourceError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"it is JSON, but no labelme annotation: a {type(content).__name__}, not an object")
    if not isinstance(content.get("shapes"), list):
        raise SourceError(f"it is JSON, but no labelme annotation: no list `shapes`, but {_brief.repr(list(content))}")
    return content


def _image(content: dict[str, Any], path: str, root: str | os.PathLike[str] | None) -> bytes | str:
    """The path of the image file if it exists and lies below root, else the embedded bytes."""
    name, data = content.get("imagePath"), content.get("imageData")
    folder = os.path.dirname(os.path.abspath(path))
    root = os.path.abspath(folder if root is None else root)
    if not isinstance(name, str) or not name:
        problem = f"imagePath is {_brief.repr(name)}; it must be the name of an image file"
    else:
        file = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
        if not file.startswith(os.path.join(root, "")):
            problem = f"imagePath {_brief.repr(name)} leads out of {root}; pack a folder that has the images in it too"
        elif not os.path.isfile(file):
            problem = f"imagePath is {_brief.repr(name)}, but there is no such file"
        else:
            return file
    if not isinstance(data, str) or not data:
        raise SourceError(f"{problem} (and no imageData is embedded)")
    try:
        return base64.b64decode(data)
    except ValueError as error:
        raise SourceError(f"imageData is not base64: {error}; and {problem}") from error


def image_size(image: bytes | str, max_pixels: int = MAX_PIXELS) -> Size:
    """(height, width) of an image as it is seen, from its header. image: the file's bytes, or its path.

    Raises:
        SourceError: it is damaged, or larger than `max_pixels`.
    """
    what = "the embedded image" if isinstance(image, bytes) else f"the image {os.path.basename(image)!r}"
    try:
        data = image if isinstance(image, bytes) else read_bytes(image)
        with headers.opened(data) as opened:
            size = (opened.height, opened.width)
            if size[0] * size[1] <= max_pixels:
                return upright_size(size, _orientation(opened, data))
    except FastloadError as error:
        raise SourceError(f"{what}: {error}") from error
    raise SourceError(f"{what} has {size[1]} x {size[0]} pixels, more than the limit of {max_pixels}")


def _orientation(opened: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 to 8, by packing's rules: a TIFF comes upright, a PNG is not decoded to look for it."""
    if opened.format == "TIFF":
        return 1
    if opened.format == "PNG" and b"eXIf" not in data and b"Raw profile type" not in data:
        return 1
    try:
        orientation = opened.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # garbage in EXIF does not make the image worse
        return 1
    return orientation if orientation in range(1, 9) else 1


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{place}: {error}") from error


def _shape(number: int, entry: object, values: dict[str, int], size: Size, class_list: str) -> _Shape:
    label = entry.get("label") if isinstance(entry, dict) else None
    place = f"shape {number} ({_brief.repr(label)})" if isinstance(label, str) else f"shape {number}"
    with _at(place):
        return _checked(place, entry, values, size, class_list)


def _checked(place: str, entry: object, values: dict[str, int], size: Size, class_list: str) -> _Shape:
    if not isinstance(entry, dict):
        raise SourceError(f"it is {_brief.repr(entry)}; it must be an object with a label and points")
    label, group, kind = entry.get("label"), entry.get("group_id"), entry.get("shape_type")
    if not isinstance(label, str):
        raise SourceError(f"its label is {_brief.repr(label)}; it must be the name of a class")
    if label not in values:
        raise SourceError(
            f"its label is none of the {len(values) - 1} names in {class_list}; add it there, or correct it"
        )
    if not isinstance(group, str | int | float | None):
        raise SourceError(f"its group_id is {_brief.repr(group)}; it must be a number or null")
    kind = "polygon" if kind is None else kind
    if not isinstance(kind, str) or kind not in _POINTS:
        raise SourceError(f"its shape_type is {_brief.repr(kind)}; it may be {', '.join(_POINTS)}")
    points = _points(entry.get("points"), kind, size)
    extent = _extent(kind, points)
    if kind == "mask" and not (0 < extent[2] - extent[0] <= size[1] and 0 < extent[3] - extent[1] <= size[0]):
        raise SourceError(
            f"its points make a box of {extent[2] - extent[0]} x {extent[3] - extent[1]} pixels, "
            f"the image has {size[1]} x {size[0]}"
        )
    if extent[0] > size[1] or extent[1] > size[0] or extent[2] < 0 or extent[3] < 0:
        raise SourceError(f"it lies outside the image of {size[1]} x {size[0]} pixels; move or remove it")
    instance = object() if group is None else (label, group)
    return _Shape(place, kind, values[label], instance, points, extent, entry.get("mask"))


def _points(points: object, kind: str, size: Size) -> list[Point]:
    if not isinstance(points, list):
        raise SourceError(f"its points are {_brief.repr(points)}; they must be a list of [x, y]")
    if len(points) not in _POINTS[kind]:
        needed, most = _POINTS[kind].start, len(_POINTS[kind])
        got = f"{len(points)} point{'s' if len(points) != 1 else ''}"
        article = "an" if kind == "oriented_rectangle" else "a"
        raise SourceError(f"{article} {kind} has {got}, it needs {'at least ' if most > 1 else ''}{needed}")
    height, width = size
    for number, point in enumerate(points, 1):
        if not (isinstance(point, list) and len(point) == 2 and all(type(value) in (int, float) for value in point)):
            raise SourceError(f"point {number} is {_brief.repr(point)}; it must be two numbers, [x, y]")
        if not (-width <= point[0] <= 2 * width and -height <= point[1] <= 2 * height):
            raise SourceError(
                f"point {number} is {_brief.repr(point)}; it may lie outside the image, which has {width} x {height} "
                "pixels, but not farther than the image is large"
            )
    return [(float(x), float(y)) for x, y in points]


def _bitmap(data: object, width: int, height: int) -> Image.Image:
    """The bitmap of a `mask`, which must be as large as the box between its two points, both included."""
    if not isinstance(data, str):
        raise SourceError(f"its mask is {_brief.repr(data)}; it must be a PNG in base64")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data)), formats=("PNG",)) as png:
            got = png.size
            pixels = np.asarray(png) if got == (width, height) else None
    except Exception as error:  # as above
        raise SourceError(f"its mask is no PNG in base64, or damaged: {error}") from error
    if pixels is None:
        raise SourceError(f"its mask has {got[0]} x {got[1]} pixels, the box between its points {width} x {height}")
    if pixels.ndim != 2:
        raise SourceError(f"its mask is an image of {pixels.shape[2]} channels; it must have one")
    return Image.fromarray(pixels != 0)


def _extent(kind: str, points: list[Point]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    if kind == "mask":
        return int(xs[0]), int(ys[0]), int(xs[1]) + 1, int(ys[1]) + 1
    if kind == "circle":
        radius = math.dist(*points)
        return xs[0] - radius, ys[0] - radius, xs[0] + radius, ys[0] + radius
    margin = {"point": _POINT_RADIUS, "line": _LINE_WIDTH / 2, "linestrip": _LINE_WIDTH / 2}.get(kind, 0)
    return min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin


def _masks(shapes: list[_Shape], ignore: int, size: Size) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]:
    """Class values and instance numbers. The numbers are drawn, and each of them belongs to one class."""
    numbers = {instance: number for number, instance in enumerate(dict.fromkeys(s.instance for s in shapes), 1)}
    if len(numbers) > _MAX_INSTANCES:
        raise SourceError(f"it has {len(numbers)} instances; a mask can hold {_MAX_INSTANCES}")
    if sum(_work(shape, size) for shape in shapes) > _MAX_WORK:
        raise SourceError("its shapes are too many, too large, or have too many points, to be drawn within a minute")
    drawn = Image.new("L" if len(numbers) <= 255 else "I", (size[1], size[0]))
    values, kept = [0] * (len(numbers) + 1), [0] * (len(numbers) + 1)
    for shape in shapes:
        number = numbers[shape.instance]
        _draw(drawn, shape, number)
        values[number], kept[number] = shape.value, number if shape.value != ignore else 0
    rows = np.asarray(drawn)
    return _looked_up(rows, values, np.uint8 if ignore == 255 else np.uint16), _looked_up(rows, kept, np.uint16)


def _work(shape: _Shape, size: Size) -> float:
    """Rows times edges, in the unit of `_MAX_WORK`; one edge takes as long as 16 pixels to fill, or 4 of a mask."""
    left, top, right, bottom = shape.extent
    width, height = min(size[1], right) - max(0, left), min(size[0], bottom) - max(0, top)
    return (len(shape.points) + width / (4 if shape.kind == "mask" else 16)) * (height + 1)


def _draw(image: Image.Image, shape: _Shape, number: int) -> None:
    draw = ImageDraw.Draw(image)
    if shape.kind == "mask":
        left, top, right, bottom = (int(edge) for edge in shape.extent)
        with _at(shape.place):
            image.paste(number, (left, top, right, bottom), _bitmap(shape.data, right - left, bottom - top))
    elif shape.kind in ("circle", "point"):
        draw.ellipse(shape.extent, fill=number, outline=number)
    elif shape.kind == "rectangle":
        draw.rectangle(shape.extent, fill=number, outline=number)
    elif shape.kind in ("line", "linestrip"):
        draw.line(shape.points, fill=number, width=_LINE_WIDTH)
    else:
        draw.polygon(shape.points, fill=number, outline=number)


def _looked_up(rows: npt.NDArray[Any], table: list[int], dtype: type[np.uint8 | np.uint16]) -> npt.NDArray[Any]:
    """`table` at each pixel, row by row: NumPy makes eight bytes of each index."""
    found = np.empty(rows.shape, dtype)
    values = np.array(table, dtype)
    for row, target in zip(rows, found, strict=True):
        target[:] = values[row]
    return found
