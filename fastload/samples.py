"""Samples as values: what a source gives that is no folder of images, such as tar shards, Parquet or DICOM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class EncodedImage(bytes):
    """An image as the bytes of its file, in any format that can be packed.

    A dataset that returns it instead of a decoded picture is packed without loss and without another encoding: a JPEG
    stays one, and is re-cut. It comes back as a picture.

    Example:
        >>> class Photos(torch.utils.data.Dataset):
        ...     def __getitem__(self, index):
        ...         return fastload.EncodedImage(self.paths[index].read_bytes()), self.labels[index]
    """

    __slots__ = ()


class Samples(NamedTuple):
    """The samples of a source.

    names: of each, in index order, each once. read: sample `i` as a dict of its fields, by name; threads call it.
    SourceError (or OSError) says why this sample can't be had. problems: of samples that can't be packed, known
    already. kinds: of fields whose values don't say it (see `fields.KINDS`). classes: names of labels. notes: remarks
    for the person who packs. content: what changes when the source does (names, sizes, times of its files).
    """

    names: list[str]
    read: Callable[[int], dict[str, Any]]
    problems: Mapping[int, str]
    kinds: Mapping[str, str]
    classes: list[str] | None
    notes: list[str]
    content: str
