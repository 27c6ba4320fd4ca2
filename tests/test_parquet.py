"""Parquet files of images: written by pyarrow as `datasets` writes them, split, typed, read by threads, and damaged."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import hub_files, parquet
from fastload.errors import SourceError
from fastload.parquet import read_parquet
from fastload.samples import EncodedImage

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = {"_type": "Image"}
CAT_OR_DOG = {"names": ["cat", "dog"], "_type": "ClassLabel"}


def png(number: int, mode: str = "RGB") -> bytes:
    """An image of one colour that says its number."""
    file = io.BytesIO()
    colour = (number % 256, number // 256, 7) if mode == "RGB" else number
    Image.new(mode, (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def images(count: int, first: int = 0, path: str | None = "folder/{}.png") -> Any:
    """A column as `datasets` has it for Image()."""
    values = [{"bytes": png(first + i), "path": path and path.format(first + i)} for i in range(count)]
    return pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def write(
    path: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None, rows: int = 4, **options: Any
) -> Path:
    """A Parquet file of row groups of so many rows, with the metadata that `datasets` adds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def simple(path: Path, count: int = 10, first: int = 0, **options: Any) -> Path:
    """Images with labels, cat and dog in turn."""
    columns = {"image": images(count, first), "label": [i % 2 for i in range(first, first + count)]}
    return write(path, columns, {"image": IMAGE, "label": CAT_OR_DOG}, **options)


def only(path: Path, name: str, values: Any, feature: Any = None) -> tuple[list[Any], str | None]:
    """What a column of these values becomes, and of which kind it is."""
    features = {"image": IMAGE} if feature is None else {"image": IMAGE, name: feature}
    samples = read_parquet(write(path / "a.parquet", {"image": images(len(values)), name: values}, features))
    return [samples.read(i)[name] for i in range(len(values))], samples.kinds.get(name)


# ---- images and labels


def test_images_and_labels_come_in_order(tmp_path: Path) -> None:
    """Across row groups too: the bytes as they are, names from the paths, classes from the features."""
    samples = read_parquet(simple(tmp_path / "train.parquet"))
    assert samples.names == [f"{i}.png" for i in range(10)]
    assert (samples.classes, samples.kinds, samples.problems) == (["cat", "dog"], {}, {})
    for i in range(10):
        assert samples.read(i) == {"image": png(i), "label": i % 2}
        assert type(samples.read(i)["image"]) is EncodedImage
    (note,) = samples.notes
    assert note.startswith("images are taken from the column 'image', labels from 'label'; --image-column and")


@pytest.mark.parametrize(
    ("path", "count"), [(None, 5), ("same.png", 5), ("..", 1), ("a/", 1), ("a\nb.png", 1), (256 * "x", 1)]
)
def test_samples_are_numbered_where_paths_are_no_names(tmp_path: Path, path: str | None, count: int) -> None:
    """Where there are none, where one comes twice, or where no file can be called so."""
    file = write(tmp_path / "test-00000-of-00001.parquet", {"image": images(count, path=path)})
    assert read_parquet(file).names == [f"test/{i:09d}" for i in range(count)]


def test_names_are_what_paths_end_with(tmp_path: Path) -> None:
    """On any system, and whatever leads there."""
    file = write(tmp_path / "a.parquet", {"image": images(2, path="C:\\x/../{}.png")})
    assert read_parquet(file).names == ["0.png", "1.png"]


@pytest.mark.parametrize("type", ["binary", "large_binary", "binary_view", "dictionary"])
def test_bytes_are_images_if_they_begin_so(tmp_path: Path, type: str) -> None:
    """Without metadata, in a column of whatever name; other bytes stay bytes."""
    kind = pa.dictionary(pa.int32(), pa.binary()) if type == "dictionary" else getattr(pa, type)()
    column = pa.array([None, png(1), png(2)], pa.binary()).cast(kind)
    samples = read_parquet(write(tmp_path / "a.parquet", {"other": [b"x", b"y", b"z"], "content": column}))
    assert samples.read(1) == {"image": png(1), "other": b"y"}
    assert samples.names[1] == "train/000000001"
    with pytest.raises(SourceError, match=r"row 0, column 'content': there is no image"):
        samples.read(0)


def test_the_column_that_is_called_image_is_it(tmp_path: Path) -> None:
    """Of several the one of that name, wherever it stands; the others keep theirs."""
    columns = {"wrist": images(2, 50), "img": images(2)}
    samples = read_parquet(write(tmp_path / "a.parquet", columns))
    assert samples.read(1) == {"image": png(1), "wrist": png(51)}
    chosen = read_parquet(tmp_path / "a.parquet", image_column="wrist")
    assert chosen.read(1) == {"image": png(51), "img": png(1)}


def test_fields_have_different_names(tmp_path: Path) -> None:
    """Another column that is called image, beside the one that was chosen, gets a number."""
    write(tmp_path / "a.parquet", {"image": images(2), "photo": images(2, 50)})
    samples = read_parquet(tmp_path / "a.parquet", image_column="photo")
    assert samples.read(0) == {"image": png(50), "image_2": png(0)}


@pytest.mark.parametrize("name", ["annotation", "mask", "label", "segmentation_mask"])
def test_a_second_image_may_be_a_mask(tmp_path: Path, name: str) -> None:
    """If it is called as masks are, and has one channel; else it is a picture like the first."""
    features = {"image": IMAGE, name: IMAGE}
    drawn = [{"bytes": gray, "path": None} for gray in (png(0, "L"), png(7, "P"))]
    samples = read_parquet(write(tmp_path / "a.parquet", {name: drawn, "image": images(2)}, features))
    assert samples.kinds == {"mask": "mask"}
    assert samples.read(1) == {"image": png(1), "mask": png(7, "P")}
    coloured = {name: images(2, 50), "image": images(2)}
    samples = read_parquet(write(tmp_path / "a.parquet", coloured, features))
    assert (samples.kinds, samples.read(1)) == ({}, {"image": png(1), name: png(51)})


def test_sounds_are_no_images(tmp_path: Path) -> None:
    """They have bytes and a path as well; the features tell them apart. They are left out with a note."""
    features = {"sound": {"sampling_rate": 16000, "_type": "Audio"}, "picture": IMAGE}
    samples = read_parquet(write(tmp_path / "a.parquet", {"sound": images(2, 50), "picture": images(2)}, features))
    assert samples.read(0) == {"image": png(0)}
    assert samples.notes[0].startswith(
        "column 'sound' is left out: struct<bytes: binary, path: string> can't be packed"
    )


def test_a_path_is_never_opened(tmp_path: Path) -> None:
    """Not even of an image that is there: a stranger's file must not choose what is read."""
    (tmp_path / "secret.png").write_bytes(png(1))
    values = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": png(2), "path": "b"}, None]
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": values}, {"image": IMAGE}))
    with pytest.raises(SourceError, match=r"row 0.*only the path '.*secret\.png', which isn't opened"):
        samples.read(0)
    assert samples.read(1) == {"image": png(2)}
    with pytest.raises(SourceError, match=r"row 2.*there is no image"):
        samples.read(2)


def test_labels_out_of_range_are_their_samples_problem(tmp_path: Path) -> None:
    """-1 and null are no label; anything else has to be a class."""
    columns = {"image": images(5), "label": [1, None, -1, 2, 0]}
    samples = read_parquet(write(tmp_path / "a.parquet", columns, {"image": IMAGE, "label": CAT_OR_DOG}))
    assert [samples.read(i)["label"] for i in (0, 1, 2, 4)] == [1, -1, -1, 0]
    with pytest.raises(SourceError, match=r"a\.parquet, row 3, column 'label': the label is 2; it may be 0 to 1"):
        samples.read(3)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["coarse_label", "fine_label"], "coarse_label"),
        (["id", "label"], "label"),
        (["kind", "size"], None),
        (["number", "class_id"], "class_id"),
    ],
)
def test_the_column_of_labels_is_known_by_its_name(tmp_path: Path, names: list[str], label: str | None) -> None:
    """Without features, of whole numbers; what is not the label keeps its name."""
    columns = {name: [10 * place, 10 * place + 1] for place, name in enumerate(names)}
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": images(2), **columns}))
    rest = {("label" if name == label else name): columns[name][1] for name in names}
    assert samples.read(1) == {"image": png(1), **rest}


def test_class_labels_go_before_numbers(tmp_path: Path) -> None:
    """A column of class labels is the label whatever it is called, unless there is one called label."""
    columns = {"image": images(2), "class_id": [5, 6], "animal": [0, 1]}
    samples = read_parquet(write(tmp_path / "a.parquet", columns, {"image": IMAGE, "animal": CAT_OR_DOG}))
    assert (samples.read(1)["label"], samples.read(1)["class_id"], samples.classes) == (1, 6, ["cat", "dog"])
    columns["label"] = [7, 8]
    samples = read_parquet(write(tmp_path / "a.parquet", columns, {"image": IMAGE, "animal": CAT_OR_DOG}))
    assert (samples.read(1)["label"], samples.read(1)["animal"], samples.classes) == (8, 1, None)


def test_label_columns_insist(tmp_path: Path) -> None:
    """One, several, none, words, real numbers."""
    columns = {
        "image": images(3),
        "label": [0, 1, 2],
        "x": [0.5, None, 2.0],
        "n": [4, 5, None],
        "word": ["b", None, "a"],
    }
    file = write(tmp_path / "a.parquet", columns)

    def labels(*names: str) -> list[Any]:
        samples = read_parquet(file, label_columns=names)
        return [samples.read(i)["label"] for i in range(3)]

    assert labels("n") == [4, 5, -1]
    assert labels("x")[::2] == [0.5, 2.0]
    assert np.isnan(labels("x")[1])
    assert labels("word") == [1, -1, 0]
    assert read_parquet(file, label_columns="word").classes == ["a", "b"]
    whole, real = labels("n", "label")[2], labels("n", "x")[1]
    assert (whole.dtype, whole.tolist()) == (np.int64, [-1, 2])
    assert (real.dtype, real[0], np.isnan(real[1])) == (np.float64, 5.0, True)
    assert read_parquet(file, label_columns=["n", "x"]).kinds["label"] == "vector"
    assert read_parquet(file, label_columns=[]).read(1)["label"] == 1  # a column like any other
    with pytest.raises(SourceError, match=r"has string in column 'word'; several columns of labels hold numbers"):
        labels("n", "word")
    with pytest.raises(SourceError, match=r"has no column 'y'; it has 'image', 'label', 'x', 'n', 'word'"):
        labels("y")
    with pytest.raises(SourceError, match=r"in column 'image'; labels are numbers or text"):
        labels("image")


def test_words_in_a_column_called_label_are_classes(tmp_path: Path) -> None:
    """As in lists."""
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": images(3), "label": ["dog", "ant", "dog"]}))
    assert ([samples.read(i)["label"] for i in range(3)], samples.classes) == ([1, 0, 1], ["ant", "dog"])


def test_what_has_no_images_is_refused(tmp_path: Path) -> None:
    """A table of numbers, and a column that was chosen and has none."""
    file = write(tmp_path / "a.parquet", {"x": [1], "url": ["http://a/b.png"]})
    with pytest.raises(SourceError, match=r"no column of images, only 'x' \(int64\), 'url' \(string\); --image-column"):
        read_parquet(file)
    with pytest.raises(SourceError, match=r"string in column 'url'; images are a struct of bytes and path, or binary"):
        read_parquet(file, image_column="url")
    with pytest.raises(SourceError, match=r"has no column 'picture'; it has 'x', 'url'"):
        read_parquet(file, image_column="picture")


# ---- other columns


@pytest.mark.parametrize(
    ("values", "wanted", "kind"),
    [
        (pa.array([1, 2], pa.uint8()), [1, 2], None),
        ([1.5, 2.5], [1.5, 2.5], None),
        ([True, False], [True, False], None),
        (["é", ""], ["é", ""], None),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"], None),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"], None),
        ([b"\0a", b""], [b"\0a", b""], None),
        ([1, None], [1, None], "json"),
        (["a", None], ["a", None], "json"),
        (pa.nulls(2), [None, None], "json"),
        ([[1, 2], []], [[1, 2], []], "json"),
        ([["a", None], None], [["a", None], None], "json"),
        ([[[1.0], []], [[2.0]]], [[[1.0], []], [[2.0]]], "json"),
        ([{"a": 1, "b": [None]}, None], [{"a": 1, "b": [None]}, None], "json"),
        (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), [[["k", 1]], []], "json"),
        ([datetime.date(2020, 1, 2)] * 2, ["2020-01-02"] * 2, None),
        ([datetime.datetime(2020, 1, 2, 3, 4)] * 2, ["2020-01-02T03:04:00.000000"] * 2, None),
        (pa.array([1, 2], pa.timestamp("ns")), [f"1970-01-01T00:00:00.00000000{i}" for i in (1, 2)], None),
        (pa.array([0, 1], pa.timestamp("ms", "Mars/Olympus")), [f"1970-01-01T00:00:00.00{i}Z" for i in (0, 1)], None),
        ([datetime.time(1, 2, 3)] * 2, ["01:02:03.000000"] * 2, None),
        ([decimal.Decimal("1.50")] * 2, ["1.50"] * 2, None),
    ],
    ids=str,
)
def test_values_are_what_they_were(tmp_path: Path, values: Any, wanted: list[Any], kind: str | None) -> None:
    """Of every type; what JSON needs to hold, and columns with nulls, are of the kind json."""
    got = only(tmp_path, "field", values)
    assert got == (wanted, kind)
    assert list(map(type, got[0])) == list(map(type, wanted))


@pytest.mark.parametrize(
    ("type", "feature", "values", "dtype"),
    [
        (pa.list_(pa.float32(), 2), None, [[1, 2], [3, 4]], "float32"),
        (pa.list_(pa.list_(pa.int16(), 2), 1), None, [[[1, 2]], [[3, 4]]], "int16"),
        (
            pa.list_(pa.int64()),
            {"feature": {"_type": "Value"}, "length": 2, "_type": "List"},
            [[1, 2], [3, 4]],
            "int64",
        ),
        (
            pa.list_(pa.list_(pa.uint8())),
            {"shape": [2, 1], "dtype": "uint8", "_type": "Array2D"},
            [[[1], [2]], [[3], [4]]],
            "uint8",
        ),
        (pa.list_(pa.bool_(), 1), None, [[True], [False]], "bool"),
    ],
    ids=str,
)
def test_lists_of_one_shape_are_arrays(tmp_path: Path, type: Any, feature: Any, values: list[Any], dtype: str) -> None:
    """By their type, or by what the features say."""
    got, kind = only(tmp_path, "field", pa.array(values, type), feature)
    assert kind == "array"  # not image, which values of bytes in three dimensions might be taken for
    for array, value in zip(got, values, strict=True):
        np.testing.assert_array_equal(array, value)
        assert (array.dtype, array.flags.writeable) == (dtype, True)


@pytest.mark.parametrize("values", [[[1.0, 2.0], None], [[1.0, None], [3.0, 4.0]]])
def test_lists_with_nulls_are_json(tmp_path: Path, values: list[Any]) -> None:
    """Whether a list is missing or a number in it."""
    assert only(tmp_path, "field", pa.array(values, pa.list_(pa.float64(), 2))) == (values, "json")


def test_a_shape_that_is_not_kept_is_its_samples_problem(tmp_path: Path) -> None:
    """Features can say what isn't so, in number or in arrangement."""
    feature = {"shape": [2, 2], "dtype": "int64", "_type": "Array2D"}
    values = [[[1, 2], [3, 4]], [[1, 2, 3], [4]], [[1, 2]]]
    file = write(tmp_path / "a.parquet", {"image": images(3), "field": values}, {"image": IMAGE, "field": feature})
    samples = read_parquet(file)
    assert samples.read(0)["field"].tolist() == values[0]
    for i in (1, 2):
        with pytest.raises(SourceError, match=rf"row {i}, column 'field': its shape is not \(2, 2\)"):
            samples.read(i)


@pytest.mark.parametrize(
    "metadata",
    [
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b'{"info": null}',
        b'{"info": {"features": [1]}}',
        b'{"info": {"features": {"image": 1, "label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "a"]}, "x": {"shape": [0, -1]}}}}',
        b'{"info": {"features": {"label": {"_type": ["ClassLabel"], "names": {"0": "a"}}, "x": {"length": true}}}}',
        b'{"info": {"features": {"x": {"_type": "ClassLabel", "names": ["a"]}, "gone": {"_type": "Image"}}}}',
    ],
)
def test_features_that_make_no_sense_are_not_believed(tmp_path: Path, metadata: bytes) -> None:
    """The types of the columns are enough."""
    table = pa.table({"image": images(2), "label": [0, 1], "x": [[1, 2], [3]]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    samples = read_parquet(tmp_path / "a.parquet")
    assert (samples.read(1), samples.classes) == ({"image": png(1), "label": 1, "x": [3]}, None)


@pytest.mark.parametrize("count", [64, 65])
def test_there_may_be_64_columns(tmp_path: Path, count: int) -> None:
    """More are refused."""
    file = write(tmp_path / "a.parquet", {"image": images(1), **{f"c{i}": [i] for i in range(count - 1)}})
    if count == 64:
        assert len(read_parquet(file).read(0)) == 64
    else:
        with pytest.raises(SourceError, match="has 65 columns; up to 64 can be packed"):
            read_parquet(file)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256])
def test_columns_have_names_that_can_be_printed(tmp_path: Path, name: str) -> None:
    """They become names of fields."""
    with pytest.raises(SourceError, match="give it a name that can be printed"):
        read_parquet(write(tmp_path / "a.parquet", {"image": images(1), name: [1]}))


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    """Which one would be meant?"""
    pq.write_table(pa.table([images(1), pa.array([1]), pa.array([2])], ["image", "x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="several columns of the same name, 'image', 'x', 'x'"):
        read_parquet(tmp_path / "a.parquet")


def test_a_dot_in_a_name_is_no_path(tmp_path: Path) -> None:
    """pyarrow selects columns by dotted paths."""
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": images(2), "image.path": ["a", "b"], "a.b": [1, 2]}))
    assert samples.read(1) == {"image": png(1), "image.path": "b", "a.b": 2}


def test_a_string_that_is_no_utf8_is_its_samples_problem(tmp_path: Path) -> None:
    """The others are read."""
    bad = pa.StringArray.from_buffers(2, *pa.array([b"ok", b"\xff\xfe"]).buffers()[1:])
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": images(2), "field": bad}))
    assert samples.read(0)["field"] == "ok"
    with pytest.raises(SourceError, match=r"row 1, column 'field': 'utf-8' codec can't decode"):
        samples.read(1)


# ---- files and splits


@pytest.mark.parametrize(
    "pattern",
    [
        "{}-0000{}-of-00002.parquet",
        "data/{}-0000{}-of-00002-b42893e5b6f0b3ab.parquet",
        "default/{}/000{}.parquet",
        "cifar100/{}-0000{}-of-00002.parquet",
        "{}/{}.parquet",
        "data/{}/shard-0000{}-of-00002.parquet",
    ],
)
def test_splits_are_found_in_every_layout(tmp_path: Path, pattern: str) -> None:
    """All files of one, in order; which one has to be said."""
    (tmp_path / "README.md").write_text("a card")
    for place, split in enumerate(("train", "validation", "test")):
        for number in (1, 0):
            simple(tmp_path / pattern.format(split, number), 5, 100 * place + 10 * number)
    assert hub_files.looks_like_parquet(tmp_path)
    numbers = [*range(5), *range(10, 15)]
    for part, first in (("train", 0), ("validation", 100), ("val", 100), ("test", 200)):
        samples = read_parquet(tmp_path, part)
        assert samples.names == [f"{first + number}.png" for number in numbers]
        assert [samples.read(i)["image"] for i in range(10)] == [png(first + number) for number in numbers]
    with pytest.raises(SourceError, match=r"has the splits .*; choose one, as with --split t"):
        read_parquet(tmp_path)
    with pytest.raises(SourceError, match=r"has no split 'extra'; it has '.*'"):
        read_parquet(tmp_path, "extra")


def test_a_split_may_have_any_name(tmp_path: Path) -> None:
    """If there is just one it need not be named."""
    simple(tmp_path / "fold_1-00000-of-00001.parquet")
    assert len(read_parquet(tmp_path).names) == len(read_parquet(tmp_path, "fold_1").names) == 10
    with pytest.raises(SourceError, match="has no split 'train'; it has 'fold_1'"):
        read_parquet(tmp_path, "train")


def test_a_single_file_has_its_split(tmp_path: Path) -> None:
    """It may be called anything."""
    file = simple(tmp_path / "val-00000-of-00002.parquet")
    assert len(read_parquet(file, "val").names) == 10
    with pytest.raises(SourceError, match="has no split 'train'; it has 'val'"):
        read_parquet(file, "train")
    assert hub_files.looks_like_parquet(file.rename(tmp_path / "pictures"))
    assert len(read_parquet(tmp_path / "pictures").names) == 10


def test_missing_files_are_noted_and_strange_ones_refused(tmp_path: Path) -> None:
    """A part of a large set may be all that one wants; two sets are a mistake."""
    simple(tmp_path / "train-00001-of-00003.parquet")
    assert read_parquet(tmp_path).notes[0] == "1 of the 3 files of the split are here"
    for name in ("train-00000-of-00002", "train-00001-of-00003-b42893e5b6f0b3ab", "train"):
        other = simple(tmp_path / f"{name}.parquet")
        with pytest.raises(SourceError, match="are not the files of one set"):
            read_parquet(tmp_path)
        other.unlink()


def test_several_sets_are_refused(tmp_path: Path) -> None:
    """The folder of one has to be given."""
    simple(tmp_path / "small" / "train-00000-of-00001.parquet")
    simple(tmp_path / "large" / "train-00000-of-00001.parquet")
    with pytest.raises(SourceError, match=r"has several sets, 'large', 'small'; give the folder of one of them"):
        read_parquet(tmp_path)
    assert len(read_parquet(tmp_path / "small").names) == 10


def test_what_is_no_parquet_does_not_look_like_it(tmp_path: Path) -> None:
    """Other files, no files, and class folders in which a Parquet file lies among images."""
    (tmp_path / "a.parquet").write_bytes(b"PK\3\4")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(1))
    for path in (tmp_path / "a.parquet", tmp_path, tmp_path / "nothing", tmp_path / "cat"):
        assert not hub_files.looks_like_parquet(path)
    (tmp_path / "a.parquet").unlink()
    simple(tmp_path / "cat" / "list.parquet")
    simple(tmp_path / "metadata.parquet")
    assert not hub_files.looks_like_parquet(tmp_path)
    with pytest.raises(SourceError, match=r"has no \.parquet files at its top, in data, or"):
        read_parquet(tmp_path)
    with pytest.raises(SourceError, match="no such file or folder"):
        read_parquet(tmp_path / "nothing")


def test_files_of_a_split_are_alike(tmp_path: Path) -> None:
    """The same columns of the same types, the same classes: otherwise labels would silently mean something else."""
    first, second = (tmp_path / f"train-0000{i}-of-00002.parquet" for i in range(2))
    simple(first)
    for columns, names, message in [
        ({"image": images(2), "label": ["a", "b"]}, ["cat", "dog"], "has string in column 'label'"),
        ({"image": images(2)}, ["cat", "dog"], "has nothing in column 'label'"),
        ({"image": images(2), "label": [0, 1], "x": [0, 1]}, ["cat", "dog"], "int64 in column 'x', .*nothing"),
        ({"image": images(2), "label": [0, 1]}, ["dog", "cat"], "different class names in column 'label'"),
    ]:
        write(second, columns, {"image": IMAGE, "label": {"names": names, "_type": "ClassLabel"}})
        with pytest.raises(SourceError, match=rf"train-00001-of-00002\.parquet.*{message}"):
            read_parquet(tmp_path)


def test_files_without_rows_count_for_nothing(tmp_path: Path) -> None:
    """Unless there are no others."""
    simple(tmp_path / "train-00000-of-00002.parquet", 0)
    with pytest.raises(SourceError, match="has 0 rows"):
        read_parquet(tmp_path)
    simple(tmp_path / "train-00001-of-00002.parquet", 3)
    assert read_parquet(tmp_path).read(2)["image"] == png(2)


def test_the_content_changes_with_files_and_columns(tmp_path: Path) -> None:
    """An interrupted pack must not go on with something else."""
    file = simple(tmp_path / "a.parquet")
    content = read_parquet(file).content
    assert read_parquet(file).content == content
    assert read_parquet(file, label_columns=[]).content != content
    simple(file, 11)
    assert read_parquet(file).content != content


# ---- reading


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, of which a few are kept."""
    monkeypatch.setattr(parquet, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 2000)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_threads_read_in_any_order(tmp_path: Path, small_blocks: None, rows: int) -> None:
    """Back and forth over the boundaries of blocks, row groups and files, with little of it kept."""
    for number in range(3):
        simple(tmp_path / f"train-0000{number}-of-00003.parquet", 30, 30 * number, rows=rows)
    samples = read_parquet(tmp_path)
    order = random.Random(1).choices(range(90), k=300)
    with ThreadPoolExecutor(4) as threads:
        for index, sample in zip(order, threads.map(samples.read, order), strict=True):
            assert sample == {"image": png(index), "label": index % 2}


def test_reading_in_order_reads_once(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small what is kept: row groups are gone through forward, and files are closed after them."""
    samples = read_parquet(simple(tmp_path / "a.parquet", 60, rows=20))
    opened = []
    real = parquet._opened
    monkeypatch.setattr(parquet, "_opened", lambda *given: opened.append(given) or real(*given))
    for i in range(60):
        assert samples.read(i)["image"] == png(i)
    assert len(opened) == 3


def test_samples_hold_nothing_of_their_block(tmp_path: Path) -> None:
    """What is read are copies: a sample that is kept keeps no block in memory."""
    samples = read_parquet(write(tmp_path / "a.parquet", {"image": images(40), "x": [b"x" * 1000] * 40}, rows=40))
    kept = samples.read(0)
    before = pa.total_allocated_bytes()
    del samples
    assert pa.total_allocated_bytes() < before
    assert kept["image"] == png(0)


# ---- damage


def damaged(path: Path, change: Callable[[bytearray], Any]) -> Path:
    """The file with some bytes changed."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def resized(footer: int) -> Callable[[bytearray], None]:
    """Another length of the footer."""

    def change(data: bytearray) -> None:
        data[-8:-4] = footer.to_bytes(4, "little")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.__delitem__(slice(0, None)), "begins with b''"),
        (lambda data: data.__delitem__(slice(3, None)), "begins with b'PAR'"),
        (lambda data: data.__delitem__(slice(4, None)), "can't be read"),
        (lambda data: data.__delitem__(slice(-9, None)), "can't be read"),
        (lambda data: data.__delitem__(slice(len(data) // 2, None)), "can't be read"),
        (lambda data: data.__delitem__(slice(-500, -100)), "can't be read"),
        (lambda data: data.__setitem__(slice(0, 4), b"PARE"), "is encrypted; decrypt it first"),
        (lambda data: data.__setitem__(slice(-4, None), b"PARE"), "can't be read"),
        (lambda data: data.__setitem__(slice(0, 4), b"GIF8"), "begins with b'GIF8'"),
        (resized(0), "can't be read"),
        (resized(1 << 31), "can't be read"),
        (resized((1 << 32) - 1), "can't be read"),
        (resized(12), "can't be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Callable[[bytearray], Any], message: str) -> None:
    """With the file's name, and a word on what to do; the library's own words never come alone."""
    file = damaged(simple(tmp_path / "a.parquet"), change)
    with pytest.raises(SourceError, match=message) as caught:
        read_parquet(file)
    assert str(file) in str(caught.value)


def test_a_damaged_row_group_is_its_samples_problem(tmp_path: Path) -> None:
    """All samples from the damage to the row group's end have the reason; the others are read, whatever the order."""
    file = simple(tmp_path / "a.parquet", 12, write_page_checksum=True, use_dictionary=False, compression="none")
    damaged(file, lambda data: data.__setitem__(data.index(png(5)) + 30, 0x55))
    samples = read_parquet(file)
    for _ in range(2):
        for i in (11, 4, 0, 5, 7, 8, 3, 6):
            if 4 <= i < 8:
                with pytest.raises(SourceError, match=r"a\.parquet, row group 1, can't be read: .*; download it again"):
                    samples.read(i)
            else:
                assert samples.read(i) == {"image": png(i), "label": i % 2}


def test_damage_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of thousands of samples would otherwise be read for each of them."""
    file = simple(tmp_path / "a.parquet", 8, rows=8, write_page_checksum=True, use_dictionary=False, compression="none")
    samples = read_parquet(damaged(file, lambda data: data.__setitem__(data.index(png(5)) + 30, 0x55)))
    opened = []
    real = parquet._opened
    monkeypatch.setattr(parquet, "_opened", lambda *given: opened.append(given) or real(*given))
    for i in range(8):
        with pytest.raises(SourceError, match="row group 0"):
            samples.read(i)
    assert len(opened) == 1


def test_a_damaged_column_of_other_values_is_found_as_well(tmp_path: Path) -> None:
    """Even where all of it is looked through to learn what it holds."""
    columns = {"image": images(8), "text": [f"some text {i}" for i in range(8)]}
    file = write(tmp_path / "a.parquet", columns, write_page_checksum=True, use_dictionary=False, compression="none")
    damaged(file, lambda data: data.__setitem__(data.index(b"some text 6"), 0))
    samples = read_parquet(file)
    assert samples.read(3)["text"] == "some text 3"
    with pytest.raises(SourceError, match="row group 1"):
        samples.read(6)


def thrift(number: int) -> bytes:
    """A number of 5 bytes in a footer."""
    value, out = number << 1, b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_numbers_of_rows_are_not_believed(tmp_path: Path) -> None:
    """A footer that promises more rows than there can be, or than there are, costs no memory."""
    count = 300_000_017  # 5 bytes, found nowhere else
    file = simple(tmp_path / "a.parquet", 5, rows=5)
    footer = file.read_bytes()
    size = int.from_bytes(footer[-8:-4], "little")
    body, tail = footer[: -8 - size], footer[-8 - size : -8]
    for places, message in (("all", "rows are in its"), ("file", "has 5 rows and says 300000017")):
        # in the FileMetaData num_rows follows the schema, in each RowGroup it follows the columns
        changed = _with_rows(tail, 5, count, last=places == "all")
        file.write_bytes(body + changed + len(changed).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(SourceError, match=message):
            read_parquet(file)


def _with_rows(footer: bytes, rows: int, lie: int, last: bool) -> bytes:
    field = b"\x16" + thrift(rows)  # an i64 that follows the field before it
    at = footer.index(field + b"\x19")  # then the list of row groups
    changed = footer[:at] + b"\x16" + thrift(lie) + footer[at + len(field) :]
    if last:
        at = changed.index(field + b"\x26", at + 1)
        changed = changed[:at] + b"\x16" + thrift(lie) + changed[at + len(field) :]
    return changed


FUZZ = """
import json, sys
from fastload.errors import SourceError
from fastload.parquet import read_parquet
for line in sys.stdin:
    try:
        samples = read_parquet(json.loads(line))
        for i in range(min(len(samples.names), 50)):
            try:
                samples.read(i)
            except (SourceError, OSError):
                pass
        print("read", flush=True)
    except (SourceError, OSError) as error:
        print("refused", flush=True)
"""


@pytest.fixture(scope="module")
def reader() -> Any:
    """A process that reads files whose paths it is given; a crash of pyarrow ends it, and not the tests."""
    process = subprocess.Popen(
        [sys.executable, "-c", FUZZ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with something of every kind."""
    columns = {
        "image": images(6),
        "label": [0, 1, None, 1, 0, 1],
        "text": ["a", "b", None, "d", "e", "f"],
        "box": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float32(), 2)),
        "more": [{"a": [1, 2], "b": "c"}] * 6,
        "when": [datetime.datetime(2020, 1, 1)] * 6,
    }
    return write(tmp_path_factory.mktemp("fuzz") / "a.parquet", columns, {"image": IMAGE, "label": CAT_OR_DOG}, rows=3)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_flipped_bytes_make_source_errors(reader: Any, whole_file: Path, data: st.DataObject) -> None:
    """And never another exception, nor the end of the process."""
    content = bytearray(whole_file.read_bytes())
    footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    places = st.one_of(st.integers(0, len(content) - 1), st.integers(footer, len(content) - 1))
    for place, value in data.draw(st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=4)).items():
        content[place] = value
    path = whole_file.with_name("b.parquet")
    path.write_bytes(content)
    reader.stdin.write(json.dumps(str(path)) + "\n")
    reader.stdin.flush()
    assert reader.stdout.readline().strip() in ("read", "refused"), reader.stderr.read()


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional library."""
    file = simple(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "fastload\[parquet\]"'):
        read_parquet(file)


PAGE = """
import contextlib, sys, pyarrow
from fastload.errors import SourceError
from fastload.parquet import read_parquet
found = read_parquet(sys.argv[1])
for index in range(len(found.names)):
    with contextlib.suppress(SourceError):
        found.read(index)
print(pyarrow.default_memory_pool().max_memory() >> 20)
"""


def test_a_page_that_says_it_is_large_takes_no_memory() -> None:
    """In 4 kB, found by `tools/fuzz`: pyarrow took the 800 MB that the header of a page asks for."""
    file = Path(__file__).parent / "corpus" / "parquet" / "page-of-800-MB"
    done = subprocess.run([sys.executable, "-c", PAGE, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
