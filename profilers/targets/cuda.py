"""An NVIDIA GPU in this machine.

Times are of one inference of a batch, by CUDA events or by the host's clock. Rounds in which the GPU had to slow down
are measured again, and given up with DeviceError where it keeps slowing.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from profilers.builders.weights import random_weights
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.gpu import CAPABILITY, Gpu, GpuState, Loaded, TorchGpu, harmful
from profilers.ops import OpGraph
from profilers.processor import this_processor
from profilers.runtimes import lowered
from profilers.table import Identity
from profilers.targets import Network, Probe, identity_of
from profilers.targets.process import run_module
from profilers.timing import TimingPlan

#: Name in a device's configuration -> module, with `version`, `check`, `settings` and `loaded`.
RUNTIMES = {"torch_cuda": "profilers.runtimes.torch_cuda", "onnxruntime": "profilers.runtimes.ort_cuda"}
DTYPES = ("float32", "tf32", "float16", "bfloat16")
LAYOUTS, CLOCKS = ("channels_first", "channels_last"), ("events", "host")
WARM_S, MOST_WARM_S, WARM_SPREAD = 0.1, 5.0, 0.02  #: at least; at most; of the last WARM_BURSTS
WARM_RUNS, WARM_BURSTS = 10, 3  #: of a burst while warming up; that have to be alike
WAITS_S = (1.0, 5.0, 15.0, 30.0)  #: for a GPU that slows down
PROFILED_RUNS = 10
BUSY = 0.7  #: share of a network's time in which its kernels run, below which it is worth a warning
WAITING = (
    "kernels take less than 70% of some networks' time: in the rest the GPU waits for launches, which pruning channels "
    'does not shorten and a table of kernels does not know (execution = "graph" takes them out)'
)
#: What libraries say when memory is short.
FULL = ("out of memory", "failed to allocate", "alloc_failed", "unable to find an engine")


class CudaTarget:
    can_time = True

    def __init__(
        self, config: DeviceConfig, gpu: Gpu | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        for key, value, known in (
            ("runtime", config.runtime, tuple(RUNTIMES)),
            ("dtype", config.dtype, DTYPES),
            ("layout", config.layout, LAYOUTS),
            ("clock", config.clock, CLOCKS),
        ):
            if value not in known:
                raise UserError(f"device {config.name}: on a GPU {key} is one of {', '.join(known)}, not {value!r}")
        self.config, self._given, self._sleep = config, gpu, sleep
        self._runtime: Any = importlib.import_module(RUNTIMES[config.runtime])
        self._last: GpuState | None = None

    @cached_property
    def gpu(self) -> Gpu:
        gpu = TorchGpu(self.config.gpu) if self._given is None else self._given
        name = gpu.info().name
        if self.config.soc.lower() not in name.lower():
            raise DeviceError(
                f"the GPU here is a {name}, device {self.config.name} is a {self.config.soc}: --device cuda takes any"
            )
        have, need = gpu.info().capability, CAPABILITY.get(self.config.dtype, (0, 0))
        if have < need:
            raise DeviceError(
                f"a {name} has no {self.config.dtype}: compute capability {_dotted(need)} has, it is {_dotted(have)}"
            )
        self._runtime.check(self.config, gpu.info())
        return gpu

    @cached_property
    def _others(self) -> list[str]:
        """Before anything of ours runs there."""
        return self.gpu.others()

    # What is there

    @property
    def _choices(self) -> str:
        """What the version of a runtime leaves open, and times depend on."""
        l2 = "L2 flushed" if self.config.flush_l2 else "L2 warm"
        events = self.config.clock == "events"
        clock = "GPU events" if events else "host clock, launches included"
        launches = self.config.execution != "graph" or not events  # which the GPU may wait for
        by = f", launched by {this_processor()}" if launches else ""
        return f"driver {self.gpu.info().driver}, {self.config.layout}, {clock}, {l2}{by}"

    def identity(self) -> Identity:
        version = self._runtime.version(self.config)
        _ = self._others  # looked for now: later, processes of a search may be among them
        return identity_of(self.config, soc=self.gpu.info().name, runtime_version=f"{version}, {self._choices}")

    def provenance(self) -> dict[str, Any]:
        info = self.gpu.info()
        return {
            "capability": _dotted(info.capability),
            "multiprocessors": info.multiprocessors,
            "memory_mb": info.memory_mb,
            "others": self._others,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.conditions(),
        }

    def conditions(self) -> dict[str, Any]:
        return (self._last or self.gpu.state()).to_json()

    def probes(self) -> list[Probe]:
        looks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
            ("gpu", lambda: (True, f"{self.gpu.info().name}, {self.gpu.info().memory_mb} MiB")),
            ("runtime", lambda: (True, f"{self.config.runtime} {self._runtime.version(self.config)}")),
            ("clocks", self._clocks),
            ("others", lambda: (not self._others, ", ".join(self._others) or "none")),
        ]
        probes = []
        for name, look in looks:
            try:
                probes.append(Probe(name, *look()))
            except DeviceError as error:
                probes.append(Probe(name, False, str(error)))
                break
        return probes

    def _clocks(self) -> tuple[bool, str]:
        state = self.gpu.state()
        slowed = f", slowed: {', '.join(state.slowed)}" if state.slowed else ""
        told = ((state.sm_mhz, "MHz"), (state.temperature_c, "degrees"), (state.power_w, "W"))
        text = ", ".join(f"{value:.0f} {unit}" for value, unit in told if value is not None)
        return not harmful([state]), (text or "not told") + slowed

    def _alone(self) -> None:
        self._runtime.version(self.config)  # what is not there, or none, before anything runs
        if self._others:
            who = ", ".join(self._others)
            if not self.config.shared:
                raise DeviceError(
                    f"the GPU is busy ({who}): stop what runs there, choose another with 'gpu', or accept it with "
                    f"'shared = true' in the configuration of {self.config.name}"
                )
            warnings.warn(f"others use the GPU ({who}): times may be theirs, too", stacklevel=3)

    # Timing

    def lower(self, graph: OpGraph) -> OpGraph:
        return lowered(self.config.runtime, graph)

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        self._alone()
        with self._in_memory(), self._runtime.settings(self.config), self.gpu.working():
            loaded = [self._load(network) for network in networks]
            counts = [self._burst(each, plan) for each in loaded]
            self._warm_up(loaded[0])
            order = np.random.default_rng(seed)
            samples: list[list[float]] = [[] for _ in loaded]
            for _ in range(plan.rounds):
                found = self._unslowed(lambda: self._round(loaded, counts, order.permutation(len(loaded))))
                for each, ms in zip(samples, found, strict=True):
                    each.append(ms)
            return samples

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        """A network that does not fit is an error of one line, and what it took is given back."""
        try:
            yield
        except Exception as error:  # out of memory comes as several classes, of two libraries
            # while a graph is captured what follows from it comes last
            text = " ".join(f"{error} {error.__context__}".split()).lower()
            if not any(words in text for words in FULL):
                raise
            raise DeviceError(
                f"the GPU's memory ({self.gpu.info().memory_mb} MiB) is too small for batch {self.config.batch}: set a "
                f"smaller 'batch' in the configuration of {self.config.name}"
            ) from None

    def _load(self, network: Network, *, labelled: bool = False) -> Loaded:
        weights = random_weights(network.graph) if network.weights is None else network.weights
        found: Loaded = self._runtime.loaded(network.graph, weights, self.config, self.gpu.device, labelled=labelled)
        return found

    def _time(self, loaded: Loaded, count: int) -> list[float]:
        return self.gpu.time(loaded, count, flush=self.config.flush_l2, host=self.config.clock == "host")

    def _burst(self, loaded: Loaded, plan: TimingPlan) -> int:
        """Runs of one visit."""
        once = float(np.median(self._time(loaded, plan.warmup_runs + 1)[1:]))
        return int(np.clip(1e3 * plan.burst_s / max(once, 1e-6), plan.min_runs, plan.max_runs))

    def _warm_up(self, loaded: Loaded) -> None:
        """Until clocks have risen and stay: three bursts alike."""
        recent: list[float] = []
        spent = 0.0
        while spent < WARM_S or len(recent) < WARM_BURSTS or np.ptp(recent[-WARM_BURSTS:]) > WARM_SPREAD * recent[-1]:
            found = self._time(loaded, WARM_RUNS)
            recent.append(float(np.median(found)))
            spent += sum(found) / 1000
            if spent > MOST_WARM_S:
                return

    def _round(self, loaded: Sequence[Loaded], counts: Sequence[int], order: np.ndarray) -> list[float]:
        found = [0.0] * len(loaded)
        for index in order:
            ms = self._time(loaded[index], counts[index] + 1)[1:]  # the first brings its data back into the caches
            found[index] = float(np.median(ms))
        return found

    def _unslowed(self, measure: Callable[[], list[float]]) -> list[float]:
        """What `measure` returns, from a time in which the GPU did not slow down."""
        for wait_s in (*WAITS_S, None):
            before = self.gpu.state()
            found = measure()
            self._last = self.gpu.state()
            why = ", ".join(harmful([before, self._last]))
            if not why:
                return found
            if wait_s is not None:
                warnings.warn(f"the GPU slows down ({why}): measuring again in {wait_s:.0f} s", stacklevel=2)
                self._sleep(wait_s)
        raise DeviceError(f"the GPU keeps slowing down ({why}): let it cool, or give it power, and run this again")

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        """Kernel time per node while PyTorch runs them one by one; a CUDA graph replays the same kernels. Elsewhere
        kernels are not of one operator."""
        if self.config.runtime != "torch_cuda" or self.config.execution == "compile":
            return None
        self._alone()
        with self._in_memory(), self._runtime.settings(self.config), self.gpu.working():
            loaded = self._load(Network(graph), labelled=True)
            ms = float(np.median(self._time(loaded, PROFILED_RUNS)))
            found = self.gpu.kernels(loaded, PROFILED_RUNS)
        if unseen := [node.name for node in graph.nodes if node.op.macs and not found.get(node.name)]:
            raise DeviceError(
                f"PyTorch's profiler sees no kernels of {unseen[0]}, and {len(unseen) - 1} others: does another "
                "program profile this GPU, or is CUPTI not allowed here? 'profile --way alone' does without"
            )
        if self.config.execution == "eager" and sum(found.values()) < BUSY * ms:
            warnings.warn(WAITING, stacklevel=2)
        return found

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        import torch

        self._alone()
        with tempfile.TemporaryDirectory() as folder:
            job, result = Path(folder, "job.pt"), Path(folder, "result.json")
            weights = [
                None if each.weights is None else {name: dict(arrays) for name, arrays in each.weights.items()}
                for each in networks
            ]
            graphs = [each.graph.to_json() for each in networks]
            parts = {"config": asdict(self.config), "graphs": graphs, "weights": weights, "plan": asdict(plan)}
            torch.save(parts | {"seed": seed}, job)
            run_module("profilers.targets.cuda", str(job), str(result))
            samples: list[list[float]] = json.loads(result.read_text())
        return samples


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _main(job: str, result: str) -> None:
    """Time what a file says, write samples to another."""
    import torch

    found = torch.load(job, weights_only=False)
    config = DeviceConfig(**(found["config"] | {"shared": True}))
    pairs = zip(found["graphs"], found["weights"], strict=True)
    networks = [Network(OpGraph.from_json(graph), weights) for graph, weights in pairs]
    samples = CudaTarget(config).time_networks(networks, TimingPlan(**found["plan"]), seed=found["seed"])
    Path(result).write_text(json.dumps(samples))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
