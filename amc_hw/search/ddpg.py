"""DDPG (Lillicrap et al., 2016) as AMC uses it (He et al., ECCV 2018, section 3.2); read top to bottom.

Where this differs from the paper, or the paper leaves it open:

1. The critic reads state and action side by side in its first layer; the paper does not say where they meet.
2. Hidden layers start uniform in +-1/sqrt(fan in), the last layers in +-0.003, as Lillicrap et al. do; AMC does
   not say. The actor's action lies in [0, 1] and `fraction_of` makes it a fraction in [floor, 1], so every action of
   the actor is a legal one.
3. The baseline is a moving average of episode rewards (decay 0.95, starting at the first reward), subtracted when a
   batch is drawn: old transitions are judged against today's baseline.
4. In the first quarter of the episodes actions are uniform, and nothing is learned. The paper explores with sigma 0.5
   for 100 of 400 episodes; around an untrained actor that is nearly uniform.
5. Sigma falls geometrically per episode from 0.5 to 0.01 at the last episode; the paper decays it exponentially at
   an unstated rate.
6. The replay memory holds the action that was applied after rounding and limiting, as in the paper's text; the
   actor's gradient is taken at its own, continuous action.
7. No weight decay, no batch-norm, no gradient clipping.

That is `--method amc`. `--method ddpg` adds what decision 0011 measured (docs/decisions):

8. The first episodes of a search keep policies near uniform ones (`demonstrations`): independent uniform
   actions for every layer of a deep network are all poor, and say little of where good policies are.
9. Under a budget, actions are relative (`fraction_of`): 0.5 keeps of this group what the budget allows every group
   that is left (`PruningEnv.even_fraction`). An untrained actor spends the budget evenly, and what one group takes is
   paid for by all later ones, not by the last.
10. Under a budget, the actor also imitates the best episodes so far, and at first does nothing else (self-imitation,
    Oh et al., 2018; weighed against the critic as Fujimoto and Gu do, 2021): its sigmoid does not get stuck at an end,
    and it does not forget what it was shown. It explores near them, and its learning rate is larger.

One update per step is run after the episode, when its reward is known. Every random number comes from generators
of the agent's own, so the same seed gives the same run on one machine whatever else uses torch or numpy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import nn

from amc_hw.env import OBSERVATION, PruningEnv
from amc_hw.search.method import SHOWN, SPREAD, Method, judged

FEW_EPISODES = 10  #: per group, below which the agent hardly learns
EDGE = 0.05  #: share of the range of fractions that the action 0.5 keeps away from its ends
TINY = 1e-8


@dataclass(frozen=True)
class DDPGConfig:
    """Paper's settings. warm_up_fraction: share of the episodes with uniform actions and no learning. imitation: weight
    of the actor's squared distance from the actions of the `best` episodes, relative to the critic's part of the loss;
    rehearsal: steps by that distance alone, before the first by both."""

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
    imitation: float = 0.0
    best: int = 5
    rehearsal: int = 300

    @classmethod
    def under_budget(cls, episodes: int) -> DDPGConfig:
        """What finds better policies where demonstrations can be near the budget."""
        return cls(episodes, actor_lr=1e-3, warm_up_fraction=SHOWN, sigma0=SPREAD, sigma_end=SPREAD / 4, imitation=20.0)

    @property
    def warm_up(self) -> int:
        """Episodes with uniform actions."""
        return round(self.warm_up_fraction * self.episodes)

    def sigma(self, episode: int) -> float:
        """Standard deviation of the exploration noise of an action."""
        falling = self.episodes - 1 - self.warm_up
        progress = min(max((episode - self.warm_up) / falling, 0.0), 1.0) if falling > 0 else 0.0
        return self.sigma0 * (self.sigma_end / self.sigma0) ** progress


class Transition(NamedTuple):
    """One step. action: what was really applied, in [0, 1]. done: the episode's last step."""

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
    """Observation (B, S) -> action (B, 1), in [0, 1]."""

    def __init__(self, observation_size: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = _two_hidden_layers(observation_size, hidden, generator)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layers(observation))


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
    """Chooses actions in [0, 1], and learns from the reward at the end of each episode."""

    def __init__(self, config: DDPGConfig, *, observation_size: int, seed: int) -> None:
        self.config = config
        self.baseline: float | None = None
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.actor = Actor(observation_size, config.hidden, generator)
        self.critic = Critic(observation_size, config.hidden, generator)
        self._target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self._target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self._actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_lr, foreach=True)
        self._critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr, foreach=True)
        self.replay = Replay(config.replay, observation_size)
        self._best: list[tuple[float, list[Transition]]] = []
        self._examples: tuple[torch.Tensor, torch.Tensor] | None = None  #: of those, observations and actions
        self._episodes_done = 0

    def greedy(self, observation: np.ndarray) -> float:
        """The actor's own action, in [0, 1]."""
        with torch.no_grad():
            return float(self.actor(torch.as_tensor(observation, dtype=torch.float32)[None]))

    def act(self, observation: np.ndarray, episode: int) -> float:
        """An exploring action in [0, 1]: uniform during warm-up, then truncated normal around the actor's."""
        if episode < self.config.warm_up:
            return float(self._rng.uniform())
        mean, sigma = self.greedy(observation), self.config.sigma(episode)
        low, high = ndtr([-mean / sigma, (1.0 - mean) / sigma])
        return float(np.clip(mean + sigma * ndtri(self._rng.uniform(low, high)), 0.0, 1.0))

    def finish_episode(self, transitions: Sequence[Transition], reward: float, worth: float | None = None) -> None:
        """Store every step with the episode's reward, move the baseline, and learn once per step after warm-up.

        worth: what ranks episodes for imitation, the reward where it is left out.
        """
        decay = self.config.baseline_decay
        self.baseline = reward if self.baseline is None else decay * self.baseline + (1 - decay) * reward
        for transition in transitions:
            self.replay.add(transition, reward)
        if self.config.imitation:
            self._remember(transitions, reward if worth is None else worth)
        self._episodes_done += 1
        if self._episodes_done > self.config.warm_up:
            if self.config.imitation and self._episodes_done == self.config.warm_up + 1:
                self._rehearse()
            for _ in transitions:
                self._update(self.baseline)

    def _remember(self, transitions: Sequence[Transition], worth: float) -> None:
        """Keep the best episodes; of equals the earlier."""
        self._best = sorted([*self._best, (worth, list(transitions))], key=lambda one: -one[0])[: self.config.best]
        steps = [step for _, episode in self._best for step in episode]
        observations = torch.from_numpy(np.array([step.observation for step in steps], np.float32))
        self._examples = observations, torch.tensor([[step.action] for step in steps], dtype=torch.float32)

    def _rehearse(self) -> None:
        """Imitate the best episodes alone; the target actor is to begin from there."""
        assert self._examples is not None
        observations, actions = self._examples
        for _ in range(self.config.rehearsal):
            self._learn(nn.functional.mse_loss(self.actor(observations), actions))
        self._target_actor.load_state_dict(self.actor.state_dict())

    def _learn(self, loss: torch.Tensor) -> None:
        """One step of the actor; the critic's gradients are not needed."""
        gradients = torch.autograd.grad(loss, list(self.actor.parameters()))
        for parameter, gradient in zip(self.actor.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self._actor_optimizer.step()

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

        if self._examples is None:
            self._learn(-self.critic(observations, self.actor(observations)).mean())
        else:
            rows = torch.from_numpy(self._rng.integers(len(self._examples[0]), size=config.batch))
            seen, taken = (each[rows] for each in self._examples)
            own, repeated = self.actor(torch.cat([observations, seen])).split(config.batch)
            values = self.critic(observations, own)
            scale = values.detach().abs().mean() + TINY
            self._learn(-values.mean() / scale + config.imitation * nn.functional.mse_loss(repeated, taken))

        with torch.no_grad():
            for target, online in ((self._target_actor, self.actor), (self._target_critic, self.critic)):
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), config.tau)


def fraction_of(action: float, floor: float, even: float | None) -> float:
    """The fraction in [floor, 1] that an action in [0, 1] keeps: linear, or linear on both sides of 0.5 -> even."""
    middle = _middle(floor, even)
    return floor + 2 * action * (middle - floor) if action <= 0.5 else middle + (2 * action - 1) * (1 - middle)


def action_of(fraction: float, floor: float, even: float | None) -> float:
    """The action in [0, 1] that keeps a fraction: the other way round from `fraction_of`."""
    middle = _middle(floor, even)
    if fraction <= middle:
        return max((fraction - floor) / max(middle - floor, TINY) / 2, 0.0)
    return min(0.5 + (fraction - middle) / max(1 - middle, TINY) / 2, 1.0)


def _middle(floor: float, even: float | None) -> float:
    """What the action 0.5 keeps, some way from both ends."""
    if even is None:
        return (1 + floor) / 2
    margin = EDGE * (1 - floor)
    return min(max(even, floor + margin), 1 - margin)


class AMCSearch(Method):
    """The paper's agent. Episodes of one agent in rounds: the first has all of them, later ones repeat the last quarter
    of the schedule in an environment whose budget has moved."""

    @classmethod
    def enough(cls, groups: int) -> int:
        return FEW_EPISODES * groups

    def __init__(self, floor: float, episodes: int, seed: int) -> None:
        super().__init__(floor, episodes, seed)
        self.agent: DDPGAgent | None = None

    def config(self, env: PruningEnv) -> DDPGConfig:
        return DDPGConfig(self.episodes)

    def even(self, env: PruningEnv) -> float | None:
        """What the action 0.5 keeps at this step; None where it is the middle of the range."""
        return None

    def shown(self, demonstrations: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Of the demonstrations those that the first episodes of the warm-up keep, in place of uniform actions; the
        agent learns from them as from its own."""
        return ()

    def round(
        self, env: PruningEnv, number: int, demonstrations: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, Any]]:
        """`together` episodes are played by one agent before it learns from them."""
        if self.agent is None:
            self.agent = DDPGAgent(self.config(env), observation_size=len(OBSERVATION), seed=self.seed)
        warm_up = self.agent.config.warm_up
        examples = dict(enumerate(self.shown(demonstrations)[:warm_up]))
        first = self.episodes - self.planned(number)
        episodes = range(first if number == 0 else max(first, warm_up), self.episodes)
        for start in range(0, len(episodes), self.together):
            chosen = [
                (episode in examples, *self._play(env, episode, examples.get(episode)))
                for episode in episodes[start : start + self.together]
            ]
            found_all = judged(env, [widths for _, widths, _ in chosen])
            for found, (demonstrated, _, transitions) in zip(found_all, chosen, strict=True):
                self.agent.finish_episode(transitions, found["reward"], found["worth"])
                yield found | {"shown": demonstrated}

    def _play(
        self, env: PruningEnv, episode: int, example: Sequence[int] | None
    ) -> tuple[tuple[int, ...], list[Transition]]:
        """One episode, by the agent or of widths to be kept: what was decided, and its steps."""
        assert self.agent is not None
        full = env.model.full_widths
        observation, _ = env.reset()
        transitions: list[Transition] = []
        for step, width in enumerate(full):
            even = self.even(env)
            if example is not None:
                fraction = example[step] / width
            else:
                fraction = fraction_of(self.agent.act(observation, episode), self.floor, even)
            after, info = env.choose(fraction)
            action = action_of(info["action"], self.floor, even)
            transitions.append(Transition(observation, action, after, step + 1 == len(full)))
            observation = after
        return env.decided, transitions


class DDPGSearch(AMCSearch):
    """The agent with demonstrations, and, under a budget, with relative actions that imitate its best episodes."""

    def config(self, env: PruningEnv) -> DDPGConfig:
        return super().config(env) if env.budget is None else DDPGConfig.under_budget(self.episodes)

    def even(self, env: PruningEnv) -> float | None:
        return env.even_fraction()

    def shown(self, demonstrations: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return demonstrations
