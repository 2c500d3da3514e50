"""The commands on the fake device: whole paths, exit codes, one line per mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amc_hw import choices
from amc_hw.data import DATASETS
from amc_hw.search import loop
from profilers.ops import OpGraph
from profilers.targets.fake import OVERHEAD_MS, op_latency_ms


def amc_hw(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "amc_hw.cli", *arguments], cwd=folder, capture_output=True, text=True)


def test_profile_then_validate_predict_and_measure(tmp_path: Path) -> None:
    first = json.loads(amc_hw(tmp_path, "profile", "--device", "fake", "--json").stdout)
    assert first["rows_new"] == first["rows_total"] > 100
    again = json.loads(amc_hw(tmp_path, "profile", "--device", "fake", "--json").stdout)
    assert again["rows_new"] == 0 and again["rows_total"] == first["rows_total"]
    found = json.loads(amc_hw(tmp_path, "validate", "--device", "fake", "--samples", "8", "--json").stdout)
    assert len(found["samples"]) == 8
    assert found["median_abs_pct_error"] < 2 and found["within_10pct"] == 1 and found["spearman"] > 0.98
    predicted = json.loads(amc_hw(tmp_path, "predict", "--device", "fake", "--json").stdout)
    measured = json.loads(amc_hw(tmp_path, "measure", "--device", "fake", "--json").stdout)
    assert predicted["predicted_ms"] == pytest.approx(measured["baseline_ms"], rel=0.03)
    assert measured["speedup"] == pytest.approx(1.0)
    gate = amc_hw(tmp_path, "measure", "--device", "fake", "--max-ms", "0.0001")
    assert gate.returncode == 4 and "--max-ms" in gate.stderr


def test_help_needs_no_torch_and_names_what_there_is() -> None:
    script = "import sys, amc_hw.cli; print(sorted({'torch', 'numpy', 'scipy', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
    assert (tuple(loop.METHODS), tuple(DATASETS)) == (choices.METHODS, choices.DATA_SETS)


def test_a_shell_completes_devices(tmp_path: Path) -> None:
    (tmp_path / "device_configs").mkdir()
    (tmp_path / "device_configs/fake-mine.toml").write_text("")
    for words in ("profile --device fake-", "devices check fake-"):
        asked = {"COMP_WORDS": f"amc-hw {words}", "COMP_CWORD": "3", "_AMC_HW_COMPLETE": "bash_complete"}
        script = "import sys; from amc_hw.cli import main; sys.argv[0] = 'amc-hw'; main()"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | asked, capture_output=True, text=True
        )
        offered = [line.removeprefix("plain,") for line in done.stdout.split()]
        assert "fake-mine" in offered and "fake-flops" in offered and all(each.startswith("fake-") for each in offered)


def test_a_profile_that_measures_no_more_says_so(tmp_path: Path) -> None:
    asked = ["profile", "--device", "fake", "--tolerance", "0.000001"]
    done = json.loads(amc_hw(tmp_path, *asked, "--json").stdout)
    assert done["exhausted"] and not done["time_up"] and done["error_pct"] > 0
    again = amc_hw(tmp_path, *asked)
    assert "0 new rows" in again.stdout and "more than --tolerance, and no more is measured" in again.stdout
    assert "no more is measured" not in amc_hw(tmp_path, "profile", "--device", "fake").stdout


def test_an_interrupted_profile_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    amc_hw(whole, "profile", "--device", "fake")
    expected = (whole / "latency_tables/fake.jsonl").read_bytes()
    (parts / "latency_tables").mkdir()
    (parts / "latency_tables/fake.jsonl").write_bytes(expected[: len(expected) // 3])
    assert amc_hw(parts, "profile", "--device", "fake").returncode == 0
    resumed = (parts / "latency_tables/fake.jsonl").read_bytes().splitlines()
    assert set(resumed) == set(expected.splitlines())


def test_what_a_users_own_code_prints_in_c_too_is_talk(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import os\nfrom torch import nn\nprint('imported')\nos.write(1, b'in C\\n')\n"
        "\ndef make():\n    print('made')\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))\n"
    )
    done = amc_hw(tmp_path, "graph", "--model", "net.py:make", "--input", "1x3x8x8", "--json")
    assert [group["name"] for group in json.loads(done.stdout)["groups"]] == ["0"]
    assert done.stderr.splitlines()[:3] == ["imported", "in C", "made"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["predict", "--device", "fake"], 2, "amc-hw profile"),
        (["profile", "--device", "nowhere"], 2, "unknown device 'nowhere'"),
        (["graph", "--model", "resnet57"], 2, "resnet56"),
        (["measure", "--device", "fake", "--widths", "1,2"], 2, "2 widths given"),
        (["measure", "--device", "fake", "--widths", "features.0=999"], 2, "999"),
        (["profile", "--device", "broken"], 2, "unknown key 'colour'"),
        (["profile", "--device", "future"], 2, "unknown runtime 'abacus'"),
        (["search", "--device", "fake", "--refit", "slow"], 2, "unknown --refit 'slow'; known: faithful, fast"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    configs = tmp_path / "device_configs"
    configs.mkdir()
    (configs / "broken.toml").write_text('target = "host"\nruntime = "onnxruntime"\ncolour = 3\n')
    (configs / "future.toml").write_text('target = "host"\nruntime = "abacus"\n')
    done = amc_hw(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_network_that_cannot_be_traced_or_pruned(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Branch(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def branch():\n    return Branch(), torch.zeros(1, 3, 8, 8)\n"
        "def single():\n    return nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 8, 8)\n"
    )
    traced = amc_hw(tmp_path, "graph", "--model", "nets.py:branch")
    assert traced.returncode == 2 and "cannot be traced" in traced.stderr
    lone = amc_hw(tmp_path, "profile", "--device", "fake", "--model", "nets.py:single")
    assert lone.returncode == 2 and "no prunable layer" in lone.stderr


def test_the_fake_device_is_its_formula() -> None:
    from amc_hw.subject import load_graph

    graph: OpGraph = load_graph("plain20")[1].op_graph()
    from profilers.device import load_device
    from profilers.targets import Network, open_target
    from profilers.timing import TimingPlan

    (samples,) = open_target(load_device("fake")).time_networks([Network(graph)], TimingPlan(rounds=31), seed=0)
    expected = OVERHEAD_MS + sum(map(op_latency_ms, graph.ops))
    assert sorted(samples)[15] == pytest.approx(expected, rel=0.01)


def test_a_wide_tolerance_measures_what_is_missing_and_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def tiny():\n    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(),"
        " nn.Linear(128, 4)), torch.zeros(1, 3, 8, 8)\n"
    )
    network = ("profile", "--device", "fake", "--model", "nets.py:tiny", "--json")
    planned = json.loads(amc_hw(tmp_path, *network, "--dry-run").stdout)
    first = json.loads(amc_hw(tmp_path, *network, "--tolerance", "50").stdout)
    lines = [json.loads(line) for line in (tmp_path / first["table"]).read_text().splitlines()[1:]]
    assert planned["steps"] == sum(line["type"] != "op" for line in lines)  # a network is a step, its operators with it
    assert first["rows_new"] == first["rows_total"] == len(lines)
    again = json.loads(amc_hw(tmp_path, *network, "--tolerance", "50").stdout)
    assert (again["rows_new"], again["rows_total"]) == (0, len(lines))
    assert again["error_pct"] == pytest.approx(first["error_pct"], rel=1e-3)  # samples are rounded in the file
    narrow = json.loads(amc_hw(tmp_path, *network, "--tolerance", "0.001").stdout)
    assert narrow["rows_new"] > 0
