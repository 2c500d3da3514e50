"""Networks small enough to write the answer down."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from amc_hw.export import export_network
from amc_hw.graph import LayerGraph, build_graph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.prune import Kept, _map_like, keep_channels, kept_axes, oriented_weight, slice_channels
from amc_hw.refit import refit_faithful

FORMATS = ["onnx"] + ["tflite"] * (importlib.util.find_spec("ai_edge_litert") is not None)


class Net(nn.Module):
    """A network from named parts and a function of (parts, x)."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def halved(graph: LayerGraph) -> list[int]:
    """Half the channels of every group, or as near below as its blocks allow; one block at least."""
    return [max(1, group.width // 2 // group.block) * group.block for group in graph.groups]


def frozen_of(graph: LayerGraph) -> dict[str, str]:
    return {frozen.name: frozen.reason for frozen in graph.frozen}


@torch.no_grad()
def mask_channels(module: nn.Module, graph: LayerGraph, kept: Kept) -> nn.Module:
    """A full-size copy that computes what the sliced network does: nothing reads the removed channels.

    Weights of consumers are zero, and indices of a `ChannelMap` are -1, where they would read one.
    """
    masked = copy.deepcopy(module)
    for name, axes in kept_axes(graph, kept).items():
        if axes.into is None:
            continue
        reader = masked.get_submodule(name)
        if isinstance(reader, ChannelMap):
            stays = set(axes.into.tolist())
            index = [i if i in stays else -1 for i in reader.index]
            masked.set_submodule(name, _map_like(reader, index, reader.in_channels))
        else:
            weight = oriented_weight(reader, name)
            removed = torch.ones(weight.shape[1], dtype=torch.bool)
            removed[torch.from_numpy(axes.into)] = False
            weight[:, removed.to(weight.device)] = 0
    return masked


def with_statistics(net: nn.Module, spread: float = 0.1) -> nn.Module:
    """The network in eval mode, its batch-norms as if it had been trained. spread: of their means."""
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, spread)
            part.running_var.uniform_(0.5, 1.5)
    return net.eval()


def half_and_exported(net: nn.Module, image: Tensor, tmp_path: Path) -> LayerGraph:
    """The graph of a network whose half is right, refits, and is what both files of it compute."""
    torch.manual_seed(0)
    graph = build_graph(with_statistics(net), tuple(image.shape[1:]))
    half = halved(graph)
    kept = keep_channels(net, graph, half)
    small, masked = slice_channels(net, graph, kept), mask_channels(net, graph, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(image), masked(image), rtol=1e-4, atol=1e-5)
    wanted, before = net(image), (small(image) - net(image)).square().mean()
    refit_faithful(small, net, graph, kept, image, rows_per_layer=400)
    assert (small(image) - wanted).square().mean() <= before
    for file_format in FORMATS:
        out = tmp_path / file_format
        assert export_network(small, graph, graph.op_graph(half), image, file_format=file_format, out=out)["bytes"]
    return graph


def kinds(graph: LayerGraph) -> list[str]:
    return [op.kind for op in graph.op_graph().ops]
