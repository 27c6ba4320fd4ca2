"""What files of samples hold: every value comes back, and whatever else is there has a reason."""

from __future__ import annotations

import contextlib
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastload.errors import SourceError
from fastload.member_values import value
from fastload.samples import EncodedImage


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_images_are_bytes_that_say_so() -> None:
    """By the last part of the extension, and masks under all their names."""
    for extension in ("jpg", "png", "left.webp", "mask.png", "seg"):
        found = value(extension, b"bytes")
        assert (type(found), bytes(found)) == (EncodedImage, b"bytes")
    with pytest.raises(SourceError, match="0 bytes"):
        value("jpg", b"")


@pytest.mark.parametrize(
    ("extension", "data", "expected"),
    [
        *[("cls", b"7", 7), ("cls2", b" -1\n", -1), ("index", b"+12", 12), ("top.inx", b"0", 0)],
        *[("txt", "é\n".encode(), "é\n"), ("text", b"", ""), ("a.transcript", b"x", "x"), ("id", b"n01", "n01")],
        *[("json", b'{"a": [1, null]}', {"a": [1, None]}), ("box.json", b" 3", 3)],
        *[("label.json", b"[1, 2]", [1, 2]), ("label.json", b"[]", []), ("label.json", b"[0.5]", [0.5])],
        *[("mp3", b"ID3", b"ID3"), ("weird", b"", b"")],
    ],
)
def test_values_by_extension(extension: str, data: bytes, expected: object) -> None:
    """As WebDataset's own decoder has them."""
    found = value(extension, data)
    assert (type(found), found) == (type(expected), expected)


def test_a_missing_label_is_nan() -> None:
    """JSON has a null for it."""
    first, second = value("label.json", b"[null, 2.5]")
    assert (math.isnan(first), second) == (True, 2.5)


@pytest.mark.parametrize(
    ("extension", "data", "words"),
    [
        *[("index", text, "whole number") for text in (b"", b"1.0", b"1_0", b"x", b"9" * 19, "٣".encode())],
        *[("txt", b"ab\xff", "not UTF-8 text (invalid start byte at byte 2)"), ("cls2", b"\xff", "not UTF-8")],
        *[("json", text, "is not JSON") for text in (b"", b"{", b"[1,]", b"\xff\xfe\x00", b"9" * 5000 + b"x")],
        *[("json", b"[" * n + b"]" * n, "nested too deeply") for n in (102, 100_000)],
        ("json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        *[("label.json", text, "a list of numbers") for text in (b"3", b"[true]", b'["1"]', b"[[1]]", b"{}")],
        *[("npy", data, "no .npy file, or damaged") for data in (b"", b"x" * 99, npy(np.ones(3))[:40])],
        *[("npy", npy(np.ones(3))[:-1], "23 bytes behind its header"), ("npy", npy(np.ones(3)) + b"x", "25 bytes")],
        ("npy", npy(np.array([{}, None])), "values of type object"),
        ("npy", npy(np.array(["a"])), "values of type <U1"),
        ("npy", npy(np.ones(2, [("a", "f4")])), "can be packed"),
        ("npy", npy(np.ones((2, 3))).replace(b"(2, 3)", b"(-2,3)"), "which says (-2, 3)"),
        ("npy", npy(np.ones((2, 3))).replace(b"(2, 3)", b"(2**9)"), "damaged"),
    ],
)
def test_what_makes_no_sense_has_a_reason(extension: str, data: bytes, words: str) -> None:
    """Nothing is guessed, and nothing deep inside breaks."""
    with pytest.raises(SourceError) as error:
        value(extension, data)
    assert words in str(error.value)


def test_an_array_of_any_claimed_size_takes_no_memory() -> None:
    """What the header says is held against the file's length before anything is made."""
    with pytest.raises(SourceError, match="behind its header"):
        value("npy", npy(np.ones(3)).replace(b"(3,), ", b"(9999999999999,), ").replace(b" " * 12, b"", 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@settings(deadline=None)
@given(json_values)
def test_json_comes_back(expected: object) -> None:
    """Any value that JSON has."""
    assert value("json", json.dumps(expected).encode()) == expected


@settings(deadline=None)
@given(
    arrays.arrays(
        arrays.boolean_dtypes() | arrays.integer_dtypes() | arrays.floating_dtypes() | arrays.complex_number_dtypes(),
        arrays.array_shapes(min_dims=0, min_side=0),
    ),
    st.booleans(),
)
def test_arrays_come_back(array: Any, fortran: bool) -> None:
    """All kinds of numbers, byte orders and shapes, in rows or in columns."""
    expected = np.asfortranarray(array) if fortran else array
    found = value("npy", npy(expected))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=100), st.sampled_from(["json", "npy", "txt", "index", "label.json"]), st.booleans())
def test_any_bytes_have_a_value_or_a_reason(data: bytes, extension: str, begins_well: bool) -> None:
    """SourceError is the only error."""
    with contextlib.suppress(SourceError):
        value(extension, (b"\x93NUMPY\1\0" if begins_well else b"") + data)
