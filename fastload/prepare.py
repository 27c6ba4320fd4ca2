"""One item of a source as what a store keeps of it: read, judged, perhaps re-encoded or re-cut, its masks beside it.

Before an image is kept it is decoded, so damage is found now, not in the middle of a training run. What can't be packed
comes out as `LeftOut`, with its reason.

What a stranger's file may cost is limited. Nothing is decoded that has more pixels than `max_pixels`, and all threads
together work on no more of them at a time: below 1 GB of memory with 2**26 (8-bit images; Python and torch are 300 MB
of it). No file is read that has more than 64 MB and 4 bytes for each pixel of that limit. A JPEG has up to 100 scans
(`jpeg.MAX_SCANS`) and 16 segments of EXIF data; no header takes more than half a million reads (`headers`). Links are
followed, as torchvision's ImageFolder does; what they lead to is packed if it is an image, and else never quoted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from . import arrays, blocks, boxes, decode, dicom, geometry, headers, jpeg, masks, record, tiles
from .blocks import Values
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
_LONGEST_REASON = 500
_PIXELS_KEPT = 1 << 25  # a larger JPEG is decoded once more instead
_BLOCKS_AT_LEAST, _PIXELS_PER_BLOCK = 1 << 20, 32  # re-cut are JPEGs of so many blocks, or as max_pixels allows
_ORIENTATION_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 0x0112, 0x0102, 0x0153
_PNG_BITS = 24  # where a PNG's header says how many; the next byte is its kind of colours
_PNG_GRAY_AND_ALPHA = 4
_PPM_HEADER = re.compile(rb"P[56]" + 2 * rb"(?:\s|#[^\n]*\n)+\d+" + rb"(?:\s|#[^\n]*\n)+(\d+)")
_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


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
    depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "max_side", "max_pixels", "quality", "depth"):
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
        if self.depth not in (None, 8, 16):
            raise ValueError(f"depth is {self.depth}; images may have 8 or 16 bits")
        if self.depth == 16 and (self.quality is not None or self.encode == "jpeg"):
            raise ValueError("depth is 16, and a JPEG has 8 bits; leave quality and encode out, or pack with depth 8")
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


class Form(NamedTuple):
    """What all images of a store are: of type dtype ("uint8", "uint16" or "int16"); of 16 bits also the channels."""

    dtype: str = "uint8"
    channels: int = 3

    @property
    def deep(self) -> bool:
        """Whether they have 16 bits."""
        return self.dtype != "uint8"


_EIGHT_BITS = Form()


class Prepared(NamedTuple):
    """An item that is ready to be written.

    name: of the sample. fields: of its record, without the name: the image first, if it has one, then the masks. cells:
    its values in the columns. cut: whether its image has 16 bits of which 8 are kept.
    """

    name: str
    fields: list[record.Field]
    cells: dict[str, Any]
    cut: bool


class LeftOut(NamedTuple):
    """An item that can't be packed, and why."""

    item: Item
    reason: str


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
                height, width = source.store.columns["size"].view(item.sample or 0).tolist()
                channels = source.store.image_channels
            else:
                image = (source.read(item) if isinstance(item, Item) else item)["image"]
                if isinstance(image, Image.Image):  # its pixels are read when it is packed, and only then
                    height, width, channels = image.height, image.width, spec.channels
                elif isinstance(image, bytes):
                    facts = _identify(image, options)
                    (height, width), channels = geometry.upright_size(facts.size, facts.orientation), 3
                else:
                    height, width, channels = _pixels(_cut(_checked_values(image, options)), spec, options).shape
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


def form_of(source: Source, options: Options) -> Form:
    """What the images of a source are stored as: what the first one is that can be read, unless the options say it."""
    spec = source.fields.image
    if spec is None or options.depth == 8 or options.quality is not None or options.encode == "jpeg":
        return Form()
    with libraries_for_packing():
        for image in _images(source, options):
            with contextlib.suppress(OSError, FastloadError, MemoryError):
                dtype, channels = _own_form(image(), options)
                return Form("uint16" if dtype == "uint8" and options.depth == 16 else dtype, channels)
    return Form()


def _images(source: Source, options: Options) -> Iterator[Callable[[], Any]]:
    """What reads each image of a source, from the first: files' bytes, pixels, or fields of a store."""
    if source.first:
        yield from (functools.partial(sample.__getitem__, "image") for sample in source.first)
        return
    for item in (item for item in source.items if item.problem is None):
        if source.store is not None and item.sample is not None:
            yield functools.partial(_stored_field, source.store, item.sample, options)
        else:
            yield functools.partial(_read_image, source, item)


def _read_image(source: Source, item: Item) -> Any:
    return source.read(item)["image"]


def _own_form(image: Any, options: Options) -> Form:
    if isinstance(image, record.Field) and image.codec in (record.JPEG, record.ENCODED) and options.depth == 16:
        image = bytes(image.payload)
    if isinstance(image, bytes):
        facts = _identify(image, options)
        return Form("uint16" if facts.bits == 16 else "uint8", 1 if facts.gray else 3)
    if isinstance(image, record.Field):
        return Form(blocks.dtype_of(image).name if image.codec == record.BLOCKS else "uint8", image.channels)
    if isinstance(image, Image.Image):  # its pixels are read when it is packed, and only then
        return Form("uint16" if image.mode == "I;16" else "uint8", 1 if image.mode in ("L", "I;16") else 3)
    image = _checked_values(image, options)
    return Form(image.dtype.name, image.shape[2])


def prepare(
    item: Item, source: Source, *, options: Options, fixed: Shape | None = None, form: Form = _EIGHT_BITS
) -> Prepared | LeftOut:
    """Read an item and make its fields; what can't be packed comes as `LeftOut`.

    fixed: the shape of a raw column. form: what all images of the store are, from `form_of`.
    """
    if item.problem is not None:
        return LeftOut(item, item.problem)
    store, sample = source.store, item.sample
    try:
        if store is not None and sample is not None:
            item = item._replace(name=store.name(sample))
            contents, cells = _stored(sample, store, options)
        else:
            contents, cells = source.read(item), {}
        with _at_work(_pixel_count(contents.get("image")), options.max_pixels):
            return _prepared(item, contents, cells, source, options, fixed, form)
    except OSError as error:
        return LeftOut(item, f"it can't be read: {error.strerror or error}")
    except (FastloadError, MemoryError) as error:
        return LeftOut(item, _one_line(str(error)) or "not enough memory to decode it")


def _one_line(reason: str) -> str:
    """A reason that can be printed, whatever of a file got into it."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in reason)
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


class _AtWork:
    """How many pixels all threads together may have under work: as many as one image may have.

    So what packing takes of memory does not depend on the number of threads.
    """

    def __init__(self) -> None:
        self._pixels = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, pixels: int, limit: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._pixels or self._pixels + pixels <= limit)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_at_work = _AtWork()


def _pixel_count(image: Any) -> int:
    """How many pixels an image will have in memory; 0 for those that are there already, or can't be read."""
    if isinstance(image, record.Field):
        return image.height * image.width
    if not isinstance(image, bytes):
        return 0
    try:
        with headers.opened(image) as opened:
            return int(opened.height * opened.width)
    except DecodeError:
        return 0


def _prepared(
    item: Item,
    contents: dict[str, Any],
    cells: dict[str, Any],
    source: Source,
    options: Options,
    fixed: Shape | None,
    form: Form,
) -> Prepared:
    """contents: values by their fields' names, or fields out of a store. cells: of its columns."""
    schema = source.fields
    kept: list[record.Field] = []
    whole = size = None
    cut = False
    cells = {"label": item.labels or (math.nan if source.real else -1,)} | cells
    if schema.image is not None:
        image = contents["image"]
        made = _deep(image, options, form) if form.deep else _shallow(image, schema.image, options)
        field, outcome, whole, size, cut = made
        if fixed is not None and (*size, field.channels) != fixed:
            raise DecodeError(f"it is {size[0]} x {size[1]} pixels, its header and the other images are {fixed[:2]}")
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
        elif spec.name in contents:
            cells[spec.column] = cell(spec, value)
    if others:
        cells["others_checksum"] = record.joint_checksum(record.checksum(field.payload) for field in others)
    return Prepared(item.name, kept + others, cells, cut)


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


def _shallow(image: Any, spec: Spec, options: Options) -> _Made:
    """An image as a store of 8 bits keeps it."""
    orientation, deep = 1, False
    if isinstance(image, bytes):
        deep = _identify(image, options).bits == 16
    elif not isinstance(image, record.Field):
        values = _checked_values(image, options)
        image, deep = _cut(values), values.dtype == np.uint16
    elif image.codec == record.BLOCKS:
        image, orientation, deep = _cut(decode.pixels(image)), image.orientation, True
    kept, pixels = _image(image, spec, options)
    kept = kept._replace(orientation=orientation) if orientation > 1 else kept
    field, size = _make_field(kept, options)
    stored, outcome = tiled(field, pixels if field is kept else None, options)
    return _Made(stored, outcome, geometry.upright_size((kept.height, kept.width), kept.orientation), size, deep)


def _cut(values: Values) -> Values:
    """The upper 8 bits of 16."""
    if values.dtype == np.int16:
        raise DecodeError("its values are int16, and the store has 8 bits; pack with --depth 16")
    return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values


def _deep(image: Any, options: Options, form: Form) -> _Made:
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
        return _checked_values(image, options), 1
    facts = _identify(image, options)
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


def _checked_values(content: Any, options: Options) -> Values:
    """Pixels that a source gives, (height, width, channels) in this machine's byte order, if they can be packed."""
    values = _as_array(content, options)
    fits = isinstance(values, np.ndarray) and values.ndim == 3 and values.shape[2] in (1, 3) and values.size > 0
    if not fits or values.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.int16):
        what = f"{content.dtype} {tuple(content.shape)}" if hasattr(content, "shape") else type(content).__name__
        raise SourceError(
            f"'image' is {what}; an image is uint8, uint16 or int16, (3 or 1, height, width) as a tensor, "
            "(height, width, 3 or 1) as an array"
        )
    _check_pixels(values.shape[:2], options)
    native: Values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native


def _as_array(content: Any, options: Options) -> Any:
    """Decoded pixels as an array (height, width, channels); what is no picture as it is."""
    if isinstance(content, Image.Image):
        return np.atleast_3d(_of_pillow(content, options.background))
    if isinstance(content, torch.Tensor) and content.dim() == 3:
        return _of_torch(content).transpose(1, 2, 0)
    return content


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
    values = masks.decode(content, limit) if isinstance(content, bytes) else masks.narrowed(_mask_array(content))
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


def _mask_array(content: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(content)
    except Exception as error:  # a damaged file that Pillow has opened, lists of several lengths, ...
        raise DecodeError(f"the mask is damaged, or no array: {error}") from error


def _stored_field(store: Store, index: int, options: Options) -> record.Field:
    """A sample's image field as it lies in a store, without a JPEG's tiles; its checksum is checked."""
    column = store.columns.get("image")
    if column is not None:
        pixels = column[index]
        if record.checksum(pixels.data) != store.columns["checksum"].view(index):
            raise DecodeError("the pixels differ from what was packed (checksum mismatch)")
        field = _raw_field(pixels)
    else:
        field = store[index]["image"]
        if field.codec != record.BLOCKS:
            field = field._replace(tiles=b"")
    _check_pixels((field.height, field.width), options)
    return field if options.exif == "apply" else field._replace(orientation=1)


def _identify(data: bytes, options: Options) -> _Facts:
    """Format, size and orientation from the file's header, by Pillow; DecodeError where there is no (whole) image."""
    try:
        with headers.opened(data) as image:
            is_jpeg = image.format in ("JPEG", "MPO")
            size = (image.height, image.width)
            transparent = _is_transparent(image)
            bits = _bits(image, data)
            gray = _is_gray(image, data) and not (transparent and options.background is not None)
        _check_pixels(size, options)
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


def _check_pixels(size: Size, options: Options) -> None:
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
        return _raw_field(pixels)
    height, width = pixels.shape[:2]
    data = jpeg.encode(np.broadcast_to(pixels, (height, width, 3)), options.quality or _DEFAULT_QUALITY)
    return record.Field(record.JPEG, data, 1, 3, record.REENCODED, width, height)


def _raw_field(pixels: Values) -> record.Field:
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
