"""What tools/draw_tiles does once it is inside its environment: re-cut, splice, decode, draw all three side by side.

The default is the photograph of Chelsea the cat by Stéfan van der Walt, in the public domain (CC0), as scikit-image
ships it; it is encoded as `fastload pack --encode jpeg` encodes a PNG.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from demo_run import download_wheel
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from fastload import blocks, decode, jpeg, record, tiles
from fastload.geometry import Box
from fastload.items import Item, Source
from fastload.options import Options
from fastload.prepare import LeftOut, prepare

CAT, CATS_CROP = "skimage/data/chelsea.png", Box(206, 102, 158, 162)

WIDTH, HIGHEST, NARROWEST, MARGIN, GAP, ABOVE, BELOW, LEAD_IN_TEXT = 830, 420, 150, 6, 40, 26, 46, 17
DENSITY = 1.5
TITLES = ("an image, its tiles, a crop", "the small JPEG", "the crop")
CROP, LEAD_IN, INK, FAINT = "#00a5ff", "#ff2d78", "#222222", "#666666"


class Reading(NamedTuple):
    """What happens to a crop: an image, the tiles of it that are decoded, and the small JPEG that these make."""

    field: record.Field
    whole: blocks.Values
    crop: Box
    tile: tuple[int, int]
    mcu: tuple[int, int]
    spliced: tiles.Spliced
    small: jpeg.Pixels

    @property
    def lead_in(self) -> int:
        """How many pixels the lead-ins take at the left of the small JPEG."""
        return 0 if self.crop.x - self.spliced.x == 0 else self.mcu[1]

    @property
    def covered(self) -> Box:
        """The tiles that are decoded, in pixels of the image."""
        height, width = self.spliced.size
        left, top = self.crop.x - self.spliced.x + self.lead_in, self.crop.y - self.spliced.y
        return Box(left, top, width - self.lead_in, height)


def draw(image: Path | None, crop: list[int] | None, out: Path) -> int:
    """Draw the picture for an image, the cat by default; returns the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        path = image or get_cat(Path(temporary))
        source = Source("flat", [], None, 0, [])
        prepared = prepare(Item(path.name, str(path)), source, options=Options(encode="jpeg"))
    if isinstance(prepared, LeftOut) or prepared.cells["tiles"] != tiles.RECUT:
        reason = prepared.reason if isinstance(prepared, LeftOut) else tiles.OUTCOMES[prepared.cells["tiles"]]
        print(f"tools/draw_tiles: {path} has no tiles: {reason}; try another image", file=sys.stderr)
        return 2
    (field,) = prepared.fields
    size = field.height, field.width
    box = Box(*crop) if crop else CATS_CROP if image is None else right_of_the_middle(*size)
    if not box.inside(size):
        print(f"tools/draw_tiles: the crop {tuple(box)} is not inside {size[1]} x {size[0]} pixels", file=sys.stderr)
        return 2
    reading = read(field, box)
    if reading is None:
        print("tools/draw_tiles: this crop takes all tiles; give a smaller one with --crop", file=sys.stderr)
        return 2
    save(figure(reading), out)
    print(f"{out}: {out.stat().st_size:,} bytes; {' | '.join(captions(reading)).replace(chr(10), ' ')}")
    return 0


def get_cat(folder: Path) -> Path:
    """The photograph as a file in `folder`."""
    wheel = download_wheel(folder, "tools/draw_tiles IMAGE OUT.png")
    (folder / "cat.png").write_bytes(zipfile.ZipFile(wheel).read(CAT))
    return folder / "cat.png"


def right_of_the_middle(height: int, width: int) -> Box:
    return Box(round(0.46 * width), round(0.32 * height), round(0.36 * width), round(0.42 * height))


def read(field: record.Field, crop: Box) -> Reading | None:
    """Splice and decode; None where the crop takes all tiles. The crop's pixels are compared with the whole image's."""
    spliced = tiles.splice(field, crop)
    if spliced is None:
        return None
    whole = decode.pixels(field, keep=True)
    small = np.empty((*spliced.size, 3), np.uint8)
    jpeg.decode(spliced.data, small)
    below, right = crop.ends
    cut = small[spliced.y : spliced.y + crop.height, spliced.x : spliced.x + crop.width]
    assert np.array_equal(cut, whole[crop.y : below, crop.x : right])
    _, mcu_width, mcu_height, _, step, *_ = tiles._HEAD.unpack_from(field.tiles)
    return Reading(field, whole, crop, (mcu_height, step * mcu_width), (mcu_height, mcu_width), spliced, small)


def captions(reading: Reading) -> tuple[str, str, str]:
    """What stands below the three panels."""
    field, covered = reading.field, reading.covered
    height, width = reading.tile
    all_tiles = -(-field.height // height) * -(-field.width // width)
    used = -(-covered.height // height) * -(-covered.width // width)
    pixels = reading.small.size / reading.whole.size
    nbytes = len(reading.spliced.data) / len(field.payload)
    return (
        f"{field.width} x {field.height} pixels, {all_tiles} tiles of {width} x {height};\n{used} tiles cover the crop",
        f"decoded: {pixels:.0%} of the pixels,\n{nbytes:.0%} of the bytes",
        f"{reading.crop.width} x {reading.crop.height} pixels,\nequal bit for bit",
    )


def figure(reading: Reading) -> Figure:
    """The three panels at one scale, side by side."""
    images = [reading.whole.shape, reading.small.shape, (reading.crop.height, reading.crop.width)]
    room = WIDTH - 2 * MARGIN - 2 * GAP
    scale = min(HIGHEST / max(shape[0] for shape in images), room / sum(shape[1] for shape in images))
    while sum(max(NARROWEST, scale * shape[1]) for shape in images) > room:
        scale *= 0.99
    cells = [max(NARROWEST, scale * shape[1]) for shape in images]
    tallest = scale * max(shape[0] for shape in images)
    room_below = scale * (reading.field.height - reading.covered.ends[0])
    bottom = BELOW + max(0, LEAD_IN_TEXT - room_below)
    height = tallest + ABOVE + bottom
    spare = (room - sum(cells)) / 2
    canvas = Figure(figsize=(WIDTH / 100, height / 100), dpi=100 * DENSITY, facecolor="white")
    tops = [0, reading.covered.y, reading.crop.y]  # what is one row of the image stands side by side
    left = float(MARGIN)
    panels: list[Any] = []
    for shape, cell, top, title, caption in zip(images, cells, tops, TITLES, captions(reading), strict=True):
        below = bottom + tallest - scale * (top + shape[0])
        corner = (left + (cell - scale * shape[1]) / 2, below)
        panel = canvas.add_axes(
            (corner[0] / WIDTH, below / height, scale * shape[1] / WIDTH, scale * shape[0] / height)
        )
        panel.set_axis_off()
        middle = (left + cell / 2) / WIDTH
        texts = Box(0, 0, 0, reading.field.height) if not panels else reading.covered
        above = (bottom + tallest - scale * texts.y + 13) / height
        canvas.text(middle, above, title, ha="center", va="center", size=9, weight="bold", color=INK)
        under = (
            bottom + tallest - scale * texts.ends[0] - 9 - (LEAD_IN_TEXT if panels and reading.lead_in else 0)
        ) / height
        canvas.text(middle, under, caption, ha="center", va="top", size=8, color=FAINT, linespacing=1.4)
        panels.append(panel)
        left += cell + GAP + spare
    draw_image(panels[0], reading, scale)
    draw_small(panels[1], reading, scale)
    crop, spliced = reading.crop, reading.spliced
    show(panels[2], reading.small[spliced.y : spliced.y + crop.height, spliced.x : spliced.x + crop.width])
    frame(panels[2], Box(0, 0, crop.width, crop.height), CROP)
    arrows_at = (bottom + tallest - scale * (crop.y + crop.height / 2)) / height
    for before, after in itertools.pairwise(panels):
        arrow(canvas, before.get_position().x1, after.get_position().x0, arrows_at)
    return canvas


def draw_image(panel: Any, reading: Reading, scale: float) -> None:
    """The whole image, dimmed but for the tiles that are decoded; the grid, the lead-ins' MCUs, the crop."""
    covered, field = reading.covered, reading.field
    bright = np.zeros(reading.whole.shape[:2], bool)
    bright[covered.y : covered.ends[0], covered.x : covered.ends[1]] = True
    show(panel, dimmed(reading.whole, bright))
    height, width = reading.tile
    thin = {"color": "white", "linewidth": min(0.5, 0.04 * scale * height), "alpha": 0.75}
    panel.hlines(np.arange(height, field.height, height) - 0.5, -0.5, field.width - 0.5, **thin)
    panel.vlines(np.arange(width, field.width, width) - 0.5, -0.5, field.height - 0.5, **thin)
    if reading.lead_in:
        hatch(panel, Box(covered.x - reading.lead_in, covered.y, reading.lead_in, covered.height))
    frame(panel, reading.crop, CROP)


def draw_small(panel: Any, reading: Reading, scale: float) -> None:
    """The small JPEG, dimmed where it is cut off again; its column of lead-ins, the crop."""
    crop = reading.crop._replace(x=reading.spliced.x, y=reading.spliced.y)
    bright = np.zeros(reading.small.shape[:2], bool)
    bright[crop.y : crop.ends[0], crop.x : crop.ends[1]] = True
    bright[:, : reading.lead_in] = True
    show(panel, dimmed(reading.small, bright))
    height, width = reading.tile
    thin = {"color": "white", "linewidth": min(0.5, 0.04 * scale * height), "alpha": 0.75}
    rows, columns = reading.small.shape[:2]
    panel.hlines(np.arange(height, rows, height) - 0.5, -0.5, columns - 0.5, **thin)
    panel.vlines(np.arange(reading.lead_in + width, columns, width) - 0.5, -0.5, rows - 0.5, **thin)
    if reading.lead_in:
        hatch(panel, Box(0, 0, reading.lead_in, rows))
        panel.annotate(
            "lead-ins",
            (reading.lead_in / 2, rows),
            (-0.5, rows + 11 / scale),
            ha="left",
            va="center",
            size=8,
            color=LEAD_IN,
            annotation_clip=False,
        )
    frame(panel, crop, CROP)


def dimmed(pixels: blocks.Values, bright: Any) -> jpeg.Pixels:
    """The picture, grey and pale where it is not `bright`."""
    grey = pixels.mean(2, keepdims=True)
    pale = 0.55 * 255 + 0.45 * (0.7 * grey + 0.3 * pixels)
    return np.where(bright[..., None], pixels, pale.round().astype(np.uint8))


def show(panel: Any, pixels: jpeg.Pixels) -> None:
    panel.imshow(pixels, interpolation="lanczos", interpolation_stage="rgba", aspect="auto")


def frame(panel: Any, box: Box, colour: str) -> None:
    corner = (box.x - 0.5, box.y - 0.5)
    outline = [patheffects.Stroke(linewidth=3.4, foreground="white"), patheffects.Normal()]
    panel.add_patch(
        Rectangle(
            corner,
            box.width,
            box.height,
            fill=False,
            edgecolor=colour,
            linewidth=2,
            path_effects=outline,
            clip_on=False,
        )
    )


def hatch(panel: Any, box: Box) -> None:
    panel.add_patch(
        Rectangle(
            (box.x - 0.5, box.y - 0.5),
            box.width,
            box.height,
            fill=False,
            edgecolor=LEAD_IN,
            linewidth=0.8,
            hatch="/////",
        )
    )


def arrow(canvas: Figure, start: float, end: float, height: float) -> None:
    pad = 9 / WIDTH
    canvas.add_artist(
        matplotlib.patches.FancyArrowPatch(
            (start + pad, height),
            (end - pad, height),
            transform=canvas.transFigure,
            arrowstyle="-|>",
            mutation_scale=11,
            color=FAINT,
            linewidth=1.2,
        )
    )


def save(canvas: Figure, out: Path) -> None:
    """As a PNG with a palette: a third of the bytes."""
    drawn = io.BytesIO()
    with matplotlib.rc_context({"hatch.linewidth": 0.8}):
        canvas.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        palette = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    palette.save(out, optimize=True)
