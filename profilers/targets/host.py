"""The machine that the program stands on."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph
from profilers.processor import this_processor
from profilers.runtimes import load_runtime
from profilers.table import Identity
from profilers.targets import Network, Probe, identity_of
from profilers.targets.models import Models
from profilers.targets.process import run_module
from profilers.timing import TimingPlan, time_interleaved


class HostTarget:
    can_time = True

    def __init__(self, config: DeviceConfig) -> None:
        if config.dtype not in ("float32", "int8"):
            raise UserError(f"device {config.name}: on this machine float32 and int8 are measured, not {config.dtype}")
        self.config = config
        self.runtime = load_runtime(config.runtime)
        self._model = Models(self.runtime, config.dtype)

    def identity(self) -> Identity:
        return identity_of(self.config, soc=this_processor(), runtime_version=self.runtime.version())

    def provenance(self) -> dict[str, Any]:
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return {
            "os": platform.platform(),
            "cores": os.cpu_count(),
            "governor": governor.read_text().strip() if governor.exists() else None,
            "subnormals": "flushed to zero" if self.config.runtime == "onnxruntime" else "flushed in weights only",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def conditions(self) -> dict[str, Any]:
        return {}

    def probes(self) -> list[Probe]:
        probes = [Probe("processor", True, f"{this_processor()}, {os.cpu_count()} cores")]
        try:
            probes.append(Probe("runtime", True, f"{self.config.runtime} {self.runtime.version()}"))
        except DeviceError as error:
            probes.append(Probe("runtime", False, str(error)))
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        busy = load > 0.5 * cores
        advice = ": stop other programs" if busy else ""
        probes.append(Probe("load", not busy, f"{load:.1f} on {cores} cores{advice}"))
        return probes

    def lower(self, graph: OpGraph) -> OpGraph:
        return self.runtime.lower(graph)

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        runs = [self.runtime.loaded(self._model(network), threads=self.config.threads) for network in networks]
        return time_interleaved(runs, plan, seed=seed)

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        if self.config.dtype != "float32":
            return None  # a quantized network's kernels are not its operators, one by one
        model = self._model(Network(graph))
        return self.runtime.profile_ops(model, graph, threads=self.config.threads, time_s=time_s)

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{index}{self.runtime.SUFFIX}" for index in range(len(networks))]
            for path, network in zip(paths, networks, strict=True):
                path.write_bytes(self._model(network))
            job = {
                "runtime": self.config.runtime,
                "threads": self.config.threads,
                "models": [str(path) for path in paths],
                "plan": asdict(plan),
                "seed": seed,
            }
            samples: list[list[float]] = json.loads(run_module("profilers.targets.host", stdin=json.dumps(job)))
        return samples


def _main() -> None:
    """Read a timing job from standard input, write samples to standard output."""
    job = json.load(sys.stdin)
    runtime = load_runtime(job["runtime"])
    runs = [runtime.loaded(Path(path).read_bytes(), threads=job["threads"]) for path in job["models"]]
    json.dump(time_interleaved(runs, TimingPlan(**job["plan"]), seed=job["seed"]), sys.stdout)


if __name__ == "__main__":
    _main()
