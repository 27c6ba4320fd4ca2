"""Memory that is used again: never while anybody can see it, always when nobody can."""

from __future__ import annotations

import gc
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from fastload.buffers import BatchBuffers, scratch

SHAPE = (6, 8, 10, 3)

HOLDS: dict[str, Callable[[torch.Tensor, Any], Any]] = {
    "tensor": lambda tensor, array: tensor,
    "array": lambda tensor, array: array,
    "slice": lambda tensor, array: tensor[2:4],
    "sample": lambda tensor, array: tensor[3],
    "permuted": lambda tensor, array: tensor.permute(0, 3, 1, 2),
    "split": lambda tensor, array: tensor.split(2)[1],
    "flat view": lambda tensor, array: tensor.view(-1)[100:200],
    "as strided": lambda tensor, array: tensor.as_strided((4,), (7,)),
    "numpy of a slice": lambda tensor, array: tensor[1:3].numpy(),
    "slice of numpy": lambda tensor, array: tensor.numpy()[::2, 1:],
    "array slice": lambda tensor, array: array[5:],
    "array row": lambda tensor, array: array[1, 2, 3],
    "array of floats": lambda tensor, array: array.reshape(-1)[:64].view(np.float32).reshape(4, 4),
    "transposed": lambda tensor, array: array.transpose(0, 3, 1, 2)[1:],
    "tensor of an array slice": lambda tensor, array: torch.from_numpy(array[2:5]),
    "memoryview": lambda tensor, array: memoryview(array)[1:2],
    "dlpack": lambda tensor, array: np.from_dlpack(tensor[1:]),
    "storage": lambda tensor, array: tensor.untyped_storage(),
    "other dtype": lambda tensor, array: (
        tensor.view(torch.int16)[..., :1, :] if tensor.shape[-1] % 2 == 0 else tensor[1:]
    ),
    "detached": lambda tensor, array: tensor.detach()[0, 0],
}


def contents(held: Any) -> list[int]:
    """The bytes that a held object can see, whatever it is."""
    if isinstance(held, torch.UntypedStorage):
        return list(held)
    if isinstance(held, torch.Tensor):
        held = held.contiguous().numpy()
    return np.frombuffer(np.ascontiguousarray(held).tobytes(), np.uint8).tolist()


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("shape", [(1,), SHAPE, (0, 4, 4, 3), (3, 1, 1, 3)])
def test_tensor_and_array_share_their_bytes(shape: tuple[int, ...]) -> None:
    """uint8 of the shape that was asked for, writable and contiguous, two views of one memory."""
    tensor, array = BatchBuffers().take(shape)
    assert tensor.shape == array.shape == shape
    assert tensor.dtype == torch.uint8
    assert array.dtype == np.uint8
    assert tensor.is_contiguous()
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 7
    assert bool((tensor == 7).all())


@pytest.mark.parametrize("hold", HOLDS)
def test_memory_is_not_lent_while_any_view_lives(hold: str) -> None:
    """Neither the tensor nor the array is left, only something made of them: what it sees never changes."""
    buffers = BatchBuffers()
    tensor, array = buffers.take(SHAPE)
    array[...] = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    start, end = address(array), address(array) + array.nbytes
    held = HOLDS[hold](tensor, array)
    before = contents(held)
    del tensor, array
    for value in range(4):
        other, other_array = buffers.take(SHAPE)
        assert not start <= address(other_array) < end
        other.fill_(value)
        del other, other_array
    assert contents(held) == before


@pytest.mark.parametrize("hold", HOLDS)
def test_memory_is_lent_again_when_the_last_view_is_gone(hold: str) -> None:
    """The same bytes come back at the next call, without a run of the garbage collector."""
    buffers = BatchBuffers()
    tensor, array = buffers.take(SHAPE)
    first = address(array)
    held = HOLDS[hold](tensor, array)
    del tensor, array
    gc.disable()
    try:
        other = buffers.take(SHAPE)
        assert address(other[1]) != first
        del held
        assert address(buffers.take(SHAPE)[1]) == first
    finally:
        gc.enable()


def test_ctrl_c_is_not_lost_when_memory_comes_back() -> None:
    """Python swallows it in functions that run when an object goes: there are none."""
    tensor, array = BatchBuffers().take(SHAPE)
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del tensor, array
    finally:
        sys.setprofile(None)
    assert called == []


@pytest.mark.parametrize("seed", range(5))
def test_random_holds_and_releases(seed: int) -> None:
    """Batches of a few sizes, held as one thing or another for a while: each keeps its pattern until it is let go."""
    rng = random.Random(seed)
    buffers = BatchBuffers()
    held: list[tuple[Any, list[int]]] = []
    addresses = set()
    for _ in range(300):
        shape = rng.choice([SHAPE, SHAPE, (4, 8, 10, 3), (2, 30, 8, 3)])
        tensor, array = buffers.take(shape)
        addresses.add(address(array))
        array[...] = np.frombuffer(rng.randbytes(array.nbytes), np.uint8).reshape(shape)
        names = [
            name for name in HOLDS if shape == SHAPE or name in ("tensor", "array", "permuted", "storage", "slice")
        ]
        for name in rng.sample(names, rng.randint(0, 2)):
            view = HOLDS[name](tensor, array)
            held.append((view, contents(view)))
        view = None
        del tensor, array
        while len(held) > 12 or (held and rng.random() < 0.3):
            view, pattern = held.pop(rng.randrange(len(held)))
            assert contents(view) == pattern
            view = None
    assert all(contents(view) == pattern for view, pattern in held)
    assert len(addresses) < 200


def test_another_size_gets_memory_of_its_own() -> None:
    """What comes back from a larger or smaller batch is not handed out as this one's."""
    buffers = BatchBuffers()
    for shape in ((4, 4), (2, 2), (8, 8), (4, 4)):
        tensor, array = buffers.take(shape)
        assert (tensor.numel(), array.size) == (shape[0] * shape[1],) * 2
        assert tensor.untyped_storage().nbytes() == array.nbytes
        del tensor, array


def test_no_more_than_eight_free_buffers_are_kept() -> None:
    """A burst of twenty batches doesn't keep the memory of twenty."""
    buffers, size = BatchBuffers(), 1 << 20
    tracemalloc.start()
    try:
        burst = [buffers.take((size,)) for _ in range(20)]
        assert tracemalloc.get_traced_memory()[0] > 20 * size
        burst.clear()
        assert 7.5 * size < tracemalloc.get_traced_memory()[0] < 8.5 * size
        del buffers
        assert tracemalloc.get_traced_memory()[0] < 0.5 * size
    finally:
        tracemalloc.stop()


def test_what_was_lent_outlives_the_lender() -> None:
    """The tensor is its holder's, also when the buffers themselves are gone."""
    tensor, array = BatchBuffers().take(SHAPE)
    tensor.fill_(9)
    gc.collect()
    del array
    assert bool((tensor == 9).all())


def test_threads_take_and_release_at_once() -> None:
    """Four threads lend from one store, hand on to each other and let go: no two ever write to the same bytes."""
    buffers = BatchBuffers()
    passed: list[tuple[Any, int]] = []
    lock = threading.Lock()
    start = threading.Barrier(4)

    def work(thread: int) -> int:
        rng = random.Random(thread)
        start.wait()
        for step in range(400):
            value = (thread * 61 + step) % 256
            tensor, array = buffers.take(SHAPE)
            array[...] = value
            view = tensor[rng.randrange(6) :]
            del tensor, array
            with lock:
                passed.append((view, value))
                view, value = passed.pop(rng.randrange(len(passed))) if len(passed) > 6 else (view, value)
            assert bool((view == value).all())
            del view
        return thread

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(work, range(4))) == [0, 1, 2, 3]
    assert all(bool((view == value).all()) for view, value in passed)


@pytest.mark.gpu
def test_pinned_memory_is_page_locked() -> None:
    """On request, with the tensor and the array on the same bytes."""
    tensor, array = BatchBuffers().take(SHAPE, "pinned")
    assert tensor.is_pinned()
    array[...] = 3
    assert bool((tensor == 3).all())


# ---- scratch


def test_scratch_is_used_again() -> None:
    """The same memory for the same purpose, also for less of it; more gets new memory, which is then kept."""
    first = scratch("test again", 100)
    assert (first.dtype, first.shape) == (np.uint8, (100,))
    assert address(scratch("test again", 60)) == address(first)
    assert scratch("test again", 60).shape == (60,)
    larger = scratch("test again", 1000)
    assert larger.shape == (1000,)
    assert address(scratch("test again", 100)) == address(larger)


def test_scratch_has_one_buffer_for_each_purpose() -> None:
    """Two purposes never share their bytes."""
    one, two = scratch("test one", 64), scratch("test two", 64)
    one[...], two[...] = 1, 2
    assert one.tolist() == [1] * 64


def test_scratch_belongs_to_its_thread() -> None:
    """What one thread writes no other one sees, while all of them are alive."""
    barrier = threading.Barrier(4)

    def work(value: int) -> bool:
        buffer = scratch("test thread", 4096)
        barrier.wait()
        buffer[...] = value
        barrier.wait()
        return bool((buffer == value).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_an_enormous_scratch_is_not_kept() -> None:
    """Beyond 256 MiB memory is given back; what was kept before stays."""
    kept = scratch("test large", 1000)
    enormous = scratch("test large", (256 << 20) + 1)
    assert enormous.nbytes == (256 << 20) + 1
    assert address(scratch("test large", 1000)) == address(kept)
