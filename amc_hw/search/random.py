"""Random search: every step a uniform action, made feasible as the agent's are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.search.method import Method


class RandomSearch(Method):
    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self._rng = np.random.default_rng(seed)

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        for _ in range(self.planned(number)):
            yield played(env, self._rng.uniform(self.floor, 1.0, len(env.model.grids)))


def played(env: PruningEnv, fractions: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """One episode whose actions are the fractions: feasible widths near them, as `PruningEnv.judge` tells of them."""
    env.reset()
    for fraction in fractions:
        _, _, _, _, info = env.step([float(fraction)])
    return info
