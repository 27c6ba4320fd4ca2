"""How images are packed, and what all images of a store are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from . import geometry
from .geometry import MAX_PIXELS, Size

Encode = Literal["keep", "jpeg", "raw"]
Exif = Literal["apply", "ignore"]


@dataclass(frozen=True)
class Options:
    """How images are packed; see `pack`."""

    short_side: int | None = None
    max_side: int | None = None
    quality: int | None = None
    encode: Encode = "keep"
    exif: Exif = "apply"
    max_pixels: int = MAX_PIXELS
    tiles: bool = True
    strip: bool = False
    background: tuple[int, int, int] | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "max_side", "max_pixels", "quality", "depth"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
            if value is not None and name != "quality" and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it may be 1 to 100")
        if self.encode not in get_args(Encode) or self.exif not in get_args(Exif):
            raise ValueError(
                f"encode is {self.encode!r}, exif is {self.exif!r}; encode may be {', '.join(get_args(Encode))}, "
                f"exif {' or '.join(get_args(Exif))}"
            )
        if self.quality is not None and self.encode == "raw":
            raise ValueError("a quality goes with JPEG; raw images are kept exactly")
        if self.depth not in (None, 8, 16):
            raise ValueError(f"depth is {self.depth}; images may have 8 or 16 bits")
        if self.depth == 16 and (self.quality is not None or self.encode == "jpeg"):
            raise ValueError("depth is 16, and a JPEG has 8 bits; leave quality and encode out, or pack with depth 8")
        if self.background is not None:
            shades = tuple(self.background)
            if len(shades) != 3 or not all(isinstance(shade, int) and 0 <= shade <= 255 for shade in shades):
                raise ValueError(f"background is {self.background}; it takes red, green and blue, 0 to 255 each")
        if self.strip and not self.tiles:
            raise ValueError("strip goes with tiles: images that are not re-cut keep all of their bytes")

    def target_size(self, size: Size) -> Size:
        """(height, width) that an upright image of `size` is stored with; images are never enlarged."""
        if self.short_side is not None and min(size) > self.short_side:
            size = geometry.short_side_size(size, self.short_side)
        if self.max_side is not None and max(size) > self.max_side:
            height, width = size
            longest = max(size)
            size = (max(1, height * self.max_side // longest), max(1, width * self.max_side // longest))
        return size


Shape = tuple[int, int, int]
"""(height, width, channels)."""


class Form(NamedTuple):
    """What all images of a store are: of type dtype ("uint8", "uint16" or "int16"); of 16 bits also the channels."""

    dtype: str = "uint8"
    channels: int = 3

    @property
    def deep(self) -> bool:
        """Whether they have 16 bits."""
        return self.dtype != "uint8"
