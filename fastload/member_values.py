"""What a file of a sample holds, by its extension: an image, a number, text, JSON, an array. Nothing is unpickled."""

from __future__ import annotations

import io
import json
import math
import re
import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SourceError
from .samples import EncodedImage

IMAGES = ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm", "pgm")
MASKS = ("mask.png", "seg.png", "label.png", "seg")
INSTANCES = "instances.png"
LABELS = ("cls", "label.json")

_TEXTS = ("txt", "text", "transcript", "id")
_INTEGERS = ("cls", "cls2", "index", "inx")
_MOST_NESTED = 100  # values of JSON
_LONGEST_CLASS = 1000

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

_brief = reprlib.Repr()
_brief.maxstring = 60


def last_part(extension: str) -> str:
    """`png` of `seg.png`."""
    return extension.rpartition(".")[2]


def is_known(extension: str) -> bool:
    """Whether `value` makes more of an extension than bytes."""
    return extension in MASKS or last_part(extension) in (*IMAGES, *_INTEGERS, *_TEXTS, "json", "npy")


def value(extension: str, data: bytes) -> Any:
    """The value of a file of this extension, in lower case; its last part decides.

    Raises:
        SourceError: the content makes no sense; the message goes on from the name of the file.
    """
    kind = last_part(extension)
    if extension in MASKS or kind in IMAGES:
        if not data:
            raise SourceError("is empty (0 bytes); it has to be an image")
        return EncodedImage(data)
    if kind in _INTEGERS:
        return integer(_text(data).strip())
    if kind in _TEXTS:
        return _text(data)
    if kind == "json":
        return _numbers(_json(data)) if extension == LABELS[1] else _json(data)
    return _array(data) if kind == "npy" else data


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def class_text(data: bytes) -> str:
    """A whole number, or the name of a class, as `.cls` has it."""
    if len(data) > _LONGEST_CLASS:
        raise SourceError(f"has {len(data)} bytes; a label is a whole number, or a name of up to {_LONGEST_CLASS}")
    text = _text(data).strip()
    if not text or not text.isprintable():
        raise SourceError(f"is {_brief.repr(text)}; it has to be a whole number, or the name of a class")
    return text


def is_integer(text: str) -> bool:
    """Whether a label is a number."""
    return _INTEGER.fullmatch(text) is not None


def integer(text: str) -> int:
    """The number that a text is."""
    if not is_integer(text):
        raise SourceError(f"is {_brief.repr(text)}; it has to be a whole number of up to 18 digits")
    return int(text)


def _json(data: bytes) -> Any:
    try:
        value = json.loads(data)
    except RecursionError:
        value, nested = None, True
    except ValueError as error:
        raise SourceError(f"is not JSON: {error}") from error
    else:
        nested = _is_nested(value, _MOST_NESTED)
    if nested:
        raise SourceError(f"is JSON nested too deeply; {_MOST_NESTED} values within one another are allowed")
    return value


def _is_nested(value: object, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return not most or any(
        _is_nested(part, most - 1) for part in (value.values() if isinstance(value, dict) else value)
    )


def _numbers(value: object) -> list[int | float]:
    """Several labels, or real ones, as they are in JSON: null is a missing one."""
    if not isinstance(value, list) or not all(type(number) in (int, float, type(None)) for number in value):
        raise SourceError(f"is {_brief.repr(value)}; it has to be a list of numbers")
    return [math.nan if number is None else number for number in value]


def _array(data: bytes) -> npt.NDArray[Any]:
    """The numbers of an .npy file that is exactly as long as its header says."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(file)
        if dtype.kind not in "biufc":
            raise SourceError(f"holds values of type {dtype}; numbers can be packed")
        count, rest = math.prod(shape), len(data) - file.tell()
        if min(shape, default=0) < 0 or count * dtype.itemsize != rest:
            raise SourceError(f"has {rest} bytes behind its header, which says {shape} of {dtype}")
        return np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    except SourceError:
        raise
    except Exception as error:  # NumPy's parser of headers raises whatever a damaged one makes it stumble over
        raise SourceError(f"is no .npy file, or damaged: {type(error).__name__}: {str(error)[:200]}") from error
