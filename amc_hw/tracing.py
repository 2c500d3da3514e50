"""torch.fx -> operators in execution order: batch-norms folded into the layer before, activations fused.

A tensor may be channels-first (N, C, H, W), a vector (N, C), or, between two permutations, channels-last (N, H, W, C):
there a linear layer is a convolution of one pixel.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.models.channel_map import ChannelMap
from amc_hw.padding import Pads, around, padding_of
from amc_hw.specs import one_line
from amc_hw.symbolic import PERMUTE, gives, origin, trace_fx
from profilers.ops import KINDS, OpGraph, OpSpec

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
#: What is computed of sizes alone makes no tensor.
SHAPE_CALLS: tuple[Any, ...] = ("size", "dim", getattr, operator.getitem)
ARITHMETIC: tuple[Any, ...] = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv)
MEANS: tuple[Any, ...] = (torch.mean, "mean")
RESHAPES: tuple[Any, ...] = ("view", "reshape", torch.reshape)
FLATTEN_CALLS: tuple[Any, ...] = (torch.flatten, "flatten", *RESHAPES)
POOL_FUNCTIONS: dict[Any, str] = {F.max_pool2d: "max_pool", F.avg_pool2d: "avg_pool"}
TOLD = 3  #: of the operators that are not supported, by name
NO_PADS: Pads = ((0, 0), (0, 0))
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class TracedOp:
    """An operator with the modules it came from; `inputs` are names of earlier ones or of the network's inputs.

    module: dotted name of the module that holds the weights, or of a `parameter` that is read as it is.
    start: a slice's first channel. slope: below zero, of a `prelu` without weights.
    """

    name: str
    op: OpSpec
    inputs: tuple[str, ...]
    module: str | None = None
    batch_norm: str | None = None
    start: int = 0
    parameter: bool = False
    slope: float = 0.0


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
    graph_module = trace_fx(module)
    try:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(*examples)
    except Exception as error:
        name, shapes = type(module).__name__, " and ".join(str(tuple(example.shape)) for example in examples)
        raise UserError(f"{name} fails on an input of shape {shapes}: {one_line(error)}") from error
    _read_what_is_written(graph_module)
    return _Lowering(graph_module, len(examples)).run()


def _read_what_is_written(graph_module: fx.GraphModule) -> None:
    """Where a tensor is written in place, those that read it afterwards read what was written."""
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in order:
        if not node.all_input_nodes or not _in_place(graph_module, node):
            continue
        source: fx.Node | None = node.all_input_nodes[0]
        if _shape(node.all_input_nodes[0]) is None:  # a size
            continue
        while source is not None:
            for reader in [user for user in source.users if order[user] > order[node]]:
                reader.replace_input_with(source, node)
            source = source.all_input_nodes[0] if _is_its_input(graph_module, source) else None


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
    if node.target in (operator.iadd, operator.imul):
        return True
    called = getattr(node.target, "__name__", "")
    return bool(node.op == "call_function" and (node.kwargs.get("inplace") or called.endswith("_")))


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer, perhaps of a class derived of nn.Linear, computes what its weights say."""
    if type(layer).forward is nn.Linear.forward:
        return True
    drawn = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(layer.weight.device, layer.weight.dtype)
    return gives(layer, drawn, F.linear(drawn, layer.weight, layer.bias))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


class _Lowering:
    """Walks the fx graph once, emitting fused operators."""

    def __init__(self, graph_module: fx.GraphModule, examples: int) -> None:
        self.root = graph_module
        self.modules = dict(graph_module.named_modules())
        self.graph, self.examples = graph_module.graph, examples
        self.ops: dict[str, TracedOp] = {}
        self.value: dict[fx.Node, str] = {}  # fx node -> name of the operator whose output it is
        self.last: set[fx.Node] = set()  # nodes whose tensors are channels-last
        self.apart: dict[fx.Node, tuple[fx.Node, int, bool]] = {}  # (N, G, C/G, H, W): source, G, whether swapped
        self.halved: dict[fx.Node, tuple[fx.Node, int]] = {}  # mean over one side: the image, dimension of the other
        self.padded: dict[fx.Node, tuple[fx.Node, Pads]] = {}  # zero-padded: the image, what is around it
        self.parameters: dict[fx.Node, str] = {}
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
        return TracedOps(tuple(self.ops.values()), tuple(self.outputs), self.input_shapes, self.fixed)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._input(node)
        elif self.padded.keys() & node.all_input_nodes and not self._takes_padding(node):
            raise UnsupportedOperatorError(f"{node.name}: padding is supported before a convolution only")
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
        elif isinstance(module, nn.BatchNorm2d):
            self._batch_norm(node, module, name)
        elif isinstance(module, nn.LayerNorm):
            self._layer_norm(node, module, name)
        elif type(module) in ACTIVATION_MODULES:
            if isinstance(module, nn.GELU) and module.approximate != "none":
                raise self._unsupported(node)
            self._activation(node, ACTIVATION_MODULES[type(module)])
        elif isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                self._emit(node, "prelu", module=f"{name}.weight", parameter=True)
            else:
                self._emit(node, "prelu", module=name)
        elif isinstance(module, nn.LeakyReLU):
            self._emit(node, "prelu", slope=float(module.negative_slope))
        elif isinstance(module, nn.Softmax):
            self._softmax(node, module.dim)
        elif isinstance(module, IDENTITY_MODULES):
            self._same(node)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
            if getattr(module, "dilation", 1) not in (1, (1, 1)) or getattr(module, "divisor_override", None):
                raise self._unsupported(node)
            if isinstance(module, nn.AvgPool2d) and module.padding and not module.count_include_pad:
                raise UnsupportedOperatorError(f"{name}: pooling that leaves its padding out is not supported")
            self._pool(node, kind, module.kernel_size, module.stride, module.padding, ceil=module.ceil_mode)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node)
        elif isinstance(module, nn.ZeroPad2d | nn.ConstantPad2d):
            self._pad(node, module.padding, "constant", module.value)
        elif isinstance(module, nn.Flatten):
            self._flatten(node)
        elif isinstance(module, nn.Upsample):
            self._upsample(node, module.mode, module.align_corners)
        elif isinstance(module, nn.ChannelShuffle):
            self._emit(node, "shuffle", groups=module.groups)
        elif origin(type(module)) == PERMUTE:
            self._permute(node, tuple(module.dims))  # type: ignore[arg-type]
        else:
            raise self._unsupported(node)

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if self._of_sizes(node):
            return
        if node.all_input_nodes and node.all_input_nodes[0] in self.apart:
            self._shuffled(node)
        elif target in ACTIVATION_FUNCTIONS:
            if target is F.gelu and node.kwargs.get("approximate", "none") != "none":
                raise self._unsupported(node)
            self._activation(node, ACTIVATION_FUNCTIONS[target])
        elif target is F.leaky_relu:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            self._emit(node, "prelu", slope=float(slope))  # type: ignore[arg-type]
        elif target in (F.softmax, torch.softmax, "softmax"):
            self._softmax(node, node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None))
        elif target in IDENTITY_FUNCTIONS or origin(target) == STOCHASTIC_DEPTH:
            self._same(node)
        elif target in (operator.add, operator.iadd, torch.add, "add", "add_"):
            if node.kwargs.get("alpha", 1) != 1:
                raise self._unsupported(node)
            self._binary(node, "add")
        elif target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
            self._binary(node, "mul")
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
            self._upsample(node, node.kwargs.get("mode", "nearest"), node.kwargs.get("align_corners"))
        elif target in POOL_FUNCTIONS:
            self._pool_function(node)
        elif target is F.pad:
            self._pad_function(node)
        else:
            raise self._unsupported(node)

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
        elif rank == 4 and dims in ({2}, {3}) and all(user.target in MEANS for user in node.users):
            keepdim = len(_shape(node) or ()) == rank
            self.halved[node] = source, 3 if dims == {2} and keepdim else 2
        else:
            raise self._unsupported(node)

    def _of_sizes(self, node: fx.Node) -> bool:
        """Whether a call computes sizes, or something of sizes, and no tensor of channels."""
        return node.target in (*SHAPE_CALLS, *ARITHMETIC) and _shape(node) is None

    def _unsupported(self, node: fx.Node) -> UnsupportedOperatorError:
        what: Any = node.target
        if node.op == "call_module":
            what = f"{type(self.modules[str(node.target)]).__name__} ({node.target})"
        else:
            called = getattr(what, "__name__", what)
            stack = list(node.meta.get("nn_module_stack", {}).values())
            place = stack[-1][0] if stack else ""
            what = f"{called} ({node.name}{f' in {place}' if place else ''})"
        form = " in this form" if str(getattr(node.target, "__name__", node.target)) in KINDS else ""
        why = "it has no operator kind to be timed as"
        return UnsupportedOperatorError(f"operator {what} is not supported{form}: {why}")

    def _emit(self, node: fx.Node, kind: str, *, sources: Sequence[fx.Node] | None = None, **sizes: Any) -> None:
        """One operator that reads `sources` (default: all that the node reads), named after its module or its node."""
        module = sizes.pop("module", None)
        more = {key: sizes.pop(key) for key in ("start", "parameter", "slope") if key in sizes}
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

    def _same(self, node: fx.Node) -> None:
        """The node's value is that of what it reads."""
        source = node.all_input_nodes[0]
        self.value[node] = self.value[source]
        if source in self.last:
            self.last.add(node)

    def _only_reader(self, node: fx.Node) -> str | None:
        """The operator before `node`, if nothing else reads its output."""
        source = node.all_input_nodes[0]
        name = self.value[source]
        while name in self.ops and len(source.users) == 1:
            if not self._passes(source):
                return name
            source = source.all_input_nodes[0]
        return None

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node has no operator of its own: its value is that of what it reads."""
        sources = [source for source in node.all_input_nodes if source in self.value]
        return len(sources) == 1 and self.value.get(sources[0]) == self.value[node]

    def _pad_function(self, node: fx.Node) -> None:
        arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False), **node.kwargs)
        self._pad(node, arguments["pad"], arguments.get("mode", "constant"), arguments.get("value") or 0)

    def _pad(self, node: fx.Node, sides: Any, mode: str, value: float) -> None:
        """Zeros around an image have no operator of their own: the convolution after them takes them over."""
        source = node.all_input_nodes[0]
        if not all(isinstance(side, int) for side in sides):
            raise self._unsupported(node)
        sides = (*sides, *[0] * (4 - len(sides)))
        if not any(sides):
            self._same(node)
        elif len(sides) > 4 or min(sides) < 0 or mode != "constant" or value != 0 or source in self.last:
            raise self._unsupported(node)
        else:
            self._image(source)
            self.padded[node] = source, around(sides)

    def _takes_padding(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], nn.Conv2d)

    def _convolution(self, node: fx.Node, module: nn.Conv2d | nn.ConvTranspose2d, name: str) -> None:
        kind, groups = "conv", module.groups
        source, pads = self.padded.get(node.all_input_nodes[0], (node.all_input_nodes[0], NO_PADS))
        if isinstance(module, nn.ConvTranspose2d):
            kind = "conv_transpose"
            if groups > 1 or any(module.output_padding):
                raise UnsupportedOperatorError(
                    f"{name}: a transposed convolution with groups or output padding is not supported"
                )
            before = after = _pair(module.padding)
        else:
            _, height, width = self._image(node.all_input_nodes[0])
            own = padding_of(module, (height, width), name)
            before, after = ((own[end][0] + pads[end][0], own[end][1] + pads[end][1]) for end in (0, 1))
            if groups == module.in_channels == module.out_channels:  # one channel, too, which pruning may have left
                kind = "depthwise_conv"
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

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm2d, name: str) -> None:
        if module.running_mean is None:
            raise UnsupportedOperatorError(f"{name}: a batch-norm without running statistics cannot be folded")
        before = self._only_reader(node)
        op = None if before is None else self.ops[before]
        plain = op is not None and op.op.kind in ("conv", "depthwise_conv") and op.op.activation == "none"
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

    def _of_class(self, node: fx.Node, module: nn.BatchNorm2d) -> None:
        """What a class derived of BatchNorm2d does after it: an activation in `act` (timm's BatchNormAct2d)."""
        if type(module) is nn.BatchNorm2d:
            return
        act = getattr(module, "act", None)
        if not isinstance(act, nn.Module) or not isinstance(getattr(module, "drop", nn.Identity()), IDENTITY_MODULES):
            raise self._unsupported(node)
        if type(act) in ACTIVATION_MODULES:
            self._activate(node, ACTIVATION_MODULES[type(act)])
        elif not isinstance(act, IDENTITY_MODULES):
            raise UnsupportedOperatorError(f"operator {type(act).__name__} in {node.target} is not supported")

    def _layer_norm(self, node: fx.Node, module: nn.LayerNorm, name: str) -> None:
        source = node.all_input_nodes[0]
        if tuple(module.normalized_shape) != (self._image(source)[0],) or module.weight is None or module.bias is None:
            raise UnsupportedOperatorError(f"{name}: only a layer-norm over the channels, with weights, is supported")
        if type(module) is nn.LayerNorm and source not in self.last and len(_shape(source) or ()) == 4:
            raise UnsupportedOperatorError(f"{name}: a layer-norm over the last axis of a channels-first image")
        self._emit(node, "layer_norm", module=name)

    def _activation(self, node: fx.Node, activation: str) -> None:
        before = self._only_reader(node)
        fusable = ("conv", "conv_transpose", "depthwise_conv", "linear", "add", "affine")
        if before is not None and self.ops[before].op.activation == "none" and self.ops[before].op.kind in fusable:
            self._same(node)
            self._activate(node, activation)
        else:
            self._emit(node, "activation", activation=activation)

    def _activate(self, node: fx.Node, activation: str) -> None:
        """The operator whose value the node has also computes `activation`."""
        traced = self.ops[self.value[node]]
        self.ops[traced.name] = replace(traced, op=replace(traced.op, activation=activation))

    def _softmax(self, node: fx.Node, dim: Any) -> None:
        rank = len(_shape(node) or ())
        if not isinstance(dim, int) or dim % max(rank, 1) != 1 or node.all_input_nodes[0] in self.last:
            raise UnsupportedOperatorError(f"{node.name}: only a softmax over the channels is supported")
        self._emit(node, "softmax")

    def _binary(self, node: fx.Node, kind: str) -> None:
        sources = node.all_input_nodes
        if len(sources) == 2 and kind == "mul" and any(source in self.parameters for source in sources):
            self._scaled_by_parameter(node)
            return
        tensors = [source for source in sources if source in self.value]
        shapes = [_shape(source) for source in tensors]
        if len(tensors) != 2 or len(sources) != 2 or len({source in self.last for source in tensors}) > 1:
            raise self._unsupported(node)
        if shapes[0] == shapes[1]:
            self._emit(node, kind)
            return
        tensors.sort(key=lambda source: -math.prod(_shape(source) or ()))  # the image, then its gate
        if kind != "mul" or (_shape(tensors[1]) or ())[1:] != (self._image(tensors[0])[0], 1, 1):
            raise self._unsupported(node)
        self._emit(node, "scale", sources=tensors)

    def _scaled_by_parameter(self, node: fx.Node) -> None:
        """A product with a parameter of one number per channel."""
        (parameter,) = (source for source in node.all_input_nodes if source in self.parameters)
        (source,) = (source for source in node.all_input_nodes if source is not parameter)
        shape, channels = _shape(parameter), self._image(source)[0]
        wanted = ((channels,),) if source in self.last else ((channels, 1, 1), (1, channels, 1, 1))
        if shape not in wanted:
            raise self._unsupported(node)
        self._emit(node, "affine", sources=[source], module=self.parameters[parameter], parameter=True)

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
            self._emit(node, "slice", sources=[tensor], out_channels=out[1], start=sum(sizes[:key]))
            return
        whole = slice(None, None, None)
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) < 2 or any(k != whole for i, k in enumerate(keys) if i != 1) or not isinstance(keys[1], slice):
            raise self._unsupported(node)
        first, _, step = keys[1].indices(self._image(source)[0])
        if step != 1 or source in self.last:
            raise self._unsupported(node)
        self._emit(node, "slice", sources=[source], out_channels=out[1], start=first)

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
        kind, ceil = POOL_FUNCTIONS[node.target], bool(arguments.get("ceil_mode"))
        if kind == "avg_pool" and padding and not arguments.get("count_include_pad", True):
            raise UnsupportedOperatorError(f"{node.name}: pooling that leaves its padding out is not supported")
        self._pool(node, kind, kernel, arguments.get("stride") or kernel, padding, ceil=ceil)

    def _pool(self, node: fx.Node, kind: str, kernel: Any, stride: Any, padding: Any, *, ceil: bool = False) -> None:
        window: dict[str, Any] = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}
        channels, height, width = self._image(node.all_input_nodes[0])
        plain = OpSpec(kind, (channels,), height, width, channels, **window)
        ceil = ceil and (plain.out_height, plain.out_width) != self._image(node)[1:]
        if ceil and kind == "avg_pool":
            raise UnsupportedOperatorError(f"{node.name}: average pooling with ceil_mode is not supported here")
        self._emit(node, kind, **window, ceil=ceil)

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

    def _upsample(self, node: fx.Node, mode: Any, align_corners: Any) -> None:
        _, height, width = self._image(node.all_input_nodes[0])
        _, out_height, out_width = self._image(node)
        factors = (out_height // height, out_width // width)
        if (height * factors[0], width * factors[1]) != (out_height, out_width) or mode not in ("nearest", "bilinear"):
            raise UnsupportedOperatorError(f"{node.name}: only upsampling by whole factors, nearest or bilinear")
        if factors == (1, 1):
            self._same(node)
        elif align_corners:
            raise UnsupportedOperatorError(f"{node.name}: upsampling with align_corners is not supported")
        else:
            self._emit(node, f"upsample_{mode}", stride=factors)

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
