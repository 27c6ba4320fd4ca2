"""Reading Huffman codes: tables against slow and simple ones, faults by name, no access outside an array."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import huffman
from fastload.huffman import FAULTS, PADDING

TESTS = Path(__file__).parent


def codes_of(counts: bytes, symbols: bytes) -> dict[str, int]:
    """A DHT segment's codes as text -> symbol, by figure C.2."""
    result: dict[str, int] = {}
    code = 0
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            result[format(code, f"0{length}b")] = symbols[len(result)]
            code += 1
        code <<= 1
    return result


@st.composite
def tables(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Counts and symbols of a prefix code, complete or not."""
    counts, free = [], 1
    for _ in range(16):
        free *= 2
        most = min(free, 256 - sum(counts))
        counts.append(draw(st.one_of(st.just(0), st.integers(0, most), st.just(most))))
        free -= counts[-1]
    return bytes(min(c, 255) for c in counts), bytes(draw(st.permutations(range(256))))[: sum(counts)]


# --- tables for reading


@settings(deadline=None, max_examples=150)
@given(table=tables(), heads=st.lists(st.integers(0, 0xFFFF), max_size=30))
@example((bytes(16), b""), [0, 1, 0xFFFF])
@example((bytes(15) + b"\xff", bytes(range(255))), [0, 254, 255, 256])
@example((b"\2" + bytes(15), b"ab"), [0, 0x8000, 0xFFFF])
def test_decoding_table_finds_each_code_and_none_else(table: tuple[bytes, bytes], heads: list[int]) -> None:
    """The code at the head of any 16 bits, with its length; 0 where there is none."""
    built = huffman.decoding_table(*table)
    assert built is not None
    codes = codes_of(*table)
    begin = [int(code.ljust(16, fill), 2) for code in codes for fill in "01"]
    for head in heads + begin + [min(h + 1, 0xFFFF) for h in begin]:
        bits = format(head, "016b")
        expected = next((len(code) << 8 | codes[code] for code in (bits[:n] for n in range(1, 17)) if code in codes), 0)
        assert huffman._look(built, np.uint64(head << 48 | 0xFFFFFFFFFFFF)) == expected


@settings(deadline=None)
@given(counts=st.binary(min_size=16, max_size=16))
def test_decoding_table_refuses_what_is_no_prefix_code(counts: bytes) -> None:
    """Counts that claim more codes of a length than are left: None, as for libjpeg."""
    fits = sum(count << (16 - length) for length, count in enumerate(counts, 1)) <= 1 << 16
    if sum(counts) <= 256:
        assert (huffman.decoding_table(counts, bytes(sum(counts))) is not None) == fits


# --- stuffing


def unstuffed(data: bytes) -> tuple[int, bytes, list[int]]:
    """What `unstuff` does, step by step."""
    place, out, marks = 0, b"", []
    while place < len(data):
        following = place + 1
        while data[place] == 0xFF and following < len(data) and data[following] == 0xFF:
            following += 1
        if data[place] != 0xFF:
            out += data[place : place + 1]
            place += 1
        elif following == len(data):
            return len(data), out, marks
        elif data[following] == 0 and following == place + 1:
            out += b"\xff"
            place += 2
        elif data[following] == 0xD0 + len(marks) % 8:
            marks.append(len(out))
            place = following + 1
        else:
            break
    return place, out, marks


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([b"\xff\0", b"\xff", b"\0", b"a", b"\xff\xd0", b"\xff\xd1", b"\xff\xd9", b"\xff\xff\xd0"]))
)
def test_unstuff_undoes_stuffing_up_to_a_marker(parts: list[bytes]) -> None:
    """Stuffed bytes, fill bytes, restart markers in order and what ends a scan."""
    data = b"".join(parts)
    out, marks = np.zeros(len(data) + PADDING, np.uint8), np.zeros(9, np.int64)
    place, length, restarts = huffman.unstuff(np.frombuffer(data, np.uint8), 0, out, marks)
    expected = unstuffed(data)
    if restarts >= 0:
        assert (place, out[:length].tobytes(), marks[:restarts].tolist()) == expected
    else:
        assert 0xD0 <= data[place:].lstrip(b"\xff")[0] <= 0xD7, "restart markers too many or out of order"


# --- faults

DC = {"00": 0, "01": 1, "10": 11, "110": 12}
AC = {"00": 0, "01": 0x01, "100": 0xF0, "101": 0xF1, "110": 0x0A, "1110": 0x0B}


def table(codes: dict[str, int]) -> huffman.Ints:
    counts = [sum(len(code) == length for code in codes) for length in range(1, 17)]
    built = huffman.decoding_table(bytes(counts), bytes(codes.values()))
    assert built is not None
    return built[None]


def bit_array(text: str) -> tuple[huffman.Bytes, huffman.Ints]:
    """Bits as text, filled up with ones, as a reader takes them: with padding, and where they end."""
    text = text.replace(" ", "")
    text += "1" * (-len(text) % 8)
    data = np.array([int(text[i : i + 8], 2) for i in range(0, len(text), 8)], np.uint8)
    return np.append(data, np.zeros(PADDING, np.uint8)), np.array([len(data)])


@pytest.mark.parametrize(
    ("bits", "fault"),
    [
        ("00 00 00 00", ""),
        ("01 1 01 1 00 00 00", ""),
        ("111", "a code that is none"),
        ("110 000000000000", "a code that is none"),
        ("00 1111", "a code that is none"),
        ("00 00 00", "fewer bits than blocks"),
        ("00 00 00 00 11111111", "more bits than blocks"),
        ("00 101 1 101 1 101 1 101 1 00 00 00", "coefficients outside a block"),
        ("00" + "100" * 4 + "00 00", ""),
        ("00 1110 00000000000 00 00 00", "coefficients outside of 8-bit JPEG's range"),
        ("10 11111111111 00 01 1 00", "coefficients outside of 8-bit JPEG's range"),
    ],
)
def test_each_fault_of_a_sequential_scan_has_its_name(bits: str, fault: str) -> None:
    """Two blocks of a grey image, in bits."""
    data, ends = bit_array(bits)
    out = np.zeros((2, 64), np.int16)
    grid = np.array([(0, 2, 1, 1, 1)])
    found = huffman.read_sequential(data, ends, 2, (1, 2), grid, table(DC), table(AC), out)
    assert FAULTS[found] == fault


EOB_RUNS = {"0": 0x10, "10": 0x01, "110": 0xE0, "1110": 0xF0, "11110": 0x02, "111110": 0xF1}


@pytest.mark.parametrize(
    ("bits", "fault"),
    [
        ("0 0", ""),
        ("0 1", ""),
        ("110 11111111111111", ""),
        ("10 1 0 0 ", ""),
        ("11111", "a code that is none"),
        ("10 1 111110 1 0 0", "coefficients outside a block"),
        ("0 0 00000000 00000000", "more bits than blocks"),
    ],
)
def test_each_fault_of_a_progressive_band_has_its_name(bits: str, fault: str) -> None:
    """Two blocks, coefficients 5 to 20: the first scan and one that refines; runs of ended blocks may be too long."""
    data, ends = bit_array(bits)
    grid = np.array([(0, 2, 1, 1, 1)])
    for read in (huffman.read_ac, huffman.refine_ac):
        out = np.zeros((2, 64), np.int16)
        found = read(data, ends, 2, (1, 2), grid, table(EOB_RUNS), (5, 20), 1, out)
        assert FAULTS[found] == fault, read


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=60), shape=st.tuples(st.integers(1, 4), st.integers(1, 9)), seed=st.integers(0, 1 << 30))
def test_random_bits_end_in_a_fault_or_in_time(data: bytes, shape: tuple[int, int], seed: int) -> None:
    """Any bits, any tables: a reader returns, and writes no block but those of its scan."""
    random = np.random.default_rng(seed)
    symbols = random.integers(0, 256, 16).astype(np.uint8)
    built = huffman.decoding_table(bytes([0, 0, 0, 15] + [0] * 12), symbols[:15].tobytes())
    assert built is not None
    bits, ends = np.append(np.frombuffer(data, np.uint8), np.zeros(PADDING, np.uint8)), np.array([len(data)])
    rows, columns = shape
    grid = np.array([(2, columns, rows, 1, 1)])
    mcus, tables = rows * columns, built[None]
    out = np.zeros((mcus + 4, 64), np.int16)
    arguments = (bits, ends, mcus, shape, grid)
    low = int(random.integers(0, 14))
    faults = [
        huffman.read_sequential(*arguments, tables, tables, out),
        huffman.read_dc(*arguments, tables, 0, low, out),
        huffman.read_dc(*arguments, tables, low + 1, low, out),
        huffman.read_ac(*arguments, tables, (1, 63), low, out),
        huffman.refine_ac(*arguments, tables, (1, 63), low, out),
    ]
    assert all(fault in range(len(FAULTS)) for fault in faults)
    assert not out[:2].any()
    assert not out[-2:].any()


CHECKED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from damage import damaged, judge, made_up, too_large
from jpegs import Component, random_picture, small_tiles
from fastload import huffman
try:
    huffman._window(np.zeros(8, np.uint8), 8)
except IndexError:
    print("checked")
blocks, grid = np.ones((5000, 64), np.int16), np.array([(0, 5000, 1, 1, 1)])
bits, ends = np.zeros(3 + huffman.PADDING, np.uint8), np.array([3])
for symbol in (0x00, 0x01, 0x0A, 0x0F, 0xE0, 0xF0, 0xFF):  # a code of 16 zeros for each, and nothing but zeros
    tables = huffman.decoding_table(bytes(15) + bytes([1]), bytes([symbol]))[None]
    read = bits, ends, 5000, (1, 5000), grid
    faults = (
        huffman.read_sequential(*read, tables, tables, blocks.copy()),
        huffman.read_dc(*read, tables, 0, 0, blocks.copy()),
        huffman.read_dc(*read, tables, 1, 0, blocks.copy()),
        huffman.read_ac(*read, tables, (1, 63), 0, blocks.copy()),
        huffman.refine_ac(*read, tables, (1, 63), 0, blocks.copy()),
    )
    assert all(faults[:3]) and faults[4], (symbol, faults)
random = np.random.default_rng(0)
with small_tiles():
    for _ in range(20):
        judge(too_large(random, random_picture(random, 40, 60, (Component(1),))), random)
    for _ in range(100):
        data = made_up(random)
        judge(data, random)
        for _ in range(4):
            judge(damaged(random, data, data), random)
"""


def test_no_access_outside_of_an_array(tmp_path: Path) -> None:
    """Compiled with numba's checks of each index, damaged files raise nothing."""
    variables = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", CHECKED, str(TESTS)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["checked"]
