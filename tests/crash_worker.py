"""A tiny network with fixed weights, its images, and a process in which commands are killed while they write.

As a script it imports torch once, reads jobs from standard input, one JSON object a line, runs each in a forked
child, and answers with how the child ended: {"code": exit code, negative for a signal}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CLASSES = 4
SHAPE = (3, 16, 16)
EPISODES = 12
SYNCED = "synced"  #: file in a job's folder: size of the journal after every sync that was not interrupted


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """Three groups of 32, 32 and 48 channels; a factory as a user would write one, weights included."""
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    ]
    net = nn.Sequential(*layers).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                scale = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.from_numpy(scale * rng.standard_normal(parameter.shape)))
            else:
                parameter.copy_(torch.from_numpy(rng.uniform(0.5, 1.0, parameter.shape)))
        outputs = net((_images(200) - 0.5) / 0.25)
        net[-1].bias -= outputs.mean(0)  # no class wins always
    net.mean, net.std = (0.5,) * 3, (0.25,) * 3
    return net, torch.zeros(1, *SHAPE)


def _images(count: int) -> torch.Tensor:
    """Coarse patterns, (N, 3, 16, 16) in [0, 1]."""
    coarse = np.random.default_rng(1).uniform(0, 1, (count, 3, 2, 2))
    return torch.from_numpy(coarse.repeat(8, axis=2).repeat(8, axis=3)).float()


def write_images(path: Path) -> None:
    """An `npz:` data set whose labels are what `tiny` says, so that its accuracy is 1."""
    images = _images(260)
    with torch.no_grad():
        labels = tiny()[0]((images - 0.5) / 0.25).argmax(1).numpy()
    images = images.numpy()
    parts = {"train": slice(0, 100), "val": slice(100, 180), "test": slice(180, 260)}
    arrays = {f"x_{name}": images[part] for name, part in parts.items()}
    np.savez(path, **arrays, **{f"y_{name}": labels[part] for name, part in parts.items()})


def _die_at(number: int, journal: Path, *, torn: bool, seed: int) -> None:
    """Kill this process at the `number`-th write: after it, or, `torn`, with a random part of it on the disk."""
    rng, left = random.Random(seed), number
    real_fsync, real_replace = os.fsync, os.replace
    log = os.open(SYNCED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def fsync(descriptor: int) -> None:
        nonlocal left
        left, file = left - 1, os.fstat(descriptor)
        if left == 0:
            if torn:
                data = Path(f"/proc/self/fd/{descriptor}").read_bytes()
                os.ftruncate(descriptor, rng.randrange(data.rfind(b"\n", 0, -1) + 1, len(data)))
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)
        if file.st_ino == journal.stat().st_ino:
            os.write(log, f"{file.st_size}\n".encode())

    def replace(source: Any, target: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if torn:
                os.truncate(source, rng.randrange(os.path.getsize(source)))
            else:
                real_replace(source, target, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(source, target, **options)

    os.fsync, os.replace = fsync, replace


def _run(job: dict[str, Any]) -> None:
    from amc_hw import api

    os.chdir(job["folder"])
    if job["kill_at"] is not None:
        _die_at(job["kill_at"], Path(job["journal"]), torn=job["torn"], seed=job["seed"])
    subject = api.open_subject(device="fake", model=f"{Path(__file__).resolve()}:tiny")
    if job["command"] == "profile":
        api.profile(subject, progress=_quiet)
    else:
        config = api.SearchConfig(Path("run"), data=f"npz:{job['data']}", latency_ratio=0.6, episodes=EPISODES)
        api.search(subject, config, progress=_quiet)


def _quiet(done: int, total: int, text: str) -> None:
    """Nobody looks."""


def main() -> None:
    import amc_hw.api  # noqa: F401  once, before the forks

    torch.set_num_threads(1)  # a fork keeps no pool of threads
    torch.optim.Adam([torch.zeros(1)])  # imports much at first use, too
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _run(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
