"""An NVIDIA GPU as the CUDA target sees it: what it is, how it is doing, and how long it takes.

`TorchGpu` asks CUDA and NVML. Everything that needs a GPU's answers goes through `Gpu`, so a stand-in can give them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from profilers.errors import DeviceError
from profilers.ops import OpGraph

#: NVML's reasons for lower clocks that make times worthless, by bit; "power" is the ordinary limit of a busy GPU.
SLOWED = {0x8: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
POWER = 0x4
BUSY_PCT = 10  #: of the last second, from which a GPU is someone's
LOOKS, LOOK_S = 3, 1.2  #: NVML's last second is at most that long
L2_BYTES = 256 << 20  #: written to push everything else out: more than any GPU's L2 cache holds
CAPABILITY = {"tf32": (8, 0), "bfloat16": (8, 0)}  #: of a GPU that has a type: from Ampere on
SPIN_S, AWAKE_S = 0.3, 0.5  #: of matrix products, after which an idle GPU's clocks are up; that they stay up for, idle


@dataclass(frozen=True)
class GpuInfo:
    """capability: (major, minor) of CUDA; uuid never leaves this process."""

    name: str
    uuid: str
    driver: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_mb: int


@dataclass(frozen=True)
class GpuState:
    """At one moment; None for what a card does not tell. slowed: why clocks are held down, as in SLOWED, or "power"."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    slowed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"slowed": list(self.slowed)}


@dataclass(frozen=True)
class Loaded:
    """A network on the GPU. run: enqueues one inference on the current stream and returns without waiting."""

    graph: OpGraph
    run: Callable[[], object]


class Gpu(Protocol):
    device: str  #: as torch names it

    def info(self) -> GpuInfo: ...

    def state(self) -> GpuState: ...

    def others(self) -> list[str]:
        """What else uses the GPU, a few words each."""

    def working(self) -> AbstractContextManager[None]:
        """What is loaded and run inside belongs to the stream that is timed; clocks are up when it begins."""

    def time(self, loaded: Loaded, count: int, *, flush: bool, host: bool) -> list[float]:
        """Milliseconds of each of `count` runs: by events on the stream, or with `host` from the call until the GPU is
        done. flush: the L2 cache is emptied before each, untimed."""

    def kernels(self, loaded: Loaded, count: int) -> dict[str, float]:
        """Milliseconds of kernels in one run, per node of a network that labels them (`Network.labelled`)."""


class TorchGpu:
    """gpu: an index, or a UUID as `nvidia-smi -L` shows it; empty for the first. DeviceError where there is none, it is
    too old for this PyTorch, or NVML is not installed or says nothing."""

    def __init__(self, gpu: str = "") -> None:
        import torch

        self._torch = torch
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            raise DeviceError(
                f"no CUDA GPU is to be seen (PyTorch {torch.__version__}, {built}): check 'nvidia-smi' and the driver"
            )
        try:
            import pynvml
        except ImportError:
            raise DeviceError("clocks and throttling cannot be watched: pip install 'amc-hw[cuda]'") from None
        self._nvml = pynvml
        with _opened():
            self._index = self._found(gpu)
            self.device = f"cuda:{self._index}"
            properties = torch.cuda.get_device_properties(self._index)
        with self._told():
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
        self._info = GpuInfo(
            properties.name,
            f"GPU-{properties.uuid}",
            driver,
            (properties.major, properties.minor),
            properties.multi_processor_count,
            properties.total_memory >> 20,
        )
        self._refuse_old()
        self._flushed: Any = None
        self._worked = -math.inf  # when work ended, on the monotonic clock
        with _opened():
            # one of its own: ONNX Runtime takes the default one for none, and would run on another than the timed one
            self._stream = torch.cuda.Stream(self.device)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:  # a part of a GPU, a virtual one, a driver without its library
            raise DeviceError(f"NVML does not say how the GPU is doing ({error}): check 'nvidia-smi'") from None

    def _found(self, gpu: str) -> int:
        count = self._torch.cuda.device_count()
        uuids = [f"GPU-{self._torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
        if gpu in uuids:
            return uuids.index(gpu)
        if gpu.isdigit() and int(gpu) < count or not gpu:
            return int(gpu or 0)
        raise DeviceError(f"there is no GPU {gpu!r}: give an index below {count}, or a UUID of 'nvidia-smi -L'")

    def _refuse_old(self) -> None:
        major, minor = self._info.capability
        built = self._torch.cuda.get_arch_list()
        if built and not runs_on(built, major, minor):
            newest = max(_version(arch) for arch in built)
            other = "newer PyTorch" if (major, minor) > newest else "build for an older CUDA"
            raise DeviceError(
                f"this PyTorch has no kernels for a {self._info.name} (compute capability {major}.{minor}; it has "
                f"{', '.join(built)}): install a {other} (docs/devices.md)"
            )

    def info(self) -> GpuInfo:
        return self._info

    def state(self) -> GpuState:
        nvml, handle = self._nvml, self._handle
        with self._told():
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            slowed = [why for bit, why in {**SLOWED, POWER: "power"}.items() if reasons & bit]
            power_mw = self._reading(nvml.nvmlDeviceGetPowerUsage, handle)
            return GpuState(
                self._reading(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
                self._reading(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
                self._reading(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                None if power_mw is None else power_mw / 1000,
                tuple(slowed),
            )

    def _reading(self, ask: Callable[..., int], *arguments: Any) -> int | None:
        """What a card tells; None where it has no such sensor."""
        try:
            return ask(*arguments)
        except self._nvml.NVMLError_NotSupported:
            return None

    def others(self) -> list[str]:
        nvml = self._nvml
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            self._torch.cuda.synchronize(self._index)
            busy = lasting(lambda: nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except nvml.NVMLError:  # not told to everyone, inside containers above all
            return []
        found = [f"process {process.pid}" for process in running if process.pid != os.getpid()]
        if busy > BUSY_PCT:
            return [*found, f"{busy}% in use"]
        # a container's own process may have another number outside: one that idles does not make a GPU busy
        return found if len(found) > 1 else []

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._torch.cuda.stream(self._stream):
            if time.monotonic() - self._worked > AWAKE_S:
                self._spin()
            try:
                yield
            finally:
                self._worked = time.monotonic()

    def _spin(self) -> None:
        """Work until clocks have risen: libraries choose algorithms by the first runs, the unpruned network's."""
        torch, until = self._torch, time.monotonic() + SPIN_S
        with torch.inference_mode():
            square = torch.zeros(2048, 2048, device=self.device)
            while time.monotonic() < until:
                square @ square
                torch.cuda.synchronize()

    def time(self, loaded: Loaded, count: int, *, flush: bool, host: bool) -> list[float]:
        cuda = self._torch.cuda
        with cuda.device(self._index), self._torch.inference_mode():
            if host:
                return self._by_host(loaded, count, flush)
            pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(count)]
            for before, after in pairs:
                if flush:
                    self._flush()
                before.record()
                loaded.run()
                after.record()
            cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]

    def _by_host(self, loaded: Loaded, count: int, flush: bool) -> list[float]:
        found = []
        for _ in range(count):
            if flush:
                self._flush()
            self._torch.cuda.synchronize()
            start = time.perf_counter()
            loaded.run()
            self._torch.cuda.synchronize()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def _flush(self) -> None:
        if self._flushed is None:
            self._flushed = self._torch.empty(L2_BYTES, dtype=self._torch.uint8, device=self.device)
        self._flushed.zero_()

    def kernels(self, loaded: Loaded, count: int) -> dict[str, float]:
        from torch.profiler import ProfilerActivity, profile

        from profilers.builders.torch import LABEL

        labels = {f"{LABEL}{node.name}": node.name for node in loaded.graph.nodes}
        with self._torch.cuda.device(self._index), self._torch.inference_mode():
            loaded.run()
            self._torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
                for _ in range(count):
                    loaded.run()
                self._torch.cuda.synchronize()
        found: dict[str, float] = {}
        for event in profiler.events():  # a label stands once for the CPU, with the kernels that were launched below it
            if event.name in labels and event.device_type == self._torch.autograd.DeviceType.CPU:
                name = labels[event.name]
                found[name] = found.get(name, 0.0) + _device_us(event) / 1000 / count
        return found


@contextmanager
def _opened() -> Iterator[None]:
    """PyTorch opens a GPU at the first use, and says in many lines why it cannot."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise DeviceError(
            f"the GPU cannot be opened ({first}): is its memory full, or is it another program's alone? Check "
            "'nvidia-smi'"
        ) from None


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether GPUs compute float32 in TF32, whose products have ten bits; and back again."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    try:
        precision, before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # a program that has set one by its name since PyTorch 2.9 cannot read those of before
        parts = [matmul, cudnn.conv, cudnn.rnn]
        told = [part.fp32_precision for part in parts]
        for part in parts:
            part.fp32_precision = "tf32" if allowed else "ieee"
        try:
            yield
        finally:
            for part, value in zip(parts, told, strict=True):
                part.fp32_precision = value
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = before


def lasting(busy_pct: Callable[[], int], *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Percent of the time in which a GPU is in use while this process does nothing: what it did itself a moment ago
    passes, what others do stays."""
    least = busy_pct()
    for _ in range(LOOKS - 1):
        if least <= BUSY_PCT:
            break
        sleep(LOOK_S)
        least = min(least, busy_pct())
    return least


def runs_on(built: Sequence[str], major: int, minor: int) -> bool:
    """Whether kernels for some of these architectures (sm_90, compute_90) run on a GPU of that compute capability:
    binaries do on their own generation from their version on, intermediate code on everything newer."""
    for arch in built:
        version = _version(arch)
        if arch.startswith("sm_") and version[0] == major and version[1] <= minor:
            return True
        if arch.startswith("compute_") and version <= (major, minor):
            return True
    return False


def _version(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture such as sm_90a."""
    major, minor = divmod(int(arch.partition("_")[2].rstrip("af")), 10)
    return major, minor


def _device_us(event: Any) -> float:
    total = getattr(event, "device_time_total", None)  # cuda_time_total before PyTorch 2.5
    return float(event.cuda_time_total if total is None else total)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def harmful(states: Sequence[GpuState]) -> list[str]:
    """Why times between these states are worthless; empty where they are not."""
    return sorted({why for state in states for why in state.slowed if why in SLOWED.values()})
