"""From a stored image to the picture that a plan describes. One way, for all callers.

`render` carries plans out on an image, be it a record's field or an array of pixels: read the crop, turn it upright
and mirror it in one pass, resize, cut the window. What is read is decided by `geometry.read_for`; of a tiled JPEG only
the tiles that it takes are decoded, at a half, a quarter or an eighth of their size where that is enough. `pixels`
gives a whole image as it is stored: RGB, uint8, height x width x 3, not yet upright. All write to scratch buffers of
the thread or straight to their destination, a picture's slot in the batch. `reduced` is for single images: a region,
smaller or grey, in memory of its own.

Images of 16 bits are stored as blocks: uint16 or int16, with 1 channel or 3. They go the same way, and only the blocks
that a crop touches are read.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from . import blocks, jpeg, record, tiles
from .blocks import Values
from .buffers import scratch
from .errors import DecodeError
from .geometry import Box, Plan, Size, read_for, reduced_box, stored_box, upright_size
from .jpeg import Pixels
from .resize import resize

if TYPE_CHECKING:
    import PIL.Image

if hasattr(os, "register_at_fork"):
    # OpenCV's pool of threads is not forked: now and then its calls in the child waited for it for ever.
    os.register_at_fork(after_in_child=functools.partial(cv2.setNumThreads, 0))

_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_TIFF = (b"II*\0", b"MM\0*")
_BMP_BITS, _BITS_OF_FIVE_EACH = 28, b"\x10"
_PIXELS_AT_ONCE = 1 << 20
_WHITE_IS_ZERO, _PHOTOMETRIC_TAG = 0, 262
_PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


def pixels(field: record.Field, *, keep: bool = False) -> Values:
    """Decode a stored image: uint8 RGB (height, width, 3), as it is stored. Its checksum is not looked at.

    Raw images and blocks may have 1 channel, blocks 16 bits.

    keep: give an array of its own, not a scratch buffer that the thread's next image overwrites.

    Raises:
        DecodeError: the bytes are damaged, or are not the picture that the record describes.
    """
    if field.codec == record.RAW:
        return _raw_pixels(field)
    if field.codec == record.BLOCKS:
        return _from_blocks(field, Plan.whole((field.height, field.width)).box)
    if field.codec == record.ENCODED:
        return decode_other(field.payload, (field.height, field.width, 3))
    return _decode_jpeg(field.payload, (field.height, field.width), keep=keep)


def _decode_jpeg(
    data: bytes | memoryview, size: Size, reduction: int = 1, *, keep: bool = False, channels: int = 3
) -> Pixels:
    height, width = -(-size[0] // reduction), -(-size[1] // reduction)
    try:
        out = np.empty(height * width * channels, np.uint8) if keep else scratch("decode", height * width * channels)
    except (MemoryError, ValueError) as error:
        raise DecodeError(f"there is no memory for {width} x {height} pixels") from error
    out = out.reshape(height, width, channels)
    jpeg.decode(data, out, reduction)
    return out


def region(field: record.Field, box: Box, reduction: int = 1, *, channels: int = 3) -> Values:
    """Decode a rectangle of a stored image at 1 / reduction of its size, and check the checksums of what that reads.

    box: in pixels at that size. channels: of a JPEG, 3 for RGB or 1 for its luma.
    """
    if field.codec == record.BLOCKS:
        return _from_blocks(field, box)
    if field.tiles:
        wanted = Box(*(length * reduction for length in box))
        small = tiles.splice(field, wanted)
        if small is not None:
            image = _decode_jpeg(small.data, small.size, reduction, channels=channels)
            return _crop(image, box._replace(x=small.x // reduction, y=small.y // reduction))
    field.verify()
    if field.codec == record.JPEG:
        return _crop(_decode_jpeg(field.payload, (field.height, field.width), reduction, channels=channels), box)
    return _crop(pixels(field), box)


def reduced(image: Values | record.Field, box: Box, reduction: int, *, gray: bool) -> Values:
    """A region of an image at 1 / reduction of its size, upright: (height, width, 3, or 1 for grey), of its own type.

    image: a stored image, whose checksums are then checked, or upright pixels. box: in full-size pixels of the upright
    image; what comes out are all smaller pixels in which it lies. reduction: 1, 2, 4 or 8. gray: luma (ITU-R 601), of
    a JPEG the one that it stores.

    JPEGs are reduced by DCT scaling. The squares that it makes pixels of are counted from the stored image's corner.
    Other images, and JPEGs with a side of up to 8 pixels (see `read_for`), are averaged in squares from the upright
    one's.

    Raises:
        ChecksumError, DecodeError: the image is damaged.
    """
    if isinstance(image, record.Field):
        orientation, height, width = image.orientation, image.height, image.width
        scaled = image.codec == record.JPEG and min(height, width) > 8
    else:
        orientation, (height, width), scaled = 1, image.shape[:2], False
    scale = reduction if scaled else 1
    size = upright_size((-(-height // scale), -(-width // scale)), orientation)
    box = reduced_box(box, reduction)
    if not scaled:
        x, y, w, h = (length * reduction for length in box)
        box = Box(x, y, min(w, size[1] - x), min(h, size[0] - y))
    stored = stored_box(box, orientation, size)
    if isinstance(image, record.Field):
        crop = region(image, stored, scale, channels=1 if gray else 3)
    else:
        crop = _crop(image, stored)
    if gray and crop.shape[2] == 3:
        crop = _luma(crop)
    averaged = not scaled and reduction > 1
    if averaged and orientation == 1:
        return _averaged(crop, reduction)
    out = np.empty((box.height, box.width, crop.shape[2]), crop.dtype)
    _turn(crop, orientation, out)
    return _averaged(out, reduction) if averaged else out


def with_channels(image: Values, channels: int) -> Values:
    """Grey as three equal channels; three of 8 bits as one, which grey pictures are that were made JPEGs."""
    if image.shape[2] < channels:
        return np.repeat(image, channels, axis=2)
    return _luma(image) if image.shape[2] > channels and image.dtype == np.uint8 else image


def _luma(colours: Values) -> Values:
    """ITU-R 601, one channel; of 16 bits in float32, rounded."""
    luma: Values = np.empty((*colours.shape[:2], 1), colours.dtype)
    if colours.dtype == np.uint8:
        cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY, luma)
        return luma
    for rows in _bands(colours.shape):
        luma[rows, :, 0] = np.rint(cv2.cvtColor(colours[rows].astype(np.float32), cv2.COLOR_RGB2GRAY))
    return luma


def _averaged(image: Values, reduction: int) -> Values:
    """The means of squares of pixels; at the right and below of what is left of them."""
    if image.dtype == np.uint8:
        from PIL import Image

        height, width, channels = image.shape
        small = Image.fromarray(image if channels == 3 else image[..., 0]).reduce(reduction)
        return np.array(small).reshape(-(-height // reduction), -(-width // reduction), channels)
    means = np.empty((*(-(-side // reduction) for side in image.shape[:2]), image.shape[2]), image.dtype)
    for rows in _bands(image.shape, reduction):
        sums = image[rows].astype(np.int64)
        counts = np.ones((*sums.shape[:2], 1), np.int64)
        for axis in (0, 1):
            starts = np.arange(0, sums.shape[axis], reduction)
            sums, counts = np.add.reduceat(sums, starts, axis), np.add.reduceat(counts, starts, axis)
        means[rows.start // reduction : -(-rows.stop // reduction)] = (2 * sums + counts) // (2 * counts)
    return means


def tiles_show(field: record.Field, pixels: Values) -> bool:
    """Whether each column of a re-cut JPEG's tiles, decoded by itself, shows these pixels of the whole image."""
    return all(same(region(field, box), _crop(pixels, box)) for box in tiles.columns(field))


def same(image: Values, other: Values) -> bool:
    """Whether two images are equal, some rows at a time: NumPy keeps a byte for each pixel that it compares."""
    return image.shape == other.shape and all(np.array_equal(image[rows], other[rows]) for rows in _bands(image.shape))


def _bands(shape: Sequence[int], multiple: int = 1) -> Iterator[slice]:
    """The rows of an image, as many at a time as have a million pixels, and a multiple of so many."""
    height, width = shape[:2]
    count = max(1, _PIXELS_AT_ONCE // (width * multiple)) * multiple
    return (slice(top, min(top + count, height)) for top in range(0, height, count))


def _crop(image: Values, box: Box) -> Values:
    return image[box.y : box.y + box.height, box.x : box.x + box.width]


def _from_blocks(field: record.Field, box: Box) -> Values:
    if field.channels not in (1, 3):
        raise DecodeError(f"an image of blocks has {field.channels} channels, where 1 or 3 belong")
    return blocks.read(field, box).reshape(box.height, box.width, field.channels)


def _raw_pixels(field: record.Field) -> Pixels:
    expected = field.height * field.width * field.channels
    if field.channels not in (1, 3) or len(field.payload) != expected:
        raise DecodeError(
            f"raw image: {len(field.payload)} bytes and {field.channels} channels for {field.height} x {field.width} "
            f"pixels, where {expected} bytes of 1 or 3 channels belong"
        )
    return np.frombuffer(field.payload, np.uint8).reshape(field.height, field.width, field.channels)


def upright(field: record.Field) -> Values:
    """Decode a stored image whole and turn it upright, as `pixels` gives it; an array of its own.

    Raises:
        ChecksumError: the bytes were altered.
        DecodeError: see `pixels`.
    """
    field.verify()
    image = pixels(field, keep=True)
    if field.orientation == 1 and field.codec != record.RAW:
        return image
    out = np.empty((*upright_size(image.shape[:2], field.orientation), image.shape[2]), image.dtype)
    _turn(image, field.orientation, out)
    return out


def decode_other(data: bytes | memoryview, shape: tuple[int, ...]) -> Pixels:
    """Decode any other format to uint8 RGB, orientation ignored: alpha dropped, 16 bits cut to 8, a GIF's first frame.

    Raises:
        DecodeError: it can't be decoded, or the picture is not of the `shape` that was expected. Its header is looked
            at first: a few bytes can be a picture of any size.
    """
    from . import headers

    with headers.opened(bytes(data)) as opened:
        if opened.width * opened.height != shape[0] * shape[1]:
            has = f"it has {opened.width} x {opened.height} pixels"
            raise DecodeError(f"{has}, the record says {shape[1]} x {shape[0]}")
        image = _decode_by_pillow(opened) if _is_left_to_pillow(opened, data) else None
    if image is None:
        image = _decode_by_opencv(data, _AS_STORED)
    if image.shape != shape:
        raise DecodeError(f"it decodes to {image.shape[:2]} pixels, the record says {shape[:2]}")
    return image


def _is_left_to_pillow(image: PIL.Image.Image, data: bytes | memoryview) -> bool:
    """Whether OpenCV shows another picture.

    It paints a GIF's transparent pixels, multiplies a TIFF's colours by alpha, doesn't spread a PNM's values or a BMP's
    of 5 bits over 0 to 255, and shows an animated PNG's first frame where that is another picture than its own.
    """
    if image.format == "PNG":
        return bool(getattr(image, "is_animated", False))
    if image.format == "BMP":
        return bytes(data[_BMP_BITS : _BMP_BITS + 1]) == _BITS_OF_FIVE_EACH
    return image.format in ("GIF", "TIFF", "PPM")


def decode_deep(data: bytes) -> npt.NDArray[np.uint16]:
    """Decode a PNG, TIFF, PGM or PPM of 16 bits: uint16 (height, width, channels), orientation ignored (not TIFF's).

    Channels are 1 (grey), 3 (RGB) or 4 (RGB and alpha; of a PNG also grey with alpha). PGM and PPM keep their values,
    whatever the largest may be.

    Raises:
        DecodeError: it can't be decoded to values that are certain.
    """
    image = np.atleast_3d(_decode_by_opencv(data, cv2.IMREAD_UNCHANGED))
    if image.dtype != np.uint16 or image.shape[2] not in (1, 3, 4):
        raise DecodeError(f"OpenCV decodes it to {image.dtype} {image.shape}, its header says 16 bits")
    if image.shape[2] > 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return _checked_tiff(data, image) if data[:4] in _TIFF else image


def _checked_tiff(data: bytes, image: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Values out of a TIFF, the same way up as in PNG. Of its many kinds OpenCV reads some wrong: Pillow has to agree.

    Pillow shows all 16 bits of grey images, and the upper 8 of colours.
    """
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as shown:
            inverted = shown.tag_v2.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
            levels = np.atleast_3d(np.array(shown))[..., :3]
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error
    if not np.array_equal(levels, image[..., :3] >> 8 if levels.dtype == np.uint8 else image):
        raise DecodeError(
            "it is a TIFF that OpenCV and Pillow read differently (its channels lie apart, say, or its colours are "
            "multiplied by alpha); save it as PNG, or pack with --depth 8"
        )
    return ~image if inverted else image


def _decode_by_opencv(data: bytes | memoryview, flags: int) -> npt.NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f"OpenCV can't decode it: {error.err}") from error
    if image is None:
        raise DecodeError("OpenCV can't decode it: the bytes are damaged or of an unknown format")
    return image


def _decode_by_pillow(image: PIL.Image.Image) -> Pixels | None:
    """None for kinds of TIFF (16 bits, say) that Pillow does not turn to RGB well."""
    try:
        if image.format == "PPM" and image.mode == "I":  # 16 bits
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., np.newaxis], 3, axis=2)
        return _as_rgb(image) if image.mode in _PILLOW_MODES else None
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error


def _as_rgb(image: PIL.Image.Image) -> Pixels:
    """A picture of Pillow's as RGB, some rows at a time: at once it would be in memory four times."""
    image.load()
    out = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _bands(out.shape):
        out[rows] = np.asarray(image.crop((0, rows.start, image.width, rows.stop)).convert("RGB"))
    return out


def render(
    image: Values | record.Field, orientation: int, plans: list[Plan], out: Values, *, scaled: bool = False
) -> None:
    """Carry `plans` out on an image and write the picture to `out`.

    image: a stored image, whose checksums are then checked, or its pixels, (height, width, channels) as stored.
    orientation: EXIF, 1 to 8, as stored. out: C-contiguous, of the last plan's output size and the image's type; grey
    images become three equal channels where it has three. scaled: whether a JPEG may be decoded at a reduced size that
    is still as large as what it is resized to.

    Raises:
        ChecksumError, DecodeError: the image is damaged, or of another type.
    """
    for plan in plans[:-1]:
        step = np.empty((*plan.output_size, out.shape[2]), out.dtype)
        _render(image, orientation, plan, step, scaled)
        image, orientation = step, 1
    _render(image, orientation, plans[-1], out, scaled)


def _render(image: Values | record.Field, orientation: int, plan: Plan, out: Values, scaled: bool) -> None:
    if isinstance(image, record.Field):
        scaled = scaled and image.codec == record.JPEG
        read = read_for(plan, (image.height, image.width), orientation, scaled=scaled, tiled=bool(image.tiles))
        crop = region(image, read.box, read.reduction)
    else:
        read = read_for(plan, image.shape[:2], orientation, scaled=False, tiled=False)
        crop = _crop(image, read.box)
    channels = out.shape[2]
    crop = with_channels(crop, channels)
    if crop.dtype != out.dtype or crop.shape[2] != channels:
        raise DecodeError(
            f"the image is {crop.dtype} of {crop.shape[2]} channels, where {out.dtype} of {channels} belong"
        )
    if read.source == read.size and read.window is None:
        _turn(crop, read.turn, out)
        return
    picture = _upright(crop, read.turn, read.source)
    if read.window is None:
        resize(picture, read.scales, out)
        return
    if read.source != read.size:
        resized = _scratch_picture("window", (*read.size, channels), out.dtype)
        resize(picture, read.scales, resized)
        picture = resized
    _cut(picture, read.window, out)


def _scratch_picture(purpose: str, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Values:
    picture: Values = scratch(purpose, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    return picture


def _cut(picture: Values, window: Box, out: Values) -> None:
    """Write a window of the picture to `out`, zeros where it reaches beyond."""
    height, width = picture.shape[:2]
    top, left = max(window.y, 0), max(window.x, 0)
    inside = picture[top : max(0, min(window.ends[0], height)), left : max(0, min(window.ends[1], width))]
    if inside.shape != out.shape:
        out[...] = 0
    if inside.size:
        np.copyto(out[top - window.y :, left - window.x :][: inside.shape[0], : inside.shape[1]], inside)


def _upright(crop: Values, orientation: int, size: Size) -> Values:
    """The crop turned upright, contiguous and writable, as the lower right part of a picture of `size`."""
    if orientation == 1 and crop.shape[:2] == size and crop.flags.c_contiguous and crop.flags.writeable:
        return crop
    out = _scratch_picture("upright", (*size, crop.shape[2]), crop.dtype)
    height, width = upright_size(crop.shape[:2], orientation)
    _turn(crop, orientation, out[size[0] - height :, size[1] - width :])
    return out


def _turn(crop: Values, orientation: int, out: Values) -> None:
    """Write `crop`, stored with an EXIF orientation, upright to `out`, by OpenCV: NumPy takes 30 times as long."""
    if orientation == 1:
        np.copyto(out, crop)
    elif orientation <= 4:
        cv2.flip(crop, (1, -1, 0)[orientation - 2], out)
    elif orientation == 5:
        cv2.transpose(crop, out)
    elif orientation == 7:
        cv2.flip(cv2.transpose(crop), -1, out)
    else:
        cv2.rotate(crop, cv2.ROTATE_90_CLOCKWISE if orientation == 6 else cv2.ROTATE_90_COUNTERCLOCKWISE, out)
