"""What the commands work on: a network on a device, and the latency table of the two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from amc_hw.errors import UserError
from amc_hw.graph import LayerGraph, build_graph, width_grid
from amc_hw.models import LoadedModel, load_model
from amc_hw.models.checkpoint import checkpoint_sha256, load_checkpoint
from amc_hw.policy import Policy, load_policy, policy_file
from amc_hw.prune import slice_channels
from amc_hw.resources import Grids
from amc_hw.specs import named_path, parse_spec, source_sha256
from amc_hw.weights import check_reading
from profilers.device import DeviceConfig, load_device
from profilers.multiple import channel_multiple as detect_multiple
from profilers.ops import OpGraph, digest
from profilers.predictor import Predictor
from profilers.profile import ProfileJob
from profilers.store import TableStore
from profilers.table import LatencyTable
from profilers.targets import Target, open_targets

USUAL_FLOOR = 0.2  #: smallest fraction of a group's channels
USUAL_MULTIPLE = 8  #: where neither a flag nor the device's configuration nor its table says another


@dataclass(frozen=True)
class Subject:
    """A network on a device. grids: the widths that every group may take, ascending; floor: the smallest fraction;
    keep: patterns of the modules that stay at full width; base: the policy that the network was pruned by before;
    targets: all devices that a table may be measured on, `target` first."""

    model: LoadedModel
    graph: LayerGraph
    device: DeviceConfig
    target: Target
    grids: Grids
    floor: float
    keep: tuple[str, ...] = ()
    base: Policy | None = None
    targets: tuple[Target, ...] = ()

    @property
    def store(self) -> TableStore:
        return TableStore(self.target)

    @property
    def runs_on(self) -> dict[str, Any]:
        """What latencies are of, for a result: device, runtime, threads, dtype, and images of one inference."""
        identity = self.target.identity()
        return {
            "device": identity.soc,
            "runtime": f"{identity.runtime} {identity.runtime_version}",
            "threads": identity.threads,
            "dtype": identity.dtype,
            "batch": identity.batch,
        }

    def job(self, *, seed: int = 0, way: str = "auto") -> ProfileJob:
        """What its table should hold: widths on and off the channel multiple. way: of `profilers.device.WAYS`."""
        smallest = [max(1, math.ceil(self.floor * group.width - 1e-9)) for group in self.graph.groups]
        blocks = [group.block for group in self.graph.groups]
        fine = tuple(
            tuple(range(-(-min(low, grid[0]) // block) * block, grid[-1] + 1, block))
            for low, grid, block in zip(smallest, self.grids, blocks, strict=True)
        )
        return ProfileJob(self.network_at, self.grids, fine, seed, way=way)

    def network_at(self, widths: Sequence[int] | None) -> OpGraph:
        return self.graph.op_graph(widths, batch=self.device.batch)


def load_graph(
    model: str,
    *,
    input_shape: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    keep: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[LoadedModel, LayerGraph]:
    """A model given by its spec, and its channel groups and operators. mean, std: in place of the model's own.

    UnsupportedOperatorError where the operators are not what the network computes.
    """
    loaded = load_model(model, input_shape=input_shape, checkpoint=checkpoint, mean=mean, std=std)
    graph = build_graph(loaded.module, loaded.input_shape, examples=loaded.example_inputs, keep=keep)
    check_reading(loaded.module, graph, loaded.example_inputs)
    return loaded, graph


def found_near(text: str, path: Path, policy: Policy) -> str:
    """A spec; the file or folder of the user's own that it names is looked for in the working directory, then in the
    folders above the policy at `path`: where its search was run. Of several Python files the one that is as it was.

    UserError where there is none; a warning where none is as it was.
    """
    spec = parse_spec(text)
    named = named_path(spec)
    if named is None:
        return text
    places = [Path(named).expanduser(), *(folder / named for folder in path.resolve().parents)]
    there = [place for place in dict.fromkeys(places) if place.exists()]
    if not there:
        raise UserError(f"{path} names {named!r}: there is none here, and none in a folder above the policy")
    wanted = policy.sources.get(named)
    same = [place for place in there if wanted in (None, source_sha256(str(place)))]
    if not same:
        warnings.warn(f"{there[0]} is not as it was when {path} was found", stacklevel=2)
    at = str([*same, *there][0])
    if at == str(places[0]):
        return text
    return str(replace(spec, name=at) if spec.is_file else replace(spec, path=at))


@dataclass(frozen=True)
class Pruned:
    """The network of a policy: the unpruned one, its graph, and the pruned module with its weights, in eval mode."""

    policy: Policy
    model: LoadedModel
    graph: LayerGraph
    module: nn.Module
    weights: Path  #: the file of the module's weights

    def weights_sha256(self) -> str:
        return checkpoint_sha256(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """A group that the policy does not know of was frozen then."""
        return tuple(self.policy.widths.get(group.name, group.width) for group in self.graph.groups)


def open_pruned(path: Path) -> Pruned:
    """The network of a `policy.json`, or that of a folder, and the weights beside it; UserError where they do not fit
    each other."""
    path = policy_file(path)
    found = load_policy(path)
    model, graph = load_graph(
        found_near(found.model, path, found),
        input_shape=found.input_shape,
        keep=found.keep,
        mean=found.mean,
        std=found.std,
    )
    model = replace(model, spec=found.model, file=model.spec)
    try:
        module = slice_channels(model.module, graph, found.kept_arrays())
        graph.checked([found.widths.get(group.name, group.width) for group in graph.groups])
    except (ValueError, KeyError, UserError) as error:
        raise UserError(f"{path} does not fit {found.model}: {error}") from None
    weights = path.parent / found.weights
    load_checkpoint(module, weights)
    if found.network not in (None, digest(graph.op_graph())):
        warnings.warn(
            f"{path} is of a network with other operators than {found.model} has now: has its source changed?",
            stacklevel=2,
        )
    return Pruned(found, model, graph, module.eval(), weights)


def open_subject(
    *,
    device: str,
    model: str,
    input_shape: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    channel_multiple: int | None = None,
    floor: float = USUAL_FLOOR,
    threads: int | None = None,
    keep: Sequence[str] = (),
    dtype: str | None = None,
    serials: Sequence[str] = (),
    start: Path | None = None,
    unpruned: Pruned | None = None,
) -> Subject:
    """A network with at least one group to prune, on a device; UserError or DeviceError where there is none.

    start: a policy whose pruned network takes the place of the model's. unpruned: where the model is loaded already.
    """
    config = load_device(device).at(serials)
    if threads is not None:
        config = replace(config, threads=threads)
    if dtype is not None:
        config = replace(config, dtype=dtype)
    if not 0 < floor <= 1:
        raise UserError(f"--floor {floor} must be above 0 and at most 1")
    base: Pruned | None = None
    if unpruned is not None:
        loaded, graph = unpruned.model, unpruned.graph
    elif start is None:
        loaded, graph = load_graph(model, input_shape=input_shape, checkpoint=checkpoint, keep=keep)
    else:
        base = open_pruned(start)
        keep = (*base.policy.keep, *keep)
        loaded = replace(base.model, module=base.module, checkpoint_sha256=base.weights_sha256())
        graph = build_graph(base.module, loaded.input_shape, examples=loaded.example_inputs, keep=keep)
    if not graph.groups:
        reasons = "; ".join(f"{frozen.name}: {frozen.reason}" for frozen in graph.frozen)
        raise UserError(f"{model} has no prunable layer ({reasons})")
    targets = open_targets(config)
    target = targets[0]
    multiple = channel_multiple or config.channel_multiple
    if not multiple:
        table = TableStore(target).find()
        multiple = (table and detect_multiple(table)) or USUAL_MULTIPLE
    full = dict(zip((group.name for group in graph.groups), graph.full_widths, strict=True))
    if base is not None:  # the widths of the network that was unpruned at first, as far as they are left
        full |= {group.name: group.width for group in base.graph.groups if group.name in full}
    grids = tuple(
        (*(width for width in allowed if width < group.width), group.width)
        for group in graph.groups
        for allowed in [width_grid(full[group.name], multiple=multiple, floor=floor, block=group.block)]
    )
    return Subject(
        loaded, graph, config, target, grids, floor, tuple(keep), base.policy if base else None, tuple(targets)
    )


def read_table(subject: Subject) -> LatencyTable:
    """The device's table as it is; TableError where there is none, or only of other identities."""
    return subject.store.read(_profile_command(subject))


def _profile_command(subject: Subject) -> str:
    """The command that measures the subject's table."""
    config, usual = subject.device, load_device(subject.device.name)
    flags: list[tuple[str, Any]] = [("device", config.name), ("model", subject.model.spec)]
    if subject.model.asked is not None:
        flags.append(("input", "x".join(map(str, subject.model.asked))))
    named = ("dtype", "threads")
    flags += [(name, getattr(config, name)) for name in named if getattr(config, name) != getattr(usual, name)]
    flags += [("floor", subject.floor)] if subject.floor != USUAL_FLOOR else []
    flags += [("keep", f"'{pattern}'") for pattern in subject.keep]
    return " ".join(["amc-hw profile", *(f"--{name} {value}" for name, value in flags)])


def read_predictor(subject: Subject, table: LatencyTable | None = None) -> Predictor:
    """Predictions for the device, from its table as it is; TableError as in `read_table`."""
    table = read_table(subject) if table is None else table
    away = not subject.target.can_time
    return Predictor(table, subject.target.lower, extrapolate=subject.device.extrapolate, away=away)
