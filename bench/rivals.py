"""torch's DataLoader over a folder of images, as a training script without fastload has it. No fastload in here.

The transforms are torchvision's where it is installed; otherwise the same steps by hand, with the same draws from
torch's generator and the same pixels. Pictures stay uint8, as fastload's do. Costs that a rival need not pay are not
counted against it: its workers are persistent, so starting them is not part of an epoch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

SIZE, RESIZED = 224, 256


class Folder(Dataset[tuple[torch.Tensor, int]]):
    """Class folders of images: torchvision's ImageFolder."""

    def __init__(self, root: Path, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        self.samples = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        with open(path, "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), label


class RememberedOrder(Sampler[int]):
    """A random order that can be asked for afterwards."""

    def __init__(self, count: int) -> None:
        self._random = RandomSampler(range(count))
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self._random)

    def __iter__(self) -> Iterator[int]:
        self.order = list(self._random)
        return iter(self.order)


def loader(dataset: Dataset[Any], batch_size: int = 64, **options: Any) -> DataLoader[Any]:
    """torch's DataLoader with two process workers that stay."""
    sampler = RememberedOrder(len(dataset))  # type: ignore[arg-type]  # all datasets here have a length
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=2, persistent_workers=True, **options)


def random_crop() -> Callable[[Image.Image], torch.Tensor]:
    """RandomResizedCrop(224), RandomHorizontalFlip, to a tensor."""
    if not HAS_TORCHVISION:
        return _random_crop
    from torchvision import transforms

    return transforms.Compose(  # type: ignore[no-any-return]
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )


def centre_crop() -> Callable[[Image.Image], torch.Tensor]:
    """Resize(256), CenterCrop(224), to a tensor."""
    if not HAS_TORCHVISION:
        return _centre_crop
    from torchvision import transforms

    return transforms.Compose(  # type: ignore[no-any-return]
        [transforms.Resize(RESIZED), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    )


def draw_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws it, scale 0.08 to 1, ratio 3/4 to 4/3."""
    log_ratio = torch.log(torch.tensor((3 / 4, 4 / 3)))
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
        aspect = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]))).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, size=(1,)).item()
            return int(top), int(torch.randint(0, width - w + 1, size=(1,)).item()), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_crop(image: Image.Image) -> torch.Tensor:
    top, left, height, width = draw_box(image.height, image.width)
    picture = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if torch.rand(1) < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_tensor(picture)


def _centre_crop(image: Image.Image) -> torch.Tensor:
    short, long = sorted(image.size)
    scaled = int(RESIZED * long / short)
    size = (RESIZED, scaled) if image.width <= image.height else (scaled, RESIZED)
    picture = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((picture.width - SIZE) / 2), round((picture.height - SIZE) / 2)
    return _to_tensor(picture.crop((left, top, left + SIZE, top + SIZE)))


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
