"""Minimise a sum of tables, each over a few of the variables, when the first variables are already decided.

Exact, by min-sum (bucket) elimination, where its tables stay small: chains, trees and residual streams do. In
reverse order of decision, once for all steps, or else step by step, smallest table first. Where neither fits, by
coordinate descent: what it finds is an upper bound. Variables are numbered in the order in which they are
decided; a value is a position on the variable's axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

#: The largest table built while variables are eliminated (float64: 32 MB).
MAX_TABLE_ENTRIES = 4_000_000
#: How many completions found by descent are kept.
MAX_FOUND = 200_000

Factor = tuple[tuple[int, ...], np.ndarray]  # variables ascending, one axis for each


class MinSum:
    """The cheapest known completion of values that are already decided.

    factors: their sum is minimised. sizes: values per variable.
    What `offers` has shown once stays reachable: the completions that descent finds are kept for later steps.
    """

    def __init__(self, factors: Sequence[Factor], sizes: Sequence[int], max_entries: int = MAX_TABLE_ENTRIES) -> None:
        self._factors, self._sizes, self._max_entries = list(factors), tuple(sizes), max_entries
        self._buckets: list[Factor] = []  # cost to go from each variable on, given the earlier ones in its scope
        self._settled: list[list[Factor]] = []  # per step: what depends only on the variables before it
        self._orders: list[list[int]] = []
        self._found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        scopes = [set(variables) for variables, _ in factors]
        steps = range(len(self._sizes))
        if self._order(scopes, steps[::-1], given=True) is not None:
            self._precompute()
            return
        for step in steps:
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
            settled = sum(float(values[tuple(at[v] for v in scope)]) for scope, values in self._settled[step])
            scope, values = self._buckets[step]
            return values[tuple(at[v] for v in scope[:-1])] + settled
        if self._orders:
            _, left = self._eliminate(_conditioned(self._factors, dict(enumerate(at))), self._orders[step])
            return np.zeros(self._sizes[step]) + sum(values for _, values in left)
        return self._descended_offers(at)

    def complete(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Values of every variable, the first ones being `at`."""
        if self._buckets:
            full = list(at)
            for scope, values in self._buckets[len(at) :]:
                full.append(_last_argmin(values[tuple(full[v] for v in scope[:-1])]))
            return tuple(full)
        if self._orders:
            return self.complete_any(dict(enumerate(at)))
        if len(at) == len(self._sizes):
            return at
        self._descended_offers(at)
        return min(self._known((*at, value)) for value in range(self._sizes[len(at)]))[1]

    def complete_any(self, fixed: Mapping[int, int]) -> tuple[int, ...]:
        """Values of every variable, any of which may be given."""
        free = [variable for variable in range(len(self._sizes)) if variable not in fixed]
        order = self._order([set(scope) - set(fixed) for scope, _ in self._factors], free)
        if order is None:
            starts = [[fixed.get(v, value) for v, value in enumerate(start)] for start in self._starts]
            return min(self._descend(start, free) for start in starts)[1]
        buckets, _ = self._eliminate(_conditioned(self._factors, fixed), order)
        at = dict(fixed)
        for variable, (scope, values) in reversed(buckets):
            at[variable] = _last_argmin(values[tuple(slice(None) if v == variable else at[v] for v in scope)])
        return tuple(at[variable] for variable in range(len(self._sizes)))

    def _precompute(self) -> None:
        steps = range(len(self._sizes))
        buckets, _ = self._eliminate(self._factors, steps[::-1])
        self._buckets = [bucket for _, bucket in reversed(buckets)]
        messages = [(scope[:-1], values.min(axis=-1)) for scope, values in self._buckets]
        for step in steps:
            known = self._factors + messages[step + 1 :]
            self._settled.append([factor for factor in known if not factor[0] or factor[0][-1] < step])

    def _order(self, scopes: Sequence[set[int]], variables: Sequence[int], *, given: bool = False) -> list[int] | None:
        """An order to eliminate `variables` in (as given, or smallest table first); None if a table is too big."""
        left, order, current = list(variables), [], list(scopes)
        while left:
            joined = {v: {v}.union(*(scope for scope in current if v in scope)) for v in (left[:1] if given else left)}
            size, variable = min((math.prod(self._sizes[v] for v in scope), v) for v, scope in joined.items())
            if size > self._max_entries:
                return None
            current = [scope for scope in current if variable not in scope] + [joined[variable] - {variable}]
            left.remove(variable)
            order.append(variable)
        return order

    def _eliminate(
        self, factors: Sequence[Factor], order: Sequence[int]
    ) -> tuple[list[tuple[int, Factor]], list[Factor]]:
        """Minimise over variables one by one: (variable, sum of the factors that touch it), and what is left."""
        buckets, current = [], list(factors)
        for variable in order:
            inside = [factor for factor in current if variable in factor[0]]
            scope = tuple(sorted({variable}.union(*(names for names, _ in inside))))
            table = np.zeros([self._sizes[v] for v in scope])
            for names, values in inside:
                table += values.reshape([self._sizes[v] if v in names else 1 for v in scope])
            buckets.append((variable, (scope, table)))
            message = (tuple(v for v in scope if v != variable), table.min(axis=scope.index(variable)))
            current = [factor for factor in current if variable not in factor[0]] + [message]
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
                for scope, values in self._touching[variable]:
                    costs += values[tuple(slice(None) if v == variable else at[v] for v in scope)]
                best = int(costs.argmin())
                if costs[best] < costs[at[variable]]:
                    at[variable], moved = best, True
        return sum(float(values[tuple(at[v] for v in scope)]) for scope, values in self._factors), tuple(at)

    @cached_property
    def _touching(self) -> list[list[Factor]]:
        return [[factor for factor in self._factors if v in factor[0]] for v in range(len(self._sizes))]


def _conditioned(factors: Sequence[Factor], fixed: Mapping[int, int]) -> list[Factor]:
    """The factors with some variables' values filled in."""
    return [
        (tuple(v for v in scope if v not in fixed), values[tuple(fixed.get(v, slice(None)) for v in scope)])
        for scope, values in factors
    ]


def _last_argmin(costs: np.ndarray) -> int:
    """Where the minimum is; of equals the last, the widest: its channels are free."""
    return len(costs) - 1 - int(costs[::-1].argmin())
