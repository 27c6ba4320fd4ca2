"""What can't be undercut: the splice, decode and resize calls of an epoch, and nothing else.

For every sample the very calls that fastload makes, with the same sizes: of a tiled JPEG the splice of the tiles, which
checks them; simplejpeg into a used buffer; torch's resize into a used slot. No crop is copied (the resize reads as many
pixels from the buffer's start), no batch is made, no store is read, no randomness drawn. Several threads share the
samples, so that none waits for another at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch

import fastload
from fastload import decode, record, tiles
from fastload.geometry import Box, Plan, Read, read_for
from fastload.order import SampleRandom
from pictures import expected


class _Calls(NamedTuple):
    """The arguments of one sample's calls in one thread.

    box: what is spliced, None where the payload is decoded whole. least: the size that simplejpeg scales to, zeros for
    the JPEG's own. source: None where nothing is resized.
    """

    field: record.Field
    box: Box | None
    least: tuple[int, int]
    reduction: int
    decoded: Any
    source: torch.Tensor | None
    size: tuple[int, int]
    scales: tuple[float | None, float | None]
    out: torch.Tensor


class BareCalls:
    """A contender: splice, decode and resize every sample of a dataset as in `epoch`, on `threads` threads."""

    def __init__(self, dataset: fastload.ImageDataset, epoch: int = 0, threads: int = 1) -> None:
        self._dataset, self._epoch = dataset, epoch
        buffers = [(np.empty(1 << 26, np.uint8), np.empty(1 << 22, np.uint8)) for _ in range(threads)]
        self._samples = [self._calls(index, buffers) for index in range(len(dataset))]
        self._threads = threads

    def _calls(self, index: int, buffers: list[Any]) -> list[_Calls]:
        """The sample's calls for each thread."""
        field = record.parse(self._dataset.store.view(index))[0]
        assert field.codec == record.JPEG, "the bare calls are for JPEGs; give a folder of nothing else"
        read = self._read(index, field)
        box = Box(*(length * read.reduction for length in read.box))
        small = tiles.splice(field, box) if field.tiles else None
        size = (field.height, field.width) if small is None else small.size
        height, width = (-(-length // read.reduction) for length in size)
        calls = []
        for decode_buffer, slot in buffers:
            decoded = decode_buffer[: height * width * 3].reshape(height, width, 3)
            source = _image(decode_buffer, *read.source) if read.source != read.size else None
            least = (height, width) if read.reduction > 1 else (0, 0)
            resize = (source, read.size, read.scales, _image(slot, *read.size))
            calls.append(_Calls(field, None if small is None else box, least, read.reduction, decoded, *resize))
        return calls

    def _read(self, index: int, field: record.Field) -> Read:
        dataset = self._dataset
        size = tuple(dataset.store.columns["size"][index].tolist())
        (plan,) = dataset.transform.plans(size, SampleRandom(dataset.seed, self._epoch, index))
        stored = (field.height, field.width)
        return read_for(plan, stored, field.orientation, scaled=dataset.scaled_decode, tiled=bool(field.tiles))

    def __call__(self) -> int:
        on_all_cores(_carry_out, self._samples, self._threads)
        return len(self._samples)

    def check(self) -> None:
        """Fail unless the last decode shows Pillow's pixels to the bit, and the resize made something of them."""
        index = len(self._samples) - 1
        calls = self._samples[index][0]
        _carry_out(0, [self._samples[index]])
        field = calls.field
        if field.orientation == calls.reduction == 1:
            x, y, width, height = calls.box or Box(0, 0, field.width, field.height)
            small = calls.box and tiles.splice(field, calls.box)
            crop = calls.decoded[small.y :, small.x :][:height, :width] if small else calls.decoded
            whole = expected(self._dataset.store, index, Plan.whole((field.height, field.width)))
            assert np.array_equal(crop, whole[y : y + height, x : x + width])
        assert calls.out.float().std() > 0


def _carry_out(thread: int, samples: Iterable[list[_Calls]]) -> None:
    splice, decode_jpeg = tiles.splice, simplejpeg.decode_jpeg
    resize = decode._resize  # by the very name that fastload calls it
    for calls in samples:
        field, box, least, reduction, decoded, source, size, scales, out = calls[thread]
        small = splice(field, box) if box is not None else None
        data = field.payload if small is None else small.data
        decode_jpeg(data, "RGB", False, False, *least, reduction, decoded)
        if source is not None:
            resize(source, size, False, *scales, out=out)


def on_all_cores(work: Callable[[int, Iterable[Any]], None], items: Iterable[Any], threads: int) -> None:
    """Have `threads` threads call work(thread, items), each item going to whoever asks first."""
    shared = iter(items)
    if threads == 1:
        work(0, shared)
        return
    workers = [threading.Thread(target=work, args=(thread, shared)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _image(buffer: Any, height: int, width: int) -> torch.Tensor:
    """The first bytes of a buffer as a batch of one channels-last image."""
    flat = torch.from_numpy(buffer[: height * width * 3])
    return flat.as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))
