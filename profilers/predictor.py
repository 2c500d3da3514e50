"""A table's predictions: interpolation inside the measured widths, and an additive calibration to whole networks.

Every operator family gets a smooth cost of non-negative parts (a constant, its memory, its products, the blocks
that runtimes execute channels in, what a width off those blocks costs more), and a Gaussian process over log-widths
for what that leaves. Whole networks of random widths then calibrate it: a scale per class of operator, refined per
family, an offset per operator (a profiler's own overhead is a negative one) and a constant, so a prediction stays a
sum over operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from profilers.errors import TableError
from profilers.ops import OpGraph, OpSpec
from profilers.table import LatencyTable, Measurement

BLOCKS = (8, 16)  #: channels that a kernel handles at once, on the CPUs known so far
ALIGNMENTS = (4, 8, 16)  #: widths off a multiple of these may take another path, reorders of the layout included
_CLASSES = ("spatial", "pointwise", "depthwise", "other")


def anchored_ms(row: Measurement, reference_ms: float | None) -> float:
    """The row's median with the machine's drift divided out: the anchor timed beside it is taken as `reference_ms`."""
    return row.median_ms if reference_ms is None else row.median_ms * reference_ms / row.details["anchor_ms"]


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
    for alignment in ALIGNMENTS:
        for off, sizes in zip((axes % alignment != 0).T, axes.T, strict=True):
            columns += [off, off * sizes]
            if axes.shape[1] == 2:
                columns.append(off * axes.prod(axis=1))
    return np.stack(columns, axis=1)


class FamilyCost:
    """Latency of one operator family over its widths, from measured points."""

    NOISE = 0.02  #: relative, of one measured point
    LENGTH = 0.5  #: of the Gaussian process, in log-width
    ACROSS = 0.2  #: correlation of residuals on and off ALIGNED
    ALIGNED = 8

    def __init__(self, axes: np.ndarray, latency_ms: np.ndarray) -> None:
        """axes: (N, A) widths, A = 1 or 2; latency_ms: (N,)."""
        self.low, self.high = axes.min(axis=0), axes.max(axis=0)
        features = _features(axes)
        self.scale = np.maximum(features.max(axis=0), 1e-12)  # all zero where no width was off a multiple
        weighted = features / self.scale / latency_ms[:, None]
        ridge = 1e-3 * np.eye(features.shape[1])
        self.coefficients, _ = nnls(
            np.vstack([weighted, ridge]), np.concatenate([np.ones(len(axes)), np.zeros(len(ridge))])
        )
        self.points = axes
        residual = latency_ms / self._smooth(axes) - 1
        signal = max(float(np.mean(residual**2)), 1e-6)
        covariance = signal * self._kernel(self.points, self.points) + self.NOISE**2 * np.eye(len(axes))
        self.weights = signal * np.linalg.solve(covariance, residual)

    def _smooth(self, axes: np.ndarray) -> np.ndarray:
        return np.maximum(_features(axes) / self.scale @ self.coefficients, 1e-9)

    def _kernel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Correlation of the residuals at widths (N, A) and (M, A): (N, M)."""
        squared = (np.log(left[:, None, :] / right[None, :, :]) ** 2).sum(axis=2)
        off = left[:, None, :] % self.ALIGNED != 0, right[None, :, :] % self.ALIGNED != 0
        alike = (off[0] == off[1]).all(axis=2)
        return np.exp(-0.5 * squared / self.LENGTH**2) * np.where(alike, 1.0, self.ACROSS)

    def outside(self, axes: np.ndarray) -> np.ndarray:
        """(N,) True where a width lies outside what was measured."""
        return ((axes < self.low) | (axes > self.high)).any(axis=1)

    def __call__(self, axes: np.ndarray) -> np.ndarray:
        """Milliseconds (N,) at widths (N, A)."""
        correction = self._kernel(axes, self.points) @ self.weights
        return self._smooth(axes) * np.clip(1 + correction, 0.5, 2.0)


@dataclass(frozen=True)
class Calibration:
    """scales: per family, positive; offset_ms: per operator; constant_ms: per network; error_pct: 90% of the
    networks that were left out of the fit are predicted within it, None where there was nothing to fit."""

    scales: Mapping[OpSpec, float] = field(default_factory=dict)
    offset_ms: float = 0.0
    constant_ms: float = 0.0
    error_pct: float | None = None


class Predictor:
    """Latencies of operators and networks, from a table alone.

    lower: the network as the runtime of the table executes it.
    """

    NOISE = 0.02  #: relative, of one measured network beside the sum of its parts
    MIN_NETWORKS = 8  #: fewer calibrate nothing

    def __init__(self, table: LatencyTable, lower: Callable[[OpGraph], OpGraph]) -> None:
        self.path = table.path
        self.lower = lower
        anchors: dict[str, list[float]] = {}
        for row in table.rows:
            if "anchor" in row.details:
                anchors.setdefault(row.details["anchor"], []).append(row.details["anchor_ms"])
        self._references = {name: float(np.median(ms)) for name, ms in anchors.items()}
        points: dict[OpSpec, dict[tuple[int, ...], list[float]]] = {}
        for row in table.of_type("op"):
            assert row.op is not None
            points.setdefault(row.op.family(), {}).setdefault(row.op.axes, []).append(self.measured_ms(row))
        self.families = {
            family: FamilyCost(np.array(list(found), float), np.array([np.median(ms) for ms in found.values()]))
            for family, found in points.items()
        }
        self.calibration = Calibration()
        self.calibration = self._calibrated(table.of_type("network") + table.of_type("calibration"))

    @property
    def constant_ms(self) -> float:
        return self.calibration.constant_ms

    @property
    def error_pct(self) -> float | None:
        return self.calibration.error_pct

    def reference_ms(self, anchor: str) -> float | None:
        """Median latency of the network of that digest, timed beside others; None where it never was."""
        return self._references.get(anchor)

    def measured_ms(self, row: Measurement) -> float:
        """The row's median, drift divided out by its anchor."""
        return anchored_ms(row, self._references.get(row.details.get("anchor", "")))

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
        found = self.calibration
        scaled = self._raw_ms(ops) * np.array([found.scales.get(op.family(), 1.0) for op in ops])
        return np.maximum(scaled + found.offset_ms, 0.05 * scaled)

    def predict(self, graph: OpGraph) -> float:
        """Milliseconds of a whole network."""
        return float(self.op_ms(self.lower(graph).ops).sum() + self.constant_ms)

    def _calibrated(self, rows: Sequence[Measurement]) -> Calibration:
        """Ridge regression of relative errors: classes near 1, families near their class, the rest near 0.

        Only networks whose operators were not read while they ran themselves ("calibration" rows) count for the
        error; each is predicted by the fit without it.
        """
        if len(rows) < self.MIN_NETWORKS:
            return Calibration()
        families = list(self.families)
        column = {family: index for index, family in enumerate(families)}
        sums, counts = np.zeros((len(rows), len(families))), np.zeros(len(rows))
        for index, row in enumerate(rows):
            assert row.graph is not None
            ops = self.lower(row.graph).ops
            raw_ms = self._raw_ms(ops)
            np.add.at(sums[index], [column[op.family()] for op in ops], raw_ms)
            counts[index] = len(ops)
        measured = np.array([self.measured_ms(row) for row in rows])
        classes = np.eye(len(_CLASSES))[[_op_class(family) for family in families]]  # (F, classes)
        smallest = float(measured.min())
        design = np.column_stack([sums @ classes, sums, counts, np.ones(len(rows))]) / measured[:, None]
        fixed = 0.3 * smallest
        spread = np.concatenate(
            [np.full(len(_CLASSES), 0.5), np.full(len(families), 0.15), [fixed / counts.max(), fixed]]
        )
        prior = np.zeros(len(spread))
        prior[: len(_CLASSES)] = 1.0
        design = design / self.NOISE
        normal = design.T @ design + np.diag(spread**-2)
        solution = np.linalg.solve(normal, design.T @ np.full(len(rows), 1 / self.NOISE) + prior / spread**2)
        error = (design @ solution * self.NOISE - 1) / (1 - (design * np.linalg.solve(normal, design.T).T).sum(axis=1))
        left_out = [abs(e) for e, row in zip(error, rows, strict=True) if row.type == "calibration"]
        scales = np.maximum(classes @ solution[: len(_CLASSES)] + solution[len(_CLASSES) : -2], 0.1)
        return Calibration(
            {family: float(scale) for family, scale in zip(families, scales, strict=True)},
            float(solution[-2]),
            float(solution[-1]),
            float(np.quantile(left_out, 0.9) * 100) if left_out else None,
        )
