"""DICOM files as samples: which images are in them, and their labels and other values from the headers.

Each frame of a file of several is a sample. `dicom_images` says what becomes of the pixels.

Of the header nothing is kept but what is asked for by name. Who the patient is stays in the file, unless it is burnt
into the pixels.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import logging
import math
import os
import re
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .dicom_images import MAGIC, Header, Options, Window, frame_of, opened
from .errors import SourceError
from .geometry import MAX_PIXELS
from .samples import Samples
from .workers import ordered_map

_TRIED = 20  # folders, and files in each, before it is no folder of DICOM files
_THREADS = 8
_TEXTS = frozenset(("AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"))
_INTEGERS = frozenset(("IS", "SL", "SS", "SV", "UL", "US", "UV"))
_DECIMALS = frozenset(("DS", "FD", "FL"))
_DESCRIBED = {"u1": "8 bits, unsigned", "u2": "16 bits, unsigned", "i2": "16 bits, signed"}


class _Tag(NamedTuple):
    """An element that was asked for. type: of its values, str, int or float."""

    number: int
    keyword: str
    type: type

    def __str__(self) -> str:
        return f"{self.keyword} ({self.number >> 16:04X},{self.number & 0xFFFF:04X})"


class _Facts(NamedTuple):
    """What is known of a file when it is listed: as many samples as it has frames, and what they share."""

    frames: int
    dtype: np.dtype[Any]
    inverted: bool
    label: Any
    header: dict[str, Any]


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether it is a DICOM file, or a folder where one of the first files is."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return _has_magic(path)
    folders = itertools.islice(os.walk(path, followlinks=True), _TRIED)
    visible = ((folder, sorted(n for n in names if not n.startswith("."))) for folder, _, names in folders)
    return any(_has_magic(os.path.join(folder, name)) for folder, names in visible for name in names[:_TRIED])


def _has_magic(path: str) -> bool:
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == MAGIC
    except OSError:
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings from being shown, in all threads: what matters comes as an error."""
    logger = logging.getLogger("pydicom")
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pydicom")
            yield
    finally:
        logger.propagate = propagate


def read_dicom(
    files: list[tuple[str, str]],
    *,
    label_from: str | None = None,
    header: Sequence[str] = (),
    window: Window = None,
    rescale: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Samples:
    """The images in DICOM files, as samples. All headers are read now, the pixels by `Samples.read`.

    files: the name and the path of each. A file of several frames gives samples `name#000`, `name#001` and so on.
    label_from: an element, by its keyword (`Modality`) or its tag (`0008,0060`). Texts are names of classes, in sorted
    order; integers are labels as they are; decimals are real labels. header: elements to keep, as fields of their
    keywords: numbers, texts, or lists of them; None where a file doesn't have it. Nothing else of a header is kept.
    rescale: apply the modality LUT, or slope and intercept (to CT: they make Hounsfield units), which must give whole
    numbers of 16 bits, signed. window: map a range of the rescaled values, (centre, width), to 0 to 255, by the
    function that the file names (LINEAR by default), rounded; "auto" takes the file's own first window, or its VOI LUT.
    max_pixels: larger images are left out.

    Without a window or `rescale`, images have the values that are in the file: uint8 for up to 8 bits, uint16 for up to
    16, int16 for signed ones. All must have one type, the first one's.

    Raises:
        SourceError: pydicom is missing, an element isn't in DICOM's dictionary or is neither text nor number, or the
            window makes no sense. What is wrong with single files is in `Samples.problems`.

    Example:
        >>> found = read_dicom([("1.dcm", "scans/1.dcm")], label_from="Modality", window=(40, 400))
        >>> found.read(0)["image"].dtype, found.classes
        (dtype('uint8'), ['CT'])
    """
    try:
        from pydicom.pixels import get_decoder  # noqa: F401 - it came with pydicom 3
    except ImportError as error:
        raise SourceError('reading DICOM takes pydicom 3: pip install "fastload[dicom]"') from error
    options = Options(_checked(window), rescale, max_pixels)
    label_tag = None if label_from is None else _tag(label_from)
    tags = [_tag(name) for name in header]

    def facts_of(file: tuple[str, str]) -> _Facts | str:
        try:
            return _facts(file[1], options, label_tag, tags)
        except OSError as error:
            return f"it can't be read: {error.strerror or error}"
        except SourceError as error:
            return str(error)

    with quiet():
        listed = ordered_map(facts_of, files, threads=_THREADS, ahead=16 * _THREADS, name="fastload-dicom")
        with contextlib.closing(listed):
            facts = _of_one_type(list(listed))
    known = [fact for fact in facts if isinstance(fact, _Facts)]
    texts = label_tag is not None and label_tag.type is str
    classes = sorted({fact.label for fact in known}) if texts else None
    numbers = {name: number for number, name in enumerate(classes or ())}
    names, places, problems = _samples(files, facts)

    def read(index: int) -> dict[str, Any]:
        place, frame = places[index]
        fact = facts[place]
        if isinstance(fact, str):
            raise SourceError(fact)
        sample: dict[str, Any] = {"image": frame_of(files[place][1], frame, options, fact.dtype), **fact.header}
        if label_tag is not None:
            sample["label"] = numbers.get(fact.label, fact.label)
        return sample

    mixed = {tag.keyword: "json" for tag in tags if not all(type(f.header[tag.keyword]) is tag.type for f in known)}
    content = _digest(files, (options, label_tag, tags))
    return Samples(names, read, problems, {"image": "image", **mixed}, classes, _notes(known), content)


def _checked(window: Window) -> Window:
    if window is None or window == "auto":
        return window
    if isinstance(window, str) or len(window) != 2 or not all(math.isfinite(value) for value in window):
        raise SourceError(f"the window is {window!r}; it may be auto, or two numbers, its centre and its width")
    if window[1] <= 0:
        raise SourceError(f"the window is {window[1]:g} wide; its width, the second number, must be more than 0")
    return window


def _tag(name: str) -> _Tag:
    """The element of a keyword, or of a tag as the standard writes it."""
    from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag, tag_for_keyword

    match = re.fullmatch(r"\(?([0-9a-fA-F]{4}), ?([0-9a-fA-F]{4})\)?", name)
    number = int(match[1] + match[2], 16) if match else tag_for_keyword(name)
    keyword = "" if number is None else keyword_for_tag(number)
    if number is None or not keyword:
        near = difflib.get_close_matches(name, keyword_dict)
        advice = f"did you mean {' or '.join(near)}?" if near else "give a keyword (Modality) or a tag (0008,0060)"
        raise SourceError(f"{name!r} is no element of DICOM's dictionary; {advice}")
    forms = set(dictionary_VR(number).split(" or "))
    for kind, representations in ((str, _TEXTS), (int, _INTEGERS), (float, _DECIMALS)):
        if forms <= representations:
            return _Tag(number, keyword, kind)
    raise SourceError(f"{keyword} is neither text nor a number ({', '.join(sorted(forms))}); name another element")


def _facts(path: str, options: Options, label_tag: _Tag | None, tags: list[_Tag]) -> _Facts:
    asked = [tag.number for tag in (label_tag, *tags) if tag is not None]
    with opened(path, options, asked) as (_, header):
        label = None if label_tag is None else _label(header, label_tag)
        values = {tag.keyword: _value(header, tag) for tag in tags}
        return _Facts(header.layout.frames, header.dtype(options), header.is_inverted(options), label, values)


def _label(header: Header, tag: _Tag) -> Any:
    value = _value(header, tag)
    if isinstance(value, list):
        raise SourceError(f"its {tag} has {len(value)} values; a label is one")
    if value is None:
        raise SourceError(f"it has no {tag}, which should be its label")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise SourceError(f"its {tag} is {reprlib.repr(value)}; labels have 64 bits")
    return value


def _value(header: Header, tag: _Tag) -> Any:
    """An element's value as text, number, or a list of them; None if there is none."""
    element = (header.meta if tag.number >> 16 == 2 else header.data).get(tag.number)
    value = None if element is None else element.value
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(one, tag) for one in value] or None
    return _plain(value, tag)


def _plain(value: Any, tag: _Tag) -> Any:
    if value is None or str(value) == "":
        return None
    if isinstance(value, bytes) or (tag.type is int and not isinstance(value, int)):
        raise SourceError(f"it is damaged: its {tag} is {reprlib.repr(value)}")
    plain = tag.type(value)
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _of_one_type(facts: list[_Facts | str]) -> list[_Facts | str]:
    """The same, with a reason in place of those whose images differ in type from the first."""
    first = next((fact.dtype for fact in facts if isinstance(fact, _Facts)), None)
    return [
        f"its values are {_DESCRIBED[fact.dtype.str[1:]]}, those of the first image {_DESCRIBED[first.str[1:]]}; pack "
        "them apart, or as 8 bits (--window)"
        if isinstance(fact, _Facts) and first is not None and fact.dtype != first
        else fact
        for fact in facts
    ]


def _samples(
    files: list[tuple[str, str]], facts: list[_Facts | str]
) -> tuple[list[str], list[tuple[int, int]], dict[int, str]]:
    """Names of all samples, the file and the frame of each, and the reasons of those that can't be had."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    problems: dict[int, str] = {}
    for place, ((name, _), fact) in enumerate(zip(files, facts, strict=True)):
        if isinstance(fact, str):
            problems[len(names)] = fact
        frames = 1 if isinstance(fact, str) else fact.frames
        width = max(3, len(str(frames - 1)))
        names += [name] if frames == 1 else [f"{name}#{frame:0{width}}" for frame in range(frames)]
        places += [(place, frame) for frame in range(frames)]
    return names, places, problems


def _notes(facts: list[_Facts]) -> list[str]:
    several = sum(fact.frames > 1 for fact in facts)
    inverted = sum(fact.inverted for fact in facts)
    notes = [f"{several} files have several frames; each frame is a sample"] if several else []
    return [*notes, f"{inverted} files are MONOCHROME1; their images are inverted"] if inverted else notes


def _digest(files: list[tuple[str, str]], asked: object) -> str:
    digest = hashlib.blake2b(repr(asked).encode(), digest_size=16)
    for name, path in files:
        try:
            status = os.stat(path)
            stamp = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            stamp = -1, -1
        digest.update(repr((name, *stamp)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
