"""ONNX Runtime on the CPU. Operators are read in context from its own profiler."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from profilers.builders.onnx import build as build
from profilers.builders.onnx import labelled as labelled
from profilers.errors import UserError
from profilers.ops import OpGraph, fuse_adds

SUFFIX = ".onnx"
WARM_RUNS, LEAST_RUNS = 3, 10


def version() -> str:
    return str(onnxruntime.__version__)


def quantized(model: bytes, samples: Sequence[Sequence[np.ndarray]], *, int8_io: bool = False) -> bytes:
    """By ONNX Runtime's static quantization: quantize and dequantize nodes, int8 on both sides. Weights keep to 7 bits:
    where a CPU has AVX2 but no VNNI, sums of two products saturate with more."""
    if int8_io:
        raise UserError("an ONNX file keeps float32 inputs and outputs when it is quantized: int8 ones are for tflite")
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


def quantization(model: bytes) -> dict[str, tuple[float, int]]:
    return {}


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
    """Milliseconds of every node, by `node_ms` of what ONNX Runtime's own profiler writes."""
    alone = _timed_runs(_session(model, threads), time_s / 2)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(model, threads, profile_prefix=str(Path(folder) / "ort"))
        _timed_runs(session, time_s)
        events = json.loads(Path(session.end_profiling()).read_text())
    alone_us = 1e6 * float(np.mean(sorted(alone)[: (len(alone) + 1) // 2]))
    return node_ms(events, {node.name for node in lower(graph).nodes}, alone_us)


def _timed_runs(session: onnxruntime.InferenceSession, time_s: float) -> list[float]:
    """Seconds of every run after the first WARM_RUNS."""
    binding = _bound(session, 0)
    for _ in range(WARM_RUNS):
        session.run_with_iobinding(binding)
    taken: list[float] = []
    begun = now = time.perf_counter()
    while now < begun + time_s or len(taken) < LEAST_RUNS:
        before = now
        session.run_with_iobinding(binding)
        now = time.perf_counter()
        taken.append(now - before)
    return taken


def node_ms(events: Sequence[Mapping[str, Any]], names: Collection[str], alone_us: float) -> dict[str, float]:
    """Mean milliseconds of every node of `names`, from a profile of ONNX Runtime, warm-up first.

    alone_us: microseconds of a run without the profiler. What the profiler adds is taken off, the same for every
    kernel: what passes between two, and about as much in each; more of a difference is drift. The faster runs count,
    half of them or more: what disturbs a machine makes runs slower, never faster.

    A kernel takes from its start to the start of the next. Its own duration is cut to whole microseconds, and so is
    the mean of many: 2.1 and 2.9 are both 2. Starts are cut, too, but at another point in every run, so that their
    differences are right in the mean.

    Layout reorders are charged to the node they serve: those before a node to it, those after one to it.
    """
    runs: list[list[Mapping[str, Any]]] = [[]]
    for event in events:
        if event.get("cat") == "Session" and event["name"] == "model_run":
            runs.append([])
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1].append(event)
    runs = runs[WARM_RUNS:-1]
    starts, durations = (np.array([[event[key] for event in run] for run in runs], float) for key in ("ts", "dur"))
    apart = np.diff(starts, axis=1)
    between = float(np.median((apart - durations[:, :-1]).mean(axis=0))) if apart.size else 0.0
    taken_us = np.hstack([apart, durations[:, -1:] + between])  # nothing starts after the last
    run_us = taken_us.sum(axis=1)
    faster = run_us <= np.median(run_us) + 1  # more exact than the clock would choose by how starts were cut
    mean_us = taken_us[faster].mean(axis=0)
    added = (mean_us.sum() - alone_us) / len(mean_us)
    if apart.size:
        most = min(2 * between, float(mean_us.min()))
        added = min(max(added, between), most)
    mean_us = np.maximum(mean_us - added, 1e-3)
    found: dict[str, float] = {}
    carried, last = 0.0, None
    for event, took_us in zip(runs[0], mean_us, strict=True):
        name = event["name"].removesuffix("_kernel_time").removeprefix("fused ").split("/")[0].removesuffix("_nchwc")
        if name in names:
            found[name] = found.get(name, 0.0) + took_us + carried
            carried, last = 0.0, name
        elif event["args"].get("op_name") == "ReorderInput" or last is None:
            carried += took_us
        else:
            found[last] += took_us
    if last is not None:
        found[last] += carried
    return {name: 1e-3 * float(took_us) for name, took_us in found.items()}
