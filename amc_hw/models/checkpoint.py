"""Load a checkpoint's weights into a module, strictly, and say in one line where they do not fit."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amc_hw.errors import UserError
from amc_hw.specs import one_line


def load_checkpoint(module: nn.Module, file: str | Path) -> str:
    """Copy the weights in `file` into `module` (in place) and return the file's SHA-256, in hex.

    The file is a state dict, or a dict that holds one under `state_dict` or `model`; a `module.` before every
    key (DataParallel) is dropped. Only tensors are unpickled.

    Raises:
        UserError: the file is missing or no checkpoint, a key is missing, unexpected or of another shape, or a weight
            is not finite; then `module` is as it was.
    """
    path = Path(file).expanduser()
    digest = checkpoint_sha256(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # unpickling an arbitrary file fails in arbitrary ways
        raise UserError(
            f"{str(file)!r} is not a checkpoint of tensors alone ({one_line(exc).partition('. ')[0]}): "
            "write one with torch.save(model.state_dict(), FILE)"
        ) from exc
    weights = _state_dict(content, file, expected=module.state_dict())
    if bad := not_finite(module, weights):
        raise UserError(f"{str(file)!r} holds weights that are no finite numbers: {bad[0]}")
    try:
        module.load_state_dict(weights)
    except Exception as exc:  # a module may have loading of its own
        raise UserError(f"{str(file)!r} cannot be loaded into the model: {one_line(exc)}") from exc
    return digest


def put_back(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into a module what a state dict of its own held: the versions of modules, by which some are loaded, are its
    own."""
    state = module.state_dict()
    state.update(weights)
    module.load_state_dict(state)


def not_finite(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Which of a module's parameters and running statistics are not finite in `weights`; a mask may hold -inf."""
    names = {name for name, _ in module.named_parameters()}
    names |= {name for name in weights if name.endswith(("running_mean", "running_var"))}
    return [name for name, value in weights.items() if name in names and not bool(torch.isfinite(value).all())]


def checkpoint_sha256(file: str | Path) -> str:
    """SHA-256 of a file in hex; UserError where it cannot be read."""
    try:
        with Path(file).expanduser().open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise UserError(f"cannot read checkpoint {str(file)!r}: {exc.strerror or exc}") from exc


def _state_dict(content: Any, file: str | Path, *, expected: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{str(file)!r} holds no state dict but a {type(content).__name__} of no use here")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{str(file)!r} holds no state dict: {key!r} is a {type(value).__name__}, not a tensor")
    weights = OrderedDict(content)
    versions = getattr(content, "_metadata", None)  # of the modules that it was made of: some are loaded by it
    prefix = "module."
    if all(key.startswith(prefix) for key in weights) and not any(key.startswith(prefix) for key in expected):
        weights = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items())
        if versions is not None:
            versions = {key.removeprefix("module").removeprefix("."): value for key, value in versions.items()}
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):  # absent in old checkpoints, and of no use in evaluation
            weights.setdefault(key, value)
    wrong = [key for key in expected if key not in weights or weights[key].shape != expected[key].shape]
    wrong += [key for key in weights if key not in expected]
    if wrong:
        first = wrong[0]
        more = f", and {len(wrong) - 1} more keys differ" if len(wrong) > 1 else ""
        raise UserError(
            f"{str(file)!r} does not fit the model: {first} is {_shape(weights.get(first))} in the file and "
            f"{_shape(expected.get(first))} in the model{more}; check the model's name and options"
        )
    if versions is not None:
        weights._metadata = versions  # type: ignore[attr-defined]
    return weights


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
