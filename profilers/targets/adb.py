"""An Android phone or a Linux board over ADB.

Models are pushed, timed by a runner on the device (adb_runners.py), and its result pulled; every file is verified, and
what a lost connection cut short is run again as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shlex
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from profilers.adb import COMMAND_S, AdbDevice, open_device
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.processor import CPUINFO, MODEL, processor_name
from profilers.runtimes import load_runtime
from profilers.table import Identity
from profilers.targets import Network, Probe, identity_of
from profilers.targets.adb_runners import COMPILED, DELEGATES, RUNNERS, RUNTIME, BenchmarkModel, Runner
from profilers.targets.models import Models
from profilers.timing import TimingPlan

LOCK_S = 3600  #: that a job may hold the lock, at most
PUSH_S = 300  #: that models may take to arrive
LOCK_POLL_S = 0.5
STALE_TRIES = 30  #: at a lock that nobody holds: others may be quicker, but not always
SEVERE = 3  #: Android's thermal status from which clocks are cut hard
COOL_S = (10.0, 30.0, 60.0, 120.0)
KEPT_MODELS = 24
DOWNLOAD_S = 120.0
GOVERNORS = "governors.txt"  #: in the work folder, while ours are set: those that were
#: What else lies there, of any runner.
FILES = ("job.json", "job.sh", "result.json", "out.txt", "run.txt", "times.csv", "log.txt", "pid", "lock", GOVERNORS)
CONDITIONS = """
for core in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
    [ -r "$core/scaling_cur_freq" ] && echo "clock_mhz $(($(cat "$core/scaling_cur_freq") / 1000))"
done
for zone in /sys/class/thermal/thermal_zone*/temp; do [ -r "$zone" ] && echo "temperature_mc $(cat "$zone")"; done
governor=/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
[ -r $governor ] && echo "governor $(cat $governor)"
dumpsys battery 2>/dev/null | sed -n 's/^ *level: /battery_pct /p'
dumpsys thermalservice 2>/dev/null | sed -n 's/^Thermal Status: /thermal_status /p'
true
"""
FIXED = "cmd power set-fixed-performance-mode-enabled"
CPUFREQ = "/sys/devices/system/cpu/cpufreq"


class AdbTarget:
    can_time = True

    def __init__(self, config: DeviceConfig, device: AdbDevice | None = None) -> None:
        if config.runner not in RUNNERS:
            raise UserError(f"device {config.name}: unknown runner {config.runner!r}; known: {', '.join(RUNNERS)}")
        if config.dtype not in (dtypes := RUNNERS[config.runner].dtypes):
            known = f"{', '.join(dtypes[:-1])} and {dtypes[-1]}"
            raise UserError(f"device {config.name}: {config.runner} times {known}, not {config.dtype}")
        if config.delegate and config.runner != BenchmarkModel.name:
            raise UserError(f"device {config.name}: {BenchmarkModel.name} alone has delegates, not {config.runner}")
        if config.delegate not in ("", *DELEGATES) and not config.delegate.startswith("/"):
            known = f"{', '.join(DELEGATES)}, or the path of a library on the device"
            raise UserError(f"device {config.name}: unknown delegate {config.delegate!r}; known: {known}")
        if config.delegate.startswith("/") and config.dtype == "float16":
            raise UserError(
                f"device {config.name}: how exactly {config.delegate} computes is said in delegate_options: leave "
                "dtype out"
            )
        if RUNTIME.get(config.runner, config.runtime) != config.runtime:
            raise UserError(
                f"device {config.name}: {config.runner} runs {RUNTIME[config.runner]}, not {config.runtime}"
            )
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
        cpuinfo, model, machine = (
            text if code == 0 else ""
            for code, text in map(self.device.try_run, (f"cat {CPUINFO}", f"cat {MODEL} 2>/dev/null", "uname -m"))
        )
        return processor_name(cpuinfo, model=model, machine=machine)

    @cached_property
    def _runner(self) -> Runner:
        return RUNNERS[self.config.runner](self.config, self.device)

    @cached_property
    def _android(self) -> str:
        return self._property("ro.build.fingerprint")

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
        big = [core for core, clock in zip(cores, clocks, strict=True) if clock == max(clocks)]
        if self.config.threads > len(big):
            warnings.warn(
                f"{self.device.name} has {len(big)} big cores for {self.config.threads} threads: set 'affinity' to a "
                f"mask of more cores in the configuration of {self.config.name}, or take fewer threads",
                stacklevel=2,
            )
        return f"{sum(1 << core for core in big):x}"

    def identity(self) -> Identity:
        affinity = f"cores {self._mask}" if self._mask else "any"
        return identity_of(self.config, soc=self._soc, runtime_version=self._version, affinity=affinity)

    def provenance(self) -> dict[str, Any]:
        with self._alone(COMMAND_S) if self._may_fix else nullcontext():  # to ask for that mode ends it
            fixed = self._fixed
        _, kernel = self.device.try_run("uname -sr")
        code, record = self.device.try_run(f"cat {shlex.quote(self._record)}")
        return {
            "transport": "adb",
            "runner": self.config.runner,
            "program": json.loads(record) if code == 0 and self._runner.program else None,
            "android": self._android or None,
            "kernel": kernel.strip(),
            "fixed_performance": fixed,
            "governor_set": self.config.root,
            **self.conditions(),
        }

    @property
    def _record(self) -> str:
        """Where the user's program came from, in the work folder."""
        return f"{self.work}/{self.config.runner}.json"

    def conditions(self) -> dict[str, Any]:
        """Clocks of all cores, the highest temperature, battery and thermal status: those that the device tells."""
        _, text = self.device.try_run(CONDITIONS)
        told: dict[str, list[str]] = {}
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            told.setdefault(key, []).append(value.strip())
        numbers = {key: [int(each) for each in values if each.lstrip("-").isdigit()] for key, values in told.items()}
        found: dict[str, Any] = {"clocks_mhz": numbers.get("clock_mhz")}
        found["temperature_c"] = max(numbers.get("temperature_mc") or [0]) / 1000 or None
        found |= {key: numbers[key][0] for key in ("battery_pct", "thermal_status") if numbers.get(key)}
        found["governor"] = told.get("governor", [None])[0]
        return {key: value for key, value in found.items() if value}

    def _thermal(self) -> int | None:
        code, text = self.device.try_run("dumpsys thermalservice")
        found = re.search(r"Thermal Status: (\d)", text) if code == 0 else None
        return int(found[1]) if found else None

    def probes(self) -> list[Probe]:
        probes = []
        for name, look in (
            ("device", lambda: f"{self.device.name}: {self._soc}"),
            ("runner", lambda: f"{self.config.runner} at {self._runner.path}"),
            ("runtime", lambda: f"{self.config.runtime} {self._runner.version()}"),
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
            if self.config.whole_only and not hot:
                probes.append(self._tried())
        return probes

    def _tried(self) -> Probe:
        """Whether a network of one convolution runs in this dtype and by this delegate."""
        op = OpSpec("conv", (8,), 16, 16, 8, kernel=(3, 3), padding=(1, 1))
        network = Network(OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (8, 16, 16), ("conv",)))
        what = " by ".join(part for part in (self.config.dtype, self.config.delegate) if part)
        try:
            self.time_networks([network], TimingPlan(rounds=1, min_runs=1), seed=0)
        except DeviceError as error:
            return Probe("trial", False, f"{what}: {error}")
        return Probe("trial", True, f"{what} runs")

    # Timing

    @cached_property
    def _version(self) -> str:
        """Of the runtime, when this process first asked: rows of one run are of no other."""
        return self._runner.version()

    def _same_version(self) -> None:
        """DeviceError where there is no runtime any more, or another."""
        if (version := self._runner.version()) != self._version:
            raise DeviceError(
                f"{self.device.name} has {version} now, and had {self._version} when this began: run this again"
            )

    def lower(self, graph: OpGraph) -> OpGraph:
        return self.runtime.lower(graph)

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float] | None:
        return None

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        models = [self._model(network) for network in networks]
        runner = self._runner
        with self._alone(sum(COOL_S) + PUSH_S) as hold:
            self._same_version()  # where there is none, nothing is pushed
            self._cool()
            names = self._pushed(models)
            hold(runner.seconds(plan, len(models)))
            with self._steady_clocks():
                return runner.time(names, plan, seed, self._prefix)

    def time_in_fresh_process(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        return self.time_networks(networks, plan, seed=seed)  # every job is a process of its own

    def _pushed(self, models: Sequence[bytes]) -> list[str]:
        """Paths of the models on the device, by what they hold: what is there is not pushed again."""
        folder = f"{self.work}/models"
        self.device.run(f"mkdir -p {shlex.quote(folder)}")
        names = [f"{hashlib.sha256(model).hexdigest()[:24]}{self.runtime.SUFFIX}" for model in models]
        listed = self.device.run(
            f'cd {shlex.quote(folder)} && for file in *; do [ ! -f "$file" ] || echo "$file $(wc -c < "$file")"; done'
        )
        there = {name: size.strip() for name, _, size in (line.partition(" ") for line in listed.splitlines())}
        old = sorted(set(there) - set(names))
        if old and len(set(there) | set(names)) > KEPT_MODELS:
            self.device.run(f"cd {shlex.quote(folder)} && rm -f {' '.join(map(shlex.quote, old))}")
        for name, model in dict(zip(names, models, strict=True)).items():
            if there.get(name) != str(len(model)):  # a device that loses power may cut what has arrived
                self.device.push(model, f"{folder}/{name}")
        return [f"{folder}/{name}" for name in names]

    @property
    def _prefix(self) -> str:
        return f"taskset {self._mask} " if self._mask else ""

    # Keeping the device to ourselves, cool and at steady clocks

    @property
    def _lock(self) -> str:
        return self.config.lock or f"{self.work}/lock"

    @contextmanager
    def _alone(self, seconds: float) -> Iterator[Callable[[float], None]]:
        """Hold the device's lock: two people never time on one phone at once. After so many seconds anyone may take it;
        what is yielded holds it for so many seconds more, from then on.

        Time on the device is counted since it was started: its clock may jump. A lock that holds for longer than LOCK_S
        from now is from before that.
        """
        lock, owner = shlex.quote(self._lock), secrets.token_hex(8)
        now = "now=$(cut -d. -f1 /proc/uptime); "

        def held_for(seconds: float) -> str:
            """What the link says."""
            return f"{owner}:$((now + {math.ceil(min(seconds, LOCK_S))}))"

        self.device.run(f"mkdir -p {shlex.quote(self.work)} {shlex.quote(str(Path(self._lock).parent))}")
        waited, stale = time.monotonic(), 0
        take = (  # a link is made with all that it says, or not at all
            f"{now}if said=$(ln -s {held_for(seconds)} {lock} 2>&1); then echo taken; "
            f"else held=$(readlink {lock}); end=${{held#*:}}; "
            f'if [ "${{held%%:*}}" = {owner} ]; then echo taken; '
            f'elif [ -n "$end" ] && [ $((end - now)) -gt 0 ] && [ $((end - now)) -le {LOCK_S} ]; then echo held; '
            f'else [ -L {lock} ] && [ "$(readlink {lock})" = "$held" ] && rm -f {lock}; echo "stale $said"; fi; fi'
        )
        while (answer := self.device.run(take).strip().partition(" "))[0] != "taken":
            state, _, said = answer
            stale += state == "stale"
            if state == "held" and time.monotonic() - waited >= self.config.lock_wait_s:
                raise DeviceError(
                    f"{self.device.name} is being measured by someone else: wait, or remove {self._lock} there"
                )
            if stale >= STALE_TRIES:
                why = said.splitlines()[-1] if said else "no reason given"
                raise DeviceError(
                    f"{self.device.name}: cannot lock it ({why}): set 'workdir' or 'lock' in the configuration of "
                    f"{self.config.name}, or remove {self._lock} there"
                )
            time.sleep(0.1 if state == "stale" else LOCK_POLL_S)

        def hold(seconds: float) -> None:
            mine = shlex.quote(f"{self._lock}.{owner}")
            code, _ = self.device.try_run(
                f'{now}case "$(readlink {lock})" in {owner}:*) rm -f {mine}; ln -s {held_for(seconds)} {mine} && '
                f"mv -f {mine} {lock} ;; *) exit 1 ;; esac"
            )
            if code != 0:
                raise DeviceError(f"{self.device.name}: {self._lock} there was taken by someone else: run this again")

        try:
            yield hold
        finally:
            self.device.try_run(f'case "$(readlink {lock})" in {owner}:*) rm -f {lock} ;; esac')

    def _cool(self) -> None:
        """Wait for a hot phone; DeviceError where it stays hot."""
        for wait_s in (*COOL_S, None):
            status = self._thermal()
            if status is None or status < SEVERE:
                return
            if wait_s is not None:
                time.sleep(wait_s)
        raise DeviceError(f"{self.device.name} is too hot (thermal status {status}): let it cool, and run this again")

    @contextmanager
    def _steady_clocks(self) -> Iterator[None]:
        """Hold Android's fixed-performance mode and the governors, as far as the configuration lets us."""
        try:
            if self._fixed:
                self.device.run(f"{FIXED} true")
            if self.config.root:
                self._as_root(
                    f"cd {shlex.quote(self.work)} || exit; files={CPUFREQ}/policy*/scaling_governor; "
                    f'[ -f {GOVERNORS} ] || for file in $files; do echo "$file $(cat "$file")"; done > {GOVERNORS}; '
                    "for file in $files; do echo performance > $file; done"
                )
            yield
        finally:
            self._free_clocks()

    def _free_clocks(self) -> None:
        if self._fixed:
            self.device.try_run(f"{FIXED} false")
        if self.config.root and self.device.try_run(f"[ -f {shlex.quote(f'{self.work}/{GOVERNORS}')} ]")[0] == 0:
            self._as_root(
                f"cd {shlex.quote(self.work)} && "
                f'while read file governor; do echo "$governor" > "$file"; done < {GOVERNORS}; rm -f {GOVERNORS}'
            )

    @property
    def _may_fix(self) -> bool:
        return bool(self.config.fixed_performance and self._android)

    @cached_property
    def _fixed(self) -> bool:
        """Whether the clocks can be kept by the operating system: Android 11 and newer, some phones only."""
        return self._may_fix and self.device.try_run(f"{FIXED} false")[0] == 0

    @cached_property
    def _shell_of_root(self) -> str:
        for shell in ("sh -c", "su -c", "su 0 sh -c"):
            code, text = self.device.try_run(f"{shell} 'id -u'")
            if code == 0 and text.strip() == "0":
                return shell
        raise DeviceError(
            f"{self.device.name} gives no root: set root = false in the configuration of {self.config.name}"
        )

    def _as_root(self, command: str) -> None:
        self.device.run(f"{self._shell_of_root} {shlex.quote(command)}")

    # Setting up

    def setup(self, binary: Path | None) -> list[Probe]:
        """Put the runner on the device; what is there afterwards."""
        runner = self._runner
        if not runner.program:
            if binary is not None:
                raise UserError(f"device {self.config.name} runs Python: leave --binary out")
            return self.probes()
        if binary is not None:
            source = binary.name
            try:
                data = binary.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {binary}: {error.strerror}") from None
        elif self.config.download:
            source, data = self.config.download, _downloaded(self.config.download)
        else:
            raise UserError(
                f"--binary PATH is missing: a {self.config.runner} built for the device (see docs/devices.md), or "
                "'download' in its configuration"
            )
        digest = hashlib.sha256(data).hexdigest()
        if self.config.sha256 not in ("", digest):
            raise UserError(
                f"{source} has the SHA-256 {digest}, not {self.config.sha256}: nothing was put on the device"
            )
        record = {"source": source, "sha256": digest, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._alone(PUSH_S):  # nobody's program changes while it runs
            self.device.push(data, runner.path, executable=True)
            self.device.push(json.dumps(record).encode(), self._record)
        return self.probes()

    def clean(self) -> None:
        """Remove all that was put on the device, and set back what was changed."""
        runner = self._runner
        ours = [*FILES, f"{self.config.runner}.json", getattr(runner, "name", "device_runner.py")]
        files = " ".join(shlex.quote(f"{name}{end}") for name in ours for end in ("", ".part"))
        folder = shlex.quote(self.work)
        with self._alone(PUSH_S):
            self._free_clocks()
            self.device.run(
                f"cd {folder} || exit; rm -rf models {COMPILED}; rm -f {files}; cd /; rmdir {folder} 2>/dev/null; true"
            )


def _downloaded(address: str) -> bytes:
    if not address.startswith(("https://", "http://")):
        raise UserError(f"cannot download {address}: it is no web address")
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_S) as reply:
            data: bytes = reply.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(
            f"cannot download {address} ({error}): fetch it by hand, and give its path by --binary"
        ) from None
    return data
