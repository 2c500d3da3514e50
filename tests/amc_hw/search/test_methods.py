"""One suite for all methods: budgets, numbers of evaluations, seeds, resuming; and what each is good at."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amc_hw.env import PruningEnv
from amc_hw.graph import build_graph
from amc_hw.resources import Completer, CostModel, Term, budget_from
from amc_hw.runs import Journal
from amc_hw.search.knapsack import solve
from amc_hw.search.loop import METHODS, Outcome, Problem, demonstrations, run_search
from amc_hw.search.sensitivity import Curves, points, spread
from amc_hw.task import Judged

GRIDS = ((4, 6, 8, 10, 12, 14, 16),) * 2 + (tuple(range(6, 33, 2)),)
SEARCHING = [name for name in METHODS if name not in ("uniform", "shallow", "deep")]
EPISODES = 40


def graph():
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    rest = [nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return build_graph(nn.Sequential(*convs, *rest).eval(), (3, 8, 8))


GRAPH = graph()


def costs() -> CostModel:
    a, b, c = (np.array(grid) / grid[-1] for grid in GRIDS)
    terms = (Term((0,), a), Term((0, 1), 3.5 * np.outer(a, b)), Term((1, 2), 4 * np.outer(b, c)))
    return CostModel(GRIDS, terms, 2.0, "ms")


def accuracy(widths: Sequence[int]) -> float:
    """The first group is dear, the last is cheap: uniform is far from best."""
    a, b, c = (width / grid[-1] for width, grid in zip(widths, GRIDS, strict=True))
    return 0.9 - 0.60 * (1 - a) ** 2 - 0.22 * (1 - b) ** 2 - 0.04 * (1 - c) ** 2


def rounds(name: str, ratio: float, *, episodes: int = EPISODES, seed: int = 0) -> tuple[list[dict], PruningEnv]:
    model = costs()
    env = PruningEnv(GRAPH, model=model, budget=budget_from(model, ratio=ratio), evaluate=accuracy, floor=0.25)
    method = METHODS[name](0.25, episodes, seed)
    return list(method.round(env, 0)), env


def optimum(ratio: float) -> float:
    model = costs()
    inside = (each for each in itertools.product(*GRIDS) if model.cost(each) <= ratio * model.full_cost)
    return max(map(accuracy, inside))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.95])
def test_a_round_keeps_to_its_evaluations_and_finds_policies_within_the_budget(name: str, ratio: float) -> None:
    found, env = rounds(name, ratio)
    assert 1 <= len(found) <= METHODS[name](0.25, EPISODES, 0).planned(0) <= EPISODES
    for one in found:
        assert one["cost"] == env.model.cost(one["widths"]) and one["accuracy"] == accuracy(one["widths"])
        assert one["reward"] == pytest.approx(one["accuracy"] - 1)
    assert any(one["cost"] <= env.budget.limit * (1 + 1e-6) for one in found)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_proposes_the_same(name: str) -> None:
    proposed = [[one["widths"] for one in rounds(name, 0.6, seed=seed)[0]] for seed in (3, 3)]
    assert proposed[0] == proposed[1]


@pytest.mark.parametrize("name", SEARCHING)
def test_searching_beats_uniform(name: str) -> None:
    found, env = rounds(name, 0.6)
    (uniform,), _ = rounds("uniform", 0.6)
    best = max(one["accuracy"] for one in found if one["cost"] <= env.budget.limit * (1 + 1e-6))
    assert uniform["accuracy"] < best <= optimum(0.6) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_agent_ends_better_than_it_was_shown(seed: int) -> None:
    """Where losses add up, the agent finds better policies than its demonstrations, and its last ones are about as good
    as the best of these: it does not forget."""
    model = costs()
    problem = Problem(GRAPH, model, budget_from(model, ratio=0.5), accuracy, accuracy, lambda policies: [], None)
    shown = demonstrations(problem, problem.budget, 10, seed)
    env = problem.env(accuracy, problem.budget, lambda policies: None)
    found = list(METHODS["ddpg"](0.25, 80, seed).round(env, 0, shown))
    best = max(one["accuracy"] for one in found if one["shown"])
    own = [one["accuracy"] for one in found if not one["shown"]]
    assert len(own) == 70 and max(own) > best and np.median(own[-10:]) >= best - 0.005


def test_knapsack_finds_the_optimum_of_what_adds_up() -> None:
    found, env = rounds("knapsack", 0.6)
    best = max(one["accuracy"] for one in found if one["cost"] <= env.budget.limit * (1 + 1e-6))
    assert best >= optimum(0.6) - 0.004


@pytest.mark.parametrize("name", METHODS)
def test_a_search_that_was_cut_goes_on(name: str, tmp_path: Path) -> None:
    """From any line of its journal a search asks for the rest and nothing else, and ends alike."""
    asked: list[tuple[int, ...]] = []

    def evaluate(widths: Sequence[int]) -> float:
        asked.append(tuple(widths))
        return accuracy(widths)

    model = costs()
    problem = Problem(
        GRAPH, model, budget_from(model, ratio=0.6), evaluate, accuracy, lambda policies: [], None, floor=0.25
    )

    def run(path: Path):
        return run_search(
            problem, Journal(path, {"search": name}), method=name, episodes=12, seed=1, progress=lambda *_: None
        )

    whole = run(tmp_path / "whole.jsonl")
    first, lines = list(asked), (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines) // 2, len(lines)):
        asked.clear()
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:cut]))
        assert run(tmp_path / "cut.jsonl") == whole
        assert len(asked) < len(first) or cut == 1
        assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines)


def test_a_budget_that_moves_is_kept_in_the_next_round() -> None:
    model = costs()
    for name in METHODS:
        method = METHODS[name](0.25, EPISODES, 0)
        for number, ratio in enumerate((0.7, 0.5)):
            env = PruningEnv(GRAPH, model=model, budget=budget_from(model, ratio=ratio), evaluate=accuracy, floor=0.25)
            found = list(method.round(env, number))
            assert any(one["cost"] <= env.budget.limit * (1 + 1e-6) for one in found), (name, ratio)


@pytest.mark.parametrize("name", ["knapsack", "greedy", "evolution", "sensitivity"])
def test_distortion_tells_apart_what_accuracy_does_not(name: str) -> None:
    """Accuracies of a few images: all alike but for chance. What a method thinks best is best in distortion."""

    def judged(widths: Sequence[int]) -> Judged:
        chance = 0.01 * (hash(tuple(widths)) % 3)
        return Judged(0.8 + chance, 0.9 - accuracy(widths))

    model = costs()
    env = PruningEnv(GRAPH, model=model, budget=budget_from(model, ratio=0.6), evaluate=judged, floor=0.25)
    found = list(METHODS[name](0.25, EPISODES, 0).round(env, 0))
    inside = [one for one in found if one["cost"] <= env.budget.limit * (1 + 1e-6)]  # type: ignore[union-attr]
    best = max(inside, key=lambda one: one["worth"])
    assert best["lost"] == best["distortion"] == min(one["distortion"] for one in inside)
    (uniform,), _ = rounds("uniform", 0.6)
    assert accuracy(best["widths"]) > uniform["accuracy"]


def test_a_reward_of_cost_and_error_ranks_by_itself() -> None:
    model = costs()
    env = PruningEnv(
        GRAPH, model=replace(model, unit="MACs"), budget=None, evaluate=lambda w: Judged(0.9, 0.1), reward="flops"
    )
    found = env.judge(model.full_widths)
    assert found["worth"] == found["reward"] != -0.1 and found["lost"] == 0.1


@pytest.mark.parametrize("together", [1, 4, 16])
def test_evolution_begins_with_nothing_alive_however_many_are_asked_together(together: int) -> None:
    model = costs()
    env = PruningEnv(GRAPH, model=model, budget=budget_from(model, ratio=0.6), evaluate=accuracy, floor=0.25)
    method = METHODS["evolution"](0.25, 20, 0)
    method.together = together
    assert len(list(method.round(env, 0))) == 20


@pytest.mark.parametrize("episodes", [4, 8, 12])
def test_greedy_reaches_the_budget_with_few_evaluations(episodes: int) -> None:
    """No single group can pay for all of it: several are shrunk together."""
    found, env = rounds("greedy", 0.3, episodes=episodes)
    assert len(found) <= episodes and any(one["cost"] <= env.budget.limit * (1 + 1e-6) for one in found)


@pytest.mark.parametrize("name", ["knapsack", "sensitivity"])
@pytest.mark.parametrize("episodes", [3, 4, 6])
def test_a_group_that_was_not_measured_is_not_free(name: str, episodes: int) -> None:
    """With fewer evaluations than groups: what is not known is taken to be as the others are."""
    assert METHODS[name].enough(len(GRIDS)) == 7 > episodes
    found, env = rounds(name, 0.6, episodes=episodes)
    inside = [one for one in found if one["cost"] <= env.budget.limit * (1 + 1e-6)]
    assert inside and len(found) <= episodes
    curves = Curves(costs(), costs().full_widths, 0.1)
    curves.add(0, 4, 0.5)
    assert curves.losses(2)[0] == pytest.approx(np.interp(6 / 32 * 16, GRIDS[0], curves.losses(0)))
    assert curves.losses(2)[-1] == 0 and (np.diff(curves.losses(2)) <= 0).all()


# The knapsack's own objective


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostModel, list[np.ndarray], float]:
    """Three to five groups in a chain, with a term over three of them now and then; losses of any shape."""
    count = draw(st.integers(3, 5))
    sizes = [draw(st.integers(1, 4)) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    grids = tuple(tuple(range(1, size + 1)) for size in sizes)
    scopes = [(group, group + 1) for group in range(count - 1)] + [(0,)]
    scopes += [(0, 1, 2)] if draw(st.booleans()) else []
    terms = tuple(Term(scope, rng.uniform(0, 1, [sizes[group] for group in scope])) for scope in scopes)
    model = CostModel(grids, terms, 0.3, "ms")
    losses = [rng.uniform(-0.1, 0.3, size) for size in sizes]
    every = [model.cost(each) for each in itertools.product(*grids)]
    limit = draw(st.floats(min(every), max(every)))
    return model, losses, limit


@settings(max_examples=60)
@given(problems())
def test_the_knapsack_is_solved_exactly(problem: tuple[CostModel, list[np.ndarray], float]) -> None:
    model, losses, limit = problem

    def total(widths: Sequence[int]) -> float:
        return sum(float(loss[width - 1]) for loss, width in zip(losses, widths, strict=True))

    inside = [each for each in itertools.product(*model.grids) if model.cost(each) <= limit * (1 + 1e-9)]
    found = solve(model, losses, limit)
    assert model.cost(found) <= limit * (1 + 1e-8) + 1e-9
    assert total(found) <= min(map(total, inside)) + 1e-6


def test_within_reach_only_and_the_cheapest_where_nothing_fits() -> None:
    model = costs()
    losses = [np.linspace(0.3, 0, len(grid)) for grid in GRIDS]
    reach = [[2, 3], [1, 2], [0, 5]]
    widths = solve(model, losses, math.inf, reach=reach)
    assert widths == (GRIDS[0][3], GRIDS[1][2], GRIDS[2][5])
    assert solve(model, losses, 0.0) == Completer(model).best()[1]


# Curves


def test_curves_interpolate_and_never_fall_with_fewer_channels() -> None:
    model = costs()
    curves = Curves(model, model.full_widths, 0.1)
    curves.add(0, 4, 0.5)
    curves.add(0, 10, 0.3)
    curves.add(0, 12, 0.15)
    curves.add(0, 14, 0.20)  # noise: worse than with 12
    assert curves.losses(0) == pytest.approx([0.4, 0.4 - 0.2 / 3, 0.4 - 0.4 / 3, 0.2, 0.1, 0.1, 0.0])
    assert curves.losses(1) == pytest.approx(curves.losses(0))  # not measured: as the others, here on the same grid
    assert not Curves(model, model.full_widths, 0.1).losses(1).any()
    curves.add(1, 12, 0.2)
    assert curves.losses(1)[0] == pytest.approx(0.1 + 8 * 0.1 / 4)  # on as it rose last


@given(st.lists(st.integers(1, 300), min_size=1, unique=True).map(sorted), st.integers(0, 12))
def test_points_are_widths_of_the_grid_the_smallest_first(grid: list[int], count: int) -> None:
    found = points(grid, count)
    assert len(found) <= count and set(found) <= set(grid[:-1]) and found == sorted(set(found))
    if found:
        assert found[0] == grid[0]


Score = Callable[[Sequence[int]], float]


def outcome(tmp_path: Path, name: str, finish: Score, *, evaluate: Score = accuracy, **more: Any) -> Outcome:
    model = costs()
    problem = Problem(
        GRAPH, model, budget_from(model, ratio=0.6), evaluate, finish, lambda policies: [], None, floor=0.25, **more
    )
    journal = Journal(tmp_path / "journal.jsonl", {"search": name})
    return run_search(problem, journal, method=name, episodes=24, seed=1, progress=lambda *_: None)


def test_of_equal_candidates_the_one_that_uses_the_budget_wins(tmp_path: Path) -> None:
    """A score too coarse to tell them apart does not speak for the smallest network."""
    found, model = outcome(tmp_path, "random", lambda widths: 0.5), costs()
    finished = [json.loads(line).get("finished") for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert model.cost(found.widths) == max(model.cost(tuple(each)) for each in finished if each)


@pytest.mark.parametrize(("name", "who"), [("random", "uniform"), ("ddpg", "demonstration"), ("random", "method")])
def test_the_winner_is_who_found_it(tmp_path: Path, name: str, who: str) -> None:
    """The score likes what was tried first, or what the method never tried: the agent begins with demonstrations."""
    tried: dict[tuple[int, ...], int] = {}

    def evaluate(widths: Sequence[int]) -> float:
        return 0.9 - 0.01 * tried.setdefault(tuple(widths), len(tried))

    def finish(widths: Sequence[int]) -> float:
        return 0.9 - 0.01 * tried.get(tuple(widths), -1 if who == "uniform" else 90)

    fallback = who != "demonstration"  # the first ones are uniform, but for what is free
    assert outcome(tmp_path, name, finish, evaluate=evaluate, fallback=fallback).found_by == who


@given(count=st.integers(0, 40), most=st.integers(-1, 50))
def test_what_is_asked_is_spread_from_the_first_to_the_last(count: int, most: int) -> None:
    found = spread(range(count), most)
    assert len(found) == max(min(count, most), 0) and found == sorted(set(found))
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, count - 1)


@pytest.mark.parametrize("name", ["greedy", "knapsack"])
def test_a_later_round_of_few_evaluations_looks_at_the_whole_network(name: str) -> None:
    """The last groups lose nothing: they have to be found although not every group can be asked."""
    grids = (tuple(range(4, 33, 4)),) * 14
    model = CostModel(grids, tuple(Term((group,), np.array(grids[0]) / 32) for group in range(14)), 0.0, "ms")

    def judged(widths: Sequence[int]) -> Judged:
        lost = sum((1 - width / 32) ** 2 for width in widths[:10]) / 10
        return Judged(0.9 - lost, lost)

    layers = [nn.Conv2d(3 if index == 0 else 32, 32, 1) for index in range(14)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()
    method, touched = METHODS[name](0.1, 40, 0), set[int]()
    for number, ratio in enumerate((0.9, 0.75)):
        env = PruningEnv(
            build_graph(network, (3, 4, 4)), model=model, budget=budget_from(model, ratio=ratio), evaluate=judged
        )
        before = None
        for one in method.round(env, number):
            if number == 1 and before is not None:
                touched |= {group for group in range(14) if one["widths"][group] != before[group]}
            before = one["widths"]
    assert max(touched) >= 12 and min(touched) <= 1
