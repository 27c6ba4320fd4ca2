"""Randomness as a function: which sample comes when, and what it looks like, are computed and never stored.

What a sample looks like depends on (seed, epoch, index), never on who computes it. There is no generator whose state
has to travel between workers, ranks or resumed runs: a `SampleRandom` is made where it is needed, from three numbers,
and gives the same draws everywhere, for about 3 us per sample.

Which sample comes when is an `Order`: a function from a position in the epoch to an index, for (seed, epoch) alone.
An epoch of several passes over the data has an order for each of them, the first that of an epoch of one.
Any part of an epoch of 10**12 samples can be asked for, at 8 to 15 ns per index in blocks of 16 384 and 30 us for a
batch of 256. Nothing is kept but a few numbers; up to 65 536 samples a table of at most 128 KiB, at 5 us per batch.
The price is that the order is no draw from all n! orders, which no 64-bit seed could reach: it is one of 2**64 that
look like it to every test in tests/test_order.py.

All of it stays as it is for ever: the tests hold golden values, for an experiment that is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.unsignedinteger[Any]]

LARGEST = 1 << 48
"""The most samples that an order takes."""

ENDLESS = 1 << 62
"""The most positions in an epoch: an epoch without end is so long."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1 << 14
_TABLE = 1 << 16
_ROUNDS = 4  # each changes both halves: eight in the usual count, of which six can be told from chance


def mix64(value: int) -> int:
    """Scramble 64 bits so that each input bit flips each output bit with probability near 1/2.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class SampleRandom:
    """The random numbers of one sample in one epoch: SplitMix64 started at a hash of (seed, epoch, index)."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self._state = mix64(mix64(mix64(seed + _GOLDEN) + epoch) + index)

    def bits(self) -> int:
        """The next 64 random bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        return mix64(self._state)

    def random(self) -> float:
        """A float in [0, 1) with 53 random bits."""
        return (self.bits() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """A float between `low` and `high`."""
        return low + (high - low) * self.random()

    def integer(self, n: int) -> int:
        """An int in [0, n). The bias of the multiplication is below n / 2**64."""
        return self.bits() * n >> 64


class SampleRandoms:
    """`SampleRandom` for many samples at once."""

    def __init__(self, seed: int, epoch: int, keys: Words) -> None:
        self._states = mixed(keys + np.uint64(mix64(mix64(seed + _GOLDEN) + epoch)))

    def bits(self) -> Words:
        self._states = self._states + np.uint64(_GOLDEN)
        return mixed(self._states)

    def random(self) -> npt.NDArray[np.float64]:
        return np.asarray((self.bits() >> np.uint64(11)) * 2.0**-53, np.float64)

    def integer(self, n: int) -> Indices:
        """Ints in [0, n), for n up to 2**32: the upper half of a product of 128 bits."""
        bits, factor, half = self.bits(), np.uint64(n), np.uint64(32)
        low = (bits & np.uint64(0xFFFFFFFF)) * factor >> half
        return np.asarray((bits >> half) * factor + low >> half, np.int64)


def mixed(words: Words) -> Words:
    """`mix64` of each."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor)
    return np.asarray(words ^ words >> np.uint64(31), np.uint64)


class Drawn(int):
    """An index that may come several times in an epoch. draw: tells this time from the others."""

    draw: int

    @classmethod
    def all(cls, indices: Indices, draws: Indices | None) -> list[int]:
        """Indices with their draws, or as plain ints where they have none."""
        values: list[int] = indices.tolist()
        if draws is None:
            return values
        for place, draw in enumerate(draws.tolist()):
            values[place] = index = cls(values[place])
            index.draw = draw
        return values

    @classmethod
    def draws(cls, indices: Sequence[int]) -> list[int] | None:
        """The draws of indices; None where there are none."""
        if isinstance(indices, np.ndarray) or not any(type(index) is cls for index in indices):
            return None
        return [getattr(index, "draw", 0) for index in indices]


class Order:
    """A function from the positions [0, n) of an epoch to indices. This one is the identity: samples as they lie."""

    def __init__(self, n: int) -> None:
        if not 0 <= n <= LARGEST:
            raise ValueError(f"n is {n}; an order has from 0 to 2**48 samples")
        self.n = n

    def take(self, start: int, stop: int, step: int = 1) -> Indices:
        """The indices at positions start, start + step, ... below stop, as int64; see `at`."""
        return self.at(range(start, stop, step))

    def at(self, positions: range | Indices) -> Indices:
        """The indices at `positions`, int64 of the same length. Memory beyond the result is below 2 MB.

        Raises:
            IndexError: a position is outside [0, n).
        """
        indices = np.empty(len(positions), np.int64)
        for first in range(0, len(positions), _BLOCK):
            part = positions[first : first + _BLOCK]
            block = np.arange(part.start, part.stop, part.step) if isinstance(part, range) else part
            if block.min() < 0 or block.max() >= self.n:
                raise IndexError(f"positions from {block.min()} to {block.max()}; the order has [0, {self.n})")
            indices[first : first + _BLOCK] = self._at(block)
        return indices

    def _at(self, positions: Indices) -> npt.NDArray[Any]:
        return positions


def epoch_order(
    n: int,
    seed: int,
    epoch: int,
    number: int = 0,
    *,
    shuffle: bool = True,
    window: int | None = None,
    cumulative: npt.NDArray[np.float64] | None = None,
) -> Order:
    """The order of pass `number` in an epoch.

    Of all samples, in windows (see `Windowed`), or by weight (see `Weighted`); without `shuffle` as they lie.
    """
    if not shuffle:
        return Order(n)
    key = SampleRandom(seed, epoch, -1 - number).bits()  # no sample has that index: unrelated to the samples' own draws
    if cumulative is not None:
        return Weighted(cumulative, key)
    return Permutation(n, key) if window is None else Windowed(n, window, key)


class Permutation(Order):
    """A keyed bijection on [0, n): another shuffle of n samples for each 64-bit key.

    Up to 65 536 samples: [0, n) sorted by a hash. Above: a Feistel network of eight rounds over a range hardly larger
    than n, walked until it leads below n (Luby and Rackoff, "How to construct pseudorandom permutations from
    pseudorandom functions", 1988; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Raises:
        ValueError: n is negative or above 2**48.
    """

    def __init__(self, n: int, key: int) -> None:
        super().__init__(n)
        self._map: Callable[[Indices], npt.NDArray[Any]]
        self._map = _sorted_by_hash(n, key).take if n <= _TABLE else _Feistel(n, key)

    def _at(self, positions: Indices) -> npt.NDArray[Any]:
        return self._map(positions)


class Windowed(Order):
    """Shuffled by blocks: consecutive `window` indices stay together, for disks that like to read what lies together.

    [0, n) is cut into blocks, the last one maybe shorter. The blocks come in an order drawn for the key, and each is
    permuted inside with a key of its own.
    """

    def __init__(self, n: int, window: int, key: int) -> None:
        super().__init__(n)
        self._window, self._key = window, key
        self._last = max(0, -(-n // window) - 1)
        self._short = n - self._last * window
        self._slot = _subkey(key, 0) * (self._last + 1) >> 64
        self._blocks = Permutation(self._last, _subkey(key, 1))

    def _at(self, positions: Indices) -> npt.NDArray[Any]:
        missing = self._window - self._short
        behind = positions >= self._slot * self._window + self._short
        slots, offsets = np.divmod(positions + missing * behind, self._window)
        edges = [0, *(np.flatnonzero(np.diff(slots)) + 1), len(slots)]
        indices = np.empty_like(offsets)
        for start, stop in pairwise(edges):
            block = self._block(int(slots[start]))
            size = self._short if block == self._last else self._window
            inner = _permutation(size, _subkey(self._key, 2 + block))
            indices[start:stop] = block * self._window + inner.at(offsets[start:stop])
        return indices

    def _block(self, slot: int) -> int:
        """Which block comes in that slot: the last one has a slot of its own, the others are permuted around it."""
        if slot == self._slot:
            return self._last
        place = slot - (slot > self._slot)
        return int(self._blocks.take(place, place + 1)[0])


class Weighted(Order):
    """Draws with replacement: position p gets index i with probability proportional to weight i, for each p anew.

    cumulative: the sums of the first 1, 2, ... n weights, float64 (n,), the last of them positive and not subnormal.
    """

    def __init__(self, cumulative: npt.NDArray[np.float64], key: int) -> None:
        super().__init__(len(cumulative))
        self._cumulative, self._key = cumulative, key

    def _at(self, positions: Indices) -> npt.NDArray[Any]:
        uniform = (_hashes(self._key, positions) >> np.uint64(11)) * 2.0**-53
        found: Indices = np.searchsorted(self._cumulative, uniform * self._cumulative[-1], side="right")
        return found


class Repeated(Order):
    """Passes over n samples, one after the other: position p lies in pass p // n, at place p % n of its order.

    of: from the number of a pass to its order. n * passes is at most `ENDLESS`.
    """

    def __init__(self, n: int, passes: int, of: Callable[[int], Order]) -> None:
        super().__init__(n)
        self.n = n * passes
        self._size, self._of = n, of
        self._latest = -1, Order(0)  # of no pass yet

    def _at(self, positions: Indices) -> npt.NDArray[Any]:
        numbers, places = np.divmod(positions, self._size)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        indices = np.empty_like(places)
        for start, stop in pairwise(edges):
            indices[start:stop] = self._pass(int(numbers[start])).at(places[start:stop])
        return indices

    def _pass(self, number: int) -> Order:
        """The order of that pass; the latest one is kept, as a pair, for threads that read different passes."""
        latest, order = self._latest
        if latest != number:
            order = self._of(number)
            self._latest = number, order
        return order


def _subkey(key: int, number: int) -> int:
    """Keys that have nothing to do with each other, from one."""
    return mix64(mix64(key + _GOLDEN) + number)


def _hashes(key: int, numbers: Indices) -> Words:
    """SplitMix64's outputs with those numbers, started at `key`: uint64, all different."""
    return mixed((numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key & _MASK))


def _sorted_by_hash(n: int, key: int) -> npt.NDArray[np.uint16]:
    """[0, n) in the order of their hashes, which any sort finds, since no two are equal."""
    return np.argsort(_hashes(key, np.arange(n))).astype(np.uint16)


_permutation = lru_cache(maxsize=8)(Permutation)
"""Those of the blocks that were read last; 1 MiB at most."""


class _Word(NamedTuple):
    """A width to compute in, and two multipliers and a shift that mix well in it."""

    type: type[np.unsignedinteger[Any]]
    bits: int
    first: int
    shift: int
    second: int


_WORD32 = _Word(np.uint32, 32, 0x7FEB352D, 15, 0x846CA68B)  # C. Wellons, "Prospecting for hash functions", 2018
_WORD64 = _Word(np.uint64, 64, 0xBF58476D1CE4E5B9, 31, 0x94D049BB133111EB)  # SplitMix64's


class _Feistel:
    """A Feistel network on [0, high * 2**k) >= n, both halves about sqrt(n), and the walk back into [0, n).

    A number is low + 2**k * high. In turn each half is changed by a hash of the other: low by exclusive or, high by
    addition modulo its range. The rare result of n or more (below 3 / sqrt(n) of them) goes through again.
    In 32-bit words up to n = 2**30, where at least 17 bits of a hash are left to be scaled to the range of `high`, at
    most 2**14; in 64-bit words above.
    """

    def __init__(self, n: int, key: int) -> None:
        word = _WORD32 if n <= 1 << 30 else _WORD64
        self._type = word.type
        low_bits = (n - 1).bit_length() // 2 + 1
        high = -(-n >> low_bits)
        high_bits = high.bit_length()

        def constant(value: int) -> Words:
            return np.array(value, self._type)  # NumPy works faster with an array without axes than with a scalar

        self._n, self._high, self._mask = constant(n), constant(high), constant((1 << low_bits) - 1)
        self._first, self._shift, self._second = constant(word.first), constant(word.shift), constant(word.second)
        self._low_bits, self._low_rest = constant(low_bits), constant(word.bits - low_bits)
        self._high_bits, self._high_rest = constant(high_bits), constant(word.bits - high_bits)
        keys = [constant(_subkey(key, number) >> 64 - word.bits) for number in range(2 * _ROUNDS)]
        self._keys = [(keys[number], keys[number + 1]) for number in range(0, len(keys), 2)]

    def __call__(self, positions: Indices) -> Words:
        values = self._once(positions.astype(self._type))
        outside = np.flatnonzero(values >= self._n)
        while len(outside):
            values[outside] = again = self._once(values[outside])
            outside = outside[again >= self._n]
        return values

    def _once(self, values: Words) -> Words:
        low, high = values & self._mask, values >> self._low_bits
        for low_key, high_key in self._keys:
            change = self._hash(high, low_key)
            change >>= self._low_rest
            low ^= change
            change = self._hash(low, high_key)
            change >>= self._high_bits
            change *= self._high
            change >>= self._high_rest
            high += change
            np.minimum(high, high - self._high, out=high)
        high <<= self._low_bits
        high |= low
        return high

    def _hash(self, half: Words, key: Words) -> Words:
        """Words of which the upper bits depend on all bits of `half` and `key`."""
        words = half ^ key
        words *= self._first
        words ^= words >> self._shift
        words *= self._second
        return words
