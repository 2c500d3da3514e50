"""Bad input, bad luck and full disks: one line on stderr, the right exit code, and nothing lost.

The commands run in this process where they can: importing torch takes longer than most of them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
import torch

from amc_hw import api, load_pruned, save_pruned
from amc_hw import cli as command_line
from amc_hw.console import Progress
from amc_hw.errors import UserError
from amc_hw.models import load_model
from amc_hw.runs import alone_in
from amc_hw.search.loop import AUTO, FREE
from amc_hw.settings import read_settings, record_settings
from profilers.targets.fake import FakeTarget
from profilers.timing import MOST_LOADS

Disk = Callable[[int], AbstractContextManager[None]]

TABLE = Path("latency_tables/fake.jsonl")
TINY = ("--device", "fake", "--model", "nets.py:tiny")
DATA = ("--data", "npz:images.npz")
SEARCH = ("search", *TINY, *DATA, "--episodes", "6")
HALF = (*SEARCH, "--latency-ratio", "0.6", "--out", "run")


needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")
Run = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workshop(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network, its images, its latency table, and a search that has ended, in `whole`."""
    folder = tmp_path_factory.mktemp("workshop") / "folder"
    shutil.copytree(profiled, folder)
    with contextlib.chdir(folder):
        subject = api.open_subject(device="fake", model="nets.py:tiny")
        config = api.SearchConfig(Path("whole"), data="npz:images.npz", latency_ratio=0.6, episodes=6)
        api.search(subject, config, progress=lambda *_: None)
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop to work in."""
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def ended(here: Path) -> Path:
    """A search that has ended, in `run`."""
    shutil.copytree("whole", "run")
    return Path("run")


def whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def files(folder: Path) -> dict[str, bytes]:
    """Every file and what it holds; caches of Python left out."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# ---- weights, data, names


def test_weights_that_are_missing_or_do_not_fit(here: Path, amc_hw: Run) -> None:
    missing = amc_hw(*HALF, "--checkpoint", "nowhere.pt")
    assert missing.code == 2 and "'nowhere.pt'" in missing.mistake
    net = runpy.run_path("nets.py")["tiny"]()[0]
    state = net.state_dict()
    torch.save(state | {"0.weight": torch.zeros(8, 3, 3, 3)}, "small.pt")
    small = amc_hw(*HALF, "--checkpoint", "small.pt")
    assert small.code == 2
    assert all(part in small.mistake for part in ("small.pt", "0.weight", "(8, 3, 3, 3)", "(32, 3, 3, 3)"))
    Path("text.pt").write_text("no weights")
    assert amc_hw(*HALF, "--checkpoint", "text.pt").code == 2
    random = amc_hw("search", "--device", "fake", "--model", "plain20", "--data", "digits", "--latency-ratio", "0.6")
    assert random.code == 2 and "--checkpoint" in random.mistake
    assert not Path("run").exists() and not Path("runs").exists()


@pytest.mark.parametrize("command", ["search", "compare"])
def test_the_default_data_do_not_stand_in_for_another_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amc_hw: Run, command: str
) -> None:
    """Neither where a flag names the network nor where the settings do."""
    monkeypatch.chdir(tmp_path)
    own = ("--model", "plain20", "--checkpoint", "w.pt")
    asked = (command, "--device", "fake", "--latency-ratio", "0.6")
    Path("w.pt").touch()
    done = amc_hw(*asked, *own)
    assert (
        done.code == 2
        and "--data is missing (or --evaluate and --calibrate): digits, the default, goes with " in done.mistake
    )
    assert amc_hw("init", *own).code == 0 and "data" not in Path("amc-hw.toml").read_text()
    assert "--data is missing" in amc_hw(*asked).mistake
    assert "w.pt" in amc_hw(*asked, "--data", "digits").mistake
    Path("amc-hw.toml").unlink()
    assert amc_hw("init").code == 0
    assert "--data is missing" in amc_hw(*asked, *own).mistake
    assert "there is no file 'typo.py'" in amc_hw(*asked, "--model", "typo.py:make").mistake


def test_an_accuracy_that_is_not_the_expected_one(here: Path, amc_hw: Run) -> None:
    off = amc_hw(*HALF, "--expect-accuracy", "0.897")
    assert off.code == 2 and "1.0000" in off.mistake and "0.897" in off.mistake
    assert "unpruned accuracy 1.0000" in off.err.splitlines()[0]
    assert amc_hw(*HALF, "--expect-accuracy", "0.995").code == 0  # within a point; the same folder
    ended = amc_hw(*HALF, "--expect-accuracy", "0.897")
    assert ended.code == 2 and "--expect-accuracy says 0.897" in ended.mistake


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "fack"), ("unknown device 'fack'", "fake")),
        (("--model", "resnet5"), ("unknown model 'resnet5'", "resnet56")),
        (("--model", "other.py:tiny"), ("'other.py'",)),
        (("--model", "nets.py:big"), ("nets.py", "'big'", "tiny")),
        (("--data", "digitz"), ("unknown data set 'digitz'", "digits")),
        (("--data", "npz:nowhere.npz"), ("nowhere.npz",)),
        (("--data", "imagefolder:nowhere"), ("nowhere",)),
        (("--method", "dqn"), ("unknown --method 'dqn'", "ddpg")),
        (("--reward", "speed"), ("unknown --reward 'speed'", "latency")),
        (("--input", "1x3x0x8"), ("1x3x",)),
    ],
)
def test_names_that_nothing_answers_to(here: Path, amc_hw: Run, arguments: tuple[str, ...], words: tuple[str]) -> None:
    done = amc_hw(*HALF, "--checkpoint", "w.pt", *arguments) if "resnet5" in arguments else amc_hw(*HALF, *arguments)
    assert done.code == 2
    assert all(word in done.mistake for word in words), done.mistake


@pytest.mark.parametrize(("line", "word"), [('target = "moon"', "moon"), ('runtime = "abacus"', "abacus")])
def test_a_device_whose_target_or_runtime_is_unknown(here: Path, amc_hw: Run, line: str, word: str) -> None:
    config = {"target": 'target = "host"', "runtime": 'runtime = "onnxruntime"'} | {line.split()[0]: line}
    Path("device_configs").mkdir()
    Path("device_configs/odd.toml").write_text("\n".join(config.values()))
    for command in (HALF, ("profile", *TINY)):
        done = amc_hw(*command, "--device", "odd")
        assert done.code == 2 and word in done.mistake and "known:" in done.mistake


def test_a_mistyped_data_set_does_not_claim_the_folder(here: Path, amc_hw: Run) -> None:
    assert amc_hw(*HALF, "--data", "npz:imagse.npz").code == 2
    assert amc_hw(*HALF).code == 0


# ---- budgets


@pytest.mark.parametrize("name", ["--latency-ms", "--latency-ratio", "--flops-ratio", "--params-ratio"])
@pytest.mark.parametrize("value", ["0", "-0.5", "nan", "inf"])
def test_a_budget_that_is_no_budget(here: Path, amc_hw: Run, name: str, value: str) -> None:
    done = amc_hw(*SEARCH, name, value)
    assert done.code == 2 and str(float(value)) in done.mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["--latency-ratio", "--flops-ratio", "--params-ratio"])
def test_a_ratio_above_1(here: Path, amc_hw: Run, name: str) -> None:
    done = amc_hw(*SEARCH, name, "1.01")
    assert done.code == 2 and "1.01" in done.mistake and "at most 1" in done.mistake


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [("--latency-ms", "0.001", "ms"), ("--latency-ratio", "0.01", "ms"), ("--flops-ratio", "0.001", "MACs")],
)
def test_a_hopeless_budget_names_the_smallest_that_can_be_reached(
    here: Path, amc_hw: Run, name: str, value: str, unit: str
) -> None:
    before = files(here)
    done = amc_hw(*SEARCH, name, value)
    assert done.code == 4 and "the smallest reachable is" in done.mistake and unit in done.mistake
    assert files(here) == before
    # asking for what was named is not refused
    ratio = done.mistake.split("a ratio of ")[1].split(";")[0]
    plan = amc_hw(*SEARCH, name.replace("-ms", "-ratio"), ratio, "--dry-run", "--json")
    assert plan.code == 0, plan.err


@pytest.mark.parametrize("budgets", [(), ("--latency-ms", "0.1", "--flops-ratio", "0.5")])
def test_no_budget_and_two(here: Path, amc_hw: Run, budgets: tuple[str, ...]) -> None:
    done = amc_hw(*SEARCH, *budgets)
    assert done.code == 2 and "--latency-ms" in done.mistake and "--flops-ratio" in done.mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments", [("--device", "fake"), ("--device", "fack", "--latency-ratio", "0.6"), ("--latency-ratio", "2")]
)
def test_a_mistake_is_said_before_the_default_network_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amc_hw: Run, arguments: tuple[str, ...]
) -> None:
    def trained() -> None:
        raise AssertionError("a minute of training")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("amc_hw.pretrain._trained", trained)
    assert amc_hw("search", *arguments).code == 2


@pytest.mark.parametrize("budget", [("--flops-ratio", "0.6"), ("--params-ratio", "0.6"), ("--reward", "latency")])
def test_other_budgets_end_with_a_measured_policy(here: Path, amc_hw: Run, budget: tuple[str, str]) -> None:
    found = json.loads(amc_hw(*SEARCH, *budget, "--json").out)
    assert Path(found["policy"]).is_file() and found["latency_source"] == "measured"
    whole = found["params"] if budget[0] == "--reward" else api.describe_graph("nets.py:tiny")["params"]
    share = {
        "--flops-ratio": found["macs"] / found["baseline_macs"],
        "--params-ratio": found["params"] / whole,
        "--reward": found["measured_ms"] / found["baseline_ms"],
    }
    assert share[budget[0]] <= (1.0 if budget[0] == "--reward" else 0.6)


def test_a_load_that_runs_slowly_does_not_mislead(here: Path, amc_hw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = json.loads(amc_hw(*HALF, "--json").out)
    timed, loads = FakeTarget.time_networks, itertools.count()

    def unlucky(target: FakeTarget, networks: Any, plan: Any, *, seed: int) -> list[list[float]]:
        anchor, *rest = timed(target, networks, plan, seed=seed)
        slow = 1.3 if next(loads) % 4 == 0 else 1.0
        return [anchor, *([slow * ms for ms in samples] for samples in rest)]

    monkeypatch.setattr(FakeTarget, "time_in_fresh_process", unlucky)
    found = json.loads(amc_hw(*HALF, "--out", "unlucky", "--json").out)
    assert next(loads) >= 3 * MOST_LOADS  # pilots, candidates and the winner
    assert found["widths"] == quiet["widths"]
    assert found["speedup"] == pytest.approx(quiet["speedup"], rel=0.01)
    measured = json.loads(amc_hw("measure", "--device", "fake", "--policy", found["policy"], "--json").out)
    assert measured["speedup"] == pytest.approx(quiet["speedup"], rel=0.01)


@pytest.mark.parametrize("budget", [("--latency-ms", "1000"), ("--latency-ratio", "1"), ("--flops-ratio", "1")])
def test_a_budget_that_the_unpruned_network_meets_ends_at_once(
    here: Path, amc_hw: Run, budget: tuple[str, str]
) -> None:
    before = files(here)
    said = amc_hw(*SEARCH, *budget)
    assert said.code == 0 and "the unpruned network meets the budget of" in said.out
    found = json.loads(amc_hw(*SEARCH, *budget, "--json").out)
    assert found["policy"] is None and found["episodes"] == 0 and found["macs"] == found["baseline_macs"]
    assert (found["measured_ms"] is None) == ("ratio" in budget[0])  # what was not measured is null
    assert files(here) == before


def test_numbers_that_make_no_sense(here: Path, amc_hw: Run) -> None:
    for option, value in (("--slack", "-1"), ("--slack", "nan"), ("--floor", "0"), ("--floor", "1.5")):
        done = amc_hw(*HALF, option, value)
        assert done.code == 2 and option in done.mistake and str(float(value)) in done.mistake
    assert amc_hw("validate", *TINY, "--samples", "1").code == 2
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "arguments", [(*HALF, "--episodes", "0"), ("search", "--latency-ratio", "much"), ("serach",), ("search", "--fast")]
)
def test_usage_that_click_refuses(here: Path, amc_hw: Run, arguments: tuple[str, ...]) -> None:
    done = amc_hw(*arguments)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err


def test_usage_that_click_refuses_is_one_line(here: Path, amc_hw: Run) -> None:
    assert len(amc_hw(*HALF, "--episodes", "0").err.splitlines()) == 1


def test_an_expected_accuracy_that_is_no_number(here: Path, amc_hw: Run) -> None:
    assert amc_hw(*HALF, "--expect-accuracy", "nan").code == 2


# ---- networks


def test_a_search_in_a_network_that_cannot_be_traced_or_pruned(here: Path, amc_hw: Run) -> None:
    Path("odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Loop(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(3, 3, 1)\n"
        "    def forward(self, x):\n"
        "        while x.mean() > 1e9:\n            x = self.conv(x)\n"
        "        return self.conv(x)\n"
        "class Sine(nn.Sequential):\n"
        "    def forward(self, x):\n        return torch.sin(super().forward(x))\n"
        "def loop():\n    return Loop(), torch.zeros(1, 3, 8, 8)\n"
        "def sine():\n    return Sine(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 8, 8)\n"
        "def lone():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.zeros(1, 3, 8, 8)\n"
        "def broken():\n    raise RuntimeError('first line\\nsecond line')\n"
        "def number():\n    return 7\n"
    )
    before = files(here)
    for name, word in (
        ("loop", "traced"),
        ("sine", "sin"),
        ("lone", "no prunable layer"),
        ("broken", "first line"),
        ("number", "int"),
    ):
        for command in (HALF, ("profile",)):
            done = amc_hw(*command, "--device", "fake", "--model", f"odd.py:{name}")
            assert done.code == 2 and word in done.mistake, done.err
    assert files(here) == before


# ---- tables


def test_a_torn_last_line_is_dropped_with_a_warning(here: Path, amc_hw: Run) -> None:
    complete = TABLE.read_bytes()
    TABLE.write_bytes(complete[:-30])
    predicted = amc_hw("predict", *TINY, "--json")
    assert predicted.code == 0 and json.loads(predicted.out)["predicted_ms"] > 0
    assert predicted.err.startswith("warning: ") and "torn last line" in predicted.err
    assert TABLE.read_bytes() == complete[:-30]  # looking changes nothing
    profiled = amc_hw("profile", *TINY, "--json")
    assert profiled.code == 0 and json.loads(profiled.out)["rows_new"] == 1
    assert TABLE.read_bytes() == complete


@pytest.mark.parametrize("command", [HALF, ("predict", *TINY), ("profile", *TINY), ("profile", *TINY, "--dry-run")])
def test_a_bad_line_in_the_middle_is_named(here: Path, amc_hw: Run, command: tuple[str, ...]) -> None:
    lines = TABLE.read_bytes().splitlines(keepends=True)
    lines[9] = b'{"type":"op","samples_ms":["fast"]}\n'
    TABLE.write_bytes(b"".join(lines))
    before = files(here)
    done = amc_hw(*command)
    assert done.code == 2 and f"{TABLE}:10: " in done.mistake
    assert files(here) == before


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (2, "newer")])
@pytest.mark.parametrize("command", [HALF, ("predict", *TINY), ("profile", *TINY)])
def test_a_table_of_another_schema(here: Path, amc_hw: Run, command: tuple[str, ...], version: int, word: str) -> None:
    first, rest = TABLE.read_text().split("\n", 1)
    TABLE.write_text(json.dumps(json.loads(first) | {"schema_version": version}) + "\n" + rest)
    before = files(here)
    done = amc_hw(*command)
    assert done.code == 2 and str(TABLE) in done.mistake and word in done.mistake
    assert files(here) == before


def test_another_identity_is_another_file(here: Path, amc_hw: Run) -> None:
    """Two threads are not one: predict says so, profile measures them apart, and then both are there."""
    before = TABLE.read_bytes()
    for command in (("predict", *TINY), HALF):
        refused = amc_hw(*command, "--threads", "2")
        assert refused.code == 2 and "measured with threads 1, not 2" in refused.mistake
        assert f"'amc-hw profile {' '.join(TINY)} --threads 2' measures a table beside it" in refused.mistake
    found = json.loads(amc_hw("profile", *TINY, "--threads", "2", "--json").out)
    assert found["rows_new"] == found["rows_total"] > 100
    second = Path(found["table"])
    assert second.parent == TABLE.parent and second.match("fake@????????.jsonl")
    assert TABLE.read_bytes() == before
    for threads in ("1", "2"):
        assert amc_hw("predict", *TINY, "--threads", threads).code == 0
        again = json.loads(amc_hw("profile", *TINY, "--threads", threads, "--json").out)
        assert again["rows_new"] == 0 and again["table"] == str(TABLE if threads == "1" else second)
    listed = {device["name"]: device["tables"] for device in json.loads(amc_hw("devices", "--json").out)["devices"]}
    assert listed["fake"] == [str(TABLE), str(second)]
    assert amc_hw(*HALF, "--threads", "2", "--out", "two").code == 0
    policy = ("--policy", "two/policy.json")
    assert json.loads(amc_hw("measure", *policy, "--json").out)["threads"] == 2  # as it was searched
    assert json.loads(amc_hw("measure", *policy, "--threads", "1", "--json").out)["threads"] == 1
    TABLE.unlink()
    assert amc_hw("predict", *policy).code == 0
    assert amc_hw("search", "--from-policy", "two/policy.json", "--latency-ratio", "0.9", "--dry-run").code == 0


@pytest.mark.parametrize("left", [0, 40])
def test_a_table_killed_in_its_header_is_none(here: Path, amc_hw: Run, left: int) -> None:
    TABLE.write_bytes(TABLE.read_bytes()[:left])
    before = files(here)
    done = amc_hw("predict", *TINY)
    assert done.code == 2 and "amc-hw profile" in done.mistake
    assert amc_hw("profile", *TINY, "--dry-run").code == 0
    assert files(here) == before


def test_a_table_killed_in_its_header_is_begun_again(here: Path, amc_hw: Run) -> None:
    complete = TABLE.read_bytes()
    for left in (0, 40):
        TABLE.write_bytes(complete[:left])
        assert amc_hw("profile", *TINY).code == 0
        assert TABLE.read_bytes() == complete


def test_a_table_that_lacks_the_network(here: Path, amc_hw: Run) -> None:
    for command in ("predict", "validate"):
        done = amc_hw(command, "--device", "fake", "--model", "plain20")
        assert done.code == 2 and "amc-hw profile" in done.mistake and str(TABLE) in done.mistake


# ---- full disks, unwritable places


def test_a_full_disk_while_profiling_loses_nothing(here: Path, amc_hw: Run, disk_with: Disk) -> None:
    complete = TABLE.read_bytes()
    lines = complete.splitlines(keepends=True)
    kept = b"".join(lines[:20])
    TABLE.write_bytes(kept)
    with disk_with(len(kept) + 9000):
        done = amc_hw("profile", *TINY)
    assert done.code == 1 and str(TABLE) in done.mistake and "File too large" in done.mistake
    assert TABLE.read_bytes().startswith(kept) and complete.startswith(whole_lines(TABLE)[: len(kept)])
    assert set(whole_lines(TABLE).splitlines(keepends=True)) <= set(lines)
    assert amc_hw("profile", *TINY).code == 0
    assert set(TABLE.read_bytes().splitlines(keepends=True)) == set(lines)


def test_a_full_disk_while_searching_loses_nothing(here: Path, amc_hw: Run, disk_with: Disk) -> None:
    """Full in the journal, then for the weights, then not any more."""
    expected = json.loads(Path("whole/result.json").read_text())
    journal, whole = Path("run/metrics.jsonl"), Path("whole/metrics.jsonl")
    with disk_with(1500):
        done = amc_hw(*HALF)
    assert done.code == 1 and str(journal) in done.mistake
    rows = whole_lines(journal)
    assert rows.count(b"\n") > 1 and whole.read_bytes().startswith(rows)
    assert whole.stat().st_size < 12_000 < Path("whole/pruned.pt").stat().st_size
    with disk_with(12_000):
        done = amc_hw(*HALF)
    assert done.code == 1 and "pruned.pt" in done.mistake
    assert journal.read_bytes() == whole.read_bytes()
    assert not Path("run/pruned.pt").exists() and not Path("run/policy.json").exists()
    resumed = json.loads(amc_hw(*HALF, "--json").out)
    assert resumed == expected | {"policy": "run/policy.json", "seconds": resumed["seconds"]}
    assert Path("run/policy.json").read_bytes() == Path("whole/policy.json").read_bytes()
    assert sorted(path.name for path in Path("run").iterdir()) == sorted(path.name for path in Path("whole").iterdir())


def test_a_folder_that_cannot_be_written(here: Path, amc_hw: Run) -> None:
    Path("file").write_text("mine")
    for out, code, words in (("file", 2, "file is a file, not a folder"), ("file/run", 1, "cannot write in file/run")):
        done = amc_hw(*HALF[:-1], out)
        assert done.code == code and words in done.mistake
    shutil.rmtree("latency_tables")
    Path("latency_tables").write_text("mine")
    done = amc_hw("profile", *TINY)
    assert done.code == 1 and str(TABLE) in done.mistake
    assert Path("file").read_text() == Path("latency_tables").read_text() == "mine"


def test_a_table_that_is_a_folder(here: Path, amc_hw: Run) -> None:
    TABLE.unlink()
    TABLE.mkdir()
    assert amc_hw("profile", *TINY).mistake


def test_a_full_disk_leaves_no_half_settings(here: Path, amc_hw: Run, disk_with: Disk) -> None:
    with disk_with(20):
        assert amc_hw("init", "--device", "fake").code == 1
    assert amc_hw("init", "--device", "fake").code == 0


# ---- runs


def test_a_folder_of_another_search_is_refused(ended: Path, amc_hw: Run) -> None:
    before = files(ended)
    for option, value in (("--seed", "1"), ("--episodes", "7"), ("--latency-ratio", "0.7"), ("--slack", "0.1")):
        done = amc_hw(*HALF, option, value)
        assert done.code == 2 and "run holds another search" in done.mistake and "--out" in done.mistake
        key = "budget" if option == "--latency-ratio" else option.removeprefix("--")
        assert f"({key}: " in done.mistake and value in done.mistake
    assert files(ended) == before
    assert json.loads(amc_hw(*HALF, "--json").out) == json.loads((ended / "result.json").read_text())  # the same one


def test_a_policy_that_was_deleted_is_made_again(ended: Path, amc_hw: Run) -> None:
    before = files(ended)
    for name in ("policy.json", "pruned.pt"):
        (ended / name).unlink()
        assert amc_hw(*HALF).code == 0
        assert files(ended)["policy.json"] == before["policy.json"] and (ended / "pruned.pt").exists()
    assert files(ended)["metrics.jsonl"] == before["metrics.jsonl"]


def test_runs_without_a_folder_of_their_own_are_numbered(here: Path, amc_hw: Run) -> None:
    quick = ("search", *TINY, "--data", "npz:images.npz", "--episodes", "2", "--latency-ratio", "0.6", "--json")
    found = [json.loads(amc_hw(*quick, "--seed", seed).out)["policy"] for seed in ("0", "1", "0")]
    assert found == [f"runs/nets.py-tiny-fake-latency_ratio0.6-{number}/policy.json" for number in (1, 2, 1)]


def test_a_folder_that_another_search_is_at_work_in(ended: Path, amc_hw: Run) -> None:
    before = files(ended)
    with alone_in(ended):
        done = amc_hw(*HALF)
    assert done.code == 2 and "another search is at work in run" in done.mistake and files(ended) == before


def test_help_where_the_settings_are_broken(here: Path, amc_hw: Run) -> None:
    Path("amc-hw.toml").write_text("rubbish")
    assert amc_hw("graph", "--model", "plain20").code == 2
    helped = amc_hw("graph", "-h")
    assert helped.code == 0 and "--model" in helped.out


def test_widths_that_are_empty_are_not_all_of_them(here: Path, amc_hw: Run) -> None:
    assert "0 widths given" in amc_hw("predict", *TINY, "--widths", "").mistake


def test_a_damaged_journal_is_refused_and_kept(ended: Path, amc_hw: Run) -> None:
    journal = ended / "metrics.jsonl"
    whole = journal.read_bytes()
    (ended / "result.json").unlink()
    lines = whole.splitlines(keepends=True)
    for damaged in ([*lines[:3], b"rubbish\n", *lines[4:]], [b"rubbish\n", *lines[1:]], [lines[0], *lines[2:]]):
        journal.write_bytes(b"".join(damaged))
        done = amc_hw(*HALF)
        assert done.code == 2 and str(journal) in done.mistake and "--out" in done.mistake
        assert journal.read_bytes() == b"".join(damaged)
    journal.write_bytes(whole)
    assert amc_hw(*HALF).code == 0


def test_a_journal_with_a_line_of_something_else(ended: Path, amc_hw: Run) -> None:
    (ended / "result.json").unlink()
    lines = (ended / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (ended / "metrics.jsonl").write_bytes(b"".join([*lines[:3], b"3\n", *lines[4:]]))
    assert amc_hw(*HALF).mistake


def test_a_journal_of_a_later_version(ended: Path, amc_hw: Run) -> None:
    journal = ended / "metrics.jsonl"
    first, rest = journal.read_text().split("\n", 1)
    journal.write_text(json.dumps(json.loads(first) | {"pruner": "l1"}) + "\n" + rest)
    done = amc_hw(*HALF)
    assert done.code == 2 and "--out" in done.mistake


USES_OF_A_POLICY = (("measure",), ("predict",), ("export", "--format", "onnx", "--out", "small.onnx"))


def test_a_policy_that_is_none(ended: Path, amc_hw: Run) -> None:
    policy = json.loads((ended / "policy.json").read_text())
    texts = {
        "text": "no policy",
        "list": "[]",
        "future": json.dumps(policy | {"schema_version": 9}),
        "lacking": json.dumps({key: value for key, value in policy.items() if key != "kept"}),
    }
    for name, text in texts.items():
        path = ended / f"{name}.json"
        path.write_text(text)
        for command in USES_OF_A_POLICY:
            done = amc_hw(*command, "--policy", str(path))
            assert done.code == 2 and str(path) in done.mistake, done.err
    for command in USES_OF_A_POLICY:
        missing = amc_hw(*command, "--policy", "nowhere.json")
        assert missing.code == 2 and "nowhere.json" in missing.mistake
    for option, value in (("--widths", "1,2,3"), ("--model", "nets.py:tiny"), ("--input", "1x3x8x8")):
        both = amc_hw("measure", "--policy", "run/policy.json", option, value)
        assert both.code == 2 and option in both.mistake
    weights = ended / "pruned.pt"
    whole = weights.read_bytes()
    for damage in (b"no weights", whole[:1000], whole[:-1]):
        weights.write_bytes(damage)
        damaged = amc_hw("measure", "--policy", "run/policy.json")
        assert damaged.code == 2 and "pruned.pt" in damaged.mistake
    weights.unlink()
    gone = amc_hw("measure", "--policy", "run/policy.json")
    assert gone.code == 2 and "pruned.pt" in gone.mistake
    assert not Path("small.onnx").exists()


def test_a_policy_whose_weights_are_an_empty_file(ended: Path, amc_hw: Run) -> None:
    (ended / "pruned.pt").write_bytes(b"")
    for command in (USES_OF_A_POLICY[0], USES_OF_A_POLICY[2]):
        done = amc_hw(*command, "--policy", "run/policy.json")
        assert done.code == 2 and "pruned.pt" in done.mistake


def test_weights_of_another_network_beside_a_policy(ended: Path, amc_hw: Run) -> None:
    state = torch.load(ended / "pruned.pt")
    torch.save(state | {"0.weight": torch.zeros(3, 3, 3, 3)}, ended / "pruned.pt")
    for command in USES_OF_A_POLICY[::2]:
        done = amc_hw(*command, "--policy", "run/policy.json")
        assert done.code == 2 and all(part in done.mistake for part in ("pruned.pt", "0.weight is (3, 3, 3, 3)"))


def test_a_policy_of_a_network_whose_operators_have_changed(ended: Path, amc_hw: Run) -> None:
    export = (*USES_OF_A_POLICY[2], "--policy", "run/policy.json")
    same = amc_hw(*export)
    assert same.code == 0 and same.err == ""
    source = Path("nets.py").read_text()
    Path("nets.py").write_text(source.replace("nn.ReLU()", "nn.ReLU6()"))
    assert source != Path("nets.py").read_text()
    changed = amc_hw(*export)
    assert changed.code == 0 and "warning: run/policy.json is of a network with other operators" in changed.err
    policy = json.loads((ended / "policy.json").read_text())
    del policy["network"], policy["sources"]  # as older ones are
    (ended / "policy.json").write_text(json.dumps(policy))
    assert amc_hw(*export).err == ""


@pytest.mark.parametrize("name", ["policy.json", "pruned.pt", "result.json"])
def test_a_folder_with_files_of_a_users_own_is_not_written_to(here: Path, amc_hw: Run, name: str) -> None:
    own = here / "own" / name
    own.parent.mkdir()
    own.write_text("mine")
    for dry in ((), ("--dry-run",)):
        done = amc_hw(*HALF, "--out", "own", *dry)
        assert done.code == 2 and f"own has a {name} that is not of this search: name another --out" in done.mistake
    assert own.read_text() == "mine"


def test_a_method_that_is_misspelt(here: Path, amc_hw: Run) -> None:
    assert "'knapsak': did you mean knapsack? known are" in amc_hw(*HALF, "--method", "knapsak").mistake
    compared = ("compare", *TINY, *DATA, "--latency-ratio", "0.6")
    assert "'gredy': did you mean greedy? known are" in amc_hw(*compared, "--methods", "uniform,gredy").mistake


def test_an_option_that_is_missing_is_one_line(ended: Path, amc_hw: Run) -> None:
    done = amc_hw("export", "--policy", "run/policy.json")
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "torch, onnx, tflite" in done.err


def test_the_network_that_a_search_begins_with_is_exported_too(here: Path, amc_hw: Run) -> None:
    flags = ("export", "--unpruned", *TINY[2:], *DATA, "--format", "onnx")
    done = amc_hw(*flags, "--out", "whole.onnx", "--json")
    assert done.code == 0 and json.loads(done.out)["max_abs_diff"] < 1e-4
    module = load_model("nets.py:tiny").module
    values = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession("whole.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(values).numpy(), atol=1e-5)
    torch.save({name: value / 2 for name, value in module.state_dict().items()}, "half.pt")
    halved = amc_hw(*flags, "--checkpoint", "half.pt", "--batch", "2", "--out", "half.onnx")
    assert halved.code == 0 and Path("half.onnx").read_bytes() != Path("whole.onnx").read_bytes()
    without = ("export", "--unpruned", *TINY[2:], *flags[-2:])
    done = amc_hw(*without, "--out", "drawn.onnx", "--json")
    assert json.loads(done.out)["max_abs_diff"] < 1e-4 and len(json.loads(done.out)["mean"]) == 3
    assert "--data is missing" in amc_hw(*without, "--int8", "--out", "a.onnx").mistake
    random = amc_hw("export", "--unpruned", "--model", "resnet20", *DATA, *flags[-2:], "--out", "a.onnx")
    assert random.code == 2 and "--checkpoint is missing: the weights of resnet20 would be random" in random.mistake
    for neither in ((), ("--policy", "run/policy.json", "--unpruned")):
        done = amc_hw("export", *neither, "--format", "onnx", "--out", "a.onnx")
        assert done.code == 2 and "either --policy" in done.mistake and "--unpruned" in done.mistake
    both = amc_hw("export", "--policy", "run/policy.json", "--checkpoint", "half.pt", *flags[-2:], "--out", "a.onnx")
    assert both.code == 2 and "leave --checkpoint out" in both.mistake
    assert not Path("a.onnx").exists()


def test_a_policy_without_one_of_the_groups(ended: Path, amc_hw: Run) -> None:
    policy = json.loads((ended / "policy.json").read_text())
    policy["widths"].popitem()
    (ended / "policy.json").write_text(json.dumps(policy))
    for command in USES_OF_A_POLICY:
        done = amc_hw(*command, "--policy", "run/policy.json")
        assert done.code == 2 and "run/policy.json" in done.mistake, done.err


def test_a_policy_whose_widths_are_not_those_it_keeps(ended: Path, amc_hw: Run) -> None:
    policy = json.loads((ended / "policy.json").read_text())
    policy["widths"][next(iter(policy["widths"]))] = 7
    (ended / "policy.json").write_text(json.dumps(policy))
    for command in USES_OF_A_POLICY:
        done = amc_hw(*command, "--policy", "run/policy.json")
        assert done.code == 2 and "run/policy.json" in done.mistake, done.out


# ---- amc-hw.toml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('divice = "fake"', ("'divice'", "device")),
        ("device = 3", ("device", "3")),
        ('seed = "one"', ("seed", "'one'")),
        ("seed = true", ("seed", "True")),
        ("device = fake", ("not valid TOML",)),
    ],
)
def test_settings_that_are_wrong(here: Path, amc_hw: Run, text: str, words: tuple[str, ...]) -> None:
    Path("amc-hw.toml").write_text(text)
    before = files(here)
    for command in (HALF, ("profile", *TINY), ("graph",)):
        done = amc_hw(*command)
        assert done.code == 2 and all(word in done.mistake for word in ("amc-hw.toml", *words)), done.err
    assert files(here) == before


def test_init_twice(here: Path, amc_hw: Run) -> None:
    assert amc_hw("init", "--device", "fake", "--seed", "3", "--json").code == 0
    before = Path("amc-hw.toml").read_text()
    done = amc_hw("init", "--device", "host")
    assert done.code == 2 and "amc-hw.toml" in done.mistake
    assert Path("amc-hw.toml").read_text() == before
    Path("amc-hw.toml").unlink()
    unknown = amc_hw("init", "--device", "nowhere")
    assert unknown.code == 2 and "'nowhere'" in unknown.mistake and not Path("amc-hw.toml").exists()


def test_init_adds_to_what_is_there_and_changes_none_of_it(here: Path, amc_hw: Run) -> None:
    record_settings({"device": "fake", "model": "nets.py:tiny"})  # as profile does
    Path("w.pt").touch()
    Path("task.py").touch()
    assert amc_hw("init", "--checkpoint", "w.pt", "--model", "nets.py:tiny", "--evaluate", "task.py:score").code == 0
    wanted = {"device": "fake", "model": "nets.py:tiny", "checkpoint": "w.pt", "evaluate": "task.py:score"}
    assert read_settings() == wanted
    before = Path("amc-hw.toml").read_bytes()
    done = amc_hw("init", "--model", "resnet20", "--data", "digits")
    assert done.code == 2 and "amc-hw.toml says model = 'nets.py:tiny' already: edit it" in done.mistake
    done = amc_hw("init")
    message = "is there already: edit it, name what to add (--device ...), or remove it first"
    assert done.code == 2 and message in done.mistake
    assert Path("amc-hw.toml").read_bytes() == before


def test_profile_records_what_the_next_commands_take(here: Path, amc_hw: Run) -> None:
    assert amc_hw("profile", *TINY).code == 0
    settings = Path("amc-hw.toml").read_text()
    assert 'device = "fake"' in settings and 'model = "nets.py:tiny"' in settings
    search = ("search", "--latency-ratio", "0.6", "--data", "npz:images.npz", "--episodes", "6", "--json")
    found = json.loads(amc_hw(*search).out)
    assert found["policy"].startswith("runs/") and json.loads(Path(found["policy"]).read_text())["device"] == "fake"
    assert json.loads(Path(found["policy"]).read_text())["model"] == "nets.py:tiny"
    # what stands there wins over what is profiled, a flag over both
    Path("amc-hw.toml").write_text('# mine\nmodel = "plain20"')
    assert amc_hw("profile", *TINY).code == 0
    assert Path("amc-hw.toml").read_text() == '# mine\nmodel = "plain20"\ndevice = "fake"\n'
    assert json.loads(amc_hw("graph", "--model", "nets.py:tiny", "--json").out)["model"] == "nets.py:tiny"
    assert json.loads(amc_hw("graph", "--json").out)["model"] == "plain20"


# ---- interruptions


def interrupted(folder: Path, file: Path, lines: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, sent Ctrl-C once `file` has that many lines."""
    command = [sys.executable, "-m", "amc_hw.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # ignored where the tests run in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def write_slow(*, pause_s: float) -> None:
    """`slow.py`: the same network in a program whose disk is slow, so that there is something to interrupt."""
    text = Path("nets.py").read_text().split("if __name__")[0]
    if pause_s:
        text += f"import time\nfsync = os.fsync\nos.fsync = lambda file: (fsync(file), time.sleep({pause_s}))\n"
    Path("slow.py").write_text(text)


@pytest.mark.slow
def test_ctrl_c_while_profiling(here: Path, amc_hw: Run) -> None:
    complete = TABLE.read_bytes()
    TABLE.unlink()
    write_slow(pause_s=0.05)
    done = interrupted(here, TABLE, 3, "profile", "--device", "fake", "--model", "slow.py:tiny")
    assert done.returncode == 130 and done.stdout == "", done.stderr
    assert "interrupted" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    kept = whole_lines(TABLE)
    assert kept.count(b"\n") >= 3 and kept != complete and complete.startswith(kept)
    assert amc_hw("profile", *TINY).code == 0
    assert set(TABLE.read_bytes().splitlines()) == set(complete.splitlines())


@pytest.mark.slow
def test_ctrl_c_while_searching(here: Path, amc_hw: Run) -> None:
    expected = Path("whole/metrics.jsonl").read_bytes().splitlines()
    model = ("--model", "slow.py:tiny")
    write_slow(pause_s=0.05)
    done = interrupted(here, here / "run/metrics.jsonl", 4, *HALF, *model)
    assert done.returncode == 130 and done.stdout == "", done.stderr
    assert "interrupted" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    rows = whole_lines(Path("run/metrics.jsonl")).splitlines()
    assert 4 <= len(rows) < len(expected) and rows[1:] == expected[1 : len(rows)]
    write_slow(pause_s=0)
    assert amc_hw(*HALF, *model).code == 0
    assert Path("run/metrics.jsonl").read_bytes().splitlines()[1:] == expected[1:]


# ---- help and --json


def commands(group: click.Group = command_line.cli, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
    return found


@pytest.mark.parametrize("names", [(), *commands()], ids=" ".join)
def test_help_has_an_example_before_the_options(here: Path, amc_hw: Run, names: tuple[str, ...]) -> None:
    for flag in ("-h", "--help"):
        done = amc_hw(*names, flag)
        assert done.code == 0 and done.err == ""
    text = re.split(r"^(?:Options|Network and data):$", done.out, flags=re.MULTILINE)[0]
    assert text != done.out
    examples = [line.split() for line in text.splitlines() if line.startswith(f"  {' '.join(['amc-hw', *names])} ")]
    examples += [line.split() for line in text.splitlines() if line.strip() == " ".join(["amc-hw", *names])]
    assert examples, text
    command: Any = command_line.cli
    for name in names:
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word for example in examples for word in example if names and word.startswith("--")}
    assert used <= known


@pytest.mark.parametrize("name", ["search", "compare", "check"])
def test_many_options_are_shown_in_sections(here: Path, amc_hw: Run, name: str) -> None:
    text = amc_hw(name, "-h").out
    titles = re.findall(r"^([A-Z][a-z ]+):$", text, flags=re.MULTILINE)
    assert titles[:2] == ["Network and data", "Device"] and titles[-2:] == ["Search", "Run"]
    for parameter in command_line.cli.commands[name].params:
        assert len(re.findall(rf"^  {parameter.opts[-1]} ", text, flags=re.MULTILINE)) == 1


KEYS: dict[str, set[str]] = {
    "init": {"file"},
    "devices": {"devices"},
    "graph": {"groups", "frozen", "macs", "params"},
    "profile": {"table", "rows_total", "rows_new", "seconds"},
    "validate": {"samples", "median_abs_pct_error", "within_5pct", "within_10pct", "spearman"},
    "predict": {"predicted_ms", "error_pct", "device", "runtime", "threads", "dtype", "batch"},
    "search": {
        *("policy", "accuracy", "baseline_accuracy", "accuracy_split", "predicted_ms", "measured_ms", "baseline_ms"),
        *("speedup", "latency_source", "macs", "baseline_macs", "params", "episodes", "seconds"),
        *("device", "runtime", "threads", "dtype", "batch"),
    },
    "measure": {
        *("baseline_ms", "pruned_ms", "speedup", "speedup_ci95", "p90_ms", "runs", "device", "runtime", "threads"),
        *("dtype", "batch"),
    },
    "export": {"file", "bytes", "max_abs_diff", "outputs"},
    "report": {"file"},
    "check": {"accuracy", "groups", "frozen", "measurements_missing", "profile_minutes", "search_minutes"},
    "compare": {"rows"},  # tests/amc_hw/test_compare.py
    "finetune": {"accuracy_before", "accuracy_after"},  # tests/amc_hw/test_finetune.py
    "import-log": {"table", "rows_new"},  # tests/amc_hw/test_pixel1.py
    "table": set(),  # its commands: tests/amc_hw/test_tables.py
}


def test_json_is_one_object_with_the_keys_of_the_contract(here: Path, amc_hw: Run) -> None:
    def found(*arguments: str) -> dict[str, Any]:
        done = amc_hw(*arguments, "--json")
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) == 1

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        result = json.loads(done.out, parse_constant=refuse)
        assert isinstance(result, dict) and KEYS[arguments[0]] <= set(result), arguments
        return result

    assert found("init", "--device", "fake", "--model", "nets.py:tiny", "--data", "npz:images.npz")["file"]
    devices = found("devices")["devices"]
    assert all({"name", "target", "runtime", "tables"} <= set(device) for device in devices)
    assert set(json.loads(amc_hw("devices", "check", "fake", "--json").out)) >= {"probes", "ok"}
    graph = found("graph")
    assert all({"name", "width"} <= set(group) for group in graph["groups"])
    assert [set(group) >= {"name", "reason"} for group in graph["frozen"]] == [True]  # the output
    profiled = found("profile")
    assert profiled["rows_new"] == 0 and Path(profiled["table"]).is_file()
    assert found("check")["measurements_missing"] == 0
    validated = found("validate", "--samples", "4")
    assert 0 <= validated["within_5pct"] <= validated["within_10pct"] <= 1 and len(validated["samples"]) == 4
    assert found("predict", "--widths", "16,16,24")["predicted_ms"] < found("predict")["predicted_ms"]
    searched = found("search", "--latency-ratio", "0.6", "--episodes", "6", "--out", "run")
    assert searched["accuracy_split"] == "test" and searched["latency_source"] == "measured"
    assert searched["baseline_accuracy"] == 1 and 0 < searched["accuracy"] <= 1
    assert searched["speedup"] == pytest.approx(searched["baseline_ms"] / searched["measured_ms"])
    measured = found("measure", "--policy", searched["policy"])
    low, high = measured["speedup_ci95"]
    assert low <= measured["speedup"] <= high and measured["p90_ms"] >= measured["pruned_ms"]
    assert measured["pruned_ms"] == pytest.approx(searched["measured_ms"], rel=0.01)
    assert Path(found("report", "run")["file"]).read_text().startswith("<!doctype html>")
    exported = found("export", "--policy", searched["policy"], "--format", "onnx", "--out", "small.onnx")
    assert exported["bytes"] == Path(exported["file"]).stat().st_size and exported["max_abs_diff"] < 1e-4
    assert set(KEYS) == set(command_line.cli.commands)  # a new command stands here, too


def test_dry_runs_write_nothing(here: Path, amc_hw: Run) -> None:
    TABLE.write_bytes(b"".join(TABLE.read_bytes().splitlines(keepends=True)[:40]))
    before = files(here)
    planned = json.loads(amc_hw("profile", *TINY, "--dry-run", "--json").out)
    assert planned["table"] == str(TABLE) and planned["rows_total"] == 39 and planned["minutes"] >= 0
    assert files(here) == before
    amc_hw("profile", *TINY)
    Path("amc-hw.toml").unlink()
    before = files(here)
    planned = json.loads(amc_hw(*HALF, "--dry-run", "--json").out)
    assert planned["episodes"] == 6 and planned["minutes"] > 0
    planned = json.loads(amc_hw("validate", *TINY, "--samples", "7", "--dry-run", "--json").out)
    assert planned["samples"] == 7 and planned["minutes"] > 0
    assert files(here) == before


def test_a_dry_run_looks_at_what_the_folder_holds(ended: Path, amc_hw: Run) -> None:
    held = files(ended)
    refused = amc_hw(*HALF, "--seed", "5", "--out", "run", "--dry-run")
    assert refused.code == 2 and "run holds another search (seed: 0, not 5): name another --out" in refused.mistake
    assert amc_hw(*HALF, "--out", "run", "--dry-run").code == 0
    Path("file").write_text("")
    refused = amc_hw(*HALF, "--out", "file", "--dry-run")
    assert refused.code == 2 and refused.mistake == "amc-hw: file is a file, not a folder"
    assert files(ended) == held


def test_what_a_profile_records_it_says_once(here: Path, amc_hw: Run) -> None:
    said = "device, model recorded in amc-hw.toml"
    first = amc_hw("profile", *TINY, "--keep", "0").err
    assert said in first and "need no flags for it (repeat --keep)" in first
    assert said not in amc_hw("profile", *TINY).err


def test_a_search_by_auto_is_one_of_the_method_that_it_stands_for(here: Path, amc_hw: Run) -> None:
    done = amc_hw(*HALF, "--method", "auto", "--json")
    assert done.code == 0, done.err
    policy = json.loads(done.out)["policy"]
    header = json.loads((Path(policy).parent / "metrics.jsonl").read_text().splitlines()[0])
    assert header["method"] == AUTO
    assert json.loads(amc_hw(*HALF, "--method", AUTO, "--json").out)["policy"] == policy


def test_few_episodes_for_an_agent_are_said(here: Path, amc_hw: Run) -> None:
    assert "warning: 6 episodes are few for ddpg to decide on 3 groups: give --episodes 30" in (
        said := amc_hw(*HALF).err
    )
    assert "--method auto" in said
    said = amc_hw(*HALF, "--method", "auto", "--out", "other").err
    assert "6 episodes are few for knapsack to decide on 3 groups: give --episodes 7 or more\n" in said
    assert "are few" not in amc_hw(*HALF, "--method", "random", "--out", "third").err


@pytest.mark.parametrize("method", ["knapsack", "greedy", "uniform", "shallow", "deep"])
def test_a_method_that_needs_a_budget_says_so(here: Path, amc_hw: Callable, method: str) -> None:
    done = amc_hw(*SEARCH, "--reward", "flops", "--method", method)
    assert done.code == 2 and f"--method {method} needs a budget" in done.mistake


def test_a_policy_says_how_its_images_are_normalised_and_for_which_dtype_it_is(here: Path, amc_hw: Callable) -> None:
    policy = Path("whole/policy.json")
    changed = json.loads(policy.read_text()) | {"mean": [0.1, 0.2, 0.3], "dtype": "int8"}
    policy.write_text(json.dumps(changed))
    assert api.open_policy(policy)[0].model.mean == (0.1, 0.2, 0.3)
    for options, words in (((), "of this float32 file"), (("--int8",), None)):
        done = amc_hw("export", "--policy", str(policy), "--format", "onnx", "--out", "a.onnx", *options)
        assert done.code == 0, done.err
        assert ("was searched for int8" in done.err) == (words is not None) and (words or "") in done.err


@pytest.mark.parametrize(("command", "said"), [("export", "interrupted"), ("search", "interrupted: the same command")])
def test_only_what_goes_on_says_so(
    here: Path, amc_hw: Callable, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, command, stopped)
    arguments = {"export": ("--policy", "whole/policy.json", "--format", "onnx", "--out", "a.onnx"), "search": HALF[1:]}
    done = amc_hw(command, *arguments[command])
    assert done.code == 130 and done.err.splitlines()[-1].startswith(said)
    assert ("goes on" in done.err) == (command == "search")


def test_distortion_alone_is_no_budget(here: Path, amc_hw: Callable) -> None:
    done = amc_hw(*SEARCH, "--reward", "distortion")
    assert done.code == 2 and "give one of --latency-ms" in done.mistake
    done = amc_hw("compare", *SEARCH[1:-2], "--methods", "ddpg", "--reward", "distortion", "--latency-ratio", "0.6",
                  "--episodes", "6", "--out", "both", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert (
        json.loads(next(Path("both").glob("ddpg-*/metrics.jsonl")).read_text().splitlines()[0])["reward"]
        == "distortion"
    )


def test_auto_without_a_budget_is_a_method_that_needs_none(here: Path, amc_hw: Callable) -> None:
    done = amc_hw(*SEARCH, "--reward", "flops", "--method", "auto", "--out", "run")
    assert done.code == 0, done.err
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["method"] == FREE


def test_another_network_of_the_same_name_is_another_search(here: Path, ended: Path, amc_hw: Callable) -> None:
    """A factory that brings its own weights: trained anew, it is not what was searched."""
    assert amc_hw(*HALF).code == 0
    source = Path("nets.py").read_text()
    Path("nets.py").write_text(source.replace("rng = np.random.default_rng(0)", "rng = np.random.default_rng(7)"))
    assert Path("nets.py").read_text() != source
    done = amc_hw(*HALF)
    assert done.code == 2 and "run holds another search (weights_sha256: " in done.mistake


OWN = """
import torch

def score(net):
    return float(net(torch.ones(1, 3, 16, 16)).softmax(1).max())

def inputs():
    yield torch.linspace(-1, 1, 60 * 3 * 16 * 16).reshape(60, 3, 16, 16).sin()
"""
OWN_SEARCH = ("search", *TINY, "--evaluate", "task.py:score", "--calibrate", "task.py:inputs", "--flops-ratio", "0.6")
OWN_SEARCH = (*OWN_SEARCH, "--method", "uniform", "--episodes", "1", "--json")


def test_another_function_of_the_same_name_is_another_search(here: Path, amc_hw: Callable) -> None:
    Path("task.py").write_text(OWN)
    first = json.loads(amc_hw(*OWN_SEARCH).out)
    again = amc_hw(*OWN_SEARCH)
    assert json.loads(again.out) == first and "has this search's result already" in again.err
    Path("task.py").write_text(OWN.replace(".max()", ".min()"))
    other = json.loads(amc_hw(*OWN_SEARCH).out)
    assert other["policy"] != first["policy"] and other["accuracy"] < first["accuracy"]


def test_another_input_is_another_search(here: Path, amc_hw: Callable) -> None:
    Path("task.py").write_text(OWN)
    first = json.loads(amc_hw(*OWN_SEARCH).out)
    Path("task.py").write_text(OWN.replace("16, 16)", "12, 12)"))
    before = json.loads(Path(first["policy"]).with_name("metrics.jsonl").read_text().splitlines()[0])
    wide = ("--input", "1x3x12x12", "--out", str(Path(first["policy"]).parent))
    assert amc_hw("profile", *TINY, *wide[:2]).code == 0
    done = amc_hw(*OWN_SEARCH, *wide)
    assert done.code == 2 and f"(network: '{before['network']}', not '" in done.mistake


def test_a_policy_says_all_of_its_task(here: Path, amc_hw: Callable, tmp_path: Path) -> None:
    """Both functions, and images with labels beside them, which happen to be the default."""
    Path("task.py").write_text(OWN)
    policy = Path(json.loads(amc_hw(*OWN_SEARCH).out)["policy"])
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"data": "digits", "calibrate": None}))
    flags = ("--flops-ratio", "0.9", "--method", "uniform", "--episodes", "1", "--out", "more")
    done = amc_hw("search", "--from-policy", str(policy), *flags)
    assert "is missing" not in done.err and "the model takes 3x16x16" not in done.err and done.code == 0, done.err
    assert "the pruned network's score " in done.err and f"beside      {policy}, not its unpruned network" in done.out


def test_an_export_finds_the_functions_of_its_policy_and_takes_other_data(
    here: Path, amc_hw: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("task.py").write_text(OWN)
    policy = Path(json.loads(amc_hw(*OWN_SEARCH).out)["policy"]).resolve()
    monkeypatch.chdir(tmp_path)
    flags = ("export", "--policy", str(policy), "--format", "onnx", "--out", "a.onnx")
    assert amc_hw(*flags).code == 0
    done = amc_hw(*flags, "--data", "npz:nowhere.npz")
    assert done.code == 2 and "there is no file 'nowhere.npz'" in done.mistake
    done = amc_hw(*flags[:-1], "a.tflite")
    assert done.code == 2 and "a.tflite is named as a file of tflite, not of --format onnx" in done.mistake


def test_a_policy_finds_its_data_from_elsewhere(
    here: Path, ended: Path, amc_hw: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Path("run/policy.json").resolve()
    monkeypatch.chdir(tmp_path)
    assert amc_hw("export", "--policy", str(policy), "--format", "onnx", "--out", "a.onnx").code == 0


def test_another_project_of_the_same_names_is_not_taken_for_the_policys(
    here: Path, ended: Path, amc_hw: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working folder has a file of that name: the one that is as it was in the search decides."""
    policy, source = Path("run").resolve(), Path("nets.py").read_text()
    found = json.loads((policy / "policy.json").read_text())
    assert list(found["sources"]) == ["nets.py"] and len(found["sources"]["nets.py"]) == 64
    other = tmp_path / "other"
    shutil.copytree("latency_tables", other / "latency_tables")
    monkeypatch.chdir(other)
    Path("nets.py").write_text(source.replace("nn.ReLU()", "nn.ReLU6()"))
    done = amc_hw("predict", "--policy", str(policy))  # of a folder
    assert done.code == 0 and "changed" not in done.err and "not as it was" not in done.err
    (here / "nets.py").write_text(f"{source}\n# a remark\n")
    done = amc_hw("predict", "--policy", str(policy))
    assert "nets.py is not as it was when" in done.err and "has its source changed?" in done.err
    Path("nets.py").unlink()
    (here / "nets.py").unlink()
    done = amc_hw("predict", "--policy", str(policy))
    assert done.code == 2 and "names 'nets.py': there is none here, and none in a folder above" in done.mistake


def test_another_dtype_is_another_search(here: Path, ended: Path, amc_hw: Callable) -> None:
    header, _, rest = Path("run/metrics.jsonl").read_text().partition("\n")
    assert json.loads(header)["dtype"] == "float32" and json.loads(header)["batch"] == 1
    changed = json.dumps(json.loads(header) | {"dtype": "int8"})
    Path("run/metrics.jsonl").write_text(f"{changed}\n{rest}")
    done = amc_hw(*HALF)
    assert done.code == 2 and "(dtype: 'int8', not 'float32')" in done.mistake


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a clock shows, to be moved."""
    seconds = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    return seconds


def test_progress_without_a_terminal_is_a_line_now_and_then(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress()
    for done in range(8):
        progress(done, 8, "begun" if done == 0 else "best accuracy 0.9")
        now[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "begun",
        "3/8, 50 s left: best accuracy 0.9",
        "6/8, 20 s left: best accuracy 0.9",
    ]


def test_the_time_that_is_left_is_of_what_was_done_since_the_clock_was_set(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a fine-tuning, which says 0 at the end of every epoch, and goes on in the middle of a run."""
    progress = Progress()
    for done in range(101, 105):
        now[0] += 10
        progress(done, 200, "epoch 2")
    progress(0, 200, "epoch 2 ended")
    for done in range(105, 109):
        now[0] += 10
        progress(done, 200, "epoch 3")
    said = capsys.readouterr().err.splitlines()
    assert said == ["103/200, 970 s left: epoch 2", "epoch 2 ended", "107/200, 930 s left: epoch 3"]


def test_what_is_left_is_told_early_where_it_can_be(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for done in range(40):
        progress(done, 400, "begun" if done == 0 else "best accuracy 0.9")
        now[0] += 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["begun", "5/400, 395 s left: best accuracy 0.9", "35/400, 365 s left: best accuracy 0.9"]


def test_debug_shows_where(here: Path, amc_hw: Run) -> None:
    plain, debug = amc_hw("profile", "--device", "nowhere"), amc_hw("--debug", "profile", "--device", "nowhere")
    assert (plain.code, debug.code) == (2, 2)
    assert "Traceback" not in plain.err and "Traceback" in debug.err and debug.err.endswith(plain.err)


def test_a_policy_is_measured_in_the_dtype_that_it_was_searched_for_unless_asked(ended: Path, amc_hw: Run) -> None:
    done = amc_hw("measure", "--policy", "run/policy.json", "--json")
    assert json.loads(done.out)["dtype"] == "float32" and done.err == ""
    done = amc_hw("measure", "--policy", "run/policy.json", "--dtype", "int8", "--json")
    assert json.loads(done.out)["dtype"] == "int8"
    assert "warning: run/policy.json was searched for float32, this is of int8" in done.err


def test_check_without_data_says_what_it_can(here: Path, amc_hw: Run) -> None:
    """A network of random weights, too: what is frozen, and what profiling takes."""
    done = amc_hw("check", *TINY)
    assert done.code == 0 and "groups      3 to prune, 1 frozen (amc-hw graph says why)" in done.out
    assert "has all that a search needs" in done.out
    assert "accuracy    not known, nor what a search takes: no --data, nor --evaluate and --calibrate" in done.out
    found = json.loads(amc_hw("check", "--device", "fake", "--model", "plain20", "--json").out)
    assert found["accuracy"] is None and found["search_minutes"] is None and found["measurements_missing"] > 0
    assert "there is no file 'typo.py'" in amc_hw("check", "--device", "fake", "--model", "typo.py:make").mistake


def test_check_names_the_frozen_group_that_locks_most(here: Path, amc_hw: Run) -> None:
    Path("net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    input_shape = (3, 8, 8)\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, 2, 1), nn.Linear(64, 5)\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(self.a(x)).view(-1, 64))\n"
    )
    done = amc_hw("check", "--device", "fake", "--model", "net.py:Net")
    share = (8 * 4 * 9 * 16 + 64 * 5) / (3 * 8 * 64 + 8 * 4 * 9 * 16 + 64 * 5)
    told = "groups      1 to prune, 2 frozen, most of all b: reshaped to 64 channels at view: torch.flatten(x, 1)"
    assert (
        f"{told} takes any number; it is read or written by {share:.1%} of the MACs (amc-hw graph tells all)"
        in done.out
    )


def test_a_search_from_python_needs_data_as_the_command_does(here: Path) -> None:
    subject = api.open_subject(device="fake", model="nets.py:tiny")
    with pytest.raises(UserError, match="--data is missing .or --evaluate and --calibrate.: digits, the default, goes"):
        api.search(subject, api.SearchConfig(latency_ratio=0.6))
    assert not Path("runs").exists()


def test_paths_are_strings_from_python_too(ended: Path) -> None:
    subject = api.open_subject(device="fake", model="nets.py:tiny")
    config = api.SearchConfig(out="strings", data="npz:images.npz", latency_ratio=0.6, episodes=2, method="uniform")  # type: ignore[arg-type]
    assert api.search(subject, config)["policy"] == "strings/policy.json"
    assert api.export("run", file_format="onnx", out="small.onnx")["file"] == "small.onnx"
    assert api.CompareConfig(("uniform",), (("latency_ratio", 0.6),), out="both").out == Path("both")  # type: ignore[arg-type]
    assert api.FinetuneConfig(out="tuned", checkpoint="w.pt").checkpoint == Path("w.pt")  # type: ignore[arg-type]


def test_a_label_without_an_output_is_found_before_anything_is_searched(here: Path, amc_hw: Run) -> None:
    """Where it is among the training images alone, too."""
    arrays = dict(np.load("images.npz"))
    arrays["y_train"][3] = 4
    np.savez("wrong.npz", **arrays)
    for command in (("check", *TINY), ("search", *TINY, "--latency-ratio", "0.6", "--out", "wrong")):
        done = amc_hw(*command, "--data", "npz:wrong.npz")
        assert done.code == 2 and "labels reach 4, the network has 4 outputs (0 to 3)" in done.mistake


def test_weights_and_outputs_that_are_no_numbers(here: Path, amc_hw: Run) -> None:
    state = runpy.run_path("nets.py")["tiny"]()[0].state_dict()
    torch.save(state | {"9.bias": torch.full((4,), float("nan"))}, "nan.pt")
    torch.save(state | {"9.weight": torch.full((4, 48), 1e38)}, "huge.pt")
    for command in (
        ("check", *TINY, *DATA),
        HALF,
        ("export", "--unpruned", *TINY[2:], "--format", "onnx", "--out", "x"),
    ):
        done = amc_hw(*command, "--checkpoint", "nan.pt")
        assert (done.code, "'nan.pt' holds weights that are no finite numbers: 9.bias" in done.mistake) == (2, True)
    done = amc_hw("check", *TINY, *DATA, "--checkpoint", "huge.pt")
    told = "nets.py:tiny gives numbers that are not finite: look at its weights and its inputs"
    assert done.code == 2 and told in done.mistake
    Path("task.py").write_text(
        "import torch\ndef score(net): return 0.5\ndef inputs(): yield torch.full((4, 3, 16, 16), float('inf'))\n"
    )
    done = amc_hw("check", *TINY, "--evaluate", "task.py:score", "--calibrate", "task.py:inputs")
    assert done.code == 2 and "task.py:inputs yielded numbers that are not finite" in done.mistake


def test_what_to_profile_is_said_with_all_that_was_asked(here: Path, amc_hw: Run) -> None:
    shutil.rmtree("latency_tables")
    asked = ("--model", "plain20", "--input", "3x16x16", "--floor", "0.5", "--keep", "layer1.*", "--threads", "2")
    done = amc_hw("predict", "--device", "fake", *asked, "--widths", "0.5")
    command = "amc-hw profile --device fake --model plain20 --input 3x16x16 --threads 2 --floor 0.5 --keep 'layer1.*'"
    assert done.code == 2 and f"'{command}'" in done.mistake


def test_an_unpruned_network_with_weights_of_its_own_says_so(here: Path, amc_hw: Run) -> None:
    done = amc_hw("export", "--unpruned", *TINY[2:], "--format", "onnx", "--out", "x.onnx")
    assert done.code == 0
    assert "warning: no checkpoint is named: the weights are those that nets.py:tiny brings itself" in done.err


def test_an_unpruned_network_of_two_inputs_is_exported(here: Path, amc_hw: Run) -> None:
    Path("two.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = torch.nn.Conv1d(2, 8, 3), torch.nn.Linear(8 + 4, 3)\n"
        "    def forward(self, x, y):\n"
        "        return self.b(torch.cat([self.a(x).relu().mean(2), y], 1))\n"
        "def make():\n"
        "    return Two(), (torch.zeros(1, 2, 20), torch.zeros(1, 4))\n"
    )
    done = amc_hw("export", "--unpruned", "--model", "two.py:make", "--format", "onnx", "--out", "two.onnx")
    assert done.code == 0 and "inputs x, as 1x2x1x20 and 1x4, channels first" in done.out


def test_init_looks_whether_files_are_there(here: Path, amc_hw: Run) -> None:
    for name, value in (("--checkpoint", "nowhere.pt"), ("--data", "npz:nowhere.npz"), ("--model", "nowhere.py:make")):
        done = amc_hw("init", "--device", "fake", name, value)
        assert done.code == 2 and f"there is no '{value.split(':')[name == '--data']}' here" in done.mistake
    assert not Path("amc-hw.toml").exists()


def test_the_input_shape_is_remembered_with_its_model(here: Path, amc_hw: Run) -> None:
    done = amc_hw("profile", "--device", "fake", "--model", "plain20", "--input", "3x16x16", "--max-minutes", "0.01")
    assert done.code == 0 and "device, model, input recorded in amc-hw.toml" in done.err
    assert read_settings() == {"device": "fake", "model": "plain20", "input": "3x16x16"}
    found = {
        macs: json.loads(amc_hw("graph", "--json", *more).out)["macs"]
        for macs, more in (("own", ()), ("typed", ("--model", "plain20")), ("other", ("--model", "resnet20")))
    }
    assert (
        found["own"] == found["typed"] < 0.3 * json.loads(amc_hw("graph", "--input", "3x32x32", "--json").out)["macs"]
    )
    assert found["other"] > 3 * found["own"]  # has its own input
    torch.save(load_model("plain20").module.state_dict(), "plain.pt")
    record_settings({"checkpoint": "plain.pt"})
    assert amc_hw("check", "--model", "resnet20", "--episodes", "2").code == 0  # and weights
    amc_hw("profile", "--model", "resnet20", "--input", "3x8x8", "--max-minutes", "0.01")
    assert read_settings()["input"] == "3x16x16"
    Path("amc-hw.toml").unlink()
    assert amc_hw("init", "--device", "fake", "--model", "plain20", "--input", "3x16x16").code == 0
    assert read_settings()["input"] == "3x16x16"


def test_names_and_options_that_are_nearly_right(here: Path, amc_hw: Run) -> None:
    told = amc_hw("check", *TINY, "--data", "images.npz").mistake
    assert "'images.npz' does not say what it is: write npz:images.npz" in told
    Path("pictures").mkdir()
    assert "write imagefolder:pictures" in amc_hw("check", *TINY, "--data", "pictures").mistake
    Path("mine.py").write_text("def make(width=4): return width % 3 + '%d'\n")
    assert "mine.py:make (width='abc') raised" in amc_hw("graph", "--model", "mine.py:make?width=abc").mistake
    lines = TABLE.read_text().splitlines()
    row = json.loads(lines[5])
    del row["samples_ms"]
    lines[5] = json.dumps(row)
    TABLE.write_text("\n".join(lines) + "\n")
    assert "fake.jsonl:6: 'samples_ms' is missing" in amc_hw("predict", *TINY).mistake


def test_weights_of_a_training_of_ones_own_are_kept(ended: Path, amc_hw: Run) -> None:
    module = load_pruned("run")
    with torch.no_grad():
        module[9].bias += 1
    saved = save_pruned(module.train(), "run", "run-tuned")
    assert saved == Path("run-tuned/policy.json")
    again = load_pruned(saved)
    assert not again.training and torch.equal(again[9].bias, module[9].bias)
    assert save_pruned(torch.nn.DataParallel(module), "run", "run-tuned") == saved  # the next epoch's
    assert save_pruned(copy.deepcopy(module).half(), "run", "run-half").exists()
    assert load_pruned("run-half")[9].bias.dtype == torch.float32
    assert amc_hw("export", "--policy", "run-tuned", "--format", "onnx", "--out", "tuned.onnx").code == 0
    assert amc_hw("measure", "--policy", "run-tuned").code == 0
    with pytest.raises(UserError, match="save_pruned takes the network itself, not a OrderedDict"):
        save_pruned(module.state_dict(), "run", "other")
    with pytest.raises(UserError, match="run holds something else: name another folder"):
        save_pruned(module, "run", "run")
    with pytest.raises(UserError, match="the network is not that of run: 0.weight is missing, new or of another shape"):
        save_pruned(runpy.run_path("nets.py")["tiny"]()[0], "run", "other")
    with torch.no_grad():
        module[9].bias *= float("nan")
    with pytest.raises(UserError, match="no finite numbers: 9.bias"):
        save_pruned(module, "run", "other")
    assert not Path("other").exists()
    assert (
        "amc_hw.save_pruned keeps"
        in amc_hw("export", "--policy", "run", "--checkpoint", "w.pt", "--format", "onnx", "--out", "x").mistake
    )


def test_an_int8_table_is_a_table_of_its_own(here: Path, amc_hw: Run) -> None:
    spec = ("--device", "fake", "--model", "nets.py:tiny", "--dtype", "int8")
    done = amc_hw("predict", *spec)
    assert done.code == 2 and "dtype" in done.mistake
    before = Path("latency_tables/fake.jsonl").read_bytes()
    found = json.loads(amc_hw("profile", *spec, "--json").out)
    assert found["table"] != "latency_tables/fake.jsonl" and Path(found["table"]).exists()
    assert Path("latency_tables/fake.jsonl").read_bytes() == before
    done = amc_hw("search", *spec, *DATA, "--latency-ratio", "0.6", "--episodes", "4", "--out", "eight")
    assert done.code == 0 and json.loads(Path("eight/policy.json").read_text())["dtype"] == "int8"
    assert json.loads(amc_hw("measure", "--policy", "eight/policy.json", "--json").out)["dtype"] == "int8"


@pytest.mark.parametrize("file_format", ["onnx", pytest.param("tflite", marks=needs_litert)])
def test_an_int8_export_reports_both_accuracies(ended: Path, amc_hw: Run, file_format: str) -> None:
    command = ("export", "--policy", "run/policy.json", "--format", file_format, "--int8", "--out", "small", "--json")
    found = json.loads(amc_hw(*command).out)
    assert 0 <= found["accuracy"] <= 1 and abs(found["accuracy"] - found["float_accuracy"]) < 0.2
    assert Path("small").stat().st_size == found["bytes"] and found["accuracy_split"] == "held-out"
    assert 0 < found["rms_diff"] < 0.2 and found["max_abs_diff"] < 0.5 * found["largest"]
    layout = "channels_last" if file_format == "tflite" else "channels_first"
    assert (found["layout"], len(found["mean"]), len(found["std"])) == (layout, 3, 3)
    text = amc_hw(*command[:-1]).out.splitlines()
    assert "in the root mean square; accuracy" in text[0]
    assert text[1].startswith(f"it reads (x - mean) / std of images x in [0, 1], {layout.replace('_', ' ')}: mean 0.")
    done = amc_hw(*command, "--int8-io")
    if file_format == "onnx":
        assert done.code == 2 and "--int8-io goes with --int8 and --format tflite" in done.mistake
    else:
        whole = json.loads(done.out)
        assert abs(whole["accuracy"] - found["accuracy"]) < 0.1 and whole["rms_diff"] < 0.2
        from ai_edge_litert.interpreter import Interpreter

        runs = Interpreter("small")
        (first,), (last,) = runs.get_input_details(), runs.get_output_details()
        stored = {each["name"]: list(each["quantization"]) for each in (first, last)}
        assert whole["quantization"] == stored
        assert f"input is int8: (q - {stored['input'][1]}) * " in amc_hw(*command[:-1], "--int8-io").out
        assert {each["dtype"] for each in (*runs.get_input_details(), *runs.get_output_details())} == {np.int8}
    done = amc_hw("export", "--policy", "run/policy.json", "--format", "torch", "--int8", "--out", "small.pt2")
    assert done.code == 2 and "int8 is for onnx and tflite, not for torch" in done.mistake


def test_what_was_pruned_is_pruned_further(ended: Path, amc_hw: Run) -> None:
    """The second policy is one of the first network: its channels are some of those that the first kept."""
    command = (
        "search",
        "--from-policy",
        "run/policy.json",
        "--latency-ratio",
        "0.8",
        "--episodes",
        "4",
        "--out",
        "twice",
    )
    done = amc_hw(*command, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    first, second = (json.loads(Path(name, "policy.json").read_text()) for name in ("run", "twice"))
    assert {name: set(kept) <= set(first["kept"][name]) for name, kept in second["kept"].items()} == dict.fromkeys(
        first["kept"], True
    )
    assert sum(second["widths"].values()) < sum(first["widths"].values()) and second["model"] == first["model"]
    assert found["baseline_macs"] == json.loads(Path("run/result.json").read_text())["macs"]
    measured = json.loads(amc_hw("measure", "--policy", "twice/policy.json", "--json").out)
    assert measured["macs"] == found["macs"] and measured["baseline_macs"] > found["baseline_macs"]
    module, images = api.load_pruned("twice/policy.json"), torch.zeros(2, *second["input_shape"])
    assert module(images).shape[0] == 2
    done = amc_hw(*command, "--model", "nets.py:tiny")
    assert done.code == 2 and "leave --model out" in done.mistake


def test_check_says_what_a_search_would_meet(here: Path, amc_hw: Run) -> None:
    spec = ("--device", "fake", "--model", "nets.py:tiny", *DATA)
    found = json.loads(amc_hw("check", *spec, "--json").out)
    assert found["measurements_missing"] == 0 and found["groups"] > 0 and 0 <= found["accuracy"] <= 1
    assert found["search_minutes"] > 0 and found["smallest_macs"] < found["macs"]
    assert "one in" in (said := amc_hw("check", *spec, "--refit", "fast", "--workers", "2").out) and "2 workers" in said
    shutil.rmtree("latency_tables")
    before = files(here)
    done = amc_hw("check", *spec)
    assert done.code == 0 and "measurements to make" in done.out and files(here) == before
    assert amc_hw("check", *spec, "--expect-accuracy", "0.01").code == 2
    frozen = json.loads(amc_hw("graph", "--model", "nets.py:tiny", "--keep", "*", "--device", "fake", "--json").out)
    assert not frozen["groups"] and all(group["latency_share"] is None for group in frozen["frozen"])
