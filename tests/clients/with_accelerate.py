"""Accelerate on two ranks, what it makes of loaders: `with_accelerate.py STORE OUT`."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from diary import Diary, dataset_of, model

import fastload
from fastload.transforms import Compose, RandomResizedCrop

EPOCHS = 2
STOP = 3


class Whole(fastload.ImageDataset):
    """Can only be read by whole batches."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"sample {index} was read by itself")

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return super().__getitems__(indices)


def train(accelerator: Accelerator, diary: Diary, run: str, loader: Iterable[Any]) -> None:
    """Epochs as Accelerate's documentation has them."""
    network = model()
    network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.01))
    for epoch in range(EPOCHS):
        for batch in loader:
            loss = network(diary.add(run, epoch, batch)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()


def prepared(store: str, diary: Diary) -> None:
    """Shuffled by torch: Accelerate makes a loader of its own from ours."""
    accelerator = Accelerator(cpu=True)
    dataset = Whole(store, RandomResizedCrop(16))
    loader = accelerator.prepare(fastload.DataLoader(dataset, 4, shuffle=True, num_workers=2))
    diary.facts["collate"] = loader.collate_fn is fastload.collate
    diary.facts["workers"] = loader.num_workers
    train(accelerator, diary, "prepared", loader)


def sampled(store: str, diary: Diary) -> None:
    """Shuffled by ours for all ranks together, shared out by Accelerate."""
    accelerator = Accelerator(cpu=True)
    dataset = dataset_of(store)
    sampler = fastload.ShuffleSampler(dataset, rank=0, world=1)
    loader = accelerator.prepare(fastload.DataLoader(dataset, 4, sampler=sampler))
    train(accelerator, diary, "sampled", loader)


def shared_out(store: str, diary: Diary) -> None:
    """Shared out by ours, and so not by Accelerate."""
    accelerator = Accelerator(cpu=True)
    dataset = dataset_of(store)
    loader = fastload.DataLoader(dataset, 4, sampler=fastload.ShuffleSampler(dataset), num_workers=2)
    diary.facts["handed back"] = accelerator.prepare(loader) is loader
    train(accelerator, diary, "shared out", loader)


def left_alone(store: str, out: Path, diary: Diary) -> None:
    """`make_loader` shares out by itself, and Accelerate leaves it alone; it saves and loads its state."""

    def ready() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(cpu=True)
        transform = Compose([RandomResizedCrop(16)])
        loader = fastload.make_loader(
            fastload.ImageDataset(store, transform), 4, train=True, num_workers=1, device=accelerator.device
        )
        diary.facts["left alone"] = accelerator.prepare(loader) is loader
        accelerator.register_for_checkpointing(loader)
        return accelerator, loader

    accelerator, loader = ready()
    train(accelerator, diary, "left alone", loader)
    batches = iter(loader)
    for batch in itertools.islice(batches, STOP):
        diary.add("stopped", 0, batch)
    accelerator.save_state(str(out / "left alone"))
    for batch in batches:
        diary.add("went on", 0, batch)
    accelerator.wait_for_everyone()
    accelerator, loader = ready()
    accelerator.load_state(str(out / "left alone"))
    for batch in loader:
        diary.add("resumed", 0, batch)


def stateful(store: str, out: Path, diary: Diary) -> None:
    """torchdata's loader, which Accelerate makes from ours where it is asked to."""

    def ready() -> tuple[Accelerator, Any]:
        config = DataLoaderConfiguration(use_stateful_dataloader=True)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        dataset = dataset_of(store)
        sampler = fastload.ShuffleSampler(dataset, rank=0, world=1)
        return accelerator, accelerator.prepare(fastload.DataLoader(dataset, 4, sampler=sampler, num_workers=1))

    accelerator, loader = ready()
    for count, batch in enumerate(loader, 1):
        diary.add("torchdata stopped" if count <= STOP else "torchdata went on", 0, batch)
        if count == STOP:
            accelerator.save_state(str(out / "torchdata"))
    accelerator.wait_for_everyone()
    accelerator, loader = ready()
    accelerator.load_state(str(out / "torchdata"))
    for batch in loader:
        diary.add("torchdata resumed", 0, batch)


if __name__ == "__main__":
    diary = Diary()
    store, folder = sys.argv[1], Path(sys.argv[2])
    prepared(store, diary)
    sampled(store, diary)
    shared_out(store, diary)
    left_alone(store, folder, diary)
    if importlib.util.find_spec("torchdata"):
        stateful(store, folder, diary)
    diary.write(folder)
    torch.distributed.destroy_process_group()
