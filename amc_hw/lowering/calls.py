"""What PyTorch calls the operators that are known here, and what a graph says of a call."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from amc_hw.padding import Pads, in_plane
from amc_hw.symbolic import CHUNKS, own_line

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.Softplus: "softplus",
    nn.Mish: "mish",
}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.elu: "elu",
    F.softplus: "softplus",
    F.mish: "mish",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    torch.sigmoid_: "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
    torch.tanh_: "tanh",
    torch.abs: "abs",
    "abs": "abs",
    torch.exp: "exp",
    "exp": "exp",
}
IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d)
IDENTITY_FUNCTIONS: tuple[Any, ...] = ("contiguous", "clone", "detach")
#: To a type, which may be what the tensor has.
CASTS: tuple[Any, ...] = ("float", "to", "type_as")
#: Of torchvision, by name: to import it takes as long as PyTorch does, and many networks do without.
STOCHASTIC_DEPTH = ("torchvision.ops.stochastic_depth", "stochastic_depth")
#: What is computed of two operands, by the kind that it is for tensors; quotients are of a number only.
ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    "mul": (operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    "div": (operator.truediv, operator.itruediv, torch.div, "div", "div_"),
}
KIND_OF = {target: kind for kind, targets in ARITHMETIC.items() for target in targets}
SQUARES: tuple[Any, ...] = (operator.pow, torch.pow, "pow", torch.square, "square")
CLIPS: tuple[Any, ...] = (torch.clamp, "clamp", "clamp_", torch.clip, "clip", F.hardtanh)
NEGATIONS: tuple[Any, ...] = (operator.neg, torch.neg, "neg")
MEANS: tuple[Any, ...] = (torch.mean, "mean")
SUMS: tuple[Any, ...] = (torch.sum, "sum")
LARGEST: tuple[Any, ...] = (torch.amax, "amax")
#: With a dimension: of a tuple, whose second part tells where they are.
MAXIMA: tuple[Any, ...] = (torch.max, "max")
#: With the sizes of the result among their arguments, and without.
RESHAPES: tuple[Any, ...] = ("view", "reshape", torch.reshape)
REGROUPS: tuple[Any, ...] = (
    *(torch.flatten, "flatten", torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze"),
    *("unflatten", torch.unflatten, "view_as", "reshape_as"),
)
#: What makes a tensor as large as another, which sums and products do by themselves.
EXPANSIONS: tuple[Any, ...] = ("expand", "expand_as", "broadcast_to", torch.broadcast_to)
#: Of a parameter: another shape of the same numbers.
SAME_NUMBERS: tuple[Any, ...] = (*RESHAPES, *REGROUPS)
PERMUTES: tuple[Any, ...] = (torch.permute, "permute")
TRANSPOSES: tuple[Any, ...] = (torch.transpose, "transpose", torch.swapaxes, "swapaxes", "swapdims")
SPLITS: tuple[Any, ...] = (*CHUNKS, torch.split, "split", torch.unbind, "unbind", "tensor_split")
#: What may share its memory with what it reads.
VIEWS: tuple[Any, ...] = (*SAME_NUMBERS, *PERMUTES, *TRANSPOSES, *SPLITS, operator.getitem, "contiguous")
PRODUCTS: tuple[Any, ...] = (operator.matmul, torch.matmul, "matmul", "__matmul__", torch.bmm, "bmm")
SOFTMAXES: dict[Any, str] = {
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    "softmax": "softmax",
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    "log_softmax": "log_softmax",
}
POOL_MODULES: dict[type[nn.Module], str] = {
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.AvgPool1d: "avg_pool",
    nn.AvgPool2d: "avg_pool",
}
POOL_FUNCTIONS: dict[Any, str] = {
    F.max_pool1d: "max_pool",
    F.max_pool2d: "max_pool",
    F.avg_pool1d: "avg_pool",
    F.avg_pool2d: "avg_pool",
}
#: Without the indices of what is largest.
ADAPTIVE_POOLS: dict[Any, str] = {
    nn.AdaptiveAvgPool1d: "avg_pool",
    nn.AdaptiveAvgPool2d: "avg_pool",
    nn.AdaptiveMaxPool1d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    F.adaptive_avg_pool1d: "avg_pool",
    F.adaptive_avg_pool2d: "avg_pool",
    F.adaptive_max_pool1d: "max_pool",
    F.adaptive_max_pool2d: "max_pool",
}
TOLD = 3  #: of the operators that are not supported, by name
NO_PADS: Pads = ((0, 0), (0, 0))
#: Operators that do the same to every element, or to every channel, wherever it lies.
AS_IT_LIES = ("add", "sub", "mul", "add_scalar", "mul_scalar", "activation", "affine", "prelu", "clip")
#: Operators over tokens, one by one or all of them.
OVER_TOKENS = ("prepend", "take_token", "crop", "add_map")
#: Operators over the channels of images, of tokens and of vectors.
OVER_CHANNELS = ("linear", "layer_norm", "l2_norm", "softmax", "log_softmax", "concat", "slice", "chunk")
#: Forms of tensors whose channels come first and whose positions follow.
PLAIN = ("image", "signal")


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def rank_of(node: fx.Node) -> int | None:
    shape = shape_of(node)
    return None if shape is None else len(shape)


def pair_of(value: Any, across: int | None = None) -> tuple[int, int]:
    """An option as (vertical, horizontal). across: of signals, whose options say nothing of it, the vertical one."""
    if across is not None:
        return in_plane((value,) if isinstance(value, int) else value, across)
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


FRAME = re.compile(r'File "([^"]+)", line (\d+)')  #: of a traceback


def line_of(node: fx.Node) -> str:
    """The line of the network's own code that made a node."""
    return own_line(FRAME.findall(node.stack_trace or ""))


#: Options of activations, in the order of a call's arguments, and what they have to be.
OPTIONS: dict[str, dict[str, Any]] = {
    "gelu": {"approximate": "none"},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}


def _with_options(activation: str | None, given: Mapping[str, Any]) -> str | None:
    """The activation that options make of one; None for one that is not known."""
    if activation == "gelu" and given.get("approximate") == "tanh":
        return "gelu_tanh"
    usual = OPTIONS.get(activation or "", {})
    return activation if all(given.get(name, value) == value for name, value in usual.items()) else None


def called_activation(call: fx.Node) -> str | None:
    """The activation that a call computes; None for none, and where its options make another one of it."""
    activation = ACTIVATION_FUNCTIONS.get(call.target)
    named = zip(OPTIONS.get(activation or "", {}), call.args[1:], strict=False)
    return _with_options(activation, dict(named) | dict(call.kwargs))


def activation_of(module: nn.Module) -> str | None:
    """The activation that a module is, or that its forward() calls and nothing else."""
    if type(module) in ACTIVATION_MODULES:
        return _with_options(ACTIVATION_MODULES[type(module)], vars(module))
    try:
        nodes = list(fx.symbolic_trace(module).graph.nodes)
    except Exception:  # the user's code
        return None
    first = nodes[0].op == "placeholder" and nodes[1].args[:1] == (nodes[0],) if len(nodes) == 3 else False
    return called_activation(nodes[1]) if first else None
