"""Images of a store, by index: how large they are, what is stored of them, and what plans make of them.

The column of sizes says what memory is taken for, and plans are made for, before an image is looked at. So whatever
comes out of the store is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from . import decode, record
from .blocks import Values
from .cache import ImageCache
from .errors import ColumnError, DecodeError, FastloadError, StoreError
from .geometry import Plan, Size, upright_size
from .store import Store

_MADE = 1 << 26
"""Pixels that a transform may make of an image, whatever `max_pixels` says of the image."""


def sizes_of(store: Store, indices: npt.NDArray[np.int64]) -> list[Size]:
    """What memory is taken for: for images that are too large to be read, that of one pixel; without images, none."""
    if store.schema.image is None:
        return [(0, 0)] * len(indices)
    sizes = store.columns["size"].gather(indices)
    areas = sizes.prod(axis=1, dtype=np.float64)
    if not areas.all():
        raise ColumnError(f"{store.path}: column 'size' has images without pixels; the store is damaged")
    sizes[areas > store.max_pixels] = 1
    return [(height, width) for height, width in sizes.tolist()]


def check_plans(store: Store, plans: list[Plan]) -> None:
    """See to it that pictures aren't made larger than images may be.

    A thin one that is resized by its shorter side can grow a thousandfold.

    Raises:
        DecodeError: one would be.
    """
    limit = max(store.max_pixels, _MADE)
    for plan in plans:
        if plan.most_pixels > limit:
            raise DecodeError(
                f"the transform makes {plan.most_pixels} pixels of {plan.box.width} x {plan.box.height}, more than the "
                f"limit of {limit}; max_pixels= raises it"
            )


def stored_image(store: Store, index: int, size: Size) -> Values | record.Field:
    """Image `index`, of `size`, as it is stored: pixels, or a field of its record.

    Raises:
        StoreError: it has another size.
    """
    if "image" in store.columns:
        return _raw_image(store, index, size)
    return _checked(store.fields(index)[0], size)


def draw(
    store: Store,
    index: int,
    size: Size,
    plans: list[Plan],
    out: Values,
    *,
    fields: Sequence[record.Field] = (),
    cache: ImageCache | None,
    scaled: bool,
) -> None:
    """Decode image `index`, of `size`, and carry `plans` out into `out`.

    fields: of its record, where they have been read. cache: of images that are no raw column. scaled: see
    `decode.render`.

    Raises:
        StoreError: it has another size.
        ChecksumError, DecodeError: it is damaged, or `plans` make too much of it.
    """
    check_plans(store, plans)
    image: Values | record.Field | None = None
    if "image" in store.columns:
        image = _raw_image(store, index, size)
    elif cache is not None:
        image = cache.get(index)
    if image is None:
        image = _checked((fields or store.fields(index))[0], size)
        if cache is not None:
            image = decode.upright(image)
            cache.put(index, image)
    orientation = image.orientation if isinstance(image, record.Field) else 1
    decode.render(image, orientation, plans, out, scaled=scaled)


def name_of(store: Store, index: int) -> str:
    """The name of a sample, for a message or a caption: " (a.jpg)"; nothing where it can't be read."""
    try:
        return f" ({store.name(index)})"
    except FastloadError:
        return ""


def _raw_image(store: Store, index: int, size: Size) -> Values:
    image = store.raw_image(index)
    _check_size(image.shape[:2], size)
    return image


def _checked(field: record.Field, size: Size) -> record.Field:
    _check_size(upright_size((field.height, field.width), field.orientation), size)
    return field


def _check_size(found: tuple[int, ...], size: Size) -> None:
    if found != size:
        raise StoreError(
            f"the image has {found[1]} x {found[0]} pixels, the size column says otherwise; the store is damaged"
        )
