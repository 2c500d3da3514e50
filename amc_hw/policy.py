"""A policy: how many channels, and which, every group keeps, with where it came from. Stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amc_hw.errors import FailedError, UserError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Policy:
    """widths and kept: by group name; kept are channel indices, ascending. weights: file beside the policy."""

    model: str
    input_shape: tuple[int, ...]
    widths: dict[str, int]
    kept: dict[str, list[int]]
    checkpoint_sha256: str | None
    device: str
    dtype: str
    weights: str = "pruned.pt"

    def save(self, path: Path) -> None:
        try:
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1))
            part.replace(path)
        except OSError as error:
            raise FailedError(f"cannot write {path}: {error.strerror}") from error


def load_policy(path: Path) -> Policy:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path}: not of schema version {SCHEMA_VERSION}")
        return Policy(**data | {"input_shape": tuple(data["input_shape"])})
    except OSError as error:
        raise UserError(f"cannot read policy {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a policy: {error}") from None
