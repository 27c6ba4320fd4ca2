"""Pictures for people: a contact sheet of images and their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _TEXT = 160, 8, 18


def contact_sheet(images: Sequence[torch.Tensor], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Draw images in a grid, each fitted into 160 x 160 pixels, with its caption below.

    images: uint8 (3, height, width). captions: one for each, cut to the cell's width.
    """
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = _GAP + column * (_CELL + _GAP), _GAP + row * (_CELL + _TEXT + _GAP)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((_CELL, _CELL))
        sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
        draw.text((left + _CELL / 2, top + _CELL + 2), _fitting(caption, draw, font), "black", font, anchor="ma")
    return sheet


def _fitting(caption: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """The caption, or as much of it as is no wider than a cell, with an ellipsis."""
    if draw.textlength(caption, font) <= _CELL:
        return caption
    return next(
        short for end in range(len(caption) - 1, -1, -1) if draw.textlength(short := caption[:end] + "…", font) <= _CELL
    )
