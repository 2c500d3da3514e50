"""The pruning episode as a Gymnasium environment: observation, feasible widths, reward; nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from amc_hw.graph import ChannelGroup, Layer, LayerGraph
from amc_hw.resources import Budget, CostModel, choose_width, require_feasible, snap
from amc_hw.task import Judged

#: Reward name -> (unit of the cost it needs, function of error in 0..1 and cost). AMC, section 3.3.
REWARDS: Mapping[str, tuple[str | None, Callable[[float, float], float]]] = {
    "err": (None, lambda error, cost: -error),
    "flops": ("MACs", lambda error, cost: -error * math.log(cost)),
    "params": ("params", lambda error, cost: -error * math.log(cost)),
    "latency": ("ms", lambda error, cost: -error * math.log(1000 * cost)),  # microseconds: far above 1
    "distortion": (None, lambda error, cost: -min(error, 1.0)),  # of the outputs, in place of the error
}

#: What the observation holds, in order (AMC, section 3.2).
OBSERVATION = ("t", "n", "c", "h", "w", "stride", "k", "cost", "reduced", "rest", "previous_action")


EVEN_STEPS = 8  #: of the bisection, to 1/256


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One episode decides the width of every channel group, in order.

    Observation: float32 (11,), see OBSERVATION, each in [0, 1]. t is divided by the last step's number; n, c, h, w,
    stride, k (of the group's first consumer with weights) by their largest value over the groups; costs by the cost
    of the unpruned network. `cost` and `rest` (of the groups after t) are unpruned costs; `reduced` is C(full) -
    C(decided, rest full). The action before the first is 1. After the last step the observation is zero.
    Action: float32 (1,), the fraction of the group's channels to keep, in [floor, 1]; the width is the nearest
    feasible one, widened where that is free. info["action"] is the fraction really applied.
    Reward: 0 until the last step, then that of `reward` in REWARDS.

    model: the cost that the budget limits and the observation shows. budget: None offers every width
    (accuracy-guaranteed). evaluate: widths -> accuracy in 0..1, or `Judged`. reward_model: cost in the reward,
    where the reward has one; `model` where it is left out. ahead: told of policies that will be judged, in that
    order, by whoever can judge several at once. Raises BudgetError for a budget that nothing is known to meet.
    """

    def __init__(
        self,
        graph: LayerGraph,
        *,
        model: CostModel,
        budget: Budget | None,
        evaluate: Callable[[tuple[int, ...]], float | Judged],
        reward: str = "err",
        reward_model: CostModel | None = None,
        floor: float = 0.2,
        ahead: Callable[[Sequence[tuple[int, ...]]], None] = lambda policies: None,
    ) -> None:
        if reward not in REWARDS:
            raise ValueError(f"unknown reward {reward!r}; known: {', '.join(REWARDS)}")
        if not graph.groups:
            raise ValueError("the network has no channel group to decide on")
        unit, self._reward = REWARDS[reward]
        self._by_error, self._by_distortion = unit is None, reward == "distortion"
        self._reward_model = model if reward_model is None else reward_model
        if unit is not None and self._reward_model.unit != unit:
            raise ValueError(f"reward {reward!r} needs a cost in {unit}, not in {self._reward_model.unit}")
        self.model, self.budget, self.evaluate, self.ahead = model, budget, evaluate, ahead
        self.completer = model.completer
        if budget is not None:
            require_feasible(self.completer, budget)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(OBSERVATION),), np.float32)
        self.action_space = gymnasium.spaces.Box(floor, 1.0, (1,), np.float32)
        consumers = np.array([_shape_features(_first_consumer(graph, group)) for group in graph.groups], dtype=float)
        self._shapes = consumers / consumers.max(axis=0)  # (G, 6)
        costs = model.group_costs()  # (G,)
        self._costs = costs / model.full_cost
        self._rests = (costs.sum() - costs.cumsum()) / model.full_cost
        self._decided: list[int] = []
        self._previous_action = 1.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._decided, self._previous_action = [], 1.0
        return self._observation(), {}

    def step(
        self, action: np.ndarray | Sequence[float] | float
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, info = self.choose(action)
        if len(self._decided) < len(self.model.grids):
            return observation, 0.0, False, False, info
        info |= self.judge(self._decided)
        return observation, info["reward"], True, False, info

    def choose(self, action: np.ndarray | Sequence[float] | float) -> tuple[np.ndarray, dict[str, Any]]:
        """The part of `step` that decides a width: the next observation, and what was applied."""
        step, full = len(self._decided), self.model.full_widths
        if step == len(full):
            raise ValueError("the episode has ended; call reset()")
        fraction = float(np.asarray(action, dtype=float).reshape(-1)[0])
        width = choose_width(self.completer, self._decided, fraction, self.budget)
        self._decided.append(width)
        self._previous_action = width / full[step]
        return self._observation(), {"action": self._previous_action, "width": width}

    def even_fraction(self) -> float | None:
        """The fraction that the budget allows of every group not decided yet, all alike, as far as bisection finds it
        (a measured latency need not rise with widths); None without a budget."""
        if self.budget is None:
            return None
        low, high = 0.0, 1.0
        for _ in range(EVEN_STEPS):
            middle = (low + high) / 2
            left = self.model.grids[len(self._decided) :]
            widths = (*self._decided, *(snap(middle, grid[-1], grid) for grid in left))
            low, high = (middle, high) if self.model.cost(widths) <= self.budget.limit else (low, middle)
        return low

    def play(self, fractions: Sequence[float] | np.ndarray) -> tuple[int, ...]:
        """The widths of an episode whose actions are the fractions (groups,), not judged yet."""
        self.reset()
        for fraction in fractions:
            self.choose(float(fraction))
        return self.decided

    @property
    def decided(self) -> tuple[int, ...]:
        """The widths of this episode so far."""
        return tuple(self._decided)

    def judge(self, widths: Sequence[int]) -> dict[str, Any]:
        """`widths`, on their grids and within the budget or not, with `cost`, `accuracy`, `distortion` and `reward`.

        `lost`: the distortion where it is known, else the error: policies that a thousand images do not tell apart
        differ in distortion. `worth`: for ranking policies, -lost where the reward is the error alone, else the reward.
        """
        widths = tuple(widths)
        accuracy, distortion = Judged.of(self.evaluate(widths))
        lost = 1.0 - accuracy if distortion is None else distortion
        reward = self._reward(lost if self._by_distortion else 1.0 - accuracy, self._reward_model.cost(widths))
        return {
            "widths": widths,
            "cost": self.model.cost(widths),
            "accuracy": accuracy,
            "distortion": distortion,
            "reward": reward,
            "lost": lost,
            "worth": -lost if self._by_error else reward,
        }

    def _observation(self) -> np.ndarray:
        step, full = len(self._decided), self.model.full_widths
        if step == len(full):
            return np.zeros(len(OBSERVATION), np.float32)
        current = self.model.cost((*self._decided, *full[step:]))
        reduced = (self.model.full_cost - current) / self.model.full_cost
        values = [
            step / max(len(full) - 1, 1),
            *self._shapes[step],
            self._costs[step],
            reduced,
            self._rests[step],
            self._previous_action,
        ]
        return np.clip(values, 0.0, 1.0).astype(np.float32)


def _first_consumer(graph: LayerGraph, group: ChannelGroup) -> Layer:
    """The first convolution or linear layer that reads the group; a channel map only where there is none."""
    readers = [layer for layer in graph.layers if layer.module in group.modules("consumer")]
    return min(readers, key=lambda layer: layer.op.kind == "channel_map")


def _shape_features(layer: Layer) -> tuple[int, ...]:
    """(n, c, h, w, stride, k): channels out and in, size of the input, vertical stride and kernel."""
    op = layer.op
    height, width = (op.height, op.width) if op.kind != "linear" or op.tokens else (1, 1)
    return op.out_channels, op.in_channels[0], height, width, op.stride[0], op.kernel[0]
