"""Sums, products and the like."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import fx, nn

from amc_hw.lowering.attention import Attention
from amc_hw.lowering.axes import plain_axes
from amc_hw.lowering.calls import PLAIN, shape_of
from amc_hw.lowering.constants import WRITTEN, is_constant
from amc_hw.lowering.values import TracedOp
from amc_hw.padding import in_plane
from amc_hw.symbolic import BATCH_NORMS, CONVS, TRANSPOSED
from profilers.ops import CONV_KINDS, OpSpec


class Arithmetic(Attention):
    """Of two tensors, of a tensor and a number, or of a tensor and a parameter."""

    def _arithmetic(self, node: fx.Node, kind: str) -> None:
        """Of two tensors, of a tensor and a number, or of a tensor and a parameter."""
        named = {key: value for key, value in node.kwargs.items() if value is not None}
        given: list[Any] = [*node.args, *(named[key] for key in ("input", "other") if key in named)]
        operands = [self._ask(each) if isinstance(each, fx.Node) and shape_of(each) is None else each for each in given]
        tensors = [operand for operand in operands if operand in self.value or operand in self.scores]
        others = [operand for operand in operands if operand not in tensors]
        if len(operands) != 2 or set(named) - {"input", "other", "alpha"} or named.get("alpha", 1) != 1:
            raise self._unsupported(node)
        if scored := [tensor for tensor in tensors if tensor in self.scores]:
            self._on_scores(node, kind, scored[0], others, number_first=operands[0] not in self.scores)
        elif len(tensors) == 2:
            self._binary(node, kind)
        elif not self.expanded.keys().isdisjoint(tensors):
            raise self._unsupported(node)
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
        if len(sources) == 1 and kind in ("add", "mul") and sources[0] not in self.expanded:  # with itself
            self._emit(node, kind, sources=sources * 2)
            return
        if len(tensors) != 2 or len(sources) != 2 or kind == "div":
            raise self._unsupported(node)
        own = {source: shape_of(self.expanded.get(source, source)) or () for source in tensors}
        image, gate = sorted(tensors, key=lambda source: -math.prod(own[source]))
        if own[image] != shape_of(node):
            self._spread(node, kind, tensors, own)
            return
        if self.axes[image] == self.axes[gate]:
            self._emit(node, kind)  # images of other sides by their positions alone: as tokens
            return
        _, channels, *positions = own[image]
        by_channel, by_place = (channels, *(1 for _ in positions)), (1, *positions)
        found = {"mul": "scale", "add": "shift"}.get(kind, "") if own[gate][1:] == by_channel else ""
        found = "mask" if not found and kind == "mul" and own[gate][1:] == by_place else found
        if not found:
            self._spread(node, kind, tensors, own)
            return
        if self._form(image) not in PLAIN:
            raise self._unsupported(node)
        if gate in self.expanded:
            self._count_repeated(gate, self.value[image])
        self._emit(node, found, sources=[image, gate])

    def _spread(self, node: fx.Node, kind: str, tensors: list[fx.Node], own: dict[fx.Node, tuple[int, ...]]) -> None:
        """Of images of as many channels, of which an only row or column stands for all. own: their shapes."""
        _, channels, *sides = shape_of(node) or ()
        if any(self._form(source) not in PLAIN or own[source][1] != channels for source in tensors):
            raise self._unsupported(node, "of as many channels only a single row, column or pixel is repeated")
        names = []
        for source in tensors:
            if source in self.expanded:
                self._count_repeated(source, self.value[source])
            by = in_plane([size // small for size, small in zip(sides, own[source][2:], strict=True)], 1)
            names.append(self._as_image(source))
            if by != (1, 1):  # small: 1, or as large
                op = OpSpec("upsample_nearest", (channels,), *self._size(names[-1])[1:], channels, stride=by)
                spread = TracedOp(self._free_name(f"{names[-1]}.spread"), op, (names[-1],))
                self._add(spread)
                names[-1] = spread.name
        height, width = in_plane(sides, 1)
        op = OpSpec(kind, (channels, channels), height, width, channels)
        self.value[node] = self._free_name(node.name)
        self.axes[node] = plain_axes((channels, height, width), len(sides) + 2)
        self._add(TracedOp(self.value[node], op, tuple(names)))

    def _and_constant(self, node: fx.Node, kind: str, source: fx.Node, constant: fx.Node) -> None:
        """A product with a parameter of one number per channel, or with what is computed of parameters; either with
        one of a single number; a sum with one number per channel and position."""
        shape, out, channels = shape_of(constant), shape_of(node), self._seen(source).channels
        name, rank = self.parameters.get(constant, ""), len(shape_of(source) or ())
        if not is_constant(constant) or shape is None or out != shape_of(source):
            raise self._unsupported(node)
        number = math.prod(shape) == 1
        if name.startswith(WRITTEN):  # into the code, not held by the network
            if number:
                written = float(getattr(self.root, name))
                self._and_number(node, kind, source, written, number_first=False)
                return
            name = ""
        layers = (*CONVS, *TRANSPOSED, nn.Linear, *BATCH_NORMS)
        if isinstance(self.modules.get(name.rpartition(".")[0]), layers):
            raise self._unsupported(node)
        place = self._channel_axis(source)
        padded = (*(1,) * (rank - len(shape)), *shape)
        per_channel = place is not None and math.prod(shape) == padded[place] == channels
        if name and not number and max(attrgetter(name)(self.root).shape) != channels:
            name = ""  # in several axes: it is not cut
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
        elif kind == "add" and (self._form(source) in PLAIN or self._are_tokens(source)):
            lies = (*padded[:2], 1, padded[2]) if self._form(source) == "signal" else padded
            self._emit(node, "add_map", sources=[source], constants=(self._held(constant, lies),))
        else:
            raise self._unsupported(node)
