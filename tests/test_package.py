"""The package as a whole: what is public, what it says of itself, what importing it does, what it must never call."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastload

PACKAGE = Path(fastload.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def test_all_is_what_is_public() -> None:
    """`__all__` lists every public name that is no module, the three modules that are meant to be used, and no more."""
    visible = {name for name, value in vars(fastload).items() if not name.startswith("_")}
    modules = {name for name in visible if isinstance(getattr(fastload, name), ModuleType)}
    assert set(fastload.__all__) == visible - modules | {"errors", "pictures", "transforms"}
    assert len(set(fastload.__all__)) == len(fastload.__all__)
    assert all(hasattr(fastload, name) for name in fastload.__all__)


def test_public_names_say_where_they_come_from() -> None:
    """Classes and functions are those of the module that has their name in its source."""
    for name in fastload.__all__:
        value = getattr(fastload, name)
        if not isinstance(value, ModuleType):
            assert value.__module__.startswith("fastload.")
            assert value.__name__ == name


def test_the_version_is_told_once() -> None:
    """What is installed is the version in pyproject.toml, and what the command line tells."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert importlib.metadata.version("fastload") == version[1]


def test_the_package_is_typed() -> None:
    """py.typed lies beside the modules, so that type checkers believe the annotations."""
    assert importlib.resources.files("fastload").joinpath("py.typed").is_file()


def test_the_command_is_installed() -> None:
    """`fastload` is a script of this package, and leads to `cli.main`."""
    (script,) = (s for s in importlib.metadata.entry_points(group="console_scripts") if s.name == "fastload")
    assert script.value == "fastload.cli:main"
    assert callable(script.load())


@pytest.mark.parametrize("module", MODULES)
def test_every_public_definition_has_a_docstring(module: str) -> None:
    """Modules, public classes and public functions say what they are for."""
    parsed = tree(module)
    assert ast.get_docstring(parsed)
    definitions = [n for n in parsed.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    without = [n.name for n in definitions if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert without == []


@pytest.mark.parametrize("name", [n for n in fastload.__all__ if inspect.isclass(getattr(fastload, n))])
def test_every_public_method_has_a_docstring(name: str) -> None:
    """The methods and properties that exported classes define, by their own words or their base class's."""
    members = vars(getattr(fastload, name)).items()
    public = {n: m for n, m in members if not n.startswith("_") and (inspect.isroutine(m) or isinstance(m, property))}
    assert [n for n, member in public.items() if not inspect.getdoc(getattr(getattr(fastload, name), n))] == []


def test_every_function_is_annotated() -> None:
    """py.typed is a promise: arguments and results of all public functions and methods have types."""
    bare = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if missing or node.returns is None:
                    bare.append((module, node.name, missing))
    assert bare == []


PROBE = """
import json, sys, threading
import fastload
print(json.dumps({"modules": sorted(sys.modules), "threads": [t.name for t in threading.enumerate()]}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The modules and threads of a fresh Python after `import fastload`."""
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("library", ["matplotlib", "rich.progress", "turbojpeg", "torchvision", "fastload.cli"])
def test_importing_it_loads_nothing_that_may_not_be_needed(imported: dict[str, list[str]], library: str) -> None:
    """Optional and heavy libraries wait for their first use."""
    assert "fastload.loader" in imported["modules"]
    assert library not in imported["modules"]


def test_importing_it_starts_no_thread(imported: dict[str, list[str]]) -> None:
    """Threads belong to iterators, not to modules."""
    assert imported["threads"] == ["MainThread"]


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_METHODS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("torch", "jit")}
FORBIDDEN_METHODS |= {("os", "system"), ("os", "popen"), ("subprocess", "run"), ("subprocess", "Popen")}


def dangers(parsed: ast.AST) -> Iterator[str]:
    """Whatever could run code that is in data: calls by name, and modules that unpickle, imported anywhere."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield node.func.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_METHODS:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
            yield from (name for name in names if tuple(name.split(".")) in FORBIDDEN_METHODS)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            yield f"{node.arg}="


@pytest.mark.parametrize("module", MODULES)
def test_no_module_can_run_code_that_is_in_data(module: str) -> None:
    """Opening a stranger's store evaluates and unpickles nothing: the syntax tree has no call that could."""
    assert list(dangers(tree(module))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "def f():\n    exec(x)",
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "f(shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    """Each way to run code that the test above looks for is found by it."""
    assert list(dangers(ast.parse(code)))


def test_errors_have_one_root() -> None:
    """Every exception of `errors` is a FastloadError, and listed in the tree that its docstring draws."""
    errors: dict[str, Any] = {
        n: e for n, e in vars(fastload.errors).items() if inspect.isclass(e) and e.__module__ == "fastload.errors"
    }
    assert all(issubclass(error, fastload.FastloadError) for error in errors.values())
    drawn = set(re.findall(r"^ {4}[│├└─ ]*(\w+(?:Error|Failures))", fastload.errors.__doc__ or "", re.MULTILINE))
    assert drawn == set(errors)
