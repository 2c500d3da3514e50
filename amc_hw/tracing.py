"""torch.fx -> operators in execution order: batch-norms folded into the layer before, activations fused.

A tensor may be channels-first (N, C, H, W), a vector (N, C), or, between two permutations, channels-last (N, H, W, C):
there a linear layer is a convolution of one pixel.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.models.channel_map import ChannelMap
from amc_hw.padding import Pads, around, padding_of
from amc_hw.specs import one_line
from amc_hw.symbolic import (
    BATCH_NORMS,
    HAS_GROUPS,
    PERMUTE,
    Asked,
    asks_for_size,
    gives,
    origin,
    readers,
    sizes_asked,
    trace_fx,
)
from profilers.ops import CONV_KINDS, KINDS, SCALAR_KINDS, OpGraph, OpSpec

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
IDENTITY_FUNCTIONS: tuple[Any, ...] = (F.dropout, F.dropout2d, "contiguous", "clone", "detach")
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
CLIPS: tuple[Any, ...] = (torch.clamp, "clamp", "clamp_", torch.clip, "clip", F.hardtanh)
NEGATIONS: tuple[Any, ...] = (operator.neg, torch.neg, "neg")
MEANS: tuple[Any, ...] = (torch.mean, "mean")
RESHAPES: tuple[Any, ...] = ("view", "reshape", torch.reshape)
FLATTEN_CALLS: tuple[Any, ...] = (torch.flatten, "flatten", *RESHAPES)
#: Of a parameter: another shape of the same numbers.
SAME_NUMBERS: tuple[Any, ...] = (*FLATTEN_CALLS, torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze")
#: What may share its memory with what it reads.
VIEWS: tuple[Any, ...] = (
    *(*FLATTEN_CALLS, operator.getitem, torch.chunk, "chunk", torch.split, "split", torch.permute, "permute"),
    *(torch.transpose, "transpose", "contiguous", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"),
)
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
POOL_FUNCTIONS: dict[Any, str] = {F.max_pool2d: "max_pool", F.avg_pool2d: "avg_pool"}
TOLD = 3  #: of the operators that are not supported, by name
NO_PADS: Pads = ((0, 0), (0, 0))
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class TracedOp:
    """An operator with the modules it came from; `inputs` are names of earlier ones or of the network's inputs.

    module: dotted name of the module that holds the weights, or of a `parameter` that is read as it is.
    start: a slice's first channel, a chunk's number. numbers: the slope of a `prelu` without weights, what a scalar
    operator without a parameter adds or multiplies by, the bounds of a `clip`. factors: of the weights, after a
    batch-norm; numbers, or names of parameters.
    """

    name: str
    op: OpSpec
    inputs: tuple[str, ...]
    module: str | None = None
    batch_norm: str | None = None
    start: int = 0
    parameter: bool = False
    numbers: tuple[float, ...] = ()
    factors: tuple[float | str, ...] = ()


@dataclass(frozen=True)
class TracedOps:
    """input_shapes: (C, H, W) or (C,) by name, `OpGraph.INPUT` first. fixed: operators whose output channels the
    network's code counts on, with the reason."""

    ops: tuple[TracedOp, ...]
    outputs: tuple[str, ...]
    input_shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, str] = field(default_factory=dict)


def trace_ops(module: nn.Module, *examples: torch.Tensor) -> TracedOps:
    """The operators of `module` for example inputs, (N, C, H, W) or (N, C) each, in execution order."""
    graph_module, asked = trace_fx(module, examples)
    try:
        with torch.no_grad():
            _Shapes(graph_module).propagate(*examples)
    except Exception as error:
        name, shapes = type(module).__name__, " and ".join(str(tuple(example.shape)) for example in examples)
        raise UserError(f"{name} fails on an input of shape {shapes}: {one_line(error)}") from error
    _read_what_is_written(graph_module, type(module).__name__)
    return _Lowering(graph_module, len(examples), asked).run()


class _Shapes(ShapeProp):
    """Notes what is no tensor, too."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "tensor_meta" not in n.meta:
            n.meta["known"] = result
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
        if _shape(node.all_input_nodes[0]) is None:  # a size
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
    source, viewed = node.all_input_nodes[0], False
    while True:
        if source.op == "placeholder":
            return f"its input {source.name}" if node.target in (*KIND_OF, *CLIPS) else None
        if viewed and any(order[user] > order[node] for user in readers(source)):
            return f"a part or a view of {source.name}"
        if source.target not in VIEWS and not _is_its_input(graph_module, source):
            return None
        viewed = viewed or source.target in VIEWS
        source = source.all_input_nodes[0]


def _is_its_input(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives its input itself, so that to write the one is to write the other."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), IDENTITY_MODULES)
    return node.target in (F.dropout, F.dropout2d, "detach")


def _in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    called = getattr(node.target, "__name__", "")
    return bool(node.op == "call_function" and (node.kwargs.get("inplace") or called.endswith("_")))


def _line_of(node: fx.Node) -> str:
    """The line of the network's own code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    libraries = Path(torch.__file__).parent, Path(__file__).parent
    own = [(Path(file), line) for file, line in frames if not any(map(Path(file).is_relative_to, libraries))]
    return f"at {own[-1][0].name}:{own[-1][1]}" if own else ""


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer, perhaps of a class derived of nn.Linear, computes what its weights say."""
    if type(layer).forward is nn.Linear.forward:
        return True
    drawn = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(layer.weight.device, layer.weight.dtype)
    return gives(layer, drawn, F.linear(drawn, layer.weight, layer.bias))


@torch.no_grad()
def _is_group_norm(layer: nn.GroupNorm) -> bool:
    """As `_is_linear`."""
    if type(layer).forward is nn.GroupNorm.forward:
        return True
    drawn = torch.randn(2, layer.num_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    return gives(layer, drawn, F.group_norm(drawn, layer.num_groups, layer.weight, layer.bias, layer.eps))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _activation_of(module: nn.Module) -> str | None:
    """The activation that a module is, or that its forward() calls and nothing else."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    if type(module) in ACTIVATION_MODULES:
        return ACTIVATION_MODULES[type(module)]
    try:
        nodes = list(fx.symbolic_trace(module).graph.nodes)
    except Exception:  # the user's code
        return None
    first = nodes[0].op == "placeholder" and nodes[1].args[:1] == (nodes[0],) if len(nodes) == 3 else False
    plain = first and nodes[1].kwargs.get("approximate", "none") == "none"
    return ACTIVATION_FUNCTIONS.get(nodes[1].target) if plain else None


class _Lowering:
    """Walks the fx graph once, emitting fused operators."""

    def __init__(self, graph_module: fx.GraphModule, examples: int, asked: Asked) -> None:
        self.root = graph_module
        self.modules = dict(graph_module.named_modules())
        self.graph, self.examples, self.asked = graph_module.graph, examples, asked
        self.ops: dict[str, TracedOp] = {}
        self.value: dict[fx.Node, str] = {}  # fx node -> name of the operator whose output it is
        self.last: set[fx.Node] = set()  # nodes whose tensors are channels-last
        self.apart: dict[fx.Node, tuple[fx.Node, int, bool]] = {}  # (N, G, C/G, H, W): source, G, whether swapped
        self.halved: dict[fx.Node, tuple[fx.Node, int]] = {}  # mean over one side: the image, dimension of the other
        self.padded: dict[fx.Node, tuple[fx.Node, Pads]] = {}  # zero-padded: the image, what is around it
        self.parameters: dict[fx.Node, str] = {}
        self.rigid: set[fx.Node] = set()  # of those, that the network's code gives a shape of so many channels
        self.fixed: dict[str, str] = {}
        self.outputs: list[str] = []
        self.input_shapes: dict[str, tuple[int, ...]] = {}

    def run(self) -> TracedOps:
        refused: dict[fx.Node, str] = {}  # all that is not supported is told at once
        for node in self.graph.nodes:
            try:
                self._visit(node)
            except Exception as error:
                if refused.keys() & node.all_input_nodes:
                    refused[node] = ""  # perhaps for nothing but what it reads
                elif isinstance(error, UnsupportedOperatorError):
                    refused[node] = str(error)
                elif isinstance(error, UserError):
                    raise
                else:  # arguments of a kind that nobody thought of
                    refused[node] = str(self._unsupported(node))
                self.value[node] = node.name
        if refused:
            reasons = [reason for reason in dict.fromkeys(refused.values()) if reason]
            more = f"; and {len(reasons) - TOLD} more" if len(reasons) > TOLD else ""
            raise UnsupportedOperatorError("; ".join(reasons[:TOLD]) + more)
        self._fix_what_is_asked()
        return TracedOps(tuple(self.ops.values()), tuple(self.outputs), self.input_shapes, self.fixed)

    def _fix_what_is_asked(self) -> None:
        """Channels whose number the network's code branches on stay as many."""
        for node in self.graph.nodes:
            dims = {dim for name, each in self.asked if name == node.name for dim in each}
            if not dims:
                continue
            names = [self.value[node]] if node in self.value else []
            channels_at = {len(_shape(node) or ()) - 1} if node in self.last else {1}
            if node in self.parameters:  # sizes of weights
                owner, channels_at = self.parameters[node].rpartition(".")[0], dims
                for op in self.ops.values():
                    names += [op.name, *op.inputs] if owner in (op.module, op.batch_norm) else []
            for taken in (self.padded, self.halved, self.apart):
                if node in taken and node not in self.value:
                    channels_at |= {2} if taken is self.apart else set()
                    names += [self.value[taken[node][0]]]  # type: ignore[index]
            if dims & channels_at:
                why = f"the network's code asks for the channels of {node.name}"
                self.fixed = dict.fromkeys(names, why) | self.fixed

    def _visit(self, node: fx.Node) -> None:
        if not self._takes_padding(node) and not asks_for_size(node):
            for source in [each for each in node.all_input_nodes if each in self.padded and each not in self.value]:
                image, (before, after) = self.padded[source]
                ends = () if after == before else after
                self._emit(source, "pad", sources=[image], padding=before, padding_end=ends)
        if node.op == "placeholder":
            self._input(node)
        elif node.op == "output":
            self._outputs(node.args[0])
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        elif node.op == "get_attr":
            self.parameters[node] = str(node.target)
        else:
            raise self._unsupported(node)

    def _input(self, node: fx.Node) -> None:
        shape = _shape(node)
        if shape is None and len(self.input_shapes) >= self.examples:
            return  # an argument that keeps its default
        first = not self.input_shapes
        if shape is None or len(shape) not in ((4,) if first else (2, 4)):
            kind = "one (N, C, H, W) tensor" if first else "an (N, C, H, W) or (N, C) tensor"
            raise UserError(f"the network's input {node.name!r} is not {kind}")
        name = OpGraph.INPUT if first else node.name
        self.input_shapes[name] = shape[1:]
        self.value[node] = name

    def _outputs(self, value: Any) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                self._outputs(part)
        elif isinstance(value, dict):
            self._outputs(list(value.values()))
        elif not isinstance(value, fx.Node):
            raise UnsupportedOperatorError(f"the network returns {value!r}: only tensors, also in tuples or dicts")
        elif value not in self.value or value in self.last:
            raise UnsupportedOperatorError(f"the network's output {value.name} is not an image or a vector of channels")
        elif self.value[value] in (*self.outputs, *self.input_shapes):
            raise UnsupportedOperatorError(f"the network returns {self.value[value]} twice, or an input of its own")
        else:
            self.outputs.append(self.value[value])

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            self._convolution(node, module, name)
        elif isinstance(module, nn.Linear):
            source = node.all_input_nodes[0]
            if source not in self.last and len(_shape(source) or ()) != 2:
                raise UnsupportedOperatorError(f"{name}: a linear layer over the last axis of {_shape(source)}")
            if not _is_linear(module):
                raise UnsupportedOperatorError(f"{name}: a {type(module).__name__} that is no plain linear layer")
            self._emit(node, "linear", out_channels=module.out_features, module=name)
        elif isinstance(module, ChannelMap):
            self._emit(node, "channel_map", out_channels=module.out_channels, stride=_pair(module.stride), module=name)
        elif isinstance(module, BATCH_NORMS):
            self._batch_norm(node, module, name)
        elif isinstance(module, nn.LayerNorm):
            self._layer_norm(node, module, name)
        elif type(module) in ACTIVATION_MODULES and (activation := _activation_of(module)):
            self._activation(node, activation)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                self._emit(node, "prelu", module=f"{name}.weight", parameter=True)
            else:
                self._emit(node, "prelu", module=name)
        elif isinstance(module, nn.LeakyReLU):
            self._emit(node, "prelu", numbers=(float(module.negative_slope),))
        elif isinstance(module, nn.Hardtanh):
            self._clip(node, module.min_val, module.max_val)
        elif isinstance(module, nn.Softmax | nn.LogSoftmax):
            self._softmax(node, SOFTMAXES[type(module)], module.dim)
        elif isinstance(module, nn.GroupNorm | nn.InstanceNorm2d):
            self._norm(node, module, name)
        elif isinstance(module, nn.PixelShuffle):
            self._pixel_shuffle(node, module.upscale_factor)
        elif isinstance(module, IDENTITY_MODULES):
            self._same(node)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
            if getattr(module, "dilation", 1) not in (1, (1, 1)) or getattr(module, "divisor_override", None):
                raise self._unsupported(node)
            include = getattr(module, "count_include_pad", True)
            options = {"ceil": module.ceil_mode, "exclude_pad": not include}
            self._pool(node, kind, module.kernel_size, module.stride, module.padding, **options)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node)
        elif isinstance(module, nn.ZeroPad2d | nn.ConstantPad2d):
            self._pad(node, module.padding, "constant", module.value)
        elif isinstance(module, nn.Flatten):
            self._flatten(node)
        elif isinstance(module, nn.Upsample):
            self._upsample(node, module.mode, module.align_corners, module.scale_factor)
        elif isinstance(module, nn.ChannelShuffle):
            self._emit(node, "shuffle", groups=module.groups)
        elif origin(type(module)) == PERMUTE:
            self._permute(node, tuple(module.dims))  # type: ignore[arg-type]
        else:
            raise self._unsupported(node)

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if "tensor_meta" not in node.meta:  # computed of sizes: no tensor
            if target is torch._assert and isinstance(node.args[0], fx.Node):
                self._ask(node.args[0])
            return
        if node.all_input_nodes and node.all_input_nodes[0] in self.parameters and target in SAME_NUMBERS:
            self._reshaped_parameter(node)
        elif node.all_input_nodes and node.all_input_nodes[0] in self.apart:
            self._shuffled(node)
        elif target in ACTIVATION_FUNCTIONS:
            if target is F.gelu and node.kwargs.get("approximate", "none") != "none":
                raise self._unsupported(node)
            self._activation(node, ACTIVATION_FUNCTIONS[target])
        elif target is F.leaky_relu:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            self._emit(node, "prelu", numbers=(float(slope),))  # type: ignore[arg-type]
        elif target in SOFTMAXES:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            self._softmax(node, SOFTMAXES[target], dim)
        elif target in IDENTITY_FUNCTIONS or origin(target) == STOCHASTIC_DEPTH:
            self._same(node)
        elif target in KIND_OF:
            self._arithmetic(node, KIND_OF[target])
        elif target in CLIPS:
            names = ("input", "min_val", "max_val") if target is F.hardtanh else ("input", "min", "max")
            given = dict(zip(names, node.args, strict=False), **node.kwargs)
            default = (-1.0, 1.0) if target is F.hardtanh else (None, None)
            self._clip(node, *(given.get(key, usual) for key, usual in zip(names[1:], default, strict=True)))
        elif target in NEGATIONS:
            self._with_number(node, "mul_scalar", node.all_input_nodes[0], -1.0)
        elif target is F.pixel_shuffle:
            self._pixel_shuffle(node, node.args[1] if len(node.args) > 1 else node.kwargs["upscale_factor"])
        elif target in (torch.cat, torch.concat):
            self._concat(node)
        elif target in (torch.chunk, "chunk", torch.split, "split"):
            source = node.all_input_nodes[0]
            dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
            if dim not in (1, -3) or source in self.last:
                raise self._unsupported(node)
            self.value[node] = self.value[source]  # a tuple: its parts are taken by getitem
        elif target is operator.getitem:
            self._getitem(node)
        elif target is F.adaptive_avg_pool2d:
            self._adaptive_pool(node)
        elif target in MEANS:
            self._mean(node)
        elif target in FLATTEN_CALLS:
            self._flatten(node)
        elif target in (torch.permute, "permute"):
            named: Any = node.kwargs.get("dims")
            self._permute(node, self._listed(node) if named is None else tuple(named))
        elif target is F.interpolate:
            self._interpolate(node)
        elif target in POOL_FUNCTIONS:
            self._pool_function(node)
        elif target is F.pad:
            self._pad_function(node)
        else:
            raise self._unsupported(node)

    def _interpolate(self, node: fx.Node) -> None:
        names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
        arguments = dict(zip(names, node.args, strict=False), **node.kwargs)
        if arguments.get("antialias") or arguments.get("recompute_scale_factor"):
            raise self._unsupported(node)
        mode, corners = arguments.get("mode", "nearest"), arguments.get("align_corners")
        self._upsample(node, mode, corners, arguments.get("scale_factor"))

    def _clip(self, node: fx.Node, low: Any, high: Any) -> None:
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        if not isinstance(low, int | float) or not isinstance(high, int | float):
            raise self._unsupported(node)
        if low == 0 and high in (6, math.inf):
            self._activation(node, "relu6" if high == 6 else "relu")
        else:
            self._emit(node, "clip", numbers=(float(low), float(high)))

    def _mean(self, node: fx.Node) -> None:
        """Over height and width, in one call or in two."""
        source = node.all_input_nodes[0]
        rank = len(_shape(source) or ())
        named = node.kwargs.get("dim", node.kwargs.get("axis"))
        given: Any = node.args[1] if len(node.args) > 1 else named
        listed = given if isinstance(given, (list, tuple)) else [given]
        if rank == 0 or source in self.last or not all(isinstance(dim, int) for dim in listed):
            raise self._unsupported(node)
        dims = {dim % rank for dim in listed}
        if source in self.halved:
            image, other = self.halved[source]
            if dims != {other}:
                raise self._unsupported(node)
            self._emit(node, "global_avg_pool", sources=[image])
        elif rank == 4 and dims == {2, 3}:
            self._emit(node, "global_avg_pool")
        elif rank == 4 and dims in ({2}, {3}) and all(user.target in MEANS for user in readers(node)):
            keepdim = len(_shape(node) or ()) == rank
            self.halved[node] = source, 3 if dims == {2} and keepdim else 2
        else:
            raise self._unsupported(node)

    def _unsupported(self, node: fx.Node) -> UnsupportedOperatorError:
        what: Any = node.target
        if node.op == "call_module":
            what = f"{type(self.modules[str(node.target)]).__name__} ({node.target})"
        else:
            called = getattr(what, "__name__", what)
            stack = list(node.meta.get("nn_module_stack", {}).values())
            place = f"in {stack[-1][0]}" if stack else _line_of(node)
            what = f"{called} ({node.name}{f' {place}' if place else ''})"
        form = " in this form" if str(getattr(node.target, "__name__", node.target)) in KINDS else ""
        why = "it has no operator kind to be timed as"
        return UnsupportedOperatorError(f"operator {what} is not supported{form}: {why}")

    def _emit(self, node: fx.Node, kind: str, *, sources: Sequence[fx.Node] | None = None, **sizes: Any) -> None:
        """One operator that reads `sources` (default: all that the node reads), named after its module or its node."""
        module = sizes.pop("module", None)
        more = {key: sizes.pop(key) for key in ("start", "parameter", "numbers") if key in sizes}
        if sources is None:
            sources = [source for source in node.all_input_nodes if source in self.value]
        channels, height, width = self._image(sources[0])
        if sources[0] in self.last:
            self.last.add(node)
            kind = "conv" if kind == "linear" else kind
        all_channels = tuple(self._image(source)[0] for source in sources)
        out = sizes.pop("out_channels", channels)
        op = OpSpec(kind, all_channels, height, width, out, **sizes)
        name = module if module is not None and module not in self.ops else node.name
        if name in self.ops or name in self.input_shapes:  # a module called twice, or a node named like a module
            name = next(f"{name}.{n}" for n in itertools.count(2) if f"{name}.{n}" not in self.ops)
        inputs = tuple(self.value[source] for source in sources)
        self.ops[name] = TracedOp(name, op, inputs, module, **more)
        self.value[node] = name

    def _image(self, node: fx.Node) -> tuple[int, int, int]:
        """(C, H, W) of a node's tensor; H = W = 1 for a vector."""
        shape = _shape(node)
        if shape is None or len(shape) not in (2, 4):
            raise UnsupportedOperatorError(f"{node.name} is not an image or a vector of channels, but {shape}")
        if len(shape) == 2:
            return shape[1], 1, 1
        return (shape[3], shape[1], shape[2]) if node in self.last else (shape[1], shape[2], shape[3])

    def _same(self, node: fx.Node, source: fx.Node | None = None) -> None:
        """The node's value is that of `source`, of what it reads."""
        source = node.all_input_nodes[0] if source is None else source
        self.value[node] = self.value[source]
        if source in self.last:
            self.last.add(node)

    def _only_reader(self, node: fx.Node) -> str | None:
        """The operator before `node`, if nothing else reads its output."""
        return self._alone_before(node.all_input_nodes[0])

    def _alone_before(self, source: fx.Node) -> str | None:
        """The operator that gives `source`, if that has one reader alone."""
        name = self.value[source]
        while name in self.ops and len(readers(source)) == 1:
            if not self._passes(source):
                return name
            source = next(each for each in source.all_input_nodes if each in self.value)
        return None

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node has no operator of its own: its value is that of what it reads."""
        sources = [source for source in node.all_input_nodes if source in self.value]
        return len(sources) == 1 and self.value.get(sources[0]) == self.value[node]

    def _pad_function(self, node: fx.Node) -> None:
        arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False), **node.kwargs)
        self._pad(node, arguments["pad"], arguments.get("mode", "constant"), arguments.get("value") or 0)

    def _pad(self, node: fx.Node, sides: Any, mode: str, value: float) -> None:
        """Zeros around an image have an operator of their own for readers that are no convolutions: those take them
        over."""
        source = node.all_input_nodes[0]
        sides = [self._number(side, node) for side in sides]
        sides = (*sides, *[0] * (4 - len(sides)))
        if not any(sides):
            self._same(node, source)
        elif len(sides) > 4 or mode != "constant" or source in self.last or len(_shape(source) or ()) != 4:
            raise self._unsupported(node)
        elif max(sides) <= 0:
            self._crop(node, source, around(tuple(-side for side in sides)))
        elif min(sides) < 0 or value != 0:
            raise self._unsupported(node)
        else:
            self.padded[node] = source, around(sides)

    def _crop(self, node: fx.Node, source: fx.Node, cut: Pads) -> None:
        before, after = cut
        self._emit(node, "crop", sources=[source], padding=before, padding_end=() if after == before else after)

    def _number(self, given: Any, node: fx.Node) -> int:
        """A whole number that a call of `node` is given, or that the network's code computed of sizes."""
        given = self._ask(given) if isinstance(given, fx.Node) else given
        if not isinstance(given, int):
            raise self._unsupported(node)
        return given

    def _takes_padding(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Conv2d)

    def _ask(self, node: fx.Node) -> Any:
        """What a node that is no tensor was for the examples, None where that depends on values."""
        asked = sizes_asked(node, lambda each: None if (shape := _shape(each)) is None else len(shape))
        self.asked |= asked or set()
        return None if asked is None else node.meta.get("known")

    def _convolution(self, node: fx.Node, module: nn.Conv2d | nn.ConvTranspose2d, name: str) -> None:
        kind, groups = "conv", module.groups
        source, pads = self.padded.get(node.all_input_nodes[0], (node.all_input_nodes[0], NO_PADS))
        if isinstance(module, nn.ConvTranspose2d):
            source = node.all_input_nodes[0]
            kind = "conv_transpose"
            before, more = _pair(module.padding), _pair(module.output_padding)
            after = before[0] - more[0], before[1] - more[1]
            if groups > 1 or min(after) < 0:
                odd = "groups" if groups > 1 else "more output padding than padding"
                raise UnsupportedOperatorError(f"{name}: a transposed convolution with {odd} is not supported")
        else:
            _, height, width = self._image(node.all_input_nodes[0])
            own = padding_of(module, (height, width), name)
            before, after = ((own[end][0] + pads[end][0], own[end][1] + pads[end][1]) for end in (0, 1))
            if groups == module.in_channels == module.out_channels:  # one channel, too, which pruning may have left
                kind = "depthwise_conv"
            elif (groups > 1 or hasattr(module, HAS_GROUPS)) and module.out_channels % module.in_channels == 0:
                kind = "grouped_conv"
        self._emit(
            node,
            kind,
            sources=[source],
            out_channels=module.out_channels,
            kernel=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=before,
            padding_end=() if after == before else after,
            dilation=_pair(module.dilation),
            groups=groups,
            module=name,
        )

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> None:
        if module.running_mean is None:
            raise UnsupportedOperatorError(f"{name}: a batch-norm without running statistics cannot be folded")
        before = self._only_reader(node)
        op = None if before is None else self.ops[before]
        folds = (*CONV_KINDS, "linear")
        plain = op is not None and op.op.kind in folds and op.op.activation == "none" and not op.factors
        if op is not None and plain and not op.batch_norm and not self._called_again(op.module, name):
            self.ops[op.name] = replace(op, batch_norm=name)
            self._same(node)
        else:
            self._emit(node, "affine", module=name)
        self._of_class(node, module)

    def _called_again(self, *modules: str | None) -> bool:
        """Whether one of the modules is called at several places."""
        calls = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        return any(calls.count(module) > 1 for module in modules if module)

    def _of_class(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) -> None:
        """What a class derived of a norm does after it: an activation in `act` (timm's BatchNormAct2d)."""
        if type(module) in BATCH_NORMS:
            return
        base = next(each for each in (*BATCH_NORMS, nn.GroupNorm) if isinstance(module, each))
        act = getattr(module, "act", None)
        if not isinstance(act, nn.Module) or not isinstance(getattr(module, "drop", nn.Identity()), IDENTITY_MODULES):
            raise self._unsupported(node)
        _, channels, *sides = _shape(node) or (0, 0)
        drawn = torch.randn(2, channels, *(3 for _ in sides), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = act(base.forward(module, drawn))  # type: ignore[arg-type]
        if not gives(module, drawn, wanted):
            raise UnsupportedOperatorError(
                f"{node.target}: a {type(module).__name__} that is more than a norm and {type(act).__name__}"
            )
        if activation := _activation_of(act):
            self._activate(node, activation)
        elif isinstance(act, nn.LeakyReLU):
            self._emit(node, "prelu", sources=[node], numbers=(float(act.negative_slope),))
        elif not isinstance(act, IDENTITY_MODULES):
            raise UnsupportedOperatorError(f"operator {type(act).__name__} in {node.target} is not supported")

    def _layer_norm(self, node: fx.Node, module: nn.LayerNorm, name: str) -> None:
        source = node.all_input_nodes[0]
        if tuple(module.normalized_shape) != (self._image(source)[0],):
            raise UnsupportedOperatorError(f"{name}: only a layer-norm over the channels is supported")
        if type(module) is nn.LayerNorm and source not in self.last and len(_shape(source) or ()) == 4:
            raise UnsupportedOperatorError(f"{name}: a layer-norm over the last axis of a channels-first image")
        self._emit(node, "layer_norm", module=name)

    def _activation(self, node: fx.Node, activation: str) -> None:
        before = self._only_reader(node)
        fusable = (*CONV_KINDS, "conv_transpose", "linear", "add", "sub", "affine", *SCALAR_KINDS)
        if before is not None and self.ops[before].op.activation == "none" and self.ops[before].op.kind in fusable:
            self._same(node)
            self._activate(node, activation)
        else:
            self._emit(node, "activation", activation=activation)

    def _activate(self, node: fx.Node, activation: str) -> None:
        """The operator whose value the node has also computes `activation`."""
        traced = self.ops[self.value[node]]
        self.ops[traced.name] = replace(traced, op=replace(traced.op, activation=activation))

    def _softmax(self, node: fx.Node, kind: str, dim: Any) -> None:
        rank = len(_shape(node) or ())
        if not isinstance(dim, int) or dim % max(rank, 1) != 1 or node.all_input_nodes[0] in self.last:
            raise UnsupportedOperatorError(f"{node.name}: only a {kind} over the channels is supported")
        self._emit(node, kind)

    def _norm(self, node: fx.Node, module: nn.GroupNorm | nn.InstanceNorm2d, name: str) -> None:
        if node.all_input_nodes[0] in self.last or len(_shape(node) or ()) != 4:
            raise UnsupportedOperatorError(f"{name}: only images with channels first are normalised")
        if isinstance(module, nn.GroupNorm):
            self._emit(node, "group_norm", groups=module.num_groups, module=name)
            if not _is_group_norm(module):
                self._of_class(node, module)
        elif module.num_features != self._image(node)[0]:
            raise UnsupportedOperatorError(
                f"{name}: an instance-norm of {module.num_features} channels, not {self._image(node)[0]}"
            )
        elif module.track_running_stats:
            raise UnsupportedOperatorError(f"{name}: an instance-norm with running statistics is not supported")
        else:
            self._emit(node, "instance_norm", module=name)

    def _pixel_shuffle(self, node: fx.Node, factor: Any) -> None:
        if node.all_input_nodes[0] in self.last:
            raise self._unsupported(node)
        self._emit(node, "pixel_shuffle", out_channels=self._image(node)[0], stride=_pair(factor))

    def _arithmetic(self, node: fx.Node, kind: str) -> None:
        """Of two tensors, of a tensor and a number, or of a tensor and a parameter."""
        named = {key: value for key, value in node.kwargs.items() if value is not None}
        operands: list[Any] = [*node.args, *(named[key] for key in ("input", "other") if key in named)]
        tensors = [operand for operand in operands if operand in self.value]
        others = [operand for operand in operands if operand not in tensors]
        if len(operands) != 2 or set(named) - {"input", "other", "alpha"} or named.get("alpha", 1) != 1:
            raise self._unsupported(node)
        if len(tensors) == 2:
            self._binary(node, kind)
        elif len(tensors) == 1 and isinstance(others[0], int | float):
            self._and_number(node, kind, tensors[0], float(others[0]), number_first=operands[0] is others[0])
        elif len(tensors) == 1 and others[0] in self.parameters and kind in ("add", "mul"):
            self._and_parameter(node, kind, tensors[0], others[0])
        else:
            raise self._unsupported(node)

    def _and_number(self, node: fx.Node, kind: str, source: fx.Node, number: float, *, number_first: bool) -> None:
        if kind == "mul":
            self._with_number(node, "mul_scalar", source, number)
        elif kind == "add":
            self._with_number(node, "add_scalar", source, number)
        elif kind == "div" and not number_first and number:
            self._with_number(node, "mul_scalar", source, 1 / number)
        elif kind == "sub" and number_first:
            self._with_number(node, "mul_scalar", source, -1.0)
            self._with_number(node, "add_scalar", node, number)
        elif kind == "sub":
            self._with_number(node, "add_scalar", source, -number)
        else:
            raise self._unsupported(node)

    def _with_number(self, node: fx.Node, kind: str, source: fx.Node, number: float) -> None:
        if number == (1.0 if kind == "mul_scalar" else 0.0):
            self._same(node, source)
        elif kind == "mul_scalar" and (before := self._foldable(source)):
            self._fold(node, before, number)
        else:
            self._emit(node, kind, sources=[source], numbers=(number,))

    def _foldable(self, source: fx.Node) -> str | None:
        """The product before a factor that becomes part of its weights, as runtimes have it (ONNX Runtime's
        ConvMulFusion)."""
        name = self._alone_before(source)
        op = None if name is None or source in self.last else self.ops[name].op
        folds = (*CONV_KINDS, "conv_transpose", "linear")
        return name if op is not None and op.kind in folds and op.activation == "none" else None

    def _fold(self, node: fx.Node, name: str, factor: float | str) -> None:
        self.ops[name] = replace(self.ops[name], factors=(*self.ops[name].factors, factor))
        self.value[node] = name

    def _binary(self, node: fx.Node, kind: str) -> None:
        sources = node.all_input_nodes
        tensors = [source for source in sources if source in self.value]
        shapes = [_shape(source) for source in tensors]
        if len(tensors) != 2 or len(sources) != 2 or len({source in self.last for source in tensors}) > 1:
            raise self._unsupported(node)
        if kind == "div":
            raise self._unsupported(node)
        if shapes[0] == shapes[1]:
            self._emit(node, kind)
            return
        tensors.sort(key=lambda source: -math.prod(_shape(source) or ()))  # the image, then its gate
        if kind != "mul" or (_shape(tensors[1]) or ())[1:] != (self._image(tensors[0])[0], 1, 1):
            raise self._unsupported(node)
        self._emit(node, "scale", sources=tensors)

    def _reshaped_parameter(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        self.parameters[node] = self.parameters[source]
        counted = node.target in RESHAPES and any(isinstance(size, int) and size > 1 for size in self._listed(node))
        if counted or source in self.rigid:
            self.rigid.add(node)

    def _and_parameter(self, node: fx.Node, kind: str, source: fx.Node, parameter: fx.Node) -> None:
        """A product with a parameter of one number per channel; either with one of a single number."""
        shape, channels = _shape(parameter), self._image(source)[0]
        rank, name = len(_shape(source) or ()), self.parameters[parameter]
        number = shape is not None and math.prod(shape) == 1 and len(shape) <= rank
        if name.startswith("_tensor_constant") and number:  # written into the code, not held by the network
            self._and_number(node, kind, source, float(getattr(self.root, name)), number_first=False)
            return
        layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *BATCH_NORMS)
        if name.startswith("_tensor_constant") or isinstance(self.modules.get(name.rpartition(".")[0]), layers):
            raise self._unsupported(node)
        trailing = (1,) * (0 if source in self.last else rank - 2)
        per_channel = [(*(1,) * ones, channels, *trailing) for ones in range(rank - len(trailing))]
        if number and kind == "mul" and (before := self._foldable(source)):
            self._fold(node, before, name)
        elif number:
            self._emit(node, f"{kind}_scalar", sources=[source], module=name, parameter=True)
        elif kind == "mul" and shape in per_channel:
            self._emit(node, "affine", sources=[source], module=name, parameter=True)
            if parameter in self.rigid:
                self.fixed[self.value[node]] = f"{name} is reshaped to {channels} channels"
        else:
            raise self._unsupported(node)

    def _concat(self, node: fx.Node) -> None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        out, parts = _shape(node), node.args[0] if node.args else node.kwargs["tensors"]
        if dim not in (1, -3) or out is None or any(source in self.last for source in node.all_input_nodes):
            raise self._unsupported(node)
        if not isinstance(parts, tuple | list):
            raise self._unsupported(node)
        if len(parts) == 1:
            self._same(node)
            return
        self._emit(node, "concat", sources=list(parts), out_channels=out[1])

    def _getitem(self, node: fx.Node) -> None:
        """A part of a split tensor, or a run of channels."""
        (source, key), out = node.args, _shape(node)
        assert isinstance(source, fx.Node)
        if out is None or source not in self.value:
            raise self._unsupported(node)
        if isinstance(key, int) and source.target in (torch.chunk, "chunk", torch.split, "split"):
            tensor, sizes = source.all_input_nodes[0], [meta.shape[1] for meta in source.meta["tensor_meta"]]
            if source.target in (torch.chunk, "chunk") and len(set(sizes)) == 1:
                part = {"groups": len(sizes), "start": key % len(sizes)}
                self._emit(node, "chunk", sources=[tensor], out_channels=out[1], **part)
                return
            self._emit(node, "slice", sources=[tensor], out_channels=out[1], start=sum(sizes[:key]))
            return
        before = _shape(source)
        if before is None or len(before) not in (2, 4) or len(out) != len(before) or source in self.last:
            raise self._unsupported(node)
        starts = self._starts(node, key, before)
        self._same(node, source)
        if out[0] != before[0]:
            raise self._unsupported(node)
        if out[1] != before[1]:  # else, of fewer channels it is all of them, too
            self._emit(node, "slice", sources=[source], out_channels=out[1], start=starts[1])
        if out[2:] != before[2:]:
            ends = [size - start - left for size, start, left in zip(before[2:], starts[2:], out[2:], strict=True)]
            self._crop(node, source if out[1] == before[1] else node, (_pair(starts[2:]), _pair(ends)))

    def _starts(self, node: fx.Node, key: Any, shape: tuple[int, ...]) -> list[int]:
        """Where an index of slices begins, on every axis."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            place = keys.index(Ellipsis)
            keys[place : place + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
        starts = []
        for size, each in zip(shape, [*keys, *[slice(None)] * (len(shape) - len(keys))], strict=True):
            if not isinstance(each, slice):
                raise self._unsupported(node)
            ends = [None if end is None else self._number(end, node) for end in (each.start, each.stop, each.step)]
            start, _, step = slice(*ends).indices(size)
            if step != 1:
                raise self._unsupported(node)
            starts.append(start)
        return starts

    def _shuffled(self, node: fx.Node) -> None:
        """The rest of a channel shuffle that began with a view as (N, G, C / G, H, W)."""
        before = node.all_input_nodes[0]
        source, groups, swapped = self.apart[before]
        if node.target in IDENTITY_FUNCTIONS:
            self.apart[node] = self.apart[before]
        elif node.target in (torch.transpose, "transpose") and sorted(node.args[1:]) == [1, 2] and not swapped:  # type: ignore[type-var]
            self.apart[node] = (source, groups, True)
        elif swapped and node.target in FLATTEN_CALLS and _shape(node) == _shape(source):
            self._emit(node, "shuffle", sources=[source], groups=groups)
        else:
            raise self._unsupported(node)

    def _pool_function(self, node: fx.Node) -> None:
        names = ("input", "kernel_size", "stride", "padding")
        arguments = dict(zip(names, node.args, strict=False), **node.kwargs)
        known = {*names, "ceil_mode", "count_include_pad"}
        odd = arguments.get("dilation", 1) not in (1, (1, 1)) or arguments.get("return_indices")
        if (set(arguments) - known - {"dilation", "return_indices"}) or odd or len(node.args) > len(names):
            raise self._unsupported(node)
        kernel, padding = arguments["kernel_size"], arguments.get("padding", 0)
        kernel = self._ask(kernel) if isinstance(kernel, fx.Node) else kernel
        if not isinstance(kernel, int | tuple | list):
            raise self._unsupported(node)
        kind, ceil = POOL_FUNCTIONS[node.target], bool(arguments.get("ceil_mode"))
        options = {"ceil": ceil, "exclude_pad": not arguments.get("count_include_pad", True)}
        self._pool(node, kind, kernel, arguments.get("stride") or kernel, padding, **options)

    def _pool(
        self,
        node: fx.Node,
        kind: str,
        kernel: Any,
        stride: Any,
        padding: Any,
        *,
        ceil: bool = False,
        exclude_pad: bool = False,
    ) -> None:
        window: dict[str, Any] = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}
        channels, height, width = self._image(node.all_input_nodes[0])
        plain = OpSpec(kind, (channels,), height, width, channels, **window)
        ceil = ceil and (plain.out_height, plain.out_width) != self._image(node)[1:]
        if ceil and kind == "avg_pool":
            raise UnsupportedOperatorError(f"{node.name}: average pooling with ceil_mode is not supported here")
        if kind == "avg_pool" and not exclude_pad and not ceil and (image := self._takes_zeros(node, window)):
            self._emit(node, kind, sources=[image], **window)
            return
        self._emit(node, kind, **window, ceil=ceil, exclude_pad=exclude_pad and any(window["padding"]))

    def _takes_zeros(self, node: fx.Node, window: dict[str, Any]) -> fx.Node | None:
        """The image whose zeros a pooling alone reads, which become padding of its window where that may be so wide:
        ONNX Runtime has it so (PadFusion)."""
        source = node.all_input_nodes[0]
        image, (before, after) = self.padded.get(source, (source, NO_PADS))
        padding = tuple(own + more for own, more in zip(window["padding"], before, strict=True))
        small = all(2 * pad <= size for pad, size in zip(padding, window["kernel"], strict=True))
        if image is source or before != after or not small or len(readers(source)) > 1:
            return None
        del self.ops[self.value.pop(source)]
        window["padding"] = padding
        return image

    def _adaptive_pool(self, node: fx.Node) -> None:
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        assert before is not None and after is not None
        if after == before:
            self._same(node)
        elif after[2:] == (1, 1):
            self._emit(node, "global_avg_pool")
        elif before[2] % after[2] == 0 and before[3] % after[3] == 0:
            window = (before[2] // after[2], before[3] // after[3])
            self._pool(node, "avg_pool", window, window, 0)
        else:
            raise self._unsupported(node)

    def _upsample(self, node: fx.Node, mode: Any, align_corners: Any, scale: Any) -> None:
        """scale: factors that the call is given in place of a size."""
        scale = (scale, scale) if isinstance(scale, int | float) else scale
        if node.all_input_nodes[0] in self.last:
            raise self._unsupported(node)
        _, height, width = self._image(node.all_input_nodes[0])
        _, out_height, out_width = self._image(node)
        if mode not in ("nearest", "bilinear"):
            raise UnsupportedOperatorError(f"{node.name}: only nearest and bilinear resizing, not {mode}")
        to: dict[str, Any] = {"align_corners": bool(align_corners)}
        if out_height % height or out_width % width:
            if scale is not None and (out_height, out_width) != tuple(
                size * by for size, by in zip((height, width), scale, strict=True)
            ):
                raise UnsupportedOperatorError(f"{node.name}: resizing by {scale} gives no whole size: name the size")
            to["out_size"] = (out_height, out_width)
        else:
            to["stride"] = (out_height // height, out_width // width)
        if (out_height, out_width) == (height, width):
            self._same(node)
        else:
            self._emit(node, f"upsample_{mode}", sources=node.all_input_nodes[:1], **to)

    def _permute(self, node: fx.Node, dims: tuple[int, ...]) -> None:
        source = node.all_input_nodes[0]
        dims = tuple(dim % 4 for dim in dims) if len(dims) == 4 else dims
        if dims != (CHANNELS_FIRST if source in self.last else CHANNELS_LAST):
            raise self._unsupported(node)
        self.value[node] = self.value[source]
        if source not in self.last:
            self.last.add(node)

    def _listed(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes or dimensions, which a call takes one by one or in a tuple."""
        given: Any = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size")),)
        return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)

    def _flatten(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        before, after = _shape(source), _shape(node)
        if before is None or after is None or source in self.last or before[0] != after[0]:
            raise self._unsupported(node)
        name, sizes = self.value[source], self._listed(node) if node.target in RESHAPES else ()
        if sizes and isinstance(sizes[0], int) and sizes[0] != -1:
            raise UnsupportedOperatorError(f"{node.name}: reshaped to a batch of {sizes[0]}: write torch.flatten(x, 1)")
        if len(sizes) in (2, 4) and isinstance(sizes[1], int) and sizes[1] != -1:
            self.fixed[name] = f"reshaped to {sizes[1]} channels at {node.name}: torch.flatten(x, 1) takes any number"
        pooled = name in self.ops and self.ops[name].op.kind == "global_avg_pool"
        if after == before or (len(after) == 2 and pooled):
            self._same(node)
        elif len(after) == 5 and len(before) == 4 and (after[1] * after[2], *after[3:]) == before[1:]:
            self.apart[node] = (source, after[1], False)
        elif len(after) == 2:
            self._emit(node, "flatten", out_channels=after[1])
        else:
            raise self._unsupported(node)
