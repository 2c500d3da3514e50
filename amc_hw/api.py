"""One function per command. Everything that needs a device is reached from here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from amc_hw.data import load_data, load_tensors
from amc_hw.errors import DeviceError, FailedError, UserError
from amc_hw.export import FORMATS, export_network, folded_weights
from amc_hw.find import BUDGETS, Progress, SearchConfig, plan_search, search, time_apart
from amc_hw.graph import LayerGraph
from amc_hw.models import LoadedModel
from amc_hw.plots import check_picture, save_predictions
from amc_hw.policy import Policy, load_policy
from amc_hw.pretrain import DEFAULT_DATA, DEFAULT_MODEL, checkpoint_for
from amc_hw.prune import slice_channels
from amc_hw.specs import one_line
from amc_hw.subject import Subject, load_graph, open_subject, read_predictor, read_table, table_path, tables
from amc_hw.tables import export_csv, list_tables, merge_tables, plot_table, show_table
from profilers import import_log as import_logs
from profilers.device import device_names, load_device
from profilers.files import write_whole
from profilers.multiple import channel_multiple
from profilers.profile import WAYS, Anchor, Step, digest, missing_steps, refining_steps, time_network
from profilers.sampling import random_widths
from profilers.table import LatencyTable
from profilers.targets import Network, open_target
from profilers.timing import ratio_ci95

__all__ = [
    "BUDGETS",
    "DEFAULT_DATA",
    "DEFAULT_MODEL",
    "FORMATS",
    "SearchConfig",
    "WAYS",
    "Subject",
    "check_device",
    "checkpoint_for",
    "describe_graph",
    "export",
    "export_csv",
    "import_log",
    "list_devices",
    "list_tables",
    "load_device",
    "load_policy",
    "load_pruned",
    "measure",
    "merge_tables",
    "open_policy",
    "open_subject",
    "plan_profile",
    "plan_search",
    "plot_table",
    "predict",
    "profile",
    "read_predictor",
    "read_table",
    "search",
    "show_table",
    "validate",
]

TOLERANCE_PCT, MAX_MINUTES = 4.0, 10.0  #: of `profile`
CHECK_IMAGES = 32  #: real inputs on which an export is compared with PyTorch


def list_devices() -> dict[str, Any]:
    """Configurations by name, and the latency tables that were measured with them."""
    devices = []
    for name in device_names():
        config = load_device(name)
        devices.append(
            {
                "name": name,
                "target": config.target,
                "runtime": config.runtime,
                "description": config.description,
                "tables": [str(path) for path in tables(config.name)],
            }
        )
    return {"devices": devices}


def check_device(name: str) -> dict[str, Any]:
    """What is there and what is missing on a device; `ok` where nothing is."""
    probes = open_target(load_device(name)).probes()
    return {"device": name, "ok": all(probe.ok for probe in probes), "probes": [asdict(probe) for probe in probes]}


def describe_graph(model: str, *, input_shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Channel groups in order; what is frozen, and why; MACs and parameters with batch-norms folded."""
    _, graph = load_graph(model, input_shape=input_shape)
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


def _open_table(subject: Subject) -> LatencyTable:
    """The device's table to add to, in the user's own folder: a shipped one is copied there first."""
    identity = subject.target.identity()
    path = table_path(subject.device, identity)
    own = Path("latency_tables") / path.name
    if path.exists() and not own.exists():
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            write_whole(own, path.read_bytes())
        except OSError as error:
            raise FailedError(f"cannot copy {path} to {own}: {error.strerror}") from error
    return LatencyTable.open(own, identity, subject.target.provenance())


def plan_profile(subject: Subject, *, seed: int = 0, way: str = "auto") -> dict[str, Any]:
    """What `profile` would measure: steps and about how many minutes; nothing is written."""
    identity = subject.target.identity()
    path = table_path(subject.device, identity)
    begun = path.exists() and LatencyTable.read_identity(path) is not None
    table = LatencyTable.read(path) if begun else LatencyTable(path, identity, {}, [])
    steps = missing_steps(subject.job(seed=seed, way=way), table, subject.target)
    start = time.monotonic()
    if steps:
        steps[0].run()
    seconds = (time.monotonic() - start) * len(steps)
    return {"table": str(path), "rows_total": len(table.rows), "steps": len(steps), "minutes": seconds / 60}


def profile(
    subject: Subject,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE_PCT,
    max_minutes: float = MAX_MINUTES,
    way: str = "auto",
    progress: Progress,
) -> dict[str, Any]:
    """Measure what the device's table lacks for this network, and append it.

    Then go on where predictions are least sure, until 90% of the networks that calibrate are predicted within
    `tolerance` percent by a fit without them, or `max_minutes` are over. way: how operators are measured, of WAYS.
    """
    start = time.monotonic()
    job, target = subject.job(seed=seed, way=way), subject.target
    if not target.can_time:
        raise DeviceError(target.probes()[0].text)
    table = _open_table(subject)
    before = len(table.rows)

    def measured(steps: Sequence[Step]) -> bool:
        for index, step in enumerate(steps):
            if time.monotonic() - start > 60 * max_minutes:
                return False
            progress(index, len(steps), step.name)
            table.append(step.run())
        return True

    whole = measured(missing_steps(job, table, target))
    predictor, unpruned = read_predictor(subject, table), digest(subject.network_at(None))
    while whole and (predictor.error_pct_of(unpruned) or 0.0) > tolerance:
        steps = refining_steps(job, table, target, predictor)
        whole = bool(steps) and measured(steps)
        predictor = read_predictor(subject, table)
    return {
        "table": str(table.path),
        "rows_total": len(table.rows),
        "rows_new": len(table.rows) - before,
        "seconds": time.monotonic() - start,
        "error_pct": predictor.error_pct_of(unpruned),
        "channel_multiple": channel_multiple(table),
    }


def import_log(subject: Subject, widths: Sequence[int] | None, logs: Sequence[Path]) -> dict[str, Any]:
    """Add what logs of `benchmark_model` say of the network at `widths` to the device's table: all of them or none.

    A log that the table holds already adds nothing. UserError where one is damaged or of another network.
    """
    found = [import_logs.read(path) for path in logs]
    table = _open_table(subject)
    rows = import_logs.rows_from(found, subject.network_at(widths), table, read_predictor(subject, table))
    table.append(rows)
    return {
        "table": str(table.path),
        "rows_total": len(table.rows),
        "rows_new": len(rows),
        "logs": [
            {
                "file": str(log.path),
                "mean_ms": log.run.timed.mean_ms,
                "operators": len(log.run.ops),
                "delegate": log.run.delegate,
                "partial": log.run.partial,
            }
            for log in found
        ],
    }


def predict(subject: Subject, widths: Sequence[int] | None) -> dict[str, Any]:
    """End-to-end latency from the table alone, beside that of the unpruned network."""
    predictor = read_predictor(subject)
    network = subject.network_at(widths)
    predicted, baseline = predictor.predict(network), predictor.predict(subject.network_at(None))
    return {
        "predicted_ms": predicted,
        "baseline_predicted_ms": baseline,
        "predicted_speedup": baseline / predicted,
        "error_pct": predictor.error_pct,
        "macs": network.macs,
    }


def validate(
    subject: Subject, *, samples: int, seed: int = 0, plot: Path | None = None, progress: Progress
) -> dict[str, Any]:
    """Predicted against measured latency on fresh random pruned networks, which no calibration has seen; every second
    one free of the channel multiple. plot: a picture to write."""
    if plot is not None:
        check_picture(plot)
    if samples < 2:
        raise UserError(f"--samples {samples}: at least 2 are needed")
    table = read_table(subject)
    predictor = read_predictor(subject, table)
    anchor = Anchor(subject.target, subject.network_at(None), table)
    seen = {row.details.get("digest") for row in table.rows if row.type in ("network", "calibration")}
    found: list[dict[str, Any]] = []
    for widths in random_widths(subject.grids, 4 * samples, seed=1000 + seed, fine=subject.job().fine):
        graph = subject.network_at(widths)
        if digest(graph) in seen or len(found) == samples:
            continue
        progress(len(found), samples, "timing random networks")
        row = time_network(graph, anchor, "validation", seed=len(found))
        table.append([row])
        measured = predictor.measured_ms(row)
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
    if plot is not None:
        save_predictions(plot, f"{subject.model.spec}, {subject.device.name}", found)
    errors = np.abs([sample["pct_error"] for sample in found])
    pairs = [(sample["predicted_ms"], sample["measured_ms"]) for sample in found]
    return {
        "samples": found,
        "median_abs_pct_error": float(np.median(errors)),
        "within_5pct": float(np.mean(errors <= 5)),
        "within_10pct": float(np.mean(errors <= 10)),
        "plot": None if plot is None else str(plot),
        "spearman": float(stats.spearmanr(*zip(*pairs, strict=True)).statistic),
    }


def measure(
    subject: Subject, widths: Sequence[int], *, module: nn.Module | None = None, rounds: int = 25, seed: int = 0
) -> dict[str, Any]:
    """Time the network at `widths` beside the unpruned one, interleaved, in a fresh process.

    module: the pruned network itself, for its weights; random ones without it.
    """
    weights = None if module is None else folded_weights(module, subject.graph)
    network, full = Network(subject.network_at(widths), weights), Network(subject.network_at(None))
    baseline, pruned = time_apart(subject, [full, network], rounds=rounds, seed=seed)
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
        "macs": network.graph.macs,
        "baseline_macs": full.graph.macs,
    }


def export(
    policy: str | Path, *, file_format: str, out: Path, batch: int = 1, data: str | None = None
) -> dict[str, Any]:
    """Write the pruned network of a policy for deployment, checked against PyTorch on images of its data set.

    data: the data set, where it is not at the place that the policy names.
    """
    found = load_policy(Path(policy))
    model, graph = load_graph(found.model, input_shape=found.input_shape)
    module = _pruned(Path(policy), found, model, graph)
    splits = load_data(data or found.data, input_shape=found.input_shape)
    images, _ = load_tensors(splits.val, limit=CHECK_IMAGES)
    mean, std = (torch.tensor(values)[:, None, None] for values in (found.mean, found.std))
    network = graph.op_graph([found.widths[group.name] for group in graph.groups], batch=batch)
    return export_network(module, graph, network, (images - mean) / std, file_format=file_format, out=out)


def load_pruned(policy: str | Path) -> nn.Module:
    """The pruned network of a `policy.json`, in eval mode, with the weights that lie beside it."""
    found = load_policy(Path(policy))
    model, graph = load_graph(found.model, input_shape=found.input_shape)
    return _pruned(Path(policy), found, model, graph)


def open_policy(
    policy: Path, *, device: str | None = None, **options: Any
) -> tuple[Subject, tuple[int, ...], nn.Module]:
    """A policy's unpruned network on a device (that of the policy, where none is named), its widths, and the pruned
    network. options: as of `open_subject`."""
    found = load_policy(policy)
    subject = open_subject(device=device or found.device, model=found.model, input_shape=found.input_shape, **options)
    module = _pruned(policy, found, subject.model, subject.graph)
    return subject, tuple(found.widths[group.name] for group in subject.graph.groups), module


def _pruned(path: Path, found: Policy, model: LoadedModel, graph: LayerGraph) -> nn.Module:
    """The pruned network of the policy `found` at `path`, from its unpruned one."""
    try:
        kept = {name: np.array(channels) for name, channels in found.kept.items()}
        module = slice_channels(model.module, graph, kept)
        graph.checked([found.widths[group.name] for group in graph.groups])
    except (ValueError, KeyError, UserError) as error:
        raise UserError(f"{path} does not fit {found.model}: {error}") from None
    weights = path.parent / found.weights
    try:
        module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # unpickling an arbitrary file fails in arbitrary ways
        raise UserError(f"cannot load the weights {weights}: {one_line(error)}") from None
    return module.eval()
