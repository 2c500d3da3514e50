"""Tensors that a network's code computes of its parameters alone: position embeddings, tables of relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from amc_hw.lowering.calls import rank_of
from amc_hw.symbolic import Asked, of_images, sizes_asked

CONSTANT = "constant"  #: in the `meta` of such nodes
WRITTEN = "_tensor_constant"  #: what torch.fx calls tensors of the code itself, which no module holds
#: Calls that take the number of images to make copies of the same.
COPIES = (
    *("expand", "repeat", "broadcast_to", "tile", "view", "reshape"),
    *("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"),
)


def is_constant(node: fx.Node) -> bool:
    return bool(node.meta.get(CONSTANT))


def follows_from_constants(node: fx.Node) -> bool:
    """Whether a node whose sources are known reads parameters, and numbers, alone. What has a copy for every image is
    the same for each; anything else that follows from how many images there are is none."""
    if node.op in ("placeholder", "output"):
        return False
    others = [source for source in node.all_input_nodes if not is_constant(source)]
    if any("tensor_meta" in source.meta for source in others):
        return False
    copies = getattr(node.target, "__name__", str(node.target)) in COPIES
    return copies or not any(of_images(sizes_asked(source, rank_of) or set()) for source in others)


class Constant:
    """What a node computes of the parameters of a module, whatever they are by then."""

    def __init__(self, node: fx.Node, root: nn.Module, shape: Sequence[int] | None = None) -> None:
        """root: what torch.fx traced. Sizes of the network's inputs are what they were in the trace. shape: that its
        numbers are given.

        asked: these. read: names of the modules whose parameters are read, or that are called.
        """
        self._graph, self._held, self._shape = fx.Graph(), dict[str, Tensor](), shape
        self.asked: Asked = set()
        self.read: set[str] = set()
        copied: dict[fx.Node, Any] = {}
        for each in _ancestors(node):
            for source in each.all_input_nodes:
                if not is_constant(source):
                    self.asked |= sizes_asked(source, rank_of) or set()
            if each.op in ("get_attr", "call_module"):
                self.read.add(str(each.target) if each.op == "call_module" else str(each.target).rpartition(".")[0])
            if each.op == "get_attr" and str(each.target).startswith(WRITTEN):
                self._held[str(each.target)] = getattr(root, str(each.target)).detach().clone()
            copied[each] = self._graph.node_copy(each, lambda source: _copied(source, copied))
        self._graph.output(copied[node])

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Tensor:
        found: Tensor = _Reader(module, self._graph, self._held).run().detach()
        return found if self._shape is None else found.reshape(tuple(self._shape))


class _Reader(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, held: dict[str, Tensor]) -> None:
        super().__init__(module, graph=graph)
        self.held = held

    def fetch_attr(self, target: str) -> Any:
        return self.held[target] if target in self.held else super().fetch_attr(target)


def _copied(node: fx.Node, copied: dict[fx.Node, Any]) -> Any:
    return copied[node] if node in copied else node.meta["known"]


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The constant nodes that a node follows from, it last, in the order of the graph."""
    wanted, found = [node], dict.fromkeys([node])
    while wanted:
        for source in wanted.pop().all_input_nodes:
            if is_constant(source) and source not in found:
                found[source] = None
                wanted.append(source)
    return [each for each in node.graph.nodes if each in found]
