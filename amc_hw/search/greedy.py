"""NetAdapt (Yang et al., ECCV 2018): step by step, shrink the one group that pays for the step at the least loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from amc_hw.env import PruningEnv
from amc_hw.resources import ROUNDING, CostModel
from amc_hw.search.method import Method, judged


class GreedySearch(Method):
    """The steps are as fine as the evaluations allow: every step asks for one policy per group."""

    needs_budget = True

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
        while (cost := model.cost(at)) > limit * (1 + ROUNDING) and left > 0:
            steps = max(1, left // len(model.grids))
            offers = shrunk(model, at, cost - (cost - limit) / steps)
            if not offers:
                offers = shrunk(model, at, cost * (1 - ROUNDING))  # no group pays for all of it: as far as one goes
                offers = sorted(offers, key=model.cost)[:1]
            if not offers:
                return
            found = []
            for one in judged(env, offers[:left]):
                found.append(one)
                yield one
            left -= len(found)
            at = self.at = max(found, key=lambda one: (one["worth"], -one["cost"]))["widths"]


def shrunk(model: CostModel, at: Sequence[int], limit: float) -> list[tuple[int, ...]]:
    """For every group that can: the widest it may be, all others as they are, for a cost of at most `limit`."""
    made = []
    for group, width in enumerate(at):
        for narrower in reversed(model.grids[group][: model.position(group, width)]):
            widths = (*at[:group], narrower, *at[group + 1 :])
            if model.cost(widths) <= limit * (1 + ROUNDING):
                made.append(widths)
                break
    return made
