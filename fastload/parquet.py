"""Parquet files of images, as the Hugging Face Hub has them: what their columns become, and reading their rows.

A column of images is a struct of `bytes` and `path`, or binary; it becomes the field "image". What `datasets` writes
into the schema (class names, shapes, which structs are images) is used where the columns bear it out. A path is never
opened: an image is in the file, or the sample can't be packed.

Rows are read in blocks of a few MB, forward through their row group, and the last blocks are kept: reading in order
takes the memory of these and of a page of the file, however large the row groups are (pyarrow's pages have up to 1024
rows, so it may be some hundred MB). Going back in a row group begins it anew. What is damaged is the problem of the
samples from there to the end of its row group.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import arrow_values
from .arrow_values import BYTES, LISTS, NUMBERS, WORDS, is_any
from .errors import SourceError
from .hub_files import MAGIC, find_split, listed, magic
from .samples import Samples

_ENCRYPTED = b"PARE"
_PNG = b"\x89PNG\r\n\x1a\n"
_IMAGE_MAGIC = (b"\xff\xd8\xff", _PNG, b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")

_MOST_FIELDS = 64
_MOST_SAMPLES = 1 << 27
_MOST_SAMPLES_PER_BYTE = 1024  # images that are all the same take next to nothing
_LONGEST_NAME = 255
_TRIED = 100  # rows of a row group in which a column shows whether it is of images
_BLOCK_BYTES = 8 << 20
_BLOCK_ROWS = 64  # at most: sizes in a file may lie, and values in a dictionary are cheap to repeat
_KEPT_BYTES = 256 << 20
_AT_ONCE = 64 << 20  # bytes of a file whose columns are read whole
_SCANNED_ROWS = 256  # at once, of columns without images
_READERS = 2  # row groups that are under way, each with a page in memory

_IMAGE_NAME = re.compile(r"(?:image|img|picture|photo|pixel_values)s?|jpe?g|png|webp", re.IGNORECASE)
_LABEL_NAME = re.compile(r"(?:\w+_)?labels?|(?:label|class|category)(?:_?(?:id|idx|index))?|target", re.IGNORECASE)
_MASK_NAME = re.compile(r"(?:\w+_)?(?:annotation|mask|label|segmentation)s?(?:_\w+)?", re.IGNORECASE)

_DAMAGED = "download it again"


def read_parquet(
    path: str | os.PathLike[str],
    part: str | None = None,
    *,
    image_column: str | None = None,
    label_columns: Sequence[str] | None = None,
) -> Samples:
    """The images of one split, with their labels and whatever else is in their rows.

    path: a file, or a folder as the Hub has it. part: the split, if the folder has several. image_column: the column of
    the images; the one that is called so, or else the first one, by default. label_columns: the columns of labels, none
    for an empty sequence; by default a column of class labels, or one that is called label.

    The fields of a sample: "image"; "label", of several columns an array, -1 (of real labels NaN) where there is none,
    words numbered in sorted order; "mask", a second image, of one channel, that is called annotation, mask, label or
    segmentation; all other columns under their own names: numbers, strings and bytes as they are, lists of numbers of
    one fixed shape as arrays, all else as JSON has it (times as ISO strings, decimals as strings). A column that has
    nulls is of the kind "json", and keeps them.

    Raises:
        SourceError: there is no such file, split or column, no images, several splits to choose from, or a file is
            damaged, encrypted or unlike the others.
        ImportError: pyarrow is not installed.
    """
    path = os.fspath(path)
    labels = [label_columns] if isinstance(label_columns, str) else label_columns
    with _explained(path):
        split, files, notes = find_split(path, part)
        tables = [_Table.of(file) for file in files]
        tables = [table for table in tables if table.footer.num_rows] or tables
        _check_alike(tables)
        groups = [group for table in tables for group in table.groups()]
        starts = [0, *itertools.accumulate(group.rows for group in groups)]
        if not 0 < starts[-1] <= _MOST_SAMPLES:
            raise SourceError(f"{path} has {starts[-1]:,} rows; 1 to {_MOST_SAMPLES:,} can be packed at once")
        columns, classes, more = _columns(tables[0], groups, image_column, labels)
        names = _sample_names(split, groups, columns[0].names[0])
        content = _content(files, (labels, classes, [(column.field, *column.names) for column in columns]))
    blocks = _Blocks(groups, sorted({name for column in columns for name in column.names}))

    def read(index: int) -> dict[str, Any]:
        place = bisect_right(starts, index) - 1
        batch, row = blocks.row(place, index - starts[place])
        where = f"{groups[place].table.path}, row {groups[place].first + index - starts[place]}"
        return {column.field: column.value(batch, row, where) for column in columns}

    kinds = {column.field: column.kind for column in columns if column.kind}
    return Samples(names, read, {}, kinds, classes, [*notes, *more], content)


def _content(files: list[str], choice: tuple[Any, ...]) -> str:
    stamps = [(os.path.basename(file), (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files]
    return hashlib.blake2b(repr((stamps, choice)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Whatever goes wrong with a file is a SourceError that names it."""
    try:
        yield
    except (SourceError, ImportError):
        raise
    except Exception as error:  # pyarrow raises whatever a damaged file makes it stumble over
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{where} can't be read: {reason}; {_DAMAGED}") from error


# ---- tables


class _Table(NamedTuple):
    """One file. types: of its columns. features: what `datasets` says of them. footer: pyarrow's FileMetaData."""

    path: str
    types: dict[str, Any]
    features: Mapping[str, Any]
    footer: Any

    @classmethod
    def of(cls, path: str) -> _Table:
        with _explained(path):
            start = magic(path)
            if start == _ENCRYPTED:
                raise SourceError(f"{path} is encrypted; decrypt it first")
            if start != MAGIC:
                raise SourceError(f"{path} begins with {start!r}, a Parquet file with {MAGIC!r}; {_DAMAGED}")
            with _opened(path) as file:
                schema, footer = file.schema_arrow, file.metadata
        _check_names(path, schema.names)
        types = {name: arrow_values.storage(schema.field(place).type) for place, name in enumerate(schema.names)}
        return cls(path, types, _features((schema.metadata or {}).get(b"huggingface", b"")), footer)

    def groups(self) -> Iterator[_Group]:
        """Its row groups, whose numbers of rows the size of the file has vouched for."""
        first = 0
        size = os.stat(self.path).st_size
        for place in range(self.footer.num_row_groups):
            group = self.footer.row_group(place)
            rows, average = group.num_rows, max(1, group.total_byte_size) / max(1, group.num_rows)
            if not 0 <= rows <= _MOST_SAMPLES_PER_BYTE * size:
                raise SourceError(f"{self.path} says that {rows:,} rows are in its {size:,} bytes; {_DAMAGED}")
            if rows:
                yield _Group(self, place, first, rows, min(_BLOCK_ROWS, max(1, int(_BLOCK_BYTES / average))))
            first += rows
        if first != self.footer.num_rows:
            raise SourceError(f"{self.path} has {first} rows and says {self.footer.num_rows}; {_DAMAGED}")


class _Group(NamedTuple):
    """A row group. first: the number of its first row in the file. block: how many rows are read at once."""

    table: _Table
    place: int
    first: int
    rows: int
    block: int

    def batches(self, columns: list[str], block: int) -> Iterator[Any]:
        """Its rows, `block` at a time."""
        left = self.rows
        where = f"{self.table.path}, row group {self.place},"
        with _explained(where), _opened(self.table.path, self.table.footer) as file:
            for batch in file.iter_batches(block, row_groups=[self.place], columns=columns, use_threads=False):
                if len(batch) != min(block, left):
                    raise SourceError(f"{where} has {len(batch)} rows where {min(block, left)} should be; {_DAMAGED}")
                left -= len(batch)
                yield batch
        if left:
            raise SourceError(f"{where} ends {left} rows too early; {_DAMAGED}")


def _opened(path: str, footer: Any = None) -> Any:
    """A pyarrow.parquet.ParquetFile that is read page by page, not a column of a row group at once.

    Small ones are not: to read a page as a stream, pyarrow takes as much memory as the page's header asks for, up to
    2 GB, and only then sees that the file ends.
    """
    parquet = arrow_values.pyarrow().parquet
    buffer = 0 if os.path.getsize(path) <= _AT_ONCE else 1 << 20
    return parquet.ParquetFile(
        path, metadata=footer, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True
    )


def _features(metadata: bytes) -> Mapping[str, Any]:
    """The features of the columns that are described as `datasets` does it; none where anything is odd."""
    try:
        features = json.loads(metadata)["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _check_names(path: str, names: list[str]) -> None:
    if len(names) > _MOST_FIELDS:
        raise SourceError(f"{path} has {len(names)} columns; up to {_MOST_FIELDS} can be packed, drop the others")
    if len(set(names)) < len(names):
        raise SourceError(f"{path} has several columns of the same name, {listed(names)}; rename them")
    odd = next((name for name in names if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME), None)
    if odd is not None:
        raise SourceError(f"{path} has a column called {odd[:_LONGEST_NAME]!r}; give it a name that can be printed")


def _check_alike(tables: list[_Table]) -> None:
    first = tables[0]
    for table in tables[1:]:
        for name in [*first.types, *table.types]:
            types = [str(found.types.get(name, "nothing")) for found in (table, first)]
            if types[0] != types[1]:
                raise SourceError(
                    f"{table.path} has {types[0]} in column {name!r}, {first.path} has {types[1]}; pack each by itself"
                )
            if _class_names(table, name) != _class_names(first, name):
                raise SourceError(
                    f"{table.path} and {first.path} have different class names in column {name!r}; pack each by itself"
                )


def _class_names(table: _Table, column: str) -> list[str] | None:
    """The names of a column of class labels, each once; None if it is no such column."""
    feature = table.features.get(column, {})
    names = feature.get("names")
    if feature.get("_type") != "ClassLabel" or not is_any("integer", table.types[column]):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return names if len(set(names)) == len(names) else None


# ---- columns


class _Column(NamedTuple):
    """A field of the samples. names: the columns that it comes from. convert: their values (Arrow's scalars) to its."""

    field: str
    names: tuple[str, ...]
    convert: Callable[..., Any]
    kind: str | None = None

    def value(self, batch: Any, row: int, where: str) -> Any:
        """Of one row."""
        try:
            return self.convert(*(arrow_values.bare(batch.column(name)[row]) for name in self.names))
        except Exception as error:  # also of strings that are no UTF-8, dates that no calendar has
            raise SourceError(f"{where}, column {listed(self.names)}: {str(error)[:500]}") from error


def _columns(
    table: _Table, groups: list[_Group], image_column: str | None, label_columns: Sequence[str] | None
) -> tuple[list[_Column], list[str] | None, list[str]]:
    """The fields, the image first; the names of its labels; what whoever packs it should know."""
    for name in (image_column, *(label_columns or ())):
        if name is not None and name not in table.types:
            raise SourceError(f"{table.path} has no column {name!r}; it has {listed(list(table.types))}")
    images = _image_columns(table, groups, image_column)
    others = [name for name in table.types if name not in images]
    labels = _label_columns(table, others) if label_columns is None else list(label_columns)
    columns, classes, notes = [_Column("image", (images[0],), arrow_values.image)], None, []
    if labels:
        label, classes = _label(table, groups, labels)
        columns.append(label)
    mask = next((name for name in images[1:] if _MASK_NAME.fullmatch(name) and _may_be_mask(groups, name)), None)
    for name in images[1:]:
        field, kind = ("mask", "mask") if name == mask else (name, None)
        columns.append(_Column(field, (name,), arrow_values.image, kind))
    for name in others:
        column = None if name in labels else _other(table, groups, name)
        if column is not None:
            columns.append(column)
        elif name not in labels:
            notes.append(f"column {name!r} is left out: {table.types[name]} can't be packed")
    if len(table.types) > 1 and (image_column is None or label_columns is None):
        notes.append(
            f"images are taken from the column {images[0]!r}, labels from {listed(labels) or 'none'}; "
            "--image-column and --label-columns choose others"
        )
    return _each_once(columns), classes, notes


def _each_once(columns: list[_Column]) -> list[_Column]:
    """A column that is called as an earlier field is gets a number."""
    fields: dict[str, _Column] = {}
    for column in columns:
        numbered = (f"{column.field}_{number}" for number in itertools.count(2))
        field = next(name for name in itertools.chain([column.field], numbered) if name not in fields)
        fields[field] = column._replace(field=field)
    return list(fields.values())


def _image_columns(table: _Table, groups: list[_Group], chosen: str | None) -> list[str]:
    """All columns of images; at their head the one that is chosen, called so, or else the first."""
    found = [name for name in table.types if _is_image(table, name)]
    found = found or [name for name in table.types if _holds_images(table, groups, name)]
    if chosen is not None and not (is_any(BYTES, type := table.types[chosen]) or arrow_values.is_image_struct(type)):
        raise SourceError(
            f"{table.path} has {type} in column {chosen!r}; images are a struct of bytes and path, or binary"
        )
    if chosen is None and not found:
        columns = ", ".join(f"{name!r} ({type})" for name, type in table.types.items())
        raise SourceError(f"{table.path} has no column of images, only {columns[:500]}; --image-column can name one")
    first = chosen or next((name for name in found if _IMAGE_NAME.fullmatch(name)), found[0])
    return [first, *(name for name in found if name != first)]


def _is_image(table: _Table, column: str) -> bool:
    """Whether a struct has the bytes of images, not those of sounds."""
    described = table.features.get(column, {}).get("_type", "Image")
    return described == "Image" and arrow_values.is_image_struct(table.types[column])


def _holds_images(table: _Table, groups: list[_Group], column: str) -> bool:
    """Whether the first bytes in a column of them begin as an image does."""
    return is_any(BYTES, table.types[column]) and _beginning(groups, column).startswith(_IMAGE_MAGIC)


def _may_be_mask(groups: list[_Group], column: str) -> bool:
    """Whether a column's first image, if it is a PNG, is grey or has a palette."""
    beginning = _beginning(groups, column)
    return not beginning.startswith(_PNG) or beginning[25:26] in (b"", b"\0", b"\3")


def _beginning(groups: list[_Group], column: str) -> bytes:
    """The first bytes of the first image in a column."""
    for group in groups:
        with contextlib.suppress(SourceError):
            for batch in itertools.islice(group.batches([column], 1), _TRIED):
                with contextlib.suppress(SourceError):
                    return arrow_values.image(arrow_values.bare(batch.column(column)[0]))[:32]
    return b""


def _label_columns(table: _Table, names: list[str]) -> list[str]:
    """The column of labels, if any: called label; or else of class labels; or else whole numbers, called alike."""
    exactly = [name for name in names if name.lower() in ("label", "labels")]
    alike = [name for name in names if _LABEL_NAME.fullmatch(name)]
    of_classes = [name for name in names if _class_names(table, name) is not None]
    whole = [name for name in alike if is_any("integer", table.types[name])]
    best = next(iter([*exactly, *(name for name in alike if name in of_classes), *of_classes, *whole]), None)
    return [best] if best is not None and is_any(f"{NUMBERS} {WORDS}", table.types[best]) else []


def _label(table: _Table, groups: list[_Group], names: list[str]) -> tuple[_Column, list[str] | None]:
    """The field of labels, and the names of their classes."""
    for name in names:
        if name not in table.types or not is_any(NUMBERS if names[1:] else f"{NUMBERS} {WORDS}", table.types[name]):
            allowed = "several columns of labels hold numbers" if names[1:] else "labels are numbers or text"
            raise SourceError(f"{table.path} has {table.types[name]} in column {name!r}; {allowed}")
    real = any(is_any("floating", table.types[name]) for name in names)
    if is_any(WORDS, table.types[names[0]]):
        classes = _words(groups, names[0])
        values = {word: label for label, word in enumerate(classes)}
        return _Column("label", (names[0],), functools.partial(arrow_values.word_label, values=values)), classes
    each = [_number(real, _class_names(table, name)) for name in names]
    if names[1:]:
        convert = functools.partial(arrow_values.several_labels, each=each, real=real)
        return _Column("label", tuple(names), convert, "vector"), None
    return _Column("label", (names[0],), each[0]), _class_names(table, names[0])


def _number(real: bool, classes: list[str] | None) -> Callable[[Any], float]:
    if real:
        return arrow_values.real_label
    return functools.partial(arrow_values.number_label, classes=None if classes is None else len(classes))


def _words(groups: list[_Group], column: str) -> list[str]:
    """All the words in a column, sorted."""
    words: set[str] = set()
    for batch in _scanned(groups, column):
        words.update(word for word in arrow_values.texts(batch.column(column)) if word is not None)
    return sorted(words)


def _other(table: _Table, groups: list[_Group], name: str) -> _Column | None:
    """A column under its own name; None if its values can't be packed."""
    type = table.types[name]
    if is_any(BYTES, type):
        return _Column(name, (name,), arrow_values.binary)
    if not arrow_values.can_be_json(type):
        return None
    shape = arrow_values.shape_of(type, table.features.get(name))
    if (is_any(f"null struct map {LISTS}", type) and shape is None) or _has_nulls(groups, name):
        return _Column(name, (name,), arrow_values.plain, "json")
    if shape is not None:
        return _Column(name, (name,), functools.partial(arrow_values.array, shape=shape), "array")
    return _Column(name, (name,), arrow_values.plain)


def _has_nulls(groups: list[_Group], column: str) -> bool:
    """Whether there are any, by looking: asked for the statistics of a damaged file, pyarrow can crash."""
    return any(arrow_values.has_nulls(batch.column(column)) for batch in _scanned(groups, column))


def _scanned(groups: list[_Group], column: str) -> Iterator[Any]:
    """A column's rows, as far as they can be read: what is damaged shows when its samples are."""
    for group in groups:
        with contextlib.suppress(SourceError):
            yield from group.batches([column], _SCANNED_ROWS)


# ---- samples


def _sample_names(split: str, groups: list[_Group], column: str) -> list[str]:
    """The names of the image files if each comes once, else numbers."""
    type = groups[0].table.types[column]
    count = sum(group.rows for group in groups)
    names: dict[str, None] = {}
    if is_any("struct", type) and type.get_field_index("path") >= 0:
        for batch in _scanned(groups, f"{column}.path"):
            paths = arrow_values.texts(batch.column(column).field("path"))
            names.update(dict.fromkeys(_file_name(path or "") for path in paths))
    if len(names) == count and "" not in names:
        return list(names)
    return [f"{split}/{number:09d}" for number in range(count)]


def _file_name(path: str) -> str:
    """What a path ends with; nothing if no file can be called so."""
    name = re.split(r"[/\\]", path)[-1]
    return name if name not in (".", "..") and name.isprintable() and len(name) <= _LONGEST_NAME else ""


class _Blocks:
    """The rows of all row groups by their place, in the blocks in which they are read; threads share it."""

    def __init__(self, groups: list[_Group], columns: list[str]) -> None:
        self._groups, self._columns = groups, columns
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._bytes = 0
        self._readers: OrderedDict[int, tuple[int, Iterator[Any]]] = OrderedDict()
        self._damaged: dict[int, tuple[int, str]] = {}

    def row(self, place: int, row: int) -> tuple[Any, int]:
        """The block that has a row of a row group, and where in it.

        Raises:
            SourceError: the row group is damaged there, or before.
        """
        block, offset = divmod(row, self._groups[place].block)
        with self._lock:
            if (place, block) not in self._kept:
                self._read(place, block)
            self._kept.move_to_end((place, block))
            return self._kept[place, block], offset

    def _read(self, place: int, block: int) -> None:
        """Read on to this block, or from the row group's start if that is past."""
        damaged, reason = self._damaged.get(place, (block + 1, ""))
        if damaged <= block:
            raise SourceError(reason)
        following, reader = self._readers.pop(place, (block + 1, iter(())))
        if following > block:
            following, reader = 0, self._groups[place].batches(self._columns, self._groups[place].block)
        for number in range(following, block + 1):
            try:
                batch = next(reader)
            except SourceError as error:
                self._damaged[place] = number, str(error)
                raise
            self._keep((place, number), batch)
        if (block + 1) * self._groups[place].block < self._groups[place].rows:
            self._readers[place] = block + 1, reader
            if len(self._readers) > _READERS:
                self._readers.popitem(last=False)

    def _keep(self, key: tuple[int, int], batch: Any) -> None:
        replaced = self._kept.pop(key, None)
        self._kept[key] = batch
        self._bytes += batch.nbytes - (0 if replaced is None else replaced.nbytes)
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
