"""Which Parquet files in a folder make a split, by the names that the Hugging Face Hub gives them.

    train-00000-of-00002.parquet      at the top, or in `data`
    cifar100/test-00000-of-00001-b42893e5b6f0b3ab.parquet
    default/train/0000.parquet

A split is what is before the number in a file's name; or else whatever of train, test and validation (or val, dev and
the like) is in its name or its folder's; or else it is train.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from .errors import SourceError

MAGIC = b"PAR1"

_SUFFIX = ".parquet"
_NO_IMAGES = "metadata.parquet"  # a list of the image files beside it
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
_SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}


def looks_like_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether this is a Parquet file, or a folder of them, by names and first bytes."""
    path = os.fspath(path)
    try:
        files = [os.path.join(path, name) for name in _names(path)] if os.path.isdir(path) else [path]
        return bool(files) and magic(files[0]) == MAGIC
    except OSError:
        return False


def find_split(path: str, part: str | None) -> tuple[str, list[str], list[str]]:
    """The split at `path`, its files in order, and what whoever packs them should know.

    path: a file, or a folder. part: the split to find; there has to be just one if it is None.

    Raises:
        SourceError: there are no such files, no such split, several of them, or files of several sets.
    """
    if not os.path.isdir(path):
        return _file_split(path, part), [path], []
    try:
        names = _names(path)
    except OSError as error:
        raise SourceError(f"{path} can't be listed: {error.strerror}; check its permissions") from error
    if not names:
        raise SourceError(f"{path} has no {_SUFFIX} files at its top, in data, or in a folder of their own below it")
    sets = {folder for name in names if (folder := name.rpartition("/")[0].split("/")[0]) and not _split_word(folder)}
    if len(sets) > 1:
        raise SourceError(f"{path} has several sets, {listed(sorted(sets))}; give the folder of one of them")
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name), []).append(name)
    split = _chosen(path, list(splits), part)
    return split, [os.path.join(path, *name.split("/")) for name in splits[split]], _missing(splits[split], path)


def _file_split(path: str, part: str | None) -> str:
    """The split of a single file."""
    if not os.path.isfile(path):
        raise SourceError(f"{path}: no such file or folder; give a Parquet file, or a folder of them")
    split = _split_of(os.path.basename(path))
    if part is not None:
        _chosen(path, [split], part)
    return split


def _chosen(path: str, splits: list[str], part: str | None) -> str:
    if part is None and len(splits) > 1:
        raise SourceError(f"{path} has the splits {listed(splits)}; choose one, as with --split {splits[0]}")
    if part is None or part in splits:
        return part or splits[0]
    if (split := _split_word(part)) in splits:  # val is validation
        return split
    raise SourceError(f"{path} has no split {part!r}; it has {listed(splits)}")


def _missing(names: list[str], path: str) -> list[str]:
    """A note if not all files of a split are here."""
    shards = [match for name in names if (match := _SHARD.fullmatch(os.path.splitext(name.split("/")[-1])[0]))]
    if not shards:
        return []
    count = int(shards[0][3])
    if len({shard[2] for shard in shards}) != len(names) or any(int(shard[3]) != count for shard in shards):
        raise SourceError(f"{path}: {listed(names)} are not the files of one set; remove those that don't belong to it")
    return [f"{len(names)} of the {count} files of the split are here"] if len(names) != count else []


def magic(path: str) -> bytes:
    """The first bytes of a file, which say what it is."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first 20."""
    return ", ".join(map(repr, names[:20])) + ", ..." * (len(names) > 20)


def _names(folder: str) -> list[str]:
    """The Parquet files at a folder's top, or else in `data` and in folders that hold nothing else; paths with /."""
    return _names_within(folder, 2, True)


def _names_within(folder: str, depth: int, mixed: bool) -> list[str]:
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.endswith(_SUFFIX) and entry.name != _NO_IMAGES:
                files.append(entry.name)
            elif not mixed:
                return []
    if files or not depth:
        return sorted(files)
    below = {name: _names_within(os.path.join(folder, name), depth - 1, name == "data") for name in sorted(folders)}
    return [f"{name}/{file}" for name, found in below.items() for file in found]


def _split_word(text: str) -> str | None:
    """`train`, `test` or `validation` if one of its words is in the text."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((split for split, known in _SPLITS.items() if not known.isdisjoint(words)), None)


def _split_of(name: str) -> str:
    """The split that a file belongs to, by its name and its folder's; `train` if they don't say."""
    *folders, file = os.path.splitext(name)[0].split("/")
    by_folder = next(filter(None, map(_split_word, reversed(folders))), None)
    shard = _SHARD.fullmatch(file)
    if shard and (_split_word(shard[1]) or by_folder is None):
        return shard[1]
    return _split_word(file) or by_folder or "train"
