"""Blocks in the words in which they are published and copied from one network to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import FORMATS, Call, Net, frozen_of, half_and_exported, kinds, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.export import export_network
from amc_hw.graph import build_graph
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.weights import check_reading

IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class SELayer(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018) as most copies of it have it."""

    def __init__(self, channels: int, call) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(inplace=True), nn.Linear(channels // 4, channels), nn.Sigmoid()
        )
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return self.call(x, y)


def around(between: nn.Module, *, read: int = 16, out: int = 16) -> nn.Module:
    """A block between two convolutions, all of them on images."""
    first, last = nn.Conv2d(3, read, 3, padding=1), nn.Conv2d(out, 4, 1)
    return nn.Sequential(first, nn.BatchNorm2d(read), nn.ReLU(), between, last)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x * y.expand_as(x),
        lambda x, y: y.expand_as(x) * x,
        lambda x, y: torch.mul(x, y.expand(*x.size())),
        lambda x, y: x * y.expand(-1, -1, x.size(2), x.size(3)),
        lambda x, y: x * torch.broadcast_to(y, x.shape),
    ],
)
def test_a_gate_that_is_repeated_for_every_pixel(tmp_path: Path, call) -> None:
    graph = half_and_exported(around(SELayer(16, call)), IMAGE, tmp_path)
    assert [group.name for group in graph.groups] == ["0", "3.fc.0"]
    assert kinds(graph) == ["conv", "global_avg_pool", "linear", "linear", "scale", "conv"]


def test_a_gate_that_is_multiplied_by_itself_repeated(tmp_path: Path) -> None:
    graph = half_and_exported(around(SELayer(16, lambda x, y: y * y.expand_as(x))), IMAGE, tmp_path)
    assert [group.name for group in graph.groups] == ["3.fc.0"] and "mul" in kinds(graph)
    assert frozen_of(graph)["0"].startswith("the network's code counts the channels of")


def test_channels_that_a_gate_is_repeated_to_by_a_number_are_frozen() -> None:
    graph = build_graph(around(SELayer(16, lambda x, y: x * y.expand(-1, 16, 12, 12))).eval(), (3, 12, 12))
    assert frozen_of(graph)["0"].startswith("repeated to 16 channels at expand: expand_as takes any number")


@pytest.mark.parametrize(
    ("repeat", "frozen"),
    [
        (lambda m, y, z: m, None),
        (lambda m, y, z: m.expand_as(y), None),
        (lambda m, y, z: m.expand(y.shape[0], y.shape[1], -1, -1), None),
        (lambda m, y, z: torch.broadcast_to(m, y.shape), None),
        (lambda m, y, z: m.expand(-1, 8, -1, -1), "repeated to 8 channels at expand"),
        (lambda m, y, z: m.expand_as(z), "the network's code counts the channels of z at expand_as"),
        (lambda m, y, z: m.expand(-1, z.shape[1], -1, -1), "the network's code counts the channels of z at expand"),
    ],
)
def test_a_mask_that_is_repeated_for_every_channel(tmp_path: Path, repeat, frozen: str | None) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, z = net.y(x), net.z(x)
        return net.c(y * repeat(torch.sigmoid(net.m(x)), y, z)) + net.d(z)

    parts = dict(y=nn.Conv2d(3, 8, 3), z=nn.Conv2d(3, 8, 3), m=nn.Conv2d(3, 1, 3), c=nn.Conv2d(8, 4, 1))
    graph = half_and_exported(Net(forward, **parts, d=nn.Conv2d(8, 4, 1)), IMAGE, tmp_path)
    assert "mask" in kinds(graph)
    assert frozen_of(graph).get("y", "nothing").startswith(frozen or "nothing")


def test_a_gate_of_one_channel(tmp_path: Path) -> None:
    """As pruning may leave one."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.y(x)
        return net.c(y * torch.sigmoid(net.g(y.mean((2, 3), keepdim=True))))

    parts = dict(y=nn.Conv2d(3, 1, 3), g=nn.Conv2d(1, 1, 1), c=nn.Conv2d(1, 4, 1))
    assert "scale" in kinds(half_and_exported(Net(forward, **parts), IMAGE, tmp_path))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x, y: F.relu(y.expand_as(x)), "expand_as .* only sums and products read what is repeated"),
        (lambda x, y: x * y.expand(1, -1, -1, -1), "expand .* it is for a batch of 1"),
        (lambda x, y: x * (2 * y.expand_as(x)), "operator mul .* is not supported in this form"),
        (lambda x, y: (lambda e: x * (e * e))(y.expand_as(x)), "operator mul .* is not supported in this form"),
        (lambda x, y: x - x.mean(1, keepdim=True).relu(), "operator sub .* of as many channels only a single row"),
    ],
)
def test_other_repetitions_are_refused(call, why: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=why):
        build_graph(around(SELayer(16, call)).eval(), (3, 12, 12))


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda x: x[:, :, ::2, ::2], ["max_pool"]),
        (lambda x: x[..., 1::2, ::3], ["crop", "max_pool"]),
        (lambda x: x[:, :, 2:11:4, 1:-1], ["crop", "max_pool"]),
        (lambda x: x[:, :, :7:5], ["crop", "max_pool"]),
        (lambda x: x[:, 3:9, ::2, ::2], ["slice", "max_pool"]),
    ],
)
def test_pixels_that_a_slice_leaves_out(tmp_path: Path, call, wanted: list[str]) -> None:
    out = call(torch.zeros(1, 16, 12, 12)).shape[1]
    graph = half_and_exported(around(Call(call), out=out), IMAGE, tmp_path)
    assert kinds(graph) == ["conv", *wanted, "conv"]
    assert [group.name for group in graph.groups] == (["0"] if out == 16 else [])


def test_samples_that_a_slice_leaves_out(tmp_path: Path) -> None:
    parts = dict(a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 4, 1))
    graph = half_and_exported(Net(lambda net, x: net.b(net.a(x)[:, :, 1::3]), **parts), torch.randn(4, 3, 21), tmp_path)
    assert kinds(graph) == ["conv", "crop", "max_pool", "conv"]


def test_a_quarter_of_the_pixels_four_times(tmp_path: Path) -> None:
    """The Focus of YOLOv5."""

    def focus(x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    graph = half_and_exported(around(Call(focus), out=64), IMAGE, tmp_path)
    assert [(group.name, group.width) for group in graph.groups] == [("0", 16)]


def padded_to(x: Tensor, channels: int) -> Tensor:
    more = (channels - x.shape[1]) // 2
    return F.pad(x, (0, 0, 0, 0, more, more))


class BasicBlock(nn.Module):
    """Of a ResNet for CIFAR, whose shortcut is of option A."""

    def __init__(self, before: int, planes: int, stride: int, call) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = Call(call)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0), ["channel_map"]),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 8))[:, :, ::2, ::2], ["channel_map", "max_pool"]),
        (
            lambda x: (lambda y: F.pad(y, (0, 0, 0, 0, *[(16 - y.shape[1]) // 2] * 2)))(x[:, :, ::2, ::2]),
            ["channel_map"],
        ),
        (lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8)), ["avg_pool", "channel_map"]),
    ],
)
def test_a_shortcut_that_is_given_channels_of_zeros(tmp_path: Path, call, wanted: list[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 16, 2, call), nn.Conv2d(16, 4, 1))
    graph = half_and_exported(net, IMAGE, tmp_path)
    assert kinds(graph) == ["conv", "conv", "conv", *wanted, "add", "conv"]
    assert [group.name for group in graph.groups] == ["1.conv1"]
    assert {why[:23] for name, why in frozen_of(graph).items() if name != "2"} == {"given channels of zeros"}


def test_channels_padded_with_anything_but_zeros_are_refused() -> None:
    more = Call(lambda x: F.pad(x, (0, 0, 0, 0, 4, 4), mode="circular"))
    with pytest.raises(UnsupportedOperatorError, match="operator pad"):
        build_graph(around(more, out=24).eval(), (3, 12, 12))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: torch.stack([x, y, x]).sum(dim=0),
        lambda x, y: torch.sum(torch.stack((x, y), 1), 1),
        lambda x, y: torch.stack([x, y], dim=-1).mean(-1),
        lambda x, y: torch.mean(torch.stack([x, y], dim=0), dim=[0]),
        lambda x, y: torch.stack(dim=1, tensors=[x, y]).sum(-4, keepdim=False),
        lambda x, y: (lambda both: (x.add_(1), both.sum(0))[1])(torch.stack([x, y])),
        lambda x, y: sum([x, y]),
    ],
)
def test_tensors_that_are_stacked_to_be_added(tmp_path: Path, call) -> None:
    """Feature pyramids, and branches of many networks."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.c(call(x, net.b(x)))

    parts = dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 4, 1))
    graph = half_and_exported(Net(forward, **parts), IMAGE, tmp_path)
    assert [(group.name, len(group.modules("producer"))) for group in graph.groups] == [("a", 2)]
    assert "add" in kinds(graph)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: torch.stack([x, y], 2).sum(3),
        lambda x, y: torch.stack([x, y]).sum(0, keepdim=True)[0],
        lambda x, y: torch.stack([x, y], 1).flatten(1, 2)[:, :3],
    ],
)
def test_other_stacks_are_refused(call) -> None:
    net = Net(lambda net, x: net.b(call(net.a(x), x)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 2, 1))
    with pytest.raises(UnsupportedOperatorError, match="operator (stack|sum)"):
        build_graph(net.eval(), (3, 6, 6))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_classifier_that_wants_more_pixels_than_there_are(tmp_path: Path, size: int) -> None:
    """VGG on small images: its adaptive pooling repeats pixels."""
    ends = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 10)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(12 // size), *ends)
    graph = half_and_exported(net, IMAGE, tmp_path)
    assert ("upsample_nearest" in kinds(graph)) == (size < 4)
    assert [group.name for group in graph.groups] == ["0"]


@pytest.mark.parametrize("size", [5, (3, 7), (12, 5), 13])
def test_windows_that_are_not_alike(tmp_path: Path, size) -> None:
    """Pyramid pooling (Zhao et al., CVPR 2017), and VGG on images of any size."""
    graph = half_and_exported(around(nn.AdaptiveAvgPool2d(size)), IMAGE, tmp_path)
    assert kinds(graph) == ["conv", "adaptive_avg_pool", "conv"]
    assert [group.name for group in graph.groups] == ["0"]


def test_samples_in_windows_that_are_not_alike(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.AdaptiveAvgPool1d(5), nn.Conv1d(8, 4, 1))
    assert kinds(half_and_exported(net, torch.randn(4, 3, 19), tmp_path)) == ["conv", "adaptive_avg_pool", "conv"]


def test_the_largest_of_windows_that_are_not_alike_is_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="from 12x12 to 5x5 its windows are not alike"):
        build_graph(around(nn.AdaptiveMaxPool2d(5)).eval(), (3, 12, 12))


class ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool, self.max_pool = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.fc2(F.relu(self.fc1(pool(x)))) for pool in (self.avg_pool, self.max_pool)]
        return torch.sigmoid(found[0] + found[1])


class SpatialAttention(nn.Module):
    def __init__(self, largest) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv1(torch.cat([torch.mean(x, dim=1, keepdim=True), self.largest(x)], dim=1)))


class AttendedBlock(nn.Module):
    """CBAM (Woo et al., ECCV 2018) in a residual block."""

    def __init__(self, channels: int, largest, apply) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.ca, self.sa = ChannelAttention(channels), SpatialAttention(largest)
        self.apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        out = self.ca(out) * out
        return F.relu(self.apply_to(self.sa(out), out) + x)


@pytest.mark.parametrize(
    "apply", [lambda gate, x: gate * x, lambda gate, x: x * gate.expand_as(x), lambda gate, x: x.mul(gate)]
)
@pytest.mark.parametrize(
    "largest",
    [
        lambda x: torch.max(x, dim=1, keepdim=True)[0],
        lambda x: torch.max(x, 1)[0].unsqueeze(1),
        lambda x: x.max(dim=1, keepdim=True).values,
        lambda x: x.amax(1, keepdim=True),
    ],
)
def test_attention_to_places(tmp_path: Path, largest, apply) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), AttendedBlock(16, largest, apply), nn.Conv2d(16, 4, 1))
    graph = half_and_exported(net, IMAGE, tmp_path)
    assert {"channel_mean", "channel_max", "mask"} < set(kinds(graph))
    assert [group.name for group in graph.groups] == ["1.conv1", "1.ca.fc1"]
    assert frozen_of(graph)["0"].startswith("read together at ")


def test_a_context_that_is_added_to_every_pixel(tmp_path: Path) -> None:
    """As in a global context block (Cao et al., ICCVW 2019), and where ASPP adds what it pooled."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.c(x + net.b(x.mean((2, 3), keepdim=True)))

    parts = dict(a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 16, 1), c=nn.Conv2d(16, 4, 1))
    graph = half_and_exported(Net(forward, **parts), IMAGE, tmp_path)
    assert kinds(graph) == ["conv", "global_avg_pool", "conv", "shift", "conv"]
    assert [(group.name, group.modules("producer")) for group in graph.groups] == [("a", ("a", "b"))]


@pytest.mark.parametrize(
    "call",
    [
        lambda conv, y: conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1),
        lambda conv, y: conv(y.view(y.shape[0], 1, -1)).view(y.shape[0], -1, 1, 1),
        lambda conv, y: conv(y.flatten(1).unsqueeze(1)).squeeze(1)[:, :, None, None],
    ],
)
@pytest.mark.parametrize("reach", [3, 5])
def test_a_convolution_over_channels(tmp_path: Path, reach: int, call) -> None:
    """Efficient channel attention (Wang et al., CVPR 2020)."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.b(F.relu(net.a(x)))
        gate = torch.sigmoid(call(net.over, F.adaptive_avg_pool2d(x, 1)))
        return net.c(x * gate.expand_as(x))

    parts = dict(a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 12, 1), c=nn.Conv2d(12, 4, 1))
    over = nn.Conv1d(1, 1, reach, padding=reach // 2, bias=reach == 5)
    graph = half_and_exported(Net(forward, **parts, over=over), IMAGE, tmp_path)
    assert kinds(graph)[2:6] == ["global_avg_pool", "unflatten", "depthwise_conv", "flatten"]
    assert [group.name for group in graph.groups] == ["a"]
    assert frozen_of(graph)["b"] == "read together at over"
    assert graph.params() == 16 * 28 + 12 * 17 + 4 * 13 + reach + 1


@pytest.mark.parametrize(
    "over",
    [
        nn.Conv1d(1, 2, 3, padding=1),
        nn.Conv1d(1, 1, 3),
        nn.Conv1d(1, 1, 3, padding=1, stride=2),
    ],
)
def test_other_convolutions_over_channels_are_refused(over: nn.Module) -> None:
    net = Net(lambda net, x: net.over(net.a(x).mean((2, 3))[:, None]).flatten(1), a=nn.Conv2d(3, 16, 3), over=over)
    with pytest.raises(UnsupportedOperatorError, match="over: over channels only a convolution that gives as many"):
        build_graph(net.eval(), (3, 12, 12))


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (nn.Mish(), "mish"),
        (F.mish, "mish"),
        (nn.Softplus(), "softplus"),
        (lambda x: F.softplus(x, beta=1, threshold=20), "softplus"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    ],
)
def test_activations_of_many_operators(tmp_path: Path, call, wanted: str) -> None:
    graph = half_and_exported(around(Call(call)), 20 * IMAGE, tmp_path)
    assert wanted in {op.activation for op in graph.op_graph().ops}


@pytest.mark.parametrize(
    "call",
    [
        nn.Softplus(beta=2),
        nn.Softplus(threshold=5),
        nn.ELU(0.5),
        lambda x: F.softplus(x, 20),
        lambda x: F.softplus(x, 1, 1),
        lambda x: F.elu(x, 0.0),
        lambda x: F.normalize(x, eps=1.0),
        lambda x: torch.max(x, x + 1),
    ],
)
def test_other_options_are_refused(call) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"(?i)operator (softplus|elu|normalize|max) "):
        build_graph(around(Call(call)).eval(), (3, 12, 12))


@pytest.mark.parametrize(
    ("pool", "wanted"),
    [
        (nn.AvgPool2d(32, ceil_mode=True), "global_avg_pool"),
        (nn.AvgPool2d((12, 40), ceil_mode=True), "global_avg_pool"),
        (nn.AvgPool2d((13, 4), ceil_mode=True), "avg_pool"),
        (nn.MaxPool2d(13, ceil_mode=True), "max_pool"),
    ],
)
def test_a_window_larger_than_the_image_is_all_of_it(tmp_path: Path, pool: nn.Module, wanted: str) -> None:
    assert kinds(half_and_exported(around(pool), IMAGE, tmp_path)) == ["conv", wanted, "conv"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.avg_pool2d(x, 2, 1, 0, False, True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
        lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
    ],
)
def test_options_of_a_pooling_in_their_order(tmp_path: Path, call) -> None:
    graph = half_and_exported(around(Call(call)), IMAGE, tmp_path)
    assert [group.name for group in graph.groups] == ["0"]


@pytest.mark.parametrize(
    "call", [lambda x: F.avg_pool2d(x, 2, 2, 0, False, True, 3), lambda x: F.max_pool2d(x, 2, 2, 0, 2)]
)
def test_options_of_a_pooling_that_no_runtime_has_are_refused(call) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"operator (avg|boolean_dispatch|max)"):
        build_graph(around(Call(call)).eval(), (3, 12, 12))


class Detector(nn.Module):
    """As YOLO's: forward() takes whatever comes, layers say where they read from, and a list of maps is the end."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Upsample(scale_factor=2)])
        self.heads = nn.ModuleList([nn.Conv2d(24, 6, 1), nn.Conv2d(16, 6, 1)])

    def forward(self, x, *args, **kwargs):
        return self.loss(x, *args, **kwargs) if isinstance(x, dict) else self.predict(x, *args, **kwargs)

    def predict(self, x: Tensor, profile: bool = False, embed=None) -> list[Tensor]:
        kept = []
        for part in self.model:
            x = part(x)
            kept.append(x)
        joined = torch.cat([kept[0], x], 1)
        return [self.heads[0](joined), self.heads[1](kept[1])]


def test_a_detector_that_takes_any_arguments(tmp_path: Path) -> None:
    net = Detector().eval()
    graph = build_graph(net, (3, 12, 12))
    check_reading(net, graph, [torch.zeros(1, 3, 12, 12)])
    assert [group.name for group in graph.groups] == ["model.0", "model.1"]
    assert len(graph.outputs) == 2


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, input_1: Tensor | None = None, *more: Tensor) -> Tensor:
        x = self.a(x) if input_1 is None else self.a(x) * self.a(input_1)
        for each in more:
            x = x + self.a(each)
        return self.b(x)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_arguments_are_as_many_as_the_examples(count: int) -> None:
    net, examples = Optional().eval(), [torch.zeros(1, 3, 4, 4)] * count
    graph = build_graph(net, (3, 4, 4), examples=examples)
    check_reading(net, graph, examples)
    assert len(graph.op_graph().inputs) == count


def test_attention_to_samples(tmp_path: Path) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.b(F.relu(net.a(x)))
        return net.c(x * torch.sigmoid(x.mean(1, keepdim=True) - x.amax(1, keepdim=True)))

    parts = dict(a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 8, 3), c=nn.Conv1d(8, 4, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(4, 3, 20), tmp_path)
    assert kinds(graph) == ["conv", "conv", "channel_mean", "channel_max", "sub", "mask", "conv"]
    assert [group.name for group in graph.groups] == ["a"]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda x: x.mean(2), "avg_pool"),
        (lambda x: torch.mean(x, dim=3), "avg_pool"),
        (lambda x: x.max(dim=2)[0], "max_pool"),
        (lambda x: x.amax(3), "max_pool"),
    ],
)
def test_one_number_for_every_row_or_column_is_a_signal(tmp_path: Path, call, wanted: str) -> None:
    """Networks of sounds do away with frequencies before they look along time."""
    parts = dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv1d(8, 6, 3), c=nn.Conv1d(6, 4, 1))
    net = Net(lambda net, x: net.c(F.relu(net.b(call(F.relu(net.a(x)))))), **parts)
    graph = half_and_exported(net, torch.randn(4, 3, 12, 10), tmp_path)
    assert kinds(graph)[:2] == ["conv", wanted] and [group.name for group in graph.groups] == ["a", "b"]


@pytest.mark.parametrize("dim", [2, 3, -1])
def test_one_number_for_every_row_or_column_of_an_image(tmp_path: Path, dim: int) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(F.relu(net.b(x.mean(dim, keepdim=True))))

    parts = dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 4, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(4, 3, 12, 10), tmp_path)
    assert kinds(graph) == ["conv", "avg_pool", "conv", "conv"]


class CoordAtt(nn.Module):
    """Coordinate attention (Hou et al., CVPR 2021) as its authors wrote it."""

    def __init__(self, inp: int, oup: int, apply) -> None:
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1, self.bn1, self.act = nn.Conv2d(inp, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()
        self.conv_h, self.conv_w = nn.Conv2d(8, oup, 1), nn.Conv2d(8, oup, 1)
        self.apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        n, c, h, w = x.size()
        x_h = self.pool_h(x)
        x_w = self.pool_w(x).permute(0, 1, 3, 2)
        y = torch.cat([x_h, x_w], dim=2)
        y = self.act(self.bn1(self.conv1(y)))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        x_w = x_w.permute(0, 1, 3, 2)
        a_h, a_w = self.conv_h(x_h).sigmoid(), self.conv_w(x_w).sigmoid()
        return self.apply_to(identity, a_w, a_h)


@pytest.mark.parametrize(
    "apply",
    [
        lambda x, w, h: x * w * h,
        lambda x, w, h: h.expand_as(x) * (x * w.expand_as(x)),
        lambda x, w, h: x - w + h,
        lambda x, w, h: x * (w * h),
        lambda x, w, h: F.relu(w.expand(-1, -1, x.size(2), x.size(3)) + h.expand_as(x)) + x,  # SPNet
    ],
)
def test_attention_to_rows_and_columns(tmp_path: Path, apply) -> None:
    image = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    graph = half_and_exported(around(CoordAtt(16, 16, apply)), image, tmp_path)
    assert [group.name for group in graph.groups] == ["0", "3.conv1"]
    assert kinds(graph).count("join") == 1 and kinds(graph).count("crop") == 2 == kinds(graph).count("upsample_nearest")


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: torch.cat([a, b], 2),
        lambda a, b: torch.cat([a, b], -2)[:, :, 3:20],
        lambda a, b: torch.cat(list(torch.cat([a, b], 2).chunk(2, dim=2)), 1),
        lambda a, b: torch.cat([each.mean(3) for each in (a, b)], 2).unsqueeze(-1),
        lambda a, b: torch.cat([each.amax(3) for each in (a, b)], 2)[:, :, None],
        lambda a, b: torch.cat([a[:, :, 2], b[:, :, -1]], 2)[..., None],
        lambda a, b: torch.cat([a[..., :1], b[..., -1:]], 2).transpose(2, 3),
        lambda a, b: (a[..., 0] + b[:, :, :, 5]).unsqueeze(2),
    ],
)
def test_rows_and_columns_are_cut_and_joined(tmp_path: Path, call) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.d(F.relu(net.c(call(F.relu(net.a(x)), F.relu(net.b(x))))))

    image = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    wide = call(torch.zeros(1, 8, 12, 12), torch.zeros(1, 8, 12, 12)).shape[1]
    parts = dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(wide, 6, (1, 1)), d=nn.Conv2d(6, 4, 1))
    graph = half_and_exported(Net(forward, **parts), image, tmp_path)
    assert "c" in [group.name for group in graph.groups]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.max_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3))).flatten(1),  # CBAM's authors
        lambda x: F.avg_pool2d(x, (x.shape[2], x.size(3))).flatten(1),
        lambda x: x.flatten(2).max(dim=2)[0],
        lambda x: x.reshape(x.size(0), x.size(1), -1).max(-1).values,
        lambda x: x.flatten(2).amax(-1, keepdim=True).squeeze(-1),
        lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).amax(2),
    ],
)
def test_the_largest_and_the_mean_of_all_positions(tmp_path: Path, call) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 6), c=nn.Linear(6, 4))
    net = Net(lambda net, x: net.c(F.relu(net.b(call(net.a(x))))), **parts)
    graph = half_and_exported(net, torch.randn(4, 3, 7, 5), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b"] and kinds(graph)[1].endswith("pool")


def test_columns_beside_columns_are_refused() -> None:
    """Their positions are not behind each other."""
    call = Net(lambda net, x: torch.cat([net.a(x), net.b(x)], 3), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    with pytest.raises(UnsupportedOperatorError, match="only channels and rows are joined"):
        build_graph(call.eval(), (3, 5, 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum((2, 3)),
        lambda x: torch.sum(x, dim=(-1, -2), keepdim=True).flatten(1),
        lambda x: x.sum(3).sum(2),
        lambda x: x.sum(dim=2).mean(2),
        lambda x: x.mean(3, keepdim=True).sum(2).squeeze(-1),
        lambda x: x.flatten(2).sum(-1),
    ],
)
def test_positions_are_added_up(tmp_path: Path, call) -> None:
    parts = dict(a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 6), c=nn.Linear(6, 4))
    net = Net(lambda net, x: net.c(F.relu(net.b(call(F.relu(net.a(x)))))), **parts)
    graph = half_and_exported(net, torch.randn(4, 3, 7, 5), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b"] and "mul_scalar" in kinds(graph)


def test_a_pooling_of_sounds_that_adds_the_largest_and_the_mean(tmp_path: Path) -> None:
    """PANNs (Kong et al., 2020), whose code writes into what it reads."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu_(net.n(net.a(x)))
        x = torch.mean(x, dim=3)
        largest, _ = torch.max(x, dim=2)
        return net.c(F.relu_(net.b(largest + torch.mean(x, dim=2))))

    parts = dict(a=nn.Conv2d(1, 8, 3), n=nn.BatchNorm2d(8), b=nn.Linear(8, 6), c=nn.Linear(6, 4))
    graph = half_and_exported(Net(forward, **parts), torch.randn(4, 1, 20, 16), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.view(x.size(0), x.size(1) * x.size(2), x.size(3)),
        lambda x: x.flatten(1, 2),
        lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    ],
)
def test_rows_become_channels(tmp_path: Path, call) -> None:
    """Networks that read text or speech: what an image has below each other is one step of a signal."""
    parts = dict(a=nn.Conv2d(1, 8, 3, padding=1), b=nn.Conv1d(8 * 5, 6, 3), c=nn.Conv1d(6, 4, 1))
    net = Net(lambda net, x: net.c(F.relu(net.b(call(F.relu(net.a(x)))))), **parts)
    graph = half_and_exported(net, torch.randn(4, 1, 5, 14), tmp_path)
    assert kinds(graph) == ["conv", "rows_to_channels", "conv", "conv"]
    assert [(group.name, group.width) for group in graph.groups] == [("a", 8), ("b", 6)]
    assert graph.op_graph([3, 6]).ops[1].out_channels == 15


def test_rows_that_become_channels_and_rows_again_cost_nothing() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.b(x.flatten(1, 2).view(x.shape))

    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)).eval()
    assert kinds(build_graph(net, (3, 9, 9))) == ["conv", "conv"]


@pytest.mark.parametrize(
    "call", [lambda net, x: net.n(x.transpose(1, 2)), lambda net, x: net.n(x.mean(2)), lambda net, x: net.n(x.amax(2))]
)
def test_rows_that_become_channels_of_sequences_and_vectors(tmp_path: Path, call) -> None:
    parts = dict(a=nn.Conv2d(1, 8, 3, padding=1), n=nn.Linear(40, 6))
    net = Net(lambda net, x: call(net, F.relu(net.a(x)).flatten(1, 2)), **parts)
    graph = half_and_exported(net, torch.randn(4, 1, 5, 14), tmp_path)
    assert "rows_to_channels" in kinds(graph) and [group.name for group in graph.groups] == ["a"]


def test_a_picture_of_one_channel_out_of_a_vector(tmp_path: Path) -> None:
    """As generators end, and where pictures come flat."""
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 36), nn.Tanh(), nn.Unflatten(1, (1, 6, 6)))
    graph = half_and_exported(net, torch.randn(8, 5), tmp_path)
    assert [group.name for group in graph.groups] == ["0"]
    net = nn.Sequential(Call(lambda x: x.view(-1, 1, 6, 6)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    assert kinds(half_and_exported(net, torch.randn(8, 36), tmp_path)) == ["unflatten", "conv", "conv"]


def test_a_vector_in_the_shape_of_another_tensor(tmp_path: Path) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y + torch.tanh(y.flatten(1)).view_as(y))

    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    assert "unflatten" in kinds(half_and_exported(net, torch.randn(4, 3, 6, 6), tmp_path))


@pytest.mark.parametrize(
    "between", [[], [nn.LeakyReLU(0.1), nn.Dropout(0.1)], [nn.ReLU(), nn.Upsample(scale_factor=2)]]
)
def test_a_vector_becomes_a_signal_before_other_layers(tmp_path: Path, between: list[nn.Module]) -> None:
    first = nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 40), nn.Unflatten(1, (8, 5))
    net = nn.Sequential(*first, *between, nn.Conv1d(8, 6, 3), nn.Conv1d(6, 2, 1))
    assert "unflatten" in kinds(half_and_exported(net, torch.randn(16, 7), tmp_path))


@pytest.mark.parametrize("middle", [nn.Unflatten(1, (6, 3, 2)), Call(lambda x: x.view(-1, 6, 3, 2))])
def test_a_vector_becomes_an_image(tmp_path: Path, middle: nn.Module) -> None:
    """Decoders and generators."""
    encoder = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10), nn.ReLU()
    decoder = nn.Linear(10, 36), nn.ReLU(), middle, nn.ConvTranspose2d(6, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 3, 1)
    graph = half_and_exported(nn.Sequential(*encoder, *decoder), torch.randn(4, 3, 9, 9), tmp_path)
    assert "unflatten" in kinds(graph) and [group.name for group in graph.groups] == ["0", "3", "8"]


def test_a_vector_becomes_a_signal(tmp_path: Path) -> None:
    parts = dict(a=nn.Linear(7, 12), b=nn.Linear(12, 40), c=nn.ConvTranspose1d(8, 6, 2, 2), d=nn.Conv1d(6, 2, 1))
    net = Net(lambda net, x: net.d(F.relu(net.c(net.b(F.relu(net.a(x))).view(-1, 8, 5)))), **parts)
    graph = half_and_exported(net, torch.randn(16, 7), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "c"]


@pytest.mark.parametrize(
    "call", [lambda x: x[:, :, 0, 0], lambda x: x[..., 0, -1], lambda x: x[:, None, :, 0, 0][:, 0]]
)
def test_the_only_pixel_is_taken_by_its_place(tmp_path: Path, call) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Call(call), nn.Linear(8, 4))
    assert [group.name for group in half_and_exported(net, IMAGE, tmp_path).groups] == ["0"]


@pytest.mark.parametrize("call", [lambda x: x[:, :, 0, 0], lambda x: x[:, :, 2, 1:3]])
def test_one_pixel_of_many_is_refused(call) -> None:
    with pytest.raises(UnsupportedOperatorError, match="operator getitem"):
        build_graph(nn.Sequential(nn.Conv2d(3, 8, 3), Call(call)).eval(), (3, 12, 12))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3,)])
def test_an_embedding_of_length_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d if len(shape) == 3 else nn.Linear
    more = (1,) if len(shape) == 3 else ()
    parts = dict(a=layer(3, 8, *more), b=layer(8, 6, *more))
    net = Net(lambda net, x: F.normalize(net.b(F.relu(net.a(x))), p=2, dim=1), **parts)
    graph = half_and_exported(net, torch.randn(8, *shape), tmp_path)
    assert kinds(graph)[-1] == "l2_norm" and [group.name for group in graph.groups] == ["a"]


@pytest.mark.parametrize("call", [lambda x: F.normalize(x, dim=2), lambda x: F.normalize(x, p=1.0)])
def test_other_lengths_are_refused(call) -> None:
    with pytest.raises(UnsupportedOperatorError, match="only channels are normalised, by the root"):
        build_graph(around(Call(call)).eval(), (3, 12, 12))


def test_twins_whose_difference_is_judged(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.c(torch.abs(net.b(F.relu(net.a(x[:, :1]))) - net.b(F.relu(net.a(x[:, 1:]))))),
        **dict(a=nn.Conv2d(1, 8, 3), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1)),
    )
    graph = half_and_exported(net, torch.randn(4, 2, 8, 8), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "b"]


@pytest.mark.parametrize(
    "call",
    [torch.exp, lambda x: x.float().exp(), lambda x: x.to(torch.float32).abs(), lambda x: x.tanh_(), torch.sigmoid_],
)
def test_functions_of_every_element(tmp_path: Path, call) -> None:
    graph = half_and_exported(around(Call(call)), IMAGE, tmp_path)
    assert [group.name for group in graph.groups] == ["0"]


def test_other_types_are_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="operator to "):
        build_graph(around(Call(lambda x: x.to(torch.float64).float())).eval(), (3, 12, 12))


class Heads(nn.Module):
    """Two scales of a pyramid, whose heads are joined as detectors have it."""

    def __init__(self, call, join) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)])
        self.call, self.join = call, join

    def forward(self, x: Tensor):
        x = F.relu(self.a(x))
        maps = [head(each) for head, each in zip(self.heads, (x, F.relu(self.b(x))), strict=True)]
        return self.join([self.call(each) for each in maps])


HEADS = {
    "boxes of anchors": (lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4), lambda found: torch.cat(found, 1)),
    "boxes of one anchor": (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2), lambda found: torch.cat(found, dim=1)),
    "channels first": (lambda x: x.flatten(2), lambda found: torch.cat(found, 2)),
    "chances": (lambda x: x.view(x.size(0), 12, -1), lambda found: torch.cat(found, dim=-1).sigmoid()),
    "turned": (lambda x: x.flatten(2), lambda found: torch.cat(found, 2).transpose(1, 2).softmax(-1)),
    "apart": (lambda x: x.flatten(2), lambda found: {"large": found[0], "small": found[1]}),
    "boxes apart": (lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3), lambda found: found),
}


@pytest.mark.parametrize("what", HEADS)
def test_the_heads_of_a_detector(tmp_path: Path, what: str) -> None:
    image = torch.randn(4, 3, 15, 13)
    net = with_statistics(Heads(*HEADS[what]))
    graph = build_graph(net, (3, 15, 13))
    check_reading(net, graph, [image[:1]])
    assert [group.name for group in graph.groups] == ["a", "b"]
    small = slice_channels(net, graph, keep_channels(net, graph, [4, 8]))
    check_reading(small, build_graph(small, (3, 15, 13)), [image[:1]])
    for file_format in FORMATS:
        told = export_network(small, graph, graph.op_graph([4, 8]), image, file_format=file_format, out=tmp_path / "n")
        assert told["max_abs_diff"] < 1e-5


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda net, x: net.a(x).unflatten(1, (2, 4)), r"10, 10.: return what the layers give"),
        (lambda net, x: torch.cat([net.a(x), net.b(x)], 3), "only channels and rows are joined: return the parts"),
    ],
)
def test_what_detectors_do_after_their_layers_is_left_to_the_caller(forward, why: str) -> None:
    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, (3, 5)))
    with pytest.raises(UnsupportedOperatorError, match=why):
        build_graph(net.eval(), (3, 12, 12))
