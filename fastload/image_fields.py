"""One image, of a file or of pixels, as the field that a store keeps of it: identified, decoded, re-encoded, re-cut.

Of 8 bits there is one way (`shallow`), of 16 another (`deep`); `own_form` says which an image is of.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from . import blocks, decode, geometry, headers, jpeg, record, tiles
from .blocks import Values
from .buffers import scratch
from .errors import DecodeError, SourceError
from .fields import Spec
from .geometry import Plan, Size
from .jpeg import Pixels
from .options import Form, Options

_DEFAULT_QUALITY = 95
_PIXELS_KEPT = 1 << 25  # a larger JPEG is decoded once more instead
_BLOCKS_AT_LEAST, _PIXELS_PER_BLOCK = 1 << 20, 32  # re-cut are JPEGs of so many blocks, or as max_pixels allows
_ORIENTATION_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 0x0112, 0x0102, 0x0153
_PNG_BITS = 24  # where a PNG's header says how many; the next byte is its kind of colours
_PNG_GRAY_AND_ALPHA = 4
_PPM_HEADER = re.compile(rb"P[56]" + 2 * rb"(?:\s|#[^\n]*\n)+\d+" + rb"(?:\s|#[^\n]*\n)+(\d+)")
_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


class _Facts(NamedTuple):
    """What an image file says of itself. bits: of a value, 8 or 16, or 0 for what is neither. gray: without colours."""

    is_jpeg: bool
    size: Size
    orientation: int
    transparent: bool
    bits: int
    gray: bool


class _Made(NamedTuple):
    """An image's field. outcome: of `tiles.OUTCOMES`. whole, size: upright, before and after it is shrunk."""

    field: record.Field
    outcome: int
    whole: Size
    size: Size
    cut: bool = False


def own_form(image: Any, options: Options) -> Form:
    """The form that one image has, of itself."""
    if isinstance(image, record.Field) and image.codec in (record.JPEG, record.ENCODED) and options.depth == 16:
        image = bytes(image.payload)
    if isinstance(image, bytes):
        facts = identify(image, options)
        return Form("uint16" if facts.bits == 16 else "uint8", 1 if facts.gray else 3)
    if isinstance(image, record.Field):
        return Form(blocks.dtype_of(image).name if image.codec == record.BLOCKS else "uint8", image.channels)
    if isinstance(image, Image.Image):  # its pixels are read when it is packed, and only then
        return Form("uint16" if image.mode == "I;16" else "uint8", 1 if image.mode in ("L", "I;16") else 3)
    image = checked_values(image, options)
    return Form(image.dtype.name, image.shape[2])


def shallow(image: Any, spec: Spec, options: Options) -> _Made:
    """An image as a store of 8 bits keeps it."""
    orientation, deep = 1, False
    if isinstance(image, bytes):
        deep = identify(image, options).bits == 16
    elif not isinstance(image, record.Field):
        values = checked_values(image, options)
        image, deep = cut_to_8_bits(values), values.dtype == np.uint16
    elif image.codec == record.BLOCKS:
        image, orientation, deep = cut_to_8_bits(decode.pixels(image)), image.orientation, True
    kept, pixels = image_field(image, spec, options)
    kept = kept._replace(orientation=orientation) if orientation > 1 else kept
    field, size = made_field(kept, options)
    stored, outcome = tiled(field, pixels if field is kept else None, options)
    return _Made(stored, outcome, geometry.upright_size((kept.height, kept.width), kept.orientation), size, deep)


def cut_to_8_bits(values: Values) -> Values:
    """The upper 8 bits of 16."""
    if values.dtype == np.int16:
        raise DecodeError("its values are int16, and the store has 8 bits; pack with --depth 16")
    return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values


def deep(image: Any, options: Options, form: Form) -> _Made:
    """An image as a store of 16 bits keeps it: as blocks."""
    values, orientation = _values_of(image, options)
    whole = geometry.upright_size(values.shape[:2], orientation)
    size = options.target_size(whole)
    values = _in_form(values, form)
    if size != whole:
        shrunk = np.empty((*size, form.channels), values.dtype)
        plan = Plan.whole(whole).resized(size)
        assert plan is not None
        decode.render(values, orientation, [plan], shrunk)
        values, orientation = shrunk, 1
    return _Made(blocks.field_of(values)._replace(orientation=orientation), tiles.NO_JPEG, whole, size)


def _in_form(values: Values, form: Form) -> Values:
    """An image's values in a store's type and channels, 255 as 65535; DecodeError where that can't be."""
    if values.dtype == np.uint8 and form.dtype == "uint16":
        values = values.astype(np.uint16) * np.uint16(257)
    if values.dtype != form.dtype:
        raise DecodeError(
            f"its values are {values.dtype}, and the store's are {form.dtype}; pack it into another store"
        )
    if values.shape[2] > form.channels:
        raise DecodeError("it has colours, and the store's images are grey, as the first one is; pack it into another")
    return values if values.shape[2] == form.channels else np.repeat(values, form.channels, axis=2)


def _values_of(image: Any, options: Options) -> tuple[Values, int]:
    """All that an image's values hold, with one channel where it is grey, and its orientation."""
    if isinstance(image, record.Field):
        if image.codec in (record.RAW, record.BLOCKS):
            return decode.pixels(image), image.orientation
        return _values_of(bytes(image.payload), options)[0], image.orientation
    if not isinstance(image, bytes):
        return checked_values(image, options), 1
    facts = identify(image, options)
    if not facts.bits:
        raise DecodeError("its values are neither of 8 nor of 16 bits without a sign; convert it, or use --depth 8")
    values = _deep_values(image, facts, options) if facts.bits == 16 else _shallow_values(image, facts, options)
    return values, facts.orientation


def _shallow_values(data: bytes, facts: _Facts, options: Options) -> Values:
    values: Values = decode.pixels(_kept_field(data, facts, options)[0], keep=True)
    return values[..., :1] if facts.gray else values


def _deep_values(data: bytes, facts: _Facts, options: Options) -> Values:
    values = decode.decode_deep(data)
    if values.shape[:2] != facts.size:
        raise DecodeError(f"it decodes to {values.shape[:2]} pixels, its header says {facts.size}")
    if not facts.transparent or options.background is None:
        return values[..., : 1 if facts.gray else 3]
    if values.shape[2] == 4:
        opaque: npt.NDArray[Any] = values[..., 3:] / 65535
    else:  # one colour is transparent
        with headers.opened(data) as image:
            opaque = (values != image.info["transparency"]).any(axis=2, keepdims=True)
    below = np.array(options.background) * 257
    laid: Values = np.rint(below + opaque * (values[..., :3] - below)).astype(np.uint16)
    return laid


def checked_values(content: Any, options: Options) -> Values:
    """Pixels that a source gives, (height, width, channels) in this machine's byte order, if they can be packed."""
    values = _as_array(content, options)
    fits = isinstance(values, np.ndarray) and values.ndim == 3 and values.shape[2] in (1, 3) and values.size > 0
    if not fits or values.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.int16):
        what = f"{content.dtype} {tuple(content.shape)}" if hasattr(content, "shape") else type(content).__name__
        raise SourceError(
            f"'image' is {what}; an image is uint8, uint16 or int16, (3 or 1, height, width) as a tensor, "
            "(height, width, 3 or 1) as an array"
        )
    check_pixels(values.shape[:2], options)
    native: Values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native


def _as_array(content: Any, options: Options) -> Any:
    """Decoded pixels as an array (height, width, channels); what is no picture as it is."""
    if isinstance(content, Image.Image):
        return np.atleast_3d(_of_pillow(content, options.background))
    if isinstance(content, torch.Tensor) and content.dim() == 3:
        return of_torch(content).transpose(1, 2, 0)
    return content


def image_field(content: Any, spec: Spec, options: Options) -> tuple[record.Field, Pixels | None]:
    """An image as a field: of a store, of a file's bytes or of pixels; see `_kept_field` for what goes with it."""
    if isinstance(content, record.Field):
        return content, None
    if isinstance(content, bytes):
        return _kept_field(content, identify(content, options), options)
    pixels = pixels_of(content, spec, options)
    check_pixels(pixels.shape[:2], options)
    return _lossless_field(pixels) if spec.type and options.encode == "keep" else raw_field(pixels), None


def pixels_of(content: Any, spec: Spec, options: Options) -> Pixels:
    """Decoded pixels as an array (height, width, channels)."""
    content = _as_array(content, options)
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.ndim != 3:
        what = f"{content.dtype} {tuple(content.shape)}" if hasattr(content, "shape") else type(content).__name__
        raise SourceError(f"{spec.name!r} is {what}; an image is uint8, (3 or 1, height, width) as a tensor")
    pixels: Pixels = content
    if pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise SourceError(f"{spec.name!r} has the shape {content.shape} (height, width, channels); channels are 1 or 3")
    exact = spec.type in ("tensor", "numpy")  # of Pillow's pictures grey ones may become colours
    if spec.type and (pixels.shape[2] > spec.channels or (exact and pixels.shape[2] < spec.channels)):
        raise SourceError(
            f"{spec.name!r} has {pixels.shape[2]} channels, the first samples {spec.channels}; let the dataset give "
            "one kind of images, or pack them as arrays, which no transform moves: kind array"
        )
    return np.repeat(pixels, 3, 2) if spec.type and pixels.shape[2] < spec.channels else pixels


def _of_pillow(picture: Image.Image, background: tuple[int, int, int] | None) -> Pixels:
    """The pixels of an opened picture, grey (of 16 bits too) or RGB; reading its file may fail only now."""
    try:
        if picture.mode not in ("L", "RGB", "I;16"):
            on_colour = background is not None and _is_transparent(picture)
            picture = _laid_on(picture, background) if background and on_colour else picture.convert("RGB")
        return np.asarray(picture)
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error


def of_torch(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor as an array; SourceError where it can't be one."""
    try:
        values: npt.NDArray[Any] = tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise SourceError(f"a tensor of {tensor.dtype}, {tensor.layout}, is none of pixels: {error}") from error
    return values


def _lossless_field(pixels: Pixels) -> record.Field:
    """Pixels as PNG, if that halves them: it takes its time to decode."""
    raw = raw_field(pixels)
    if pixels.shape[2] == 3:
        fits, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        if fits and 2 * len(data) < len(raw.payload):
            return raw._replace(codec=record.ENCODED, payload=data.tobytes())
    return raw


def identify(data: bytes, options: Options) -> _Facts:
    """Format, size and orientation from the file's header, by Pillow; DecodeError where there is no (whole) image."""
    try:
        with headers.opened(data) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            size = (image.height, image.width)
            transparent = _is_transparent(image)
            bits = _bits(image, data)
            gray = _is_gray(image, data) and not (transparent and options.background is not None)
        check_pixels(size, options)
        if not is_jpeg:
            with headers.opened(data) as image:
                image.verify()
    except Exception as error:
        raise headers.damaged(error) from error
    return _Facts(is_jpeg, size, _orientation(data) if options.exif == "apply" else 1, transparent, bits, gray)


def _bits(image: Image.Image, data: bytes) -> int:
    """8 or 16, or 0 for other TIFFs: with a sign, say, or floating. (What has fewer bits is spread over 8.)"""
    if image.format == "PNG":
        return 16 if data[_PNG_BITS] == 16 else 8
    if image.format == "PPM":
        header = _PPM_HEADER.match(data)
        return 16 if header is not None and int(header[1]) > 0xFF else 8
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, unsigned = max(tags.get(_BITS_TAG, (1,))), {1} == {*tags.get(_SAMPLE_FORMAT_TAG, (1,))}
        return 8 if bits <= 8 else 16 if bits == 16 and unsigned else 0
    return 8


def _is_gray(image: Image.Image, data: bytes) -> bool:
    """Grey with alpha, 16 bits in a PNG, is RGBA to Pillow."""
    return image.mode in _GRAY or (image.format == "PNG" and data[_PNG_BITS + 1] == _PNG_GRAY_AND_ALPHA)


def check_pixels(size: Size, options: Options) -> None:
    """Raise DecodeError for more pixels than the options allow."""
    if size[0] * size[1] > options.max_pixels:
        raise DecodeError(
            f"{size[1]} x {size[0]} pixels are more than the limit of {options.max_pixels}; --max-pixels raises it"
        )


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    with headers.opened(data) as image:
        if image.format == "TIFF":
            return 1  # whoever decodes it turns it upright: libtiff does, and so does Pillow
        if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type" not in data:
            return 1  # looking behind the pixels, as `getexif` does, would decode them
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # garbage in EXIF does not make the image worse
            return 1
    return orientation if orientation in range(1, 9) else 1


def made_field(kept: record.Field, options: Options) -> tuple[record.Field, Size]:
    """The field to store an image in, and its upright size."""
    size = geometry.upright_size((kept.height, kept.width), kept.orientation)
    target = options.target_size(size)
    keep_bytes = {
        "keep": options.quality is None,
        "jpeg": options.quality is None and kept.codec == record.JPEG,
        "raw": kept.codec == record.RAW and kept.orientation == 1,
    }[options.encode]
    if keep_bytes and target == size:
        return kept, size
    pixels = np.empty((*target, kept.channels), np.uint8)
    plan = Plan.whole(size).resized(target)
    assert plan is not None
    decode.render(decode.pixels(kept), kept.orientation, [plan], pixels)
    return _encoded_field(pixels, options), target


def _kept_field(data: bytes, facts: _Facts, options: Options) -> tuple[record.Field, Pixels | None]:
    """The file's own bytes as a field, after proving that they decode to the size that the header says.

    Also its pixels, if it is a JPEG that is to be re-cut, in a scratch buffer.
    """
    height, width = facts.size
    if facts.transparent and options.background is not None:
        data = _on_background(data, options.background)
        return record.Field(record.ENCODED, data, facts.orientation, 3, record.REENCODED, width, height), None
    pixels = None
    codec = record.ENCODED
    if facts.is_jpeg and _decodes_as_rgb(data, facts.size):
        if options.tiles and height * width <= _PIXELS_KEPT:
            pixels = scratch("original", height * width * 3).reshape(height, width, 3)
        codec = record.JPEG if jpeg.check(data, pixels) else record.ENCODED
    if codec == record.ENCODED:
        decode.decode_other(data, (height, width, 3))
    return record.Field(codec, data, facts.orientation, 3, 0, width, height), pixels


def _on_background(data: bytes, colour: tuple[int, int, int]) -> bytes:
    """An image with transparency laid on a colour, as PNG."""
    try:
        with headers.opened(data) as image:
            pixels = np.asarray(_laid_on(image, colour))
    except Exception as error:
        raise headers.damaged(error) from error
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def _laid_on(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, tuple(colour)), picture).convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _decodes_as_rgb(data: bytes, size: Size) -> bool:
    """Whether libjpeg-turbo turns a JPEG to RGB by itself; CMYK and odd chroma samplings are left to OpenCV."""
    try:
        header = jpeg.header(data)
    except DecodeError:
        return False
    return header.colorspace not in ("CMYK", "YCCK") and (header.height, header.width) == size


def _encoded_field(pixels: Pixels, options: Options) -> record.Field:
    if options.encode == "raw":
        return raw_field(pixels)
    height, width = pixels.shape[:2]
    data = jpeg.encode(np.broadcast_to(pixels, (height, width, 3)), options.quality or _DEFAULT_QUALITY)
    return record.Field(record.JPEG, data, 1, 3, record.REENCODED, width, height)


def raw_field(pixels: Values) -> record.Field:
    """Pixels as they are."""
    height, width, channels = pixels.shape
    return record.Field(record.RAW, pixels.tobytes(), 1, channels, record.REENCODED, width, height)


def tiled(field: record.Field, pixels: Pixels | None, options: Options) -> tuple[record.Field, int]:
    """The field re-cut if it can be, and what became of it. pixels: what it decodes to, if that is known already."""
    if field.codec != record.JPEG:
        return field, tiles.NO_JPEG
    if not options.tiles:
        return field, tiles.OFF
    from .recut import Untouched, recut

    try:
        most = max(_BLOCKS_AT_LEAST, options.max_pixels // _PIXELS_PER_BLOCK)
        cut = recut(bytes(field.payload), strip=options.strip, orientation=field.orientation, max_blocks=most)
        recut_field = field._replace(payload=cut.data, tiles=cut.tiles, checksum=record.checksum(cut.data))
        whole = decode.pixels(field, keep=True) if pixels is None else pixels
        if not (decode.same(decode.pixels(recut_field), whole) and decode.tiles_show(recut_field, whole)):
            raise Untouched(tiles.PIXELS)
    except Untouched as reason:
        return field, reason.outcome
    except DecodeError:
        return field, tiles.PIXELS
    return recut_field, tiles.RECUT
