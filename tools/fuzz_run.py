"""What tools/fuzz does in the process of one target: `fuzz_run.py TARGET FOLDER [options of libFuzzer]`.

FOLDER is of inputs that are of interest: those in it are tried first, new ones are added. A finding ends the process,
after its input has been written to where `-artifact_prefix` says.
"""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).resolve().parent.parent
MEGABYTES = 1024
"""Of the whole process, Python, torch and the fuzzer's own memory included."""
LIBRARIES = {"image": ["PIL"], "dicom": ["pydicom.filereader", "pydicom.pixels", "pydicom.encaps"]}
"""What a target's way through Python leads through besides fastload."""
COMPILED = ["fastload.huffman", "fastload.huffman_writer"]  # numba would compile the instruments too
COMPARING = {"image": ["fastload.blocks"]}
"""What compares whole images: atheris 3.0 never frees what a comparison that it traces gives."""


def main(name: str, folder: Path, options: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    libraries = LIBRARIES.get(name, [])
    left_out = COMPILED + COMPARING.get(name, [])
    with atheris.instrument_imports(["fastload", *libraries], left_out, enable_loader_override=False):
        for module in ("fastload", *libraries):
            importlib.import_module(module)
        fuzz_targets: Any = importlib.import_module("fuzz_targets")
    import numpy as np

    target = fuzz_targets.TARGETS[name]
    seeds = list(target.seeds())
    for number, seed in enumerate(seeds):
        Path(folder, f"seed-{number}").write_bytes(seed)
        fuzz_targets.accepts(name, seed)  # so that nothing is compiled or loaded later, under the limit of time

    def one(data: bytes) -> None:
        fuzz_targets.accepts(name, data)
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if megabytes > MEGABYTES:
            raise MemoryError(f"it took {megabytes} MB; {MEGABYTES} are allowed")

    def changed(data: bytes, most: int, seed: int) -> bytes:
        random = np.random.default_rng(seed)
        if random.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        other = seeds[random.integers(len(seeds))]
        return bytes(target.damaged(random, data, other)[:most])

    atheris.Setup([sys.argv[0], *options, str(folder)], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
