"""What is known while the graph of a network is walked: the value of every tensor, and the operators so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.lowering.axes import (
    CHANNELS,
    Axes,
    Seen,
    image_axes,
    last_axes,
    plain_axes,
    signal_axes,
    size_of,
    token_axes,
    vector_axes,
    whole,
)
from amc_hw.lowering.calls import AS_IT_LIES, OVER_CHANNELS, OVER_TOKENS, PLAIN, line_of, rank_of, shape_of
from amc_hw.lowering.constants import Constant
from amc_hw.lowering.scores import Scores
from amc_hw.padding import Pads
from amc_hw.symbolic import Asked, of_images, readers, sizes_asked
from profilers.ops import KINDS, OpSpec


@dataclass(frozen=True)
class TracedOp:
    """An operator with the modules it came from; `inputs` are names of earlier ones or of the network's inputs.

    name: the module's dotted name, or a name made from the operation where there is no module.
    module, batch_norm: dotted names of the modules that hold the weights; `module` also of a `parameter` that is read
    as it is.
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
    """input_shapes: as of `OpGraph.inputs`, by name, `OpGraph.INPUT` first. fixed: operators whose output channels the
    network's code counts on, with the reason. counted: (operator, another, node): the code gives the first's output as
    many channels as the other's has. read: modules whose weights the code reads, or that it calls on parameters."""

    ops: tuple[TracedOp, ...]
    outputs: tuple[str, ...]
    input_shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, str] = field(default_factory=dict)
    counted: tuple[tuple[str, str, str], ...] = ()
    read: frozenset[str] = frozenset()


class Values:
    """Operators, and which of them every node of an fx graph has its tensor from."""

    def __init__(self, graph_module: fx.GraphModule, asked: Asked) -> None:
        self.root = graph_module
        self.modules = dict(graph_module.named_modules())
        self.graph, self.asked = graph_module.graph, asked
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
        self.expanded: dict[fx.Node, fx.Node] = {}  # as large as another tensor: what was repeated
        self.padded: dict[fx.Node, tuple[fx.Node, Pads]] = {}  # zero-padded: the image, what is around it
        self.parameters: dict[fx.Node, str] = {}
        self.rigid: set[fx.Node] = set()  # of those, that the network's code gives a shape of so many channels
        self.fixed: dict[str, str] = {}
        self.counted: list[tuple[str, str, str]] = []
        self.read: set[str] = set()  # modules that constants are computed with
        self.outputs: list[str] = []
        self.input_shapes: dict[str, tuple[int, ...]] = {}

    def _unsupported(
        self, node: fx.Node, why: str = "it is not among what is read (docs/networks.md)"
    ) -> UnsupportedOperatorError:
        what: Any = node.target
        if node.op == "call_module":
            what = f"{type(self.modules[str(node.target)]).__name__} ({node.target})"
        else:
            called = getattr(what, "__name__", what)
            stack = list(node.meta.get("nn_module_stack", {}).values())
            place = f"in {stack[-1][0]}" if stack else line_of(node)
            what = f"{called} ({node.name}{f' {place}' if place else ''})"
        form = " in this form" if str(getattr(node.target, "__name__", node.target)) in KINDS else ""
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
        anyhow = kind in (*AS_IT_LIES, "global_avg_pool", "unflatten")
        anyhow = anyhow or (kind in ("slice", "chunk") and axes is not None)
        if kind in ("join", "regroup"):
            inputs = [self._as_tokens(source) for source in sources]
        else:
            inputs = self._as_they_lie(sources) if anyhow else self._laid_out(kind, sources, form)
        kind = "conv" if kind == "linear" and form == "last" else kind
        all_channels, sides = tuple(self._size(name)[0] for name in inputs), self._size(inputs[0])[1:]
        if kind in ("crop", "regroup") and inputs[0] in self.tokens:
            sides = math.prod(sides), 1
        if kind == "join":
            sides = sum(math.prod(self._size(name)[1:]) for name in inputs), 1
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
        return plain_axes(out, len(shape_of(node) or ()))

    def _as_they_lie(self, sources: Sequence[fx.Node]) -> list[str]:
        """The values that an operator reads, all as images or all as tokens."""
        names = [self.value[source] for source in sources]
        alike = self.tokens.isdisjoint(names) and len({self._size(name) for name in names}) == 1
        return names if alike else [self._as_tokens(source) for source in sources]

    def _laid_out(self, kind: str, sources: Sequence[fx.Node], form: str) -> list[str]:
        """The values that an operator reads, as images, or as tokens where it takes these."""
        if form == "tokens" and kind in (*OVER_CHANNELS, *OVER_TOKENS):
            return [self._as_tokens(source) for source in sources]
        taken = ("vector", *PLAIN, *(["last"] if kind in OVER_CHANNELS else []))
        for source in sources:
            if self._form(source) not in taken:
                raise UnsupportedOperatorError(
                    f"{source.name} is not an image or a vector of channels, but {shape_of(source)}"
                )
        return [self._as_image(source) for source in sources]

    def _size(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) of a value; H = W = 1 for a vector."""
        if name in self.input_shapes:
            shape = self.input_shapes[name]
            channels, height, width = (shape[1], shape[0], 1) if len(shape) == 2 else (*shape, 1, 1)[:3]
            return channels, height, width
        op = self.ops[name].op
        return op.out_channels, op.out_height, op.out_width

    def _seen(self, node: fx.Node) -> Seen:
        return Seen(self.value[node], self._size(self.value[node]), self.axes[node])

    def _form(self, node: fx.Node) -> str:
        """What a node's tensor is: an "image" (N, C, H, W), one with its channels "last", a "signal" (N, C, L), a
        "vector" (N, C), or "tokens", channels last and whole, whatever is before them; "" for anything else."""
        seen = self._seen(node)
        if seen.axes == image_axes(self._sides(seen)):
            return "image"
        if self._is_row(node) and self._sides(seen)[1] == 1:
            return "signal"
        if seen.axes == vector_axes(seen.channels) and seen.positions == 1:
            return "vector"
        if seen.name not in self.tokens and seen.axes == last_axes(seen.shape):
            return "last"
        return "tokens" if seen.axes[-1] == whole(CHANNELS, seen.channels) else ""

    def _are_tokens(self, node: fx.Node) -> bool:
        """Whether a node's tensor is (N, positions, channels), all of either."""
        seen = self._seen(node)
        return seen.axes == token_axes(seen.channels, seen.positions)

    def _is_row(self, node: fx.Node) -> bool:
        """Whether a node's tensor is (N, channels, positions), all of either."""
        seen = self._seen(node)
        return seen.axes == signal_axes(seen.shape)

    def _sides(self, seen: Seen) -> tuple[int, int, int]:
        """(C, H, W) of a value; of tokens, and of an only row or column, as the tensor has them."""
        if (seen.name in self.tokens or 1 in seen.shape[1:]) and len(seen.axes) in (3, 4):
            height, width = map(size_of, ((), *seen.axes[2:])[-2:])
            return (seen.channels, height, width) if height * width == seen.positions else seen.shape
        return seen.shape

    def _as_tokens(self, node: fx.Node) -> str:
        """A node's value as tokens."""
        name, (channels, height, width) = self.value[node], self._size(self.value[node])
        return name if name in self.tokens else self._relaid(name, "to_tokens", (channels, height, width))

    def _as_image(self, node: fx.Node) -> str:
        """A node's value as an image or a vector."""
        seen = self._seen(node)
        sides = self._sides(seen)
        lies = seen.name not in self.tokens and sides == seen.shape
        return seen.name if lies else self._relaid(self._as_tokens(node), "to_image", sides)

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
        if self._form(node) not in (*PLAIN, "last", "vector"):
            raise UnsupportedOperatorError(f"{node.name} is not an image or a vector of channels, but {shape_of(node)}")
        return self._sides(self._seen(node))

    def _out_image(self, node: fx.Node) -> tuple[int, int, int]:
        """(C, H, W) of a node that gives an image or a signal, whether or not it has a value by now."""
        _, channels, *sides = shape_of(node) or ()
        height, width = (1, *sides)[-2:]
        return channels, height, width

    def _channel_axis(self, node: fx.Node) -> int | None:
        """Where the channels of a tensor are, all of them."""
        channels = {"image": 1, "signal": 1, "vector": 1, "last": 3, "tokens": len(self.axes[node]) - 1}
        return channels.get(self._form(node))

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
            passed = self.parts[source][0] if source in self.parts else self._passed(source)
            if passed is None:
                return name
            source = passed
        return None

    def _passed(self, node: fx.Node) -> fx.Node | None:
        """What a node reads that has no operator of its own: its value is that of what it reads."""
        sources = [source for source in node.all_input_nodes if source in self.value or source in self.parts]
        if len(sources) != 1:
            return None
        if sources[0] in self.parts:  # a tuple, of which the node is a part
            whole = self.parts[sources[0]][0]
            return sources[0] if self.value.get(whole) == self.value[node] else None
        return sources[0] if self.value[sources[0]] == self.value[node] else None

    def _called_again(self, *modules: str | None) -> bool:
        """Whether one of the modules is called at several places."""
        calls = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        return any(calls.count(module) > 1 for module in modules if module)

    def _activate(self, node: fx.Node, activation: str) -> None:
        """The operator whose value the node has also computes `activation`."""
        traced = self.ops[self.value[node]]
        self.ops[traced.name] = replace(traced, op=replace(traced.op, activation=activation))

    def _number(self, given: Any, node: fx.Node) -> int:
        """A whole number that a call of `node` is given, or that the network's code computed of sizes."""
        given = self._ask(given) if isinstance(given, fx.Node) else given
        if not isinstance(given, int):
            raise self._unsupported(node)
        return given

    def _ask(self, node: fx.Node) -> Any:
        """What a node that is no tensor was for the examples, None where that depends on values or on how many images
        there are."""
        asked = sizes_asked(node, rank_of)
        weights = {each.name for each in self.parameters}
        if asked is None or of_images({each for each in asked if each[0] not in weights}):
            return None
        self.asked |= asked
        return node.meta.get("known")

    def _listed(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes or dimensions, which a call takes one by one or in a tuple."""
        given: Any = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size")),)
        return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)

    def _held(self, node: fx.Node, shape: Sequence[int] | None = None) -> Constant:
        constant = Constant(node, self.root, shape)
        self.asked |= constant.asked
        self.read |= constant.read
        return constant
