"""Arguments of the command line: those that several commands have, and text as the value that it stands for.

A command's own arguments are with the command, in `cli`. Text that is no such value is an error that shows how to write
one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from .fields import KINDS, is_kind
from .geometry import MAX_PIXELS
from .store import Store

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MOST_INDICES = 1_000_000


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Give a command `--max-pixels`."""
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="leave larger images out (default: %(default)s)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command `--json`."""
    parser.add_argument("--json", action="store_true", help="one JSON value on standard output, nothing else there")


def add_transform(parser: argparse.ArgumentParser, default: str) -> None:
    """Give a command `--transform` and `--size`."""
    parser.add_argument(
        "--transform",
        choices=("train", "eval", "none"),
        default=default,
        help="as make_loader has them (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=224, metavar="N", help="of the pictures (default: %(default)s)")


def chosen_transform(arguments: argparse.Namespace) -> Any:
    """What `add_transform` asked for; None if that is none."""
    from .factory import eval_transform, train_transform

    make = {"train": train_transform, "eval": eval_transform}.get(arguments.transform)
    return make and make(arguments.size)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Give a command the arguments of loading: a store, `--batch-size`, `--transform`, `--size` and `--cache`."""
    parser.add_argument("store", metavar="DB")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add_transform(parser, "train")
    parser.add_argument("--cache", metavar="BYTES", help="budget for decoded images, 4GB say")


def chosen_dataset(arguments: argparse.Namespace) -> Any:
    """What `add_loading` asked for, to be measured for some seconds."""
    from .dataset import ImageDataset

    if arguments.batch_size < 1:
        raise ValueError(f"batch size is {arguments.batch_size}; it must be at least 1")
    if not 0 < arguments.seconds < math.inf:
        raise ValueError(f"seconds is {arguments.seconds:g}; measuring takes more than 0, and an end")
    if not len(Store(arguments.store)):
        raise ValueError(f"{arguments.store} holds no samples; there is nothing to measure")
    return ImageDataset(arguments.store, chosen_transform(arguments), cache=arguments.cache)


def parse_names(text: str) -> list[str]:
    """`a,b` as a list."""
    return [name for name in text.split(",") if name]


def parse_window(text: str) -> str | tuple[float, ...]:
    """`auto`, or `40,400` as numbers."""
    try:
        return text if text == "auto" else tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no window; write auto, or center,width: 40,400 say") from None


def parse_kind(text: str) -> tuple[str, str]:
    """`1=mask` as a field's name and its kind."""
    name, found, kind = text.partition("=")
    if not found or not is_kind(kind):
        raise argparse.ArgumentTypeError(f"{text!r} is no FIELD=KIND; a kind may be {', '.join(KINDS)}")
    return name, kind


def parse_colour(text: str) -> tuple[int, ...]:
    """`255,255,255` as numbers."""
    try:
        return tuple(int(shade) for shade in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour; write red,green,blue: 255,255,255 say") from None


def parse_indices(text: str) -> list[int]:
    """`0,5,10-19` as a list."""
    parts = [part.partition("-") for part in text.split(",")]
    try:
        ranges = [range(int(low), int(high if dash else low) + 1) for low, dash, high in parts]
    except ValueError:
        ranges = []
    if not all(ranges) or not 0 < sum(r.stop - r.start for r in ranges) <= _MOST_INDICES:  # len() stops at 63 bits
        raise argparse.ArgumentTypeError(f"{text!r} names no samples, or too many; write 0,5,10-19")
    return [index for numbers in ranges for index in numbers]


def parse_shape(text: str) -> tuple[int, ...]:
    """`3x224x224` as numbers."""
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write that of one sample: 784 or 3x224x224") from None


def made_by(name: str) -> Any:
    """What MODULE:FACTORY makes, or is; the module is looked for in the current folder first."""
    from torch import nn
    from torch.utils.data import Dataset

    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{name!r} is no MODULE:FACTORY; write `models:make` for the function `make` in models.py")
    if module_name.endswith(".py"):
        raise ValueError(f"{name!r} names a file; write the module: {module_name[:-3]}:{factory_name}")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name, None)
        return factory() if callable(factory) and not isinstance(factory, nn.Module | Dataset) else factory
    except Exception as error:  # the user's own code; it may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.split(".")[0]):
            raise ValueError(f"there is no module {module_name!r} in {os.getcwd()} or on Python's path") from None
        raise RuntimeError(f"{name} failed: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def importing_from_here() -> Iterator[None]:
    """Look for modules in the current folder first; worker processes do so too."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
