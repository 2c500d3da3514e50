"""One function per command. Everything that needs a device is reached from here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from amc_hw.choices import MAX_MINUTES, RUNTIME_OF, TOLERANCE_PCT
from amc_hw.compare import CompareConfig, compare, plan_compare
from amc_hw.devices import check_device, clean_device, list_devices, setup_device
from amc_hw.errors import DeviceError, FailedError, TableError, UserError
from amc_hw.evaluate import Evaluator, check_expected, warn_of_chance, warn_of_guessing
from amc_hw.export import MARK, SUFFIXES, export_int8, export_network
from amc_hw.find import (
    LOAD_ROUNDS,
    SearchConfig,
    check_workers,
    plan_search,
    search,
    search_time,
    timed_anew,
)
from amc_hw.finetune import FinetuneConfig, finetune, plan_finetune
from amc_hw.graph import LayerGraph
from amc_hw.models import LoadedModel
from amc_hw.models.checkpoint import not_finite
from amc_hw.plots import check_picture, save_predictions
from amc_hw.policy import Policy, load_policy, policy_file
from amc_hw.pretrain import checkpoint_for, data_for
from amc_hw.refit import count_of
from amc_hw.report import write_report
from amc_hw.runs import JOURNAL, Progress, save_weights, silent
from amc_hw.subject import (
    Subject,
    found_near,
    load_graph,
    open_pruned,
    open_subject,
    read_predictor,
    read_table,
)
from amc_hw.tables import export_csv, list_tables, merge_tables, plot_table, show_table
from amc_hw.task import Task, load_task
from amc_hw.weights import drawn, folded_weights
from profilers import import_log as import_logs
from profilers.device import load_device
from profilers.farm import run_steps
from profilers.files import check_replaceable
from profilers.multiple import channel_multiple
from profilers.ops import OpGraph, digest
from profilers.predictor import Predictor
from profilers.profile import Anchor, Step, missing_steps, refining_steps, time_network
from profilers.sampling import random_widths
from profilers.store import TableStore
from profilers.targets import Network, open_target
from profilers.timing import Steady, ratio_ci95

__all__ = [
    "CompareConfig",
    "FinetuneConfig",
    "SearchConfig",
    "Policy",
    "Subject",
    "check_device",
    "check_network",
    "checkpoint_for",
    "clean_device",
    "compare",
    "data_for",
    "describe_graph",
    "export",
    "export_csv",
    "export_unpruned",
    "finetune",
    "import_log",
    "list_devices",
    "list_tables",
    "load_device",
    "load_graph",
    "load_policy",
    "policy_file",
    "load_pruned",
    "measure",
    "merge_tables",
    "open_policy",
    "open_subject",
    "plan_compare",
    "plan_finetune",
    "plan_profile",
    "plan_search",
    "plan_validate",
    "plot_table",
    "predict",
    "profile",
    "read_predictor",
    "read_table",
    "save_pruned",
    "search",
    "setup_device",
    "show_table",
    "validate",
    "write_report",
]

KNOWN_BY_HEART = 0.999  #: an accuracy that images have which a network was trained on
VALIDATION = 1000  #: begins the seeds of networks that no profile draws
INT8_IMAGES = 200  #: that an int8 export is calibrated on
ROUGH = 0.1  #: root mean square difference over outputs, above which an int8 export warns
CHECK_IMAGES = 32  #: real inputs on which an export is compared with PyTorch


def describe_graph(
    model: str, *, input_shape: Sequence[int] | None = None, keep: Sequence[str] = (), device: str | None = None
) -> dict[str, Any]:
    """Channel groups in order; what is frozen, why, and what it locks; MACs and parameters with batch-norms folded.

    A frozen group locks a part of every operator that reads or writes it: `macs_share`, and `latency_share` where the
    `device` has a table that knows the network (null elsewhere).
    """
    _, graph = load_graph(model, input_shape=input_shape, keep=keep)
    network = graph.op_graph()
    latency = None if device is None else _operator_ms(graph, device)
    return {
        "model": model,
        "groups": [
            {
                "name": group.name,
                "width": group.width,
                "consumers": list(group.modules("consumer")),
                "block": group.block,
                "each": group.each,
            }
            for group in graph.groups
        ],
        "frozen": _frozen(graph, latency),
        "macs": network.macs,
        "params": graph.params(),
    }


def _frozen(graph: LayerGraph, latency: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """What is frozen, why, and what it locks; latency: of every operator, where it is known."""
    total, rows = max(graph.macs(), 1), []
    for group in graph.frozen:
        touching = [layer for layer in graph.layers if {layer.module, layer.batch_norm} & set(group.modules)]
        names = {layer.name for layer in touching}
        rows.append(
            {
                "name": group.name,
                "width": group.width,
                "reason": group.reason,
                "macs_share": sum(layer.op.macs for layer in touching) / total,
                "latency_share": latency
                and sum(ms for name, ms in latency.items() if name in names) / sum(latency.values()),
            }
        )
    return rows


def check_network(
    subject: Subject,
    *,
    data: str | None,
    evaluate: str | None = None,
    calibrate: str | None = None,
    expect_accuracy: float | None = None,
    episodes: int = SearchConfig.episodes,
    refit: str = SearchConfig.refit,
    workers: int = SearchConfig.workers,
    seed: int = 0,
) -> dict[str, Any]:
    """What to know before a long run: the unpruned accuracy, groups, what the table lacks, and how long profiling and
    searching would take. One measurement of the table's and one episode are made; nothing is written. Without data
    and functions there is no accuracy, and nothing of a search."""
    check_workers(workers)
    if not subject.target.can_time:
        read_predictor(subject).predict(subject.network_at(None))  # what it lacks, it will always lack
    found: dict[str, Any] = dict.fromkeys(("accuracy", "metric", "seconds_per_episode", "search_minutes"))
    if any((data, evaluate, calibrate)):
        start = time.monotonic()
        task = load_task(subject.model, data=data, evaluate=evaluate, calibrate=calibrate, seed=seed)
        evaluator = Evaluator(subject.model, subject.graph, task, seed=seed, refit=refit)
        score = evaluator.unpruned_score
        check_expected(score, expect_accuracy)
        warn_of_guessing(task, score)
        warn_of_chance(task, subject.model.module, score)
        if task.split == "test" and score >= KNOWN_BY_HEART:
            warnings.warn(
                f"the accuracy on held-out images is {score:.4f}: if the network was trained on them, put others aside "
                "(val/, or x_val and y_val), or a search cannot tell policies apart",
                stacklevel=2,
            )
        planned = search_time(evaluator, subject.grids, episodes, time.monotonic() - start, workers=workers)
        found |= {"accuracy": score, "metric": "score" if task.split == "evaluate" else "accuracy"}
        found |= {"seconds_per_episode": planned["seconds_per_episode"], "search_minutes": planned["minutes"]}
    table = plan_profile(subject, seed=seed) if subject.target.can_time else None
    network = subject.graph.op_graph()
    return {
        "model": subject.model.spec,
        **found,
        "groups": len(subject.graph.groups),
        "frozen": _frozen(subject.graph),
        "macs": network.macs,
        "params": subject.graph.params(),
        "smallest_macs": subject.graph.macs([grid[0] for grid in subject.grids]),
        "table": None if table is None else table["table"],
        "measurements_missing": None if table is None else table["steps"],
        "profile_minutes": None if table is None else table["minutes"],
        "episodes": episodes,
        "workers": workers,
    }


def _operator_ms(graph: LayerGraph, device: str) -> dict[str, float] | None:
    """Predicted milliseconds of the operators that the device's runtime runs; None where its table lacks one."""
    config = load_device(device)
    try:
        target = open_target(config)
        table = TableStore(target).find()
        if table is None:
            return None
        predictor = Predictor(table, target.lower, extrapolate=config.extrapolate)
        nodes = predictor.lower(graph.op_graph(batch=config.batch)).nodes
        found = predictor.op_ms([node.op for node in nodes])
    except (TableError, DeviceError):
        return None
    return {node.name: float(ms) for node, ms in zip(nodes, found, strict=True)}


def plan_profile(subject: Subject, *, seed: int = 0, way: str = "auto") -> dict[str, Any]:
    """What `profile` would measure: steps and about how many minutes; nothing is written."""
    table = subject.store.find_or_empty()
    steps = missing_steps(subject.job(seed=seed, way=way), table, subject.target)
    start = time.monotonic()
    if steps:
        steps[0].run(Anchor(subject.target, subject.network_at(None), table))
    seconds = (time.monotonic() - start) * len(steps) / len(subject.targets)
    return {"table": str(table.path), "rows_total": len(table.rows), "steps": len(steps), "minutes": seconds / 60}


def profile(
    subject: Subject,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE_PCT,
    max_minutes: float = MAX_MINUTES,
    way: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure what the device's table lacks for this network, and append it.

    Then go on where predictions are least sure, until 90% of the networks that calibrate are predicted within
    `tolerance` percent by a fit without them, `max_minutes` are over, or the table is exhausted: as much is measured
    as is planned for a network. way: how operators are measured, of `profilers.device.WAYS`.
    """
    start = time.monotonic()
    job, target = subject.job(seed=seed, way=way), subject.target
    if not target.can_time:
        raise DeviceError(target.probes()[0].text)
    table = subject.store.open()
    before = len(table.rows)
    anchors = [Anchor(each, job.unpruned, table) for each in subject.targets]

    def measured(steps: Sequence[Step]) -> bool:
        return run_steps(
            steps, anchors, table.append, progress, over=lambda: time.monotonic() - start > 60 * max_minutes
        )

    time_up = not measured(missing_steps(job, table, target))
    predictor, unpruned, exhausted = read_predictor(subject, table), digest(subject.network_at(None)), False
    while not time_up and (predictor.error_pct_of(unpruned) or 0.0) > tolerance:
        steps = refining_steps(job, table, target, predictor)
        if not steps:
            exhausted = True
            break
        time_up = not measured(steps)
        predictor = read_predictor(subject, table)
    return {
        "table": str(table.path),
        "rows_total": len(table.rows),
        "rows_new": len(table.rows) - before,
        "seconds": time.monotonic() - start,
        "error_pct": predictor.error_pct_of(unpruned),
        "time_up": time_up,
        "exhausted": exhausted,
        "channel_multiple": channel_multiple(table),
    }


def import_log(subject: Subject, widths: Sequence[int] | None, logs: Sequence[Path]) -> dict[str, Any]:
    """Add what logs of `benchmark_model` say of the network at `widths` to the device's table: all of them or none.

    A log that the table holds already adds nothing. UserError where one is damaged or of another network.
    """
    found = [import_logs.read(path) for path in logs]
    known = subject.store.find_or_empty()
    rows = import_logs.rows_from(found, subject.network_at(widths), known, read_predictor(subject, known))
    table = subject.store.open()
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
    unpruned = subject.network_at(None)
    predicted, baseline = predictor.predict(network), predictor.predict(unpruned)
    return {
        "predicted_ms": predicted,
        "baseline_predicted_ms": baseline,
        "predicted_speedup": baseline / predicted,
        "error_pct": predictor.stated_error_pct(digest(unpruned)),
        **subject.runs_on,
        "macs": network.macs,
    }


def plan_validate(subject: Subject, *, samples: int, seed: int = 0) -> dict[str, Any]:
    """What `validate` would time: random networks and about how many minutes; one is timed, nothing is written."""
    _check_samples(samples)
    anchor = Anchor(subject.target, subject.network_at(None), read_table(subject))
    widths = random_widths(subject.grids, 1, seed=(VALIDATION, seed), fine=subject.job().fine)[0]
    start = time.monotonic()
    time_network(subject.network_at(widths), anchor, "validation", seed=0)
    return {"samples": samples, "minutes": (time.monotonic() - start) * samples / 60}


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise UserError(f"--samples {samples}: at least 2 are needed")


def validate(
    subject: Subject, *, samples: int, seed: int = 0, plot: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Predicted against measured latency on fresh random pruned networks, which no calibration has seen; every second
    one free of the channel multiple. plot: a picture to write."""
    if plot is not None:
        check_picture(plot)
    _check_samples(samples)
    table = read_table(subject)
    predictor = read_predictor(subject, table)
    anchor = Anchor(subject.target, subject.network_at(None), table)
    seen = {row.details.get("digest") for row in table.rows if row.type in ("network", "calibration")}
    found: list[dict[str, Any]] = []
    for widths in random_widths(subject.grids, 4 * samples, seed=(VALIDATION, seed), fine=subject.job().fine):
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
    from scipy import stats  # takes half a second

    errors = np.abs([sample["pct_error"] for sample in found])
    pairs = [(sample["predicted_ms"], sample["measured_ms"]) for sample in found]
    spearman = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    return {
        "samples": found,
        "median_abs_pct_error": float(np.median(errors)),
        "within_5pct": float(np.mean(errors <= 5)),
        "within_10pct": float(np.mean(errors <= 10)),
        "plot": None if plot is None else str(plot),
        "spearman": spearman if np.isfinite(spearman) else None,  # of predictions that are all alike
    }


def measure(
    subject: Subject,
    widths: Sequence[int],
    *,
    module: nn.Module | None = None,
    rounds: int = LOAD_ROUNDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the network at `widths` beside the unpruned one, interleaved, in processes of their own.

    rounds: samples of each process, see `loaded_anew`. module: the pruned network itself, for its weights; random
    ones without it.
    """
    weights = None if module is None else folded_weights(module, subject.graph)
    network, full = Network(subject.network_at(widths), weights), Network(subject.network_at(None))
    baseline, pruned = timed_anew(subject, Steady(), [full, network], rounds=rounds, seed=seed)
    return {
        "baseline_ms": float(np.median(baseline)),
        "pruned_ms": float(np.median(pruned)),
        "speedup": float(np.median(baseline) / np.median(pruned)),
        "speedup_ci95": list(ratio_ci95(pruned, baseline, per_load=rounds)),
        "p90_ms": float(np.quantile(pruned, 0.9)),
        "runs": len(pruned),
        **subject.runs_on,
        "macs": network.graph.macs,
        "baseline_macs": full.graph.macs,
    }


def export(
    policy: str | Path,
    *,
    file_format: str,
    out: str | Path,
    batch: int = 1,
    data: str | None = None,
    int8: bool = False,
    int8_io: bool = False,
) -> dict[str, Any]:
    """Write the pruned network of a policy for deployment, checked against PyTorch on inputs of its task.

    data: images to use in place of what the policy names. int8: quantized after training, calibrated
    on the task's inputs by the runtime's own tool; its held-out accuracy is reported beside the float network's.
    int8_io: with int8 inputs and outputs, too, as microcontrollers and NPUs have them (tflite).
    """
    out = Path(out)
    _check_named(out, file_format, int8=int8, int8_io=int8_io)
    policy = policy_file(Path(policy))
    pruned = open_pruned(policy)
    found = pruned.policy
    if file_format in RUNTIME_OF and (found.dtype == "int8") != int8:
        warnings.warn(
            f"{policy} was searched for {found.dtype}: what was measured is not the latency of this "
            f"{'int8' if int8 else 'float32'} file, 'amc-hw measure --policy {policy} --dtype "
            f"{'int8' if int8 else 'float32'}' tells that",
            stacklevel=2,
        )
    evaluate, calibrate, images = (
        text and found_near(text, policy, found) for text in (found.evaluate, found.calibrate, found.data)
    )
    calibrate = calibrate if data is None else None
    task = load_task(pruned.model, data=data or images, evaluate=evaluate, calibrate=calibrate)
    loaded = replace(pruned.model, module=pruned.module)
    network = pruned.graph.op_graph(pruned.widths, batch=batch)
    return _export(loaded, pruned.graph, network, task, file_format, out, int8=int8, int8_io=int8_io)


def export_unpruned(
    model: str,
    *,
    checkpoint: str | Path | None = None,
    file_format: str,
    out: str | Path,
    batch: int = 1,
    data: str | None = None,
    evaluate: str | None = None,
    calibrate: str | None = None,
    input_shape: Sequence[int] | None = None,
    int8: bool = False,
    int8_io: bool = False,
) -> dict[str, Any]:
    """As `export`, of the network that a search begins with: what a pruned one is compared with elsewhere. A float file
    is checked on random images where no data are named."""
    out = Path(out)
    _check_named(out, file_format, int8=int8, int8_io=int8_io)
    loaded, graph = load_graph(
        model, input_shape=input_shape, checkpoint=None if checkpoint is None else Path(checkpoint)
    )
    if checkpoint is None:
        warnings.warn(f"no checkpoint is named: the weights are those that {loaded.spec} brings itself", stacklevel=2)
    named = int8 or any((data, evaluate, calibrate))
    task = load_task(loaded, data=data, evaluate=evaluate, calibrate=calibrate) if named else None
    network = graph.op_graph(batch=batch)
    return _export(loaded, graph, network, task, file_format, out, int8=int8, int8_io=int8_io)


def _check_named(out: Path, file_format: str, *, int8: bool, int8_io: bool) -> None:
    if int8_io and not (int8 and file_format == "tflite"):
        raise UserError("--int8-io goes with --int8 and --format tflite")
    if SUFFIXES.get(out.suffix, file_format) != file_format:
        raise UserError(f"{out} is named as a file of {SUFFIXES[out.suffix]}, not of --format {file_format}")
    if file_format == "torch" and out.suffix != ".pt2":
        raise UserError(f"{out}: the name of a torch file ends in .pt2, torch.export.load takes no other")
    check_replaceable(out, MARK)


def _about(loaded: LoadedModel, network: OpGraph, task: Task | None, file_format: str) -> dict[str, Any]:
    """What someone who runs an exported file has to know: for its metadata, and for the result."""
    layout, batch = "channels_last" if file_format == "tflite" else "channels_first", network.nodes[0].op.batch
    shapes = {name: list(shape) for name, shape in network.inputs.items()}
    if file_format == "torch":
        shapes = dict(zip(shapes, (list(example.shape[1:]) for example in loaded.example_inputs), strict=True))
    elif layout == "channels_last":  # of images; tokens have them there, and vectors nowhere else
        shapes = {name: [*shape[1:], shape[0]] if len(shape) == 3 else shape for name, shape in shapes.items()}
    inputs = {name: [batch, *shape] for name, shape in shapes.items()}
    about: dict[str, Any] = {"model": loaded.spec, "layout": layout, "inputs": inputs}
    in_unit_range = True if task is None else task.in_unit_range
    if in_unit_range is None:
        return about
    unit = in_unit_range and len(loaded.input_shape) == 3
    return about | ({"range": [0, 1]} if unit else {}) | {"mean": list(loaded.mean), "std": list(loaded.std)}


def _export(
    loaded: LoadedModel,
    graph: LayerGraph,
    network: OpGraph,
    task: Task | None,
    file_format: str,
    out: Path,
    *,
    int8: bool,
    int8_io: bool,
) -> dict[str, Any]:
    """Without a task a float file is checked on random inputs."""
    module, about = loaded.module, _about(loaded, network, task, file_format)
    told = {name: value for name, value in about.items() if name != "model"}
    if task is None or not int8:
        random = drawn((example.shape[1:] for example in loaded.example_inputs), CHECK_IMAGES)
        inputs = random if task is None else task.inputs(CHECK_IMAGES)
        return export_network(module, graph, network, inputs, file_format=file_format, out=out, about=about) | told
    inputs = task.inputs(INT8_IMAGES + CHECK_IMAGES)
    count, batch = count_of(inputs), network.nodes[0].op.batch
    aside = -(-max(count // 8, 1) // batch) * batch  # whole batches
    cut = min(INT8_IMAGES, count - aside) if count >= 2 * batch else count
    calibrated, others = (tuple(part[places] for part in inputs) for places in (slice(cut), slice(cut, None)))
    found, running = export_int8(
        module,
        graph,
        network,
        calibrated,
        others=others if count > cut else None,
        file_format=file_format,
        out=out,
        about=about,
        int8_io=int8_io,
    )
    if found["rms_diff"] > ROUGH:
        warnings.warn(
            f"the outputs of {out} differ by {100 * found['rms_diff']:.0f}% in the root mean square: accuracies that "
            "compare outputs only may not show it",
            stacklevel=2,
        )
    scores = {"accuracy": task.score(running), "float_accuracy": task.score(module)}
    return found | told | scores | {"accuracy_split": "evaluate" if task.split == "evaluate" else "held-out"}


def load_pruned(policy: str | Path) -> nn.Module:
    """The pruned network of a `policy.json`, in eval mode, with the weights that lie beside it."""
    return open_pruned(Path(policy)).module


def save_pruned(module: nn.Module, policy: str | Path, out: str | Path) -> Path:
    """Keep what a training loop made of the pruned network of `policy`: a policy of the same widths with the weights of
    `module`, in the folder `out`. Its `policy.json`.

    UserError where the weights are of another network or not finite, and where `out` holds something else.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"save_pruned takes the network itself, not a {type(module).__name__}")
    found, out = open_pruned(Path(policy)), Path(out)
    weights = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    for wrapped in ("_orig_mod.", "module."):  # by torch.compile, or for several devices
        if all(name.startswith(wrapped) for name in weights):
            weights = {name.removeprefix(wrapped): value for name, value in weights.items()}
    wanted = found.module.state_dict()
    differing = [name for name in {**wanted, **weights} if _shape(wanted, name) != _shape(weights, name)]
    if differing:
        raise UserError(f"the network is not that of {policy}: {differing[0]} is missing, new or of another shape")
    if bad := not_finite(found.module, weights):
        raise UserError(f"the network has weights that are no finite numbers: {bad[0]}")
    target = out / "policy.json"
    if (out / JOURNAL).exists() or (target.exists() and load_policy(target).widths != found.policy.widths):
        raise UserError(f"{out} holds something else: name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(f"cannot write in {out}: {error.strerror}") from None
    # in its types, where some were trained in half precision; and with the versions of its modules
    wanted.update({name: value.to(wanted[name].dtype) for name, value in weights.items()})
    save_weights(out / found.policy.weights, wanted)
    found.policy.save(target)
    return target


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def open_policy(
    policy: Path, *, device: str | None = None, **options: Any
) -> tuple[Subject, tuple[int, ...], nn.Module]:
    """A policy's unpruned network on a device (that of the policy, where none is named), its widths, and the pruned
    network. options: as of `open_subject`."""
    pruned = open_pruned(policy)
    found = pruned.policy
    options |= {"dtype": options.get("dtype") or found.dtype, "keep": found.keep}
    if device in (None, found.device) and options.get("threads") is None:
        options["threads"] = found.threads
    subject = open_subject(device=device or found.device, model=found.model, unpruned=pruned, **options)
    if subject.device.dtype != found.dtype:
        warnings.warn(f"{policy} was searched for {found.dtype}, this is of {subject.device.dtype}", stacklevel=2)
    return subject, pruned.widths, pruned.module
