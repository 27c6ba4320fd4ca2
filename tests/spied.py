"""A transform under observation, for tests that compare what it does with what it was handed."""

from __future__ import annotations

import copy
from typing import Any

from fastload.geometry import Plan
from fastload.order import SampleRandom


class Spied:
    """A transform that remembers the random numbers that it was last handed, as they were."""

    chance: SampleRandom

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def plan(self, plan: Plan, random: SampleRandom) -> Plan | None:
        self.chance = copy.copy(random)
        result: Plan | None = self.transform.plan(plan, random)
        return result

    def __repr__(self) -> str:
        return repr(self.transform)
