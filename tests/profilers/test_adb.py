"""The ADB target on a device that is a folder of this machine, and every way in which a link or a runner can fail.

`Folder` stands in for the wire: its shell is this machine's, its files lie below a temporary folder. What is measured
is real: the runner is started as a process and times LiteRT.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profilers.adb import RETRIES, AdbDevice, LinkLost, open_device
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.targets import Network, open_target
from profilers.targets.adb import LOCK_S, AdbTarget
from profilers.timing import TimingPlan

PLAN = TimingPlan(rounds=3, burst_s=0.002)
needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")


class Folder:
    """A link to this machine. `fault(kind, number, value)` may change what passes, or raise; number counts per kind."""

    def __init__(self, fault: Callable[[str, int, bytes], bytes] | None = None) -> None:
        self.fault = fault or (lambda kind, number, value: value)
        self.counts: dict[str, int] = {}
        self.opened = 0

    def __call__(self) -> Folder:
        self.opened += 1
        return self

    def _passed(self, kind: str, value: bytes) -> bytes:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.fault(kind, self.counts[kind], value)

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return self._passed("shell", done.stdout)

    def send(self, data: bytes, path: str) -> None:
        Path(path).write_bytes(self._passed("send", data))

    def fetch(self, path: str) -> bytes:
        return self._passed("fetch", Path(path).read_bytes())

    def close(self) -> None:
        pass


def device(link: Folder) -> AdbDevice:
    return AdbDevice("phone", link, sleep=lambda seconds: None)


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    return DeviceConfig("phone", "adb", "litert", workdir=str(tmp_path / "a folder's"), python=sys.executable)


def small(channels: int = 8) -> OpGraph:
    op = OpSpec("conv", (3,), 16, 16, channels, kernel=(3, 3), padding=(1, 1), activation="relu")
    return OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (3, 16, 16), ("conv",))


NETWORKS = [Network(small()), Network(small(64))]


# The wire


def test_commands_have_exit_codes_and_text(tmp_path: Path) -> None:
    phone = device(Folder())
    assert phone.try_run("echo hello; exit 3") == (3, "hello\n")
    assert phone.run("printf 'no newline'") == "no newline"
    with pytest.raises(DeviceError, match="phone: false ended with 1: no output"):
        phone.run("false")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_files_arrive_and_come_back_whole(tmp_path: Path, size: int) -> None:
    phone, path, data = device(Folder()), str(tmp_path / "it's $(a) file; rm"), bytes(range(256)) * (size // 256 + 1)
    phone.push(data[:size], path)
    assert phone.pull(path) == data[:size] and [file.name for file in tmp_path.iterdir()] == ["it's $(a) file; rm"]
    with pytest.raises(DeviceError, match="there is no"):
        phone.pull(str(tmp_path / "nothing"))


def lost(*_: Any) -> bytes:
    raise LinkLost("Connection reset by peer")


FAULTS: dict[str, Callable[[str, int, bytes], bytes]] = {
    "cut before a push": lambda kind, number, value: lost() if kind == "send" and number == 1 else value,
    "cut before a pull": lambda kind, number, value: lost() if kind == "fetch" and number == 1 else value,
    "cut in a command": lambda kind, number, value: lost() if kind == "shell" and number in (2, 5, 9) else value,
    "half of a push": lambda kind, number, value: value[: len(value) // 2] if kind == "send" and number == 2 else value,
    "a byte of a push": lambda kind, number, value: flipped(value) if kind == "send" and number in (1, 3) else value,
    "a byte of the result": lambda kind, number, value: flipped(value) if kind == "fetch" and number == 1 else value,
    "half of the result": lambda kind, number, value: value[:9] if kind == "fetch" and number == 1 else value,
    "last byte of a reply": lambda kind, number, value: value[:-2] if kind == "shell" and number % 7 == 3 else value,
    "nothing of a reply": lambda kind, number, value: b"" if kind == "shell" and number % 6 == 2 else value,
}


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_fails_now_and_then_costs_time_and_nothing_else(config: DeviceConfig, fault: str) -> None:
    link = Folder(FAULTS[fault])
    target = AdbTarget(config, device(link))
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    assert [len(each) for each in samples] == [3, 3] and all(0 < ms < 1000 for each in samples for ms in each)
    assert not Path(config.workdir, "lock").exists()


ALWAYS: dict[str, tuple[Callable[[str, int, bytes], bytes], str]] = {
    "away": (lost, "phone cannot be reached .Connection reset by peer.: check the cable"),
    "pushes damaged": (lambda kind, n, value: flipped(value) if kind == "send" else value, "does not arrive whole"),
    "pulls damaged": (lambda kind, n, value: flipped(value) if kind == "fetch" else value, "does not come back whole"),
    "disk full": (lambda kind, n, value: value[:100] if kind == "send" else value, "is the device full"),
}


@needs_litert
@pytest.mark.parametrize("fault", ALWAYS)
def test_a_link_that_always_fails_is_an_error_and_no_number(config: DeviceConfig, fault: str) -> None:
    always, words = ALWAYS[fault]
    with pytest.raises(DeviceError, match=words) as caught:
        AdbTarget(config, device(Folder(always))).time_networks(NETWORKS, PLAN, seed=0)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_a_device_that_does_not_trust_us_is_not_asked_again() -> None:
    asked = []

    def refused() -> Any:
        asked.append(1)
        raise DeviceError("accept the key")

    with pytest.raises(DeviceError, match="accept the key"):
        AdbDevice("phone", refused, sleep=lambda seconds: None).run("true")
    assert len(asked) == 1


# Runners that fail


RUNNERS = {
    "crashes": ("exit 1", "the runner ended with 1"),
    "dies": ("kill -9 $$", "the runner ended with 137"),
    "prints rubbish": ("echo 'x y z' > result.json", "the runner's result is damaged"),
    "prints half a line": ('printf \'{"job": "\' > result.json', "the runner's result is damaged"),
    "says nothing": ("exit 0", "there is no .*result.json"),
    "gives another job's": ('echo \'{"job": "0", "samples_ms": [[1,1,1],[1,1,1]]}\' > result.json', "of another job"),
    "gives zeros": ("give '[[1,1,0],[1,1,1]]'", "did not give 3 times above zero for each of 2 models"),
    "gives too few": ("give '[[1,1,1]]'", "did not give 3 times above zero"),
    "gives no numbers": ("give '[[1,1,1],[1,NaN,1]]'", "did not give 3 times above zero"),
}


@needs_litert
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_runner_that_fails_is_an_error_and_no_number(config: DeviceConfig, tmp_path: Path, runner: str) -> None:
    body, words = RUNNERS[runner]
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = --probe ] && exec {shlex.quote(sys.executable)} "$@"\n'
        'give() { id=$(sed \'s/.*"id": "\\([0-9a-f]*\\)".*/\\1/\' job.json); '
        'echo "{\\"job\\": \\"$id\\", \\"samples_ms\\": $1}" > result.json; }\n'
        f"{body}\n"
    )
    python.chmod(0o755)
    target = AdbTarget(replace(config, python=str(python)), device(Folder()))
    with pytest.raises(DeviceError, match=words) as caught:
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert "\n" not in str(caught.value) and not Path(config.workdir, "lock").exists()


def test_no_python_or_no_runtime_there_is_told(config: DeviceConfig, tmp_path: Path) -> None:
    target = AdbTarget(replace(config, python="/nowhere/python3"), device(Folder()))
    with pytest.raises(DeviceError, match="/nowhere/python3 does not run there .*benchmark_model"):
        target.identity()
    assert [probe.ok for probe in target.probes()] == [True, True, False]
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\necho \'{"runtimes": {"onnxruntime": "1.2"}}\'\n')
    bare.chmod(0o755)
    target = AdbTarget(replace(config, python=str(bare)), device(Folder()))
    with pytest.raises(DeviceError, match="litert is not installed there .found: onnxruntime."):
        target.identity()


# What is measured


@needs_litert
@pytest.mark.slow
def test_identity_provenance_and_probes(config: DeviceConfig) -> None:
    target = AdbTarget(config, device(Folder()))
    identity = target.identity()
    assert identity.runtime == "litert" and identity.runtime_version and identity.affinity == "any"
    assert "serial" not in json.dumps(target.provenance()) and target.provenance()["transport"] == "adb"
    assert all(probe.ok for probe in target.probes())
    target.clean()
    assert not Path(config.workdir).exists()


@needs_litert
def test_models_that_are_there_are_not_pushed_again(config: DeviceConfig) -> None:
    link = Folder()
    target = AdbTarget(config, device(link))
    target.time_networks(NETWORKS, PLAN, seed=0)
    before = link.counts["send"]
    target.time_networks(NETWORKS, PLAN, seed=1)
    assert link.counts["send"] == before + 1  # the job alone


BENCHMARK_MODEL = """#!/bin/sh
for flag in "$@"; do case $flag in --graph=*) graph=${flag#--graph=} ;; esac; done
[ -f "$graph" ] || { echo "ERROR: Benchmarking failed."; exit 1; }
size=$(wc -c < "$graph")
echo "STARTING!"
echo "Graph: [$graph]"
echo "count=1 curr=900"
echo "count=3 first=$size curr=$size min=$size max=$size avg=$size std=0"
echo "Inference timings in us: Init: 100, First inference: 900, Warmup (avg): 900, Inference (avg): $size"
"""


@needs_litert
def test_benchmark_model_is_run_and_read(config: DeviceConfig, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(BENCHMARK_MODEL)
    target = AdbTarget(replace(config, runner="benchmark_model"), device(Folder()))
    with pytest.raises(DeviceError, match="devices setup phone --binary PATH"):
        target.identity()
    with pytest.raises(UserError, match="--binary PATH is missing"):
        target.setup(None)
    assert all(probe.ok for probe in target.setup(program))
    assert target.identity().runtime_version.startswith("benchmark_model ")
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    sizes = [len(target._model(network)) for network in NETWORKS]
    assert samples == [[size / 1000] * 3 for size in sizes]
    assert not list(Path(config.workdir).glob("run*.txt"))


@needs_litert
@pytest.mark.parametrize(("reply", "words"), [("exit 1", "an empty log"), ("echo rubbish", "did not finish")])
def test_a_benchmark_model_that_fails_is_an_error(config: DeviceConfig, tmp_path: Path, reply: str, words: str) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(f"#!/bin/sh\n{reply}\n")
    target = AdbTarget(replace(config, runner="benchmark_model"), device(Folder()))
    target.setup(program)
    with pytest.raises(DeviceError, match=words):
        target.time_networks(NETWORKS, PLAN, seed=0)


# The lock


@needs_litert
def test_a_lock_that_someone_holds_is_waited_for_and_then_respected(
    config: DeviceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.targets.adb.LOCK_WAIT_S", 0)
    monkeypatch.setattr("profilers.targets.adb.time.sleep", lambda seconds: None)
    lock = Path(config.workdir, "lock")
    lock.mkdir(parents=True)
    uptime = int(float(Path("/proc/uptime").read_text().split()[0]))
    (lock / "owner").write_text(f"somebody {uptime + 600}\n")
    target = AdbTarget(config, device(Folder()))
    with pytest.raises(DeviceError, match="being measured by someone else"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert (lock / "owner").read_text().startswith("somebody")
    for stale in (uptime - 1, uptime + LOCK_S + 100):  # expired; or from before the device was started anew
        lock.mkdir(exist_ok=True)
        (lock / "owner").write_text(f"somebody {stale}\n")
        assert target.time_networks(NETWORKS, PLAN, seed=0)
        assert not lock.exists()


# Which device


def test_a_device_is_named_or_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.setattr("profilers.adb.attached", lambda: [])
    with pytest.raises(DeviceError, match="pixel: no device is attached. On the phone: Settings, About"):
        open_device("pixel")
    monkeypatch.setattr("profilers.adb.attached", lambda: ["A1", "B2"])
    with pytest.raises(DeviceError, match="several devices are attached .A1, B2.: give --serial, or ANDROID_SERIAL"):
        open_device("pixel")
    assert open_device("pixel", serial="B2").name == "pixel (B2)"
    monkeypatch.setenv("ANDROID_SERIAL", "A1")
    assert open_device("pixel").name == "pixel (A1)"
    assert open_device("pixel", serial="10.0.0.7:5555").name == "pixel at 10.0.0.7:5555"
    with pytest.raises(DeviceError, match="address 'phone' is not HOST:PORT"):
        open_device("pixel", address="phone")


def test_nobody_at_the_address_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adb_shell")
    phone = open_device("board", address="127.0.0.1:9")
    monkeypatch.setattr(phone, "_sleep", lambda seconds: None)
    with pytest.raises(DeviceError, match="board at 127.0.0.1:9 cannot be reached"):
        phone.run("true")


def test_unknown_runners_and_dtypes_are_named() -> None:
    with pytest.raises(UserError, match="unknown runner 'abacus'; known: python, benchmark_model"):
        open_target(DeviceConfig("x", "adb", "litert", runner="abacus"))
    with pytest.raises(UserError, match="only float32"):
        open_target(DeviceConfig("x", "adb", "litert", dtype="int8"))


assert RETRIES > 2  # the faults above come twice in a row at most
