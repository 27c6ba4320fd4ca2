"""Batches: sequences of samples whose tensors are handed on, equal to what torch's own collate makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import fastload
from fastload.batch import Batch, collate
from fastload.transforms import Compose, Normalize, Resize


def batch_of(count: int = 5, labels: Any = None) -> Batch:
    """A batch of small channels-last pictures, each of other pixels, labelled 10, 11, ... unless told otherwise."""
    images = torch.arange(count * 3 * 4 * 5, dtype=torch.int64).remainder(251).to(torch.uint8).view(count, 4, 5, 3)
    return Batch(images.permute(0, 3, 1, 2), torch.arange(10, 10 + count) if labels is None else labels)


def same(one: Any, other: Any) -> bool:
    """Whether two collated batches are equal: types, dtypes, values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_a_batch_is_a_sequence_of_samples() -> None:
    """Length, indices from both ends, slices and iteration give (picture, int) pairs, views of the batch's memory."""
    batch = batch_of(5)
    assert len(batch) == 5
    for i in (0, 4, -1, -5):
        image, label = batch[i]
        assert image.data_ptr() == batch.images[i].data_ptr()
        assert label == batch.labels[i]
        assert type(label) is int
    assert [label for _, label in batch[1:4]] == [11, 12, 13]
    assert [label for _, label in batch[::-2]] == [14, 12, 10]
    samples = list(batch)
    assert [label for _, label in samples] == [10, 11, 12, 13, 14]
    assert all(type(label) is int for _, label in samples)
    assert all(image.equal(batch.images[i]) for i, (image, _) in enumerate(samples))


@pytest.mark.parametrize("index", [5, -6, 100])
def test_an_index_beyond_the_end_is_an_error(index: int) -> None:
    """As in a list, so that loops over indices end."""
    with pytest.raises(IndexError):
        batch_of(5)[index]


def test_several_labels_are_a_tensor_for_each_sample() -> None:
    """Samples with two labels have a row of them, by index and by iteration."""
    batch = batch_of(3, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert batch[1][1].tolist() == [3, 4]
    assert [label.tolist() for _, label in batch] == [[1, 2], [3, 4], [5, 6]]


def test_labels_of_any_type_are_left_alone() -> None:
    """What a target transform returned comes out as it is."""
    batch = batch_of(3, ["a", None, {"x": 1}])
    assert [label for _, label in batch] == ["a", None, {"x": 1}]
    assert batch[2][1] == {"x": 1}


def test_split_shares_the_memory() -> None:
    """Consecutive batches of the lengths that were asked for, none copied, none lost."""
    batch = batch_of(7)
    parts = batch.split([3, 1, 0, 3])
    assert [len(part) for part in parts] == [3, 1, 0, 3]
    assert [label for part in parts for _, label in part] == list(range(10, 17))
    assert parts[1].images.data_ptr() == batch.images[3].data_ptr()  # type: ignore[union-attr]
    assert parts[3].labels.data_ptr() == batch.labels[4].data_ptr()  # type: ignore[union-attr]


def test_split_of_lists() -> None:
    """Pictures that don't stack and labels that are no numbers are split likewise."""
    images = [torch.zeros(3, n, 2) for n in range(1, 5)]
    first, second = Batch(images, list("abcd")).split([1, 3])
    assert [label for _, label in first] == ["a"]
    assert [image.shape[1] for image, _ in second] == [2, 3, 4]


def test_collate_hands_the_tensors_on() -> None:
    """[images, labels], the very tensors of the batch."""
    batch = batch_of()
    collated = collate(batch)
    assert type(collated) is list
    assert collated[0] is batch.images
    assert collated[1] is batch.labels


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(3),
        torch.tensor([[1, 2], [3, 4], [5, 6]]),
        ["a", "b", "c"],
        [0.5, 1.5, 2.5],
        [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}, {"x": 3, "y": "c"}],
        [torch.ones(2), torch.zeros(2), torch.ones(2)],
        [np.float32(1), np.float32(2), np.float32(3)],
        [(1, 2), (3, 4), (5, 6)],
    ],
    ids=["int", "several", "str", "float", "dict", "tensor", "numpy", "tuple"],
)
def test_collate_gives_what_torch_gives(labels: Any) -> None:
    """The same as torch's default_collate on the list of samples, types and dtypes included."""
    batch = batch_of(3, labels)
    assert same(collate(batch), default_collate(list(batch)))


def test_collate_of_pictures_in_a_list() -> None:
    """Arrays and tensors of one shape are stacked as torch stacks them."""
    for images in ([torch.full((3, 2, 2), n) for n in range(4)], [np.full((2, 2, 3), n, np.uint8) for n in range(4)]):
        batch = Batch(images, torch.arange(4))
        assert same(collate(batch), default_collate(list(batch)))


def test_collate_of_other_samples_is_torch_s() -> None:
    """Samples of a foreign dataset never meet anything of ours."""
    samples = [({"a": torch.ones(2), "b": n}, "name") for n in range(3)]
    assert same(collate(samples), default_collate(samples))


def test_pictures_of_different_shapes_are_a_runtime_error() -> None:
    """The same type as torch raises, with the shapes and what to do about them."""
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 5), torch.zeros(3, 4, 5)]
    batch = Batch(images, torch.arange(3))
    with pytest.raises(RuntimeError):
        default_collate(list(batch))
    with pytest.raises(RuntimeError, match=r"\(3, 4, 5\) and \(3, 6, 5\).*RandomResizedCrop.*collate_fn"):
        collate(batch)


@pytest.mark.parametrize("image_type", ["tensor", "numpy"])
def test_batches_of_a_dataset_collate_as_in_torch(store_path: Path, image_type: Any) -> None:
    """Real batches, uint8 and normalised: our collate and torch's agree on every value."""
    normalise = [Normalize([0.5] * 3, [0.5] * 3)] if image_type == "tensor" else []
    for transform in (Resize((8, 9)), Compose([Resize((8, 9)), *normalise])):
        dataset = fastload.ImageDataset(store_path, transform, image_type=image_type)
        batch = dataset.__getitems__([3, 1, 4, 1, 5])
        assert same(collate(batch), default_collate([dataset[i] for i in (3, 1, 4, 1, 5)]))


def test_a_dataset_s_batch_of_different_sizes_is_a_list(store_path: Path) -> None:
    """Without a transform each picture keeps its own size, and the samples can be had one by one."""
    batch = fastload.ImageDataset(store_path).__getitems__([0, 1, 4])
    assert isinstance(batch.images, list)
    assert len({tuple(image.shape) for image, _ in batch}) == 3
    assert [label for _, label in batch] == [0, 0, 1]
