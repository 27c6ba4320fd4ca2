"""The store: one LMDB file of records and columns, and reading it through a memory map.

Two named databases. `samples` maps an 8-byte big-endian index to a record (see `record`). `meta` holds

    manifest                 JSON: format version, count, fields, columns, classes, options, source, creation time
    column/NAME/CHUNK        rows of a column as raw little-endian numbers; CHUNK is eight decimal digits
    quarantine/STEP          JSON: a list of {"name", "reason"} that were left out

The manifest's `fields` are those of a record in their order, its name last, and between them those that lie in columns
(`label` needs no entry); `sample` is the tree that they make (see `fields`).

Where images have 16 bits all of them do, and lie in the records as blocks: the field `image` then has "dtype", "uint16"
or "int16", and "channels" where it is not 3. Without a dtype images are uint8.

Columns hold what is one fixed size per sample: `label`, `size` (upright height and width), `bytes` and `checksum` of
the stored image, `tiles` (what became of it: a number into the manifest's list `tiles`), `MASK_max` and `MASK_checksum`
(the largest value of each mask, and its payload's checksum), the images themselves where all of them are raw and of
one shape (`image`), other numbers that samples have (`field_NUMBER`), and `others_checksum`, of the payloads of a
record but the image's, the masks' and the name's. One more, `record`, has offset and length of each record in the
file, and the checksum of its head, so that no record is taken for another. Opening costs the same for a thousand
samples and for a hundred million.

LMDB's trees are not walked: the table behind them says where the values are (see `toc`), so that no damage to the file
can end the process. What can't be survived is a file that is changed or cut while it is mapped: writers replace stores,
and never change one.

A reader is safe under threads, fork, spawn and pickling. What is handed to the hot path (`Store.view`, `Column.gather`
from chunks) are views of the map, which stays as long as they do; what is handed to users (`Store[i]`, `Column[i]`) are
copies.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import math
import operator
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from . import manifest, record, toc
from .errors import ChecksumError, ColumnError, DecodeError, StoreError, StoreFormatError
from .fields import Schema
from .geometry import MAX_PIXELS
from .lmdb_pages import Pages, begins_like_lmdb
from .manifest import PLACES
from .seen_rows import SeenRows

COLUMN_CHUNK = 64 << 20

Verify = Literal["never", "sample", "always"]

sample_key = struct.Struct(">Q").pack


@dataclass(frozen=True)
class Record:
    """One sample as it is stored: its fields by name, payloads copied, checksums checked."""

    fields: dict[str, record.Field]

    def __getitem__(self, name: str) -> record.Field:
        return self.fields[name]

    @property
    def name(self) -> str:
        """The source's own name of the sample, a relative path with forward slashes."""
        return bytes(self.fields["name"].payload).decode("utf-8", "surrogateescape")


class ColumnSpec(NamedTuple):
    """The layout of a column: dtype (little-endian), shape of one row, rows in each chunk but the last."""

    dtype: str
    shape: tuple[int, ...]
    rows_per_chunk: int

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int] = ()) -> ColumnSpec:
        """The spec of a column whose chunks hold `COLUMN_CHUNK` bytes."""
        spec = cls(dtype, tuple(shape), 1)
        return spec._replace(rows_per_chunk=max(1, COLUMN_CHUNK // spec.row_bytes))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class _Span(NamedTuple):
    """The chunks of a column as one tensor, so that a gather from many chunks is a single call without the GIL.

    The file is mapped in one piece, and LMDB aligns large values to pages, so all rows start at multiples of `unit`
    bytes (a divisor of page and row) from the first one. `rows` is that memory as overlapping rows, one at every unit;
    most are never asked for. Sample i of chunk c is row i * step + shifts[c].
    """

    rows: torch.Tensor
    step: int
    shifts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, chunks: list[npt.NDArray[Any]], row_bytes: int) -> _Span:
        """The span of these views of one memory map."""
        addresses = [chunk.__array_interface__["data"][0] for chunk in chunks]
        first, end = min(addresses), max(a + chunk.nbytes for a, chunk in zip(addresses, chunks, strict=True))
        unit = math.gcd(row_bytes, *(address - first for address in addresses))
        memory = torch.from_numpy(np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8))
        rows = memory.as_strided(((end - first - row_bytes) // unit + 1, row_bytes), (unit, 1))
        step = row_bytes // unit
        before = itertools.accumulate((len(chunk) for chunk in chunks[:-1]), initial=0)
        shifts = [(a - first) // unit - count * step for a, count in zip(addresses, before, strict=True)]
        return cls(rows, step, np.array(shifts))


def chunk_key(column: str, chunk: int) -> str:
    """The key of a chunk in `meta`."""
    return f"column/{column}/{chunk:08d}"


class Column:
    """One value per sample, read through the memory map. `len`, `[index]`, `gather` and `numpy.asarray` work on it."""

    def __init__(self, store: Store, name: str, spec: ColumnSpec) -> None:
        self.dtype = np.dtype(spec.dtype)
        self.shape = spec.shape
        self._store, self._name, self._spec = store, name, spec

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Any:
        return self.view(range(len(self))[index]).copy()

    def view(self, index: int) -> npt.NDArray[Any]:
        """The value of sample `index`, in the map: 0 <= index < len. Read-only, valid while the store is alive."""
        chunk, row = divmod(index, self._spec.rows_per_chunk)
        value: npt.NDArray[Any] = self._chunk(chunk)[row]
        return value

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a column is read from its store: converting it to an array always copies")
        empty = np.empty((0, *self.shape), self.dtype)
        return np.concatenate([empty, *self.chunks()]).astype(dtype or self.dtype, copy=False)

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """The column's rows in order, a view of each chunk; valid while the store is alive."""
        for chunk in range(-(-len(self) // self._spec.rows_per_chunk)):
            yield self._chunk(chunk)

    def gather(self, indices: npt.NDArray[np.int64], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Copy the rows at `indices` (int64, each in [0, len): unchecked) into `out` or a new array."""
        if out is None:
            out = np.empty((len(indices), *self.shape), self.dtype)
        rows = self._spec.rows_per_chunk
        if len(self) <= rows:
            np.take(self._chunk(0), indices, axis=0, out=out, mode="clip")
            return out
        span = self._store._span(self._name, self._spec)
        places = indices * span.step
        places += span.shifts[indices // rows]
        as_bytes = torch.from_numpy(out.view(np.uint8).reshape(len(indices), self._spec.row_bytes))
        torch.index_select(span.rows, 0, torch.from_numpy(places), out=as_bytes)
        return out

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        return self._store._chunk(self._name, chunk, self._spec)


class Store:
    """A packed store, opened for reading.

    verify: when what is read is held against its checksum. "always": each time. "sample": each time too, but a row of
        a raw column only when it is first read, by this process or its workers: to check one takes longer than to
        gather it. "never": not at all; lengths and places are looked at even so, so that damage may be shown, but can't
        end the process. The manifest and columns are checked once, at first use; these not with "never".
    max_pixels: images and masks with more are errors: a few bytes of a stranger's store can be one of any size.

    Attributes:
        path: absolute path of the file.
        manifest: the store's description, as a dict.
        classes: class names by label, or by value of the mask, or None where these have no names.
        schema: what a sample consists of (see `fields`).
        masks: the names of the masks that come with each image, and the value of what lies outside of each.
        image_dtype: the NumPy type of the images: uint8, uint16 or int16.
        columns: the per-sample arrays by name (`label`, `size`, `bytes`, `checksum`, perhaps `image`).
        places: offset and length of each record in the file, and the checksum of its head: a column too.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        StoreFormatError: the file is no store, is cut short, or is of a newer format version.
        ValueError: verify is none of these, or max_pixels less than 1.

    Example:
        >>> store = fastload.Store("db.lmdb")
        >>> len(store), store[0].name, store.columns["label"][0]
    """

    def __init__(
        self, path: str | os.PathLike[str], *, verify: Verify = "sample", max_pixels: int = MAX_PIXELS
    ) -> None:
        if verify not in get_args(Verify):
            raise ValueError(f"verify is {verify!r}; it may be {', '.join(get_args(Verify))}")
        if operator.index(max_pixels) < 1:
            raise ValueError(f"max_pixels is {max_pixels}; it must be at least 1")
        self.path = os.path.abspath(path)
        self.verify: Verify = verify
        self.max_pixels = max_pixels
        self._seen: SeenRows | None = None
        self.manifest = self._read_manifest(self._file)
        self._describe()

    def _describe(self) -> None:
        self.classes: list[str] | None = self.manifest["classes"]
        entries = self.manifest["fields"]
        self.field_names: list[str] = [entry["name"] for entry in entries if entry["in"] == "record"]
        self.schema = Schema.of_manifest(self.manifest)
        self.masks: dict[str, int] = {spec.name: spec.fill for spec in self.schema.of_kind("mask")}
        image = self.schema.image
        self.image_dtype: np.dtype[Any] = np.dtype("uint8" if image is None else image.dtype or "uint8")
        self._count: int = self.manifest["count"]
        self.columns = _Columns(self.path)
        for name, c in self.manifest["columns"].items():
            self.columns[name] = Column(self, name, ColumnSpec(c["dtype"], tuple(c["shape"]), c["rows_per_chunk"]))
        self.places = self.columns.pop(PLACES)
        self._chunks: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._spans: dict[str, _Span] = {}
        if self.verify == "sample" and "image" in self.columns and self._seen is None:
            self._seen = SeenRows(self._count)

    @property
    def image_channels(self) -> int:
        """1 for grey images that are stored raw, in a column, with 16 bits, or were packed as such, else 3."""
        column, image = self.columns.get("image"), self.schema.image
        return int(column.shape[2]) if column is not None else 3 if image is None else image.channels

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        """The record of sample `index`, copied out of the map; checksums are checked."""
        fields = []
        for field in self.fields(range(len(self))[index]):
            field.verify()
            fields.append(field._replace(payload=bytes(field.payload), tiles=bytes(field.tiles)))
        return Record(dict(zip(self.field_names, fields, strict=True)))

    def name(self, index: int) -> str:
        """The source's name of sample `index`, even where its image is damaged."""
        fields = dict(zip(self.field_names, self._parsed(range(len(self))[index]), strict=True))
        fields["name"].verify()
        return bytes(fields["name"].payload).decode("utf-8", "surrogateescape")

    def fields(self, index: int) -> list[record.Field]:
        """The fields of a sample's record, views of the map. index: 0 <= index < len.

        Raises:
            StoreFormatError, ChecksumError: the record is damaged.
            ColumnError: so is the column of where the records are.
            DecodeError: an image or a mask is too large.
        """
        fields = self._parsed(index)
        for field in fields:
            if field.width * field.height > self.max_pixels:
                raise DecodeError(
                    f"{field.width} x {field.height} pixels are more than the limit of {self.max_pixels}; max_pixels= "
                    "(--max-pixels) raises it"
                )
        return fields

    def _parsed(self, index: int) -> list[record.Field]:
        fields = record.parse(self.view(index), self.verify != "never")
        if len(fields) != len(self.field_names):
            names = ", ".join(self.field_names)
            raise StoreFormatError(f"the record has {len(fields)} fields, too few or many for {names}")
        return fields

    def view(self, index: int) -> memoryview:
        """The bytes of a sample's record, in the map. index: 0 <= index < len."""
        offset, length, head = self.places.view(index).tolist()
        data = self._file.data
        if offset + length > len(data):
            raise StoreError(f"{self.path}: sample {index} of {len(self)} lies outside of the file; it is damaged")
        found = data[offset : offset + length]
        if self.verify != "never" and record.head_checksum(found) != head:
            raise ChecksumError("the record at its place is another one, or its head was altered (checksum mismatch)")
        return found

    def raw_image(self, index: int) -> npt.NDArray[np.uint8]:
        """The image of a sample out of the raw column, a view of the map. index: 0 <= index < len.

        Raises:
            ChecksumError: it is damaged.
        """
        image: npt.NDArray[np.uint8] = self.columns["image"].view(index)
        if self.damaged_images(np.array([index]), image[None]):
            raise ChecksumError("the pixels differ from what was packed (checksum mismatch)")
        return image

    def damaged_images(self, indices: npt.NDArray[np.int64], images: npt.NDArray[np.uint8]) -> list[int]:
        """Of images that were read from the raw column, the places of those that are to be checked and are damaged."""
        if self.verify == "never":
            return []
        places = np.arange(len(indices)) if self._seen is None else self._seen.places_of_new(indices)
        if not len(places):
            return []
        rows = images.reshape(len(images), -1)
        expected = self.columns["checksum"].gather(indices[places]).tolist()
        wrong = [p for p, c in zip(places.tolist(), expected, strict=True) if record.checksum(rows[p].data) != c]
        if self._seen is not None:
            self._seen.add(np.delete(indices[places], np.searchsorted(places, wrong)))
        return wrong

    def quarantine(self) -> list[dict[str, str]]:
        """What was left out while packing: a list of {"name", "reason"}."""
        left_out: list[dict[str, str]] = []
        try:
            for key in sorted(key for key in self._file.places if key.startswith("quarantine/")):
                entries = json.loads(_checked(self._file, key, self.path))
                left_out += [{name: _text(entry[name]) for name in ("name", "reason")} for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(f"{self.path}: its quarantine list is damaged: {error}") from error
        return left_out

    def check_trees(self) -> None:
        """Walk LMDB's trees, which reading has no need of.

        Raises:
            StoreFormatError: they are damaged, or lead to other places than the table of contents and `places`.
        """
        pages = Pages(self._file.data)
        pages.check()
        count = 0
        for rows in pages.numbered(pages.tree(b"samples")):
            if count + len(rows) > len(self) or self._lie_elsewhere(count, rows):
                raise StoreFormatError(f"the tree of the samples leads elsewhere than the table of contents at {count}")
            count += len(rows)
        values = {key.decode("utf-8", "replace"): place for key, place in pages.values(pages.tree(b"meta")).items()}
        if count != len(self) or values != {key: place[:2] for key, place in self._file.places.items()}:
            raise StoreFormatError("its trees have other entries than the table of contents")

    def _lie_elsewhere(self, first: int, rows: npt.NDArray[Any]) -> bool:
        places = self.places.gather(np.arange(first, first + len(rows)))
        return bool((places[:, :2] != rows).any())

    def __getstate__(self) -> dict[str, Any]:
        names = ("path", "verify", "max_pixels", "manifest", "_seen")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._describe()

    @functools.cached_property
    def _file(self) -> toc.MappedFile:
        """The mapped file; where the store comes out of a pickle, at its first use: so errors reach who uses it."""
        file = toc.MappedFile(self.path)
        expected = self.__dict__.get("manifest")
        if expected is not None and self._read_manifest(file)["digest"] != expected["digest"]:
            raise StoreError(f"{self.path} was replaced by another store while in use; open it again")
        return file

    def _read_manifest(self, file: toc.MappedFile) -> dict[str, Any]:
        try:
            data = _checked(file, "manifest", self.path)
        except KeyError as error:
            raise StoreFormatError(f"{self.path}: an LMDB file without a fastload manifest; pack it again") from error
        return manifest.parse(data, self.path, len(file.data))

    def _chunk(self, column: str, chunk: int, spec: ColumnSpec) -> npt.NDArray[Any]:
        rows = self._chunks.get((column, chunk))
        if rows is None:
            rows = self._chunks[column, chunk] = self._read_chunk(column, chunk, spec)
        return rows

    def _read_chunk(self, column: str, chunk: int, spec: ColumnSpec) -> npt.NDArray[Any]:
        place = self._file.places.get(chunk_key(column, chunk))
        count = min(spec.rows_per_chunk, len(self) - chunk * spec.rows_per_chunk)
        if place is None or place.length != count * spec.row_bytes:
            raise ColumnError(f"{self.path}: column {column!r} is cut short; restore the store or pack again")
        if self.verify != "never" and not self._file.is_sound(place):
            raise ColumnError(
                f"{self.path}: column {column!r} differs from what was packed (checksum mismatch); restore the store "
                "from a copy, or pack again"
            )
        return np.frombuffer(self._file[place], spec.dtype).reshape(count, *spec.shape)

    def _span(self, column: str, spec: ColumnSpec) -> _Span:
        span = self._spans.get(column)
        if span is None:
            chunks = range(-(-len(self) // spec.rows_per_chunk))
            span = _Span.of([self._chunk(column, chunk, spec) for chunk in chunks], spec.row_bytes)
            self._spans[column] = span
        return span


class _Columns(dict[str, Column]):
    """The columns of a store. One that is asked for and not there is no slip of the program's, but damage."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def __missing__(self, name: str) -> Column:
        raise StoreFormatError(f"{self._path}: there is no column {name!r}; the store is damaged")


def _checked(file: toc.MappedFile, key: str, path: str) -> bytes:
    """A value of `meta`. KeyError if there is none."""
    place = file.places[key]
    if not file.is_sound(place):
        raise StoreFormatError(
            f"{path}: its {key} differs from what was packed (checksum mismatch); restore the store from a copy, or "
            "pack again"
        )
    return bytes(file[place])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return value


def looks_like_store(path: str) -> bool:
    """Whether a file begins as LMDB's do; it may still be damaged, or of another program."""
    with open(path, "rb") as file:
        return begins_like_lmdb(memoryview(file.read(512)))
