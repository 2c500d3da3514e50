"""The uniform baseline: every group keeps the same fraction of its channels."""

from __future__ import annotations

from collections.abc import Collection

from amc_hw.graph import LayerGraph
from amc_hw.resources import Grids, snap


def tied_groups(graph: LayerGraph) -> set[int]:
    """Indices of the groups that additions tie together."""
    return {group for layer in graph.layers if layer.op.kind in ("add", "sub") for group, _ in layer.out.terms}


def uniform_policies(grids: Grids, *, full: Collection[int] = ()) -> list[tuple[int, ...]]:
    """All the policies that one fraction gives, widest first: every width is the nearest of its grid.

    full: indices of groups that keep all their channels.
    """
    edges = {(a + b) / 2 / grid[-1] for grid in grids for a, b in zip(grid, grid[1:], strict=False)}
    bounds = [0.0, *sorted(edges), 1.0]
    fractions = [(a + b) / 2 for a, b in zip(bounds, bounds[1:], strict=False)]
    policies = [
        tuple(grid[-1] if group in full else snap(fraction, grid[-1], grid) for group, grid in enumerate(grids))
        for fraction in reversed([*fractions, 1.0])
    ]
    return list(dict.fromkeys(policies))
