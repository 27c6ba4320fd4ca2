"""What tools/demo does once it is inside its environment: pack, load, train, draw, and one table at the end."""

from __future__ import annotations

import io
import itertools
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image, ImageFile
from rich.console import Console
from rich.table import Table
from torch import nn

import fastload
from fastload import cli, monitor
from fastload.factory import train_transform
from fastload.show import contact_sheet
from fastload.tune import EndlessSampler, default_workers

SIZE, BATCH, ROUNDS, SHEET = 224, 64, 3, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
CUTS = 60

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Labelled = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Contender:
    """One way to load: batches without end to measure, epochs to train on, and what came of it, round by round."""

    name: str
    endless: torch.utils.data.DataLoader[Any]
    epochs: torch.utils.data.DataLoader[Any] | fastload.DevicePrefetcher[Any]
    step: Step
    loading: list[monitor.Report] = field(default_factory=list)
    first_batch: list[float] = field(default_factory=list)
    training: list[monitor.Report] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def demo(folder: Path | None, out: Path, seconds: float, workers: int | None) -> int:
    """Run everything; results go to the folder `out`. Returns the exit status: 0, or that of a pack that failed."""
    out.mkdir(parents=True, exist_ok=True)
    heading("Images")
    if folder is None:
        folder = cut_photographs(out / "photographs")
    store = out / "images.lmdb"
    status = command("pack", str(folder), str(store), "--overwrite")
    if status not in (0, 3):  # 3: packed, but some files were left out
        return status

    dataset = fastload.ImageDataset(store, train_transform(SIZE))
    workers = workers or default_workers(dataset)
    contenders = stock_torch(folder, dataset, workers), with_fastload(dataset, workers)
    heading(f"Loading, {ROUNDS} rounds of {seconds:g} s each: random crops of {SIZE} x {SIZE}, batches of {BATCH}")
    for _ in range(ROUNDS):
        for contender in contenders:
            load(contender, seconds)
        print(", ".join(f"{c.name} {c.loading[-1].samples_per_second:,.0f} samples/s" for c in contenders), flush=True)

    heading(f"Training a small network on {DEVICE}, {ROUNDS} rounds of {seconds:g} s each")
    for _ in range(ROUNDS):
        for contender in contenders:
            train(contender, seconds)
    for contender in contenders:
        marks = sorted({round(i * (len(contender.losses) - 1) / 5) for i in range(6)})
        losses = " ".join(f"{contender.losses[mark]:.2f}" for mark in marks)
        print(f"{contender.name}: {len(contender.losses)} steps, loss {losses}")

    sheet, plot = out / "batch.png", out / "training.png"
    draw_batch(dataset, sheet)
    monitor.plot(contenders[1].training[-1], plot)
    heading("Results")
    Console(highlight=False).print(results(*contenders))
    print(
        f"workers: {workers} each (processes for torch, threads for fastload); cores: {os.cpu_count()}; "
        f"batches per epoch: {len(contenders[1].epochs)}; torch {torch.__version__}\n"
    )
    print(f"a batch, as it is trained on: {sheet}\nrate and waiting over time:   {plot}")
    return 0


def heading(words: str) -> None:
    Console(highlight=False).print(f"\n[bold]{words}[/bold]", soft_wrap=True)


def command(*arguments: str) -> int:
    """Run `fastload` as from a shell, and show what was typed."""
    print(f"$ fastload {shlex.join(arguments)}", flush=True)
    return cli.main(arguments)


def cut_photographs(folder: Path) -> Path:
    """Class folders of pictures of 500 x 375, cut from photographs at varied places and scales; made once."""
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheel = download_wheel(Path(temporary), "tools/demo FOLDER")
        print(f"cutting {CUTS} pictures from each of {len(PHOTOGRAPHS)} photographs")
        rng = random.Random(0)
        with zipfile.ZipFile(wheel) as archive:
            for name in PHOTOGRAPHS:
                photograph = Image.open(io.BytesIO(archive.read(f"skimage/data/{name}"))).convert("RGB")
                cuts = Path(temporary, "cuts", Path(name).stem.partition("_")[0])
                cuts.mkdir(parents=True)
                for i in range(CUTS):
                    cut(photograph, rng).save(cuts / f"{i:02}.jpg", quality=90)
        os.rename(Path(temporary, "cuts"), folder)
    return folder


def download_wheel(folder: Path, instead: str) -> Path:
    """scikit-image's wheel: read as an archive, never installed. instead: the command that does without."""
    print("getting photographs: scikit-image's wheel, 14 MB", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--dest", str(folder)]
    if subprocess.call([*pip, "--no-deps", "--only-binary=:all:", "scikit-image"]):
        program = instead.partition(" ")[0]
        sys.exit(f"{program}: the photographs could not be downloaded; try your own images: {instead}")
    return next(folder.glob("*.whl"))


def cut(photograph: Image.Image, rng: random.Random) -> Image.Image:
    """A part of 4 : 3, at least 60% of the largest one in each direction, mirrored half of the time."""
    unit = min(photograph.width / 4, photograph.height / 3) * rng.uniform(0.6, 1)
    left, top = rng.uniform(0, photograph.width - 4 * unit), rng.uniform(0, photograph.height - 3 * unit)
    box = (left, top, left + 4 * unit, top + 3 * unit)
    picture = photograph.resize((500, 375), Image.Resampling.BICUBIC, box)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


class StockDataset(torch.utils.data.Dataset[Labelled]):
    """The same samples as usual: files opened by Pillow, torchvision's RandomResizedCrop and flip, uint8 tensors."""

    def __init__(self, folder: Path, dataset: fastload.ImageDataset) -> None:
        self.files = [str(folder / dataset.store[i].name) for i in range(len(dataset))]
        self.labels = dataset.targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Labelled:
        # What was packed is not to stop Pillow; set here, in the worker process, so that packing judges as ever.
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = True, None
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        picture = image.crop(random_box(image.width, image.height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), torch.tensor(self.labels[index])


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's crop: 8% to 100% of the area, sides 3 : 4 to 4 : 3; the whole image where ten tries don't fit."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = (3 / 4) * (16 / 9) ** random.random()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def stock_torch(folder: Path, dataset: fastload.ImageDataset, workers: int) -> Contender:
    """torch's DataLoader with worker processes."""
    files = StockDataset(folder, dataset)
    endless = torch.utils.data.DataLoader(files, batch_sampler=EndlessSampler(len(files), BATCH), num_workers=workers)
    epochs = torch.utils.data.DataLoader(
        files,
        min(BATCH, len(files)),
        shuffle=True,
        num_workers=workers,
        pin_memory=DEVICE == "cuda",
        drop_last=True,
        persistent_workers=True,
    )
    return Contender("stock torch", endless, epochs, trainer(dataset))


def with_fastload(dataset: fastload.ImageDataset, workers: int) -> Contender:
    """fastload with as many threads."""
    endless = fastload.DataLoader(dataset, batch_sampler=EndlessSampler(len(dataset), BATCH), num_workers=workers)
    epochs = fastload.make_loader(
        dataset, min(BATCH, len(dataset)), train=True, num_workers=workers, mean=MEAN, std=STD
    )
    return Contender("fastload", endless, epochs, trainer(dataset))


def load(contender: Contender, seconds: float) -> None:
    """Take batches as fast as they come, after a warm-up of those that the workers make at the start."""
    started = time.perf_counter()
    batches = iter(contender.endless)
    next(batches)
    contender.first_batch.append(time.perf_counter() - started)
    for _ in range(2 * contender.endless.num_workers):
        next(batches)
    with fastload.Monitor() as measured:
        deadline = time.perf_counter() + seconds
        for _ in measured.watch(batches):
            if time.perf_counter() > deadline:
                break
    contender.loading.append(measured.report())


def train(contender: Contender, seconds: float) -> None:
    """Train on, epoch after epoch."""
    epochs = itertools.chain.from_iterable(itertools.repeat(contender.epochs))
    with fastload.Monitor() as measured:
        deadline = time.perf_counter() + seconds
        for images, labels in measured.watch(epochs):
            contender.losses.append(contender.step(images, labels))
            if time.perf_counter() > deadline:
                break
    contender.training.append(measured.report())


def trainer(dataset: fastload.ImageDataset) -> Step:
    """A small network's training step: images and labels in, loss out. Without classes it learns the mean colours."""
    classes = len(dataset.classes or ())
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 7, stride=4, padding=3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes or 3)),
    ).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    mean, std = (255 * torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (MEAN, STD))

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
        if images.dtype == torch.uint8:  # fastload's are normalised already
            images = images.float().sub_(mean).div_(std)
        guess = model(images)
        loss = nn.functional.cross_entropy(guess, labels) if classes else (guess - images.mean((2, 3))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def draw_batch(dataset: fastload.ImageDataset, path: Path) -> None:
    images, labels = next(iter(fastload.DataLoader(dataset, SHEET, shuffle=True)))
    classes = dataset.classes
    captions = [classes[label] if classes and label >= 0 else "" for label in labels.tolist()]
    contact_sheet(list(images), captions).save(path)


def results(stock: Contender, ours: Contender) -> Table:
    """The medians of both side by side."""
    table = Table("", stock.name, ours.name, "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    before, after = (median(report.samples_per_second for report in side.loading) for side in (stock, ours))
    table.add_row("loading alone, samples/s", f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1f}x")
    before, after = (median(side.first_batch) for side in (stock, ours))
    table.add_row("first batch after, seconds", f"{before:.2f}", f"{after:.2f}", f"{before / after:.1f}x")
    before, after = (median(report.samples_per_second for report in side.training) for side in (stock, ours))
    table.add_row("training, samples/s", f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1f}x")
    before, after = (median(report.stall_fraction for report in side.training) for side in (stock, ours))
    table.add_row("training time spent waiting", f"{before:.0%}", f"{after:.0%}", "")
    return table
