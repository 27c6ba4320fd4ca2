"""Pictures for people: contact sheets of a store's samples, with captions, masks and boxes drawn over them.

Each class has the colour that PASCAL VOC gives its number, in every picture. A mask's regions are tinted and outlined;
255, which losses ignore, is hatched. Below the sheet a legend names the classes that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_CELL, _GAP, _TEXT = 160, 8, 18
_TINT = 0.5
_IGNORE = 255
_WRONG: Colour = (200, 0, 0)


def contact_sheet(
    images: Sequence[torch.Tensor | Image.Image],
    captions: Sequence[str],
    columns: int = 8,
    *,
    legend: Sequence[tuple[Colour, str]] = (),
) -> Image.Image:
    """Draw images in a grid, each fitted into 160 x 160 pixels, with its caption below. Small ones have larger pixels.

    images: uint8 (3, height, width) tensors, or PIL images. captions: one for each, cut to the cell's width.
    legend: colours and what they mean, below the grid.
    """
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP
    font = ImageFont.load_default(size=12)
    places = _legend_places([text for _, text in legend], width, font)
    sheet = Image.new("RGB", (width, height + (places[-1][1] + _TEXT + _GAP if places else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = _GAP + column * (_CELL + _GAP), _GAP + row * (_CELL + _TEXT + _GAP)
        picture = image if isinstance(image, Image.Image) else _as_image(image)
        picture = _fitted(picture)
        sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
        draw.text((left + _CELL / 2, top + _CELL + 2), _fitting(caption, draw, font), "black", font, anchor="ma")
    for (colour, text), (x, y) in zip(legend, places, strict=True):
        draw.rectangle((x, height + y + 2, x + 12, height + y + 14), colour, "black")
        draw.text((x + 18, height + y + 2), text, "black", font)
    return sheet


def _as_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _fitted(picture: Image.Image) -> Image.Image:
    factor = _CELL // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_CELL, _CELL))
    return picture


def _legend_places(texts: Sequence[str], width: int, font: Any) -> list[tuple[int, int]]:
    """Where each entry of a legend begins, from left to right in as many lines as it takes."""
    places, x, y = [], _GAP, 0
    for text in texts:
        length = 18 + int(font.getlength(text)) + 2 * _GAP
        if x > _GAP and x + length > width:
            x, y = _GAP, y + _TEXT
        places.append((x, y))
        x += length
    return places


def _fitting(caption: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """The caption, or as much of it as is no wider than a cell, with an ellipsis."""
    if draw.textlength(caption, font) <= _CELL:
        return caption
    return next(
        short for end in range(len(caption) - 1, -1, -1) if draw.textlength(short := caption[:end] + "…", font) <= _CELL
    )


def class_colour(value: int) -> Colour:
    """The colour of a class: PASCAL VOC's map, whose channels take the bits of the number in turn, highest first."""
    red, green, blue = (
        sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)
    )
    return red, green, blue


def overlay(image: torch.Tensor, mask: torch.Tensor, instances: torch.Tensor | None = None) -> Image.Image:
    """A picture with its mask over it.

    image: uint8 (3, height, width). mask: whole numbers (height, width). instances: the same, outlined instead of the
    mask's own regions.
    """
    values = mask.numpy()
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(np.float32)
    numbers, places = np.unique(values, return_inverse=True)
    colours = np.array([class_colour(int(number)) for number in numbers], np.float32)[places.reshape(values.shape)]
    tinted = np.where((values > 0)[..., None], (1 - _TINT) * pixels + _TINT * colours, pixels)
    rows, columns = np.indices(values.shape)
    tinted[(values == _IGNORE) & ((rows + columns) // 4 % 2 == 0)] = 255
    tinted[_edges(values if instances is None else instances.numpy())] = 255
    return Image.fromarray(tinted.astype(np.uint8))


def _edges(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Pixels that differ from the one below or to the right."""
    edges = np.zeros(values.shape, np.bool_)
    edges[:-1] |= values[:-1] != values[1:]
    edges[:, :-1] |= values[:, :-1] != values[:, 1:]
    return edges


def sheet_of(
    samples: Sequence[tuple[str, dict[str, Any] | str]], classes: Sequence[str] | None, columns: int = 8
) -> Image.Image:
    """A contact sheet of samples: a caption for each, and its fields by name, or why it can't be shown.

    Of the fields, image is drawn, and mask and instances over it. What can't be shown is crossed out.
    """
    pictures, captions, values = [], [], set[int]()
    for caption, fields in samples:
        if isinstance(fields, str):
            pictures.append(_crossed_out())
            captions.append(f"{caption} {fields}")
            continue
        picture, shown = _drawn(fields)
        pictures.append(picture)
        captions.append(caption)
        values |= shown
    return contact_sheet(pictures, captions, columns, legend=_legend(values, classes))


def _drawn(fields: dict[str, Any]) -> tuple[Image.Image, set[int]]:
    """A sample's picture with all that belongs over it, and the values of its mask."""
    image = fields["image"]
    if image.is_floating_point():
        low, high = image.amin(), image.amax()
        image = ((image - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    if "mask" not in fields:
        return _as_image(image), set()
    mask, instances = fields["mask"], fields.get("instances")
    step = max(1, max(mask.shape) // (2 * _CELL))  # outlines are to be seen after the picture is made smaller
    image, mask = image[:, ::step, ::step], mask[::step, ::step]
    picture = overlay(image, mask, instances if instances is None else instances[::step, ::step])
    return picture, set(mask.unique().tolist())


def _legend(values: set[int], classes: Sequence[str] | None) -> list[tuple[Colour, str]]:
    names = {_IGNORE: "ignored", **dict(enumerate(classes or ()))}
    colours = {_IGNORE: (255, 255, 255)}
    return [(colours.get(value, class_colour(value)), names.get(value, str(value))) for value in sorted(values - {0})]


def _crossed_out() -> Image.Image:
    picture = Image.new("RGB", (_CELL, _CELL), "black")
    draw = ImageDraw.Draw(picture)
    for line in ((0, 0, _CELL, _CELL), (0, _CELL, _CELL, 0)):
        draw.line(line, _WRONG, width=5)
    return picture
