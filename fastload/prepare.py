"""One item of a source as what a store keeps of it: read, judged, perhaps re-encoded or re-cut, its masks beside it.

Before an image is kept it is decoded, so damage is found now, not in the middle of a training run. What can't be packed
comes out as `LeftOut`, with its reason.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from . import arrays, blocks, boxes, decode, dicom, geometry, jpeg, masks, record, tiles
from .buffers import scratch
from .errors import DecodeError, FastloadError, SourceError
from .fields import Spec, cell, encode
from .geometry import Plan, Size
from .jpeg import Pixels
from .sources import Item, Source
from .store import Store
from .workers import ordered_map

Encode = Literal["keep", "jpeg", "raw"]
Exif = Literal["apply", "ignore"]
MAX_PIXELS = 1 << 28
_DEFAULT_QUALITY = 95
_ORIENTATION_TAG = 0x0112
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")


@dataclass(frozen=True)
class Options:
    """How images are packed; see `pack`."""

    short_side: int | None = None
    max_side: int | None = None
    quality: int | None = None
    encode: Encode = "keep"
    exif: Exif = "apply"
    max_pixels: int = MAX_PIXELS
    tiles: bool = True
    strip: bool = False
    background: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "max_side", "max_pixels", "quality"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
            if value is not None and name != "quality" and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it may be 1 to 100")
        if self.encode not in get_args(Encode) or self.exif not in get_args(Exif):
            raise ValueError(
                f"encode is {self.encode!r}, exif is {self.exif!r}; encode may be {', '.join(get_args(Encode))}, "
                f"exif {' or '.join(get_args(Exif))}"
            )
        if self.quality is not None and self.encode == "raw":
            raise ValueError("a quality goes with JPEG; raw images are kept exactly")
        if self.background is not None:
            shades = tuple(self.background)
            if len(shades) != 3 or not all(isinstance(shade, int) and 0 <= shade <= 255 for shade in shades):
                raise ValueError(f"background is {self.background}; it takes red, green and blue, 0 to 255 each")
        if self.strip and not self.tiles:
            raise ValueError("strip goes with tiles: images that are not re-cut keep all of their bytes")

    def target_size(self, size: Size) -> Size:
        """(height, width) that an upright image of `size` is stored with; images are never enlarged."""
        if self.short_side is not None and min(size) > self.short_side:
            size = geometry.short_side_size(size, self.short_side)
        if self.max_side is not None and max(size) > self.max_side:
            height, width = size
            longest = max(size)
            size = (max(1, height * self.max_side // longest), max(1, width * self.max_side // longest))
        return size


Shape = tuple[int, int, int]
"""(height, width, channels)."""


class Prepared(NamedTuple):
    """An item that is ready to be written.

    name: of the sample. fields: of its record, without the name: the image first, if it has one, then the masks. cells:
    its values in the columns.
    """

    name: str
    fields: list[record.Field]
    cells: dict[str, Any]


class LeftOut(NamedTuple):
    """An item that can't be packed, and why."""

    item: Item
    reason: str


class _Facts(NamedTuple):
    """What an image file says of itself."""

    is_jpeg: bool
    size: Size
    orientation: int
    transparent: bool


@contextlib.contextmanager
def libraries_for_packing() -> Iterator[None]:
    """Lift Pillow's own pixel limit (ours is `max_pixels`) and silence remarks: reasons go to the quarantine list.

    Pillow loads its formats at the first use, which two threads must not do at once.
    """
    Image.init()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with warnings.catch_warnings(), dicom.quiet():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        cv2.utils.logging.setLogLevel(level)


def common_shape(source: Source, options: Options, threads: int) -> Shape | None:
    """The shape that all images will be stored with, None if they differ; headers only, damage is skipped.

    Of a dataset, those that were looked at.
    """

    spec = source.fields.image
    if spec is None:
        return None

    def shape_of(item: Item | Mapping[str, Any]) -> Shape | None:
        try:
            if source.store is not None and isinstance(item, Item):
                (height, width), channels = source.store.columns["size"].view(item.sample or 0).tolist(), spec.channels
                if "image" in source.store.columns:
                    channels = source.store.columns["image"].shape[2]
            else:
                image = (source.read(item) if isinstance(item, Item) else item)["image"]
                if isinstance(image, Image.Image):  # its pixels are read when it is packed, and only then
                    height, width, channels = image.height, image.width, spec.channels
                elif isinstance(image, bytes):
                    facts = _identify(image, options)
                    (height, width), channels = geometry.upright_size(facts.size, facts.orientation), 3
                else:
                    height, width, channels = _pixels(image, spec, options).shape
        except (OSError, FastloadError):
            return None
        return *options.target_size((height, width)), channels

    common: Shape | None = None
    items: Iterable[Any] = source.first or (item for item in source.items if item.problem is None)
    shapes = ordered_map(shape_of, items, threads=threads, ahead=16 * threads, name="fastload-sizes")
    with contextlib.closing(shapes):
        for shape in shapes:
            if shape is not None and common is not None and shape != common:
                return None
            common = common or shape
    return common


def prepare(item: Item, source: Source, *, options: Options, fixed: Shape | None) -> Prepared | LeftOut:
    """Read an item and make its fields; what can't be packed comes as `LeftOut`. fixed: the shape of a raw column."""
    if item.problem is not None:
        return LeftOut(item, item.problem)
    store, sample = source.store, item.sample
    try:
        if store is not None and sample is not None:
            item = item._replace(name=store.name(sample))
            contents, cells = _stored(sample, store, options)
        else:
            contents, cells = source.read(item), {}
        return _prepared(item, contents, cells, source, options, fixed)
    except OSError as error:
        return LeftOut(item, f"it can't be read: {error.strerror or error}")
    except (FastloadError, MemoryError) as error:
        return LeftOut(item, str(error) or "not enough memory to decode it")


def _prepared(
    item: Item,
    contents: dict[str, Any],
    cells: dict[str, Any],
    source: Source,
    options: Options,
    fixed: Shape | None,
) -> Prepared:
    """contents: values by their fields' names, or fields out of a store. cells: of its columns."""
    schema = source.fields
    kept: list[record.Field] = []
    whole = size = None
    cells = {"label": item.labels or (math.nan if source.real else -1,)} | cells
    if schema.image is not None:
        found, pixels = _image(contents["image"], schema.image, options)
        field, size = _make_field(found, options)
        if fixed is not None and (*size, field.channels) != fixed:
            raise DecodeError(f"it is {size[0]} x {size[1]} pixels, its header and the other images are {fixed[:2]}")
        whole = geometry.upright_size((found.height, found.width), found.orientation)
        field, outcome = tiled(field, pixels if field is found else None, options)
        cells |= {"size": size, "bytes": len(field.payload), "tiles": outcome}
        cells["checksum"] = record.checksum(field.payload)
        if fixed is None:
            kept.append(field)
        else:
            cells["image"] = np.frombuffer(field.payload, np.uint8).reshape(fixed)
    for spec in schema.of_kind("mask"):
        values = _mask(contents[spec.name], whole, size, source, spec, options.max_pixels)
        kept.append(blocks.field_of(values))
        cells |= {f"{spec.name}_max": int(values.max()), f"{spec.name}_checksum": record.checksum(kept[-1].payload)}
    others: list[record.Field] = []
    for spec in schema.others:
        value = contents.get(spec.name)
        if spec.column is None:
            others.append(_field(value, spec, whole, size, options))
        elif spec.column not in cells or value is not None:
            cells[spec.column] = cell(spec, value)
    if others:
        cells["others_checksum"] = record.joint_checksum(record.checksum(field.payload) for field in others)
    return Prepared(item.name, kept + others, cells)


def _field(value: Any, spec: Spec, whole: Size | None, size: Size | None, options: Options) -> record.Field:
    """A value as a field of a record. whole, size: of the upright image, before and after it was shrunk."""
    if spec.kind == "image":
        return _make_field(_image(value, spec, options)[0], options)[0]
    if spec.kind == "boxes" and whole is not None and size is not None:
        if isinstance(value, record.Field):
            found = arrays.read(value)
        else:
            found = boxes.checked(boxes.from_format(value, spec.format or "XYWH"), whole)
        scaled = found if size == whole else boxes.moved(found, [Plan.whole(whole)._replace(size=size)])
        return arrays.field_of(scaled)
    return value if isinstance(value, record.Field) else encode(spec, value)


def _stored(index: int, store: Store, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a store has of a sample: fields of its record or masks' values by name, and cells of its columns."""
    sample = store[index]
    contents: dict[str, Any] = {**sample.fields}
    if store.schema.image is not None:
        contents["image"] = _stored_field(store, index, options)
    contents |= {name: blocks.read(sample[name]) for name in store.masks}
    columns = {spec.column for spec in store.schema.others if spec.column is not None}
    return contents, {name: store.columns[name][index] for name in columns}


def _image(content: Any, spec: Spec, options: Options) -> tuple[record.Field, Pixels | None]:
    """An image as a field: of a store, of a file's bytes or of pixels; see `_kept_field` for what goes with it."""
    if isinstance(content, record.Field):
        return content, None
    if isinstance(content, bytes):
        return _kept_field(content, _identify(content, options), options)
    pixels = _pixels(content, spec, options)
    _check_pixels(pixels.shape[:2], options)
    return _lossless_field(pixels) if spec.type and options.encode == "keep" else _raw_field(pixels), None


def _pixels(content: Any, spec: Spec, options: Options) -> Pixels:
    """Decoded pixels as an array (height, width, channels)."""
    if isinstance(content, Image.Image):
        content = np.atleast_3d(_of_pillow(content, options.background))
    elif isinstance(content, torch.Tensor) and content.dim() == 3:
        content = _of_torch(content).transpose(1, 2, 0)
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.ndim != 3:
        what = f"{content.dtype} {tuple(content.shape)}" if hasattr(content, "shape") else type(content).__name__
        raise SourceError(f"{spec.name!r} is {what}; an image is uint8, (3 or 1, height, width) as a tensor")
    pixels: Pixels = content
    if pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise SourceError(f"{spec.name!r} has the shape {content.shape} (height, width, channels); channels are 1 or 3")
    if spec.type and pixels.shape[2] > spec.channels:
        raise SourceError(f"{spec.name!r} has colours, the images before it are grey; let the dataset give one kind")
    return np.repeat(pixels, 3, 2) if spec.type and pixels.shape[2] < spec.channels else pixels


def _of_pillow(picture: Image.Image, background: tuple[int, int, int] | None) -> Pixels:
    """The pixels of an opened picture, grey or RGB; reading its file may fail only now."""
    try:
        if picture.mode not in ("L", "RGB"):
            on_colour = background is not None and _is_transparent(picture)
            picture = _laid_on(picture, background) if background and on_colour else picture.convert("RGB")
        return np.asarray(picture)
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error


def _of_torch(tensor: torch.Tensor) -> npt.NDArray[Any]:
    try:
        values: npt.NDArray[Any] = tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise SourceError(f"a tensor of {tensor.dtype}, {tensor.layout}, is none of pixels: {error}") from error
    return values


def _lossless_field(pixels: Pixels) -> record.Field:
    """Pixels as PNG, if that halves them: it takes its time to decode."""
    raw = _raw_field(pixels)
    if pixels.shape[2] == 3:
        fits, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        if fits and 2 * len(data) < len(raw.payload):
            return raw._replace(codec=record.ENCODED, payload=data.tobytes())
    return raw


def _mask(content: Any, whole: Size | None, size: Size | None, source: Source, spec: Spec, limit: int) -> blocks.Values:
    """The values of a mask, checked against the image's upright size `whole` and the classes, as large as `size`."""
    if isinstance(content, torch.Tensor):
        content = _of_torch(content)
    values = masks.decode(content, limit) if isinstance(content, bytes) else masks.narrowed(_as_array(content))
    if whole is None or size is None:
        return values
    if values.shape != whole:
        raise DecodeError(
            f"the mask is {values.shape[1]} x {values.shape[0]} pixels, its image {whole[1]} x {whole[0]} "
            "(width x height, upright)"
        )
    if spec.name == "mask" and source.classes is not None:
        beyond = values[(values >= len(source.classes)) & (values != spec.fill)]
        if beyond.size:
            raise DecodeError(
                f"the mask has the value {beyond.max()}, and the {len(source.classes)} classes are 0 to "
                f"{len(source.classes) - 1} ({spec.fill} means: ignore)"
            )
    return masks.resized(values, size) if size != whole else values


def _as_array(content: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(content)
    except Exception as error:  # a damaged file that Pillow has opened, lists of several lengths, ...
        raise DecodeError(f"the mask is damaged, or no array: {error}") from error


def _stored_field(store: Store, index: int, options: Options) -> record.Field:
    """A sample's image field as it lies in a store, without tiles; its checksum is checked."""
    column = store.columns.get("image")
    if column is not None:
        pixels = column[index]
        if record.checksum(pixels.data) != store.columns["checksum"].view(index):
            raise DecodeError("the pixels differ from what was packed (checksum mismatch)")
        field = _raw_field(pixels)
    else:
        field = store[index]["image"]._replace(tiles=b"")
    _check_pixels((field.height, field.width), options)
    return field if options.exif == "apply" else field._replace(orientation=1)


def _identify(data: bytes, options: Options) -> _Facts:
    """Format, size and orientation from the file's header, by Pillow; DecodeError where there is no (whole) image."""
    try:
        with _opened(data) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            size = (image.height, image.width)
            transparent = _is_transparent(image)
        _check_pixels(size, options)
        if not is_jpeg:
            with _opened(data) as image:
                image.verify()
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("not an image, or none of JPEG, PNG, BMP, PPM, WebP, TIFF and GIF") from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error
    return _Facts(is_jpeg, size, _orientation(data) if options.exif == "apply" else 1, transparent)


def _check_pixels(size: Size, options: Options) -> None:
    if size[0] * size[1] > options.max_pixels:
        raise DecodeError(
            f"{size[1]} x {size[0]} pixels are more than the limit of {options.max_pixels}; --max-pixels raises it"
        )


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""
    with _opened(data) as image:
        if image.format == "TIFF":
            return 1  # whoever decodes it turns it upright: libtiff does, and so does Pillow
        if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type" not in data:
            return 1  # looking behind the pixels, as `getexif` does, would decode them
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # garbage in EXIF does not make the image worse
            return 1
    return orientation if orientation in range(1, 9) else 1


def _make_field(kept: record.Field, options: Options) -> tuple[record.Field, Size]:
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
        pixels = scratch("original", height * width * 3).reshape(height, width, 3) if options.tiles else None
        codec = record.JPEG if jpeg.check(data, pixels) else record.ENCODED
    if codec == record.ENCODED:
        decode.decode_other(data, (height, width, 3))
    return record.Field(codec, data, facts.orientation, 3, 0, width, height), pixels


def _on_background(data: bytes, colour: tuple[int, int, int]) -> bytes:
    """An image with transparency laid on a colour, as PNG."""
    try:
        with _opened(data) as image:
            pixels = np.asarray(_laid_on(image, colour))
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error
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
        return _raw_field(pixels)
    height, width = pixels.shape[:2]
    data = jpeg.encode(np.broadcast_to(pixels, (height, width, 3)), options.quality or _DEFAULT_QUALITY)
    return record.Field(record.JPEG, data, 1, 3, record.REENCODED, width, height)


def _raw_field(pixels: Pixels) -> record.Field:
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
        cut = recut(bytes(field.payload), strip=options.strip, orientation=field.orientation)
        recut_field = field._replace(payload=cut.data, tiles=cut.tiles, checksum=record.checksum(cut.data))
        whole = decode.pixels(field, keep=True) if pixels is None else pixels
        if not (np.array_equal(decode.pixels(recut_field), whole) and decode.tiles_show(recut_field, whole)):
            raise Untouched(tiles.PIXELS)
    except Untouched as reason:
        return field, reason.outcome
    except DecodeError:
        return field, tiles.PIXELS
    return recut_field, tiles.RECUT
