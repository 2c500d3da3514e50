"""What is pushed or loaded to be timed: the artifacts of networks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from profilers.builders.weights import Weights, random_weights
from profilers.ops import OpGraph
from profilers.runtimes import Runtime
from profilers.targets import Network

KEPT = 4  #: of networks without weights: the unpruned one comes again and again


class Models:
    """Builds networks for one runtime, quantized where `dtype` is int8; without weights they get random ones."""

    def __init__(self, runtime: Runtime, dtype: str) -> None:
        self.runtime, self.dtype = runtime, dtype
        self._random = lru_cache(KEPT)(lambda graph: self._built(graph, random_weights(graph)))

    def __call__(self, network: Network) -> bytes:
        return self._random(network.graph) if network.weights is None else self._built(network.graph, network.weights)

    def _built(self, graph: OpGraph, weights: Weights) -> bytes:
        model = self.runtime.build(graph, weights)
        if self.dtype != "int8":  # a runtime computes in others by itself
            return model
        rng, batch = np.random.default_rng(0), graph.nodes[0].op.batch
        inputs = [rng.standard_normal((batch, *shape)).astype(np.float32) for shape in graph.inputs.values()]
        return self.runtime.quantized(model, [inputs])
