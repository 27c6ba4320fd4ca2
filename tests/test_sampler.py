"""ShuffleSampler: ranks that share an epoch, epochs that follow each other, states that another run goes on from."""

from __future__ import annotations

import itertools
import json
import operator
import pickle
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numbered import Numbers
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from fastload import ShuffleSampler
from fastload.order import epoch_order

sizes, worlds = st.integers(0, 120), st.integers(1, 11)

KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "windows": {"window": 7},
    "weights": {"weights": "ones"},
    "in order": {"shuffle": False},
}
kinds = st.sampled_from(list(KINDS))


def sampler_of(kind: str, n: int, **options: Any) -> ShuffleSampler:
    """A sampler of one of the KINDS; n draws by weight need a sample at least."""
    options = {**KINDS[kind], "seed": 5, **options}
    if options.get("weights") == "ones":
        options["weights"] = np.ones(n) if n else None
    return ShuffleSampler(n, **options)


class Labelled(Numbers):
    """Numbers with targets."""

    def __init__(self, targets: Any) -> None:
        super().__init__(len(targets))
        self.targets = targets


# ---- one process


def test_each_epoch_is_a_new_order_of_all_samples() -> None:
    """Without set_epoch: every iter() gives all indices once, as Python ints, in another order than before."""
    sampler = ShuffleSampler(100, seed=3)
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {type(index) for index in epochs[0]} == {int}
    assert epochs == [epoch_order(100, 3, epoch).take(0, 100).tolist() for epoch in range(3)]


def test_iter_takes_its_epoch_at_once() -> None:
    """Two iterators made one after the other are two epochs, whichever is read first."""
    sampler = ShuffleSampler(50)
    first, second = iter(sampler), iter(sampler)
    later = list(second)
    again = ShuffleSampler(50)
    assert [list(first), later] == [list(again), list(again)]


def test_set_epoch_chooses_the_next() -> None:
    """Any epoch can be had again, by `set_epoch` or in another process; the next one follows it."""
    sampler, other = ShuffleSampler(40, seed=1), ShuffleSampler(40, seed=1)
    epochs = [list(sampler) for _ in range(4)]
    other.set_epoch(2)
    assert [other.epoch, list(other), other.epoch, list(other)] == [2, epochs[2], 3, epochs[3]]
    other.set_epoch(0)
    assert list(other) == epochs[0]


def test_shuffle_false_is_the_order_in_which_samples_lie() -> None:
    """The same in every epoch."""
    sampler = ShuffleSampler(10, shuffle=False)
    assert [list(sampler), list(sampler)] == [list(range(10))] * 2


def test_long_epochs_are_drawn_in_blocks() -> None:
    """Longer than one block, the indices are still the order's."""
    sampler = ShuffleSampler(70_001, seed=2)
    assert list(sampler) == epoch_order(70_001, 2, 0).take(0, 70_001).tolist()


def test_a_dataset_does_for_its_length() -> None:
    """Whatever has a len."""
    assert list(ShuffleSampler(Numbers(30), seed=4)) == list(ShuffleSampler(30, seed=4))
    assert list(ShuffleSampler([7] * 30, seed=4)) == list(ShuffleSampler(30, seed=4))


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden values: what a seed and an epoch mean, for ever."""
    sampler = ShuffleSampler(10, seed=1)
    assert [list(sampler), list(sampler)] == [[8, 5, 3, 9, 6, 4, 1, 0, 7, 2], [1, 5, 4, 8, 2, 0, 6, 7, 9, 3]]
    assert ShuffleSampler(1_281_167, seed=42).share().take(0, 5).tolist() == [1113994, 815040, 883341, 393594, 53250]


def test_all_arguments_are_attributes() -> None:
    """As they were given; the class is a DistributedSampler, so that frameworks leave it alone."""
    sampler = ShuffleSampler(9, seed=2, rank=1, world=3, drop_last=True, window=4, pad=False)
    assert (sampler.n, sampler.seed, sampler.rank, sampler.world, sampler.drop_last) == (9, 2, 1, 3, True)
    assert (sampler.window, sampler.weights, sampler.shuffle, sampler.pad, sampler.epoch) == (4, None, True, False, 0)
    assert (sampler.repeat, ShuffleSampler(9, repeat=5).repeat, ShuffleSampler(9, repeat=None).repeat) == (1, 5, None)
    assert isinstance(sampler, DistributedSampler)
    assert sampler.num_replicas == 3
    assert ShuffleSampler(9).rank is None


# ---- ranks


@given(sizes, worlds, st.booleans())
@example(3, 8, False)
@example(3, 8, True)
@example(0, 2, False)
@example(1, 11, False)
def test_ranks_get_what_torch_gives_them(n: int, world: int, drop_last: bool) -> None:
    """Without shuffling, sample by sample, with padding, drop_last, and more ranks than samples."""
    for rank in range(world):
        ours = ShuffleSampler(n, rank=rank, world=world, drop_last=drop_last, shuffle=False)
        torchs = DistributedSampler(Numbers(n), world, rank, shuffle=False, drop_last=drop_last)
        assert len(ours) == len(torchs)
        assert list(ours) == list(torchs)


@given(kinds, sizes, worlds, st.booleans())
def test_ranks_deal_one_order_out(kind: str, n: int, world: int, drop_last: bool) -> None:
    """Shuffled too, rank r gets each world-th index of the order that one process gets, padded from its start."""
    order = list(sampler_of(kind, n))
    for rank in range(world):
        places = DistributedSampler(Numbers(n), world, rank, shuffle=False, drop_last=drop_last)
        ours = sampler_of(kind, n, rank=rank, world=world, drop_last=drop_last)
        assert list(ours) == [order[place] for place in places]


@given(kinds, sizes, worlds)
def test_without_padding_every_sample_comes_once(kind: str, n: int, world: int) -> None:
    """pad=False: the ranks' samples together are the epoch, and their numbers differ by one at most."""
    samplers = [sampler_of(kind, n, rank=rank, world=world, pad=False) for rank in range(world)]
    lengths = [len(sampler) for sampler in samplers]
    shares = [list(sampler) for sampler in samplers]
    assert lengths == [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert sum(map(Counter, shares), Counter()) == Counter(sampler_of(kind, n))


def test_ranks_are_asked_of_torch_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler made before init_process_group is one process, and its rank's share afterwards; given ranks stay."""
    sampler, fixed = ShuffleSampler(10), ShuffleSampler(10, rank=0, world=2)
    assert (len(sampler), sampler.num_replicas) == (10, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert (len(sampler), sampler.num_replicas, len(fixed)) == (3, 4, 5)
    assert sampler.share() == ShuffleSampler(10, rank=3, world=4).share()


# ---- shares


@given(kinds, st.integers(1, 120), worlds, st.booleans(), st.booleans(), st.integers(1, 3), st.data())
def test_a_share_gives_any_part(
    kind: str, n: int, world: int, drop_last: bool, pad: bool, repeat: int, data: st.DataObject
) -> None:
    """take is a slice of all; draws are the positions in the epoch, or the passes, where an index can repeat."""
    rank = data.draw(st.integers(0, world - 1))
    share = sampler_of(kind, n, rank=rank, world=world, drop_last=drop_last, pad=pad, repeat=repeat).share()
    stop = data.draw(st.integers(0, len(share)))
    start = data.draw(st.integers(0, stop))
    part = share.take(start, stop)
    assert part.dtype == np.int64
    assert part.tolist() == share.take(0, len(share))[start:stop].tolist()
    draws = share.draws(start, stop)
    positions = [(rank + world * number) % (n * repeat) for number in range(start, stop)]
    if kind == "weights":
        assert draws is not None
        assert draws.tolist() == positions
        assert share.order.at(draws).tolist() == part.tolist()
    elif repeat > 1:
        assert draws is not None
        assert draws.tolist() == [position // n for position in positions]
    else:
        assert draws is None


def test_a_share_refuses_what_it_does_not_have() -> None:
    """Numbers beyond its samples, padding included, are errors that tell how many there are."""
    share = ShuffleSampler(10, rank=0, world=3, weights=np.ones(10)).share()
    for start, stop in [(-1, 2), (0, 5), (3, 2), (5, 5)]:
        for read in (share.take, share.draws):
            with pytest.raises(IndexError, match="has 4"):
                read(start, stop)


def test_peek_is_what_share_gives_next() -> None:
    """peek moves nothing; shares are equal when they hold the same samples, and only then."""
    sampler = ShuffleSampler(100, seed=3)
    ahead = sampler.peek()
    assert sampler.epoch == 0
    assert sampler.share() == ahead
    assert sampler.epoch == 1
    assert sampler.peek() != ahead
    others = [
        ShuffleSampler(99, seed=3),
        ShuffleSampler(100, seed=4),
        ShuffleSampler(100, seed=3, window=10),
        ShuffleSampler(100, seed=3, shuffle=False),
        ShuffleSampler(100, seed=3, weights=np.ones(100)),
        ShuffleSampler(100, seed=3, weights=np.arange(100)),
        ShuffleSampler(100, seed=3, drop_last=True),
        ShuffleSampler(100, seed=3, pad=False),
        ShuffleSampler(100, seed=3, rank=0, world=2),
        ShuffleSampler(100, seed=3, rank=1, world=2),
        ShuffleSampler(100, seed=3, repeat=2),
        ShuffleSampler(100, seed=3, repeat=None),
    ]
    assert len({ahead, *(other.peek() for other in others)}) == 13


def test_a_share_can_be_read_by_many_threads() -> None:
    """Eight threads that read parts at once get what one thread gets."""
    for options in ({}, {"window": 3000}, {"repeat": None}):
        whole = ShuffleSampler(200_000, seed=1, **options).share().take(0, 200_000)
        share = ShuffleSampler(200_000, seed=1, **options).share()
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(share.take, range(0, 200_000, 500), range(500, 200_500, 500)))
        assert (np.concatenate(parts) == whole).all()


def test_samplers_and_shares_can_be_pickled() -> None:
    """For process workers and spawned ranks: the copy goes on where the original stood, and equals it."""
    for options in ({}, {"window": 7}, {"weights": np.arange(90_000)}, {"repeat": 3}, {"repeat": None}):
        sampler = ShuffleSampler(90_000, seed=1, rank=1, world=2, **options)
        list(itertools.islice(sampler, 5))
        copy = pickle.loads(pickle.dumps(sampler))
        assert copy.state_dict() == sampler.state_dict()
        share = sampler.share()
        assert copy.share() == share
        assert (pickle.loads(pickle.dumps(share)).take(0, 100) == share.take(0, 100)).all()


def test_a_hundred_million_samples_cost_nothing() -> None:
    """A sampler, a share and batches of 10**8 samples take less than 1 MB; so they do from one pass to the next."""
    tracemalloc.start()
    try:
        share = ShuffleSampler(10**8, rank=3, world=8, repeat=None).share()
        for number in (10**6, 10**8 // 8 - 256, 10**15):
            share.take(number, number + 512)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# ---- passes


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_can_be_several_passes(kind: str) -> None:
    """One after the other, each in an order of its own; the first is the epoch of a sampler that does not repeat."""
    sampler, plain = sampler_of(kind, 50, repeat=3), sampler_of(kind, 50)
    cumulative = np.arange(1.0, 51) if kind == "weights" else None
    assert len(sampler) == 150
    for epoch in range(2):
        indices = list(sampler)
        passes = [indices[start : start + 50] for start in range(0, 150, 50)]
        assert all(isinstance(index, int) for index in indices)
        assert passes[0] == list(plain)
        options = {"shuffle": kind != "in order", "window": sampler.window, "cumulative": cumulative}
        assert passes == [epoch_order(50, 5, epoch, number, **options).take(0, 50).tolist() for number in range(3)]  # type: ignore[arg-type]
        assert kind == "weights" or all(sorted(each) == list(range(50)) for each in passes)
        assert len({tuple(each) for each in passes}) == (1 if kind == "in order" else 3)
    assert sampler.epoch == 2


@given(kinds, st.integers(1, 40), st.integers(1, 5))
def test_what_comes_does_not_depend_on_when_it_ends(kind: str, n: int, repeat: int) -> None:
    """Fewer passes are the beginning of more, and of an epoch that never ends."""
    indices = list(sampler_of(kind, n, repeat=repeat))
    assert indices == list(sampler_of(kind, n, repeat=repeat + 1))[: n * repeat]
    assert indices == list(itertools.islice(sampler_of(kind, n, repeat=None), n * repeat))


@given(sizes, st.integers(1, 4), worlds, st.booleans(), st.booleans())
def test_ranks_deal_passes_out_as_one(n: int, repeat: int, world: int, drop_last: bool, pad: bool) -> None:
    """Over the borders of passes; only at the end of all is something padded or left out, as torch does."""
    order = list(sampler_of("whole", n, repeat=repeat))
    options = {"drop_last": drop_last, "pad": pad, "repeat": repeat}
    for rank in range(world):
        places = list(DistributedSampler(Numbers(n * repeat), world, rank, shuffle=False, drop_last=drop_last))
        if not (pad or drop_last):
            places = list(range(rank, n * repeat, world))
        sampler = sampler_of("whole", n, rank=rank, world=world, **options)
        assert len(sampler) == len(places)
        assert list(sampler) == [order[place] for place in places]


def test_an_endless_epoch_goes_on_and_has_no_length() -> None:
    """Every iter() begins another one; what asks for a len() is told why there is none, what can do without does."""
    sampler = ShuffleSampler(10, seed=1, repeat=None)
    iterator, other = iter(sampler), iter(sampler)
    first = list(itertools.islice(iterator, 10_000))
    assert all(sorted(first[start : start + 10]) == list(range(10)) for start in range(0, 10_000, 10))
    assert list(itertools.islice(other, 100)) != first[:100]
    for sized in (sampler, BatchSampler(sampler, 4, False), DataLoader(Numbers(10), 4, sampler=sampler)):
        with pytest.raises(TypeError, match=r"repeat=None an epoch has no end.* give `repeat` a number"):
            len(sized)  # type: ignore[arg-type]
        assert operator.length_hint(sized, 7) == 7
        assert repr(sized)


def test_an_endless_epoch_can_be_entered_anywhere() -> None:
    """Far from its start as at it, and on any number of ranks."""
    state = {**ShuffleSampler(10).state_dict(), "position": 10**17 + 3}
    order = list(epoch_order(10, 0, 0, 10**16).take(0, 10))
    for world in (1, 3):
        ranks = [ShuffleSampler(10, rank=rank, world=world, repeat=None) for rank in range(world)]
        for sampler in ranks:
            sampler.load_state_dict(state)
        rows = itertools.islice(zip(*ranks, strict=True), 3)
        assert list(itertools.chain.from_iterable(rows))[:7] == order[3:][: 3 * world]
        assert {sampler.state_dict()["position"] for sampler in ranks} == {10**17 + 3 + 3 * world}


def test_a_state_goes_on_with_another_repeat() -> None:
    """As far as there are so many positions; so a run can be made longer."""
    whole = list(ShuffleSampler(10, seed=3, repeat=4))
    sampler = ShuffleSampler(10, seed=3, repeat=2)
    share = sampler.share()
    for taken in (5, 20):
        longer = ShuffleSampler(10, seed=3, repeat=4)
        longer.load_state_dict(sampler.state_at(share, taken))
        assert list(longer) == whole[taken:]
    with pytest.raises(ValueError, match=r"position is 20; .* from 0 to 10"):
        ShuffleSampler(10, seed=3).load_state_dict(sampler.state_at(share, 20))


# ---- weights


def test_weights_set_how_often_a_sample_comes() -> None:
    """Frequencies over epochs follow the weights whatever their scale; zero never comes; an epoch is n draws."""
    for scale in (1.0, 5e-324, 5e307):
        sampler = ShuffleSampler(4, weights=[scale, 0, 3 * scale, 0], seed=1)
        drawn = Counter(itertools.chain.from_iterable(sampler for _ in range(500)))
        assert set(drawn) == {0, 2}
        assert drawn.total() == 2000
        assert drawn[0] == pytest.approx(500, abs=6 * (2000 * 3 / 16) ** 0.5)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_balanced_brings_each_class_equally_often(kind: Any) -> None:
    """900, 90 and 10 samples of three classes, and some without a label, which never come."""
    labels = [4] * 900 + [7] * 90 + [0] * 10 + [-1] * 50
    sampler = ShuffleSampler(Labelled(kind(labels)), weights="balanced", seed=2)
    drawn = Counter(labels[index] for _ in range(20) for index in sampler)
    assert set(drawn) == {0, 4, 7}
    statistic = sum((count - 7000) ** 2 / 7000 for count in drawn.values())
    assert statistic < 20


@pytest.mark.parametrize(
    ("n", "weights", "message"),
    [
        (3, [1, 2], r"shape \(2,\).* 3 samples"),
        (3, [[1, 2, 3]], r"shape \(1, 3\)"),
        (3, [1, -1, 1], "not negative"),
        (3, [1, float("nan"), 1], "finite"),
        (3, [1, float("inf"), 1], "finite"),
        (3, [0, 0, 0], "not all of them zero"),
        (0, [], "not all of them zero"),
        (3, "even", "'even'; give 'balanced'"),
        (3, "balanced", "int has no `targets`"),
        (Numbers(3), "balanced", "Numbers has no `targets`"),
        (Labelled(np.zeros((3, 2), int)), "balanced", r"int64 \(3, 2\)"),
        (Labelled([0.5, 1, 2]), "balanced", "float64"),
        (Labelled([-1, -1]), "balanced", "not all of them zero"),
    ],
)
def test_weights_that_make_no_sense_are_refused(n: Any, weights: Any, message: str) -> None:
    """At construction, with what was got and what is allowed."""
    with pytest.raises(ValueError, match=message):
        ShuffleSampler(n, weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n is -1"),
        ({"n": 2**48 + 1}, "from 0 to 281474976710656"),
        ({"n": 1.5}, "n is 1.5"),
        ({"n": None}, "n is None"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": None}, "seed is None"),
        ({"window": 0}, "window is 0"),
        ({"window": True}, "window is True"),
        ({"rank": 0}, "give both"),
        ({"world": 2}, "give both"),
        ({"rank": 2, "world": 2}, "rank is 2; .* from 0 to 1"),
        ({"rank": -1, "world": 2}, "rank is -1"),
        ({"rank": 0, "world": 0}, "world is 0"),
        ({"window": 3, "weights": [1] * 9}, "leave one of them out"),
        ({"window": 3, "shuffle": False}, "shuffle=False"),
        ({"weights": [1] * 9, "shuffle": False}, "shuffle=False"),
        ({"repeat": 0}, r"repeat is 0; .* None, or an int from 1 to 512409557603043100"),
        ({"repeat": -1}, "repeat is -1"),
        ({"repeat": True}, "repeat is True"),
        ({"repeat": 2.0}, "repeat is 2.0"),
        ({"repeat": "2"}, "repeat is '2'"),
        ({"repeat": 2**62}, "repeat is 4611686018427387904"),
        ({"repeat": None, "n": 0}, "n is 0; without a sample .* give repeat=1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    """At construction, not in the first epoch."""
    with pytest.raises(ValueError, match=message):
        ShuffleSampler(**{"n": 9, **options})


def test_set_epoch_takes_whole_numbers() -> None:
    """A negative or fractional epoch is refused."""
    for epoch in (-1, 0.5, None):
        with pytest.raises(ValueError, match="epoch is"):
            ShuffleSampler(3).set_epoch(epoch)  # type: ignore[arg-type]


# ---- states


def test_states_follow_the_latest_iterator() -> None:
    """Before, within, at the end of and after an epoch, and when another iterator is made."""

    def state() -> tuple[int, int]:
        return sampler.state_dict()["epoch"], sampler.state_dict()["position"]

    sampler = ShuffleSampler(10)
    assert state() == (0, 0)
    first = iter(sampler)
    assert state() == (0, 0)
    for number in range(1, 11):
        next(first)
        assert state() == (0, number)
    assert next(first, None) is None
    assert state() == (1, 0)
    old, new = iter(sampler), iter(sampler)
    next(new)
    next(old)
    next(old)
    assert state() == (2, 1)
    list(old)
    assert state() == (2, 1)
    sampler.set_epoch(7)
    assert state() == (7, 0)


def test_state_at_counts_what_the_loader_says() -> None:
    """state_at takes any number of a share's samples; all are the epoch's end, also where some are left over."""
    share = ShuffleSampler(10, rank=1, world=3).share()
    sampler = ShuffleSampler(10)
    assert [sampler.state_at(share, taken)["position"] for taken in range(5)] == [0, 3, 6, 9, 10]
    dropping = ShuffleSampler(10, rank=1, world=3, drop_last=True).share()
    assert [sampler.state_at(dropping, taken)["position"] for taken in range(4)] == [0, 3, 6, 10]
    sampler.load_state_dict(sampler.state_at(share, 4))
    assert (list(sampler), sampler.epoch) == ([], 1)
    assert len(list(sampler)) == 10


def test_a_loaded_state_is_kept_until_it_is_used() -> None:
    """It is what state_dict gives; set_epoch keeps it in its own epoch only; and one iterator alone goes on from it."""
    whole = list(ShuffleSampler(10, seed=3))
    sampler = ShuffleSampler(10, seed=3)
    state = {**sampler.state_dict(), "position": 6}
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert (len(sampler), len(sampler.peek())) == (10, 4)
    sampler.set_epoch(0)
    assert list(sampler) == whole[6:]
    sampler.set_epoch(0)
    assert list(sampler) == whole
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    sampler.set_epoch(0)
    assert list(sampler) == whole
    sampler.load_state_dict(state)
    assert (list(sampler), len(list(sampler))) == (whole[6:], 10)


def test_an_iterator_from_before_a_load_no_longer_counts() -> None:
    """Reading on from it does not move the state that was loaded."""
    sampler = ShuffleSampler(10)
    old = iter(sampler)
    state = {**sampler.state_dict(), "epoch": 4, "position": 3}
    sampler.load_state_dict(state)
    list(old)
    assert sampler.state_dict() == state


def test_a_run_of_eight_ranks_goes_on_with_six() -> None:
    """Eight ranks stop after five batches of 16 each; six ranks go on: all samples come once, none is left out."""
    n = 5000
    eight = [ShuffleSampler(n, seed=1, rank=rank, world=8) for rank in range(8)]
    seen = [index for sampler in eight for index in itertools.islice(sampler, 5 * 16)]
    states = [json.dumps(sampler.state_dict()) for sampler in eight]
    assert len(set(states)) == 1
    six = [ShuffleSampler(n, seed=1, rank=rank, world=6) for rank in range(6)]
    for sampler in six:
        sampler.load_state_dict(json.loads(states[0]))
    rest = list(itertools.chain.from_iterable(zip(*six, strict=True)))
    assert sorted(seen + rest[: n - len(seen)]) == list(range(n))
    assert len(rest) - (n - len(seen)) < 6
    assert {sampler.state_dict()["epoch"] for sampler in six} == {1}


runs = st.lists(st.tuples(worlds, st.integers(1, 9), st.integers(0, 6)), max_size=6)


@given(kinds, sizes, runs, st.sampled_from([{}, {"drop_last": True}, {"pad": False}]), st.integers(1, 3))
@example("whole", 10, [(3, 1, 2), (4, 1, 0)], {"pad": False}, 1)
@example("whole", 7, [(8, 1, 1)], {}, 1)
@example("whole", 7, [(2, 3, 1), (2, 4, 1), (3, 1, 1)], {}, 3)
def test_any_sequence_of_runs_is_one_epoch(
    kind: str, n: int, runs: list[tuple[int, int, int]], options: dict[str, Any], repeat: int
) -> None:
    """Runs of any number of ranks, batch size and length, each from the last one's state, are the epoch of one process.

    They come in its order; only the last run of all repeats samples (padding) or leaves some out (drop_last).
    """
    order = list(sampler_of(kind, n, repeat=repeat))
    state = sampler_of(kind, n).state_dict()
    seen: list[int] = []
    for world, batch, steps in [*runs, (2, 5, n * repeat)]:
        ranks = [sampler_of(kind, n, rank=rank, world=world, repeat=repeat, **options) for rank in range(world)]
        for sampler in ranks:
            sampler.load_state_dict(state)
        shares = [sampler.share() for sampler in ranks]
        taken = min(batch * steps, max(map(len, shares)))
        parts = [share.take(0, min(taken, len(share))).tolist() for share in shares]
        dealt = [index for row in itertools.zip_longest(*parts) for index in row if index is not None]
        left = len(order) - len(seen)
        assert dealt[:left] == order[len(seen) : len(seen) + len(dealt)]
        seen += dealt[:left]
        states = [sampler.state_at(share, taken) for sampler, share in zip(ranks, shares, strict=True)]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
        assert state["position"] in (len(seen), n * repeat)
        if state["position"] == n * repeat:
            break
    assert state["position"] == n * repeat
    assert len(order) - len(seen) < (world if "drop_last" in options else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 11}, "state's n is 11, this sampler's is 10"),
        ({"n": 10.0}, "n is 10.0"),
        ({"seed": 1}, "seed is 1, this sampler's is 0"),
        ({"seed": False}, "seed is False"),
        ({"window": 5}, "window is 5, this sampler's is None"),
        ({"shuffle": False}, "shuffle is False"),
        ({"shuffle": 1}, "shuffle is 1"),
        ({"weights": "0123456789abcdef"}, "weights is '0123456789abcdef', this sampler's is None"),
        ({"weights": np.ones(3)}, "weights is "),
        ({"version": 2}, "version is 2, this fastload reads 1"),
        ({"version": 2, "new": 1}, "version is 2"),
        ({"version": True}, "version is True"),
        ({"version": None}, "version is None"),
        ({"new": 1}, "state_dict"),
        ({1: 1}, "state_dict"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": "0"}, "epoch is '0'"),
        ({"epoch": True}, "epoch is True"),
        ({"position": -1}, "position is -1"),
        ({"position": 11}, "position is 11; .* from 0 to 10"),
        ({"position": 1.0}, "position is 1.0"),
        ({"position": None}, "position is None"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[Any, Any], message: str) -> None:
    """With both values, and the sampler stays as it was."""
    sampler = ShuffleSampler(10)
    next(iter(sampler))
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize("state", [None, 3, "state", [], [1], {}, {"version": 1}, {"epoch": 1, "position": 0}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    """Nothing, other types, and dicts without the right names."""
    with pytest.raises(ValueError, match=r"state_dict\(\) gave"):
        ShuffleSampler(10).load_state_dict(state)


def test_states_tell_weights_apart() -> None:
    """A state of other weights is refused, one of equal weights in another container is not."""
    state = ShuffleSampler(3, weights=[1, 2, 3]).state_dict()
    ShuffleSampler(3, weights=torch.tensor([1.0, 2.0, 3.0])).load_state_dict(state)
    for weights in ([1, 2, 4], None):
        with pytest.raises(ValueError, match="weights"):
            ShuffleSampler(3, weights=weights).load_state_dict(state)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_no_value_in_a_state_breaks_the_sampler(value: Any) -> None:
    """Any JSON value under any name is taken, if it is right, or refused with a ValueError; never another error."""
    sampler = ShuffleSampler(10)
    good = sampler.state_dict()
    for name in good:
        try:
            sampler.load_state_dict({**good, name: value})
        except ValueError:
            continue
        assert len(list(sampler)) == 10 - (value if name == "position" else 0)
        sampler.load_state_dict(good)


# ---- torch's own loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_it_works_in_torchs_loader(num_workers: int) -> None:
    """Two epochs, each with all samples in the sampler's order, over persistent workers too."""
    loader = DataLoader(
        Numbers(50),
        batch_size=8,
        sampler=ShuffleSampler(50, seed=3),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    assert len(loader) == 7
    epochs = [torch.cat(list(loader)).tolist() for _ in range(2)]
    sampler = ShuffleSampler(50, seed=3)
    assert epochs == [list(sampler), list(sampler)]


def test_it_works_in_torchs_batch_sampler() -> None:
    """Batches are runs of the order; the last one may be dropped."""
    order = list(ShuffleSampler(20, seed=3))
    batches = BatchSampler(ShuffleSampler(20, seed=3), 7, drop_last=True)
    assert len(batches) == 2
    assert list(batches) == [order[:7], order[7:14]]
