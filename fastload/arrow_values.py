"""Arrow's types and scalars as the values of samples' fields: images, labels, arrays, and what JSON has.

Everything here comes from a stranger's file. A value that makes no sense is a SourceError, which says so of this value
alone; the caller adds file, row and column.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SourceError
from .samples import EncodedImage

NUMBERS = "boolean integer floating"
WORDS = "string large_string string_view"
BYTES = "binary large_binary binary_view fixed_size_binary"
LISTS = "list large_list fixed_size_list"

_DEEPEST = 16  # lists and structs within each other
_INT64 = range(-(1 << 63), 1 << 63)


def pyarrow() -> Any:
    """The library, with its modules `compute` and `parquet`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files are read by pyarrow: pip install "fastload[parquet]"') from error
    return pyarrow


# ---- types


def storage(type: Any) -> Any:
    """What an extension type or a dictionary is made of."""
    arrow = pyarrow()
    while True:
        if isinstance(type, arrow.BaseExtensionType):
            type = type.storage_type
        elif arrow.types.is_dictionary(type):
            type = type.value_type
        else:
            return type


def is_any(kinds: str, type: Any) -> bool:
    """Whether a type, or what it is made of, is of one of several kinds, called as in `pyarrow.types`."""
    types, type = pyarrow().types, storage(type)
    return any(getattr(types, f"is_{kind}")(type) for kind in kinds.split())


def is_image_struct(type: Any) -> bool:
    """Whether it is a struct of an image's bytes and, if need be, its path."""
    if not is_any("struct", type):
        return False
    type = storage(type)
    inner = {type.field(place).name: type.field(place).type for place in range(type.num_fields)}
    return inner.keys() <= {"bytes", "path"} and "bytes" in inner and is_any(f"{BYTES} null", inner["bytes"])


def can_be_json(type: Any, depth: int = 0) -> bool:
    """Whether JSON has something for all values of a type."""
    type = storage(type)
    if not is_any(f"{LISTS} struct map", type):
        return is_any(f"null {NUMBERS} {WORDS} timestamp date time decimal", type)
    within = (type.field(place).type for place in range(type.num_fields))
    return depth < _DEEPEST and all(can_be_json(inner, depth + 1) for inner in within)


def shape_of(type: Any, feature: Any) -> tuple[int, ...] | None:
    """The shape of numbers in lists, if these are always as long as their type or their feature says."""
    lengths: list[Any] = []
    shape = feature.get("shape") if isinstance(feature, Mapping) else None
    while is_any(LISTS, type) and len(lengths) < _DEEPEST:
        feature = feature if isinstance(feature, Mapping) else {}
        lengths.append(type.list_size if is_any("fixed_size_list", type) else feature.get("length"))
        type, feature = storage(type.value_type), feature.get("feature")
    if isinstance(shape, list) and len(shape) == len(lengths):
        lengths = shape
    known = all(isinstance(length, int) and not isinstance(length, bool) and length > 0 for length in lengths)
    return tuple(lengths) if lengths and known and is_any(NUMBERS, type) else None


def has_nulls(array: Any) -> bool:
    """Whether there are nulls in an array, or in the lists in it."""
    array = getattr(array, "storage", array)
    return array.null_count > 0 or (is_any(LISTS, array.type) and has_nulls(array.flatten()))


# ---- values


def texts(array: Any) -> list[str | None]:
    """Strings, whatever is no UTF-8 in them replaced."""
    array = getattr(array, "storage", array)
    if hasattr(array, "dictionary_decode"):
        array = array.dictionary_decode()
    return [value and value.decode(errors="replace") for value in array.cast(pyarrow().large_binary()).to_pylist()]


def bare(scalar: Any) -> Any:
    """The value in an extension's or a dictionary's."""
    arrow = pyarrow()
    while isinstance(scalar, (arrow.ExtensionScalar, arrow.DictionaryScalar)):
        scalar = scalar.value
    return scalar


def image(scalar: Any) -> EncodedImage:
    """The bytes of an image, alone or in a struct."""
    within = scalar.is_valid and is_any("struct", scalar.type)
    data = scalar["bytes"] if within else scalar
    if data.is_valid:
        return EncodedImage(data.as_buffer())
    fields = dict(scalar.items()) if within else {}
    if "path" in fields and fields["path"].is_valid:
        raise SourceError(
            f"there is only the path {str(fields['path'])[:200]!r}, which isn't opened: the image has to be in the file"
        )
    raise SourceError("there is no image")


def binary(scalar: Any) -> bytes:
    """Bytes that are no image."""
    if not scalar.is_valid:
        raise SourceError("there are no bytes, and nothing can stand for them; drop the column or the row")
    return bytes(scalar.as_buffer())


def array(scalar: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Numbers in lists of one shape."""
    values = scalar.values
    fits = len(values) == shape[0]
    for length in shape[1:]:
        lengths = pyarrow().compute.list_value_length(values)
        fits = fits and lengths.unique().to_pylist() == [length]
        values = values.flatten()
    if not fits:
        raise SourceError(f"its shape is not {shape}, as that of all values should be")
    return np.array(values.to_numpy(zero_copy_only=False)).reshape(shape)


def plain(scalar: Any) -> Any:
    """Anything as JSON has it: maps as lists of pairs, times as ISO strings, decimals as strings."""
    scalar = bare(scalar)
    if not scalar.is_valid:
        return None
    if is_any("struct", scalar.type):
        return {name: plain(value) for name, value in scalar.items()}
    if is_any("timestamp date time", scalar.type):
        return _iso(scalar)
    if is_any(f"{LISTS} map", scalar.type):
        return _list(scalar)
    value = scalar.as_py()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _list(scalar: Any) -> list[Any]:
    if is_any("map", scalar.type):
        return [[plain(pair["key"]), plain(pair["value"])] for pair in scalar.values]
    simple = is_any(f"{NUMBERS} {WORDS}", scalar.type.value_type)
    return scalar.as_py() if simple else [plain(value) for value in scalar.values]


def _iso(scalar: Any) -> str:
    """Python has no nanoseconds, and no time zones of its own: NumPy writes the instant, in UTC."""
    if is_any("date", scalar.type):
        days = np.datetime64(scalar.value, "D" if is_any("date32", scalar.type) else "ms")
        return str(days.astype("datetime64[D]"))
    text = str(np.datetime64(scalar.value, scalar.type.unit))
    if is_any("time", scalar.type):
        return text.partition("T")[2]
    return text if scalar.type.tz is None else f"{text}Z"


# ---- labels


def number_label(scalar: Any, classes: int | None) -> int:
    """A whole number, one of so many classes if they are known; -1 for none."""
    value = int(scalar.as_py()) if scalar.is_valid else -1
    if classes is not None and not -1 <= value < classes:
        raise SourceError(f"the label is {value}; it may be 0 to {classes - 1}, or -1 for none")
    if value not in _INT64:
        raise SourceError(f"the label is {value}, which int64 can't hold")
    return value


def real_label(scalar: Any) -> float:
    """A real value; NaN for none."""
    return float(scalar.as_py()) if scalar.is_valid else math.nan


def word_label(scalar: Any, values: Mapping[str, int]) -> int:
    """A class by its name; -1 for none."""
    return values[scalar.as_py()] if scalar.is_valid else -1


def several_labels(*scalars: Any, each: list[Callable[[Any], float]], real: bool) -> npt.NDArray[Any]:
    """Several labels as one array."""
    values = [convert(scalar) for convert, scalar in zip(each, scalars, strict=True)]
    return np.array(values, np.float64 if real else np.int64)
