"""Decoding and rendering: every codec, every orientation, and pixels within one level of torch's and Pillow's."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from conftest import Pixels, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import buffers, decode, jpeg, record, tiles
from fastload.errors import ChecksumError, DecodeError, FastloadError
from fastload.geometry import Box, Plan, on_grid
from fastload.recut import Untouched, recut

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


def made(codec: int, data: bytes, orientation: int, width: int, height: int, tile_index: bytes = b"") -> record.Field:
    """A field as it comes out of a store: with its checksum."""
    return record.Field(codec, data, orientation, 3, 0, width, height, tile_index, record.checksum(data))


def jpeg_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    data = saved(picture(height, width, seed), "JPEG", quality=90)
    return made(record.JPEG, data, orientation, width, height)


def png_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    return made(record.ENCODED, saved(picture(height, width, seed), "PNG"), orientation, width, height)


def raw_field(height: int = 40, width: int = 56, seed: int = 0, orientation: int = 1) -> record.Field:
    return made(record.RAW, picture(height, width, seed).tobytes(), orientation, width, height)


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


@pytest.mark.parametrize("codec", FIELDS)
def test_altered_bytes_are_found_where_a_picture_is_made(codec: str) -> None:
    """`upright` and `region` check before they decode; a last byte that no decoder would miss counts too."""
    field = FIELDS[codec]()
    altered = field._replace(payload=bytes((*field.payload[:-1], field.payload[-1] ^ 1)))
    for read in (decode.upright, lambda field: decode.region(field, Box(0, 0, 3, 3))):
        read(field)
        with pytest.raises(ChecksumError, match="checksum mismatch"):
            read(altered)


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
    assert np.array_equal(decode.decode_other(file.getvalue(), colours.shape), colours)


def test_sixteen_bits_are_cut_to_eight() -> None:
    """The upper eight bits of a 16-bit image are kept."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16)
    done, data = cv2.imencode(".png", deep[:, :, ::-1])
    assert done
    assert np.array_equal(decode.decode_other(data.tobytes(), deep.shape), (deep >> 8).astype(np.uint8))


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
    """Said by what they are, or begin as."""
    with pytest.raises(DecodeError, match=r"not an image|begins as a PNG does, but its header is damaged"):
        decode.decode_other(data, (1, 1, 3))


def test_another_shape_is_a_decode_error() -> None:
    """An image of another size than expected says both sizes."""
    with pytest.raises(DecodeError, match=r"\(20, 30\) pixels, the record says \(30, 20\)"):
        decode.decode_other(saved(picture(20, 30), "PNG"), (30, 20, 3))
    with pytest.raises(DecodeError, match="it has 30 x 20 pixels, the record says 30 x 21"):
        decode.decode_other(saved(picture(20, 30), "PNG"), (21, 30, 3))


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_a_payload_of_another_size_is_not_decoded(format: str) -> None:
    """Its header is enough: a few bytes can be a picture of any size."""
    data = saved(np.zeros((4000, 4000, 3), np.uint8), format)
    with pytest.raises(DecodeError, match="it has 4000 x 4000 pixels, the record says 40 x 30"):
        decode.decode_other(data, (30, 40, 3))


@pytest.mark.parametrize("most", [1, 2, 3, 15, 63, 127, 200, 255, 1000, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_of_pnm_are_spread(most: int, channels: int) -> None:
    """A binary PGM or PPM says what white is."""
    values = np.linspace(0, most, 30 * channels).astype(np.uint16).reshape(5, 6, channels)
    header = b"P%d 6 5 %d\n" % (5 if channels == 1 else 6, most)
    found = decode.decode_other(header + values.astype(">u2" if most > 255 else "u1").tobytes(), (5, 6, 3))
    assert np.abs(found - values * (255 / most)).max() <= 1


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_png_s_own_picture_is_shown_not_its_animation(frames: int) -> None:
    """As every viewer that knows no animation does."""
    own, *others = (Image.fromarray(picture(20, 30, seed)) for seed in range(frames + 1))
    file = io.BytesIO()
    own.save(file, "PNG", save_all=True, append_images=others, default_image=True)
    assert np.array_equal(decode.decode_other(file.getvalue(), (20, 30, 3)), own)


@pytest.mark.parametrize("length", range(26, 30))
def test_a_bmp_that_ends_with_its_header_is_a_decode_error(length: int) -> None:
    """The oldest kind has a header that is shorter than the place where others tell their bits."""
    data = struct.pack("<2sIHHIIHHHH", b"BM", 30, 0, 0, 26, 12, 1, 1, 1, 24) + bytes(3)
    with pytest.raises(DecodeError):
        decode.decode_other(data[:length], (1, 1, 3))


def test_a_bmp_of_five_bits_is_spread() -> None:
    """White is 255."""
    pixels = b"".join(v.to_bytes(2, "little") for v in (0x7FFF, 0, 0x7C00, 0x001F))
    head = struct.pack("<2sIHHI", b"BM", 54 + 8, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 4, 1, 1, 16, 0, 8, 0, 0, 0, 0
    )
    found = decode.decode_other(head + pixels, (1, 4, 3))
    assert found.tolist() == [[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]]


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


@settings(deadline=None, max_examples=150)
@given(task=tasks(), garbage=st.integers(0, 255))
def test_render_never_shows_what_buffers_held(task: tuple[Pixels, int, Plan], garbage: int) -> None:
    """A picture is the same bit for bit whatever the thread's buffers hold from the image before."""
    image, orientation, plan = task
    expected = rendered(image, orientation, [plan])
    for purpose in ("upright", "window", "decode"):
        buffers.scratch(purpose, 1 << 16)[...] = garbage
    assert np.array_equal(rendered(image, orientation, [plan]), expected)


# --- re-cut JPEGs

SAMPLINGS = ("444", "422", "420", "440", "411", "gray")
HEIGHT, WIDTH = 205, 331


def encoded(pixels: Pixels, sampling: str, quality: int = 90) -> bytes:
    if sampling == "gray":
        return saved(pixels, "JPEG", "L", quality=quality)
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiled() -> dict[str, record.Field]:
    """A re-cut JPEG in each sampling, with its tile index."""
    cuts = {sampling: recut(encoded(picture(HEIGHT, WIDTH), sampling)) for sampling in SAMPLINGS}
    return {sampling: made(record.JPEG, cut.data, 1, WIDTH, HEIGHT, cut.tiles) for sampling, cut in cuts.items()}


@pytest.fixture(scope="module")
def reduced(tiled: dict[str, record.Field]) -> dict[tuple[str, int], Pixels]:
    """Each of them decoded whole, at 1, 1/2, 1/4 and 1/8 of its size."""
    images = {}
    for (sampling, field), reduction in itertools.product(tiled.items(), (1, 2, 4, 8)):
        out = np.empty((-(-HEIGHT // reduction), -(-WIDTH // reduction), 3), np.uint8)
        jpeg.decode(field.payload, out, reduction)
        images[sampling, reduction] = out
    return images


def boxes_in(height: int, width: int) -> st.SearchStrategy[Box]:
    """Boxes of all sizes, most of them small."""

    def along(length: int) -> st.SearchStrategy[tuple[int, int]]:
        extents = st.integers(1, length) | st.integers(1, max(1, length // 8))
        return extents.flatmap(lambda extent: st.tuples(st.integers(0, length - extent), st.just(extent)))

    return st.builds(lambda down, across: Box(across[0], down[0], across[1], down[1]), along(height), along(width))


@settings(deadline=None, max_examples=600)
@given(sampling=st.sampled_from(SAMPLINGS), reduction=st.sampled_from((1, 2, 4, 8)), data=st.data())
def test_a_region_of_tiles_is_cut_from_the_whole_image(
    tiled: dict[str, record.Field], reduced: dict[tuple[str, int], Pixels], sampling: str, reduction: int, data: Any
) -> None:
    """Any box, at any reduction, bit for bit: what the decoder interpolates from beyond the box is there for it."""
    whole = reduced[sampling, reduction]
    box = data.draw(boxes_in(*whole.shape[:2]))
    got = decode.region(tiled[sampling], box, reduction)
    assert np.array_equal(got, whole[box.y : box.y + box.height, box.x : box.x + box.width])


@settings(deadline=None, max_examples=60)
@given(
    sampling=st.sampled_from(SAMPLINGS), short=st.integers(1, 220), long=st.integers(300, 900), turned=st.booleans(),
    quality=st.integers(1, 100), reduction=st.sampled_from((1, 2, 4, 8)), data=st.data(),
)  # fmt: skip
def test_a_region_of_any_re_cut_image_is_cut_from_the_whole(
    sampling: str, short: int, long: int, turned: bool, quality: int, reduction: int, data: Any
) -> None:
    """Narrow images, sides that end within a block, a chroma sample or a reduced pixel, and all qualities."""
    height, width = (long, short) if turned else (short, long)
    original = encoded(picture(height, width, seed=quality), sampling, quality)
    cut = None
    with contextlib.suppress(Untouched):
        cut = recut(original)
    assert (cut is None) == (height * width < 96 * 96)
    if cut is None:
        return
    field = made(record.JPEG, cut.data, 1, width, height, cut.tiles)
    whole = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    jpeg.decode(original, whole, reduction)
    for _ in range(4):
        box = data.draw(boxes_in(*whole.shape[:2]))
        got = decode.region(field, box, reduction)
        assert np.array_equal(got, whole[box.y : box.y + box.height, box.x : box.x + box.width])


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_edge_of_a_tile_can_be_the_edge_of_a_region(
    tiled: dict[str, record.Field], reduced: dict[tuple[str, int], Pixels], sampling: str, reduction: int
) -> None:
    """Boxes that begin or end at, before and behind each multiple of a block, where what is read changes."""
    field, whole = tiled[sampling], reduced[sampling, reduction]
    height, width = whole.shape[:2]
    block = max(1, 8 // reduction)
    for at in sorted({max(0, edge + d) for edge in range(0, width, block) for d in (-1, 0, 1)}):
        for left, right in ((at, min(width, at + 3)), (max(0, at - 3), at)):
            if left < right <= width:
                got = decode.region(field, Box(left, height // 2, right - left, 1), reduction)
                assert np.array_equal(got, whole[height // 2 : height // 2 + 1, left:right]), (left, right)
    for at in sorted({max(0, edge + d) for edge in range(0, height, block) for d in (-1, 0, 1)}):
        for top, bottom in ((at, min(height, at + 3)), (max(0, at - 3), at)):
            if top < bottom <= height:
                got = decode.region(field, Box(width // 2, top, 1, bottom - top), reduction)
                assert np.array_equal(got, whole[top:bottom, width // 2 : width // 2 + 1]), (top, bottom)


@settings(deadline=None, max_examples=200)
@given(
    sampling=st.sampled_from(SAMPLINGS), orientation=st.sampled_from(ORIENTATIONS), scaled=st.booleans(), data=st.data()
)
def test_render_makes_the_same_of_tiles_as_of_the_file(
    tiled: dict[str, record.Field], sampling: str, orientation: int, scaled: bool, data: Any
) -> None:
    """Any plan, at full and at reduced size: the index changes what is read, and not a bit of what is shown."""
    field = tiled[sampling]._replace(orientation=orientation)
    height, width = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
    plan = data.draw(plans((height, width)))
    if data.draw(st.booleans()):
        plan = plan._replace(box=on_grid(plan.box, plan.size))
    pictures = []
    for each in (field, field._replace(tiles=b"")):
        out = np.full((*plan.output_size, 3), 123, np.uint8)
        decode.render(each, orientation, [plan], out, scaled=scaled)
        pictures.append(out)
    assert np.array_equal(*pictures)
    if not scaled:
        assert np.array_equal(pictures[0], rendered(decode.pixels(field), orientation, [plan]))


@settings(deadline=None, max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16) | st.integers(0, 15), st.integers(0, 255)), max_size=4),
    kept=st.none() | st.integers(1, 300),
    box=boxes_in(HEIGHT, WIDTH),
)
def test_any_index_gives_a_picture_of_the_right_size_or_an_error(
    tiled: dict[str, record.Field], changes: list[tuple[int, int]], kept: int | None, box: Box
) -> None:
    """A store may come from a stranger: an index that says anything at all does no harm to memory or the run."""
    index = bytearray(tiled["420"].tiles)
    for place, value in changes:
        index[place % len(index)] = value
    field = tiled["420"]._replace(tiles=bytes(index[:kept]))
    with contextlib.suppress(FastloadError):
        assert decode.region(field, box).shape == (box.height, box.width, 3)
    with contextlib.suppress(FastloadError):
        decode.tiles_show(field, decode.pixels(field, keep=True))


@pytest.mark.parametrize("codec", FIELDS)
def test_scaled_reads_are_for_jpegs(codec: str) -> None:
    """Where there is no DCT nothing is reduced, and a JPEG is only where it is asked for."""
    field = FIELDS[codec](height=160, width=160)
    plan = Plan(Box(0, 0, 160, 160), (16, 16))
    pictures = {}
    for scaled in (False, True):
        pictures[scaled] = np.empty((16, 16, 3), np.uint8)
        decode.render(field, 1, [plan], pictures[scaled], scaled=scaled)
    assert np.array_equal(pictures[False], rendered(content(field), 1, [plan]))
    assert np.array_equal(pictures[True], pictures[False]) == (codec != "jpeg")


# --- what is touched


@pytest.fixture(scope="module")
def large() -> record.Field:
    """A re-cut JPEG of several megabytes whose first 50 kB are a comment."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1800, 3), np.uint8)
    cut = recut(saved(pixels, "JPEG", quality=90, comment=bytes(50_000)))
    assert len(cut.data) > 2_000_000
    return made(record.JPEG, cut.data, 1, 1800, 1500, cut.tiles)


def pieces(field: record.Field, box: Box) -> set[int]:
    """The numbers of the payload's pieces that hold the header, or tiles that the box overlaps, as the index says."""
    _, mcu_width, mcu_height, _, step, _, header, scan = struct.unpack_from("<BBBBHHII", field.tiles)
    count = -(-len(field.payload) // tiles.PIECE)
    rows, columns = -(-field.height // mcu_height), -(-field.width // (mcu_width * step))
    sizes = np.frombuffer(field.tiles, "<u2", rows * columns, 16 + 8 * count)
    ends = (scan + np.cumsum(sizes, dtype=np.int64)).reshape(rows, columns)
    begins = ends - sizes.reshape(rows, columns)
    down = slice(max(0, box.y) // mcu_height, -(-(box.y + box.height) // mcu_height))
    across = slice(max(0, box.x) // (mcu_width * step), -(-(box.x + box.width) // (mcu_width * step)))
    taken = [(header, scan), *zip(begins[down, across].ravel(), ends[down, across].ravel(), strict=True)]
    return {piece for begin, end in taken for piece in range(begin // tiles.PIECE, (end - 1) // tiles.PIECE + 1)}


@pytest.mark.parametrize(
    ("box", "reduction"),
    [
        (Box(900, 700, 60, 40), 1),
        (Box(0, 0, 5, 5), 1),
        (Box(1790, 1490, 10, 10), 1),
        (Box(0, 752, 1800, 8), 1),
        (Box(64, 0, 1, 1500), 1),
        (Box(450, 350, 20, 20), 2),
        (Box(100, 80, 16, 16), 8),
    ],
)
def test_damage_is_noticed_where_it_is_read_and_nowhere_else(large: record.Field, box: Box, reduction: int) -> None:
    """Of all 8 KiB pieces only those that the region's tiles lie in are checked, and all of those are."""
    whole = decode.region(large, box, reduction).copy()
    disturbed = set()
    payload = bytearray(large.payload)
    for piece in range(-(-len(payload) // tiles.PIECE)):
        at = min(piece * tiles.PIECE + 4321, len(payload) - 1)
        payload[at] ^= 0x10
        try:
            assert np.array_equal(decode.region(large._replace(payload=memoryview(payload)), box, reduction), whole)
        except ChecksumError:
            disturbed.add(piece)
        payload[at] ^= 0x10
    wanted = Box(*(reduction * edge for edge in box))
    near = Box(wanted.x - reduction, wanted.y - reduction, wanted.width + 2 * reduction, wanted.height + 2 * reduction)
    assert pieces(large, wanted) <= disturbed <= pieces(large, near)
    assert 0 not in disturbed, "the comment"


TOUCHING = """
import ctypes, json, mmap, resource, sys
import numpy as np
from fastload import decode, record
from fastload.geometry import Box

folder, *box = sys.argv[1:2] + [int(number) for number in sys.argv[2:6]]
payload = open(f"{folder}/payload", "rb").read()
memory = mmap.mmap(-1, len(payload))
memory[:] = payload
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
for page in json.load(open(f"{folder}/forbidden.json")):
    assert protect(address + page * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
size = json.load(open(f"{folder}/size.json"))
index = open(f"{folder}/index", "rb").read()
field = record.Field(record.JPEG, memoryview(memory), 1, 3, 0, *size, index, 0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print("protected", flush=True)
np.save(f"{folder}/region.npy", decode.region(field, Box(*box)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect, and what follows from it, as on Linux")
@pytest.mark.skipif(mmap.PAGESIZE > tiles.PIECE, reason="a page holds several pieces here")
@pytest.mark.parametrize("forbid_one_more", [False, True])
def test_pages_that_are_not_needed_are_never_touched(
    large: record.Field, tmp_path: Path, forbid_one_more: bool
) -> None:
    """A region is read from a payload of which any access to other pages kills the process; one of its own would too.

    So from a disk or a network no more is read than the pieces that hold its tiles.
    """
    box = Box(900, 700, 60, 40)
    near = pieces(large, Box(box.x - 1, box.y - 1, box.width + 2, box.height + 2))
    in_piece = tiles.PIECE // mmap.PAGESIZE
    forbidden = [page for page in range(-(-len(large.payload) // mmap.PAGESIZE)) if page // in_piece not in near]
    assert len(forbidden) * mmap.PAGESIZE > 0.9 * len(large.payload)
    if forbid_one_more:
        forbidden.append(max(pieces(large, box)) * in_piece)
    (tmp_path / "payload").write_bytes(large.payload)
    (tmp_path / "index").write_bytes(large.tiles)
    (tmp_path / "forbidden.json").write_text(json.dumps(forbidden))
    (tmp_path / "size.json").write_text(json.dumps([large.width, large.height]))
    command = [sys.executable, "-c", TOUCHING, str(tmp_path), *map(str, box)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "protected\n", result.stderr
    if forbid_one_more:
        assert result.returncode == -signal.SIGSEGV
        return
    assert result.returncode == 0, result.stderr
    expected = decode.pixels(large)[box.y : box.y + box.height, box.x : box.x + box.width]
    assert np.array_equal(np.load(tmp_path / "region.npy"), expected)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("window", [(-9, 0, 5, 5), (0, -9, 5, 5), (200, 3, 5, 5), (3, 200, 5, 5), (-5, -5, 5, 5)])
def test_a_window_beside_the_picture_is_black(resize: bool, window: tuple[int, int, int, int]) -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    plan = Plan.whole((100, 100)).resized((50, 50) if resize else (100, 100))
    assert plan is not None
    beside = plan.cropped(Box(*window))
    assert beside is not None
    out = np.ones((5, 5, 3), np.uint8)
    decode.render(image, 1, [beside], out)
    assert not out.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows forks nothing")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_opencv_uses_no_pool_of_threads_in_a_forked_process() -> None:
    """The pool isn't forked: a worker that flipped a picture waited for it for ever, one in a thousand."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(cv2.getNumThreads())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)
