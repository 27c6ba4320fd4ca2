"""Stores written and read: resumed, killed, shared between threads and processes, damaged, forged, out of space."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from edits import edited, seal
from hypothesis import given, settings
from hypothesis import strategies as st
from mounts import small_disk

from fastload import record
from fastload.errors import ChecksumError, FastloadError, PackError, StoreError, StoreFormatError
from fastload.lmdb_pages import Pages
from fastload.record import Field
from fastload.store import Column, ColumnSpec, Store
from fastload.store_writer import StoreWriter

SPECS = {
    "label": ColumnSpec("<i8", (), 5),
    "size": ColumnSpec("<u4", (2,), 7),
    "checksum": ColumnSpec("<u8", (), 1000),
}
RAW_SPECS = {**SPECS, "image": ColumnSpec("|u1", (4, 5, 3), 3)}
FIELDS = [{"name": "image", "kind": "image", "in": "record"}, {"name": "name", "kind": "text", "in": "record"}]
MANIFEST: dict[str, Any] = {"classes": ["ant", "bee"], "fields": FIELDS, "source": "folders"}
RAW_MANIFEST = {**MANIFEST, "fields": [FIELDS[0] | {"in": "column"}, FIELDS[1]]}

POSIX = os.name == "posix"
posix_only = pytest.mark.skipif(not POSIX, reason="POSIX only")
CLEAN = multiprocessing.get_context("forkserver" if POSIX else "spawn")
"""Children with no threads and no open stores of ours; a kill hits nothing but the child."""

if POSIX:
    multiprocessing.set_forkserver_preload(["fastload", "hypothesis", "pytest"])


def payload_of(index: int, size: int) -> bytes:
    return random.Random(index).randbytes(size + index * 37 % 500)


def add(writer: StoreWriter, index: int, size: int) -> None:
    """The sample that item `index` of the source gives, whatever happened before."""
    payload = payload_of(index, size)
    name = Field(record.TEXT, f"ant/{index}.jpg".encode())
    row: dict[str, Any] = {"label": 3 * index - 1, "size": (index, index + 1), "checksum": record.checksum(payload)}
    if "image" in writer.columns:
        row["image"] = np.full((4, 5, 3), index % 256)
        writer.add([name], row)
    else:
        writer.add([Field(record.BYTES, payload), name], row)


def write(
    path: Path,
    good: Sequence[bool],
    *,
    raw: bool = False,
    commits: Collection[int] = (),
    stop: int | None = None,
    size: int = 20,
    fingerprint: str = "f",
    say: Callable[[object], None] = lambda _: None,
) -> bool:
    """Write a store whose items are good or left out, or go on with it; False if it was left at item `stop`."""
    is_new = not path.exists()
    with StoreWriter(path, RAW_SPECS if raw else SPECS, fingerprint) as writer:
        for i in range(writer.done, len(good)):
            if i == stop:
                return False
            if good[i]:
                add(writer, i, size)
            else:
                writer.leave_out(f"ant/{i}.jpg", f"reason {i}")
            writer.advance()
            say(i)
            assert not (is_new and path.exists())
            if i in commits:
                writer.commit()
        say("finish")
        writer.finish(RAW_MANIFEST if raw else MANIFEST)
    return True


def contents(store: Store) -> dict[str, Any]:
    """All that a store holds, as plain values."""
    return {
        "manifest": store.manifest,
        "classes": store.classes,
        "records": [bytes(store.view(i)) for i in range(len(store))],
        "samples": [[(name, field) for name, field in store[i].fields.items()] for i in range(len(store))],
        "columns": {name: np.asarray(column).tolist() for name, column in store.columns.items()},
        "quarantine": store.quarantine(),
    }


def contents_at(path: str | Path) -> dict[str, Any]:
    return contents(Store(path))


def written(path: Path, count: int = 20, **options: Any) -> Path:
    assert write(path, [True] * count, **options)
    return path


@pytest.fixture(scope="module")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples in four chunks of labels."""
    return written(tmp_path_factory.mktemp("store") / "twenty.lmdb")


def in_child(function: Callable[..., Any], *arguments: Any, context: Any = CLEAN) -> Any:
    """What `function` gives in another process; an error there is raised here, a crash fails the test."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result(60)


def forked(function: Callable[[], Any]) -> Any:
    """What `function`, with all that it refers to, gives in a fork of this very process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        assert receiver.poll(60), "the forked child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


# ---- write and read


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Records, names, columns over several chunks, classes, counts and the quarantine list."""
    path = tmp_path / "db.lmdb"
    write(path, [i % 4 != 2 for i in range(23)])
    good = [i for i in range(23) if i % 4 != 2]
    store = Store(path)
    assert len(store) == len(good) == store.manifest["count"]
    assert [store[i].name for i in range(len(store))] == [f"ant/{i}.jpg" for i in good]
    assert [store[i]["image"].payload for i in range(len(store))] == [payload_of(i, 20) for i in good]
    assert np.asarray(store.columns["label"]).tolist() == [3 * i - 1 for i in good]
    assert np.asarray(store.columns["size"]).tolist() == [[i, i + 1] for i in good]
    assert store.quarantine() == [{"name": f"ant/{i}.jpg", "reason": f"reason {i}"} for i in range(2, 23, 4)]
    assert store.manifest["quarantined"] == 6
    assert (store.classes, store.manifest["source"], store.manifest["format_version"]) == (["ant", "bee"], "folders", 1)
    assert store.path == str(path)


def test_samples_are_indexed_like_a_sequence(sample_store: Path) -> None:
    """Negative indices count from the end, beyond both ends is IndexError, for samples and columns."""
    store = Store(sample_store)
    assert store[-1].name == "ant/19.jpg"
    assert store.columns["label"][-20] == -1
    for index in (20, -21):
        with pytest.raises(IndexError):
            store[index]
        with pytest.raises(IndexError):
            store.columns["label"][index]


def test_what_users_get_is_a_copy(sample_store: Path) -> None:
    """Samples and values outlive the store and can be written to without touching the file."""
    store = Store(sample_store)
    sample, row, column = store[3], store.columns["size"][3], np.asarray(store.columns["size"])
    assert isinstance(sample["image"].payload, bytes)
    row[:] = 99
    column[:] = 99
    assert store.columns["size"][3].tolist() == [3, 4]
    del store
    gc.collect()
    sample["image"].verify()
    assert row.tolist() == [99, 99]


def test_columns_are_arrays_to_numpy(sample_store: Path) -> None:
    """len, dtype, shape and conversion with and without a type; a conversion that must not copy is refused."""
    column = Store(sample_store).columns["size"]
    assert (len(column), column.dtype, column.shape) == (20, np.dtype("<u4"), (2,))
    assert np.asarray(column).dtype == np.dtype("<u4")
    assert np.asarray(column, np.float32).dtype == np.float32
    assert [len(chunk) for chunk in column.chunks()] == [7, 7, 6]
    with pytest.raises(ValueError, match="always copies"):
        column.__array__(copy=False)


def test_views_of_columns_are_read_only(sample_store: Path) -> None:
    """A view of the map can't be written to: that would be a segmentation fault."""
    store = Store(sample_store)
    with pytest.raises(ValueError, match="read-only"):
        store.columns["size"].view(0)[0] = 1
    assert store.view(0).readonly


def test_a_spec_of_its_own_choice_fills_64_megabytes() -> None:
    """`ColumnSpec.of` counts the rows of a chunk; a row that is larger gets a chunk of its own."""
    assert ColumnSpec.of("<i8") == ColumnSpec("<i8", (), 8 << 20)
    assert ColumnSpec.of("|u1", (32, 32, 3)).rows_per_chunk == (64 << 20) // 3072
    assert ColumnSpec.of("|u1", (8192, 8192, 3)).rows_per_chunk == 1
    assert ColumnSpec("<u4", (3, 5), 1).row_bytes == 60


layouts = st.tuples(
    st.sampled_from(("<i8", "<u4", "<i2", "<f4", "|u1")),
    st.sampled_from(((), (2,), (3, 5), (41, 40, 3), (5, 4, 3), (64, 64))),
    st.integers(1, 7),
    st.integers(1, 30),
)


@settings(max_examples=40, deadline=None)
@given(layout=layouts, data=st.data())
def test_gather_is_numpys_take(layout: tuple[str, tuple[int, ...], int, int], data: st.DataObject) -> None:
    """Over one chunk or many, any type and shape, small rows inside LMDB's pages and large ones on their own."""
    dtype, shape, rows, count = layout
    name = "image" if dtype == "|u1" and shape[2:] == (3,) else "extra"
    expected = np.random.default_rng(count).integers(0, 100, (count, *shape)).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "db.lmdb")
        with StoreWriter(path, {name: ColumnSpec(dtype, shape, rows)}, "f") as writer:
            for row in expected:
                writer.add([Field(record.BYTES, b"x")], {name: row})
                writer.advance()
            writer.finish(MANIFEST)
        column = Store(path).columns[name]
        np.testing.assert_array_equal(np.asarray(column), expected)
        for _ in range(3):
            where = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=40)), np.int64)
            np.testing.assert_array_equal(column.gather(where), expected[where])
            out = np.full((len(where), *shape), 77, dtype)
            assert column.gather(where, out) is out
            np.testing.assert_array_equal(out, expected[where])
        del column


def test_a_finished_store_has_nothing_left_of_its_making(tmp_path: Path) -> None:
    """The pieces of the steps are gone from `meta`: there are the manifest, chunks, quarantine and progress."""
    write(tmp_path / "db.lmdb", [True, False] * 10, commits=range(1, 20, 3))
    with lmdb.open(str(tmp_path / "db.lmdb"), subdir=False, lock=False, readonly=True, max_dbs=2) as environment:
        meta = environment.open_db(b"meta", create=False)
        transaction = environment.begin(db=meta)
        keys = {bytes(key).split(b"/")[0] for key, _ in transaction.cursor()}
    assert keys == {b"manifest", b"column", b"quarantine", b"progress"}


def test_a_store_larger_than_its_first_map_is_written(tmp_path: Path) -> None:
    """The writer's map begins at 256 MB and grows as it must."""
    size = 150 << 20
    with StoreWriter(tmp_path / "db.lmdb", {"label": SPECS["label"]}, "f") as writer:
        for i in range(2):
            writer.add([Field(record.BYTES, bytes(size)), Field(record.TEXT, b"name")], {"label": i})
            writer.commit()
        writer.finish(MANIFEST)
    store = Store(tmp_path / "db.lmdb")
    assert [len(store[i]["image"].payload) for i in range(2)] == [size, size]


def test_equal_contents_have_equal_digests_and_others_other_ones(tmp_path: Path) -> None:
    """The digest tells stores apart by their columns, classes and fields, however they were written."""
    digests = []
    for number, (count, commits) in enumerate([(20, ()), (20, range(3, 20, 4)), (19, ())]):
        path = written(tmp_path / f"{number}.lmdb", count, commits=commits)
        digests.append(Store(path).manifest["digest"])
    assert digests[0] == digests[1] != digests[2]


# ---- stop and resume


@settings(max_examples=20, deadline=None)
@given(
    good=st.lists(st.booleans(), max_size=25).map(lambda items: [*items, True]),
    commits=st.sets(st.integers(0, 25)),
    stops=st.lists(st.integers(0, 26), max_size=4),
    raw=st.booleans(),
)
def test_a_resumed_store_is_the_store_of_an_undisturbed_run(
    good: list[bool], commits: set[int], stops: list[int], raw: bool
) -> None:
    """Left any number of times, anywhere, with any commits: records, columns, quarantine and manifest are the same."""
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = Path(folder, "whole.lmdb"), Path(folder, "resumed.lmdb")
        write(whole, good, raw=raw)
        for stop in stops:
            write(resumed, good, raw=raw, commits=() if raw else commits, stop=stop)  # raw steps are whole chunks
            if resumed.exists():
                break
        else:
            write(resumed, good, raw=raw)
        assert contents_at(resumed) == contents_at(whole)
        assert sorted(os.listdir(folder)) == ["resumed.lmdb", "whole.lmdb"]


def test_a_resumed_writer_says_what_is_done(tmp_path: Path) -> None:
    """done counts items, count samples, quarantined what was left out: all as of the last commit."""
    good = [True, True, False, True, False, True, True]
    write(tmp_path / "db.lmdb", good, commits=[3], stop=6)
    with StoreWriter(tmp_path / "db.lmdb", SPECS, "f") as writer:
        assert (writer.done, writer.count, writer.quarantined) == (4, 3, 1)
        assert writer.first_left_out() == {"name": "ant/2.jpg", "reason": "reason 2"}


def test_the_first_that_was_left_out_is_known_before_it_is_committed(tmp_path: Path) -> None:
    """`first_left_out` looks at what is stored and what is pending; {} where nothing was left out."""
    with StoreWriter(tmp_path / "db.lmdb", SPECS, "f") as writer:
        assert writer.first_left_out() == {}
        writer.leave_out("a", "b")
        assert writer.first_left_out() == {"name": "a", "reason": "b"}


def test_a_raw_column_commits_itself_chunk_by_chunk(tmp_path: Path) -> None:
    """An interrupted raw store keeps the chunks that were full, without anyone calling commit."""
    write(tmp_path / "db.lmdb", [True] * 10, raw=True, stop=8)
    with StoreWriter(tmp_path / "db.lmdb", RAW_SPECS, "f") as writer:
        assert (writer.done, writer.count) == (6, 6)


def test_a_finish_that_failed_at_the_rename_is_repeated(tmp_path: Path) -> None:
    """The complete partial store is taken as it is when the final name has become free."""
    path = tmp_path / "db.lmdb"
    with StoreWriter(path, SPECS, "f") as writer:
        add(writer, 0, 20)
        writer.advance()
        path.mkdir()
        with pytest.raises(PackError, match=r"db\.lmdb"):
            writer.finish(MANIFEST)
    path.rmdir()
    with StoreWriter(path, SPECS, "f") as writer:
        assert writer.done == 1
        writer.finish(MANIFEST)
    write(tmp_path / "whole.lmdb", [True])
    assert contents_at(path) == contents_at(tmp_path / "whole.lmdb")


def test_a_finished_store_replaces_the_one_of_its_name(tmp_path: Path) -> None:
    """The old store stays whole until the rename, then the new one is there; the partial file is gone."""
    path = written(tmp_path / "db.lmdb", 5)
    with StoreWriter(path, SPECS, "other") as writer:
        add(writer, 0, 20)
        writer.commit()
        assert len(Store(path)) == 5
        writer.finish(MANIFEST)
    assert len(Store(path)) == 1
    assert os.listdir(tmp_path) == ["db.lmdb"]


def test_another_fingerprint_starts_over(tmp_path: Path) -> None:
    """Progress of another source or of other options is not gone on with."""
    path = tmp_path / "db.lmdb"
    write(path, [False] * 5 + [True] * 5, commits=[7], stop=9)
    with StoreWriter(path, SPECS, "another") as writer:
        assert (writer.done, writer.count, writer.quarantined) == (0, 0, 0)
    write(path, [True] * 6, fingerprint="another")
    store = Store(path)
    assert [store[i].name for i in range(len(store))] == [f"ant/{i}.jpg" for i in range(6)]
    assert store.quarantine() == []


def test_discard_leaves_nothing_behind(tmp_path: Path) -> None:
    """After `discard` there is no partial file, and leaving the context is no error."""
    with StoreWriter(tmp_path / "db.lmdb", SPECS, "f") as writer:
        add(writer, 0, 20)
        writer.commit()
        writer.discard()
    assert os.listdir(tmp_path) == []


def partial_of(folder: Path) -> bytes:
    write(folder / "other.lmdb", [True] * 20, commits=range(0, 20, 3), stop=19, size=600)
    return (folder / "other.lmdb.partial").read_bytes()


UNUSABLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"not a database\n" * 100,
    "noise": lambda whole: random.Random(1).randbytes(len(whole)),
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "cut in its head": lambda whole: whole[:100],
    "cut by a byte": lambda whole: whole[:-1],
    "cut after its first page": lambda whole: whole[:4096],
    "zeros after its two head pages": lambda whole: whole[:8192] + bytes(len(whole) - 8192),
    "noise after its two head pages": lambda whole: whole[:8192] + random.Random(2).randbytes(len(whole) - 8192),
    "another program's database": lambda _: foreign_database(),
}


def foreign_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "foreign")
        with lmdb.open(path, subdir=False, lock=False, max_dbs=2) as environment, environment.begin(write=True) as txn:
            txn.put(b"key", b"value")
        return Path(path).read_bytes()


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_partial_file_that_is_no_good_is_started_over(tmp_path: Path, how: str) -> None:
    """Whatever lies at the partial name, packing again gives the whole store (in a child: LMDB may crash)."""
    (tmp_path / "db.lmdb.partial").write_bytes(UNUSABLE[how](partial_of(tmp_path)))
    in_child(functools.partial(write, size=600), tmp_path / "db.lmdb", [True] * 20)
    write(tmp_path / "whole.lmdb", [True] * 20, size=600)
    assert contents_at(tmp_path / "db.lmdb") == contents_at(tmp_path / "whole.lmdb")


def packed_after_flips(folder: Path, count: int) -> list[str]:
    """What went wrong when packs went on from partial files with flipped bits, most of them in LMDB's own pages."""
    partial, path = partial_of(folder), folder / "db.lmdb"
    write(folder / "whole.lmdb", [True] * 20, size=600)
    whole, pages = contents_at(folder / "whole.lmdb"), Pages(memoryview(partial))
    trees = (pages.meta.free, pages.meta.main, pages.tree(b"samples"), pages.tree(b"meta"))
    numbers = [0, 1, *(number for tree in trees for number, _, _ in pages._walk(tree))]
    choose, wrong = random.Random(0), []
    for _ in range(count):
        damaged = bytearray(partial)
        for _ in range(choose.choice([1, 1, 1, 5, 500])):
            number = choose.choice(numbers) if choose.random() < 0.8 else choose.randrange(len(partial) // 4096)
            place = number * 4096 + choose.randrange(choose.choice([160, 4096]))
            damaged[min(place, len(partial) - 1)] ^= 1 << choose.randrange(8)
        path.unlink(missing_ok=True)
        (folder / "db.lmdb.partial").write_bytes(damaged)
        write(path, [True] * 20, size=600)
        wrong += [] if contents_at(path) == whole else ["other contents"]
    return wrong


def test_a_partial_file_with_flipped_bits_anywhere(tmp_path: Path) -> None:
    """LMDB is never let near one: in its trees, its list of free pages or its head it would die of them."""
    assert in_child(packed_after_flips, tmp_path, 150) == []


def test_a_folder_that_is_missing_is_a_pack_error(tmp_path: Path) -> None:
    """The error names the file, and the system's reason."""
    with pytest.raises(PackError, match=r"missing.db\.lmdb\.partial can't be written: .*No such file"):
        StoreWriter(tmp_path / "missing" / "db.lmdb", SPECS, "f")


# ---- kill -9


def write_and_tell(path: Path, connection: Connection) -> None:
    write(path, [i % 5 != 1 for i in range(40)], commits=range(1, 40, 4), size=100_000, say=connection.send)


def killed_at(path: Path, moment: object) -> None:
    """Run a writer in a process of its own, and kill it without warning when it says `moment`, or has ended."""
    receiver, sender = CLEAN.Pipe(duplex=False)
    child = CLEAN.Process(target=write_and_tell, args=(path, sender))
    child.start()
    sender.close()
    with contextlib.suppress(EOFError):
        while receiver.recv() != moment:
            pass
    child.kill()
    child.join()


def test_a_store_whose_writer_was_killed_is_resumed(tmp_path: Path) -> None:
    """kill -9 in the middle of adding, of committing and of finishing, one after the other, on one store."""
    path = tmp_path / "killed.lmdb"
    for moment in (0, 5, 13, 14, 30, "finish", "finish"):
        killed_at(path, moment)
        if path.exists():  # the kill came after the last step
            break
    else:
        write(path, [i % 5 != 1 for i in range(40)], size=100_000)
    write(tmp_path / "whole.lmdb", [i % 5 != 1 for i in range(40)], size=100_000)
    assert contents_at(path) == contents_at(tmp_path / "whole.lmdb")
    assert sorted(os.listdir(tmp_path)) == ["killed.lmdb", "whole.lmdb"]


@pytest.mark.parametrize("moment", [9, "finish"])
def test_a_killed_writer_keeps_what_it_had_committed(tmp_path: Path, moment: object) -> None:
    """After the kill the partial store has at least the progress that was committed before it."""
    path = tmp_path / "db.lmdb"
    killed_at(path, moment)
    if not path.exists():
        with StoreWriter(path, SPECS, "f") as writer:
            assert writer.done >= (5 if moment == 9 else 37)


# ---- no space


@pytest.mark.parametrize("megabytes", [1, 2, 3])
def test_a_full_disk_is_said_and_the_same_run_goes_on_when_there_is_space(tmp_path: Path, megabytes: int) -> None:
    """PackError names the cause and the next step; what was committed is kept, and the result is whole."""
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes) as resize:
        path = disk / "db.lmdb"
        for _ in range(2):
            with pytest.raises(PackError, match=r"no space left on the device; free some and run the same command"):
                write(path, [True] * 40, size=100_000, commits=range(0, 40, 2))
            assert not path.exists()
        resize(64)
        with StoreWriter(path, SPECS, "f") as writer:
            assert writer.done > 0
        write(path, [True] * 40, size=100_000, commits=range(0, 40, 2))
        found = contents_at(path)
        gc.collect()
    write(tmp_path / "whole.lmdb", [True] * 40, size=100_000)
    assert found == contents_at(tmp_path / "whole.lmdb")


def write_with_a_limit(path: Path, limit: int) -> str:
    import resource  # POSIX only

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(path, [True] * 40, size=100_000, commits=range(0, 40, 2))
    except PackError as error:
        return str(error)
    return "no error"


@posix_only
@pytest.mark.parametrize("limit", [10_000, 1 << 20, 3 << 20])
def test_a_file_that_may_not_grow_is_a_pack_error_and_is_resumed(tmp_path: Path, limit: int) -> None:
    """The same with a limit on the file's size, as a quota has: an error that names the file, then the whole store."""
    path = tmp_path / "db.lmdb"
    assert "db.lmdb.partial" in in_child(write_with_a_limit, path, limit)
    assert not path.exists()
    write(path, [True] * 40, size=100_000)
    write(tmp_path / "whole.lmdb", [True] * 40, size=100_000)
    assert contents_at(path) == contents_at(tmp_path / "whole.lmdb")


# ---- many readers


def test_a_pickled_store_is_small_and_reads_the_same(sample_store: Path) -> None:
    """Pickling takes the path and the manifest, not the data; columns can be pickled too."""
    store = Store(sample_store)
    expected = contents(store)
    data = pickle.dumps(store)
    assert payload_of(3, 20) not in data
    assert len(data) < 5000
    assert contents(pickle.loads(data)) == expected
    column: Column = pickle.loads(pickle.dumps(store.columns["label"]))
    assert np.asarray(column).tolist() == expected["columns"]["label"]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_children_read_a_store_that_was_opened_before_them(sample_store: Path, method: str) -> None:
    """fork, spawn and forkserver: the child reads the same, twice, and the parent's store lives on."""
    store = Store(sample_store)
    expected = contents(store)
    if method == "fork":
        assert forked(lambda: [contents(store), contents(store)]) == [expected] * 2
        assert forked(lambda: contents(pickle.loads(pickle.dumps(store)))) == expected
    else:
        assert in_child(contents, store, context=multiprocessing.get_context(method)) == expected
    assert contents(store) == expected


@posix_only
def test_a_fork_of_a_fork_reads_too(sample_store: Path) -> None:
    """The map goes along with every generation."""
    store, other = Store(sample_store), Store(sample_store)
    expected = contents(store)
    assert forked(lambda: [contents(store), forked(lambda: [contents(other), contents(store)])]) == [
        expected,
        [expected, expected],
    ]


def test_threads_read_one_store_at_once(sample_store: Path) -> None:
    """Eight threads open and read an unpickled store together, again and again, each all of it."""
    expected = contents_at(sample_store)
    for _ in range(5):
        store: Store = pickle.loads(pickle.dumps(Store(sample_store)))
        together = threading.Barrier(8)

        def read(store: Store = store, together: threading.Barrier = together) -> list[dict[str, Any]]:
            together.wait()
            return [contents(store) for _ in range(3)]

        with ThreadPoolExecutor(8) as pool:
            assert [future.result() for future in [pool.submit(read) for _ in range(8)]] == [[expected] * 3] * 8


def test_stores_of_one_file_share_it_and_part_in_peace(sample_store: Path, tmp_path: Path) -> None:
    """Two objects, other spellings and links of one path, dropped one after the other."""
    expected = contents_at(sample_store)
    os.link(sample_store, tmp_path / "hard.lmdb")
    paths = [sample_store, Path(os.path.relpath(sample_store)), tmp_path / "hard.lmdb"]
    if POSIX:
        (tmp_path / "soft.lmdb").symlink_to(sample_store)
        paths.append(tmp_path / "soft.lmdb")
    stores = [Store(path) for path in paths]
    while stores:
        assert [contents(store) for store in stores] == [expected] * len(stores)
        del stores[0]
        gc.collect()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_stores_that_are_dropped_leave_no_file_open(sample_store: Path) -> None:
    """Opened and dropped a hundred times, read by threads that have ended: as many open files as before."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        store = Store(sample_store)
        thread = threading.Thread(target=store.view, args=(0,))
        thread.start()
        thread.join()
        store[1]
    del store, thread
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@posix_only
def test_a_store_that_was_replaced_while_open(tmp_path: Path) -> None:
    """An open store goes on with the old file, in forks too; a new one reads the new; a pickled one says so."""
    path = written(tmp_path / "db.lmdb", 8)
    store = Store(path)
    before = contents(store)
    pickled = pickle.dumps(store)
    written(path, 5, fingerprint="new")
    assert contents(store) == before
    new = Store(path)
    assert len(new) == len(contents(new)["records"]) == 5
    assert contents(store) == before
    with pytest.raises(StoreError, match=r"db\.lmdb was replaced by another store while in use; open it again"):
        contents(pickle.loads(pickled))

    assert forked(lambda: contents(store)) == before


def test_a_store_that_was_removed_while_pickled(tmp_path: Path) -> None:
    """Nothing at the path any more is FileNotFoundError, with the path and the next step."""
    path = written(tmp_path / "db.lmdb", 3)
    pickled = pickle.dumps(Store(path))
    gc.collect()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"db\.lmdb.*fastload pack"):
        contents(pickle.loads(pickled))


# ---- no store, or half of one


def outcome(path: Path) -> str:
    """What comes of opening and reading a file: "read", or the error's type and message."""
    try:
        contents_at(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def outcomes_of_truncations(path: Path, copy: Path, lengths: list[int]) -> dict[int, str]:
    data = path.read_bytes()
    found = {}
    for length in lengths:
        copy.write_bytes(data[:length])
        found[length] = outcome(copy)
    return found


def test_a_store_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    """A map beyond the end of its file is SIGBUS, so every length is refused before (in a child, should one not be)."""
    path = written(tmp_path / "db.lmdb", size=3000)
    size = path.stat().st_size
    pages = [page + offset for page in range(0, size, 4096) for offset in (-1, 0, 1, 152, 600)]
    lengths = sorted({length for length in [*range(0, 200, 7), *pages] if 0 <= length < size} | {size - 1})
    found = in_child(outcomes_of_truncations, path, tmp_path / "cut.lmdb", [*lengths, size])
    assert found.pop(size) == "read"
    assert {error.split(":")[0] for error in found.values()} == {"StoreFormatError"}
    assert all("cut short" in error or length < 152 for length, error in found.items())


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\xff\xd8\xff\xe0" * 500, bytes(20_000), random.Random(3).randbytes(20_000)],
    ids=["empty", "text", "jpeg", "zeros", "noise"],
)
def test_what_is_no_lmdb_file_is_no_store(tmp_path: Path, data: bytes) -> None:
    """The error names the file and says how a store is made."""
    (tmp_path / "db.lmdb").write_bytes(data)
    with pytest.raises(StoreFormatError, match=r"db\.lmdb: not a fastload store; make one with `fastload pack FOLDER"):
        Store(tmp_path / "db.lmdb")


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    """The likely mistake, a folder of images, is answered with the command that packs it."""
    with pytest.raises(StoreFormatError, match=rf"is a folder.*fastload pack {tmp_path}"):
        Store(tmp_path)


def test_nothing_is_no_store(tmp_path: Path) -> None:
    """A path with nothing there is FileNotFoundError."""
    with pytest.raises(FileNotFoundError, match=r"db\.lmdb"):
        Store(tmp_path / "db.lmdb")


def open_named_pipe(path: Path) -> None:
    with contextlib.suppress(StoreFormatError):
        Store(path)


@posix_only
def test_a_named_pipe_is_no_store(tmp_path: Path) -> None:
    """It is refused; opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    child = CLEAN.Process(target=open_named_pipe, args=(tmp_path / "pipe",))
    child.start()
    child.join(10)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs


def test_another_programs_lmdb_file_is_no_store(tmp_path: Path) -> None:
    """Databases that aren't there are refused with the way to make a store."""
    (tmp_path / "db.lmdb").write_bytes(foreign_database())
    with pytest.raises(StoreFormatError, match=r"not a fastload store.*fastload pack"):
        Store(tmp_path / "db.lmdb")


def altered(path: Path, copy: Path, changes: dict[bytes, bytes | None], database: bytes = b"meta") -> Path:
    """A copy of a store with other values in it, None for none, and checksums that agree with them."""
    shutil.copy(path, copy)
    with edited(copy, database) as transaction:
        for key, value in changes.items():
            if value is None:
                assert transaction.delete(key)
            else:
                transaction.put(key, value)
    return copy


def test_a_store_that_was_never_finished_is_no_store(tmp_path: Path, sample_store: Path) -> None:
    """Without a manifest, as a renamed partial file has none."""
    path = altered(sample_store, tmp_path / "db.lmdb", {b"manifest": None})
    with pytest.raises(StoreFormatError, match="without a fastload manifest; pack it again"):
        Store(path)
    write(tmp_path / "x.lmdb", [True] * 3, commits=[1], stop=2)
    os.rename(tmp_path / "x.lmdb.partial", tmp_path / "renamed.lmdb")
    with pytest.raises(StoreFormatError, match="not a fastload store, or cut short: there is no table of contents"):
        Store(tmp_path / "renamed.lmdb")
    seal(tmp_path / "renamed.lmdb")
    with pytest.raises(StoreFormatError, match="without a fastload manifest"):
        Store(tmp_path / "renamed.lmdb")


def test_a_newer_format_asks_for_an_update(tmp_path: Path, sample_store: Path) -> None:
    """The two versions and the command are in the message; nothing else of a newer manifest is judged."""
    manifest = json.dumps({"format_version": 2, "all": "different"}).encode()
    with pytest.raises(StoreFormatError, match=r"format version 2, .* reads up to 1; .*pip install -U fastload"):
        Store(altered(sample_store, tmp_path / "db.lmdb", {b"manifest": manifest}))


@pytest.mark.parametrize("key", [b"column/label/00000000", b"column/label/00000003", b"column/size/00000001"])
@pytest.mark.parametrize("value", [None, b"", b"1234567", bytes(80)])
def test_a_column_chunk_that_is_missing_or_of_another_length(
    tmp_path: Path, sample_store: Path, key: bytes, value: bytes | None
) -> None:
    """The error names the column, for reading and for gathering; the other columns can be read."""
    store = Store(altered(sample_store, tmp_path / "db.lmdb", {key: value}))
    name = key.decode().split("/")[1]
    with pytest.raises(StoreFormatError, match=f"column '{name}' is cut short"):
        np.asarray(store.columns[name])
    with pytest.raises(StoreFormatError, match=f"column '{name}' is cut short"):
        store.columns[name].gather(np.arange(20))
    assert len(np.asarray(store.columns["checksum"])) == 20


def test_records_that_changed_places_are_found(tmp_path: Path) -> None:
    """Two whole records of one length, exchanged in the file: neither is taken for the other, unless nobody checks."""
    path, sizes = written(tmp_path / "db.lmdb", 40, size=600), []
    store, data = Store(path), bytearray(path.read_bytes())
    sizes = [length for _, length, _ in np.asarray(store.places).tolist()]
    a, b = next((a, b) for a in range(40) for b in range(a) if sizes[a] == sizes[b])
    first, second = (
        slice(int(offset), int(offset + length)) for offset, length, _ in (store.places[a], store.places[b])
    )
    data[first], data[second] = data[second], data[first]
    (tmp_path / "exchanged.lmdb").write_bytes(data)
    for mode in ("sample", "always"):
        exchanged = Store(tmp_path / "exchanged.lmdb", verify=mode)  # type: ignore[arg-type]
        for index in (a, b):
            with pytest.raises(ChecksumError, match="the record at its place is another one"):
                exchanged[index]
    assert Store(tmp_path / "exchanged.lmdb", verify="never")[a].name == f"ant/{b}.jpg"


@pytest.mark.parametrize("place", [(1 << 63, 50), (50, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1), (0, 1 << 20)])
def test_a_sample_whose_place_is_outside_of_the_file(
    tmp_path: Path, sample_store: Path, place: tuple[int, int]
) -> None:
    """The error names the file and the sample; its neighbours can be read."""
    places = np.asarray(Store(sample_store).places)
    places[7, :2] = place
    store = Store(altered(sample_store, tmp_path / "db.lmdb", {b"column/record/00000000": places.tobytes()}))
    with pytest.raises(StoreError, match=r"db\.lmdb: sample 7 of 20 lies outside of the file"):
        store[7]
    assert [store[i].name for i in (6, 8)] == ["ant/6.jpg", "ant/8.jpg"]


def test_a_payload_that_was_altered(tmp_path: Path, sample_store: Path) -> None:
    """One flipped bit in the file is a checksum error of that sample, and of no other."""
    data = bytearray(sample_store.read_bytes())
    data[data.index(payload_of(4, 20)) + 5] ^= 1
    (tmp_path / "db.lmdb").write_bytes(data)
    store = Store(tmp_path / "db.lmdb")
    with pytest.raises(ChecksumError):
        store[4]
    assert [store[i].name for i in range(20) if i != 4] == [f"ant/{i}.jpg" for i in range(20) if i != 4]


def read_around_a_zeroed_page(path: Path) -> tuple[set[str], set[int]]:
    """The kinds of errors that reading all samples gives, and the samples that could be read, in one thread."""
    store, errors, good = Store(path), set(), set()
    for _ in range(2):
        for i in range(len(store)):
            try:
                assert store[i].name == f"ant/{i}.jpg"
            except Exception as error:
                errors.add(f"{type(error).__name__} {isinstance(error, FastloadError)}")
            else:
                good.add(i)
    return errors, good


def test_a_damaged_page_is_an_error_of_ours_and_spoils_no_other_sample(tmp_path: Path) -> None:
    """LMDB's own errors don't reach the user, and the samples on other pages are read before and after."""
    path = written(tmp_path / "db.lmdb", 200)
    data = bytearray(path.read_bytes())
    (page_size,) = struct.unpack_from("<I", data, 40)
    page = data.index(payload_of(100, 20)) // page_size
    lost = {i for i in range(200) if data.index(payload_of(i, 20)) // page_size == page}
    data[page * page_size : (page + 1) * page_size] = bytes(page_size)
    (tmp_path / "damaged.lmdb").write_bytes(data)
    errors, good = in_child(read_around_a_zeroed_page, tmp_path / "damaged.lmdb")
    assert 1 < len(lost) < 100
    assert good == set(range(200)) - lost
    assert {error.split()[1] for error in errors} == {"True"}


# ---- manifests of strangers

LABEL = {"dtype": "<i8", "shape": [], "rows_per_chunk": 5}
MISSING = object()
HOSTILE: dict[str, Any] = {
    "format_version": ["1", None, 1.5, [], MISSING],
    "count": [-1, 1 << 48, 1 << 63, 10**400, 20.0, "20", True, None, [], {}, MISSING],
    "classes": [5, "ant", [1, 2], [None], {"ant": 0}, MISSING],
    "fields": [None, 5, "in", [5], [None], ["in"], [{}], [{"in": "record"}], [{"in": "elsewhere", "name": "x"}],
               [{"in": "record", "name": 5}], {"in": 1}, MISSING],
    "columns": [None, 5, [], [LABEL], {"label": None}, {"label": []}, {"label": {}}, MISSING],
    "digest": [None, 5, [], MISSING],
}  # fmt: skip
HOSTILE_COLUMNS: dict[str, Any] = {
    "dtype": ["O", "<U4", "S8", "V8", "M8[s]", "c16", "?", "", "nonsense", "i8,i8", "(2,)i8", "(99999999999,)i8", "(1",
              5, [], {}, {"names": ["a"], "formats": ["i8"]}, [["a", "<i8"]], MISSING],
    "shape": [None, 5, "ab", [-1], [0], [1 << 40], [1.5], [[1]], ["1"], {"a": 1}, MISSING],
    "rows_per_chunk": [0, -1, 1 << 32, 1.5, "5", True, None, [], MISSING],
}  # fmt: skip


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {k: v for k, v in (values | {key: value}).items() if v is not MISSING}


def hostile_manifests(whole: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for key, values in HOSTILE.items():
        for value in values:
            yield f"{key} {value!r:.60}", json.dumps(changed(whole, key, value)).encode()
    for key, values in HOSTILE_COLUMNS.items():
        for value in values:
            columns = whole["columns"] | {"label": changed(LABEL, key, value)}
            yield f"column {key} {value!r:.60}", json.dumps(whole | {"columns": columns}).encode()
    for dtype, shape in (("|u1", [8, 8]), ("|u1", [8, 8, 2]), ("<u2", [8, 8, 3])):
        columns = whole["columns"] | {"image": {"dtype": dtype, "shape": shape, "rows_per_chunk": 5}}
        yield f"images of {dtype} {shape}", json.dumps(whole | {"columns": columns}).encode()
    bare = {"name": "x", "kind": "integer", "type": "int", "in": "column", "column": "label"}
    yield "a column's field without a dtype", json.dumps(whole | {"fields": [*whole["fields"], bare]}).encode()
    for data in (b"", b"\xff\xfe", b"{", b"null", b"[]", b"5", b'"x"', b"NaN", b"[" * 200_000, b'{"a":' * 200_000):
        yield f"{data[:10]!r}", data
    deep = json.dumps(whole)[:-1] + ', "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield "deep", deep.encode()


def open_hostile_manifests(path: Path, folder: Path) -> dict[str, str]:
    whole = Store(path).manifest
    found = {}
    for number, (what, manifest) in enumerate(hostile_manifests(whole)):
        found[what] = outcome(altered(path, folder / f"hostile{number}.lmdb", {b"manifest": manifest}))
    return found


def test_hostile_manifests_are_refused(sample_store: Path, tmp_path: Path) -> None:
    """Wrong types, huge and negative numbers, deep JSON: a StoreFormatError that names the file, whatever it is."""
    found = in_child(open_hostile_manifests, sample_store, tmp_path)
    assert {what: result for what, result in found.items() if not result.startswith("StoreFormatError: ")} == {}
    assert {what: result for what, result in found.items() if "/hostile" not in result} == {}


PLAUSIBLE: dict[str, dict[str, Any]] = {
    "more samples than there are": {"count": 21},
    "very many samples": {"count": (1 << 48) - 1},
    "fewer fields than a record has": {"fields": FIELDS[1:]},
    "no fields": {"fields": []},
    "more fields than a record has": {"fields": [*FIELDS, FIELDS[0]]},
    "rows of another length": {"columns": {"label": LABEL | {"dtype": "<i4"}}},
    "rows of 16 dimensions": {"columns": {"label": LABEL | {"shape": [1] * 16}}},
    "labels of 2 dimensions": {"columns": {"label": LABEL | {"shape": [1, 1]}}},
    "labels without a sign": {"columns": {"label": LABEL | {"dtype": "<u8"}}},
    "sizes with a sign": {"columns": {"size": {"dtype": "<i4", "shape": [2], "rows_per_chunk": 7}}},
    "sizes that are real": {"columns": {"size": {"dtype": "<f4", "shape": [2], "rows_per_chunk": 7}}},
    "samples without a name": {"fields": FIELDS[:1]},
    "a mask without its image": {"fields": [*FIELDS, {"name": "m", "kind": "mask", "in": "record"}], "sample": "m"},
    "rows of more dimensions than NumPy has": {"columns": {"label": LABEL | {"shape": [1] * 100}}},
    "rows of 2**200 bytes": {"columns": {"label": LABEL | {"shape": [(1 << 32) - 1] * 6}}},
    "a column that is not there": {"columns": {"other": LABEL}},
    "a column whose name is a path": {"columns": {"../\0/etc": LABEL}},
    "a column name of a megabyte": {"columns": {"x" * (1 << 20): LABEL}},
    "a column name that is no text": {"columns": {"\udc80": LABEL}},
}


def open_plausible_manifests(path: Path, folder: Path) -> dict[str, str]:
    whole = Store(path).manifest
    found = {}
    for number, (what, change) in enumerate(PLAUSIBLE.items()):
        columns = whole["columns"] | change.get("columns", {})
        manifest = json.dumps(whole | change | {"columns": columns}).encode()
        found[what] = outcome(altered(path, folder / f"hostile{number}.lmdb", {b"manifest": manifest}))
    return found


def test_manifests_that_lie_end_in_an_error_of_ours(sample_store: Path, tmp_path: Path) -> None:
    """Values of the right type that don't fit the file: a StoreError where they are used, never another exception."""
    found = in_child(open_plausible_manifests, sample_store, tmp_path)
    names = ("StoreError: ", "StoreFormatError: ", "ColumnError: ")
    assert {what: result for what, result in found.items() if not result.startswith(names)} == {}


@pytest.mark.parametrize("value", [b"", b"{", b"5", b"[5]", b"null", b"[" * 200_000], ids=lambda v: f"{v[:6]!r}")
def test_a_quarantine_list_that_is_no_list(sample_store: Path, tmp_path: Path, value: bytes) -> None:
    """Damage in it is an error of ours too."""
    store = Store(altered(sample_store, tmp_path / "db.lmdb", {b"quarantine/00000000": value}))
    with pytest.raises(StoreError):
        store.quarantine()
