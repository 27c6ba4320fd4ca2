"""Damaged files: JPEGs, JSON, and any bytes; and what re-cutting a JPEG may do: leave it alone, or keep every pixel.

For a few hundred cases in the tests and for as many as one likes in `tools/fuzz`. And damaged stores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jpegs import (
    EOI,
    JFIF,
    SAMPLINGS,
    SOI,
    Component,
    Picture,
    Random,
    Scan,
    encode,
    random_picture,
    random_progression,
    segment,
)

from fastload import decode, record, tiles, toc
from fastload.errors import ChecksumError, DecodeError, StoreError
from fastload.geometry import Box
from fastload.image_fields import tiled
from fastload.jpeg import Pixels
from fastload.options import Options
from fastload.recut import Untouched, recut
from fastload.store import Store

REMARKS = "re-cut, and libjpeg complains of the original"
_DHT, _SOS, _DQT, _DRI = 0xC4, 0xDA, 0xDB, 0xDD
_SKIPPED = (b"", b"\xd8", b"\xd9", b"\xe0")


def made_up(random: Random) -> bytes:
    """A small undamaged JPEG of a random kind."""
    h, v = SAMPLINGS[random.integers(5)]
    components = (Component(1, h, v), Component(2, 1, 1, 1), Component(3, 1, 1, 1))[: int(random.choice([1, 3, 3]))]
    height, width = random.integers(1, 120, 2).tolist()
    picture = random_picture(random, height, width, components, random.random() * 0.4, int(random.choice([1, 9, 200])))
    count = len(components)
    if random.random() < 0.1:
        return too_large(random, picture)
    scripts = [Scan(tuple(range(count)))], [Scan((i,)) for i in range(count)], random_progression(random, count)
    scans = scripts[random.integers(3)]
    if random.random() < 0.5:
        scans = [scan._replace(interval=int(random.integers(1, 20))) for scan in scans]
    return encode(picture, scans, skewed=bool(random.integers(2)), tables=int(random.integers(1, 3)))


def too_large(random: Random, picture: Picture) -> bytes:
    """A progressive JPEG of coefficients that 8-bit images don't have: nothing but refinements builds them up."""
    bits = int(random.integers(8, 14))
    most = (1 << bits) - 1
    arrays = [(c * random.integers(1, most, c.shape)).clip(-most, most) for c in picture.coefficients]
    for array in arrays:
        array[..., 0] = abs(array[..., 0])
    picture = picture._replace(coefficients=tuple(arrays))
    scans = [Scan((place,), 0, 0, 0, bits) for place in range(len(picture.components))]
    for bit in range(bits - 1, -1, -1):
        for place in range(len(picture.components)):
            scans += [Scan((place,), 0, 0, bit + 1, bit), Scan((place,), 1, 63, bit + 1, bit)]
    return encode(picture, scans)


def pieces(data: bytes) -> list[bytes]:
    """A JPEG's segments, and the bytes of its scans, one after the other."""
    edges, place = [0, 2], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xD9:
        marker = data[place + 1]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        edges.append(place)
        if marker == _SOS:
            while place + 1 < len(data) and (data[place] != 0xFF or data[place + 1] in (0, *range(0xD0, 0xD8))):
                place += 1
            edges.append(place)
    return [data[start:end] for start, end in pairwise([*edges, len(data)])]


def damaged(random: Random, data: bytes, other: bytes) -> bytes:
    """The JPEG with one to three things wrong with it; `other` lends what is taken from elsewhere."""
    for _ in range(int(random.choice([1, 1, 2, 3]))):
        data = _DAMAGES[random.integers(len(_DAMAGES))](random, data, other) or SOI
    return data


def _place(random: Random, data: bytes) -> int:
    """A place in the file, half of the time in its header."""
    end = data.find(b"\xff\xda") + 14 if random.random() < 0.5 else len(data)
    return int(random.integers(max(1, min(end, len(data)))))


def _flip(random: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.choice([1, 1, 2, 8]))):
        changed[_place(random, data)] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _overwrite(random: Random, data: bytes, other: bytes) -> bytes:
    at, length = _place(random, data), int(random.choice([1, 2, 20, 300]))
    value = random.bytes(length) if random.random() < 0.6 else bytes([int(random.choice([0, 255]))]) * length
    return data[:at] + value + data[at + length :]


def _insert(random: Random, data: bytes, other: bytes) -> bytes:
    at = _place(random, data)
    marker = bytes((0xFF, int(random.choice([0, 1, 0xC4, 0xD0, 0xD1, 0xD7, 0xD8, 0xD9, 0xDA, 0xDC, 0xFF]))))
    return data[:at] + (random.bytes(int(random.integers(1, 60))) if random.random() < 0.4 else marker) + data[at:]


def _drop(random: Random, data: bytes, other: bytes) -> bytes:
    at = _place(random, data)
    return data[:at] + data[at + int(random.choice([1, 2, 7, 100])) :]


def _truncate(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(random, data) + 1] + EOI * int(random.integers(2))


def _repeat(random: Random, data: bytes, other: bytes) -> bytes:
    at = _place(random, data)
    return data[:at] + data[at : at + int(random.choice([1, 10, 500]))] * 2 + data[at:]


def _join(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(random, data)] + other[_place(random, other) :]


def _rearrange(random: Random, data: bytes, other: bytes) -> bytes:
    """Segments dropped, doubled, exchanged, or taken from another file."""
    parts, lent = pieces(data), pieces(other)
    i, j = random.integers(0, len(parts), 2).tolist()
    way = random.integers(5)
    if way == 0:
        parts[i], parts[j] = parts[j], parts[i]
    elif way == 1:
        del parts[i]
    elif way == 2:
        parts.insert(j, parts[i])
    elif way == 3:
        parts.insert(i, lent[random.integers(len(lent))])
    else:
        marker = random.choice([_DHT, _DQT, _SOS])
        mine = [k for k, part in enumerate(parts) if part[1:2] == bytes((marker,)) and part[:1] == b"\xff"]
        theirs = [part for part in lent if part[1:2] == bytes((marker,)) and part[:1] == b"\xff"]
        for k, part in zip(mine, theirs, strict=False):
            parts[k] = part
    return b"".join(parts)


def _field(random: Random, data: bytes, other: bytes) -> bytes:
    """A byte or two of one of the segments' contents or lengths changed to a number that matters."""
    parts = pieces(data)
    heads = [k for k, part in enumerate(parts) if part[:1] == b"\xff" and part[1:2] not in _SKIPPED]
    if not heads:
        return data
    k = int(random.choice(heads))
    part = bytearray(parts[k])
    at = int(random.integers(1, min(len(part), 30)))
    part[at] = int(random.choice([0, 1, 2, 3, 7, 8, 13, 16, 17, 63, 64, 127, 128, 255, random.integers(256)]))
    parts[k] = bytes(part)
    return b"".join(parts)


def _bogus_table(random: Random, data: bytes, other: bytes) -> bytes:
    """A Huffman or quantisation table of random numbers, or another restart interval, in front of a scan."""
    counts = random.integers(0, 3, 16) * (random.random(16) < 0.5)
    symbols = random.bytes(int(counts.sum()) + int(random.random() < 0.1))
    number = int(random.choice([0, 1, 0x10, 0x11]))
    table = (
        segment(_DHT, bytes((number, *counts.tolist())) + symbols),
        segment(_DQT, bytes((number & 1 | 0x10 * (random.random() < 0.3),)) + random.bytes(64)),
        segment(_DRI, bytes(random.choice([0, 1, 2, 255], 2).astype(np.uint8))),
        segment(0xE0, JFIF),
        segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes((int(random.integers(3)),))),
    )[random.choice(5, p=[0.5, 0.2, 0.2, 0.05, 0.05])]
    parts = pieces(data)
    scans = [k for k, part in enumerate(parts) if part[:2] == b"\xff\xda"] or [0]
    parts.insert(int(random.choice(scans)), table)
    return b"".join(parts)


def _more_scans(random: Random, data: bytes, other: bytes) -> bytes:
    """Scans again and again, of another band or precision each."""
    parts = pieces(data)
    scans = [k for k, part in enumerate(parts[:-1]) if part[:2] == b"\xff\xda"]
    if not scans:
        return data
    k = int(random.choice(scans))
    more = []
    for _ in range(int(random.choice([1, 2, 20, 200]))):
        head = bytearray(parts[k])
        if random.random() < 0.7:
            first = int(random.choice([0, 1, 1, 5, 63]))
            high = int(random.choice([0, 0, 1, 2, 10, 13, 14, 15]))
            head[-3:] = first, int(random.choice([0, 5, 63])), high << 4 | max(high - 1, 0)
        more += [bytes(head), parts[k + 1][: int(random.choice([0, 3, 100000]))]]
    return b"".join([*parts[: k + 2], *more, *parts[k + 2 :]])


_DAMAGES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    *(_flip, _flip, _overwrite, _insert, _drop, _truncate, _repeat, _join),
    *(_rearrange, _rearrange, _field, _field, _bogus_table, _more_scans),
)


_VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 255, 1 << 16, 1 << 31, 1 << 63, -(1 << 63), 10**400, 0.5, -0.0, 1e300, float("nan")),
    *(float("inf"), "", "\0", "\ud800", "../x", "a.png", "image", "x" * 5000, [], {}, [[]], [0, 0], {"id": 0}),
)


def damaged_json(random: Random, data: bytes, other: bytes) -> bytes:
    """The JSON with one to three values changed, dropped, doubled or exchanged; what is none as any other bytes."""
    try:
        value, lent = json.loads(data), json.loads(other)
        for _ in range(int(random.choice([1, 1, 2, 3]))):
            value = _changed(random, value, lent)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return damaged_bytes(random, data, other)


def _changed(random: Random, value: Any, other: Any) -> Any:
    """The value, changed in place somewhere within, or another one."""
    places = _places(value)
    if not places:
        return _odd_value(random)
    parent, key = places[random.integers(len(places))]
    source, place = (lent := _places(other) or places)[random.integers(len(lent))]
    way = random.integers(5)
    if way == 0:
        del parent[key]
    elif way == 1:
        parent[key] = deepcopy(source[place])
    elif way == 2 and isinstance(parent, list):
        parent.insert(key, deepcopy(parent[key]))
    elif way == 3 and isinstance(parent, dict):
        parent[str(place)] = parent.pop(key)
    else:
        parent[key] = _odd_value(random)
    return value


def _odd_value(random: Random) -> Any:
    return deepcopy(_VALUES[random.integers(len(_VALUES))])


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or dict within a value, with each index or key that it has."""
    found, left = [], [value]
    while left:
        parent = left.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        left += [parent[key] for key in keys]
    return found


def damaged_bytes(random: Random, data: bytes, other: bytes) -> bytes:
    """Any file with one to four things wrong with it."""
    for _ in range(int(random.integers(1, 5))):
        data = _BYTE_DAMAGES[random.integers(len(_BYTE_DAMAGES))](random, data, other) or b"\0"
    return data


_BYTE_DAMAGES = (_flip, _overwrite, _drop, _truncate, _repeat, _join)


def damaged_store(random: Random, data: bytes, other: bytes) -> bytes:
    """The store with another value of `meta` (the manifest, a column, ...) in its table, or any bytes of it changed."""
    if random.random() < 0.5:
        return damaged_bytes(random, data, other)
    try:
        places = toc.read(memoryview(data), "")
    except (StoreError, ValueError):
        return damaged_bytes(random, data, other)
    end = int.from_bytes(data[-32:-24], "little")
    key = sorted(places)[random.integers(len(places))]
    value = data[places[key].offset : places[key].offset + places[key].length]
    value = (damaged_bytes if key.startswith("column") else damaged_json)(random, value, value)
    places[key] = toc.Place(end, len(value), record.checksum(value))
    if random.random() < 0.1:
        places[key] = places[key]._replace(offset=int(random.integers(2 * end)))
    return data[:end] + value + toc.serialise(places, _transaction(data), end + len(value))


def _transaction(data: bytes) -> int:
    return int(toc.meta_of(memoryview(data)).transaction)


def random_box(random: Random, height: int, width: int) -> Box:
    """A rectangle inside an image."""
    y, x = int(random.integers(height)), int(random.integers(width))
    return Box(x, y, int(random.integers(1, width - x + 1)), int(random.integers(1, height - y + 1)))


def judge(data: bytes, random: Random) -> str:
    """Re-cut a JPEG, see to it that no pixel changes and that damage to its index does no harm; say what came of it."""
    try:
        cut = recut(data)
    except Untouched as reason:
        return tiles.OUTCOMES[reason.outcome]
    height, width = recut_size(cut.data)
    field = record.Field(record.JPEG, data, 1, 3, 0, width, height)
    try:
        whole = decode.pixels(field, keep=True)
    except DecodeError:
        return REMARKS
    cut, outcome = tiled(field, whole, Options())
    if outcome == tiles.RECUT:
        (cut,) = record.parse(record.build([cut]))
        assert np.array_equal(decode.pixels(cut), whole), "other pixels"
        check_crops(cut, whole, random)
        check_index(cut, random)
    else:
        assert outcome == tiles.PIXELS
        assert cut is field, "another outcome"
    return tiles.OUTCOMES[outcome]


def recut_size(data: bytes) -> tuple[int, int]:
    """(height, width), where no decoder may have an opinion: the last frame's header."""
    at = max(data.rfind(b"\xff\xc0\0\x0b\x08"), data.rfind(b"\xff\xc0\0\x11\x08"), data.rfind(b"\xff\xc1\0"))
    return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")


def check_crops(field: record.Field, whole: Pixels, random: Random, count: int = 3) -> None:
    """Crops read from tiles are crops of the whole image, at a reduced size too.

    The library is told what size is to come out. Of 5 pixels, 1/4 and 3/8 are both 2: such images are not reduced.
    """
    for reduction in random.choice([1, 1, 2, 4, 8] if field.width > 5 else [1], count).tolist():
        image = whole if reduction == 1 else decode._decode_jpeg(field.payload, whole.shape[:2], reduction, keep=True)
        box = random_box(random, *image.shape[:2])
        crop = decode.region(field, box, reduction)
        assert np.array_equal(crop, decode._crop(image, box)), f"other pixels in {box} at 1/{reduction}"


def check_index(field: record.Field, random: Random, count: int = 3) -> None:
    """An index of other bytes gives a small JPEG of its size, DecodeError or ChecksumError."""
    for _ in range(count):
        index = bytearray(field.tiles)
        for _ in range(int(random.choice([0, 1, 1, 3]))):
            index[int(random.integers(min(len(index), int(random.choice([20, 9999999])))))] = int(random.integers(256))
        if random.random() < 0.3:
            index = index[: int(random.integers(len(index)))]
        elif random.random() < 0.1:
            index += random.bytes(3)
        changed = field._replace(tiles=bytes(index))
        try:
            small = tiles.splice(changed, random_box(random, field.height, field.width))
            if small is not None:
                decode._decode_jpeg(small.data, small.size)
        except (DecodeError, ChecksumError):
            pass


def spoil(source: Path, copy: Path, indices: Iterable[int], field: str = "image") -> Path:
    """A copy of a store in which 20 bytes in the middle of a field of each of these samples are flipped."""
    store, data = Store(source), source.read_bytes()
    for index in indices:
        payload = bytes(store[index][field].payload)
        assert len(payload) >= 40
        assert payload in data
        first, last = payload[: len(payload) // 2], payload[len(payload) // 2 :]
        data = data.replace(payload, first + bytes(byte ^ 0xFF for byte in last[:20]) + last[20:])
    copy.write_bytes(data)
    return copy
