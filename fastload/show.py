"""Pictures for people: contact sheets of a store's samples, with captions, masks and boxes drawn over them.

Each class has the colour that PASCAL VOC gives its number, in every picture. A mask's regions are tinted and outlined;
255, which losses ignore, is hatched. Boxes are outlined, and have their class written on them where it is no wider than
they are. Below the sheet a legend names the classes that it shows.
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

from .geometry import Size
from .pictures import class_colour, draw_boxes, scale_box

Colour = tuple[int, int, int]
_Legend = dict[int, tuple[Colour, str]]
"""The colours and names of classes, by their numbers."""

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

    Of the fields, image is drawn, and mask, instances and boxes over it: tensors, arrays or PIL images. A box is x, y,
    width and height in pixels of the image; one without area is not seen. labels: the boxes' classes, if they are
    known. What can't be shown is crossed out, and the reason written there.

    Raises:
        ValueError: there are no samples, an image is no picture (not of 1 or 3 channels), or boxes are none.
    """
    pictures, captions, legend = [], [], _Legend()
    for caption, fields in samples:
        picture, shown = (_crossed_out(fields), {}) if isinstance(fields, str) else _drawn(fields, classes)
        pictures.append(picture)
        captions.append(caption)
        legend |= shown
    return contact_sheet(pictures, captions, columns, legend=[entry for _, entry in sorted(legend.items())])


def _drawn(fields: dict[str, Any], classes: Sequence[str] | None) -> tuple[Image.Image, _Legend]:
    """A sample's picture with all that belongs over it, and what its classes are called."""
    image = _as_bytes(fields["image"])
    picture, legend = _fitted(_as_image(image)), _Legend()
    if "mask" in fields:
        picture, values = _masked(picture, fields)
        legend |= {value: _entry(value, classes) for value in values - {0}}
        if _IGNORE in legend:
            legend[_IGNORE] = (255, 255, 255), "ignored"
    if "boxes" in fields:
        picture, labels = _boxed(picture, (image.shape[1], image.shape[2]), fields, classes)
        legend |= {label: _entry(label, classes) for label in labels}
    return picture, legend


def _masked(picture: Image.Image, fields: dict[str, Any]) -> tuple[Image.Image, set[int]]:
    """A picture with its mask over it, and the mask's values."""
    mask, instances = _as_values(fields["mask"]), _as_values(fields.get("instances"))
    assert mask is not None
    rows, columns = (
        torch.arange(length) * of // length
        for length, of in zip((picture.height, picture.width), mask.shape, strict=True)
    )
    fitted = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    drawn = overlay(fitted, mask[rows][:, columns], instances if instances is None else instances[rows][:, columns])
    return drawn, set(mask.unique().tolist())


def _boxed(
    picture: Image.Image, size: Size, fields: dict[str, Any], classes: Sequence[str] | None
) -> tuple[Image.Image, set[int]]:
    """A picture with the boxes of its image of `size`, large ones below, and their labels."""
    boxes = scale_box(np.asarray(fields["boxes"]), size, (picture.height, picture.width)).reshape(-1, 4)
    labels, areas = np.asarray(fields.get("labels", ())), boxes[:, 2] * boxes[:, 3]
    order = np.array([place for place in np.argsort(-areas) if areas[place] > 0], np.int64)
    boxes = boxes[order]
    drawn = draw_boxes(np.array(picture), boxes, colors="white", width=3)  # a light edge, for dark colours on dark
    if labels.shape != areas.shape or labels.dtype.kind not in "iu":
        return _as_image(draw_boxes(drawn, boxes)), set()
    values, font = labels[order].tolist(), ImageFont.load_default(size=12)
    entries = [_entry(value, classes) for value in values]
    texts = [name if font.getlength(name) + 6 <= box[2] else "" for (_, name), box in zip(entries, boxes, strict=True)]
    return _as_image(draw_boxes(drawn, boxes, texts, [colour for colour, _ in entries])), set(values)


def _entry(value: int, classes: Sequence[str] | None) -> tuple[Colour, str]:
    """The colour and the name of a class, or its number."""
    return class_colour(value), _visible(classes[value] if classes and 0 <= value < len(classes) else str(value))


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
