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
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.targets import Network, open_target
from profilers.targets.adb import AdbTarget
from profilers.timing import TimingPlan

pytest.importorskip("adb_shell")
pytest.importorskip("ai_edge_litert")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "loopback-device"
PORT = 5571
PLAN = TimingPlan(rounds=3, burst_s=0.005)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a loopback device needs root: the tests over a real ADB daemon are left out")
    started = subprocess.run([str(SCRIPT), "start", "--port", str(PORT)], capture_output=True, text=True)
    if started.returncode != 0:
        pytest.skip(
            f"no loopback device ({started.stderr.strip()[-200:]}): the tests over a real ADB daemon are left out"
        )
    yield started.stdout.strip()
    subprocess.run([str(SCRIPT), "stop", "--port", str(PORT)], check=True)


@pytest.fixture
def config(address: str) -> DeviceConfig:
    name = f"/data/local/tmp/amc hw's {random.randrange(10**9)}"
    return replace(load_device("loopback"), address=address, workdir=name)


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


def test_times_over_adb_are_those_of_this_machine(config: DeviceConfig) -> None:
    """The transport does not leak into the timing: the same runtime, through the daemon and without it."""
    network, plan = [Network(graph())], TimingPlan(rounds=9, burst_s=0.02)
    here = open_target(load_device("host-litert"))
    there = AdbTarget(config)
    ratios = []
    for attempt in range(6):
        pair = [float(np.median(target.time_networks(network, plan, seed=attempt)[0])) for target in (here, there)]
        ratios.append(pair[1] / pair[0])
        if abs(float(np.median(ratios)) - 1) < 0.05 and attempt >= 2:
            break
    assert abs(float(np.median(ratios)) - 1) < 0.10, ratios  # 5% on a quiet machine; others use this one


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


def test_a_wire_that_stalls_is_given_up_and_taken_up_again(config: DeviceConfig) -> None:
    def fault(number: int, way: str, passed: int, data: bytes) -> bytes | None:
        if number == 0 and way == "down" and passed > 300:
            time.sleep(3)
        return data

    proxy = Proxy(config.address, fault)
    phone = AdbDevice("phone", lambda: ShellLink(address=proxy.address), sleep=lambda seconds: None)
    try:
        assert phone.try_run("echo one; sleep 0.1; head -c 2000 /dev/zero | tr '\\0' x", timeout_s=1.5)[0] == 0
    finally:
        proxy.close()
    assert proxy.connections >= 2


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
