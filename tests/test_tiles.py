"""Tiles: crops of re-cut JPEGs bit for bit, on both backends, and indexes that were damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import Pixels, picture
from damage import check_crops, check_index, random_box
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpegs import SAMPLINGS, Component, Scan, decoded, encode, field_of, pillow, random_picture, small_tiles
from PIL import Image
from test_jpeg import saved

from fastload import decode, record, recut, tiles
from fastload.errors import ChecksumError, DecodeError
from fastload.geometry import Box
from fastload.recut import Recut, Untouched

CONTENTS = ("noise", "flat", "gradient", "photo", "extreme")


def image(content: str, height: int, width: int, seed: int = 0) -> Pixels:
    """Pixels of one of CONTENTS."""
    random = np.random.default_rng(seed)
    if content == "noise":
        return random.integers(0, 256, (height, width, 3), np.uint8)
    if content == "flat":
        return np.full((height, width, 3), random.integers(0, 256, 3), np.uint8)
    if content == "gradient":
        grey = np.add.outer(np.arange(height) * int(random.integers(9)), np.arange(width) * int(random.integers(9)))
        return np.repeat(grey[..., None] % 256, 3, 2).astype(np.uint8)
    if content == "photo":
        return picture(height, width, seed)
    return random.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)


def file(pixels: Pixels, sampling: str, quality: int, progressive: bool, restarts: int) -> bytes:
    """The pixels as a JPEG: by Pillow, or by simplejpeg if it has to be a sampling that Pillow does not know."""
    if sampling in ("440", "411"):
        data: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)
        return data
    options = {"restart_marker_blocks": restarts} if restarts > 0 else {"restart_marker_rows": -restarts}
    if sampling == "grey":
        return saved(Image.fromarray(pixels[..., 0]), quality=quality, progressive=progressive, **options)
    return saved(
        *(Image.fromarray(pixels),),
        **(options | {"subsampling": f"{sampling[0]}:{sampling[1]}:{sampling[2]}"}),
        quality=quality,
        progressive=progressive,
    )


def cut_or_poor(data: bytes) -> Recut | None:
    """The JPEG re-cut; None where no lead-in can be made, since luma has hardly any AC coefficients."""
    try:
        return recut.recut(data)
    except Untouched as reason:
        outcome = reason.outcome
    reader = recut._Reader(data)
    assert reader.frame is not None
    _, across, down, *_ = reader.frame.grid[0]
    assert outcome == tiles.SEGMENTS
    assert len(np.unique(reader.coefficients[: across * down, 1:])) <= 8
    return None


def check(data: bytes, seed: int, crops: int = 4) -> None:
    """Re-cut a JPEG: it must decode to the same pixels, and so must crops of it."""
    whole = pillow(data)
    cut = cut_or_poor(data)
    if cut is None:
        return
    assert np.array_equal(pillow(cut.data), whole)
    assert np.array_equal(decoded(cut.data, whole.shape[:2]), whole)
    field = field_of(cut)
    assert decode.tiles_show(field, whole)
    check_crops(field, whole, np.random.default_rng(seed), crops)


@settings(deadline=None, max_examples=300)
@given(
    content=st.sampled_from(CONTENTS),
    height=st.integers(1, 100),
    width=st.integers(1, 200),
    sampling=st.sampled_from(("444", "422", "420", "440", "411", "grey")),
    quality=st.integers(1, 100),
    progressive=st.booleans(),
    restarts=st.integers(-3, 5),
    step=st.sampled_from(((32, 1), (64, 1), (64, 512), (96, 30), (1000, 1))),
    seed=st.integers(0, 1000),
)
@example("photo", 33, 65, "444", 90, False, 0, (32, 1), 0)  # one pixel in the last MCU
@example("photo", 8, 200, "420", 90, True, 0, (32, 1), 0)  # one row
@example("photo", 100, 8, "422", 90, False, 0, (32, 1), 0)  # one tile in a row
@example("extreme", 64, 128, "444", 100, False, 0, (32, 1), 0)
def test_crops_are_crops(
    content: str,
    height: int,
    width: int,
    sampling: str,
    quality: int,
    progressive: bool,
    restarts: int,
    step: tuple[int, int],
    seed: int,
) -> None:
    """Whatever an encoder wrote, crops of the re-cut file are crops of the original, at reduced sizes too."""
    with small_tiles(*step):
        check(file(image(content, height, width, seed), sampling, quality, progressive, restarts), seed)


@settings(deadline=None, max_examples=120)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 150),
    sampling=st.sampled_from(SAMPLINGS),
    grey=st.booleans(),
    density=st.floats(0, 1),
    largest=st.sampled_from((1, 30, 1023)),
    seed=st.integers(0, 1000),
)
def test_crops_of_extreme_coefficients_are_crops(
    height: int, width: int, sampling: tuple[int, int], grey: bool, density: float, largest: int, seed: int
) -> None:
    """No two blocks alike, coefficients as large as they come, grey with sampling factors that mean nothing."""
    components = (Component(1, *sampling), Component(2), Component(3, quantisation=1))[: 1 if grey else 3]
    random = np.random.default_rng(seed)
    source = random_picture(random, height, width, components, density, largest)
    for coefficients in source.coefficients:
        if largest == 1023:
            coefficients[..., 0] = random.choice([-1023, 0, 1023], coefficients.shape[:2])
    with small_tiles(32):
        check(encode(source), seed)


@pytest.fixture(scope="module")
def photo() -> tuple[record.Field, Pixels]:
    """A re-cut 4:2:0 photograph with 7 tiles in each of 13 rows, and its pixels."""
    with small_tiles(32):
        data = file(picture(200, 220, seed=3), "420", 90, False, 0)
        return field_of(recut.recut(data)), pillow(data)


def test_every_tile_row_and_edge(photo: tuple[record.Field, Pixels]) -> None:
    """Boxes that begin and end at each edge of tiles, and one pixel beside it, show the pixels there."""
    field, whole = photo
    for left in range(0, 220, 31):
        for right in (left + 1, left + 2, left + 33, 220):
            for top, bottom in ((0, 1), (15, 17), (16, 32), (190, 200)):
                box = Box(left, top, min(right, 220) - left, bottom - top)
                assert np.array_equal(decode.region(field, box), decode._crop(whole, box)), box


def test_a_crop_takes_few_bytes(photo: tuple[record.Field, Pixels]) -> None:
    """Only tiles that cover the crop are spliced, and no more than one MCU before them."""
    field, _ = photo
    small = tiles.splice(field, Box(100, 100, 10, 10))
    assert small is not None
    assert small.size == (16, 48), "a row of MCUs; a tile and its lead-in, which is an MCU"
    assert len(small.data) < len(field.payload) / 10 + 400
    assert tiles.splice(field, Box(0, 0, 220, 200)) is None


def test_crops_need_no_other_bytes(photo: tuple[record.Field, Pixels]) -> None:
    """Damage beside what a crop reads does not matter to it; damage in what it reads is a ChecksumError."""
    field, whole = photo
    payload = bytearray(field.payload)
    payload[-100] ^= 1
    damaged = field._replace(payload=bytes(payload))
    top, bottom = Box(0, 0, 50, 50), Box(0, 190, 50, 10)
    assert np.array_equal(decode.region(damaged, top), decode._crop(whole, top))
    with pytest.raises(ChecksumError, match="checksum mismatch"):
        decode.region(damaged, bottom)


def test_a_changed_byte_anywhere_is_noticed_or_not_read(photo: tuple[record.Field, Pixels]) -> None:
    """Whichever byte of the payload changes: a crop is a ChecksumError, or right."""
    field, whole = photo
    random, noticed = np.random.default_rng(0), 0
    for _ in range(200):
        payload = bytearray(field.payload)
        payload[random.integers(len(payload))] ^= 1 << int(random.integers(8))
        box = random_box(random, *whole.shape[:2])
        try:
            crop = decode.region(field._replace(payload=bytes(payload)), box)
        except ChecksumError:
            noticed += 1
        else:
            assert np.array_equal(crop, decode._crop(whole, box))
    assert noticed > 50


def test_stuffed_bytes_that_two_tiles_share() -> None:
    """Where a tile begins within a byte of ones, which is stuffed, both tiles still get their bits of it."""
    random, stuffed = np.random.default_rng(0), 0
    for _ in range(10):
        source = random_picture(random, 80, 160, (Component(1),), 0.05)
        source.coefficients[0][..., 63] = 1023  # ones at the end of each block
        source.coefficients[0][..., 0] = random.integers(-1023, 1024, (10, 20))
        data = encode(source)
        with small_tiles(32):
            field = field_of(recut.recut(data))
        *_, scan = tiles._head(field)
        starts, leads, _ = tiles._layout(field.tiles, len(field.payload), scan, 10, 5)
        ends = starts[:-1].reshape(10, 5)[:, 1:].ravel()
        payload = np.frombuffer(field.payload, np.uint8)
        stuffed += int(((leads >> 5 > 0) & (payload[ends - 1] == 0) & (payload[ends - 2] == 0xFF)).sum())
        assert decode.tiles_show(field, pillow(data))
    assert stuffed > 10


# --- the index


def test_the_index_says_where_tiles_are(photo: tuple[record.Field, Pixels]) -> None:
    """What `build_index` writes is what the docstring says: a head, checksums, sizes, lead-ins' heads, lead-ins."""
    payload, sizes, leads = bytes(range(256)) * 40, np.array([[70, 5], [60, 7]]), np.array([3 | 5 << 5, 2])
    index = tiles.build_index(payload, (16, 8), 3, 4, (20, 10240 - 142), sizes, leads, b"abcde")
    assert index[:16] == bytes((1, 8, 16, 3, 4, 0, 0, 0, 20, 0, 0, 0)) + (10240 - 142).to_bytes(4, "little")
    checksums = [record.checksum(payload[:8192]), record.checksum(payload[8192:])]
    assert index[16:32] == b"".join(c.to_bytes(8, "little") for c in checksums)
    assert index[32:] == bytes((70, 0, 5, 0, 60, 0, 7, 0)) + bytes((163, 2)) + b"abcde"
    starts, read, at = tiles._layout(index, len(payload), 10240 - 142, 2, 2)
    assert starts.tolist() == [10098, 10168, 10173, 10233, 10240]
    assert read.tolist() == leads.tolist()
    assert index[at:] == b"abcde"


def test_the_tiles_tile_the_scan(photo: tuple[record.Field, Pixels]) -> None:
    """The index of a real file adds up, to its last byte."""
    field, _ = photo
    mcu_width, mcu_height, components, step, head, scan = tiles._head(field)
    assert (mcu_width, mcu_height, components, step) == (16, 16, 3, 2)
    starts, leads, at = tiles._layout(field.tiles, len(field.payload), scan, 13, 7)
    assert starts[-1] == len(field.payload)
    assert at + int((leads & 31).sum()) == len(field.tiles)
    assert bytes(field.payload[head : head + 2]) == b"\xff\xdb"


def test_columns_cover_the_image_and_read_one_column_each(photo: tuple[record.Field, Pixels]) -> None:
    field, _ = photo
    boxes = list(tiles.columns(field))
    assert len(boxes) == 7
    for box, column in zip(boxes, range(7), strict=True):
        small = tiles.splice(field, box)
        assert small is not None
        assert small.size[1] == (min(220, (column + 1) * 32) - column * 32) + 16 * (column > 0)
    one = decode.tiles_show(field_of(recut.recut(saved(Image.fromarray(picture(300, 60))))), picture(300, 60))
    assert one, "a file of one column has nothing to show"


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 32))
def test_a_damaged_index_is_an_error_or_a_picture(photo: tuple[record.Field, Pixels], seed: int) -> None:
    """Changed, cut and lengthened indexes: DecodeError, ChecksumError, or a crop of the right size; nothing else."""
    check_index(photo[0], np.random.default_rng(seed), 5)


@settings(deadline=None, max_examples=200)
@given(index=st.binary(max_size=400), sane=st.booleans(), seed=st.integers(0, 99))
def test_random_bytes_are_no_index(photo: tuple[record.Field, Pixels], index: bytes, sane: bool, seed: int) -> None:
    """Random bytes of any length, with a right beginning too."""
    field, _ = photo
    start = bytes(field.tiles[:16]) if sane else b"\1"
    with pytest.raises((DecodeError, ChecksumError)):
        tiles.splice(
            field._replace(tiles=(start + index)[: len(index)]),
            random_box(np.random.default_rng(seed), 200, 200)._replace(width=9),
        )


@pytest.mark.parametrize(
    ("at", "value"), [(0, 2), (1, 0), (2, 0), (3, 255), (4, 0), (9, 255), (11, 255), (14, 1), (15, 255)]
)
def test_an_index_that_makes_no_sense_is_a_decode_error(
    photo: tuple[record.Field, Pixels], at: int, value: int
) -> None:
    """Each number of the head that can't be: version, MCU, step, components, places."""
    field, _ = photo
    index = bytearray(field.tiles)
    index[at : at + (2 if at == 4 else 1)] = bytes([value]) * (2 if at == 4 else 1)
    for use in (lambda f: tiles.splice(f, Box(0, 0, 9, 9)), lambda f: list(tiles.columns(f))):
        with pytest.raises(DecodeError, match="none of version 1; update fastload"):
            use(field._replace(tiles=bytes(index)))


def test_cut_and_foreign_indexes_are_decode_errors(photo: tuple[record.Field, Pixels]) -> None:
    """An index cut anywhere before its lead-ins, of another image, or of an image larger than any JPEG."""
    field, _ = photo
    *_, scan = tiles._head(field)
    _, _, at = tiles._layout(field.tiles, len(field.payload), scan, 13, 7)
    for length in range(1, at):
        with pytest.raises(DecodeError, match="too short"):
            tiles.splice(field._replace(tiles=field.tiles[:length]), Box(0, 0, 9, 9))
    with pytest.raises(DecodeError, match="add up"):
        tiles.splice(field._replace(height=field.height - 16), Box(0, 0, 9, 9))
    with pytest.raises(DecodeError, match="update fastload"):
        tiles.splice(field._replace(width=1 << 20), Box(0, 0, 9, 9))


def test_a_record_notices_each_changed_byte_of_an_index(photo: tuple[record.Field, Pixels]) -> None:
    """Lead-ins have no checksum of their own: the record's covers them."""
    data = record.build([photo[0]])
    first = record._HEAD.size + record._ENTRY.size
    assert bytes(data[first : first + 4]) == bytes(photo[0].tiles[:4])
    for at in range(first, first + len(photo[0].tiles), 7):
        with pytest.raises(ChecksumError):
            record.parse(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :])


# --- the other backend

CROPS = """
import sys, numpy as np
from fastload import decode, jpeg, record
from fastload.geometry import Box
cases = np.load(sys.argv[1])
for name in sorted({name.split()[0] for name in cases.files}):
    height, width = cases[f"{name} size"].tolist()
    data, index = (cases[f"{name} {part}"].tobytes() for part in ("data", "index"))
    field = record.Field(record.JPEG, data, 1, 3, 0, width, height, index, record.checksum(data))
    for x, y, w, h, reduction in cases[f"{name} boxes"].tolist():
        box = Box(x, y, w, h)
        whole = decode._decode_jpeg(data, (height, width), reduction, keep=True)
        assert np.array_equal(decode.region(field, box, reduction), decode._crop(whole, box)), (name, box, reduction)
        if reduction == 1:
            assert np.array_equal(whole, cases[f"{name} pixels"]), name
print(type(jpeg.backend()).__name__)
"""


def test_turbojpeg_decodes_the_same_crops(tmp_path: Path) -> None:
    """PyTurboJPEG, where it and its library load, gives the crops that simplejpeg gives."""
    random, arrays = np.random.default_rng(0), {}
    for sampling in ("444", "422", "420", "440", "411", "grey"):
        data = file(image("photo", 150, 210, 7), sampling, 92, False, 0)
        with small_tiles(32):
            cut = recut.recut(data)
        boxes = []
        for reduction in (1, 1, 1, 1, 2, 4, 8):
            box = random_box(random, -(-150 // reduction), -(-210 // reduction))
            boxes.append((*box, reduction))
        arrays |= {
            f"{sampling} size": np.array((150, 210)),
            f"{sampling} data": np.frombuffer(cut.data, np.uint8),
            f"{sampling} index": np.frombuffer(cut.tiles, np.uint8),
            f"{sampling} boxes": np.array(boxes),
            f"{sampling} pixels": pillow(data),
        }
    np.savez(tmp_path / "cases.npz", **arrays)
    result = subprocess.run(
        [sys.executable, "-c", CROPS, str(tmp_path / "cases.npz")],
        env=os.environ | {"FASTLOAD_JPEG_BACKEND": "turbojpeg"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ImportError" in result.stderr and os.environ.get("FASTLOAD_REQUIRE_TURBOJPEG") != "1":
        reason = result.stderr[result.stderr.rindex("ImportError") :].splitlines()[0]
        pytest.skip(f"{reason} (FASTLOAD_REQUIRE_TURBOJPEG=1 makes this a failure)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["_TurboJpeg"]


def test_sequential_restarts_do_not_matter() -> None:
    """Restart intervals of any length, 1 MCU and more than all of them too, are read."""
    random = np.random.default_rng(5)
    source = random_picture(random, 60, 90, (Component(1, 2, 2), Component(2), Component(3)), 0.3)
    expected = pillow(encode(source))
    for interval in (1, 2, 5, 6, 7, 11, 24, 100, 65535):
        with small_tiles(32):
            data = recut.recut(encode(source, [Scan((0, 1, 2), interval=interval)])).data
        assert np.array_equal(pillow(data), expected), interval
