"""JPEG's entropy coding, reading: from a scan's bits to DCT coefficients; `huffman_writer` goes the other way.

Compiled by numba, without the GIL; imported only when images are re-cut, which is when they are packed. Sequential and
progressive Huffman scans are read, by ITU-T T.81, annexes F and G.

Coefficients are int16 (blocks, 64) in zigzag order. A component's blocks lie in rows, one component after the other;
`grid` says where: (components, 5), each (first block, blocks in a row, rows of blocks, h, v), where an MCU has h x v
blocks of the component.

Whatever the bits say, a reader ends after a number of steps that the size of the image bounds and touches nothing
outside its arrays. It stops with one of `FAULTS` at the first code that is none, where the bits end, where a
coefficient lies outside its block, and where bits are left over: an undamaged scan has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Coefficients = npt.NDArray[np.int16]

FAULTS = (
    "",
    "a code that is none",
    "fewer bits than blocks",
    "more bits than blocks",
    "coefficients outside a block",
    "coefficients outside of 8-bit JPEG's range",
)
_FINE, _BAD_CODE, _TOO_FEW, _LEFT_OVER, _OUTSIDE, OUT_OF_RANGE = range(len(FAULTS))

PADDING = 512
"""Readable bytes that must follow the bits: more than one block can take."""

_FAST = 9
_LIMITS = 1 << _FAST
_SHIFTS = _LIMITS + 18
_SYMBOLS = _SHIFTS + 18

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function when it is first called, and keep that for other processes where there is a folder for it."""
    try:
        return cast(_Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # there is no folder that numba may write its cache to
        return cast(_Function, njit(nogil=True)(function))


def inlined(function: _Function) -> _Function:
    """Make a function part of the compiled ones that call it."""
    return cast(_Function, njit(inline="always")(function))


@functools.lru_cache(64)  # most files have the tables of the standard's annex K
def decoding_table(counts: bytes, symbols: bytes) -> Ints | None:
    """A Huffman table for reading, from a DHT segment's 16 counts and its symbols; None if it is no prefix code.

    int64: for each 9-bit beginning, length << 8 | symbol, 0 where the code is longer; then by length the limit below
    which codes end (left-aligned to 16 bits) and what leads from a code to its symbol's place; then the symbols.
    """
    table = np.zeros(_SYMBOLS + 256, np.int64)
    table[_SYMBOLS : _SYMBOLS + len(symbols)] = np.frombuffer(symbols, np.uint8)
    code = place = 0
    for length, count in enumerate(counts, 1):
        if code + count > 1 << length:
            return None
        table[_SHIFTS + length] = place - code
        if length <= _FAST:
            reach = 1 << (_FAST - length)
            entries = length << 8 | table[_SYMBOLS + place : _SYMBOLS + place + count]
            table[code * reach : (code + count) * reach] = np.repeat(entries, reach)
        code, place = code + count, place + count
        table[_LIMITS + length] = code << (16 - length)
        code <<= 1
    return table


@compiled
def unstuff(data: Bytes, start: int, out: Bytes, marks: Ints) -> tuple[int, int, int]:
    """Copy a scan's bytes to `out` without stuffing, up to the marker that ends it.

    marks: gets the length of `out` before each restart marker. Returns the place of the marker that ends the scan (the
    length of `data` if there is none), the length of `out`, and the number of restart markers: -1 if they are too many
    or out of order.
    """
    place, length, restarts, end = start, 0, 0, len(data)
    while place < end:
        byte = data[place]
        if byte != 0xFF:
            out[length] = byte
            length += 1
            place += 1
            continue
        following = place + 1
        while following < end and data[following] == 0xFF:
            following += 1
        if following == end:
            break
        marker = data[following]
        if marker == 0 and following == place + 1:
            out[length] = 0xFF
            length += 1
        elif 0xD0 <= marker <= 0xD7:
            if restarts == len(marks) or marker != 0xD0 + (restarts & 7):
                return place, length, -1
            marks[restarts] = length
            restarts += 1
        else:
            return place, length, restarts
        place = following + 1
    return end, length, restarts


@inlined
def _window(bits: Bytes, position: int) -> Any:
    """The bits from a position on, left-aligned in 64: at least 57 of them."""
    at = np.uint64(position >> 3)
    window = np.uint64(0)
    for i in range(8):
        window = window << np.uint64(8) | np.uint64(bits[at + np.uint64(i)])
    return window << np.uint64(position & 7)


@inlined
def _look(table: Ints, window: Any) -> Any:
    """The code at the head of a window: length << 8 | symbol, 0 if it is none."""
    entry = table[window >> np.uint64(64 - _FAST)]
    if entry == 0:
        head = np.int64(window >> np.uint64(48))
        for length in range(_FAST + 1, 17):
            if head < table[_LIMITS + length]:
                place = (head >> (16 - length)) + table[_SHIFTS + length]
                entry = np.int64(length << 8) | table[_SYMBOLS + place]
                break
    return entry


@inlined
def _value(window: Any, skip: int, size: int) -> Any:
    """The signed number of `size` bits (1 to 15) that follows `skip` bits of a window (F.2.2.1: EXTEND)."""
    raw = np.int64(window << np.uint64(skip) >> np.uint64(64 - size))
    return raw if raw >> (size - 1) else raw - (1 << size) + 1


@inlined
def _bits(window: Any, skip: int, size: int) -> Any:
    """The number of `size` bits (0 to 15) that follows `skip` bits of a window."""
    return np.int64(window << np.uint64(skip) >> np.uint64(1) >> np.uint64(63 - size))


@compiled
def read_sequential(
    bits: Bytes, ends: Ints, interval: int, shape: tuple[int, int], grid: Ints, dc: Ints, ac: Ints, out: Coefficients
) -> int:
    """Read a sequential scan into `out` (F.2); return the number of a fault.

    ends: where each restart interval's bits end, in bytes. interval: MCUs in each. shape: rows and columns of MCUs.
    grid: the scan's components. dc, ac: their tables, (components, table).
    """
    rows, columns = shape
    predictions = np.zeros(len(grid), np.int64)
    position = done = 0
    for end in ends:
        predictions[:] = 0
        for mcu in range(done, min(done + interval, rows * columns)):
            row, column = mcu // columns, mcu % columns
            for i in range(len(grid)):
                for y in range(grid[i, 4]):
                    first = grid[i, 0] + (row * grid[i, 4] + y) * grid[i, 1] + column * grid[i, 3]
                    for x in range(grid[i, 3]):
                        block = out[first + x]
                        window = _window(bits, position)
                        entry = _look(dc[i], window)
                        length, size = entry >> 8, entry & 255
                        if entry == 0 or size > 11:
                            return _BAD_CODE
                        if size:
                            predictions[i] += _value(window, length, size)
                        position += length + size
                        if abs(predictions[i]) > 2047:
                            return OUT_OF_RANGE
                        block[0] = predictions[i]
                        k = 1
                        while k < 64:
                            window = _window(bits, position)
                            entry = _look(ac[i], window)
                            if entry == 0:
                                return _BAD_CODE
                            length, run, size = entry >> 8, entry >> 4 & 15, entry & 15
                            position += length + size
                            k += run
                            if size == 0:
                                if run != 15:
                                    break
                            elif k > 63:
                                return _OUTSIDE
                            elif size > 10:
                                return OUT_OF_RANGE
                            else:
                                block[k] = _value(window, length, size)
                            k += 1
                        if position > end * 8:
                            return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE


@compiled
def read_dc(
    bits: Bytes,
    ends: Ints,
    interval: int,
    shape: tuple[int, int],
    grid: Ints,
    dc: Ints,
    high: int,
    low: int,
    out: Coefficients,
) -> int:
    """Read a progressive scan of DC coefficients (G.1.2.1), the first or one that refines; see `read_sequential`.

    high, low: the scan's successive approximation, Ah and Al.
    """
    rows, columns = shape
    predictions = np.zeros(len(grid), np.int64)
    position = done = 0
    for end in ends:
        predictions[:] = 0
        for mcu in range(done, min(done + interval, rows * columns)):
            row, column = mcu // columns, mcu % columns
            for i in range(len(grid)):
                for y in range(grid[i, 4]):
                    first = grid[i, 0] + (row * grid[i, 4] + y) * grid[i, 1] + column * grid[i, 3]
                    for x in range(grid[i, 3]):
                        window = _window(bits, position)
                        if high:
                            out[first + x, 0] |= _bits(window, 0, 1) << low
                            position += 1
                        else:
                            entry = _look(dc[i], window)
                            length, size = entry >> 8, entry & 255
                            if entry == 0 or size > 11:
                                return _BAD_CODE
                            if size:
                                predictions[i] += _value(window, length, size)
                            position += length + size
                            if abs(predictions[i]) << low > 2047:
                                return OUT_OF_RANGE
                            out[first + x, 0] = predictions[i] << low
                        if position > end * 8:
                            return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE


@compiled
def read_ac(
    bits: Bytes,
    ends: Ints,
    interval: int,
    shape: tuple[int, int],
    grid: Ints,
    ac: Ints,
    band: tuple[int, int],
    low: int,
    out: Coefficients,
) -> int:
    """Read the first progressive scan of a band of one component's AC coefficients (G.1.2.2); see `read_sequential`."""
    rows, columns = shape
    position = done = 0
    for end in ends:
        skipped = 0
        for mcu in range(done, min(done + interval, rows * columns)):
            if skipped:
                skipped -= 1
                continue
            block = out[grid[0, 0] + mcu // columns * grid[0, 1] + mcu % columns]
            k = band[0]
            while k <= band[1]:
                window = _window(bits, position)
                entry = _look(ac[0], window)
                if entry == 0:
                    return _BAD_CODE
                length, run, size = entry >> 8, entry >> 4 & 15, entry & 15
                if size == 0 and run != 15:
                    skipped = (1 << run) + _bits(window, length, run) - 1
                    position += length + run
                    break
                position += length + size
                k += run
                if size:
                    if k > band[1]:
                        return _OUTSIDE
                    value = _value(window, length, size) << low
                    if abs(value) > 1023:
                        return OUT_OF_RANGE
                    block[k] = value
                k += 1
            if position > end * 8:
                return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE


@compiled
def refine_ac(
    bits: Bytes,
    ends: Ints,
    interval: int,
    shape: tuple[int, int],
    grid: Ints,
    ac: Ints,
    band: tuple[int, int],
    low: int,
    out: Coefficients,
) -> int:
    """Read a progressive scan that refines a band of one component's AC coefficients (G.1.2.3)."""
    rows, columns = shape
    position = done = 0
    for end in ends:
        skipped = 0
        for mcu in range(done, min(done + interval, rows * columns)):
            block = out[grid[0, 0] + mcu // columns * grid[0, 1] + mcu % columns]
            k = band[0]
            while k <= band[1]:
                zeros, new = 64, 0  # zeros to pass before the new coefficient; more than there are at an end of block
                if skipped == 0:
                    window = _window(bits, position)
                    entry = _look(ac[0], window)
                    if entry == 0:
                        return _BAD_CODE
                    length, run, size = entry >> 8, entry >> 4 & 15, entry & 15
                    position += length
                    if size > 1:
                        return OUT_OF_RANGE
                    if size == 1:
                        zeros, new = run, 1 if _bits(window, length, 1) else -1
                        position += 1
                    elif run == 15:
                        zeros = 15
                    else:
                        skipped = (1 << run) + _bits(window, length, run)
                        position += run
                while k <= band[1]:
                    if block[k]:
                        if bits[position >> 3] >> (7 - (position & 7)) & 1 and not abs(block[k]) >> low & 1:
                            block[k] += 1 << low if block[k] > 0 else -(1 << low)
                        position += 1
                    elif zeros == 0:
                        break
                    else:
                        zeros -= 1
                    k += 1
                if new:
                    if k > band[1]:
                        return _OUTSIDE
                    block[k] = new * (1 << low)
                k += 1
            if skipped:
                skipped -= 1
            if position > end * 8:
                return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE
