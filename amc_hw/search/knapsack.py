"""One width for every group at the least sum of losses within a budget: a multiple-choice knapsack over the table.

Losses are additive sensitivity curves (`sensitivity.py`), costs the table's own, with terms over several groups (as
HALP, Shen et al., NeurIPS 2022, with measured losses in place of gradients). Pruning one group alone says too little of
pruning all, so what is found is evaluated, curves are measured anew around it, and it is solved again within reach of
those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import optimize, sparse

from amc_hw.env import PruningEnv
from amc_hw.min_sum import MinSum
from amc_hw.resources import CostModel, keeps
from amc_hw.search.sensitivity import SHARE, Curves, CurveSearch, measure_curves, spread

MAX_VARIABLES = 60_000  #: of the integer program; larger ones are solved by Lagrange multipliers alone
NODES = 2000  #: of its branches, at most: a limit of time would let the machine's load choose the policy
GAP = 1e-6
Solution = tuple[float, tuple[int, ...]]  # sum of losses, positions in the grids
PRIOR = 0.002
SEEN = 1e-4  #: share of it where losses are distortions


class KnapsackSearch(CurveSearch):
    """Curves, the best sum within the budget, then curves around what was found, as far as the evaluations reach."""

    needs_budget = True

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self.curves: Curves | None = None
        self.best: dict[str, Any] | None = None
        self.known: dict[tuple[int, ...], dict[str, Any]] = {}

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        limit = env.model.full_cost if env.budget is None else env.budget.limit
        left = self.planned(number)
        if self.curves is None:
            judge = partial(self._judge, env)
            self.curves = yield from measure_curves(env.model, judge, round(SHARE * left), ahead=env.ahead)
            left -= self.curves.evaluated
        losses = [self.curves.losses(group) + self._prior(grid) for group, grid in enumerate(env.model.grids)]
        if self.best is None or not keeps(self.best["cost"], limit):
            self.best = self._judge(env, solve(env.model, losses, limit))
            left -= 1
            yield self.best
        while left > 0:
            before = self.best["widths"]
            for found in self._around(env, limit, left):
                left -= 1
                yield found
            if self.best["widths"] == before:
                return

    def _judge(self, env: PruningEnv, widths: Sequence[int]) -> dict[str, Any]:
        found = self.known[tuple(widths)] = env.judge(widths)
        return found

    def _prior(self, grid: Sequence[int]) -> np.ndarray:
        """Of distortion all is seen: then only of widths that lose the same the wider is taken."""
        coarse = any(one["distortion"] is None for one in self.known.values())
        return prior(grid) * (1.0 if coarse else SEEN)

    def _around(self, env: PruningEnv, limit: float, left: int) -> Iterator[dict[str, Any]]:
        """Curves around the best policy, one width narrower and one wider per group, and the solution within them."""
        assert self.best is not None
        model, base = env.model, self.best["widths"]
        curves = Curves(model, base, self.best["lost"])
        wanted: list[tuple[int, int]] = []  # group, width
        for group, width in enumerate(base):
            grid, place = model.grids[group], model.position(group, width)
            step = max(1, round(0.15 * len(grid)))
            places = sorted({max(place - step, 0), place, min(place + step, len(grid) - 1)})
            wanted += [(group, grid[other]) for other in places if other != place]
        new = spread([each for each in wanted if curves.widths(*each) not in self.known], left - 1)
        env.ahead([curves.widths(*each) for each in new])
        for each in wanted:
            if each in new:
                left -= 1
                yield self._judge(env, curves.widths(*each))
            if (found := self.known.get(curves.widths(*each))) is not None:
                curves.add(*each, found["lost"])
        measured = [curves.points(group) for group in range(len(base))]
        losses = [np.interp(grid, *each) + self._prior(grid) for grid, each in zip(model.grids, measured, strict=True)]
        reach = [
            [place for place, width in enumerate(grid) if widths[0] <= width <= widths[-1]]
            for grid, (widths, _) in zip(model.grids, measured, strict=True)
        ]
        widths = solve(model, losses, limit, reach=reach)
        if left > 0 and widths not in self.known:
            yield self._judge(env, widths)
        inside = [one for one in self.known.values() if keeps(one["cost"], limit)]
        self.best = min(inside, key=lambda one: (one["lost"], one["cost"]))


def prior(grid: Sequence[int]) -> np.ndarray:
    """What narrower widths lose at least, too little to be seen in a few hundred held-out images (len(grid),)."""
    return PRIOR * (1 - np.array(grid) / grid[-1]) ** 2


def solve(
    model: CostModel,
    losses: Sequence[np.ndarray],
    limit: float,
    *,
    reach: Sequence[Sequence[int]] | None = None,
    exact: bool = True,
) -> tuple[int, ...]:
    """Widths of the least sum of `losses` (one array per group, over its grid) that cost at most `limit`.

    reach: positions in the grids that may be chosen. exact: by an integer program (HiGHS), where that is not too large:
    one variable per group and width, one per term and combination of widths; else by Lagrange multipliers, which
    come near where grids are fine. The cheapest known policy where nothing
    better is found within the limit.
    """
    allowed = [list(range(len(grid))) for grid in model.grids] if reach is None else [list(each) for each in reach]
    count = sum(map(len, allowed)) + sum(
        math.prod(len(allowed[group]) for group in term.groups) for term in model.terms if len(term.groups) > 1
    )
    found, proven = None, False
    if exact and count <= MAX_VARIABLES:
        found, proven = _integer_program(model, losses, limit, allowed)
    if not proven:
        found = min((each for each in (found, _lagrange(model, losses, limit, allowed)) if each), default=None)
    if found is None:
        return model.completer.best()[1]
    return tuple(grid[place] for grid, place in zip(model.grids, found[1], strict=True))


def _lagrange(
    model: CostModel, losses: Sequence[np.ndarray], limit: float, allowed: Sequence[Sequence[int]]
) -> Solution | None:
    """The best of what prices per unit of cost give, each exactly minimised; None where nothing is within the limit."""
    sizes = [len(each) for each in allowed]
    unary = [((group,), loss[allowed[group]]) for group, loss in enumerate(losses)]
    terms = [term.factor(allowed) for term in model.terms]
    scale = max(float(loss.max() - loss.min()) for loss in losses) or 1.0
    low, high = 0.0, 1e3 * scale / max(limit, 1e-12)
    best: Solution | None = None
    for _ in range(40):
        price = (low + high) / 2
        factors = unary + [(axes, price * values) for axes, values in terms]
        places = MinSum(factors, sizes).complete(())
        at = tuple(each[place] for each, place in zip(allowed, places, strict=True))
        if keeps(model.cost_at(at), limit):
            total = sum(float(loss[place]) for loss, place in zip(losses, at, strict=True))
            best = min(best or (math.inf, at), (total, at), key=lambda one: one[0])
            high = price
        else:
            low = price
    return best


def _integer_program(
    model: CostModel, losses: Sequence[np.ndarray], limit: float, allowed: Sequence[Sequence[int]]
) -> tuple[Solution | None, bool]:
    """The optimum, None where there is none or none was found within NODES, and whether it is proven to be one.

    A term over several groups has a variable per combination, whose marginals must be the groups' own choices.
    """
    starts = np.cumsum([0, *map(len, allowed)])
    objective = [np.concatenate([loss[each] for loss, each in zip(losses, allowed, strict=True)])]
    cost = [np.zeros(starts[-1])]
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    right: list[float] = []

    def equation(where: np.ndarray, factors: np.ndarray, to: float) -> None:
        rows.append(np.full(len(where), len(right)))
        columns.append(where)
        values.append(factors)
        right.append(to)

    for group, each in enumerate(allowed):
        equation(np.arange(starts[group], starts[group] + len(each)), np.ones(len(each)), 1.0)
    total = int(starts[-1])
    for term in model.terms:
        table = term.table(allowed)
        if table.ndim == 1:
            cost[0][starts[term.groups[0]] : starts[term.groups[0]] + len(table)] += table
            continue
        index = total + np.arange(table.size).reshape(table.shape)
        for axis, group in enumerate(term.groups):
            for place in range(table.shape[axis]):
                combinations = np.take(index, place, axis=axis).ravel()
                where = np.append(combinations, starts[group] + place)
                equation(where, np.append(np.ones(len(combinations)), -1.0), 0.0)
        cost.append(table.ravel())
        objective.append(np.zeros(table.size))
        total += table.size
    matrix = sparse.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(len(right), total)
    )
    whole = np.zeros(total)
    whole[: starts[-1]] = 1  # once the groups have chosen, so have the terms
    unit = 1e-4 * limit or 1.0  # a millionth of it is what the solver calls no difference
    found = optimize.milp(
        np.concatenate(objective),
        integrality=whole,
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(matrix, right, right),
            optimize.LinearConstraint(np.concatenate(cost)[None] / unit, -np.inf, (limit - model.constant) / unit),
        ],
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if found.x is None:
        return None, False
    chosen = [int(np.argmax(found.x[starts[group] : starts[group] + len(each)])) for group, each in enumerate(allowed)]
    at = tuple(each[place] for each, place in zip(allowed, chosen, strict=True))
    if not keeps(model.cost_at(at), limit):
        return None, False
    return (sum(float(loss[place]) for loss, place in zip(losses, at, strict=True)), at), found.status == 0
