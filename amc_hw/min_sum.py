"""Minimise a sum of tables, each over a few of the variables, when the first variables are already decided.

Exact, by min-sum (bucket) elimination, where its tables stay small: chains, trees and residual streams do. In
reverse order of decision, once for all steps, or else step by step, smallest table first. Where neither fits, by
coordinate descent: what it finds is an upper bound. Variables are numbered in the order in which they are
decided; a value is a position on the variable's axis.

An axis of a table may be a `Sum` of variables, such as the channels of a concatenation. What later tables have to
know of the variables in it is their sum so far, of which there are far fewer values than combinations; so partial
sums are variables, too, which follow from the one before and the next variable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: The largest table built while variables are eliminated (float64: 32 MB).
MAX_TABLE_ENTRIES = 4_000_000
#: How many completions found by descent are kept.
MAX_FOUND = 200_000

Factor = tuple[tuple[int, ...], np.ndarray]  # variables as `_Sums.rank` orders them, one axis for each


@dataclass(frozen=True, eq=False)
class Sum:
    """An axis of a table that stands for a sum over variables. parts: variable and amount per value of it, variables
    ascending; levels: what the axis' positions stand for, ascending, all sums that occur among them."""

    parts: tuple[tuple[int, np.ndarray], ...]
    levels: np.ndarray


@dataclass(frozen=True, eq=False)
class _Partial:
    """A variable that follows from others: a sum up to the variable `last`. before: the sum before it, or the first
    variable; at: its position for every position of (before, last); levels: the sums that its positions stand for;
    parts: as of `Sum`."""

    before: int
    last: int
    at: np.ndarray
    levels: np.ndarray
    parts: Mapping[int, np.ndarray]


class _Sums:
    """Tables over variables and sums as tables over variables and partial sums, numbered after the variables."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.count = len(sizes)
        self.partial: dict[int, _Partial] = {}
        self._known: dict[tuple[int, int, bytes], int] = {}

    def plain(self, scope: Sequence[int | Sum], values: np.ndarray) -> Factor:
        variables = []
        for axis, one in enumerate(scope):
            if isinstance(one, Sum):
                number, levels = self._number(one)
                values = values.take(np.searchsorted(one.levels, levels), axis=axis)
                variables.append(number)
            else:
                variables.append(one)
        wanted = sorted(set(variables), key=self.rank)
        letters = {variable: number for number, variable in enumerate(wanted)}
        axes = [letters[variable] for variable in variables]
        return tuple(wanted), np.einsum(values, axes, range(len(wanted)))  # of an axis that is there twice the diagonal

    def _number(self, one: Sum) -> tuple[int, np.ndarray]:
        (current, levels), parts = one.parts[0], {one.parts[0][0]: one.parts[0][1]}
        for last, amounts in one.parts[1:]:
            parts = parts | {last: amounts}
            key = (current, last, levels.tobytes() + amounts.tobytes())
            sums = levels[:, None] + amounts
            levels = np.unique(sums)
            if key not in self._known:
                self._known[key] = len(self.sizes)
                self.partial[len(self.sizes)] = _Partial(current, last, np.searchsorted(levels, sums), levels, parts)
                self.sizes.append(len(levels))
            current = self._known[key]
        return current, levels

    def last(self, variable: int) -> int:
        """The variable with whose decision this one is known."""
        return variable if variable < self.count else self.partial[variable].last

    def rank(self, variable: int) -> tuple[int, int]:
        """Orders variables, each before the partial sums that are known with it."""
        return self.last(variable), variable

    def expanded_scope(self, scope: set[int], last: int) -> set[int]:
        """The scope in terms of `last` and what is known before it."""
        if not self.partial:
            return scope
        found = set[int]()
        for variable in scope:
            follows = variable >= self.count and self.partial[variable].last == last
            found |= {self.partial[variable].before, last} if follows else {variable}
        return found

    def expanded(self, factor: Factor, last: int) -> Factor:
        """The table in terms of `last` and what is known before it."""
        scope, values = factor
        if all(variable < self.count or self.partial[variable].last != last for variable in scope):
            return factor
        wanted = sorted(self.expanded_scope(set(scope), last), key=self.rank)

        def laid(variable: int) -> np.ndarray:
            return np.arange(self.sizes[variable]).reshape([-1 if each == variable else 1 for each in wanted])

        index = []
        for variable in scope:
            if variable in wanted:
                index.append(laid(variable))
            else:
                partial = self.partial[variable]
                index.append(partial.at[laid(partial.before), laid(last)])
        return tuple(wanted), values[tuple(np.broadcast_arrays(*index))]

    def places(self, at: Sequence[int]) -> dict[int, int]:
        """Positions of the first variables, and of every partial sum that is known with them."""
        found = dict(enumerate(at))
        for number, partial in self.partial.items():  # each after the one before it
            if partial.last < len(at):
                found[number] = int(partial.at[found[partial.before], found[partial.last]])
        return found

    def along(self, factor: Factor, variable: int, at: Sequence[int]) -> np.ndarray:
        """The table's values for every value of a variable, the others being `at`. (sizes[variable],)"""
        scope, values = factor
        if not self.partial:
            return values[tuple(slice(None) if each == variable else at[each] for each in scope)]
        index: list[int | slice | np.ndarray] = []
        for each in scope:
            if each < self.count:
                index.append(slice(None) if each == variable else at[each])
                continue
            parts, levels = self.partial[each].parts, self.partial[each].levels
            fixed = sum(int(amounts[at[part]]) for part, amounts in parts.items() if part != variable)
            index.append(np.searchsorted(levels, fixed + parts.get(variable, 0)))
        if variable in scope and any(isinstance(each, np.ndarray) and each.ndim for each in index):
            index = [np.arange(self.sizes[variable]) if isinstance(each, slice) else each for each in index]
        return values[tuple(index)]

    def value(self, factor: Factor, places: Mapping[int, int]) -> float:
        scope, values = factor
        return float(values[tuple(places[variable] for variable in scope)])


class MinSum:
    """The cheapest known completion of values that are already decided.

    factors: (axes, table) each, whose sum is minimised; an axis is a variable or a `Sum` of some. sizes: values per
    variable. What `offers` has shown once stays reachable: the completions that descent finds are kept for later steps.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Sequence[int | Sum], np.ndarray]],
        sizes: Sequence[int],
        max_entries: int = MAX_TABLE_ENTRIES,
    ) -> None:
        self._sums = _Sums(sizes)
        self._factors = [self._sums.plain(*factor) for factor in factors]
        self._sizes, self._max_entries = tuple(sizes), max_entries
        self._buckets: list[Factor] = []  # cost to go from each variable on, given the earlier ones in its scope
        self._settled: list[list[Factor]] = []  # per step: what depends only on the variables before it
        self._orders: list[list[int]] = []
        self._found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        scopes = [set(variables) for variables, _ in self._factors]
        steps = range(len(self._sizes))
        if self._order(scopes, steps[::-1], given=True) is not None:
            self._precompute()
            return
        for step in () if self._sums.partial else steps:
            order = self._order([scope - set(range(step)) for scope in scopes], steps[step + 1 :])
            if order is None:
                self._orders = []
                break
            self._orders.append(order)

    @property
    def exact(self) -> bool:
        return bool(self._buckets or self._orders or not self._sizes)

    def offers(self, at: tuple[int, ...]) -> np.ndarray:
        """The least sum known for every value of the next variable, the first ones being `at`. (sizes[len(at)],)"""
        step = len(at)
        if self._buckets:
            places = self._sums.places(at)
            settled = sum(self._sums.value(factor, places) for factor in self._settled[step])
            scope, values = self._buckets[step]
            return values[tuple(places[v] for v in scope[:-1])] + settled
        if self._orders:
            _, left = self._eliminate(_conditioned(self._factors, dict(enumerate(at))), self._orders[step])
            return np.zeros(self._sizes[step]) + sum(values for _, values in left)
        return self._descended_offers(at)

    def complete(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Values of every variable, the first ones being `at`."""
        if self._buckets:
            full = list(at)
            for scope, values in self._buckets[len(at) :]:
                places = self._sums.places(full)
                full.append(_last_argmin(values[tuple(places[v] for v in scope[:-1])]))
            return tuple(full)
        if self._orders:
            return self._completed(at)
        if len(at) == len(self._sizes):
            return at
        self._descended_offers(at)
        return min(self._known((*at, value)) for value in range(self._sizes[len(at)]))[1]

    def _completed(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """As `complete`, by eliminating what is left, smallest table first."""
        free = range(len(at), len(self._sizes))
        fixed = dict(enumerate(at))
        order = self._order([set(scope) - set(fixed) for scope, _ in self._factors], free)
        if order is None:  # one variable more than an offer eliminates
            return min(self._descend((*at, *start[len(at) :]), free) for start in self._starts)[1]
        buckets, _ = self._eliminate(_conditioned(self._factors, fixed), order)
        found = dict(fixed)
        for variable, (scope, values) in reversed(buckets):
            found[variable] = _last_argmin(values[tuple(slice(None) if v == variable else found[v] for v in scope)])
        return tuple(found[variable] for variable in range(len(self._sizes)))

    def _precompute(self) -> None:
        steps = range(len(self._sizes))
        buckets, _ = self._eliminate(self._factors, steps[::-1])
        self._buckets = [bucket for _, bucket in reversed(buckets)]
        messages = [(scope[:-1], values.min(axis=-1)) for scope, values in self._buckets]
        for step in steps:
            known = self._factors + messages[step + 1 :]
            self._settled.append([each for each in known if not each[0] or self._sums.last(each[0][-1]) < step])

    def _order(self, scopes: Sequence[set[int]], variables: Sequence[int], *, given: bool = False) -> list[int] | None:
        """An order to eliminate `variables` in (as given, or smallest table first); None if a table is too big."""
        left, order, current = list(variables), [], list(scopes)
        sizes = self._sums.sizes
        while left:
            joined = {}
            for v in left[:1] if given else left:
                touching = (self._sums.expanded_scope(scope, v) for scope in current)
                joined[v] = {v}.union(*(scope for scope in touching if v in scope))
            size, variable = min((math.prod(sizes[v] for v in scope), v) for v, scope in joined.items())
            if size > self._max_entries:
                return None
            rest = [scope for scope in current if variable not in self._sums.expanded_scope(scope, variable)]
            current = [*rest, joined[variable] - {variable}]
            left.remove(variable)
            order.append(variable)
        return order

    def _eliminate(
        self, factors: Sequence[Factor], order: Sequence[int]
    ) -> tuple[list[tuple[int, Factor]], list[Factor]]:
        """Minimise over variables one by one: (variable, sum of the factors that touch it), and what is left."""
        buckets, current = [], list(factors)
        for variable in order:
            known = [self._sums.expanded(factor, variable) for factor in current]
            inside = [factor for factor in known if variable in factor[0]]
            scope = tuple(sorted({variable}.union(*(names for names, _ in inside)), key=self._sums.rank))
            table = np.zeros([self._sums.sizes[v] for v in scope])
            for names, values in inside:
                table += values.reshape([self._sums.sizes[v] if v in names else 1 for v in scope])
            buckets.append((variable, (scope, table)))
            message = (tuple(v for v in scope if v != variable), table.min(axis=scope.index(variable)))
            current = [factor for factor in known if variable not in factor[0]] + [message]
        return buckets, current

    @cached_property
    def _starts(self) -> list[list[int]]:
        """Where descents start: everything at the first value, at the last, in between."""
        return [[0 for _ in self._sizes], [size - 1 for size in self._sizes], [size // 2 for size in self._sizes]]

    def _known(self, at: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        """(sum, values) on record for a prefix. It is found through the prefix's own prefixes, so that no answer
        depends on which questions were asked before."""
        if at not in self._found:
            if at:
                self._descended_offers(at[:-1])
            else:
                self._found[at] = min(self._descend(start, range(len(self._sizes))) for start in self._starts)
        return self._found[at]

    def _descended_offers(self, at: tuple[int, ...]) -> np.ndarray:
        step, known = len(at), self._known(at)
        free = range(step + 1, len(self._sizes))
        if len(self._found) > MAX_FOUND:  # what is forgotten is found again, the same
            self._found = {}
        costs = []
        for value in range(self._sizes[step]):
            if (*at, value) in self._found:
                costs.append(self._found[(*at, value)][0])
                continue
            starts = ((*at, value, *known[1][step + 1 :]), (*at, value, *(0 for _ in free)))
            found = min(self._descend(start, free) for start in starts)
            if value == known[1][step]:
                found = min(found, known)
            self._found[(*at, value)] = found
            costs.append(found[0])
        return np.array(costs)

    def _descend(self, start: Sequence[int], free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """Coordinate descent over the `free` variables, to values that no single change improves."""
        at, moved = list(start), True
        while moved:
            moved = False
            for variable in free:
                costs = np.zeros(self._sizes[variable])
                for factor in self._touching[variable]:
                    costs += self._sums.along(factor, variable, at)
                best = int(costs.argmin())
                if costs[best] < costs[at[variable]]:
                    at[variable], moved = best, True
        places = self._sums.places(at)
        return sum(self._sums.value(factor, places) for factor in self._factors), tuple(at)

    @cached_property
    def _touching(self) -> list[list[Factor]]:
        """Per variable the factors that depend on it."""
        found: list[list[Factor]] = [[] for _ in self._sizes]
        for factor in self._factors:
            parts = (self._sums.partial[v].parts if v in self._sums.partial else (v,) for v in factor[0])
            for variable in {part for each in parts for part in each}:
                found[variable].append(factor)
        return found


def _conditioned(factors: Sequence[Factor], fixed: Mapping[int, int]) -> list[Factor]:
    """The factors with some variables' values filled in."""
    return [
        (tuple(v for v in scope if v not in fixed), values[tuple(fixed.get(v, slice(None)) for v in scope)])
        for scope, values in factors
    ]


def _last_argmin(costs: np.ndarray) -> int:
    """Where the minimum is; of equals the last, the widest: its channels are free."""
    return len(costs) - 1 - int(costs[::-1].argmin())
