"""BucketSampler: epochs in which every sample comes once, beside others of its shape, on one rank or many."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered import Numbers
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import BucketSampler, DataLoader, ImageDataset, ShuffleSampler, collate
from fastload.transforms import RandomResizedCrop, Resize

THREADS: dict[str, Any] = {"num_workers": 2, "worker_type": "thread"}
WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "threads": THREADS,
    "persistent threads": {**THREADS, "persistent_workers": True},
    "processes": {"num_workers": 2, "worker_type": "process"},
}

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def sizes_of(n: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Heights and widths of n pictures."""
    return np.random.default_rng(seed).integers(100, 900, (n, 2))


def flat(batches: Any) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


# ---- one process


@given(st.integers(0, 90), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.booleans())
def test_every_sample_comes_once(n: int, batch_size: int, pool: int, shuffle: bool, drop_last: bool) -> None:
    """Batches of batch_size, at most the last one smaller; with drop_last what makes none is left out."""
    sampler = BucketSampler(sizes_of(n), batch_size, shuffle=shuffle, drop_last=drop_last, pool=pool)
    for _ in range(2):
        batches = list(sampler)
        assert len(batches) == len(sampler) == (n // batch_size if drop_last else -(-n // batch_size))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        indices = flat(batches)
        assert {type(index) for index in indices} <= {int}
        assert len(set(indices)) == len(indices) == (len(batches) * batch_size if drop_last else n)


def test_epochs_differ_and_can_be_had_again() -> None:
    """Every iter() is the next epoch; an order depends on (seed, epoch) alone, in another process too."""
    sampler = BucketSampler(sizes_of(200), 8, seed=3, pool=4)
    first, second = iter(sampler), iter(sampler)
    epochs = [list(first), list(second), list(sampler)]
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 3
    assert len({tuple(sorted(map(tuple, map(sorted, epoch)))) for epoch in epochs}) == 3
    again = pickle.loads(pickle.dumps(BucketSampler(sizes_of(200), 8, seed=3, pool=4)))
    assert [list(again) for _ in range(3)] == epochs
    again.set_epoch(1)
    assert (again.epoch, list(again), again.epoch) == (1, epochs[1], 2)
    assert list(BucketSampler(sizes_of(200), 8, seed=4, pool=4)) != epochs[0]


def test_batches_come_in_no_order_of_shape() -> None:
    """Small and large shapes are mixed over the epoch: each half of it has as many of them."""
    lengths = np.arange(1, 2001)
    batches = list(BucketSampler(lengths, 10, "length"))
    halves = [np.mean(flat(half)) for half in (batches[:100], batches[100:])]
    assert abs(halves[0] - halves[1]) < 300
    means = [np.mean(batch) for batch in batches]
    assert 0.3 < np.mean(np.diff(means) > 0) < 0.7


def test_without_shuffle_all_is_sorted() -> None:
    """From the smallest to the largest, the same in every epoch, equal ones as they lie."""
    sampler = BucketSampler([5, 3, 9, 3, 1], 2, "length", shuffle=False)
    assert [list(sampler), list(sampler)] == [[[4, 1], [3, 0], [2]]] * 2


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden values: what a seed and an epoch mean, for ever."""
    sampler = BucketSampler([5, 3, 9, 3, 1, 7, 8, 2], 2, "length", seed=1, pool=2)
    assert list(sampler) == [[4, 3], [5, 6], [7, 1], [0, 2]]
    assert list(sampler) == [[4, 1], [5, 2], [0, 6], [7, 3]]


def test_little_is_padded() -> None:
    """Of the pixels of a batch less than a tenth as many are padding as in random batches; sorting all is the limit."""
    sizes = sizes_of(4000)
    ratios = sizes[:, 1] / sizes[:, 0]

    def waste(batches: Any) -> float:
        return float(1 - ratios.sum() / sum(len(batch) * ratios[batch].max() for batch in batches))

    shuffled = list(ShuffleSampler(4000))
    plain = waste([shuffled[start : start + 16] for start in range(0, 4000, 16)])
    assert waste(BucketSampler(sizes, 16)) < plain / 10
    assert waste(BucketSampler(sizes, 16, shuffle=False)) < waste(BucketSampler(sizes, 16)) < 0.05 < plain


# ---- what is alike


def test_by_says_what_is_alike() -> None:
    """Names, functions of all sizes, numbers of any dataset's samples; arrays, lists and tensors."""
    sizes = np.array([[10, 30], [20, 20], [40, 10], [5, 5]])

    def order(dataset: Any, by: Any) -> list[int]:
        return flat(BucketSampler(dataset, 1, by, shuffle=False))

    for given_sizes in (sizes, sizes.tolist(), torch.from_numpy(sizes)):
        assert order(given_sizes, "aspect") == [2, 1, 3, 0]
        assert order(given_sizes, "length") == [3, 1, 0, 2]
        assert order(given_sizes, lambda s: s.prod(axis=1)) == [3, 0, 1, 2]
    for numbers in ([4, 2, 3, 1], np.array([0.4, 0.2, 0.3, 0.1]), torch.tensor([4, 2, 3, 1])):
        assert order(Numbers(4), numbers) == [3, 1, 2, 0]
        assert order(numbers, "length") == [3, 1, 2, 0]


def test_a_dataset_tells_its_sizes(store_path: Path) -> None:
    """Those of the upright images, from the store's column; of a part or several together too."""
    dataset = ImageDataset(store_path)
    shapes = [picture.shape for picture, _ in dataset]  # type: ignore[attr-defined]  # a sequence by __getitem__
    ratios = np.array([width / height for _, height, width in shapes])

    def order(data: Any) -> list[int]:
        return flat(BucketSampler(data, 1, shuffle=False))

    assert order(dataset) == np.argsort(ratios, kind="stable").tolist()
    part = [7, 2, 9, 0]
    assert order(Subset(dataset, part)) == np.argsort(ratios[part], kind="stable").tolist()
    twice = ConcatDataset([dataset, Subset(dataset, part)])
    assert order(twice) == np.argsort([*ratios, *ratios[part]], kind="stable").tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"pool": 0}, "pool is 0"),
        ({"by": "width"}, "by is 'width'; it may be aspect, length"),
        ({"by": [1, 2]}, r"numbers of shape \(2,\); it takes \(9,\)"),
        ({"by": lambda sizes: sizes}, r"numbers of shape \(9, 2\)"),
        ({"by": [np.nan] * 9}, "finite"),
        ({"by": None}, r"numbers of shape \(\)"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"rank": 1}, "rank is 1 and world is None"),
        ({"rank": 2, "world": 2}, "rank is 2"),
        ({"dataset": Numbers(9)}, "Numbers has no sizes"),
        ({"dataset": "abc"}, "str has no sizes"),
        ({"dataset": np.ones((9, 3))}, "has no sizes"),
        ({"dataset": np.ones(9)}, "give by='length'"),
        ({"dataset": np.zeros((9, 2))}, "above 0"),
        ({"dataset": [1.0, np.inf], "by": "length"}, "finite"),
    ],
)
def test_silly_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """When the sampler is made, with the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        BucketSampler(**{"dataset": sizes_of(9), "batch_size": 2, **arguments})


# ---- ranks


@given(st.integers(0, 80), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_ranks_share_every_batch(n: int, batch_size: int, world: int, pool: int, drop_last: bool) -> None:
    """As many batches on each, of the same sizes, no sample on two of them but those that fill the epoch up."""
    options: dict[str, Any] = {"drop_last": drop_last, "pool": pool, "seed": 2}
    samplers = [BucketSampler(sizes_of(n), batch_size, rank=rank, world=world, **options) for rank in range(world)]
    ranks = [list(sampler) for sampler in samplers]
    lengths = [list(map(len, batches)) for batches in ranks]
    assert lengths == [lengths[0]] * world
    assert [len(sampler) for sampler in samplers] == [len(lengths[0])] * world
    times = Counter(flat(flat(ranks)))
    if drop_last:
        assert sum(times.values()) == len(times) == n // (batch_size * world) * batch_size * world
    else:
        assert set(times) == set(range(n))
        assert sum(times.values()) == -(-n // world) * world
        assert n < world or max(times.values(), default=1) <= 2


def test_ranks_get_like_shapes_at_every_step() -> None:
    """None waits for another one's larger pictures; they are the shapes of one large batch."""
    lengths = np.arange(1, 2001)
    ranks = [list(BucketSampler(lengths, 5, "length", rank=rank, world=4)) for rank in range(4)]
    for step in zip(*ranks, strict=True):
        assert np.ptp(lengths[flat(step)]) <= 60
    together = BucketSampler(lengths, 20, "length")
    assert [sorted(flat(step)) for step in zip(*ranks, strict=True)] == [sorted(batch) for batch in together]


def test_ranks_are_asked_of_torch_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ShuffleSampler does, so that it may be made before init_process_group."""
    sampler = BucketSampler(sizes_of(40), 5)
    assert len(sampler) == 8
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert len(sampler) == 4
    assert list(sampler) == list(BucketSampler(sizes_of(40), 5, rank=1, world=2))


# ---- in loaders


def loader_of(path: Path, workers: str = "none", **options: Any) -> DataLoader[Any]:
    dataset = ImageDataset(path, RandomResizedCrop(16))
    sampler = BucketSampler(dataset, 2, seed=1, pool=2, **options)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate.bucket, **WORKERS[workers])


def plain(batches: Any) -> list[Any]:
    return [(images.tolist(), labels.tolist()) for images, labels in batches]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loader_goes_on_in_the_middle(store_path: Path, workers: str) -> None:
    """After any number of batches: the rest of the epoch, then the next, with the pictures that would have come."""
    loader = loader_of(store_path)
    epochs = [plain(loader) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    for epoch, taken in [(0, 0), (1, 1), (1, 3), (0, 6)]:
        stopped = loader_of(store_path, workers)
        for _ in range(epoch):
            list(stopped)
        begun = iter(stopped)
        for _ in range(taken):
            next(begun)
        resumed = loader_of(store_path, workers)
        resumed.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
        assert plain(resumed) == epochs[epoch][taken:]
        assert plain(resumed) == epochs[epoch + 1]


def test_a_state_between_two_epochs_is_the_next_one(store_path: Path) -> None:
    """With set_epoch before each epoch, as training loops do, or without."""
    loader = loader_of(store_path)
    epochs = [plain(loader) for _ in range(2)]
    stopped = loader_of(store_path)
    stopped.set_epoch(0)
    assert plain(stopped) == epochs[0]
    resumed = loader_of(store_path)
    resumed.load_state_dict(stopped.state_dict())
    assert plain(resumed) == epochs[1]
    resumed.set_epoch(1)
    assert plain(resumed) == epochs[1]


def test_each_rank_goes_on_in_the_middle(store_path: Path) -> None:
    """Ranks that resume together see each sample once."""
    for rank in range(2):
        loader = loader_of(store_path, rank=rank, world=2)
        expected = plain(loader)
        loader.set_epoch(0)
        next(iter(loader))
        resumed = loader_of(store_path, rank=rank, world=2)
        resumed.load_state_dict(loader.state_dict())
        assert plain(resumed) == expected[1:]


def test_torch_s_loader_takes_it_and_transforms_follow_the_epochs(store_path: Path) -> None:
    """The same batches from both loaders, epoch after epoch, without a call of set_epoch."""
    ours = loader_of(store_path)
    dataset = ImageDataset(store_path, RandomResizedCrop(16))
    sampler = BucketSampler(dataset, 2, seed=1, pool=2)
    torchs = TorchLoader(dataset, batch_sampler=sampler, collate_fn=collate.bucket)
    assert [plain(torchs) for _ in range(3)] == [plain(ours) for _ in range(3)]


def test_any_dataset_can_be_bucketed() -> None:
    """Sequences, by their lengths, padded to the longest of their batch."""
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    dataset: Any = [torch.full((length,), number) for number, length in enumerate(lengths.tolist())]
    sampler = BucketSampler(dataset, 10, by=lengths)
    for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=fastload.collate.bucket(value=-1)):
        numbers = batch[:, 0].tolist()
        assert [(row >= 0).sum() for row in batch] == lengths[numbers].tolist()
        assert batch.shape == (10, lengths[numbers].max())


def test_images_of_one_height_are_padded_little(store_path: Path) -> None:
    """The README's way: all as high, sorted by their aspect, as wide as the widest of the batch."""
    dataset = ImageDataset(store_path, Resize((32, None)))
    sampler = BucketSampler(dataset, 3)
    collate_fn = collate.bucket(multiple_of=8, sizes=True)
    for images, labels, sizes in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn):
        assert images.shape[2] == 32
        assert images.shape[3] == -(-int(sizes[:, 1].max()) // 8) * 8
        assert len(labels) == len(images) == len(sizes)


@pytest.mark.parametrize("world", [1, 2])
def test_accelerate_is_told_not_to_deal_buckets_out_again(world: int) -> None:
    """Its `prepare` hands back what says that it is prepared."""
    sampler = BucketSampler([(i, 9) for i in range(1, 21)], 2, rank=0, world=world)
    assert DataLoader(range(20), batch_sampler=sampler)._is_accelerate_prepared == (world > 1)  # type: ignore[arg-type]


def test_a_sampler_of_batches_is_no_sampler_of_samples() -> None:
    """Given as the other one it is told."""
    with pytest.raises(ValueError, match="pass it as batch_sampler="):
        DataLoader(range(9), sampler=BucketSampler([(1, 2)] * 9, 2))  # type: ignore[arg-type]
