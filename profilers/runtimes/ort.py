"""ONNX Runtime on the CPU. Operators are read in context from its own profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy import stats

from profilers.builders.onnx import build
from profilers.ops import OpGraph, fuse_adds

__all__ = ["SUFFIX", "build", "loaded", "lower", "outputs", "profile_ops", "version"]

SUFFIX = ".onnx"


def version() -> str:
    return str(onnxruntime.__version__)


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
    (source,) = session.get_inputs()
    array = np.random.default_rng(seed).standard_normal(source.shape).astype(np.float32)
    binding.bind_ortvalue_input(source.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return binding


def loaded(model: bytes, *, threads: int, seed: int = 0) -> Callable[[], None]:
    session = _session(model, threads)
    binding = _bound(session, seed)
    return lambda: session.run_with_iobinding(binding)


def outputs(model: bytes, image: np.ndarray) -> list[np.ndarray]:
    session = _session(model, 1)
    (source,) = session.get_inputs()
    return [np.asarray(output) for output in session.run(None, {source.name: image})]


def profile_ops(model: bytes, graph: OpGraph, *, threads: int, time_s: float) -> dict[str, float] | None:
    """Trimmed mean of every node's kernel time: the profiler's durations are whole microseconds.

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
    durations: dict[str, list[float]] = {}
    per_run: dict[str, float] = {}
    carried, last, finished = 0.0, None, 0
    for event in events:
        if event.get("cat") == "Session" and event["name"] == "model_run":
            finished += 1
            if last is not None:
                per_run[last] += carried
            if finished > 3:
                for name, micros in per_run.items():
                    durations.setdefault(name, []).append(micros)
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
    return {name: float(stats.trim_mean(micros, 0.15)) * 1e-3 for name, micros in durations.items()}
