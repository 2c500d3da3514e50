"""HOW a network runs. A runtime is a module with the functions of `Runtime`; RUNTIMES is the only place to add one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np

from profilers.builders.weights import Weights
from profilers.errors import UserError
from profilers.ops import OpGraph

RUNTIMES = {"onnxruntime": "profilers.runtimes.ort", "litert": "profilers.runtimes.litert"}


class Runtime(Protocol):
    """What a runtime module offers."""

    SUFFIX: str  #: of its model files

    def version(self) -> str:
        """The runtime's version; DeviceError where it is not installed."""

    def build(self, graph: OpGraph, weights: Weights) -> bytes:
        """The artifact of a network."""

    def quantized(self, model: bytes, samples: Sequence[Sequence[np.ndarray]], *, int8_io: bool = False) -> bytes:
        """The float32 model as int8: weights per output channel, activations by what `samples` of its inputs make of
        them, float32 inputs and outputs. DeviceError where the runtime's own tool is not installed."""

    def quantization(self, model: bytes) -> dict[str, tuple[float, int]]:
        """(scale, zero point) of the inputs and outputs that are int8, by name: a number is (stored - zero) * scale."""

    def labelled(self, model: bytes, key: str, text: str) -> bytes:
        """A model of `build` with a text in its metadata, which `quantized` keeps."""

    def lower(self, graph: OpGraph) -> OpGraph:
        """The network as this runtime executes it, fusions included."""

    def loaded(self, model: bytes, *, threads: int, seed: int = 0) -> Callable[[], None]:
        """A function that runs the model once on fixed random input; inputs and outputs stay where they are."""

    def session(self, model: bytes) -> Callable[..., list[np.ndarray]]:
        """A function of the model's float32 inputs, (N, C, H, W) or (N, C) each: images and vectors likewise."""

    def profile_ops(self, model: bytes, graph: OpGraph, *, threads: int, time_s: float) -> dict[str, float] | None:
        """Milliseconds per node of the lowered network while the whole network runs; None where it cannot tell."""


def lowered(name: str, graph: OpGraph) -> OpGraph:
    """The network as a runtime of that name executes it, on this machine or not."""
    return load_runtime(name).lower(graph) if name in RUNTIMES else graph


def load_runtime(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise UserError(f"unknown runtime {name!r}; known: {', '.join(RUNTIMES)}")
    return cast(Runtime, importlib.import_module(RUNTIMES[name]))
