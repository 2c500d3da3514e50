"""GPUs: everything but the kernels on a stand-in, and the same on a real one where there is one."""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import COOL, FakeGpu, op_ms, sleeps

from profilers import gpu as gpus
from profilers.builders import torch as torch_builder
from profilers.builders.weights import random_weights
from profilers.device import DeviceConfig, load_device
from profilers.errors import DeviceError, UserError
from profilers.gpu import BUSY_PCT, CAPABILITY, LOOK_S, Gpu, GpuState, TorchGpu, lasting, runs_on
from profilers.multiple import channel_multiple
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.predictor import Predictor
from profilers.processor import this_processor
from profilers.profile import Anchor, ProfileJob, missing_steps
from profilers.runtimes import ort_cuda, torch_cuda
from profilers.table import LatencyTable
from profilers.targets import Network, open_target
from profilers.targets.cuda import DTYPES, WAITS_S, CudaTarget
from profilers.timing import TimingPlan

PLAN = TimingPlan(rounds=5, burst_s=0.005, min_runs=2, warmup_runs=1)
CONFIG = DeviceConfig("cuda", "cuda", "torch_cuda", batch=2)
HOT = replace(COOL, sm_mhz=900, temperature_c=92, slowed=("thermal slowdown",))


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return FakeGpu() if request.param == "fake" else TorchGpu()


def network(channels: int = 16, size: int = 16, batch: int = 2) -> OpGraph:
    """A stem, a depthwise and a pointwise convolution, a sum, a classifier."""
    stem = OpSpec("conv", (3,), size, size, channels, (3, 3), padding=(1, 1), activation="relu", batch=batch)
    depthwise = OpSpec(
        "depthwise_conv", (channels,), size, size, channels, (3, 3), padding=(1, 1), groups=channels, batch=batch
    )
    nodes = (
        OpNode("stem", stem, (OpGraph.INPUT,)),
        OpNode("block.depthwise", replace(depthwise, activation="relu6"), ("stem",)),
        OpNode("block.pointwise", OpSpec("conv", (channels,), size, size, channels, batch=batch), ("block.depthwise",)),
        OpNode("sum", OpSpec("add", (channels,) * 2, size, size, channels, batch=batch), ("block.pointwise", "stem")),
        OpNode("pool", OpSpec("global_avg_pool", (channels,), size, size, channels, batch=batch), ("sum",)),
        OpNode("classes", OpSpec("linear", (channels,), 1, 1, 10, batch=batch), ("pool",)),
    )
    return OpGraph(nodes, (3, size, size), ("classes",))


# Times


def test_times_are_of_every_network_and_round(gpu: Gpu) -> None:
    target = CudaTarget(CONFIG, gpu)
    large = network(64, 64) if isinstance(gpu, FakeGpu) else network(512, 128)  # more than launches on a real one
    samples = target.time_networks([Network(network(8)), Network(large)], PLAN, seed=0)
    assert [len(each) for each in samples] == [5, 5]
    assert all(math.isfinite(ms) and ms > 0 for each in samples for ms in each)
    assert np.median(samples[0]) < np.median(samples[1])
    again = target.time_networks([Network(large)], PLAN, seed=1)
    assert np.median(again[0]) == pytest.approx(np.median(samples[1]), rel=0.3)


def test_clocks_have_risen_before_anything_counts() -> None:
    gpu = FakeGpu(cold=200)
    (samples,) = CudaTarget(CONFIG, gpu).time_networks([Network(network())], PLAN, seed=0)
    truth = 0.01 + sum(map(op_ms, network().ops))
    assert samples == pytest.approx([truth] * 5, rel=0.01)


@pytest.mark.parametrize(("clock", "flush"), [("events", False), ("host", False), ("events", True)])
def test_choices_reach_the_gpu_and_the_identity(clock: str, flush: bool) -> None:
    gpu = FakeGpu("NVIDIA A100")
    target = CudaTarget(replace(CONFIG, clock=clock, flush_l2=flush), gpu)
    target.time_networks([Network(network())], PLAN, seed=0)
    assert {asked[1:] for asked in gpu.asked} == {(flush, clock == "host")}
    identities = {
        CudaTarget(replace(CONFIG, **change), gpu).identity()
        for change in ({}, {"clock": "host"}, {"flush_l2": True}, {"layout": "channels_last"}, {"execution": "graph"})
    }
    assert len(identities) == 5
    assert (
        len({CudaTarget(replace(CONFIG, **each), gpu).identity() for each in ({}, {"batch": 50}, {"dtype": "tf32"})})
        == 3
    )
    assert "GPU-0" not in str(identities)
    launched = {
        each.runtime_version for each in identities if f"launched by {this_processor()}" in each.runtime_version
    }
    assert len(launched) == 4  # a graph replayed is the GPU's alone


def test_a_bursts_runs_follow_from_how_long_one_takes() -> None:
    gpu = FakeGpu(cold=0)
    CudaTarget(CONFIG, gpu).time_networks([Network(network(8)), Network(network(256, 64))], PLAN, seed=0)
    counts = [count for count, *_ in gpu.asked[2:]]
    assert min(counts) >= PLAN.min_runs and len(set(counts)) > 1


# A GPU that is hot, busy, too small, or another


def test_rounds_in_which_the_gpu_slowed_down_are_measured_again() -> None:
    slept, sleep = sleeps()
    gpu = FakeGpu(states=(COOL, COOL, COOL, HOT, HOT, HOT, COOL))
    target = CudaTarget(CONFIG, gpu, sleep=sleep)
    with pytest.warns(UserWarning, match="the GPU slows down .thermal slowdown.: measuring again in 1 s"):
        (samples,) = target.time_networks([Network(network())], PLAN, seed=0)
    assert len(samples) == 5 and slept == list(WAITS_S[:2])


def test_a_gpu_that_keeps_slowing_down_is_given_up() -> None:
    slept, sleep = sleeps()
    target = CudaTarget(CONFIG, FakeGpu(states=(HOT,)), sleep=sleep)
    with pytest.warns(UserWarning), pytest.raises(DeviceError, match="keeps slowing down .thermal slowdown.: let it"):
        target.time_networks([Network(network())], PLAN, seed=0)
    assert slept == list(WAITS_S)
    assert not {probe.name: probe for probe in target.probes()}["clocks"].ok


def test_the_ordinary_power_limit_is_recorded_and_no_reason_to_stop() -> None:
    target = CudaTarget(CONFIG, FakeGpu(states=(replace(COOL, slowed=("power",)),)))
    assert target.time_networks([Network(network())], PLAN, seed=0)
    assert target.conditions()["slowed"] == ["power"]


def test_a_gpu_that_others_use_is_refused_or_said() -> None:
    gpu = FakeGpu(others=("process 42", "97% in use"))
    target = CudaTarget(CONFIG, gpu)
    with pytest.raises(DeviceError, match=r"the GPU is busy .process 42, 97% in use.: .* 'shared = true'"):
        target.time_networks([Network(network())], PLAN, seed=0)
    assert not gpu.asked and [probe.name for probe in target.probes() if not probe.ok] == ["others"]
    with pytest.warns(UserWarning, match="others use the GPU"):
        assert CudaTarget(replace(CONFIG, shared=True), gpu).time_networks([Network(network())], PLAN, seed=0)
    assert target.provenance()["others"] == ["process 42", "97% in use"]


def test_who_else_is_there_is_asked_before_anything_of_ours_is() -> None:
    gpu = FakeGpu()
    target = CudaTarget(CONFIG, gpu)
    target.identity()
    gpu._others = ["process 7", "process 8"]  # workers of a search
    assert target.time_networks([Network(network())], PLAN, seed=0)


def test_a_choice_that_is_none_is_told_before_anything_runs() -> None:
    gpu = FakeGpu()
    with pytest.raises(UserError, match="unknown execution 'slow'"):
        CudaTarget(replace(CONFIG, execution="slow"), gpu).time_networks([Network(network())], PLAN, seed=0)
    assert not gpu.asked


@pytest.mark.parametrize(
    ("looks", "found", "waits"),
    [
        ((0, 90), 0, 0),
        ((97, 40, 0), 0, 2),
        ((97, 3), 3, 1),
        ((97, 95, 99, 0), 95, 2),
        ((BUSY_PCT + 1,) * 3, BUSY_PCT + 1, 2),
    ],
)
def test_what_this_process_did_a_moment_ago_is_nobody_elses(looks: tuple[int, ...], found: int, waits: int) -> None:
    readings, slept = iter(looks), list[float]()
    assert lasting(lambda: next(readings), sleep=slept.append) == found
    assert slept == [LOOK_S] * waits


def test_a_network_that_does_not_fit_is_a_line() -> None:
    target = CudaTarget(CONFIG, FakeGpu(memory=10_000))
    with pytest.raises(
        DeviceError, match="memory .12000 MiB. is too small for batch 2: set a smaller 'batch'"
    ) as caught:
        target.time_networks([Network(network(64, 64))], PLAN, seed=0)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_a_type_that_the_card_does_not_have_is_refused(dtype: str) -> None:
    config = replace(CONFIG, dtype=dtype)
    with pytest.raises(DeviceError, match=f"a NVIDIA TITAN Xp has no {dtype}: compute capability 8.0 has, it is 6.1"):
        CudaTarget(config, FakeGpu()).identity()
    assert CudaTarget(config, FakeGpu("NVIDIA A100")).identity().dtype == dtype


def test_compiled_kernels_are_refused_where_there_are_none() -> None:
    config = replace(CONFIG, execution="compile")
    with pytest.raises(DeviceError, match="torch.compile has no kernels for a NVIDIA TITAN Xp: .* 7.0 or more"):
        CudaTarget(config, FakeGpu()).identity()
    assert "compile" in CudaTarget(config, FakeGpu("Tesla T4")).identity().runtime_version


def test_tensorrt_is_refused_float32_where_it_would_take_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda.onnxruntime, "get_available_providers", lambda: list(ort_cuda.PROVIDERS.values()))
    config = replace(CONFIG, runtime="onnxruntime", provider="tensorrt")
    with pytest.raises(UserError, match="on a NVIDIA A100 TensorRT computes float32 networks in TF32: set dtype"):
        CudaTarget(config, FakeGpu("NVIDIA A100")).identity()
    assert CudaTarget(config, FakeGpu("Tesla T4")).identity().dtype == "float32"


def test_a_gpu_that_cannot_be_opened_is_a_line() -> None:
    said = "the GPU cannot be opened .CUDA error: out of memory.: is its memory full"
    with pytest.raises(DeviceError, match=said) as caught, gpus._opened():
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "other"), [((6, 1), "install a build for an older CUDA"), ((12, 0), "install a newer PyTorch")]
)
def test_a_gpu_that_pytorch_has_no_kernels_for(capability: tuple[int, int], other: str) -> None:
    gpu = object.__new__(TorchGpu)
    gpu._info = replace(FakeGpu().info(), capability=capability)
    gpu._torch = SimpleNamespace(cuda=SimpleNamespace(get_arch_list=lambda: ["sm_75", "sm_80", "sm_90a"]))
    with pytest.raises(DeviceError, match=f"no kernels for a .*it has sm_75, sm_80, sm_90a.: {other}"):
        gpu._refuse_old()


def test_what_a_card_does_not_tell_is_left_out() -> None:
    silent = FakeGpu(states=(replace(COOL, power_w=None, memory_mhz=None),))
    target = CudaTarget(CONFIG, silent)
    assert target.time_networks([Network(network())], PLAN, seed=0)
    assert target.conditions()["power_w"] is None
    assert {probe.name: probe for probe in target.probes()}["clocks"].text == "1800 MHz, 50 degrees"


def test_sensors_that_a_card_lacks_are_no_reason_to_refuse_it() -> None:
    class NotSupported(Exception):
        pass

    def unsupported(*_: object) -> int:
        raise NotSupported

    gpu = object.__new__(TorchGpu)
    gpu._handle = None
    gpu._nvml = SimpleNamespace(
        NVMLError=NotSupported,
        NVMLError_NotSupported=NotSupported,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x24,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1500}.get(kind) or unsupported(),
        nvmlDeviceGetTemperature=lambda handle, kind: 60,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetPowerUsage=unsupported,
    )
    assert gpu.state() == GpuState(1500, None, 60, None, ("thermal slowdown", "power"))
    gpu._nvml.nvmlDeviceGetCurrentClocksThrottleReasons = unsupported  # without those times cannot be trusted
    with pytest.raises(DeviceError, match="NVML does not say how the GPU is doing"):
        gpu.state()


def test_another_gpu_than_the_configurations_is_refused() -> None:
    assert CudaTarget(load_device("titan-xp"), FakeGpu()).identity().batch == 50
    with pytest.raises(DeviceError, match="the GPU here is a NVIDIA TITAN Xp, device h100 is a H100: --device cuda"):
        CudaTarget(load_device("h100"), FakeGpu()).identity()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runtime": "litert"}, "runtime is one of torch_cuda, onnxruntime, not 'litert'"),
        ({"dtype": "int8"}, "dtype is one of float32, tf32, float16, bfloat16, not 'int8'"),
        ({"layout": "rows"}, "layout is one of channels_first, channels_last, not 'rows'"),
        ({"clock": "sun"}, "clock is one of events, host, not 'sun'"),
        ({"execution": "slow"}, "unknown execution 'slow'; known: eager, compile, graph"),
        ({"runtime": "onnxruntime", "provider": "x"}, "unknown provider 'x'; known: cuda, tensorrt"),
        ({"runtime": "onnxruntime", "execution": "graph"}, "execution and layout are PyTorch's"),
        ({"runtime": "onnxruntime", "dtype": "bfloat16"}, "float32, tf32 or float16, not bfloat16"),
    ],
)
def test_choices_that_are_none_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CudaTarget(replace(CONFIG, **change), FakeGpu()).identity()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_installed_is_told(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    target = CudaTarget(replace(CONFIG, runtime="onnxruntime", provider=provider, dtype="tf32"), FakeGpu("NVIDIA A100"))
    with pytest.raises(DeviceError, match=f"(?i)has no {provider}.*it has CPUExecutionProvider.*onnxruntime-gpu"):
        target.identity()
    assert [probe.ok for probe in target.probes()] == [True, False]


def test_the_libraries_of_a_provider_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda.onnxruntime, "get_available_providers", lambda: list(ort_cuda.PROVIDERS.values()))
    target = CudaTarget(
        replace(CONFIG, runtime="onnxruntime", provider="tensorrt", dtype="tf32"), FakeGpu("NVIDIA A100")
    )

    def version() -> str:
        return target.identity().runtime_version

    assert f" cuDNN {torch.backends.cudnn.version()} " in version()
    monkeypatch.setattr(ort_cuda.ctypes.util, "find_library", lambda name: None)
    assert "TensorRT of unknown version" in version()
    monkeypatch.setattr(ort_cuda.ctypes.util, "find_library", lambda name: f"lib{name}.so.10")
    monkeypatch.setattr(ort_cuda.ctypes, "CDLL", lambda name: SimpleNamespace(getInferLibVersion=lambda: 101300))
    assert "TensorRT 101300," in version()
    monkeypatch.setattr(ort_cuda.metadata, "version", lambda name: {"tensorrt": "10.13.0"}[name])
    assert "TensorRT 10.13.0," in version()


def test_a_provider_that_falls_back_is_not_measured_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says that it has a provider, cannot load its libraries, and takes another."""
    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort_cuda.onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    real = ort_cuda.onnxruntime.InferenceSession
    monkeypatch.setattr(
        ort_cuda.onnxruntime,
        "InferenceSession",
        lambda model, options, providers: real(model, options, providers=["CPUExecutionProvider"]),
    )
    target = CudaTarget(replace(CONFIG, runtime="onnxruntime"), FakeGpu())
    with pytest.raises(DeviceError, match="cannot load its CUDAExecutionProvider .it runs on CPUExecutionProvider"):
        target.time_networks([Network(network())], PLAN, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_a_line_says_so() -> None:
    target = open_target(load_device("cuda"))
    with pytest.raises(DeviceError, match="no CUDA GPU is to be seen .PyTorch .*: check 'nvidia-smi'") as caught:
        target.identity()
    assert caught.value.exit_code == 3
    assert [probe.ok for probe in target.probes()] == [False]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_50", "sm_60", "sm_70"], (6, 1), True),
        (["sm_75", "sm_80", "sm_90"], (6, 1), False),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_100", "sm_120"], (9, 0), False),
    ],
)
def test_which_kernels_run_where(built: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(built, *capability) is runs


# The network itself


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_network_computes_the_network(layout: str, dtype: str) -> None:
    graph, weights = network(), random_weights(network())
    config = replace(CONFIG, layout=layout, dtype=dtype)
    loaded = torch_cuda.loaded(graph, weights, config, "cpu")
    plain = torch_builder.Network(graph, weights)(*torch_cuda.inputs_of(graph, CONFIG, "cpu"))[0]
    found = loaded.run()[0]  # type: ignore[index]
    assert found.dtype == torch_cuda.DTYPES[dtype]
    assert torch.allclose(
        found.float(), plain, rtol=1e-4 if dtype == "float32" else 0.05, atol=1e-4 if dtype == "float32" else 0.1
    )


def test_switches_are_set_back() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ValueError), torch_cuda.settings(replace(CONFIG, dtype="tf32")):
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
        raise ValueError
    after = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert after == before


def test_tf32_is_switched_by_the_names_that_a_program_uses() -> None:
    """A user's file that sets one by the names since PyTorch 2.9 makes those of before unreadable."""
    code = """
import torch
from profilers.gpu import tf32

parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
parts[0].fp32_precision, parts[1].fp32_precision = "tf32", "ieee"
before = [each.fp32_precision for each in parts]
for allowed, name in ((True, "tf32"), (False, "ieee")):
    with tf32(allowed):
        print([each.fp32_precision for each in parts] == [name] * 3)
    print([each.fp32_precision for each in parts] == before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.parametrize("limit", ["recompile_limit", "cache_size_limit"])
def test_compilations_are_not_limited_under_either_name(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched: dict[str, Any] = {}

    def patch(values: dict[str, Any]) -> AbstractContextManager[None]:
        patched.update(values)
        return nullcontext()

    import torch._dynamo

    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace(patch=patch, **{limit: 8}))
    with torch_cuda.settings(replace(CONFIG, execution="compile")):
        pass
    most = torch_cuda.MOST_COMPILED
    hit = {"recompile_limit": "fail_on_recompile_limit_hit", "cache_size_limit": "fail_on_cache_limit_hit"}[limit]
    assert patched == {limit: most, f"accumulated_{limit}": most, hit: True}


def test_every_network_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the code of their module, of which PyTorch would compile eight versions and run the others eagerly."""
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    monkeypatch.setattr(torch_cuda.torch, "compile", functools.partial(torch.compile, backend=backend))
    config = replace(CONFIG, execution="compile")
    with torch_cuda.settings(config):
        for channels in range(8, 20):
            graph = network(channels, 8)
            torch_cuda.loaded(graph, random_weights(graph), config, "cpu").run()
    assert len(compiled) == 12


def test_the_profiler_gives_labels_back_as_they_were() -> None:
    conv = OpSpec("conv", (3,), 8, 8, 4, batch=1)
    nodes = (OpNode("2.0", conv, (OpGraph.INPUT,)), OpNode("3.10", replace(conv, in_channels=(4,)), ("2.0",)))
    graph = OpGraph(nodes, (3, 8, 8), ("3.10",))
    module = torch_builder.Network(graph, random_weights(graph), labelled=True)
    with torch.profiler.profile() as profiler:
        module(torch.randn(1, 3, 8, 8))
    assert {f"{torch_builder.LABEL}{node.name}" for node in nodes} <= {event.name for event in profiler.events()}


@pytest.mark.filterwarnings("ignore:kernels take less")
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_operators_are_read_in_context_where_kernels_are_of_one_operator(gpu: Gpu, execution: str) -> None:
    found = CudaTarget(replace(CONFIG, execution=execution), gpu).profile_ops(network(64, 32), time_s=0.1)
    assert found is not None and set(found) == {node.name for node in network().nodes}
    assert all(ms > 0 for ms in found.values())
    for change in ({"execution": "compile"}, {"runtime": "onnxruntime"}):
        assert CudaTarget(replace(CONFIG, **change), gpu).profile_ops(network(), time_s=0.1) is None


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_profiler_that_sees_no_kernels_gives_no_times(execution: str) -> None:
    target = CudaTarget(replace(CONFIG, execution=execution), FakeGpu(profiler=False))
    with pytest.raises(DeviceError, match="sees no kernels of stem, and 3 others: .* 'profile --way alone'"):
        target.profile_ops(network(), time_s=0.1)


@pytest.mark.parametrize(("waits_ms", "execution", "told"), [(0.0, "eager", 0), (1.0, "eager", 1), (1.0, "graph", 0)])
def test_a_gpu_that_waits_for_launches_is_told(waits_ms: float, execution: str, told: int) -> None:
    target = CudaTarget(replace(CONFIG, execution=execution), FakeGpu(cold=0, waits_ms=waits_ms))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert target.profile_ops(network(), time_s=0.1)
    assert ["waits for launches" in str(each.message) for each in caught] == [True] * told


# A table


def job(batch: int = 2) -> ProfileJob:
    grid = tuple(range(8, 129, 8))
    fine = tuple(range(8, 129))
    return ProfileJob(lambda widths: network(widths[0], batch=batch), (grid,), (fine,), networks=24, calibration=12)


def test_a_table_predicts_and_shows_the_waves(tmp_path: Path) -> None:
    target = CudaTarget(CONFIG, FakeGpu(cold=0))
    table = LatencyTable.open(tmp_path / "cuda.jsonl", target.identity(), target.provenance())
    anchor = Anchor(target, job().unpruned, table)
    for step in missing_steps(job(), table, target):
        table.append(step.run(anchor))
    assert {row.context for row in table.of_type("op")} == {"in_context"}
    assert table.rows[0].details["conditions"]["sm_mhz"] == COOL.sm_mhz
    predictor = Predictor(table, target.lower)
    errors = [
        abs(predictor.predict(network(width)) / (0.01 + sum(map(op_ms, network(width).ops))) - 1)
        for width in (24, 60, 104)
    ]
    assert max(errors) < 0.1, errors
    assert channel_multiple(table) == 32


# On a GPU


def _skip_where_refused(target: CudaTarget) -> None:
    """A card of before Ampere has neither TF32 nor bfloat16, one of before Volta no compiled kernels."""
    have = TorchGpu().info().capability
    if have < CAPABILITY.get(target.config.dtype, (0, 0)) or (
        target.config.execution == "compile" and have < torch_cuda.TRITON
    ):
        with pytest.raises(DeviceError, match="compute capability"):
            target.identity()
        pytest.skip(f"compute capability {have} has no {target.config.execution} {target.config.dtype}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("execution", "dtype"),
    [(each, dtype) for each in ("eager", "graph") for dtype in DTYPES] + [("compile", "float16")],
)
def test_every_execution_and_type_runs(execution: str, dtype: str) -> None:
    target = CudaTarget(replace(CONFIG, execution=execution, dtype=dtype, layout="channels_last"))
    _skip_where_refused(target)
    samples = target.time_networks([Network(network(width, 32)) for width in (32, 24)], PLAN, seed=0)
    assert min(min(each) for each in samples) > 0


@pytest.mark.gpu
def test_graphs_of_several_networks_compute_each_its_own() -> None:
    """Replaying a graph whose memory was given back reads another network's data."""
    gpu, config = TorchGpu(), replace(CONFIG, execution="graph")
    graphs = [network(width, 32) for width in (8, 64, 16)]
    weights = [random_weights(graph) for graph in graphs]
    with torch_cuda.settings(config), gpu.working():
        loaded = [torch_cuda.loaded(*pair, config, gpu.device) for pair in zip(graphs, weights, strict=True)]
        torch.cuda.empty_cache()
        for each, graph, arrays in zip(loaded, graphs, weights, strict=True):
            found = each.run()[0][0]  # type: ignore[index]
            torch.cuda.synchronize()
            plain = torch_builder.Network(graph, arrays).to(gpu.device)
            wanted = plain(*torch_cuda.inputs_of(graph, config, gpu.device))[0]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="NVML is not installed")
def test_a_real_gpu_tells_what_it_is_and_how_it_does() -> None:
    gpu = TorchGpu()
    assert gpu.info().memory_mb > 1000 and gpu.state().sm_mhz > 0
    by_uuid = TorchGpu(gpu.info().uuid)
    assert by_uuid.info() == gpu.info()
    with pytest.raises(DeviceError, match="there is no GPU '99': give an index below"):
        TorchGpu("99")
    assert all(probe.ok for probe in CudaTarget(CONFIG, gpu).probes() if probe.name != "others")


@pytest.mark.gpu
def test_a_fresh_process_gives_times_alike() -> None:
    """Within a half: cuDNN chooses algorithms anew there. Without launches, which are as fast as the host is."""
    target = CudaTarget(replace(CONFIG, execution="graph"))
    networks = [Network(network(512, 128)), Network(network(32, 64), random_weights(network(32, 64)))]
    here, there = target.time_networks(networks, PLAN, seed=0), target.time_in_fresh_process(networks, PLAN, seed=0)
    for one, other in zip(here, there, strict=True):
        assert 2 / 3 < np.median(one) / np.median(other) < 3 / 2
    assert np.median(there[0]) > 2 * np.median(there[1])


@pytest.mark.gpu
def test_too_large_a_batch_is_a_line_and_the_next_network_runs() -> None:
    target = CudaTarget(replace(CONFIG, batch=200_000))
    with pytest.raises(DeviceError, match="is too small for batch 200000"):
        target.time_networks([Network(network(512, 224, batch=200_000))], PLAN, seed=0)
    assert CudaTarget(CONFIG).time_networks([Network(network())], PLAN, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in ort_cuda.onnxruntime.get_available_providers(), reason="CPU build")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
def test_onnxruntime_runs_on_the_gpu(dtype: str) -> None:
    target = CudaTarget(replace(CONFIG, runtime="onnxruntime", dtype=dtype))
    _skip_where_refused(target)
    (samples,) = target.time_networks([Network(network(32, 32))], PLAN, seed=0)
    assert min(samples) > 0
