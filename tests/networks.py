"""Networks small enough to write the answer down."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from amc_hw.graph import LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.prune import Kept, _map_like, kept_axes, oriented_weight


class Net(nn.Module):
    """A network from named parts and a function of (parts, x)."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


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
