"""An Android phone or a Linux board over ADB.

A job (models, plan, seed) is pushed, run by a runner on the device, and its result pulled; every file is verified, and
what a lost connection cut short is run again as a whole. Two runners: a Python script where the device has Python, and
Google's `benchmark_model` where it has not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from profilers import device_runner
from profilers.adb import AdbDevice, open_device
from profilers.benchmark_log import read_log
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph
from profilers.runtimes import load_runtime
from profilers.table import Identity
from profilers.targets import Network, Probe, identity_of
from profilers.targets.models import Models
from profilers.timing import TimingPlan

RUNNERS = ("python", "benchmark_model")
JOB_S = 60.0  #: of a job beyond what its plan takes
LOCK_S = 900  #: that a job may hold the lock, at most
LOCK_WAIT_S = 120
SEVERE = 3  #: Android's thermal status from which clocks are cut hard
COOL_S = (10.0, 30.0, 60.0, 120.0)
KEPT_MODELS = 24


class AdbTarget:
    can_time = True

    def __init__(self, config: DeviceConfig, device: AdbDevice | None = None) -> None:
        if config.runner not in RUNNERS:
            raise UserError(f"device {config.name}: unknown runner {config.runner!r}; known: {', '.join(RUNNERS)}")
        if config.dtype != "float32":
            raise UserError(f"device {config.name}: over ADB only float32 is measured, not {config.dtype}")
        self.config = config
        self.runtime = load_runtime(config.runtime)
        self._model = Models(self.runtime, config.dtype)
        self.work = config.workdir
        self._given = device

    @cached_property
    def device(self) -> AdbDevice:
        if self._given is not None:
            return self._given
        return open_device(self.config.name, address=self.config.address, serial=self.config.serial)

    # What is there

    def _property(self, name: str) -> str:
        code, text = self.device.try_run(f"getprop {shlex.quote(name)}")
        return text.strip() if code == 0 else ""

    @cached_property
    def _soc(self) -> str:
        """The chip and the model of a phone, the processor of a board; never a serial number."""
        parts = [self._property(name) for name in ("ro.product.manufacturer", "ro.product.model", "ro.soc.model")]
        if any(parts):
            return " ".join(dict.fromkeys(part for part in parts if part))
        _, text = self.device.try_run("cat /proc/cpuinfo")
        named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
        _, machine = self.device.try_run("uname -m")
        return " ".join(named[1].split()) if named else machine.strip() or "unknown"

    @cached_property
    def _runner(self) -> str:
        """The runner's path on the device, put there or updated where it is ours."""
        if self.config.runner == "benchmark_model":
            return self.config.program or f"{self.work}/benchmark_model"
        self.device.run(f"mkdir -p {shlex.quote(self.work)}")
        path = f"{self.work}/device_runner.py"
        self.device.push(Path(device_runner.__file__).read_bytes(), path)
        return path

    @cached_property
    def _installed(self) -> dict[str, Any]:
        """What the Python runner finds; DeviceError where it does not run, or lacks the runtime."""
        command = f"{shlex.quote(self.config.python)} {shlex.quote(self._runner)} --probe"
        code, text = self.device.try_run(command)
        try:
            found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise DeviceError(
                f"{self.device.name}: {self.config.python} does not run there (exit code {code}): install Python, or "
                'set runner = "benchmark_model" in the device\'s configuration'
            ) from None
        return found

    @cached_property
    def _version(self) -> str:
        if self.config.runner == "benchmark_model":
            code, text = self.device.try_run(f"sha256sum < {shlex.quote(self._runner)}")
            if code != 0:
                raise DeviceError(
                    f"{self.device.name}: there is no {self._runner}: "
                    f"amc-hw devices setup {self.config.name} --binary PATH"
                )
            return f"benchmark_model {text.split()[0][:12]}"
        version = self._installed["runtimes"].get(self.config.runtime)
        if version is None:
            found = ", ".join(self._installed["runtimes"]) or "none"
            raise DeviceError(f"{self.device.name}: {self.config.runtime} is not installed there (found: {found})")
        return str(version)

    @cached_property
    def _mask(self) -> str | None:
        """Hexadecimal mask of the cores to run on; None for any."""
        wanted = self.config.affinity
        if wanted == "any":
            return None
        if wanted != "big":
            return wanted
        _, text = self.device.try_run("cat /sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq")
        _, names = self.device.try_run("ls -d /sys/devices/system/cpu/cpu[0-9]*/cpufreq")
        clocks = [int(word) for word in text.split() if word.isdigit()]
        cores = [int(number) for number in re.findall(r"cpu([0-9]+)/cpufreq", names)]
        if not clocks or len(clocks) != len(cores) or self.device.try_run("taskset --help")[0] not in (0, 1):
            return None
        return f"{sum(1 << core for core, clock in zip(cores, clocks, strict=True) if clock == max(clocks)):x}"

    def identity(self) -> Identity:
        affinity = f"cores {self._mask}" if self._mask else "any"
        return identity_of(self.config, soc=self._soc, runtime_version=self._version, affinity=affinity)

    def provenance(self) -> dict[str, Any]:
        _, kernel = self.device.try_run("uname -sr")
        return {
            "transport": "adb",
            "runner": self.config.runner,
            "android": self._property("ro.build.fingerprint") or None,
            "kernel": kernel.strip(),
            **self._state(),
        }

    def _state(self) -> dict[str, Any]:
        """Clocks, temperature and battery as they are, null where the device does not tell."""
        _, governor = self.device.try_run("cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        code, battery = self.device.try_run("dumpsys battery")
        level = re.search(r"level: (\d+)", battery) if code == 0 else None
        return {
            "governor": governor.strip() if governor and "No such" not in governor else None,
            "thermal_status": self._thermal(),
            "battery_pct": int(level[1]) if level else None,
        }

    def _thermal(self) -> int | None:
        code, text = self.device.try_run("dumpsys thermalservice")
        found = re.search(r"Thermal Status: (\d)", text) if code == 0 else None
        return int(found[1]) if found else None

    def probes(self) -> list[Probe]:
        probes = []
        for name, look in (
            ("device", lambda: f"{self.device.name}: {self._soc}"),
            ("runner", lambda: f"{self.config.runner} at {self._runner}"),
            ("runtime", lambda: f"{self.config.runtime} {self._version}"),
            ("cores", lambda: f"mask {self._mask}" if self._mask else "any"),
        ):
            try:
                probes.append(Probe(name, True, look()))
            except DeviceError as error:
                probes.append(Probe(name, False, str(error)))
                break
        else:
            status = self._thermal()
            hot = status is not None and status >= SEVERE
            text = "not told" if status is None else f"status {status}" + (": let it cool" if hot else "")
            probes.append(Probe("temperature", not hot, text))
        return probes

    # Timing

    def lower(self, graph: OpGraph) -> OpGraph:
        return self.runtime.lower(graph)

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        return None

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        models = [self._model(network) for network in networks]
        with self._alone(_job_s(plan, len(models))):
            self._cool()
            names = self._pushed(models)
            if self.config.runner == "python":
                return self._by_python(names, plan, seed)
            return self._by_benchmark_model(names, plan, seed)

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        return self.time_networks(networks, plan, seed=seed)  # every job is a process of its own

    def _pushed(self, models: Sequence[bytes]) -> list[str]:
        """Paths of the models on the device, by what they hold: what is there is not pushed again."""
        folder = f"{self.work}/models"
        self.device.run(f"mkdir -p {shlex.quote(folder)}")
        names = [f"{hashlib.sha256(model).hexdigest()[:24]}{self.runtime.SUFFIX}" for model in models]
        there = set(self.device.run(f"ls {shlex.quote(folder)}").split())
        if len(there | set(names)) > KEPT_MODELS:
            for name in sorted(there - set(names)):
                self.device.run(f"rm -f {shlex.quote(f'{folder}/{name}')}")
        for name, model in dict(zip(names, models, strict=True)).items():
            if name not in there:
                self.device.push(model, f"{folder}/{name}")
        return [f"{folder}/{name}" for name in names]

    def _by_python(self, models: Sequence[str], plan: TimingPlan, seed: int) -> list[list[float]]:
        job = {
            "id": secrets.token_hex(8),
            "runtime": self.config.runtime,
            "threads": self.config.threads,
            "models": list(models),
            "plan": asdict(plan),
            "seed": seed,
        }
        result_path = f"{self.work}/result.json"
        runner = self._runner
        self.device.push(json.dumps(job).encode(), f"{self.work}/job.json")
        python, work = shlex.quote(self.config.python), shlex.quote(self.work)
        command = (
            f"cd {work} && rm -f result.json && {self._prefix}{python} {shlex.quote(runner)} job.json result.json "
            "> log.txt 2>&1"
        )
        code, _ = self.device.try_run(command, timeout_s=_job_s(plan, len(models)))
        if code != 0:
            _, log = self.device.try_run(f"tail -n 1 {work}/log.txt")
            raise DeviceError(f"{self.device.name}: the runner ended with {code}: {log.strip() or 'no output'}")
        try:
            result = json.loads(self.device.pull(result_path))
            samples = result["samples_ms"]
            if result["job"] != job["id"]:
                raise ValueError("of another job")
        except (ValueError, KeyError, TypeError) as error:
            raise DeviceError(f"{self.device.name}: the runner's result is damaged: {error}") from None
        return _checked(samples, len(models), plan.rounds, self.device.name)

    def _by_benchmark_model(self, models: Sequence[str], plan: TimingPlan, seed: int) -> list[list[float]]:
        """One process per model and round, in random order; its mean is the sample."""
        order = np.random.default_rng(seed)
        visits = [int(index) for _ in range(plan.rounds) for index in order.permutation(len(models))]
        lines = ["#!/bin/sh", f"cd {shlex.quote(self.work)} || exit 90"]
        for number, index in enumerate(visits):
            graph = shlex.quote(f"--graph={models[index]}")
            flags = (
                f"{graph} --num_threads={self.config.threads} --warmup_runs=1 --warmup_min_secs=0 "
                f"--num_runs={plan.min_runs} --min_secs={plan.burst_s} --max_secs={max(1.0, 20 * plan.burst_s)}"
            )
            run = f"{self._prefix}{shlex.quote(self._runner)} {flags}"
            lines.append(f"{run} > run{number}.txt 2>&1 || exit 1")
        self.device.push("\n".join(lines).encode() + b"\n", f"{self.work}/job.sh")
        work = shlex.quote(self.work)
        code, _ = self.device.try_run(
            f"cd {work} && rm -f run*.txt && sh job.sh", timeout_s=_job_s(plan, len(models)) + 2.0 * len(visits)
        )
        samples: list[list[float]] = [[] for _ in models]
        for number, index in enumerate(visits):
            there, _ = self.device.try_run(f"test -f {work}/run{number}.txt")
            if there != 0:
                raise DeviceError(f"{self.device.name}: benchmark_model ended with {code} before run {number}")
            log = self.device.pull(f"{self.work}/run{number}.txt")
            try:
                samples[index].append(read_log(log, name=f"{self.device.name}, run {number}").timed.mean_ms)
            except UserError as error:
                raise DeviceError(str(error)) from None
        self.device.run(f"rm -f {work}/run*.txt")
        return _checked(samples, len(models), plan.rounds, self.device.name)

    @property
    def _prefix(self) -> str:
        return f"taskset {self._mask} " if self._mask else ""

    # Keeping the device to ourselves, and cool

    @contextmanager
    def _alone(self, seconds: float) -> Iterator[None]:
        """Hold the device's lock: two people never time on one phone at once. After so many seconds anyone may take it.

        Time on the device is counted since it was started: its clock may jump. A lock that holds for longer than LOCK_S
        from now is from before that.
        """
        lock, owner = shlex.quote(f"{self.work}/lock"), secrets.token_hex(8)
        limit = math.ceil(min(seconds, LOCK_S))
        self.device.run(f"mkdir -p {shlex.quote(self.work)}")
        waited = time.monotonic()
        take = (
            f"now=$(cut -d. -f1 /proc/uptime); if mkdir {lock} 2>/dev/null; then "
            f"echo {owner} $((now + {limit})) > {lock}/owner; "
            f"echo taken; else read who until < {lock}/owner 2>/dev/null; "
            f'if [ "$who" = {owner} ]; then echo taken; '
            f'elif [ -n "$until" ] && [ $((until - now)) -gt 0 ] && [ $((until - now)) -le {LOCK_S} ]; then echo held; '
            f"else rm -rf {lock}; echo stale; fi; fi"
        )
        while (answer := self.device.run(take).strip()) != "taken":
            if answer == "held" and time.monotonic() - waited > LOCK_WAIT_S:
                raise DeviceError(
                    f"{self.device.name} is being measured by someone else: wait, or remove {self.work}/lock there"
                )
            time.sleep(0.1 if answer == "stale" else 2.0)
        try:
            yield
        finally:
            self.device.try_run(f'read who until < {lock}/owner && [ "$who" = {owner} ] && rm -rf {lock}')

    def _cool(self) -> None:
        """Wait for a hot phone; DeviceError where it stays hot."""
        for wait_s in (*COOL_S, None):
            status = self._thermal()
            if status is None or status < SEVERE:
                return
            if wait_s is not None:
                time.sleep(wait_s)
        raise DeviceError(f"{self.device.name} is too hot (thermal status {status}): let it cool, and run this again")

    # Setting up

    def setup(self, binary: Path | None) -> list[Probe]:
        """Put the runner on the device; what is there afterwards."""
        if self.config.runner == "benchmark_model":
            if binary is None:
                raise UserError(
                    "--binary PATH is missing: a benchmark_model built for the device (see docs/devices.md)"
                )
            try:
                data = binary.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {binary}: {error.strerror}") from None
            self.device.run(f"mkdir -p {shlex.quote(self.work)}")
            self.device.push(data, self._runner, executable=True)
        elif binary is not None:
            raise UserError(f"device {self.config.name} runs Python: leave --binary out")
        return self.probes()

    def clean(self) -> None:
        """Remove all that was put on the device."""
        self.device.run(f"rm -rf {shlex.quote(self.work)}")


def _job_s(plan: TimingPlan, models: int) -> float:
    """How long a job may take: bursts of slow models are as long as their least number of runs."""
    return JOB_S + models * (plan.rounds + 1) * max(10 * plan.burst_s, 5.0)


def _checked(samples: Any, models: int, rounds: int, name: str) -> list[list[float]]:
    """Samples of all models and rounds, finite and above zero; DeviceError where a runner gave anything else."""
    whole = (
        isinstance(samples, list)
        and len(samples) == models
        and all(isinstance(each, list) and len(each) == rounds for each in samples)
        and all(isinstance(ms, float | int) and math.isfinite(ms) and ms > 0 for each in samples for ms in each)
    )
    if not whole:
        raise DeviceError(f"{name}: the runner did not give {rounds} times above zero for each of {models} models")
    return [[float(ms) for ms in each] for each in samples]
