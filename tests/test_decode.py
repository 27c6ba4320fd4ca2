"""Decoding and rendering: every codec, every orientation, and pixels within one level of torch's and Pillow's."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Pixels, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import decode, record
from fastload.errors import DecodeError
from fastload.geometry import Box, Plan

ORIENTATIONS = range(1, 9)

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What Pillow's `ImageOps.exif_transpose` does for each orientation."""


def shown(image: Pixels, orientation: int) -> Pixels:
    """The picture that a viewer shows."""
    return image if orientation == 1 else np.asarray(Image.fromarray(image).transpose(UPRIGHT[orientation]))


def saved(pixels: Pixels, format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def jpeg_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    data = saved(picture(height, width, seed), "JPEG", quality=90)
    return record.Field(record.JPEG, data, orientation, 3, 0, width, height)


def png_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    data = saved(picture(height, width, seed), "PNG")
    return record.Field(record.ENCODED, data, orientation, 3, 0, width, height)


def raw_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    return record.Field(record.RAW, picture(height, width, seed).tobytes(), orientation, 3, 0, width, height)


FIELDS = {"jpeg": jpeg_field, "png": png_field, "raw": raw_field}


def content(field: record.Field) -> Pixels:
    """What a field holds, as it is stored."""
    if field.codec == record.RAW:
        return np.frombuffer(field.payload, np.uint8).reshape(field.height, field.width, 3)
    return pillow(bytes(field.payload))


# --- pixels


@pytest.mark.parametrize("codec", FIELDS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_gives_the_image_as_it_is_stored(codec: str, keep: bool, orientation: int) -> None:
    """Every codec gives its exact pixels, not yet turned."""
    field = FIELDS[codec](orientation=orientation)
    assert np.array_equal(decode.pixels(field, keep=keep), content(field))


@pytest.mark.parametrize("codec", FIELDS)
def test_pixels_that_are_kept_survive_the_next_image(codec: str) -> None:
    """With keep=True an array is not overwritten by the image that the thread decodes next."""
    field = FIELDS[codec](seed=1)
    first = decode.pixels(field, keep=True)
    decode.pixels(FIELDS[codec](seed=2), keep=True)
    decode.pixels(FIELDS[codec](seed=3))
    assert np.array_equal(first, content(field))


@pytest.mark.parametrize("codec", FIELDS)
def test_pixels_takes_views_of_a_map(codec: str) -> None:
    """Payloads are memoryviews when they come from a store."""
    field = FIELDS[codec]()
    assert np.array_equal(decode.pixels(field._replace(payload=memoryview(field.payload))), content(field))


@settings(deadline=None, max_examples=60)
@given(codec=st.sampled_from(sorted(FIELDS)), height=st.integers(0, 60), width=st.integers(0, 60))
@example("jpeg", 56, 40)
@example("png", 56, 40)
@example("jpeg", 20, 112)
def test_pixels_refuses_a_record_that_lies_about_the_size(codec: str, height: int, width: int) -> None:
    """A size that is not the image's is a DecodeError, never a picture of whatever was in memory."""
    field = FIELDS[codec]()
    if (height, width) == (field.height, field.width) or (codec == "raw" and height * width == 40 * 56):
        return
    with pytest.raises(DecodeError):
        decode.pixels(field._replace(height=height, width=width))


@pytest.mark.parametrize("codec", FIELDS)
def test_pixels_refuses_a_size_beyond_all_memory(codec: str) -> None:
    """The largest size that a record can state is a DecodeError like any other lie."""
    with pytest.raises(DecodeError):
        decode.pixels(FIELDS[codec]()._replace(height=2**32 - 1, width=2**32 - 1))


@pytest.mark.parametrize("channels", [0, 1, 4])
def test_raw_pixels_must_have_three_channels(channels: int) -> None:
    """A raw image of another number of channels is refused with both numbers."""
    with pytest.raises(DecodeError, match=f"{channels} channels"):
        decode.pixels(raw_field()._replace(channels=channels))


@pytest.mark.parametrize("codec", FIELDS)
@pytest.mark.parametrize("kept", [0, 1, 30, 500])
def test_pixels_refuses_cut_payloads(codec: str, kept: int) -> None:
    """A payload that is cut short is a DecodeError in every codec."""
    field = FIELDS[codec]()
    with pytest.raises(DecodeError):
        decode.pixels(field._replace(payload=field.payload[:kept]))


# --- other formats


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("PPM", "RGB", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_other_formats_give_pillows_pixels(format: str, mode: str, options: dict[str, Any]) -> None:
    """Lossless formats come out as RGB with exactly Pillow's pixels."""
    data = saved(picture(31, 45), format, mode, **options)
    assert np.array_equal(decode.decode_other(data, (31, 45, 3)), pillow(data))


def test_alpha_is_dropped() -> None:
    """The colours of transparent pixels stay as they are."""
    colours = picture(20, 30)
    alpha = np.arange(600, dtype=np.uint8).reshape(20, 30, 1)
    file = io.BytesIO()
    Image.fromarray(np.concatenate([colours, alpha], axis=2)).save(file, "PNG")
    assert np.array_equal(decode.decode_other(file.getvalue()), colours)


def test_sixteen_bits_are_cut_to_eight() -> None:
    """The upper eight bits of a 16-bit image are kept."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16)
    done, data = cv2.imencode(".png", deep[:, :, ::-1])
    assert done
    assert np.array_equal(decode.decode_other(data.tobytes()), (deep >> 8).astype(np.uint8))


def test_cmyk_is_read() -> None:
    """A CMYK JPEG, which libjpeg-turbo doesn't turn to RGB, comes out near the picture that was saved."""
    pixels = picture(48, 64)
    data = saved(pixels, "JPEG", "CMYK", quality=98)
    image = decode.pixels(record.Field(record.ENCODED, data, 1, 3, 0, 64, 48))
    assert np.abs(image.astype(int) - pixels).mean() < 6


def test_orientation_in_the_file_is_ignored() -> None:
    """The record's orientation counts; the file's own is never applied a second time."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = picture(20, 30)
    assert np.array_equal(decode.decode_other(saved(pixels, "PNG", exif=exif), (20, 30, 3)), pixels)


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_unreadable_bytes_are_a_decode_error(data: bytes) -> None:
    """What OpenCV can't read is named so."""
    with pytest.raises(DecodeError, match="OpenCV can't decode it"):
        decode.decode_other(data)


def test_another_shape_is_a_decode_error() -> None:
    """An image of another size than expected says both sizes."""
    with pytest.raises(DecodeError, match=r"\(20, 30\) pixels, the record says \(30, 20\)"):
        decode.decode_other(saved(picture(20, 30), "PNG"), (30, 20, 3))


# --- upright


@pytest.mark.parametrize("codec", FIELDS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_upright_turns_every_orientation(codec: str, orientation: int) -> None:
    """Each EXIF orientation gives what Pillow's exif_transpose gives."""
    field = FIELDS[codec](orientation=orientation)
    assert np.array_equal(decode.upright(field), shown(content(field), orientation))


@pytest.mark.parametrize("codec", FIELDS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_upright_gives_an_array_of_its_own(codec: str, orientation: int) -> None:
    """A cached image is writable memory of its own: no view of the store, no scratch buffer."""
    field = FIELDS[codec](seed=4, orientation=orientation)
    image = decode.upright(field)
    decode.upright(FIELDS[codec](seed=5, orientation=orientation))
    decode.pixels(FIELDS[codec](seed=6))
    assert np.array_equal(image, shown(content(field), orientation))
    assert image.flags.writeable
    assert not np.shares_memory(image, np.frombuffer(field.payload, np.uint8))


# --- render


def resized_by_torch(image: Pixels, size: tuple[int, int]) -> Pixels:
    if size == (1, 1):  # there torch 2.13's kernel fails an assertion of its own, unless it is given `out=`
        return resized_by_pillow(image, size)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous()
    return F.interpolate(tensor, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def resized_by_pillow(image: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def carried_out(image: Pixels, plan: Plan, resized: Any) -> Pixels:
    """A plan's definition, step by step, on an upright image: box, mirror, resize, window."""
    x, y, width, height = plan.box
    image = np.ascontiguousarray(image[y : y + height, x : x + width])
    if plan.mirror:
        image = np.ascontiguousarray(image[:, ::-1])
    if plan.size != (height, width):
        image = resized(image, plan.size)
    if plan.window is None:
        return image
    x, y, width, height = plan.window
    margin = [(max(0, -y), max(0, y + height - image.shape[0])), (max(0, -x), max(0, x + width - image.shape[1]))]
    image = np.pad(image, [*margin, (0, 0)])
    return image[max(y, 0) :, max(x, 0) :][:height, :width]


def rendered(image: Pixels, orientation: int, plans: list[Plan]) -> Pixels:
    """`decode.render` into a buffer full of garbage."""
    out = np.full((*plans[-1].output_size, 3), 123, np.uint8)
    decode.render(image, orientation, plans, out)
    return out


def assert_within_one_level(image: Pixels, orientation: int, plan: Plan) -> None:
    """One level from torch; two from Pillow where it and torch round to different sides of a value, else one."""
    got = rendered(image, orientation, [plan])
    for resized in (resized_by_torch, resized_by_pillow):
        expected = carried_out(shown(image, orientation), plan, resized)
        assert got.shape == expected.shape
        difference = np.abs(got.astype(int) - expected)
        assert difference.max() <= (2 if resized is resized_by_pillow else 1), resized.__name__
        assert difference.mean() <= 1, resized.__name__


lengths = st.integers(1, 48)


@st.composite
def plans(draw: st.DrawFn, size: tuple[int, int]) -> Plan:
    """Any plan for an upright image of `size`, windows that reach beyond included."""
    height, width = size
    box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    y, x = draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width))
    out = draw(st.just((box_height, box_width)) | st.tuples(lengths, lengths))
    window = None
    if draw(st.booleans()):
        crop_height, crop_width = draw(lengths), draw(lengths)
        window = Box(
            draw(st.integers(min(0, out[1] - crop_width), max(0, out[1] - crop_width))),
            draw(st.integers(min(0, out[0] - crop_height), max(0, out[0] - crop_height))),
            *(crop_width, crop_height),
        )
    return Plan(Box(x, y, box_width, box_height), out, window, draw(st.booleans()))


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Pixels, int, Plan]:
    """An image as stored, its orientation, and a plan for what it shows."""
    image = picture(draw(lengths), draw(lengths), seed=draw(st.integers(0, 5)))
    orientation = draw(st.sampled_from(ORIENTATIONS))
    return image, orientation, draw(plans(shown(image, orientation).shape[:2]))


@settings(deadline=None, max_examples=400)
@given(tasks())
def test_render_is_within_one_level_of_torch_and_pillow(task: tuple[Pixels, int, Plan]) -> None:
    """Any box, mirror, size and window of any orientation is torch's and Pillow's picture, give or take one level."""
    assert_within_one_level(*task)


@settings(deadline=None, max_examples=150)
@given(tasks())
def test_render_copies_exactly_where_nothing_is_resized(task: tuple[Pixels, int, Plan]) -> None:
    """Crops, mirrors, turns and padding move bytes and change none."""
    image, orientation, plan = task
    plan = plan._replace(size=(plan.box.height, plan.box.width))
    assert np.array_equal(rendered(image, orientation, [plan]), carried_out(shown(image, orientation), plan, None))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_render_carries_several_plans_out_in_turn(data: st.DataObject) -> None:
    """A second pass works on the picture of the first: each step is a plan of its own on the step before."""
    image, orientation, first = data.draw(tasks())
    second = data.draw(plans(first.output_size))
    between = rendered(image, orientation, [first])
    assert np.array_equal(rendered(image, orientation, [first, second]), rendered(between, 1, [second]))


@pytest.mark.filterwarnings("error")
def test_render_takes_read_only_images_without_changing_them() -> None:
    """A cached image or a view of the store is never written to, whatever the plan; torch has nothing to warn of."""
    image = picture(30, 40)
    image.flags.writeable = False
    before = image.copy()
    for plan in (Plan(Box(0, 0, 40, 30), (12, 13)), Plan(Box(3, 2, 20, 20), (20, 20), None, True)):
        assert_within_one_level(image, 1, plan)
    assert np.array_equal(image, before)


def test_render_of_real_sizes_is_within_one_level() -> None:
    """A photograph's usual way, 375 x 500 to 256 on the short side to the central 224: one level, of Pillow too."""
    image = picture(375, 500, seed=3)
    plan = Plan(Box(0, 0, 500, 375), (256, 341), Box(58, 16, 224, 224))
    assert_within_one_level(image, 1, plan)
    difference = np.abs(rendered(image, 1, [plan]).astype(int) - carried_out(image, plan, resized_by_pillow))
    assert (difference > 1).mean() < 1e-4
