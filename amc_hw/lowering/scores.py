"""Products of queries and keys, and of what a softmax makes of them with values, as one operator.

scores = scale * query . key (+ bias), over the keys in a window around each query or in all of the image; their
softmax weights the values (Vaswani et al., 2017, section 3.2). Heads are runs of channels; one key and one value may
serve all heads (Shazeer, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from amc_hw.lowering.axes import CHANNELS, POSITIONS, Axes, Axis, Part, Seen, joined, of_dim, size_of, window_of


@dataclass(frozen=True)
class Scores:
    """A tensor of scores (..., queries, keys). turned: (..., keys, queries). weights: after the softmax.

    query, key: (..., positions, channels of a head). places: axes before the last two, as the query has them.
    window, apart: as of `window_of`.
    bias: a node that is computed of parameters alone, (heads, queries, keys) or what broadcasts to it.
    """

    query: Seen
    key: Seen
    heads: int
    places: Axes
    window: tuple[int, int]
    apart: tuple[int, int]
    scale: float = 1.0
    bias: fx.Node | None = None
    weights: bool = False
    turned: bool = False

    @property
    def rank(self) -> int:
        return len(self.places) + 2

    def scaled(self, factor: float) -> Scores | None:
        """None where a bias, or the softmax, came before."""
        return None if self.weights or self.bias is not None else replace(self, scale=self.scale * factor)


def scores_of(query: Seen, key: Seen) -> Scores | None:
    """query (..., queries, channels) times key (..., channels, keys); None where that is none of these products."""
    key = key.turned
    heads, key_heads = _heads(query), _heads(key)
    windows = window_of(query.axes[-2], query.shape), window_of(key.axes[-2], key.shape)
    if heads is None or key_heads not in (heads, 1) or None in windows or len(query.axes) != len(key.axes):
        return None
    (window, apart), (key_window, key_apart) = windows  # type: ignore[misc]
    if not _places_fit(query, key):
        return None
    whole, key_whole = window == query.shape[1:], key_window == key.shape[1:]
    if whole != key_whole or (not whole and (window, apart, query.shape[1:]) != (key_window, key_apart, key.shape[1:])):
        return None
    return Scores(query, key, heads, query.axes[:-2], window, apart)


def _heads(seen: Seen) -> int | None:
    """How many heads a tensor (..., positions, channels of one head) has; None where it is none."""
    each = size_of(seen.axes[-1])
    if seen.axes[-1] != ((Part(CHANNELS, 1, each),) if each > 1 else ()):
        return None
    heads = [part for axis in seen.axes[:-2] for part in axis if part.dim == CHANNELS]
    count = seen.channels // each
    return count if heads == ([Part(CHANNELS, each, count)] if count > 1 else []) else None


def _places_fit(query: Seen, other: Seen) -> bool:
    """Whether two tensors have the same windows in the same places, and heads, or one of them a single head."""
    covered = [1, 1]
    for axis, twin in zip(query.axes[:-2], other.axes[:-2], strict=True):
        for side, parts in enumerate((axis, twin)):
            covered[side] *= size_of(tuple(part for part in parts if part.dim == POSITIONS))
        sides = [[part if part.dim == POSITIONS else part._replace(step=0) for part in parts] for parts in (axis, twin)]
        alone = not twin and of_dim(axis, CHANNELS)
        if sides[0] != sides[1] and not alone:
            return False
    counts = [count * size_of(each.axes[-2]) for count, each in zip(covered, (query, other), strict=True)]
    return counts == [query.positions, other.positions]


@dataclass(frozen=True)
class Attended:
    """An attention operator: what it reads, its sizes, and the axes of its output over (channels, queries)."""

    scores: Scores
    value: Seen
    channels: int
    axes: Axes

    def sizes(self) -> dict[str, Any]:
        scores = self.scores
        keys = scores.key.shape[1:]
        return {
            "out_channels": self.channels,
            "groups": scores.heads,
            "kernel": scores.window,
            "dilation": scores.apart,
            "keys": () if keys == scores.query.shape[1:] else keys,
            "biased": scores.bias is not None,
        }


def attended(scores: Scores, value: Seen) -> Attended | None:
    """Weights (..., queries, keys) times value (..., keys, channels); turned: value (..., channels, keys) times
    weights (..., keys, queries). None where the two do not fit."""
    value = value.turned if scores.turned else value
    heads = _heads(value)
    if not scores.weights or heads not in (scores.heads, 1) or len(value.axes) != scores.rank:
        return None
    if (value.axes[-2], value.shape[1:]) != (scores.key.axes[-2], scores.key.shape[1:]):
        return None
    if not _places_fit(scores.query, value):
        return None
    each = size_of(value.axes[-1])
    places = tuple(_with_heads(axis, each) for axis in scores.places)
    ends = (scores.query.axes[-2], value.axes[-1])
    channels = scores.heads * each
    return Attended(scores, value, channels, (*places, *(reversed(ends) if scores.turned else ends)))


def _with_heads(axis: Axis, each: int) -> Axis:
    return joined(tuple(Part(CHANNELS, each, part.size) if part.dim == CHANNELS else part for part in axis))


def as_product(equation: str, axes: Sequence[Axes]) -> tuple[Axes, Axes, tuple[int, ...]] | None:
    """An einsum of two tensors as a product of matrices: the axes of both, (..., rows, inner) and (..., inner,
    columns), and where each axis of that product stands in the result; None where it is none."""
    sides = equation.replace(" ", "").split("->")
    if len(sides) != 2 or "." in equation or sides[0].count(",") != 1:
        return None
    (first, second), result = sides[0].split(","), sides[1]
    if any(len(set(letters)) != len(letters) for letters in (first, second, result)):
        return None
    shared = [letter for letter in result if letter in first and letter in second]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    inner = [letter for letter in first if letter in second and letter not in result]
    if [len(each) for each in (rows, columns, inner)] != [1, 1, 1] or {*result} != {*shared, *rows, *columns}:
        return None
    product = [*shared, *rows, *columns]
    left = tuple(axes[0][first.index(letter)] for letter in (*shared, *rows, *inner))
    right = tuple(axes[1][second.index(letter)] for letter in (*shared, *inner, *columns))
    return left, right, tuple(product.index(letter) for letter in result)
