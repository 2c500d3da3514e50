"""WHERE a network runs. TARGETS is the only place to add one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from profilers.builders.weights import Weights
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
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

    def conditions(self) -> dict[str, Any]:
        """What changes from one measurement to the next (clocks, temperatures, battery), where the device tells."""

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
    "cuda": ("profilers.targets.cuda", "CudaTarget"),
    "adb": ("profilers.targets.adb", "AdbTarget"),
    "archive": ("profilers.targets.archive", "ArchiveTarget"),
}


def open_target(config: DeviceConfig) -> Target:
    """The target that `config` names; UserError where it is unknown."""
    if config.target not in TARGETS:
        raise UserError(f"device {config.name}: unknown target {config.target!r}; known: {', '.join(TARGETS)}")
    module, name = TARGETS[config.target]
    return cast(Target, getattr(importlib.import_module(module), name)(config))


def open_targets(config: DeviceConfig) -> list[Target]:
    """The targets of all devices that `config` names, those that answer; DeviceError where none does, or where they are
    not alike."""
    targets = [open_target(member) for member in config.members()]
    if len(targets) == 1:
        return targets
    found: list[Target] = []
    away: DeviceError | None = None
    for target in targets:
        try:
            identity = target.identity()
        except DeviceError as error:
            warnings.warn(f"one of {config.name}'s devices is left out: {error}", stacklevel=2)
            away = error
            continue
        if found and identity != found[0].identity():
            first, other = asdict(found[0].identity()), asdict(identity)
            unlike = [f"{key} {other[key]}, not {first[key]}" for key in first if first[key] != other[key]]
            raise DeviceError(
                f"device {config.name}: {target.config.serial} is not like {found[0].config.serial} "
                f"({'; '.join(unlike)}): leave it out"
            )
        found.append(target)
    if away is not None and not found:
        raise away
    return found
