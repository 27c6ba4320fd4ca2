"""What it costs to hold what is read against its checksums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

import fastload
from bench_raw import BATCH, EPOCHS, _pack_small
from contest import Contest, Rounds, Work
from epochs import Epochs, fast_loader
from fastload.factory import train_transform
from fastload.store import Verify

DEFAULT: Verify = "sample"
ALLOWED = 0.97


def bench_crops(contest: Contest, store: Path) -> None:
    """How fast are random crops of JPEGs with verify= "sample" (the default), "always" and "never"?"""
    _compare(contest, lambda verify: _epochs(store, verify, train_transform(224), 64, 2))


def bench_small(contest: Contest, workspace: Path) -> None:
    """How fast are raw 32 x 32 images, in later epochs and in a program's first one?"""
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    path = _pack_small(images, workspace)
    first: dict[str, Work] = {
        f"{verify}, first epoch": functools.partial(_first_epoch, path, verify) for verify in ("sample", "never")
    }
    rounds = _compare(contest, lambda verify: _epochs(path, verify, None, BATCH, EPOCHS), first)
    contest.measure("the first epoch's rate to never's", rounds.ratios("sample, first epoch", "never, first epoch"))


def _epochs(path: Path, verify: Verify, transform: Any, batch_size: int, epochs: int = 1) -> Epochs:
    return Epochs(fast_loader(fastload.ImageDataset(path, transform, verify=verify), batch_size), epochs)


def _first_epoch(path: Path, verify: Verify) -> int:
    return _epochs(path, verify, None, BATCH)()


def _compare(contest: Contest, epochs: Callable[[Verify], Work], others: Mapping[str, Work] | None = None) -> Rounds:
    """The three; and one of them twice, which says how far apart the same thing comes out."""
    works = {verify: epochs(verify) for verify in (DEFAULT, *get_args(Verify))}
    works |= {"never again": epochs("never"), **(others or {})}
    rounds = contest.run(works, rounds=31)
    contest.target("share of never's rate", rounds.ratios(DEFAULT, "never"), at_least=ALLOWED)
    contest.measure("the same per CPU second", rounds.cpu_ratios(DEFAULT, "never"))
    contest.measure("never's share of its own rate", rounds.ratios("never again", "never"))
    contest.measure("always: share of never's rate", rounds.ratios("always", "never"))
    return rounds
