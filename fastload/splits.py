"""Dividing samples into parts such as train, val and test: by class, never tearing a group apart, by seed.

Each class is divided by its shares: a part gets what is due to it, rounded down or up. Where it is rounded up is chosen
by the largest remainder, counting what earlier classes left over, so that the parts' totals are right to one sample
too, and of a hundred classes with one sample each ten are in the part whose share is 0.1. Samples of one group, such as
a file that is listed twice, stay together, at the price of less even numbers.

The same labels, groups, shares and seed give the same parts on every machine and for ever.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from .order import epoch_order

Indices = npt.NDArray[np.int64]

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SHARE = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_ROUNDING = Fraction(1, 1000)  # 0.333 three times is one
_UNITS = 10**9  # in which shares are counted


def parse_shares(text: str) -> dict[str, float]:
    """Shares that sum to 1 from a text such as "train=0.8,val=0.1,test=0.1", or "train=80,val=20", which are percent.

    Raises:
        ValueError: it is no such text, a name is used twice or is no part of a file name, or the sum is another.
    """
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if not _NAME.fullmatch(name) or not _SHARE.fullmatch(number) or len(number) > 30:
            raise ValueError(
                f"{part.strip()!r} is not a part and its share; write NAME=SHARE,NAME=SHARE with letters, digits, - "
                "and _ in names, as in train=0.8,val=0.2"
            )
        if name.lower() in map(str.lower, shares):
            raise ValueError(
                f"{name!r} is there twice in {text!r}; each part needs a name of its own, whatever its case"
            )
        shares[name] = Fraction(number)
    total = sum(shares.values(), Fraction(0))
    whole = 100 if abs(total / 100 - 1) <= _ROUNDING else 1
    if abs(total / whole - 1) > _ROUNDING:
        raise ValueError(f"the shares in {text!r} sum to {float(total):g}; they must sum to 1, or to 100 as percent")
    return {name: float(share / total) for name, share in shares.items()}


def checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that came as a dict, their names held to what `parse_shares` allows.

    Raises:
        ValueError: a name is no part of a file name, or there twice but for its case.
    """
    for name in shares:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a part; write letters, digits, - and _")
    if len({name.lower() for name in shares}) < len(shares):
        raise ValueError(f"a name is twice in {dict(shares)}; each part needs a name of its own, whatever its case")
    _weights(shares)
    return dict(shares)


def split(
    labels: Sequence[Hashable | None],
    groups: Sequence[Hashable],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    stratify: bool = True,
) -> dict[str, Indices]:
    """The indices of each part, ascending, int64.

    labels: a class for each sample; those with None are one more class. groups: samples with equal ones stay together,
    in the class of the first of them. shares: of each part, summing to 1. stratify: False divides all samples as one
    class; for labels that are no classes.

    Raises:
        ValueError: labels and groups differ in number, or the shares don't sum to 1 or are negative.
    """
    if len(labels) != len(groups):
        raise ValueError(f"there are {len(labels)} labels and {len(groups)} groups; each sample has one of both")
    weights = _weights(shares)
    group_of, firsts = _numbered(groups)
    sizes = np.bincount(group_of, minlength=len(firsts))
    if stratify:
        class_of, _ = _numbered([labels[first] for first in firsts])
    else:
        class_of = np.zeros(len(firsts), np.int64)
    order = epoch_order(len(sizes), seed, 0).take(0, len(sizes))
    classes = int(class_of.max(initial=-1)) + 1
    members = np.bincount(class_of, weights=sizes, minlength=classes).astype(np.int64)
    quotas = _quotas(members, weights, epoch_order(classes, seed, 1).take(0, classes))
    part_of = _placed(order, class_of, sizes, quotas, weights)[group_of]
    return {name: np.flatnonzero(part_of == part) for part, name in enumerate(shares)}


def _weights(shares: Mapping[str, float]) -> Indices:
    """The shares as whole numbers, whose sum is all."""
    total = sum(shares.values())
    if not all(share >= 0 for share in shares.values()) or not abs(total - 1) <= _ROUNDING:
        raise ValueError(f"the shares are {dict(shares)}; none may be negative, and they must sum to 1")
    return np.array([round(share / total * _UNITS) for share in shares.values()], np.int64)


def _numbered(values: Sequence[Hashable]) -> tuple[Indices, list[int]]:
    """For each value the number of those that are equal to it, by first appearance; where each number is first."""
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
    return found, np.unique(found, return_index=True)[1].tolist()


def _quotas(members: Indices, weights: Indices, order: Indices) -> Indices:
    """How many samples of each class each part gets, (classes, parts): what is due, rounded down or up.

    Rows sum to the class's samples. Columns are within 1 of what is due of all, for up to three parts; with more of
    them classes could be made up that lead them a little further astray.
    """
    whole = int(weights.sum())
    quotas, rests = np.divmod(members[:, None] * weights, whole)
    owed = [0] * len(weights)
    counts = members - quotas.sum(1)
    for row, count, rest in zip(order.tolist(), counts[order].tolist(), rests[order].tolist(), strict=True):
        if count:
            owed = list(map(operator.add, owed, rest))
            candidates = [part for part, share in enumerate(rest) if share]
            for part in sorted(candidates, key=owed.__getitem__, reverse=True)[:count]:
                quotas[row, part] += 1
                owed[part] -= whole
    return quotas


def _placed(order: Indices, class_of: Indices, sizes: Indices, quotas: Indices, weights: Indices) -> Indices:
    """The part of each group. Large groups go first, each where most is left to fill; single samples fill the rest."""
    left = quotas.copy()
    part_of = np.empty(len(sizes), np.int64)
    order = order[np.lexsort((-sizes[order], class_of[order]))]
    together = sizes[order] > 1
    late = np.where(weights > 0, 0, np.iinfo(np.int64).min // 2)  # what the classes before got too little of
    for row, members in itertools.groupby(order[together].tolist(), class_of.item):
        for group in members:
            part = part_of[group] = int((left[row] + late).argmax())
            left[row, part] -= sizes[group]
        filled = np.maximum(left[row], 0)
        for _ in range(int((filled - left[row]).sum())):
            filled[filled.argmax()] -= 1
        late += left[row] - filled
        left[row] = filled
    singles = order[~together]
    part_of[singles] = np.repeat(np.tile(np.arange(len(weights)), len(left)), left.ravel())
    return part_of
