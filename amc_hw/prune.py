"""Which channels stay, and the smaller network without the others.

Channels are ranked by weight magnitude (Li et al., ICLR 2017; AMC, ECCV 2018, section 3), taken over the weights
that *read* them: every consumer of a group is refitted afterwards (`amc_hw.refit`), its producers are not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.symbolic import CONVS, HAS_GROUPS, TRANSPOSED, own_tensors, shared_tensors

Kept = Mapping[str, np.ndarray]  # group name -> channels that stay; a group that is not named keeps all of them


@dataclass(frozen=True)
class KeptAxes:
    """Positions that stay on a module's output and input axis, ascending; None where all of them do."""

    out: np.ndarray | None = None
    into: np.ndarray | None = None


def channel_magnitudes(module: nn.Module, graph: LayerGraph) -> dict[str, np.ndarray]:
    """Group name -> for each of its channels the sum of |W| over all the weights that read it, (width,) float64."""
    magnitudes = {}
    for group in graph.groups:
        total = np.zeros(group.width)
        for member in group.members:
            if member.role != "consumer":
                continue
            reader = module.get_submodule(member.module)
            if isinstance(reader, ChannelMap):
                continue
            weight = oriented_weight(reader, member.module)  # (out, in) or (out, in, kh, kw)
            per_position = weight.abs().transpose(0, 1).flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
            mine = member.channel_of >= 0
            np.add.at(total, member.channel_of[mine], per_position[mine])
        magnitudes[group.name] = total
    return magnitudes


def keep_channels(
    module: nn.Module,
    graph: LayerGraph,
    widths: Sequence[int],
    *,
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Group name -> indices of the channels to keep, ascending: the `widths[i]` of largest magnitude, whole blocks of
    them where the group has some.

    Of channels with equal magnitude those with the lower index stay. A search passes `magnitudes`, made once by
    `channel_magnitudes`. Raises UserError on widths that do not fit the graph.
    """
    widths = graph.checked(widths)
    if magnitudes is None:
        magnitudes = channel_magnitudes(module, graph)
    kept = {}
    for group, width in zip(graph.groups, widths, strict=True):
        ranked = np.argsort(-magnitudes[group.name].reshape(-1, group.block).sum(1), kind="stable")
        blocks = np.sort(ranked[: width // group.block])
        kept[group.name] = (blocks[:, None] * group.block + np.arange(group.block)).reshape(-1)
    return kept


def kept_axes(graph: LayerGraph, kept: Kept) -> dict[str, KeptAxes]:
    """Module name -> what stays of its axes, for the modules that lose something.

    Raises ValueError where `kept` names no group of the graph, or channels that the group does not have.
    """
    if unknown := sorted(set(kept) - {group.name for group in graph.groups}):
        raise ValueError(f"no group {unknown[0]!r} in this graph")
    stays: dict[tuple[str, bool], np.ndarray] = {}  # (module, whether it is the input axis) -> mask
    for group in graph.groups:
        channels = np.asarray(kept.get(group.name, np.arange(group.width)))
        if not len(channels) or channels.min() < 0 or channels.max() >= group.width:
            which = f"channel {channels.min() if channels.min() < 0 else channels.max()}" if len(channels) else "none"
            raise ValueError(f"group {group.name} has channels 0..{group.width - 1}, cannot keep {which}")
        if len(np.unique(channels)) == group.width:
            continue
        blocks = channels.reshape(-1, group.block) if len(channels) % group.block == 0 else channels[:, None]
        if (blocks != blocks[:, :1] // group.block * group.block + np.arange(group.block)).any():
            raise ValueError(
                f"group {group.name} keeps whole blocks of {group.block} channels, not {channels.tolist()}"
            )
        for member in group.members:
            mask = np.isin(np.arange(len(member.channel_of)), member.kept_positions(channels))
            mask |= member.channel_of < 0  # another group decides about these
            key = (member.module, member.role == "consumer")
            stays[key] = stays[key] & mask if key in stays else mask
    positions = {key: np.nonzero(mask)[0] for key, mask in stays.items()}
    return {
        name: KeptAxes(positions.get((name, False)), positions.get((name, True)))
        for name in dict.fromkeys(name for name, _ in positions)
    }


@torch.no_grad()
def slice_channels(module: nn.Module, graph: LayerGraph, kept: Kept) -> nn.Module:
    """A smaller copy without the removed channels; `module` is left as it is, and shares nothing with the copy.

    Convolutions, linear layers, batch-norms (running statistics too), gains and `ChannelMap`s are
    sliced, and their attributes (`in_channels`, `num_features`, ...) say so. Sizes written into the network's own
    forward() are not. Raises UserError where a weight is shared between layers, or not a plain parameter.
    """
    shared = shared_tensors(module)
    smaller: dict[int, Any] = {}  # what deepcopy takes in place of a copy, by id
    attributes: dict[str, dict[str, int]] = {}
    modules = dict(module.named_modules())
    for name, axes in kept_axes(graph, kept).items():
        if name not in modules:
            gain = attrgetter(name)(module)
            smaller[id(gain)] = _like(gain, gain.index_select(int(np.argmax(gain.shape)), _index(axes.out, gain)))
            continue
        part = modules[name]
        if isinstance(part, ChannelMap):
            smaller[id(part)] = _sliced_map(part, axes)
            continue
        attributes[name] = _sliced_attributes(part, name, axes)
        for key, tensor in own_tensors(part).items():
            if tensor.dim() == 0:  # batch-norm counts its batches in a scalar
                continue
            if id(tensor) in shared:
                raise UserError(f"{name}.{key} is shared with another layer: such a network cannot be pruned")
            sliced = tensor.detach()
            turned = key == "weight" and isinstance(part, TRANSPOSED)
            if axes.into is not None and key == "weight":
                sliced = sliced.index_select(0 if turned else 1, _index(axes.into, tensor))
            if axes.out is not None:
                sliced = sliced.index_select(1 if turned else 0, _index(axes.out, tensor))
            elif axes.into is None or key != "weight":
                continue
            smaller[id(tensor)] = _like(tensor, sliced)
    for part in modules.values():  # what was computed with gradients, and kept, has no copy
        for tensor in vars(part).values():
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                smaller.setdefault(id(tensor), tensor.detach())
    copied = copy.deepcopy(module, smaller)
    for name, values in attributes.items():
        part = copied.get_submodule(name)
        if values.get("groups"):
            setattr(part, HAS_GROUPS, True)
        for attribute, value in values.items():
            setattr(part, attribute, value)
    return copied


def _like(tensor: Tensor, sliced: Tensor) -> Tensor:
    """What was cut out of a tensor, a parameter where that is one."""
    sliced = sliced.detach()
    return nn.Parameter(sliced, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else sliced


def _sliced_attributes(part: nn.Module, name: str, axes: KeptAxes) -> dict[str, int]:
    """The sizes that `part` has after slicing."""
    out = None if axes.out is None else len(axes.out)
    into = None if axes.into is None else len(axes.into)
    if isinstance(part, nn.modules.batchnorm._NormBase):
        sizes = {"num_features": out}
    elif isinstance(part, nn.PReLU):
        sizes = {"num_parameters": out}
    elif isinstance(part, nn.Linear):
        sizes = {"in_features": into, "out_features": out}
    elif isinstance(part, (*CONVS, *TRANSPOSED)) and part.groups == 1:
        sizes = {"in_channels": into, "out_channels": out}
    elif isinstance(part, CONVS) and out is not None and part.out_channels % part.in_channels == 0:
        groups = out * part.groups // part.out_channels
        sizes = {"in_channels": groups * (part.in_channels // part.groups), "out_channels": out, "groups": groups}
    else:
        raise UserError(f"{name}: a {type(part).__name__} with these options cannot be sliced")
    if not isinstance(part, nn.modules.batchnorm._NormBase):
        plain_weight(part, name)
    return {attribute: size for attribute, size in sizes.items() if size is not None}


def _sliced_map(part: ChannelMap, axes: KeptAxes) -> ChannelMap:
    into = range(part.in_channels) if axes.into is None else axes.into.tolist()
    out = range(part.out_channels) if axes.out is None else axes.out.tolist()
    moved = {before: after for after, before in enumerate(into)}
    return _map_like(part, [moved.get(part.index[position], -1) for position in out], len(into))


def _map_like(part: ChannelMap, index: Sequence[int], in_channels: int) -> ChannelMap:
    made = ChannelMap(index, part.stride, in_channels=in_channels).to(part.picks.device)
    return made.train(part.training)


def plain_weight(part: nn.Module, name: str) -> Tensor:
    """The weight of a layer, sharing its memory; UserError where it is not a plain parameter."""
    weight = part._parameters.get("weight")
    if weight is None:
        raise UserError(f"{name}: its weight is not a plain parameter; remove the parametrization before pruning")
    return weight.detach()


def oriented_weight(part: nn.Module, name: str) -> Tensor:
    """As `plain_weight`, outputs first: a transposed convolution's is turned round."""
    weight = plain_weight(part, name)
    return weight.transpose(0, 1) if isinstance(part, TRANSPOSED) else weight


def _index(positions: np.ndarray | None, like: Tensor) -> Tensor:
    assert positions is not None
    return torch.from_numpy(positions).to(like.device)
