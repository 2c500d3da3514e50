"""The search: a method proposes widths, every result is journaled before the next begins, the best are timed.

To resume, the method is run again from its seed and given what the journal recorded, accuracies and timings; it
then proposes what it would have proposed without the interruption.

A search exploits the errors of its table, so under a latency budget the table is corrected by what the target says:
before the first episode, by a few random policies that are predicted to be at the budget, and after each round by
the candidates. The correction is one factor on the predicted share of the unpruned latency: a scale, so the cost
stays a sum over operators, and what changes is the limit that predictions have to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import LayerGraph
from amc_hw.resources import Budget, CostModel
from amc_hw.runs import Journal
from amc_hw.search.ddpg import DDPGSearch

METHODS = {"ddpg": DDPGSearch}

PILOTS = 6
ROUNDS = 4  #: at most; the first has all the episodes
CANDIDATES = 5  #: timed after each round
OFF = 0.04  #: measured this far below the budget, relative, a first round is followed by another


@dataclass(frozen=True)
class Episode:
    widths: tuple[int, ...]
    accuracy: float
    reward: float
    cost: float


@dataclass(frozen=True)
class Timed:
    """A policy timed on the target, interleaved with the unpruned network."""

    widths: tuple[int, ...]
    measured_ms: float
    baseline_ms: float


@dataclass(frozen=True)
class Problem:
    """What is searched.

    evaluate: widths -> held-out accuracy after the fast refit. time: policies -> their latency; None where nothing
    can be measured. used: what a timed policy uses of the budget, 1 being all of it; None where the budget is not
    one of latency.
    """

    graph: LayerGraph
    costs: CostModel
    budget: Budget | None
    evaluate: Callable[[Sequence[int]], float]
    time: Callable[[Sequence[tuple[int, ...]]], list[Timed]] | None = None
    used: Callable[[Timed], float] | None = None
    reward: str = "err"
    reward_costs: CostModel | None = None
    floor: float = 0.2
    slack: float = 0.02

    def env(self, evaluate: Callable[[Sequence[int]], float], budget: Budget | None) -> PruningEnv:
        return PruningEnv(
            self.graph,
            model=self.costs,
            budget=budget,
            evaluate=evaluate,
            reward=self.reward,
            reward_model=self.reward_costs,
            floor=self.floor,
        )


@dataclass(frozen=True)
class Outcome:
    """candidates: the best policies first, with their timing (None where nothing was timed), those that were
    measured to miss the budget left out. episodes: how many were run."""

    candidates: tuple[tuple[Episode, Timed | None], ...]
    episodes: int


class _Memory:
    """Results that the journal has already are read from it, in their order; new ones are computed and recorded."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._recorded = iter(list(journal.recorded))
        self._known: dict[tuple[int, ...], float] = {}

    def accuracy(self, widths: tuple[int, ...], evaluate: Callable[[Sequence[int]], float]) -> float:
        def compute() -> float:
            return self._known[widths] if widths in self._known else evaluate(widths)

        self._known[widths] = float(self._result("accuracy", {"widths": list(widths)}, compute))
        return self._known[widths]

    def timings(
        self, asked: Sequence[tuple[int, ...]], time: Callable[[Sequence[tuple[int, ...]]], list[Timed]]
    ) -> list[Timed]:
        def compute() -> list[list[float]]:
            return [[timed.measured_ms, timed.baseline_ms] for timed in time(asked)]

        found = self._result("measured_and_baseline_ms", {"timed": [list(widths) for widths in asked]}, compute)
        return [Timed(widths, *pair) for widths, pair in zip(asked, found, strict=True)]

    def _result(self, name: str, question: dict[str, Any], compute: Callable[[], Any]) -> Any:
        known = next(self._recorded, None)
        if known is None:
            result = compute()
            self.journal.append(question | {name: result})
            return result
        if {key: known.get(key) for key in question} != question or name not in known:
            raise UserError(
                f"{self.journal.path} was not made by this search on this machine and table: name another --out"
            )
        return known[name]


def run_search(
    problem: Problem,
    journal: Journal,
    *,
    method: str,
    episodes: int,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> Outcome:
    """Search in rounds until measured candidates meet the budget; BudgetError where none does after the last."""
    memory = _Memory(journal)
    used = problem.used if problem.time is not None else None
    limit = problem.budget.limit if problem.budget else 0.0
    bias = 1.0  # measured share of the unpruned latency over the predicted one

    def time(policies: Sequence[tuple[int, ...]]) -> list[Timed]:
        assert problem.time is not None
        return memory.timings(policies, problem.time)

    def biases(timed: Sequence[Timed]) -> float:
        assert used is not None
        return float(np.median([used(one) * limit / problem.costs.cost(one.widths) for one in timed]))

    if used is not None:
        bias = biases(time(_pilots(problem, seed)))
    search = METHODS[method](floor=problem.floor, episodes=episodes, seed=seed)
    found: dict[tuple[int, ...], Episode] = {}
    met: dict[tuple[int, ...], Timed | None] = {}
    missed: list[Timed] = []
    done = 0
    for number in range(ROUNDS):
        budget = replace(problem.budget, limit=limit / bias) if problem.budget else None
        env = problem.env(lambda widths: memory.accuracy(tuple(widths), problem.evaluate), budget)
        planned = done + search.planned(number)
        for info in search.round(env, number):
            done += 1
            one = Episode(tuple(info["widths"]), info["accuracy"], info["reward"], info["cost"])
            found.setdefault(one.widths, one)
            progress(done, max(done, planned), f"best accuracy {max(e.accuracy for e in found.values()):.4f}")
        measured = {timed.widths for timed in missed} | set(met)
        best = [one for one in _ranked(found.values()) if one.widths not in measured][:CANDIDATES]
        if used is None:
            timed_of = time([one.widths for one in best]) if problem.time is not None else [None] * len(best)
            met |= {one.widths: timed for one, timed in zip(best, timed_of, strict=True)}
            break
        new = time([one.widths for one in best]) if best else []
        met |= {timed.widths: timed for timed in new if used(timed) <= 1 + problem.slack}
        missed += [timed for timed in new if timed.widths not in met]
        if new:
            bias = biases(new)
        spare = bool(new) and max(used(timed) for timed in new) < 1 - OFF
        if met and not (spare and number == 0):
            break
    if not met:
        assert problem.budget is not None
        closest = min((used(timed) for timed in missed), default=1.0) if used else 1.0
        raise BudgetError(
            f"none of {len(missed)} measured candidates met the budget {problem.budget.text}; "
            f"the closest needs {closest:.3f} times as much: ask for that, lower --floor, or profile again"
        )
    ranked = [one for one in _ranked(found.values()) if one.widths in met]
    return Outcome(tuple((one, met[one.widths]) for one in ranked), done)


def _ranked(episodes: Any) -> list[Episode]:
    """Best reward first; among equals the cheaper."""
    return sorted(episodes, key=lambda one: (-one.reward, one.cost))


def _pilots(problem: Problem, seed: int) -> list[tuple[int, ...]]:
    """Random policies whose predicted cost is nearest to the budget."""
    assert problem.budget is not None
    grids, limit = problem.costs.grids, problem.budget.limit
    rng = np.random.default_rng([seed, 1])
    drawn = set()
    for _ in range(400):
        fractions = rng.uniform(problem.floor, 1.0) + rng.uniform(-0.2, 0.2, len(grids))
        drawn.add(tuple(min(g, key=lambda w: (abs(w - f * g[-1]), w)) for g, f in zip(grids, fractions, strict=True)))
    return sorted(sorted(drawn), key=lambda widths: abs(problem.costs.cost(widths) / limit - 1))[:PILOTS]
