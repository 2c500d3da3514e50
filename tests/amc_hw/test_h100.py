"""The shipped H100 table: what it predicts, beside what was measured on the card later."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amc_hw import api
from amc_hw.errors import UserError
from profilers.device import load_device, shipped
from profilers.targets import open_target

TIMED = Path(__file__).parents[2] / "docs/experiments/0001-runs/h100-times.csv"  # by scripts/time_policies
#: Published policies, and how much faster than the unpruned network they were there (scripts/published_widths).
PUBLISHED = {
    "24,48,96,96,192,192,384,384,384,384,384,384,768,768": 1.53,  # fills tiles that the table sees in part
    "24,48,96,80,192,200,328,352,368,360,328,400,736,752": 1.54,
    "16,48,88,80,192,168,336,360,360,352,352,368,768,680": 1.68,
}


def test_it_is_an_archive_of_the_live_device(here: Path) -> None:
    live, away = load_device("h100"), load_device("h100-archive")
    assert (live.batch, live.dtype, live.channel_multiple) == (away.batch, away.dtype, away.channel_multiple)
    assert live.soc in away.soc and f" {live.execution}, " in away.runtime_version
    assert not open_target(away).can_time


def test_its_table_is_looked_for_and_nothing_is_promised(here: Path, amc_hw: Callable) -> None:
    done = amc_hw("devices", "check", "h100-archive")
    assert done.code == 3 and "ok      table: " in done.out and "h100-archive.jsonl, 866 rows" in done.out
    assert "import-log" not in done.out  # there are no such logs of a GPU
    Path("device_configs").mkdir()
    config = (shipped("device_configs") / "h100-archive.toml").read_text()
    Path("device_configs/h100-archive.toml").write_text(config.replace("batch = 50", "batch = 1"))
    done = amc_hw("devices", "check", "h100-archive")
    assert "MISSING table: " in done.out and "with batch 50, not 1: correct h100-archive.toml" in done.out


@pytest.mark.parametrize("command", ["predict", "check"])
def test_another_network_is_refused_at_once(here: Path, command: str, amc_hw: Callable) -> None:
    more = ("--data", "npz:images.npz") if command == "check" else ()
    done = amc_hw(command, "--device", "h100-archive", "--model", "nets.py:tiny", *more)
    assert done.code == 2 and "has no measurement for conv" in done.mistake
    assert done.mistake.endswith("the device is not here to measure it")


def test_a_log_that_is_refused_leaves_no_copy_of_the_table(
    here: Path, amc_hw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("log.txt is of another network")

    monkeypatch.setattr(api.import_logs, "read", lambda path: path)  # a log, as far as can be told without the network
    monkeypatch.setattr(api.import_logs, "rows_from", refuse)
    done = amc_hw("import-log", "--device", "h100-archive", "--model", "mobilenet_v1", "log.txt")
    assert done.code == 2 and "of another network" in done.mistake
    assert not Path("latency_tables/h100-archive.jsonl").exists()


@pytest.mark.parametrize("widths", PUBLISHED)
def test_published_policies_are_predicted(here: Path, widths: str, amc_hw: Callable) -> None:
    done = amc_hw("predict", "--device", "h100-archive", "--model", "mobilenet_v1", "--widths", widths, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["predicted_speedup"] == pytest.approx(PUBLISHED[widths], rel=0.03)


def test_policies_that_were_found_with_it_and_timed_are_predicted(here: Path) -> None:
    subject = api.open_subject(device="h100-archive", model="mobilenet_v1")
    predictor = api.read_predictor(subject)
    with TIMED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 44
    widths = [subject.graph.parse_widths(row["widths"].replace(" ", ",")) for row in rows]
    predicted = np.array([predictor.predict(subject.network_at(each)) for each in widths])
    off = np.abs(predicted / [float(row["ms"]) for row in rows] - 1)
    assert np.median(off) < 0.005 and off.max() < 0.015
    assert predictor.predict(subject.network_at(None)) == pytest.approx(float(rows[0]["baseline_ms"]), rel=0.02)
