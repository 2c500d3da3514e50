"""Pictures of measurements: files, SVG or PNG by their name, or the bytes of an SVG."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amc_hw.errors import UserError
from profilers.files import check_replaceable, write_whole

CREATOR = "amc-hw"  #: of a picture, in its metadata
MARKS = {".svg": f"<dc:title>{CREATOR}</dc:title>", ".png": f"Software\0{CREATOR}"}  #: how that looks there
TITLE = 88  #: letters of a line


def check_picture(path: Path) -> None:
    """UserError where a picture cannot be written there."""
    if path.suffix not in MARKS:
        raise UserError(f"{path}: a picture's name ends in {' or '.join(MARKS)}")
    check_replaceable(path, MARKS[path.suffix].encode())


def _axes(*, size: tuple[float, float] = (6.4, 4.4), rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "amc-hw"  # the same picture is the same file
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


def _drawn(figure: Any, kind: str = "svg") -> bytes:
    data = io.BytesIO()
    told = {"Creator": CREATOR, "Date": None} if kind == "svg" else {"Software": CREATOR}
    figure.savefig(data, format=kind, dpi=150, metadata=told)
    return data.getvalue()


def _save(figure: Any, path: Path) -> None:
    write_whole(path, _drawn(figure, path.suffix[1:]))


def save_staircase(
    path: Path, title: str, measured: Sequence[tuple[int, float]], widths: np.ndarray, predicted_ms: np.ndarray
) -> None:
    """Latency against width: measured (width, ms) as points, what is predicted at every width as a line."""
    check_picture(path)
    figure, axes = _axes()
    _staircase(axes, measured, widths, predicted_ms)
    _title(axes, title)
    axes.legend()
    _save(figure, path)


def _title(axes: Any, title: str) -> None:
    axes.set_title(textwrap.fill(title, TITLE), fontsize=8)


def _staircase(axes: Any, measured: Sequence[tuple[int, float]], widths: np.ndarray, predicted_ms: np.ndarray) -> None:
    axes.plot(widths, predicted_ms, drawstyle="steps-mid", linewidth=1, label="predicted")
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", markersize=3, label="measured")
    highest = max([float(predicted_ms.max()), *(ms for _, ms in measured)])
    axes.set(xlabel="channels", ylabel="ms", ylim=(0, 1.1 * highest))


def save_pareto(path: Path, title: str, rows: Sequence[dict[str, Any]], *, score: str) -> None:
    """Score, by its name, against latency of every row that was measured; one mark per method, hollow for FLOPs
    budgets."""
    _save(_pareto(title, rows, score), path)


def pareto(title: str, rows: Sequence[dict[str, Any]], *, score: str) -> bytes:
    """As `save_pareto` draws it."""
    return _drawn(_pareto(title, rows, score))


def _pareto(title: str, rows: Sequence[dict[str, Any]], score: str) -> Any:
    figure, axes = _axes()
    measured = [row for row in rows if row["measured_ms"] is not None and row["accuracy"] is not None]
    marks = itertools.cycle("os^vDPX*<>")
    for method, mark in zip(dict.fromkeys(row["method"] for row in measured), marks, strict=False):
        colour = axes.plot([], [], mark, label=method)[0].get_color()
        for row in (row for row in measured if row["method"] == method):
            face = "none" if row["budget"].startswith("flops") else colour
            axes.plot(row["measured_ms"], row["accuracy"], mark, color=colour, markerfacecolor=face)
    axes.set(xlabel="measured ms", ylabel=score)
    _title(axes, f"{title} (hollow: FLOPs budgets)")
    if measured:
        axes.legend(fontsize=7)
    return figure


class Lost(NamedTuple):
    """budget: for which a policy was found. points: of accuracy, of 100."""

    budget: float
    speedup: float
    points: float


def save_losses(path: Path, panels: Mapping[str, Mapping[str, Sequence[Lost]]]) -> None:
    """Points of accuracy lost against the speed-up; a panel by its title, in it by name the policies of several
    budgets: the mean of every budget's, and single ones as dots."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    check_picture(path)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = _axes(size=(3.4 * columns, 2.8 * rows), rows=rows, columns=columns, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for (name, found), colour in zip(lines.items(), ("#c2410c", "#8a94a6", "#2f6fde"), strict=True):
            axes.plot([one.speedup for one in found], [one.points for one in found], ".", color=colour, alpha=0.4)
            budgets = sorted({one.budget for one in found})
            means = [np.mean([one[1:] for one in found if one.budget == budget], axis=0) for budget in budgets]
            axes.plot(*np.transpose(means), "o-", color=colour, markersize=4, linewidth=1.5, label=name)
        axes.set(yscale="log", xlabel="measured speed-up", ylabel="points of accuracy lost")
        axes.set_title(title, fontsize=8)
        axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda points, _: f"{points:g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}x"))
        axes.invert_yaxis()
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3)
    _save(figure, path)


def save_predictions(path: Path, title: str, samples: Sequence[dict[str, Any]]) -> None:
    """Predicted against measured latency of whole networks, with the lines of 5 and 10 percent."""
    _save(_predictions(title, samples), path)


def predictions(title: str, samples: Sequence[dict[str, Any]]) -> bytes:
    """As `save_predictions` draws it."""
    return _drawn(_predictions(title, samples))


def _predictions(title: str, samples: Sequence[dict[str, Any]]) -> Any:
    figure, axes = _axes()
    measured = np.array([sample["measured_ms"] for sample in samples])
    predicted = np.array([sample["predicted_ms"] for sample in samples])
    line = np.array([0.0, 1.05 * max(measured.max(), predicted.max())])
    for error, style in ((0.0, "-"), (0.05, "--"), (0.1, ":")):
        for sign in (1, -1) if error else (1,):
            axes.plot(line, line * (1 + sign * error), style, color="grey", linewidth=0.8)
    axes.plot(measured, predicted, "o", markersize=4)
    axes.set(xlabel="measured ms", ylabel="predicted ms", xlim=line, ylim=line)
    _title(axes, f"{title} (dashed 5%, dotted 10%)".strip())
    return figure


def kept_channels(names: Sequence[str], full: Sequence[int], kept: Sequence[int]) -> bytes:
    """Bars of all channels and of those kept, per group, in order (AMC, figure 3)."""
    return _bars(names, {"all": full, "kept": kept}, xlabel="group", ylabel="channels")


def layer_latency(names: Sequence[str], before_ms: Sequence[float], after_ms: Sequence[float]) -> bytes:
    """Bars of milliseconds per operator, unpruned and pruned."""
    return _bars(names, {"unpruned": before_ms, "pruned": after_ms}, xlabel="operator", ylabel="predicted ms")


def _bars(names: Sequence[str], heights: dict[str, Sequence[float]], *, xlabel: str, ylabel: str) -> bytes:
    """Two bars for every name, the second in front; names below them, where there is room."""
    figure, axes = _axes(size=(max(6.4, 0.14 * len(names)), 3.6))
    for (label, values), colour in zip(heights.items(), ("#d5dae3", "#2f6fde"), strict=True):
        axes.bar(np.arange(len(names)), values, color=colour, label=label)
    axes.set(ylabel=ylabel, xlabel=xlabel, xlim=(-0.7, len(names) - 0.3))
    if len(names) <= 32:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.legend(fontsize=7)
    return _drawn(figure)


def chosen_on_staircase(
    measured: Sequence[tuple[int, float]], widths: np.ndarray, predicted_ms: np.ndarray, chosen: tuple[int, float]
) -> bytes:
    """As `save_staircase`, with the (width, ms) that was chosen."""
    figure, axes = _axes(size=(6.4, 3.0))
    _staircase(axes, measured, widths, predicted_ms)
    axes.plot(*chosen, "*", markersize=12, color="#c2410c", label="chosen")
    axes.legend(fontsize=7)
    return _drawn(figure)


def tried_policies(points: Sequence[tuple[float, float]], chosen_ms: float) -> bytes:
    """Score against predicted latency of every policy tried, the best up to each latency, and the one chosen."""
    figure, axes = _axes(size=(6.4, 3.4))
    ordered = sorted(points)
    axes.plot(*zip(*ordered, strict=True), ".", markersize=4, color="#8a94a6", label="tried")
    best = np.maximum.accumulate([score for _, score in ordered])
    axes.step([cost for cost, _ in ordered], best, where="post", linewidth=1, label="best up to here")
    axes.axvline(chosen_ms, color="#c2410c", linewidth=1, label="chosen")
    axes.set(xlabel="predicted ms", ylabel="held-out score")
    axes.legend(fontsize=7)
    return _drawn(figure)


def learning_curve(scores: Sequence[float], within: Sequence[bool]) -> bytes:
    """Score of every episode in order, and the best so far of those within the budget."""
    figure, axes = _axes(size=(6.4, 3.0))
    axes.plot(scores, ".", markersize=3, color="#8a94a6", label="episode")
    best = np.maximum.accumulate(np.where(within, scores, -np.inf))
    axes.plot(np.where(np.isfinite(best), best, np.nan), linewidth=1, label="best so far")
    axes.set(xlabel="episode", ylabel="held-out score")
    axes.legend(fontsize=7)
    return _drawn(figure)
