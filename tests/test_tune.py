"""How many workers: the arithmetic on tables, the endless sampler, and a real measurement."""

from __future__ import annotations

import itertools
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastload
from fastload.doctor import usable_cores
from fastload.transforms import Resize
from fastload.tune import EndlessSampler, Rate, default_workers, measure, recommend


def table(*rates: float) -> list[Rate]:
    """A table with 1, 2, 4, ... workers of these rates."""
    return [Rate(2**i, rate, 100.0) for i, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("rates", "pace", "chosen"),
    [
        ((100,), None, 1),
        ((100, 190, 360), None, 4),
        ((100, 342, 360), None, 2),  # 95% of the best
        ((100, 341, 360), None, 4),  # not quite
        ((360, 300, 200), None, 1),
        ((0, 0), None, 1),
        ((100, 190, 360), 80, 1),  # a quarter more than the pace, exactly
        ((100, 190, 360), 81, 2),
        ((100, 190, 360), 152, 2),
        ((100, 190, 360), 200, 4),
        ((100, 190, 360), 1000, 4),  # never enough: the fastest
        ((100, 300, 200), 1000, 2),
        ((100, 50, 130), 104, 4),
    ],
)
def test_recommend_takes_the_fewest_that_are_enough(rates: tuple[float, ...], pace: float | None, chosen: int) -> None:
    """The fewest workers that give the pace and a quarter, or 95% of the best rate, or the fastest of all."""
    assert recommend(table(*rates), pace) == chosen
    assert recommend(table(*rates)[::-1], pace) == chosen


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.none() | st.floats(0, 1e6))
@settings(deadline=None)
def test_recommend_never_takes_more_than_it_needs(rates: list[float], pace: float | None) -> None:
    """Every smaller number in the table gives less than is wanted; the chosen one gives it unless none does."""
    rows = table(*rates)
    chosen = recommend(rows, pace)
    by_workers = {row.workers: row.samples_per_second for row in rows}
    wanted = 0.95 * max(rates) if pace is None else 1.25 * pace
    if max(rates) >= wanted:
        assert by_workers[chosen] >= wanted
        assert all(rate < wanted for workers, rate in by_workers.items() if workers < chosen)
    else:
        assert by_workers[chosen] == max(rates)


@given(st.integers(1, 60), st.integers(1, 100), st.integers(0, 2**40))
@settings(deadline=None)
def test_the_endless_sampler_covers_every_index_equally(count: int, batch_size: int, seed: int) -> None:
    """Strung together, its batches are one permutation of all indices after the other, and none is ever smaller."""
    epochs = 4
    batches = list(itertools.islice(EndlessSampler(count, batch_size, seed), math.ceil(epochs * count / batch_size)))
    assert {len(batch) for batch in batches} == {batch_size}
    stream = list(itertools.chain.from_iterable(batches))
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_endless_sampler_shuffles_anew() -> None:
    """Epochs differ from each other and between seeds; the same seed gives the same batches, as often as one asks."""

    def first(seed: int) -> list[list[int]]:
        return list(itertools.islice(EndlessSampler(100, 100, seed), 3))

    assert first(1) == first(1)
    assert first(1) != first(2)
    one, two, three = first(0)
    assert one != two != three != one
    assert one != sorted(one)
    sampler = EndlessSampler(10, 3)
    assert [next(iter(sampler)) for _ in range(2)] == [next(iter(sampler))] * 2


def test_measure_gives_a_row_for_each_number_of_workers(store_path: Path) -> None:
    """Real rates of a real loader, also for batches larger than the dataset, and no thread is left behind."""
    dataset = fastload.ImageDataset(store_path, Resize((16, 16)))
    rates = measure(dataset, 16, seconds=0.05, workers=[1, 3])
    assert [rate.workers for rate in rates] == [1, 3]
    assert all(rate.samples_per_second > 0 and rate.cpu_percent >= 0 for rate in rates)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastload-worker")]


def test_measure_tries_doublings_up_to_all_cores(raw_store_path: Path) -> None:
    """By default 1, 2, 4, ... and the number of cores itself."""
    tried = [rate.workers for rate in measure(fastload.ImageDataset(raw_store_path), 8, seconds=0.01)]
    cores = usable_cores()
    assert tried == sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def slow(picture: Any) -> Any:
    """A user's transform that takes so long that threads are of use for any number of cores."""
    time.sleep(0.05)
    return picture


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment: this process has the machine for itself."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("alone")
def test_default_workers_is_within_the_cores(store_path: Path, raw_store_path: Path) -> None:
    """At least one thread and at most one for each core, whatever a sample costs."""
    for path in (store_path, raw_store_path):
        dataset = fastload.ImageDataset(path)
        assert 1 <= default_workers(dataset) <= usable_cores()


@pytest.mark.usefixtures("alone")
def test_default_workers_follows_cost_and_pace(store_path: Path) -> None:
    """Samples that take long are worth every core, unless the consumer takes one in a while."""
    dataset = fastload.ImageDataset(store_path, slow)
    assert default_workers(dataset) == default_workers(dataset, pace=1e9) == usable_cores()
    assert default_workers(dataset, pace=0.001) == 1


@pytest.mark.parametrize(("ranks", "share"), [("1", 1), ("2", 2), ("1000", 1000), ("0", 1)])
def test_default_workers_shares_the_cores_among_ranks(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, share: int
) -> None:
    """torchrun says how many ranks there are on this node: each takes its share of the cores, at least one thread."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert default_workers(fastload.ImageDataset(store_path, slow)) == max(1, usable_cores() // share)


def test_default_workers_leaves_no_trace(store_path: Path) -> None:
    """Measuring neither moves the epoch nor changes what the dataset gives."""
    dataset = fastload.ImageDataset(store_path, fastload.transforms.RandomResizedCrop(16))
    before = dataset[3][0].clone()
    default_workers(dataset)
    assert dataset.epoch == 0
    assert dataset[3][0].equal(before)
