"""Looking at latency tables: what lies where, what is in one, how an operator's latency depends on its width."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw.errors import TableError, UserError
from amc_hw.plots import save_staircase
from profilers.device import device_names, load_device
from profilers.files import check_replaceable, write_whole
from profilers.multiple import channel_multiple
from profilers.ops import CONV_KINDS, OpSpec
from profilers.predictor import Predictor
from profilers.store import begun, table_files
from profilers.table import LatencyTable, merged
from profilers.targets import open_target


def find_table(name: str) -> Path:
    """The table of that file name or device; UserError where there is none or several."""
    if Path(name).suffix == ".jsonl" or "/" in name:
        return Path(name)
    found: dict[str, Path] = {}
    for path in table_files(load_device(name).name):
        other = found.setdefault(path.name, path)
        if LatencyTable.read_identity(path) != LatencyTable.read_identity(other):
            found[str(path)] = path  # else the user's own hides the shipped one that it began as a copy of
    if not found:
        raise TableError(f"no latency table of {name}: measure one with 'amc-hw profile --device {name}'")
    if len(found) > 1:
        raise UserError(f"{name} has several tables, name one: {', '.join(map(str, found.values()))}")
    return next(iter(found.values()))


def list_tables() -> dict[str, Any]:
    """Every table in the user's own folder and among the shipped ones."""
    found = []
    for path in table_files():
        try:
            found += [LatencyTable.read(path)] if begun(path) else []
        except TableError as error:
            warnings.warn(str(error), stacklevel=2)  # it does not hide the others
    return {
        "tables": [
            {"file": str(table.path), "identity": asdict(table.identity), "rows": dict(_counted(table))}
            for table in found
        ]
    }


def _counted(table: LatencyTable) -> Counter[str]:
    return Counter(row.type for row in table.rows)


def read_predictions(path: Path) -> tuple[LatencyTable, Predictor]:
    """A table by itself, and what it predicts. How its runtime fuses operators is asked of a device that has it."""
    table = LatencyTable.read(path)
    configs = [load_device(name) for name in device_names()]
    name = path.stem.split("@")[0]
    alike = [config for config in configs if config.runtime == table.identity.runtime]
    chosen = next((config for config in alike if config.name == name), alike[0] if alike else None)
    if chosen is None:
        raise UserError(f"{path}: no device configuration has its runtime, {table.identity.runtime!r}")
    return table, Predictor(table, open_target(chosen).lower, extrapolate=chosen.extrapolate)


def show_table(name: str) -> dict[str, Any]:
    """Identity, provenance, rows by type, operators with the widths that were measured, and the predictions' error."""
    path = find_table(name)
    table, predictor = read_predictions(path)
    operators = [
        {"op": _family_name(family), "points": len(cost.points), "low": cost.low.tolist(), "high": cost.high.tolist()}
        for family, cost in predictor.families.items()
    ]
    return {
        "file": str(path),
        "identity": asdict(table.identity),
        "provenance": table.provenance,
        "rows": dict(_counted(table)),
        "operators": operators,
        "error_pct": predictor.error_pct,
        "channel_multiple": channel_multiple(table),
    }


def _family_name(family: OpSpec) -> str:
    """As an operator, with its widths left open."""
    kind, _, rest = str(family).partition(" ")
    _, _, size = rest.partition("x")
    height_width, _, tail = size.partition("->")
    name = f"{kind} {height_width}" + (f" {tail.partition(' ')[2]}" if " " in tail else "")
    if family.kind in (*CONV_KINDS, "conv_transpose", "max_pool", "avg_pool"):
        usual = tuple(d * (k - 1) // 2 for d, k in zip(family.dilation, family.kernel, strict=True))
        name += f" p{_by(family.padding)}" if family.padding != usual else ""
        name += f"-{_by(family.padding_after)}" if family.padding_after != family.padding else ""
        name += f" d{_by(family.dilation)}" if family.dilation != (1, 1) else ""
    return name + (f" g{family.groups} {_by(family.axes)}" if family.groups > 1 else "")


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def plot_table(name: str, *, op: str | None, out: Path) -> dict[str, Any]:
    """Latency against width of one operator, measured and predicted, as SVG or PNG.

    op: a part of its name in `table show`; default: the operator that takes the most time. An operator of two widths
    is drawn over its outputs, at the largest input width measured.
    """
    path = find_table(name)
    table, predictor = read_predictions(path)
    named = {_family_name(family): family for family in predictor.families}
    fitting = [op] if op in named else [each for each in named if op is None or op in each]
    if not fitting:
        raise UserError(f"no operator {op!r} in {path}; operators: {', '.join(named)}")
    chosen = max(fitting, key=lambda each: float(predictor.families[named[each]](_largest(predictor, named[each]))[0]))
    family, cost = named[chosen], predictor.families[named[chosen]]
    points = {o.axes: ms for o, ms in predictor.measured_ops(table.of_type("op")).items() if o.family() == family}
    at = np.arange(int(cost.low[-1]), int(cost.high[-1]) + 1, dtype=float)[:, None]
    title = f"{chosen}, {table.identity.soc}, {table.identity.runtime} {table.identity.runtime_version}"
    if len(cost.high) == 2:
        inputs = cost.high[0]
        at = np.hstack([np.full_like(at, inputs), at])
        points = {axes: ms for axes, ms in points.items() if axes[0] >= 0.9 * inputs}
        title += f", {inputs:.0f} inputs (points: at least 90% of them)"
    measured = [(axes[-1], float(np.median(ms))) for axes, ms in points.items()]
    save_staircase(out, title, measured, at[:, -1], cost(at))
    return {"file": str(out), "op": chosen, "points": len(measured)}


def _largest(predictor: Predictor, family: OpSpec) -> np.ndarray:
    return predictor.families[family].high[None]


def merge_tables(paths: Sequence[Path], *, out: Path) -> dict[str, Any]:
    """One table of the rows of several of one identity; a row that stands in two of them stands in it once."""
    if out.exists():
        raise UserError(f"{out} is there already: name another --out")
    table = merged([LatencyTable.read(path) for path in paths], out)
    return {"file": str(out), "rows": len(table.rows)}


CSV_COLUMNS = (
    "type", "median_ms", "samples", "op", "in_channels", "out_channels", "height", "width", "kernel", "stride",
    "activation", "context", "macs", "params", "anchor_ms", "padding", "dilation", "groups", "fused_add",
)  # fmt: skip


def export_csv(name: str, *, out: Path) -> dict[str, Any]:
    """Every row of a table as one line of comma-separated values."""
    check_replaceable(out, ",".join(CSV_COLUMNS).encode())
    table = LatencyTable.read(find_table(name))
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="")
    writer.writeheader()
    for row in table.rows:
        line: dict[str, Any] = {
            "type": row.type,
            "median_ms": row.median_ms,
            "samples": len(row.samples_ms),
            "anchor_ms": row.details.get("anchor_ms", ""),
        }
        if row.op is not None:
            op = row.op
            line |= {"op": op.kind, "in_channels": "+".join(map(str, op.in_channels)), "context": row.context}
            plain = ("out_channels", "height", "width", "groups", "activation", "fused_add")
            line |= {name: getattr(op, name) for name in plain}
            line |= {name: _by(getattr(op, name)) for name in ("kernel", "stride", "padding", "dilation")}
        measured = row.op or row.graph
        assert measured is not None
        writer.writerow(line | {"macs": measured.macs, "params": measured.params})
    write_whole(out, text.getvalue().encode())
    return {"file": str(out), "rows": len(table.rows)}
