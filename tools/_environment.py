"""The virtual environment of the scripts in tools/: .venv in the checkout, or the folder that FASTLOAD_VENV names.

It is made once and used again; the package in it is installed, not linked, and always the checkout's present state.
Standard library only, and no syntax newer than Python 3.7, so that an old Python gets as far as being told so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("FASTLOAD_VENV") or ROOT / ".venv").absolute()
SCRIPTS = FOLDER / ("Scripts" if os.name == "nt" else "bin")

_CONSTRAINTS = ROOT / "tools" / "constraints.txt"
_EXTRAS = "test,plot,lint"
_PACKAGE = ("fastload", "pyproject.toml", "README.md", "LICENSE")
_MADE_WITH, _INSTALLED = FOLDER / "fastload-made-with", FOLDER / "fastload-installed"


def enter() -> None:
    """Go on inside the environment: run the same command again with its Python; return in that second run."""
    if os.environ.get("FASTLOAD_ENTERED") != str(FOLDER):
        become(ready(), *sys.argv, FASTLOAD_ENTERED=str(FOLDER))


def ready() -> Path:
    """Make the environment, or bring it up to date, and return its Python."""
    if sys.version_info < (3, 10):  # noqa: UP036, an older Python does get here
        _fail(f"this is Python {sys.version.split()[0]}; fastload needs 3.10 or newer: python3.12 {sys.argv[0]}, say")
    python = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
    made_with = f"Python {sys.version_info[0]}.{sys.version_info[1]} for {FOLDER}"
    if _read(_MADE_WITH) != made_with or not python.exists():
        _make_environment()
        _MADE_WITH.write_text(made_with)
    wanted = [_digest(ROOT / "pyproject.toml", _CONSTRAINTS), _digest(*sorted((ROOT / "fastload").rglob("*.py")))]
    installed = _read(_INSTALLED).split()
    if installed != wanted:
        _INSTALLED.write_text("")
        _install(python, with_dependencies=installed[:1] != wanted[:1])
        _INSTALLED.write_text(" ".join(wanted))
    return python


def become(program: Path, *arguments: str, **variables: str) -> None:
    """Run the program instead of this one (Windows: wait for it), without PYTHONPATH, with more variables."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(variables)
    command = [str(program), *arguments]
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(command[0], command, environment)
    sys.exit(subprocess.call(command, env=environment))


def _make_environment() -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        _fail("this Python can't make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv")
    if FOLDER.exists() and not _MADE_WITH.exists():
        _fail(f"{FOLDER} exists, but not made by these scripts: move it away, or name another in FASTLOAD_VENV")
    _say(f"making {FOLDER}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _MADE_WITH.write_text("")  # not finished, but ours
    if subprocess.call([sys.executable, "-m", "venv", str(FOLDER)]):
        _fail(f"the virtual environment could not be made in {FOLDER}; the reason is above")


def _install(python: Path, with_dependencies: bool) -> None:
    """Install a copy of the sources, so that no left-over of an earlier build gets in and none is left here."""
    with tempfile.TemporaryDirectory() as folder:
        for name in _PACKAGE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(str(ROOT / name), str(Path(folder, name)))
        if with_dependencies:
            _say("installing fastload and what it needs; torch is large, so this takes minutes the first time")
            # setuptools stays there, so that installing changed sources needs no network
            _pip(python, "--constraint", str(_CONSTRAINTS), "setuptools>=77", f"{folder}[{_EXTRAS}]")
        else:
            _pip(python, "--no-build-isolation", "--no-deps", "--quiet", folder)


def _pip(python: Path, *arguments: str) -> None:
    if subprocess.call([str(python), "-m", "pip", "--disable-pip-version-check", "install", *arguments]):
        version = ".".join(map(str, sys.version_info[:2]))
        _fail(
            "pip could not install what is needed; its reason is above. Usual ones: no network, or a proxy that pip "
            "doesn't know (pip config set global.proxy URL); a full disk (torch takes 1 GB, with CUDA 6 GB); no build "
            f"of torch for Python {version} on this system. What is installed stays: run the same command again"
        )


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(stamp: Path) -> str:
    return stamp.read_text() if stamp.exists() else ""


def _say(words: str) -> None:
    print(f"{_name()}: {words}", flush=True)


def _fail(words: str) -> None:
    sys.exit(f"{_name()}: {words}")


def _name() -> str:
    return f"tools/{Path(sys.argv[0]).name}"
