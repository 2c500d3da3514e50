"""Networks of many kinds: what is pruned is right, and what cannot be is left at full width and said aloud."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import FORMATS, Net, frozen_of, halved, mask_channels, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.export import export_network
from amc_hw.graph import LayerGraph, build_graph, width_grid
from amc_hw.models import load_model
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.resources import Completer, budget_from, choose_width, macs_model, params_model
from amc_hw.subject import load_graph
from profilers.ops import OpGraph, OpSpec


def same_when_sliced(net: nn.Module, *inputs: Tensor) -> LayerGraph:
    """Half the channels of every group: the smaller network computes what the masked one does. Its graph."""
    graph = build_graph(net.eval(), tuple(inputs[0].shape[1:]), examples=[value[:1] for value in inputs])
    kept = keep_channels(net, graph, halved(graph))
    small, masked = slice_channels(net, graph, kept), mask_channels(net, graph, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), masked(*inputs), rtol=1e-4, atol=1e-5)
    return graph


def test_a_depthwise_convolution_over_a_concatenation_keeps_the_parts_apart() -> None:
    def forward(net, x):
        return net.c(net.bn(net.depthwise(torch.cat([net.a(x), net.b(x)], 1))))

    parts = dict(a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 4, 1), depthwise=nn.Conv2d(6, 6, 3, groups=6))
    net = Net(forward, bn=nn.BatchNorm2d(6), c=nn.Conv2d(6, 2, 1), **parts)
    graph = same_when_sliced(net, torch.randn(2, 3, 8, 8))
    assert [group.name for group in graph.groups] == ["a", "b"]
    assert [op.in_channels[0] for op in graph.op_graph((1, 3)).ops if op.kind == "depthwise_conv"] == [4]


def test_a_sum_with_a_part_of_a_concatenation_is_frozen() -> None:
    def forward(net, x):
        return net.d(torch.cat([net.a(x), net.b(x)], 1) + net.c(x))

    parts = dict(a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(3, 6, 1), d=nn.Conv2d(6, 2, 1))
    graph = same_when_sliced(Net(forward, **parts), torch.randn(2, 3, 4, 4))
    assert frozen_of(graph) == {"a": "tied only in part to c", "d": "network output"}


def test_a_split_freezes_what_it_divides_and_nothing_else() -> None:
    def forward(net, x):
        first, second = torch.split(net.a(x), [4, 4], dim=1)
        return net.d(torch.cat([first, net.c(net.b(second))], 1))

    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 6, 1), c=nn.Conv2d(6, 4, 1), d=nn.Conv2d(8, 2, 1))
    graph = same_when_sliced(Net(forward, **parts), torch.randn(2, 3, 5, 5))
    assert [group.name for group in graph.groups] == ["b", "c"]
    assert frozen_of(graph)["a"].startswith("split or shuffled at ")
    slices = [layer for layer in graph.layers if layer.op.kind == "slice"]
    assert [(layer.start, layer.op.out_channels) for layer in slices] == [(0, 4), (4, 4)]


def test_a_module_called_twice_reads_the_same_channels_both_times() -> None:
    def forward(net, x):
        first = F.relu(net.shared(net.a(x)))
        return net.d(net.shared(net.b(x)) + first)

    parts = dict(a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), shared=nn.Conv2d(6, 4, 3, padding=1))
    graph = same_when_sliced(Net(forward, d=nn.Conv2d(4, 2, 1), **parts), torch.randn(2, 3, 8, 8))
    producers = [(group.name, group.modules("producer")) for group in graph.groups]
    assert producers == [("a", ("a", "b")), ("shared", ("shared",))]
    assert [layer.name for layer in graph.layers if layer.module == "shared"] == ["shared", "shared_1"]


def test_a_module_that_reads_its_own_output_ties_both() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1))
    graph = same_when_sliced(Net(lambda net, x: net.c(net.b(net.b(net.a(x)))), **parts), torch.randn(2, 3, 6, 6))
    assert [(group.name, group.modules("producer")) for group in graph.groups] == [("a", ("a", "b"))]


def test_a_batch_norm_of_its_own_is_an_operator() -> None:
    parts = dict(a=nn.Conv2d(3, 6, 1), n=nn.BatchNorm2d(6), c=nn.Conv2d(6, 2, 1))
    net = Net(lambda net, x: net.c(F.relu(net.n(F.relu(net.a(x))))), **parts)
    net.n.running_mean.normal_()
    graph = same_when_sliced(net, torch.randn(2, 3, 6, 6))
    assert graph.op_graph((4,)).nodes[1].op == OpSpec("affine", (4,), 6, 6, 4, activation="relu")
    assert graph.op_graph((4,)).params == (3 + 1) * 4 + 2 * 4 + (4 + 1) * 2


def test_slopes_below_zero_go_with_their_channels(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv2d(3, 6, 1), p=nn.PReLU(6), b=nn.Conv2d(6, 8, 1), q=nn.PReLU(), c=nn.Conv2d(8, 6, 1))
    head = dict(r=nn.LeakyReLU(0.2), d=nn.Conv2d(6, 4, 1), s=nn.Softmax(1))
    net = Net(lambda net, x: net.s(net.d(net.r(net.c(net.q(net.b(net.p(net.a(x)))))))), **parts, **head)
    with torch.no_grad():
        net.p.weight.uniform_(0.1, 0.9)
    image = torch.randn(2, 3, 6, 6)
    graph = same_when_sliced(net, image)
    assert [group.name for group in graph.groups] == ["a", "b", "c"]
    half = [3, 4, 3]
    small = slice_channels(net, graph, keep_channels(net, graph, half))
    assert small.p.num_parameters == 3 and small.p.weight.shape == (3,)
    for file_format in FORMATS:
        out = tmp_path / file_format
        assert export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)["bytes"]


def test_one_slope_for_all_channels_is_read_where_it_was_trained(tmp_path: Path) -> None:
    """The graph of a policy is built before its weights are there."""
    net = Net(lambda net, x: net.b(net.q(net.q(net.a(x)))), a=nn.Conv2d(3, 8, 1), q=nn.PReLU(), b=nn.Conv2d(8, 2, 1))
    image = torch.randn(2, 3, 6, 6)
    graph = same_when_sliced(net, image)
    assert [group.name for group in graph.groups] == ["a"]
    small = slice_channels(net, graph, keep_channels(net, graph, [4]))
    with torch.no_grad():
        small.q.weight.fill_(0.7)
    export_network(small, graph, graph.op_graph([4]), image, file_format="onnx", out=tmp_path / "a.onnx")


@pytest.mark.parametrize("kind", ["parameter", "buffer", "tensor"])
def test_a_gain_per_channel_is_exported_whatever_holds_it(tmp_path: Path, kind: str) -> None:
    net = Net(lambda net, x: net.b(net.a(x) * net.gain), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 6, 1), c=nn.Identity())
    gain = torch.rand(1, 4, 1, 1)
    if kind == "buffer":
        net.register_buffer("gain", gain)
    else:
        net.gain = nn.Parameter(gain) if kind == "parameter" else gain
    graph, image = build_graph(net.eval(), (3, 5, 5)), torch.randn(2, 3, 5, 5)
    assert frozen_of(graph).get("a") == {"tensor": "gain is no parameter of the network"}.get(kind)
    export_network(net, graph, graph.op_graph(), image, file_format="onnx", out=tmp_path / "a.onnx")


def written_in_place(net, x):
    y = net.relu(net.a(x))  # writes what it reads
    return net.c(net.b(y) + net.a2(x))


def read_after(net, x):
    x = net.a(x)
    y = net.relu(x)
    return net.c(net.b(y) + x)  # what was written


def added_in_place(net, x):
    other, x = net.a2(x), net.a(x)
    y = net.b(x)
    x += y
    x.relu_()
    return net.c(x + other)


def written_through_a_dropout(net, x):
    y = net.a(x)
    z = F.relu(F.dropout(net.drop(y), training=net.training), inplace=True)
    return net.c(net.b(z) + y)


@pytest.mark.parametrize("forward", [written_in_place, read_after, added_in_place, written_through_a_dropout])
def test_what_is_written_in_place_is_read_as_written(tmp_path: Path, forward) -> None:
    parts = dict(a=nn.Conv2d(3, 6, 1), a2=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 6, 1), c=nn.Conv2d(6, 2, 1))
    net = Net(forward, relu=nn.ReLU(inplace=True), drop=nn.Dropout(), **parts)
    image = torch.randn(2, 3, 5, 5)
    graph = same_when_sliced(net, image)
    export_network(net, graph, graph.op_graph(), image, file_format="onnx", out=tmp_path / "a.onnx")


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias


def test_a_linear_layer_that_computes_something_else_is_refused() -> None:
    def net(head: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

    with pytest.raises(UnsupportedOperatorError, match="3: a Cosine that is no plain linear layer"):
        build_graph(net(Cosine(4, 2)), (3, 4, 4))
    assert build_graph(net(Plain(4, 2)), (3, 4, 4)).groups


def test_weights_that_are_read_twice_are_counted_once() -> None:
    parts = dict(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1), q=nn.PReLU(), r=nn.LeakyReLU())
    net = Net(lambda net, x: net.c(net.r(net.b(net.q(net.b(net.a(x)))))), **parts)
    graph = build_graph(net.eval(), (3, 5, 5))
    assert graph.params() == 4 * 4 + 5 * 4 + 5 * 2
    assert graph.params([2]) == 4 * 2 + 3 * 2 + 3 * 2 == params_model(graph, [(2, 4)]).cost((2,))


class Gated(nn.Module):
    """Squeeze-and-excite, the gate on either side of the product."""

    def __init__(self, *, gate_first: bool) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.c, self.d = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        gate = torch.sigmoid(self.c(F.relu(self.b(x.mean((2, 3), keepdim=True)))))
        return self.d(gate * x if self.gate_first else x * gate)


@pytest.mark.parametrize("gate_first", [False, True])
def test_squeeze_and_excite_ties_the_gate_to_the_image(gate_first: bool) -> None:
    graph = same_when_sliced(Gated(gate_first=gate_first), torch.randn(2, 3, 6, 7))
    assert [(group.name, group.modules("producer")) for group in graph.groups] == [("a", ("a", "c")), ("b", ("b",))]
    (scale,) = (op for op in graph.op_graph((5, 3)).ops if op.kind == "scale")
    assert scale == OpSpec("scale", (5, 5), 6, 7, 5)


class Averaged(nn.Module):
    """Eight channels of eight by eight, averaged over `dims` one after the other."""

    def __init__(self, dims: tuple[int | tuple[int, ...], ...], *, keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        for dim in self.dims:
            x = x.mean(dim, keepdim=self.keepdim)
        return self.b(torch.flatten(x, 1))


@pytest.mark.parametrize(
    ("dims", "keepdim"),
    [(dims, keepdim) for dims in (((2, 3),), ((-1, -2),), (3, 2), (2, -1)) for keepdim in (False, True)]
    + [((-1, -1), False), ((2, 2), False), ((2, 3), True)],
)
def test_a_mean_over_an_image_pools_in_one_call_or_two(dims: tuple[int, ...], keepdim: bool) -> None:
    graph = same_when_sliced(Averaged(dims, keepdim=keepdim), torch.randn(2, 3, 8, 8))
    assert [op.kind for op in graph.op_graph().ops] == ["conv", "global_avg_pool", "linear"]


@pytest.mark.parametrize("name", ["dim", "axis"])
def test_the_dimensions_of_a_mean_may_be_named(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).mean(**{name: (2, 3)}))

    same_when_sliced(Named(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("dims", [((1, 2),), (1, 1)])
def test_a_mean_over_channels_and_a_side_is_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedOperatorError, match="mean"):
        build_graph(Averaged(dims), (3, 8, 8))


class UNet(nn.Module):
    """Two levels, a transposed convolution on one way up and bilinear upsampling on the other; two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge2, self.merge1 = nn.Conv2d(24, 10, 3, padding=1), nn.Conv2d(18, 6, 3, padding=1)
        self.mask, self.edge = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.first(x)
        two = self.second(F.max_pool2d(one, 2))
        three = self.third(F.max_pool2d(two, 2))
        two = F.relu(self.merge2(torch.cat([self.up2(three), two], 1)))
        one = F.relu(self.merge1(torch.cat([self.up1(two), one], 1)))
        return {"mask": self.mask(one), "edge": self.edge(one)}


class Pyramid(nn.Module):
    """Feature pyramid: lateral 1x1 convolutions, upsampled sums, one head for both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.lateral_low, self.lateral_high = nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)
        self.head, self.out = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        low = self.low(x)
        top = self.lateral_high(self.high(low))
        down = self.lateral_low(low) + F.interpolate(top, size=low.shape[-2:], mode="nearest")
        return self.out(F.relu(self.head(top))), [self.out(F.relu(self.head(down)))]


def test_a_unet_can_be_pruned(tmp_path: Path) -> None:
    net, image = UNet(), torch.randn(2, 3, 16, 24)
    graph = same_when_sliced(net, image)
    assert [group.name for group in graph.groups] == ["first.0", "second.0", "third.0", "up2", "merge2", "merge1"]
    assert graph.outputs == ("mask", "edge")
    half = [width // 2 for width in graph.full_widths]
    assert graph.macs(half) <= 0.5 * graph.macs()
    small = slice_channels(net, graph, keep_channels(net, graph, half))
    for file_format in ["torch", *FORMATS]:
        out = tmp_path / file_format
        assert export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)["bytes"]


def test_a_pyramid_can_be_pruned() -> None:
    graph = same_when_sliced(Pyramid(), torch.randn(2, 3, 16, 16))
    assert {group.name: group.modules("producer") for group in graph.groups} == {
        "low.0": ("low.0",),
        "high.0": ("high.0",),
        "lateral_high": ("lateral_high", "lateral_low"),
        "head": ("head",),
    }
    assert len(graph.outputs) == 2


class Several(nn.Module):
    """Three inputs, one of them a vector, and arguments that keep their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 6, 1)
        self.d, self.e = nn.Linear(10, 2), nn.Linear(5, 4)

    def forward(
        self, image: Tensor, depth: Tensor, extra: Tensor, flag: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        x = F.relu(self.a(image) + self.b(depth))
        if flag or mask is not None:
            x = x * 2
        return self.d(torch.cat([self.c(x).mean((2, 3)), F.relu(self.e(extra))], 1))


def test_several_inputs_and_arguments_with_defaults(tmp_path: Path) -> None:
    net, inputs = Several(), (torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6), torch.randn(2, 5))
    graph = same_when_sliced(net, *inputs)
    assert [group.name for group in graph.groups] == ["a", "c", "e"]
    assert graph.op_graph().inputs == {OpGraph.INPUT: (3, 6, 6), "depth": (1, 6, 6), "extra": (5,)}
    assert OpGraph.from_json(graph.op_graph().to_json()) == graph.op_graph()
    for file_format in ["torch", *FORMATS]:
        out = tmp_path / file_format
        assert export_network(net, graph, graph.op_graph(), inputs, file_format=file_format, out=out)["bytes"]


HALVES = {  # MACs at half widths over those at full widths
    "resnet50": 0.26,
    "efficientnet_b0": 0.29,
    "densenet121": 0.27,
    "mnasnet1_0": 0.29,
    "squeezenet1_1": 0.33,
    "googlenet": 0.28,
    "mobilenet_v3_large": 0.29,
    "regnet_y_400mf": 0.29,
    "convnext_tiny": 0.54,  # what a layer-norm normalises together is frozen
    "shufflenet_v2_x1_0": 0.52,  # what is split and shuffled is frozen
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_torchvision_networks_at_half_widths(name: str, tmp_path: Path) -> None:
    """MACs fall, the smaller network is the masked one, and both exports are it, too."""
    net = with_statistics(load_model(f"torchvision:{name}").module)
    graph = build_graph(net, (3, 224, 224))
    half = halved(graph)
    assert graph.macs(half) <= HALVES[name] * graph.macs()
    kept = keep_channels(net, graph, half)
    small, masked = slice_channels(net, graph, kept), mask_channels(net, graph, kept)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = small(image), masked(image)
    assert torch.isfinite(found).all() and wanted.std() > 0
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    for file_format in FORMATS:
        out = tmp_path / file_format
        done = export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)
        assert done["max_abs_diff"] <= 1e-4 * max(1.0, float(wanted.abs().max())) and out.stat().st_size > 1e5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exact"), [("densenet121", True), ("googlenet", True), ("inception_v3", False)])
def test_networks_that_concatenate_much_have_completions(name: str, exact: bool) -> None:
    _, graph = load_graph(f"torchvision:{name}")
    grids = [width_grid(group.width) for group in graph.groups]
    model, rng = macs_model(graph, grids), np.random.default_rng(0)
    for _ in range(3):
        widths = [int(rng.choice(grid)) for grid in grids]
        assert model.cost(widths) == graph.macs(widths)
    completer, budget, decided = Completer(model), budget_from(model, ratio=0.5), list[int]()
    assert completer.exact == exact
    for _ in grids:
        decided.append(choose_width(completer, decided, float(rng.uniform(0.2, 1.0)), budget))
    assert model.cost(decided) <= budget.limit


TIMM = {  # as HALVES
    "mobilenetv3_large_100": 0.4,
    "efficientnet_lite0": 0.4,
    "mobilenetv2_100": 0.4,
    "mnasnet_100": 0.4,
    "fbnetc_100": 0.4,
    "regnetx_002": 0.4,
    "repvit_m0_9": 0.27,
    "hgnetv2_b0": 0.3,
    "ghostnet_100": 0.31,
    "fastvit_t8": 0.3,
    "poolformer_s12": 0.62,  # as in convnext_tiny
    "convnext_atto": 0.62,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_mobile_networks_of_timm_at_half_widths(name: str) -> None:
    pytest.importorskip("timm")
    loaded = load_model(f"timm:{name}", input_shape=(3, 64, 64))
    graph = same_when_sliced(loaded.module, torch.randn(1, 3, 64, 64))
    assert graph.macs(halved(graph)) <= TIMM[name] * graph.macs()


ATTENTION = {  # side of the image, and as HALVES: what attention and layer-norms read is frozen
    "timm:vit_tiny_patch16_224": (224, 0.73),
    "timm:deit_tiny_distilled_patch16_224": (224, 0.73),
    "timm:mobilevit_xxs": (128, 0.53),
    "timm:mobilenetv4_hybrid_medium": (128, 0.32),
    "timm:efficientformer_l1": (224, 0.36),
    "timm:fastvit_sa12": (64, 0.6),
    "timm:tiny_vit_5m_224": (224, 0.6),
    "timm:pvt_v2_b0": (64, 0.7),
    "timm:levit_conv_128": (224, 0.43),
    "timm:maxvit_nano_rw_256": (256, 0.65),
    "torchvision:vit_b_32": (224, 0.69),
    "torchvision:maxvit_t": (224, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_networks_with_attention_at_half_widths(name: str, tmp_path: Path) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    side, share = ATTENTION[name]
    net = load_model(name, input_shape=(3, side, side)).module
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    graph = same_when_sliced(net, image)
    half = halved(graph)
    assert graph.macs(half) <= share * graph.macs()
    assert any(layer.op.kind == "attention" for layer in graph.layers)
    small = slice_channels(net, graph, keep_channels(net, graph, half))
    for file_format in FORMATS:
        out = tmp_path / file_format
        assert export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121", "efficientnet_b0"])
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    """An independent derivation, by autograd, of which layers lose the same channels."""
    tp = pytest.importorskip("torch_pruning")
    net = load_model(f"torchvision:{name}").module
    graph = build_graph(net, (3, 224, 224))
    other = copy.deepcopy(net)
    names = {part: part_name for part_name, part in other.named_modules()}
    dependencies = tp.DependencyGraph().build_dependency(other, torch.zeros(1, 3, 224, 224))
    for group in graph.groups:
        producer = other.get_submodule(group.name)
        coupled = dependencies.get_pruning_group(producer, tp.prune_conv_out_channels, [0])
        touched = {names[item.dep.target.module] for item in coupled if item.dep.target.module in names}
        assert touched == {member.module for member in group.members}, group.name


# What cannot be read is one line that says what to do


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class NeedsKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.a(x) * scale


class OfItsOwnClass(NeedsKeyword):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        return Output(self.a(x))


class Branches(NeedsKeyword):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(x) if x.mean() > 0 else x


class LeavesPyTorch(NeedsKeyword):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(np.asarray(self.a(x)))


class LeavesPyTorchInALibrary(NeedsKeyword):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(x) * len(json.dumps(x))


class Drops(NeedsKeyword):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.dropout(F.dropout(self.a(x), 0.0), training=self.training) + F.dropout(self.a(x), 0.2)


class Fails(NeedsKeyword):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(x) + x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NeedsKeyword, "forward.. of NeedsKeyword needs the keyword argument 'scale': give a factory that wraps it"),
        (OfItsOwnClass, "cannot be traced by torch.fx .*Output.*: give a factory that returns a module"),
        (Branches, "cannot be traced by torch.fx .*control flow, at test_breadth.py:.*does not branch on their values"),
        (LeavesPyTorchInALibrary, "cannot be traced by torch.fx .*serializable, at test_breadth.py:"),
        (LeavesPyTorch, "cannot be traced by torch.fx .*, at test_breadth.py:.*stays in PyTorch"),
        (
            Fails,
            r"on an input of shape .*: RuntimeError: The size .* must match .*, at test_breadth.py:\d+$",
        ),
        (Drops, r"dropout \(dropout_2 at test_breadth.py:\d+\) .*in eval mode, too: give it training=self.training"),
    ],
)
def test_a_forward_that_cannot_be_traced_says_what_to_do(kind: type[nn.Module], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_graph(kind(), (3, 8, 8))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
