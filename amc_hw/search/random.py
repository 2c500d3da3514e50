"""Random search: every step a uniform action, made feasible as the agent's are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.search.method import Method, judged


class RandomSearch(Method):
    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self._rng = np.random.default_rng(seed)

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        left = self.planned(number)
        while left > 0:
            drawn = self._rng.uniform(self.floor, 1.0, (min(self.together, left), len(env.model.grids)))
            yield from judged(env, [env.play(fractions) for fractions in drawn])
            left -= len(drawn)
