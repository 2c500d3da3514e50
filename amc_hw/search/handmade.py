"""Rules that need no search: one shape of widths over the depth of the network, as wide as the budget allows.

`uniform` keeps one fraction everywhere; `shallow` prunes the first layers most, `deep` the last (AMC, section 4.1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.resources import Grids, keeps, snap
from amc_hw.search.method import Method
from amc_hw.search.uniform import uniform_policies

#: How steeply a ramp cuts, from nothing to where all layers but the ends of a ramp are at the floor.
CUTS = np.concatenate([np.linspace(0, 1, 300), np.geomspace(1, 100, 100)[1:]])


def _shallow(depth: np.ndarray, cut: float) -> np.ndarray:
    return 1 - cut * (1 - depth)


def _deep(depth: np.ndarray, cut: float) -> np.ndarray:
    return 1 - cut * depth


class HandmadeSearch(Method):
    """The widest policy of a rule within the budget: one evaluation a round."""

    needs_budget = True

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, 1, seed)

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        limit = math.inf if env.budget is None else env.budget.limit
        policies = self.policies(env.model.grids)
        inside = [widths for widths in policies if keeps(env.model.cost(widths), limit)]
        # a rule may not reach the budget: then what comes nearest is not within it
        yield env.judge(inside[0] if inside else min(policies, key=env.model.cost))

    @abstractmethod
    def policies(self, grids: Grids) -> list[tuple[int, ...]]:
        """What the rule gives, widest first."""


class UniformSearch(HandmadeSearch):
    def policies(self, grids: Grids) -> list[tuple[int, ...]]:
        return uniform_policies(grids)


class RampSearch(HandmadeSearch):
    """shape: depth of the groups in 0..1 (G,), steepness of the cut -> fractions kept, before the floor."""

    shape: Callable[[np.ndarray, float], np.ndarray]

    def policies(self, grids: Grids) -> list[tuple[int, ...]]:
        depth = np.linspace(0, 1, len(grids))
        made = []
        for cut in CUTS:
            fractions = np.maximum(type(self).shape(depth, float(cut)), self.floor)
            made.append(tuple(snap(each, grid[-1], grid) for each, grid in zip(fractions, grids, strict=True)))
        return list(dict.fromkeys(made))


class ShallowSearch(RampSearch):
    shape = staticmethod(_shallow)


class DeepSearch(RampSearch):
    shape = staticmethod(_deep)
