"""LiteRT (TFLite) with XNNPACK on the CPU. Its Python interpreter shows whole networks only, no operators."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from profilers.builders.tflite import build as build
from profilers.builders.tflite_writer import SIGNATURE
from profilers.builders.tflite_writer import labelled as labelled
from profilers.errors import DeviceError
from profilers.ops import OpGraph

SUFFIX = ".tflite"


def version() -> str:
    try:
        return importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError("the runtime litert is not installed: pip install 'amc-hw[litert]'") from None


def quantized(model: bytes, samples: Sequence[Sequence[np.ndarray]], *, int8_io: bool = False) -> bytes:
    """By ai-edge-quantizer's static recipe. Every sample is calibrated on its own and the widest range of all is taken:
    over several the tool moves towards each by a twentieth, and most outputs of a network would be cut off."""
    try:
        from ai_edge_quantizer import qtyping, quantizer, recipe
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
    except ImportError:
        raise DeviceError("int8 models of LiteRT need its quantizer: pip install 'amc-hw[litert]'") from None
    sources = _interpreter(model, 1).get_input_details()
    data = [
        {source["name"]: _channels_last(value, source["shape"]) for source, value in zip(sources, values, strict=True)}
        for values in samples
    ]
    said = io.StringIO()  # a progress bar among it
    with _without_info(), redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # calibration keeps all tensors, and says so
        made = quantizer.Quantizer(bytearray(model), recipe.static_wi8_ai8())
        for end in () if int8_io else (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            made.update_quantization_recipe(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
        found: dict[str, Any] = {}
        for each in data:
            for name, told in made.calibrate({SIGNATURE: [each]}, num_threads=1).items():
                found[name] = _widest(found.get(name), told)
        return bytes(made.quantize(found, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def _widest(known: dict[str, Any] | None, told: dict[str, Any]) -> dict[str, Any]:
    if not known or not told:
        return told or known or {}
    return told | {"min": np.minimum(known["min"], told["min"]), "max": np.maximum(known["max"], told["max"])}


def _channels_last(value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A float input (N, C, H, W) or (N, C) as a model takes it."""
    return np.ascontiguousarray(value.transpose(0, 2, 3, 1) if len(shape) == 4 else value.reshape(shape))


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


def session(model: bytes) -> Callable[..., list[np.ndarray]]:
    interpreter = _interpreter(model, 1)

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        for source, value in zip(interpreter.get_input_details(), inputs, strict=True):
            interpreter.set_tensor(source["index"], _stored(_channels_last(value, source["shape"]), source))
        interpreter.invoke()
        details = interpreter.get_output_details()
        found = [_read(interpreter.get_tensor(output["index"]), output) for output in details]
        return [output.transpose(0, 3, 1, 2) if output.ndim == 4 else output for output in found]

    return run


def _stored(value: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """Numbers as a tensor has them, which may be int8."""
    if tensor["dtype"] == np.float32:
        return value
    scale, zero = tensor["quantization"]
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.round(value / scale) + zero, limits.min, limits.max).astype(tensor["dtype"])


def _read(value: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """What the numbers of a tensor mean."""
    if tensor["dtype"] == np.float32:
        return value
    scale, zero = tensor["quantization"]
    return (value.astype(np.float32) - zero) * np.float32(scale)


def quantization(model: bytes) -> dict[str, tuple[float, int]]:
    interpreter = _interpreter(model, 1)
    ends = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    return {each["name"]: each["quantization"] for each in ends if each["dtype"] != np.float32}


def profile_ops(model: bytes, graph: OpGraph, *, threads: int, time_s: float) -> dict[str, float] | None:
    return None
