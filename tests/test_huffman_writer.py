"""Writing Huffman codes: as short as can be, read back as they were, and none for what JPEG has no symbols for."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import huffman, huffman_writer
from fastload.huffman import FAULTS, PADDING

# --- codes


def tree_cost(weights: list[int]) -> tuple[int, int]:
    """Bits that a Huffman tree without a limit takes for these weights, and its depth."""
    heap = [(weight, 0) for weight in weights]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        (a, i), (b, j) = heapq.heappop(heap), heapq.heappop(heap)
        cost += a + b
        heapq.heappush(heap, (a + b, max(i, j) + 1))
    return cost, heap[0][1]


@settings(deadline=None, max_examples=150)
@given(
    counts=st.dictionaries(st.integers(0, 255), st.integers(1, 1 << 20), min_size=1, max_size=256)
    | st.integers(1, 256).map(lambda n: dict.fromkeys(range(n), 1))
)
@example({i: 1 << i for i in range(40)})
@example({i: 1 << min(i, 50) for i in range(256)})
def test_optimal_code_is_one_and_is_optimal(counts: dict[int, int]) -> None:
    """A code for each symbol that occurs, of 16 bits at most, none all ones; as short as can be unless 16 limit it."""
    weights = np.zeros(256, np.int64)
    weights[list(counts)] = list(counts.values())
    sizes, codes = np.zeros(256, np.int64), np.zeros(256, np.int64)
    huffman_writer.optimal_code(weights, sizes, codes)
    assert ((sizes > 0) == (weights > 0)).all()
    assert sizes.max() <= 16
    texts = sorted(format(codes[s], f"0{sizes[s]}b") for s in counts)
    assert all(not b.startswith(a) for a, b in pairwise(texts))
    assert "1" * len(texts[-1]) != texts[-1]
    cost, depth = tree_cost([*counts.values(), 1])
    if depth <= 16:
        assert (weights * sizes).sum() + sizes.max() == cost, "the code of all ones is as long as the longest"


# --- there and back


GRIDS = {(1, 1): 1, (2, 1): 3, (2, 2): 3, (1, 2): 3, (4, 1): 3}


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 12),
    sampling=st.sampled_from(sorted(GRIDS)),
    step=st.integers(1, 13),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    seed=st.integers(0, 1 << 20),
)
def test_coefficients_come_back(
    rows: int, columns: int, sampling: tuple[int, int], step: int, density: float, seed: int
) -> None:
    """Written and read again, coefficients are the same; each array gets as many bytes as there is room for."""
    random, components = np.random.default_rng(seed), GRIDS[sampling]
    grid, first = [], 0
    for h, v in [sampling, (1, 1), (1, 1)][:components]:
        grid.append((first, columns * h, rows * v, h, v))
        first += rows * columns * h * v
    blocks = np.array(grid)
    coefficients = (random.integers(-1023, 1024, (first, 64)) >> random.integers(0, 10, (first, 64))).astype(np.int16)
    coefficients[random.random((first, 64)) >= density] = 0
    coefficients[:, 0] = random.choice([-1023, 0, 5, 1023], first)
    inner = (columns - 1) // step
    symbols = np.zeros(65 * first + rows * (inner + 1), np.uint32)
    counts, predictions = np.zeros((4, 256), np.int64), np.zeros((rows * inner, components), np.int64)
    length = huffman_writer.symbolise(coefficients, (rows, columns), blocks, step, symbols, counts, predictions)
    assert 0 < length <= len(symbols)
    sizes, codes = np.zeros((4, 256), np.int64), np.zeros((4, 256), np.int64)
    used = [table for table in range(4) if table % 2 < components]
    for table in used:
        huffman_writer.optimal_code(counts[table], sizes[table], codes[table])
    room = int((counts * (sizes + np.arange(256) % 16)).sum()) // 4 + 4 * rows
    scan, guard = np.full(room + PADDING, 7, np.uint8), np.full(PADDING, 7, np.uint8)
    starts, row_ends = np.zeros(rows * inner, np.int64), np.zeros(rows, np.int64)
    length = huffman_writer.write(symbols[:length], codes, sizes, scan, starts, row_ends)
    assert (scan[room:] == guard).all(), "the margin is for nothing"
    data, bits, ends = scan[:length].copy(), np.zeros(length + PADDING, np.uint8), np.zeros(rows, np.int64)
    place, ends[-1], restarts = huffman.unstuff(data, 0, bits, ends[:-1])
    assert (place, restarts) == (length, rows - 1)
    tables = []
    for table in range(4):
        order = np.lexsort((np.arange(256), sizes[table]))
        order = order[sizes[table][order] > 0]
        number_of = np.bincount(sizes[table][order], minlength=17)[1:]
        tables.append(huffman.decoding_table(bytes(number_of.tolist()), bytes(order.tolist())))
    dc, ac = (np.stack([tables[kind + min(i, 1)] for i in range(components)]) for kind in (0, 2))
    back = np.zeros_like(coefficients)
    bits[ends[-1] :] = 0
    assert huffman.read_sequential(bits, ends, columns, (rows, columns), blocks, dc, ac, back) == 0
    assert np.array_equal(back, coefficients)


@pytest.mark.parametrize(
    ("dc", "ac"), [((2048,), 0), ((2047, -1, 0), 0), ((1500, 3000, 1500), 0), ((8191,), 0), ((0,), 1024), ((0,), -8192)]
)
def test_coefficients_out_of_range_are_a_fault(dc: tuple[int, ...], ac: int) -> None:
    """What 8-bit JPEG has no symbols for is not written, whatever comes after it; no table is looked up beyond its end.

    As a progressive file can claim, by refining what there was not.
    """
    blocks = np.zeros((6, 64), np.int16)
    blocks[: len(dc), 0] = dc
    blocks[:, 5] = ac
    grid = np.array([(0, 6, 1, 1, 1)])
    arrays = np.zeros(400, np.uint32), np.zeros((4, 256), np.int64), np.zeros((5, 1), np.int64)
    fault = huffman_writer.symbolise(blocks, (1, 6), grid, 1, *arrays)
    assert FAULTS[-fault] == "coefficients outside of 8-bit JPEG's range"
