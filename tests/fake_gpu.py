"""A GPU that is not there: networks run on the CPU once, times follow from a formula with waves, states from a list."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from profilers.gpu import GpuInfo, GpuState, Loaded
from profilers.ops import OpSpec

WAVE = 32  #: output channels are worked on in blocks of it
CAPABILITIES = {"NVIDIA TITAN Xp": (6, 1), "Tesla T4": (7, 5)}
COOL = GpuState(1800, 2600, 50, 180.0)


def op_ms(op: OpSpec) -> float:
    """Kernels as long as full waves of them, and no shorter than a launch."""
    full = -(-op.out_channels // WAVE) * WAVE / op.out_channels
    return 0.004 + op.batch * op.macs * full / 5e8


class FakeGpu:
    """states: what `state` gives, the last for ever; cold: how many runs it takes until clocks are up; memory: of runs,
    in activations, above which it is out of memory; waits_ms: for launches, in a run;
    profiler: whether it sees kernels."""

    device = "cpu"

    def __init__(
        self,
        name: str = "NVIDIA TITAN Xp",
        *,
        states: tuple[GpuState, ...] = (COOL,),
        others: tuple[str, ...] = (),
        cold: int = 20,
        memory: float = float("inf"),
        waits_ms: float = 0.0,
        profiler: bool = True,
    ) -> None:
        self.name, self.states, self._others, self.cold, self.memory = name, list(states), list(others), cold, memory
        self.waits_ms, self.profiler = waits_ms, profiler
        self.asked: list[tuple[int, bool, bool]] = []

    def info(self) -> GpuInfo:
        return GpuInfo(self.name, "GPU-0", "550.1", CAPABILITIES.get(self.name, (8, 0)), 30, 12000)

    def state(self) -> GpuState:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def others(self) -> list[str]:
        return list(self._others)

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time(self, loaded: Loaded, count: int, *, flush: bool, host: bool) -> list[float]:
        self.asked.append((count, flush, host))
        op = loaded.graph.nodes[0].op
        if op.batch * op.out_channels * op.out_height * op.out_width > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        loaded.run()
        total = sum(op_ms(op) for op in loaded.graph.ops) + (0.05 if host else 0.01) + (0.02 if flush else 0.0)
        total += self.waits_ms
        rng = np.random.default_rng([len(self.asked), zlib.crc32(repr(loaded.graph.ops).encode())])
        found = []
        for _ in range(count):
            slow = 1 + self.cold / 20 if self.cold > 0 else 1.0
            self.cold -= 1
            found.append(float(total * slow * (1 + 0.001 * rng.standard_normal())))
        return found

    def kernels(self, loaded: Loaded, count: int) -> dict[str, float]:
        loaded.run()
        return {node.name: op_ms(node.op) if self.profiler else 0.0 for node in loaded.graph.nodes}


def sleeps() -> tuple[list[float], Callable[[float], None]]:
    slept: list[float] = []
    return slept, slept.append
