"""Weights of an `OpGraph`: random ones for timing, checked ones from a trained network."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np

from profilers.ops import CONV_KINDS, NORM_KINDS, SCALAR_KINDS, OpGraph, OpNode, OpSpec

#: node name -> {"weight": (O, I/groups, kh, kw), (O, I) or (C,), "bias": (O,), "index": (O,), "start": (), "eps": (),
#: "value": () or a map, "part": (), "low": (), "high": (), "scale": ()},
#: as far as its kind has them.
Weights = Mapping[str, Mapping[str, np.ndarray]]


def weight_shapes(node: OpNode) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays a node needs.

    `index` of a `channel_map` names, for every output channel, the input channel it copies; -1 is a zero channel.
    `start` of a `slice` is its first channel, `part` the number of a `chunk`, from 0, `value` what a scalar operator
    adds or multiplies by. The weight of a `conv_transpose` is (I, O, kh, kw), as in PyTorch. The value of an `add_map`
    is (C, H, W), for tokens (H * W, C); that of a `prepend` are its tokens, (count, C). `start` of a `take_token` is
    the number of that token, `bias` of an `attention` (heads, queries, keys) of a window.
    """
    op = node.op
    if op.kind in CONV_KINDS:
        shape = (op.out_channels, op.in_channels[0] // op.groups, *op.kernel)
        return {"weight": shape, "bias": (op.out_channels,)}
    if op.kind == "conv_transpose":
        return {"weight": (op.in_channels[0], op.out_channels, *op.kernel), "bias": (op.out_channels,)}
    if op.kind == "linear":
        return {"weight": (op.out_channels, op.in_channels[0]), "bias": (op.out_channels,)}
    if op.kind in ("affine", *NORM_KINDS):
        arrays: dict[str, tuple[int, ...]] = {"weight": (op.out_channels,), "bias": (op.out_channels,)}
        return arrays | ({"eps": ()} if op.kind in NORM_KINDS else {})
    if op.kind in SCALAR_KINDS:
        return {"value": ()}
    if op.kind == "add_map":
        positions = op.height, op.width
        return {"value": (math.prod(positions), op.out_channels) if op.tokens else (op.out_channels, *positions)}
    if op.kind == "prepend":
        return {"value": (op.padding[0], op.out_channels)}
    if op.kind == "take_token":
        return {"start": ()}
    if op.kind == "attention":
        sizes = (op.groups, math.prod(op.kernel), math.prod(op.keys or op.kernel))
        return {"scale": ()} | ({"bias": sizes} if op.biased else {})
    if op.kind == "clip":  # infinite where there is no bound
        return {"low": (), "high": ()}
    if op.kind == "prelu":
        return {"weight": (op.out_channels,)}
    if op.kind in ("slice", "chunk"):
        return {"start" if op.kind == "slice" else "part": ()}
    return {"index": (op.out_channels,)} if op.kind == "channel_map" else {}


def random_weights(graph: OpGraph, *, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """He-normal weights and small biases, float32, a function of (seed, node name) only.

    Activations stay near unit variance, so no value is subnormal and timing sees ordinary numbers.
    """
    weights: dict[str, dict[str, np.ndarray]] = {}
    for node in graph.nodes:
        rng = np.random.default_rng([seed, zlib.crc32(node.name.encode())])
        arrays: dict[str, np.ndarray] = {}
        for name, shape in weight_shapes(node).items():
            if name == "index":
                source, out = node.op.in_channels[0], node.op.out_channels
                before = max(out - source, 0) // 2
                index = np.arange(out) - before
                arrays[name] = np.where((index >= 0) & (index < source), index, -1)
            elif name in ("start", "part"):
                arrays[name] = np.array(0)
            elif name in ("low", "high"):
                arrays[name] = np.array(-1.0 if name == "low" else 1.0, np.float32)
            elif name == "eps":
                arrays[name] = np.array(1e-5, np.float32)
            elif name == "scale":
                arrays[name] = np.array((node.op.in_channels[0] // node.op.groups) ** -0.5, np.float32)
            elif name == "value" or (name == "weight" and len(shape) == 1):
                arrays[name] = np.asarray(1 + rng.standard_normal(shape) * 0.1, np.float32)
            elif name == "weight":
                fan_in = int(np.prod(shape[1:]))
                arrays[name] = (rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)
            else:
                arrays[name] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        if arrays:
            weights[node.name] = arrays
    return weights


def checked_weights(graph: OpGraph, weights: Weights) -> Weights:
    """`weights` itself, after checking that every node has what `weight_shapes` asks for; ValueError if not."""
    for node in graph.nodes:
        for name, shape in weight_shapes(node).items():
            array = weights.get(node.name, {}).get(name)
            if array is None:
                raise ValueError(f"{node.name}: no {name} given")
            one_slope = node.op.kind == "prelu" and array.shape == (1,)  # for all channels
            if array.shape != shape and not one_slope:
                raise ValueError(f"{node.name}: {name} has shape {array.shape}, the operator {node.op} needs {shape}")
            if name == "index" and not ((array >= -1) & (array < node.op.in_channels[0])).all():
                raise ValueError(f"{node.name}: index names channels outside -1..{node.op.in_channels[0] - 1}")
    return weights


def map_as_convolution(index: np.ndarray, in_channels: int) -> np.ndarray:
    """A channel map as the weights of a 1x1 convolution, (O, I, 1, 1), of zeros and ones.

    Runtimes keep a convolution in their blocked layout; slices and pads would leave it.
    """
    weight = np.zeros((len(index), in_channels, 1, 1), dtype=np.float32)
    kept = index >= 0
    weight[np.nonzero(kept)[0], index[kept], 0, 0] = 1.0
    return weight


def averages(size: int, to: int) -> np.ndarray:
    """What an adaptive pooling makes of `size` pixels in a row, (to, size): shares of every pixel (PyTorch)."""
    places = np.arange(size)
    starts, ends = np.arange(to) * size // to, -(-(np.arange(to) + 1) * size // to)
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def first_channel(op: OpSpec, arrays: Mapping[str, np.ndarray]) -> int:
    """Where a `slice` or a `chunk` begins; the number of a `take_token`."""
    return int(arrays["part"]) * op.out_channels if op.kind == "chunk" else int(arrays["start"])
