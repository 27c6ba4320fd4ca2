"""Packing: sources become a store. Each file is read, judged and perhaps re-encoded by a thread; one thread writes.

JPEGs are re-cut into tiles (`recut`), which changes no pixel. Otherwise a file's bytes are kept as they are unless a
smaller side, a quality or an encoding is asked for. Before it is kept an image is decoded, so damage is found now, not
in the middle of a training run. What can't be packed is left out with its reason, and everything else is packed.

The final name appears when the store is complete. An interrupted pack leaves `NAME.partial`; the same command goes on
from it, and any other source or option starts over.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, get_args

import cv2
import filelock
import numpy as np
from PIL import Image, UnidentifiedImageError

from . import blocks, decode, geometry, jpeg, masks, record, splits, tiles
from .buffers import scratch
from .doctor import usable_cores
from .errors import DecodeError, FastloadError, PackError, SourceError
from .geometry import Plan, Size
from .jpeg import Pixels
from .sources import Format, Item, Source, open_source
from .store import ColumnSpec, Store, looks_like_store
from .store_writer import StoreWriter
from .workers import ordered_map

Encode = Literal["keep", "jpeg", "raw"]
Exif = Literal["apply", "ignore"]

MAX_PIXELS = 1 << 28
_DEFAULT_QUALITY = 95
_ORIENTATION_TAG = 0x0112
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")


@dataclass(frozen=True)
class PackReport:
    """What a pack did: samples and classes in the store, files left out, bytes of the store, seconds, remarks."""

    samples: int
    classes: int
    quarantined: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


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


class _Prepared(NamedTuple):
    """An item that is ready to be written.

    image: its image's field. outcome: what became of it (`tiles.OUTCOMES`). size: its upright size. masks: its masks'
    fields. largest: the largest value of each.
    """

    item: Item
    image: record.Field
    outcome: int
    size: Size
    masks: list[record.Field]
    largest: list[int]


class _LeftOut(NamedTuple):
    item: Item
    reason: str


class _Facts(NamedTuple):
    """What an image file says of itself."""

    is_jpeg: bool
    size: Size
    orientation: int
    transparent: bool


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Format = "auto",
    root: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    image_column: str | int | None = None,
    label_columns: Sequence[str] | None = None,
    part: str | None = None,
    short_side: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    encode: Encode = "keep",
    exif: Exif = "apply",
    max_pixels: int = MAX_PIXELS,
    tiles: bool = True,
    strip: bool = False,
    background: tuple[int, int, int] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Pack images and labels into one store.

    source: class folders, a folder without labels, a label list, pairs of image and mask, a folder of labelme files, or
        a store to be packed otherwise (`sources.open_source` says how they are told apart; `format` insists).
    destination: the store's file name.
    root: where the names of a list start; its own folder by default.
    masks: a folder with a mask for each image of `source`, of the same name. labels: a file with the names of the
        values of masks, a line each.
    image_column, label_columns: of a list with a header: the names of its columns. part: "train" or "test" of MNIST
        and CIFAR.
    short_side, max_side: shrink images whose shorter or longer side is larger, in pixels; never enlarges.
    quality: re-encode every image as a JPEG of this quality, 1 to 100; 95 for images that are shrunk.
    encode: "keep" bytes as they are where possible, make everything "jpeg", or store "raw" pixels (uint8 RGB); raw
        images of one size become a column, whose batches are a single gather.
    exif: "apply" an image's EXIF orientation when it is decoded, or "ignore" it (not TIFF's: its decoders apply it).
    max_pixels: images with more pixels are left out.
    tiles: re-cut JPEGs, without loss, so that crops can be read by themselves. Every one is decoded and compared; what
        can't be re-cut is kept as it is, and `info` says why. strip: drop EXIF, ICC profiles and comments meanwhile.
    background: the colour (red, green, blue) on which images with transparency are laid; they are stored as PNG without
        it. By default transparency is dropped as `Image.convert("RGB")` does, and the colours behind it appear.
    workers: threads, all usable cores by default.
    overwrite: replace an existing store (and no other file) when the new one is complete.
    progress: called with (items done, items in all).

    Raises:
        ValueError, TypeError: an option makes no sense.
        SourceError: the source is missing or empty, or nothing in it is an image.
        FileExistsError, FileNotFoundError: `destination` exists, or its folder doesn't.
        PackError: the store can't be written, another pack is writing it, or numba is missing.

    Example:
        >>> fastload.pack("images/", "db.lmdb", short_side=256)
    """
    options = Options(short_side, max_side, quality, encode, exif, max_pixels, tiles, strip, background)
    final = _checked_destination(source, destination, overwrite)
    _check(options, workers)
    listed = open_source(
        source,
        format,
        root,
        masks=masks,
        labels=labels,
        image_column=image_column,
        label_columns=label_columns,
        part=part,
        max_pixels=max_pixels,
        ignore=_files_of(final),
    )
    return _pack(listed, final, options, workers, progress)


def pack_splits(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    shares: str | Mapping[str, float],
    *,
    seed: int = 0,
    stratify: bool = True,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, PackReport]:
    """Divide a source into parts and pack each into a store of its own: for "db.lmdb" db-train.lmdb and so on.

    A file that is listed twice is never in two parts. The same source, shares and seed give the same parts anywhere.

    shares: of each part, as a dict or as a text such as "train=0.8,val=0.1,test=0.1"; they sum to 1.
    stratify: divide every class by these shares (samples without a label, and with several or real labels, are one
        class). options: of `pack`.

    Returns a report for each part, by its name; see `pack` for what is raised.

    Example:
        >>> fastload.pack_splits("images/", "db.lmdb", {"train": 0.9, "val": 0.1}, short_side=256)
    """
    shares = splits.parse_shares(shares) if isinstance(shares, str) else splits.checked_shares(shares)
    stem, suffix = os.path.splitext(os.fspath(destination))
    finals = {name: _checked_destination(source, f"{stem}-{name}{suffix}", True) for name in shares}
    own = {field.name for field in fields(Options)}
    chosen = Options(**{name: value for name, value in options.items() if name in own})
    _check(chosen, workers)
    listed = open_source(
        source,
        **{name: value for name, value in options.items() if name not in own or name == "max_pixels"},
        ignore=[file for final in finals.values() for file in _files_of(final)],
    )
    classes = [item.labels[0] if len(item.labels) == 1 and not listed.real else None for item in listed.items]
    images = [listed.image_of(item) for item in listed.items]
    parts = splits.split(classes, images, shares, seed=seed, stratify=stratify)
    for name, indices in parts.items():
        if not len(indices):
            raise SourceError(f"no sample is left for {name!r}, {shares[name]:g} of {len(images)}; leave that part out")
    sources = {
        name: listed._replace(items=[listed.items[index] for index in indices.tolist()])
        for name, indices in parts.items()
    }
    done = {name for name, part in sources.items() if not overwrite and _is_packed(part, finals[name], chosen)}
    for name in sources.keys() - done:
        _checked_destination(source, finals[name], overwrite)
    return {
        name: _report(part, finals[name]) if name in done else _pack(part, finals[name], chosen, workers, progress)
        for name, part in sources.items()
    }


def _is_packed(source: Source, final: str, options: Options) -> bool:
    """Whether a store is there already, of this very source and these options: an interrupted run made it."""
    try:
        return Store(final).manifest.get("packed") == _fingerprint(source, options)
    except (OSError, FastloadError):
        return False


def _fingerprint(source: Source, options: Options) -> str:
    """What tells a source and how it is packed from others."""
    known = json.dumps([source.digest(), asdict(options), version("fastload")])
    return f"{record.checksum(known.encode()):016x}"


def _pack(
    listed: Source,
    final: str,
    options: Options,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> PackReport:
    started = time.perf_counter()
    if listed.store is not None and listed.masks and options.exif == "ignore":
        raise ValueError("exif is 'ignore', but the masks of a store are upright, as its images then aren't; pack anew")
    created = _creation_time()
    with _only_pack(final), _libraries_for_packing():
        _write(listed, final, options, created, workers or usable_cores(), progress)
    return _report(listed, final, time.perf_counter() - started)


def _report(listed: Source, final: str, seconds: float = 0.0) -> PackReport:
    store = Store(final)
    return PackReport(
        samples=len(store),
        classes=_count_classes(store),
        quarantined=store.manifest["quarantined"],
        bytes=os.path.getsize(final),
        seconds=seconds,
        notes=tuple(listed.notes),
    )


def _check(options: Options, workers: int | None) -> None:
    if workers is not None and not isinstance(workers, int):
        raise TypeError(f"workers is {workers!r}; it must be a whole number")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; packing takes at least 1 thread")
    if options.tiles and options.encode != "raw":
        _check_recut()


def _files_of(final: str) -> tuple[str, ...]:
    """What is written on the way to a store, which is no part of a source."""
    return final, f"{final}.partial", f"{final}.partial.lock"


def _check_recut() -> None:
    """Say what to do if numba is missing or broken, before anything is written."""
    try:
        from . import recut  # noqa: F401
    except ImportError as error:
        raise PackError(
            f'JPEGs are re-cut with numba, which can\'t be imported ({error}): pip install "numba>=0.61", '
            "or pack with --no-tiles"
        ) from error


def _checked_destination(source: str | os.PathLike[str], destination: str | os.PathLike[str], overwrite: bool) -> str:
    """The absolute path of the store to write, if it may be written."""
    final = os.path.abspath(destination)
    if os.path.isdir(final):
        raise FileExistsError(f"{final} is a folder; give the store a file name, {os.path.join(final, 'db.lmdb')} say")
    if os.path.exists(final) and not (os.path.isfile(final) and looks_like_store(final)):
        raise FileExistsError(f"{final} exists already and is no store; choose another name")
    if os.path.exists(final) and not overwrite:
        raise FileExistsError(f"{final} exists already; choose another name, or replace it with --overwrite")
    if not os.path.isdir(os.path.dirname(final)):
        raise FileNotFoundError(f"the folder {os.path.dirname(final)} does not exist; make it first")
    if os.path.exists(final) and os.path.exists(source) and os.path.samefile(source, final):
        raise FileExistsError(f"{final} is the source too; give the new store another name")
    return final


@contextlib.contextmanager
def _only_pack(final: str) -> Iterator[None]:
    """Hold the right to write `final`; PackError if another process has it."""
    path = f"{final}.partial.lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise PackError(f"another pack is writing {final} at this moment; let it finish, or stop it") from error
    except OSError as error:
        raise PackError(f"{final} can't be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it on release
            os.unlink(path)
        lock.release()


@contextlib.contextmanager
def _libraries_for_packing() -> Iterator[None]:
    """Lift Pillow's own pixel limit (ours is `max_pixels`) and silence remarks: reasons go to the quarantine list.

    Pillow loads its formats at the first use, which two threads must not do at once.
    """
    Image.init()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        cv2.utils.logging.setLogLevel(level)


def _write(
    source: Source,
    final: str,
    options: Options,
    created: datetime,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    fingerprint = _fingerprint(source, options)
    if options.encode == "keep" and options.quality is None:
        options = replace(options, encode=source.encode)
    fixed = _common_shape(source, options, threads) if options.encode == "raw" else None
    columns = {
        "label": ColumnSpec.of(
            "<f8" if source.real else "<i8", (source.label_count,) if source.label_count > 1 else ()
        ),
        "size": ColumnSpec.of("<u4", (2,)),
        "bytes": ColumnSpec.of("<u8"),
        "checksum": ColumnSpec.of("<u8"),
        "tiles": ColumnSpec.of("|u1"),
        **{f"{name}_max": ColumnSpec.of("<u2") for name in source.masks},
        **{f"{name}_checksum": ColumnSpec.of("<u8") for name in source.masks},
    }
    if fixed is not None:
        columns["image"] = ColumnSpec.of("|u1", fixed)
    total = len(source.items)
    with StoreWriter(final, columns, f"{fingerprint} {fixed}") as writer:
        prepared = ordered_map(
            lambda item: _prepare(item, source, options, fixed),
            source.items[writer.done :],
            threads=threads,
            ahead=(4 if options.encode == "raw" else 32) * threads,  # raw images are large
            name="fastload-pack",
        )
        with contextlib.closing(prepared):
            for outcome in prepared:
                if isinstance(outcome, _LeftOut):
                    writer.leave_out(outcome.item.name, outcome.reason)
                else:
                    _add(writer, outcome, columns, source)
                writer.advance()
                if progress is not None:
                    progress(writer.done, total)
        if not writer.count:
            first = writer.first_left_out()
            writer.discard()
            raise SourceError(
                f"none of the {total} files could be packed; the first is {first['name']!r}: {first['reason']}"
            )
        writer.finish({**_manifest(source, options, fixed, created), "packed": fingerprint})


def _add(writer: StoreWriter, prepared: _Prepared, columns: dict[str, ColumnSpec], source: Source) -> None:
    item, image = prepared.item, prepared.image
    name = record.Field(record.TEXT, item.name.encode("utf-8", "surrogateescape"))
    labels = item.labels or (math.nan if source.real else -1,)
    row: dict[str, Any] = {
        "label": labels if columns["label"].shape else labels[0],
        "size": prepared.size,
        "bytes": len(image.payload),
        "checksum": record.checksum(image.payload),
        "tiles": prepared.outcome,
    }
    for mask, field, largest in zip(source.masks, prepared.masks, prepared.largest, strict=True):
        row |= {f"{mask}_max": largest, f"{mask}_checksum": record.checksum(field.payload)}
    if "image" in columns:
        row["image"] = np.frombuffer(image.payload, np.uint8).reshape(columns["image"].shape)
        writer.add([*prepared.masks, name], row)
    else:
        writer.add([image, *prepared.masks, name], row)


def _creation_time() -> datetime:
    """Now, or what SOURCE_DATE_EPOCH says, for stores that are the same whenever they are packed."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.fromtimestamp(int(epoch) if epoch else time.time(), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"SOURCE_DATE_EPOCH is {epoch!r}; it must be a number of seconds since 1970") from error


def _manifest(source: Source, options: Options, fixed: Shape | None, created: datetime) -> dict[str, Any]:
    return {
        "fields": [
            {"name": "image", "kind": "image", "in": "record" if fixed is None else "column"},
            *({"name": name, "kind": "mask", "in": "record", "fill": fill} for name, fill in source.masks.items()),
            {"name": "name", "kind": "text", "in": "record"},
        ],
        "sample": ["image", *source.masks] if source.masks else ["image", "label"],
        "classes": source.classes,
        "source": source.format,
        "options": asdict(options),
        "tiles": tiles.OUTCOMES,
        "created": created.isoformat(timespec="seconds"),
        "fastload": version("fastload"),
    }


def _count_classes(store: Store) -> int:
    if store.classes is not None:
        return len(store.classes)
    if store.columns["label"].dtype.kind == "f":
        return 0
    labels = np.unique(np.concatenate([np.unique(chunk) for chunk in store.columns["label"].chunks()]))
    return int((labels >= 0).sum())


def _common_shape(source: Source, options: Options, threads: int) -> Shape | None:
    """The shape that all images will be stored with, None if they differ; headers only, damage is skipped."""

    def shape_of(item: Item) -> Shape | None:
        try:
            if source.store is not None:
                (height, width), channels = source.store.columns["size"].view(item.sample or 0).tolist(), 3
                if "image" in source.store.columns:
                    channels = source.store.columns["image"].shape[2]
            else:
                image = source.read(item)["image"]
                if isinstance(image, bytes):
                    facts = _identify(image, options)
                    (height, width), channels = geometry.upright_size(facts.size, facts.orientation), 3
                else:
                    height, width, channels = image.shape
        except (OSError, FastloadError):
            return None
        return *options.target_size((height, width)), channels

    common: Shape | None = None
    items = (item for item in source.items if item.problem is None)
    shapes = ordered_map(shape_of, items, threads=threads, ahead=16 * threads, name="fastload-sizes")
    with contextlib.closing(shapes):
        for shape in shapes:
            if shape is not None and common is not None and shape != common:
                return None
            common = common or shape
    return common


def _prepare(item: Item, source: Source, options: Options, fixed: Shape | None) -> _Prepared | _LeftOut:
    if item.problem is not None:
        return _LeftOut(item, item.problem)
    try:
        store, sample = source.store, item.sample
        if store is not None and sample is not None:
            item = item._replace(name=store.name(sample))
            kept, pixels = _stored_field(store, sample, options), None
            contents: dict[str, Any] = {name: blocks.read(store[sample][name]) for name in source.masks}
        else:
            contents = source.read(item)
            image = contents["image"]
            if isinstance(image, bytes):
                kept, pixels = _kept_field(image, _identify(image, options), options)
            else:
                kept, pixels = _raw_field(image), None
        field, size = _make_field(kept, options)
        if fixed is not None and (*size, field.channels) != fixed:
            raise DecodeError(f"it is {size[0]} x {size[1]} pixels, its header and the other images are {fixed[:2]}")
        whole = geometry.upright_size((kept.height, kept.width), kept.orientation)
        values = [_mask(contents[name], whole, size, source, name, options) for name in source.masks]
        tiled, outcome = _tiled(field, pixels if field is kept else None, options)
        return _Prepared(
            item, tiled, outcome, size, [blocks.field_of(v) for v in values], [int(v.max()) for v in values]
        )
    except OSError as error:
        return _LeftOut(item, f"it can't be read: {error.strerror or error}")
    except (FastloadError, MemoryError) as error:
        return _LeftOut(item, str(error) or "not enough memory to decode it")


def _mask(content: Any, whole: Size, size: Size, source: Source, name: str, options: Options) -> blocks.Values:
    """The values of a mask, checked against the image's upright size `whole` and the classes, as large as `size`."""
    values = masks.decode(content, options.max_pixels) if isinstance(content, bytes) else masks.narrowed(content)
    if values.shape != whole:
        raise DecodeError(
            f"the mask is {values.shape[1]} x {values.shape[0]} pixels, its image {whole[1]} x {whole[0]} "
            "(width x height, upright)"
        )
    if name == "mask" and source.classes is not None:
        beyond = values[(values >= len(source.classes)) & (values != source.masks[name])]
        if beyond.size:
            raise DecodeError(
                f"the mask has the value {beyond.max()}, and the {len(source.classes)} classes are 0 to "
                f"{len(source.classes) - 1} ({source.masks[name]} means: ignore)"
            )
    return masks.resized(values, size) if size != whole else values


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
            transparent = "A" in image.getbands() or "transparency" in image.info
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
            picture = image.convert("RGBA")
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error
    below = Image.new("RGBA", picture.size, tuple(colour))
    pixels = np.asarray(Image.alpha_composite(below, picture))
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGR))[1].tobytes()


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


def _tiled(field: record.Field, pixels: Pixels | None, options: Options) -> tuple[record.Field, int]:
    """The field re-cut if it can be, and what became of it. pixels: what it decodes to, if that is known already."""
    if field.codec != record.JPEG:
        return field, tiles.NO_JPEG
    if not options.tiles:
        return field, tiles.OFF
    from .recut import Untouched, recut

    try:
        cut = recut(bytes(field.payload), strip=options.strip, orientation=field.orientation)
        tiled = field._replace(payload=cut.data, tiles=cut.tiles, checksum=record.checksum(cut.data))
        whole = decode.pixels(field, keep=True) if pixels is None else pixels
        if not (np.array_equal(decode.pixels(tiled), whole) and decode.tiles_show(tiled, whole)):
            raise Untouched(tiles.PIXELS)
    except Untouched as reason:
        return field, reason.outcome
    except DecodeError:
        return field, tiles.PIXELS
    return tiled, tiles.RECUT
