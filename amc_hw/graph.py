"""A trained network as operators in execution order, and as groups of channels that must stay alike.

Operators come from torch.fx; which tensors share channels follows from them, channel by channel (`_Couplings`).
What cannot be pruned is frozen, with the reason.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import coo_array, csgraph
from torch import Tensor, nn

from amc_hw.errors import UserError
from amc_hw.lowering.values import TracedOp, TracedOps
from amc_hw.symbolic import eval_mode, has_computed_weight, holds_any, own_tensors, shared_tensors
from amc_hw.tracing import trace_ops
from profilers.ops import GROUPED_KINDS, ONE_CHANNEL_KINDS, PRODUCER_KINDS, SCALAR_KINDS, OpGraph, OpNode, OpSpec

TOLD = 8  #: of the groups, by name


@dataclass(frozen=True)
class Channels:
    """How many channels a tensor has: `constant` + sum of `repeat` * width over (group, repeat) in `terms`."""

    constant: int = 0
    terms: tuple[tuple[int, int], ...] = ()

    def count(self, widths: Sequence[int]) -> int:
        return self.constant + sum(int(widths[group]) * repeat for group, repeat in self.terms)


@dataclass(frozen=True)
class Layer(TracedOp):
    """One operator of the network at full width, with the groups its widths follow.

    sources: channels of every input. out: of its output.
    """

    sources: tuple[Channels, ...] = ()
    out: Channels = Channels()

    @property
    def groups(self) -> tuple[int, ...]:
        """Indices of the groups that this operator's cost depends on, ascending."""
        return tuple(sorted({group for part in (*self.sources, self.out) for group, _ in part.terms}))

    def at(self, widths: Sequence[int]) -> OpSpec:
        """The operator at the given widths (one number per group)."""
        channels = tuple(part.count(widths) for part in self.sources)
        out = self.out.count(widths)
        groups = channels[0] // self.op.step if self.op.kind in GROUPED_KINDS else self.op.groups
        return replace(self.op, in_channels=channels, out_channels=out, groups=groups)


@dataclass(frozen=True)
class Member:
    """One axis of one module that follows a group.

    role: "producer" (its outputs are the group), "through" (batch-norm, depthwise or grouped convolution: channel
    for channel), or "consumer" (its inputs are the group).
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
    """A set of tensors that keep the same channels. `name` is its first producer, `width` its channels.

    block: so many channels in a row stay or go together, a group of a convolution; widths are multiples of it.
    Of other producers, where chunks or ghost modules tie them, a channel of the group may be several.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    block: int = 1

    @property
    def each(self) -> int:
        """Channels of the producer `name` for one of the group's."""
        own = next(member for member in self.members if (member.module, member.role) == (self.name, "producer"))
        return len(own.channel_of) // self.width

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
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]
    more_inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def full_widths(self) -> tuple[int, ...]:
        return tuple(group.width for group in self.groups)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def op_graph(self, widths: Sequence[int] | None = None, *, batch: int = 1) -> OpGraph:
        """The network's operators at `widths` (default: full), ready to be built and timed."""
        widths = self.full_widths if widths is None else self.checked(widths)
        nodes = tuple(OpNode(layer.name, replace(layer.at(widths), batch=batch), layer.inputs) for layer in self.layers)
        return OpGraph(nodes, self.input_shape, self.outputs, self.more_inputs)

    def macs(self, widths: Sequence[int] | None = None) -> int:
        return self.op_graph(widths).macs

    @property
    def weighted(self) -> tuple[Layer, ...]:
        """Layers with weights per channel, one that is called at several places once."""
        own = [layer for layer in self.layers if layer.module and not _is_one_for_all(layer)]
        return tuple({layer.module: layer for layer in reversed(own)}.values())[::-1]

    def params(self, widths: Sequence[int] | None = None) -> int:
        """Weights and biases, batch-norms folded; a slope that all channels share is not counted."""
        widths = self.full_widths if widths is None else self.checked(widths)
        return sum(layer.at(widths).params for layer in self.weighted)

    def checked(self, widths: Sequence[int]) -> tuple[int, ...]:
        """`widths` as a tuple, one number per group and within 1..full; UserError if not."""
        if len(widths) != len(self.groups):
            names = ", ".join(group.name for group in self.groups[:TOLD])
            names += ", ... ('amc-hw graph' has all)" if len(self.groups) > TOLD else ""
            raise UserError(f"{len(widths)} widths given, the network has {len(self.groups)} groups: {names}")
        for group, width in zip(self.groups, widths, strict=True):
            if not 1 <= width <= group.width:
                raise UserError(f"width {width} for group {group.name}: it must be between 1 and {group.width}")
            if width % group.block:
                of = f"{group.block}, the channels of one group of a convolution"
                raise UserError(f"width {width} for group {group.name}: it must be a multiple of {of}")
        return tuple(int(width) for width in widths)

    def _group_named(self, name: str) -> str:
        """The group of that name, or the only one whose producer lies in the module of that name."""
        known = [group.name for group in self.groups]
        inside = [known_name for known_name in known if known_name.startswith(f"{name}.")]
        if name in known or len(inside) == 1:
            return name if name in known else inside[0]
        for frozen in self.frozen:
            if name == frozen.name or name in frozen.modules:
                raise UserError(f"{name!r} in --widths stays at its {frozen.width} channels: {frozen.reason}")
        raise UserError(f"no group {name!r} in --widths; groups: {', '.join(known)}")

    def parse_widths(self, text: str) -> tuple[int, ...]:
        """Widths from `24,48,...` (one per group, in order), `features.0=24,...` (the rest at full width) or `0.5` (of
        every group about that share, on the grid of `width_grid`)."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if len(parts) == 1 and "." in parts[0] and "=" not in parts[0]:
                return self._share(float(parts[0]))
            if parts and all("=" in part for part in parts):
                pairs = [part.split("=", 1) for part in parts]
                named = {self._group_named(name.strip()): int(value) for name, value in pairs}
                if len(named) < len(pairs):
                    raise UserError(f"--widths {text!r}: a group is named twice")
                return self.checked([named.get(group.name, group.width) for group in self.groups])
            return self.checked([int(part) for part in parts])
        except ValueError:
            wanted = "numbers such as 24,48, names such as conv1=24, or a share such as 0.5"
            raise UserError(f"--widths {text!r}: expected {wanted}") from None

    def _share(self, share: float) -> tuple[int, ...]:
        if not 0 < share <= 1:
            raise UserError(f"--widths {share:g}: a share lies between 0 and 1")
        grids = [width_grid(group.width, floor=0.0, block=group.block) for group in self.groups]
        return tuple(min(grid, key=lambda width: abs(width - share * grid[-1])) for grid in grids)


def width_grid(full: int, *, multiple: int = 8, floor: float = 0.2, block: int = 1) -> tuple[int, ...]:
    """The widths a group may take: multiples of min(multiple, full // 8) from `floor` on, and the full width.

    block: of the group; the step is rounded up to a multiple of it.
    """
    step = -(-max(1, min(multiple, full // 8)) // block) * block
    return tuple(width for width in range(step, full, step) if width >= floor * full - 1e-9) + (full,)


def build_graph(
    module: nn.Module,
    input_shape: tuple[int, ...],
    *,
    examples: Sequence[Tensor] | None = None,
    keep: Sequence[str] = (),
) -> LayerGraph:
    """Trace `module` on one input of `input_shape`, such as (C, H, W), and find its channel groups.

    examples: a tensor with a batch of 1 for every input, where there are several.
    keep: shell patterns of module names whose groups stay at full width.
    Raises UserError where the network cannot be traced or holds an operator that is not understood, and where a
    pattern of `keep` fits no module.
    """
    examples = [torch.zeros(1, *input_shape)] if examples is None else examples
    with eval_mode(module):
        traced = trace_ops(module, *examples)
    couplings = _Couplings(replace(traced, fixed=traced.fixed | _whole(module, traced)))
    names = list(dict.fromkeys(name for op in traced.ops for name in (op.module, op.batch_norm) if name))
    for pattern in keep:
        if not any(_named_by(name, pattern) for name in names):
            raise UserError(f"--keep {pattern!r} fits no module with weights; some are {', '.join(names[:5])}")
    groups, frozen = couplings.groups(keep)
    used = _used(traced)
    layers = tuple(
        Layer(
            **vars(op),
            sources=tuple(couplings.channels(couplings.labels[source], groups) for source in op.inputs),
            out=couplings.channels(couplings.labels[op.name], groups),
        )
        for op in traced.ops
        if op.name in used
    )
    (_, first), *more = traced.input_shapes.items()
    return LayerGraph(layers, groups, frozen, first, traced.outputs, tuple(more))


#: What undoes `torch.nn.utils.parametrize`, weight_norm among it.
PLAIN_AGAIN = ": torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm, makes them plain"


def _used(traced: TracedOps) -> set[str]:
    """Operators that the outputs follow from: others are in no file, and a runtime may leave them out."""
    found = set(traced.outputs)
    for op in reversed(traced.ops):
        if op.name in found:
            found.update(op.inputs)
    return found


def _whole(module: nn.Module, traced: TracedOps) -> dict[str, str]:
    """What layers read and give whose weights cannot be cut, with the reason why it stays as wide as it is."""
    shared, found = shared_tensors(module), dict[str, str]()
    modules = dict(module.named_modules())
    for op in traced.ops:
        if op.parameter and op.op.kind == "affine":
            owner, _, key = str(op.module).rpartition(".")
            tensor = own_tensors(modules[owner]).get(key) if owner in modules else None
            if tensor is None:
                found[op.name] = f"{op.module} is no parameter of the network"
            elif id(tensor) in shared:
                found[op.name] = f"{op.module} is shared with another layer"
        for name in (op.module, op.batch_norm):
            if name not in modules:
                continue
            if name in traced.read:
                found |= dict.fromkeys((*op.inputs, op.name), f"the network's code reads the weights of {name}")
            elif holds_any(modules[name], shared):
                found |= dict.fromkeys((*op.inputs, op.name), f"{name} shares its weights with another layer")
            elif has_computed_weight(modules[name]):
                found |= dict.fromkeys(
                    (*op.inputs, op.name), f"the weights of {name} are computed from others{PLAIN_AGAIN}"
                )
            elif isinstance(modules[name], nn.MultiheadAttention):
                found |= dict.fromkeys((*op.inputs, op.name), f"read by attention at {name}")
    return found


def _is_one_for_all(layer: TracedOp) -> bool:
    """Whether an operator's parameter is one number for all channels."""
    return layer.parameter and layer.op.kind in ("prelu", *SCALAR_KINDS)


def _sliced(labels: np.ndarray, op: TracedOp) -> np.ndarray:
    """Of what a `slice` gives: the same run of every group of channels."""
    each = op.op.out_channels // op.op.groups
    return labels.reshape(op.op.groups, -1)[:, op.start : op.start + each].reshape(-1)


def _named_by(module: str, pattern: str) -> bool:
    """Whether a shell pattern fits a module's name or that of one around it."""
    parts = module.split(".")
    return any(fnmatch.fnmatch(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


class _Couplings:
    """Which channels stay or go together.

    Every channel of every tensor gets a label. A layer with weights gives its outputs new ones, everything else
    passes on those that it reads; an addition ties the labels of its two sides. Labels that are tied, through others
    too, have one root, and a producer's roots name its group. A label that something ties to what cannot be pruned is
    fixed, with the reason.
    """

    def __init__(self, traced: TracedOps) -> None:
        self.traced = traced
        self._count = 0
        self._ties: list[tuple[np.ndarray, np.ndarray]] = []
        self._fixed: dict[int, str] = {}  # label -> why it cannot be pruned
        self._blocks: list[tuple[TracedOp, np.ndarray]] = []  # grouped convolutions, and the labels that they read
        self.labels: dict[str, np.ndarray] = {}  # tensor -> label of every channel
        self._producers: dict[str, np.ndarray] = {}  # module -> labels of its outputs
        self._readers: dict[tuple[str, str], np.ndarray] = {}  # (module, "through" or "consumer") -> labels
        self._group_of: dict[int, int] = {}  # root -> index of its group, once `groups` has found them
        for name, shape in traced.input_shapes.items():
            self.labels[name] = self._new(shape[1 if len(shape) == 2 else 0])  # tokens have their channels last
            self._fix(self.labels[name], "network input")
        for op in traced.ops:
            self.labels[op.name] = self._visit(op)
        for name in traced.outputs:
            self._fix(self.labels[name], "network output")
        for name, reason in traced.fixed.items():
            self._fix(self.labels[name], reason)
        pairs = np.concatenate([np.empty((0, 2), int), *(np.stack(tie, axis=1) for tie in self._ties)])
        edges = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(self._count, self._count))
        _, self._roots = csgraph.connected_components(edges, directed=False)
        for name, other, node in traced.counted:
            both = [self._roots[self.labels[each]] for each in (name, other)]
            if not np.array_equal(*both):
                for each in (name, other):
                    self._fix(self.labels[each], f"the network's code counts the channels of {other} at {node}")

    def _new(self, count: int) -> np.ndarray:
        self._count += count
        return np.arange(self._count - count, self._count)

    def _fix(self, labels: np.ndarray, reason: str) -> None:
        for label in labels.tolist():
            self._fixed.setdefault(label, reason)

    def _visit(self, op: TracedOp) -> np.ndarray:
        """Labels of the operator's output."""
        kind, first = op.op.kind, self.labels[op.inputs[0]]
        if kind in PRODUCER_KINDS:
            if op.module is None:
                out = self._new(op.op.out_channels)
                for labels in (first, out) if op.constants else ():
                    self._fix(labels, f"the weights of {op.name} are computed from others")
                return out
            made = self._producers.get(op.module)
            out = self._new(op.op.out_channels) if made is None else made
            self._producers[op.module] = out
            self._reads(op.module, "consumer", first)
            if op.op.groups > 1:
                for labels in (first, out):
                    self._fix(labels, f"grouped convolution {op.module}")
        elif kind == "concat":
            out = np.concatenate([self.labels[source] for source in op.inputs])
        elif kind in ("flatten", "rows_to_channels"):
            out = np.repeat(first, op.op.out_channels // len(first))
        elif kind in ("unflatten", "regroup"):
            out = self._new(op.op.out_channels)
        elif kind == "attention":
            for source in op.inputs:
                self._fix(self.labels[source], f"read by attention at {op.name}")
            out = self._new(op.op.out_channels)
            self._fix(out, f"made by attention at {op.name}")
        elif kind == "chunk":
            parts = first.reshape(op.op.groups, -1)
            self._ties += [(parts[0], part) for part in parts[1:]]
            out = parts[op.start]
        elif kind in ONE_CHANNEL_KINDS:
            self._fix(first, f"read together at {op.name}")
            out = self._new(1)
        elif kind in ("slice", "shuffle", "pixel_shuffle"):
            out = _sliced(first, op) if kind == "slice" else first
            out = first[:: op.op.stride[0] * op.op.stride[1]] if kind == "pixel_shuffle" else out
            self._fix(first, f"split or shuffled at {op.name}")
        else:
            out = first
            for source in op.inputs[1:] if kind != "mask" else ():
                self._ties.append((out, self.labels[source]))
            if kind == "grouped_conv":
                self._blocks.append((op, first))
                out = np.repeat(first, op.op.out_channels // len(first))
            if kind in ("layer_norm", "l2_norm", "group_norm", "softmax", "log_softmax"):
                self._fix(out, f"normalised together at {op.name}")
            elif kind in ("add_map", "prepend"):
                self._fix(out, f"added to or put before parameters at {op.name}")
        for module in (None if kind in PRODUCER_KINDS or _is_one_for_all(op) else op.module, op.batch_norm):
            if module is not None:
                self._reads(module, "through", out)
        return out

    def _reads(self, module: str, role: str, labels: np.ndarray) -> None:
        """A module reads these channels; where it is called twice, both calls read the same."""
        self._ties.append((self._readers.setdefault((module, role), labels), labels))

    def groups(self, keep: Sequence[str]) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
        """The groups that can be pruned, and the others."""
        order = {op.module: index for index, op in reversed(list(enumerate(self.traced.ops))) if op.module}
        fixed: dict[int, str] = {}
        for label, reason in self._fixed.items():
            root = int(self._roots[label])
            if reason == "network output" or root not in fixed:
                fixed[root] = reason
        found: list[ChannelGroup] = []
        frozen: list[FrozenGroup] = []
        for producers in self._tied():
            roots = {module: self._roots[self._producers[module]].tolist() for module in producers}
            every = set().union(*roots.values())
            # named after the first that has every channel once, if there is one: others have each several times
            name = next(
                (module for module, own in roots.items() if len(own) == len(every) == len(set(own))), producers[0]
            )
            index = {root: channel for channel, root in enumerate(dict.fromkeys(roots[name]))}
            members = [
                Member(each, "producer", np.array([index.get(r, -1) for r in own])) for each, own in roots.items()
            ]
            for (module, role), labels in self._readers.items():
                of = np.array([index.get(root, -1) for root in self._roots[labels].tolist()])
                if (of >= 0).any():
                    members.append(Member(module, role, of))
            members.sort(key=lambda member: (order.get(member.module, len(order)), member.role))
            block, unaligned = self._block(index)
            why = self._reason(roots, index, members, fixed, keep) or unaligned
            if why is None:
                self._group_of |= dict.fromkeys(index, len(found))
                found.append(ChannelGroup(name, len(index), tuple(members), block))
            else:
                modules = tuple(member.module for member in members)
                frozen.append(FrozenGroup(producers[0], len(roots[producers[0]]), why, modules))
        return tuple(found), tuple(frozen)

    def _block(self, index: Mapping[int, int]) -> tuple[int, str | None]:
        """Channels of a group that stay or go together, and why it cannot be pruned: where the groups of a convolution
        that reads it do not divide it. index: root -> channel."""
        block = 1
        for op, labels in self._blocks:
            channels = np.array([index.get(root, -1) for root in self._roots[labels].tolist()])
            read_together = channels.reshape(-1, op.op.step)
            mine = read_together[(read_together >= 0).any(1)]
            if not len(mine):
                continue
            block = math.lcm(block, op.op.step)
            first = mine[:, :1]
            if (mine != first + np.arange(op.op.step)).any() or (first % op.op.step).any() or len(index) % block:
                return 1, f"grouped convolution {op.module}"
        return block, None

    def _reason(
        self,
        roots: Mapping[str, Sequence[int]],
        index: Mapping[int, int],
        members: Sequence[Member],
        fixed: Mapping[int, str],
        keep: Sequence[str],
    ) -> str | None:
        """Why a group cannot be pruned; None where it can. roots: of every producer's channels."""
        for root in (root for own in roots.values() for root in own):
            if root in fixed:
                return "added to the network's input" if fixed[root] == "network input" else fixed[root]
        if not any(member.role == "consumer" for member in members):
            return "nothing reads these channels through a weight"
        if any(_named_by(member.module, pattern) for member in members for pattern in keep):
            return "kept by request"
        for own in roots.values():
            times = Counter(own)
            if times.keys() != index.keys() or len(set(times.values())) > 1:
                return f"tied only in part to {list(roots)[-1]}"
        return None

    def _tied(self) -> list[list[str]]:
        """Producers that share a channel, in network order."""
        sets: list[tuple[list[str], set[int]]] = []
        for module, labels in self._producers.items():
            roots = set(self._roots[labels].tolist())
            touching = [one for one in sets if one[1] & roots]
            for one in touching[1:]:
                touching[0][0].extend(one[0])
                touching[0][1].update(one[1])
                sets.remove(one)
            if touching:
                touching[0][0].append(module)
                touching[0][1].update(roots)
            else:
                sets.append(([module], roots))
        return [producers for producers, _ in sets]

    def channels(self, labels: np.ndarray, groups: Sequence[ChannelGroup]) -> Channels:
        """How many channels a tensor with these labels has."""
        counts = Counter(self._group_of.get(root, -1) for root in self._roots[labels].tolist())
        terms = tuple((group, counts[group] // groups[group].width) for group in sorted(counts) if group >= 0)
        return Channels(counts[-1], terms)


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
