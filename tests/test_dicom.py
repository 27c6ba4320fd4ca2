"""DICOM files: what becomes of their pixels, against pydicom's own functions, and all that can be wrong with them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate, encapsulate_extended  # noqa: E402
from pydicom.pixels import (  # noqa: E402
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
    convert_color_space,
    get_decoder,
)

from fastload import dicom, dicom_images  # noqa: E402
from fastload.dicom import looks_like_dicom, read_dicom  # noqa: E402
from fastload.errors import SourceError  # noqa: E402
from fastload.samples import Samples  # noqa: E402

Array = npt.NDArray[Any]

NATIVE = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
SYNTAXES = [*NATIVE, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless]
RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with dicom.quiet():
        yield


def made(
    path: str | Path,
    values: Array,
    *,
    colour: bool = False,
    syntax: Any = uid.ExplicitVRLittleEndian,
    planar: int = 0,
    frames: list[bytes] | None = None,
    raw: bytes | None = None,
    extra: Callable[[Dataset], None] | None = None,
    **elements: Any,
) -> Any:
    """Write a DICOM file of `values`, (frames, rows, columns) or one frame, with a last axis of 3 if in colour.

    frames: compressed already. raw: instead of the values' bytes.
    """
    samples = 3 if colour else 1
    rows, columns = values.shape[-3:-1] if colour else values.shape[-2:]
    count = values.ndim - (3 if colour else 2)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Modality, data.PatientName, data.PatientAge = "CT", "Doe^Jane", "045Y"
    data.SamplesPerPixel, data.Rows, data.Columns = samples, rows, columns
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    data.BitsAllocated = 8 * values.dtype.itemsize
    data.PixelRepresentation = int(values.dtype.kind == "i")
    if colour:
        data.PlanarConfiguration = planar
    if count:
        data.NumberOfFrames = len(values)
    if planar and syntax != uid.RLELossless:
        values = np.moveaxis(values, -1, -3)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    if "BitsStored" not in data:
        data.BitsStored = data.BitsAllocated
    if "HighBit" not in data:
        data.HighBit = data.BitsStored - 1
    if syntax == uid.RLELossless and frames is None:
        frames = [run_lengths(frame) for frame in values.reshape(-1, *values.shape[bool(count) :])]
    if frames is not None:
        data.PixelData = encapsulate(frames)
    elif raw is not None:
        data.PixelData = raw
    else:
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        content = values.astype(values.dtype.newbyteorder(order)).tobytes()
        data.PixelData = content + bytes(len(content) % 2)
    data["PixelData"].VR = "OB" if data.BitsAllocated == 8 else "OW"
    if extra is not None:
        extra(data)
    data.save_as(path, enforce_file_format=True)
    return pydicom.dcmread(path)


def run_lengths(frame: Array) -> bytes:
    """A frame as DICOM's RLE has it: a segment for each byte of each sample, the highest byte first; no runs."""
    width = frame.dtype.itemsize
    samples = frame.reshape(-1, frame.shape[2] if frame.ndim == 3 else 1)
    planes = [
        samples[:, i].copy().view(np.uint8)[k::width] for i in range(samples.shape[1]) for k in reversed(range(width))
    ]
    segments = []
    for plane in planes:
        pieces = (plane[start : start + 128].tobytes() for start in range(0, len(plane), 128))
        segment = b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)
        segments.append(segment + b"\x80" * (len(segment) % 2))
    starts = np.cumsum([64, *map(len, segments)])[:-1].tolist()
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(starts))) + b"".join(segments)


def one(path: str | Path, **options: Any) -> Array:
    """The image in a file that has one."""
    found = read_dicom([("a", str(path))], **options)
    assert found.names == ["a"]
    image: Array = found.read(0)["image"]
    return image


def reason(path: str | Path, **options: Any) -> str:
    """Why the first sample of a file can't be had: known when it is listed, or found when it is read."""
    found = read_dicom([("a", str(path))], **options)
    with pytest.raises(SourceError) as caught:
        found.read(0)
    assert found.problems.get(0, str(caught.value)) == str(caught.value)
    return str(caught.value)


def read_all(found: Samples) -> dict[int, str]:
    """Read every sample; the reasons of those that can't be. Nothing but SourceError and OSError may come."""
    reasons = {}
    for index in range(len(found.names)):
        try:
            image = found.read(index)["image"]
            assert image.ndim == 3
            assert image.shape[2] in (1, 3)
        except (SourceError, OSError) as error:
            reasons[index] = str(error)
    return reasons


def item(**elements: Any) -> Dataset:
    data = Dataset()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


# ---- what is one


def test_it_is_known_by_its_magic(tmp_path: Path) -> None:
    """A file is DICOM by four bytes, a folder by one of the first files in it; nothing is read that isn't there."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    made(tmp_path / "deep" / "er" / "scan", RAMP)
    junk = tmp_path / "junk"
    junk.mkdir()
    for number in range(30):
        (junk / f"{number}.txt").write_bytes(b"DICM" * 40 if number % 2 else b"")
    assert looks_like_dicom(tmp_path / "deep" / "er" / "scan")
    assert looks_like_dicom(tmp_path)
    assert looks_like_dicom(tmp_path / "deep")
    assert not looks_like_dicom(junk / "0.txt")
    assert not looks_like_dicom(tmp_path / "missing")
    (junk / "1.txt").write_bytes(b"DICM" * 32 + b"DICX")
    for number in range(1, 30, 2):
        (junk / f"{number}.txt").write_bytes(bytes(200))
    assert not looks_like_dicom(junk)


# ---- pixels as they are stored


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pixels_come_out_as_they_were_stored(data: st.DataObject) -> None:
    """Any depth, signed or not, grey or colour, in planes or not, in frames, in each syntax; bits above are cut off."""
    draw = data.draw
    syntax, colour, signed = draw(st.sampled_from(SYNTAXES)), draw(st.booleans()), draw(st.booleans())
    stored = draw(st.integers(1, 16))
    allocated = draw(st.sampled_from([8, 16])) if stored <= 8 else 16
    frames = draw(st.integers(0, 3))
    shape = (*([frames] if frames else []), draw(st.integers(1, 5)), draw(st.integers(1, 5)), *([3] if colour else []))
    low = -(1 << stored - 1) if signed else 0
    random = np.random.default_rng(draw(st.integers(0, 99)))
    values = random.integers(low, low + (1 << stored), shape)
    garbage = random.integers(0, 1 << 16, shape) >> stored << stored if stored < allocated else 0
    written = (
        ((values & (1 << stored) - 1) | garbage)
        .astype(f"u{allocated // 8}")
        .view(f"{'iu'[not signed]}{allocated // 8}")
    )
    planar = draw(st.integers(0, 1)) if colour else 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        made(path, written, colour=colour, syntax=syntax, planar=planar, BitsStored=stored)
        found = read_dicom([("a", path)])
        images = [found.read(index)["image"] for index in range(len(found.names))]
    expected = values.reshape(-1, *shape[bool(frames) :][:2], 3 if colour else 1)
    np.testing.assert_array_equal(np.stack(images), expected)
    assert images[0].dtype == (np.int16 if signed else np.uint8 if stored <= 8 else np.uint16)
    assert images[0].flags.writeable


def test_each_frame_is_a_sample(tmp_path: Path) -> None:
    """They are numbered in their names; a file of one frame keeps its name; a note says it."""
    made(tmp_path / "many", np.stack([RAMP + i for i in range(11)]))
    made(tmp_path / "single", RAMP[None])
    found = read_dicom([("m", str(tmp_path / "many")), ("s", str(tmp_path / "single"))])
    assert found.names == [*(f"m#{i:03}" for i in range(11)), "s"]
    assert [int(found.read(i)["image"][0, 0, 0]) for i in range(12)] == [*range(11), 0]
    assert found.notes == ["1 files have several frames; each frame is a sample"]
    assert found.kinds == {"image": "image"}
    assert found.classes is None


def test_single_bits_are_unpacked(tmp_path: Path) -> None:
    """Frames of an odd number of bits follow each other without a gap."""
    bits = np.random.default_rng(1).integers(0, 2, (5, 3, 5), np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    made(tmp_path / "a", bits, BitsAllocated=1, raw=packed + bytes(len(packed) % 2))
    found = read_dicom([("a", str(tmp_path / "a"))])
    np.testing.assert_array_equal([found.read(i)["image"][..., 0] for i in range(5)], bits)


def test_larger_is_brighter(tmp_path: Path) -> None:
    """MONOCHROME1 is inverted within its bits, and after a window; rescaled values stay what they are."""
    made(tmp_path / "u", RAMP.astype(np.uint16), PhotometricInterpretation="MONOCHROME1", BitsStored=12)
    np.testing.assert_array_equal(one(tmp_path / "u")[..., 0], 4095 - RAMP.astype(int))
    signed = RAMP.astype(np.int16) - 20
    made(tmp_path / "s", signed, PhotometricInterpretation="MONOCHROME1", BitsStored=12)
    np.testing.assert_array_equal(one(tmp_path / "s")[..., 0], -1 - signed)
    made(tmp_path / "plain", signed, BitsStored=12)
    window = {"window": (0, 20)}
    np.testing.assert_array_equal(one(tmp_path / "s", **window), 255 - one(tmp_path / "plain", **window))
    np.testing.assert_array_equal(one(tmp_path / "s", rescale=True)[..., 0], signed)
    notes = [read_dicom([("s", str(tmp_path / "s"))], rescale=rescale).notes for rescale in (False, True)]
    assert notes == [["1 files are MONOCHROME1; their images are inverted"], []]


# ---- colours


def lookup_tables(entries: int, first: int, bits: int, order: str = "<") -> dict[str, Any]:
    random = np.random.default_rng(entries)
    tables: dict[str, Any] = {}
    for colour in ("Red", "Green", "Blue"):
        table = random.integers(0, 1 << bits, entries).astype(f"u{bits // 8}")
        words = np.frombuffer(table.tobytes(), "<u2").astype(f"{order}u2")
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [entries % 65536, first, bits]
        tables[f"{colour}PaletteColorLookupTableData"] = words.tobytes()
    return tables


@pytest.mark.parametrize(
    ("entries", "first", "bits", "dtype"),
    [
        (256, 0, 8, np.uint8),
        (16, 10, 8, np.uint8),
        (300, 0, 16, np.uint16),
        (65536, 0, 16, np.uint16),
        (40, -8, 16, np.int16),
    ],
)
def test_palettes_are_looked_up(tmp_path: Path, entries: int, first: int, bits: int, dtype: Any) -> None:
    """As pydicom looks them up; what is beyond the table has its first or last colour."""
    values = (
        np.random.default_rng(0)
        .integers(*(-50, 50) if dtype == np.int16 else (0, 400 if dtype == np.uint16 else 256), (9, 7))
        .astype(dtype)
    )
    data = made(
        tmp_path / "a", values, PhotometricInterpretation="PALETTE COLOR", **lookup_tables(entries, first, bits)
    )
    image = one(tmp_path / "a")
    np.testing.assert_array_equal(image, apply_color_lut(values, data))
    assert image.dtype == (np.uint8 if bits == 8 else np.uint16)


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_of_big_endian_files(tmp_path: Path, bits: int) -> None:
    """Their words are the other way round, and so are the pairs of bytes in them."""
    for name, syntax, order in (("little", uid.ExplicitVRLittleEndian, "<"), ("big", uid.ExplicitVRBigEndian, ">")):
        tables = lookup_tables(64, 0, bits, order)
        made(tmp_path / name, RAMP, syntax=syntax, PhotometricInterpretation="PALETTE COLOR", **tables)
    np.testing.assert_array_equal(one(tmp_path / "big"), one(tmp_path / "little"))


def segmented(segments: list[int]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for colour in ("Red", "Green", "Blue"):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [48, 0, 16]
        tables[f"Segmented{colour}PaletteColorLookupTableData"] = np.array(segments, "<u2").tobytes()
    return tables


def test_segmented_palettes(tmp_path: Path) -> None:
    """Runs and lines are expanded as pydicom does it; what points back into the table is refused."""
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    data = made(tmp_path / "a", RAMP, **palette, **segmented([0, 3, 7, 8, 900, 1, 40, 60000, 0, 2, 5, 6, 1, 3, 0]))
    np.testing.assert_array_equal(one(tmp_path / "a"), apply_color_lut(RAMP, data))
    made(tmp_path / "b", RAMP, **palette, **segmented([0, 3, 7, 8, 9, 2, 1, 0, 0]))
    assert "segment of type 2" in reason(tmp_path / "b")
    made(tmp_path / "c", RAMP, **palette, **segmented([0, 3, 7, 8, 9]))
    assert "3 entries" in reason(tmp_path / "c")
    tables = lookup_tables(48, 0, 16)
    made(tmp_path / "d", RAMP, **palette, **(tables | {"BluePaletteColorLookupTableDescriptor": [47, 0, 16]}))
    assert "differ in size" in reason(tmp_path / "d")


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    """With all of its colours or every other one of a row."""
    ybr = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    made(tmp_path / "full", ybr, colour=True, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_array_equal(one(tmp_path / "full"), convert_color_space(ybr, "YBR_FULL", "RGB"))
    half = ybr.copy()
    half[:, 1::2, 1:] = half[:, ::2, 1:]
    pairs = np.stack([half[:, ::2, 0], half[:, 1::2, 0], half[:, ::2, 1], half[:, ::2, 2]], axis=-1)
    made(tmp_path / "422", ybr, colour=True, PhotometricInterpretation="YBR_FULL_422", raw=pairs.tobytes())
    np.testing.assert_array_equal(one(tmp_path / "422"), convert_color_space(half, "YBR_FULL", "RGB"))


# ---- compressed


def encoded(values: Array, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format, **options)
    return file.getvalue()


def test_jpeg_frames(tmp_path: Path) -> None:
    """Baseline JPEG in grey and colour, as Pillow decodes it, from any of several frames."""
    frames = [np.clip(RAMP * 3 + i, 0, 255).astype(np.uint8) for i in range(3)]
    jpegs = [encoded(frame, "JPEG", quality=95) for frame in frames]
    made(tmp_path / "grey", np.stack(frames), syntax=uid.JPEGBaseline8Bit, frames=jpegs)
    found = read_dicom([("a", str(tmp_path / "grey"))])
    for index, data in enumerate(jpegs):
        np.testing.assert_array_equal(found.read(index)["image"][..., 0], np.asarray(Image.open(io.BytesIO(data))))
    rgb = np.stack([RAMP * 4, 255 - RAMP, RAMP + 60], axis=-1).astype(np.uint8)
    data = encoded(rgb, "JPEG", quality=95, subsampling=0)
    made(
        tmp_path / "rgb",
        rgb,
        colour=True,
        syntax=uid.JPEGBaseline8Bit,
        frames=[data],
        PhotometricInterpretation="YBR_FULL",
    )
    difference = one(tmp_path / "rgb").astype(int) - np.asarray(Image.open(io.BytesIO(data)))
    assert abs(difference).max() <= 2


@pytest.mark.skipif(not features.check_codec("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000_without_loss(tmp_path: Path) -> None:
    """16 bits come back exactly, found by an extended table of offsets too."""
    values = (RAMP.astype(np.uint16) * 1000)[None].repeat(2, 0) + np.array([0, 7], np.uint16)[:, None, None]
    streams = [encoded(frame, "JPEG2000", irreversible=False, no_jp2=True) for frame in values]
    made(tmp_path / "a", values, syntax=uid.JPEG2000Lossless, frames=streams)

    def with_table(data: Any) -> None:
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(streams)

    made(tmp_path / "b", values, syntax=uid.JPEG2000Lossless, frames=streams, extra=with_table)
    for name in ("a", "b"):
        found = read_dicom([("a", str(tmp_path / name))])
        np.testing.assert_array_equal([found.read(i)["image"][..., 0] for i in (0, 1)], values)

    def lying(data: Any) -> None:
        with_table(data)
        data.ExtendedOffsetTable = struct.pack("<2Q", 1 << 62, 0)

    made(tmp_path / "c", values, syntax=uid.JPEG2000Lossless, frames=streams, extra=lying)
    assert "damaged" in reason(tmp_path / "c")


def test_compressed_frames_must_be_as_large_as_the_header_says(tmp_path: Path) -> None:
    """A few bytes of JPEG or RLE that decode to gigabytes are not decoded."""
    huge = bytearray(encoded(RAMP, "JPEG"))
    place = huge.index(b"\xff\xc0") + 5
    huge[place : place + 4] = b"\xff\xff\xff\xff"
    made(tmp_path / "a", RAMP, syntax=uid.JPEGBaseline8Bit, frames=[bytes(huge)])
    assert reason(tmp_path / "a") == "its header says 8 x 6 pixels, the compressed frame 65535 x 65535"
    made(tmp_path / "b", RAMP, syntax=uid.JPEGBaseline8Bit, frames=[b"\xff\xd8\xff\xe0\0\x04junk"])
    assert "frame 0 is no JPEG Baseline" in reason(tmp_path / "b")
    made(tmp_path / "c", RAMP, syntax=uid.JPEGBaseline8Bit, frames=[encoded(RAMP, "JPEG")[:-30]])
    assert "can't be decoded: pillow" in reason(tmp_path / "c")
    made(
        tmp_path / "d", RAMP, syntax=uid.RLELossless, frames=[struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 5000]
    )
    assert "a frame has 10064 bytes" in reason(tmp_path / "d")
    made(tmp_path / "e", RAMP[None], syntax=uid.RLELossless, frames=[bytes(64)], NumberOfFrames=10**9)
    assert "1000000000 frames" in reason(tmp_path / "e")
    wide = (RAMP.astype(np.uint16) * 1000, "JPEG2000")
    if features.check_codec("jpg_2000"):
        frames = [encoded(*wide, irreversible=False, no_jp2=True)]
        made(tmp_path / "f", wide[0], syntax=uid.JPEG2000Lossless, frames=frames, BitsStored=12)
        assert "are not 12 bits" in reason(tmp_path / "f")


@pytest.mark.skipif(get_decoder(uid.JPEGLSLossless).is_available, reason="a library for JPEG-LS is installed")
def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    """Known when the file is listed, with what to install; MPEG can't be had at all."""
    made(tmp_path / "a", RAMP, syntax=uid.JPEGLSLossless, frames=[b"\xff\xd8\xff\xf7"])
    assert "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg" in reason(tmp_path / "a")
    made(tmp_path / "b", RAMP, syntax=uid.MPEG2MPML, frames=[b"1234"])
    assert "which pydicom can't decode" in reason(tmp_path / "b")


# ---- rescaled and windowed


@settings(max_examples=60, deadline=None)
@given(st.integers(-40, 40), st.integers(-3000, 3000), st.booleans())
def test_rescaling_is_pydicoms(slope: int, intercept: int, signed: bool) -> None:
    """Slope and intercept give the values of pydicom's function, as int16."""
    values = np.arange(-24, 24).reshape(6, 8).astype(np.int16) if signed else RAMP
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        data = made(path, values, RescaleSlope=slope, RescaleIntercept=intercept)
        image = one(path, rescale=True)
    np.testing.assert_array_equal(image[..., 0], apply_modality_lut(values, data))
    assert image.dtype == np.int16


def test_rescaling_keeps_values_whole_or_says_why_not(tmp_path: Path) -> None:
    """What can't be kept exactly is an error of this sample with its slope, never rounded; without a slope it is 1."""
    made(tmp_path / "a", RAMP, RescaleSlope=0.25, RescaleIntercept=-1)
    assert "rescaled (slope 0.25, intercept -1), its values are -1 to 10.75" in reason(tmp_path / "a", rescale=True)
    made(tmp_path / "b", RAMP, RescaleSlope=1000, RescaleIntercept=0)
    assert "its values are 0 to 47000" in reason(tmp_path / "b", rescale=True)
    made(tmp_path / "c", RAMP, RescaleSlope="1e308", RescaleIntercept="1e308")
    assert "RescaleSlope is 1e+308" in reason(tmp_path / "c", rescale=True)
    made(tmp_path / "d", RAMP)
    np.testing.assert_array_equal(one(tmp_path / "d", rescale=True)[..., 0], RAMP)
    made(tmp_path / "e", np.stack([RAMP] * 3, -1), colour=True)
    assert reason(tmp_path / "e", rescale=True) == "rescaling is for grey images, and this one is RGB"
    assert reason(tmp_path / "e", window="auto") == "a window is for grey images, and this one is RGB"


def test_a_modality_table_goes_before_a_slope(tmp_path: Path) -> None:
    """A lookup table in a sequence, as numbers or as bytes."""
    table = np.random.default_rng(0).integers(0, 4096, 30)
    for name, content in (("numbers", table.tolist()), ("bytes", table.astype("<u2").tobytes())):
        lut = item(LUTDescriptor=[30, 10, 16])
        lut.add_new("LUTData", "US" if name == "numbers" else "OW", content)
        data = made(tmp_path / name, RAMP, ModalityLUTSequence=[lut])
        image = one(tmp_path / name, rescale=True)
        np.testing.assert_array_equal(image[..., 0], apply_modality_lut(RAMP, data))


def test_frames_have_slopes_and_windows_of_their_own(tmp_path: Path) -> None:
    """In enhanced files they lie in functional groups: of a frame, or of all frames."""
    own = [item(PixelValueTransformationSequence=[item(RescaleSlope=s, RescaleIntercept=s)]) for s in (2, 3)]
    shared = item(FrameVOILUTSequence=[item(WindowCenter=25, WindowWidth=50, VOILUTFunction="LINEAR_EXACT")])
    made(
        tmp_path / "a",
        np.stack([RAMP, RAMP]),
        RescaleSlope=100,
        RescaleIntercept=0,
        PerFrameFunctionalGroupsSequence=own,
        SharedFunctionalGroupsSequence=[shared],
    )
    found = read_dicom([("a", str(tmp_path / "a"))], rescale=True)
    for index, slope in enumerate((2, 3)):
        np.testing.assert_array_equal(found.read(index)["image"][..., 0], RAMP.astype(int) * slope + slope)
    windowed = read_dicom([("a", str(tmp_path / "a"))], window="auto").read(0)["image"][..., 0]
    np.testing.assert_array_equal(windowed, np.clip(np.rint((RAMP * 2.0 + 2) / 50 * 255), 0, 255))


@settings(max_examples=120, deadline=None)
@given(
    st.floats(-300, 300).map(lambda number: round(number, 3)),
    st.floats(1, 600).map(lambda number: round(number, 3)),
    st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.booleans(),
)
def test_windows_are_pydicoms(centre: float, width: float, function: str | None, own: bool) -> None:
    """The standard's three functions, from 0 to 255; the window is the file's own or one for all."""
    values = np.arange(-128, 128).reshape(16, 16).astype(np.int16)
    elements: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -3, "BitsStored": 9}
    if function is not None:
        elements["VOILUTFunction"] = function
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        data = made(path, values, WindowCenter=[centre, 1], WindowWidth=[width, 1], **elements)
        image = one(path, window="auto" if own else (centre, width))
    full = apply_windowing(apply_modality_lut(values, data), data)
    expected = (full - (-256 * 2 - 3)) / (511 * 2) * 255
    assert image.dtype == np.uint8
    assert abs(image[..., 0] - expected).max() <= 0.5 + 1e-6


def test_the_window_of_one(tmp_path: Path) -> None:
    """LINEAR with a width of 1 is a threshold."""
    made(tmp_path / "a", RAMP)
    np.testing.assert_array_equal(one(tmp_path / "a", window=(20, 1))[..., 0], np.where(RAMP > 19, 255, 0))
    assert reason(tmp_path / "a", window=(20, 0.5)) == "the window is 0.5 wide; 1 is the least"


def test_a_table_takes_the_place_of_a_window(tmp_path: Path) -> None:
    """With `auto` where there is no window; without either it is this sample's problem."""
    table = np.sort(np.random.default_rng(0).integers(0, 4096, 30)).tolist()
    lut = item(LUTDescriptor=[30, 10, 12])
    lut.add_new("LUTData", "US", table)
    data = made(tmp_path / "a", RAMP, VOILUTSequence=[lut])
    expected = np.rint(apply_voi(RAMP.astype(np.uint16), data) / 4095 * 255)
    np.testing.assert_array_equal(one(tmp_path / "a", window="auto")[..., 0], expected)
    made(tmp_path / "b", RAMP)
    assert "no window of its own" in reason(tmp_path / "b", window="auto")
    made(tmp_path / "c", RAMP, WindowCenter=1, WindowWidth=2, VOILUTFunction="MAGIC")
    assert "VOILUTFunction is 'MAGIC'" in reason(tmp_path / "c", window="auto")


@pytest.mark.parametrize("window", ["40,400", "", (1, 2, 3), (1, 0), (1, -5), (float("nan"), 1), (1, float("inf"))])
def test_windows_that_make_no_sense(window: Any) -> None:
    """They are refused before a file is opened."""
    with pytest.raises(SourceError, match="the window is"):
        read_dicom([], window=window)


# ---- labels and headers


def folder_of(tmp_path: Path, *elements: dict[str, Any]) -> list[tuple[str, str]]:
    for number, of_one in enumerate(elements):
        made(tmp_path / str(number), RAMP, **of_one)
    return [(f"n{number}", str(tmp_path / str(number))) for number in range(len(elements))]


def labels_of(found: Samples) -> list[Any]:
    return [None if index in found.problems else found.read(index)["label"] for index in range(len(found.names))]


@pytest.mark.parametrize("name", ["Modality", "0008,0060", "(0008,0060)", "(0008, 0060)"])
def test_texts_are_names_of_classes(tmp_path: Path, name: str) -> None:
    """Numbered in sorted order; an element that is missing or empty is the problem of its sample."""
    files = folder_of(tmp_path, {"Modality": "MR"}, {"Modality": "CT"}, {"Modality": ""}, {"Modality": "MR"})
    found = read_dicom(files, label_from=name)
    assert found.classes == ["CT", "MR"]
    assert labels_of(found) == [1, 0, None, 1]
    assert found.problems == {2: "it has no Modality (0008,0060), which should be its label"}


def test_numbers_are_labels_as_they_are(tmp_path: Path) -> None:
    """Integers are integers, decimals are real, and neither has names."""
    files = folder_of(
        tmp_path, {"InstanceNumber": 7, "SliceThickness": "2.5"}, {"InstanceNumber": -3, "SliceThickness": 1}
    )
    for keyword, values, kind in (("InstanceNumber", [7, -3], int), ("SliceThickness", [2.5, 1.0], float)):
        found = read_dicom(files, label_from=keyword)
        assert labels_of(found) == values
        assert {type(label) for label in labels_of(found)} == {kind}
        assert found.classes is None
    assert labels_of(read_dicom(files, label_from="Rows")) == [6, 6]
    assert read_dicom(files, label_from="TransferSyntaxUID").classes == [str(uid.ExplicitVRLittleEndian)]


def test_labels_that_are_none(tmp_path: Path) -> None:
    """Several values, and numbers that no label can hold, are problems of their samples."""
    files = folder_of(tmp_path, {"ImageType": ["ORIGINAL", "PRIMARY"], "InstanceNumber": "99999999999"})
    assert "has 2 values; a label is one" in read_dicom(files, label_from="ImageType").problems[0]
    made(tmp_path / "0", RAMP, PixelSpacing=[])
    assert "it has no PixelSpacing" in read_dicom(files, label_from="PixelSpacing").problems[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modality", "did you mean Modality"),
        ("SeriesDescripton", "SeriesDescription"),
        ("xyzzy!", r"give a keyword \(Modality\) or a tag"),
        ("0009,1001", "is no element of DICOM's dictionary"),
        ("PixelData", "PixelData is neither text nor a number"),
        ("ModalityLUTSequence", "neither text nor a number"),
        ("SmallestImagePixelValue", None),
    ],
)
def test_elements_are_looked_up_in_the_dictionary(name: str, message: str | None) -> None:
    """A wrong name is an error at once, with those that are near it."""
    for asked in ({"label_from": name}, {"header": [name]}):
        if message is None:
            read_dicom([], **asked)  # type: ignore[arg-type]
            continue
        with pytest.raises(SourceError, match=message):
            read_dicom([], **asked)  # type: ignore[arg-type]


def test_header_values_are_fields_and_nothing_else_is(tmp_path: Path) -> None:
    """Numbers, texts and lists by name; a field that isn't one number or text everywhere is JSON."""
    files = folder_of(
        tmp_path,
        {
            "PixelSpacing": [0.5, 0.25],
            "KVP": "120",
            "InstanceNumber": 1,
            "SeriesDescription": "näher",
            "SpecificCharacterSet": "ISO_IR 192",
        },
        {"KVP": "80.5", "InstanceNumber": 2},
    )
    names = ["PixelSpacing", "0018,0060", "InstanceNumber", "SeriesDescription", "PatientAge"]
    found = read_dicom(files, header=names)
    first, second = found.read(0), found.read(1)
    del first["image"], second["image"]
    same = {"PatientAge": "045Y"}
    assert (
        first == {"PixelSpacing": [0.5, 0.25], "KVP": 120.0, "InstanceNumber": 1, "SeriesDescription": "näher"} | same
    )
    assert second == {"PixelSpacing": None, "KVP": 80.5, "InstanceNumber": 2, "SeriesDescription": None} | same
    assert [type(first[key]) for key in ("KVP", "InstanceNumber")] == [float, int]
    assert {type(value) for value in first["PixelSpacing"]} == {float}
    assert found.kinds == {"image": "image", "PixelSpacing": "json", "SeriesDescription": "json"}
    assert read_dicom(files).read(0).keys() == {"image"}
    assert read_dicom(files, header=["PatientName"]).read(0)["PatientName"] == "Doe^Jane"


# ---- several files


def test_all_images_have_the_type_of_the_first(tmp_path: Path) -> None:
    """Another one is the problem of its sample; a window makes all of them alike."""
    (tmp_path / "0").write_bytes(b"junk")
    for number, dtype in enumerate((np.uint16, np.int16, np.uint8, np.uint16), 1):
        made(tmp_path / str(number), RAMP.astype(dtype))
    files = [(str(number), str(tmp_path / str(number))) for number in range(5)]
    found = read_dicom(files)
    assert sorted(found.problems) == [0, 2, 3]
    assert found.problems[2] == (
        "its values are 16 bits, signed, those of the first image 16 bits, unsigned; pack them apart, or as 8 bits "
        "(--window)"
    )
    assert found.read(4)["image"].dtype == np.uint16
    assert sorted(read_dicom(files, window=(20, 40)).problems) == [0]
    assert sorted(read_dicom(files, rescale=True).problems) == [0]


def test_content_changes_with_files_and_options(tmp_path: Path) -> None:
    """It is the same as long as all of these are: names, sizes, times, what is asked for."""
    files = folder_of(tmp_path, {}, {})
    contents = [
        read_dicom(files, **options).content
        for options in ({}, {}, {"window": (1, 2)}, {"rescale": True}, {"label_from": "Modality"}, {"header": ["KVP"]})
    ]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 5
    os.utime(tmp_path / "1", ns=(5, 5))
    assert read_dicom(files).content != contents[0]


def test_a_file_that_changes_in_between(tmp_path: Path) -> None:
    """What was listed is not what is there: an error of the sample, as is a file that is gone."""
    files = folder_of(tmp_path, {}, {})
    found = read_dicom(files)
    made(tmp_path / "0", RAMP.astype(np.uint16))
    with pytest.raises(SourceError, match="has changed since it was listed"):
        found.read(0)
    (tmp_path / "1").unlink()
    with pytest.raises(FileNotFoundError):
        found.read(1)
    assert read_dicom(files).problems[1].startswith("it can't be read: No such file")


def test_threads_read_at_once(tmp_path: Path) -> None:
    """They share nothing."""
    files = folder_of(tmp_path, *({"RescaleSlope": 1, "RescaleIntercept": number} for number in range(20)))
    found = read_dicom(files, rescale=True)
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(lambda index: found.read(index % 20)["image"], range(200)))
    assert [int(image[0, 0, 0]) for image in images] == [index % 20 for index in range(200)]


def test_pydicom_keeps_its_remarks_to_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that makes it warn is listed in silence; afterwards warnings are as they were."""
    made(tmp_path / "a", RAMP, syntax=uid.JPEGBaseline8Bit, frames=[encoded(RAMP, "JPEG")[:-30]])
    with warnings.catch_warnings(record=True) as shown, contextlib.closing(logging.StreamHandler()) as handler:
        warnings.simplefilter("always")
        logging.getLogger().addHandler(handler)
        try:
            with dicom.quiet():
                reason(tmp_path / "a", label_from="StudyDate")
                reason(tmp_path / "a")
                warnings.warn_explicit("?", UserWarning, "x.py", 1, "pydicom.misc")
            warnings.warn_explicit("!", UserWarning, "x.py", 1, "pydicom.misc")
        finally:
            logging.getLogger().removeHandler(handler)
    assert [str(warning.message) for warning in shown] == ["!"]
    assert capfd.readouterr().err == ""


def test_without_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pydicom.pixels", None)
    with pytest.raises(SourceError, match=r'pip install "fastload\[dicom\]"'):
        read_dicom([])


# ---- bad files


def test_files_without_an_image(tmp_path: Path) -> None:
    """Each has a reason that says what it is."""
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    assert reason(tmp_path / "junk") == "it is no DICOM file: DICM is not at byte 128"
    (tmp_path / "empty").write_bytes(b"")
    assert "no DICOM file" in reason(tmp_path / "empty")
    assert reason(tmp_path) == "it is no regular file"

    def without_pixels(data: Any) -> None:
        del data.PixelData

    made(tmp_path / "a", RAMP, extra=without_pixels, SOPClassUID=uid.BasicTextSRStorage)
    assert reason(tmp_path / "a").startswith("there is no image in it (Basic Text SR Storage)")
    made(tmp_path / "b", RAMP, SOPClassUID=uid.MediaStorageDirectoryStorage)
    assert "it is a DICOMDIR" in reason(tmp_path / "b")

    def floats(data: Any) -> None:
        data.FloatPixelData = bytes(4 * 48)
        del data.PixelData

    made(tmp_path / "c", RAMP, extra=floats)
    assert "its pixels are floats (7FE0,0008)" in reason(tmp_path / "c")
    data = (tmp_path / "c").read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0")
    (tmp_path / "d").write_bytes(data)
    assert "its transfer syntax is '1.2.840.10008.9.9.9'" in reason(tmp_path / "d")


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"Rows": 7}, "its pixels are 48 bytes, and its header says 56: 1 x 7 x 8"),
        ({"Columns": 4}, "its header says 24"),
        ({"Columns": 0}, "its Columns is 0; it must be 1 to 65535"),
        ({"Rows": None}, "its Rows is None"),
        ({"BitsAllocated": 16, "BitsStored": 8}, "its header says 96"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "its BitsAllocated is 32; it must be 1 or 8 or 16"),
        ({"BitsStored": 9}, "its BitsStored is 9; it must be 1 to 8"),
        ({"BitsStored": 4, "HighBit": 7}, "its HighBit is 7; it must be 3"),
        ({"NumberOfFrames": 2}, "its header says 96: 2 x 6 x 8"),
        ({"NumberOfFrames": 0}, "its NumberOfFrames is 0"),
        ({"NumberOfFrames": 1 << 30}, "its header says 51539607552"),
        ({"SamplesPerPixel": 3}, "its SamplesPerPixel is 3; it must be 1"),
        ({"PhotometricInterpretation": "CMYK"}, "its PhotometricInterpretation is 'CMYK'"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "damaged"),
        ({"PixelRepresentation": 2}, "its PixelRepresentation is 2"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels are more than the limit of 268435456; --max-pixels"),
    ],
)
@pytest.mark.parametrize("syntax", NATIVE)
def test_headers_that_lie(tmp_path: Path, syntax: Any, elements: dict[str, Any], message: str) -> None:
    """What the header says must be possible, and must be as many bytes as there are."""
    made(tmp_path / "a", RAMP, syntax=syntax, **elements)
    assert message in reason(tmp_path / "a")


def test_the_limit_of_pixels(tmp_path: Path) -> None:
    """It holds for each frame."""
    made(tmp_path / "a", np.stack([RAMP, RAMP]))
    assert not read_dicom([("a", str(tmp_path / "a"))], max_pixels=48).problems
    assert "8 x 6 pixels are more than the limit of 47" in reason(tmp_path / "a", max_pixels=47)


def nested(depth: int) -> bytes:
    """Sequences of undefined length, each with an item of undefined length in it."""
    return struct.pack("<HH2sHLHHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF) * depth


def test_sequences_nested_without_end(tmp_path: Path) -> None:
    """A hundred thousand of them, in an element that nobody asked for."""
    made(tmp_path / "a", RAMP)
    data = (tmp_path / "a").read_bytes()
    place = data.index(struct.pack("<HH2s", 0x0008, 0x0060, b"CS"))
    (tmp_path / "b").write_bytes(data[:place] + nested(100_000) + data[place:])
    assert "nested too deep" in reason(tmp_path / "b")


def test_a_little_that_inflates_to_a_lot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is inflated up to a limit; a stream that is cut short is as bad."""
    made(tmp_path / "a", np.zeros((512, 512), np.uint8), syntax=uid.DeflatedExplicitVRLittleEndian)
    data = (tmp_path / "a").read_bytes()
    assert one(tmp_path / "a").shape == (512, 512, 1)
    (tmp_path / "b").write_bytes(data[:-20])
    assert "its deflated data are cut short" in reason(tmp_path / "b")
    (tmp_path / "c").write_bytes(data[:-60] + zlib.compress(bytes(1000)))
    assert "damaged" in reason(tmp_path / "c") or "cut short" in reason(tmp_path / "c")
    monkeypatch.setattr(dicom_images, "_MAX_INFLATED", 1 << 16)
    assert "longer than 65536 bytes" in reason(tmp_path / "a")


def test_elements_longer_than_the_file(tmp_path: Path) -> None:
    """A value of 4 GB is not read, nor is memory taken for it."""
    made(tmp_path / "a", RAMP, PhotometricInterpretation="PALETTE COLOR", **lookup_tables(64, 0, 8))
    data = (tmp_path / "a").read_bytes()
    place = data.index(struct.pack("<HH2s", 0x0028, 0x1201, b"OW")) + 8
    (tmp_path / "b").write_bytes(data[:place] + b"\xf0\xff\xff\xff" + data[place + 4 :])
    assert "it is cut short, or damaged: 4294967280 bytes are to follow" in reason(tmp_path / "b")


def bases(tmp_path: Path) -> list[bytes]:
    """Small files of many kinds, as bytes."""
    lut = item(LUTDescriptor=[30, 10, 16])
    lut.add_new("LUTData", "US", list(range(30)))
    frames = np.stack([RAMP, RAMP])
    made(tmp_path / "0", frames, RescaleSlope=2, RescaleIntercept=1, WindowCenter=3, WindowWidth=9)
    made(tmp_path / "1", frames, syntax=uid.RLELossless, VOILUTSequence=[lut])
    made(tmp_path / "2", RAMP, PhotometricInterpretation="PALETTE COLOR", **lookup_tables(64, 0, 8))
    made(tmp_path / "3", frames, syntax=uid.JPEGBaseline8Bit, frames=[encoded(RAMP, "JPEG"), encoded(RAMP, "JPEG")])
    made(tmp_path / "4", RAMP, syntax=uid.ImplicitVRLittleEndian, ModalityLUTSequence=[lut], NumberOfFrames=1)
    made(tmp_path / "5", RAMP, syntax=uid.DeflatedExplicitVRLittleEndian)
    made(tmp_path / "6", np.stack([RAMP] * 3, -1), colour=True, syntax=uid.ExplicitVRBigEndian, planar=1)
    return [(tmp_path / str(number)).read_bytes() for number in range(7)]


OPTIONS: list[dict[str, Any]] = [
    {"label_from": "Modality", "header": ["PatientName", "PixelSpacing"]},
    {"rescale": True, "label_from": "InstanceNumber"},
    {"window": "auto", "max_pixels": 1 << 16},
    {"window": (1, 2), "header": ["WindowCenter"]},
]


def test_files_cut_short(tmp_path: Path) -> None:
    """At many lengths: a reason for the whole file or for its last frame, and never another error."""
    for data in bases(tmp_path):
        lengths = range(0, len(data) - 8, 5)  # the last 8 bytes end compressed frames
        for length in lengths:
            (tmp_path / f"cut{length}").write_bytes(data[:length])
        found = read_dicom([(str(length), str(tmp_path / f"cut{length}")) for length in lengths])
        last = {name.split("#")[0]: index for index, name in enumerate(found.names)}
        assert len(last) == len(lengths)
        assert set(last.values()) <= read_all(found).keys()


@pytest.mark.parametrize("seed", range(7))
def test_flipped_bytes(tmp_path: Path, seed: int) -> None:
    """Thousands of damaged files: images of some kind or reasons, and nothing else."""
    random = np.random.default_rng(seed)
    base = np.frombuffer(bases(tmp_path)[seed], np.uint8)
    for number in range(300):
        data = base.copy()
        places = random.integers(128, len(data), random.integers(1, 5))
        data[places] = (
            random.integers(0, 256, len(places)) if number % 2 else data[places] ^ (1 << random.integers(0, 8))
        )
        (tmp_path / f"flip{number}").write_bytes(data.tobytes())
    files = [(str(number), str(tmp_path / f"flip{number}")) for number in range(300)]
    for options in (OPTIONS[seed % 4], OPTIONS[(seed + 1) % 4]):
        found = read_dicom(files, **({"max_pixels": 1 << 16} | options))
        assert len(found.names) < 100_000
        assert all(0 < len(reason) < 700 for reason in read_all(found).values())
