"""A device that is not there: latencies follow from a formula, staircases and all, and never change.

A first-class target, so that the whole program runs without hardware and its tests know the right answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from profilers.device import DeviceConfig
from profilers.ops import GROUPED_KINDS, OpGraph, OpSpec
from profilers.table import Identity
from profilers.targets import Network, Probe
from profilers.timing import TimingPlan

STEP = 8  #: widths are executed in blocks of this many channels
DISPATCH_MS = 0.002  #: per operator
MACS_PER_MS = 4e6
OVERHEAD_MS = 0.01  #: per network
PROPORTIONAL = "flops"  #: a runtime whose latency is proportional to the MACs
JITTER = 0.002  #: relative


def op_latency_ms(op: OpSpec, formula: str = "formula") -> float:
    """Blocks of STEP channels cost as if they were full; everything that is not a product costs its memory.

    PROPORTIONAL: a product costs its MACs and nothing else costs anything.
    """
    if formula == PROPORTIONAL:
        return op.macs / MACS_PER_MS
    if op.macs == 0:
        return DISPATCH_MS + sum(op.in_channels) * op.height * op.width * 1e-8
    full_in, full_out = (-(-channels // STEP) * STEP for channels in (op.in_channels[0], op.out_channels))
    share = full_out / op.out_channels * (1 if op.kind in GROUPED_KINDS else full_in / op.in_channels[0])
    slow = 3.0 if op.kind == "depthwise_conv" else 1.0
    return DISPATCH_MS + op.macs * share * slow / MACS_PER_MS


class FakeTarget:
    can_time = True

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config

    def identity(self) -> Identity:
        config = self.config
        return Identity("fake", config.runtime, "1", config.threads, dtype=config.dtype, batch=config.batch)

    def provenance(self) -> dict[str, Any]:
        blocks = "" if self.config.runtime == PROPORTIONAL else f"blocks of {STEP} channels, "
        return {"formula": f"{blocks}{MACS_PER_MS:.0f} MACs per ms"}

    def conditions(self) -> dict[str, Any]:
        return {}

    def probes(self) -> list[Probe]:
        return [Probe("formula", True, "always there; nothing is measured")]

    def lower(self, graph: OpGraph) -> OpGraph:
        return graph

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        result = []
        for network in networks:
            total = sum(op_latency_ms(op, self.config.runtime) for op in network.graph.ops)
            total += 0 if self.config.runtime == PROPORTIONAL else OVERHEAD_MS
            rng = np.random.default_rng([seed, zlib.crc32(repr(network.graph.ops).encode())])
            result.append([float(total * (1 + JITTER * x)) for x in rng.standard_normal(plan.rounds)])
        return result

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        return {node.name: op_latency_ms(node.op, self.config.runtime) for node in graph.nodes}

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        return self.time_networks(networks, plan, seed=seed)
