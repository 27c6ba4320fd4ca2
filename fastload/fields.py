"""Fields: any sample as values of known kinds, stored in records and columns, and back with its structure and types.

A sample is a tree of tuples, lists and dicts whose leaves are fields. `learn` looks at a few samples and describes the
tree and each leaf (`Spec`) as a `Schema`, which the manifest holds; every other sample has to fit. Where samples differ
in structure, and for lists of numbers and texts, the field is one of JSON. Of subclasses nothing is kept: a named tuple
comes back as a tuple, since opening a stranger's store must not look for classes. Pillow's pictures are kept as grey or
RGB.

    kind        is                                          lies
    image       a picture; the first one is transformed     record, see `record`; a column where all are raw
    mask        whole numbers (height, width)               record, as blocks
    boxes       float32 (n, 4), x, y, width, height;        record, as an array
                boxes:XYXY and boxes:CXCYWH come in these
    integer     int, bool, or a scalar of NumPy or torch    column
    real        float, or a scalar of NumPy or torch        column
    vector      an array or tensor of one shape             column; only on request
    array       an array or tensor of any shape and dtype   record, see `arrays`
    text, json  str; whatever JSON can say                  record, UTF-8
    bytes       bytes                                       record
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from . import arrays, record
from .boxes import Format as BoxFormat
from .errors import DecodeError, SourceError
from .samples import EncodedImage

Kind = Literal["image", "mask", "boxes", "integer", "real", "vector", "array", "text", "bytes", "json"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Node = str | dict[str, Any]
"""A field's name, or {"tuple": nodes}, {"list": nodes}, {"dict": [[key, node], ...]}: as the manifest has it."""

TYPES = ("", "int", "bool", "float", "str", "bytes", "json", "scalar", "numpy", "tensor", "pil", "file")

_DEEPEST, _DEEPEST_JSON = 32, 200
_MOST_FIELDS = 512
_MASK_NAME = 40  # the names of its columns are longer
_RECORD_FIELDS = record.MAX_FIELDS - 1  # one is the sample's name
_PICTURE_MODES = ("L", "RGB", "RGBA", "RGBX", "LA", "PA", "La", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_MASK_MODES = ("P", "1")


class Spec(NamedTuple):
    """One field.

    name: its keys on the way to it, joined by dots; the transformed image is always "image". kind: see above. type: of
    `TYPES`, what it comes back as; scalar is NumPy's, file an `EncodedImage`. dtype, shape: of what lies in a column;
    of arrays what the first samples have in common, 0 for sides that differ. column: where it lies, None for a record.
    fill: of a mask, the value of what lies outside. format: of boxes, as torchvision calls it. channels: of images.
    """

    name: str
    kind: Kind
    type: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    column: str | None = None
    fill: int = 0
    format: str = ""
    channels: int = 3

    def as_entry(self) -> dict[str, Any]:
        """This field in a manifest."""
        known = {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name)}
        return known | {"in": "record" if self.column is None else "column"}

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> Spec:
        """A field of a checked manifest."""
        known = {name: entry[name] for name in cls._fields if name in entry}
        return cls(**{**known, "shape": tuple(known.get("shape", ()))})


class Schema(NamedTuple):
    """The structure of samples, and their fields in its order."""

    sample: Node
    specs: tuple[Spec, ...]

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Schema:
        """The schema of a store; what it doesn't say is that of images and labels."""
        specs = {entry["name"]: Spec.of_entry(entry) for entry in manifest["fields"] if entry["name"] != "name"}
        specs.setdefault("label", Spec("label", "integer", column="label"))
        sample = manifest.get("sample", {"tuple": ["image", "label"]})
        return cls(sample, tuple(specs[name] for name in leaves(sample)))

    @property
    def image(self) -> Spec | None:
        """The field whose pictures are transformed."""
        return next((spec for spec in self.specs if spec.name == "image" and spec.kind == "image"), None)

    @property
    def others(self) -> list[Spec]:
        """The fields besides this image, masks, and labels that are labels of files."""
        special = (self.image, *self.of_kind("mask"))
        return [spec for spec in self.specs if spec not in special and (spec.column != "label" or spec.type)]

    @property
    def boxes_and_labels(self) -> tuple[str | None, str | None]:
        """The names of the boxes that are drawn, and of the labels beside them: "a.labels" of "a.boxes"."""
        boxes = next((spec.name for spec in self.of_kind("boxes")), None)
        labels = boxes and boxes.removesuffix("boxes") + "labels"
        return boxes, labels if any(spec.name == labels for spec in self.specs) else None

    def of_kind(self, *kinds: Kind) -> list[Spec]:
        """The fields of some kinds."""
        return [spec for spec in self.specs if spec.kind in kinds]

    def flatten(self, sample: Any) -> dict[str, Any]:
        """The values of a sample by their fields' names; SourceError where its structure is another one."""
        values: dict[str, Any] = {}
        _flatten(self.sample, sample, "", values)
        return values


def leaves(node: Node) -> Iterator[str]:
    """The names of a tree's fields, in order."""
    if isinstance(node, str):
        yield node
        return
    ((form, children),) = node.items()
    for child in children:
        yield from leaves(child[1] if form == "dict" else child)


def build(node: Node, values: Mapping[str, Any], *, tuples: Callable[[list[Any]], Any] = tuple) -> Any:
    """The tree with these values as its leaves. tuples: what makes a tuple of a list."""
    if isinstance(node, str):
        return values[node]
    ((form, children),) = node.items()
    if form == "dict":
        return {key: build(child, values, tuples=tuples) for key, child in children}
    built = [build(child, values, tuples=tuples) for child in children]
    return tuples(built) if form == "tuple" else built


def is_tree(node: object, names: set[str], depth: int = 0) -> bool:
    """Whether this is a sane tree over fields of these names."""
    if isinstance(node, str):
        return node in names
    if not isinstance(node, dict) or len(node) != 1 or depth > _DEEPEST:
        return False
    ((form, children),) = node.items()
    if form not in ("tuple", "list", "dict") or not isinstance(children, list) or len(children) > _MOST_FIELDS:
        return False
    if form == "dict":
        if not all(isinstance(c, list) and len(c) == 2 and isinstance(c[0], str | int) for c in children):
            return False
        children = [child for _, child in children]
    return all(is_tree(child, names, depth + 1) for child in children)


def learn(samples: Sequence[Any], kinds: Mapping[str, str] = {}) -> Schema:
    """The schema of samples, from some of them. kinds: of fields whose values don't tell theirs, by name.

    Raises:
        SourceError: a value is of a type that no field has; samples differ, and JSON can't say how.
    """
    wrong = {name: kind for name, kind in kinds.items() if not is_kind(kind)}
    if wrong:
        raise SourceError(f"{wrong} names kinds that there are not; a field's kind may be {', '.join(KINDS)}")
    learner = _Learner({str(name): kind for name, kind in kinds.items()})
    node = learner.node(list(samples), "")
    unknown = learner.kinds.keys() - learner.met
    if unknown:
        there = ", ".join(sorted(learner.met - {""})) or "none"
        raise SourceError(f"there is no field {', '.join(map(str, unknown))}; there are {there}")
    if not learner.found:
        raise SourceError(f"a sample has no fields, it is {samples[0]!r}; let the dataset give at least one value")
    specs, renamed = _named(_with_image(learner.found, learner.kinds))
    if len(specs) > _MOST_FIELDS or sum(spec.column is None for spec in specs) > _RECORD_FIELDS:
        raise SourceError(
            f"a sample has {len(specs)} fields, {sum(spec.column is None for spec in specs)} of them no numbers; "
            f"up to {_RECORD_FIELDS} of these can be stored: take whole dicts as one field, kinds={{NAME: 'json'}}"
        )
    return Schema(_renamed(node, renamed), tuple(specs))


def is_kind(kind: str) -> bool:
    """Whether there is such a kind; boxes may have a format: `boxes:XYXY`."""
    name, colon, format = str(kind).partition(":")
    return name in KINDS and (not colon or (name == "boxes" and format in get_args(BoxFormat)))


class _Learner:
    """Walks through several samples at once.

    found: the leaves, each with a name of its own: {"a.b": 1, "a": {"b": 2}} has two of one path. met: all paths.
    """

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds, self.found, self.met, self._taken = kinds, list[Spec](), set[str](), set[str]()

    def node(self, values: list[Any], path: str, depth: int = 0) -> Node:
        self.met.add(path)
        first = values[0]
        if depth > _DEEPEST:
            raise SourceError(f"{_called(path)} is nested more than {_DEEPEST} deep; a field of kind json may be")
        if path not in self.kinds:
            form = _form(values)
            if form == "dict":
                return {"dict": [[k, self.node([v[k] for v in values], _join(path, k), depth + 1)] for k in first]}
            if form is not None:
                children = range(len(first))
                return {form: [self.node([v[i] for v in values], _join(path, i), depth + 1) for i in children]}
        name = _free(path, self._taken)
        self.found.append(self._leaf(values, path)._replace(name=name))
        return name

    def _leaf(self, values: list[Any], path: str) -> Spec:
        kind = self.kinds.get(path)
        if kind is not None:
            return _declared(values, path, kind)
        found = {_recognised(value, path) for value in values}
        types = {spec.type for spec in found}
        if len(found) > 1 and {spec.kind for spec in found} <= {"image", "array"} and types <= {"tensor", "numpy"}:
            found = {_plain_array(value, path) for value in values}  # of one and of three planes: it may be anything
        if {spec.kind for spec in found} == {"image"}:  # Pillow's grey ones among others have three channels
            found = {spec._replace(channels=max(spec.channels for spec in found)) for spec in found}
        if {spec.kind for spec in found} == {"array"}:
            found = _alike(found)
        if len(found) == 1:
            return found.pop()
        if all(map(is_json, values)):
            return Spec(path, "json", "json")
        names = sorted({type(value).__name__ for value in values})
        raise SourceError(
            f"{_called(path)} differs among samples ({' and '.join(names)}, or their keys or lengths), which only what "
            "JSON can say may; let the dataset give one type"
        )


def _alike(arrays: set[Spec]) -> set[Spec]:
    """Arrays of several dtypes or shapes as one field: 0 are the sides that differ."""
    first = next(iter(arrays))
    if any((spec.dtype, len(spec.shape)) != (first.dtype, len(first.shape)) for spec in arrays):
        return {spec._replace(dtype="", shape=()) for spec in arrays}
    sides = zip(*(spec.shape for spec in arrays), strict=True)
    shape = tuple(lengths[0] if len({*lengths}) == 1 else 0 for lengths in sides)
    return {spec._replace(shape=shape) for spec in arrays}


def _form(values: list[Any]) -> str | None:
    """What several values are, if all of them are containers of one structure and not JSON for being a list."""
    first = values[0]
    if isinstance(first, dict):
        alike = all(isinstance(v, dict) and v.keys() == first.keys() for v in values)
        return "dict" if alike and all(type(key) in (str, int) for key in first) else None
    form = next((name for name, of in (("tuple", tuple), ("list", list)) if isinstance(first, of)), None)
    if form is None or not all(isinstance(v, type(first)) and len(v) == len(first) for v in values):
        return None
    return None if form == "list" and all(map(is_json, values)) else form


def is_json(value: Any, depth: int = 0) -> bool:
    """Whether JSON gives it back as it is: values of its own types, nested up to 200 deep."""
    if depth > _DEEPEST_JSON:
        return False
    if type(value) is dict:
        return all(type(key) is str and is_json(item, depth + 1) for key, item in value.items())
    if type(value) is list:
        return all(is_json(item, depth + 1) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _recognised(value: Any, path: str) -> Spec:
    """The field that a value makes by its type."""
    if isinstance(value, Image.Image):
        kind: Kind = "mask" if value.mode in _MASK_MODES else "image" if value.mode in _PICTURE_MODES else "array"
        return Spec(path, kind, "numpy" if kind == "array" else "pil", channels=1 if value.mode == "L" else 3)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return _array_spec(value, path)
    if type(value) is int and not _fits(value):
        return Spec(path, "json", "json")
    for type_, spec in _PLAIN:
        if isinstance(value, type_):
            return spec._replace(name=path)
    if is_json(value):
        return Spec(path, "json", "json")
    if isinstance(value, dict | list | tuple):
        raise SourceError(
            f"{_called(path)} is a {type(value).__name__} that differs among samples in its keys or length, or has "
            "keys that are no texts or ints; only what JSON can say may differ"
        )
    raise SourceError(
        f"{_called(path)} is a {type(value).__module__}.{type(value).__name__}; a sample may have pictures, arrays, "
        "tensors, numbers, texts, bytes, what JSON can say, and tuples, lists and dicts of them"
    )


_PLAIN = (
    (EncodedImage, Spec("", "image", "file")),
    (bool, Spec("", "integer", "bool", "|u1")),
    (int, Spec("", "integer", "int", "<i8")),
    (float, Spec("", "real", "float", "<f8")),
    (str, Spec("", "text", "str")),
    (bytes, Spec("", "bytes", "bytes")),
)


def _array_spec(value: Any, path: str) -> Spec:
    type_ = "tensor" if isinstance(value, torch.Tensor) else "scalar" if isinstance(value, np.generic) else "numpy"
    known = type(value).__name__ if type(value).__module__.startswith("torchvision.tv_tensors") else ""
    if known == "BoundingBoxes":
        return Spec(path, "boxes", type_, format=value.format.name)
    if known == "Mask" and value.ndim == 2:
        return Spec(path, "mask", type_)
    if value.ndim == 0 and type_ != "numpy":
        dtype = np.dtype(value.dtype) if type_ == "scalar" else _numpy_dtype(value.dtype)
        if dtype is not None and dtype.kind in "biuf" and dtype.itemsize <= 8:
            return Spec(path, "real" if dtype.kind == "f" else "integer", type_, dtype.newbyteorder("<").str)
    channels = value.shape[0 if type_ == "tensor" else -1] if value.ndim == 3 else 0
    if value.dtype in (np.uint8, torch.uint8) and channels in (1, 3) and 0 not in value.shape:
        return Spec(path, "image", type_, channels=channels)
    return _plain_array(value, path)


def _plain_array(value: Any, path: str) -> Spec:
    type_ = "tensor" if isinstance(value, torch.Tensor) else "scalar" if isinstance(value, np.generic) else "numpy"
    dtype = _numpy_dtype(value.dtype) if type_ == "tensor" else value.dtype
    if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8 or not dtype.isnative:
        return Spec(path, "array", type_)
    return Spec(path, "array", type_, dtype.newbyteorder("<").str, tuple(value.shape))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


def _declared(values: list[Any], path: str, kind: str) -> Spec:
    """A field of the kind that was asked for."""
    first = values[0]
    type_ = "tensor" if isinstance(first, torch.Tensor) else "pil" if isinstance(first, Image.Image) else "numpy"
    if kind == "image":
        channels = [spec.channels for spec in (_recognised(v, path) for v in values) if spec.kind == "image"]
        return Spec(path, "image", "file" if isinstance(first, bytes) else type_, channels=max(channels, default=3))
    if kind == "vector":
        array = _numbers(first, path)
        return Spec(path, "vector", type_, array.dtype.newbyteorder("<").str, array.shape)
    if kind.startswith("boxes"):
        own = first.format.name if hasattr(first, "canvas_size") else "XYWH"
        return Spec(path, "boxes", type_, format=kind.partition(":")[2] or own)
    if kind in ("mask", "json"):
        return Spec(path, kind, "json" if kind == "json" else type_)  # type: ignore[arg-type]
    spec = _recognised(first, path)
    if kind == "array" and isinstance(first, np.ndarray | torch.Tensor):
        return Spec(path, "array", type_)
    if spec.kind != kind:
        raise SourceError(f"{_called(path)} is a {type(first).__name__}, which is stored as {spec.kind}, not as {kind}")
    return spec


def _numbers(value: Any, path: str) -> npt.NDArray[Any]:
    """An array or a tensor of what a column can hold."""
    array = value
    if isinstance(value, torch.Tensor):
        with contextlib.suppress(TypeError, RuntimeError):  # no dtype of NumPy's, sparse, ...
            array = value.numpy(force=True)
    if (
        not isinstance(array, np.ndarray)
        or not array.size
        or array.dtype.kind not in "biuf"
        or array.dtype.itemsize > 8
    ):
        what = f"{value.dtype} {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
        raise SourceError(f"{_called(path)} is {what}; a vector is an array or tensor of numbers of up to 8 bytes")
    return array


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _called(path: str) -> str:
    return f"{path!r}" if path else "the sample"


def _free(name: str, taken: set[str]) -> str:
    """The name, with as many underscores behind it as make it a new one."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _with_image(found: list[Spec], kinds: Mapping[str, str]) -> list[Spec]:
    """The fields as they are where there is an image; a picture with a palette is one if there is no other.

    Raises:
        SourceError: there are masks or boxes, and no image that they could belong to.
    """
    if any(spec.kind == "image" for spec in found):
        return found
    palettes = [n for n, s in enumerate(found) if s.kind == "mask" and s.type == "pil" and s.name not in kinds]
    if palettes:
        picture = found[palettes[0]]._replace(kind="image")
        return [*found[: palettes[0]], picture, *found[palettes[0] + 1 :]]
    for spec in found:
        if spec.kind in ("mask", "boxes"):
            raise SourceError(
                f"{_called(spec.name)} is of kind {spec.kind}, which goes with an image, and samples have none; "
                f"without one it may be of kinds={{{spec.name!r}: 'array'}}"
            )
    return found


def _named(found: list[Spec]) -> tuple[list[Spec], dict[str, str]]:
    """The fields under names that no two have, and with their columns; and the names that were changed.

    The first image is "image". The second of a pair is "label", "mask" or "boxes". "name" is the record's own.
    """
    pictures = [spec for spec in found if spec.kind == "image"]
    wanted = {pictures[0].name: "image"} if pictures else {}
    if [spec.name for spec in found] == ["0", "1"] and found[1].kind in ("integer", "mask", "boxes"):
        wanted["1"] = "label" if found[1].kind == "integer" else found[1].kind
    taken = {"name", "image", "others", *wanted.values()}
    specs = []
    for number, spec in enumerate(found):
        name = wanted.get(spec.name)
        if name is None:
            name = spec.name or "value"
            if spec.kind == "mask":
                name = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower())
                name = (name if name[:1].isalpha() else f"mask_{name}")[:_MASK_NAME]
            name = _free(name, taken)
        column = None
        if spec.kind in ("integer", "real", "vector"):
            column = "label" if name == "label" and _is_label(spec) else f"field_{number}"
        wanted[spec.name] = name
        specs.append(spec._replace(name=name, column=column, fill=255 if spec.kind == "mask" else 0))
    return specs, wanted


def _is_label(spec: Spec) -> bool:
    """Whether a field's values can be labels: -100, a placeholder's, is one of them."""
    return spec.kind == "integer" and (spec.type in ("int", "bool") or spec.dtype[1] == "i")


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    if isinstance(node, str):
        return names[node]
    ((form, children),) = node.items()
    if form == "dict":
        return {form: [[key, _renamed(child, names)] for key, child in children]}
    return {form: [_renamed(child, names) for child in children]}


def _flatten(node: Node, value: Any, path: str, values: dict[str, Any]) -> None:
    if isinstance(node, str):
        values[node] = value
        return
    ((form, children),) = node.items()
    expected = {"tuple": tuple, "list": list, "dict": dict}[form]
    if not isinstance(value, expected):
        raise SourceError(f"{_called(path)} is a {type(value).__name__}, the first samples have a {form} there")
    keys = [key for key, _ in children] if form == "dict" else range(len(children))
    if (form == "dict" and value.keys() != set(keys)) or len(value) != len(children):
        has = f"the keys {sorted(map(str, value))}" if form == "dict" else f"{len(value)} values"
        wants = sorted(map(str, keys)) if form == "dict" else len(children)
        raise SourceError(
            f"{_called(path)} has {has}, the first samples {wants}; a field that differs may be of "
            f"kinds={{{path!r}: 'json'}}, if JSON can say it"
        )
    for key, child in zip(keys, children, strict=True):
        _flatten(child[1] if form == "dict" else child, value[key], _join(path, key), values)


def cell(spec: Spec, value: Any) -> Any:
    """What a column holds of a value; SourceError if it is none of its field's."""
    if spec.kind == "vector":
        array = _numbers(value, spec.name)
        if array.shape != spec.shape or array.dtype.newbyteorder("<").str != spec.dtype:
            raise SourceError(
                f"{_called(spec.name)} is {array.dtype} {array.shape}, the first samples' {np.dtype(spec.dtype)} "
                f"{spec.shape}; fields of kind array may differ"
            )
        return array
    if isinstance(value, int) and not _fits(value):
        raise SourceError(f"{_called(spec.name)} is {value:#x}, which 64 bits don't hold; kind json does")
    _check_type(spec, value)
    return value.item() if spec.type in ("tensor", "scalar") else value


def _fits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def _check_type(spec: Spec, value: Any) -> None:
    found = _recognised(value, spec.name)
    if (found.kind, found.type) != (spec.kind, spec.type) or (spec.column is not None and found.dtype != spec.dtype):
        raise SourceError(
            f"{_called(spec.name)} is {found.type or found.kind} {found.dtype}, in the first samples {spec.type} "
            f"{spec.dtype}; let the dataset give one type"
        )


def encode(spec: Spec, value: Any) -> record.Field:
    """The record's field of an array, text, JSON or bytes.

    Raises:
        SourceError: the value is none of its field's, or can't be stored.
    """
    if spec.kind == "json":
        return record.Field(record.TEXT, _json(spec, value))
    if spec.kind == "array":
        types = {"tensor": torch.Tensor, "scalar": np.generic, "numpy": np.ndarray | Image.Image}[spec.type]
        if not isinstance(value, types):
            raise SourceError(f"{_called(spec.name)} is a {type(value).__name__}, in the first samples it is an array")
        return arrays.field_of(value if isinstance(value, torch.Tensor) else np.asanyarray(value))
    _check_type(spec, value)
    if spec.kind == "text":
        return record.Field(record.TEXT, value.encode("utf-8", "surrogatepass"))
    return record.Field(record.BYTES, bytes(value))


def _json(spec: Spec, value: Any) -> bytes:
    if not is_json(value):
        raise SourceError(
            f"{_called(spec.name)} has values that JSON doesn't give back as they are (tuples, arrays, ...), or is "
            f"nested more than {_DEEPEST_JSON} deep"
        )
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError) as error:
        raise SourceError(f"{_called(spec.name)} can't be written as JSON: {error}") from error


def decode(spec: Spec, field: record.Field) -> Any:
    """The value that `encode` was given. Its checksum is not looked at.

    Raises:
        DecodeError: the field holds no such value.
    """
    if spec.kind == "array":
        if spec.type == "tensor":
            return arrays.tensor(field)
        array = arrays.read(field)
        return array[()] if spec.type == "scalar" else array
    payload = bytes(field.payload)
    if spec.kind == "bytes":
        return payload
    try:
        text = payload.decode("utf-8", "surrogatepass")
        return json.loads(text) if spec.kind == "json" else text
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{spec.name!r} is no {spec.kind}: {error}") from error


def restore(spec: Spec, rows: npt.NDArray[Any]) -> list[Any]:
    """The values of samples from their rows of the column."""
    if spec.type in ("int", "float"):
        values: list[Any] = rows.tolist()
        return values
    if spec.type == "bool":
        return [bool(value) for value in rows.tolist()]
    typed = rows.astype(spec.dtype, copy=False)
    return list(torch.from_numpy(typed)) if spec.type == "tensor" else list(typed)


def column_dtype(spec: Spec) -> str:
    """The dtype of a field's column: labels are int64 in every store, and truth is a byte."""
    return "<i8" if spec.column == "label" else spec.dtype.replace("|b1", "|u1")
