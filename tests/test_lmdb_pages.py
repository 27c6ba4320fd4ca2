"""The pages of LMDB files: what LMDB wrote is found, and no damage is more than an error."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.lmdb_pages import Leaf, Pages, PagesError

PAGE = 4096
keys = st.binary(min_size=1, max_size=40)
sizes = st.sampled_from((0, 1, 8, 100, 700, 2000, 2100, 5000, 70_000))
transactions = st.lists(
    st.lists(st.tuples(st.sampled_from([b"samples", b"meta"]), keys, sizes, st.booleans()), max_size=25), max_size=5
)


def database(path: Path, steps: list[list[tuple[bytes, bytes, int, bool]]]) -> dict[bytes, dict[bytes, bytes]]:
    """An LMDB file after some transactions that put and delete; what it then holds, by LMDB's own account."""
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=2, map_size=64 << 20) as environment:
        opened = {name: environment.open_db(name) for name in (b"samples", b"meta")}
        for number, step in enumerate(steps):
            with environment.begin(write=True) as transaction:
                for name, key, size, delete in step:
                    if delete:
                        transaction.delete(key, db=opened[name])
                    else:
                        transaction.put(key, bytes([number]) * size, db=opened[name])
        with environment.begin() as transaction:
            return {name: dict(transaction.cursor(db=db)) for name, db in opened.items()}


def pages_of(data: bytes) -> Pages:
    return Pages(memoryview(data))


@settings(max_examples=60, deadline=None)
@given(transactions)
def test_all_that_lmdb_holds_is_found(steps: list[list[tuple[bytes, bytes, int, bool]]]) -> None:
    """Values of all sizes, put, replaced and deleted: LMDB's own list of them, and sound pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "db")
        expected = database(path, steps)
        data = path.read_bytes()
    pages = pages_of(data)
    pages.check()
    for name, entries in expected.items():
        found = pages.values(pages.tree(name))
        assert {key: data[offset : offset + length] for key, (offset, length) in found.items()} == entries
        assert list(found) == sorted(entries)
    assert pages.meta.end <= len(data)


def numbered(path: Path, count: int = 3000) -> bytes:
    """A file of so many small samples, of two levels of branches, and some large ones."""
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=2, map_size=64 << 20) as environment:
        samples, meta = environment.open_db(b"samples"), environment.open_db(b"meta")
        for start in range(0, count, 500):
            with environment.begin(write=True) as transaction:
                for index in range(start, start + 500):
                    value = bytes([index % 256]) * (9000 if index % 700 == 1 else 30)
                    transaction.put(struct.pack(">Q", index), value, db=samples, append=True)
                transaction.put(b"progress", b"%d" % start, db=meta)
                transaction.put(b"step/%d" % start, bytes(3000), db=meta)
                transaction.delete(b"step/%d" % (start - 500), db=meta)
    return path.read_bytes()


def test_samples_are_found_in_their_order(tmp_path: Path) -> None:
    """The numbered tree gives places in the order of the numbers, whatever pages they are in."""
    data = numbered(tmp_path / "db")
    pages = pages_of(data)
    pages.check()
    places = np.concatenate(list(pages.numbered(pages.tree(b"samples"))))
    assert len(places) == 3000
    for index, (offset, length) in enumerate(places.tolist()):
        assert data[offset : offset + length] == bytes([index % 256]) * length
        assert length == (9000 if index % 700 == 1 else 30)
    assert len([nodes for _, _, nodes in pages._walk(pages.tree(b"samples")) if not isinstance(nodes, Leaf)]) >= 1


@pytest.mark.parametrize("wrong", [[0, 1, 3], [1, 2], [0, 2, 1 << 40], [b"x"]], ids=str)
def test_samples_that_are_not_numbered_are_an_error(tmp_path: Path, wrong: list[Any]) -> None:
    """A number that is left out, or a key of another length."""
    with lmdb.open(str(tmp_path / "db"), subdir=False, lock=False, max_dbs=1) as environment:
        samples = environment.open_db(b"samples")
        with environment.begin(write=True, db=samples) as transaction:
            for key in wrong:
                transaction.put(key if isinstance(key, bytes) else struct.pack(">Q", key), b"value")
    pages = pages_of((tmp_path / "db").read_bytes())
    with pytest.raises(PagesError):
        list(pages.numbered(pages.tree(b"samples")))


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    """The error names it."""
    database(tmp_path / "db", [])
    with pytest.raises(PagesError, match="no database 'other'"):
        pages_of((tmp_path / "db").read_bytes()).tree(b"other")


def read_all(data: bytes) -> Any:
    pages = pages_of(data)
    pages.check()
    found = {
        name: {key: data[offset : offset + length] for key, (offset, length) in pages.values(pages.tree(name)).items()}
        for name in (b"samples", b"meta")
    }
    list(pages.numbered(pages.tree(b"samples")))
    return found


def tree_pages(data: bytes) -> list[int]:
    pages = pages_of(data)
    trees = (pages.meta.free, pages.meta.main, pages.tree(b"samples"), pages.tree(b"meta"))
    return [number for tree in trees for number, _, _ in pages._walk(tree)]


def test_damage_is_an_error_or_does_no_harm(tmp_path: Path) -> None:
    """Bits of meta pages (an older state may come) and tree pages flipped: PagesError, or as many entries as before."""
    data = numbered(tmp_path / "db", 1000)
    expected = read_all(data)
    numbers = tree_pages(data)
    random = np.random.default_rng(0)
    errors = 0
    for _ in range(1500):
        page = int(random.choice([0, 1, *numbers]))
        place = page * PAGE + int(random.integers(160 if page < 2 else random.choice([16, 300, PAGE])))
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(random.integers(8))
        try:
            found = read_all(bytes(damaged))
        except PagesError:
            errors += 1
            continue
        for name, entries in expected.items():
            assert page < 2 or len(found[name]) == len(entries)
    assert errors > 400


def test_pages_that_lead_in_a_circle_are_an_error(tmp_path: Path) -> None:
    """A branch that names itself, or its parent, ends."""
    data = bytearray(numbered(tmp_path / "db"))
    pages = pages_of(bytes(data))
    root = pages.tree(b"samples").root
    node = root * PAGE + struct.unpack_from("<H", data, root * PAGE + 16 + 2)[0]
    struct.pack_into("<HH", data, node, root & 0xFFFF, root >> 16)
    with pytest.raises(PagesError, match=r"circle|used twice|other numbers|at depth"):
        pages_of(bytes(data)).check()
    with pytest.raises(PagesError, match="circle"):
        pages_of(bytes(data)).values(pages.tree(b"samples"))


@pytest.mark.parametrize("size", [1, 512, 777, 1 << 17, 0xFFFFFFFF])
def test_a_page_size_that_lmdb_has_not(tmp_path: Path, size: int) -> None:
    """It is an error; one that LMDB could have, of another machine, leads to other pages, and to an error there."""
    database(tmp_path / "db", [])
    data = bytearray((tmp_path / "db").read_bytes())
    struct.pack_into("<I", data, 40, size)
    with pytest.raises(PagesError):
        read_all(bytes(data))


def test_free_pages_that_are_in_use_are_an_error(tmp_path: Path) -> None:
    """LMDB would write over them."""
    data = bytearray(numbered(tmp_path / "db"))
    pages = pages_of(bytes(data))
    (place, *_), *_ = (leaf.values.tolist() for leaf in pages._leaves(pages.meta.free))
    struct.pack_into("<Q", data, place + 8, pages.tree(b"samples").root)
    with pytest.raises(PagesError, match="used twice"):
        pages_of(bytes(data)).check()


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    """Before its last page's end; what is behind that is nobody's."""
    data = numbered(tmp_path / "db", 500)
    end = pages_of(data).meta.end
    for length in [*range(0, 400, 13), *range(400, end, 1999), end - 1]:
        with pytest.raises(PagesError):
            pages_of(data[:length])
    assert read_all(data[:end]) == read_all(data + b"more")


def test_a_compacted_copy_by_lmdb_holds_the_same(tmp_path: Path) -> None:
    """Other pages, no free ones."""
    numbered(tmp_path / "db")
    with lmdb.open(str(tmp_path / "db"), subdir=False, lock=False, readonly=True) as environment:
        environment.copy(str(tmp_path / "compact"), compact=True)
    assert read_all((tmp_path / "compact").read_bytes()) == read_all((tmp_path / "db").read_bytes())
