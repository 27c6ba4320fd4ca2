"""Pictures to files, and boxes: saved, scaled, drawn.

A picture here is a tensor (channels, height, width), as datasets give it, or an array (height, width, channels) or
(channels, height, width); 3 channels (RGB) or 1 (grey); uint8, or floating with values from 0 to 1. A box is (x, y,
width, height) in pixels, x and y of its left upper corner, as regions are everywhere in fastload. (torchvision's are
mostly (left, top, right, bottom).)
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .geometry import Size
from .jpeg import Pixels

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""What `save_image` writes, by a path's suffix."""

Colour = str | tuple[int, int, int]


def save_image(image: torch.Tensor | npt.NDArray[Any], path: str | os.PathLike[str], quality: int = 95) -> None:
    """Write a picture to a file: JPEG, PNG, WebP or BMP, as the suffix says. Nobody ever sees half a file.

    image: (3 or 1, height, width), or an array (height, width, 3 or 1); uint8, or floating with values from 0 to 1.
    quality: 1 to 100, of JPEG and WebP.

    Raises:
        ValueError: shape, values, suffix or quality are none of these, or the format takes no picture so large.
        TypeError: it is no tensor and no array, or of another dtype.
        FileNotFoundError: there is no such folder.

    Example:
        >>> fastload.pictures.save_image(dataset.read(0, reduce=4), "small.png")
    """
    path = Path(path)
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise ValueError(f"{path} ends in {path.suffix!r}; it may end in {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}; it may be 1 to 100")
    pixels = _pixels(image)
    file = io.BytesIO()
    options = {"quality": quality} if format in ("JPEG", "WEBP") else {}
    try:
        Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, format, **options)
    except (OSError, ValueError) as error:
        size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
        raise ValueError(f"{path}: {size} can't be saved as {format} ({error}); .png takes any size") from error
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it first")
    _write(path, file.getbuffer())


def _write(path: Path, data: memoryview) -> None:
    """Write a file under another name beside its own, which it gets when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_images(
    batch: torch.Tensor | npt.NDArray[Any] | Sequence[torch.Tensor | npt.NDArray[Any]],
    folder: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    suffix: str = ".png",
) -> list[Path]:
    """Write each picture of a batch to a file of its own, and return their paths. The folder is made if it is missing.

    batch: pictures as `save_image` takes them, in a sequence, a tensor or an array. names: of the files, without
    suffix; 0, 1, 2 and so on by default, all with as many digits. suffix: see `save_image`.

    Raises:
        ValueError: names are too many or too few, come twice, or lead to another folder; see `save_image` too.
        FileNotFoundError: the folder that this folder is to be in is missing.
    """
    digits = len(str(max(0, len(batch) - 1)))
    names = [f"{number:0{digits}}" for number in range(len(batch))] if names is None else list(names)
    if len(names) != len(batch):
        raise ValueError(f"there are {len(names)} names for {len(batch)} pictures")
    wrong = [name for place, name in enumerate(names) if name in names[:place] or not name or Path(name).name != name]
    if wrong:
        raise ValueError(f"{wrong[0]!r} can't name a file here: it comes twice, is empty or leads to another folder")
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}{suffix}" for name in names]
    for image, path in zip(batch, paths, strict=True):
        save_image(image, path)
    return paths


def scale_box(boxes: Any, from_size: Size, to_size: Size) -> Any:
    """Boxes of an image as they lie in that image at another size.

    boxes: (x, y, width, height), or many of them; a tensor or an array (..., 4), or sequences of numbers.
    from_size, to_size: (height, width).

    Returns:
        The same kind of thing, of floats: a tensor or array of its floating dtype (of torch's default one or float64
        where it had whole numbers), a tuple for a tuple, a list for any other sequence.

    Example:
        >>> fastload.pictures.scale_box((10, 20, 30, 40), from_size=(100, 200), to_size=(50, 50))
        (2.5, 10.0, 7.5, 20.0)
    """
    if min(*from_size, *to_size) <= 0:
        raise ValueError(f"sizes are (height, width) above 0, got {from_size} and {to_size}")
    down, across = to_size[0] / from_size[0], to_size[1] / from_size[1]
    factors = across, down, across, down
    if isinstance(boxes, torch.Tensor):
        _check_boxes(boxes.shape)
        boxes = boxes if boxes.is_floating_point() else boxes.to(torch.get_default_dtype())
        return boxes * boxes.new_tensor(factors)
    array = np.asarray(boxes)
    array = array if array.dtype.kind == "f" else array.astype(np.float64)
    if array.shape == (0,):
        array = array.reshape(0, 4)
    _check_boxes(array.shape)
    scaled = array * np.array(factors, array.dtype)
    if isinstance(boxes, np.ndarray):
        return scaled
    return tuple(scaled.tolist()) if isinstance(boxes, tuple) else scaled.tolist()


def draw_boxes(
    image: torch.Tensor | npt.NDArray[Any],
    boxes: Any,
    labels: Sequence[object] | None = None,
    colors: Colour | Sequence[Colour] | None = None,
    width: int = 2,
) -> torch.Tensor:
    """A copy of a picture with boxes drawn on it: uint8 (3, height, width).

    image: see `save_image`. boxes: (x, y, width, height) in pixels of the picture, a tensor, array or sequence (n, 4).
    Lines lie inside of the box; what of it is outside of the picture is not seen.
    labels: what is written at each box, if it isn't empty. colors: one for all, or one for each: a name or (red, green,
    blue). By default equal labels have equal colours. width: of the lines, in pixels.

    Raises:
        ValueError, TypeError: see `save_image`; and boxes are no numbers (n, 4), or there are more or fewer labels or
            colours than boxes.

    Example:
        >>> drawn = fastload.pictures.draw_boxes(image, [(10, 20, 100, 80)], ["cat"])
    """
    array = np.asarray(boxes.detach().cpu() if isinstance(boxes, torch.Tensor) else boxes, np.float64)
    array = array if array.size else array.reshape(0, 4)
    _check_boxes(array.shape)
    if array.ndim != 2 or not np.isfinite(array).all() or (array[:, 2:] < 0).any():
        raise ValueError("boxes are n times (x, y, width, height), whose width and height are 0 or more")
    count = len(array)
    texts = None if labels is None else [str(label) for label in labels]
    chosen = _colours(colors, range(count) if texts is None else texts, count)
    for name, values in (("labels", texts), ("colors", chosen)):
        if values is not None and len(values) != count:
            raise ValueError(f"there are {len(values)} {name} for {count} boxes")
    if width < 1:
        raise ValueError(f"width is {width}; it is 1 or more pixels")
    pixels = _pixels(image)
    picture = Image.fromarray(pixels.repeat(3 // pixels.shape[2], 2))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(12, min(picture.size) // 40))
    far = max(picture.size) + width
    corners = np.rint(np.concatenate((array[:, :2], array[:, :2] + array[:, 2:]), 1)).clip(-far, 2 * far).astype(int)
    edges = [(left, top, max(left, right - 1), max(top, below - 1)) for left, top, right, below in corners.tolist()]
    for edge, colour in zip(edges, chosen, strict=True):
        _draw_outline(draw, edge, colour, width)
    for edge, colour, text in zip(edges, chosen, texts or (), strict=texts is not None):
        if text:
            _write_label(draw, text, edge[:2], colour, font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def class_colour(value: int) -> tuple[int, int, int]:
    """The colour of a class: PASCAL VOC's map, whose channels take the bits of the number in turn, highest first."""
    red, green, blue = (
        sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)
    )
    return red, green, blue


def _draw_outline(draw: ImageDraw.ImageDraw, edge: tuple[int, int, int, int], colour: Colour, width: int) -> None:
    """Four filled bars: the outlines of small rectangles that Pillow draws reach beyond them."""
    left, top, right, below = edge
    draw.rectangle((left, top, right, min(below, top + width - 1)), colour)
    draw.rectangle((left, max(top, below - width + 1), right, below), colour)
    draw.rectangle((left, top, min(right, left + width - 1), below), colour)
    draw.rectangle((max(left, right - width + 1), top, right, below), colour)


def _write_label(draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], colour: Colour, font: Any) -> None:
    """Write on a ground of the box's colour: above its upper left corner, or within it at the picture's edge."""
    _, top, right, below = font.getbbox(text)
    width, height = int(right) + 6, int(below - top) + 6
    x = max(0, min(corner[0], draw.im.size[0] - width))
    y = corner[1] - height if corner[1] >= height else max(0, corner[1])
    draw.rectangle((x, y, x + width - 1, y + height - 1), colour)
    red, green, blue = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else colour
    dark = 299 * red + 587 * green + 114 * blue < 150_000
    draw.text((x + 3, y + 3 - top), text, "white" if dark else "black", font)


def _colours(colors: Colour | Sequence[Colour] | None, kinds: Sequence[object], count: int) -> Sequence[Colour]:
    """A colour for each box. kinds: what has the same colour by default."""
    if colors is None:
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds), start=1)}
        return [class_colour(numbers[kind]) for kind in kinds]
    if isinstance(colors, str):
        return [colors] * count
    if isinstance(colors, tuple) and len(colors) == 3 and all(isinstance(value, int) for value in colors):
        return [colors] * count  # type: ignore[list-item]  # three ints are a colour
    return list(colors)  # type: ignore[arg-type]


def _check_boxes(shape: Sequence[int]) -> None:
    if not len(shape) or shape[-1] != 4:
        raise ValueError(f"a box is 4 numbers, (x, y, width, height); the shape is {tuple(shape)}")


def _pixels(image: torch.Tensor | npt.NDArray[Any]) -> Pixels:
    """A picture as contiguous uint8 (height, width, 3 or 1)."""
    first = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"a picture is a tensor or an array, got {type(image).__name__}")
    values: npt.NDArray[Any] = image
    if values.ndim == 3 and (first or values.shape[2] not in (1, 3)):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size:
        raise ValueError(
            f"the shape is {image.shape}; a picture is (3 or 1, height, width), or as an array (height, width, 3 or 1)"
        )
    if values.dtype.kind == "f":
        levels = np.rint(values * np.float32(255))
        if not (levels.min() >= 0 and levels.max() <= 255):  # NaN is neither
            raise ValueError(
                f"values are from {values.min()} to {values.max()}; floating ones may be 0 to 1: undo Normalize first"
            )
        values = levels.astype(np.uint8)
    if values.dtype != np.uint8:
        raise TypeError(f"the dtype is {values.dtype}; a picture is uint8, or floating from 0 to 1")
    return np.ascontiguousarray(values)
