"""Search methods and kinds of budget side by side: same table, same evaluator, same number of evaluations.

Every winner is timed on the device. Where a FLOPs budget stands beside a latency budget, its ratio is moved until its
winner is as fast, as measured: only then do their accuracies compare.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw.errors import BudgetError, UserError
from amc_hw.find import BUDGETS, Progress, SearchConfig, search
from amc_hw.plots import save_pareto
from amc_hw.resources import check_ratio
from amc_hw.runs import Scores, alone_in, save_json
from amc_hw.search.loop import METHODS
from amc_hw.subject import Subject
from amc_hw.task import shown_gain

EQUAL = 0.01  #: how near measured latencies must lie to count as equal, relative
STEPS = 8  #: of the search for a FLOPs ratio that gives the latency wanted
RESAMPLED = 10_000


@dataclass(frozen=True)
class CompareConfig:
    """budgets: (name of BUDGETS, value). matched: beside every latency ratio a FLOPs budget that is measured as fast.
    search: what all searches share; its method, budget, seed and folder are set for each of them."""

    methods: tuple[str, ...]
    budgets: tuple[tuple[str, float], ...]
    seeds: tuple[int, ...] = (0,)
    matched: bool = False
    search: SearchConfig = SearchConfig()
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds:
            raise UserError("a comparison needs at least one method and one seed")
        if min(self.seeds) < 0:
            raise UserError(f"--seeds {min(self.seeds)}: seeds are 0 or more")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r} in --methods; known: all, {', '.join(METHODS)}")
        if not self.budgets:
            raise UserError("give at least one of --latency-ms, --latency-ratio, --flops-ratio, --params-ratio")
        for name, value in self.budgets:
            if name.endswith("_ratio"):
                check_ratio(value)


def compare(subject: Subject, config: CompareConfig, *, progress: Progress) -> dict[str, Any]:
    """Run every search that has not ended yet, each in a folder of its own in `config.out`; rows and a verdict.

    A search that finds nothing within its budget is a row without a policy, with the reason.
    """
    arms = list(itertools.product(config.seeds, config.budgets, config.methods))
    rows: list[dict[str, Any]] = []
    with alone_in(config.out):
        scores = {seed: Scores(config.out / f"scores-{seed}.jsonl") for seed in config.seeds}
        run = partial(_row, subject, config, scores, progress=_quieter(progress))
        for number, (seed, budget, method) in enumerate(arms):
            progress(number, len(arms), f"{method}, {_named(*budget)}, seed {seed}")
            row = run(method, budget, seed)
            rows.append(row)
            if config.matched and budget[0] == "latency_ratio" and row["measured_ms"] is not None:
                rows.append(_matched(run, row, subject.network_at(None).macs))
        result = {
            "schema_version": 1,
            "rows": rows,
            "verdict": verdict(rows, accuracy=config.search.evaluate is None),
            "plot": str(config.out / "pareto.svg"),
        }
        save_pareto(config.out / "pareto.svg", f"{subject.model.spec}, {subject.device.name}", rows)
        save_json(config.out / "compare.json", result)
    return result


def _named(name: str, value: float) -> str:
    return f"{name.replace('_', ' ')} {value:g}"


def _row(
    subject: Subject,
    config: CompareConfig,
    scores: Mapping[int, Scores],
    method: str,
    budget: tuple[str, float],
    seed: int,
    *,
    progress: Progress,
    folder: str = "",
) -> dict[str, Any]:
    """One search, or what it had found."""
    name, value = budget
    budgets: dict[str, Any] = {**dict.fromkeys(BUDGETS), name: value}
    wanted = replace(
        config.search,
        **budgets,
        method=method,
        seed=seed,
        out=config.out / (folder or f"{method}-{name}{value:g}-{seed}"),
        fallback=False,
    )
    row: dict[str, Any] = {"method": method, "budget": _named(name, value), "seed": seed, "feasible": True}
    try:
        found = search(subject, wanted, progress=progress, scores=scores[seed])
    except BudgetError as error:
        found, row["feasible"] = {"message": str(error)}, False
    keys = ("accuracy", "baseline_accuracy", "predicted_ms", "measured_ms", "baseline_ms", "speedup", "macs", "params")
    row |= {key: found.get(key) for key in (*keys, "policy", "episodes", "seconds", "widths")}
    return row | {"reason": found.get("message")}


def _quieter(progress: Progress) -> Callable[[int, int, str], None]:
    """Progress of a search inside a comparison: not every line that it would say on its own."""
    return lambda done, total, text: progress(max(done, 1), max(total, 2), text)


def _matched(run: Callable[..., dict[str, Any]], latency: dict[str, Any], full_macs: int) -> dict[str, Any]:
    """The method of the row `latency` under a FLOPs budget whose winner is as fast as that row's, within EQUAL.

    The ratio is bisected, beginning where the latency policy's own MACs lie; the nearest that was found where none
    is equal, which then says so in `reason`. run: method, budget, seed and folder -> row.
    """
    wanted = latency["measured_ms"] / latency["baseline_ms"]
    low, high = 0.0, 1.0
    ratio = latency["macs"] / full_macs
    method, seed = latency["method"], latency["seed"]
    best: tuple[float, dict[str, Any]] | None = None
    for step in range(STEPS):
        folder = f"{method}-flops-as-fast-as-{wanted:.4f}-{seed}-{step}"
        ratio = round(min(max(ratio, 0.01), 1.0), 4)
        row = run(method, ("flops_ratio", ratio), seed, folder=folder)
        if row["measured_ms"] is None:
            low, ratio = ratio, (ratio + high) / 2
            continue
        share = row["measured_ms"] / row["baseline_ms"]
        off = share / wanted - 1
        if best is None or abs(off) < abs(best[0]):
            best = (off, row)
        if abs(off) <= EQUAL:
            break
        low, high = (low, ratio) if off > 0 else (ratio, high)
        guess = ratio / (1 + off)  # as if latency went with MACs; inside of what is known already
        ratio = guess if low < guess < high else (low + high) / 2
    if best is None:
        return row | {"budget": f"flops, as fast as {latency['budget']}"}
    reason = None if abs(best[0]) <= EQUAL else f"the nearest FLOPs budget is {best[0]:+.1%} off in latency"
    return best[1] | {"budget": f"flops, as fast as {latency['budget']}", "reason": reason}


def verdict(rows: Sequence[dict[str, Any]], *, accuracy: bool = True) -> list[str]:
    """What the rows say, in words: the best method per budget, and what a latency budget earns over a FLOPs budget.
    accuracy: whether scores are accuracies, whose differences are points."""
    said = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        found = {method: values for method, values in _by_method(rows, budget).items() if values}
        if len(found) > 1:
            means = {method: float(np.mean(list(values.values()))) for method, values in found.items()}
            order = sorted(means, key=lambda method: -means[method])
            first, second = order[:2]
            said.append(
                f"{budget}: {first} is best with {means[first]:.4f}, then {second} with {means[second]:.4f}"
                + _interval(found[first], found[second], accuracy)
            )
    for latency in [b for b in dict.fromkeys(row["budget"] for row in rows) if b.startswith("latency ratio")]:
        one, other = _by_method(rows, latency), _by_method(rows, f"flops, as fast as {latency}")
        for method in one:
            if one[method] and other.get(method):
                gain = _paired(one[method], other[method])
                earned = shown_gain(float(np.mean(gain)), accuracy=accuracy)
                said.append(
                    f"{method}: a {latency} budget earns {earned} over a FLOPs budget of equal measured latency"
                    + _interval(one[method], other[method], accuracy)
                )
    return said


def _by_method(rows: Sequence[dict[str, Any]], budget: str) -> dict[str, dict[int, float]]:
    """Method -> seed -> accuracy, of what was found."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["budget"] == budget:
            values = found.setdefault(row["method"], {})
            if row["accuracy"] is not None:
                values[row["seed"]] = row["accuracy"]
    return found


def _paired(one: dict[int, float], other: dict[int, float]) -> np.ndarray:
    """Differences of accuracy over the seeds that both have."""
    return np.array([one[seed] - other[seed] for seed in sorted(set(one) & set(other))])


def _interval(one: dict[int, float], other: dict[int, float], accuracy: bool) -> str:
    """95% of the mean paired difference, by bootstrap over seeds; says so where there is one seed."""
    gain = _paired(one, other)
    if len(gain) < 2:
        return " (one seed: no interval)"
    drawn = np.random.default_rng(0).choice(gain, (RESAMPLED, len(gain))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    sure = "" if low > 0 or high < 0 else "; not told apart"
    interval = " to ".join(shown_gain(float(each), accuracy=accuracy) for each in (low, high))
    return f" (difference over {len(gain)} seeds: 95% {interval}{sure})"
