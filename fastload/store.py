"""The store: one LMDB file of records and columns. No other module imports lmdb.

Two named databases. `samples` maps an 8-byte big-endian index to a record (see `record`). `meta` holds

    manifest                 JSON: format version, count, fields, columns, classes, options, source, creation time
    column/NAME/CHUNK        rows of a column as raw little-endian numbers; CHUNK is eight decimal digits
    quarantine/STEP          JSON: a list of {"name", "reason"} that were left out

Columns hold what is one fixed size per sample: `label`, `size` (upright height and width), `bytes` and `checksum` of
the stored image, and the images themselves where all of them are raw and of one shape (`image`). They are read
through the memory map, so opening costs the same for a thousand samples and for a hundred million.

A reader is safe under threads (a transaction each), fork, spawn and pickling: every process opens the file for
itself, at first use. LMDB allows one open environment per file and process, so all stores of a process share it. What
is handed to the hot path (`Store.view`, `Column.gather` from chunks) are views of the map, valid while the store is
alive; what is handed to users (`Store[i]`, `Column[i]`) are copies.

A writer works on `NAME.partial` in committed steps and renames it at the end, after syncing: the final name never
shows half a store. An interrupted pack goes on from its last commit. Files are replaced, never modified in place,
since a reader's memory map can't survive that.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
import torch
import xxhash

from . import record
from .errors import PackError, StoreError, StoreFormatError

FORMAT_VERSION = 1
COLUMN_CHUNK = 64 << 20

_STEP_BYTES = 32 << 20
_META_MAGIC = 0xBEEFC0DE
_key = struct.Struct(">Q").pack


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

    LMDB maps its file in one piece and aligns large values to pages, so all rows start at multiples of `unit` bytes
    (a divisor of page and row) from the first one. `rows` is that memory as overlapping rows, one at every unit; most
    are never asked for. starts: each chunk's first row. step: units from one row of a chunk to the next.
    """

    rows: torch.Tensor
    starts: npt.NDArray[np.int64]
    step: int

    @classmethod
    def of(cls, chunks: list[npt.NDArray[Any]], row_bytes: int) -> _Span:
        """The span of these views of one memory map."""
        addresses = [chunk.__array_interface__["data"][0] for chunk in chunks]
        first, end = min(addresses), max(a + chunk.nbytes for a, chunk in zip(addresses, chunks, strict=True))
        unit = math.gcd(row_bytes, *(address - first for address in addresses))
        memory = torch.from_numpy(np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8))
        rows = memory.as_strided(((end - first - row_bytes) // unit + 1, row_bytes), (unit, 1))
        return cls(rows, np.array([(address - first) // unit for address in addresses]), row_bytes // unit)


def _chunk_key(column: str, chunk: int) -> bytes:
    return f"column/{column}/{chunk:08d}".encode()


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
        return np.concatenate(list(self.chunks())).astype(dtype or self.dtype, copy=False)

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
        chunk_of, row_of = np.divmod(indices, rows)
        places = torch.from_numpy(span.starts[chunk_of] + row_of * span.step)
        as_bytes = torch.from_numpy(out.view(np.uint8).reshape(len(indices), self._spec.row_bytes))
        torch.index_select(span.rows, 0, places, out=as_bytes)
        return out

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        return self._store._chunk(self._name, chunk, self._spec)


class _Session:
    """An open environment of this process and the chunks it has handed out, shared by all stores of one file."""

    def __init__(self, path: str) -> None:
        self.pid = os.getpid()
        try:
            self.environment = lmdb.open(
                path,
                subdir=False,
                readonly=True,
                lock=False,
                create=False,
                max_dbs=2,
                readahead=False,
                max_spare_txns=64,
            )
            self.samples = self.environment.open_db(b"samples", create=False)
            self.meta = self.environment.open_db(b"meta", create=False)
        except lmdb.Error as error:
            raise StoreFormatError(f"{path}: not a fastload store ({error}); make one with `fastload pack`") from error
        self.chunks: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self.spans: dict[str, _Span] = {}
        weakref.finalize(self, self.environment.close)

    def get_meta(self, key: bytes) -> memoryview | None:
        with self.environment.begin(db=self.meta, buffers=True) as transaction:
            value: memoryview | None = transaction.get(key)
            return value


_sessions: weakref.WeakValueDictionary[tuple[int, int, int], _Session] = weakref.WeakValueDictionary()
_sessions_lock = threading.Lock()


def _renew_lock() -> None:
    global _sessions_lock  # noqa: PLW0603 - a lock that another thread held while this process was forked
    _sessions_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _Local(threading.local):
    """What each thread keeps of a store: its process, session and the `get` of its own read transaction."""

    pid = -1
    session: _Session
    get: Callable[[bytes], memoryview | None]


class Store:
    """A packed store, opened for reading.

    Attributes:
        path: absolute path of the file.
        manifest: the store's description, as a dict.
        classes: class names by label, or None where the labels have no names.
        columns: the per-sample arrays by name (`label`, `size`, `bytes`, `checksum`, perhaps `image`).

    Raises:
        FileNotFoundError: there is nothing at `path`.
        StoreFormatError: the file is no store, is cut short, or is of a newer format version.

    Example:
        >>> store = fastload.Store("db.lmdb")
        >>> len(store), store[0].name, store.columns["label"][0]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._local = _Local()
        self._session: _Session | None = None
        self.manifest = self._read_manifest(self._open())
        self._describe()

    def _describe(self) -> None:
        self.classes: list[str] | None = self.manifest["classes"]
        self.field_names: list[str] = [f["name"] for f in self.manifest["fields"] if f["in"] == "record"]
        self._count: int = self.manifest["count"]
        self.columns = {
            name: Column(self, name, ColumnSpec(c["dtype"], tuple(c["shape"]), c["rows_per_chunk"]))
            for name, c in self.manifest["columns"].items()
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        """The record of sample `index`, copied out of the map; checksums are checked."""
        fields = []
        for field in record.parse(self.view(range(len(self))[index])):
            field.verify()
            fields.append(field._replace(payload=bytes(field.payload), intervals=bytes(field.intervals)))
        return Record(dict(zip(self.field_names, fields, strict=True)))

    def view(self, index: int) -> memoryview:
        """The bytes of a sample's record, in the map. index: 0 <= index < len."""
        local = self._local
        if local.pid != os.getpid():
            self._begin()
        value = local.get(_key(index))
        if value is None:
            raise StoreError(f"{self.path}: sample {index} of {len(self)} is missing; the store is damaged")
        return value

    def quarantine(self) -> list[dict[str, str]]:
        """What was left out while packing: a list of {"name", "reason"}."""
        left_out: list[dict[str, str]] = []
        session = self._open()
        with session.environment.begin(db=session.meta) as transaction, transaction.cursor() as cursor:
            if cursor.set_range(b"quarantine/"):
                for key, value in cursor:
                    if not key.startswith(b"quarantine/"):
                        break
                    left_out += json.loads(value)
        return left_out

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.manifest = state["path"], state["manifest"]
        self._local, self._session = _Local(), None
        self._describe()

    def _begin(self) -> None:
        local = self._local
        local.session = session = self._open()
        local.get = session.environment.begin(db=session.samples, buffers=True).get
        local.pid = session.pid

    def _open(self) -> _Session:
        """This process's session of the file; opened, after a fork or unpickling opened again, where there is none."""
        session = self._session
        if session is not None and session.pid == os.getpid():
            return session
        with _sessions_lock:
            if session is not None:
                session.chunks.clear()
                session.spans.clear()
                session.environment.close()
            _check_file(self.path)
            status = os.stat(self.path)
            key = (os.getpid(), status.st_dev, status.st_ino)
            session = _sessions.get(key)
            if session is None:
                session = _sessions[key] = _Session(self.path)
        expected = getattr(self, "manifest", None)
        if expected is not None and self._read_manifest(session)["digest"] != expected["digest"]:
            raise StoreError(f"{self.path} was replaced by another store while in use; open it again")
        self._session = session
        return session

    def _read_manifest(self, session: _Session) -> dict[str, Any]:
        value = session.get_meta(b"manifest")
        try:
            manifest = json.loads(bytes(value or b"null"))
            version = manifest["format_version"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreFormatError(f"{self.path}: an LMDB file without a fastload manifest; pack it again") from error
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.path}: format version {version}, this fastload reads up to {FORMAT_VERSION}; "
                "update with `pip install -U fastload`"
            )
        check_manifest(manifest, self.path)
        return dict(manifest)

    def _chunk(self, column: str, chunk: int, spec: ColumnSpec) -> npt.NDArray[Any]:
        session = self._open()
        rows = session.chunks.get((column, chunk))
        if rows is None:
            value = session.get_meta(_chunk_key(column, chunk))
            count = min(spec.rows_per_chunk, len(self) - chunk * spec.rows_per_chunk)
            if value is None or len(value) != count * spec.row_bytes:
                raise StoreFormatError(f"{self.path}: column {column!r} is cut short; restore the store or pack again")
            rows = np.frombuffer(value, spec.dtype).reshape(count, *spec.shape)
            session.chunks[column, chunk] = rows
        return rows

    def _span(self, column: str, spec: ColumnSpec) -> _Span:
        session = self._open()
        span = session.spans.get(column)
        if span is None:
            span = session.spans[column] = _Span.of(list(self.columns[column].chunks()), spec.row_bytes)
        return span


def check_manifest(manifest: dict[str, Any], path: str) -> None:
    """Raise StoreFormatError unless a manifest has the members that reading relies on, of sane types."""
    try:
        sane = (
            isinstance(manifest["count"], int)
            and 0 <= manifest["count"] < 1 << 48
            and (manifest["classes"] is None or all(isinstance(name, str) for name in manifest["classes"]))
            and all(f["in"] in ("record", "column") and isinstance(f["name"], str) for f in manifest["fields"])
            and all(
                np.dtype(c["dtype"]).kind in "iuf"
                and all(isinstance(n, int) and 0 < n < 1 << 32 for n in (*c["shape"], c["rows_per_chunk"]))
                for c in manifest["columns"].values()
            )
            and isinstance(manifest["digest"], str)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreFormatError(f"{path}: the manifest lacks {error}; the store is damaged") from error
    if not sane:
        raise StoreFormatError(f"{path}: the manifest has values that no store has; the store is damaged")


def _check_file(path: str) -> None:
    """Refuse what LMDB would crash on: a map that reaches beyond the end of its file is SIGBUS, not an error.

    The layout of the two meta pages is LMDB's own (mdb.c, `MDB_meta`, data version 1, 64-bit).
    """
    if os.path.isdir(path):
        raise StoreFormatError(f"{path} is a folder; a store is one file, made with `fastload pack {path} db.lmdb`")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
        if len(head) < 152 or struct.unpack_from("<II", head, 16) != (_META_MAGIC, 1):
            raise StoreFormatError(f"{path}: not a fastload store; make one with `fastload pack FOLDER {path}`")
        (page_size,) = struct.unpack_from("<I", head, 16 + 24)
        file.seek(page_size)
        second = file.read(512)
    last_page = max(struct.unpack_from("<QQ", meta, 16 + 120)[0] for meta in (head, second) if len(meta) >= 152)
    needed = (last_page + 1) * page_size
    if size < needed:
        raise StoreFormatError(
            f"{path}: cut short, {size} bytes of {needed}; copy it again from where it came, or pack it again"
        )


class StoreWriter:
    """Writes a store step by step; `finish` gives it its name.

    path: the final path. columns: the columns that each sample fills; a step holds one chunk of a column named
    `image`. fingerprint: what is packed and how; a partial file with another fingerprint is started over.

    On return `done` says how many items of the source the partial store has dealt with already (0 for a new one),
    `count` how many samples they gave. Leaving the context without `finish` keeps the committed steps for the next run.

    Raises:
        PackError: the file system refuses: no space, no permission, no such folder.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Mapping[str, ColumnSpec], fingerprint: str) -> None:
        self.path = os.path.abspath(path)
        self.partial = self.path + ".partial"
        self.columns = dict(columns)
        self.count = self.done = self.quarantined = self._step = 0
        self._fingerprint = fingerprint
        self._complete = False
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._rows: dict[str, list[Any]] = {name: [] for name in columns}
        self._left_out: list[dict[str, str]] = []
        if not self._resume():
            Path(self.partial).unlink(missing_ok=True)
            self._open()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.close()

    def _open(self) -> None:
        try:
            self._environment = lmdb.open(self.partial, subdir=False, lock=False, max_dbs=2, map_size=256 << 20)
            self._samples = self._environment.open_db(b"samples")
            self._meta = self._environment.open_db(b"meta")
        except lmdb.Error as error:
            raise _pack_error(error, self.partial) from error

    def _resume(self) -> bool:
        """Open the partial file of an interrupted run and take its progress; False if there is none to go on with."""
        if not os.path.exists(self.partial):
            return False
        try:
            _check_file(self.partial)
        except StoreFormatError:
            return False
        self._open()
        try:
            with self._environment.begin(db=self._meta) as transaction:
                progress = json.loads(transaction.get(b"progress") or b"{}")
                self._complete = transaction.get(b"manifest") is not None
        except (lmdb.Error, ValueError):
            progress = {}
        if progress.get("fingerprint") != self._fingerprint:
            self._complete = False
            self._environment.close()
            return False
        self.count, self.done = progress["count"], progress["done"]
        self.quarantined, self._step = progress["quarantined"], progress["step"]
        return True

    def add(self, fields: Sequence[record.Field], row: Mapping[str, Any]) -> None:
        """Append one sample: its record and its value in each column."""
        value = record.build(fields)
        self._pending.append((_key(self.count), value))
        self._pending_bytes += len(value)
        for name, cells in self._rows.items():
            cells.append(row[name])
        self.count += 1

    def leave_out(self, name: str, reason: str) -> None:
        """Put an item of the source on the quarantine list."""
        self._left_out.append({"name": name, "reason": reason})
        self.quarantined += 1

    def advance(self) -> None:
        """Say that one more item of the source is dealt with; commits when enough has gathered."""
        self.done += 1
        image = self.columns.get("image")
        if len(self._pending) == image.rows_per_chunk if image else self._pending_bytes >= _STEP_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write what has gathered to disk, durably."""
        puts = {self._piece_key(name, self._step): self._pack_rows(name, rows) for name, rows in self._rows.items()}
        if self._left_out:
            puts[b"quarantine/%08d" % self._step] = json.dumps(self._left_out).encode()
        self._step += 1
        progress = {"fingerprint": self._fingerprint, "count": self.count, "done": self.done}
        progress |= {"quarantined": self.quarantined, "step": self._step}
        puts[b"progress"] = json.dumps(progress).encode()
        self._write(puts, self._pending)
        self._pending, self._pending_bytes, self._left_out = [], 0, []
        for rows in self._rows.values():
            rows.clear()

    def first_left_out(self) -> dict[str, str]:
        """The first entry of the quarantine list, for a message; {} where there is none."""
        with self._environment.begin(db=self._meta) as transaction, transaction.cursor() as cursor:
            stored = json.loads(cursor.value()) if cursor.set_range(b"quarantine/") else []
        return next(iter(stored + self._left_out), {})

    def discard(self) -> None:
        """Remove the partial file: nothing in it is worth another run."""
        self._environment.close()
        Path(self.partial).unlink(missing_ok=True)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Commit, gather the columns' pieces into chunks, write the manifest, sync, and give the file its name.

        manifest: classes, fields, options and what else `Store.manifest` should show; count, columns, digest and the
        format version are added here.
        """
        if not self._complete:
            if self._pending or self._left_out or not self._step:
                self.commit()
            digest = xxhash.xxh3_128()
            columns = {}
            for name, spec in sorted(self.columns.items()):
                columns[name] = spec._asdict() | {"checksums": list(self._gather_column(name, spec, digest))}
            digest.update(json.dumps([manifest["classes"], manifest["fields"]]).encode())
            whole = {"format_version": FORMAT_VERSION, "count": self.count, "digest": digest.hexdigest(), **manifest}
            whole |= {"columns": columns, "quarantined": self.quarantined}
            self._write({b"manifest": json.dumps(whole).encode()}, drop=b"step/")
        self._publish()

    def _piece_key(self, column: str, step: int) -> bytes:
        return _chunk_key(column, step) if column == "image" else b"step/%08d/%s" % (step, column.encode())

    def _pack_rows(self, column: str, rows: list[Any]) -> bytes:
        spec = self.columns[column]
        return np.asarray(rows, spec.dtype).reshape(len(rows), *spec.shape).tobytes()

    def _gather_column(self, name: str, spec: ColumnSpec, digest: xxhash.xxh3_128) -> Iterator[int]:
        """Copy a column's pieces into its chunks and give each chunk's checksum."""
        chunk_bytes = spec.rows_per_chunk * spec.row_bytes
        rest, chunk = bytearray(), 0
        for step in range(self._step):
            with self._environment.begin(db=self._meta) as transaction:
                rest += transaction.get(self._piece_key(name, step)) or b""
            while len(rest) >= chunk_bytes or (rest and step == self._step - 1):
                piece = bytes(rest[:chunk_bytes])
                del rest[:chunk_bytes]
                if name != "image":
                    self._write({_chunk_key(name, chunk): piece})
                digest.update(piece)
                yield record.checksum(piece)
                chunk += 1

    def _write(
        self, meta: Mapping[bytes, bytes], samples: Sequence[tuple[bytes, bytes]] = (), drop: bytes | None = None
    ) -> None:
        """Put values, and drop the meta keys that begin with `drop`, in one transaction, growing the map as needed."""
        needed = sum(len(value) + 8192 for value in itertools.chain(meta.values(), (value for _, value in samples)))
        try:
            info = self._environment.info()
            if (info["last_pgno"] + 1) * 4096 + 2 * needed > info["map_size"]:
                self._environment.set_mapsize(2 * info["map_size"] + 2 * needed)
            with self._environment.begin(write=True) as transaction:
                for key, value in samples:
                    transaction.put(key, value, db=self._samples, append=True)
                for key, value in meta.items():
                    transaction.put(key, value, db=self._meta)
                if drop is not None:
                    _drop_prefix(transaction, self._meta, drop)
        except lmdb.Error as error:
            raise _pack_error(error, self.partial) from error

    def _publish(self) -> None:
        """Sync the partial file, rename it to its final name, and sync the folder: in this order, for power cuts."""
        last_page = self._environment.info()["last_pgno"]
        page_size = self._environment.stat()["psize"]
        self._environment.close()
        with open(self.partial, "r+b") as file:
            if file.seek(0, os.SEEK_END) < (last_page + 1) * page_size:
                file.truncate((last_page + 1) * page_size)
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        if os.name == "posix":
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems have no folder sync
                os.fsync(folder)
            os.close(folder)


def _drop_prefix(transaction: lmdb.Transaction[bytes], database: Any, prefix: bytes) -> None:
    with transaction.cursor(db=database) as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            found = cursor.delete()


def _pack_error(error: Exception, partial: str) -> PackError:
    if "No space left" in str(error) or "quota" in str(error):
        return PackError(
            f"{partial}: no space left on the device; free some and run the same command again: "
            "it goes on from what is already packed"
        )
    return PackError(f"{partial} can't be written: {error}")
