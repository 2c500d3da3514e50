"""`OpGraph` + weights -> a float32 TFLite model. Layout NHWC, names of nodes kept, batch-norms already folded.

The flatbuffer is written directly with LiteRT's schema classes: milliseconds per operator, no converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from profilers.builders.tflite_writer import FUSED, Writer
from profilers.builders.weights import Weights, averages, checked_weights, first_channel, map_as_convolution
from profilers.builders.windows import parts_of, windows_of
from profilers.errors import DeviceError, UnsupportedOperatorError
from profilers.ops import GROUPED_KINDS, OpGraph, OpNode, OpSpec

_ARITHMETIC = {"add": "ADD", "sub": "SUB", "mul": "MUL", "scale": "MUL", "shift": "ADD", "mask": "MUL"}
#: Kinds whose TFLite operator fuses no activation. (CONCATENATION has the field; XNNPACK ignores what it says.)
_UNFUSED_KINDS = (
    *("concat", "global_avg_pool", "pad", "flatten", "slice", "chunk", "shuffle", "pixel_shuffle", "prelu", "softmax"),
    *("log_softmax", "clip", "crop", "upsample_nearest", "upsample_bilinear"),
    *("to_tokens", "to_image", "prepend", "take_token", "attention"),
    *("channel_mean", "channel_max", "adaptive_avg_pool", "l2_norm", "unflatten", "rows_to_channels"),
    *("join", "regroup"),
)
_NEVER_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")


def build(graph: OpGraph, weights: Weights) -> bytes:
    """The serialized TFLite model of `graph`; inputs (N, H, W, C), `input` first, and outputs named after their nodes.

    Tokens are (N, H * W, C). Vectors are (N, C): outputs that descend from a vector operator, and a 1x1 input that
    only `linear` reads.
    Raises ValueError where weights do not fit, UnsupportedOperatorError where TFLite has no such operator, and
    DeviceError where LiteRT is not installed.
    """
    checked_weights(graph, weights)
    try:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema
    except ImportError:
        raise DeviceError("TFLite models need LiteRT: pip install 'amc-hw[litert]'") from None
    writer = Writer(schema)
    network = _Network(graph, weights, writer)
    for node in graph.nodes:
        _emit(network, node)
    builder = flatbuffers.Builder(writer.size_bytes)
    builder.Finish(writer.model(list(graph.inputs), graph.outputs).Pack(builder), file_identifier=b"TFL3")
    return bytes(memoryview(builder.Bytes)[builder.Head() :])


class _Network:
    """What an operator has to know of the network around it: its arrays, readers and the layout of its inputs."""

    def __init__(self, graph: OpGraph, weights: Weights, writer: Writer) -> None:
        self.writer = writer
        self.weights = weights
        self.outputs = graph.outputs
        self.batch = graph.nodes[0].op.batch
        self.by_name = {node.name: node for node in graph.nodes}
        self.readers: dict[str, list[str]] = {}  # tensor -> kinds of the nodes that read it
        for node in graph.nodes:
            for source in node.inputs:
                self.readers.setdefault(source, []).append(node.op.kind)
        for name, (channels, *size) in graph.inputs.items():
            if len(size) == 1:  # tokens (H * W, C)
                writer.tensor(name, (self.batch, channels, *size))
                continue
            vector = not size or (size == [1, 1] and self.only_linear_reads(name))
            writer.tensor(name, (self.batch, channels) if vector else (self.batch, *size, channels))

    def only_linear_reads(self, name: str) -> bool:
        readers = self.readers.get(name, [])
        return name not in self.outputs and bool(readers) and all(kind == "linear" for kind in readers)

    def keeps_channels_last(self, name: str) -> bool:
        """True for a `flatten` whose vectors stay in (H, W, C) order: the readers' weights are permuted instead."""
        node = self.by_name.get(name)
        return node is not None and node.op.kind == "flatten" and self.only_linear_reads(name)

    def block_behind(self, name: str) -> int:
        """The block of the DEPTH_TO_SPACE that alone reads a convolution, whose channels then leave in its order, as
        its weights are; 0 where there is none."""
        node = self.by_name.get(name)
        alone = name not in self.outputs and self.readers.get(name) == ["pixel_shuffle"]
        if not alone or node is None or node.op.kind != "conv" or node.op.fused_add or node.op.groups > 1:
            return 0
        return next(reader.op.stride[0] for reader in self.by_name.values() if name in reader.inputs)

    def activation_of(self, name: str) -> str:
        """The activation that made the tensor `name`, "none" for the input."""
        return self.by_name[name].op.activation if name in self.by_name else "none"

    def as_image(self, name: str) -> str:
        """The tensor as (N, H, W, C); vectors get H = W = 1."""
        shape, image = self.writer.shapes[name], f"{name}/image"
        if len(shape) == 4:
            return name
        return image if image in self.writer.index else self.writer.reshape(name, image, (shape[0], 1, 1, shape[1]))

    def operands(self, names: tuple[str, ...]) -> list[str]:
        """The tensors, all of one rank: a gate (N, C) multiplies an image as (N, 1, 1, C)."""
        if len({len(self.writer.shapes[name]) for name in names}) == 1:
            return list(names)
        return [self.as_image(name) for name in names]

    def image_shape(self, op: OpSpec) -> tuple[int, int, int, int]:
        return self.batch, op.out_height, op.out_width, op.out_channels


def _emit(network: _Network, node: OpNode) -> None:
    op, writer = node.op, network.writer
    if op.dtype != "float32":
        raise UnsupportedOperatorError(f"{node.name}: TFLite models are built in float32 only, not in {op.dtype}")
    if op.kind == "activation":
        writer.activation(op.activation, node.inputs[0], node.name)
    elif op.activation == "none" or (op.activation in FUSED and op.kind not in _UNFUSED_KINDS):
        _EMITTERS[op.kind](network, node, node.name, op.activation)
    else:
        linear = f"{node.name}/linear"
        _EMITTERS[op.kind](network, node, linear, "none")
        writer.activation(op.activation, linear, node.name)


# Windows: TFLite knows only VALID, and SAME, which puts an odd pixel last.


def _pads_read(op: OpSpec, axis: int) -> tuple[int, int]:
    """Padding (before, after) along an axis (0 vertical, 1 horizontal), less what no window reads."""
    size, out = (op.height, op.out_height) if axis == 0 else (op.width, op.out_width)
    reach = op.dilation[axis] * (op.kernel[axis] - 1) + 1
    before = op.padding[axis]
    return before, max((out - 1) * op.stride[axis] + reach - before - size, 0)


def _is_same(op: OpSpec, axis: int) -> bool:
    """True where SAME has the output size and the leading padding of `op` along an axis; the rest follows."""
    size, out = (op.height, op.out_height) if axis == 0 else (op.width, op.out_width)
    reach = op.dilation[axis] * (op.kernel[axis] - 1) + 1
    total = max((out - 1) * op.stride[axis] + reach - size, 0)
    return out == -(-size // op.stride[axis]) and total // 2 == op.padding[axis]


def _padded(network: _Network, node: OpNode, *, edges: bool = False, same: bool = True) -> tuple[str, dict[str, Any]]:
    """A node's input, padded by operators of its own where no scheme pads alike, and the window's options.

    edges: by the image's own edges, not zeros.
    """
    op, writer = node.op, network.writer
    source = network.as_image(node.inputs[0])
    vertical, horizontal = _pads_read(op, 0), _pads_read(op, 1)
    scheme = "VALID"
    if same and (any(op.padding) or op.padding_end) and _is_same(op, 0) and _is_same(op, 1):
        scheme = "SAME"
    elif any((*vertical, *horizontal)) and edges:
        source = _with_edges(writer, source, f"{node.name}/below", 1, vertical)
        source = _with_edges(writer, source, f"{node.name}/beside", 2, horizontal)
    elif any((*vertical, *horizontal)):
        batch, height, width, channels = writer.shapes[source]
        shape = (batch, height + sum(vertical), width + sum(horizontal), channels)
        pads = writer.constant(f"{node.name}/pads", np.array([(0, 0), vertical, horizontal, (0, 0)]), dtype="INT32")
        source = writer.operator("PAD", [source, pads], f"{node.name}/padded", shape)
    padding = getattr(writer.schema.Padding, scheme)
    return source, {"padding": padding, "strideH": op.stride[0], "strideW": op.stride[1]}


def _with_edges(writer: Writer, source: str, name: str, axis: int, counts: tuple[int, int]) -> str:
    """An image with its first row or column so many times before it, and its last one behind it."""
    shape = list(writer.shapes[source])

    def edge(what: str, at: int) -> str:
        begin = tuple(at if place == axis else 0 for place in range(4))
        thin = tuple(1 if place == axis else size for place, size in enumerate(shape))
        return writer.cut(source, f"{name}/{what}", begin, thin)

    if not any(counts):
        return source
    first = [edge("first", 0)] * counts[0] if counts[0] else []
    last = [edge("last", shape[axis] - 1)] * counts[1] if counts[1] else []
    wider = tuple(size + sum(counts) if place == axis else size for place, size in enumerate(shape))
    options = writer.fusing("ConcatenationOptions", "none", axis=axis)
    return writer.operator("CONCATENATION", [*first, source, *last], name, wider, options=options)


# One function per kind: (network, node, name of the output, activation to fuse)


def _conv(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer, arrays = node.op, network.writer, network.weights[node.name]
    if block := network.block_behind(node.name):
        order = _blocks_first(op.out_channels, block)
        arrays = {name: array[order] for name, array in arrays.items()}
    product, fused = (f"{node.name}/product", "none") if op.fused_add else (output, activation)
    source, window = _padded(network, node)
    window |= {"dilationHFactor": op.dilation[0], "dilationWFactor": op.dilation[1]}
    bias = writer.constant(f"{node.name}.bias", arrays["bias"])
    if op.kind in GROUPED_KINDS and op.step == 1:  # (O, 1, kh, kw) -> (1, kh, kw, O)
        weight = writer.constant(f"{node.name}.weight", arrays["weight"].transpose(1, 2, 3, 0))
        options = writer.fusing("DepthwiseConv2DOptions", fused, depthMultiplier=op.out_channels // op.groups, **window)
        code, version = "DEPTHWISE_CONV_2D", 1 if op.dilation == (1, 1) else 2
    else:  # (O, I/groups, kh, kw) -> (O, kh, kw, I/groups)
        weight = writer.constant(f"{node.name}.weight", arrays["weight"].transpose(0, 2, 3, 1))
        options = writer.fusing("Conv2DOptions", fused, **window)
        code, version = "CONV_2D", 1 if op.groups == 1 else 6
    inputs = [source, weight, bias]
    writer.operator(code, inputs, product, network.image_shape(op), version=version, options=options)
    if op.fused_add:
        operands = [product, network.as_image(node.inputs[1])]
        options = writer.fusing("AddOptions", activation)
        writer.operator("ADD", operands, output, network.image_shape(op), options=options)


def _channel_map(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    weight = map_as_convolution(network.weights[node.name]["index"], op.in_channels[0])  # (O, I, 1, 1)
    source, window = _padded(network, node)
    inputs = [
        source,
        writer.constant(f"{node.name}.weight", weight.transpose(0, 2, 3, 1)),
        writer.constant(f"{node.name}.bias", np.zeros(op.out_channels)),
    ]
    options = writer.fusing("Conv2DOptions", activation, **window)
    writer.operator("CONV_2D", inputs, output, network.image_shape(op), options=options)


def _linear(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, arrays, (source,) = network.writer, network.weights[node.name], node.inputs
    weight = arrays["weight"]  # (O, I)
    if network.keeps_channels_last(source):
        flat = network.by_name[source].op
        shape = (-1, flat.in_channels[0], flat.height, flat.width)
        weight = weight.reshape(shape).transpose(0, 2, 3, 1).reshape(weight.shape)
    inputs = [
        source,
        writer.constant(f"{node.name}.weight", weight),
        writer.constant(f"{node.name}.bias", arrays["bias"]),
    ]
    if node.op.tokens:
        options = writer.fusing("FullyConnectedOptions", activation, keepNumDims=True)
        wanted = (*writer.shapes[source][:2], node.op.out_channels)
        writer.operator("FULLY_CONNECTED", inputs, output, wanted, version=5, options=options)
        return
    options = writer.fusing("FullyConnectedOptions", activation)
    writer.operator("FULLY_CONNECTED", inputs, output, (network.batch, node.op.out_channels), options=options)


def _elementwise(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, operands = network.writer, network.operands(node.inputs)
    shape = np.broadcast_shapes(*(writer.shapes[name] for name in operands))
    code = _ARITHMETIC[node.op.kind]
    writer.operator(code, operands, output, shape, options=writer.fusing(f"{code.capitalize()}Options", activation))


def _scalar(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    code = "ADD" if node.op.kind == "add_scalar" else "MUL"
    value = writer.constant(f"{node.name}/value", network.weights[node.name]["value"].reshape(1))
    options = writer.fusing(f"{code.capitalize()}Options", activation)
    writer.operator(code, [source, value], output, writer.shapes[source], options=options)


def _affine(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, arrays, (source,) = network.writer, network.weights[node.name], node.inputs
    _scaled(writer, node.name, source, output, arrays, activation)


def _scaled(
    writer: Writer, name: str, source: str, output: str, arrays: Mapping[str, np.ndarray], activation: str
) -> None:
    """source * weight + bias along the last axis."""
    shape = writer.shapes[source]
    weight, bias = (writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias"))
    product = writer.operator(
        "MUL", [source, weight], f"{name}/scaled", shape, options=writer.fusing("MulOptions", "none")
    )
    writer.operator("ADD", [product, bias], output, shape, options=writer.fusing("AddOptions", activation))


def _norm(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, arrays, (source,), name, op = network.writer, network.weights[node.name], node.inputs, node.name, node.op
    if op.kind == "layer_norm":
        axes = [len(writer.shapes[source]) - 1]
    else:
        source, axes = network.as_image(source), [1, 2]
        batch, height, width, channels = writer.shapes[source]
        if op.kind == "group_norm":
            apart = (batch, height, width, op.groups, channels // op.groups)
            source, axes = writer.reshape(source, f"{name}/apart", apart), [1, 2, 4]
    normed = _normalised(writer, name, source, axes, float(arrays["eps"]))
    if op.kind == "group_norm":
        normed = writer.reshape(normed, f"{name}/together", network.image_shape(op))
    _scaled(writer, name, normed, output, arrays, activation)


def _normalised(writer: Writer, name: str, source: str, axes: list[int], eps_value: float) -> str:
    """source less its mean over the axes, over its deviation."""
    shape = writer.shapes[source]
    one = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    axis = writer.constant(f"{name}/axis", np.array(axes), dtype="INT32")
    eps = writer.constant(f"{name}/eps", np.array([eps_value]))
    mean_of = ("ReducerOptions", {"keepDims": True})
    mean = writer.operator("MEAN", [source, axis], f"{name}/mean", one, options=mean_of)
    centred = writer.operator(
        "SUB", [source, mean], f"{name}/centred", shape, options=writer.fusing("SubOptions", "none")
    )
    squares = writer.operator("SQUARE", [centred], f"{name}/squares", shape)
    variance = writer.operator("MEAN", [squares, axis], f"{name}/variance", one, options=mean_of)
    options = writer.fusing("AddOptions", "none")
    above = writer.operator("ADD", [variance, eps], f"{name}/above_zero", one, options=options)
    inverse = writer.operator("RSQRT", [above], f"{name}/inverse", one)
    options = writer.fusing("MulOptions", "none")
    return writer.operator("MUL", [centred, inverse], f"{name}/normed", shape, options=options)


def _prelu(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    shape, slope = writer.shapes[source], network.weights[node.name]["weight"]
    if len(slope) == 1:
        options = ("LeakyReluOptions", {"alpha": float(slope[0])})
        writer.operator("LEAKY_RELU", [source], output, shape, options=options)
        return
    alpha = writer.constant(f"{node.name}.weight", slope.reshape(*[1] * (len(shape) - 2), -1))
    writer.operator("PRELU", [source, alpha], output, shape)


def _softmax(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    writer.operator("SOFTMAX", [source], output, writer.shapes[source], options=("SoftmaxOptions", {"beta": 1.0}))


def _log_softmax(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    writer.operator("LOG_SOFTMAX", [source], output, writer.shapes[source], options=("LogSoftmaxOptions", {}))


def _slice(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    *rest, channels = writer.shapes[source]
    op, first = node.op, first_channel(node.op, network.weights[node.name])
    if op.kind == "slice" and op.groups > 1:  # the same run of every group
        apart = writer.reshape(source, f"{output}/apart", (*rest, op.groups, channels // op.groups))
        shape = (*rest, op.groups, op.out_channels // op.groups)
        runs = writer.cut(apart, f"{output}/runs", (*(0 for _ in rest), 0, first), shape)
        writer.reshape(runs, output, (*rest, op.out_channels))
        return
    writer.cut(source, output, (*(0 for _ in rest), first), (*rest, op.out_channels))


def _shuffle(network: _Network, node: OpNode, output: str, activation: str) -> None:
    network.writer.turned(network.as_image(node.inputs[0]), output, node.op.groups)


def _clip(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,), arrays = network.writer, node.inputs, network.weights[node.name]
    shape = writer.shapes[source]
    bounds = [(code, arrays[key].reshape(())) for code, key in (("MAXIMUM", "low"), ("MINIMUM", "high"))]
    bounds = [(code, bound) for code, bound in bounds if np.isfinite(bound).all()]
    for place, (code, bound) in enumerate(bounds, 1):
        constant = writer.constant(f"{node.name}/{code.lower()}", bound)
        named = output if place == len(bounds) else f"{node.name}/above"
        source = writer.operator(code, [source, constant], named, shape, options=("MaximumMinimumOptions", {}))


def _crop(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    if op.tokens:
        writer.cut(node.inputs[0], output, (0, op.padding[0], 0), (network.batch, op.out_height, op.out_channels))
        return
    writer.cut(network.as_image(node.inputs[0]), output, (0, *op.padding, 0), network.image_shape(op))


def _to_tokens(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, source = node.op, network.as_image(node.inputs[0])
    network.writer.reshape(source, output, (network.batch, op.height * op.width, op.out_channels))


def _to_image(network: _Network, node: OpNode, output: str, activation: str) -> None:
    network.writer.reshape(node.inputs[0], output, network.image_shape(node.op))


def _add_map(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,), value = network.writer, node.inputs, network.weights[node.name]["value"]
    constant = writer.constant(f"{node.name}/value", value if node.op.tokens else value.transpose(1, 2, 0))
    source = source if node.op.tokens else network.as_image(source)
    options = writer.fusing("AddOptions", activation)
    writer.operator("ADD", [source, constant], output, writer.shapes[source], options=options)


def _prepend(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer, value = node.op, network.writer, network.weights[node.name]["value"]
    own = writer.constant(f"{node.name}/value", np.repeat(value[None], network.batch, axis=0))
    options = writer.fusing("ConcatenationOptions", "none", axis=1)
    shape = (network.batch, op.out_height, op.out_channels)
    writer.operator("CONCATENATION", [own, node.inputs[0]], output, shape, options=options)


def _take_token(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, channels, place = network.writer, node.op.out_channels, int(network.weights[node.name]["start"])
    taken = writer.cut(node.inputs[0], f"{output}/token", (0, place, 0), (network.batch, 1, channels))
    writer.reshape(taken, output, (network.batch, channels))


def _attention(network: _Network, node: OpNode, output: str, activation: str) -> None:
    """Every input as (batch * windows, heads, positions, channels)."""
    op, writer, name, arrays = node.op, network.writer, node.name, network.weights[node.name]
    windows = windows_of(op, channels_first=False)
    count = windows.count if windows else 1
    read = []
    for part, given, (positions, heads, width) in zip("qkv", node.inputs, parts_of(op), strict=True):
        source = given
        if windows is not None:
            split = writer.reshape(source, f"{name}/{part}/apart", (network.batch, *windows.divided, heads * width))
            source = writer.transpose(split, f"{name}/{part}/windows", windows.order)
        split = writer.reshape(source, f"{name}/{part}/heads", (network.batch * count, positions, heads, width))
        read.append(writer.transpose(split, f"{name}/{part}", (0, 2, 1, 3)))
    query, key, value = read
    shape = (network.batch * count, op.groups, writer.shapes[query][2], writer.shapes[key][2])
    turned = ("BatchMatMulOptions", {"adjY": True})
    scores = writer.operator("BATCH_MATMUL", [query, key], f"{name}/scores", shape, options=turned)
    for part, code in (("scale", "Mul"), ("bias", "Add")):
        if part in arrays and not (part == "scale" and arrays[part] == 1):
            constant = writer.constant(f"{name}.{part}", np.atleast_1d(arrays[part]))
            options = writer.fusing(f"{code}Options", "none")
            scores = writer.operator(code.upper(), [scores, constant], f"{name}/{part}d", shape, options=options)
    softmax = ("SoftmaxOptions", {"beta": 1.0})
    weights = writer.operator("SOFTMAX", [scores], f"{name}/weights", shape, options=softmax)
    shape = (*shape[:3], writer.shapes[value][3])
    plain: tuple[str, dict[str, Any]] = ("BatchMatMulOptions", {})
    product = writer.operator("BATCH_MATMUL", [weights, value], f"{name}/product", shape, options=plain)
    made = writer.transpose(product, f"{name}/together", (0, 2, 1, 3))
    if windows is not None:
        split = writer.reshape(made, f"{name}/out/windows", (network.batch, *windows.gathered, op.out_channels))
        made = writer.transpose(split, f"{name}/out/apart", windows.back)
    tokens = (network.batch, op.height * op.width, op.out_channels)
    writer.reshape(made, output, tokens if op.tokens else network.image_shape(op))


def _pad(network: _Network, node: OpNode, output: str, activation: str) -> None:
    source, (top, left), (bottom, right) = network.as_image(node.inputs[0]), node.op.padding, node.op.padding_after
    around = np.array([(0, 0), (top, bottom), (left, right), (0, 0)])
    pads = network.writer.constant(f"{node.name}/pads", around, dtype="INT32")
    network.writer.operator("PAD", [source, pads], output, network.image_shape(node.op))


def _blocks_first(channels: int, block: int) -> np.ndarray:
    """PyTorch's channel (c, i, j) of a pixel shuffle at the place (i, j, c), where DEPTH_TO_SPACE reads it."""
    return np.arange(channels).reshape(-1, block * block).T.reshape(-1)


def _pixel_shuffle(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer, block = node.op, network.writer, node.op.stride[0]
    source = network.as_image(node.inputs[0])
    if op.out_channels > 1 and not network.block_behind(node.inputs[0]):
        source = writer.turned(source, f"{node.name}/blocks_first", op.out_channels)
    options = ("DepthToSpaceOptions", {"blockSize": block})
    writer.operator("DEPTH_TO_SPACE", [source], output, network.image_shape(op), options=options)


def _upsample(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    size = writer.constant(f"{node.name}/size", np.array([op.out_height, op.out_width]), dtype="INT32")
    inputs, shape = [network.as_image(node.inputs[0]), size], network.image_shape(op)
    if op.kind == "upsample_nearest":
        options: tuple[str, dict[str, Any]] = ("ResizeNearestNeighborOptions", {"alignCorners": False})
        writer.operator("RESIZE_NEAREST_NEIGHBOR", inputs, output, shape, options=options)
    else:
        corners = {"alignCorners": op.align_corners, "halfPixelCenters": not op.align_corners}
        options = ("ResizeBilinearOptions", corners)
        writer.operator("RESIZE_BILINEAR", inputs, output, shape, version=3, options=options)


def _conv_transpose(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer, arrays = node.op, network.writer, network.weights[node.name]
    if op.dilation != (1, 1):
        raise UnsupportedOperatorError(f"{node.name}: TFLite has no dilated transposed convolution ({op})")
    wanted, cut, scheme = network.image_shape(op), any((*op.padding, *op.padding_after)), "VALID"
    if cut and _is_cut_as_same(op, 0) and _is_cut_as_same(op, 1):
        cut, scheme = False, "SAME"
    whole = replace(op, padding=(0, 0), padding_end=()) if cut else op
    shape, made = network.image_shape(whole), f"{node.name}/whole" if cut else output
    size = writer.constant(f"{node.name}/size", np.array(shape), dtype="INT32")
    weight = writer.constant(f"{node.name}.weight", arrays["weight"].transpose(1, 2, 3, 0))  # (O, kh, kw, I)
    bias = writer.constant(f"{node.name}.bias", arrays["bias"])
    padding = getattr(writer.schema.Padding, scheme)
    window = {"padding": padding, "strideH": op.stride[0], "strideW": op.stride[1]}
    inputs = [size, weight, network.as_image(node.inputs[0]), bias]
    options = writer.fusing("TransposeConvOptions", activation, **window)
    version = 3 if activation == "none" else 4
    writer.operator("TRANSPOSE_CONV", inputs, made, shape, version=version, options=options)
    if cut:
        writer.cut(made, output, (0, *op.padding, 0), wanted)


def _is_cut_as_same(op: OpSpec, axis: int) -> bool:
    """True where a transposed convolution with SAME cuts off what `op` does: the larger half behind the image."""
    size, out = (op.height, op.out_height) if axis == 0 else (op.width, op.out_width)
    total = op.padding[axis] + op.padding_after[axis]
    return -(-out // op.stride[axis]) == size and total // 2 == op.padding[axis]


def _concat(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, operands = network.writer, network.operands(node.inputs)
    *rest, _ = writer.shapes[operands[0]]
    options = writer.fusing("ConcatenationOptions", activation, axis=len(rest))
    writer.operator("CONCATENATION", operands, output, (*rest, node.op.out_channels), options=options)


def _join(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    shape = (network.batch, op.height, op.out_channels)
    options = writer.fusing("ConcatenationOptions", "none", axis=1)
    writer.operator("CONCATENATION", list(node.inputs), output, shape, options=options)


def _regroup(network: _Network, node: OpNode, output: str, activation: str) -> None:
    network.writer.reshape(node.inputs[0], output, (network.batch, node.op.out_height, node.op.out_channels))


def _pool(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    if op.dilation != (1, 1) or (op.kind == "avg_pool" and op.ceil):
        raise UnsupportedOperatorError(f"{node.name}: TFLite has no such pooling: {op}")
    if op.kind == "max_pool":
        # A zero never wins over what an activation made non-negative. Any window has the edge that it reaches beyond:
        # twice, that does not win either, and unlike the least of all numbers it can be quantized.
        zero = network.activation_of(node.inputs[0]) in _NEVER_NEGATIVE
        code = "MAX_POOL_2D"
        source, window = _padded(network, node, edges=not zero)
    else:  # SAME leaves the padding out of the mean
        code = "AVERAGE_POOL_2D"
        source, window = _padded(network, node, same=op.exclude_pad)
    window |= {"filterHeight": op.kernel[0], "filterWidth": op.kernel[1]}
    corrected = op.exclude_pad and any(op.padding) and window["padding"] == writer.schema.Padding.VALID
    options = writer.fusing("Pool2DOptions", "none" if corrected else activation, **window)
    pooled, shape = f"{node.name}/pooled" if corrected else output, network.image_shape(op)
    writer.operator(code, [source], pooled, shape, options=options)
    if corrected:
        share = np.outer(*(_share_of_image(op, axis) for axis in (0, 1)))
        factors = writer.constant(f"{node.name}/factors", (1.0 / share)[None, :, :, None])
        writer.operator("MUL", [pooled, factors], output, shape, options=writer.fusing("MulOptions", activation))


def _share_of_image(op: OpSpec, axis: int) -> np.ndarray:
    """For every position along an axis, the share of a pooling's window that lies on the image."""
    size, out = (op.height, op.out_height) if axis == 0 else (op.width, op.out_width)
    first = np.arange(out) * op.stride[axis] - op.padding[axis]
    inside = np.minimum(first + op.kernel[axis], size) - np.maximum(first, 0)
    return np.asarray(inside / op.kernel[axis])


def _global_avg_pool(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    source, axes = (source, [1]) if node.op.tokens else (network.as_image(source), [1, 2])
    inputs = [source, writer.constant(f"{node.name}/axes", np.array(axes), dtype="INT32")]
    shape = (network.batch, node.op.out_channels)
    writer.operator("MEAN", inputs, output, shape, options=("ReducerOptions", {"keepDims": False}))


def _over_channels(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, code = network.writer, "MEAN" if node.op.kind == "channel_mean" else "REDUCE_MAX"
    axis = writer.constant(f"{node.name}/axes", np.array([3]), dtype="INT32")
    inputs, shape = [network.as_image(node.inputs[0]), axis], network.image_shape(node.op)
    writer.operator(code, inputs, output, shape, options=("ReducerOptions", {"keepDims": True}))


def _adaptive_avg_pool(network: _Network, node: OpNode, output: str, activation: str) -> None:
    """Products with the shares of pixels, along either side, which comes last for it."""
    op, writer, name = node.op, network.writer, node.name
    source = writer.transpose(network.as_image(node.inputs[0]), f"{name}/rows", (0, 3, 1, 2))
    for side, size, to in (("across", op.width, op.out_width), ("down", op.height, op.out_height)):
        weight = writer.constant(f"{name}/{side}", averages(size, to))
        bias = writer.constant(f"{name}/{side}/bias", np.zeros(to))
        options = writer.fusing("FullyConnectedOptions", "none", keepNumDims=True)
        shape = (*writer.shapes[source][:-1], to)
        made = f"{name}/{side}/product"
        writer.operator("FULLY_CONNECTED", [source, weight, bias], made, shape, version=5, options=options)
        source = writer.transpose(made, output if side == "down" else f"{name}/columns", (0, 3, 1, 2))


def _l2_norm(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer, (source,) = network.writer, node.inputs
    writer.operator("L2_NORMALIZATION", [source], output, writer.shapes[source], options=("L2NormOptions", {}))


def _unflatten(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    apart = writer.reshape(node.inputs[0], f"{node.name}/apart", (network.batch, op.out_channels, *op.out_size))
    writer.transpose(apart, output, (0, 2, 3, 1))


def _rows_to_channels(network: _Network, node: OpNode, output: str, activation: str) -> None:
    writer = network.writer
    turned = writer.transpose(network.as_image(node.inputs[0]), f"{node.name}/turned", (0, 2, 3, 1))  # (N, W, C, H)
    writer.reshape(turned, output, network.image_shape(node.op))


def _flatten(network: _Network, node: OpNode, output: str, activation: str) -> None:
    op, writer = node.op, network.writer
    (source,) = node.inputs
    if op.height * op.width > 1 and not network.keeps_channels_last(node.name):
        order = writer.constant(f"{node.name}/order", np.array([0, 3, 1, 2]), dtype="INT32")
        shape = (network.batch, op.in_channels[0], op.height, op.width)
        source = writer.operator("TRANSPOSE", [source, order], f"{node.name}/channels_first", shape)
    writer.reshape(source, output, (network.batch, op.out_channels))


_EMITTERS: dict[str, Callable[[_Network, OpNode, str, str], None]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "depthwise_conv": _conv,
    "grouped_conv": _conv,
    "channel_map": _channel_map,
    "linear": _linear,
    "add": _elementwise,
    "sub": _elementwise,
    "mul": _elementwise,
    "scale": _elementwise,
    "shift": _elementwise,
    "mask": _elementwise,
    "add_scalar": _scalar,
    "mul_scalar": _scalar,
    "affine": _affine,
    "prelu": _prelu,
    "layer_norm": _norm,
    "group_norm": _norm,
    "instance_norm": _norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "slice": _slice,
    "chunk": _slice,
    "clip": _clip,
    "crop": _crop,
    "to_tokens": _to_tokens,
    "to_image": _to_image,
    "add_map": _add_map,
    "prepend": _prepend,
    "take_token": _take_token,
    "attention": _attention,
    "pad": _pad,
    "shuffle": _shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "upsample_nearest": _upsample,
    "upsample_bilinear": _upsample,
    "concat": _concat,
    "max_pool": _pool,
    "avg_pool": _pool,
    "global_avg_pool": _global_avg_pool,
    "channel_mean": _over_channels,
    "channel_max": _over_channels,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "l2_norm": _l2_norm,
    "unflatten": _unflatten,
    "rows_to_channels": _rows_to_channels,
    "join": _join,
    "regroup": _regroup,
    "flatten": _flatten,
}
