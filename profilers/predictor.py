"""A table's predictions: interpolation inside the measured widths, and an additive calibration to whole networks.

Every operator family gets a smooth cost of non-negative parts (a constant, its memory, its products, the blocks
that runtimes execute channels in, what a width off those blocks costs more), and a Gaussian process over log-widths
for what that leaves. A family of which few widths were measured takes its smooth cost from all operators of its class
instead, scaled. Whole networks of random widths then calibrate it: a scale per class of operator, refined per
family, what operators of a class leave in common, an offset per operator (a profiler's own overhead is a negative
one) and a constant, so a prediction stays a sum over operators.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import linalg
from scipy.optimize import nnls

from profilers.errors import TableError
from profilers.ops import OpGraph, OpSpec
from profilers.table import LatencyTable, Measurement

BLOCKS = (8, 16, 32, 64, 128)  #: channels that a kernel handles at once, on CPUs and GPUs
ALIGNMENTS = (4, 8, 16)  #: widths off a multiple of these may take another path, reorders of the layout included
USUAL_NOISE = 0.02  #: relative, of one measured point, where repetitions do not say less
MIN_REPEATS = 30
RESOLUTION_MS = 2e-4  #: what is measured finer than this says nothing
_CLASSES = ("spatial", "pointwise", "depthwise", "other")


def anchored_ms(row: Measurement, reference_ms: float | None) -> float:
    """The row's median with the machine's drift divided out: the anchor timed beside it is taken as `reference_ms`."""
    return row.median_ms if reference_ms is None else row.median_ms * reference_ms / row.details["anchor_ms"]


def _whole(row: Measurement) -> bool:
    """False for a network that a delegate ran only a part of: its latency is that of no one runtime."""
    return not row.details.get("partial", False)


def _op_class(op: OpSpec) -> int:
    if op.kind in ("conv", "grouped_conv") or (op.kind == "linear" and op.tokens):
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


def _relative_fit(features: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (F,) of features (N, F), least squares of relative errors."""
    scale = np.maximum(features.max(axis=0), 1e-12)  # all zero where no width was off a multiple
    weight = 1 / (latency_ms + RESOLUTION_MS)
    ridge = 1e-3 * np.eye(features.shape[1])
    rows = np.vstack([features / scale * weight[:, None], ridge])
    solution, _ = nnls(rows, np.concatenate([latency_ms * weight, np.zeros(len(ridge))]))
    return solution / scale


def _op_features(op: OpSpec) -> tuple[float, ...]:
    """What an operator costs by, whatever its family: products, values read and written, weights."""
    read = sum(op.in_channels) * op.height * op.width
    written = op.out_channels * op.out_height * op.out_width
    return 1.0, float(op.macs), float(read), float(written), float(op.params)


def _network_features(op: OpSpec) -> np.ndarray:
    """As `_op_features`, and what operators off the blocks of channels cost more."""
    parts = list(_op_features(op))
    for block in BLOCKS:
        parts.append(op.macs * (-(-op.out_channels // block) * block / op.out_channels - 1))
        parts.append(op.out_channels * op.out_height * op.out_width * any(width % block for width in op.axes))
    return np.array(parts, float)


def _parts(ops: Sequence[OpSpec]) -> np.ndarray:
    """What every operator is made of, (N, classes * parts): `_network_features` in the columns of its class."""
    features = np.array([_network_features(op) for op in ops])
    found = np.zeros((len(ops), len(_CLASSES), features.shape[1]))
    found[np.arange(len(ops)), [_op_class(op) for op in ops]] = features
    return found.reshape(len(ops), -1)


class ClassCost:
    """Latency of all the operators of one class, whatever their sizes; rough, and good for ratios."""

    def __init__(self, ops: Sequence[OpSpec], latency_ms: np.ndarray) -> None:
        self._coefficients = _relative_fit(np.array([_op_features(op) for op in ops]), latency_ms)

    def __call__(self, ops: Sequence[OpSpec]) -> np.ndarray:
        """Milliseconds, (N,), positive."""
        return np.maximum(np.array([_op_features(op) for op in ops]) @ self._coefficients, 1e-9)


class FamilyCost:
    """Latency of one operator family over its widths, from measured points."""

    LENGTHS = (0.5, 0.05)  #: of the Gaussian process, in log-width: bends, and steps
    ROUGH = 0.2  #: share of the steps
    ACROSS = 0.2  #: correlation of residuals on and off ALIGNED
    ALIGNED = 8

    def __init__(
        self,
        axes: np.ndarray,
        latency_ms: np.ndarray,
        noise: np.ndarray | float = 0.02,
        *,
        rough: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """axes: (N, A) widths, A = 1 or 2; latency_ms: (N,); noise: relative standard deviation of each, (N,).

        rough: milliseconds (M,) at widths (M, A), right but for a factor, where the points are too few for a smooth
        cost of their own.
        """
        self.low, self.high = axes.min(axis=0), axes.max(axis=0)
        self.points = axes
        if rough is None:
            coefficients = _relative_fit(_features(axes), latency_ms)
            self._smooth_ms = lambda at: _features(at) @ coefficients
        else:
            factor = float(np.exp(np.mean(np.log(latency_ms / rough(axes)))))
            self._smooth_ms = lambda at: factor * rough(at)
        residual = latency_ms / self._smooth(axes) - 1
        self.signal = max(float(np.mean(residual**2)), 1e-6)
        covariance = self.signal * self._kernel(self.points, self.points)
        covariance += np.diag(np.broadcast_to(np.square(noise), len(axes)))
        self.factor = linalg.cho_factor(covariance)
        self.weights = self.signal * linalg.cho_solve(self.factor, residual)

    def _smooth(self, axes: np.ndarray) -> np.ndarray:
        return np.maximum(self._smooth_ms(axes), 1e-9)

    def _kernel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Correlation of the residuals at widths (N, A) and (M, A): (N, M)."""
        squared = (np.log(left[:, None, :] / right[None, :, :]) ** 2).sum(axis=2)
        off = left[:, None, :] % self.ALIGNED != 0, right[None, :, :] % self.ALIGNED != 0
        alike = (off[0] == off[1]).all(axis=2)
        smooth, rough = (np.exp(-0.5 * squared / length**2) for length in self.LENGTHS)
        return ((1 - self.ROUGH) * smooth + self.ROUGH * rough) * np.where(alike, 1.0, self.ACROSS)

    def widened(self, other: FamilyCost) -> FamilyCost:
        """The same, and what another knows outside of what was measured."""
        more = other.points[self.outside(other.points)]
        return FamilyCost(np.vstack([self.points, more]), np.concatenate([self(self.points), other(more)]))

    def outside(self, axes: np.ndarray) -> np.ndarray:
        """(N,) True where a width lies outside what was measured."""
        return ((axes < self.low) | (axes > self.high)).any(axis=1)

    def deviation_ms(self, axes: np.ndarray) -> np.ndarray:
        """Standard deviation (N,) of the prediction at widths (N, A): large far from the points of a family that is
        not smooth."""
        beside = self.signal * self._kernel(axes, self.points)
        explained = (beside * linalg.cho_solve(self.factor, beside.T).T).sum(axis=1)
        return self._smooth(axes) * np.sqrt(np.maximum(self.signal - explained, 0.0))

    def __call__(self, axes: np.ndarray) -> np.ndarray:
        """Milliseconds (N,) at widths (N, A)."""
        correction = self._kernel(axes, self.points) @ self.weights
        return self._smooth(axes) * np.clip(1 + correction, 0.5, 2.0)


def _repeatability(measured: Sequence[Sequence[float]]) -> float:
    """Relative standard deviation of one measurement, from operators that were measured more than once."""
    repeated = [np.array(samples) for samples in measured if len(samples) > 1]
    weights = np.array(
        [float(each.mean()) for each in repeated]
    )  # by what they take: short ones are at the clock's limit
    freedom = np.array([len(each) - 1 for each in repeated])
    if freedom.sum() < MIN_REPEATS:
        return USUAL_NOISE
    squares = np.array([float(((each / each.mean() - 1) ** 2).sum()) for each in repeated])
    return float(np.clip(np.sqrt((weights * squares).sum() / (weights * freedom).sum()), 0.005, USUAL_NOISE))


def _rough_ms(cost: ClassCost, family: OpSpec, axes: np.ndarray) -> np.ndarray:
    return cost([family.with_axes(int(width) for width in row) for row in axes])


def _summed_ms(coefficients: np.ndarray, family: OpSpec, axes: np.ndarray) -> np.ndarray:
    features = [_network_features(family.with_axes(int(width) for width in row)) for row in axes]
    return np.maximum(np.array(features) @ coefficients, 1e-9)


def _range(cost: FamilyCost) -> str:
    return " by ".join(f"{low:.0f} to {high:.0f}" for low, high in zip(cost.low, cost.high, strict=True))


@dataclass(frozen=True)
class Calibration:
    """scales: per family, positive; parts_ms: per class and part of `_network_features`; offset_ms: per operator;
    constant_ms: per network; error_pct: 90% of the networks that were left out of the fit are predicted within it,
    None where there was nothing to fit; left_out_pct: their errors, by the digest of the unpruned network."""

    scales: Mapping[OpSpec, float] = field(default_factory=dict)
    parts_ms: tuple[float, ...] = ()
    offset_ms: float = 0.0
    constant_ms: float = 0.0
    error_pct: float | None = None
    left_out_pct: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def with_errors(self, left_out_pct: Mapping[str, Sequence[float]]) -> Calibration:
        errors = [error for each in left_out_pct.values() for error in each]
        return replace(self, error_pct=_most(errors) if errors else None, left_out_pct=left_out_pct)


def _most(errors: Sequence[float]) -> float:
    """That 90% do not exceed."""
    return float(np.quantile(errors, 0.9))


def _calibrated_ms(ops: Sequence[OpSpec], raw_ms: np.ndarray, found: Calibration) -> np.ndarray:
    """Milliseconds of operators, (N,), none of them free, from what they take before calibration."""
    scaled = raw_ms * np.array([found.scales.get(op.family(), 1.0) for op in ops])
    more = _parts(ops) @ np.array(found.parts_ms) if found.parts_ms else 0.0
    return np.maximum(scaled + more + found.offset_ms, 0.05 * scaled)


class _Known(NamedTuple):
    """A network that was timed, its lowered operators, and their milliseconds before calibration."""

    row: Measurement
    ops: Sequence[OpSpec]
    raw_ms: np.ndarray


class Predictor:
    """Latencies of operators and networks, from a table alone.

    lower: the network as the runtime of the table executes it. extrapolate: whether widths outside of those measured
    are predicted, too. away: whether the device is not here to measure what the table lacks.
    """

    NOISE = 0.02  #: relative, of one measured network beside the sum of its parts
    PART = 0.01  #: relative, of a network's latency
    LOWEST = 0.1  #: scale of a family
    MIN_NETWORKS = 8  #: fewer calibrate nothing
    FEW = 8  #: points of a family; with fewer it leans on its class
    FOLDS = 5  #: of the calibration networks, where operators were not measured but follow from them

    def __init__(
        self,
        table: LatencyTable,
        lower: Callable[[OpGraph], OpGraph],
        *,
        extrapolate: bool = False,
        away: bool = False,
        _folds: int = FOLDS,
    ) -> None:
        self.path, self.identity = table.path, table.identity
        self.lower = lower
        self.extrapolate, self.away = extrapolate, away
        anchors: dict[str, list[float]] = {}
        for row in table.rows:
            if "anchor" in row.details:
                anchors.setdefault(row.details["anchor"], []).append(row.details["anchor_ms"])
        self._references = {name: float(np.median(ms)) for name, ms in anchors.items()}
        self.calibration = Calibration()
        networks = [row for row in table.rows if row.type in ("network", "calibration") and _whole(row)]
        self.families = self._fitted(table.of_type("op"))
        regressed = self._regressed(networks)
        self.families |= regressed
        known = list(self._known(networks))
        if _folds and len(known) < len(networks):
            count = len(networks) - len(known)
            warnings.warn(f"{self.path}: {count} networks calibrate nothing: it lacks their operators", stacklevel=2)
        if len(known) >= self.MIN_NETWORKS:
            self.calibration = self._calibrated(known)
            if _folds and regressed:
                self.calibration = self.calibration.with_errors(self._held_out_pct(table, _folds))
        if known and self.calibration.error_pct is None:
            self.calibration = replace(self.calibration, error_pct=self._left_out_pct(table))

    @property
    def constant_ms(self) -> float:
        return self.calibration.constant_ms

    @property
    def error_pct(self) -> float | None:
        return self.calibration.error_pct

    def error_pct_of(self, anchor: str) -> float | None:
        """As `error_pct`, of the pruned networks of one unpruned one alone, given by its digest; None where none of
        them calibrated."""
        errors = self.calibration.left_out_pct.get(anchor)
        return _most(errors) if errors else None

    def stated_error_pct(self, anchor: str) -> float | None:
        """What is known of the error for the pruned networks of an unpruned one: their own, as a table may know one
        network far better than another, else that of all."""
        own = self.error_pct_of(anchor)
        return self.error_pct if own is None else own

    def measured_ms(self, row: Measurement) -> float:
        """The row's median, drift divided out by its anchor."""
        return anchored_ms(row, self._references.get(row.details.get("anchor", "")))

    def measured_ops(self, rows: Sequence[Measurement]) -> dict[OpSpec, list[float]]:
        """Milliseconds of every `op` row, by operator."""
        measured: dict[OpSpec, list[float]] = {}
        for row in rows:
            assert row.op is not None
            measured.setdefault(row.op, []).append(self.measured_ms(row))
        return measured

    def _fitted(self, rows: Sequence[Measurement]) -> dict[OpSpec, FamilyCost]:
        measured = self.measured_ops(rows)
        median_ms = {op: float(np.median(samples)) for op, samples in measured.items()}
        noise = _repeatability(list(measured.values()))
        families: dict[OpSpec, list[OpSpec]] = {}
        classes: dict[int, list[OpSpec]] = {}
        for op in measured:
            families.setdefault(op.family(), []).append(op)
            classes.setdefault(_op_class(op), []).append(op)
        rough = {number: ClassCost(ops, np.array([median_ms[op] for op in ops])) for number, ops in classes.items()}
        costs = {}
        for family, ops in families.items():
            axes = np.array([op.axes for op in ops], float)
            latency_ms = np.array([median_ms[op] for op in ops])
            each = noise / np.sqrt([len(measured[op]) for op in ops])
            few = len(ops) < self.FEW
            alike = partial(_rough_ms, rough[_op_class(family)], family) if few else None
            costs[family] = FamilyCost(axes, latency_ms, each, rough=alike)
        return costs

    def _regressed(self, rows: Sequence[Measurement]) -> dict[OpSpec, FamilyCost]:
        """Costs of the families of which no operator was measured, or none at the widths of whole networks, as these
        tell them: every class has one set of non-negative coefficients, fitted to sums over the networks that have such
        families. Beside measured operators a family counts that as many networks have as calibrate at least."""

        def lacking(ops: Sequence[OpSpec]) -> set[OpSpec]:
            return {
                ops[members[0]].family()
                for cost, members, axes in self._by_family(ops)
                if cost is None or cost.outside(axes).any()
            }

        lowered = [(row, self.lower(row.graph).ops) for row in rows if row.graph is not None]
        having = [(row, ops, families) for row, ops in lowered if (families := lacking(ops))]
        distinct = {tuple(ops): families for _, ops, families in having}
        counts = Counter(family for families in distinct.values() for family in families)
        wanted = {family for family, count in counts.items() if not self.families or count >= self.MIN_NETWORKS}
        if not wanted:
            return {}
        members: dict[OpSpec, dict[OpSpec, None]] = {}
        for op in (op for _, ops, _ in having for op in ops if op.family() in wanted):
            members.setdefault(op.family(), {})[op] = None
        sums = np.array([_parts(ops).sum(axis=0) for _, ops, _ in having])
        measured = np.array([self.measured_ms(row) for row, *_ in having])
        coefficients = _relative_fit(sums, measured).reshape(len(_CLASSES), -1)
        costs = {}
        for family, each in members.items():
            alike = partial(_summed_ms, coefficients[_op_class(family)], family)
            axes = np.array([op.axes for op in each], float)
            cost = FamilyCost(axes, alike(axes), rough=alike)
            costs[family] = self.families[family].widened(cost) if family in self.families else cost
        return costs

    def _held_out_pct(self, table: LatencyTable, folds: int) -> dict[str, list[float]]:
        """Errors in percent of the calibration networks, by the digest of the unpruned one, each predicted by a table
        without its part of them: costs of operators were fitted to these networks, too."""
        rows = [row for row in table.of_type("calibration") if _whole(row)]
        errors: dict[str, list[float]] = {}
        for fold in range(folds):
            out = rows[fold::folds]
            kept = [row for row in table.rows if not any(row is each for each in out)]
            others = LatencyTable(table.path, table.identity, {}, kept)
            predictor = Predictor(others, self.lower, extrapolate=True, _folds=0)
            for row in out:
                assert row.graph is not None
                try:
                    predicted = predictor.predict(row.graph)
                except TableError:  # a network of which the others know nothing
                    continue
                error = 100 * abs(predicted / self.measured_ms(row) - 1)
                errors.setdefault(row.details.get("anchor", ""), []).append(error)
        return errors

    def _left_out_pct(self, table: LatencyTable) -> float | None:
        """Largest error in percent over the networks of the table, each predicted from operators that were read in the
        others; None where rows do not say which network they were read in, or the others do not tell."""
        networks, ops = [row for row in table.of_type("network") if _whole(row)], table.of_type("op")
        if any("digest" not in row.details for row in (*networks, *ops)):
            return None
        errors = []
        for network in networks:
            assert network.graph is not None
            rows = [row for row in ops if row.details["digest"] != network.details["digest"]]
            others = LatencyTable(table.path, table.identity, {}, rows)
            try:
                predicted = Predictor(others, self.lower, extrapolate=self.extrapolate).predict(network.graph)
            except TableError:
                return None
            errors.append(abs(predicted / self.measured_ms(network) - 1))
        return 100 * max(errors) if errors else None

    def _by_family(self, ops: Sequence[OpSpec]) -> Iterator[tuple[FamilyCost | None, list[int], np.ndarray]]:
        """Of every family among `ops`: its cost, None where it was never measured; the indices of its members; their
        widths (N, A)."""
        by_family: dict[OpSpec, list[int]] = {}
        for index, op in enumerate(ops):
            by_family.setdefault(op.family(), []).append(index)
        for family, members in by_family.items():
            yield self.families.get(family), members, np.array([ops[index].axes for index in members], float)

    def _raw_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        result = np.empty(len(ops))
        for cost, members, axes in self._by_family(ops):
            if cost is None:
                op, how = ops[members[0]], self._remedy("'amc-hw profile' of this --model and --input")
                raise TableError(f"{self.path} has no measurement for {op}{self._near(op.family())}: {how}")
            outside = cost.outside(axes)
            if outside.any() and not self.extrapolate:
                op = ops[members[int(outside.argmax())]]
                how = self._remedy("'amc-hw profile' and this --model, --input and --floor")
                raise TableError(
                    f"{op} lies outside of the widths that {self.path} holds for it ({_range(cost)}): {how}"
                )
            result[members] = cost(axes)
        return result

    def _near(self, family: OpSpec) -> str:
        """What the table has in place of a family that it lacks, where only the activation differs."""
        others = [each for each in self.families if each.kind == family.kind != "activation"]
        activations = [each.activation for each in others if replace(each, activation=family.activation) == family]
        return f" (it has that with activation {', '.join(sorted(activations))})" if activations else ""

    def _remedy(self, how: str) -> str:
        return "the device is not here to measure it" if self.away else f"measure it with {how}"

    def deviation_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        """Standard deviation of each lowered operator's milliseconds, (N,), by what was measured around it; infinite
        where it lies outside."""
        result = np.full(len(ops), np.inf)
        for cost, members, axes in self._by_family(ops):
            if cost is not None:
                result[members] = np.where(cost.outside(axes), np.inf, cost.deviation_ms(axes))
        return result

    def op_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        """Calibrated milliseconds of lowered operators, (N,). TableError where one was not measured."""
        return _calibrated_ms(ops, self._raw_ms(ops), self.calibration)

    def predict(self, graph: OpGraph) -> float:
        """Milliseconds of a whole network."""
        return float(self.op_ms(self.lower(graph).ops).sum() + self.constant_ms)

    def _known(self, rows: Sequence[Measurement]) -> Iterator[_Known]:
        """The networks all of whose operators can be predicted."""
        for row in rows:
            assert row.graph is not None
            ops = self.lower(row.graph).ops
            try:
                yield _Known(row, ops, self._raw_ms(ops))
            except TableError:
                continue

    def _calibrated(self, networks: Sequence[_Known]) -> Calibration:
        """Ridge regression of relative errors: classes near 1, families near their class, the rest near 0.

        What operators leave in common, by their class (the layout that they hand on, memory that they evict), is taken
        up by parts per class, each of which may move a network by about `PART`.
        Only networks whose operators were not read while they ran themselves ("calibration" rows) count for the
        error; each is predicted by the fit without it (see `_held_out_pct` where that fit is not all there is).
        """
        families, rows = list(self.families), [network.row for network in networks]
        column = {family: index for index, family in enumerate(families)}
        sums = np.zeros((len(rows), len(families)))
        for total, network in zip(sums, networks, strict=True):
            np.add.at(total, [column[op.family()] for op in network.ops], network.raw_ms)
        counts = np.array([float(len(network.ops)) for network in networks])
        parts = np.array([_parts(network.ops).sum(axis=0) for network in networks])
        measured = np.array([self.measured_ms(row) for row in rows])
        classes = np.eye(len(_CLASSES))[[_op_class(family) for family in families]]  # (F, classes)
        smallest = float(measured.min())
        largest = np.maximum((parts / measured[:, None]).max(axis=0), 1e-300)  # zero for a class that is not there
        fixed = 0.3 * smallest
        wide = [np.full(len(_CLASSES), 0.5), np.full(len(families), 0.15), [fixed / counts.max(), fixed]]
        spread = np.concatenate([*wide, np.full(len(largest), self.PART)])
        prior = np.zeros(len(spread))
        prior[: len(_CLASSES)] = 1.0
        held = np.zeros(len(families), bool)  # at LOWEST, and the others fitted to what is left
        while True:
            scaled = sums * ~held
            columns = [scaled @ classes, scaled, counts, np.ones(len(rows)), parts / largest]
            design = np.column_stack(columns) / measured[:, None] / self.NOISE
            wanted = (1 - self.LOWEST * sums @ held / measured) / self.NOISE
            normal = design.T @ design + np.diag(spread**-2)
            solution = np.linalg.solve(normal, design.T @ wanted + prior / spread**2)
            by_class, by_family, (offset, constant), by_part = np.split(
                solution, np.cumsum([len(_CLASSES), len(families), 2])
            )
            scales = np.where(held, self.LOWEST, classes @ by_class + by_family)
            if (scales >= self.LOWEST).all():
                break
            held |= scales < self.LOWEST
        found = Calibration(
            {family: float(scale) for family, scale in zip(families, scales, strict=True)},
            tuple(float(part) for part in by_part / largest),
            float(offset),
            float(constant),
        )
        left = (design @ solution - wanted) * self.NOISE
        leverage = (design * np.linalg.solve(normal, design.T).T).sum(axis=1)
        predicted = [
            _calibrated_ms(network.ops, network.raw_ms, found).sum() + found.constant_ms for network in networks
        ]
        error = left / (1 - leverage) + (np.array(predicted) / measured - 1 - left)  # what no operator may be less than
        left_out: dict[str, list[float]] = {}
        for each, row in zip(error, rows, strict=True):
            if row.type == "calibration":
                left_out.setdefault(row.details.get("anchor", ""), []).append(100 * abs(float(each)))
        return found.with_errors(left_out)
