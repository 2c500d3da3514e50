"""`OpGraph` + weights -> an ONNX model. Layout NCHW, names of nodes kept, batch-norms already folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from profilers.builders.weights import Weights, checked_weights, map_as_convolution
from profilers.errors import UnsupportedOperatorError
from profilers.ops import OpGraph, OpNode, OpSpec

OPSET = 17
#: Read by every ONNX Runtime since 1.14; newer IR versions are refused by the older runtimes that phones have.
IR_VERSION = 8
_ACTIVATION_OPS = {"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish"}


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.vectors: set[str] = set()  # nodes whose output is (N, C); that of the others is (N, C, H, W)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))

    def as_image(self, source: str, reader: str) -> str:
        """The (N, C) tensor `source` as (N, C, 1, 1), for a reader that works on images."""
        axes = self.constant(f"{reader}/{source}/axes", np.array([2, 3], np.int64))
        self.add("Unsqueeze", f"{reader}/{source}/image", [source, axes], f"{reader}/{source}")
        return f"{reader}/{source}"

    def activation(self, op: OpSpec, name: str, source: str, output: str) -> None:
        if op.activation == "relu6":
            low = self.constant(f"{name}/min", np.array(0.0, np.float32))
            high = self.constant(f"{name}/max", np.array(6.0, np.float32))
            self.add("Clip", f"{name}/relu6", [source, low, high], output)
        elif op.activation == "silu":
            self.add("Sigmoid", f"{name}/sigmoid", [source], f"{name}/gate")
            self.add("Mul", f"{name}/silu", [source, f"{name}/gate"], output)
        elif op.activation == "hardsigmoid":
            self.add("HardSigmoid", f"{name}/hardsigmoid", [source], output, alpha=1.0 / 6.0, beta=0.5)
        else:
            self.add(_ACTIVATION_OPS[op.activation], f"{name}/{op.activation}", [source], output)


def build(graph: OpGraph, weights: Weights) -> bytes:
    """The serialized ONNX model of `graph`; input `input` (N, C, H, W) and outputs named after their nodes."""
    checked_weights(graph, weights)
    batch = graph.nodes[0].op.batch
    writer = _Writer()
    for node in graph.nodes:
        _emit(writer, node, weights, leaves=node.name in graph.outputs)
    inputs = [helper.make_tensor_value_info(OpGraph.INPUT, TensorProto.FLOAT, [batch, *graph.input_shape])]
    by_name = {node.name: node.op for node in graph.nodes}
    outputs = []
    for name in graph.outputs:
        op = by_name[name]
        spatial = [] if name in writer.vectors else [op.out_height, op.out_width]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, op.out_channels, *spatial]))
    model = helper.make_model(
        helper.make_graph(writer.nodes, "network", inputs, outputs, writer.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="amc-hw",
    )
    return model.SerializeToString()


def _emit(writer: _Writer, node: OpNode, weights: Weights, *, leaves: bool) -> None:
    """Write one node. A pooled image stays (N, C, 1, 1) until a matrix product reads it or it `leaves` the network."""
    op, name, inputs = node.op, node.name, list(node.inputs)
    if op.fused_add or op.dtype != "float32" or (op.kind == "max_pool" and op.dilation != (1, 1)):
        raise UnsupportedOperatorError(f"{name}: {op} ({op.dtype}, dilation {op.dilation}) cannot be written as ONNX")
    pooled_output = op.kind == "global_avg_pool" and leaves
    elementwise = op.kind in ("add", "mul", "concat", "activation")
    if op.kind in ("linear", "flatten") or pooled_output or (elementwise and writer.vectors.issuperset(inputs)):
        writer.vectors.add(name)
    else:
        inputs = [writer.as_image(source, name) if source in writer.vectors else source for source in inputs]
    arrays = weights.get(name, {})
    result = name if op.activation == "none" else f"{name}/linear"
    window = {"kernel_shape": list(op.kernel), "strides": list(op.stride), "pads": [*op.padding, *op.padding]}
    if op.kind in ("conv", "depthwise_conv"):
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias")]
        writer.add("Conv", name, inputs + parts, result, **window, dilations=list(op.dilation), group=op.groups)
    elif op.kind == "channel_map":
        weight = writer.constant(f"{name}.weight", map_as_convolution(arrays["index"], op.in_channels[0]))
        writer.add("Conv", name, [*inputs, weight], result, **window)
    elif op.kind == "linear":
        parts = [writer.constant(f"{name}.{part}", arrays[part]) for part in ("weight", "bias")]
        if inputs[0] not in writer.vectors:
            writer.add("Flatten", f"{name}/flatten", inputs, f"{name}/vector")
            inputs = [f"{name}/vector"]
        writer.add("Gemm", name, inputs + parts, result, transB=1)
    elif op.kind in ("add", "mul"):
        writer.add(op.kind.capitalize(), name, inputs, result)
    elif op.kind == "concat":
        writer.add("Concat", name, inputs, result, axis=1)
    elif op.kind == "max_pool":
        writer.add("MaxPool", name, inputs, result, **window)
    elif op.kind == "avg_pool":
        writer.add("AveragePool", name, inputs, result, **window, count_include_pad=1)
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
    if op.activation != "none":
        writer.activation(op, name, result, name)
