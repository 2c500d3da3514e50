"""Hardware-in-the-loop, latency-aware channel pruning."""

from pathlib import Path
from typing import Any

__all__ = ["load_pruned", "save_pruned"]


def load_pruned(policy: str | Path) -> Any:
    """The pruned network of a `policy.json`, in eval mode. `amc_hw.errors.UserError` where it cannot be read, or where
    the network's file that it names is neither in the working folder nor in one above it."""
    from amc_hw.api import load_pruned as load

    return load(policy)


def save_pruned(module: Any, policy: str | Path, out: str | Path) -> Path:
    """Keep what a training loop made of the pruned network of `policy` in the folder `out`, as a policy of its own for
    `export`, `measure`, `search --from-policy`. Its `policy.json`. `amc_hw.errors.UserError` where the weights are of
    another network or not finite, and where `out` holds something else."""
    from amc_hw.api import save_pruned as save

    return save(module, policy, out)
