"""Operators beside the convolutions: each pruned network is the masked one, and its files are it, too."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Call, Net, frozen_of, half_and_exported, kinds
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.evaluate import fold_batch_norms
from amc_hw.export import export_network
from amc_hw.graph import build_graph, width_grid
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.refit import reestimate_batch_norm
from amc_hw.resources import macs_model, params_model

# Numbers


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        (lambda x: x * 0.5, []),
        (lambda x: 2 * x, []),
        (lambda x: x / 4, []),
        (lambda x: torch.div(x, 4), []),
        (lambda x: -x, []),
        (lambda x: x + 1, ["add_scalar"]),
        (lambda x: x.add(other=1), ["add_scalar"]),
        (lambda x: x - 0.25, ["add_scalar"]),
        (lambda x: 1 - x, ["add_scalar"]),
        (lambda x: F.relu(x) * 0.5, ["mul_scalar"]),
        (lambda x: 1 - F.relu(x), ["mul_scalar", "add_scalar"]),
        (lambda x: x * torch.tensor(2.0), []),
        (lambda x: torch.add(input=x, other=1), ["add_scalar"]),
        (lambda x: 0 + x * 1, []),
        (lambda x: x * F.relu6(x + 3) / 6, ["add_scalar", "mul", "mul_scalar"]),
        (lambda x: x.mul_(2).sub_(1), ["add_scalar"]),
    ],
)
def test_numbers_take_part_in_arithmetic(tmp_path: Path, between, wanted: list[str]) -> None:
    net = Net(lambda net, x: net.b(between(net.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    graph = half_and_exported(net, torch.randn(8, 3, 9, 9), tmp_path)
    assert kinds(graph) == ["conv", *wanted, "conv"]
    assert [group.name for group in graph.groups] == ["a"]
    assert graph.params() == 8 * 28 + 4 * 9


def test_an_activation_after_a_sum_with_a_number_is_fused() -> None:
    net = Net(lambda net, x: net.b(F.relu6(net.a(x) + 3)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    _, shifted, _ = build_graph(net.eval(), (3, 9, 9)).op_graph().ops
    assert (shifted.kind, shifted.activation) == ("add_scalar", "relu6")


@pytest.mark.parametrize(
    "between",
    [
        lambda x: 1 / x,
        lambda x: x**3,
        lambda x: x / x,
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        lambda x: x / 0,
    ],
)
def test_other_arithmetic_is_refused(between) -> None:
    net = Net(lambda net, x: net.b(between(net.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    with pytest.raises(UnsupportedOperatorError, match=r"operator (truediv|pow|div) \(.*\) is not supported"):
        build_graph(net.eval(), (3, 9, 9))


def test_a_difference_from_the_input_is_an_operator(tmp_path: Path) -> None:
    """A denoiser that predicts the noise (DnCNN)."""
    net = Net(lambda net, x: x - net.b(F.relu(net.a(x))), a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 3, 1))
    graph = half_and_exported(net, torch.randn(4, 3, 7, 7), tmp_path)
    assert kinds(graph) == ["conv", "conv", "sub"]


class Gain(nn.Module):
    """A learned factor and a learned offset of the whole tensor, as in PP-HGNet."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


def test_a_learned_number_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 1), gain=Gain(), b=nn.Conv2d(8, 4, 1))
    net = Net(lambda net, x: net.b(net.gain(F.relu(net.gain(net.a(x))))), **parts)
    image = torch.randn(8, 3, 5, 5)
    graph = half_and_exported(net, image, tmp_path)
    assert [layer.name for layer in graph.layers] == ["a", "gain.bias", "gain.scale", "add_1", "b"]
    assert [group.name for group in graph.groups] == ["a"] and graph.params() == 8 * 4 + 4 * 9
    with torch.no_grad():
        net.gain.scale.fill_(3.0)
        net.gain.bias.fill_(-2.0)
    export_network(net, graph, graph.op_graph(), image, file_format="onnx", out=tmp_path / "trained")


LARGEST = {
    "amax": lambda x: x.amax((2, 3)),
    "dim": lambda x: torch.amax(x, dim=(-1, -2)),
    "keepdim": lambda x: x.amax((2, 3), keepdim=True).flatten(1),
    "function": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "module": nn.Sequential(nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten()),
    "parts": lambda x: F.adaptive_max_pool2d(x, (2, 1)).flatten(1),
}


@pytest.mark.parametrize("largest", LARGEST)
def test_the_largest_of_all_positions_is_a_pooling(tmp_path: Path, largest: str) -> None:
    ends = 2 if largest == "parts" else 1
    net = Net(
        lambda net, x: net.b(net.largest(F.relu(net.a(x)))),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Linear(8 * ends, 4),
        largest=Call(LARGEST[largest]),
    )
    graph = half_and_exported(net, torch.randn(4, 3, 8, 7), tmp_path)
    assert kinds(graph) == ["conv", "max_pool", "flatten", "linear"]
    assert [group.name for group in graph.groups] == ["a"]


def test_a_gate_of_means_and_largest_values_is_pruned(tmp_path: Path) -> None:
    """The channel attention of CBAM (Woo et al., ECCV 2018)."""

    def forward(net, x):
        x = F.relu(net.a(x))
        gate = torch.sigmoid(
            net.up(F.relu(net.down(x.mean((2, 3), True)))) + net.up(F.relu(net.down(x.amax((2, 3), True))))
        )
        return net.b(x * gate)

    parts = dict(a=nn.Conv2d(3, 16, 3), down=nn.Conv2d(16, 4, 1, bias=False), up=nn.Conv2d(4, 16, 1, bias=False))
    net = Net(forward, **parts, b=nn.Conv2d(16, 4, 1))
    graph = half_and_exported(net, torch.randn(4, 3, 9, 9), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "down"]


@pytest.mark.parametrize(
    "reduced", [lambda x: x.amax(1, keepdim=True), lambda x: x.amax(2), lambda x: x.amax(), lambda x: x.amax((1, 2, 3))]
)
def test_the_largest_of_anything_else_is_refused(reduced) -> None:
    net = Net(lambda net, x: net.b(reduced(net.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    with pytest.raises((UnsupportedOperatorError, UserError), match=r"amax \(|fails on an input"):
        build_graph(net.eval(), (3, 9, 9))


@pytest.mark.parametrize("shaped", ["view", "reshape", "unsqueeze"])
def test_a_gain_per_channel_may_be_given_its_shape_on_the_way(tmp_path: Path, shaped: str) -> None:
    def forward(net, x):
        column = net.gain.unsqueeze(-1).unsqueeze(-1)
        return net.b(net.a(x) * (column if shaped == "unsqueeze" else getattr(net.gain, shaped)(1, -1, 1, 1)))

    net = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 6, 1), c=nn.Conv2d(6, 2, 1))
    net.gain = nn.Parameter(torch.rand(4) + 0.5)
    graph = half_and_exported(net, torch.randn(4, 3, 5, 5), tmp_path)
    assert [group.name for group in graph.groups] == ["a"] and kinds(graph)[1] == "affine"
    assert slice_channels(net, graph, keep_channels(net, graph, [3])).gain.shape == (3,)


def test_gains_that_cannot_be_cut_keep_their_channels(tmp_path: Path) -> None:
    def forward(net, x):
        x = net.b(net.a(x) * net.gain.view(1, 4, 1, 1))
        return net.d(net.c(x * net.other) * net.part.other)

    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 6, 1), c=nn.Conv2d(6, 6, 1), d=nn.Conv2d(6, 2, 1))
    net = Net(forward, **parts, part=nn.Identity())
    net.gain, net.other = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(1, 6, 1, 1))
    net.part.other = net.other
    graph = half_and_exported(net, torch.randn(4, 3, 5, 5), tmp_path)
    assert frozen_of(graph)["a"] == "gain is reshaped to 4 channels"
    assert frozen_of(graph)["b"] == "other is shared with another layer" and graph.groups == ()


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("groups", [3, 12])
def test_convolutions_in_groups_may_widen(tmp_path: Path, times: int, groups: int) -> None:
    """Depthwise with a multiplier, too, as in FastViT."""
    parts = dict(a=nn.Conv2d(3, 12, 1), g=nn.Conv2d(12, 12 * times, 3, groups=groups), bn=nn.BatchNorm2d(12 * times))
    net = Net(lambda net, x: net.b(F.relu(net.bn(net.g(net.a(x))))), **parts, b=nn.Conv2d(12 * times, 2, 1))
    graph = half_and_exported(net, torch.randn(8, 3, 7, 7), tmp_path)
    block = 12 // groups
    assert [(group.name, group.width, group.block) for group in graph.groups] == [("a", 12, block)]
    (_, op, _) = graph.op_graph([2 * block]).ops
    assert (op.kind, op.groups, op.in_channels, op.out_channels) == ("grouped_conv", 2, (2 * block,), 2 * block * times)
    grid = width_grid(12, block=block)
    model = macs_model(graph, [grid])
    assert all(model.cost((width,)) == graph.macs((width,)) for width in grid)
    assert params_model(graph, [grid]).cost(grid[:1]) == graph.params(grid[:1])
    assert op.family().with_axes((block,)) == op.family()


# Norms


def test_a_batch_norm_of_vectors_is_folded_or_an_operator(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm1d(8), b=nn.Linear(8, 12, bias=False), m=nn.BatchNorm1d(12))
    net = Net(lambda net, x: net.c(F.relu(net.m(net.b(net.n(net.a(x).mean((2, 3))))))), **parts, c=nn.Linear(12, 4))
    images = torch.randn(64, 3, 6, 6)
    graph = half_and_exported(net, images, tmp_path)
    assert kinds(graph) == ["conv", "global_avg_pool", "affine", "linear", "linear"]
    assert [(layer.module, layer.batch_norm) for layer in graph.layers if layer.batch_norm] == [("b", "m")]
    assert [group.name for group in graph.groups] == ["a", "b"]
    wanted = net(images)
    fold_batch_norms(net, graph)  # of convolutions alone
    torch.testing.assert_close(net(images), wanted)
    reestimate_batch_norm(net, images)
    assert net.m.running_mean is not None
    torch.testing.assert_close(
        net.m.running_mean, net.b(net.n(net.a(images).mean((2, 3)))).mean(0), rtol=1e-3, atol=1e-4
    )


def test_an_instance_norm_goes_with_its_channels_and_a_group_norm_keeps_them(tmp_path: Path) -> None:
    norms = dict(i=nn.InstanceNorm2d(8), j=nn.InstanceNorm2d(8, affine=True), g=nn.GroupNorm(4, 8))
    parts = dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 8, 1), d=nn.Conv2d(8, 2, 1))
    net = Net(lambda net, x: net.d(net.g(net.c(net.j(net.b(F.relu(net.i(net.a(x)))))))), **norms, **parts)
    with torch.no_grad():
        for norm in (net.j, net.g):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    graph = half_and_exported(net, torch.randn(8, 3, 9, 9), tmp_path)
    assert kinds(graph) == [
        "conv",
        "instance_norm",
        "activation",
        "conv",
        "instance_norm",
        "conv",
        "group_norm",
        "conv",
    ]
    assert [group.name for group in graph.groups] == ["a", "b"]
    assert frozen_of(graph)["c"] == "normalised together at g"
    tracked = nn.Sequential(parts["a"], nn.InstanceNorm2d(8, track_running_stats=True), parts["b"])
    with pytest.raises(UnsupportedOperatorError, match="1: an instance-norm with running statistics"):
        build_graph(tracked.eval(), (3, 9, 9))


def test_a_log_softmax_may_end_a_network(tmp_path: Path) -> None:
    def forward(net, x):
        return F.log_softmax(net.c(net.b(F.relu(net.a(x))).flatten(1)), dim=1)

    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1), c=nn.Linear(4 * 25, 10))
    assert kinds(half_and_exported(net, torch.randn(16, 3, 7, 7), tmp_path))[-1] == "log_softmax"
    across = Net(lambda net, x: F.log_softmax(net.a(x), 2), a=nn.Conv2d(3, 8, 3))
    with pytest.raises(UnsupportedOperatorError, match="only a log_softmax over the channels is supported"):
        build_graph(across.eval(), (3, 7, 7))


class Normed(nn.BatchNorm2d):
    """With its activation inside, as timm has it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Grouped(nn.GroupNorm):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(2, channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class OwnGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Logarithmic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)


@pytest.mark.parametrize("norm", [Normed, Grouped])
@pytest.mark.parametrize("act", [nn.LeakyReLU(0.2), OwnGelu(), nn.SiLU(), nn.Identity()])
def test_the_activation_inside_of_a_norm_is_computed(tmp_path: Path, norm: type[nn.Module], act: nn.Module) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 3, bias=False), n=norm(8, act), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1))
    net = Net(lambda net, x: net.c(F.relu(net.b(net.n(net.a(x))))), **parts)
    half_and_exported(net, torch.randn(8, 3, 7, 7), tmp_path)


@pytest.mark.parametrize("norm", [Normed, Grouped])
def test_an_unknown_activation_inside_of_a_norm_is_refused(norm: type[nn.Module]) -> None:
    net = Net(
        lambda net, x: net.b(net.n(net.a(x))), a=nn.Conv2d(3, 8, 3), n=norm(8, Logarithmic()), b=nn.Conv2d(8, 2, 1)
    )
    with pytest.raises(UnsupportedOperatorError, match="operator Logarithmic in n is not supported"):
        build_graph(net.eval(), (3, 7, 7))


# Groups


def in_groups(groups: int, more: int = 8) -> nn.Module:
    """A stem of 8 channels, a convolution in groups, a squeeze-and-excite gate, and a sum around all of it."""

    def forward(net, x):
        x = F.relu(net.stem(x))
        y = F.relu(net.bn(net.grouped(F.relu(net.widen(x)))))
        y = y * torch.sigmoid(net.gate(y.mean((2, 3), keepdim=True)))
        return net.head(x + net.narrow(y))

    parts = dict(stem=nn.Conv2d(3, 8, 1), widen=nn.Conv2d(8, 24, 1), bn=nn.BatchNorm2d(24), gate=nn.Conv2d(24, 24, 1))
    grouped = nn.Conv2d(24, 24, 3, padding=1, groups=groups, bias=False)
    return Net(forward, **parts, grouped=grouped, narrow=nn.Conv2d(24, 8, 1), head=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(("groups", "block"), [(3, 8), (6, 4), (12, 2)])
def test_convolutions_in_groups_lose_whole_groups(tmp_path: Path, groups: int, block: int) -> None:
    net = in_groups(groups)
    graph = half_and_exported(net, torch.randn(8, 3, 7, 7), tmp_path)
    assert [(group.name, group.block) for group in graph.groups] == [("stem", 1), ("widen", block)]
    small = slice_channels(net, graph, keep_channels(net, graph, [8, block]))
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (1, block, block)
    assert small.grouped.weight.shape == (block, block, 3, 3) and small.bn.num_features == block
    (op,) = (op for op in graph.op_graph([8, 2 * block]).ops if op.kind == "grouped_conv")
    assert (op.groups, op.out_channels, op.step) == (2, 2 * block, block)
    assert op.macs == 2 * block * block * 9 * 49 and op.family() == graph.op_graph([8, block]).ops[2].family()
    grids = [width_grid(group.width, block=group.block) for group in graph.groups]
    model = macs_model(graph, grids)
    assert all(model.cost(widths) == graph.macs(widths) for widths in itertools.product(*grids))
    with pytest.raises(UserError, match=f"width 9 for group widen: it must be a multiple of {block}, the channels of"):
        graph.checked([8, 9])
    with pytest.raises(ValueError, match=f"group widen keeps whole blocks of {block} channels"):
        slice_channels(net, graph, {"widen": np.arange(1, block + 1)})


def test_a_convolution_of_which_one_group_is_left_goes_on_as_one() -> None:
    """Both of its sides stay alike, as `search --from-policy` needs it."""
    net = in_groups(3)
    graph = build_graph(net.eval(), (3, 7, 7))
    small = slice_channels(net, graph, keep_channels(net, graph, [6, 8]))
    assert [(group.name, group.width, group.block) for group in build_graph(small, (3, 7, 7)).groups] == [
        ("stem", 6, 1),
        ("widen", 8, 8),
    ]
    assert kinds(build_graph(small, (3, 7, 7))) == kinds(graph)


def test_the_groups_that_stay_are_those_of_largest_magnitude() -> None:
    net = in_groups(6)
    with torch.no_grad():
        for reader in (net.narrow, net.gate):
            reader.weight.fill_(0.1)
            reader.weight[:, 9] = 1.0  # of the third group
            reader.weight[:, 20:24] = 0.2
    kept = keep_channels(net, build_graph(net.eval(), (3, 7, 7)), [8, 8])
    assert kept["widen"].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]


def test_groups_that_lie_across_a_concatenation_are_frozen(tmp_path: Path) -> None:
    def forward(net, x):
        return net.c(net.grouped(torch.cat([net.a(x), net.b(x)], 1)))

    def parts(first: int) -> dict[str, nn.Module]:
        convolutions = dict(a=nn.Conv2d(3, first, 1), b=nn.Conv2d(3, 12 - first, 1), c=nn.Conv2d(12, 2, 1))
        return convolutions | {"grouped": nn.Conv2d(12, 12, 3, groups=3)}

    graph = half_and_exported(Net(forward, **parts(8)), torch.randn(8, 3, 7, 7), tmp_path)
    assert [(group.name, group.width, group.block) for group in graph.groups] == [("a", 8, 4), ("b", 4, 4)]
    graph = build_graph(Net(forward, **parts(6)).eval(), (3, 7, 7))
    assert frozen_of(graph) == dict.fromkeys("ab", "grouped convolution grouped") | {"c": "network output"}


def test_two_sizes_of_groups_go_together_in_their_common_multiple(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 24, 1), b=nn.Conv2d(24, 24, 3, groups=6), c=nn.Conv2d(24, 24, 3, groups=4))
    net = Net(lambda net, x: net.d(net.c(net.b(net.a(x)))), **parts, d=nn.Conv2d(24, 2, 1))
    (group,) = half_and_exported(net, torch.randn(8, 3, 9, 9), tmp_path).groups
    assert (group.width, group.block) == (24, 12)


def test_a_slice_of_all_channels_is_none(tmp_path: Path) -> None:
    """A ghost module, Han et al., CVPR 2020: as many channels of the concatenation as are wanted."""

    def forward(net, x):
        x = net.a(x)
        return net.c(torch.cat([x, net.cheap(x)], 1)[:, :16])

    parts = dict(a=nn.Conv2d(3, 8, 1), cheap=nn.Conv2d(8, 8, 3, padding=1, groups=8), c=nn.Conv2d(16, 2, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(4, 3, 5, 5), tmp_path)
    assert [group.name for group in graph.groups] == ["a"] and "slice" not in kinds(graph)


def test_channels_that_others_have_several_times_over_go_with_them(tmp_path: Path) -> None:
    """Ghost modules in a residual network: what is added to [x, cheap(x)] keeps its channels in pairs."""

    def forward(net, x):
        x = F.relu(net.stem(x))
        y = net.ghost(x)
        x = x + torch.cat([y, net.cheap(y)], 1)
        return net.head(net.after(x) * torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True))))

    parts = dict(stem=nn.Conv2d(3, 16, 1), ghost=nn.Conv2d(16, 8, 1), cheap=nn.Conv2d(8, 8, 3, padding=1, groups=8))
    more = dict(after=nn.Conv2d(16, 12, 1), gate=nn.Conv2d(16, 12, 1), head=nn.Conv2d(12, 2, 1))
    net = Net(forward, **parts, **more)
    graph = half_and_exported(net, torch.randn(8, 3, 7, 7), tmp_path)
    assert [(group.name, group.width) for group in graph.groups] == [("ghost", 8), ("after", 12)]
    producers = {
        member.module: member.channel_of.tolist() for member in graph.groups[0].members if member.role == "producer"
    }
    assert producers == {"stem": [*range(8), *range(8)], "ghost": list(range(8))}
    small = slice_channels(net, graph, {"ghost": np.array([1, 6])})
    assert (small.stem.out_channels, small.ghost.in_channels, small.ghost.out_channels) == (4, 4, 2)
    torch.testing.assert_close(small.stem.weight, net.stem.weight[[1, 6, 9, 14]])
    grids = [width_grid(group.width) for group in graph.groups]
    macs, params = macs_model(graph, grids), params_model(graph, grids)
    for widths in itertools.product(*grids):
        assert (macs.cost(widths), params.cost(widths)) == (graph.macs(widths), graph.params(widths))


@pytest.mark.parametrize("listed", [False, True])
def test_equal_chunks_keep_the_same_channels(tmp_path: Path, listed: bool) -> None:
    """As in YOLOv8's C2f: two halves, of which one goes on, and all of them together at last."""

    def forward(net, x):
        first, second = list(net.a(x).chunk(2, 1)) if listed else net.a(x).chunk(2, dim=1)
        third = second + F.relu(net.b(second))
        return net.c(torch.cat([first, second, third], 1))

    parts = dict(a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(8, 8, 3, padding=1), c=nn.Conv2d(24, 2, 1))
    net = Net(forward, **parts)
    graph = half_and_exported(net, torch.randn(8, 3, 5, 5), tmp_path)
    (group,) = graph.groups
    assert (group.name, group.width, group.modules("producer")) == ("b", 8, ("a", "b"))
    assert [op.axes for op in graph.op_graph([3]).ops if op.kind == "chunk"] == [(6,), (6,)]
    assert graph.macs([3]) == 25 * (3 * 6 + 3 * 3 * 9 + 9 * 2)


def test_the_gate_of_two_halves_is_one_group(tmp_path: Path) -> None:
    """NAFNet, Chen et al., ECCV 2022: nothing but the product of both halves is read."""

    def forward(net, x):
        first, second = net.depthwise(net.a(x)).chunk(2, dim=1)
        return net.b(first * second)

    parts = dict(a=nn.Conv2d(3, 12, 1), depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12), b=nn.Conv2d(6, 3, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(8, 3, 5, 5), tmp_path)
    (group,) = graph.groups
    assert (group.name, group.width, group.each) == ("a", 6, 2)
    assert [op.out_channels for op in graph.op_graph([2]).ops] == [4, 4, 2, 2, 2, 3]


def test_parts_that_are_not_equal_are_frozen(tmp_path: Path) -> None:
    def forward(net, x):
        first, second, third = net.a(x).chunk(3, dim=1)  # of 4, 4 and 2
        return net.b(torch.cat([first * second, third], 1))

    graph = half_and_exported(
        Net(forward, a=nn.Conv2d(3, 10, 1), b=nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 4, 4), tmp_path
    )
    assert frozen_of(graph)["a"].startswith("split or shuffled at ")


# Pixels


@pytest.mark.parametrize(("kernel", "cut", "more"), [(3, 1, 1), (4, 1, 0), (5, 2, 1), (3, 0, 0)])
@pytest.mark.parametrize("side", [5, 6])
def test_transposed_convolutions_are_cut_and_refitted(
    tmp_path: Path, kernel: int, cut: int, more: int, side: int
) -> None:
    up = nn.ConvTranspose2d(8, 6, kernel, stride=2, padding=cut, output_padding=more)
    net = Net(lambda net, x: net.b(F.relu(net.up(F.relu(net.a(x))))), a=nn.Conv2d(3, 8, 1), up=up, b=nn.Conv2d(6, 2, 1))
    graph = half_and_exported(net, torch.randn(8, 3, side, side), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "up"]
    assert graph.op_graph().ops[1].out_height == (side - 1) * 2 - 2 * cut + kernel + more


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 2}, "up: a transposed convolution with groups is not supported"),
        ({"output_padding": 1}, "up: a transposed convolution with more output padding than padding"),
    ],
)
def test_transposed_convolutions_that_are_refused(options: dict[str, int], words: str) -> None:
    up = nn.ConvTranspose2d(8, 6, 3, stride=2, **options)
    net = Net(lambda net, x: net.up(net.a(x)), a=nn.Conv2d(3, 8, 1), up=up)
    with pytest.raises(UnsupportedOperatorError, match=words):
        build_graph(net.eval(), (3, 5, 5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("by_module", [True, False])
def test_super_resolution_by_pixel_shuffle(tmp_path: Path, channels: int, by_module: bool) -> None:
    """ESPCN, Shi et al., CVPR 2016."""

    def forward(net, x):
        x = net.c(F.tanh(net.b(F.tanh(net.a(x)))))
        return net.shuffle(x) if by_module else F.pixel_shuffle(x, 3)

    parts = dict(a=nn.Conv2d(channels, 8, 5, padding=2), b=nn.Conv2d(8, 6, 3, padding=1))
    net = Net(forward, **parts, c=nn.Conv2d(6, channels * 9, 3, padding=1), shuffle=nn.PixelShuffle(3))
    graph = half_and_exported(net, torch.randn(4, channels, 6, 7), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b"] and kinds(graph)[-1] == "pixel_shuffle"
    assert graph.op_graph().nodes[-1].op.out_width == 21


def test_what_is_shuffled_to_pixels_stays_as_wide(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 16, 3, padding=1), b=nn.Conv2d(4, 8, 3, padding=1), c=nn.Conv2d(8, 2, 1))
    net = Net(lambda net, x: net.c(net.b(F.relu(F.pixel_shuffle(net.a(x), 2)))), **parts)
    graph = half_and_exported(net, torch.randn(4, 3, 6, 7), tmp_path)
    assert frozen_of(graph)["a"] == "split or shuffled at pixel_shuffle"
    assert [group.name for group in graph.groups] == ["b"]


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1)])
def test_average_poolings_may_leave_their_padding_out(tmp_path: Path, kernel: int, stride: int, padding: int) -> None:
    def forward(net, x):
        return net.b(F.avg_pool2d(net.pool(net.a(x)), 3, 1, 1, count_include_pad=False))

    pool = nn.AvgPool2d(kernel, stride, padding, count_include_pad=False)
    net = Net(forward, a=nn.Conv2d(3, 8, 1), pool=pool, b=nn.Conv2d(8, 2, 1))
    graph = half_and_exported(net, torch.randn(4, 3, 8, 8), tmp_path)
    assert [op.exclude_pad for op in graph.op_graph().ops] == [False, True, True, False]


def test_zeros_that_no_convolution_takes_over_are_an_operator(tmp_path: Path) -> None:
    """As in PP-HGNet's stem, whose padded image a convolution and a pooling read."""

    def forward(net, x):
        padded = F.pad(F.relu(net.a(x)), (0, 1, 0, 1))
        pooled = F.max_pool2d(padded, 2, 1)
        return F.pad(net.c(torch.cat([pooled, net.b(padded)], 1)), (1, 1))

    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 2), c=nn.Conv2d(14, 2, 1))
    graph = half_and_exported(net, torch.randn(4, 3, 8, 8), tmp_path)
    assert kinds(graph) == ["conv", "pad", "max_pool", "conv", "concat", "conv", "pad"]
    assert [op.padding_end for op in graph.op_graph().ops if op.kind == "conv"] == [(), (1, 1), ()]


def padded_to_its_skip(net, x):
    """A U-Net whose odd sizes are padded, Ronneberger et al., MICCAI 2015, as usually written today."""
    skip = F.relu(net.a(x))
    up = net.up(F.max_pool2d(net.b(skip), 2))
    high, wide = skip.shape[-2] - up.shape[-2], skip.size(-1) - up.size(-1)
    up = F.pad(up, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
    return net.c(torch.cat([skip, up], 1))


def cropped_to_its_skip(net, x):
    height, width = x.shape[2:]
    padded = F.pad(x, (0, (2 - width % 2) % 2, 0, (2 - height % 2) % 2))
    skip = F.relu(net.a(padded))
    up = net.up(F.max_pool2d(net.b(skip), 2))
    return net.c(torch.cat([skip, up], 1))[..., :height, :width]


def cut_inside(net, x):
    skip = F.relu(net.a(x))
    up = net.up(F.max_pool2d(net.b(skip), 2))
    low, wide = up.shape[2], up.shape[3]
    return net.c(torch.cat([F.pad(skip, (0, wide - x.shape[3], 0, low - x.shape[2])), up], 1))


def resized_to_its_skip(net, x):
    skip = F.relu(net.a(x))
    up = F.interpolate(net.up(net.b(skip)), size=skip.shape[2:], mode="bilinear", align_corners=True)
    return net.c(torch.cat([skip, up], 1))


@pytest.mark.parametrize("forward", [padded_to_its_skip, cropped_to_its_skip, cut_inside, resized_to_its_skip])
@pytest.mark.parametrize("side", [8, 9, 11])
def test_a_unet_at_any_size(tmp_path: Path, forward, side: int) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 12, 1), up=nn.ConvTranspose2d(12, 6, 2, stride=2))
    graph = half_and_exported(Net(forward, **parts, c=nn.Conv2d(14, 2, 1)), torch.randn(4, 3, side, side + 1), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b", "up"]


@pytest.mark.parametrize("factor", [0.5, 1.5, (2, 3)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_images_are_resized_by_factors(tmp_path: Path, factor: float | tuple[int, int], mode: str) -> None:
    resize = nn.Upsample(scale_factor=factor, mode=mode)
    net = Net(lambda net, x: net.b(net.resize(net.a(x))), a=nn.Conv2d(3, 8, 1), resize=resize, b=nn.Conv2d(8, 2, 1))
    assert kinds(half_and_exported(net, torch.randn(4, 3, 6, 8), tmp_path))[1] == f"upsample_{mode}"


@pytest.mark.parametrize(
    ("clip", "kind"),
    [
        (lambda x: torch.clamp(x, -0.5, 0.5), "clip"),
        (lambda x: x.clamp(min=-0.25), "clip"),
        (lambda x: F.hardtanh(x), "clip"),
        (nn.Hardtanh(0.0, 1.0), "clip"),
        (nn.Hardtanh(0.0, 6.0), "conv"),
        (lambda x: x.clamp_(min=0), "conv"),
    ],
)
def test_values_are_kept_between_bounds(tmp_path: Path, clip, kind: str) -> None:
    def forward(net, x):
        return net.b((clip if isinstance(net.clip, nn.Identity) else net.clip)(net.a(x)))

    part = clip if isinstance(clip, nn.Module) else nn.Identity()
    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), clip=part)
    assert kinds(half_and_exported(net, torch.randn(8, 3, 6, 8), tmp_path))[-2] == kind


# What runs by another name


def test_zeros_before_a_transposed_convolution_are_read() -> None:
    up = nn.ConvTranspose2d(8, 6, 3, stride=2)
    net = Net(
        lambda net, x: net.b(net.up(F.pad(net.a(x), (1, 1, 1, 1)))), a=nn.Conv2d(3, 8, 1), up=up, b=nn.Conv2d(6, 2, 1)
    )
    graph = build_graph(net.eval(), (3, 8, 8))
    assert kinds(graph) == ["conv", "pad", "conv_transpose", "conv"] and graph.op_graph().nodes[2].inputs == ("pad",)
    assert graph.op_graph().ops[-1].out_height == 21


def test_zeros_of_which_only_the_size_is_asked_are_no_operator(tmp_path: Path) -> None:
    def forward(net, x):
        padded = F.pad(net.a(x), (0, 8, 0, 8))
        return net.c(F.interpolate(F.max_pool2d(F.relu(net.b(padded)), 2), size=padded.shape[2:]))

    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 3, padding=1), c=nn.Conv2d(6, 2, 1))
    graph = half_and_exported(net, torch.randn(2, 3, 8, 8), tmp_path)
    assert kinds(graph) == ["conv", "conv", "max_pool", "upsample_nearest", "conv"]


def test_zeros_before_an_average_pooling_are_its_padding(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.b(F.avg_pool2d(F.pad(net.a(x), (1, 1, 1, 1)), 3, 2)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 2, 1),
    )
    graph = half_and_exported(net, torch.randn(2, 3, 8, 8), tmp_path)
    assert [(op.kind, op.padding) for op in graph.op_graph().ops][1] == ("avg_pool", (1, 1))


def test_pixels_shuffled_behind_a_convolution_in_groups(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 16, 3, groups=2, padding=1), c=nn.Conv2d(4, 2, 1))
    half_and_exported(
        Net(lambda net, x: net.c(F.pixel_shuffle(net.b(net.a(x)), 2)), **parts), torch.randn(2, 3, 5, 5), tmp_path
    )


def test_a_parameter_that_is_added_is_no_shortcut(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1))
    net = Net(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x) + net.p)) + net.p)), **parts)
    net.p = nn.Parameter(torch.rand(1))
    half_and_exported(net, torch.randn(8, 3, 6, 6), tmp_path)


def test_what_is_computed_for_nothing_ties_its_channels_all_the_same() -> None:
    def forward(net, x):
        _ = net.a(x) + net.d(x)
        return net.b(net.a(x))

    net = Net(forward, a=nn.Conv2d(3, 8, 1), d=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)).eval()
    graph = build_graph(net, (3, 8, 8))
    assert graph.groups[0].modules("producer") == ("a", "d")
    slice_channels(net, graph, keep_channels(net, graph, [4]))(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda net, x: net.a(x.sub_(0.5).div_(0.25)), "writes into its input x in place"),
        (lambda net, x: (lambda y: (y[:, :4].mul_(3), net.b(y))[1])(net.a(x)), "a part or a view of a in place"),
        (
            lambda net, x: (lambda y: (y.chunk(2, 1)[1].mul_(3), net.b(y))[1])(net.a(x)),
            "a part or a view of a in place",
        ),
        (lambda net, x: (lambda y: (y.permute(0, 2, 3, 1).mul_(3), net.b(y))[1])(net.a(x)), "a part or a view of a"),
        (lambda net, x: net.b(net.i(net.a(x))), "an instance-norm of 64 channels, not 8"),
        (lambda net, x: net.b(net.a(x) * net.a.bias.view(1, -1, 1, 1)), "operator mul"),
        (lambda net, x: net.c(F.pad(net.a(x).mean((2, 3)), (1, 1))), "operator pad"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(forward, words: str) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), i=nn.InstanceNorm2d(64), c=nn.Linear(10, 2))
    with pytest.raises(UnsupportedOperatorError, match=words):
        build_graph(Net(forward, **parts).eval(), (3, 6, 6))


class Doubled(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x) * 2 + 1)


def test_a_norm_that_computes_more_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Doubled(8, nn.ReLU()), nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(UnsupportedOperatorError, match="1: a Doubled that is more than a norm and ReLU"):
        build_graph(net, (3, 6, 6))


def test_constants_in_the_code_are_not_left_in_the_network() -> None:
    net = Net(lambda net, x: net.b(F.relu(net.a(x)) * torch.tensor(2.0)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    before = set(vars(net))
    graph = build_graph(net.eval(), (3, 6, 6))
    assert set(vars(net)) == before and graph.layers[1].numbers == (2.0,)


# Code that asks for sizes


def halved_if_large(net, x):
    x = net.a(x)
    if x.shape[-1] >= 8 and x.size(2) % 2 == 0 and len(x.shape) == 4:
        x = F.max_pool2d(x, 2)
    return net.b(x)


def checked(net, x):
    batch, _, height, width = x.shape
    assert height == width, f"{height} {width} {batch}"
    x = net.a(x)
    return net.b(F.interpolate(x, size=(int(height / 2) * 2, width)))


def repeated(net, x):
    x = net.a(x)
    for _ in range(x.shape[2] // 4):
        x = F.relu(x)
    return net.b(x)


def smaller_side(net, x):
    x = net.a(x)
    side = min(tuple(x.shape[2:]))
    return net.b(x * float(side))


@pytest.mark.parametrize(
    ("forward", "large", "small"),
    [
        (halved_if_large, ["conv", "max_pool", "conv"], ["conv", "conv"]),
        (checked, ["conv", "conv"], ["conv", "conv"]),
        (repeated, ["conv", "activation", "conv"], ["conv", "conv"]),
        (smaller_side, ["conv", "conv"], ["conv", "conv"]),
    ],
)
def test_code_may_branch_on_the_size_of_images(tmp_path: Path, forward, large: list[str], small: list[str]) -> None:
    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    for side, wanted in ((8, large), (4, small)):
        graph = half_and_exported(net, torch.randn(8, 3, side, side), tmp_path)
        assert kinds(graph) == wanted and [group.name for group in graph.groups] == ["a"]


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.shape[1] == 8,
        lambda x: x.size(-3) > 4,
        lambda x: tuple(x.shape[1:]) == (8, 6, 6),
        lambda x: x.size(dim=1) == 8,
        lambda x: x.numel() > 10,
        lambda x: x.shape[1:][0] // 2 == 4,
    ],
)
def test_channels_that_code_asks_for_are_frozen(asks) -> None:
    def forward(net, x):
        x = net.a(x)
        return net.b(F.relu(x) if asks(x) else x)

    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1))
    graph = build_graph(net.eval(), (3, 6, 6))
    assert frozen_of(graph)["a"] == "the network's code asks for the channels of a"
    assert graph.layers[0].op.activation == "relu"


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.mean() > 0,
        lambda x: x.max().item() > 3,
        lambda x: bool(x.shape[0] + x.sum()),
        lambda x: x[x > 1].numel() > 0,
    ],
)
def test_code_that_branches_on_values_cannot_be_traced(asks) -> None:
    net = Net(lambda net, x: net.a(x) if asks(x) else x, a=nn.Conv2d(3, 8, 1))
    with pytest.raises(UserError, match="cannot be traced by torch.fx .*control flow"):
        build_graph(net.eval(), (3, 6, 6))


@pytest.mark.parametrize(
    "asks", [lambda x: x.shape[0] == 1, lambda x: 1 / float(x.shape[0]), lambda x: range(x.size(0))]
)
def test_code_that_computes_with_the_number_of_images_cannot_be_traced(asks) -> None:
    net = Net(lambda net, x: net.a(x) if asks(x) else x, a=nn.Conv2d(3, 8, 1))
    with pytest.raises(UserError, match="it computes with the number of images"):
        build_graph(net.eval(), (3, 6, 6))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (lambda y: net.b(y) * 2.0 if y.shape[1] == 8 else net.b(y))(F.pad(net.a(x), (1, 1, 1, 1))),
        lambda net, x: net.c((lambda m: m.mean(2) if m.shape[1] == 8 else m.mean(2) * 2)(net.a(x).mean(2))),
        lambda net, x: net.b(F.relu(net.a(x)) if net.a.weight.shape[0] == 8 else net.a(x)),
        lambda net, x: (lambda y: (torch._assert(y.shape[1] == 8, "eight"), net.b(y))[1])(net.a(x)),
        lambda net, x: (lambda y: net.b(y) * len(y.split(4, 1)))(net.a(x)),
        lambda net, x: (lambda y: net.b(y) * len(y.chunk(3, 1)))(net.a(x)),
    ],
)
def test_channels_are_frozen_however_they_are_asked_for(forward) -> None:
    net = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), c=nn.Linear(8, 2))
    assert frozen_of(build_graph(net.eval(), (3, 6, 6)))["a"].startswith("the network's code asks for the channels of")


def test_weights_are_as_before_where_sizes_were_asked_for() -> None:
    """Layers ran in the middle of the trace."""
    net = Net(halved_if_large, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    image = torch.randn(1, 3, 8, 8)
    call, wanted = nn.Module.__call__, net.eval()(image)
    build_graph(net, (3, 8, 8), examples=[image])
    assert nn.Module.__call__ is call
    torch.testing.assert_close(net(image), wanted)
