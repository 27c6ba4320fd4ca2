"""Pickles without unpickling: what one describes, with nothing made of it.

A pickle is a program, so it is given to no unpickler: a stack machine of a few lines takes the opcodes that plain data
and NumPy arrays are made of, and refuses every other one. It calls nothing. A call that the pickle asks for is kept as
a note of its name and arguments, for whoever knows what it must be.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MAX_STEPS = 1 << 20


@dataclass(slots=True, eq=False)
class Call:
    """A function that a pickle names, or with arguments a call that it asks for. It is not made."""

    function: str
    arguments: object = None
    state: object = None


_FUNCTIONS = {"numpy ndarray", "numpy dtype", "_codecs encode"}
_FUNCTIONS |= {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}


def _function(name: str) -> Call:
    if name not in _FUNCTIONS:
        raise ValueError(f"the pickle asks for {name[:80]!r}, which no batch needs and which may do harm")
    return Call(name)


def _called(values: list[Any]) -> Call:
    function, arguments = values
    if not isinstance(function, Call) or function.arguments is not None:
        raise ValueError("the pickle calls what is no function")
    return Call(function.function, arguments)


def _build(target: object, values: list[Any]) -> None:
    if not isinstance(target, Call):
        raise ValueError("the pickle gives a state to what has none")
    (target.state,) = values


def _extend(target: object, values: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError("the pickle appends to what is no list")
    target.extend(values)


def _update(target: object, values: list[Any]) -> None:
    keys = values[::2]
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the pickle sets an item of what is no dict, or by a key that is no text")
    target.update(zip(keys, values[1::2], strict=True))


def _dict(values: list[Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    _update(made, values)
    return made


_MARKED = -1
_PUSH = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "NONE", "GLOBAL"}
_PUSH |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_PUSH |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_MAKE: dict[str, tuple[int, Callable[[list[Any]], object]]] = {
    "NEWTRUE": (0, lambda _: True),
    "NEWFALSE": (0, lambda _: False),
    "EMPTY_LIST": (0, list),
    "LIST": (_MARKED, list),
    "EMPTY_TUPLE": (0, tuple),
    "TUPLE1": (1, tuple),
    "TUPLE2": (2, tuple),
    "TUPLE3": (3, tuple),
    "TUPLE": (_MARKED, tuple),
    "EMPTY_DICT": (0, _dict),
    "DICT": (_MARKED, _dict),
    "STACK_GLOBAL": (2, lambda values: _function(" ".join(values))),
    "REDUCE": (2, _called),
}
"""How many values an opcode takes from the stack, and what it makes of them."""
_CHANGE: dict[str, tuple[int, Callable[[object, list[Any]], None]]] = {
    "APPEND": (1, _extend),
    "APPENDS": (_MARKED, _extend),
    "SETITEM": (2, _update),
    "SETITEMS": (_MARKED, _update),
    "BUILD": (1, _build),
}
"""How many values an opcode takes, and what it does with them to the one below."""
NEEDED = {*_PUSH, *_PUT, *_GET, *_MAKE, *_CHANGE, "MARK", "STOP", "PROTO", "FRAME"}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def described(data: bytes) -> object:
    """What a pickle describes: numbers, text (bytes as Latin-1), lists, tuples, dicts, and calls that are not made."""
    file = io.BytesIO(data)
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def taken(count: int) -> list[Any]:
        start = marks.pop() if count == _MARKED else len(stack) - count
        if not 0 <= start <= len(stack):
            raise ValueError("the pickle takes more from its stack than is there")
        values, stack[start:] = stack[start:], []
        return values

    for _ in range(_MAX_STEPS):
        name, argument = _opcode(file)
        if name in _PUSH:
            stack.append(argument)
        elif name in _PUT:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _MAKE:
            count, make = _MAKE[name]
            stack.append(make(taken(count)))
        elif name in _CHANGE:
            count, change = _CHANGE[name]
            values = taken(count)
            change(stack[-1], values)
        elif name == "STOP":
            return stack[-1]
    raise ValueError(f"the pickle has more than {_MAX_STEPS} opcodes")


def _opcode(file: io.BytesIO) -> tuple[str, Any]:
    """The name and the argument of the next opcode."""
    opcode = _OPCODES.get(file.read(1))
    if opcode is None or opcode.name not in NEEDED:
        found = f"the opcode {opcode.name}, which no batch needs," if opcode else "its end, or no opcode,"
        raise ValueError(f"the pickle has {found} at byte {file.tell()}")
    if opcode.name == "STRING":  # pickletools takes it for ASCII before Python 3.13
        return opcode.name, _quoted(file.readline())
    argument: Any = opcode.arg.reader(file) if opcode.arg else None
    if opcode.name == "GLOBAL":
        argument = _function(argument)
    return opcode.name, argument.decode("latin-1") if isinstance(argument, bytes) else argument


def _quoted(line: bytes) -> str:
    text = line.rstrip(b"\n")
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
        raise ValueError("the pickle has a string without quotes")
    return text[1:-1].decode("unicode_escape")
