"""What iterators have in common: tickets, states that go with batches, and views of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numbered import Epochs, Numbers
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, default_collate

from fastload import DataLoader
from fastload.iterators import CollateWithState, Stated, View, collated, open_ticket
from fastload.passes import Ticket
from fastload.workers import context


class Noted(Epochs):
    """Numbers that note the epoch in which they are read."""

    def __init__(self) -> None:
        super().__init__(10)
        self.seen: list[Any] = []

    def __getitem__(self, index: int) -> int:
        self.seen.append((context.epoch, None if context.draws is None else context.draws.tolist()))
        return index


def test_a_ticket_is_opened_in_the_thread_that_reads() -> None:
    """Its epoch and draws are the context's; a bare index is itself, and changes nothing."""
    before = context.epoch, context.draws
    try:
        draws = np.arange(3)
        assert open_ticket(Ticket([1, 2, 3], 7, draws)) == [1, 2, 3]
        assert (context.epoch, context.draws) == (7, draws)
        assert open_ticket([4]) == [4]
        assert context.epoch == 7
        open_ticket(Ticket([1], 8, None))
        assert (context.epoch, context.draws) == (8, None)
    finally:
        context.epoch, context.draws = before


def test_reading_in_the_callers_thread_leaves_its_context() -> None:
    """Without workers a batch is read in its epoch, and after it, or its error, the thread is as it was."""
    data = Noted()
    for _ in range(2):
        for _ in DataLoader(data, 5):
            assert (context.epoch, context.draws) == (None, None)
    assert data.seen == [(0, None)] * 10 + [(0, None)] * 10
    loader = DataLoader(data, 5)
    loader.set_epoch(3)
    data.seen.clear()
    list(loader)
    list(loader)
    assert [epoch for epoch, _ in data.seen] == [3] * 10 + [4] * 10
    with pytest.raises(OSError, match="a bad sample"):
        next(iter(DataLoader(Epochs(10, bad=0), 5)))
    assert context.epoch is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_profiler_still_sees_batches(workers: int) -> None:
    """torch's entry for it is left out only while nobody profiles."""
    loader = DataLoader(Numbers(10), 5, num_workers=workers)
    with torch.autograd.profiler.profile() as profile:
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    names = [event.name for event in profile.function_events if event.name.startswith("enumerate(DataLoader)")]
    assert len(names) == 3  # the end too


def test_a_stream_that_is_longer_than_it_said_is_warned_of() -> None:
    """torch's warning, at its moment."""

    class Liar(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

        def __len__(self) -> int:
            return 3

    for kind in (TorchLoader, DataLoader):
        loader = kind(Liar(), batch_size=None)
        assert len(loader) == 3
        with pytest.warns(UserWarning, match="was reported to be 3"):
            assert list(loader) == [0, 1, 2, 3]


def test_a_state_goes_with_each_batch_of_a_stream() -> None:
    """As it was then, and whether the batch is the last one that this copy gives."""

    class Stream(IterableDataset[int]):
        def __init__(self) -> None:
            self.seen = [1]

        def __iter__(self) -> Iterator[int]:
            return iter(())

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    stream = Stream()
    collate = CollateWithState(default_collate, stream, 2)
    first = collate([1, 2])
    stream.seen.append(2)
    second = collate([3])
    assert isinstance(first, Stated)
    assert (first.batch.tolist(), first.state, first.last) == ([1, 2], {"seen": [1]}, False)
    assert (second.batch.tolist(), second.state, second.last) == ([3], {"seen": [1, 2]}, True)
    assert not CollateWithState(lambda sample: sample, stream, None)(5).last


def test_a_users_collate_fn_is_called_as_it_is() -> None:
    """Only torch's and ours are kept from shared memory."""
    assert collated(lambda samples: [*samples, "end"], [1]) == [1, "end"]
    assert collated(default_collate, [1, 2]).tolist() == [1, 2]


def test_a_view_is_the_loader_but_for_what_differs() -> None:
    """Attributes of its own first, then the loader's; the loader is not changed."""
    loader = DataLoader(Numbers(10), 5)
    view = View(loader, batch_size=7)
    assert (view.batch_size, view.dataset, loader.batch_size) == (7, loader.dataset, 5)
    with pytest.raises(AttributeError):
        _ = view.nothing
