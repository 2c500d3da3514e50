"""Times models on a device that has Python: pushed there as it is, run with a job and the place for its result.

    python3 device_runner.py JOB.json RESULT.json   {id, runtime, threads, models, plan, seed} -> {job, samples_ms}
    python3 device_runner.py --probe                what is installed, as one line of JSON

It needs numpy and the runtime (onnxruntime, ai-edge-litert or tflite-runtime), and nothing of amc-hw.
The protocol is that of profilers/timing.py: bursts, interleaved in random order.
"""

import json
import os
import random
import sys
import time


def versions():
    """Name -> version of the runtimes that can be imported."""
    found = {}
    for name, module in (("onnxruntime", "onnxruntime"), ("litert", "ai_edge_litert"), ("litert", "tflite_runtime")):
        if name in found:
            continue
        try:
            imported = __import__(module)
        except Exception:  # a broken install fails in any way, and is as good as none
            continue
        version = getattr(imported, "__version__", None)
        if version is None:
            try:
                from importlib.metadata import version as installed

                version = installed(module.replace("_", "-"))
            except Exception:
                version = "unknown"
        found[name] = str(version)
    return found


def probe():
    return {"python": sys.version.split()[0], "cores": os.cpu_count(), "runtimes": versions()}


def random_input(shape, seed):
    import numpy

    return numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)


def load_litert(path, threads):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    interpreter = Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    for source in interpreter.get_input_details():
        interpreter.set_tensor(source["index"], random_input([int(size) for size in source["shape"]], 0))
    return interpreter.invoke


def load_onnxruntime(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for source in session.get_inputs():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(random_input(source.shape, 0))
        binding.bind_ortvalue_input(source.name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


LOAD = {"litert": load_litert, "onnxruntime": load_onnxruntime}


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def burst(run, plan):
    run()
    end = time.perf_counter() + plan["burst_s"]
    elapsed: list = []
    while len(elapsed) < plan["min_runs"] or (time.perf_counter() < end and len(elapsed) < plan["max_runs"]):
        start = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - start)
    return 1e3 * median(elapsed)


def interleaved(runs, plan, seed):
    order = random.Random(seed)
    samples: list = [[] for _ in runs]
    for run in runs:
        for _ in range(plan["warmup_runs"]):
            run()
    for _ in range(plan["rounds"]):
        for index in order.sample(range(len(runs)), len(runs)):
            samples[index].append(burst(runs[index], plan))
    return samples


def main():
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps(probe()))
        return
    job_path, result_path = sys.argv[1:]
    with open(job_path) as file:
        job = json.load(file)
    runs = [LOAD[job["runtime"]](path, job["threads"]) for path in job["models"]]
    result = {"job": job["id"], "samples_ms": interleaved(runs, job["plan"], job["seed"])}
    part = result_path + ".part"
    with open(part, "w") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, result_path)


if __name__ == "__main__":
    main()
