"""Every exception that fastload raises on purpose.

    FastloadError
    ├── StoreError            a store can't be opened or read
    │   ├── StoreFormatError  it is no store, is cut short, or is of a newer format
    │   │   └── ColumnError   a column of it is damaged, and with it the samples that it describes
    │   └── ChecksumError     bytes in it are not the bytes that were written (also a DecodeError's cause)
    ├── SourceError           what should be packed can't be: nothing there, a list that makes no sense
    ├── PackError             the store can't be written: it exists, no space, another pack is running
    ├── DecodeError           one image can't be decoded
    └── TooManyFailures       more samples failed than `max_failures` allows

A message says what was got, what is allowed and what to do next, and names the file, index or line. Wrong arguments
raise the built-in `ValueError` and `TypeError`, as they do in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class FastloadError(Exception):
    """The base of all the errors here."""


class StoreError(FastloadError):
    """A store can't be opened or read."""


class StoreFormatError(StoreError):
    """The file is no fastload store, is cut short, or is of a newer format version."""


class ColumnError(StoreFormatError):
    """A column of a store is cut short or altered. No single sample is at fault: `on_error` has no say in it."""


class ChecksumError(StoreError):
    """Bytes of a store differ from what was written."""


class SourceError(FastloadError):
    """The source of a pack is missing, empty or contradictory."""


class PackError(FastloadError):
    """A store can't be written."""


class DecodeError(FastloadError):
    """An image can't be decoded."""


class TooManyFailures(FastloadError):  # noqa: N818 - reads as the sentence that it is
    """More samples failed than `max_failures` allows."""


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Have the system's errors that name no file, a full disk's say, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
