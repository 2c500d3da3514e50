"""Per-layer sensitivity: what pruning one group alone loses, and policies that lose the same in every group.

Curves are measured with all other groups at full width (Li et al., ICLR 2017, section 3.1). A policy follows from one
threshold: every group takes the smallest width that loses at most that much; the threshold is bisected to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.resources import CostModel, keeps
from amc_hw.search.method import Method, judged

SHARE = 0.6  #: of the evaluations, spent on curves
MOST_POINTS = 6  #: per curve
Item = TypeVar("Item")
Judge = Callable[[Sequence[int]], dict[str, Any]]  #: as `PruningEnv.judge`


class Curves:
    """What a group loses at each width of its grid, all other groups as in `base`: measured at a few widths, linear in
    between, never falling as widths do. reference: what `base` loses, as `lost` of `PruningEnv.judge`."""

    def __init__(self, costs: CostModel, base: Sequence[int], reference: float) -> None:
        self.costs, self.base, self.reference = costs, tuple(base), reference
        self._measured: list[dict[int, float]] = [{} for _ in costs.grids]

    def widths(self, group: int, width: int) -> tuple[int, ...]:
        return (*self.base[:group], width, *self.base[group + 1 :])

    def add(self, group: int, width: int, lost: float) -> None:
        self._measured[group][width] = lost - self.reference

    @property
    def evaluated(self) -> int:
        """How many policies were evaluated for them, the base included."""
        return 1 + sum(map(len, self._measured))

    def points(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Widths that were measured, ascending, and their losses: a wider layer that seems to lose more is noise."""
        known = {self.base[group]: 0.0} | self._measured[group]
        widths = sorted(known)
        losses = np.array([known[width] for width in widths])
        return np.array(widths, dtype=float), np.maximum.accumulate(losses[::-1])[::-1]

    def losses(self, group: int) -> np.ndarray:
        """Loss at every width of the group's grid, ascending (len(grid),); of a group that was not measured the mean
        of the others at that fraction of their channels."""
        grid = self.costs.grids[group]
        if not self._measured[group] and any(self._measured):
            known = [other for other, measured in enumerate(self._measured) if measured]
            shares = np.array(grid) / grid[-1]
            return np.mean(
                [np.interp(shares * self.costs.grids[k][-1], self.costs.grids[k], self.losses(k)) for k in known],
                axis=0,
            )
        widths, losses = self.points(group)
        found = np.interp(grid, widths, losses)
        if len(widths) > 1 and grid[0] < widths[0]:  # below the narrowest that was measured: on as it rose last
            slope = max((losses[0] - losses[1]) / (widths[1] - widths[0]), 0.0)
            below = np.array(grid) < widths[0]
            found[below] = losses[0] + slope * (widths[0] - np.array(grid)[below])
        return found


def points(grid: Sequence[int], count: int) -> list[int]:
    """At most `count` widths of a grid to measure, the full one left out: the smallest, and evenly up from there."""
    rest = grid[:-1]
    if not rest or count < 1:
        return []
    places = np.unique(np.round(np.linspace(0, len(rest) - 1, min(count, len(rest)))).astype(int))
    return [rest[place] for place in places]


def spread(every: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly from the first to the last: of groups that not all can be asked, not the first alone."""
    if len(every) <= most:
        return list(every)
    return [every[place] for place in np.linspace(0, len(every) - 1, max(most, 0)).round().astype(int)]


def measure_curves(
    costs: CostModel, judge: Judge, budget: int, *, ahead: Callable[[Sequence[tuple[int, ...]]], None]
) -> Generator[dict[str, Any], None, Curves]:
    """Yields what was evaluated, at most `budget` policies, and returns the curves. ahead: as of `PruningEnv`."""
    whole = judge(costs.full_widths)
    yield whole
    curves = Curves(costs, costs.full_widths, whole["lost"])
    each = min(MOST_POINTS, max(1, (budget - 1) // len(costs.grids)))
    wanted = [(group, width) for group, grid in enumerate(costs.grids) for width in points(grid, each)]
    wanted = spread(wanted, budget - 1)
    ahead([curves.widths(group, width) for group, width in wanted])
    for group, width in wanted:
        found = judge(curves.widths(group, width))
        curves.add(group, width, found["lost"])
        yield found
    return curves


class CurveSearch(Method):
    """A method that begins with a curve of every group."""

    @classmethod
    def enough(cls, groups: int) -> int:
        return math.ceil((groups + 1) / SHARE)


class SensitivitySearch(CurveSearch):
    """Thresholds on the curves: of the policies that one gives within the budget, the most costly are evaluated."""

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self.curves: Curves | None = None

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        left = self.planned(number)
        if self.curves is None:
            self.curves = yield from measure_curves(env.model, env.judge, round(SHARE * left), ahead=env.ahead)
            left -= self.curves.evaluated
        yield from judged(env, self._policies(env, self.curves)[: max(left, 1)])

    def _policies(self, env: PruningEnv, curves: Curves) -> list[tuple[int, ...]]:
        """Every policy that a threshold gives within the budget, the most costly first."""
        costs, limit = env.model, math.inf if env.budget is None else env.budget.limit
        losses = [curves.losses(group) for group in range(len(costs.grids))]
        thresholds = np.unique(np.concatenate(losses))
        made = []
        for threshold in thresholds:
            fits = [int(np.argmax(loss <= threshold + 1e-12)) for loss in losses]
            made.append(tuple(grid[fit] for grid, fit in zip(costs.grids, fits, strict=True)))
        inside = [widths for widths in dict.fromkeys(made) if keeps(costs.cost(widths), limit)]
        return sorted(inside, key=lambda widths: -costs.cost(widths))
