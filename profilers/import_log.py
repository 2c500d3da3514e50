"""Rows of a latency table from a log of `benchmark_model` that someone ran by hand.

A log has no shapes, only the kinds of operators in their order: they are laid beside the network that the log is said
to be of, and what the table already knows of the same operators is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from profilers.benchmark_log import BenchmarkRun, OpRow, Stats, read_log
from profilers.errors import TableError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec, digest
from profilers.predictor import Predictor
from profilers.table import LatencyTable, Measurement
from profilers.targets.adb_runners import delegate_of

#: What TFLite calls an operator, and the kinds that it may be here: a dense layer is often a convolution of one pixel.
KINDS: Mapping[str, tuple[str, ...]] = {
    "CONV_2D": ("conv", "linear", "grouped_conv", "channel_map"),
    "FULLY_CONNECTED": ("linear", "conv"),
    "DEPTHWISE_CONV_2D": ("depthwise_conv",),
    "AVERAGE_POOL_2D": ("global_avg_pool", "avg_pool"),
    "TRANSPOSE_CONV": ("conv_transpose",),
    "MEAN": ("global_avg_pool", "channel_mean"),
    "REDUCE_MAX": ("channel_max",),
    "MAX_POOL_2D": ("max_pool",),
    "ADD": ("add", "shift", "add_scalar"),
    "SUB": ("sub", "add_scalar"),
    "MUL": ("mul", "scale", "mask", "mul_scalar"),
    "DIV": ("mul_scalar",),
    "NEG": ("mul_scalar",),
    "CONCATENATION": ("concat",),
    "PAD": ("pad",),
    "PRELU": ("prelu",),
    "LEAKY_RELU": ("prelu",),
    "SOFTMAX": ("softmax",),
    "LOG_SOFTMAX": ("log_softmax",),
    "L2_NORMALIZATION": ("l2_norm",),
    "MINIMUM": ("clip",),
    "MAXIMUM": ("clip",),
    "DEPTH_TO_SPACE": ("pixel_shuffle",),
    "RESIZE_BILINEAR": ("upsample_bilinear",),
    "RESIZE_NEAREST_NEIGHBOR": ("upsample_nearest",),
    "RESHAPE": ("flatten",),
    "SQUEEZE": ("flatten",),
}
#: Activations as operators of their own, in the log alone or in the network, too.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "relu": ("RELU",),
    "relu6": ("RELU6",),
    "hardswish": ("HARD_SWISH",),
    "sigmoid": ("LOGISTIC",),
    "tanh": ("TANH",),
    "elu": ("ELU",),
    "gelu": ("GELU",),
    "gelu_tanh": ("GELU",),
    "abs": ("ABS",),
    "exp": ("EXP",),
    "softplus": ("ABS", "NEG", "EXP", "ADD", "LOG", "RELU", "ADD"),
    "mish": ("ABS", "NEG", "EXP", "ADD", "LOG", "RELU", "ADD", "TANH", "MUL"),
    "silu": ("LOGISTIC", "MUL"),
    "hardsigmoid": ("ADD", "MUL"),
}
PADS = ("PAD", "PADV2")  #: before an operator whose padding TFLite does not have
EDGES = ("SLICE", "CONCATENATION")  #: before a pooling whose padding TFLite does not have
FLATTENS = ("RESHAPE", "SQUEEZE")
#: Operators that move or rescale what the network made: they stand in the log and not in the network.
ASIDE = (*FLATTENS, "SOFTMAX", "TRANSPOSE", "QUANTIZE", "DEQUANTIZE")
TOLERANCE = 0.25  #: two runs of one operator on one device differ by less, relative
FLOOR_MS = 0.05  #: or by less than this
NOTHING_MS = 1e-6  #: what a log prints as 0.000: below its resolution


@dataclass(frozen=True)
class Log:
    path: Path
    sha256: str
    run: BenchmarkRun


def read(path: Path) -> Log:
    """A log file; UserError where it cannot be read or is not one whole run."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return Log(path, hashlib.sha256(data).hexdigest(), read_log(data, name=str(path)))


def rows_from(logs: Sequence[Log], graph: OpGraph, table: LatencyTable, predictor: Predictor) -> list[Measurement]:
    """New rows for `table`: the operators and the whole of `graph`, once per log that it does not hold yet.

    UserError, naming the first operator that does not fit, where a log is not of this network.
    """
    known = {row.details.get("log_sha256") for row in table.rows}
    rows: list[Measurement] = []
    for log in logs:
        if log.sha256 in known:
            continue
        known.add(log.sha256)
        _same_set_up(log, graph, table, [*table.rows, *rows])
        pairs = list(_laid_beside(log, graph)) if _attributable(log.run) else []
        _compared(log, pairs, graph, [*table.rows, *rows], predictor)
        rows += _rows(log, pairs, graph)
    return rows


def _same_set_up(log: Log, graph: OpGraph, table: LatencyTable, known: Sequence[Measurement]) -> None:
    run, batch = log.run, table.identity.batch
    first, *rest = graph.input_shape
    wanted = (batch, *rest, first) if len(rest) == 2 else (batch, first, *rest)
    if run.input_shape is not None and run.input_shape != wanted:
        raise UserError(f"{log.path} ran on an input of {_times(run.input_shape)}, the network takes {_times(wanted)}")
    if run.threads not in (None, table.identity.threads):
        raise UserError(f"{log.path} ran with {run.threads} threads, the table is of {table.identity.threads}")
    asked = delegate_of(table.identity.runtime_version)
    if asked is not None and asked[1] not in (run.delegate or "").split("+"):
        raise UserError(f"{log.path} was run by {run.delegate or 'no delegate'}, the table is of {asked[0]}")
    others = _delegates(known)
    if not run.partial and (run.delegate or _attributable(run)) and others and run.delegate not in others:
        before = ", ".join(f"{name} by {delegate or 'no delegate'}" for delegate, name in others.items())
        raise UserError(
            f"{log.path} was run by {run.delegate or 'no delegate'}, {before}: name a device of its own for it"
        )


def _delegates(rows: Sequence[Measurement]) -> dict[str | None, str]:
    """What ran whole networks, and the log that says so; None where nothing did, as operators of their own show."""
    shown = {row.details.get("log_sha256") for row in rows if row.type == "op"}
    told = [row.details for row in rows if "delegate" in row.details and not row.details["partial"]]
    return {each["delegate"]: each["log"] for each in told if each["delegate"] or each["log_sha256"] in shown}


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _attributable(run: BenchmarkRun) -> bool:
    """Whether every row is one operator: a delegate shows itself as one row, or its kernels added up by type."""
    return bool(run.ops) and run.delegate is None and all(row.times_called == 1 for row in run.ops)


def _laid_beside(log: Log, graph: OpGraph) -> Iterator[tuple[OpNode, OpRow]]:
    """Every node with its row, what pads before it and what activates after it included; a flattening without one
    moved nothing."""
    rows = list(log.run.ops)
    place = 0
    for node in graph.nodes:
        while rows and rows[0].type in ASIDE and node.op.kind not in KINDS.get(rows[0].type, ()):
            rows.pop(0)
        if node.op.kind == "flatten":
            yield node, rows.pop(0) if rows and rows[0].type in FLATTENS else OpRow(FLATTENS[0], node.name, 0.0, 1, 0.0)
            continue
        place += 1
        where = f"{log.path} is of another network: its operator {place}"
        padded = node.op.kind not in ("pad", "crop") and any((*node.op.padding, *node.op.padding_after))
        own = [rows.pop(0)] if padded and rows and rows[0].type in PADS else []
        while padded and node.op.kind == "max_pool" and rows and rows[0].type in EDGES:
            own.append(rows.pop(0))
        if not rows:
            raise UserError(f"{where} should be {node.op} ({node.name}), the log ends before it")
        if node.op.kind != "activation":
            if node.op.kind not in KINDS.get(rows[0].type, ()):
                raise UserError(f"{where} is {rows[0].type} ({rows[0].name}), the network has {node.op} ({node.name})")
            own.append(rows.pop(0))
        follow = ACTIVATIONS.get(node.op.activation, ())
        if tuple(row.type for row in rows[: len(follow)]) == follow:
            own += rows[: len(follow)]
            del rows[: len(follow)]
        elif node.op.kind == "activation":
            raise UserError(f"{where} is {rows[0].type} ({rows[0].name}), the network has {node.op} ({node.name})")
        yield node, own[0] if len(own) == 1 else replace(own[0], mean_ms=sum(row.mean_ms for row in own))
    for row in rows:
        if row.type not in ASIDE:
            where = f"{log.path} is of another network: its operator {place + 1}"
            raise UserError(f"{where} is {row.type} ({row.name}), the network ends before it")


def _compared(
    log: Log,
    pairs: Sequence[tuple[OpNode, OpRow]],
    graph: OpGraph,
    known: Sequence[Measurement],
    predictor: Predictor,
) -> None:
    """UserError where the log's times contradict those known, as they do where the widths are not those of the log."""
    if log.run.partial:
        return  # its latency is that of no one runtime
    measured: dict[OpSpec | None, list[float]] = {}
    for row in known:
        if row.type == "op":
            measured.setdefault(row.op, []).append(row.median_ms)
    same = [row.median_ms for row in known if row.type == "network" and row.details.get("digest") == digest(graph)]
    try:
        whole_ms = median(same) if same else predictor.predict(graph)
        off = abs(log.run.timed.mean_ms / whole_ms - 1) > TOLERANCE
    except TableError:
        off = False
    for node, line in pairs:
        if node.op in measured:
            expected = median(measured[node.op])
        elif off and node.op.family() in predictor.families:
            expected = float(predictor.op_ms([node.op])[0])
        else:
            continue
        if abs(line.mean_ms - expected) > max(TOLERANCE * expected, FLOOR_MS):
            raise UserError(
                f"{log.path} does not fit: {node.op} ({node.name}) takes {line.mean_ms:.3g} ms there, {expected:.3g} "
                "ms by what is known: are these its --widths?"
            )
    if off:
        raise UserError(
            f"{log.path} does not fit: the network takes {log.run.timed.mean_ms:.4g} ms there, {whole_ms:.4g} ms by "
            "what is known: are these its --widths?"
        )


def _rows(log: Log, pairs: Sequence[tuple[OpNode, OpRow]], graph: OpGraph) -> list[Measurement]:
    """The network's own row comes last, and says what the log was."""
    run, name = log.run, digest(graph)
    details = {"digest": name, "log_sha256": log.sha256}
    rows = [
        Measurement("op", (max(row.mean_ms, NOTHING_MS),), op=node.op, context="in_context", details=details)
        for node, row in pairs
    ]
    taken = {id(row) for _, row in pairs}
    aside_ms = sum(row.mean_ms for row in run.ops if row.type in ASIDE and id(row) not in taken)
    more = {
        "log": log.path.name,
        "summary": _summary(run.timed),
        "aside_ms": round(aside_ms, 6),
        "delegate": run.delegate,
        "partial": run.partial,
    }
    return [*rows, Measurement("network", (run.timed.mean_ms,), graph=graph, details=details | more)]


def _summary(timed: Stats) -> dict[str, float | None]:
    """A log has no raw samples."""
    return {
        "count": timed.count,
        "mean_ms": timed.mean_ms,
        "min_ms": timed.min_ms,
        "max_ms": timed.max_ms,
        "std_ms": timed.std_ms,
    }
