"""Packing: sources become a store. Threads prepare items (see `prepare`), one thread writes them.

JPEGs are re-cut into tiles (`recut`), which changes no pixel. Otherwise a file's bytes are kept as they are unless a
smaller side, a quality or an encoding is asked for. What can't be packed is left out with its reason, and everything
else is packed.

The final name appears when the store is complete. An interrupted pack leaves `NAME.partial`; the same command goes on
from it, and any other source or option starts over.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import filelock
import numpy as np

from . import record, splits, tiles
from .doctor import usable_cores
from .errors import FastloadError, PackError, SourceError
from .fields import column_dtype
from .geometry import MAX_PIXELS
from .items import Item, Source
from .options import Encode, Exif, Form, Options, Shape
from .prepare import LeftOut, Prepared, common_shape, form_of, libraries_for_packing, prepare
from .sources import Format, open_source
from .store import ColumnSpec, Store, looks_like_store
from .store_writer import StoreWriter
from .torch_datasets import lost_processes, open_dataset
from .workers import ordered_map

_THREADS = "fastload-pack"


@dataclass(frozen=True)
class PackReport:
    """What a pack did: samples and classes in the store, files left out, bytes of the store, seconds, remarks."""

    samples: int
    classes: int
    quarantined: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def pack(
    source: str | os.PathLike[str] | Any,
    destination: str | os.PathLike[str],
    *,
    format: Format = "auto",
    root: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    image_column: str | int | None = None,
    label_columns: Sequence[str] | None = None,
    part: str | None = None,
    label_from: str | None = None,
    header: Sequence[str] = (),
    window: str | tuple[float, float] | None = None,
    rescale: bool = False,
    kinds: Mapping[str, str] | None = None,
    short_side: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    encode: Encode = "keep",
    exif: Exif = "apply",
    max_pixels: int = MAX_PIXELS,
    tiles: bool = True,
    strip: bool = False,
    background: tuple[int, int, int] | None = None,
    depth: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Pack images and labels, or any samples, into one store.

    source: class folders, a folder without labels, a label list, pairs of image and mask, a folder of labelme files,
        MNIST, CIFAR, COCO's list of boxes, tar shards, Parquet files, DICOM, or a store to be packed otherwise
        (`sources.open_source` says how they are told apart; `format` insists). Or a
        dataset: any object with __getitem__ and __len__, or with __iter__, whose samples come back with the same
        structure and types (`fields` says what they may consist of).
    destination: the store's file name.
    root: where the names of a list start; its own folder by default.
    masks: a folder with a mask for each image of `source`, of the same name. labels: a file with the names of the
        values of masks, a line each.
    image_column, label_columns: of a list with a header, or of Parquet files: the names of columns. part: "train" or
        "test" of MNIST, CIFAR or Parquet files.
    label_from: of DICOM files, the element that labels are taken from: "Modality", or its tag "0008,0060". header: more
        elements to keep as fields, by keyword. window: "auto", or (center, width), for 8 bits; rescale: Hounsfield
        units and the like, as int16; by default stored values are kept whole.
    kinds: of the fields of a dataset, of shards or Parquet files, where their values don't tell it: {"1": "mask"} for
        the second of each sample, {"target.boxes": "boxes"} for what is in a dict. Boxes are (x, y, width, height);
        "boxes:XYXY" are corners, "boxes:CXCYWH" centres and sizes.
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
    depth: bits of the images' values, 8 or 16; None for those of the first image (16 in some PNG, TIFF, PGM and PPM).
        Images of 16 bits are stored exactly, in blocks, with as many channels as the first has, 1 or 3, and come as
        uint16; images of 8 bits are widened (255 becomes 65535). A store of 8 bits keeps the upper 8 of 16, and the
        report's notes say so; JPEGs have 8 bits. With 16 bits "raw" images are blocks too.
    workers: threads, all usable cores by default. Of a dataset: processes that read it, as with a loader; by default it
        is read in this one.
    overwrite: replace an existing store (and no other file) when the new one is complete.
    progress: called with (items done, items in all).

    Raises:
        ValueError, TypeError: an option makes no sense.
        SourceError: the source is missing or empty, or nothing in it is an image.
        FileExistsError, FileNotFoundError: `destination` exists, or its folder doesn't.
        PackError: the store can't be written, another pack is writing it, or numba is missing.

    Example:
        >>> fastload.pack("images/", "db.lmdb", short_side=256)
        >>> fastload.pack(torchvision.datasets.OxfordIIITPet("pets", target_types="segmentation"), "pets.lmdb")
    """
    options = Options(short_side, max_side, quality, encode, exif, max_pixels, tiles, strip, background, depth)
    final = _checked_destination(source, destination, overwrite)
    _check(options, workers)
    if not isinstance(source, str | os.PathLike):
        of_files = (root, masks, labels, image_column, label_columns, part, label_from, window)
        if format != "auto" or any(option is not None for option in of_files) or header or rescale:
            raise ValueError(
                "format, root, masks, labels, columns, part and DICOM's options go with files, not datasets"
            )
        dataset = open_dataset(source, kinds or {}, workers or 0)
        return _pack(dataset, final, options, form_of(dataset, options), None, overwrite, progress)
    listed = open_source(
        source,
        format,
        root,
        masks=masks,
        labels=labels,
        image_column=image_column,
        label_columns=label_columns,
        part=part,
        label_from=label_from,
        header=header,
        window=window,
        rescale=rescale,
        kinds=kinds,
        max_pixels=max_pixels,
        ignore=_files_of(final),
    )
    return _pack(listed, final, options, form_of(listed, options), workers, overwrite, progress)


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
    """Divide a source of files into parts and pack each into a store of its own: for "db.lmdb" db-train.lmdb and so on.

    A file that is listed twice is never in two parts. The same source, shares and seed give the same parts anywhere.

    shares: of each part, as a dict or as a text such as "train=0.8,val=0.1,test=0.1"; they sum to 1.
    stratify: divide every class by these shares (samples without a label, and with several or real labels, are one
        class). For that tar shards, Parquet and DICOM files are read once more. options: of `pack`.

    Returns a report for each part, by its name; see `pack` for what is raised.

    Example:
        >>> fastload.pack_splits("images/", "db.lmdb", {"train": 0.9, "val": 0.1}, short_side=256)
    """
    if not isinstance(source, str | os.PathLike) or options.pop("kinds", None):
        raise ValueError(
            "files are divided here; divide a dataset with torch.utils.data.random_split and pack each part"
        )
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
    classes = _classes_of(listed, workers or usable_cores()) if stratify else [None] * len(listed.items)
    images = [listed.image_of(item) for item in listed.items]
    parts = splits.split(classes, images, shares, seed=seed, stratify=stratify)
    for name, indices in parts.items():
        if not len(indices):
            raise SourceError(f"no sample is left for {name!r}, {shares[name]:g} of {len(images)}; leave that part out")
    sources = {
        name: listed._replace(items=[listed.items[index] for index in indices.tolist()])
        for name, indices in parts.items()
    }
    form = form_of(listed, chosen)
    done = {name for name, part in sources.items() if not overwrite and _is_packed(part, finals[name], chosen, form)}
    for name in sources.keys() - done:
        _checked_destination(source, finals[name], overwrite)
    return {
        name: _report(part, finals[name])
        if name in done
        else _pack(part, finals[name], chosen, form, workers, overwrite, progress)
        for name, part in sources.items()
    }


def _classes_of(source: Source, threads: int) -> list[int | None]:
    """The class of each item, None where it has none, or several labels, or a real one."""
    if source.schema is None or source.store is not None:
        return [int(item.labels[0]) if len(item.labels) == 1 and not source.real else None for item in source.items]
    if not any(spec.column == "label" for spec in source.schema.specs):
        return [None] * len(source.items)

    def label_of(item: Item) -> int | None:
        try:
            return None if item.problem is not None else int(source.read(item)["label"])
        except (OSError, FastloadError):
            return None  # packing will say why

    return [*ordered_map(label_of, source.items, threads=threads, ahead=32 * threads, name=_THREADS)]


def _is_packed(source: Source, final: str, options: Options, form: Form) -> bool:
    """Whether a store is there already, of this very source and these options: an interrupted run made it."""
    try:
        return Store(final).manifest.get("packed") == _fingerprint(source, options, form)
    except (OSError, FastloadError):
        return False


def _fingerprint(source: Source, options: Options, form: Form) -> str:
    """What tells a source and how it is packed from others."""
    known = json.dumps([source.digest(), asdict(options), form, version("fastload")])
    return f"{record.checksum(known.encode()):016x}"


def _pack(
    listed: Source,
    final: str,
    options: Options,
    form: Form,
    workers: int | None,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> PackReport:
    started = time.perf_counter()
    if listed.store is not None and listed.masks and options.exif == "ignore":
        raise ValueError("exif is 'ignore', but the masks of a store are upright, as its images then aren't; pack anew")
    created = _creation_time()
    with _only_pack(final), libraries_for_packing(), lost_processes():
        _check_name(final, overwrite)  # another pack may have finished just now
        cut = _write(listed, final, options, form, created, workers or usable_cores(), progress)
    notes = [f"{cut} images of 16 bits were cut to 8; --depth 16 keeps all of their bits"] if cut else []
    return _report(listed, final, time.perf_counter() - started, notes)


def _report(listed: Source, final: str, seconds: float = 0.0, notes: Sequence[str] = ()) -> PackReport:
    store = Store(final)
    return PackReport(
        samples=len(store),
        classes=_count_classes(store),
        quarantined=store.manifest["quarantined"],
        bytes=os.path.getsize(final),
        seconds=seconds,
        notes=(*listed.notes, *notes),
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


def _checked_destination(source: Any, destination: str | os.PathLike[str], overwrite: bool) -> str:
    """The absolute path of the store to write, if it may be written."""
    final = os.path.abspath(destination)
    if os.path.isdir(final):
        raise FileExistsError(f"{final} is a folder; give the store a file name, {os.path.join(final, 'db.lmdb')} say")
    if os.path.exists(final) and not (os.path.isfile(final) and looks_like_store(final)):
        raise FileExistsError(f"{final} exists already and is no store; choose another name")
    _check_name(final, overwrite)
    if not os.path.isdir(os.path.dirname(final)):
        raise FileNotFoundError(f"the folder {os.path.dirname(final)} does not exist; make it first")
    is_file = isinstance(source, str | os.PathLike) and os.path.exists(source)
    if is_file and os.path.exists(final) and os.path.samefile(source, final):
        raise FileExistsError(f"{final} is the source too; give the new store another name")
    return final


def _check_name(final: str, overwrite: bool) -> None:
    if os.path.exists(final) and not overwrite:
        raise FileExistsError(f"{final} exists already; choose another name, or replace it with --overwrite")


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


def _write(
    source: Source,
    final: str,
    options: Options,
    form: Form,
    created: datetime,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the store; returns how many images were cut from 16 bits to 8."""
    fingerprint = _fingerprint(source, options, form)
    if options.encode == "keep" and options.quality is None:
        options = replace(options, encode=source.encode)
    fixed = common_shape(source, options, threads) if options.encode == "raw" and not form.deep else None
    columns = _columns(source, fixed)
    total, cut = len(source.items), 0
    with StoreWriter(final, columns, f"{fingerprint} {fixed}") as writer:
        one = functools.partial(prepare, options=options, fixed=fixed, form=form)
        prepared = _outcomes(source, one, writer.done, threads, 4 if options.encode == "raw" else 32)
        with contextlib.closing(prepared):
            for outcome in prepared:
                if isinstance(outcome, LeftOut):
                    writer.leave_out(outcome.item.name, outcome.reason)
                else:
                    name = record.Field(record.TEXT, outcome.name.encode("utf-8", "surrogateescape"))
                    writer.add([*outcome.fields, name], outcome.cells)
                    cut += outcome.cut
                writer.advance()
                if progress is not None:
                    progress(writer.done, max(total, writer.done))
        if not writer.count:
            first, what = writer.first_left_out(), "files" if source.outcomes is None else "samples"
            writer.discard()
            raise SourceError(
                f"none of the {writer.done} {what} could be packed; the first is {first['name']!r}: {first['reason']}"
            )
        writer.finish({**_manifest(source, options, form, fixed, created), "packed": fingerprint})
    return cut


def _outcomes(
    source: Source, one: Callable[[Item, Source], Prepared | LeftOut], start: int, threads: int, ahead: int
) -> Any:
    """The items from `start` on as what a store keeps of them, in order; `close` ends it."""
    if source.outcomes is not None:
        return source.outcomes(one, source, start, threads)
    items = source.items[start:]
    return ordered_map(lambda item: one(item, source), items, threads=threads, ahead=ahead * threads, name=_THREADS)


def _columns(source: Source, fixed: Shape | None) -> dict[str, ColumnSpec]:
    """The store's columns."""
    schema = source.fields
    shape = (source.label_count,) if source.label_count > 1 else ()
    columns = {"label": ColumnSpec.of("<f8" if source.real else "<i8", shape)}
    if schema.image is not None:
        columns |= {"size": ColumnSpec.of("<u4", (2,)), "bytes": ColumnSpec.of("<u8")}
        columns |= {"checksum": ColumnSpec.of("<u8"), "tiles": ColumnSpec.of("|u1")}
    for mask in schema.of_kind("mask"):
        columns |= {f"{mask.name}_max": ColumnSpec.of("<u2"), f"{mask.name}_checksum": ColumnSpec.of("<u8")}
    if fixed is not None:
        columns["image"] = ColumnSpec.of("|u1", fixed)
    for spec in schema.others:
        if spec.column is None:
            columns["others_checksum"] = ColumnSpec.of("<u8")
        elif spec.column != "label":
            columns[spec.column] = ColumnSpec.of(column_dtype(spec), spec.shape)
    return columns


def _creation_time() -> datetime:
    """Now, or what SOURCE_DATE_EPOCH says, for stores that are the same whenever they are packed."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.fromtimestamp(int(epoch) if epoch else time.time(), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"SOURCE_DATE_EPOCH is {epoch!r}; it must be a number of seconds since 1970") from error


def _manifest(source: Source, options: Options, form: Form, fixed: Shape | None, created: datetime) -> dict[str, Any]:
    schema = source.fields
    image = [] if schema.image is None else [schema.image._replace(column=None if fixed is None else "image")]
    if form.deep or (source.store is not None and source.store.image_dtype != np.uint8):
        image = [spec._replace(dtype=form.dtype, channels=form.channels) for spec in image]
    entries = [spec.as_entry() for spec in (*image, *schema.of_kind("mask"), *schema.others)]
    return {
        "fields": [*entries, {"name": "name", "kind": "text", "in": "record"}],
        "sample": schema.sample,
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
