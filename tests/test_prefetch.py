"""Device prefetching: the same batches, normalised, in bounded look-ahead, and nothing left behind."""

from __future__ import annotations

import _thread
import contextlib
import doctest
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import Numbers
from torch.utils.data import DataLoader, Dataset

import fastload
from fastload import prefetch, transforms
from fastload.prefetch import DevicePrefetcher
from fastload.transforms import normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Sample(NamedTuple):
    image: Any
    label: Any


class Plain:
    """An object of the user's that holds a tensor, and is none of our business."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1)


class Images(Dataset):
    """Twenty small random images with their numbers."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return random_images(seed=index)[0], index


class Gated:
    """An endless loader that counts its pulls and yields fresh batches; from pull `shut` on it waits for `gate`."""

    def __init__(self, shut: int | None = None) -> None:
        self.shut, self.gate = shut, threading.Event()
        self.pulled = 0
        self.sources: list[weakref.ref[torch.Tensor]] = []

    def __iter__(self) -> Gated:
        return self

    def __next__(self) -> torch.Tensor:
        self.pulled += 1
        if self.pulled - 1 == self.shut:
            self.gate.wait()
        batch = torch.tensor(self.pulled - 1)
        self.sources.append(weakref.ref(batch))
        return batch


def random_images(n: int = 2, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, 6, 5), dtype=torch.uint8, generator=generator)


def formula(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastload-prefetch")]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another thread will do; the limit only ends a test that has failed."""
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit, "waited 10 s in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test here ends without a thread of the prefetcher."""
    yield
    gc.collect()
    wait_for(lambda: not threads())


# --- structures


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, (dict, MappingProxyType)):
        assert type(got) is type(expected)
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got is expected


tensors = st.builds(
    lambda shape, dtype: (torch.arange(max(1, int(torch.tensor(shape).prod()))).reshape(shape or (1,)) % 7).to(dtype),
    st.lists(st.integers(1, 3), max_size=5).map(tuple),
    st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.bool]),
)
leaves = st.one_of(tensors, st.text(max_size=3), st.integers(), st.none(), st.binary(max_size=2), st.builds(Plain))
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Sample, inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict),
        st.dictionaries(st.integers(), inner, max_size=2).map(MappingProxyType),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(nested, max_size=4), channels_last=st.booleans())
def test_any_structure_passes_through_equal(batches: list[Any], channels_last: bool) -> None:
    """Batches of any nesting come out in order with the same types, equal tensors and the same other objects."""
    got = list(DevicePrefetcher(batches, "cpu", channels_last=channels_last))
    assert_same(got, batches)


def test_tensors_inside_every_container_are_converted() -> None:
    """Images are found, and normalised, in each kind of container, which keeps its type and its extras."""
    image, note, plain = random_images(), "a note", Plain()
    with_default = defaultdict(list, image=image)
    batch = {"sample": Sample(image, note), "list": [(image, plain)], "default": with_default, "n": 3}
    (got,) = DevicePrefetcher([MappingProxyType(batch)], "cpu", mean=MEAN, std=STD)

    assert type(got) is MappingProxyType
    assert type(got["sample"]) is Sample
    assert type(got["default"]) is defaultdict
    assert got["default"]["absent"] == []
    assert got["sample"].label is note
    assert got["list"][0][1] is plain
    assert got["n"] == 3
    for one in (got["sample"].image, got["list"][0][0], got["default"]["image"]):
        torch.testing.assert_close(one, formula(image).float(), rtol=1e-6, atol=1e-6)
    assert with_default["image"] is image, "the loader's own batch must stay as it was"


# --- normalisation


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)],
)
def test_normalize_is_the_formula(dtype: torch.dtype, tolerance: float, layout: torch.memory_format) -> None:
    """All 256 levels of each channel come out as ((x / 255) - mean) / std, within the rounding of the type."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1).to(memory_format=layout)
    got = normalize(levels, MEAN, STD, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got.double(), formula(levels), rtol=tolerance, atol=tolerance)


def test_normalize_takes_float_images_as_they_are() -> None:
    """Floating images are in [0, 1] units already, with or without a batch dimension."""
    images = random_images()
    got = normalize(images[0].double() / 255, MEAN, STD)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(images[0]), rtol=1e-6, atol=1e-6)


def test_normalize_without_mean_scales_to_the_unit_interval() -> None:
    """Without mean and std the 256 levels become x / 255, whatever the number of channels, both ends exact."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8)
    got = normalize(levels, None, None)
    torch.testing.assert_close(got, levels / 255, rtol=1e-6, atol=0)
    assert (got.min(), got.max()) == (0, 1)


def test_normalize_refuses_what_it_cant_do() -> None:
    """Images of another type or channel count, and constants that don't fit, are errors that name what was got."""
    with pytest.raises(TypeError, match="int64"):
        normalize(torch.zeros(3, 2, 2, dtype=torch.int64), MEAN, STD)
    with pytest.raises(ValueError, match=r"\(4, 2, 2\).*3 channels"):
        normalize(torch.zeros(4, 2, 2), MEAN, STD)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        normalize(torch.zeros(3), MEAN, STD)
    with pytest.raises(ValueError, match="both"):
        normalize(torch.zeros(3, 2, 2), MEAN, None)


def test_constants_are_built_once() -> None:
    """Normalising a second batch builds no new scale and bias."""
    normalize(random_images(), MEAN, STD)
    before = transforms._scale_and_bias.cache_info()
    normalize(random_images(seed=1), torch.tensor(MEAN, dtype=torch.float64), tuple(STD))
    after = transforms._scale_and_bias.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_only_images_are_normalised() -> None:
    """Labels, masks, videos and floating maps with other channels keep their type, values and layout."""
    others = [
        torch.arange(2),
        torch.rand(2, 5, 4, 4),
        torch.randint(0, 9, (2, 3, 4, 4)),
        random_images()[0],
        torch.rand(1, 2, 3, 4, 4),
    ]
    ((*got, image),) = DevicePrefetcher([(*others, torch.rand(2, 3, 4, 4))], "cpu", mean=MEAN, std=STD)
    assert_same(got, others)
    assert [one.stride() for one in got] == [one.stride() for one in others]
    assert image.min() < 0, "the floating image is to be normalised"
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_dtype_and_constants_together() -> None:
    """`dtype` is what images come out in: float32 by default with a mean, scaled to [0, 1] without one."""
    images, floating = random_images(), torch.rand(2, 3, 4, 4)

    def run(**options: Any) -> list[torch.Tensor]:
        return list(DevicePrefetcher([images, floating], "cpu", **options))

    assert [one.dtype for one in run()] == [torch.uint8, torch.float32]
    assert [one.dtype for one in run(mean=MEAN, std=STD)] == [torch.float32] * 2
    assert [one.dtype for one in run(mean=MEAN, std=STD, dtype=torch.bfloat16)] == [torch.bfloat16] * 2
    scaled, cast = run(dtype=torch.float16)
    torch.testing.assert_close(scaled, (images / 255).half(), rtol=1e-3, atol=0)
    assert torch.equal(cast, floating.half())


def test_wrong_channel_count_is_an_error_in_its_turn() -> None:
    """Four-dimensional uint8 images that don't have the channels of mean raise, after the good batches."""
    batches = iter(DevicePrefetcher([random_images(), random_images(channels=4)], "cpu", mean=MEAN, std=STD))
    next(batches)
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 5\).*3 channels"):
        next(batches)


def test_channels_last_copies_only_where_it_must() -> None:
    """Images come out channels-last, without a copy if they were; with False their layout stays."""
    plain, already = random_images(), random_images().contiguous(memory_format=torch.channels_last)
    got = list(DevicePrefetcher([plain, already], "cpu"))
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in got)
    assert got[1].data_ptr() == already.data_ptr()
    left = list(DevicePrefetcher([plain, already], "cpu", channels_last=False, mean=MEAN, std=STD))
    assert [one.stride() for one in left] == [plain.stride(), already.stride()]


# --- loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_stock_dataloader(workers: int) -> None:
    """A stock DataLoader gives the same batches through the prefetcher, epoch after epoch, with its length."""
    loader = DataLoader(Images(), batch_size=6, num_workers=workers, persistent_workers=workers > 0)
    expected = [[images, labels] for images, labels in loader]
    prefetcher = DevicePrefetcher(loader, "cpu", channels_last=False)
    assert len(prefetcher) == len(loader) == 4
    for _ in range(2):
        assert_same([list(batch) for batch in prefetcher], expected)
    next(iter(prefetcher))  # and again after an epoch that was cut short
    assert_same([list(batch) for batch in prefetcher], expected)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_persistent_workers_stay(kind: Any) -> None:
    """They outlive epochs, whole ones and such as are left in the middle, and go with the loader."""
    loader = fastload.DataLoader(Numbers(), 5, num_workers=2, worker_type=kind, persistent_workers=True)
    prefetcher = DevicePrefetcher(loader, "cpu")
    first = [batch.tolist() for batch in prefetcher]
    workers = loader._iterator._workers
    assert len(workers) == 2
    next(iter(prefetcher))
    assert [batch.tolist() for batch in prefetcher] == first
    assert [worker.name for worker in loader._iterator._workers] == [worker.name for worker in workers]
    assert all(worker.is_alive() for worker in workers)
    del loader, prefetcher
    gc.collect()
    for worker in workers:  # they are told to end, and not waited for
        worker.join(20)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_passes_over_the_same_persistent_workers(kind: Any) -> None:
    """There is one iterator for all of them: a later pass ends one that is under way, which says so."""
    loader = fastload.DataLoader(Numbers(), 5, num_workers=2, worker_type=kind, persistent_workers=True)
    prefetcher = DevicePrefetcher(loader, "cpu")
    first, second, third = (iter(prefetcher) for _ in range(3))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="ended by a later pass over the same persistent workers"):
        next(first)
    assert [batch.tolist() for batch in second] == [batch.tolist() for batch in loader][1:]
    assert next(third).tolist() == [0, 1, 2, 3, 4]
    assert list(first) == list(second) == []


def test_len_and_epoch_are_the_loaders() -> None:
    """`len` fails as the loader's does, and set_epoch reaches a loader that has one and no other."""

    class Epochs:
        epoch = -1

        def __iter__(self):
            return iter([self.epoch])

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    prefetcher = DevicePrefetcher(Epochs(), "cpu")
    prefetcher.set_epoch(7)
    assert list(prefetcher) == [7]
    with pytest.raises(TypeError, match="len"):
        len(prefetcher)
    DevicePrefetcher([1], "cpu").set_epoch(7)


def test_several_iterators_are_independent() -> None:
    """Two iterators over one prefetcher, taken in turns, each see every batch."""
    prefetcher = DevicePrefetcher([torch.tensor(i) for i in range(5)], "cpu")
    pairs = [(int(one), int(other)) for one, other in zip(prefetcher, prefetcher, strict=True)]
    assert pairs == [(i, i) for i in range(5)]


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_look_ahead_is_exactly_buffers(buffers: int) -> None:
    """With k batches taken the loader has been asked for k + buffers, never for more."""
    loader = Gated()
    batches = iter(DevicePrefetcher(loader, "cpu", buffers=buffers))
    for taken in range(1, 8):
        assert int(next(batches)) == taken - 1
        wait_for(lambda taken=taken: loader.pulled >= taken + buffers)
        time.sleep(0.02)  # time for one pull too many; a correct thread is asleep
        assert loader.pulled == taken + buffers


def test_a_batch_in_hand_is_the_consumers_alone() -> None:
    """On the CPU the thread keeps no reference to a batch it has handed over, even while it fetches another."""
    loader = Gated(shut=2)
    batches = iter(DevicePrefetcher(loader, "cpu", buffers=1))
    next(batches)
    batch = next(batches)
    wait_for(lambda: loader.pulled == 3)
    assert loader.sources[1]() is batch
    del batch
    assert loader.sources[1]() is None
    loader.gate.set()


# --- errors


def failing(error: BaseException):
    yield torch.tensor(0)
    yield torch.tensor(1)
    raise error


class Once:
    """A loader whose iterator is given."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize("error", [KeyError("lost"), KeyboardInterrupt("user")])
def test_loader_error_is_raised_at_its_batch(error: BaseException) -> None:
    """The good batches come first, then the very error with its traceback, then the end."""
    batches = iter(DevicePrefetcher(Once(failing(error)), "cpu", buffers=4))
    assert [int(next(batches)), int(next(batches))] == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error
    assert any(entry.name == "failing" for entry in caught.traceback)
    assert not threads()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)


def test_error_is_freed_at_once() -> None:
    """An error that was caught is freed without the collector, and with it what its traceback holds."""
    errors = []

    class Error(Exception):
        def __init__(self) -> None:
            errors.append(weakref.ref(self))

    class Failing:
        def __iter__(self):
            yield 0
            raise Error

    gc.disable()
    try:
        with contextlib.suppress(Error):
            list(DevicePrefetcher(Failing(), "cpu"))
        assert errors[0]() is None
    finally:
        gc.enable()


def test_end_is_for_good() -> None:
    """After the last batch the thread is gone and next keeps raising StopIteration."""
    batches = iter(DevicePrefetcher([1], "cpu"))
    assert list(batches) == [1]
    assert not threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_error_of_iter_is_raised_in_the_caller() -> None:
    """A loader that can't be iterated fails when the first batch is asked for, and starts no thread."""
    batches = iter(DevicePrefetcher(3, "cpu"))
    with pytest.raises(TypeError, match="not iterable"):
        next(batches)
    assert not threads()


def test_nothing_begins_before_the_first_batch_is_asked_for() -> None:
    """Some training loops call `iter` early, choose the epoch after it, or call it twice."""
    begun: list[int] = []

    class Loader:
        def __iter__(self) -> Iterator[int]:
            begun.append(1)
            return iter([7])

    prefetcher = DevicePrefetcher(Loader(), "cpu")
    iter(prefetcher)
    batches = iter(prefetcher)
    assert not begun
    assert not threads()
    assert list(batches) == [7]
    assert begun == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffers": 0}, "buffers is 0.*at least 1"),
        ({"mean": MEAN}, "std is None.*both"),
        ({"std": STD}, "mean is None.*both"),
        ({"mean": MEAN, "std": STD[:2]}, "one number per channel"),
        ({"mean": [], "std": []}, "one number per channel"),
        ({"mean": [0.5], "std": [0.0]}, r"std is \[0.0\].*positive"),
        ({"mean": [0.5], "std": [float("nan")]}, "positive"),
        ({"dtype": torch.uint8}, "torch.uint8.*floating"),
        ({"device": "meta"}, "meta.*cpu, cuda"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    """Arguments that make no sense are refused at construction, naming what was got and what is allowed."""
    with pytest.raises(ValueError, match=message):
        DevicePrefetcher([], **{"device": "cpu", **options})


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), (0, 0), (torch.device("cuda:2"), 2)])
def test_missing_cuda_device(device: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that isn't there is a RuntimeError that says how many there are and what to do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(RuntimeError, match=f"sees {count} CUDA devices: pass None"):
        DevicePrefetcher([], device)


def test_device_none_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device=None` is the CPU where there is no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert DevicePrefetcher([], None).device == torch.device("cpu")


# --- shutdown


def endless(closed: list[bool]):
    try:
        while True:
            yield torch.zeros(1)
    finally:
        closed.append(True)


def test_break_leaves_nothing_behind() -> None:
    """Leaving the loop stops the thread and closes the loader's iterator before the next line runs."""
    closed: list[bool] = []
    for _ in DevicePrefetcher(Once(endless(closed)), "cpu"):
        assert len(threads()) == 1
        break
    assert not threads()
    assert closed


def test_close_ends_the_iteration() -> None:
    """`close` stops the thread, drops what was fetched and ends the iteration; twice is fine."""
    loader = Gated()
    batches = iter(DevicePrefetcher(loader, "cpu"))
    next(batches)
    batches.close()
    batches.close()
    assert not threads()
    assert all(source() is None for source in loader.sources)
    assert list(batches) == []


def test_close_wakes_a_waiting_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer in another thread that waits for a stuck loader ends when the iterator is closed under it."""
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.01)
    loader = Gated(shut=0)
    batches = iter(DevicePrefetcher(loader, "cpu"))
    got: list[Any] = []
    consumer = threading.Thread(target=lambda: got.append(list(batches)))
    consumer.start()
    wait_for(lambda: loader.pulled == 1)
    batches.close()
    consumer.join(10)
    assert got == [[]]
    loader.gate.set()


def test_garbage_collection_stops_the_thread() -> None:
    """An iterator that was dropped without close, even in a reference cycle, takes its thread along."""
    batches = iter(DevicePrefetcher(Gated(), "cpu"))
    next(batches)
    batches.itself = batches
    del batches
    gc.collect()
    assert not threads()


def test_garbage_collection_inside_its_own_thread() -> None:
    """The collector may run in the very thread that the dropped iterator owns: it ends, it doesn't wait for itself."""
    go = threading.Event()

    def collecting():
        yield 0
        go.wait()
        gc.collect()
        yield 1

    batches = iter(DevicePrefetcher(Once(collecting()), "cpu", buffers=1))
    next(batches)
    ref = weakref.ref(batches)
    batches.itself = batches
    gc.disable()
    try:
        del batches
        go.set()
        wait_for(lambda: not threads())
    finally:
        gc.enable()
    assert ref() is None


def test_ctrl_c_wakes_a_waiting_consumer() -> None:
    """An interrupt reaches a consumer that waits for a slow loader, which it couldn't in one endless wait."""
    asked, gate = threading.Event(), threading.Event()

    def stuck():
        asked.wait()
        time.sleep(0.05)  # time for the consumer to fall asleep
        _thread.interrupt_main()
        gate.wait()
        yield 0

    batches = iter(DevicePrefetcher(Once(stuck()), "cpu"))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interrupt comes some time after the first line
        asked.set()
        next(batches)
    gate.set()
    assert next(batches) == 0, "the iterator itself is unharmed"


def test_a_dead_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the thread is gone without a word, as after a fork, next raises and doesn't wait for ever."""
    monkeypatch.setattr(prefetch, "_produce", lambda *_: None)
    batches = iter(DevicePrefetcher([1], "cpu"))
    with pytest.raises(RuntimeError, match="thread is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_interpreter_exit_in_mid_epoch() -> None:
    """A script that ends with a live iterator exits cleanly, and the loader's iterator is closed on the way."""
    script = """
from fastload.prefetch import DevicePrefetcher
class Loader:
    def __iter__(self):
        try:
            while True:
                yield 0
        finally:
            print("closed")
batches = iter(DevicePrefetcher(Loader(), "cpu"))
print(next(batches))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["0", "closed"], "")


def test_docstring_examples() -> None:
    """The examples in the docstrings run and print what they say."""
    for module, least in ((prefetch, 2), (transforms, 1)):
        results = doctest.testmod(module)
        assert results.attempted >= least
        assert results.failed == 0


# --- the CUDA protocol, played on the CPU


class FakeEvent:
    """An event that is reached when the test says so."""

    device = torch.device("cuda:0")
    consumers: list[FakeEvent] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, blocking: bool = False) -> None:
        self.reached = threading.Event()
        if blocking:
            self.consumers.append(self)

    def record(self, stream: FakeStream) -> None:
        stream.log.append(("record", self))

    def synchronize(self) -> None:
        self.reached.wait()


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.log: list[tuple[str, Any]] = []

    def record_event(self) -> FakeEvent:
        return FakeEvent()

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(("wait", event))

    def wait_stream(self, stream: FakeStream) -> None:
        self.log.append(("wait", stream))

    def synchronize(self) -> None:
        self.log.append(("synchronize", None))


@pytest.fixture
def consumer_stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Make torch.cuda a stage set: its streams keep a log, its device is the CPU."""
    consumer = FakeStream()
    to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, *args, non_blocking=False, **options: tensor.clone() if non_blocking else to(tensor, **options),
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.log.append(("tensor", id(tensor))))
    FakeEvent.consumers.clear()
    return consumer


def test_cuda_waits_records_and_then_gives_the_slot_back(consumer_stream: FakeStream) -> None:
    """The consumer's stream waits for the batch, owns each of its tensors, and only then marks its own place."""
    batches = iter(DevicePrefetcher([(torch.zeros(1), {"b": torch.ones(1)})], "cuda"))
    first, rest = next(batches)
    assert batches._link.thread.daemon
    *_, wait, one, other, record = consumer_stream.log
    assert (wait[0], record) == ("wait", ("record", FakeEvent.consumers[0]))
    assert [one, other] == [("tensor", id(first)), ("tensor", id(rest["b"]))]
    FakeEvent.consumers[0].reached.set()
    assert list(batches) == []


def test_cuda_look_ahead_and_host_batches_follow_the_device(consumer_stream: FakeStream) -> None:
    """The loader is asked for more, and a host batch let go, only when the device has got past a batch."""
    loader = Gated()
    batches = iter(DevicePrefetcher(loader, "cuda", buffers=2))
    for _ in range(2):  # the host runs ahead: both batches taken, the device at neither
        next(batches)
    wait_for(lambda: loader.pulled == 2)
    time.sleep(0.02)  # time for one pull too many
    assert loader.pulled == 2
    assert [source() is None for source in loader.sources] == [False, False]
    for k in range(2):
        FakeEvent.consumers[k].reached.set()
        wait_for(lambda k=k: loader.pulled == 3 + k)
        wait_for(lambda k=k: loader.sources[k]() is None)
        assert loader.sources[1 + k]() is not None


def test_cuda_copies_are_over_before_the_loader_is_closed(consumer_stream: FakeStream) -> None:
    """At the end the thread waits for its copies before it closes the loader, which may own the pinned memory."""
    order: list[str] = []

    def loader():
        try:
            yield torch.zeros(1)
        finally:
            order.append("closed")

    class Closing:
        def __init__(self) -> None:
            self.inner = loader()

        def __next__(self):
            return next(self.inner)

        def __iter__(self):
            return self

        def close(self) -> None:
            order.append("close")

    prefetcher = DevicePrefetcher(Closing(), "cuda")
    prefetcher._stream.synchronize = lambda: order.append("synchronize")
    for _ in prefetcher:
        FakeEvent.consumers[0].reached.set()
    assert order[-2:] == ["synchronize", "close"]


# --- on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pinned", [False, True])
def test_gpu_equals_cpu(dtype: torch.dtype | None, layout: torch.memory_format, pinned: bool) -> None:
    """Nested batches come out on the device as they do on the CPU, in values, types and layout."""
    batches = [
        {"image": random_images(4, seed=i).to(memory_format=layout), "rest": [torch.arange(4), "text"]}
        for i in range(6)
    ]
    if pinned:
        batches = [{"image": b["image"].pin_memory(), "rest": b["rest"]} for b in batches]
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "dtype": dtype}
    expected = list(DevicePrefetcher(batches, "cpu", **options))
    got = list(DevicePrefetcher(batches, None, **options))
    for one, other in zip(got, expected, strict=True):
        assert one["image"].device == torch.device("cuda", torch.cuda.current_device())
        assert one["rest"][0].is_cuda
        assert one["rest"][1] is other["rest"][1]
        assert one["image"].dtype == other["image"].dtype
        assert one["image"].stride() == other["image"].stride()
        tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(one["image"].cpu(), other["image"], rtol=tolerance, atol=tolerance)
        assert torch.equal(one["rest"][0].cpu(), other["rest"][0])


def sleepy(monkeypatch: pytest.MonkeyPatch, cycles: int) -> None:
    """Have the copy stream idle at random before and after each normalisation: the next copy is late too."""
    draw = random.Random(0)

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        torch.cuda._sleep(draw.randrange(1, cycles))
        result = normalize(*args, **options)
        torch.cuda._sleep(draw.randrange(1, cycles))
        return result

    monkeypatch.setattr(prefetch, "normalize", slow)


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("slow", ["copy", "consumer", "both"])
def test_gpu_streams_are_in_order(slow: str, own_stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums enqueued right after next, of batches dropped at once, are right whichever stream is late."""
    if slow != "consumer":
        sleepy(monkeypatch, 2_000_000)
    draw = random.Random(1)
    batches = [torch.full((16, 3, 64, 64), i, dtype=torch.uint8) for i in range(60)]
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    sums = []
    with torch.cuda.stream(stream):
        for images in DevicePrefetcher(batches, "cuda", dtype=torch.float32):
            if slow != "copy":
                torch.cuda._sleep(draw.randrange(1, 2_000_000))
            sums.append((images.amin() * 255, images.amax() * 255))
            del images  # its memory is free for the copy stream, were it not for record_stream
        got = [(round(low.item()), round(high.item())) for low, high in sums]
    assert got == [(i, i) for i in range(60)]


@pytest.mark.gpu
def test_gpu_reused_pinned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that writes into `buffers` pinned batches in turn never disturbs a copy that is late."""
    sleepy(monkeypatch, 2_000_000)

    class Ring:
        def __init__(self) -> None:
            self.ring = [torch.empty(32, 3, 64, 64, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

        def __iter__(self):
            for i in range(100):
                yield self.ring[i % 2].fill_(i)

    got = [images.mul(255).round() for images in DevicePrefetcher(Ring(), 0, buffers=2, dtype=torch.float32)]
    assert [(one.amin().item(), one.amax().item()) for one in got] == [(i, i) for i in range(100)]


@pytest.mark.gpu
def test_gpu_memory_is_flat() -> None:
    """Over 200 batches in four epochs, with the host far ahead of the device, memory stays at a few batches."""
    batch = torch.zeros(32, 3, 128, 128, dtype=torch.uint8)
    one_batch = batch.numel() * (4 + 1)  # float32 and the uint8 that it came from
    prefetcher = DevicePrefetcher([batch] * 50, "cuda", mean=MEAN, std=STD, buffers=2)
    base, reserved = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        for images in prefetcher:
            torch.cuda._sleep(5_000_000)
            images.add_(1)
        del images
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    active = torch.cuda.memory_stats()["active_bytes.all.peak"]  # with what is freed but still in use on a stream
    assert active - base <= 6 * one_batch
    assert max(reserved) - reserved[0] <= 20 * 2**20  # one segment of the allocator
    assert torch.cuda.memory_allocated() - base < one_batch


@pytest.mark.gpu
def test_gpu_batches_that_are_there_already() -> None:
    """Tensors that live on the device, or are made there inside the loader, are used after they are filled."""
    resident = torch.zeros(8, 3, 64, 64, device="cuda")
    torch.cuda._sleep(20_000_000)
    resident.fill_(1)

    class Making:
        def __iter__(self):
            for i in range(20):
                torch.cuda._sleep(1_000_000)
                yield resident, torch.full((8, 3, 64, 64), i, device="cuda")

    prefetcher = DevicePrefetcher(Making(), "cuda", mean=[0.0] * 3, std=[0.5] * 3)
    got = [(one.amin(), one.amax(), other.amin(), other.amax()) for one, other in prefetcher]
    assert [tuple(v.item() for v in values) for values in got] == [(2, 2, 2 * i, 2 * i) for i in range(20)]


@pytest.mark.gpu
def test_gpu_break_in_mid_epoch() -> None:
    """Leaving the loop with copies under way stops the thread and gives the memory back."""
    base = torch.cuda.memory_allocated()
    for _ in range(5):
        for images in DevicePrefetcher([random_images(64)] * 100, "cuda", mean=MEAN, std=STD):
            torch.cuda._sleep(1_000_000)
            images.add_(1)
            break
        assert not threads()
    del images
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - base < 4096  # the constants
