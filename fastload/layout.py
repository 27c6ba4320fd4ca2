"""The layout of a dataset's samples: which fields they have, and which of these lie in columns, which in records."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from .fields import leaves
from .placeholders import with_valid
from .store import Column, Store
from .transforms import Compose
from .values import ImageType, Value


class Layout:
    """What the samples of a store consist of, and where each part of them lies.

    sample: their structure (see `fields`), with `placeholders.VALID` in it if that is asked for. names: of its fields,
    in order. target: the one that a target transform works on. columns: the fields that are columns of the store.
    values: those of the records that are neither the transformed image nor its masks. reads_records: whether a record
    has more of a sample than that image.
    """

    def __init__(self, store: Store, image_type: ImageType | None, return_valid: bool) -> None:
        schema = store.schema
        self._store = store
        self.sample = with_valid(schema.sample) if return_valid else schema.sample
        self.names: tuple[str, ...] = tuple(leaves(self.sample))
        self.is_pair = schema.sample in ({"tuple": ["image", "label"]}, {"tuple": ["image", "mask"]})
        self.target = next((name for name in reversed([*leaves(schema.sample)]) if name != "image"), "image")
        self.has_images = schema.image is not None
        self.columns = [spec for spec in schema.others if spec.column is not None]
        self.values = [Value(spec, image_type) for spec in schema.others if spec.column is None]
        self.reads_records = bool(store.masks or self.values)

    def gathered(self, transform: Compose) -> Column | None:
        """The column of raw images, if pictures are its rows as they are."""
        as_they_are = not (transform.geometric or self.reads_records)
        return self._store.columns.get("image") if as_they_are else None

    @functools.cached_property
    def mask_dtypes(self) -> list[npt.DTypeLike]:
        """The type of each mask's values: int32 where some don't fit into uint8."""
        columns = [self._store.columns[f"{name}_max"] for name in self._store.masks]
        return [np.uint8 if all((chunk <= 255).all() for chunk in column.chunks()) else np.int32 for column in columns]
