"""The members of a tar file that is not compressed, from its headers: POSIX's (ustar, PAX), GNU's and the oldest ones.

Headers are read one after another and contents are skipped, so this takes a few microseconds for each member, and no
more memory than one header. Nothing is sized by a number in a file before the file's own length has vouched for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .errors import SourceError

BLOCK = 512

_ZEROS = bytes(BLOCK)
_MOST_EXTENSION = 1 << 20  # bytes of a PAX header or a GNU long name
_LONGEST_NAME = 4096
_LOOKED_AT_BEHIND_END = 1 << 20
_OCTAL = re.compile(rb"[0-7]*")
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_REGULAR = (b"0", b"\0", b"7")
_FOLDER, _SPARSE = b"5", b"S"
_WITHOUT_CONTENT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    """A file in a tar file. offset, size: of its content. problem: why that can't be read, if so."""

    name: str
    offset: int
    size: int
    problem: str | None


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int


def walk(file: BinaryIO) -> Iterator[Member]:
    """All members but folders, in the order of the file.

    Raises:
        SourceError: the file is none, or is damaged or cut short, after the members that came before that.
    """
    end = file.seek(0, os.SEEK_END)
    place = 0
    shared: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    while block := _block(file, place, end):
        header = _parsed(block, place)
        content = place + BLOCK
        if header.kind in b"xXgL":
            extension = _extension(file, content, header, end)
            if header.kind == b"L":
                own[b"path"] = extension.split(b"\0")[0]
            elif header.kind == b"g":
                shared |= _pax_records(extension, place)
            else:
                own |= _pax_records(extension, place)
            size = header.size
        elif header.kind == b"K":  # the target of a link
            size = header.size
        else:
            if header.kind == _SPARSE:
                content = _end_of_sparse_map(file, block, content)
            known, own = shared | own, {}
            size = 0 if header.kind in (_FOLDER, *_WITHOUT_CONTENT) else _size(header, known, place)
            if not (header.kind == _FOLDER or (header.kind == b"\0" and header.name.endswith(b"/"))):
                yield _member(header, known, content, size, end)
        place = content + -(-size // BLOCK) * BLOCK
        if content + size > end:
            raise SourceError(f"it is cut short in what begins at byte {content}; copy or make it again")
    _check_end(file, place, end)


def is_header(block: bytes) -> bool:
    """Whether 512 bytes are a header, by their checksum."""
    given = _octal(block[148:156])
    if len(block) != BLOCK or given is None:
        return False
    counted = block[:148] + b" " * 8 + block[156:]
    total = sum(counted)
    return given == total or given == total - 256 * sum(byte > 127 for byte in counted)  # some add signed bytes


def _block(file: BinaryIO, place: int, end: int) -> bytes:
    """The header at a place of the file, none where the members end."""
    file.seek(place)
    block = file.read(BLOCK)
    if place >= end > 0 or block == _ZEROS:
        return b""
    if not is_header(block):
        where = "begins with" if place == 0 else f"has, at byte {place},"
        what = "it is no tar file" if place == 0 else "it is damaged, and what comes after that is left out"
        raise SourceError(f"it {where} {len(block)} bytes that are no header: {what}; copy or make it again")
    return block


def _parsed(block: bytes, place: int) -> _Header:
    """A header that has its checksum."""
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0")[0] + b"/" + name
    size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else _octal(block[124:136])
    if size is None:
        raise SourceError(f"the header at byte {place} has the size {block[124:136]!r}, which is none; make it again")
    return _Header(block[156:157], name, size)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0")[0].strip(b" ")
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


def _size(header: _Header, known: dict[bytes, bytes], place: int) -> int:
    size = known.get(b"size")
    if size is None:
        return header.size
    if not _DECIMAL.fullmatch(size):
        raise SourceError(f"the header at byte {place} has the size {size[:30]!r}, which is none; make it again")
    return int(size)


def _member(header: _Header, known: dict[bytes, bytes], content: int, size: int, end: int) -> Member:
    name = known.get(b"GNU.sparse.name", known.get(b"path", header.name)).decode("utf-8", "surrogateescape")
    problem = None
    if header.kind == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in known):
        problem = "is a sparse file, which can't be read; make the tar file again without --sparse"
    elif header.kind not in _REGULAR:
        problem = f"is {_WITHOUT_CONTENT.get(header.kind, f'of the unknown kind {header.kind!r}')}, not a file"
    elif content + size > end:
        problem = f"is cut short: {end - content} of {size} bytes are there"
    elif len(name) > _LONGEST_NAME:
        problem = f"has a name of {len(name)} characters; {_LONGEST_NAME} are allowed"
    return Member(name[-_LONGEST_NAME:], content, min(size, end - content), problem)


def _extension(file: BinaryIO, content: int, header: _Header, end: int) -> bytes:
    """What a header says that had no room in it."""
    if header.size > _MOST_EXTENSION:
        raise SourceError(
            f"the extended header before byte {content} has {header.size} bytes, {_MOST_EXTENSION} are allowed; what "
            "comes after that is left out"
        )
    file.seek(content)
    return file.read(min(header.size, end - content))


def _pax_records(data: bytes, place: int) -> dict[bytes, bytes]:
    found = {}
    start = 0
    while data[start : start + 1].strip(b"\0"):
        match = _PAX_RECORD.match(data, start)
        stop = start + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(data) or data[stop - 1] != ord("\n"):
            raise SourceError(f"the extended header at byte {place} makes no sense; what comes after it is left out")
        found[match[2]] = data[match.end() : stop - 1]
        start = stop
    return found


def _end_of_sparse_map(file: BinaryIO, block: bytes, content: int) -> int:
    """Where the content of an old GNU sparse file begins: its map may go on in further blocks."""
    more = block[482:483]
    while more.strip(b"\0"):
        file.seek(content)
        block = file.read(BLOCK)
        more = block[504:505]
        content += len(block)
    return content


def _check_end(file: BinaryIO, place: int, end: int) -> None:
    if place >= end:
        raise SourceError("it has no end mark, so it was cut short, perhaps between two samples; make it again")
    file.seek(place)
    if file.read(_LOOKED_AT_BEHIND_END).strip(b"\0"):
        raise SourceError(
            f"its members end at byte {place}, but more follows, as if two tar files had been joined, and is left out; "
            "give them as two files"
        )
