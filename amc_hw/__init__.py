"""Hardware-in-the-loop, latency-aware channel pruning."""

from pathlib import Path
from typing import Any

__all__ = ["load_pruned"]


def load_pruned(policy: str | Path) -> Any:
    """The pruned network of a `policy.json`, in eval mode. `amc_hw.errors.UserError` where it cannot be read, or where
    the network's file that it names is neither in the working folder nor in one above it."""
    from amc_hw.api import load_pruned as load

    return load(policy)
