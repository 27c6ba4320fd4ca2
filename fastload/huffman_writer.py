"""JPEG's entropy coding, writing: from DCT coefficients to a scan's bits, which `huffman` reads.

Compiled by numba and imported like that module; coefficients and `grid` are as described there. Sequential scans are
written, by ITU-T T.81, annexes F and K.2, with entry points: places in a row of MCUs from which a crop can be decoded.

`symbolise` stops with a fault at the first coefficient that 8-bit JPEG has no symbols for: none is ever written. What
is written is never checked against the room in an array: the caller gives as much as the coefficients can take.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .huffman import OUT_OF_RANGE, Bytes, Coefficients, Ints, compiled, inlined

_TABLES = 4
_AC = 2
_ENTRY, _RESTART = _TABLES << 24, _TABLES + 1 << 24
_ONES, _HIGHS = np.uint64(0x01010101), np.uint64(0x80808080)
_SIZE = np.array([value.bit_length() for value in range(1 << 12)], np.uint8)  # categories, F.1.2.1


@compiled
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
                            return -OUT_OF_RANGE
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
                                    return -OUT_OF_RANGE
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


@compiled
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


@compiled
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


@compiled
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


@inlined
def _put(out: Bytes, length: int, byte: np.uint64) -> int:
    """Append the low 8 bits of `byte`, stuffed; return the new length."""
    out[length] = byte & np.uint64(255)
    if out[length] == 255:
        length += 1
        out[length] = 0
    return length + 1
