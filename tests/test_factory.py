"""`make_loader`: shapes, orders, epochs and seeds in one process, and shares of them in two."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload import make_loader
from fastload.factory import eval_transform
from fastload.transforms import CenterCrop, Normalize, Resize

COUNT = 25


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """A store of 25 images whose labels are their indices, so that a batch tells which samples it has."""
    root = tmp_path_factory.mktemp("numbered")
    files = sorted(class_folders.rglob("*.jpg"))
    for i in range(COUNT):
        shutil.copy(files[i % len(files)], root / f"{i}.jpg")
    (root / "list.txt").write_text("".join(f"{i}.jpg\t{i}\n" for i in range(COUNT)))
    fastload.pack(root / "list.txt", root / "db.lmdb")
    return root / "db.lmdb"


def small(path: Path, **options: Any) -> fastload.DevicePrefetcher[Any]:
    """A loader of batches of 4 small pictures on the CPU, with two threads."""
    return make_loader(
        path, **({"batch_size": 4, "size": 16, "device": "cpu", "num_workers": 2, "train": True} | options)
    )


def labels_of(loader: Iterable[Any]) -> list[int]:
    """The labels of one epoch, in order."""
    return [label for _, labels in loader for label in labels.tolist()]


def pictures_of(loader: Iterable[Any]) -> dict[int, torch.Tensor]:
    """The pictures of one epoch by label."""
    return {label: image for images, labels in loader for image, label in zip(images, labels.tolist(), strict=True)}


# ---- what comes out


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_uint8_pictures_and_int64_labels(numbered: Path, train: bool) -> None:
    """(batch, 3, size, size), channels-last in memory, and (batch,), on the device that was asked for."""
    for images, labels in small(numbered, train=train, drop_last=True, size=48):
        assert (images.dtype, images.shape, images.device.type) == (torch.uint8, (4, 3, 48, 48), "cpu")
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (labels.dtype, labels.shape, labels.device.type) == (torch.int64, (4,), "cpu")


def test_training_is_shuffled_and_drops_the_rest(numbered: Path) -> None:
    """Whole batches only, each sample at most once, in no order."""
    loader = small(numbered)
    seen = labels_of(loader)
    assert len(loader) == 6
    assert len(seen) == len(set(seen)) == 24
    assert seen != sorted(seen)


def test_evaluation_is_in_order_and_complete(numbered: Path) -> None:
    """Every sample once, by index, with a last, smaller batch, and every epoch the same pictures."""
    loader = small(numbered, train=False)
    assert len(loader) == 7
    assert labels_of(loader) == labels_of(loader) == list(range(COUNT))
    first, second = pictures_of(loader), pictures_of(loader)
    assert all(first[i].equal(second[i]) for i in range(COUNT))


def test_evaluation_resizes_and_crops_the_centre(numbered: Path) -> None:
    """The pictures are those of Resize at 256/224 of the size and CenterCrop."""
    expected = fastload.ImageDataset(numbered, fastload.transforms.Compose([Resize(64), CenterCrop(56)]))
    pictures = pictures_of(small(numbered, train=False, size=56))
    assert all(pictures[i].equal(expected[i][0]) for i in range(COUNT))
    assert expected.transform.plans((300, 400), None) == eval_transform(56).plans((300, 400), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("train", "drop_last", "count"), [(True, False, 25), (False, True, 24)])
def test_drop_last_can_be_chosen(numbered: Path, train: bool, drop_last: bool, count: int) -> None:
    """The last, smaller batch is kept or left out as told, in spite of the default."""
    loader = small(numbered, train=train, drop_last=drop_last)
    assert len(labels_of(loader)) == count
    assert len(loader) == 6 + (not drop_last)


def test_passes_leave_no_smaller_batch_between_them(numbered: Path) -> None:
    """repeat=4: 25 whole batches of all 100 samples, each pass with other crops; None: there is always a next one."""
    loader = small(numbered, repeat=4)
    assert len(loader) == 25
    batches = list(loader)
    labels = [label for _, labels in batches for label in labels.tolist()]
    assert {len(labels) for _, labels in batches} == {4}
    assert all(sorted(labels[start : start + COUNT]) == list(range(COUNT)) for start in range(0, 100, COUNT))
    pictures = {
        (label, image.numpy().tobytes())
        for images, labels in batches
        for image, label in zip(images, labels.tolist(), strict=True)
    }
    assert len(pictures) == 100
    endless = small(numbered, repeat=None)
    for _ in range(2):
        assert [label for _, batch in itertools.islice(endless, 50) for label in batch.tolist()][:100] == labels
        endless.set_epoch(0)
    with pytest.raises(TypeError, match="repeat=None"):
        len(endless)
    with pytest.raises(ValueError, match="repeat is 0"):
        small(numbered, repeat=0)


def test_mean_and_std_give_floats(numbered: Path) -> None:
    """Normalised float32 pictures are what torchvision's arithmetic gives; a dtype is obeyed."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    plain = pictures_of(small(numbered, train=False))
    normalised = pictures_of(small(numbered, train=False, mean=mean, std=std))
    for i in range(COUNT):
        expected = (plain[i] / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert normalised[i].dtype == torch.float32
        torch.testing.assert_close(normalised[i], expected)
    assert next(iter(small(numbered, dtype=torch.float16)))[0].dtype == torch.float16


# ---- seeds and epochs


def test_the_seed_decides_order_and_pictures(numbered: Path) -> None:
    """The same seed gives the same epochs with any number of workers; another seed gives others."""
    first = [
        (labels_of(loader), pictures_of(loader)) for loader in (small(numbered, seed=1, num_workers=n) for n in (0, 3))
    ]
    other = small(numbered, seed=2)
    assert first[0][0] == first[1][0] != labels_of(other)
    same, others = first[0][1], pictures_of(other)
    assert same.keys() == first[1][1].keys()
    assert all(image.equal(first[1][1][label]) for label, image in same.items())
    assert not all(image.equal(others[label]) for label, image in same.items() if label in others)


def test_every_iter_is_the_next_epoch(numbered: Path) -> None:
    """Order and crops differ from epoch to epoch without a call of `set_epoch`."""
    loader = small(numbered, drop_last=False)
    orders = [labels_of(loader) for _ in range(3)]
    assert [sorted(order) for order in orders] == [list(range(COUNT))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]
    one, two = pictures_of(loader), pictures_of(loader)
    assert not all(one[i].equal(two[i]) for i in range(COUNT))


def test_set_epoch_chooses_order_and_pictures(numbered: Path) -> None:
    """Epoch 3 is the same whether it was reached or chosen, also after later ones; what follows is epoch 4."""
    reached, chosen = small(numbered), small(numbered)
    epochs = [[(labels.tolist(), images.clone()) for images, labels in reached] for _ in range(5)]
    for _ in range(2):
        chosen.set_epoch(3)
        for epoch in (3, 4):
            again = [(labels.tolist(), images) for images, labels in chosen]
            assert [labels for labels, _ in again] == [labels for labels, _ in epochs[epoch]]
            assert all(a.equal(b) for (_, a), (_, b) in zip(again, epochs[epoch], strict=True))


def test_an_abandoned_epoch_is_over(numbered: Path) -> None:
    """After `break` the next loop is a whole new epoch."""
    loader = small(numbered, drop_last=False)
    for _ in loader:
        break
    second = small(numbered, drop_last=False)
    labels_of(second)
    assert labels_of(loader) == labels_of(second)


# ---- arguments


def test_a_dataset_brings_its_own_transform(numbered: Path) -> None:
    """`size` is the dataset's own then, and so is its cache and what it does with errors."""
    dataset = fastload.ImageDataset(numbered, Resize((20, 24)), cache="1MB", on_error="raise")
    loader = make_loader(dataset, 5, train=False, device="cpu", num_workers=1)
    assert next(iter(loader))[0].shape == (5, 3, 20, 24)
    assert loader.loader.dataset is dataset  # type: ignore[attr-defined]


def test_a_dataset_that_normalises_is_left_alone(numbered: Path) -> None:
    """Floating pictures of the dataset's own transforms pass through."""
    transform = fastload.transforms.Compose([Resize((8, 8)), Normalize([0.5] * 3, [0.5] * 3)])
    images, _ = next(iter(make_loader(fastload.ImageDataset(numbered, transform), 5, train=False, num_workers=1)))
    assert images.dtype == torch.float32
    assert images.min() >= -1


def test_options_reach_the_dataset(numbered: Path) -> None:
    """Cache, error handling, failures' limit and seed are the dataset's when a path is given."""
    dataset = small(numbered, cache="2MB", on_error="skip", max_failures=0.5, seed=9).loader.dataset  # type: ignore[attr-defined]
    assert (dataset.cache.budget, dataset.on_error, dataset.failures.limit, dataset.seed) == (2_000_000, "skip", 12, 9)


def test_the_number_of_workers_is_measured(numbered: Path) -> None:
    """By default between one and all cores; a slow consumer needs one; a number is obeyed."""
    loaders = [make_loader(numbered, 4, train=True, size=16, device="cpu", **more) for more in ({}, {"pace": 0.001})]  # type: ignore[arg-type]
    workers = [loader.loader.num_workers for loader in loaders]  # type: ignore[attr-defined]
    assert 1 <= workers[0] <= (os.cpu_count() or 1)
    assert workers[1] == 1
    assert small(numbered, num_workers=3).loader.num_workers == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", ["auto", None])
def test_the_device_is_found(numbered: Path, device: str | None) -> None:
    """CUDA where there is some, the CPU elsewhere."""
    images, labels = next(iter(small(numbered, device=device)))
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert images.device.type == labels.device.type == expected


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_on_the_cpu(numbered: Path) -> None:
    """The same samples and pixels, pinned on the way."""
    on_gpu, on_cpu = small(numbered, device="cuda"), small(numbered, device="cpu")
    for (images, labels), (expected, their_labels) in zip(on_gpu, on_cpu, strict=True):
        assert images.is_cuda
        assert labels.is_cuda
        assert images.cpu().equal(expected)
        assert labels.cpu().equal(their_labels)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"size": 0},
        {"mean": [0.5]},
        {"on_error": "ignore"},
        {"device": "meta"},
        {"device_resident": True},
    ],
)
def test_senseless_arguments_are_refused(numbered: Path, options: dict[str, Any]) -> None:
    """ValueError at once, not at the first batch."""
    with pytest.raises(ValueError, match=r"\d|'"):
        small(numbered, **options)


@pytest.mark.parametrize("options", [{}, {"repeat": 2}])
def test_a_batch_that_never_comes_is_refused(numbered: Path, options: dict[str, Any]) -> None:
    """Training that leaves out smaller batches would be over at once, without a word."""
    samples = len(fastload.Store(numbered)) * options.get("repeat", 1)
    with pytest.raises(ValueError, match=f"an epoch of {samples} samples has no batch of {samples + 1}, and drop_last"):
        small(numbered, batch_size=samples + 1, train=True, **options)
    for fine in ({"train": False}, {"train": True, "drop_last": False}, {"train": True, "repeat": None}):
        assert len(next(iter(small(numbered, batch_size=samples + 1, **options | fine)))[1]) >= samples


# ---- two processes


SCRIPT = '''
"""A plain training script: the two lines of the README, and what anybody writes around them."""
import json, os, sys
import torch
import fastload

if __name__ == "__main__":
    store, out = sys.argv[1:]
    distributed = "RANK" in os.environ
    if distributed:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Flatten(), torch.nn.LazyLinear(25))
    loader = fastload.make_loader(store, 4, train=True, size=32, device="cpu", mean=[0.5] * 3, std=[0.25] * 3)
    model(next(iter(loader))[0])
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen, losses = [], []
    for epoch in range(2):
        seen.append([])
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen[-1] += labels.tolist()
            losses.append(loss.item())
    weights = [parameter.double().sum().item() for parameter in model.parameters()]
    evaluated = [n for _, labels in fastload.make_loader(store, 4, train=False, device="cpu") for n in labels.tolist()]
    complete = fastload.make_loader(store, 4, train=True, drop_last=False, device="cpu", num_workers=1)
    drawn = [n for _, labels in complete for n in labels.tolist()]
    singly = [n for _, labels in fastload.make_loader(store, 1, train=True, device="cpu") for n in labels.tolist()]
    results = {"seen": seen, "losses": losses, "weights": weights, "evaluated": evaluated, "drawn": drawn}
    results["singly"] = singly
    rank = os.environ.get("RANK", "0")
    with open(os.path.join(out, f"{rank}.json"), "w") as file:
        json.dump(results, file)
    if distributed:
        torch.distributed.destroy_process_group()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def ranks(script: Path, numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks on gloo say of their training."""
    out = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"
    command = [*launch, str(script), str(numbered), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_plain_script_trains(script: Path, numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun the script is an ordinary one: two epochs of six batches, every sample at most once in each."""
    monkeypatch.setattr(sys, "argv", [str(script), str(numbered), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    results = json.loads((tmp_path / "0.json").read_text())
    assert len(results["losses"]) == 12
    assert all(len(set(epoch)) == len(epoch) == 24 for epoch in results["seen"])
    assert all(0 < loss < 100 for loss in results["losses"])
    assert results["evaluated"] == list(range(COUNT))


def test_two_ranks_train_together(ranks: list[dict[str, Any]]) -> None:
    """The same script under torchrun with DDP: three steps of each rank per epoch, and equal weights at the end."""
    assert [len(rank["losses"]) for rank in ranks] == [6, 6]
    assert ranks[0]["losses"] != ranks[1]["losses"]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_two_ranks_see_disjoint_samples(ranks: list[dict[str, Any]]) -> None:
    """In each epoch no sample comes twice; what is left over is less than a batch for each rank."""
    for epoch in range(2):
        one, two = (rank["seen"][epoch] for rank in ranks)
        assert len(one) == len(two) == 12
        assert len({*one, *two}) == 24


def test_two_ranks_leave_out_what_can_not_be_shared(ranks: list[dict[str, Any]]) -> None:
    """With drop_last the odd sample is left out, also where batches are so small that it would fit."""
    one, two = (rank["singly"] for rank in ranks)
    assert len(one) == len(two) == 12
    assert len({*one, *two}) == 24


def test_two_ranks_go_to_the_next_epoch_together(ranks: list[dict[str, Any]]) -> None:
    """Order and shares differ between epochs, though the script never calls `set_epoch`."""
    for rank in ranks:
        assert rank["seen"][0] != rank["seen"][1]
        assert set(rank["seen"][0]) != set(rank["seen"][1])


@pytest.mark.parametrize("key", ["evaluated", "drawn"])
def test_two_ranks_cover_everything_between_them(ranks: list[dict[str, Any]], key: str) -> None:
    """Without drop_last every sample is there, and only what makes the shares even comes twice."""
    one, two = (rank[key] for rank in ranks)
    assert len(one) == len(two) == 13
    assert {*one, *two} == set(range(COUNT))
    assert (sorted(one) == list(range(0, COUNT, 2))) == (key == "evaluated")
