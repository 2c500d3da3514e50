"""A module as torch.fx sees it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from amc_hw.errors import UserError
from amc_hw.models.channel_map import ChannelMap
from amc_hw.specs import one_line

#: As of `origin`: to import torchvision takes as long as PyTorch does, and many networks do without.
PERMUTE = ("torchvision.ops.misc", "Permute")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # classes derived of them, too
        leaves = ChannelMap | nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm | nn.Linear
        if isinstance(module, leaves) or origin(type(module)) == PERMUTE:
            return True
        return super().is_leaf_module(module, qualified_name)


def trace_fx(module: nn.Module) -> fx.GraphModule:
    """The fx graph of a module in eval mode; UserError where torch.fx cannot trace it.

    Arguments of forward() that have a default keep it.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if needed := [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]:
        name = type(module).__name__
        raise UserError(f"forward() of {name} needs the keyword argument {needed[0]!r}: give a factory that wraps it")
    constants = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        graph = _Tracer().trace(module, constants or None)
        _drop_constants(graph, constants)
        return fx.GraphModule(module, graph)
    except Exception as error:  # tracing runs the user's forward: anything can be raised
        reason = one_line(error)
        raise UserError(
            f"{type(module).__name__} cannot be traced by torch.fx ({reason}): give a factory that returns a module "
            "whose forward() takes tensors only, by position, and does not branch on their values"
        ) from error


def _drop_constants(graph: fx.Graph, constants: Mapping[str, Any]) -> None:
    """Without the inputs that are constants, and what torch.fx adds to check that they are."""
    names = {node: str(node.target) for node in graph.nodes if node.op == "placeholder"}
    doomed = {node for node, name in names.items() if name in constants or name.rpartition("_")[0] in constants}
    for node in graph.nodes:
        if node.all_input_nodes and doomed.issuperset(node.all_input_nodes):
            doomed.add(node)
    for node in reversed(list(graph.nodes)):
        if node in doomed:
            graph.erase_node(node)


def own_tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers."""
    return {name: value for name, value in (*part._parameters.items(), *part._buffers.items()) if value is not None}


def has_computed_weight(part: nn.Module) -> bool:
    """Whether a module's weight is no parameter of its own but computed, as by `torch.nn.utils.parametrizations`."""
    return part._parameters.get("weight") is None and isinstance(getattr(part, "weight", None), torch.Tensor)


def shared_tensors(module: nn.Module) -> set[int]:
    """Ids of the tensors that several of the network's modules hold; a batch-norm's count is in none."""
    owners = Counter(id(value) for part in module.modules() for value in own_tensors(part).values() if value.dim())
    return {tensor for tensor, count in owners.items() if count > 1}


def holds_any(part: nn.Module, tensors: set[int]) -> bool:
    """Whether a module holds one of the tensors of these ids itself."""
    return any(id(value) in tensors for value in own_tensors(part).values())


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


def batch_norm_affine(norm: nn.Module, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch-norm in eval mode multiplies by and adds, (channels,) each."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight, norm.bias.to(dtype)
    return scale, shift - scale * norm.running_mean


@torch.no_grad()
def gives(layer: nn.Module, drawn: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a layer's own forward(), perhaps of a derived class, makes `wanted` of `drawn`."""
    try:
        found = layer.forward(drawn)  # without hooks, which may ask for this
    except Exception:  # the user's code, called with an image alone
        return False
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def origin(thing: Any) -> tuple[str, str]:
    """The module that a class or function was defined in, and its name there."""
    return getattr(thing, "__module__", ""), getattr(thing, "__name__", "")
