"""The table of contents of a store, behind LMDB's last page: where each value of `meta` lies, and its checksum.

With it a store is read through a plain memory map. LMDB's trees, in which one flipped bit can lead to any address, are
never walked; opening takes one look at the file's end, whatever its size; every place is held against the file's size,
and every value against its checksum. (A tree of digests of LMDB's pages would do the same only after reading all of
them: of a million photographs 35 MB, all over the file.)

The samples' places are a column like others, `record`, which this table leads to. A file ends with

    table       JSON: {"transaction": LMDB's number of the last one, "values": {KEY: [offset, length, checksum]}}
    trailer     40 bytes: 8s magic b"FLSTORE1" | u64 offset, length and XXH3 of the table | u64 XXH3 of those 32 bytes

The checksum of a value is its XXH3 (64 bits, seed 0), or null for images of a raw column, whose rows have their own.
LMDB takes no notice of what stands behind its pages. Whoever changes the store by LMDB itself makes the table stale,
which the number of the transaction gives away.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from typing import IO, NamedTuple

from .errors import StoreFormatError
from .lmdb_pages import Pages, PagesError, begins_like_lmdb, meta_of
from .record import checksum

_MAGIC = b"FLSTORE1"
_TRAILER = struct.Struct("<8sQQQQ")
_HEAD = 2 << 16  # LMDB's two first pages, and more
_MOST_LEFT_OUT = 256 << 20
_MOST = 64 << 20  # bytes of a table: a million chunks


class Place(NamedTuple):
    """Where a value of `meta` lies in the file. checksum: None where its parts have their own."""

    offset: int
    length: int
    checksum: int | None


class MappedFile:
    """A store's bytes, read-only, through a memory map that lives as long as any view of it.

    Attributes:
        data: all bytes.
        places: where the values of `meta` are.

    Raises:
        FileNotFoundError, StoreFormatError: there is no such file, it is no store, is cut short, or was changed.
    """

    def __init__(self, path: str) -> None:
        self._map = _mapped(path)
        self.data = memoryview(self._map)
        self.places = read(self.data, path)

    def is_sound(self, place: Place) -> bool:
        """Whether a value is what was written, by its checksum if it has one."""
        if place.checksum is None:
            return True
        self._read_ahead(place)
        return checksum(self[place]) == place.checksum

    def _read_ahead(self, place: Place) -> None:
        """Let the system read a value in one go; otherwise each page is fetched when it is touched."""
        if hasattr(mmap, "MADV_WILLNEED") and place.length:
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, place.offset + place.length - start)

    def __getitem__(self, place: Place) -> memoryview:
        return self.data[place.offset : place.offset + place.length]


def _mapped(path: str) -> mmap.mmap:
    if os.path.isdir(path):
        raise StoreFormatError(f"{path} is a folder; a store is one file, made with `fastload pack {path} db.lmdb`")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; make a store with `fastload pack FOLDER {path}`")
    if not os.path.isfile(path):
        raise StoreFormatError(f"{path} is no regular file; a store is one, made with `fastload pack`")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise StoreFormatError(f"{path}: not a fastload store; make one with `fastload pack FOLDER db.lmdb`")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def read(data: memoryview, path: str) -> dict[str, Place]:
    """The table of contents of a store.

    Raises:
        StoreFormatError: the file is no store, is cut short, or was changed.
    """
    if not begins_like_lmdb(data):
        raise StoreFormatError(f"{path}: not a fastload store; make one with `fastload pack FOLDER db.lmdb`")
    trailer = bytes(data[-_TRAILER.size :])
    magic, offset, length, expected, own = _TRAILER.unpack(trailer)
    if magic != _MAGIC or own != checksum(trailer[:-8]) or offset + length + _TRAILER.size != len(data):
        raise StoreFormatError(
            f"{path}: {_what_is_wrong(data)}; copy it again from where it came, or `fastload pack` it"
        )
    if length > _MOST or checksum(data[offset : offset + length]) != expected:
        raise StoreFormatError(
            f"{path}: its table of contents is damaged; restore the store from a copy, or pack again"
        )
    try:
        table = json.loads(bytes(data[offset : offset + length]))
        values = {key: Place(*place) for key, place in table["values"].items()}
        sane = all(_is_place(value, len(data)) for value in values.values())
        transaction = table["transaction"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreFormatError(f"{path}: its table of contents makes no sense; pack it again") from error
    if not sane:
        raise StoreFormatError(f"{path}: its table of contents names places outside of the file; pack it again")
    try:
        found = meta_of(data[:offset]).transaction
    except PagesError as error:
        raise StoreFormatError(f"{path}: {error}; restore the store from a copy, or pack it again") from error
    if found != transaction:
        raise StoreFormatError(
            f"{path}: was changed by another program after it was packed (LMDB's transaction {found}, not "
            f"{transaction}); pack it again"
        )
    return values


def _is_place(value: Place, size: int) -> bool:
    numbers = value[:2] if value.checksum is None else value
    return all(type(n) is int and n >= 0 for n in numbers) and value.offset + value.length <= size


def _what_is_wrong(data: memoryview) -> str:
    """Why there is no table at the end of an LMDB file."""
    try:
        Pages(data)
    except PagesError as error:
        return str(error)
    return "not a fastload store, or cut short: there is no table of contents at the end of this LMDB file"


def append(file: IO[bytes], unchecked: str) -> None:
    """Cut a finished LMDB file after its last page, and write the table of its database `meta` there.

    file: opened for reading and writing in binary. unchecked: keys that begin so get no checksum.
    """
    values, transaction, end = _found(file, unchecked)
    file.truncate(end)
    file.seek(end)
    file.write(serialise(values, transaction, end))


def _found(file: IO[bytes], unchecked: str) -> tuple[dict[str, Place], int, int]:
    """What the table says, and where it begins. No view of the file outlives this: Windows cuts no mapped file."""
    pages = pages_of(file)
    values = {}
    for key, (offset, length) in pages.values(pages.tree(b"meta")).items():
        name = key.decode()
        own = None if name.startswith(unchecked) else checksum(pages.data[offset : offset + length])
        values[name] = Place(offset, length, own)
    return values, pages.meta.transaction, pages.meta.end


def pages_of(file: IO[bytes]) -> Pages:
    """The pages of a file that LMDB writes, opened for reading and writing.

    LMDB leaves free pages at the end out of the file; they are added, if they are no more than one transaction's.
    """
    end = meta_of(memoryview(file.read(_HEAD))).end
    if 0 < end - file.seek(0, os.SEEK_END) <= _MOST_LEFT_OUT:
        file.truncate(end)
    return Pages(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def serialise(values: Mapping[str, Place], transaction: int, offset: int) -> bytes:
    """Table and trailer, to stand at `offset`."""
    table = json.dumps({"transaction": transaction, "values": values}, separators=(",", ":")).encode()
    head = _TRAILER.pack(_MAGIC, offset, len(table), checksum(table), 0)[:-8]
    return table + head + checksum(head).to_bytes(8, "little")
