"""A small JPEG writer after ITU-T T.81, for files that no common encoder writes, and what the tests of tiles share.

`encode` takes coefficients and a script of scans: sequential or progressive, interleaved or not, in any order.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from conftest import Pixels
from PIL import Image

from fastload import jpeg, record, recut

Coefficients = npt.NDArray[np.int64]
"""One component's, (rows of blocks, blocks in a row, 64), zigzag order, rows and columns filled up to whole MCUs."""

Random = np.random.Generator
_Token = tuple[int, int, int, int, int]
"""class of the table (0 DC, 1 AC) | its number | symbol, -1 for none | bits that follow | how many."""

SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1))
JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"
SOI, EOI = b"\xff\xd8", b"\xff\xd9"


class Component(NamedTuple):
    """A component as the frame's header has it."""

    number: int
    h: int = 1
    v: int = 1
    quantisation: int = 0


class Scan(NamedTuple):
    """A scan: places of its components, band, successive approximation (Ah, Al) and MCUs between restarts."""

    components: tuple[int, ...]
    first: int = 0
    last: int = 63
    high: int = 0
    low: int = 0
    interval: int = 0


class Picture(NamedTuple):
    """What a JPEG holds: size, components, their coefficients and the quantisation tables, zigzag order."""

    height: int
    width: int
    components: tuple[Component, ...]
    coefficients: tuple[Coefficients, ...]
    quantisation: tuple[npt.NDArray[np.int64], ...]

    def mcus(self) -> tuple[int, int]:
        """Rows and columns of MCUs in an interleaved scan."""
        h, v = (max(c[i] for c in self.components) for i in (1, 2))
        return -(-self.height // (8 * v)), -(-self.width // (8 * h))

    def blocks(self, scan: Scan) -> list[list[tuple[int, npt.NDArray[np.int64]]]]:
        """For each MCU of a scan its blocks, each with the place of its component (A.2)."""
        rows, columns = self.mcus()
        if len(scan.components) == 1:
            place = scan.components[0]
            c = self.components[place]
            h, v = (max(other[i] for other in self.components) for i in (1, 2))
            height, width = -(-self.height * c.v // v), -(-self.width * c.h // h)
            kept = self.coefficients[place][: -(-height // 8), : -(-width // 8)]
            return [[(place, block)] for block in kept.reshape(-1, 64)]
        mcus = []
        for row in range(rows):
            for column in range(columns):
                mcu = []
                for place in scan.components:
                    c = self.components[place]
                    for y in range(row * c.v, row * c.v + c.v):
                        inside = self.coefficients[place][y, column * c.h : column * c.h + c.h]
                        mcu += [(place, block) for block in inside]
                mcus.append(mcu)
        return mcus


def random_picture(
    random: Random,
    height: int,
    width: int,
    components: tuple[Component, ...] = (Component(1), Component(2), Component(3)),
    density: float = 0.1,
    largest: int = 40,
) -> Picture:
    """A picture of random coefficients. density: how many of them are not zero; largest: of the AC ones."""
    picture = Picture(height, width, components, (), ())
    rows, columns = picture.mcus()
    arrays = []
    for c in components:
        shape = rows * c.v, columns * c.h, 64
        array = np.rint(random.laplace(0, 0.3 * largest, shape)).clip(-largest, largest).astype(np.int64)
        array[random.random(shape) > density * np.linspace(2, 0, 64)] = 0
        array[..., 0] = (random.integers(-40, 40, shape[:2]).cumsum(1) // 2).clip(-127, 127)
        arrays.append(array)
    tables = tuple(random.integers(1, 10, 64) for _ in range(4))
    return picture._replace(coefficients=tuple(arrays), quantisation=tables)


def random_progression(random: Random, count: int) -> list[Scan]:
    """A legal script of progressive scans for so many components, in an unusual order."""
    low = int(random.integers(0, 4))
    groups = _groups(random, count)
    beginning = [Scan(group, 0, 0, 0, low) for group in groups]
    chains = [[Scan(group, 0, 0, bit + 1, bit) for bit in range(low - 1, -1, -1) for group in _groups(random, count)]]
    for place in range(count):
        low = int(random.integers(0, 4))
        chain = [Scan((place,), *band, 0, low) for band in _bands(random)]
        for bit in range(low - 1, -1, -1):
            chain += [Scan((place,), *band, bit + 1, bit) for band in _bands(random)]
        chains.append(chain)
    scans = beginning
    while any(chains):
        chain = chains[int(random.integers(len(chains)))]
        if chain:
            scans.append(chain.pop(0))
    interval = int(random.choice([0, 1, 5]))
    return [scan._replace(interval=interval * int(random.integers(0, 3))) for scan in scans]


def _groups(random: Random, count: int) -> list[tuple[int, ...]]:
    """The components in random groups, of one scan each."""
    which = random.integers(0, count, count)
    groups = [tuple(np.flatnonzero(which == group).tolist()) for group in range(count)]
    return [group for group in groups if group]


def _bands(random: Random) -> list[tuple[int, int]]:
    """AC coefficients in a few random bands, in random order."""
    edges = [1, *sorted(random.choice(np.arange(2, 64), int(random.integers(0, 4)), replace=False).tolist()), 64]
    bands = [(first, end - 1) for first, end in pairwise(edges)]
    return [bands[i] for i in random.permutation(len(bands))]


def segment(marker: int, body: bytes) -> bytes:
    """A marker segment."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def frame_header(picture: Picture, marker: int) -> bytes:
    """The frame's header (B.2.2)."""
    body = struct.pack(">BHHB", 8, picture.height, picture.width, len(picture.components))
    return segment(
        marker, body + b"".join(bytes((c.number, c.h << 4 | c.v, c.quantisation)) for c in picture.components)
    )


def encode(
    picture: Picture,
    scans: list[Scan] | None = None,
    *,
    marker: int | None = None,
    before: tuple[bytes, ...] = (segment(0xE0, JFIF),),
    wide: bool = False,
    joined: bool = False,
    fill: int = 0,
    tables: int = 2,
    skewed: bool = False,
    eob_runs: bool = True,
) -> bytes:
    """Write a JPEG.

    scans: one with everything by default. marker: the frame's, by default that of a baseline or a progressive one.
    before: segments that come first. wide: quantisation tables of 16 bits. joined: all tables of a kind in one segment.
    fill: bytes before each marker. tables: Huffman tables of each class that components take turns in. skewed:
    Huffman codes of 1 to 16 bits, instead of equal ones. eob_runs: whether progressive scans have any above 1.
    """
    scans = scans or [Scan(tuple(range(len(picture.components))))]
    progressive = any(scan[1:5] != (0, 63, 0, 0) for scan in scans)
    marker = marker or (0xC2 if progressive else 0xC0)
    used = sorted({c.quantisation for c in picture.components})
    steps = [bytes((wide << 4 | n,)) + picture.quantisation[n].astype(">u2" if wide else "u1").tobytes() for n in used]
    parts = [*before, *_segments(0xDB, steps, joined), frame_header(picture, marker)]
    interval = 0
    for scan in scans:
        if scan.interval != interval:
            interval = scan.interval
            parts.append(segment(0xDD, interval.to_bytes(2, "big")))
        codes, header, intervals = _scan(picture, scan, progressive, tables, skewed, eob_runs)
        parts += [*_segments(0xC4, codes, joined), header + intervals[0]]
        parts += [bytes((0xFF, 0xD0 + i % 8)) + data for i, data in enumerate(intervals[1:])]
    return SOI + b"".join(b"\xff" * fill + part for part in (*parts, EOI))


def _segments(marker: int, bodies: list[bytes], joined: bool) -> list[bytes]:
    return [segment(marker, b"".join(bodies))] if joined and bodies else [segment(marker, body) for body in bodies]


def _scan(
    picture: Picture, scan: Scan, progressive: bool, tables: int, skewed: bool, eob_runs: bool
) -> tuple[list[bytes], bytes, list[bytes]]:
    """A scan's Huffman tables, its header and the bytes of its restart intervals."""
    mcus = picture.blocks(scan)
    interval = scan.interval or len(mcus)
    number = {place: scan.components.index(place) % tables for place in scan.components}
    intervals = []
    for i in range(0, len(mcus), interval):
        part = mcus[i : i + interval]
        if not progressive:
            tokens = _sequential(part, number)
        elif scan.first == 0:
            tokens = _dc(part, number, scan)
        else:
            tokens = _refinement(part, number, scan, eob_runs) if scan.high else _band(part, number, scan, eob_runs)
        intervals.append(tokens)
    codes: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    segments = []
    for which in sorted({token[:2] for tokens in intervals for token in tokens if token[2] >= 0}):
        seen = [token[2] for tokens in intervals for token in tokens if token[:2] == which and token[2] >= 0]
        symbols = sorted(set(seen), key=seen.count, reverse=True)
        codes[which], counts = _code(symbols, skewed)
        segments.append(bytes((which[0] << 4 | which[1], *counts, *symbols)))
    body = bytes((len(scan.components),))
    for place in scan.components:
        body += bytes((picture.components[place].number, 0x11 * number[place]))
    header = segment(0xDA, body + bytes((scan.first, scan.last, scan.high << 4 | scan.low)))
    return segments, header, [_bytes(tokens, codes) for tokens in intervals]


def _code(symbols: list[int], skewed: bool) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """A prefix code without the code of all ones: symbol -> (code, length), and how many there are of each length."""
    equal = len(symbols).bit_length()
    lengths = [min(i + 1, 16) if i < 8 else 16 for i in range(len(symbols))] if skewed else [equal] * len(symbols)
    code, result = 0, {}
    for i, (symbol, length) in enumerate(zip(symbols, lengths, strict=True)):
        code <<= length - (lengths[i - 1] if i else length)
        result[symbol] = (code, length)
        code += 1
    return result, [lengths.count(length) for length in range(1, 17)]


def _bytes(tokens: list[_Token], codes: dict[tuple[int, int], dict[int, tuple[int, int]]]) -> bytes:
    bits = []
    for kind, number, symbol, extra, count in tokens:
        if symbol >= 0:
            code, length = codes[kind, number][symbol]
            bits.append(format(code, f"0{length}b"))
        if count:
            bits.append(format(extra, f"0{count}b"))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    return int(text or "0", 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")


def _number(value: int) -> tuple[int, int]:
    """The bits of a signed value, and how many (F.1.2.1)."""
    size = abs(value).bit_length()
    return (value if value > 0 else value + (1 << size) - 1), size


def _sequential(mcus: list[Any], number: dict[int, int]) -> list[_Token]:
    tokens: list[_Token] = []
    last = dict.fromkeys(number, 0)
    for place, block in (pair for mcu in mcus for pair in mcu):
        values = block.tolist()
        bits, size = _number(values[0] - last[place])
        last[place] = values[0]
        tokens.append((0, number[place], size, bits, size))
        run = 0
        for value in values[1:]:
            if value == 0:
                run += 1
                continue
            tokens += [(1, number[place], 0xF0, 0, 0)] * (run // 16)
            bits, size = _number(value)
            tokens.append((1, number[place], run % 16 << 4 | size, bits, size))
            run = 0
        if run:
            tokens.append((1, number[place], 0, 0, 0))
    return tokens


def _dc(mcus: list[Any], number: dict[int, int], scan: Scan) -> list[_Token]:
    tokens: list[_Token] = []
    last = dict.fromkeys(number, 0)
    for place, block in (pair for mcu in mcus for pair in mcu):
        value = int(block[0]) >> scan.low
        if scan.high:
            tokens.append((0, number[place], -1, value & 1, 1))
            continue
        bits, size = _number(value - last[place])
        last[place] = value
        tokens.append((0, number[place], size, bits, size))
    return tokens


def _eob_run(table: int, run: int, corrections: list[int]) -> list[_Token]:
    """The tokens of a run of blocks that end, with the bits that correct what those held already."""
    if not run:
        return []
    size = run.bit_length() - 1
    return [(1, table, size << 4, run - (1 << size), size), *((1, table, -1, bit, 1) for bit in corrections)]


def _band(mcus: list[Any], number: dict[int, int], scan: Scan, eob_runs: bool) -> list[_Token]:
    tokens: list[_Token] = []
    (table,), ended = number.values(), 0
    for ((_, block),) in mcus:
        run = 0
        for value in block[scan.first : scan.last + 1].tolist():
            shifted = (abs(value) >> scan.low) * (1 if value > 0 else -1)
            if shifted == 0:
                run += 1
                continue
            tokens += _eob_run(table, ended, [])
            tokens += [(1, table, 0xF0, 0, 0)] * (run // 16)
            bits, size = _number(shifted)
            tokens.append((1, table, run % 16 << 4 | size, bits, size))
            run = ended = 0
        ended += run > 0
        if ended == 0x7FFF or not eob_runs:
            tokens += _eob_run(table, ended, [])
            ended = 0
    return tokens + _eob_run(table, ended, [])


def _refinement(mcus: list[Any], number: dict[int, int], scan: Scan, eob_runs: bool) -> list[_Token]:
    tokens: list[_Token] = []
    (table,), ended = number.values(), 0
    waiting: list[int] = []
    for ((_, block),) in mcus:
        values = block[scan.first : scan.last + 1].tolist()
        shifted = [abs(value) >> scan.low for value in values]
        end = max((k for k, value in enumerate(shifted) if value == 1), default=-1)
        run, corrections = 0, []
        for k, value in enumerate(shifted):
            if value == 0:
                run += 1
                continue
            while run > 15 and k <= end:
                tokens += [*_eob_run(table, ended, waiting), (1, table, 0xF0, 0, 0)]
                tokens += [(1, table, -1, bit, 1) for bit in corrections]
                ended, waiting, corrections = 0, [], []
                run -= 16
            if value > 1:
                corrections.append(value & 1)
                continue
            tokens += [*_eob_run(table, ended, waiting), (1, table, run << 4 | 1, int(values[k] > 0), 1)]
            tokens += [(1, table, -1, bit, 1) for bit in corrections]
            ended, waiting, corrections, run = 0, [], [], 0
        if run or corrections:
            ended += 1
            waiting += corrections
        if ended == 0x7FFF or not eob_runs:
            tokens += _eob_run(table, ended, waiting)
            ended, waiting = 0, []
    return tokens + _eob_run(table, ended, waiting)


def pillow(data: bytes) -> Pixels:
    """The pixels that Pillow gives."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoded(data: bytes, size: tuple[int, int] | None = None, reduction: int = 1) -> Pixels:
    """The pixels that the backend gives, at 1 / reduction of the size."""
    height, width = size or jpeg.header(data)[:2]
    out = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    jpeg.decode(data, out, reduction)
    return out


def field_of(cut: recut.Recut) -> record.Field:
    """A re-cut JPEG as a record's field."""
    height, width, _ = jpeg.header(cut.data)
    return record.Field(record.JPEG, cut.data, 1, 3, 0, width, height, cut.tiles, record.checksum(cut.data))


@contextlib.contextmanager
def small_tiles(pixels: int = 32, nbytes: int = 1) -> Iterator[None]:
    """Tiles so wide and so large at least, in images of any size: small images have many.

    A tile takes 8 bits at least. Fewer than 32 pixels are too few where the code is short.
    """
    before = recut.TILE_PIXELS, recut.TILE_BYTES, recut._MIN_PIXELS
    recut.TILE_PIXELS, recut.TILE_BYTES, recut._MIN_PIXELS = (pixels, 1 << 16), nbytes, 1
    try:
        yield
    finally:
        recut.TILE_PIXELS, recut.TILE_BYTES, recut._MIN_PIXELS = before
