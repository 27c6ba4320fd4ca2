"""WebDataset's shards: tar files in which the members of a sample follow one another under one key.

    cat/0001.jpg   cat/0001.cls     the sample `cat/0001`: the key ends at the first dot behind the folders, what
    cat/0002.jpg   cat/0002.cls     comes after it, in lower case, says what a member is

Members are found by their headers and read where they lie; nothing is unpacked to the disk, and nothing is unpickled.

    .jpg .jpeg .png .bmp ...                  `image`: the one with the fewest dots; others under their own extension
    .seg.png .mask.png .label.png .seg        `mask`; .instances.png is `instances`
    .cls                                      `label`: whole numbers, or names of classes, numbered in sorted order
    .label.json                               `label`: a list of numbers
    .cls2 .index .inx, .json, .npy            whole numbers, what JSON says, an array, under their own extension
    .txt .text .transcript .id                text
    .pkl .pyd .pth ...                        left out
    anything else                             bytes

All samples have the same fields: the set that most of them have. A sample that lacks one of them has its reason, as
has all else that can't be read; members that only some samples have are left out, and a note says so. `__meta__` and
the like belong to WebDataset. A file `NAME.classes.txt` beside `NAME.tar`, or `NAME-000000.tar`, names the classes.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import operator
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import member_values, tar_members
from .errors import SourceError
from .member_values import IMAGES, INSTANCES, LABELS, MASKS, last_part
from .samples import Samples

_PICKLED = frozenset(("pkl", "pickle", "pyd", "pth", "pt", "npz"))
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
_MOST_SHARDS = 1_000_000
_MOST_BYTES = 1 << 31  # of a member
_LABELS_TRIED = 100

_DESCRIBED = {
    "image": "image (.jpg, .png, ...)",
    "mask": "mask (.seg.png, .mask.png, ...)",
    "label": "label (.cls)",
    "instances": ".instances.png",
}

_APART = (
    "its key is there before or later too; the members of a sample have to follow one another, as `tar --sort=name` "
    "writes them"
)
_META = re.compile(r"__[^/]*__(/|$)")
_BRACES = re.compile(r"\{(?:([0-9]{1,9})\.\.([0-9]{1,9})|([^{}]*,[^{}]*))\}")
_NUMBER = re.compile(r"-[0-9]+$")


def looks_like_tar(path: str | os.PathLike[str]) -> bool:
    """Whether there are shards: a tar file by name or content, a folder of them and no folders, or a pattern."""
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
            return any(entry.name.endswith(".tar") for entry in entries) and not any(e.is_dir() for e in entries)
        if path.lower().endswith(_SUFFIXES):
            return True
        return os.path.isfile(path) and _begins_like_tar(path)
    except OSError:
        return False


def find_shards(path: str | os.PathLike[str]) -> list[str]:
    """The shards that a path means: one file, all of a folder, or a pattern such as `train-{000000..000146}.tar`.

    In patterns {a,b} and {0..9} stand for each of these, * and ? for what is there. Sorted, where nothing else is said.

    Raises:
        SourceError: there are none, or one is missing.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        tars = [name for name in names if name.lower().endswith(".tar")]
        found = [os.path.join(path, name) for name in tars or names if name.lower().endswith(_SUFFIXES)]
        if not found:
            raise SourceError(f"{path} holds no .tar file; give a tar file, a folder of them, or a pattern of names")
        return found
    if os.path.exists(path):
        return [path]
    return list(dict.fromkeys(itertools.chain.from_iterable(map(_matching, _expanded(path)))))


def read_shards(path: str | os.PathLike[str]) -> Samples:
    """The samples of all shards that `path` means, see `find_shards`, in the order of the shards and of their members.

    Names are the keys; where a key is in several shards, all names begin with those of their shards.

    Raises:
        SourceError: there are no shards, one is compressed or can't be read, or they hold no sample that can be packed.

    Example:
        >>> samples = read_shards("train-{000000..000146}.tar")
        >>> samples.names[0], samples.read(0)["label"]
    """
    path = os.fspath(path)
    shards = find_shards(path)
    index = _Index(shards, _labels_of(shards))
    for number in range(len(shards)):
        index.add_shard(number)
    index.name_samples()
    index.choose_fields()
    classes_file = _classes_file(shards[0])
    classes = _listed_classes(classes_file)
    words = index.labels_are_words()
    if words and classes is None:
        classes = index.label_words()
    if len(index.problems) == len(index.keys):
        why = next((f"; the first: {reason}" for reason in index.problems.values()), "")
        raise SourceError(f"{path}: there is no sample in it that can be packed{why}")
    stamps = [(name, *_stamp(name)) for name in (*shards, classes_file)]
    content = hashlib.blake2b(repr(stamps).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    read = index.reader(classes, words)
    return Samples(index.names, read, index.problems, _kinds(index.fields), classes, index.notes, content)


# ---- which files


def _begins_like_tar(path: str) -> bool:
    with open(path, "rb") as file:
        start = file.read(1 << 14)
    if start.startswith(_GZIP):
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, tar_members.BLOCK)
        except zlib.error:
            return False
    return tar_members.is_header(start[: tar_members.BLOCK])


def _expanded(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for, in its order."""
    names, count = [pattern], 1
    while match := _BRACES.search(names[0]):
        low, high, choice = match.groups()
        count *= choice.count(",") + 1 if choice else max(0, int(high) + 1 - int(low))
        if not 0 < count <= _MOST_SHARDS:
            raise SourceError(f"{pattern} means {count} files; it may mean 1 to {_MOST_SHARDS}, as {{000..146}} does")
        if choice:
            parts = choice.split(",")
        else:
            width = len(low) if low.startswith("0") else 0
            parts = [f"{number:0{width}}" for number in range(int(low), int(high) + 1)]
        names = [name.replace(match[0], part, 1) for name in names for part in parts]
    return names


def _matching(name: str) -> list[str]:
    if os.path.exists(name):
        return [name]
    found = sorted(glob.glob(name))
    if not found:
        raise SourceError(f"{name}: there is no such file; give a tar file, a folder of them, or a pattern of names")
    return found


def _labels_of(shards: list[str]) -> list[str]:
    """What messages and names call the shards: their paths without what is common to all."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
    return [os.path.relpath(os.path.abspath(shard), top).replace(os.sep, "/") for shard in shards]


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _classes_file(shard: str) -> str:
    """Where the names of classes are, if they are anywhere."""
    stem = os.path.splitext(shard)[0]
    names = [f"{name}.classes.txt" for name in (stem, _NUMBER.sub("", stem))]
    return next(filter(os.path.isfile, names), names[0])


def _listed_classes(path: str) -> list[str] | None:
    if not os.path.isfile(path):
        return None
    try:
        classes = Path(path).read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise SourceError(f"{path} can't be read: {error.strerror}; check its permissions") from error
    if not all(classes) or len(set(classes)) < len(classes):
        raise SourceError(f"{path} has an empty line, or a name twice; it has to hold each class once, a line each")
    return classes


# ---- which members


class _Index:
    """Where the members of each sample are: some numbers for each of them, and one string, the key.

    labels: what the shards are called. fields: those that are read. problems: why samples can't be packed.
    """

    def __init__(self, shards: list[str], labels: list[str]) -> None:
        self.shards, self.labels = shards, labels
        self.keys: list[str] = []
        self.names: list[str] = []
        self.fields: list[str] = []
        self.problems: dict[int, str] = {}
        self.notes: list[str] = []
        self._shard_of, self._first = array("q"), array("q")
        self._layouts: dict[tuple[str, ...], int] = {}  # the extensions of a sample's members
        self._extensions: list[tuple[str, ...]] = []  # by layout
        self._fields_of: list[dict[str, int]] = []  # by layout: fields, and their places in it
        self._layout_of = array("q")
        self._offsets, self._sizes = array("q"), array("q")
        self._without_key = 0

    def add_shard(self, number: int) -> None:
        """Append the samples of a shard; if it is damaged, then also the shard's own name, and the reason."""
        path, label = self.shards[number], self.labels[number]
        if not os.path.isfile(path):
            raise SourceError(f"{path} is no regular file; give a tar file, a folder of them, or a pattern of names")
        try:
            with open(path, "rb", buffering=0) as file:
                if file.read(2) == _GZIP:
                    raise SourceError(
                        f"{path} is compressed, so its members can't be read where they lie; decompress it first: "
                        f"`gunzip {path}`, or `python -m gzip -d {path}`"
                    )
                damage = self._add_members(number, file)
        except OSError as error:
            raise SourceError(f"{path} can't be read: {error.strerror or error}; check it, and its disk") from error
        if damage is not None:
            self._add(number, label, ())
            self.problems[len(self.keys) - 1] = f"{label}: {damage}"

    def _add_members(self, shard: int, file: Any) -> str | None:
        """Append the samples of a file, and say what is wrong with it."""
        damage: str | None = None

        def members() -> Iterator[tuple[str, str, tar_members.Member]]:
            nonlocal damage
            try:
                for member in tar_members.walk(file):
                    key, extension = _split(member.name)
                    if not extension and not _META.match(key):
                        self._without_key += 1
                    elif not _META.match(key):
                        yield key, extension, member
            except SourceError as error:
                damage = str(error)

        for key, found in itertools.groupby(members(), operator.itemgetter(0)):
            self._add(shard, key, ((extension, member) for _, extension, member in found))
        return damage

    def _add(self, shard: int, key: str, members: Iterable[tuple[str, tar_members.Member]]) -> None:
        """Append a sample."""
        number = len(self.keys)
        self.keys.append(key)
        self._shard_of.append(shard)
        self._first.append(len(self._offsets))
        by_extension: dict[str, tar_members.Member] = {}
        for extension, member in members:
            if extension in by_extension:
                self._refuse(number, f"it has two members .{extension}; give each another extension")
            if member.problem is not None:
                self._refuse(number, f".{extension} {member.problem}")
            if member.size > _MOST_BYTES:
                self._refuse(number, f".{extension} has {member.size} bytes; {_MOST_BYTES} can be read")
            by_extension[extension] = member
        layout = tuple(sorted(by_extension))
        self._layout_of.append(self._layouts.setdefault(layout, len(self._layouts)))
        self._offsets.extend(by_extension[extension].offset for extension in layout)
        self._sizes.extend(by_extension[extension].size for extension in layout)

    def _refuse(self, number: int, reason: str) -> None:
        self.problems.setdefault(number, f"{self._place(number)}: {reason}")

    def _place(self, number: int) -> str:
        return f"{self.labels[self._shard_of[number]]}, {self.keys[number]!r}"

    def name_samples(self) -> None:
        """Give each sample a name of its own, and those whose key is twice in a shard a problem."""
        shard_of: dict[str, int] = {}
        if all(shard_of.setdefault(k, shard) == shard for k, shard in zip(self.keys, self._shard_of, strict=True)):
            self.names = self.keys.copy()
        else:
            stems = [os.path.splitext(label)[0] for label in self.labels]
            self.names = [f"{stems[shard]}/{key}" for key, shard in zip(self.keys, self._shard_of, strict=True)]
        del shard_of
        first: dict[str, int] = {}
        for number, name in enumerate(self.names):
            other = first.setdefault(name, number)
            if other != number:
                for twice in (other, number):
                    self._refuse(twice, _APART)
                self.names[number] = f"{name}.{number}"  # no key has a dot there

    def choose_fields(self) -> None:
        """Take the fields that most samples have; a sample that lacks one of them has a problem."""
        self._extensions = list(self._layouts)
        self._fields_of = named = [_named(layout) for layout in self._extensions]
        counts: Counter[frozenset[str]] = Counter()
        for number, layout in enumerate(self._layout_of):
            if not named[layout]:
                self._refuse(number, "nothing in it can be packed")
            if number not in self.problems:
                counts[frozenset(named[layout])] += 1
        self.fields = sorted(max(counts, key=lambda fields: (counts[fields], len(fields), sorted(fields)), default=()))
        missing = [sorted(set(self.fields) - known.keys()) for known in named]
        for number, layout in enumerate(self._layout_of):
            if missing[layout]:
                lacks = " and no ".join(_DESCRIBED.get(field, f".{field}") for field in missing[layout])
                self._refuse(number, f"it has no {lacks}, which the others have")
        self._note_what_is_left_out()

    def _note_what_is_left_out(self) -> None:
        packed = [layout for number, layout in enumerate(self._layout_of) if number not in self.problems]
        counts = Counter(field for layout in packed for field in self._fields_of[layout])
        self.notes += [
            f"{_DESCRIBED.get(field, f'.{field}')} is left out: {count} of {len(packed)} samples have it"
            for field, count in sorted(counts.items())
            if field not in self.fields
        ]
        pickled = sorted({extension for layout in self._extensions for extension in layout if _is_pickled(extension)})
        if pickled:
            self.notes.append(
                f".{', .'.join(pickled)} are left out: such files may hold pickles, and those can run code when they "
                "are opened; write JSON or .npy instead"
            )
        if self._without_key:
            self.notes.append(f"{self._without_key} members are left out: their names have no key, or no extension")
        empty = sorted(set(range(len(self.shards))).difference(self._shard_of))
        if empty:
            self.notes.append(
                f"{len(empty)} of {len(self.shards)} shards are empty, the first is {self.labels[empty[0]]}"
            )

    def labels_are_words(self) -> bool:
        """Whether more than half of the first labels are no whole numbers."""
        if "label" not in self.fields:
            return False
        good = (number for number in range(len(self.keys)) if number not in self.problems)
        tried = [self._label_text(number) for number in itertools.islice(good, _LABELS_TRIED)]
        texts = [text for text in tried if text is not None]
        return 2 * sum(not member_values.is_integer(text) for text in texts) > len(texts)

    def label_words(self) -> list[str]:
        """All the names of classes that labels are."""
        texts = {self._label_text(number) for number in range(len(self.keys)) if number not in self.problems}
        return sorted(text for text in texts if text is not None)

    def _label_text(self, number: int) -> str | None:
        """What the .cls of a sample says. None if it has none, or can't be read, which is its problem then."""
        try:
            ((_, extension, data),) = self._contents(number, ["label"])
            return member_values.class_text(data) if extension == "cls" else None
        except SourceError as error:
            self.problems[number] = str(error)
            return None

    def reader(self, classes: list[str] | None, words: bool) -> Callable[[int], dict[str, Any]]:
        """What reads a sample. words: labels are names of classes."""
        numbers = {name: number for number, name in enumerate(classes or ())}

        def label(data: bytes) -> int:
            text = member_values.class_text(data)
            if words:
                if text not in numbers:
                    raise SourceError(f"is {text!r}, which is no class; add it to the list of classes")
                return numbers[text]
            number = member_values.integer(text)
            if classes is not None and not -1 <= number < len(classes):
                raise SourceError(f"is {number}, and there are {len(classes)} classes; correct it, or their list")
            return number

        def read(number: int) -> dict[str, Any]:
            values = {}
            for field, extension, data in self._contents(number, self.fields):
                try:
                    values[field] = label(data) if extension == "cls" else member_values.value(extension, data)
                except SourceError as error:
                    raise SourceError(f"{self._place(number)}: .{extension} {error}") from error
            return values

        return read

    def _contents(self, number: int, fields: Iterable[str]) -> list[tuple[str, str, bytes]]:
        """These fields of a sample: name, extension and content."""
        layout, found = self._layout_of[number], []
        try:
            with open(self.shards[self._shard_of[number]], "rb") as file:
                for field in fields:
                    place = self._fields_of[layout][field]
                    file.seek(self._offsets[self._first[number] + place])
                    size = self._sizes[self._first[number] + place]
                    found.append((field, self._extensions[layout][place], file.read(size)))
                    if len(found[-1][2]) < size:
                        raise SourceError(f"{self._place(number)}: the shard has become shorter; pack it again")
        except OSError as error:
            raise SourceError(f"{self._place(number)}: it can't be read: {error.strerror or error}") from error
        return found


def _split(name: str) -> tuple[str, str]:
    """The key and the extension of a member; without an extension it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _is_pickled(extension: str) -> bool:
    return last_part(extension) in _PICKLED


def _named(layout: tuple[str, ...]) -> dict[str, int]:
    """The fields of samples with these extensions, by name: where each is among them."""
    images = [e for e in layout if last_part(e) in IMAGES and e not in (*MASKS, INSTANCES)]
    images.sort(key=lambda extension: (extension.count("."), IMAGES.index(last_part(extension)), extension))
    masks = [extension for extension in MASKS if extension in layout]
    labels = [extension for extension in LABELS if extension in layout]
    names = {INSTANCES: "instances"}
    names |= {found[0]: name for name, found in (("image", images), ("mask", masks), ("label", labels)) if found}
    fields: dict[str, int] = {}
    for place, extension in sorted(enumerate(layout), key=lambda item: item[1] not in names):
        name = names.get(extension, extension)
        while name in fields:
            name += "_"
        if not _is_pickled(extension):
            fields[name] = place
    return fields


def _kinds(fields: Iterable[str]) -> dict[str, str]:
    """The kinds of masks, and of JSON's values, which may be anything."""
    kinds = {field: "mask" for field in fields if field in ("mask", "instances", *MASKS)}
    return kinds | {field: "json" for field in fields if last_part(field) == "json"}
