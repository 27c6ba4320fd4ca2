"""The order of a loader's batches, pass after pass: what comes next, in which epoch, and from where after a resume.

`Passes` stands where torch's iterators expect the loader's sampler: `iter` begins a pass, and what a pass gives is
what workers read. It knows nothing of workers. They may draw far ahead of the user; so a pass counts apart what has
reached the user, and a state is made of that.

Work on the next pass can begin before the user asks for it (`ahead`), where the order can say what it will be without
changing anything. When the pass begins and something has changed since, a seed or an epoch, the guess is thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .orders import Run, State, datasets_below, is_count, order_of, same

_VERSION = 1


class Ticket(NamedTuple):
    """A batch of indices for a dataset that has epochs.

    draws: int64 (n,), what tells apart the occurrences of an index that comes more than once; None where none does.
    """

    indices: Any
    epoch: int
    draws: npt.NDArray[np.int64] | None


class Pass(Iterator[Any]):
    """One pass over a loader's batches: an iterator over `Ticket`s, or over bare indices where there is no epoch.

    number: of the batch that was drawn last, counted from 0 over what this pass began with.
    untouched: whether nothing was asked of it yet.

    For iterable datasets: discard: how many batches are to be thrown away before the first one that the user gets.
    workers: for each worker the state of its copy of the dataset after its last batch that has reached the user
    ("state"), and whether none comes after that ("last"). turn: the worker whose batch comes next.
    """

    def __init__(self, run: Run, epoch: int | None, resumed: State | None = None) -> None:
        resumed = resumed or {}
        self.run, self.epoch = run, epoch
        self.number = -1
        self.untouched = True
        self.finished = False
        self.workers: dict[int, Any] = dict(resumed.get("workers", {}))
        self.turn: int = resumed.get("turn", 0)
        self.discard: int = resumed.get("discard", 0)
        self._taken = self.discard
        self._early = set(resumed.get("early", ()))
        self._passed_over = frozenset(self._early)

    def __next__(self) -> Any:
        self.number += 1
        while self.number in self._passed_over:
            next(self.run)
            self.number += 1
        indices, draws = next(self.run)
        return indices if self.epoch is None else Ticket(indices, self.epoch, draws)

    def take(self, number: int | None) -> None:
        """Note that batch `number` has reached the user; None: the next one."""
        if self.discard:  # it counts as taken from the beginning
            return
        self._early.add(self._taken if number is None else number)
        while self._taken in self._early:
            self._early.remove(self._taken)
            self._taken += 1

    def state_dict(self) -> State:
        """Where the user is: all batches before that, and `early` ones behind it, counted from there."""
        state = self.run.state_dict(self._taken)
        if self._early:
            state["early"] = [number - self._taken for number in sorted(self._early)]
        if self.workers:
            state.update(workers=dict(self.workers), turn=self.turn, discard=0)
        return state


class Passes:
    """All passes over a loader, in the place of its sampler.

    sampler, batch_sampler: the loader's; exactly one of them gives what is read at a time.
    """

    def __init__(self, dataset: Any, sampler: Any, batch_sampler: Any) -> None:
        self._dataset = dataset
        self._given = sampler if batch_sampler is None else batch_sampler
        self._order = order_of(dataset, sampler, batch_sampler)
        self._last_epoch: int | None = None
        self._resume: State | None = None
        self._guess: Pass | None = None
        self.current: Pass | None = None

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Pass:
        """Begin the next pass: the one that was begun `ahead`, if it is still the right one."""
        guess, self._guess = self._guess, None
        state, self._resume = self._loaded(), None
        epoch = self._begin_epoch()
        if state is None and guess is not None and guess.epoch == epoch and self._order.confirm(guess.run):
            self.current = guess
        else:
            self.current = Pass(self._order.begin(), epoch, None if state is None else state["order"])
        return self.current

    def still(self, begun: Pass) -> bool:
        """Whether a pass from which nothing was taken yet is the one that is wanted.

        Some training loops (Lightning's) choose the sampler's epoch after `iter` and before the first batch.
        """
        if self._order.holds(begun.run) and (begun.epoch is None or begun.epoch >= (begun.run.epoch or 0)):
            return True
        self._last_epoch = None
        return False

    def ahead(self) -> Pass | None:
        """The pass that comes after this one, as far as can be told; None where it can't."""
        run = self._order.guess()
        self._guess = None if run is None else Pass(run, self._coming_epoch())
        return self._guess

    def forget(self) -> None:
        """Throw the pass away that was begun ahead."""
        self._guess = None

    @property
    def worker_states(self) -> dict[int, Any]:
        """The states of an iterable dataset's copies, by worker, that the next pass begins with."""
        state = self._loaded()
        return {} if state is None else dict(state["order"].get("workers", {}))

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch, for the datasets and for samplers that have a `set_epoch`."""
        self._last_epoch = None
        state = self._loaded()
        known = set() if state is None else {state["epoch"], self._order.epoch()} - {None}
        if known and epoch not in known:
            self._order.forget()
            self._resume = None
        samplers = (self._given, getattr(self._given, "sampler", None))
        for part in (*datasets_below(self._dataset), *samplers):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _with_epochs(self) -> list[Any]:
        return [d for d in datasets_below(self._dataset) if hasattr(d, "set_epoch") and hasattr(d, "epoch")]

    def _coming_epoch(self) -> int | None:
        """The datasets' next epoch, unless one was set by hand; the sampler's own, where that is further on."""
        datasets = self._with_epochs()
        if not datasets:
            return None
        epoch: int = max(dataset.epoch for dataset in datasets)
        return max(epoch + 1 if epoch == self._last_epoch else epoch, self._order.epoch() or 0)

    def _begin_epoch(self) -> int | None:
        """Put the datasets into their next epoch."""
        self._last_epoch = epoch = self._coming_epoch()
        if epoch is not None:
            for dataset in self._with_epochs():
                dataset.set_epoch(epoch)
        return epoch

    def state_dict(self, seeding: torch.Generator | None = None) -> State:
        """Where the user is in the current pass, or that the next one is to begin.

        seeding: the generator from which the loader will draw a seed for its workers before that.
        """
        state = self._loaded()
        if state is not None:
            return copy.deepcopy(state)
        running = self.current is not None and not self.current.finished
        order = self.current.state_dict() if self.current is not None and running else self._order.fresh(seeding)
        epoch = self.current.epoch if self.current is not None and running else self._coming_epoch()
        return {"version": _VERSION, "epoch": epoch, "dataset": _fingerprint(self._dataset), "order": order}

    def _loaded(self) -> State | None:
        """The state that the next pass goes on from; none once another epoch was chosen."""
        if self._resume is not None and not self._order.resumes():
            self._resume = None
        return self._resume

    def __getstate__(self) -> State:
        """A copy begins a pass of its own."""
        return self.__dict__ | {"current": None, "_guess": None, "_order": copy.copy(self._order)}

    def load_state_dict(self, state: State) -> None:
        """Let the next pass go on where `state` was made.

        Raises:
            ValueError: it is no such state, or one of another dataset or order.
        """
        _check(state)
        state = copy.deepcopy(state)
        here = _fingerprint(self._dataset)
        for what, value in here.items():
            if not same(state["dataset"].get(what), value):
                raise ValueError(
                    f"the state was made with another dataset: its {what} is {state['dataset'].get(what)!r}, here it "
                    f"is {value!r}; load it into a loader over the same data, or start the epoch anew"
                )
        if state["order"].get("workers") and not hasattr(self._dataset, "load_state_dict"):
            raise ValueError(
                f"the state holds states of an iterable dataset, and {type(self._dataset).__name__} has no "
                "load_state_dict; load it into a loader over the same dataset"
            )
        self._order.load(state["order"])
        if state["epoch"] is not None:
            self._last_epoch = None
            for dataset in self._with_epochs():
                dataset.set_epoch(state["epoch"])
        self._resume, self._guess, self.current = state, None, None


def _fingerprint(dataset: Any) -> State:
    """What tells a dataset from others, as far as it can be known without reading it."""
    state: State = {"samples": len(dataset) if hasattr(dataset, "__len__") else None}
    if hasattr(dataset, "fingerprint"):
        state["fingerprint"] = dataset.fingerprint
    return state


def _check(state: Any) -> None:
    if not isinstance(state, dict) or type(state.get("version")) is not int:
        raise ValueError(f"this is no state of a loader: {state!r:.100}; give what its state_dict() returned")
    if state["version"] != _VERSION:
        raise ValueError(
            f"the state has version {state['version']}, this fastload reads version {_VERSION}: use the same version"
        )
    epoch = state.get("epoch", "missing")
    sound = isinstance(state.get("dataset"), dict) and (epoch is None or is_count(epoch))
    if not sound or not _is_progress(state.get("order"), state.get("num_workers")):
        raise ValueError("the state is damaged: its epoch, dataset or order is not what state_dict() returns")


def _is_progress(order: Any, num_workers: Any) -> bool:
    """Whether it is a dict, and what it says of batches that came early and of workers can be so."""
    if not isinstance(order, dict):
        return False
    most = max(1, num_workers) if is_count(num_workers) else 1
    early, workers = order.get("early", []), order.get("workers", {})
    return (
        isinstance(early, list)
        and all(is_count(number) and number > 0 for number in early)
        and isinstance(workers, dict)
        and all(is_count(worker) and worker < most for worker in workers)
        and all(isinstance(held, dict) and "state" in held for held in workers.values())
        and all(type(held.get("last")) is bool for held in workers.values())
        and is_count(order.get("turn", 0))
        and order.get("turn", 0) < most
        and is_count(order.get("discard", 0))
    )
