"""ONNX Runtime on the CPU. Operators are read in context from its own profiler."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from profilers.builders.onnx import build
from profilers.ops import OpGraph, fuse_adds

__all__ = ["SUFFIX", "build", "loaded", "lower", "profile_ops", "quantized", "session", "version"]

SUFFIX = ".onnx"


def version() -> str:
    return str(onnxruntime.__version__)


def quantized(model: bytes, samples: Sequence[Sequence[np.ndarray]]) -> bytes:
    """By ONNX Runtime's static quantization: quantize and dequantize nodes, int8 on both sides. Weights keep to 7 bits:
    where a CPU has AVX2 but no VNNI, sums of two products saturate with more."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [source.name for source in _session(model, 1).get_inputs()]

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            values = next(self.rest, None)
            return None if values is None else dict(zip(names, values, strict=True))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(model)
        int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
        quantize_static(before, after, Samples(), quant_format=QuantFormat.QDQ, per_channel=True, **int8)
        return after.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that the quantization tool gives at every call."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def lower(graph: OpGraph) -> OpGraph:
    return fuse_adds(graph)


def _session(model: bytes, threads: int, *, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # subnormal values would make identical shapes many times slower
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bound(session: onnxruntime.InferenceSession, seed: int) -> Any:
    """The session's input and outputs bound to memory of their own, so that a run copies nothing in Python."""
    binding = session.io_binding()
    rng = np.random.default_rng(seed)
    for source in session.get_inputs():
        array = rng.standard_normal(source.shape).astype(np.float32)
        binding.bind_ortvalue_input(source.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return binding


def loaded(model: bytes, *, threads: int, seed: int = 0) -> Callable[[], None]:
    session = _session(model, threads)
    binding = _bound(session, seed)
    return lambda: session.run_with_iobinding(binding)


def session(model: bytes) -> Callable[..., list[np.ndarray]]:
    opened = _session(model, 1)
    names = [source.name for source in opened.get_inputs()]

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(output) for output in opened.run(None, dict(zip(names, inputs, strict=True)))]

    return run


def profile_ops(model: bytes, graph: OpGraph, *, threads: int, time_s: float) -> dict[str, float] | None:
    """Mean kernel time of every node over the faster half of the runs: what disturbs a machine makes runs slower, never
    faster, and the profiler's durations are whole microseconds, which medians would keep.

    Layout reorders are charged to the node they serve: those before a node to it, those after one to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = _session(model, threads, profile_prefix=str(Path(folder) / "ort"))
        binding = _bound(session, 0)
        for _ in range(3):
            session.run_with_iobinding(binding)
        end, runs = time.perf_counter() + time_s, 3
        while time.perf_counter() < end or runs < 13:
            session.run_with_iobinding(binding)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    names = {node.name for node in lower(graph).nodes}
    runs_us: list[dict[str, float]] = []
    per_run: dict[str, float] = {}
    carried, last, finished = 0.0, None, 0
    for event in events:
        if event.get("cat") == "Session" and event["name"] == "model_run":
            finished += 1
            if last is not None:
                per_run[last] += carried
            if finished > 3:
                runs_us.append(per_run)
            carried, last, per_run = 0.0, None, {}
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["name"].removesuffix("_kernel_time").removeprefix("fused ").split("/")[0].removesuffix("_nchwc")
        if name in names:
            per_run[name] = per_run.get(name, 0.0) + event["dur"] + carried
            carried, last = 0.0, name
        elif event["args"].get("op_name") == "ReorderInput" or last is None:
            carried += event["dur"]
        else:
            per_run[last] += event["dur"]
    faster = sorted(runs_us, key=lambda run: sum(run.values()))[: (len(runs_us) + 1) // 2]
    return {name: 1e-3 * float(np.mean([run[name] for run in faster])) for name in faster[0]}
