"""Zeros around images, wherever a network puts them: the convolution that reads them takes them over."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from networks import Net, mask_channels
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.export import export_network
from amc_hw.graph import build_graph
from amc_hw.models import load_model
from amc_hw.padding import padding_of
from amc_hw.prune import keep_channels, slice_channels

FORMATS = ["onnx", "torch"] + ["tflite"] * (importlib.util.find_spec("ai_edge_litert") is not None)


class DynamicSame(nn.Conv2d):
    """As the ports of TensorFlow's networks do it: from the input's size, when it comes."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, stride, kernel in zip(x.shape[:1:-1], self.stride[::-1], self.kernel_size[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, groups=self.groups)


class StaticSame(nn.Conv2d):
    """Zeros fixed when it was made, in a module of its own."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, groups=self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return factor * super().forward(x)


def net_of(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU6(), nn.Conv2d(8, 4, 1))


PADDED = {
    "dynamic": net_of(DynamicSame(3, 8, 3, stride=2), DynamicSame(8, 8, 5, stride=2, groups=8)),
    "static": net_of(StaticSame(3, 8, 3, stride=2), StaticSame(8, 8, 3, groups=8)),
    "by word": net_of(nn.Conv2d(3, 8, (2, 4), padding="same"), nn.Conv2d(8, 8, 2, padding="valid", groups=8)),
    "module": net_of(
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2)),
        nn.Sequential(nn.ConstantPad2d((1, 2, 1, 2), 0.0), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)),
    ),
    "function": Net(
        lambda net, x: net.b(F.relu(F.pad(net.a(F.pad(x, (0, 1))), (0, 0, 0, 0)))),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 4, 1),
    ),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", [(12, 13), (9, 16)])
def test_half_of_a_padded_network_is_the_masked_one_and_so_are_its_exports(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    net = PADDED[name].eval()
    image = torch.randn(2, 3, *size)
    graph = build_graph(net, (3, *size))
    half = [width // 2 for width in graph.full_widths]
    assert half == [4]
    kept = keep_channels(net, graph, half)
    small, masked = slice_channels(net, graph, kept), mask_channels(net, graph, kept)
    with torch.no_grad():
        wanted = masked(image)
        torch.testing.assert_close(small(image), wanted, rtol=1e-4, atol=1e-5)
    last = graph.op_graph(half).ops[-1]
    assert (last.out_height, last.out_width) == wanted.shape[2:]
    for file_format in FORMATS:
        out = tmp_path / file_format
        done = export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)
        assert done["max_abs_diff"] <= 1e-4


def test_zeros_of_a_module_and_of_its_convolution_add_up() -> None:
    graph = build_graph(PADDED["module"], (3, 12, 13))
    first, second, _ = graph.op_graph().ops
    assert (first.padding, first.padding_end) == ((0, 0), (1, 1))
    assert (second.padding, second.padding_end) == ((2, 2), (3, 3))


def test_a_convolution_of_ones_own_is_compared_with_what_it_computes() -> None:
    assert padding_of(DynamicSame(3, 4, 3, stride=2), (8, 9)) == ((0, 1), (1, 1))
    assert padding_of(StaticSame(3, 4, 3), (8, 9)) == ((2, 0), (1, 1))
    with pytest.raises(UnsupportedOperatorError, match="stem: a Standardised computes something else"):
        padding_of(Standardised(3, 4, 3), (8, 9), "stem")
    with pytest.raises(UnsupportedOperatorError, match="a: a Scaled computes something else"):
        build_graph(Net(lambda net, x: net.a(x, 2.0), a=Scaled(3, 4, 3)), (3, 9, 9))
    with pytest.raises(UnsupportedOperatorError, match="'reflect'"):
        padding_of(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (8, 9))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(F.pad(net.a(x), (-1, 1))),
        lambda net, x: net.b(F.pad(net.a(x), (1, 1), value=0.5)),
        lambda net, x: net.b(F.pad(net.a(x), (1, 1, 1, 1), mode="replicate")),
        lambda net, x: net.b(F.pad(net.a(x), (0, 1, 0, 0, 0, 1))[:, :8]),
    ],
)
def test_other_paddings_are_refused(forward) -> None:
    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1))
    with pytest.raises(UnsupportedOperatorError, match="not supported"):
        build_graph(net, (3, 9, 9))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_mobilenetv3_small_100"])
def test_tensorflows_networks_of_timm(name: str) -> None:
    pytest.importorskip("timm")
    net = load_model(f"timm:{name}", input_shape=(3, 64, 64)).module
    graph = build_graph(net, (3, 64, 64))
    assert any(op.padding_end for op in graph.op_graph().ops)
    half = [width // 2 for width in graph.full_widths]
    kept = keep_channels(net, graph, half)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = mask_channels(net, graph, kept)(image)
        torch.testing.assert_close(slice_channels(net, graph, kept)(image), wanted, rtol=1e-4, atol=1e-5)
    assert graph.macs(half) <= 0.4 * graph.macs()
