"""JPEG: Pillow's pixels bit for bit, damage told from harmless remarks, and the choice of the backend."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from conftest import Pixels, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import jpeg
from fastload.decode import decode_other
from fastload.errors import DecodeError

SOI, DQT, SOS, EOI = b"\xff\xd8", b"\xff\xdb", b"\xff\xda", b"\xff\xd9"


def saved(image: Image.Image, **options: Any) -> bytes:
    """The image as a JPEG file written by Pillow."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def photo(height: int = 61, width: int = 83, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(picture(height, width, seed=height + width)).convert(mode)


def pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def draft(data: bytes, reduction: int) -> Pixels:
    """What Pillow gives at 1 / reduction of the size, of pictures whose sides are at least so long."""
    with Image.open(io.BytesIO(data)) as image:
        size = -(-image.width // reduction), -(-image.height // reduction)
        image.draft(None, (image.width // reduction, image.height // reduction))
        assert image.size == size
        return np.asarray(image.convert("RGB"))


def decoded(data: bytes | memoryview, shape: tuple[int, int], reduction: int = 1) -> Pixels:
    out = np.full((*shape, 3), 123, np.uint8)
    jpeg.decode(data, out, reduction)
    return out


def scan_start(data: bytes) -> int:
    """Where the entropy-coded bytes of the first scan begin."""
    marker = data.index(SOS)
    return marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big")


# --- decoding

FILES: dict[str, bytes] = {
    f"{name}{' progressive' if progressive else ''}": saved(
        photo(), quality=90, subsampling=sampling, progressive=progressive
    )
    for sampling, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))
    for progressive in (False, True)
}
FILES |= {
    "grey": saved(photo(mode="L")),
    "grey progressive": saved(photo(mode="L"), progressive=True),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(photo()), colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(np.asarray(photo()), colorsubsampling="411"),
    "restart markers": saved(photo(), restart_marker_blocks=3),
    "optimised tables": saved(photo(), optimize=True),
    "RGB, no YCbCr": saved(photo(), keep_rgb=True),
    "worst quality": saved(photo(), quality=1),
    "best quality": saved(photo(), quality=100),
    "one pixel": saved(photo(1, 1)),
    "one row": saved(photo(1, 50), subsampling=2),
    "one column": saved(photo(50, 1), subsampling=1),
}


@pytest.mark.parametrize("name", FILES)
def test_decode_gives_pillows_pixels(name: str) -> None:
    """Every sampling, grey and progressive included, decodes to Pillow's pixels bit for bit."""
    expected = pillow(FILES[name])
    assert np.array_equal(decoded(FILES[name], expected.shape[:2]), expected)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    sampling=st.integers(0, 2),
    progressive=st.booleans(),
    quality=st.integers(1, 100),
)
def test_decode_gives_pillows_pixels_at_any_size(
    height: int, width: int, sampling: int, progressive: bool, quality: int
) -> None:
    """Sizes that end inside a block or a chroma sample decode like Pillow too."""
    data = saved(photo(height, width), subsampling=sampling, progressive=progressive, quality=quality)
    assert np.array_equal(decoded(data, (height, width)), pillow(data))


def test_decode_reads_views_and_fills_the_array_given() -> None:
    """A memoryview inside a larger buffer decodes straight into a slot of a batch and touches nothing else."""
    data = FILES["4:2:0"]
    batch = np.full((3, 61, 83, 3), 7, np.uint8)
    jpeg.decode(memoryview(b"before" + data + b"after")[6:-5], batch[1])
    assert np.array_equal(batch[1], pillow(data))
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("shape", [(60, 83), (61, 82), (62, 83), (61, 84), (83, 61), (122, 166), (1, 1)])
def test_decode_refuses_a_picture_of_another_size(shape: tuple[int, int]) -> None:
    """A file that does not hold the pixels that were expected is an error, not a partly filled array."""
    with pytest.raises(DecodeError, match="JPEG: "):
        decoded(FILES["4:2:0"], shape)


@pytest.mark.parametrize("data", [b"", b"\xff", SOI, b"not a JPEG at all" * 9, FILES["4:2:0"][:300]])
def test_decode_refuses_what_is_no_jpeg(data: bytes) -> None:
    """Empty, foreign and cut bytes are a DecodeError with its cause."""
    with pytest.raises(DecodeError) as caught:
        decoded(data, (61, 83))
    assert isinstance(caught.value.__cause__, (ValueError, OSError))


# --- reduced sizes

REDUCTIONS = (2, 4, 8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("one ")])
def test_reduced_decoding_gives_pillows_draft(name: str, reduction: int) -> None:
    """At a half, a quarter and an eighth of the size too pixels are libjpeg's, sides rounded up."""
    expected = draft(FILES[name], reduction)
    assert np.array_equal(decoded(FILES[name], expected.shape[:2], reduction), expected)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(8, 80),
    width=st.integers(8, 80),
    sampling=st.integers(0, 2),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_reduced_decoding_gives_pillows_draft_at_any_size(
    height: int, width: int, sampling: int, reduction: int
) -> None:
    """A side that can't be divided ends with a pixel of what is left."""
    data = saved(photo(height, width), subsampling=sampling)
    shape = -(-height // reduction), -(-width // reduction)
    assert np.array_equal(decoded(data, shape, reduction), draft(data, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (3, 5)])
def test_reduced_decoding_leaves_at_least_a_pixel(height: int, width: int, reduction: int) -> None:
    """Of a picture narrower than a reduced pixel one is left, of about its mean colour."""
    colours = np.full((height, width, 3), (200, 30, 90), np.uint8)
    data = saved(Image.fromarray(colours), quality=100, subsampling=0)
    got = decoded(data, (-(-height // reduction), -(-width // reduction)), reduction)
    assert np.abs(got.astype(int) - (200, 30, 90)).max() <= 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("more", [(1, 0), (0, 1), (-1, 0), (0, -1), (1, -1)])
def test_reduced_decoding_refuses_a_picture_of_another_size(reduction: int, more: tuple[int, int]) -> None:
    """A pixel more or less on a side is an error here too."""
    shape = -(-61 // reduction) + more[0], -(-83 // reduction) + more[1]
    with pytest.raises(DecodeError, match="JPEG: "):
        decoded(FILES["4:2:0"], shape, reduction)


# --- header


@pytest.mark.parametrize(
    ("mode", "options", "colorspace"),
    [("RGB", {}, "YCbCr"), ("L", {}, "Gray"), ("CMYK", {}, "CMYK"), ("RGB", {"keep_rgb": True}, "RGB")],
)
def test_header_says_size_and_colour_space(mode: str, options: dict[str, Any], colorspace: str) -> None:
    """The header gives height, width and colour space without decoding, CMYK included."""
    data = saved(photo(mode=mode), **options)
    assert jpeg.header(data) == jpeg.Header(61, 83, colorspace)
    assert jpeg.header(memoryview(data)[: scan_start(data) + 20]) == jpeg.Header(61, 83, colorspace), "no scan is read"


def test_header_ignores_remarks_about_the_header() -> None:
    """Bytes between two segments don't hide the size."""
    assert jpeg.header(with_bytes_between_segments(FILES["4:2:0"])) == jpeg.Header(61, 83, "YCbCr")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"plain text, and not a short one" * 20])
def test_header_refuses_other_formats(data: bytes) -> None:
    """Bytes that are no JPEG are a DecodeError."""
    with pytest.raises(DecodeError, match="JPEG: "):
        jpeg.header(data)


@pytest.mark.parametrize("kept", [1, 2, 20, 160, -1, -2])
def test_header_refuses_a_cut_header(kept: int) -> None:
    """A file that ends before its first scan is a DecodeError, wherever it ends; negative: counted from the scan."""
    data = FILES["4:2:0"]
    with pytest.raises(DecodeError, match="JPEG: "):
        jpeg.header(data[: kept if kept > 0 else data.index(SOS) + kept + 1])


# --- check


def with_bytes_between_segments(data: bytes) -> bytes:
    at = data.index(DQT)
    return data[:at] + b"\x00\x01\x02" + data[at:]


def with_wrong_spectral_end(data: bytes) -> bytes:
    """A baseline file whose SOS says that it ends at coefficient 0: libjpeg remarks on it and decodes all the same."""
    at = scan_start(data) - 2
    assert data[at] == 63
    return data[:at] + b"\x00" + data[at + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_check_passes_whole_files(name: str) -> None:
    """A whole file is one that the backends decode."""
    assert jpeg.check(FILES[name]) is True


@pytest.mark.parametrize("name", ["4:2:0", "4:4:4 progressive", "grey", "restart markers"])
def test_check_finds_every_cut(name: str) -> None:
    """A file cut anywhere, even by its last byte, is damaged."""
    data = FILES[name]
    passed = []
    for length in [*range(0, len(data) - 16, 13), *range(len(data) - 16, len(data))]:
        try:
            jpeg.check(data[:length])
        except DecodeError:
            continue
        passed.append(length)
    assert not passed, f"cut at these of {len(data)} bytes it passed"


@pytest.mark.parametrize("spoil", [with_bytes_between_segments, with_wrong_spectral_end])
def test_check_leaves_files_with_harmless_remarks_to_opencv(spoil: Any) -> None:
    """A harmless remark about the header: strict decoders refuse the file, OpenCV gives Pillow's pixels."""
    data = spoil(FILES["4:2:0"])
    assert jpeg.check(data) is False
    assert np.array_equal(decode_other(data, pillow(FILES["4:2:0"]).shape), pillow(FILES["4:2:0"]))
    if isinstance(jpeg.backend(), jpeg._SimpleJpeg):  # PyTurboJPEG warns and decodes
        with pytest.raises(DecodeError):
            decoded(data, (61, 83))


@pytest.mark.parametrize("spoil", [with_bytes_between_segments, with_wrong_spectral_end])
def test_check_finds_cuts_behind_a_harmless_remark(spoil: Any) -> None:
    """A remark about the header does not hide that the file is cut short."""
    data = spoil(FILES["4:2:0"])
    for missing in (2, 3, 50, 300):
        with pytest.raises(DecodeError):
            jpeg.check(data[:-missing])


@pytest.mark.parametrize(
    "damage",
    [EOI, b"\xff\xd0", b"\xff\xc4\x00\x02", b"\xff" * 40, bytes(400)],
    ids=["end of image", "restart", "segment", "fill bytes", "zeros"],
)
def test_check_finds_damage_in_the_entropy_coded_bits(damage: bytes) -> None:
    """Bytes of the scan that were overwritten by markers or zeros are found."""
    data = FILES["4:2:0"]
    at = (scan_start(data) + len(data)) // 2
    with pytest.raises(DecodeError):
        jpeg.check(data[:at] + damage + data[at + len(damage) :])


def test_check_takes_bytes_between_scans_for_damage() -> None:
    """The remark that is harmless in the header means lost data where it comes between two scans."""
    data = FILES["4:2:0 progressive"]
    second = data.index(SOS, scan_start(data))
    with pytest.raises(DecodeError, match="extraneous bytes"):
        jpeg.check(data[:second] + b"junk" + data[second:])


# --- encode


def test_encode_writes_a_baseline_file_of_the_quality_asked_for() -> None:
    """The encoder writes 4:2:0 baseline that Pillow reads; quality 95 comes close to the picture, 5 does not."""
    pixels = picture(120, 160, seed=5)
    error = {}
    for quality in (5, 95):
        data = jpeg.encode(pixels, quality)
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG"
        assert "progressive" not in image.info
        assert [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)]
        error[quality] = float(np.abs(pillow(data).astype(float) - pixels).mean())
        assert np.array_equal(decoded(data, (120, 160)), pillow(data))
    assert error[95] < 4 < error[5]


def test_encode_takes_strided_pixels() -> None:
    """A crop, which is not contiguous, is encoded as what it shows."""
    whole = picture(90, 90, seed=6)
    assert jpeg.encode(whole[20:60, 30:80], 90) == jpeg.encode(whole[20:60, 30:80].copy(), 90)


@pytest.mark.parametrize("quality", [0, -1, 101])
def test_encode_refuses_impossible_qualities(quality: int) -> None:
    """A quality outside 1 to 100 is named in a ValueError."""
    with pytest.raises(ValueError, match=f"quality is {quality}; it may be 1 to 100"):
        jpeg.encode(picture(8, 8), quality)


# --- backends

PIXELS_OF_ALL = """
import sys, numpy as np
from fastload import jpeg
from fastload.decode import decode_other
files, folder = np.load(sys.argv[1]), sys.argv[2]
for name in files.files:
    data = files[name].tobytes()
    header = jpeg.header(data)
    for reduction in (1, 2, 4, 8):
        out = np.empty((-(-header.height // reduction), -(-header.width // reduction), 3), np.uint8)
        jpeg.decode(memoryview(data), out, reduction)
        np.save(f"{folder}/{name}.{reduction}.npy", out)
print(type(jpeg.backend()).__name__)
"""


def run_python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, since a process keeps the backend that it loaded first."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTLOAD_JPEG_BACKEND"} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def pixels_by_backend(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Decode all FILES with a backend, in another process, to one .npy file each, named by their numbers."""
    numbered = {str(i): np.frombuffer(data, np.uint8) for i, data in enumerate(FILES.values())}
    np.savez(folder / "files.npz", **numbered)
    return run_python(PIXELS_OF_ALL, str(folder / "files.npz"), str(folder), FASTLOAD_JPEG_BACKEND=name)


def test_simplejpeg_is_the_default_backend() -> None:
    """Without the variable the backend is simplejpeg, and it is loaded once."""
    code = "from fastload import jpeg; assert jpeg.backend() is jpeg.backend(); print(type(jpeg.backend()).__name__)"
    assert run_python(code).stdout.split() == ["_SimpleJpeg"]


def test_turbojpeg_gives_the_same_pixels(tmp_path: Path) -> None:
    """PyTurboJPEG, where it and its library load, decodes all files to Pillow's pixels, at every size."""
    result = pixels_by_backend(tmp_path, "turbojpeg")
    if "ImportError" in result.stderr and os.environ.get("FASTLOAD_REQUIRE_TURBOJPEG") != "1":
        reason = result.stderr[result.stderr.rindex("ImportError") :].splitlines()[0]
        pytest.skip(f"{reason} (FASTLOAD_REQUIRE_TURBOJPEG=1 makes this a failure)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["_TurboJpeg"]
    for number, (name, data) in enumerate(FILES.items()):
        assert np.array_equal(np.load(tmp_path / f"{number}.1.npy"), pillow(data)), name
        for reduction in REDUCTIONS:
            got = np.load(tmp_path / f"{number}.{reduction}.npy")
            assert np.array_equal(got, decoded(data, got.shape[:2], reduction)), (name, reduction)


def test_missing_turbojpeg_names_the_command_that_installs_it(tmp_path: Path) -> None:
    """A backend whose package is missing is an ImportError that says what to install, not a bad picture."""
    (tmp_path / "turbojpeg.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import numpy as np; from fastload import jpeg; jpeg.decode(b'', np.empty((1, 1, 3), np.uint8))"
    result = run_python(code, FASTLOAD_JPEG_BACKEND="turbojpeg", PYTHONPATH=path)
    assert result.returncode == 1
    assert 'ImportError: FASTLOAD_JPEG_BACKEND=turbojpeg needs PyTurboJPEG: pip install "fastload[turbojpeg]"' in (
        result.stderr
    )


def test_unknown_backend_is_a_wrong_setting_and_no_bad_picture() -> None:
    """A name that is no backend is a ValueError with the names that are, from `decode` too: no sample is at fault."""
    code = """
import numpy as np
from fastload import jpeg
from fastload.decode import decode_other
for attempt in (jpeg.backend, lambda: jpeg.decode(b"", np.empty((1, 1, 3), np.uint8))):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__, error)
"""
    result = run_python(code, FASTLOAD_JPEG_BACKEND="libjpeg")
    expected = "ValueError FASTLOAD_JPEG_BACKEND is 'libjpeg'; it may be simplejpeg or turbojpeg"
    assert result.stdout.splitlines() == [expected, expected], result.stderr
