"""Passes: which epoch comes, what is read ahead of it, and what has reached the user."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numbered import Epochs
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fastload import DataLoader, ShuffleSampler
from fastload.passes import Pass, Passes, Ticket, datasets_below

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def passes_of(data: Any, sampler: Any = None, size: int | None = 4) -> Passes:
    sampler = SequentialSampler(data) if sampler is None else sampler
    return Passes(data, sampler, None if size is None else BatchSampler(sampler, size, False))


def indices_of(drawn: Any) -> list[Any]:
    return [ticket.indices for ticket in drawn]


# --- reading ahead

AHEAD: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ShuffleSampler": lambda data: {"sampler": ShuffleSampler(data, seed=1)},
    "sequential": lambda data: {},
    "shuffle": lambda data: {"shuffle": True},
    "shuffle, generator": lambda data: {"shuffle": True, "generator": torch.Generator()},
    "RandomSampler": lambda data: {"sampler": RandomSampler(data, generator=torch.Generator())},
    "SubsetRandomSampler": lambda data: {"sampler": SubsetRandomSampler(range(len(data)))},
    "WeightedRandomSampler": lambda data: {"sampler": WeightedRandomSampler([1.0] * len(data), len(data), False)},
}


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.002)
    return holds()


@pytest.mark.parametrize("order", AHEAD)
@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_persistent_workers_read_ahead_of_the_epoch(order: str, worker_type: Any) -> None:
    """When the last batch has come, the next epoch's first four are read before it is begun, and are what comes."""
    data = Epochs(24)
    options = {"num_workers": 2, "persistent_workers": True, "worker_type": worker_type}
    loader = DataLoader(data, 3, **AHEAD[order](data), **options)
    assert sum(len(batch) for batch in loader) == 24
    assert wait_for(lambda: int(data.reads.sum()) == 24 + 12)
    ahead = torch.nonzero(data.reads == 2).flatten().tolist()
    iterator = iter(loader)
    assert sorted(int(i) for _ in range(4) for i in next(iterator)) == ahead
    for _ in iterator:
        pass
    assert wait_for(lambda: int(data.reads.sum()) == 24 + 24 + 12)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {}, {"num_workers": 2, "sampler": "distributed"}])
def test_others_do_not_read_ahead(options: dict[str, Any]) -> None:
    """Workers that are not persistent, none, and orders that nobody can foresee."""
    data = Epochs(12)
    if "sampler" in options:
        options = {**options, "sampler": DistributedSampler(data, 1, 0), "persistent_workers": True}
    for _ in DataLoader(data, 3, **options):
        pass
    assert not wait_for(lambda: int(data.reads.sum()) != 12, 0.05)


def test_what_was_read_ahead_in_vain_is_dropped() -> None:
    """An epoch that was chosen in the meantime, anywhere, is the one that comes, order and pictures alike."""

    class Told(Epochs):
        def __getitems__(self, indices: list[int]) -> list[int]:
            from fastload.workers import context

            return [1000 * (context.epoch or 0) + index for index in indices]

    for choose, pictures, order in (
        (lambda loader: loader.set_epoch(6), 6, 6),
        (lambda loader: loader.sampler.set_epoch(6), 6, 6),
        (lambda loader: loader.dataset.set_epoch(6), 6, 1),
        (lambda loader: None, 1, 1),
    ):
        data = Told(12)
        loader = DataLoader(
            data, 4, sampler=ShuffleSampler(data), num_workers=2, persistent_workers=True, worker_type="thread"
        )
        list(loader)
        choose(loader)
        expected = ShuffleSampler(12)
        expected.set_epoch(order)
        assert torch.cat(list(loader)).tolist() == [1000 * pictures + index for index in expected]


# --- epochs


def test_each_pass_is_the_next_epoch_of_all_datasets() -> None:
    """Those inside torch's Subset and ConcatDataset too; an epoch that was set is taken as it is, once."""
    one, other = Epochs(12), Epochs(12)
    data = ConcatDataset([Subset(one, [1, 2, 3]), other])
    assert [part for part in datasets_below(data) if isinstance(part, Epochs)] == [one, other]
    passes = passes_of(data)
    epochs = [iter(passes).epoch, iter(passes).epoch]
    passes.set_epoch(5)
    epochs += [iter(passes).epoch, iter(passes).epoch]
    other.set_epoch(9)
    epochs += [iter(passes).epoch]
    assert epochs == [0, 1, 5, 6, 9]
    assert one.epoch == other.epoch == 9


def test_the_samplers_epoch_leads_where_it_is_further_on() -> None:
    """A loop that sets its sampler's epoch alone gets that epoch's pictures too."""
    data = Epochs(12)
    sampler = ShuffleSampler(data)
    passes = passes_of(data, sampler)
    sampler.set_epoch(3)
    assert [iter(passes).epoch, iter(passes).epoch] == [3, 4]


def test_without_epochs_there_are_no_tickets() -> None:
    """Datasets that know none get bare indices."""
    assert list(passes_of(range(5))) == [[0, 1, 2, 3], [4]]
    assert list(passes_of(range(3), size=None)) == [0, 1, 2]
    tickets = list(passes_of(Epochs(5)))
    assert tickets == [Ticket([0, 1, 2, 3], 0, None), Ticket([4], 0, None)]


def test_tickets_tell_draws_apart() -> None:
    """Each draw by weight has its position in the epoch."""
    data = Epochs(6)
    tickets = list(passes_of(data, ShuffleSampler(data, weights=[1.0] * 6)))
    assert np.concatenate([ticket.draws for ticket in tickets]).tolist() == list(range(6))


def test_the_length_is_the_samplers() -> None:
    """Of batches, or of samples where there are none."""
    assert [len(passes_of(range(5))), len(passes_of(range(5), size=None))] == [2, 5]


# --- what has reached the user


def test_a_state_counts_what_was_taken_not_what_was_drawn() -> None:
    """In order, and with some that came early."""
    data = Epochs(12)
    begun = iter(passes_of(data, size=2))
    assert len(list(begun)) == 6
    assert begun.state_dict()["skip"] == 0
    begun.take(0)
    begun.take(None)
    assert (begun.state_dict()["skip"], "early" in begun.state_dict()) == (4, False)
    begun.take(4)
    begun.take(3)
    assert (begun.state_dict()["skip"], begun.state_dict()["early"]) == (4, [1, 2])
    begun.take(2)
    assert (begun.state_dict()["skip"], "early" in begun.state_dict()) == (10, False)


@pytest.mark.parametrize("eagerly", [False, True])
def test_what_came_early_is_passed_over_whenever_it_is_drawn(eagerly: bool) -> None:
    """By workers that draw ahead, and without workers, where each batch is drawn when the one before it is taken."""
    data = Epochs(12)
    begun = iter(passes_of(data, size=2))
    for number in (0, 2, 4):
        begun.take(number)
    passes = passes_of(data, size=2)
    state = passes.state_dict()
    passes.load_state_dict({**state, "order": begun.state_dict()})
    resumed = iter(passes)
    got = []
    if eagerly:
        got = [(ticket.indices, resumed.number) for ticket in resumed]
    else:
        for ticket in resumed:
            got.append((ticket.indices, resumed.number))
            resumed.take(resumed.number)
    assert got == [([2, 3], 0), ([6, 7], 2), ([10, 11], 4)]


def test_batches_that_are_thrown_away_count_from_the_beginning() -> None:
    """A resumed stream without a state says at any time how many batches lie behind the user."""
    run = iter(passes_of(range(5))).run

    class Counts:
        def __next__(self) -> Any:
            return next(run)

        def state_dict(self, taken: int) -> dict[str, Any]:
            return {"taken": taken}

    resumed = Pass(Counts(), None, {"discard": 2})
    said = [resumed.state_dict()["taken"]]
    for _ in range(2):
        resumed.take(None)
        resumed.discard -= 1
        said.append(resumed.state_dict()["taken"])
    resumed.take(None)
    assert [*said, resumed.state_dict()["taken"]] == [2, 2, 2, 3]


def test_a_state_is_the_users_own() -> None:
    """What was given or taken may be changed afterwards."""
    data = Epochs(12)
    passes = passes_of(data)
    begun = iter(passes)
    next(begun)
    begun.take(0)
    state = passes.state_dict()
    kept = copy.deepcopy(state)
    passes.load_state_dict(state)
    state["order"]["skip"] = 8
    passes.state_dict()["order"]["skip"] = 9
    assert passes.state_dict() == kept
    assert indices_of(iter(passes)) == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_copy_begins_a_pass_of_its_own() -> None:
    """Pickled in the middle of a pass: where a loader goes, its place does not."""
    passes = passes_of(Epochs(12))
    next(iter(passes))
    assert passes.ahead() is not None
    other = pickle.loads(pickle.dumps(passes))
    assert other.current is None
    assert indices_of(iter(other)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_chosen_epoch_is_asked_for_once() -> None:
    """`still` says no to a pass of another epoch, and takes the epoch at hand for the one that has begun."""
    data = Epochs(12)
    sampler = ShuffleSampler(data)
    passes = passes_of(data, sampler)
    begun = iter(passes)
    assert passes.still(begun)
    sampler.set_epoch(0)
    assert passes.still(begun)
    assert sampler.epoch == 1
    sampler.set_epoch(4)
    assert not passes.still(begun)
    assert [iter(passes).epoch, sampler.epoch] == [4, 5]


def test_samplers_that_move_on_by_themselves_are_no_new_choice() -> None:
    """A ShuffleSampler inside a BatchSampler, whose epoch is the next one as soon as it is drawn from."""
    data = Epochs(12)
    batches = BatchSampler(ShuffleSampler(data), 4, False)
    passes = Passes(data, None, batches)
    begun = iter(passes)
    next(begun)
    assert passes.still(begun)
    loader = DataLoader(data, batch_sampler=BatchSampler(ShuffleSampler(data), 4, False), num_workers=2)
    for _ in range(2):
        assert len([batch for _, batch in zip(range(9), loader, strict=False)]) == 3
