"""The shipped Pixel 1 table: what it predicts, its exact completions, and searches for a device that is away."""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amc_hw import api
from amc_hw.resources import Completer, CostModel, latency_model
from profilers.device import shipped
from profilers.predictor import Predictor
from profilers.table import LatencyTable, Measurement

NETS = Path(__file__).parents[1] / "crash_worker.py"  # a user's file with a network of its own weights
REAL_LOGS = Path(__file__).parents[2].parent / "shared/data/pixel1-tflite-logs"
needs_real_logs = pytest.mark.skipif(not REAL_LOGS.is_dir(), reason="the real logs are not here")

THREE_QUARTERS = "24,48,96,96,192,192,384,384,384,384,384,384,768,768"
HALF_MACS = "24,48,96,80,192,200,328,352,368,360,328,400,736,752"  # of the paper, searched under half of the MACs
AWAY = "the device is not here"
PIXEL = ("--device", "pixel1", "--model", "mobilenet_v1")
TINY = ("--device", "attic", "--model", "nets.py:tiny")
SEARCH = ("search", *TINY, "--data", "npz:images.npz", "--episodes", "6", "--out", "run", "--json")


Run = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return LatencyTable.read(shipped("latency_tables") / "pixel1.jsonl")


@pytest.fixture(scope="module")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> api.Subject:
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        return api.open_subject(device="pixel1", model="mobilenet_v1")


def predictor_of(rows: list[Measurement], table: LatencyTable) -> Predictor:
    return Predictor(LatencyTable(table.path, table.identity, {}, rows), lambda graph: graph, extrapolate=True)


# ---- predictions


@pytest.mark.parametrize("left_out", [0, 1, 2], ids=["full", "three quarters", "half of the MACs"])
def test_two_of_its_networks_predict_the_third(table: LatencyTable, left_out: int) -> None:
    names = list(dict.fromkeys(row.details["digest"] for row in table.rows))
    assert len(names) == 3
    others = [row for row in table.rows if row.details["digest"] != names[left_out]]
    measured = [row for row in table.of_type("network") if row not in others]
    assert (len(others), len(measured)) == (2 * len(table.rows) // 3, 2)
    predictor = predictor_of(others, table)
    for row in measured:
        assert row.graph is not None
        assert predictor.predict(row.graph) == pytest.approx(row.median_ms, rel=0.04)


@pytest.mark.parametrize(("widths", "speedup"), [(HALF_MACS, 1.81), (THREE_QUARTERS, 1.71)])
def test_published_speedups_are_predicted(amc_hw: Run, widths: str, speedup: float) -> None:
    done = amc_hw("predict", *PIXEL, "--widths", widths, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["predicted_speedup"] == pytest.approx(speedup, abs=0.03)
    assert found["baseline_predicted_ms"] == pytest.approx(123.1, rel=0.02)
    assert 0 < found["error_pct"] < 4


def test_the_device_is_not_here(amc_hw: Run) -> None:
    for command in (("measure", *PIXEL, "--widths", HALF_MACS), ("profile", *PIXEL), ("validate", *PIXEL)):
        done = amc_hw(*command)
        assert (done.code, done.out) == (3, "")
        assert done.err.splitlines()[-1].startswith("amc-hw: pixel1 is an archive: ") and AWAY in done.err
    checked = amc_hw("devices", "check", "pixel1")
    assert checked.code == 3 and "MISSING" in checked.out and AWAY in checked.out


@needs_real_logs
def test_the_shipped_rows_are_those_of_the_logs(tmp_path: Path, table: LatencyTable, amc_hw: Run) -> None:
    """As scripts/pixel1_table makes them, on a device of another name: the shipped table does not begin its own."""
    (tmp_path / "device_configs").mkdir()
    shutil.copy(shipped("device_configs") / "pixel1.toml", tmp_path / "device_configs/again.toml")

    def add(name: str, *widths: str) -> Any:
        logs = [str(REAL_LOGS / f"{name}_run{run}.txt") for run in (1, 2)]
        return amc_hw("import-log", "--device", "again", "--model", "mobilenet_v1", *widths, *logs)

    path = tmp_path / "latency_tables/again.jsonl"
    assert add("mobilenet").code == 0
    before = path.read_bytes()
    wrong = add("0.75mobilenet")  # without its widths
    assert wrong.code == 2 and "does not fit: conv 32x112x112->64 relu6" in wrong.err
    assert path.read_bytes() == before
    assert add("0.75mobilenet", "--widths", THREE_QUARTERS).code == 0
    assert add("0.5flops", "--widths", HALF_MACS).code == 0
    assert add("mobilenet").out.splitlines()[-1].endswith(": 0 new rows, 180 in all")
    swapped = tmp_path / "swapped.txt"
    swapped.write_text((REAL_LOGS / "0.75mobilenet_run1.txt").read_text() + "\n")  # not known by its checksum
    done = amc_hw("import-log", "--device", "again", "--model", "mobilenet_v1", "--widths", HALF_MACS, str(swapped))
    assert done.code == 2 and "does not fit: depthwise_conv 80x56x56->80" in done.err
    header, *rows = path.read_text().splitlines()
    shipped_header, *shipped_rows = table.path.read_text().splitlines()
    assert rows == shipped_rows
    assert json.loads(header)["identity"] == json.loads(shipped_header)["identity"]


# ---- what a search takes from it: the cheapest way to finish a policy


def sub_network(pixel: api.Subject, first: int, offered: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Grids in which all groups but four neighbours have their full width alone."""
    grids = [(width,) for width in pixel.graph.full_widths]
    for group in range(first, first + 4):
        grids[group] = offered(group)
    return grids


def coarse(pixel: api.Subject) -> Callable[[int], tuple[int, ...]]:
    """Six of a group's widths, from the narrowest to the full one."""
    return lambda group: tuple(pixel.grids[group][round(at)] for at in np.linspace(0, len(pixel.grids[group]) - 1, 6))


def upper(pixel: api.Subject) -> Callable[[int], tuple[int, ...]]:
    """The six widest of a group's widths."""
    return lambda group: pixel.grids[group][-6:]


def off_the_multiple(pixel: api.Subject) -> Callable[[int], tuple[int, ...]]:
    """The full width and five just below it, which no block of channels fits."""
    return lambda group: tuple(range(pixel.grids[group][-1] - 5, pixel.grids[group][-1] + 1))


CASES = [(first, offered) for offered in (coarse, upper, off_the_multiple) for first in (0, 2, 5, 8, 10)]


def all_costs(model: CostModel) -> dict[tuple[int, ...], float]:
    return {widths: model.cost(widths) for widths in itertools.product(*model.grids)}


@pytest.mark.parametrize(("first", "offered"), CASES, ids=[f"{offered.__name__}-{first}" for first, offered in CASES])
def test_completions_on_its_table_equal_brute_force(
    pixel: api.Subject, table: LatencyTable, first: int, offered
) -> None:
    predictor = predictor_of(table.rows, table)
    model = latency_model(pixel.graph, sub_network(pixel, first, offered(pixel)), predictor)
    costs = all_costs(model)
    assert len(costs) == 6**4
    for widths in [*costs][::100]:  # the model is the predictor
        assert model.cost(widths) == pytest.approx(predictor.predict(pixel.network_at(widths)), rel=1e-9)
    rng = np.random.default_rng(first)
    prefixes = {()} | {
        tuple(int(rng.choice(grid)) for grid in model.grids[:length])
        for length in range(first, first + 5)
        for _ in range(4)
    }
    for limit in ({}, {"max_entries": 36}):  # tables for all steps at once, and elimination step by step
        completer = Completer(model, **limit)
        assert completer.exact
        for decided in sorted(prefixes):
            left = {widths: cost for widths, cost in costs.items() if widths[: len(decided)] == decided}
            cost, widths = completer.best(decided)
            assert cost == pytest.approx(min(left.values()), rel=1e-12) and left[widths] == cost
            if len(decided) == len(model.grids):
                continue
            expected = [
                min(cost for widths, cost in left.items() if widths[len(decided)] == width)
                for width in model.grids[len(decided)]
            ]
            np.testing.assert_allclose(completer.offers(decided), expected, rtol=1e-12)


def test_its_table_is_not_monotonic(pixel: api.Subject, table: LatencyTable) -> None:
    """Else the narrowest widths were always the cheapest, and brute force would show nothing."""
    depthwise = [row for row in table.of_type("op") if row.op is not None and row.op.kind == "depthwise_conv"]
    by_width = {width: [row.median_ms for row in depthwise if row.op.axes == (width,)] for width in (24, 32)}
    assert min(by_width[24]) > max(by_width[32])
    predictor = predictor_of(table.rows, table)
    narrow, wide = (pixel.network_at([width, *pixel.graph.full_widths[1:]]).ops[1] for width in (24, 32))
    assert predictor.op_ms([narrow])[0] > predictor.op_ms([wide])[0] + 0.2
    model = latency_model(pixel.graph, sub_network(pixel, 8, off_the_multiple(pixel)), predictor)
    costs = all_costs(model)
    full = pixel.graph.full_widths
    assert costs[full] < costs[(*full[:8], 511, *full[9:])]
    assert min(costs, key=lambda widths: costs[widths]) != tuple(grid[0] for grid in model.grids)


# ---- a search without the device


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network, its images, and an archive whose rows are those of the fake device."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copy(NETS, folder / "nets.py")
    runpy.run_path(str(NETS))["write_images"](folder / "images.npz")
    (folder / "device_configs").mkdir()
    (folder / "device_configs/attic.toml").write_text(
        'target = "archive"\nruntime = "formula"\nruntime_version = "1"\nsoc = "a phone of long ago"\n'
    )
    with contextlib.chdir(folder):
        subject = api.open_subject(device="fake", model="nets.py:tiny")
        api.profile(subject, progress=lambda *_: None)
        fake = LatencyTable.read(Path("latency_tables/fake.jsonl"))
        identity = replace(fake.identity, soc="a phone of long ago")
        LatencyTable.open(Path("latency_tables/attic.jsonl"), identity).append(fake.rows)
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, amc_hw: Run) -> Path:
    """A copy of the workshop to work in."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    return tmp_path


def unpruned_ms(amc_hw: Run) -> float:
    return json.loads(amc_hw("predict", *TINY, "--json").out)["predicted_ms"]


@pytest.mark.parametrize("budget", ["latency_ratio", "latency_ms", "flops_ratio"])
def test_a_search_ends_with_a_prediction(here: Path, amc_hw: Run, budget: str) -> None:
    value = 0.7 * unpruned_ms(amc_hw) if budget == "latency_ms" else 0.7
    done = amc_hw(*SEARCH, f"--{budget.replace('_', '-')}", str(value))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [found[key] for key in ("measured_ms", "baseline_ms", "speedup", "speedup_ci95")] == [None] * 4
    assert found["latency_source"] == "predicted" and json.loads(Path("run/result.json").read_text()) == found
    policy = json.loads(Path(found["policy"]).read_text())
    assert list(policy["widths"].values()) == found["widths"]
    again = json.loads(amc_hw("predict", "--policy", found["policy"], "--json").out)  # on the device of the policy
    assert again["predicted_ms"] == pytest.approx(found["predicted_ms"])
    assert again["predicted_speedup"] == pytest.approx(found["predicted_speedup"])
    share = found["macs"] / found["baseline_macs"] if budget == "flops_ratio" else 1 / found["predicted_speedup"]
    assert 0.4 < share <= 0.7 * (1 + 1e-9)
    measured = amc_hw("measure", "--policy", found["policy"])
    assert measured.code == 3 and AWAY in measured.err


def test_a_search_says_in_words_that_nothing_was_measured(here: Path, amc_hw: Run) -> None:
    done = amc_hw(*[word for word in SEARCH if word != "--json"], "--latency-ratio", "0.7")
    assert done.code == 0, done.err
    assert "ms predicted" in done.out and f"not measured: {AWAY}" in done.out and "x predicted" in done.out


def test_a_budget_that_the_unpruned_network_meets_by_prediction(here: Path, amc_hw: Run) -> None:
    baseline_ms = unpruned_ms(amc_hw)
    done = amc_hw(*SEARCH, "--latency-ms", str(1.0001 * baseline_ms))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["policy"], found["episodes"], found["latency_source"]) == (None, 0, "predicted")
    assert (found["measured_ms"], found["baseline_ms"], found["speedup"]) == (None, None, None)
    assert found["predicted_ms"] == pytest.approx(baseline_ms) and found["macs"] == found["baseline_macs"]
    assert "nothing to prune" in found["message"]
    assert not Path("run").exists()
    missed = amc_hw(*SEARCH, "--latency-ms", str(0.9999 * baseline_ms))
    assert missed.code == 0 and json.loads(missed.out)["policy"] == "run/policy.json"


def test_an_archive_and_its_table_are_of_one_identity(here: Path, amc_hw: Run) -> None:
    config = Path("device_configs/attic.toml")
    config.write_text(config.read_text().replace("long ago", "today"))
    done = amc_hw(*SEARCH, "--latency-ratio", "0.7")
    assert done.code == 2 and "'a phone of long ago', not 'a phone of today'" in done.err
