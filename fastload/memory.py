"""How much memory a training step takes, by a dry run; and the largest batch that fits, by trying.

`estimate_memory` runs a copy of the model forward on torch's fake tensors, which have shapes, dtypes and devices but no
memory, and adds up what autograd saves. A forward pass that looks at values (`if x.sum() > 0`, `x.item()`) can't be run
so, and is an error: a guess would look like a figure. `find_batch_size` runs real steps.

What no estimate of a model can know is not in it: the workspaces of cuDNN and cuBLAS, the temporaries of forward,
backward and the optimiser, what the allocator rounds up (512 bytes per tensor on CUDA) or can't use, and the 0.3 to
0.8 GB of a CUDA context.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cache import parse_bytes

KINDS = ("parameters", "buffers", "gradients", "optimizer_state", "batch", "activations")
"""What a peak is the sum of."""

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS and most others
    "can't allocate memory",  # the CPU
    "not enough memory",  # the CPU on Windows
    "status_alloc_failed",  # cuBLAS, cuDNN
    "cudnn_status_not_supported",  # what cuDNN says when it finds no algorithm that fits
)


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found, in bytes but for the first two.

    batch_size: as asked for. parameter_count: how many numbers the model learns or keeps frozen. parameters: of the
    model, shared ones once. buffers: the other tensors that its modules hold, such as BatchNorm's running statistics.
    gradients: one for each parameter that requires it. optimizer_state: after a step, without step counts and other
    single numbers, which torch keeps on the CPU. batch: the input. activations: the memory that autograd holds between
    forward and backward; what is in one of the others is not in this one, and memory that several tensors share is in
    it once and whole.
    """

    batch_size: int
    parameter_count: int
    parameters: int
    buffers: int
    gradients: int
    optimizer_state: int
    batch: int
    activations: int

    @property
    def peak(self) -> int:
        """The sum of `KINDS`.

        A step holds that much where gradients stay allocated through the forward pass: with gradient accumulation or
        `zero_grad(set_to_none=False)`. With torch's default they come while activations go, and what is left over makes
        room for the temporaries of backward, which are not counted.
        """
        return sum(getattr(self, kind) for kind in KINDS)

    def as_dict(self) -> dict[str, int]:
        """All fields and the peak, ready for `json.dumps`."""
        return {**asdict(self), "peak": self.peak}


def estimate_memory(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int,
    optimizer: str | Optimizer | Callable[..., Optimizer] | None = "sgd",
    dtype: torch.dtype | str | None = None,
) -> MemoryEstimate:
    """What a training step of `model` takes, without taking it: no tensor is allocated, the model stays as it is.

    model: any module whose forward takes one tensor; what it returns doesn't matter, all of it counts as used in the
    loss. Its mode counts (in `eval()` Dropout saves nothing), and so does its device: on CUDA Dropout saves a mask of
    1 byte per element, on the CPU one of the dtype. The loss function's own memory, which for images and classes is
    small, is not in it; neither are labels, nor what a custom autograd function keeps beside `save_for_backward`.
    input_shape: of one sample, without the batch: (784,) or (3, 224, 224).
    optimizer: the name of a class in torch.optim in lower case ("sgd", "adam", "adamw", ...), "momentum" for SGD with
    it, a class, an instance, a function from parameters to an instance, or None for no state. Its state is counted
    after a step on fake tensors, so that options such as amsgrad tell.
    dtype: floating, of the input and of the model's floating-point tensors; None (the default) leaves the model's own
    and takes that of its first floating-point parameter for the input. Under `torch.autocast` the casts count too.

    Raises ValueError for arguments out of range and for a model that fails on this input, RuntimeError for a model or
    an optimizer that can't be run or copied without its values, TypeError for what is no module.

        >>> mlp = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> memory = fastload.estimate_memory(mlp, (784,), 64, "adam")
        >>> memory.parameters, memory.optimizer_state, memory.activations, memory.peak
        (407080, 814160, 32768, 1861792)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; give a torch.nn.Module")
    shape = _batch_shape(input_shape, batch_size)
    dtype = _floating(dtype)
    held = list(_held_by(model))
    if any(nn.parameter.is_lazy(tensor) for tensor in held):
        raise ValueError("the model has lazy parameters without a shape yet; run one batch through it first")
    floats = [tensor.dtype for tensor in held if tensor.is_floating_point()]
    input_dtype = dtype or (floats[0] if floats else torch.get_default_dtype())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(False), torch.enable_grad():
        fakes: dict[int, Any] = {id(tensor): _fake(tensor, dtype) for tensor in held}
        parameters = [fakes[id(parameter)] for parameter in model.parameters()]
        batch = _batch(shape, input_dtype, next(iter(fakes.values()), None))
        known = [batch, *fakes.values()]
        activations = _bytes(_saved(_copy(model, fakes), batch), without=known)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return MemoryEstimate(
            batch_size=batch_size,
            parameter_count=sum(parameter.numel() for parameter in parameters),
            parameters=_bytes(parameters),
            buffers=_bytes(known[1:], without=parameters),
            gradients=_bytes(trained),
            optimizer_state=_bytes(_state(optimizer, parameters, fakes)),
            batch=_bytes([batch]),
            activations=activations,
        )


def _batch_shape(input_shape: Sequence[int], batch_size: int) -> tuple[int, ...]:
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input_shape={input_shape!r}: give that of one sample, such as (784,) or (3, 224, 224)")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: give the samples per batch, 1 or more")
    return (batch_size, *input_shape)


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"dtype={dtype!r}: give a floating one such as float32, bfloat16 or float16, or None")


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """Parameters first, then buffers, then tensors that are plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _fake(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    fake = torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
        device="cpu" if tensor.is_meta else tensor.device,
    )
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _batch(shape: tuple[int, ...], dtype: torch.dtype, beside: Tensor | None) -> Tensor:
    if math.prod(shape) * dtype.itemsize > sys.maxsize:
        raise ValueError(f"a batch of shape {shape}, {dtype}, has more bytes than can be counted")
    return torch.empty(shape, dtype=dtype, device="cpu" if beside is None else beside.device)


def _copy(model: nn.Module, fakes: dict[int, Any]) -> nn.Module:
    """The model with these tensors in place of its own, which are not copied."""
    try:
        return copy.deepcopy(model, dict(fakes))
    except Exception as error:
        words = f"the model can't be copied ({type(error).__name__}: {error}), and its own tensors must not be touched"
        raise RuntimeError(f"{words}; give a model that copy.deepcopy takes, before its first forward pass") from error


class _Saved:
    """A tensor in autograd's graph. It lives as long as the graph needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _saved(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """What autograd still holds after the forward pass."""
    from torch._subclasses import fake_tensor

    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        entry = _Saved(tensor.detach())  # with its history it would keep its own graph alive for good
        saved.add(entry)
        return entry

    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor)
        with _quiet(), hooks, _Refusing():  # type: ignore[no-untyped-call]
            output = model(batch)
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
        words = f"the model's forward pass looks at values ({error}), and a run without memory has none"
        raise RuntimeError(f"{words}; measure a real step, or let find_batch_size try") from error
    except _UnknownSizeError as error:
        raise RuntimeError(f"{error}; measure a real step, or let find_batch_size try") from None
    except Exception as error:
        words = f"the model failed on a batch of shape {tuple(batch.shape)}, {batch.dtype}, {batch.device}"
        hint = "input_shape is that of one sample, without the batch"
        raise ValueError(f"{words}: {type(error).__name__}: {error} ({hint})") from error
    tensors = [entry.tensor for entry in saved]
    del output  # not before: the graph hangs from it
    return tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that fake tensors log beside the error that they raise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


class _Refusing(TorchDispatchMode):
    """Raises at kernels that save a workspace whose size fake tensors don't know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _WITH_WORKSPACE:
            words = "LSTM and its like save a workspace of a size that only the kernel knows"
            raise _UnknownSizeError(f"{func.overloadpacket.__name__}: {words}")
        return func(*args, **(kwargs or {}))


class _UnknownSizeError(RuntimeError):
    """A dry run would give a wrong figure."""


_ATEN = torch.ops.aten
_WITH_WORKSPACE = (_ATEN._cudnn_rnn, _ATEN.miopen_rnn, _ATEN.mkldnn_rnn_layer)


class _ReadsHalf(TorchDispatchMode):
    """Reading a tensor's value gives 1/2 (or 1), which will do for step counts and learning rates of optimizers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            return 0.5 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def _state(optimizer: Any, parameters: Sequence[Tensor], fakes: dict[int, Any]) -> list[Tensor]:
    """The tensors in an optimizer's state after its first step."""
    if optimizer is None or not parameters:
        return []
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    make, arguments = _maker(optimizer, parameters, fakes)
    try:
        with _ReadsHalf():  # type: ignore[no-untyped-call]
            made = make(arguments)
            made.step()
    except Exception as error:
        name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)
        words = f"the optimizer {name} can't be run without memory ({type(error).__name__}: {error})"
        hint = "give a function that makes it from parameters, or None and add its state yourself"
        raise RuntimeError(f"{words}; {hint}") from error
    state = [(parameter, value) for parameter, values in made.state.items() for value in _of_size(values)]
    return [value for parameter, value in state if value.dim() or not parameter.dim()]


def _of_size(state: dict[str, Any]) -> Iterator[Tensor]:
    values = tree_leaves({name: value for name, value in state.items() if name != "step"})
    return (value for value in values if isinstance(value, Tensor))


def _maker(
    optimizer: Any, parameters: Sequence[Tensor], fakes: dict[int, Any]
) -> tuple[Callable[[Any], Optimizer], list[Any]]:
    """What makes the optimizer, and what to call it with."""
    if isinstance(optimizer, Optimizer):
        return _remake(optimizer, fakes)
    names = {n.lower(): c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    del names["optimizer"]
    names["momentum"] = partial(torch.optim.SGD, momentum=0.9)  # type: ignore[assignment]
    make = names.get(optimizer.lower()) if isinstance(optimizer, str) else optimizer
    if not callable(make):
        raise ValueError(f"optimizer={optimizer!r}: give one of {', '.join(sorted(names))}; a class; or None")
    return make, list(parameters)


def _remake(optimizer: Optimizer, fakes: dict[int, Any]) -> tuple[Callable[[Any], Optimizer], list[Any]]:
    """A new one with the options and the groups of a given one."""
    try:
        groups = [{**group, "params": [fakes[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    except KeyError:
        raise ValueError("the optimizer holds parameters that are not the model's; make it from this model") from None
    for group in groups:
        group.pop("param_names", None)
    options = optimizer.defaults.keys() & inspect.signature(type(optimizer)).parameters.keys()
    return partial(type(optimizer), **{name: optimizer.defaults[name] for name in options}), groups


def _bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Of all the memory that these tensors lie in, each piece once, without that of the others."""
    pieces = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    for tensor in without:
        pieces.pop(tensor.untyped_storage()._cdata, None)
    return sum(pieces.values())


def find_batch_size(
    step: Callable[[int], object], start: int = 16, *, limit: int = 2**20, budget: int | str | None = None
) -> int:
    """The largest batch size whose training step fits in memory: by doubling from `start`, then by bisection.

    step: called with a batch size; has to do what training does with such a batch, forward, backward and the
    optimizer's step, and to keep nothing afterwards. It really trains: give it a model and an optimizer to throw away.
    The first size that fits is run twice, since an optimizer makes its state at the end of its first step.
    limit: never try more than this, such as the length of the dataset; it is the answer if it fits.
    budget: in bytes or as text ("4GB", "2GiB"). A step doesn't fit if the tensors that it uses and makes take more at
    any one time, counted by storage on all devices, on the thread that calls it and in backward; the insides of torch's
    kernels, NumPy and other threads are not counted. None (the default) leaves it to the accelerator to run out of
    memory; without CUDA it is half of what the machine has available, because a CPU that runs out of memory ends the
    process instead of raising (in a container with less than its machine, give the budget).

    A size doesn't fit if the step raises torch.OutOfMemoryError, MemoryError or a RuntimeError that says so (cuDNN,
    cuBLAS). All other errors come through. After each try garbage is collected and torch's caches are emptied.
    Raises ValueError for arguments out of range, RuntimeError if not even a batch of 1 fits.

        >>> def step(batch_size):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(batch_size, 784)).square().mean().backward()
        ...     optimizer.step()
        >>> fastload.find_batch_size(step, budget="100MB")
    """
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit={limit!r}: give the largest batch size to try, 1 or more")
    if not isinstance(start, int) or not 1 <= start <= limit:
        raise ValueError(f"start={start!r}: give the batch size to try first, from 1 to the limit of {limit}")
    allowed = _allowed(budget)
    fits, too_large, why, size = 0, limit + 1, "", start
    while too_large - fits > 1:
        reason = _try(step, size, allowed)
        if reason is None and fits == 0:
            reason = _try(step, size, allowed)  # this time with the optimizer's state
        if reason is None:
            fits = size
        else:
            too_large, why = size, reason
        size = min(2 * fits, limit) if too_large > limit else (fits + too_large) // 2
    if fits == 0:
        raise RuntimeError(f"not even a batch of 1 fits: {why}; take a smaller model or input, or give more memory")
    return fits


def _allowed(budget: int | str | None) -> int | None:
    if budget is None:
        return None if torch.cuda.is_available() else psutil.virtual_memory().available // 2
    try:
        return parse_bytes(budget)
    except (TypeError, ValueError):
        raise ValueError(f"budget={budget!r}: give bytes, 1 or more, or text such as '4GB' or '2GiB'") from None


def _try(step: Callable[[int], object], size: int, budget: int | None) -> str | None:
    """Why a step of this size doesn't fit; None if it does."""
    meter = None if budget is None else _Meter(budget)
    try:
        if meter is None:
            step(size)
        else:
            with meter:
                step(size)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:  # after the error, whose traceback keeps the step's tensors alive
        gc.collect()
        torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
    return None if meter is None else meter.over


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


class _Meter(TorchDispatchMode):
    """Counts the bytes of the live tensors that a thread uses or makes, and raises when they pass the budget."""

    def __init__(self, budget: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.over: str | None = None
        self._budget, self._live = budget, 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor.untyped_storage())
        if self._live > self._budget:
            self.over = f"the step holds {self._live:,} bytes of tensors, the budget is {self._budget:,}"
            raise MemoryError(self.over)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        del self._watched[key]
        self._live -= self._sizes.pop(key)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise now what `plot` would raise after the work: ImportError without matplotlib, OSError for a bad path."""
    _figure()
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}; make it, or name a file in another")
    if Path(path).is_dir():
        raise FileExistsError(f"{path} is a folder; name the PNG file to write")


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "fastload[plot]"') from error
    return Figure


_COLORS = ("#86b1d8", "#cfc6c0", "#8fcdc6", "#90c785", "#f3d878", "#f09a93")
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def plot(estimates: Sequence[MemoryEstimate], path: str | os.PathLike[str]) -> None:
    """Draw a stacked bar for each estimate, one above each batch size, as a PNG of 720 pixels' height.

    Raises ImportError without matplotlib, ValueError without estimates.
    """
    figure_class = _figure()
    if not estimates:
        raise ValueError("there is nothing to plot: give one estimate or more")
    highest = max(estimate.peak for estimate in estimates)
    unit, scale = _unit(highest)
    figure = figure_class(figsize=(max(7.0, 3.2 + 1.1 * len(estimates)), 6), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in KINDS if any(getattr(estimate, kind) for estimate in estimates)]
    bottoms = [0.0] * len(estimates)
    for kind in kinds:
        sizes = [getattr(estimate, kind) for estimate in estimates]
        heights = [size / scale for size in sizes]
        label = kind.replace("_", " ") + (f"\n{_readable(sizes[0])}" if len(set(sizes)) == 1 else "")
        bars = axes.bar(range(len(estimates)), heights, 0.62, bottoms, color=_COLORS[KINDS.index(kind)], label=label)
        large = [_short(height) if height * scale > 0.04 * highest else "" for height in heights]
        axes.bar_label(bars, large, label_type="center", fontsize=9)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, top in enumerate(bottoms):
        axes.annotate(
            f"{_short(top)} {unit}", (place, top), (0, 4), textcoords="offset points", ha="center", weight="bold"
        )
    axes.set_xticks(range(len(estimates)), [f"{estimate.batch_size:,}" for estimate in estimates])
    axes.set(xlabel="batch size (samples)", ylabel=f"memory ({unit})", xlim=(-0.6, len(estimates) - 0.4))
    axes.set_ylim(0, 1.08 * highest / scale or 1)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(f"A training step of a model of {estimates[0].parameter_count:,} parameters")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _unit(size: int) -> tuple[str, float]:
    return next(((unit, scale) for unit, scale in _UNITS if size >= scale), ("bytes", 1.0))


def _readable(size: int) -> str:
    unit, scale = _unit(size)
    return f"{_short(size / scale)} {unit}"


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
