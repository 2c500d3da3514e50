"""Calls of which an attention is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from amc_hw.lowering.axes import CHANNELS, Part, Seen, of_dim, size_of, whole
from amc_hw.lowering.calls import shape_of
from amc_hw.lowering.constants import is_constant
from amc_hw.lowering.scores import Scores, as_product, attended, scores_of
from amc_hw.lowering.shapes import Shapes
from amc_hw.lowering.values import TracedOp
from profilers.ops import OpSpec


class Attention(Shapes):
    """Products of queries and keys, what becomes of them, and their product with the values."""

    def _product(self, node: fx.Node, first: Any, second: Any) -> None:
        """Of queries and keys, or of what a softmax makes of that and values."""
        if first in self.scores or second in self.scores:
            weights, value = (first, second) if first in self.scores else (second, first)
            scores = self.scores[weights]
            if scores.turned is not (weights is second) or value not in self.value:
                raise self._unsupported(node)
            self._attend(node, scores, self._seen(value))
            return
        scores_found = scores_of(self._seen(first), self._seen(second))
        if scores_found is None:
            raise self._unsupported(node)
        self.scores[node] = scores_found

    def _einsum(self, node: fx.Node) -> None:
        given: Any = node.args
        equation, first, second = (given[0], *given[1]) if isinstance(given[1], list | tuple) else given
        scores = self.scores.get(first)
        known = self.axes[first] if scores is None else (*scores.places, *(scores.query.axes[-2], scores.key.axes[-2]))
        found = as_product(equation, (known, self.axes[second]))
        if found is None or (scores is not None and (found[0] != known or scores.turned)):
            raise self._unsupported(node)
        left, right, order = found
        if scores is not None:
            self._attend(node, scores, replace(self._seen(second), axes=right), order)
            return
        made = scores_of(replace(self._seen(first), axes=left), replace(self._seen(second), axes=right))
        if made is None or order != tuple(range(made.rank)):
            raise self._unsupported(node)
        self.scores[node] = made

    def _attention_call(self, node: fx.Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False), **node.kwargs)
        query, key, value = (self._seen(given[name]) for name in names[:3])
        scores = scores_of(query, key.turned)
        for flag, instead in (("is_causal", "give the mask as attn_mask"), ("enable_gqa", "repeat keys and values")):
            if given.get(flag):
                raise self._unsupported(node, f"{flag} is not read, {instead}")
        if scores is None:
            raise self._unsupported(node)
        scale = given.get("scale")
        scores = replace(scores, scale=size_of(query.axes[-1]) ** -0.5 if scale is None else float(scale))
        if (mask := given.get("attn_mask")) is not None:
            scores = self._biased(node, scores, mask)
        self._attend(node, replace(scores, weights=True), value)

    def _on_scores(self, node: fx.Node, kind: str, source: fx.Node, others: list[Any], *, number_first: bool) -> None:
        """Scores times a number, or with a bias."""
        scores, (other,) = self.scores[source], others
        made = None
        if isinstance(other, int | float) and kind in ("mul", "div") and other and not (number_first and kind == "div"):
            made = scores.scaled(other if kind == "mul" else 1 / other)
        elif kind == "add" and isinstance(other, fx.Node) and shape_of(node) == shape_of(source):
            made = self._biased(node, scores, other)
        if made is None:
            raise self._unsupported(node)
        self.scores[node] = made

    def _biased(self, node: fx.Node, scores: Scores, bias: fx.Node) -> Scores:
        """Scores and a table, (heads, queries, keys) or what broadcasts to it: the same for every window."""
        shape = shape_of(bias)
        if not is_constant(bias) or shape is None or scores.bias is not None or scores.weights or scores.turned:
            raise self._unsupported(node)
        if not bias.meta["tensor_meta"].dtype.is_floating_point:
            raise self._unsupported(node, "masks are read as numbers to add, of 0 and -inf")
        padded = (*(1,) * (scores.rank - len(shape)), *shape)
        if any(size > 1 and not of_dim(axis, CHANNELS) for size, axis in zip(padded, scores.places, strict=False)):
            raise self._unsupported(node)
        return replace(scores, bias=bias)

    def _attend(
        self, node: fx.Node, scores: Scores, value: Seen, order: Sequence[int] | None = None, *, name: str = ""
    ) -> None:
        """order: where an axis of the product stands among the node's. name: of the operator, else its module's."""
        found = attended(scores, value)
        if found is None:
            raise self._unsupported(node)
        axes = found.axes if order is None else tuple(found.axes[at] for at in order)
        names = [scores.query.name, scores.key.name, value.name]
        if not self.tokens.isdisjoint(names):
            names = [self._relaid(n, "to_tokens", self._size(n)) if n not in self.tokens else n for n in names]
        channels, sides = tuple(self._size(each)[0] for each in names), scores.query.shape[1:]
        op = OpSpec("attention", channels, *sides, tokens=names[0] in self.tokens, **found.sizes())
        constants = () if scores.bias is None else (self._held(scores.bias),)
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = self._free_name(name or (stack[-1][0] if stack and stack[-1][0] else node.name))
        self._add(TracedOp(name, op, tuple(names), numbers=(scores.scale,), constants=constants))
        self.value[node], self.axes[node] = name, axes

    def _linear_call(self, node: fx.Node) -> None:
        """With weights that the network's code computes, or takes from where no layer is."""
        given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False), **node.kwargs)
        source, read = given["input"], [part for part in (given["weight"], given.get("bias")) if part is not None]
        if self._form(source) not in ("last", "tokens", "vector") or not all(map(is_constant, read)):
            raise self._unsupported(node)
        self._emit(
            node,
            "linear",
            sources=[source],
            out_channels=(shape_of(read[0]) or ())[0],
            constants=tuple(map(self._held, read)),
        )

    def _multihead(self, node: fx.Node, module: nn.MultiheadAttention, name: str) -> None:
        """PyTorch's own module, of one tensor: queries, keys and values of one product, attention, and one more."""
        given = [*node.args, *(node.kwargs[key] for key in ("query", "key", "value") if key in node.kwargs)]
        source, rest = (
            node.all_input_nodes[0],
            {key for key, value in node.kwargs.items() if value not in (None, False)},
        )
        plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        plain = plain and type(module).forward is nn.MultiheadAttention.forward
        known = {"query", "key", "value", "need_weights", "average_attn_weights"}
        alone = node.all_input_nodes == [source] and len(given) == 3
        if not (plain and alone and rest <= known and len(self.axes[source]) == 3):
            raise self._unsupported(node)
        channels, heads = module.embed_dim, module.num_heads
        self._emit(node, "linear", out_channels=3 * channels, module=name)
        qkv = self._seen(node)
        places, rows, _ = qkv.axes if module.batch_first else (qkv.axes[1], qkv.axes[0], None)
        each = channels // heads
        parts = []
        for start in range(3):
            op = OpSpec("chunk", (3 * channels,), *qkv.shape[1:], channels, groups=3, tokens=True)
            part = self._free_name(f"{name}.{'qkv'[start]}")
            self._add(TracedOp(part, op, (qkv.name,), start=start))
            split = (Part(CHANNELS, each, heads),) if heads > 1 else ()
            parts.append(Seen(part, (channels, *qkv.shape[1:]), (places, split, rows, whole(CHANNELS, each))))
        query, key, value = parts
        scores = scores_of(query, key.turned)
        if scores is None:
            raise self._unsupported(node)
        self._attend(node, replace(scores, scale=each**-0.5, weights=True), value, name=f"{name}.attention")
        ends = places, rows, whole(CHANNELS, channels)
        self.axes[node] = ends if module.batch_first else (rows, places, ends[2])
        self._emit(node, "linear", sources=[node], out_channels=channels, module=f"{name}.out_proj")
        self.attended.add(node)
