"""Calls that move, cut and join tensors."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.lowering.axes import (
    BATCH,
    CHANNELS,
    IMAGES,
    POSITIONS,
    Axes,
    Axis,
    has,
    joined,
    of_dim,
    plain_axes,
    regrouped,
    reshaped,
    size_of,
    taken,
    token_axes,
    vector_axes,
    whole,
)
from amc_hw.lowering.calls import (
    KIND_OF,
    PERMUTES,
    PLAIN,
    POOL_MODULES,
    RESHAPES,
    SAME_NUMBERS,
    TRANSPOSES,
    pair_of,
    rank_of,
    shape_of,
)
from amc_hw.lowering.constants import is_constant
from amc_hw.lowering.values import Values
from amc_hw.padding import Pads, in_plane
from amc_hw.symbolic import readers, sizes_asked


class Shapes(Values):
    """Parts, joints, permutations and other shapes of tensors: most need no operator."""

    def _concat(self, node: fx.Node) -> None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        out, parts = shape_of(node), node.args[0] if node.args else node.kwargs["tensors"]
        if out is None or not isinstance(parts, tuple | list) or not isinstance(dim, int):
            raise self._unsupported(node)
        dim %= len(out)
        if len(parts) == 1:
            self._same(node)
        elif is_constant(parts[0]):
            self._prepended(node, dim, list(parts))
        elif dim and all(dim == self._behind(part) for part in parts):
            self._join(node, list(parts))
        elif {self._channel_axis(part) for part in parts} != {dim} or len(
            {self._beside(dim, each) for each in parts}
        ) > 1:
            raise self._unsupported(node, "only channels and rows are joined: return the parts, and join them outside")
        else:
            channels = sum(self._seen(part).channels for part in parts)
            self._emit(node, "concat", sources=list(parts), out_channels=channels)

    def _behind(self, node: fx.Node) -> int | None:
        """The axis along which another tensor's positions follow those of a node, which are in their order."""
        if self._are_tokens(node):
            return 1
        form = self._form(node)
        if form == "image" and not self.axes[node][2]:
            return 3
        return 2 if form in PLAIN or self._is_row(node) else None

    def _join(self, node: fx.Node, parts: list[fx.Node]) -> None:
        """Positions behind each other: rows below rows, what a detector finds at several scales."""
        channels, total = self._seen(parts[0]).channels, sum(self._seen(part).positions for part in parts)
        axes = token_axes(channels, total)
        if not self._are_tokens(parts[0]):
            _, _, *sides = shape_of(node) or ()
            axes = plain_axes((channels, *in_plane(sides, 1)), len(sides) + 2)
        self._emit(node, "join", sources=parts, axes=axes)

    def _beside(self, dim: int, node: fx.Node) -> Axes:
        """A tensor's axes but for one."""
        return self.axes[node][:dim] + self.axes[node][dim + 1 :]

    def _prepended(self, node: fx.Node, dim: int, parts: list[fx.Node]) -> None:
        """Tokens of the network's own before those of an image."""
        *own, source = parts
        seen = self._seen(source)
        if not all(map(is_constant, own)) or dim != 1 or not self._are_tokens(source):
            raise self._unsupported(node)
        count = sum((shape_of(each) or ())[1] for each in own)
        axes = token_axes(seen.channels, seen.positions + count)
        constants = tuple(map(self._held, own))
        self._emit(node, "prepend", sources=[source], axes=axes, padding=(count, 0), constants=constants)

    def _split(self, node: fx.Node) -> None:
        """A tuple, whose parts are taken by getitem."""
        source, shapes = node.all_input_nodes[0], [tuple(meta.shape) for meta in node.meta["tensor_meta"]]
        unbound = node.target in (torch.unbind, "unbind")
        dim = node.kwargs.get("dim", node.args[-1] if len(node.args) > (1 if unbound else 2) else 0)
        if not isinstance(dim, int):
            raise self._unsupported(node)
        dim %= len(self.axes[source])
        sizes = [1 if unbound else shape[dim] for shape in shapes]
        self.parts[node] = source, dim, sizes, unbound

    def _getitem(self, node: fx.Node) -> None:
        """A part of a split tensor, or a run of channels, of an image's pixels or of tokens."""
        (source, key), out = node.args, shape_of(node)
        assert isinstance(source, fx.Node)
        if out is None:
            raise self._unsupported(node)
        if source in self.parts and isinstance(key, int):
            tensor, dim, sizes, dropped = self.parts[source]
            key %= len(sizes)
            equal = len(set(sizes)) == 1 and source.target not in (torch.split, "split")
            self._part(node, tensor, dim, sum(sizes[:key]), sizes[key], dropped=dropped, chunks=equal)
            return
        if source in self.attended and key == 0:
            self._same(node)
            return
        before = shape_of(source)
        if before is None or source not in self.value:
            raise self._unsupported(node)
        keys = self._keys(node, key, before)
        named = [each for each in keys if each is not None]
        if any(each != slice(None) for each, axis in zip(named, self.axes[source], strict=True) if has(axis, IMAGES)):
            raise self._unsupported(node)
        form = self._form(source)
        if form not in ("vector", *PLAIN) or any(not isinstance(each, slice) for each in keys):
            self._indexed(node, source, keys, before)
            return
        sized = enumerate(zip(keys, before, strict=True))
        runs = [self._run(node, each, size, stepped=at > 1) for at, (each, size) in sized]
        self._same(node, source)
        if out[0] != before[0]:
            raise self._unsupported(node)
        if out[1] != before[1]:  # else, of fewer channels it is all of them, too
            self._emit(node, "slice", sources=[source], out_channels=out[1], start=runs[1].start)
            source = node
        steps = in_plane([run.step for run in runs[2:]], 1)
        starts = [run.start for run in runs[2:]]
        ends = [size - 1 - run[-1] for run, size in zip(runs[2:], before[2:], strict=True)]
        if any(starts) or any(end >= step for end, step in zip(in_plane(ends, 0), steps, strict=True)):
            self._crop(node, source, (in_plane(starts, 0), in_plane(ends, 0)))
            source = node
        if steps != (1, 1):  # pooling by windows of one pixel
            self._emit(node, "max_pool", sources=[source], stride=steps)

    def _indexed(self, node: fx.Node, source: fx.Node, keys: list[Any], before: tuple[int, ...]) -> None:
        """One axis cut or taken apart, and axes of one element put in or dropped."""
        named = [key for key in keys if key is not None]
        single = [at for at, key in enumerate(named) if not isinstance(key, slice) and self.axes[source][at] == ()]
        cut = [at for at, key in enumerate(named) if key != slice(None) and at not in single]
        if len(cut) > 1 or not all(self._number(named[at], node) in (0, -1) for at in single):
            raise self._unsupported(node)
        self._same(node, source)
        for dim in cut:
            if isinstance(named[dim], slice):
                kept = self._run(node, named[dim], before[dim])
                self._part(node, source, dim, kept.start, len(kept), dropped=False)
            else:
                place = self._number(named[dim], node) % before[dim]
                self._part(node, source, dim, place, 1, dropped=True, chunks=True)
        left = iter(self.axes[node])  # of those axes that were cut apart none is there any more
        axes, at = list[Axis](), 0
        for key in keys:
            if key is None:
                axes.append(())
                continue
            if isinstance(key, slice):
                axes.append(next(left))
            elif at in single:
                next(left)
            at += 1
        self.axes[node] = tuple(axes)

    def _part(
        self, node: fx.Node, source: fx.Node, dim: int, start: int, count: int, *, dropped: bool, chunks: bool = False
    ) -> None:
        """`count` elements of an axis from `start`. dropped: that axis, of one element by then. chunks: it is one of
        equal parts."""
        seen = self._seen(source)
        axis = seen.axes[dim]

        def left(axes: Axes) -> Axes:
            return tuple(each for at, each in enumerate(axes) if not (dropped and at == dim))

        if size_of(axis) == count:
            self.value[node], self.axes[node] = seen.name, left(seen.axes)
        elif of_dim(axis, POSITIONS) and self._are_tokens(source):
            if dropped:
                self._emit(node, "take_token", sources=[source], axes=vector_axes(seen.channels), start=start)
            else:
                axes, after = token_axes(seen.channels, count), seen.positions - start - count
                ends = {} if after == start else {"padding_end": (after, 0)}
                self._emit(node, "crop", sources=[source], axes=axes, padding=(start, 0), **ends)
        elif of_dim(axis, POSITIONS) and (form := self._form(source)) in PLAIN:
            end = size_of(axis) - start - count
            rows = (form, dim) == ("image", 2)
            self._crop(node, source, ((start, 0), (end, 0)) if rows else ((0, start), (0, end)))
            if dropped and form == "signal":
                self._emit(node, "flatten", sources=[node], axes=vector_axes(seen.channels), out_channels=seen.channels)
        elif has(axis, IMAGES) or (found := taken(seen, dim, start, count)) is None:
            raise self._unsupported(node)
        else:
            runs, first, axes = found
            channels = seen.channels * count // size_of(axis)
            if chunks and runs == 1:
                whole_axes = {"groups": size_of(axis) // count, "start": start // count}
                self._emit(node, "chunk", sources=[source], axes=left(axes), out_channels=channels, **whole_axes)
            else:
                sizes = {"out_channels": channels, "start": first, "groups": runs}
                self._emit(node, "slice", sources=[source], axes=left(axes), **sizes)

    def _keys(self, node: fx.Node, key: Any, shape: tuple[int, ...]) -> list[Any]:
        """An index for every axis, None where it puts one in."""
        keys = list(key) if isinstance(key, tuple) else [key]
        named = sum(each is not None and each is not Ellipsis for each in keys)
        if Ellipsis in keys:
            place = keys.index(Ellipsis)
            keys[place : place + 1] = [slice(None)] * (len(shape) - named)
        else:
            keys += [slice(None)] * (len(shape) - named)
        return keys

    def _run(self, node: fx.Node, key: slice, size: int, *, stepped: bool = False) -> range:
        """The elements that a slice keeps of `size`. stepped: it may leave some out between them."""
        ends = [None if end is None else self._number(end, node) for end in (key.start, key.stop, key.step)]
        kept = range(size)[slice(*ends)]
        if kept.step != 1 and not stepped:
            raise self._unsupported(node)
        return kept

    def _crop(self, node: fx.Node, source: fx.Node, cut: Pads) -> None:
        before, after = cut
        self._emit(node, "crop", sources=[source], padding=before, padding_end=() if after == before else after)

    def _permute(self, node: fx.Node, dims: list[Any]) -> None:
        source = node.all_input_nodes[0]
        if source in self.scores:
            self._turned(node, source, [dim % len(dims) for dim in dims])
        else:
            axes = self.axes[source]
            self.value[node] = self.value[source]
            self.axes[node] = tuple(axes[dim] for dim in dims)
            self._shuffled(node)

    def _transpose(self, node: fx.Node) -> None:
        rank = len(shape_of(node) or ())
        named: Any = node.kwargs
        pair: Any = (*node.args[1:], *(named[key] for key in ("dim0", "dim1") if key in named))
        first, second = (dim % rank for dim in ((-2, -1) if node.target is getattr else pair))
        dims: list[Any] = list(range(rank))
        dims[first], dims[second] = second, first
        self._permute(node, dims)

    def _turned(self, node: fx.Node, source: fx.Node, dims: list[int]) -> None:
        """Scores, keys before queries, or back again."""
        rank, scores = len(dims), self.scores[source]
        if dims == list(range(rank)):
            self.scores[node] = scores
        elif dims == [*range(rank - 2), rank - 1, rank - 2]:
            self.scores[node] = replace(scores, turned=not scores.turned)
        else:
            raise self._unsupported(node)

    def _reshape(self, node: fx.Node) -> None:
        source, out = node.all_input_nodes[0], shape_of(node)
        assert out is not None
        seen, form = self._seen(source), self._form(source)
        axes = reshaped(seen.axes, out)
        squeezed = node.target in (torch.squeeze, "squeeze") and axes is not None and BATCH in seen.axes
        if axes is None or (squeezed and BATCH not in axes):
            raise self._unsupported(node)
        sizes = self._sizes_of(node, len(axes))
        self.value[node], self.axes[node] = seen.name, axes
        for size, axis in zip(sizes, axes, strict=True):
            if has(axis, IMAGES) and isinstance(size, int) and size != -1:
                raise UnsupportedOperatorError(f"{node.name}: reshaped to a batch of {size}: write torch.flatten(x, 1)")
            if not has(axis, CHANNELS):
                continue
            if axis != whole(CHANNELS, seen.channels) and of_dim(axis, CHANNELS):
                self.fixed.setdefault(seen.name, f"divided at {node.name}")
            self._given(node, seen.name, size, "reshaped to", "torch.flatten(x, 1)")
        if node.target in ("view_as", "reshape_as"):
            self._counted_alike(node, seen.name, node.args[1])  # type: ignore[arg-type]
        channels = whole(CHANNELS, seen.channels)
        flat = BATCH, channels + whole(POSITIONS, seen.positions)
        rows = (BATCH, channels + seen.axes[2], seen.axes[3]) if form == "image" and seen.axes[2] else None
        if form == "vector" and self._is_unfolded(node):
            sizes = in_plane(out[2:], 1)
            laid = plain_axes((out[1], *sizes), len(out))
            self._emit(node, "unflatten", sources=[source], axes=laid, out_channels=out[1], out_size=sizes)
            self.fixed.setdefault(self.value[node], f"made of a vector at {node.name}")
        elif len(axes) == 3 and axes[2] not in ((), channels) and axes == regrouped(seen.shape, size_of(axes[2])):
            self._emit(node, "regroup", sources=[source], axes=token_axes(out[2], out[1]), out_channels=out[2])
            self.fixed.setdefault(self.value[node], f"divided at {node.name}")
        elif axes == rows and any(reader.target not in SAME_NUMBERS for reader in readers(node)):
            row = plain_axes((out[1], 1, out[2]), 3)
            self._emit(node, "rows_to_channels", sources=[source], axes=row, out_channels=out[1])
        elif form not in PLAIN or axes != flat:
            self._shuffled(node)
        elif not (seen.name in self.ops and self.ops[seen.name].op.kind == "global_avg_pool"):
            self._emit(node, "flatten", sources=[source], out_channels=out[1])

    def _is_unfolded(self, node: fx.Node) -> bool:
        """Whether a vector that was divided is read as an image, or as a signal by a layer of such."""
        seen, shape = self._seen(node), shape_of(node) or ()
        divided = joined(tuple(part for axis in seen.axes[1:] for part in axis))
        if len(shape) not in (3, 4) or divided != whole(CHANNELS, seen.channels) or sum(map(bool, seen.axes)) < 3:
            return False
        if len(shape) == 3:
            return self._is_read_as_signal(node)
        moved = (*SAME_NUMBERS, *PERMUTES, *TRANSPOSES, operator.getitem)
        return not all(reader.target in moved for reader in readers(node))

    def _is_read_as_signal(self, node: fx.Node) -> bool:
        """Whether (N, C, L) goes into a layer of signals, or leaves the network, perhaps after activations and the
        like."""
        wanted, found = [node], {node}
        while wanted:
            for reader in readers(wanted.pop()):
                if reader.op == "output" or self._reads_signal(reader):
                    return True
                if shape_of(reader) == shape_of(node) and reader not in found:
                    found.add(reader)
                    wanted.append(reader)
        return False

    def _reads_signal(self, node: fx.Node) -> bool:
        """Whether a layer takes the channels of (N, C, L) for its first axis."""
        part = self.modules[str(node.target)] if node.op == "call_module" else None
        layers = nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.Upsample
        return isinstance(part, layers) or type(part) in POOL_MODULES or node.target is F.interpolate

    def _given(self, node: fx.Node, name: str, size: Any, done: str, better: str) -> None:
        """The size that the code gives an axis of a value's channels. better: what takes any."""
        if isinstance(size, int) and size != -1:
            why = f"{done} {size} channels at {node.name}: {better} takes any number"
            self.fixed.setdefault(name, why)
        if isinstance(size, fx.Node):
            self._counts(node, name, size)

    def _expand(self, node: fx.Node) -> None:
        """Repeated to the size of what it is added to or multiplied by."""
        if any(reader.target not in KIND_OF for reader in readers(node)):
            raise self._unsupported(node, "only sums and products read what is repeated")
        self._same(node)
        self.expanded[node] = node.all_input_nodes[0]

    def _count_repeated(self, node: fx.Node, name: str) -> None:
        """A value's channels are as many as the code repeats something to at `node`, which it then multiplies by or
        adds."""
        if node.target == "expand_as":
            self._counted_alike(node, name, node.args[1])  # type: ignore[arg-type]
            return
        rank, sizes = len(shape_of(node) or ()), self._listed(node)
        if len(sizes) == rank and isinstance(sizes[0], int) and sizes[0] != -1:
            raise self._unsupported(node, f"it is for a batch of {sizes[0]}")
        if len(sizes) >= rank - 1:
            self._given(node, name, sizes[1 - rank], "repeated to", "expand_as")

    def _sizes_of(self, node: fx.Node, rank: int) -> tuple[Any, ...]:
        """Sizes that the code gives the axes of a reshaped tensor, None where it gives none."""
        given: tuple[Any, ...] = ()
        if node.target in RESHAPES:
            given = self._listed(node)
        elif node.op == "call_module":
            module: Any = self.modules[str(node.target)]
            dim, cut = getattr(module, "dim", 0), getattr(module, "unflattened_size", ())
            given = (*[None] * dim, *cut)
        elif node.target in ("unflatten", torch.unflatten):
            called: Any = (*node.args[1:], *node.kwargs.values())
            dim, cut = called[:2]
            given = (*[None] * (dim % (rank - len(cut) + 1)), *cut)
        return (*given, *[None] * (rank - len(given)))

    def _counts(self, node: fx.Node, name: str, size: fx.Node) -> None:
        """A value's channels are as many as the code computes of the sizes of others."""
        asked = sizes_asked(size, rank_of) or set()
        for other in self.graph.nodes:
            dims = {dim for called, each in asked if called == other.name for dim in each}
            if any(has(axis, CHANNELS) for at, axis in enumerate(self.axes.get(other, ())) if at in dims):
                self._counted_alike(node, name, other)

    def _counted_alike(self, node: fx.Node, name: str, other: fx.Node) -> None:
        if other in self.value and self.value[other] != name:
            self.counted.append((name, self.value[other], node.name))

    def _shuffled(self, node: fx.Node) -> None:
        """An operator for channels of an image that code has put into another order."""
        seen = self._seen(node)
        if len(seen.axes) not in (3, 4) or len(seen.axes[1]) != 2 or not of_dim(seen.axes[1], CHANNELS):
            return
        (_, step, each), (_, one, groups) = seen.axes[1]
        plain = plain_axes(self._sides(seen), len(seen.axes))
        if (step, one) == (1, each) and each * groups == seen.channels and seen.axes[2:] == plain[2:]:
            self.axes[node] = plain
            self._emit(node, "shuffle", sources=[node], groups=groups)

    def _pixel_shuffle(self, node: fx.Node, factor: Any) -> None:
        self._emit(node, "pixel_shuffle", out_channels=self._out_image(node)[0], stride=pair_of(factor))
