"""`make_loader`: from a store to batches on the device, everything chosen for this machine and this rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from .batch_reading import OnError
from .cache import ImageCache
from .dataset import ImageDataset
from .iterators import SingleIterator
from .loader import DataLoader
from .prefetch import DevicePrefetcher
from .resident import Resident
from .sampler import ShuffleSampler
from .store import Store
from .transforms import CenterCrop, Compose, RandomHorizontalFlip, RandomResizedCrop, Resize
from .tune import default_processes, default_workers


def make_loader(
    path_or_dataset: str | os.PathLike[str] | ImageDataset,
    batch_size: int,
    *,
    train: bool,
    size: int = 224,
    device: torch.device | str | int | None = "auto",
    num_workers: int | Literal["auto"] = "auto",
    threads_per_worker: int | None = None,
    seed: int = 0,
    pace: float | None = None,
    drop_last: bool | None = None,
    pad: bool = True,
    window: int | None = None,
    weights: Sequence[float] | Literal["balanced"] | None = None,
    repeat: int | None = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    cache: ImageCache | int | str | None = None,
    on_error: OnError = "placeholder",
    max_failures: int | float | None = None,
    device_resident: bool = False,
    collate_fn: Callable[[Any], Any] | None = None,
) -> DevicePrefetcher[Any]:
    """Batches of a store on the device: [images, labels], uint8 (batch, 3, size, size) and int64 (batch,).

    path_or_dataset: a store, given the standard transforms of ImageNet training; or an `ImageDataset` with your own
        (`size`, `cache`, `on_error`, `max_failures` and the dataset's seed are its own then).
    train: shuffled, RandomResizedCrop(size) and RandomHorizontalFlip; otherwise in order, with the shorter side
        resized to size * 256 / 224 and the centre cropped.
    device: "auto" and None take CUDA where there is some. Batches go there through pinned memory, two ahead.
    num_workers: threads; "auto" measures what a sample costs (0.15 s) and takes as many as are of use, at most the
        cores that this rank may use; for a store without a cache in several processes, where one interpreter lock is
        too few. threads_per_worker: makes the workers processes of so many threads. pace: samples per second that
        your model takes, if you know it: fewer threads may do.
    drop_last: leave out the last, smaller batch; by default only for training. Among ranks it also leaves out the
        samples that don't divide evenly.
    pad, window, weights: see `ShuffleSampler`. Without drop_last some samples come twice among ranks; pad=False keeps
        an evaluation exact, and then some ranks may get one batch less.
    repeat: so many passes over the data in one epoch, without a smaller batch between them; None for an epoch that
        never ends. See `ShuffleSampler`.
    mean, std, dtype: normalise and cast on the device, see `DevicePrefetcher`.
    seed: of the order and the random transforms.
    device_resident: put all images on the device now, and gather the batches there: for small raw images of one size
        (MNIST, CIFAR). Order, pictures and states are those of the usual loader; `size`, `cache` and the workers'
        options are not used. A path gets no transform; a dataset's may be RandomCrop (with padding), CenterCrop and
        RandomHorizontalFlip. Damaged images are found at once.

    collate_fn: for samples of different sizes: `fastload.collate.pad` or `as_list`.

    Where torch.distributed is initialised, each rank gets its share of one order, the same for any number of ranks.
    Every `iter()` is the next epoch, in order and pictures, on all ranks alike; `set_epoch` chooses one. `state_dict`
    and `load_state_dict` resume anywhere, on any number of ranks.

    The loader below is `.loader`, the dataset `.loader.dataset`.

    Raises:
        TypeError: it is neither a store nor an `ImageDataset`.
        ValueError: an option makes no sense, or no batch would ever come.

    Example:
        >>> for images, labels in fastload.make_loader("db.lmdb", 64, train=True): ...
    """
    if not isinstance(path_or_dataset, str | os.PathLike | ImageDataset):
        raise TypeError(
            f"make_loader takes a store or an ImageDataset, got a {type(path_or_dataset).__name__}; fastload.pack "
            "makes a store of any dataset, and fastload.DataLoader loads any as it is"
        )
    if isinstance(path_or_dataset, ImageDataset):
        dataset = path_or_dataset
    else:
        bare = device_resident or Store(path_or_dataset).schema.image is None
        transform = None if bare else train_transform(size) if train else eval_transform(size)
        dataset = ImageDataset(
            *(path_or_dataset, transform),
            image_type="tensor",
            cache=cache,
            on_error=on_error,
            max_failures=max_failures,
            seed=seed,
        )
    drop_last = train if drop_last is None else drop_last
    where = None if device == "auto" else device
    sampler = ShuffleSampler(
        dataset,
        seed=seed,
        shuffle=train,
        drop_last=drop_last,
        pad=pad,
        window=window,
        weights=weights,
        repeat=repeat,
    )
    if drop_last and len(dataset) and repeat is not None and len(sampler) < batch_size:
        raise ValueError(
            f"an epoch of {len(sampler)} samples has no batch of {batch_size}, and drop_last (training's default) "
            "leaves smaller ones out; take a smaller batch_size, or drop_last=False"
        )
    if device_resident:
        gathering = _ResidentLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last)
        batches = DevicePrefetcher(gathering, where, mean=mean, std=std, dtype=dtype)
        gathering.resident = Resident(dataset, batches.device)
        return batches
    on_cuda = torch.cuda.is_available() and torch.device("cuda" if where is None else where).type == "cuda"
    if num_workers == "auto":
        if dataset is path_or_dataset or cache is not None:  # others' datasets may not be able to go to processes
            num_workers = default_workers(dataset, pace)
        else:
            num_workers, threads = default_processes(dataset, pace)
            threads_per_worker = threads_per_worker or threads
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=on_cuda,
        drop_last=drop_last,
        collate_fn=collate_fn,
        worker_type="thread" if threads_per_worker is None else "process",
        threads_per_worker=threads_per_worker,
    )
    return DevicePrefetcher(loader, where, mean=mean, std=std, dtype=dtype)


class _ResidentLoader(DataLoader[Any]):
    """A loader whose batches come from where the whole set lies."""

    resident: Resident

    def _get_iterator(self) -> SingleIterator:
        iterator = SingleIterator(self)
        iterator._dataset_fetcher = self.resident
        return iterator


def train_transform(size: int) -> Compose:
    """The standard augmentation of ImageNet training."""
    return Compose([RandomResizedCrop(size), RandomHorizontalFlip()])


def eval_transform(size: int) -> Compose:
    """The standard evaluation crop: the shorter side at 256/224 of `size`, then the centre."""
    return Compose([Resize(round(size * 256 / 224)), CenterCrop(size)])
