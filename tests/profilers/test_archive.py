"""A device that is not here: it says who it is, and whatever needs it says that it is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from profilers.device import DeviceConfig, load_device, shipped
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec, fuse_adds
from profilers.table import Identity, LatencyTable
from profilers.targets import Network, Probe, Target, open_target
from profilers.targets.archive import ArchiveTarget
from profilers.timing import TimingPlan

GRAPH = OpGraph((OpNode("conv", OpSpec("conv", (3,), 8, 8, 4), (OpGraph.INPUT,)),), (3, 8, 8), ("conv",))
PLAN = TimingPlan(rounds=2, burst_s=0.001)
ABSENT = (
    "attic is an archive: the device is not here and cannot be timed; 'predict' and 'search' work from its table, "
    "'import-log' adds to it"
)


def config(**more: object) -> DeviceConfig:
    known = {"name": "attic", "target": "archive", "runtime": "tflite", "soc": "a phone", "runtime_version": "2018"}
    return DeviceConfig(**(known | more))


@pytest.fixture
def attic() -> Target:
    return open_target(config(description="an old phone", source="its maker's logs"))


@pytest.mark.parametrize("key", ["soc", "runtime_version"])
def test_an_archive_needs_what_there_is_no_device_to_ask_for(key: str) -> None:
    with pytest.raises(UserError, match=f"^device attic: an archive needs {key}: there is no device to ask$") as caught:
        open_target(config(**{key: ""}))
    assert caught.value.exit_code == 2


def test_identity_is_what_the_configuration_says(attic: Target) -> None:
    assert isinstance(attic, ArchiveTarget)
    assert attic.identity() == Identity(
        "a phone", "tflite", "2018", threads=1, affinity="any", dtype="float32", batch=1
    )
    other = open_target(config(threads=4, batch=2, dtype="int8"))
    assert other.identity() == Identity("a phone", "tflite", "2018", threads=4, dtype="int8", batch=2)


def test_provenance_says_where_the_rows_come_from(attic: Target, tmp_path: Path) -> None:
    provenance = attic.provenance()
    assert provenance == {"description": "an old phone", "source": "its maker's logs"}
    table = LatencyTable.open(tmp_path / "t.jsonl", attic.identity(), provenance)
    assert LatencyTable.read(table.path).provenance == provenance


def test_nothing_can_be_timed(attic: Target) -> None:
    assert attic.can_time is False
    calls = (
        lambda: attic.time_networks([Network(GRAPH)], PLAN, seed=0),
        lambda: attic.time_in_fresh_process([Network(GRAPH)], PLAN, seed=0),
        lambda: attic.profile_ops(GRAPH, time_s=0.01),
    )
    for call in calls:
        with pytest.raises(DeviceError) as caught:
            call()
        assert (str(caught.value), caught.value.exit_code) == (ABSENT, 3)
    assert attic.probes() == [Probe("device", False, ABSENT)]


@pytest.mark.parametrize("runtime", ["tflite", "litert", "torch_cuda", "onnxruntime"])
def test_operators_are_those_of_the_runtime(runtime: str) -> None:
    conv = OpSpec("conv", (3,), 8, 8, 3)
    nodes = OpNode("conv", conv, (OpGraph.INPUT,)), OpNode("sum", OpSpec("add", (3, 3), 8, 8, 3), ("conv", "input"))
    residual = OpGraph(nodes, (3, 8, 8), ("sum",))
    for graph in (GRAPH, residual):
        lowered = open_target(config(runtime=runtime)).lower(graph)
        assert lowered == (fuse_adds(graph) if runtime == "onnxruntime" else graph)


def test_the_shipped_pixel_1_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixel = load_device("pixel1")
    assert (pixel.target, pixel.runtime, pixel.threads, pixel.channel_multiple) == ("archive", "tflite", 1, 8)
    assert pixel.extrapolate and "published by the authors of AMC" in pixel.source
    target = open_target(pixel)
    assert not target.can_time
    table = LatencyTable.read(shipped("latency_tables") / "pixel1.jsonl")
    table.require_identity(target.identity())
    assert table.provenance == target.provenance()
