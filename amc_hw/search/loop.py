"""The search: a method proposes widths, every result is journaled before the next begins, the best are timed.

To resume, the method is run again from its seed and given what the journal recorded, accuracies and timings; it
then proposes what it would have proposed without the interruption.

A search exploits the errors of its table, so under a latency budget the table is corrected by what the target says:
before the first episode, by a few random policies that are predicted to be at the budget, and after each round by
the candidates. The correction is one factor, measured over predicted, of milliseconds or of the share of the unpruned
latency, whichever the budget limits: a scale, so the cost stays a sum over operators, and what changes is the limit
that predictions have to keep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from amc_hw.env import REWARDS, PruningEnv
from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import LayerGraph
from amc_hw.resources import Budget, CostModel, Grids, keeps, snap
from amc_hw.runs import Journal
from amc_hw.search.ddpg import AMCSearch, DDPGSearch
from amc_hw.search.evolution import EvolutionSearch
from amc_hw.search.greedy import GreedySearch
from amc_hw.search.handmade import DeepSearch, ShallowSearch, UniformSearch
from amc_hw.search.knapsack import KnapsackSearch
from amc_hw.search.method import SHOWN, SPREAD, Method
from amc_hw.search.random import RandomSearch
from amc_hw.search.sensitivity import SensitivitySearch
from amc_hw.search.uniform import tied_groups, uniform_policies
from amc_hw.task import Judged

#: By the names of `amc_hw.choices.METHODS`, in that order.
METHODS: dict[str, type[Method]] = {
    "ddpg": DDPGSearch,
    "amc": AMCSearch,
    "knapsack": KnapsackSearch,
    "greedy": GreedySearch,
    "sensitivity": SensitivitySearch,
    "evolution": EvolutionSearch,
    "random": RandomSearch,
    "uniform": UniformSearch,
    "shallow": ShallowSearch,
    "deep": DeepSearch,
}

#: What `--method auto` is (docs/algorithm.md, Other methods).
AUTO = "knapsack"
FREE = "ddpg"  #: and without a budget

PILOTS = 6
ROUNDS = 4  #: at most; the first has all the episodes
UNIFORM = 4  #: of each kind, timed
NEAR = 0.03  #: predicted this far above the budget, relative, a uniform policy is timed nevertheless
CANDIDATES = 5  #: timed after each round
OFF = 0.04  #: measured this far below the budget, relative, a first round is followed by another


@dataclass(frozen=True)
class Episode:
    """worth: for ranking, as of `PruningEnv.judge`. shown: a demonstration, not the method's own."""

    widths: tuple[int, ...]
    accuracy: float
    worth: float
    cost: float
    shown: bool = False


@dataclass(frozen=True)
class Timed:
    """A policy timed on the target, interleaved with the unpruned network."""

    widths: tuple[int, ...]
    measured_ms: float
    baseline_ms: float


@dataclass(frozen=True)
class Problem:
    """What is searched.

    evaluate: widths -> held-out accuracy after the refit of a search, or `Judged`. finish: accuracy after the final
    refit.
    time: policies -> their latency, timed together. confirm: one policy as it will be deployed, timed in a process
    of its own, None where the device is away. used: what a timed policy uses of the budget, 1 being all of it; None
    where the budget is not one of measured latency. fallback: uniform policies take part in the end. ahead: told of
    policies that `evaluate` will be asked for, where several are scored at once, finish_ahead of those that `finish`
    will be asked for; together: how many a method that
    learns proposes before it learns. metric: what a score is called.
    """

    graph: LayerGraph
    costs: CostModel
    budget: Budget | None
    evaluate: Callable[[Sequence[int]], float | Judged]
    finish: Callable[[Sequence[int]], float]
    time: Callable[[Sequence[tuple[int, ...]]], list[Timed]]
    confirm: Callable[[tuple[int, ...]], tuple[list[float], list[float]]] | None
    used: Callable[[Timed], float] | None = None
    reward: str = "err"
    reward_costs: CostModel | None = None
    floor: float = 0.2
    slack: float = 0.02
    fallback: bool = True
    ahead: Callable[[Sequence[tuple[int, ...]]], None] | None = None
    finish_ahead: Callable[[Sequence[tuple[int, ...]]], None] | None = None
    together: int = 1
    metric: str = "accuracy"

    def env(
        self,
        evaluate: Callable[[Sequence[int]], float | Judged],
        budget: Budget | None,
        ahead: Callable[[Sequence[tuple[int, ...]]], None],
    ) -> PruningEnv:
        return PruningEnv(
            self.graph,
            model=self.costs,
            budget=budget,
            evaluate=evaluate,
            reward=self.reward,
            reward_model=self.reward_costs,
            floor=self.floor,
            ahead=ahead,
        )


@dataclass(frozen=True)
class Outcome:
    """The winner, its samples of (pruned, unpruned) in milliseconds, None where the device is away, how many episodes
    it took, and who proposed it: "method", "demonstration" or "uniform", which takes part in every search. over: where
    that one won for want of better ones within the budget, what the nearest of these uses of it, else None."""

    widths: tuple[int, ...]
    samples_ms: tuple[list[float], list[float]] | None
    episodes: int
    found_by: str
    over: float | None = None


class _Memory:
    """Results that the journal has already are read from it, in their order; new ones are computed and recorded."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._recorded, self._read = iter(list(journal.recorded)), 0
        self._known: dict[tuple[int, ...], Judged] = {}

    def judged(self, widths: tuple[int, ...], evaluate: Callable[[Sequence[int]], float | Judged]) -> Judged:
        def compute() -> dict[str, Any]:
            score, distortion = Judged.of(self._known[widths] if widths in self._known else evaluate(widths))
            return {"accuracy": score} | ({} if distortion is None else {"distortion": distortion})

        found = self._results({"widths": list(widths)}, "accuracy", compute)
        self._known[widths] = Judged(float(found["accuracy"]), found.get("distortion"))
        return self._known[widths]

    def ahead(self, policies: Sequence[tuple[int, ...]], begin: Callable[[Sequence[tuple[int, ...]]], None]) -> None:
        """Begin with those policies of the next ones that the journal does not have."""
        begin([widths for widths in dict.fromkeys(self.missing(policies)) if widths not in self._known])

    def missing(self, policies: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Of the policies that the next questions are about, those that the journal does not have."""
        return policies[len(self.journal.recorded) - self._read :]

    def result(self, question: dict[str, Any], name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, or what it gave when the same question was asked at this place."""
        return self._results(question, name, lambda: {name: compute()})[name]

    def _results(self, question: dict[str, Any], name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As `result`, several by name, one of which there must be."""
        known = next(self._recorded, None)
        self._read += known is not None
        if known is None:
            result = compute()
            self.journal.append(question | result)
            return result
        if {key: known.get(key) for key in question} != question or name not in known:
            raise UserError(
                f"{self.journal.path} was not made by this search on this machine and table: name another --out"
            )
        return known


def run_search(
    problem: Problem,
    journal: Journal,
    *,
    method: str,
    episodes: int,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> Outcome:
    """Search in rounds until a measured policy meets the budget; BudgetError where none does after the last."""
    chosen = METHODS[method](problem.floor, episodes, seed)
    chosen.together = problem.together
    return _Rounds(problem, journal, seed, progress).run(chosen)


class _Rounds:
    def __init__(
        self, problem: Problem, journal: Journal, seed: int, progress: Callable[[int, int, str], None]
    ) -> None:
        self.problem, self.seed, self.progress = problem, seed, progress
        self.memory = _Memory(journal)
        self.found: dict[tuple[int, ...], Episode] = {}
        self.met: set[tuple[int, ...]] = set()  # in the process of the search
        self.uniform: set[tuple[int, ...]] = set()  # of those that met, no agent asked
        self.missed: dict[tuple[int, ...], float] = {}  # widths -> share of the budget used
        self.finished: dict[tuple[int, ...], float] = {}  # widths -> accuracy after the final refit
        self.confirmed: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}  # their samples
        self.bias = 1.0  # what measured policies use of the budget over what they were predicted to use
        self.episodes = 0

    def run(self, method: Method) -> Outcome:
        rounds = ROUNDS if self.problem.used is not None else 1
        if self.problem.used is not None:
            self._learn(self._time(_pilots(self.problem, self.seed)))
        self._judge_uniform()
        why = ""
        for number in range(rounds):
            if number:
                self.progress(0, method.planned(number), f"{why}: {method.planned(number)} more episodes")
            limit = self._round(method, number)
            self.met |= self.uniform & self.found.keys()  # timed already
            spare = self._judge(self._candidates(limit))
            why = "no measured policy met the budget"
            if self.met:
                why = f"all measured policies leave more than {OFF:.0%} of the budget"
            if not self.met or (spare and number == 0):
                continue
            winner = self._confirmed()
            if winner is not None and (winner.over is None or number == rounds - 1):
                return winner
            why = "what is better is a little over the budget"
        if self.uniform and (winner := self._confirmed()) is not None:
            return winner
        assert self.problem.budget is not None
        if not self.missed:
            advice = "give more --episodes" if method.episodes > 1 else "the rule does not reach it, take another"
            raise BudgetError(f"no policy within {self.problem.budget.text} was found: {advice}")
        budget, closest = self.problem.budget, min(self.missed.values())
        raise BudgetError(
            f"none of {len(self.missed)} measured candidates met the budget {budget.text}; the closest needs "
            f"{budget.given * closest:.4g} instead of {budget.given:g}: ask for that, lower --floor, or profile again "
            "and name a new --out"
        )

    def _candidates(self, limit: float) -> list[tuple[int, ...]]:
        """The best policies that are predicted within the limit, one of them by a margin: the best lie at the limit,
        often near to each other, and may be over it together."""
        known = self.met | self.uniform | set(self.missed)
        ranked = _ranked(self.found.values())
        inside = [one for one in ranked if one.widths not in known and keeps(one.cost, limit)]
        wary = [one for one in inside if keeps(one.cost, limit * (1 - self.problem.slack))]
        best = inside[:CANDIDATES]
        timed = self.problem.used is not None
        if timed and wary and len(inside) > CANDIDATES and wary[0] not in best:
            best[-1] = wary[0]
        return [one.widths for one in best]

    def _round(self, method: Method, number: int) -> float:
        """Run the episodes of a round; the cost that they had to keep."""
        problem, budget = self.problem, self.problem.budget
        if budget is not None:
            # what is learned may not make the budget unreachable: the cheapest policy stays in
            cheapest = problem.costs.completer.best()[0]
            budget = replace(budget, limit=max(budget.limit / self.bias, cheapest))
        limit = math.inf if budget is None else budget.limit
        memory = self.memory

        def ahead(policies: Sequence[tuple[int, ...]]) -> None:
            if problem.ahead is not None:
                memory.ahead(policies, problem.ahead)

        env = problem.env(lambda widths: memory.judged(tuple(widths), problem.evaluate), budget, ahead)
        total = self.episodes + method.planned(number)
        count = round(SHOWN * method.episodes)
        shown = demonstrations(problem, budget, count, self.seed) if number == 0 else []
        for info in method.round(env, number, shown):
            self.episodes += 1
            one = Episode(tuple(info["widths"]), info["accuracy"], info["worth"], info["cost"], bool(info.get("shown")))
            self.found.setdefault(one.widths, one)
            inside = [each.accuracy for each in self.found.values() if keeps(each.cost, limit)]
            best = f"best {self.problem.metric} {max(inside):.4f}" if inside else "no policy within the budget yet"
            self.progress(self.episodes, total, best)
        return limit

    def _time(self, policies: Sequence[tuple[int, ...]]) -> list[Timed]:
        def compute() -> list[list[float]]:
            return [[timed.measured_ms, timed.baseline_ms] for timed in self.problem.time(policies)]

        question = {"timed": [list(widths) for widths in policies]}
        found = self.memory.result(question, "measured_and_baseline_ms", compute)
        return [Timed(widths, *pair) for widths, pair in zip(policies, found, strict=True)]

    def _learn(self, timed: Sequence[Timed]) -> None:
        used, budget, costs = self.problem.used, self.problem.budget, self.problem.costs
        assert used is not None and budget is not None
        self.bias = float(np.median([used(one) * budget.limit / costs.cost(one.widths) for one in timed]))

    def _judge_uniform(self) -> None:
        """The widest uniform policy of each kind that meets the budget takes part in the end: a search does not lose
        to what needs none."""
        budget, used = self.problem.budget, self.problem.used
        if budget is None or not self.problem.fallback:
            return
        limit = budget.limit / self.bias * (1 + NEAR if used is not None else 1)
        kinds = [kind[:UNIFORM] for kind in _uniform_within(self.problem, limit)]
        if used is None:
            self.uniform |= {kind[0] for kind in kinds if kind}
            return
        policies = list(dict.fromkeys(widths for kind in kinds for widths in kind))
        share = {one.widths: used(one) for one in (self._time(policies) if policies else [])}
        for kind in kinds:
            self.uniform |= set([widths for widths in kind if share[widths] <= 1 + self.problem.slack][:1])
        self.missed |= {widths: each for widths, each in share.items() if each > 1 + self.problem.slack}

    def _judge(self, policies: Sequence[tuple[int, ...]]) -> bool:
        """Time policies, sort them into met and missed, learn; True where all of them leave much of the budget."""
        used = self.problem.used
        if used is None:
            self.met |= set(policies)
            return False
        if not policies:
            return False
        timed = self._time(policies)
        for one in timed:
            if used(one) <= 1 + self.problem.slack:
                self.met.add(one.widths)
            else:
                self.missed[one.widths] = used(one)
        self._learn(timed)
        return max(used(one) for one in timed) < 1 - OFF

    def _confirmed(self) -> Outcome | None:
        """Of the policies that met the budget the best after the faithful refit that also meets it in a process of its
        own, of equals the one that uses more of it; None where none does, which then counts as missed."""
        problem, pool = self.problem, sorted(self.met | self.uniform)
        new = [widths for widths in pool if widths not in self.finished]
        if problem.finish_ahead is not None:
            problem.finish_ahead(self.memory.missing(new))
        for number, widths in enumerate(new):
            self.progress(number, len(new), "refitting the candidates")
            question = {"finished": list(widths)}
            self.finished[widths] = self.memory.result(question, "accuracy", partial(problem.finish, widths))
        failed = []
        # of a refitted candidate the score is known, not the distortion
        reward = REWARDS["err" if problem.reward == "distortion" else problem.reward][1]
        costs = problem.reward_costs or problem.costs

        def rank(widths: tuple[int, ...]) -> tuple[float, float]:
            return -reward(1 - self.finished[widths], costs.cost(widths)), -problem.costs.cost(widths)

        winner = None
        for widths in sorted(pool, key=rank):
            if problem.confirm is None:
                winner = self._outcome(widths)
                break
            if widths not in self.confirmed:
                question = {"confirmed": list(widths)}
                pruned, baseline = self.memory.result(question, "samples_ms", partial(problem.confirm, widths))
                self.confirmed[widths] = pruned, baseline
            pruned, baseline = self.confirmed[widths]
            timed = Timed(widths, float(np.median(pruned)), float(np.median(baseline)))
            if problem.used is None or problem.used(timed) <= 1 + problem.slack:
                winner = self._outcome(widths)
                break
            self.met.discard(widths)
            self.uniform.discard(widths)
            self.missed[widths] = problem.used(timed)
            failed.append(timed)
        if failed:
            self._learn(failed)
        return winner

    def _outcome(self, widths: tuple[int, ...]) -> Outcome:
        """over: of policies that the method found, those that ranked higher: in the end, or else in the search than all
        that met the budget."""
        by = self._found_by(widths)
        met = max((self.found[each].worth for each in self.met if each in self.found), default=-math.inf)
        better = [
            share
            for each, share in self.missed.items()
            if each in self.found and (each in self.confirmed or self.found[each].worth > met)
        ]
        over = min(better, default=None) if by == "uniform" else None
        return Outcome(widths, self.confirmed.get(widths), self.episodes, by, over)

    def _found_by(self, widths: tuple[int, ...]) -> str:
        if widths in self.uniform:
            return "uniform"
        return "demonstration" if self.found[widths].shown else "method"


def demonstrations(problem: Problem, budget: Budget | None, count: int, seed: int) -> list[tuple[int, ...]]:
    """About `count` policies near uniform ones: the widest within the budget, of all groups and of those only that no
    addition ties, then the same with every width moved at random. Independent random widths are all poor in a deep
    network, and say little of where good ones are."""
    grids = problem.costs.grids
    kinds = _uniform_within(problem, math.inf if budget is None else budget.limit)
    first = list(dict.fromkeys(widths for kind in kinds for widths in kind[:1]))
    rng = np.random.default_rng([seed, 2])
    moved = []
    for base in itertools.islice(itertools.cycle(first), max(count - len(first), 0)):
        fractions = np.array([width / grid[-1] for width, grid in zip(base, grids, strict=True)])
        fractions = np.clip(fractions + rng.normal(0.0, SPREAD, len(grids)), problem.floor, 1.0)
        moved.append(_snapped(fractions, grids))
    return first + moved


def _snapped(fractions: np.ndarray, grids: Grids) -> tuple[int, ...]:
    """The widths of the grids that are nearest to fractions (groups,) of all channels."""
    return tuple(snap(fraction, grid[-1], grid) for grid, fraction in zip(grids, fractions, strict=True))


def _uniform_within(problem: Problem, limit: float) -> list[list[tuple[int, ...]]]:
    """Uniform policies that cost at most `limit`, widest first: of all groups, and of those only that no addition
    ties."""
    kinds = (uniform_policies(problem.costs.grids, full=full) for full in (set[int](), tied_groups(problem.graph)))
    return [[widths for widths in kind if keeps(problem.costs.cost(widths), limit)] for kind in kinds]


def _ranked(episodes: Iterable[Episode]) -> list[Episode]:
    """Best first; among equals the cheaper."""
    return sorted(episodes, key=lambda one: (-one.worth, one.cost))


def _pilots(problem: Problem, seed: int) -> list[tuple[int, ...]]:
    """Random policies whose predicted cost is nearest to the budget."""
    assert problem.budget is not None
    grids, limit = problem.costs.grids, problem.budget.limit
    rng = np.random.default_rng([seed, 1])
    drawn = set()
    for _ in range(400):
        fractions = rng.uniform(problem.floor, 1.0) + rng.uniform(-0.2, 0.2, len(grids))
        drawn.add(_snapped(fractions, grids))
    return sorted(sorted(drawn), key=lambda widths: abs(problem.costs.cost(widths) / limit - 1))[:PILOTS]
