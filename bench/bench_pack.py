"""Packing a folder of JPEGs whose bytes are kept."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import simplejpeg
import xxhash

import fastload
from bare import on_all_cores
from contest import Contest
from fastload.doctor import usable_cores


def bench_pack(contest: Contest, images: Path, workspace: Path) -> None:
    """How many JPEGs per second are packed from a warm page cache by all cores?"""
    files = sorted(images.glob("*/*"))
    path, copied = workspace / "packed.lmdb", workspace / "copied.bin"

    def pack() -> int:
        path.unlink(missing_ok=True)
        return fastload.pack(images, path).samples

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

    contenders = {"fastload": pack, "read, decode at 1/8, hash": read_and_judge, "copy to one file and sync": copy}
    rounds = contest.run(contenders)
    contest.target("images per second", rounds.rates("fastload"), at_least=800)
    for rival in list(contenders)[1:]:
        contest.measure(f"share of the rate of: {rival}", rounds.ratios("fastload", rival))
    store = fastload.Store(path)
    assert len(store) == len(files)
    for index in range(0, len(files), 7):
        assert store[index].name == files[index].relative_to(images).as_posix()
        assert store[index]["image"].payload == files[index].read_bytes()
