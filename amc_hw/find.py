"""One search, from a budget to a measured winner: what `amc-hw search` does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from amc_hw.data import load_data
from amc_hw.env import REWARDS
from amc_hw.errors import BudgetError, UserError
from amc_hw.evaluate import Evaluator, accuracy, check_expected
from amc_hw.export import folded_weights
from amc_hw.policy import Policy
from amc_hw.pretrain import DEFAULT_DATA
from amc_hw.prune import slice_channels
from amc_hw.resources import Budget, CostModel, budget_from, latency_model, macs_model, params_model
from amc_hw.runs import Journal, record_command, save_json, save_weights
from amc_hw.search.loop import METHODS, Episode, Outcome, Problem, Timed, run_search
from amc_hw.subject import Subject, read_table
from profilers.predictor import Predictor
from profilers.profile import NETWORK_PLAN
from profilers.targets import Network
from profilers.timing import TimingPlan, ratio_ci95, refuse_noise

BUDGETS = ("latency_ms", "latency_ratio", "flops_ratio", "params_ratio")
Progress = Callable[[int, int, str], None]  # (done, total, what there is to say)


@dataclass(frozen=True)
class SearchConfig:
    """One budget, in milliseconds or as a share of the unpruned cost; where the run is kept; how long to search."""

    out: Path
    data: str = DEFAULT_DATA
    latency_ms: float | None = None
    latency_ratio: float | None = None
    flops_ratio: float | None = None
    params_ratio: float | None = None
    method: str = "ddpg"
    episodes: int = 400
    reward: str = "err"
    seed: int = 0
    slack: float = 0.02
    expect_accuracy: float | None = None

    @property
    def budget(self) -> tuple[str, float] | None:
        """(name, value) of the one budget that was given, None for a reward that needs none; UserError for several."""
        if self.reward not in REWARDS:
            raise UserError(f"unknown --reward {self.reward!r}; known: {', '.join(REWARDS)}")
        if self.method not in METHODS:
            raise UserError(f"unknown --method {self.method!r}; known: {', '.join(METHODS)}")
        if not (self.slack >= 0 and math.isfinite(self.slack)):
            raise UserError(f"--slack {self.slack} must be a number of at least 0")
        given = [(name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None]
        if not given and self.reward != "err":
            return None
        if len(given) != 1:
            raise UserError("give one of --latency-ms, --latency-ratio, --flops-ratio, --params-ratio")
        return given[0]


def time_pair(
    subject: Subject, pruned: Network, baseline: Network, *, rounds: int = 25, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Milliseconds of (pruned, baseline), interleaved, in a process that has done nothing else."""
    plan = TimingPlan(rounds=rounds, burst_s=max(0.02, subject.device.min_time_s / rounds))
    before, after = subject.target.time_in_fresh_process([baseline, pruned], plan, seed=seed)
    for samples, what in ((before, "the unpruned network"), (after, "the pruned network")):
        refuse_noise(samples, subject.device.noise_pct, what)
    return after, before


class _Search:
    def __init__(self, subject: Subject, config: SearchConfig, progress: Progress) -> None:
        self.subject, self.config, self.progress = subject, config, progress
        self.model, self.graph = subject.model, subject.graph
        self.given = config.budget
        self.predictor = Predictor(read_table(subject), subject.target.lower)
        self.baseline = Network(subject.network_at(None), folded_weights(self.model.module, self.graph))

    @property
    def by_latency(self) -> bool:
        return self.given is not None and self.given[0].startswith("latency")

    def costs(self, name: str) -> CostModel:
        if name.startswith("latency"):
            return latency_model(self.graph, self.subject.grids, self.predictor)
        return (params_model if name.startswith("params") else macs_model)(self.graph, self.subject.grids)

    def budget(self, costs: CostModel) -> Budget | None:
        if self.given is None:
            return None
        name, value = self.given
        return budget_from(costs, absolute=value) if name.endswith("_ms") else budget_from(costs, ratio=value)

    def used(self, timed: Timed) -> float:
        """Share of the latency budget that a timed policy uses."""
        assert self.given is not None
        name, value = self.given
        return (timed.measured_ms if name.endswith("_ms") else timed.measured_ms / timed.baseline_ms) / value

    def sliced(self, widths: Sequence[int], module: nn.Module | None = None) -> Network:
        """The pruned network as it is timed; without a refitted module, with the weights that are left."""
        if module is None:
            module = slice_channels(self.model.module, self.graph, self.evaluator.kept(widths))
        return Network(self.subject.network_at(widths), folded_weights(module, self.graph))

    def time(self, policies: Sequence[tuple[int, ...]]) -> list[Timed]:
        networks = [self.baseline, *(self.sliced(widths) for widths in policies)]
        before, *after = self.subject.target.time_networks(networks, NETWORK_PLAN, seed=self.config.seed)
        baseline_ms = float(np.median(before))
        pairs = zip(policies, after, strict=True)
        return [Timed(tuple(widths), float(np.median(samples)), baseline_ms) for widths, samples in pairs]

    def run(self) -> dict[str, Any]:
        start, config = time.monotonic(), self.config
        costs = self.costs(self.given[0] if self.given else config.reward)
        budget = self.budget(costs)
        if (enough := self._met_already(budget)) is not None:
            return enough | {"seconds": time.monotonic() - start}
        journal = Journal(config.out / "metrics.jsonl", self._header())
        record_command(config.out)
        finished = config.out / "result.json"
        if finished.exists():
            result: dict[str, Any] = json.loads(finished.read_text())
            return result
        splits = load_data(config.data, input_shape=self.model.input_shape)
        self.evaluator = Evaluator(self.model, self.graph, splits, seed=config.seed)
        unpruned = accuracy(self.model.module, *self.evaluator.val)
        self.progress(0, config.episodes, f"unpruned accuracy {unpruned:.4f} on held-out training images")
        check_expected(unpruned, config.expect_accuracy)
        unit = REWARDS[config.reward][0]
        problem = Problem(
            self.graph,
            costs,
            budget,
            self.evaluator.val_accuracy,
            time=self.time,
            used=self.used if self.by_latency else None,
            reward=config.reward,
            reward_costs=None if unit in (None, costs.unit) else self.costs(config.reward),
            floor=min(grid[0] / grid[-1] for grid in self.subject.grids),
            slack=config.slack,
        )
        outcome = run_search(
            problem,
            journal,
            method=config.method,
            episodes=config.episodes,
            seed=config.seed,
            progress=self.progress,
        )
        winner, module, timed = self._winner(outcome)
        result = self._kept(winner, module, timed) | {
            "episodes": outcome.episodes,
            "seconds": time.monotonic() - start,
        }
        save_json(finished, result)
        return result

    def _header(self) -> dict[str, Any]:
        config = self.config
        return {
            "schema_version": 1,
            "model": self.model.spec,
            "checkpoint_sha256": self.model.checkpoint_sha256,
            "data": config.data,
            "device": self.subject.device.name,
            "threads": self.subject.device.threads,
            "budget": None if self.given is None else list(self.given),
            "method": config.method,
            "reward": config.reward,
            "slack": config.slack,
            "seed": config.seed,
            "episodes": config.episodes,
            "grids": [list(grid) for grid in self.subject.grids],
        }

    def _met_already(self, budget: Budget | None) -> dict[str, Any] | None:
        """What to report where the unpruned network meets the budget; None where it does not."""
        if self.given is None or budget is None:
            return None
        name, value = self.given
        if name != "latency_ms":
            met, measured = value == 1, None
        elif budget.limit < 0.5 * self.predictor.predict(self.baseline.graph):
            return None  # far off: not worth a measurement
        else:
            after, _ = time_pair(self.subject, self.baseline, self.baseline, seed=self.config.seed)
            measured = float(np.median(after))
            met = measured <= value
        if not met:
            return None
        network = self.baseline.graph
        return {
            "policy": None,
            "accuracy": None,
            "baseline_accuracy": None,
            "accuracy_split": None,
            "predicted_ms": self.predictor.predict(network),
            "measured_ms": measured,
            "baseline_ms": measured,
            "speedup": None if measured is None else 1.0,
            "latency_source": None if measured is None else "measured",
            "macs": network.macs,
            "baseline_macs": network.macs,
            "params": network.params,
            "episodes": 0,
            "message": f"the unpruned network meets the budget of {budget.text}: nothing to prune",
        }

    def _winner(self, outcome: Outcome) -> tuple[Episode, nn.Module, tuple[list[float], list[float]]]:
        """The candidate of best accuracy after the faithful refit that also meets the budget in a fresh process."""
        finished = []
        for number, (one, _) in enumerate(outcome.candidates):
            self.progress(number, len(outcome.candidates), "refitting the candidates")
            module = self.evaluator.final(one.widths)
            finished.append((accuracy(module, *self.evaluator.val), one, module))
        finished.sort(key=lambda item: -item[0])
        closest = math.inf
        for _, one, module in finished:
            pruned, baseline = time_pair(
                self.subject, self.sliced(one.widths, module), self.baseline, seed=self.config.seed
            )
            timed = Timed(one.widths, float(np.median(pruned)), float(np.median(baseline)))
            if not self.by_latency or self.used(timed) <= 1 + self.config.slack:
                return one, module, (pruned, baseline)
            closest = min(closest, self.used(timed))
        raise BudgetError(
            f"none of {len(finished)} candidates met the budget in a fresh process; the closest needs "
            f"{closest:.3f} times as much: run again on a quieter machine, or ask for that"
        )

    def _kept(self, winner: Episode, module: nn.Module, timed: tuple[list[float], list[float]]) -> dict[str, Any]:
        """Write the winner's policy and weights; what is reported of it, the test split read once."""
        test, baseline = self.evaluator.test_accuracy([module, self.model.module])
        groups, kept = self.graph.groups, self.evaluator.kept(winner.widths)
        policy = Policy(
            model=self.model.spec,
            input_shape=self.model.input_shape,
            mean=self.model.mean,
            std=self.model.std,
            data=self.config.data,
            widths={group.name: width for group, width in zip(groups, winner.widths, strict=True)},
            kept={name: [int(channel) for channel in channels] for name, channels in kept.items()},
            checkpoint_sha256=self.model.checkpoint_sha256,
            device=self.subject.device.name,
            dtype=self.subject.device.dtype,
        )
        save_weights(self.config.out / policy.weights, module.state_dict())
        policy.save(self.config.out / "policy.json")
        pruned_ms, baseline_ms = (float(np.median(samples)) for samples in timed)
        network = self.subject.network_at(winner.widths)
        return {
            "policy": str(self.config.out / "policy.json"),
            "accuracy": test,
            "baseline_accuracy": baseline,
            "accuracy_split": "test",
            "predicted_ms": self.predictor.predict(network),
            "error_pct": self.predictor.error_pct,
            "measured_ms": pruned_ms,
            "baseline_ms": baseline_ms,
            "speedup": baseline_ms / pruned_ms,
            "speedup_ci95": list(ratio_ci95(*timed)),
            "latency_source": "measured",
            "macs": network.macs,
            "baseline_macs": self.baseline.graph.macs,
            "params": network.params,
            "widths": list(winner.widths),
        }


def search(subject: Subject, config: SearchConfig, *, progress: Progress) -> dict[str, Any]:
    """Find the widths that meet the budget at the least loss of accuracy, time the best, keep the winner in
    `config.out`. A search that was interrupted goes on; one that has ended gives its result again.

    Raises BudgetError where the budget cannot be met, or no measured candidate met it.
    """
    return _Search(subject, config, progress).run()
