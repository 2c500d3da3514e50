"""A trained network as operators in execution order, and as groups of channels that must stay alike.

Operators come from torch.fx; which tensors share channels comes from Torch-Pruning's `DependencyGraph`.
Where the two disagree about a coupling, the group is frozen rather than guessed at.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

from amc_hw.errors import UserError
from amc_hw.models.channel_map import ChannelMap
from amc_hw.tracing import TracedOp, eval_mode, trace_ops
from profilers.ops import OpGraph, OpNode, OpSpec


@dataclass(frozen=True)
class Channels:
    """How many channels a tensor has: `constant` + sum of `repeat` * width over (group, repeat) in `terms`."""

    constant: int = 0
    terms: tuple[tuple[int, int], ...] = ()

    def count(self, widths: Sequence[int]) -> int:
        return self.constant + sum(int(widths[group]) * repeat for group, repeat in self.terms)

    def times(self, factor: int) -> Channels:
        return Channels(self.constant * factor, tuple((group, repeat * factor) for group, repeat in self.terms))

    @staticmethod
    def joined(parts: Sequence[Channels]) -> Channels:
        """Channels of a concatenation."""
        repeats: dict[int, int] = {}
        for part in parts:
            for group, repeat in part.terms:
                repeats[group] = repeats.get(group, 0) + repeat
        return Channels(sum(part.constant for part in parts), tuple(sorted(repeats.items())))


@dataclass(frozen=True)
class Layer:
    """One operator of the network at full width, with the groups its widths follow.

    name: the module's dotted name, or a name made from the operation where there is no module.
    module, batch_norm: dotted names of the modules that hold the weights, None where there are none.
    inputs: names of earlier layers, or OpGraph.INPUT. sources: channels of every input.
    """

    name: str
    op: OpSpec
    inputs: tuple[str, ...]
    sources: tuple[Channels, ...]
    out: Channels
    module: str | None = None
    batch_norm: str | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        """Indices of the groups that this operator's cost depends on, ascending."""
        return tuple(sorted({group for part in (*self.sources, self.out) for group, _ in part.terms}))

    def at(self, widths: Sequence[int]) -> OpSpec:
        """The operator at the given widths (one number per group)."""
        channels = tuple(part.count(widths) for part in self.sources)
        out = self.out.count(widths)
        groups = channels[0] if self.op.kind == "depthwise_conv" else self.op.groups
        return replace(self.op, in_channels=channels, out_channels=out, groups=groups)


@dataclass(frozen=True)
class Member:
    """One axis of one module that follows a group.

    role: "producer" (its outputs are the group), "through" (batch-norm or depthwise convolution: channel for
    channel), or "consumer" (its inputs are the group).
    channel_of: for every position on the module's axis, the group channel it belongs to; -1: of another group.
    """

    module: str
    role: str
    channel_of: np.ndarray = field(compare=False)

    def kept_positions(self, kept: np.ndarray) -> np.ndarray:
        """Positions on this axis whose group channel is in `kept` (ascending)."""
        return np.nonzero(np.isin(self.channel_of, kept))[0]


@dataclass(frozen=True)
class ChannelGroup:
    """A set of tensors that keep the same channels. `name` is its first producer, `width` its channels."""

    name: str
    width: int
    members: tuple[Member, ...]

    def modules(self, role: str) -> tuple[str, ...]:
        return tuple(member.module for member in self.members if member.role == role)


@dataclass(frozen=True)
class FrozenGroup:
    """A group that is left at full width, and why."""

    name: str
    width: int
    reason: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class LayerGraph:
    """Operators in order, and the channel groups that can be pruned, ordered by first producer."""

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenGroup, ...]
    input_shape: tuple[int, int, int]
    outputs: tuple[str, ...]

    @property
    def full_widths(self) -> tuple[int, ...]:
        return tuple(group.width for group in self.groups)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def op_graph(self, widths: Sequence[int] | None = None, *, batch: int = 1) -> OpGraph:
        """The network's operators at `widths` (default: full), ready to be built and timed."""
        widths = self.full_widths if widths is None else self.checked(widths)
        nodes = tuple(OpNode(layer.name, replace(layer.at(widths), batch=batch), layer.inputs) for layer in self.layers)
        return OpGraph(nodes, self.input_shape, self.outputs)

    def macs(self, widths: Sequence[int] | None = None) -> int:
        return self.op_graph(widths).macs

    def checked(self, widths: Sequence[int]) -> tuple[int, ...]:
        """`widths` as a tuple, one number per group and within 1..full; UserError if not."""
        if len(widths) != len(self.groups):
            names = ", ".join(group.name for group in self.groups)
            raise UserError(f"{len(widths)} widths given, the network has {len(self.groups)} groups: {names}")
        for group, width in zip(self.groups, widths, strict=True):
            if not 1 <= width <= group.width:
                raise UserError(f"width {width} for group {group.name}: it must be between 1 and {group.width}")
        return tuple(int(width) for width in widths)

    def _group_named(self, name: str) -> str:
        """The group of that name, or the only one whose producer lies in the module of that name."""
        known = [group.name for group in self.groups]
        inside = [known_name for known_name in known if known_name.startswith(f"{name}.")]
        if name in known or len(inside) == 1:
            return name if name in known else inside[0]
        raise UserError(f"no group {name!r} in --widths; groups: {', '.join(known)}")

    def parse_widths(self, text: str) -> tuple[int, ...]:
        """Widths from `24,48,...` (one per group, in order) or `features.0=24,...` (the rest at full width)."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if parts and all("=" in part for part in parts):
                pairs = [part.split("=", 1) for part in parts]
                named = {self._group_named(name.strip()): int(value) for name, value in pairs}
                if len(named) < len(pairs):
                    raise UserError(f"--widths {text!r}: a group is named twice")
                return self.checked([named.get(group.name, group.width) for group in self.groups])
            return self.checked([int(part) for part in parts])
        except ValueError:
            raise UserError(f"--widths {text!r}: expected numbers such as 24,48 or names such as conv1=24") from None


def width_grid(full: int, *, multiple: int = 8, floor: float = 0.2) -> tuple[int, ...]:
    """The widths a group may take: multiples of min(multiple, full // 8) from `floor` on, and the full width."""
    step = max(1, min(multiple, full // 8))
    return tuple(width for width in range(step, full, step) if width >= floor * full - 1e-9) + (full,)


def build_graph(module: nn.Module, input_shape: tuple[int, int, int], *, keep: Sequence[str] = ()) -> LayerGraph:
    """Trace `module` on one image of `input_shape` (C, H, W) and find its channel groups.

    keep: shell patterns of module names whose groups stay at full width.
    Raises UserError where the network cannot be traced or holds an operator that is not understood.
    """
    example = torch.zeros(1, *input_shape)
    with eval_mode(module):
        traced = trace_ops(module, example)
    found = _coupled_groups(module, example, traced)
    reasons = _freeze_reasons(found, traced, keep)
    groups = tuple(group for group in found if group.name not in reasons)
    frozen = tuple(
        FrozenGroup(group.name, group.width, reasons[group.name], tuple(member.module for member in group.members))
        for group in found
        if group.name in reasons
    )
    while True:
        layers, conflict = _layers(traced, groups)
        if conflict is None:
            break
        bad, reason = conflict
        frozen += tuple(
            FrozenGroup(group.name, group.width, reason, tuple(member.module for member in group.members))
            for group in groups
            if group.name in bad
        )
        groups = tuple(group for group in groups if group.name not in bad)
    outputs = tuple(traced.outputs)
    return LayerGraph(layers, groups, frozen, input_shape, outputs)


def _with_convolutions_for_maps(module: nn.Module) -> nn.Module:
    """A copy in which every `ChannelMap` is a 1x1 convolution: to the dependency graph it reads one group of
    channels and makes another, as a convolution does."""
    copied = copy.deepcopy(module)
    for name, child in list(copied.named_modules()):
        if isinstance(child, ChannelMap):
            parent = copied.get_submodule(name.rpartition(".")[0])
            convolution = nn.Conv2d(child.in_channels, child.out_channels, 1, stride=child.stride, bias=False)
            setattr(parent, name.rpartition(".")[2], convolution)
    return copied


def _coupled_groups(module: nn.Module, example: torch.Tensor, traced: Any) -> list[ChannelGroup]:
    """Every channel group of the network, in the order of its first producer."""
    stand_in = _with_convolutions_for_maps(module).eval()
    for parameter in stand_in.parameters():
        parameter.requires_grad_(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dependencies = tp.DependencyGraph().build_dependency(stand_in, example_inputs=example)
    except Exception as error:  # a tracer can fail in any way; what it says is the best there is to say
        raise UserError(f"the channels of this network cannot be traced: {type(error).__name__}: {error}") from error
    names = {child: name for name, child in stand_in.named_modules()}
    order = {op.module: index for index, op in enumerate(traced.ops) if op.module}
    seen: set[str] = set()
    groups: list[ChannelGroup] = []
    for op in traced.ops:
        if op.module is None or op.module in seen or op.op.kind not in ("conv", "linear", "channel_map"):
            continue
        producer = stand_in.get_submodule(op.module)
        assert isinstance(producer, nn.Conv2d | nn.Linear)
        linear = isinstance(producer, nn.Linear)
        width = int(producer.weight.shape[0])
        prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
        try:
            coupled = dependencies.get_pruning_group(producer, prune, list(range(width)))
        except ValueError:  # a layer that leads nowhere is not in the dependency graph
            groups.append(ChannelGroup(op.module, width, (Member(op.module, "producer", np.arange(width)),)))
            continue
        members = _members(dependencies, coupled, names)
        members.sort(key=lambda member: (order.get(member.module, len(order)), member.role))
        seen.update(member.module for member in members if member.role == "producer")
        groups.append(ChannelGroup(op.module, width, tuple(members)))
    return groups


def _members(dependencies: Any, group: Any, names: Mapping[nn.Module, str]) -> list[Member]:
    positions: dict[tuple[str, str], list[tuple[int, int]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for item in group:
        target = item.dep.target.module
        if target not in names:
            continue  # an element-wise operation: no weights of its own
        out = dependencies.is_out_channel_pruning_fn(item.dep.handler)
        if isinstance(target, nn.Conv2d) and target.groups > 1 and target.groups == target.in_channels:
            role, size = "through", target.out_channels
        elif isinstance(target, nn.Conv2d):
            role, size = ("producer", target.out_channels) if out else ("consumer", target.in_channels)
        elif isinstance(target, nn.Linear):
            role, size = ("producer", target.out_features) if out else ("consumer", target.in_features)
        else:
            role, size = "through", getattr(target, "num_features", 0)
        key = (names[target], role)
        sizes[key] = size
        positions.setdefault(key, []).extend(zip(item.idxs, item.root_idxs, strict=True))
    members = []
    for (module, role), pairs in positions.items():
        channel_of = np.full(max(sizes[module, role], max(index for index, _ in pairs) + 1), -1)
        for index, root in pairs:
            channel_of[index] = root
        members.append(Member(module, role, channel_of))
    return members


def _freeze_reasons(groups: Sequence[ChannelGroup], traced: Any, keep: Sequence[str]) -> dict[str, str]:
    """Group name -> why it cannot be pruned."""
    by_module = {op.module: op for op in traced.ops if op.module}
    reasons: dict[str, str] = {}
    for group in groups:
        modules = {member.module for member in group.members}
        if not traced.output_modules.isdisjoint(group.modules("producer")):
            reasons[group.name] = "network output"
        elif not group.modules("consumer"):
            reasons[group.name] = "nothing reads these channels through a weight"
        elif any(fnmatch.fnmatch(module, pattern) for module in modules for pattern in keep):
            reasons[group.name] = "kept by request"
        else:
            for member in group.members:
                op = by_module.get(member.module)
                if op is not None and op.op.kind == "conv" and op.op.groups > 1:
                    reasons[group.name] = f"grouped convolution {member.module}"
                elif member.role != "consumer" and (member.channel_of < 0).any():
                    reasons[group.name] = f"only part of {member.module}'s channels belong to it"
    return reasons


def _layers(traced: Any, groups: Sequence[ChannelGroup]) -> tuple[tuple[Layer, ...], tuple[set[str], str] | None]:
    """Layers with the channels of every tensor, or the names of groups whose coupling is not understood, and why."""
    index_of = {module: i for i, group in enumerate(groups) for module in group.modules("producer")}
    channels: dict[str, Channels] = {OpGraph.INPUT: Channels(traced.input_channels)}
    from_input = {OpGraph.INPUT}  # tensors whose channels are the input's: the dependency graph overlooks them
    layers = []
    for op in traced.ops:
        sources = tuple(channels[name] for name in op.inputs)
        touched = {groups[group].name for part in sources for group, _ in part.terms}
        if op.op.kind in ("conv", "linear", "channel_map"):
            group = index_of.get(op.module)
            out = Channels(op.op.out_channels) if group is None else Channels(0, ((group, 1),))
            readers = {i for i, g in enumerate(groups) if op.module in g.modules("consumer")}
            if readers != {group for group, _ in sources[0].terms}:
                names = touched | {groups[i].name for i in readers}
                return (), (names, f"unsupported coupling at {op.name}")
        elif op.op.kind == "concat":
            if touched and not from_input.isdisjoint(op.inputs):
                return (), (touched, f"concatenated with the network's input at {op.name}")
            out = Channels.joined(sources)
        elif op.op.kind == "flatten":
            out = sources[0].times(op.op.height * op.op.width)
        elif op.op.kind in ("add", "mul") and len(set(sources)) > 1:
            return (), (touched, f"unsupported coupling at {op.name}")
        else:
            out = sources[0]
        if op.op.kind not in ("conv", "linear", "channel_map") and from_input.issuperset(op.inputs):
            from_input.add(op.name)
        channels[op.name] = out
        layers.append(Layer(op.name, op.op, op.inputs, sources, out, op.module, op.batch_norm))
    return tuple(layers), None


__all__ = [
    "ChannelGroup",
    "Channels",
    "FrozenGroup",
    "Layer",
    "LayerGraph",
    "Member",
    "TracedOp",
    "build_graph",
    "width_grid",
]
