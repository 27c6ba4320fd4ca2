"""The frameworks that use our loader, as their users do: Lightning, Accelerate, transformers, torchrun with DDP.

Each script in `clients/` is a training run in processes of its own. It writes down, for each rank, which samples it
got and a checksum of each picture, and the tests here look at that. A framework that isn't installed is skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import fastload

COUNT = 48
SCRIPTS = Path(__file__).parent / "clients"
SECONDS = 100  # of a run that takes ten: less than pytest's own limit

Rank = dict[str, Any]
Samples = list[tuple[int, int]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose labels are its indices."""
    root = tmp_path_factory.mktemp("numbered")
    random = np.random.default_rng(1)
    for i in range(COUNT):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / f"{i:02}.jpg")
    (root / "list.txt").write_text("".join(f"{i:02}.jpg {i}\n" for i in range(COUNT)))
    fastload.pack(root / "list.txt", root / "numbered.lmdb")
    return root / "numbered.lmdb"


def run(script: str, store: Path, out: Path, *arguments: str, ranks: int) -> list[Rank]:
    """Run a script, under torchrun where it has ranks, and give what each rank wrote down."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # The scripts import their neighbour, and the same fastload as this process, under PYTHONSAFEPATH too.
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"
    written = out / "resumed" if arguments else out
    written.mkdir(exist_ok=True)
    command = [*launch, str(SCRIPTS / script), str(store), str(out), *arguments]
    process = subprocess.Popen(
        command, env=environment, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        left = _processes_of(out)
        for one in left:
            one.kill()
        process.wait()
    assert process.returncode == 0, output
    assert not left, f"still running: {left}"
    return [json.loads((written / f"{rank}.json").read_text()) for rank in range(ranks)]


def _processes_of(out: Path) -> list[psutil.Process]:
    """What a run has started: its folder is in every command line."""
    found = psutil.process_iter(["cmdline", "status"])
    return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE and str(out) in (p.info["cmdline"] or ())]


def batches(rank: Rank, run: str, epoch: int) -> list[Samples]:
    """A rank's batches in an epoch, each a list of (label, checksum of the picture)."""
    return [[(label, picture) for label, picture in batch] for batch in rank["runs"][run][epoch]]


def samples(ranks: list[Rank], run: str, epoch: int) -> Samples:
    """All ranks' samples in an epoch, sorted."""
    return sorted(sample for rank in ranks for batch in batches(rank, run, epoch) for sample in batch)


def assert_complete(ranks: list[Rank], run: str, epochs: int) -> None:
    """In every epoch each sample once, in equal shares, in another order than before, each picture another one."""
    for rank in ranks:
        assert [len(epoch) for epoch in rank["runs"][run]] == [COUNT // 4 // len(ranks)] * epochs
    for epoch in range(epochs):
        assert [label for label, _ in samples(ranks, run, epoch)] == list(range(COUNT))
    for epoch in range(1, epochs):
        before, now = ([label for batch in batches(ranks[0], run, e) for label, _ in batch] for e in (epoch - 1, epoch))
        assert before != now
        assert not set(samples(ranks, run, epoch - 1)) & set(samples(ranks, run, epoch))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a framework's runs."""
    return functools.cache(tmp_path_factory.mktemp)


# ---- Lightning, two ranks

LIGHTNING_EPOCHS = 3
LIGHTNING_KINDS = ["injected", "ours", "made"]


@pytest.fixture(scope="module")
def lightning(store: Path, folder: Callable[[str], Path]) -> list[Rank]:
    """Uninterrupted runs that leave checkpoints."""
    pytest.importorskip("lightning")
    return run("with_lightning.py", store, folder("lightning"), ranks=2)


@pytest.fixture(scope="module")
def lightning_resumed(store: Path, folder: Callable[[str], Path], lightning: list[Rank]) -> list[Rank]:
    """Runs from those checkpoints, in fresh processes."""
    return run("with_lightning.py", store, folder("lightning"), "resume", ranks=2)


@pytest.mark.parametrize(
    ("kind", "worker_type", "threads_per_worker", "sampler"),
    [
        ("injected", "thread", None, "DistributedSampler"),
        ("validation", "process", 2, "DistributedSampler"),
        ("ours", "thread", None, "ShuffleSampler"),
        ("made", "thread", None, "ShuffleSampler"),
    ],
)
def test_lightning_keeps_the_loader(
    lightning: list[Rank], kind: str, worker_type: str, threads_per_worker: int | None, sampler: str
) -> None:
    """Where it makes a loader anew to put its sampler in, class and arguments are the user's; ours it leaves alone."""
    for rank in lightning:
        facts = rank["facts"][kind]
        assert facts["class"] == "fastload.loader.DataLoader"
        assert (facts["worker_type"], facts["threads_per_worker"]) == (worker_type, threads_per_worker)
        assert (facts["sampler"], facts["batch_size"], facts["collate"]) == (sampler, 4, True)


@pytest.mark.parametrize("kind", LIGHTNING_KINDS)
def test_lightning_gets_each_sample_once(lightning: list[Rank], kind: str) -> None:
    """Between two ranks, every epoch anew."""
    assert_complete(lightning, kind, LIGHTNING_EPOCHS)


def test_lightning_begins_with_epoch_0(lightning: list[Rank]) -> None:
    """However often it calls `iter` before it takes a batch: `make_loader` gives what the plain loader gives."""
    for epoch in range(LIGHTNING_EPOCHS):
        assert samples(lightning, "made", epoch) == samples(lightning, "ours", epoch)


def test_lightning_validates_on_every_sample(lightning: list[Rank]) -> None:
    """The validation loader, whose processes decode with threads, in order."""
    for epoch in range(LIGHTNING_EPOCHS):
        assert [label for label, _ in samples(lightning, "validation", epoch)] == list(range(COUNT))


@pytest.mark.parametrize("kind", ["injected", "ours"])
def test_lightning_seeds_workers_only(lightning: list[Rank], kind: str) -> None:
    """With seed_everything(workers=True) workers seed themselves; those that are threads leave the training's alone."""
    assert all(rank["facts"][kind]["seed kept"] for rank in lightning)


@pytest.mark.parametrize("kind", LIGHTNING_KINDS)
@pytest.mark.parametrize(("stop", "epoch", "steps"), [("step8", 1, 2), ("step12", 2, 0), ("epoch0", 1, 0)])
def test_lightning_resumes(
    lightning: list[Rank], lightning_resumed: list[Rank], kind: str, stop: str, epoch: int, steps: int
) -> None:
    """From a checkpoint inside an epoch, at its last batch or at its end come the batches that were left, no others."""
    for rank, resumed in zip(lightning, lightning_resumed, strict=True):
        got = resumed["runs"].get(f"{kind} {stop}", [])
        assert got == [[]] * epoch + [rank["runs"][kind][epoch][steps:], *rank["runs"][kind][epoch + 1 :]]


# ---- Lightning, one device


@pytest.fixture(scope="module")
def alone(store: Path, folder: Callable[[str], Path]) -> list[Rank]:
    """Uninterrupted runs that leave checkpoints."""
    pytest.importorskip("lightning")
    return run("with_lightning.py", store, folder("lightning alone"), ranks=1)


@pytest.fixture(scope="module")
def alone_resumed(store: Path, folder: Callable[[str], Path], alone: list[Rank]) -> list[Rank]:
    """Runs from those checkpoints, in a fresh process."""
    return run("with_lightning.py", store, folder("lightning alone"), "resume", ranks=1)


@pytest.mark.parametrize("kind", ["alone", "alone thread", "alone process"])
@pytest.mark.parametrize(("stop", "epoch", "steps"), [("step8", 0, 8), ("step12", 1, 0)])
def test_lightning_resumes_torchs_order(
    alone: list[Rank], alone_resumed: list[Rank], kind: str, stop: str, epoch: int, steps: int
) -> None:
    """A checkpoint at the last batch of an epoch, which Lightning takes for the next one, makes no epoch empty."""
    assert_complete(alone, kind, LIGHTNING_EPOCHS)
    expected = alone[0]["runs"][kind]
    got = alone_resumed[0]["runs"][f"{kind} {stop}"]
    assert got == [[]] * epoch + [expected[epoch][steps:], *expected[epoch + 1 :]]


@pytest.mark.parametrize("kind", ["alone", "alone thread", "alone process"])
def test_lightning_goes_on_with_the_next_epochs_pictures(
    alone: list[Rank], alone_resumed: list[Rank], kind: str
) -> None:
    """From an epoch's end, whose state Lightning does not hand back, come the right pictures, in another order."""
    for epoch in range(1, LIGHTNING_EPOCHS):
        assert samples(alone_resumed, f"{kind} epoch0", epoch) == samples(alone, kind, epoch)


# ---- Accelerate, two ranks


@pytest.fixture(scope="module")
def accelerate(store: Path, folder: Callable[[str], Path]) -> list[Rank]:
    """What two ranks got through `prepare`, and around it."""
    pytest.importorskip("accelerate")
    return run("with_accelerate.py", store, folder("accelerate"), ranks=2)


def test_accelerate_reads_whole_batches(accelerate: list[Rank]) -> None:
    """It makes torch's loader of ours; collate and the dataset, which can be read by whole batches only, go along."""
    assert all(rank["facts"]["collate"] and rank["facts"]["workers"] == 2 for rank in accelerate)
    assert_complete(accelerate, "prepared", 2)


def test_accelerate_shares_out_a_sampler_for_one(accelerate: list[Rank]) -> None:
    """ShuffleSampler(rank=0, world=1) shuffles for all ranks, and the pictures follow its epochs."""
    assert_complete(accelerate, "sampled", 2)


def test_accelerate_does_not_share_out_twice(accelerate: list[Rank]) -> None:
    """It hands a loader back whose sampler shares out by itself, instead of giving each rank a share of its share."""
    assert all(rank["facts"]["handed back"] for rank in accelerate)
    assert_complete(accelerate, "shared out", 2)


def test_accelerate_leaves_make_loader_alone(accelerate: list[Rank]) -> None:
    """It goes through `prepare` as it is, and shares out by itself."""
    assert all(rank["facts"]["left alone"] for rank in accelerate)
    assert_complete(accelerate, "left alone", 2)


@pytest.mark.parametrize("kind", ["", "torchdata "])
def test_accelerate_saves_and_loads_the_state(accelerate: list[Rank], kind: str) -> None:
    """Ours, registered for checkpointing, and torchdata's, which it can make from ours, go on where they were."""
    if kind and importlib.util.find_spec("torchdata") is None:
        pytest.skip("torchdata is not installed")
    for rank in accelerate:
        stopped, rest, resumed = (rank["runs"][kind + name][0] for name in ("stopped", "went on", "resumed"))
        assert (len(stopped), len(rest)) == (3, 3)
        assert resumed == rest


# ---- torchrun and DistributedDataParallel: two ranks, then three

OWN_KINDS = ["made", "threads", "processes"]


@pytest.fixture(scope="module")
def two(store: Path, folder: Callable[[str], Path]) -> list[Rank]:
    """Uninterrupted runs of two ranks, which save a state in the middle of epoch 1."""
    return run("with_torchrun.py", store, folder("torchrun"), ranks=2)


@pytest.fixture(scope="module")
def three(store: Path, folder: Callable[[str], Path], two: list[Rank]) -> list[Rank]:
    """Three ranks that go on from there."""
    return run("with_torchrun.py", store, folder("torchrun"), "resume", ranks=3)


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_torchrun_gets_each_sample_once(two: list[Rank], kind: str) -> None:
    """`make_loader`, and DataLoader with ShuffleSampler, under DDP."""
    assert_complete(two, kind, 3)
    assert two[0]["facts"][kind] == two[1]["facts"][kind]


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_three_ranks_go_on_where_two_stopped(two: list[Rank], three: list[Rank], kind: str) -> None:
    """Before and after the change every sample of the epoch comes once; the next one is as it would have been."""
    before = sorted(sample for rank in two for batch in batches(rank, kind, 1)[:3] for sample in batch)
    after = samples(three, kind, 1)
    assert (len(before), len(after)) == (COUNT // 2, COUNT // 2)
    assert sorted(before + after) == samples(two, kind, 1)
    assert samples(three, kind, 2) == samples(two, kind, 2)


# ---- the Trainer of transformers, one process


@pytest.fixture(scope="module")
def trainer(store: Path, folder: Callable[[str], Path]) -> list[Rank]:
    """Two short trainings."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return run("with_trainer.py", store, folder("trainer"), ranks=1)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_trainer_gets_each_sample_once(trainer: list[Rank], kind: str) -> None:
    """From its own loader with our collate in the collator, and from ours."""
    assert_complete(trainer, kind, 2)
