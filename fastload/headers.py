"""A stranger's image file in Pillow's hands: what kind of file it is, and its header in bounded time.

Pillow's parsers are Python, and go on as long as a file does: a header of 20 MB of comments, a byte at a time, takes a
minute. Here they may read half a million times. `Image.open` is not used: it refuses images beyond a limit of its own,
which is the whole process's, and not ours to change.
"""

from __future__ import annotations

import io
import struct

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from . import jpeg
from .errors import DecodeError

_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    PpmImagePlugin.PpmImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    GifImagePlugin.GifImageFile,
)
FORMATS = tuple(plugin.format for plugin in _PLUGINS)
_MAX_READS = 1 << 19
_OWN_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_OTHERS = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypm", "HEIC, or a film"),
    (4, b"ftyp", "a film"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "a file of Photoshop's"),
    (0, b"\0\0\x01\0", "an icon"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "gzip"),
)
"""Where in a file of another format stands what, and its name."""


class _Reads(io.BytesIO):
    """The file, and how often it was read."""

    _count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._count += 1
        if self._count > _MAX_READS:
            raise DecodeError("it has too many small parts, or too long a header, to be an honest image; save it anew")
        return super().read(size)


def read(data: bytes) -> Image.Image:
    """An image whose header Pillow has read; to be closed. It raises whatever Pillow does, and DecodeError."""
    if data.startswith(b"\xff\xd8"):
        jpeg.check_markers(data)
    for name in FORMATS:
        read_header, accepts = Image.OPEN[name]
        try:
            if accepts is not None and accepts(data[:16]) is True:
                return read_header(_Reads(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            raise UnidentifiedImageError(f"its header makes no sense: {error}") from error
    raise UnidentifiedImageError("it begins as no image does")


def opened(data: bytes) -> Image.Image:
    """An image whose header Pillow has read; to be closed.

    Raises:
        DecodeError: it is none, of another format, or damaged.
    """
    try:
        return read(data)
    except UnidentifiedImageError as error:
        raise DecodeError(_what_else(data[:200])) from error
    except Exception as error:
        raise damaged(error) from error


def damaged(error: Exception) -> DecodeError:
    """What any error of Pillow's means. Its parsers raise whatever a damaged file makes them stumble over."""
    if isinstance(error, DecodeError):
        return error
    if isinstance(error, OSError | ValueError | SyntaxError) and str(error):
        return DecodeError(f"damaged: {error}")
    return DecodeError(f"damaged: its header makes no sense ({type(error).__name__}: {error})")


def _what_else(beginning: bytes) -> str:
    own = next((name for magic, name in _OWN_BEGINNINGS.items() if beginning.startswith(magic)), None)
    if own is not None:
        return f"it begins as a {own} does, but its header is damaged, cut short or of a kind that can't be read"
    other = next((name for at, magic, name in _OTHERS if beginning.startswith(magic, at)), None)
    text = beginning.lower()
    if b"<svg" in text:
        other = "SVG"
    elif b"<html" in text or b"<!doctype html" in text:
        other = "HTML, perhaps the error page of a download"
    formats = "JPEG, PNG, BMP, PPM, WebP, TIFF and GIF"
    if other is not None:
        return f"it is {other}, whatever its name says; packed are {formats}"
    return f"not an image, or none of {formats}"
