"""What is read from a network is what it computes, for any number of images; what is not is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from networks import Net, frozen_of, halved, mask_channels, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.prune import keep_channels, slice_channels
from amc_hw.weights import check_reading, folded_weights
from profilers.builders.torch import build

IMAGE = (3, 8, 8)


def net_of(forward: Callable[..., Tensor], **parts: nn.Module | Tensor) -> Net:
    """A network of modules, of parameters and of buffers."""
    net = Net(forward, **{name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            net.register_parameter(name, part)
        elif isinstance(part, Tensor):
            net.register_buffer(name, part)
    return net.eval()


def conv(given: int = 3, made: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(given, made, 1, **options)


@torch.no_grad()
def right(net: nn.Module, shape: tuple[int, int, int] = IMAGE) -> LayerGraph:
    """The graph of a network whose operators compute what it does, for one, two and three images, at full and at half
    width."""
    torch.manual_seed(0)
    graph = build_graph(with_statistics(net, 0.3), shape)
    kept = keep_channels(net, graph, halved(graph))
    small, masked = slice_channels(net, graph, kept), mask_channels(net, graph, kept)
    for count in (1, 2, 3):
        images = torch.randn(count, *shape)
        for module, network in ((net, graph.op_graph()), (small, graph.op_graph(halved(graph)))):
            wanted = module(images)
            (found,) = build(network, folded_weights(module, graph))(images)
            torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small(images), masked(images), rtol=1e-4, atol=1e-5)
    check_reading(net, graph, [torch.zeros(1, *shape)])
    return graph


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.layer_norm(input, self.normalized_shape, self.weight, self.bias)


RIGHT = {
    "a factor after computed weights": lambda: net_of(
        lambda net, x: net.b(-F.relu(F.linear(net.a(x).mean((2, 3)), net.w) * 0.5)),
        **{"a": conv(), "b": nn.Linear(6, 4), "w": nn.Parameter(torch.randn(6, 8))},
    ),
    "a batch-norm after computed weights": lambda: net_of(
        lambda net, x: net.b(net.n(F.linear(net.a(x).mean((2, 3)), net.w / 2, net.v))),
        **{"a": conv(), "b": nn.Linear(6, 4), "n": nn.BatchNorm1d(6)},
        **{"w": nn.Parameter(torch.randn(6, 8)), "v": nn.Parameter(torch.randn(6))},
    ),
    "another reader beside a split of one part": lambda: net_of(
        lambda net, x: (lambda y: net.b(F.relu(y.split(8, 1)[0])) + net.c(y))(net.a(x)),
        **{"a": conv(), "b": conv(8, 4), "c": conv(8, 4)},
    ),
    "another reader beside a chunk of one part": lambda: net_of(
        lambda net, x: (lambda y: net.b(net.n(y.chunk(1, 1)[0])) + net.c(y))(net.a(x)),
        **{"a": conv(), "b": conv(8, 4), "c": conv(8, 4), "n": nn.BatchNorm2d(8)},
    ),
    "images of other sides, position by position": lambda: net_of(
        lambda net, x: net.b(
            (lambda y: F.avg_pool2d(y, (1, 8)) + F.avg_pool2d(y, (8, 1)).transpose(2, 3))(F.relu(net.a(x)))
        ),
        **{"a": conv(), "b": conv(8, 4)},
    ),
    "products of flattened images": lambda: net_of(
        lambda net, x: net.b((net.a(x[:, :, :4]).flatten(2) * net.c(x[:, :, :, :4]).flatten(2)).mean(2)),
        **{"a": conv(), "c": conv(), "b": nn.Linear(8, 4)},
    ),
    "a gate that unflatten shapes": lambda: net_of(
        lambda net, x: (lambda y: net.b(y * torch.sigmoid(net.g(y.mean((2, 3))).unflatten(1, (8, 1, 1)))))(net.a(x)),
        **{"a": conv(), "b": conv(8, 4), "g": nn.Linear(8, 8)},
    ),
    "a gate that nn.Unflatten shapes": lambda: net_of(
        lambda net, x: (lambda y: net.b(y * torch.sigmoid(net.u(net.g(y.mean((2, 3)))))))(net.a(x)),
        **{"a": conv(), "b": conv(8, 4), "g": nn.Linear(8, 8), "u": nn.Unflatten(1, (8, 1, 1))},
    ),
    "a layer that reads a parameter, too": lambda: net_of(
        lambda net, x: net.b(net.m(F.relu(net.a(x))) + net.m(net.places)),
        **{"a": conv(), "m": conv(8, 6), "b": conv(6, 4), "places": nn.Parameter(torch.randn(1, 8, 8, 8))},
    ),
    "weights read by another product": lambda: net_of(
        lambda net, x: net.b(F.linear(F.relu(net.a(x.mean((2, 3)))), net.a.weight.t())),
        **{"a": nn.Linear(3, 8), "b": nn.Linear(3, 4)},
    ),
    "a number computed of weights": lambda: net_of(
        lambda net, x: net.b(F.relu(net.a(x)) * net.b.weight.norm()), **{"a": conv(), "b": conv(8, 4)}
    ),
    "a number computed of channels": lambda: net_of(
        lambda net, x: (lambda y: net.b(y * torch.ones(1).mul(1.0 / y.shape[1])))(F.relu(net.a(x))),
        **{"a": conv(), "b": conv(8, 4)},
    ),
    "a gain kept in two axes": lambda: net_of(
        lambda net, x: net.b(net.a(x) * net.gain.view(-1, 1, 1)),
        **{"a": conv(), "b": conv(8, 4), "gain": nn.Parameter(torch.randn(2, 4))},
    ),
    "buffers expanded, and zeros for every image": lambda: net_of(
        lambda net, x: net.b(
            torch.cat([net.own.expand(x.shape[0], -1, -1), torch.zeros(x.shape[0], 1, 8), tokens(net.a(x))], 1).mean(1)
        ),
        **{"a": conv(), "b": nn.Linear(8, 4), "own": torch.randn(1, 2, 8)},
    ),
    "places by ranges": lambda: net_of(
        lambda net, x: net.b(net.a(x) + torch.arange(x.shape[2]).view(1, 1, -1, 1).expand(-1, 8, -1, 8) / 8),
        **{"a": conv(), "b": conv(8, 4)},
    ),
    "PyTorch's encoder": lambda: net_of(
        lambda net, x: net.b(net.e(tokens(net.a(x))).mean(1)),
        **{"a": conv(), "b": nn.Linear(8, 4)},
        e=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        ),
    ),
    "PyTorch's attention, positions first": lambda: net_of(
        lambda net, x: (lambda t: net.b(net.m(t, t, t)[0].mean(0)))(net.a(x).flatten(2).permute(2, 0, 1)),
        **{"a": conv(), "b": nn.Linear(8, 4), "m": nn.MultiheadAttention(8, 2)},
    ),
    "PyTorch's attention in windows": lambda: net_of(
        lambda net, x: (
            lambda t: net.b(
                net.m(t, t, t)[0].view(-1, 2, 2, 4, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], 8, 8, 8)
            )
        )(net.a(x).view(-1, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)),
        **{"a": conv(), "b": conv(8, 4), "m": nn.MultiheadAttention(8, 2, batch_first=True)},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_read_is_what_is_computed(name: str) -> None:
    right(RIGHT[name]())


def test_what_shares_weights_with_a_computation_stays_whole() -> None:
    for name, reason in {
        "a layer that reads a parameter, too": "the network's code reads the weights of m",
        "weights read by another product": "the weights of linear are computed from others",
        "a number computed of weights": "the network's code reads the weights of b",
        "a number computed of channels": "the network's code asks for the channels of relu",
    }.items():
        assert frozen_of(build_graph(RIGHT[name](), IMAGE))["a"] == reason


def windows(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.view(-1, 8, 2, 4, 2, 4).permute(0, *order, 3, 5, 1).reshape(-1, 16, 8)


REFUSED = {
    "queries and keys in windows of another order": lambda net, x: net.l(
        F.scaled_dot_product_attention(windows(net.a(x), (2, 4)), windows(net.b(x), (4, 2)), windows(net.b(x), (4, 2)))
    ),
    "values in windows of another order": lambda net, x: net.l(
        F.scaled_dot_product_attention(windows(net.a(x), (2, 4)), windows(net.b(x), (2, 4)), windows(net.b(x), (4, 2)))
    ),
    "groups of channels as images": lambda net, x: net.c(
        F.adaptive_avg_pool2d(net.a(x).view(-1, 4, 8, 8), 1).softmax(1).view(-1, 8, 1, 1) * net.a(x)
    ),
    "a softmax over positions": lambda net, x: net.a(x).reshape(-1, 64).softmax(1),
    "a layer-norm that does more": lambda net, x: net.l(net.twice(tokens(net.a(x))).mean(1)),
    "slopes along positions": lambda net, x: net.l(net.slopes(tokens(net.a(x))[:, :8]).mean(1)),
    "a share of the images": lambda net, x: net.c(net.a(x) / x.shape[0]),
    "a number for every image": lambda net, x: net.c(net.a(x) + torch.arange(x.shape[0]).view(-1, 1, 1, 1)),
    "the first image": lambda net, x: net.c(net.a(x) - net.a(x)[:1]),
    "tokens of the first image": lambda net, x: net.l(tokens(net.a(x))[:1].mean(1)),
    "an image without its axis": lambda net, x: net.l(tokens(net.a(x)).squeeze(0).unsqueeze(0).mean(1)),
    "a mask of truths": lambda net, x: net.l(
        F.scaled_dot_product_attention(*[tokens(net.a(x))] * 3, attn_mask=net.mask).mean(1)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused(name: str) -> None:
    parts = {"a": conv(), "b": conv(), "c": conv(8, 4), "l": nn.Linear(8, 4), "twice": Doubled(8)}
    net = net_of(REFUSED[name], **parts, slopes=nn.PReLU(8), mask=torch.ones(64, 64).tril().bool())
    net(torch.randn(1, *IMAGE))
    with pytest.raises(UnsupportedOperatorError):
        build_graph(net, IMAGE)


def view_before(net, x):
    y = net.a(x)
    t = tokens(y)
    y = F.relu(y, inplace=True)
    return net.l((tokens(y) + t).mean(1))


def part_before(net, x):
    y = net.a(x)
    part = y[:, :4]
    y = y.mul_(2)
    return net.d(y[:, :4] + part)


def beside(net, x):
    y = net.a(x)
    first, second = y.flatten(2), y.flatten(2)
    first = first.mul_(2)
    return net.l((first + second).mean(2))


def through_a_module(net, x):
    y = net.a(x)
    return net.l(net.relu(net.flat(y))[:, :8]) + net.l(y.flatten(1)[:, :8])


@pytest.mark.parametrize("forward", [view_before, part_before, beside, through_a_module])
def test_a_view_of_what_is_written_afterwards_is_refused(forward) -> None:
    parts = {"a": conv(), "d": conv(4, 4), "l": nn.Linear(8, 4), "relu": nn.ReLU(inplace=True), "flat": nn.Flatten(1)}
    with pytest.raises(UnsupportedOperatorError, match="in place"):
        build_graph(net_of(forward, **parts), IMAGE)


def test_operators_that_compute_something_else_are_found() -> None:
    net = net_of(lambda net, x: net.b(F.relu(net.a(x))), a=conv(), b=conv(8, 4))
    net.a.register_forward_hook(lambda module, args, out: out * 2)
    graph = build_graph(net, IMAGE)
    with pytest.raises(UnsupportedOperatorError, match="Net does not compute what its operators do: b is off by "):
        check_reading(net, graph, [torch.zeros(1, *IMAGE)])


def test_a_network_for_one_image_is_refused_in_one_line() -> None:
    def forward(net, x):
        assert x.shape[0] == 1, "one by one\nplease"
        return net.b(F.relu(net.a(x)))

    net = net_of(forward, a=conv(), b=conv(8, 4))
    graph = build_graph(net_of(lambda net, x: net.b(F.relu(net.a(x))), a=net.a, b=net.b), IMAGE)
    with pytest.raises(UnsupportedOperatorError, match="Net fails on two images: AssertionError: one by one$"):
        check_reading(net, graph, [torch.zeros(1, *IMAGE)])


def aliased(net, x):
    y = net.a(x)
    turned = y.transpose(2, 3)
    turned += 1  # torch.fx takes it for a sum
    return net.c(y)


def test_writes_that_torch_fx_does_not_see_are_found() -> None:
    net = net_of(aliased, a=conv(), c=conv(8, 4))
    graph = build_graph(net, IMAGE)
    with pytest.raises(UnsupportedOperatorError, match="does not compute what its operators do"):
        check_reading(net, graph, [torch.zeros(1, *IMAGE)])


def test_a_network_that_has_no_copy_is_refused() -> None:
    net = net_of(lambda net, x: net.a(x), a=conv())
    net.lock = threading.Lock()
    with pytest.raises(UserError, match=r"Net cannot be copied \(TypeError: cannot pickle .*lock"):
        build_graph(net, IMAGE)


def test_what_a_module_keeps_of_its_last_output_is_copied() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv(8, 4)

        def forward(self, x):
            self.last = F.relu(self.a(x))
            return self.b(self.last)

    net = Keeping().eval()
    net(torch.randn(1, *IMAGE))  # with gradients
    graph = build_graph(net, IMAGE)
    assert slice_channels(net, graph, keep_channels(net, graph, [4])).a.out_channels == 4
