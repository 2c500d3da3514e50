"""The pruned network as a file for deployment, checked against PyTorch on real inputs before it is put in place."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from amc_hw.choices import FORMATS, RUNTIME_OF
from amc_hw.errors import FailedError, UserError
from amc_hw.graph import LayerGraph
from amc_hw.refit import Inputs, batches, count_of
from amc_hw.weights import as_read, folded_weights
from profilers.files import check_replaceable, write_whole
from profilers.ops import OpGraph
from profilers.runtimes import Runtime, load_runtime

SUFFIXES = {f".{file_format}": file_format for file_format in RUNTIME_OF}
TOLERANCE = 1e-3  #: of the largest output
LABEL = "amc-hw"  #: of a file's metadata, a JSON object
MARK = b'{"program": "amc-hw"'  #: how that begins
_Chunk = tuple[Tensor, ...]


@torch.no_grad()
def export_network(
    module: nn.Module,
    graph: LayerGraph,
    network: OpGraph,
    inputs: Inputs,
    *,
    file_format: str,
    out: Path,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `module` to `out` and return `file`, `bytes`, `max_abs_diff` from PyTorch's outputs on `images`, and the
    `largest` of these.

    network: the operators of `graph` at the module's widths and the batch wanted. inputs: as the module takes them.
    about: for the file's metadata, under LABEL. `torch` is a program of torch.export, which loads without this package.
    Nothing is left at `out` where the outputs differ by more than TOLERANCE (FailedError) or the runtime is missing
    (DeviceError); what lies there already is replaced where it is a file of ours (else UserError).
    """
    if file_format not in FORMATS:
        raise UserError(f"unknown format {file_format!r}; known: {', '.join(FORMATS)}")
    module.eval()
    batch = network.nodes[0].op.batch
    chunks = _whole_batches(inputs, batch)
    if file_format == "torch":
        named: dict[str, Any] = {}
        data, run = _as_program(module, chunks[0], about)
    else:
        runtime = load_runtime(RUNTIME_OF[file_format])
        data, outputs = _as_model(module, graph, network, chunks[0], runtime, about)
        named, run = {"outputs": outputs}, _numbers(runtime.session(data), network)
    expected = [_outputs(module(*chunk)) for chunk in chunks]
    _require_finite(part for parts in expected for part in parts)
    largest, difference = float(np.finfo(np.float32).tiny), np.float64(0.0)
    for chunk, wanted in zip(chunks, expected, strict=True):
        for found, right in zip(run(chunk), wanted, strict=True):
            largest = max(largest, float(np.abs(right).max(initial=0.0)))
            difference = np.maximum(difference, np.abs(found.reshape(right.shape) - right).max())  # keeps a NaN
    if not difference <= TOLERANCE * largest:  # NaN fails this, too
        raise FailedError(f"the {file_format} file's outputs are off by {difference:.3g} (largest {largest:.3g})")
    return _written(out, data, float(difference), largest) | named | {"images": batch * len(chunks)}


class Running(nn.Module):
    """A deployed model as a module: what it computes is what its runtime makes of the inputs, a batch at a time."""

    def __init__(self, runtime: Runtime, model: bytes, network: OpGraph, like: Any) -> None:
        super().__init__()
        self.run, self.network = runtime.session(model), network
        self.batch = network.nodes[0].op.batch
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # a user's function may ask where it is
        leaves, self.structure = tree_flatten(like)
        self.shapes = [leaf.shape[1:] for leaf in leaves]

    def forward(self, *inputs: Tensor) -> Any:
        count = len(inputs[0])
        missing = -count % self.batch
        padded = [torch.cat([part, part[:1].expand(missing, *part.shape[1:])]) for part in inputs]
        read = as_read(self.network, padded)
        found = [self.run(*(part.numpy() for part in chunk)) for chunk in batches(read, self.batch)]
        outputs = [torch.from_numpy(np.concatenate(parts)[:count]) for parts in zip(*found, strict=True)]
        shaped = [part.reshape(count, *shape) for part, shape in zip(outputs, self.shapes, strict=True)]
        return tree_unflatten(shaped, self.structure)


@torch.no_grad()
def export_int8(
    module: nn.Module,
    graph: LayerGraph,
    network: OpGraph,
    inputs: Inputs,
    *,
    file_format: str,
    out: Path,
    others: Inputs | None = None,
    about: Mapping[str, Any] | None = None,
    int8_io: bool = False,
) -> tuple[dict[str, Any], Running]:
    """As `export_network`, quantized to int8 and calibrated on `inputs`; the written model comes back as a module, too.

    others: inputs that it is compared on; what it was calibrated on flatters it. int8_io: its inputs and outputs are
    int8, too. `max_abs_diff` from PyTorch's float outputs is reported, and `rms_diff`, the root of the mean square
    difference over that of these outputs, of several outputs the largest; no file is refused for it.
    """
    if file_format not in RUNTIME_OF:
        raise UserError(f"int8 is for {' and '.join(RUNTIME_OF)}, not for {file_format}")
    module.eval()
    runtime, batch = load_runtime(RUNTIME_OF[file_format]), network.nodes[0].op.batch
    compared = inputs if others is None else others
    calibrated, chunks = _whole_batches(inputs, batch), _whole_batches(compared, batch)
    expected = [[part.astype(np.float64) for part in _outputs(module(*chunk))] for chunk in chunks]
    right = _joined(expected)
    _require_finite(right)
    model, outputs = _as_model(module, graph, network, chunks[0], runtime, about)
    samples = [[part.numpy() for part in as_read(network, chunk)] for chunk in calibrated]
    data = runtime.quantized(model, samples, int8_io=int8_io)
    running = Running(runtime, data, network, module(*chunks[0]))
    off = _joined(
        [got.reshape(want.shape) - want for got, want in zip(_outputs(running(*chunk)), wanted, strict=True)]
        for chunk, wanted in zip(chunks, expected, strict=True)
    )
    if not all(np.isfinite(part).all() for part in off):
        raise FailedError(f"the int8 {file_format} file's outputs are not finite")
    difference, largest = (max(float(np.abs(part).max()) for part in parts) for parts in (off, right))
    seen, of = (min(count_of(part), batch * len(run)) for part, run in ((compared, chunks), (inputs, calibrated)))
    named = {"outputs": outputs, "images": seen, "calibration_images": of, "on_others": others is not None}
    if int8_io:
        named["quantization"] = {name: list(pair) for name, pair in runtime.quantization(data).items()}
    sizes = [max(np.mean(np.square(part)), np.finfo(np.float32).tiny) for part in right]
    rms = max(float(np.sqrt(np.mean(np.square(part)) / size)) for part, size in zip(off, sizes, strict=True))
    return _written(out, data, difference, largest) | {"rms_diff": rms} | named, running


def _require_finite(outputs: Iterable[np.ndarray]) -> None:
    if not all(np.isfinite(part).all() for part in outputs):
        raise FailedError("the network's own outputs are not finite: look at its weights and its inputs")


def _joined(chunks: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Every output of all chunks, flat."""
    return [np.concatenate([part.ravel() for part in parts]) for parts in zip(*chunks, strict=True)]


def _told(about: Mapping[str, Any] | None) -> str:
    """What a file's metadata say."""
    return json.dumps({"program": "amc-hw"} | dict(about or {}))


def _whole_batches(inputs: Inputs, batch: int) -> list[tuple[Tensor, ...]]:
    """The inputs, repeated where there are fewer than one batch, in whole batches."""
    parts, times = (inputs,) if isinstance(inputs, Tensor) else inputs, math.ceil(batch / count_of(inputs))
    repeated = [part.repeat(times, *[1] * (part.dim() - 1)) for part in parts]
    return [chunk for chunk in batches(repeated, batch) if len(chunk[0]) == batch]


def _written(out: Path, data: bytes, difference: float, largest: float) -> dict[str, Any]:
    check_replaceable(out, MARK)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedError(f"cannot write {out}: {error.strerror}") from error
    write_whole(out, data)
    return {"file": str(out), "bytes": len(data), "max_abs_diff": difference, "largest": largest}


_Run = Callable[[_Chunk], Sequence[np.ndarray]]
_Arrays = dict[str, dict[str, np.ndarray]]


def _with_names(network: OpGraph, weights: _Arrays, outputs: Any) -> tuple[OpGraph, _Arrays]:
    """The network with its outputs named as the keys of the dictionaries that they are returned in (`a.b` inside of
    others, `a.0` in a tuple of one), after their operators where there are none."""
    pairs = zip(network.outputs, _keys(outputs), strict=True)
    new = {old: f"{key}/output" if key in network.inputs else key for old, key in pairs if key is not None}
    if len(set(new.values())) < len(new):
        return network, weights
    for name in [node.name for node in network.nodes]:
        if name not in new and name in new.values():  # an operator that is called as an output of others
            new[name] = f"{name}/operator"
    nodes = [
        replace(node, name=new.get(node.name, node.name), inputs=tuple(new.get(each, each) for each in node.inputs))
        for node in network.nodes
    ]
    renamed = replace(network, nodes=tuple(nodes), outputs=tuple(new.get(each, each) for each in network.outputs))
    return renamed, {new.get(name, name): arrays for name, arrays in weights.items()}


def _keys(outputs: Any, path: tuple[str, ...] = (), *, named: bool = False) -> Iterator[str | None]:
    """Of every tensor, in order."""
    if isinstance(outputs, Tensor):
        yield ".".join(path) if named else None
    elif isinstance(outputs, dict):
        for key, part in outputs.items():
            yield from _keys(part, (*path, str(key)), named=True)
    else:
        for index, part in enumerate(outputs):
            yield from _keys(part, (*path, str(index)), named=named)


def _as_model(
    module: nn.Module,
    graph: LayerGraph,
    network: OpGraph,
    example: _Chunk,
    runtime: Runtime,
    about: Mapping[str, Any] | None,
) -> tuple[bytes, list[str]]:
    """The runtime's model with `about` in its metadata, and the names of its outputs."""
    network, weights = _with_names(network, folded_weights(module, graph), module(*example))
    return runtime.labelled(runtime.build(network, weights), LABEL, _told(about)), list(network.outputs)


def _numbers(run: Callable[..., list[np.ndarray]], network: OpGraph) -> _Run:
    return lambda chunk: run(*(value.numpy() for value in as_read(network, chunk)))


def _as_program(module: nn.Module, example: _Chunk, about: Mapping[str, Any] | None) -> tuple[bytes, _Run]:
    buffer = io.BytesIO()
    blank = tuple(torch.zeros(part.shape, dtype=part.dtype) for part in example)  # it is written into the file
    torch.export.save(torch.export.export(module, blank), buffer, extra_files={LABEL: _told(about)})
    program = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda chunk: _outputs(program(*chunk))


def _outputs(value: Any) -> list[np.ndarray]:
    """The tensors of nested tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value.numpy()]
    return [array for part in (value.values() if isinstance(value, dict) else value) for array in _outputs(part)]
