"""`OpGraph` + weights -> a PyTorch module that runs it, for GPUs. Names of nodes kept, batch-norms already folded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profilers.builders.weights import Weights, checked_weights, first_channel
from profilers.builders.windows import parts_of, windows_of
from profilers.errors import UnsupportedOperatorError
from profilers.ops import ANY_RANK_KINDS, CONV_KINDS, SCALAR_KINDS, OpGraph, OpNode, OpSpec

LABEL = "node "  #: before a node's name: the profiler takes a bare "2.0" for a mangled C++ name, and shortens it
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "abs": torch.abs,
    "exp": torch.exp,
}


class Network(nn.Module):
    """Takes the graph's inputs in order, (N, C, H, W), (N, C) or tokens (N, H * W, C); returns its outputs likewise.

    labelled: whether every node runs under `torch.profiler.record_function` with its name.
    """

    def __init__(self, graph: OpGraph, weights: Weights, *, labelled: bool = False) -> None:
        super().__init__()
        checked_weights(graph, weights)
        self.graph, self.labelled = graph, labelled
        self.starts: dict[str, int] = {}  # of nodes that read a run of channels
        self.numbers: dict[str, float] = {}  # of nodes that have them, by buffer name
        self.vectors = {name for name, shape in graph.inputs.items() if len(shape) == 1}
        last = {source: node.name for node in graph.nodes for source in node.inputs if source not in graph.outputs}
        self.last_reads: dict[str, list[str]] = {}  # by node: what no later one reads
        for source, node_name in last.items():
            self.last_reads.setdefault(node_name, []).append(source)
        for node in graph.nodes:
            unknown = (node.op.kind == "max_pool" and node.op.dilation != (1, 1)) or (
                node.op.kind == "avg_pool" and node.op.ceil
            )
            if node.op.fused_add or node.op.dtype != "float32" or unknown:
                raise UnsupportedOperatorError(f"{node.name}: {node.op} cannot be run by PyTorch")
            if self._gives_vector(node):
                self.vectors.add(node.name)
            if node.op.kind in ("slice", "chunk", "take_token"):
                self.starts[node.name] = first_channel(node.op, weights[node.name])
            for part, array in weights.get(node.name, {}).items():
                if array.ndim:
                    value = torch.tensor(array.astype("int64") if part == "index" else array)
                    self.register_buffer(_key(node.name, part), value)
                else:
                    self.numbers[_key(node.name, part)] = array.item()

    def _gives_vector(self, node: OpNode) -> bool:
        if node.op.gives_tokens:
            return False
        if node.op.kind in ("linear", "flatten", "take_token"):
            return True
        if node.op.kind == "global_avg_pool":  # a pooled image stays one until it leaves the network
            return node.op.tokens or node.name in self.graph.outputs
        return node.op.kind in ANY_RANK_KINDS and self.vectors.issuperset(node.inputs)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        for node in self.graph.nodes:
            if self.labelled:
                with torch.profiler.record_function(f"{LABEL}{node.name}"):
                    values[node.name] = self._run(node, values)
            else:
                values[node.name] = self._run(node, values)
            # their memory is free for the next, as in a network's own code
            for read in self.last_reads.get(node.name, ()):
                del values[read]
        return [values[name] for name in self.graph.outputs]

    def _run(self, node: OpNode, values: dict[str, Tensor]) -> Tensor:
        image = node.name not in self.vectors and node.op.kind not in ("linear", "flatten")
        inputs = [
            values[source][:, :, None, None] if image and source in self.vectors else values[source]
            for source in node.inputs
        ]
        found = self._compute(node.op, node.name, inputs)
        return ACTIVATIONS[node.op.activation](found)

    def _compute(self, op: OpSpec, name: str, inputs: list[Tensor]) -> Tensor:
        def part(which: str) -> Tensor:
            value: Tensor = getattr(self, _key(name, which))
            return value

        def per_channel(which: str) -> Tensor:
            return part(which).reshape(-1, 1, 1) if x.dim() == 4 else part(which)

        x, channels = inputs[0], 2 if op.tokens else 1
        if op.kind in CONV_KINDS:
            padding = op.padding
            if op.padding_end:
                x, padding = _zeros_around(x, op), (0, 0)
            return F.conv2d(x, part("weight"), part("bias"), op.stride, padding, op.dilation, op.groups)
        if op.kind == "conv_transpose":
            more = tuple(first - end for first, end in zip(op.padding, op.padding_after, strict=True))
            return F.conv_transpose2d(x, part("weight"), part("bias"), op.stride, op.padding, more, 1, op.dilation)
        if op.kind == "channel_map":
            index = part("index")
            kept = x[:, :, :: op.stride[0], :: op.stride[1]].index_select(1, index.clamp(min=0))
            return kept * (index >= 0).to(x.dtype)[:, None, None]
        if op.kind == "linear":
            return F.linear(x if op.tokens else x.flatten(1), part("weight"), part("bias"))
        if op.kind in ("add", "shift"):
            return inputs[0] + inputs[1]
        if op.kind == "sub":
            return inputs[0] - inputs[1]
        if op.kind in ("mul", "scale", "mask"):
            return inputs[0] * inputs[1]
        if op.kind == "channel_mean":
            return x.mean(1, keepdim=True)
        if op.kind == "channel_max":
            return x.amax(1, keepdim=True)
        if op.kind == "l2_norm":
            return F.normalize(x, dim=channels)
        if op.kind == "unflatten":
            return x.reshape(len(x), op.out_channels, *op.out_size)
        if op.kind == "rows_to_channels":
            return x.flatten(1, 2)[:, :, None]
        if op.kind == "adaptive_avg_pool":
            return F.adaptive_avg_pool2d(x, (op.out_height, op.out_width))
        if op.kind in SCALAR_KINDS:
            value = self.numbers[_key(name, "value")]
            return x + value if op.kind == "add_scalar" else x * value
        if op.kind == "affine":
            return x * per_channel("weight") + per_channel("bias")
        if op.kind == "prelu":
            return torch.where(x > 0, x, x * part("weight")) if op.tokens else F.prelu(x, part("weight"))
        if op.kind == "softmax":
            return x.softmax(channels)
        if op.kind == "log_softmax":
            return x.log_softmax(channels)
        if op.kind == "group_norm":
            return F.group_norm(x, op.groups, part("weight"), part("bias"), self.numbers[_key(name, "eps")])
        if op.kind == "instance_norm":
            eps = self.numbers[_key(name, "eps")]
            return F.instance_norm(x, weight=part("weight"), bias=part("bias"), eps=eps)
        if op.kind == "layer_norm":
            last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
            eps = self.numbers[_key(name, "eps")]
            normed = F.layer_norm(last, (op.out_channels,), part("weight"), part("bias"), eps)
            return normed.permute(0, 3, 1, 2) if x.dim() == 4 else normed
        if op.kind == "slice" and op.groups > 1:
            runs = x.unflatten(channels, (op.groups, -1))
            kept = runs.narrow(channels + 1, self.starts[name], op.out_channels // op.groups)
            return kept.flatten(channels, channels + 1)
        if op.kind in ("slice", "chunk"):
            return x.narrow(channels, self.starts[name], op.out_channels)
        if op.kind == "shuffle":
            apart = x.reshape(len(x), op.groups, op.out_channels // op.groups, *x.shape[2:])
            return apart.transpose(1, 2).reshape(x.shape)
        if op.kind == "clip":
            return x.clamp(*(self.numbers[_key(name, which)] for which in ("low", "high")))
        if op.kind == "crop" and op.tokens:
            return x[:, op.padding[0] : op.height - op.padding_after[0]]
        if op.kind == "add_map":
            return x + part("value")
        if op.kind == "prepend":
            return torch.cat([part("value").expand(len(x), -1, -1), x], 1)
        if op.kind == "take_token":
            return x[:, self.starts[name]]
        if op.kind == "to_tokens":
            return x.flatten(2).transpose(1, 2)
        if op.kind == "to_image":
            return x.transpose(1, 2).unflatten(2, (op.height, op.width))
        if op.kind == "attention":
            bias = part("bias") if op.biased else None
            return _attention(op, inputs, bias, self.numbers[_key(name, "scale")])
        if op.kind == "crop":
            (top, left), (bottom, right) = op.padding, op.padding_after
            return x[:, :, top : op.height - bottom, left : op.width - right]
        if op.kind == "pad":
            return _zeros_around(x, op)
        if op.kind == "pixel_shuffle":
            return F.pixel_shuffle(x, op.stride[0])
        if op.kind == "upsample_nearest":
            return F.interpolate(x, (op.out_height, op.out_width), mode="nearest")
        if op.kind == "upsample_bilinear":
            size = op.out_height, op.out_width
            return F.interpolate(x, size, mode="bilinear", align_corners=op.align_corners)
        if op.kind == "concat":
            return torch.cat(inputs, channels)
        if op.kind == "join":
            return torch.cat(inputs, 1)
        if op.kind == "regroup":
            return x.reshape(len(x), op.out_height, op.out_channels)
        if op.kind == "max_pool":
            return F.max_pool2d(x, op.kernel, op.stride, op.padding, ceil_mode=op.ceil)
        if op.kind == "avg_pool":
            return F.avg_pool2d(x, op.kernel, op.stride, op.padding, count_include_pad=not op.exclude_pad)
        if op.kind == "global_avg_pool" and op.tokens:
            return x.mean(1)
        if op.kind == "global_avg_pool":
            pooled = x.mean((2, 3), keepdim=True)
            return pooled.flatten(1) if name in self.vectors else pooled
        if op.kind == "flatten":
            return x.flatten(1)
        if op.kind == "activation":
            return x
        raise AssertionError(op.kind)


def build(graph: OpGraph, weights: Weights) -> Network:
    """The network in eval mode, on the CPU."""
    return Network(graph, weights).eval()


def _attention(op: OpSpec, inputs: list[Tensor], bias: Tensor | None, scale: float) -> Tensor:
    first, heads = not op.tokens, op.groups
    windows = windows_of(op, channels_first=first)
    read = []
    for x, (_, _, width) in zip(inputs, parts_of(op), strict=True):
        if windows is not None:
            split = x.flatten(2).unflatten(2, windows.divided) if first else x.unflatten(1, windows.divided)
            x = split.permute(windows.order)
            count = len(windows.gathered) - 2
            x = x.flatten(0, count)
        x = x.flatten(2).transpose(1, 2) if first else x.flatten(1, -2)
        x = x.unflatten(2, (-1, width)).transpose(1, 2)
        read.append(x.expand(-1, heads, -1, -1))
    query, key, value = read
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    out = found.transpose(2, 3).flatten(1, 2) if first else found.transpose(1, 2).flatten(2)
    if windows is not None:
        parts, inside = windows.gathered, len(windows.gathered) - 2
        sizes = (op.out_channels, *parts[inside:]) if first else (*parts[inside:], op.out_channels)
        out = out.reshape(-1, *parts[:inside], *sizes).permute(windows.back)
        out = out.flatten(2) if first else out.flatten(1, -2)
    return out.unflatten(2, (op.height, op.width)) if first else out


def _zeros_around(x: Tensor, op: OpSpec) -> Tensor:
    (top, left), (bottom, right) = op.padding, op.padding_after
    return F.pad(x, (left, right, top, bottom))


def _key(name: str, part: str) -> str:
    """A name that a buffer may have."""
    return f"{name.replace('.', '__')}--{part}"
