"""Packing real files of every format and condition: pixels, bytes, tiles, options, quarantine, interruption."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import FrozenInstanceError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from mounts import small_disk
from PIL import Image, ImageOps, PngImagePlugin

import fastload
from fastload import ImageDataset, PackReport, Store, decode, geometry, pack, record, recut, tiles
from fastload.errors import PackError, SourceError
from fastload.recut import Recut

Pixels = npt.NDArray[np.uint8]
Picture = Callable[..., Pixels]

POSIX = os.name == "posix"
posix_only = pytest.mark.skipif(not POSIX, reason="POSIX only")
CLEAN = multiprocessing.get_context("forkserver" if POSIX else "spawn")
ORIENTATION = 0x0112

if POSIX:
    multiprocessing.set_forkserver_preload(["fastload", "hypothesis", "pytest", "cv2"])


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth colours with some detail, so that JPEG is close and mistakes of a pixel show."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()


def saved(image: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg(image: Image.Image | Pixels, orientation: int | None = None, **options: Any) -> bytes:
    if orientation is not None:
        options["exif"] = exif(orientation)
    return saved(image, "JPEG", **{"quality": 92, **options})


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def shown(data: bytes, upright: bool = True) -> Pixels:
    """What Pillow shows of a file's bytes, in RGB, turned upright."""
    with Image.open(io.BytesIO(data)) as image:
        turned = ImageOps.exif_transpose(image) if upright else None
        return np.asarray((turned or image).convert("RGB"))


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def packed(tmp_path: Path, files: dict[str, bytes], **options: Any) -> Store:
    """The store of these files, packed as a flat folder or as class folders."""
    folder_of(tmp_path / "images", files)
    pack(tmp_path / "images", tmp_path / "db.lmdb", workers=2, **options)
    return Store(tmp_path / "db.lmdb")


def read(store: Store, index: int = 0) -> Pixels:
    """The upright picture, height x width x 3."""
    return ImageDataset(store.path).read(index).permute(1, 2, 0).numpy()


def reasons(store: Store) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in store.quarantine()}


def outcomes(store: Store) -> dict[str, str]:
    """What became of each image, in words, by its name."""
    texts = store.manifest["tiles"]
    return {store.name(i): texts[outcome] for i, outcome in enumerate(np.asarray(store.columns["tiles"]).tolist())}


def contents(store: Store) -> dict[str, Any]:
    return {
        "manifest": store.manifest,
        "records": [bytes(store.view(i)) for i in range(len(store))],
        "columns": {name: np.asarray(column).tolist() for name, column in store.columns.items()},
        "quarantine": store.quarantine(),
    }


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=CLEAN) as pool:
        return pool.submit(function, *arguments).result(60)


# ---- formats


def subsampled(sampling: str, height: int = 45, width: int = 61) -> bytes:
    return simplejpeg.encode_jpeg(picture(height, width), 90, "RGB", sampling)  # type: ignore[no-any-return]


def sixteen_bits() -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow does not write."""
    ok, data = cv2.imencode(".png", np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16))
    assert ok
    return data.tobytes()


def animated(format: str, **options: Any) -> bytes:
    first, *rest = (Image.fromarray(picture(32, 40, seed)) for seed in range(3))
    return saved(first, format, save_all=True, append_images=rest, duration=50, **options)


def palette_with_transparency() -> bytes:
    image = Image.fromarray(picture(24, 30)).quantize(16)
    return saved(image, "PNG", transparency=3)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(picture(24, 30)).convert(mode)
    image.putalpha(Image.fromarray(np.arange(720, dtype=np.uint8).reshape(24, 30)))
    return image


RGB = picture(45, 61)
GREY = Image.fromarray(RGB).convert("L")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def interlaced() -> bytes:
    """An Adam7 PNG, which Pillow reads but does not write."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [row for x, y, dx, dy in passes for row in RGB[y::dy, x::dx] if row.size]
    header = struct.pack(">IIBBBBB", RGB.shape[1], RGB.shape[0], 8, 2, 0, 0, 1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def with_gamma(gamma: int) -> bytes:
    data = saved(RGB, "PNG")
    return data[:33] + chunk(b"gAMA", struct.pack(">I", gamma)) + data[33:]


def exif_at_the_end() -> bytes:
    """A PNG whose eXIf chunk comes after the pixels, as the format allows."""
    data = saved(picture(20, 33), "PNG")
    return data[:-12] + chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")) + data[-12:]


def exif_of_imagemagick() -> bytes:
    """ImageMagick keeps EXIF in a text chunk, in hexadecimal digits."""
    tags = exif(6).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(tags):8d}\n{tags.hex()}\n")
    return saved(picture(20, 33), "PNG", pnginfo=text)


LOSSLESS: dict[str, Callable[[], bytes]] = {
    "jpeg.jpg": lambda: jpeg(RGB),
    "jpeg_grey.jpg": lambda: jpeg(GREY),
    "jpeg_progressive.jpg": lambda: jpeg(RGB, progressive=True),
    "jpeg_progressive_grey.jpg": lambda: jpeg(GREY, progressive=True),
    "jpeg_optimised.jpg": lambda: jpeg(RGB, optimize=True, quality=30),
    "jpeg_restarts.jpg": lambda: jpeg(RGB, restart_marker_rows=1),
    "jpeg_444.jpg": lambda: subsampled("444"),
    "jpeg_422.jpg": lambda: subsampled("422"),
    "jpeg_420.jpg": lambda: subsampled("420"),
    "jpeg_440.jpg": lambda: subsampled("440"),
    "jpeg_411.jpg": lambda: subsampled("411"),
    "jpeg_rgb.jpg": lambda: jpeg(RGB, keep_rgb=True),
    "jpeg_1x1.jpg": lambda: jpeg(RGB[:1, :1]),
    "jpeg_long.jpg": lambda: jpeg(np.repeat(RGB[:3, :1], 3000, 1)),
    "jpeg_without_suffix": lambda: jpeg(RGB),
    "jpeg_named.png": lambda: jpeg(RGB),
    **{f"jpeg_exif{i}.jpg": lambda i=i: jpeg(picture(30 + i, 50), i) for i in range(1, 9)},
    "jpeg_exif0.jpg": lambda: jpeg(RGB, 0),
    "jpeg_exif9.jpg": lambda: jpeg(RGB, 9),
    "jpeg_exif6_grey.jpg": lambda: jpeg(GREY, 6),
    "jpeg_comment_and_profile.jpg": lambda: jpeg(RGB, comment=b"hello", icc_profile=bytes(500)),
    "jpeg_of_several.jpg": lambda: animated("MPO"),
    "png.png": lambda: saved(RGB, "PNG"),
    "png_grey.png": lambda: saved(GREY, "PNG"),
    "png_1bit.png": lambda: saved(GREY.convert("1"), "PNG"),
    "png_palette.png": lambda: saved(Image.fromarray(RGB).quantize(32), "PNG"),
    "png_palette_4bit.png": lambda: saved(Image.fromarray(RGB).quantize(16), "PNG", bits=4),
    "png_palette_transparent.png": palette_with_transparency,
    "png_rgba.png": lambda: saved(with_alpha("RGB"), "PNG"),
    "png_la.png": lambda: saved(with_alpha("L"), "PNG"),
    "png_16bit_rgb.png": sixteen_bits,
    "png_interlaced.png": interlaced,
    "png_exif6.png": lambda: saved(picture(20, 33), "PNG", exif=exif(6)),
    "png_exif6_at_its_end.png": exif_at_the_end,
    "png_exif6_of_imagemagick.png": exif_of_imagemagick,
    "png_animated.png": lambda: animated("PNG"),
    "png_2bit.png": lambda: saved(Image.fromarray(RGB).quantize(4), "PNG", bits=2),
    "png_transparent_colour.png": lambda: saved(RGB, "PNG", transparency=(1, 2, 3)),
    "png_gamma.png": lambda: with_gamma(45455),
    "bmp.bmp": lambda: saved(RGB, "BMP"),
    "bmp_grey.bmp": lambda: saved(GREY, "BMP"),
    "bmp_palette.bmp": lambda: saved(Image.fromarray(RGB).quantize(64), "BMP"),
    "bmp_1bit.bmp": lambda: saved(GREY.convert("1"), "BMP"),
    "bmp_rgba.bmp": lambda: saved(with_alpha("RGB"), "BMP"),
    "webp_lossless.webp": lambda: saved(RGB, "WEBP", lossless=True),
    "webp_lossy.webp": lambda: saved(RGB, "WEBP", quality=80),
    "webp_alpha.webp": lambda: saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True),
    "webp_exif8.webp": lambda: saved(picture(20, 33), "WEBP", lossless=True, exif=exif(8)),
    "webp_animated.webp": lambda: animated("WEBP", lossless=True),
    "tiff.tiff": lambda: saved(RGB, "TIFF"),
    "tiff_grey.tif": lambda: saved(GREY, "TIFF"),
    "tiff_lzw.tif": lambda: saved(RGB, "TIFF", compression="tiff_lzw"),
    "tiff_deflate.tif": lambda: saved(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff_palette.tif": lambda: saved(Image.fromarray(RGB).quantize(64), "TIFF"),
    "tiff_1bit.tif": lambda: saved(GREY.convert("1"), "TIFF"),
    "tiff_pages.tif": lambda: animated("TIFF"),
    "tiff_rgba.tif": lambda: saved(with_alpha("RGB"), "TIFF"),
    "tiff_la.tif": lambda: saved(with_alpha("L"), "TIFF"),
    "tiff_jpeg.tif": lambda: saved(RGB, "TIFF", compression="jpeg"),
    "tiff_packbits.tif": lambda: saved(RGB, "TIFF", compression="packbits"),
    "tiff_group4.tif": lambda: saved(GREY.convert("1"), "TIFF", compression="group4"),
    **{f"tiff_exif{i}.tif": lambda i=i: saved(picture(30 + i, 50), "TIFF", exif=exif(i)) for i in range(1, 9)},
    "gif.gif": lambda: saved(RGB, "GIF"),
    "gif_animated.gif": lambda: animated("GIF"),
    "ppm.ppm": lambda: saved(RGB, "PPM"),
    "pgm.pgm": lambda: saved(GREY, "PPM"),
    "pbm.pbm": lambda: saved(GREY.convert("1"), "PPM"),
    "ppm_text.ppm": lambda: b"P3\n2 1\n255\n1 2 3 4 5 6\n",
}  # fmt: skip
CLOSE: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: jpeg(Image.fromarray(RGB).convert("CMYK")),
    "cmyk_progressive.jpg": lambda: jpeg(Image.fromarray(RGB).convert("CMYK"), progressive=True),
    "cmyk_exif6.jpg": lambda: jpeg(Image.fromarray(picture(31, 50)).convert("CMYK"), 6),
}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, bytes]]:
    """One flat store of every format, bytes kept."""
    files = {name: make() for name, make in {**LOSSLESS, **CLOSE}.items()}
    return packed(tmp_path_factory.mktemp("gallery"), files, tiles=False), files


@pytest.mark.parametrize("name", [*LOSSLESS, *CLOSE])
def test_every_format_shows_pillows_pixels(gallery: tuple[Store, dict[str, bytes]], name: str) -> None:
    """Upright and in RGB: to the bit, or within 2 levels where CMYK has to be converted."""
    store, files = gallery
    assert name not in reasons(store)
    index = [store[i].name for i in range(len(store))].index(name)
    pixels, expected = read(store, index), shown(files[name])
    assert pixels.shape == expected.shape
    assert tuple(store.columns["size"][index]) == expected.shape[:2]
    assert np.abs(pixels.astype(int) - expected).max() <= (2 if name in CLOSE else 0)


@pytest.mark.parametrize("name", [*LOSSLESS, *CLOSE])
def test_the_bytes_of_a_file_are_kept(gallery: tuple[Store, dict[str, bytes]], name: str) -> None:
    """Without tiles: byte for byte, with their length and checksum in the columns, and no word of us encoding them."""
    store, files = gallery
    assert name not in reasons(store)
    index = [store[i].name for i in range(len(store))].index(name)
    field = store[index]["image"]
    assert field.payload == files[name]
    assert store.columns["bytes"][index] == len(files[name])
    assert store.columns["checksum"][index] == record.checksum(files[name])
    assert not field.flags & record.REENCODED
    plain_jpeg = files[name].startswith(b"\xff\xd8") and name not in CLOSE
    assert field.codec == (record.JPEG if plain_jpeg else record.ENCODED)


def test_images_of_16_bit_grey_keep_their_upper_8_bits_with_depth_8(tmp_path: Path) -> None:
    """Pillow has no one way to show them; the upper half of each value is what OpenCV and libpng give."""
    values = np.random.default_rng(1).integers(0, 1 << 16, (20, 30), dtype=np.uint16)
    store = packed(
        tmp_path,
        {"16.png": saved(Image.fromarray(values), "PNG"), "16.tif": saved(Image.fromarray(values), "TIFF")},
        depth=8,
    )
    assert len(store) == 2
    for index in range(2):
        np.testing.assert_array_equal(read(store, index), np.repeat((values >> 8)[..., None], 3, 2).astype(np.uint8))


def test_a_transparent_gif_shows_its_opaque_pixels(tmp_path: Path) -> None:
    """What is seen is Pillow's; a pixel that nobody sees may have any colour."""
    data = saved(Image.fromarray(picture(24, 30)).quantize(16), "GIF", transparency=3)
    with Image.open(io.BytesIO(data)) as image:
        opaque = np.asarray(image.convert("RGBA"))[..., 3] > 0
    assert 0 < opaque.sum() < opaque.size
    np.testing.assert_array_equal(read(packed(tmp_path, {"a.gif": data}))[opaque], shown(data)[opaque])


def test_exif_can_be_ignored(tmp_path: Path) -> None:
    """exif="ignore": pictures as they lie in the file, for JPEG, PNG and shrunk ones, whatever their tag says."""
    files = {"a.jpg": jpeg(picture(30, 50), 6), "b.png": saved(picture(30, 50), "PNG", exif=exif(3))}
    store = packed(tmp_path, files, exif="ignore")
    for index, data in enumerate(files.values()):
        np.testing.assert_array_equal(read(store, index), shown(data, upright=False))
        assert store[index]["image"].orientation == 1
    pack(tmp_path / "images", tmp_path / "small.lmdb", exif="ignore", short_side=15)
    assert [tuple(size) for size in np.asarray(Store(tmp_path / "small.lmdb").columns["size"])] == [(15, 25)] * 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_image_whose_exif_is_garbage_is_shown_as_it_lies(tmp_path: Path, format: str) -> None:
    """A picture is not lost for its metadata."""
    data = saved(RGB, format, exif=b"Exif\0\0garbage", lossless=True, quality=90)
    store = packed(tmp_path, {"a": data})
    np.testing.assert_array_equal(read(store), shown(data, upright=False))


# ---- tiles


LARGE = picture(130, 163)
LARGE_GREY = Image.fromarray(LARGE).convert("L")


def large_of_several() -> bytes:
    first, second = (Image.fromarray(picture(130, 163, seed)) for seed in range(2))
    return saved(first, "MPO", save_all=True, append_images=[second], quality=92)


TILED: dict[str, Callable[[], bytes]] = {
    **{f"{sampling}.jpg": lambda sampling=sampling: subsampled(sampling, 130, 163)
       for sampling in ("444", "422", "420", "440", "411")},
    "grey.jpg": lambda: jpeg(LARGE_GREY),
    "progressive.jpg": lambda: jpeg(LARGE, progressive=True),
    "progressive_grey.jpg": lambda: jpeg(LARGE_GREY, progressive=True),
    "optimised.jpg": lambda: jpeg(LARGE, optimize=True, quality=30),
    "restarts.jpg": lambda: jpeg(LARGE, restart_marker_blocks=7),
    "rgb.jpg": lambda: jpeg(LARGE, keep_rgb=True),
    "named.png": lambda: jpeg(LARGE),
    **{f"exif{i}.jpg": lambda i=i: jpeg(LARGE, i) for i in range(1, 9)},
    "profile_and_comment.jpg": lambda: jpeg(LARGE, 6, comment=b"hello", icc_profile=bytes(range(250))),
    "of_several.jpg": large_of_several,
    "trailing.jpg": lambda: jpeg(LARGE) + b"trailing bytes",
    "large.jpg": lambda: jpeg(picture(700, 900), subsampling=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, bytes]]:
    """One flat store of JPEGs that are large enough for tiles."""
    files = {name: make() for name, make in TILED.items()}
    return packed(tmp_path_factory.mktemp("tiled"), files), files


@pytest.mark.parametrize("name", TILED)
def test_jpegs_are_recut_and_show_the_same_pixels(tiled: tuple[Store, dict[str, bytes]], name: str) -> None:
    """To us, to Pillow, and crop by crop; length and checksum in the columns are those of what is stored."""
    store, files = tiled
    assert outcomes(store)[name] == "re-cut"
    index = [store.name(i) for i in range(len(store))].index(name)
    field = store[index]["image"]
    assert (field.codec, field.flags) == (record.JPEG, 0)
    assert field.tiles
    np.testing.assert_array_equal(read(store, index), shown(files[name]))
    np.testing.assert_array_equal(shown(bytes(field.payload)), shown(files[name]))
    assert decode.tiles_show(field, shown(files[name], upright=False))
    assert store.columns["bytes"][index] == len(field.payload)
    assert store.columns["checksum"][index] == record.checksum(field.payload)


def metadata(data: bytes | memoryview) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return {"exif": dict(image.getexif()), **{name: image.info.get(name) for name in ("icc_profile", "comment")}}


def test_recut_jpegs_keep_their_metadata(tiled: tuple[Store, dict[str, bytes]]) -> None:
    """EXIF, profile and comment are those of the file; what follows a picture in its file is dropped."""
    store, files = tiled
    names = {store.name(i): i for i in range(len(store))}
    for name in ("profile_and_comment.jpg", "exif6.jpg", "444.jpg"):
        assert metadata(store[names[name]]["image"].payload) == metadata(files[name])
    for name, dropped in {"trailing.jpg": b"trailing bytes", "of_several.jpg": b"MPF\0"}.items():
        assert dropped in files[name]
        assert dropped not in bytes(store[names[name]]["image"].payload)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_strip_drops_everything_but_the_orientation(tmp_path: Path, exif: Any) -> None:
    """The picture is the same; an orientation that is ignored is no part of it. An image without tiles keeps all."""
    tags = {"exif": exif_with_a_name(6), "comment": b"hello", "icc_profile": bytes(500)}
    files = {"large.jpg": jpeg(LARGE, **tags), "small.jpg": jpeg(RGB, **tags)}
    store = packed(tmp_path, files, strip=True, exif=exif)
    payload = store[0]["image"].payload
    kept = {ORIENTATION: 6} if exif == "apply" else {}
    assert metadata(payload) == {"exif": kept, "icc_profile": None, "comment": None}
    np.testing.assert_array_equal(read(store, 0), shown(files["large.jpg"], upright=exif == "apply"))
    np.testing.assert_array_equal(shown(bytes(payload)), shown(files["large.jpg"], upright=exif == "apply"))
    pack(tmp_path / "images", tmp_path / "unstripped.lmdb", exif=exif)
    assert len(payload) < len(Store(tmp_path / "unstripped.lmdb")[0]["image"].payload) - 500
    assert store[1]["image"].payload == files["small.jpg"]


def exif_with_a_name(orientation: int) -> Image.Exif:
    tags = exif(orientation)
    tags[0x010F] = "a camera's maker"
    return tags


def arithmetic() -> bytes:
    """A grey 96 x 128 JPEG with arithmetic coding, as jpegtran makes them; Pillow and simplejpeg write none."""
    return base64.b85decode(
        "|JeWF01!$>Nk#wx0RR9200961|JwjV02>k%7Zed27Zw*D92+1gLMtdGB`8rkJupIGRb^yfRb5+Zc$tA}agcLcU4^xVke;Kft*d8%yve$z$C;"
        "?Br2okP3kU#U0Du7j5di<p00saM5C#9*00;pA002J#{{UtG0KHG>w#cyCTC%QY!HrIo6!zXT$~S~VZA>Myx&z9sdP`7Mht7k-N>4X{NrHY{)"
        "i358_~~xaEthanF{|ohhg_s+H06^ZrElQ-&^VBxUAXyNY0;{52H|>cs}O!}lk@I+1QhA!u+x!qFQP`q<Rwu5*#"
    )


def with_a_segment_for_arithmetic_coding() -> bytes:
    data = jpeg(LARGE)
    place = data.index(b"\xff\xda")
    return data[:place] + b"\xff\xcc\x00\x04\x00\x10" + data[place:]


UNTOUCHED: dict[str, tuple[Callable[[], bytes], int]] = {
    "png.png": (lambda: saved(LARGE, "PNG"), tiles.NO_JPEG),
    "cmyk.jpg": (lambda: jpeg(Image.fromarray(LARGE).convert("CMYK")), tiles.NO_JPEG),
    "remark.jpg": (lambda: jpeg(LARGE)[:20] + b"\0\0\0" + jpeg(LARGE)[20:], tiles.NO_JPEG),
    "small.jpg": (lambda: jpeg(picture(95, 96)), tiles.SMALL),
    "dot.jpg": (lambda: jpeg(RGB[:1, :1]), tiles.SMALL),
    "arithmetic.jpg": (arithmetic, tiles.CODING),
    "unexpected.jpg": (with_a_segment_for_arithmetic_coding, tiles.SEGMENTS),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, bytes]]:
    """One flat store of what can't be re-cut, and one file that can."""
    files = {name: make() for name, (make, _) in UNTOUCHED.items()} | {"tiled.jpg": jpeg(picture(96, 96))}
    return packed(tmp_path_factory.mktemp("untouched"), files), files


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_can_not_be_recut_is_packed_untouched(untouched: tuple[Store, dict[str, bytes]], name: str) -> None:
    """Byte for byte, without an index; the column tells the reason."""
    store, files = untouched
    index = [store.name(i) for i in range(len(store))].index(name)
    assert store.columns["tiles"][index] == UNTOUCHED[name][1]
    assert (store[index]["image"].payload, store[index]["image"].tiles) == (files[name], b"")
    difference = np.abs(read(store, index).astype(int) - shown(files[name]))
    assert difference.max() <= (2 if name == "cmyk.jpg" else 0)
    assert outcomes(store)["tiled.jpg"] == "re-cut"


def test_no_tiles_keeps_the_bytes_of_jpegs(tmp_path: Path) -> None:
    """The outcome of each JPEG says that it was asked for."""
    files = {"a.jpg": jpeg(LARGE, 6, progressive=True), "b.png": saved(LARGE, "PNG"), "c.jpg": jpeg(RGB)}
    store = packed(tmp_path, files, tiles=False)
    assert [store[i]["image"].payload for i in range(3)] == list(files.values())
    assert np.asarray(store.columns["tiles"]).tolist() == [tiles.OFF, tiles.NO_JPEG, tiles.OFF]


def test_raw_images_have_no_tiles(tmp_path: Path) -> None:
    """In a column, the default options included."""
    store = packed(tmp_path, {"a.jpg": jpeg(LARGE), "b.jpg": jpeg(LARGE)}, encode="raw")
    assert np.asarray(store.columns["tiles"]).tolist() == [tiles.NO_JPEG] * 2


@pytest.mark.parametrize("options", [{"short_side": 120}, {"quality": 60}, {"encode": "jpeg"}, {"max_side": 130}])
def test_images_that_are_encoded_anew_have_tiles_too(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever they were; the pixels are those that they have without tiles."""
    files = {"a.jpg": jpeg(picture(200, 300), 6), "b.png": saved(picture(200, 300), "PNG")}
    files["c.jpg"] = jpeg(Image.fromarray(LARGE).convert("CMYK"))
    store = packed(tmp_path, files, **options)
    pack(tmp_path / "images", tmp_path / "plain.lmdb", tiles=False, **options)
    plain = Store(tmp_path / "plain.lmdb")
    again = [plain[i]["image"].payload != data for i, data in enumerate(files.values())]
    assert again == {"encode": [False, True, True]}.get(next(iter(options)), [True] * 3)
    for index in range(3):
        assert outcomes(store)[store.name(index)] == "re-cut"
        assert store[index]["image"].flags == (record.REENCODED if again[index] else 0)
        np.testing.assert_array_equal(read(store, index), read(plain, index))


def with_other_lead_ins(index: bytes, nbytes: int, size: tuple[int, int]) -> bytes:
    """A tile index in which two lead-ins of one length have changed places."""
    _, mcu_width, mcu_height, _, step, _, _, scan = struct.unpack_from("<BBBBHHII", index)
    rows, in_row = -(-size[0] // mcu_height), -(-size[1] // (mcu_width * step))
    _, heads, start = tiles._layout(index, nbytes, scan, rows, in_row)
    ends = start + np.cumsum(heads & 31, dtype=np.int64)
    places: dict[int, slice] = {}
    for head, end in zip(heads.tolist(), ends.tolist(), strict=True):
        here = slice(end - (head & 31), end)
        there = places.setdefault(head, here)
        if index[there] != index[here]:
            changed = bytearray(index)
            changed[there], changed[here] = index[here], index[there]
            return bytes(changed)
    raise AssertionError("no two lead-ins are of one length")


def another_picture(cut: Recut, right: Callable[..., Recut]) -> Recut:
    return right(jpeg(picture(200, 300, seed=1)))


def one_coefficient_off(cut: Recut, right: Callable[..., Recut]) -> Recut:
    pixels = picture(200, 300)
    pixels[100, 150] += 60
    return right(jpeg(pixels))


def swapped_lead_ins(cut: Recut, right: Callable[..., Recut]) -> Recut:
    return cut._replace(tiles=with_other_lead_ins(cut.tiles, len(cut.data), (200, 300)))


def wrong_header(cut: Recut, right: Callable[..., Recut]) -> Recut:
    return cut._replace(data=cut.data[:-2])


def index_of_another_picture(cut: Recut, right: Callable[..., Recut]) -> Recut:
    return cut._replace(tiles=right(jpeg(picture(200, 300, seed=1))).tiles)


@pytest.mark.parametrize(
    "wrong", [another_picture, one_coefficient_off, swapped_lead_ins, wrong_header, index_of_another_picture]
)
def test_a_recut_that_would_show_other_pixels_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Recut, Callable[..., Recut]], Recut]
) -> None:
    """Whole or in a tile: the file's own bytes are stored, and the column says why."""
    right, data = recut.recut, jpeg(picture(200, 300))
    monkeypatch.setattr(recut, "recut", lambda data, **options: wrong(right(data, **options), right))
    store = packed(tmp_path, {"a.jpg": data})
    assert outcomes(store) == {"a.jpg": "its pixels would differ"}
    assert (store[0]["image"].payload, store[0]["image"].tiles) == (data, b"")
    np.testing.assert_array_equal(read(store), shown(data))


def test_an_image_with_one_column_of_tiles_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no columns to compare one by one: the whole image has to be the same."""
    right, other = recut.recut, jpeg(picture(300, 60, seed=1))
    monkeypatch.setattr(recut, "recut", lambda data, **options: right(other))
    store = packed(tmp_path, {"a.jpg": jpeg(picture(300, 60))})
    assert outcomes(store) == {"a.jpg": "its pixels would differ"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in which every third image has tiles, among small ones, PNGs and damaged files."""
    files = {}
    for i in range(24):
        size = (100 + 8 * i, 140) if i % 3 == 0 else (40, 50)
        data = saved(picture(*size, seed=i), "PNG") if i % 3 == 1 else jpeg(picture(*size, seed=i), progressive=i % 2)
        files[f"c{i % 2}/{i:02}"] = data[:300] if i in (5, 12) else data
    return folder_of(tmp_path_factory.mktemp("mixed") / "images", files)


def test_a_resumed_pack_tells_the_same_outcomes(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at five places one after the other: each image is with its own outcome, and nothing else differs."""
    from fastload import store_writer

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pack(mixed, tmp_path / "whole.lmdb")
    monkeypatch.setattr(store_writer, "_STEP_BYTES", 1)
    starts: list[int] = []
    for item in (3, 8, 9, 15, 22):
        first: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            pack(
                mixed, tmp_path / "db.lmdb", progress=lambda n, _, f=first, i=item: f.append(n) or interrupting(i)(n, 0)
            )
        starts.append(first[0])
    assert starts == sorted(starts)
    assert starts[-1] > 1
    pack(mixed, tmp_path / "db.lmdb")
    whole = Store(tmp_path / "whole.lmdb")
    assert contents(Store(tmp_path / "db.lmdb")) == contents(whole)
    small, recut, none = (tiles.OUTCOMES[i] for i in (tiles.SMALL, tiles.RECUT, tiles.NO_JPEG))
    expected = {f"c{i % 2}/{i:02}": (recut, none, small)[i % 3] for i in range(24) if i not in (5, 12)}
    assert outcomes(whole) == expected


def test_stores_with_tiles_are_reproducible(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of workers one and the same file, byte for byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for workers in (1, 2, 7):
        pack(mixed, tmp_path / f"{workers}.lmdb", workers=workers)
    assert len({(tmp_path / f"{workers}.lmdb").read_bytes() for workers in (1, 2, 7)}) == 1


# ---- options


def encoded(pixels: Pixels, quality: int) -> bytes:
    """What libjpeg-turbo makes of these pixels at the packer's settings."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return data


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"short_side": 40}, [(40, 66), (40, 40), (30, 20), (60, 40)]),
        ({"max_side": 50}, [(30, 50), (50, 50), (30, 20), (50, 33)]),
        ({"short_side": 40, "max_side": 50}, [(30, 50), (40, 40), (30, 20), (50, 33)]),
        ({"short_side": 1}, [(1, 1), (1, 1), (1, 1), (1, 1)]),
        ({"short_side": 100}, [(60, 100), (70, 70), (30, 20), (90, 60)]),
    ],
)
def test_large_images_are_shrunk_and_small_ones_are_kept(
    tmp_path: Path, options: dict[str, int], sizes: list[tuple[int, int]]
) -> None:
    """By the shorter side, the longer one, or both; upright sizes count; what is small enough keeps its bytes."""
    originals = [(60, 100), (70, 70), (30, 20), (90, 60)]
    files = {f"{i}.jpg": jpeg(picture(*size, seed=i), quality=95) for i, size in enumerate(originals)}
    files["3.jpg"] = jpeg(np.rot90(picture(90, 60, seed=3)), 6, quality=95)
    store = packed(tmp_path, files, tiles=False, **options)
    assert [tuple(size) for size in np.asarray(store.columns["size"]).tolist()] == sizes
    for index, (data, size) in enumerate(zip(files.values(), sizes, strict=True)):
        field = store[index]["image"]
        if size == originals[index]:
            assert field.payload == data
            continue
        assert (field.codec, field.orientation, field.flags) == (record.JPEG, 1, record.REENCODED)
        reference = Image.fromarray(shown(data)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        expected = shown(encoded(np.asarray(reference), 95))
        assert np.abs(read(store, index).astype(int) - expected).mean() < 1.5


def test_the_short_side_rule_is_that_of_resize(tmp_path: Path) -> None:
    """A store packed at the size that training resizes to needs no resize: the same rule, to the pixel."""
    files = {f"{w}.png": saved(picture(64, w), "PNG") for w in (65, 77, 90, 101, 200)}
    store = packed(tmp_path, files, short_side=48)
    sizes = {store[i].name: tuple(store.columns["size"][i].tolist()) for i in range(len(store))}
    assert sizes == {f"{w}.png": geometry.short_side_size((64, w), 48) for w in (65, 77, 90, 101, 200)}


def test_a_quality_encodes_everything(tmp_path: Path) -> None:
    """Every image becomes a JPEG of that quality, upright, and lower qualities are smaller."""
    files = {"a.jpg": jpeg(picture(60, 80), 3, quality=100), "b.png": saved(picture(60, 80), "PNG")}
    sizes = []
    for quality in (95, 40):
        store = packed(tmp_path, files, quality=quality, tiles=False, overwrite=True)
        for index, data in enumerate(files.values()):
            field = store[index]["image"]
            assert (field.codec, field.orientation, field.flags) == (record.JPEG, 1, record.REENCODED)
            assert field.payload == encoded(shown(data), quality)
            np.testing.assert_array_equal(read(store, index), shown(field.payload))
        sizes.append(int(np.asarray(store.columns["bytes"]).sum()))
    assert sizes[1] < sizes[0] / 2


def test_encode_jpeg_leaves_jpegs_alone(tmp_path: Path) -> None:
    """encode="jpeg" encodes PNG and CMYK at quality 95; RGB and grey JPEGs keep their bytes and orientation."""
    files = {
        "a.jpg": jpeg(picture(40, 60), 6),
        "b.png": saved(picture(40, 60), "PNG"),
        "c.jpg": jpeg(Image.fromarray(picture(40, 60)).convert("CMYK")),
    }
    store = packed(tmp_path, files, encode="jpeg", tiles=False)
    assert store[0]["image"].payload == files["a.jpg"]
    assert [store[i]["image"].codec for i in range(3)] == [record.JPEG] * 3
    assert [store[i]["image"].flags for i in range(3)] == [0, record.REENCODED, record.REENCODED]
    assert store[1]["image"].payload == encoded(picture(40, 60), 95)
    difference = shown(store[2]["image"].payload).astype(int) - shown(encoded(shown(files["c.jpg"]), 95))
    assert np.abs(difference).mean() < 1.5


def test_raw_images_of_one_size_are_a_column(tmp_path: Path) -> None:
    """encode="raw": exact upright pixels, one row for each sample, nothing but names in the records."""
    files = {f"c{i % 2}/{i}.jpg": jpeg(picture(20, 12, seed=i), 6 if i % 3 else 8) for i in range(7)}
    files |= {"c0/7.png": saved(picture(12, 20, seed=7), "PNG")}
    store = packed(tmp_path, files, encode="raw")
    names = [store[i].name for i in range(len(store))]
    expected = np.stack([shown(files[name]) for name in names])
    column = store.columns["image"]
    assert (column.shape, column.dtype) == ((12, 20, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(column), expected)
    np.testing.assert_array_equal(np.stack([read(store, i) for i in range(len(store))]), expected)
    assert all(list(store[i].fields) == ["name"] for i in range(len(store)))
    assert np.asarray(store.columns["bytes"]).tolist() == [720] * 8
    assert [record.checksum(image.tobytes()) for image in expected] == np.asarray(store.columns["checksum"]).tolist()
    images, labels = ImageDataset(store.path).__getitems__([5, 0, 5]).images, np.asarray(store.columns["label"])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected[[5, 0, 5]])
    assert labels.tolist() == [int(name[1]) for name in names]


def test_raw_images_of_several_sizes_are_records(tmp_path: Path) -> None:
    """They are exact too, one raw field each, and there is no column of images."""
    files = {"a.png": saved(picture(12, 20), "PNG"), "b.jpg": jpeg(picture(12, 21), 7)}
    store = packed(tmp_path, files, encode="raw")
    assert "image" not in store.columns
    for index, data in enumerate(files.values()):
        assert (store[index]["image"].codec, store[index]["image"].orientation) == (record.RAW, 1)
        np.testing.assert_array_equal(read(store, index), shown(data))


def test_raw_images_shrunk_to_one_size_are_a_column(tmp_path: Path) -> None:
    """What counts is the size that images are stored with."""
    files = {
        "a.png": saved(picture(64, 64), "PNG"),
        "b.jpg": jpeg(picture(96, 96)),
        "c.png": saved(picture(32, 32), "PNG"),
    }
    store = packed(tmp_path, files, encode="raw", short_side=32)
    assert store.columns["image"].shape == (32, 32, 3)
    reference = np.asarray(Image.fromarray(picture(64, 64)).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(read(store, 0).astype(int) - reference).max() <= 1
    np.testing.assert_array_equal(read(store, 2), picture(32, 32))


def test_a_damaged_image_does_not_keep_raw_ones_from_being_a_column(tmp_path: Path) -> None:
    """What can't be read has no say in the common size; what lies in its header is not written to the column."""
    files = {f"{i}.png": saved(picture(16, 16, seed=i), "PNG") for i in range(3)}
    files |= {"3.png": files["0.png"][:-30], "4.txt": b"text", "5.png": saved(picture(16, 16, seed=5), "PNG")}
    store = packed(tmp_path, files, encode="raw")
    assert set(reasons(store)) == {"3.png", "4.txt"}
    np.testing.assert_array_equal(np.asarray(store.columns["image"])[-1], picture(16, 16, seed=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "short_side is 0; it must be at least 1"),
        ({"max_side": -5}, "max_side is -5; it must be at least 1"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be at least 1"),
        ({"quality": 0}, "quality is 0; it may be 1 to 100"),
        ({"quality": 101}, "quality is 101; it may be 1 to 100"),
        ({"encode": "webp"}, "encode is 'webp', .* encode may be keep, jpeg, raw"),
        ({"exif": "maybe"}, "exif is 'maybe'; .* exif apply or ignore"),
        ({"encode": "raw", "quality": 90}, "a quality goes with JPEG; raw images are kept exactly"),
        ({"tiles": False, "strip": True}, "strip goes with tiles: images that are not re-cut keep all of their bytes"),
        ({"workers": 0}, "workers is 0; packing takes at least 1 thread"),
    ],
)
def test_options_that_make_no_sense_are_value_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before anything is read or written, with the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "missing", tmp_path / "db.lmdb", **options)
    assert list(tmp_path.iterdir()) == []


def test_options_are_in_the_manifest(tmp_path: Path) -> None:
    """What a store was made from and how, for whoever finds it."""
    store = packed(tmp_path, {"ant/1.jpg": jpeg(RGB)}, short_side=32, quality=80)
    options = store.manifest["options"]
    assert (options["short_side"], options["quality"], options["encode"], options["exif"]) == (32, 80, "keep", "apply")
    assert (options["tiles"], options["strip"]) == (True, False)
    assert store.manifest["tiles"] == list(tiles.OUTCOMES)
    assert store.manifest["source"] == "folders"
    assert store.manifest["fastload"]
    assert [field["name"] for field in store.manifest["fields"]] == ["image", "name"]


# ---- labels and names


def test_classes_and_labels_of_folders(tmp_path: Path) -> None:
    """Index order is class, then path; empty classes keep their place; names are relative paths."""
    files = {"bee/1.jpg": jpeg(RGB), "ant/z.jpg": jpeg(RGB), "ant/deep/1.jpg": jpeg(RGB)}
    (tmp_path / "images" / "cat").mkdir(parents=True)
    store = packed(tmp_path, files)
    assert store.classes == ["ant", "bee", "cat"]
    assert [store[i].name for i in range(3)] == ["ant/z.jpg", "ant/deep/1.jpg", "bee/1.jpg"]
    assert np.asarray(store.columns["label"]).tolist() == [0, 0, 1]


def test_a_flat_folder_has_labels_of_minus_one(tmp_path: Path) -> None:
    """No classes, and a label that says so."""
    store = packed(tmp_path, {"1.jpg": jpeg(RGB), "2.jpg": jpeg(RGB)})
    assert (store.classes, np.asarray(store.columns["label"]).tolist()) == (None, [-1, -1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_laid_on_a_background(tmp_path: Path, mode: str) -> None:
    """Blended as Pillow does, on the colour asked for; others stay as they are; by default alpha is dropped."""
    if mode == "P":
        image = Image.fromarray(np.arange(720, dtype=np.uint8).reshape(24, 30) % 7, "P")
        image.putpalette([10, 200, 30] * 7)
        image.info["transparency"] = 3
    else:
        image = with_alpha("RGB" if mode == "RGBA" else "L")
    folder_of(tmp_path / "in", {"a.png": saved(image, "PNG"), "b.jpg": jpeg(RGB)})
    pack(tmp_path / "in", tmp_path / "white.lmdb", background=(255, 255, 250))
    below = Image.new("RGBA", image.size, (255, 255, 250))
    expected = np.asarray(Image.alpha_composite(below, image.convert("RGBA")).convert("RGB"))
    pictures = fastload.ImageDataset(tmp_path / "white.lmdb", image_type="numpy")
    assert np.array_equal(pictures[0][0], expected)
    pack(tmp_path / "in", tmp_path / "plain.lmdb")
    plain = fastload.ImageDataset(tmp_path / "plain.lmdb", image_type="numpy")
    assert not np.array_equal(plain[0][0], expected)
    assert np.array_equal(plain[1][0], pictures[1][0])
    with pytest.raises(ValueError, match="background is"):
        pack(tmp_path / "in", tmp_path / "x.lmdb", background=(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_but_a_store_is_ever_replaced(tmp_path: Path, overwrite: bool) -> None:
    """Not a file that was named by mistake, nor a device."""
    folder_of(tmp_path / "in", {"a.jpg": jpeg(RGB)})
    (tmp_path / "list.csv").write_text("precious")
    for destination in (tmp_path / "list.csv", Path(os.devnull)):
        if destination.exists():
            with pytest.raises(FileExistsError, match="is no store; choose another name"):
                pack(tmp_path / "in", destination, overwrite=overwrite)
    assert (tmp_path / "list.csv").read_text() == "precious"


def test_a_list_with_several_labels(tmp_path: Path) -> None:
    """Lines in their order, ragged labels padded, a root elsewhere, missing files in the quarantine."""
    folder_of(tmp_path / "pool", {"a.jpg": jpeg(RGB), "b.jpg": jpeg(GREY)})
    (tmp_path / "pool" / "c.jpg").write_bytes(jpeg(RGB))
    (tmp_path / "list.txt").write_text("b.jpg 5 6 7\nnone.jpg 1\na.jpg 2\nc.jpg 9\n")
    report = pack(tmp_path / "list.txt", tmp_path / "db.lmdb", root=tmp_path / "pool")
    store = Store(tmp_path / "db.lmdb")
    assert np.asarray(store.columns["label"]).tolist() == [[5, 6, 7], [2, -1, -1], [9, -1, -1]]
    assert [store[i].name for i in range(3)] == ["b.jpg", "a.jpg", "c.jpg"]
    assert "no such file" in reasons(store)["none.jpg"]
    assert (report.samples, report.quarantined, report.classes) == (3, 1, 5)


def test_a_list_of_class_names(tmp_path: Path) -> None:
    """Words become classes."""
    folder_of(tmp_path, {"a.jpg": jpeg(RGB), "b.jpg": jpeg(RGB)})
    (tmp_path / "list.csv").write_text("a.jpg,polar bear\nb.jpg,ant\n")
    pack(tmp_path / "list.csv", tmp_path / "db.lmdb")
    store = Store(tmp_path / "db.lmdb")
    assert (store.classes, np.asarray(store.columns["label"]).tolist()) == (["ant", "polar bear"], [1, 0])


@posix_only
def test_names_of_any_kind_come_back(tmp_path: Path) -> None:
    """Spaces, newlines, other scripts and, on Linux, bytes that are no UTF-8, in classes and files."""
    names = ["a b/c\nd.jpg", "ü/日本.jpg"]
    store_names = sorted(names)
    folder_of(tmp_path / "images", {name: jpeg(RGB) for name in names})
    if sys.platform == "linux":
        os.mkdir(os.fsencode(tmp_path / "images") + b"/\xe9")
        Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xe9/\xff.jpg")).write_bytes(jpeg(RGB))
        store_names.append(os.fsdecode(b"\xe9/\xff.jpg"))
    pack(tmp_path / "images", tmp_path / "db.lmdb")
    store = Store(tmp_path / "db.lmdb")
    assert [store[i].name for i in range(len(store))] == store_names
    assert store.classes == [name.split("/")[0] for name in store_names]


# ---- what is left out


def claims_to_be_huge() -> bytes:
    """A whole little PNG whose header says 30000 x 30000."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def jpeg_that_claims_to_be_huge() -> bytes:
    data = bytearray(jpeg(RGB))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30000, 30000)
    return bytes(data)


def noise(length: int, start: bytes = b"") -> bytes:
    return start + np.random.default_rng(7).bytes(length)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


NO_IMAGE = "not an image, or none of JPEG, PNG, BMP, PPM, WebP, TIFF and GIF"
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", r"the file is empty \(0 bytes\)"),
    "text.jpg": (lambda: b"this is no image\n", NO_IMAGE),
    "html.jpg": (lambda: b"<!DOCTYPE html><html>404</html>", "it is HTML, .*"),
    "noise.jpg": (lambda: noise(5000), NO_IMAGE),
    "icon.ico": (lambda: saved(RGB, "ICO"), "it is an icon, .*"),  # for Pillow it is one
    "one_byte.jpg": (lambda: b"\xff", NO_IMAGE),
    "half.jpg": (lambda: half(jpeg(RGB)), "JPEG: .*"),
    "half_progressive.jpg": (lambda: half(jpeg(RGB, progressive=True)), "JPEG: .*"),
    "half_cmyk.jpg": (lambda: half(jpeg(Image.fromarray(RGB).convert("CMYK"))), ".*"),
    "header_only.jpg": (lambda: jpeg(RGB)[:200], ".*"),
    "noise_after_header.jpg": (lambda: jpeg(RGB)[:640] + noise(3000), "JPEG: .*"),
    "half.png": (lambda: half(saved(RGB, "PNG")), ".*"),
    "flipped.png": (lambda: flipped(saved(RGB, "PNG"), 0.5), ".*"),
    "half.webp": (lambda: half(saved(RGB, "WEBP")), ".*"),
    "half.bmp": (lambda: half(saved(RGB, "BMP")), ".*"),
    "half.tif": (lambda: half(saved(RGB, "TIFF", compression="tiff_lzw")), ".*"),
    "half.gif": (lambda: half(saved(RGB, "GIF")), ".*"),
    "huge.png": (claims_to_be_huge, "30000 x 30000 pixels are more than the limit of 268435456; --max-pixels .*"),
    "huge.jpg": (jpeg_that_claims_to_be_huge, "30000 x 30000 pixels are more than the limit of 268435456; .*"),
}  # fmt: skip


def flipped(data: bytes, where: float) -> bytes:
    place = int(len(data) * where)
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


@pytest.fixture(scope="module")
def infirmary(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store packed from every kind of damage, between two good images."""
    files = {name: make() for name, (make, _) in BAD.items()}
    return packed(tmp_path_factory.mktemp("bad"), {"a.jpg": jpeg(RGB), **files, "z.jpg": jpeg(RGB)})


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_image_is_left_out_by_name(infirmary: Store, name: str) -> None:
    """With its reason, while the good images are packed."""
    assert re.fullmatch(BAD[name][1], reasons(infirmary)[name])
    assert len(reasons(infirmary)[name]) < 300
    assert [infirmary[i].name for i in range(len(infirmary))] == ["a.jpg", "z.jpg"]


def test_damage_is_left_out_whatever_is_made_of_the_images(tmp_path: Path) -> None:
    """Raw, re-encoded and shrunk stores leave out the same files."""
    files = {name: make() for name, (make, _) in BAD.items()} | {"a.jpg": jpeg(RGB)}
    for number, options in enumerate(({"encode": "raw"}, {"quality": 50}, {"short_side": 16}, {"encode": "jpeg"})):
        folder_of(tmp_path / "images", files)
        pack(tmp_path / "images", tmp_path / f"{number}.lmdb", **options)  # type: ignore[arg-type]
        store = Store(tmp_path / f"{number}.lmdb")
        assert [store[i].name for i in range(len(store))] == ["a.jpg"]
        assert set(reasons(store)) == set(BAD)


@posix_only
def test_a_named_pipe_and_links_to_nowhere_are_left_out(tmp_path: Path) -> None:
    """Nothing waits for a writer that never comes; devices, sockets and dangling links have their reasons."""
    folder_of(tmp_path / "images", {"ant/a.jpg": jpeg(RGB)})
    os.mkfifo(tmp_path / "images" / "ant" / "pipe.jpg")
    (tmp_path / "images" / "ant" / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "images" / "ant" / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "images" / "ant" / "loop.jpg").symlink_to("loop.jpg")
    for encode in ("keep", "raw"):
        report = pack(tmp_path / "images", tmp_path / "db.lmdb", encode=encode, overwrite=True)
        assert (report.samples, report.quarantined) == (1, 4)
        found = reasons(Store(tmp_path / "db.lmdb"))
        assert found["ant/pipe.jpg"] == found["ant/null.jpg"] == "it is no regular file"
        assert found["ant/dangling.jpg"] == "it can't be read: No such file or directory"
        assert found["ant/loop.jpg"].startswith("it can't be read: ")


@posix_only
@pytest.mark.skipif(POSIX and os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    """With the system's reason."""
    folder_of(tmp_path / "images", {"a.jpg": jpeg(RGB), "b.jpg": jpeg(RGB)})
    (tmp_path / "images" / "b.jpg").chmod(0)
    pack(tmp_path / "images", tmp_path / "db.lmdb")
    assert reasons(Store(tmp_path / "db.lmdb")) == {"b.jpg": "it can't be read: Permission denied"}


def test_the_limit_of_pixels_is_ours_and_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to leave large images out; Pillow's own limit, error and warning don't count, and stay as they were."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    files = {"small.png": saved(picture(10, 10), "PNG"), "large.png": saved(picture(10, 11), "PNG")}
    store = packed(tmp_path, files, max_pixels=100)
    assert reasons(store) == {"large.png": "11 x 10 pixels are more than the limit of 100; --max-pixels raises it"}
    assert Image.MAX_IMAGE_PIXELS == 20


def test_a_file_that_changes_while_it_is_packed_is_left_out_of_a_column(tmp_path: Path) -> None:
    """All headers had one size when they were looked at; the one that has another now has no place in the column."""
    files = {f"{i:02}.png": saved(picture(16, 16, seed=i), "PNG") for i in range(20)}
    images = folder_of(tmp_path / "images", files)

    def change(done: int, total: int) -> None:
        if done == 1:
            (images / "19.png").write_bytes(saved(picture(16, 17), "PNG"))

    pack(images, tmp_path / "db.lmdb", encode="raw", workers=1, progress=change)
    store = Store(tmp_path / "db.lmdb")
    assert (len(store), store.columns["image"].shape) == (19, (16, 16, 3))
    assert "16 x 17" in reasons(store)["19.png"]


def test_a_file_with_a_harmless_remark_is_packed_and_read(tmp_path: Path) -> None:
    """Bytes between two segments, or behind the end: libjpeg warns, every viewer shows it, and so do we."""
    data = jpeg(RGB)
    odd = data[:20] + b"\0\0\0" + data[20:]  # behind the JFIF segment
    store = packed(tmp_path, {"odd.jpg": odd, "trailing.jpg": data + b"trailing bytes"})
    assert [store[i].name for i in range(len(store))] == ["odd.jpg", "trailing.jpg"]
    assert [store[i]["image"].codec for i in range(2)] == [record.ENCODED, record.JPEG]
    for index in range(2):
        np.testing.assert_array_equal(read(store, index), shown(data))


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    """The first file and its reason are in the message, and nothing is left behind."""
    folder_of(tmp_path / "images", {"ant/1.jpg": b"text", "ant/2.jpg": b""})
    for encode in ("keep", "raw"):
        with pytest.raises(
            SourceError, match=r"none of the 2 files could be packed; the first is 'ant/1\.jpg': not an"
        ):
            pack(tmp_path / "images", tmp_path / "db.lmdb", encode=encode)
        assert os.listdir(tmp_path) == ["images"]


# ---- the destination


def test_an_existing_store_is_replaced_only_on_request(tmp_path: Path) -> None:
    """Without overwrite nothing is touched; with it the old store is there until the new one is complete."""
    store = packed(tmp_path, {"1.jpg": jpeg(RGB)})
    before = Path(store.path).read_bytes()
    folder_of(tmp_path / "images", {"2.jpg": jpeg(RGB)})
    with pytest.raises(FileExistsError, match=r"db\.lmdb exists already; choose another name, or .*--overwrite"):
        pack(tmp_path / "images", tmp_path / "db.lmdb")
    assert Path(store.path).read_bytes() == before

    def check(done: int, total: int) -> None:
        assert Path(store.path).read_bytes() == before

    pack(tmp_path / "images", tmp_path / "db.lmdb", overwrite=True, progress=check)
    assert len(Store(tmp_path / "db.lmdb")) == 2
    assert len(store) == 1
    assert store[0].name == "1.jpg"


def test_a_failed_pack_leaves_the_old_store(tmp_path: Path) -> None:
    """Overwriting with nothing but damage keeps what was there."""
    packed(tmp_path, {"1.jpg": jpeg(RGB)})
    folder_of(tmp_path / "bad", {"ant/1.jpg": b"text"})
    with pytest.raises(SourceError):
        pack(tmp_path / "bad", tmp_path / "db.lmdb", overwrite=True)
    assert Store(tmp_path / "db.lmdb")[0].name == "1.jpg"


def test_destinations_that_can_not_be_are_refused_first(tmp_path: Path) -> None:
    """A folder, and a name in a folder that doesn't exist: before the source is even looked at."""
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"is a folder; give the store a file name, .*db\.lmdb say"):
            pack(tmp_path / "missing", tmp_path, overwrite=overwrite)
        with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist; make it first"):
            pack(tmp_path / "missing", tmp_path / "nowhere" / "db.lmdb", overwrite=overwrite)
    with pytest.raises(SourceError, match="no such file or folder"):
        pack(tmp_path / "missing", tmp_path / "db.lmdb")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("through_a_link", [False, pytest.param(True, marks=posix_only)])
def test_a_store_inside_its_own_source(tmp_path: Path, through_a_link: bool) -> None:
    """Neither the store, nor its partial file, nor its lock is packed or noted: also when packed again, or resumed."""
    images = folder_of(tmp_path / "images", {"1.jpg": jpeg(RGB), "2.jpg": jpeg(RGB)})
    source = images
    if through_a_link:
        source = tmp_path / "link"
        source.symlink_to(images)
    for destination in (images / "db.lmdb", images / "again.lmdb"):
        if destination.name == "again.lmdb":
            (images / "db.lmdb").unlink()
        with pytest.raises(KeyboardInterrupt):
            pack(source, destination, progress=interrupting(1))
        for _ in range(2):
            report = pack(source, destination, overwrite=True)
            assert (report.samples, report.quarantined, report.notes) == (2, 0, ())


def test_a_store_beside_the_class_folders(tmp_path: Path) -> None:
    """The same at the top of class folders, where files that belong to no class are noted."""
    images = folder_of(tmp_path / "images", {"ant/1.jpg": jpeg(RGB)})
    with pytest.raises(KeyboardInterrupt):
        pack(images, images / "db.lmdb", progress=interrupting(1))
    for _ in range(2):
        report = pack(images, images / "db.lmdb", overwrite=True)
        assert (report.samples, report.quarantined, report.notes) == (1, 0, ())


def test_a_source_that_holds_only_the_store_is_an_error(tmp_path: Path) -> None:
    """All images were moved away: there is nothing to pack, and the store is kept."""
    images = folder_of(tmp_path / "images", {"1.jpg": jpeg(RGB)})
    pack(images, images / "db.lmdb")
    (images / "1.jpg").unlink()
    with pytest.raises(SourceError):
        pack(images, images / "db.lmdb", format="flat", overwrite=True)
    assert len(Store(images / "db.lmdb")) == 1


# ---- one at a time


def hold_the_pack(images: Path, destination: Path, connection: Connection) -> None:
    """Begin a pack, say so, and go on when told to."""

    def wait(done: int, total: int) -> None:
        if done == 1:
            connection.send("packing")
            connection.recv()

    pack(images, destination, progress=wait)
    connection.send("done")


def test_a_running_pack_locks_another_one_out(tmp_path: Path) -> None:
    """The second one fails at once with PackError and harms nothing; afterwards the name is free again."""
    images = folder_of(tmp_path / "images", {f"{i}.jpg": jpeg(RGB) for i in range(3)})
    ours, theirs = CLEAN.Pipe()
    child = CLEAN.Process(target=hold_the_pack, args=(images, tmp_path / "db.lmdb", theirs))
    child.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == "packing"
        for _ in range(2):
            with pytest.raises(PackError, match=r"another pack is writing .*db\.lmdb at this moment"):
                pack(images, tmp_path / "db.lmdb")
        pack(images, tmp_path / "other.lmdb")
        ours.send("go on")
        assert ours.poll(60)
        assert ours.recv() == "done"
    finally:
        child.kill()
        child.join()
    assert len(Store(tmp_path / "db.lmdb")) == 3
    pack(images, tmp_path / "db.lmdb", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["db.lmdb", "images", "other.lmdb"]


def test_a_pack_in_another_thread_locks_this_one_out(tmp_path: Path) -> None:
    """The lock holds within one process too."""
    images = folder_of(tmp_path / "images", {f"{i}.jpg": jpeg(RGB) for i in range(3)})
    seen = []

    def pack_again(done: int, total: int) -> None:
        with pytest.raises(PackError, match="another pack is writing"):
            pack(images, tmp_path / "db.lmdb")
        seen.append(done)

    pack(images, tmp_path / "db.lmdb", progress=pack_again)
    assert seen == [1, 2, 3]


def test_the_lock_of_a_killed_pack_is_no_hindrance(tmp_path: Path) -> None:
    """A lock file that is left over locks nobody out."""
    images = folder_of(tmp_path / "images", {"1.jpg": jpeg(RGB)})
    (tmp_path / "db.lmdb.partial.lock").touch()
    pack(images, tmp_path / "db.lmdb")
    assert sorted(os.listdir(tmp_path)) == ["db.lmdb", "images"]


# ---- interrupted


def interrupting(item: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == item:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of which three are damaged, of one size."""
    files = {f"c{i % 3}/{i:02}.png": saved(picture(24, 24, seed=i), "PNG") for i in range(40)}
    files |= {f"c{i % 3}/{i:02}.png": b"damaged" for i in (0, 13, 39)}
    return folder_of(tmp_path_factory.mktemp("many") / "images", files)


def pack_in_small_steps(source: Path, destination: Path, options: dict[str, Any], connection: Connection) -> None:
    """Pack with a commit after every few samples, and tell how far it is."""
    from fastload import store, store_writer

    store_writer._STEP_BYTES = 5000
    store.COLUMN_CHUNK = 4 * 24 * 24 * 3
    pack(source, destination, progress=lambda done, total: connection.send(done), **options)


def killed_at(item: int, source: Path, destination: Path, options: dict[str, Any]) -> None:
    receiver, sender = CLEAN.Pipe(duplex=False)
    child = CLEAN.Process(target=pack_in_small_steps, args=(source, destination, options, sender))
    child.start()
    sender.close()
    with contextlib.suppress(EOFError):
        while receiver.recv() < item:
            pass
    child.kill()
    child.join()


@pytest.mark.parametrize("options", [{}, {"encode": "raw"}, {"quality": 60, "short_side": 16}])
def test_a_killed_pack_goes_on_to_the_same_store(
    tmp_path: Path, many: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at three places one after the other, then resumed: the digest, records and quarantine are the same."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    whole, resumed = tmp_path / "whole.lmdb", tmp_path / "resumed.lmdb"
    receiver, sender = CLEAN.Pipe(duplex=False)
    in_child_process = CLEAN.Process(target=pack_in_small_steps, args=(many, whole, options, sender))
    in_child_process.start()
    sender.close()
    told = []
    with contextlib.suppress(EOFError):
        while True:
            told.append(receiver.recv())
    in_child_process.join()
    assert told == list(range(1, 41))
    starts = []
    for item in (8, 20, 38):
        killed_at(item, many, resumed, options)
        assert not resumed.exists() or item == 38
    if not resumed.exists():
        receiver, sender = CLEAN.Pipe(duplex=False)
        last = CLEAN.Process(target=pack_in_small_steps, args=(many, resumed, options, sender))
        last.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while True:
                starts.append(receiver.recv())
        last.join()
        assert min(starts, default=41) > 20
    assert Store(resumed).manifest["digest"] == Store(whole).manifest["digest"]
    found, expected = contents(Store(resumed)), contents(Store(whole))
    found["manifest"].pop("created"), expected["manifest"].pop("created")
    assert found == expected
    assert [entry["name"] for entry in found["quarantine"]] == ["c0/00.png", "c0/39.png", "c1/13.png"]
    assert sorted(os.listdir(tmp_path)) in (
        ["resumed.lmdb", "whole.lmdb"],
        ["resumed.lmdb", "resumed.lmdb.partial.lock", "whole.lmdb"],  # killed between the rename and the unlocking
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda source: {"quality": 50},
        lambda source: {"exif": "ignore"},
        lambda source: {"tiles": False},
        lambda source: {"strip": True},
        lambda source: folder_of(source, {"c0/00.png": saved(picture(24, 24), "PNG")}) and {},
        lambda source: os.utime(source / "c0" / "03.png", (1, 1)) or {},
        lambda source: (source / "c9").mkdir() or {},
    ],
    ids=["quality", "exif", "tiles", "strip", "new content", "new time", "new class"],
)
def test_another_source_or_option_starts_over(tmp_path: Path, change: Callable[[Path], dict[str, Any]]) -> None:
    """An interrupted pack is gone on with only where source and options are the same."""
    from fastload import store_writer

    source = folder_of(tmp_path / "images", {f"c0/{i:02}.png": saved(picture(24, 24, i), "PNG") for i in range(10)})
    step = store_writer._STEP_BYTES
    store_writer._STEP_BYTES = 1
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "db.lmdb", progress=interrupting(6))
        first: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "db.lmdb", progress=lambda done, _: first.append(done) or interrupting(7)(done, 0))
        assert first[0] in (6, 7)
        options = change(source)
        again: list[int] = []
        pack(source, tmp_path / "db.lmdb", progress=lambda done, _: again.append(done), **options)
    finally:
        store_writer._STEP_BYTES = step
    assert again == list(range(1, 11))


def test_an_error_in_the_progress_function_ends_the_pack_and_its_threads(tmp_path: Path, many: Path) -> None:
    """The error comes out as it is; nothing is left but the partial store."""
    import threading

    with pytest.raises(ZeroDivisionError):
        pack(many, tmp_path / "db.lmdb", progress=lambda done, total: 1 // (done - 5))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload-pack")] == []
    assert os.listdir(tmp_path) == ["db.lmdb.partial"]


def test_progress_counts_every_item_once(tmp_path: Path, many: Path) -> None:
    """Good or bad, in order, of the same total, whatever the number of threads."""
    for workers in (1, 3):
        calls: list[tuple[int, int]] = []
        pack(many, tmp_path / f"{workers}.lmdb", workers=workers, progress=lambda *call, to=calls: to.append(call))
        assert calls == [(i + 1, 40) for i in range(40)]
    assert Store(tmp_path / "1.lmdb").manifest["digest"] == Store(tmp_path / "3.lmdb").manifest["digest"]


@pytest.mark.parametrize("options", [{"encode": "jpeg"}, {"quality": 80}, {"max_side": 69_000}])
def test_what_no_jpeg_can_hold_is_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its sides are too long; the others are packed."""
    wide = saved(np.zeros((3, 70_000, 3), np.uint8), "PNG")
    source = folder_of(tmp_path / "images", {"wide.png": wide, "ok.png": saved(picture(20, 30), "PNG")})
    report = pack(source, tmp_path / "db.lmdb", **options)
    assert (report.samples, report.quarantined) == (1, 1)
    (entry,) = Store(tmp_path / "db.lmdb").quarantine()
    assert entry["name"] == "wide.png"
    assert "pixels are too many for a JPEG, whose sides have up to 65500" in entry["reason"]


def test_a_full_disk_is_said_and_the_same_command_finishes_later(tmp_path: Path) -> None:
    """PackError with the next step, no final name; with more space the same call gives the whole store."""
    source = folder_of(tmp_path / "images", {f"{i}.bmp": saved(picture(200, 300, i), "BMP") for i in range(20)})
    with small_disk(tmp_path / "disk", 2) as resize:
        destination = tmp_path / "disk" / "db.lmdb"
        with pytest.raises(PackError, match="no space left on the device; free some and run the same command again"):
            pack(source, destination)
        assert not destination.exists()
        resize(64)
        assert pack(source, destination).samples == 20
        digest = Store(destination).manifest["digest"]
    pack(source, tmp_path / "db.lmdb")
    assert Store(tmp_path / "db.lmdb").manifest["digest"] == digest


# ---- reports and reproducible stores


def test_a_report_says_what_was_done(tmp_path: Path, many: Path) -> None:
    """Samples, classes, quarantined files, bytes of the store, seconds and notes, in a frozen object."""
    (tmp_path / "images" / "empty").mkdir(parents=True)
    folder_of(tmp_path / "images", {"ant/1.jpg": jpeg(RGB), "ant/2.jpg": b"text", "README": b"text"})
    report = pack(tmp_path / "images", tmp_path / "db.lmdb")
    assert isinstance(report, PackReport)
    assert (report.samples, report.classes, report.quarantined) == (1, 2, 1)
    assert report.bytes == (tmp_path / "db.lmdb").stat().st_size
    assert report.seconds > 0
    assert report.notes == (
        "class 'empty' has no files",
        "1 files outside the class folders belong to no class, the first is 'README'",
    )
    with pytest.raises(FrozenInstanceError):
        report.samples = 2  # type: ignore[misc]
    assert fastload.pack is pack


def test_classes_are_counted_for_every_kind_of_label(tmp_path: Path) -> None:
    """Numbers without names count by their different values, -1 for no label not among them."""
    folder_of(tmp_path, {"a.jpg": jpeg(RGB), "b.jpg": jpeg(RGB), "c.jpg": jpeg(RGB)})
    for text, classes in {"a.jpg\nb.jpg\n": 0, "a.jpg 7\nb.jpg 7\nc.jpg 900\n": 2, "a.jpg 1 2\nb.jpg 3\n": 3}.items():
        (tmp_path / "list.txt").write_text(text)
        assert pack(tmp_path / "list.txt", tmp_path / "db.lmdb", overwrite=True).classes == classes


def test_source_date_epoch_makes_stores_reproducible(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of creation is the variable's, in UTC, and two packs of one source are one and the same file."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    digests = []
    for number in range(2):
        pack(many, tmp_path / f"{number}.lmdb", workers=1 + number)
        assert Store(tmp_path / f"{number}.lmdb").manifest["created"] == "2023-11-14T22:13:20+00:00"
        digests.append(hashlib.sha256((tmp_path / f"{number}.lmdb").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_a_source_date_epoch_that_is_no_number_is_an_error_before_anything_is_packed(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after hours of packing."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    calls: list[int] = []
    with pytest.raises(ValueError, match=r"SOURCE_DATE_EPOCH.*yesterday"):
        pack(many, tmp_path / "db.lmdb", progress=lambda done, total: calls.append(done))
    assert calls == []


def test_the_time_of_creation_is_now_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ISO time with its zone, between before and after."""
    from datetime import datetime, timedelta, timezone

    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    store = packed(tmp_path, {"1.jpg": jpeg(RGB)})
    assert before <= datetime.fromisoformat(store.manifest["created"]) <= datetime.now(timezone.utc)
