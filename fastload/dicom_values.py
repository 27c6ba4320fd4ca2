"""What stored values mean: rescaled to the modality's units, windowed to 8 bits, looked up in a palette.

data: the elements of a header, of which all of this is read; its tables and numbers are checked before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SourceError

Pixels = npt.NDArray[Any]


def _place(data: Any, frame: int, group: str) -> Any:
    """The elements that hold for a frame: in a group of its own, of all frames, or at the top."""
    for keyword, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = data.get(keyword) or []
        if index < len(items) and items[index].get(group):
            return items[index][group].value[0]
    return data


def _number(data: Any, keyword: str) -> float | None:
    """The first of an element's numbers."""
    value = data.get(keyword)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    if not math.isfinite(number := float(value)):
        raise SourceError(f"it is damaged: its {keyword} is {number}")
    return number


def _slope(data: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept, which leave values alone where there are none."""
    place = _place(data, frame, "PixelValueTransformationSequence")
    slope, intercept = _number(place, "RescaleSlope"), _number(place, "RescaleIntercept")
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def rescaled(values: Pixels, data: Any, frame: int) -> Pixels:
    """In the units of the modality."""
    if data.get("ModalityLUTSequence"):
        return _looked_up(values, data.ModalityLUTSequence[0], data)
    slope, intercept = _slope(data, frame)
    units: Pixels = values * slope + intercept
    if not np.isfinite(units).all():
        raise SourceError(f"it is damaged: its RescaleSlope is {slope:g}, its RescaleIntercept {intercept:g}")
    return units


def whole(values: Pixels, data: Any, frame: int) -> Pixels:
    """Rescaled values as they are, if an image can have them."""
    if values.min() < -32768 or values.max() > 32767 or not np.array_equal(values, np.rint(values)):
        slope, intercept = _slope(data, frame)
        raise SourceError(
            f"rescaled (slope {slope:g}, intercept {intercept:g}), its values are {values.min():g} to "
            f"{values.max():g}; an image has whole numbers from -32768 to 32767; leave --rescale out, or map a part of "
            "them to 8 bits with --window"
        )
    return values


def windowed(values: Pixels, data: Any, frame: int, window: str | tuple[float, float]) -> Pixels:
    """From 0 to 255, by the standard's C.11.2.1.2 and C.11.2.1.3."""
    place = _place(data, frame, "FrameVOILUTSequence")
    centre, width = (
        (_number(place, "WindowCenter"), _number(place, "WindowWidth")) if isinstance(window, str) else window
    )
    if centre is None or width is None:
        return _voi_looked_up(values, data)
    function = str(place.get("VOILUTFunction") or "LINEAR").strip()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise SourceError(f"its VOILUTFunction is {function[:40]!r}; it must be LINEAR, LINEAR_EXACT or SIGMOID")
    if width < 1 if function == "LINEAR" else width <= 0:
        raise SourceError(
            f"the window is {width:g} wide; {'1 is the least' if function == 'LINEAR' else 'it must be more'}"
        )
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 255 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return np.where(values > centre, 255, 0)
    return np.clip(((values - centre) / width + 0.5) * 255, 0, 255)


def _voi_looked_up(values: Pixels, data: Any) -> Pixels:
    if not data.get("VOILUTSequence"):
        raise SourceError("it has no window of its own; give one for all images: --window CENTRE,WIDTH")
    item = data.VOILUTSequence[0]
    _, _, bits = _descriptor(item.LUTDescriptor)
    return _looked_up(np.rint(values), item, data) * (255 / ((1 << bits) - 1))


def _looked_up(values: Pixels, item: Any, data: Any) -> Pixels:
    """By the lookup table in an item of a sequence."""
    entries, first, bits = _descriptor(item.LUTDescriptor)
    return mapped(values, first, _table(item.LUTData, entries, bits, data))


def _descriptor(value: Any) -> tuple[int, int, int]:
    """Of a lookup table: its entries, the value that the first of them is for, the bits of each."""
    entries, first, bits = map(int, value)
    if bits not in range(8, 17):
        raise SourceError(f"it is damaged: its lookup table has entries of {bits} bits")
    return entries % 65536 or 65536, first, bits


def mapped(values: Pixels, first: int, table: Pixels) -> Pixels:
    """The entries for values, the first or the last one for what is beyond them."""
    entries: Pixels = table[np.clip(values - first, 0, len(table) - 1).astype(np.intp)]
    return entries


def _table(content: Any, entries: int, bits: int, data: Any) -> Pixels:
    """The entries of a lookup table, which are bytes, words, or numbers already."""
    if isinstance(content, bytes):
        table = _unpacked(content, 16 if len(content) >= 2 * entries else bits, data)
    else:
        table = np.atleast_1d(np.asarray(content, np.int64))
    if len(table) < entries or table.min() < 0 or (table := table[:entries]).max() >> bits:
        raise SourceError(
            f"it is damaged: its lookup table has {len(table)} entries, the largest is {table.max(initial=0)}; it "
            f"should have {entries} of {bits} bits"
        )
    return table


def _unpacked(content: bytes, bits: int, data: Any) -> Pixels:
    """Words, or the bytes that lie in words, lower one first."""
    little = data.original_encoding[1]
    words = np.frombuffer(content[: len(content) // 2 * 2], "<u2" if little else ">u2").astype("<u2")
    return words if bits > 8 else words.view(np.uint8)


def palette(data: Any) -> tuple[int, Pixels]:
    """The value that the first colour is for, and the colours, of shape (entries, 3)."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    descriptors = {_descriptor(data[f"{name}Descriptor"].value) for name in names}
    if len(descriptors) > 1:
        raise SourceError(f"it is damaged: the colours of its palette differ in size: {sorted(descriptors)}")
    entries, first, bits = descriptors.pop()
    channels = []
    for name in names:
        if f"{name}Data" in data:
            content = data[f"{name}Data"].value
        else:
            content = _expanded(_unpacked(data[f"Segmented{name}Data"].value, bits, data).tolist(), entries)
        channels.append(_table(content, entries, bits, data))
    return first, np.stack(channels, axis=1).astype(np.uint8 if bits == 8 else np.uint16)


def _expanded(segments: list[int], entries: int) -> list[int]:
    """The entries of a segmented table: runs of them, and lines from one to another."""
    table: list[int] = []
    place = 0
    while place + 2 < len(segments) and len(table) < entries:
        kind, length, start = *segments[place : place + 2], place + 2
        if kind == 0:
            table += segments[start : start + length]
            place = start + length
        elif kind == 1 and table:
            table += np.rint(np.linspace(table[-1], segments[start], length + 1)[1:]).astype(int).tolist()
            place = start + 1
        else:
            raise SourceError(f"its palette has a segment of type {kind}; runs (0) and lines (1) are known")
    return table
