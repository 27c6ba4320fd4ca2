"""The manifest: what a store says of itself, as JSON, and whether what a stranger's says makes sense."""

from __future__ import annotations

import json
import math
import re
from typing import Any, get_args

import numpy as np

from .boxes import Format as BoxFormat
from .errors import StoreFormatError
from .fields import KINDS, TYPES, is_tree, leaves

FORMAT_VERSION = 1
PLACES = "record"
"""The column of where the records are, and which: offset, length and checksum of the head, 8 bytes each."""
_PLACE_BYTES = 24

_REMARKS: dict[str, Any] = {"source": "", "options": {}, "tiles": [], "created": "", "quarantined": 0}
"""What a manifest says that reading samples does not rely on, where it does not say it."""
_COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_COLUMN_DTYPE = re.compile(r"\|[iu]1|<[iu][248]|<f[248]")
_KNOWN: dict[str, tuple[str, list[int]]] = {
    PLACES: ("<u8", [3]),
    "size": ("<u4", [2]),
    "bytes": ("<u8", []),
    "checksum": ("<u8", []),
    "tiles": ("|u1", []),
    "others_checksum": ("<u8", []),
}
"""The dtypes and shapes of columns that are the same in all stores."""
_FIELD_DTYPE = re.compile(r"|\|[biu]1|<[iu][248]|<f[248]|u?int(8|16)")


def parse(data: bytes, path: str, size: int) -> dict[str, Any]:
    """The manifest of the store at `path`, a file of `size` bytes.

    Raises:
        StoreFormatError: it is none, of a newer version, or has values that no store has.
    """
    try:
        manifest = json.loads(data)
        version = manifest["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreFormatError(f"{path}: an LMDB file without a fastload manifest; pack it again") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{path}: format version {version}, this fastload reads up to {FORMAT_VERSION}; "
            "update with `pip install -U fastload`"
        )
    check(manifest, path)
    if manifest["count"] * _PLACE_BYTES > size:
        raise StoreFormatError(f"{path}: says that it has {manifest['count']} samples, more than fit in; it is damaged")
    described: dict[str, Any] = {**_REMARKS, **manifest}
    return described


def check(manifest: dict[str, Any], path: str) -> None:
    """Raise StoreFormatError unless a manifest has the members that reading relies on, of sane types."""
    try:
        fields, columns, classes = manifest["fields"], manifest["columns"], manifest["classes"]
        masks = [field["name"] for field in fields if field["kind"] == "mask"]
        names = {field["name"] for field in fields}
        sane = (
            _is_count(manifest["count"], 1 << 48)
            and isinstance(manifest["digest"], str)
            and (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes)))
            and isinstance(fields, list)
            and all(_is_field(field, columns) for field in fields)
            and (not any(_is_other(field) for field in fields) or "others_checksum" in columns)
            and len(names) == len(fields)
            and any(field["name"] == "name" and field["in"] == "record" for field in fields)
            and all(field["kind"] == "image" for field in fields if field["name"] == "image")
            and _is_sample(manifest.get("sample", "image"), {"label"} | names - {"name"})
            and (not masks or "image" in leaves(manifest.get("sample", "image")))
            and all({f"{mask}_max", f"{mask}_checksum"} <= columns.keys() for mask in masks)
            and all(_COLUMN_NAME.fullmatch(name) and _is_column(spec) for name, spec in columns.items())
            and PLACES in columns
            and all(_layout(columns[name]) == layout for name, layout in _KNOWN.items() if name in columns)
            and ("label" not in columns or _holds_labels(columns["label"]))
            and ("image" not in columns or _holds_images(columns["image"]))
            and all(_layout(columns[f"{mask}_max"]) == ("<u2", []) for mask in masks)
            and all(_layout(columns[f"{mask}_checksum"]) == ("<u8", []) for mask in masks)
            and all(isinstance(manifest.get(name, default), type(default)) for name, default in _REMARKS.items())
            and all(isinstance(name, str) for name in manifest.get("tiles", []))
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreFormatError(f"{path}: the manifest lacks {error}; the store is damaged") from error
    if not sane:
        raise StoreFormatError(f"{path}: the manifest has values that no store has; the store is damaged")


def _layout(column: dict[str, Any]) -> tuple[str, list[int]]:
    return column["dtype"], column["shape"]


def _holds_labels(column: dict[str, Any]) -> bool:
    return column["dtype"] in ("<i8", "<f8") and len(column["shape"]) <= 1


def _is_sample(node: object, names: set[str]) -> bool:
    """Whether it is a tree over these fields that has any."""
    return is_tree(node, names) and next(leaves(node), None) is not None  # type: ignore[arg-type]


def _is_field(field: dict[str, Any], columns: dict[str, Any]) -> bool:
    shape, column = field.get("shape", []), field.get("column")
    in_column = field["kind"] in ("integer", "real", "vector")
    return (
        field["in"] in ("record", "column")
        and isinstance(field["name"], str)
        and field["kind"] in KINDS
        and field.get("type", "") in TYPES
        and (
            _is_image(field) if field["kind"] == "image" else _FIELD_DTYPE.fullmatch(field.get("dtype", "")) is not None
        )
        and (column is None or (field["in"] == "column" and column in columns))
        and (field["in"] == "record" or in_column or field["name"] == "image")
        and (not in_column or (column is not None and _fits(field, columns[column])))
        and isinstance(shape, list)
        and all(_is_count(n, 1 << 32) for n in shape)
        and _is_count(field.get("fill", 0), 1 << 16)
        and field.get("format", "") in ("", *get_args(BoxFormat))
    )


def _fits(field: dict[str, Any], column: dict[str, Any]) -> bool:
    """Whether a column has rows as its field says; a label is signed, for -100 is one."""
    type_, dtype, is_label = field.get("type", ""), field.get("dtype", ""), field["column"] == "label"
    if column["shape"] != field.get("shape", []):
        return False
    if type_ in ("scalar", "numpy", "tensor"):
        return dtype != "" and (not is_label or np.dtype(dtype).kind in "if")
    return bool(dtype) if type_ in ("int", "bool", "float") else type_ == "" and is_label


def _is_image(field: dict[str, Any]) -> bool:
    """Whether a field of images is of 8 bits, or lies in the records; with sane channels."""
    dtype, channels = field.get("dtype", ""), field.get("channels", 3)
    deep = dtype in ("uint16", "int16") and field["in"] == "record"
    return (dtype in ("", "uint8") or deep) and type(channels) is int and channels in (1, 3)


def _is_other(field: dict[str, Any]) -> bool:
    """Whether a field lies in the record, and is neither the image, nor a mask, nor the name."""
    return field["in"] == "record" and field["kind"] != "mask" and field["name"] not in ("image", "name")


def _is_column(spec: dict[str, Any]) -> bool:
    dtype, shape, rows = spec["dtype"], spec["shape"], spec["rows_per_chunk"]
    if not (isinstance(dtype, str) and _COLUMN_DTYPE.fullmatch(dtype) and isinstance(shape, list) and len(shape) <= 16):
        return False
    sizes = all(_is_count(n, 1 << 32) and n > 0 for n in (*shape, rows))
    return sizes and np.dtype(dtype).itemsize * math.prod(shape) < 1 << 32


def _holds_images(column: dict[str, Any]) -> bool:
    """Whether the rows of a column are images of 8 bits."""
    return bool(column["dtype"] == "|u1" and len(column["shape"]) == 3 and column["shape"][2] in (1, 3))


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
