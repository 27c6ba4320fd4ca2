"""Contact sheets: their size, where a picture lands, captions that fit, masks over pictures, what a dataset shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fastload import ImageDataset, Store, pack
from fastload.dataset import ImageType
from fastload.show import class_colour, contact_sheet, overlay, sheet_of
from fastload.transforms import Compose, Normalize, RandomHorizontalFlip, Resize

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


def test_no_pictures_make_no_sheet(kept: ImageDataset) -> None:
    """An empty picture would say nothing; the error says what to do."""
    for draw in (lambda: contact_sheet([], []), lambda: sheet_of([], None), lambda: kept.show([])):
        with pytest.raises(ValueError, match="no images to draw; name at least one"):
            draw()


@pytest.mark.parametrize(
    "name", ["two\nlines", "tab\there", "\x1b[31mred", "\udcff", "\u202eabc", "a\r\nb", "日本", "x" * 4000]
)
def test_any_name_can_be_a_caption_and_in_a_legend(name: str) -> None:
    """Folders and classes may be called anything that a file system or a JSON file takes; nothing else is drawn on."""
    colour = class_colour(1)
    sheet = contact_sheet([plain(CELL, CELL, (9, 9, 9))] * 2, [name, ""], columns=2, legend=[(colour, name)])
    assert sheet.size == (2 * (CELL + GAP) + GAP, CELL + TEXT + 2 * GAP + TEXT + GAP)
    pixels = np.asarray(sheet)
    assert (pixels[GAP + CELL : GAP + CELL + TEXT, : GAP - 2] == 255).all()
    assert (pixels[GAP + CELL : GAP + CELL + TEXT, GAP + CELL + 2 :] == 255).all()
    assert (pixels[GAP : GAP + CELL, GAP : GAP + CELL] == 9).all()


# ---- masks


VOC = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 5: (128, 0, 128)}
VOC |= {8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 21: (128, 64, 128), 255: (224, 224, 192)}


@pytest.mark.parametrize("value", VOC)
def test_classes_have_the_colours_of_pascal_voc(value: int) -> None:
    """Published with the data set; everybody's palettes have them."""
    assert class_colour(value) == VOC[value]


def test_any_value_of_a_mask_has_a_colour_of_its_own() -> None:
    """All 65,536 differ, so two classes are never mistaken for each other."""
    colours = {class_colour(value) for value in range(1 << 16)}
    assert len(colours) == 1 << 16
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_an_overlay_tints_outlines_and_hatches() -> None:
    """Pixel by pixel: class 0 stays, others are half their colour, edges are white, 255 is white in stripes."""
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    mask = torch.zeros((40, 60), dtype=torch.uint8)
    mask[10:30, 10:20], mask[10:30, 20:30], mask[10:30, 40:56] = 1, 15, 255
    pixels = np.asarray(overlay(image, mask))
    assert (pixels[:9] == 100).all()
    assert (pixels[11:29, 11:19] == (114, 50, 50)).all()
    assert (pixels[11:29, 21:29] == (146, 114, 114)).all()
    assert (pixels[10:30, [9, 19, 29, 39, 55]] == 255).all()
    assert (pixels[9, 10:30] == 255).all()
    inside = pixels[11:29, 41:55].reshape(-1, 3)
    white = (inside == 255).all(axis=1)
    assert 0.3 < white.mean() < 0.7
    assert (inside[~white] == (162, 162, 146)).all()


def test_instances_are_outlined_where_classes_are_one_region() -> None:
    """Two cats side by side are two things; the line between them is where the instances change."""
    image = torch.full((3, 30, 60), 100, dtype=torch.uint8)
    mask, instances = torch.ones((30, 60), dtype=torch.uint8), torch.ones((30, 60), dtype=torch.uint8)
    instances[:, 30:] = 2
    assert (np.asarray(overlay(image, mask)) == (114, 50, 50)).all()
    pixels = np.asarray(overlay(image, mask, instances))
    assert (pixels[:, 29] == 255).all()
    assert (np.delete(pixels, 29, axis=1) == (114, 50, 50)).all()


@pytest.mark.parametrize("size", [(10, 16), (90, 120), (330, 440), (1200, 1600)])
def test_outlines_are_as_thin_and_as_bright_at_any_size(size: tuple[int, int]) -> None:
    """They are drawn on what is seen: one white pixel, of an icon and of a photograph."""
    width = size[1]
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[:, width // 2 :] = 1
    image = torch.full((3, *size), 100, dtype=torch.uint8)
    sheet = np.asarray(sheet_of([("", {"image": image, "mask": mask})], None))
    row = sheet[GAP + CELL // 2, GAP : GAP + CELL].astype(int)
    line = np.flatnonzero((row[10:-10] == 255).all(axis=1) if width != 120 else (row[30:-30] == 255).all(axis=1))
    assert len(line) == 1
    assert abs(row[CELL // 4 + 8] - 100).max() <= 1
    assert abs(row[CELL - CELL // 4 - 8] - (114, 50, 50)).max() <= 1


def legend_of(sheet: Image.Image, rows: int = 1) -> list[tuple[int, ...]]:
    """The colours of a legend's boxes, from left to right."""
    top = GAP + rows * (CELL + TEXT + GAP)
    line = np.asarray(sheet)[top + 8, :, :]
    starts = [x for x in range(1, sheet.width - 12) if (line[x - 1] == 0).all() and (line[x + 11] == 0).all()]
    boxes = [x for x in starts if (line[x : x + 11] == line[x]).all() and (line[x - 2] == 255).all()]
    return [tuple(line[x].tolist()) for x in boxes]


def test_the_legend_names_what_is_shown() -> None:
    """Each class that a mask of the sheet shows, once, in the order of its numbers; not the background."""
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    masks = [torch.zeros((40, 60), dtype=torch.uint8) for _ in range(2)]
    masks[0][:10], masks[0][10:20], masks[1][:10], masks[1][10:20] = 15, 255, 2, 15
    samples: list[Any] = [(str(i), {"image": image, "mask": mask}) for i, mask in enumerate(masks)]
    sheet = sheet_of(samples, [f"class {n}" for n in range(16)], 4)
    assert legend_of(sheet) == [VOC[2], VOC[15], (255, 255, 255)]
    one = sheet_of(samples[1:], None)
    assert legend_of(one) == [VOC[2], VOC[15]]
    assert sheet_of([("", {"image": image, "mask": torch.zeros((40, 60), dtype=torch.uint8)})], None).height == (
        CELL + TEXT + 2 * GAP
    )


def test_a_long_legend_goes_on_below() -> None:
    """Forty classes below one picture: all of their boxes are there, none is cut off."""
    mask = torch.arange(1, 41, dtype=torch.uint8).repeat(40, 1)
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    sheet = sheet_of([("", {"image": image, "mask": mask})], [f"kind {n}" for n in range(41)])
    pixels = np.asarray(sheet)[GAP + CELL + TEXT :]
    for value in range(1, 41):
        assert ((pixels == class_colour(value)).all(axis=2)).sum() >= 11 * 11


# ---- boxes

GREY = (100, 100, 100)


def drawn(boxes: Any, labels: Any = None, size: tuple[int, int] = (CELL, CELL), **fields: Any) -> np.ndarray[Any, Any]:
    """The cell of a grey picture with boxes in it."""
    sample = {"image": plain(*size, GREY), "boxes": boxes, **fields}
    return cell_of(sheet_of([("", sample if labels is None else {**sample, "labels": labels})], None), 0, 1)


def outline(pixels: np.ndarray[Any, Any], box: tuple[int, int, int, int]) -> set[tuple[int, ...]]:
    """The colours of the two outermost rings of pixels in a box."""
    left, top, width, height = box
    ring = np.ones((height, width), np.bool_)
    ring[2:-2, 2:-2] = False
    return {tuple(p) for p in pixels[top : top + height, left : left + width][ring].tolist()}


@pytest.mark.parametrize("given", [np.array, torch.tensor, lambda rows: np.array(rows, np.float32), list])
def test_boxes_are_outlined_in_the_colour_of_their_class(given: Any) -> None:
    """Two pixels, and a white one within; nothing elsewhere. What is narrower than its name has none."""
    box = (20, 30, 8, 60)
    pixels = drawn(given([box]), np.array([5]))
    assert outline(pixels, box) == {VOC[5]}
    assert {tuple(p) for p in pixels[32:88, 22].tolist()} == {(255, 255, 255)}
    assert {tuple(p) for p in pixels[33:87, 23:25].reshape(-1, 3).tolist()} == {GREY}
    rows, columns = np.nonzero((pixels != GREY).any(2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 30, 27, 89)


@pytest.mark.parametrize(
    ("size", "box", "seen"),
    [
        ((320, 160), (40, 100, 10, 200), (60, 50, 5, 100)),
        ((40, 80), (10, 5, 3, 30), (20, 50, 6, 60)),
        ((1600, 1600), (0, 0, 70, 1600), (0, 0, 7, 160)),
    ],
)
def test_boxes_lie_where_they_lie_in_the_picture(size: Any, box: Any, seen: Any) -> None:
    """Pictures that are made smaller, or have larger pixels, take them along; lines are as wide as ever."""
    pixels = drawn([box], [1], size)
    found = np.argwhere((pixels == VOC[1]).all(2))
    assert (found.min(0).tolist(), found.max(0).tolist()) == (
        [seen[1], seen[0]],
        [seen[1] + seen[3] - 1, seen[0] + seen[2] - 1],
    )
    assert outline(pixels, seen) == {VOC[1]}


def test_names_are_written_where_there_is_room() -> None:
    """Above the box, or within it at the edge, on its colour. A black box is seen on black by its edge."""
    for top, strip in ((60, slice(48, 60)), (2, slice(2, 14))):
        pixels = drawn([(20, top, 100, 80)], [4])
        assert (pixels[strip, 20:23] == VOC[4]).all()
        assert (pixels[strip, 20:40] > 200).all(2).sum() > 5, "a white number"
    sample = {"image": plain(CELL, CELL, (0, 0, 0)), "boxes": [(20, 60, 100, 80)], "labels": [0]}
    texts = [
        cell_of(sheet_of([("", sample)], [name]), 0, 1)[44:60] for name in ("cat", "dog", "a name too long for it")
    ]
    assert texts[0].any()
    assert texts[1].any()
    assert not np.array_equal(texts[0], texts[1])
    assert not texts[2].any()
    assert cell_of(sheet_of([("", sample)], None), 0, 1)[62:138, [22, 117]].min() == 255


def test_boxes_without_area_are_not_drawn() -> None:
    """Those that a crop has cut off; and no boxes at all are fine."""
    gone = [(20, 30, 0, 0), (20, 30, 50, 0), (20, 30, 0, 50)]
    for boxes, labels in (([], []), (np.zeros((0, 4)), np.zeros(0, np.int64)), (gone, [1, 2, 3])):
        assert (drawn(boxes, labels) == GREY).all()
        assert (drawn(boxes) == GREY).all()
        sheet = sheet_of([("", {"image": plain(9, 9, GREY), "boxes": boxes, "labels": labels})], None)
        assert sheet.height == CELL + TEXT + 2 * GAP, "there is no legend"


def test_small_boxes_lie_over_large_ones() -> None:
    """Whatever their order: where their edges meet, the smaller one is seen."""
    for boxes, labels in (([(20, 20, 7, 60), (20, 20, 7, 30)], [1, 2]), ([(20, 20, 7, 30), (20, 20, 7, 60)], [2, 1])):
        pixels = drawn(boxes, labels)
        assert outline(pixels, (20, 20, 7, 30)) == {VOC[2]}
        assert (pixels[50:80, 20] == VOC[1]).all()


@pytest.mark.parametrize("labels", [None, 3, [1], [1, 2, 3], [[1, 2]], [0.5, 1.5], ["a", "b"]])
def test_labels_that_are_not_the_boxes_are_not_written_on_them(labels: Any) -> None:
    """One of the whole picture, say: boxes have a colour each, and the legend is empty."""
    boxes = [(20, 30, 60, 60), (90, 30, 60, 60)]
    assert outline(drawn(boxes, labels), boxes[0]) == {VOC[1]}
    assert outline(drawn(boxes, labels), boxes[1]) == {VOC[2]}
    fields = {"image": plain(9, 9, GREY), "boxes": boxes, "labels": labels}
    assert sheet_of([("", fields)], ["a", "b"]).height == CELL + TEXT + 2 * GAP, "there is no legend"


def test_the_legend_has_the_classes_of_masks_and_boxes() -> None:
    """0 is a class of boxes, and the background of masks; 255 is one too, where no mask ignores it."""
    image, mask = plain(CELL, CELL, GREY), torch.zeros((CELL, CELL), dtype=torch.uint8)
    mask[:80] = 3
    boxes = [(5, 100, 50, 50), (60, 100, 50, 50)]
    samples: list[Any] = [
        ("", {"image": image, "mask": mask}),
        ("", {"image": image, "boxes": boxes, "labels": [2, 0]}),
    ]
    assert legend_of(sheet_of(samples, None)) == [VOC[0], VOC[2], VOC[3]]
    assert legend_of(sheet_of([("", {"image": image, "boxes": boxes, "labels": [255, 4]})], None)) == [VOC[4], VOC[255]]
    both = drawn(boxes, [2, 1], mask=mask)
    assert outline(both, boxes[0]) == {VOC[2]}
    assert (both[20, 20] == (114, 114, 50)).all()


def test_what_is_no_boxes_is_said() -> None:
    """A transform may have made anything of them."""
    for boxes in (np.zeros((2, 5)), [(1, 2, -3, -4)], np.array(["a"] * 4)):
        with pytest.raises(ValueError, match=r"box|float"):
            drawn(boxes)


# ---- what a dataset shows


@pytest.fixture
def kept(store_path: Path) -> ImageDataset:
    return ImageDataset(store_path)


def cell_of(sheet: Image.Image, place: int, columns: int) -> np.ndarray[Any, Any]:
    row, column = divmod(place, columns)
    left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + TEXT + GAP)
    return np.asarray(sheet.crop((left, top, left + CELL, top + CELL)))


def test_a_dataset_shows_itself(kept: ImageDataset) -> None:
    """A PIL image, which a notebook draws; 32 samples at most; one, negative ones and NumPy's numbers by index."""
    sheet = kept.show()
    assert isinstance(sheet, Image.Image)
    assert sheet._repr_png_()[:4] == b"\x89PNG"
    assert sheet.size == (8 * (CELL + GAP) + GAP, 2 * (CELL + TEXT + GAP) + GAP)
    one = kept.show([11], columns=3)
    assert one.size == (CELL + 2 * GAP, CELL + TEXT + 2 * GAP)
    assert np.array_equal(cell_of(one, 0, 1), cell_of(sheet, 11, 8))
    assert kept.show(np.array([11])).tobytes() == one.tobytes()
    with pytest.raises(IndexError):
        kept.show([12])


def test_a_transform_shows_before_and_after(kept: ImageDataset, store_path: Path) -> None:
    """Each sample twice, side by side in whatever number of columns; the dataset itself is not changed by it."""
    dataset = ImageDataset(store_path, Compose([Resize((160, 160)), Normalize([0.5] * 3, [0.2] * 3)]))
    for columns in (8, 3, 2, 1, 0):
        pairs = max(2, columns - columns % 2) // 2
        sheet = dataset.show([0, 1, 2], columns=columns)
        assert sheet.width == 2 * min(pairs, 3) * (CELL + GAP) + GAP
    sheet = dataset.show([0, 1], columns=2)
    assert np.array_equal(cell_of(sheet, 0, 2), cell_of(kept.show([0]), 0, 1))
    after = cell_of(sheet, 1, 2)
    assert after.min() == 0
    assert after.max() >= 254
    image = ImageDataset(store_path, Resize((160, 160)))[0][0].permute(1, 2, 0).numpy().astype(float)
    low, high = image.min(), image.max()
    assert np.abs(after - (image - low) / (high - low) * 255).max() < 2
    assert isinstance(dataset[0][0], torch.Tensor)
    assert dataset.on_error == "placeholder"
    assert dataset.transform.rest


@pytest.mark.parametrize(
    ("image_type", "transform"),
    [
        ("pil", lambda picture: picture.resize((40, 20))),
        ("pil", lambda picture: picture.convert("L")),
        ("numpy", lambda array: array[::2, ::2]),
        ("numpy", lambda array: array.astype(np.float64) / 255),
        ("tensor", lambda tensor: tensor.to(torch.int64)),
        ("tensor", lambda tensor: tensor > 100),
        ("tensor", lambda tensor: tensor[:1].to(torch.bfloat16)),
    ],
)
def test_what_others_transforms_make_is_shown(store_path: Path, image_type: Any, transform: Any) -> None:
    """They get what they get in training (`image_type`), and any picture that comes of it is drawn."""
    sheet = ImageDataset(store_path, transform, image_type=image_type).show([0])
    assert sheet.width == 2 * (CELL + GAP) + GAP
    assert cell_of(sheet, 1, 2).std() > 10


def test_what_is_no_picture_is_said(store_path: Path) -> None:
    """A transform that gives a row of numbers, or two channels, can't be drawn; its shape is in the message."""
    for transform, shape in ((lambda t: t.flatten(), "(14400,)"), (lambda t: t[:2], "(2, 60, 80)")):
        with pytest.raises(ValueError, match=re.escape(shape)):
            ImageDataset(store_path, transform).show([0])


def test_a_subclass_is_shown_by_its_pictures(store_path: Path) -> None:
    """Whatever its own samples are."""

    class Numbered(ImageDataset):
        def __getitem__(self, index: int) -> Any:
            return index, super().__getitem__(index), "more"

    assert Numbered(store_path).show([3]).tobytes() == ImageDataset(store_path).show([3]).tobytes()


def test_grey_images_are_shown_grey(tmp_path: Path) -> None:
    """One channel becomes three that are equal; small ones get larger pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20), np.uint8)
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 3, 4, 5, 6)))
    pack(tmp_path, tmp_path / "db.lmdb")
    sheet = ImageDataset(tmp_path / "db.lmdb").show()
    for i in range(3):
        expected = np.kron(pixels[i], np.ones((8, 8), np.uint8))
        assert np.array_equal(cell_of(sheet, i, 3), np.repeat(expected[..., None], 3, axis=2))
    normalised = ImageDataset(tmp_path / "db.lmdb", Normalize([0.5], [0.5])).show([1])
    assert cell_of(normalised, 1, 2).std() > 50


def test_masks_and_instances_of_a_dataset_are_shown(tmp_path: Path) -> None:
    """labelme's classes by colour, instances by outlines, names in the legend; its masks follow the transform."""
    Image.fromarray(np.full((80, 80, 3), 100, np.uint8)).save(tmp_path / "a.png")
    shapes = [
        {"label": label, "points": points, "shape_type": "rectangle"}
        for label, points in (("cat", [[0, 0], [39, 79]]), ("cat", [[40, 0], [79, 39]]))
    ]
    (tmp_path / "a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "a.png", "imageData": None}))
    pack(tmp_path, tmp_path / "db.lmdb", format="labelme")
    for image_type in get_args(ImageType):
        sheet = ImageDataset(tmp_path / "db.lmdb", RandomHorizontalFlip(1.0), image_type=image_type).show()
        before, after = cell_of(sheet, 0, 2), cell_of(sheet, 1, 2)
        assert (before[20, 20] == (114, 50, 50)).all()
        assert (before[120, 120] == 100).all()
        assert (before[10:60, 79] == 255).all()
        assert (after[120, 20] == 100).all()
        assert (after[120, 120] == (114, 50, 50)).all()
        assert legend_of(sheet) == [VOC[1]]


def test_what_can_not_be_decoded_is_crossed_out_with_the_reason(store_path: Path, tmp_path: Path) -> None:
    """Red on black, and the reason in white where it is seen; the others are as ever, and nothing is counted."""
    payload = bytes(Store(store_path)[2]["image"].payload)
    data = store_path.read_bytes()
    (tmp_path / "db.lmdb").write_bytes(data.replace(payload, payload[:300] + bytes(40) + payload[340:]))
    dataset = ImageDataset(tmp_path / "db.lmdb", max_failures=0)
    sheet = dataset.show(range(4))
    whole = ImageDataset(store_path).show(range(4))
    crossed = cell_of(sheet, 2, 4)
    assert {(0, 0, 0), (200, 0, 0), (255, 255, 255)} <= set(map(tuple, crossed.reshape(-1, 3).tolist()))
    assert (crossed[40:120] > 128).all(axis=2).sum() > 300
    assert (crossed[:, :4] != 255).all()
    for i in (0, 1, 3):
        assert np.array_equal(cell_of(sheet, i, 4), cell_of(whole, i, 4))
    assert np.array_equal(np.asarray(sheet)[GAP + CELL :], np.asarray(whole)[GAP + CELL :]), "captions are the same"
    assert not dataset.failures
    reasons = [sheet_of([("", reason)], None).tobytes() for reason in ("a\nb", "another reason", "w" * 3000)]
    assert len(set(reasons)) == 3
