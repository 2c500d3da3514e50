"""`OpGraph` + weights -> an ONNX model. Layout NCHW, names of nodes kept, batch-norms already folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from profilers.builders.weights import Weights, averages, checked_weights, first_channel, map_as_convolution
from profilers.builders.windows import parts_of, windows_of
from profilers.errors import UnsupportedOperatorError
from profilers.ops import ANY_RANK_KINDS, CONV_KINDS, SCALAR_KINDS, OpGraph, OpNode, OpSpec

OPSET = 17
#: Read by every ONNX Runtime since 1.14; newer IR versions are refused by the older runtimes that phones have.
IR_VERSION = 8
_ACTIVATION_OPS = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "hardswish": "HardSwish",
    "tanh": "Tanh",
    "elu": "Elu",
    "softplus": "Softplus",
    "abs": "Abs",
    "exp": "Exp",
}
_ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "scale": "Mul", "shift": "Add", "mask": "Mul"}
_AFFINE = ("weight", "bias")


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.vectors: set[str] = set()  # nodes whose output is (N, C)
        self.tokens: set[str] = set()  # (N, H * W, C); that of the others is (N, C, H, W)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))

    def slice(self, name: str, inputs: list[str], output: str, **where: tuple[int, ...]) -> None:
        """where: `starts`, `ends` and `axes`, in this order."""
        constants = [self.constant(f"{name}/{key}", np.array(values, np.int64)) for key, values in where.items()]
        self.add("Slice", name, inputs + constants, output)

    def reshape(self, name: str, source: str, output: str, shape: tuple[int, ...]) -> str:
        wanted = self.constant(f"{name}/shape", np.array(shape, np.int64))
        self.add("Reshape", name, [source, wanted], output)
        return output

    def transpose(self, name: str, source: str, order: tuple[int, ...]) -> str:
        self.add("Transpose", name, [source], name, perm=list(order))
        return name

    def as_image(self, source: str, reader: str) -> str:
        """The (N, C) tensor `source` as (N, C, 1, 1), for a reader that works on images."""
        axes = self.constant(f"{reader}/{source}/axes", np.array([2, 3], np.int64))
        self.add("Unsqueeze", f"{reader}/{source}/image", [source, axes], f"{reader}/{source}")
        return f"{reader}/{source}"

    def vector(self, name: str, array: np.ndarray, *, image: bool) -> str:
        """A constant per channel, (C,) or for images (C, 1, 1)."""
        return self.constant(name, array.reshape(-1, 1, 1) if image else array)

    def activation(self, op: OpSpec, name: str, source: str, output: str) -> None:
        if op.activation == "relu6":
            low = self.constant(f"{name}/min", np.array(0.0, np.float32))
            high = self.constant(f"{name}/max", np.array(6.0, np.float32))
            self.add("Clip", f"{name}/relu6", [source, low, high], output)
        elif op.activation == "silu":
            self.add("Sigmoid", f"{name}/sigmoid", [source], f"{name}/sigmoid")
            self.add("Mul", f"{name}/silu", [source, f"{name}/sigmoid"], output)
        elif op.activation == "gelu":  # x / 2 (1 + erf(x / sqrt 2)): opset 17 has no operator for it
            parts = [("root", np.sqrt(2.0)), ("one", 1.0), ("half", 0.5)]
            root, one, half = (self.constant(f"{name}/{key}", np.array(value, np.float32)) for key, value in parts)
            self.add("Div", f"{name}/div", [source, root], f"{name}/div")
            self.add("Erf", f"{name}/erf", [f"{name}/div"], f"{name}/erf")
            self.add("Add", f"{name}/plus", [f"{name}/erf", one], f"{name}/plus")
            self.add("Mul", f"{name}/times", [source, f"{name}/plus"], f"{name}/times")
            self.add("Mul", f"{name}/gelu", [f"{name}/times", half], output)
        elif op.activation == "gelu_tanh":  # x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
            parts = [("cubed", 0.044715), ("root", np.sqrt(2 / np.pi)), ("one", 1.0), ("half", 0.5), ("three", 3.0)]
            values = {key: self.constant(f"{name}/{key}", np.array(value, np.float32)) for key, value in parts}
            self.add("Pow", f"{name}/cube", [source, values["three"]], f"{name}/cube")
            self.add("Mul", f"{name}/part", [f"{name}/cube", values["cubed"]], f"{name}/part")
            self.add("Add", f"{name}/sum", [source, f"{name}/part"], f"{name}/sum")
            self.add("Mul", f"{name}/inside", [f"{name}/sum", values["root"]], f"{name}/inside")
            self.add("Tanh", f"{name}/tanh", [f"{name}/inside"], f"{name}/tanh")
            self.add("Add", f"{name}/plus", [f"{name}/tanh", values["one"]], f"{name}/plus")
            self.add("Mul", f"{name}/times", [source, f"{name}/plus"], f"{name}/times")
            self.add("Mul", f"{name}/gelu", [f"{name}/times", values["half"]], output)
        elif op.activation == "mish":
            self.add("Softplus", f"{name}/softplus", [source], f"{name}/softplus")
            self.add("Tanh", f"{name}/tanh", [f"{name}/softplus"], f"{name}/tanh")
            self.add("Mul", f"{name}/mish", [source, f"{name}/tanh"], output)
        elif op.activation == "hardsigmoid":
            self.add("HardSigmoid", f"{name}/hardsigmoid", [source], output, alpha=1.0 / 6.0, beta=0.5)
        else:
            self.add(_ACTIVATION_OPS[op.activation], f"{name}/{op.activation}", [source], output)


def build(graph: OpGraph, weights: Weights) -> bytes:
    """The serialized ONNX model of `graph`; its inputs, `input` (N, C, H, W) first, and outputs named after their
    nodes."""
    checked_weights(graph, weights)
    batch = graph.nodes[0].op.batch
    writer = _Writer()
    writer.vectors |= {name for name, shape in graph.inputs.items() if len(shape) == 1}
    writer.tokens |= {name for name, shape in graph.inputs.items() if len(shape) == 2}
    for node in graph.nodes:
        _emit(writer, node, weights, leaves=node.name in graph.outputs)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape]) for name, shape in graph.inputs.items()
    ]
    by_name = {node.name: node.op for node in graph.nodes}
    outputs = []
    for name in graph.outputs:
        op = by_name[name]
        spatial = [] if name in writer.vectors else [op.out_height, op.out_width]
        shape = [batch, op.out_channels, *spatial]
        if name in writer.tokens:
            shape = [batch, op.out_height * op.out_width, op.out_channels]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    model = helper.make_model(
        helper.make_graph(writer.nodes, "network", inputs, outputs, writer.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="amc-hw",
    )
    return model.SerializeToString()


def labelled(model: bytes, key: str, text: str) -> bytes:
    """The model with a text in its metadata."""
    found = onnx.load_model_from_string(model)
    found.metadata_props.add(key=key, value=text)
    return bytes(found.SerializeToString())


def _emit(writer: _Writer, node: OpNode, weights: Weights, *, leaves: bool) -> None:
    """Write one node. A pooled image stays (N, C, 1, 1) until a matrix product reads it or it `leaves` the network."""
    op, name, inputs = node.op, node.name, list(node.inputs)
    unknown = (op.kind == "max_pool" and op.dilation != (1, 1)) or (op.kind == "avg_pool" and op.ceil)
    if op.fused_add or op.dtype != "float32" or unknown:
        raise UnsupportedOperatorError(f"{name}: {op} ({op.dtype}, dilation {op.dilation}) cannot be written as ONNX")
    pooled_output = op.kind == "global_avg_pool" and leaves and not op.tokens
    elementwise = op.kind in ANY_RANK_KINDS
    from_tokens = op.tokens and op.kind in ("global_avg_pool", "take_token")
    if op.gives_tokens:
        writer.tokens.add(name)
    elif (
        op.kind in ("linear", "flatten")
        or pooled_output
        or from_tokens
        or (elementwise and writer.vectors.issuperset(inputs))
    ):
        writer.vectors.add(name)
    else:
        inputs = [writer.as_image(source, name) if source in writer.vectors else source for source in inputs]
    arrays, image = weights.get(name, {}), name not in writer.vectors | writer.tokens
    channel_axis = 2 if op.tokens else 1
    result = name if op.activation == "none" else f"{name}/linear"
    window = {"kernel_shape": list(op.kernel), "strides": list(op.stride), "pads": [*op.padding, *op.padding_after]}
    if op.kind in CONV_KINDS:
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias")]
        writer.add("Conv", name, inputs + parts, result, **window, dilations=list(op.dilation), group=op.groups)
    elif op.kind == "conv_transpose":
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias")]
        writer.add("ConvTranspose", name, inputs + parts, result, **window, dilations=list(op.dilation))
    elif op.kind == "channel_map":
        weight = writer.constant(f"{name}.weight", map_as_convolution(arrays["index"], op.in_channels[0]))
        writer.add("Conv", name, [*inputs, weight], result, **window)
    elif op.kind == "linear":
        if op.tokens:
            weight = writer.constant(f"{name}.weight", np.ascontiguousarray(arrays["weight"].T))
            bias = writer.constant(f"{name}.bias", arrays["bias"])
            writer.add("MatMul", name, [*inputs, weight], f"{name}/product")
            writer.add("Add", f"{name}/bias", [f"{name}/product", bias], result)
            return _activated(writer, op, name, result)
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias")]
        if inputs[0] not in writer.vectors:
            writer.add("Flatten", f"{name}/flatten", inputs, f"{name}/vector")
            inputs = [f"{name}/vector"]
        writer.add("Gemm", name, inputs + parts, result, transB=1)
    elif op.kind in _ARITHMETIC:
        writer.add(_ARITHMETIC[op.kind], name, inputs, result)
    elif op.kind in SCALAR_KINDS:
        value = writer.constant(f"{name}/value", arrays["value"].astype(np.float32))
        writer.add("Add" if op.kind == "add_scalar" else "Mul", name, [*inputs, value], result)
    elif op.kind == "affine":
        weight, bias = (writer.vector(f"{name}.{p}", arrays[p], image=image) for p in _AFFINE)
        writer.add("Mul", f"{name}/scaled", [*inputs, weight], f"{name}/scaled")
        writer.add("Add", name, [f"{name}/scaled", bias], result)
    elif op.kind == "prelu":
        slope = writer.vector(f"{name}.weight", arrays["weight"], image=image)
        writer.add("PRelu", name, [*inputs, slope], result)
    elif op.kind in ("softmax", "log_softmax"):
        writer.add("Softmax" if op.kind == "softmax" else "LogSoftmax", name, inputs, result, axis=channel_axis)
    elif op.kind == "layer_norm":
        _layer_norm(writer, name, inputs[0], result, arrays, image=image)
    elif op.kind == "group_norm":
        _group_norm(writer, op, name, inputs[0], result, arrays)
    elif op.kind == "instance_norm":
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in _AFFINE]
        writer.add("InstanceNormalization", name, [*inputs, *parts], result, epsilon=float(arrays["eps"]))
    elif op.kind == "slice" and op.groups > 1:
        _runs(writer, op, name, inputs[0], result, int(arrays["start"]))
    elif op.kind in ("slice", "chunk"):
        first = first_channel(op, arrays)
        writer.slice(name, inputs, result, starts=(first,), ends=(first + op.out_channels,), axes=(channel_axis,))
    elif op.kind == "shuffle":
        each = op.out_channels // op.groups
        apart = [op.batch, op.groups, each, op.height, op.width]
        shapes = [("apart", apart), ("together", [op.batch, op.out_channels, op.height, op.width])]
        split, joined = (writer.constant(f"{name}/{key}/shape", np.array(shape, np.int64)) for key, shape in shapes)
        writer.add("Reshape", f"{name}/apart", [*inputs, split], f"{name}/apart")
        writer.add("Transpose", name, [f"{name}/apart"], f"{name}/swapped", perm=[0, 2, 1, 3, 4])
        writer.add("Reshape", f"{name}/together", [f"{name}/swapped", joined], result)
    elif op.kind == "clip":
        bounds = [arrays[key].astype(np.float32) for key in ("low", "high")]
        names = [
            writer.constant(f"{name}/{key}", b) if np.isfinite(b) else "" for key, b in zip("lh", bounds, strict=True)
        ]
        writer.add("Clip", name, inputs + names, result)
    elif op.kind == "crop" and op.tokens:
        stop = op.height - op.padding_after[0]
        writer.slice(name, inputs, result, starts=op.padding[:1], ends=(stop,), axes=(1,))
    elif op.kind == "crop":
        stops = (op.height - op.padding_after[0], op.width - op.padding_after[1])
        writer.slice(name, inputs, result, starts=op.padding, ends=stops, axes=(2, 3))
    elif op.kind == "pad":
        pads = np.array([0, 0, *op.padding, 0, 0, *op.padding_after], np.int64)
        writer.add("Pad", name, [*inputs, writer.constant(f"{name}/pads", pads)], result)
    elif op.kind == "pixel_shuffle":
        writer.add("DepthToSpace", name, inputs, result, blocksize=op.stride[0], mode="CRD")
    elif op.kind in ("upsample_nearest", "upsample_bilinear"):
        scales = np.array([1, 1, *op.stride], np.float32)
        sizes = np.array([op.batch, op.out_channels, *op.out_size], np.int64)
        to = (
            ["", writer.constant(f"{name}/sizes", sizes)]
            if op.out_size
            else [writer.constant(f"{name}/scales", scales)]
        )
        nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        aligned = "align_corners" if op.align_corners else "half_pixel"
        bilinear = {"mode": "linear", "coordinate_transformation_mode": aligned}
        mode = nearest if op.kind == "upsample_nearest" else bilinear
        writer.add("Resize", name, [*inputs, "", *to], result, **mode)
    elif op.kind in ("concat", "join"):
        writer.add("Concat", name, inputs, result, axis=channel_axis if op.kind == "concat" else 1)
    elif op.kind == "regroup":
        writer.reshape(name, inputs[0], result, (op.batch, op.out_height, op.out_channels))
    elif op.kind == "add_map":
        writer.add("Add", name, [*inputs, writer.constant(f"{name}/value", arrays["value"])], result)
    elif op.kind == "prepend":
        own = writer.constant(f"{name}/value", np.repeat(arrays["value"][None], op.batch, axis=0))
        writer.add("Concat", name, [own, *inputs], result, axis=1)
    elif op.kind == "take_token":
        place = writer.constant(f"{name}/start", arrays["start"].astype(np.int64))
        writer.add("Gather", name, [*inputs, place], result, axis=1)
    elif op.kind == "to_tokens":
        rows = (op.batch, op.out_channels, op.height * op.width)
        flat = writer.reshape(f"{name}/flat", inputs[0], f"{name}/flat", rows)
        writer.add("Transpose", name, [flat], result, perm=[0, 2, 1])
    elif op.kind == "to_image":
        turned = writer.transpose(f"{name}/turned", inputs[0], (0, 2, 1))
        writer.reshape(name, turned, result, (op.batch, op.out_channels, op.height, op.width))
    elif op.kind == "attention":
        _attention(writer, op, name, inputs, result, arrays)
    elif op.kind == "channel_mean":
        writer.add("ReduceMean", name, inputs, result, axes=[1], keepdims=1)
    elif op.kind == "channel_max":
        writer.add("ReduceMax", name, inputs, result, axes=[1], keepdims=1)
    elif op.kind == "l2_norm":
        writer.add("LpNormalization", name, inputs, result, axis=channel_axis, p=2)
    elif op.kind in ("unflatten", "rows_to_channels"):
        writer.reshape(name, inputs[0], result, (op.batch, op.out_channels, op.out_height, op.out_width))
    elif op.kind == "adaptive_avg_pool":
        across = writer.constant(f"{name}/across", np.ascontiguousarray(averages(op.width, op.out_width).T))
        down = writer.constant(f"{name}/down", averages(op.height, op.out_height))
        writer.add("MatMul", f"{name}/rows", [*inputs, across], f"{name}/rows")
        writer.add("MatMul", name, [down, f"{name}/rows"], result)
    elif op.kind == "max_pool":
        writer.add("MaxPool", name, inputs, result, **window, ceil_mode=int(op.ceil))
    elif op.kind == "avg_pool":
        writer.add("AveragePool", name, inputs, result, **window, count_include_pad=int(not op.exclude_pad))
    elif op.kind == "global_avg_pool" and op.tokens:
        writer.add("ReduceMean", name, inputs, result, axes=[1], keepdims=0)
    elif op.kind == "global_avg_pool":
        pooled = f"{name}/pooled" if pooled_output else result
        writer.add("GlobalAveragePool", name, inputs, pooled)
        if pooled_output:
            writer.add("Flatten", f"{name}/flatten", [pooled], result)
    elif op.kind == "flatten":
        writer.add("Flatten", name, inputs, result)
    elif op.kind == "activation":
        writer.activation(op, name, inputs[0], name)
        return
    else:
        raise AssertionError(op.kind)
    _activated(writer, op, name, result)


def _activated(writer: _Writer, op: OpSpec, name: str, result: str) -> None:
    if op.activation != "none":
        writer.activation(op, name, result, name)


def _runs(writer: _Writer, op: OpSpec, name: str, source: str, result: str, start: int) -> None:
    """The same run of channels of every group."""
    each, out = op.in_channels[0] // op.groups, op.out_channels // op.groups
    positions: tuple[int, ...] = (op.height * op.width,) if op.tokens else (op.height, op.width)
    apart = (op.batch, *positions, op.groups, each) if op.tokens else (op.batch, op.groups, each, *positions)
    joined = (op.batch, *positions, op.out_channels) if op.tokens else (op.batch, op.out_channels, *positions)
    split = writer.reshape(f"{name}/apart", source, f"{name}/apart", apart)
    writer.slice(name, [split], f"{name}/runs", starts=(start,), ends=(start + out,), axes=(3 if op.tokens else 2,))
    writer.reshape(f"{name}/together", f"{name}/runs", result, joined)


def _attention(writer: _Writer, op: OpSpec, name: str, inputs: list[str], result: str, arrays: Any) -> None:
    """Every input as (batch * windows, heads, positions, channels), keys turned."""
    windows, first = windows_of(op, channels_first=not op.tokens), not op.tokens
    count = windows.count if windows else 1
    read = []
    for part, source, (positions, heads, width) in zip("qkv", inputs, parts_of(op), strict=True):
        if windows is not None:
            divided = (heads * width, *windows.divided) if first else (*windows.divided, heads * width)
            split = writer.reshape(f"{name}/{part}/apart", source, f"{name}/{part}/apart", (op.batch, *divided))
            source = writer.transpose(f"{name}/{part}/windows", split, windows.order)
        shape: tuple[int, ...] = (op.batch * count, positions, heads, width)
        shape = (shape[0], heads, width, positions) if first else shape
        split = writer.reshape(f"{name}/{part}/heads", source, f"{name}/{part}/heads", shape)
        turned = part == "k"
        if first:  # (batch, heads, channels, positions), as keys are wanted
            read.append(split if turned else writer.transpose(f"{name}/{part}", split, (0, 1, 3, 2)))
        else:
            read.append(writer.transpose(f"{name}/{part}", split, (0, 2, 3, 1) if turned else (0, 2, 1, 3)))
    query, key, value = read
    scores = f"{name}/scores"
    writer.add("MatMul", scores, [query, key], scores)
    for part, code in (("scale", "Mul"), ("bias", "Add")):
        if part in arrays and not (part == "scale" and arrays[part] == 1):
            constant = writer.constant(f"{name}.{part}", arrays[part].astype(np.float32))
            writer.add(code, f"{name}/{part}", [scores, constant], f"{name}/{part}ed")
            scores = f"{name}/{part}ed"
    writer.add("Softmax", f"{name}/softmax", [scores], f"{name}/weights", axis=-1)
    writer.add("MatMul", name, [f"{name}/weights", value], f"{name}/product")
    made = writer.transpose(f"{name}/turned", f"{name}/product", (0, 1, 3, 2) if first else (0, 2, 1, 3))
    sizes = (op.height, op.width) if first else (op.height * op.width,)
    if windows is not None:
        parts = windows.gathered
        inside = len(windows.divided) - 2
        gathered = (*parts[:inside], op.out_channels, *parts[inside:]) if first else (*parts, op.out_channels)
        split = writer.reshape(f"{name}/out/windows", made, f"{name}/out/windows", (op.batch, *gathered))
        made = writer.transpose(f"{name}/out/apart", split, windows.back)
    shape = (op.batch, op.out_channels, *sizes) if first else (op.batch, *sizes, op.out_channels)
    writer.reshape(f"{name}/out", made, result, shape)


def _layer_norm(writer: _Writer, name: str, source: str, result: str, arrays: Any, *, image: bool) -> None:
    """LayerNormalization works on the last axis: an image is turned channels-last and back."""
    if image:
        writer.add("Transpose", f"{name}/channels_last", [source], f"{name}/channels_last", perm=[0, 2, 3, 1])
        source = f"{name}/channels_last"
    parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in _AFFINE]
    normed = f"{name}/normed" if image else result
    writer.add("LayerNormalization", name, [source, *parts], normed, axis=-1, epsilon=float(arrays["eps"]))
    if image:
        writer.add("Transpose", f"{name}/channels_first", [normed], result, perm=[0, 3, 1, 2])


def _group_norm(writer: _Writer, op: OpSpec, name: str, source: str, result: str, arrays: Any) -> None:
    """Every group as one channel of an InstanceNormalization, then the weights: opset 17 has no operator for it."""
    shapes = [("apart", [op.batch, op.groups, -1]), ("together", [op.batch, op.out_channels, op.height, op.width])]
    split, joined = (writer.constant(f"{name}/{key}/shape", np.array(shape, np.int64)) for key, shape in shapes)
    plain = [("ones", np.ones), ("zeros", np.zeros)]
    ones, zeros = (writer.constant(f"{name}/{key}", made(op.groups, np.float32)) for key, made in plain)
    weight, bias = (writer.vector(f"{name}.{part}", arrays[part], image=True) for part in _AFFINE)
    writer.add("Reshape", f"{name}/apart", [source, split], f"{name}/apart")
    normed = [f"{name}/apart", ones, zeros]
    writer.add("InstanceNormalization", name, normed, f"{name}/normed", epsilon=float(arrays["eps"]))
    writer.add("Reshape", f"{name}/together", [f"{name}/normed", joined], f"{name}/together")
    writer.add("Mul", f"{name}/scaled", [f"{name}/together", weight], f"{name}/scaled")
    writer.add("Add", f"{name}/shifted", [f"{name}/scaled", bias], result)
