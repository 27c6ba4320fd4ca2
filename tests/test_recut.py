"""Re-cutting: every kind of JPEG that the standard allows, what is kept of a file, each reason not to, and damage."""

from __future__ import annotations

import io
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import Pixels, picture
from damage import REMARKS, damaged, judge, made_up, pieces, too_large
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import (
    EOI,
    JFIF,
    SAMPLINGS,
    SOI,
    Component,
    Picture,
    Scan,
    decoded,
    encode,
    field_of,
    frame_header,
    pillow,
    random_picture,
    random_progression,
    segment,
    small_tiles,
)
from PIL import Image
from test_jpeg import saved

from fastload import decode, record, recut, tiles
from fastload.image_fields import tiled
from fastload.options import Options
from fastload.recut import Recut, Untouched

YCC = Component(1, 2, 2), Component(2, quantisation=1), Component(3, quantisation=1)
DHT, DQT, SOS = b"\xff\xc4", b"\xff\xdb", b"\xff\xda"
ORIENTATION, COPYRIGHT = 0x0112, 0x8298


def source(seed: int = 0, components: tuple[Component, ...] = YCC, height: int = 75, width: int = 110) -> Picture:
    return random_picture(np.random.default_rng(seed), height, width, components, 0.3)


def small_recut(data: bytes, **options: Any) -> Recut:
    with small_tiles():
        return recut.recut(data, **options)


def outcome_of(data: bytes) -> int:
    """What becomes of a file: why `recut` leaves it alone, RECUT if it does not."""
    try:
        recut.recut(data)
    except Untouched as reason:
        return tiles.OUTCOMES.index(str(reason))
    return tiles.RECUT


def coefficients(data: bytes) -> recut.Coefficients:
    with small_tiles():
        return recut._Reader(data).coefficients.copy()


def check(data: bytes, expected: Pixels) -> None:
    """libjpeg gives the expected pixels for a file, for the file re-cut, and for each column of tiles."""
    assert np.array_equal(pillow(data), expected)
    assert np.array_equal(decoded(data), expected)
    cut = small_recut(data)
    assert np.array_equal(decoded(cut.data), expected)
    assert decode.tiles_show(field_of(cut), expected)


# --- the writer of these tests, and all that it can write


def test_the_writer_writes_what_the_standard_says() -> None:
    """Its grey pictures are the inverse DCT of the coefficients, to within libjpeg's rounding."""
    random = np.random.default_rng(0)
    grey = random_picture(random, 40, 56, (Component(1),), 0.2, 8)
    zigzag = sorted(range(64), key=lambda i: (i // 8 + i % 8, i % 8 if (i // 8 + i % 8) % 2 == 0 else i // 8))
    blocks = np.zeros((5, 7, 64))
    blocks[..., zigzag] = grey.coefficients[0] * grey.quantisation[0]
    x = np.arange(8)
    basis = np.cos((2 * x[:, None] + 1) * x * np.pi / 16) * np.where(x == 0, 0.5**0.5, 1) / 2
    pixels = np.einsum("yv,rcvu,xu->rycx", basis, blocks.reshape(5, 7, 8, 8), basis)
    expected = (pixels.reshape(40, 56) + 128).clip(0, 255)
    assert np.abs(pillow(encode(grey))[..., 0] - expected).max() <= 1


@settings(deadline=None, max_examples=60)
@given(
    sampling=st.sampled_from(SAMPLINGS),
    grey=st.booleans(),
    height=st.integers(1, 60),
    width=st.integers(1, 90),
    kind=st.sampled_from(("baseline", "by component", "two scans", "progressive", "progressive")),
    options=st.fixed_dictionaries(
        {
            "wide": st.booleans(),
            "joined": st.booleans(),
            "fill": st.integers(0, 3),
            "tables": st.integers(1, 4),
            "skewed": st.booleans(),
            "eob_runs": st.booleans(),
        }
    ),
    interval=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_every_kind_of_file_keeps_its_pixels(
    sampling: tuple[int, int],
    grey: bool,
    height: int,
    width: int,
    kind: str,
    options: dict[str, Any],
    interval: int,
    seed: int,
) -> None:
    """Scripts, tables and restarts that no common encoder writes, all decode to what the plainest file decodes to.

    Scans of one or some components, spectral selection and successive approximation in unusual orders, restart
    intervals that change between scans, 16-bit quantisation, several tables to a segment, fill bytes before markers.
    """
    random = np.random.default_rng(seed)
    drawn = random_picture(random, height, width, (Component(7, *sampling), *YCC[1:])[: 1 if grey else 3], 0.3)
    count = len(drawn.components)
    everything = tuple(range(count))
    scans = {
        "baseline": [Scan(everything)],
        "by component": [Scan((place,)) for place in everything],
        "two scans": [Scan(everything[:1]), Scan(everything[1:])][:count],
        "progressive": random_progression(random, count),
    }[kind]
    if kind != "progressive":
        scans = [scan._replace(interval=interval * (i + 1)) for i, scan in enumerate(scans)]
        random.shuffle(scans)  # type: ignore[arg-type]
    check(encode(drawn, scans, **options), decoded(encode(drawn)))


@pytest.mark.parametrize("before", [(), (segment(0xE0, JFIF),), (segment(0xE0, b"JFXX\0"),)])
@pytest.mark.parametrize("transform", [None, 0, 1])
@pytest.mark.parametrize("numbers", [b"\1\2\3", b"\0\1\2", b"RGB", b"\x22\x23\x24"])
def test_colours_follow_from_the_same_segments(
    before: tuple[bytes, ...], transform: int | None, numbers: bytes
) -> None:
    """JFIF, Adobe's transform and the components' numbers decide between YCbCr and RGB, in crops too."""
    components = tuple(Component(n, *sampling) for n, sampling in zip(numbers, ((2, 1), (1, 1), (1, 1)), strict=True))
    if transform is not None:
        before += (segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes((transform,))),)
    data = encode(source(3, components), before=before)
    check(data, pillow(data))


def test_a_segment_that_is_not_quite_jfif_is_found_out() -> None:
    """Where libjpeg reads the colours otherwise, `pack` keeps the file."""
    data = encode(source(3, tuple(Component(n) for n in b"RGB"), 100, 100), before=(segment(0xE0, b"JFIF\0"),))
    field = record.Field(record.JPEG, data, 1, 3, 0, 100, 100)
    assert tiled(field, None, Options()) == (field, tiles.PIXELS)


def test_tables_may_change_between_segments() -> None:
    """The last definition before a scan counts, for quantisation, codes and restarts; extended sequential is read."""
    drawn = source(4)
    plain = encode(drawn, [Scan((0, 1, 2), interval=3)])
    parts = pieces(plain)
    nonsense = [segment(0xDB, b"\0" + b"\1" * 64), segment(0xDD, b"\0\x09")]
    check(b"".join([*parts[:2], *nonsense, *parts[2:]]), pillow(plain))
    code = segment(0xC4, bytes((0x10, 1, *[0] * 15, 7)))
    at = next(i for i, part in enumerate(parts) if part[:2] == DHT)
    check(b"".join([*parts[:at], code, *parts[at:]]), pillow(plain))
    check(encode(drawn, marker=0xC1), pillow(plain))


def test_large_quantisation_makes_an_extended_file() -> None:
    """16-bit tables don't go with baseline (B.2.4.1): the re-cut file is extended sequential."""
    drawn = source(5)
    drawn = drawn._replace(quantisation=tuple(table * 40 for table in drawn.quantisation))
    data = encode(drawn, wide=True)
    check(data, pillow(data))
    assert small_recut(data).data.count(b"\xff\xc1\0\x11\x08") == 1
    assert small_recut(encode(source(5))).data.count(b"\xff\xc0\0\x11\x08") == 1


# --- what is kept


def photo(**options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION], exif[COPYRIGHT] = 6, "nobody"
    return saved(
        Image.fromarray(picture(120, 170, seed=1)),
        **({"exif": exif, "icc_profile": b"colours" * 30000, "comment": b"a remark", "dpi": (72, 36)} | options),
    )


@pytest.mark.parametrize("progressive", [False, True])
def test_everything_that_is_no_picture_is_kept(progressive: bool) -> None:
    """EXIF, ICC profiles of several segments, comments, density and Adobe's segment stand in the re-cut file."""
    data = photo(progressive=progressive)
    cut = small_recut(data)
    before, after = (Image.open(io.BytesIO(d)) for d in (data, cut.data))
    assert dict(after.getexif()) == dict(before.getexif()) == {ORIENTATION: 6, COPYRIGHT: "nobody"}
    assert after.info["icc_profile"] == before.info["icc_profile"] == b"colours" * 30000
    assert after.info["comment"] == b"a remark"
    assert after.info["dpi"] == (72, 36)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")
    for strip in (False, True):
        kept = small_recut(encode(source(), before=(adobe,)), strip=strip).data
        assert Image.open(io.BytesIO(kept)).info["adobe_transform"] == 1


def test_a_stripped_file_keeps_its_orientation() -> None:
    data = photo()
    cut = small_recut(data, strip=True, orientation=6)
    image = Image.open(io.BytesIO(cut.data))
    assert dict(image.getexif()) == {ORIENTATION: 6}
    assert "icc_profile" not in image.info
    assert "comment" not in image.info
    assert len(cut.data) < len(data) - 210000
    assert np.array_equal(pillow(cut.data), pillow(data))
    assert not Image.open(io.BytesIO(small_recut(data, strip=True).data)).getexif(), "1 needs no saying"


def test_other_pictures_in_the_file_are_dropped() -> None:
    """The preview behind the picture goes, and so does the segment that points to it."""
    file = io.BytesIO()
    images = [Image.fromarray(picture(120, 170, seed=i)) for i in range(2)]
    images[0].save(file, "MPO", save_all=True, append_images=images[1:])
    cut = small_recut(file.getvalue())
    assert Image.open(io.BytesIO(file.getvalue())).format == "MPO"
    assert Image.open(io.BytesIO(cut.data)).format == "JPEG"
    assert np.array_equal(pillow(cut.data), pillow(file.getvalue()))


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
def test_the_result_is_a_jpeg_for_everyone(sampling: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow, OpenCV and simplejpeg, strict, read it, at any size, and none of them has anything to remark."""
    data = simplejpeg.encode_jpeg(picture(150, 333, seed=2), quality=93, colorsubsampling=sampling)
    cut = small_recut(data)
    image = Image.open(io.BytesIO(cut.data))
    image.verify()
    assert np.array_equal(simplejpeg.decode_jpeg(cut.data, strict=True), pillow(data))
    assert np.array_equal(pillow(cut.data), pillow(data))
    assert cv2.imdecode(np.frombuffer(cut.data, np.uint8), cv2.IMREAD_COLOR).shape == (150, 333, 3)
    assert capfd.readouterr().err == ""


def test_recutting_again_changes_nothing() -> None:
    """The coefficients are those of the original, and a second time gives the same file."""
    for data in (photo(), photo(progressive=True), encode(source(8), random_progression(np.random.default_rng(1), 3))):
        with small_tiles(64):
            once = recut.recut(data)
            twice = recut.recut(once.data)
        assert once == twice
        assert np.array_equal(coefficients(once.data), coefficients(data))


def test_tiles_have_the_size_that_was_asked_for() -> None:
    """At least so many pixels wide, at least so many bytes on the average, a row at most."""
    data = saved(Image.fromarray(picture(256, 512, seed=4)), quality=90)
    steps = {}
    for pixels, nbytes in ((32, 1), (64, 1), (128, 1), (64, 400), (64, 1 << 20)):
        with small_tiles(pixels, nbytes):
            steps[pixels, nbytes] = tiles._head(field_of(recut.recut(data)))[3]
    assert [steps[pixels, 1] for pixels in (32, 64, 128)] == [2, 4, 8]
    assert steps[64, 400] == -(-400 * 512 // len(data)) > 4
    assert steps[64, 1 << 20] == 32


# --- each reason to leave a file alone


def changed(marker: bytes, at: int, new: bytes, data: bytes | None = None) -> bytes:
    """A file with other bytes in the first segment of a kind; `at` counts from behind the marker."""
    data = data or encode(source(height=100, width=130))
    place = data.index(marker) + 2 + at
    return data[:place] + new + data[place + len(new) :]


def without(marker: bytes) -> bytes:
    return b"".join(part for part in pieces(encode(source(height=100, width=130))) if part[:2] != marker)


def with_inserted(before: bytes, new: bytes) -> bytes:
    data = encode(source(height=100, width=130))
    return data[: data.index(before)] + new + data[data.index(before) :]


def many_scans(count: int) -> bytes:
    grey = source(components=(Component(1),), height=100, width=100)
    bands = [Scan((0,), 1 + i % 63, 1 + i % 63) for i in range(count - 1)]
    return encode(grey, [Scan((0,), 0, 0), *bands])


def cmyk() -> bytes:
    return saved(Image.fromarray(picture(120, 120)).convert("CMYK"))


SOF = b"\xff\xc0"
REASONS: dict[str, tuple[int, Callable[[], bytes]]] = {
    "as it should be": (tiles.RECUT, lambda: encode(source(height=100, width=130))),
    "100 scans": (tiles.RECUT, lambda: many_scans(100)),
    "small": (tiles.SMALL, lambda: encode(source(height=95, width=97))),
    "large": (tiles.LARGE, lambda: changed(SOF, 3, b"\xff\xff\xff\xff")),
    "12 bits": (
        tiles.CODING,
        lambda: changed(SOF, 2, b"\x0c", encode(source(), marker=0xC1).replace(b"\xff\xc1", SOF)),
    ),
    "lossless": (tiles.CODING, lambda: encode(source(), marker=0xC3)),
    "hierarchical": (tiles.CODING, lambda: encode(source(), marker=0xC5)),
    "arithmetic": (tiles.CODING, lambda: encode(source(), marker=0xC9)),
    "arithmetic, progressive": (tiles.CODING, lambda: encode(source(), marker=0xCA)),
    "too large coefficients": (
        tiles.CODING,
        lambda: too_large(np.random.default_rng(3), source(components=(Component(1),), height=100, width=100)),
    ),
    "CMYK": (tiles.SAMPLING, cmyk),
    "two components": (tiles.SAMPLING, lambda: encode(source(components=YCC[:2]))),
    "4:1:0": (tiles.SAMPLING, lambda: encode(source(components=(Component(1, 4, 2), *YCC[1:])))),
    "3 across": (tiles.SAMPLING, lambda: encode(source(components=(Component(1, 3, 1), *YCC[1:])))),
    "chroma of two sizes": (tiles.SAMPLING, lambda: encode(source(components=(YCC[0], Component(2, 2, 1), YCC[2])))),
    "chroma larger than luma": (tiles.SAMPLING, lambda: encode(source(components=(YCC[1], YCC[0], YCC[2])))),
    "all 2 x 2": (tiles.SAMPLING, lambda: encode(source(components=tuple(Component(i, 2, 2) for i in (1, 2, 3))))),
    "no frame": (tiles.SEGMENTS, lambda: without(SOF)),
    "two frames": (tiles.SEGMENTS, lambda: with_inserted(SOS, frame_header(source(height=100, width=130), 0xC0))),
    "no height, or DNL": (tiles.SEGMENTS, lambda: changed(SOF, 3, b"\0\0")),
    "no width": (tiles.SEGMENTS, lambda: changed(SOF, 5, b"\0\0")),
    "a short frame header": (tiles.SEGMENTS, lambda: SOI + segment(0xC0, b"\x08\0") + EOI),
    "no components": (tiles.SAMPLING, lambda: SOI + segment(0xC0, b"\x08\1\0\1\0\0") + EOI),
    "one number for two components": (tiles.SEGMENTS, lambda: changed(SOF, 11, b"\1")),
    "a fifth quantisation table": (tiles.SEGMENTS, lambda: changed(SOF, 10, b"\4")),
    "no quantisation tables": (tiles.SEGMENTS, lambda: without(DQT)),
    "no Huffman tables": (tiles.SEGMENTS, lambda: without(DHT)),
    "no scan": (tiles.SEGMENTS, lambda: without(SOS)[:-2].split(DHT)[0] + EOI),
    "101 scans": (tiles.SEGMENTS, lambda: many_scans(101)),
    "a component without a scan": (tiles.SEGMENTS, lambda: encode(source(height=100, width=130), [Scan((0, 1))])),
    "a component twice": (tiles.SEGMENTS, lambda: encode(source(height=100, width=130), [Scan((0, 1, 2)), Scan((1,))])),
    "components in another order": (tiles.SEGMENTS, lambda: encode(source(height=100, width=130), [Scan((0, 2, 1))])),
    "an unknown component": (tiles.SEGMENTS, lambda: changed(SOS, 3, b"\x09")),
    "an unknown Huffman table": (tiles.SEGMENTS, lambda: changed(SOS, 4, b"\x33")),
    "half a baseline scan": (tiles.SEGMENTS, lambda: changed(SOS, 10, b"\x3e")),
    "bytes between segments": (tiles.SEGMENTS, lambda: with_inserted(DQT, b"junk")),
    "tables behind the scan": (tiles.RECUT, lambda: with_inserted(EOI, segment(0xC4, b"\0" + bytes(16)))),
    "quantisation behind the scan": (tiles.SEGMENTS, lambda: with_inserted(EOI, segment(0xDB, bytes(65)))),
    "DNL": (tiles.SEGMENTS, lambda: with_inserted(EOI, segment(0xDC, b"\0\x64"))),
    "no end": (tiles.SEGMENTS, lambda: encode(source(height=100, width=130))[:-2]),
    "too many codes": (tiles.SEGMENTS, lambda: changed(DHT, 3, b"\3")),
    "a long quantisation table": (tiles.SEGMENTS, lambda: changed(DQT, 2, b"\x10")),
    "AC before DC": (
        tiles.SEGMENTS,
        lambda: encode(source(9, YCC[:1], 100, 100), [Scan((0,), 1, 63), Scan((0,), 0, 0)]),
    ),
    "AC of two components": (tiles.SEGMENTS, lambda: changed(b"\xff\xda\0\x0c", 9, b"\1\x3f", progressive())),
    "flat": (tiles.RECUT, lambda: saved(Image.new("RGB", (200, 200), "red"))),
    "another height": (tiles.BITS, lambda: changed(SOF, 3, b"\0\xc0")),
    "another width": (tiles.BITS, lambda: changed(SOF, 5, b"\1\0")),
    "more blocks than bits": (tiles.BITS, lambda: changed(SOF, 3, b"\x10\0\x10\0")),
    "a restart too few": (
        tiles.BITS,
        lambda: encode(source(height=100, width=130)).replace(SOS, b"\xff\xdd\0\4\0\7" + SOS),
    ),
    "a restart too many": (tiles.BITS, lambda: with_inserted(EOI, b"\xff\xd0")),
    "restarts out of order": (
        tiles.BITS,
        lambda: encode(source(height=100, width=130), [Scan((0, 1, 2), interval=5)]).replace(
            b"\xff\xd1", b"\xff\xd2", 1
        ),
    ),
    "nothing in it": (tiles.SEGMENTS, lambda: b""),
    "no JPEG": (tiles.SEGMENTS, lambda: b"\x89PNG\r\n\x1a\n" + bytes(1000)),
}


def progressive() -> bytes:
    return encode(source(height=100, width=130), [Scan((0, 1, 2), 0, 0), *(Scan((i,), 1, 63) for i in range(3))])


@pytest.mark.parametrize("name", REASONS)
def test_each_reason(name: str) -> None:
    """A file for each way not to be one of those that are re-cut."""
    outcome, make = REASONS[name]
    assert tiles.OUTCOMES[outcome_of(make())] == tiles.OUTCOMES[outcome]


def test_every_outcome_of_recut_has_a_file() -> None:
    raised = {outcome for outcome, _ in REASONS.values()}
    assert raised == set(range(len(tiles.OUTCOMES))) - {tiles.NO_JPEG, tiles.OFF, tiles.PIXELS}


def test_an_unfinished_progressive_file_is_found_out() -> None:
    """libjpeg smooths what such a file lacks, a re-cut one lacks nothing: `pack` keeps it."""
    drawn = source(2, height=100, width=130)
    field = record.Field(record.JPEG, encode(drawn, [Scan((0, 1, 2), 0, 0)]), 1, 3, 0, 130, 100)
    assert outcome_of(bytes(field.payload)) in (tiles.RECUT, tiles.SEGMENTS)
    data = encode(drawn, [Scan((0, 1, 2), 0, 0), *(Scan((i,), 1, 63, 0, 2) for i in range(3))])
    field = field._replace(payload=data)
    assert outcome_of(data) == tiles.RECUT
    assert tiled(field, None, Options()) == (field, tiles.PIXELS)


# --- damage


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_damage_changes_no_pixel(seed: int) -> None:
    """A damaged file is left alone or keeps all of its pixels, and nothing else happens; see `damage.judge`."""
    random = np.random.default_rng(seed)
    data, other = made_up(random), made_up(random)
    with small_tiles(int(random.choice([32, 64])), int(random.choice([1, 100]))):
        assert judge(data, random) != REMARKS or b"\xff\xc2" in data
        for _ in range(2):
            judge(damaged(random, data, other), random)


@pytest.mark.parametrize("kind", ["baseline", "restarts", "progressive"])
def test_files_cut_anywhere_are_left_alone(kind: str) -> None:
    """Cut after any byte, with and without an end marker put there; between two scans a file may end."""
    drawn = source(1, height=30, width=40)
    data = {
        "baseline": lambda: encode(drawn),
        "restarts": lambda: encode(drawn, [Scan((0, 1, 2), interval=2)]),
        "progressive": lambda: encode(drawn, random_progression(np.random.default_rng(2), 3)),
    }[kind]()
    with small_tiles():
        assert outcome_of(data) == tiles.RECUT
        for length in range(len(data) - 1):
            assert outcome_of(data[:length]) != tiles.RECUT
            if outcome_of(data[:length] + EOI) == tiles.RECUT:
                assert b"\xff" in data[length - 1 : length + 1], "between two segments"
                assert length == len(data) - 2 or kind == "progressive"


def peak_of(data: bytes) -> int:
    """Bytes that a thread of its own allocates while it leaves a file alone."""
    peaks, outcomes = [], []

    def work() -> None:
        tracemalloc.start()
        outcomes.append(outcome_of(data))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes[0] != tiles.RECUT
    return peaks[0]


def test_memory_is_bounded_by_the_bytes_of_a_file() -> None:
    """A header may claim any size: nothing is allocated that the file's own bytes could not fill."""
    outcome_of(encode(source(height=100, width=130)))  # compiles
    data = encode(source(height=100, width=130))
    for height, width in ((65500, 65500), (20000, 10000), (65535, 8), (16, 65535), (3000, 3000)):
        claim = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        assert peak_of(changed(SOF, 3, claim, data)) < 200 * 1024 * 8 + 1024 * len(data), (height, width)
    assert peak_of(changed(SOF, 3, b"\xff\xff\xff\xff", data)) < 100_000
    assert peak_of(SOI + segment(0xDD, b"\0\1") * 20000 + EOI) < 1 << 20


def test_endless_scans_end() -> None:
    """Ten thousand scans of nothing are not read: a hundred are the limit."""
    data = progressive()
    at = data.rindex(SOS)
    scan = data[at : data.index(b"\xff", at + 10)]
    assert outcome_of(data[:at] + scan[:10] * 10_000 + data[at:]) in (tiles.BITS, tiles.SEGMENTS)
    refinement = segment(0xDA, b"\1\1\0\0\0\x10") + bytes(28)  # a bit for each of 13 x 17 blocks
    scans = [data[:-2], refinement * 96, EOI]
    assert outcome_of(b"".join(scans)) == tiles.RECUT
    scans[1] = refinement * 10_000
    assert outcome_of(b"".join(scans)) == tiles.SEGMENTS


def test_runs_beyond_the_end_are_what_libjpeg_makes_of_them() -> None:
    """A run of ended blocks that is longer than the image ends with it."""
    grey = source(components=(Component(1),), height=100, width=100)
    data = encode(grey, [Scan((0,), 0, 0)])
    run = segment(0xC4, bytes((0x10, 1, *[0] * 15, 0xE0))) + segment(0xDA, b"\1\1\0\1\x3f\0") + b"\x7f\xfe"
    data = data[:-2] + run + EOI
    assert np.array_equal(decoded(recut.recut(data).data), decoded(data))


def test_bytes_behind_the_end_are_dropped() -> None:
    data = encode(source())
    cut = small_recut(data + b"anything" * 100)
    assert cut == small_recut(data)


def test_scratch_memory_of_another_image_shows_nowhere() -> None:
    """A large image before a small one: nothing of it is left in the coefficients."""
    small = encode(source(6, height=97, width=99))
    expected = small_recut(small)
    small_recut(saved(Image.fromarray(picture(600, 700)), quality=100))
    assert small_recut(small) == expected
