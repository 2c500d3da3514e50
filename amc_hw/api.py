"""One function per command. Everything that needs a device is reached from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from amc_hw.data import load_data
from amc_hw.env import PruningEnv
from amc_hw.errors import BudgetError, FailedError, UserError
from amc_hw.evaluate import Evaluator, accuracy, check_expected
from amc_hw.graph import LayerGraph, build_graph, width_grid
from amc_hw.models import load_model
from amc_hw.policy import Policy, load_policy
from amc_hw.pretrain import DEFAULT_DATA, DEFAULT_MODEL, default_checkpoint
from amc_hw.prune import slice_channels
from amc_hw.resources import CostModel, budget_from, latency_model, macs_model, params_model
from amc_hw.search.loop import Episode, Journal, run_search
from profilers.device import DeviceConfig, device_names, load_device, search_folders
from profilers.predictor import Predictor, anchored_ms
from profilers.profile import ProfileJob, digest, missing_steps, time_network
from profilers.sampling import random_widths
from profilers.table import LatencyTable
from profilers.targets import Network, Target, open_target
from profilers.timing import TimingPlan, ratio_ci95, refuse_noise

BUDGETS = ("latency_ms", "latency_ratio", "flops_ratio", "params_ratio")
Progress = Callable[[int, int, float], None]  # (done, total, seconds so far)


@dataclass(frozen=True)
class Subject:
    """What is worked on: a network on a device."""

    graph: LayerGraph
    device: DeviceConfig
    target: Target
    grids: tuple[tuple[int, ...], ...]

    def network_at(self, widths: Sequence[int] | None) -> Any:
        return self.graph.op_graph(widths, batch=self.device.batch)


def load_graph(model: str, *, input_shape: Sequence[int] | None = None) -> LayerGraph:
    """The channel groups and operators of a model given by its spec."""
    loaded = load_model(model, input_shape=input_shape)
    return build_graph(loaded.module, loaded.input_shape)


def open_subject(
    *,
    device: str,
    model: str,
    input_shape: Sequence[int] | None = None,
    channel_multiple: int | None = None,
    floor: float = 0.2,
    threads: int | None = None,
) -> Subject:
    """A network with at least one group to prune, on a device; UserError or DeviceError where there is none."""
    config = load_device(device)
    if threads is not None:
        config = replace(config, threads=threads)
    if not 0 < floor <= 1:
        raise UserError(f"--floor {floor} must be above 0 and at most 1")
    graph = load_graph(model, input_shape=input_shape)
    if not graph.groups:
        reasons = "; ".join(f"{frozen.name}: {frozen.reason}" for frozen in graph.frozen)
        raise UserError(f"{model} has no prunable layer ({reasons})")
    multiple = channel_multiple or config.channel_multiple
    grids = tuple(width_grid(group.width, multiple=multiple, floor=floor) for group in graph.groups)
    return Subject(graph, config, open_target(config), grids)


def table_path(config: DeviceConfig) -> Path:
    """Where the table of a device lies: the user's own, else the shipped one, else where it will be written."""
    for folder in search_folders("latency_tables"):
        path = folder / f"{config.name}.jsonl"
        if path.exists():
            return path
    return Path("latency_tables") / f"{config.name}.jsonl"


def list_devices() -> dict[str, Any]:
    devices = []
    for name in device_names():
        config = load_device(name)
        path = table_path(config)
        devices.append(
            {
                "name": name,
                "target": config.target,
                "runtime": config.runtime,
                "description": config.description,
                "tables": [str(path)] if path.exists() else [],
            }
        )
    return {"devices": devices}


def check_device(name: str) -> dict[str, Any]:
    probes = open_target(load_device(name)).probes()
    return {"device": name, "ok": all(probe.ok for probe in probes), "probes": [asdict(probe) for probe in probes]}


def describe_graph(model: str, *, input_shape: Sequence[int] | None = None) -> dict[str, Any]:
    graph = load_graph(model, input_shape=input_shape)
    network = graph.op_graph()
    return {
        "model": model,
        "groups": [
            {"name": group.name, "width": group.width, "consumers": list(group.modules("consumer"))}
            for group in graph.groups
        ],
        "frozen": [{"name": f.name, "width": f.width, "reason": f.reason} for f in graph.frozen],
        "macs": network.macs,
        "params": network.params,
    }


def profile(subject: Subject, *, seed: int = 0, max_minutes: float | None = None, progress: Progress) -> dict[str, Any]:
    """Measure what the device's table lacks for this network, and append it."""
    start = time.monotonic()
    target = subject.target
    table = LatencyTable.open(table_path(subject.device), target.identity(), target.provenance())
    before = len(table.rows)
    steps = missing_steps(ProfileJob(subject.network_at, subject.grids, seed=seed), table, target)
    for index, step in enumerate(steps):
        elapsed = time.monotonic() - start
        if max_minutes is not None and elapsed > 60 * max_minutes:
            break
        progress(index, len(steps), elapsed)
        table.append(step.run())
    return {
        "table": str(table.path),
        "rows_total": len(table.rows),
        "rows_new": len(table.rows) - before,
        "seconds": time.monotonic() - start,
        "error_pct": Predictor(table, target.lower).error_pct,
    }


def read_table(subject: Subject) -> LatencyTable:
    """The device's table as it is; TableError where there is none, or it is of another identity."""
    table = LatencyTable.read(table_path(subject.device))
    table.require_identity(subject.target.identity())
    return table


def predict(subject: Subject, widths: Sequence[int] | None) -> dict[str, Any]:
    """End-to-end latency from the table alone."""
    predictor = Predictor(read_table(subject), subject.target.lower)
    network = subject.network_at(widths)
    return {"predicted_ms": predictor.predict(network), "error_pct": predictor.error_pct, "macs": network.macs}


def validate(subject: Subject, *, samples: int, seed: int = 0, progress: Progress) -> dict[str, Any]:
    """Predicted against measured latency on fresh random pruned networks, which no calibration has seen."""
    if samples < 2:
        raise UserError(f"--samples {samples}: at least 2 are needed")
    table = read_table(subject)
    predictor = Predictor(table, subject.target.lower)
    anchor = subject.network_at(None)
    seen = {row.details.get("digest") for row in table.of_type("calibration")}
    start = time.monotonic()
    found: list[dict[str, Any]] = []
    for widths in random_widths(subject.grids, 4 * samples, seed=1000 + seed):
        graph = subject.network_at(widths)
        if digest(graph) in seen or len(found) == samples:
            continue
        progress(len(found), samples, time.monotonic() - start)
        row = time_network(subject.target, graph, anchor, "validation", seed=len(found))
        table.append([row])
        measured = anchored_ms(row, predictor.reference_ms)
        predicted = predictor.predict(graph)
        found.append(
            {
                "widths": list(widths),
                "predicted_ms": predicted,
                "measured_ms": measured,
                "pct_error": 100 * (predicted / measured - 1),
            }
        )
    if len(found) < 2:
        raise UserError("the network is too small: no two random widths that the calibration has not seen")
    errors = np.abs([sample["pct_error"] for sample in found])
    pairs = [(sample["predicted_ms"], sample["measured_ms"]) for sample in found]
    return {
        "samples": found,
        "median_abs_pct_error": float(np.median(errors)),
        "within_5pct": float(np.mean(errors <= 5)),
        "within_10pct": float(np.mean(errors <= 10)),
        "spearman": float(stats.spearmanr(*zip(*pairs, strict=True)).statistic),
    }


def measure(subject: Subject, widths: Sequence[int], *, rounds: int = 25, seed: int = 0) -> dict[str, Any]:
    """Time the network at `widths` beside the unpruned one, interleaved, in a fresh process."""
    plan = TimingPlan(rounds=rounds, burst_s=max(0.02, subject.device.min_time_s / rounds))
    networks = [Network(subject.network_at(None)), Network(subject.network_at(widths))]
    baseline, pruned = subject.target.time_in_fresh_process(networks, plan, seed=seed)
    for samples, what in ((baseline, "the unpruned network"), (pruned, "the pruned network")):
        refuse_noise(samples, subject.device.noise_pct, what)
    identity = subject.target.identity()
    return {
        "baseline_ms": float(np.median(baseline)),
        "pruned_ms": float(np.median(pruned)),
        "speedup": float(np.median(baseline) / np.median(pruned)),
        "speedup_ci95": list(ratio_ci95(pruned, baseline)),
        "p90_ms": float(np.quantile(pruned, 0.9)),
        "runs": rounds,
        "device": identity.soc,
        "runtime": f"{identity.runtime} {identity.runtime_version}",
        "threads": identity.threads,
        "dtype": identity.dtype,
        "macs": networks[1].graph.macs,
        "baseline_macs": networks[0].graph.macs,
    }


@dataclass(frozen=True)
class SearchConfig:
    """One budget, in milliseconds or as a share of the unpruned cost; where the run is kept; how long to search."""

    out: Path
    checkpoint: Path | None = None
    data: str = DEFAULT_DATA
    latency_ms: float | None = None
    latency_ratio: float | None = None
    flops_ratio: float | None = None
    params_ratio: float | None = None
    episodes: int = 400
    seed: int = 0
    slack: float = 0.02
    expect_accuracy: float | None = None
    candidates: int = 5

    @property
    def budget(self) -> tuple[str, float]:
        """(name, value) of the one budget that was given; UserError for none or several."""
        given = [(name, getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError("give one of --latency-ms, --latency-ratio, --flops-ratio, --params-ratio")
        return given[0]


def _cost_model(subject: Subject, name: str, predictor: Predictor) -> CostModel:
    if name.startswith("latency"):
        return latency_model(subject.graph, subject.grids, predictor)
    builder = macs_model if name == "flops_ratio" else params_model
    return builder(subject.graph, subject.grids)


def search(subject: Subject, model_spec: str, config: SearchConfig, *, progress: Progress) -> dict[str, Any]:
    """Find the widths that meet the budget at the least loss of accuracy, time the best, keep the winner."""
    start = time.monotonic()
    budget_name, value = config.budget
    predictor = Predictor(read_table(subject), subject.target.lower)
    costs = _cost_model(subject, budget_name, predictor)
    absolute = budget_name.endswith("_ms")
    budget = budget_from(costs, absolute=value) if absolute else budget_from(costs, ratio=value)
    checkpoint = config.checkpoint
    if checkpoint is None:
        if (model_spec, config.data) != (DEFAULT_MODEL, DEFAULT_DATA):
            raise UserError("--checkpoint is missing: only the default network on `digits` brings its own")
        checkpoint = default_checkpoint()
    model = load_model(model_spec, checkpoint=checkpoint, input_shape=subject.graph.input_shape)
    header = {
        "schema_version": 1,
        "model": model_spec,
        "checkpoint_sha256": model.checkpoint_sha256,
        "data": config.data,
        "device": subject.device.name,
        "budget": [budget_name, value],
        "seed": config.seed,
        "episodes": config.episodes,
        "grids": [list(grid) for grid in subject.grids],
    }
    journal = Journal(config.out / "metrics.jsonl", header)
    splits = load_data(config.data, input_shape=model.input_shape)
    evaluator = Evaluator(model, subject.graph, splits, seed=config.seed)
    baseline_val = accuracy(model.module, *evaluator.val)
    check_expected(baseline_val, config.expect_accuracy)
    floor = min(grid[0] / grid[-1] for grid in subject.grids)
    episodes = run_search(
        lambda evaluate: PruningEnv(subject.graph, model=costs, budget=budget, evaluate=evaluate, floor=floor),
        evaluator.val_accuracy,
        journal,
        episodes=config.episodes,
        floor=floor,
        seed=config.seed,
        progress=progress,
    )
    best = _best_candidates(episodes, config.candidates)
    finished = [(one, evaluator.final(one.widths)) for one in best]
    finished.sort(key=lambda pair: -accuracy(pair[1], *evaluator.val))
    for one, module in finished:
        timed = measure(subject, one.widths, seed=config.seed)
        if not budget_name.startswith("latency") or _meets(timed, value, absolute=absolute, slack=config.slack):
            return _kept(subject, evaluator, model_spec, config, one, module, timed) | {
                "predicted_ms": predictor.predict(subject.network_at(one.widths)),
                "episodes": len(episodes),
                "seconds": time.monotonic() - start,
            }
    raise BudgetError(
        f"none of {len(finished)} measured candidates met the budget {budget.text}: profile again, or raise it"
    )


def _best_candidates(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """The best different policies by reward, earlier ones first among equals."""
    different = {one.widths: one for one in reversed(episodes)}
    return sorted(different.values(), key=lambda one: (-one.reward, one.cost))[:count]


def _meets(timed: dict[str, Any], value: float, *, absolute: bool, slack: float) -> bool:
    cost = timed["pruned_ms"] if absolute else timed["pruned_ms"] / timed["baseline_ms"]
    return bool(cost <= value * (1 + slack))


def _kept(
    subject: Subject,
    evaluator: Evaluator,
    model_spec: str,
    config: SearchConfig,
    winner: Episode,
    module: nn.Module,
    timed: dict[str, Any],
) -> dict[str, Any]:
    """Write the winner's policy and weights; what is reported of it, the test split read once."""
    test, baseline = evaluator.test_accuracy([module, evaluator.model.module])
    graph = subject.graph
    kept = evaluator.kept(winner.widths)
    policy = Policy(
        model=model_spec,
        input_shape=evaluator.model.input_shape,
        widths={group.name: width for group, width in zip(graph.groups, winner.widths, strict=True)},
        kept={name: [int(channel) for channel in channels] for name, channels in kept.items()},
        checkpoint_sha256=evaluator.model.checkpoint_sha256,
        device=subject.device.name,
        dtype=subject.device.dtype,
    )
    try:
        part = config.out / "pruned.pt.part"
        torch.save(module.state_dict(), part)
        part.replace(config.out / "pruned.pt")
    except (OSError, RuntimeError) as error:
        raise FailedError(f"cannot write {config.out / 'pruned.pt'}: {error}") from error
    policy.save(config.out / "policy.json")
    network = subject.network_at(winner.widths)
    return {
        "policy": str(config.out / "policy.json"),
        "accuracy": test,
        "baseline_accuracy": baseline,
        "accuracy_split": "test",
        "measured_ms": timed["pruned_ms"],
        "baseline_ms": timed["baseline_ms"],
        "speedup": timed["speedup"],
        "latency_source": "measured",
        "macs": network.macs,
        "baseline_macs": graph.macs(),
        "params": network.params,
        "widths": list(winner.widths),
    }


def load_pruned(policy: str | Path) -> nn.Module:
    """The pruned network of a `policy.json`, in eval mode, with the weights that lie beside it."""
    path = Path(policy)
    found = load_policy(path)
    model = load_model(found.model, input_shape=found.input_shape)
    graph = build_graph(model.module, model.input_shape)
    kept = {name: np.array(channels) for name, channels in found.kept.items()}
    module = slice_channels(model.module, graph, kept)
    try:
        state = torch.load(path.parent / found.weights, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot load the weights beside {path}: {str(error).splitlines()[0]}") from None
    return module.eval()
