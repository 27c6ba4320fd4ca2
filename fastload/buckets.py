"""Batches of samples of like shape, so that little is padded: which samples come together, in which order.

An epoch is shuffled, cut into pools of some hundred batches, each pool is sorted by shape and cut into batches, and
these are shuffled: nearly as random as a plain shuffle, and padded nearly as little as if all samples were sorted. It
is the way of torchtext's BucketIterator. No image is read: sizes come from the store's column.

Ranks share each sorted pool like cards: at every step all of them have samples of like shape, and none waits for the
one that has the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Sampler, Subset

from .order import Indices, epoch_order
from .sampler import Share, ShuffleSampler

By = Literal["aspect", "length"]
Keys = npt.NDArray[np.float64]


class BucketSampler(Sampler[list[int]]):
    """A batch sampler of samples of like shape; give it as `batch_sampler`, with `fastload.collate.bucket`.

    dataset: an `ImageDataset`, or Subset and ConcatDataset of such; any other with a len() if `by` holds the numbers;
        or the sizes themselves: (n, 2) heights and widths, or (n,) lengths.
    batch_size: samples in a batch, of each rank.
    by: what is alike in a batch. "aspect": width / height, for pictures that are resized to one height or one short
        side. "length": the longer side, or the lengths. Or a number for each sample; or a function that makes these of
        all sizes: `lambda sizes: sizes.prod(axis=1)`. Sizes are those that lie in the store, before any transform.
    shuffle: False sorts all samples once and for all, smallest first; for evaluation.
    seed: of the order; the same on all ranks. It depends on (seed, epoch) alone; every `iter()` is the next epoch.
    drop_last: leave out the samples of an epoch that make no whole batch for all ranks: others in every epoch. Without
        it the last batch is smaller, and some samples from the start of the epoch are repeated in it where the ranks
        would otherwise get unequal numbers.
    rank, world: as in `ShuffleSampler`: both, or neither to ask torch.distributed.
    pool: how many batches are sorted together. More are padded less and shuffled less.

    Every rank gets the same number of batches, of the same sizes. `fastload.DataLoader` resumes it from a state, with
    the same batch_size and number of ranks.

    Raises:
        ValueError: an argument makes no sense, or the dataset has no sizes.

    Example:
        >>> sampler = fastload.BucketSampler(dataset, 16)
        >>> loader = fastload.DataLoader(dataset, batch_sampler=sampler, collate_fn=fastload.collate.bucket)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        by: By | Callable[[npt.NDArray[Any]], npt.ArrayLike] | npt.ArrayLike = "aspect",
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world: int | None = None,
        pool: int = 100,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pool", pool)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it has to be an int from 1")
        self.batch_size, self.pool = batch_size, pool
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self._keys = _keys(dataset, by)
        self._dataset = dataset
        self._epochs = ShuffleSampler(len(self._keys), seed=seed, rank=rank, world=world, shuffle=self.shuffle)

    @property
    def epoch(self) -> int:
        """That of the next `iter()`."""
        return self._epochs.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch."""
        self._epochs.set_epoch(epoch)

    @property
    def num_replicas(self) -> int:
        """How many ranks share an epoch."""
        return self._epochs.num_replicas

    def __len__(self) -> int:
        """The number of batches in an epoch, the same on all ranks."""
        n, every = len(self._keys), self.batch_size * self._epochs.num_replicas
        return n // every if self.drop_last else -(-n // every)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches of indices in the epoch that comes now."""
        steps, share = len(self), self._epochs.share()
        if getattr(self._dataset, "epoch", share.epoch) < share.epoch:  # with torch's loader; fastload's has done it
            self._dataset.set_epoch(share.epoch)
        return self._batches(share, steps)

    def _batches(self, share: Share, steps: int) -> Iterator[list[int]]:
        every = self.batch_size * share.world
        end = min(steps * every, -(-share.n // share.world) * share.world)
        pools = max(1, round(steps / self.pool)) if self.shuffle else 1
        for number in range(pools):
            first, last = (steps * edge // pools for edge in (number, number + 1))
            pool = self._sorted(share, first * every, min(last * every, end))
            whole = len(pool) // every
            order = epoch_order(whole, share.seed, share.epoch, 1 + number, shuffle=self.shuffle).take(0, whole)
            for step in [*order.tolist(), *range(whole, last - first)]:  # a smaller one is the last
                yield pool[step * every + share.rank : (step + 1) * every : share.world].tolist()

    def _sorted(self, share: Share, start: int, stop: int) -> Indices:
        """The samples at these positions of the epoch, those of like shape side by side."""
        indices = share.order.at(np.arange(start, stop) % share.n)
        return indices[np.argsort(self._keys[indices], kind="stable")]


def _keys(dataset: Any, by: Any) -> Keys:
    """A number for each sample, like ones for those of like shape."""
    if isinstance(by, str) and by not in get_args(By):
        raise ValueError(f"by is {by!r}; it may be {', '.join(get_args(By))}, a number for each sample, or a function")
    if not isinstance(by, str) and not callable(by):
        keys, count = np.asarray(by, np.float64), len(dataset)
    else:
        sizes = _sizes(dataset)
        count = len(sizes)
        keys = np.asarray(by(sizes) if callable(by) else _by_name(sizes, by), np.float64)
    if keys.shape != (count,) or not np.isfinite(keys).all():
        raise ValueError(
            f"by gives numbers of shape {keys.shape}; it takes ({count},), one for each sample, all of them finite"
        )
    return keys


def _by_name(sizes: npt.NDArray[Any], by: By) -> npt.NDArray[Any]:
    if by == "length":
        return sizes if sizes.ndim == 1 else sizes.max(axis=1)
    if sizes.ndim == 1:
        raise ValueError("by is 'aspect', and the sizes are one number for each sample; give by='length'")
    ratios: npt.NDArray[Any] = sizes[:, 1] / sizes[:, 0]
    return ratios


def _sizes(dataset: Any) -> npt.NDArray[Any]:
    """Heights and widths (n, 2), or lengths (n,)."""
    if isinstance(dataset, Subset):
        return _sizes(dataset.dataset).take(dataset.indices, axis=0)
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_sizes(part) for part in dataset.datasets])
    if hasattr(dataset, "store"):
        return np.asarray(dataset.store.columns["size"])
    sizes = (
        np.asarray(dataset) if isinstance(dataset, (Sequence, np.ndarray)) or hasattr(dataset, "__array__") else None
    )
    if sizes is None or sizes.dtype.kind not in "iuf" or sizes.shape not in ((len(sizes),), (len(sizes), 2)):
        raise ValueError(
            f"{type(dataset).__name__} has no sizes; give an ImageDataset, heights and widths (n, 2) or lengths (n,), "
            "or by= one number for each sample"
        )
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError("sizes have to be finite and above 0")
    return sizes
