"""PyTorch on a GPU: eager, compiled, or replayed as a CUDA graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from profilers.builders.torch import Network
from profilers.builders.weights import Weights
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.gpu import GpuInfo, Loaded, tf32
from profilers.ops import OpGraph

EXECUTIONS = ("eager", "compile", "graph")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_COMPILED = 10_000
TRITON = (7, 0)  #: compute capability of the first GPUs that it compiles for
WARM_UPS = 3  #: before a graph is captured: libraries choose algorithms and take memory


def version(config: DeviceConfig) -> str:
    if config.execution not in EXECUTIONS:
        raise UserError(f"device {config.name}: unknown execution {config.execution!r}; known: {', '.join(EXECUTIONS)}")
    return f"{torch.__version__} CUDA {torch.version.cuda} cuDNN {torch.backends.cudnn.version()} {config.execution}"


def check(config: DeviceConfig, info: GpuInfo) -> None:
    """DeviceError where the GPU cannot do what is chosen."""
    if config.execution == "compile" and info.capability < TRITON:
        raise DeviceError(f"torch.compile has no kernels for a {info.name}: it takes compute capability 7.0 or more")
    compilers = filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))
    if config.execution == "compile" and not any(map(shutil.which, compilers)):
        raise DeviceError("torch.compile needs a C compiler: install gcc, or name one in CC")


@contextmanager
def settings(config: DeviceConfig) -> Iterator[None]:
    """PyTorch's switches as the configuration wants them, and back again."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        with tf32(config.dtype == "tf32"), _compiling() if config.execution == "compile" else nullcontext():
            yield
    finally:
        cudnn.benchmark = before


@contextmanager
def _compiling() -> Iterator[None]:
    """Every network anew: they share their code, of which PyTorch compiles eight versions, and then, unasked, none."""
    import torch._dynamo

    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # before 2.7
    limits = dict.fromkeys((limit, f"accumulated_{limit}"), MOST_COMPILED)
    with torch._dynamo.config.patch(limits | {f"fail_on_{limit.replace('size_', '')}_hit": True}):
        yield


def inputs_of(graph: OpGraph, config: DeviceConfig, device: str) -> list[torch.Tensor]:
    """Fixed random numbers of the network's input shapes."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in graph.inputs.values():
        value = torch.randn(graph.nodes[0].op.batch, *shape, generator=generator, device=device)
        made.append(_laid_out(value.to(DTYPES[config.dtype]), config))
    return made


def _laid_out(value: torch.Tensor, config: DeviceConfig) -> torch.Tensor:
    last = config.layout == "channels_last" and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if last else value


def loaded(graph: OpGraph, weights: Weights, config: DeviceConfig, device: str, *, labelled: bool = False) -> Loaded:
    module = Network(graph, weights, labelled=labelled).eval().to(device, DTYPES[config.dtype])
    for name, value in list(module.named_buffers()):
        if value.dim() == 4:
            setattr(module, name, _laid_out(value, config))
    inputs = inputs_of(graph, config, device)
    if labelled or config.execution == "eager":
        return Loaded(graph, lambda: module(*inputs))
    if config.execution == "compile":
        compiled: Any = torch.compile(module, dynamic=False)
        return Loaded(graph, lambda: compiled(*inputs))
    return Loaded(graph, _captured(module, inputs, device))


def _captured(module: Network, inputs: list[torch.Tensor], device: str) -> Callable[[], object]:
    """A function that replays the network's kernels, launched at once."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(WARM_UPS):
            module(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        outputs = module(*inputs)
    kept = module, inputs  # the graph reads their memory

    def replay() -> object:
        graph.replay()
        return outputs, kept

    return replay
