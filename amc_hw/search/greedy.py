"""NetAdapt (Yang et al., ECCV 2018): step by step, shrink the group that pays for the step at the least loss.

A step asks for one policy per group. Where evaluations allow fewer steps than single groups can pay for, every group
offers a part of the step, and those that lose least are shrunk together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amc_hw.env import PruningEnv
from amc_hw.resources import ROUNDING, CostModel, keeps
from amc_hw.search.method import Method, judged
from amc_hw.search.sensitivity import spread


class GreedySearch(Method):
    """The steps are as fine as the evaluations allow."""

    needs_budget = True

    @classmethod
    def enough(cls, groups: int) -> int:
        return groups + 1

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self.at: tuple[int, ...] | None = None

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        model, left = env.model, self.planned(number)
        limit = model.full_cost if env.budget is None else env.budget.limit
        at = self.at or model.full_widths
        if model.cost(at) <= limit:  # a budget that has grown begins anew
            at = model.full_widths
        while not keeps(cost := model.cost(at), limit) and left > 0:
            goal = cost - (cost - limit) / max(1, left // (len(model.grids) + 1))
            offers = spread(offered(model, at, goal), max(left - 1, 1))
            if not offers:
                return
            found = []
            for one in judged(env, offers):
                found.append(one)
                yield one
            left -= len(found)
            for one in sorted(found, key=lambda one: (-one["worth"], one["cost"])):
                at = tuple(map(min, at, one["widths"]))
                if keeps(model.cost(at), goal):
                    break
            if left > 0 and at not in offers:
                left -= 1
                yield env.judge(at)
            self.at = at


def offered(model: CostModel, at: Sequence[int], goal: float) -> list[tuple[int, ...]]:
    """A policy for every group that can pay for the step to a cost of `goal`, where half of them can; else of every
    group one that pays for a part, so that about half of the groups are needed together."""
    cost = model.cost(at)
    groups = [narrower for group in range(len(at)) if (narrower := _narrower(model, at, group, cost))]
    alone = [widths for each in groups if (widths := _widest(each, goal)) is not None]
    if 2 * len(alone) >= len(groups):
        return alone
    part = (cost - goal) / len(groups)
    while True:
        offers = [_widest(each, cost - part) or each[-1][1] for each in groups]
        if part >= cost - goal or cost - model.cost(tuple(map(min, at, *offers))) >= 2 * (cost - goal):
            return offers
        part *= 2


def _narrower(model: CostModel, at: Sequence[int], group: int, cost: float) -> list[tuple[float, tuple[int, ...]]]:
    """(cost, widths) with that group narrower for less than `cost`, widest first."""
    narrower = reversed(model.grids[group][: model.position(group, at[group])])
    policies = [(*at[:group], width, *at[group + 1 :]) for width in narrower]
    priced = [(model.cost(widths), widths) for widths in policies]
    return [each for each in priced if each[0] < cost * (1 - ROUNDING)]


def _widest(policies: Sequence[tuple[float, tuple[int, ...]]], limit: float) -> tuple[int, ...] | None:
    return next((widths for cost, widths in policies if keeps(cost, limit)), None)
