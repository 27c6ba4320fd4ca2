"""Memory: estimates against hand counts and what autograd really saves; the search for the largest batch."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastload
from fastload import memory
from fastload.cli import main
from fastload.memory import KINDS, MemoryEstimate, check_plot, estimate_memory, find_batch_size, plot


def mlp() -> nn.Sequential:
    """The guides' network."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """The search collects garbage after every try: let it not look at all that torch has loaded, each time."""
    estimate_memory(mlp(), (784,), 1, "adam")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def really_saved(model: nn.Module, batch: Tensor) -> int:
    """Bytes that autograd saves in a real forward pass, beside the model's own tensors and the batch."""
    pieces: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    del output
    for known in (batch, *model.parameters(), *model.buffers()):
        pieces.pop(known.untyped_storage().data_ptr(), None)
    return sum(pieces.values())


class Residual(nn.Module):
    """A block with a skip connection and an in-place ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + x, inplace=True)


class Tied(nn.Module):
    """Two layers with one weight, and a plain tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.scale = torch.full((12,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)  # type: ignore[no-any-return]


class Structured(nn.Module):
    """Returns tensors within a dict and a tuple, and one that nobody keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.layer(x)
        hidden.exp()  # saved for as long as the result lives, which is not at all
        return {"logits": hidden.sigmoid(), "more": (hidden.tanh(), 3)}


class Attention(nn.Module):
    """A transformer's layer over 12 tokens of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """Recomputes its middle in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(12, 20), nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.middle, self.first(x), use_reentrant=False)  # type: ignore[no-any-return]


def cnn() -> nn.Sequential:
    """Convolution, BatchNorm, ReLU in place, a residual block, pooling, Dropout, a linear layer: on 3 x 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Residual(4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 4 * 4, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (784,)),
    "cnn": (cnn, (3, 8, 8)),
    "residual": (partial(Residual, 3), (3, 8, 8)),
    "tied": (Tied, (12,)),
    "frozen": (lambda: mlp().requires_grad_(False), (784,)),
    "half frozen": (lambda: nn.Sequential(mlp().requires_grad_(False), nn.Linear(10, 5), nn.Tanh()), (784,)),
    "attention": (Attention, (12, 8)),
    "gru": (lambda: nn.GRU(8, 16, batch_first=True), (12, 8)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.GELU(), nn.AvgPool2d(2)), (6, 9, 9)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=2)), (6, 9, 9)),
    "nothing": (nn.Identity, (3, 4)),
}
"""What is built, and the shape of its samples."""


# ---- the estimate


def test_the_guides_network_to_the_byte() -> None:
    """101,770 parameters of 4 bytes; one hidden layer's output is what autograd saves; the batch counts once."""
    found = estimate_memory(mlp(), (784,), 64, "adam", torch.float32)
    assert found == MemoryEstimate(
        batch_size=64,
        parameter_count=101_770,
        parameters=407_080,
        buffers=0,
        gradients=407_080,
        optimizer_state=814_160,
        batch=64 * 784 * 4,
        activations=64 * 128 * 4,
    )
    assert found.peak == 407_080 * 4 + 64 * (784 + 128) * 4
    assert found.as_dict()["peak"] == found.peak
    assert list(found.as_dict()) == ["batch_size", "parameter_count", *KINDS, "peak"]
    assert all(type(value) is int for value in found.as_dict().values())


def adam_of_half(parameters: Any) -> torch.optim.Optimizer:
    """Adam for the weights only, in two groups, with learning rates that a scheduler has changed."""
    weights = [parameter for parameter in parameters if parameter.dim() == 2]
    return torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}])


WEIGHTS = 4 * (784 * 128 + 128 * 10)


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (None, 0),
        ("sgd", 0),
        ("momentum", 407_080),
        ("Adam", 814_160),
        ("adamw", 814_160),
        ("rmsprop", 407_080),
        ("adagrad", 407_080),
        ("nadam", 814_160),
        ("asgd", 407_080),
        ("adafactor", 4 * (128 + 784 + 128 + 10 + 128 + 10)),  # a row and a column of each matrix, vectors whole
        (torch.optim.SGD, 0),
        (torch.optim.AdamW, 814_160),
        (partial(torch.optim.Adam, amsgrad=True), 3 * 407_080),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), 407_080),
        (adam_of_half, 2 * WEIGHTS),
    ],
)
def test_the_state_of_optimizers(optimizer: Any, state: int) -> None:
    """By name, class or function: nothing, one or two copies of the parameters, or what a real step leaves."""
    assert estimate_memory(mlp(), (784,), 2, optimizer).optimizer_state == state


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("make", "state"),
    [
        (partial(torch.optim.SGD, momentum=0.9), 407_080),
        (partial(torch.optim.AdamW, amsgrad=True, lr=torch.tensor(0.1)), 3 * 407_080),
        (torch.optim.Adagrad, 407_080),
        (adam_of_half, 2 * WEIGHTS),
    ],
)
def test_the_state_of_an_optimizer_that_is_there(make: Any, state: int, steps: int) -> None:
    """Its options and groups count, whether it has run or not, and it does not run now; nor do its hooks."""
    model = mlp()
    optimizer = make(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(steps):
        model(torch.randn(3, 784)).sum().backward()
        optimizer.step()
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the optimizer ran"))
    before = str(optimizer.state_dict())
    assert estimate_memory(model, (784,), 2, optimizer).optimizer_state == state
    assert str(optimizer.state_dict()) == before


def test_a_named_optimizer_that_is_there() -> None:
    """One that was given names and parameters."""
    model = mlp()
    optimizer = torch.optim.Adam(model.named_parameters())
    assert estimate_memory(model, (784,), 2, optimizer).optimizer_state == 814_160


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(1, 100), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_mlp_by_arithmetic(sizes: list[int], batch_size: int, inplace: bool, half: bool) -> None:
    """Each hidden output once: ReLU saves its result, which is what the next layer saves as its input."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace)]
    width = 2 if half else 4
    found = estimate_memory(
        nn.Sequential(*layers), sizes[:1], batch_size, "adam", torch.bfloat16 if half else torch.float32
    )
    count = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
    assert (found.parameter_count, found.parameters, found.gradients) == (count, width * count, width * count)
    assert found.optimizer_state == 2 * width * count
    assert found.batch == width * batch_size * sizes[0]
    assert found.activations == width * batch_size * sum(sizes[1:])
    assert found.peak == width * (4 * count + batch_size * sum(sizes))


def test_the_activations_of_a_cnn_by_hand() -> None:
    """What each layer saves, 4 bytes each unless said otherwise, for 5 samples of 3 x 8 x 8."""
    found = estimate_memory(cnn(), (3, 8, 8), 5)
    maps = 5 * 4 * 8 * 8
    numbers = maps  # the convolution's output, saved by BatchNorm
    numbers += 2 * 4  # BatchNorm's mean and deviation of this batch
    numbers += maps  # its output, made non-negative in place: saved by ReLU, and by the next convolution
    numbers += maps + 2 * 4  # that convolution's output, and the second BatchNorm's mean and deviation
    numbers += maps  # the sum, after ReLU: saved by ReLU and by pooling
    pooled = 5 * 4 * 4 * 4
    numbers += 2 * pooled  # where each maximum was: 8 bytes each
    numbers += pooled  # Dropout's mask, on the CPU
    numbers += pooled  # Dropout's output, saved by the linear layer
    assert found.activations == 4 * numbers
    assert found.buffers == 2 * (4 + 4) * 4 + 2 * 8  # means, variances, and counts of 8 bytes
    assert found.parameter_count == 3 * 4 * 9 + 8 + 4 * 4 * 9 + 8 + 64 * 10 + 10


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_the_activations_are_what_autograd_saves(name: str, training: bool) -> None:
    """The same bytes as in a real forward pass, for batches of several sizes."""
    make, shape = MODELS[name]
    model = make().train(training)
    plain = [value.nbytes for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    for batch_size in (1, 2, 7):
        if batch_size == 1 and training and "norm" in name:
            continue
        found = estimate_memory(model, shape, batch_size)
        assert found.activations == really_saved(model, torch.randn(batch_size, *shape)) - sum(plain)


def test_tied_weights_and_plain_tensors_count_once() -> None:
    """One weight of 12 x 12 and two biases; the tensor that is an attribute counts with the buffers."""
    found = estimate_memory(Tied(), (12,), 1, "adam")
    assert (found.parameter_count, found.parameters, found.gradients) == (168, 672, 672)
    assert (found.optimizer_state, found.buffers) == (1344, 48)


def test_frozen_parameters_have_no_gradients_and_no_state() -> None:
    """A frozen body with a new head: only the head's gradients and state, and nothing saved below it."""
    model = nn.Sequential(mlp().requires_grad_(False), nn.Linear(10, 5))
    found = estimate_memory(model, (784,), 3, "adam")
    assert (found.parameters, found.gradients, found.optimizer_state) == (407_080 + 220, 220, 440)
    assert found.activations == 3 * 10 * 4


def test_what_nobody_keeps_is_not_counted() -> None:
    """Outputs of any structure are held; what a discarded one had saved is gone."""
    assert estimate_memory(Structured(), (12,), 2).activations == 2 * (2 * 12 * 4)


def test_checkpointing_saves_what_it_saves() -> None:
    """Only the input of the part that is computed again."""
    assert estimate_memory(Checkpointed(), (12,), 3).activations == 3 * 20 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_half_precision_halves_everything(dtype: Any) -> None:
    """Model, gradients, state, input and activations are all of the dtype; the model itself stays float32."""
    model = mlp()
    whole, half = (estimate_memory(model, (784,), 8, "adam", d) for d in (None, dtype))
    assert all(getattr(whole, kind) == 2 * getattr(half, kind) for kind in KINDS)
    assert model[0].weight.dtype is torch.float32


def test_the_models_own_dtype() -> None:
    """Without a dtype the input has that of the first parameter; autocast is what it is in training."""
    assert estimate_memory(mlp().double(), (784,), 2).batch == 2 * 784 * 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, batch = mlp(), torch.randn(2, 784)
        assert estimate_memory(model, (784,), 2).activations == really_saved(model, batch)


def test_a_batch_that_no_machine_holds() -> None:
    """3 TB of input and the activations of a thousand million samples, at once, with not one more MB in use."""
    model = cnn()
    estimate_memory(model, (3, 8, 8), 1)
    started = time.perf_counter()
    found = estimate_memory(model, (3, 8, 8), 10**9, "adam")
    assert time.perf_counter() - started < 5
    assert found.batch == 10**9 * 3 * 8 * 8 * 4
    assert found.activations > 10**12


def test_a_model_that_no_machine_holds() -> None:
    """Modules on the meta device have shapes enough."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU())
    found = estimate_memory(model, (10**6,), 1, "adam")
    assert found.optimizer_state == 2 * found.parameters == 2 * 4 * (10**12 + 10**6)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that a run could change: values, gradients, identities, devices, modes, versions, random states."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(id(t), t.clone(), t.device, t.dtype, t._version, t.requires_grad) for t in tensors],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_is(name: str, context: Callable[[], Any]) -> None:
    """Gradients, running statistics, modes and the random state; also under no_grad, which changes no figure."""
    make, shape = MODELS[name]
    model = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(iter(model.children()), model).eval()
    expected = estimate_memory(model, shape, 2, "adam")
    with context():
        before = snapshot(model)
        assert estimate_memory(model, shape, 2, "adam") == expected
        after = snapshot(model)
    assert str(before) == str(after)


def test_nothing_of_the_run_is_left_behind() -> None:
    """The copy and its tensors are gone afterwards."""
    model = mlp()
    before = weakref.ref(model)
    estimate_memory(model, (784,), 2, "adam")
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ in ("_Saved", "_ReadsHalf")]
    del model
    gc.collect()
    assert before() is None


# ---- what can't be estimated


class LooksAtValues(nn.Module):
    """Goes one of two ways."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.look = nn.Linear(4, 4), look

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.look(x) else x


@pytest.mark.parametrize(
    "look", [lambda x: x.sum() > 0, lambda x: x.max().item(), lambda x: len(x[x > 0])], ids=["if", "item", "mask"]
)
def test_a_model_that_looks_at_values(look: Callable[[Tensor], Any]) -> None:
    """There are no values; the error says so and what to do, and nothing is logged beside it."""
    with pytest.raises(RuntimeError, match=r"looks at values .* find_batch_size"):
        estimate_memory(LooksAtValues(look), (4,), 2)


def test_a_kernel_with_a_workspace() -> None:
    """What an LSTM saves is decided within its kernel; no figure is better than one that is too low."""
    with pytest.raises(RuntimeError, match=r"mkldnn_rnn_layer: LSTM .* find_batch_size"):
        estimate_memory(nn.LSTM(8, 16), (12, 8), 4)


def test_a_model_that_does_not_take_the_input(capfd: pytest.CaptureFixture[str]) -> None:
    """The model's own words, the batch that it got, and no traceback of torch's on standard error."""
    with pytest.raises(ValueError, match=r"shape \(8, 64, 784\), .*float32.*") as error:
        estimate_memory(nn.Conv2d(3, 4, 3), (64, 784), 8)
    assert "without the batch" in str(error.value)
    assert capfd.readouterr().err == ""


def test_batch_norm_refuses_one_sample() -> None:
    """As it does in training."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        estimate_memory(nn.BatchNorm1d(3), (3,), 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_shape": 784}, r"input_shape=784.*\(784,\)"),
        ({"input_shape": (-1, 784)}, "input_shape=.*one sample"),
        ({"input_shape": "784"}, "input_shape='784'"),
        ({"input_shape": (7.5,)}, "input_shape="),
        ({"batch_size": 0}, "batch_size=0.*1 or more"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": 2**62}, "more bytes than can be counted"),
        ({"input_shape": (10**20,)}, "more bytes than can be counted"),
        ({"optimizer": "adamm"}, "'adamm'.*adam, .*momentum.*None"),
        ({"optimizer": 3}, "optimizer=3"),
        ({"optimizer": torch.optim.Adam(mlp().parameters())}, "not the model's"),
        ({"dtype": torch.int64}, "int64.*bfloat16"),
        ({"dtype": "float31"}, "'float31'.*bfloat16"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], words: str) -> None:
    """What was got, what is allowed."""
    with pytest.raises(ValueError, match=words):
        estimate_memory(**{"model": mlp(), "input_shape": (784,), "batch_size": 4, **arguments})


@pytest.mark.parametrize("optimizer", ["lbfgs", "sparseadam", lambda parameters: None, lambda: None])
def test_an_optimizer_that_can_not_be_run(optimizer: Any) -> None:
    """The reason, and what to give instead."""
    with pytest.raises(RuntimeError, match=r"can't be run without memory .* or None"):
        estimate_memory(mlp(), (784,), 4, optimizer)


def test_what_is_no_model_or_not_whole() -> None:
    """A function; a lazy module; a model that holds something that can't be copied."""
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        estimate_memory(lambda x: x, (784,), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="run one batch"):
        estimate_memory(nn.LazyLinear(3), (784,), 4)
    model = mlp()
    model.events = iter(open(os.devnull))  # type: ignore[assignment]  # noqa: SIM115
    with pytest.raises(RuntimeError, match=r"can't be copied .*deepcopy"):
        estimate_memory(model, (784,), 4)


# ---- against CUDA


@pytest.mark.gpu
def test_activations_and_peak_on_cuda() -> None:
    """What stays allocated between forward and backward is the estimate and the output; the peak is near."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(8192, 1024, device="cuda")
    outside = 0

    def step() -> None:
        nonlocal outside
        optimizer.zero_grad()
        before = torch.cuda.memory_allocated()
        output = model(batch)
        outside = torch.cuda.memory_allocated() - before
        output.sum().backward()
        optimizer.step()

    found = estimate_memory(model, (1024,), 8192, optimizer)
    idle = torch.cuda.memory_allocated() - found.parameters - found.batch
    step()  # makes momentum, and cuBLAS's workspace
    workspace = torch.cuda.memory_allocated() - idle - found.peak + found.activations
    torch.cuda.reset_peak_memory_stats()
    step()
    output = 8192 * 1024 * 4
    assert abs(outside - found.activations - output) <= output + 512 * 40
    peak = torch.cuda.max_memory_allocated() - idle - workspace
    assert 0.75 < found.peak / peak < 1.25


@pytest.mark.gpu
def test_the_largest_batch_on_cuda() -> None:
    """Real errors of a GPU end the search, and its cache is empty afterwards."""
    total = torch.cuda.get_device_properties(0).total_memory
    row = total // 4096

    def step(batch_size: int) -> None:
        torch.empty(batch_size, row, dtype=torch.uint8, device="cuda")

    held = torch.cuda.memory_allocated()
    assert 1024 < find_batch_size(step, 1) <= 4096
    assert torch.cuda.memory_reserved() - held < total // 100


# ---- the largest batch


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 4000), st.sampled_from(ERRORS))
@settings(deadline=None, max_examples=60)
def test_the_answer_is_exact(most: int, start: int, limit: int, error: Exception) -> None:
    """For any start, any limit and any words for running out; in few steps, none above the limit."""
    tried = []

    def step(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > most:
            raise error

    start = min(start, limit)
    assert find_batch_size(step, start, limit=limit) == min(most, limit)
    assert tried[0] == start
    assert max(tried) <= limit
    assert len(tried) <= 2 + 2 * limit.bit_length()


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 50))
@settings(deadline=None, max_examples=40)
def test_the_answer_within_a_budget_is_exact(most: int, start: int, columns: int) -> None:
    """Tensors that live at the same time count together, views and dead ones don't."""

    def step(batch_size: int) -> None:
        for _ in range(3):
            first = torch.empty(batch_size, columns)
            second = first.t().add(1)
            first.add_(second.t())
            del first, second

    assert find_batch_size(step, start, budget=most * columns * 8 + 7) == most


def test_a_real_training_step_within_a_budget() -> None:
    """Parameters, gradients, state and all; the same from any start, and near the estimate."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch_size: int) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(batch_size, 64)), torch.zeros(batch_size).long()).backward()
        optimizer.step()

    most = find_batch_size(step, 64, budget="100kB")
    assert find_batch_size(step, 1000, budget=100_000) == most
    assert 0.7 < estimate_memory(model, (64,), most, optimizer).peak / 100_000 < 1.4


def test_the_first_size_that_fits_runs_twice() -> None:
    """An optimizer makes its state at the end of its first step; the second may not fit any more."""
    state: list[Tensor] = []

    def step(batch_size: int) -> None:
        batch = torch.empty(batch_size, 100)
        if state:
            batch + state[0].sum()
        del batch
        state.append(torch.empty(300))

    assert find_batch_size(step, 8, budget=8 * 400 + 100) < 8


def test_a_step_can_not_hide_that_it_passed_the_budget() -> None:
    """One that catches the error itself has not fitted."""

    def step(batch_size: int) -> None:
        with contextlib.suppress(MemoryError):
            torch.empty(batch_size, 250)

    assert find_batch_size(step, 1, budget="50kB") == 50


def test_without_cuda_the_machine_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is available, so that the search ends before the machine does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 80_000}))
    assert find_batch_size(lambda n: torch.empty(n, 100)) == 100


def test_other_errors_come_through() -> None:
    """At once, as they are."""
    tried = []

    def step(batch_size: int) -> None:
        tried.append(batch_size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_batch_size(step)
    assert tried == [16]


def test_not_even_one() -> None:
    """The error has the last reason, without the tensors that its traceback would keep."""
    with pytest.raises(
        RuntimeError, match=r"not even a batch of 1 fits: .*4,000 bytes of tensors, .*100; take"
    ) as error:
        find_batch_size(lambda n: torch.empty(n, 1000), budget=100)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None


def test_caches_are_emptied_after_every_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed step held is gone before the next one starts, cycles and all; so is torch's cache."""
    emptied, alive = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([ref() for ref in alive]))

    def step(batch_size: int) -> None:
        tensor = torch.empty(batch_size)
        cycle: list[Any] = [tensor]
        cycle.append(cycle)
        alive.append(weakref.ref(tensor))
        if batch_size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert find_batch_size(step, 16, limit=40) == 20
    assert len(emptied) == len(alive) > 4
    assert not any(tensor is not None for at_once in emptied for tensor in at_once)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start": 0}, "start=0.*limit of 1048576"),
        ({"start": 2.0}, "start=2.0"),
        ({"start": 9, "limit": 8}, "start=9.*from 1 to the limit of 8"),
        ({"limit": 0}, "limit=0.*1 or more"),
        ({"budget": 0}, "budget=0.*'4GB'"),
        ({"budget": "5XB"}, "budget='5XB'.*'4GB'"),
        ({"budget": 1.5}, "budget=1.5"),
    ],
)
def test_a_search_that_can_not_be(arguments: dict[str, Any], words: str) -> None:
    """Refused before the first step."""
    with pytest.raises(ValueError, match=words):
        find_batch_size(lambda n: pytest.fail("it ran"), **arguments)


# ---- the picture


def estimates(
    *sizes: int, make: Callable[[], nn.Module] = mlp, shape: tuple[int, ...] = (784,)
) -> list[MemoryEstimate]:
    return [estimate_memory(make(), shape, size, "adam") for size in sizes]


def test_the_picture_has_a_bar_for_each_size(tmp_path: Path) -> None:
    """A PNG of the promised height with the colour of every kind that there is; larger estimates have more ink."""
    plot(estimates(64, 1024, make=cnn, shape=(3, 8, 8)), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG"
        assert (image.width, image.height) == (840, 720)
        colors = {color for _, color in image.convert("RGB").getcolors(2**20)}
    assert {tuple(bytes.fromhex(color[1:])) for color in memory._COLORS} <= colors


@pytest.mark.parametrize("sizes", [(1,), (10**12,), tuple(range(1, 14))])
def test_the_picture_of_any_number_of_sizes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """One bar, a bar of petabytes, thirteen bars."""
    plot(estimates(*sizes), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_a_picture_of_nothing_and_of_nothing_much(tmp_path: Path) -> None:
    """No estimate is an error; a model without parameters has a batch at least."""
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([], tmp_path / "none.png")
    plot(estimates(1, make=nn.Identity, shape=(1,)), tmp_path / "small.png")


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both when drawing and when asked before the work."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (partial(plot, estimates(1)), check_plot):
        with pytest.raises(ImportError, match=r'pip install "fastload\[plot\]"'):
            call(tmp_path / "none.png")


# ---- the command

MODULE = """
from torch import nn
def make(): return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
class Net(nn.Linear):
    def __init__(self): super().__init__(3, 4)
net = Net()
def none(): return None
def fails(): raise KeyError("weights")
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module of models."""
    (tmp_path / "some_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import fastload_absent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("some_models", "broken_models"):
        sys.modules.pop(name, None)


def test_the_command_prints_a_table_and_draws(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact and readable bytes for each batch size; the picture's name comes last; Python's path is as before."""
    path = list(sys.path)
    arguments = "some_models:make --input 784 --batch-size 16 1024 --optimizer adam --plot out.png"
    assert main(["memory", *arguments.split()]) == 0
    out = capsys.readouterr().out
    for words in ("101,770 parameters", "batch of 16", "batch of 1,024", "407,080 (407 kB)", "814,160 (814 kB)"):
        assert words in out
    assert "1,686,688 (1.69 MB)" in out
    assert out.splitlines()[-1] == "out.png"
    assert (models / "out.png").stat().st_size > 5000
    assert sys.path == path


def test_the_command_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One value, a list with an object for each batch size."""
    arguments = "some_models:make --input 784 --batch-size 16 --optimizer none --dtype bfloat16 --json"
    assert main(["memory", *arguments.split()]) == 0
    expected = estimate_memory(mlp(), (784,), 16, None, torch.bfloat16)
    assert json.loads(capsys.readouterr().out) == [expected.as_dict()]


@pytest.mark.parametrize("name", ["Net", "net"])
@pytest.mark.usefixtures("models")
def test_the_command_takes_classes_and_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever gives a module, or is one."""
    assert main(["memory", f"some_models:{name}", "--input", "2x3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["batch_size"] == 64


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("some_models --input 784", 2, ["'some_models'", "MODULE:FACTORY"]),
        ("other_models:make --input 784", 2, ["other_models", "path"]),
        ("some_models:other --input 784", 2, ["some_models:other", "None", "Module"]),
        ("some_models:none --input 784", 2, ["some_models:none gives None"]),
        ("some_models:fails --input 784", 1, ["some_models:fails failed", "KeyError", "weights"]),
        ("broken_models:make --input 784", 1, ["broken_models:make failed", "fastload_absent"]),
        ("some_models:make --input 28x28", 2, ["(64, 28, 28)", "without the batch"]),
        ("some_models:make --input 3xx", 2, ["--input", "'3xx'", "3x224x224"]),
        ("some_models:make", 2, ["--input"]),
        ("some_models:make --input 784 --batch-size 0", 2, ["batch_size=0"]),
        ("some_models:make --input 784 --optimizer best", 2, ["'best'", "adamw"]),
        ("some_models:make --input 784 --dtype int8", 2, ["'int8'", "bfloat16"]),
        ("some_models:fails --input 784 --plot no/out.png", 2, ["no/out.png", "no folder"]),
        ("some_models:fails --input 784 --plot .", 2, [". is a folder"]),
    ],
)
@pytest.mark.usefixtures("models")
def test_what_the_command_refuses(
    arguments: str, status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on standard error, nothing on standard output; a picture that can't be is known before the model is."""
    try:
        outcome = main(["memory", *arguments.split()])
    except SystemExit as exit:
        outcome = int(exit.code or 0)
    captured = capsys.readouterr()
    assert (outcome, captured.out) == (status, "")
    assert all(word in captured.err for word in words), captured.err
    assert "Traceback" not in captured.err


def test_importing_it_loads_no_picture() -> None:
    """Neither importing nor estimating loads matplotlib."""
    code = (
        "import sys, fastload; from torch import nn; fastload.estimate_memory(nn.Linear(3, 4), (3,), 2, 'adam'); "
        "print('matplotlib' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout.strip(), run.stderr) == ("False", "")
    assert fastload.estimate_memory is estimate_memory
    assert fastload.find_batch_size is find_batch_size
