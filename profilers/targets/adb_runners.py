"""What times models on a device over ADB. RUNNERS is the only place to add one."""

from __future__ import annotations

import json
import math
import re
import secrets
import shlex
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from profilers import device_runner
from profilers.adb import AdbDevice
from profilers.benchmark_log import BenchmarkRun, read_log
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.timing import TimingPlan

JOB_S = 60.0  #: of a job beyond what its plan takes
SLACK = 10  #: a burst of so many times its length is no burst
VISIT = "amc-hw-visit"  #: begins the output of each of a program's runs
LEAST_RUNS = 10  #: of a program that is started for every sample
START_S = 2.0  #: of it
TIMED_OUT, NO_FOLDER = 124, 90  #: exit codes: of `timeout`, and ours
#: Of a delegate: what it may take to compile a network, once, and how long it runs one until its clocks have risen.
COMPILE_S, WARM_S = 60.0, 0.3
COMPILE_ANEW_S = 20.0  #: one that compiles for every run
COMPILED = "compiled"  #: in the work folder, while a job runs: what delegates compiled
EXTERNAL = "EXTERNAL"  #: name in a log of a delegate that is a library
#: `delegate` in a configuration -> its name in a log, and the flags for it, for half precision, for `delegate_options`.
DELEGATES = {
    "gpu": ("GPU", "--use_gpu=true", "--gpu_precision_loss_allowed", "--gpu_backend"),
    # what NNAPI has no driver for would run on its reference implementation, unseen
    "nnapi": ("NNAPI", "--use_nnapi=true --disable_nnapi_cpu=true", "--nnapi_allow_fp16", "--nnapi_accelerator_name"),
}


DELEGATE = ", delegate "  #: in the version of a runtime, before a delegate and what it takes


def delegate_of(version: str) -> tuple[str, str] | None:
    """The delegate in the version of a runtime, as `BenchmarkModel.version` writes it, and its name in a log."""
    delegate = version.partition(DELEGATE)[2].partition(" ")[0]
    return (delegate, DELEGATES[delegate][0] if delegate in DELEGATES else EXTERNAL) if delegate else None


class Runner(ABC):
    """Times models that lie on the device. `program`: whether it is one that the user brings. `dtypes`: of networks."""

    program = True
    dtypes: tuple[str, ...] = ("float32", "int8")

    def __init__(self, config: DeviceConfig, device: AdbDevice) -> None:
        self.config, self.device, self.work = config, device, shlex.quote(config.workdir)

    @property
    @abstractmethod
    def path(self) -> str:
        """Where it lies on the device."""

    @abstractmethod
    def version(self) -> str:
        """Of the runtime, for the identity; DeviceError where it is not there."""

    @abstractmethod
    def time(self, models: Sequence[str], plan: TimingPlan, seed: int, prefix: str) -> list[list[float]]:
        """Milliseconds per model, one sample for every round; models: paths on the device; prefix: of its command."""

    def runs(self, plan: TimingPlan) -> int:
        """Inferences of a visit, at least, one uncounted among them."""
        return plan.min_runs + 1

    def seconds(self, plan: TimingPlan, models: int) -> float:
        """How long a job may take: bursts of slow models are as long as their least number of runs."""
        visit_s = max(SLACK * plan.burst_s, self.runs(plan) * self.config.slowest_s)
        return JOB_S + models * (plan.rounds + 1) * visit_s

    def _has(self, tool: str) -> bool:
        return self.device.try_run(tool)[0] == 0

    @cached_property
    def _wrapped(self) -> str:
        """A session of its own, so that all of a job can be ended; empty where the device lacks the tool."""
        return "setsid " if self._has("setsid true") else ""

    @cached_property
    def _limited(self) -> bool:
        return self._has("timeout 5 true")

    def job(self, command: str, *, removes: str, seconds: float) -> tuple[int, str]:
        """(exit code, last line) of a command in the work folder. A job that a lost connection left is ended first.

        removes: the file that a job before may have left its result in. The device ends a command that hangs.
        """
        limit = f"timeout {math.ceil(seconds)} " if self._limited else ""
        code, _ = self.device.try_run(
            f"cd {self.work} || exit {NO_FOLDER}; "
            'if read old < pid && grep -q job "/proc/$old/cmdline"; then kill -9 "-$old" || kill -9 "$old"; fi '
            f"2>/dev/null; rm -f {removes}; {self._wrapped}{limit}{command} > log.txt 2>&1 & echo $! > pid; "
            'wait $!; code=$?; kill -9 "-$!" 2>/dev/null; rm -f pid; exit $code',  # `timeout` may end its child alone
            timeout_s=seconds + 20,
        )
        if code == TIMED_OUT and limit:
            return code, (
                f"it hangs: no end within {math.ceil(seconds)} s (where an inference takes more than "
                f"{self.config.slowest_s:g} s: slowest_s in the device's configuration)"
            )
        if code == NO_FOLDER:
            return code, f"{self.config.workdir} is gone: was the device started anew? Run the same command again"
        _, log = self.device.try_run(f"tail -n 1 {self.work}/log.txt")
        return code, log.strip() or "no output"

    def checked(self, samples: Any, models: int, rounds: int) -> list[list[float]]:
        """Samples of all models and rounds, finite and above zero; DeviceError where a runner gave anything else."""
        whole = (
            isinstance(samples, list)
            and len(samples) == models
            and all(isinstance(each, list) and len(each) == rounds for each in samples)
            and all(isinstance(ms, float | int) and math.isfinite(ms) and ms > 0 for each in samples for ms in each)
        )
        if not whole:
            raise DeviceError(
                f"{self.device.name}: the runner did not give {rounds} times above zero for each of {models} models"
            )
        return [[float(ms) for ms in each] for each in samples]


class PythonRunner(Runner):
    """`device_runner.py`, where the device has Python: one process for all models of a job."""

    program = False

    @cached_property
    def path(self) -> str:
        path = f"{self.config.workdir}/device_runner.py"
        self.device.run(f"mkdir -p {self.work}")
        self.device.push(Path(device_runner.__file__).read_bytes(), path)
        return path

    @cached_property
    def _installed(self) -> dict[str, Any]:
        command = f"{shlex.quote(self.config.python)} {shlex.quote(self.path)} --probe"
        code, text = self.device.try_run(command)
        try:
            found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise DeviceError(
                f"{self.device.name}: {self.config.python} does not run there (exit code {code}): install Python, or "
                'set runner = "benchmark_model" in the device\'s configuration'
            ) from None
        return found

    def version(self) -> str:
        version = self._installed["runtimes"].get(self.config.runtime)
        if version is None:
            found = ", ".join(self._installed["runtimes"]) or "none"
            raise DeviceError(f"{self.device.name}: {self.config.runtime} is not installed there (found: {found})")
        return str(version)

    def time(self, models: Sequence[str], plan: TimingPlan, seed: int, prefix: str) -> list[list[float]]:
        job = {
            "id": secrets.token_hex(8),
            "runtime": self.config.runtime,
            "threads": self.config.threads,
            "models": list(models),
            "plan": asdict(plan),
            "seed": seed,
        }
        runner = shlex.quote(self.path)
        self.device.push(json.dumps(job).encode(), f"{self.config.workdir}/job.json")
        command = f"{prefix}{shlex.quote(self.config.python)} {runner} job.json result.json"
        code, said = self.job(command, removes="result.json", seconds=self.seconds(plan, len(models)))
        if code != 0:
            raise DeviceError(f"{self.device.name}: the runner ended with {code}: {said}")
        try:
            result = json.loads(self.device.pull(f"{self.config.workdir}/result.json"))
            samples = result["samples_ms"]
            if result["job"] != job["id"]:
                raise ValueError("of another job")
        except (ValueError, KeyError, TypeError) as error:
            raise DeviceError(f"{self.device.name}: the runner's result is damaged: {error}") from None
        return self.checked(samples, len(models), plan.rounds)


class ProgramRunner(Runner):
    """A program that times one model and ends: started for every model and round, in random order."""

    name: str
    output: str  #: files of a run that tell its times, in the work folder

    @cached_property
    def path(self) -> str:
        return self.config.program or f"{self.config.workdir}/{self.name}"

    def version(self) -> str:
        code, text = self.device.try_run(f"sha256sum < {shlex.quote(self.path)}")
        if code != 0:
            raise DeviceError(
                f"{self.device.name}: there is no {self.path}: amc-hw devices setup {self.config.name} --binary PATH"
            )
        return f"{self.name} {text.split()[0][:12]}"

    def seconds(self, plan: TimingPlan, models: int) -> float:
        return super().seconds(plan, models) + START_S * plan.rounds * models

    @property
    def begin(self) -> tuple[str, ...]:
        """Commands of a job before its runs."""
        return ()

    @abstractmethod
    def flags(self, model: str, plan: TimingPlan) -> str:
        """Its arguments, quoted."""

    @abstractmethod
    def read_ms(self, text: bytes, plan: TimingPlan) -> float:
        """Milliseconds of one inference from a run's output; UserError where it is not whole."""

    def time(self, models: Sequence[str], plan: TimingPlan, seed: int, prefix: str) -> list[list[float]]:
        order = np.random.default_rng(seed)
        visits = [int(index) for _ in range(plan.rounds) for index in order.permutation(len(models))]
        lines = ["#!/bin/sh", *self.begin]
        for index in visits:
            run = f"{prefix}{shlex.quote(self.path)} {self.flags(models[index], plan)}"
            lines += [
                f"rm -f {self.output}; {run} > run.txt 2>&1; code=$?",
                f"{{ echo {VISIT}; cat {self.output}; }} >> out.txt",
                "[ $code = 0 ] || { grep -m 1 ERROR run.txt || tail -n 1 run.txt; exit $code; }",
            ]
        self.device.push("\n".join(lines).encode() + b"\n", f"{self.config.workdir}/job.sh")
        code, said = self.job("sh job.sh", removes="out.txt", seconds=self.seconds(plan, len(models)))
        if code != 0:
            raise DeviceError(f"{self.device.name}: {self.name} ended with {code}: {said}")
        _, *outputs = self.device.pull(f"{self.config.workdir}/out.txt").split(f"{VISIT}\n".encode())
        if len(outputs) != len(visits):
            raise DeviceError(f"{self.device.name}: {len(outputs)} of {len(visits)} runs have an output")
        samples: list[list[float]] = [[] for _ in models]
        for index, output in zip(visits, outputs, strict=True):
            try:
                samples[index].append(self.read_ms(output, plan))
            except UserError as error:
                raise DeviceError(str(error)) from None
        return self.checked(samples, len(models), plan.rounds)


class BenchmarkModel(ProgramRunner):
    """Google's `benchmark_model`, of TFLite and of LiteRT, on the CPU or with a delegate."""

    name = "benchmark_model"
    output = "run.txt"
    dtypes = ("float32", "float16", "int8")

    @cached_property
    def _asked(self) -> tuple[str, list[str]]:
        """The delegate by its name in a log, and the flags that it takes; ("", []) where TFLite may do as it likes."""
        delegate, options = self.config.delegate, self.config.delegate_options
        if delegate in DELEGATES:
            name, asks, half, option = DELEGATES[delegate]
            flags = [*asks.split(), f"{half}={str(self.config.dtype != 'float32').lower()}"]
            return name, flags + ([f"{option}={options}"] if options else [])
        if delegate:
            more = [f"--external_delegate_options={options}"] if options else []
            return EXTERNAL, [f"--external_delegate_path={delegate}", *more]
        if self.config.dtype == "float16":
            return "XNNPACK", ["--use_xnnpack=true", "--xnnpack_force_fp16=true"]
        return "", []

    @property
    def begin(self) -> tuple[str, ...]:
        return (f"rm -rf {COMPILED}; mkdir {COMPILED}",) if self.config.delegate in DELEGATES else ()

    def version(self) -> str:
        version, delegate, options = super().version(), self.config.delegate, self.config.delegate_options
        if not delegate:
            return version
        if delegate not in DELEGATES:
            code, text = self.device.try_run(f"sha256sum < {shlex.quote(delegate)}")
            if code != 0:
                raise DeviceError(f"{self.device.name}: there is no {delegate}: put the delegate's library there")
            delegate = f"{Path(delegate).name} {text.split()[0][:12]}"
        return f"{version}{DELEGATE}{delegate}" + (f" ({options})" if options else "")

    def seconds(self, plan: TimingPlan, models: int) -> float:
        kept = self.config.delegate in DELEGATES
        compile_s = COMPILE_S if kept else COMPILE_ANEW_S * plan.rounds
        more = models * (compile_s + WARM_S * plan.rounds) if self.config.delegate else 0.0
        return super().seconds(plan, models) + more

    def flags(self, model: str, plan: TimingPlan) -> str:
        _, asked = self._asked
        warm_s = WARM_S if self.config.delegate else 0
        if self.config.delegate in DELEGATES:  # compiled once, not anew by every run
            place = f"{self.config.workdir}/{COMPILED}"
            asked = [*asked, f"--delegate_serialize_dir={place}", f"--delegate_serialize_token={Path(model).stem}"]
        return (
            f"{shlex.quote(f'--graph={model}')} --num_threads={self.config.threads} "
            f"--warmup_runs=1 --warmup_min_secs={warm_s} --num_runs={plan.min_runs} --min_secs={plan.burst_s} "
            f"--max_secs={max(1.0, 20 * plan.burst_s)} {' '.join(map(shlex.quote, asked))}"
        ).rstrip()

    def read_ms(self, text: bytes, plan: TimingPlan) -> float:
        run = read_log(text, name=f"{self.device.name}, {self.name}")
        self._check(run)
        return run.timed.mean_ms if run.timed.median_ms is None else run.timed.median_ms

    def _check(self, run: BenchmarkRun) -> None:
        """UserError where the delegate that was asked for did not run, a warning where it ran only a part."""
        name, asked = self._asked
        ignored = {flag.partition("=")[0] for flag in run.ignored}
        if unknown := [flag for flag in asked if flag.partition("=")[0] in ignored]:
            raise UserError(
                f"{self.device.name}: this build of {self.name} does not know {unknown[0]}: put another there"
            )
        if name and name not in (run.delegate or "").split("+"):
            raise UserError(
                f"{self.device.name}: {self.name} did not apply the {name} delegate, and ran the network on the CPU: "
                f"see what it says there, {self.config.workdir}/run.txt"
            )
        if "--delegate_serialize_dir" in ignored:
            warnings.warn(
                f"{self.device.name}: this build of {self.name} keeps nothing that a delegate compiled: every run "
                "compiles anew",
                stacklevel=2,
            )
        if name and run.partial:
            parts = "a part" if run.delegate_kernels in (None, 1) else f"{run.delegate_kernels} parts"
            warnings.warn(
                f"{self.device.name}: the {name} delegate runs {parts} of a network, the CPU the rest", stacklevel=2
            )


class PerfTest(ProgramRunner):
    """ONNX Runtime's `onnxruntime_perf_test`; it writes a line for every inference: NAME,SECONDS,MEMORY,CPU,INDEX."""

    name = "onnxruntime_perf_test"
    output = "times.csv"

    def runs(self, plan: TimingPlan) -> int:
        return self._counted(plan) + 1

    def _counted(self, plan: TimingPlan) -> int:
        return max(plan.min_runs, LEAST_RUNS)

    def flags(self, model: str, plan: TimingPlan) -> str:
        runs = self._counted(plan)
        # random input of a fixed seed; subnormals as zero
        return f"-e cpu -I -S 1 -z -x {self.config.threads} -y 1 -m times -r {runs} {shlex.quote(model)} {self.output}"

    def read_ms(self, text: bytes, plan: TimingPlan) -> float:
        name = f"{self.device.name}, {self.name}"
        lines = text.decode(errors="replace").splitlines()
        rows = [re.fullmatch(r"[^,]*,([0-9.]+(?:e[-+]?[0-9]+)?),[0-9]+,[0-9]+,([0-9]+)", line) for line in lines]
        found = [(int(row[2]), float(row[1])) for row in rows if row]
        if len(found) != len(lines) or [index for index, _ in found] != list(range(self._counted(plan))):
            raise UserError(f"{name}: its file of times is damaged: {len(found)} of {len(lines)} lines are times")
        return 1e3 * float(np.median([seconds for _, seconds in found]))


#: Name in a device's configuration -> class; and the runtime of those that run a single one.
RUNNERS: dict[str, type[Runner]] = {
    "python": PythonRunner,
    "benchmark_model": BenchmarkModel,
    "onnxruntime_perf_test": PerfTest,
}
RUNTIME = {"benchmark_model": "litert", "onnxruntime_perf_test": "onnxruntime"}
