"""Pictures of measurements, as SVG or PNG by the file's name."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw.errors import UserError
from profilers.files import write_whole


def check_picture(path: Path) -> None:
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path}: a picture's name ends in .svg or .png")


def _axes(path: Path) -> tuple[Any, Any]:
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "amc-hw"  # the same picture is the same file
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    write_whole(path, data.getvalue())


def save_staircase(
    path: Path, title: str, measured: Sequence[tuple[int, float]], widths: np.ndarray, predicted_ms: np.ndarray
) -> None:
    """Latency against width: measured (width, ms) as points, what is predicted at every width as a line."""
    figure, axes = _axes(path)
    axes.plot(widths, predicted_ms, drawstyle="steps-mid", linewidth=1, label="predicted")
    axes.plot(*zip(*measured, strict=True), "o", markersize=3, label="measured")
    axes.set(xlabel="channels", ylabel="ms", ylim=(0, None))
    axes.set_title(title, fontsize=8)
    axes.legend()
    _save(figure, path)


def save_pareto(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy against latency of every row that was measured; one mark per method, hollow for FLOPs budgets."""
    figure, axes = _axes(path)
    measured = [row for row in rows if row["measured_ms"] is not None and row["accuracy"] is not None]
    marks = itertools.cycle("os^vDPX*<>")
    for method, mark in zip(dict.fromkeys(row["method"] for row in measured), marks, strict=False):
        colour = axes.plot([], [], mark, label=method)[0].get_color()
        for row in (row for row in measured if row["method"] == method):
            face = "none" if row["budget"].startswith("flops") else colour
            axes.plot(row["measured_ms"], row["accuracy"], mark, color=colour, markerfacecolor=face)
    axes.set(xlabel="measured ms", ylabel="accuracy")
    axes.set_title(f"{title} (hollow: FLOPs budgets)", fontsize=8)
    if measured:
        axes.legend(fontsize=7)
    _save(figure, path)


def save_predictions(path: Path, title: str, samples: Sequence[dict[str, Any]]) -> None:
    """Predicted against measured latency of whole networks, with the lines of 5 and 10 percent."""
    figure, axes = _axes(path)
    measured = np.array([sample["measured_ms"] for sample in samples])
    predicted = np.array([sample["predicted_ms"] for sample in samples])
    line = np.array([0.0, 1.05 * max(measured.max(), predicted.max())])
    for error, style in ((0.0, "-"), (0.05, "--"), (0.1, ":")):
        for sign in (1, -1) if error else (1,):
            axes.plot(line, line * (1 + sign * error), style, color="grey", linewidth=0.8)
    axes.plot(measured, predicted, "o", markersize=4)
    axes.set(xlabel="measured ms", ylabel="predicted ms", xlim=line, ylim=line)
    axes.set_title(f"{title} (dashed 5%, dotted 10%)", fontsize=8)
    _save(figure, path)
