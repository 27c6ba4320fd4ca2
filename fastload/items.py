"""What is packed: an `Item` is one file or one sample; a `Source` has all of them, in index order, and reads them.

Which sources there are is not known here: `sources.open_source` makes those of files, `torch_datasets` of datasets.
"""

from __future__ import annotations

import hashlib
import operator
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import SourceError
from .fields import Schema, Spec
from .geometry import MAX_PIXELS
from .label_lists import Labels
from .store import Store

_SPARE_BYTES, _BYTES_PER_PIXEL = 64 << 20, 4  # of a file: metadata, pixels


class Item(NamedTuple):
    """One file, or one sample of a store, to pack.

    name: relative path with forward slashes, kept in the record. path: where it is read. labels: integers, or all
    floats; none where the source has none. problem: why it can't be packed, if that is known already. sample: its place
    in a file of many; if that is a store, its record has the name. mask: the file of the mask that goes with it.
    """

    name: str
    path: str
    labels: Labels = ()
    problem: str | None = None
    sample: int | None = None
    mask: str | None = None


def read_files(item: Item, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """The bytes of an item's image, and of its mask if it has one.

    Raises:
        SourceError, OSError: a file is empty, larger than any image of so many pixels, no regular file, or can't be
            read.
    """
    contents = {"image": read_file(item.path, max_pixels)}
    if item.mask is not None:
        contents["mask"] = read_file(item.mask, max_pixels)
    return contents


def read_file(path: str, max_pixels: int) -> bytes:
    """The bytes of one file; what `read_files` refuses is refused."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL in the name, say
        raise SourceError(f"its name can't be one of a file: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("it is no regular file")
    if status.st_size == 0:
        raise SourceError("the file is empty (0 bytes)")
    if status.st_size > _SPARE_BYTES + _BYTES_PER_PIXEL * max_pixels:
        raise SourceError(
            f"the file has {status.st_size} bytes, more than {_BYTES_PER_PIXEL} for each of {max_pixels} pixels, which "
            "is the limit; --max-pixels raises it"
        )
    return Path(path).read_bytes()


class Source(NamedTuple):
    """Items in index order, and the names of their classes where labels have names.

    format: what the files came from, any of `sources.Format` but auto and store. store: the store that they are in now,
    if any. schema: what a sample consists of, where that is more than an image with a label or masks. masks: the masks
    that come with each image, and the value of what lies outside of them. read: gives what an item consists of, by
    name: the bytes of an image file, or its pixels (height, width, channels); the bytes or values of masks. real:
    labels are floats. encode: how the images are stored unless something else is asked for. content: a checksum of what
    is in memory already. outcomes: packs the items itself, see `torch_datasets`. first: the values of samples that it
    has looked at.
    """

    format: str
    items: Sequence[Item]
    classes: list[str] | None
    label_count: int
    notes: list[str]
    store: Store | None = None
    schema: Schema | None = None
    masks: Mapping[str, int] = {}
    read: Callable[[Item], dict[str, Any]] = read_files
    real: bool = False
    encode: Literal["keep", "raw"] = "keep"
    image_path: Callable[[Item], str] = operator.attrgetter("path")
    content: str = ""
    outcomes: Callable[..., Iterator[Any]] | None = None
    first: Sequence[Mapping[str, Any]] = ()

    @property
    def fields(self) -> Schema:
        """What a sample consists of."""
        if self.schema is not None:
            return self.schema
        masks = tuple(Spec(name, "mask", fill=fill) for name, fill in self.masks.items())
        label = Spec("label", "real" if self.real else "integer", column="label")
        specs = (Spec("image", "image"), *(masks or (label,)))
        names = [spec.name for spec in specs]
        return Schema({"tuple": [*names]} if len(names) < 3 else {"dict": [[name, name] for name in names]}, specs)

    def image_of(self, item: Item) -> Hashable:
        """What tells the image of an item from those of others: two items may be the same file."""
        return item.sample if item.sample is not None else os.path.realpath(self.image_path(item))

    def digest(self) -> str:
        """A hash of names, labels, sizes and modification times: what tells an unchanged source from another one."""
        known = repr((self.format, self.classes, self.content))
        digest = hashlib.blake2b(known.encode("utf-8", "surrogatepass"), digest_size=16)
        for item in self.items if self.outcomes is None else ():
            paths = {item.path: None, self.image_path(item): None, item.mask: None}
            files = [_stamp(path) for path in paths if path is not None]
            digest.update(repr((item.name, item.labels, *files)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns
