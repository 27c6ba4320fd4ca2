"""Checking a store: every checksum, and on request every image."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from . import blocks, decode, record
from .doctor import usable_cores
from .errors import ChecksumError, ColumnError, DecodeError, FastloadError, StoreError, StoreFormatError
from .geometry import MAX_PIXELS, upright_size
from .manifest import PLACES
from .store import Column, Record, Store
from .values import Value
from .workers import ordered_map


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. index: the sample's, None for a whole column. name: the sample's, if legible."""

    index: int | None
    name: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """samples: how many were checked. damaged: what is wrong, empty for a whole store."""

    samples: int
    damaged: tuple[Damage, ...]


def verify(
    path: str | os.PathLike[str],
    *,
    decode_images: bool = False,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check all checksums of a store: columns, record heads, fields; and LMDB's trees. Damage is listed, not raised.

    decode_images: also decode every image, whole and tile by tile. workers: threads, all usable cores by default.
    max_pixels: larger images count as damaged. progress: called with (samples done, samples in all).

    Raises:
        FileNotFoundError, StoreFormatError: the file is missing, no store, cut short, or of a newer format.
    """
    store = Store(path, verify="always", max_pixels=max_pixels)
    damaged = [*_check_columns(store), *_check_others(store)]
    if PLACES in (damage.name for damage in damaged):
        return VerifyReport(len(store), tuple(damaged))
    columns = Store(path, verify="never").columns  # damaged ones are listed; they tell nonetheless which samples differ
    threads = workers or usable_cores()
    results = ordered_map(
        lambda index: _check_sample(store, columns, index, decode_images),
        range(len(store)),
        threads=threads,
        ahead=16 * threads,
        name="fastload-verify",
    )
    with contextlib.closing(results):
        for done, damage in enumerate(results, 1):
            if damage is not None:
                damaged.append(damage)
            if progress is not None:
                progress(done, len(store))
    return VerifyReport(len(store), tuple(damaged))


def _check_columns(store: Store) -> Iterator[Damage]:
    for name, column in [(PLACES, store.places), *store.columns.items()]:
        try:
            for _ in column.chunks():
                pass
        except ColumnError as error:
            yield Damage(None, name, str(error))


def _check_others(store: Store) -> Iterator[Damage]:
    try:
        store.quarantine()
    except StoreError as error:
        yield Damage(None, "quarantine", str(error))
    try:
        store.check_trees()
    except StoreFormatError as error:
        yield Damage(None, "", f"{error}: fastload reads the store without LMDB's trees, other programs can't")


def _check_sample(store: Store, columns: Mapping[str, Column], index: int, decode_images: bool) -> Damage | None:
    name = ""
    with contextlib.suppress(FastloadError, KeyError):
        name = store.name(index)
    try:
        sample = store[index]
        for mask in store.masks:
            if sample[mask].checksum != columns[f"{mask}_checksum"].view(index):
                raise ChecksumError(f"its {mask} is not the one that was packed at this place")
            if decode_images:
                blocks.read(sample[mask])
        others = [spec for spec in store.schema.others if spec.column is None]
        found = record.joint_checksum(sample[spec.name].checksum for spec in others)
        if others and found != columns["others_checksum"].view(index):
            raise ChecksumError("its fields are not those that were packed at this place")
        for spec in others if decode_images else ():
            Value(spec, None).read(sample[spec.name], [])
        if store.schema.image is not None:
            _check_image(store, columns, index, sample, decode_images)
    except ColumnError:
        pass  # listed already
    except FastloadError as error:
        return Damage(index, name, str(error))
    return None


def _check_image(store: Store, columns: Mapping[str, Column], index: int, sample: Record, decode_image: bool) -> None:
    checksum = int(columns["checksum"].view(index))
    if "image" in store.columns:
        store.raw_image(index)
        return
    image = sample["image"]
    if image.checksum != checksum:
        raise ChecksumError("the image is not the one that was packed at this place")
    size = upright_size((image.height, image.width), image.orientation)
    if size != tuple(columns["size"].view(index)):
        raise DecodeError(f"the record says {image.width} x {image.height} pixels, the size column another size")
    if decode_image:
        pixels = decode.pixels(image, keep=True)
        if pixels.dtype != store.image_dtype:
            raise DecodeError(f"the record holds {pixels.dtype}, the store's images are {store.image_dtype}")
        if image.codec == record.JPEG and image.tiles and not decode.tiles_show(image, pixels):
            raise DecodeError("its tiles decode to other pixels than the whole image")
