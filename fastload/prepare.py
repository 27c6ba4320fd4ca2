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
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from . import arrays, blocks, boxes, dicom, geometry, headers, masks, record
from .errors import DecodeError, FastloadError
from .fields import Spec, cell, encode
from .geometry import Plan, Size
from .image_fields import (
    check_pixels,
    checked_values,
    cut_to_8_bits,
    deep,
    identify,
    image_field,
    made_field,
    of_torch,
    own_form,
    pixels_of,
    raw_field,
    shallow,
)
from .items import Item, Source
from .options import Form, Options, Shape
from .store import Store
from .workers import ordered_map

_LONGEST_REASON = 500
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
                    facts = identify(image, options)
                    (height, width), channels = geometry.upright_size(facts.size, facts.orientation), 3
                else:
                    values = cut_to_8_bits(checked_values(image, options))
                    height, width, channels = pixels_of(values, spec, options).shape
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
                dtype, channels = own_form(image(), options)
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
        self.pixels_of = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, pixels: int, limit: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self.pixels_of or self.pixels_of + pixels <= limit)
            self.pixels_of += pixels
        try:
            yield
        finally:
            with self._changed:
                self.pixels_of -= pixels
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
        made = deep(image, options, form) if form.deep else shallow(image, schema.image, options)
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
        return made_field(image_field(value, spec, options)[0], options)[0]
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


def _mask(content: Any, whole: Size | None, size: Size | None, source: Source, spec: Spec, limit: int) -> blocks.Values:
    """The values of a mask, checked against the image's upright size `whole` and the classes, as large as `size`."""
    if isinstance(content, torch.Tensor):
        content = of_torch(content)
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
    if "image" in store.columns:
        field = raw_field(store.raw_image(index))
    else:
        field = store[index]["image"]
        if field.codec != record.BLOCKS:
            field = field._replace(tiles=b"")
    check_pixels((field.height, field.width), options)
    return field if options.exif == "apply" else field._replace(orientation=1)
