"""Pictures for people: contact sheets of a store's samples, with captions, masks and boxes drawn over them.

Each class has the colour that PASCAL VOC gives its number, in every picture. A mask's regions are tinted and outlined;
255, which losses ignore, is hatched. Below the sheet a legend names the classes that it shows.
"""

from __future__ import annotations

import math
import textwrap
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

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("there are no images to draw; name at least one")
    legend = [(colour, _visible(text)) for colour, text in legend]
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


def _visible(text: str) -> str:
    """Text that is one line: control characters and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    caption = _visible(caption)
    if len(caption) <= _CELL and draw.textlength(caption, font) <= _CELL:
        return caption
    caption = caption[:_CELL]  # measuring takes its time, and no letter is narrower than a pixel
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

    Of the fields, image is drawn, and mask and instances over it: tensors, arrays or PIL images. What can't be shown is
    crossed out, and the reason written there.

    Raises:
        ValueError: there are no samples, or an image is no picture: not of 1 or 3 channels.
    """
    pictures, captions, values = [], [], set[int]()
    for caption, fields in samples:
        if isinstance(fields, str):
            picture, shown = _crossed_out(fields), set[int]()
        else:
            picture, shown = _drawn(fields)
        pictures.append(picture)
        captions.append(caption)
        values |= shown
    return contact_sheet(pictures, captions, columns, legend=_legend(values, classes))


def _drawn(fields: dict[str, Any]) -> tuple[Image.Image, set[int]]:
    """A sample's picture with all that belongs over it, and the values of its mask."""
    image = _as_bytes(fields["image"])
    picture = _fitted(_as_image(image))
    if "mask" not in fields:
        return picture, set()
    mask, instances = _as_values(fields["mask"]), _as_values(fields.get("instances"))
    assert mask is not None
    rows, columns = (
        torch.arange(length) * of // length
        for length, of in zip((picture.height, picture.width), mask.shape, strict=True)
    )
    fitted = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    drawn = overlay(fitted, mask[rows][:, columns], instances if instances is None else instances[rows][:, columns])
    return drawn, set(mask.unique().tolist())


def _as_values(mask: Any) -> torch.Tensor | None:
    return mask if mask is None or isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))


def _as_bytes(image: Any) -> torch.Tensor:
    """Any picture as uint8 (channels, height, width); what is not of bytes fills their range from 0 to 255."""
    tensor: torch.Tensor = image
    if not isinstance(image, torch.Tensor):
        tensor = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        raise ValueError(
            f"an image of shape {tuple(tensor.shape)} can't be drawn; it has to be (1 or 3, height, width)"
        )
    if tensor.dtype == torch.uint8:
        return tensor
    values = tensor.to(torch.float32)
    low, high = values.amin(), values.amax()
    return ((values - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)


def _legend(values: set[int], classes: Sequence[str] | None) -> list[tuple[Colour, str]]:
    names = {_IGNORE: "ignored", **dict(enumerate(classes or ()))}
    colours = {_IGNORE: (255, 255, 255)}
    return [(colours.get(value, class_colour(value)), names.get(value, str(value))) for value in sorted(values - {0})]


def _crossed_out(reason: str) -> Image.Image:
    """A black picture with a red cross, and the reason over it in as many lines as fit."""
    picture = Image.new("RGB", (_CELL, _CELL), "black")
    draw = ImageDraw.Draw(picture)
    for line in ((0, 0, _CELL, _CELL), (0, _CELL, _CELL, 0)):
        draw.line(line, _WRONG, width=5)
    font = ImageFont.load_default(size=11)
    lines = textwrap.wrap(_visible(reason), 26)[: _CELL // 14 - 1]
    draw.multiline_text((_CELL / 2, _CELL / 2), "\n".join(lines), "white", font, "mm", align="center")
    return picture
