"""Regularised evolution (Real et al., AAAI 2019): the oldest dies, the best of a few has a child, some widths moved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from amc_hw.env import PruningEnv
from amc_hw.search.method import Method, judged

POPULATION, TOURNAMENT = 24, 6
MOVED, SPREAD = 0.2, 0.2  #: share of the groups, and how far, as a fraction of all channels


class EvolutionSearch(Method):
    """The first generation is the demonstrations, then random policies."""

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self._rng = np.random.default_rng(seed)
        self._alive: deque[dict[str, Any]] = deque(maxlen=min(POPULATION, max(2, episodes // 3)))

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        full = np.array(env.model.full_widths)
        shown = list(demonstrations) if number == 0 else []
        left = self.planned(number)
        while left > 0:
            proposed = []
            for place in range(min(self.together, left)):
                if shown:
                    fractions = np.array(shown.pop(0)) / full
                elif not self._alive or len(self._alive) + place < self._alive.maxlen:  # type: ignore[operator]
                    fractions = self._rng.uniform(self.floor, 1.0, len(full))
                else:
                    fractions = self._child() / full
                proposed.append(env.play(fractions))
            left -= len(proposed)
            for found in judged(env, proposed):
                self._alive.append(found)
                yield found

    def _child(self) -> np.ndarray:
        rivals = self._rng.choice(len(self._alive), min(TOURNAMENT, len(self._alive)), replace=False)
        parent = max((self._alive[index] for index in rivals), key=lambda one: one["worth"])
        widths = np.array(parent["widths"], dtype=float)
        moved = self._rng.random(len(widths)) < MOVED
        moved[self._rng.integers(len(widths))] = True
        return widths * (1 + moved * self._rng.normal(0.0, SPREAD, len(widths)))
