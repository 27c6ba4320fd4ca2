"""Odd and hostile files of every image format, made on the fly: what a folder from a stranger may hold.

Names say what is wrong. For the tests, and for `tools/strangers`, which damages them further.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

MAX_PIXELS = 1 << 26
"""The limit that all of them are packed under."""

_SIDE = 8192
"""A square of this side has as many pixels as the limit allows."""


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Some colours, in any of Pillow's modes."""
    random = np.random.default_rng(width * height)
    colours = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    return image.convert("L").convert(mode) if mode in ("F", "I") else image.convert(mode)


def saved(format: str, mode: str = "RGB", *, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A file that Pillow writes."""
    file = io.BytesIO()
    picture(*size, mode).save(file, format, **options)
    return file.getvalue()


# ---- JPEG


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG's segment."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def jpeg_markers(data: bytes) -> Iterator[int]:
    """The places of a JPEG's markers up to its first scan, and that of its end."""
    place = 2
    while data[place + 1] != 0xDA:
        yield place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    yield place
    yield len(data) - 2


def resized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header tells another size."""
    place = next(p for p in jpeg_markers(data) if data[p + 1] in (0xC0, 0xC2))
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def with_segments(data: bytes, segments: bytes) -> bytes:
    """A JPEG with more segments behind its first one."""
    place = 4 + int.from_bytes(data[4:6], "big")
    return data[:place] + segments + data[place:]


def progressive_bomb(width: int, height: int, scans: int, components: int = 3) -> bytes:
    """A progressive JPEG of one colour whose scans are a few bytes each, and each walk over all blocks.

    Each scan's codes are one symbol: EOB14 takes 32,767 blocks at a time, a DC of no difference is a bit for each.
    """
    tables = segment(0xDB, bytes([0]) + bytes([1]) * 64)
    frame = b"".join(bytes([number, 0x11, 0]) for number in range(1, components + 1))
    tables += segment(0xC2, struct.pack(">BHHB", 8, height, width, components) + frame)
    tables += segment(0xC4, bytes([0, 1, *bytes(15), 0])) + segment(0xC4, bytes([0x10, 1, *bytes(15), 0xE0]))
    blocks = -(-width // 8) * -(-height // 8)
    first = bytes([components]) + b"".join(bytes([number, 0]) for number in range(1, components + 1)) + b"\0\0\0"
    dc = bytes(-(-blocks * components // 8))
    runs = -(-blocks // 32767)
    bits = "011111111111111" * runs  # a code of one bit, and 14 that count
    eob = (
        int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big").replace(b"\xff", b"\xff\0")
    )
    body = []
    for number in range(scans):
        first_in_band = 1 + number // components % 63
        band = bytes([1, 1 + number % components, 0, first_in_band, first_in_band, 0])
        body.append(segment(0xDA, band) + eob)
    return b"\xff\xd8" + tables + segment(0xDA, first) + dc + b"".join(body) + b"\xff\xd9"


def jpegs() -> Iterator[tuple[str, bytes]]:
    """JPEGs."""
    data = saved("JPEG", quality=80)
    progressive = saved("JPEG", quality=80, progressive=True)
    yield "plain.jpg", data
    for mode in ("L", "CMYK"):
        yield f"{mode}.jpg", saved("JPEG", mode)
    yield "progressive.jpg", progressive
    yield "restarts.jpg", saved("JPEG", restart_marker_blocks=1)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield f"sampled {subsampling.replace(':', '')}.jpg", saved("JPEG", subsampling=subsampling)
    for name, whole in {"baseline": data, "progressive": progressive}.items():
        for place in sorted({*jpeg_markers(whole), 0, 1, 2, 3, len(whole) // 2, len(whole) - 1}):
            yield f"{name} cut at {place}.jpg", whole[:place]
            yield f"{name} cut at {place} and closed.jpg", whole[:place] + b"\xff\xd9"
        for width, height in ((65535, 65535), (65535, 1), (1, 65535), (0, 30), (40, 0), (8192, 8192), (8193, 8192)):
            yield f"{name} says {width} x {height}.jpg", resized_jpeg(whole, width, height)
        for place in jpeg_markers(whole):
            yield (
                f"{name} with a segment of no length at {place}.jpg",
                whole[: place + 2] + b"\0\0" + whole[place + 4 :],
            )
            yield (
                f"{name} with a segment of 65535 at {place}.jpg",
                whole[: place + 2] + b"\xff\xff" + whole[place + 4 :],
            )
    for scans in (99, 1000, 20000):
        yield f"{scans} scans.jpg", progressive_bomb(512, 512, scans)
    yield "2000 scans of 8192 x 8192.jpg", progressive_bomb(_SIDE, _SIDE, 2000)
    yield "100,000 segments.jpg", with_segments(data, segment(0xE5, b"") * 100_000)
    yield "100,000 comments.jpg", with_segments(data, segment(0xFE, b"\x1b[31m\n" * 9) * 100_000)
    yield "1000 EXIF segments.jpg", with_segments(data, segment(0xE1, b"Exif\0\0" + bytes(60000)) * 1000)
    yield "300 profiles.jpg", with_segments(data, segment(0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(60000)) * 300)
    yield "garbage profile.jpg", saved("JPEG", icc_profile=b"\xff" * 5000)
    yield "Photoshop.jpg", with_segments(data, segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\xff\xff\xff\xff" * 99))
    for what, exif in exifs():
        yield f"EXIF with {what}.jpg", with_segments(data, segment(0xE1, b"Exif\0\0" + exif))
    for interval in (1, 2, 65535):
        yield f"lying interval {interval}.jpg", with_segments(data, segment(0xDD, interval.to_bytes(2, "big")))
    place = list(jpeg_markers(data))[-2]
    yield "fill bytes.jpg", data[:place] + b"\xff" * 1_000_000 + data[place:]
    yield "garbage between segments.jpg", data[:place] + b"garbage" * 1000 + data[place:]
    yield "a megabyte behind its end.jpg", data + bytes(1 << 20)
    yield "two in one.jpg", data + data
    yield (
        "two frames.jpg",
        data[:place] + segment(0xC0, struct.pack(">BHHB", 8, 60000, 60000, 1) + b"\1\x11\0") + data[place:],
    )
    for marker in (0xC1, 0xC3, 0xC5, 0xC9, 0xCA, 0xF7):
        frame = next(p for p in jpeg_markers(data) if data[p + 1] == 0xC0)
        yield f"frame {marker:02X}.jpg", data[: frame + 1] + bytes([marker]) + data[frame + 2 :]
    file = io.BytesIO()
    picture().save(file, "MPO", save_all=True, append_images=[picture(20, 10)] * 3)
    yield "three pictures.mpo", file.getvalue()
    yield "three pictures, cut.mpo", file.getvalue()[:-900]
    mpf = file.getvalue().index(b"MPF\0")
    yield "lying MPF.mpo", file.getvalue()[: mpf + 12] + b"\xff" * 60 + file.getvalue()[mpf + 72 :]


def exifs() -> Iterator[tuple[str, bytes]]:
    """EXIF data that is no good."""
    for what, tags in tiff_tags_that_lie():
        yield what, ifd(tags)
    yield "nothing", b""
    yield "garbage", b"garbage" * 100
    yield "a loop", b"II*\0\x08\0\0\0" + struct.pack("<HHHLLL", 1, 0x8769, 4, 1, 8, 8)
    yield "orientation 99", ifd([(0x0112, 3, 1, struct.pack("<HH", 99, 0))])
    yield "orientation of text", ifd([(0x0112, 2, 4, b"six\0")])
    many = b"".join(struct.pack("<HHLL", number, 7, 60000, 8) for number in range(5000))
    yield "5000 tags of the same 60,000 bytes", b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + many


# ---- PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG's chunk."""
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    *chunks: bytes,
    bits: int = 8,
    colours: int = 2,
    interlaced: int = 0,
    rows: int | None = None,
) -> bytes:
    """A black PNG. chunks: between header and pixels. rows: of which there are pixels."""
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, colours, 0, 0, interlaced))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colours, 1)
    row = 1 + -(-width * bits * channels // 8)
    packer = zlib.compressobj(9)
    count = row * (height if rows is None else rows)
    pieces = [packer.compress(bytes(min(1 << 24, count - start))) for start in range(0, count, 1 << 24)]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"".join(pieces) + packer.flush()) + _IEND


_IEND = chunk(b"IEND", b"")


def bomb(megabytes: int) -> bytes:
    """Zeros, deflated."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def pngs() -> Iterator[tuple[str, bytes]]:
    """PNGs."""
    data = saved("PNG")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield f"{mode.replace(';', '')}.png", saved("PNG", mode)
    for bits, colours in itertools.product((1, 2, 4, 8, 16, 32), (0, 2, 3, 4, 6, 7)):
        yield f"{bits} bits, colours {colours}.png", png(9, 7, bits=bits, colours=colours)
    yield "interlaced.png", png(33, 65, interlaced=1, rows=200)
    yield "interlaced, 16 bits.png", png(33, 65, bits=16, colours=6, interlaced=1, rows=200)
    for width, height in (
        (60000, 60000),
        (1 << 31, 1),
        (1 << 32 - 1, 1 << 32 - 1),
        (0, 5),
        (30000, 30000),
        (8193, 8192),
    ):
        yield f"{width} x {height} and no pixels.png", png(width % (1 << 32), height % (1 << 32), rows=0)
    big = chunk(b"IHDR", struct.pack(">LLBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    yield "two headers, the second is large.png", png(40, 30, big)
    small = chunk(b"IHDR", struct.pack(">LLBBBBB", 40, 30, 8, 2, 0, 0, 0))
    yield "two headers, the first is large.png", png(30000, 30000, small, rows=3)
    yield "too many pixels.png", png(40, 30, rows=3_000_000)
    yield "too few pixels.png", png(40, 30, rows=10)
    deflated = bomb(100)
    yield "iCCP bomb.png", png(40, 30, chunk(b"iCCP", b"p\0\0" + deflated))
    yield "zTXt bomb.png", png(40, 30, chunk(b"zTXt", b"Comment\0\0" + deflated))
    yield "iTXt bomb.png", png(40, 30, chunk(b"iTXt", b"Comment\0\1\0\0\0" + deflated))
    yield "EXIF profile bomb.png", png(40, 30, chunk(b"zTXt", b"Raw profile type exif\0\0" + deflated))
    yield "1000 texts.png", png(40, 30, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 1000)
    yield "100,000 texts.png", png(40, 30, chunk(b"tEXt", b"a\0b") * 100_000)
    yield "64 MB of text.png", png(40, 30, chunk(b"tEXt", b"a\0" + bytes(64 << 20)))
    for what, exif in exifs():
        yield f"EXIF with {what}.png", png(40, 30, chunk(b"eXIf", exif))
    yield "bad CRC.png", data[:29] + b"\0\0\0\0" + data[33:]
    yield "bad CRC of the pixels.png", data[:-16] + b"\0\0\0\0" + data[-12:]
    yield "without an end.png", data[:-12]
    yield "a chunk of 4 GB.png", data[:33] + b"\xff\xff\xff\xff" + data[37:]
    yield "palette of nothing.png", png(9, 7, chunk(b"PLTE", b""), colours=3)
    yield "without pixels.png", data[:33] + _IEND
    for place in (8, 16, 33, 41, 60, len(data) // 2, len(data) - 5):
        yield f"cut at {place}.png", data[:place]
    control = chunk(b"acTL", struct.pack(">LL", 0xFFFFFFFF, 0))
    yield "4 billion frames.png", png(40, 30, control)
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (n % 256, n // 256, 0)) for n in range(3000)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    yield "3000 frames.png", file.getvalue()
    yield "lying frame.png", png(40, 30, chunk(b"acTL", struct.pack(">LL", 2, 0)), _frame(60000, 60000, 0, 0))
    yield "frame outside.png", png(40, 30, chunk(b"acTL", struct.pack(">LL", 1, 0)), _frame(40, 30, 1 << 30, 1 << 30))


def _frame(width: int, height: int, x: int, y: int) -> bytes:
    return chunk(b"fcTL", struct.pack(">LLLLLHHBB", 0, width, height, x, y, 1, 1, 0, 0))


# ---- GIF


def gif(width: int, height: int, frames: int = 1, size: tuple[int, int] = (40, 30)) -> bytes:
    """A GIF with a screen of its own size, and frames in its corner."""
    data = saved("GIF", "P", size=size)
    place = data.index(b",\0\0\0\0")
    return data[:6] + struct.pack("<HH", width, height) + data[10:place] + data[place:-1] * frames + b";"


def gifs() -> Iterator[tuple[str, bytes]]:
    """GIFs."""
    data = saved("GIF", "P")
    yield "plain.gif", data
    yield "20,000 frames.gif", gif(40, 30, 20_000)
    for width, height in ((65535, 65535), (1, 1), (0, 0), (65535, 1)):
        yield f"screen of {width} x {height}.gif", gif(width, height)
    yield (
        "frame of 65535 x 65535.gif",
        data[: data.index(b",") + 5] + b"\xff\xff\xff\xff" + data[data.index(b",") + 9 :],
    )
    yield "comment of 20 MB.gif", data[:-1] + b"!\xfe" + (b"\xff" + bytes(255)) * 80_000 + b"\0;"
    yield "comment before the frame.gif", gif_with(data, b"!\xfe" + (b"\xff" + bytes(255)) * 80_000 + b"\0")
    yield "extension without end.gif", gif_with(data, b"!\xff" + b"\x01\0" * 500_000)
    yield "20,000 extensions.gif", gif_with(data, b"!\xf9\x04\1\0\0\0\0" * 20_000)
    for place in (6, 10, 13, 300, data.index(b",") + 5, len(data) // 2, len(data) - 2):
        yield f"cut at {place}.gif", data[:place]
    at = data.index(b",") + 10
    for bits in (0, 1, 12, 13, 255):
        yield f"codes of {bits} bits.gif", data[:at] + bytes([bits]) + data[at + 1 :]


def gif_with(data: bytes, extension: bytes) -> bytes:
    """A GIF with an extension before its frame."""
    place = data.index(b",\0\0\0\0")
    return data[:place] + extension + data[place:]


# ---- BMP


def bmp(
    width: int,
    height: int,
    bits: int,
    pixels: bytes,
    *,
    compression: int = 0,
    colours: int = 0,
    offset: int | None = None,
) -> bytes:
    """A BMP of any kind."""
    palette = bytes(range(256)) * 4 if bits <= 8 else b""
    start = 14 + 40 + len(palette)
    header = struct.pack("<LllHHLLllLL", 40, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)
    head = struct.pack("<2sLHHL", b"BM", start + len(pixels), 0, 0, start if offset is None else offset)
    return head + header + palette + pixels


def bmps() -> Iterator[tuple[str, bytes]]:
    """BMPs."""
    data = saved("BMP")
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"{mode}.bmp", saved("BMP", mode)
    for bits in (0, 1, 2, 4, 8, 16, 24, 32, 64):
        row = -(-9 * bits // 32) * 4
        yield f"{bits} bits.bmp", bmp(9, 7, bits, bytes(row * 7))
        yield f"{bits} bits, upside down.bmp", bmp(9, -7, bits, bytes(row * 7))
        yield f"{bits} bits, too few pixels.bmp", bmp(900, 700, bits, bytes(10))
    for compression in (1, 2, 3, 4, 5, 6, 99):
        yield f"compression {compression}.bmp", bmp(9, 7, 8, bytes(99), compression=compression)
    for width, height in ((60000, 60000), (-40, 30), (0, 0), (2**31 - 1, 1), (1, -(2**31)), (8193, -8192)):
        yield f"{width} x {height}.bmp", bmp(width, height, 24, bytes(99))
    for offset in (0, 1, 53, 1 << 20, 0xFFFFFFFF):
        yield f"pixels at {offset}.bmp", bmp(9, 7, 24, bytes(28 * 7), offset=offset)
    yield "4 billion colours.bmp", bmp(9, 7, 8, bytes(12 * 7), colours=0xFFFFFFFF)
    for size in (0, 12, 16, 64, 108, 124, 0xFFFFFFFF):
        yield f"header of {size}.bmp", data[:14] + struct.pack("<L", size) + data[18:]
    for place in (2, 14, 20, 54, len(data) // 2):
        yield f"cut at {place}.bmp", data[:place]


# ---- TIFF

Tag = tuple[int, int, int, bytes]


def ifd(tags: list[Tag], following: int = 0, at: int = 8) -> bytes:
    """A TIFF of nothing but a directory at its begin. Tag: number, type, count, and 4 bytes."""
    entries = b"".join(struct.pack("<HHL", *tag[:3]) + tag[3] for tag in sorted(tags))
    return b"II*\0" + struct.pack("<LH", at, len(tags)) + entries + struct.pack("<L", following)


def long(number: int, value: int) -> Tag:
    """A tag of one number."""
    return number, 4, 1, struct.pack("<L", value)


def tiff(
    width: int, height: int, *more: Tag, pixels: bytes = b"", compression: int = 1, rows: int | None = None
) -> bytes:
    """An RGB TIFF of one strip. more: tags, also in place of the usual ones."""
    bits = (8, 8, 8)
    tags = {tag[0]: tag for tag in (
        long(256, width), long(257, height), (258, 3, 3, b""), long(259, compression), long(262, 2), long(273, 0),
        long(277, 3), long(278, height if rows is None else rows), long(279, len(pixels)), *more,
    )}  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    tags[258] = tags[258] if tags[258][3] else (258, 3, 3, struct.pack("<L", start))
    tags[273] = tags[273] if tags[273] != long(273, 0) else long(273, start + 6)
    return ifd([*tags.values()]) + struct.pack("<3H", *bits) + pixels


def tiff_tags_that_lie() -> Iterator[tuple[str, list[Tag]]]:
    """Directories that claim more than there is."""
    yield "a tag of 4 billion", [(0x0112, 3, 0xFFFFFFFF, struct.pack("<L", 8))]
    yield "a tag far away", [(0x010E, 2, 100, struct.pack("<L", 0xFFFFFFF0))]
    yield "a tag of type 99", [(0x0112, 99, 1, b"\1\0\0\0")]
    yield "a rational by zero", [(0x011A, 5, 1, struct.pack("<L", 0))]
    yield "a sub-directory that is itself", [(0x8769, 4, 1, struct.pack("<L", 8))]


def big_tiff(width: int, height: int) -> bytes:
    """A BigTIFF, uncompressed."""
    tags = {
        256: width,
        257: height,
        258: 8,
        259: 1,
        262: 1,
        273: 0,
        277: 1,
        278: height,
        279: min(width * height, 1 << 62),
    }
    tags[273] = 16 + 8 + 20 * len(tags) + 8
    entries = b"".join(struct.pack("<HHQQ", number, 16, 1, value) for number, value in tags.items())
    pixels = bytes(min(width * height, 1 << 20))
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(tags)) + entries + bytes(8) + pixels


def tiffs() -> Iterator[tuple[str, bytes]]:
    """TIFFs."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"):
        yield f"{mode.replace(';', '')}.tif", saved("TIFF", mode)
    for compression in (
        "packbits",
        "tiff_lzw",
        "tiff_adobe_deflate",
        "jpeg",
        "group3",
        "group4",
        "lzma",
        "zstd",
        "webp",
    ):
        mode = "1" if compression.startswith("group") else "RGB"
        try:
            data = saved("TIFF", mode, compression=compression)
        except (OSError, ValueError):
            continue
        yield f"{compression}.tif", data
        yield f"{compression}, cut.tif", data[: len(data) * 2 // 3]
        yield f"{compression}, damaged.tif", data[:200] + bytes(50) + data[250:]
        for number, value in ((256, 60000), (257, 60000), (278, 0), (278, 1), (258, 0xFFFF), (277, 0xFFFF), (277, 1)):
            yield f"{compression}, {number} is {value}.tif", patched_tiff(data, number, value)
    yield from hostile_tiffs()


def hostile_tiffs() -> Iterator[tuple[str, bytes]]:
    """TIFFs whose tags are made up."""
    yield "plain of our own.tif", tiff(9, 7, pixels=bytes(9 * 7 * 3))
    yield "deflate bomb for few pixels.tif", tiff(9, 7, pixels=bomb(100), compression=8)
    yield "too large.tif", tiff(60000, 60000, pixels=bomb(1), compression=8)
    for compression in (1, 5, 7, 8, 32773, 34676, 65000):
        yield f"strips without bytes, compression {compression}.tif", tiff(_SIDE, _SIDE, compression=compression)
    for rows in (0, 1, 0xFFFFFFFF):
        yield f"rows in a strip {rows}.tif", tiff(900, 700, pixels=bytes(9 * 7 * 3), rows=rows)
    yield "strip of 4 GB.tif", tiff(9, 7, long(279, 0xFFFFFFFF), pixels=bytes(9 * 7 * 3))
    yield "strip far away.tif", tiff(9, 7, long(273, 0xFFFFFF00), pixels=bytes(9 * 7 * 3))
    for side in (16, 17, 65536, 1 << 20, 0xFFFFFFF0):
        tiles = (long(322, side), long(323, side), long(324, 200), long(325, 100))
        for compression in (1, 8):
            yield (
                f"tile of {side}, compression {compression}.tif",
                tiff(9, 7, *tiles, pixels=bomb(1), compression=compression),
            )
    for samples in (0, 2, 5, 100, 65535):
        yield f"{samples} samples.tif", tiff(9, 7, long(277, samples), pixels=bytes(9 * 7 * 3))
    yield "planar.tif", tiff(9, 7, long(284, 2), pixels=bytes(9 * 7 * 3))
    for bits in (0, 1, 7, 12, 16, 32, 64, 65535):
        value = (258, 3, 1, struct.pack("<HH", bits, 0))
        yield f"{bits} bits.tif", tiff(9, 7, value, long(277, 1), long(262, 1), pixels=bytes(9 * 7 * 8))
    for photometric in (0, 3, 4, 5, 6, 8, 10, 32803, 32844, 65535):
        yield f"photometric {photometric}.tif", tiff(9, 7, long(262, photometric), pixels=bytes(9 * 7 * 4))
    small = tiff(9, 7, pixels=bytes(9 * 7 * 3))
    yield "directory that follows itself.tif", small[: 10 + 12 * 9] + struct.pack("<L", 8) + small[14 + 12 * 9 :]
    empty = b"".join(struct.pack("<HL", 0, 8 + 6 * (n + 1)) for n in range(100_000))
    yield "100,000 empty directories.tif", b"II*\0\x08\0\0\0" + empty
    pages = io.BytesIO()
    picture(4, 4).save(pages, "TIFF", save_all=True, append_images=[picture(4, 4)] * 2000)
    yield "2000 pages.tif", pages.getvalue()
    for what, tags in tiff_tags_that_lie():
        yield f"{what}.tif", tiff(9, 7, *tags, pixels=bytes(9 * 7 * 3))
    many = [(number, 7, 10_000_000, struct.pack("<L", 8)) for number in range(40_000, 46_000)]
    yield "6000 tags of the same 10 MB.tif", tiff(9, 7, *many, pixels=bytes(10_000_000))
    yield "4 million strips.tif", tiff(9, 7, (273, 4, 1 << 22, struct.pack("<L", 200)), pixels=bytes(17 << 20))
    yield "60,000 strips of 4 MB.tif", tiff(
        1, 60_000, (273, 4, 60_000, struct.pack("<L", 200)), (279, 4, 60_000, struct.pack("<L", 250_000)), rows=1,
        pixels=struct.pack("<L", 300) * 60_000 + struct.pack("<L", 4 << 20) * 70_000 + bytes(5 << 20), compression=8,
    )  # fmt: skip
    deep = saved("TIFF", "I;16")
    yield "16 bits, wide.tif", patched_tiff(deep, 256, 30000)
    yield "two widths, the second is small.tif", deep_with_two_widths(30000, 9)
    yield "two widths, the first is small.tif", deep_with_two_widths(9, 30000)
    yield "big.tif", big_tiff(40, 30)
    yield "big, too large.tif", big_tiff(1 << 40, 1 << 40)
    yield "big, 30000 x 30000.tif", big_tiff(30000, 30000)
    for cut in (4, 10, 50, len(small) - 30):
        yield f"cut at {cut}.tif", small[:cut]
    yield "directory beyond the end.tif", b"II*\0\xff\xff\xff\xff"
    yield "big endian garbage.tif", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 5000


def patched_tiff(data: bytes, number: int, value: int) -> bytes:
    """A little-endian TIFF with another number in a tag of its first directory."""
    place = int.from_bytes(data[4:8], "little")
    for entry in range(int.from_bytes(data[place : place + 2], "little")):
        at = place + 2 + 12 * entry
        if int.from_bytes(data[at : at + 2], "little") == number:
            return data[: at + 2] + struct.pack("<HLL", 4, 1, value) + data[at + 12 :]
    return data


def deep_with_two_widths(first: int, second: int) -> bytes:
    """A grey TIFF of 16 bits that says its width twice."""
    tags = [long(256, first), long(256, second), long(257, 30000), long(258, 16), long(259, 1), long(262, 1)]
    tags += [long(273, 200), long(277, 1), long(278, 30000), long(279, 1000)]
    return ifd(tags) + bytes(2000)


# ---- WebP


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A RIFF file of chunks."""
    body = b"".join(kind + struct.pack("<L", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<L", 4 + len(body)) + b"WEBP" + body


def webps() -> Iterator[tuple[str, bytes]]:
    """WebPs."""
    lossy, lossless = saved("WEBP"), saved("WEBP", "RGBA", lossless=True)
    yield "lossy.webp", lossy
    yield "lossless.webp", lossless
    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE)).save(file, "WEBP", lossless=True, method=0)
    body = file.getvalue()[20:]
    size = struct.unpack_from("<L", body, 1)[0]
    large = body[:1] + struct.pack("<L", (size & ~0xFFFFFFF) | 16383 | 16383 << 14) + body[5:]
    yield "16384 x 16384.webp", webp((b"VP8L", large))
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (n % 256, n // 256, 0)) for n in range(2000)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True, method=0)
    yield "2000 frames.webp", file.getvalue()
    for width, height in ((1 << 24, 255), (65535, 65535), (_SIDE, _SIDE), (1 << 24, 1 << 24)):
        head = b"\x12\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        animation = file.getvalue()[30:]
        yield f"canvas of {width} x {height}.webp", webp((b"VP8X", head)) + animation
        yield (
            f"canvas of {width} x {height} and a picture.webp",
            webp((b"VP8X", b"\0" + head[1:]), (b"VP8 ", lossy[20:])),
        )
    for what, exif in exifs():
        head = b"\x08\0\0\0" + (39).to_bytes(3, "little") + (29).to_bytes(3, "little")
        yield f"EXIF with {what}.webp", webp((b"VP8X", head), (b"VP8 ", lossy[20:]), (b"EXIF", exif))
    yield "chunk of 4 GB.webp", lossy[:16] + b"\xff\xff\xff\xff" + lossy[20:]
    yield "RIFF of 4 GB.webp", lossy[:4] + b"\xff\xff\xff\xff" + lossy[8:]
    for place in (8, 12, 20, 30, len(lossy) // 2, len(lossy) - 1):
        yield f"cut at {place}.webp", lossy[:place]
        yield f"lossless cut at {place}.webp", lossless[:place]
    yield "sound.webp", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)


# ---- PPM, and what is none of them


def ppms() -> Iterator[tuple[str, bytes]]:
    """PBM, PGM, PPM, PNM and PFM."""
    pixels = bytes(range(60))
    for kind, mode in itertools.product(b"123456", (b"1", b"255", b"256", b"65535", b"65536", b"0", b"-1", b"1e3")):
        digits = pixels * 2 if kind > ord("3") else b" ".join(b"%d" % (n % 2) for n in range(60))
        yield f"P{kind - 48}, {mode.decode()}.ppm", b"P%c\n5 4\n%s\n%s" % (kind, mode, digits)
    for size in (b"60000 60000", b"0 0", b"-5 4", b"5", b"99999999999999999999 1", b"8192 8192", b"4#\n2 3 8", b"5 #4"):
        for kind in (b"P3", b"P5", b"P6"):
            yield (
                f"{kind.decode()} of {size.decode()!r}.ppm".replace("\\", ""),
                kind + b"\n" + size + b"\n255\n" + pixels,
            )
    yield "20 million digits.ppm", b"P3\n5 4\n255\n" + b"1" * 20_000_000
    yield "a width of 20 million digits.ppm", b"P6\n" + b"1" * 20_000_000
    yield "20 million blanks.ppm", b"P3\n5 4\n255\n" + b" " * 20_000_000
    yield "20 million blanks in its header.ppm", b"P6\n" + b" " * 20_000_000
    yield "comment of 20 MB.ppm", b"P6\n#" + b"c" * 20_000_000 + b"\n5 4\n255\n" + bytes(60)
    yield "comment of 20 MB among the pixels.ppm", b"P3\n5 4\n255\n#" + b"c" * 20_000_000
    yield "a million comments.ppm", b"P6\n" + b"#\n" * 1_000_000 + b"5 4\n255\n" + bytes(60)
    yield "ascii of 8192 x 8192.pgm", b"P2\n8192 8192\n255\n" + b"1 " * 1000
    yield "ascii bits.pbm", b"P1\n8192 8192\n" + b"1" * 5_000_000
    yield "float.pfm", b"PF\n5 4\n-1.0\n" + bytes(240)
    yield "any.pam", b"P7\nWIDTH 5\nHEIGHT 4\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + pixels


OTHERS: dict[str, tuple[bytes, str]] = {
    "web page.jpg": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "HTML"),
    "web page in capitals.jpg": (b"\n <HTML><body>404</body></html>", "HTML"),
    "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
    "drawing without a declaration.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
    "archive.png": (b"PK\3\4" + bytes(100), "ZIP"),
    "document.jpg": (b"%PDF-1.7\n" + bytes(100), "PDF"),
    "layers.psd": (b"8BPS\0\1" + bytes(100), "Photoshop"),
    "icon.ico": (b"\0\0\1\0\1\0\x10\x10" + bytes(100), "icon"),
    "codestream.j2k": (b"\xff\x4f\xff\x51" + bytes(100), "JPEG 2000"),
    "boxed.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "JPEG 2000"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIC"),
    "web.avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100), "AVIF"),
    "film.jpg": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(100), "film"),
    "XL.jxl": (b"\xff\x0a" + bytes(100), "JPEG XL"),
    "boxed XL.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL"),
    "squeezed.jpg": (b"\x1f\x8b\x08\0" + bytes(100), "gzip"),
    "words.jpg": (b"this is no image at all\n" * 9, "not an image"),
    "zeros.jpg": (bytes(100_000), "not an image"),
    "one byte.png": (b"\x89", "not an image"),
    "empty.jpg": (b"", "empty"),
}
"""What is no image, or of a format that is not packed, and a word of the reason."""


def large() -> Iterator[tuple[str, bytes]]:
    """Small files of as many pixels as the limit allows, which have to be decoded."""
    yield "99 scans.jpg", progressive_bomb(_SIDE, _SIDE, 98)
    yield "one component.jpg", progressive_bomb(60000, 1000, 9, 1)
    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (9, 99, 199)).save(file, "JPEG")
    yield "baseline.jpg", file.getvalue()
    yield "square.png", png(_SIDE, _SIDE)
    yield "interlaced.png", png(_SIDE, _SIDE, interlaced=1, rows=2 * _SIDE)
    yield "one row.png", png(MAX_PIXELS, 1)
    yield "one column.png", png(1, MAX_PIXELS, colours=0)
    yield "screen.gif", gif(_SIDE, _SIDE)
    yield "runs.bmp", bmp(_SIDE, _SIDE, 8, b"\xff\0" * 300_000 + b"\0\1", compression=1)
    yield "short runs.bmp", bmp(_SIDE, _SIDE, 8, b"\x01\0" * 9_000_000, compression=1)
    yield "jumps.bmp", bmp(_SIDE, _SIDE, 8, b"\0\2\xff\xff" * 1_000_000 + b"\0\1", compression=1)
    yield "ends of lines.bmp", bmp(_SIDE, _SIDE, 4, b"\0\0" * 1_000_000, compression=2)
    yield "deflated.tif", tiff(_SIDE, _SIDE, pixels=bomb(192), compression=8)
    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE)).save(file, "WEBP", lossless=True, method=0)
    yield "lossless.webp", file.getvalue()


def files() -> Iterator[tuple[str, bytes]]:
    """All but the large ones: name and contents."""
    yield from jpegs()
    yield from pngs()
    yield from gifs()
    yield from bmps()
    yield from tiffs()
    yield from webps()
    yield from ppms()
    yield from ((name, data) for name, (data, _) in OTHERS.items())
