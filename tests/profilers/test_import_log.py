"""Logs of benchmark_model laid beside a network: right rows, or one line that says what does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers.errors import TableError, UserError
from profilers.import_log import FLOOR_MS, NOTHING_MS, TOLERANCE, read, rows_from
from profilers.ops import OpGraph, OpNode, OpSpec, digest
from profilers.predictor import Predictor
from profilers.table import Identity, LatencyTable, Measurement

IDENTITY = Identity("a phone", "tflite", "2018")


class Op(NamedTuple):
    type: str
    us: int  # of one call
    calls: int = 1


# A network of five operators, and what TFLite runs for it


def network(first: int = 8, second: int = 16) -> OpGraph:
    """conv 3->first to 8x8, depthwise, pointwise to `second`, mean, classes."""
    conv = OpSpec("conv", (3,), 16, 16, first, (3, 3), (2, 2), (1, 1), activation="relu6")
    depthwise = OpSpec("depthwise_conv", (first,), 8, 8, first, (3, 3), padding=(1, 1), groups=first)
    nodes = (
        OpNode("stem", conv, (OpGraph.INPUT,)),
        OpNode("depthwise", replace(depthwise, activation="relu6"), ("stem",)),
        OpNode("pointwise", OpSpec("conv", (first,), 8, 8, second, activation="relu6"), ("depthwise",)),
        OpNode("mean", OpSpec("global_avg_pool", (second,), 8, 8, second), ("pointwise",)),
        OpNode("classes", OpSpec("linear", (second,), 1, 1, 4), ("mean",)),
    )
    return OpGraph(nodes, (3, 16, 16), ("classes",))


OPS = (
    Op("CONV_2D", 1250),
    Op("DEPTHWISE_CONV_2D", 500),
    Op("CONV_2D", 3200),
    Op("AVERAGE_POOL_2D", 40),
    Op("CONV_2D", 30),
    Op("SQUEEZE", 2),
    Op("SOFTMAX", 25),
)
TIMES_MS = [1.25, 0.5, 3.2, 0.04, 0.03]  # of those that stand in the network
TOTAL_MS = 5.047
SPECS = list(network().ops)


def tables(ops: Sequence[Op], runs: int, *, start: bool) -> str:
    """The operator tables as TensorFlow lays them out; `start`: with the column that only old builds have."""
    total = sum(op.us * op.calls for op in ops)
    rows = [(f"[net/{at}]:{at}", sum(op.us for op in ops[:at]), op) for at, op in enumerate(ops)]

    def table(title: str, chosen: Sequence[tuple[str, int, Op]]) -> str:
        columns = ["node type", *(["start"] if start else []), "first", "avg ms", "%", "cdf%", "mem KB", "times called"]
        text, cdf = f"====== {title} ======\n" + "".join(f"\t[{column}]" for column in [*columns, "Name"]) + "\n", 0.0
        for name, begin, op in chosen:
            share = 100 * op.us * op.calls / total
            cdf += share
            cells = [op.type, *([f"{begin / 1000:.3f}"] if start else []), f"{op.us / 990:.3f}", f"{op.us / 1000:.3f}"]
            cells += [f"{share:.3f}%", f"{cdf:.3f}%", "0.000", str(op.calls), name]
            text += "".join(f"\t{cell:>9}" for cell in cells) + "\n"
        return text + "\n"

    top = sorted(rows, key=lambda row: -row[2].us * row[2].calls)[:10]
    text = table("Run Order", rows) + table("Top by Computation Time", top)
    text += f"Number of nodes executed: {len(ops)}\n====== Summary by node type ======\n"
    text += "".join(f"\t[{column}]" for column in ("Node type", "count", "avg ms", "times called")) + "\n"
    for kind in sorted({op.type for op in ops}):
        same = [op for op in ops if op.type == kind]
        us, calls = sum(op.us * op.calls for op in same), sum(op.calls for op in same)
        text += f"\t{kind}\t{len(same)}\t{us / 1000:.3f}\t{calls}\n"
    return (
        text + f"\nTimings (microseconds): {stats(total, runs)}\nMemory (bytes): count=0\n{len(ops)} nodes observed\n"
    )


def stats(us: int, count: int) -> str:
    return f"count={count} first={us + 2} curr={us} min={us - 1} max={us + 3} avg={us:.6g} std=1"


def new_log(ops: Sequence[Op] = OPS, *, shape: str = "1,16,16,3", threads: int = 1, more: str = "") -> str:
    total = sum(op.us * op.calls for op in ops)
    return (
        f"STARTING!\nNum threads: [{threads}]\nGraph: [/data/local/tmp/net.tflite]\nInput shapes: [{shape}]\n{more}"
        f"Running benchmark for at least 1 iterations\ncount=1 curr={total + 9}\n\n"
        f"Running benchmark for at least 50 iterations\n{stats(total, 50)}\n\n"
        f"Inference timings in us: Init: 5579, First inference: {total + 9}, Warmup (avg): {total + 9}, "
        f"Inference (avg): {total:.6g}\n"
    ) + ("Operator-wise Profiling Info for Regular Benchmark Runs:\n" + tables(ops, 50, start=False))


def old_log(ops: Sequence[Op] = OPS, *, shape: str = "1,16,16,3", threads: int = 1) -> str:
    total = sum(op.us * op.calls for op in ops)
    lines = (
        "STARTING!",
        "Graph: [/data/local/tmp/net.tflite]",
        f"Input shapes: [{shape}]",
        f"Num threads: [{threads}]",
        "Running benchmark for 10 iterations with detailed stat logging:",
        stats(total, 10),
        "Running benchmark for 20 iterations with detailed stat logging:",
        stats(total, 20),
        f"Average inference timings in us: Warmup: {total:.6g}, no stats: {total}",
    )
    return "".join(f"native : benchmark_tflite_model.cc:412 {line}\n" for line in lines) + tables(ops, 30, start=True)


def without_operators(ops: Sequence[Op] = OPS, *, more: str = "") -> str:
    text = new_log(ops, more=more)
    return text[: text.index("Operator-wise")]


GPU = "Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate w/ 2 delegate k."


# Reading and importing


class Desk:
    """A folder of logs and a table."""

    def __init__(self, folder: Path, identity: Identity = IDENTITY) -> None:
        self.folder = folder
        self.table = LatencyTable.open(folder / "table.jsonl", identity)

    def write(self, text: str, name: str = "a.txt") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def rows(self, *texts: str, graph: OpGraph | None = None) -> list[Measurement]:
        logs = [read(self.write(text, f"{'abcdef'[at]}.txt")) for at, text in enumerate(texts)]
        predictor = Predictor(self.table, lambda lowered: lowered, extrapolate=True)
        return rows_from(logs, network() if graph is None else graph, self.table, predictor)

    def add(self, *texts: str, graph: OpGraph | None = None) -> list[Measurement]:
        rows = self.rows(*texts, graph=graph)
        self.table.append(rows)
        return rows

    def refusal(self, *texts: str, graph: OpGraph | None = None) -> str:
        before, rows = self.table.path.read_bytes(), list(self.table.rows)
        with pytest.raises(UserError) as caught:
            self.add(*texts, graph=graph)
        assert (self.table.path.read_bytes(), self.table.rows) == (before, rows)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(str(self.folder))
        return message.removeprefix(f"{self.folder}/")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("text", [new_log(), old_log()], ids=["new", "old"])
def test_rows_are_the_operators_in_order_and_the_network_last(desk: Desk, text: str) -> None:
    *ops, whole = desk.add(text)
    known = {"digest": digest(network()), "log_sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert ops == [
        Measurement("op", (ms,), op=spec, context="in_context", details=known)
        for spec, ms in zip(SPECS, TIMES_MS, strict=True)
    ]
    count = 50 if "Operator-wise" in text else 20
    summary = {"count": count, "mean_ms": 5.047, "min_ms": 5.046, "max_ms": 5.05, "std_ms": 0.001}
    details = known | {"log": "a.txt", "summary": summary, "aside_ms": 0.027, "delegate": None, "partial": False}
    assert whole == Measurement("network", (TOTAL_MS,), graph=network(), details=details)
    assert LatencyTable.read(desk.table.path).rows == [*ops, whole]


KINDS_OF = {  # what TFLite may call them
    "conv": ("CONV_2D", "FULLY_CONNECTED"),
    "linear": ("CONV_2D", "FULLY_CONNECTED"),
    "depthwise_conv": ("DEPTHWISE_CONV_2D",),
    "global_avg_pool": ("AVERAGE_POOL_2D", "MEAN"),
    "avg_pool": ("AVERAGE_POOL_2D",),
    "max_pool": ("MAX_POOL_2D",),
    "add": ("ADD",),
    "mul": ("MUL",),
    "concat": ("CONCATENATION",),
    "activation": ("RELU",),
}
ASIDE = ("RESHAPE", "SQUEEZE", "SOFTMAX", "TRANSPOSE", "QUANTIZE", "DEQUANTIZE")


def spec(kind: str) -> OpSpec:
    inputs = (8, 8) if kind in ("add", "mul", "concat") else (8,)
    more = {"depthwise_conv": {"groups": 8}, "activation": {"activation": "relu"}, "concat": {"out_channels": 16}}
    return OpSpec(
        **({"kind": kind, "in_channels": inputs, "height": 4, "width": 4, "out_channels": 8} | more.get(kind, {}))
    )


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_every_time_goes_to_its_own_operator(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS_OF)), min_size=1, max_size=14))
    times = st.integers(2, 9000)
    shown = [Op(data.draw(st.sampled_from(KINDS_OF[kind])), data.draw(times)) for kind in kinds]
    log = list(shown)
    for _ in range(data.draw(st.integers(0, 4))):
        aside = Op(data.draw(st.sampled_from(ASIDE)), data.draw(times))
        log.insert(data.draw(st.integers(0, len(log))), aside)
    nodes = tuple(OpNode(f"n{at}", spec(kind), (OpGraph.INPUT,)) for at, kind in enumerate(kinds))
    graph = OpGraph(nodes, (3, 16, 16), (nodes[-1].name,))
    desk = Desk(tmp_path_factory.mktemp("desk"))
    *ops, whole = desk.rows(data.draw(st.sampled_from([new_log, old_log]))(log), graph=graph)
    assert [(row.op, row.median_ms) for row in ops] == [
        (node.op, op.us / 1000) for node, op in zip(nodes, shown, strict=True)
    ]
    assert whole.median_ms == pytest.approx(sum(op.us for op in log) / 1000, rel=1e-5)
    assert whole.details["aside_ms"] == pytest.approx((sum(op.us for op in log) - sum(op.us for op in shown)) / 1000)


def test_padding_and_activations_of_their_own_belong_to_their_operator(desk: Desk) -> None:
    """As our own exports are run: a convolution padded as PyTorch does it, activations that TFLite does not fuse."""
    stem = OpSpec("conv", (3,), 16, 16, 8, (3, 3), (2, 2), (1, 1), activation="hardswish")
    gate = OpSpec("conv", (8,), 1, 1, 8, activation="hardsigmoid")
    nodes = (
        OpNode("stem", stem, (OpGraph.INPUT,)),
        OpNode("mean", OpSpec("global_avg_pool", (8,), 8, 8, 8), ("stem",)),
        OpNode("gate", gate, ("mean",)),
        OpNode("scale", OpSpec("scale", (8, 8), 8, 8, 8), ("stem", "gate")),
        OpNode("silu", OpSpec("activation", (8,), 8, 8, 8, activation="silu"), ("scale",)),
    )
    graph = OpGraph(nodes, (3, 16, 16), ("silu",))
    kinds = ["PAD", "CONV_2D", "HARD_SWISH", "MEAN", "CONV_2D", "ADD", "MUL", "MUL", "LOGISTIC", "MUL"]
    log = [Op(kind, 1 << place) for place, kind in enumerate(kinds)]
    *ops, whole = desk.rows(new_log(log), graph=graph)
    assert [row.op for row in ops] == list(graph.ops)
    assert [1000 * row.median_ms for row in ops] == pytest.approx([1 + 2 + 4, 8, 16 + 32 + 64, 128, 256 + 512])
    assert whole.details["aside_ms"] == 0
    with pytest.raises(UserError, match="its operator 5 is RELU"):
        desk.rows(new_log([*log[:8], Op("RELU", 9)]), graph=graph)


def test_a_pooling_that_is_padded_by_the_edges_of_the_image_is_one_operator(desk: Desk) -> None:
    pool = OpSpec("max_pool", (8,), 16, 16, 8, (3, 3), (2, 2), (1, 1))
    nodes = (
        OpNode("stem", OpSpec("conv", (3,), 16, 16, 8, activation="silu"), (OpGraph.INPUT,)),
        OpNode("pool", pool, ("stem",)),
    )
    kinds = ["CONV_2D", "LOGISTIC", "MUL", "SLICE", "CONCATENATION", "SLICE", "CONCATENATION", "MAX_POOL_2D"]
    log = [Op(kind, 1 << place) for place, kind in enumerate(kinds)]
    graph = OpGraph(nodes, (3, 16, 16), ("pool",))
    *ops, _ = desk.rows(new_log(log), graph=graph)
    assert [1000 * row.median_ms for row in ops] == pytest.approx([7, 8 + 16 + 32 + 64 + 128])
    with pytest.raises(UserError, match="the network ends before it"):
        desk.rows(new_log([*log, Op("SLICE", 9)]), graph=graph)


def test_operators_that_move_or_shift_values_have_rows_of_their_own(desk: Desk) -> None:
    nodes = (
        OpNode("pad", OpSpec("pad", (3,), 16, 16, 3, padding=(1, 1)), (OpGraph.INPUT,)),
        OpNode("conv", OpSpec("conv", (3,), 18, 18, 12, (3, 3)), ("pad",)),
        OpNode("shift", OpSpec("add_scalar", (12,), 16, 16, 12, activation="relu6"), ("conv",)),
        OpNode("third", OpSpec("mul_scalar", (12,), 16, 16, 12), ("shift",)),
        OpNode("leaky", OpSpec("prelu", (12,), 16, 16, 12), ("third",)),
        OpNode("pixels", OpSpec("pixel_shuffle", (12,), 16, 16, 3, stride=(2, 2)), ("leaky",)),
        OpNode("noise", OpSpec("conv_transpose", (3,), 32, 32, 3, (3, 3), padding=(1, 1)), ("pixels",)),
        OpNode("clean", OpSpec("sub", (3, 3), 32, 32, 3), ("pixels", "noise")),
        OpNode("likely", OpSpec("softmax", (3,), 32, 32, 3), ("clean",)),
    )
    graph = OpGraph(nodes, (3, 16, 16), ("likely",))
    kinds = ["PAD", "CONV_2D", "ADD", "DIV", "LEAKY_RELU", "DEPTH_TO_SPACE", "TRANSPOSE_CONV", "SUB", "SOFTMAX"]
    *ops, whole = desk.rows(new_log([Op(kind, 1 << place) for place, kind in enumerate(kinds)]), graph=graph)
    assert [row.op for row in ops] == list(graph.ops) and whole.details["aside_ms"] == 0
    assert [1000 * row.median_ms for row in ops] == pytest.approx([1 << place for place in range(9)])


def test_a_flatten_is_a_reshape_or_nothing(desk: Desk) -> None:
    """Weights are read in the order in which the values lie, or the log has a RESHAPE."""
    conv = OpSpec("conv", (3,), 16, 16, 8, (3, 3), (2, 2), (1, 1))
    nodes = (
        OpNode("conv", conv, (OpGraph.INPUT,)),
        OpNode("flat", OpSpec("flatten", (8,), 8, 8, 512), ("conv",)),
        OpNode("classes", OpSpec("linear", (512,), 1, 1, 4), ("flat",)),
    )
    graph = OpGraph(nodes, (3, 16, 16), ("classes",))
    with_it = (Op("CONV_2D", 1250), Op("RESHAPE", 7), Op("FULLY_CONNECTED", 30))
    for log, flat_ms in ((with_it, 0.007), ((with_it[0], with_it[2]), NOTHING_MS)):
        *ops, _ = desk.rows(new_log(log), graph=graph)
        assert [row.median_ms for row in ops] == [1.25, flat_ms, 0.03]
        assert [row.op for row in ops] == list(graph.ops)


def test_rows_that_took_no_time_are_kept_as_nearly_none(desk: Desk) -> None:
    *ops, whole = desk.add(new_log([op._replace(us=0) if op.type == "AVERAGE_POOL_2D" else op for op in OPS]))
    assert [row.op for row in ops] == SPECS
    assert [row.median_ms == NOTHING_MS for row in ops] == [each.kind == "global_avg_pool" for each in SPECS]
    assert (whole.type, whole.median_ms) == ("network", 5.007)


def test_a_log_that_does_not_say_shape_and_threads_is_taken(desk: Desk) -> None:
    text = new_log().replace("Input shapes: [1,16,16,3]\n", "").replace("Num threads: [1]\n", "")
    assert len(desk.add(text)) == 6


# Logs without operators of their own


def test_a_log_without_operators_gives_the_network_alone(desk: Desk) -> None:
    (whole,) = desk.add(without_operators())
    assert (whole.type, whole.samples_ms, whole.graph) == ("network", (TOTAL_MS,), network())
    assert (whole.details["aside_ms"], whole.details["delegate"], whole.details["partial"]) == (0, None, False)


CPU = "Created TensorFlow Lite XNNPACK delegate for CPU."
XNNPACK = (Op("Convolution (NHWC, F32) GEMM", 340, calls=13), Op("Convolution (NHWC, F32) DWConv", 40, calls=13))


@pytest.mark.parametrize(("line", "delegate"), [("", None), (f"INFO: {CPU}\n", "XNNPACK")])
def test_kernels_added_up_by_type_give_the_network_alone(desk: Desk, line: str, delegate: str | None) -> None:
    (whole,) = desk.add(new_log(XNNPACK, more=line))
    assert (whole.type, whole.median_ms) == ("network", 13 * 0.38)
    assert (whole.details["delegate"], whole.details["partial"]) == (delegate, False)


@pytest.mark.parametrize("form", [new_log, without_operators])
def test_a_partly_run_delegate_is_recorded_and_gives_no_operators(desk: Desk, form) -> None:
    (whole,) = desk.add(form(more=f"INFO: {GPU}\n"))
    assert (whole.type, whole.samples_ms) == ("network", (TOTAL_MS,))
    assert (whole.details["delegate"], whole.details["partial"]) == ("GPU", True)


def test_what_another_delegate_ran_is_refused(desk: Desk) -> None:
    desk.add(new_log())
    assert desk.refusal(new_log(XNNPACK, more=f"INFO: {CPU}\n")) == (
        "a.txt was run by XNNPACK, a.txt by no delegate: name a device of its own for it"
    )
    desk.add(without_operators())  # which does not say


@pytest.mark.parametrize(
    ("asked", "line", "words"),
    [
        ("gpu (cl)", None, "a.txt was run by no delegate, the table is of gpu"),
        ("gpu", CPU, "a.txt was run by XNNPACK, the table is of gpu"),
        ("libX.so 0123456789ab", GPU, "a.txt was run by GPU, the table is of libX.so"),
        ("gpu", GPU, None),
    ],
)
def test_a_table_of_a_delegate_takes_its_logs_alone(
    tmp_path: Path, asked: str, line: str | None, words: str | None
) -> None:
    desk = Desk(tmp_path, Identity("a phone", "litert", f"benchmark_model 0123456789ab, delegate {asked}"))
    log = new_log(XNNPACK if line else OPS, more=f"INFO: {line}\n" if line else "")
    if words is None:
        assert desk.add(log)
    else:
        assert desk.refusal(log) == words


def test_logs_of_one_delegate_go_together_and_no_other_does(desk: Desk) -> None:
    desk.add(new_log(XNNPACK, more=f"INFO: {CPU}\n"))
    desk.add(new_log(XNNPACK, more=f"INFO: {CPU}\nINFO: once more\n"))
    assert "was run by no delegate, a.txt by XNNPACK" in desk.refusal(new_log())


def test_a_partly_run_delegate_is_not_compared_with_the_table(desk: Desk) -> None:
    desk.add(new_log())
    (whole,) = desk.add(new_log(slower(OPS, 0.3, 0, 1, 2), more=f"INFO: {GPU}\n"))
    assert (whole.median_ms, whole.details["partial"]) == (1.582, True)


def test_predictions_are_made_without_networks_that_a_delegate_ran_partly(desk: Desk) -> None:
    widths = [(first, second) for first in (4, 8, 12) for second in (8, 16, 24)]
    whole = [Measurement("network", (0.1 * (a + b),), graph=network(a, b)) for a, b in widths]
    partial = [
        replace(row, samples_ms=(50.0,), details={"partial": True, "delegate": "GPU"})
        for row in whole
        for _ in range(3)
    ]
    ops = [
        Measurement("op", (0.001 * (1 + op.macs / 100),), op=op)
        for op in dict.fromkeys(op for a, b in widths for op in network(a, b).ops)
    ]

    def predictor(*rows: Measurement) -> Predictor:
        return Predictor(LatencyTable(desk.table.path, IDENTITY, {}, list(rows)), lambda graph: graph)

    graph = network(8, 16)
    calibrated = predictor(*ops, *whole)
    assert predictor(*ops, *whole, *partial).calibration == calibrated.calibration != predictor(*ops).calibration
    assert predictor(*ops, *partial).calibration == predictor(*ops).calibration
    assert predictor(*whole, *partial).predict(graph) == predictor(*whole).predict(graph)
    with pytest.raises(TableError, match="has no measurement"):
        predictor(*partial).predict(graph)


# Logs that are refused


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            (OPS[0], Op("ADD", 500), *OPS[2:]),
            "operator 2 is ADD ([net/1]:1), the network has depthwise_conv 8x8x8->8 k3x3 s1 relu6 (depthwise)",
        ),
        (
            (OPS[5], OPS[1], OPS[0], *OPS[2:]),  # those aside are not counted
            "operator 1 is DEPTHWISE_CONV_2D ([net/1]:1), the network has conv 3x16x16->8 k3x3 s2 relu6 (stem)",
        ),
        (OPS[:3], "operator 4 should be global_avg_pool 16x8x8->16 (mean), the log ends before it"),
        ((*OPS, Op("RELU6", 9)), "operator 6 is RELU6 ([net/7]:7), the network ends before it"),
        ((*OPS[:3], Op("STRANGE", 40), *OPS[4:]), "operator 4 is STRANGE ([net/3]:3), the network has global_avg_pool"),
    ],
    ids=["wrong kind", "wrong order", "too few", "too many", "unknown"],
)
@pytest.mark.parametrize("form", [new_log, old_log])
def test_a_log_of_another_network_is_refused_with_the_first_operator(desk: Desk, form, ops, message: str) -> None:
    assert desk.refusal(form(ops)).startswith(f"a.txt is of another network: its {message}")


@pytest.mark.parametrize("form", [new_log, old_log])
def test_another_input_is_refused(desk: Desk, form) -> None:
    expected = "a.txt ran on an input of {}, the network takes 1x16x16x3"
    assert desk.refusal(form(shape="1,32,16,3")) == expected.format("1x32x16x3")
    assert desk.refusal(form(shape="2,16,16,3")) == expected.format("2x16x16x3")
    assert desk.refusal(form(shape="1,768")) == expected.format("1x768")


def test_the_batch_is_that_of_the_table(tmp_path: Path) -> None:
    desk = Desk(tmp_path, replace(IDENTITY, batch=2))
    assert desk.refusal(new_log()) == "a.txt ran on an input of 1x16x16x3, the network takes 2x16x16x3"
    assert len(desk.add(new_log(shape="2,16,16,3"))) == 6


@pytest.mark.parametrize("form", [new_log, old_log])
def test_other_threads_are_refused(desk: Desk, form) -> None:
    assert desk.refusal(form(threads=4)) == "a.txt ran with 4 threads, the table is of 1"


def test_an_error_in_one_of_several_logs_leaves_the_table_as_it_was(desk: Desk) -> None:
    desk.add(new_log())
    assert desk.refusal(old_log(), new_log(OPS[:3])).startswith("b.txt is of another network")
    assert desk.refusal(new_log(threads=2), old_log()).startswith("a.txt ran with 2 threads")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}/none.txt: No such file or directory$"):
        read(tmp_path / "none.txt")
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}: Is a directory$"):
        read(tmp_path)
    (tmp_path / "cut.txt").write_text(new_log()[:-900])
    with pytest.raises(UserError, match=f"^{tmp_path}/cut.txt:"):
        read(tmp_path / "cut.txt")


# Logs beside what the table knows


def test_the_same_log_adds_nothing(desk: Desk) -> None:
    assert len(desk.add(new_log(), new_log())) == 6  # under two names
    assert desk.add(new_log()) == []
    assert len(desk.add(new_log(), old_log(), new_log())) == 6  # the other run alone
    assert len(desk.table.rows) == 12


def slower(ops: Sequence[Op], factor: float, *places: int) -> list[Op]:
    return [op._replace(us=round(op.us * factor)) if at in places else op for at, op in enumerate(ops)]


def test_runs_of_one_network_may_differ_a_little(desk: Desk) -> None:
    desk.add(new_log())
    within = 1 + TOLERANCE - 0.01
    assert len(desk.add(new_log(slower(OPS, within, 0, 1, 2)))) == 6
    assert len(desk.add(new_log([*OPS[:4], Op("CONV_2D", 30 + round(1000 * FLOOR_MS) - 1), *OPS[5:]]))) == 6


def test_one_operator_that_contradicts_the_table_is_named(desk: Desk) -> None:
    desk.add(new_log())
    ops = [Op("CONV_2D", 1250), Op("DEPTHWISE_CONV_2D", 1000), Op("CONV_2D", 2700), *OPS[3:]]  # the sum is the same
    assert desk.refusal(new_log(ops)) == (
        "a.txt does not fit: depthwise_conv 8x8x8->8 k3x3 s1 relu6 (depthwise) takes 1 ms there, 0.5 ms by "
        "what is known: are these its --widths?"
    )
    assert "(mean) takes 0.092 ms there, 0.04 ms by" in desk.refusal(
        new_log([*OPS[:3], Op("AVERAGE_POOL_2D", 92), *OPS[4:]])
    )


def test_other_widths_are_refused_with_the_first_operator_that_does_not_fit(desk: Desk) -> None:
    """A log of a narrower network, said to be of the whole one: known operators take half as long."""
    desk.add(new_log(), old_log())
    narrow = slower(OPS, 0.5, 0, 1, 2)
    message = desk.refusal(new_log(narrow))
    assert message.startswith("a.txt does not fit: conv 3x16x16->8 k3x3 s2 relu6 (stem) takes 0.625 ms there, 1.2")
    assert message.endswith("ms by what is known: are these its --widths?")
    assert len(desk.add(new_log(narrow), graph=network(4, 8))) == 6  # what it is said to be now


def test_widths_that_the_table_lacks_are_compared_by_what_is_predicted(desk: Desk) -> None:
    """The whole network's log, said to be of a narrow one: none of its wide operators is in the table."""
    desk.add(new_log())
    desk.add(new_log(slower(OPS, 0.5, 0, 1, 2)), graph=network(4, 8))
    message = desk.refusal(old_log(), graph=network(6, 8))
    assert message.startswith("a.txt does not fit: conv 3x16x16->6 k3x3 s2 relu6 (stem) takes 1.25 ms there, 0.")


def test_a_whole_that_contradicts_the_table_is_refused_without_operators_too(desk: Desk) -> None:
    desk.add(new_log())
    assert len(desk.add(without_operators())) == 1
    message = desk.refusal(without_operators(slower(OPS, 1.5, 0, 1, 2)))
    assert message.startswith("a.txt does not fit: the network takes 7.522 ms there, 5.0")
    assert message.endswith("ms by what is known: are these its --widths?")
