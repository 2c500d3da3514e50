"""How the positions of an attention's inputs are put together by windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from profilers.ops import OpSpec


@dataclass(frozen=True)
class Windows:
    """`count` windows of an image: as (batch, *divided, channels) it is transposed by `order` to (batch, windows ...,
    rows, columns, channels); with channels first as (batch, channels, *divided) to (batch, windows ..., channels, rows,
    columns). gathered: the sizes of windows, rows and columns.
    """

    count: int
    divided: tuple[int, ...]
    order: tuple[int, ...]
    gathered: tuple[int, ...]

    @property
    def back(self) -> tuple[int, ...]:
        """The order that undoes `order`."""
        return tuple(self.order.index(place) for place in range(len(self.order)))


def parts_of(op: OpSpec) -> list[tuple[int, int, int]]:
    """Of queries, keys and values: positions in a window, heads, and channels of each."""
    windows, keys = windows_of(op, channels_first=False), op.keys or (op.height, op.width)
    count = windows.count if windows else 1
    widths = [op.in_channels[0] // op.groups] * 2 + [op.out_channels // op.groups]
    sides = [(op.height, op.width), keys, keys]
    return [
        (height * width // count, channels // each, each)
        for (height, width), channels, each in zip(sides, op.in_channels, widths, strict=True)
    ]


def windows_of(op: OpSpec, *, channels_first: bool) -> Windows | None:
    """The windows of an `attention`; None where all of the image is one."""
    if op.keys or op.kernel == (op.height, op.width):
        return None
    sizes: list[int] = []
    outer: list[int] = []  # places of what tells windows apart
    inner: list[int] = []
    for size, window, apart in zip((op.height, op.width), op.kernel, op.dilation, strict=True):
        for part, places in ((size // window // apart, outer), (window, inner), (apart, outer)):
            if part > 1 or places is inner:
                places.append(len(sizes))
                sizes.append(part)
    moved = [place + (2 if channels_first else 1) for place in (*outer, *inner)]
    windows, rest = moved[: len(outer)], moved[len(outer) :]
    order = (0, *windows, 1, *rest) if channels_first else (0, *windows, *rest, len(sizes) + 1)
    gathered = tuple(sizes[place] for place in (*outer, *inner))
    return Windows(math.prod(gathered[: len(outer)]), tuple(sizes), order, gathered)
