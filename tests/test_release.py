"""What a release consists of: what is in the wheel and the sdist, that they work alone, and what they depend on.

Nothing is downloaded. `pip-audit`, which asks a service for known vulnerabilities in what is installed, has no offline
mode: run it by hand before a release, where that service can be reached.
"""

from __future__ import annotations

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("setuptools", "77")

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "fastload", "tests", "tools")
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
BUILD = """
import sys
from setuptools import build_meta
out, *kinds = sys.argv[1:]
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(out)
"""


class Release(NamedTuple):
    """What was built of a copy of the checkout, unpacked: `sources` is the sdist's folder."""

    wheel: Path
    sdist: Path
    sources: Path

    @property
    def metadata_file(self) -> bytes:
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA")))

    @property
    def metadata(self) -> Message:
        return email.message_from_bytes(self.metadata_file)


def build(sources: Path, out: Path, *kinds: str) -> None:
    """What `python -m build` makes, without its isolated environment, which would need a network."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1767225600"}
    command = [sys.executable, "-c", BUILD, str(out), *kinds]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The wheel and the sdist of the checkout as it is, without what it has lying about."""
    folder = tmp_path_factory.mktemp("release")
    copy = folder / "copy"
    copy.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    build(copy, folder, "wheel", "sdist")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return Release(wheel, sdist, folder / sdist.name.removesuffix(".tar.gz"))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- contents


def test_the_wheel_is_the_package_and_nothing_else(release: Release) -> None:
    """All modules, py.typed, the licence and the metadata. It runs on every system, and holds nobody else's code."""
    names = set(zipfile.ZipFile(release.wheel).namelist())
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    modules = {f"fastload/{path.name}" for path in (ROOT / "fastload").glob("*.py")} | {"fastload/py.typed"}
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert names == modules | {f"{info}/{name}" for name in about}
    assert release.wheel.name.endswith("-py3-none-any.whl")


def test_the_sdist_is_the_repository(release: Release) -> None:
    """So that its tests, tools and benchmarks work; with what setuptools adds, and without what it left in the copy."""
    expected = set(FILES)
    for folder in FOLDERS:
        expected |= {f"{folder}/{name}" for name in files_below(ROOT / folder) if "__pycache__" not in name}
    added = {name for name in files_below(release.sources) if name.startswith("fastload.egg-info/")}
    assert files_below(release.sources) == expected | added | {"PKG-INFO", "setup.cfg"}


def test_what_is_built_again_is_the_same(release: Release, tmp_path: Path) -> None:
    """The sdist makes the same wheel as the repository, byte for byte, whenever it is built."""
    again = tmp_path / "again"
    shutil.copytree(release.sources, again, ignore=shutil.ignore_patterns("*.egg-info"))
    build(again, tmp_path, "wheel")
    assert (tmp_path / release.wheel.name).read_bytes() == release.wheel.read_bytes()


def test_the_metadata_is_valid(release: Release) -> None:
    """As an index judges it; the README is its text, and the text is plain Markdown."""
    from markdown_it import MarkdownIt

    found = Metadata.from_email(release.metadata_file, validate=True)
    assert (found.name, found.license_expression, found.license_files) == ("fastload", "MIT", ["LICENSE"])
    assert release.metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert str(found.description).split() == readme.split()
    tokens = MarkdownIt("commonmark").enable("table").parse(readme)
    inner = [child for token in tokens for child in (token, *(token.children or ()))]
    assert [token.content for token in inner if token.type.startswith("html_")] == []
    assert sum(token.type == "image" for token in inner) == 2


def test_the_changelog_begins_with_this_version(release: Release) -> None:
    """With its date, or as unreleased; and with words about it."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    match = re.match(r"# Changelog\n\n## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)\n\n- \S", changes)
    assert match is not None
    assert match[1] == release.metadata["Version"]


# ---- installed


@pytest.fixture(scope="module")
def python(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel in it, and this one's other packages behind it."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = ["--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(release.wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(here))
    return python


def alone(python: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the fresh environment, in a folder without the package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(300)
def test_the_wheel_alone_passes_the_tests_of_the_sdist(release: Release, python: Path) -> None:
    """Those that take no time, and nothing that numba would have to compile anew: `tools/test` runs them all."""
    folder = release.sources / "tests"
    where = alone(python, "-c", "import fastload; print(fastload.__file__)", folder=folder).stdout
    assert Path(where.strip()).is_relative_to(python.parents[1])
    names = [f"test_{name}.py" for name in ("golden", "package", "record")]
    done = alone(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names, folder=folder)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_command_is_installed_and_works(python: Path, tmp_path: Path) -> None:
    """The script `fastload`, beside Python: it packs a folder and finds the store sound."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    script = python.with_name("fastload.exe" if os.name == "nt" else "fastload")
    for arguments in (("pack", ".", "db.lmdb"), ("verify", "--decode", "db.lmdb")):
        done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


USER = """
from typing_extensions import assert_type

import fastload

dataset = fastload.ImageDataset("db.lmdb", fastload.transforms.CenterCrop(8))
assert_type(dataset.classes, list[str] | None)
assert_type(fastload.Store("db.lmdb")[0].name, str)
fastload.ShuffleSampler(dataset, sed=1)
dataset.read("first")
"""


def test_a_type_checker_finds_the_types(python: Path, tmp_path: Path) -> None:
    """Of what is installed, with all of mypy's strictness; what is wrong in a user's program is found."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-torch.*]\nfollow_imports = skip\n")
    done = alone(python, "-m", "mypy", "--python-executable", python, "--no-color-output", "user.py", folder=tmp_path)
    found = re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert found == [("9", "call-arg"), ("10", "arg-type")], done.stdout


# ---- what it depends on


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def extra_of(requirement: Requirement) -> str:
    """The extra that a requirement belongs to, "" for none."""
    match = re.search(r'extra == "(\w+)"', str(requirement.marker or ""))
    return match[1] if match else ""


RUNTIME = ("", "plot", "nvidia", "turbojpeg", "dicom", "parquet")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(release: Release) -> None:
    """Every library that a module imports is a dependency, or an extra's, and there is none that no module needs."""
    declared = {canonicalize_name(r.name) for r in requirements(release.metadata) if extra_of(r) in RUNTIME}
    imported = set()
    for module in (ROOT / "fastload").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    packages = importlib.metadata.packages_distributions()
    foreign = imported - sys.stdlib_module_names - {"fastload"}
    assert {canonicalize_name(packages[name][0]) for name in foreign if name in packages} == declared


def test_bounds_are_lower_ones(release: Release) -> None:
    """Each dependency says what it needs at least. None says at most: nobody knows, and it would hold others back."""
    for requirement in requirements(release.metadata):
        assert [specifier.operator for specifier in requirement.specifier] == [">="], str(requirement)


PERMISSIVE = re.compile(
    r"MIT|0?BSD|Apache|PSF|Python Software Foundation|Zlib|CC0|BSL-1.0|OLDAP|ISC|Unlicense",
    re.IGNORECASE,
)
NOT_OURS = re.compile(r"nvidia-|cuda-|triton")
"""What torch's builds for CUDA bring, under NVIDIA's own terms; nobody needs it for fastload's sake."""


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """What a package says of its licence, in one of the three ways there are."""
    trove = [line.rpartition("::")[2] for line in metadata.get_all("Classifier") or () if line.startswith("License")]
    return metadata.get("License-Expression") or " AND ".join(trove) or (metadata.get("License") or "")[:100]


def installed_below(metadata: Message) -> Iterator[tuple[Requirement, importlib.metadata.Distribution]]:
    """Everything that fastload and its extras bring with them, as far as it is installed, with who asks for it."""
    left = [r for r in requirements(metadata) if extra_of(r) in RUNTIME]
    seen = set()
    while left:
        requirement = left.pop()
        if (str(requirement)) in seen or NOT_OURS.match(requirement.name):
            continue
        seen.add(str(requirement))
        try:
            found = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield requirement, found
        further = [Requirement(line) for line in found.requires or ()]
        left += [r for r in further if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_licences_allow_any_use(release: Release) -> None:
    """Of all that it brings with it: permissive ones, by the words of their metadata."""
    licences = {found.metadata["Name"]: licence(found.metadata) for _, found in installed_below(release.metadata)}
    assert {"torch", "numpy", "lmdb"} <= licences.keys()
    odd = {name for name, words in licences.items() if not PERMISSIVE.search(words) or "GPL" in words}
    assert {name: licences[name] for name in odd} == {}


def test_what_is_installed_fits_together(release: Release) -> None:
    """No version is lower than what somebody below fastload asks for: what `pip check` looks at, of our part alone."""
    for requirement, found in installed_below(release.metadata):
        assert requirement.specifier.contains(found.version, prereleases=True), f"{requirement}, found {found.version}"
