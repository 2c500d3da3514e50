"""One function per command. Everything that needs a device is reached from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph, build_graph, width_grid
from amc_hw.models import load_model
from profilers.device import DeviceConfig, device_names, load_device, search_folders
from profilers.predictor import Predictor, anchored_ms
from profilers.profile import ProfileJob, digest, missing_steps, time_network
from profilers.sampling import random_widths
from profilers.table import Identity, LatencyTable
from profilers.targets import Network, Target, open_target
from profilers.timing import TimingPlan, ratio_ci95, refuse_noise

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


def open_predictor(subject: Subject) -> Predictor:
    table = LatencyTable.read(table_path(subject.device))
    _refuse_other_identity(table, subject.target.identity())
    return Predictor(table, subject.target.lower)


def _refuse_other_identity(table: LatencyTable, identity: Identity) -> None:
    if table.identity != identity:
        LatencyTable.open(table.path, identity)  # says which part differs


def predict(subject: Subject, widths: Sequence[int] | None) -> dict[str, Any]:
    """End-to-end latency from the table alone."""
    predictor = open_predictor(subject)
    network = subject.network_at(widths)
    return {"predicted_ms": predictor.predict(network), "error_pct": predictor.error_pct, "macs": network.macs}


def validate(subject: Subject, *, samples: int, seed: int = 0, progress: Progress) -> dict[str, Any]:
    """Predicted against measured latency on fresh random pruned networks, which no calibration has seen."""
    if samples < 2:
        raise UserError(f"--samples {samples}: at least 2 are needed")
    predictor = open_predictor(subject)
    table = LatencyTable.open(table_path(subject.device), subject.target.identity())
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
