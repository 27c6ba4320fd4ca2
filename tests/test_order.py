"""Randomness as a function of (seed, epoch, index): the same for ever, uniform, and unrelated between neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastload.order import SampleRandom, mix64

MASK = (1 << 64) - 1
words = st.integers(0, MASK)
whole_numbers = st.integers(-(1 << 70), 1 << 70)

GOLDEN_BITS = [10582542162890476095, 7515791933024298523, 3866204644672872146]
GOLDEN_ZERO = 3235846975224723415


def chi_square(values: np.ndarray, bins: int) -> float:
    """Pearson's statistic of integers in [0, bins) against the uniform distribution: near bins - 1 if they are."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float(((counts - expected) ** 2).sum() / expected)


def plausible(statistic: float, bins: int) -> bool:
    """Within six standard deviations of a chi-square variable's mean, on both sides: too even is wrong as well."""
    freedom = bins - 1
    return abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


# ---- mix64


def unmixed(value: int) -> int:
    """The inverse of SplitMix64's finaliser, step by step backwards."""
    value ^= value >> 31 ^ value >> 62
    value = value * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    value ^= value >> 27 ^ value >> 54
    value = value * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return value ^ value >> 30 ^ value >> 60


def test_mix64_gives_splitmix64s_published_numbers() -> None:
    """The first outputs of SplitMix64 started at 1234567, as its reference implementation prints them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix64(1234567 + i * 0x9E3779B97F4A7C15) for i in range(1, 5)] == published


@given(words)
def test_mix64_loses_nothing(value: int) -> None:
    """It is a bijection of 64 bits: no two hashes of neighbouring samples can collide in it."""
    assert 0 <= mix64(value) <= MASK
    assert unmixed(mix64(value)) == value


@given(whole_numbers)
def test_mix64_takes_any_whole_number_modulo_64_bits(value: int) -> None:
    """Negative and huge numbers count modulo 2**64, as in a C implementation."""
    assert mix64(value) == mix64(value & MASK)


def test_each_input_bit_flips_each_output_bit_half_of_the_time() -> None:
    """The avalanche that the docstring promises, for all 64 x 64 pairs of bits."""
    starts = [mix64(i * 977) for i in range(400)]
    for bit in range(64):
        flipped = np.array([mix64(start) ^ mix64(start ^ 1 << bit) for start in starts], np.uint64)
        shares = np.unpackbits(flipped.view(np.uint8).reshape(-1, 8), axis=1).mean(0)
        assert shares.min() > 0.3
        assert shares.max() < 0.7


# ---- SampleRandom: determinism and range


@given(whole_numbers, whole_numbers, whole_numbers)
def test_the_same_three_numbers_give_the_same_draws(seed: int, epoch: int, index: int) -> None:
    """Two objects made apart agree draw by draw, and neither disturbs the other."""
    one, other = SampleRandom(seed, epoch, index), SampleRandom(seed, epoch, index)
    first = [one.bits() for _ in range(5)]
    assert [other.bits() for _ in range(5)] == first
    assert len(set(first)) == 5


def test_the_draws_are_the_same_in_every_version() -> None:
    """Golden numbers: a change here would change the crops of every experiment that is run again."""
    random = SampleRandom(17, 3, 1281166)
    assert [random.bits() for _ in range(3)] == GOLDEN_BITS
    assert SampleRandom(0, 0, 0).bits() == GOLDEN_ZERO
    random = SampleRandom(17, 3, 1281166)
    assert random.random() == (GOLDEN_BITS[0] >> 11) / 2**53
    assert random.integer(1000) == GOLDEN_BITS[1] * 1000 >> 64
    assert random.uniform(-2, 6) == -2 + 8 * ((GOLDEN_BITS[2] >> 11) / 2**53)


def test_seed_epoch_and_index_are_not_interchangeable() -> None:
    """A grid of triples has as many first draws as triples, so no epoch repeats another seed's crops."""
    triples = list(itertools.product(range(8), range(8), range(40)))
    assert len({SampleRandom(*triple).bits() for triple in triples}) == len(triples)


@given(words, words, st.integers(1, 1 << 64), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@example(0, 0, 1, 0.0, 0.0)
def test_draws_stay_in_their_range(seed: int, index: int, n: int, low: float, high: float) -> None:
    """bits in 64 bits, random in [0, 1), integer in [0, n), uniform between its bounds."""
    low, high = min(low, high), max(low, high)
    random = SampleRandom(seed, 0, index)
    assert 0 <= random.bits() <= MASK
    assert 0.0 <= random.random() < 1.0
    assert 0 <= random.integer(n) < n
    assert low <= random.uniform(low, high) <= high


def test_the_largest_draw_is_still_below_one() -> None:
    """The state whose output is all ones, made with the inverse, gives 1 - 2**-53 and n - 1, never 1 or n."""
    for draw, largest in ((SampleRandom.random, 1 - 2.0**-53), (lambda r: r.integer(10), 9)):
        random = SampleRandom(0, 0, 0)
        random._state = (unmixed(MASK) - 0x9E3779B97F4A7C15) & MASK
        assert draw(random) == largest  # type: ignore[operator]


# ---- SampleRandom: statistics, with fixed seeds


@pytest.mark.parametrize("n", [2, 7, 64, 1000])
def test_first_and_later_draws_are_uniform_over_the_samples(n: int) -> None:
    """Over 20 000 samples of one epoch every value of integer(n) comes equally often, in each place of the sequence."""
    randoms = [SampleRandom(1, 2, index) for index in range(20_000)]
    for _ in range(3):
        assert plausible(chi_square(np.array([r.integer(n) for r in randoms]), n), n)


def test_one_samples_draws_are_uniform() -> None:
    """A long sequence of a single sample fills [0, 1) evenly."""
    random = SampleRandom(5, 0, 7)
    values = np.array([random.random() for _ in range(30_000)])
    assert plausible(chi_square((values * 128).astype(np.int64), 128), 128)
    assert values.mean() == pytest.approx(0.5, abs=0.01)


NEIGHBOURS: dict[str, Callable[[int], tuple[SampleRandom, SampleRandom]]] = {
    "index": lambda i: (SampleRandom(3, 1, i), SampleRandom(3, 1, i + 1)),
    "epoch": lambda i: (SampleRandom(3, i, 5), SampleRandom(3, i + 1, 5)),
    "seed": lambda i: (SampleRandom(i, 1, 5), SampleRandom(i + 1, 1, 5)),
    "index against epoch": lambda i: (SampleRandom(3, 1, i), SampleRandom(3, i, 1)),
    "power of two": lambda i: (SampleRandom(3, 1, i), SampleRandom(3, 1, i + (1 << 32))),
}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_neighbours_have_nothing_to_do_with_each_other(what: str) -> None:
    """Pairs of draws of neighbours fall evenly in 16 x 16 bins, and half of their bits differ."""
    pairs = [NEIGHBOURS[what](i) for i in range(20_000)]
    bits = np.array([(a.bits(), b.bits()) for a, b in pairs], np.uint64)
    top, low = (bits >> np.uint64(60)).astype(np.int64), (bits & np.uint64(15)).astype(np.int64)
    for digits in (top, low):
        assert plausible(chi_square(digits[:, 0] * 16 + digits[:, 1], 256), 256)
    differing = np.unpackbits((bits[:, 0] ^ bits[:, 1]).view(np.uint8)).mean()
    assert differing == pytest.approx(0.5, abs=0.005)


def test_the_draws_of_one_sample_have_nothing_to_do_with_each_other() -> None:
    """A crop's height says nothing about its position: consecutive draws fall evenly in 16 x 16 bins."""
    randoms = [SampleRandom(9, 4, index) for index in range(20_000)]
    first, second = (np.array([r.integer(16) for r in randoms]) for _ in range(2))
    assert plausible(chi_square(first * 16 + second, 256), 256)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
