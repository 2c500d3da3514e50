#!/usr/bin/env python3
"""Stands in for Google's benchmark_model on a device that has Python: its flags, its output, real runs by LiteRT."""

import statistics
import sys
import time
from pathlib import Path

import numpy
from ai_edge_litert.interpreter import Interpreter

flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
known = {"graph", "num_threads", "warmup_runs", "warmup_min_secs", "num_runs", "min_secs", "max_secs"}
known |= {"use_gpu", "gpu_precision_loss_allowed", "delegate_serialize_dir", "delegate_serialize_token"}
unknown = set(flags) - known
if unknown:
    sys.exit(f"ERROR: Unrecognized commandline flags: {sorted(unknown)}")
print("INFO: STARTING!")
print(f"INFO: Num threads: [{flags['num_threads']}]")
print(f"INFO: Graph: [{flags['graph']}]")
begun = time.perf_counter()
try:
    interpreter = Interpreter(model_path=flags["graph"], num_threads=int(flags["num_threads"]))
except ValueError as error:
    print(f"ERROR: Failed to load the model: {error}")
    sys.exit("ERROR: Benchmarking failed.")
interpreter.allocate_tensors()
for source in interpreter.get_input_details():
    value = numpy.random.default_rng(0).standard_normal(source["shape"]).astype(numpy.float32)
    interpreter.set_tensor(source["index"], value)
if flags.get("use_gpu") == "true":
    print("INFO: Created TensorFlow Lite delegate for GPU.")
    if "delegate_serialize_dir" in flags:
        Path(flags["delegate_serialize_dir"], f"{flags['delegate_serialize_token']}.bin").write_bytes(b"kernels")
    print("INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.")
else:
    print("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.")
init = 1e6 * (time.perf_counter() - begun)


def timed(least_runs: int, least_s: float, most_s: float) -> list[int]:
    """Microseconds of every run."""
    found: list[int] = []
    start = time.perf_counter()
    while len(found) < least_runs or time.perf_counter() - start < least_s:
        before = time.perf_counter()
        interpreter.invoke()
        found.append(round(1e6 * (time.perf_counter() - before)))
        if time.perf_counter() - start > most_s:
            break
    return found


def stats(runs: list[int]) -> str:
    if len(runs) == 1:
        return f"count=1 curr={runs[0]}"
    mean, middle = statistics.mean(runs), sorted(runs)[len(runs) // 2]
    return (
        f"count={len(runs)} first={runs[0]} curr={runs[-1]} min={min(runs)} max={max(runs)} avg={mean:g} "
        f"std={int(statistics.pstdev(runs))} median={middle}"
    )


most = float(flags["max_secs"])
warmup = timed(int(flags["warmup_runs"]), float(flags["warmup_min_secs"]), most)
print(f"INFO: {stats(warmup)}\n")
runs = timed(int(flags["num_runs"]), float(flags["min_secs"]), most)
print(f"INFO: {stats(runs)}\n")
print(
    f"INFO: Inference timings in us: Init: {init:g}, First inference: {warmup[0]}, "
    f"Warmup (avg): {statistics.mean(warmup):g}, Inference (avg): {statistics.mean(runs):g}"
)
