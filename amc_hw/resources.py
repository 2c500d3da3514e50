"""What a choice of widths costs, and the cheapest way known to finish a choice that has begun.

A `CostModel` is a constant plus tables over one or more channel groups. MACs, parameters and measured
milliseconds are three instances of that one class: a FLOPs policy and a latency policy differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from amc_hw.errors import BudgetError, UserError
from amc_hw.graph import Channels, Layer, LayerGraph
from amc_hw.min_sum import MAX_TABLE_ENTRIES, Factor, MinSum
from profilers.ops import TWO_AXIS_KINDS, OpGraph, OpSpec

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


@dataclass(frozen=True, eq=False)
class CostModel:
    """C(widths) = constant + sum of terms, in `unit` ("MACs", "params" or "ms").

    grids: the widths that every group may take, ascending, full width last.
    constant: what no group touches, and whatever else is always paid.
    noise: relative error of a term's value; 0 where costs are counted and not measured.
    """

    grids: Grids
    terms: tuple[Term, ...]
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
        chosen = [term for term in self.terms if touching is None or touching in term.groups]
        total = sum(float(term.values[tuple(positions[g] for g in term.groups)]) for term in chosen)
        return total + self.constant if touching is None else total

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

    @property
    def error_pct(self) -> float | None: ...

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
    known error.

    Raises UserError for an operator that depends on so many groups that its table would not fit.
    """
    checked = _checked_grids(graph, grids)
    index: dict[OpSpec, int] = {}  # every distinct operator once, in order of appearance
    seen: dict[tuple[OpSpec, bytes], np.ndarray] = {}
    places: list[tuple[tuple[int, ...], tuple[int, ...], np.ndarray]] = []  # groups, shape, indices into op_ms
    layers = {layer.name: layer for layer in graph.layers}
    for node in predictor.lower(graph.op_graph(batch=batch)).nodes:
        layer = replace(layers[node.name], op=node.op)
        shape = _term_shape(layer, checked)
        counts = [_counts(part, layer.groups, checked).reshape(-1) for part in (*layer.sources, layer.out)]
        rows = np.stack([np.broadcast_to(count, math.prod(shape)) for count in counts], axis=1)
        key = (node.op, rows.tobytes())
        if key not in seen:
            _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
            widths = list(graph.full_widths)
            numbers = []
            for flat in first:
                for group, position in zip(layer.groups, np.unravel_index(flat, shape), strict=True):
                    widths[group] = checked[group][position]
                numbers.append(index.setdefault(layer.at(widths), len(index)))
            seen[key] = np.array(numbers)[inverse.reshape(-1)]
        places.append((layer.groups, shape, seen[key]))
    each_ms = np.asarray(predictor.op_ms(list(index)), dtype=float)
    if each_ms.shape != (len(index),) or not np.isfinite(each_ms).all():
        raise ValueError("a predictor must return one finite number of milliseconds per operator")
    parts = [(groups, each_ms[numbers].reshape(shape)) for groups, shape, numbers in places]
    noise = 0.0 if predictor.error_pct is None else predictor.error_pct / 100
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
    parts: list[Factor] = []
    for layer in layers:
        if not quantity(layer.op):
            continue
        if not layer.groups:
            parts.append(((), np.array(float(quantity(layer.op)))))
            continue
        shape = _term_shape(layer, checked)
        out = _counts(layer.out, layer.groups, checked)
        if layer.op.kind in TWO_AXIS_KINDS:
            first, second = (quantity(layer.op.with_axes((inputs, 1))) for inputs in (1, 2))
            inputs = _counts(layer.sources[0], layer.groups, checked)
            values = out * (first + (inputs - 1) * (second - first))
        else:
            values = out * quantity(layer.op.with_axes((1,)))
        parts.append((layer.groups, np.broadcast_to(values, shape).astype(float)))
    return _model(checked, parts, 0.0, unit, 0.0)


def _model(grids: Grids, parts: Iterable[Factor], constant: float, unit: str, noise: float) -> CostModel:
    """Terms over the same groups become one; those over none join the constant."""
    merged: dict[tuple[int, ...], np.ndarray] = {}
    for groups, values in parts:
        merged[groups] = merged[groups] + values if groups in merged else values
    constant += float(merged.pop((), np.zeros(())))
    return CostModel(grids, tuple(Term(*item) for item in sorted(merged.items())), constant, unit, noise)


def _checked_grids(graph: LayerGraph, grids: Sequence[Sequence[int]]) -> Grids:
    checked = tuple(tuple(int(width) for width in grid) for grid in grids)
    if len(checked) != len(graph.groups):
        raise ValueError(f"{len(checked)} grids for {len(graph.groups)} groups")
    for group, grid in zip(graph.groups, checked, strict=True):
        if not grid or list(grid) != sorted(set(grid)) or grid[0] < 1 or grid[-1] != group.width:
            raise ValueError(f"the grid of {group.name} must ascend to its full width {group.width}: {grid}")
    return checked


def _term_shape(layer: Layer, grids: Grids) -> tuple[int, ...]:
    shape = tuple(len(grids[group]) for group in layer.groups)
    if math.prod(shape) > MAX_TERM_ENTRIES:
        raise UserError(
            f"operator {layer.name} depends on {len(shape)} channel groups: {math.prod(shape)} combinations of widths "
            f"(at most {MAX_TERM_ENTRIES}); use a larger --channel-multiple or freeze some of its inputs"
        )
    return shape


def _counts(part: Channels, groups: tuple[int, ...], grids: Grids) -> np.ndarray:
    """Channels of a tensor at every combination of the groups' widths, broadcastable to one axis per group."""
    total = np.full((1,) * len(groups), part.constant, dtype=np.int64)
    for group, repeat in part.terms:
        axis = [1] * len(groups)
        axis[groups.index(group)] = -1
        total = total + repeat * np.array(grids[group], dtype=np.int64).reshape(axis)
    return np.broadcast_to(total, tuple(len(grids[group]) for group in groups))


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


def _amount(cost: float, unit: str) -> str:
    return f"{cost:.4g} {unit}" if unit == "ms" else f"{cost:,.0f} {unit}"


class Completer:
    """The cheapest known completion of widths that are already decided, for the groups in their order.

    Exact, by elimination of the undecided groups, where its tables stay small; by coordinate descent elsewhere
    (see `amc_hw.min_sum`).
    """

    def __init__(self, model: CostModel, *, max_entries: int = MAX_TABLE_ENTRIES) -> None:
        self.model = model
        self._sum = MinSum([(t.groups, t.values) for t in model.terms], [len(g) for g in model.grids], max_entries)
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

    def best(self, decided: Sequence[int] | Mapping[int, int] = ()) -> tuple[float, tuple[int, ...]]:
        """(cost, widths) of the cheapest completion known.

        decided: widths of the first groups, or a mapping of group index -> width for any of them.
        """
        if isinstance(decided, Mapping):
            at = self._sum.complete_any({g: self.model.position(g, width) for g, width in decided.items()})
        else:
            at = self._sum.complete(self.model.positions(decided))
        return self.model.cost_at(at), tuple(grid[i] for grid, i in zip(self.model.grids, at, strict=True))


def require_feasible(completer: Completer, budget: Budget) -> None:
    """BudgetError (exit 4) naming the smallest cost known to be reachable, unless the budget can be met."""
    model = completer.model
    cost, _ = completer.best()
    if cost <= budget.limit * (1 + ROUNDING):
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
    # Later steps get a hair more, so that a width offered on the very edge is never taken back.
    limit = budget.limit * (1 + ROUNDING * (1 + 1e-3 * len(decided)))
    widths = [width for width, cost in zip(grid, completer.offers(decided), strict=True) if cost <= limit]
    if not widths:
        require_feasible(completer, budget)
        raise BudgetError(f"the widths {list(decided)} leave no known way to meet the budget {budget.text}")
    return widths


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
