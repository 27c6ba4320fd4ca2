"""Randomness as a function: the same for ever, uniform, and unrelated between neighbours.

Orders are held against what true permutations give: Pearson's statistic over position-by-value bins and the like, with
fixed keys. A Feistel network of six rounds fails here, and one of eight passes.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastload import order
from fastload.order import ENDLESS, Order, Permutation, Repeated, SampleRandom, Weighted, Windowed, epoch_order, mix64

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


# ---- Permutation: a bijection, the same for ever


GOLDEN_ORDERS = {
    10: [4, 8, 6, 5, 3],
    65_536: [22441, 12344, 24857, 51856, 2400],
    65_537: [37932, 32591, 54172, 48330, 31729],
    1_281_167: [1126052, 294632, 447389, 1112954, 1001316],
    1 << 30: [582715275, 278267940, 1045725180, 691400058, 1002818576],
    (1 << 30) + 1: [290205830, 959663264, 417614848, 714514320, 256388663],
    1 << 48: [211275088109766, 13576685655097, 132085148001174, 250614189608055, 170712150524662],
}
"""The first five indices of Permutation(n, 17)."""


@pytest.mark.parametrize("n", GOLDEN_ORDERS)
def test_the_orders_are_the_same_in_every_version(n: int) -> None:
    """Golden numbers for a table, 32-bit and 64-bit networks: a change would reorder every experiment run again."""
    assert Permutation(n, 17).take(0, 5).tolist() == GOLDEN_ORDERS[n]


@given(st.integers(0, 400), whole_numbers)
def test_a_small_order_has_every_index_once(n: int, key: int) -> None:
    """The whole order, sorted, is 0 ... n - 1."""
    assert sorted(Permutation(n, key).take(0, n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1 << 16, (1 << 16) + 1, 90_000, 3 * 2**15 + 1, (1 << 17) - 1, 1 << 17, (1 << 17) + 1])
@pytest.mark.parametrize("key", [0, 1, -1, 1 << 63])
def test_a_large_order_has_every_index_once(n: int, key: int) -> None:
    """The same on both sides of powers of two and of the table's end, all of it."""
    assert (np.bincount(Permutation(n, key).take(0, n), minlength=n) == 1).all()


class Reference:
    """The network as its docstring tells it, in plain ints and both ways."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self.bits, self.multiply, self.shift, self.again = (
            (32, 0x7FEB352D, 15, 0x846CA68B) if n <= 1 << 30 else (64, 0xBF58476D1CE4E5B9, 31, 0x94D049BB133111EB)
        )
        self.low_bits = (n - 1).bit_length() // 2 + 1
        self.high = math.ceil(n / 2**self.low_bits)
        self.keys = [mix64(mix64(key + 0x9E3779B97F4A7C15) + i) >> 64 - self.bits for i in range(8)]

    def hash(self, value: int, key: int) -> int:
        value = (value ^ key) * self.multiply % 2**self.bits
        return (value ^ value >> self.shift) * self.again % 2**self.bits

    def round(self, value: int, number: int, sign: int) -> int:
        high, low = divmod(value, 1 << self.low_bits)
        key = self.keys[number]
        if number % 2 == 0:
            return high << self.low_bits | low ^ self.hash(high, key) >> self.bits - self.low_bits
        size = self.high.bit_length()
        change = (self.hash(low, key) >> size) * self.high >> self.bits - size
        return (high + sign * change) % self.high << self.low_bits | low

    def walk(self, value: int, sign: int) -> int:
        while True:
            for number in range(8)[::sign]:
                value = self.round(value, number, sign)
            if value < self.n:
                return value


@given(st.integers((1 << 16) + 1, 1 << 48), words, st.data())
@example((1 << 48), 3, None)
@example((1 << 32) + 1, 3, None)
@example((1 << 30), 3, None)
@example((1 << 30) + 1, 3, None)
@example((1 << 16) + 1, 3, None)
def test_an_order_of_any_size_can_be_turned_back(n: int, key: int, data: st.DataObject | None) -> None:
    """What NumPy computes is what plain ints give, and leads back to its position: no index can come twice."""
    drawn = [] if data is None else data.draw(st.lists(st.integers(0, n - 1), max_size=20))
    positions = [0, 1, n // 2, n - 2, n - 1, *drawn]
    indices = Permutation(n, key).at(np.array(positions)).tolist()
    reference = Reference(n, key)
    assert indices == [reference.walk(position, 1) for position in positions]
    assert positions == [reference.walk(index, -1) for index in indices]


@pytest.mark.parametrize("n", [10**6, (1 << 24) + 1, 10**9, (1 << 30) + 1, (1 << 32) + 1, 10**12, 1 << 48])
def test_no_index_comes_twice_in_a_long_part(n: int) -> None:
    """300 000 positions at the start, at the end and spread over all give as many indices, all of them in range."""
    shuffled = Permutation(n, 5)
    for part in (range(300_000), range(n - 300_000, n), range(0, n, -(-n // 300_000))):
        indices = shuffled.at(part)
        assert len(np.unique(indices)) == len(part)
        assert indices.dtype == np.int64
        assert 0 <= indices.min() <= indices.max() < n


ORDERS: dict[str, Callable[[], Order]] = {
    "sequential": lambda: Order(100_003),
    "table": lambda: Permutation(40_000, 5),
    "network": lambda: Permutation(100_003, 5),
    "windows": lambda: Windowed(100_003, 7001, 5),
    "large windows": lambda: Windowed(200_003, 70_001, 5),
    "weights": lambda: Weighted(np.cumsum(np.arange(30_000.0)), 5),
}


@pytest.mark.parametrize("name", ORDERS)
def test_any_part_can_be_asked_for(name: str) -> None:
    """take, with steps too, and at, in any order and with repeats, give what the whole order has there."""
    some = ORDERS[name]()
    whole = some.take(0, some.n)
    assert len(whole) == some.n
    positions = np.random.default_rng(3).integers(0, some.n, 500)
    assert (some.at(positions) == whole[positions]).all()
    for start, stop, step in [(0, 1, 1), (5, 5, 1), (16_000, 17_000, 1), (3, some.n, 7), (some.n - 1, some.n, 1)]:
        assert (some.take(start, stop, step) == whole[start:stop:step]).all()
    again = pickle.loads(pickle.dumps(some))
    assert (again.take(100, 200) == whole[100:200]).all()


@pytest.mark.parametrize("name", ORDERS)
def test_positions_outside_are_refused(name: str) -> None:
    """A position below 0 or from n on is an error that tells the range, and never an index."""
    some = ORDERS[name]()
    for part in (range(-1, 5), range(some.n - 1, some.n + 1), np.array([3, some.n]), np.array([-1])):
        with pytest.raises(IndexError, match=rf"\[0, {some.n}\)"):
            some.at(part)


@pytest.mark.parametrize("n", [-1, (1 << 48) + 1])
def test_an_order_has_at_most_2_to_the_48_samples(n: int) -> None:
    """A size that it can't take is refused, with the limits."""
    with pytest.raises(ValueError, match=rf"n is {n}; .* 2\*\*48"):
        Permutation(n, 0)


def test_memory_does_not_grow_with_n() -> None:
    """For 10**8 samples an order and a batch take under 1 MB; a million indices take their 8 MB and no 2 MB more."""
    tracemalloc.start()
    try:
        shuffled = epoch_order(10**8, 1, 2)
        shuffled.take(5 * 10**7, 5 * 10**7 + 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        shuffled.take(0, 10**6)
        assert tracemalloc.get_traced_memory()[1] < 10**7
        windowed = epoch_order(10**8, 1, 2, window=5000)
        windowed.take(5 * 10**7, 5 * 10**7 + 4096)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


# ---- Permutation: statistics


def unrelated(a: np.ndarray, b: np.ndarray, bins: int) -> bool:
    """Whether values a and b in [0, bins), each of them spread evenly, fall evenly into bins x bins."""
    statistic, freedom = chi_square(a * bins + b, bins * bins), (bins - 1) ** 2
    return abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


SIZES = [1000, 1 << 16, (1 << 16) + 1, 100_000, 1 << 17, (1 << 17) + 1, 10**6]


@pytest.fixture(scope="module", params=["as it is", "in 64 bits"])
def shuffles(request: pytest.FixtureRequest) -> dict[int, np.ndarray]:
    """The whole order for each size; once more with the arithmetic of sizes that can't be counted out."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in 64 bits":
            patch.setattr(order, "_WORD32", order._WORD64)
        return {n: Permutation(n, 7 * n).take(0, n) for n in SIZES}


@pytest.mark.parametrize(("n", "bins"), [(n, bins) for n in SIZES for bins in (2, 4, 16, 64) if n >= 20 * bins**2])
def test_positions_say_nothing_about_indices(shuffles: dict[int, np.ndarray], n: int, bins: int) -> None:
    """Upper and lower digits of position and index are independent, each of the four pairs."""
    indices, positions = shuffles[n], np.arange(n)
    digits = [lambda x: x * bins // n, lambda x: x % bins]
    for a, b in itertools.product(digits, digits):
        assert unrelated(a(positions), b(indices), bins)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("distance", [1, 2, 3, 256, 512, 1024, 2048])
def test_neighbours_say_nothing_about_each_other(shuffles: dict[int, np.ndarray], n: int, distance: int) -> None:
    """Indices at some distance are independent in both digits, their differences even, and they don't correlate."""
    one = shuffles[n]
    other = np.roll(one, -distance)
    bins = 64 if n > 50_000 else 4
    assert unrelated(one * bins // n, other * bins // n, bins)
    assert unrelated(one % bins, other % bins, bins)
    differences = (other - one) % n
    assert plausible(chi_square(differences * 128 // n, 128), 128) or n < 50_000
    assert plausible(chi_square(differences % 128, 128), 128) or n < 50_000
    assert abs(np.corrcoef(one, other)[0, 1]) < 6 / n**0.5


@pytest.mark.parametrize("n", [10**9, 10**12, 1 << 48])
def test_a_part_of_a_huge_order_is_random(n: int) -> None:
    """100 000 neighbouring indices are even in upper and lower digits, and so are their differences."""
    indices = Permutation(n, 3).take(n // 3, n // 3 + 100_000)
    for values in (indices, np.diff(indices) % n):
        assert plausible(chi_square((values / n * 256).astype(np.int64), 256), 256)
        assert plausible(chi_square(values % 256, 256), 256)
    digits = (indices / n * 16).astype(np.int64)
    assert plausible(chi_square(digits[:-1] * 16 + digits[1:], 256), 256)


def test_the_network_has_enough_rounds() -> None:
    """Positions with one upper half get lower halves whose changes meet as rarely as chance has it.

    What tells few Feistel rounds from a random permutation (Patarin, "Generic attacks on Feistel schemes", 2001): over
    48 keys, four rounds are 4900 standard deviations off, six 38, eight and ten less than one.
    """
    n, low_bits = 66_000, 9
    rows, columns = n >> low_bits, 1 << low_bits
    meetings = 0
    for key in range(48):
        low = Permutation(n, key).take(0, rows * columns).reshape(rows, columns) % columns
        changes = (low ^ np.arange(columns)) + columns * np.arange(rows)[:, None]
        counts = np.bincount(changes.ravel(), minlength=rows * columns)
        meetings += int((counts * (counts - 1) // 2).sum())
    expected = 48 * rows * (columns - 1) / 2
    assert abs(meetings - expected) < 6 * expected**0.5


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_equally_likely(n: int) -> None:
    """Over keys in a row each of the n! orders comes as often as any other."""
    orders = {each: number for number, each in enumerate(itertools.permutations(range(n)))}
    seen = [orders[tuple(Permutation(n, key).take(0, n).tolist())] for key in range(12_000)]
    assert plausible(chi_square(np.array(seen), len(orders)), len(orders))


@pytest.mark.parametrize(("n", "keys"), [(50, 3000), (66_000, 150)])
def test_fixed_points_are_as_many_as_in_true_permutations(n: int, keys: int) -> None:
    """Their number is Poisson distributed with mean 1: none in 37% of orders, one in 37%, and so on."""
    fixed = [int((Permutation(n, key).take(0, n) == np.arange(n)).sum()) for key in range(keys)]
    seen = np.bincount(np.minimum(fixed, 4), minlength=5)
    chances = np.array([math.exp(-1) / math.factorial(count) for count in range(4)])
    expected = keys * np.append(chances, 1 - chances.sum())
    assert ((seen - expected) ** 2 / expected).sum() < 25


PAIRS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "epochs": ((3, 0), (3, 1)),
    "later epochs": ((3, 90), (3, 91)),
    "seeds": ((3, 0), (4, 0)),
    "seed against epoch": ((3, 4), (4, 3)),
    "sum of both": ((3, 1), (2, 2)),
    "passes": ((3, 0, 1), (3, 0, 2)),
    "pass against epoch": ((3, 0, 1), (3, 1, 0)),
}


@pytest.mark.parametrize("n", [20_000, 100_000])
@pytest.mark.parametrize("what", PAIRS)
def test_epochs_and_seeds_have_nothing_to_do_with_each_other(what: str, n: int) -> None:
    """Where a sample lies in one epoch says nothing about the next, nor about the same epoch with another seed."""
    one, other = (epoch_order(n, *place).take(0, n) for place in PAIRS[what])
    assert unrelated(one * 32 // n, other * 32 // n, 32)
    assert unrelated(one % 32, other % 32, 32)
    assert (one == other).sum() < 9
    assert abs(np.corrcoef(one, other)[0, 1]) < 6 / n**0.5


def test_the_first_sample_is_any_over_epochs_and_seeds() -> None:
    """Position 0 gets each of 100 samples equally often over 10 000 epochs, and over 10 000 seeds."""
    for runs in (((0, epoch) for epoch in range(10_000)), ((seed, 0) for seed in range(10_000))):
        first = [int(epoch_order(100, seed, epoch).take(0, 1)[0]) for seed, epoch in runs]
        assert plausible(chi_square(np.array(first), 100), 100)


# ---- Windowed


@given(st.integers(0, 300), st.integers(1, 320), words)
@example(10, 10, 0)
@example(11, 10, 0)
@example(10, 1, 0)
def test_blocks_stay_together_and_are_complete(n: int, window: int, key: int) -> None:
    """The order is made of whole blocks, one after the other; the last, shorter one may be anywhere among them."""
    indices = Windowed(n, window, key).take(0, n).tolist()
    blocks = [list(run) for _, run in itertools.groupby(indices, lambda index: index // window)]
    assert len(blocks) == math.ceil(n / window)
    for block in blocks:
        first = min(block) // window * window
        assert sorted(block) == list(range(first, min(first + window, n)))


def test_all_orders_of_blocks_are_equally_likely() -> None:
    """Three whole blocks and a shorter one come in each of the 24 orders, over keys in a row."""
    orders = {each: number for number, each in enumerate(itertools.permutations(range(4)))}
    seen = []
    for key in range(5000):
        indices = Windowed(10, 3, key).take(0, 10) // 3
        seen.append(orders[tuple(dict.fromkeys(indices.tolist()))])
    assert plausible(chi_square(np.array(seen), 24), 24)


def test_blocks_are_shuffled_each_in_its_own_way() -> None:
    """Inside blocks, place and offset are independent; so are the offsets of neighbouring blocks and epochs."""
    one, other = (Windowed(256_000, 256, key).take(0, 256_000).reshape(1000, 256) % 256 for key in (1, 2))
    places = np.broadcast_to(np.arange(256), one.shape)
    for a, b in [(places, one), (one[1:], one[:-1]), (one, other), (one[:, 1:], one[:, :-1])]:
        assert unrelated(a.ravel() // 16, b.ravel() // 16, 16)
        assert unrelated(a.ravel() % 16, b.ravel() % 16, 16)


def test_windows_have_golden_values_too() -> None:
    """The order of blocks and the order inside, for ever."""
    assert Windowed(10, 4, 17).take(0, 10).tolist() == [9, 8, 1, 3, 2, 0, 6, 5, 7, 4]
    assert epoch_order(10**9, 3, 4, window=10**6).take(10**8, 10**8 + 3).tolist() == [29970454, 29845630, 29158353]


# ---- Weighted


def test_draws_come_in_proportion_to_their_weights() -> None:
    """Frequencies over many draws match uneven weights by chi-square, and weight zero is never drawn."""
    weights = np.array([0, 1, 2, 0, 0, 5, 0.5, 10, 0])
    counts = np.zeros(9)
    for key in range(20_000):
        counts += np.bincount(Weighted(np.cumsum(weights), key).take(0, 9), minlength=9)
    expected = counts.sum() * weights / weights.sum()
    assert (counts[weights == 0] == 0).all()
    drawn = weights > 0
    assert ((counts - expected)[drawn] ** 2 / expected[drawn]).sum() < 30


@pytest.mark.parametrize("bits", [0, MASK])
def test_weight_zero_is_out_of_reach_of_the_extreme_draws(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest draw find the only sample that has a weight, between those that have none."""
    monkeypatch.setattr(order, "_hashes", lambda key, numbers: np.full(len(numbers), bits, np.uint64))
    for weight in (1.0, 0.1, 3.0, 1e300):
        assert Weighted(np.cumsum([0, weight, 0]), 0).take(0, 3).tolist() == [1, 1, 1]


def test_draws_are_independent() -> None:
    """With equal weights the draws are even, neighbours unrelated, and repeats as many as chance has it."""
    n = 100_000
    indices = epoch_order(n, 1, 2, cumulative=np.cumsum(np.ones(n))).take(0, n)
    digits = indices * 32 // n
    assert plausible(chi_square(digits, 32), 32)
    assert plausible(chi_square(digits[:-1] * 32 + digits[1:], 1024), 1024)
    assert len(np.unique(indices)) / n == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_draws_have_golden_values_too() -> None:
    """Position p of an epoch gets the same sample for ever."""
    assert Weighted(np.cumsum(np.arange(100.0)), 17).take(0, 5).tolist() == [71, 62, 57, 47, 13]


# ---- Repeated


@given(st.integers(1, 40), st.integers(1, 6), st.data())
def test_passes_lie_one_after_the_other(n: int, passes: int, data: st.DataObject) -> None:
    """Any part of the whole, in any order, is what each pass has there."""
    orders = [epoch_order(n, 3, 4, number) for number in range(passes)]
    whole = np.concatenate([order.take(0, n) for order in orders])
    repeated = Repeated(n, passes, orders.__getitem__)
    positions = data.draw(st.lists(st.integers(0, n * passes - 1)))
    assert repeated.at(np.array(positions, np.int64)).tolist() == whole[positions].tolist()
    assert repeated.take(0, n * passes).tolist() == whole.tolist()
    with pytest.raises(IndexError, match=f"the order has .0, {n * passes}"):
        repeated.take(0, n * passes + 1)


def test_the_last_of_all_positions_is_within_reach() -> None:
    """In the last pass of an order that stands for an endless one."""
    for n in (1, 10, 1000, 10**12):
        passes = ENDLESS // n
        order = Repeated(n, passes, functools.partial(epoch_order, n, 1, 2))
        first, some = (passes - 1) * n, min(n, 100)
        assert order.take(first, first + some).tolist() == epoch_order(n, 1, 2, passes - 1).take(0, some).tolist()


def test_passes_have_golden_values_too() -> None:
    """The first is the epoch's own order; the others are the same for ever."""
    first, second, third = (epoch_order(10, 1, 0, number).take(0, 10).tolist() for number in range(3))
    assert first == epoch_order(10, 1, 0).take(0, 10).tolist() == [8, 5, 3, 9, 6, 4, 1, 0, 7, 2]
    assert second == [9, 4, 0, 5, 8, 3, 6, 1, 2, 7]
    assert third == [9, 8, 3, 5, 0, 6, 7, 1, 4, 2]
    windowed = epoch_order(10**9, 3, 4, 5, window=10**6)
    assert windowed.take(10**8, 10**8 + 3).tolist() == [537860231, 537251811, 537215280]
