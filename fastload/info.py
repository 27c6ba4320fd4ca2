"""What is in a store, from its manifest and columns: no record is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import blocks
from .errors import FastloadError
from .geometry import MAX_PIXELS
from .store import Store
from .values import Value
from .verify import verify


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a store in plain values.

    Returns a dict: path, format_version, digest, created, source, options, samples, bytes (of the file), quarantined,
    stored ("records" or "column"), classes (their number), labelled (samples with a label), samples_per_class
    (smallest, median, largest; None without labels), tiles (how many images are re-cut, and for each reason why not; {}
    if they lie in a column), masks (the largest value of each), fields (name and kind). Where there are images:
    image_bytes, bits (of a value: 8 or 16), dtype ("uint8", "uint16" or "int16"), size (smallest, median and largest
    width, height and megapixels), and shorter_side: a histogram, a list of (from, to, samples) in pixels.

    Raises:
        FileNotFoundError, StoreFormatError: see `Store`.
    """
    store = Store(path)
    labels = np.asarray(store.columns["label"]).reshape(len(store), -1)
    real = labels.dtype.kind == "f"
    labelled = ~np.isnan(labels) if real else labels >= 0
    counts = np.unique(labels[labelled & (not real)], return_counts=True)[1]
    manifest = store.manifest
    return {
        "path": store.path,
        **{key: manifest[key] for key in ("format_version", "digest", "created", "source", "options")},
        "samples": len(store),
        "bytes": os.path.getsize(store.path),
        "quarantined": manifest["quarantined"],
        "stored": "column" if "image" in store.columns else "records",
        "classes": len(counts) if store.classes is None else len(store.classes),
        "labelled": int(labelled.any(axis=1).sum()),
        "samples_per_class": _spread(counts) if len(counts) else None,
        "tiles": _tiles(store),
        "masks": {mask: int(np.asarray(store.columns[f"{mask}_max"]).max()) for mask in store.masks},
        "fields": [{"name": spec.name, "kind": spec.kind} for spec in store.schema.specs],
        **(_images(store) if store.schema.image is not None else {}),
    }


def _images(store: Store) -> dict[str, Any]:
    sizes = np.asarray(store.columns["size"]).astype(np.int64)
    return {
        "bits": 8 * store.image_dtype.itemsize,
        "dtype": store.image_dtype.name,
        "image_bytes": int(np.asarray(store.columns["bytes"]).sum()),
        "size": {
            "width": _spread(sizes[:, 1]),
            "height": _spread(sizes[:, 0]),
            "megapixels": _spread(sizes.prod(axis=1) / 1e6),
        },
        "shorter_side": _histogram(sizes.min(axis=1)),
    }


def find(
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    *,
    of_class: str | None = None,
    damaged: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[int]:
    """The indices of samples: those given, or all; of these the ones of a class; of these the ones that are damaged.

    of_class: a name or a number; in a store with masks, those whose mask shows it; with boxes, those that have one.
    max_pixels: larger images count as damaged.

    Raises:
        ValueError: there is no such class, or no such sample.
    """
    store = Store(path, max_pixels=max_pixels)
    wrong = [index for index in indices or () if not 0 <= index < len(store)]
    if wrong:
        raise ValueError(f"there is no sample {wrong[0]}: {store.path} has {len(store)}")
    found = list(range(len(store)) if indices is None else indices)
    if of_class is not None:
        names = {name: number for number, name in enumerate(store.classes or ())}
        if of_class not in names and not of_class.isdecimal():
            raise ValueError(f"there is no class {of_class!r}; there are {', '.join([*names][:10]) or 'numbers'}")
        found = [
            index for index in found if _shows(store, index, names[of_class] if of_class in names else int(of_class))
        ]
    if damaged:
        wanted = {damage.index for damage in verify(path, decode_images=True, max_pixels=max_pixels).damaged}
        found = [index for index in found if index in wanted]
    return found


def spread(indices: list[int], count: int) -> list[int]:
    """So many of them, evenly spread: the first of many are of one class, as a rule."""
    return [indices[place * len(indices) // count] for place in range(count)] if len(indices) > count else indices


def _shows(store: Store, index: int, label: int) -> bool:
    if "mask" in store.masks:
        try:
            return bool((blocks.read(store[index]["mask"]) == label).any())
        except FastloadError:
            return False  # nobody knows what a damaged mask shows
    boxes, labels = store.schema.boxes_and_labels
    if boxes is not None and labels is not None:
        spec = next(spec for spec in store.schema.specs if spec.name == labels)
        try:
            return spec.kind == "array" and bool((Value(spec, None).read(store[index][labels], []) == label).any())
        except FastloadError:
            return False
    return bool((store.columns["label"].view(index) == label).any())


def _tiles(store: Store) -> dict[str, int]:
    if "tiles" not in store.columns or "image" in store.columns:
        return {}
    outcomes, counts = np.unique(np.asarray(store.columns["tiles"]), return_counts=True)
    texts = dict(enumerate(store.manifest.get("tiles", ())))
    return {
        texts.get(outcome, f"outcome {outcome}"): count
        for outcome, count in zip(outcomes.tolist(), counts.tolist(), strict=True)
    }


def _spread(values: Any) -> list[float]:
    """Smallest, median, largest."""
    return [round(float(f(values)), 3) for f in (np.min, np.median, np.max)]


def _histogram(lengths: Any) -> list[tuple[int, int, int]]:
    """(from, to, count) over ranges that halve an octave: 128-181, 182-255, 256-361 and so on; empty ends left out."""
    edges = np.unique(np.round(2 ** np.arange(0, 33, 0.5)).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    (filled,) = np.nonzero(counts)
    return [(int(edges[i]), int(edges[i + 1]) - 1, int(counts[i])) for i in range(filled[0], filled[-1] + 1)]
