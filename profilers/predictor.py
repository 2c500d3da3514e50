"""A table's predictions: interpolation inside the measured widths, and an additive calibration to whole networks.

Every operator family gets a smooth cost of non-negative parts (a constant, its memory, its products, the blocks
that runtimes execute channels in), and a Gaussian process over log-widths for what that leaves. Whole networks of
random widths then calibrate it: a positive scale per class of operator and a constant, so a prediction stays a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from profilers.errors import TableError
from profilers.ops import OpGraph, OpSpec
from profilers.table import LatencyTable, Measurement

BLOCKS = (8, 16)  #: channels that a kernel handles at once, on the CPUs known so far
_CLASSES = ("spatial", "pointwise", "depthwise", "other")


def anchored_ms(row: Measurement, reference_ms: float) -> float:
    """The row's median with the machine's drift divided out: the anchor timed beside it is taken as `reference_ms`."""
    anchor = row.details.get("anchor_ms")
    return row.median_ms * (reference_ms / anchor if anchor else 1.0)


def _op_class(op: OpSpec) -> int:
    if op.kind == "conv":
        return 1 if op.kernel == (1, 1) else 0
    return 2 if op.kind == "depthwise_conv" else 3


def _features(axes: np.ndarray) -> np.ndarray:
    """Non-negative parts of a cost, (N, F), from widths (N, 1) or (N, 2)."""
    columns = [np.ones(len(axes))]
    padded = [np.ceil(axes / block) * block for block in BLOCKS]
    for sizes in (axes, *padded):
        columns.extend(sizes.T)
        if axes.shape[1] == 2:
            columns.append(sizes.prod(axis=1))
            columns.append(axes[:, 0] * sizes[:, 1])
    return np.stack(columns, axis=1)


class FamilyCost:
    """Latency of one operator family over its widths, from measured points."""

    NOISE = 0.02  #: relative, of one measured point
    LENGTH = 0.5  #: of the Gaussian process, in log-width

    def __init__(self, axes: np.ndarray, latency_ms: np.ndarray) -> None:
        """axes: (N, A) widths, A = 1 or 2; latency_ms: (N,)."""
        self.low, self.high = axes.min(axis=0), axes.max(axis=0)
        features = _features(axes)
        self.scale = features.max(axis=0)
        weighted = features / self.scale / latency_ms[:, None]
        ridge = 1e-3 * np.eye(features.shape[1])
        self.coefficients, _ = nnls(
            np.vstack([weighted, ridge]), np.concatenate([np.ones(len(axes)), np.zeros(len(ridge))])
        )
        self.points = np.log(axes)
        residual = latency_ms / self._smooth(axes) - 1
        signal = max(float(np.mean(residual**2)), 1e-6)
        covariance = signal * self._kernel(self.points, self.points) + self.NOISE**2 * np.eye(len(axes))
        self.weights = signal * np.linalg.solve(covariance, residual)

    def _smooth(self, axes: np.ndarray) -> np.ndarray:
        return np.maximum(_features(axes) / self.scale @ self.coefficients, 1e-9)

    def _kernel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        squared = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=2)
        return np.exp(-0.5 * squared / self.LENGTH**2)

    def outside(self, axes: np.ndarray) -> np.ndarray:
        """(N,) True where a width lies outside what was measured."""
        return ((axes < self.low) | (axes > self.high)).any(axis=1)

    def __call__(self, axes: np.ndarray) -> np.ndarray:
        """Milliseconds (N,) at widths (N, A)."""
        correction = self._kernel(np.log(axes), self.points) @ self.weights
        return self._smooth(axes) * np.clip(1 + correction, 0.5, 2.0)


@dataclass(frozen=True)
class Calibration:
    """scales: per operator class, positive; constant_ms: per network; error_pct: 90% of networks that were left
    out of the fit are predicted within it."""

    scales: tuple[float, ...] = (1.0,) * len(_CLASSES)
    constant_ms: float = 0.0
    error_pct: float | None = None


class Predictor:
    """Latencies of operators and networks, from a table alone.

    lower: the network as the runtime of the table executes it.
    """

    def __init__(self, table: LatencyTable, lower: Callable[[OpGraph], OpGraph]) -> None:
        self.path = table.path
        self.lower = lower
        anchors = [row.details["anchor_ms"] for row in table.rows if "anchor_ms" in row.details]
        self.reference_ms = float(np.median(anchors)) if anchors else 1.0
        points: dict[OpSpec, dict[tuple[int, ...], list[float]]] = {}
        for row in table.of_type("op"):
            assert row.op is not None
            at = points.setdefault(row.op.family(), {}).setdefault(row.op.axes, [])
            at.append(anchored_ms(row, self.reference_ms))
        self.families = {
            family: FamilyCost(np.array(list(found), float), np.array([np.median(ms) for ms in found.values()]))
            for family, found in points.items()
        }
        self.calibration = Calibration()
        self.calibration = self._calibrated(table.of_type("calibration"))

    @property
    def constant_ms(self) -> float:
        return self.calibration.constant_ms

    @property
    def error_pct(self) -> float | None:
        return self.calibration.error_pct

    def _raw_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        by_family: dict[OpSpec, list[int]] = {}
        for index, op in enumerate(ops):
            by_family.setdefault(op.family(), []).append(index)
        result = np.empty(len(ops))
        for family, members in by_family.items():
            cost = self.families.get(family)
            axes = np.array([ops[index].axes for index in members], float)
            missing = members if cost is None else [members[i] for i in np.nonzero(cost.outside(axes))[0]]
            if cost is None or missing:
                raise TableError(
                    f"{self.path} has no measurement for {ops[missing[0]]}: measure it with 'amc-hw profile'"
                )
            result[members] = cost(axes)
        return result

    def op_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        """Calibrated milliseconds of lowered operators, (N,). TableError where one was not measured."""
        scales = np.array(self.calibration.scales)
        return self._raw_ms(ops) * scales[[_op_class(op) for op in ops]]

    def predict(self, graph: OpGraph) -> float:
        """Milliseconds of a whole network."""
        return float(self.op_ms(self.lower(graph).ops).sum() + self.constant_ms)

    def _calibrated(self, rows: Sequence[Measurement]) -> Calibration:
        if len(rows) < 2 * len(_CLASSES):
            return Calibration()
        sums = np.zeros((len(rows), len(_CLASSES) + 1))
        for index, row in enumerate(rows):
            assert row.graph is not None
            ops = self.lower(row.graph).ops
            np.add.at(sums[index], [_op_class(op) for op in ops], self._raw_ms(ops))
        measured = np.array([anchored_ms(row, self.reference_ms) for row in rows])
        sums[:, -1] = measured.min()
        left_out = []
        for index in range(len(rows)):
            others = np.arange(len(rows)) != index
            left_out.append(sums[index] @ _scales(sums[others], measured[others]) / measured[index] - 1)
        scales = _scales(sums, measured)
        error = float(np.quantile(np.abs(left_out), 0.9) * 100)
        return Calibration(tuple(float(s) for s in scales[:-1]), float(scales[-1] * measured.min()), error)


def _scales(sums: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Positive scales near 1 and a constant near 0 that minimise the relative error."""
    prior = np.ones(sums.shape[1])
    prior[-1] = 0.0
    stiffness = 0.05 * np.sqrt(len(measured))
    design = np.vstack([sums / measured[:, None], stiffness * np.eye(len(prior))])
    scales, _ = nnls(design, np.concatenate([np.ones(len(measured)), stiffness * prior]))
    return np.maximum(scales, np.where(prior > 0, 1e-3, 0.0))
