"""Whole episodes on a tiny network, with accuracy made up by a stub."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amc_hw.env import PruningEnv, _first_consumer
from amc_hw.errors import BudgetError
from amc_hw.graph import build_graph, width_grid
from amc_hw.models import ChannelMap
from amc_hw.models.load import load_model
from amc_hw.resources import CostModel, Term, budget_from, macs_model, params_model, snap
from amc_hw.task import Judged


def tiny():
    """conv 3->8 on 8x8, conv 8->16 to 4x4, linear 16->10."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    graph = build_graph(net.eval(), (3, 8, 8))
    return graph, macs_model(graph, ((2, 4, 8), (4, 8, 16)))


CONV1, CONV2, LINEAR = 27 * 8 * 64, 72 * 16 * 16, 160  # MACs
FULL = CONV1 + CONV2 + LINEAR


def make(budget=None, **options) -> PruningEnv:
    graph, model = tiny()
    budget = None if budget is None else budget_from(model, ratio=budget)
    return PruningEnv(graph, model=model, budget=budget, **{"evaluate": lambda widths: 0.75, **options})


def test_a_whole_episode_by_hand():
    env = make()
    observation, info = env.reset()
    assert info == {} and observation.dtype == np.float32
    # t, n=16/16, c=8/16, h=w=8/8, stride 2/2, k 3/3, cost, reduced, rest, previous action
    expected = [0, 1, 0.5, 1, 1, 1, 1, CONV1 / FULL, 0, (CONV2 + LINEAR) / FULL, 1]
    np.testing.assert_allclose(observation, expected, rtol=1e-6)

    observation, reward, terminated, truncated, info = env.step(np.array([0.45], np.float32))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"action": 0.5, "width": 4}  # the fraction applied, not the one asked for
    # group 1 is read by the linear layer: n=10/16, c=16/16, h=w=1/8, stride 1/2, k 1/3
    reduced = (CONV1 + CONV2) / 2 / FULL
    expected = [1, 10 / 16, 1, 1 / 8, 1 / 8, 1 / 2, 1 / 3, (CONV2 + LINEAR) / FULL, reduced, 0, 0.5]
    np.testing.assert_allclose(observation, expected, rtol=1e-6)

    observation, reward, terminated, truncated, info = env.step(0.9)
    assert terminated and not truncated and reward == -0.25
    assert info["widths"] == (4, 16) and info["action"] == 1.0 and info["accuracy"] == 0.75
    assert info["cost"] == env.model.cost((4, 16))
    assert not observation.any()
    with pytest.raises(ValueError, match="reset"):
        env.step(0.5)
    assert env.reset()[0][-1] == 1


def test_rewards():
    def final(**options):
        env = make(**options)
        env.reset()
        env.step(1.0)
        return env.step(1.0)[1]

    graph, macs = tiny()
    params = params_model(graph, macs.grids)
    latency = CostModel(macs.grids, (Term((0,), np.array([1.0, 2.0, 3.0])),), 0.5, "ms")
    assert final(reward="flops") == pytest.approx(-0.25 * math.log(FULL))
    assert final(reward="params", reward_model=params) == pytest.approx(-0.25 * math.log(params.full_cost))
    assert final(reward="latency", reward_model=latency) == pytest.approx(-0.25 * math.log(3500))
    with pytest.raises(ValueError, match="needs a cost in ms, not in MACs"):
        make(reward="latency")
    assert final(reward="distortion") == -0.25  # the error, where no distortion is known
    for distortion, worth in ((0.1, -0.1), (7.0, -1.0)):
        assert final(reward="distortion", evaluate=lambda widths, d=distortion: Judged(0.75, d)) == worth
    with pytest.raises(ValueError, match="known: err, flops, params, latency, distortion"):
        make(reward="speed")


def test_shapes_are_those_of_the_first_consumer_whatever_its_kind():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 24, 2, stride=2)
            self.side, self.head = nn.Conv2d(16, 24, 5, padding=2), nn.Linear(48, 4)

        def forward(self, x):
            x = self.stem(x).relu()
            wide, narrow = self.up(x).relu().mean((2, 3)), self.side(x).relu().mean((2, 3))
            return self.head(torch.cat([wide, narrow], 1))

    graph = build_graph(Up().eval(), (3, 8, 8))
    assert [group.name for group in graph.groups] == ["stem", "up", "side"]
    assert _first_consumer(graph, graph.groups[0]).name == "up"


def test_a_channel_map_is_what_a_group_is_read_by_only_where_nothing_else_is():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
            self.shortcut, self.head = ChannelMap((-1, -1, *range(8), -1, -1), 2), nn.Linear(12, 4)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head((self.shortcut(x) + self.conv(x)).relu().mean((2, 3)))

    graph = build_graph(Shortcut().eval(), (3, 8, 8))
    assert [layer.name for layer in graph.layers][1:3] == ["shortcut", "conv"]
    assert graph.groups[0].name == "stem" and _first_consumer(graph, graph.groups[0]).name == "conv"


def test_infeasible_budget_is_refused_before_the_search():
    with pytest.raises(BudgetError, match="MACs"):
        make(budget=0.01)


def test_reduced_is_clipped_where_pruning_costs_more():
    graph, macs = tiny()
    slower = CostModel(macs.grids, (Term((0,), np.array([9.0, 9.0, 3.0])),), 0.5, "ms")
    budget = budget_from(slower, absolute=20)
    env = PruningEnv(graph, model=slower, budget=budget, evaluate=lambda widths: 1.0)
    env.reset()
    observation, *_ = env.step(0.2)
    assert env.observation_space.contains(observation)
    assert env._decided == [8]  # full width is faster, so its channels are free


def test_gymnasium_accepts_it():
    check_env(make(budget=0.5), skip_render_check=True)


LOADED = load_model("resnet20")
RESNET = build_graph(LOADED.module.eval(), LOADED.input_shape)
GRIDS = tuple(width_grid(group.width) for group in RESNET.groups)
RNG = np.random.default_rng(0)
ROUGH = CostModel(  # neighbouring groups and the residual stream, not monotone
    GRIDS,
    tuple(Term((i, i + 1), RNG.uniform(0.5, 2, (len(GRIDS[i]), len(GRIDS[i + 1])))) for i in range(len(GRIDS) - 1))
    + (Term((0, 5), RNG.uniform(0.5, 2, (len(GRIDS[0]), len(GRIDS[5])))),),
    0.3,
    "ms",
    noise=0.03,
)


@settings(max_examples=60)
@given(ratio=st.floats(0.75, 1.0), seed=st.integers(0, 10**6), rough=st.booleans())
def test_every_action_sequence_meets_the_budget(ratio, seed, rough):
    model = ROUGH if rough else macs_model(RESNET, GRIDS)
    budget = budget_from(model, ratio=ratio)
    env = PruningEnv(RESNET, model=model, budget=budget, evaluate=lambda widths: 0.5)
    rng = np.random.default_rng(seed)
    observation, _ = env.reset()
    terminated, applied = False, []
    while not terminated:
        assert env.observation_space.contains(observation)
        observation, _, terminated, _, info = env.step(rng.uniform(0.2, 1, 1))
        applied.append(info["action"])
    assert model.cost(info["widths"]) <= budget.limit * (1 + 2e-9)
    full = [group.width for group in RESNET.groups]
    assert applied == [width / whole for width, whole in zip(info["widths"], full, strict=True)]


def test_what_the_budget_allows_every_group_that_is_left() -> None:
    env = make(0.5)
    env.reset()
    even = env.even_fraction()
    assert even is not None
    inside, above = ([snap(fraction, grid[-1], grid) for grid in env.model.grids] for fraction in (even, even + 0.01))
    assert env.model.cost(inside) <= env.budget.limit < env.model.cost(above)
    env.step(0.25)
    assert env.even_fraction() > even  # the first group left more than its share
    assert make().even_fraction() is None
