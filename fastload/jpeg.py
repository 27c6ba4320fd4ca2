"""JPEG in and out, by libjpeg-turbo. No other module touches the codec.

Two backends give the same pixels: simplejpeg (the default: its wheels carry libjpeg-turbo 3, about 12 us of overhead
per call) and PyTurboJPEG (about 50 us), which uses the system's libturbojpeg. The environment variable
`FASTLOAD_JPEG_BACKEND=simplejpeg|turbojpeg` chooses. Both decode without the GIL.

Decoding means libjpeg's accurate integer DCT and smooth chroma upsampling, always: what Pillow gives, bit for bit.
CMYK and YCCK files are not decoded here (`header` says so); OpenCV reads them.
"""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .errors import DecodeError

Pixels = npt.NDArray[np.uint8]
"""uint8, height x width x 3, RGB; x 1 where it says grey."""

MAX_SCANS = 100
_LONGEST_SIDE = 65_500  # libjpeg's
MAX_EXIF_SEGMENTS = 16
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # none of those that stand alone, but for the end
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1


class Header(NamedTuple):
    """What a JPEG says of itself: its size in pixels and its colour space (YCbCr, RGB, Gray, CMYK or YCCK)."""

    height: int
    width: int
    colorspace: str


class Backend(Protocol):
    """What a JPEG library has to do for us."""

    def decode(self, data: bytes | memoryview, out: Pixels, reduction: int) -> None:
        """Decode into `out`, of the picture's exact shape and 3 or 1 channels; ValueError or OSError if that fails."""


class _SimpleJpeg:
    def __init__(self) -> None:
        import simplejpeg

        self._decode = simplejpeg.decode_jpeg

    def decode(self, data: bytes | memoryview, out: Pixels, reduction: int) -> None:
        # Without a smallest height and width it does not scale.
        least = out.shape[:2] if reduction > 1 else (0, 0)
        decoded = self._decode(data, "RGB" if out.shape[2] == 3 else "GRAY", False, False, *least, reduction, out)
        if decoded.shape != out.shape:
            raise ValueError(f"the JPEG holds {decoded.shape[:2]} pixels, {out.shape[:2]} were expected")


class _TurboJpeg:
    """PyTurboJPEG 1.x needs libjpeg-turbo 2, 2.x needs 3.

    It decodes leniently (a warning of libjpeg becomes one of Python's): its strict mode differs between versions, and
    the bytes of a store are checksummed and were judged by simplejpeg when they were packed.
    """

    def __init__(self) -> None:
        try:
            import turbojpeg
        except ImportError as error:
            raise ImportError(
                'FASTLOAD_JPEG_BACKEND=turbojpeg needs PyTurboJPEG: pip install "fastload[turbojpeg]"'
            ) from error
        try:
            self._library = turbojpeg.TurboJPEG()
        except (RuntimeError, OSError) as error:
            raise ImportError(
                f"PyTurboJPEG is installed, but its library did not load: {error}. Install it (Debian, Ubuntu: "
                'apt-get install libturbojpeg0; macOS: brew install jpeg-turbo), pip install "PyTurboJPEG<2" '
                "where it is libjpeg-turbo 2, "
                "or unset FASTLOAD_JPEG_BACKEND"
            ) from error
        self._formats = {3: turbojpeg.TJPF_RGB, 1: turbojpeg.TJPF_GRAY}

    def decode(self, data: bytes | memoryview, out: Pixels, reduction: int) -> None:
        scale = (1, reduction) if reduction > 1 else None
        pixel_format = self._formats[out.shape[2]]
        if self._library.decode(data, pixel_format=pixel_format, scaling_factor=scale, dst=out) is not out:
            raise ValueError(f"the JPEG does not hold the {out.shape[:2]} pixels that were expected")


_BACKENDS: dict[str, type[Backend]] = {"simplejpeg": _SimpleJpeg, "turbojpeg": _TurboJpeg}


@functools.cache
def backend() -> Backend:
    """The backend that `FASTLOAD_JPEG_BACKEND` names, simplejpeg by default; loaded once per process.

    Raises:
        ValueError: the variable names no backend.
        ImportError: its package or its library is missing.
    """
    name = os.environ.get("FASTLOAD_JPEG_BACKEND", "simplejpeg")
    if name not in _BACKENDS:
        raise ValueError(f"FASTLOAD_JPEG_BACKEND is {name!r}; it may be {' or '.join(_BACKENDS)}")
    return _BACKENDS[name]()


def decode(data: bytes | memoryview, out: Pixels, reduction: int = 1) -> None:
    """Decode a JPEG to RGB or to its luma, at full size or, by DCT scaling, at 1/2, 1/4 or 1/8 of it.

    data: the whole file. reduction: 1, 2, 4 or 8. out: C-contiguous uint8 array of the exact shape that comes out,
    (height, width, 3 or, for luma, 1), both sides divided by `reduction` and rounded up.

    Raises:
        DecodeError: the bytes are damaged, or hold a picture of another size.
    """
    chosen = backend()
    try:
        chosen.decode(data, out, reduction)
    except (ValueError, OSError) as error:
        raise DecodeError(f"JPEG: {error}") from error


def header(data: bytes | memoryview) -> Header:
    """Read size and colour space without decoding; `DecodeError` if the bytes are no JPEG that libjpeg-turbo knows."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: an unknown chroma sampling, or none, in a file cut short
        raise DecodeError(f"JPEG: {error}") from error
    return Header(height, width, colorspace)


def check_markers(data: bytes) -> None:
    """Refuse what takes a few bytes in a file and much time to read.

    Each scan of a progressive JPEG is a walk over all of its blocks, and Pillow copies EXIF data at each segment of it.

    Raises:
        DecodeError: there are more than `MAX_SCANS` scans, or than `MAX_EXIF_SEGMENTS` segments of EXIF data.
    """
    place, scans, exif = 2, 0, 0
    while (found := _MARKER.search(data, place)) is not None:
        marker, place = found[0][1], found.end()
        if marker == _EOI:
            break
        scans += marker == _SOS
        exif += marker == _APP1 and data.startswith(b"Exif\0\0", place + 2)
        if scans > MAX_SCANS or exif > MAX_EXIF_SEGMENTS:
            what, limit = ("scans", MAX_SCANS) if scans > MAX_SCANS else ("EXIF segments", MAX_EXIF_SEGMENTS)
            raise DecodeError(f"the JPEG has more than {limit} {what}; save it anew")
        place += int.from_bytes(data[place : place + 2], "big")


def check(data: bytes, out: Pixels | None = None) -> bool:
    """Read every entropy-coded bit of a JPEG and say whether the picture is whole.

    out: gets the picture, as in `decode`. Without it the decode is at 1/8 of the size, which costs two thirds of a full
    one. Damage inside the entropy-coded bits that libjpeg can't notice (it resynchronises by luck, in about half of all
    cases) passes.

    Returns:
        False if libjpeg has a harmless remark about the header, such as bytes between two segments. simplejpeg refuses
        such a file even where it is not strict; OpenCV decodes it to the same pixels.

    Raises:
        DecodeError: the file is damaged or cut short.
    """
    import simplejpeg

    try:
        if out is None:
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
        else:
            simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError as error:
        if not _only_header_remarks(data, str(error)):
            raise DecodeError(f"JPEG: {error}") from error
    else:
        return True
    _check_length(data)
    return False


def _only_header_remarks(data: bytes, remark: str) -> bool:
    """Whether libjpeg's first remark is about the header: the same words about the entropy-coded bits mean damage."""
    import simplejpeg

    if "Invalid SOS parameters for sequential JPEG" in remark:
        return True
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return "extraneous bytes before marker" in remark
    return False


def _check_length(data: bytes) -> None:
    """Raise DecodeError if Pillow finds the file cut short: a strict decode stops at the first remark of libjpeg."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise DecodeError(f"JPEG: {error}") from error


def encode(pixels: Pixels, quality: int) -> bytes:
    """Encode uint8 RGB pixels (height, width, 3) as a baseline JPEG with 4:2:0 chroma.

    quality: 1 to 100.

    Raises:
        DecodeError: there are no JPEGs of that size.
    """
    import simplejpeg

    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}; it may be 1 to 100")
    if max(pixels.shape[:2]) > _LONGEST_SIDE:
        height, width = pixels.shape[:2]
        raise DecodeError(f"{width} x {height} pixels are too many for a JPEG, whose sides have up to {_LONGEST_SIDE}")
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return encoded
