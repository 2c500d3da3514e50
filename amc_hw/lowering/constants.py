"""Tensors that a network's code computes of its parameters alone: position embeddings, tables of relative positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

CONSTANT = "constant"  #: in the `meta` of such nodes
WRITTEN = "_tensor_constant"  #: what torch.fx calls tensors of the code itself, which no module holds


def is_constant(node: fx.Node) -> bool:
    return bool(node.meta.get(CONSTANT))


def follows_from_constants(node: fx.Node) -> bool:
    """Whether a node whose sources are known reads parameters, and numbers, alone."""
    if node.op in ("placeholder", "output"):
        return False
    return all(is_constant(source) or "tensor_meta" not in source.meta for source in node.all_input_nodes)


class Constant:
    """What a node computes of the parameters of a module, whatever they are by then."""

    def __init__(self, node: fx.Node, root: nn.Module) -> None:
        """root: what torch.fx traced. Sizes of the network's inputs are what they were in the trace."""
        self._graph, self._held = fx.Graph(), dict[str, Tensor]()
        copied: dict[fx.Node, Any] = {}
        for each in _ancestors(node):
            if each.op == "get_attr" and str(each.target).startswith(WRITTEN):
                self._held[str(each.target)] = getattr(root, str(each.target)).detach().clone()
            copied[each] = self._graph.node_copy(each, lambda source: _copied(source, copied))
        self._graph.output(copied[node])

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Tensor:
        found: Tensor = _Reader(module, self._graph, self._held).run().detach()
        return found


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
