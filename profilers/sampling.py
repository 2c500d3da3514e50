"""Which networks to measure: corners that span every operator's widths, then random ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Grids = Sequence[Sequence[int]]


def _nearest(grid: Sequence[int], fraction: float) -> int:
    target = fraction * grid[-1]
    return min(grid, key=lambda width: abs(width - target))


def corner_widths(grids: Grids) -> list[tuple[int, ...]]:
    """Widths at which neighbouring groups take every combination of smallest and largest, (a few, groups).

    Group i is large where bit b of i is set, for every bit, and the complements: any two groups differ in some
    bit, so every operator between two groups is measured in all four corners.
    """
    count = len(grids)
    patterns = [np.zeros(count, bool), np.ones(count, bool)]
    for bit in range(max(1, (count - 1).bit_length())):
        pattern = (np.arange(count) >> bit & 1).astype(bool)
        patterns += [pattern, ~pattern]
    return [tuple(g[-1] if large else g[0] for g, large in zip(grids, pattern, strict=True)) for pattern in patterns]


def random_widths(grids: Grids, count: int, *, seed: int | Sequence[int], fine: Grids = ()) -> list[tuple[int, ...]]:
    """`count` random networks: an overall scale uniform in [0.3, 1], every width within 0.3 of it, on the grid.

    fine: grids of every width there is; every second network is on them, free of a channel multiple.
    """
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        scale = rng.uniform(0.3, 1.0)
        fractions = np.clip(scale + rng.uniform(-0.3, 0.3, len(grids)), 0.0, 1.0)
        chosen = fine if fine and index % 2 else grids
        result.append(tuple(_nearest(grid, fraction) for grid, fraction in zip(chosen, fractions, strict=True)))
    return result
