"""Re-cutting: a JPEG's DCT coefficients in a file of which crops can be read by themselves (`tiles` says how).

The same coefficients and quantisation tables, as a baseline JPEG with optimal Huffman codes and a restart marker after
each row of MCUs. Read are baseline, extended and progressive JPEGs of 8 bits, grey or with three components in one of
the usual samplings; anything else is left as it is, for a reason out of `tiles.OUTCOMES`. Nothing here judges whether
the result is right: `pack` decodes and compares it.

A file may claim anything: memory is bounded by the blocks that its bytes could hold, and time by blocks and scans.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from . import huffman, huffman_writer, tiles
from .buffers import scratch
from .huffman import Bytes, Coefficients, Ints

TILE_PIXELS = (64, 512)
TILE_BYTES = 512
"""A tile is so large on the average, but no narrower and no wider than that. Chosen by `bench/bench_tiles.py`."""

_MAX_BLOCKS = 1 << 22
_MIN_PIXELS = 96 * 96
_MAX_SCANS = 100
_SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1))
_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_DHT, _SOI, _EOI, _SOS, _DQT, _DRI = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}


_ORIENTATION = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"
"""An EXIF segment with nothing but the orientation, which follows; then come six zeros."""


class Untouched(Exception):  # noqa: N818 - not an error: the image is packed as it is
    """A JPEG that is not re-cut. outcome: why, a number into `tiles.OUTCOMES`."""

    def __init__(self, outcome: int) -> None:
        super().__init__(tiles.OUTCOMES[outcome])
        self.outcome = outcome


class Recut(NamedTuple):
    """A re-cut JPEG and its tile index."""

    data: bytes
    tiles: bytes


class _Component(NamedTuple):
    """A component as the frame's header has it: identifier, blocks in an MCU across and down, quantisation table."""

    number: int
    h: int
    v: int
    quantisation: int


class _Frame:
    """What a frame's header says, and the blocks that follow from it."""

    def __init__(self, marker: int, body: bytes) -> None:
        if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or body[:1] != b"\x08":
            raise Untouched(tiles.CODING)
        _, self.height, self.width, count = struct.unpack_from(">BHHB", body.ljust(6, b"\0"))
        if len(body) != 6 + 3 * count or not self.height or not self.width:
            raise Untouched(tiles.SEGMENTS)
        if count not in (1, 3):
            raise Untouched(tiles.SAMPLING)
        self.progressive = marker == _PROGRESSIVE
        parts = [
            _Component(c[0], c[1] >> 4, c[1] & 15, c[2]) for c in (body[i : i + 3] for i in range(6, len(body), 3))
        ]
        if count == 1:
            parts = [parts[0]._replace(h=1, v=1)]  # a scan of one component has MCUs of one block (A.2.2)
        if len({c.number for c in parts}) != count or any(c.quantisation > 3 for c in parts):
            raise Untouched(tiles.SEGMENTS)
        if (parts[0].h, parts[0].v) not in _SAMPLINGS or any((c.h, c.v) != (1, 1) for c in parts[1:]):
            raise Untouched(tiles.SAMPLING)
        self.components = parts
        self.mcu = (8 * parts[0].v, 8 * parts[0].h)
        self.shape = (-(-self.height // self.mcu[0]), -(-self.width // self.mcu[1]))
        rows, columns = self.shape
        grid, first = [], 0
        for c in parts:
            grid.append((first, columns * c.h, rows * c.v, c.h, c.v))
            first += rows * columns * c.h * c.v
        self.grid: Ints = np.array(grid)
        self.blocks = first

    def own_shape(self, component: int) -> tuple[int, int]:
        """Rows and columns of blocks in a scan of this component alone: without padding to whole MCUs (A.2.3)."""
        c = self.components[component]
        height, width = -(-self.height * c.v // self.components[0].v), -(-self.width * c.h // self.components[0].h)
        return -(-height // 8), -(-width // 8)


_Scan = tuple[Bytes, Ints, int, tuple[int, int], Ints]


class _Reader:
    """Reads a JPEG up to its coefficients."""

    def __init__(self, data: bytes, max_blocks: int = _MAX_BLOCKS) -> None:
        self._max_blocks = min(max_blocks, _MAX_BLOCKS)
        self.kept: list[tuple[int, bytes]] = []
        self.quantisation: dict[int, bytes] = {}
        self.frame: _Frame | None = None
        self.coefficients: Coefficients = np.empty((0, 64), np.int16)
        self._data: Bytes = np.frombuffer(data, np.uint8)
        self._codes: dict[int, Ints] = {}
        self._interval = self._scans = 0
        self._begun: set[int] = set()
        place = 2
        while True:
            place, marker, body = self._segment(data, place)
            if marker == _EOI:
                break
            place = self._take(marker, body, place)
        if self.frame is None or len(self._begun) != len(self.frame.components):
            raise Untouched(tiles.SEGMENTS)

    @staticmethod
    def _segment(data: bytes, place: int) -> tuple[int, int, bytes]:
        """The marker at `place` and its segment's contents, and where the next one begins."""
        while data[place : place + 2] == b"\xff\xff":
            place += 1
        marker = data[place + 1] if data[place : place + 1] == b"\xff" and place + 1 < len(data) else 0
        if marker == _EOI:
            return place, marker, b""
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= _SOI or length < 2 or place + 2 + length > len(data):
            raise Untouched(tiles.SEGMENTS)
        return place + 2 + length, marker, data[place + 4 : place + 2 + length]

    def _take(self, marker: int, body: bytes, place: int) -> int:
        """Deal with one segment; return where the next one begins, which is behind the bits of a scan."""
        if _APP0 <= marker <= _APP15 or marker == _COMMENT:
            self.kept.append((marker, body))
        elif marker in _FRAMES:
            self._take_frame(marker, body)
        elif marker == _DQT and not self._scans:
            self._take_quantisation(body)
        elif marker == _DHT:
            self._take_codes(body)
        elif marker == _DRI and len(body) == 2:
            self._interval = int.from_bytes(body, "big")
        elif marker == _SOS and self.frame is not None:
            return self._take_scan(self.frame, body, place)
        else:
            raise Untouched(tiles.SEGMENTS)
        return place

    def _take_frame(self, marker: int, body: bytes) -> None:
        if self.frame is not None:
            raise Untouched(tiles.SEGMENTS)
        self.frame = frame = _Frame(marker, body)
        if frame.blocks > self._max_blocks:
            raise Untouched(tiles.LARGE)
        if frame.height * frame.width < _MIN_PIXELS:
            raise Untouched(tiles.SMALL)
        if frame.blocks > 8 * len(self._data):  # each block takes a bit at least
            raise Untouched(tiles.BITS)
        self.coefficients = scratch("coefficients", 128 * frame.blocks).view(np.int16).reshape(-1, 64)
        self.coefficients[...] = 0

    def _take_quantisation(self, body: bytes) -> None:
        while body:
            length = 129 if body[0] >> 4 else 65
            if body[0] & 15 > 3 or body[0] >> 4 > 1 or len(body) < length:
                raise Untouched(tiles.SEGMENTS)
            self.quantisation[body[0] & 15] = body[:length]
            body = body[length:]

    def _take_codes(self, body: bytes) -> None:
        while body:
            counts = body[1:17]
            end = 17 + sum(counts)
            table = huffman.decoding_table(counts, body[17:end]) if len(body) >= end <= 17 + 256 else None
            if table is None or body[0] & 0xEC:
                raise Untouched(tiles.SEGMENTS)
            self._codes[body[0]] = table
            body = body[end:]

    def _take_scan(self, frame: _Frame, body: bytes, place: int) -> int:
        count = body[0] if body else 0
        numbers = [c.number for c in frame.components]
        self._scans += 1
        if len(body) != 4 + 2 * count or self._scans > _MAX_SCANS:
            raise Untouched(tiles.SEGMENTS)
        chosen = [numbers.index(n) for n in body[1 : 1 + 2 * count : 2] if n in numbers]
        if not chosen or len(chosen) != count or chosen != sorted(set(chosen)):
            raise Untouched(tiles.SEGMENTS)
        grid, shape = frame.grid[chosen], frame.shape
        if count == 1:
            grid[0, 3:] = 1
            shape = frame.own_shape(chosen[0])
        mcus = shape[0] * shape[1]
        interval = self._interval or mcus
        intervals = -(-mcus // interval)
        bits = scratch("bits", len(self._data) - place + huffman.PADDING)
        ends = np.empty(intervals, np.int64)
        following, length, restarts = huffman.unstuff(self._data, place, bits, ends[:-1])
        bits[length : length + huffman.PADDING] = 0
        ends[-1] = length
        if restarts != intervals - 1:
            raise Untouched(tiles.BITS)
        scan = (bits, ends, interval, shape, grid)
        dc, ac = ([kind | (t >> 4 * (kind == 0)) & 15 for t in body[2 : 2 + 2 * count : 2]] for kind in (0, 0x10))
        read = self._read_progressive if frame.progressive else self._read_sequential
        if read(scan, chosen, dc, ac, body[-3:]):
            raise Untouched(tiles.BITS)
        self._begun.update(chosen)
        return int(following)

    def _read_sequential(self, scan: _Scan, chosen: list[int], dc: list[int], ac: list[int], band: bytes) -> int:
        if band != b"\0\x3f\0" or self._begun.intersection(chosen):
            raise Untouched(tiles.SEGMENTS)
        return int(huffman.read_sequential(*scan, self._tables(dc), self._tables(ac), self.coefficients))

    def _read_progressive(self, scan: _Scan, chosen: list[int], dc: list[int], ac: list[int], band: bytes) -> int:
        first, last, high, low = band[0], band[1], band[2] >> 4, band[2] & 15
        sane = (first == last == 0) if first == 0 else first <= last < 64 and len(chosen) == 1
        known = self._begun.issuperset(chosen)
        if not sane or low > 13 or (high and high != low + 1) or (known == (first == high == 0)):
            raise Untouched(tiles.SEGMENTS)
        if first == 0:
            tables = np.empty((len(chosen), 0), np.int64) if high else self._tables(dc)
            return int(huffman.read_dc(*scan, tables, high, low, self.coefficients))
        read = huffman.refine_ac if high else huffman.read_ac
        return int(read(*scan, self._tables(ac), (first, last), low, self.coefficients))

    def _tables(self, numbers: list[int]) -> Ints:
        if not all(number in self._codes for number in numbers):
            raise Untouched(tiles.SEGMENTS)
        return np.stack([self._codes[number] for number in numbers])


def recut(data: bytes, *, strip: bool = False, orientation: int = 1, max_blocks: int = _MAX_BLOCKS) -> Recut:
    """Re-cut a JPEG. Compiles for some seconds at the first call on a machine.

    strip: drop EXIF, ICC profiles, comments and all else that does not change how the pixels are decoded, but keep the
    EXIF `orientation`. max_blocks: JPEGs of more blocks stay as they are; each takes some 200 bytes meanwhile.

    Raises:
        Untouched: it stays as it is.
    """
    reader = _Reader(data, max_blocks)
    frame = reader.frame
    assert frame is not None
    if not {c.quantisation for c in frame.components} <= set(reader.quantisation):
        raise Untouched(tiles.SEGMENTS)
    rows, columns = frame.shape
    mean = len(data) / (rows * columns)
    least, most = (pixels // frame.mcu[1] for pixels in TILE_PIXELS)
    step = min(columns, most, max(least, -int(-TILE_BYTES // mean)))
    scan = _write(frame, reader.coefficients, step)
    kept, header = _header(frame, reader, scan.codes, strip, orientation)
    starts = (len(kept), len(kept) + len(header))
    payload = b"".join((kept, header, scan.data, b"\xff\xd9"))
    if scan.tile_sizes.max() > 0xFFFF:
        raise Untouched(tiles.SEGMENTS)
    index = tiles.build_index(
        payload, frame.mcu, len(frame.components), step, starts, scan.tile_sizes, scan.leads, scan.lead_ins
    )
    return Recut(payload, index)


class _Written(NamedTuple):
    """A scan's bytes, its Huffman codes as DHT segments, and what the index says of it."""

    data: bytes
    codes: bytes
    tile_sizes: Ints
    leads: Ints
    lead_ins: bytes


def _write(frame: _Frame, coefficients: Coefficients, step: int) -> _Written:
    """Code coefficients anew, with an entry point every `step` MCUs in a row."""
    rows, columns = frame.shape
    inner = (columns - 1) // step
    count = len(frame.components)
    symbols = scratch("symbols", 4 * (65 * frame.blocks + rows * (inner + 1))).view(np.uint32)
    counts = np.zeros((4, 256), np.int64)
    predictions = np.empty((rows * inner, count), np.int64)
    length = huffman_writer.symbolise(coefficients, frame.shape, frame.grid, step, symbols, counts, predictions)
    if length < 0:
        raise Untouched(tiles.CODING)
    sizes, codes = np.zeros((4, 256), np.int64), np.zeros((4, 256), np.int64)
    if inner:
        counts[2, 1:9] += 1  # so that lead-ins can have any length
    used = [table for table in range(4) if table % 2 < count]
    for table in used:
        huffman_writer.optimal_code(counts[table], sizes[table], codes[table])
    bits = int((counts * (sizes + np.arange(256) % 16)).sum())
    scan = scratch("scan", bits // 4 + 4 * rows + huffman.PADDING)  # twice the bytes: all might be stuffed
    inner_starts, row_ends = np.empty(rows * inner, np.int64), np.empty(rows, np.int64)
    scan = scan[: huffman_writer.write(symbols[:length], codes, sizes, scan, inner_starts, row_ends)]

    lead_ins, lengths = scratch("lead_ins", len(inner_starts) * huffman.PADDING), np.empty(len(inner_starts), np.uint8)
    blocks = frame.grid[:, 3] * frame.grid[:, 4]
    length = huffman_writer.lead_ins(lead_ins, lengths, scan, inner_starts, predictions, blocks, codes, sizes)
    if length < 0 or (inner and lengths.max() > 31):
        raise Untouched(tiles.SEGMENTS)
    bytes_at, bit = inner_starts >> 3, inner_starts & 7
    whole = bytes_at + (bit > 0) + ((bit > 0) & (scan[np.minimum(bytes_at, len(scan) - 1)] == 0xFF))
    starts = np.zeros((rows, inner + 1), np.int64)
    starts[1:, 0] = row_ends[:-1]
    starts[:, 1:] = whole.reshape(rows, inner)
    tile_sizes = np.diff(np.append(starts.ravel(), row_ends[-1]))
    tables = b"".join(_code_segment(table, sizes[table]) for table in used)
    return _Written(scan.tobytes(), tables, tile_sizes, lengths | bit << 5, lead_ins[:length].tobytes())


def _code_segment(table: int, sizes: Ints) -> bytes:
    order = np.lexsort((np.arange(256), sizes))
    symbols = order[sizes[order] > 0]
    counts = np.bincount(sizes[symbols], minlength=17)[1:]
    return _segment(_DHT, bytes((table >> 1 << 4 | table & 1, *counts.tolist(), *symbols.tolist())))


def _header(frame: _Frame, reader: _Reader, codes: bytes, strip: bool, orientation: int) -> tuple[bytes, bytes]:
    """What stands before the scan: what decoding the pixels does not need, and the rest, which the tiles need too.

    JFIF means YCbCr. Components numbered 1, 2, 3 mean that too, so the small header does without it, and without
    Adobe's segment, which it overrules and which then stands among the rest.
    """
    kept, adobe, jfif = [b"\xff\xd8"], b"", False
    for marker, body in reader.kept:
        segment = _segment(marker, body)
        if marker == _APP0 and body.startswith(b"JFIF\0"):
            kept.append(segment)
            jfif = True
        elif marker == _APP14 and body.startswith(b"Adobe"):
            adobe = segment
        elif not (strip or (marker == _APP2 and body.startswith(b"MPF\0"))):
            kept.append(segment)  # but not MPF, which points to pictures behind this one: they are dropped
    if jfif:
        kept.append(adobe)
    if strip and orientation != 1:
        kept.append(_segment(_APP1, _ORIENTATION + bytes((orientation,)) + bytes(6)))
    components = [
        c._replace(number=i) if jfif and len(frame.components) == 3 else c for i, c in enumerate(frame.components, 1)
    ]
    wide = any(reader.quantisation[c.quantisation][0] >> 4 for c in components)
    frame_header = struct.pack(">BHHB", 8, frame.height, frame.width, len(components))
    scan_header = bytes((len(components),))
    for place, c in enumerate(components):
        frame_header += bytes((c.number, c.h << 4 | c.v, c.quantisation))
        scan_header += bytes((c.number, 0x11 * min(place, 1)))
    header = [b"" if jfif else adobe]
    header += [_segment(_DQT, reader.quantisation[n]) for n in sorted({c.quantisation for c in components})]
    header += [
        codes,
        _segment(_EXTENDED if wide else _BASELINE, frame_header),
        _segment(_DRI, frame.shape[1].to_bytes(2, "big")),
        _segment(_SOS, scan_header + b"\0\x3f\0"),
    ]
    return b"".join(kept), b"".join(header)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
