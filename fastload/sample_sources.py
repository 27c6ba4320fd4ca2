"""Sources whose samples are dicts: COCO's JSON, tar shards, Parquet files, DICOM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from . import dicom, fields, parquet
from .errors import SourceError
from .fields import Schema
from .folders import files_below
from .items import Item, Source
from .samples import Samples

_LOOKED_AT = 32


def of_samples(path: str, found: Samples, format: str, kinds: Mapping[str, str] | None = None) -> Source:
    """A source whose samples are dicts; what they consist of is learned from some that are spread over it."""
    items = [Item(name, path, (), found.problems.get(i), i) for i, name in enumerate(found.names)]
    whole = [item.sample for item in items if item.problem is None and item.sample is not None]
    first: list[dict[str, Any]] = []
    error: Exception | None = None
    for sample in (whole[place * len(whole) // _LOOKED_AT] for place in range(_LOOKED_AT) if whole):
        try:
            first.append(found.read(sample))
        except (OSError, SourceError) as reason:
            error = error or reason
    if items and not first:
        why = str(error) if error else found.problems[0]
        raise SourceError(f"{path}: none of the samples looked at can be read; the first: {why}")
    schema = _learned(first, {**found.kinds, **(kinds or {})}) if first else None

    def read(item: Item) -> dict[str, Any]:
        assert item.sample is not None
        assert schema is not None
        return schema.flatten(found.read(item.sample))

    return Source(
        *(format, items, found.classes, 1, found.notes),
        schema=schema and _as_pair(schema),
        masks={spec.name: spec.fill for spec in schema.of_kind("mask")} if schema else {},
        read=read,
        content=found.content,
    )


def _learned(samples: Sequence[dict[str, Any]], kinds: Mapping[str, str]) -> Schema:
    """The schema of dicts whose values are fields each. Pictures and boxes are tensors, whatever they come in."""
    values = [item for sample in samples for item in sample.items()]
    plain = {name for name, value in values if value is None or type(value) in (dict, list)}
    schema = fields.learn(samples, dict.fromkeys(plain, "json") | dict(kinds))
    types = {"image": "file", "boxes": "tensor"}
    return schema._replace(specs=tuple(s._replace(type=types.get(s.kind, s.type)) for s in schema.specs))


def _as_pair(schema: Schema) -> Schema:
    """The schema with pairs instead of dicts, where these hold an image and no more than a label or a mask."""
    names = [spec.name for spec in schema.specs]
    if names == ["image"]:
        return schema._replace(sample={"tuple": ["image", "label"]})
    return schema._replace(sample={"tuple": names}) if names in (["image", "label"], ["image", "mask"]) else schema


def parquet_files(
    path: str,
    part: str | None,
    image_column: str | int | None,
    label_columns: Sequence[str] | None,
    kinds: Mapping[str, str] | None,
) -> Source:
    """The rows of Parquet files; `part` is their split."""
    if isinstance(image_column, int):
        raise SourceError(f"image_column is {image_column}; columns of Parquet files have names")
    found = parquet.read_parquet(path, part, image_column=image_column, label_columns=label_columns)
    return of_samples(path, found, "parquet", kinds)


def dicom_files(
    path: str,
    ignore: Sequence[str],
    label_from: str | None,
    header: Sequence[str],
    window: str | tuple[float, float] | None,
    rescale: bool,
    max_pixels: int,
) -> Source:
    """The images of a DICOM file, or of all files below a folder."""
    files = files_below(path, path, ignore) if os.path.isdir(path) else [(os.path.basename(path), path)]
    found = dicom.read_dicom(
        files, label_from=label_from, header=header, window=window, rescale=rescale, max_pixels=max_pixels
    )
    return of_samples(path, found, "dicom")
