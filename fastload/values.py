"""What a dataset makes of what it reads: values of the fields that it doesn't transform, and the types asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from . import arrays, boxes, decode, fields, record
from .blocks import Values
from .errors import DecodeError
from .fields import Spec
from .geometry import Plan
from .placeholders import placeholder

if TYPE_CHECKING:
    import PIL.Image

ImageType = Literal["tensor", "numpy", "pil"]
Decoder = Callable[[memoryview], Any]
"""What makes a value of a bytes field: it gets a view of the store's memory, which lasts as long as the dataset."""


class Value:
    """A field and how it is read. image_type: of pictures; None gives them as they were packed."""

    def __init__(self, spec: Spec, image_type: ImageType | None) -> None:
        self.spec = spec
        self.image_type = image_type or packed_type(spec)
        self.decoder: Decoder | None = None

    def read(self, field: record.Field, plans: list[Plan]) -> Any:
        """The value in a field, whose checksum is checked. plans: what has become of the sample's image, if anything.

        Raises:
            ChecksumError, DecodeError: it is damaged.
        """
        if self.spec.kind == "image":
            return as_type(decode.with_channels(decode.upright(field), self.spec.channels), self.image_type)
        field.verify()
        if self.spec.kind == "boxes":
            return self._boxes(arrays.read(field), plans)
        if self.decoder is not None:
            return self.decoder(memoryview(field.payload))
        return fields.decode(self.spec, field)

    def _boxes(self, found: arrays.Array, plans: list[Plan]) -> Any:
        if found.dtype != np.float32 or found.ndim != 2 or found.shape[1] != 4:
            raise DecodeError(f"{self.spec.name!r} is {found.dtype} {found.shape}, boxes are float32 (n, 4)")
        moved = boxes.to_format(boxes.moved(found, plans) if plans else found, self.spec.format or "XYWH")
        return torch.from_numpy(moved) if self.spec.type == "tensor" else moved

    def placeholder(self) -> Any:
        """What stands for it in a sample that can't be had."""
        if self.spec.kind == "boxes":
            return self._boxes(np.zeros((0, 4), np.float32), [])
        if self.spec.kind == "image":
            return as_type(np.zeros((1, 1, self.spec.channels), np.uint8), self.image_type)
        return None if self.decoder is not None else placeholder(self.spec)


def packed_type(spec: Spec | None) -> ImageType:
    """How pictures are given if nobody says it: as the dataset gave them that was packed; tensors if it was files."""
    return spec.type if spec is not None and spec.type in ("numpy", "pil") else "tensor"  # type: ignore[return-value]


def as_type(picture: Values, image_type: ImageType) -> torch.Tensor | Values | PIL.Image.Image:
    """A picture (height, width, channels) as a tensor, channels first, as it is, or as Pillow has it."""
    if image_type == "tensor":
        return torch.from_numpy(picture).permute(2, 0, 1)
    if image_type == "numpy":
        return picture
    from PIL import Image

    return Image.fromarray(picture if picture.shape[2] == 3 else picture[..., 0])


def mask_as_type(mask: npt.NDArray[Any], image_type: ImageType) -> torch.Tensor | npt.NDArray[Any] | PIL.Image.Image:
    """A mask (height, width) as its image's type has it."""
    if image_type == "tensor":
        return torch.from_numpy(mask)
    if image_type == "numpy":
        return mask
    from PIL import Image

    return Image.fromarray(mask)


def as_targets(labels: npt.NDArray[Any]) -> torch.Tensor:
    """Labels as what losses take: int64, real ones float32."""
    targets = torch.from_numpy(labels)
    return targets.float() if targets.is_floating_point() else targets


def set_decoders(values: list[Value], decoder: Decoder | Mapping[str, Decoder] | None) -> None:
    """Give bytes fields their decoders: one for the only such field, or several by name.

    Raises:
        ValueError: there is no such field, or there are several.
    """
    if decoder is None:
        return
    streams = {value.spec.name: value for value in values if value.spec.kind == "bytes"}
    names = ", ".join(streams) or "none"
    if not isinstance(decoder, Mapping):
        if len(streams) != 1:
            raise ValueError(f"decoder goes with the one field of bytes; there are {names}: pass {{name: decoder}}")
        decoder = dict.fromkeys(streams, decoder)
    unknown = decoder.keys() - streams.keys()
    if unknown:
        raise ValueError(f"decoder names {', '.join(map(str, unknown))}; the fields of bytes are: {names}")
    for name, function in decoder.items():
        streams[name].decoder = function
