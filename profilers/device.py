"""Device configurations: TOML files that say where and with which runtime to measure."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from profilers.errors import UserError

MANY = ("adb", "fake")  #: targets of which there may be several, told apart by serials and addresses
DTYPES = ("float32", "int8", "tf32", "float16", "bfloat16")
#: Of measuring operators: in context while random networks run, alone, or not at all (whole networks tell).
WAYS = ("auto", "context", "alone", "networks")


@dataclass(frozen=True)
class DeviceConfig:
    """One device.

    target: where it runs (a name in `profilers.targets.TARGETS`); runtime: how (in `profilers.runtimes.RUNTIMES`).
    threads: of the runtime. channel_multiple: widths are searched in multiples of it;
    0: of what the table tells, or 8.
    soc, runtime_version, source: of an archive, which cannot be asked; source says where its rows come from. soc of a
    GPU: a part of its name, and no other is taken.
    extrapolate: whether predictions may leave the widths that were measured, for tables that hold a few networks only.
    address (HOST:PORT) or serial: of a device over ADB, the only one attached where both are empty; serials: of several
    that are alike, addresses included: measurements are spread over them; runner: what times there (in
    `profilers.targets.adb_runners.RUNNERS`); program: its path on the device, of a runner that is not ours; download,
    sha256: where that program is to be had, and its checksum; python: the interpreter there; affinity: "any", "big" or
    a hexadecimal mask of cores; workdir: a folder for our files; lock: a path there, empty for one in workdir, and
    lock_wait_s: how long to wait for who holds it; fixed_performance: whether Android is to keep its clocks while it is
    timed; root: whether governors may be set. delegate: what runs a TFLite model there in place of the CPU, "gpu",
    "nnapi" or the path of a library on the device; delegate_options: the backend of a GPU, the accelerator of NNAPI, or
    what such a library takes.
    gpu: index or UUID of a CUDA GPU; execution: PyTorch's "eager", "compile" or "graph"; layout: "channels_first" or
    "channels_last"; provider: of ONNX Runtime on a GPU, "cuda" or "tensorrt"; clock: "events" of the GPU, or "host",
    launches included; flush_l2: whether the L2 cache is emptied before every run; shared: whether others may use it.
    slowest_s: how long an inference over ADB may take: a job that takes much longer hangs.
    min_time_s: how long a network is timed at least; noise_pct: the spread above which a machine is too unstable.
    """

    name: str
    target: str
    runtime: str
    description: str = ""
    threads: int = 1
    batch: int = 1
    dtype: str = "float32"
    channel_multiple: int = 0
    soc: str = ""
    runtime_version: str = ""
    source: str = ""
    extrapolate: bool = False
    address: str = ""
    serial: str = ""
    serials: tuple[str, ...] = ()
    runner: str = "python"
    program: str = ""
    download: str = ""
    sha256: str = ""
    python: str = "python3"
    affinity: str = "any"
    workdir: str = "/data/local/tmp/amc-hw"
    lock: str = ""
    lock_wait_s: float = 120.0
    fixed_performance: bool = True
    root: bool = False
    slowest_s: float = 1.25
    delegate: str = ""
    delegate_options: str = ""
    gpu: str = ""
    execution: str = "eager"
    layout: str = "channels_first"
    provider: str = "cuda"
    clock: str = "events"
    flush_l2: bool = False
    shared: bool = False
    min_time_s: float = 0.3
    noise_pct: float = 25.0

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("batch", 1), ("channel_multiple", 0)):
            if getattr(self, name) < least:
                raise UserError(f"device {self.name}: {name} must be at least {least}, not {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise UserError(f"device {self.name}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for name in ("min_time_s", "noise_pct", "slowest_s"):
            if not getattr(self, name) > 0:  # NaN is not, either
                raise UserError(f"device {self.name}: {name} must be positive")
        if not re.fullmatch("any|big|[0-9a-f]+", self.affinity):
            raise UserError(
                f"device {self.name}: affinity {self.affinity!r} must be any, big, or a hexadecimal mask such as f0"
            )
        if self.lock_wait_s < 0:
            raise UserError(f"device {self.name}: lock_wait_s must not be negative")
        if (self.serials or self.serial or self.address) and self.target not in MANY:
            raise UserError(f"device {self.name}: it is not reached over ADB: leave serials and addresses out")
        if (self.delegate or self.delegate_options) and self.target != "adb":
            raise UserError(f"device {self.name}: delegates are of devices over ADB: leave them out")
        if self.delegate_options and not self.delegate:
            raise UserError(f"device {self.name}: delegate_options without a delegate")
        if self.serials and (self.serial or self.address):
            raise UserError(f"device {self.name}: serials stand alone: leave serial and address out")

    @property
    def whole_only(self) -> bool:
        """Whether only whole networks tell latencies: where they are quantized, or converted where they begin and end,
        or run by a delegate, operators that are timed alone do not add up."""
        return self.dtype == "int8" or bool(self.delegate) or (self.target == "adb" and self.dtype != "float32")

    def at(self, serials: Sequence[str]) -> DeviceConfig:
        """The same device, of these serials or addresses; as it is where none is given."""
        return replace(self, serial="", address="", serials=tuple(serials)) if serials else self

    def members(self) -> list[DeviceConfig]:
        """One configuration for each of the `serials`; itself where there are none."""
        return [replace(self, serial=each, serials=()) for each in dict.fromkeys(self.serials)] or [self]

    @property
    def member(self) -> str:
        """Which of several devices: a name that tells nothing of its serial or address; empty where none is given."""
        named = self.serial or self.address
        return hashlib.sha256(named.encode()).hexdigest()[:8] if named else ""


def shipped(folder: str) -> Path:
    """The folder `device_configs` or `latency_tables` that came with the package."""
    inside = Path(__file__).parent / "_shipped" / folder
    return inside if inside.is_dir() else Path(__file__).parents[1] / folder


def search_folders(folder: str) -> list[Path]:
    """Where to look: the user's own folder first, then what was shipped."""
    return [Path(folder), shipped(folder)]


def device_names() -> list[str]:
    return sorted({path.stem for folder in search_folders("device_configs") for path in folder.glob("*.toml")})


def load_device(name: str, *, _aliases: tuple[str, ...] = ()) -> DeviceConfig:
    """The configuration `name`; UserError where it is unknown or its TOML is not right."""
    for folder in search_folders("device_configs"):
        path = folder / f"{name}.toml"
        if "/" not in name and path.is_file():
            data = _read(path)
            alias = data.pop("alias", None)
            if alias is not None:
                if data or alias in (name, *_aliases):
                    raise UserError(f"{path}: an alias stands alone and names another device")
                return load_device(str(alias), _aliases=(*_aliases, name))
            return _checked(name, path, data)
    known = device_names()
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"unknown device {name!r}: {hint}known: {', '.join(known)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _checked(name: str, path: Path, data: dict[str, Any]) -> DeviceConfig:
    types = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "tuple[str, ...]": (list,)}
    known = {field.name: types[str(field.type)] for field in fields(DeviceConfig) if field.name != "name"}
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        if type(value) not in known[key] or (type(value) is list and not all(type(each) is str for each in value)):
            raise UserError(f"{path}: {key} = {value!r} is of the wrong type")
    for key in ("target", "runtime"):
        if key not in data:
            raise UserError(f"{path}: {key} is missing")
    lists = {key: tuple(value) for key, value in data.items() if type(value) is list}
    return DeviceConfig(name=name, **data | lists)
