"""torch.fx -> operators in execution order: batch-norms folded into the layer before, activations fused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.models.channel_map import ChannelMap
from profilers.ops import OpGraph, OpSpec

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
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
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
}
IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
IDENTITY_FUNCTIONS: tuple[Any, ...] = (F.dropout, F.dropout2d, "contiguous", "clone")
SHAPE_CALLS: tuple[Any, ...] = ("size", getattr, operator.getitem)
FLATTEN_CALLS: tuple[Any, ...] = (torch.flatten, "flatten", "view", "reshape", torch.reshape)
POOL_FUNCTIONS: dict[Any, str] = {F.max_pool2d: "max_pool", F.avg_pool2d: "avg_pool"}


@dataclass(frozen=True)
class TracedOp:
    """An operator with the modules it came from; `inputs` are names of earlier ones or OpGraph.INPUT."""

    name: str
    op: OpSpec
    inputs: tuple[str, ...]
    module: str | None = None
    batch_norm: str | None = None


@dataclass(frozen=True)
class TracedOps:
    ops: tuple[TracedOp, ...]
    outputs: tuple[str, ...]
    output_modules: frozenset[str]
    input_channels: int


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, ChannelMap) or super().is_leaf_module(module, qualified_name)


def trace_fx(module: nn.Module) -> fx.GraphModule:
    """The fx graph of a module in eval mode, `ChannelMap`s as leaves; UserError where torch.fx cannot trace it."""
    try:
        return fx.GraphModule(module, _Tracer().trace(module))
    except Exception as error:  # tracing runs the user's forward: anything can be raised
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{type(module).__name__} cannot be traced by torch.fx ({reason}): "
            "move data-dependent control flow out of forward()"
        ) from error


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


def trace_ops(module: nn.Module, example: torch.Tensor) -> TracedOps:
    """The operators of `module` for an `example` input (N, C, H, W), in execution order."""
    graph_module = trace_fx(module)
    try:
        with torch.no_grad():
            ShapeProp(graph_module).propagate(example)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        name, shape = type(module).__name__, tuple(example.shape)
        raise UserError(f"{name} fails on an input of shape {shape}: {reason}") from error
    return _Lowering(graph_module).run()


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


class _Lowering:
    """Walks the fx graph once, emitting fused operators."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.modules = dict(graph_module.named_modules())
        self.graph = graph_module.graph
        self.ops: dict[str, TracedOp] = {}
        self.value: dict[fx.Node, str] = {}  # fx node -> name of the operator whose output it is
        self.sole_reader: dict[str, bool] = {}
        self.outputs: list[str] = []
        self.input_channels = 0

    def run(self) -> TracedOps:
        for node in self.graph.nodes:
            self._visit(node)
        producing = frozenset(op.module for op in self._ancestors_without_weights(self.outputs) if op.module)
        return TracedOps(tuple(self.ops.values()), tuple(self.outputs), producing, self.input_channels)

    def _ancestors_without_weights(self, names: list[str]) -> list[TracedOp]:
        """Operators whose channels reach an output with no weight in between."""
        found, queue = [], list(names)
        while queue:
            op = self.ops.get(queue.pop())
            if op is None:
                continue
            found.append(op)
            if op.op.kind not in ("conv", "linear", "channel_map"):
                queue.extend(op.inputs)
        return found

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            shape = _shape(node)
            if self.input_channels or shape is None or len(shape) != 4:
                raise UserError(f"the network's input {node.name!r} is not one (N, C, H, W) tensor")
            self.input_channels = shape[1]
            self.value[node] = OpGraph.INPUT
        elif node.op == "output":
            self._outputs(node.args[0])
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        else:
            raise self._unsupported(node)

    def _outputs(self, value: Any) -> None:
        if not isinstance(value, fx.Node):
            raise UnsupportedOperatorError("the network returns something other than one tensor")
        self.outputs.append(self.value[value])

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if name in self.ops:
            raise UnsupportedOperatorError(f"module {name} is called twice: give every call a module of its own")
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise UnsupportedOperatorError(f"{name}: only numeric zero padding is supported")
            depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
            self._emit(
                node,
                "depthwise_conv" if depthwise else "conv",
                out_channels=module.out_channels,
                kernel=_pair(module.kernel_size),
                stride=_pair(module.stride),
                padding=_pair(module.padding),
                dilation=_pair(module.dilation),
                groups=module.groups,
                name=name,
                module=name,
            )
        elif isinstance(module, nn.Linear):
            self._emit(node, "linear", out_channels=module.out_features, name=name, module=name)
        elif isinstance(module, ChannelMap):
            stride = _pair(module.stride)
            self._emit(node, "channel_map", out_channels=module.out_channels, stride=stride, name=name, module=name)
        elif isinstance(module, nn.BatchNorm2d):
            if module.running_mean is None:
                raise UnsupportedOperatorError(f"{name}: a batch-norm without running statistics cannot be folded")
            self._batch_norm(node, name)
        elif type(module) in ACTIVATION_MODULES:
            self._activation(node, ACTIVATION_MODULES[type(module)])
        elif isinstance(module, IDENTITY_MODULES):
            self.value[node] = self.value[node.all_input_nodes[0]]
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
            if module.ceil_mode:
                raise UnsupportedOperatorError(f"{name}: pooling with ceil_mode is not supported")
            self._pool(node, kind, module.kernel_size, module.stride, module.padding)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node)
        elif isinstance(module, nn.Flatten):
            self._flatten(node)
        else:
            raise self._unsupported(node)

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if target in SHAPE_CALLS and _shape(node) is None:
            return  # sizes, read by a view below
        if target in ACTIVATION_FUNCTIONS:
            self._activation(node, ACTIVATION_FUNCTIONS[target])
        elif target in IDENTITY_FUNCTIONS:
            self.value[node] = self.value[node.all_input_nodes[0]]
        elif target in (operator.add, operator.iadd, torch.add, "add", "add_"):
            self._binary(node, "add")
        elif target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
            self._binary(node, "mul")
        elif target in (torch.cat, torch.concat):
            self._concat(node)
        elif target in (F.adaptive_avg_pool2d,):
            self._adaptive_pool(node)
        elif target in (torch.mean, "mean"):
            before, after = _shape(node.all_input_nodes[0]), _shape(node)
            if before is None or after is None or len(before) != 4 or after != before[:2]:
                raise self._unsupported(node)
            self._emit(node, "global_avg_pool")
        elif target in FLATTEN_CALLS:
            self._flatten(node)
        elif target in POOL_FUNCTIONS:
            arguments = dict(zip(("input", "kernel_size", "stride", "padding"), node.args, strict=False), **node.kwargs)
            if arguments.get("ceil_mode"):
                raise UnsupportedOperatorError(f"{node.name}: pooling with ceil_mode is not supported")
            kernel, padding = arguments["kernel_size"], arguments.get("padding", 0)
            self._pool(node, POOL_FUNCTIONS[target], kernel, arguments.get("stride") or kernel, padding)
        else:
            raise self._unsupported(node)

    def _unsupported(self, node: fx.Node) -> UnsupportedOperatorError:
        what: Any = node.target
        if node.op == "call_module":
            what = f"{type(self.modules[str(node.target)]).__name__} ({node.target})"
        elif isinstance(what, Callable):  # type: ignore[arg-type]
            what = getattr(what, "__name__", what)
        return UnsupportedOperatorError(f"operator {what} is not supported: it has no operator kind to be timed as")

    def _emit(self, node: fx.Node, kind: str, *, name: str = "", **sizes: Any) -> None:
        module = sizes.pop("module", None)
        sources = [source for source in node.all_input_nodes if source in self.value]
        shapes = [_shape(source) for source in sources]
        first = shapes[0]
        assert first is not None
        height, width = (first[2], first[3]) if len(first) == 4 else (1, 1)
        channels = tuple(shape[1] for shape in shapes if shape is not None)
        out = sizes.pop("out_channels", channels[0])
        op = OpSpec(kind, channels, height, width, out, **sizes)
        name = name or node.name
        self.ops[name] = TracedOp(name, op, tuple(self.value[source] for source in sources), module)
        self.value[node] = name

    def _only_reader(self, node: fx.Node) -> str | None:
        """The operator before `node`, if nothing else reads its output."""
        source = node.all_input_nodes[0]
        name = self.value[source]
        return name if name in self.ops and len(source.users) == 1 else None

    def _batch_norm(self, node: fx.Node, name: str) -> None:
        before = self._only_reader(node)
        foldable = before is not None and self.ops[before].op.kind in ("conv", "depthwise_conv")
        if not foldable or self.ops[before].batch_norm or self.ops[before].op.activation != "none":  # type: ignore[index]
            raise UnsupportedOperatorError(f"batch-norm {name} does not directly follow a convolution of its own")
        assert before is not None
        self.ops[before] = replace(self.ops[before], batch_norm=name)
        self.value[node] = before

    def _activation(self, node: fx.Node, activation: str) -> None:
        before = self._only_reader(node)
        fusable = ("conv", "depthwise_conv", "linear", "add")
        if before is not None and self.ops[before].op.activation == "none" and self.ops[before].op.kind in fusable:
            self.ops[before] = replace(self.ops[before], op=replace(self.ops[before].op, activation=activation))
            self.value[node] = before
        else:
            self._emit(node, "activation", activation=activation)

    def _binary(self, node: fx.Node, kind: str) -> None:
        shapes = [_shape(source) for source in node.all_input_nodes]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise self._unsupported(node)
        self._emit(node, kind)

    def _concat(self, node: fx.Node) -> None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        out = _shape(node)
        if dim not in (1, -3) or out is None:
            raise self._unsupported(node)
        self._emit(node, "concat", out_channels=out[1])

    def _pool(self, node: fx.Node, kind: str, kernel: Any, stride: Any, padding: Any) -> None:
        self._emit(node, kind, kernel=_pair(kernel), stride=_pair(stride), padding=_pair(padding))

    def _adaptive_pool(self, node: fx.Node) -> None:
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        assert before is not None and after is not None
        if after[2:] == (1, 1):
            self._emit(node, "global_avg_pool")
        elif after == before:
            self.value[node] = self.value[node.all_input_nodes[0]]
        elif before[2] % after[2] == 0 and before[3] % after[3] == 0:
            window = (before[2] // after[2], before[3] // after[3])
            self._pool(node, "avg_pool", window, window, 0)
        else:
            raise self._unsupported(node)

    def _flatten(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        before, after = _shape(source), _shape(node)
        if before is None or after is None or len(after) != 2 or before[0] != after[0]:
            raise self._unsupported(node)
        name = self.value[source]
        if len(before) == 2 or (name in self.ops and self.ops[name].op.kind == "global_avg_pool"):
            self.value[node] = name
        else:
            self._emit(node, "flatten", out_channels=after[1])
