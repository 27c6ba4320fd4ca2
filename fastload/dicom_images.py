"""One DICOM file: its header, believed only as far as the file bears it out, and a frame of its pixels.

What comes out is grey or RGB, larger is brighter: MONOCHROME1 is inverted (not where the rescaled values themselves are
asked for), palettes are looked up, YBR becomes RGB. Pixels that mean padding stay what they are. Bits above the stored
ones, where old files keep overlays, are cut off.

pydicom parses files and decodes pixels; whatever it stumbles over is a SourceError. Nothing is sized by a number in a
header before the file's own length, or `Options.max_pixels`, has vouched for it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import reprlib
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .dicom_values import Pixels, mapped, palette, rescaled, whole, windowed
from .errors import SourceError

MAGIC = b"DICM"  # after 128 bytes of anything

Window = str | tuple[float, float] | None

_MAX_INFLATED = 1 << 28
_DICOMDIR = "1.2.840.10008.1.3.10"
_RLE = "1.2.840.10008.1.2.5"
_PIXEL_DATA = 0x7FE00010
_ALL_PIXEL_DATA = (0x7FE00008, 0x7FE00009, _PIXEL_DATA)  # of floats, of doubles, of integers
_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
_NOT_DECODED = "Unable to decode as exceptions were raised by all available plugins:"

_INVERTED = "MONOCHROME1"
_PALETTE = "PALETTE COLOR"
_SAMPLES = {_INVERTED: 1, "MONOCHROME2": 1, _PALETTE: 1}
_SAMPLES |= {"RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3}
_ELEMENTS = """
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns
    BitsAllocated BitsStored HighBit PixelRepresentation ExtendedOffsetTable ExtendedOffsetTableLengths
    RedPaletteColorLookupTableDescriptor RedPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
    GreenPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    BluePaletteColorLookupTableDescriptor BluePaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
"""
_VALUE_ELEMENTS = """
    RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""


class Options(NamedTuple):
    """What images are made of the values in files; see `dicom.read_dicom`."""

    window: Window
    rescale: bool
    max_pixels: int

    def elements(self) -> list[int]:
        """The elements of a header that it takes."""
        from pydicom.datadict import tag_for_keyword

        keywords = _ELEMENTS + (_VALUE_ELEMENTS if self.rescale or self.window is not None else "")
        return [tag for tag in map(tag_for_keyword, keywords.split()) if tag is not None]


class Layout(NamedTuple):
    """How the header says that pixels lie. photometric: what they mean."""

    photometric: str
    samples: int
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    signed: int
    planar: int

    @property
    def frame_bits(self) -> int:
        """Of a frame that is not compressed."""
        bits = self.rows * self.columns * self.samples * self.allocated
        return bits // 3 * 2 if self.photometric == "YBR_FULL_422" else bits

    @property
    def lowest(self) -> int:
        """The smallest value that the bits stored can have."""
        return -(1 << self.stored - 1) if self.signed else 0


class Header(NamedTuple):
    """What comes before the pixels. meta: the elements about the file itself. data: those about the image."""

    meta: Any
    data: Any
    layout: Layout
    syntax: Any
    pixel_vr: str | None

    def dtype(self, options: Options) -> np.dtype[Any]:
        """The type of the values that the file's images will have."""
        asked = "a window" if options.window is not None else "rescaling" if options.rescale else None
        if asked is not None and not self.layout.photometric.startswith("MONOCHROME"):
            raise SourceError(f"{asked} is for grey images, and this one is {self.layout.photometric}")
        if options.window is not None:
            return np.dtype(np.uint8)
        if options.rescale or self.layout.signed:
            return np.dtype(np.int16)
        if self.layout.photometric == _PALETTE:
            return palette(self.data)[1].dtype
        return np.dtype(np.uint8 if self.layout.stored <= 8 else np.uint16)

    def is_inverted(self, options: Options) -> bool:
        """Whether small values are bright in the file, and large ones in its images."""
        return self.layout.photometric == _INVERTED and not (options.rescale and options.window is None)


class _File(io.BufferedReader):
    """A file that is asked for no more than it has: a damaged header may ask for 4 GB."""

    def __init__(self, raw: Any, size: int) -> None:
        super().__init__(raw)
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        if size is not None and size > max(left, 8):  # up to 8 are asked for to see whether it ends
            raise SourceError(f"it is cut short, or damaged: {size} bytes are to follow, {left} are there")
        return super().read(size)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Whatever goes wrong in a file is a SourceError."""
    try:
        yield
    except SourceError:
        raise
    except RecursionError as error:
        raise SourceError("it is damaged: its sequences are nested too deep") from error
    except MemoryError as error:
        raise SourceError("there is not enough memory to read it") from error
    except Exception as error:  # pydicom's parsers raise whatever a damaged file makes them stumble over
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # EINVAL: of an offset beyond any file
            raise
        raise SourceError(f"it is damaged, or cut short: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextlib.contextmanager
def opened(path: str, options: Options, elements: Sequence[int] = ()) -> Iterator[tuple[_File, Header]]:
    """A file at its pixels, and what comes before them. elements: what else of it to read.

    Raises:
        SourceError, OSError: there is no image in it that can be had with these options, or it can't be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("it is no regular file")
    with _explained(), _File(open(path, "rb", buffering=0), status.st_size) as file:
        file.seek(128)
        if file.read(4) != MAGIC:
            raise SourceError(f"it is no DICOM file: {MAGIC.decode()} is not at byte 128")
        meta, syntax = _meta(file)
        with _inflated(file) if syntax.is_deflated else contextlib.nullcontext(file) as body:
            yield body, _header(body, meta, syntax, options, elements)


def _meta(file: _File) -> tuple[Any, Any]:
    """The elements about the file itself, and its transfer syntax."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ""))
    if meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
        raise SourceError("it is a DICOMDIR: a list of other files, without an image of its own")
    if not syntax.is_transfer_syntax:
        raise SourceError(
            f"it is damaged: its transfer syntax is {reprlib.repr(str(syntax))}, which is none of DICOM's"
        )
    return meta, syntax


def _inflated(file: _File) -> _File:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflate.decompress(file.read(), _MAX_INFLATED)
    if not inflate.eof:
        raise SourceError(f"its deflated data are cut short, or longer than {_MAX_INFLATED} bytes")
    return _File(io.BytesIO(data), len(data))


def _header(file: _File, meta: Any, syntax: Any, options: Options, elements: Sequence[int]) -> Header:
    from pydicom.filereader import read_dataset
    from pydicom.pixels import get_decoder

    data = read_dataset(
        file,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=lambda tag, vr, length: tag in _ALL_PIXEL_DATA,
        specific_tags=[*options.elements(), *elements],
    )
    length, pixel_vr = _pixel_element(file, data, meta)
    layout = _layout(data)
    if layout.rows * layout.columns > options.max_pixels:
        raise SourceError(
            f"{layout.columns} x {layout.rows} pixels are more than the limit of {options.max_pixels}; --max-pixels "
            "raises it"
        )
    left = file.size - file.tell()
    if not syntax.is_encapsulated:
        _check_length(layout, length, left)
    elif 8 * layout.frames > left:
        raise SourceError(f"its header says {layout.frames} frames, and {left} bytes are left for them")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise SourceError(f"its pixels are {syntax.name}, which pydicom can't decode") from error
    if not decoder.is_available:
        raise SourceError(f"its pixels are {syntax.name}, which takes another library: {_PLUGINS}")
    return Header(meta, data, layout, syntax, pixel_vr)


def _pixel_element(file: _File, data: Any, meta: Any) -> tuple[int, str | None]:
    """The length of the pixels, which the file is then at, and their VR, if the file tells."""
    implicit, little = data.original_encoding
    endian = "<" if little else ">"
    start = file.read(8)
    if len(start) < 8:
        kind = getattr(meta.get("MediaStorageSOPClassUID"), "name", "")
        raise SourceError(f"there is no image in it{f' ({kind[:60]})' if kind else ''}, or it is cut short")
    group, element = struct.unpack(f"{endian}HH", start[:4])
    if group << 16 | element != _PIXEL_DATA:
        raise SourceError(f"its pixels are floats ({group:04X},{element:04X}); images have integers of up to 16 bits")
    length: int = struct.unpack(f"{endian}L", start[4:] if implicit else file.read(4))[0]
    return length, None if implicit else start[4:6].decode("ascii")


def _layout(data: Any) -> Layout:
    def number(keyword: str, allowed: Sequence[int], default: int | None = None) -> int:
        value = data.get(keyword)
        value = default if value is None else value
        value = int(value) if isinstance(value, int) else value  # a range looks for its subclasses one by one
        if not isinstance(value, int) or value not in allowed:
            within = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(map(str, allowed))
            raise SourceError(f"its {keyword} is {reprlib.repr(value)}; it must be {within}")
        return value

    photometric = str(data.get("PhotometricInterpretation") or "").strip()
    if photometric not in _SAMPLES:
        raise SourceError(f"its PhotometricInterpretation is {photometric[:40]!r}; it must be {', '.join(_SAMPLES)}")
    samples = number("SamplesPerPixel", (_SAMPLES[photometric],))
    allocated = number("BitsAllocated", (1, 8, 16))
    stored = number("BitsStored", range(1, allocated + 1))
    number("HighBit", (stored - 1,), stored - 1)
    return Layout(
        photometric=photometric,
        samples=samples,
        rows=number("Rows", range(1, 65536)),
        columns=number("Columns", range(1, 65536)),
        frames=number("NumberOfFrames", range(1, 1 << 31), 1),
        allocated=allocated,
        stored=stored,
        signed=number("PixelRepresentation", (0, 1)),
        planar=number("PlanarConfiguration", (0, 1), 0) if samples > 1 else 0,
    )


def _check_length(layout: Layout, length: int, left: int) -> None:
    """Whether pixels that are not compressed are as many bytes as they must be."""
    expected = -(-layout.frame_bits * layout.frames // 8)
    if length > left:
        raise SourceError(f"it is cut short: {length} bytes of pixels are to follow, {left} are there")
    if length not in (expected, expected + expected % 2):
        raise SourceError(
            f"its pixels are {length} bytes, and its header says {expected}: {layout.frames} x {layout.rows} x "
            f"{layout.columns} (frames x rows x columns), {layout.samples} x {layout.allocated} bits each"
        )


# ---- pixels


def frame_of(path: str, frame: int, options: Options, dtype: np.dtype[Any]) -> Pixels:
    """A frame as (height, width, channels). dtype: what `Header.dtype` was when the file was listed.

    Raises:
        SourceError, OSError: it can't be decoded, can't be had with these options, or was changed.
    """
    with opened(path, options) as (file, header):
        if header.dtype(options) != dtype or frame >= header.layout.frames:
            raise SourceError("the file has changed since it was listed")
        values = _decoded(file, header, frame)
        if header.layout.samples == 3:
            return values.astype(dtype, copy=False)
        values = values.astype(np.int32)
        if header.layout.photometric == _PALETTE:
            return mapped(values[..., 0], *palette(header.data))
        low, high = int(values.min()), int(values.max())
        with np.errstate(over="ignore"):
            shown = _shown(np.arange(low, high + 1), header, frame, options).astype(dtype)
        return mapped(values, low, shown)


def _decoded(file: _File, header: Header, frame: int) -> Pixels:
    """The stored values of a frame, of shape (rows, columns, 1 or 3); colours are RGB."""
    from pydicom.pixels import get_decoder

    layout, data = header.layout, header.data
    compressed = header.syntax.is_encapsulated
    options = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "number_of_frames": layout.frames,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": layout.signed,
        "photometric_interpretation": layout.photometric,
        "planar_configuration": 0 if compressed else layout.planar,
        "pixel_keyword": "PixelData",
        "pixel_vr": header.pixel_vr,
    }
    if data.get("ExtendedOffsetTable") and data.get("ExtendedOffsetTableLengths"):
        options["extended_offsets"] = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
    if compressed:
        _check_frame(file, header, frame, options.get("extended_offsets"))
    packed = layout.allocated == 1 and layout.frames > 1  # frames begin in the middle of bytes
    try:
        values, decoded = get_decoder(header.syntax).as_array(file, index=None if packed else frame, **options)
    except RuntimeError as error:
        reason = _one_line(error).removeprefix(_NOT_DECODED)
        raise SourceError(f"its pixels can't be decoded:{reason}; other libraries may: {_PLUGINS}") from error
    image: Pixels = (values[frame] if packed else values).reshape(layout.rows, layout.columns, layout.samples)
    if layout.samples == 3 and decoded["photometric_interpretation"] != "RGB":
        raise SourceError(f"its colours are {decoded['photometric_interpretation']}, which pydicom can't make RGB")
    if image.min() < layout.lowest or image.max() >= layout.lowest + (1 << layout.stored):
        raise SourceError(f"it is damaged: values from {image.min()} to {image.max()} are not {layout.stored} bits")
    return image


def _check_frame(file: _File, header: Header, frame: int, extended_offsets: Any) -> None:
    """Whether a compressed frame says itself that it is as large as the header says."""
    from pydicom.encaps import get_frame

    layout, place = header.layout, file.tell()
    data = get_frame(file, frame, number_of_frames=layout.frames, extended_offsets=extended_offsets)
    file.seek(place)
    if header.syntax == _RLE:
        most = layout.frame_bits // 4 + 4096  # twice the pixels: RLE makes nothing much longer
        if len(data) > most:
            raise SourceError(f"it is damaged: a frame has {len(data)} bytes, {most} are the most that it can need")
        return
    try:
        size = _codestream_size(data)
    except (struct.error, ValueError) as error:
        raise SourceError(f"it is damaged: frame {frame} is no {header.syntax.name}") from error
    if size != (layout.rows, layout.columns):
        raise SourceError(
            f"its header says {layout.columns} x {layout.rows} pixels, the compressed frame {size[1]} x {size[0]}"
        )


def _codestream_size(data: bytes) -> tuple[int, int]:
    """(height, width) in JPEG 2000's SIZ marker, or in the frame header of JPEG or JPEG-LS."""
    if data.startswith(b"\xff\x4f\xff\x51"):
        right, bottom, left, top = struct.unpack(">4L", data[8:24])
        return bottom - top, right - left
    place = 2
    while True:
        marker, length = struct.unpack(">2H", data[place : place + 4])
        if marker == 0xFFF7 or (marker & 0xFFF0 == 0xFFC0 and marker not in (0xFFC4, 0xFFC8, 0xFFCC)):
            height, width = struct.unpack(">2H", data[place + 5 : place + 9])
            return height, width
        if marker <= 0xFF00:
            raise ValueError("no marker")
        place += 1 if marker == 0xFFFF else 2 + length


def _shown(values: Pixels, header: Header, frame: int, options: Options) -> Pixels:
    """What becomes of each of the stored values of a grey image."""
    layout, data = header.layout, header.data
    inverted = header.is_inverted(options)
    if options.window is not None:
        shown = np.rint(windowed(rescaled(values, data, frame), data, frame, options.window))
        return 255 - shown if inverted else shown
    if options.rescale:
        return whole(rescaled(values, data, frame), data, frame)
    return 2 * layout.lowest + (1 << layout.stored) - 1 - values if inverted else values
