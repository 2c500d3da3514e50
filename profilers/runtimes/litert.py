"""LiteRT (TFLite) with XNNPACK on the CPU. Its Python interpreter shows whole networks only, no operators."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from profilers.builders.tflite import build
from profilers.errors import DeviceError
from profilers.ops import OpGraph

__all__ = ["SUFFIX", "build", "loaded", "lower", "outputs", "profile_ops", "version"]

SUFFIX = ".tflite"


def version() -> str:
    try:
        return importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError("the runtime litert is not installed: pip install 'amc-hw[litert]'") from None


def lower(graph: OpGraph) -> OpGraph:
    return graph


def _interpreter(model: bytes, threads: int) -> Any:
    version()
    from ai_edge_litert.interpreter import Interpreter

    with _without_info():
        interpreter = Interpreter(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


@contextmanager
def _without_info() -> Iterator[None]:
    """Standard error without the runtime's own INFO lines, which it writes past Python; the rest comes afterwards."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"INFO:"):
                    os.write(2, line)


def loaded(model: bytes, *, threads: int, seed: int = 0) -> Callable[[], None]:
    interpreter = _interpreter(model, threads)
    rng = np.random.default_rng(seed)
    for source in interpreter.get_input_details():
        interpreter.set_tensor(source["index"], rng.standard_normal(source["shape"]).astype(np.float32))
    return interpreter.invoke


def outputs(model: bytes, image: np.ndarray) -> list[np.ndarray]:
    interpreter = _interpreter(model, 1)
    (source,) = interpreter.get_input_details()
    nhwc = image.transpose(0, 2, 3, 1) if len(source["shape"]) == 4 else image.reshape(source["shape"])
    interpreter.set_tensor(source["index"], np.ascontiguousarray(nhwc))
    interpreter.invoke()
    found = [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]
    return [output.transpose(0, 3, 1, 2) if output.ndim == 4 else output for output in found]


def profile_ops(model: bytes, graph: OpGraph, *, threads: int, time_s: float) -> dict[str, float] | None:
    return None
