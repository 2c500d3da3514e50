"""Layers: convolutions, norms, activations, poolings, resizing and padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from amc_hw.errors import UnsupportedOperatorError
from amc_hw.lowering.axes import BATCH, CHANNELS, POSITIONS, image_axes, of_dim, plain_axes, vector_axes, whole
from amc_hw.lowering.calls import (
    IDENTITY_MODULES,
    MEANS,
    NO_PADS,
    PLAIN,
    POOL_FUNCTIONS,
    activation_of,
    pair_of,
    shape_of,
)
from amc_hw.lowering.shapes import Shapes
from amc_hw.padding import around, in_plane, padding_of
from amc_hw.symbolic import BATCH_NORMS, HAS_GROUPS, TRANSPOSED, gives, readers
from profilers.ops import CONV_KINDS, SCALAR_KINDS, OpSpec

SMALL = 1e-6  #: runtimes have a least length of their own


@torch.no_grad()
def _is_group_norm(layer: nn.GroupNorm) -> bool:
    """As `_is_linear`."""
    if type(layer).forward is nn.GroupNorm.forward:
        return True
    drawn = torch.randn(2, layer.num_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    return gives(layer, drawn, F.group_norm(drawn, layer.num_groups, layer.weight, layer.bias, layer.eps))


@torch.no_grad()
def _is_layer_norm(layer: nn.LayerNorm, *, channels_first: bool) -> bool:
    """As `_is_group_norm`, over the channels of images or of tokens."""
    if type(layer).forward is nn.LayerNorm.forward:
        return True
    (channels,) = layer.normalized_shape
    drawn = torch.randn(2, 3, 3, channels, generator=torch.Generator().manual_seed(0))
    wanted = F.layer_norm(drawn, (channels,), layer.weight, layer.bias, layer.eps)
    if channels_first:
        return gives(layer, drawn.movedim(3, 1), wanted.movedim(3, 1))
    return gives(layer, drawn.flatten(1, 2), wanted.flatten(1, 2))


class Images(Shapes):
    """What layers of images, of tokens and of vectors are as operators."""

    def _convolution(self, node: fx.Node, module: Any, name: str, *, source: fx.Node | None = None) -> None:
        """module: of images or signals, plain or transposed. source: what it reads, where that is not the node's."""
        if source is None and self._reads_channels(node, module):
            self._channel_convolution(node, module, name)
            return
        kind, groups, read = "conv", module.groups, source or node.all_input_nodes[0]
        source, pads = self.padded.get(read, (read, NO_PADS))
        taken = ("image", "vector") if len(module.kernel_size) == 2 else ("signal",)
        if self._form(source) not in taken:
            raise UnsupportedOperatorError(f"{name}: a {type(module).__name__} of what is no {taken[0]}")
        if isinstance(module, TRANSPOSED):
            source, kind = read, "conv_transpose"
            before, more = in_plane(module.padding, 0), in_plane(module.output_padding, 0)  # type: ignore[arg-type]
            after = before[0] - more[0], before[1] - more[1]
            if groups > 1 or min(after) < 0:
                odd = "groups" if groups > 1 else "more output padding than padding"
                raise UnsupportedOperatorError(f"{name}: a transposed convolution with {odd} is not supported")
        else:
            _, height, width = self._out_image(read)
            own = padding_of(module, (height, width), name)
            before, after = ((own[end][0] + pads[end][0], own[end][1] + pads[end][1]) for end in (0, 1))
            if groups == module.in_channels == module.out_channels:  # one channel, too, which pruning may have left
                kind = "depthwise_conv"
            elif (groups > 1 or hasattr(module, HAS_GROUPS)) and module.out_channels % module.in_channels == 0:
                kind = "grouped_conv"
        self._emit(
            node,
            kind,
            sources=[source],
            out_channels=module.out_channels,
            kernel=in_plane(module.kernel_size, 1),
            stride=in_plane(module.stride, 1),
            padding=before,
            padding_end=() if after == before else after,
            dilation=in_plane(module.dilation, 1),
            groups=groups,
            module=name,
        )

    def _reads_channels(self, node: fx.Node, module: Any) -> bool:
        """Whether a layer of signals slides over the channels of an image of one position, (N, 1, C)."""
        source = node.all_input_nodes[0]
        if not isinstance(module, nn.Conv1d) or self.value.get(source) in (None, *self.tokens):
            return False
        seen = self._seen(source)
        return seen.positions == 1 < seen.channels and seen.axes == (BATCH, (), whole(CHANNELS, seen.channels))

    def _channel_convolution(self, node: fx.Node, module: nn.Conv1d, name: str) -> None:
        """Efficient channel attention (Wang et al., CVPR 2020)."""
        source = node.all_input_nodes[0]
        channels, axes = self._seen(source).channels, self.axes[source]
        if shape_of(node) != shape_of(source):
            raise UnsupportedOperatorError(f"{name}: over channels only a convolution that gives as many is supported")
        row = plain_axes((1, 1, channels), 3)
        self._emit(node, "unflatten", sources=[source], axes=row, out_channels=1, out_size=(1, channels))
        self.fixed.setdefault(self.value[source], f"read together at {node.name}")
        self._convolution(node, module, name, source=node)
        self._emit(node, "flatten", sources=[node], axes=axes, out_channels=channels)

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> None:
        if module.running_mean is None:
            raise UnsupportedOperatorError(f"{name}: a batch-norm without running statistics cannot be folded")
        source = node.all_input_nodes[0]
        if self.axes[source][1] != whole(CHANNELS, self._seen(source).channels):
            raise UnsupportedOperatorError(f"{name}: a batch-norm of something else than all channels")
        before = self._only_reader(node)
        op = None if before is None else self.ops[before]
        folds = (*CONV_KINDS, "linear")
        plain = op is not None and op.op.kind in folds and op.op.activation == "none" and not op.factors
        if op is not None and plain and not op.batch_norm and not self._called_again(op.module, name):
            self.ops[op.name] = replace(op, batch_norm=name)
            self._same(node)
        else:
            self._emit(node, "affine", module=name)
        self._of_class(node, module)

    def _of_class(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) -> None:
        """What a class derived of a norm does after it: an activation in `act` (timm's BatchNormAct2d)."""
        if type(module) in BATCH_NORMS:
            return
        base = next(each for each in (*BATCH_NORMS, nn.GroupNorm) if isinstance(module, each))
        act = getattr(module, "act", None)
        if not isinstance(act, nn.Module) or not isinstance(getattr(module, "drop", nn.Identity()), IDENTITY_MODULES):
            raise self._unsupported(node)
        _, channels, *sides = shape_of(node) or (0, 0)
        drawn = torch.randn(2, channels, *(3 for _ in sides), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = act(base.forward(module, drawn))  # type: ignore[arg-type]
        if not gives(module, drawn, wanted):
            raise UnsupportedOperatorError(
                f"{node.target}: a {type(module).__name__} that is more than a norm and {type(act).__name__}"
            )
        if activation := activation_of(act):
            self._activate(node, activation)
        elif isinstance(act, nn.LeakyReLU):
            self._emit(node, "prelu", sources=[node], numbers=(float(act.negative_slope),))
        elif not isinstance(act, IDENTITY_MODULES):
            raise UnsupportedOperatorError(f"operator {type(act).__name__} in {node.target} is not supported")

    def _layer_norm(self, node: fx.Node, module: nn.LayerNorm, name: str) -> None:
        source = node.all_input_nodes[0]
        if tuple(module.normalized_shape) != (self._seen(source).channels,):
            raise UnsupportedOperatorError(f"{name}: only a layer-norm over the channels is supported")
        first = self._form(source) == "image"
        if type(module) is nn.LayerNorm and first:
            raise UnsupportedOperatorError(f"{name}: a layer-norm over the last axis of a channels-first image")
        if not _is_layer_norm(module, channels_first=first):
            raise UnsupportedOperatorError(f"{name}: a {type(module).__name__} that is no plain layer-norm")
        self._emit(node, "layer_norm", module=name)

    def _norm(self, node: fx.Node, module: Any, name: str) -> None:
        """module: a group-norm, or an instance-norm of images or signals."""
        channels = self._seen(node.all_input_nodes[0]).channels
        if self._form(node.all_input_nodes[0]) not in PLAIN:
            raise UnsupportedOperatorError(f"{name}: only images and signals with channels first are normalised")
        if isinstance(module, nn.GroupNorm):
            self._emit(node, "group_norm", groups=module.num_groups, module=name)
            if not _is_group_norm(module):
                self._of_class(node, module)
        elif module.num_features != channels:
            raise UnsupportedOperatorError(
                f"{name}: an instance-norm of {module.num_features} channels, not {channels}"
            )
        elif module.track_running_stats:
            raise UnsupportedOperatorError(f"{name}: an instance-norm with running statistics is not supported")
        else:
            self._emit(node, "instance_norm", module=name)

    def _normalize(self, node: fx.Node) -> None:
        """Channels over their length."""
        source, named = node.all_input_nodes[0], ("input", "p", "dim", "eps")
        given: dict[str, Any] = {"p": 2.0, "dim": 1} | dict(zip(named, node.args, strict=False)) | dict(node.kwargs)
        rank = len(shape_of(node) or ())
        plain = given["p"] == 2 and isinstance(given["dim"], int) and given.get("eps", 0) <= SMALL
        if not plain or given["dim"] % rank != self._channel_axis(source):
            raise self._unsupported(node, "only channels are normalised, by the root of their squares' sum")
        self._emit(node, "l2_norm")

    def _softmax(self, node: fx.Node, kind: str, dim: Any) -> None:
        rank, source = len(shape_of(node) or ()), node.all_input_nodes[0]
        scores = self.scores.get(source)
        if scores is not None and kind == "softmax" and dim in (-1, rank - 1) and not (scores.weights or scores.turned):
            self.scores[node] = replace(scores, weights=True)
            return
        if source not in self.value or not isinstance(dim, int) or dim % max(rank, 1) != self._channel_axis(source):
            raise UnsupportedOperatorError(f"{node.name}: only a {kind} over the channels is supported")
        self._emit(node, kind)

    def _activation(self, node: fx.Node, activation: str) -> None:
        before = self._only_reader(node)
        fusable = (*CONV_KINDS, "conv_transpose", "linear", "add", "sub", "affine", *SCALAR_KINDS)
        if before is not None and self.ops[before].op.activation == "none" and self.ops[before].op.kind in fusable:
            self._same(node)
            self._activate(node, activation)
        else:
            self._emit(node, "activation", activation=activation)

    def _clip(self, node: fx.Node, low: Any, high: Any) -> None:
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        if not isinstance(low, int | float) or not isinstance(high, int | float):
            raise self._unsupported(node)
        if low == 0 and high in (6, math.inf):
            self._activation(node, "relu6" if high == 6 else "relu")
        else:
            self._emit(node, "clip", numbers=(float(low), float(high)))

    def _reduced(self, node: fx.Node) -> set[int]:
        """The dimensions of its input that a call reduces."""
        rank = len(shape_of(node.all_input_nodes[0]) or ())
        named = node.kwargs.get("dim", node.kwargs.get("axis"))
        given: Any = node.args[1] if len(node.args) > 1 else named
        listed = given if isinstance(given, (list, tuple)) else [given]
        if rank == 0 or not all(isinstance(dim, int) for dim in listed):
            raise self._unsupported(node)
        return {dim % rank for dim in listed}

    def _largest(self, node: fx.Node, call: fx.Node | None = None) -> None:
        """The largest of all positions: a pooling whose window is all of them. call: what gives a tuple of these, and
        where they are, of which the node takes the former."""
        call = node if call is None else call
        source, out, dims = call.all_input_nodes[0], shape_of(node) or (), self._reduced(call)
        rank = len(shape_of(source) or ())
        if dims == {1}:
            self._over_channels(node, "channel_max", source)
            return
        if self._form(source) == "image" and dims in ({2}, {3}):
            self._over_side(node, "max_pool", source, dims)
            return
        if self._is_row(source) and self._form(source) not in PLAIN:  # the positions of an image, flattened
            self._same(node, source)
            self.axes[node], source = image_axes(self._size(self.value[source])), node
        if self._form(source) not in PLAIN or dims != set(range(2, rank)):
            raise self._unsupported(node, "only the largest of all positions, of a side or of all channels")
        channels, *window = self._image(source)
        axes = plain_axes((channels, 1, 1), rank)
        self._emit(node, "max_pool", sources=[source], axes=axes, kernel=pair_of(window), stride=pair_of(window))
        if len(out) == 2:
            self._emit(node, "flatten", sources=[node], out_channels=channels)

    def _mean(self, node: fx.Node) -> None:
        """Over all positions, of an image in one call or in two."""
        source, out, dims = node.all_input_nodes[0], shape_of(node) or (), self._reduced(node)
        rank = len(shape_of(source) or ())
        if source in self.halved:
            image, other = self.halved[source]
            if dims != {other}:
                raise self._unsupported(node)
            self._pooled(node, image)
            return
        if dims == {1} and self._form(source) in PLAIN:
            self._over_channels(node, "channel_mean", source)
            return
        seen = self._seen(source)
        averaged = [seen.axes[dim] for dim in dims]
        left = [axis for at, axis in enumerate(seen.axes) if at not in dims and axis]
        if all(of_dim(axis, POSITIONS) for axis in averaged) and left == list(filter(None, vector_axes(seen.channels))):
            self._pooled(node, source)
        elif self._form(source) == "image" and dims in ({2}, {3}):
            other = 3 if dims == {2} and len(out) == rank else 2
            averaged_again = (each.target in MEANS and self._reduced(each) == {other} for each in readers(node))
            if node.target in MEANS and all(averaged_again):
                self.halved[node] = source, other
            else:
                self._over_side(node, "avg_pool", source, dims)
        else:
            raise self._unsupported(node)

    def _over_side(self, node: fx.Node, kind: str, source: fx.Node, dims: set[int]) -> None:
        """One number for every column of an image, or for every row: a signal where that side is dropped."""
        channels, height, width = self._image(source)
        size, window = ((channels, 1, width), (height, 1)) if dims == {2} else ((channels, height, 1), (1, width))
        axes = plain_axes(size, len(shape_of(node) or ()))
        self._emit(node, kind, sources=[source], axes=axes, kernel=window, stride=window)

    def _over_channels(self, node: fx.Node, kind: str, source: fx.Node) -> None:
        """One number for every position, of all channels."""
        if self._form(source) not in PLAIN:
            raise self._unsupported(node)
        rank = len(self.axes[source])
        images, channel, *positions = plain_axes((1, *self._image(source)[1:]), rank)
        axes = (images, *([channel] if len(shape_of(node) or ()) == rank else []), *positions)
        self._emit(node, kind, sources=[source], axes=axes, out_channels=1)

    def _pooled(self, node: fx.Node, source: fx.Node) -> None:
        """`node` is the mean of `source` over all positions."""
        sizes, channels = (shape_of(node) or ())[1:], self._seen(source).channels
        rest = [whole(CHANNELS, channels) if size == channels > 1 else () for size in sizes]
        self._emit(node, "global_avg_pool", sources=[source], axes=(BATCH, *rest))

    def _pad_function(self, node: fx.Node) -> None:
        arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False), **node.kwargs)
        self._pad(node, arguments["pad"], arguments.get("mode", "constant"), arguments.get("value") or 0)

    def _pad(self, node: fx.Node, sides: Any, mode: str, value: float) -> None:
        """Zeros around an image have an operator of their own for readers that are no convolutions: those take them
        over."""
        source = node.all_input_nodes[0]
        sides = [self._number(side, node) for side in ((sides,) * 2 if isinstance(sides, int) else sides)]
        while sides and not any(sides[-2:]):
            sides = sides[:-2]
        plane, zeros = {"image": 4, "signal": 2}.get(self._form(source), 0), mode == "constant" and value == 0
        if not sides:
            self._same(node, source)
        elif plane and len(sides) == plane + 2 and not any(sides[:plane]) and min(sides) >= 0 and zeros:
            self._more_channels(node, source, *sides[plane:])
        elif len(sides) > plane or mode != "constant":
            raise self._unsupported(node)
        elif max(sides) <= 0:
            self._crop(node, source, around([-side for side in sides]))
        elif min(sides) < 0 or value != 0:
            raise self._unsupported(node)
        else:
            self.padded[node] = source, around(sides)

    def _more_channels(self, node: fx.Node, source: fx.Node, before: int, after: int) -> None:
        """Channels of zeros before and behind those of an image, pixels left out before by the same operator: a
        shortcut of option A (He et al., CVPR 2016, section 4.2)."""
        out, stride = self._seen(source).channels + before + after, (1, 1)
        name, image = self._alone_before(source), source.all_input_nodes[0]
        skips = self.ops[name] if name and self.ops[name].inputs == (self.value.get(image),) else None
        if skips is not None and (skips.op.kind, skips.op.kernel) == ("max_pool", (1, 1)):
            del self.ops[skips.name]
            self.value[source] = self.value[image]  # whose channels code may ask for
            stride, source = skips.op.stride, image
        self._emit(node, "channel_map", sources=[source], out_channels=out, stride=stride, start=before)
        for each in (source, node):
            self.fixed.setdefault(self.value[each], f"given channels of zeros at {node.name}")

    def _pool_function(self, node: fx.Node) -> None:
        kind = POOL_FUNCTIONS[node.target]
        last = ("dilation", "ceil_mode", "return_indices") if kind == "max_pool" else ("ceil_mode", "count_include_pad")
        arguments = dict(
            zip(("input", "kernel_size", "stride", "padding", *last), node.args, strict=False), **node.kwargs
        )
        odd = arguments.get("dilation", 1) not in (1, (1, 1)) or arguments.get("return_indices")
        if odd or arguments.get("divisor_override") or len(node.args) > 4 + len(last):
            raise self._unsupported(node)
        kernel, padding = arguments["kernel_size"], arguments.get("padding", 0)
        stride = arguments.get("stride") or kernel
        kernel, stride = (self._sizes_given(each, node) for each in (kernel, stride))
        options = {
            "ceil": bool(arguments.get("ceil_mode")),
            "exclude_pad": not arguments.get("count_include_pad", True),
        }
        self._pool(node, kind, kernel, stride, padding, **options)

    def _sizes_given(self, given: Any, node: fx.Node) -> int | tuple[int, ...]:
        """A number, or one for every side, that a call of `node` is given or that code computed of sizes."""
        given = self._ask(given) if isinstance(given, fx.Node) else given
        if isinstance(given, tuple | list):
            return tuple(self._number(each, node) for each in given)
        return self._number(given, node)

    def _pool(
        self,
        node: fx.Node,
        kind: str,
        kernel: Any,
        stride: Any,
        padding: Any,
        *,
        ceil: bool = False,
        exclude_pad: bool = False,
    ) -> None:
        one, none = (1, 0) if self._form(node.all_input_nodes[0]) == "signal" else (None, None)  # across a row
        window: dict[str, Any] = {
            "kernel": pair_of(kernel, one),
            "stride": pair_of(stride, one),
            "padding": pair_of(padding, none),
        }
        channels, height, width = self._image(node.all_input_nodes[0])
        if ceil and not any(window["padding"]):  # no further than the image
            window["kernel"] = tuple(map(min, window["kernel"], (height, width)))
            if kind == "avg_pool" and window["kernel"] == (height, width):
                self._emit(node, "global_avg_pool")
                return
        plain = OpSpec(kind, (channels,), height, width, channels, **window)
        ceil = ceil and (plain.out_height, plain.out_width) != self._out_image(node)[1:]
        if ceil and kind == "avg_pool":
            raise UnsupportedOperatorError(f"{node.name}: average pooling with ceil_mode is not supported here")
        if kind == "avg_pool" and not exclude_pad and not ceil and (image := self._takes_zeros(node, window)):
            self._emit(node, kind, sources=[image], **window)
            return
        self._emit(node, kind, **window, ceil=ceil, exclude_pad=exclude_pad and any(window["padding"]))

    def _takes_zeros(self, node: fx.Node, window: dict[str, Any]) -> fx.Node | None:
        """The image whose zeros a pooling alone reads, which become padding of its window where that may be so wide:
        ONNX Runtime has it so (PadFusion)."""
        source = node.all_input_nodes[0]
        image, (before, after) = self.padded.get(source, (source, NO_PADS))
        padding = tuple(own + more for own, more in zip(window["padding"], before, strict=True))
        small = all(2 * pad <= size for pad, size in zip(padding, window["kernel"], strict=True))
        if image is source or before != after or not small or len(readers(source)) > 1:
            return None
        del self.ops[self.value.pop(source)]
        window["padding"] = padding
        return image

    def _adaptive_pool(self, node: fx.Node, kind: str) -> None:
        """kind: "avg_pool" or "max_pool"."""
        before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
        assert before is not None and after is not None
        if self._form(node.all_input_nodes[0]) not in PLAIN:
            raise self._unsupported(node)
        if after == before:
            self._same(node)
        elif set(after[2:]) == {1} and kind == "avg_pool":
            self._emit(node, "global_avg_pool")
        elif not any(size % to for size, to in zip(before[2:], after[2:], strict=True)):
            window = tuple(size // to for size, to in zip(before[2:], after[2:], strict=True))
            self._pool(node, kind, window, window, 0)
        elif not any(to % size for size, to in zip(before[2:], after[2:], strict=True)):
            by = [to // size for size, to in zip(before[2:], after[2:], strict=True)]
            self._emit(node, "upsample_nearest", stride=in_plane(by, 1))
        elif kind == "avg_pool":
            self._emit(node, "adaptive_avg_pool", out_size=in_plane(after[2:], 1))
        else:
            sizes = ("x".join(map(str, shape[2:])) for shape in (before, after))
            raise self._unsupported(node, f"from {' to '.join(sizes)} its windows are not alike")

    def _interpolate(self, node: fx.Node) -> None:
        names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
        arguments = dict(zip(names, node.args, strict=False), **node.kwargs)
        if arguments.get("antialias") or arguments.get("recompute_scale_factor"):
            raise self._unsupported(node)
        mode, corners = arguments.get("mode", "nearest"), arguments.get("align_corners")
        self._upsample(node, mode, corners, arguments.get("scale_factor"))

    def _upsample(self, node: fx.Node, mode: Any, align_corners: Any, scale: Any) -> None:
        """scale: factors that the call is given in place of a size."""
        if scale is not None:
            given = (scale,) if isinstance(scale, int | float) else scale
            row = self._form(node.all_input_nodes[0]) == "signal"
            scale = (1, *given) if row else (*given, *given)[:2]
        _, height, width = self._image(node.all_input_nodes[0])
        _, out_height, out_width = self._out_image(node)
        mode = "bilinear" if mode == "linear" else mode  # along the only row
        if mode not in ("nearest", "bilinear"):
            raise UnsupportedOperatorError(f"{node.name}: only nearest, linear and bilinear resizing, not {mode}")
        to: dict[str, Any] = {"align_corners": bool(align_corners)}
        if out_height % height or out_width % width:
            if scale is not None and (out_height, out_width) != tuple(
                size * by for size, by in zip((height, width), scale, strict=True)
            ):
                raise UnsupportedOperatorError(f"{node.name}: resizing by {scale} gives no whole size: name the size")
            to["out_size"] = (out_height, out_width)
        else:
            to["stride"] = (out_height // height, out_width // width)
        if (out_height, out_width) == (height, width):
            self._same(node)
        else:
            self._emit(node, f"upsample_{mode}", sources=node.all_input_nodes[:1], **to)
