"""Several devices that are alike: every measurement once, on whichever is free; one that drops out costs nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profilers.device import DeviceConfig, load_device
from profilers.errors import DeviceError, UserError
from profilers.farm import run_steps
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.profile import Anchor, Step
from profilers.table import Identity, LatencyTable, Measurement
from profilers.targets import Network, open_targets
from profilers.targets.fake import FakeTarget
from profilers.timing import TimingPlan


class Member(FakeTarget):
    """One of several fake devices, `speed` times as fast as the others; `fails_at`: the call at which it drops out."""

    def __init__(self, serial: str, *, speed: float = 1.0, fails_at: int | None = None) -> None:
        super().__init__(replace(load_device("fake"), serial=serial))
        self.speed, self.fails_at, self.calls = speed, fails_at, 0

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise DeviceError(f"{self.config.serial} is gone")
        time.sleep(0.01)
        return [[ms / self.speed for ms in each] for each in super().time_networks(networks, plan, seed=seed)]


def network(channels: int) -> OpGraph:
    op = OpSpec("conv", (3,), 8, 8, channels)
    return OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (3, 8, 8), ("conv",))


def anchors(members: Sequence[Member]) -> list[Anchor]:
    table = LatencyTable(Path("fake.jsonl"), Identity("fake", "formula", "1"), {}, [])
    return [Anchor(member, network(64), table) for member in members]


def measuring(channels: int) -> Step:
    def run(anchor: Anchor) -> list[Measurement]:
        details, (samples,) = anchor.time([network(channels)], TimingPlan(rounds=3))
        return [Measurement("calibration", tuple(samples), graph=network(channels), details=details)]

    return Step("timing", run)


STEPS = [measuring(channels) for channels in range(1, 31)]


def run(members: Sequence[Member], **options: Any) -> tuple[bool, list[Measurement], list[str]]:
    rows: list[Measurement] = []
    callers = []

    def append(found: list[Measurement]) -> None:
        rows.extend(found)
        callers.append(threading.current_thread().name)

    whole = run_steps(STEPS, anchors(members), append, lambda *_: None, **options)
    return whole, rows, callers


def channels(rows: Sequence[Measurement]) -> list[int]:
    return sorted(row.graph.ops[0].out_channels for row in rows if row.graph)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_step_is_run_once_and_all_devices_take_part(count: int) -> None:
    members = [Member(f"serial{index}", speed=1 + index) for index in range(count)]
    whole, rows, callers = run(members)
    assert whole and channels(rows) == list(range(1, 31)) and all(member.calls > 3 for member in members)
    assert set(callers) == {threading.current_thread().name}  # one writer
    assert "serial" not in str(rows)
    # each beside its own anchor: the share of it is the same on a slow device and on a fast one
    for row in rows:
        alone = Member("other").time_networks([Network(network(64)), Network(row.graph)], TimingPlan(rounds=3), seed=0)
        assert row.median_ms / row.details["anchor_ms"] == pytest.approx(alone[1][0] / alone[0][0], rel=0.02)
    assert len({row.details["member"] for row in rows}) == count


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_device_that_drops_out_hands_its_work_to_the_others(fails_at: int) -> None:
    members = [Member("a"), Member("b", fails_at=fails_at), Member("c")]
    with pytest.warns(UserWarning, match="a device is left out from here on: b is gone"):
        whole, rows, _ = run(members)
    assert whole and channels(rows) == list(range(1, 31)) and members[1].calls == fails_at


def test_where_the_last_device_drops_out_what_was_measured_is_kept() -> None:
    rows: list[Measurement] = []
    members = [Member("a", fails_at=4), Member("b", fails_at=6)]
    with pytest.warns(UserWarning, match="is gone"), pytest.raises(DeviceError, match="is gone"):
        run_steps(STEPS, anchors(members), rows.extend, lambda *_: None)
    assert len(rows) == 3 + 5 and len(set(channels(rows))) == 8


def test_no_row_is_lost_when_told_to_stop() -> None:
    members = [Member("a"), Member("b")]
    rows: list[Measurement] = []
    assert not run_steps(STEPS, anchors(members), rows.extend, lambda *_: None, over=lambda: len(rows) >= 5)
    assert len(rows) == sum(member.calls for member in members) >= 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("bad")])
def test_whatever_else_a_step_raises_ends_it_all(error: BaseException) -> None:
    def broken(anchor: Anchor) -> list[Measurement]:
        raise error

    with pytest.raises(type(error)):
        run_steps(
            [Step("broken", broken), *STEPS], anchors([Member("a"), Member("b")]), lambda rows: None, lambda *_: None
        )


# Which devices


def farm(monkeypatch: pytest.MonkeyPatch, identity_of: Callable[[str], Identity], serials: Sequence[str]) -> list[str]:
    monkeypatch.setattr(FakeTarget, "identity", lambda self: identity_of(self.config.serial))
    return [target.config.serial for target in open_targets(load_device("fake").at(serials))]


def test_devices_that_answer_and_are_alike_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(serial: str) -> Identity:
        if serial == "away":
            raise DeviceError("away cannot be reached")
        return Identity("Other chip" if serial == "other" else "Chip", "formula", "1")

    assert farm(monkeypatch, identity, ["a", "b", "a"]) == ["a", "b"]
    with pytest.warns(UserWarning, match="one of fake's devices is left out: away cannot be reached"):
        assert farm(monkeypatch, identity, ["away", "b"]) == ["b"]
    with pytest.raises(DeviceError, match="other is not like a .soc Other chip, not Chip.: leave it out"):
        farm(monkeypatch, identity, ["a", "other"])
    with pytest.warns(UserWarning), pytest.raises(DeviceError, match="away cannot be reached"):
        farm(monkeypatch, lambda serial: identity("away"), ["a", "b"])


def test_serials_stand_alone() -> None:
    config = DeviceConfig("phone", "adb", "litert", address="10.0.0.7:5555")
    assert [each.serial for each in config.at(["a", "b"]).members()] == ["a", "b"] and not config.at(["a"]).address
    assert config.at([]).members() == [config]
    with pytest.raises(UserError, match="serials stand alone: leave serial and address out"):
        replace(config, serials=("a",))


def test_serials_are_a_list_of_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "device_configs").mkdir()
    path = tmp_path / "device_configs" / "farm.toml"
    path.write_text('target = "adb"\nruntime = "litert"\nserials = ["a", "b"]\n')
    assert load_device("farm").serials == ("a", "b")
    for wrong in ("[1]", '"a"', '["a", 1]'):
        path.write_text(f'target = "adb"\nruntime = "litert"\nserials = {wrong}\n')
        with pytest.raises(UserError, match="serials = .* is of the wrong type"):
            load_device("farm")
