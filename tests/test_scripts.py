"""The scripts that say what is so: what they keep, and how they refuse."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amc_hw import api

ROOT = Path(__file__).parents[1]
#: A Python that has a GPU: it answers every question of gpu_check, and fails where FAILS says so.
STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"; echo "$PYTHONPATH" >"$CALLS.path"
case "$*" in
*"$FAILS"*) echo sorry >&2; exit 1 ;;
*"--device huge"*) echo "the GPU's memory (1 MiB) is too small for batch 100000" >&2; exit 3 ;;
*"--device tensorrt"*) echo "onnxruntime has no TensorrtExecutionProvider (it has none)" >&2; exit 3 ;;
*"measure --device some"*) echo "$BUSY" >&2; exit 3 ;;
*profile*) echo '{"error_pct": 2.0}' ;;
*validate*) echo '{"median_abs_pct_error": '"$MEDIAN"'}' ;;
*" search "*) echo '{"policy": "search/policy.json", "measured_ms": 2.0}'; mkdir search; touch search/"$$" ;;
*"measure --policy"*) echo '{"pruned_ms": '"$MEASURED"'}' ;;
esac
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def checked(
    python: str, *, fails: str = "nothing", median: str = "0.5", busy: str = "the GPU is busy", measured: str = "2.05"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What gpu_check says, and what it asked of the stand-in."""
    calls = Path("calls")
    calls.unlink(missing_ok=True)
    arguments = ("out", "--device", "some", "--python", python)
    answers = {"FAILS": fails, "MEDIAN": median, "BUSY": busy, "MEASURED": measured}
    done = run("gpu_check", *arguments, CALLS=str(calls.absolute()), **answers)
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.slow
def test_gpu_check_goes_on_with_what_did_not_hold(python: str) -> None:
    done, first = checked(python, fails=" search ")
    summary = json.loads(Path("out/summary.json").read_text())
    assert done.returncode == 1 and [name for name, each in summary.items() if not each["ok"]] == ["search"]
    assert sum("cli profile" in call for call in first) == 1
    done, second = checked(python)
    summary = json.loads(Path("out/summary.json").read_text())
    assert done.returncode == 0 and all(each["ok"] for each in summary.values()), done.stdout
    asked = [call for call in second if "amc_hw.cli" in call]
    assert [call.split()[2] for call in asked] == ["search", "measure"]
    spent = sum(each["seconds"] for name, each in summary.items() if "seconds" in each and "minutes" not in name)
    assert summary["under-eight-minutes"]["seconds"] >= int(spent)


@pytest.mark.slow
def test_gpu_check_measures_again_what_was_not_good_enough(python: str) -> None:
    done, _ = checked(python, median="9.0")
    assert done.returncode == 1 and "FAIL median-at-most-5" in done.stdout
    done, calls = checked(python)
    assert done.returncode == 0, done.stdout
    assert [call.split()[2] for call in calls if "amc_hw.cli" in call] == ["profile", "validate"]


@pytest.mark.slow
def test_gpu_check_looks_at_what_was_said_and_measured(python: str) -> None:
    done, _ = checked(python, busy="the GPU is on fire", measured="2.2")
    assert done.returncode == 1 and "FAIL busy" in done.stdout and "FAIL measured-as-in-the-search" in done.stdout
    (first,) = Path("out/search").iterdir()
    done, calls = checked(python)
    assert done.returncode == 0, done.stdout
    assert [call.split()[2] for call in calls if "amc_hw.cli" in call] == ["search", "measure", "measure"]
    assert first not in Path("out/search").iterdir()  # what was there of another table would be refused


def test_gpu_check_finds_packages_of_a_relative_path(python: str) -> None:
    """Its commands run in its folder."""
    run("gpu_check", "out", "--python", python, CALLS=os.path.abspath("calls"), FAILS="", PYTHONPATH=f"{ROOT}:site")
    assert Path("calls.path").read_text().strip().split(":")[-1] == os.path.abspath("site")


def test_gpu_check_mixes_no_devices_and_reads_no_rubbish(python: str) -> None:
    done, _ = checked(python, fails="")  # everything fails, so nothing was found out
    assert done.returncode == 3
    other = run("gpu_check", "out", "--device", "other", "--python", python)
    assert other.returncode == 1 and "out holds what was found on some, not other" in other.stderr
    Path("out/summary.json").write_text("[1]")
    done, calls = checked(python)
    assert done.returncode == 1 and "summary.json is damaged: name another folder" in done.stderr and not calls


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny network and the table of a made-up device."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests/crash_worker.py", "nets.py")
    api.profile(api.open_subject(device="fake", model="nets.py:tiny"), progress=lambda *_: None)
    return tmp_path


def times(path: str) -> subprocess.CompletedProcess[str]:
    return run("time_policies", path, "--device", "fake", "--model", "nets.py:tiny", "--out", "times.csv")


@pytest.mark.slow
def test_time_policies_times_each_once_beside_the_prediction(folder: Path) -> None:
    policies = [f"16 {second} {third}" for second in (16, 20, 24, 28) for third in (16, 20, 24, 28)]  # in two loads
    Path("rows.csv").write_text("arm,widths\n" + "".join(f"a,{widths}\n" for widths in [*policies, policies[0]]))
    done = times("rows.csv")
    assert done.returncode == 0, done.stderr
    with Path("times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["widths"] for row in rows] == policies
    for row in rows:
        assert float(row["share"]) == pytest.approx(float(row["ms"]) / float(row["baseline_ms"]))
        assert float(row["predicted_ms"]) == pytest.approx(float(row["ms"]), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("width\n8 8 8\n", "rows.csv is no CSV file with a column 'widths'"),
        ("widths\n", "rows.csv holds no policies"),
        ("widths\n8 8\n", "rows.csv: 2 widths given, the network has 3 groups"),
        ("arm,widths\na\n", "a row without its widths"),
    ],
)
def test_time_policies_refuses_in_one_line(folder: Path, content: str, said: str) -> None:
    Path("rows.csv").write_text(content)
    done = times("rows.csv")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path("times.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "content", "said"),
    [
        ("h100", "widths,baseline_ms,ms\n8 8 8,2,1\n", "--timed h100 is none of --devices h100-archive"),
        ("h100-archive", "widths,baseline_ms,ms\n", "--timed times.csv: no rows of scripts/time_policies"),
        (
            "h100-archive",
            "widths,baseline_ms,ms\n8 8 8,2,fast\n",
            "--timed times.csv: no rows of scripts/time_policies",
        ),
        ("h100-archive", "baseline_ms,ms,widths\n2,1\n", "--timed times.csv: no rows of scripts/time_policies"),
    ],
)
def test_timings_that_are_none_are_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, content: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("times.csv").write_text(content)
    where = ("--devices", "h100-archive", "--timed", device, "times.csv", "--out", "out")
    network = ("--network", "mobilenet_v1_cifar", "--checkpoint", "w.pt", "--data", "digits")
    done = run("latency_against_flops", *network, *where)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_plot_latency_against_flops_draws_what_the_results_say(tmp_path: Path) -> None:
    rows = ROOT / "docs/experiments/0001-runs/rows.csv"
    done = run("plot_latency_against_flops", str(rows), "--out", str(tmp_path / "a.svg"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    read = runpy.run_path(str(ROOT / "scripts/plot_latency_against_flops"))["read"]
    half = [one for one in read([rows])["MobileNet-V1, ONNX Runtime"]["latency budget"] if one.budget == 0.5]
    lost, times = (sum(each) / len(half) for each in zip(*((one.points, one.speedup) for one in half), strict=True))
    assert len(half) == 5 and lost == pytest.approx(100 * (0.8640 - 0.8586), abs=0.006)  # as docs/results.md has it
    assert times == pytest.approx(1 / 0.48, rel=0.02)  # as the experiment's "devices crossed" has it


@pytest.mark.slow
@pytest.mark.parametrize("content", ["a,b\n1,2\n", "network,measured\nresnet56,True\n", "network\n"])
def test_plot_latency_against_flops_refuses_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    done = run("plot_latency_against_flops", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "a.svg"))
    assert done.returncode == 2 and "rows.csv" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "a.svg").exists()
