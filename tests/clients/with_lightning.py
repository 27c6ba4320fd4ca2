"""Lightning's Trainer: `with_lightning.py STORE OUT` trains; with `resume` it goes on from checkpoints.

On two ranks under torchrun, on one device without it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from diary import Diary, dataset_of, model
from lightning.pytorch.callbacks import ModelCheckpoint

import fastload

EPOCHS = 3
SEED = 11
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
KINDS = ("injected", "ours", "made") if RANKS > 1 else ("alone", "alone thread", "alone process")
# In the middle, at the last batch and at the end of an epoch, which has 6 steps, or 12 on one device.
STOPS = ("step8", "step12", "epoch0")


EVERY_ONE: dict[str, Any] = {"save_top_k": -1, "auto_insert_metric_name": False}


class Learner(lightning.LightningModule):
    """Notes down what it is given to learn."""

    def __init__(self, diary: Diary, run: str) -> None:
        super().__init__()
        self.model = model()
        self.diary, self.run = diary, run

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images = self.diary.add(self.run, self.current_epoch, batch)
        return self.model(images).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Validated(Learner):
    """Its validation loader is made in a hook, where Lightning notes down the arguments by patching `__init__`."""

    def __init__(self, diary: Diary, run: str, dataset: fastload.ImageDataset) -> None:
        super().__init__(diary, run)
        self.dataset = dataset

    def val_dataloader(self) -> Any:
        return fastload.DataLoader(self.dataset, 4, num_workers=1, worker_type="process", threads_per_worker=2)

    def validation_step(self, batch: Any, index: int) -> None:
        self.diary.add("validation", self.current_epoch, batch)


def loader_of(store: str, kind: str) -> Any:
    """Shuffled by Lightning, which puts a DistributedSampler in; by ours; all made by `make_loader`; by torch alone."""
    dataset = dataset_of(store)
    if kind.startswith("alone"):
        worker: Any = kind.partition(" ")[2]
        generator = torch.Generator().manual_seed(SEED)
        workers: dict[str, Any] = {"num_workers": 2, "worker_type": worker} if worker else {}
        return fastload.DataLoader(dataset, 4, shuffle=True, generator=generator, **workers)
    if kind == "made":
        return fastload.make_loader(dataset, 4, train=True, device="cpu", num_workers=1)
    order: dict[str, Any] = {"shuffle": True} if kind == "injected" else {"sampler": fastload.ShuffleSampler(dataset)}
    return fastload.DataLoader(dataset, 4, num_workers=2, worker_type="thread", **order)


def trainer_of(**options: Any) -> lightning.Trainer:
    """On the CPU, and as little as possible besides."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place: dict[str, Any] = {"accelerator": "cpu", "devices": RANKS, "strategy": "ddp" if RANKS > 1 else "auto"}
    return lightning.Trainer(max_epochs=EPOCHS, num_sanity_val_steps=0, **place, **quiet, **options)


def described(loader: Any) -> dict[str, Any]:
    """What became of a loader in Lightning's hands."""
    names = ("worker_type", "threads_per_worker", "num_workers", "batch_size")
    facts = {name: getattr(loader, name, "missing") for name in names}
    return facts | {
        "class": f"{type(loader).__module__}.{type(loader).__name__}",
        "sampler": type(loader.sampler).__name__,
        "collate": loader.collate_fn is fastload.collate,
    }


def train(store: str, out: Path, diary: Diary) -> None:
    """An uninterrupted run of each kind, with checkpoints on its way."""
    for kind in KINDS:
        learner = Validated(diary, kind, dataset_of(store)) if kind == "injected" else Learner(diary, kind)
        checkpoints: Any = [
            ModelCheckpoint(out / kind, "step{step}", every_n_train_steps=4, **EVERY_ONE),
            ModelCheckpoint(out / kind, "epoch{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **EVERY_ONE),
        ]
        trainer = trainer_of(callbacks=checkpoints)
        trainer.fit(learner, loader_of(store, kind))
        diary.facts[kind] = described(getattr(trainer.train_dataloader, "loader", trainer.train_dataloader))
        diary.facts[kind]["seed kept"] = torch.initial_seed() == SEED
        if kind == "injected":
            diary.facts["validation"] = described(trainer.val_dataloaders)


def resume(store: str, out: Path, diary: Diary) -> None:
    """Runs that go on in a fresh process from the checkpoints of `train`."""
    for kind in KINDS:
        for name in STOPS:
            run = f"{kind} {name}"
            trainer = trainer_of(enable_checkpointing=False)
            trainer.fit(Learner(diary, run), loader_of(store, kind), ckpt_path=str(out / kind / f"{name}.ckpt"))


if __name__ == "__main__":
    lightning.seed_everything(SEED, workers=True)
    diary = Diary()
    folder = Path(sys.argv[2])
    (resume if sys.argv[3:] else train)(sys.argv[1], folder, diary)
    diary.write(folder / "resumed" if sys.argv[3:] else folder)
    if RANKS > 1:
        torch.distributed.destroy_process_group()  # Lightning leaves it to the script
