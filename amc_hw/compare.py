"""Search methods and kinds of budget side by side: same table, same evaluator, same number of evaluations.

Every winner is timed, where the device is here. Where a FLOPs budget stands beside a latency budget, its ratio is moved
until its winner is as fast, as measured side by side: only then do their accuracies compare.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw.choices import BUDGETS
from amc_hw.errors import BudgetError, UserError
from amc_hw.find import POLICY, RESULT, SearchConfig, check_budget, plan_search, search, timed_anew
from amc_hw.plots import save_pareto
from amc_hw.resources import check_ratio
from amc_hw.runs import Progress, Scores, alone_in, save_json, silent
from amc_hw.search.loop import METHODS
from amc_hw.specs import unknown_name
from amc_hw.subject import Subject, open_pruned, read_table
from amc_hw.task import shown_gain
from amc_hw.weights import folded_weights
from profilers.ops import digest
from profilers.targets import Network
from profilers.timing import Steady, mean_half_width

EQUAL = 0.01  #: how near measured latencies must lie to count as equal, relative
STEPS = 8  #: of the search for a FLOPs ratio that gives the latency wanted
COMPARED = "compare.json"
AS_FAST = "flops, as fast as "  #: the latency budget that a FLOPs budget was matched to


@dataclass(frozen=True)
class CompareConfig:
    """budgets: (name of BUDGETS, value). matched: beside every latency budget a FLOPs budget that is measured as fast.
    search: what all searches share; its method, budget, seed and folder are set for each of them."""

    methods: tuple[str, ...]
    budgets: tuple[tuple[str, float], ...]
    seeds: tuple[int, ...] = (0,)
    matched: bool = False
    search: SearchConfig = SearchConfig()
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if not self.methods or not self.seeds:
            raise UserError("a comparison needs at least one method and one seed")
        if min(self.seeds) < 0:
            raise UserError(f"--seeds {min(self.seeds)}: seeds are 0 or more")
        for method in self.methods:
            if method not in METHODS:
                raise unknown_name("method", method, ["all", *METHODS], forms=())
        if not self.budgets:
            raise UserError("give at least one of --latency-ms, --latency-ratio, --flops-ratio, --params-ratio")
        for name, value in self.budgets:
            if name.endswith("_ratio"):
                check_ratio(value)
        if self.matched and not any(_of_latency(name) for name, _ in self.budgets):
            raise UserError("--matched stands beside a latency budget: give --latency-ratio or --latency-ms")


def _of_latency(budget: str) -> bool:
    return budget.startswith("latency")


def compare(subject: Subject, config: CompareConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """Run every search that has not ended yet, each in a folder of its own in `config.out`; rows and a verdict.

    A search that finds nothing within its budget is a row without a policy, with the reason.
    """
    read_table(subject)  # without one nothing is begun
    arms = _arms(subject, config)
    rows: list[dict[str, Any]] = []
    with alone_in(config.out):
        _refuse_others(config, arms)
        scores = {seed: Scores(config.out / f"scores-{seed}.jsonl") for seed in config.seeds}
        run = partial(_row, subject, config, scores, progress=_quieter(progress))
        for number, (seed, budget, method) in enumerate(arms):
            progress(number, len(arms), f"{method}, {_named(*budget)}, seed {seed}")
            row = run(method, budget, seed)
            rows.append(row)
            if config.matched and _of_latency(budget[0]) and row["policy"] is not None:
                slower = partial(_slower, subject, config.out, _folder(method, budget, seed))
                rows.append(_matched(run, slower, row, subject.network_at(None).macs))
        result = {
            "schema_version": 1,
            "rows": rows,
            "verdict": verdict(rows, accuracy=config.search.evaluate is None),
            "plot": str(config.out / "pareto.svg"),
        }
        score = "accuracy" if config.search.evaluate is None else "score"
        save_pareto(config.out / "pareto.svg", f"{subject.model.spec}, {subject.device.name}", rows, score=score)
        save_json(config.out / COMPARED, result)
    return result


def plan_compare(subject: Subject, config: CompareConfig) -> dict[str, Any]:
    """What `compare` would do: how many searches at most, how many of them have ended, and minutes at most for the
    others, which share scores. Nothing is written, nothing is timed on the device.

    BudgetError where a budget cannot be met, which `compare` makes a row of.
    """
    arms = _arms(subject, config)
    for budget in config.budgets[1:]:  # planning checks the first
        check_budget(subject, _search_config(config, config.methods[0], budget, config.seeds[0]))
    one = plan_search(subject, _search_config(config, config.methods[0], config.budgets[0], config.seeds[0]))
    folders = [_folder(method, budget, seed) for seed, budget, method in arms]
    for seed, budget, method in arms:
        if config.matched and _of_latency(budget[0]):
            folders += [_matched_folder(method, _named(*budget), seed, step) for step in range(STEPS)]
    ended = sum((config.out / folder / RESULT).exists() for folder in folders)
    return one | {"searches": len(folders), "ended": ended, "minutes": one["minutes"] * (len(folders) - ended)}


def _arms(subject: Subject, config: CompareConfig) -> list[tuple[int, tuple[str, float], str]]:
    """(seed, budget, method) of every search but the matched ones; UserError where those cannot be made."""
    if config.matched and not subject.target.can_time:
        raise UserError(f"--matched needs a device that can be timed, {subject.device.name} is a table alone")
    return list(itertools.product(config.seeds, config.budgets, config.methods))


def _refuse_others(config: CompareConfig, arms: Sequence[tuple[int, tuple[str, float], str]]) -> None:
    """UserError where the folder has a comparison with searches that are not among these: it would be replaced."""
    path = config.out / COMPARED
    if not path.exists():
        return
    asked = {(method, _named(*budget), seed) for seed, budget, method in arms}
    if config.matched:
        asked |= {(method, f"{AS_FAST}{budget}", seed) for method, budget, seed in asked if _of_latency(budget)}
    try:
        found = [(row["method"], row["budget"], row["seed"]) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or not of amc-hw: name another --out") from None
    for method, budget, seed in found:
        if (method, budget, seed) not in asked:
            raise UserError(
                f"{path} compares {method} at {budget}, seed {seed}, too: name another --out, or ask for that and more"
            )


def _folder(method: str, budget: tuple[str, float], seed: int) -> str:
    name, value = budget
    return f"{method}-{name}{value:g}-{seed}"


def _matched_folder(method: str, latency: str, seed: int, step: int) -> str:
    return f"{method}-flops-as-fast-as-{latency.replace(' ', '')}-{seed}-{step}"


def _search_config(
    config: CompareConfig, method: str, budget: tuple[str, float], seed: int, folder: str = ""
) -> SearchConfig:
    name, value = budget
    budgets: dict[str, Any] = {**dict.fromkeys(BUDGETS), name: value}
    out = config.out / (folder or _folder(method, budget, seed))
    return replace(config.search, **budgets, method=method, seed=seed, out=out, fallback=False)


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
    wanted = _search_config(config, method, budget, seed, folder)
    row: dict[str, Any] = {"method": method, "budget": _named(*budget), "seed": seed, "feasible": True}
    try:
        found = search(subject, wanted, progress=progress, scores=scores[seed])
    except BudgetError as error:
        found, row["feasible"] = {"message": str(error)}, False
    keys = ("accuracy", "baseline_accuracy", "predicted_ms", "measured_ms", "baseline_ms", "speedup", "macs", "params")
    row |= {
        key: found.get(key) for key in (*keys, "policy", "episodes", "seconds", "widths", "budget_used", "found_by")
    }
    return row | {"latency_off": None, "reason": found.get("message")}


def _quieter(progress: Progress) -> Callable[[int, int, str], None]:
    """Progress of a search inside a comparison: not every line that it would say on its own."""

    def say(done: int, total: int, text: str) -> None:
        if done:
            progress(done, max(total, 2), text)

    return say


def _slower(subject: Subject, out: Path, one: str, other: str) -> float:
    """How much slower the policy of the folder `other` in `out` is than that of `one`, relative. They are timed side by
    side, once: shares of the unpruned latency drift by several percent between two searches on a busy machine."""
    policies = [open_pruned(out / folder / POLICY) for folder in (one, other)]
    if policies[0].widths == policies[1].widths:
        return 0.0

    def timed() -> list[float]:
        networks = []
        for each in policies:
            graph = each.graph.op_graph(each.widths, batch=subject.device.batch)
            networks.append(Network(graph, folded_weights(each.module, each.graph)))
        return [float(np.median(samples)) for samples in timed_anew(subject, Steady(), networks)]

    where = asdict(subject.target.identity()), digest(subject.network_at(None))
    question = [*where, *(list(each.widths) for each in policies)]
    first, second = Scores(out / "times.jsonl").score(question, timed)
    return float(second / first - 1)


def _matched(
    run: Callable[..., dict[str, Any]], slower: Callable[[str], float], latency: dict[str, Any], full_macs: int
) -> dict[str, Any]:
    """The method of the row `latency` under a FLOPs budget whose winner is as fast as that row's, within EQUAL.

    The ratio is bisected, beginning where the latency policy's own MACs lie; the nearest that was found where none
    is equal, which then says so in `reason`. run: method, budget, seed and folder -> row. slower: name of a folder ->
    how much slower than the row's its policy is, relative.
    """
    low, high = 0.0, 1.0
    ratio = latency["macs"] / full_macs
    method, seed = latency["method"], latency["seed"]
    name = f"{AS_FAST}{latency['budget']}"
    best: dict[str, Any] | None = None
    for step in range(STEPS):
        ratio = round(min(max(ratio, 0.01), 0.9999), 4)  # all of the MACs is no budget
        folder = _matched_folder(method, latency["budget"], seed, step)
        row = run(method, ("flops_ratio", ratio), seed, folder=folder)
        if row["measured_ms"] is None:
            low, ratio = ratio, (ratio + high) / 2
            continue
        row["latency_off"] = off = slower(folder)
        if best is None or abs(off) < abs(best["latency_off"]):
            best = row
        if abs(off) <= EQUAL:
            break
        low, high = (low, ratio) if off > 0 else (ratio, high)
        guess = ratio / (1 + off)  # as if latency went with MACs; inside of what is known already
        ratio = guess if low < guess < high else (low + high) / 2
    if best is None:
        return row | {"budget": name}
    off = best["latency_off"]
    return best | {
        "budget": name,
        "reason": None if abs(off) <= EQUAL else f"the nearest FLOPs budget is {off:+.1%} off in latency",
    }


def verdict(rows: Sequence[dict[str, Any]], *, accuracy: bool = True) -> list[str]:
    """What the rows say, in words: the best method per budget, and what a latency budget earns over a FLOPs budget.
    accuracy: whether scores are accuracies, whose differences are points."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    said = []
    for budget in budgets:
        if not budget.startswith(AS_FAST):  # those policies are as fast as another method's each
            said += _ranking(rows, budget, accuracy)
    for latency in filter(_of_latency, budgets):
        one, other = (_by_method(rows, budget) for budget in (latency, f"{AS_FAST}{latency}"))
        for method in one:
            if len(gain := _paired(one[method], other.get(method, {}))):
                earned = shown_gain(float(np.mean(gain)), accuracy=accuracy)
                off = _off_equal(rows, method, latency)
                equal = "of equal measured latency" if off <= EQUAL else f"up to {off:.1%} off in measured latency"
                said.append(
                    f"{method}: a {latency} budget earns {earned} over a FLOPs budget {equal}"
                    + _interval(gain, accuracy)
                )
    return said


def _ranking(rows: Sequence[dict[str, Any]], budget: str, accuracy: bool) -> list[str]:
    """The best method of those that found a policy for every seed, and which did not."""
    found = _by_method(rows, budget)
    seeds = {row["seed"] for row in rows if row["budget"] == budget}
    means = {name: float(np.mean(list(values.values()))) for name, values in found.items() if set(values) == seeds}
    said = []
    if len(means) > 1:
        first, second, *_ = ranked = sorted(means, key=lambda method: -means[method])
        best = f"{budget}: {first} is best with {means[first]:.4f}, then {second} with {means[second]:.4f}"
        if means[first] == means[second]:
            *others, last = [method for method in ranked if means[method] == means[first]]
            best = f"{budget}: {', '.join(others)} and {last} are best with {means[first]:.4f}"
        said.append(best + _interval(_paired(found[first], found[second]), accuracy))
    missed = {name: len(seeds) - len(values) for name, values in found.items() if name not in means}
    if missed and len(found) > 1:
        each = ", ".join(f"{name} for {count} of {len(seeds)} seeds" for name, count in missed.items())
        said.append(f"{budget}: nothing found by {each}")
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


def _off_equal(rows: Sequence[dict[str, Any]], method: str, latency: str) -> float:
    """How far at most the policies of a FLOPs budget are from those of the latency budget in latency, relative."""
    asked = (f"{AS_FAST}{latency}", method)
    return max(abs(row["latency_off"] or 0) for row in rows if (row["budget"], row["method"]) == asked)


def mean_ci95(gain: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of independent values (N,), N > 1, by Student's t. A bootstrap of three seeds spans
    the smallest and the largest of them, and tells equal methods apart in a quarter of all cases."""
    half = mean_half_width(gain)
    return float(gain.mean()) - half, float(gain.mean()) + half


def _interval(gain: np.ndarray, accuracy: bool) -> str:
    """The interval of a mean paired difference in words; says so where there is one seed."""
    if len(gain) < 2:
        return " (one seed: no interval)"
    low, high = mean_ci95(gain)
    sure = "" if low > 0 or high < 0 else "; not told apart"
    interval = " to ".join(shown_gain(each, accuracy=accuracy) for each in (low, high))
    return f" (difference over {len(gain)} seeds: 95% {interval}{sure})"
