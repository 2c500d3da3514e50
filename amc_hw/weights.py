"""The weights of a network as builders take them, and whether its operators compute what it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.graph import Layer, LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.specs import one_line
from amc_hw.symbolic import BATCH_NORMS, CONVS, INSTANCE_NORMS, TRANSPOSED, batch_norm_affine, eval_mode
from profilers.builders.torch import build
from profilers.builders.weights import weight_shapes
from profilers.ops import SCALAR_KINDS, OpGraph, OpNode

OFF = 1e-2  #: of the largest output: more than rounding


@torch.no_grad()
def folded_weights(module: nn.Module, graph: LayerGraph) -> dict[str, dict[str, np.ndarray]]:
    """Layer name -> weight, bias or index for the builders, batch-norms folded in.

    module: the network of `graph`, at any widths.
    """
    weights: dict[str, dict[str, np.ndarray]] = {}
    for layer in graph.layers:
        if layer.op.kind in ("slice", "chunk"):
            weights[layer.name] = {"start" if layer.op.kind == "slice" else "part": np.array(layer.start)}
        elif layer.op.kind == "prelu":
            named = layer.module and (layer.module if layer.parameter else f"{layer.module}.weight")
            slope = attrgetter(named)(module) if named else torch.tensor(layer.numbers)
            weights[layer.name] = {"weight": _float32(slope.detach())}
        elif layer.op.kind == "clip":
            bounds = zip(("low", "high"), layer.numbers, strict=True)
            weights[layer.name] = {key: np.array(bound, np.float32) for key, bound in bounds}
        elif layer.op.kind in SCALAR_KINDS:
            value = _read(module, layer) if layer.module or layer.constants else torch.tensor(layer.numbers)
            weights[layer.name] = {"value": _float32(value.reshape(()))}
        elif layer.op.kind == "affine" and (layer.parameter or layer.constants):
            scale = _read(module, layer).flatten()
            weights[layer.name] = {"weight": _float32(scale), "bias": np.zeros(len(scale), np.float32)}
        elif layer.op.kind == "add_map":
            op, value = layer.op, _read(module, layer)
            sizes = (op.height * op.width, op.out_channels) if op.tokens else (op.out_channels, op.height, op.width)
            weights[layer.name] = {"value": _float32(value.expand(1, *sizes)[0])}
        elif layer.op.kind == "prepend":
            rows = [constant(module).reshape(-1, layer.op.out_channels) for constant in layer.constants]
            weights[layer.name] = {"value": _float32(torch.cat(rows))}
        elif layer.op.kind == "channel_map":
            index = np.arange(layer.op.out_channels) - layer.start
            weights[layer.name] = {"index": np.where((index >= 0) & (index < layer.op.in_channels[0]), index, -1)}
        elif layer.op.kind == "take_token":
            weights[layer.name] = {"start": np.array(layer.start)}
        elif layer.op.kind == "attention":
            weights[layer.name] = {"scale": np.array(layer.numbers[0], np.float32)}
            if layer.op.biased:
                shape = weight_shapes(OpNode(layer.name, layer.op, ()))["bias"]
                table = torch.atleast_2d(_read(module, layer))  # (..., heads, queries, keys), or 1 in place of each
                weights[layer.name]["bias"] = _float32(table.reshape(-1, *table.shape[-2:]).expand(shape))
        part = module.get_submodule(layer.module) if layer.module and not layer.parameter else None
        if isinstance(part, nn.MultiheadAttention):
            bias = torch.zeros(3 * part.embed_dim) if part.in_proj_bias is None else part.in_proj_bias.detach()
            weights[layer.name] = {"weight": _float32(part.in_proj_weight.detach()), "bias": _float32(bias)}
        elif isinstance(part, ChannelMap):
            weights[layer.name] = {"index": np.array(part.index, dtype=np.int64)}
        elif isinstance(part, BATCH_NORMS):
            scale, shift = batch_norm_affine(part, dtype=torch.float64)
            weights[layer.name] = {"weight": _float32(scale), "bias": _float32(shift)}
        elif isinstance(part, (nn.LayerNorm, nn.GroupNorm, *INSTANCE_NORMS)):
            count = part.num_features if isinstance(part, INSTANCE_NORMS) else layer.op.out_channels
            scale = torch.ones(count) if part.weight is None else part.weight.detach()
            shift = torch.zeros(count) if part.bias is None else part.bias.detach()
            eps = np.array(part.eps, np.float32)
            weights[layer.name] = {"weight": _float32(scale), "bias": _float32(shift), "eps": eps}
        elif isinstance(part, (*CONVS, *TRANSPOSED, nn.Linear)) or layer.op.kind in ("linear", "conv"):
            given, rest = _weight_and_bias(module, layer, part)
            weight = given.double()
            if layer.op.kind != "linear":  # of signals, or of a linear layer on a channels-last image
                weight = weight.reshape(*weight.shape[:2], *layer.op.kernel)
            count = weight.shape[1 if isinstance(part, TRANSPOSED) else 0]
            bias = torch.zeros(count, dtype=torch.float64) if rest is None else rest.double()
            if layer.batch_norm is not None:
                scale, offset = batch_norm_affine(module.get_submodule(layer.batch_norm), dtype=torch.float64)
                bias = bias * scale + offset
                weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            for factor in layer.factors:
                times = attrgetter(factor)(module).detach().double().reshape(()) if isinstance(factor, str) else factor
                weight, bias = weight * times, bias * times
            weights[layer.name] = {"weight": _float32(weight), "bias": _float32(bias)}
    return weights


def _weight_and_bias(module: nn.Module, layer: Layer, part: Any) -> tuple[Tensor, Tensor | None]:
    """Of a product's layer, or where it has none computed of parameters."""
    if part is None:
        weight, *rest = (constant(module) for constant in layer.constants)
        return weight, rest[0] if rest else None
    return part.weight.detach(), None if part.bias is None else part.bias.detach()


def _read(module: nn.Module, layer: Layer) -> Tensor:
    """The parameter of a layer, or what it reads that is computed of parameters."""
    if layer.constants:
        return layer.constants[0](module)
    value: Tensor = attrgetter(str(layer.module))(module).detach()
    return value


def _float32(tensor: Tensor) -> np.ndarray:
    """As float32, subnormal numbers as zero: they make the same shapes many times slower on some processors."""
    values = tensor.to(torch.float32)
    return values.masked_fill(values.abs() < torch.finfo(torch.float32).tiny, 0.0).numpy()


def as_read(network: OpGraph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of the network's own shapes in those that its operators read: a signal is an image of one row."""
    return [part.reshape(len(part), *shape) for part, shape in zip(inputs, network.inputs.values(), strict=True)]


def drawn(shapes: Iterable[Sequence[int]], count: int) -> list[Tensor]:
    """Random inputs, `count` of each; shapes: of one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, *shape, generator=generator) for shape in shapes]


@torch.no_grad()
def check_reading(module: nn.Module, graph: LayerGraph, examples: Sequence[Tensor]) -> None:
    """UnsupportedOperatorError where the operators that were read from a network do not compute what it does: for two
    random images, so that a network is found, too, in which one image has a part in what another gives.

    examples: as of `build_graph`. What one forward pass takes, twice.
    """
    inputs = drawn((example.shape[1:] for example in examples), 2)
    try:
        with eval_mode(module):
            wanted = [each for each in tree_leaves(module(*inputs)) if isinstance(each, Tensor)]
    except Exception as error:  # the user's code
        raise UnsupportedOperatorError(f"{type(module).__name__} fails on two images: {one_line(error)}") from error
    network = graph.op_graph()
    found = build(network, folded_weights(module, graph))(*as_read(network, inputs))
    for name, right, made in zip(graph.outputs, wanted, found, strict=True):
        largest = float(right.abs().max())
        off = float((made.reshape(right.shape) - right).abs().max()) if made.numel() == right.numel() else float("inf")
        if np.isfinite(largest) and not off <= OFF * largest:
            raise UnsupportedOperatorError(
                f"{type(module).__name__} does not compute what its operators do: {name} is off by {off:.2g} (largest "
                f"{largest:.2g}): write it without hooks, and so that images and tensors in memory stay apart"
            )
