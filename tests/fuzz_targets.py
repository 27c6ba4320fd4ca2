"""Every parser of strangers' bytes as a function that `tools/fuzz` can call, and tests/test_corpus.py without a fuzzer.

A target reads the whole of what it is given, through the same functions as packing and training. It returns, having
checked what came out, or raises one of fastload's own errors. Anything else is a finding: another exception, a result
that contradicts itself, a crash, more than 10 seconds or 1 GB.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import damage
import fuzz_seeds
import numpy as np
import torch
from jpegs import Random, small_tiles
from PIL import Image

from fastload import (
    arrays,
    coco,
    decode,
    dicom,
    fields,
    image_fields,
    label_lists,
    labelme,
    masks,
    record,
    small_images,
    store,
    tar_members,
    tar_shards,
    tiles,
    toc,
)
from fastload.dataset import ImageDataset
from fastload.errors import FastloadError, SourceError
from fastload.fields import Schema, Spec
from fastload.geometry import Box
from fastload.manifest import check as check_manifest
from fastload.options import Options
from fastload.parquet import read_parquet
from fastload.placeholders import placeholder
from fastload.prepare import libraries_for_packing
from fastload.samples import Samples
from fastload.transforms import CenterCrop, RandomResizedCrop

MAX_PIXELS = 1 << 22
"""Of an image. So many take time, and more of them find nothing more."""


class Target(NamedTuple):
    """A parser. run: see above. seeds: files that it reads. damaged: how one becomes another, as in `damage`."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    damaged: Callable[[Random, bytes, bytes], bytes] = damage.damaged_bytes


def accepts(name: str, data: bytes) -> bool:
    """Whether a target has read bytes, and not refused them with an error of fastload's."""
    try:
        TARGETS[name].run(data)
    except FastloadError:
        return False
    return True


@functools.cache
def _folder(name: str) -> Path:
    """A folder of a target's own, with images that its files may name. It goes when the process ends."""
    place = tempfile.TemporaryDirectory(prefix=f"fastload-{name}-")
    _folders.append(place)
    for file in ("a.png", "b.png", "my cat.png"):
        Image.new("L", (40, 30)).save(Path(place.name, file))
    return Path(place.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _file(target: str, name: str, data: bytes) -> str:
    path = _folder(target) / name
    path.write_bytes(data)
    return os.fspath(path)


def _each(*steps: Callable[[], object]) -> None:
    """Take all steps, also where one is refused; where all of them are, raise what the first one was."""
    refusals: list[FastloadError] = []
    for step in steps:
        try:
            step()
        except FastloadError as error:
            refusals.append(error)
    if len(refusals) == len(steps):
        raise refusals[0]


def _read_all(found: Samples) -> list[dict[str, Any]]:
    """All samples that can be had. Those that can't be are refused one by one."""
    samples = []
    for index in range(len(found.names)):
        if index not in found.problems:
            with contextlib.suppress(SourceError):
                samples.append(found.read(index))
    return samples


# ---- stores


def _record(data: bytes) -> None:
    """A record, as a hostile packer writes it: with the right checksums."""
    parsed = record.parse(_sealed(data))
    parsed = [field._replace(checksum=record.checksum(field.payload), tiles=_sealed_index(field)) for field in parsed]
    again = record.parse(record.build(parsed))
    assert [(*field[:1], bytes(field.payload), *field[2:7]) for field in again] == [
        (*field[:1], bytes(field.payload), *field[2:7]) for field in parsed
    ]
    for field in again:
        _field(field)


def _sealed(data: bytes) -> bytes:
    entries = [data[at : at + 40] for at in range(16, 16 + 40 * int.from_bytes(data[4:6], "little"), 40)]
    indexes = sum(int.from_bytes(entry[12:16], "little") for entry in entries)
    checked = data[:8] + data[16 : 16 + 40 * len(entries) + indexes]
    return data[:8] + record.checksum(checked).to_bytes(8, "little") + data[16:]


def _sealed_index(field: record.Field) -> bytes:
    """A field's index, with the checksums of what it says is there."""
    index = bytearray(field.tiles)
    if field.codec == record.BLOCKS:
        end = 0
        for at in range(4, len(index) - 7, 8):
            start, end = end, end + int.from_bytes(index[at : at + 4], "little")
            index[at + 4 : at + 8] = (record.checksum(field.payload[start:end]) & 0xFFFFFFFF).to_bytes(4, "little")
    elif field.codec == record.JPEG:
        pieces = range(0, len(field.payload), tiles.PIECE)
        sums = b"".join(record.checksum(field.payload[i : i + tiles.PIECE]).to_bytes(8, "little") for i in pieces)
        index[16 : 16 + len(sums)] = sums[: max(0, len(index) - 16)]
    return bytes(index)


def _field(field: record.Field) -> None:
    if field.codec == record.ARRAY:
        values = arrays.read(field)
        same = arrays.read(arrays.field_of(values))
        assert (values.dtype, values.shape, values.tobytes()) == (same.dtype, same.shape, same.tobytes())
        with contextlib.suppress(FastloadError):
            arrays.tensor(field)
    elif field.codec in (record.BYTES, record.TEXT):
        specs = [Spec("x", "bytes"), Spec("x", "text"), Spec("x", "json")]
        _each(*(functools.partial(fields.decode, spec, field) for spec in specs))
    elif field.height * field.width <= MAX_PIXELS:
        _image_field(field)


def _image_field(field: record.Field) -> None:
    """A stored image whole, a part of it, and a part reduced."""
    size = (field.height, field.width)
    box = Box(field.width // 4, field.height // 4, -(-field.width // 2), -(-field.height // 2))

    def whole() -> None:
        assert decode.upright(field).shape[:2] in (size, size[::-1])

    def part() -> None:
        assert decode.region(field, box).shape[:2] == (box.height, box.width)

    def reduced() -> None:
        assert decode.reduced(field, Box(0, 0, 1, 1), 2, gray=True).shape == (1, 1, 1)

    _each(whole, part, reduced)


def _manifest(data: bytes) -> None:
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(manifest, dict):
        return
    check_manifest(manifest, "db.lmdb")
    schema = Schema.of_manifest(manifest)
    assert {spec.name for spec in schema.specs} == set(fields.leaves(schema.sample))
    for spec in schema.others:
        if spec.kind not in ("image", "boxes"):
            placeholder(spec)
    for column in manifest["columns"].values():
        assert store.ColumnSpec(column["dtype"], tuple(column["shape"]), column["rows_per_chunk"]).row_bytes > 0


def _store(data: bytes) -> None:
    """A store, as a hostile packer writes it: with the right checksums. All that is in it is read, in every way."""
    path = _file("store", "db.lmdb", _sealed_store(data))
    found = store.Store(path)
    _each(
        found.check_trees,
        found.quarantine,
        *(functools.partial(np.asarray, column) for column in found.columns.values()),
        *(functools.partial(found.__getitem__, index) for index in range(min(4, len(found)))),
    )
    crops = (None, None) if found.schema.image is None else (RandomResizedCrop(8), CenterCrop(8))
    datasets = [ImageDataset(path, crops[0], on_error="raise"), ImageDataset(path, crops[1], return_valid=True)]
    _each(*(functools.partial(dataset.__getitems__, range(min(4, len(found)))) for dataset in datasets))


def _sealed_store(data: bytes) -> bytes:
    """The same with the right checksums in its table of contents, if it has one."""
    start, length = (int.from_bytes(data[at : at + 8], "little") for at in (len(data) - 32, len(data) - 24))
    try:
        table = json.loads(data[start : start + length])
        for place in table["values"].values():
            place[2] = None if place[2] is None else record.checksum(data[place[0] : place[0] + place[1]])
        return data[:start] + toc.serialise(table["values"], table["transaction"], start)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return data


# ---- images


def _tiles(data: bytes) -> None:
    """A JPEG that is re-cut keeps all of its pixels, and so do its crops; see `damage.judge`."""
    random = np.random.default_rng(zlib.crc32(data))
    with small_tiles(int(random.choice([32, 64, 200])), int(random.choice([1, 100, 512]))):
        damage.judge(data, random)


def _image(data: bytes) -> None:
    """An image of any format: as a store of 8 bits keeps it, as one of 16 bits does, and as a mask."""
    options, spec = Options(max_pixels=MAX_PIXELS), Spec("image", "image", "file")
    with libraries_for_packing():
        _each(
            lambda: _check_made(image_fields.shallow(data, spec, options)),
            lambda: _check_made(image_fields.deep(data, options, image_fields.own_form(data, options))),
        )
        with contextlib.suppress(FastloadError):
            assert masks.decode(data, MAX_PIXELS).ndim == 2


def _check_made(made: Any) -> None:
    """What is stored of an image is read again, whole and in part."""
    (field,) = record.parse(record.build([made.field]))
    whole = decode.upright(field)
    assert whole.shape[:2] == made.size
    box = Box(field.width // 3, field.height // 3, -(-field.width // 2), -(-field.height // 2))
    assert np.array_equal(decode.region(field, box), decode._crop(decode.pixels(field, keep=True), box))


# ---- lists and annotations


def _list(data: bytes) -> None:
    """Lists of names and labels, and of classes."""
    folder = os.fspath(_folder("list"))
    path = _file("list", "list.txt", data)
    with contextlib.suppress(SourceError):
        names = labelme.read_classes(path)
        assert len(set(names)) == len(names) > 1
    with contextlib.suppress(SourceError):
        _check_list(label_lists.read_list(path, folder, image_column=1, label_columns=[]), folder)
    _check_list(label_lists.read_list(path, folder), folder)


def _check_list(found: label_lists.LabelList, folder: str) -> None:
    for entry in found.entries:
        if entry.problem is not None:
            assert entry.problem
            continue
        assert os.path.isfile(os.path.join(folder, entry.name))
        assert len(entry.labels) == found.label_count
        assert all(type(label) is (float if found.real else int) for label in entry.labels)
        assert found.classes is None or all(-1 <= label < len(found.classes) for label in entry.labels)


def _labelme(data: bytes) -> None:
    path = _file("labelme", "annotation.json", data)
    labelme.looks_like_annotation(path)
    assert labelme.image_path(path, os.fspath(_folder("labelme"))).startswith(os.fspath(_folder("labelme")))
    classes = labelme.list_classes([path])
    found = labelme.read(path, classes, max_pixels=MAX_PIXELS)
    assert found.mask.shape == found.instances.shape == found.size
    assert np.isin(found.mask, [*range(len(classes)), labelme.ignore_value(classes)]).all()


def _coco(data: bytes) -> None:
    path = _file("coco", "boxes.json", data)
    coco.looks_like_coco(path)
    found = coco.read_coco(path, _folder("coco"), max_pixels=MAX_PIXELS)
    for sample in _read_all(found):
        corners = torch.as_tensor(sample["boxes"])
        assert corners.shape == (len(sample["labels"]), 4)
        assert all(0 <= label < len(found.classes or ()) for label in sample["labels"].tolist())


# ---- containers


def _tar(data: bytes) -> None:
    """A tar file, its checksums right, and the samples in it."""
    data = _sealed_tar(data)
    with contextlib.suppress(SourceError):
        for member in tar_members.walk(io.BytesIO(data)):
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
    _read_all(tar_shards.read_shards(_file("tar", "shard.tar", data)))


def _sealed_tar(data: bytes) -> bytes:
    parts = [data[at : at + tar_members.BLOCK] for at in range(0, len(data), tar_members.BLOCK)]
    for place, block in enumerate(parts):
        if block[257:262] == b"ustar" and len(block) == tar_members.BLOCK:
            counted = sum(block[:148] + b" " * 8 + block[156:])
            parts[place] = block[:148] + b"%06o\0 " % counted + block[156:]
    return b"".join(parts)


def _parquet(data: bytes) -> None:
    _read_all(read_parquet(_file("parquet", "rows.parquet", data)))


def _dicom(data: bytes) -> None:
    """A DICOM file as it is, rescaled, and through its window."""
    path = _file("dicom", "a.dcm", data)
    samples = []
    for way in _WAYS:
        tags = ("PatientAge", "PixelSpacing", "InstanceNumber")
        found = dicom.read_dicom([("a", path)], label_from="Modality", header=tags, max_pixels=MAX_PIXELS, **way)
        samples += _read_all(found)
    if not samples:
        raise SourceError("none of it can be read")
    assert all(sample["image"].dtype in (np.uint8, np.uint16, np.int16) for sample in samples)


_WAYS: tuple[dict[str, Any], ...] = ({}, {"rescale": True}, {"window": "auto"})


def _idx(data: bytes) -> None:
    _file("idx", "train-labels-idx1-ubyte", fuzz_seeds.idx_labels())
    path = _file("idx", "train-images-idx3-ubyte", data)
    found = small_images.read_mnist(path)
    assert len(found.images) == len(found.labels) == fuzz_seeds.SMALL


def _cifar(data: bytes) -> None:
    _file("cifar", "batches.meta", fuzz_seeds.cifar_names())
    _file("cifar", "test_batch", data)
    found = small_images.read_cifar(_folder("cifar"), "test")
    assert found.images.shape == (len(found.labels), 32, 32, 3)
    assert all(0 <= label < fuzz_seeds.SMALL for label in found.labels)


# ---- all of them


TARGETS: dict[str, Target] = {
    "record": Target(_record, fuzz_seeds.records),
    "store": Target(_store, fuzz_seeds.stores, damage.damaged_store),
    "manifest": Target(_manifest, fuzz_seeds.manifests, damage.damaged_json),
    "tiles": Target(_tiles, fuzz_seeds.jpegs, damage.damaged),
    "image": Target(_image, fuzz_seeds.images),
    "list": Target(_list, fuzz_seeds.lists),
    "labelme": Target(_labelme, fuzz_seeds.annotations, damage.damaged_json),
    "coco": Target(_coco, fuzz_seeds.boxes, damage.damaged_json),
    "tar": Target(_tar, fuzz_seeds.tars),
    "parquet": Target(_parquet, fuzz_seeds.parquets),
    "dicom": Target(_dicom, fuzz_seeds.dicoms),
    "idx": Target(_idx, fuzz_seeds.idx_images),
    "cifar": Target(_cifar, fuzz_seeds.cifar_batches),
}
