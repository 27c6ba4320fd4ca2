"""What tools/check_tiles does once it is inside its environment: re-cut, decode crops, compare, and tell what came out.

Files take the way that `fastload pack` sends them, through the bytes of a record. The crops of the re-cut image are
held against the original's own pixels: at full size, and at 1/2, 1/4 and 1/8 against what libjpeg-turbo makes of the
whole original at that size.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from fastload import decode, jpeg, record, tiles
from fastload.doctor import usable_cores
from fastload.errors import FastloadError
from fastload.geometry import Box, Size
from fastload.items import Item, Source
from fastload.options import Options
from fastload.prepare import LeftOut, libraries_for_packing, prepare
from fastload.printing import show_progress, visible
from fastload.workers import ordered_map

REDUCTIONS = (1, 2, 4, 8)
UNAVOIDABLE = (tiles.RECUT, tiles.NO_JPEG, tiles.SMALL)
MOST_UNTOUCHED = 0.01
MOST_NAMES = 50


class Checked(NamedTuple):
    """One file. outcome: of `tiles.OUTCOMES`, None where it is not packed at all, for `reason`."""

    name: str
    outcome: int | None
    reason: str
    original_bytes: int = 0
    payload_bytes: int = 0
    index_bytes: int = 0
    crops: int = 0
    difference: str = ""


@dataclass
class Totals:
    """What came out of all files."""

    outcomes: Counter[int] = field(default_factory=Counter)
    left_out: list[Checked] = field(default_factory=list)
    untouched: list[Checked] = field(default_factory=list)
    differences: list[Checked] = field(default_factory=list)
    crops: int = 0
    original_bytes: int = 0
    payload_bytes: int = 0
    index_bytes: int = 0

    def add(self, file: Checked) -> None:
        if file.outcome is None:
            self.left_out.append(file)
            return
        self.outcomes[file.outcome] += 1
        self.crops += file.crops
        if file.difference:
            self.differences.append(file)
        if file.outcome == tiles.RECUT:
            self.original_bytes += file.original_bytes
            self.payload_bytes += file.payload_bytes
            self.index_bytes += file.index_bytes
        else:
            self.untouched.append(file)

    @property
    def jpegs(self) -> int:
        """How many files libjpeg-turbo decodes to RGB."""
        return self.outcomes.total() - self.outcomes[tiles.NO_JPEG]

    @property
    def share_untouched(self) -> float:
        """The share of these that are not re-cut, though large enough."""
        return sum(n for outcome, n in self.outcomes.items() if outcome not in UNAVOIDABLE) / max(1, self.jpegs)


def check(folders: list[Path], crops: int, seed: int, as_json: bool) -> int:
    """Check every file below `folders`; returns the exit status."""
    files = sorted(Path(at, name) for folder in folders for at, _, names in os.walk(folder) for name in names)
    if not files:
        print(f"tools/check_tiles: there are no files below {', '.join(map(str, folders))}", file=sys.stderr)
        return 2
    totals = Totals()
    threads = usable_cores()
    with libraries_for_packing(), show_progress("checking") as progress:
        results = ordered_map(
            lambda file: check_file(file, crops, seed), files, threads=threads, ahead=2 * threads, name="check-tiles"
        )
        with contextlib.closing(results):
            for done, result in enumerate(results, 1):
                totals.add(result)
                progress(done, len(files))
    if not totals.outcomes:
        first = totals.left_out[0]
        print(
            f"tools/check_tiles: none of the {len(files)} files below {', '.join(map(str, folders))} is an image; "
            f"the first is {first.name}: {first.reason}",
            file=sys.stderr,
        )
        return 2
    if as_json:
        print(json.dumps(figures(totals)))
    else:
        show(totals)
    return 1 if totals.differences or totals.share_untouched > MOST_UNTOUCHED else 0


def check_file(path: Path, crops: int, seed: int) -> Checked:
    """Pack a file as far as its record, and compare crops with the file's own pixels."""
    prepared = prepare(Item(str(path), str(path)), Source("flat", [], None, 0, []), options=Options())
    if isinstance(prepared, LeftOut):
        return Checked(str(path), None, prepared.reason)
    (stored,) = record.parse(record.build(prepared.fields))
    outcome = prepared.cells["tiles"]
    result = Checked(str(path), outcome, tiles.OUTCOMES[outcome])
    if outcome != tiles.RECUT:
        return result
    data = path.read_bytes()
    result = result._replace(original_bytes=len(data), payload_bytes=len(stored.payload), index_bytes=len(stored.tiles))
    rng = random.Random(f"{seed} {path.name}")
    for reduction in REDUCTIONS:
        size = -(-stored.height // reduction), -(-stored.width // reduction)
        whole = np.empty((*size, 3), np.uint8)
        jpeg.decode(data, whole, reduction)
        if reduction == 1 and not np.array_equal(decode.pixels(stored), whole):
            return result._replace(difference="the whole image differs")
        for _ in range(crops):
            box = random_box(size, rng)
            difference = compare(stored, whole, box, reduction)
            if difference:
                return result._replace(difference=f"{box} at 1/{reduction}: {difference}")
    return result._replace(crops=crops * len(REDUCTIONS))


def compare(stored: record.Field, whole: jpeg.Pixels, box: Box, reduction: int) -> str:
    """What is wrong with the pixels of a crop; nothing if they are those of the whole image."""
    try:
        pixels = decode.region(stored, box, reduction)
    except FastloadError as error:
        return str(error)
    below, right = box.ends
    expected = whole[box.y : below, box.x : right]
    if pixels.shape != expected.shape:
        return f"{pixels.shape} instead of {expected.shape} pixels"
    wrong = (pixels != expected).any(2).sum()
    return f"{wrong} pixels differ" if wrong else ""


def random_box(size: Size, rng: random.Random) -> Box:
    """A rectangle of any place and shape, of one pixel up to the whole image; every other one is small."""
    small, share = rng.random() < 0.5, rng.uniform
    height, width = (max(1, round(length ** share(0, 1) if small else length * share(0.1, 1))) for length in size)
    return Box(rng.randint(0, size[1] - width), rng.randint(0, size[0] - height), width, height)


def figures(totals: Totals) -> dict[str, Any]:
    """The results as plain values."""
    return {
        "files": totals.outcomes.total() + len(totals.left_out),
        "outcomes": {tiles.OUTCOMES[outcome]: count for outcome, count in sorted(totals.outcomes.items())},
        "jpegs": totals.jpegs,
        "share_untouched": totals.share_untouched,
        "crops": totals.crops,
        "bytes": {
            "original": totals.original_bytes,
            "payload": totals.payload_bytes,
            "index": totals.index_bytes,
        },
        "untouched": [{"name": file.name, "reason": file.reason} for file in totals.untouched],
        "left_out": [{"name": file.name, "reason": file.reason} for file in totals.left_out],
        "differences": [{"name": file.name, "difference": file.difference} for file in totals.differences],
    }


def show(totals: Totals) -> None:
    """The results in words, and each file by name that is not as it should be."""
    table = Table("what became of the files", "files", box=None)
    table.columns[1].justify = "right"
    for outcome, count in sorted(totals.outcomes.items(), key=lambda item: -item[1]):
        table.add_row(tiles.OUTCOMES[outcome], f"{count:,}")
    if totals.left_out:
        table.add_row("left out", f"{len(totals.left_out):,}")
    Console(highlight=False, markup=False).print(table)
    for title, files in {"untouched": totals.untouched, "left out": totals.left_out}.items():
        for file in files[:MOST_NAMES]:
            print(f"{title}: {visible(file.name)}: {visible(file.reason)}")
        if len(files) > MOST_NAMES:
            print(f"{title}: {len(files) - MOST_NAMES:,} more, which --json lists")
    print(f"\nJPEGs left untouched though large enough: {totals.share_untouched:.2%} of {totals.jpegs:,}")
    if totals.original_bytes:
        payload, index = (n / totals.original_bytes for n in (totals.payload_bytes, totals.index_bytes))
        print(f"bytes, to the originals': {payload + index:.2%} ({payload:.2%} re-cut JPEGs, {index:.2%} indexes)")
    for file in totals.differences:
        print(f"DIFFERENT: {visible(file.name)}: {file.difference}")
    print(f"crops compared: {totals.crops:,}, files with differences: {len(totals.differences)}")
