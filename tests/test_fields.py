"""Fields: what is learned from samples, and that every sample comes back from what is stored of it."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from anything import JSON, TEXTS, arrays, picture, same, samples
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastload import record
from fastload.errors import DecodeError, SourceError
from fastload.fields import (
    KINDS,
    Schema,
    Spec,
    build,
    cell,
    column_dtype,
    decode,
    encode,
    is_json,
    is_tree,
    learn,
    leaves,
    restore,
)
from fastload.placeholders import IGNORE_LABEL, placeholder
from fastload.samples import EncodedImage


def in_manifest(schema: Schema) -> Schema:
    """The schema as another process reads it."""
    entries = [spec.as_entry() for spec in schema.specs]
    return Schema.of_manifest(json.loads(json.dumps({"fields": entries, "sample": schema.sample})))


def stored(schema: Schema, sample: Any) -> Any:
    """A sample by way of columns and records."""
    values = {}
    for spec in schema.specs:
        value = schema.flatten(sample)[spec.name]
        if spec.column is None:
            (field,) = record.parse(record.build([encode(spec, value)]))
            values[spec.name] = decode(spec, field)
        else:
            rows = np.asarray([cell(spec, value)], column_dtype(spec))
            values[spec.name] = restore(spec, rows)[0]
    return build(schema.sample, values)


def plain(sample: Any) -> Any:
    """A sample without its gradients."""
    if isinstance(sample, dict):
        return {key: plain(value) for key, value in sample.items()}
    if isinstance(sample, (tuple, list)):
        return type(sample)(map(plain, sample))
    return sample.detach() if isinstance(sample, torch.Tensor) else sample


def has_fields(sample: Any) -> bool:
    if isinstance(sample, list) and is_json(sample):
        return True
    inner = sample.values() if isinstance(sample, dict) else sample
    return not isinstance(sample, (tuple, list, dict)) or any(map(has_fields, inner))


# ---- samples of any structure


@settings(max_examples=300, deadline=None)
@given(samples())
@example({"a.b": 1, "a": {"b": 2}, "a.b_": 3})
@example({1: "one", "1": "also one"})
@example({"": {"": 1.5, "a": 2.5}, "a": 3.5})
@example({"name": "x", "name_": "y", "image": "z", "label": "w", "others": b"v"})
def test_a_sample_comes_back(sample: Any) -> None:
    """The same structure, types and values, through a manifest; pictures of uint8 arrays are another story."""
    assume(has_fields(sample))
    schema = learn([sample, sample])
    assume(not schema.of_kind("image"))
    assert in_manifest(schema) == schema
    names = [spec.name for spec in schema.specs]
    assert len(set(names)) == len(names)
    assert not {"name", "image"} & {*names}
    assert [*leaves(schema.sample)] == names
    assert same(stored(schema, sample), plain(sample))


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_what_json_can_say_comes_back(value: Any) -> None:
    """NaN, -0.0, lone surrogates, and whole numbers of any size too."""
    assert is_json(value)
    spec = Spec("x", "json", "json")
    assert same(decode(spec, encode(spec, value)), value)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
@example("\ud83d\ude00")
@example("\udcff\x00")
def test_texts_come_back(text: str) -> None:
    """Of any code points: two surrogates stay two."""
    spec = learn([text]).specs[0]
    assert spec == Spec("value", "text", "str")
    assert decode(spec, encode(spec, text)) == text


NUMBERS: dict[str, list[Any]] = {
    "int": [0, -(1 << 63), (1 << 63) - 1],
    "bool": [True, False],
    "float": [0.1, -0.0, float("nan"), float("inf"), 5e-324],
    "uint64": [np.uint64(0), np.uint64((1 << 64) - 1)],
    "int8": [np.int8(-128), np.int8(127)],
    "bool_": [np.True_, np.False_],
    "float16": [np.float16(6.1e-5), np.float16(float("-inf"))],
    "float32": [np.float32(0.1), np.float32(3e38)],
    "tensor of int32": [torch.tensor(-5, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)],
    "tensor of uint8": [torch.tensor(255, dtype=torch.uint8)],
    "tensor of bool": [torch.tensor(True), torch.tensor(False)],
    "tensor of float64": [torch.tensor(0.1, dtype=torch.float64, requires_grad=True)],
    "tensor of float16": [torch.tensor(0.1, dtype=torch.float16)],
    "tensor of uint64": [torch.tensor(2**63, dtype=torch.uint64)],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_lie_in_columns(name: str) -> None:
    """Each of its type, as a label too where it is whole and signed."""
    values = NUMBERS[name]
    for sample in ((value, "x") for value in values):
        schema = learn([(value, "x") for value in values])
        assert schema.specs[0].kind in ("integer", "real")
        assert schema.specs[0].column == "field_0"
        assert same(stored(schema, sample), plain(sample))


def test_scalars_that_no_column_holds_are_arrays() -> None:
    """Complex numbers, dates, fixed texts, bfloat16, and arrays without dimensions, which are no scalars."""
    values = (np.complex64(1j), np.datetime64("2020-01-01"), np.str_("ab"), np.bytes_(b"a"), np.array(5))
    sample = (*values, torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(1j))
    schema = learn([sample])
    assert {spec.kind for spec in schema.specs} == {"array"}
    assert same(stored(schema, sample), sample)


def test_subclasses_come_back_as_what_they_are_built_on() -> None:
    """Their own type would have to be imported from somewhere: a store is data, not code."""

    class Text(str):
        __slots__ = ()

    point = namedtuple("point", "x y")
    colour = IntEnum("colour", "RED")
    sample = {"p": point(1, 2.5), "o": OrderedDict(a=1), "s": Text("x"), "e": colour.RED, "f": np.float64(1)}
    expected = {"p": (1, 2.5), "o": {"a": 1}, "s": "x", "e": 1, "f": np.float64(1)}
    assert same(stored(learn([sample]), sample), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(), min_size=2, max_size=4))
def test_arrays_of_different_dtypes_and_shapes_are_one_field(values: list[Any]) -> None:
    """Each comes back as it is."""
    schema = learn([{"x": value} for value in values])
    assume(schema.specs[0].kind == "array")
    for value in values:
        assert same(stored(schema, {"x": value}), {"x": np.ascontiguousarray(value).reshape(value.shape)})


# ---- names and columns


def test_the_usual_samples_have_the_usual_names() -> None:
    """(image, label), (image, mask), and dicts; one value is called value."""
    rgb, grey = picture(), np.zeros((9, 12), np.uint8)
    assert [s.name for s in learn([(rgb, 3)]).specs] == ["image", "label"]
    assert learn([(rgb, 3)]).specs[1].column == "label"
    assert [s.name for s in learn([(rgb, picture("P"))]).specs] == ["image", "mask"]
    assert [s.name for s in learn([(rgb, grey)], {"1": "mask"}).specs] == ["image", "mask"]
    assert [s.name for s in learn([(rgb, np.zeros((2, 4)))], {"1": "boxes"}).specs] == ["image", "boxes"]
    assert [s.name for s in learn([{"photo": rgb, "t": {"x": 1}, "n": [b"", "b"]}]).specs] == [
        "image",
        "t.x",
        "n.0",
        "n.1",
    ]
    assert learn([5]).sample == "value"
    assert learn([rgb]).sample == "image"


def test_unsigned_numbers_are_no_labels() -> None:
    """-100, which stands for a label that can't be had, is none of them."""
    assert learn([(picture(), np.uint8(3))]).specs[1].column == "field_1"
    assert learn([(picture(), np.int16(3))]).specs[1].column == "label"


def test_no_two_fields_have_one_name() -> None:
    """However they are called, and what they lie in."""
    rgb, grey = picture(), np.zeros((9, 12), np.uint8)
    sample = {"image": "a text", "x": rgb, "name": 1, "Ä": grey, "ä": grey, "o" * 90: grey, "others": grey, "1": grey}
    schema = learn([sample], {name: "mask" for name, value in sample.items() if value is grey})
    assert [spec.name for spec in schema.specs] == [
        *("image_", "image", "name_", "mask__", "mask___", "o" * 40, "others_", "mask_1")
    ]


def test_a_second_picture_is_one_more_field() -> None:
    """Only the first is transformed; ones with a palette, or of two values, are masks beside a first."""
    schema = learn([(picture(), picture("L"), picture("P"), picture("1"), 3)])
    assert [(spec.kind, spec.channels) for spec in schema.specs[:2]] == [("image", 3), ("image", 1)]
    assert [spec.kind for spec in schema.specs[2:]] == ["mask", "mask", "integer"]
    assert [spec.fill for spec in schema.specs] == [0, 0, 255, 255, 0]
    assert schema.image == schema.specs[0]


@pytest.mark.parametrize("mode", ["P", "1"])
def test_a_picture_with_a_palette_is_the_image_if_there_is_no_other(mode: str) -> None:
    """A mask has to belong to something."""
    assert [spec.kind for spec in learn([(picture(mode), 3)]).specs] == ["image", "integer"]
    assert [spec.kind for spec in learn([("a", picture(mode), picture(mode))]).specs] == ["text", "image", "mask"]


@pytest.mark.parametrize("kind", ["mask", "boxes"])
def test_masks_and_boxes_go_with_an_image(kind: str) -> None:
    """Without one they are arrays, and the message says it."""
    with pytest.raises(SourceError, match=f"'x' is of kind {kind}, which goes with an image.*'array'"):
        learn([{"x": np.zeros((4, 4), np.uint8)}], {"x": kind})
    with pytest.raises(SourceError, match="goes with an image"):
        learn([{"x": picture("P")}], {"x": kind})


# ---- kinds


def test_kinds_are_what_they_are_called() -> None:
    """Each for a value that it fits."""
    rgb, numbers = picture(), np.arange(8, dtype=">i4").reshape(2, 4)
    fitting = {"image": rgb, "mask": numbers, "boxes": numbers, "integer": 3, "real": 0.5, "vector": numbers}
    fitting |= {"array": np.zeros((3, 4, 3), np.uint8), "text": "x", "bytes": b"x", "json": (None, {"a": []})[1]}
    assert fitting.keys() == {*KINDS}
    schema = learn([fitting], {kind: kind for kind in KINDS})
    assert [spec.kind for spec in schema.specs] == [*fitting]
    vector = schema.specs[5]
    assert (vector.dtype, vector.shape, vector.column) == ("<i4", (2, 4), "field_5")


@pytest.mark.parametrize("kind", ["integer", "real", "text", "bytes", "array", "vector"])
def test_a_kind_that_does_not_fit_is_refused(kind: str) -> None:
    """With what the value is, and what that is stored as."""
    with pytest.raises(SourceError, match=r"'x' is a"):
        learn([{"x": [1, 2]}], {"x": kind})


def test_kinds_of_the_whole_sample() -> None:
    """Its name is the empty text: dicts that differ are JSON."""
    values = [{"a": 1}, {"b": [2]}]
    schema = learn(values, {"": "json"})
    assert [stored(schema, value) for value in values] == values
    with pytest.raises(SourceError, match=r"kinds={'': 'json'}"):
        learn([{"a": 1}]).flatten({"b": 1})


def test_a_whole_dict_as_one_field() -> None:
    """What is in it may differ."""
    values = [{"m": {"a": 1}, "n": 2}, {"m": {"b": []}, "n": 3}]
    schema = learn(values, {"m": "json"})
    assert [spec.name for spec in schema.specs] == ["m", "n"]
    assert [stored(schema, value) for value in values] == values


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"a": "float"}, r"'float'.*may be image, mask"),
        ({"b": "json"}, r"no field b; there are a$"),
        ({"a": None}, r"None"),
    ],
)
def test_kinds_that_make_no_sense(kinds: dict[str, Any], words: str) -> None:
    """The message says what there is."""
    with pytest.raises(SourceError, match=words):
        learn([{"a": 1}], kinds)


# ---- samples that differ


def test_what_differs_is_json_if_that_can_say_it() -> None:
    """Numbers and None, lists of any length, dicts with other keys."""
    values = [{"x": 1, "y": [1], "z": {}}, {"x": None, "y": [], "z": {"a": 0.5}}]
    schema = learn(values)
    assert {spec.kind for spec in schema.specs} == {"json"}
    assert [stored(schema, value) for value in values] == values


@pytest.mark.parametrize(
    "values",
    [
        [1, np.int64(1)],
        [np.float32(1), np.float64(1)],
        ["x", b"x"],
        [(1, 2), (1,)],
        [torch.zeros(2), np.zeros(2)],
        [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}],
        [[torch.zeros(1)], []],
    ],
    ids=str,
)
def test_what_differs_otherwise_is_refused(values: list[Any]) -> None:
    """It names the field and the types."""
    with pytest.raises(SourceError, match=r"'x' (is a \w+ that )?differs among samples"):
        learn([{"x": value} for value in values])


def test_keys_are_texts_or_ints() -> None:
    """What else may be a key, a manifest can't say."""
    for key in (1.5, True, None, (1,), b"x"):
        with pytest.raises(SourceError, match="has keys that are no texts or ints"):
            learn([{key: torch.zeros(1)}])


class Odd:
    pass


@pytest.mark.parametrize("value", [Odd(), {"a": Odd()}, {1, 2}, 1j, range(3), bytearray(b"x")], ids=str)
def test_what_no_field_is_made_of_is_refused(value: Any) -> None:
    """With its type, and what there may be."""
    with pytest.raises(SourceError, match="a sample may have pictures, arrays"):
        learn([{"x": value}])


def test_sizes_have_limits() -> None:
    """33 deep, 64 in a record, 513 fields: the message says what to do."""
    deep: Any = torch.zeros(1)
    for _ in range(34):
        deep = (deep,)
    with pytest.raises(SourceError, match="nested more than 32 deep"):
        learn([deep])
    assert len(learn([{str(i): "x" for i in range(63)}]).specs) == 63
    assert len(learn([{str(i): i for i in range(512)}]).specs) == 512
    for many in ({str(i): "x" for i in range(64)}, {str(i): i for i in range(513)}):
        with pytest.raises(SourceError, match=r"kinds={NAME: 'json'}"):
            learn([many])


@pytest.mark.parametrize("sample", [(), {}, ((), {}), {"a": {}}], ids=str)
def test_a_sample_of_nothing_is_refused(sample: Any) -> None:
    """There would be nothing to count."""
    with pytest.raises(SourceError, match="has no fields"):
        learn([sample])


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "another container": ((1, "a"), [1, "a"], "the sample is a list, the first samples have a tuple"),
    "fewer values": ((1, "a"), (1,), "the sample has 1 values, the first samples 2"),
    "other keys": ({"a": 1}, {"b": 1}, r"the keys \['b'\], the first samples \['a'\]"),
    "a number that is none": ((1,), ("x",), "'0' is str"),
    "truth for a number": ((1,), (True,), "'0' is bool"),
    "a scalar for a number": ((1,), (np.int64(1),), "'0' is scalar"),
    "another dtype": ((torch.tensor(1),), (torch.tensor(1, dtype=torch.int32),), "'0' is tensor <i4"),
    "too large": ((1,), (1 << 63,), "64 bits don't hold; kind json does"),
    "bytes for a text": (("x",), (b"x",), "'0' is bytes"),
    "no array": ((np.zeros(3),), ([1, 2],), "'0' is a list, in the first samples it is an array"),
    "an array for a tensor": ((torch.zeros(3),), (np.zeros(3),), "'0' is a ndarray"),
    "no JSON": (([1],), ([(1,)],), "JSON doesn't give back"),
    "an array of objects": ((np.zeros(3),), (np.array([None]),), "can't be stored"),
    "a masked array": ((np.zeros(3),), (np.ma.array([1.0], mask=[True]),), "masked arrays"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_sample_unlike_the_first_ones_is_refused(name: str) -> None:
    """For its own sake only, and with its field's name."""
    first, other, words = MISFITS[name]
    schema = learn([first])
    with pytest.raises(SourceError, match=words):
        stored(schema, other)
    assert same(stored(schema, first), first)


def test_vectors_have_one_shape_and_dtype() -> None:
    """Those of the first sample; a tensor's sign or gradient is no matter."""
    schema = learn([{"x": torch.zeros(3)}], {"x": "vector"})
    negative = torch.tensor([1 + 2j, 3j, 0]).to(torch.complex64).conj().imag
    assert negative.is_neg()
    for value in (negative, torch.ones(3, requires_grad=True)):
        assert same(stored(schema, {"x": value}), plain({"x": value}))
    for wrong in (torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3).to_sparse(), [1, 2, 3]):
        with pytest.raises(SourceError, match="'x' is"):
            stored(schema, {"x": wrong})


def test_numbers_too_large_for_a_digit_limit() -> None:
    """Python refuses to write numbers of more than 4300 digits: so does this, by an error of its own."""
    spec = Spec("x", "json", "json")
    with pytest.raises(SourceError, match="'x' can't be written as JSON"):
        encode(spec, 10**5000)


def test_json_is_nested_up_to_a_limit() -> None:
    """Deep lists, and those that hold themselves, are no JSON: an error, not a hang."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    for value in (deep, endless):
        with pytest.raises(SourceError, match="more than 200 deep"):
            encode(Spec("x", "json", "json"), value)


@pytest.mark.parametrize("payload", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 5000, b'{"a":'], ids=lambda p: p[:8])
def test_damaged_json_is_a_decode_error(payload: bytes) -> None:
    """Never another exception, however deep it is nested."""
    with pytest.raises(DecodeError, match="'x' is no json"):
        decode(Spec("x", "json", "json"), record.Field(record.TEXT, payload))


def test_damaged_text_is_a_decode_error() -> None:
    """Bytes that are no UTF-8."""
    with pytest.raises(DecodeError, match="'x' is no text"):
        decode(Spec("x", "text", "str"), record.Field(record.TEXT, b"\xff\xfe"))


# ---- placeholders


def test_placeholders_have_their_fields_types() -> None:
    """0, NaN or nothing, so that a batch can still be made; of a label, what losses ignore."""
    assert placeholder(learn([(picture(), 3)]).specs[1]) == IGNORE_LABEL
    assert same(placeholder(learn([(picture(), torch.tensor(3))]).specs[1]), torch.tensor(IGNORE_LABEL))
    sample = ("x", b"x", [1], 5, 0.5, True, np.float32(1), torch.tensor(2, dtype=torch.uint8), np.zeros(2))
    expected = (
        "",
        b"",
        None,
        0,
        float("nan"),
        False,
        np.float32("nan"),
        torch.tensor(0, dtype=torch.uint8),
        np.zeros(2),
    )
    assert same(tuple(map(placeholder, learn([sample]).specs)), expected)
    vector = learn([{"v": torch.ones((2, 3))}], {"v": "vector"}).specs[0]
    assert same(placeholder(vector), torch.full((2, 3), torch.nan))


# ---- trees


def test_trees_are_checked_before_they_are_walked() -> None:
    """Names that are there, forms that there are, not too deep, not too wide."""
    names = {"a", "b"}
    for sane in ("a", {"tuple": ["a", {"dict": [["k", "b"], [3, "a"]]}]}, {"list": []}):
        assert is_tree(sane, names)
    deep: Any = "a"
    for _ in range(100_000):
        deep = {"tuple": [deep]}
    wrong = [None, 3, [], "c", {}, {"set": ["a"]}, {"tuple": "a"}, {"dict": ["a"]}, {"dict": [["k", "a", 1]]}, deep]
    wrong += [{"dict": [[None, "a"]]}, {"dict": [[["k"], "a"]]}, {"tuple": ["a"], "list": []}, {"tuple": ["a"] * 513}]
    for node in wrong:
        assert not is_tree(node, names)


def test_an_encoded_image_is_bytes_and_an_image() -> None:
    """It is told from plain bytes by its type."""
    assert [spec.kind for spec in learn([(EncodedImage(b"x"), b"x")]).specs] == ["image", "bytes"]
    assert learn([{"x": b"x"}], {"x": "image"}).specs[0].type == "file"
