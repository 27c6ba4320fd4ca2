"""Batches on the device before they are asked for.

Each iterator of a `DevicePrefetcher` owns one thread, and two queues join them:

    thread:   take a slot -> next(loader) -> pin -> copy -> normalise, cast, channels-last -> hand over with an event
    consumer: take a batch -> let its stream wait on the event -> give a slot back, with an event of its own

There are `buffers` slots, so never more than `buffers` batches are fetched and not yet taken. On CUDA the event in a
slot stands behind all that the consumer had enqueued, and the thread waits for it before it uses the slot. So
- look-ahead is measured against the device, not against a host that runs ahead of it: batches on the device are
  about `buffers` + 2 at most, the one in use among them;
- a host batch is let go when the copy out of it is over, whoever owns its pinned memory, and a loader whose `next`
  writes into `buffers` pinned batches in turn never writes into one that is being copied;
- the host waits for nothing but the loader. The device waits for nothing but the copy of the batch in hand.

What all of this obeys: the thread never refers to the iterator, so that one that is dropped (`break`, an exception,
Ctrl-C) is collected and stops its thread. The loader's iterator is made in the caller's thread (where torch's
DataLoader installs its signal handler), when the first batch is asked for: some training loops call `iter` long before,
and choose the epoch after it. After that the thread alone uses and closes it. With persistent workers there is one
iterator for all passes: it stays open, and a later pass ends the thread of one that is under way.

Costs: a copy in host memory for batches that aren't pinned; up to 5 s in `close` while the loader is inside a slow
batch; and a loader that works in this process (`num_workers=0`) draws from torch's global generator at moments that
the consumer doesn't control, so seed it with a generator of its own.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .transforms import PIXELS, check_mean_and_std, full_scale, normalize

T = TypeVar("T")

_THREAD_NAME = "fastload-prefetch"
_WAIT_SECONDS = 1.0  # an untimed wait ignores Ctrl-C on Windows, and would outlast a thread that died
_JOIN_SECONDS = 5.0
_OVERTAKEN = "ended by a later pass over the same persistent workers; finish one first, or leave them out"


class DevicePrefetcher(Generic[T]):
    """Iterate over a loader's batches on `device`, the images normalised there, the next batches under way.

    Tensors are found at any depth of tuples, named tuples, lists, dicts and other mappings, which are rebuilt as
    their own type; anything else is handed on as the same object. Every tensor goes to the device. *Images* are the
    4-dimensional uint8, uint16, int16 and floating ones, `(N, C, H, W)`; given `mean`, int16 and floating ones only
    where C is `len(mean)`.
    Only images are normalised, cast and laid out. On the CPU the same thread does the same, with the same results.

    Args:
        loader: any iterable of batches, a stock `torch.utils.data.DataLoader` too; iterated anew each epoch.
        device: "cpu", "cuda", "cuda:1", a CUDA index, or None for CUDA where there is some and the CPU elsewhere.
        buffers: batches fetched ahead of the one in hand; more only help a loader of varying speed.
        mean, std: one number per channel in units of [0, 1], as in torchvision: uint8 is divided by 255 first, uint16
            by 65535. int16 is taken as it is, as floating images are.
        dtype: floating type of the images. None is float32 with `mean` and no cast without. With a dtype and no
            `mean`, uint8 and uint16 are scaled to [0, 1] as by torchvision's `ToDtype(dtype, scale=True)`.
        channels_last: lay images out as `torch.channels_last` (free if they are); False keeps their layout.

    `len` and the state are the loader's: of what the consumer has, whatever was fetched. Iterators are as independent
    as the loader's own. An error in the loader is raised by `next` in its turn, as the same object; after that or the
    end, `next` raises StopIteration.

    Raises:
        ValueError: an argument makes no sense; while iterating: uint8 or uint16 images without `len(mean)` channels.
        RuntimeError: there is no such CUDA device.

    >>> batches = [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))]
    >>> for images, labels in DevicePrefetcher(batches, "cpu", mean=[0.5] * 3, std=[0.5] * 3):
    ...     print(images.dtype, images.min().item(), labels.tolist())
    torch.float32 -1.0 [0, 1]
    """

    def __init__(
        self,
        loader: Iterable[T],
        device: torch.device | str | int | None,
        *,
        buffers: int = 2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        if buffers < 1:
            raise ValueError(f"buffers is {buffers}, but must be at least 1; the default is 2")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, but must be a floating type, or None for no cast")
        self._mean_and_std = check_mean_and_std(mean, std)
        self._dtype = torch.float32 if dtype is None and mean is not None else dtype
        self._memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.loader = loader
        self.buffers = buffers
        self.device = _resolve(device)
        self._place = _Place()
        self._kept: _Link | None = None
        # One stream for all iterators: the allocator keeps memory per stream, and each new one would add to it.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def sampler(self) -> Any:
        """The loader's sampler, None where it has none; training loops choose the epoch by it."""
        return getattr(self.loader, "sampler", None)

    def __iter__(self) -> PrefetchIterator[T]:
        return PrefetchIterator(self._start, self.buffers)

    def _start(self, link: _Link, place: _Place) -> None:
        """Begin a pass over the loader, in a thread of its own."""
        if self._stream is not None:  # what fills a loader's tensors on the device comes before their use
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        kept = getattr(self.loader, "persistent_workers", False)
        if kept:
            self._take_over(link)
        source = iter(self.loader)
        state_of = getattr(self.loader, "progress" if hasattr(self.loader, "with_failures") else "state_dict", None)
        place.state = state_of and state_of()
        self._place = place
        link.thread = threading.Thread(
            target=_produce,
            args=(source, self._prepare, self._stream, state_of, link, kept),
            name=_THREAD_NAME,
            daemon=True,
        )
        link.thread.start()

    def _take_over(self, link: _Link) -> None:
        """Have the loader's iterator, of which there is one for all passes, to ourselves."""
        before, self._kept = self._kept, link
        if before is not None and before.thread is not None and before.thread.is_alive():
            _stop(before, RuntimeError(_OVERTAKEN))
            while before.thread.is_alive():  # in a slow batch, for which the workers have to be waited anyway
                before.thread.join(_WAIT_SECONDS)

    def __len__(self) -> int:
        return len(cast(Sized, self.loader))

    def set_epoch(self, epoch: int) -> None:
        """Call the loader's `set_epoch`; does nothing where it has none."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
            self._place = _Place()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state at the batch that was handed over last, whatever was fetched since; see `DataLoader`.

        Raises:
            TypeError: the loader has no state.
        """
        place = self._place.state
        if place is not None and hasattr(self.loader, "with_failures"):
            place = self.loader.with_failures(place)
        state: dict[str, Any] = self._stateful().state_dict() if place is None else place
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iterator go on where `state` was made.

        Raises:
            TypeError: the loader has no state.
            ValueError: the state is another loader's.
        """
        self._stateful().load_state_dict(state)
        self._place = _Place()

    def _stateful(self) -> Any:
        if hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict"):
            return self.loader
        raise TypeError(
            f"{type(self.loader).__name__} has no state_dict and load_state_dict; prefetch from a fastload.DataLoader"
        )

    def _prepare(self, batch: T) -> _Ready:
        tensors: list[Tensor] = []

        def convert(tensor: Tensor) -> Tensor:
            tensors.append(self._convert(tensor))
            return tensors[-1]

        prepared = _map_tensors(batch, convert)
        return _Ready(prepared, tensors, None if self._stream is None else self._stream.record_event())

    def _convert(self, tensor: Tensor) -> Tensor:
        on_cuda = self._stream is not None
        if on_cuda and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        tensor = tensor.to(self.device, non_blocking=on_cuda)
        mean, std = self._mean_and_std or (None, None)
        scaled = full_scale(tensor.dtype) > 1
        if tensor.dim() != 4 or not (tensor.dtype in PIXELS or tensor.is_floating_point()):
            return tensor
        if not scaled and mean is not None and tensor.shape[1] != len(mean):
            return tensor
        if self._dtype is None:
            return tensor.to(tensor.dtype, memory_format=self._memory_format)
        return normalize(tensor, mean, std, self._dtype, memory_format=self._memory_format)


class PrefetchIterator(Generic[T]):
    """One pass over a `DevicePrefetcher`, for one consumer; `close` ends it early, as dropping it does."""

    def __init__(self, start: Callable[[_Link, _Place], None], buffers: int) -> None:
        self._start, self._link, self._place = start, _Link(buffers), _Place()
        self._finalizer = weakref.finalize(self, _stop, self._link)

    def __iter__(self) -> PrefetchIterator[T]:
        return self

    def __next__(self) -> T:
        if not self._finalizer.alive:
            raise StopIteration
        if self._link.thread is None:
            self._start(self._link, self._place)
        item, self._place.state = self._receive()
        if isinstance(item, BaseException):
            self.close()
            try:
                raise item
            finally:
                del item  # else this frame and the traceback hold each other
        done = None
        if item.event is not None:
            stream = torch.cuda.current_stream(item.event.device)
            stream.wait_event(item.event)
            for tensor in item.tensors:
                tensor.record_stream(stream)
            done = torch.cuda.Event(blocking=True)  # the thread is to sleep, not spin
            done.record(stream)
        self._link.slots.put(done)
        return cast(T, item.batch)

    def close(self) -> None:
        """Stop the thread and drop the loader's iterator; `next` then ends. More calls do nothing."""
        self._finalizer()

    def _receive(self) -> _Item:
        while True:
            try:
                return self._link.ready.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                thread = self._link.thread
                if not (thread and thread.is_alive()) and self._link.ready.empty():
                    gone = RuntimeError("the prefetch thread is gone (none survives a fork): iterate anew")
                    return gone, self._place.state


class _Ready(NamedTuple):
    """A batch for the consumer; on CUDA the event is reached when the work on its tensors is done."""

    batch: Any
    tensors: list[Tensor]
    event: torch.cuda.Event | None


_Item = tuple[_Ready | BaseException, dict[str, Any] | None]
"""A batch, or the exception that comes last, and the loader's state after it."""


class _Place:
    """Where the consumer is: the loader's state after the last batch that it took."""

    state: dict[str, Any] | None = None


class _Link:
    """All that a thread and its iterator share. A SimpleQueue may be put to by a finalizer, whatever it interrupts."""

    def __init__(self, buffers: int) -> None:
        self.closed = False
        self.thread: threading.Thread | None = None
        self.slots: queue.SimpleQueue[torch.cuda.Event | None] = queue.SimpleQueue()
        self.ready: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        for _ in range(buffers):
            self.slots.put(None)


def _produce(
    source: Iterator[T],
    prepare: Callable[[T], _Ready],
    stream: torch.cuda.Stream | None,
    state_of: Callable[[], dict[str, Any]] | None,
    link: _Link,
    kept: bool,
) -> None:
    """Fetch and prepare a batch for each slot until the loader ends or fails or the link is closed: the thread.

    kept: whether the loader keeps its iterator, and the workers with it.
    """
    held: deque[T] = deque()  # host batches with copies out of them under way
    try:
        if stream is not None:
            torch.cuda.set_stream(stream)  # sets the device too, and for the thread's whole life
        while True:
            done = link.slots.get()
            if link.closed:
                break
            if done is not None:
                done.synchronize()
                held.popleft()
            batch = next(source)  # StopIteration travels like any other exception
            state = state_of and state_of()
            link.ready.put((prepare(batch), state))
            if stream is not None:
                held.append(batch)
            del batch  # a loader may be waiting to use its memory again
    except BaseException as error:
        link.ready.put((error, state_of and state_of()))
    finally:
        if stream is not None:
            stream.synchronize()
        held.clear()
        if hasattr(source, "close") and not kept:
            source.close()


def _stop(link: _Link, last: Exception | None = None) -> None:
    """End the thread and drop what it fetched: for `close`, the collector, the interpreter's exit or a later pass.

    last: what is raised where the next batch is asked for, instead of StopIteration.
    """
    link.closed = True
    link.slots.put(None)
    thread = link.thread
    if thread and thread.is_alive() and thread is not threading.current_thread():  # the collector runs in any thread
        thread.join(_JOIN_SECONDS)
    with contextlib.suppress(queue.Empty):
        while True:
            link.ready.get_nowait()
    link.ready.put((last or StopIteration(), None))  # for a consumer that waits while another thread closes


def _map_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild nested containers with every tensor converted; anything else stays the same object."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, Mapping):
        items = {key: _map_tensors(item, convert) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]  # such as MappingProxyType
        clone = copy.copy(value)  # keeps what a type adds, such as a default factory
        clone.update(items)
        return clone
    if isinstance(value, (tuple, list)):
        parts = [_map_tensors(item, convert) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _resolve(device: torch.device | str | int | None) -> torch.device:
    """Check the device and give "cuda" an index, because the thread has a current device of its own."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda":
        raise ValueError(f"device is {device!r}, but must be cpu, cuda, a CUDA index or None")
    count = torch.cuda.device_count()
    if (wanted.index or 0) >= count:
        raise RuntimeError(
            f"device is {device!r}, but torch {torch.__version__} sees {count} CUDA devices: pass None to use CUDA "
            "only where there is some, or check nvidia-smi, CUDA_VISIBLE_DEVICES and that this torch is built for CUDA"
        )
    return torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
