"""What a search method is: it proposes widths, and learns from what they are worth. METHODS of `loop.py` lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from amc_hw.env import PruningEnv

SHOWN = 1 / 8  #: of the episodes, demonstrations
SPREAD = 0.12  #: of the fractions that they keep


class Method(ABC):
    """Proposes policies in rounds; a later round knows more of what the budget allows (`env.budget`).

    Every evaluation goes through the environment, so that all methods are given the same number of them.
    floor: smallest fraction of channels. episodes: evaluations of the first round. together: how many policies a method
    should propose before it is told of the first; those that it knows anyway it announces by `env.ahead`.
    """

    together = 1
    needs_budget = False  #: whether it asks what a budget allows, and not for a reward

    @classmethod
    def enough(cls, groups: int) -> int:
        """Evaluations below which it can do little with so many groups."""
        return 1

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        self.floor, self.episodes, self.seed = floor, episodes, seed

    def planned(self, number: int) -> int:
        """Evaluations of round `number`, at most."""
        return self.episodes if number == 0 else min(self.episodes, max(10, self.episodes // 4))

    @abstractmethod
    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        """What `PruningEnv.judge` says of every policy that was evaluated, in order. demonstrations: policies near
        uniform ones, for methods that learn from examples."""


def judged(env: PruningEnv, policies: Sequence[tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """What `PruningEnv.judge` says of policies that are known by now, in order."""
    env.ahead(policies)
    for widths in policies:
        yield env.judge(widths)
