"""What is timed: one fused operator (`OpSpec`), and networks made of them (`OpGraph`).

An operator is what a runtime executes as one kernel: a convolution with its batch-norm folded in and
its activation fused. Shapes are those of one image, channels first, whatever layout a runtime uses.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

#: Operators whose output width is free of their input width: (c_in, c_out) are two axes.
#: `slice` gives a run of its input's channels.
TWO_AXIS_KINDS = ("conv", "conv_transpose", "linear", "channel_map", "slice")
#: Operators that work on vectors (N, C), and on tokens (N, H * W, C), as they do on images (N, C, H, W).
ANY_RANK_KINDS = (
    *("add", "sub", "mul", "scale", "shift", "add_scalar", "mul_scalar", "concat", "activation", "affine"),
    *("prelu", "clip", "layer_norm", "l2_norm", "softmax", "log_softmax", "slice", "chunk"),
)
#: Operators with one number of their own for the whole tensor.
SCALAR_KINDS = ("add_scalar", "mul_scalar")
#: Operators that subtract a mean and divide by a deviation of the tensor they read, then multiply and add weights.
NORM_KINDS = ("layer_norm", "group_norm", "instance_norm")
#: A `depthwise_conv` reads every channel alone and gives as many, a `grouped_conv` some together that give as many or a
#: whole multiple: narrower ones have fewer groups of the same size. Any other convolution in groups is a `conv`, whose
#: widths nothing changes.
CONV_KINDS = ("conv", "depthwise_conv", "grouped_conv")
GROUPED_KINDS = ("depthwise_conv", "grouped_conv")
#: Operators with one axis, the channels of their first input, which the output has, too, where nothing else is said.
#: `scale` multiplies an image by one number per channel, its second input (N, C), `shift` adds it; `mask` multiplies
#: by one number per position, its second input (N, 1, H, W); `affine` multiplies and adds weights
#: of its own (a batch-norm that nothing folds); `prelu` multiplies what is below zero by a weight per channel;
#: `layer_norm`, `softmax` and `log_softmax` normalise over the channels at every position, `group_norm` over each of
#: `groups` groups of channels, `instance_norm` over every channel alone;
#: `clip` keeps values between two numbers; `crop` cuts `padding` and `padding_end` off an image; `chunk` gives one of
#: `groups` equal runs of its input's channels; `pad` puts zeros around an image; `shuffle` interleaves `groups` groups
#: of channels; `upsample_*` enlarge by `stride`, or to any `out_size`; `pixel_shuffle` (depth to space, channel by
#: channel) enlarges by `stride`, too, and takes as many times fewer channels; `to_tokens` and `to_image` lay an image
#: out as tokens, channels last, and back; `add_map` adds a constant for every channel and position; `prepend` puts
#: `padding[0]` constant tokens before those of an image, `take_token` gives one of them, a vector; `attention` weights
#: its third input by the softmax of products of the first and the second, in `groups` heads; `channel_mean` and
#: `channel_max` give one channel, of all those that they read; `adaptive_avg_pool` averages to any `out_size`;
#: `l2_norm` divides by the root of the sum of the squares over the channels; `unflatten` lays a vector out as an image
#: of `out_size`, `rows_to_channels` the rows of every channel as channels, one row; `join` puts tokens behind each
#: other, `height` of them in all, `regroup` makes several of each, of as many times fewer channels.
ONE_AXIS_KINDS = (
    "depthwise_conv",
    "grouped_conv",
    "add",
    "sub",
    "mul",
    "scale",
    "shift",
    "mask",
    "add_scalar",
    "mul_scalar",
    "affine",
    "prelu",
    "layer_norm",
    "l2_norm",
    "group_norm",
    "instance_norm",
    "softmax",
    "log_softmax",
    "activation",
    "max_pool",
    "avg_pool",
    "global_avg_pool",
    "upsample_nearest",
    "upsample_bilinear",
    "clip",
    "chunk",
    "crop",
    "pad",
    "shuffle",
    "pixel_shuffle",
    "flatten",
    "to_tokens",
    "to_image",
    "add_map",
    "prepend",
    "take_token",
    "attention",
    "channel_mean",
    "channel_max",
    "adaptive_avg_pool",
    "unflatten",
    "rows_to_channels",
    "join",
    "regroup",
)
#: `concat` has the sum of its inputs' channels: one axis, the sum.
KINDS = (*TWO_AXIS_KINDS, *ONE_AXIS_KINDS, "concat")
#: Operators with weights whose output channels are their own.
PRODUCER_KINDS = ("conv", "conv_transpose", "linear", "channel_map")
#: Operators whose channels keep their widths.
WHOLE_KINDS = ("pixel_shuffle", "attention", "unflatten", "regroup")
#: Operators of one axis that give one channel.
ONE_CHANNEL_KINDS = ("channel_mean", "channel_max")
#: Operators that read tokens and give something else.
_FROM_TOKENS = ("to_image", "take_token", "global_avg_pool")
ACTIVATIONS = (
    *("none", "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "elu"),
    *("softplus", "mish", "abs", "exp"),
)


@dataclass(frozen=True, order=True)
class OpSpec:
    """One fused operator.

    in_channels: channels of every input, in order (one for most kinds, two for `add`, any for `concat`).
    height, width: spatial size of the (first) input; 1, 1 for vectors.
    out_channels: channels of the output; for `flatten` it is in_channels * height * width.
    kernel, stride, padding, dilation: (vertical, horizontal), in pixels.
    padding_end: the padding behind the image, (bottom, right), of a convolution or a `pad`, where that differs from
    `padding`; else ().
    Of a transposed convolution `padding` and `padding_end` are cut off its output.
    groups: 1, or in_channels for `depthwise_conv`, or what divides in_channels.
    ceil: the output size of a pooling is rounded up: a last window may reach beyond the padding.
    out_size: of an `upsample_*` that has no whole factors, an `adaptive_avg_pool` or an `unflatten`, (height, width);
    else ().
    align_corners: of an `upsample_bilinear`, as PyTorch's.
    exclude_pad: an `avg_pool` divides by the pixels of the image in a window, without those of the padding.
    tokens: the inputs are tokens, (N, height * width, C), not images.
    Of an attention, `kernel` is the window of keys that a query looks at, `dilation` the distance between two of them
    (windows lie side by side, or, where they are apart, within each other), `keys` the (height, width) of the keys
    where that differs; biased: a table is added to the products.
    activation: fused into the operator, one of ACTIVATIONS.
    fused_add: the runtime adds a second tensor of the output's shape inside this kernel, before the activation.
    """

    kind: str
    in_channels: tuple[int, ...]
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "none"
    fused_add: bool = False
    ceil: bool = False
    padding_end: tuple[int, ...] = ()
    exclude_pad: bool = False
    out_size: tuple[int, ...] = ()
    align_corners: bool = False
    tokens: bool = False
    keys: tuple[int, ...] = ()
    biased: bool = False
    dtype: str = "float32"
    batch: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown operator kind {self.kind!r}; known: {', '.join(KINDS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        sizes = (*self.in_channels, self.height, self.width, self.out_channels, *self.kernel, *self.stride, self.batch)
        if not self.in_channels or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"operator sizes must be positive integers: {self}")
        has_ends = self.kind in (*CONV_KINDS, "conv_transpose", "pad", "crop")
        if self.padding_end and (self.padding_end == self.padding or not has_ends):
            raise ValueError(f"padding_end is for convolutions and pads, where it differs from padding: {self}")
        if self.exclude_pad and self.kind != "avg_pool":
            raise ValueError(f"exclude_pad is for average poolings: {self}")
        padding = min(*self.padding, *self.padding_end)
        if self.groups < 1 or padding < 0 or min(*self.dilation, self.out_height, self.out_width) < 1:
            raise ValueError(f"impossible groups, padding, dilation or output size: {self}")
        if self.kind in ("add", "sub", "mul", "scale", "shift", "join") and len(set(self.in_channels)) > 1:
            raise ValueError(f"{self.kind} needs inputs of equal channels: {self}")
        if (self.kind == "mask" and self.in_channels[1:] != (1,)) or (
            self.kind in ONE_CHANNEL_KINDS and self.out_channels > 1
        ):
            raise ValueError(f"{self.kind} reads or gives one channel: {self}")
        if self.kind == "activation" and self.activation == "none":
            raise ValueError("an activation operator needs an activation")
        if self.kind == "pixel_shuffle" and self.in_channels[0] != self.out_channels * self.stride[0] * self.stride[1]:
            raise ValueError(f"a pixel shuffle makes pixels of all its channels: {self}")
        if self.kind == "grouped_conv" and (
            self.in_channels[0] % self.groups or self.out_channels % self.in_channels[0]
        ):
            raise ValueError(f"a convolution in groups divides its channels and gives a multiple of them: {self}")
        if self.kind == "chunk" and self.in_channels[0] != self.out_channels * self.groups:
            raise ValueError(f"a chunk is one of equal parts: {self}")
        if self.align_corners and self.kind not in ("upsample_nearest", "upsample_bilinear"):
            raise ValueError(f"align_corners is for upsampling: {self}")
        always = ("adaptive_avg_pool", "unflatten")
        sized = (*always, "upsample_nearest", "upsample_bilinear")
        if (self.out_size and self.kind not in sized) or (self.kind in always and not self.out_size):
            raise ValueError(f"out_size is for upsampling, adaptive pooling and unflattening: {self}")
        if (self.keys or self.biased) and self.kind != "attention":
            raise ValueError(f"keys and biased are for attention: {self}")
        if self.kind == "attention" and self._odd_attention():
            raise ValueError(f"heads, windows or inputs of an attention that do not fit: {self}")
        if self.kind == "depthwise_conv" and not self.in_channels[0] == self.out_channels == self.groups:
            raise ValueError(f"a depthwise convolution has as many groups and outputs as inputs: {self}")

    def _odd_attention(self) -> bool:
        if len(self.in_channels) != 3 or self.in_channels[0] % self.groups or self.out_channels % self.groups:
            return True
        heads = {self.in_channels[0] / self.in_channels[1], self.out_channels / self.in_channels[2]}  # per head of keys
        if not heads <= {1, self.groups}:
            return True
        sizes = self.height, self.width
        if self.keys:
            return self.kernel != sizes
        return any(sizes[axis] % (self.kernel[axis] * self.dilation[axis]) for axis in (0, 1))

    @property
    def gives_tokens(self) -> bool:
        """Whether the output is tokens."""
        return self.kind == "to_tokens" or (self.tokens and self.kind not in _FROM_TOKENS)

    @property
    def padding_after(self) -> tuple[int, ...]:
        """Padding behind the image, (bottom, right)."""
        return self.padding_end or self.padding

    @property
    def out_height(self) -> int:
        return self._out_size(0, self.height)

    @property
    def out_width(self) -> int:
        return self._out_size(1, self.width)

    def _out_size(self, axis: int, size: int) -> int:
        if self.kind == "rows_to_channels" and axis == 0:
            return 1
        if self.kind == "regroup":
            return self.height * self.width * self.in_channels[0] // self.out_channels if axis == 0 else 1
        if self.kind in ("flatten", "global_avg_pool", "take_token") or (self.kind == "linear" and not self.tokens):
            return 1
        if self.kind == "prepend":
            return self.height * self.width + self.padding[0] if axis == 0 else 1
        if self.kind == "channel_map":
            return -(-size // self.stride[axis])
        if self.out_size:
            return self.out_size[axis]
        if self.kind == "crop":
            return size - self.padding[axis] - self.padding_after[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        if self.kind == "conv_transpose":
            return (size - 1) * self.stride[axis] - self.padding[axis] - self.padding_after[axis] + reach
        if self.kind in ("upsample_nearest", "upsample_bilinear", "pixel_shuffle"):
            return size * self.stride[axis]
        if self.kind not in (*CONV_KINDS, "max_pool", "avg_pool", "pad"):
            return size
        padding = self.padding[axis] + self.padding_after[axis]
        steps, rest = divmod(size + padding - reach, self.stride[axis])
        # a window that would start in the padding behind the image is left out (PyTorch, ceil_mode)
        one_more = self.ceil and rest > 0 and (steps + 1) * self.stride[axis] < size + self.padding[axis]
        return steps + one_more + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolution or matrix product for one image; 0 for the others."""
        if self.kind == "conv_transpose":
            return self.in_channels[0] * self.out_channels * self.kernel[0] * self.kernel[1] * self.height * self.width
        if self.kind == "attention":
            height, width = self.keys or self.kernel
            return self.height * self.width * height * width * (self.in_channels[0] + self.out_channels)
        if self.kind not in (*CONV_KINDS, "linear"):
            return 0
        per_output = self.in_channels[0] // self.groups * self.kernel[0] * self.kernel[1]
        return per_output * self.out_channels * self.out_height * self.out_width

    @property
    def params(self) -> int:
        """Weights and one bias per output (what is left of a batch-norm once folded)."""
        if self.kind in ("add_map", "prepend"):
            return self.out_channels * (self.height * self.width if self.kind == "add_map" else self.padding[0])
        if self.kind == "attention" and self.biased:
            height, width = self.keys or self.kernel
            return self.groups * self.kernel[0] * self.kernel[1] * height * width
        if self.kind in ("affine", "prelu", *NORM_KINDS):
            return (1 if self.kind == "prelu" else 2) * self.out_channels
        if self.kind not in (*CONV_KINDS, "conv_transpose", "linear"):
            return 0
        return (self.in_channels[0] // self.groups * self.kernel[0] * self.kernel[1] + 1) * self.out_channels

    @property
    def axes(self) -> tuple[int, ...]:
        """The widths along which this operator's latency is tabulated: (c_in, c_out) or (c,)."""
        if self.kind in TWO_AXIS_KINDS:
            return self.in_channels[0], self.out_channels
        return (sum(self.in_channels) if self.kind == "concat" else self.in_channels[0],)

    @property
    def step(self) -> int:
        """Widths are multiples of it: channels of one group of a depthwise or grouped convolution, the parts of a
        `chunk`, else 1."""
        if self.kind == "chunk":
            return self.groups
        return self.in_channels[0] // self.groups if self.kind in GROUPED_KINDS else 1

    def family(self) -> OpSpec:
        """The same operator with its widths taken out: operators of one family interpolate."""
        if self.kind in GROUPED_KINDS:  # one group
            return replace(self, in_channels=(self.step,), out_channels=self.out_channels // self.groups, groups=1)
        if self.kind == "chunk":
            return replace(self, in_channels=(self.groups,), out_channels=1)
        if self.groups > 1 or self.kind in WHOLE_KINDS:  # alone
            return self
        ones = (1,) * len(self.in_channels)
        return replace(self, in_channels=ones, out_channels=1, groups=1)

    def with_axes(self, axes: Iterable[int]) -> OpSpec:
        """The operator of this family at other widths, in the order of `axes`."""
        values = tuple(int(value) for value in axes)
        if self.kind in WHOLE_KINDS and values == self.axes:
            return self
        if self.kind in TWO_AXIS_KINDS:
            return replace(self, in_channels=(values[0],), out_channels=values[1])
        (channels,) = values
        if self.kind == "concat":
            share, count = divmod(channels, len(self.in_channels))
            parts = tuple(share + (index < count) for index in range(len(self.in_channels)))
            return replace(self, in_channels=parts, out_channels=channels)
        if self.kind in (*ONE_CHANNEL_KINDS, "mask"):
            out = 1 if self.kind in ONE_CHANNEL_KINDS else channels
            return replace(self, in_channels=(channels, *self.in_channels[1:]), out_channels=out)
        groups = channels // self.step if self.kind in GROUPED_KINDS else self.groups
        out = channels * self.height * self.width if self.kind == "flatten" else channels
        out = channels * self.height if self.kind == "rows_to_channels" else out
        out = channels // (self.stride[0] * self.stride[1]) if self.kind == "pixel_shuffle" else out
        out = channels * self.out_channels // self.in_channels[0] if self.kind in ("grouped_conv", "chunk") else out
        return replace(self, in_channels=(channels,) * len(self.in_channels), out_channels=out, groups=groups)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        # younger than the first tables, whose rows must stay what they are
        younger = ("ceil", "padding_end", "exclude_pad", "out_size", "align_corners", "tokens", "keys", "biased")
        for name in younger:
            if not values[name]:
                del values[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpSpec:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown operator field {unknown[0]!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"incomplete operator: {error}") from None

    def __str__(self) -> str:
        source = "+".join(str(channels) for channels in self.in_channels)
        text = f"{self.kind} {source}x{self.height}x{self.width}->{self.out_channels}"
        if self.kernel != (1, 1) or self.stride != (1, 1):
            text += f" k{self.kernel[0]}x{self.kernel[1]} s{self.stride[0]}"
        if self.tokens:
            text += " tokens"
        if self.fused_add:
            text += " +add"
        return text + (f" {self.activation}" if self.activation != "none" else "")


@dataclass(frozen=True)
class OpNode:
    """An operator in a network. `inputs` are names of earlier nodes, or OpGraph.INPUT."""

    name: str
    op: OpSpec
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class OpGraph:
    """A network as operators in execution order.

    nodes: topologically ordered. input_shape: of the first input, (C, H, W) of an image, (C,) of a vector or (H * W, C)
    of tokens. outputs: names of the nodes that leave the network. more_inputs: names and shapes of the inputs after
    the first.
    """

    nodes: tuple[OpNode, ...]
    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]
    more_inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()

    INPUT = "input"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of one image or vector, in order."""
        return {self.INPUT: self.input_shape, **dict(self.more_inputs)}

    @property
    def macs(self) -> int:
        return sum(node.op.macs for node in self.nodes)

    @property
    def params(self) -> int:
        return sum(node.op.params for node in self.nodes)

    @property
    def ops(self) -> tuple[OpSpec, ...]:
        return tuple(node.op for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        nodes = [{"name": n.name, "op": n.op.to_json(), "inputs": list(n.inputs)} for n in self.nodes]
        more = {"more_inputs": [[name, list(shape)] for name, shape in self.more_inputs]} if self.more_inputs else {}
        return {"nodes": nodes, "input_shape": list(self.input_shape), "outputs": list(self.outputs)} | more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpGraph:
        nodes = tuple(OpNode(n["name"], OpSpec.from_json(n["op"]), tuple(n["inputs"])) for n in data["nodes"])
        more = tuple((name, tuple(shape)) for name, shape in data.get("more_inputs", ()))
        return cls(nodes, tuple(data["input_shape"]), tuple(data["outputs"]), more)


def fuse_adds(graph: OpGraph) -> OpGraph:
    """The network as a runtime runs it that adds shortcuts inside the convolution's kernel.

    A convolution without activation whose only reader is an `add` swallows that add and its activation;
    where both operands qualify, the later one does. (ONNX Runtime: NCHWc `Conv` with a `Sum` input.)
    """
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for source in node.inputs:
            readers[source] = readers.get(source, 0) + 1
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    swallowed: dict[str, OpNode] = {}  # convolution -> the add it runs
    for node in graph.nodes:
        if node.op.kind != "add" or len(node.inputs) != 2:
            continue
        for name in sorted(node.inputs, key=lambda source: -position.get(source, -1)):
            if name not in position or name in graph.outputs or readers[name] != 1:
                continue
            op = graph.nodes[position[name]].op
            if op.kind == "conv" and op.activation == "none" and not op.fused_add:
                swallowed[name] = node
                break
    carried = {add.name: position[conv] for conv, add in swallowed.items()}
    renamed = {add.name: conv for conv, add in swallowed.items()}
    nodes = []
    for node in graph.nodes:
        if node.name in swallowed:
            continue  # written where its add stood: only there is the other operand known to be ready
        inputs = tuple(renamed.get(source, source) for source in node.inputs)
        if node.name not in carried:
            nodes.append(OpNode(node.name, node.op, inputs))
            continue
        conv = graph.nodes[carried[node.name]]
        own = tuple(renamed.get(source, source) for source in conv.inputs)
        other = tuple(source for source in inputs if source != conv.name)
        op = replace(conv.op, activation=node.op.activation, fused_add=True)
        nodes.append(OpNode(conv.name, op, own + other))
    return replace(graph, nodes=tuple(nodes), outputs=tuple(renamed.get(name, name) for name in graph.outputs))


def digest(graph: OpGraph) -> str:
    """A short name for a network, by its operators and their order."""
    return f"{zlib.crc32(json.dumps(graph.to_json(), sort_keys=True).encode()):08x}"
