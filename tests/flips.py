"""Finished stores with flipped bits, garbage and missing ends, and what reading may make of them.

Either opening or reading ends in an error of ours, or every sample is what was packed or a placeholder that
`failures` lists; and whenever not all is as it was, `verify` finds damage. Anything else fails; a crash of the
interpreter is the caller's to notice. For some hundred faults in the tests, and any number in `tools/flips`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import fastload
from fastload import ImageDataset, Store
from fastload.errors import FastloadError
from fastload.lmdb_pages import Pages
from fastload.verify import verify

Random = np.random.Generator
SAMPLES = 40
ALLOWED = ("error", "placeholders", "as packed")


class Case(NamedTuple):
    """A store's bytes, all that is read of it, and where its parts are: (name, from, to)."""

    data: bytes
    expected: list[list[Any]]
    extras: Any
    parts: list[tuple[str, int, int]]


def make_cases(folder: Path) -> dict[str, Case]:
    """Stores of every kind, packed in `folder`."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (6, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1) for _ in range(SAMPLES)]
    photos = folder / "photos"
    for number, pixels in enumerate(pictures):
        path = photos / f"class{number % 3}" / f"{number}.{'png' if number % 9 == 8 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (photos / "class0" / "no image.jpg").write_bytes(b"nothing")
    small = folder / "small"
    small.mkdir()
    for number in range(SAMPLES):
        Image.fromarray(pictures[number][::12, ::12]).save(small / f"{number}.png")
    equal = folder / "equal"
    equal.mkdir()
    for number in range(SAMPLES):
        Image.fromarray(pictures[number][::9, ::9]).save(equal / f"{number:02}.bmp")
    samples = [
        {
            "image": fastload.EncodedImage(_png(pixels)),
            "boxes": np.array([[1, 2, 3, 4]] * (number % 3), np.float32).reshape(-1, 4),
            "mask": (pixels[..., 0] // 80).astype(np.uint8),
            "text": f"text {number}",
            "number": number * 0.5,
            "array": np.arange(number, dtype=np.int16),
        }
        for number, pixels in enumerate(pictures)
    ]
    sources: dict[str, dict[str, Any]] = {
        "JPEGs in tiles": {"source": photos},
        "raw column": {"source": small, "encode": "raw"},
        "equal lengths": {"source": equal},
        "dicts of fields": {"source": samples, "kinds": {"boxes": "boxes", "mask": "mask"}},
    }
    return {name: _case(folder / "whole.lmdb", options) for name, options in sources.items()}


def _png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _case(path: Path, options: dict[str, Any]) -> Case:
    fastload.pack(**options, destination=path, overwrite=True)
    data = path.read_bytes()
    store = Store(path)
    parts = [(f"record {i}", *_span(store.places[i].tolist()[:2])) for i in range(len(store))]
    pages = Pages(memoryview(data))
    parts += [(key.decode(), *_span(place)) for key, place in pages.values(pages.tree(b"meta")).items()]
    size = pages.meta.page_size
    trees = (pages.meta.free, pages.meta.main, pages.tree(b"samples"), pages.tree(b"meta"))
    parts += [("tree", n * size, (n + 1) * size) for tree in trees for n, _, _ in pages._walk(tree)]
    parts += [("meta page", 0, 160), ("meta page", size, size + 160)]
    parts += [("table of contents", pages.meta.end, len(data)), ("trailer", len(data) - 40, len(data))]
    return Case(data, _everything(ImageDataset(path, on_error="raise")), _extras(store), parts)


def _span(place: tuple[int, int]) -> tuple[int, int]:
    return place[0], place[0] + place[1]


def _everything(dataset: ImageDataset) -> list[list[Any]]:
    return [_plain(sample) for sample in dataset.__getitems__(range(len(dataset)))]


def _plain(sample: Any) -> list[Any]:
    values = sample.values() if isinstance(sample, dict) else sample
    return [(v.shape, np.asarray(v).tobytes()) if isinstance(v, torch.Tensor | np.ndarray) else v for v in values]


def _extras(store: Store) -> Any:
    return store.manifest, store.quarantine(), np.asarray(store.columns["label"]).tolist()


def faults(random: Random, case: Case) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file's bytes: for ever. Bits flip anywhere, or in a part that is chosen first."""
    while True:
        kind = random.choice(["flip"] * 6 + ["flips", "cut", "zeros", "noise", "exchange", "swap", "longer"])
        yield _FAULTS[kind](random, case)


def _flip(random: Random, case: Case) -> tuple[str, bytes]:
    name, start, end = "file", 0, len(case.data)
    if random.random() < 0.7:
        name = random.choice(sorted({part[0].split(" ")[0] for part in case.parts}))
        chosen = [part for part in case.parts if part[0].split(" ")[0] == name]
        name, start, end = chosen[random.integers(len(chosen))]
    place, bit = int(random.integers(start, end)), int(random.integers(8))
    data = bytearray(case.data)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place} ({name})", bytes(data)


def _flips(random: Random, case: Case) -> tuple[str, bytes]:
    data = np.frombuffer(case.data, np.uint8).copy()
    count = int(random.choice([2, 10, 1000]))
    data[random.integers(0, len(data), count)] ^= (1 << random.integers(0, 8, count)).astype(np.uint8)
    return f"{count} flips", data.tobytes()


def _cut(random: Random, case: Case) -> tuple[str, bytes]:
    length = int(random.integers(len(case.data)))
    return f"cut to {length} bytes", case.data[:length]


def _stretch(random: Random, case: Case) -> slice:
    length = int(random.choice([1, 8, 512, 4096, 20_000]))
    start = int(random.integers(len(case.data))) // length * length
    return slice(start, start + length)


def _zeros(random: Random, case: Case) -> tuple[str, bytes]:
    data, where = bytearray(case.data), _stretch(random, case)
    data[where] = bytes(len(data[where]))
    return f"zeros in {where}", bytes(data)


def _noise(random: Random, case: Case) -> tuple[str, bytes]:
    data, where = bytearray(case.data), _stretch(random, case)
    data[where] = random.bytes(len(data[where]))
    return f"noise in {where}", bytes(data)


def _exchange(random: Random, case: Case) -> tuple[str, bytes]:
    data = np.frombuffer(case.data[: len(case.data) // 4096 * 4096], np.uint8).reshape(-1, 4096).copy()
    a, b = random.integers(0, len(data), 2)
    data[[a, b]] = data[[b, a]]
    return f"pages {a} and {b} exchanged", data.tobytes() + case.data[data.size :]


def _swap(random: Random, case: Case) -> tuple[str, bytes]:
    """Two records, of one length if there are such, or two rows."""
    records = [part for part in case.parts if part[0].startswith("record ")]
    (_, a, end), (_, b, _) = (records[i] for i in random.choice(len(records), 2, replace=False))
    data, length = bytearray(case.data), end - a
    data[a:end], data[b : b + length] = data[b : b + length], data[a:end]
    return f"records at {a} and {b} exchanged", bytes(data)


def _longer(random: Random, case: Case) -> tuple[str, bytes]:
    more = random.bytes(int(random.choice([1, 40, 5000])))
    return f"{len(more)} bytes more", case.data + more


_FAULTS: dict[str, Callable[[Random, Case], tuple[str, bytes]]] = {
    "flip": _flip,
    "flips": _flips,
    "cut": _cut,
    "zeros": _zeros,
    "noise": _noise,
    "exchange": _exchange,
    "swap": _swap,
    "longer": _longer,
}


def judge(path: Path, case: Case, data: bytes, *, verified: bool) -> str:
    """Read a damaged store; one of `ALLOWED`, or what is wrong. verified: also see what `verify` says."""
    path.unlink(missing_ok=True)  # what is mapped must not be changed
    path.write_bytes(data)
    found = _outcome(path, case)
    if verified and found in ALLOWED and not _is_noticed(path) and found != "as packed":
        return f"{found}, and verify finds nothing"
    return found


def _outcome(path: Path, case: Case) -> str:
    try:
        dataset = ImageDataset(path)
        extras = _extras(dataset.store)
        samples = _everything(dataset)
    except FastloadError:
        return "error"
    except FileNotFoundError:
        return "a file that was there is said not to be"
    if extras != case.extras:
        return "another manifest, quarantine list or label"
    differ = {i for i, (now, then) in enumerate(zip(samples, case.expected, strict=True)) if now != then}
    if differ - set(dataset.failures):
        return f"samples {differ - set(dataset.failures)} are silently wrong"
    names = [i for i in range(len(samples)) if i not in dataset.failures and not _has_name(dataset.store, i)]
    return "placeholders" if differ or names else "as packed"


def _has_name(store: Store, index: int) -> bool:
    try:
        return bool(store.name(index))
    except FastloadError:
        return False


def _is_noticed(path: Path) -> bool:
    try:
        return bool(verify(path, workers=1).damaged)
    except FastloadError:
        return True
