"""Which samples this rank gets, in which order, and where an interrupted epoch goes on.

An epoch is a sequence of positions 0, 1, ... n-1, and its `Order` says which sample lies at each. An epoch of several
passes over the data (`repeat`) goes on with n, n+1, ... in the next pass. Ranks deal the positions out like cards: of
`world` ranks that begin at position s, rank r gets s + r, s + r + world, and so on. So after some steps, whatever the
batch size, exactly the positions below some number are used up, and that one number is the whole state: the same on all
ranks, a few bytes for any n, and any other number of ranks can go on from there.

    ShuffleSampler    the epochs, one after the other, and the state
    Share             one rank's part of one epoch: a value, cheap to make, and a function from number to index

The price is that ranks have to take batches of the same size, as they do under DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch.distributed
from torch.utils.data import DistributedSampler

from .order import ENDLESS, LARGEST, Drawn, Indices, Order, Repeated, epoch_order

STATE_VERSION = 1
_BLOCK = 1 << 14
_LAST_EPOCH = (1 << 63) - 1
_SAME = ("n", "seed", "window", "shuffle", "weights")


@dataclass(frozen=True)
class Share:
    """One rank's part of one epoch, from the global position `start` on. Equal shares hold equal samples.

    Its samples have the numbers 0, 1, ... len - 1; number k lies at position start + rank + world * k of the epoch.
    Positions from `end` on (padding) begin again at the start of the epoch. It may be read from several threads.

    n, seed, window, shuffle, drop_last, pad: as in `ShuffleSampler`. weights: their digest, or None. passes: over the n
    samples, so many that nobody sees the end where the epoch is endless.
    """

    n: int
    seed: int
    window: int | None
    shuffle: bool
    weights: str | None
    drop_last: bool
    pad: bool
    epoch: int
    start: int
    rank: int
    world: int
    passes: int = 1
    cumulative: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def order(self) -> Order:
        """The order of the whole epoch, all ranks' samples in it."""
        options = {"shuffle": self.shuffle, "window": self.window, "cumulative": self.cumulative}
        of = partial(epoch_order, self.n, self.seed, self.epoch, **options)  # type: ignore[arg-type]  # of many types
        return of() if self.passes == 1 else Repeated(self.n, self.passes, of)

    @property
    def end(self) -> int:
        """The number of positions in the epoch."""
        return self.n * self.passes

    def __len__(self) -> int:
        short = 0 if self.drop_last else self.world - 1 if self.pad else self.world - 1 - self.rank
        return (self.end - self.start + short) // self.world

    def take(self, start: int, stop: int) -> Indices:
        """Indices of this rank's samples number start ... stop - 1: int64 (stop - start,).

        Raises:
            IndexError: not 0 <= start <= stop <= len.
        """
        return self.order.at(self._positions(start, stop))

    def draws(self, start: int, stop: int) -> Indices | None:
        """What tells the draws of one index apart, where it can come several times in the epoch; else None.

        Give it to whatever makes the pictures differ: the samples' positions, if drawn by weight, or the numbers of
        their passes. Like `take`'s, int64 (stop - start,).
        """
        if self.weights is None and self.passes == 1:
            return None
        positions = self._positions(start, stop)
        if isinstance(positions, range):
            positions = np.arange(positions.start, positions.stop, positions.step)
        return positions if self.weights is not None else positions // self.n

    def position(self, taken: int) -> int:
        """The first global position not used up when each rank has taken that many samples; `end` when none is."""
        used = self.start + taken * self.world
        left_over = used + self.world > self.end if self.drop_last else used > self.end
        return self.end if left_over else used

    def _positions(self, start: int, stop: int) -> range | Indices:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"samples {start} to {stop} were asked for; this share has {len(self)}, numbered from 0")
        first = self.start + self.rank
        positions = range(first + start * self.world, first + stop * self.world, self.world)
        if not positions or positions[-1] < self.end:
            return positions
        return np.arange(positions.start, positions.stop, positions.step) % self.end


class ShuffleSampler(DistributedSampler[int]):
    """Shuffled indices, epoch after epoch, for one rank or many; stops anywhere and goes on with any number of ranks.

    A drop-in for torch's RandomSampler, DistributedSampler and WeightedRandomSampler, with any loader. Nothing is
    shuffled in memory: it is made at once for 10**12 samples. The order depends on (seed, epoch) alone; every `iter()`
    is the next epoch, without `set_epoch`.

    n: number of samples, or the dataset: then its random transforms follow the epochs with torch's loader too.
    seed: of the order; the same on all ranks.
    rank, world: this process and how many there are; both or neither. By default torch.distributed is asked whenever
        they are needed (so make the sampler before or after `init_process_group`), and without it there is one process.
    drop_last: leave out the samples of an epoch that don't divide evenly among ranks.
    window: keep so many neighbouring indices together: blocks in shuffled order, shuffled inside. For data on disks
        that are slow at jumping; a thousand samples or more, and several times the batch size.
    weights: draw n samples with replacement, each in proportion to its weight: n floats >= 0, or "balanced" for every
        class as often as any other, by the dataset's `targets` (one label each; negative labels are never drawn).
    shuffle: False for the order in which samples lie; for evaluation.
    pad: where the samples don't divide evenly, repeat some from the start of the epoch, so that all ranks get as many
        (as DistributedSampler does). False: some ranks get one less, and every sample comes once: for evaluation.
    repeat: how many passes over the samples one epoch is, one after the other without a gap, so that all batches have
        the same size, except perhaps the last of them all. Every pass has an order and random transforms of
        its own. None: an epoch never ends, and there is no len(); every `iter()` begins another one.
        What comes at a position is the same for any `repeat`, and a state may go on with another one.

    With Accelerate, whose `prepare` deals batches out itself, use ShuffleSampler(n, rank=0, world=1); a loader with one
    that deals out itself is handed back as it is, and its batches stay where they are (`DevicePrefetcher` moves them).

    All arguments are attributes; `epoch` is that of the next `iter()`, `chosen` counts the calls of `set_epoch`.

    `state_dict` counts what was handed out. A loader with workers takes samples ahead of time: use the state of
    `fastload.DataLoader`, which counts the batches that you got.

    Raises:
        ValueError: an argument makes no sense.

    Example:
        >>> sampler = fastload.ShuffleSampler(dataset, seed=1)
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=64, sampler=sampler)
    """

    def __init__(
        self,
        n: int | Sized,
        *,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        window: int | None = None,
        weights: Sequence[float] | npt.ArrayLike | Literal["balanced"] | None = None,
        shuffle: bool = True,
        pad: bool = True,
        repeat: int | None = 1,
    ) -> None:
        self.n = _whole("n", len(n) if isinstance(n, Sized) else n, 0, LARGEST)
        self.seed = _whole("seed", seed)
        self.window = None if window is None else _whole("window", window, 1)
        self.rank, self.world = _place(rank, world)  # type: ignore[assignment]
        self.drop_last, self.shuffle, self.pad = bool(drop_last), bool(shuffle), bool(pad)
        self.repeat = None if repeat is None else _whole("repeat", repeat, 1, ENDLESS // max(self.n, 1), "None, or ")
        if repeat is None and self.n == 0:
            raise ValueError("repeat is None and n is 0; without a sample nothing can be repeated: give repeat=1")
        self.weights = weights
        if weights is not None and window is not None:
            raise ValueError("weights and window were both given; draws by weight lie anywhere: leave one of them out")
        if not shuffle and (weights is not None or window is not None):
            raise ValueError("weights and window are ways to shuffle; leave them out, or shuffle=False")
        values = None if weights is None else _checked_weights(weights, n, self.n)
        self._cumulative = None if values is None else np.cumsum(values / values.max())
        self._digest = None if values is None else hashlib.sha256(values.tobytes()).hexdigest()[:16]
        self._dataset: Any = n if isinstance(n, Sized) else None
        self.epoch = 0
        self.chosen = 0
        self._start = 0
        self._latest: Share | None = None
        self._taken = 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of ranks, by the name that it has in DistributedSampler."""
        return self._where()[1]

    def __len__(self) -> int:
        """This rank's samples in a whole epoch; TypeError where that has no end."""
        if self.repeat is None:
            raise TypeError(
                "with repeat=None an epoch has no end, and neither its sampler nor its loader a len(); "
                "count the steps yourself, or give `repeat` a number"
            )
        return len(self._share(self.epoch, 0))

    def __iter__(self) -> Iterator[int]:
        """This rank's indices in the epoch that comes now, as Python ints; see `Drawn` for those that come again."""
        share = self.share()
        if hasattr(self._dataset, "set_epoch"):  # fastload's loader does that itself, by way of `share`
            self._dataset.set_epoch(share.epoch)
        return self._indices(share)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch. A loaded state that lies in this very epoch keeps its position.

        So a training loop that calls it before every epoch can be resumed.
        """
        epoch = _whole("epoch", epoch, 0, _LAST_EPOCH)
        if epoch != self.epoch:
            self._start = 0
        self.epoch = epoch
        self.chosen += 1
        self._latest = None

    def share(self) -> Share:
        """This rank's part of the epoch that comes now; the sampler moves on to the next one."""
        self._latest, self._taken = self.peek(), 0
        self.epoch, self._start = self.epoch + 1, 0
        return self._latest

    def peek(self) -> Share:
        """What `share` would give, without moving on."""
        return self._share(self.epoch, self._start)

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iterator stands: ints, strings, bools and None, to be kept as JSON or with a checkpoint.

        The same on all ranks that have taken as many samples. After the end of an epoch: the start of the next one.
        """
        if self._latest is None:
            return self._state(self.epoch, self._start)
        return self.state_at(self._latest, self._taken)

    def state_at(self, share: Share, taken: int) -> dict[str, Any]:
        """The state when each rank has used `taken` samples of `share`.

        All of them: the end of that epoch. A run that goes on there gets no sample, then the next epoch.
        """
        return self._state(share.epoch, share.position(taken))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on where `state` was made, on any number of ranks, with any batch size.

        Raises:
            ValueError: it is no such state, of a newer version, or of a sampler with other n, seed, window, weights or
                shuffle; then nothing has changed.
        """
        expected = self._state(self.epoch, self._start)
        if not isinstance(state, Mapping):
            raise ValueError(f"the state is {state!r}; give the dict that state_dict() gave")
        if type(state.get("version")) is not int or state["version"] != STATE_VERSION:
            raise ValueError(
                f"the state's version is {state.get('version')!r}, this fastload reads {STATE_VERSION}; give what "
                "state_dict() gave, or use the fastload that made it"
            )
        if set(state) != set(expected):
            raise ValueError(f"the state has {sorted(state, key=str)}; give what state_dict() gave: {sorted(expected)}")
        for name in _SAME:
            if type(state[name]) is not type(expected[name]) or state[name] != expected[name]:
                raise ValueError(
                    f"the state's {name} is {state[name]!r}, this sampler's is {expected[name]!r}; a position means "
                    "something in one order only: make the sampler as it was, or start the epoch anew"
                )
        epoch = _whole("the state's epoch", state["epoch"], 0, _LAST_EPOCH)
        position = _whole("the state's position", state["position"], 0, self.peek().end)
        self.epoch, self._start, self._latest = epoch, position, None

    def _state(self, epoch: int, position: int) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "n": self.n,
            "seed": self.seed,
            "window": self.window,
            "shuffle": self.shuffle,
            "weights": self._digest,
            "epoch": epoch,
            "position": position,
        }

    def _share(self, epoch: int, start: int) -> Share:
        rank, world = self._where()
        return Share(
            n=self.n,
            seed=self.seed,
            window=self.window,
            shuffle=self.shuffle,
            weights=self._digest,
            drop_last=self.drop_last,
            pad=self.pad,
            epoch=epoch,
            start=start,
            rank=rank,
            world=world,
            passes=ENDLESS // self.n if self.repeat is None else self.repeat,
            cumulative=self._cumulative,
        )

    def _where(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        if self.rank is not None and self.world is not None:
            return self.rank, self.world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _indices(self, share: Share) -> Iterator[int]:
        """The share's indices; counted as long as no other iterator is newer."""
        size = max(1, min(_BLOCK, share.n))  # many short passes would take their time before the first index
        for start in range(0, len(share), size):
            stop = min(start + size, len(share))
            block = Drawn.all(share.take(start, stop), share.draws(start, stop))
            for taken, index in enumerate(block, start + 1):
                if self._latest is share:
                    self._taken = taken
                yield index
        if self._latest is share:
            self._latest = None


def _whole(name: str, value: Any, least: float = -math.inf, most: float = math.inf, others: str = "") -> int:
    """`value` as an int within limits. others: what else the user may give."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and least <= operator.index(value) <= most:
            return operator.index(value)
    limits = f" from {least}" if least > -math.inf else ""
    limits += f" to {most}" if most < math.inf else ""
    raise ValueError(f"{name} is {value!r}; it has to be {others}an int{limits}")


def _place(rank: int | None, world: int | None) -> tuple[int | None, int | None]:
    if rank is None and world is None:
        return None, None
    if rank is None or world is None:
        raise ValueError(f"rank is {rank} and world is {world}; give both, or neither to ask torch.distributed")
    world = _whole("world", world, 1)
    return _whole("rank", rank, 0, world - 1), world


def _checked_weights(weights: Any, dataset: Any, n: int) -> npt.NDArray[np.float64]:
    """float64 (n,), little-endian for the digest's sake."""
    if isinstance(weights, str) and weights != "balanced":
        raise ValueError(f"weights are {weights!r}; give 'balanced', or one number for each of the {n} samples")
    values = np.asarray(_balanced(dataset, n) if isinstance(weights, str) else weights, "<f8")
    if values.shape != (n,):
        raise ValueError(f"weights have shape {values.shape}; give one for each of the {n} samples, or 'balanced'")
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) > 0):
        raise ValueError("weights have to be finite, not negative, and not all of them zero")
    return values


def _balanced(dataset: Any, n: int) -> npt.NDArray[np.float64]:
    """For each sample 1 / the size of its class; 0 where it has none."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        name = type(dataset).__name__
        raise ValueError(f"weights are 'balanced', but {name} has no `targets`; give such a dataset, or {n} weights")
    labels = np.asarray(targets)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(f"targets are {labels.dtype} {labels.shape}; 'balanced' takes one int for each sample, ({n},)")
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.where(labels < 0, 0.0, 1.0 / sizes[classes])
