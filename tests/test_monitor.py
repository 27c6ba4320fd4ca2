from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from fastload import monitor as module
from fastload.monitor import Monitor, Report, plot

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"  # CPU seconds, however slow the machine is


def sampler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastload-monitor"]


def measured(batches: int = 12) -> Report:
    with Monitor() as monitor:
        for _ in monitor.watch([torch.zeros(4)] * batches):
            pass
    return monitor.report()


# ---- counting


def test_a_stock_loader_is_counted_batch_by_batch() -> None:
    """The last, shorter batch counts what it holds, and the timeline tells when each came."""
    loader = DataLoader(TensorDataset(torch.arange(10), torch.arange(10)), batch_size=4)
    with Monitor() as monitor:
        seen = [pair[0].tolist() for pair in monitor.watch(loader)]
    report = monitor.report()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (report.samples, report.batches) == (10, 3)
    assert [row[1] for row in report.timeline] == [4, 8, 10]
    times = [row[0] for row in report.timeline]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] <= report.seconds
    assert report.samples_per_second == pytest.approx(10 / report.seconds)
    assert report.first_batch_seconds == report.timeline[0][2]
    assert sum(row[2] for row in report.timeline) <= report.stall_fraction * report.seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(8, 3, 4, 4), 8),
        (np.zeros((5, 2)), 5),
        ((torch.zeros(8, 3), torch.zeros(8)), 8),
        ([("a.jpg", "b.jpg"), torch.zeros(2)], 2),
        ({"epoch": torch.tensor(3), "images": {"left": torch.zeros(6, 3)}}, 6),
        ({"path": ["a", "b", "c"], "label": [0, 1, 2]}, 3),
        (["a.jpg", "b.jpg"], 2),
        (torch.zeros(0, 3), 0),
        (range(7), 7),
        (torch.tensor(1.0), 1),
        ("a.jpg", 1),
        ({"path": "a.jpg"}, 1),
        (None, 1),
    ],
)
def test_samples_of_a_batch(batch: Any, samples: int) -> None:
    """The first tensor's leading dimension counts, else the length, else one."""
    with Monitor() as monitor:
        for _ in monitor.watch([batch]):
            pass
    assert monitor.report().samples == samples


def test_batch_size_overrules_what_the_batch_looks_like() -> None:
    """A tuple of single images would count as its channels, so the caller may say how many samples there are."""
    with Monitor() as monitor:
        for _ in monitor.watch([(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))], batch_size=2):
            pass
    assert monitor.report().samples == 2


def test_loops_in_one_block_add_up() -> None:
    """Two epochs make one report."""
    with Monitor() as monitor:
        for _ in range(2):
            for _ in monitor.watch([torch.zeros(3), torch.zeros(2)]):
                pass
    assert (monitor.report().samples, monitor.report().batches) == (10, 4)


# ---- waiting


class Slow:
    """Sleeps 30 ms for the iterator, for each of its two batches and after the last."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        time.sleep(0.03)
        return self.batches()

    def batches(self) -> Iterator[torch.Tensor]:
        for _ in range(2):
            time.sleep(0.03)
            yield torch.zeros(1)
        time.sleep(0.03)


def test_waits_hold_all_the_time_in_the_loader() -> None:
    """The first wait includes the iterator's start, the total also the loader's end."""
    with Monitor() as monitor:
        for _ in monitor.watch(Slow()):
            pass
    report = monitor.report()
    assert report.first_batch_seconds is not None
    assert report.first_batch_seconds > 0.055
    assert report.timeline[1][2] > 0.025
    assert report.stall_fraction * report.seconds > 0.11


def test_waits_hold_none_of_the_time_in_the_step() -> None:
    """What the training step takes is no wait, however long it is."""
    stepping = 0.0
    with Monitor() as monitor:
        for _ in monitor.watch([torch.zeros(1)] * 5):
            began = time.perf_counter()
            time.sleep(0.02)
            stepping += time.perf_counter() - began
    report = monitor.report()
    assert report.stall_fraction * report.seconds <= report.seconds - stepping


# ---- leaving


def test_breaking_out_closes_the_iterator() -> None:
    """A loader whose consumer stops early is told so at once."""
    closed = []

    def loader() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    with Monitor() as monitor:
        iterator = loader()  # held here, so that only close() can end it
        for batch in monitor.watch(iterator):
            if batch == 2:
                break
        assert closed == [True]
    assert monitor.report().batches == 3


def test_breaking_out_ends_the_workers_of_a_stock_loader() -> None:
    """An iterator that has no close() is dropped, which is what makes torch stop its workers."""
    loader = DataLoader(TensorDataset(torch.arange(64)), batch_size=4, num_workers=1)
    with Monitor() as monitor:
        for _ in monitor.watch(loader):
            break
    assert multiprocessing.active_children() == []


def test_a_batch_is_let_go_before_the_next_is_made() -> None:
    """Holding the last batch would keep a loader from reusing its buffer."""

    class Batch:
        alive = 0

        def __init__(self) -> None:
            Batch.alive += 1

        def __del__(self) -> None:
            Batch.alive -= 1

    before = []

    def loader() -> Iterator[Batch]:
        for _ in range(3):
            before.append(Batch.alive)
            yield Batch()

    with Monitor() as monitor:
        iterator = monitor.watch(loader())
        for _ in range(3):
            next(iterator)
    assert before == [0, 0, 0]


def test_the_clock_stops_with_the_block_even_on_an_error() -> None:
    """An error in the loader or the step comes through, and what was measured until then remains."""
    monitor = Monitor()

    def loader() -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise ValueError("rotten")

    with pytest.raises(ValueError, match="rotten"), monitor:
        for _ in monitor.watch(loader()):
            pass
    assert monitor.report() == monitor.report()
    assert monitor.report().samples == 2


def test_a_report_within_the_block_says_how_far_it_is() -> None:
    """A training loop can log while it runs."""
    with Monitor() as monitor:
        batches = monitor.watch([torch.zeros(2)] * 2)
        next(batches)
        early = monitor.report()
        next(batches)
        late = monitor.report()
    assert (early.samples, late.samples) == (2, 4)
    assert 0 < early.seconds < late.seconds < monitor.report().seconds


# ---- misuse


def test_misuse_is_refused_with_the_way_out() -> None:
    """Each message names what was given and what to do."""
    monitor = Monitor()
    with pytest.raises(RuntimeError, match=r"with Monitor\(\) as monitor"):
        monitor.watch([])
    with pytest.raises(RuntimeError, match="nothing was measured yet"):
        monitor.report()
    with monitor:
        with pytest.raises(ValueError, match="batch_size=0"):
            monitor.watch([], batch_size=0)
        for seconds in (-1.0, math.nan):
            with pytest.raises(ValueError, match="0 or more"):
                monitor.busy(seconds)
    with pytest.raises(RuntimeError, match="outside"):
        monitor.watch([])
    with pytest.raises(RuntimeError, match="make a new one"), monitor:
        pass
    with pytest.raises(RuntimeError, match="banana"):
        Monitor("banana")


# ---- the report


def test_a_report_as_json() -> None:
    """All fields but the timeline, as plain values; and nobody changes a report."""
    report = measured()
    values = json.loads(json.dumps(report.as_dict()))
    assert values == {f.name: getattr(report, f.name) for f in fields(report) if f.name != "timeline"}
    with pytest.raises(FrozenInstanceError):
        report.samples = 1  # type: ignore[misc]


def test_an_empty_block_reports_nothing_rather_than_fails() -> None:
    """No batch is no error: rates are 0 and what was not measured is None."""
    report = measured(0)
    assert (report.samples, report.batches, report.samples_per_second) == (0, 0, 0.0)
    assert (report.first_batch_seconds, report.accelerator_busy, report.timeline) == (None, None, ())


def test_busy_is_a_share_of_the_wall_time() -> None:
    """The caller's device-busy seconds add up."""
    with Monitor() as monitor:
        monitor.busy(0.25)
        monitor.busy(0.5)
    report = monitor.report()
    assert report.accelerator_busy == pytest.approx(0.75 / report.seconds)


# ---- CPU


def burn() -> None:
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass


def burnt(report: Report) -> float:
    return report.cpu_percent * report.seconds / 100


@contextmanager
def burnt_child(depth: int = 1) -> Iterator[None]:
    """A child process (of a child, for a depth of 2) that has used 0.3 s of CPU, lives during the block, then ends."""
    code = BURN + "print('burnt', flush=True)\ninput()"
    for _ in range(depth - 1):
        code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield
        child.communicate("\n")


def test_cpu_counts_this_process_within_the_block_only() -> None:
    """Work in this process shows, in per cent of one core; what it did before does not."""
    burn()
    with Monitor() as idle:
        pass
    with Monitor() as monitor:
        burn()
    assert burnt(idle.report()) < 0.25
    assert burnt(monitor.report()) > 0.25


@pytest.mark.parametrize("depth", [1, 2])
def test_cpu_counts_running_children(depth: int) -> None:
    """Worker processes that live on are counted, and so are their own."""
    with Monitor() as monitor, burnt_child(depth):
        report = monitor.report()
    assert burnt(report) > 0.25


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system forgets what an ended child used")
def test_cpu_counts_children_that_ended() -> None:
    """The workers of a finished epoch are counted, although nothing looked at them while they lived."""
    with Monitor() as monitor, burnt_child(depth=2):
        pass
    assert burnt(monitor.report()) > 0.25


@pytest.mark.parametrize("inherits", sorted({False, sys.platform == "linux"}))
def test_cpu_of_a_child_counts_once(inherits: bool) -> None:
    """A child that was seen alive is neither forgotten nor counted again when it ends, whoever keeps its times."""
    cpu = module._TreeCpu(inherits)
    before = cpu.read()
    with burnt_child():
        cpu.glance(time.perf_counter())
        alive = cpu.read()
    after = cpu.read()
    assert alive - before > 0.25
    assert -0.05 < after - alive < 0.25


def test_cpu_of_a_child_that_only_a_glance_saw() -> None:
    """Where a parent inherits nothing (macOS, Windows), the glance at a batch is what remains of an ended worker."""
    cpu = module._TreeCpu(inherits=False)
    before = cpu.read()
    with burnt_child():
        cpu.glance(time.perf_counter())
    assert cpu.read() - before > 0.25


# ---- GPU


class FakeNvml(ModuleType):
    """Stands in for pynvml, since no NVIDIA driver is where the tests run: eight GPUs, read as 40, 60, 40 per cent."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.reads = 0
        self.sampled = threading.Event()
        self.handle: object = None

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name, as those below
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not 0 <= index < 8:
            raise self.NVMLError(f"no GPU {index}")
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> SimpleNamespace:  # noqa: N802
        self.handle = handle
        self.reads += 1
        if self.reads == 4:
            self.sampled.set()
            raise self.NVMLError("fell off the bus")
        return SimpleNamespace(gpu=40 if self.reads % 2 else 60)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(module, "_cuda_device", lambda device: (1, "0123-abcd"))
    return fake


def test_gpu_utilisation_is_the_mean_of_the_samples(nvml: FakeNvml) -> None:
    """The device is found by UUID, a read that fails ends the sampling only, and the thread ends with the block."""
    with Monitor() as monitor:
        assert len(sampler_threads()) == 1
        assert nvml.sampled.wait(60)
    assert monitor.report().gpu_utilization == pytest.approx((40 + 60 + 40) / 3)
    assert nvml.handle == "GPU-0123-abcd"
    assert sampler_threads() == []
    assert nvml.open == 0


def test_the_gpu_thread_ends_when_the_block_fails(nvml: FakeNvml) -> None:
    """An error in the loop leaves no thread behind."""
    with pytest.raises(KeyError), Monitor():
        raise KeyError("step")
    assert sampler_threads() == []
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "index", "handle"),
    [(None, 2, 2), ("5,3", 1, 3), ("GPU-aa,GPU-bb", 1, "GPU-bb"), ("", 0, 0), (" 4 , 6", 1, 6)],
)
def test_without_a_uuid_the_index_goes_through_the_visible_devices(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, handle: object
) -> None:
    """NVML counts all GPUs, torch only those in CUDA_VISIBLE_DEVICES."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert module._nvml_handle(FakeNvml(), index, None) == handle


def no_driver(nvml: FakeNvml, patch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise nvml.NVMLError("Driver Not Loaded")

    patch.setattr(nvml, "nvmlInit", init)


def no_package(nvml: FakeNvml, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "pynvml", None)


def no_such_gpu(nvml: FakeNvml, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "_cuda_device", lambda device: (99, None))


def no_cuda(nvml: FakeNvml, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "_cuda_device", lambda device: None)


@pytest.mark.parametrize("lack", [no_driver, no_package, no_such_gpu, no_cuda])
def test_whatever_nvml_lacks_gives_none(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, lack: Callable[[FakeNvml, pytest.MonkeyPatch], None]
) -> None:
    """Without GPU, driver or package there is no figure, no thread and no error."""
    lack(nvml, monkeypatch)
    with Monitor() as monitor:
        assert sampler_threads() == []
    assert monitor.report().gpu_utilization is None
    assert nvml.reads == 0


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_cpu_device_has_no_gpu_utilisation(device: str | torch.device) -> None:
    """Asked for the CPU, no GPU is looked at, even where there is one."""
    with Monitor(device) as monitor:
        assert sampler_threads() == []
    assert monitor.report().gpu_utilization is None


@pytest.mark.gpu
def test_a_real_gpu_at_work_shows() -> None:
    """NVML's figure for torch's device is above zero while torch keeps it busy."""
    if not torch.cuda.is_available():
        if os.environ.get("FASTLOAD_REQUIRE_CUDA") == "1":
            pytest.fail("FASTLOAD_REQUIRE_CUDA=1, and torch finds no CUDA device")
        pytest.skip("needs a CUDA device")
    matrix = torch.randn(4096, 4096, device="cuda")
    with Monitor() as monitor:
        until = time.perf_counter() + 2
        while time.perf_counter() < until:
            matrix = torch.nn.functional.normalize(matrix @ matrix)
            torch.cuda.synchronize()
    utilization = monitor.report().gpu_utilization
    assert utilization is not None
    assert 0 < utilization <= 100


# ---- the picture


def test_a_plot_is_a_picture_with_ink_in_both_halves(tmp_path: Path) -> None:
    """A PNG of the promised size, drawn without pyplot."""
    path = tmp_path / "run.png"
    plot(measured(40), path)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1080, 720))
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 20).any(axis=1)
    red = (pixels[..., 0] - pixels[..., 2] > 100).any(axis=1)
    assert blue[:360].any()
    assert red[360:].any()


@pytest.mark.parametrize("row", [(0.0, 4, 0.0), (1e-7, 4, 1e-7), (5000.0, 4, 5000.0)])
def test_a_plot_of_one_batch(tmp_path: Path, row: tuple[float, int, float]) -> None:
    """The shortest and the longest waits fit."""
    plot(replace(measured(1), timeline=(row,)), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    """A report without batches has no picture."""
    with pytest.raises(ValueError, match="no batches"):
        plot(measured(0), tmp_path / "none.png")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message is the command that helps."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastload\[plot\]"'):
        plot(measured(), tmp_path / "none.png")


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(0, 1000)), min_size=1, max_size=500))
def test_bins_hold_every_sample(gaps: list[tuple[float, int]]) -> None:
    """The bins' rates times their widths add up to the samples, and bins are few."""
    when = np.cumsum([gap for gap, _ in gaps])
    samples = np.cumsum([count for _, count in gaps])
    edges, rate = module._rates(when, samples)
    assert (rate * np.diff(edges)).sum() == pytest.approx(samples[-1])
    assert len(rate) <= max(1, min(100, len(gaps) // 4))
    assert (edges[0], edges[-1]) == (0, pytest.approx(when[-1]))


def test_nothing_optional_is_loaded_before_it_is_needed() -> None:
    """Neither importing nor measuring loads matplotlib, and plotting loads no pyplot."""
    code = """
import sys, tempfile, os
from fastload.monitor import Monitor, plot
with Monitor("cpu") as monitor:
    list(monitor.watch([1, 2]))
assert "matplotlib" not in sys.modules
plot(monitor.report(), os.path.join(tempfile.mkdtemp(), "a.png"))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
