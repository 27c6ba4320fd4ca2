"""Label lists as people have them: words, tables and JSON Lines; numbers, real numbers and names; and what is wrong."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload.errors import SourceError
from fastload.label_lists import LabelList, read_list

FILES = ("a.jpg", "b.jpg", "c.jpg", "my cat.jpg")


def listed(
    root: Path,
    text: str | bytes,
    suffix: str = ".txt",
    *,
    image_column: str | int | None = None,
    label_columns: Sequence[str] | None = None,
) -> LabelList:
    """What is read from a list next to the files a.jpg, b.jpg, c.jpg and `my cat.jpg`."""
    for name in FILES:
        (root / name).touch()
    path = root / f"list{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(str(path), str(root), image_column=image_column, label_columns=label_columns)


def labels_of(found: LabelList) -> dict[str, tuple[int, ...] | tuple[float, ...]]:
    return {entry.name: entry.labels for entry in found.entries if entry.problem is None}


def problems_of(found: LabelList) -> dict[int, str]:
    return {entry.line: entry.problem for entry in found.entries if entry.problem is not None}


TAKEN = "names are taken from the column {!r}, labels from {}; --image-column and --label-columns choose others"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg 0 10\nb.jpg 3", {"a.jpg": (0, 10), "b.jpg": (3, -1)}),
        ('"my cat.jpg" 3\n"a.jpg" 1', {"my cat.jpg": (3,), "a.jpg": (1,)}),
        ("'my cat.jpg' 3\n'a.jpg' 1", {"my cat.jpg": (3,), "a.jpg": (1,)}),
        ("a.jpg 1 # isn't, it?\nb.jpg 2\nmy cat.jpg 3 # 4", {"a.jpg": (1,), "b.jpg": (2,), "my cat.jpg": (3,)}),
        ("a.jpg;1\nb.jpg;2", {"a.jpg": (1,), "b.jpg": (2,)}),
        ("a.jpg,,5\nb.jpg,1,", {"a.jpg": (5,), "b.jpg": (1,)}),
        ("a.jpg 0.5\nb.jpg 2\nc.jpg -1e-3", {"a.jpg": (0.5,), "b.jpg": (2.0,), "c.jpg": (-0.001,)}),
        ("a.jpg 1\nb.jpg x\nc.jpg 2", {"a.jpg": (1,), "c.jpg": (2,)}),
        ("a.jpg x\nb.jpg y\nc.jpg 0.5", {"a.jpg": (1,), "b.jpg": (2,), "c.jpg": (0,)}),
        ('{"f": "my cat.jpg", "y": 2}\n{"y": "3", "f": "a.jpg"}', {"my cat.jpg": (2,), "a.jpg": (3,)}),
        ('{"f": "a.jpg", "y": [1, 2]}\n\n{"f": "b.jpg"}', {"a.jpg": (1, 2), "b.jpg": (-1, -1)}),
        ('{"f": "a.jpg", "y": true}\r\n{"f": "b.jpg", "y": null}', {"a.jpg": (1,), "b.jpg": (-1,)}),
        ('\ufeff{"f": "a.jpg", "y": ["ant", "bee"]}', {"a.jpg": (0, 1)}),
        ('{"f": "a.jpg"}', {"a.jpg": ()}),
    ],
)
def test_lists_are_read(tmp_path: Path, text: str, expected: dict[str, tuple[float, ...]]) -> None:
    """Without being told anything."""
    assert labels_of(listed(tmp_path, text)) == expected


def test_a_missing_real_number_is_nan(tmp_path: Path) -> None:
    """A list is of real numbers if one has a point or an exponent; a note says which."""
    found = listed(tmp_path, "a.jpg 1\nb.jpg 0.5 2\n")
    assert (found.real, found.classes, found.label_count) == (True, None, 2)
    assert found.entries[0].labels[0] == 1.0
    assert math.isnan(found.entries[0].labels[1])
    assert found.notes == ["labels are real numbers, stored as float64: line 2 says 0.5"]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999", "0x1p3", "1_0.5", "x"])
def test_real_numbers_are_finite(tmp_path: Path, bad: str) -> None:
    """What is none is a problem of its line."""
    found = listed(tmp_path, f"a.jpg 0.5\nb.jpg 0.25\nc.jpg {bad}")
    assert problems_of(found) == {3: f"line 3: label {bad!r} is not a finite number, as the others are"}


def test_infinity_in_json_is_no_label(tmp_path: Path) -> None:
    """Nor is an object; in a column that isn't asked for both are fine."""
    lines = ['{"f": "a.jpg", "y": 1.5, "z": {}}', '{"f": "b.jpg", "y": NaN}', '{"f": "c.jpg", "y": {"x": 1}, "z": NaN}']
    found = listed(tmp_path, "\n".join(lines), label_columns=["y"])
    assert labels_of(found) == {"a.jpg": (1.5,)}
    assert [problem.split(";")[0] for problem in problems_of(found).values()] == [
        "line 2: what is under 'y' is no label",
        "line 3: what is under 'y' is no label",
    ]


# ---- classes


def test_several_classes_in_a_line_are_noted(tmp_path: Path) -> None:
    """They may have been meant as one: the note names a line that has most, and one that has fewest."""
    advice = "if they are one name, put it in quotes"
    found = listed(tmp_path, "a.jpg ant\nb.jpg polar bear\nnone.jpg a b c")
    assert found.notes == [f"lines have several classes: line 2 has 'polar', 'bear', line 1 has 'ant'; {advice}"]
    found = listed(tmp_path, "a.jpg polar bear\nb.jpg brown bear")
    assert found.notes == [f"lines have several classes: line 1 has 'polar', 'bear'; {advice}"]
    assert listed(tmp_path, '{"f": "a.jpg", "y": ["ant", "bee"]}').notes == [TAKEN.format("f", "'y'")]


@pytest.mark.parametrize(
    "text", ['a.jpg, ant\nb.jpg, "polar bear"', 'a.jpg ant\nb.jpg "polar bear"', "a.jpg ant\nb.jpg 'polar bear'"]
)
def test_a_class_in_quotes_may_have_spaces(tmp_path: Path, text: str) -> None:
    """Also after a comma and a space; two quotes in it are one."""
    found = listed(tmp_path, text)
    assert (found.classes, found.notes) == (["ant", "polar bear"], [])
    assert listed(tmp_path, 'a.jpg "the ""polar"" bear"').classes == ['the "polar" bear']


def test_hashes_without_spaces_around_them_are_labels(tmp_path: Path) -> None:
    """A character, or a tag; what is in quotes is never a comment."""
    assert listed(tmp_path, "a.jpg #\nb.jpg #cat\nc.jpg '# x'").classes == ["#", "# x", "#cat"]


def test_line_ends_in_cells_are_kept(tmp_path: Path) -> None:
    """As CSV has them, with a header."""
    assert listed(tmp_path, 'file,label\na.jpg,"a\r\nb"\nb.jpg,ab').classes == ["a\nb", "ab"]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a.jpg\t0,5\nb.jpg\t1,5", "a class is named '0,5'; write decimals with a point"),
        ("a.jpg Käse".encode("latin-1"), r"a class is named 'K\udce4se'; save the list as UTF-8"),
    ],
)
def test_classes_that_are_hardly_meant_are_noted(tmp_path: Path, text: str | bytes, note: str) -> None:
    """Decimal commas, another encoding."""
    assert listed(tmp_path, text).notes == [note]


# ---- lines that can't be packed


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (
            "b.jpg,0,5",
            "no such file {}b.jpg,0,5; there is b.jpg: use one separator throughout, and decimal points",
        ),
        (
            "b.jpg;0.5",
            "no such file {}b.jpg;0.5; there is b.jpg: use one separator throughout, and decimal points",
        ),
        ("0 b.jpg", "no such file {}0; name and label look swapped, --image-column says where the names are"),
        ("none.jpg b.jpg ant bee", "no such file {}none.jpg"),
        ("k\udce4.jpg 2", "no such file {}k\udce4.jpg; save the list as UTF-8"),
        ("foo bar", "no such file {}foo"),
        ("b.jpg 2 #more of it", "label '#more' is not a number, as the others are"),
        ("b.jpg 2 #", "label '#' is not a number, as the others are"),
        ("b.jpg " + "9" * 19, f"label '{'9' * 19}' doesn't fit into 64 bits"),
        ("b.jpg -" + "9" * 5000, f"label '-{'9' * 198} ... {'9' * 59}' doesn't fit into 64 bits"),
    ],
    ids=lambda value: value[:9],
)
def test_reasons_say_what_is_likely_wrong(tmp_path: Path, bad: str, why: str) -> None:
    """And a bad line makes the others no longer, and no classes of them."""
    found = listed(tmp_path, f"a.jpg 1\n{bad}\nc.jpg {2**63 - 1}".encode("utf-8", "surrogateescape"))
    assert problems_of(found) == {2: "line 2: " + why.format(f"{tmp_path}{os.sep}")}
    assert labels_of(found) == {"a.jpg": (1,), "c.jpg": (2**63 - 1,)}


def test_a_first_line_that_may_be_a_header_says_so(tmp_path: Path) -> None:
    """It becomes one when the column of names is named."""
    text = "foo,bar\na.jpg,1\nb.jpg,2"
    hint = "if this line is a header, name its column of files with --image-column"
    assert problems_of(listed(tmp_path, text)) == {1: f"line 1: no such file {tmp_path / 'foo'}; {hint}"}
    assert labels_of(listed(tmp_path, text, image_column="foo")) == {"a.jpg": (1,), "b.jpg": (2,)}
    assert problems_of(listed(tmp_path, "foo,0\na.jpg,1")) == {1: f"line 1: no such file {tmp_path / 'foo'}"}


# ---- headers and columns


@pytest.mark.parametrize(
    ("text", "image", "labels", "expected"),
    [
        ("image,label\na.jpg,1\nb.jpg,2", "image", "'label'", {"a.jpg": (1,), "b.jpg": (2,)}),
        ("\ufeffFile Name\tlabel\r\na.jpg\t1\r\n", "File Name", "'label'", {"a.jpg": (1,)}),
        ("filename label\na.jpg ant", "filename", "'label'", {"a.jpg": (0,)}),
        ("id,image_path,Class,split\n7,a.jpg,ant,val", "image_path", "'Class'", {"a.jpg": (0,)}),
        ("path,x,y\na.jpg,,0.5\nb.jpg,1,2", "path", "'x', 'y'", {"b.jpg": (1.0, 2.0)}),
        ("x,class\na.jpg,ant\nb.jpg,bee", "x", "'class'", {"a.jpg": (0,), "b.jpg": (1,)}),
        ("fname split\na.jpg ant\nb.jpg bee", "fname", "'split'", {"a.jpg": (0,), "b.jpg": (1,)}),
        ("# a comment\n\nimg\na.jpg\n", "img", "none", {"a.jpg": ()}),
        ('file,label,note\na.jpg,1,"two\nlines, # and ""more"""\nb.jpg,2,', "file", "'label'", {"a.jpg": (1,)}),
    ],
)
def test_headers_are_recognised(
    tmp_path: Path, text: str, image: str, labels: str, expected: dict[str, object]
) -> None:
    """By the name of a column of names; a note says which columns were taken."""
    found = listed(tmp_path, text)
    assert found.notes[0] == TAKEN.format(image, labels)
    assert problems_of(found) == {}
    assert expected.items() <= labels_of(found).items()


@pytest.mark.parametrize("first", ["cat.png,ant", "image,1", "photo of mine,ant", "a.jpg,image", "thing,other"])
def test_what_may_be_no_header_is_a_row(tmp_path: Path, first: str) -> None:
    """A first line whose file is missing is not taken for a header."""
    found = listed(tmp_path, f"{first}\nb.jpg,bee\nc.jpg,ant\n")
    assert [entry.line for entry in found.entries] == [1, 2, 3]
    assert found.notes == []


def test_a_file_that_is_called_as_a_column_is_a_row(tmp_path: Path) -> None:
    """Nothing that names a file is a header."""
    (tmp_path / "image").touch()
    assert labels_of(listed(tmp_path, "image ant\na.jpg bee")) == {"image": (0,), "a.jpg": (1,)}


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    """By name, with a header then; that of the names by number too. Empty cells keep their places; no note."""
    text = "what,where,x,y\nthis,a.jpg,1,\nthat,b.jpg,,2\n"
    found = listed(tmp_path, text, image_column="where", label_columns=["y", "x"])
    assert (labels_of(found), found.notes) == ({"a.jpg": (-1, 1), "b.jpg": (2, -1)}, [])
    assert labels_of(listed(tmp_path, text, label_columns=["what"])) == {"a.jpg": (1,), "b.jpg": (0,)}
    assert labels_of(listed(tmp_path, text, label_columns=[])) == {"a.jpg": (), "b.jpg": ()}
    assert labels_of(listed(tmp_path, "3 a.jpg 4\n5 b.jpg 6", image_column=1)) == {"a.jpg": (3, 4), "b.jpg": (5, 6)}


@pytest.mark.parametrize(
    ("text", "image", "labels", "message"),
    [
        ("file,label\na.jpg,1", "name", None, "no column 'name'; it has 'file', 'label'"),
        ("file,label\na.jpg,1", None, ["label", "y"], "no column 'y'; it has 'file', 'label'"),
        ('{"file": "a.jpg", "n": 1}', None, ["y"], "no column 'y'; it has 'file', 'n'"),
        ("a.jpg,1", 2, None, "no column 2; its first row has 2, counted from 0"),
        ("a.jpg,1", -1, None, "no column -1"),
        ("file,label\nx.jpg,1", None, None, r"none of its columns 'file', 'label' names a file in the first 1 rows"),
        ("file,kind,split\na.jpg,ant,val", None, None, "which of its columns 'kind', 'split' are the labels"),
        ("file,label,class\na.jpg,1,ant", None, None, "which of its columns 'label', 'class' are the labels"),
        ('file,label\na.jpg,1\nb.jpg,"2\n', None, None, "line 3: not a line of `name,label`: .*; check its quotes"),
    ],
)
def test_columns_that_are_not_clear_are_errors(
    tmp_path: Path, text: str, image: str | int | None, labels: list[str] | None, message: str
) -> None:
    """With the columns that there are."""
    with pytest.raises(SourceError, match=message):
        listed(tmp_path, text, image_column=image, label_columns=labels)


def test_rows_that_do_not_fit_the_header_are_problems(tmp_path: Path) -> None:
    """Too many cells, no name, a list of labels beside other labels."""
    found = listed(tmp_path, "file,label\na.jpg,1,2\n,3\nb.jpg,1\n")
    assert problems_of(found) == {2: "line 2: 3 cells, the header has 2", 3: "line 3: no name in it"}
    lines = '{"f": "a.jpg", "x": 1, "y": 2}\n{"f": "b.jpg", "x": [1, 2], "y": 3}\n{"x": 1}\n{"f": 5}'
    found = listed(tmp_path, lines)
    assert [problem.split(";")[0] for problem in problems_of(found).values()] == [
        "line 2: what is under 'x' is no label",
        "line 3: no name in it",
        f"line 4: no such file {tmp_path / '5'}",
    ]


# ---- repetitions


def test_repeated_lines_are_taken_once(tmp_path: Path) -> None:
    """However the name is written; a note names the lines."""
    found = listed(tmp_path, "a.jpg 1\nb.jpg 2\na.jpg 1\n./a.jpg 01\nnone.jpg 1\nnone.jpg 1")
    assert [entry.line for entry in found.entries] == [1, 2, 5, 6]
    assert found.notes == ["2 lines repeat earlier ones and are left out: line 3 repeats line 1, line 4 repeats line 1"]


def test_absolute_and_relative_names_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the list's folder is seen from."""
    listed(tmp_path, f"a.jpg 1\n{tmp_path / 'a.jpg'} 2\n{tmp_path / '.' / 'b.jpg'} 3\nb.jpg 3\nc.jpg 4")
    monkeypatch.chdir(tmp_path)
    for root in (str(tmp_path), "."):
        found = read_list("list.txt", root)
        assert problems_of(found) == dict.fromkeys((1, 2), "line 1 says 1, line 2 says 2")
        assert found.notes == ["1 line repeats an earlier one and is left out: line 4 repeats line 3"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.jpg 1\nb.jpg 2\na.jpg 1\na.jpg 3", "line 1 says 1, line 4 says 3"),
        ("a.jpg ant\nb.jpg ant\na.jpg bee ant\na.jpg ant", "line 1 says ant, line 3 says bee ant"),
        ("a.jpg,ant\nb.jpg,ant\na.jpg\na.jpg,ant", "line 1 says ant, line 3 says nothing"),
        ("a.jpg 0.5\nb.jpg 1\na.jpg 1\na.jpg 2", "line 1 says 0.5, line 3 says 1.0"),
    ],
)
def test_lines_that_contradict_each_other_are_left_out(tmp_path: Path, text: str, reason: str) -> None:
    """All of them: nobody knows which is right."""
    found = listed(tmp_path, text)
    assert problems_of(found) == dict.fromkeys((1, 3, 4), reason)
    assert list(labels_of(found)) == ["b.jpg"]


# ---- nonsense


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\n\0", r"is not a text file; .* \(line 2 has bytes"),
        ("a.jpg 1\n".encode("utf-16"), "is a text file in UTF-16; save it as UTF-8"),
        ("a.jpg 1\nb.jpg " + "x" * (1 << 24), "line 2: longer than 16,777,216 characters"),
        ('{"f": "a.jpg"}\n{"f": ' + "[" * 100_000, "line 2: no JSON: (nested too deep|.*maximum)"),
        ('{"f": "a.jpg"}\n{"f": 1', "line 2: no JSON: .*; each line has to be one object, as"),
        ('{"f": "a.jpg"}\n1', "line 2: no JSON object; each line has to be one object, as"),
        ('{"f": "a.jpg"}\n[1]', "line 2: a JSON array; each line has to be one object, as"),
        ('[\n  {"f": "a.jpg"}\n]', "line 1: a JSON array; each line has to be one object"),
        ('[{"f": "a.jpg"}]', "line 1: a JSON array; each line has to be one object"),
        ('{\n"f": "a.jpg"\n}', "line 1: no JSON: .*; each line has to be one object"),
        ('{"f": "\\u0000"}', "none of its columns 'f' names a file"),
        ("a.jpg 1\n" * 2000 + "b.jpg" + " 1" * 100_000, "line 2001: 100,000 labels, far more"),
        ("x y " * 100_000, "no such file"),
    ],
    ids=range(13),
)
def test_nonsense_is_an_error_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    """At once, and without taking memory."""
    with pytest.raises(SourceError, match=message):
        listed(tmp_path, text)


def test_json_is_recognised_by_the_suffix(tmp_path: Path) -> None:
    """An error says what is expected; elsewhere a name may begin with a brace."""
    with pytest.raises(SourceError, match=r"line 1: no JSON"):
        listed(tmp_path, "a.jpg 1", ".jsonl")
    (tmp_path / "{1}.jpg").touch()
    assert labels_of(listed(tmp_path, "{1}.jpg 1\na.jpg 2")) == {"{1}.jpg": (1,), "a.jpg": (2,)}


def test_a_list_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    """A folder, or nothing."""
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(SourceError, match=r"can't be read: .*; give a text file"):
            read_list(str(path), str(tmp_path))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([*FILES, "", "ant"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("fyz"), inner, max_size=2),
    max_leaves=4,
)
objects = st.lists(st.dictionaries(st.sampled_from(["f", "y", "label", ""]), values, max_size=4), max_size=5)
pieces = st.lists(
    st.sampled_from([*FILES, "image", "label", "1", "0.5", " ", ",", "\t", "\n", '"', "'", "#", "x", "\r"])
)
texts = objects.map(lambda found: "\n".join(map(json.dumps, found)).encode()) | pieces.map(
    lambda p: "".join(p).encode()
)
columns = st.none() | st.lists(st.sampled_from(["label", "y", "1"]), max_size=2)


@settings(max_examples=400, deadline=None)
@given(texts | st.binary(max_size=100), st.none() | st.sampled_from(["f", "image"]) | st.integers(-1, 2), columns)
@example(b'{"f": "a.jpg", "label": "\\ud800"}', None, None)
def test_any_list_is_entries_or_a_source_error(data: bytes, image: str | int | None, labels: list[str] | None) -> None:
    """Never another exception; all labels are of the same number, and problems name lines."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = listed(Path(folder), data, image_column=image, label_columns=labels)
        except SourceError:
            return
    for entry in found.entries:
        assert entry.problem is None or entry.problem.startswith("line ")
        assert len(entry.labels) == found.label_count or entry.problem
        assert all(isinstance(label, float if found.real else int) for label in entry.labels)
