"""What can't be undercut: the decode and resize calls of an epoch, and nothing else.

For every sample the very calls that fastload makes, with the same sizes: simplejpeg into a used buffer, torch's
resize into a used slot. No crop is copied (the resize reads as many pixels from the buffer's start), no batch is made,
no store is read, no randomness drawn. Several threads share the samples, so that none waits for another at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch

import fastload
from fastload import decode, record
from fastload.geometry import Plan, trim
from fastload.order import SampleRandom
from pictures import expected


class _Calls(NamedTuple):
    """The arguments of one sample's calls in one thread; source is None where nothing is resized."""

    data: bytes | memoryview
    decoded: Any
    source: torch.Tensor | None
    size: tuple[int, int]
    scales: tuple[float | None, float | None]
    out: torch.Tensor


class BareCalls:
    """A contender: decode and resize every sample of a dataset as in `epoch`, on `threads` threads."""

    def __init__(self, dataset: fastload.ImageDataset, epoch: int = 0, threads: int = 1) -> None:
        self._dataset, self._epoch = dataset, epoch
        buffers = [(np.empty(1 << 26, np.uint8), np.empty(1 << 22, np.uint8)) for _ in range(threads)]
        self._samples = [self._calls(index, buffers) for index in range(len(dataset))]
        self._threads = threads

    def _calls(self, index: int, buffers: list[Any]) -> list[_Calls]:
        """The sample's calls for each thread."""
        store = self._dataset.store
        field = record.parse(store.view(index))[0]
        assert field.codec == record.JPEG, "the bare calls are for JPEGs; give a folder of nothing else"
        plan, scales = self._plan(index)
        calls = []
        for decode_buffer, slot in buffers:
            decoded = decode_buffer[: field.height * field.width * 3].reshape(field.height, field.width, 3)
            source = _image(decode_buffer, plan.box.height, plan.box.width) if plan.resizes else None
            calls.append(_Calls(field.payload, decoded, source, plan.size, scales, _image(slot, *plan.size)))
        return calls

    def _plan(self, index: int) -> Any:
        size = tuple(self._dataset.store.columns["size"][index].tolist())
        random = SampleRandom(self._dataset.seed, self._epoch, index)
        (plan,) = self._dataset.transform.plans(size, random)
        return trim(plan)

    def __call__(self) -> int:
        on_all_cores(_carry_out, self._samples, self._threads)
        return len(self._samples)

    def check(self) -> None:
        """Fail unless the last decode is Pillow's to the bit, and the resize after it made something of it."""
        index = len(self._samples) - 1
        calls = self._samples[index][0]
        _carry_out(0, [self._samples[index]])
        if record.parse(self._dataset.store.view(index))[0].orientation == 1:
            whole = Plan.whole(calls.decoded.shape[:2])
            assert np.array_equal(calls.decoded, expected(self._dataset.store, index, whole))
        assert calls.out.float().std() > 0


def _carry_out(thread: int, samples: Iterable[list[_Calls]]) -> None:
    decode_jpeg, resize = simplejpeg.decode_jpeg, decode._resize  # by the very name that fastload calls it
    for calls in samples:
        data, decoded, source, size, scales, out = calls[thread]
        decode_jpeg(data, "RGB", False, False, 0, 0, 1, decoded)
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
