"""The ADB target on a device that is a folder of this machine, and every way in which a link or a runner can fail.

`Folder` stands in for the wire: its shell is this machine's, its files lie below a temporary folder. What is measured
is real: the runner is started as a process and times LiteRT.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profilers.adb import RETRIES, AdbDevice, LinkLost, ServerLink, attached, open_device
from profilers.device import DeviceConfig, load_device
from profilers.errors import DeviceError, UserError
from profilers.ops import OpGraph, OpNode, OpSpec
from profilers.targets import Network, open_target
from profilers.targets.adb import LOCK_S, AdbTarget
from profilers.targets.adb_runners import VISIT
from profilers.timing import TimingPlan

PLAN = TimingPlan(rounds=3, burst_s=0.002)
needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")


class Folder:
    """A link to this machine. `fault(kind, number, value)` may change what passes, or raise; number counts per kind."""

    def __init__(self, fault: Callable[[str, int, bytes], bytes] | None = None) -> None:
        self.fault = fault or (lambda kind, number, value: value)
        self.counts: dict[str, int] = {}
        self.opened = 0

    def __call__(self) -> Folder:
        self.opened += 1
        return self

    def _passed(self, kind: str, value: bytes) -> bytes:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.fault(kind, self.counts[kind], value)

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return self._passed("shell", done.stdout)

    def send(self, data: bytes, path: str) -> None:
        Path(path).write_bytes(self._passed("send", data))

    def fetch(self, path: str) -> bytes:
        return self._passed("fetch", Path(path).read_bytes())

    def close(self) -> None:
        pass


def device(link: Folder) -> AdbDevice:
    return AdbDevice("phone", link, sleep=lambda seconds: None)


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    return DeviceConfig("phone", "adb", "litert", workdir=str(tmp_path / "a folder's"), python=sys.executable)


def small(channels: int = 8) -> OpGraph:
    op = OpSpec("conv", (3,), 16, 16, channels, kernel=(3, 3), padding=(1, 1), activation="relu")
    return OpGraph((OpNode("conv", op, (OpGraph.INPUT,)),), (3, 16, 16), ("conv",))


NETWORKS = [Network(small()), Network(small(64))]


# The wire


def test_commands_have_exit_codes_and_text(tmp_path: Path) -> None:
    phone = device(Folder())
    assert phone.try_run("echo hello; exit 3") == (3, "hello\n")
    assert phone.run("printf 'no newline'") == "no newline"
    with pytest.raises(DeviceError, match="phone: false ended with 1: no output"):
        phone.run("false")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_files_arrive_and_come_back_whole(tmp_path: Path, size: int) -> None:
    phone, path, data = device(Folder()), str(tmp_path / "it's $(a) file; rm"), bytes(range(256)) * (size // 256 + 1)
    phone.push(data[:size], path)
    assert phone.pull(path) == data[:size] and [file.name for file in tmp_path.iterdir()] == ["it's $(a) file; rm"]
    with pytest.raises(DeviceError, match="there is no"):
        phone.pull(str(tmp_path / "nothing"))


def lost(*_: Any) -> bytes:
    raise LinkLost("Connection reset by peer")


FAULTS: dict[str, Callable[[str, int, bytes], bytes]] = {
    "cut before a push": lambda kind, number, value: lost() if kind == "send" and number == 1 else value,
    "cut before a pull": lambda kind, number, value: lost() if kind == "fetch" and number == 1 else value,
    "cut in a command": lambda kind, number, value: lost() if kind == "shell" and number in (2, 5, 9) else value,
    "half of a push": lambda kind, number, value: value[: len(value) // 2] if kind == "send" and number == 2 else value,
    "a byte of a push": lambda kind, number, value: flipped(value) if kind == "send" and number in (1, 3) else value,
    "a byte of the result": lambda kind, number, value: flipped(value) if kind == "fetch" and number == 1 else value,
    "half of the result": lambda kind, number, value: value[:9] if kind == "fetch" and number == 1 else value,
    "last byte of a reply": lambda kind, number, value: value[:-2] if kind == "shell" and number % 7 == 3 else value,
    "nothing of a reply": lambda kind, number, value: b"" if kind == "shell" and number % 6 == 2 else value,
}


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_fails_now_and_then_costs_time_and_nothing_else(config: DeviceConfig, fault: str) -> None:
    link = Folder(FAULTS[fault])
    target = AdbTarget(config, device(link))
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    assert [len(each) for each in samples] == [3, 3] and all(0 < ms < 1000 for each in samples for ms in each)
    assert not Path(config.workdir, "lock").is_symlink()


ALWAYS: dict[str, tuple[Callable[[str, int, bytes], bytes], str]] = {
    "away": (lost, "phone cannot be reached .Connection reset by peer.: check the cable"),
    "pushes damaged": (lambda kind, n, value: flipped(value) if kind == "send" else value, "does not arrive whole"),
    "pulls damaged": (lambda kind, n, value: flipped(value) if kind == "fetch" else value, "does not come back whole"),
    "disk full": (lambda kind, n, value: value[:100] if kind == "send" else value, "is the device full"),
}


@needs_litert
@pytest.mark.parametrize("fault", ALWAYS)
def test_a_link_that_always_fails_is_an_error_and_no_number(config: DeviceConfig, fault: str) -> None:
    always, words = ALWAYS[fault]
    with pytest.raises(DeviceError, match=words) as caught:
        AdbTarget(config, device(Folder(always))).time_networks(NETWORKS, PLAN, seed=0)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_a_device_that_does_not_trust_us_is_not_asked_again() -> None:
    asked = []

    def refused() -> Any:
        asked.append(1)
        raise DeviceError("accept the key")

    with pytest.raises(DeviceError, match="accept the key"):
        AdbDevice("phone", refused, sleep=lambda seconds: None).run("true")
    assert len(asked) == 1


# Runners that fail


RUNNERS = {
    "crashes": ("exit 1", "the runner ended with 1"),
    "dies": ("kill -9 $$", "the runner ended with 137"),
    "prints rubbish": ("echo 'x y z' > result.json", "the runner's result is damaged"),
    "prints half a line": ('printf \'{"job": "\' > result.json', "the runner's result is damaged"),
    "says nothing": ("exit 0", "there is no .*result.json"),
    "gives another job's": ('echo \'{"job": "0", "samples_ms": [[1,1,1],[1,1,1]]}\' > result.json', "of another job"),
    "gives zeros": ("give '[[1,1,0],[1,1,1]]'", "did not give 3 times above zero for each of 2 models"),
    "gives too few": ("give '[[1,1,1]]'", "did not give 3 times above zero"),
    "gives no numbers": ("give '[[1,1,1],[1,NaN,1]]'", "did not give 3 times above zero"),
}


@needs_litert
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_runner_that_fails_is_an_error_and_no_number(config: DeviceConfig, tmp_path: Path, runner: str) -> None:
    body, words = RUNNERS[runner]
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = --probe ] && exec {shlex.quote(sys.executable)} "$@"\n'
        'give() { id=$(sed \'s/.*"id": "\\([0-9a-f]*\\)".*/\\1/\' job.json); '
        'echo "{\\"job\\": \\"$id\\", \\"samples_ms\\": $1}" > result.json; }\n'
        f"{body}\n"
    )
    python.chmod(0o755)
    target = AdbTarget(replace(config, python=str(python)), device(Folder()))
    with pytest.raises(DeviceError, match=words) as caught:
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert "\n" not in str(caught.value) and not Path(config.workdir, "lock").is_symlink()


def test_no_python_or_no_runtime_there_is_told(config: DeviceConfig, tmp_path: Path) -> None:
    target = AdbTarget(replace(config, python="/nowhere/python3"), device(Folder()))
    with pytest.raises(DeviceError, match="/nowhere/python3 does not run there .*benchmark_model"):
        target.identity()
    assert [probe.ok for probe in target.probes()] == [True, True, False]
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\necho \'{"runtimes": {"onnxruntime": "1.2"}}\'\n')
    bare.chmod(0o755)
    target = AdbTarget(replace(config, python=str(bare)), device(Folder()))
    with pytest.raises(DeviceError, match="litert is not installed there .found: onnxruntime."):
        target.identity()


# What is measured


@needs_litert
@pytest.mark.slow
def test_identity_provenance_and_probes(config: DeviceConfig) -> None:
    target = AdbTarget(config, device(Folder()))
    identity = target.identity()
    assert identity.runtime == "litert" and identity.runtime_version and identity.affinity == "any"
    assert "serial" not in json.dumps(target.provenance()) and target.provenance()["transport"] == "adb"
    assert all(probe.ok for probe in target.probes())
    target.clean()
    assert not Path(config.workdir).exists()


@needs_litert
def test_models_that_are_there_are_not_pushed_again(config: DeviceConfig) -> None:
    link = Folder()
    target = AdbTarget(config, device(link))
    target.time_networks(NETWORKS, PLAN, seed=0)
    before = link.counts["send"]
    target.time_networks(NETWORKS, PLAN, seed=1)
    assert link.counts["send"] == before + 1  # the job alone


@needs_litert
def test_a_model_that_was_cut_on_the_device_is_pushed_again(config: DeviceConfig) -> None:
    target = AdbTarget(config, device(Folder()))
    target.time_networks(NETWORKS, PLAN, seed=0)
    models = sorted(Path(config.workdir, "models").iterdir())
    whole = [path.read_bytes() for path in models]
    models[0].write_bytes(b"")
    models[1].write_bytes(whole[1][:100])
    assert target.time_networks(NETWORKS, PLAN, seed=0)
    assert [path.read_bytes() for path in models] == whole


BENCHMARK_MODEL = """#!/bin/sh
for flag in "$@"; do case $flag in --graph=*) graph=${flag#--graph=} ;; esac; done
[ -f "$graph" ] || { echo "ERROR: Benchmarking failed."; exit 1; }
size=$(wc -c < "$graph")
echo "STARTING!"
echo "Graph: [$graph]"
echo "count=1 curr=900"
echo "count=3 first=$size curr=$size min=$size max=$size avg=$size std=0"
echo "Inference timings in us: Init: 100, First inference: 900, Warmup (avg): 900, Inference (avg): $size"
"""


@needs_litert
def test_benchmark_model_is_run_and_read(config: DeviceConfig, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(BENCHMARK_MODEL)
    target = AdbTarget(replace(config, runner="benchmark_model"), device(Folder()))
    with pytest.raises(DeviceError, match="devices setup phone --binary PATH"):
        target.identity()
    with pytest.raises(UserError, match="--binary PATH is missing"):
        target.setup(None)
    assert all(probe.ok for probe in target.setup(program))
    assert target.identity().runtime_version.startswith("benchmark_model ")
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    sizes = [len(target._model(network)) for network in NETWORKS]
    assert samples == [[size / 1000] * 3 for size in sizes]


@needs_litert
@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("exit 1", "benchmark_model ended with 1: no output"),
        ("echo 'ERROR: no such op'; exit 7", "benchmark_model ended with 7: ERROR: no such op"),
        ("exit 0", "an empty log"),
        ("echo rubbish", "did not finish"),
        (f"echo; echo {VISIT}", "4 of 6 runs have an output|12 of 6 runs have an output"),
    ],
)
def test_a_benchmark_model_that_fails_is_an_error(config: DeviceConfig, tmp_path: Path, reply: str, words: str) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(f"#!/bin/sh\n{reply}\n")
    target = AdbTarget(replace(config, runner="benchmark_model"), device(Folder()))
    target.setup(program)
    with pytest.raises(DeviceError, match=words):
        target.time_networks(NETWORKS, PLAN, seed=0)


FULLY = "Explicitly applied {} delegate, and the model graph will be completely executed by the delegate."
ACCELERATED = [  # keys of a configuration, the flags they become, what the log calls the delegate
    ({"dtype": "float16"}, "--use_xnnpack=true --xnnpack_force_fp16=true", "XNNPACK"),
    ({"delegate": "gpu"}, "--use_gpu=true --gpu_precision_loss_allowed=false", "GPU"),
    (
        {"delegate": "gpu", "dtype": "float16", "delegate_options": "cl"},
        "--use_gpu=true --gpu_precision_loss_allowed=true --gpu_backend=cl",
        "GPU",
    ),
    (
        {"delegate": "nnapi", "dtype": "int8", "delegate_options": "google-edgetpu"},
        "--use_nnapi=true --disable_nnapi_cpu=true --nnapi_allow_fp16=true --nnapi_accelerator_name=google-edgetpu",
        "NNAPI",
    ),
    (
        {"delegate": "LIBRARY", "dtype": "int8", "delegate_options": "backend_type:htp;a:b c"},
        "--external_delegate_path=LIBRARY --external_delegate_options=backend_type:htp;a:b c",
        "EXTERNAL",
    ),
]


def accelerated(config: DeviceConfig, folder: Path, line: str, **keys: str) -> AdbTarget:
    """A phone whose benchmark_model says `line` before it times, and keeps its arguments."""
    library, program = folder / "lib delegate.so", folder / "benchmark_model"
    library.write_bytes(b"a delegate")
    told = f"echo {shlex.quote(line)}; printf '%s\\n' \"$@\" > {shlex.quote(str(folder / 'arguments'))}"
    program.write_text(BENCHMARK_MODEL.replace('echo "STARTING!"', f'echo "STARTING!"; {told}'))
    keys = {key: value.replace("LIBRARY", str(library)) for key, value in keys.items()}
    target = AdbTarget(replace(config, runner="benchmark_model", **keys), device(Folder()))
    target.setup(program)
    return target


@needs_litert
@pytest.mark.parametrize(("keys", "flags", "name"), ACCELERATED)
def test_half_precision_and_delegates_are_asked_for(
    config: DeviceConfig, tmp_path: Path, keys: dict[str, str], flags: str, name: str
) -> None:
    target = accelerated(config, tmp_path, f"INFO: {FULLY.format(name)}", **keys)
    samples = target.time_networks(NETWORKS, PLAN, seed=0)
    assert samples == [[len(target._model(network)) / 1000] * 3 for network in NETWORKS]
    given = (tmp_path / "arguments").read_text().splitlines()
    wanted = flags.replace("LIBRARY", str(tmp_path / "lib delegate.so")).replace(" --", "\n--").splitlines()
    assert given[7 : 7 + len(wanted)] == wanted
    assert target.config.whole_only and target.identity().dtype == keys.get("dtype", "float32")
    cached = [flag for flag in given if flag.startswith("--delegate_serialize")]
    models = [path.stem for path in Path(config.workdir, "models").iterdir()]
    if keys.get("delegate") in ("gpu", "nnapi"):
        assert (
            cached[0] == f"--delegate_serialize_dir={config.workdir}/compiled"
            and Path(config.workdir, "compiled").is_dir()
        )
        assert cached[1].rpartition("=")[2] in models
    else:
        assert not cached
    assert ("--warmup_min_secs=0.3" in given) == ("delegate" in keys)
    assert target.probes()[-1].text.endswith(" runs")
    target.clean()
    assert not Path(config.workdir).exists()


@needs_litert
def test_a_delegate_is_part_of_what_a_table_is_of(config: DeviceConfig, tmp_path: Path) -> None:
    versions = [
        accelerated(config, tmp_path, "", **keys).identity().runtime_version
        for keys in ({}, *(keys for keys, _, _ in ACCELERATED))
    ]
    assert len(set(versions)) == 5 and versions[0] == versions[1]  # half precision on the CPU is a dtype
    assert versions[3].endswith(", delegate gpu (cl)")
    assert versions[5].startswith(f"{versions[0]}, delegate lib delegate.so ") and versions[5].endswith(
        "(backend_type:htp;a:b c)"
    )
    (tmp_path / "lib delegate.so").unlink()
    target = AdbTarget(replace(config, runner="benchmark_model", delegate="/nowhere/lib.so"), device(Folder()))
    target.setup(tmp_path / "benchmark_model")
    with pytest.raises(DeviceError, match="phone: there is no /nowhere/lib.so: put the delegate's library there"):
        target.identity()


@needs_litert
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", "did not apply the GPU delegate, and ran .* CPU"),
        (
            "Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.",
            "on the CPU",
        ),
        (FULLY.format("NNAPI"), "did not apply the GPU delegate"),
        (
            "WARN: Unconsumed cmdline flags: --use_gpu=true --delegate_serialize_dir=x",
            "this build of benchmark_model does not know --use_gpu=true",
        ),
    ],
)
def test_a_delegate_that_does_not_run_is_an_error(config: DeviceConfig, tmp_path: Path, line: str, words: str) -> None:
    target = accelerated(config, tmp_path, line, delegate="gpu")
    with pytest.raises(DeviceError, match=words):
        target.time_networks(NETWORKS, PLAN, seed=0)
    *others, tried = target.probes()
    assert all(probe.ok for probe in others) and not tried.ok and re.search(f"float32 by gpu: .*{words}", tried.text)


@needs_litert
def test_a_delegate_that_runs_a_part_is_told(config: DeviceConfig, tmp_path: Path) -> None:
    line = (
        FULLY.format("GPU").replace("completely", "partially").replace("delegate.", "delegate w/ 3 delegate kernels.")
    )
    with pytest.warns(UserWarning, match="the GPU delegate runs 3 parts of a network, the CPU the rest"):
        target = accelerated(config, tmp_path, line, delegate="gpu")
        assert len(target.time_networks(NETWORKS, PLAN, seed=0)) == 2


@needs_litert
def test_a_build_that_keeps_nothing_compiled_will_do(config: DeviceConfig, tmp_path: Path) -> None:
    lines = f"WARN: Unconsumed cmdline flags: --delegate_serialize_dir=x\n{FULLY.format('GPU')}"
    with pytest.warns(UserWarning, match="keeps nothing that a delegate compiled: every run compiles anew"):
        target = accelerated(config, tmp_path, lines, delegate="gpu")
    assert len(target.time_networks(NETWORKS, PLAN, seed=0)) == 2


def test_a_library_that_compiles_for_every_run_is_given_the_time(config: DeviceConfig) -> None:
    seconds = [
        AdbTarget(replace(config, runner="benchmark_model", delegate=delegate), device(Folder()))._runner.seconds(
            PLAN, 2
        )
        for delegate in ("", "gpu", "/lib/x.so")
    ]
    assert seconds[1] - seconds[0] == pytest.approx(2 * (60 + 0.3 * PLAN.rounds))
    assert seconds[2] - seconds[0] == pytest.approx(2 * (20 + 0.3) * PLAN.rounds)


@needs_litert
@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
def test_int8_networks_are_timed_on_the_device(config: DeviceConfig, runtime: str) -> None:
    """Quantized here, run there: what arrives is smaller, and its times are another table's."""
    pytest.importorskip("ai_edge_quantizer")
    float32, int8 = (
        AdbTarget(replace(config, runtime=runtime, dtype=dtype), device(Folder())) for dtype in ("float32", "int8")
    )
    large = [Network(small(512))]
    samples = [target.time_networks(large, PLAN, seed=0) for target in (float32, int8)]
    assert all(ms > 0 for each in samples for ms in each[0])
    sizes = sorted(path.stat().st_size for path in Path(config.workdir, "models").iterdir())
    assert len(sizes) == 2 and sizes[0] < 0.6 * sizes[1]
    assert replace(float32.identity(), dtype="int8") == int8.identity()
    assert int8.config.whole_only and not float32.config.whole_only


PERF_TEST = """#!{python}
import os, sys, time
import numpy, onnxruntime
flags, (model, result) = sys.argv[1:-2], sys.argv[-2:]
given = dict(zip(flags, flags[1:]))
assert given["-e"] == "cpu" and given["-m"] == "times" and "-I" in flags, flags
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(given["-x"])
session = onnxruntime.InferenceSession(model, options)
feed = {{each.name: numpy.ones(each.shape, numpy.float32) for each in session.get_inputs()}}
with open(result, "a") as file:
    for index in range(int(given["-r"])):
        start = time.perf_counter()
        session.run(None, feed)
        file.write(f"{{os.path.basename(model)}},{{time.perf_counter() - start:g}},1000,50,{{index}}\\n")
print("Average inference time cost: 1 ms")
"""


def test_onnxruntime_perf_test_is_run_and_read(config: DeviceConfig, tmp_path: Path) -> None:
    program = tmp_path / "perf test"
    program.write_text(PERF_TEST.format(python=sys.executable))
    config = replace(config, runtime="onnxruntime", runner="onnxruntime_perf_test")
    target = AdbTarget(config, device(Folder()))
    assert all(probe.ok for probe in target.setup(program))
    assert target.identity().runtime_version.startswith("onnxruntime_perf_test ")
    assert target.provenance()["program"]["source"] == "perf test"
    here = open_target(replace(load_device("host-ort"), threads=config.threads))
    network = [Network(small(256))]
    there, direct = (float(np.median(each.time_networks(network, PLAN, seed=0)[0])) for each in (target, here))
    assert direct / 3 < there < 3 * direct


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "m,0.01,1,1,0",
        "m,0.01,1,1,{i}x",
        "m,0,1,1,{i}",
        "m,-0.01,1,1,{i}",
        "m,nan,1,1,{i}",
        "m,1e400,1,1,{i}",
        "m,0.0",
    ],
)
def test_a_file_of_times_that_is_not_whole_is_an_error(config: DeviceConfig, tmp_path: Path, lines: str) -> None:
    program = tmp_path / "perf_test"
    body = "\n".join(f"echo '{lines.format(i=index)}' >> \"$last\"" for index in range(10 if "{" in lines else 1))
    program.write_text(f"#!/bin/sh\nfor last; do :; done\n{body}\n")
    target = AdbTarget(replace(config, runtime="onnxruntime", runner="onnxruntime_perf_test"), device(Folder()))
    target.setup(program)
    with pytest.raises(DeviceError, match="its file of times is damaged|did not give 3 times above zero"):
        target.time_networks(NETWORKS, PLAN, seed=0)


@needs_litert
@pytest.mark.parametrize("name", ["$(touch pwned)", "it's; touch pwned", "two\nlines", '`touch pwned` && "x"'])
def test_names_do_no_harm_in_the_devices_shell(config: DeviceConfig, tmp_path: Path, name: str) -> None:
    target = AdbTarget(replace(config, name=name, workdir=str(tmp_path / name)), device(Folder()))
    assert target.time_networks(NETWORKS[:1], PLAN, seed=0)
    target.clean()
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists() and not (tmp_path / name).exists()


def test_cleaning_leaves_what_is_not_ours(config: DeviceConfig) -> None:
    work, binary = Path(config.workdir), Path(config.workdir).parent / "benchmark_model"
    binary.write_text("#!/bin/sh\n")
    programs = [
        replace(config, runner="benchmark_model"),
        replace(config, runner="onnxruntime_perf_test", runtime="onnxruntime"),
    ]
    targets = [AdbTarget(each, device(Folder())) for each in programs]
    for target in targets:
        target.setup(binary)
    (work / "photos").mkdir()
    (work / "photos" / "holiday.jpg").touch()
    sources = [target.provenance()["program"]["source"] for target in targets]
    assert sources == ["benchmark_model"] * 2 and len(list(work.glob("*.json"))) == 2  # each its own record
    targets[0].clean()
    assert sorted(path.name for path in work.iterdir()) == [
        "onnxruntime_perf_test",
        "onnxruntime_perf_test.json",
        "photos",
    ]
    targets[1].clean()
    assert [path.name for path in work.rglob("*")] == ["photos", "holiday.jpg"]
    targets[1].clean()  # and where nothing is left of ours


def test_a_job_may_take_as_long_as_slow_inferences_do(config: DeviceConfig) -> None:
    plan, slow = TimingPlan(rounds=9, burst_s=0.02), replace(config, slowest_s=4.0)
    for each, runs in ((slow, 4), (replace(slow, runner="onnxruntime_perf_test", runtime="onnxruntime"), 11)):
        seconds = AdbTarget(each, device(Folder()))._runner.seconds(plan, 2)
        assert seconds >= 2 * (9 + 1) * runs * 4.0
    assert AdbTarget(config, device(Folder()))._runner.seconds(plan, 2) < 200


def test_a_mask_is_a_number(config: DeviceConfig) -> None:
    with pytest.raises(UserError, match="affinity 'f0; reboot' must be any, big, or a hexadecimal mask"):
        replace(config, affinity="f0; reboot")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An address below which the files of `tmp_path`/web are to be had."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_program_is_downloaded_checked_and_recorded(config: DeviceConfig, tmp_path: Path, web: str) -> None:
    (tmp_path / "web" / "benchmark_model").write_text(BENCHMARK_MODEL)
    digest = hashlib.sha256(BENCHMARK_MODEL.encode()).hexdigest()
    config = replace(config, runner="benchmark_model", download=f"{web}/benchmark_model")
    with pytest.raises(UserError, match=f"has the SHA-256 {digest}, not 00: nothing was put on the device"):
        AdbTarget(replace(config, sha256="00"), device(Folder())).setup(None)
    assert not Path(config.workdir, "benchmark_model").exists()
    target = AdbTarget(replace(config, sha256=digest), device(Folder()))
    assert all(probe.ok for probe in target.setup(None))
    record = target.provenance()["program"]
    assert record["source"] == config.download and record["sha256"] == digest
    for address, words in (
        (f"{web}/nothing", "cannot download .*404.*by --binary"),
        ("file:///etc/passwd", "no web addr"),
    ):
        with pytest.raises(UserError, match=words):
            AdbTarget(replace(config, download=address), device(Folder())).setup(None)


@needs_litert
def test_a_program_that_changes_under_a_run_ends_it(config: DeviceConfig, tmp_path: Path) -> None:
    binary, config = tmp_path / "benchmark_model", replace(config, runner="benchmark_model")
    binary.write_text(BENCHMARK_MODEL)
    target = AdbTarget(config, device(Folder()))
    target.setup(binary)
    assert target.time_networks(NETWORKS, PLAN, seed=0)
    binary.write_text(BENCHMARK_MODEL + "# a night later\n")
    other = AdbTarget(config, device(Folder()))
    other.setup(binary)
    with pytest.raises(DeviceError, match="phone has benchmark_model [0-9a-f]{12} now, and had benchmark_model"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert other.time_networks(NETWORKS, PLAN, seed=0) and target.identity() != other.identity()


# Jobs that do not end, or are left behind


@needs_litert
def test_a_runner_that_hangs_is_ended_on_the_device(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.targets.adb_runners.Runner.seconds", lambda *_: 1.0)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = --probe ] && exec {shlex.quote(sys.executable)} "$@"\n'
        f"echo $$ > {shlex.quote(str(tmp_path))}/pid; sleep 60\n"
    )
    python.chmod(0o755)
    target = AdbTarget(replace(config, python=str(python)), device(Folder()))
    with pytest.raises(DeviceError, match="the runner ended with 124: it hangs: no end within 1 s"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


TOYBOX = """import signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
try:
    sys.exit(child.wait(float(sys.argv[1])))
except subprocess.TimeoutExpired:
    child.send_signal(signal.SIGTERM)  # to it alone, as toybox does
    child.wait()
    sys.exit(124)
"""


@needs_litert
def test_a_program_below_a_job_that_hangs_is_ended_too(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.targets.adb_runners.ProgramRunner.seconds", lambda *_: 1.0)
    phone, binary = Phone(tmp_path / "phone"), tmp_path / "benchmark_model"
    (tmp_path / "toybox.py").write_text(TOYBOX)
    phone.program("timeout", f'exec {sys.executable} {shlex.quote(str(tmp_path / "toybox.py"))} "$@"')
    binary.write_text(f"#!/bin/sh\necho $$ > {shlex.quote(str(tmp_path / 'pid'))}\nwhile :; do sleep 0.1; done\n")
    target = AdbTarget(replace(config, runner="benchmark_model"), device(phone))
    target.setup(binary)
    with pytest.raises(DeviceError, match="benchmark_model ended with 124: it hangs: no end within 1 s"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    program = Path("/proc", (tmp_path / "pid").read_text().strip())
    for _ in range(50):  # what was killed goes in its own time
        if not program.exists():
            break
        time.sleep(0.1)
    assert not program.exists()


class Cut(Folder):
    """One that loses the connection while the first job runs, which goes on without us."""

    cut = False

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        if "wait $!" not in command or self.cut:
            return super().shell(command, timeout_s=timeout_s)
        self.cut = True
        subprocess.Popen(["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0)
        raise LinkLost("the cable was pulled")


@needs_litert
def test_a_job_that_a_lost_connection_left_does_not_run_beside_the_next(config: DeviceConfig, tmp_path: Path) -> None:
    log, python = shlex.quote(str(tmp_path / "log")), tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = --probe ] && exec {shlex.quote(sys.executable)} "$@"\n'
        f'echo begins >> {log}; {shlex.quote(sys.executable)} "$@" || exit; sleep 2; echo ends >> {log}\n'
    )
    python.chmod(0o755)
    target = AdbTarget(replace(config, python=str(python)), device(Cut()))
    assert target.time_networks(NETWORKS, PLAN, seed=0)
    time.sleep(2.5)
    assert (tmp_path / "log").read_text().split() == ["begins", "begins", "ends"]


@needs_litert
def test_a_clock_that_jumps_changes_no_time(config: DeviceConfig, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import random, time\ntime.time = lambda: random.uniform(0, 4e9)\n"
        "time.time_ns = lambda: int(1e9 * time.time())\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(tmp_path))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    jumping, steady = (
        AdbTarget(replace(config, python=each), device(Folder())) for each in (str(python), sys.executable)
    )
    found = [float(np.median(each.time_networks([NETWORKS[1]], PLAN, seed=0)[0])) for each in (jumping, steady)]
    assert found[1] / 3 < found[0] < 3 * found[1]


# Clocks, cores and temperatures


class Phone(Folder):
    """A folder that has an Android phone's /sys, programs and root."""

    def __init__(self, root: Path, *, android: bool = True) -> None:
        super().__init__()
        self.root, self.said = root, root / "said"
        for core, clock in enumerate((1800000, 1800000, 2400000, 2400000)):
            folder = root / f"cpu/cpu{core}/cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{clock}\n")
            (folder / "scaling_cur_freq").write_text(f"{clock - 300000}\n")
            (folder / "scaling_governor").write_text("schedutil\n")
        for policy in (0, 2):
            (root / f"cpu/cpufreq/policy{policy}").mkdir(parents=True)
            (root / f"cpu/cpufreq/policy{policy}/scaling_governor").write_text("schedutil\n")
        for zone, temperature in enumerate((31000, 44500)):
            (root / f"thermal/thermal_zone{zone}").mkdir(parents=True)
            (root / f"thermal/thermal_zone{zone}/temp").write_text(f"{temperature}\n")
        self.programs = root / "bin"
        self.programs.mkdir()
        self.program("getprop", "case $1 in ro.build.fingerprint) echo brand/x ;; ro.soc.model) echo Chip ;; esac")
        self.program("cmd", f'echo "$@" >> {shlex.quote(str(self.said))}')
        self.program(
            "dumpsys",
            'case $1 in battery) echo "  level: 83" ;; thermalservice) echo "Thermal Status: 1" ;; esac',
        )
        self.program("taskset", '[ "$1" = --help ] && exit; shift; exec "$@"')

    def program(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.programs / name).chmod(0o755)

    def shell(self, command: str, *, timeout_s: float) -> bytes:
        command = command.replace("/sys/devices/system/cpu", str(self.root / "cpu"))
        command = command.replace("/sys/class/thermal", str(self.root / "thermal"))
        return super().shell(f"PATH={shlex.quote(str(self.programs))}:$PATH; {command}", timeout_s=timeout_s)

    def governors(self) -> set[str]:
        return {path.read_text().strip() for path in self.root.glob("cpu/cpufreq/policy*/scaling_governor")}


@needs_litert
def test_a_phone_tells_its_clocks_and_is_held_to_them(config: DeviceConfig, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    target = AdbTarget(replace(config, affinity="big", root=True), device(phone))
    assert target.identity().affinity == "cores c" and target.identity().soc == "Chip"
    assert target.conditions() == {
        "clocks_mhz": [1500, 1500, 2100, 2100],
        "temperature_c": 44.5,
        "battery_pct": 83,
        "thermal_status": 1,
        "governor": "schedutil",
    }
    seen = []
    runner = target._runner
    timed = runner.time
    runner.time = lambda *args: (seen.append((phone.governors(), phone.said.read_text().split()[-1])), timed(*args))[1]
    assert target.time_networks(NETWORKS, PLAN, seed=0)
    assert seen == [({"performance"}, "true")]
    assert phone.governors() == {"schedutil"} and phone.said.read_text().split()[-1] == "false"
    provenance = target.provenance()
    assert provenance["fixed_performance"] is True and provenance["governor_set"] is True


def test_big_cores_too_few_for_the_threads_are_said(config: DeviceConfig, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    with pytest.warns(UserWarning, match="phone has 2 big cores for 4 threads: set 'affinity' to a mask of more"):
        assert AdbTarget(replace(config, affinity="big", threads=4), device(phone))._mask == "c"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AdbTarget(replace(config, affinity="big", threads=2), device(phone))._mask == "c"


@needs_litert
def test_governors_that_a_killed_job_left_are_set_back(config: DeviceConfig, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    target = AdbTarget(replace(config, root=True), device(phone))
    target.device.run(f"mkdir -p {shlex.quote(config.workdir)}")
    killed = [each._steady_clocks() for each in (target, target)]
    killed[0].__enter__()  # and never left
    assert phone.governors() == {"performance"}
    again = AdbTarget(replace(config, root=True), device(phone))
    assert again.time_networks(NETWORKS, PLAN, seed=0)
    assert phone.governors() == {"schedutil"}
    killed[1].__enter__()
    AdbTarget(replace(config, root=True), device(phone)).clean()
    assert phone.governors() == {"schedutil"} and not Path(config.workdir).exists()


@needs_litert
def test_a_phone_without_the_mode_or_without_root_says_so(config: DeviceConfig, tmp_path: Path) -> None:
    phone = Phone(tmp_path / "phone")
    phone.program("cmd", "echo 'Unknown command'; exit 255")
    phone.program("sh", "exit 1")
    phone.program("su", "exit 1")
    target = AdbTarget(config, device(phone))
    assert target.provenance()["fixed_performance"] is False
    with pytest.raises(DeviceError, match="phone gives no root: set root = false in the configuration of phone"):
        AdbTarget(replace(config, root=True), device(phone)).time_networks(NETWORKS, PLAN, seed=0)
    phone.program("cmd", f'echo "$@" >> {shlex.quote(str(phone.said))}')
    rooted = AdbTarget(replace(config, root=True), device(phone))
    with pytest.raises(DeviceError, match="phone gives no root"):
        rooted.time_networks(NETWORKS, PLAN, seed=0)
    assert phone.said.read_text().split()[-1] == "false"  # what was set before is set back
    rooted.clean()
    assert not Path(config.workdir).exists()


@needs_litert
def test_a_hot_phone_is_waited_for_and_given_up(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone, waits = Phone(tmp_path / "phone"), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            phone.program("dumpsys", 'echo "Thermal Status: 2"')

    monkeypatch.setattr("profilers.targets.adb.time.sleep", sleep)
    phone.program("dumpsys", 'echo "Thermal Status: 4"')
    target = AdbTarget(config, device(phone))
    assert not target.probes()[-1].ok
    hot = AdbTarget(replace(config, dtype="int8"), device(phone)).probes()
    assert hot[-1].name == "temperature" and not waits  # what is hot is not tried
    assert target.time_networks(NETWORKS, PLAN, seed=0) and waits == [10, 30]
    phone.program("dumpsys", 'echo "Thermal Status: 3"')
    with pytest.raises(DeviceError, match="too hot .thermal status 3.: let it cool, and run this again"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert waits[2:] == [10, 30, 60, 120]


# The lock


@needs_litert
def test_a_lock_that_someone_holds_is_waited_for_and_then_respected(
    config: DeviceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.targets.adb.time.sleep", lambda seconds: None)
    lock = Path(config.workdir, "lock")
    lock.parent.mkdir(parents=True)
    uptime = int(float(Path("/proc/uptime").read_text().split()[0]))
    lock.symlink_to(f"somebody:{uptime + 600}")
    target = AdbTarget(replace(config, lock_wait_s=0), device(Folder()))
    with pytest.raises(DeviceError, match="being measured by someone else"):
        target.time_networks(NETWORKS, PLAN, seed=0)
    assert str(lock.readlink()).startswith("somebody")
    lock.unlink()
    for stale in (uptime - 1, uptime + LOCK_S + 100):  # expired; or from before the device was started anew
        lock.symlink_to(f"somebody:{stale}")
        assert target.time_networks(NETWORKS, PLAN, seed=0)
        assert not lock.is_symlink()


def test_a_phone_that_someone_measures_on_is_left_as_it_is(config: DeviceConfig, tmp_path: Path) -> None:
    phone, binary = Phone(tmp_path / "phone"), tmp_path / "benchmark_model"
    binary.write_text(BENCHMARK_MODEL)
    config = replace(config, runner="benchmark_model", lock_wait_s=0)
    first, second = (AdbTarget(config, device(phone)) for _ in range(2))
    first.setup(binary)
    with first._alone(30), first._steady_clocks():
        before = sorted(path.name for path in Path(config.workdir).iterdir())
        for touch in (second.provenance, second.clean, lambda: second.setup(binary)):
            with pytest.raises(DeviceError, match="being measured by someone else"):
                touch()
        assert phone.said.read_text().split()[-1] == "true"
        assert sorted(path.name for path in Path(config.workdir).iterdir()) == before
    assert second.provenance()["fixed_performance"] is True


def test_a_lock_that_expires_after_a_long_wait_is_taken(config: DeviceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.targets.adb.LOCK_POLL_S", 0.01)
    monkeypatch.setattr("profilers.targets.adb.STALE_TRIES", 3)
    link, lock = Folder(), Path(config.workdir, "lock")
    lock.parent.mkdir(parents=True)
    lock.symlink_to(f"somebody:{int(float(Path('/proc/uptime').read_text().split()[0])) + 2}")
    with AdbTarget(config, device(link))._alone(30):
        assert not str(lock.readlink()).startswith("somebody")
    assert link.counts["shell"] > 10  # it was asked for again and again


@pytest.mark.parametrize("broken", ["a file lies there", "nobody may write there"])
def test_a_device_that_cannot_be_locked_is_an_error(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr("profilers.targets.adb.time.sleep", lambda seconds: None)
    lock = tmp_path / "lock" if broken == "a file lies there" else Path("/sys/amc-hw.lock")
    (tmp_path / "lock").write_text("somebody's")
    with (
        pytest.raises(DeviceError, match=r"phone: cannot lock it \(ln: .*\): set 'workdir' or 'lock'"),
        AdbTarget(replace(config, lock=str(lock)), device(Folder()))._alone(30),
    ):
        pass
    assert (tmp_path / "lock").read_text() == "somebody's"


def test_a_lock_is_held_anew_once_the_job_begins(config: DeviceConfig) -> None:
    lock, target = Path(config.workdir, "lock"), AdbTarget(config, device(Folder()))

    def left() -> float:
        return int(str(lock.readlink()).split(":")[1]) - float(Path("/proc/uptime").read_text().split()[0])

    with target._alone(30) as hold:
        assert 28 <= left() <= 31
        hold(500)
        assert 498 <= left() <= 501
    assert not lock.is_symlink()
    with pytest.raises(DeviceError, match="lock there was taken by someone else"), target._alone(30) as hold:
        lock.unlink()
        lock.symlink_to("somebody:99999999")
        hold(500)
    assert str(lock.readlink()).startswith("somebody")
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


@needs_litert
def test_a_lock_is_never_held_by_two(config: DeviceConfig) -> None:
    """Jobs of several clients on one device: from taking to freeing, nobody else takes."""
    inside: list[int] = []
    most = []

    def client(number: int) -> None:
        target = AdbTarget(replace(config, lock_wait_s=60), device(Folder()))
        for _ in range(8):
            with target._alone(30):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.002)
                inside.remove(number)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 32 and max(most) == 1


# Which device


@pytest.fixture
def adb_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a program that stands in for `adb`."""

    def write(text: str) -> None:
        (tmp_path / "adb").write_text(text)
        (tmp_path / "adb").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


def test_a_server_that_is_only_starting_is_no_device(adb_program: Callable[[str], None]) -> None:
    adb_program(
        "#!/bin/sh\necho '* daemon not running; starting now at tcp:5037'\necho '* daemon started successfully'\n"
        "echo 'List of devices attached'\nprintf 'A1\\tdevice\\n\\n'\n"
    )
    assert attached() == ["A1"]


def test_a_server_that_is_not_trusted_says_so_in_the_first_of_its_lines(adb_program: Callable[[str], None]) -> None:
    adb_program(
        "#!/bin/sh\n{ echo 'error: device unauthorized.'; echo \"This adb server's \\$ADB_VENDOR_KEYS is not set\"\n"
        "echo 'Otherwise check for a confirmation dialog on your device.'; } >&2; exit 1\n"
    )
    with pytest.raises(DeviceError, match="does not trust this computer yet"):
        ServerLink("A1")


def test_a_device_is_named_or_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.setattr("profilers.adb.attached", lambda: [])
    monkeypatch.setattr("profilers.adb.on_usb", lambda: [])
    with pytest.raises(DeviceError, match="pixel: no device is attached. On the phone: Settings, About"):
        open_device("pixel")
    monkeypatch.setattr("profilers.adb.on_usb", lambda: ["U1"])
    assert open_device("pixel").name == "pixel (U1)"
    monkeypatch.setattr("profilers.adb.on_usb", lambda: ["U1", "U2"])
    with pytest.raises(DeviceError, match="several devices are attached .U1, U2."):
        open_device("pixel")
    monkeypatch.setattr("profilers.adb.attached", lambda: ["A1", "B2"])
    with pytest.raises(DeviceError, match="several devices are attached .A1, B2.: give --serial, or ANDROID_SERIAL"):
        open_device("pixel")
    assert open_device("pixel", serial="B2").name == "pixel (B2)"
    monkeypatch.setenv("ANDROID_SERIAL", "A1")
    assert open_device("pixel").name == "pixel (A1)"
    assert open_device("pixel", serial="10.0.0.7:5555").name == "pixel at 10.0.0.7:5555"
    monkeypatch.setattr("profilers.adb.attached", lambda: ["A1", "10.0.0.7:37123"])  # paired: its server owns it
    for named in ({"serial": "10.0.0.7:37123"}, {"address": "10.0.0.7:37123"}):
        assert open_device("pixel", **named).name == "pixel (10.0.0.7:37123)"
    with pytest.raises(DeviceError, match="address 'phone' is not HOST:PORT"):
        open_device("pixel", address="phone")


def test_nobody_at_the_address_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adb_shell")
    phone = open_device("board", address="127.0.0.1:9")
    monkeypatch.setattr(phone, "_sleep", lambda seconds: None)
    with pytest.raises(DeviceError, match="board at 127.0.0.1:9 cannot be reached"):
        phone.run("true")


def test_a_file_that_the_device_refuses_is_no_fault_of_the_cable(adb_program: Callable[[str], None]) -> None:
    adb_program(
        '#!/bin/sh\n[ "$3" = get-state ] && echo device && exit\n'
        "echo \"adb: error: failed to copy 'x' to '/data/x': remote No space left on device\" >&2; exit 1\n"
    )
    with pytest.raises(DeviceError, match="the device refuses a file: .*No space left on device"):
        AdbDevice("phone", lambda: ServerLink("A1"), sleep=lambda seconds: None).push(b"x", "/data/x")


def test_unknown_runners_and_dtypes_are_named() -> None:
    with pytest.raises(UserError, match="unknown runner 'abacus'; known: python, benchmark_model, onnx"):
        open_target(DeviceConfig("x", "adb", "litert", runner="abacus"))
    with pytest.raises(UserError, match="python times float32 and int8, not float16"):
        open_target(DeviceConfig("x", "adb", "litert", dtype="float16"))
    with pytest.raises(UserError, match="benchmark_model times float32, float16 and int8, not tf32"):
        open_target(DeviceConfig("x", "adb", "litert", runner="benchmark_model", dtype="tf32"))
    with pytest.raises(UserError, match="benchmark_model alone has delegates, not python"):
        open_target(DeviceConfig("x", "adb", "litert", delegate="gpu"))
    with pytest.raises(UserError, match="how exactly /lib/x.so computes is said in delegate_options: leave dtype out"):
        open_target(DeviceConfig("x", "adb", "litert", runner="benchmark_model", delegate="/lib/x.so", dtype="float16"))
    with pytest.raises(UserError, match="unknown delegate 'dsp'; known: gpu, nnapi, or the path of a library"):
        open_target(DeviceConfig("x", "adb", "litert", runner="benchmark_model", delegate="dsp"))
    with pytest.raises(UserError, match="onnxruntime_perf_test runs onnxruntime, not litert"):
        open_target(DeviceConfig("x", "adb", "litert", runner="onnxruntime_perf_test"))


assert RETRIES > 2  # the faults above come twice in a row at most
