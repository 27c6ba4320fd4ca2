"""Whole epochs of JPEGs through a loader, and a simulated accelerator that waits for them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import fastload
import pictures
import rivals
from bare import BareCalls
from conftest import Pack
from contest import Contest
from epochs import Epochs, fast_loader
from fastload.bench import bench
from fastload.factory import eval_transform, train_transform
from fastload.geometry import Box, Plan
from fastload.tune import EndlessSampler

BATCH = 64
PHOTO_BATCH = 4  # the few photographs are to keep both threads busy to the end


@pytest.mark.parametrize(("view", "times_torch"), [("random", 2.2), ("centre", 2.3)], ids=["random", "centre"])
def bench_loader(view: str, times_torch: float, contest: Contest, images: Path, store: Path, kept: Path) -> None:
    """How many samples per second do 2 threads give in whole epochs, against 2 processes, no tiles, the bare calls?"""
    ours, theirs = {
        "random": (train_transform(224), rivals.random_crop()),
        "centre": (eval_transform(224), rivals.centre_crop()),
    }[view]
    folder = rivals.Folder(images, theirs)
    datasets = [fastload.ImageDataset(path, ours) for path in (store, kept, store, store)]
    threads, untiled, alone = (
        fast_loader(dataset, BATCH, workers) for dataset, workers in zip(datasets, (2, 2, 0), strict=False)
    )
    epochs = {
        "fastload": Epochs(threads, before=lambda: threads.set_epoch(0)),
        "torch": Epochs(rivals.loader(folder, BATCH)),
        "fastload, no tiles": Epochs(untiled, before=lambda: untiled.set_epoch(0)),
        "fastload, no workers": Epochs(alone, before=lambda: alone.set_epoch(0)),
        "torch over ImageDataset": Epochs(rivals.loader(datasets[3], BATCH)),
    }
    bound = BareCalls(datasets[0], threads=2)
    rounds = contest.run({**epochs, "bare calls": bound})
    contest.target("times torch", rounds.ratios("fastload", "torch"), at_least=times_torch)
    no_tiles = rounds.ratios("fastload", "fastload, no tiles")
    if view == "random":
        contest.target("times no tiles", no_tiles, at_least=1.35)
    else:
        contest.measure("times no tiles", no_tiles)
    contest.target("share of the bare calls' rate", rounds.ratios("fastload", "bare calls"), at_least=0.90)
    contest.measure("times torch, per CPU second", rounds.cpu_ratios("fastload", "torch"))
    contest.measure("torch over ImageDataset, times torch", rounds.ratios("torch over ImageDataset", "torch"))
    for contender in epochs.values():
        contender.check_labels(datasets[0].targets)
    names = ("fastload", "fastload, no tiles", "fastload, no workers", "torch over ImageDataset")
    for name, dataset in zip(names, datasets, strict=True):
        order = epochs[name].order()
        pictures.check(dataset, dataset.epoch, order[:8], epochs[name].images[:8])
    bound.check()
    _check_rival(folder, datasets[0], view)
    if view == "centre":
        order = epochs["torch"].order()
        pictures.check(datasets[0], 0, order[:8], epochs["torch"].images[:8])


def _check_rival(folder: rivals.Folder, dataset: fastload.ImageDataset, view: str) -> None:
    """Fail unless the rival reads the same files in the same order, and its random crops are what it drew."""
    names = [path.relative_to(path.parent.parent).as_posix() for path, _ in folder.samples]
    assert names == [dataset.store[i].name for i in range(len(dataset))]
    if view != "random":
        return
    for index in range(0, len(folder), max(1, len(folder) // 8)):
        size = tuple(dataset.store.columns["size"][index].tolist())
        torch.manual_seed(index)
        top, left, height, width = rivals.draw_box(*size)
        mirror = bool(torch.rand(1) < 0.5)
        torch.manual_seed(index)
        image, _ = folder[index]
        plan = Plan.whole(size)._replace(box=Box(left, top, width, height), size=(224, 224), mirror=mirror)
        pictures.assert_like(image, pictures.expected(dataset.store, index, plan), f"the rival's picture {index}")


def bench_photos(contest: Contest, photos: Path, packed: Pack) -> None:
    """How fast are random crops of large photographs, by tiles and DCT scaling, against decoding all of each file?"""
    tiled, whole = packed(photos), packed(photos, tiles=False)
    crop = train_transform(224)
    datasets = {
        "fastload": fastload.ImageDataset(tiled, crop),
        "whole decode": fastload.ImageDataset(whole, crop, scaled_decode=False),
        "tiles alone": fastload.ImageDataset(tiled, crop, scaled_decode=False),
        "scaling alone": fastload.ImageDataset(whole, crop),
    }
    loaders = {name: fast_loader(dataset, PHOTO_BATCH) for name, dataset in datasets.items()}
    epochs = {name: Epochs(loader) for name, loader in loaders.items()}
    rounds = contest.run(epochs, rounds=5)  # a round is an epoch, with the same crops for each contender
    contest.target("times whole decode", rounds.ratios("fastload", "whole decode"), at_least=5)
    contest.measure("times whole decode, per CPU second", rounds.cpu_ratios("fastload", "whole decode"))
    for name in ("tiles alone", "scaling alone"):
        contest.measure(f"{name}, times whole decode", rounds.ratios(name, "whole decode"))
    for name, dataset in datasets.items():
        epochs[name].check_labels(dataset.targets)
        pictures.check(dataset, dataset.epoch, epochs[name].order()[:PHOTO_BATCH], epochs[name].images)


def bench_consumer(contest: Contest, images: Path, store: Path) -> None:
    """How busy is an accelerator that needs 80% of what the loader can give?"""
    seconds, share = 3.0, 0.8
    dataset = fastload.ImageDataset(store, train_transform(224))
    folder = rivals.Folder(images, rivals.random_crop())
    rates: list[float] = []
    busy: dict[str, list[float]] = {"fastload": [], "torch": []}

    def loader_alone() -> int:
        report = bench(dataset, batch_size=BATCH, seconds=seconds / 2).report
        rates.append(report.samples_per_second)
        return report.samples

    def fed() -> int:
        step_ms = 1000 * BATCH / (share * rates[-1])
        report = bench(dataset, batch_size=BATCH, consumer="simulated", step_ms=step_ms, seconds=seconds).report
        assert report.accelerator_busy is not None
        busy["fastload"].append(report.accelerator_busy)
        return report.samples

    def fed_by_torch() -> int:
        step = BATCH / (share * rates[-1])
        loader = DataLoader(folder, batch_sampler=EndlessSampler(len(folder), BATCH), num_workers=2)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(batches)
            time.sleep(step)
            steps += 1
        busy["torch"].append(steps * step / (time.perf_counter() - started))
        return steps * BATCH

    contest.run({"fastload": fed, "loader alone": loader_alone, "torch": fed_by_torch}, rounds=5)
    contest.target("accelerator busy", busy["fastload"][1:], at_least=0.97)
    contest.measure("accelerator busy with torch", busy["torch"][1:])
    first, _ = next(iter(fastload.DataLoader(dataset, batch_size=8, num_workers=2)))
    pictures.check(dataset, dataset.epoch, range(8), first)
