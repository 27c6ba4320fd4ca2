"""Where LMDB keeps what: the pages of its file, read without trusting one of them.

LMDB follows page numbers wherever they lead, and a damaged one ends the process. So what it wrote is looked up here:
the places of the values, for readers that never walk its trees (see `toc`), and whether the trees are sound, before
LMDB itself goes on writing to a file that a crash has left behind.

The layout is LMDB 0.9's (mdb.c: MDB_meta, MDB_page, MDB_node; data version 1, 64 bits, little-endian). Pages 0 and 1
are meta pages, of which the one of the later transaction counts. It names the roots of two trees, of the free pages and
of the main database, which names the roots of the named ones. A page begins with its own number, flags, and the end of
its list of nodes; a value that is too large for its leaf lies in pages of its own, one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import StoreFormatError

MAGIC = 0xBEEFC0DE
_HEADER = 16  # bytes of a page before its nodes, or before a large value
_NODE = 8  # bytes of a node before its key
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4  # flags of pages
_LARGE, _SUBTREE = 1, 2  # flags of nodes
_META = struct.Struct("<II Q Q 48s 48s Q Q")
_TREE = struct.Struct("<I H H Q Q Q Q Q")
_NOTHING = (1 << 64) - 1  # the root of an empty tree
_DEPTH = 32  # LMDB's own limit

Array = npt.NDArray[np.int64]


class PagesError(StoreFormatError):
    """The pages contradict each other."""


class Meta(NamedTuple):
    """What the meta page that counts says."""

    page_size: int
    last_page: int
    transaction: int
    free: Tree
    main: Tree

    @property
    def end(self) -> int:
        """Where LMDB's pages end."""
        return (self.last_page + 1) * self.page_size


class Tree(NamedTuple):
    """The root of a tree, and how many of what there are in it."""

    root: int
    depth: int
    branches: int
    leaves: int
    large: int
    entries: int

    @classmethod
    def parse(cls, data: bytes) -> Tree:
        _, _, depth, branches, leaves, large, entries, root = _TREE.unpack(data)
        return cls(root, depth, branches, leaves, large, entries)


class Leaf(NamedTuple):
    """The nodes of a leaf in the order of their keys: where keys and values begin in the file, and their lengths."""

    keys: Array
    key_lengths: Array
    values: Array
    lengths: Array
    flags: Array


def meta_of(data: memoryview) -> Meta:
    """The meta page that counts.

    Raises:
        PagesError: there is none.
    """
    if not begins_like_lmdb(data):
        raise PagesError("it doesn't begin as an LMDB file does")
    (page_size,) = struct.unpack_from("<I", data, _HEADER + 24)
    if page_size not in (1 << bits for bits in range(8, 17)):
        raise PagesError(f"it says that a page has {page_size} bytes")
    if len(data) < 2 * page_size:
        raise PagesError(f"cut short, {len(data)} bytes of at least {2 * page_size}")
    found = []
    for start in (_HEADER, page_size + _HEADER):
        magic, version, _, _, free, main, last_page, transaction = _META.unpack_from(data, start)
        if (magic, version) != (MAGIC, 1):
            raise PagesError("one of its two first pages is damaged")
        found.append(Meta(page_size, last_page, transaction, Tree.parse(free), Tree.parse(main)))
    return max(found, key=lambda meta: meta.transaction)


def begins_like_lmdb(data: memoryview) -> bool:
    """Whether the first bytes are those of an LMDB file."""
    return len(data) >= _HEADER + _META.size and struct.unpack_from("<II", data, _HEADER) == (MAGIC, 1)


class Pages:
    """The trees in an LMDB file's bytes.

    Raises:
        PagesError: here or in any method, the pages contradict each other.
    """

    def __init__(self, data: memoryview) -> None:
        self.meta = meta_of(data)
        if self.meta.end > len(data):
            raise PagesError(f"cut short, {len(data)} bytes of {self.meta.end}")
        self.data = data
        self._bytes = np.frombuffer(data, np.uint8)

    def tree(self, name: bytes) -> Tree:
        """A named database."""
        trees = dict(self._trees())
        if name not in trees:
            raise PagesError(f"it has no database {name.decode()!r}")
        return trees[name]

    def values(self, tree: Tree) -> dict[bytes, tuple[int, int]]:
        """The values of a small tree: offset in the file and length by key."""
        found = {}
        for leaf in self._leaves(tree):
            for key, key_length, value, length in zip(*(column.tolist() for column in leaf[:4]), strict=True):
                found[bytes(self.data[key : key + key_length])] = (value, length)
        return found

    def numbered(self, tree: Tree) -> Iterator[Array]:
        """(offset, length) of each value of a tree whose keys are 0, 1, 2 and so on, in 8 bytes each, big-endian."""
        count = 0
        for leaf in self._leaves(tree):
            if (leaf.key_lengths != 8).any():
                raise PagesError("a key of its samples has no 8 bytes")
            keys = self._numbers(leaf.keys, ">u8")
            if (keys != np.arange(count, count + len(keys), dtype=np.uint64)).any():
                raise PagesError(f"the keys of its samples are not consecutive after {count}")
            count += len(keys)
            yield np.stack([leaf.values, leaf.lengths], axis=1)

    def check(self) -> None:
        """Walk all trees, and see that each page is used once, or free, and that all counts and keys are in order."""
        used = np.zeros(self.meta.last_page + 1, np.uint8)
        used[:2] = 1
        for tree in (self.meta.free, self.meta.main, *(tree for _, tree in self._trees())):
            self._check(tree, used)
        for leaf in self._leaves(self.meta.free):
            for value, length in zip(leaf.values.tolist(), leaf.lengths.tolist(), strict=True):
                pages = np.frombuffer(self.data, "<u8", length // 8, value)
                if not len(pages) or pages[0] != len(pages) - 1 or (pages[1:] > self.meta.last_page).any():
                    raise PagesError("the list of its free pages is damaged")
                np.add.at(used, pages[1:].astype(np.int64), 1)
        if (used > 1).any():
            raise PagesError(f"page {int(np.argmax(used > 1))} is used twice")

    def _trees(self) -> Iterator[tuple[bytes, Tree]]:
        for leaf in self._leaves(self.meta.main):
            for key, length, value, size, flags in zip(*(column.tolist() for column in leaf), strict=True):
                if flags != _SUBTREE or size != _TREE.size:
                    raise PagesError("its main database has other things than databases")
                yield bytes(self.data[key : key + length]), Tree.parse(bytes(self.data[value : value + size]))

    def _check(self, tree: Tree, used: npt.NDArray[np.uint8]) -> None:
        """Count what a tree uses, and compare that with what it says of itself."""
        branches = leaves = large = entries = 0
        last = b""
        for number, depth, nodes in self._walk(tree):
            used[number] += 1
            if isinstance(nodes, Leaf):
                leaves += 1
                entries += len(nodes.keys)
                if depth != tree.depth:
                    raise PagesError(f"page {number} is a leaf at depth {depth} of {tree.depth}")
                for key in self._keys(nodes) if tree is not self.meta.free else ():
                    if key <= last and entries > 1:
                        raise PagesError(f"the keys in page {number} are not in order")
                    last = key
                for value, length in zip(
                    nodes.values[nodes.flags == _LARGE].tolist(),
                    nodes.lengths[nodes.flags == _LARGE].tolist(),
                    strict=True,
                ):
                    first = value // self.meta.page_size
                    count = self._check_large(first, length)
                    used[first : first + count] += 1
                    large += count
            else:
                branches += 1
        if (branches, leaves, large, entries) != tree[2:]:
            raise PagesError("a tree has other numbers of pages and entries than it says")

    def _check_large(self, page: int, length: int) -> int:
        """How many pages a large value has; more than it needs where it took the place of a larger one."""
        number, _, flags, count = struct.unpack_from("<QHHI", self.data, page * self.meta.page_size)
        needed = -(-(_HEADER + length) // self.meta.page_size)
        if number != page or flags != _OVERFLOW or not needed <= count <= self.meta.last_page + 1 - page:
            raise PagesError(f"page {page} is not the beginning of a value of {length} bytes")
        return int(count)

    def _keys(self, leaf: Leaf) -> Iterator[bytes]:
        for key, length in zip(leaf.keys.tolist(), leaf.key_lengths.tolist(), strict=True):
            yield bytes(self.data[key : key + length])

    def _leaves(self, tree: Tree) -> Iterator[Leaf]:
        for _, _, nodes in self._walk(tree):
            if isinstance(nodes, Leaf):
                yield nodes

    def _walk(self, tree: Tree) -> Iterator[tuple[int, int, Leaf | Array]]:
        """Number, depth and nodes of each page of a tree, from left to right."""
        waiting = [] if tree.root == _NOTHING else [(tree.root, 1)]
        visited = 0
        while waiting:
            number, depth = waiting.pop()
            visited += 1
            if visited > self.meta.last_page or depth > _DEPTH:
                raise PagesError("its pages lead in a circle")
            nodes = self._nodes(number)
            yield number, depth, nodes
            if not isinstance(nodes, Leaf):
                waiting += [(child, depth + 1) for child in reversed(nodes.tolist())]

    def _nodes(self, number: int) -> Leaf | Array:
        """The children of a branch page, or the nodes of a leaf."""
        size, start = self.meta.page_size, number * self.meta.page_size
        if not 2 <= number <= self.meta.last_page:
            raise PagesError(f"there is no page {number}, and one refers to it")
        own, _, kind, lower, upper = struct.unpack_from("<QHHHH", self.data, start)
        if own != number or kind not in (_BRANCH, _LEAF) or not _HEADER < lower <= upper <= size or lower % 2:
            raise PagesError(f"page {number} is no branch or leaf of a tree")
        words = np.frombuffer(self.data, "<u2", size // 2, start)
        at = words[_HEADER // 2 : lower // 2].astype(np.int64)
        if (at < upper).any() or (at > size - _NODE).any() or (at % 2).any():
            raise PagesError(f"page {number} has nodes outside of it")
        low, high, flags, key_lengths = (words[at // 2 + place].astype(np.int64) for place in range(4))
        keys = at + _NODE
        ends = keys + key_lengths
        if kind == _BRANCH:
            if (ends > size).any():
                raise PagesError(f"page {number} has nodes outside of it")
            return low | high << 16 | flags << 32
        lengths = low | high << 16
        large = flags == _LARGE
        if (ends + np.where(large, 8, lengths) > size).any() or (flags & ~(_LARGE | _SUBTREE)).any():
            raise PagesError(f"page {number} has nodes outside of it")
        values = start + ends
        if large.any():
            pages = self._numbers(values[large], "<u8").astype(np.int64)
            counts = -(-(_HEADER + lengths[large]) // size)
            if (pages < 2).any() or (pages + counts - 1 > self.meta.last_page).any():
                raise PagesError(f"page {number} refers to values outside of the file")
            values[large] = pages * size + _HEADER
        return Leaf(start + keys, key_lengths, values, lengths, flags)

    def _numbers(self, places: Array, dtype: str) -> npt.NDArray[Any]:
        """The 8-byte numbers at these places."""
        numbers: npt.NDArray[Any] = self._bytes[places[:, None] + np.arange(8)].view(dtype)[:, 0]
        return numbers
