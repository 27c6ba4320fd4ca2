"""Who may import whom: the layers of the package, held by reading the syntax tree of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastload

LAYERS = (
    "errors geometry order record",
    "anonymous_memory seen_rows arrays fields batch buffers jpeg headers tiles huffman huffman_writer recut blocks "
    "masks boxes lmdb_pages manifest toc store store_writer items sources folders labelme coco pickles small_images "
    "label_lists samples sample_sources tar_members member_values tar_shards parquet arrow_values hub_files dicom "
    "dicom_images dicom_values splits workers transforms cache failures placeholders worker_info",
    "resize decode show pictures",
    "options image_fields",
    "prepare torch_datasets",
    "pack",
    "values stored_images",
    "layout",
    "batch_reading",
    "dataset sampler buckets",
    "prefetch resident",
    "orders passes iterators reading thread_workers process_workers",
    "loader",
    "monitor doctor tune",
    "factory verify stats info unpack bench memory arguments printing cli",
)
"""From the bottom up. A module that is in none of them has to be given its place here."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
PURE = LAYERS[0].split()
UPWARD = {("pack", "doctor")}  # for `usable_cores`: doctor imports nothing of ours, and nothing heavy
PACKAGE = Path(fastload.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, inside functions too; our own modules as `fastload.NAME`."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("fastload" if node.level else "", node.module) if part)
            if base == "fastload":
                yield from (f"fastload.{alias.name}" for alias in node.names)
            else:
                yield base


def own_imports(module: str) -> set[str]:
    return {name.split(".")[1] for name in imports(module) if name.startswith("fastload.")}


def foreign_imports(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)} - {"fastload"} - sys.stdlib_module_names


def importers_of(library: str) -> set[str]:
    return {module for module in [*MODULES, "__init__"] if library in foreign_imports(module)}


def test_the_package_is_flat_and_every_module_has_a_layer() -> None:
    """A new module has to be given its place; what is only planned may be missing."""
    assert set(MODULES) - set(LAYER) == set()
    assert {"errors", "geometry", "order", "record", "store", "pack", "dataset", "loader"} <= set(MODULES)
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_downward_or_sideways(module: str) -> None:
    """No module imports one of a higher layer, nor the package itself, whose `__init__` imports them all."""
    assert "fastload" not in set(imports(module))
    unknown = own_imports(module) - set(LAYER)
    assert unknown == set()
    above = {name for name in own_imports(module) if LAYER[name] > LAYER[module]}
    assert above - {name for importer, name in UPWARD if importer == module} == set()


def test_imports_go_round_in_no_circle() -> None:
    """Within a layer too there is an order in which the modules can be read."""
    order = list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    assert set(MODULES) <= set(order)


@pytest.mark.parametrize("module", PURE)
def test_the_pure_modules_need_neither_torch_nor_a_disk(module: str) -> None:
    """They are functions on ints, bytes and arrays: the standard library, record's hash, and order's NumPy."""
    assert foreign_imports(module) <= {"record": {"xxhash"}, "order": {"numpy"}}.get(module, set())
    assert own_imports(module) <= set(PURE)
    assert {name.split(".")[0] for name in imports(module)}.isdisjoint({"os", "io", "pathlib", "threading", "random"})


def test_the_sampler_knows_no_store() -> None:
    """It works with any dataset and any loader: of ours it imports the order alone."""
    assert own_imports("sampler") <= {"order", "errors"}


def test_one_module_each_knows_lmdb_and_the_jpeg_library() -> None:
    """store_writer.py alone imports lmdb, for readers must not; jpeg.py alone imports simplejpeg and turbojpeg."""
    assert importers_of("lmdb") == {"store_writer"}
    assert importers_of("simplejpeg") == {"jpeg"}
    assert importers_of("turbojpeg") <= {"jpeg"}


def test_only_packing_can_reach_the_compiler() -> None:
    """Only huffman.py imports numba, only its writer and recut.py import it, and packing imports that to re-cut."""
    assert importers_of("numba") == {"huffman"}
    importers = {module: own_imports(module) for module in [*MODULES, "__init__"]}
    assert {module for module, names in importers.items() if "huffman" in names} == {"huffman_writer", "recut"}
    assert {module for module, names in importers.items() if "huffman_writer" in names} == {"recut"}
    assert {module for module, names in importers.items() if "recut" in names} == {"pack", "image_fields"}
    trees = [
        ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")) for name in ("pack", "prepare", "image_fields")
    ]
    at_load = [
        str(n)
        for node in (node for tree in trees for node in tree.body)
        if isinstance(node, ast.ImportFrom)
        for n in (node.module, *(a.name for a in node.names))
    ]
    assert "recut" not in at_load


READING = """
import sys, fastload
dataset = fastload.ImageDataset(sys.argv[1], fastload.transforms.RandomResizedCrop(16))
images, _ = next(iter(fastload.DataLoader(dataset, batch_size=12)))
assert images.any() and not dataset.failures
compiling = {"numba", "llvmlite", "fastload.huffman", "fastload.huffman_writer", "fastload.recut"}
print(sorted(compiling & set(sys.modules)))
"""


def test_importing_and_reading_load_no_compiler(store_path: Path) -> None:
    """A training run reads re-cut JPEGs without numba, which takes memory, and a second to import, in each process."""
    result = subprocess.run([sys.executable, "-c", READING, store_path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_doctor_is_light_where_the_packer_imports_it() -> None:
    """The one exception to the layers holds as long as doctor imports nothing of ours when it is loaded."""
    assert own_imports("doctor") == set()
    tree = ast.parse((PACKAGE / "doctor.py").read_text(encoding="utf-8"))
    at_load = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    at_load |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in at_load} <= sys.stdlib_module_names | {"psutil"}
