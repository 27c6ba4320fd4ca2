"""What this machine has, and what to do about what is missing.

`usable_cores` counts the cores that this process is granted, which in a container are often fewer than the machine
shows; the loader sizes its workers by it, so importing this module loads neither torch nor anything else that is heavy.

`diagnose` looks at everything that fastload meets and gives one `Finding` per row. It never raises: a check that fails
is a row that says so, and the others stand. It imports most of the libraries it asks about, so it takes a few seconds;
it changes nothing and, past the CUDA row, keeps nothing open.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Literal, NamedTuple

GIB = 2**30


class Finding(NamedTuple):
    """One row of `diagnose`.

    status: "ok"; "warn": fastload works, and `advice` says what would be better; "missing": something that fastload
    needs is not there, or could not be asked. advice: the next step to take, empty when ok.
    """

    name: str
    value: str
    status: Literal["ok", "warn", "missing"] = "ok"
    advice: str = ""


def usable_cores(root: str | os.PathLike[str] = "/") -> int:
    """How many cores this process may use, at least 1.

    The lesser of the CPU affinity and the quota of the control groups around the process (docker's `--cpus`, a
    Kubernetes limit), rounded up: a quota of 1.5 cores gives 2. `root`: the folder that holds `proc` and `sys`.
    """
    quota = _quota(Path(root))
    return max(1, _affinity() if quota is None else min(_affinity(), math.ceil(quota)))


def diagnose() -> list[Finding]:
    """Look at this machine: one finding per row, always the same rows in the same order. Never raises."""
    return [_guarded(name, check) for name, check in _CHECKS.items()]


def _guarded(name: str, check: Callable[[str], Finding]) -> Finding:
    try:
        return check(name)
    except Exception as error:  # whatever breaks one row is that row's news
        return Finding(name, _words(error), "missing", f"the check of {name} failed: its value says why")


def _words(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")


# ---- cores


def _affinity() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(root: Path) -> float | None:
    """The tightest CPU quota, in cores, of the control groups from this process's own up to the mount; None: no quota.

    In a container `/proc/self/cgroup` may name a path of the host that is not mounted here; the walk upwards passes
    over what is not there and ends at the mount itself, which is then the container's own group.
    """
    mount = root / "sys" / "fs" / "cgroup"
    quotas = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":  # version 2
            bases, read = [mount], _quota_v2
        elif "cpu" in controllers.split(","):  # version 1; distributions mount it under either name
            bases, read = [mount / controllers, mount / "cpu"], _quota_v1
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        for base in bases:
            quotas += [read(base / level) for level in (inside, *inside.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Cores in a quota and its period; None for "max", -1, "" and whatever else is no limit."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _text(path: Path) -> str:
    """What a file says; nothing where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _cores(name: str, root: str | os.PathLike[str] = "/") -> Finding:
    usable, affinity, quota = usable_cores(root), _affinity(), _quota(Path(root))
    limit = "none" if quota is None else f"{quota:g}"
    value = f"{usable} usable (affinity {affinity}, quota {limit}, total {os.cpu_count()})"
    if usable < affinity:
        advice = (
            f"torch and OpenCV see {affinity} cores and start a thread for each, and the quota then halts them all: "
            f"set OMP_NUM_THREADS={usable}"
        )
        return Finding(name, value, "warn", advice)
    if usable == 1:
        return Finding(name, value, "warn", "decoding and training share one core: grant the process more if you can")
    return Finding(name, value)


# ---- libraries


def _python(name: str) -> Finding:
    return Finding(name, f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})")


def _platform(name: str) -> Finding:
    return Finding(name, platform.platform())


def _fastload(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version("fastload"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "missing", "pip install fastload, or in a checkout: pip install -e .")


def _needed(module: str, package: str) -> Callable[[str], Finding]:
    """A check of a library that fastload can't do without."""

    def check(name: str) -> Finding:
        try:
            return Finding(name, _version(importlib.import_module(module), package))
        except ModuleNotFoundError as error:
            return Finding(name, _words(error), "missing", f'pip install "{package}"')
        except Exception as error:  # a library that is half there raises whatever it likes
            return Finding(name, _words(error), "missing", f'pip install --force-reinstall --no-deps "{package}"')

    return check


def _for_packing(module: str, package: str) -> Callable[[str], Finding]:
    """A check, without importing it, of a library that only packing needs."""

    def check(name: str) -> Finding:
        if importlib.util.find_spec(module) is None:
            advice = f'`fastload pack` re-cuts JPEGs with it: pip install "{package}", or pack with --no-tiles'
            return Finding(name, "not installed", "warn", advice)
        try:
            return Finding(name, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            return Finding(name, "of unknown version")

    return check


def _version(module: ModuleType, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # the same module from elsewhere: opencv-python, conda
        return str(getattr(module, "__version__", "of unknown version"))


def _optional(module: str, package: str, extra: str, purpose: str) -> Callable[[str], Finding]:
    """A check of a library that one feature needs: to be without both is no fault."""

    def check(name: str) -> Finding:
        try:
            return Finding(name, _version(importlib.import_module(module), package))
        except ModuleNotFoundError as error:
            if error.name != module:  # it is there, and something that it needs is not
                raise
            return Finding(name, "not installed (optional)", "warn", f'for {purpose}: pip install "fastload[{extra}]"')

    return check


def _turbojpeg(name: str) -> Finding:
    """PyTurboJPEG is only a binding: the library is the system's, and the two have to match."""
    finding = _optional("turbojpeg", "PyTurboJPEG", "turbojpeg", "a second JPEG backend")(name)
    if finding.status != "ok":
        return finding
    try:
        importlib.import_module("turbojpeg").TurboJPEG()
    except Exception as error:  # RuntimeError, OSError, KeyError: by version and platform
        value = f"{finding.value}, but libturbojpeg does not load: {_words(error)}"
        return Finding(name, value, "warn", _TURBOJPEG_ADVICE)
    return finding._replace(value=f"{finding.value}, libturbojpeg loads")


_TURBOJPEG_ADVICE = (
    "only FASTLOAD_JPEG_BACKEND=turbojpeg needs it. No library: apt-get install libturbojpeg0 (Ubuntu: libturbojpeg), "
    "brew install jpeg-turbo, or libjpeg-turbo's Windows installer. A library older than libjpeg-turbo 3, as Debian 12 "
    'and Ubuntu 24.04 have: pip install "fastload[turbojpeg]" "PyTurboJPEG<2"'
)


# ---- the machine


def _memory(name: str) -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    value = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f} GiB"
    if memory.available < GIB:
        return Finding(name, value, "warn", "less than 1 GiB is left: use fewer workers, a smaller cache or batch")
    return Finding(name, value)


def _shared_memory(name: str) -> Finding:
    if not sys.platform.startswith("linux"):
        return Finding(name, f"no limit of its own on {sys.platform}")
    if hasattr(os, "memfd_create"):
        return Finding(name, "no limit of its own: worker processes share memory without files in /dev/shm")
    return _shared_memory_finding(name, shutil.disk_usage("/dev/shm").free)


def _shared_memory_finding(name: str, free: int) -> Finding:
    value = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free < GIB:
        advice = (
            "worker processes pass batches through it, and die of a bus error when it is full: "
            "docker run --shm-size=8g or --ipc=host; worker threads need none of it"
        )
        return Finding(name, value, "warn", advice)
    return Finding(name, value)


def _cuda(name: str) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(name, f"{', '.join(names)} ({torch.version.cuda or torch.version.hip})")
    cause = "the driver does not answer" if torch.version.cuda else "this torch was built without CUDA: reinstall it"
    advice = f"nothing to do on a machine without an NVIDIA GPU; with one: {cause}"
    return Finding(name, "none: batches pass through on the CPU", "warn", advice)


def _gil(name: str) -> Finding:
    enabled = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    if enabled and sysconfig.get_config_var("Py_GIL_DISABLED"):
        advice = "a library turned it back on in this free-threaded Python: update it, or set PYTHON_GIL=0"
        return Finding(name, "on, in a free-threaded build", "warn", advice)
    return Finding(name, "on" if enabled else "off (free-threaded)")


def _open_files(name: str) -> Finding:
    if sys.platform == "win32":
        return Finding(name, "no limit of its own on win32")
    import resource

    soft, hard = ("unlimited" if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    value = f"{soft} (may be raised to {hard})"
    if isinstance(soft, int) and soft < 1024:
        return Finding(name, value, "warn", "worker processes use up file descriptors: ulimit -n 4096")
    return Finding(name, value)


_CHECKS: dict[str, Callable[[str], Finding]] = {
    "python": _python,
    "platform": _platform,
    "fastload": _fastload,
    "torch": _needed("torch", "torch"),
    "numpy": _needed("numpy", "numpy"),
    "opencv": _needed("cv2", "opencv-python-headless"),
    "simplejpeg": _needed("simplejpeg", "simplejpeg"),
    "lmdb": _needed("lmdb", "lmdb"),
    "pillow": _needed("PIL.Image", "pillow"),
    "numba": _for_packing("numba", "numba"),
    "PyTurboJPEG": _turbojpeg,
    "nvidia-ml-py": _optional("pynvml", "nvidia-ml-py", "nvidia", "GPU utilisation in `Monitor`"),
    "matplotlib": _optional("matplotlib", "matplotlib", "plot", "plots"),
    "pydicom": _optional("pydicom", "pydicom", "dicom", "DICOM files"),
    "pyarrow": _optional("pyarrow", "pyarrow", "parquet", "Parquet files"),
    "cores": _cores,
    "memory": _memory,
    "shared memory": _shared_memory,
    "CUDA": _cuda,
    "GIL": _gil,
    "open files": _open_files,
}
