"""Dividing samples into parts: nothing lost, no group torn apart, every class and every total as even as can be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload.splits import parse_shares, split

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


@st.composite
def shares(draw: st.DrawFn) -> dict[str, float]:
    """One to six parts, some of them maybe empty."""
    parts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
    return {f"part{number}": part / sum(parts) for number, part in enumerate(parts)}


labels = st.lists(st.integers(0, 12) | st.none(), max_size=120)
seeds = st.integers(0, 2**64)


def per_class(parts: dict[str, np.ndarray], values: list[int | None]) -> dict[str, Counter[int | None]]:
    return {name: Counter(values[index] for index in indices.tolist()) for name, indices in parts.items()}


# ---- shares


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train=0.8,val=0.1,test=0.1", THREE),
        (" train = .8 , val=0.10,test=.1", THREE),
        ("train=80,val=10,test=10", THREE),
        ("all=1", {"all": 1.0}),
        ("all=100", {"all": 1.0}),
        ("a-1=1.,B_2=0", {"a-1": 1.0, "B_2": 0.0}),
        ("a=0.333,b=0.333,c=0.333", dict.fromkeys("abc", 1 / 3)),
        ("a=33.3,b=33.3,c=33.3", dict.fromkeys("abc", 1 / 3)),
    ],
)
def test_shares_are_read(text: str, expected: dict[str, float]) -> None:
    """Parts of 1 or percent, rounded to three digits or exact, in their order."""
    assert parse_shares(text) == expected
    assert list(parse_shares(text)) == list(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a part and its share; write NAME=SHARE"),
        ("train", "'train' is not a part and its share"),
        ("train=1,", "'' is not a part"),
        ("train=,val=1", "'train=' is not a part"),
        ("a/b=1", "'a/b=1' is not a part"),
        ("..=1", "'..=1' is not a part"),
        ("ä=1", "'ä=1' is not a part"),
        ("a=-1,b=2", "'a=-1' is not a part"),
        ("a=nan", "'a=nan' is not a part"),
        ("a=1e0", "'a=1e0' is not a part"),
        ("a=٣", "'a=٣' is not a part"),
        ("a=1_0", "'a=1_0' is not a part"),
        ("a=" + "1" * 5000, "is not a part"),
        ("a=0.5,A=0.5", r"'A' is there twice .* whatever its case"),
        ("a=0.8,b=0.1", "sum to 0.9; they must sum to 1, or to 100 as percent"),
        ("a=80,b=10", "sum to 90;"),
        ("a=2,b=1", "sum to 3;"),
        ("a=0,b=0", "sum to 0;"),
    ],
)
def test_shares_that_make_no_sense_are_refused(text: str, message: str) -> None:
    """What was got, and how it is written."""
    with pytest.raises(ValueError, match=message):
        parse_shares(text)


# ---- what holds for all


@settings(max_examples=300, deadline=None)
@given(labels, shares(), seeds, st.booleans())
@example([], THREE, 0, True)
@example([3], THREE, 0, True)
def test_without_groups_every_class_and_every_total_is_right_to_one_sample(
    values: list[int | None], parts: dict[str, float], seed: int, stratify: bool
) -> None:
    """Each index in exactly one part, ascending; parts without a share are empty; all deviate by less than 1."""
    result = split(values, range(len(values)), parts, seed=seed, stratify=stratify)
    assert list(result) == list(parts)
    assert all(indices.dtype == np.int64 and (np.diff(indices) > 0).all() for indices in result.values())
    assert sorted(np.concatenate(list(result.values())).tolist()) == list(range(len(values)))
    for name, counts in per_class(result, values).items():
        assert abs(counts.total() - parts[name] * len(values)) < 1 + 1e-6
        if stratify:
            assert all(abs(counts[label] - parts[name] * n) < 1 + 1e-6 for label, n in Counter(values).items())
        if parts[name] == 0:
            assert not counts


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=120), shares(), seeds)
def test_groups_stay_together(samples: list[tuple[int, int]], parts: dict[str, float], seed: int) -> None:
    """Whatever their sizes, and if their labels differ: no group in two parts, none in a part without a share."""
    values, groups = [label for label, _ in samples], [group for _, group in samples]
    result = split(values, groups, parts, seed=seed)
    assert sorted(np.concatenate(list(result.values())).tolist()) == list(range(len(samples)))
    in_part = [{groups[index] for index in indices.tolist()} for indices in result.values()]
    assert sum(map(len, in_part)) == len(set(groups))
    assert all(not indices.size for name, indices in result.items() if parts[name] == 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99)), max_size=60), shares(), seeds)
def test_only_which_labels_are_equal_counts(samples: list[tuple[int, int]], parts: dict[str, float], seed: int) -> None:
    """Texts for numbers, another process, another NumPy: the same parts. Nothing is drawn from Python's hashes."""
    values, groups = [label for label, _ in samples], [group for _, group in samples]
    result = split(values, groups, parts, seed=seed)
    again = split([f"class {label}" for label in values], [(group, "x") for group in groups], parts, seed=seed)
    assert all(np.array_equal(result[name], again[name]) for name in parts)


def test_parts_are_what_they_always_were() -> None:
    """Golden values, for an experiment that is run again."""
    result = split([0, 1, 2, None] * 10, range(40), {"train": 0.8, "val": 0.1, "test": 0.1}, seed=7)
    assert {name: result[name].tolist() for name in ("val", "test")} == GOLDEN


GOLDEN = {"val": [16, 25, 27, 34], "test": [14, 17, 20, 23]}


# ---- what it looks like


def test_small_classes_are_spread_fairly() -> None:
    """Of 1,000 classes of one sample a tenth is in val; of classes of five each has four in train, one elsewhere."""
    sizes = {name: len(part) for name, part in split(range(1000), range(1000), THREE).items()}
    assert sizes == {"train": 800, "val": 100, "test": 100}
    values = [label for label in range(100) for _ in range(5)]
    counts = per_class(split(values, range(500), THREE), values)
    assert set(counts["train"].values()) == {4}
    assert (len(counts["val"]), len(counts["test"])) == (50, 50)


def test_pairs_are_spread_fairly() -> None:
    """1,000 classes of one pair each, and one class of 1,000 pairs."""
    for values in ([i // 2 for i in range(2000)], [0] * 2000):
        result = split(values, [i // 2 for i in range(2000)], THREE)
        assert {name: len(part) // 20 for name, part in result.items()} == {"train": 80, "val": 10, "test": 10}


def test_seeds_differ_and_neighbours_are_not_kept() -> None:
    """Another seed is another choice; the choice has nothing to do with the order of the samples."""
    first, second = (split([0] * 1000, range(1000), THREE, seed=seed)["val"] for seed in (0, 1))
    assert 0 < len(np.intersect1d(first, second)) < 30
    assert 350 < first.mean() < 650
    assert (np.diff(first) == 1).sum() < 25


def test_samples_without_labels_are_a_class() -> None:
    """They are divided like the others."""
    values = [None] * 50 + ["cat"] * 50
    counts = per_class(split(values, range(100), THREE), values)  # type: ignore[arg-type]
    assert counts["val"] == {None: 5, "cat": 5}


def test_without_strata_labels_do_not_matter() -> None:
    """Real numbers are no classes."""
    first = split([0.5] * 50, range(50), THREE, stratify=False)
    second = split(list(np.arange(50.0)), range(50), THREE, stratify=False)
    assert all(np.array_equal(first[name], second[name]) for name in THREE)


def test_arguments_that_make_no_sense_are_refused() -> None:
    """Unequal lengths; shares that are negative, not numbers, or don't sum to 1."""
    with pytest.raises(ValueError, match="there are 2 labels and 1 groups"):
        split([0, 1], [0], THREE)
    for wrong in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(ValueError, match=r"the shares are .* sum to 1"):
            split([0], [0], wrong)


def test_many_parts_of_small_classes() -> None:
    """Up to two dozen parts, classes of a few samples: the totals are right to one sample."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = rng.integers(1, 30, rng.integers(3, 25))
        wanted = {str(number): part / parts.sum() for number, part in enumerate(parts.tolist())}
        values = rng.integers(0, 30, 100).tolist()
        for name, counts in per_class(split(values, range(100), wanted), values).items():
            assert abs(counts.total() - wanted[name] * 100) < 1 + 1e-6
            assert all(abs(counts[v] - wanted[name] * n) < 1 + 1e-6 for v, n in Counter(values).items())
