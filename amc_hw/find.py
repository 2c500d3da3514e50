"""One search, from a budget to a measured winner: what `amc-hw search` does."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from amc_hw.choices import BUDGETS
from amc_hw.env import REWARDS
from amc_hw.errors import UserError
from amc_hw.evaluate import REFITS, Evaluator, check_expected, check_refit, warn_of_chance, warn_of_guessing
from amc_hw.models.checkpoint import put_back
from amc_hw.policy import Policy
from amc_hw.pretrain import data_for
from amc_hw.prune import slice_channels
from amc_hw.resources import (
    Budget,
    CostModel,
    Grids,
    budget_from,
    check_ratio,
    latency_model,
    macs_model,
    params_model,
    require_feasible,
)
from amc_hw.runs import (
    JOURNAL,
    Journal,
    Progress,
    Scores,
    alone_in,
    numbered,
    record_command,
    save_json,
    save_weights,
    silent,
    whole_lines,
)
from amc_hw.search.loop import AUTO, CANDIDATES, FREE, METHODS, Outcome, Problem, Timed, run_search
from amc_hw.specs import parse_spec, source_sha256, unknown_name
from amc_hw.subject import Subject, read_predictor, read_table
from amc_hw.task import Judged, Task, check_eval_device, load_task
from amc_hw.weights import folded_weights
from amc_hw.workers import Recipe, Workers, free_memory
from profilers.ops import digest
from profilers.profile import NETWORK_PLAN
from profilers.table import LatencyTable
from profilers.targets import Network
from profilers.timing import Steady, TimingPlan, loaded_anew, ratio_ci95, refuse_noise

LOAD_ROUNDS = 25  #: samples of one load, where they are reported
POLICY, RESULT = "policy.json", "result.json"
MOST_RUNS = 1_000_000  #: of a burst in a fresh process, which is as long as `min_time_s` asks


@dataclass(frozen=True)
class SearchConfig:
    """One budget, in milliseconds or as a share of the unpruned cost; where the run is kept (None: a folder of its own
    in `runs`); how long to search. data, evaluate, calibrate: as of `amc_hw.task.load_task`; the default network needs
    none of them. eval_device: where the networks are scored, as torch names it. workers: processes that score policies;
    with more than one, methods that learn propose as many before they learn, so a search is reproducible for a given
    number. fallback: uniform policies take part in the end, too."""

    out: Path | None = None
    data: str | None = None
    evaluate: str | None = None
    calibrate: str | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    flops_ratio: float | None = None
    params_ratio: float | None = None
    method: str = "ddpg"
    episodes: int = 400
    reward: str = "err"
    refit: str = REFITS[0]
    eval_device: str = "cpu"
    seed: int = 0
    slack: float = 0.02
    expect_accuracy: float | None = None
    workers: int = 1
    fallback: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))

    @property
    def budget(self) -> tuple[str, float] | None:
        """(name, value) of the one budget that was given, None for a reward that needs none; UserError for several."""
        if self.reward not in REWARDS:
            raise UserError(f"unknown --reward {self.reward!r}; known: {', '.join(REWARDS)}")
        if self.method not in ("auto", *METHODS):
            raise unknown_name("--method", self.method, ["auto", *METHODS], forms=())
        check_refit(self.refit)
        check_eval_device(self.eval_device)
        check_workers(self.workers)
        if not (self.slack >= 0 and math.isfinite(self.slack)):
            raise UserError(f"--slack {self.slack} must be a number of at least 0")
        given = [(name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None]
        if not given and REWARDS[self.reward][0] is not None:
            if self.method != "auto" and METHODS[self.method].needs_budget:
                raise UserError(f"--method {self.method} needs a budget; --reward {self.reward} is not one")
            return None
        if len(given) != 1:
            flags = [f"--{name.replace('_', '-')}" for name, _ in given or [(name, None) for name in BUDGETS]]
            raise UserError(f"give {'only ' if given else ''}one of {', '.join(flags)}")
        if given[0][0].endswith("_ratio"):
            check_ratio(given[0][1])
        return given[0]


def time_apart(
    subject: Subject, networks: Sequence[Network], *, rounds: int = LOAD_ROUNDS, seed: int = 0
) -> list[list[float]]:
    """Milliseconds per network, interleaved, in a process that has done nothing else; UnsteadyError where they spread
    too far."""
    burst_s = max(0.02, subject.device.min_time_s / rounds)
    plan = TimingPlan(rounds=rounds, burst_s=burst_s, max_runs=MOST_RUNS)
    found = subject.target.time_in_fresh_process(networks, plan, seed=seed)
    for samples in found:
        refuse_noise(samples, subject.device.noise_pct)
    return found


def timed_anew(
    subject: Subject, steady: Steady, networks: Sequence[Network], *, rounds: int = LOAD_ROUNDS, seed: int = 0
) -> list[list[float]]:
    """As `time_apart`, of several loads of the networks, each in a process of its own, `rounds` samples of one after
    another; the anchor comes first."""

    def measure(load: int) -> list[list[float]]:
        return steady(lambda: time_apart(subject, networks, rounds=rounds, seed=seed + load))

    return loaded_anew(measure, stated=True)


def steady_beside(subject: Subject, table: LatencyTable) -> Steady:
    """Measures beside the unpruned network, which should take what it took for the table."""
    return Steady(table.reference_ms(digest(subject.network_at(None)), subject.target.config.member))


def check_workers(workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")


def search_time(
    evaluator: Evaluator, grids: Grids, episodes: int, loading_s: float, *, workers: int = 1
) -> dict[str, float]:
    """What a search would take: seconds of an episode, and minutes in all, the candidates' final refits included."""
    each, candidate = evaluator.seconds([grid[len(grid) // 2] for grid in grids], workers=workers)
    total = loading_s + each * episodes + candidate * (CANDIDATES + 2)  # two uniform policies take part
    return {"seconds_per_episode": each, "minutes": total / 60}


class _Search:
    def __init__(
        self, subject: Subject, config: SearchConfig, progress: Progress, scores: Scores | None = None
    ) -> None:
        if config.method == "auto":
            config = replace(config, method=AUTO if config.budget is not None else FREE)
        named = config.data, config.evaluate, config.calibrate
        if subject.base is not None and not any(named):
            named = subject.base.data, subject.base.evaluate, subject.base.calibrate
        data = data_for(subject.model.spec, *named)
        config = replace(config, data=data, evaluate=named[1], calibrate=named[2])
        self.scores = scores
        self.subject, self.config, self.progress = subject, config, progress
        self.model, self.graph = subject.model, subject.graph
        self.given = config.budget
        self.weights_sha256 = subject.model.weights_sha256()
        table = read_table(subject)
        self.predictor = read_predictor(subject, table)
        self.steady = steady_beside(subject, table)
        self.workers: Workers | None = None
        self._refitted: dict[tuple[int, ...], nn.Module] = {}
        self.baseline = Network(subject.network_at(None), folded_weights(self.model.module, self.graph))
        self.predictor.predict(self.baseline.graph)  # what the table lacks is found before anything is searched
        self.out = self._folder()

    def _folder(self) -> Path:
        """Of the run: as asked for, or the first that holds this search, or nothing yet."""
        if self.config.out is not None:
            return self.config.out
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in self.model.spec)
        budget = self.config.reward if self.given is None else f"{self.given[0]}{self.given[1]:g}"
        return numbered(Path("runs") / "-".join([safe, self.subject.device.name, budget]), self._header())

    @property
    def by_latency(self) -> bool:
        return self.given is not None and self.given[0].startswith("latency")

    @property
    def here(self) -> bool:
        """Whether the device can be timed; from an archive's table alone nothing is measured."""
        return self.subject.target.can_time

    def costs(self, name: str) -> CostModel:
        if name.startswith("latency"):
            batch = self.subject.device.batch
            return latency_model(self.graph, self.subject.grids, self.predictor, batch=batch)
        return (params_model if name.startswith("params") else macs_model)(self.graph, self.subject.grids)

    def _costs_and_budget(self) -> tuple[CostModel, Budget | None]:
        if self.given is None:
            return self.costs(self.config.reward), None
        name, value = self.given
        costs = self.costs(name)
        return costs, budget_from(costs, absolute=value) if name.endswith("_ms") else budget_from(costs, ratio=value)

    def used(self, timed: Timed) -> float:
        """Share of the latency budget that a timed policy uses."""
        assert self.given is not None
        name, value = self.given
        return (timed.measured_ms if name.endswith("_ms") else timed.measured_ms / timed.baseline_ms) / value

    def _budget_used(self, timed: Timed) -> float | None:
        """Share of whatever budget there is that a policy uses."""
        if self.given is None or self.by_latency:
            return None if self.given is None else self.used(timed)
        costs = self.costs(self.given[0])
        return costs.cost(timed.widths) / costs.full_cost / self.given[1]

    def network(self, widths: Sequence[int], module: nn.Module) -> Network:
        return Network(self.subject.network_at(widths), folded_weights(module, self.graph))

    def time(self, policies: Sequence[tuple[int, ...]]) -> list[Timed]:
        slices = [slice_channels(self.model.module, self.graph, self.evaluator.kept(widths)) for widths in policies]
        networks = [self.baseline, *map(self.network, policies, slices)]
        timed = self.subject.target.time_in_fresh_process

        def measure(load: int) -> list[list[float]]:
            return self.steady(lambda: timed(networks, NETWORK_PLAN, seed=self.config.seed + load))

        before, *after = loaded_anew(measure)
        baseline_ms = float(np.median(before))
        pairs = zip(policies, after, strict=True)
        return [Timed(tuple(widths), float(np.median(samples)), baseline_ms) for widths, samples in pairs]

    def refitted(self, widths: tuple[int, ...]) -> nn.Module:
        """The pruned network after the faithful refit, which takes long: made once."""
        if widths not in self._refitted:
            self._refitted[widths] = self._refit(widths)
        return self._refitted[widths]

    def _refit(self, widths: tuple[int, ...]) -> nn.Module:
        if self.workers is None or not self.workers.begun(widths, "final"):
            return self.evaluator.final(widths)
        module = slice_channels(self.model.module, self.graph, self.evaluator.kept(widths))
        state = self.workers(widths, "final")
        put_back(module, {name: torch.from_numpy(value) for name, value in state.items()})
        return module

    def finish_ahead(self, policies: Sequence[tuple[int, ...]]) -> None:
        """Let the workers begin with the refits that `finish` will ask for, where there is memory for all of them."""
        assert self.workers is not None
        new = [widths for widths in policies if widths not in self._refitted and not self._knows("final", widths)]
        together = min(len(new), self.config.workers)
        if together > 1 and together * self.evaluator.final_bytes <= free_memory():
            self.workers.ahead(new, "final")

    def finish(self, widths: Sequence[int]) -> float:
        return self._shared("final", widths, lambda: self.evaluator.task.final_score(self.refitted(tuple(widths))))

    def evaluate(self, widths: Sequence[int]) -> Judged:
        compute = self.evaluator.judge if self.workers is None else self.workers
        return Judged(*self._shared("search", widths, lambda: compute(tuple(widths))))

    def ahead(self, policies: Sequence[tuple[int, ...]]) -> None:
        """Let the workers begin with what `evaluate` will be asked for."""
        assert self.workers is not None
        self.workers.ahead([widths for widths in policies if not self._knows("search", widths)])

    def _knows(self, kind: str, widths: Sequence[int]) -> bool:
        """Whether a search that shares its scores has this one."""
        return self.scores is not None and self.scores.knows(self._question(kind, widths))

    def _shared(self, kind: str, widths: Sequence[int], compute: Callable[[], Any]) -> Any:
        """A score, from the searches that share theirs where one of them has it."""
        return compute() if self.scores is None else self.scores.score(self._question(kind, widths), compute)

    def _question(self, kind: str, widths: Sequence[int]) -> list[Any]:
        asked = [*self._asked.values(), self.config.refit, self.config.seed, kind]
        return [list(self._network.values()), asked, [int(width) for width in widths]]

    @cached_property
    def _network(self) -> dict[str, Any]:
        """What is pruned, for a journal."""
        model = self.model
        return {
            "model": model.spec,
            "weights_sha256": self.weights_sha256,
            "network": digest(self.baseline.graph),
            "mean": list(model.mean),
            "std": list(model.std),
            "keep": list(self.subject.keep),
        }

    @cached_property
    def _asked(self) -> dict[str, Any]:
        """What it is scored on, for a journal."""
        named = {name: getattr(self.config, name) for name in ("data", "evaluate", "calibrate")}
        return named | {"sources": [source_sha256(each) if each else None for each in named.values()]}

    def _sources(self) -> dict[str, str]:
        """Checksums of the Python files that a policy names."""
        functions = [text for text in (self.config.evaluate, self.config.calibrate) if text]
        named = {self.model.spec: self.model.found} | {text: text for text in functions}
        found = {parse_spec(text).name: source_sha256(where) for text, where in named.items()}
        return {name: checksum for name, checksum in found.items() if checksum}

    def confirm(self, widths: tuple[int, ...]) -> tuple[list[float], list[float]]:
        network = self.network(widths, self.refitted(widths))
        baseline, pruned = timed_anew(self.subject, self.steady, [self.baseline, network], seed=self.config.seed)
        return pruned, baseline

    def run(self) -> dict[str, Any]:
        start = time.monotonic()
        costs, budget = self._costs_and_budget()
        if not self._ended and (enough := self._met_already(budget)) is not None:
            return enough | {"seconds": time.monotonic() - start}
        if budget is not None:
            require_feasible(costs.completer, budget)
        task = self._task()
        self.out = self._folder()  # another search may have begun by now
        with alone_in(self.out):
            return self._run(costs, budget, task, start)

    def _refuse_others(self) -> None:
        """UserError where the folder holds what a search would write, and is none's."""
        there = [name for name in (POLICY, Policy.weights, RESULT) if (self.out / name).exists()]
        if there and not (self.out / JOURNAL).exists():
            raise UserError(f"{self.out} has a {there[0]} that is not of this search: name another --out")

    @property
    def _ended(self) -> bool:
        return all((self.out / name).exists() for name in (RESULT, POLICY, Policy.weights))

    def _task(self) -> Task:
        return load_task(self.model, **self._task_options)

    @property
    def _task_options(self) -> dict[str, Any]:
        names = ("data", "evaluate", "calibrate", "seed")
        return {name: getattr(self.config, name) for name in names} | {"device": self.config.eval_device}

    def _run(self, costs: CostModel, budget: Budget | None, task: Task, start: float) -> dict[str, Any]:
        config = self.config
        self._refuse_others()
        journal = Journal(self.out / JOURNAL, self._header())
        record_command(self.out)
        if self._ended and config.expect_accuracy is None:
            return self._found_before()
        self.evaluator = Evaluator(self.model, self.graph, task, seed=config.seed, refit=config.refit)
        unpruned = self.evaluator.unpruned_score
        if self._ended:
            check_expected(unpruned, config.expect_accuracy)
            return self._found_before()
        what = "score" if task.split == "evaluate" else "accuracy"
        where = f"of {config.evaluate}" if config.evaluate else "on held-out training data"
        own = "" if self.model.checkpoint_sha256 else f", with the weights that {self.model.spec} brings itself"
        whose = "unpruned" if self.subject.base is None else "the pruned network's"
        self.progress(0, config.episodes, f"{whose} {what} {unpruned:.4f} {where}{own}")
        check_expected(unpruned, config.expect_accuracy)
        warn_of_guessing(task, unpruned)
        warn_of_chance(task, self.model.module, unpruned)
        enough = METHODS[config.method].enough(len(self.graph.groups))
        if self.scores is None and config.episodes < enough:
            other = ", or --method auto" if config.method == "ddpg" else ""
            warnings.warn(
                f"{config.episodes} episodes are few for {config.method} to decide on {len(self.graph.groups)} groups: "
                f"give --episodes {enough} or more{other}",
                stacklevel=2,
            )
        unit = REWARDS[config.reward][0]
        if unit is not None and not 0 <= unpruned <= 1:
            raise UserError(f"--reward {config.reward} needs scores from 0 to 1, {config.evaluate} gives {unpruned:g}")
        problem = Problem(
            self.graph,
            costs,
            budget,
            self.evaluate,
            finish=self.finish,
            time=self.time,
            confirm=self.confirm if self.here else None,
            used=self.used if self.by_latency and self.here else None,
            reward=config.reward,
            reward_costs=None if unit in (None, costs.unit) else self.costs(config.reward),
            floor=min(grid[0] / grid[-1] for grid in self.subject.grids),
            slack=config.slack,
            fallback=config.fallback,
            ahead=self.ahead if config.workers > 1 else None,
            finish_ahead=self.finish_ahead if config.workers > 1 else None,
            together=config.workers,
            metric=what,
        )
        with self._working() as self.workers:
            outcome = run_search(
                problem,
                journal,
                method=config.method,
                episodes=config.episodes,
                seed=config.seed,
                progress=self.progress,
            )
        self.workers = None
        result = (
            {"schema_version": 1}
            | self._kept(outcome)
            | {"episodes": outcome.episodes, "seconds": time.monotonic() - start}
        )
        save_json(self.out / RESULT, result)
        return result

    def _found_before(self) -> dict[str, Any]:
        self.progress(0, 1, f"{self.out} has this search's result already")
        result: dict[str, Any] = json.loads((self.out / RESULT).read_text())
        return result

    def _working(self) -> AbstractContextManager[Workers | None]:
        config = self.config
        if config.workers == 1:
            return nullcontext()
        recipe = Recipe.of(self.subject, self._task_options, seed=config.seed, refit=config.refit)
        return Workers(config.workers, recipe)

    def check_budget(self) -> None:
        costs, budget = self._costs_and_budget()
        if budget is not None:
            require_feasible(costs.completer, budget)

    def plan(self) -> dict[str, Any]:
        self.check_budget()
        if self.out.is_file():
            raise UserError(f"{self.out} is a file, not a folder")
        self._refuse_others()
        whole_lines(self.out / JOURNAL, self._header(), kind="search")  # another one's folder is refused now
        start = time.monotonic()
        self.evaluator = Evaluator(self.model, self.graph, self._task(), seed=self.config.seed, refit=self.config.refit)
        loaded = time.monotonic() - start
        return {
            "groups": len(self.graph.groups),
            "episodes": self.config.episodes,
            "workers": self.config.workers,
            **search_time(
                self.evaluator, self.subject.grids, self.config.episodes, loaded, workers=self.config.workers
            ),
        }

    def _header(self) -> dict[str, Any]:
        config = self.config
        return {
            "schema_version": 1,
            **self._network,
            **self._asked,
            "device": self.subject.device.name,
            **asdict(self.predictor.identity),
            "budget": None if self.given is None else list(self.given),
            "method": config.method,
            "reward": config.reward,
            "refit": config.refit,
            "slack": config.slack,
            "seed": config.seed,
            "fallback": config.fallback,
            "workers": config.workers,
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
        elif not self.here:
            met, measured = self.predictor.predict(self.baseline.graph) <= value, None
        elif budget.limit < 0.5 * self.predictor.predict(self.baseline.graph):
            return None  # far off: not worth a measurement
        else:
            (samples,) = timed_anew(self.subject, self.steady, [self.baseline], seed=self.config.seed)
            measured = float(np.median(samples))
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
            "latency_source": "predicted" if measured is None else "measured",
            "macs": network.macs,
            "baseline_macs": network.macs,
            "params": self.graph.params(),
            "episodes": 0,
            "message": f"the unpruned network meets the budget of {budget.text}: nothing to prune",
        }

    def _kept(self, outcome: Outcome) -> dict[str, Any]:
        """Write the winner's policy and weights; what is reported of it, the test split read once."""
        module = self.refitted(outcome.widths)
        kept, keep = self.evaluator.kept(outcome.widths), self.subject.keep
        if (base := self.subject.base) is not None:  # channels of the network that was unpruned at first
            before = {name: np.array(channels) for name, channels in base.kept.items()}
            kept = {name: before[name][channels] if name in before else channels for name, channels in kept.items()}
            kept, keep = base.kept_arrays() | kept, base.keep
        policy = Policy(
            model=self.model.spec,
            input_shape=self.model.input_shape,
            mean=self.model.mean,
            std=self.model.std,
            data=self.config.data,
            evaluate=self.config.evaluate,
            calibrate=self.config.calibrate,
            keep=keep,
            widths={name: len(channels) for name, channels in kept.items()},
            kept={name: [int(channel) for channel in channels] for name, channels in kept.items()},
            checkpoint_sha256=self.model.checkpoint_sha256,
            device=self.subject.device.name,
            dtype=self.subject.device.dtype,
            threads=self.subject.device.threads,
            network=digest(self.graph.op_graph()) if base is None else base.network,
            sources=self._sources() if base is None else base.sources | self._sources(),
        )
        save_weights(self.out / policy.weights, module.state_dict())
        policy.save(self.out / POLICY)
        test, baseline = self.evaluator.task.test_scores([module, self.model.module])
        samples = outcome.samples_ms
        pruned_ms, baseline_ms = (None, None) if samples is None else (float(np.median(each)) for each in samples)
        network = self.subject.network_at(outcome.widths)
        predicted_ms, unpruned_ms = self.predictor.predict(network), self.predictor.predict(self.baseline.graph)
        timed = Timed(outcome.widths, pruned_ms or predicted_ms, baseline_ms or unpruned_ms)
        return {
            "policy": str(self.out / POLICY),
            "accuracy": test,
            "baseline_accuracy": baseline,
            "accuracy_split": self.evaluator.task.split,
            "predicted_ms": predicted_ms,
            "error_pct": self.predictor.stated_error_pct(digest(self.baseline.graph)),
            "measured_ms": pruned_ms,
            "baseline_ms": baseline_ms,
            "speedup": None if pruned_ms is None or baseline_ms is None else baseline_ms / pruned_ms,
            "speedup_ci95": None if samples is None else list(ratio_ci95(*samples, per_load=LOAD_ROUNDS)),
            "predicted_speedup": unpruned_ms / predicted_ms,
            "latency_source": "predicted" if samples is None else "measured",
            **self.subject.runs_on,
            "macs": network.macs,
            "baseline_macs": self.baseline.graph.macs,
            "params": self.graph.params(outcome.widths),
            "widths": list(outcome.widths),
            "budget": None if self.given is None else list(self.given),
            "budget_used": self._budget_used(timed),
            "found_by": outcome.found_by,
            "over": outcome.over,
        }


def plan_search(subject: Subject, config: SearchConfig) -> dict[str, Any]:
    """What `search` would do: episodes and about how many minutes; nothing is written, nothing is timed on the
    device. Raises as `search` does where the budget cannot be met."""
    return _Search(subject, config, silent).plan()


def check_budget(subject: Subject, config: SearchConfig) -> None:
    """Raises as `search` does where the budget cannot be met."""
    _Search(subject, config, silent).check_budget()


def search(
    subject: Subject, config: SearchConfig, *, progress: Progress = silent, scores: Scores | None = None
) -> dict[str, Any]:
    """Find the widths that meet the budget at the least loss of accuracy, time the best, keep the winner in
    `config.out`. A search that was interrupted goes on; one that has ended gives its result again.

    scores: of policies, known to searches of the same network, data and seed.
    Raises BudgetError where the budget cannot be met, or no measured candidate met it.
    """
    return _Search(subject, config, progress, scores).run()
