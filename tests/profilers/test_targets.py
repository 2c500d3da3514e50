"""What every target promises, checked on each; then what is special to one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers.builders.weights import random_weights
from profilers.device import DeviceConfig, load_device
from profilers.errors import DeviceError, TableError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.runtimes import RUNTIMES, load_runtime
from profilers.table import Identity, LatencyTable, Measurement
from profilers.targets import Network, Probe, Target, open_target
from profilers.targets.fake import op_latency_ms
from profilers.timing import TimingPlan

needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")
TARGETS = ["fake", "host-ort", pytest.param("host-litert", marks=needs_litert)]
PLAN = TimingPlan(rounds=4, burst_s=0.001, min_runs=1, warmup_runs=1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets work from any directory, with the shipped configurations."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return open_target(load_device(request.param))


def conv(c_in: int, c_out: int, size: int, kernel: int, activation: str = "none", **more: Any) -> OpSpec:
    padding = (kernel // 2, kernel // 2)
    return OpSpec("conv", (c_in,), size, size, c_out, (kernel, kernel), padding=padding, activation=activation, **more)


def network(channels: int = 16) -> OpGraph:
    """A stem, a residual block with a depthwise convolution and a gate, a classifier: most of what networks hold."""
    depthwise = OpSpec("depthwise_conv", (channels,), 16, 16, channels, (3, 3), padding=(1, 1), groups=channels)
    addends = ("block.pointwise", "stem")
    nodes = (
        OpNode("stem", conv(3, channels, 32, 3, "relu", stride=(2, 2)), (OpGraph.INPUT,)),  # (C, 16, 16)
        OpNode("block.depthwise", replace(depthwise, activation="relu6"), ("stem",)),
        OpNode("block.pointwise", conv(channels, channels, 16, 1), ("block.depthwise",)),
        OpNode("block.add", OpSpec("add", (channels, channels), 16, 16, channels, activation="relu"), addends),
        OpNode("squeeze", OpSpec("global_avg_pool", (channels,), 16, 16, channels), ("block.add",)),
        OpNode("expand", conv(channels, channels, 1, 1, "hardsigmoid"), ("squeeze",)),
        OpNode("excite", OpSpec("mul", (channels, channels), 16, 16, channels), ("block.add", "expand")),
        OpNode("pool", OpSpec("max_pool", (channels,), 16, 16, channels, (2, 2), (2, 2)), ("excite",)),
        OpNode("mean", OpSpec("global_avg_pool", (channels,), 8, 8, channels), ("pool",)),
        OpNode("classes", OpSpec("linear", (channels,), 1, 1, 10), ("mean",)),
    )
    return OpGraph(nodes, (3, 32, 32), ("classes",))


def classifier() -> OpGraph:
    """Matrix products with activations between, as at the end of a VGG."""
    nodes = (
        OpNode("features", conv(3, 16, 16, 3, "relu"), (OpGraph.INPUT,)),
        OpNode("mean", OpSpec("global_avg_pool", (16,), 16, 16, 16), ("features",)),
        OpNode("hidden", OpSpec("linear", (16,), 1, 1, 256, activation="relu"), ("mean",)),
        OpNode("hidden2", OpSpec("linear", (256,), 1, 1, 256, activation="relu"), ("hidden",)),
        OpNode("classes", OpSpec("linear", (256,), 1, 1, 10), ("hidden2",)),
    )
    return OpGraph(nodes, (3, 16, 16), ("classes",))


# Conformance


def test_an_identity_is_complete_and_always_the_same(target: Target) -> None:
    identity = target.identity()
    assert all(getattr(identity, part.name) for part in fields(Identity))
    assert open_target(target.config).identity() == identity
    config = replace(target.config, threads=2, batch=3)
    wanted = replace(identity, threads=2, batch=3)
    assert open_target(config).identity() == wanted != identity


def test_provenance_goes_into_a_tables_header(target: Target, tmp_path: Path) -> None:
    provenance = target.provenance()
    assert provenance
    table = LatencyTable.open(tmp_path / "t.jsonl", target.identity(), provenance)
    assert LatencyTable.read(table.path).provenance == provenance
    assert LatencyTable.read_identity(table.path) == target.identity()


def test_probes_say_what_they_found(target: Target) -> None:
    probes = target.probes()
    assert probes
    assert len({probe.name for probe in probes}) == len(probes)
    assert all(isinstance(probe, Probe) and probe.name and probe.text for probe in probes)
    assert all(probe.ok for probe in probes if probe.name != "load")  # others may be busy on this machine


def check_samples(samples: list[list[float]], networks: int) -> None:
    assert [len(of_one) for of_one in samples] == [PLAN.rounds] * networks
    assert all(type(ms) is float and math.isfinite(ms) and ms > 0 for of_one in samples for ms in of_one)


def test_networks_are_timed_one_list_each_of_one_sample_per_round(target: Target) -> None:
    graph = network()
    asked = [Network(graph), Network(network(8), random_weights(network(8), seed=5)), Network(graph)]
    check_samples(target.time_networks(asked, PLAN, seed=0), 3)
    check_samples(target.time_networks(asked[:1], PLAN, seed=1), 1)


def test_a_fresh_process_times_alike(target: Target) -> None:
    asked = [Network(network(8), random_weights(network(8), seed=5)), Network(classifier())]
    check_samples(target.time_in_fresh_process(asked, PLAN, seed=0), 2)


@pytest.mark.parametrize("graph", [network(), classifier()], ids=["gated", "classifier"])
def test_lowering_fuses_and_keeps_names_work_and_shapes(target: Target, graph: OpGraph) -> None:
    lowered = target.lower(graph)
    names = [node.name for node in lowered.nodes]
    assert len(set(names)) == len(names)
    assert set(names) <= {node.name for node in graph.nodes}
    assert (lowered.macs, lowered.params, lowered.input_shape) == (graph.macs, graph.params, graph.input_shape)
    assert len(lowered.outputs) == len(graph.outputs)
    assert set(lowered.outputs) <= set(names)
    ready = {OpGraph.INPUT}
    for node in lowered.nodes:
        assert ready.issuperset(node.inputs)
        ready.add(node.name)
    assert target.lower(lowered) == lowered


def test_every_lowered_operator_has_a_positive_time_or_none_has(target: Target) -> None:
    check_ops(target, network())


def test_matrix_products_with_an_activation_have_a_time_too(target: Target) -> None:
    check_ops(target, classifier())


def check_ops(target: Target, graph: OpGraph) -> None:
    found = target.profile_ops(graph, time_s=0.02)
    if found is None:
        return
    assert set(found) == {node.name for node in target.lower(graph).nodes}
    assert all(math.isfinite(ms) and ms > 0 for ms in found.values())


# What a target cannot do


def test_an_unknown_target_or_runtime_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="device x: unknown target 'moon'; known: host, fake"):
        open_target(DeviceConfig("x", "moon", "onnxruntime"))
    with pytest.raises(UserError, match="unknown runtime 'abacus'; known: onnxruntime, litert"):
        open_target(DeviceConfig("x", "host", "abacus"))


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_has_the_functions_of_the_protocol(name: str) -> None:
    runtime = load_runtime(name)
    assert runtime.SUFFIX.startswith(".")
    for function in ("version", "build", "lower", "loaded", "session", "quantized", "profile_ops"):
        assert callable(getattr(runtime, function))


@pytest.mark.parametrize("name", [pytest.param("onnxruntime"), pytest.param("litert", marks=needs_litert)])
def test_an_int8_model_computes_nearly_what_the_float_one_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = load_runtime(name)
    nodes, source = [], OpGraph.INPUT
    for index, (c_in, c_out) in enumerate([(3, 32), (32, 64), (64, 64)]):
        op = OpSpec("conv", (c_in,), 16, 16, c_out, kernel=(3, 3), padding=(1, 1), activation="relu")
        nodes.append(OpNode(f"conv{index}", op, (source,)))
        source = nodes[-1].name
    nodes.append(OpNode("mean", OpSpec("global_avg_pool", (64,), 16, 16, 64), (source,)))
    nodes.append(OpNode("classes", OpSpec("linear", (64,), 1, 1, 10), ("mean",)))
    graph = OpGraph(tuple(nodes), (3, 16, 16), ("classes",))
    model = runtime.build(graph, random_weights(graph))
    rng = np.random.default_rng(0)
    samples = [[rng.standard_normal((1, 3, 16, 16)).astype(np.float32)] for _ in range(8)]
    int8 = runtime.quantized(model, 15 * samples)
    assert capsys.readouterr() == ("", "")  # no progress bar, which quantizers show from many samples on
    assert len(int8) < 0.45 * len(model)
    exact, rough = runtime.session(model), runtime.session(int8)
    for (image,) in samples[:3]:
        (wanted,), (found,) = exact(image), rough(image)
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    runtime.loaded(int8, threads=1)()


@pytest.mark.parametrize("name", [pytest.param("onnxruntime"), pytest.param("litert", marks=needs_litert)])
def test_no_output_of_a_sample_is_cut_off_in_an_int8_model(name: str) -> None:
    """Where one sample has larger outputs than all the others, wherever it stands among them."""
    runtime = load_runtime(name)
    op = OpSpec("conv", (3,), 8, 8, 8)
    graph = OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (3, 8, 8), ("conv",))
    model = runtime.build(graph, random_weights(graph))
    images = np.random.default_rng(0).standard_normal((9, 1, 3, 8, 8)).astype(np.float32)
    for place in (0, 4, 8):
        samples = images.copy()
        samples[place] *= 10
        int8 = runtime.quantized(model, [[image] for image in samples])
        (wanted,), (found,) = (runtime.session(each)(samples[place]) for each in (model, int8))
        assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("name", [pytest.param("onnxruntime"), pytest.param("litert", marks=needs_litert)])
def test_sums_of_large_products_do_not_saturate_in_an_int8_model(name: str) -> None:
    """As those of two unsigned and two signed 8-bit numbers do in the instructions of CPUs with AVX2 and no VNNI."""
    runtime = load_runtime(name)
    op = OpSpec("conv", (64,), 8, 8, 64)
    graph = OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (64, 8, 8), ("conv",))
    weights = {"conv": {"weight": np.ones((64, 64, 1, 1), np.float32), "bias": np.zeros(64, np.float32)}}
    model = runtime.build(graph, weights)
    images = np.random.default_rng(0).uniform(0.9, 1, (8, 1, 64, 8, 8)).astype(np.float32)
    int8 = runtime.quantized(model, [[image] for image in images])
    (wanted,), (found,) = (runtime.session(each)(images[0]) for each in (model, int8))
    np.testing.assert_allclose(found, wanted, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("onnxruntime"), pytest.param("litert", marks=needs_litert)])
def test_an_int8_device_times_int8_networks_and_is_another_identity(name: str) -> None:
    config = DeviceConfig("x", "host", name)
    target, int8 = open_target(config), open_target(replace(config, dtype="int8"))
    assert int8.identity() == replace(target.identity(), dtype="int8")
    op = OpSpec("conv", (64,), 28, 28, 128, kernel=(3, 3), padding=(1, 1), activation="relu")
    graph = OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (64, 28, 28), ("conv",))
    assert int8.profile_ops(graph, time_s=0.01) is None
    plan = TimingPlan(rounds=3, burst_s=0.005)
    for timed in (int8.time_networks, int8.time_in_fresh_process):
        assert all(ms > 0 for ms in timed([Network(graph)], plan, seed=0)[0])


def test_a_runtime_that_is_not_installed_is_told_by_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    target = open_target(load_device("host-litert"))
    (probe,) = [probe for probe in target.probes() if probe.name == "runtime"]
    assert not probe.ok
    assert "pip install 'amc-hw[litert]'" in probe.text
    with pytest.raises(DeviceError, match="litert is not installed"):
        target.identity()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "^the timing process ended with 3: no output$"),
        ("echo first >&2; echo 'last words' >&2; exit 1", "^the timing process ended with 1: last words$"),
        (
            "echo 'torch.AcceleratorError: CUDA error: busy' >&2; echo Compile with X >&2; exit 1",
            "^the timing process ended with 1: torch.AcceleratorError: CUDA error: busy$",
        ),
        ("echo a warning >&2; echo 'the memory is too small' >&2; exit 3", "^the memory is too small$"),
    ],
)
def test_a_fresh_process_that_fails_is_an_error_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DeviceError, match=message):
        open_target(load_device("host-ort")).time_in_fresh_process([Network(classifier())], PLAN, seed=0)


def test_weights_that_do_not_fit_are_refused_before_anything_is_timed() -> None:
    for name in ("time_networks", "time_in_fresh_process"):
        with pytest.raises(ValueError, match="features: weight has shape"):
            wrong = random_weights(classifier()) | {"features": random_weights(network(8))["stem"]}
            getattr(open_target(load_device("host-ort")), name)([Network(classifier(), wrong)], PLAN, seed=0)


# The fake device


def fake() -> Target:
    return open_target(load_device("fake"))


def test_the_formula_counts_full_blocks_of_eight_channels() -> None:
    # 8 * 8 * 100 MACs at 4e6 a millisecond, and 0.002 ms to start it
    assert op_latency_ms(OpSpec("conv", (8,), 10, 10, 8)) == pytest.approx(0.002 + 0.0016)
    assert op_latency_ms(OpSpec("conv", (5,), 10, 10, 3)) == pytest.approx(0.002 + 0.0016)
    assert op_latency_ms(OpSpec("conv", (9,), 10, 10, 8)) == pytest.approx(0.002 + 0.0032)
    # 9 * 8 * 100 MACs, three times as slow
    depthwise = OpSpec("depthwise_conv", (8,), 10, 10, 8, (3, 3), padding=(1, 1), groups=8)
    assert op_latency_ms(depthwise) == pytest.approx(0.002 + 0.0054)
    # no product: 2 * 8 * 100 values in memory
    assert op_latency_ms(OpSpec("add", (8, 8), 10, 10, 8)) == pytest.approx(0.002 + 1.6e-5)


@given(c_in=st.integers(1, 100), c_out=st.integers(1, 100))
def test_the_formula_is_a_staircase(c_in: int, c_out: int) -> None:
    full = OpSpec("conv", (-(-c_in // 8) * 8,), 8, 8, -(-c_out // 8) * 8)
    assert op_latency_ms(OpSpec("conv", (c_in,), 8, 8, c_out)) == pytest.approx(op_latency_ms(full))


def test_the_fake_device_is_deterministic_and_adds_up() -> None:
    graph = network()
    first, second = fake().time_networks([Network(graph), Network(classifier())], PLAN, seed=0)
    again = fake().time_in_fresh_process([Network(classifier()), Network(graph)], PLAN, seed=0)
    assert again == [second, first]
    assert fake().time_networks([Network(graph)], PLAN, seed=1) != [first]
    found = fake().profile_ops(graph, time_s=0.01)
    assert found is not None
    assert first == pytest.approx([0.01 + sum(found.values())] * PLAN.rounds, rel=0.01)


# Identities


def test_a_digest_is_a_short_name_that_never_changes() -> None:
    assert Identity("chip", "runtime", "1.0").digest() == "b22e9a75"
    assert Identity("chip", "runtime", "1.0", threads=1, affinity="any").digest() == "b22e9a75"


@pytest.mark.parametrize(
    ("part", "value"), [(part.name, 7 if part.type == "int" else "x") for part in fields(Identity)]
)
def test_every_part_of_an_identity_is_in_its_digest(part: str, value: object) -> None:
    identity = Identity("chip", "runtime", "1.0")
    other = replace(identity, **{part: value})
    assert other != identity
    assert other.digest() != identity.digest()
    assert len(other.digest()) == 8 and int(other.digest(), 16) >= 0


def written(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    row = Measurement("op", (0.5,), op=conv(3, 8, 8, 3))
    LatencyTable.open(path, Identity("chip", "runtime", "1.0", threads=4)).append([row])
    return path


def test_the_identity_of_a_table_is_read_from_its_first_line_alone(tmp_path: Path) -> None:
    path = written(tmp_path)
    with path.open("ab") as file:
        file.write(b"rubbish\nmore rubbish")
    assert LatencyTable.read_identity(path) == Identity("chip", "runtime", "1.0", threads=4)
    with pytest.raises(TableError, match=r"t\.jsonl:3: not a JSON line"), pytest.warns(UserWarning):
        LatencyTable.read(path)


@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_a_torn_first_line_has_no_identity_yet_and_is_written_anew(tmp_path: Path, size: int) -> None:
    path = written(tmp_path)
    header = path.read_bytes().splitlines()[0]
    path.write_bytes(header[:size] if size >= 0 else header)  # -1: all but its newline
    assert LatencyTable.read_identity(path) is None
    identity = Identity("other", "runtime", "2.0")
    assert LatencyTable.open(path, identity).rows == []
    assert LatencyTable.read_identity(path) == identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2 is newer than 1"),
        ({"schema_version": None}, "schema version None is older than 1"),
        ({"unit": "us"}, "t.jsonl:1: unit 'us', expected 'ms'"),
        ({"identity": {"soc": "chip"}}, "t.jsonl:1: the header's identity is not complete"),
        ({"identity": {"soc": "a", "runtime": "b", "runtime_version": "c", "clock": 1}}, "t.jsonl:1: .*clock"),
    ],
)
def test_a_bad_header_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = written(tmp_path)
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    for read in (LatencyTable.read_identity, LatencyTable.read):
        with pytest.raises(TableError, match=message):
            read(path)


@pytest.mark.parametrize("line", [b"rubbish\n", b"[]\n", b"\n", b"\xff\xfe\n"])
def test_a_first_line_that_is_no_header_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(line)
    with pytest.raises(TableError, match=r"t\.jsonl:1: not a JSON"):
        LatencyTable.read_identity(path)


def test_a_table_that_is_not_there_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no latency table .*t\.jsonl: measure one with 'amc-hw profile'"):
        LatencyTable.read(tmp_path / "t.jsonl")
