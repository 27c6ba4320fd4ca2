"""`bench` against each consumer, and what it refuses."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
from fastload.bench import bench
from fastload.transforms import Resize


@pytest.fixture
def dataset(store_path: Path) -> fastload.ImageDataset:
    """Twelve small pictures in three classes."""
    return fastload.ImageDataset(store_path, Resize((32, 32)))


def run(dataset: fastload.ImageDataset, **options: Any) -> Any:
    """A short run on the CPU; no thread may be left when it is over."""
    result = bench(dataset, **({"batch_size": 4, "num_workers": 2, "seconds": 0.1, "device": "cpu"} | options))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload")]
    return result


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_without_a_consumer(dataset: fastload.ImageDataset, workers: int) -> None:
    """Batches as fast as they come: whole ones, counted, nothing busy, nearly all the time spent waiting."""
    report = run(dataset, num_workers=workers).report
    assert report.samples == 4 * report.batches > 0
    assert report.accelerator_busy is None
    assert 0 < report.stall_fraction <= 1


def test_a_simulated_accelerator_is_busy_for_its_steps(dataset: fastload.ImageDataset) -> None:
    """The busy share is the number of steps times their length, and a consumer that is slow waits little."""
    report = run(dataset, consumer="simulated", step_ms=20, seconds=0.3).report
    assert report.accelerator_busy == pytest.approx(report.batches * 0.020 / report.seconds)
    assert report.stall_fraction + report.accelerator_busy < 1.05


def test_a_network_is_trained(dataset: fastload.ImageDataset) -> None:
    """Real steps of a real network keep the device busy; labels choose among three classes."""
    report = run(dataset, consumer="network").report
    assert report.batches > 0
    assert 0 < report.accelerator_busy < 1


def test_a_network_takes_samples_without_a_label(class_folders: Path, tmp_path: Path) -> None:
    """A flat folder has label -1 everywhere, and can be measured too."""
    fastload.pack(class_folders / "ant", tmp_path / "db.lmdb")
    dataset = fastload.ImageDataset(tmp_path / "db.lmdb", Resize((32, 32)))
    assert (np.asarray(dataset.targets) == -1).all()
    assert run(dataset, consumer="network").report.batches > 0


def test_a_network_takes_samples_with_several_labels(class_folders: Path, tmp_path: Path) -> None:
    """A store of a list with two labels per image can be measured as well."""
    (tmp_path / "list.txt").write_text("".join(f"{i}.jpg {i} {i + 1}\n" for i in range(4)))
    fastload.pack(tmp_path / "list.txt", tmp_path / "db.lmdb", root=class_folders / "ant")
    dataset = fastload.ImageDataset(tmp_path / "db.lmdb", Resize((32, 32)))
    assert run(dataset, consumer="network").report.batches > 0


def test_batches_may_be_larger_than_the_dataset(dataset: fastload.ImageDataset) -> None:
    """Epochs are strung together, so there is always a next whole batch."""
    report = run(dataset, batch_size=30).report
    assert report.samples == 30 * report.batches > 0


def test_a_raw_column_is_measured(raw_store_path: Path) -> None:
    """Pictures that are gathered from a column, several batches per read, are counted right too."""
    report = run(fastload.ImageDataset(raw_store_path), batch_size=8).report
    assert report.samples == 8 * report.batches > 0


def test_the_figures_are_json(dataset: fastload.ImageDataset) -> None:
    """The report's figures and the time to the first batch, which was not part of the measurement."""
    result = run(dataset)
    figures = json.loads(json.dumps(result.as_dict()))
    assert figures == result.report.as_dict() | {"first_batch_seconds": result.first_batch_seconds}
    assert result.first_batch_seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize("consumer", ["none", "network"])
def test_on_the_gpu(dataset: fastload.ImageDataset, consumer: Any) -> None:
    """Batches go to the device, and the network is trained there."""
    report = run(dataset, device="cuda", consumer=consumer, seconds=0.5).report
    assert report.batches > 0
    assert (report.accelerator_busy is not None) == (consumer == "network")


@pytest.mark.parametrize(
    "options", [{"consumer": "simulated"}, {"step_ms": 5}, {"consumer": "network", "step_ms": 5.0}], ids=str
)
def test_a_step_goes_with_a_simulated_accelerator(dataset: fastload.ImageDataset, options: dict[str, Any]) -> None:
    """One without the other is refused, and the message names both."""
    with pytest.raises(ValueError, match=r"consumer is '\w+', step_ms is "):
        run(dataset, **options)


def test_a_device_that_is_not_there(dataset: fastload.ImageDataset) -> None:
    """No CUDA device of that number: the message says how many there are, and no worker is left running."""
    with pytest.raises(RuntimeError, match=f"sees {torch.cuda.device_count()} CUDA devices"):
        run(dataset, device="cuda:99")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload")]


def test_an_error_of_the_dataset_ends_the_run(store_path: Path) -> None:
    """Pictures that don't stack are the dataset's error, raised here, with all threads stopped."""
    with pytest.raises(RuntimeError, match="different shapes"):
        run(fastload.ImageDataset(store_path), batch_size=12)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fastload")]
