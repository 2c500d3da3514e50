"""A device that is not here: its table was measured elsewhere, or imported from logs, and nothing can be added by
timing. Predictions work; whatever needs the device says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph
from profilers.runtimes import lowered
from profilers.table import Identity
from profilers.targets import Network, Probe, identity_of
from profilers.timing import TimingPlan


class ArchiveTarget:
    can_time = False

    def __init__(self, config: DeviceConfig) -> None:
        for key in ("soc", "runtime_version"):
            if not getattr(config, key):
                raise UserError(f"device {config.name}: an archive needs {key}: there is no device to ask")
        self.config = config

    def identity(self) -> Identity:
        return identity_of(self.config, soc=self.config.soc, runtime_version=self.config.runtime_version)

    def provenance(self) -> dict[str, Any]:
        return {"description": self.config.description, "source": self.config.source}

    def conditions(self) -> dict[str, Any]:
        return {}

    def probes(self) -> list[Probe]:
        return [Probe("device", False, self._absent)]

    @property
    def _absent(self) -> str:
        adds = ", 'import-log' adds to it" if self.config.runtime in ("tflite", "litert") else ""
        return (
            f"{self.config.name} is an archive: the device is not here and cannot be timed; 'predict' and 'search' "
            f"work from its table{adds}"
        )

    def _refuse(self) -> NoReturn:
        raise DeviceError(self._absent)

    def lower(self, graph: OpGraph) -> OpGraph:
        return lowered(self.config.runtime, graph)

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        self._refuse()

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        self._refuse()

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        self._refuse()
