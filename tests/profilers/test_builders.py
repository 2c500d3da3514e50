"""Both builders compute what PyTorch computes, node by node, and say what they cannot build."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import weakref
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from profilers.builders import onnx as onnx_builder
from profilers.builders import tflite as tflite_builder
from profilers.builders import torch as torch_builder
from profilers.builders.tflite_writer import CONSTANT_ALIGNMENT
from profilers.builders.weights import Weights, random_weights
from profilers.errors import DeviceError, UnsupportedOperatorError
from profilers.ops import ACTIVATIONS, ANY_RANK_KINDS, CONV_KINDS, KINDS, OpGraph, OpNode, OpSpec
from profilers.profile import _input_shapes, _sides

needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")
FILES = [pytest.param(onnx_builder, id="onnx"), pytest.param(tflite_builder, id="tflite", marks=needs_litert)]
every_builder = pytest.mark.parametrize("builder", [*FILES, pytest.param(torch_builder, id="torch")])

REFERENCE_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": lambda x: torch.log1p(torch.exp(x)),
    "abs": torch.abs,
    "exp": torch.exp,
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}


# The reference: an OpGraph run by torch.nn.functional


def reference(graph: OpGraph, weights: Weights, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output of `graph` for inputs by name, (N, C, H, W) or (N, C)."""
    values = {name: torch.from_numpy(value) for name, value in inputs.items()}
    for node in graph.nodes:
        arrays = {name: torch.from_numpy(array) for name, array in weights.get(node.name, {}).items()}
        result = reference_op(node.op, [values[name] for name in node.inputs], arrays)
        values[node.name] = REFERENCE_ACTIVATIONS[node.op.activation](result)
    return {name: values[name].numpy() for name in graph.outputs}


def reference_op(op: OpSpec, inputs: list[torch.Tensor], arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    x = inputs[0]
    if op.kind in CONV_KINDS:
        spatial = x if x.ndim == 4 else x[:, :, None, None]
        (top, left), (bottom, right) = op.padding, op.padding_after
        spatial = F.pad(spatial, (left, right, top, bottom))
        result = F.conv2d(spatial, arrays["weight"], arrays["bias"], op.stride, 0, op.dilation, op.groups)
        return result + inputs[1] if op.fused_add else result
    if op.kind == "attention":
        return reference_attention(op, inputs, arrays)
    if op.kind == "to_tokens":
        return x.flatten(2).movedim(1, 2)
    if op.kind == "to_image":
        return x.movedim(2, 1).reshape(len(x), op.out_channels, op.height, op.width)
    if op.kind == "take_token":
        return x[:, int(arrays["start"])]
    if op.kind == "prepend":
        return torch.cat([arrays["value"].expand(len(x), -1, -1), x], 1)
    if op.kind == "add_map":
        return x + arrays["value"]
    if op.tokens and op.kind == "crop":
        return x[:, op.padding[0] : op.height - op.padding_after[0]]
    if op.kind == "join":
        return torch.cat(inputs, 1)
    if op.kind == "regroup":
        return torch.stack(x.chunk(op.in_channels[0] // op.out_channels, 2), 2).flatten(1, 2)
    if op.tokens and op.kind == "linear":
        return F.linear(x, arrays["weight"], arrays["bias"])
    if op.tokens:  # as an image of one column
        single = replace(op, tokens=False)
        found = reference_op(single, [value.movedim(2, 1)[..., None] for value in inputs], arrays)
        return found[..., 0].movedim(1, 2) if op.gives_tokens else found
    if op.kind == "linear":
        return F.linear(x.flatten(1), arrays["weight"], arrays["bias"])
    if op.kind == "channel_map":
        index = arrays["index"]
        kept = x[:, index.clamp(min=0), :: op.stride[0], :: op.stride[1]]
        return kept * (index >= 0)[None, :, None, None]
    if op.kind == "conv_transpose":
        whole = F.conv_transpose2d(x, arrays["weight"], arrays["bias"], op.stride, dilation=op.dilation)
        (top, left), (bottom, right) = op.padding, op.padding_after
        return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
    if op.kind == "prelu":
        return F.prelu(x, arrays["weight"])
    if op.kind == "softmax":
        return F.softmax(x, 1)
    if op.kind == "log_softmax":
        return F.log_softmax(x, 1)
    if op.kind in ("group_norm", "instance_norm"):
        groups = op.groups if op.kind == "group_norm" else op.out_channels
        return F.group_norm(x, groups, arrays["weight"], arrays["bias"], float(arrays["eps"]))
    if op.kind in ("add_scalar", "mul_scalar"):
        return x + arrays["value"] if op.kind == "add_scalar" else x * arrays["value"]
    if op.kind in ("slice", "chunk"):
        start = int(arrays["start"]) if op.kind == "slice" else int(arrays["part"]) * op.out_channels
        runs = x.chunk(op.groups, 1) if op.kind == "slice" else [x]
        return torch.cat([run[:, start : start + op.out_channels // len(runs)] for run in runs], 1)
    if op.kind == "shuffle":
        return F.channel_shuffle(x, op.groups)
    if op.kind in ("affine", "layer_norm"):
        last = x.movedim(1, -1)
        if op.kind == "affine":
            return (last * arrays["weight"] + arrays["bias"]).movedim(-1, 1)
        eps = float(arrays["eps"])
        return F.layer_norm(last, (op.out_channels,), arrays["weight"], arrays["bias"], eps).movedim(-1, 1)
    if op.kind in ("upsample_nearest", "upsample_bilinear"):
        options = {"align_corners": op.align_corners} if op.kind == "upsample_bilinear" else {}
        to = {"size": op.out_size} if op.out_size else {"scale_factor": op.stride}
        return F.interpolate(x, **to, mode=op.kind.removeprefix("upsample_"), **options)
    if op.kind == "clip":
        return x.clamp(float(arrays["low"]), float(arrays["high"]))
    if op.kind == "crop":
        (top, left), (bottom, right) = op.padding, op.padding_after
        return F.pad(x, (-left, -right, -top, -bottom))
    if op.kind == "pad":
        (top, left), (bottom, right) = op.padding, op.padding_after
        return F.pad(x, (left, right, top, bottom))
    if op.kind == "pixel_shuffle":
        return F.pixel_shuffle(x, op.stride[0])
    if op.kind == "sub":
        return inputs[0] - inputs[1]
    if op.kind in ("add", "mul", "scale", "shift", "mask"):
        if {value.ndim for value in inputs} == {2, 4}:
            inputs = [value if value.ndim == 4 else value[:, :, None, None] for value in inputs]
        return inputs[0] + inputs[1] if op.kind in ("add", "shift") else inputs[0] * inputs[1]
    if op.kind in ("channel_mean", "channel_max"):
        return x.mean(1, keepdim=True) if op.kind == "channel_mean" else x.amax(1, keepdim=True)
    if op.kind == "l2_norm":
        return x / x.square().sum(1, keepdim=True).sqrt()
    if op.kind == "unflatten":
        return x.reshape(len(x), op.out_channels, *op.out_size)
    if op.kind == "rows_to_channels":
        return torch.stack([x[:, c, h] for c in range(x.shape[1]) for h in range(x.shape[2])], 1)[:, :, None]
    if op.kind == "adaptive_avg_pool":
        return F.adaptive_avg_pool2d(x, op.out_size)
    if op.kind == "concat":
        return torch.cat(inputs, dim=1)
    if op.kind == "max_pool":
        return F.max_pool2d(x, op.kernel, op.stride, op.padding, ceil_mode=op.ceil)
    if op.kind == "avg_pool":
        return F.avg_pool2d(x, op.kernel, op.stride, op.padding, count_include_pad=not op.exclude_pad)
    if op.kind == "global_avg_pool":
        return x.mean((2, 3))
    return x.flatten(1) if op.kind == "flatten" else x


def reference_attention(op: OpSpec, inputs: list[torch.Tensor], arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """Query by query: its softmax over the keys of its window weights the values."""
    sides = [(op.height, op.width), *[op.keys or (op.height, op.width)] * 2]
    images = [x.movedim(2, 1).unflatten(2, size) if op.tokens else x for x, size in zip(inputs, sides, strict=True)]
    heads = op.groups
    each = [op.in_channels[0] // heads] * 2 + [op.out_channels // heads]
    query, key, value = (
        x.unflatten(1, (-1, width)).expand(-1, heads, -1, -1, -1) for x, width in zip(images, each, strict=True)
    )
    out = torch.zeros(len(query), heads, each[2], op.height, op.width)
    for row, column in itertools.product(range(op.height), range(op.width)):
        rows, columns = (
            _window(at, size, window, apart)
            for at, size, window, apart in zip((row, column), sides[1], op.keys or op.kernel, op.dilation, strict=True)
        )
        seen = [x[..., rows, :][..., columns].flatten(3) for x in (key, value)]
        scores = float(arrays["scale"]) * torch.einsum("nhd,nhdk->nhk", query[..., row, column], seen[0])
        if op.biased:
            inside = (row // op.dilation[0] % op.kernel[0]) * op.kernel[1] + column // op.dilation[1] % op.kernel[1]
            scores = scores + arrays["bias"][:, inside]
        out[..., row, column] = torch.einsum("nhk,nhdk->nhd", scores.softmax(-1), seen[1])
    image = out.flatten(1, 2)
    return image.flatten(2).movedim(1, 2) if op.tokens else image


def _window(at: int, size: int, window: int, apart: int) -> list[int]:
    """The places along an axis that the one at `at` attends to."""
    if window == size:
        return list(range(size))
    first = at // (window * apart) * window * apart + at % apart
    return list(range(first, first + window * apart, apart))


# Running what was built


def run_onnx(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def interpreter_of(model: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def run_tflite(model: bytes, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    interpreter = interpreter_of(model)
    sources = interpreter.get_input_details()
    assert [source["name"] for source in sources] == list(inputs)
    for source in sources:
        value = inputs[source["name"]]
        channels_last = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
        interpreter.set_tensor(source["index"], np.ascontiguousarray(channels_last).reshape(source["shape"]))
    interpreter.invoke()
    results = {}
    for output in interpreter.get_output_details():
        value = interpreter.get_tensor(output["index"])
        assert tuple(value.shape) == tuple(output["shape"])
        results[output["name"]] = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
    return results


def run_torch(model: torch_builder.Network, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        outputs = model(*map(torch.from_numpy, inputs.values()))
    return {name: value.numpy() for name, value in zip(model.graph.outputs, outputs, strict=True)}


RUN: dict[ModuleType, Any] = {onnx_builder: run_onnx, tflite_builder: run_tflite, torch_builder: run_torch}


def check(builder: ModuleType, graph: OpGraph, weights: Weights | None = None) -> None:
    """Asserts that the built model agrees with the reference on random input with both signs."""
    weights = random_weights(graph) if weights is None else weights
    rng = np.random.default_rng(1)
    batch = graph.nodes[0].op.batch
    inputs = {
        name: (2.0 * rng.standard_normal((batch, *shape))).astype(np.float32) for name, shape in graph.inputs.items()
    }
    expected = reference(graph, weights, inputs)
    found = RUN[builder](builder.build(graph, weights), inputs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def chain(*ops: OpSpec, input_shape: tuple[int, int, int]) -> OpGraph:
    """Operators one after another; those of several inputs read the previous one several times."""
    nodes, source = [], OpGraph.INPUT
    for index, op in enumerate(ops):
        nodes.append(OpNode(f"{op.kind}{index}", op, (source,) * len(op.in_channels)))
        source = nodes[-1].name
    return OpGraph(tuple(nodes), input_shape, (source,))


def alone(op: OpSpec) -> OpGraph:
    """An operator on inputs of its own; tokens are made of an image, but for those of a second input."""
    image = (op.in_channels[0], *_sides(op)[0])
    if op.tokens or op.kind == "attention":
        first = OpNode("laid", OpSpec("to_tokens", image[:1], *image[1:], image[0], batch=op.batch), (OpGraph.INPUT,))
        before = [first] if op.tokens else []
        more = tuple(zip("kv", _input_shapes(op)[1:], strict=False))
        read = ("laid" if op.tokens else OpGraph.INPUT, *(name for name, _ in more))
        return OpGraph((*before, OpNode(f"{op.kind}0", op, read)), image, (f"{op.kind}0",), more)
    if op.kind in ("scale", "shift", "mask"):
        name, image = f"{op.kind}0", (op.in_channels[0], op.height, op.width)
        return OpGraph((OpNode(name, op, (OpGraph.INPUT, "gate")),), image, (name,), (("gate", _input_shapes(op)[1]),))
    return chain(op, input_shape=(op.in_channels[0], op.height, op.width))


def window_op(kind: str, channels: int, size: tuple[int, int], kernel: int, **fields: Any) -> OpSpec:
    """A square window on `size`, "same"-padded unless told; 11 channels out of a convolution."""
    out = 11 if kind == "conv" else channels
    fields = {"padding": (kernel // 2, kernel // 2), "groups": channels if kind == "depthwise_conv" else 1, **fields}
    return OpSpec(kind, (channels,), *size, out, kernel=(kernel, kernel), **fields)


def pointwise(c_in: int, c_out: int, size: int, activation: str = "none") -> OpSpec:
    return OpSpec("conv", (c_in,), size, size, c_out, activation=activation)


def linear(c_in: int, c_out: int, activation: str = "none") -> OpSpec:
    return OpSpec("linear", (c_in,), 1, 1, c_out, activation=activation)


# One operator at a time


@every_builder
@pytest.mark.parametrize("kind", ["conv", "depthwise_conv"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(12, 12), (13, 13), (9, 14)])
def test_convolutions_agree(builder: ModuleType, kind: str, kernel: int, stride: int, size: tuple[int, int]) -> None:
    check(builder, alone(window_op(kind, 5, size, kernel, stride=(stride, stride))))


@every_builder
@pytest.mark.parametrize("kind", ["conv", "depthwise_conv", "max_pool", "avg_pool"])
@pytest.mark.parametrize("size", [(15, 16), (16, 15)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(2, 2, 0), (2, 1, 1), (3, 1, 0), (3, 2, 0), (3, 2, 1), (3, 3, 1), (7, 2, 3), (7, 3, 2)],
)
def test_windows_agree_at_every_padding(
    builder: ModuleType, kind: str, size: tuple[int, int], kernel: int, stride: int, padding: int
) -> None:
    check(builder, alone(window_op(kind, 3, size, kernel, stride=(stride, stride), padding=(padding, padding))))


@every_builder
@pytest.mark.parametrize("kind", ["conv", "depthwise_conv"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 2), (3, 1)])
def test_dilated_convolutions_agree(
    builder: ModuleType, kind: str, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    check(builder, alone(window_op(kind, 4, (11, 12), 3, stride=stride, padding=padding, dilation=(2, 2))))


@every_builder
@pytest.mark.parametrize("kind", ["conv", "depthwise_conv"])
@pytest.mark.parametrize(("before", "after"), [((0, 0), (1, 1)), ((1, 0), (2, 1)), ((2, 1), (0, 1))])
@pytest.mark.parametrize("stride", [1, 2])
def test_zeros_may_differ_on_both_sides(
    builder: ModuleType, kind: str, before: tuple[int, int], after: tuple[int, int], stride: int
) -> None:
    check(builder, alone(window_op(kind, 3, (8, 9), 3, stride=(stride, stride), padding=before, padding_end=after)))


@every_builder
def test_kernels_that_are_not_square_agree(builder: ModuleType) -> None:
    across = OpSpec("conv", (3,), 9, 10, 6, kernel=(1, 7), padding=(0, 3))
    down = OpSpec("conv", (6,), 9, 10, 4, kernel=(7, 1), stride=(2, 1), padding=(3, 0), activation="relu")
    check(builder, chain(across, down, input_shape=(3, 9, 10)))


@every_builder
def test_grouped_convolutions_agree(builder: ModuleType) -> None:
    check(builder, alone(OpSpec("conv", (12,), 8, 8, 18, kernel=(3, 3), padding=(1, 1), groups=3, activation="relu")))


SMALL_OPS = {
    "conv": window_op("conv", 5, (6, 7), 3),
    "depthwise_conv": window_op("depthwise_conv", 5, (6, 7), 3),
    "grouped_conv": window_op("grouped_conv", 6, (6, 7), 3, groups=3),
    "add": OpSpec("add", (5, 5), 6, 7, 5),
    "sub": OpSpec("sub", (5, 5), 6, 7, 5),
    "mul": OpSpec("mul", (5, 5), 6, 7, 5),
    "scale": OpSpec("scale", (5, 5), 6, 7, 5),
    "shift": OpSpec("shift", (5, 5), 6, 7, 5),
    "mask": OpSpec("mask", (5, 1), 6, 7, 5),
    "add_scalar": OpSpec("add_scalar", (5,), 6, 7, 5),
    "mul_scalar": OpSpec("mul_scalar", (5,), 6, 7, 5),
    "affine": OpSpec("affine", (5,), 6, 7, 5),
    "prelu": OpSpec("prelu", (5,), 6, 7, 5),
    "softmax": OpSpec("softmax", (5,), 6, 7, 5),
    "log_softmax": OpSpec("log_softmax", (5,), 6, 7, 5),
    "layer_norm": OpSpec("layer_norm", (5,), 6, 7, 5),
    "group_norm": OpSpec("group_norm", (6,), 6, 7, 6, groups=2),
    "instance_norm": OpSpec("instance_norm", (5,), 6, 7, 5),
    "conv_transpose": OpSpec("conv_transpose", (5,), 6, 7, 11, kernel=(3, 3), stride=(2, 2)),
    "slice": OpSpec("slice", (5,), 6, 7, 3),
    "chunk": OpSpec("chunk", (6,), 6, 7, 2, groups=3),
    "clip": OpSpec("clip", (5,), 6, 7, 5),
    "crop": OpSpec("crop", (5,), 6, 7, 5, padding=(0, 1), padding_end=(2, 1)),
    "pad": OpSpec("pad", (5,), 6, 7, 5, padding=(0, 1), padding_end=(2, 1)),
    "shuffle": OpSpec("shuffle", (6,), 6, 7, 6, groups=2),
    "pixel_shuffle": OpSpec("pixel_shuffle", (12,), 6, 7, 3, stride=(2, 2)),
    "upsample_nearest": OpSpec("upsample_nearest", (5,), 6, 7, 5, stride=(2, 3)),
    "upsample_bilinear": OpSpec("upsample_bilinear", (5,), 6, 7, 5, stride=(2, 2)),
    "concat": OpSpec("concat", (5, 5, 5), 6, 7, 15),
    "channel_map": OpSpec("channel_map", (5,), 6, 7, 9, stride=(2, 2)),
    "max_pool": OpSpec("max_pool", (5,), 6, 7, 5, kernel=(2, 2), stride=(2, 2)),
    "avg_pool": OpSpec("avg_pool", (5,), 6, 7, 5, kernel=(3, 3), padding=(1, 1)),
    "global_avg_pool": OpSpec("global_avg_pool", (5,), 6, 7, 5),
    "adaptive_avg_pool": OpSpec("adaptive_avg_pool", (5,), 6, 7, 5, out_size=(4, 9)),
    "l2_norm": OpSpec("l2_norm", (5,), 6, 7, 5),
    "unflatten": OpSpec("unflatten", (24,), 1, 1, 4, out_size=(2, 3)),
    "rows_to_channels": OpSpec("rows_to_channels", (5,), 6, 7, 30),
    "join": OpSpec("join", (5, 5, 5), 10, 1, 5, tokens=True),
    "regroup": OpSpec("regroup", (12,), 6, 7, 4, tokens=True),
    "channel_mean": OpSpec("channel_mean", (5,), 6, 7, 1),
    "channel_max": OpSpec("channel_max", (5,), 6, 7, 1),
    "flatten": OpSpec("flatten", (5,), 6, 7, 210),
    "activation": OpSpec("activation", (5,), 6, 7, 5, activation="relu"),
    "linear": linear(210, 9),
    "to_tokens": OpSpec("to_tokens", (5,), 6, 7, 5),
    "to_image": OpSpec("to_image", (5,), 6, 7, 5, tokens=True),
    "add_map": OpSpec("add_map", (5,), 6, 7, 5),
    "prepend": OpSpec("prepend", (5,), 6, 7, 5, padding=(2, 0), tokens=True),
    "take_token": OpSpec("take_token", (5,), 6, 7, 5, tokens=True),
    "attention": OpSpec("attention", (6, 6, 10), 6, 7, 10, groups=2, kernel=(6, 7)),
}


@every_builder
@pytest.mark.parametrize(
    ("kind", "activation"), [(k, a) for k in KINDS for a in ACTIVATIONS if (k, a) != ("activation", "none")]
)
def test_every_kind_with_every_activation_agrees(builder: ModuleType, kind: str, activation: str) -> None:
    op = replace(SMALL_OPS[kind], activation=activation)
    if kind == "linear":
        check(builder, chain(SMALL_OPS["flatten"], op, input_shape=(5, 6, 7)))
    else:
        check(builder, alone(op))


IN_TOKENS = [
    *(
        replace(SMALL_OPS[kind], tokens=True)
        for kind in (*ANY_RANK_KINDS, "add_map", "global_avg_pool")
        if kind not in ("scale", "shift")
    ),
    OpSpec("linear", (5,), 6, 7, 9, tokens=True, activation="gelu"),
    OpSpec("crop", (5,), 42, 1, 5, tokens=True, padding=(1, 0), padding_end=(0, 0)),
    OpSpec("slice", (12,), 6, 7, 6, groups=3, tokens=True),
]


@every_builder
@pytest.mark.parametrize("op", IN_TOKENS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_computed_like_images(builder: ModuleType, op: OpSpec, batch: int) -> None:
    check(builder, alone(replace(op, batch=batch)))


@pytest.mark.parametrize("op", [*SMALL_OPS.values(), *IN_TOKENS], ids=str)
def test_every_operator_is_of_its_own_family(op: OpSpec) -> None:
    """As a table has it: by what all have in common, and by widths."""
    assert op.family().with_axes(op.axes) == op and op.family().family() == op.family()
    assert OpSpec.from_json(op.to_json()) == op


@every_builder
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        {"groups": 1},
        {"groups": 2, "biased": True},
        {"groups": 2, "kernel": (4, 3)},
        {"groups": 2, "kernel": (2, 6), "biased": True},
        {"groups": 2, "kernel": (4, 3), "dilation": (2, 2), "biased": True},
        {"groups": 2, "kernel": (2, 1), "dilation": (4, 1)},
        {"groups": 2, "keys": (4, 2), "biased": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [(8, 8, 4), (8, 8, 12)])
def test_attention_agrees(
    builder: ModuleType, channels: tuple[int, ...], sizes: dict[str, Any], batch: int, tokens: bool
) -> None:
    op = OpSpec("attention", channels, 8, 6, channels[2], **{"kernel": (8, 6)} | sizes, tokens=tokens, batch=batch)
    check(builder, alone(op))


@every_builder
@pytest.mark.parametrize("tokens", [False, True])
def test_all_heads_may_share_keys_and_values(builder: ModuleType, tokens: bool) -> None:
    op = OpSpec("attention", (12, 4, 5), 4, 4, 15, groups=3, kernel=(4, 4), keys=(2, 2), tokens=tokens)
    check(builder, alone(op))


@every_builder
def test_the_same_run_of_every_group_is_taken(builder: ModuleType) -> None:
    op = OpSpec("slice", (12,), 6, 7, 6, groups=3)
    check(builder, alone(op), {"slice0": {"start": np.array(2)}})


@every_builder
@pytest.mark.parametrize("start", [0, 2])
def test_slices_begin_where_they_say(builder: ModuleType, start: int) -> None:
    check(builder, alone(SMALL_OPS["slice"]), {"slice0": {"start": np.array(start)}})
    check(builder, alone(SMALL_OPS["chunk"]), {"chunk0": {"part": np.array(start)}})


@every_builder
def test_one_slope_does_for_all_channels(builder: ModuleType) -> None:
    check(builder, alone(SMALL_OPS["prelu"]), {"prelu0": {"weight": np.array([0.1], np.float32)}})


@every_builder
@pytest.mark.parametrize(
    "kind", ["affine", "layer_norm", "prelu", "softmax", "log_softmax", "add_scalar", "mul_scalar", "clip"]
)
def test_vectors_are_scaled_and_normalised_like_images(builder: ModuleType, kind: str) -> None:
    ops = (OpSpec("global_avg_pool", (5,), 6, 7, 5), OpSpec(kind, (5,), 1, 1, 5), linear(5, 3))
    check(builder, chain(*ops, input_shape=(5, 6, 7)))


@every_builder
@pytest.mark.parametrize("size", [(7, 8), (12, 13), (4, 5)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (2, 2, 0), (3, 3, 1), (3, 2, 1)])
def test_poolings_that_round_up_agree(
    builder: ModuleType, size: tuple[int, int], kernel: int, stride: int, padding: int
) -> None:
    check(
        builder,
        alone(window_op("max_pool", 3, size, kernel, stride=(stride, stride), padding=(padding, padding), ceil=True)),
    )


@every_builder
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 4), (2, 3)])
def test_transposed_convolutions_agree(builder: ModuleType, kernel: int, stride: int) -> None:
    op = OpSpec("conv_transpose", (4,), 5, 6, 3, kernel=(kernel, kernel), stride=(stride, stride), activation="relu")
    check(builder, alone(op))


@every_builder
@pytest.mark.parametrize(
    ("kernel", "stride", "cut", "end"),
    [
        (4, 2, (1, 1), ()),
        (3, 2, (1, 1), (0, 0)),
        (3, 2, (1, 1), ()),
        (5, 2, (2, 2), (1, 1)),
        (2, 2, (1, 0), ()),
        (5, 3, (1, 2), (1, 0)),
    ],
)
@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
def test_transposed_convolutions_are_cut(
    builder: ModuleType, kernel: int, stride: int, cut: tuple[int, int], end: tuple[int, ...], activation: str
) -> None:
    window = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": cut, "padding_end": end}
    check(builder, alone(OpSpec("conv_transpose", (3,), 5, 6, 4, activation=activation, **window)))


@every_builder
@pytest.mark.parametrize("size", [(7, 8), (12, 13)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 1), (5, 3, 2)])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_poolings_that_leave_their_padding_out_agree(
    builder: ModuleType, size: tuple[int, int], kernel: int, stride: int, padding: int, activation: str
) -> None:
    window = {"stride": (stride, stride), "padding": (padding, padding), "exclude_pad": True}
    check(builder, alone(window_op("avg_pool", 3, size, kernel, activation=activation, **window)))


@every_builder
@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("read_twice", [False, True])
def test_pixels_are_shuffled_behind_a_convolution(
    builder: ModuleType, block: int, channels: int, read_twice: bool
) -> None:
    wide = channels * block**2
    graph = chain(
        pointwise(3, wide, 5, "relu"),
        OpSpec("pixel_shuffle", (wide,), 5, 5, channels, stride=(block, block)),
        pointwise(channels, 2, 5 * block),
        input_shape=(3, 5, 5),
    )
    check(builder, replace(graph, outputs=(*graph.outputs, "conv0")) if read_twice else graph)


@every_builder
@pytest.mark.parametrize("kind", ["upsample_nearest", "upsample_bilinear"])
@pytest.mark.parametrize(("size", "to"), [((7, 8), (10, 12)), ((17, 17), (33, 34)), ((5, 6), (5, 9)), ((8, 9), (5, 4))])
@pytest.mark.parametrize("corners", [False, True])
def test_images_are_resized_to_any_size(
    builder: ModuleType, kind: str, size: tuple[int, int], to: tuple[int, int], corners: bool
) -> None:
    align = {"align_corners": corners and kind == "upsample_bilinear"}
    check(builder, alone(OpSpec(kind, (3,), *size, 3, out_size=to, **align)))


@every_builder
def test_corners_are_aligned_at_whole_factors(builder: ModuleType) -> None:
    check(builder, alone(OpSpec("upsample_bilinear", (3,), 5, 6, 3, stride=(2, 2), align_corners=True)))


@every_builder
@pytest.mark.parametrize("bounds", [(-0.5, np.inf), (-np.inf, 0.5), (-0.25, 1.5)])
def test_values_are_clipped_on_the_sides_that_have_a_bound(builder: ModuleType, bounds: tuple[float, float]) -> None:
    low, high = (np.array(bound, np.float32) for bound in bounds)
    check(builder, alone(SMALL_OPS["clip"]), {"clip0": {"low": low, "high": high}})


@every_builder
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("batch", [1, 2])
def test_groups_of_channels_are_normalised_image_by_image(builder: ModuleType, groups: int, batch: int) -> None:
    check(builder, alone(OpSpec("group_norm", (6,), 4, 5, 6, groups=groups, activation="silu", batch=batch)))


@every_builder
@pytest.mark.parametrize("index", [[3, 0, -1, 4], [2], [-1, -1, 0, 1, 2, 3, 4, -1]])
@pytest.mark.parametrize("stride", [1, 2])
def test_channel_maps_copy_reorder_and_zero(builder: ModuleType, index: list[int], stride: int) -> None:
    op = OpSpec("channel_map", (5,), 5, 6, len(index), stride=(stride, stride))
    check(builder, alone(op), {"channel_map0": {"index": np.array(index)}})


@every_builder
def test_every_image_of_a_batch_agrees(builder: ModuleType) -> None:
    conv = OpSpec("conv", (3,), 8, 8, 5, kernel=(3, 3), stride=(2, 2), padding=(1, 1), activation="relu", batch=3)
    flatten = OpSpec("flatten", (5,), 4, 4, 80, batch=3)
    check(builder, chain(conv, flatten, OpSpec("linear", (80,), 1, 1, 4, batch=3), input_shape=(3, 8, 8)))


# Networks


def residual_network() -> OpGraph:
    """A stem with max-pool, a block that widens (channel_map on the shortcut) and one that does not; two outputs."""
    conv = window_op("conv", 3, (32, 32), 7, stride=(2, 2), activation="relu")  # (3, 32, 32) -> (11, 16, 16)
    pool = window_op("max_pool", 11, (16, 16), 3, stride=(2, 2))
    down = OpSpec("conv", (11,), 8, 8, 20, kernel=(3, 3), stride=(2, 2), padding=(1, 1), activation="relu")
    wide = OpSpec("conv", (20,), 4, 4, 20, kernel=(3, 3), padding=(1, 1))
    add = OpSpec("add", (20, 20), 4, 4, 20, activation="relu")
    nodes = (
        OpNode("stem", conv, (OpGraph.INPUT,)),
        OpNode("pool", pool, ("stem",)),
        OpNode("1.a", down, ("pool",)),
        OpNode("1.b", wide, ("1.a",)),
        OpNode("1.shortcut", OpSpec("channel_map", (11,), 8, 8, 20, stride=(2, 2)), ("pool",)),
        OpNode("1.add", add, ("1.b", "1.shortcut")),
        OpNode("2.b", wide, ("1.add",)),
        OpNode("2.add", add, ("2.b", "1.add")),
        OpNode("mean", OpSpec("global_avg_pool", (20,), 4, 4, 20), ("2.add",)),
        OpNode("classes", linear(20, 10), ("mean",)),
    )
    return OpGraph(nodes, (3, 32, 32), ("classes", "1.add"))


def mobile_network(activation: str) -> OpGraph:
    """MobileNet-like: even sizes at stride 2, where TFLite needs explicit padding."""
    ops = [window_op("conv", 3, (32, 32), 3, stride=(2, 2), activation=activation)]  # (3, 32, 32) -> (11, 16, 16)
    size = 16
    for c_in, c_out, stride in ((11, 16, 1), (16, 24, 2), (24, 32, 1), (32, 40, 2)):
        ops.append(window_op("depthwise_conv", c_in, (size, size), 3, stride=(stride, stride), activation=activation))
        size //= stride
        ops.append(pointwise(c_in, c_out, size, activation))
    ops += [OpSpec("global_avg_pool", (40,), 4, 4, 40), linear(40, 10)]
    return chain(*ops, input_shape=(3, 32, 32))


def gated_network(batch: int) -> OpGraph:
    """A squeeze-and-excite gate whose vectors (N, C) pass a 1x1 convolution, then scale an image (N, C, H, W)."""
    nodes = (
        OpNode("conv", window_op("conv", 3, (7, 7), 3, activation="relu", batch=batch), (OpGraph.INPUT,)),
        OpNode("squeeze", OpSpec("global_avg_pool", (11,), 7, 7, 11, batch=batch), ("conv",)),
        OpNode("reduce", OpSpec("linear", (11,), 1, 1, 4, activation="relu", batch=batch), ("squeeze",)),
        OpNode("expand", OpSpec("conv", (4,), 1, 1, 11, activation="hardsigmoid", batch=batch), ("reduce",)),
        OpNode("gate", OpSpec("linear", (11,), 1, 1, 11, activation="sigmoid", batch=batch), ("squeeze",)),
        OpNode("excite", OpSpec("mul", (11, 11), 7, 7, 11, batch=batch), ("conv", "expand")),
        OpNode("scale", OpSpec("mul", (11, 11), 7, 7, 11, activation="relu", batch=batch), ("excite", "gate")),
    )
    return OpGraph(nodes, (3, 7, 7), ("scale", "gate"))


@every_builder
def test_a_residual_network_agrees(builder: ModuleType) -> None:
    check(builder, residual_network())


@every_builder
@pytest.mark.parametrize("activation", ["relu6", "hardswish", "silu"])
def test_a_mobile_network_agrees(builder: ModuleType, activation: str) -> None:
    check(builder, mobile_network(activation))


@every_builder
def test_a_flattened_image_keeps_the_order_of_pytorch(builder: ModuleType) -> None:
    conv = window_op("conv", 3, (4, 4), 3)
    ops = (
        OpSpec("conv", (3,), 4, 4, 512, kernel=(3, 3), padding=(1, 1), activation="relu"),
        OpSpec("max_pool", (512,), 4, 4, 512, kernel=(2, 2), stride=(2, 2)),
        OpSpec("flatten", (512,), 2, 2, 2048),
        linear(2048, 64, "relu"),
        linear(64, 10),
    )
    check(builder, chain(*ops, input_shape=(3, 4, 4)))
    flat = OpSpec("flatten", (11,), 4, 4, 176)
    nodes = chain(conv, flat, linear(176, 5), input_shape=(3, 4, 4)).nodes
    check(builder, OpGraph(nodes, (3, 4, 4), ("linear2", "flatten1")))  # the flattened vectors leave the network


@st.composite
def small_networks(draw: st.DrawFn) -> OpGraph:
    """Up to three convolutions, depthwise or not, of any window that fits."""

    def window(size: int) -> tuple[int, int, int, int]:
        kernel = draw(st.integers(1, min(size, 5)))
        dilation = draw(st.integers(1, 2 if 2 * (kernel - 1) < size else 1))
        return kernel, draw(st.integers(1, 3)), draw(st.integers(0, kernel - 1)), dilation

    channels, height, width = input_shape = (
        draw(st.integers(1, 9)),
        draw(st.integers(4, 14)),
        draw(st.integers(4, 14)),
    )
    ops: list[OpSpec] = []
    for _ in range(draw(st.integers(1, 3))):
        kernel, stride, padding, dilation = zip(window(height), window(width), strict=True)
        depthwise = draw(st.booleans())
        op = OpSpec(
            "depthwise_conv" if depthwise else "conv",
            (channels,),
            height,
            width,
            channels if depthwise else draw(st.integers(1, 9)),
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=channels if depthwise else 1,
            activation=draw(st.sampled_from(ACTIVATIONS)),
        )
        ops.append(op)
        channels, height, width = op.out_channels, op.out_height, op.out_width
    return chain(*ops, input_shape=input_shape)


@every_builder
@settings(max_examples=25)
@given(graph=small_networks())
def test_random_convolutions_agree(builder: ModuleType, graph: OpGraph) -> None:
    check(builder, graph)


@every_builder
def test_the_node_whose_weights_do_not_fit_is_named(builder: ModuleType) -> None:
    graph = alone(SMALL_OPS["conv"])
    with pytest.raises(ValueError, match="conv0: no weight given"):
        builder.build(graph, {})
    weights = random_weights(graph)
    weights["conv0"]["bias"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"conv0: bias has shape \(4,\)"):
        builder.build(graph, weights)


@pytest.mark.parametrize("builder", FILES)
def test_the_same_input_gives_the_same_bytes(builder: ModuleType) -> None:
    graph = residual_network()
    weights = random_weights(graph)
    assert builder.build(graph, weights) == builder.build(graph, weights)


# TFLite alone


@every_builder
@pytest.mark.parametrize("batch", [1, 2])
def test_gates_scale_images(builder: ModuleType, batch: int) -> None:
    check(builder, gated_network(batch))


@every_builder
def test_a_linear_alone_runs(builder: ModuleType) -> None:
    check(builder, alone(linear(12, 7, "relu")))


@needs_litert
def test_tflite_runs_a_linear_alone_on_vectors() -> None:
    graph = alone(linear(12, 7, "relu"))
    check(tflite_builder, graph)
    (source,) = interpreter_of(tflite_builder.build(graph, random_weights(graph))).get_input_details()
    assert tuple(source["shape"]) == (1, 12)


@needs_litert
@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_tflite_adds_what_a_convolution_swallowed(activation: str) -> None:
    graph = residual_network()
    nodes = [node for node in graph.nodes if node.name in ("stem", "pool")]
    conv = window_op("conv", 11, (8, 8), 3, activation=activation, fused_add=True)
    nodes.append(OpNode("block", conv, ("pool", "pool")))
    check(tflite_builder, OpGraph(tuple(nodes), graph.input_shape, ("block",)))


def operators(model: bytes) -> list[str]:
    names = [details["op_name"] for details in interpreter_of(model)._get_ops_details()]
    return [name for name in names if name != "DELEGATE"]


def is_wholly_delegated(model: bytes) -> bool:
    """True where one XNNPACK kernel reads the network's inputs and writes its outputs."""
    interpreter = interpreter_of(model)
    kernels = [details for details in interpreter._get_ops_details() if details["op_name"] == "DELEGATE"]
    sources = {details["index"] for details in interpreter.get_input_details()}
    results = {details["index"] for details in interpreter.get_output_details()}
    return len(kernels) == 1 and sources <= set(kernels[0]["inputs"]) and results == set(kernels[0]["outputs"])


@needs_litert
@pytest.mark.parametrize(
    "graph",
    [mobile_network("relu6"), mobile_network("hardswish"), residual_network(), gated_network(1)],
    ids=["mobile", "mobile-hardswish", "residual", "gated"],
)
def test_xnnpack_takes_whole_networks(graph: OpGraph) -> None:
    assert is_wholly_delegated(tflite_builder.build(graph, random_weights(graph)))


@needs_litert
def test_a_max_pool_of_values_of_both_signs_is_padded_by_the_edges_of_the_image() -> None:
    graph = alone(window_op("max_pool", 4, (8, 8), 3, stride=(2, 2)))
    model = tflite_builder.build(graph, random_weights(graph))
    assert operators(model) == [*("SLICE", "CONCATENATION") * 2, "MAX_POOL_2D"]
    assert is_wholly_delegated(model)


@needs_litert
def test_padding_is_a_scheme_of_the_operator_where_tflite_has_it() -> None:
    def built(size: int, kernel: int, stride: int, padding: int) -> list[str]:
        op = window_op("conv", 3, (size, size), kernel, stride=(stride, stride), padding=(padding, padding))
        return operators(tflite_builder.build(alone(op), random_weights(alone(op))))

    assert built(8, 3, 1, 1) == ["CONV_2D"]
    assert built(7, 3, 2, 1) == ["CONV_2D"]  # SAME pads 1 + 1 on an odd size
    assert built(8, 3, 1, 0) == ["CONV_2D"]
    assert built(8, 3, 2, 1) == ["PAD", "CONV_2D"]  # and 0 + 1 on an even one
    assert built(224, 7, 2, 3) == ["PAD", "CONV_2D"]
    as_tensorflow = alone(window_op("conv", 3, (8, 8), 3, stride=(2, 2), padding=(0, 0), padding_end=(1, 1)))
    assert operators(tflite_builder.build(as_tensorflow, random_weights(as_tensorflow))) == ["CONV_2D"]


@needs_litert
def test_only_linear_readers_spare_a_flatten_its_transpose() -> None:
    flatten, graph = SMALL_OPS["flatten"], chain(SMALL_OPS["flatten"], linear(210, 9), input_shape=(5, 6, 7))
    assert operators(tflite_builder.build(graph, random_weights(graph))) == ["RESHAPE", "FULLY_CONNECTED"]
    assert operators(tflite_builder.build(alone(flatten), {})) == ["TRANSPOSE", "RESHAPE"]


@needs_litert
def test_the_file_is_tflite_with_aligned_constants_and_the_names_of_the_nodes() -> None:
    from ai_edge_litert import schema_py_generated as schema

    graph = residual_network()
    data = tflite_builder.build(graph, random_weights(graph))
    assert data[4:8] == b"TFL3"
    model = schema.Model.GetRootAs(data, 0)
    assert (model.Version(), model.Description()) == (3, b"amc-hw")
    assert model.Buffers(0).DataIsNone()
    for index in range(1, model.BuffersLength()):
        buffer = model.Buffers(index)
        offset = buffer._tab.Vector(buffer._tab.Offset(4))
        assert offset % CONSTANT_ALIGNMENT == 0
    names = {model.Subgraphs(0).Tensors(index).Name().decode() for index in range(model.Subgraphs(0).TensorsLength())}
    assert names >= {OpGraph.INPUT, *(node.name for node in graph.nodes)}
    for index in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(index)
        assert code.DeprecatedBuiltinCode() == code.BuiltinCode() <= 127


@needs_litert
@pytest.mark.parametrize(
    ("op", "message"),
    [
        (OpSpec("max_pool", (3,), 8, 8, 3, kernel=(2, 2), dilation=(2, 2)), "max_pool0: TFLite has no such pooling"),
        (OpSpec("add", (3, 3), 8, 8, 3, dtype="int8"), "add0: .*float32 only, not in int8"),
    ],
)
def test_what_tflite_lacks_is_named(op: OpSpec, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        tflite_builder.build(alone(op), {})


@needs_litert
def test_two_nodes_of_one_name_are_rejected() -> None:
    node = alone(SMALL_OPS["add"]).nodes[0]
    with pytest.raises(ValueError, match="two tensors are named 'add0'"):
        tflite_builder.build(OpGraph((node, node), (5, 6, 7), ("add0",)), {})


def test_without_litert_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(DeviceError, match=r"pip install 'amc-hw\[litert\]'"):
        tflite_builder.build(alone(SMALL_OPS["add"]), {})


def test_pytorch_frees_what_no_later_operator_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a network's own code: a GPU holds the largest moment, not the sum of all activations."""
    conv = OpSpec("conv", (4,), 8, 8, 4)
    names = ["first", "second", "third", "fourth"]
    nodes = [OpNode(name, conv, (source,)) for name, source in zip(names, ["input", *names], strict=False)]
    nodes.append(OpNode("sum", OpSpec("add", (4, 4), 8, 8, 4), ("fourth", "second")))  # a shortcut stays until here
    graph = OpGraph(tuple(nodes), (4, 8, 8), ("sum", "third"))
    module = torch_builder.Network(graph, random_weights(graph))
    plain, made, alive = module._run, {}, {}

    def run(node: OpNode, values: dict[str, torch.Tensor]) -> torch.Tensor:
        alive[node.name] = {name for name, value in made.items() if value() is not None}
        found = plain(node, values)
        made[node.name] = weakref.ref(found)
        return found

    monkeypatch.setattr(module, "_run", run)
    outputs = module(torch.randn(1, 4, 8, 8))
    assert alive["third"] == {"second"} and alive["sum"] == {"second", "third", "fourth"}
    assert [value is made[name]() for name, value in zip(("sum", "third"), outputs, strict=True)] == [True, True]
