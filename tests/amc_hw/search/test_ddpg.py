"""The agent on a toy whose best actions are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amc_hw.search.ddpg import DDPGAgent, DDPGConfig, Transition, action_of, fraction_of

STEPS, SIZE = 3, 11


def observations() -> list[np.ndarray]:
    return [np.full(SIZE, step / STEPS, np.float32) for step in range(STEPS + 1)]


def episode(agent: DDPGAgent, number: int) -> list[float]:
    """Reward -(mean action - 0.7)^2, known at the end."""
    seen = observations()
    actions = [agent.act(seen[step], number) for step in range(STEPS)]
    steps = [Transition(seen[i], actions[i], seen[i + 1], i == STEPS - 1) for i in range(STEPS)]
    agent.finish_episode(steps, -((float(np.mean(actions)) - 0.7) ** 2))
    return actions


def trained(seed: int, config: DDPGConfig) -> tuple[DDPGAgent, list[list[float]]]:
    agent = DDPGAgent(config, observation_size=SIZE, seed=seed)
    return agent, [episode(agent, number) for number in range(config.episodes)]


@pytest.mark.parametrize("config", [DDPGConfig(episodes=400), DDPGConfig.under_budget(150)], ids=["amc", "ddpg"])
@pytest.mark.parametrize("seed", [0, 1])
def test_learns_the_toy(config: DDPGConfig, seed: int) -> None:
    """The paper's agent in the episodes of the paper; with its best ones imitated, in fewer."""
    agent, history = trained(seed, config)
    greedy = [agent.greedy(observation) for observation in observations()[:STEPS]]
    assert abs(np.mean(greedy) - 0.7) < 0.1
    assert all(0 <= action <= 1 for actions in history for action in actions)
    assert agent.baseline is not None and agent.baseline > -0.02


def test_same_seed_same_run_whatever_the_global_generators_do():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    _, first = trained(3, DDPGConfig(episodes=12))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(2)
    _, second = trained(3, DDPGConfig(episodes=12))
    _, other = trained(4, DDPGConfig(episodes=12))
    assert first == second
    assert first != other


def test_sigma_schedule():
    config = DDPGConfig(episodes=400)
    assert config.warm_up == 100
    assert config.sigma(0) == config.sigma(100) == 0.5
    assert config.sigma(399) == pytest.approx(0.01)
    ratios = [config.sigma(e + 1) / config.sigma(e) for e in range(100, 399)]
    np.testing.assert_allclose(ratios, ratios[0])
    assert ratios[0] < 1
    for episodes in (1, 2, 3):
        assert all(0 < DDPGConfig(episodes=episodes).sigma(e) <= 0.5 for e in range(episodes))


def test_warm_up_is_uniform_and_does_not_learn():
    agent = DDPGAgent(DDPGConfig(episodes=400), observation_size=SIZE, seed=0)
    before = [parameter.clone() for parameter in agent.actor.parameters()]
    actions = np.array([episode(agent, number) for number in range(100)]).ravel()
    assert abs(actions.mean() - 0.5) < 0.05 and abs(actions.std() - 12**-0.5) < 0.03
    assert all(torch.equal(old, new) for old, new in zip(before, agent.actor.parameters(), strict=True))
    episode(agent, 100)
    assert not all(torch.equal(old, new) for old, new in zip(before, agent.actor.parameters(), strict=True))


def test_late_actions_stay_close_to_the_actor():
    agent = DDPGAgent(DDPGConfig(episodes=400), observation_size=SIZE, seed=0)
    observation = observations()[0]
    actions = np.array([agent.act(observation, 399) for _ in range(500)])
    assert abs(actions.mean() - agent.greedy(observation)) < 0.002 and abs(actions.std() - 0.01) < 0.002


def test_replay_keeps_the_applied_action_and_the_final_reward():
    agent = DDPGAgent(DDPGConfig(replay=4), observation_size=SIZE, seed=0)
    seen = observations()
    steps = [Transition(seen[i], 0.5 + i / 8, seen[i + 1], i == STEPS - 1) for i in range(STEPS)]
    agent.finish_episode(steps, -0.3)
    assert len(agent.replay) == 3 and agent.baseline == -0.3
    np.testing.assert_allclose(agent.replay.actions[:3, 0], [0.5, 0.625, 0.75])
    np.testing.assert_allclose(agent.replay.rewards[:3, 0], -0.3, rtol=1e-6)
    assert agent.replay.dones[:3, 0].tolist() == [0, 0, 1]
    agent.finish_episode(steps, -0.1)  # the oldest make room
    assert len(agent.replay) == 4 and agent.baseline == pytest.approx(0.95 * -0.3 + 0.05 * -0.1)
    np.testing.assert_allclose(agent.replay.rewards[:, 0], [-0.1, -0.1, -0.3, -0.1], rtol=1e-6)


fractions = st.floats(0, 1)


@given(action=fractions, floor=st.floats(0, 0.9), even=st.none() | fractions)
def test_actions_and_fractions_are_one_to_one(action: float, floor: float, even: float | None) -> None:
    fraction = fraction_of(action, floor, even)
    assert floor - 1e-12 <= fraction <= 1 + 1e-12
    assert action_of(fraction, floor, even) == pytest.approx(action, abs=1e-9)
    assert [fraction_of(end, floor, even) for end in (0, 1)] == pytest.approx([floor, 1])
    middle = fraction_of(0.5, floor, even)
    assert middle == pytest.approx((1 + floor) / 2 if even is None else np.clip(even, floor + 0.05, 0.95), abs=0.05)


def imitating(worths: list[float], *, warm_up: int = 2) -> tuple[DDPGAgent, list[float]]:
    """An agent after one more episode than the warm-up, whose episodes repeat one action each; and these actions."""
    config = DDPGConfig.under_budget(8 * warm_up)
    assert config.warm_up == warm_up
    agent = DDPGAgent(config, observation_size=SIZE, seed=0)
    seen = observations()
    actions = [0.9 - 0.8 * number / len(worths) for number in range(len(worths))]
    for action, worth in zip(actions, worths, strict=True):
        steps = [Transition(seen[i], action, seen[i + 1], i == STEPS - 1) for i in range(STEPS)]
        agent.finish_episode(steps, -1.0, worth)
    return agent, actions


def test_what_was_worth_most_is_imitated_whatever_its_reward() -> None:
    good = 3  # of the last episodes, the five best are kept
    worths = [-0.9, -0.8, -0.7, -0.1, -0.6, -0.5, -0.11, -0.12, -0.13, -0.14]
    agent, actions = imitating(worths, warm_up=len(worths) - 1)
    wanted = np.mean([action for action, worth in zip(actions, worths, strict=True) if worth > -0.2])
    assert agent.greedy(observations()[0]) == pytest.approx(wanted, abs=0.05)
    assert max(actions) > wanted + 0.2 and actions[good] > wanted
