"""DDPG (Lillicrap et al., 2016) as AMC uses it (He et al., ECCV 2018, section 3.2); read top to bottom.

Where this differs from the paper, or the paper leaves it open:

1. The critic reads state and action side by side in its first layer; the paper does not say where they meet.
2. Hidden layers start uniform in +-1/sqrt(fan in), the last layers in +-0.003, as Lillicrap et al. do; AMC does
   not say. The actor's sigmoid is scaled from [0, 1] to [floor, 1], so every action of the actor is a legal one.
3. The baseline is a moving average of episode rewards (decay 0.95, starting at the first reward), subtracted when a
   batch is drawn: old transitions are judged against today's baseline.
4. In the first quarter of the episodes actions are uniform in [floor, 1], and nothing is learned. The paper explores
   with sigma 0.5 for 100 of 400 episodes; around an untrained actor that is nearly uniform.
5. Sigma falls geometrically per episode from 0.5 to 0.01 at the last episode; the paper decays it exponentially at
   an unstated rate.
6. The replay memory holds the action that was applied after rounding and limiting, as in the paper's text; the
   actor's gradient is taken at its own, continuous action.
7. No weight decay, no batch-norm, no gradient clipping.
8. The first episodes of a search keep policies near uniform ones (`demonstrations`): independent uniform
   actions for every layer of a deep network are all poor, and say little of where good policies are.

One update per step is run after the episode, when its reward is known. Every random number comes from generators
of the agent's own, so the same seed gives the same run on one machine whatever else uses torch or numpy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import nn

from amc_hw.env import OBSERVATION, PruningEnv
from amc_hw.search.method import Method, judged

FEW_EPISODES = 10  #: per group, below which the agent hardly learns


@dataclass(frozen=True)
class DDPGConfig:
    """Paper's settings. warm_up_fraction: share of the episodes with uniform actions and no learning."""

    episodes: int = 400
    hidden: int = 300
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    tau: float = 0.01
    gamma: float = 1.0
    batch: int = 64
    replay: int = 2000
    warm_up_fraction: float = 0.25
    sigma0: float = 0.5
    sigma_end: float = 0.01
    baseline_decay: float = 0.95

    @property
    def warm_up(self) -> int:
        """Episodes with uniform actions."""
        return round(self.warm_up_fraction * self.episodes)

    def sigma(self, episode: int) -> float:
        """Standard deviation of the exploration noise, as a fraction of a group's channels."""
        falling = self.episodes - 1 - self.warm_up
        progress = min(max((episode - self.warm_up) / falling, 0.0), 1.0) if falling > 0 else 0.0
        return self.sigma0 * (self.sigma_end / self.sigma0) ** progress


class Transition(NamedTuple):
    """One step. action: the fraction really applied. done: the episode's last step."""

    observation: np.ndarray
    action: float
    next_observation: np.ndarray
    done: bool


class Replay:
    """The last `capacity` transitions, each with the final reward of its episode."""

    def __init__(self, capacity: int, observation_size: int) -> None:
        self.observations = np.zeros((capacity, observation_size), np.float32)
        self.next_observations = np.zeros((capacity, observation_size), np.float32)
        self.actions, self.rewards, self.dones = (np.zeros((capacity, 1), np.float32) for _ in range(3))
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.actions))

    def add(self, transition: Transition, reward: float) -> None:
        row = self.added % len(self.actions)
        self.observations[row], self.next_observations[row] = transition.observation, transition.next_observation
        self.actions[row], self.rewards[row], self.dones[row] = transition.action, reward, transition.done
        self.added += 1

    def sample(self, batch: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Observations (B, S), actions, rewards (B, 1), next observations (B, S), dones (B, 1)."""
        rows = rng.integers(len(self), size=batch)
        fields = (self.observations, self.actions, self.rewards, self.next_observations, self.dones)
        return tuple(torch.from_numpy(field[rows]) for field in fields)


class Actor(nn.Module):
    """Observation (B, S) -> fraction of channels kept (B, 1), in [floor, 1]."""

    def __init__(self, observation_size: int, hidden: int, floor: float, generator: torch.Generator) -> None:
        super().__init__()
        self.floor = floor
        self.layers = _two_hidden_layers(observation_size, hidden, generator)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.floor + (1 - self.floor) * torch.sigmoid(self.layers(observation))


class Critic(nn.Module):
    """Observation (B, S), action (B, 1) -> value (B, 1)."""

    def __init__(self, observation_size: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = _two_hidden_layers(observation_size + 1, hidden, generator)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([observation, action], dim=1))


def _two_hidden_layers(inputs: int, hidden: int, generator: torch.Generator) -> nn.Sequential:
    """inputs -> hidden -> hidden -> 1; the global random state is neither read nor moved."""
    sizes = [(inputs, hidden), (hidden, hidden), (hidden, 1)]
    linears = [nn.utils.skip_init(nn.Linear, fan_in, fan_out) for fan_in, fan_out in sizes]
    for linear, (fan_in, fan_out) in zip(linears, sizes, strict=True):
        bound = 3e-3 if fan_out == 1 else fan_in**-0.5
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])


class DDPGAgent:
    """Chooses fractions of channels to keep, and learns from the reward at the end of each episode."""

    def __init__(self, config: DDPGConfig, *, observation_size: int, floor: float, seed: int) -> None:
        self.config, self.floor = config, floor
        self.baseline: float | None = None
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.actor = Actor(observation_size, config.hidden, floor, generator)
        self.critic = Critic(observation_size, config.hidden, generator)
        self._target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self._target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self._actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_lr, foreach=True)
        self._critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr, foreach=True)
        self.replay = Replay(config.replay, observation_size)
        self._episodes_done = 0

    def greedy(self, observation: np.ndarray) -> float:
        """The actor's own action, in [floor, 1]."""
        with torch.no_grad():
            return float(self.actor(torch.as_tensor(observation, dtype=torch.float32)[None]))

    def act(self, observation: np.ndarray, episode: int) -> float:
        """An exploring action in [floor, 1]: uniform during warm-up, then truncated normal around the actor's."""
        if episode < self.config.warm_up:
            return float(self._rng.uniform(self.floor, 1.0))
        mean, sigma = self.greedy(observation), self.config.sigma(episode)
        low, high = ndtr([(self.floor - mean) / sigma, (1.0 - mean) / sigma])
        return float(np.clip(mean + sigma * ndtri(self._rng.uniform(low, high)), self.floor, 1.0))

    def finish_episode(self, transitions: Iterable[Transition], reward: float) -> None:
        """Store every step with the episode's reward, move the baseline, and learn once per step after warm-up."""
        decay = self.config.baseline_decay
        self.baseline = reward if self.baseline is None else decay * self.baseline + (1 - decay) * reward
        steps = 0
        for transition in transitions:
            self.replay.add(transition, reward)
            steps += 1
        self._episodes_done += 1
        if self._episodes_done > self.config.warm_up:
            for _ in range(steps):
                self._update(self.baseline)

    def _update(self, baseline: float) -> None:
        """One step of the critic, of the actor, and of both targets (AMC, section 3.2)."""
        config = self.config
        observations, actions, rewards, next_observations, dones = self.replay.sample(config.batch, self._rng)
        with torch.no_grad():
            ahead = self._target_critic(next_observations, self._target_actor(next_observations))
            targets = rewards - baseline + config.gamma * (1 - dones) * ahead

        critic_loss = nn.functional.mse_loss(self.critic(observations, actions), targets)
        self._critic_optimizer.zero_grad()
        critic_loss.backward()
        self._critic_optimizer.step()

        actor_loss = -self.critic(observations, self.actor(observations)).mean()
        gradients = torch.autograd.grad(actor_loss, list(self.actor.parameters()))  # the critic's are not needed
        for parameter, gradient in zip(self.actor.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self._actor_optimizer.step()

        with torch.no_grad():
            for target, online in ((self._target_actor, self.actor), (self._target_critic, self.critic)):
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), config.tau)


class DDPGSearch(Method):
    """Episodes of one agent in rounds: the first has all of them, later ones repeat the last quarter of the schedule
    in an environment whose budget has moved."""

    @classmethod
    def enough(cls, groups: int) -> int:
        return FEW_EPISODES * groups

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        config = DDPGConfig(episodes=episodes)
        self.agent = DDPGAgent(config, observation_size=len(OBSERVATION), floor=floor, seed=seed)

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        """demonstrations: widths that the first episodes of the warm-up keep, in place of uniform actions; the agent
        learns from them as from its own. `together` episodes are played by one agent before it learns from them."""
        config = self.agent.config
        full = env.model.full_widths
        shown = demonstrations[: config.warm_up]
        first = self.episodes - self.planned(number)
        episodes = range(first if number == 0 else max(first, config.warm_up), self.episodes)
        for start in range(0, len(episodes), self.together):
            chosen: list[tuple[bool, tuple[int, ...], list[Transition]]] = []
            for episode in episodes[start : start + self.together]:
                observation, _ = env.reset()
                transitions: list[Transition] = []
                for step in range(len(full)):
                    if episode < len(shown):
                        action = shown[episode][step] / full[step]
                    else:
                        action = self.agent.act(observation, episode)
                    after, info = env.choose(action)
                    transitions.append(Transition(observation, info["action"], after, step + 1 == len(full)))
                    observation = after
                chosen.append((episode < len(shown), env.decided, transitions))
            found_all = judged(env, [widths for _, widths, _ in chosen])
            for found, (demonstrated, _, transitions) in zip(found_all, chosen, strict=True):
                self.agent.finish_episode(transitions, found["reward"])
                yield found | {"shown": demonstrated}
