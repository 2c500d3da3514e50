"""Networks with attention: it is measured and stays as wide as it is, what is around it is pruned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from networks import FORMATS, Net, frozen_of, half_and_exported, kinds
from torch import Tensor, nn
from torch.nn import functional as F

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.export import export_network
from amc_hw.graph import build_graph
from amc_hw.lowering.axes import (
    BATCH,
    CHANNELS,
    POSITIONS,
    Part,
    Seen,
    image_axes,
    reshaped,
    taken,
    token_axes,
    vector_axes,
    whole,
    window_of,
)
from amc_hw.symbolic import trace_fx
from amc_hw.weights import folded_weights
from profilers.builders import torch as torch_builder
from profilers.ops import OpSpec

DIM, HEADS = 8, 2
IMAGE = (3, 12, 12)


class Attention(nn.Module):
    """Of tokens (N, L, C), written in one of the usual ways."""

    def __init__(self, how) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), how

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.how(self, x))


def fused(net: Attention, x: Tensor) -> Tensor:
    count, tokens, width = x.shape
    qkv = net.qkv(x).reshape(count, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width)


def by_products(net: Attention, x: Tensor) -> Tensor:
    count, tokens, width = x.shape
    qkv = net.qkv(x).reshape(count, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = (q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(count, tokens, width)


def scaled_before(net: Attention, x: Tensor) -> Tensor:
    count, tokens, width = x.shape
    q, k, v = net.qkv(x).chunk(3, dim=-1)
    q, k, v = (part.view(count, tokens, HEADS, -1).transpose(1, 2) for part in (q * 0.5, k, v))
    return torch.matmul(F.softmax(torch.matmul(q, k.mT), -1), v).transpose(1, 2).flatten(2)


def parts_of_every_head(net: Attention, x: Tensor) -> Tensor:
    count, tokens, width = x.shape
    each = width // HEADS
    qkv = net.qkv(x).view(count, tokens, HEADS, 3 * each)
    q, k, v = qkv.split([each, each, each], dim=3)
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return ((q @ k) / math.sqrt(each)).softmax(-1).matmul(v).transpose(1, 2).reshape(count, tokens, width)


def values_first(net: Attention, x: Tensor) -> Tensor:
    count, tokens, width = x.shape
    q, k, v = net.qkv(x).transpose(1, 2).reshape(count, 3, HEADS, -1, tokens).unbind(1)
    weights = (q.transpose(-2, -1) @ k).softmax(-1)
    return (v @ weights.transpose(-2, -1)).reshape(count, width, tokens).transpose(1, 2)


def by_letters(net: Attention, x: Tensor) -> Tensor:
    q, k, v = net.qkv(x).unflatten(2, (3, HEADS, DIM // HEADS)).unbind(2)
    weights = torch.einsum("bihd, bjhd -> bhij", q, k).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


WAYS = [fused, by_products, scaled_before, parts_of_every_head, values_first, by_letters]


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.norm2 = nn.LayerNorm(DIM), attention, nn.LayerNorm(DIM)
        self.up, self.down, self.gain = nn.Linear(DIM, 24), nn.Linear(24, DIM), nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.norm(x))
        x = x + self.gain * (attended[0] if isinstance(attended, tuple) else attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Patches, a token of its own, position embeddings, blocks, a head on that token or on the mean."""

    def __init__(self, block: nn.Module, *, own: int = 1) -> None:
        super().__init__()
        self.patches, self.block, self.norm = nn.Conv2d(3, DIM, 3, 3), block, nn.LayerNorm(DIM)
        self.head, self.own = nn.Linear(DIM, 5), own
        self.token = nn.Parameter(torch.randn(1, own, DIM)) if own else None
        self.places = nn.Parameter(torch.randn(1, 16 + own, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.block(x + self.places))
        return self.head(x[:, 0] if self.own == 1 else x[:, self.own :].mean(dim=1))


@pytest.mark.parametrize("how", WAYS)
def test_attention_is_one_operator_however_it_is_written(how, tmp_path: Path) -> None:
    torch.manual_seed(1)
    graph = half_and_exported(Vit(Block(Attention(how))), torch.randn(2, *IMAGE), tmp_path)
    attention = next(layer for layer in graph.layers if layer.op.kind == "attention")
    assert kinds(graph).count("attention") == 1 and attention.name == "block.attention"
    assert (attention.op.groups, attention.op.kernel, attention.op.tokens) == (HEADS, (17, 1), True)
    assert attention.numbers[0] == pytest.approx(0.5 if how in (fused, by_products, parts_of_every_head) else 1.0)
    assert attention.op.macs == 17 * 17 * 2 * DIM
    assert [group.name for group in graph.groups] == ["block.up"]
    frozen = frozen_of(graph)
    assert frozen["block.attention.qkv"].endswith("attention at block.attention") or how is parts_of_every_head
    assert frozen["patches"].startswith("added to or put before parameters at ")


@pytest.mark.parametrize("own", [0, 1, 2])
def test_pytorchs_own_module_is_read(own: int, tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    net = Vit(Block(Whole()), own=own)
    with torch.no_grad():
        net.block.attention.inner.in_proj_bias.normal_()
    graph = half_and_exported(net, torch.randn(2, *IMAGE), tmp_path)
    assert [group.name for group in graph.groups] == ["block.up"]
    assert kinds(graph).count("attention") == 1 and kinds(graph).count("prepend") == bool(own)
    assert frozen_of(graph)["block.attention.inner"] == "read by attention at block.attention.inner.attention"
    same_by_the_gpu_builder(net, graph)


def same_by_the_gpu_builder(net: nn.Module, graph) -> None:
    images = torch.randn(3, *graph.input_shape)
    with torch.no_grad():
        (found,) = torch_builder.build(graph.op_graph(), folded_weights(net, graph))(images)
        torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-5)


class Windows(nn.Module):
    """Attention within windows of an image, with a table of relative positions; apart: a grid instead."""

    def __init__(self, window: int, *, apart: bool) -> None:
        super().__init__()
        self.up, self.qkv, self.proj = nn.Conv2d(3, 16, 1), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.down, self.head = nn.Conv2d(16, DIM, 1), nn.Conv2d(DIM, 4, 1)
        self.window, self.apart = window, apart
        self.table = nn.Parameter(torch.randn(HEADS, 2 * window - 1, 2 * window - 1))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        self.register_buffer("index", places[:, :, None] - places[:, None] + window - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(x)))
        count, width, high, wide = x.shape
        size, rows, columns = self.window, high // self.window, wide // self.window
        if self.apart:
            split, order = (count, width, size, rows, size, columns), (0, 3, 5, 2, 4, 1)
            back, back_order = (count, rows, columns, size, size, width), (0, 5, 3, 1, 4, 2)
        else:
            split, order = (count, width, rows, size, columns, size), (0, 2, 4, 3, 5, 1)
            back, back_order = (count, rows, columns, size, size, width), (0, 5, 1, 3, 2, 4)
        tokens = x.view(split).permute(order).reshape(-1, size * size, width)
        qkv = self.qkv(tokens).view(-1, size * size, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        bias = self.table[:, self.index[0], self.index[1]]
        scores = qkv[0] @ qkv[1].transpose(-2, -1) / math.sqrt(DIM // HEADS) + bias.unsqueeze(0)
        made = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(-1, size * size, width)
        return self.head(self.proj(made).view(back).permute(back_order).reshape(count, width, high, wide))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [2, 4])
def test_windows_and_grids_of_an_image_attend_to_themselves(window: int, apart: bool, tmp_path: Path) -> None:
    net = Windows(window, apart=apart)
    graph = half_and_exported(net, torch.randn(2, 3, 12, 8), tmp_path)
    attention = next(layer.op for layer in graph.layers if layer.op.kind == "attention")
    assert (attention.kernel, attention.biased) == ((window, window), True)
    assert attention.dilation == ((12 // window, 8 // window) if apart else (1, 1))
    assert [group.name for group in graph.groups] == ["up"]
    assert kinds(graph).count("to_tokens") == kinds(graph).count("to_image") == 1
    same_by_the_gpu_builder(net, graph)


class Shared(nn.Module):
    """One key and value of a smaller image for all heads, of convolutions (MobileNetV4's)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 1), nn.Conv2d(12, 4, 1)
        self.small = nn.Conv2d(6, 6, 3, 2, 1, groups=6)
        self.k, self.v = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        count, _, high, wide = x.shape
        q = self.q(x).reshape(count, 3, 4, high * wide).transpose(-1, -2)
        k, v = (part(self.small(x)).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.k, self.v))
        made = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.out(made.transpose(-1, -2).reshape(count, 12, high, wide))


def test_all_heads_may_read_the_same_keys(tmp_path: Path) -> None:
    net = Shared()
    graph = half_and_exported(net, torch.randn(2, *IMAGE), tmp_path)
    attention = next(layer for layer in graph.layers if layer.op.kind == "attention")
    assert (attention.op.in_channels, attention.op.keys, attention.op.tokens) == ((12, 4, 4), (6, 6), False)
    assert attention.numbers == (0.3,)
    assert [group.name for group in graph.groups] == ["stem"]
    same_by_the_gpu_builder(net, graph)


def test_what_is_computed_of_parameters_follows_them(tmp_path: Path) -> None:
    net, image = Windows(4, apart=False).eval(), torch.randn(1, 3, 8, 8)
    graph = build_graph(net, (3, 8, 8))
    with torch.no_grad():
        net.table.add_(1.0).mul_(torch.randn(net.table.shape))  # as fine-tuning does
    assert export_network(net, graph, graph.op_graph(), image, file_format="onnx", out=tmp_path / "a.onnx")["bytes"]


def test_a_product_with_computed_weights_is_read_and_stays_whole(tmp_path: Path) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(6, 4)
            self.weight, self.scale = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.rand(8))

        def forward(self, x):
            x = F.relu(self.a(x)).mean((2, 3))
            return self.b(F.relu(F.linear(x * torch.sigmoid(self.scale), self.weight / 2, torch.cat([self.scale[:6]]))))

    net = Computed().eval()
    graph = build_graph(net, IMAGE)
    assert not graph.groups and {"affine", "linear"} <= set(kinds(graph))
    for file_format in FORMATS:
        images = torch.randn(2, *IMAGE)
        assert export_network(net, graph, graph.op_graph(), images, file_format=file_format, out=tmp_path / "a")[
            "bytes"
        ]
    same_by_the_gpu_builder(net, graph)


def test_channels_that_the_code_counts_elsewhere_stay(tmp_path: Path) -> None:
    """What reads `wide` is reshaped to as many channels as `narrow` has, which no operator ties."""

    def forward(net, x):
        narrow = F.relu(net.narrow(x))
        count, width, high, wide = narrow.shape
        tokens = net.mix(narrow).flatten(2).transpose(1, 2)
        return net.out(net.inner(tokens).transpose(1, 2).reshape(count, width, high, wide))

    parts = dict(narrow=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 16, 1), inner=nn.Linear(16, 8), out=nn.Conv2d(8, 4, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(2, *IMAGE), tmp_path)
    assert [group.name for group in graph.groups] == ["mix"]
    assert frozen_of(graph)["inner"].startswith("the network's code counts the channels of narrow at ")


def test_gates_that_are_reshaped_to_the_channels_of_their_image_are_pruned_with_it(tmp_path: Path) -> None:
    def forward(net, x):
        image = F.relu(net.a(x))
        count, width, _, _ = image.size()
        gate = net.up(F.relu(net.down(image.mean((2, 3)).view(count, width)))).view(count, width, 1, 1)
        return net.b(image * torch.sigmoid(gate))

    parts = dict(a=nn.Conv2d(3, 16, 1), down=nn.Linear(16, 8), up=nn.Linear(8, 16), b=nn.Conv2d(16, 4, 1))
    graph = half_and_exported(Net(forward, **parts), torch.randn(2, *IMAGE), tmp_path)
    assert [group.name for group in graph.groups] == ["a", "down"]


def test_nothing_of_a_trace_is_left_in_the_users_network() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table, self.cache = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1, 4, 1, 1)), {}

        def forward(self, x):
            self.seen = self.cache.setdefault(str(x.device), self.table * 2)
            return self.a(x) + self.seen * torch.tensor(3.0)

    net = Caching().eval()
    before = set(vars(net))
    traced, _ = trace_fx(net, [torch.zeros(1, 3, 4, 4)])
    assert set(vars(net)) == before and net.cache == {}
    assert traced.a.weight is net.a.weight


def refusing(how) -> nn.Module:
    return Vit(Block(Attention(how)))


def heads_of(net: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return net.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def causal(net, x):
    return F.scaled_dot_product_attention(*heads_of(net, x), is_causal=True).transpose(1, 2).flatten(2)


def over_queries(net, x):
    q, k, v = heads_of(net, x)
    return ((q @ k.mT).softmax(-2) @ v).transpose(1, 2).flatten(2)


def no_softmax(net, x):
    q, k, v = heads_of(net, x)
    return ((q @ k.mT) @ v).transpose(1, 2).flatten(2)


def biased_by_the_image(net, x):
    q, k, v = heads_of(net, x)
    return ((q @ k.mT + x.mean()).softmax(-1) @ v).transpose(1, 2).flatten(2)


def talking_heads(net, x):
    q, k, v = heads_of(net, x)
    return (torch.relu(q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def over_channels(net, x):
    q, k, v = heads_of(net, x)
    return ((q.mT @ k).softmax(-1) @ v.mT).mT.transpose(1, 2).flatten(2)


def bias_after(net, x):
    q, k, v = heads_of(net, x)
    return (((q @ k.mT + torch.ones(17, 17)) * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "how", [causal, over_queries, no_softmax, biased_by_the_image, talking_heads, over_channels, bias_after]
)
def test_other_attention_is_refused(how) -> None:
    net = refusing(how).eval()
    net(torch.randn(1, *IMAGE))
    with pytest.raises(UnsupportedOperatorError, match="is not supported|only a softmax"):
        build_graph(net, IMAGE)


def test_a_learned_query_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.query = nn.Conv2d(3, DIM, 3, 3), nn.Parameter(torch.randn(1, 1, DIM))

        def forward(self, x):
            tokens = self.a(x).flatten(2).transpose(1, 2)
            return F.scaled_dot_product_attention(self.query, tokens, tokens).flatten(1)

    with pytest.raises(UnsupportedOperatorError, match="scaled_dot_product_attention"):
        build_graph(Pooled().eval(), IMAGE)


# Axes


def test_axes_are_split_and_joined_at_whole_steps() -> None:
    axes = image_axes((6, 4, 2))
    split = reshaped(axes, (1, 2, 3, 8))
    assert split == (BATCH, (Part(CHANNELS, 3, 2),), (Part(CHANNELS, 1, 3),), whole(POSITIONS, 8))
    assert reshaped(split, (1, 6, 4, 2)) == axes
    assert reshaped(axes, (1, 4, 12)) is None  # a third of a channel
    assert reshaped(token_axes(6, 8), (8, 6)) == ((*BATCH, *whole(POSITIONS, 8)), whole(CHANNELS, 6))
    assert reshaped(vector_axes(6), (1, 1, 6, 1)) == (BATCH, (), whole(CHANNELS, 6), ())


@pytest.mark.parametrize(
    ("axis", "found"),
    [
        (whole(POSITIONS, 24), ((4, 6), (1, 1))),
        ((Part(POSITIONS, 6, 2), Part(POSITIONS, 1, 3)), ((2, 3), (1, 1))),
        ((Part(POSITIONS, 12, 2), Part(POSITIONS, 3, 2)), ((2, 2), (2, 3))),
        (whole(POSITIONS, 12), ((2, 6), (1, 1))),
        (whole(POSITIONS, 3), ((1, 3), (1, 1))),
        ((Part(POSITIONS, 1, 3), Part(POSITIONS, 6, 2)), None),  # columns before rows
        (whole(POSITIONS, 8), None),  # a row and a third
        (whole(CHANNELS, 4), None),
    ],
)
def test_windows_are_rectangles_of_positions(axis, found) -> None:
    assert window_of(axis, (5, 4, 6)) == found


def test_a_part_of_every_run_of_channels_is_taken() -> None:
    tokens = Seen("x", (24, 2, 2), reshaped(token_axes(24, 4), (1, 4, 2, 12)) or ())
    runs, first, axes = taken(tokens, 3, 4, 4) or (0, 0, ())
    assert (runs, first) == (2, 4)
    assert axes == (BATCH, whole(POSITIONS, 4), (Part(CHANNELS, 4, 2),), whole(CHANNELS, 4))
    assert taken(tokens, 1, 0, 2) is None


# The operator


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        ((8, 8), {"groups": 2}),
        ((8, 8, 8), {"groups": 3}),
        ((8, 2, 8), {"groups": 2}),
        ((8, 8, 8), {"groups": 2, "kernel": (3, 4)}),
        ((8, 8, 8), {"groups": 2, "kernel": (2, 2), "keys": (2, 2)}),
    ],
)
def test_attention_that_does_not_fit_is_an_error(channels, sizes) -> None:
    with pytest.raises(ValueError, match="attention"):
        OpSpec("attention", channels, 4, 4, 8, **{"kernel": (4, 4)} | sizes)


def test_attention_keeps_its_widths_and_counts_both_products() -> None:
    whole_image = OpSpec("attention", (8, 8, 12), 4, 6, 12, groups=2, kernel=(4, 6), biased=True, tokens=True)
    assert whole_image.macs == 24 * 24 * (8 + 12) and whole_image.params == 2 * 24 * 24
    windows = OpSpec("attention", (8, 8, 12), 4, 6, 12, groups=2, kernel=(2, 3))
    assert windows.macs == 24 * 6 * (8 + 12) and windows.params == 0
    for op in (whole_image, windows):
        assert op.family() == op and OpSpec.from_json(op.to_json()) == op
    assert "tokens" not in OpSpec("add", (4, 4), 2, 2, 4).to_json()
