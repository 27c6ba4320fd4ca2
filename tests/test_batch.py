"""Batches: sequences of samples whose tensors are handed on, equal to what torch's own collate makes of them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
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


# ---- samples of different sizes


class Sizes(NamedTuple):
    """A sample with names."""

    image: torch.Tensor
    label: int


def of_size(height: int, width: int, dtype: torch.dtype = torch.uint8, last: bool = True) -> torch.Tensor:
    """A picture whose values tell their place; channels-last in memory or not."""
    picture = torch.arange(height * width * 3).remainder(199).add(1).to(dtype).view(height, width, 3).permute(2, 0, 1)
    return picture if last else picture.contiguous()


def mask_of_size(height: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.arange(height * width).remainder(99).to(dtype).view(height, width)


def padded(values: list[torch.Tensor], height: int, width: int, fill: float) -> torch.Tensor:
    """The slow way: NumPy's pad, one by one."""
    sides = [((0, 0),) * (v.dim() - 2) + ((0, height - v.shape[-2]), (0, width - v.shape[-1])) for v in values]
    pairs = zip(values, sides, strict=True)
    return torch.stack([torch.from_numpy(np.pad(v.numpy(), side, constant_values=fill)) for v, side in pairs])


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.sampled_from([torch.uint8, torch.float32]),
    st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    st.booleans(),
    st.booleans(),
)
def test_padding_is_exact(
    sizes: list[tuple[int, int]], multiple: int, dtype: torch.dtype, of_masks: torch.dtype, last: bool, ours: bool
) -> None:
    """Pictures and masks as NumPy pads them, in a Batch and in a list, with the memory format that they had."""
    pictures = [of_size(*size, dtype, last) for size in sizes]
    masks = [mask_of_size(*size, of_masks) for size in sizes]
    batch = Batch(masks, pictures, masks, torch.arange(len(sizes)), names=("instances", "image", "mask", "label"))
    pad = collate.pad(multiple_of=multiple, value=7, sizes=True)
    found = pad(batch if ours else list(batch))
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    expected = {
        "instances": padded(masks, height, width, 0),
        "image": padded(pictures, height, width, 7),
        "mask": padded(masks, height, width, 255),
        "label": torch.arange(len(sizes)),
        "sizes": torch.tensor(sizes),
    }
    assert same(found, expected)
    if sizes[0] != (1, 1):  # whose strides may mean both
        channels_last = found["image"].permute(0, 2, 3, 1).is_contiguous()
        assert channels_last or not last
        assert found["image"].is_contiguous() or last


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.booleans())
def test_sequences_are_padded_to_the_longest(lengths: list[int], as_arrays: bool) -> None:
    """As torch's pad_sequence does, with one dimension or more; boxes beside pictures know nothing of multiples."""
    sequences = [torch.arange(length) for length in lengths]
    boxes = [torch.ones(length, 4) for length in lengths]
    samples = [(s.numpy(), b.numpy()) if as_arrays else (s, b) for s, b in zip(sequences, boxes, strict=True)]
    expected = [pad_sequence(sequences, True, -1), pad_sequence(boxes, True, -1)]
    assert same(collate.pad(samples, value=-1), expected)
    assert same(collate.pad(samples, value=-1, sizes=True), [*expected, torch.tensor(lengths)])
    with_pictures = [(of_size(3 + n, 4), {"boxes": b, "name": str(n)}) for n, b in zip(lengths, boxes, strict=True)]
    images, targets = collate.pad(with_pictures, multiple_of=32)
    assert images.shape == (len(lengths), 3, 32, 32)
    assert same(targets, {"boxes": pad_sequence(boxes, True), "name": [str(n) for n in lengths]})


def test_padding_keeps_the_structure() -> None:
    """Bare tensors, tuples, named tuples, dicts in tuples, arrays, normalised depth: each as default_collate would."""
    one, other = of_size(4, 5), of_size(6, 3)
    both = padded([one, other], 6, 5, 0)
    pad = collate.pad
    assert same(pad([one, other]), both)
    assert same(pad([torch.tensor(1), torch.tensor(2)]), torch.tensor([1, 2]))
    assert same(pad([one, other], sizes=True), [both, torch.tensor([[4, 5], [6, 3]])])
    assert same(pad([(one, 1), (other, 2)]), [both, torch.tensor([1, 2])])
    found = pad([Sizes(one, 1), Sizes(other, 2)])
    assert isinstance(found, Sizes)
    assert same(tuple(found), (both, torch.tensor([1, 2])))
    nested = [({"image": one}, (1, "a")), ({"image": other}, (2, "b"))]
    assert same(pad(nested), [{"image": both}, [torch.tensor([1, 2]), ["a", "b"]]])
    arrays = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in (one, other)]
    assert same(pad(arrays), both.permute(0, 2, 3, 1))
    depths = [(one, one[0].float()), (other, other[0].float())]
    assert same(pad(depths, multiple_of=4)[1], padded([one[0].float(), other[0].float()], 8, 8, 0))
    inside = [(one, one[0] > 3), (other, other[0] > 3)]
    assert same(pad(inside)[1], padded([one[0] > 3, other[0] > 3], 6, 5, 0))
    assert pad([one, other.float()]).dtype == torch.float32
    assert same(pad([one.bfloat16(), other.bfloat16()], value=2), padded([one, other], 6, 5, 2).bfloat16())
    pad([one.float().requires_grad_(), weights := other.float().requires_grad_()]).sum().backward()
    assert weights.grad is not None
    wide = pad([(one, mask_of_size(4, 5).int()), (other, mask_of_size(6, 3).int())], mask_value=65535)
    assert wide[1].max() == 65535


def test_what_needs_no_padding_is_handed_on() -> None:
    """A batch's own tensors, without a copy; all else is what `collate` gives."""
    batch = batch_of()
    images, labels = collate.pad(batch)
    assert images is batch.images
    assert labels is batch.labels
    assert same(collate.pad(list(batch)), collate(batch))
    assert same(collate.pad(batch, multiple_of=4)[0], padded(list(batch.images), 4, 8, 0))


def test_what_padding_cant_make_equal_is_an_error() -> None:
    """Other channels, other numbers of values: with the shapes, and the way out."""
    for samples in (
        [torch.zeros(3, 4, 5), torch.zeros(1, 4, 5)],
        [torch.zeros(4, 5), torch.zeros(4, 6)],
        [torch.zeros(4), torch.zeros(4, 6)],
        [{"x": torch.tensor(1)}, {"x": torch.zeros(2)}],
    ):
        with pytest.raises(RuntimeError, match=r"shapes.*\(.*\) and \(.*as_list"):
            collate.pad(samples)
    with pytest.raises(RuntimeError, match="overflow"):
        collate.pad([of_size(2, 3), of_size(3, 2)], value=300)
    with pytest.raises(ValueError, match="neither pictures nor sequences"):
        collate.pad([1, 2], sizes=True)


@pytest.mark.parametrize("multiple", [0, -1, 2.0, True, "32", None])
def test_a_silly_multiple_is_refused(multiple: Any) -> None:
    """When the options are given, not in the first batch."""
    with pytest.raises(ValueError, match="multiple_of is"):
        collate.pad(multiple_of=multiple)


def test_as_list_leaves_tensors_apart() -> None:
    """Pictures, masks, boxes and targets in lists whatever their sizes; numbers in one tensor."""
    one, other = of_size(4, 5), of_size(6, 3)
    for second in (other, one):
        samples: list[Any] = [(one, 1), (second, 2)]
        assert same(collate.as_list(samples), [[one, second], torch.tensor([1, 2])])
        targets = [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(2, 4)}]
        samples = [(one, targets[0]), (second, targets[1])]
        assert same(collate.as_list(samples), [[one, second], targets])
        ids = torch.ones(2)
        samples = [{"image": one, "ids": ids, "s": "a", "x": 0.5}, {"image": second, "ids": ids, "s": "b", "x": 1}]
        expected = {"image": [one, second], "ids": [ids, ids], "s": ["a", "b"]}
        assert same(collate.as_list(samples), expected | {"x": torch.tensor([0.5, 1.0], dtype=torch.float64)})
    assert same(collate.as_list([torch.tensor(1), torch.tensor(2)]), torch.tensor([1, 2]))
    assert same(collate.as_list([one, other]), [one, other])


def test_as_list_of_a_batch() -> None:
    """The same whether its pictures and masks lie in one tensor or not; labels that are a tensor stay one."""
    batch = batch_of(3, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    masks = torch.zeros(3, 4, 5, dtype=torch.uint8)
    images = list(batch.images)
    assert same(collate.as_list(batch), [images, batch.labels])
    assert collate.as_list(batch)[0][1].data_ptr() == images[1].data_ptr()
    assert same(collate.as_list(Batch(images, masks)), [images, list(masks)])
    named = Batch(batch.images, list(masks), torch.arange(3), names=("image", "mask", "label"))
    assert same(collate.as_list(named), {"image": images, "mask": list(masks), "label": torch.arange(3)})


def test_collate_is_one_wherever_it_is_pickled() -> None:
    """Loaders ask whether it is theirs; so a copy, or a spawned process's, has to be the same object."""
    for way in (lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy):
        assert way(collate) is collate
        assert way(collate.as_list) is collate.as_list
        assert way(collate.pad(multiple_of=32)) == collate.pad(multiple_of=32)
    assert collate.bucket is collate.pad


WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "threads": {"num_workers": 2},
    "processes": {"num_workers": 1, "worker_type": "process"},
    "spawned": {"num_workers": 1, "worker_type": "process", "multiprocessing_context": "spawn"},
    "threads in processes": {"num_workers": 1, "threads_per_worker": 2},
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", WORKERS)
def test_any_worker_pads(store_path: Path, workers: str) -> None:
    """The same batches from every kind of worker, and from torch's loader; float pictures in shared memory too."""
    for transform in (None, Normalize([0.5] * 3, [0.5] * 3)):
        dataset = fastload.ImageDataset(store_path, transform)
        for collate_fn in (collate.pad(multiple_of=16, sizes=True), collate.as_list):
            loader = fastload.DataLoader(dataset, 5, collate_fn=collate_fn, **WORKERS[workers])
            expected = [collate_fn(dataset.__getitems__(range(12)[n : n + 5])) for n in (0, 5, 10)]
            assert same(list(loader), expected)
            assert same(list(torch.utils.data.DataLoader(dataset, 5, collate_fn=collate_fn)), expected)


def test_what_a_process_pads_is_shared_at_once(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker process of fastload's the batch is made in shared memory, so that it goes without a copy."""
    monkeypatch.setattr("fastload.workers.context.memory", "shared")
    images, _, sizes = collate.pad(list(fastload.ImageDataset(store_path).__getitems__([0, 1, 4])), sizes=True)
    assert images.is_shared()
    assert images.stride(1) == 1
    assert not sizes.is_shared()
    assert same(collate.pad([torch.zeros(0), torch.zeros(0)]), torch.zeros(2, 0))
