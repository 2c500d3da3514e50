"""torch.fx -> operators in execution order: batch-norms folded into the layer before, activations fused."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.lowering.calls import (
    CLIPS,
    DROPOUTS,
    FRAME,
    IDENTITY_MODULES,
    KIND_OF,
    MEANS,
    STOCHASTIC_DEPTH,
    SUMS,
    VIEWS,
    shape_of,
)
from amc_hw.lowering.constants import CONSTANT, follows_from_constants
from amc_hw.lowering.values import TracedOps
from amc_hw.lowering.walk import Lowering
from amc_hw.specs import one_line
from amc_hw.symbolic import PERMUTE, asks_for_size, origin, own_line, readers, trace_fx

#: Of a tensor and parameters: the operation on what the second one makes of these.
OPPOSITE: dict[Any, tuple[Any, Any]] = {
    **dict.fromkeys((operator.sub, torch.sub, "sub"), (operator.add, torch.neg)),
    **dict.fromkeys((operator.truediv, torch.div, "div"), (operator.mul, torch.reciprocal)),
}


def trace_ops(module: nn.Module, *examples: torch.Tensor) -> TracedOps:
    """The operators of `module` for example inputs, (N, C, H, W) or (N, C) each, in execution order."""
    graph_module, asked = trace_fx(module, examples)
    _spell_out_gates(graph_module)
    _turn_parameters(graph_module)
    try:
        with torch.no_grad():
            _Shapes(graph_module).propagate(*examples)
    except Exception as error:
        name, shapes = type(module).__name__, " and ".join(str(tuple(example.shape)) for example in examples)
        place = own_line(FRAME.findall(str(error)))  # PyTorch wraps what was raised, and tells of the node
        reason = one_line(error.__cause__ or error)
        told = f"{reason}, {place}" if place else reason
        raise UserError(f"{name} fails on an input of shape {shapes}: {told}") from error
    _spell_out_sums(graph_module)
    _read_what_is_written(graph_module, type(module).__name__)
    return Lowering(graph_module, asked).run()


def _spell_out_gates(graph_module: fx.GraphModule) -> None:
    """A gated linear unit (Dauphin et al., ICML 2017) as the halves, the sigmoid and the product that it is."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        part = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(part, nn.GLU) and node.target not in (F.glu, "glu"):
            continue
        given: Any = (*node.args, *node.kwargs.values())
        source, dim = (*given, part.dim if isinstance(part, nn.GLU) else -1)[:2]
        with graph.inserting_before(node):
            halves = graph.call_function(torch.chunk, (source, 2, dim))
            first, second = (graph.call_function(operator.getitem, (halves, half)) for half in (0, 1))
            gate = graph.call_function(torch.sigmoid, (second,))
        for made in (halves, first, second, gate):
            made.meta = dict(node.meta)
        node.op, node.target, node.args, node.kwargs = "call_function", operator.mul, (first, gate), {}


def _spell_out_sums(graph_module: fx.GraphModule) -> None:
    """The sum or the mean of tensors that are stacked for it, as additions."""
    graph = graph_module.graph
    for stack in [node for node in graph.nodes if node.target is torch.stack]:
        known: Any = {"dim": 0} | dict(zip(("tensors", "dim"), stack.args, strict=False)) | dict(stack.kwargs)
        parts, rank = known["tensors"], len(shape_of(stack) or ())
        for node in [user for user in stack.users if user.target in (*SUMS, *MEANS)]:
            given: Any = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
            dims = given.get("dim", given.get("axis"))
            along = [dims] if isinstance(dims, int) else dims
            plain = set(given) <= {"input", "dim", "axis", "keepdim"} and not given.get("keepdim")
            if not plain or along is None or [each % rank for each in along] != [known["dim"] % rank]:
                continue
            with graph.inserting_before(stack):  # what is written into its parts afterwards is not in it
                total = parts[0]
                for part in parts[1:]:
                    total = graph.call_function(operator.add, (total, part))
                    total.meta = dict(node.meta)
                if node.target in MEANS:
                    total = graph.call_function(operator.truediv, (total, len(parts)))
                    total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        if not stack.users:
            graph.erase_node(stack)


def _turn_parameters(graph_module: fx.GraphModule) -> None:
    """What is subtracted of a tensor, or what that is divided by, as what is added to it or multiplies it, where it
    follows from parameters alone."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        target, turned = OPPOSITE.get(node.target, (None, None))
        if target is None or turned is None or len(node.args) != 2 or node.kwargs:
            continue
        tensor, other = node.args
        if not isinstance(tensor, fx.Node) or not isinstance(other, fx.Node) or _of_parameters(tensor):
            continue
        if _of_parameters(other):
            with graph.inserting_before(node):
                made = graph.call_function(turned, (other,))
            made.meta = dict(node.meta)
            node.op, node.target, node.args = "call_function", target, (tensor, made)


def _of_parameters(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    called = node.op in ("call_function", "call_method") and bool(sources)
    return node.op == "get_attr" or (called and all(map(_of_parameters, sources)))


class _Shapes(ShapeProp):
    """Notes what is no tensor, and what depends on parameters alone, too."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "tensor_meta" not in n.meta:
            n.meta["known"] = result
        elif isinstance(result, torch.Tensor) and follows_from_constants(n):
            n.meta[CONSTANT] = True
        return result


def _read_what_is_written(graph_module: fx.GraphModule, name: str) -> None:
    """Where a tensor is written in place, those that read it afterwards read what was written.

    UnsupportedOperatorError where that is an input, or is read by another name afterwards.
    """
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in order:
        if not node.all_input_nodes or not _in_place(graph_module, node):
            continue
        source: fx.Node | None = node.all_input_nodes[0]
        if shape_of(node.all_input_nodes[0]) is None:  # a size
            continue
        if told := _read_elsewhere(graph_module, node, order):
            raise UnsupportedOperatorError(
                f"{name} writes into {told} in place ({node.name}): write x = x + 1, not x += 1"
            )
        while source is not None:
            for reader in [user for user in source.users if order[user] > order[node]]:
                reader.replace_input_with(source, node)
            source = source.all_input_nodes[0] if _is_its_input(graph_module, source) else None


def _read_elsewhere(graph_module: fx.GraphModule, node: fx.Node, order: Mapping[fx.Node, int]) -> str | None:
    """What a node writes into by another name: an input, or a tensor that is read later. (To cut off what is below zero
    once more changes nothing: rectifiers may write into the input.)"""
    source = node.all_input_nodes[0]
    itself, whole = [source], True  # what the written tensor is, under other names
    while source.op != "placeholder" and (_is_its_input(graph_module, source) or _is_view(graph_module, source)):
        whole = whole and _is_its_input(graph_module, source)
        source = source.all_input_nodes[0]
        itself += [source] if whole else []
    if source.op == "placeholder" and node.target in (*KIND_OF, *CLIPS):
        return f"its input {source.name}"
    known = [source]  # all that lies in that memory, as it was before
    for each in known:
        if each not in itself and any(order[user] > order[node] for user in readers(each)):
            return f"a part or a view of {source.name}"
        known += [
            user
            for user in each.users
            if user is not node and order[user] < order[node] and each is user.all_input_nodes[0]
            if _is_its_input(graph_module, user) or _is_view(graph_module, user)
        ]
    return None


def _is_its_input(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives its input itself, so that to write the one is to write the other."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), IDENTITY_MODULES)
    return node.target in (*DROPOUTS, "detach") or origin(node.target) == STOCHASTIC_DEPTH


def _is_view(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's tensor may lie in the memory of what it reads."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten | nn.Unflatten) or origin(type(module)) == PERMUTE
    return node.target in VIEWS or (node.target is getattr and not asks_for_size(node))


def _in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    called = getattr(node.target, "__name__", "")
    return bool(node.op == "call_function" and (node.kwargs.get("inplace") or called.endswith("_")))
