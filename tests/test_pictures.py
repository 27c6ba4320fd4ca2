"""Pictures to files and boxes on pictures: what comes back, where lines lie, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pixels, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastload import pictures
from fastload.pictures import draw_boxes, save_image, save_images, scale_box


def tensor_of(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def saved(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image)


# --- save_image


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".PNG"])
def test_what_is_saved_without_loss_comes_back(tmp_path: Path, suffix: str) -> None:
    """Tensors and arrays, channels first or last, uint8 or from 0 to 1, in colour or grey: the same file."""
    pixels = picture(20, 31)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    floating = tensor_of(pixels) / 255
    forms: list[Any] = [tensor_of(pixels), pixels, first, floating, floating.numpy(), floating.double(), pixels / 255]
    forms += [floating.half(), (pixels / 255).astype(np.float16), floating.clone().requires_grad_()]
    for form in forms:
        save_image(form, tmp_path / f"a{suffix}")
        assert np.array_equal(saved(tmp_path / f"a{suffix}"), pixels)
    for form in (tensor_of(pixels)[1:2], pixels[..., 1:2], first[1:2]):
        save_image(form, tmp_path / f"gray{suffix}")
        assert np.array_equal(saved(tmp_path / f"gray{suffix}"), pixels[..., 1])


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_quality_is_heeded(tmp_path: Path, suffix: str) -> None:
    """A better picture is a larger file, and near to what was saved."""
    pixels = picture(64, 80)
    paths = {quality: tmp_path / f"{quality}{suffix}" for quality in (10, 95)}
    for quality, path in paths.items():
        save_image(pixels, path, quality)
    assert paths[10].stat().st_size < paths[95].stat().st_size / 2
    assert np.abs(saved(paths[95]).astype(int) - pixels).mean() < 6
    with Image.open(paths[95]) as image:
        assert image.format == pictures.FORMATS[suffix]


def test_a_tensor_s_channels_come_first_whatever_its_sides(tmp_path: Path) -> None:
    """Three columns of pixels are no channels; of an array of such a shape they are the last."""
    pixels = picture(9, 3)
    save_image(tensor_of(pixels), tmp_path / "a.png")
    assert np.array_equal(saved(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(4, 5, 5), ValueError, r"the shape is \(4, 5, 5\); a picture is"),
        (torch.zeros(2, 3, 5, 5), ValueError, "a picture is"),
        (torch.zeros(5, 5), ValueError, "a picture is"),
        (np.zeros((5, 4, 2), np.uint8), ValueError, "a picture is"),
        (torch.zeros(3, 0, 5), ValueError, "a picture is"),
        (torch.full((3, 5, 5), float("nan")), ValueError, "from nan to nan"),
        (torch.full((3, 5, 5), float("inf")), ValueError, "undo Normalize first"),
        (torch.full((3, 5, 5), 1.1), ValueError, "from 1.1.* to 1.1.*; floating ones may be 0 to 1"),
        (np.full((5, 5, 3), -0.1), ValueError, "may be 0 to 1"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), TypeError, "the dtype is int64"),
        (np.zeros((5, 5, 3), bool), TypeError, "the dtype is bool"),
        ("photo.jpg", TypeError, "got str"),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused(tmp_path: Path, image: Any, error: type[Exception], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(error, match=message):
        save_image(image, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_saved_the_error_says_why(tmp_path: Path) -> None:
    """Suffix, quality, folder, and sizes that a format has no room for."""
    image = picture(4, 4)
    with pytest.raises(ValueError, match=r"ends in '.gif'; it may end in .jpg, .jpeg, .png, .webp, .bmp"):
        save_image(image, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="ends in ''"):
        save_image(image, tmp_path / "a")
    with pytest.raises(ValueError, match="quality is 0; it may be 1 to 100"):
        save_image(image, tmp_path / "a.jpg", quality=0)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; make it first"):
        save_image(image, tmp_path / "missing" / "a.png")
    for suffix in ("webp", "jpg"):
        with pytest.raises(ValueError, match="70000 x 1 pixels can't be saved as "):
            save_image(np.zeros((1, 70000, 3), np.uint8), tmp_path / f"a.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a file has its name when it is complete."""
    save_image(picture(8, 8), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(bytes(data)[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(picture(9, 9), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


# --- save_images


def test_a_batch_becomes_files_in_order(tmp_path: Path) -> None:
    """Tensors of a batch or lists of pictures of different sizes; the folder is made; names sort as the batch does."""
    images = torch.stack([tensor_of(picture(6, 7, seed)) for seed in range(11)])
    paths = save_images(images, tmp_path / "out")
    assert [path.name for path in paths] == [f"{number:02}.png" for number in range(11)]
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(saved(path), image.permute(1, 2, 0).numpy())
    sizes = [picture(4, 5), tensor_of(picture(8, 3))]
    paths = save_images(sizes, str(tmp_path / "out"), ["ant", "bee.1"], suffix=".bmp")
    assert [path.name for path in paths] == ["ant.bmp", "bee.1.bmp"]
    assert [saved(path).shape for path in paths] == [(4, 5, 3), (8, 3, 3)]
    assert save_images([], tmp_path / "none") == []


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a"], ["a", ""], ["a", "../b"], ["a", "b/c"]])
def test_names_that_do_not_fit_are_refused(tmp_path: Path, names: list[str]) -> None:
    """Too few, too many, the same twice, or into another folder; nothing is written."""
    with pytest.raises(ValueError, match=r"names for 2 pictures|can't name a file here"):
        save_images([picture(4, 4)] * 2, tmp_path / "out", names)
    assert list(tmp_path.iterdir()) == []


# --- scale_box


def test_boxes_are_scaled_in_what_they_come_in() -> None:
    """Tensors, arrays, lists and tuples give their like, in floats; sizes are (height, width)."""
    box, scaled = [10, 20, 30, 40], [2.5, 10.0, 7.5, 20.0]
    sizes = (100, 200), (50, 50)
    assert scale_box(box, *sizes) == scaled
    assert scale_box(tuple(box), *sizes) == tuple(scaled)
    assert scale_box([box, box], *sizes) == [scaled, scaled]
    assert scale_box([], *sizes) == []
    for dtype, floating in (
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        got = scale_box(torch.tensor([box, box], dtype=dtype), *sizes)
        assert torch.equal(got, torch.tensor([scaled, scaled], dtype=floating))
    for kind, of in ((np.int32, np.float64), (np.float32, np.float32)):
        array = scale_box(np.array([box], kind), *sizes)
        assert (array.dtype, array.tolist()) == (of, [scaled])
    assert scale_box(torch.zeros(0, 4), *sizes).shape == (0, 4)
    assert scale_box(np.zeros((0, 4)), *sizes).shape == (0, 4)


@given(
    box=st.lists(st.integers(0, 10_000), min_size=4, max_size=4),
    sizes=st.tuples(*[st.tuples(st.integers(1, 9999), st.integers(1, 9999))] * 2),
)
def test_scaling_there_and_back_changes_nothing(box: list[int], sizes: Any) -> None:
    """And the whole image's box becomes the whole image's."""
    there = scale_box(box, sizes[0], sizes[1])
    np.testing.assert_allclose(scale_box(there, sizes[1], sizes[0]), box, rtol=1e-9)
    whole = [0, 0, sizes[0][1], sizes[0][0]]
    np.testing.assert_allclose(scale_box(whole, *sizes), [0, 0, sizes[1][1], sizes[1][0]], rtol=1e-9)


def test_boxes_have_four_numbers_and_images_a_size() -> None:
    for boxes in ([1, 2, 3], torch.zeros(4, 2), np.zeros((0, 3)), np.float64(3)):
        with pytest.raises(ValueError, match=r"a box is 4 numbers, \(x, y, width, height\)"):
            scale_box(boxes, (2, 2), (1, 1))
    with pytest.raises(ValueError, match=r"sizes are \(height, width\) above 0"):
        scale_box([1, 2, 3, 4], (0, 5), (1, 1))


# --- draw_boxes


def outline(box: tuple[int, int, int, int], width: int, size: tuple[int, int]) -> Any:
    """Where the lines of a box are, inside of it."""
    x, y, w, h = box
    rows, columns = np.indices(size)
    inside = (columns >= x) & (columns < x + w) & (rows >= y) & (rows < y + h)
    inner = (columns >= x + width) & (columns < x + w - width) & (rows >= y + width) & (rows < y + h - width)
    return inside & ~inner


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize(
    "box", [(3, 5, 20, 12), (0, 0, 40, 30), (-6, -4, 30, 20), (25, 18, 99, 99), (0, 7, 1, 1), (9, 9, 3, 4)]
)
def test_lines_lie_inside_of_the_box(box: tuple[int, int, int, int], width: int) -> None:
    """Its outermost pixels are the box's own; all other pixels of the picture stay as they are."""
    pixels = picture(30, 40)
    drawn = draw_boxes(tensor_of(pixels), [box], colors=(1, 2, 3), width=width)
    assert drawn.dtype == torch.uint8
    assert drawn.is_contiguous()
    expected = pixels.copy()
    expected[outline(box, width, (30, 40))] = (1, 2, 3)
    assert np.array_equal(drawn.permute(1, 2, 0).numpy(), expected)


def test_the_picture_itself_is_left_alone_and_grey_becomes_colour() -> None:
    """Floats from 0 to 1, arrays and one channel are drawn on as well."""
    image = tensor_of(picture(20, 20))
    before = image.clone()
    drawn = draw_boxes(image, torch.tensor([[2.4, 3.6, 10.2, 10.1]]), colors="red")
    assert torch.equal(image, before)
    assert torch.equal(drawn, draw_boxes(image / 255, np.array([[2, 4, 11, 10]]), colors=(255, 0, 0)))
    assert draw_boxes(image[:1], [(1, 1, 5, 5)], colors="red").shape == (3, 20, 20)
    assert torch.equal(draw_boxes(image, []), image)
    assert torch.equal(draw_boxes(image, torch.zeros(0, 4), labels=[]), image)


def test_colours_go_with_labels() -> None:
    """One for all, one for each, or by default one for each label; without labels one for each box."""
    image = torch.zeros(3, 60, 200, dtype=torch.uint8)
    boxes = [(0, 40, 10, 10), (60, 40, 10, 10), (120, 40, 10, 10)]

    def colours(**options: Any) -> list[tuple[int, ...]]:
        drawn = draw_boxes(image, boxes, **options)
        return [tuple(drawn[:, 49, x].tolist()) for x, *_ in boxes]

    assert colours(colors=["red", (0, 255, 0), "#0000ff"]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert colours(colors=(9, 8, 7)) == [(9, 8, 7)] * 3
    a, b, c = colours(labels=["ant", "bee", "ant"])
    assert a == c != b
    assert len(set(colours())) == 3
    assert colours(labels=[1, 2, 1]) == [a, b, a]


def test_an_empty_label_is_not_written() -> None:
    """Nor is the ground that it would lie on."""
    image = torch.zeros(3, 60, 200, dtype=torch.uint8)
    boxes = [(0, 40, 10, 10), (60, 40, 10, 10)]
    assert torch.equal(draw_boxes(image, boxes, ["", ""], "red"), draw_boxes(image, boxes, colors="red"))
    drawn = draw_boxes(image, boxes, ["", "cat"], "red")
    assert not drawn[:, :40, :60].any()
    assert drawn[:, :40, 60:].any()


@pytest.mark.parametrize("box", [(20, 40, 60, 30), (20, 2, 60, 30), (150, 40, 60, 30), (-30, -20, 60, 60)])
def test_labels_are_seen_wherever_the_box_is(box: tuple[int, int, int, int]) -> None:
    """Above the box, or within it at the picture's edge, with letters that stand out."""
    image = torch.full((3, 100, 200), 128, dtype=torch.uint8)
    for colour, letters in (("yellow", 0), ("navy", 255)):
        bare, drawn = (draw_boxes(image, [box], labels, colour) for labels in (None, ["cat"]))
        written = (bare != drawn).any(0)
        assert written.sum() > 50
        assert ((drawn.int() - letters).abs() < 60).all(0).sum() > 10


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        ([(1, 2, 3)], {}, "a box is 4 numbers"),
        ((1, 2, 3, 4), {}, r"boxes are n times \(x, y, width, height\)"),
        ([(1, 2, -3, 4)], {}, "whose width and height are 0 or more"),
        ([(1, 2, float("nan"), 4)], {}, "boxes are n times"),
        ([(1, 2, 3, 4)], {"labels": ["a", "b"]}, "there are 2 labels for 1 boxes"),
        ([(1, 2, 3, 4)], {"colors": ["red", "blue"]}, "there are 2 colors for 1 boxes"),
        ([(1, 2, 3, 4)], {"colors": "no colour"}, "unknown color"),
        ([(1, 2, 3, 4)], {"width": 0}, "width is 0; it is 1 or more pixels"),
    ],
)
def test_boxes_that_make_no_sense_are_refused(boxes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(torch.zeros(3, 9, 9, dtype=torch.uint8), boxes, **options)
