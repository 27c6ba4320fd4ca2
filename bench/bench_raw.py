"""Raw pixels: small images as a column, larger ones as records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

import fastload
import pictures
import rivals
from bare import on_all_cores
from contest import Contest, Work
from epochs import Epochs, fast_loader
from fastload.factory import train_transform

SMALL, CLASSES, BATCH, EPOCHS = 50_000, 10, 512, 10
LARGE_BATCH = 64


class Rows(Dataset[Any]):
    """Small images in one array, a batch at a time: the best that torch's own loader can be given."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._images[indices]), torch.from_numpy(self._labels[indices])


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are made already."""
    return batch


class Mapped(Dataset[Any]):
    """Images in one flat file, read through a NumPy memory map; random crops by OpenCV, channels first."""

    def __init__(self, path: Path, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[Any], labels: Any) -> None:
        self._pixels = np.memmap(path, np.uint8, "r")
        self._offsets, self._sizes, self._labels = offsets, sizes, labels

    def __len__(self) -> int:
        return len(self._sizes)

    def whole(self, index: int) -> npt.NDArray[np.uint8]:
        """The image itself, in the map."""
        start, (height, width) = self._offsets[index], self._sizes[index]
        return self._pixels[start : start + 3 * height * width].reshape(height, width, 3)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        cv2.setNumThreads(0)
        image = self.whole(index)
        top, left, height, width = rivals.draw_box(*image.shape[:2])
        picture = cv2.resize(image[top : top + height, left : left + width], (224, 224))
        if torch.rand(1) < 0.5:
            picture = cv2.flip(picture, 1)
        return torch.from_numpy(picture).permute(2, 0, 1), self._labels[index]


def bench_small(contest: Contest, workspace: Path) -> None:
    """How many raw 32 x 32 images per second come in shuffled batches of 512 from 2 threads?"""
    images = np.random.default_rng(0).integers(0, 256, (SMALL, 32, 32, 3), np.uint8)
    dataset = fastload.ImageDataset(_pack_small(images, workspace))
    labels = np.asarray(dataset.store.columns["label"])
    column = dataset.store.columns["image"]
    threads = Epochs(fast_loader(dataset, BATCH), EPOCHS)
    processes = rivals.loader(Rows(images, labels), BATCH, collate_fn=as_it_is)
    epochs = {"fastload": threads, "torch": Epochs(processes, EPOCHS)}
    order = torch.randperm(SMALL).numpy()
    batches = [order[start : start + BATCH] for start in range(0, SMALL, BATCH)] * EPOCHS
    rows = torch.from_numpy(images.reshape(SMALL, -1))
    buffers = np.empty((2, BATCH, 32, 32, 3), np.uint8)

    def take(thread: int, shared: Iterable[npt.NDArray[np.int64]]) -> None:
        for indices in shared:
            np.take(images, indices, axis=0, out=buffers[thread, : len(indices)], mode="clip")

    def select(thread: int, shared: Iterable[npt.NDArray[np.int64]]) -> None:
        for indices in shared:
            out = torch.from_numpy(buffers[thread, : len(indices)].reshape(len(indices), -1))
            torch.index_select(rows, 0, torch.from_numpy(indices), out=out)

    def bare(work: Callable[[int, Iterable[Any]], None]) -> int:
        on_all_cores(work, batches, 2)
        return EPOCHS * SMALL

    gathers: dict[str, Work] = {"np.take": lambda: bare(take), "index_select": lambda: bare(select)}
    rounds = contest.run({**epochs, **gathers}, rounds=11)
    contest.target("samples per second", rounds.rates("fastload"), at_least=1_500_000)
    contest.target("share of the bare np.take's rate", rounds.ratios("fastload", "np.take"), at_least=0.5)
    contest.measure("share of the bare index_select's rate", rounds.ratios("fastload", "index_select"))
    contest.measure("times torch", rounds.ratios("fastload", "torch"))
    assert len(column) == SMALL
    for contender in epochs.values():
        contender.check_labels(labels)
    got = threads.images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, images[threads.order()[:BATCH]])
    assert np.array_equal(epochs["torch"].images.numpy(), images[epochs["torch"].order()[:BATCH]])


def _pack_small(images: npt.NDArray[np.uint8], workspace: Path) -> Path:
    """Write the images as bitmaps in ten class folders, in their order, and pack them to a column."""
    folder = workspace / "small"
    each = SMALL // CLASSES
    for index, image in enumerate(images):
        path = folder / f"class{index // each}" / f"{index:05d}.bmp"
        if index % each == 0:
            path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), image[..., ::-1])
    path = workspace / "small.lmdb"
    fastload.pack(folder, path, encode="raw")
    return path


def bench_large(contest: Contest, images: Path, workspace: Path) -> None:
    """How fast are random crops of raw images of short side 256, against a memory map of the same pixels?"""
    path = workspace / "large.lmdb"
    fastload.pack(images, path, short_side=256, encode="raw")
    dataset = fastload.ImageDataset(path, train_transform(224))
    mapped = _flat_file(dataset, workspace / "large.bin")
    epochs = {
        "fastload": Epochs(fast_loader(dataset, LARGE_BATCH)),
        "torch over a memory map": Epochs(rivals.loader(mapped, LARGE_BATCH)),
    }
    rounds = contest.run(epochs)
    ratios = rounds.ratios("fastload", "torch over a memory map")
    contest.target("times torch over a memory map", ratios, at_least=1.3)
    contest.measure("the same per CPU second", rounds.cpu_ratios("fastload", "torch over a memory map"))
    for contender in epochs.values():
        contender.check_labels(dataset.targets)
    pictures.check(dataset, dataset.epoch, epochs["fastload"].order()[:8], epochs["fastload"].images[:8])
    assert all(torch.equal(dataset.read(i).permute(1, 2, 0), torch.tensor(mapped.whole(i))) for i in range(8))


def _flat_file(dataset: fastload.ImageDataset, path: Path) -> Mapped:
    sizes = np.asarray(dataset.store.columns["size"]).astype(np.int64)
    ends = np.cumsum(3 * sizes.prod(axis=1))
    with open(path, "wb") as file:
        for index in range(len(dataset)):
            file.write(dataset.read(index).permute(1, 2, 0).numpy().tobytes())
    return Mapped(path, np.concatenate([[0], ends[:-1]]), sizes, dataset.targets.tolist())
