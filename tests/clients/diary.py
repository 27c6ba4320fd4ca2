"""What the scripts of this folder share: a dataset whose labels are its indices, and a diary of what a rank got.

Each script is a training run as anybody would write it with one framework. It is started by `test_clients.py`, under
torchrun where it needs several ranks, and each rank leaves one JSON file.
"""

from __future__ import annotations

import faulthandler
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

import fastload
from fastload.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

SIZE = 16

faulthandler.dump_traceback_later(80, exit=True)  # a rank that hangs says where


def dataset_of(store: str | Path, **options: Any) -> fastload.ImageDataset:
    """The store's images in random crops."""
    return fastload.ImageDataset(store, Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip()]), **options)


def model() -> torch.nn.Module:
    """The smallest network that takes these images."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 2))


class Diary:
    """Of each run its epochs, of each epoch its batches, of each batch a list of [label, checksum of the picture]."""

    def __init__(self) -> None:
        self.runs: dict[str, list[list[list[list[int]]]]] = {}
        self.facts: dict[str, Any] = {}

    def add(self, run: str, epoch: int, batch: Any) -> torch.Tensor:
        """Note down a batch, and give its images as floats."""
        images, labels = batch
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert tuple(images.shape) == (len(labels), 3, SIZE, SIZE)
        epochs = self.runs.setdefault(run, [])
        epochs += [[] for _ in range(epoch + 1 - len(epochs))]
        sums = [zlib.crc32(image.contiguous().numpy().tobytes()) for image in images.cpu()]
        epochs[epoch].append([list(sample) for sample in zip(labels.tolist(), sums, strict=True)])
        return images.float() / 255

    def write(self, folder: str | Path) -> None:
        """Leave it as `RANK.json`."""
        rank = os.environ.get("RANK", "0")
        Path(folder, f"{rank}.json").write_text(json.dumps({"runs": self.runs, "facts": self.facts}))
