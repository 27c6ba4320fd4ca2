"""Writing a store, so that no crash, full disk or power cut ever shows half of one.

A writer works on `NAME.partial` in committed steps and renames it at the end, after syncing: the final name never
shows half a store. An interrupted pack goes on from its last commit. Files are replaced, never modified in place,
since a reader's memory map can't survive that.

While it grows, the partial store holds each step's piece of every column (`step/NUMBER/COLUMN`) and a `progress` value;
`finish` gathers the pieces into the chunks that `store` describes. Only the images of a raw column, which are large,
are written as final chunks at once, one per step.

`progress` has a checksum of all that the file holds. Before a pack goes on from a partial file, and before LMDB sees
it, its pages are walked and all values compared: LMDB wouldn't notice damage, or would die of it. A file that is
damaged, or of another source, is started over.

At the end the places of the records become a column, and a table of contents is put behind LMDB's pages (see `toc`).
Only this module uses lmdb.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from . import record, toc
from .errors import PackError, StoreFormatError
from .lmdb_pages import Array
from .manifest import FORMAT_VERSION, PLACES
from .store import ColumnSpec, chunk_key, sample_key

_STEP_BYTES = 32 << 20


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
        self._checksum = 0
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._rows: dict[str, list[Any]] = {name: [] for name in columns}
        self._heads: list[int] = []
        self._left_out: list[dict[str, str]] = []
        if not self._resume():
            self._start()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.close()

    def _open(self) -> None:
        self._environment = lmdb.open(self.partial, subdir=False, lock=False, max_dbs=2, map_size=256 << 20)
        self._samples = self._environment.open_db(b"samples")
        self._meta = self._environment.open_db(b"meta")
        self._file = os.stat(self.partial)

    def _start(self) -> None:
        try:
            Path(self.partial).unlink(missing_ok=True)
            self._open()
        except (lmdb.Error, OSError) as error:
            raise self._pack_error(error) from error

    def _resume(self) -> bool:
        """Open the partial file of an interrupted run and take its progress; False if there is none to go on with."""
        try:
            progress = _sound_progress(self.partial)
            if progress is None or progress["fingerprint"] != self._fingerprint:
                return False
            self._open()
        except FileNotFoundError:
            return False
        except (lmdb.Error, OSError) as error:
            raise self._pack_error(error) from error
        self.count, self.done, self.quarantined = progress["count"], progress["done"], progress["quarantined"]
        self._step, self._checksum = progress["step"], progress["checksum"]
        with self._environment.begin() as transaction:
            self._complete = transaction.get(b"manifest", db=self._meta) is not None
        return True

    def add(self, fields: Sequence[record.Field], row: Mapping[str, Any]) -> None:
        """Append one sample: its record and its value in each column."""
        value = record.build(fields)
        self._pending.append((sample_key(self.count), value))
        self._pending_bytes += len(value)
        for name, cells in self._rows.items():
            cells.append(row[name])
        self._heads.append(record.head_checksum(value))
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
        puts[self._piece_key(PLACES, self._step)] = np.array(self._heads, "<u8").tobytes()
        if self._left_out:
            puts[b"quarantine/%08d" % self._step] = json.dumps(self._left_out).encode()
        self._step += 1
        self._write(puts, self._pending)
        self._pending, self._pending_bytes, self._left_out, self._heads = [], 0, [], []
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
            for name, spec in sorted(self.columns.items()):
                self._gather_column(name, spec, digest)
            places = ColumnSpec.of("<u8", (3,))
            self._write_places(places)
            columns = {name: spec._asdict() for name, spec in {**self.columns, PLACES: places}.items()}
            digest.update(json.dumps([manifest["classes"], manifest["fields"]]).encode())
            whole = {"format_version": FORMAT_VERSION, "count": self.count, "digest": digest.hexdigest(), **manifest}
            whole |= {"columns": columns, "quarantined": self.quarantined}
            self._write({b"manifest": json.dumps(whole).encode()}, drop=b"step/")
        self._publish()

    def _progress(self) -> bytes:
        progress = {"fingerprint": self._fingerprint, "count": self.count, "done": self.done, "step": self._step}
        text = json.dumps(progress | {"quarantined": self.quarantined, "checksum": self._checksum}).encode()
        return b"%016x %s" % (record.checksum(text), text)

    def _piece_key(self, column: str, step: int) -> bytes:
        return (chunk_key(column, step) if column == "image" else f"step/{step:08d}/{column}").encode()

    def _pack_rows(self, column: str, rows: list[Any]) -> bytes:
        spec = self.columns[column]
        return np.asarray(rows, spec.dtype).reshape(len(rows), *spec.shape).tobytes()

    def _gather_column(self, name: str, spec: ColumnSpec, digest: xxhash.xxh3_128) -> None:
        """Copy a column's pieces into its chunks."""
        pieces = (self._piece(name, step) for step in range(self._step))
        for chunk, data in enumerate(_chunked(pieces, spec)):
            if name != "image":
                self._write({chunk_key(name, chunk).encode(): data})
            digest.update(data)

    def _piece(self, column: str, step: int) -> bytes:
        with self._environment.begin(db=self._meta) as transaction:
            return transaction.get(self._piece_key(column, step)) or b""

    def _write_places(self, spec: ColumnSpec) -> None:
        """Write down where the records are, which no later commit moves, and the checksums of their heads."""
        with self._partial_file() as file:
            pages = toc.pages_of(file)
        heads = np.frombuffer(b"".join(self._piece(PLACES, step) for step in range(self._step)), "<u8")
        rows = _with_heads(pages.numbered(pages.tree(b"samples")), heads)
        for chunk, data in enumerate(_chunked(rows, spec)):
            self._write({chunk_key(PLACES, chunk).encode(): data})

    @contextlib.contextmanager
    def _partial_file(self) -> Iterator[IO[bytes]]:
        """The partial file, if it is still the one that LMDB writes to."""
        try:
            with open(self.partial, "r+b") as file:
                if not os.path.samestat(os.fstat(file.fileno()), self._file):
                    raise PackError(f"{self.partial} was replaced while it was written; is another pack at work there?")
                yield file
        except OSError as error:
            raise self._pack_error(error) from error

    def _write(
        self, meta: Mapping[bytes, bytes], samples: Sequence[tuple[bytes, bytes]] = (), drop: bytes | None = None
    ) -> None:
        """Put values, and drop the meta keys that begin with `drop`, in one transaction, growing the map as needed."""
        page = self._environment.stat()["psize"]
        needed = sum(len(value) + 2 * page for value in itertools.chain(meta.values(), (value for _, value in samples)))
        try:
            info = self._environment.info()
            if (info["last_pgno"] + 1) * page + 2 * needed > info["map_size"]:
                self._environment.set_mapsize(2 * info["map_size"] + 2 * needed)
            with self._environment.begin(write=True) as transaction:
                for key, value in samples:
                    transaction.put(key, value, db=self._samples, append=True)
                    self._checksum ^= _checksum_of(key, value)
                for key, value in meta.items():
                    replaced = transaction.replace(key, value, db=self._meta)
                    self._checksum ^= _checksum_of(key, value)
                    if replaced is not None:
                        self._checksum ^= _checksum_of(key, replaced)
                if drop is not None:
                    self._checksum ^= _drop_prefix(transaction, self._meta, drop)
                transaction.put(b"progress", self._progress(), db=self._meta)
        except lmdb.Error as error:
            raise self._pack_error(error, needed) from error

    def _pack_error(self, error: Exception, needed: int = 1 << 20) -> PackError:
        """LMDB reports a write that was cut short by a full disk as an input/output error: ask the disk itself."""
        full = "No space left" in str(error) or "quota" in str(error)
        with contextlib.suppress(OSError):
            full = full or shutil.disk_usage(os.path.dirname(self.partial)).free < needed
        if full:
            return PackError(
                f"{self.partial}: no space left on the device; free some and run the same command again: "
                "it goes on from what is already packed"
            )
        return PackError(f"{self.partial} can't be written: {error}")

    def _publish(self) -> None:
        """Add the table of contents, sync, rename, and sync the folder: in this order, for power cuts."""
        self._environment.close()
        with self._partial_file() as file:
            toc.append(file, unchecked="column/image/")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(self.partial, self.path)
        except OSError as error:
            raise self._pack_error(error) from error
        if os.name == "posix":
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems have no folder sync
                os.fsync(folder)
            os.close(folder)


def _chunked(pieces: Iterable[bytes], spec: ColumnSpec) -> Iterator[bytes]:
    """The bytes of a column, in pieces of any length, as its chunks."""
    size = spec.rows_per_chunk * spec.row_bytes
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while len(rest) >= size:
            yield bytes(rest[:size])
            del rest[:size]
    if rest:
        yield bytes(rest)


def _with_heads(places: Iterable[Array], heads: npt.NDArray[np.uint64]) -> Iterator[bytes]:
    """Rows of the column of places: offset, length, checksum of the head."""
    count = 0
    for rows in places:
        yield np.column_stack([rows.astype("<u8"), heads[count : count + len(rows)]]).tobytes()
        count += len(rows)


def _sound_progress(path: str) -> dict[str, Any] | None:
    """The progress in a partial file; None if the file is damaged in any way, or no such file."""
    try:
        with open(path, "r+b") as file:
            pages = toc.pages_of(file)
        pages.check()
        meta = pages.values(pages.tree(b"meta"))
        offset, length = meta.pop(b"progress", (0, 0))
        own, _, text = bytes(pages.data[offset : offset + length]).partition(b" ")
        if own != b"%016x" % record.checksum(text):
            return None
        progress: dict[str, Any] = json.loads(text)
        found = count = 0
        for rows in pages.numbered(pages.tree(b"samples")):
            for offset, length in rows.tolist():
                found ^= _checksum_of(sample_key(count), pages.data[offset : offset + length])
                count += 1
        for key, (offset, length) in meta.items():
            found ^= _checksum_of(key, pages.data[offset : offset + length])
    except (StoreFormatError, ValueError):
        return None
    return progress if (found, count) == (progress["checksum"], progress["count"]) else None


def _drop_prefix(transaction: lmdb.Transaction[bytes], database: Any, prefix: bytes) -> int:
    """Delete what begins with `prefix`; the checksum of it."""
    checksum = 0
    with transaction.cursor(db=database) as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            checksum ^= _checksum_of(*cursor.item())
            found = cursor.delete()
    return checksum


def _checksum_of(key: bytes, value: bytes | memoryview) -> int:
    """An entry's part in the checksum of the whole file, which is their exclusive or: it goes as it came."""
    return xxhash.xxh3_64_intdigest(value, seed=xxhash.xxh3_64_intdigest(key))
