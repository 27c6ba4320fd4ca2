"""The Trainer of transformers, in one process: `with_trainer.py STORE OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diary import Diary, dataset_of, model
from transformers import Trainer, TrainingArguments

import fastload

EPOCHS = 2


class Classifier(torch.nn.Module):
    """A network that computes its own loss, as Trainer likes it."""

    def __init__(self, diary: Diary, run: str) -> None:
        super().__init__()
        self.network = model()
        self.diary, self.run = diary, run
        self.trainer: Any = None

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        epoch = int(self.trainer.state.epoch)
        return {"loss": self.network(self.diary.add(self.run, epoch, (images, labels))).square().mean()}


def collator(samples: Any) -> dict[str, torch.Tensor]:
    """What Trainer feeds to the network by name."""
    images, labels = fastload.collate(samples)
    return {"images": images, "labels": labels}


class WithOurs(Trainer):
    """Trains from our loader."""

    def get_train_dataloader(self) -> Any:
        dataset: Any = self.train_dataset
        sampler = fastload.ShuffleSampler(dataset)
        return fastload.DataLoader(dataset, 4, sampler=sampler, num_workers=2, collate_fn=collator)


def train(store: str, out: Path, diary: Diary, run: str, kind: type[Trainer]) -> None:
    network = Classifier(diary, run)
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        dataloader_num_workers=1,
        remove_unused_columns=False,  # else it hands the collator one sample after the other
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    network.trainer = kind(network, arguments, data_collator=collator, train_dataset=dataset_of(store))
    network.trainer.train()


if __name__ == "__main__":
    diary = Diary()
    folder = Path(sys.argv[2])
    train(sys.argv[1], folder, diary, "stock", Trainer)
    train(sys.argv[1], folder, diary, "ours", WithOurs)
    diary.write(folder)
