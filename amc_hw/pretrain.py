"""The default network's checkpoint: trained on `digits` at first use, kept in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from amc_hw.choices import DEFAULT_DATA, DEFAULT_MODEL
from amc_hw.data import load_data, load_tensors
from amc_hw.errors import FailedError, UserError
from amc_hw.models import has_own_weights, load_model
from amc_hw.runs import Progress, silent

EPOCHS = 40


def data_for(model: str, data: str | None, *functions: str | None) -> str | None:
    """The data set that was named, or the default network's own where nothing was; UserError where another network has
    neither data nor `functions` in their place."""
    if data is not None or any(functions):
        return data
    if model != DEFAULT_MODEL:
        missing = "--data is missing (or --evaluate and --calibrate)"
        raise UserError(f"{missing}: {DEFAULT_DATA}, the default, goes with {DEFAULT_MODEL} alone")
    return DEFAULT_DATA


def checkpoint_for(
    model: str, data: str | None, checkpoint: Path | None, *, progress: Progress = silent
) -> Path | None:
    """The weights to search with: those given, the default network's own, or None for a factory that loads its own.

    progress: told of the default network's training (done, total, what there is to say).
    UserError where there would be random weights only.
    """
    if checkpoint is not None or has_own_weights(model):
        return checkpoint
    if (model, data) == (DEFAULT_MODEL, DEFAULT_DATA):
        return default_checkpoint(progress)
    load_model(model)  # where that is mistyped, it comes first
    raise UserError(f"--checkpoint is missing: the weights of {model} would be random")


def default_checkpoint(progress: Progress = silent) -> Path:
    """The trained default network; a minute of training where it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "amc-hw" / "mobilenet_v1_cifar-0.25-digits.pt"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(_trained(progress).state_dict(), part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise FailedError(f"cannot keep the trained default network at {path}: {error}") from None
    return path


def _trained(progress: Progress, *, seed: int = 0, batch: int = 64) -> nn.Module:
    model = load_model(DEFAULT_MODEL, seed=seed)
    images, labels = load_tensors(load_data(DEFAULT_DATA, input_shape=model.input_shape).train)
    images = model.normalised(images)
    module = model.module.train()
    steps = EPOCHS * (len(images) // batch)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        progress(epoch, EPOCHS, "training the default network, this once")
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            loss = nn.functional.cross_entropy(module(images[chosen].roll(shift, (2, 3))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return module.eval()
