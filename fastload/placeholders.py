"""What stands for a sample that can't be had, and what tells such samples from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .fields import Node, Schema, Spec, leaves, restore

IGNORE_LABEL = -100
"""What torch's losses ignore by default."""

VALID = "valid"
"""The field that says which samples are no placeholders."""


def check_ignore_label(label: int, schema: Schema, real: bool, classes: Sequence[str]) -> None:
    """See to it that placeholders of these samples can have this label. real: whether labels are.

    classes: names by label; placeholders must not pass for one of these.

    Raises:
        ValueError: it is no whole number, or one that labels of this type don't hold, or a class; the samples have no
            such labels.
    """
    if type(label) is not int:
        raise ValueError(f"ignore_label is {label!r}; it takes a whole number, {IGNORE_LABEL} or 255 say")
    if label == IGNORE_LABEL:
        return
    spec = next((spec for spec in schema.specs if spec.column == "label"), None)
    if spec is None or real:
        what = "labels are real numbers, NaN for placeholders" if real else "samples have no labels"
        raise ValueError(f"ignore_label is {label}, and the {what}; leave it out, return_valid=True tells them apart")
    limits = np.iinfo(np.int64 if spec.type in ("", "int", "bool") else spec.dtype)
    if not limits.min <= label <= limits.max:
        raise ValueError(f"ignore_label is {label}; labels are {limits.dtype}, from {limits.min} to {limits.max}")
    if 0 <= label < len(classes):
        raise ValueError(
            f"ignore_label is {label}, which is the class {classes[label]!r}; take another number, or return_valid=True"
        )


def placeholder(spec: Spec, ignore_label: int = IGNORE_LABEL) -> Any:
    """What stands for a field of a sample that can't be had: 0, NaN or nothing; of a label, `ignore_label`."""
    if spec.column is not None:
        if spec.column == "label" and spec.type in ("int", "bool"):
            return ignore_label
        value = np.full((1, *spec.shape), ignore_label if spec.column == "label" else 0, spec.dtype)
        if value.dtype.kind == "f":
            value[...] = np.nan
        return restore(spec, value)[0]
    if spec.kind == "array":
        zeros = np.zeros(spec.shape if spec.dtype else 0, spec.dtype or np.float64)
        return torch.from_numpy(zeros) if spec.type == "tensor" else zeros
    return {"text": "", "bytes": b"", "json": None}[spec.kind]


def with_valid(sample: Node) -> Node:
    """The structure of samples with `VALID` behind the rest of it; what is no container becomes a tuple with it.

    Raises:
        ValueError: they have such a field.
    """
    tree: dict[str, Any] = {"tuple": [sample]} if isinstance(sample, str) else sample
    ((form, children),) = tree.items()
    if VALID in leaves(sample) or (form == "dict" and any(key == VALID for key, _ in children)):
        raise ValueError(
            f"return_valid=True adds {VALID!r} to the samples, and they have a field of that name; leave it out, and "
            "look for the placeholders' label, or pack with another name"
        )
    return {form: [*children, [VALID, VALID] if form == "dict" else VALID]}


def ignored(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which samples have a label that says: ignore."""
    found = np.isnan(labels) if labels.dtype.kind == "f" else labels == IGNORE_LABEL
    return np.asarray(found.reshape(len(labels), -1).all(axis=1))
