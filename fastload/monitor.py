"""What a training loop gets from its loader: samples per second, batch wait, CPU and GPU use.

    with Monitor() as monitor:
        for batch in monitor.watch(loader):
            step(batch)
    print(monitor.report().as_dict())

The clock runs from entering the `with` block to leaving it, so what else happens in the block counts as time that was
not spent waiting. A batch's wait is the time inside the loader's `next`; the first one includes making the iterator
(the start of the workers), and the last `next`, which brings no batch, counts in the total. A share of waits near zero
says that the loader keeps up; it does not say how busy the accelerator is: kernels run on after `step` returns.

Costs: about 2 us and 24 bytes per batch; a few ms to read the process tree on entering and leaving (on macOS and
Windows once a second too, since there the CPU time of a worker that ended is not to be had any more). CPU time comes
in steps of 10 ms on Linux. One thread watches; loops may follow each other in one block, and make one report.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from array import array
from collections.abc import Generator, Iterable, Mapping, Sized
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What a `Monitor` measured. Times are in seconds.

    samples, batches: how many arrived. seconds: wall time in the `with` block. samples_per_second: over all of it.
    stall_fraction: waiting for batches, as a share of the wall time. cpu_percent: of the process and all its
    descendants, per cent of one core, so 200 is two cores. accelerator_busy: the share of the wall time that was given
    to `Monitor.busy`; None if it never was. gpu_utilization: mean per cent as NVML has it; None without NVML or a GPU.
    first_batch_seconds: the wait of the first batch, the start of the workers included; None without batches.
    timeline: per batch (seconds since the start, samples so far, wait of that batch).
    """

    samples: int
    batches: int
    seconds: float
    samples_per_second: float
    stall_fraction: float
    cpu_percent: float
    accelerator_busy: float | None
    gpu_utilization: float | None
    first_batch_seconds: float | None
    timeline: tuple[tuple[float, int, float], ...] = field(repr=False)

    def as_dict(self) -> dict[str, int | float | None]:
        """All but the timeline, ready for `json.dumps`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "timeline"}


class Monitor:
    """Measures the loops in one `with` block; `report` tells, then or already within the block.

    device: the GPU whose utilisation is sampled, as torch names devices; None (the default) takes the current CUDA
    device, where there is one. Raises RuntimeError for a device that torch doesn't know, and when entered twice.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        if isinstance(device, int):
            device = f"cuda:{device}"
        self._device = None if device is None else torch.device(device)
        self._cpu = _TreeCpu()
        self._gpu: _GpuSampler | None = None
        self._start: float | None = None
        self._end: float | None = None
        self._cpu_start = self._cpu_end = 0.0
        self._busy: float | None = None
        self._waited = 0.0
        self._samples = 0
        self._arrivals, self._counts, self._waits = array("d"), array("q"), array("d")

    def __enter__(self) -> Monitor:
        if self._start is not None:
            raise RuntimeError("this Monitor has already measured: make a new one for each `with` block")
        self._gpu = _GpuSampler.start(self._device)
        self._cpu_start = self._cpu.read()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = time.perf_counter()
        self._cpu_end = self._cpu.read()
        if self._gpu is not None:
            self._gpu.stop()

    def watch(self, iterable: Iterable[T], batch_size: int | None = None) -> Generator[T, None, None]:
        """Yield what `iterable` yields, and record when each batch came, how long it took and how many samples it has.

        The samples of a batch are the length of the first dimension of the first tensor or array in it, searched
        through tuples, lists and dicts; without one, its `len`, and 1 for what has none. batch_size: count this
        instead, where that would mislead (a tuple of single images). Breaking out of the loop closes the iterator.
        Raises RuntimeError outside of the `with` block, ValueError for a batch_size below 1.
        """
        if self._start is None or self._end is not None:
            raise RuntimeError("watch() was called outside of the monitor's block: `with Monitor() as monitor: ...`")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give the samples per batch, 1 or more, or None to count them")
        return self._watch(iterable, batch_size, self._start)

    def _watch(self, iterable: Iterable[T], batch_size: int | None, start: float) -> Generator[T, None, None]:
        asked = time.perf_counter()
        iterator = iter(iterable)
        try:
            while True:
                try:
                    batch = next(iterator)
                except StopIteration:
                    self._waited += time.perf_counter() - asked
                    return
                now = time.perf_counter()
                self._waited += now - asked
                self._samples += _count(batch) if batch_size is None else batch_size
                self._arrivals.append(now - start)
                self._counts.append(self._samples)
                self._waits.append(now - asked)
                self._cpu.glance(now)
                yield batch
                del batch  # or its buffer could not be reused while the next one is made
                asked = time.perf_counter()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def busy(self, seconds: float) -> None:
        """Add device-busy seconds, as the training loop measured them (CUDA events, a profiler)."""
        if not seconds >= 0:
            raise ValueError(f"busy({seconds}): give seconds, 0 or more")
        self._busy = (self._busy or 0.0) + seconds

    def report(self) -> Report:
        """What was measured: within the block up to now, after it in all. Raises RuntimeError before the block."""
        if self._start is None:
            raise RuntimeError("nothing was measured yet: enter `with Monitor() as monitor:` first")
        end, cpu = self._end, self._cpu_end
        if end is None:
            end, cpu = time.perf_counter(), self._cpu.read()
        seconds = max(end - self._start, 1e-9)
        return Report(
            samples=self._samples,
            batches=len(self._waits),
            seconds=seconds,
            samples_per_second=self._samples / seconds,
            stall_fraction=self._waited / seconds,
            cpu_percent=100 * max(0.0, cpu - self._cpu_start) / seconds,
            accelerator_busy=None if self._busy is None else self._busy / seconds,
            gpu_utilization=None if self._gpu is None else self._gpu.mean(),
            first_batch_seconds=self._waits[0] if self._waits else None,
            timeline=tuple(zip(self._arrivals, self._counts, self._waits, strict=True)),
        )


def _count(batch: object) -> int:
    """How many samples a batch has, by the rule in `Monitor.watch`."""
    rows = _rows(batch)
    if rows is not None:
        return rows
    if isinstance(batch, Mapping):  # its own length counts the fields
        return next((len(v) for v in batch.values() if _sized(v)), 1)
    return len(batch) if _sized(batch) else 1  # type: ignore[arg-type]


def _rows(batch: object) -> int | None:
    shape = getattr(batch, "shape", None)  # a tensor's or an array's
    if isinstance(shape, tuple):
        return int(shape[0]) if shape else None
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (tuple, list)):
        return None
    return next((rows for rows in map(_rows, batch) if rows is not None), None)


def _sized(value: object) -> bool:
    return isinstance(value, Sized) and not isinstance(value, (str, bytes)) and getattr(value, "shape", None) != ()


class _TreeCpu:
    """CPU seconds of this process and all its descendants, those that ended included.

    inherits: a parent's `children_*` times grow by what a reaped child used (Linux), so the living know all. Elsewhere
    they stay 0, and what a process had used when it was last seen is kept.
    """

    def __init__(self, inherits: bool = sys.platform == "linux") -> None:
        self._inherits = inherits
        self._seconds: dict[psutil.Process, float] = {}  # a Process is its id and start time, so a reused id is another
        self._glanced = -math.inf

    def glance(self, now: float) -> None:
        """Take note of the living once a second, where the dead would be forgotten."""
        if not self._inherits and now - self._glanced >= 1:
            self._glanced = now
            self.read()

    def read(self) -> float:
        if self._inherits:
            self._seconds.clear()
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                times = process.cpu_times()
                self._seconds[process] = sum(times[:4]) if self._inherits else times.user + times.system
        return sum(self._seconds.values())


class _GpuSampler:
    """A thread that reads one GPU's utilisation every 100 ms until `stop`."""

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml, self._handle = nvml, handle
        self._sum, self._count = 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastload-monitor", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, device: torch.device | None) -> _GpuSampler | None:
        """None without a CUDA device, nvidia-ml-py or a driver that answers it."""
        try:
            import pynvml
        except ImportError:
            return None
        gpu = _cuda_device(device)
        if gpu is None:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _nvml_handle(pynvml, *gpu))
        except pynvml.NVMLError:
            return None

    def _run(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):  # such as a MIG slice, which has no utilisation
            while not self._stop.wait(0.1):
                self._sum += self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
                self._count += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def mean(self) -> float | None:
        return self._sum / self._count if self._count else None


def _cuda_device(device: torch.device | None) -> tuple[int, str | None] | None:
    """The index and, where torch knows it, the UUID of the CUDA device that is meant; None if there is none."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return index, None if uuid is None else str(uuid)


def _nvml_handle(nvml: Any, index: int, uuid: str | None) -> object:
    """NVML's handle for torch's device.

    NVML counts all GPUs in bus order; torch counts those in CUDA_VISIBLE_DEVICES, in that order. The UUID is the same
    in both; without it the index is looked up in the variable, which holds indices or UUIDs.
    """
    if uuid is not None:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[index].strip() if index < len(visible) else ""
    if name.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    return nvml.nvmlDeviceGetHandleByIndex(int(name) if name.isdigit() else index)


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw samples per second and the wait of each batch over time, as a PNG of 1080 x 720 pixels.

    Raises ImportError without matplotlib, ValueError for a report without batches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "fastload[plot]"') from error
    if not report.batches:
        raise ValueError("there is nothing to plot: the report has no batches, so no watch() loop ran in its block")
    when, samples, waits = np.array(report.timeline).T
    edges, rate = _rates(when, samples)
    waits = np.maximum(waits * 1000, 1e-3)  # ms; the axis is logarithmic, and below 1 us nothing is to be seen
    decades = max(-3, np.floor(np.log10(waits.min() / 1.5))), np.floor(np.log10(waits.max())) + 1
    figure = Figure(figsize=(9, 6), layout="constrained")
    words = f"{report.samples_per_second:,.0f} samples/s, {report.stall_fraction:.1%} of {report.seconds:,.1f} s"
    figure.suptitle(f"{words} spent waiting for batches")
    top, bottom = figure.subplots(2, sharex=True)
    top.stairs(rate, edges, fill=True, color="tab:blue", alpha=0.25)
    top.stairs(rate, edges, baseline=None, color="tab:blue", linewidth=1.5)
    top.set(ylabel="samples/s", ylim=(0, None))
    top.yaxis.set_major_formatter("{x:,g}")
    bottom.plot(when, waits, ".", color="tab:red", markersize=4, clip_on=False)
    bottom.set(ylabel="wait per batch (ms)", yscale="log", ylim=10.0 ** np.array(decades))
    bottom.set(xlabel="time (s)", xlim=(0, edges[-1]))
    bottom.yaxis.set_major_formatter("{x:,g}")
    bottom.minorticks_off()
    for panel in (top, bottom):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, dpi=120, format="png")


def _rates(when: Any, samples: Any) -> tuple[Any, Any]:
    """Bin edges in seconds, and samples per second in each: four batches or more per bin, 100 bins at most.

    A batch's samples are spread over the time since the one before it, so that a bin which just misses a batch does
    not drop by it.
    """
    edges = np.linspace(0, max(when[-1], 1e-9), 1 + min(100, max(1, len(when) // 4)))
    arrived = np.interp(edges, [0, *when], [0, *samples])
    return edges, np.diff(arrived) / np.diff(edges)
