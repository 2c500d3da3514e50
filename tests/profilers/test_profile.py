"""Filling a table: what is missing is measured once, nothing twice, and a set of rows counts only when it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers.builders.weights import random_weights
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, TableError
from profilers.ops import OpGraph, OpNode, OpSpec, digest, fuse_adds
from profilers.predictor import Predictor
from profilers.profile import (
    MAX_REFINEMENTS,
    NETWORK_PLAN,
    POOL,
    REFINE_NETWORKS,
    REFINE_OPS,
    Anchor,
    ProfileJob,
    Step,
    _copies,
    _count,
    missing_steps,
    refining_steps,
    time_network,
)
from profilers.runtimes import load_runtime
from profilers.sampling import corner_widths, random_widths
from profilers.table import Identity, LatencyTable, Measurement
from profilers.targets import Network
from profilers.targets.fake import OVERHEAD_MS, FakeTarget, op_latency_ms
from profilers.timing import LOADS, MOST_LOADS, Steady, TimingPlan

EIGHTHS = tuple(range(8, 65, 8))
IN_CONTEXT, RANDOM, ALONE = "reading operators in random networks", "timing random networks", "timing operators"


class Told(FakeTarget):
    """The fake device, remembering what it was asked to time. slow: how many times slower than at rest it is."""

    slow = 1.0

    def __init__(self) -> None:
        super().__init__(DeviceConfig("fake", "fake", "onnxruntime"))
        self.timed: list[list[OpGraph]] = []

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        self.timed.append([network.graph for network in networks])
        return [[self.slow * ms for ms in samples] for samples in super().time_networks(networks, plan, seed=seed)]


class Opaque(Told):
    """One whose runtime shows no operators."""

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> None:
        return None


class Fusing(Told):
    """One whose runtime adds shortcuts inside convolutions."""

    def lower(self, graph: OpGraph) -> OpGraph:
        return fuse_adds(graph)

    def profile_ops(self, graph: OpGraph, *, time_s: float) -> dict[str, float]:
        return {node.name: op_latency_ms(node.op) for node in self.lower(graph).nodes}


def network_at(widths: Sequence[int]) -> OpGraph:
    """A residual block of two groups: the stem with all that is added to it, and the inside of the block."""
    stem, inside = widths
    nodes = (
        OpNode("stem", OpSpec("conv", (3,), 8, 8, stem, kernel=(3, 3), padding=(1, 1)), (OpGraph.INPUT,)),
        OpNode("down", OpSpec("conv", (stem,), 8, 8, inside, activation="relu"), ("stem",)),
        OpNode("up", OpSpec("conv", (inside,), 8, 8, stem), ("down",)),
        OpNode("sum", OpSpec("add", (stem, stem), 8, 8, stem), ("up", "stem")),
        OpNode("mean", OpSpec("global_avg_pool", (stem,), 8, 8, stem), ("sum",)),
        OpNode("classes", OpSpec("linear", (stem,), 1, 1, 10), ("mean",)),
    )
    return OpGraph(nodes, (3, 8, 8), ("classes",))


JOB = ProfileJob(network_at, (EIGHTHS, EIGHTHS), networks=5, calibration=4)
UNPRUNED = network_at((64, 64))


def new_table(tmp_path: Path) -> LatencyTable:
    return LatencyTable.open(tmp_path / "fake.jsonl", Told().identity())


def in_memory(rows: Sequence[Measurement] = ()) -> LatencyTable:
    return LatencyTable(Path("fake.jsonl"), Identity("fake", "formula", "1"), {}, list(rows))


def beside(target: FakeTarget | None = None, table: LatencyTable | None = None) -> Anchor:
    return Anchor(target or Told(), UNPRUNED, table or in_memory())


def digests(rows: Sequence[Measurement]) -> list[str]:
    return [row.details["digest"] for row in rows]


def read_then_timed(rows: Sequence[Measurement]) -> tuple[list[str], list[str]]:
    """Digests of the networks whose operators were read, and of those that calibrate, which come in turn."""
    read, timed = (digests([row for row in rows if row.type == kind]) for kind in ("network", "calibration"))
    return read, timed


def of_context(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.name == IN_CONTEXT]


def expected_digests(job: ProfileJob) -> tuple[list[str], list[str]]:
    """Of the networks whose operators are read, and of those that calibrate; equal ones are measured once."""
    read = corner_widths(job.fine or job.grids) + random_widths(job.grids, job.networks, seed=job.seed, fine=job.fine)
    timed = random_widths(job.grids, job.calibration, seed=job.seed + 1, fine=job.fine)
    first, second = ([digest(job.network_at(widths)) for widths in sampled] for sampled in (read, timed))
    return list(dict.fromkeys(first)), [name for name in dict.fromkeys(second) if name not in first]


# Digests


def test_a_digest_follows_the_operators_and_nothing_else() -> None:
    assert digest(network_at((16, 24))) == digest(network_at([16, 24]))
    assert len({digest(network_at((a, b))) for a in EIGHTHS for b in EIGHTHS}) == 64
    assert digest(OpGraph.from_json(UNPRUNED.to_json())) == digest(UNPRUNED)
    strided = replace(UNPRUNED.nodes[0], op=replace(UNPRUNED.nodes[0].op, stride=(2, 2)))
    assert digest(OpGraph((strided, *UNPRUNED.nodes[1:]), (3, 8, 8), ("classes",))) != digest(UNPRUNED)


# Operators read in context


def test_a_step_reads_all_operators_of_a_network_and_its_own_row_comes_last(tmp_path: Path) -> None:
    target, table = Told(), new_table(tmp_path)
    step = missing_steps(JOB, table, target)[0]
    assert step.name == IN_CONTEXT
    *ops, network = step.run(beside(target))
    assert [row.type for row in ops] == ["op"] * 6
    assert network.type == "network"
    assert network.graph is not None
    assert [row.op for row in ops] == list(network.graph.ops)
    assert {row.context for row in ops} == {"in_context"}
    assert [row.median_ms for row in ops] == [op_latency_ms(op) for op in network.graph.ops]
    assert len(network.samples_ms) == NETWORK_PLAN.rounds
    assert network.median_ms == pytest.approx(OVERHEAD_MS + sum(map(op_latency_ms, network.graph.ops)), rel=0.01)
    assert network.details["digest"] == digest(network.graph)
    # the unpruned network is timed first, in the same call
    assert target.timed == [[UNPRUNED, network.graph]]
    for row in (*ops, network):
        assert row.details["anchor"] == digest(UNPRUNED)
        assert row.details["anchor_ms"] == pytest.approx(OVERHEAD_MS + sum(map(op_latency_ms, UNPRUNED.ops)), rel=0.01)


def test_operators_are_read_as_the_runtime_runs_them() -> None:
    *ops, network = missing_steps(JOB, in_memory(), Fusing())[0].run(beside(Fusing()))
    assert network.graph is not None
    assert [str(row.op).split()[0] for row in ops] == ["conv", "conv", "conv", "global_avg_pool", "linear"]
    assert [row.op.fused_add for row in ops if row.op] == [False, False, True, False, False]
    assert len(network.graph.nodes) == 6  # the network is kept as it was given


def test_the_steps_cover_the_corners_the_random_networks_and_the_calibration() -> None:
    steps = missing_steps(JOB, in_memory(), Told())
    rows = [step.run(beside())[-1] for step in steps]
    read, timed = expected_digests(JOB)
    assert [step.name for step in steps] == [IN_CONTEXT if row.type == "network" else RANDOM for row in rows]
    assert read_then_timed(rows) == (read, timed)
    assert set(read[:4]) == {digest(network_at(widths)) for widths in [(8, 8), (8, 64), (64, 8), (64, 64)]}


@pytest.mark.parametrize("kind", [Told, Opaque])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_table_that_time_runs_out_for_has_operators_and_calibration(kind: type[Told], share: float) -> None:
    steps = missing_steps(JOB, in_memory(), kind())
    names = [step.name for step in steps]
    begun = names[: round(share * len(steps))]
    for name in set(names):
        assert abs(begun.count(name) - share * names.count(name)) <= 1


def test_the_steps_are_the_same_every_time_and_follow_from_the_seed() -> None:
    def measured(seed: int) -> list[Measurement]:
        steps = missing_steps(replace(JOB, seed=seed), in_memory(), Told())
        return [row for step in steps for row in step.run(beside())]

    assert measured(0) == measured(0) != measured(5)


@pytest.mark.parametrize("kind", [Told, Fusing, Opaque])
def test_a_complete_table_has_nothing_missing(tmp_path: Path, kind: type[Told]) -> None:
    target, table = kind(), new_table(tmp_path)
    for step in missing_steps(JOB, table, target):
        table.append(step.run(beside(target)))
    calls = len(target.timed)
    assert missing_steps(JOB, table, target) == []
    assert missing_steps(JOB, LatencyTable.read(table.path), target) == []
    assert len(target.timed) == calls  # looking costs no measurement


@pytest.mark.parametrize("kind", [Told, Opaque])
@settings(max_examples=8)
@given(kills=st.lists(st.integers(0, 4), max_size=6))
def test_a_run_that_is_killed_again_and_again_measures_every_step_once(kind: type[Told], kills: list[int]) -> None:
    whole = [row for step in missing_steps(JOB, in_memory(), kind()) for row in step.run(beside(kind()))]
    table = in_memory()
    for survived in kills:
        for step in missing_steps(JOB, table, kind())[:survived]:
            table.rows += step.run(beside(kind()))
    for step in missing_steps(JOB, table, kind()):
        table.rows += step.run(beside(kind()))
    found, wanted = (sorted(repr((row.type, row.op, row.graph)) for row in rows) for rows in (table.rows, whole))
    assert found == wanted


def test_operators_without_their_networks_row_are_read_again(tmp_path: Path) -> None:
    table = new_table(tmp_path)
    first, second, *_ = of_context(missing_steps(JOB, table, Told()))
    network = second.run(beside())[-1]
    table.append(first.run(beside()))
    table.append(second.run(beside()))
    data = table.path.read_bytes()
    table.path.write_bytes(data[: data.rstrip(b"\n").rfind(b"\n") + 20])  # killed inside the last row
    with pytest.warns(UserWarning, match="torn last line"):
        torn = LatencyTable.read(table.path)
    assert [row.type for row in torn.rows].count("op") == 12
    left = missing_steps(JOB, torn, Told())
    assert len(left) == len(missing_steps(JOB, in_memory(), Told())) - 1
    assert digests([of_context(left)[0].run(beside())[-1]]) == digests([network])


@pytest.mark.parametrize("kind", ["calibration", "validation"])
def test_a_network_that_was_only_timed_is_still_to_be_read(kind: str) -> None:
    target = Told()
    steps = missing_steps(JOB, in_memory(), target)
    corner = steps[0].run(beside(target))[-1].graph
    assert corner is not None
    timed = time_network(corner, Anchor(target, UNPRUNED, in_memory()), kind)
    left = of_context(missing_steps(JOB, in_memory([timed]), target))
    assert digests([step.run(beside(target))[-1] for step in left]) == expected_digests(JOB)[0]


def test_a_larger_job_measures_only_what_it_adds() -> None:
    table = in_memory()
    for step in missing_steps(JOB, table, Told()):
        table.rows += step.run(beside())
    larger = replace(JOB, networks=12, calibration=12)
    more = [step.run(beside())[-1] for step in missing_steps(larger, table, Told())]
    (read, timed), (all_read, all_timed) = expected_digests(JOB), expected_digests(larger)
    assert read_then_timed(more) == (all_read[len(read) :], [name for name in all_timed if name not in timed])
    assert len(more) > 4


def test_networks_that_round_to_the_same_widths_are_measured_once() -> None:
    narrow = replace(JOB, grids=((8, 64), (16,)), networks=30, calibration=30)
    rows = [step.run(beside())[-1] for step in missing_steps(narrow, in_memory(), Told())]
    assert {row.type for row in rows} == {"network"}  # none is left to calibrate with
    assert sorted(digests(rows)) == sorted({digest(network_at((8, 16))), digest(network_at((64, 16)))})


def test_what_tells_the_error_is_never_what_was_read() -> None:
    job = replace(JOB, grids=((8, 16, 24), (8, 16, 24)), networks=40, calibration=24)
    rows = [step.run(beside())[-1] for step in missing_steps(job, in_memory(), Told())]
    read = digests([row for row in rows if row.type == "network"])
    assert not set(read) & set(digests([row for row in rows if row.type == "calibration"]))


def test_two_networks_in_one_table_are_each_measured_beside_their_own() -> None:
    def without_block(widths: Sequence[int]) -> OpGraph:
        full = network_at(widths)
        kept = [node for node in full.nodes if node.name in ("stem", "mean", "classes")]
        kept[1] = replace(kept[1], inputs=("stem",))
        return OpGraph(tuple(kept), full.input_shape, full.outputs)

    other = replace(JOB, network_at=without_block)
    table = in_memory()
    for step in missing_steps(JOB, table, Told()):
        table.rows += step.run(beside())
    target = Told()
    for step in missing_steps(other, table, target):
        table.rows += step.run(Anchor(target, other.unpruned, table))
    assert missing_steps(other, table, target) == missing_steps(JOB, table, Told()) == []
    assert {timed[0] for timed in target.timed} == {without_block((64, 64))}
    predictor = Predictor(table, target.lower)
    for graph in (UNPRUNED, without_block((64, 64))):
        truth = OVERHEAD_MS + sum(map(op_latency_ms, graph.ops))
        assert table.reference_ms(digest(graph)) == pytest.approx(truth, rel=0.01)
        assert predictor.predict(graph) == pytest.approx(truth, rel=0.05)


# Operators on their own


def test_where_a_runtime_shows_no_operators_each_is_timed_alone_and_once() -> None:
    target, table = Opaque(), in_memory()
    steps = missing_steps(JOB, table, target)
    assert {step.name for step in steps} == {ALONE, RANDOM}
    rows = [row for step in steps if step.name == ALONE for row in step.run(beside(target))]
    assert {(row.type, row.context, row.graph) for row in rows} == {("op", "alone", None)}
    sampled = [(8, 8), (8, 64), (64, 8), (64, 64), *random_widths(JOB.grids, JOB.networks, seed=JOB.seed)]
    assert len(rows) == len({row.op for row in rows})
    assert {row.op for row in rows} == {op for widths in sampled for op in network_at(widths).ops}
    for row in rows:
        assert row.op is not None
        assert row.details["anchor"] == digest(UNPRUNED)
        assert row.median_ms == pytest.approx(op_latency_ms(row.op), rel=0.05)  # the overhead of a run cancels


def test_an_operator_alone_is_n_copies_and_2n_copies_side_by_side() -> None:
    target = Opaque()
    missing_steps(JOB, in_memory(), target)[0].run(beside(target))
    anchor, *copies = target.timed[0]
    assert anchor == UNPRUNED
    assert len(copies) == 2 * 8  # eight operators share one anchor
    for once, twice in zip(copies[::2], copies[1::2], strict=True):
        count = len(once.nodes)
        assert count >= 1 and len(twice.nodes) == 2 * count
        assert len(set(once.ops + twice.ops)) == 1
        for graph in (once, twice):
            op = graph.nodes[0].op
            read = [name for node in graph.nodes for name in node.inputs]
            assert len(set(read)) == (1 if op.macs else len(read)), op  # what has no weights is never the same twice
            assert graph.outputs == tuple(node.name for node in graph.nodes)  # none can be optimised away
            assert graph.input_shape == (op.in_channels[0], op.height, op.width)


ALONE_OPS = [
    OpSpec("add", (16, 16), 8, 8, 16, activation="relu"),
    OpSpec("mul", (16, 16), 8, 8, 16),
    OpSpec("scale", (16, 16), 8, 8, 16),
    OpSpec("shift", (16, 16), 8, 8, 16),
    OpSpec("mask", (16, 1), 8, 8, 16),
    OpSpec("channel_mean", (16,), 8, 8, 1),
    OpSpec("channel_max", (16,), 8, 8, 1),
    OpSpec("l2_norm", (16,), 8, 8, 16),
    OpSpec("unflatten", (16,), 1, 1, 4, out_size=(2, 2)),
    OpSpec("rows_to_channels", (16,), 8, 8, 128),
    OpSpec("join", (16, 16), 64, 1, 16, tokens=True),
    OpSpec("regroup", (16,), 8, 8, 4, tokens=True),
    OpSpec("adaptive_avg_pool", (16,), 8, 8, 16, out_size=(3, 3)),
    OpSpec("concat", (8, 8), 8, 8, 16, activation="relu"),
    OpSpec("global_avg_pool", (16,), 8, 8, 16),
    OpSpec("max_pool", (16,), 8, 8, 16, kernel=(2, 2), stride=(2, 2), activation="relu"),
    OpSpec("activation", (16,), 8, 8, 16, activation="silu"),
    OpSpec("activation", (16,), 8, 8, 16, activation="gelu"),
    OpSpec("layer_norm", (16,), 8, 8, 16),
    OpSpec("shuffle", (16,), 8, 8, 16, groups=2),
    OpSpec("softmax", (16,), 8, 8, 16),
    OpSpec("upsample_nearest", (16,), 8, 8, 16, stride=(2, 2)),
    OpSpec("conv", (16,), 8, 8, 16, activation="silu"),
    OpSpec("attention", (16, 16, 16), 8, 8, 16, groups=2, kernel=(8, 8)),
    OpSpec("attention", (16, 16, 16), 8, 8, 16, groups=2, kernel=(4, 4), biased=True, tokens=True),
    OpSpec("layer_norm", (16,), 8, 8, 16, tokens=True),
    OpSpec("linear", (16,), 8, 8, 16, tokens=True),
    OpSpec("take_token", (16,), 8, 8, 16, tokens=True),
]


@pytest.mark.parametrize("op", ALONE_OPS, ids=str)
def test_a_runtime_computes_every_copy(op: OpSpec, tmp_path: Path) -> None:
    """ONNX Runtime computes once what is there twice, as operators without weights would be on one input."""
    kernels = []
    for count in (3, 6):
        graph = _copies(op, count)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{count}.onnx")
        model = load_runtime("onnxruntime").build(graph, random_weights(graph, seed=0))
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        kernels.append(len(onnx.load(options.optimized_model_filepath).graph.node))
        assert graph.nodes[-1].op == op and len(graph.outputs) == count
    each, rest = divmod(kernels[1] - kernels[0], 3)
    # what reorders the input that products share, or lays the first one out as tokens
    shared = 2 if op.tokens else int(op.macs > 0 and op.kind != "attention")
    assert each >= 1 and not rest and 0 <= kernels[0] - 3 * each <= shared


def test_copies_of_what_only_moves_memory_fit_the_caches() -> None:
    counts = [_count(OpSpec("add", (channels, channels), 56, 56, channels)) for channels in (1, 8, 64, 512)]
    assert counts == sorted(counts, reverse=True) and (counts[0], counts[-1]) == (12, 1)
    assert _count(OpSpec("conv", (64,), 56, 56, 64, (3, 3), padding=(1, 1))) == 2
    assert _count(OpSpec("global_avg_pool", (8,), 4, 4, 8)) == 12
    assert _count(OpSpec("global_avg_pool", (64,), 56, 56, 64, batch=50)) == 1


def test_an_operator_with_an_addition_inside_is_timed_alone_as_the_two_that_make_it() -> None:
    residual = OpSpec("conv", (8,), 8, 8, 8, (3, 3), (1, 1), (1, 1), activation="relu", fused_add=True)
    for count in (2, 4):
        copies = _copies(residual, count)
        assert set(fuse_adds(copies).ops) == {residual} and len(fuse_adds(copies).nodes) == count
        runtime = load_runtime("onnxruntime")
        assert runtime.session(runtime.build(copies, random_weights(copies, seed=0)))


def test_operators_that_were_timed_are_not_timed_again() -> None:
    table = in_memory()
    steps = [step for step in missing_steps(JOB, table, Opaque()) if step.name == ALONE]
    for step in steps[:2]:
        table.rows += step.run(beside(Opaque()))
    left = [step for step in missing_steps(JOB, table, Opaque()) if step.name == ALONE]
    assert len(left) == len(steps) - 2
    assert not {row.op for step in left for row in step.run(beside(Opaque()))} & {row.op for row in table.rows}


def test_copies_of_a_concat_are_as_wide_as_the_concat() -> None:
    def joined_at(widths: Sequence[int]) -> OpGraph:
        left, right = widths
        nodes = (
            OpNode("left", OpSpec("conv", (3,), 8, 8, left), (OpGraph.INPUT,)),
            OpNode("right", OpSpec("conv", (3,), 8, 8, right), (OpGraph.INPUT,)),
            OpNode("both", OpSpec("concat", (left, right), 8, 8, left + right), ("left", "right")),
        )
        return OpGraph(nodes, (3, 8, 8), ("both",))

    target = Opaque()
    for step in missing_steps(replace(JOB, network_at=joined_at), in_memory(), target):
        step.run(beside(target))
    concats = [op for timed in target.timed for graph in timed for op in graph.ops if op.kind == "concat"]
    assert concats
    assert all(sum(op.in_channels) == op.out_channels for op in concats)


# Anchor


def test_a_machine_slower_than_the_table_knows_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steady, "WAITS_S", (0.0, 0.0))
    target = Told()
    table = in_memory(missing_steps(JOB, in_memory(), target)[0].run(beside(target)))
    target.slow = 1.2
    with pytest.warns(UserWarning, match="disturbed"), pytest.raises(DeviceError, match="too unstable"):
        missing_steps(JOB, table, target)[0].run(beside(target, table))
    larger = network_at((128, 128))  # another network: what the table knows of the first does not bind it
    assert time_network(UNPRUNED, Anchor(target, larger, table), "validation").details["anchor"] == digest(larger)


def test_drift_within_the_limit_is_kept_in_the_row_and_divided_out_by_the_predictor() -> None:
    target = Told()
    table = in_memory()
    for index, step in enumerate(of_context(missing_steps(JOB, table, target))):
        target.slow = 1.06 if index == 5 else 1.0
        table.rows += step.run(beside(target))
    drifted = table.of_type("network")[5]
    assert drifted.graph is not None
    truth = OVERHEAD_MS + sum(map(op_latency_ms, drifted.graph.ops))
    assert drifted.median_ms == pytest.approx(1.06 * truth, rel=0.01)
    assert Predictor(table, target.lower).measured_ms(drifted) == pytest.approx(truth, rel=0.01)


def test_a_whole_network_is_timed_beside_its_anchor() -> None:
    target = Told()
    graph = network_at((8, 24))
    row = time_network(graph, Anchor(target, UNPRUNED, in_memory()), "validation", seed=3)
    assert (row.type, row.graph, row.details["digest"]) == ("validation", graph, digest(graph))
    assert target.timed == [[UNPRUNED, graph]] * LOADS
    again = time_network(graph, Anchor(target, UNPRUNED, in_memory()), "validation", seed=4)
    assert again.samples_ms != row.samples_ms


class Uneven(Told):
    """Every network after the anchor runs at another speed each time that it is loaded."""

    def __init__(self, *speeds: float) -> None:
        super().__init__()
        self.speeds = list(speeds)

    def time_networks(self, networks: Sequence[Network], plan: TimingPlan, *, seed: int) -> list[list[float]]:
        anchor, *rest = super().time_networks(networks, plan, seed=seed)
        speed = self.speeds.pop(0)
        return [anchor, *([speed * ms for ms in samples] for samples in rest)]


@pytest.mark.parametrize(
    ("speeds", "loads"),
    [((1.0, 1.01, 1.2), 2), ((1.0, 1.1, 1.0, 1.0), MOST_LOADS)],
)
def test_a_network_is_loaded_again_while_loads_differ(speeds: tuple[float, ...], loads: int) -> None:
    target, graph = Uneven(*speeds), network_at((8, 24))
    row = time_network(graph, Anchor(target, UNPRUNED, in_memory()), "validation")
    assert len(target.timed) == loads and len(row.samples_ms) == loads * NETWORK_PLAN.rounds
    truth = OVERHEAD_MS + sum(map(op_latency_ms, graph.ops))
    assert row.median_ms == pytest.approx(truth, rel=0.012)


# The whole of it


@pytest.mark.parametrize("kind", [Told, Fusing, Opaque])
def test_a_profiled_table_predicts_networks_it_has_not_seen(tmp_path: Path, kind: type[Told]) -> None:
    target, table = kind(), new_table(tmp_path)
    job = replace(JOB, networks=20, calibration=20)
    for step in missing_steps(job, table, target):
        table.append(step.run(beside(target)))
    predictor = Predictor(LatencyTable.read(table.path), target.lower)
    fresh = [network_at(widths) for widths in random_widths(JOB.grids, 30, seed=99)]
    truth = [OVERHEAD_MS + sum(map(op_latency_ms, graph.ops)) for graph in fresh]
    found = [predictor.predict(graph) for graph in fresh]
    errors = np.abs(np.array(found) / np.array(truth) - 1) * 100
    assert np.median(errors) < 1.0
    assert errors.max() < 5.0
    assert predictor.error_pct is not None and predictor.error_pct < 3.0


# Ways to measure


def test_operators_can_be_measured_alone_where_the_runtime_would_show_them(tmp_path: Path) -> None:
    steps = missing_steps(replace(JOB, way="alone"), in_memory(), Told())
    assert {step.name for step in steps} == {ALONE, RANDOM}
    assert steps[0].run(beside())[0].context == "alone"


def test_whole_networks_alone_predict_what_adds_up() -> None:
    job, table, target = replace(JOB, way="networks", networks=30, calibration=12), in_memory(), Told()
    for step in missing_steps(job, table, target):
        assert step.name == RANDOM
        table.rows += step.run(beside(target))
    assert {row.type for row in table.rows} == {"calibration"} and not missing_steps(job, table, target)
    predictor = Predictor(table, target.lower)
    fresh = [network_at((a, b)) for a in EIGHTHS[1:-1] for b in EIGHTHS[1:-1]]
    truth = [OVERHEAD_MS + sum(map(op_latency_ms, graph.ops)) for graph in fresh]
    errors = [abs(predictor.predict(graph) / ms - 1) for graph, ms in zip(fresh, truth, strict=True)]
    assert np.median(errors) < 0.03 and max(errors) < 0.1


@pytest.mark.parametrize(("count", "noise"), [(9, 0.0), (9, 0.03), (24, 0.03)])
def test_the_error_of_whole_networks_alone_is_that_of_networks_not_fitted(count: int, noise: float) -> None:
    """Costs of operators follow from the same networks: left out of the calibration alone, few are met by any fit."""
    rng, target, found = np.random.default_rng(0), Told(), []
    for seed in range(6):
        table, job = in_memory(), replace(JOB, way="networks", networks=0, calibration=count, seed=seed)
        for step in missing_steps(job, table, target):
            table.rows += [
                replace(row, samples_ms=(row.median_ms * float(np.exp(noise * rng.standard_normal())),))
                for row in step.run(beside(target))
            ]
        predictor = Predictor(table, target.lower, extrapolate=True)
        assert predictor.error_pct is not None
        fresh = [network_at(widths) for widths in random_widths(JOB.grids, 60, seed=99)]
        truth = [OVERHEAD_MS + sum(map(op_latency_ms, graph.ops)) for graph in fresh]
        errors = [abs(predictor.predict(graph) / ms - 1) for graph, ms in zip(fresh, truth, strict=True)]
        found.append((predictor.error_pct, 100 * float(np.quantile(errors, 0.9))))
    stated, true = np.median(found, axis=0)
    assert 0.7 * true < stated < 5 * true, found


def test_networks_of_a_table_that_has_operators_of_others_still_tell_their_own() -> None:
    """A network that was profiled whole is predicted after another's operators were read into the same table, some of
    its own among them, at other widths."""
    job, table, target = replace(JOB, way="networks", networks=30, calibration=12), in_memory(), Told()
    for step in missing_steps(job, table, target):
        table.rows += step.run(beside(target))
    alone = Predictor(table, target.lower)
    first = UNPRUNED.nodes[0].op
    strange = [replace(first, kernel=(5, 5), padding=(2, 2)).with_axes((3, width)) for width in (8, 16)]
    shared = [first.with_axes((first.in_channels[0], width)) for width in (7, 8)]
    table.rows += [Measurement("op", (op_latency_ms(op),), op=op) for op in strange + shared]
    fresh = [network_at(widths) for widths in random_widths(JOB.grids, 20, seed=99)]
    both = Predictor(table, target.lower)
    assert [both.predict(graph) for graph in fresh] == pytest.approx(
        [alone.predict(graph) for graph in fresh], rel=0.03
    )
    assert both.error_pct is not None and both.error_pct < 10
    few = LatencyTable(table.path, table.identity, {}, [*table.rows[: Predictor.MIN_NETWORKS - 1], *table.rows[-4:]])
    with pytest.raises(TableError, match="lies outside of"), pytest.warns(UserWarning, match="7 networks calib"):
        Predictor(few, target.lower).predict(fresh[0])


def test_a_runtime_that_shows_no_operators_cannot_be_read_in_context() -> None:
    with pytest.raises(DeviceError, match="shows no operators in context: profile with --way alone") as error:
        missing_steps(replace(JOB, way="context"), in_memory(), Opaque())
    assert error.value.exit_code == 3


# Going on where predictions are least sure


def filled(job: ProfileJob, target: FakeTarget) -> LatencyTable:
    table = in_memory()
    for step in missing_steps(job, table, target):
        table.rows += step.run(beside(target))
    return table


FINE = tuple(range(8, 65))
FINE_JOB = replace(JOB, fine=(FINE, FINE), networks=8, calibration=8)


@pytest.mark.parametrize("target", [Told(), Opaque()], ids=["in context", "alone"])
def test_refining_measures_what_the_table_does_not_hold_and_calibrates_more(target: Told) -> None:
    table = filled(FINE_JOB, target)
    predictor = Predictor(table, target.lower)
    steps = refining_steps(FINE_JOB, table, target, predictor)
    known = {row.details.get("digest") for row in table.rows} - {None}
    measured = {row.op for row in table.of_type("op")}
    kinds = [step.name for step in steps]
    assert kinds.count(RANDOM) == REFINE_NETWORKS and {*kinds} == {
        RANDOM,
        ALONE if type(target) is Opaque else IN_CONTEXT,
    }
    found = [row for step in steps for row in step.run(beside(target))]
    new = [row.details["digest"] for row in found if row.type != "op"]
    assert len(new) == len(set(new)) and not known & set(new)
    if type(target) is Opaque:
        assert not measured & {row.op for row in found if row.type == "op"}
    again = [
        row.to_json() for step in refining_steps(FINE_JOB, table, target, predictor) for row in step.run(beside(target))
    ]
    assert [row.to_json() for row in found] == again  # they follow from the rows


def test_operators_that_are_least_sure_are_measured_first() -> None:
    target = Opaque()
    table = filled(FINE_JOB, target)
    predictor = Predictor(table, target.lower)
    steps = [step for step in refining_steps(FINE_JOB, table, target, predictor) if step.name == ALONE]
    asked = [row.op for step in steps for row in step.run(beside(target)) if row.op]
    sure = predictor.deviation_ms(asked)
    assert list(sure) == sorted(sure, reverse=True) and sure[0] > 0


def test_refining_ends() -> None:
    target = Told()
    table = filled(FINE_JOB, target)
    rounds = 0
    while steps := refining_steps(FINE_JOB, table, target, Predictor(table, target.lower)):
        table.rows += steps[-1].run(beside(target))  # the calibration alone
        rounds += 1
    assert 0 < rounds <= REFINE_NETWORKS * MAX_REFINEMENTS


def test_every_second_network_is_free_of_the_multiple() -> None:
    on, off = (
        random_widths(FINE_JOB.grids, 20, seed=5)[::2],
        random_widths(FINE_JOB.grids, 20, seed=5, fine=FINE_JOB.fine),
    )
    assert off[::2] == on
    assert sum(any(width % 8 for width in widths) for widths in off[1::2]) >= 9


def test_a_job_with_fine_grids_has_them_at_every_second_place() -> None:
    found, coarse = FINE_JOB.random(8, 3), JOB.random(8, 3)
    assert found[::2] == coarse[::2]
    assert found == [network_at(widths) for widths in random_widths(JOB.grids, 8, seed=3, fine=FINE_JOB.fine)]
    assert any(op.out_channels % 8 for graph in found[1::2] for op in graph.ops[:2])


def test_several_seeds_are_one_seed_of_several_parts() -> None:
    widths = random_widths(JOB.grids, 5, seed=(0, 2, 7))
    assert JOB.random(5, 0, 2, 7) == [network_at(each) for each in widths] != JOB.random(5, 0)


def test_a_job_with_fine_grids_reads_their_corners_and_calibrates_on_and_off_the_multiple() -> None:
    low = replace(FINE_JOB, fine=(range(5, 65),) * 2)
    rows = [step.run(beside())[-1] for step in missing_steps(low, in_memory(), Told())]
    read, timed = expected_digests(low)
    assert read_then_timed(rows) == (read, timed)
    assert set(read[:4]) == {digest(network_at(widths)) for widths in [(5, 5), (5, 64), (64, 5), (64, 64)]}
    graphs = [row.graph for row in rows if row.graph is not None and row.type == "calibration"]
    assert {all(op.out_channels % 8 == 0 for op in graph.ops[:2]) for graph in graphs} == {True, False}


def refining(job: ProfileJob, table: LatencyTable, target: Told) -> list[Step]:
    return refining_steps(job, table, target, Predictor(table, target.lower))


def rows_of(steps: Sequence[Step]) -> list[Measurement]:
    return [row for step in steps for row in step.run(beside())]


def pool(job: ProfileJob, table: LatencyTable) -> dict[str, OpGraph]:
    """The networks that may be asked for next, by digest."""
    known = {row.details.get("digest") for row in table.rows}
    widths = random_widths(job.grids, POOL, seed=(job.seed, 2, len(table.of_type("calibration"))), fine=job.fine)
    return {digest(graph): graph for graph in map(network_at, widths) if digest(graph) not in known}


@pytest.mark.parametrize("kind", [Told, Opaque])
def test_refining_is_the_same_after_a_table_was_written_and_read_again(tmp_path: Path, kind: type[Told]) -> None:
    target, table = kind(), new_table(tmp_path)
    for step in missing_steps(FINE_JOB, table, target):
        table.append(step.run(beside(target)))
    first = rows_of(refining(FINE_JOB, table, target))
    again = rows_of(refining(FINE_JOB, LatencyTable.read(table.path), kind()))
    assert [(row.type, row.op, row.graph) for row in again] == [(row.type, row.op, row.graph) for row in first]
    other = rows_of(refining(replace(FINE_JOB, seed=1), table, target))
    assert [(row.type, row.op, row.graph) for row in other] != [(row.type, row.op, row.graph) for row in first]


@pytest.mark.parametrize("kind", [Told, Opaque])
def test_refining_again_and_again_asks_for_nothing_twice(kind: type[Told]) -> None:
    target = kind()
    table = filled(FINE_JOB, target)
    for _ in range(4):
        table.rows += rows_of(refining(FINE_JOB, table, target))
    networks = [row.details["digest"] for row in table.rows if row.type != "op"]
    assert len(networks) == len(set(networks))
    if kind is Opaque:  # in context, an operator comes with its network
        ops = [row.op for row in table.of_type("op")]
        assert len(ops) == len(set(ops))


def test_the_networks_read_next_are_those_whose_operators_are_least_sure() -> None:
    target = Told()
    table = filled(FINE_JOB, target)
    predictor = Predictor(table, target.lower)
    fresh = pool(FINE_JOB, table)
    unsure = {name: float((predictor.deviation_ms(graph.ops) ** 2).sum()) for name, graph in fresh.items()}
    found = rows_of(refining(FINE_JOB, table, target))
    read = digests([row for row in found if row.type == "network"])
    assert read == sorted(unsure, key=unsure.__getitem__, reverse=True)[:REFINE_NETWORKS]
    timed = digests([row for row in found if row.type == "calibration"])
    assert timed == [name for name in unsure if name not in read][:REFINE_NETWORKS]


def test_no_operator_that_is_left_for_later_is_less_sure_than_those_measured_next() -> None:
    target = Opaque()
    table = filled(FINE_JOB, target)
    predictor, measured = Predictor(table, target.lower), {row.op for row in table.of_type("op")}
    asked = [row.op for row in rows_of(refining(FINE_JOB, table, target)) if row.op is not None]
    offered = {op for graph in pool(FINE_JOB, table).values() for op in graph.ops} - measured
    assert len(asked) == REFINE_OPS < len(offered) and offered > set(asked)
    assert predictor.deviation_ms(asked).min() >= predictor.deviation_ms(sorted(offered - set(asked))).max()


def test_operators_outside_of_what_was_measured_come_first() -> None:
    target = Opaque()
    narrow = in_memory([row for row in filled(FINE_JOB, target).rows if row.op and max(row.op.axes) <= 32])
    predictor = Predictor(narrow, target.lower)
    asked = [row.op for row in rows_of(refining(FINE_JOB, narrow, target)) if row.op is not None]
    assert len(asked) == REFINE_OPS and np.isinf(predictor.deviation_ms(asked)).all()


@pytest.mark.parametrize("kind", [Told, Opaque])
def test_refining_goes_on_for_so_many_rounds_and_no_longer(kind: type[Told]) -> None:
    target = kind()
    table = filled(FINE_JOB, target)
    assert len(table.of_type("calibration")) == FINE_JOB.calibration
    rounds = 0
    while steps := refining(FINE_JOB, table, target):
        calibrating = [step for step in steps if step.name == RANDOM]
        assert len(calibrating) == REFINE_NETWORKS
        table.rows += rows_of(calibrating)  # what is measured besides does not count
        rounds += 1
    assert rounds == MAX_REFINEMENTS


def test_what_another_network_was_calibrated_with_does_not_end_refining() -> None:
    target = Told()
    table = filled(FINE_JOB, target)
    predictor, most = Predictor(table, target.lower), REFINE_NETWORKS * MAX_REFINEMENTS

    def after(count: int, anchor: str) -> list[Step]:
        row = Measurement("calibration", (1.0,), graph=UNPRUNED, details={"anchor": anchor, "anchor_ms": 1.0})
        return refining_steps(FINE_JOB, in_memory(table.rows + [row] * count), target, predictor)

    assert after(most, "another") and after(most - 1, digest(UNPRUNED))
    assert after(most, digest(UNPRUNED)) == []


@pytest.mark.parametrize("kind", [Told, Opaque])
def test_a_network_of_which_everything_was_measured_is_not_refined(kind: type[Told]) -> None:
    target = kind()
    job = replace(JOB, grids=((8, 64), (8, 64)))
    assert refining(job, filled(job, target), target) == []


def test_refining_makes_predictions_better() -> None:
    target = Told()
    table = filled(replace(FINE_JOB, networks=2), target)
    fresh = [network_at(widths) for widths in random_widths([FINE, FINE], 60, seed=99)]
    truth = np.array([OVERHEAD_MS + sum(map(op_latency_ms, graph.ops)) for graph in fresh])

    def error() -> float:
        predictor = Predictor(table, target.lower)
        return float(np.mean(np.abs(np.array([predictor.predict(graph) for graph in fresh]) / truth - 1)))

    before = error()
    for _ in range(4):
        table.rows += rows_of(refining(FINE_JOB, table, target))
    assert error() < 0.7 * before
