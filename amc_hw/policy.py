"""A policy: how many channels, and which, every group keeps, with where it came from. Stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from amc_hw.errors import UserError
from amc_hw.runs import save_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Policy:
    """widths and kept: by group name; kept are channel indices, ascending. weights: file beside the policy.

    mean, std: what images in [0, 1] are normalised by. data: where the network's images come from, None where
    evaluate and calibrate, functions of the user's own, do without. keep: patterns of modules left at full width.
    threads: of the runtime that it was searched for. network: digest of the unpruned network's operators. sources:
    SHA-256 of the Python files that model, evaluate and calibrate name. Older policies say none of these three.
    """

    model: str
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str | None
    widths: dict[str, int]
    kept: dict[str, list[int]]
    checkpoint_sha256: str | None
    device: str
    dtype: str
    weights: str = "pruned.pt"
    evaluate: str | None = None
    calibrate: str | None = None
    keep: tuple[str, ...] = ()
    threads: int | None = None
    network: str | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def kept_arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(channels, dtype=np.int64) for name, channels in self.kept.items()}

    def save(self, path: Path) -> None:
        save_json(path, {"schema_version": SCHEMA_VERSION, **asdict(self)})


def policy_file(path: Path) -> Path:
    """The file, of a folder that of its policy."""
    return path / "policy.json" if path.is_dir() else path


def load_policy(path: Path) -> Policy:
    """A `policy.json`, or that of a folder; UserError where it is none."""
    path = policy_file(path)
    try:
        data: Any = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
        if "schema_version" not in data:
            raise ValueError("it has no schema_version")
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path}: not of schema version {SCHEMA_VERSION}")
        if unknown := sorted(data.keys() - {each.name for each in fields(Policy)}):
            raise ValueError(f"unknown key {unknown[0]!r}")
        tuples = {name: tuple(data[name]) for name in ("input_shape", "mean", "std")}
        found = Policy(**data | tuples | {"keep": tuple(data.get("keep", ()))})
        if not all(isinstance(text, str) for text in (found.model, found.device, found.dtype, found.weights)):
            raise ValueError("model, device, dtype and weights must be strings")
        if not all(isinstance(digest, str) for digest in found.sources.values()):
            raise ValueError("sources must be checksums by name")
        if not isinstance(found.threads, int | None):
            raise ValueError("threads must be a number or null")
        if not all(
            isinstance(text, str | None) for text in (found.data, found.evaluate, found.calibrate, found.network)
        ):
            raise ValueError("data, evaluate, calibrate and network must be strings or null")
        if {name: len(channels) for name, channels in found.kept.items()} != found.widths:
            raise ValueError("widths are not the numbers of channels kept")
        if not all(type(channel) is int for channels in found.kept.values() for channel in channels):
            raise ValueError("channels must be whole numbers")
        return found
    except OSError as error:
        raise UserError(f"cannot read policy {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a policy: {error}") from None
