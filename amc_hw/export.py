"""The pruned network as a file for deployment, checked against PyTorch on real inputs before it is put in place."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from amc_hw.errors import FailedError, UserError
from amc_hw.graph import LayerGraph
from amc_hw.models.channel_map import ChannelMap
from amc_hw.tracing import batch_norm_affine
from profilers.files import write_whole
from profilers.ops import OpGraph
from profilers.runtimes import load_runtime

RUNTIME_OF = {"onnx": "onnxruntime", "tflite": "litert"}
FORMATS = ("torch", *RUNTIME_OF)
TOLERANCE = 1e-3  #: of the largest output, or of 1 where all are smaller


@torch.no_grad()
def folded_weights(module: nn.Module, graph: LayerGraph) -> dict[str, dict[str, np.ndarray]]:
    """Layer name -> weight, bias or index for the builders, batch-norms folded in.

    module: the network of `graph`, at any widths.
    """
    weights: dict[str, dict[str, np.ndarray]] = {}
    for layer in graph.layers:
        part = module.get_submodule(layer.module) if layer.module else None
        if isinstance(part, ChannelMap):
            weights[layer.name] = {"index": np.array(part.index, dtype=np.int64)}
        elif isinstance(part, nn.Conv2d | nn.Linear):
            weight = part.weight.detach().double()
            bias = torch.zeros(len(weight), dtype=torch.float64) if part.bias is None else part.bias.detach().double()
            if layer.batch_norm is not None:
                scale, offset = batch_norm_affine(module.get_submodule(layer.batch_norm), dtype=torch.float64)
                bias = bias * scale + offset
                weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            weights[layer.name] = {"weight": _float32(weight), "bias": _float32(bias)}
    return weights


def _float32(tensor: Tensor) -> np.ndarray:
    """As float32, subnormal numbers as zero: they make the same shapes many times slower on some processors."""
    values = tensor.to(torch.float32)
    return values.masked_fill(values.abs() < torch.finfo(torch.float32).tiny, 0.0).numpy()


@torch.no_grad()
def export_network(
    module: nn.Module, graph: LayerGraph, network: OpGraph, images: Tensor, *, file_format: str, out: Path
) -> dict[str, object]:
    """Write `module` to `out` and return `file`, `bytes` and `max_abs_diff` from PyTorch's outputs.

    network: the operators of `graph` at the module's widths and the batch wanted. images: (N, C, H, W), normalised.
    `torch` is a program of torch.export, which loads without this package. Nothing is left at `out` where the
    outputs differ by more than TOLERANCE (FailedError) or the runtime is missing (DeviceError).
    """
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}; known: {', '.join(FORMATS)}")
    module.eval()
    batch = network.nodes[0].op.batch
    images = images.repeat(math.ceil(batch / len(images)), 1, 1, 1)
    chunks = [chunk for chunk in images.split(batch) if len(chunk) == batch]
    data, run = (_as_program if file_format == "torch" else _as_model)(module, graph, network, chunks[0], file_format)
    expected = [_outputs(module(chunk)) for chunk in chunks]
    largest, difference = 1.0, np.float64(0.0)
    for chunk, wanted in zip(chunks, expected, strict=True):
        for found, right in zip(run(chunk), wanted, strict=True):
            largest = max(largest, float(np.abs(right[np.isfinite(right)]).max(initial=0.0)))
            difference = np.maximum(difference, np.abs(found.reshape(right.shape) - right).max())  # keeps a NaN
    if not difference <= TOLERANCE * largest:  # NaN fails this, too
        raise FailedError(f"the {file_format} file's outputs are off by {difference:.3g} (largest {largest:.3g})")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(f"cannot write {out}: {error.strerror}") from error
    write_whole(out, data)
    return {"file": str(out), "bytes": len(data), "max_abs_diff": float(difference)}


_Run = Callable[[Tensor], Sequence[np.ndarray]]


def _as_model(
    module: nn.Module, graph: LayerGraph, network: OpGraph, _example: Tensor, file_format: str
) -> tuple[bytes, _Run]:
    runtime = load_runtime(RUNTIME_OF[file_format])
    data = runtime.build(network, folded_weights(module, graph))
    return data, lambda chunk: runtime.outputs(data, chunk.numpy())


def _as_program(
    module: nn.Module, _graph: LayerGraph, _network: OpGraph, example: Tensor, _file_format: str
) -> tuple[bytes, _Run]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (example,)), buffer)
    program = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda chunk: _outputs(program(chunk))


def _outputs(value: Tensor | Sequence[Tensor]) -> list[np.ndarray]:
    return [output.numpy() for output in ([value] if isinstance(value, Tensor) else value)]
