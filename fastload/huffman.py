"""JPEG's entropy coding, both ways: from a scan's bits to DCT coefficients and from coefficients to bits.

Compiled by numba, without the GIL; imported only when images are re-cut, which is when they are packed. Sequential and
progressive Huffman scans are read, sequential ones are written, all by ITU-T T.81, annexes F, G and K.2.

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
_FINE, _BAD_CODE, _TOO_FEW, _LEFT_OVER, _OUTSIDE, _RANGE = range(len(FAULTS))

PADDING = 512
"""Readable bytes that must follow the bits: more than one block can take."""

_FAST = 9
_LIMITS = 1 << _FAST
_SHIFTS = _LIMITS + 18
_SYMBOLS = _SHIFTS + 18

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    try:
        return cast(_Function, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # there is no folder that numba may write its cache to
        return cast(_Function, njit(nogil=True)(function))


def _inlined(function: _Function) -> _Function:
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


@_compiled
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


@_inlined
def _window(bits: Bytes, position: int) -> Any:
    """The bits from a position on, left-aligned in 64: at least 57 of them."""
    at = np.uint64(position >> 3)
    window = np.uint64(0)
    for i in range(8):
        window = window << np.uint64(8) | np.uint64(bits[at + np.uint64(i)])
    return window << np.uint64(position & 7)


@_inlined
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


@_inlined
def _value(window: Any, skip: int, size: int) -> Any:
    """The signed number of `size` bits (1 to 15) that follows `skip` bits of a window (F.2.2.1: EXTEND)."""
    raw = np.int64(window << np.uint64(skip) >> np.uint64(64 - size))
    return raw if raw >> (size - 1) else raw - (1 << size) + 1


@_inlined
def _bits(window: Any, skip: int, size: int) -> Any:
    """The number of `size` bits (0 to 15) that follows `skip` bits of a window."""
    return np.int64(window << np.uint64(skip) >> np.uint64(1) >> np.uint64(63 - size))


@_compiled
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
                            return _RANGE
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
                                return _RANGE
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


@_compiled
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
                                return _RANGE
                            out[first + x, 0] = predictions[i] << low
                        if position > end * 8:
                            return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE


@_compiled
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
                        return _RANGE
                    block[k] = value
                k += 1
            if position > end * 8:
                return _TOO_FEW
        done += interval
        if end * 8 - position >= 8:
            return _LEFT_OVER
        position = end * 8
    return _FINE


@_compiled
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
                        return _RANGE
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


_TABLES = 4
_AC = 2
_ENTRY, _RESTART = _TABLES << 24, _TABLES + 1 << 24
_ONES, _HIGHS = np.uint64(0x01010101), np.uint64(0x80808080)
_SIZE = np.array([value.bit_length() for value in range(1 << 12)], np.uint8)  # categories, F.1.2.1


@_compiled
def symbolise(
    coefficients: Coefficients,
    shape: tuple[int, int],
    grid: Ints,
    step: int,
    out: npt.NDArray[np.uint32],
    counts: Ints,
    predictions: Ints,
) -> int:
    """Turn coefficients into the symbols of an interleaved sequential scan, each row of MCUs a restart interval.

    step: MCUs from one entry point to the next in a row. out: gets a number for each symbol: table << 24 | symbol << 16
    | the bits that follow it; tables are the DC and AC ones of the first component (0, 2) and of the others (1, 3).
    counts: (tables, 256), gets how often each symbol occurs, in lead-ins too. predictions: (entry points, components),
    gets the DC predictions before each.

    Returns the length of `out`, or the negative number of a fault.
    """
    rows, columns = shape
    length = entries = 0
    last = np.zeros(len(grid), np.int64)
    words = coefficients.view(np.int64)
    for row in range(rows):
        last[:] = 0
        for column in range(columns):
            if column and column % step == 0:
                out[length] = _ENTRY
                length += 1
                for i in range(len(grid)):
                    blocks = grid[i, 3] * grid[i, 4]
                    table = min(i, 1)
                    predictions[entries, i] = last[i]
                    counts[table, _SIZE[abs(last[i])]] += 1
                    counts[table, 0] += blocks - 1
                    counts[_AC + table, 0] += blocks
                entries += 1
            for i in range(len(grid)):
                table = min(i, 1)
                for y in range(grid[i, 4]):
                    first = grid[i, 0] + (row * grid[i, 4] + y) * grid[i, 1] + column * grid[i, 3]
                    for block in range(first, first + grid[i, 3]):
                        value = np.int64(coefficients[block, 0])
                        difference = value - last[i]
                        last[i] = value
                        if abs(value) > 2047 or abs(difference) > 2047:
                            return -_RANGE
                        size = _SIZE[abs(difference)]
                        out[length] = table << 24 | size << 16 | (difference - (difference < 0)) & (1 << size) - 1
                        counts[table, size] += 1
                        length += 1
                        run, ac = -1, _AC + table
                        for word in range(16):
                            if words[block, word] == 0:
                                run += 4
                                continue
                            for k in range(4 * word, 4 * word + 4):
                                value = np.int64(coefficients[block, k])
                                if value == 0 or k == 0:
                                    run += 1
                                    continue
                                while run > 15:
                                    out[length] = ac << 24 | 0xF0 << 16
                                    counts[ac, 0xF0] += 1
                                    length += 1
                                    run -= 16
                                if abs(value) > 1023:
                                    return -_RANGE
                                size = _SIZE[abs(value)]
                                symbol = run << 4 | size
                                out[length] = ac << 24 | symbol << 16 | (value - (value < 0)) & (1 << size) - 1
                                counts[ac, symbol] += 1
                                length += 1
                                run = 0
                        if run:
                            out[length] = ac << 24
                            counts[ac, 0] += 1
                            length += 1
        out[length] = _RESTART
        length += 1
    return length


@_compiled
def optimal_code(counts: Ints, sizes: Ints, codes: Ints) -> None:
    """Find the optimal prefix code of at most 16 bits for symbols that occur so often (K.2, C.2).

    counts: (256,). sizes, codes: (256,), get the symbols' code lengths, 0 where one does not occur, and their codes. No
    code is all ones.
    """
    weight = np.zeros(257, np.int64)
    weight[:256] = counts
    weight[256] = 1  # takes the code of all ones
    length = np.zeros(257, np.int64)
    others = np.full(257, -1, np.int64)
    while True:
        least = second = -1
        for i in range(257):
            if weight[i] and (least < 0 or weight[i] <= weight[least]):
                second, least = least, i
            elif weight[i] and (second < 0 or weight[i] <= weight[second]):
                second = i
        if second < 0:
            break
        weight[least] += weight[second]
        weight[second] = 0
        i = least
        length[i] += 1
        while others[i] >= 0:
            i = others[i]
            length[i] += 1
        others[i] = second
        i = second
        length[i] += 1
        while others[i] >= 0:
            i = others[i]
            length[i] += 1
    by_length = np.zeros(258, np.int64)
    for i in range(257):
        by_length[length[i]] += 1
    by_length[0] = 0
    for i in range(257, 16, -1):
        while by_length[i] > 0:
            j = i - 2
            while by_length[j] == 0:
                j -= 1
            by_length[i] -= 2
            by_length[i - 1] += 1
            by_length[j + 1] += 2
            by_length[j] -= 1
    i = 16
    while by_length[i] == 0:
        i -= 1
    by_length[i] -= 1
    sizes[:] = 0
    size = 1
    for depth in range(1, 258):
        for i in range(256):
            if length[i] == depth:
                while by_length[size] == 0:
                    size += 1
                by_length[size] -= 1
                sizes[i] = size
    code = 0
    for size in range(1, 17):
        for i in range(256):
            if sizes[i] == size:
                codes[i] = code
                code += 1
        code <<= 1


@_compiled
def write(symbols: npt.NDArray[np.uint32], codes: Ints, sizes: Ints, out: Bytes, starts: Ints, row_ends: Ints) -> int:
    """Write symbols as a scan's bytes, stuffed, with restart markers between rows; return how many bytes there are.

    codes, sizes: (tables, 256). starts: gets where the entry points are, byte * 8 + bit. row_ends: gets where each row
    and the marker after it ends.
    """
    accumulator, held, length, entries, restarts = np.uint64(0), 0, 0, 0, 0
    for symbol in symbols:
        table = symbol >> 24
        if table < _TABLES:
            which = symbol >> 16 & 255
            size, extra = sizes[table, which], which & 15
            accumulator = accumulator << np.uint64(size) | np.uint64(codes[table, which])
            accumulator = accumulator << np.uint64(extra) | np.uint64(symbol & 0xFFFF)
            held += size + extra
            if held >= 32:
                held -= 32
                word = accumulator >> np.uint64(held)
                if (~word - _ONES) & word & _HIGHS:  # perhaps one byte of the four is 0xFF
                    for shift in range(24, -8, -8):
                        length = _put(out, length, word >> np.uint64(shift))
                else:
                    for i in range(4):
                        out[length + i] = word >> np.uint64(24 - 8 * i) & np.uint64(255)
                    length += 4
            continue
        if table == _TABLES + 1 and held & 7:
            fill = 8 - (held & 7)
            accumulator = accumulator << np.uint64(fill) | np.uint64((1 << fill) - 1)
            held += fill
        while held >= 8:
            held -= 8
            length = _put(out, length, accumulator >> np.uint64(held))
        if table == _TABLES:
            starts[entries] = length * 8 + held
            entries += 1
        else:
            out[length] = 255
            out[length + 1] = 0xD0 + (restarts & 7)
            length += 2
            row_ends[restarts] = length
            restarts += 1
    return length - 2


@_compiled
def lead_ins(
    out: Bytes,
    lengths: Bytes,
    scan: Bytes,
    starts: Ints,
    predictions: Ints,
    blocks: Ints,
    codes: Ints,
    sizes: Ints,
) -> int:
    """Write the lead-in of each entry point to `out`, one after the other; return how many bytes they take.

    A lead-in is one MCU, by itself at the start of a restart interval, which leaves a decoder in the state that it has
    at the entry point: its DC coefficients are the predictions there, and it ends at the same bit of a byte. That byte
    is its last one. Coefficients that mean nothing lengthen it to that bit.

    lengths: gets the bytes of each. scan: the stuffed bytes. starts: the entry points, byte * 8 + bit. blocks: of each
    component in an MCU. codes, sizes: (tables, 256). Returns -1 if the code has no symbols to reach each bit with.
    """
    step = np.zeros(8, np.int64)  # the shortest AC symbol whose length is so modulo 8, and its length
    reach = np.full(8, 1 << 20, np.int64)
    for symbol in range(0x71):
        size = symbol & 15
        length = sizes[_AC, symbol] + size
        if size and sizes[_AC, symbol] and length < reach[length & 7]:
            reach[length & 7] = length
            step[length & 7] = symbol
    best = np.full(8, 1 << 20, np.int64)  # the fewest bits that lengthen by so many modulo 8, and the last step to them
    last = np.zeros(8, np.int64)
    best[0] = 0
    for _ in range(7):  # seven symbols reach whatever can be reached
        for have in range(8):
            for add in range(8):
                if best[have] + reach[add] < best[(have + add) & 7]:
                    best[(have + add) & 7] = best[have] + reach[add]
                    last[(have + add) & 7] = add
    length = 0
    for entry in range(len(starts)):
        first = length
        bit = starts[entry] & 7
        total = 0
        for i in range(len(blocks)):
            table = min(i, 1)
            size = _SIZE[abs(predictions[entry, i])]
            total += sizes[table, size] + size + (blocks[i] - 1) * sizes[table, 0] + blocks[i] * sizes[_AC + table, 0]
        more = bit - total & 7
        if best[more] >= 1 << 20:
            return -1
        accumulator, held = np.uint64(0), 0
        for i in range(len(blocks)):
            table = min(i, 1)
            value = predictions[entry, i]
            for block in range(blocks[i]):
                size = _SIZE[abs(value)] if block == 0 else 0
                accumulator = accumulator << np.uint64(sizes[table, size] + size)
                accumulator |= np.uint64(codes[table, size] << size | (value - (value < 0)) & (1 << size) - 1)
                held += sizes[table, size] + size
                while more and i == 0 and block == 0:
                    symbol = step[last[more]]
                    accumulator = accumulator << np.uint64(sizes[_AC, symbol] + (symbol & 15))
                    accumulator |= np.uint64(codes[_AC, symbol] << (symbol & 15))
                    held += sizes[_AC, symbol] + (symbol & 15)
                    more = more - last[more] & 7
                    while held >= 8:
                        held -= 8
                        length = _put(out, length, accumulator >> np.uint64(held))
                accumulator = accumulator << np.uint64(sizes[_AC + table, 0]) | np.uint64(codes[_AC + table, 0])
                held += sizes[_AC + table, 0]
                while held >= 8:
                    held -= 8
                    length = _put(out, length, accumulator >> np.uint64(held))
        if held:
            rest = np.uint64(scan[starts[entry] >> 3]) & np.uint64((1 << (8 - held)) - 1)
            length = _put(out, length, accumulator << np.uint64(8 - held) | rest)
        lengths[entry] = length - first
    return length


@_inlined
def _put(out: Bytes, length: int, byte: np.uint64) -> int:
    """Append the low 8 bits of `byte`, stuffed; return the new length."""
    out[length] = byte & np.uint64(255)
    if out[length] == 255:
        length += 1
        out[length] = 0
    return length + 1
