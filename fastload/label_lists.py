"""Label lists: which files, with which labels, read from a text file as people have them.

    images/1.jpg 0 # good          words between spaces: a name, then any number of labels, then a comment
    'my cat.jpg' 0 10              quotes of either kind; a name with spaces needs none if the file exists
    images/1.jpg,polar bear        cells between tabs, commas or semicolons, if most lines have them; CSV's quotes
    {"file": "1.jpg", "y": [0, 1]} JSON Lines, one object a line

Blank lines and lines that begin with # (unless a file is called so) are no rows. Files are looked up, never opened.

The first row is a header if columns are asked for by name. If not, then only if it can hardly be anything else: none
of its cells is a number or a file, and one is label, class, target or category, or consists of the words image, img,
file, photo, picture, pic, path, name, fname and id. With a header, and in JSON Lines, the names are in the first column
that names a file in one of the first 100 rows; the labels are in the column called label, class, target or category,
else in the only other column, else in all others if they hold numbers. A note says what was taken, and anything less
clear is an error. There an empty cell is a missing label; without a header it is none at all.

What labels are is decided by the lines whose files exist. They are numbers if at least half of them are: int64 if none
has a point or an exponent, else float64. Otherwise they are names of classes, numbered in sorted order; without a
header a note says if a line has several. Missing ones, and those that a line has fewer than the longest one that can
be packed, are -1 or NaN.

A line that can't be packed has its reason, and the others are packed. A line that says the same as an earlier one of
the same file, however it is named, is dropped with a note; where lines contradict each other, all of them are left out.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from .errors import SourceError

_MOST_CHARACTERS = 1 << 24  # of a line
_LONGEST_NAME = 4096
_HEAD = 100  # rows in which a column that names files is looked for
_MOST_PADDING = 64  # times the labels that there are, plus 2**24
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG")  # all others have NULs, and a list may begin with "BM"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json-lines", ".json")

_WORD = re.compile(r"""#\s.*|"([^"]*(?:""[^"]*)*)"(?=\s|$)|'([^']*)'(?=\s|$)|(\S+)""")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_SUFFIX = re.compile(r"\.\w*[A-Za-z]\w*$")
_JSON_OBJECT = re.compile(r'\s*\{\s*(?:["}]|$)|\s*\[\s*(?:\{|$)')
_IMAGE_COLUMN = re.compile(r"(?:(?:image|img|file|photo|picture|pic|path|f?name|id)s?[ _-]?)+", re.IGNORECASE)
_LABEL_COLUMN = re.compile(r"(?:label|target)s?|class(?:es)?|categor(?:y|ies)", re.IGNORECASE)

_JSON_LINES = 'each line has to be one object, as {"file": "a.jpg", "label": 1}'
_NAN = math.nan  # one object: tuples that hold it are equal

Labels = tuple[int, ...] | tuple[float, ...]
_IsFile = Callable[[str], bool]
_Lines = Iterator[tuple[int, str]]
_Records = Iterator[tuple[int, list[Any]]]
"""Line numbers, and cells: strings; in JSON also anything else that JSON has."""


class Entry(NamedTuple):
    """One line. problem: why it can't be packed, if so. labels: `label_count` of them, none if there is a problem."""

    line: int
    name: str
    labels: Labels
    problem: str | None


class LabelList(NamedTuple):
    """The entries in the order of their lines. classes: names of the labels 0, 1, ...; real: labels are float64."""

    entries: list[Entry]
    classes: list[str] | None
    label_count: int
    real: bool
    notes: list[str]


class _Row(NamedTuple):
    """labels: as they are written, "" for a missing one."""

    line: int
    name: str
    labels: tuple[str, ...]
    problem: str | None


class _Table(NamedTuple):
    """Rows that are still to be read. columns: None without a header, where all but the name's cell are labels."""

    records: _Records
    image: int
    labels: list[int]
    columns: list[str] | None
    notes: list[str]


def read_list(
    path: str,
    root: str,
    *,
    image_column: str | int | None = None,
    label_columns: Sequence[str] | None = None,
) -> LabelList:
    """Read the list at `path`; its names are relative to `root`.

    image_column: the column of the names, called as in the header or counted from 0. label_columns: those of the
    labels; an empty sequence for no labels.

    Raises:
        SourceError: it can't be read or is no list, a column isn't there, or no line of it can be packed.
    """
    columns = [label_columns] if isinstance(label_columns, str) else label_columns
    is_file = _finder(root)
    try:
        with open(path, "rb") as file:
            table = _table(file, path, is_file, image_column, columns)
            rows = [_row(number, cells, table, root, is_file) for number, cells in table.records]
    except OSError as error:
        raise SourceError(f"{path} can't be read: {error.strerror or error}; give a text file") from error
    kind = _kind([row for row in rows if row.problem is None])
    rows = [row if row.problem else row._replace(problem=_why_no_label(row, kind)) for row in rows]
    entries, label_count = _entries(rows, kind, path)
    notes = [*table.notes, *kind.notes]
    if table.columns is None and kind.classes is not None and label_count > 1:
        notes.append(_several_classes(rows))
    del rows
    entries, repetitions = _without_repetitions(entries, kind.classes, root)
    if entries and all(entry.problem for entry in entries):
        raise SourceError(
            f"{path}: none of its {len(entries)} lines can be packed; {entries[0].problem}. "
            "Names are relative to the list's folder, or to --root"
        )
    return LabelList(entries, kind.classes, label_count, kind.real, notes + repetitions)


def _finder(root: str) -> _IsFile:
    """Whether a name is a file's; what was asked just now is not looked up again."""
    return lru_cache(64)(lambda name: os.path.isfile(os.path.join(root, name)))


def _shown(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-60:]}"


# ---- lines


def _lines(text: io.TextIOWrapper, path: str) -> _Lines:
    """Every line with its number, without its end."""
    for number in itertools.count(1):
        line = text.readline(_MOST_CHARACTERS + 1)
        if not line:
            return
        start = line[:4].encode("utf-8", "surrogateescape") if number == 1 else b""
        if "\0" in line and start.startswith(_UTF_16):
            raise SourceError(f"{path} is a text file in UTF-16; save it as UTF-8")
        if "\0" in line or start.startswith(_IMAGES):
            raise SourceError(
                f"{path} is not a text file; a list has lines of `name label`, a folder is packed by its path "
                f"(line {number} has bytes that no text in UTF-8 has)"
            )
        if len(line) > _MOST_CHARACTERS:
            raise SourceError(
                f"{path}, line {number}: longer than {_MOST_CHARACTERS:,} characters; "
                "a list has one line of `name label` for each image"
            )
        yield number, line.removesuffix("\n")


def _rows_only(lines: _Lines, is_file: _IsFile) -> _Lines:
    """Without blank lines and comments."""
    for number, line in lines:
        if not line or line.isspace() or (line.lstrip().startswith("#") and not is_file(_first_word(line))):
            continue
        yield number, line


def _first_word(line: str) -> str:
    return re.split(r"[\t,;]|\s+", line.strip(), maxsplit=1)[0]


def _delimiter(lines: _Lines) -> str | None:
    """What separates the cells of most lines; None for spaces."""
    total = tabs = commas = semicolons = 0
    for _, line in lines:
        total += 1
        tabs += "\t" in line
        commas += "," in line
        semicolons += ";" in line
    counts = {"\t": tabs, ",": commas, ";": semicolons}
    return next((delimiter for delimiter, count in counts.items() if 2 * count > total), None)


# ---- cells


def _records(lines: _Lines, delimiter: str | None, path: str, is_file: _IsFile, *, across: bool) -> _Records:
    """The cells of each row. across: a cell in quotes may go on on the next line."""
    following = (line for _, line in lines) if across else ()
    for number, line in _rows_only(lines, is_file):
        if delimiter is None:
            yield number, _split_at_spaces(line.strip(), is_file)
        elif '"' not in line:
            yield number, line.split(delimiter)
        else:
            ended = (text + "\n" for text in itertools.chain((line,), following))
            reader = csv.reader(ended, delimiter=delimiter, skipinitialspace=True, strict=across)
            try:
                cells = next(reader)
            except csv.Error as error:
                raise SourceError(
                    f"{path}, line {number}: not a line of `name{delimiter}label`: {error}; check its quotes"
                ) from error
            yield number, cells


def _split_at_spaces(line: str, is_file: _IsFile) -> list[str]:
    """Words; what is in quotes is one, and so are the first ones if it takes them all to name a file that exists."""
    ends = (match.start() for match in re.finditer(r"\s+|$", line[:_LONGEST_NAME]))
    name = next((line[:end] for end in ends if is_file(line[:end])), "")
    words = (match for match in _WORD.finditer(line, len(name)) if match.lastindex)
    labels = [match[3] or match[2] or (match[1] or "").replace('""', '"') for match in words]
    return [name, *labels] if name else labels


def _objects(lines: _Lines, path: str, is_file: _IsFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects, their numbers as they are written; NaN and Infinity are floats."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=float)
    for number, line in _rows_only(lines, is_file):
        if line.lstrip().startswith("["):
            raise SourceError(f"{path}, line {number}: a JSON array; {_JSON_LINES}")
        try:
            value = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else _shown(str(error))
            raise SourceError(f"{path}, line {number}: no JSON: {reason}; {_JSON_LINES}") from error
        if not isinstance(value, dict):
            raise SourceError(f"{path}, line {number}: no JSON object; {_JSON_LINES}")
        yield number, value


# ---- columns


def _table(
    file: BinaryIO, path: str, is_file: _IsFile, image_column: str | int | None, label_columns: Sequence[str] | None
) -> _Table:
    text = io.TextIOWrapper(
        file if file.seekable() else io.BytesIO(file.read()), encoding="utf-8-sig", errors="surrogateescape"
    )
    lines = _rows_only(_lines(text, path), is_file)
    first = next(lines, None)
    if first is None:
        return _Table(iter(()), 0, [], None, [])
    records: _Records
    if path.lower().endswith(_JSON_SUFFIXES) or _JSON_OBJECT.match(first[1]):
        text.seek(0)
        columns, records = _json_table(_objects(_lines(text, path), path, is_file))
    else:
        delimiter = _delimiter(itertools.chain((first,), lines))
        _, cells = next(_records(iter((first,)), delimiter, path, is_file, across=False))
        header = isinstance(image_column, str) or label_columns is not None or _is_header(cells, is_file)
        text.seek(0)
        records = _records(_lines(text, path), delimiter, path, is_file, across=header)
        if not header:
            place = _place(image_column or 0, cells, path)
            return _Table(records, place, [], None, [])
        columns = [cell.strip() for cell in next(records)[1]]
    return _with_columns(columns, records, path, is_file, image_column, label_columns)


def _json_table(objects: Iterator[tuple[int, dict[str, Any]]]) -> tuple[list[str], _Records]:
    """The keys of the first objects, and the cells under them of all objects."""
    head = list(itertools.islice(objects, _HEAD))
    columns = list(dict.fromkeys(itertools.chain.from_iterable(value for _, value in head)))
    every = itertools.chain(head, objects)
    return columns, ((number, [value.get(column) for column in columns]) for number, value in every)


def _is_header(cells: list[Any], is_file: _IsFile) -> bool:
    words = [cell.strip() for cell in cells]
    if any(_NUMBER.fullmatch(word) or is_file(word) for word in words):
        return False
    return any(_IMAGE_COLUMN.fullmatch(word) or _LABEL_COLUMN.fullmatch(word) for word in words)


def _with_columns(
    columns: list[str],
    records: _Records,
    path: str,
    is_file: _IsFile,
    image_column: str | int | None,
    label_columns: Sequence[str] | None,
) -> _Table:
    head = list(itertools.islice(records, _HEAD))
    records = itertools.chain(head, records)
    if not head:
        return _Table(records, 0, [], columns, [])
    rows = [cells for _, cells in head]
    labels = None if label_columns is None else [_place(column, columns, path) for column in label_columns]
    if image_column is None:
        image = _column_of_files(rows, columns, labels or [], path, is_file)
    else:
        image = _place(image_column, columns, path)
    if labels is not None and image_column is not None:
        return _Table(records, image, labels, columns, [])
    if labels is None:
        labels = _columns_of_labels(rows, columns, image, path)
    note = (
        f"names are taken from the column {columns[image]!r}, labels from {_listed([columns[i] for i in labels])}; "
        "--image-column and --label-columns choose others"
    )
    return _Table(records, image, labels, columns, [note])


def _place(column: str | int, columns: Sequence[str], path: str) -> int:
    if isinstance(column, int) and 0 <= column < len(columns):
        return column
    if isinstance(column, int):
        raise SourceError(f"{path} has no column {column}; its first row has {len(columns)}, counted from 0")
    if column not in columns:
        raise SourceError(f"{path} has no column {column!r}; it has {_listed(columns)}")
    return columns.index(column)


def _listed(columns: Sequence[Any]) -> str:
    return _shown(", ".join(map(repr, columns)) or "none")


def _column_of_files(rows: list[list[Any]], columns: list[str], labels: list[int], path: str, is_file: _IsFile) -> int:
    for place in range(len(columns)):
        cells = (cells[place] for cells in rows if place < len(cells))
        if place not in labels and any(isinstance(cell, str) and is_file(_name(cell, is_file)) for cell in cells):
            return place
    raise SourceError(
        f"{path}: none of its columns {_listed(columns)} names a file in the first {len(rows)} rows; --image-column "
        "says where the names are, and they are relative to the list's folder, or to --root"
    )


def _columns_of_labels(rows: list[list[Any]], columns: list[str], image: int, path: str) -> list[int]:
    others = [place for place in range(len(columns)) if place != image]
    called = [place for place in others if _LABEL_COLUMN.fullmatch(columns[place])]
    if len(called) == 1:
        return called
    numbers = all(_all_numbers(cells[place]) for cells in rows for place in others if place < len(cells))
    if len(others) <= 1 or (numbers and not called):
        return others
    raise SourceError(
        f"{path}: which of its columns {_listed([columns[place] for place in others])} are the labels? "
        "Name them with --label-columns"
    )


def _all_numbers(cell: Any) -> bool:
    tokens = _tokens(cell)
    return tokens is not None and all(token == "" or _NUMBER.fullmatch(token) for token in tokens)


# ---- rows


def _row(number: int, cells: list[Any], table: _Table, root: str, is_file: _IsFile) -> _Row:
    image = table.image
    name = cells[image] if image < len(cells) else None
    if not isinstance(name, str) or not name.strip():
        return _Row(number, "", (), f"line {number}: no name in it")
    name = _name(name, is_file)
    others = [cell.strip() for place, cell in enumerate(cells) if place != image] if table.columns is None else []
    problem = None
    if not is_file(name):
        hint = _why_no_file(number, name, others, is_file)
        problem = f"line {number}: no such file {_shown(os.path.join(root, name))}{hint}"
    if table.columns is None:
        return _Row(number, name, tuple(filter(None, others)), problem)
    if len(cells) > len(table.columns) and any(cells[len(table.columns) :]):
        problem = f"line {number}: {len(cells)} cells, the header has {len(table.columns)}"
    labels: list[str] = []
    for place in table.labels:
        cell = cells[place] if place < len(cells) else None
        tokens = None if isinstance(cell, list) and len(table.labels) > 1 else _tokens(cell)
        if tokens is None:
            what = "number or text, or a list of them in the only column of labels"
            problem = f"line {number}: what is under {table.columns[place]!r} is no label; one is a {what}"
        labels += tokens or ()
    return _Row(number, name, tuple(labels), problem)


def _why_no_file(number: int, name: str, others: list[str], is_file: _IsFile) -> str:
    """What is likely to be wrong, if anything is; others: the other cells, without a header."""
    first = _first_word(name)
    if not _is_unicode(name):
        return "; save the list as UTF-8"
    if first != name and is_file(first):
        return f"; there is {_shown(first)}: use one separator throughout, and decimal points"
    if not others or _SUFFIX.search(name):
        return ""
    if any(map(is_file, others)):
        return "; name and label look swapped, --image-column says where the names are"
    if number == 1 and not any(map(_NUMBER.fullmatch, others)):
        return "; if this line is a header, name its column of files with --image-column"
    return ""


def _is_unicode(text: str) -> bool:
    """Whether it was UTF-8: other bytes have become surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _name(cell: str, is_file: _IsFile) -> str:
    return cell if is_file(cell) else cell.strip()


def _tokens(cell: Any) -> list[str] | None:
    """The labels in a cell as texts, "" for a missing one; None if it holds anything else."""
    if isinstance(cell, str):
        return [cell.strip()]
    if cell is None or isinstance(cell, bool):
        return ["" if cell is None else str(int(cell))]
    if not isinstance(cell, list) or any(isinstance(value, list) for value in cell):
        return None
    inner = [_tokens(value) for value in cell]
    return None if None in inner else [token for tokens in inner for token in tokens or ()]


# ---- labels


class _Kind(NamedTuple):
    """What labels are: the values of the texts, by which they are numbered or read."""

    values: dict[str, int] | dict[str, float]
    classes: list[str] | None
    real: bool
    notes: list[str]


def _kind(rows: list[_Row]) -> _Kind:
    counts = Counter(itertools.chain.from_iterable(row.labels for row in rows))
    del counts[""]
    numbers = [text for text in counts if _NUMBER.fullmatch(text)]
    if 2 * sum(counts[text] for text in numbers) < counts.total():
        classes = sorted(counts)
        return _Kind({**{name: label for label, name in enumerate(classes)}, "": -1}, classes, False, _odd(classes))
    fraction = next((text for text in numbers if not _INTEGER.fullmatch(text)), None)
    if fraction is None:
        return _Kind({**{text: int(text) for text in numbers if _fits(text)}, "": -1}, None, False, [])
    line = next(row.line for row in rows if fraction in row.labels)
    finite = {text: value for text in numbers if math.isfinite(value := float(text))}
    note = f"labels are real numbers, stored as float64: line {line} says {_shown(fraction)}"
    return _Kind({**finite, "": _NAN}, None, True, [note])


def _fits(integer: str) -> bool:
    return len(integer) < 100 and -(1 << 63) <= int(integer) < 1 << 63


def _odd(classes: list[str]) -> list[str]:
    """A note on the first class that is hardly meant as one."""
    odd = next((name for name in classes if _DECIMAL_COMMA.fullmatch(name) or not _is_unicode(name)), None)
    if odd is None:
        return []
    advice = "write decimals with a point" if _is_unicode(odd) else "save the list as UTF-8"
    return [f"a class is named {_shown(repr(odd))}; {advice}"]


def _why_no_label(row: _Row, kind: _Kind) -> str | None:
    bad = next((text for text in row.labels if text not in kind.values), None)
    if bad is None:
        return None
    why = f"is not a {'finite ' * kind.real}number, as the others are"
    if not kind.real and _INTEGER.fullmatch(bad):
        why = "doesn't fit into 64 bits"
    return f"line {row.line}: label {_shown(repr(bad))} {why}"


def _several_classes(rows: list[_Row]) -> str:
    """A note: what follows a name may have been meant as one class."""
    packed = [row for row in rows if row.problem is None]
    ends = (pick(packed, key=lambda row: len(row.labels)) for pick in (max, min))
    said = [f"line {row.line} has {_listed(row.labels)}" for row in dict.fromkeys(ends)]
    return f"lines have several classes: {', '.join(said)}; if they are one name, put it in quotes"


def _entries(rows: list[_Row], kind: _Kind, path: str) -> tuple[list[Entry], int]:
    packed = [row for row in rows if row.problem is None]
    label_count = max((len(row.labels) for row in packed), default=0)
    _check_padding(packed, label_count, path)

    @lru_cache(1 << 16)
    def labels_of(texts: tuple[str, ...]) -> Labels:
        return (*map(kind.values.__getitem__, texts), *[kind.values[""]] * (label_count - len(texts)))

    return [
        Entry(row.line, row.name.replace(os.sep, "/"), () if row.problem else labels_of(row.labels), row.problem)
        for row in rows
    ], label_count


def _check_padding(rows: list[_Row], label_count: int, path: str) -> None:
    if label_count * len(rows) > _MOST_PADDING * sum(len(row.labels) for row in rows) + (1 << 24):
        longest = max(rows, key=lambda row: len(row.labels))
        raise SourceError(
            f"{path}, line {longest.line}: {label_count:,} labels, far more than the other lines have, which would "
            "all be filled up to that number; is an end of line missing?"
        )


def _without_repetitions(entries: list[Entry], classes: list[str] | None, root: str) -> tuple[list[Entry], list[str]]:
    """The entries without those that say what an earlier one says; those that contradict each other have a problem."""
    start = os.path.join(os.path.abspath(root), "")
    places: dict[str, int] = {}
    several: dict[int, list[int]] = {}
    for place, entry in enumerate(entries):
        if entry.problem is None:
            first = places.setdefault(_plain(entry.name, start), place)
            if first != place:
                several.setdefault(first, [first]).append(place)
    repeated: dict[int, int] = {}
    for first, same in several.items():
        other = next((place for place in same if entries[place].labels != entries[first].labels), None)
        if other is None:
            repeated.update(dict.fromkeys(same[1:], first))
            continue
        said = [f"line {entry.line} says {_said(entry.labels, classes)}" for entry in (entries[first], entries[other])]
        for place in same:
            entries[place] = entries[place]._replace(labels=(), problem=", ".join(said))
    if not repeated:
        return entries, []
    lines = [f"line {entries[place].line} repeats line {entries[first].line}" for place, first in repeated.items()]
    note = (
        f"{len(lines)} line{'s repeat earlier ones and are' if len(lines) > 1 else ' repeats an earlier one and is'} "
        f"left out: {', '.join(lines[:5])}{', ...' * (len(lines) > 5)}"
    )
    return [entry for place, entry in enumerate(entries) if place not in repeated], [note]


def _plain(name: str, start: str) -> str:
    """One spelling of a name: below the folder `start` if it is there, without `./` and the like."""
    if "./" not in name and "//" not in name and not os.path.isabs(name):
        return name
    return os.path.normpath(os.path.join(start, name)).removeprefix(start).replace(os.sep, "/")


def _said(labels: Labels, classes: list[str] | None) -> str:
    words = [
        str(label) if classes is None else classes[int(label)] for label in labels if classes is None or label >= 0
    ]
    return _shown(" ".join(words) or "nothing")
