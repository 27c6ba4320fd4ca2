from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastload import doctor
from fastload.doctor import Finding, diagnose, usable_cores

ROWS = ["python", "platform", "fastload", "torch", "numpy", "opencv", "simplejpeg", "lmdb", "pillow"]
ROWS += ["numba", "PyTurboJPEG", "nvidia-ml-py", "matplotlib", "pydicom", "pyarrow"]
ROWS += ["cores", "memory", "shared memory", "CUDA", "GIL", "open files"]


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write `files` below `root`; a key is a path with forward slashes."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def python(code: str) -> str:
    """What `code` prints in a Python of its own, started in the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    return run.stdout.strip()


# ---- cores

GROUPS: list[tuple[str, dict[str, str], float | None]] = [
    ("no control groups", {}, None),
    ("v2", {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
    ("v2, unlimited", {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
    (
        "v2, a parent is tighter",
        {
            "proc/self/cgroup": "0::/a/b/c",
            "sys/fs/cgroup/a/b/c/cpu.max": "800000 100000",
            "sys/fs/cgroup/a/cpu.max": "300000 100000",
        },
        3.0,
    ),
    (
        "v2, the group itself is tighter",
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.max": "200000 50000",
            "sys/fs/cgroup/a/cpu.max": "500000 50000",
        },
        4.0,
    ),
    ("v2, in a namespace", {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
    ("v2, a host's path", {"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
    ("v2, outside the namespace", {"proc/self/cgroup": "0::/../../x", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
    (
        "v1",
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a\n1:name=systemd:/",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    (
        "v1, mounted as cpu",
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/docker/1f",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        7.0,
    ),
    (
        "v1, unlimited",
        {
            "proc/self/cgroup": "1:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    (
        "v1, another controller's quota",
        {
            "proc/self/cgroup": "1:cpuset:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    (
        "v1 and v2 together",
        {
            "proc/self/cgroup": "1:cpu:/a\n0::/a",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        },
        3.0,
    ),
    ("damaged", {"proc/self/cgroup": "0::/a\nnonsense\n\n", "sys/fs/cgroup/a/cpu.max": "many"}, None),
    ("no period", {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 0"}, None),
]


@pytest.mark.parametrize(("files", "quota"), [case[1:] for case in GROUPS], ids=[case[0] for case in GROUPS])
def test_the_quota_of_the_control_groups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    """The tightest limit around the process counts, in either version; whatever is unreadable is no limit."""
    assert doctor._quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("microseconds", "cores"), [(1_000, 1), (100_000, 1), (120_000, 2), (10**10, 10**5)])
def test_usable_cores_are_the_lesser_rounded_up(tmp_path: Path, microseconds: int, cores: int) -> None:
    """A quota of 1.2 cores gives 2, a tiny one gives 1, and a large one gives no more than the affinity."""
    tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{microseconds} 100000"})
    assert usable_cores(tmp_path) == min(cores, usable_cores(tmp_path / "without"))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity to set")
def test_usable_cores_follow_the_affinity() -> None:
    """A process that was tied to one core counts one."""
    code = (
        "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from fastload.doctor import usable_cores\nprint(usable_cores())"
    )
    assert python(code) == "1"


def test_a_quota_below_the_affinity_is_worth_a_warning(tmp_path: Path) -> None:
    """The row names all three counts, and says what keeps torch from starting too many threads."""
    tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    row = doctor._cores("cores", tmp_path)
    affinity = usable_cores(tmp_path / "without")
    assert row.value == f"1 usable (affinity {affinity}, quota 0.5, total {os.cpu_count()})"
    assert row.status == "warn"
    assert ("OMP_NUM_THREADS=1" in row.advice) == (affinity > 1)


def test_importing_the_module_loads_nothing_heavy() -> None:
    """The loader asks for the cores when it is imported, so the module by itself loads the standard library only."""
    code = (
        "import runpy, sys\nrunpy.run_path('fastload/doctor.py')\n"
        "print(sorted({'torch', 'numpy', 'psutil', 'cv2', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


# ---- findings


def test_every_row_is_there_and_says_what_to_do() -> None:
    """The rows come in a fixed order, and advice goes with every row that is not ok, and with no other."""
    rows = diagnose()
    assert [row.name for row in rows] == ROWS
    for row in rows:
        assert row.value
        assert row.status in ("ok", "warn", "missing")
        assert (row.status == "ok") == (row.advice == ""), row


def test_what_the_tests_themselves_need_is_found() -> None:
    """The libraries that fastload requires show with their versions."""
    rows = {row.name: row for row in diagnose()}
    for name, package in {"torch": "torch", "numpy": "numpy", "lmdb": "lmdb", "pillow": "pillow"}.items():
        assert rows[name] == Finding(name, importlib.metadata.version(package))


def test_a_broken_row_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a check raises becomes its row."""

    def broken(name: str) -> Finding:
        raise OSError("the disk\n   is gone")

    monkeypatch.setitem(doctor._CHECKS, "memory", broken)
    rows = {row.name: row for row in diagnose()}
    assert list(rows) == ROWS
    assert rows["memory"][1:3] == ("OSError: the disk is gone", "missing")
    assert rows["memory"].advice
    assert rows["numpy"].status == "ok"


def test_a_needed_library_that_is_absent() -> None:
    """The advice is the command that installs it."""
    row = doctor._needed("fastload_absent", "absent-package")("absent")
    assert row.status == "missing"
    assert row.value == "ModuleNotFoundError: No module named 'fastload_absent'"
    assert row.advice == 'pip install "absent-package"'


def test_a_needed_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed library that fails on import is told apart from an absent one."""
    tree(tmp_path, {"fastload_broken.py": "raise OSError('libGL.so.1: cannot open shared object file')"})
    monkeypatch.syspath_prepend(tmp_path)
    row = doctor._needed("fastload_broken", "broken-package")("broken")
    assert row[:3] == ("broken", "OSError: libGL.so.1: cannot open shared object file", "missing")
    assert "--force-reinstall" in row.advice


def test_a_library_from_another_package_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV may come as opencv-python or by conda: the module's own version serves."""
    tree(tmp_path, {"fastload_other.py": "__version__ = '4.11.0'"})
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._needed("fastload_other", "absent-package")("opencv") == Finding("opencv", "4.11.0")


def test_an_optional_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent is a warning that names the extra; present but broken is told."""
    row = doctor._optional("fastload_absent", "absent-package", "plot", "plots")("matplotlib")
    assert row == Finding(
        "matplotlib",
        "not installed (optional)",
        "warn",
        'for plots: pip install "fastload[plot]"',
    )
    tree(tmp_path, {"fastload_lame.py": "import fastload_absent"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="fastload_absent"):
        doctor._optional("fastload_lame", "lame-package", "plot", "plots")("lame")


def test_a_library_for_packing_is_looked_for_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, fastload still loads: a warning that says how to get it and how to do without."""
    row = doctor._for_packing("fastload_absent", "absent-package")("numba")
    assert row[:3] == ("numba", "not installed", "warn")
    assert 'pip install "absent-package"' in row.advice
    assert "--no-tiles" in row.advice
    tree(tmp_path, {"fastload_heavy.py": "raise MemoryError"})
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._for_packing("fastload_heavy", "numpy")("x") == Finding("x", importlib.metadata.version("numpy"))
    assert doctor._for_packing("fastload_heavy", "absent-package")("x") == Finding("x", "of unknown version")


def test_numba_is_not_imported_for_its_row() -> None:
    """It takes half a second to import and is for packing only."""
    code = (
        "import sys\nfrom fastload import doctor\nrow = doctor._CHECKS['numba']('numba')\n"
        "print(row.status, row.value, 'numba' in sys.modules)"
    )
    assert python(code) == f"ok {importlib.metadata.version('numba')} False"


def test_turbojpeg_tells_the_binding_from_the_library() -> None:
    """The row is ok exactly where PyTurboJPEG opens its library, and names the ways to one elsewhere."""
    turbojpeg = pytest.importorskip("turbojpeg")
    row = {row.name: row for row in diagnose()}["PyTurboJPEG"]
    try:
        turbojpeg.TurboJPEG()
    except Exception:
        assert row.status == "warn"
        assert "does not load" in row.value
        for way in ("apt-get install libturbojpeg0", "brew install jpeg-turbo", "fastload[turbojpeg]"):
            assert way in row.advice
    else:
        assert row == Finding("PyTurboJPEG", f"{importlib.metadata.version('PyTurboJPEG')}, libturbojpeg loads")


@pytest.mark.parametrize(("free", "status"), [(2**30, "ok"), (2**30 - 1, "warn"), (64 * 2**20, "warn")])
def test_little_shared_memory_is_a_warning(free: int, status: str) -> None:
    """Docker's 64 MiB are too few, and the advice is docker's own option."""
    row = doctor._shared_memory_finding("shared memory", free)
    assert row.status == status
    assert ("--shm-size" in row.advice) == (status == "warn")


def test_no_gpu_is_no_alarm() -> None:
    """The row follows torch: the devices' names, or that batches stay on the CPU."""
    torch = pytest.importorskip("torch")
    row = {row.name: row for row in diagnose()}["CUDA"]
    if torch.cuda.is_available():
        assert row.status == "ok"
        assert torch.cuda.get_device_name(0) in row.value
    else:
        assert row[:3] == ("CUDA", "none: batches pass through on the CPU", "warn")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_few_open_files_are_a_warning() -> None:
    """The limit of 256 that macOS starts with is too low."""
    code = (
        "import resource\nhard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "from fastload.doctor import _open_files\nprint(*_open_files('open files')[1:])"
    )
    printed = python(code)
    assert printed.startswith("256 (may be raised to ")
    assert " warn " in printed
    assert "ulimit -n" in printed
