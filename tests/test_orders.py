"""Orders: what a stock loader would give, draw for draw, whoever looks at torch's generators and whenever."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered import Numbers
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchLoader

from fastload import DataLoader, ImageDataset, ShuffleSampler
from fastload.orders import order_of
from fastload.transforms import Resize

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Lazy(Sampler[int]):
    """A sampler of a user that draws from torch's generator when the loader draws from it."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(14):
            yield int(torch.randint(23, ()))

    def __len__(self) -> int:
        return 14


class Moving(Sampler[int]):
    """A sampler of a user that counts its epochs by itself."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(range(self.epoch, 12))

    def __len__(self) -> int:
        return 12 - self.epoch


SAMPLERS: dict[str, Callable[[Any, torch.Generator], dict[str, Any]]] = {
    "shuffle": lambda data, own: {"shuffle": True},
    "shuffle, generator": lambda data, own: {"shuffle": True, "generator": own},
    "shuffle, drop_last": lambda data, own: {"shuffle": True, "generator": own, "drop_last": True},
    "RandomSampler": lambda data, own: {"sampler": RandomSampler(data, generator=own)},
    "replacement": lambda data, own: {"sampler": RandomSampler(data, replacement=True, num_samples=70, generator=own)},
    "more": lambda data, own: {"sampler": RandomSampler(data, num_samples=30, generator=own)},
    "fewer": lambda data, own: {"sampler": RandomSampler(data, num_samples=7)},
    "SubsetRandomSampler": lambda data, own: {"sampler": SubsetRandomSampler(range(3, 15), generator=own)},
    "WeightedRandomSampler": lambda data, own: {"sampler": WeightedRandomSampler([1.0] * len(data), 12)},
    "SequentialSampler": lambda data, own: {},
    "DistributedSampler": lambda data, own: {"sampler": DistributedSampler(data, 2, 1)},
    "a user's": lambda data, own: {"sampler": Lazy()},
    "a user's with epochs": lambda data, own: {"sampler": Moving()},
    "BatchSampler": lambda data, own: {"batch_sampler": BatchSampler(RandomSampler(data, generator=own), 4, False)},
    "BatchSampler of ShuffleSampler": lambda data, own: {"batch_sampler": BatchSampler(ShuffleSampler(data), 4, False)},
    "no batches": lambda data, own: {"batch_size": None, "shuffle": True, "generator": own},
}

CLOSE = ("shuffle", "shuffle, generator")
"""The usual ones: looked at more closely."""

Log = Callable[[Any], None]


def whole_epochs(loader: Any, own: torch.Generator, log: Log) -> None:
    for _ in range(3):
        log("begin")
        for batch in loader:
            log(batch)


def all_batches_but_not_the_end(loader: Any, own: torch.Generator, log: Log) -> None:
    for _ in range(3):
        for _, batch in zip(range(len(loader)), loader, strict=False):
            log(batch)


def seeds_between_epochs(loader: Any, own: torch.Generator, log: Log) -> None:
    for epoch in range(4):
        torch.manual_seed(epoch // 2)
        if epoch == 2:
            own.manual_seed(7)
        for batch in loader:
            log(batch)


def draws_between_and_within(loader: Any, own: torch.Generator, log: Log) -> None:
    for _ in range(3):
        log(torch.rand(2))
        for number, batch in enumerate(loader):
            log(batch)
            if number == 1:
                log(torch.rand(3))
                log(torch.rand(3, generator=own))


def breaks_in_the_middle(loader: Any, own: torch.Generator, log: Log) -> None:
    for taken in (1, 3, 0, 2, 5):
        iterator = iter(loader)
        log("begun")
        for _ in range(taken):
            log(next(iterator, "end"))
        if not loader.persistent_workers:
            del iterator


def epochs_by_the_sampler(loader: Any, own: torch.Generator, log: Log) -> None:
    for epoch in (0, 1, 1, 5):
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        for batch in loader:
            log(batch)


SCENARIOS = (
    whole_epochs,
    all_batches_but_not_the_end,
    seeds_between_epochs,
    draws_between_and_within,
    breaks_in_the_middle,
    epochs_by_the_sampler,
)


def record(kind: Any, scenario: Any, sampler: str, length: int, bad: int | None = None, **options: Any) -> list[Any]:
    """Each batch of a run, with the state of torch's generator and of the order's own when the user has it."""
    own, data, seen = torch.Generator().manual_seed(5), Numbers(length, bad), []

    def log(what: Any) -> None:
        seen.append(what.tolist() if isinstance(what, torch.Tensor) else what)
        seen.append((hash(torch.get_rng_state().numpy().tobytes()), hash(own.get_state().numpy().tobytes())))

    torch.manual_seed(11)
    given = SAMPLERS[sampler](data, own)
    loader = kind(data, **{"batch_size": 1 if "batch_sampler" in given else 4, **given, **options})
    scenario(loader, own, log)
    return seen


@functools.cache
def torchs(scenario: Any, sampler: str, length: int, workers: int, persistent: bool) -> Any:
    return record(TorchLoader, scenario, sampler, length, num_workers=workers, persistent_workers=persistent)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_generators_are_as_a_stock_loader_leaves_them(scenario: Any, sampler: str) -> None:
    """Without workers and with threads, persistent or not, at every point where the user can look; so are the batches.

    Three lengths: many batches, few enough for the next epoch to be drawn ahead as a whole, and a short last batch.
    """
    for length in (23, 8, 6) if sampler in CLOSE else (23,):
        for workers, persistent in ((0, False), (2, False), (2, True)):
            if workers and not persistent and sampler not in CLOSE:
                continue  # torch's processes take long to start
            ours = record(DataLoader, scenario, sampler, length, num_workers=workers, persistent_workers=persistent)
            assert ours == torchs(scenario, sampler, length, workers, persistent), (length, workers, persistent)


@pytest.mark.parametrize("sampler", ["shuffle", "shuffle, generator", "SequentialSampler", "DistributedSampler"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_process_workers_leave_generators_so_too(scenario: Any, sampler: str) -> None:
    """Persistent ones, which read ahead of the epoch."""
    for length in (23, 6):
        ours = record(
            DataLoader, scenario, sampler, length, num_workers=2, persistent_workers=True, worker_type="process"
        )
        assert ours == torchs(scenario, sampler, length, 2, True), length


def meets_errors(loader: Any, own: torch.Generator, log: Log) -> None:
    for _ in range(3):
        iterator = iter(loader)
        for _ in range(len(loader) + 1):
            try:
                log(next(iterator, "end"))
            except OSError:
                log("error")


@pytest.mark.parametrize("sampler", ["shuffle", "shuffle, generator", "SequentialSampler"])
def test_errors_change_no_order(sampler: str) -> None:
    """What follows a batch that fails, in its epoch and after it, is what a stock loader gives without the error."""
    for length in (23, 8):
        for workers, persistent in ((0, False), (2, True)):
            options = {"num_workers": workers, "persistent_workers": persistent}
            ours = record(DataLoader, meets_errors, sampler, length, 5, **options)
            stock = torchs(meets_errors, sampler, length, workers, persistent)
            assert ours == ["error" if isinstance(what, list) and 5 in what else what for what in stock]


def test_pictures_come_in_torchs_order_too(raw_store_path: Path) -> None:
    """Batches that are gathered several at a time, from arrays of indices, leave generators alike after each epoch."""
    expected: list[Any] = []
    for kind, options in ((TorchLoader, {}), (DataLoader, {"num_workers": 2}), (DataLoader, {})):
        for given in (True, False):
            own = torch.Generator().manual_seed(5)
            torch.manual_seed(1)
            loader = kind(ImageDataset(raw_store_path), 7, shuffle=True, generator=own if given else None, **options)
            seen = []
            for _ in range(3):
                seen += [labels.tolist() for _, labels in loader]
                seen += [own.get_state().tolist(), torch.get_rng_state().tolist()]
            expected.append(seen)
    assert expected[0] == expected[2] == expected[4]
    assert expected[1] == expected[3] == expected[5]


# --- orders by themselves


def batches_of(run: Any) -> list[Any]:
    got = []
    while True:
        try:
            indices, _ = next(run)
        except StopIteration:
            return got
        got.append(indices.tolist() if isinstance(indices, np.ndarray) else indices)


def test_indices_are_arrays_for_what_reads_whole_batches(raw_store_path: Path) -> None:
    """And lists of Python ints for everything else, one int where there are no batches, as torch has them."""
    images, numbers = ImageDataset(raw_store_path), Numbers(23)
    for options in ({}, {"shuffle": True}, {"sampler": ShuffleSampler(23)}, {"sampler": ShuffleSampler(23, window=5)}):
        for data, kind in ((images, np.ndarray), (numbers, list)):
            loader = TorchLoader(data, 4, **options)
            indices, draws = next(order_of(data, loader.sampler, loader.batch_sampler).begin())
            assert (type(indices), len(indices), draws) == (kind, 4, None)
            assert kind is not list or {type(index) for index in indices} == {int}
            alone = TorchLoader(data, None, **options)
            index, _ = next(order_of(data, alone.sampler, alone.batch_sampler).begin())
            assert type(index) is int
    own = ImageDataset(raw_store_path, Resize((8, 8)))
    loader = TorchLoader(own, batch_sampler=[[3, 4]])
    assert next(order_of(own, loader.sampler, loader.batch_sampler).begin())[0] == [3, 4]


@pytest.mark.parametrize("size", [1, 4, 5000])
def test_draws_are_the_positions_of_samples_drawn_by_weight(size: int) -> None:
    """They go with each batch, over the blocks in which a long order is made; other orders have none."""
    sampler = ShuffleSampler(9000, weights=[1.0] * 9000, seed=2)
    share = sampler.peek()
    order = order_of(Numbers(9000), sampler, BatchSampler(sampler, size, False))
    run, positions, indices = order.begin(), [], []
    for _ in range(-(-9000 // size)):
        batch, draws = next(run)
        assert draws is not None
        assert len(batch) == len(draws) <= size
        positions += draws.tolist()
        indices += batch
    assert positions == list(range(9000))
    assert indices == share.take(0, 9000).tolist()


def test_a_subclass_with_an_order_of_its_own_keeps_it() -> None:
    """A user's ShuffleSampler with another __iter__ is asked for it, as torch's loader would."""

    class Reversed(ShuffleSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(list(super().__iter__())[::-1])

    ours, stock = DataLoader(Numbers(9), 4, sampler=Reversed(9)), TorchLoader(Numbers(9), 4, sampler=Reversed(9))
    for _ in range(2):
        assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in stock]


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": SubsetRandomSampler(range(9))}, {}])
def test_a_guess_changes_nothing(options: dict[str, Any]) -> None:
    """It may be drawn to its end and dropped: generators are as before, and the next run is the same without it."""
    data = Numbers(9)
    for own in (None, torch.Generator()):
        if own is not None and "shuffle" in options:
            loader = TorchLoader(data, 4, generator=own, **options)
        else:
            loader = TorchLoader(data, 4, **options)
        order = order_of(data, loader.sampler, loader.batch_sampler)
        torch.manual_seed(3)
        before = [torch.get_rng_state(), own and own.get_state()]
        guess = order.guess()
        assert guess is not None
        guessed = batches_of(guess)
        after = [torch.get_rng_state(), own and own.get_state()]
        assert torch.equal(before[0], after[0])
        assert own is None or torch.equal(before[1], after[1])
        assert batches_of(order.begin()) == guessed
        assert not order.confirm(guess) or not options


def test_a_guess_holds_until_something_changes() -> None:
    """Confirmed, it is the run; after a draw, a seed or an epoch it is none."""
    data = Numbers(9)
    loader = TorchLoader(data, 4, shuffle=True)
    order = order_of(data, loader.sampler, loader.batch_sampler)
    torch.manual_seed(3)
    expected = [batch.tolist() for batch in loader]
    left = torch.get_rng_state()
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()  # the seed for workers
    guess = order.guess()
    assert order.confirm(guess)
    assert batches_of(guess) == expected
    assert torch.equal(torch.get_rng_state(), left)
    guess = order.guess()
    torch.rand(1)
    assert not order.confirm(guess)
    sampler = ShuffleSampler(9)
    order = order_of(data, sampler, BatchSampler(sampler, 4, False))
    guess = order.guess()
    sampler.set_epoch(1)
    assert not order.confirm(guess)
    assert order.confirm(order.guess())
    assert sampler.epoch == 2


def test_only_orders_that_are_settled_are_guessed() -> None:
    """What is drawn as it goes, by torch's samplers or a user's, is not known ahead."""
    data, own = Numbers(9), torch.Generator()
    for options, known in (
        ({"sampler": RandomSampler(data, replacement=True, generator=own)}, False),
        ({"sampler": RandomSampler(data, num_samples=20, generator=own)}, False),
        ({"sampler": RandomSampler(data, replacement=True)}, True),
        ({"sampler": RandomSampler(data, generator=own)}, True),
        ({"sampler": SequentialSampler(data)}, True),
        ({"sampler": WeightedRandomSampler([1.0] * 9, 9)}, True),
        ({"sampler": DistributedSampler(data, 1, 0)}, False),
        ({"sampler": Lazy()}, False),
        ({"batch_sampler": BatchSampler(RandomSampler(data), 4, False)}, False),
    ):
        loader = TorchLoader(data, **options)
        assert (order_of(data, loader.sampler, loader.batch_sampler).guess() is not None) == known


def test_what_was_consumed_is_skipped_without_a_loop() -> None:
    """The millionth batch of a long order is there at once."""
    import time

    data = Numbers(20_000_000)
    for sampler in (SequentialSampler(data), ShuffleSampler(data)):
        order = order_of(data, sampler, BatchSampler(sampler, 4, False))
        order.load(order.begin().state_dict(4_999_999))
        begun = time.perf_counter()
        assert len(batches_of(order.begin())) == 1
        assert time.perf_counter() - begun < 0.5
