"""The shipped H100 table: what it predicts, beside what was measured on the card later."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amc_hw import api
from profilers.device import load_device
from profilers.targets import open_target

TIMED = Path(__file__).parents[2] / "docs/experiments/0001-runs/h100-times.csv"  # by scripts/time_policies
#: AMC's released policies, and how much faster than the unpruned network they were there (scripts/published_widths).
PUBLISHED = {
    "24,48,96,80,192,200,328,352,368,360,328,400,736,752": 1.54,
    "16,48,88,80,192,168,336,360,360,352,352,368,768,680": 1.68,
}


def test_it_is_an_archive_of_the_live_device(here: Path) -> None:
    live, away = load_device("h100"), load_device("h100-archive")
    assert (live.batch, live.dtype, live.channel_multiple) == (away.batch, away.dtype, away.channel_multiple)
    assert live.soc in away.soc and f" {live.execution}, " in away.runtime_version
    assert not open_target(away).can_time


@pytest.mark.parametrize("widths", PUBLISHED)
def test_published_policies_are_predicted(here: Path, widths: str, amc_hw: Callable) -> None:
    done = amc_hw("predict", "--device", "h100-archive", "--model", "mobilenet_v1", "--widths", widths, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["predicted_speedup"] == pytest.approx(PUBLISHED[widths], rel=0.025)


def test_policies_that_were_found_with_it_and_timed_are_predicted(here: Path) -> None:
    subject = api.open_subject(device="h100-archive", model="mobilenet_v1")
    predictor = api.read_predictor(subject)
    with TIMED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 44
    widths = [subject.graph.parse_widths(row["widths"].replace(" ", ",")) for row in rows]
    predicted = np.array([predictor.predict(subject.network_at(each)) for each in widths])
    off = np.abs(predicted / [float(row["ms"]) for row in rows] - 1)
    assert np.median(off) < 0.01 and off.max() < 0.02
    assert predictor.predict(subject.network_at(None)) == pytest.approx(float(rows[0]["baseline_ms"]), rel=0.02)
