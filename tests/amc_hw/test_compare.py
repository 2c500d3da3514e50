"""Methods and budgets side by side: rows, equal latency, a verdict in words, and nothing searched twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amc_hw import api
from amc_hw.compare import EQUAL, CompareConfig, verdict
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
        off = abs(other["measured_ms"] / other["baseline_ms"] * row["baseline_ms"] / row["measured_ms"] - 1)
        assert off <= EQUAL + 1e-9 or "off in latency" in other["reason"]
    for row in by_budget["flops ratio 0.5"].values():
        assert row["macs"] <= 0.5 * api.describe_graph("nets.py:tiny")["macs"]
    assert any("earns" in line and "one seed: no interval" in line for line in found["verdict"])
    assert Path(found["plot"]).read_text().lstrip().startswith("<?xml")
    before = Path("runs/compare/scores-0.jsonl").read_bytes()
    again = json.loads(amc_hw(*COMMAND, *methods).out)
    assert again["rows"] == found["rows"] and Path("runs/compare/scores-0.jsonl").read_bytes() == before
    questions = [json.loads(line)["question"] for line in before.splitlines()[1:]]
    assert len({json.dumps(question) for question in questions}) == len(questions)


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
        (("--latency-ratio", "0.5", "--methods", "magic"), "unknown method 'magic' in --methods; known: all, ddpg"),
        (("--latency-ratio", "0.5", "--methods", ""), "at least one method"),
        ((), "give at least one of --latency-ms"),
        (("--latency-ratio", "1.5"), "budget ratio 1.5"),
        (("--latency-ratio", "0.5", "--seeds", "a"), "--seeds 'a': expected whole numbers"),
        (("--latency-ratio", "0.5", "--refit", "slow"), "unknown --refit 'slow'"),
    ],
)
def test_mistakes_are_one_line(here: Path, amc_hw: Callable, flags: tuple[str, ...], words: str) -> None:
    done = amc_hw(*COMMAND, *flags)
    assert done.code == 2 and words in done.mistake


def row(method: str, budget: str, seed: int, accuracy: float | None) -> dict[str, Any]:
    return {"method": method, "budget": budget, "seed": seed, "accuracy": accuracy}


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
    assert (
        "earns +1.20 points over a FLOPs budget of equal measured latency (difference over 3 seeds: 95% +1.0"
        in said[-1]
    )
    assert "not told apart" not in said[-1] and len(said) == 2
    mixed = [
        row(m, "latency ratio 0.5", s, v) for m, s, v in [("a", 0, 0.5), ("b", 0, 0.6), ("a", 1, 0.6), ("b", 1, 0.51)]
    ]
    assert "not told apart" in verdict(mixed)[0]
    scores = [row("a", "flops ratio 0.5", s, 30.5 + s) for s in (0, 1)] + [
        row("b", "flops ratio 0.5", s, 30.0 + s) for s in (0, 1)
    ]
    assert "95% +0.5 to +0.5)" in verdict(scores, accuracy=False)[0]  # of a user's own score, not points


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least one method"):
        CompareConfig((), (("latency_ratio", 0.5),))
    with pytest.raises(UserError, match="one seed"):
        CompareConfig(("ddpg",), (("latency_ratio", 0.5),), seeds=())
