"""WebDataset's shards: the samples that WebDataset itself reads, and a reason for everything that can't be one."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import SourceError
from fastload.samples import EncodedImage, Samples
from fastload.tar_shards import find_shards, looks_like_tar, read_shards

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only: pipes with names, permissions, files of holes")

JPEG = b"\xff\xd8\xff a photograph"
Files = Iterable[tuple[str, "bytes | str | tarfile.TarInfo"]]


def tar(path: Path, files: Files) -> Path:
    """A tar file with these members: contents, or headers of members without one."""
    with tarfile.open(path, "w", encoding="utf-8") as out:
        for name, content in files:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            data = b"" if member is content else content.encode() if isinstance(content, str) else content
            member.size = len(data)  # type: ignore[arg-type]
            out.addfile(member, io.BytesIO(data))  # type: ignore[arg-type]
    return path


def link(kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def labelled(keys: Iterable[str], first: int = 0) -> list[tuple[str, bytes]]:
    """An image and a label for each key."""
    parts = [((f"{key}.jpg", JPEG + key.encode()), (f"{key}.cls", b"%d" % n)) for n, key in enumerate(keys, first)]
    return [member for sample in parts for member in sample]


def all_of(samples: Samples) -> list[tuple[str, dict[str, Any]]]:
    """Names and values of the samples that have no problem."""
    return [(name, samples.read(i)) for i, name in enumerate(samples.names) if i not in samples.problems]


def problems(samples: Samples) -> dict[str, str]:
    return {samples.names[number]: reason for number, reason in samples.problems.items()}


# ---- samples


def test_members_with_one_key_are_a_sample(tmp_path: Path) -> None:
    """Images by their bytes, labels as numbers, in the order of the file."""
    samples = read_shards(tar(tmp_path / "a.tar", labelled(["cat/2", "cat/1", "dog.d/3"])))
    assert samples.names == ["cat/2", "cat/1", "dog.d/3"]
    assert samples.read(1) == {"image": JPEG + b"cat/1", "label": 1}
    assert type(samples.read(1)["image"]) is EncodedImage
    assert (samples.problems, samples.kinds, samples.classes, samples.notes) == ({}, {}, None, [])


def test_it_reads_what_webdataset_reads(tmp_path: Path) -> None:
    """The same keys in the same order, with the same values, from shards that WebDataset wrote."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "s-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            array = np.arange(number, dtype=np.float32).reshape(-1, 1)
            rest = {"json": {"n": [number, "é"]}, "txt": f"é {number}", "npy": array, "bin": b"\0\xff"}
            writer.write({"__key__": f"a/b.c/{number:03}", "jpg": JPEG * number or JPEG, "cls": number % 3, **rest})
    samples = read_shards(tmp_path / "s-{000000..000002}.tar")
    urls = [str(tmp_path / f"s-{number:06}.tar") for number in range(3)]
    expected = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert samples.names == [sample["__key__"] for sample in expected]
    assert (samples.problems, samples.notes, samples.kinds) == ({}, [], {"json": "json"})
    for number, sample in enumerate(expected):
        found = samples.read(number)
        assert found.keys() == {"image", "label", "json", "txt", "npy", "bin"}
        assert np.array_equal(found["npy"], sample["npy"])
        names = {"image": "jpg", "label": "cls", "json": "json", "txt": "txt", "bin": "bin"}
        assert all(found[field] == sample[extension] for field, extension in names.items())


keys = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="./\\\0"), min_size=1, max_size=120)
contents = st.fixed_dictionaries({"jpg": st.binary(min_size=1), "TXT": st.text(), "x.Bin": st.binary(max_size=2000)})


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.lists(keys, min_size=1, max_size=3).map("/".join), contents, min_size=1, max_size=6))
def test_any_keys_and_contents_come_back(tmp_path_factory: pytest.TempPathFactory, all_samples: Any) -> None:
    """Whatever the names are made of; extensions are in lower case."""
    all_samples = {key: value for key, value in all_samples.items() if not key.startswith("__")}
    files = [(f"{key}.{ext}", content) for key, value in all_samples.items() for ext, content in value.items()]
    path = tar(tmp_path_factory.mktemp("tar") / "a.tar", files)
    if not files:
        with pytest.raises(SourceError, match="no sample"):
            read_shards(path)
        return
    expected = [(k, {"image": v["jpg"], "txt": v["TXT"], "x.bin": v["x.Bin"]}) for k, v in all_samples.items()]
    assert all_of(read_shards(path)) == expected


def test_fields_by_extension(tmp_path: Path) -> None:
    """One image, one mask and one label have names of their own, whatever else there is keeps its extension."""
    extensions = [
        "seg.png",
        "left.png",
        "jpg",
        "thumb.jpg",
        "instances.png",
        "label.json",
        "CLS",
        "index",
        "image",
        "mp4",
    ]
    contents = {"CLS": "3", "index": "4", "label.json": "[1, 2]"}
    samples = read_shards(tar(tmp_path / "a.tar", [(f"k.{e}", contents.get(e, e)) for e in extensions]))
    assert samples.read(0) == {
        **{"image": b"jpg", "left.png": b"left.png", "thumb.jpg": b"thumb.jpg", "label": 3, "label.json": [1, 2]},
        **{"mask": b"seg.png", "instances": b"instances.png", "index": 4, "image_": b"image", "mp4": b"mp4"},
    }
    assert samples.kinds == {"mask": "mask", "instances": "mask", "label.json": "json"}


@pytest.mark.parametrize(
    ("extensions", "image"),
    [("png jpg", "jpg"), ("a.jpg webp", "webp"), ("b.png a.png", "a.png"), ("seg.png pgm", "pgm")],
)
def test_which_image_is_the_image(tmp_path: Path, extensions: str, image: str) -> None:
    """The one with the fewest dots, then by the order of formats, then by name; never a mask."""
    samples = read_shards(tar(tmp_path / "a.tar", [(f"k.{e}", e) for e in extensions.split()]))
    assert samples.read(0)["image"] == image.encode()


def test_several_labels_are_a_list(tmp_path: Path) -> None:
    """What unpacking writes where a label is more than a whole number."""
    samples = read_shards(tar(tmp_path / "a.tar", [("k.jpg", JPEG), ("k.label.json", "[0.5, 2]")]))
    assert samples.read(0) == {"image": JPEG, "label": [0.5, 2]}


def test_formats_may_differ_from_sample_to_sample(tmp_path: Path) -> None:
    """An image is an image, JPEG or PNG."""
    samples = read_shards(tar(tmp_path / "a.tar", [("1.jpg", "1"), ("2.png", "2"), ("3.JPEG", "3")]))
    assert [value["image"] for _, value in all_of(samples)] == [b"1", b"2", b"3"]


def test_what_is_no_sample_is_left_alone(tmp_path: Path) -> None:
    """WebDataset's own members and folders in silence; names without a key or an extension with a note."""
    files = [("__meta__", b"1"), ("__x__/k.jpg", JPEG), ("__meta__.json", b"{}"), ("README", b"1"), ("a/.k.jpg", JPEG)]
    samples = read_shards(
        tar(tmp_path / "a.tar", [*files, ("folder", link(tarfile.DIRTYPE)), *labelled(["k"]), ("x.", b"")])
    )
    assert samples.names == ["k"]
    assert samples.notes == ["3 members are left out: their names have no key, or no extension"]


def test_pickles_are_left_out_with_a_note(tmp_path: Path) -> None:
    """They are not even read."""
    files = labelled(["k"]) + [(f"k.{e}", b"cos\nsystem\n") for e in ("pkl", "pyd", "x.pth", "npz")]
    samples = read_shards(tar(tmp_path / "a.tar", files))
    assert samples.read(0).keys() == {"image", "label"}
    (note,) = samples.notes
    assert note.startswith(".npz, .pkl, .pyd, .x.pth are left out")


def test_most_samples_say_which_fields_there_are(tmp_path: Path) -> None:
    """A sample that lacks one has a reason with shard, key and extension; what few have is left out, with a note."""
    files = [*labelled("abc"), ("d.jpg", JPEG), ("e.cls", b"1"), ("f.pkl", b"x"), *labelled("g"), ("g.txt", b"rare")]
    samples = read_shards(tar(tmp_path / "s.tar", files))
    assert problems(samples) == {
        "d": "s.tar, 'd': it has no label (.cls), which the others have",
        "e": "s.tar, 'e': it has no image (.jpg, .png, ...), which the others have",
        "f": "s.tar, 'f': nothing in it can be packed",
    }
    assert [name for name, _ in all_of(samples)] == ["a", "b", "c", "g"]
    assert samples.notes[0] == ".txt is left out: 1 of 4 samples have it"


def test_labels_may_be_names(tmp_path: Path) -> None:
    """Numbered in sorted order; one that is none is a problem of its sample."""
    words = ["dog", "cat\n", "7", "dog", "", "a\0b", "x" * 2000]
    files = [(f"{n}.{e}", c) for n, word in enumerate(words) for e, c in (("jpg", JPEG), ("cls", word))]
    samples = read_shards(tar(tmp_path / "a.tar", files))
    assert samples.classes == ["7", "cat", "dog"]
    assert [value["label"] for _, value in all_of(samples)] == [2, 1, 0, 2]
    assert list(problems(samples)) == ["4", "5", "6"]


def test_a_label_that_is_no_number_among_numbers(tmp_path: Path) -> None:
    """It is a reason when it is read."""
    samples = read_shards(tar(tmp_path / "a.tar", [*labelled("abc"), ("d.jpg", JPEG), ("d.cls", "1.5")]))
    assert samples.problems == {}
    with pytest.raises(SourceError, match=r"^a.tar, 'd': .cls is '1.5'; it has to be a whole number"):
        samples.read(3)


@pytest.mark.parametrize("name", ["s.classes.txt", "s-000007.classes.txt"])
def test_a_file_beside_the_shards_names_the_classes(tmp_path: Path, name: str) -> None:
    """Numbers have to be in it, and are never taken for names."""
    (tmp_path / name).write_bytes(b"1\n0\n10\n")
    samples = read_shards(tar(tmp_path / "s-000007.tar", labelled("abcd")))
    assert samples.classes == ["1", "0", "10"]
    assert [samples.read(number)["label"] for number in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError, match="is 3, and there are 3 classes"):
        samples.read(3)


def test_names_of_classes_are_looked_up_in_the_file(tmp_path: Path) -> None:
    """Its order counts, and a name that is not there is a reason."""
    (tmp_path / "s.classes.txt").write_text("dog\ncat\n")
    samples = read_shards(tar(tmp_path / "s.tar", [("1.cls", "cat"), ("2.cls", "cow"), ("3.cls", "dog")]))
    assert (samples.classes, samples.read(0), samples.read(2)) == (["dog", "cat"], {"label": 1}, {"label": 0})
    with pytest.raises(SourceError, match="is 'cow', which is no class"):
        samples.read(1)


def test_a_file_of_classes_that_makes_no_sense(tmp_path: Path) -> None:
    """Names twice would make labels ambiguous."""
    (tmp_path / "s.classes.txt").write_text("dog\ndog\n")
    with pytest.raises(SourceError, match=r"s.classes.txt has an empty line, or a name twice"):
        read_shards(tar(tmp_path / "s.tar", labelled("a")))


# ---- names


def test_keys_of_several_shards_get_their_names(tmp_path: Path) -> None:
    """Only where they are needed to tell samples apart."""
    first, second = (tar(tmp_path / f"s-{n}.tar", labelled(k)) for n, k in enumerate(("ab", "cd")))
    assert read_shards(tmp_path).names == ["a", "b", "c", "d"]
    tar(second, labelled("bc"))
    assert read_shards(tmp_path).names == ["s-0/a", "s-0/b", "s-1/b", "s-1/c"]
    first.unlink()
    assert read_shards(tmp_path).names == ["b", "c"]


def test_a_sample_whose_members_lie_apart(tmp_path: Path) -> None:
    """Both halves have a reason; half a sample is never packed."""
    files = [("a.jpg", JPEG), *labelled("b"), ("a.cls", b"1")]
    samples = read_shards(tar(tmp_path / "s.tar", files))
    assert list(samples.problems) == [0, 2]
    assert all("follow one another, as `tar --sort=name`" in reason for reason in samples.problems.values())
    assert len(set(samples.names)) == 3


def test_two_members_of_one_extension(tmp_path: Path) -> None:
    """In any case of letters."""
    samples = read_shards(tar(tmp_path / "s.tar", [*labelled("ab"), ("b.JPG", JPEG)]))
    assert problems(samples) == {"b": "s.tar, 'b': it has two members .jpg; give each another extension"}


@pytest.mark.parametrize("key", ["../../up", "/etc/passwd", "a\nb", "a\\b", "é" * 200, "-rf", " ", "C:"])
def test_hostile_names_are_only_names(tmp_path: Path, key: str) -> None:
    """Nothing is opened or written by them."""
    samples = read_shards(tar(tmp_path / "s.tar", labelled([key])))
    assert samples.names == [key]
    assert samples.read(0)["image"] == JPEG + key.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


# ---- what can't be read


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "symbolic"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes, words: str) -> None:
    """They are a problem of their sample."""
    samples = read_shards(tar(tmp_path / "s.tar", [*labelled("a"), ("b.jpg", link(kind)), ("b.cls", b"1")]))
    assert list(problems(samples)) == ["b"]
    assert words in problems(samples)["b"]


def test_a_shard_that_is_cut_short(tmp_path: Path) -> None:
    """The sample at its end has a reason, the shard too, and the others are there."""
    path = tar(tmp_path / "s.tar", labelled("abc"))
    path.write_bytes(path.read_bytes()[: 4 * 1024 + 512 + 3])
    samples = read_shards(path)
    assert [name for name, _ in all_of(samples)] == ["a", "b"]
    assert "'c': .jpg is cut short: 3 of 17 bytes are there" in problems(samples)["c"]
    assert "s.tar: it is cut short" in problems(samples)["s.tar"]


def test_damage_in_a_shard_leaves_the_others_alone(tmp_path: Path) -> None:
    """What comes before it, and other shards, are packed; the damaged ones are named, empty ones noted."""
    for number, keys in enumerate(("ab", "cd", "ef", "", "gh")):
        tar(tmp_path / f"{number}.tar", labelled(keys))
    spoiled = bytearray((tmp_path / "1.tar").read_bytes())
    spoiled[2048] ^= 1
    (tmp_path / "1.tar").write_bytes(spoiled)
    (tmp_path / "2.tar").write_bytes(b"<html>404</html>")
    samples = read_shards(tmp_path)
    assert [name for name, _ in all_of(samples)] == ["a", "b", "c", "g", "h"]
    assert list(problems(samples)) == ["1.tar", "2.tar"]
    assert "at byte 2048" in problems(samples)["1.tar"]
    assert "no tar file" in problems(samples)["2.tar"]
    assert samples.notes == ["1 of 5 shards are empty, the first is 3.tar"]


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(10240)])
def test_nothing_to_pack_is_an_error(tmp_path: Path, content: bytes) -> None:
    """It names the path."""
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"s\.tar: there is no sample in it that can be packed"):
        read_shards(tmp_path / "s.tar")


def test_empty_members(tmp_path: Path) -> None:
    """No image has 0 bytes; a text or bytes may."""
    samples = read_shards(tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.txt", b""), ("a.bin", b""), ("b.jpg", JPEG)]))
    with pytest.raises(SourceError, match=r"^s\.tar, 'a': \.jpg is empty"):
        samples.read(0)
    assert problems(samples).keys() == {"b"}


def test_compressed_shards_are_refused_with_the_command(tmp_path: Path) -> None:
    """Members can't be read where they lie, and photographs don't get smaller."""
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(tar(tmp_path / "s.tar", labelled("a")).read_bytes()))
    with pytest.raises(SourceError, match=r"s.tar.gz is compressed.*python -m gzip -d .*s.tar.gz"):
        read_shards(path)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """No sample is made of what is left, and none of a file that has gone."""
    path = tar(tmp_path / "s.tar", labelled("ab"))
    samples = read_shards(path)
    os.truncate(path, 2048 + 520)
    assert samples.read(0)["label"] == 0
    with pytest.raises(SourceError, match="'b': the shard has become shorter"):
        samples.read(1)
    path.unlink()
    with pytest.raises(SourceError, match="'b': it can't be read"):
        samples.read(1)


@posix_only
def test_a_member_of_gigabytes_is_a_problem(tmp_path: Path) -> None:
    """A file of holes is soon made; it is not read."""
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        for name, size in (("a.jpg", 18), ("b.jpg", 3 << 30)):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf() + JPEG.ljust(512, b"\0") * (size == 18))
        file.truncate(1536 + (3 << 30) + 1024)
    samples = read_shards(path)
    assert "'b': .jpg has 3221225472 bytes" in problems(samples)["b"]


def test_an_index_of_many_members_is_small(tmp_path: Path) -> None:
    """A million samples have to fit into some 300 MB."""
    path = tar(tmp_path / "s.tar", labelled(f"folder/{n:08}" for n in range(5000)))
    tracemalloc.start()
    try:
        samples = read_shards(path)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples.names) == 5000
    assert now < 5000 * 250
    assert most < 5000 * 400


def test_threads_read_at_once(tmp_path: Path) -> None:
    """Each gets its own samples."""
    samples = read_shards(tar(tmp_path / "s.tar", labelled(map(str, range(200)))))
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(n for n in range(200) if samples.read(n) != {"image": JPEG + b"%d" % n, "label": n})

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_content_changes_with_the_files(tmp_path: Path) -> None:
    """With the size and time of any shard, and with the names of the classes."""
    path = tar(tmp_path / "s.tar", labelled("ab"))
    found = [read_shards(path).content]
    os.utime(path, ns=(1, 1))
    found.append(read_shards(path).content)
    (tmp_path / "s.classes.txt").write_text("x\ny\n")
    found.append(read_shards(path).content)
    assert found[2] == read_shards(path).content
    assert len(set(found)) == 3


# ---- which files


def test_shards_of_patterns_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces in their order, * and folders sorted, each file once, names that look like patterns as they are."""
    monkeypatch.chdir(tmp_path)
    for name in ["a-08", "a-09", "a-10", "a-11", "b-9", "b-10", "{0..1}", "[x]"]:
        Path(f"{name}.tar").touch()
    Path("a-08.tar.gz").touch()
    assert find_shards("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert find_shards("b-{9..10}.tar") == ["b-9.tar", "b-10.tar"]
    assert find_shards("{b-9,a-1?,b-9}.tar") == ["b-9.tar", "a-10.tar", "a-11.tar"]
    assert find_shards("{a-1,b-1}{0..0}.tar") == ["a-10.tar", "b-10.tar"]
    assert find_shards("a*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert find_shards("{0..1}.tar") == ["{0..1}.tar"]
    assert find_shards("[x].tar") == ["[x].tar"]
    assert len(find_shards(tmp_path)) == 8


def test_a_folder_of_compressed_shards_is_found(tmp_path: Path) -> None:
    """So that it can be said what to do about it."""
    (tmp_path / "a.tar.gz").touch()
    assert [os.path.basename(path) for path in find_shards(tmp_path)] == ["a.tar.gz"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a-{0..2}.tar", r"a-2\.tar: there is no such file"),
        *[("x*.tar", r"x\*\.tar: there is no such file"), ("a\0.tar", "no such file")],
        *[("a-{0..999999999}.tar", "means 1000000000 files"), ("a-{1..0}.tar", "means 0 files")],
        ("{0..9999}{0..9999}.tar", "means 100000000 files"),
        (".", "holds no .tar file"),
    ],
)
def test_patterns_of_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, words: str
) -> None:
    """The first that is missing is named; no list of a billion names is made."""
    if pattern != ".":
        for number in range(2):
            (tmp_path / f"a-{number}.tar").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=words):
        find_shards(pattern)


def test_what_looks_like_shards(tmp_path: Path) -> None:
    """By name, by content whatever the name, and folders that hold nothing else to go into."""
    path = tar(tmp_path / "a.tar", labelled("a"))
    assert looks_like_tar(path)
    assert looks_like_tar(tmp_path)
    assert looks_like_tar(tmp_path / "s-{0..9}.tar")
    (tmp_path / "data").write_bytes(path.read_bytes())
    (tmp_path / "zipped").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "text").write_bytes(gzip.compress(b"a.jpg 0\n" * 1000))
    (tmp_path / "broken").write_bytes(b"\x1f\x8b garbage")
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    names = ["data", "zipped", "text", "broken", "list.txt", "missing"]
    assert [name for name in names if looks_like_tar(tmp_path / name)] == ["data", "zipped"]
    (tmp_path / "class").mkdir()
    assert not looks_like_tar(tmp_path)


@posix_only
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """It is no regular file."""
    os.mkfifo(tmp_path / "s.tar")
    assert looks_like_tar(tmp_path / "s.tar")
    with pytest.raises(SourceError, match="no regular file"):
        read_shards(tmp_path / "s.tar")


@posix_only
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_shard_without_permission(tmp_path: Path) -> None:
    """The reason is the system's."""
    tar(tmp_path / "s.tar", labelled("a")).chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        read_shards(tmp_path / "s.tar")
