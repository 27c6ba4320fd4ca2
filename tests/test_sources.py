"""Listing what is to be packed: class folders, flat folders and label lists, with every oddity that files have."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload.errors import SourceError
from fastload.items import Source
from fastload.sources import open_source

JPEG = b"\xff\xd8\xff\xe0 the beginning of a JPEG"
posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only: names and links that Windows doesn't have")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 exist on Linux")


def touch(root: Path, *names: str, data: bytes = JPEG) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def names_of(source: Source) -> list[str]:
    return [item.name for item in source.items]


def labelled(source: Source) -> dict[str, tuple[int, ...]]:
    return {item.name: item.labels for item in source.items if item.problem is None}


def problems(source: Source) -> dict[str, str]:
    return {item.name: item.problem for item in source.items if item.problem is not None}


def list_of(root: Path, text: str | bytes, *, files: tuple[str, ...] = ("a.jpg", "b.jpg", "c.jpg")) -> Source:
    """A list next to the files that it names."""
    touch(root, *files)
    (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(root / "list.txt")


# ---- which format it is


def test_a_folder_of_folders_has_classes(tmp_path: Path) -> None:
    """Sub-folders are the classes, sorted; labels are their numbers, names are relative with forward slashes."""
    source = open_source(touch(tmp_path, "cat/2.jpg", "cat/1.jpg", "ant/deep/9.jpg", "ant/3.jpg"))
    assert (source.format, source.classes, source.label_count, source.notes) == ("folders", ["ant", "cat"], 1, [])
    assert names_of(source) == ["ant/3.jpg", "ant/deep/9.jpg", "cat/1.jpg", "cat/2.jpg"]
    assert [item.labels for item in source.items] == [(0,), (0,), (1,), (1,)]
    assert [Path(item.path).read_bytes() for item in source.items] == [JPEG] * 4


@pytest.mark.parametrize(
    "magic", [JPEG, b"\x89PNG\r\n\x1a\n", b"BM12", b"GIF89a", b"II*\0....", b"MM\0*....", b"RIFF....WEBP"]
)
def test_a_folder_with_an_image_at_its_top_is_flat(tmp_path: Path, magic: bytes) -> None:
    """Whatever the image's format and its file's name; all images below belong to it, without labels or classes."""
    touch(tmp_path, "z/1.jpg", "b.jpg")
    touch(tmp_path, "image_without_suffix", data=magic)
    (tmp_path / "b.jpg").write_text("no image")
    source = open_source(tmp_path)
    assert (source.format, source.classes, source.label_count) == ("flat", None, 0)
    assert names_of(source) == ["b.jpg", "image_without_suffix", "z/1.jpg"]
    assert [item.labels for item in source.items] == [()] * 3


def test_a_text_file_at_the_top_makes_no_flat_folder(tmp_path: Path) -> None:
    """A README or a list beside the class folders is noted, not packed."""
    touch(tmp_path, "ant/1.jpg")
    touch(tmp_path, "README.md", "labels.csv", data=b"text")
    source = open_source(tmp_path)
    assert (source.format, names_of(source)) == ("folders", ["ant/1.jpg"])
    assert source.notes == ["2 files outside the class folders belong to no class, the first is 'README.md'"]


def test_a_file_is_a_list(tmp_path: Path) -> None:
    """A path to a text file is a list of names and labels."""
    source = list_of(tmp_path, "b.jpg 1\na.jpg 0\n")
    assert (source.format, source.classes, source.label_count) == ("list", None, 1)
    assert labelled(source) == {"b.jpg": (1,), "a.jpg": (0,)}
    assert names_of(source) == ["b.jpg", "a.jpg"]


def test_a_format_can_be_insisted_on(tmp_path: Path) -> None:
    """`flat` takes class folders as one unlabelled heap, `folders` leaves the images at the top out with a note."""
    touch(tmp_path, "ant/1.jpg", "cat/1.jpg", "top.jpg")
    assert names_of(open_source(tmp_path, "flat")) == ["top.jpg", "ant/1.jpg", "cat/1.jpg"]
    folders = open_source(tmp_path, "folders")
    assert names_of(folders) == ["ant/1.jpg", "cat/1.jpg"]
    assert folders.notes == ["1 files outside the class folders belong to no class, the first is 'top.jpg'"]


def test_formats_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A list of a folder, folders of a file, a format that does not exist: each with what is allowed."""
    touch(tmp_path, "ant/1.jpg", "list.txt")
    with pytest.raises(SourceError, match="is a folder, format 'list' needs a file"):
        open_source(tmp_path, "list")
    for format in ("flat", "folders"):
        with pytest.raises(SourceError, match=f"is a file, format '{format}' needs a folder"):
            open_source(tmp_path / "list.txt", format)
    with pytest.raises(SourceError, match="format is 'zip'; it may be one of auto, folders, flat, list"):
        open_source(tmp_path, "zip")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"root is .*; it goes with list, coco, and .* is of format flat"):
        open_source(tmp_path, root=tmp_path)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    """A missing path, an empty folder, class folders without files, an empty list: SourceError with the path."""
    with pytest.raises(SourceError, match=r"missing: no such file or folder; give a folder of images"):
        open_source(tmp_path / "missing")
    with pytest.raises(SourceError, match="no images at its top and no sub-folders to be classes"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="there is nothing to pack in it; is it the right folder"):
        open_source(tmp_path, "flat")
    (tmp_path / "ant").mkdir()
    with pytest.raises(SourceError, match="there is nothing to pack in it; is it the right folder"):
        open_source(tmp_path)
    for text in ("", "\n\n", "# only a comment\n", "\ufeff"):
        with pytest.raises(SourceError, match="there is nothing to pack in it; is it the right file"):
            list_of(tmp_path / "lists", text)


# ---- folders


def torchvision_image_folder(root: str) -> list[tuple[str, int]]:
    """`ImageFolder`'s documented rule: sorted classes; below each the sorted walk, each folder's files sorted."""
    samples = []
    for label, name in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for folder, _, files in sorted(os.walk(os.path.join(root, name), followlinks=True)):
            samples += [(os.path.join(folder, file), label) for file in sorted(files)]
    return samples


parts = st.text(st.sampled_from("aAbZ0-_ .é~Ωß,;'()"), min_size=1, max_size=4).filter(
    lambda part: part[0] != "." and part.strip() == part and not part.endswith(".")
)
trees = st.sets(st.lists(parts, min_size=2, max_size=4).map("/".join), min_size=1, max_size=12)


def made(root: str, tree: set[str]) -> None:
    """Make those files of the tree whose path is not that of a folder (or, on some systems, the same but for case)."""
    for name in sorted(tree):
        path = Path(root, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        except OSError:
            continue


@settings(max_examples=60, deadline=None)
@given(trees)
@example({"a/b/1", "a/b.c/1", "a/b c/1", "a/b-/1", "a/B/1", "a/1"})
@example({"a b/1", "a/1", "a-/1", "a.b/2", "A/1"})
def test_class_folders_are_in_torchvisions_order(tree: set[str]) -> None:
    """Paths and labels are exactly ImageFolder's, whatever the names: an index means the same sample in both."""
    with tempfile.TemporaryDirectory() as root:
        made(root, tree)
        expected = torchvision_image_folder(root)
        source = open_source(root, "folders")
        assert [(item.path, item.labels[0]) for item in source.items] == expected
        assert names_of(source) == [os.path.relpath(path, root).replace(os.sep, "/") for path, _ in expected]
        assert source.classes == sorted({name.split("/")[0] for name in names_of(source)})


@settings(max_examples=30, deadline=None)
@given(trees)
def test_a_flat_folder_has_all_files_by_folder_and_name(tree: set[str]) -> None:
    """Every file once, the folders in the order of their paths, each folder's files sorted."""
    with tempfile.TemporaryDirectory() as root:
        made(root, tree)
        walk = sorted(os.walk(root))
        expected = [os.path.join(folder, file) for folder, _, files in walk for file in sorted(files)]
        assert [item.path for item in open_source(root, "flat").items] == expected


def test_the_order_does_not_depend_on_how_the_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a trailing slash and `.` list the same names as the absolute path."""
    touch(tmp_path, "in/ant/1.jpg", "in/ant/a/2.jpg", "in/ant/a.b/3.jpg")
    expected = names_of(open_source(tmp_path / "in"))
    monkeypatch.chdir(tmp_path / "in")
    for path in (".", f"..{os.sep}in", f"{tmp_path}{os.sep}in{os.sep}", f".{os.sep}.{os.sep}"):
        assert names_of(open_source(path)) == expected == ["ant/1.jpg", "ant/a/2.jpg", "ant/a.b/3.jpg"]


def test_hidden_files_and_the_systems_litter_are_left_out(tmp_path: Path) -> None:
    """Dot files, dot folders, Thumbs.db and desktop.ini, at any depth and in any case; everything else is an item."""
    touch(tmp_path, "ant/1.jpg", "ant/notes.txt", "ant/.DS_Store", "ant/.hidden/2.jpg", "ant/deep/.3.jpg")
    touch(tmp_path, "ant/Thumbs.db", "ant/deep/DESKTOP.INI", ".git/4.jpg", ".top.jpg", "Thumbs.db")
    source = open_source(tmp_path)
    assert (source.format, source.classes, source.notes) == ("folders", ["ant"], [])
    assert names_of(source) == ["ant/1.jpg", "ant/notes.txt"]


def test_a_class_without_files_keeps_its_label(tmp_path: Path) -> None:
    """The labels of the others don't move, and a note names it."""
    touch(tmp_path, "ant/1.jpg", "cat/1.jpg")
    (tmp_path / "bee" / "empty").mkdir(parents=True)
    source = open_source(tmp_path)
    assert source.classes == ["ant", "bee", "cat"]
    assert [item.labels for item in source.items] == [(0,), (2,)]
    assert source.notes == ["class 'bee' has no files"]


@posix_only
def test_names_with_anything_in_them_are_listed(tmp_path: Path) -> None:
    """Newlines, tabs, quotes, backslashes, commas and other scripts, in classes and files."""
    names = ["a\nb/1\n2.jpg", "a\tb/x,y.jpg", "ünï/日本.jpg", "q\"uote/'s.jpg", "back\\slash/1.jpg", "sp ace/ 1 .jpg"]
    source = open_source(touch(tmp_path, *names))
    assert names_of(source) == sorted(names)
    assert source.classes == sorted(name.split("/")[0] for name in names)
    assert all(Path(item.path).read_bytes() == JPEG for item in source.items)


@linux_only
def test_names_that_are_not_utf_8_are_listed(tmp_path: Path) -> None:
    """The name's bytes come back from the item's name, for the class too."""
    folder = os.fsencode(tmp_path) + b"/cl\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff\xfe.jpg", "wb") as file:
        file.write(JPEG)
    source = open_source(tmp_path)
    assert [os.fsencode(name) for name in names_of(source)] == [b"cl\xe9/\xff\xfe.jpg"]
    assert [os.fsencode(name) for name in source.classes or []] == [b"cl\xe9"]
    assert Path(source.items[0].path).read_bytes() == JPEG
    assert len(source.digest()) == 32


# ---- links


@posix_only
def test_links_are_followed(tmp_path: Path) -> None:
    """A class that is a link, a file that is one, and a folder that is one are what they point to."""
    touch(tmp_path, "elsewhere/1.jpg", "elsewhere/2.jpg", "src/ant/3.jpg")
    (tmp_path / "src" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "ant" / "deep").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "ant" / "4.jpg").symlink_to("../../elsewhere/1.jpg")
    source = open_source(tmp_path / "src")
    assert names_of(source) == ["ant/3.jpg", "ant/4.jpg", "ant/deep/1.jpg", "ant/deep/2.jpg", "bee/1.jpg", "bee/2.jpg"]
    assert [(item.path, item.labels[0]) for item in source.items] == torchvision_image_folder(str(tmp_path / "src"))
    (tmp_path / "link").symlink_to(tmp_path / "src")
    assert names_of(open_source(tmp_path / "link")) == names_of(source)


@posix_only
def test_folders_that_contain_themselves_are_entered_once(tmp_path: Path) -> None:
    """Links to a folder above, directly and through another folder, end; nothing is listed twice."""
    touch(tmp_path, "ant/1.jpg", "ant/deep/2.jpg", "bee/3.jpg")
    (tmp_path / "ant" / "deep" / "loop").symlink_to(tmp_path / "ant")
    (tmp_path / "ant" / "deep" / "self").symlink_to(tmp_path / "ant" / "deep")
    assert names_of(open_source(tmp_path)) == ["ant/1.jpg", "ant/deep/2.jpg", "bee/3.jpg"]
    assert names_of(open_source(tmp_path, "flat")) == ["ant/1.jpg", "ant/deep/2.jpg", "bee/3.jpg"]
    (tmp_path / "bee" / "other").symlink_to(tmp_path / "ant")
    (tmp_path / "ant" / "other").symlink_to(tmp_path / "bee")
    through = ["ant/1.jpg", "ant/deep/2.jpg", "ant/other/3.jpg", "bee/3.jpg", "bee/other/1.jpg", "bee/other/deep/2.jpg"]
    assert names_of(open_source(tmp_path)) == through


@posix_only
def test_a_link_to_the_source_itself_brings_nothing_in_again(tmp_path: Path) -> None:
    """`ant/up -> ..` would put every class's images into class ant."""
    touch(tmp_path, "ant/1.jpg", "bee/2.jpg")
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    assert labelled(open_source(tmp_path)) == {"ant/1.jpg": (0,), "bee/2.jpg": (1,)}


@posix_only
def test_links_to_nowhere_are_items(tmp_path: Path) -> None:
    """A dangling link and one to itself are listed, to be quarantined by name, and the digest can be taken."""
    touch(tmp_path, "ant/1.jpg")
    (tmp_path / "ant" / "dangling").symlink_to("nowhere")
    (tmp_path / "ant" / "itself").symlink_to("itself")
    source = open_source(tmp_path)
    assert names_of(source) == ["ant/1.jpg", "ant/dangling", "ant/itself"]
    assert source.digest() == open_source(tmp_path).digest()


@posix_only
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may list every folder")
@pytest.mark.parametrize("folder", ["ant", "ant/deep", "."])
def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path, folder: str) -> None:
    """Not a silently smaller dataset."""
    touch(tmp_path, "ant/1.jpg", "ant/deep/2.jpg")
    locked = tmp_path / folder
    locked.chmod(0)
    try:
        with pytest.raises(SourceError, match="can't be listed: Permission denied; check its permissions"):
            open_source(tmp_path)
    finally:
        locked.chmod(0o755)


# ---- lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg 2\nb.jpg 0\n", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg\t2\nb.jpg\t0", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg,2\nb.jpg,0", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg, 2\n b.jpg ,0 ", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg    2\n   b.jpg 0   \n", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg 2\r\nb.jpg 0\r\n", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg 2\rb.jpg 0\r", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("\ufeffa.jpg 2\nb.jpg 0\n", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("# name label\n\na.jpg 2\n   \n  # more\nb.jpg 0\n\n", {"a.jpg": (2,), "b.jpg": (0,)}),
        ("a.jpg -1\nb.jpg +7\n", {"a.jpg": (-1,), "b.jpg": (7,)}),
        ("a.jpg 0007\nb.jpg 999999999999999999", {"a.jpg": (7,), "b.jpg": (999999999999999999,)}),
        ("a.jpg\nb.jpg\n", {"a.jpg": (), "b.jpg": ()}),
        ("a.jpg 1\na.jpg 1\nb.jpg 0", {"a.jpg": (1,), "b.jpg": (0,)}),
        ('"a.jpg",2\nb.jpg,"0"', {"a.jpg": (2,), "b.jpg": (0,)}),
        ("./a.jpg 2\nb.jpg 0", {"./a.jpg": (2,), "b.jpg": (0,)}),
    ],
)
def test_lists_are_read(tmp_path: Path, text: str, expected: dict[str, tuple[int, ...]]) -> None:
    """Spaces, tabs and commas; all line ends; a byte order mark; comments and blank lines; signs and zeros."""
    source = list_of(tmp_path, text)
    assert labelled(source) == expected
    assert problems(source) == {}


@pytest.mark.parametrize("delimiter", [" ", "\t", ","])
def test_several_labels_are_padded_to_the_longest_line(tmp_path: Path, delimiter: str) -> None:
    """Ragged labels end in -1; a line without any is all -1."""
    text = "\n".join(delimiter.join(line.split()) for line in ("a.jpg 3", "b.jpg 1 2 0", "c.jpg", "d.jpg 1"))
    source = list_of(tmp_path, text)
    assert source.label_count == 3
    assert labelled(source) == {"a.jpg": (3, -1, -1), "b.jpg": (1, 2, 0), "c.jpg": (-1, -1, -1)}
    assert source.notes == ["1 of 3 samples have no label (-1 in the store)"]


def test_class_names_become_numbers_in_sorted_order(tmp_path: Path) -> None:
    """Labels that are mostly words are class names, however many a line has, spaces in them allowed with commas."""
    source = list_of(tmp_path, "a.jpg zebra\nb.jpg ant\nc.jpg zebra")
    assert (source.classes, labelled(source)) == (["ant", "zebra"], {"a.jpg": (1,), "b.jpg": (0,), "c.jpg": (1,)})
    source = list_of(tmp_path, "a.jpg,polar bear\nb.jpg,ant,polar bear\n")
    assert (source.classes, labelled(source)) == (["ant", "polar bear"], {"a.jpg": (1, -1), "b.jpg": (0, 1)})


@pytest.mark.parametrize("bad", ["x", "--1", "0x10", "1_000", "\u0661", "²", "-", "+", "nan"])
def test_a_label_that_is_no_number_where_numbers_are_is_a_problem_of_its_line(tmp_path: Path, bad: str) -> None:
    """The line number and the label are in the reason; the other lines are packed."""
    source = list_of(tmp_path, f"# comment\na.jpg 1\nb.jpg {bad}\nc.jpg 2\n")
    assert source.classes is None
    assert labelled(source) == {"a.jpg": (1,), "c.jpg": (2,)}
    assert problems(source) == {"b.jpg": f"line 3: label {bad!r} is not a number, as the others are"}


def test_a_missing_file_is_a_problem_of_its_line(tmp_path: Path) -> None:
    """So is a folder; the reason has the line and the path that was tried."""
    (tmp_path / "folder").mkdir()
    source = list_of(tmp_path, "a.jpg 1\n\nnowhere.jpg 2\nfolder 3\n")
    assert labelled(source) == {"a.jpg": (1,)}
    tried = {name: f"{tmp_path}{os.sep}{name}" for name in ("nowhere.jpg", "folder")}
    assert problems(source) == {
        "nowhere.jpg": f"line 3: no such file {tried['nowhere.jpg']}",
        "folder": f"line 4: no such file {tried['folder']}",
    }


def test_a_list_whose_files_are_all_missing_is_an_error(tmp_path: Path) -> None:
    """It was given with the wrong root, most likely: the message says where names start, and the first line's path."""
    (tmp_path / "list.txt").write_text("x/1.jpg 0\nx/2.jpg 1\n")
    with pytest.raises(SourceError, match=r"none of its 2 lines can be packed; .*line 1: no such file .*--root"):
        open_source(tmp_path / "list.txt")


def test_a_root_is_where_names_start(tmp_path: Path) -> None:
    """root= for relative names; absolute names stand for themselves; names are kept as they are written."""
    touch(tmp_path, "images/deep/a.jpg", "other/b.jpg")
    absolute = str(tmp_path / "other" / "b.jpg")
    (tmp_path / "list.txt").write_text(f"deep/a.jpg\t1\n{absolute}\t0\n")
    source = open_source(tmp_path / "list.txt", root=tmp_path / "images")
    assert labelled(source) == {"deep/a.jpg": (1,), absolute.replace(os.sep, "/"): (0,)}
    assert [Path(item.path).read_bytes() for item in source.items] == [JPEG] * 2


def test_a_list_in_the_working_folder_finds_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file name has no folder part: its files are beside it."""
    list_of(tmp_path, "a.jpg 1\n")
    monkeypatch.chdir(tmp_path)
    assert labelled(open_source("list.txt")) == {"a.jpg": (1,)}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("my cat.jpg", "my cat.jpg 3"),
        ("my cat.jpg", "my cat.jpg\t3"),
        ("my cat.jpg", "my cat.jpg,3"),
        ("a b/c d e.jpg", "a b/c d e.jpg 3"),
        ("two  spaces.jpg", "two  spaces.jpg 3"),
        ("a,b.jpg", '"a,b.jpg",3'),
        ("日本 語.jpg", "日本 語.jpg 3"),
        ("käfer.jpg", "käfer.jpg 3"),
        ("#1.jpg", "./#1.jpg 3"),
        ("1", "1 3"),
    ],
)
def test_names_with_spaces_and_other_characters_in_lists(tmp_path: Path, name: str, line: str) -> None:
    """As many words as it takes to name a file that exists; quotes as CSV has them."""
    source = list_of(
        tmp_path, f"a.jpg{'	' if '	' in line else ',' if ',' in line else ' '}1\n{line}\n", files=("a.jpg", name)
    )
    assert problems(source) == {}
    assert [item.labels for item in source.items] == [(1,), (3,)]
    assert Path(source.items[1].path).resolve() == (tmp_path / name).resolve()


def test_a_name_with_spaces_may_have_several_labels(tmp_path: Path) -> None:
    """What follows the longest name that is needed is labels."""
    source = list_of(tmp_path, "my cat.jpg 1 2\na.jpg 3\n", files=("my cat.jpg", "a.jpg"))
    assert labelled(source) == {"my cat.jpg": (1, 2), "a.jpg": (3, -1)}


@linux_only
def test_a_list_names_files_that_are_not_utf_8(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are looked up as they are."""
    with open(os.fsencode(tmp_path) + b"/\xe9t\xe9.jpg", "wb") as file:
        file.write(JPEG)
    source = list_of(tmp_path, b"\xe9t\xe9.jpg 4\na.jpg 0\n")
    assert [(os.fsencode(item.name), item.labels) for item in source.items] == [
        (b"\xe9t\xe9.jpg", (4,)),
        (b"a.jpg", (0,)),
    ]


@pytest.mark.parametrize(
    "data", [JPEG, b"\x89PNG\r\n\x1a\n", b"a.jpg 1\n\0", b"PK\x03\x04\0\0", bytes(100)], ids=lambda v: f"{v[:6]!r}"
)
def test_a_binary_file_is_no_list(tmp_path: Path, data: bytes) -> None:
    """One image, or an archive, given instead of its folder."""
    path = tmp_path / "one.jpg"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"one\.jpg is not a text file; a list has lines of `name label`"):
        open_source(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        "<html>, <body>",
        '"',
        '"a.jpg,1',
        ",,,",
        "\t\t",
        "," + "x" * 200_000,
        "a.jpg," + "1," * 200_000 + "z",
    ],
    ids=lambda v: v[:8],
)
def test_text_that_is_no_list_is_a_source_error(tmp_path: Path, text: str) -> None:
    """JSON, HTML, stray quotes and lines of any length are no crash."""
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SourceError, match=r"list\.txt"):
        open_source(tmp_path / "list.txt")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xff 1\n")
@example(b"a.jpg\x85 1")
@example(b'"\n"')
def test_any_bytes_as_a_list_are_items_or_a_source_error(data: bytes) -> None:
    """Whatever the file holds, nothing but SourceError comes out, and every problem names its line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "list")
        path.write_bytes(data)
        try:
            source = open_source(path)
        except SourceError:
            return
        assert source.items
        assert all(item.problem.startswith("line ") for item in source.items if item.problem)


# ---- the digest


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new file": lambda root: touch(root, "ant/3.jpg"),
    "a file removed": lambda root: (root / "ant" / "1.jpg").unlink(),
    "a file renamed": lambda root: (root / "ant" / "1.jpg").rename(root / "ant" / "0.jpg"),
    "a class renamed": lambda root: (root / "ant").rename(root / "aardvark"),
    "a file of another class": lambda root: (root / "ant" / "1.jpg").rename(root / "bee" / "1.jpg"),
    "a file of another size": lambda root: touch(root, "ant/1.jpg", data=JPEG * 2),
    "a file of another time": lambda root: os.utime(root / "ant" / "1.jpg", (1, 1)),
    "an empty class": lambda root: (root / "cat").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_tells_a_changed_source_from_an_unchanged_one(tmp_path: Path, change: str) -> None:
    """An interrupted pack may only go on with the very same files."""
    touch(tmp_path, "ant/1.jpg", "ant/2.jpg", "bee/2.jpg")
    before = open_source(tmp_path).digest()
    assert open_source(tmp_path).digest() == before
    CHANGES[change](tmp_path)
    assert open_source(tmp_path).digest() != before


def test_the_digest_tells_labels_of_a_list_apart(tmp_path: Path) -> None:
    """The same files with other labels are another source."""
    before = list_of(tmp_path, "a.jpg 1\nb.jpg 2").digest()
    assert list_of(tmp_path, "a.jpg 1\nb.jpg 2\n", files=()).digest() == before
    assert list_of(tmp_path, "a.jpg 2\nb.jpg 1", files=()).digest() != before
