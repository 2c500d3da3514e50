"""The graph of a network, node by node."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from amc_hw.errors import UnsupportedOperatorError, UserError
from amc_hw.lowering.arithmetic import Arithmetic
from amc_hw.lowering.axes import CHANNELS, Axes, has, plain_axes, token_axes
from amc_hw.lowering.calls import (
    ACTIVATION_FUNCTIONS,
    ACTIVATION_MODULES,
    ADAPTIVE_POOLS,
    CASTS,
    CLIPS,
    DROPOUTS,
    EXPANSIONS,
    IDENTITY_FUNCTIONS,
    IDENTITY_MODULES,
    KIND_OF,
    LARGEST,
    MAXIMA,
    MEANS,
    NEGATIONS,
    PERMUTES,
    PLAIN,
    POOL_FUNCTIONS,
    POOL_MODULES,
    PRODUCTS,
    REGROUPS,
    RESHAPES,
    SAME_NUMBERS,
    SOFTMAXES,
    SPLITS,
    SQUARES,
    STOCHASTIC_DEPTH,
    SUMS,
    TOLD,
    TRANSPOSES,
    activation_of,
    called_activation,
    pair_of,
    shape_of,
)
from amc_hw.lowering.constants import is_constant
from amc_hw.lowering.images import Images
from amc_hw.lowering.values import TracedOps
from amc_hw.models.channel_map import ChannelMap
from amc_hw.symbolic import (
    BATCH_NORMS,
    CONVS,
    INSTANCE_NORMS,
    PERMUTE,
    TRANSPOSED,
    asks_for_size,
    gives,
    origin,
    readers,
)
from profilers.ops import OpGraph


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a layer, perhaps of a class derived of nn.Linear, computes what its weights say."""
    if type(layer).forward is nn.Linear.forward:
        return True
    drawn = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(layer.weight.device, layer.weight.dtype)
    return gives(layer, drawn, F.linear(drawn, layer.weight, layer.bias))


def _drops(node: fx.Node) -> bool:
    """Whether a call of F.dropout drops anything in eval mode."""
    given: dict[str, Any] = dict(zip(("input", "p", "training"), node.args, strict=False), **node.kwargs)
    return bool(given.get("training", True) and given.get("p", 0.5))


def _changes_nothing(node: fx.Node) -> bool:
    """Whether a call gives what it is given, in eval mode."""
    if node.target in CASTS:
        return bool(node.meta["tensor_meta"].dtype == node.all_input_nodes[0].meta["tensor_meta"].dtype)
    return node.target in (*DROPOUTS, *IDENTITY_FUNCTIONS) or origin(node.target) == STOCHASTIC_DEPTH


class Lowering(Arithmetic, Images):
    """Walks the fx graph once, emitting fused operators."""

    def run(self) -> TracedOps:
        refused: dict[fx.Node, str] = {}  # all that is not supported is told at once
        stand_ins: set[str] = set()
        used = self._used()
        for node in self.graph.nodes:
            try:
                self._visit(node)
            except Exception as error:
                if node not in used:  # nothing of it is timed, but it has to go on running
                    for name in [self.value[each] for each in node.all_input_nodes if each in self.value]:
                        self.fixed.setdefault(name, f"read by {node.name}, of which nothing is used")
                    continue
                if any(each in refused or self.value.get(each) in stand_ins for each in node.all_input_nodes):
                    refused[node] = ""  # perhaps for nothing but what it reads
                elif isinstance(error, UnsupportedOperatorError):
                    refused[node] = str(error)
                elif isinstance(error, UserError):
                    raise
                else:  # arguments of a kind that nobody thought of
                    refused[node] = str(self._unsupported(node))
                self._stands_for(node)
                stand_ins.add(node.name)
        if refused:
            reasons = [reason for reason in dict.fromkeys(refused.values()) if reason]
            more = f"; and {len(reasons) - TOLD} more" if len(reasons) > TOLD else ""
            raise UnsupportedOperatorError("; ".join(reasons[:TOLD]) + more)
        self._fix_what_is_asked()
        ends = tuple(self.ops.values()), tuple(self.outputs), self.input_shapes
        return TracedOps(*ends, self.fixed, tuple(dict.fromkeys(self.counted)), frozenset(self.read))

    def _used(self) -> set[fx.Node]:
        """What the network's outputs follow from."""
        wanted = [node for node in self.graph.nodes if node.op in ("output", "placeholder")]
        found = set(wanted)
        while wanted:
            new = [source for source in wanted.pop().all_input_nodes if source not in found]
            found.update(new)
            wanted += new
        return found

    def _stands_for(self, node: fx.Node) -> None:
        """As if a node that is refused had been read, so that what reads it can be."""
        shape = shape_of(node) or ()
        if len(shape) in (2, 3, 4):
            signal = any(self._form(each) == "signal" for each in node.all_input_nodes if each in self.value)
            tokens = len(shape) == 3 and not signal
            self.value[node] = node.name
            _, first, *sides = shape
            height, width = (1, 1, *sides)[-2:]
            self.input_shapes[node.name] = (sides[0], first, 1) if tokens else (first, height, width)
            size = self._size(node.name)
            if tokens:
                self.tokens.add(node.name)
            self.axes[node] = token_axes(*size[:2]) if tokens else plain_axes(size, len(shape))

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

    def _reshaped_parameter(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        self.parameters[node] = self.parameters[source]
        counted = node.target in RESHAPES and any(isinstance(size, int) and size > 1 for size in self._listed(node))
        if counted or source in self.rigid:
            self.rigid.add(node)

    def _takes_padding(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], CONVS)

    def _input(self, node: fx.Node) -> None:
        shape = shape_of(node)
        if shape is None or len(shape) not in (2, 3, 4):
            known = "(N, C, H, W), (N, C, L), (N, L, C) or (N, C)"
            raise UserError(f"the network's input {node.name!r} is no {known} tensor")
        name = node.name if self.input_shapes else OpGraph.INPUT
        self.value[node] = name
        self.input_shapes[name], self.axes[node] = self._read_as(node, shape[1:])
        if len(self.input_shapes[name]) == 2:
            self.tokens.add(name)

    def _read_as(self, node: fx.Node, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Axes]:
        """An input's shape for `OpGraph`, and its axes.

        By what reads it (N, C, L) is a signal, a sequence (N, L, C), which is of tokens, or an image (N, H, W) of one
        channel, and (N, C) a vector, or a signal (N, L) of one channel.
        """
        calls, first, *more = self._telling(node), *shape
        if len(shape) < 3 and calls and all(map(self._puts_channel_in, calls)):
            height, width = (1, *shape)[-2:]
            batch, _, *sides = plain_axes((1, height, width), len(shape) + 2)
            return (1, height, width), (batch, *sides)
        if len(shape) == 2 and any(map(self._reads_sequence, calls)) and not any(map(self._reads_signal, calls)):
            return shape, token_axes(shape[1], first)
        height, width = (1, 1, *more)[-2:]
        return ((first, height, width) if more else shape), plain_axes((first, height, width), len(shape) + 1)

    def _telling(self, node: fx.Node) -> list[fx.Node]:
        """What reads an input as it is, or after sums and products with numbers and parameters."""
        found: list[fx.Node] = []
        wanted = [node]
        while wanted:
            for reader in readers(wanted.pop()):
                others = [each for each in reader.all_input_nodes if shape_of(each) == shape_of(node)]
                same = reader.target in KIND_OF and shape_of(reader) == shape_of(node) and len(others) == 1
                (wanted if same else found).append(reader)
        return found

    def _puts_channel_in(self, node: fx.Node) -> bool:
        """Whether a call gives its input an axis of one element after that of the batch."""
        before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
        known = (*REGROUPS, *RESHAPES, operator.getitem)
        return before is not None and node.target in known and after == (before[0], 1, *before[1:])

    def _reads_sequence(self, node: fx.Node) -> bool:
        """Whether a call takes the channels of (N, L, C) for its last axis."""
        before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
        assert before is not None
        if node.op == "call_module":
            part = self.modules[str(node.target)]
            return isinstance(part, nn.Linear | nn.LayerNorm | nn.MultiheadAttention)
        return node.target in (*TRANSPOSES, *PERMUTES) and after == (before[0], before[2], before[1])

    def _outputs(self, value: Any) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                self._outputs(part)
        elif isinstance(value, dict):
            self._outputs(list(value.values()))
        elif not isinstance(value, fx.Node):
            raise UnsupportedOperatorError(f"the network returns {value!r}: only tensors, also in tuples or dicts")
        elif value in self.value and self._is_row(value) and self._form(value) == "":
            self.value[value] = self._as_tokens(value)
            self._outputs(value)
        elif value not in self.value or not (self._form(value) in ("vector", *PLAIN) or self._are_tokens(value)):
            shape = shape_of(value) or ()
            what = "an image, a signal, a sequence or a vector of channels"
            instead = "(N, 1)" if len(shape) == 1 else "what the layers give, and reshape that outside"
            raise UnsupportedOperatorError(
                f"the network's output {value.name} is not {what}, but {shape}: return {instead}"
            )
        else:
            name = self._as_tokens(value) if self._are_tokens(value) else self._as_image(value)
            if name in (*self.outputs, *self.input_shapes):
                raise UnsupportedOperatorError(f"the network returns {name} twice, or an input of its own")
            self.outputs.append(name)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name = str(node.target)
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            self._convolution(node, module, name)
        elif isinstance(module, nn.Linear):
            source = node.all_input_nodes[0]
            if self._form(source) not in ("last", "tokens", "vector"):
                raise UnsupportedOperatorError(f"{name}: a linear layer over the last axis of {shape_of(source)}")
            if not _is_linear(module):
                raise UnsupportedOperatorError(f"{name}: a {type(module).__name__} that is no plain linear layer")
            self._emit(node, "linear", out_channels=module.out_features, module=name)
        elif isinstance(module, ChannelMap):
            self._emit(
                node, "channel_map", out_channels=module.out_channels, stride=pair_of(module.stride), module=name
            )
        elif isinstance(module, BATCH_NORMS):
            self._batch_norm(node, module, name)
        elif isinstance(module, nn.LayerNorm):
            self._layer_norm(node, module, name)
        elif type(module) in ACTIVATION_MODULES and (activation := activation_of(module)):
            self._activation(node, activation)
        elif isinstance(module, nn.PReLU):
            source = node.all_input_nodes[0]
            if module.num_parameters == 1:
                self._emit(node, "prelu", module=f"{name}.weight", parameter=True)
            elif self._channel_axis(source) != 1:
                raise UnsupportedOperatorError(f"{name}: slopes along an axis that has other than all channels")
            else:
                self._emit(node, "prelu", module=name)
        elif isinstance(module, nn.LeakyReLU):
            self._emit(node, "prelu", numbers=(float(module.negative_slope),))
        elif isinstance(module, nn.Hardtanh):
            self._clip(node, module.min_val, module.max_val)
        elif isinstance(module, nn.Softmax | nn.LogSoftmax):
            self._softmax(node, SOFTMAXES[type(module)], module.dim)
        elif isinstance(module, nn.Softmax2d):
            self._softmax(node, "softmax", 1)
        elif isinstance(module, nn.MultiheadAttention):
            self._multihead(node, module, name)
        elif isinstance(module, (nn.GroupNorm, *INSTANCE_NORMS)):
            self._norm(node, module, name)
        elif isinstance(module, nn.PixelShuffle):
            self._pixel_shuffle(node, module.upscale_factor)
        elif isinstance(module, IDENTITY_MODULES):
            self._same(node)
        elif type(module) in POOL_MODULES:
            layer: Any = module
            odd = getattr(layer, "divisor_override", None) or getattr(layer, "return_indices", False)
            if getattr(layer, "dilation", 1) not in (1, (1,), (1, 1)) or odd:
                raise self._unsupported(node)
            include = getattr(layer, "count_include_pad", True)
            options = {"ceil": layer.ceil_mode, "exclude_pad": not include}
            self._pool(node, POOL_MODULES[type(layer)], layer.kernel_size, layer.stride, layer.padding, **options)
        elif type(module) in ADAPTIVE_POOLS and not getattr(module, "return_indices", False):
            self._adaptive_pool(node, ADAPTIVE_POOLS[type(module)])
        elif isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d | nn.ConstantPad1d | nn.ConstantPad2d):
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

    def _sum(self, node: fx.Node) -> None:
        """Over positions: as many times the mean."""
        before, reduced = shape_of(node.all_input_nodes[0]) or (), self._reduced(node)
        if 1 in reduced:
            raise self._unsupported(node, "only positions are added up")
        self._mean(node)
        self._with_number(node, "mul_scalar", node, float(math.prod(before[dim] for dim in reduced)))

    def _function(self, node: fx.Node) -> None:
        target = node.target
        if "tensor_meta" not in node.meta:  # computed of sizes: no tensor
            if target is torch._assert and isinstance(node.args[0], fx.Node):
                self._ask(node.args[0])
            return
        if target in ACTIVATION_FUNCTIONS:
            activation = called_activation(node)
            if activation is None:
                raise self._unsupported(node)
            self._activation(node, activation)
        elif target is F.leaky_relu:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            self._emit(node, "prelu", numbers=(float(slope),))  # type: ignore[arg-type]
        elif target in SOFTMAXES:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            self._softmax(node, SOFTMAXES[target], dim)
        elif target in DROPOUTS and _drops(node):
            raise self._unsupported(node, "it drops in eval mode, too: give it training=self.training")
        elif _changes_nothing(node):
            self._same(node)
        elif target is F.normalize:
            self._normalize(node)
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
        elif target in (operator.getitem, getattr) and node.all_input_nodes[0].target in MAXIMA:
            if node.args[1] not in (0, "values"):
                raise self._unsupported(node)
            self._largest(node, node.all_input_nodes[0])
        elif target is operator.getitem:
            self._getitem(node)
        elif target in ADAPTIVE_POOLS and not node.kwargs.get("return_indices"):
            self._adaptive_pool(node, ADAPTIVE_POOLS[target])
        elif target in LARGEST:
            self._largest(node)
        elif target in MAXIMA and shape_of(node) is None:
            return  # a tuple: what is taken of it is read
        elif target in MEANS:
            self._mean(node)
        elif target in SUMS:
            self._sum(node)
        elif target in (*RESHAPES, *REGROUPS):
            self._reshape(node)
        elif target in EXPANSIONS:
            self._expand(node)
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
