"""The commands on a GPU that is not there, and what they say where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu
from torch import nn

from amc_hw.errors import DeviceError, UserError
from amc_hw.refit import reestimate_batch_norm
from amc_hw.task import accuracy, check_eval_device, on
from profilers.runtimes import torch_cuda
from profilers.targets.cuda import CudaTarget

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
SUBJECT = ("--device", "cuda-batch50", "--model", "nets.py:tiny")
DATA = ("--data", "npz:images.npz")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr("profilers.targets.cuda.TorchGpu", lambda name: gpu)
    monkeypatch.setattr(CudaTarget, "time_in_fresh_process", CudaTarget.time_networks)
    monkeypatch.setattr(torch_cuda, "_captured", lambda module, inputs, device: lambda: module(*inputs))
    return gpu


@pytest.mark.slow
def test_profile_search_and_measure_on_a_gpu(here: Path, fake_gpu: FakeGpu, amc_hw: Callable) -> None:
    profiled = amc_hw("profile", *SUBJECT, "--max-minutes", "1", "--json")
    assert profiled.code == 0, profiled.err
    assert json.loads(profiled.out)["error_pct"] < 5
    header = json.loads(Path("latency_tables/cuda-batch50.jsonl").read_text().splitlines()[0])
    assert header["identity"]["soc"] == "NVIDIA TITAN Xp" and header["identity"]["batch"] == 50
    searched = amc_hw("search", *SUBJECT, *DATA, "--latency-ratio", "0.7", "--episodes", "4", "--json")
    assert searched.code == 0, searched.err
    found = json.loads(searched.out)
    assert found["measured_ms"] <= 0.7 * found["baseline_ms"] * 1.02
    measured = json.loads(amc_hw("measure", "--policy", found["policy"], "--json").out)
    assert measured["speedup"] == pytest.approx(found["speedup"], rel=0.02)


def test_a_type_that_a_device_does_not_have_is_a_line(here: Path, amc_hw: Callable) -> None:
    done = amc_hw("profile", "--device", "host", "--model", "nets.py:tiny", "--dtype", "bfloat16")
    assert done.code == 2 and "on this machine float32 and int8 are measured, not bfloat16" in done.mistake


@needs_none
@pytest.mark.parametrize("command", ["profile", "measure", "search", "compare"])
def test_without_a_gpu_the_exit_code_is_3(here: Path, amc_hw: Callable, command: str) -> None:
    half = (*DATA, "--latency-ratio", "0.5")
    more = {"measure": ("--widths", "8,8,8"), "search": half, "compare": half, "profile": ()}[command]
    done = amc_hw(command, "--device", "cuda", "--model", "nets.py:tiny", *more)
    assert done.code == 3 and "no CUDA GPU is to be seen" in done.mistake
    assert not Path("runs").exists()


# Scores computed on a GPU


@needs_none
def test_a_device_to_score_on_that_is_not_there_is_a_line(here: Path, amc_hw: Callable) -> None:
    search = ("search", "--device", "fake", "--model", "nets.py:tiny", *DATA, "--latency-ratio", "0.5")
    done = amc_hw(*search, "--eval-device", "cuda")
    assert done.code == 3 and done.mistake.startswith("amc-hw: --eval-device cuda: ")
    done = amc_hw(*search, "--eval-device", "abacus")
    assert done.code == 2 and done.mistake.startswith("amc-hw: --eval-device abacus: ")
    assert not Path("runs").exists()


def test_what_can_be_scored_on_is_checked() -> None:
    check_eval_device("cpu")
    with pytest.raises(UserError):
        check_eval_device("")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError):
            check_eval_device("cuda:1")


@pytest.mark.gpu
def test_a_search_that_scores_on_a_gpu_finds_what_one_on_the_cpu_does(here: Path, amc_hw: Callable) -> None:
    search = ("search", "--device", "fake", "--model", "nets.py:tiny", *DATA, "--latency-ratio", "0.6", "--json")
    found = {}
    for where in ("cpu", "cuda"):
        done = amc_hw(*search, "--method", "uniform", "--eval-device", where, "--out", where)
        assert done.code == 0, done.err
        found[where] = json.loads(done.out)
    assert found["cpu"]["widths"] == found["cuda"]["widths"]
    assert found["cpu"]["accuracy"] == pytest.approx(found["cuda"]["accuracy"], abs=0.01)


def test_a_gpu_scores_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with on(nn.Identity(), "meta"):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_a_gpu_whose_memory_does_not_suffice_for_scoring_is_a_line() -> None:
    told = "--eval-device meta: .*out of memory.*give --eval-device cpu"
    with pytest.raises(DeviceError, match=told), on(nn.Identity(), "meta"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("level", ["highest", "high", "medium"])
def test_the_precision_that_a_users_file_chose_is_given_back(level: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(level)
        with on(nn.Identity(), "meta"):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == level
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 10)).eval()
    images, labels = torch.randn(2000, 3, 32, 32), torch.randint(10, (2000,))
    here = accuracy(network, images, labels)
    assert here == pytest.approx(accuracy(network, images.cuda(), labels.cuda()), abs=0.005)
    assert here == pytest.approx(accuracy(network, images, labels, device="cuda"), abs=0.005)
    assert next(network.parameters()).device.type == "cpu"
    reestimate_batch_norm(network, images[:200])  # what a search does next, and writes in place
