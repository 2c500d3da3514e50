"""The search: episodes of an agent in a `PruningEnv`, every result journaled before the next begins.

A journal holds what was expensive: widths and accuracy of every episode. To resume, the agent is run again from its
seed and given the recorded accuracies; it then proposes what it would have proposed without the interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amc_hw.env import OBSERVATION, PruningEnv
from amc_hw.errors import FailedError, UserError
from amc_hw.search.ddpg import DDPGAgent, DDPGConfig, Transition


@dataclass(frozen=True)
class Episode:
    widths: tuple[int, ...]
    accuracy: float
    reward: float
    cost: float


class Journal:
    """`metrics.jsonl` of a run: a header that names the search, then one line per episode. A torn last line goes."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.recorded: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and lines[0] != header:
                key = next(key for key in header if lines[0].get(key) != header[key])
                raise UserError(
                    f"{path.parent} holds another search ({key}: {lines[0].get(key)!r}, not {header[key]!r}): "
                    "name another --out"
                )
            self.recorded = lines[1:]
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(len(whole))
            if not lines:
                self._write(header)
        except OSError as error:
            raise FailedError(f"cannot write {path}: {error.strerror}") from error
        except json.JSONDecodeError:
            raise UserError(f"{path} is damaged before its last line: name another --out") from None

    def append(self, row: dict[str, Any]) -> None:
        try:
            self._write(row)
        except OSError as error:
            raise FailedError(f"cannot write {self.path}: {error.strerror}") from error

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def run_search(
    make_env: Callable[[Callable[[Sequence[int]], float]], PruningEnv],
    evaluate: Callable[[Sequence[int]], float],
    journal: Journal,
    *,
    episodes: int,
    floor: float,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> list[Episode]:
    """All episodes, recorded ones first. `make_env` wraps an accuracy function into an environment."""
    recorded = iter(list(journal.recorded))

    def remembered(widths: Sequence[int]) -> float:
        known = next(recorded, None)
        if known is None:
            result = evaluate(widths)
            journal.append({"widths": list(widths), "accuracy": result})
            return result
        if known["widths"] != list(widths):
            raise UserError(f"{journal.path} was not made by this search on this machine and table: name another --out")
        return float(known["accuracy"])

    env = make_env(remembered)
    agent = DDPGAgent(DDPGConfig(episodes=episodes), observation_size=len(OBSERVATION), floor=floor, seed=seed)
    found = []
    for episode in range(episodes):
        observation, _ = env.reset()
        transitions: list[Transition] = []
        done = False
        while not done:
            action = agent.act(observation, episode)
            after, reward, done, _, info = env.step([action])
            transitions.append(Transition(observation, info["action"], after, done))
            observation = after
        agent.finish_episode(transitions, float(reward))
        found.append(Episode(tuple(info["widths"]), info["accuracy"], float(reward), info["cost"]))
        progress(episode + 1, episodes, max(one.accuracy for one in found))
    return found
