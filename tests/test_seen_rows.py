"""Which rows were seen: one by one, and among processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import DataLoader, ImageDataset, Store
from fastload.seen_rows import SeenRows


def unseen(store: Store) -> list[int]:
    """The rows of a store's raw column that are still to be checked."""
    assert store._seen is not None
    return store._seen.places_of_new(np.arange(len(store))).tolist()


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    stretch=st.integers(1, 9),
    batches=st.lists(st.lists(st.integers(0, 39), max_size=12), max_size=30),
    data=st.data(),
)
def test_which_rows_were_seen(count: int, stretch: int, batches: list[list[int]], data: st.DataObject) -> None:
    """What is new is what was not added; once all were, that is found out, however they came."""
    seen, model = SeenRows(count), set[int]()
    seen._STRETCH = stretch  # type: ignore[misc]
    for number, batch in enumerate([*batches, list(range(count))]):
        rows = np.array([row for row in batch if row < count], np.int64)
        new = seen.places_of_new(rows)
        assert new.tolist() == [place for place, row in enumerate(rows.tolist()) if row not in model]
        sound = [row for row in rows[new].tolist() if number == len(batches) or data.draw(st.booleans())]
        seen.add(np.array(sound, np.int64))
        model.update(sound)
    for _ in range(-(-count // stretch)):
        assert len(seen.places_of_new(np.arange(count))) == 0
    assert seen._all_below == count == len(model)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_workers_have_seen_is_known(raw_store_path: Path, method: str) -> None:
    """To the process that they work for, and so to the workers of the next epoch."""
    dataset = ImageDataset(raw_store_path)
    assert len(unseen(dataset.store)) == len(dataset) > 8
    options: dict[str, Any] = {"worker_type": "process", "num_workers": 2, "multiprocessing_context": method}
    loader = DataLoader(dataset, 4, sampler=range(8), **options)
    assert len(list(loader)) == 2
    assert unseen(dataset.store) == list(range(8, len(dataset)))


def test_a_copy_has_seen_nothing(raw_store_path: Path) -> None:
    """It may be one in another place, where the file is another."""
    store = Store(raw_store_path)
    store.raw_image(0)
    assert 0 not in unseen(store)
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store), Store(raw_store_path)):
        assert 0 in unseen(other)
        other.raw_image(1)
        assert 1 not in unseen(other)
    assert 1 in unseen(store)


def test_only_rows_that_may_be_passed_over_are_noted(store_path: Path, raw_store_path: Path) -> None:
    """No memory is taken where there is no raw column, nor where all is checked each time, or nothing."""
    assert Store(store_path)._seen is None
    assert Store(raw_store_path, verify="always")._seen is None
    assert Store(raw_store_path, verify="never")._seen is None


def test_a_column_without_rows() -> None:
    """There is nothing to be seen."""
    assert len(SeenRows(0).places_of_new(np.empty(0, np.int64))) == 0
