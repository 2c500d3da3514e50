"""WHERE a network runs. TARGETS is the only place to add one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from profilers.builders.weights import Weights
from profilers.device import DeviceConfig
from profilers.errors import UserError
from profilers.ops import OpGraph
from profilers.table import Identity
from profilers.timing import TimingPlan


@dataclass(frozen=True)
class Probe:
    """One thing that `devices check` looked at. `text` says what was found, or what to do."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Network:
    """A network to time; without weights it gets random ones."""

    graph: OpGraph
    weights: Weights | None = None


class Target(Protocol):
    """A place where networks can be timed. It raises DeviceError where it is not there."""

    config: DeviceConfig
    can_time: bool  #: False where the device is away and only its table is here

    def identity(self) -> Identity: ...

    def provenance(self) -> dict[str, Any]: ...

    def probes(self) -> list[Probe]: ...

    def lower(self, graph: OpGraph) -> OpGraph:
        """The network as the runtime there executes it."""

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        """Milliseconds per network, interleaved; one sample for every round of the plan."""

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        """Milliseconds per node of the lowered network, in context; None where the runtime cannot tell."""

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        """As `time_networks`, in a process that has done nothing else."""


def identity_of(config: DeviceConfig, *, soc: str, runtime_version: str, affinity: str = "any") -> Identity:
    """What measurements with a configuration are of, with what only the device tells."""
    return Identity(
        soc=soc,
        runtime=config.runtime,
        runtime_version=runtime_version,
        threads=config.threads,
        affinity=affinity,
        dtype=config.dtype,
        batch=config.batch,
    )


#: Name in a device's configuration -> module and class.
TARGETS = {
    "host": ("profilers.targets.host", "HostTarget"),
    "fake": ("profilers.targets.fake", "FakeTarget"),
    "adb": ("profilers.targets.adb", "AdbTarget"),
    "archive": ("profilers.targets.archive", "ArchiveTarget"),
}


def open_target(config: DeviceConfig) -> Target:
    """The target that `config` names; UserError where it is unknown."""
    if config.target not in TARGETS:
        raise UserError(f"device {config.name}: unknown target {config.target!r}; known: {', '.join(TARGETS)}")
    module, name = TARGETS[config.target]
    return cast(Target, getattr(importlib.import_module(module), name)(config))
