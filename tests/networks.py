"""Networks small enough to write the answer down."""

from __future__ import annotations

from torch import Tensor, nn

from amc_hw.graph import LayerGraph


class Net(nn.Module):
    """A network from named parts and a function of (parts, x)."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def frozen_of(graph: LayerGraph) -> dict[str, str]:
    return {frozen.name: frozen.reason for frozen in graph.frozen}
