"""Stores that nobody would pack: changed by LMDB, and given a table of contents that agrees."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from fastload import record, toc
from fastload.lmdb_pages import Pages
from fastload.manifest import PLACES
from fastload.store import chunk_key


@contextlib.contextmanager
def edited(path: Path, database: bytes = b"meta") -> Iterator[Any]:
    """A transaction on a store; afterwards the store's places and its table of contents are made anew."""
    with _transaction(path, database) as transaction:
        yield transaction
    if database == b"samples":
        pages = Pages(memoryview(path.read_bytes()))
        rows = np.concatenate(list(pages.numbered(pages.tree(database))))
        with _transaction(path, b"meta") as transaction:
            heads = [record.head_checksum(pages.data[offset : offset + length]) for offset, length in rows.tolist()]
            places = np.column_stack([rows.astype("<u8"), np.array(heads, "<u8")])
            transaction.put(chunk_key(PLACES, 0).encode(), places.tobytes())
    seal(path)


def seal(path: Path) -> None:
    """Give an LMDB file the table of contents that it lacks, or that has become stale."""
    with open(path, "r+b") as file:
        toc.append(file, unchecked="column/image/")


@contextlib.contextmanager
def _transaction(path: Path, database: bytes) -> Iterator[Any]:
    with lmdb.open(os.fspath(path), subdir=False, lock=False, max_dbs=2) as environment:
        opened = environment.open_db(database)
        with environment.begin(write=True, db=opened) as transaction:
            yield transaction
