"""Methods and budgets side by side: rows, equal latency, a verdict in words, and nothing searched twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amc_hw import api
from amc_hw.compare import EQUAL, STEPS, CompareConfig, _matched, mean_ci95, verdict
from amc_hw.errors import UserError

COMMAND = ("compare", "--device", "fake", "--model", "nets.py:tiny", "--data", "npz:images.npz", "--episodes", "8")


@pytest.mark.slow
def test_methods_and_budgets_side_by_side(here: Path, amc_hw: Callable) -> None:
    methods = (
        "--methods",
        "knapsack,random,uniform",
        "--latency-ratio",
        "0.6",
        "--flops-ratio",
        "0.5",
        "--matched",
        "--json",
    )
    done = amc_hw(*COMMAND, *methods)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [
        *[
            (method, budget)
            for method in ("knapsack", "random", "uniform")
            for budget in ("latency ratio 0.6", "flops, as fast as latency ratio 0.6")
        ],
        *[(method, "flops ratio 0.5") for method in ("knapsack", "random", "uniform")],
    ]
    by_budget: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        assert row["measured_ms"] > 0 and 0 <= row["accuracy"] <= 1 and row["macs"] > 0
        by_budget.setdefault(row["budget"], {})[row["method"]] = row
    for method, row in by_budget["latency ratio 0.6"].items():
        assert row["measured_ms"] <= 0.6 * row["baseline_ms"] * 1.02
        other = by_budget["flops, as fast as latency ratio 0.6"][method]
        assert abs(other["latency_off"]) <= EQUAL or "off in latency" in other["reason"]
        by_share = other["measured_ms"] / other["baseline_ms"] * row["baseline_ms"] / row["measured_ms"] - 1
        assert other["latency_off"] == pytest.approx(by_share, abs=0.02) and row["latency_off"] is None
    for row in by_budget["flops ratio 0.5"].values():
        assert row["macs"] <= 0.5 * api.describe_graph("nets.py:tiny")["macs"]
    assert any("earns" in line and "one seed: no interval" in line for line in found["verdict"])
    assert Path(found["plot"]).read_text().lstrip().startswith("<?xml")
    journals = [Path("runs/compare") / name for name in ("scores-0.jsonl", "times.jsonl")]
    before = [journal.read_bytes() for journal in journals]
    again = json.loads(amc_hw(*COMMAND, *methods).out)
    assert again["rows"] == found["rows"] and [journal.read_bytes() for journal in journals] == before
    for held in before:
        questions = [json.loads(line)["question"] for line in held.splitlines()[1:]]
        assert questions and len({json.dumps(question) for question in questions}) == len(questions)


@pytest.mark.slow
def test_a_dry_run_counts_what_is_left_to_search(here: Path, amc_hw: Callable) -> None:
    asked = (*COMMAND, "--methods", "uniform,random", "--seeds", "0,1", "--flops-ratio", "0.5")
    plan = json.loads(amc_hw(*asked, "--latency-ratio", "0.6", "--matched", "--dry-run", "--json").out)
    assert plan["searches"] == 2 * 2 * (2 + STEPS) and plan["ended"] == 0 and plan["minutes"] > 0
    assert not Path("runs").exists()
    assert amc_hw(*asked).code == 0
    said = amc_hw(*asked, "--latency-ratio", "0.6", "--dry-run").out
    assert said.startswith("at most 8 searches, 4 of them ended; 8 episodes, ")
    assert json.loads(amc_hw(*asked, "--dry-run", "--json").out)["minutes"] == 0
    assert amc_hw(*asked, "--params-ratio", "0.001", "--dry-run").code == 4


@pytest.mark.slow
def test_a_comparison_is_not_replaced_by_another(here: Path, amc_hw: Callable) -> None:
    two = ("--methods", "uniform,random", "--latency-ratio", "0.6")
    assert amc_hw(*COMMAND, *two).code == 0
    before = Path("runs/compare/compare.json").read_bytes()
    for others in (
        ("--methods", "uniform", "--latency-ratio", "0.6"),
        ("--methods", "uniform,random", "--flops-ratio", "0.5"),
    ):
        done = amc_hw(*COMMAND, *others)
        assert done.code == 2 and "compares" in done.mistake and "name another --out" in done.mistake
        assert Path("runs/compare/compare.json").read_bytes() == before
    assert amc_hw(*COMMAND, *two, "--flops-ratio", "0.5").code == 0  # all that is there, and more
    Path("runs/compare/compare.json").write_text("[]")
    assert "compare.json is damaged, or not of amc-hw" in amc_hw(*COMMAND, *two).mistake


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_is_a_row_with_a_reason(here: Path, amc_hw: Callable) -> None:
    done = amc_hw(*COMMAND, "--methods", "uniform", "--latency-ratio", "0.01", "--json")
    assert done.code == 4
    (row,) = json.loads(done.out)["rows"]
    assert row["accuracy"] is None and row["measured_ms"] is None and "smallest" in row["reason"]


@pytest.mark.slow
def test_a_budget_that_is_met_already_is_no_failure(here: Path, amc_hw: Callable) -> None:
    done = amc_hw(*COMMAND, "--methods", "uniform", "--latency-ratio", "1", "--json")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert row["accuracy"] is None and row["feasible"] and "nothing to prune" in row["reason"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--latency-ratio", "0.5", "--methods", "magic"), "unknown method 'magic': known are all, amc, ddpg, "),
        (("--latency-ratio", "0.5", "--methods", ""), "at least one method"),
        ((), "give at least one of --latency-ms"),
        (("--latency-ratio", "1.5"), "budget ratio 1.5"),
        (("--flops-ratio", "0.5", "--matched"), "--matched stands beside a latency budget"),
        (("--latency-ratio", "0.5", "--seeds", "a"), "--seeds 'a': expected whole numbers"),
        (("--latency-ratio", "0.5", "--refit", "slow"), "unknown --refit 'slow'"),
    ],
)
def test_mistakes_are_one_line(here: Path, amc_hw: Callable, flags: tuple[str, ...], words: str) -> None:
    done = amc_hw(*COMMAND, *flags)
    assert done.code == 2 and words in done.mistake


def row(method: str, budget: str, seed: int, accuracy: float | None, off: float | None = None) -> dict[str, Any]:
    return {
        "method": method,
        "budget": budget,
        "seed": seed,
        "accuracy": accuracy,
        "measured_ms": None if accuracy is None else 1.0,
        "baseline_ms": 2.0,
        "latency_off": off,
    }


def test_equal_is_what_takes_as_long_side_by_side() -> None:
    """Whatever the machine did to the unpruned network during another search."""
    latency = row("a", "latency ratio 0.5", 0, 0.8) | {"macs": 60}
    asked: list[float] = []

    def run(method: str, budget: tuple[str, float], seed: int, *, folder: str) -> dict[str, Any]:
        asked.append(budget[1])
        return row(method, "flops ratio", seed, 0.79) | {"baseline_ms": 9.0, "reason": None}

    def slower(folder: str) -> float:
        return asked[-1] / 0.5 - 1

    found = _matched(run, slower, latency, 100)
    assert asked == [0.6, 0.5] and found["latency_off"] == 0 and found["reason"] is None
    asked.clear()
    found = _matched(run, lambda folder: 0.2 - 0.01 * len(asked), latency, 100)
    assert len(asked) == STEPS and found["latency_off"] == pytest.approx(0.12)
    assert found["reason"] == "the nearest FLOPs budget is +12.0% off in latency"


def test_the_verdict_by_hand() -> None:
    rows = []
    for seed, gain in enumerate((0.010, 0.012, 0.014)):
        rows += [
            row("a", "latency ratio 0.5", seed, 0.8 + gain),
            row("a", "flops, as fast as latency ratio 0.5", seed, 0.8),
            row("b", "latency ratio 0.5", seed, 0.7),
            row("b", "flops, as fast as latency ratio 0.5", seed, None),
        ]
    said = verdict(rows)
    assert said[0].startswith(
        "latency ratio 0.5: a is best with 0.8120, then b with 0.7000 (difference over 3 seeds: 95% "
    )
    # by hand: deviation 0.2 points, Student's t 4.303, over the root of 3
    assert said[-1].endswith(
        "earns +1.20 points over a FLOPs budget of equal measured latency "
        "(difference over 3 seeds: 95% +0.70 points to +1.70 points)"
    )
    assert len(said) == 2
    mixed = [
        row(m, "latency ratio 0.5", s, v) for m, s, v in [("a", 0, 0.5), ("b", 0, 0.6), ("a", 1, 0.6), ("b", 1, 0.51)]
    ]
    assert "not told apart" in verdict(mixed)[0]
    far = [row("a", "flops, as fast as latency ratio 0.5", 0, 0.8, off=0.03), row("a", "latency ratio 0.5", 0, 0.81)]
    assert "over a FLOPs budget up to 3.0% off in measured latency (one seed: no interval)" in verdict(far)[-1]
    near = [row("a", "flops, as fast as latency ratio 0.5", 1, 0.8, off=-0.004), row("a", "latency ratio 0.5", 1, 0.8)]
    assert "up to 3.0% off" in verdict(far + near)[-1]  # the worst of them
    scores = [row("a", "flops ratio 0.5", s, 30.5 + s) for s in (0, 1)] + [
        row("b", "flops ratio 0.5", s, 30.0 + s) for s in (0, 1)
    ]
    assert "95% +0.5 to +0.5)" in verdict(scores, accuracy=False)[0]  # of a user's own score, not points


def test_methods_are_ranked_on_the_same_seeds() -> None:
    """A method that found something for the easiest seed only is no winner."""
    values = {"a": (0.90, None, None), "b": (0.91, 0.80, 0.80), "c": (0.90, 0.80, 0.80)}
    rows = [row(name, "flops ratio 0.5", seed, each) for name, of in values.items() for seed, each in enumerate(of)]
    ranked, missing = verdict(rows)
    assert ranked.startswith("flops ratio 0.5: b is best with 0.8367, then c with 0.8333")
    assert missing == "flops ratio 0.5: nothing found by a for 2 of 3 seeds"
    alike = [row(name, "flops ratio 0.5", 0, 0.9) for name in "ab"]
    assert verdict(alike) == ["flops ratio 0.5: a and b are best with 0.9000 (one seed: no interval)"]
    alike += [row(name, "flops ratio 0.5", 0, value) for name, value in (("c", 0.9), ("d", 0.8))]
    assert verdict(alike) == ["flops ratio 0.5: a, b and c are best with 0.9000 (one seed: no interval)"]


def test_an_interval_holds_the_mean_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5):
        held = [low <= 0 <= high for low, high in (mean_ci95(rng.normal(size=count)) for _ in range(1000))]
        assert 0.93 < np.mean(held) < 0.97


def test_the_seed_of_the_folder_is_that_of_a_comparison(here: Path, amc_hw: Callable) -> None:
    Path("amc-hw.toml").write_text("seed = 7\n")
    done = amc_hw(*COMMAND, "--methods", "uniform", "--flops-ratio", "0.5", "--json")
    assert done.code == 0 and [each["seed"] for each in json.loads(done.out)["rows"]] == [7]


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least one method"):
        CompareConfig((), (("latency_ratio", 0.5),))
    with pytest.raises(UserError, match="one seed"):
        CompareConfig(("ddpg",), (("latency_ratio", 0.5),), seeds=())
