"""Decoded images kept in memory under a byte budget, shared by all threads of a process.

`lru` drops what was used longest ago. `pin` never drops anything: what came first stays. Under a fresh shuffle each
epoch an LRU cache smaller than the data gets almost no hits, since everything is dropped before its turn comes
again, while pinning k% of the data hits k% of the time (Mohan et al., "Analyzing and Mitigating Data Stalls in DNN
Training", VLDB 2021). Decoded images are about ten times larger than their JPEGs: a cache pays when the set fits.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any, Literal, get_args

from .blocks import Values

Policy = Literal["lru", "pin"]

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


class ImageCache:
    """Decoded images by index.

    budget: bytes, or text such as "4GB" or "512MiB". policy: "lru" (default) or "pin".

    Attributes `hits`, `misses` and `nbytes` say how it does. Unpickling gives an empty cache of the same budget: each
    process has its own.

    Raises:
        ValueError: the budget or the policy makes no sense.
    """

    def __init__(self, budget: int | str, policy: Policy = "lru") -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"cache policy is {policy!r}; it may be {' or '.join(get_args(Policy))}")
        self.budget = parse_bytes(budget)
        self.policy: Policy = policy
        self.hits = self.misses = self.nbytes = 0
        self._images: OrderedDict[int, Values] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int) -> Values | None:
        """The image of a sample, or None."""
        with self._lock:
            image = self._images.get(index)
            if image is None:
                self.misses += 1
            else:
                self.hits += 1
                if self.policy == "lru":
                    self._images.move_to_end(index)
            return image

    def put(self, index: int, image: Values) -> None:
        """Keep an image if the budget and the policy allow it. The array is made read-only: it is shared."""
        image.flags.writeable = False
        with self._lock:
            if index in self._images or image.nbytes > self.budget:
                return
            if self.policy == "pin" and self.nbytes + image.nbytes > self.budget:
                return
            self._images[index] = image
            self.nbytes += image.nbytes
            while self.nbytes > self.budget:
                _, dropped = self._images.popitem(last=False)
                self.nbytes -= dropped.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget, "policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # an empty cache like this one


def parse_bytes(size: int | str) -> int:
    """A number of bytes from a positive int or from text: "4GB" (powers of 1000), "512MiB" (powers of 1024)."""
    if not isinstance(size, (int, str)):
        raise TypeError(f"a cache budget is a number of bytes or text such as '4GB', not {size!r}")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", size, re.IGNORECASE)
        if match is None:
            raise ValueError(f"{size!r} is not a number of bytes; write it like 500MB, 4GB or 2GiB")
        number, unit, binary = match.groups()
        unit = _UNITS[(unit or "").upper()]
        if binary:
            unit = 1024 ** round(len(str(unit)) // 3)
        size = int(float(number) * unit)
    if size <= 0:
        raise ValueError(f"a cache of {size} bytes holds nothing; give it a positive budget or leave it out")
    return size
