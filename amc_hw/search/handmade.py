"""Rules that need no search: one shape of widths over the depth of the network, bisected to the budget.

`uniform` keeps one fraction everywhere; `shallow` prunes the first layers most, `deep` the last (AMC, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.resources import Grids, snap

#: How steeply a rule cuts, from nothing to where all layers but the ends of a ramp are at the floor.
CUTS = np.concatenate([np.linspace(0, 1, 300), np.geomspace(1, 100, 100)[1:]])


def _uniform(depth: np.ndarray, cut: float) -> np.ndarray:
    return np.full(len(depth), 1 - cut)


def _shallow(depth: np.ndarray, cut: float) -> np.ndarray:
    return 1 - cut * (1 - depth)


def _deep(depth: np.ndarray, cut: float) -> np.ndarray:
    return 1 - cut * depth


class HandmadeSearch:
    """The widest policy of a rule within the budget: one evaluation a round.

    shape: depth of the groups in 0..1 (G,), steepness of the cut -> fractions kept, before the floor.
    """

    shape: Callable[[np.ndarray, float], np.ndarray]

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        self.floor, self.episodes = floor, 1

    def planned(self, number: int) -> int:
        return 1

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        limit = math.inf if env.budget is None else env.budget.limit
        policies = self.policies(env.model.grids)
        inside = [widths for widths in policies if env.model.cost(widths) <= limit * (1 + 1e-9)]
        # a rule may not reach the budget: then what comes nearest says so when it is timed
        yield env.judge(inside[0] if inside else min(policies, key=env.model.cost))

    def policies(self, grids: Grids) -> list[tuple[int, ...]]:
        """What the rule gives for steeper and steeper cuts, widest first."""
        depth = np.linspace(0, 1, len(grids))
        made = []
        for cut in CUTS:
            fractions = np.maximum(type(self).shape(depth, float(cut)), self.floor)
            made.append(tuple(snap(each, grid[-1], grid) for each, grid in zip(fractions, grids, strict=True)))
        return list(dict.fromkeys(made))


class UniformSearch(HandmadeSearch):
    shape = staticmethod(_uniform)


class ShallowSearch(HandmadeSearch):
    shape = staticmethod(_shallow)


class DeepSearch(HandmadeSearch):
    shape = staticmethod(_deep)
