"""ONNX Runtime on a GPU, by its CUDA or TensorRT execution provider."""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
import torch

from profilers.builders.onnx import build
from profilers.builders.weights import Weights
from profilers.device import DeviceConfig
from profilers.errors import DeviceError, UserError
from profilers.gpu import CAPABILITY, GpuInfo, Loaded
from profilers.ops import OpGraph
from profilers.runtimes import torch_cuda

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


def version(config: DeviceConfig) -> str:
    if config.provider not in PROVIDERS:
        raise UserError(f"device {config.name}: unknown provider {config.provider!r}; known: {', '.join(PROVIDERS)}")
    if config.execution != "eager" or config.layout != "channels_first":
        raise UserError(f"device {config.name}: execution and layout are PyTorch's: leave them out for onnxruntime")
    if config.dtype == "bfloat16":
        raise UserError(f"device {config.name}: onnxruntime is measured with float32, tf32 or float16, not bfloat16")
    wanted, there = PROVIDERS[config.provider], onnxruntime.get_available_providers()
    if wanted not in there:
        raise DeviceError(
            f"onnxruntime {onnxruntime.__version__} has no {wanted} (it has {', '.join(there)}): pip install "
            "onnxruntime-gpu in place of onnxruntime"
        )
    libraries = f"cuDNN {torch.backends.cudnn.version()}"  # PyTorch's own are in this process before it looks for any
    if config.provider == "tensorrt":
        libraries += f" TensorRT {_tensorrt()}"
    return f"{onnxruntime.__version__} {config.provider} {libraries}"


def _tensorrt() -> str:
    """Its version, of the package or else of the library that the loader finds."""
    for package in TENSORRT_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    found = ctypes.util.find_library("nvinfer")
    return "of unknown version" if found is None else str(ctypes.CDLL(found).getInferLibVersion())


def check(config: DeviceConfig, info: GpuInfo) -> None:
    """UserError where the GPU computes in another type than the one chosen."""
    if config.provider == "tensorrt" and config.dtype == "float32" and info.capability >= CAPABILITY["tf32"]:
        raise UserError(
            f'device {config.name}: on a {info.name} TensorRT computes float32 networks in TF32: set dtype = "tf32"'
        )


@contextmanager
def settings(config: DeviceConfig) -> Iterator[None]:
    yield  # all of them belong to a session


def _half(model: bytes) -> bytes:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: bytes = convert_float_to_float16(onnx.load_from_string(model)).SerializeToString()
    return converted


def loaded(graph: OpGraph, weights: Weights, config: DeviceConfig, device: str, *, labelled: bool = False) -> Loaded:
    model = build(graph, weights)
    if config.dtype == "float16":
        model = _half(model)
    index, stream = torch.device(device).index or 0, torch.cuda.current_stream(device)
    cuda = {
        "device_id": index,
        "user_compute_stream": str(stream.cuda_stream),  # the one that the events are recorded on
        "use_tf32": int(config.dtype == "tf32"),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    providers: list[Any] = [(PROVIDERS["cuda"], cuda)]
    if config.provider == "tensorrt":
        half = {"trt_fp16_enable": config.dtype == "float16"}
        providers.insert(
            0, (PROVIDERS["tensorrt"], {key: cuda[key] for key in ("device_id", "user_compute_stream")} | half)
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    wanted, got = PROVIDERS[config.provider], session.get_providers()
    if got[0] != wanted:  # it falls back on what it has, without a word
        raise DeviceError(f"onnxruntime cannot load its {wanted} (it runs on {got[0]}): are its libraries installed?")
    binding = session.io_binding()
    values = torch_cuda.inputs_of(graph, config, device)
    for source, value in zip(session.get_inputs(), values, strict=True):
        element = np.float16 if config.dtype == "float16" else np.float32
        binding.bind_input(source.name, "cuda", index, element, tuple(value.shape), value.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", index)
    run_options = onnxruntime.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    kept = values  # the session reads their memory

    def run() -> object:
        session.run_with_iobinding(binding, run_options)
        return kept

    return Loaded(graph, run)
