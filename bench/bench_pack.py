"""Packing a folder of JPEGs: with their own bytes, and re-cut into tiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash

import fastload
import pictures
from bare import on_all_cores
from contest import Contest, Work
from fastload import decode, record, recut, tiles
from fastload.doctor import usable_cores
from fastload.image_fields import tiled
from fastload.options import Options


def bench_pack(contest: Contest, images: Path, workspace: Path) -> None:
    """How many JPEGs per second are packed from a warm page cache by all cores?"""
    files = sorted(images.glob("*/*"))
    path, tiled, copied = workspace / "packed.lmdb", workspace / "tiled.lmdb", workspace / "copied.bin"

    def pack_to(path: Path, tiles: bool) -> Work:
        def work() -> int:
            path.unlink(missing_ok=True)
            return fastload.pack(images, path, tiles=tiles).samples

        return work

    def judge(thread: int, shared: Iterable[Path]) -> None:
        for file in shared:
            data = file.read_bytes()
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=False)
            xxhash.xxh3_64_intdigest(data)

    def read_and_judge() -> int:
        on_all_cores(judge, files, usable_cores())
        return len(files)

    def copy() -> int:
        with open(copied, "wb") as out:
            for file in files:
                out.write(file.read_bytes())
            os.fsync(out.fileno())
        return len(files)

    contenders = {
        "no tiles": pack_to(path, tiles=False),
        "tiles": pack_to(tiled, tiles=True),
        "read, decode at 1/8, hash": read_and_judge,
        "copy to one file and sync": copy,
    }
    rounds = contest.run(contenders)
    contest.target("images per second, no tiles", rounds.rates("no tiles"), at_least=800)
    contest.measure("images per second, tiles", rounds.rates("tiles"))
    for rival in list(contenders)[2:]:
        contest.measure(f"no tiles, share of the rate of: {rival}", rounds.ratios("no tiles", rival))
    store = fastload.Store(path)
    assert len(store) == len(files)
    for index in range(0, len(files), 7):
        assert store[index].name == files[index].relative_to(images).as_posix()
        assert store[index]["image"].payload == files[index].read_bytes()
    assert len(fastload.Store(tiled)) == len(files)


def bench_recut(contest: Contest, kept: Path) -> None:
    """How many JPEGs per second does one core re-cut, from bytes to bytes, each decoded and compared?"""
    stored = fastload.Store(kept)
    fields = [stored[index]["image"] for index in pictures.some(range(len(stored)), 200)]
    options = Options()

    def each(work: Callable[[record.Field], object]) -> Work:
        def all_of_them() -> int:
            for field in fields:
                work(field)
            return len(fields)

        return all_of_them

    contenders = {
        "re-cut and check": each(lambda field: tiled(field, None, options)),
        "re-cut": each(lambda field: recut.recut(bytes(field.payload))),
        "decode": each(decode.pixels),
    }
    rounds = contest.run(contenders, rounds=5)
    contest.target("images per CPU second", [1 / cost for cost in rounds.costs("re-cut and check")], at_least=120)
    for name in contenders:
        contest.measure(f"{name}, ms", [1000 * cost for cost in rounds.costs(name, "thread")])
    outcomes = []
    for field in fields:
        cut, outcome = tiled(field, None, options)
        outcomes.append(outcome)
        assert np.array_equal(pictures.decoded(cut), pictures.decoded(field))
    contest.measure("share that is re-cut", [outcomes.count(tiles.RECUT) / len(fields)])
