"""torch.fx -> operators in execution order: batch-norms folded into the layer before, activations fused.

An operator's value is an image (N, C, H, W), tokens (N, H * W, C) or a vector (N, C). Code that permutes and reshapes
gives the same value along other axes (`amc_hw.layout`), until an operator needs it as it is. Of an image with its
channels last (N, H, W, C) a linear layer is a convolution of one pixel.
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

from amc_hw.attention import Scores, as_product, attended, scores_of
from amc_hw.constants import CONSTANT, WRITTEN, Constant, follows_from_constants, is_constant
from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.layout import (
    BATCH,
    CHANNELS,
    IMAGES,
    POSITIONS,
    Axes,
    Seen,
    has,
    image_axes,
    last_axes,
    of_dim,
    reshaped,
    size_of,
    taken,
    token_axes,
    vector_axes,
    whole,
)
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
SQUARES: tuple[Any, ...] = (operator.pow, torch.pow, "pow", torch.square, "square")
CLIPS: tuple[Any, ...] = (torch.clamp, "clamp", "clamp_", torch.clip, "clip", F.hardtanh)
NEGATIONS: tuple[Any, ...] = (operator.neg, torch.neg, "neg")
MEANS: tuple[Any, ...] = (torch.mean, "mean")
#: With the sizes of the result among their arguments, and without.
RESHAPES: tuple[Any, ...] = ("view", "reshape", torch.reshape)
REGROUPS: tuple[Any, ...] = (
    *(torch.flatten, "flatten", torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze"),
    *("unflatten", torch.unflatten, "view_as", "reshape_as"),
)
#: Of a parameter: another shape of the same numbers.
SAME_NUMBERS: tuple[Any, ...] = (*RESHAPES, *REGROUPS)
PERMUTES: tuple[Any, ...] = (torch.permute, "permute")
TRANSPOSES: tuple[Any, ...] = (torch.transpose, "transpose", torch.swapaxes, "swapaxes", "swapdims")
SPLITS: tuple[Any, ...] = (torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind", "tensor_split")
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
POOL_FUNCTIONS: dict[Any, str] = {F.max_pool2d: "max_pool", F.avg_pool2d: "avg_pool"}
TOLD = 3  #: of the operators that are not supported, by name
NO_PADS: Pads = ((0, 0), (0, 0))
#: Operators that do the same to every element, or to every channel, wherever it lies.
AS_IT_LIES = ("add", "sub", "mul", "add_scalar", "mul_scalar", "activation", "affine", "prelu", "clip")
#: Operators over the channels of images, of tokens and of vectors.
OVER_TOKENS = ("prepend", "take_token", "crop", "add_map")
OVER_CHANNELS = ("linear", "layer_norm", "softmax", "log_softmax", "concat", "slice", "chunk")


@dataclass(frozen=True)
class TracedOp:
    """An operator with the modules it came from; `inputs` are names of earlier ones or of the network's inputs.

    module: dotted name of the module that holds the weights, or of a `parameter` that is read as it is.
    start: a slice's first channel, a chunk's number. numbers: the slope of a `prelu` without weights, what a scalar
    operator without a parameter adds or multiplies by, the bounds of a `clip`, the scale of an `attention`. factors: of
    the weights, after a batch-norm; numbers, or names of parameters. constants: what the operator reads that the
    network's code computes of parameters.
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
    constants: tuple[Constant, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class TracedOps:
    """input_shapes: (C, H, W) or (C,) by name, `OpGraph.INPUT` first. fixed: operators whose output channels the
    network's code counts on, with the reason. counted: (operator, another, node): the code gives the first's output as
    many channels as the other's has."""

    ops: tuple[TracedOp, ...]
    outputs: tuple[str, ...]
    input_shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, str] = field(default_factory=dict)
    counted: tuple[tuple[str, str, str], ...] = ()


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


def _rank(node: fx.Node) -> int | None:
    shape = _shape(node)
    return None if shape is None else len(shape)


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
        self.axes: dict[fx.Node, Axes] = {}  # of these
        self.tokens: set[str] = set()  # operators whose outputs are tokens
        self.laid: dict[tuple[str, str, tuple[int, int]], str] = {}  # one laid out as the other, that once
        # tuples: parts of what, along which axis, their sizes, whether that axis is dropped
        self.parts: dict[fx.Node, tuple[fx.Node, int, list[int], bool]] = {}
        self.scores: dict[fx.Node, Scores] = {}  # of an attention, before their product with the values
        self.attended: set[fx.Node] = set()  # tuples of what an attention gives, and its weights
        self.halved: dict[fx.Node, tuple[fx.Node, int]] = {}  # mean over one side: the image, dimension of the other
        self.padded: dict[fx.Node, tuple[fx.Node, Pads]] = {}  # zero-padded: the image, what is around it
        self.parameters: dict[fx.Node, str] = {}
        self.rigid: set[fx.Node] = set()  # of those, that the network's code gives a shape of so many channels
        self.fixed: dict[str, str] = {}
        self.counted: list[tuple[str, str, str]] = []
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
                self._stands_for(node)
        if refused:
            reasons = [reason for reason in dict.fromkeys(refused.values()) if reason]
            more = f"; and {len(reasons) - TOLD} more" if len(reasons) > TOLD else ""
            raise UnsupportedOperatorError("; ".join(reasons[:TOLD]) + more)
        self._fix_what_is_asked()
        counted = tuple(dict.fromkeys(self.counted))
        return TracedOps(tuple(self.ops.values()), tuple(self.outputs), self.input_shapes, self.fixed, counted)

    def _stands_for(self, node: fx.Node) -> None:
        """As if a node that is refused had been read, so that what reads it can be."""
        shape = _shape(node) or ()
        if len(shape) in (2, 3, 4):
            self.value[node] = node.name
            self.input_shapes[node.name] = shape[1:] if len(shape) != 3 else (shape[2], shape[1], 1)
            size = self._size(node.name)
            if len(shape) == 3:
                self.tokens.add(node.name)
            axes = {2: vector_axes(size[0]), 3: token_axes(size[0], size[1]), 4: image_axes(size)}
            self.axes[node] = axes[len(shape)]

    def _fix_what_is_asked(self) -> None:
        """Channels whose number the network's code branches on stay as many."""
        for node in self.graph.nodes:
            dims = {dim for name, each in self.asked if name == node.name for dim in each}
            if not dims:
                continue
            names = [self.value[node]] if node in self.value else []
            channels_at = {at for at, axis in enumerate(self.axes.get(node, ())) if has(axis, CHANNELS)}
            if node in self.parameters:  # sizes of weights
                owner, channels_at = self.parameters[node].rpartition(".")[0], dims
                for op in self.ops.values():
                    names += [op.name, *op.inputs] if owner in (op.module, op.batch_norm) else []
            for made in (self.padded, self.halved):
                if node in made and node not in self.value:
                    channels_at |= {1}
                    names += [self.value[made[node][0]]]  # type: ignore[index]
            if dims & channels_at:
                why = f"the network's code asks for the channels of {node.name}"
                self.fixed = dict.fromkeys(names, why) | self.fixed

    def _visit(self, node: fx.Node) -> None:
        if not self._takes_padding(node) and not asks_for_size(node):
            for source in [each for each in node.all_input_nodes if each in self.padded and each not in self.value]:
                image, (before, after) = self.padded[source]
                ends = () if after == before else after
                self._emit(source, "pad", sources=[image], padding=before, padding_end=ends)
        if is_constant(node):
            self._constant(node)
        elif node.op == "placeholder":
            self._input(node)
        elif node.op == "output":
            self._outputs(node.args[0])
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        else:
            raise self._unsupported(node)

    def _constant(self, node: fx.Node) -> None:
        """Is computed where it is read; parameters are known by name."""
        if node.op == "get_attr":
            self.parameters[node] = str(node.target)
        elif node.target in SAME_NUMBERS and node.all_input_nodes and node.all_input_nodes[0] in self.parameters:
            self._reshaped_parameter(node)

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
        self.axes[node] = image_axes(self._size(name)) if len(shape) == 4 else vector_axes(shape[1])

    def _outputs(self, value: Any) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                self._outputs(part)
        elif isinstance(value, dict):
            self._outputs(list(value.values()))
        elif not isinstance(value, fx.Node):
            raise UnsupportedOperatorError(f"the network returns {value!r}: only tensors, also in tuples or dicts")
        elif value not in self.value or self._form(value) not in ("image", "vector"):
            raise UnsupportedOperatorError(f"the network's output {value.name} is not an image or a vector of channels")
        elif self.value[value] in (*self.outputs, *self.input_shapes):
            raise UnsupportedOperatorError(f"the network returns {self.value[value]} twice, or an input of its own")
        else:
            self.outputs.append(self._as_image(value))

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            self._convolution(node, module, name)
        elif isinstance(module, nn.Linear):
            source = node.all_input_nodes[0]
            if self._form(source) not in ("last", "tokens", "vector"):
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
        elif isinstance(module, nn.MultiheadAttention):
            self._multihead(node, module, name)
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
        elif isinstance(module, nn.Flatten | nn.Unflatten):
            self._reshape(node)
        elif isinstance(module, nn.Upsample):
            self._upsample(node, module.mode, module.align_corners, module.scale_factor)
        elif isinstance(module, nn.ChannelShuffle):
            self._emit(node, "shuffle", groups=module.groups)
        elif origin(type(module)) == PERMUTE:
            self._permute(node, list(module.dims))  # type: ignore[arg-type]
        else:
            raise self._unsupported(node)

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if "tensor_meta" not in node.meta:  # computed of sizes: no tensor
            if target is torch._assert and isinstance(node.args[0], fx.Node):
                self._ask(node.args[0])
            return
        if target in ACTIVATION_FUNCTIONS:
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
        elif target in SQUARES:
            source, power = (*node.args, *node.kwargs.values(), 2)[:2]
            if power != 2 or source not in self.value:
                raise self._unsupported(node)
            self._emit(node, "mul", sources=[source, source])  # type: ignore[list-item]
        elif target is F.linear:
            self._linear_call(node)
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
        elif target in SPLITS:
            self._split(node)
        elif target is operator.getitem:
            self._getitem(node)
        elif target is F.adaptive_avg_pool2d:
            self._adaptive_pool(node)
        elif target in MEANS:
            self._mean(node)
        elif target in (*RESHAPES, *REGROUPS):
            self._reshape(node)
        elif target in PERMUTES:
            named: Any = node.kwargs.get("dims")
            self._permute(node, list(self._listed(node) if named is None else named))
        elif target in TRANSPOSES or (target is getattr and node.args[1] in ("mT", "T")):
            self._transpose(node)
        elif target in PRODUCTS:
            self._product(node, *node.args)
        elif target in (torch.einsum, torch.functional.einsum):
            self._einsum(node)
        elif target is F.scaled_dot_product_attention:
            self._attention_call(node)
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
        """Over all positions, of an image in one call or in two."""
        source, out = node.all_input_nodes[0], _shape(node)
        rank = len(_shape(source) or ())
        named = node.kwargs.get("dim", node.kwargs.get("axis"))
        given: Any = node.args[1] if len(node.args) > 1 else named
        listed = given if isinstance(given, (list, tuple)) else [given]
        if rank == 0 or out is None or not all(isinstance(dim, int) for dim in listed):
            raise self._unsupported(node)
        dims = {dim % rank for dim in listed}
        if source in self.halved:
            image, other = self.halved[source]
            if dims != {other}:
                raise self._unsupported(node)
            self._pooled(node, image)
            return
        seen = self._seen(source)
        averaged = [seen.axes[dim] for dim in dims]
        left = [axis for at, axis in enumerate(seen.axes) if at not in dims and axis]
        if all(of_dim(axis, POSITIONS) for axis in averaged) and left == list(filter(None, vector_axes(seen.channels))):
            self._pooled(node, source)
        elif self._form(source) == "image" and dims in ({2}, {3}) and all(u.target in MEANS for u in readers(node)):
            self.halved[node] = source, 3 if dims == {2} and len(out) == rank else 2
        else:
            raise self._unsupported(node)

    def _pooled(self, node: fx.Node, source: fx.Node) -> None:
        """`node` is the mean of `source` over all positions."""
        sizes, channels = (_shape(node) or ())[1:], self._seen(source).channels
        rest = [whole(CHANNELS, channels) if size == channels > 1 else () for size in sizes]
        self._emit(node, "global_avg_pool", sources=[source], axes=(BATCH, *rest))

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

    def _emit(
        self,
        node: fx.Node,
        kind: str,
        *,
        sources: Sequence[fx.Node] | None = None,
        axes: Axes | None = None,
        **sizes: Any,
    ) -> None:
        """One operator that reads `sources` (default: all that the node reads), named after its module or its node.

        axes: of the node, where they do not follow from its kind and its sources.
        """
        module = sizes.pop("module", None)
        more = {key: sizes.pop(key) for key in ("start", "parameter", "numbers", "constants") if key in sizes}
        if sources is None:
            sources = [source for source in node.all_input_nodes if source in self.value]
        form = self._form(sources[0])
        anyhow = kind in (*AS_IT_LIES, "global_avg_pool") or (kind in ("slice", "chunk") and axes is not None)
        inputs = self._as_they_lie(sources) if anyhow else self._laid_out(kind, sources, form)
        kind = "conv" if kind == "linear" and form == "last" else kind
        all_channels, sides = tuple(self._size(name)[0] for name in inputs), self._size(inputs[0])[1:]
        if kind == "crop" and inputs[0] in self.tokens:
            sides = math.prod(sides), 1
        if inputs[0] in self.tokens:
            sizes["tokens"] = True
        op = OpSpec(kind, all_channels, *sides, sizes.pop("out_channels", all_channels[0]), **sizes)
        # a module may be called twice, and a node be named like a module
        name = self._free_name(module if module is not None and module not in self.ops else node.name)
        if axes is None:
            axes = self._axes_after(node, op, form, self.axes[sources[0]])
        self._add(TracedOp(name, op, tuple(inputs), module, **more))
        self.value[node], self.axes[node] = name, axes

    def _add(self, traced: TracedOp) -> None:
        self.ops[traced.name] = traced
        if traced.op.gives_tokens:
            self.tokens.add(traced.name)

    def _axes_after(self, node: fx.Node, op: OpSpec, form: str, before: Axes) -> Axes:
        """Of what an operator makes of a tensor with the axes `before`."""
        out = op.out_channels, op.out_height, op.out_width
        if op.kind in AS_IT_LIES:
            return before
        if form == "last":
            return last_axes(out)
        if op.kind == "add_map":
            return before
        if form == "tokens" and op.kind in OVER_CHANNELS:
            return (*before[:-1], whole(CHANNELS, op.out_channels))
        return vector_axes(op.out_channels) if len(_shape(node) or ()) == 2 else image_axes(out)

    def _as_they_lie(self, sources: Sequence[fx.Node]) -> list[str]:
        """The values that an operator reads, all as images or all as tokens."""
        names = [self.value[source] for source in sources]
        return names if self.tokens.isdisjoint(names) else [self._as_tokens(source) for source in sources]

    def _laid_out(self, kind: str, sources: Sequence[fx.Node], form: str) -> list[str]:
        """The values that an operator reads, as images, or as tokens where it takes these."""
        if form == "tokens" and kind in (*OVER_CHANNELS, *OVER_TOKENS):
            return [self._as_tokens(source) for source in sources]
        taken = ("last", "vector", "image") if kind in OVER_CHANNELS else ("vector", "image")
        for source in sources:
            if self._form(source) not in taken:
                raise UnsupportedOperatorError(
                    f"{source.name} is not an image or a vector of channels, but {_shape(source)}"
                )
        return [self._as_image(source) for source in sources]

    def _size(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) of a value; H = W = 1 for a vector."""
        if name in self.input_shapes:
            channels, height, width = (*self.input_shapes[name], 1, 1)[:3]
            return channels, height, width
        op = self.ops[name].op
        return op.out_channels, op.out_height, op.out_width

    def _seen(self, node: fx.Node) -> Seen:
        return Seen(self.value[node], self._size(self.value[node]), self.axes[node])

    def _form(self, node: fx.Node) -> str:
        """What a node's tensor is: an "image" (N, C, H, W), one with its channels "last", a "vector" (N, C), or
        "tokens", channels last and whole, whatever is before them; "" for anything else."""
        seen = self._seen(node)
        if seen.axes == image_axes(self._sides(seen)):
            return "image"
        if seen.axes == vector_axes(seen.channels) and seen.positions == 1:
            return "vector"
        if seen.name not in self.tokens and seen.axes == last_axes(seen.shape):
            return "last"
        return "tokens" if seen.axes[-1] == whole(CHANNELS, seen.channels) else ""

    def _are_tokens(self, node: fx.Node) -> bool:
        """Whether a node's tensor is (N, positions, channels), all of either."""
        seen = self._seen(node)
        return seen.axes == token_axes(seen.channels, seen.positions)

    def _sides(self, seen: Seen) -> tuple[int, int, int]:
        """(C, H, W) of a value; of tokens as the tensor has them."""
        if seen.name in self.tokens and len(seen.axes) == 4:
            height, width = size_of(seen.axes[2]), size_of(seen.axes[3])
            return (seen.channels, height, width) if height * width == seen.positions else seen.shape
        return seen.shape

    def _as_tokens(self, node: fx.Node) -> str:
        """A node's value as tokens."""
        name, (channels, height, width) = self.value[node], self._size(self.value[node])
        return name if name in self.tokens else self._relaid(name, "to_tokens", (channels, height, width))

    def _as_image(self, node: fx.Node) -> str:
        """A node's value as an image or a vector."""
        seen = self._seen(node)
        return self._relaid(seen.name, "to_image", self._sides(seen)) if seen.name in self.tokens else seen.name

    def _relaid(self, name: str, kind: str, shape: tuple[int, int, int]) -> str:
        channels, height, width = shape
        key = name, kind, (height, width)
        if key not in self.laid:
            self.laid[key] = self._free_name(f"{name}.{kind}")
            op = OpSpec(kind, (channels,), height, width, channels, tokens=kind == "to_image")
            self._add(TracedOp(self.laid[key], op, (name,)))
        return self.laid[key]

    def _free_name(self, name: str) -> str:
        """`name`, with a number where an operator or an input has it."""
        if name not in self.ops and name not in self.input_shapes:
            return name
        return next(f"{name}.{n}" for n in itertools.count(2) if f"{name}.{n}" not in self.ops)

    def _image(self, node: fx.Node) -> tuple[int, int, int]:
        """(C, H, W) of a node's tensor; H = W = 1 for a vector."""
        if self._form(node) not in ("image", "last", "vector"):
            raise UnsupportedOperatorError(f"{node.name} is not an image or a vector of channels, but {_shape(node)}")
        return self._sides(self._seen(node))

    def _out_image(self, node: fx.Node) -> tuple[int, int, int]:
        """(C, H, W) of a node that gives an image, whether or not it has a value by now."""
        _, channels, height, width = _shape(node) or ()
        return channels, height, width

    def _same(self, node: fx.Node, source: fx.Node | None = None) -> None:
        """The node's value is that of `source`, of what it reads."""
        source = node.all_input_nodes[0] if source is None else source
        if source in self.scores:
            self.scores[node] = self.scores[source]
            return
        self.value[node], self.axes[node] = self.value[source], self.axes[source]

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
        elif len(sides) > 4 or mode != "constant" or self._form(source) != "image":
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
        asked = sizes_asked(node, _rank)
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
            _, height, width = self._out_image(node.all_input_nodes[0])
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
        source = node.all_input_nodes[0]
        if self.axes[source][1] != whole(CHANNELS, self._seen(source).channels):
            raise UnsupportedOperatorError(f"{name}: a batch-norm of something else than all channels")
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
        if tuple(module.normalized_shape) != (self._seen(source).channels,):
            raise UnsupportedOperatorError(f"{name}: only a layer-norm over the channels is supported")
        if type(module) is nn.LayerNorm and self._form(source) == "image":
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
        rank, source = len(_shape(node) or ()), node.all_input_nodes[0]
        scores = self.scores.get(source)
        if scores is not None and kind == "softmax" and dim in (-1, rank - 1) and not (scores.weights or scores.turned):
            self.scores[node] = replace(scores, weights=True)
            return
        if source not in self.value or not isinstance(dim, int) or dim % max(rank, 1) != self._channel_axis(source):
            raise UnsupportedOperatorError(f"{node.name}: only a {kind} over the channels is supported")
        self._emit(node, kind)

    def _channel_axis(self, node: fx.Node) -> int | None:
        """Where the channels of a tensor are, all of them."""
        channels = {"image": 1, "vector": 1, "last": 3, "tokens": len(self.axes[node]) - 1}
        return channels.get(self._form(node))

    def _norm(self, node: fx.Node, module: nn.GroupNorm | nn.InstanceNorm2d, name: str) -> None:
        channels = self._seen(node.all_input_nodes[0]).channels
        if self._form(node.all_input_nodes[0]) != "image":
            raise UnsupportedOperatorError(f"{name}: only images with channels first are normalised")
        if isinstance(module, nn.GroupNorm):
            self._emit(node, "group_norm", groups=module.num_groups, module=name)
            if not _is_group_norm(module):
                self._of_class(node, module)
        elif module.num_features != channels:
            raise UnsupportedOperatorError(
                f"{name}: an instance-norm of {module.num_features} channels, not {channels}"
            )
        elif module.track_running_stats:
            raise UnsupportedOperatorError(f"{name}: an instance-norm with running statistics is not supported")
        else:
            self._emit(node, "instance_norm", module=name)

    def _pixel_shuffle(self, node: fx.Node, factor: Any) -> None:
        self._emit(node, "pixel_shuffle", out_channels=self._out_image(node)[0], stride=_pair(factor))

    def _arithmetic(self, node: fx.Node, kind: str) -> None:
        """Of two tensors, of a tensor and a number, or of a tensor and a parameter."""
        named = {key: value for key, value in node.kwargs.items() if value is not None}
        given: list[Any] = [*node.args, *(named[key] for key in ("input", "other") if key in named)]
        operands = [self._ask(each) if isinstance(each, fx.Node) and _shape(each) is None else each for each in given]
        tensors = [operand for operand in operands if operand in self.value or operand in self.scores]
        others = [operand for operand in operands if operand not in tensors]
        if len(operands) != 2 or set(named) - {"input", "other", "alpha"} or named.get("alpha", 1) != 1:
            raise self._unsupported(node)
        if scored := [tensor for tensor in tensors if tensor in self.scores]:
            self._on_scores(node, kind, scored[0], others, number_first=operands[0] not in self.scores)
        elif len(tensors) == 2:
            self._binary(node, kind)
        elif len(tensors) == 1 and isinstance(others[0], int | float):
            self._and_number(node, kind, tensors[0], float(others[0]), number_first=operands[0] is others[0])
        elif len(tensors) == 1 and isinstance(others[0], fx.Node) and kind in ("add", "mul"):
            self._and_constant(node, kind, tensors[0], others[0])
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
            self._fold(node, source, before, number)
        else:
            self._emit(node, kind, sources=[source], numbers=(number,))

    def _foldable(self, source: fx.Node) -> str | None:
        """The product before a factor that becomes part of its weights, as runtimes have it (ONNX Runtime's
        ConvMulFusion)."""
        name = self._alone_before(source)
        op = None if name is None or self._form(source) == "last" else self.ops[name].op
        folds = (*CONV_KINDS, "conv_transpose", "linear")
        return name if op is not None and op.kind in folds and op.activation == "none" else None

    def _fold(self, node: fx.Node, source: fx.Node, name: str, factor: float | str) -> None:
        self.ops[name] = replace(self.ops[name], factors=(*self.ops[name].factors, factor))
        self._same(node, source)

    def _binary(self, node: fx.Node, kind: str) -> None:
        sources = node.all_input_nodes
        tensors = [source for source in sources if source in self.value]
        if len(sources) == 1 and kind in ("add", "mul"):  # with itself
            self._emit(node, kind, sources=sources * 2)
            return
        if len(tensors) != 2 or len(sources) != 2 or kind == "div":
            raise self._unsupported(node)
        seen = [self._seen(source) for source in tensors]
        if seen[0].axes == seen[1].axes:
            self._emit(node, kind)
            return
        tensors.sort(key=lambda source: -math.prod(_shape(source) or ()))  # the image, then its gate
        image, gate = tensors
        channels = self._seen(image).channels
        if kind != "mul" or self._form(image) != "image" or (_shape(gate) or ())[1:] != (channels, 1, 1):
            raise self._unsupported(node)
        self._emit(node, "scale", sources=tensors)

    def _reshaped_parameter(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        self.parameters[node] = self.parameters[source]
        counted = node.target in RESHAPES and any(isinstance(size, int) and size > 1 for size in self._listed(node))
        if counted or source in self.rigid:
            self.rigid.add(node)

    def _and_constant(self, node: fx.Node, kind: str, source: fx.Node, constant: fx.Node) -> None:
        """A product with a parameter of one number per channel, or with what is computed of parameters; either with
        one of a single number; a sum with one number per channel and position."""
        shape, out, channels = _shape(constant), _shape(node), self._seen(source).channels
        name, rank = self.parameters.get(constant, ""), len(_shape(source) or ())
        if not is_constant(constant) or shape is None or out != _shape(source):
            raise self._unsupported(node)
        number = math.prod(shape) == 1
        if name.startswith(WRITTEN):  # into the code, not held by the network
            if number:
                written = float(getattr(self.root, name))
                self._and_number(node, kind, source, written, number_first=False)
                return
            name = ""
        layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *BATCH_NORMS)
        if isinstance(self.modules.get(name.rpartition(".")[0]), layers):
            raise self._unsupported(node)
        place = self._channel_axis(source)
        padded = (*(1,) * (rank - len(shape)), *shape)
        per_channel = place is not None and math.prod(shape) == padded[place] == channels
        held: dict[str, Any] = {"module": name, "parameter": True} if name else {"constants": (self._held(constant),)}
        if number and kind == "mul" and name and (before := self._foldable(source)):
            self._fold(node, source, before, name)
        elif number:
            self._emit(node, f"{kind}_scalar", sources=[source], **held)
        elif kind == "mul" and per_channel:
            self._emit(node, "affine", sources=[source], **held)
            if constant in self.rigid:
                self.fixed[self.value[node]] = f"{name} is reshaped to {channels} channels"
            elif not name:
                self.fixed[self.value[node]] = f"multiplied by what is computed of parameters at {node.name}"
        elif kind == "add" and (self._form(source) == "image" or self._are_tokens(source)):
            self._emit(node, "add_map", sources=[source], constants=(self._held(constant),))
        else:
            raise self._unsupported(node)

    def _held(self, node: fx.Node) -> Constant:
        return Constant(node, self.root)

    def _concat(self, node: fx.Node) -> None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        out, parts = _shape(node), node.args[0] if node.args else node.kwargs["tensors"]
        if out is None or not isinstance(parts, tuple | list) or not isinstance(dim, int):
            raise self._unsupported(node)
        dim %= len(out)
        if len(parts) == 1:
            self._same(node)
        elif is_constant(parts[0]):
            self._prepended(node, dim, list(parts))
        elif {self._channel_axis(part) for part in parts} != {dim}:
            raise self._unsupported(node)
        else:
            channels = sum(self._seen(part).channels for part in parts)
            self._emit(node, "concat", sources=list(parts), out_channels=channels)

    def _prepended(self, node: fx.Node, dim: int, parts: list[fx.Node]) -> None:
        """Tokens of the network's own before those of an image."""
        *own, source = parts
        seen = self._seen(source)
        if not all(map(is_constant, own)) or dim != 1 or not self._are_tokens(source):
            raise self._unsupported(node)
        count = sum((_shape(each) or ())[1] for each in own)
        axes = token_axes(seen.channels, seen.positions + count)
        constants = tuple(map(self._held, own))
        self._emit(node, "prepend", sources=[source], axes=axes, padding=(count, 0), constants=constants)

    def _split(self, node: fx.Node) -> None:
        """A tuple, whose parts are taken by getitem."""
        source, shapes = node.all_input_nodes[0], [tuple(meta.shape) for meta in node.meta["tensor_meta"]]
        unbound = node.target in (torch.unbind, "unbind")
        dim = node.kwargs.get("dim", node.args[-1] if len(node.args) > (1 if unbound else 2) else 0)
        if not isinstance(dim, int):
            raise self._unsupported(node)
        dim %= len(self.axes[source])
        sizes = [1 if unbound else shape[dim] for shape in shapes]
        self.parts[node] = source, dim, sizes, unbound

    def _getitem(self, node: fx.Node) -> None:
        """A part of a split tensor, or a run of channels, of an image's pixels or of tokens."""
        (source, key), out = node.args, _shape(node)
        assert isinstance(source, fx.Node)
        if out is None:
            raise self._unsupported(node)
        if source in self.parts and isinstance(key, int):
            tensor, dim, sizes, dropped = self.parts[source]
            key %= len(sizes)
            equal = len(set(sizes)) == 1 and source.target not in (torch.split, "split")
            self._part(node, tensor, dim, sum(sizes[:key]), sizes[key], dropped=dropped, chunks=equal)
            return
        if source in self.attended and key == 0:
            self._same(node)
            return
        before = _shape(source)
        if before is None or source not in self.value:
            raise self._unsupported(node)
        keys = self._keys(node, key, before)
        form = self._form(source)
        if form not in ("image", "vector") or any(not isinstance(each, slice) for each in keys):
            self._indexed(node, source, keys, before)
            return
        starts = self._starts(node, keys, before)
        self._same(node, source)
        if out[0] != before[0]:
            raise self._unsupported(node)
        if out[1] != before[1]:  # else, of fewer channels it is all of them, too
            self._emit(node, "slice", sources=[source], out_channels=out[1], start=starts[1])
        if out[2:] != before[2:]:
            ends = [size - start - left for size, start, left in zip(before[2:], starts[2:], out[2:], strict=True)]
            self._crop(node, source if out[1] == before[1] else node, (_pair(starts[2:]), _pair(ends)))

    def _indexed(self, node: fx.Node, source: fx.Node, keys: list[Any], before: tuple[int, ...]) -> None:
        """One axis cut or taken apart, and axes of one element put in."""
        named = [key for key in keys if key is not None]
        cut = [at for at, key in enumerate(named) if key != slice(None)]
        if len(cut) > 1:
            raise self._unsupported(node)
        self._same(node, source)
        for dim in cut:
            if isinstance(named[dim], slice):
                start = self._starts(node, named[: dim + 1], before)[dim]
                ends = [None if end is None else self._number(end, node) for end in (named[dim].start, named[dim].stop)]
                self._part(node, source, dim, start, len(range(*slice(*ends).indices(before[dim]))), dropped=False)
            else:
                place = self._number(named[dim], node) % before[dim]
                self._part(node, source, dim, place, 1, dropped=True, chunks=True)
        axes, place = list(self.axes[node]), 0
        for key in keys:
            if key is None:
                axes.insert(place, ())
            place += key is None or isinstance(key, slice)
        self.axes[node] = tuple(axes)

    def _part(
        self, node: fx.Node, source: fx.Node, dim: int, start: int, count: int, *, dropped: bool, chunks: bool = False
    ) -> None:
        """`count` elements of an axis from `start`. dropped: that axis, of one element by then. chunks: it is one of
        equal parts."""
        seen = self._seen(source)
        axis = seen.axes[dim]

        def left(axes: Axes) -> Axes:
            return tuple(each for at, each in enumerate(axes) if not (dropped and at == dim))

        if size_of(axis) == count:
            self.value[node], self.axes[node] = seen.name, left(seen.axes)
        elif of_dim(axis, POSITIONS) and self._are_tokens(source):
            if dropped:
                self._emit(node, "take_token", sources=[source], axes=vector_axes(seen.channels), start=start)
            else:
                axes, after = token_axes(seen.channels, count), seen.positions - start - count
                ends = {} if after == start else {"padding_end": (after, 0)}
                self._emit(node, "crop", sources=[source], axes=axes, padding=(start, 0), **ends)
        elif has(axis, IMAGES) or (found := taken(seen, dim, start, count)) is None:
            raise self._unsupported(node)
        else:
            runs, first, axes = found
            channels = seen.channels * count // size_of(axis)
            if chunks and runs == 1:
                whole_axes = {"groups": size_of(axis) // count, "start": start // count}
                self._emit(node, "chunk", sources=[source], axes=left(axes), out_channels=channels, **whole_axes)
            else:
                sizes = {"out_channels": channels, "start": first, "groups": runs}
                self._emit(node, "slice", sources=[source], axes=left(axes), **sizes)

    def _keys(self, node: fx.Node, key: Any, shape: tuple[int, ...]) -> list[Any]:
        """An index for every axis, None where it puts one in."""
        keys = list(key) if isinstance(key, tuple) else [key]
        named = sum(each is not None and each is not Ellipsis for each in keys)
        if Ellipsis in keys:
            place = keys.index(Ellipsis)
            keys[place : place + 1] = [slice(None)] * (len(shape) - named)
        else:
            keys += [slice(None)] * (len(shape) - named)
        return keys

    def _starts(self, node: fx.Node, keys: list[Any], shape: tuple[int, ...]) -> list[int]:
        """Where slices of the first axes begin."""
        starts = []
        for size, each in zip(shape, keys, strict=False):
            ends = [None if end is None else self._number(end, node) for end in (each.start, each.stop, each.step)]
            start, _, step = slice(*ends).indices(size)
            if step != 1:
                raise self._unsupported(node)
            starts.append(start)
        return starts

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
        ceil = ceil and (plain.out_height, plain.out_width) != self._out_image(node)[1:]
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
        _, height, width = self._image(node.all_input_nodes[0])
        _, out_height, out_width = self._out_image(node)
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

    def _permute(self, node: fx.Node, dims: list[Any]) -> None:
        source = node.all_input_nodes[0]
        if source in self.scores:
            self._turned(node, source, [dim % len(dims) for dim in dims])
        else:
            axes = self.axes[source]
            self.value[node] = self.value[source]
            self.axes[node] = tuple(axes[dim] for dim in dims)
            self._shuffled(node)

    def _transpose(self, node: fx.Node) -> None:
        rank = len(_shape(node) or ())
        named: Any = node.kwargs
        pair: Any = (*node.args[1:], *(named[key] for key in ("dim0", "dim1") if key in named))
        first, second = (dim % rank for dim in ((-2, -1) if node.target is getattr else pair))
        dims: list[Any] = list(range(rank))
        dims[first], dims[second] = second, first
        self._permute(node, dims)

    def _turned(self, node: fx.Node, source: fx.Node, dims: list[int]) -> None:
        """Scores, keys before queries, or back again."""
        rank, scores = len(dims), self.scores[source]
        if dims == list(range(rank)):
            self.scores[node] = scores
        elif dims == [*range(rank - 2), rank - 1, rank - 2]:
            self.scores[node] = replace(scores, turned=not scores.turned)
        else:
            raise self._unsupported(node)

    def _listed(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes or dimensions, which a call takes one by one or in a tuple."""
        given: Any = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size")),)
        return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)

    def _reshape(self, node: fx.Node) -> None:
        source, out = node.all_input_nodes[0], _shape(node)
        assert out is not None
        seen, form = self._seen(source), self._form(source)
        sizes = self._listed(node) if node.target in RESHAPES else ()
        if sizes and isinstance(sizes[0], int) and sizes[0] != -1 and has(seen.axes[0], IMAGES):
            raise UnsupportedOperatorError(f"{node.name}: reshaped to a batch of {sizes[0]}: write torch.flatten(x, 1)")
        axes = reshaped(seen.axes, out)
        if axes is None or not (has(axes[0], IMAGES) if axes else False):
            raise self._unsupported(node)
        self.value[node], self.axes[node] = seen.name, axes
        for size, axis in itertools.zip_longest(sizes, axes):
            if not has(axis, CHANNELS):
                continue
            if axis != whole(CHANNELS, seen.channels) and of_dim(axis, CHANNELS):
                self.fixed.setdefault(seen.name, f"divided at {node.name}")
            elif isinstance(size, int) and size != -1:
                why = f"reshaped to {size} channels at {node.name}: torch.flatten(x, 1) takes any number"
                self.fixed.setdefault(seen.name, why)
            if isinstance(size, fx.Node):
                self._counts(node, seen.name, size)
        if node.target in ("view_as", "reshape_as"):
            self._counted_alike(node, seen.name, node.args[1])  # type: ignore[arg-type]
        if len(out) != 2 or form != "image" or seen.axes == axes:
            self._shuffled(node)
        elif not (seen.name in self.ops and self.ops[seen.name].op.kind == "global_avg_pool"):
            self._emit(node, "flatten", sources=[source], out_channels=out[1])

    def _counts(self, node: fx.Node, name: str, size: fx.Node) -> None:
        """A value's channels are as many as the code computes of the sizes of others."""
        asked = sizes_asked(size, _rank) or set()
        for other in self.graph.nodes:
            dims = {dim for called, each in asked if called == other.name for dim in each}
            if any(has(axis, CHANNELS) for at, axis in enumerate(self.axes.get(other, ())) if at in dims):
                self._counted_alike(node, name, other)

    def _counted_alike(self, node: fx.Node, name: str, other: fx.Node) -> None:
        if other in self.value and self.value[other] != name:
            self.counted.append((name, self.value[other], node.name))

    def _shuffled(self, node: fx.Node) -> None:
        """An operator for channels of an image that code has put into another order."""
        seen = self._seen(node)
        if len(seen.axes) != 4 or len(seen.axes[1]) != 2 or not of_dim(seen.axes[1], CHANNELS):
            return
        (_, step, each), (_, one, groups) = seen.axes[1]
        plain = image_axes(self._sides(seen))
        if (step, one) == (1, each) and each * groups == seen.channels and seen.axes[2:] == plain[2:]:
            self.axes[node] = plain
            self._emit(node, "shuffle", sources=[node], groups=groups)

    def _product(self, node: fx.Node, first: Any, second: Any) -> None:
        """Of queries and keys, or of what a softmax makes of that and values."""
        if first in self.scores or second in self.scores:
            weights, value = (first, second) if first in self.scores else (second, first)
            scores = self.scores[weights]
            if scores.turned is not (weights is second) or value not in self.value:
                raise self._unsupported(node)
            self._attend(node, scores, self._seen(value))
            return
        scores_found = scores_of(self._seen(first), self._seen(second))
        if scores_found is None:
            raise self._unsupported(node)
        self.scores[node] = scores_found

    def _einsum(self, node: fx.Node) -> None:
        given: Any = node.args
        equation, first, second = (given[0], *given[1]) if isinstance(given[1], list | tuple) else given
        scores = self.scores.get(first)
        known = self.axes[first] if scores is None else (*scores.places, *(scores.query.axes[-2], scores.key.axes[-2]))
        found = as_product(equation, (known, self.axes[second]))
        if found is None or (scores is not None and (found[0] != known or scores.turned)):
            raise self._unsupported(node)
        left, right, order = found
        if scores is not None:
            self._attend(node, scores, replace(self._seen(second), axes=right), order)
            return
        made = scores_of(replace(self._seen(first), axes=left), replace(self._seen(second), axes=right))
        if made is None or order != tuple(range(made.rank)):
            raise self._unsupported(node)
        self.scores[node] = made

    def _attention_call(self, node: fx.Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False), **node.kwargs)
        query, key, value = (self._seen(given[name]) for name in names[:3])
        turned = replace(key, axes=(*key.axes[:-2], key.axes[-1], key.axes[-2]))
        scores = scores_of(query, turned)
        if scores is None or given.get("is_causal") or given.get("enable_gqa"):
            raise self._unsupported(node)
        scale = given.get("scale")
        scores = replace(scores, scale=size_of(query.axes[-1]) ** -0.5 if scale is None else float(scale))
        if (mask := given.get("attn_mask")) is not None:
            scores = self._biased(node, scores, mask)
        self._attend(node, replace(scores, weights=True), value)

    def _on_scores(self, node: fx.Node, kind: str, source: fx.Node, others: list[Any], *, number_first: bool) -> None:
        """Scores times a number, or with a bias."""
        scores, (other,) = self.scores[source], others
        made = None
        if isinstance(other, int | float) and kind in ("mul", "div") and other and not (number_first and kind == "div"):
            made = scores.scaled(other if kind == "mul" else 1 / other)
        elif kind == "add" and isinstance(other, fx.Node) and _shape(node) == _shape(source):
            made = self._biased(node, scores, other)
        if made is None:
            raise self._unsupported(node)
        self.scores[node] = made

    def _biased(self, node: fx.Node, scores: Scores, bias: fx.Node) -> Scores:
        """Scores and a table, (heads, queries, keys) or what broadcasts to it: the same for every window."""
        shape = _shape(bias)
        if not is_constant(bias) or shape is None or scores.bias is not None or scores.weights or scores.turned:
            raise self._unsupported(node)
        padded = (*(1,) * (scores.rank - len(shape)), *shape)
        if any(size > 1 and not of_dim(axis, CHANNELS) for size, axis in zip(padded, scores.places, strict=False)):
            raise self._unsupported(node)
        return replace(scores, bias=bias)

    def _attend(self, node: fx.Node, scores: Scores, value: Seen, order: Sequence[int] | None = None) -> None:
        """order: where an axis of the product stands among the node's."""
        found = attended(scores, value)
        if found is None:
            raise self._unsupported(node)
        axes = found.axes if order is None else tuple(found.axes[at] for at in order)
        names = [scores.query.name, scores.key.name, value.name]
        if not self.tokens.isdisjoint(names):
            names = [self._relaid(n, "to_tokens", self._size(n)) if n not in self.tokens else n for n in names]
        channels, sides = tuple(self._size(each)[0] for each in names), scores.query.shape[1:]
        op = OpSpec("attention", channels, *sides, tokens=names[0] in self.tokens, **found.sizes())
        constants = () if scores.bias is None else (self._held(scores.bias),)
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = self._free_name(stack[-1][0] if stack and stack[-1][0] else node.name)
        self._add(TracedOp(name, op, tuple(names), numbers=(scores.scale,), constants=constants))
        self.value[node], self.axes[node] = name, axes

    def _linear_call(self, node: fx.Node) -> None:
        """With weights that the network's code computes, or takes from where no layer is."""
        given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False), **node.kwargs)
        source, read = given["input"], [part for part in (given["weight"], given.get("bias")) if part is not None]
        if self._form(source) not in ("last", "tokens", "vector") or not all(map(is_constant, read)):
            raise self._unsupported(node)
        self._emit(
            node,
            "linear",
            sources=[source],
            out_channels=(_shape(read[0]) or ())[0],
            constants=tuple(map(self._held, read)),
        )

    def _multihead(self, node: fx.Node, module: nn.MultiheadAttention, name: str) -> None:
        """PyTorch's own module, of one tensor: queries, keys and values of one product, attention, and one more."""
        given = [*node.args, *(node.kwargs[key] for key in ("query", "key", "value") if key in node.kwargs)]
        source, rest = node.all_input_nodes[0], {key: value for key, value in node.kwargs.items() if value is not None}
        plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        known = {"query", "key", "value", "need_weights", "average_attn_weights"}
        exact = self._are_tokens(source)
        alone = node.all_input_nodes == [source] and len(given) == 3
        if not (plain and module.batch_first and alone and exact and set(rest) <= known):
            raise self._unsupported(node)
        channels, heads = module.embed_dim, module.num_heads
        self._emit(node, "linear", out_channels=3 * channels, module=name)
        qkv = self._seen(node)
        parts = []
        for start in range(3):
            op = OpSpec("chunk", (3 * channels,), *qkv.shape[1:], channels, groups=3, tokens=True)
            part = self._free_name(f"{name}.{'qkv'[start]}")
            self._add(TracedOp(part, op, (qkv.name,), start=start))
            parts.append(part)
        sizes = {"groups": heads, "kernel": qkv.shape[1:], "tokens": True}
        op = OpSpec("attention", (channels,) * 3, *qkv.shape[1:], channels, **sizes)  # type: ignore[arg-type]
        made = self._free_name(f"{name}.attention")
        self._add(TracedOp(made, op, tuple(parts), numbers=((channels // heads) ** -0.5,)))
        self.value[node], self.axes[node] = made, token_axes(channels, qkv.positions)
        self._emit(node, "linear", sources=[node], out_channels=channels, module=f"{name}.out_proj")
        self.attended.add(node)
