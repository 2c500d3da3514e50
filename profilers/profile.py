"""Measure what a table lacks and append it, a little at a time, so that a killed run loses one measurement at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from profilers.errors import DeviceError
from profilers.ops import OpGraph, OpNode, OpSpec, digest
from profilers.predictor import Predictor
from profilers.sampling import Grids, corner_widths, random_widths
from profilers.table import LatencyTable, Measurement
from profilers.targets import Network, Target
from profilers.timing import LOADS, PRECISION, Steady, TimingPlan, loaded_anew

NETWORK_PLAN = TimingPlan(rounds=9, burst_s=0.02)
MOST_SEEDS = 1_000_003  #: between the seeds of one measurement and its repetition
OP_PLAN = TimingPlan(rounds=5, burst_s=0.004)
OPS_AT_ONCE = 8
#: Copies of an operator that is timed alone: so many MACs in all, or so many bytes, of values of FLOAT_BYTES each.
COPIED_MACS, COPIED_BYTES, MOST_COPIES, FLOAT_BYTES = 4e6, 1 << 20, 12, 4
POOL = 60  #: random networks of which the least known are measured
REFINE_NETWORKS, REFINE_OPS = 6, 24  #: at a time
MAX_REFINEMENTS = 6
READ, ALONE, RANDOM = "reading operators in random networks", "timing operators", "timing random networks"


@dataclass(frozen=True)
class ProfileJob:
    """network_at: the network at some widths; grids: the widths that every group may take, ascending; fine: every
    width from the smallest, where those off the channel multiple are to be predicted, too; networks: whose operators
    are measured; calibration: networks that are timed as a whole. way: of `profilers.device.WAYS`."""

    network_at: Callable[[Sequence[int]], OpGraph]
    grids: Grids
    fine: Grids = ()
    seed: int = 0
    networks: int = 40
    calibration: int = 24
    way: str = "auto"

    @property
    def unpruned(self) -> OpGraph:
        return self.network_at([grid[-1] for grid in self.grids])

    def random(self, count: int, *seed: int) -> list[OpGraph]:
        widths = random_widths(self.grids, count, seed=seed if len(seed) > 1 else seed[0], fine=self.fine)
        return [self.network_at(each) for each in widths]


@dataclass(frozen=True)
class Step:
    """One measurement to make, beside an anchor on any device: `run` returns the rows to append at once."""

    name: str
    run: Callable[[Anchor], list[Measurement]]


def missing_steps(job: ProfileJob, table: LatencyTable, target: Target) -> list[Step]:
    """What remains to be measured, in a fixed order; empty where the table has it all.

    Operators and networks to calibrate with come in turn: a table that time runs out for has some of both.
    """
    sampled = _sampled(job)
    operators = list(_op_steps(_way(job, target), sampled, table, target))
    # networks whose operators are read as they run would tell too small an error
    done = {row.details.get("digest") for row in table.of_type("calibration")} | set(sampled)
    networks = []
    for graph in job.random(job.calibration, job.seed + 1):
        if digest(graph) not in done:
            done.add(digest(graph))
            networks.append(Step(RANDOM, partial(_calibration, graph)))
    placed = [((index + 1) / len(steps), step) for steps in (operators, networks) for index, step in enumerate(steps)]
    return [step for _, step in sorted(placed, key=lambda pair: pair[0])]


def refining_steps(job: ProfileJob, table: LatencyTable, target: Target, predictor: Predictor) -> list[Step]:
    """What to measure next, where all of `missing_steps` is there and the predictions are not good enough: the
    networks, or the operators of networks, that the table knows least of, and more networks to calibrate with.

    They follow from the rows of the table, so a killed run goes on as it would have. Empty after MAX_REFINEMENTS.
    """
    done = {row.details.get("digest") for row in table.rows}
    way, unpruned = _way(job, target), digest(job.unpruned)
    calibrated = sum(row.details.get("anchor") == unpruned for row in table.of_type("calibration"))
    planned = job.calibration + (len(_sampled(job)) if way == "networks" else 0)
    if calibrated >= planned + REFINE_NETWORKS * MAX_REFINEMENTS:
        return []
    pool = {digest(graph): graph for graph in job.random(POOL, job.seed, 2, calibrated)}
    fresh = {name: graph for name, graph in pool.items() if name not in done}
    lowered = {name: target.lower(graph).ops for name, graph in fresh.items()}
    unsure = {name: float((predictor.deviation_ms(ops) ** 2).sum()) for name, ops in lowered.items()}
    chosen = sorted(fresh, key=lambda name: -unsure[name])[:REFINE_NETWORKS]
    if way == "networks":
        return [Step(RANDOM, partial(_calibration, fresh[name])) for name in chosen]
    if way == "context":
        steps = [Step(READ, partial(_in_context, fresh[name])) for name in chosen]
    else:
        measured = {row.op for row in table.of_type("op")}
        asked = dict.fromkeys(each for name in fresh for op in lowered[name] for each in _alike(op))
        ops = [op for op in asked if op not in measured]
        order = np.argsort(-predictor.deviation_ms(ops), kind="stable")[:REFINE_OPS]
        wanted = [ops[index] for index in order]
        chunks = [wanted[start : start + OPS_AT_ONCE] for start in range(0, len(wanted), OPS_AT_ONCE)]
        steps = [Step(ALONE, partial(_alone, chunk)) for chunk in chunks]
    others = [name for name in fresh if name not in chosen][:REFINE_NETWORKS]
    return steps + [Step(RANDOM, partial(_calibration, fresh[name])) for name in others]


class Anchor:
    """The unpruned network on a device, timed in between whatever else is: drift of the machine, and the difference
    between devices that are alike, is divided out by it."""

    def __init__(self, target: Target, graph: OpGraph, table: LatencyTable) -> None:
        self.target, self.graph, self.name = target, graph, digest(graph)
        self._steady = Steady(table.reference_ms(self.name, target.config.member))

    def time(
        self,
        networks: Sequence[OpGraph],
        plan: TimingPlan,
        *,
        seed: int = 0,
        precision: float = math.inf,
        loads: int = 1,
    ) -> tuple[dict[str, Any], list[list[float]]]:
        """What a row says of the anchor, and the networks' samples in milliseconds; DeviceError as in `Steady`.

        precision, loads: as of `loaded_anew`.
        """
        asked = [Network(self.graph), *map(Network, networks)]

        def measure(load: int) -> list[list[float]]:
            seeded = seed + MOST_SEEDS * load
            return self._steady(partial(self.target.time_networks, asked, plan, seed=seeded))

        anchor_ms, *rest = loaded_anew(measure, loads=loads, precision=precision)
        details: dict[str, Any] = {"anchor": self.name, "anchor_ms": float(np.median(anchor_ms))}
        told = {"member": self.target.config.member, "conditions": self.target.conditions()}
        return details | {key: value for key, value in told.items() if value}, rest


def time_network(graph: OpGraph, anchor: Anchor, kind: str, *, seed: int = 0, loads: int = LOADS) -> Measurement:
    """A row of type `kind`: the network timed interleaved with the anchor."""
    details, (samples,) = anchor.time([graph], NETWORK_PLAN, seed=seed, precision=PRECISION, loads=loads)
    return Measurement(kind, tuple(samples), graph=graph, details={"digest": digest(graph), **details})


def _calibration(graph: OpGraph, anchor: Anchor) -> list[Measurement]:
    return [time_network(graph, anchor, "calibration")]


def _way(job: ProfileJob, target: Target) -> str:
    """How operators are measured: as asked, or read in context where the runtime shows them; DeviceError where it
    is asked to and does not."""
    if job.way in ("alone", "networks"):
        return job.way
    if job.way == "auto" and target.config.whole_only:
        return "networks"
    if target.profile_ops(job.unpruned, time_s=0.01) is not None:
        return "context"
    if job.way == "context":
        raise DeviceError(f"{target.config.runtime} shows no operators in context: profile with --way alone")
    return "alone"


def _op_steps(way: str, graphs: Mapping[str, OpGraph], table: LatencyTable, target: Target) -> Iterator[Step]:
    """graphs: the networks whose operators are measured, by digest."""
    if way == "networks":
        done = {row.details.get("digest") for row in table.of_type("calibration")}
        for name, graph in graphs.items():
            if name not in done:
                yield Step(RANDOM, partial(_calibration, graph))
        return
    if way == "context":
        done = {row.details.get("digest") for row in table.of_type("network")}
        for name, graph in graphs.items():
            if name not in done:
                yield Step(READ, partial(_in_context, graph))
        return
    measured = {row.op for row in table.of_type("op")}
    wanted = [each for graph in graphs.values() for op in target.lower(graph).ops for each in _alike(op)]
    missing = [op for op in dict.fromkeys(wanted) if op not in measured]
    for start in range(0, len(missing), OPS_AT_ONCE):
        chunk = missing[start : start + OPS_AT_ONCE]
        yield Step(ALONE, partial(_alone, chunk))


def _sampled(job: ProfileJob) -> dict[str, OpGraph]:
    """The networks whose operators are measured, by digest."""
    corners = [job.network_at(widths) for widths in corner_widths(job.fine or job.grids)]
    return {digest(graph): graph for graph in corners + job.random(job.networks, job.seed)}


def _alike(op: OpSpec) -> list[OpSpec]:
    """The operator as it is measured alone, with inputs of equal channels; two where a concatenation's differ, one
    of less and one of more channels in all."""
    if op.kind != "concat" or len(set(op.in_channels)) == 1:
        return [op]
    share, rest = divmod(op.out_channels, len(op.in_channels))
    return [op.with_axes([each * len(op.in_channels)]) for each in ((share, share + 1) if rest else (share,))]


def _in_context(graph: OpGraph, anchor: Anchor) -> list[Measurement]:
    """Every operator of a network read while the network runs. The network's own row comes last: it marks the
    set as whole."""
    target = anchor.target
    network = time_network(graph, anchor, "network", loads=1)
    found = target.profile_ops(graph, time_s=0.2) or {}
    details = {key: value for key, value in network.details.items() if key != "digest"}
    rows = [
        Measurement("op", (max(found[node.name], 1e-6),), op=node.op, context="in_context", details=details)
        for node in target.lower(graph).nodes
        if node.name in found
    ]
    return [*rows, network]


def _copies(op: OpSpec, count: int) -> OpGraph:
    """`count` copies of an operator side by side: of a product on one input; of any other each on inputs of its own,
    or a runtime would compute it once for all. An addition inside of its kernel is written after it, with one second
    operand for all: the runtime takes it in. Tokens are laid out once."""
    names, image = [f"copy{index}" for index in range(count)], (op.in_channels[0], *_sides(op)[0])
    if op.fused_add:
        shape = (op.out_channels, op.out_height, op.out_width)
        sizes = (op.out_channels, op.out_channels), *shape[1:], op.out_channels
        add = OpSpec("add", *sizes, activation=op.activation, dtype=op.dtype, batch=op.batch)
        plain = replace(op, fused_add=False, activation="none")
        pairs = [
            (OpNode(f"{name}/product", plain, (OpGraph.INPUT,)), OpNode(name, add, (f"{name}/product", "sum")))
            for name in names
        ]
        return OpGraph(tuple(node for pair in pairs for node in pair), image, tuple(names), (("sum", shape),))
    first, before = OpGraph.INPUT, list[OpNode]()
    if op.tokens:
        first, laid = "tokens", OpSpec("to_tokens", image[:1], *image[1:], image[0], dtype=op.dtype, batch=op.batch)
        before = [OpNode(first, laid, (OpGraph.INPUT,))]
    if op.macs and op.kind != "attention":
        return OpGraph((*before, *(OpNode(name, op, (first,)) for name in names)), image, tuple(names))
    read = [[f"{name}.{place}" for place in range(len(op.in_channels))] for name in names]
    read[0][0] = first
    more = [pair for inputs in read for pair in zip(inputs, _input_shapes(op), strict=True)][1:]
    nodes = tuple(OpNode(name, op, tuple(inputs)) for name, inputs in zip(names, read, strict=True))
    return OpGraph((*before, *nodes), image, tuple(names), tuple(more))


def _input_shapes(op: OpSpec) -> list[tuple[int, ...]]:
    """Of one image, one for every input of an operator, as `OpGraph.more_inputs` has them."""
    pairs = zip(op.in_channels, _sides(op), strict=True)
    shapes: list[tuple[int, ...]] = [(h * w, c) if op.tokens else (c, h, w) for c, (h, w) in pairs]
    if op.kind in ("scale", "shift"):
        shapes[1] = (op.in_channels[1],)
    return shapes


def _sides(op: OpSpec) -> list[tuple[int, int]]:
    """(Height, width) of every input of an operator."""
    count = len(op.in_channels)
    if op.kind == "join":
        return [(op.height // count + (place < op.height % count), 1) for place in range(count)]
    sides = [(op.height, op.width)] * count
    if op.kind == "attention" and op.keys:
        sides[1:] = [(op.keys[0], op.keys[1])] * 2
    return sides


def _count(op: OpSpec) -> int:
    """Copies of an operator that are timed, and twice as many: enough to be seen, and where memory is all its time few
    enough for the caches, in which a network has it, too."""
    if op.macs:
        return int(np.clip(COPIED_MACS / op.macs, 2, MOST_COPIES))
    moved = op.out_channels * op.out_height * op.out_width + sum(op.in_channels) * op.height * op.width
    return int(np.clip(COPIED_BYTES / (2 * FLOAT_BYTES * op.batch * moved), 1, MOST_COPIES))


def _alone(ops: Sequence[OpSpec], anchor: Anchor) -> list[Measurement]:
    """Operators on their own: n and 2n copies, so that the overhead of a run cancels."""
    counts = [_count(op) for op in ops]
    networks = []
    for op, count in zip(ops, counts, strict=True):
        networks += [_copies(op, count), _copies(op, 2 * count)]
    details, samples = anchor.time(networks, OP_PLAN)
    rows = []
    for index, (op, count) in enumerate(zip(ops, counts, strict=True)):
        once, twice = np.array(samples[2 * index]), np.array(samples[2 * index + 1])
        each = np.maximum((twice - once) / count, 1e-5)  # below the clock's resolution there is no telling
        rows.append(Measurement("op", tuple(float(ms) for ms in each), op=op, details=details))
    return rows
