"""The orders in which batches of indices come: what a sampler gives, with a way back to any place in it.

- A `ShuffleSampler` is a function: a run is resumed where it was, in no time, on any number of ranks.
- torch's own samplers draw from a generator when a run begins: the generator's state from before that brings the same
  order back, and what was consumed of it is skipped (for RandomSampler and SequentialSampler without a loop).
- Any other sampler is iterated again, and what was consumed is thrown away. If its order comes from elsewhere than
  torch's generators or its own `epoch`, it will not be the same.

torch's own samplers know no epochs, but training loops tell every sampler that has a `set_epoch` which one begins, and
some of them (Lightning's) take a rest without batches for the epoch after it, unless told apart. So they get a
`set_epoch` here, which notes the number down and tells the dataset.

An order can `guess` its next run, where that changes nothing: generators are put back as they were. `confirm` says
whether the guess still holds, and makes it the run that has begun.

Datasets that read whole batches get their indices as arrays: a Python int for each, as torch makes them, costs 0.1 us
and 32 bytes while the workers wait for the interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .dataset import ImageDataset
from .order import Drawn
from .sampler import Share, ShuffleSampler

State = dict[str, Any]
Indices = npt.NDArray[np.int64]

_BLOCK = 1 << 12


class Run(Protocol):
    """The batches of one pass: pairs of indices, and of what tells apart those that come twice (or None).

    epoch: the sampler's own, None where it has none.
    """

    epoch: int | None

    def __next__(self) -> tuple[Any, Indices | None]: ...

    def state_dict(self, taken: int) -> State:
        """The state when so many batches have reached the user."""


class Order(Protocol):
    """One run after another."""

    def begin(self) -> Run: ...

    def holds(self, run: Any) -> bool:
        """Whether a run that has begun is still what is wanted: no other epoch was chosen since."""

    def guess(self) -> Run | None: ...

    def confirm(self, guess: Any) -> bool: ...

    def epoch(self) -> int | None:
        """The sampler's own epoch, that of the next run; None where it has none."""

    def fresh(self, seeding: torch.Generator | None) -> State:
        """The state before the next run. seeding: the generator that gives the loader's own seed before that."""

    def load(self, state: State) -> None:
        """Let the next run begin where `state` was made; ValueError if that is of another order."""

    def resumes(self) -> bool:
        """Whether the next run goes on from a loaded state: no other epoch was chosen since."""

    def forget(self) -> None:
        """Drop a loaded state."""


def order_of(dataset: Any, sampler: Any, batch_sampler: Any) -> Order:
    """The order of a loader with these; batch_sampler is None where indices come one by one."""
    as_arrays = batch_sampler is not None and reads_whole_batches(dataset)
    plain = batch_sampler is None or (type(batch_sampler) is BatchSampler and batch_sampler.sampler is sampler)
    if not plain:
        return _Replayed(dataset, batch_sampler, None, False, as_arrays, isinstance(dataset, IterableDataset))
    size, drop_last = (None, False) if batch_sampler is None else (batch_sampler.batch_size, batch_sampler.drop_last)
    if isinstance(sampler, ShuffleSampler) and type(sampler).__iter__ is ShuffleSampler.__iter__:
        return _Shuffled(sampler, size, drop_last, as_arrays)
    if isinstance(dataset, IterableDataset):
        return _Replayed(dataset, sampler if batch_sampler is None else batch_sampler, None, False, False, True)
    return _Replayed(dataset, sampler, size or 0, drop_last, as_arrays, False)


def reads_whole_batches(dataset: Any) -> bool:
    """Whether the dataset is ours and reads batches by the methods that it came with."""
    return isinstance(dataset, ImageDataset) and dataset.reads_whole_batches


def is_count(value: Any) -> bool:
    """Whether it is an int from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def same(found: Any, expected: Any) -> bool:
    """Whether a value in a state is the expected one, whatever it may be (tensors can't be compared with `!=`)."""
    return type(found) is type(expected) and bool(found == expected)


def _check(state: State, kind: str, size: int | None) -> None:
    """Refuse a state of another kind of order; size: of this one's batches."""
    if state.get("early") and not same(state.get("batch_size"), size):
        raise ValueError(
            f"the state was made with in_order=False and batches of {state.get('batch_size')}, some of which had come "
            f"early, so it takes the same batch_size; here it is {size}"
        )
    if not same(state.get("kind"), kind):
        raise ValueError(
            f"the state was made with another order: of {state.get('kind')!r}, this loader's is of {kind!r}; "
            "make the loader with the same sampler and arguments"
        )


class _ShuffledRun:
    """The batches of a `Share`."""

    def __init__(self, order: _Shuffled, share: Share) -> None:
        self._order, self.share, self.chosen = order, share, order.chosen
        self.epoch: int | None = share.epoch
        self._batches = order.batches(share)

    def __next__(self) -> tuple[Any, Indices | None]:
        return next(self._batches)

    def state_dict(self, taken: int) -> State:
        return self._order.state_at(self.share, taken)


class _Shuffled:
    """The order of a `ShuffleSampler`. size: None where indices come one by one."""

    def __init__(self, sampler: ShuffleSampler, size: int | None, drop_last: bool, as_arrays: bool) -> None:
        self._sampler, self._size, self._drop_last, self._as_arrays = sampler, size, drop_last, as_arrays
        self._loaded: tuple[int, int] | None = None

    def begin(self) -> _ShuffledRun:
        self._loaded = None
        return _ShuffledRun(self, self._sampler.share())

    @property
    def chosen(self) -> int:
        return self._sampler.chosen

    def epoch(self) -> int:
        return self._sampler.epoch

    def holds(self, run: _ShuffledRun) -> bool:
        if run.chosen == self.chosen:
            return True
        if self._sampler.epoch != run.share.epoch:
            return False
        self._sampler.set_epoch(run.share.epoch + 1)  # it was the epoch at hand that was chosen: that one has begun
        return True

    def guess(self) -> _ShuffledRun:
        return _ShuffledRun(self, self._sampler.peek())

    def confirm(self, guess: _ShuffledRun) -> bool:
        if guess.share != self._sampler.peek():
            return False
        self._sampler.share()
        guess.chosen = self.chosen
        return True

    def batches(self, share: Share) -> Iterator[tuple[Any, Indices | None]]:
        size = self._size or 1
        end = len(share) // size * size if self._drop_last else len(share)
        block = -(-min(_BLOCK, max(1, share.n)) // size) * size  # a single batch costs nearly as much as some thousand
        for start in range(0, end, block):
            stop = min(start + block, end)
            indices, draws = share.take(start, stop), share.draws(start, stop)
            for place in range(0, stop - start, size):
                batch = indices[place : place + size]
                drawn = None if draws is None else draws[place : place + size]
                if self._as_arrays:
                    yield batch, drawn
                else:  # a dataset around ours may read one by one: then each index has to say its draw
                    shown = Drawn.all(batch, drawn)
                    yield shown if self._size else shown[0], drawn

    def state_at(self, share: Share, taken: int) -> State:
        return self._named(self._sampler.state_at(share, taken * (self._size or 1)))

    def fresh(self, seeding: torch.Generator | None) -> State:
        return self._named(self._sampler.state_at(self._sampler.peek(), 0))

    def _named(self, state: State) -> State:
        return {"kind": "ShuffleSampler", "batch_size": self._size, "sampler": state}

    def load(self, state: State) -> None:
        _check(state, "ShuffleSampler", self._size)
        self._sampler.load_state_dict(state.get("sampler"))  # type: ignore[arg-type]  # which checks it
        self._loaded = self._place()

    def resumes(self) -> bool:
        return self._loaded == self._place()

    def _place(self) -> tuple[int, int]:
        share = self._sampler.peek()
        return share.epoch, share.start

    def forget(self) -> None:
        """Nothing to do: the sampler drops its state by itself when another epoch is chosen."""


class _ReplayedRun:
    """The batches of a sampler, from `skip` samples on (batches, where they are the sampler's own).

    rng: the state of the order's generator to begin with, None for that of the moment when the first batch is drawn;
    then it becomes that. after: the state when the first batch was drawn.
    guessed: whether it may still prove not to be the next run. ended: whether all was drawn.
    """

    def __init__(self, order: _Replayed, skip: int, rng: torch.Tensor | None, guessed: bool = False) -> None:
        self._order, self.skip, self.rng, self.guessed = order, skip, rng, guessed
        self.epoch = order.epoch()
        self.after: torch.Tensor | None = None
        self.ended = False
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> tuple[Any, None]:
        if self._batches is None:
            self.draw_first()
            assert self._batches is not None
        return next(self._batches), None

    def draw_first(self) -> None:
        """Draw the first batch; torch's samplers use their generator then."""
        order = self._order
        source, generator = order.source(self.skip, self._end), order.generator()
        if generator is None:
            self._batches = source
            return
        now = generator.get_state()
        if self.rng is not None:
            generator.set_state(self.rng)
        first = list(itertools.islice(source, 1))
        order.seen = order.epoch()
        self.after = generator.get_state()
        if self.rng is not None and generator is torch.default_generator:  # everybody's: put it back
            generator.set_state(now)
        self.rng = now if self.rng is None else self.rng
        self._batches = itertools.chain(first, source)

    def abandon(self) -> None:
        """Leave the generator where a loop that took no more than the batches before this rest would have left it."""
        if self._batches is None:
            self.guessed = True
            self.draw_first()

    def _end(self) -> None:
        self.ended = True
        if not self.guessed:
            self._order.draw_last()

    def state_dict(self, taken: int) -> State:
        rng = self._order.own_rng() if self.rng is None else self.rng
        return self._order.state_at(self.skip, taken, rng, self.epoch)


class _Replayed:
    """The order of any other sampler.

    size: of the batches made of its indices, 0 for none; None if it gives batches itself, or stands for a stream.
    """

    def __init__(
        self, dataset: Any, sampler: Any, size: int | None, drop_last: bool, as_arrays: bool, stream: bool
    ) -> None:
        self._sampler, self._size, self._drop_last = sampler, size, drop_last
        self._as_arrays, self._stream = as_arrays, stream
        self._unit = "batches" if size is None else "samples"
        self._resume: State | None = None
        self.seen: int | None = None
        """The sampler's epoch when a run was drawn last: some samplers move on by themselves."""
        self._note = None if stream else _note_of(self._parts(), dataset)

    def begin(self) -> _ReplayedRun:
        state, self._resume = self._resume if self.resumes() else None, None
        return _ReplayedRun(self, 0, None) if state is None else _ReplayedRun(self, state["skip"], state["rng"])

    def resumes(self) -> bool:
        return self._resume is not None and not self._differs(self._resume["sampler_epoch"])

    def _differs(self, epoch: int | None) -> bool:
        """Whether the epoch at hand is another one; one that was only noted down may not have been from the first."""
        return epoch != self.epoch() and (self._note is None or epoch is not None)

    def holds(self, run: _ReplayedRun) -> bool:
        if self._note is not None:
            if run.skip and self._differs(run.epoch):
                run.abandon()
                return False
            run.epoch = self.epoch()
            return True
        return self.epoch() in (run.epoch, self.seen)

    def guess(self) -> _ReplayedRun | None:
        if self._size is None or not _is_told_by_its_generator(self._sampler):
            return None
        run, generator = _ReplayedRun(self, 0, None, guessed=True), self.generator()
        run.draw_first()
        if generator is not None and run.rng is not None:
            generator.set_state(run.rng)
        return run

    def confirm(self, guess: _ReplayedRun) -> bool:
        generator = self.generator()
        if self._resume is not None or generator is None or guess.rng is None or guess.after is None:
            return self._resume is None
        if not torch.equal(generator.get_state(), guess.rng):
            return False
        generator.set_state(guess.after)
        guess.guessed = False
        if guess.ended:
            self.draw_last()
        return True

    def source(self, skip: int, end: Callable[[], None]) -> Iterator[Any]:
        """What the sampler gives, from `skip` on; `end` is called where torch's sampler is found exhausted."""
        sampler, size = self._sampler, self._size
        if size is None:
            return itertools.islice(sampler, skip, None)
        if type(sampler) is SequentialSampler:
            return self._slices(np.arange if self._as_arrays else range, len(sampler), skip, end)
        if type(sampler) is RandomSampler and _is_one_permutation(sampler):
            return self._shuffled(sampler, skip, end)
        rest = itertools.islice(sampler, skip, None) if skip else sampler
        return iter(BatchSampler(rest, size, self._drop_last) if size else rest)

    def draw_last(self) -> None:
        """Draw as RandomSampler does at its end: a permutation that nobody uses."""
        if type(self._sampler) is RandomSampler and _is_one_permutation(self._sampler) and self._sampler.generator:
            torch.randperm(len(self._sampler), generator=self._sampler.generator)

    def _shuffled(self, sampler: RandomSampler, skip: int, end: Callable[[], None]) -> Iterator[Any]:
        """RandomSampler's order, from a seed or the user's generator."""
        count, given = len(sampler), sampler.generator
        own = given or torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        order = torch.randperm(count, generator=own).numpy()
        yield from self._slices(lambda start, stop: order[start:stop], count, skip, end)

    def _slices(self, of: Callable[[int, int], Any], count: int, skip: int, end: Callable[[], None]) -> Iterator[Any]:
        size = self._size or 1
        short = max(0, count - skip) % size
        for start in range(skip, count - short, size):
            yield self._shown(of(start, start + size))
        end()
        if short and not self._drop_last:
            yield self._shown(of(count - short, count))

    def _shown(self, indices: Any) -> Any:
        if not self._as_arrays:
            indices = indices.tolist() if isinstance(indices, np.ndarray) else list(indices)
        return indices if self._size else indices[0]

    def generator(self) -> torch.Generator | None:
        """The generator that the order comes from; None where none is used."""
        if self._stream or type(self._sampler) is SequentialSampler:
            return None
        for part in self._parts():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                return generator
        return torch.default_generator

    def _parts(self) -> tuple[Any, Any]:
        """The sampler, and the one that it makes batches of, if it is a batch sampler."""
        return self._sampler, getattr(self._sampler, "sampler", None)

    def epoch(self) -> int | None:
        if self._note is not None:
            return self._note.epoch
        for part in self._parts():
            epoch = getattr(part, "epoch", None)
            if isinstance(epoch, int):
                return int(epoch)
        return None

    def own_rng(self, seeding: torch.Generator | None = None) -> torch.Tensor | None:
        """The state of the generator that is the order's alone, after a seed is drawn; None where it has none."""
        generator = self.generator()
        if generator is None or generator is torch.default_generator:
            return None
        if generator is seeding:
            generator = generator.clone_state()
            torch.empty((), dtype=torch.int64).random_(generator=generator)
        return generator.get_state()

    def fresh(self, seeding: torch.Generator | None) -> State:
        return self.state_at(0, 0, self.own_rng(seeding), self.epoch())

    def state_at(self, skip: int, taken: int, rng: torch.Tensor | None, epoch: int | None) -> State:
        state: State = {"kind": type(self._sampler).__name__, "unit": self._unit, "batch_size": self._size}
        if self._stream:  # the sampler says nothing of a stream's order; what was consumed has to be drawn again
            return state | {"skip": 0, "rng": None, "sampler_epoch": None, "discard": taken}
        return state | {"skip": skip + taken * (self._size or 1), "rng": rng, "sampler_epoch": epoch}

    def load(self, state: State) -> None:
        _check(state, type(self._sampler).__name__, self._size)
        skip, rng, epoch = (state.get(name, "missing") for name in ("skip", "rng", "sampler_epoch"))
        is_epoch = epoch is None or (type(epoch) is int and is_count(abs(epoch)))
        if not is_count(skip) or (self._stream and skip) or not is_epoch or not self._is_rng(rng, skip):
            raise ValueError(f"the state is damaged: its order is {state!r:.200}")
        if not same(state.get("unit"), self._unit):
            raise ValueError(
                f"the state counts {state.get('unit')}, this loader's sampler gives {self._unit}: use the same sampler"
            )
        if self._note is not None:
            self._note.epoch = epoch
        for part in self._parts():
            if epoch is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self._resume = state

    def _is_rng(self, rng: Any, skip: Any) -> bool:
        """Whether the order's generator can be put into this state; it takes one where something is to be skipped."""
        generator = self.generator()
        if rng is None or generator is None:
            return rng is None and (skip == 0 or generator is None)
        try:
            generator.clone_state().set_state(rng)
        except (TypeError, RuntimeError):
            return False
        return True

    def forget(self) -> None:
        self._resume = None


class _Note:
    """The `set_epoch` of a sampler that has no use for it.

    It tells the dataset too: who finds one at the sampler may leave that to it (Accelerate).
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.dataset: Any = None

    def __call__(self, epoch: int) -> None:
        self.epoch = epoch
        for dataset in datasets_below(self.dataset):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)


def _note_of(samplers: tuple[Any, ...], dataset: Any) -> _Note | None:
    """The `set_epoch` of torch's own sampler among these; None where one of them knows epochs by itself."""
    note = None
    for sampler in samplers:
        if type(sampler) in (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler):
            if not hasattr(sampler, "set_epoch"):
                sampler.set_epoch = _Note()
            note = sampler.set_epoch
        elif hasattr(sampler, "epoch") or hasattr(sampler, "set_epoch"):
            return None
    if not isinstance(note, _Note):
        return None
    note.dataset = dataset
    return note


def datasets_below(dataset: Any) -> Iterator[Any]:
    """The dataset and, for torch's Subset and ConcatDataset, those inside it."""
    yield dataset
    if isinstance(dataset, Subset):
        yield from datasets_below(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from datasets_below(part)


def _is_one_permutation(sampler: RandomSampler) -> bool:
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _is_told_by_its_generator(sampler: Any) -> bool:
    """Whether all that a run will give is settled by the state of the generator when its first batch is drawn."""
    if type(sampler) is RandomSampler:
        return sampler.generator is None or _is_one_permutation(sampler)
    return type(sampler) in (SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
