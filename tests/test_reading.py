"""Batches as jobs for threads: one at a time, or read together; an error stands in its own batch's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered import Numbers
from torch._utils import ExceptionWrapper
from torch.utils.data import default_collate

import fastload
from fastload import ImageDataset
from fastload.passes import Ticket
from fastload.reading import Fetch, Reader, WholeBatches, shortened
from fastload.transforms import RandomResizedCrop
from fastload.workers import context


@pytest.fixture(autouse=True)
def _clean_context() -> Any:
    """Jobs run in this thread here; a worker's thread has its context for itself."""
    yield
    context.epoch, context.draws, context.memory = None, None, "own"


def result_of(job: Any) -> list[Any]:
    for part in range(job.parts):
        job.run(part)
    return job.result()


def test_who_is_read_whole(store_path: Path) -> None:
    """An ImageDataset with batches; nothing else."""
    images = ImageDataset(store_path, RandomResizedCrop(16))
    for data, batched, kind in ((images, True, WholeBatches), (images, False, Fetch), (Numbers(), True, Fetch)):
        assert type(Reader(data, batched, fastload.collate).job([[1, 2]], None)) is kind


def test_parts_in_any_order_make_the_dataset_s_batch(store_path: Path) -> None:
    """Read by parts, last part first, a batch is what the dataset gives in one go, in the ticket's epoch."""
    images = ImageDataset(store_path, RandomResizedCrop(16))
    job = Reader(images, True, fastload.collate).job([Ticket(list(range(12)), 5, None)], None)
    assert job.parts == 2
    for part in (1, 0):
        job.run(part)
    (batch,) = job.result()
    images.set_epoch(5)
    expected = fastload.collate(images.__getitems__(list(range(12))))
    assert torch.equal(batch[0], expected[0])
    assert torch.equal(batch[1], expected[1])


def test_batches_that_are_read_together_come_out_apart(raw_store_path: Path) -> None:
    """In their order and sizes, with draws or without."""
    images = ImageDataset(raw_store_path)
    for draws in (None, np.arange(3)):
        group = [
            Ticket(np.array([3, 1, 2]), 0, draws),
            Ticket(np.array([39]), 0, draws if draws is None else draws[:1]),
        ]
        batches = result_of(Reader(images, True, fastload.collate).job(group, None))
        assert [labels.tolist() for _, labels in batches] == [[0, 0, 0], [3]]
        assert torch.equal(batches[0][0][1], images[1][0])


def test_an_error_of_one_batch_leaves_the_others(raw_store_path: Path) -> None:
    """Of three that are read together the one that can't be is an error, with its own indices."""
    images = ImageDataset(raw_store_path)
    group = [Ticket([0, 1], 0, None), Ticket([2, 40], 0, None), Ticket([4], 0, None)]
    first, bad, last = result_of(Reader(images, True, fastload.collate).job(group, None))
    assert [first[1].tolist(), last[1].tolist()] == [[0, 0], [0]]
    assert isinstance(bad, ExceptionWrapper)
    with pytest.raises(IndexError, match=r"for indices \[2, 40\](.|\n)*index 40"):
        bad.reraise()


def test_an_error_in_collate_stands_in_its_batchs_place(store_path: Path) -> None:
    """Also for batches that are read whole."""

    def collate(samples: Any) -> Any:
        raise TypeError("no")

    images = ImageDataset(store_path, RandomResizedCrop(16))
    for data in (images, Numbers()):
        (error,) = result_of(Reader(data, True, collate).job([[1, 2]], None))
        with pytest.raises(TypeError, match=r"for indices \[1, 2\](.|\n)*in collate"):
            error.reraise()


def test_a_sample_that_fails_is_named() -> None:
    """Its index, not only its batch's, and the line that raised."""
    for batched, index in ((True, [1, 13, 2]), (False, 13)):
        (error,) = result_of(Reader(Numbers(bad=13), batched, list if batched else int).job([index], None))
        with pytest.raises(OSError, match=r"for index 13\.(.|\n)*in __getitem__(.|\n)*a bad sample"):
            error.reraise()


def test_what_follows_collate_is_done() -> None:
    """Pinning, say; on the collated batch."""
    reader = Reader(Numbers(), True, default_collate, finish=lambda batch: ("finished", batch.tolist()))
    assert result_of(reader.job([[1, 2]], None)) == [("finished", [1, 2])]


def test_long_indices_are_shortened() -> None:
    """For messages; a ticket is named by its indices."""
    assert shortened(Ticket([1, 2], 3, None)) == "[1, 2]"
    assert len(shortened(list(range(1000)))) == 203
