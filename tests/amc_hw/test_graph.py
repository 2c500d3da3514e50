"""Operators, channel groups and what is frozen, on networks small enough to write the answer down."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Net, frozen_of, mask_channels
from torch import nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.graph import Channels, LayerGraph, build_graph, width_grid
from amc_hw.models import ChannelMap, load_model
from amc_hw.prune import slice_channels
from profilers.ops import OpGraph, OpSpec


def graph_of(forward, *, shape=(3, 8, 8), keep=(), **parts: nn.Module) -> LayerGraph:
    return build_graph(Net(forward, **parts).eval(), shape, keep=keep)


def groups_of(graph: LayerGraph) -> dict[str, tuple[int, list[tuple[str, str]]]]:
    return {g.name: (g.width, [(member.module, member.role) for member in g.members]) for g in graph.groups}


def small() -> LayerGraph:
    """conv 3->8 + batch-norm + relu6 on 8x8, depthwise to 4x4, conv 8->16, pooled, linear 16->10."""
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 10),
    )
    return build_graph(net.eval(), (3, 8, 8))


# Operators


def test_operators_at_any_widths_by_hand() -> None:
    graph = small()
    assert graph.full_widths == (8, 16)
    network = graph.op_graph((3, 5))
    three, two, one = (3, 3), (2, 2), (1, 1)
    assert network.ops == (
        OpSpec("conv", (3,), 8, 8, 3, kernel=three, padding=one, activation="relu6"),
        OpSpec("depthwise_conv", (3,), 8, 8, 3, kernel=three, stride=two, padding=one, groups=3),
        OpSpec("conv", (3,), 4, 4, 5, activation="hardswish"),
        OpSpec("global_avg_pool", (5,), 4, 4, 5),
        OpSpec("linear", (5,), 1, 1, 10),
    )
    assert [node.inputs for node in network.nodes][0] == (OpGraph.INPUT,)
    assert all(node.inputs == (before.name,) for before, node in zip(network.nodes, network.nodes[1:], strict=False))
    assert network.outputs == ("7",) and network.input_shape == (3, 8, 8)
    assert graph.macs((3, 5)) == 27 * 3 * 64 + 9 * 3 * 16 + 3 * 5 * 16 + 5 * 10
    assert graph.macs() == 27 * 8 * 64 + 9 * 8 * 16 + 8 * 16 * 16 + 160


def test_layers_know_their_modules_batch_norms_and_groups() -> None:
    graph = small()
    rows = [(layer.name, layer.module, layer.batch_norm, layer.groups) for layer in graph.layers]
    assert rows == [
        ("0.0", "0.0", "0.1", (0,)),
        ("1", "1", None, (0,)),
        ("2", "2", None, (0, 1)),
        (rows[3][0], None, None, (1,)),
        ("7", "7", None, (1,)),
    ]
    assert graph.layer("2").op.out_channels == 16
    with pytest.raises(StopIteration):
        graph.layer("3")  # fused into 2


def test_batch_is_that_of_every_operator_and_not_of_the_macs() -> None:
    graph = small()
    network = graph.op_graph(batch=4)
    assert {op.batch for op in network.ops} == {4}
    assert network.macs == graph.macs() and {op.batch for op in graph.op_graph().ops} == {1}


def test_channels_add_up() -> None:
    a, b = Channels(3, ((0, 2),)), Channels(1, ((0, 1), (2, 4)))
    assert a.count((5, 7, 1)) == 13
    assert b.count((5, 7, 1)) == 10
    assert Channels().count(()) == 0


# Groups


def test_a_group_lists_producers_what_passes_through_and_consumers() -> None:
    assert groups_of(small()) == {
        "0.0": (8, [("0.0", "producer"), ("1", "through"), ("2", "consumer"), ("0.1", "through")]),
        "2": (16, [("2", "producer"), ("7", "consumer")]),
    }
    assert frozen_of(small()) == {"7": "network output"}


def test_a_sum_couples_its_producers() -> None:
    def forward(net, x):
        x = net.a(x)
        x = x + net.c(F.relu(net.b(x)))
        return net.d(x)

    parts = dict(a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 4, 1), c=nn.Conv2d(4, 6, 1), d=nn.Conv2d(6, 2, 1))
    graph = graph_of(forward, **parts)
    assert [(g.name, g.width, g.modules("producer"), g.modules("consumer")) for g in graph.groups] == [
        ("a", 6, ("a", "c"), ("b", "d")),
        ("b", 4, ("b",), ("c",)),
    ]
    assert [(node.op.kind, node.op.in_channels) for node in graph.op_graph((5, 3)).nodes if node.op.kind == "add"] == [
        ("add", (5, 5))
    ]
    assert graph.macs((5, 3)) == 64 * (3 * 5 + 5 * 3 + 3 * 5 + 5 * 2)


def test_a_channel_map_separates_the_groups_it_joins() -> None:
    def forward(net, x):
        x = net.a(x)
        return net.c(net.b(x) + net.shortcut(x))

    parts = dict(
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 8, 3, stride=2, padding=1),
        shortcut=ChannelMap((-1, -1, 0, 1, 2, 3, -1, -1), 2),
        c=nn.Conv2d(8, 2, 1),
    )
    graph = graph_of(forward, **parts)
    assert [(g.name, g.width, g.modules("producer"), g.modules("consumer")) for g in graph.groups] == [
        ("a", 4, ("a",), ("b", "shortcut")),
        ("b", 8, ("b", "shortcut"), ("c",)),
    ]
    (shortcut,) = (op for op in graph.op_graph((3, 5)).ops if op.kind == "channel_map")
    assert shortcut == OpSpec("channel_map", (3,), 8, 8, 5, stride=(2, 2))


def test_a_concatenation_is_read_at_both_places() -> None:
    def forward(net, x):
        x = net.stem(x)
        return net.c(torch.cat([net.a(x), F.relu(x), net.b(x), x], 1))

    parts = dict(stem=nn.Conv2d(3, 3, 1), a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(12, 2, 1))
    graph = graph_of(forward, **parts)
    positions = {
        g.name: next(member.channel_of.tolist() for member in g.members if member.module == "c") for g in graph.groups
    }
    no = -1
    assert positions == {
        "stem": [no, no, 0, 1, 2, no, no, no, no, 0, 1, 2],
        "a": [0, 1, no, no, no, no, no, no, no, no, no, no],
        "b": [no, no, no, no, no, 0, 1, 2, 3, no, no, no],
    }
    concat = next(node.op for node in graph.op_graph((1, 2, 3)).nodes if node.op.kind == "concat")
    assert (concat.in_channels, concat.out_channels) == ((2, 1, 3, 1), 7)
    assert [group.name for group in graph.groups] == ["stem", "a", "b"]  # network order


def test_a_flattened_channel_is_read_at_all_its_pixels() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), out=nn.Linear(24, 5))
    graph = graph_of(lambda net, x: net.out(torch.flatten(net.a(x), 1)), shape=(3, 2, 3), **parts)
    (group,) = graph.groups
    (reader,) = (member for member in group.members if member.role == "consumer")
    assert reader.channel_of.tolist() == np.repeat(range(4), 6).tolist()
    assert reader.kept_positions(np.array([1, 3])).tolist() == [*range(6, 12), *range(18, 24)]
    ops = {op.kind: op for op in graph.op_graph((3,)).ops}
    assert (ops["flatten"].out_channels, ops["linear"].in_channels) == (18, (18,))
    assert graph.macs((3,)) == 3 * 3 * 6 + 18 * 5


def test_a_concatenation_with_the_network_input_is_sliced_or_frozen() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(11, 2, 1))
    net = Net(lambda net, x: net.c(torch.cat([net.a(x), x, net.b(x)], 1)), **parts).eval()
    graph = build_graph(net, (3, 4, 4))
    kept = {group.name: np.array([1, 2]) for group in graph.groups}
    small, images = slice_channels(net, graph, kept), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(small(images), mask_channels(net, graph, kept)(images))


def test_a_group_joined_to_the_network_input_can_be_pruned() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), c=nn.Conv2d(7, 2, 1))
    graph = graph_of(lambda net, x: net.c(torch.cat([x, net.a(x)], 1)), **parts)
    (group,) = graph.groups
    (reader,) = (member for member in group.members if member.role == "consumer")
    assert reader.channel_of.tolist() == [-1, -1, -1, 0, 1, 2, 3]
    assert [op.in_channels for op in graph.op_graph((2,)).ops] == [(3,), (3, 2), (5,)]


# What is frozen, and why


def test_channels_that_reach_the_output_are_frozen() -> None:
    graph = graph_of(lambda net, x: F.relu(net.b(net.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1))
    assert frozen_of(graph) == {"b": "network output"} and [g.name for g in graph.groups] == ["a"]
    (frozen,) = graph.frozen
    assert (frozen.width, frozen.modules) == (5, ("b",))


def test_channels_coupled_to_the_input_are_frozen() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1), c=nn.Conv2d(3, 2, 1))
    graph = graph_of(lambda net, x: net.c(x + net.b(net.a(x))), **parts)
    assert [g.name for g in graph.groups] == ["a"]
    reasons = frozen_of(graph)
    assert reasons.pop("c") == "network output"
    assert reasons == {"b": "added to the network's input"}
    assert graph.macs((1,)) == 64 * (3 + 3 + 6)


def test_a_grouped_convolution_freezes_what_it_reads_and_what_it_makes() -> None:
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 12, 1, groups=4), c=nn.Conv2d(12, 5, 1), d=nn.Conv2d(5, 2, 1))
    graph = graph_of(lambda net, x: net.d(net.c(net.b(net.a(x)))), **parts)
    grouped = "grouped convolution b"
    assert frozen_of(graph) == {"a": grouped, "b": grouped, "d": "network output"}
    assert [g.name for g in graph.groups] == ["c"]
    assert graph.op_graph((3,)).nodes[1].op.groups == 4


def test_channels_that_nothing_reads_are_frozen() -> None:
    def forward(net, x):
        net.b(x)  # computed for nothing
        return net.c(x)

    graph = graph_of(forward, b=nn.Conv2d(3, 5, 1), c=nn.Conv2d(3, 2, 1))
    assert frozen_of(graph) == {"b": "nothing reads these channels through a weight", "c": "network output"}
    assert graph.full_widths == () and graph.macs(()) == 64 * 6  # the other is in no file


def test_groups_are_kept_by_request() -> None:
    net = load_model("resnet20").module
    graph = build_graph(net, (3, 32, 32), keep=("layer2.*.bn1", "bn1"))
    kept = {name for name, reason in frozen_of(graph).items() if reason == "kept by request"}
    assert kept == {"conv1", "layer2.0.conv1", "layer2.1.conv1", "layer2.2.conv1"}
    assert len(graph.groups) == 12 - 4
    # conv1's group holds the first stage: that stage's width is now a constant
    assert graph.layer("layer1.0.conv2").out == Channels(16)


def test_a_sum_over_positions_is_refused_not_guessed_at() -> None:
    def forward(net, x):
        x = net.a(x)
        return net.c(x + torch.sigmoid(net.b(x)))

    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 1, 1), c=nn.Conv2d(4, 2, 1))
    with pytest.raises(UnsupportedOperatorError, match=r"operator add \(add at test_graph.py:\d+\) is not supported"):
        graph_of(forward, **parts)


def test_patterns_to_keep_that_fit_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="--keep 'heads.*' fits no module with weights; some are "):
        build_graph(load_model("resnet20").module, (3, 32, 32), keep=("heads.*",))


def test_the_name_of_a_container_keeps_all_that_is_in_it() -> None:
    graph = build_graph(load_model("resnet20").module, (3, 32, 32), keep=("layer2",))
    kept = [frozen.name for frozen in graph.frozen if frozen.reason == "kept by request"]
    assert kept and all(any(m.startswith("layer2.") for m in f.modules) for f in graph.frozen if f.name in kept)
    assert not any("layer2." in member.module for group in graph.groups for member in group.members)
    assert graph.groups


@pytest.mark.parametrize("reshape", [lambda x: x.view(-1, 64), lambda x: torch.reshape(x, (x.shape[0], 64))])
def test_channels_that_the_code_counts_on_stay(reshape) -> None:
    """A reshape to a number that is written down: a narrower network would not fit it."""
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 16, 1), pool=nn.AdaptiveAvgPool2d(2), d=nn.Linear(64, 4))
    graph = graph_of(lambda net, x: net.d(reshape(net.pool(net.b(net.a(x))))), **parts)
    assert [group.name for group in graph.groups] == ["a"]
    assert "reshaped to 64 channels" in frozen_of(graph)["b"] and "torch.flatten(x, 1)" in frozen_of(graph)["b"]
    graph = graph_of(lambda net, x: net.d(net.pool(net.b(net.a(x))).view(x.size(0), -1)), **parts)
    assert [group.name for group in graph.groups] == ["a", "b"]
    with pytest.raises(UnsupportedOperatorError, match="to a batch of 1: write torch.flatten"):
        graph_of(lambda net, x: net.d(net.pool(net.b(net.a(x))).view(1, -1)), **parts)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.c(torch.add(net.a(x), net.b(x), alpha=2)),
        lambda net, x: net.c(net.a(x)[:, ::2]),
        lambda net, x: net.c(torch.cat(net.a(x).permute(dims=(0, 2, 3, 1)).chunk(2, 1), 1).permute(0, 3, 1, 2)),
    ],
)
def test_arguments_that_nobody_thought_of_are_one_line(forward) -> None:
    with pytest.raises(UnsupportedOperatorError, match="is not supported"):
        graph_of(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.LazyConv2d(2, 1))


def test_a_permutation_by_name() -> None:
    graph = graph_of(
        lambda net, x: net.b(net.a(x).permute(dims=(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 2, 1),
    )
    assert [group.name for group in graph.groups] == ["a"]


# Names and widths


def test_mobilenet_has_the_14_groups_of_the_contract() -> None:
    graph = build_graph(load_model("mobilenet_v1?width=0.25").module, (3, 32, 32))
    assert [group.name for group in graph.groups] == ["features.0.0"] + [f"features.{i}.3" for i in range(1, 14)]
    assert graph.parse_widths("features.0=4, features.13.3=100") == (4, *graph.full_widths[1:-1], 100)
    assert graph.parse_widths("8,16,32,32,64,64,128,128,128,128,128,128,256,255")[-1] == 255


def test_group_names_that_are_not_unique_or_not_there_are_refused() -> None:
    graph = build_graph(load_model("plain20").module, (3, 32, 32))
    for name in ("layer1", "layer1.0", "layer9", "layer1.0.conv"):
        with pytest.raises(UserError, match=f"no group '{name}' in --widths; groups: conv1, layer1.0.conv1"):
            graph.parse_widths(f"{name}=4")
    with pytest.raises(UserError, match="'linear' in --widths stays at its 10 channels: network output"):
        graph.parse_widths("linear=4")
    assert graph.parse_widths("layer1.0.conv1=4") == (16, 4, *graph.full_widths[2:])


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 4, 1))
    with pytest.raises(UserError, match="1: a batch-norm without running statistics"):
        build_graph(net.eval(), (3, 8, 8))


BAD_WIDTHS = [
    "",
    "8",
    "0.0",
    "1.5",
    "-.5",
    "nan.",
    "8,16,1",
    "0,16",
    "9,16",
    "8,x",
    "8,16.5",
    "0.0=8,16",
    "0.0=x",
    "nine=8",
    "2=8,2=16",
]


@pytest.mark.parametrize("text", BAD_WIDTHS)
def test_bad_widths_are_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        small().parse_widths(text)
    assert str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_share_is_of_every_group() -> None:
    graph = small()
    assert graph.full_widths == (8, 16)
    assert graph.parse_widths("0.5") == (4, 8) and graph.parse_widths("1.0") == (8, 16)
    assert graph.parse_widths("0.01") == (1, 2)  # an eighth, the finest that there is


@given(st.tuples(st.integers(1, 8), st.integers(1, 16)))
def test_widths_written_down_are_read_back(widths: tuple[int, int]) -> None:
    graph = SMALL
    assert graph.parse_widths(",".join(map(str, widths))) == widths
    assert graph.parse_widths(f"2={widths[1]},0.0={widths[0]}") == widths
    assert graph.checked(np.array(widths)) == widths
    network = graph.op_graph(widths)
    assert OpGraph.from_json(network.to_json()) == network


SMALL = small()


def test_width_grids_by_hand() -> None:
    assert width_grid(64) == (16, 24, 32, 40, 48, 56, 64)  # 8 is below 0.2 * 64
    assert width_grid(64, floor=0.125) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert width_grid(16) == (4, 6, 8, 10, 12, 14, 16)  # 16 // 8 = 2
    assert width_grid(100, multiple=32) == (24, 36, 48, 60, 72, 84, 96, 100)  # 100 // 8 = 12
    assert width_grid(5) == (1, 2, 3, 4, 5) and width_grid(1) == (1,)
    assert width_grid(64, floor=1.0) == (64,)


@given(full=st.integers(1, 2000), multiple=st.integers(1, 64), floor=st.floats(0.01, 1))
def test_width_grids_hold_what_they_promise(full: int, multiple: int, floor: float) -> None:
    grid = width_grid(full, multiple=multiple, floor=floor)
    step = max(1, min(multiple, full // 8))
    assert grid[-1] == full and list(grid) == sorted(set(grid))
    assert all(width % step == 0 and width >= floor * full * (1 - 1e-6) for width in grid[:-1])
    assert len(grid) <= full // step + 1
    # nothing that may be offered is missing
    assert sum(width >= floor * full + 1e-6 for width in range(step, full, step)) <= len(grid) - 1


# Input that cannot be read


def test_networks_that_cannot_be_traced_are_one_line() -> None:
    conv = nn.Conv2d(3, 4, 1)
    cases = {
        "does not branch on their values": (lambda net, x: net.a(x) if x.sum() > 0 else x, dict(a=conv)),
        "layer-norm over the channels": (lambda net, x: net.n(net.a(x)), dict(a=conv, n=nn.LayerNorm(8))),
        r"operator erf \(erf at test_graph.py:\d+\) is not supported": (
            lambda net, x: torch.erf(net.a(x)),
            dict(a=conv),
        ),
        "not bicubic": (lambda net, x: F.interpolate(net.a(x), size=(9, 9), mode="bicubic"), dict(a=conv)),
        "gives no whole size": (lambda net, x: F.interpolate(net.a(x), scale_factor=1.3), dict(a=conv)),
        "only tensors, also in tuples or dicts": (lambda net, x: (net.a(x), 7), dict(a=conv)),
        "an input of its own": (lambda net, x: (net.a(x), x), dict(a=conv)),
        "zero padding": (lambda net, x: net.a(x), dict(a=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))),
        "fails on an input of shape": (lambda net, x: net.a(x), dict(a=nn.Conv2d(5, 4, 1))),
    }
    for words, (forward, parts) in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            graph_of(forward, **parts)
        assert "\n" not in str(caught.value)


def test_all_that_is_not_supported_is_told_at_once_with_its_place() -> None:
    inner = Net(lambda net, x: torch.erf(net.c(x)), c=nn.Conv2d(4, 4, 1))
    parts = dict(a=nn.Conv2d(3, 4, 1), inner=inner, b=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 2, 1))
    with pytest.raises(UnsupportedOperatorError) as caught:
        graph_of(lambda net, x: net.d(torch.sinh(net.b(net.inner(net.a(x))))), **parts)
    first, second = str(caught.value).split("; ")
    assert first.startswith("operator erf (erf in inner) is not supported")
    assert re.match(r"operator sinh \(sinh at test_graph.py:\d+\) is not supported", second)


def test_building_a_graph_leaves_the_module_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()
    net[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_graph(net, (3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.parameters()] == [False] + [True] * 5
    assert not net.training and all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())


def test_building_a_graph_of_a_module_in_training_mode_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()
    build_graph(net, (3, 4, 4))
    assert net.training
    assert not net[1].running_mean.any() and torch.equal(net[1].running_var, torch.ones(4))
