"""Which part of a value every axis of a tensor runs over.

An operator gives a value of channels and positions, row by row, whether it lies as an image (N, C, H, W) or as tokens
(N, H * W, C). What a network's code makes of it by permuting and reshaping is the same value along other axes: heads
are a part of the channels, windows a part of the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

IMAGES, CHANNELS, POSITIONS = range(3)


class Part(NamedTuple):
    """`size` steps of `step` elements along one dimension of a value."""

    dim: int
    step: int
    size: int


Axis = tuple[Part, ...]  #: from its slowest part to its fastest; () for an axis of one element
Axes = tuple[Axis, ...]
BATCH: Axis = (Part(IMAGES, 1, 1),)  #: traced with one image, and never dropped


@dataclass(frozen=True)
class Seen:
    """A tensor: the name of the value that it is of, that value's (C, H, W), and the tensor's axes."""

    name: str
    shape: tuple[int, int, int]
    axes: Axes

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def positions(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def turned(self) -> Seen:
        """With its last two axes exchanged."""
        return replace(self, axes=(*self.axes[:-2], self.axes[-1], self.axes[-2]))


def whole(dim: int, size: int) -> Axis:
    """All of a dimension."""
    return (Part(dim, 1, size),) if size > 1 else ()


def vector_axes(channels: int) -> Axes:
    return BATCH, whole(CHANNELS, channels)


def signal_axes(shape: tuple[int, int, int]) -> Axes:
    """Of a signal (N, C, L): an image of one row, without the axis that its rows are."""
    channels, height, width = shape
    return BATCH, whole(CHANNELS, channels), whole(POSITIONS, height * width)


def image_axes(shape: tuple[int, int, int]) -> Axes:
    channels, height, width = shape
    rows = (Part(POSITIONS, width, height),) if height > 1 else ()
    return BATCH, whole(CHANNELS, channels), rows, whole(POSITIONS, width)


def plain_axes(shape: tuple[int, int, int], rank: int) -> Axes:
    """Of a value (C, H, W) as a vector, a signal or an image, whose tensors have so many axes."""
    if rank == 2:
        return vector_axes(shape[0])
    return signal_axes(shape) if rank == 3 else image_axes(shape)


def last_axes(shape: tuple[int, int, int]) -> Axes:
    """Of an image (N, H, W, C)."""
    images, channels, rows, columns = image_axes(shape)
    return images, rows, columns, channels


def token_axes(channels: int, positions: int) -> Axes:
    return BATCH, whole(POSITIONS, positions), whole(CHANNELS, channels)


def regrouped(shape: tuple[int, int, int], channels: int) -> Axes:
    """Of tokens that were each divided into several, of so many channels."""
    parts = shape[0] // channels
    each = (Part(CHANNELS, channels, parts),) if parts > 1 else ()
    return BATCH, (*whole(POSITIONS, shape[1] * shape[2]), *each), whole(CHANNELS, channels)


def size_of(axis: Axis) -> int:
    return math.prod(part.size for part in axis)


def has(axis: Axis, dim: int) -> bool:
    return any(part.dim == dim for part in axis)


def of_dim(axis: Axis, dim: int) -> bool:
    """Whether an axis runs over nothing else."""
    return all(part.dim == dim for part in axis)


def joined(axis: Axis) -> Axis:
    """The same with as few parts as there can be."""
    found: list[Part] = []
    for part in axis:
        before = found[-1] if found else None
        if before is not None and before.dim == part.dim and before.step == part.step * part.size:
            found[-1] = Part(part.dim, part.step, before.size * part.size)
        else:
            found.append(part)
    return tuple(found)


def reshaped(axes: Axes, sizes: Sequence[int]) -> Axes | None:
    """The axes of a tensor that is reshaped to `sizes`; None where they would share a step of a part."""
    rest = [part for axis in axes for part in axis]
    made: list[Axis] = []
    for size in sizes:
        taken: list[Part] = []
        if rest and rest[0].dim == IMAGES:
            taken.append(rest.pop(0))
        while size > 1:
            if not rest:
                return None
            part = rest.pop(0)
            if part.dim == IMAGES or size % part.size == 0:
                taken.append(part)
                size //= part.size
            elif part.size % size == 0:
                inner = part.size // size
                taken.append(Part(part.dim, part.step * inner, size))
                rest.insert(0, Part(part.dim, part.step, inner))
                size = 1
            else:
                return None
        made.append(joined(tuple(taken)))
    return None if rest else tuple(made)


def taken(seen: Seen, axis: int, start: int, count: int) -> tuple[int, int, Axes] | None:
    """The tensor whose axis is cut to `count` elements from `start`, where these are whole steps of a part that the
    axis begins with, over channels: (runs of channels that are cut alike, first channel of a run that stays, axes over
    what is left); None where they are not."""
    parts = seen.axes[axis]
    first, inner = parts[0], size_of(parts[1:])
    if first.dim != CHANNELS or start % inner or count % inner:
        return None
    before, after = first.step * first.size, first.step * (count // inner)

    def left(part: Part) -> Part:
        if part.dim != CHANNELS or part.step < before:
            return part
        return Part(CHANNELS, part.step // before * after, part.size)

    cut = (Part(CHANNELS, first.step, count // inner), *parts[1:]) if count > inner else parts[1:]
    axes = tuple(cut if place == axis else tuple(map(left, each)) for place, each in enumerate(seen.axes))
    return seen.channels // before, start // inner * first.step, tuple(map(joined, axes))


def window_of(axis: Axis, shape: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The rectangle of positions that an axis runs over, row by row: (rows, columns) and the distance between two of
    either; None where it is none."""
    _, height, width = shape
    down: list[Part] = []
    across: list[Part] = []
    for part in axis:
        if part.dim != POSITIONS:
            return None
        reach = part.step * part.size
        if part.step % width == 0:
            down.append(part)
        elif reach <= width:
            across.append(part)
        elif reach % width == 0 and width % part.step == 0:
            down.append(Part(POSITIONS, width, reach // width))
            across.append(Part(POSITIONS, part.step, width // part.step))
        else:
            return None
        if across and down and part is down[-1]:
            return None  # columns before rows
    if len(down) > 1 or len(across) > 1:
        return None
    rows, columns = (each[0] if each else Part(POSITIONS, 0, 1) for each in (down, across))
    return (rows.size, columns.size), (max(1, rows.step // width), max(1, columns.step))
