"""A real ADB daemon on this machine (scripts/loopback-device), and a proxy in between that cuts, stalls and corrupts.

Left out, aloud, where there is no root or no Debian mirror: everything else about ADB is tested in test_adb.py.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profilers.adb import AdbDevice, ShellLink, open_device
from profilers.device import DeviceConfig, load_device
from profilers.errors import DeviceError
from profilers.farm import run_steps
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.profile import Anchor, ProfileJob, missing_steps
from profilers.table import LatencyTable, Measurement
from profilers.targets import Network, open_target, open_targets
from profilers.targets.adb import AdbTarget
from profilers.timing import TimingPlan

pytest.importorskip("adb_shell")
pytest.importorskip("ai_edge_litert")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "loopback-device"
PORT = 5571
PLAN = TimingPlan(rounds=3, burst_s=0.005)


def loopback(action: str, *, port: int = PORT, count: int = 1) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), action, "--port", str(port), "--count", str(count)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a loopback device needs root: the tests over a real ADB daemon are left out")
    started = loopback("start")
    if started.returncode != 0:
        pytest.skip(
            f"no loopback device ({started.stderr.strip()[-200:]}): the tests over a real ADB daemon are left out"
        )
    yield started.stdout.strip()
    assert loopback("stop").returncode == 0


@pytest.fixture
def config(address: str) -> DeviceConfig:
    name = f"/data/local/tmp/amc hw's {random.randrange(10**9)}"
    return replace(load_device("loopback"), address=address, workdir=name, lock="/tmp/amc-hw-tests.lock")


def graph(channels: int = 64, size: int = 56) -> OpGraph:
    nodes, source = [], OpGraph.INPUT
    for index, c_in in enumerate((3, channels, channels)):
        op = OpSpec("conv", (c_in,), size, size, channels, kernel=(3, 3), padding=(1, 1), activation="relu")
        nodes.append(OpNode(f"conv{index}", op, (source,)))
        source = nodes[-1].name
    return OpGraph(tuple(nodes), (3, size, size), (source,))


NETWORKS = [Network(graph(8, 16)), Network(graph(32, 16))]


class Proxy:
    """A TCP proxy to a daemon. `fault(connection, direction, passed, data)` returns what to pass on; None cuts."""

    def __init__(self, address: str, fault: Callable[[int, str, int, bytes], bytes | None]) -> None:
        host, _, port = address.rpartition(":")
        self.target, self.fault, self.connections = (host, int(port)), fault, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            number, self.connections = self.connections, self.connections + 1
            for direction, source, sink in (("up", client, server), ("down", server, client)):
                threading.Thread(target=self._pass, args=(number, direction, source, sink), daemon=True).start()

    def _pass(self, number: int, direction: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                changed = self.fault(number, direction, passed, data)
                passed += len(data)
                if changed is None:
                    break
                sink.sendall(changed)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


def test_a_device_is_found_checked_measured_and_cleaned(config: DeviceConfig) -> None:
    target = AdbTarget(config)
    assert all(probe.ok for probe in target.probes()), target.probes()
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    assert [len(each) for each in samples] == [3, 3] and np.median(samples[0]) < np.median(samples[1])
    target.clean()
    code, _ = target.device.try_run(f"test -e {shlex.quote(config.workdir)}")
    assert code == 1


def test_a_key_is_made_for_the_user_alone(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert open_device("loopback", address=config.address).run("echo there") == "there\n"
    assert (tmp_path / "amc-hw" / "adbkey").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_times_over_adb_are_those_of_this_machine(config: DeviceConfig, dtype: str) -> None:
    """The transport does not leak into the timing: the same runtime, through the daemon and without it."""
    network, plan = [Network(graph())], TimingPlan(rounds=9, burst_s=0.02)
    here = open_target(replace(load_device("host-litert"), dtype=dtype))
    there = AdbTarget(replace(config, dtype=dtype))
    least = [np.inf, np.inf]  # others use this machine: what they do only slows
    for attempt in range(15):
        for index, target in enumerate((here, there)):
            least[index] = min(least[index], *target.time_networks(network, plan, seed=attempt)[0])
        if attempt >= 2 and abs(least[1] / least[0] - 1) < 0.05:
            break
    assert abs(least[1] / least[0] - 1) < 0.05, least


def cut_after(limit: int, direction: str, connections: int = 1) -> Callable[[int, str, int, bytes], bytes | None]:
    def fault(number: int, way: str, passed: int, data: bytes) -> bytes | None:
        return None if number < connections and way == direction and passed + len(data) > limit else data

    return fault


def flip_at(place: int, direction: str) -> Callable[[int, str, int, bytes], bytes | None]:
    def fault(number: int, way: str, passed: int, data: bytes) -> bytes | None:
        if number == 0 and way == direction and passed <= place < passed + len(data):
            data = data[: place - passed] + bytes([data[place - passed] ^ 1]) + data[place - passed + 1 :]
        return data

    return fault


FAULTS = {
    "cut in mid-push": cut_after(12_000, "up"),
    "cut twice": cut_after(9_000, "up", connections=2),
    "cut in mid-reply": cut_after(700, "down"),
    "cut early": cut_after(60, "down"),
    "a byte of a push": flip_at(9_000, "up"),
    "a byte of a reply": flip_at(600, "down"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wire_that_fails_costs_time_and_nothing_else(config: DeviceConfig, fault: str) -> None:
    proxy = Proxy(config.address, FAULTS[fault])
    try:
        target = AdbTarget(replace(config, address=proxy.address))
        samples = target.time_networks(NETWORKS, PLAN, seed=0)
        assert [len(each) for each in samples] == [3, 3] and all(0 < ms < 1000 for each in samples for ms in each)
    finally:
        proxy.close()


@pytest.mark.parametrize("stall_s", [3, 30])
def test_a_wire_that_stalls_is_given_up_and_taken_up_again(config: DeviceConfig, stall_s: float) -> None:
    def fault(number: int, way: str, passed: int, data: bytes) -> bytes | None:
        if number == 0 and way == "down" and passed > 300:
            time.sleep(stall_s)
        return data

    proxy = Proxy(config.address, fault)
    phone = AdbDevice("phone", lambda: ShellLink(address=proxy.address), sleep=lambda seconds: None)
    try:
        begun = time.monotonic()
        assert phone.try_run("echo one; sleep 0.1; head -c 2000 /dev/zero | tr '\\0' x", timeout_s=1.5)[0] == 0
    finally:
        proxy.close()
    assert proxy.connections >= 2 and time.monotonic() - begun < 10


def test_a_connection_that_is_half_open_is_made_anew(config: DeviceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes back any more, and nobody says so: as after a router has forgotten the connection."""
    monkeypatch.setattr("profilers.adb.SILENCE_S", 1.0)
    for method in (AdbDevice.run, AdbDevice.try_run):
        monkeypatch.setattr(method, "__kwdefaults__", {"timeout_s": 2.0})
    cut = threading.Event()

    def fault(number: int, way: str, passed: int, data: bytes) -> bytes | None:
        if number == 0 and way == "down" and passed > 2_000:
            cut.wait(60)
            return None
        return data

    proxy = Proxy(config.address, fault)
    try:
        samples = AdbTarget(replace(config, address=proxy.address)).time_networks(NETWORKS, PLAN, seed=0)
        assert [len(each) for each in samples] == [3, 3] and proxy.connections >= 2
    finally:
        cut.set()
        proxy.close()


def test_a_key_that_is_not_accepted_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that answers every key with another token, as a phone whose owner does not tap "allow"."""
    monkeypatch.setattr("profilers.adb.CONNECT_S", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))

    def message(command: bytes, argument: int, data: bytes) -> bytes:
        number = int.from_bytes(command, "little")
        fields = (number, argument, 0, len(data), sum(data), number ^ 0xFFFFFFFF)
        return b"".join(field.to_bytes(4, "little") for field in fields) + data

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with suppress(OSError):
                    while len(head := client.recv(24, socket.MSG_WAITALL)) == 24:
                        client.recv(int.from_bytes(head[12:16], "little"), socket.MSG_WAITALL)
                        if head[:4] == b"CNXN" or head[4:8] == (2).to_bytes(4, "little"):  # a signature
                            client.sendall(message(b"AUTH", 1, bytes(range(20))))

    threading.Thread(target=serve, daemon=True).start()
    phone = open_device("phone", address=f"127.0.0.1:{listener.getsockname()[1]}")
    phone._sleep = lambda seconds: None
    try:
        with pytest.raises(DeviceError, match="does not trust this computer yet: unlock its screen, accept the key"):
            phone.run("true")
    finally:
        listener.close()


def test_a_device_that_starts_anew_is_measured_or_told(config: DeviceConfig) -> None:
    """It goes away while it measures, and comes back as after a reboot: with nothing of ours, its lock included."""
    target = AdbTarget(replace(config, address=f"127.0.0.1:{PORT + 8}", lock=""))
    assert loopback("start", port=PORT + 8).returncode == 0
    try:
        assert target.time_networks(NETWORKS, PLAN, seed=0)

        def restart() -> None:
            time.sleep(1.0)
            loopback("stop", port=PORT + 8)
            loopback("start", port=PORT + 8)

        thread = threading.Thread(target=restart)
        thread.start()
        long = TimingPlan(rounds=40, burst_s=0.05)
        with pytest.raises(DeviceError, match="is gone: was the device started anew|cannot be reached|there is no"):
            target.time_networks(NETWORKS, long, seed=0)
        thread.join()
        # the same command again, as the message says
        assert AdbTarget(target.config).time_networks(NETWORKS, PLAN, seed=0)
    finally:
        loopback("stop", port=PORT + 8)


def test_benchmark_model_end_to_end(config: DeviceConfig) -> None:
    """A stand-in for Google's program that runs LiteRT on the device, put there and driven as the real one is."""
    target = AdbTarget(replace(config, runner="benchmark_model"))
    probes = target.setup(Path(__file__).with_name("benchmark_model.py"))
    assert all(probe.ok for probe in probes), probes
    assert target.identity().runtime_version.startswith("benchmark_model ")
    network = [Network(graph())]
    python = AdbTarget(config)
    program, script = (
        float(np.median(each.time_networks(network, TimingPlan(rounds=5), seed=0)[0])) for each in (target, python)
    )
    assert 0.5 < program / script < 2
    gpu = AdbTarget(replace(target.config, delegate="gpu", dtype="float16"))
    assert gpu.identity().runtime_version == f"{target.identity().runtime_version}, delegate gpu"
    assert gpu.time_networks(NETWORKS, PLAN, seed=0)
    compiled = gpu.device.run(f"ls {shlex.quote(f'{config.workdir}/compiled')}").split()
    assert len(compiled) == 2 and all(name.endswith(".bin") for name in compiled)
    target.clean()
    assert gpu.device.try_run(f"test -e {shlex.quote(f'{config.workdir}/compiled')}")[0] == 1


def test_onnxruntime_is_there_too(config: DeviceConfig) -> None:
    target = AdbTarget(replace(config, runtime="onnxruntime"))
    assert all(probe.ok for probe in target.probes()), target.probes()
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    assert np.median(samples[0]) < np.median(samples[1])


# Several devices


def test_a_farm_of_three_loses_one_and_no_row(config: DeviceConfig, tmp_path: Path) -> None:
    """Three daemons behind one lock; one is killed half-way, and what it had begun is measured by the others."""
    port, full = PORT + 10, graph(32, 16)
    assert loopback("start", port=port, count=3).returncode == 0
    try:
        targets = open_targets(config.at([f"127.0.0.1:{port + index}" for index in range(3)]))
        assert len(targets) == 3
        table = LatencyTable.open(tmp_path / "loopback.jsonl", targets[0].identity(), targets[0].provenance())
        fine = (tuple(range(4, 33)),)
        job = ProfileJob(lambda widths: graph(widths[0], 16), ((8, 16, 32),), fine, networks=2, calibration=12)
        steps = missing_steps(job, table, targets[0])
        assert len(steps) >= 8
        anchors, appended, killed = [Anchor(target, full, table) for target in targets], 0, -1
        members = [target.config.member for target in targets]

        def append(rows: list[Measurement]) -> None:
            nonlocal appended, killed
            table.append(rows)
            appended += 1
            if appended == len(steps) // 2:  # who has measured by now is up to chance: the lock is anyone's
                killed = members.index(rows[0].details["member"])
                assert loopback("stop", port=port + killed).returncode == 0

        with pytest.warns(UserWarning, match="a device is left out from here on: loopback at") as warned:
            assert run_steps(steps, anchors, append, lambda *_: None)
        left_out = f"a device is left out from here on: loopback at 127.0.0.1:{port + killed}"
        assert any(str(one.message).startswith(left_out) for one in warned)
        assert missing_steps(job, table, targets[killed - 1]) == []
        ops = [row.op for row in table.of_type("op")]
        assert len(ops) == len(set(ops)) and appended == len(steps)
        assert {row.details["member"] for row in table.rows} == set(members) and len(set(members)) == 3
    finally:
        loopback("stop", port=port, count=3)


def test_a_daemon_that_is_gone_is_a_line(address: str) -> None:
    phone = AdbDevice("phone", lambda: ShellLink(address="127.0.0.1:1"), sleep=lambda seconds: None)
    with pytest.raises(DeviceError, match="phone cannot be reached"):
        phone.run("true")


def test_a_disk_that_is_full_is_a_line(config: DeviceConfig) -> None:
    target = AdbTarget(replace(config, workdir="/data/full"))
    target.device.run("mkdir -p /data/full && mount -t tmpfs -o size=16k tmpfs /data/full")
    try:
        with pytest.raises(DeviceError, match="refuses a file: .*No space left"):
            target.time_networks([Network(graph(64))], PLAN, seed=0)
    finally:
        target.device.run("umount /data/full")
