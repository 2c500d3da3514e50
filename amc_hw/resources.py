"""What a choice of widths costs, and the cheapest way known to finish a choice that has begun.

A `CostModel` is a constant plus tables over one or more channel groups. MACs, parameters and measured
milliseconds are three instances of that one class: a FLOPs policy and a latency policy differ in nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import Layer, LayerGraph
from amc_hw.min_sum import MAX_TABLE_ENTRIES, MinSum, Sum
from profilers.ops import TWO_AXIS_KINDS, OpGraph, OpSpec, digest

Grids = tuple[tuple[int, ...], ...]

#: A single operator's table may not be larger than this.
MAX_TERM_ENTRIES = 2_000_000
#: A budget is met within this, relative: sums of floats depend on their order.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Term:
    """A cost that depends on `groups` (ascending); `values` has one axis per group, indexed by position in its grid."""

    groups: tuple[int, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if not self.groups or list(self.groups) != sorted(set(self.groups)) or self.values.ndim != len(self.groups):
            raise ValueError(f"a term needs ascending groups and one axis for each: {self.groups}, {self.values.shape}")

    def at(self, positions: Sequence[int]) -> float:
        """The cost at positions in the grids, one per group of the model."""
        return float(self.values[tuple(positions[group] for group in self.groups)])

    def table(self, allowed: Sequence[Sequence[int]]) -> np.ndarray:
        """The values at those positions in the grids alone, one axis per group of `groups`."""
        return self.values[np.ix_(*(allowed[group] for group in self.groups))]

    def factor(self, allowed: Sequence[Sequence[int]]) -> tuple[Sequence[int | Sum], np.ndarray]:
        """The same for `MinSum`."""
        return self.groups, self.table(allowed)


@dataclass(frozen=True, eq=False)
class SumTerm:
    """A cost that depends on sums of widths, such as the channels of a concatenation: of these there are far fewer
    than combinations of widths. axes: of `values`; the amounts of a `Sum` are those of its groups' grids."""

    axes: tuple[Sum, ...]
    values: np.ndarray

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Those that it depends on, ascending."""
        return tuple(sorted({group for axis in self.axes for group, _ in axis.parts}))

    def at(self, positions: Sequence[int]) -> float:
        sums = (sum(int(amounts[positions[group]]) for group, amounts in axis.parts) for axis in self.axes)
        return float(
            self.values[tuple(np.searchsorted(axis.levels, one) for axis, one in zip(self.axes, sums, strict=True))]
        )

    def table(self, allowed: Sequence[Sequence[int]]) -> np.ndarray:
        index = []
        for axis in self.axes:
            total = np.zeros((1,) * len(self.groups), dtype=np.int64)
            for group, amounts in axis.parts:
                along = [-1 if each == group else 1 for each in self.groups]
                total = total + amounts[list(allowed[group])].reshape(along)
            index.append(np.searchsorted(axis.levels, total))
        shape = tuple(len(allowed[group]) for group in self.groups)
        return np.broadcast_to(self.values[tuple(np.broadcast_arrays(*index))], shape)

    def factor(self, allowed: Sequence[Sequence[int]]) -> tuple[Sequence[int | Sum], np.ndarray]:
        axes = [
            Sum(tuple((group, amounts[list(allowed[group])]) for group, amounts in axis.parts), axis.levels)
            for axis in self.axes
        ]
        return axes, self.values


@dataclass(frozen=True, eq=False)
class CostModel:
    """C(widths) = constant + sum of terms, in `unit` ("MACs", "params" or "ms").

    grids: the widths that every group may take, ascending, full width last.
    constant: what no group touches, and whatever else is always paid.
    noise: relative error of a term's value; 0 where costs are counted and not measured.
    """

    grids: Grids
    terms: tuple[Term | SumTerm, ...]
    constant: float
    unit: str
    noise: float = 0.0

    @cached_property
    def _position(self) -> tuple[dict[int, int], ...]:
        return tuple({width: index for index, width in enumerate(grid)} for grid in self.grids)

    def positions(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Where `widths` (of the first len(widths) groups) stand in their grids; UserError for one that does not."""
        if len(widths) > len(self.grids):
            raise UserError(f"{len(widths)} widths given, there are {len(self.grids)} groups")
        return tuple(self.position(group, width) for group, width in enumerate(widths))

    def position(self, group: int, width: int) -> int:
        try:
            return self._position[group][width]
        except KeyError:
            offered = ", ".join(map(str, self.grids[group]))
            raise UserError(f"width {width} for group {group}: choose one of {offered}") from None

    def cost(self, widths: Sequence[int]) -> float:
        """The cost at `widths`, one per group, each on its grid (UserError if not)."""
        if len(widths) != len(self.grids):
            raise UserError(f"{len(widths)} widths given, there are {len(self.grids)} groups")
        return self.cost_at(self.positions(widths))

    def cost_at(self, positions: Sequence[int], touching: int | None = None) -> float:
        """The cost at positions in the grids; with `touching`, only of the terms that touch that group."""
        total = sum(term.at(positions) for term in self.terms if touching is None or touching in term.groups)
        return total + self.constant if touching is None else total

    @cached_property
    def completer(self) -> Completer:
        """Made once: what it finds out serves every search on the model."""
        return Completer(self)

    @cached_property
    def full_widths(self) -> tuple[int, ...]:
        return tuple(grid[-1] for grid in self.grids)

    @cached_property
    def full_cost(self) -> float:
        return self.cost(self.full_widths)

    def group_costs(self) -> np.ndarray:
        """Unpruned cost per group (G,): every operator counts for the last-decided group that touches it.

        The operators that touch no group are in `constant`, so these sum to full_cost - constant.
        """
        costs = np.zeros(len(self.grids))
        for term in self.terms:
            costs[term.groups[-1]] += term.values[(-1,) * term.values.ndim]
        return costs


class Predictor(Protocol):
    """What a latency model needs from a calibrated table: contributions of operators that add up to a network's."""

    @property
    def constant_ms(self) -> float: ...

    def stated_error_pct(self, anchor: str) -> float | None:
        """That 90% of the pruned networks of the one of this digest are predicted within, as far as that is known."""

    def lower(self, op_graph: OpGraph) -> OpGraph:
        """The network as the runtime executes it; operators that stay keep their names."""

    def op_ms(self, ops: Sequence[OpSpec]) -> np.ndarray:
        """Calibrated contribution of each operator, in ms (len(ops),)."""


def macs_model(graph: LayerGraph, grids: Sequence[Sequence[int]]) -> CostModel:
    """Multiply-accumulates for one image."""
    return _counted(graph, graph.layers, grids, lambda op: op.macs, "MACs")


def params_model(graph: LayerGraph, grids: Sequence[Sequence[int]]) -> CostModel:
    """Weights and biases as `LayerGraph.params` counts them."""
    return _counted(graph, graph.weighted, grids, lambda op: op.params, "params")


def latency_model(
    graph: LayerGraph, grids: Sequence[Sequence[int]], predictor: Predictor, *, batch: int = 1
) -> CostModel:
    """Predicted milliseconds of one inference of `batch` images, from a latency table; the noise is the predictor's
    known error."""
    checked = _checked_grids(graph, grids)
    index: dict[OpSpec, int] = {}  # every distinct operator once, in order of appearance
    seen: dict[tuple[OpSpec, bytes], np.ndarray] = {}
    places: list[tuple[tuple[Sum, ...], np.ndarray]] = []  # axes, indices into op_ms
    layers = {layer.name: layer for layer in graph.layers}
    widths = _Widths(checked)
    unpruned = graph.op_graph(batch=batch)
    for node in predictor.lower(unpruned).nodes:
        axes, counts = widths.of(layers[node.name])
        key = (node.op, b"|".join(each.tobytes() for each in counts))
        if key not in seen:
            ops = (node.op.with_axes(at) for at in itertools.product(*(each.tolist() for each in counts)))
            seen[key] = np.array([index.setdefault(op, len(index)) for op in ops])
        places.append((axes, seen[key].reshape([len(axis.levels) for axis in axes])))
    each_ms = np.asarray(predictor.op_ms(list(index)), dtype=float)
    if each_ms.shape != (len(index),) or not np.isfinite(each_ms).all():
        raise ValueError("a predictor must return one finite number of milliseconds per operator")
    noise = (predictor.stated_error_pct(digest(unpruned)) or 0.0) / 100
    parts = [(axes, each_ms[numbers]) for axes, numbers in places]
    return _model(checked, parts, predictor.constant_ms, "ms", noise)


def _counted(
    graph: LayerGraph,
    layers: Sequence[Layer],
    grids: Sequence[Sequence[int]],
    quantity: Callable[[OpSpec], int],
    unit: str,
) -> CostModel:
    """A model of a quantity of layers that is linear in the outputs and affine in the inputs, as MACs and parameters
    are."""
    checked = _checked_grids(graph, grids)
    widths = _Widths(checked)
    parts: list[tuple[tuple[Sum, ...], np.ndarray]] = []
    for layer in layers:
        if not quantity(layer.op):
            continue
        axes, counts = widths.of(layer)
        if not axes:
            values = np.array(quantity(layer.op))
        elif layer.op.kind in TWO_AXIS_KINDS:
            first, second = (quantity(layer.op.with_axes((inputs, 1))) for inputs in (1, 2))
            values = np.outer(first + (counts[0] - 1) * (second - first), counts[1])
        else:
            values = counts[0] / layer.op.step * quantity(layer.op.with_axes((layer.op.step,)))
        parts.append((axes, values.astype(float).reshape([len(axis.levels) for axis in axes])))
    return _model(checked, parts, 0.0, unit, 0.0)


class _Widths:
    """The channels of tensors as axes of tables."""

    def __init__(self, grids: Grids) -> None:
        self._grids = grids
        self._known: dict[tuple[tuple[int, int], ...], Sum] = {}

    def of(self, layer: Layer) -> tuple[tuple[Sum, ...], list[np.ndarray]]:
        """For every width that the layer's operator has (`OpSpec.axes`) the counts that it takes, and the axes of those
        that groups move; UserError where a table over them would be too large."""
        if layer.op.kind in TWO_AXIS_KINDS:
            widths = [layer.sources[0], layer.out]
        else:
            widths = [layer.out if layer.op.kind == "concat" else layer.sources[0]]
        axes, counts = [], []
        for part in widths:
            if part.terms:
                axes.append(self._sum(part.terms))
                counts.append(part.constant + axes[-1].levels)
            else:
                counts.append(np.array([part.constant]))
        if (size := math.prod(map(len, counts))) > MAX_TERM_ENTRIES:
            raise UserError(
                f"operator {layer.name} has {size} combinations of widths (at most {MAX_TERM_ENTRIES}): use a larger "
                "--channel-multiple"
            )
        return tuple(axes), counts

    def _sum(self, terms: tuple[tuple[int, int], ...]) -> Sum:
        if terms not in self._known:
            parts = [(group, repeat * np.array(self._grids[group])) for group, repeat in sorted(terms)]
            levels = np.zeros(1, dtype=int)
            for _, amounts in parts:
                levels = np.unique(levels[:, None] + amounts)
            self._known[terms] = Sum(tuple(parts), levels)
        return self._known[terms]


def _model(
    grids: Grids, parts: Iterable[tuple[tuple[Sum, ...], np.ndarray]], constant: float, unit: str, noise: float
) -> CostModel:
    """Terms over the same groups or sums become one; those over none join the constant."""
    plain: dict[tuple[int, ...], np.ndarray] = {}
    sums: dict[tuple[Sum, ...], np.ndarray] = {}
    for axes, values in parts:
        if any(len(axis.parts) > 1 for axis in axes):
            sums[axes] = sums[axes] + values if axes in sums else values
            continue
        each = [axis.parts[0][0] for axis in axes]
        groups = tuple(sorted(set(each)))
        values = np.einsum(values, [groups.index(group) for group in each], range(len(groups)))
        plain[groups] = plain[groups] + values if groups in plain else values
    constant += float(plain.pop((), np.zeros(())))
    terms: list[Term | SumTerm] = [
        *(Term(*item) for item in sorted(plain.items())),
        *(SumTerm(*item) for item in sums.items()),
    ]
    return CostModel(grids, tuple(terms), constant, unit, noise)


def _checked_grids(graph: LayerGraph, grids: Sequence[Sequence[int]]) -> Grids:
    checked = tuple(tuple(int(width) for width in grid) for grid in grids)
    if len(checked) != len(graph.groups):
        raise ValueError(f"{len(checked)} grids for {len(graph.groups)} groups")
    for group, grid in zip(graph.groups, checked, strict=True):
        if not grid or list(grid) != sorted(set(grid)) or grid[0] < 1 or grid[-1] != group.width:
            raise ValueError(f"the grid of {group.name} must ascend to its full width {group.width}: {grid}")
    return checked


@dataclass(frozen=True)
class Budget:
    """The most that the pruned network may cost, in the unit of a cost model.

    given: as the user gave it, a share or an amount; text: for a reader.
    """

    limit: float
    given: float
    text: str


def budget_from(model: CostModel, *, ratio: float | None = None, absolute: float | None = None) -> Budget:
    """A budget as a share of the unpruned cost, in (0, 1], or in the model's unit; UserError for any other value."""
    if (ratio is None) == (absolute is None):
        raise UserError("give a budget either as a ratio or as an absolute number")
    if ratio is not None:
        check_ratio(ratio)
        return Budget(ratio * model.full_cost, ratio, f"{ratio:g} of {_amount(model.full_cost, model.unit)}")
    assert absolute is not None
    if not (absolute > 0 and math.isfinite(absolute)):
        raise UserError(f"budget {absolute} {model.unit}: it must be a finite number above 0")
    return Budget(float(absolute), float(absolute), _amount(absolute, model.unit))


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:  # NaN fails this, too
        raise UserError(f"budget ratio {ratio}: it must be above 0 and at most 1")


def keeps(cost: float, limit: float) -> bool:
    """Whether a cost keeps a limit: every policy that was offered under it does."""
    return cost <= limit * (1 + ROUNDING)


def _amount(cost: float, unit: str) -> str:
    return f"{cost:.4g} {unit}" if unit == "ms" else f"{cost:,.0f} {unit}"


class Completer:
    """The cheapest known completion of widths that are already decided, for the groups in their order.

    Exact, by elimination of the undecided groups, where its tables stay small; by coordinate descent elsewhere
    (see `amc_hw.min_sum`).
    """

    def __init__(self, model: CostModel, *, max_entries: int = MAX_TABLE_ENTRIES) -> None:
        self.model = model
        every = [range(len(grid)) for grid in model.grids]
        self._sum = MinSum([term.factor(every) for term in model.terms], [len(each) for each in every], max_entries)
        self._last: tuple[tuple[int, ...], np.ndarray] | None = None

    @property
    def exact(self) -> bool:
        return self._sum.exact

    @cached_property
    def lower_bound(self) -> float:
        """No widths cost less; they may well all cost more."""
        return self.model.constant + sum(float(term.values.min()) for term in self.model.terms)

    def offers(self, decided: Sequence[int] = ()) -> np.ndarray:
        """Cost of the cheapest known completion for every width of the next group's grid. (len(grid),)"""
        at = self.model.positions(decided)
        if self._last is None or self._last[0] != at:
            self._last = (at, self._sum.offers(at) + self.model.constant)
        return self._last[1]

    def best(self, decided: Sequence[int] = ()) -> tuple[float, tuple[int, ...]]:
        """(cost, widths) of the cheapest completion known; decided: widths of the first groups."""
        at = self._sum.complete(self.model.positions(decided))
        return self.model.cost_at(at), tuple(grid[i] for grid, i in zip(self.model.grids, at, strict=True))


def require_feasible(completer: Completer, budget: Budget) -> None:
    """BudgetError (exit 4) naming the smallest cost known to be reachable, unless the budget can be met."""
    model = completer.model
    cost, _ = completer.best()
    if cost <= _offered_limit(budget, completer, 0):
        return
    proven = completer.exact or budget.limit < completer.lower_bound
    ratio = math.ceil(cost / model.full_cost * 1e4) / 1e4
    raise BudgetError(
        f"budget {budget.text} {'cannot be met' if proven else 'is met by no known widths'}: the smallest "
        f"{'reachable' if proven else 'known to be reachable'} is {_amount(cost, model.unit)}, "
        f"a ratio of {ratio:g}; ask for at least that, or lower --floor"
    )


def feasible_widths(completer: Completer, decided: Sequence[int], budget: Budget | None = None) -> list[int]:
    """Widths of the next group from which a completion is known to meet the budget (all of them without one).

    Raises BudgetError where there are none; after `require_feasible` that cannot happen, as long as every width
    decided was offered here.
    """
    grid = completer.model.grids[len(decided)]
    if budget is None:
        return list(grid)
    limit = _offered_limit(budget, completer, len(decided))
    widths = [width for width, cost in zip(grid, completer.offers(decided), strict=True) if cost <= limit]
    if not widths:
        require_feasible(completer, budget)
        raise BudgetError(f"the widths {list(decided)} leave no known way to meet the budget {budget.text}")
    return widths


def _offered_limit(budget: Budget, completer: Completer, step: int) -> float:
    """Later steps get a hair more, so that a width offered on the very edge is never taken back; none has more than
    `keeps` allows."""
    return budget.limit * (1 + ROUNDING * (1 + step / len(completer.model.grids)) / 2)


def snap(fraction: float, full: int, feasible: Sequence[int]) -> int:
    """The feasible width nearest to fraction * full; of two as near, the larger."""
    if not math.isfinite(fraction):
        raise ValueError(f"fraction {fraction} is not a number")
    return min(feasible, key=lambda width: (abs(width - fraction * full), -width))


def free_width(completer: Completer, decided: Sequence[int], width: int, feasible: Sequence[int]) -> int:
    """The largest of the feasible widths whose completed cost is not higher than that of `width`, within the noise.

    The noise is relative to the operators that touch the group, not to the whole network: an error that is
    small for a network would make most of a single layer's channels look free. One hop only, so that steps which
    are each within the noise do not add up.
    """
    model, step = completer.model, len(decided)
    costs = dict(zip(model.grids[step], completer.offers(decided), strict=True))
    slack = ROUNDING * abs(costs[width])
    if model.noise:
        _, widths = completer.best([*decided, width])
        slack += model.noise * abs(model.cost_at(model.positions(widths), touching=step))
    return max(wider for wider in feasible if wider >= width and costs[wider] <= costs[width] + slack)


def choose_width(completer: Completer, decided: Sequence[int], fraction: float, budget: Budget | None = None) -> int:
    """The width that keeping `fraction` of the next group's channels means: the nearest feasible one, and then
    whatever more is free."""
    feasible = feasible_widths(completer, decided, budget)
    width = snap(fraction, completer.model.grids[len(decided)][-1], feasible)
    return free_width(completer, decided, width, feasible)
