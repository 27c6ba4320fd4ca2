"""The image cache: what it keeps, what it drops, and that threads may share it."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
from conftest import Pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.cache import ImageCache, parse_bytes

Policy = Literal["lru", "pin"]


def image(nbytes: int, value: int = 0) -> Pixels:
    """A one-row picture of `nbytes` bytes, a multiple of three, all of them `value`."""
    return np.full((1, nbytes // 3, 3), value % 256, np.uint8)


def kept(cache: ImageCache, indices: range) -> list[int]:
    """Which of these samples a cache holds; asking changes their order of use."""
    return [index for index in indices if cache.get(index) is not None]


# --- policies


def test_lru_drops_what_was_used_longest_ago() -> None:
    """A get or a put is a use; beyond the budget the oldest use goes first."""
    cache = ImageCache(300, "lru")
    for index in range(3):
        cache.put(index, image(99))
    assert cache.get(0) is not None
    cache.put(3, image(99))
    assert kept(cache, range(4)) == [0, 2, 3]


def test_lru_is_the_default() -> None:
    """Without a policy the newest images are kept."""
    cache = ImageCache(200)
    for index in range(4):
        cache.put(index, image(99))
    assert cache.policy == "lru"
    assert kept(cache, range(4)) == [2, 3]


def test_lru_drops_as_many_as_a_large_image_needs() -> None:
    """One large image pushes out several small ones, and no more than it must."""
    cache = ImageCache(300)
    for index in range(5):
        cache.put(index, image(60))
    cache.put(9, image(150))
    assert kept(cache, range(10)) == [3, 4, 9]
    assert cache.nbytes == 270


def test_pin_keeps_what_came_first() -> None:
    """Nothing is ever dropped: what does not fit any more is not kept, smaller images still are."""
    cache = ImageCache(300, "pin")
    cache.put(0, image(150))
    cache.put(1, image(120))
    cache.put(2, image(60))
    cache.put(3, image(30))
    cache.put(4, image(3))
    assert kept(cache, range(5)) == [0, 1, 3]
    assert cache.nbytes == 300


@pytest.mark.parametrize(("policy", "hits"), [("lru", 0), ("pin", 30)])
def test_pin_hits_where_lru_does_not(policy: Policy, hits: int) -> None:
    """Passing over ten images ten times after a first pass: an LRU of three never hits, pinning three of ten does."""
    cache = ImageCache(3 * 99, policy)
    for epoch in range(11):
        for index in range(10):
            if cache.get(index) is None:
                cache.put(index, image(99, index))
        if epoch == 0:
            assert cache.hits == 0
    assert cache.hits == hits
    assert cache.hits + cache.misses == 110


@pytest.mark.parametrize("policy", ["lru", "pin"])
def test_an_image_larger_than_the_budget_is_not_kept(policy: Policy) -> None:
    """It would drop everything else and still not fit."""
    cache = ImageCache(300, policy)
    cache.put(0, image(99))
    cache.put(1, image(303))
    cache.put(2, image(201))
    assert kept(cache, range(3)) == [0, 2]


@pytest.mark.parametrize("policy", ["lru", "pin"])
def test_a_second_put_changes_nothing(policy: Policy) -> None:
    """Two threads that decoded the same sample keep the first image, counted once."""
    cache = ImageCache(300, policy)
    first = image(99, 1)
    cache.put(0, first)
    cache.put(0, image(99, 1))
    assert cache.get(0) is first
    assert (len(cache), cache.nbytes) == (1, 99)


@settings(deadline=None)
@given(
    policy=st.sampled_from(["lru", "pin"]),
    budget=st.integers(1, 400),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(1, 50).map(lambda n: 3 * n))),
)
def test_the_cache_behaves_like_its_description(
    policy: Policy, budget: int, steps: list[tuple[bool, int, int]]
) -> None:
    """Any sequence of gets and puts gives what a plain dictionary with the policy's rule gives, within the budget."""
    cache = ImageCache(budget, policy)
    model: OrderedDict[int, Pixels] = OrderedDict()
    hits = 0
    for is_put, index, nbytes in steps:
        if is_put:
            picture = image(nbytes, index)
            cache.put(index, picture)
            fits = nbytes <= budget - (sum(p.nbytes for p in model.values()) if policy == "pin" else 0)
            if index not in model and fits:
                model[index] = picture
                while sum(p.nbytes for p in model.values()) > budget:
                    model.popitem(last=False)
        else:
            assert cache.get(index) is model.get(index)
            if index in model:
                hits += 1
                model.move_to_end(index)
        assert len(cache) == len(model)
        assert cache.nbytes == sum(p.nbytes for p in model.values()) <= budget
    assert cache.hits == hits
    assert cache.misses == sum(not is_put for is_put, _, _ in steps) - hits


def test_what_is_kept_is_read_only() -> None:
    """A picture that others will get can't be written to, by whoever put it there or got it."""
    cache = ImageCache(300)
    mine = image(99)
    cache.put(0, mine)
    for array in (mine, cache.get(0)):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1


# --- sharing


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual, so that what is not locked shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_hasty_threads")
@pytest.mark.parametrize("policy", ["lru", "pin"])
def test_threads_may_hammer_one_cache(policy: Policy) -> None:
    """Four threads that get and put at random see right pictures, a kept budget and counts that add up."""
    cache = ImageCache(40 * 30, policy)
    wrong: list[str] = []
    gets = 30_000

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(gets):
            index = chance.randrange(60)
            found = cache.get(index)
            if found is None:
                cache.put(index, image(3 * chance.randrange(1, 20), index))
            elif not (found == index).all():
                wrong.append(f"sample {index} is {found[0, 0]}")
            if cache.nbytes > cache.budget + 60:  # one image may be on its way in
                wrong.append(f"{cache.nbytes} bytes")

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.hits + cache.misses == 4 * gets
    held = [cache.get(index) for index in range(60)]
    assert sum(found.nbytes for found in held if found is not None) == cache.nbytes <= cache.budget
    assert sum(found is not None for found in held) == len(cache) > 0


@pytest.mark.parametrize("duplicate", [copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_pickled_cache_is_empty(duplicate: object) -> None:
    """Another process gets a cache of the same budget and policy, and fills its own."""
    cache = ImageCache("1kB", "pin")
    cache.put(0, image(99))
    cache.get(0)
    other = duplicate(cache)  # type: ignore[operator]
    assert (other.budget, other.policy) == (1000, "pin")
    assert (len(other), other.nbytes, other.hits, other.misses) == (0, 0, 0, 0)
    other.put(1, image(99))
    assert kept(other, range(2)) == [1]
    assert len(cache) == 1


# --- budgets


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (12345, 12345),
        ("500", 500),
        ("500B", 500),
        ("4GB", 4_000_000_000),
        ("4 GB", 4_000_000_000),
        (" 4gb ", 4_000_000_000),
        ("4G", 4_000_000_000),
        ("1.5kB", 1500),
        ("512MB", 512_000_000),
        ("512MiB", 512 << 20),
        ("2KiB", 2 << 10),
        ("2GiB", 2 << 30),
        ("2Gi", 2 << 30),
        ("1TB", 10**12),
        ("0.5TiB", 1 << 39),
    ],
)
def test_budgets_are_read_as_written(text: int | str, size: int) -> None:
    """Numbers are bytes; B-units are powers of 1000, iB-units powers of 1024, in any case."""
    assert parse_bytes(text) == size
    assert ImageCache(text).budget == size


@pytest.mark.parametrize("text", ["", "GB", "4XB", "four", "4GB please", "-4GB", "1e9", "4,5GB", "1.GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Text that isn't a number of bytes is quoted, with examples."""
    with pytest.raises(ValueError, match="is not a number of bytes; write it like 500MB, 4GB or 2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, -1, "0", "0GB", "0.4"])
def test_an_empty_budget_is_refused(size: int | str) -> None:
    """A cache that can hold nothing is a mistake."""
    with pytest.raises(ValueError, match="holds nothing; give it a positive budget or leave it out"):
        ImageCache(size)


def test_an_unknown_policy_is_refused() -> None:
    """The policies are named."""
    with pytest.raises(ValueError, match="cache policy is 'mru'; it may be lru or pin"):
        ImageCache("1MB", "mru")  # type: ignore[arg-type]
