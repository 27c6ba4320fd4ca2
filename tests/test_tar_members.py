"""`tar_members` finds what tarfile finds, wherever it lies, and says where a file stops making sense."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastload.errors import SourceError
from fastload.tar_members import BLOCK, Member, is_header, walk

END = bytes(2 * BLOCK)


def tar_of(files: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """What tarfile makes of these names and contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def header(
    name: bytes = b"a.jpg",
    size: bytes = b"00000000000\0",
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    sign: Callable[[bytes], int] = sum,
) -> bytes:
    """A header by hand, with its checksum."""
    start = name.ljust(100, b"\0") + bytes(24) + size + bytes(12)
    end = kind + bytes(100) + magic + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    assert len(start + end) == BLOCK - 8
    return start + b"%06o\0 " % sign(start + b" " * 8 + end) + end


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def extension(kind: bytes, content: bytes) -> bytes:
    return header(b"extension", b"%011o\0" % len(content), kind) + padded(content)


def pax(key: str, value: str) -> bytes:
    """A PAX record, whose length counts itself."""
    rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
    return str(length).encode() + rest


def found(data: bytes) -> list[Member]:
    return list(walk(io.BytesIO(data)))


def until_damage(data: bytes) -> tuple[list[Member], str]:
    """The members before the damage, and what is said of it."""
    members: list[Member] = []
    with pytest.raises(SourceError) as error:
        members.extend(walk(io.BytesIO(data)))
    return members, str(error.value)


names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=300)
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=5), formats)
def test_it_finds_what_tarfile_finds(files: list[tuple[str, bytes]], format: int) -> None:
    """Names of any length and alphabet in all three formats, and the very bytes of each content."""
    assume(not any(name.endswith("/") for name, _ in files))
    try:
        data = tar_of(files, format)
    except ValueError:  # too long for ustar
        assume(False)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        expected = [(member.name, member.offset_data, member.size, None) for member in tar.getmembers()]
    assert found(data) == expected
    assert [data[m.offset : m.offset + m.size] for m in found(data)] == [content for _, content in files]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_anywhere_is_said_and_never_leads_outside(data: st.DataObject) -> None:
    """Changed bytes and lost ends: members lie in the file, and the only error is SourceError."""
    files = [("folder/" * 16 + "a.jpg", b"x" * 700), ("b.cls", b"1"), ("é.jpg", b"")]
    whole = bytearray(tar_of(files, data.draw(formats)))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        whole[place] = byte
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(SourceError):
        for member in walk(io.BytesIO(cut)):
            assert 0 < member.offset <= member.offset + member.size <= len(cut)


def test_names_of_every_kind_of_header() -> None:
    """ustar's prefix, which GNU and the oldest headers don't have, GNU's long names, PAX's, PAX's for all."""
    long, other = "x" * 3000 + ".jpg", "é/" * 100 + "y.jpg"
    data = header(b"1.jpg", prefix=b"some/folder") + header(b"2.jpg", magic=b"ustar  \0", prefix=b"no")
    data += header(b"3.jpg", magic=bytes(8), prefix=b"no") + extension(b"L", long.encode() + b"\0") + header()
    data += extension(b"x", pax("path", other) + pax("mtime", "1.5")) + header() + header(b"n" * 100)
    data += extension(b"g", pax("path", "all.jpg") + pax("comment", "")) + header()
    data += extension(b"K", b"a link's target") + extension(b"x", pax("path", "own.jpg")) + header() + header() + END
    names = ["some/folder/1.jpg", "2.jpg", "3.jpg", long, other, "n" * 100, "all.jpg", "own.jpg", "all.jpg"]
    assert [member.name for member in found(data)] == names


def test_sizes_of_every_kind_of_header() -> None:
    """Octal with spaces or zeros, in binary, empty, and PAX's, which is the one that counts."""
    sizes = [b"00000000005\0", b"          5 ", b"5\0" + bytes(10), b"000000000005", b"\x80" + bytes(10) + b"\5"]
    data = b"".join(header(size=size) + padded(b"12345") for size in sizes)
    data += header(size=bytes(12)) + extension(b"x", pax("size", "600")) + header() + bytes(1024) + header(b"z") + END
    assert [member.size for member in found(data)] == [5, 5, 5, 5, 5, 0, 600, 0]
    assert found(data)[-1].name == "z"


def test_a_checksum_of_signed_bytes_is_one_too() -> None:
    """Some old programs added the bytes of names that are not ASCII as signed ones."""
    signed = header("é.jpg".encode(), sign=lambda block: sum(b - 256 * (b > 127) for b in block))
    assert [member.name for member in found(signed + END)] == ["é.jpg"]
    assert is_header(signed)
    assert not is_header(signed[:-1] + b"x")
    assert not is_header(signed[:-1])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *[(b"1", "hard link"), (b"2", "symbolic link"), (b"3", "device"), (b"4", "device"), (b"6", "pipe")],
        *[(b"S", "sparse"), (b"V", "unknown kind b'V'")],
    ],
)
def test_what_is_no_file_has_a_problem(kind: bytes, words: str) -> None:
    """Nothing is followed, made or guessed, and the next member is found."""
    (member, following) = found(header(kind=kind) + header(b"z.jpg") + END)
    assert words in str(member.problem)
    assert following == Member("z.jpg", 2 * BLOCK, 0, None)


def test_links_have_no_content_whatever_they_say() -> None:
    """As in tarfile: the size of a hard link is that of what it leads to."""
    assert [m.name for m in found(header(b"l", b"00000001000\0", b"1") + header(b"z") + END)] == ["l", "z"]


def test_sparse_files_are_stepped_over() -> None:
    """GNU's old maps in further blocks, and PAX's, whose name is elsewhere."""
    sparse = bytearray(header(b"s.npy", b"00000001000\0", b"S"))
    sparse[482] = 1
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + 8 * 0x20 + sum(sparse[156:]))
    data = bytes(sparse) + bytes(504) + b"\1" + bytes(7) + bytes(512) + bytes(512)
    data += extension(b"x", pax("GNU.sparse.major", "1") + pax("GNU.sparse.name", "t.npy")) + header(b"z.jpg")
    first, second, third = found(data + header(b"z.jpg") + END)
    assert "sparse" in str(first.problem)
    assert ("sparse" in str(second.problem), second.name) == (True, "t.npy")
    assert third.problem is None


def test_folders_are_no_members() -> None:
    """By their kind, and by the slash of the oldest headers."""
    assert found(header(b"f/", kind=b"5") + header(b"g/", kind=b"\0") + END) == []


def test_an_empty_archive_has_no_members() -> None:
    """Nothing but the mark of the end."""
    assert found(tar_of([])) == []


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 5000, b"\x89PNG\r\n\x1a\n" + bytes(600), b"PK\3\4" + b"1" * 600])
def test_garbage_is_no_tar_file(data: bytes) -> None:
    """It is refused at once."""
    members, why = until_damage(data)
    assert members == []
    assert "it is no tar file" in why


def test_damage_in_the_middle_names_its_place() -> None:
    """What comes before it is found."""
    members, why = until_damage(header(b"a.jpg") + b"x" * 512 + header(b"b.jpg") + END)
    assert [member.name for member in members] == ["a.jpg"]
    assert "at byte 512" in why
    assert "what comes after that is left out" in why


@pytest.mark.parametrize("size", [b"00000001000\0", b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_a_member_that_the_file_ends_in_is_cut_short(size: bytes) -> None:
    """By a little or by more than there are bytes in the world; what there is of it lies in the file."""
    (member,), why = until_damage(header(size=size) + b"abc")
    assert str(member.problem).startswith("is cut short: 3 of ")
    assert (member.offset, member.size) == (512, 3)
    assert "cut short in what begins at byte 512" in why


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000005\0", b"0o000000005\0", b"0_000000005\0", b"99999999999\0"])
def test_a_size_that_is_none(size: bytes) -> None:
    """Negative numbers, and what Python's int() would take."""
    assert "which is none" in until_damage(header(size=size) + END)[1]


@pytest.mark.parametrize("size", ["-1", "1e3", "", " 5", "\u0665"])
def test_a_pax_size_that_is_none(size: str) -> None:
    """It has to be digits."""
    assert "which is none" in until_damage(extension(b"x", pax("size", size)) + header() + END)[1]


@pytest.mark.parametrize(
    "content",
    [b"x", b"5 a=", b"0 a=\n", b"99 a=b\n", b"6 a=bc", b"5 ab\n", b"-5 a=b\n", b"6 a=b\nc", b"9" * 9 + b" a=\n"],
)
def test_a_pax_header_that_makes_no_sense(content: bytes) -> None:
    """Lengths that lead backwards, outside, nowhere, or to no end of a line."""
    assert "makes no sense" in until_damage(extension(b"x", content) + header() + END)[1]


@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_huge_headers_take_no_memory(tmp_path: Path, kind: bytes) -> None:
    """A file of holes may claim any size, and really have it."""
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(header(size=b"%011o\0" % (64 << 20), kind=kind))
        file.truncate(65 << 20)
    tracemalloc.start()
    try:
        with path.open("rb") as file, pytest.raises(SourceError, match="1048576 are allowed"):
            list(walk(file))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_name_beyond_all_measure_is_a_problem() -> None:
    """Its end is kept, where the extension is."""
    (member,) = found(extension(b"L", b"x" * 9000 + b".jpg\0") + header() + END)
    assert "a name of 9004 characters" in str(member.problem)
    assert (len(member.name), member.name[-4:]) == (4096, ".jpg")


def test_many_headers_without_a_member_end() -> None:
    """Chains of extended headers are read in a loop; tarfile calls itself for each of them."""
    assert [m.name for m in found(extension(b"x", pax("path", "p.jpg")) * 5000 + header() + END)] == ["p.jpg"]


def test_a_missing_end_and_joined_files_are_said() -> None:
    """Both are found, and what tarfile would not read of the second is not lost in silence."""
    assert "no end mark" in until_damage(header())[1]
    members, why = until_damage(tar_of([("a.jpg", b"1")]) + tar_of([("b.jpg", b"2")]))
    assert [member.name for member in members] == ["a.jpg"]
    assert "two tar files had been joined" in why
