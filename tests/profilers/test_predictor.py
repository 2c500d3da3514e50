"""Predictions: measured points return, nothing is guessed outside, networks are sums, calibration finds the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers.errors import TableError
from profilers.ops import OpGraph, OpNode, OpSpec, fuse_adds
from profilers.predictor import (
    _CLASSES,
    MIN_REPEATS,
    USUAL_NOISE,
    Calibration,
    FamilyCost,
    Predictor,
    _op_class,
    _repeatability,
    anchored_ms,
)
from profilers.table import Identity, LatencyTable, Measurement

PATH = Path("latency_tables/board.jsonl")
WIDTHS = (8, 16, 24, 32, 48, 64)


def spatial(c_in: int, c_out: int, activation: str = "none") -> OpSpec:
    return OpSpec("conv", (c_in,), 8, 8, c_out, kernel=(3, 3), padding=(1, 1), activation=activation)


def pointwise(c_in: int, c_out: int) -> OpSpec:
    return OpSpec("conv", (c_in,), 8, 8, c_out)


def depthwise(channels: int) -> OpSpec:
    return OpSpec("depthwise_conv", (channels,), 8, 8, channels, kernel=(3, 3), padding=(1, 1), groups=channels)


def chain(ops: Sequence[OpSpec]) -> OpGraph:
    nodes = [OpNode(f"n{i}", op, (f"n{i - 1}" if i else OpGraph.INPUT,)) for i, op in enumerate(ops)]
    return OpGraph(tuple(nodes), (ops[0].in_channels[0], 8, 8), (nodes[-1].name,))


def op_row(op: OpSpec, ms: float, **details: object) -> Measurement:
    return Measurement("op", (ms,), op=op, details=details)


def predictor(rows: Sequence[Measurement], lower: Callable[[OpGraph], OpGraph] = lambda graph: graph) -> Predictor:
    return Predictor(LatencyTable(PATH, Identity("chip", "runtime", "1"), {}, list(rows)), lower)


# One family


@st.composite
def measured_families(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, A) and a cost of the known parts: a constant, memory, products of padded widths."""
    dims = draw(st.integers(1, 2))
    points = draw(st.sets(st.tuples(*[st.integers(1, 256)] * dims), min_size=1, max_size=25))
    axes = np.array(sorted(points), float)
    constant, memory, product = (draw(st.floats(0, 1)) for _ in range(3))
    block = draw(st.sampled_from([1, 8, 16]))
    padded = np.ceil(axes / block) * block
    return axes, 1e-3 + constant + 1e-2 * memory * axes.sum(axis=1) + 1e-3 * product * padded.prod(axis=1)


@given(family=measured_families())
def test_measured_points_come_back(family: tuple[np.ndarray, np.ndarray]) -> None:
    axes, latency_ms = family
    np.testing.assert_allclose(FamilyCost(axes, latency_ms)(axes), latency_ms, rtol=0.02)


@given(
    latencies=st.dictionaries(
        st.tuples(st.integers(1, 512), st.integers(1, 512)), st.floats(1e-4, 1e3), min_size=1, max_size=15
    ),
    asked=st.lists(st.tuples(st.integers(1, 512), st.integers(1, 512)), min_size=1, max_size=20),
)
def test_no_cost_is_ever_negative_however_wild_the_points(
    latencies: dict[tuple[int, int], float], asked: list[tuple[int, int]]
) -> None:
    cost = FamilyCost(np.array(list(latencies), float), np.array(list(latencies.values())))
    found = cost(np.array(asked, float))
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_a_staircase_is_followed_between_its_measured_points() -> None:
    stairs = {width: 0.1 + 0.01 * (-(-width // 8) * 8) for width in range(1, 65)}
    measured = [width for width in stairs if width % 3 or width in (1, 64)]
    cost = FamilyCost(np.array(measured, float)[:, None], np.array([stairs[width] for width in measured]))
    unseen = [width for width in stairs if width not in measured]
    np.testing.assert_allclose(cost(np.array(unseen, float)[:, None]), [stairs[width] for width in unseen], rtol=0.01)


def test_a_staircase_of_two_widths_is_followed_between_its_measured_points() -> None:
    pairs = [(a, b) for a in range(3, 65, 5) for b in range(2, 65, 5)]
    latency_ms = np.array([0.02 + 1e-3 * (-(-a // 8) * 8) * (-(-b // 8) * 8) for a, b in pairs])
    seen = np.arange(len(pairs)) % 2 == 0
    seen[[0, len(pairs) - 1]] = True
    cost = FamilyCost(np.array(pairs, float)[seen], latency_ms[seen])
    np.testing.assert_allclose(cost(np.array(pairs, float)[~seen]), latency_ms[~seen], rtol=0.02)


def test_a_bump_that_no_part_explains_is_remembered_where_it_was_measured() -> None:
    widths = np.arange(8, 257, 8.0)
    smooth = 0.1 + 0.01 * widths
    bump = 1 + 0.3 * np.exp(-0.5 * (np.log(widths / 64) / 0.4) ** 2)
    cost = FamilyCost(widths[:, None], smooth * bump)
    np.testing.assert_allclose(cost(widths[:, None]), smooth * bump, rtol=0.03)


def test_widths_off_the_blocks_learn_their_own_cost() -> None:
    widths = np.arange(16, 129, 2.0)
    latency_ms = np.where(widths % 8 == 0, 1.0, 1.6) * (0.1 + 0.01 * widths)
    cost = FamilyCost(widths[:, None], latency_ms)
    np.testing.assert_allclose(cost(np.array([[64.0], [66.0]])), [0.74, 1.6 * 0.76], rtol=0.05)


def test_outside_is_what_no_axis_has_measured() -> None:
    cost = FamilyCost(np.array([[8.0, 16.0], [32.0, 64.0]]), np.array([0.1, 0.4]))
    asked = np.array([[8, 16], [32, 64], [20, 20], [7, 16], [8, 15], [33, 64], [32, 65]], float)
    assert cost.outside(asked).tolist() == [False, False, False, True, True, True, True]


# Operators and networks


def test_a_network_is_the_sum_of_its_operators() -> None:
    rows = [op_row(spatial(3, 8), 0.25), op_row(depthwise(8), 0.125), op_row(pointwise(8, 16), 0.5)]
    found = predictor(rows)
    network = chain([spatial(3, 8), depthwise(8), pointwise(8, 16), pointwise(8, 16)])
    assert found.op_ms(network.ops) == pytest.approx([0.25, 0.125, 0.5, 0.5], rel=1e-3)
    assert found.predict(network) == pytest.approx(1.375, rel=1e-3)
    assert found.constant_ms == 0.0


def test_the_median_of_samples_and_of_repeated_rows_counts() -> None:
    op = spatial(3, 8)
    rows = [Measurement("op", samples, op=op) for samples in [(0.5, 9.0, 0.25), (0.7,), (4.0,)]]  # 0.5, 0.7 and 4
    assert predictor(rows).op_ms([op]) == pytest.approx([0.7], rel=1e-3)


def test_activations_are_families_of_their_own() -> None:
    found = predictor([op_row(spatial(3, 8), 0.25), op_row(spatial(3, 8, "hardswish"), 0.75)])
    assert found.op_ms([spatial(3, 8, "hardswish"), spatial(3, 8)]) == pytest.approx([0.75, 0.25], rel=1e-3)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (depthwise(8), f"{PATH} has no measurement for depthwise_conv 8x8x8->8 k3x3 s1: "),  # an unknown family
        (pointwise(8, 72), f"conv 8x8x8->72 lies outside of the widths that {PATH} holds for it (8 to 64 by 8 to 64)"),
        (pointwise(8, 4), "conv 8x8x8->4 lies outside"),
        (pointwise(72, 8), "conv 72x8x8->8 lies outside"),
    ],
)
def test_an_unknown_operator_is_an_error_that_names_it(op: OpSpec, expected: str) -> None:
    found = predictor([op_row(pointwise(a, b), 0.1) for a in (8, 64) for b in (8, 64)])
    for ask in (lambda: found.op_ms([pointwise(16, 16), op]), lambda: found.predict(chain([pointwise(8, 8), op]))):
        with pytest.raises(TableError) as refused:
            ask()
        assert str(refused.value).startswith(expected) and "measure it with 'amc-hw profile'" in str(refused.value)


def test_an_operator_that_is_there_with_another_activation_is_told_so() -> None:
    found = predictor([op_row(spatial(3, 8), 0.25), op_row(spatial(3, 8, "relu6"), 0.75)])
    with pytest.raises(TableError, match=r"k3x3 s1 tanh \(it has that with activation none, relu6\): measure it with"):
        found.op_ms([spatial(3, 8, "tanh")])
    alone = OpSpec("activation", (8,), 8, 8, 8, activation="silu")
    found = predictor([op_row(spatial(3, 8), 0.25), op_row(alone, 0.125)])
    for lacking in (spatial(3, 8, "tanh"), replace(alone, activation="gelu")):
        with pytest.raises(TableError, match="no measurement for"):
            found.op_ms([lacking])


def test_an_empty_table_knows_nothing_but_says_so() -> None:
    found = predictor([])
    with pytest.raises(TableError, match=r"no measurement for conv 3x8x8->8 k3x3 s1"):
        found.predict(chain([spatial(3, 8)]))


def test_the_network_is_predicted_as_the_runtime_runs_it() -> None:
    add = OpSpec("add", (8, 8), 8, 8, 8, activation="relu")
    nodes = (
        OpNode("a", spatial(3, 8), (OpGraph.INPUT,)),
        OpNode("b", pointwise(8, 8), ("a",)),
        OpNode("sum", add, ("b", "a")),
    )
    network = OpGraph(nodes, (3, 8, 8), ("sum",))
    fused = OpSpec("conv", (8,), 8, 8, 8, activation="relu", fused_add=True)
    rows = [op_row(spatial(3, 8), 0.25), op_row(fused, 0.5)]
    assert predictor(rows, fuse_adds).predict(network) == pytest.approx(0.75, rel=1e-3)
    with pytest.raises(TableError, match="no measurement for conv 8x8x8->8: "):
        predictor(rows).predict(network)


# Drift


def test_drift_is_divided_out_by_the_anchor() -> None:
    slow = op_row(spatial(3, 8), 0.6, anchor="net", anchor_ms=2.0)
    assert anchored_ms(slow, 1.0) == pytest.approx(0.3)
    assert anchored_ms(slow, None) == 0.6


def test_several_networks_of_one_table_keep_their_own_references() -> None:
    rows = [
        # the small network's anchor took 1 ms, and 2 ms while the machine ran at half its speed
        op_row(pointwise(8, 8), 0.1, anchor="small", anchor_ms=1.0),
        op_row(pointwise(8, 16), 0.4, anchor="small", anchor_ms=2.0),
        op_row(pointwise(16, 8), 0.3, anchor="small", anchor_ms=1.0),
        # the large one's 10 ms, always
        op_row(depthwise(8), 0.7, anchor="large", anchor_ms=10.0),
        # and this row knows no anchor
        op_row(spatial(3, 8), 0.9),
    ]
    found = predictor(rows)
    assert [found.measured_ms(row) for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.7, 0.9])
    ops = [pointwise(8, 16), depthwise(8), spatial(3, 8)]
    assert found.op_ms(ops) == pytest.approx([0.2, 0.7, 0.9], rel=0.02)


@given(drift=st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6))
@settings(max_examples=30)
def test_a_table_that_was_measured_while_the_machine_drifted_predicts_the_same(drift: list[float]) -> None:
    scale = float(np.median(drift))
    truth = {pointwise(8, width): 0.1 + 0.01 * width for width in WIDTHS}
    rows = [
        op_row(op, ms * slow, anchor="net", anchor_ms=slow) for (op, ms), slow in zip(truth.items(), drift, strict=True)
    ]
    assert predictor(rows).op_ms(list(truth)) == pytest.approx([scale * ms for ms in truth.values()], rel=0.02)


# Calibration

#: what operators cost alone, milliseconds
ALONE: Mapping[str, Callable[[OpSpec], float]] = {
    "spatial": lambda op: 0.05 + 1e-4 * op.in_channels[0] * op.out_channels,
    "pointwise": lambda op: 0.03 + 4e-5 * op.in_channels[0] * op.out_channels,
    "depthwise": lambda op: 0.04 + 1e-3 * op.out_channels,
}


def kind_of(op: OpSpec) -> str:
    if op.kind == "depthwise_conv":
        return "depthwise"
    return "pointwise" if op.kernel == (1, 1) else "spatial"


def alone_rows() -> list[Measurement]:
    pairs = [make(a, b) for a in WIDTHS for b in WIDTHS for make in (spatial, pointwise)]
    return [op_row(op, ALONE[kind_of(op)](op)) for op in [*pairs, *map(depthwise, WIDTHS)]]


def random_networks(count: int, *, seed: int) -> list[OpGraph]:
    """Chains of 2 to 11 operators of the three families: depths differ, so offset and constant can be told apart."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ops: list[OpSpec] = []
        channels = int(rng.choice(WIDTHS))
        for _ in range(rng.integers(2, 12)):
            out, kind = int(rng.choice(WIDTHS)), rng.integers(3)
            op = depthwise(channels) if kind == 2 else (spatial, pointwise)[kind](channels, out)
            ops.append(op)
            channels = op.out_channels
        found.append(chain(ops))
    return found


class Device:
    """In a network, an operator costs `scale` times what it costs alone, and `offset_ms`; a run costs `constant_ms`."""

    def __init__(self, scales: Mapping[str, float], offset_ms: float, constant_ms: float) -> None:
        self.scales, self.offset_ms, self.constant_ms = scales, offset_ms, constant_ms

    def __call__(self, graph: OpGraph) -> float:
        ops = [self.scales[kind_of(op)] * ALONE[kind_of(op)](op) + self.offset_ms for op in graph.ops]
        return sum(ops) + self.constant_ms

    def rows(self, count: int, kind: str = "calibration", *, noise: float = 0.0) -> list[Measurement]:
        rng = np.random.default_rng(7)
        return [
            Measurement(kind, (self(graph) * float(np.exp(noise * rng.standard_normal())),), graph=graph)
            for graph in random_networks(count, seed=0)
        ]


PLAIN = Device({"spatial": 1.0, "pointwise": 1.0, "depthwise": 1.0}, 0.0, 0.0)
HIDDEN = Device({"spatial": 1.3, "pointwise": 0.7, "depthwise": 1.1}, 0.01, 0.05)


def scales_of(found: Predictor) -> dict[str, float]:
    return {kind_of(family): scale for family, scale in found.calibration.scales.items()}


@pytest.mark.parametrize(
    "device",
    [
        HIDDEN,
        Device({"spatial": 0.9, "pointwise": 1.6, "depthwise": 0.8}, 0.0, 0.1),
        Device({"spatial": 1.1, "pointwise": 1.2, "depthwise": 0.9}, -0.01, 0.05),  # a profiler's own overhead
    ],
    ids=["offset", "constant", "overhead"],
)
def test_calibration_recovers_hidden_scales_offset_and_constant(device: Device) -> None:
    found = predictor(alone_rows() + device.rows(60))
    for kind, scale in device.scales.items():
        assert scales_of(found)[kind] == pytest.approx(scale, rel=0.05)
    assert found.calibration.offset_ms == pytest.approx(device.offset_ms, abs=0.003)
    assert found.constant_ms == pytest.approx(device.constant_ms, abs=0.01)
    fresh = random_networks(40, seed=1)
    assert [found.predict(graph) for graph in fresh] == pytest.approx([device(graph) for graph in fresh], rel=0.02)
    assert found.error_pct is not None and found.error_pct < 1.0


def test_calibration_changes_nothing_where_networks_are_the_sums_of_their_parts() -> None:
    found = predictor(alone_rows() + PLAIN.rows(40))
    assert scales_of(found) == pytest.approx(PLAIN.scales, rel=1e-3)
    assert found.calibration.offset_ms == pytest.approx(0.0, abs=1e-5)
    assert found.constant_ms == pytest.approx(0.0, abs=1e-4)


def test_drift_is_divided_out_of_networks_too() -> None:
    def with_anchor(row: Measurement, slow: float) -> Measurement:
        details = {"anchor": "net", "anchor_ms": slow}
        return Measurement(row.type, (row.median_ms * slow,), graph=row.graph, details=details)

    rows = HIDDEN.rows(40)
    drifted = [with_anchor(row, 1.5 if index % 3 == 0 else 1.0) for index, row in enumerate(rows)]
    still, found = predictor(alone_rows() + rows), predictor(alone_rows() + drifted)
    for graph in random_networks(10, seed=1):
        assert found.predict(graph) == pytest.approx(still.predict(graph))


@settings(max_examples=20)
@given(
    scales=st.fixed_dictionaries({kind: st.floats(0.5, 2.0) for kind in ALONE}),
    offset_ms=st.floats(-0.01, 0.02),
    constant_ms=st.floats(0.0, 0.2),
    seed=st.integers(0, 1000),
)
def test_a_calibrated_prediction_stays_a_sum_over_operators(
    scales: dict[str, float], offset_ms: float, constant_ms: float, seed: int
) -> None:
    found = predictor(alone_rows() + Device(scales, offset_ms, constant_ms).rows(12))
    for graph in random_networks(3, seed=seed):
        each = [float(found.op_ms([op])[0]) for op in graph.ops]
        assert min(each) > 0
        assert found.op_ms(graph.ops) == pytest.approx(each)
        assert found.predict(graph) == pytest.approx(sum(each) + found.constant_ms)


def test_an_offset_below_zero_never_makes_an_operator_free() -> None:
    found = predictor([op_row(pointwise(8, 8), 0.1), op_row(depthwise(8), 10.0)])
    found.calibration = Calibration({depthwise(8).family(): 2.0}, offset_ms=-0.5, constant_ms=0.25)
    assert found.op_ms([pointwise(8, 8), depthwise(8)]) == pytest.approx([0.05 * 0.1, 19.5], rel=1e-3)
    assert found.predict(chain([depthwise(8)])) == pytest.approx(19.75, rel=1e-3)


@pytest.mark.parametrize(("scale", "most"), [(0.05, 0.01), (0.0, 0.02), (-0.3, None)])
def test_where_an_operator_would_be_free_the_rest_fits_what_is_left_and_the_error_says_so(
    scale: float, most: float | None
) -> None:
    """Below 0, networks are faster the more they have of it: nothing can fit them well."""
    device = Device({"spatial": scale, "pointwise": 1.0, "depthwise": 1.0}, 0.0, 1.0 if scale < 0 else 0.3)
    rows = device.rows(60)
    found = predictor(alone_rows() + rows)
    assert scales_of(found)["spatial"] == Predictor.LOWEST
    errors = [abs(found.predict(row.graph) / row.median_ms - 1) for row in rows if row.graph is not None]
    wrong = float(np.quantile(errors, 0.9))
    assert most is None or wrong < most
    assert found.error_pct is not None
    assert 0.9 < found.error_pct / (100 * wrong) < 1.5


def test_too_few_networks_calibrate_nothing() -> None:
    found = predictor(alone_rows() + HIDDEN.rows(7))
    assert found.calibration == Calibration()
    assert found.error_pct is None
    enough = predictor(alone_rows() + HIDDEN.rows(8))
    assert enough.error_pct is not None
    assert enough.calibration.scales


def test_networks_whose_operators_were_read_fit_the_calibration_but_count_for_no_error() -> None:
    found = predictor(alone_rows() + HIDDEN.rows(40, "network"))
    assert scales_of(found) == pytest.approx(HIDDEN.scales, rel=0.1)
    assert found.error_pct is None
    assert predictor(alone_rows() + HIDDEN.rows(40, "validation")).calibration == Calibration()


def test_the_stated_error_is_that_of_networks_the_fit_has_not_seen() -> None:
    noise = 0.05
    found = predictor(alone_rows() + HIDDEN.rows(60, noise=noise))
    # nine in ten of normal errors lie within 1.645 sigma
    assert found.error_pct == pytest.approx(100 * 1.645 * noise, rel=0.35)
    rng = np.random.default_rng(3)
    fresh = random_networks(400, seed=1)
    truth = [HIDDEN(graph) * np.exp(noise * rng.standard_normal()) for graph in fresh]
    errors = [abs(found.predict(graph) / ms - 1) for graph, ms in zip(fresh, truth, strict=True)]
    assert np.mean(np.array(errors) * 100 <= found.error_pct) == pytest.approx(0.9, abs=0.07)


@pytest.mark.filterwarnings("error")
def test_a_table_that_knows_its_operators_warns_of_nothing() -> None:
    assert predictor([*alone_rows(), *HIDDEN.rows(10)]).error_pct is not None


def test_a_class_is_what_operators_have_in_common() -> None:
    conv = OpSpec("conv", (8,), 8, 8, 16, (3, 3))
    ops = conv, replace(conv, kernel=(1, 1)), depthwise(8), OpSpec("add", (8, 8), 8, 8, 8)
    assert [_CLASSES[_op_class(op)] for op in ops] == ["spatial", "pointwise", "depthwise", "other"]


def test_a_network_of_operators_nobody_measured_does_not_calibrate_silently() -> None:
    stranger = Measurement("calibration", (1.0,), graph=chain([pointwise(8, 128)]))
    rows = alone_rows() + HIDDEN.rows(10)
    with pytest.warns(UserWarning, match="1 networks calibrate nothing: it lacks their operators"):
        found = predictor([*rows, stranger])
    assert found.calibration == predictor(rows).calibration
    with pytest.warns(UserWarning, match="8 networks calibrate nothing"):  # the table stays of use for its own
        assert predictor(alone_rows() + [stranger] * 8).calibration == Calibration()


# How sure it is, and where it leaves what was measured


def test_predictions_are_surest_where_they_were_measured() -> None:
    rng = np.random.default_rng(0)
    wild = [op_row(depthwise(width), 0.1 * width * (1 + 0.3 * rng.standard_normal())) for width in range(8, 257, 8)]
    found = predictor(wild)
    at, between = found.deviation_ms([depthwise(64), depthwise(65)]) / [64, 65]
    assert 0 < at < between
    assert np.isinf(found.deviation_ms([depthwise(512), pointwise(8, 8)])).all()
    smooth = predictor([op_row(depthwise(width), 0.1 * width) for width in range(8, 257, 8)])
    assert smooth.deviation_ms([depthwise(65)])[0] / 65 < between / 10


def few() -> list[Measurement]:
    """Pointwise convolutions at three sizes, two widths of the last one: microseconds by their products."""

    def cost(op: OpSpec) -> float:
        return 0.02 + op.macs / 1e6

    sizes = [OpSpec("conv", (a,), size, size, b) for size in (16, 32) for a in (8, 24, 64) for b in (8, 24, 64)]
    return [op_row(op, cost(op)) for op in (*sizes, pointwise(64, 64), pointwise(32, 32))]


def test_a_family_of_few_widths_leans_on_its_class() -> None:
    found = predictor(few())
    for op in (pointwise(32, 64), pointwise(48, 40), pointwise(40, 40)):
        assert found.op_ms([op])[0] == pytest.approx(0.02 + op.macs / 1e6, rel=0.05)
    with pytest.raises(TableError, match="lies outside"):
        found.op_ms([pointwise(16, 16)])
    table = LatencyTable(PATH, Identity("chip", "runtime", "1"), {}, few())
    far = Predictor(table, lambda graph: graph, extrapolate=True)
    for op in (pointwise(16, 16), pointwise(128, 96)):
        assert far.op_ms([op])[0] == pytest.approx(0.02 + op.macs / 1e6, rel=0.1)
    with pytest.raises(TableError, match="no measurement for depthwise_conv"):
        far.op_ms([depthwise(8)])  # unknown is never zero


def test_few_networks_tell_the_error_of_each_from_the_others() -> None:
    def read(name: str, ops: Sequence[OpSpec], factor: float) -> list[Measurement]:
        parts = [op_row(op, factor * (0.02 + op.macs / 1e6), digest=name) for op in ops]
        whole = sum(row.median_ms for row in parts)
        return [*parts, Measurement("network", (whole,), graph=chain(ops), details={"digest": name})]

    ops = [pointwise(a, b) for a in (16, 32, 64) for b in (16, 32, 64)]
    rows = read("a", ops, 1.0) + read("b", ops, 1.0) + read("c", ops, 1.2)
    assert predictor(rows).error_pct == pytest.approx(100 * (1 - 1 / 1.2), abs=1.0)  # c, from a and b
    bare = [row for row in rows if row.type == "network"] + [op_row(op, 1.0) for op in ops]
    assert predictor(bare).error_pct is None  # rows that do not say where they were read


def test_a_network_that_was_partly_delegated_calibrates_nothing() -> None:
    rows = [*alone_rows(), *HIDDEN.rows(12)]
    off = [Measurement("network", (99.0,), graph=row.graph, details={"partial": True}) for row in rows[-3:]]
    assert predictor(rows + off).calibration == predictor(rows).calibration


def test_the_error_of_one_networks_family_is_not_that_of_another() -> None:
    rows = HIDDEN.rows(24)
    named = [
        Measurement(row.type, row.samples_ms, graph=row.graph, details={"anchor": name, "anchor_ms": 1.0})
        for row, name in zip(rows, ["steady", "wild"] * 12, strict=True)
    ]
    wild = []
    for index, row in enumerate(named):
        off = 1.0 if row.details["anchor"] == "steady" else 1.3 if index % 4 == 1 else 0.8
        wild.append(Measurement(row.type, (row.median_ms * off,), graph=row.graph, details=row.details))
    found = predictor([*alone_rows(), *wild])
    steady, other = found.error_pct_of("steady"), found.error_pct_of("wild")
    assert steady is not None and other is not None and other > steady
    assert [found.stated_error_pct(name) for name in ("steady", "wild")] == [steady, other]
    assert found.error_pct_of("unknown") is None and found.stated_error_pct("unknown") == found.error_pct


def test_noise_is_read_from_repetitions() -> None:
    rng = np.random.default_rng(1)
    for noise in (0.007, 0.015):
        repeated = [list(ms * (1 + noise * rng.standard_normal(5))) for ms in rng.uniform(0.5, 5.0, 60)]
        assert _repeatability(repeated) == pytest.approx(noise, rel=0.2)
    assert _repeatability([[1.0, 1.5]] * 10) == USUAL_NOISE  # too few
    assert _repeatability([[1.0, 1.5]] * 100) == USUAL_NOISE  # no more than usual
    assert _repeatability([[1.0, 1.0]] * 100) == 0.005


def test_a_measured_point_is_as_sure_as_its_measurement() -> None:
    """Far from the points of a family that is not smooth, less sure than near them; at them, the noise remains."""
    widths = [*range(16, 65, 16), *range(192, 257, 16)]
    latency_ms = [0.01 * width * (1.3 if index % 2 else 0.7) for index, width in enumerate(widths)]
    cost = FamilyCost(np.array(widths, float)[:, None], np.array(latency_ms), noise=1e-3)
    at = cost.deviation_ms(np.array(widths, float)[:, None]) / (0.01 * np.array(widths))
    assert at.max() < 2e-3
    near, far = cost.deviation_ms(np.array([[200.0], [112.0]])) / np.array([2.0, 1.12])
    assert 10 * at.max() < near < 0.8 * far


def with_anchor(row: Measurement, anchor: str, ms: float) -> Measurement:
    return Measurement(row.type, (ms,), graph=row.graph, details={"anchor": anchor, "anchor_ms": 1.0})


def test_the_error_of_a_network_counts_what_calibrates_beside_it_and_nothing_else() -> None:
    rows = HIDDEN.rows(40)
    steady = [with_anchor(row, "steady", row.median_ms) for row in rows[:20]]
    # every second one 10% slower, every other 10% faster: no fit can follow
    wild = [with_anchor(row, "wild", row.median_ms * (1.1, 0.9)[index % 2]) for index, row in enumerate(rows[20:])]
    read = [with_anchor(row, "read", row.median_ms) for row in HIDDEN.rows(1, "network")]
    found = predictor([*alone_rows(), *steady, *wild, *read])
    errors = found.calibration.left_out_pct
    assert {name: len(each) for name, each in errors.items()} == {"steady": 20, "wild": 20}
    for name, each in errors.items():
        assert found.error_pct_of(name) == pytest.approx(np.quantile(each, 0.9))
    assert found.error_pct == pytest.approx(np.quantile([*errors["steady"], *errors["wild"]], 0.9))
    assert np.quantile(errors["wild"], 0.9) > 8
    assert found.error_pct_of("read") is None and found.error_pct_of("") is None


def test_partly_delegated_networks_alone_leave_the_error_unknown() -> None:
    def partly(row: Measurement) -> Measurement:
        return Measurement(row.type, row.samples_ms, graph=row.graph, details={"digest": "a", "partial": True})

    for kind in ("network", "calibration"):
        assert predictor([*alone_rows(), *map(partly, HIDDEN.rows(12, kind))]).calibration == Calibration()


def read_in(name: str, op: OpSpec, op_ms: float, whole_ms: float, **details: object) -> list[Measurement]:
    network = Measurement("network", (whole_ms,), graph=chain([op]), details={"digest": name, **details})
    return [op_row(op, op_ms, digest=name), network]


def test_each_of_few_networks_is_predicted_by_hand_from_the_operators_of_the_others() -> None:
    op = pointwise(8, 8)
    rows = read_in("a", op, 0.9, 2.0) + read_in("b", op, 1.0, 0.8)
    assert predictor(rows).error_pct == pytest.approx(50, abs=0.5)  # a is 2 ms, and b says 1; b is 0.8 ms, a says 0.9
    rows = read_in("a", op, 0.9, 1.0) + read_in("b", op, 1.0, 0.8)
    assert predictor(rows).error_pct == pytest.approx(12.5, abs=0.5)
    many = predictor(rows * 4)  # enough to calibrate, and still none that was left out
    assert many.calibration.scales and many.error_pct is not None
    partly = read_in("c", op, 0.9, 9.0, partial=True)  # what it took as a whole is no one's error
    assert predictor(rows + partly).error_pct == pytest.approx(100 * (0.9 / 0.8 - 1), abs=0.5)


def test_few_networks_that_say_nothing_of_each_other_have_no_known_error() -> None:
    rows = read_in("a", pointwise(8, 8), 1.0, 1.0) + read_in("b", pointwise(16, 16), 2.0, 2.0)
    assert predictor(rows).error_pct is None  # each lies outside of what the other measured
    assert predictor(read_in("a", pointwise(8, 8), 1.0, 1.0)).error_pct is None
    nameless = [Measurement("network", (1.0,), graph=chain([pointwise(8, 8)]))]
    assert predictor(read_in("a", pointwise(8, 8), 1.0, 1.0) * 2 + nameless).error_pct is None


@pytest.mark.parametrize("noise", [0.007, 0.01, 0.015])
@pytest.mark.parametrize("seed", range(3))
def test_repetitions_of_short_operators_do_not_hide_the_noise_of_long_ones(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    long = [list(ms * (1 + noise * rng.standard_normal(4))) for ms in rng.uniform(0.5, 5.0, 40)]
    short = [list(1e-4 * (1 + 0.2 * rng.standard_normal(4))) for _ in range(40)]
    assert _repeatability(long + short) == pytest.approx(noise, rel=0.3)


def test_noise_is_usual_where_repetitions_are_few() -> None:
    assert _repeatability([]) == _repeatability([[1.0]] * 200) == USUAL_NOISE
    assert _repeatability([[1.0, 1.01]] * (MIN_REPEATS - 1)) == USUAL_NOISE
    assert _repeatability([[1.0, 1.01]] * MIN_REPEATS) == pytest.approx(0.01 / 2**0.5 / 1.005)
