"""Searches on a network whose latency and accuracy are formulas: the target's word decides, and a journal resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.resources import CostModel, Term, budget_from, macs_model
from amc_hw.runs import Journal
from amc_hw.search.loop import CANDIDATES, OFF, PILOTS, SHOWN, Outcome, Problem, Timed, run_search
from amc_hw.search.uniform import uniform_policies

Widths = tuple[int, ...]
GRIDS = ((4, 6, 8, 10, 12, 14, 16),) * 2 + (tuple(range(6, 33, 2)),)
UNIFORM = set(uniform_policies(GRIDS))
EPISODES = 16
RATIO = 0.6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The agent's matrices are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_graph() -> LayerGraph:
    """Three groups: 16, 16 and 32 channels."""
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    rest = [nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return build_graph(nn.Sequential(*convs, *rest).eval(), (3, 8, 8))


GRAPH = tiny_graph()


def table(*, scale: float = 1.0) -> CostModel:
    """Predicted milliseconds: 10.5 unpruned, 1 + 3.5 + 4 + 2 of them for each part."""
    a, b, c = (np.array(grid) / grid[-1] for grid in GRIDS)
    terms = (Term((0,), a), Term((0, 1), 3.5 * np.outer(a, b)), Term((1, 2), 4 * np.outer(b, c)))
    return CostModel(GRIDS, tuple(replace(term, values=scale * term.values) for term in terms), 2.0 * scale, "ms")


def accuracy(widths: Sequence[int]) -> float:
    """Smooth, 0.9 at full width, and never the same for two policies of one cost."""
    a, b, c = (width / grid[-1] for width, grid in zip(widths, GRIDS, strict=True))
    return 0.9 - 0.30 * (1 - a) ** 2 - 0.22 * (1 - b) ** 2 - 0.14 * (1 - c) ** 2


class Target:
    """A device that takes `share` times as long for a pruned network as `costs` predicts; all that it did is kept.

    confirmed_share: the same in a process of its own. worthless: policies without any accuracy.
    """

    def __init__(
        self,
        costs: CostModel,
        share: Callable[[Widths], float] = lambda widths: 1.0,
        confirmed_share: Callable[[Widths], float] | None = None,
        worthless: frozenset[Widths] = frozenset(),
    ) -> None:
        self.costs, self.share, self.confirmed_share = costs, share, confirmed_share or share
        self.worthless = worthless
        self.evaluated: list[Widths] = []
        self.batches: list[list[Widths]] = []  # timed together: pilots, then candidates
        self.uniform: list[Widths] = []  # timed between them
        self.finished: list[Widths] = []
        self.confirmed: list[Widths] = []

    @property
    def timed(self) -> list[Widths]:
        return [widths for batch in self.batches for widths in batch]

    @property
    def calls(self) -> int:
        return sum(map(len, (self.evaluated, self.timed, self.uniform, self.finished, self.confirmed)))

    def evaluate(self, widths: Sequence[int]) -> float:
        self.evaluated.append(tuple(widths))
        return 0.0 if tuple(widths) in self.worthless else accuracy(widths)

    def finish(self, widths: Sequence[int]) -> float:
        self.finished.append(tuple(widths))
        return accuracy(widths) + 0.01

    def time(self, policies: Sequence[Widths]) -> list[Timed]:
        if set(policies) <= UNIFORM:
            self.uniform += policies
        else:
            self.batches.append(list(policies))
        return [self.one(widths) for widths in policies]

    def one(self, widths: Widths) -> Timed:
        return Timed(widths, self.costs.cost(widths) * self.share(widths), self.costs.full_cost)

    def confirm(self, widths: Widths) -> tuple[list[float], list[float]]:
        self.confirmed.append(widths)
        pruned_ms = self.costs.cost(widths) * self.confirmed_share(widths)
        return [0.99 * pruned_ms, pruned_ms, 1.01 * pruned_ms], [self.costs.full_cost] * 3

    def used(self, timed: Timed) -> float:
        return timed.measured_ms / timed.baseline_ms / RATIO

    def problem(self, **options: Any) -> Problem:
        return Problem(
            GRAPH,
            self.costs,
            budget_from(self.costs, ratio=RATIO),
            self.evaluate,
            self.finish,
            self.time,
            self.confirm,
            **{"used": self.used, "floor": 0.25} | options,
        )

    def spare_episodes(self) -> int:
        """Of the second round, where all candidates of the first leave a part of the budget."""
        return 10 if max(self.used(self.one(widths)) for widths in self.batches[1]) < 1 - OFF else 0

    def uniform_within(self) -> list[Widths]:
        """The widest uniform policy that meets the budget, where one does."""
        return [widths for widths in self.uniform if self.used(self.one(widths)) <= 1.02][:1]

    def used_by(self, outcome: Outcome) -> float:
        """Share of the budget that the winner was measured to use."""
        pruned, baseline = outcome.samples_ms
        return float(np.median(pruned) / np.median(baseline)) / RATIO


def quiet(done: int, total: int, text: str) -> None:
    assert 0 <= done <= total and text


def search(
    problem: Problem, path: Path, *, seed: int = 0, episodes: int = EPISODES, said: list[str] | None = None
) -> Outcome:
    def progress(done: int, total: int, text: str) -> None:
        quiet(done, total, text)
        if said is not None:
            said.append(text)

    journal = Journal(path / "metrics.jsonl", {"schema_version": 1, "seed": seed})
    return run_search(problem, journal, method="ddpg", episodes=episodes, seed=seed, progress=progress)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()[1:]]


def test_a_right_table_spends_the_budget(tmp_path: Path) -> None:
    target = Target(table())
    outcome = search(target.problem(), tmp_path)
    assert 0.9 < target.used_by(outcome) <= 1 + 1e-9
    assert outcome.episodes == EPISODES + target.spare_episodes()
    assert [len(batch) for batch in target.batches[:2]] == [PILOTS, CANDIDATES]
    # the pilots come first, and are near the budget; then every episode, once per policy; the winner comes last
    found = rows(tmp_path)
    assert list(found[0]) == ["timed", "measured_and_baseline_ms"] and len(found[0]["timed"]) == PILOTS
    limit = RATIO * target.costs.full_cost
    assert all(abs(target.costs.cost(widths) / limit - 1) < 0.05 for widths in found[0]["timed"])
    proposed = [tuple(row["widths"]) for row in found if "widths" in row]
    assert len(proposed) == outcome.episodes and target.evaluated == list(dict.fromkeys(proposed))
    assert all(target.costs.cost(widths) <= limit * (1 + 1e-6) for widths in proposed)
    finished = [*target.timed[PILOTS:], *target.uniform_within()]
    assert [tuple(row["finished"]) for row in found if "finished" in row] == sorted(finished)
    assert found[-1] == {"confirmed": list(outcome.widths), "samples_ms": list(outcome.samples_ms)}
    assert max(map(accuracy, target.finished)) == accuracy(outcome.widths)


@pytest.mark.parametrize("recorded", [0, 2])
def test_refits_that_the_journal_lacks_are_begun_together(tmp_path: Path, recorded: int) -> None:
    target, begun = Target(table()), []
    whole = search(target.problem(), tmp_path / "whole")
    finished = list(target.finished)
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines(keepends=True)
    cut = next(number for number, line in enumerate(lines) if '"finished"' in line) + recorded
    (tmp_path / "again").mkdir()
    (tmp_path / "again/metrics.jsonl").write_text("".join(lines[:cut]))
    target = Target(table())
    assert search(target.problem(finish_ahead=begun.append), tmp_path / "again").widths == whole.widths
    assert list(begun[0]) == finished[recorded:] == target.finished


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [1.1, 1.3, 0.9])
def test_a_table_that_is_off_still_ends_at_the_budget(tmp_path: Path, share: float, seed: int) -> None:
    """1.1: pruned networks take 10% longer than the table says, beside the unpruned one."""
    target = Target(table(), lambda widths: share)
    outcome = search(target.problem(), tmp_path, seed=seed)
    assert 0.93 < target.used_by(outcome) <= 1.02
    limit = RATIO * target.costs.full_cost  # corrected by the pilots, before the first episode
    assert all(target.costs.cost(widths) <= limit / share * (1 + 1e-6) for widths in target.evaluated)


def test_a_machine_that_is_slow_for_all_networks_changes_no_ratio(tmp_path: Path) -> None:
    right, slow = Target(table()), Target(table())
    one = slow.one
    slow.one = lambda widths: Timed(widths, 2 * one(widths).measured_ms, 2 * one(widths).baseline_ms)
    assert search(slow.problem(), tmp_path / "slow").widths == search(right.problem(), tmp_path / "right").widths


def pilots() -> frozenset[Widths]:
    """The policies that a search times before its first episode."""

    class Seen(Exception):
        pass

    def time(policies: Sequence[Widths]) -> list[Timed]:
        raise Seen(policies)

    class Nowhere:
        path, recorded = Path("nowhere"), ()

    with pytest.raises(Seen) as seen:
        problem = replace(Target(table()).problem(), time=time)
        run_search(problem, Nowhere(), method="ddpg", episodes=EPISODES, seed=0, progress=quiet)
    return frozenset(seen.value.args[0])


def surprising(share: float) -> Target:
    """The pilots take what the table says, all that the search finds takes `share` times that."""
    piloted = pilots()
    return Target(table(), lambda widths: 1.0 if widths in piloted else share, worthless=piloted)


def test_candidates_that_miss_correct_the_table_for_another_round(tmp_path: Path) -> None:
    target, said = surprising(1.8), list[str]()
    outcome = search(target.problem(), tmp_path, said=said)
    assert said.count("no measured policy met the budget: 10 more episodes") == 1
    assert all(target.used(target.one(widths)) > 1.02 for widths in target.batches[1])
    assert len(target.batches) == 3 and outcome.episodes == EPISODES + 10
    assert target.used_by(outcome) <= 1.02 and outcome.widths in target.batches[2]


def test_candidates_that_leave_a_part_of_the_budget_get_a_spare_round(tmp_path: Path) -> None:
    target, said = surprising(0.8), list[str]()
    outcome = search(target.problem(), tmp_path, said=said)
    assert said.count("all measured policies leave more than 4% of the budget: 10 more episodes") == 1
    first = target.batches[1]
    spent = max(target.used(target.one(widths)) for widths in first)
    assert spent <= 0.8 + 1e-6 and target.used_by(outcome) <= 1.02
    assert len(target.batches) == 3 and outcome.episodes == EPISODES + 10
    assert set(first) < set(target.finished) and accuracy(outcome.widths) == max(map(accuracy, target.finished))


def test_a_policy_of_the_first_round_stays_where_the_spare_round_finds_nothing(tmp_path: Path) -> None:
    """What the first round found is faster than predicted; what is allowed anew turns out too slow."""
    target = Target(table())

    def share(widths: Widths) -> float:
        fast = target.batches[1] if len(target.batches) > 1 else []
        return 0.9 if widths in fast else 2.0 if fast else 1.0

    target.share = target.confirmed_share = share
    outcome = search(target.problem(), tmp_path)
    assert len(target.batches) == 3
    assert outcome.widths in target.batches[1] and target.used_by(outcome) <= 0.9 + 1e-6


def test_a_budget_that_no_measured_candidate_meets_is_exit_4_with_a_number(tmp_path: Path) -> None:
    target = Target(table(), lambda widths: 3.0)
    with pytest.raises(BudgetError) as error:
        search(target.problem(), tmp_path)
    assert error.value.exit_code == 4
    candidates = {*target.timed[PILOTS:], *target.uniform}
    closest = min(target.used(target.one(widths)) for widths in candidates)
    assert closest > 1.02 and f"the closest needs {RATIO * closest:.4g} instead of {RATIO}" in str(error.value)
    assert f"{len(candidates)} measured candidates" in str(error.value)
    assert not target.finished and not target.confirmed  # the slow refit is not for those


def test_the_timing_of_the_search_process_is_not_the_last_word(tmp_path: Path) -> None:
    """In the process of the search all is well; in a fresh one the most accurate candidates are too slow."""
    slow: list[Widths] = []

    def confirmed_share(widths: Widths) -> float:
        if len(slow) < 2 and widths not in slow:
            slow.append(widths)
        return 2.0 if widths in slow else 1.0

    target = Target(table(), confirmed_share=confirmed_share)
    outcome = search(target.problem(), tmp_path)
    assert target.confirmed == [*slow, outcome.widths] and outcome.episodes == EPISODES + target.spare_episodes()
    assert target.used_by(outcome) <= 1.02
    best_first = sorted(target.finished, key=accuracy, reverse=True)
    assert target.confirmed == best_first[:3]


def test_a_uniform_policy_does_not_win_because_better_ones_are_a_little_over(tmp_path: Path) -> None:
    """All candidates of the first round are 5% over the budget in a process of their own."""
    target, said = Target(table()), list[str]()

    def confirmed_share(widths: Widths) -> float:
        limit = RATIO * target.costs.full_cost
        return 1.05 * limit / target.costs.cost(widths) if widths in target.batches[1] else 1.0

    target.confirmed_share = confirmed_share
    outcome = search(target.problem(), tmp_path, said=said)
    uniform = max(map(accuracy, UNIFORM & set(target.confirmed)))
    assert (outcome.found_by, outcome.over) == ("method", None) and accuracy(outcome.widths) > uniform
    more = said.count("what is better is a little over the budget: 10 more episodes")
    assert more > 0 and target.used_by(outcome) <= 1.02 and outcome.episodes == EPISODES + 10 * more
    assert len(target.confirmed) == len(set(target.confirmed)) and len(target.finished) == len(set(target.finished))


def test_better_ones_that_are_over_the_budget_in_the_search_count_too(tmp_path: Path) -> None:
    """Of the first round's candidates the last alone keeps the budget, and loses to a uniform policy."""
    target, said = Target(table()), list[str]()

    def share(widths: Widths) -> float:
        first = target.batches[1] if len(target.batches) > 1 else []
        if widths not in first[:-1]:
            return 1.0
        return 1.05 * RATIO * target.costs.full_cost / target.costs.cost(widths)

    def finish(widths: Sequence[int]) -> float:
        target.finished.append(tuple(widths))
        return 0.0 if tuple(widths) == target.batches[1][-1] else accuracy(widths)

    target.share = target.confirmed_share = share
    outcome = search(replace(target.problem(), finish=finish), tmp_path, said=said)
    assert said.count("what is better is a little over the budget: 10 more episodes") > 0
    assert outcome.found_by == "method" and outcome.widths not in target.batches[1]


@pytest.mark.parametrize("name", ["uniform", "deep"])
def test_a_rule_is_asked_once_where_what_it_says_keeps_the_budget(tmp_path: Path, name: str) -> None:
    target, said = Target(table()), list[str]()
    journal = Journal(tmp_path / "metrics.jsonl", {"schema_version": 1, "seed": 0})
    outcome = run_search(
        target.problem(), journal, method=name, episodes=1, seed=0, progress=lambda done, total, text: said.append(text)
    )
    assert target.used_by(outcome) <= 1.02 and not [text for text in said if "more episodes" in text]


def test_a_uniform_policy_that_wins_for_want_of_others_is_told(tmp_path: Path) -> None:
    target = Target(table(), confirmed_share=lambda widths: 1.0 if widths in UNIFORM else 4.0)
    outcome = search(target.problem(), tmp_path)
    others = [4.0 * target.costs.cost(widths) for widths in target.confirmed if widths not in UNIFORM]
    assert outcome.found_by == "uniform" and outcome.widths in UNIFORM
    assert outcome.over == pytest.approx(min(others) / target.costs.full_cost / RATIO)


def test_one_candidate_is_predicted_to_leave_a_margin(tmp_path: Path) -> None:
    target = Target(table())
    search(target.problem(), tmp_path)
    limit = RATIO * target.costs.full_cost
    first = [target.costs.cost(widths) for widths in target.batches[1]]
    assert len(first) == CANDIDATES and max(first) <= limit * (1 + 1e-9) and min(first) <= 0.98 * limit


def test_confirmations_that_all_miss_correct_the_table(tmp_path: Path) -> None:
    target = Target(table(), confirmed_share=lambda widths: 1.8)
    outcome = search(target.problem(), tmp_path)
    assert len(target.confirmed) > CANDIDATES and outcome.episodes > EPISODES
    assert target.used_by(outcome) <= 1.02
    assert len(target.confirmed) == len(set(target.confirmed)), "a policy that missed was confirmed again"


def test_a_slow_fresh_process_for_everything_is_exit_4(tmp_path: Path) -> None:
    target = Target(table(), confirmed_share=lambda widths: 3.0)
    with pytest.raises(BudgetError) as error:
        search(target.problem(), tmp_path)
    closest = min(3.0 * target.costs.cost(widths) / target.costs.full_cost / RATIO for widths in target.confirmed)
    assert f"the closest needs {RATIO * closest:.4g} instead" in str(error.value)
    assert f"none of {len(target.confirmed)} measured candidates" in str(error.value)
    assert len(target.confirmed) == len(set(target.confirmed))


def test_slack_is_what_a_measurement_may_exceed_the_budget(tmp_path: Path) -> None:
    def exceeding(used: float) -> Target:
        """Every policy uses that much of the budget."""
        return Target(table(), lambda widths: used * RATIO * table().full_cost / table().cost(widths))

    outcome = search(exceeding(1.015).problem(), tmp_path / "inside")  # 0.02 where nobody says otherwise
    assert outcome.episodes == EPISODES
    for number, (used, slack) in enumerate([(1.025, 0.02), (1.001, 0.0)]):
        with pytest.raises(BudgetError, match=f"needs {RATIO * used:.4g} instead"):
            search(exceeding(used).problem(slack=slack), tmp_path / f"outside{number}")


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_a_flops_budget_never_rejects_by_timing(tmp_path: Path, share: float) -> None:
    costs = macs_model(GRAPH, GRIDS)
    target = Target(costs, lambda widths: share)
    problem = target.problem(used=None)
    outcome = search(problem, tmp_path)
    assert not target.batches and len(target.confirmed) == 1  # timed once, for the report
    assert outcome.episodes == EPISODES and costs.cost(outcome.widths) <= RATIO * costs.full_cost
    assert max(map(accuracy, target.finished)) == accuracy(outcome.widths)
    assert outcome.widths == search(target.problem(used=None, slack=0.0), tmp_path / "again").widths


def test_a_reward_without_a_budget_never_rejects(tmp_path: Path) -> None:
    target = Target(table(), lambda widths: 3.0)
    outcome = search(replace(target.problem(used=None, reward="latency"), budget=None), tmp_path)
    assert not target.batches and outcome.episodes == EPISODES


def test_a_journal_cut_anywhere_resumes_to_the_same_run(tmp_path: Path) -> None:
    whole = surprising(0.8)  # two rounds
    expected = search(whole.problem(), tmp_path / "whole")
    text = (tmp_path / "whole/metrics.jsonl").read_bytes()
    ends = [index + 1 for index, letter in enumerate(text) if letter == ord("\n")]
    assert len(whole.batches) == 3
    for number, cut in enumerate(sorted({*range(0, len(ends), 8), len(ends) - 2, len(ends) - 1})):
        path = tmp_path / str(cut)
        path.mkdir()
        torn = number % 2 * 3  # bytes of the line in flight
        (path / "metrics.jsonl").write_bytes(text[: ends[cut] + torn])
        target = surprising(0.8)
        assert search(target.problem(), path) == expected
        assert (path / "metrics.jsonl").read_bytes() == text
        known = {tuple(row["widths"]) for row in map(json.loads, text[: ends[cut]].splitlines()) if "widths" in row}
        assert known.isdisjoint(target.evaluated), "what the journal has was evaluated again"
    assert target.calls == 0  # the last cut left all of it


def test_the_same_seed_proposes_the_same_and_another_does_not(tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        target = Target(table())
        search(target.problem(), tmp_path / str(number), seed=seed)
        runs.append((target.timed, target.evaluated))
    assert runs[0] == runs[1] != runs[2]


def test_a_journal_of_another_table_is_refused_and_kept(tmp_path: Path) -> None:
    search(Target(table()).problem(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    a, b, c = (np.array(grid) / grid[-1] for grid in GRIDS)
    other = CostModel(GRIDS, (Term((0,), 4 * a), Term((1,), b), Term((2,), c**2)), 1.0, "ms")
    with pytest.raises(UserError, match="--out") as error:
        search(Target(other).problem(), tmp_path)
    assert error.value.exit_code == 2 and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_journal_whose_timings_are_gone_is_refused(tmp_path: Path) -> None:
    """A line missing in the middle is not taken for an answer to another question."""
    search(Target(table()).problem(), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(UserError, match="was not made by this search"):
        search(Target(table()).problem(), tmp_path)


def test_the_first_episodes_keep_uniform_policies_within_the_budget_and_such_near_them(tmp_path: Path) -> None:
    target = Target(table())
    search(target.problem(), tmp_path, episodes=48)
    limit = RATIO * target.costs.full_cost
    widest = next(widths for widths in uniform_policies(target.costs.grids) if target.costs.cost(widths) <= limit)
    proposed = [tuple(row["widths"]) for row in rows(tmp_path) if "widths" in row]
    assert proposed[0] == widest

    def distance(widths: Widths) -> float:
        return max(abs(a - b) / grid[-1] for a, b, grid in zip(widths, widest, GRIDS, strict=True))

    shown, alone = proposed[1 : round(SHOWN * 48)], proposed[round(SHOWN * 48) : 12]
    assert len(set(shown)) > 2
    assert np.mean([distance(widths) for widths in shown]) < np.mean([distance(widths) for widths in alone])


def test_a_search_does_not_lose_to_a_uniform_policy(tmp_path: Path) -> None:
    """All that the agent finds is worthless after the faithful refit; the widest uniform policy that meets wins."""
    target = Target(table())
    finish = target.finish
    target.finish = lambda widths: finish(widths) - (0.0 if tuple(widths) in UNIFORM else 0.5)
    outcome = search(target.problem(), tmp_path)
    assert [outcome.widths] == target.uniform_within() and 0.9 < target.used_by(outcome) <= 1.02


@pytest.mark.parametrize("unit", ["latency", "macs"])
def test_only_uniform_policies_within_the_budget_take_part(tmp_path: Path, unit: str) -> None:
    target = Target(table() if unit == "latency" else macs_model(GRAPH, GRIDS))
    search(target.problem() if unit == "latency" else target.problem(used=None), tmp_path)
    inside = [w for w in uniform_policies(GRIDS) if target.costs.cost(w) <= RATIO * target.costs.full_cost * 1.02]
    if unit == "macs":  # no slack for what is counted
        inside = [w for w in inside if target.costs.cost(w) <= RATIO * target.costs.full_cost]
        assert not target.uniform
    shown = {*target.finished} & UNIFORM
    assert inside[0] in shown and shown <= set(inside)
