"""Contact sheets: their size, where a picture lands, and captions that fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fastload.show import contact_sheet

CELL, GAP, TEXT = 160, 8, 18


def plain(height: int, width: int, colour: tuple[int, int, int]) -> torch.Tensor:
    """A picture of one colour, (3, height, width)."""
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


def caption_of(sheet: Image.Image, place: int, columns: int) -> Image.Image:
    """The strip below a picture, as wide as the gaps let it be."""
    row, column = divmod(place, columns)
    left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + TEXT + GAP) + CELL
    return sheet.crop((left - GAP, top, left + CELL + GAP, top + TEXT))


@pytest.mark.parametrize(
    ("count", "columns", "grid"),
    [(1, 8, (1, 1)), (8, 8, (8, 1)), (9, 8, (8, 2)), (6, 3, (3, 2)), (7, 3, (3, 3)), (5, 1, (1, 5)), (4, 0, (1, 4))],
)
def test_the_sheet_is_as_large_as_its_grid(count: int, columns: int, grid: tuple[int, int]) -> None:
    """As many columns as asked for, no more than there are pictures, and as many rows as it takes."""
    sheet = contact_sheet([plain(10, 10, (0, 0, 0))] * count, [""] * count, columns)
    across, down = grid
    assert sheet.size == (across * (CELL + GAP) + GAP, down * (CELL + TEXT + GAP) + GAP)
    assert sheet.mode == "RGB"


def test_pictures_lie_row_by_row() -> None:
    """Picture i is in row i // columns, column i % columns, in RGB order; a place without one stays white."""
    colours = [(200, 10, 20), (30, 180, 40), (50, 60, 220)]
    sheet = np.asarray(contact_sheet([plain(CELL, CELL, colour) for colour in colours], ["", "", ""], columns=2))
    for place, colour in enumerate([*colours, (255, 255, 255)]):
        row, column = divmod(place, 2)
        top, left = GAP + row * (CELL + TEXT + GAP), GAP + column * (CELL + GAP)
        assert (sheet[top : top + CELL, left : left + CELL] == colour).all()
    assert (sheet[:GAP] == 255).all()
    assert (sheet[:, CELL + GAP : CELL + 2 * GAP] == 255).all()


def test_a_picture_of_the_cell_s_size_is_copied_pixel_by_pixel() -> None:
    """Nothing is lost where nothing has to be made smaller, channels-last tensors included."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, CELL, CELL), np.uint8))
    for tensor in (image, image[None].to(memory_format=torch.channels_last)[0]):
        sheet = np.asarray(contact_sheet([tensor], ["x"]))
        assert (sheet[GAP : GAP + CELL, GAP : GAP + CELL] == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((320, 160), (160, 80)), ((100, 400), (40, 160)), ((40, 60), (80, 120)), ((90, 60), (90, 60))],
)
def test_pictures_are_fitted_and_centred(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    """Larger ones shrink to the cell without a change of shape, small ones get larger pixels; all lie in the middle."""
    sheet = np.asarray(contact_sheet([plain(*size, (0, 128, 0))], [""]))
    rows, columns = np.nonzero((sheet == (0, 128, 0)).all(axis=2))
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == drawn
    assert rows.min() == GAP + (CELL - drawn[0]) // 2
    assert columns.min() == GAP + (CELL - drawn[1]) // 2


def test_captions_are_below_their_pictures() -> None:
    """A caption is drawn in its picture's strip and nowhere else; an empty one leaves it white."""
    sheet = contact_sheet([plain(CELL, CELL, (9, 9, 9))] * 3, ["ant", "", "bee"], columns=3)
    drawn = [caption_of(sheet, place, 3).crop((GAP, 0, GAP + CELL, TEXT)) for place in range(3)]
    white = Image.new("RGB", drawn[0].size, "white")
    assert [ImageChops.difference(strip, white).getbbox() is not None for strip in drawn] == [True, False, True]
    assert drawn[0].tobytes() != drawn[2].tobytes()


def test_long_captions_are_cut_to_the_cell() -> None:
    """What doesn't fit is left out, so the gaps between the cells stay white and the beginning is legible."""
    long = "a/very/long/path/of/a/file/that/nobody/could/ever/read/in/such/a/cell.jpg"
    image = plain(CELL, CELL, (9, 9, 9))
    sheet = contact_sheet([image] * 3, [long, long[:12], long], columns=3)
    strips = [caption_of(sheet, place, 3) for place in range(3)]
    for strip in strips:
        pixels = np.asarray(strip)
        assert (pixels < 128).any()
        assert (pixels[:, :GAP] == 255).all()
        assert (pixels[:, -GAP:] == 255).all()
    widths = [ImageChops.invert(strip).getbbox() for strip in strips]
    assert widths[0] == widths[2]
    assert widths[0] is not None
    assert widths[0][2] - widths[0][0] > CELL * 0.8
    different_end = contact_sheet([image], [long[:-4] + ".png"])
    assert caption_of(different_end, 0, 1).tobytes() == caption_of(contact_sheet([image], [long]), 0, 1).tobytes()


def test_a_caption_for_each_picture() -> None:
    """Too few or too many are refused."""
    for captions in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="argument"):
            contact_sheet([plain(9, 9, (0, 0, 0))], captions)
