"""Scoring in processes beside the search: the same scores, the same search for a given number, nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amc_hw import api
from amc_hw.errors import FailedError
from amc_hw.evaluate import Evaluator
from amc_hw.task import load_task
from amc_hw.workers import GUARD, Recipe, Workers

SEARCH = ("search", "--device", "fake", "--model", "nets.py:tiny", "--data", "npz:images.npz", "--latency-ratio", "0.6")


def _recipe(subject: api.Subject) -> Recipe:
    return Recipe.of(subject, {"data": "npz:images.npz", "seed": 0}, seed=0, refit="faithful")


def test_workers_give_the_scores_of_the_evaluator(here: Path) -> None:
    subject = api.open_subject(device="fake", model="nets.py:tiny")
    task = load_task(subject.model, data="npz:images.npz", seed=0)
    evaluator = Evaluator(subject.model, subject.graph, task, seed=0)
    policies = [tuple(grid[place % len(grid)] for grid in subject.grids) for place in range(4)]
    with Workers(2, _recipe(subject)) as workers:
        workers.ahead(policies)
        assert [workers(widths) for widths in policies] == [evaluator.judge(widths) for widths in policies]
        assert workers(policies[0]) == evaluator.judge(policies[0])  # asked for again
        final = evaluator.final(policies[1])
        assert workers(policies[1], "test") == task.test_scores([final])[0]
        workers.ahead(policies[:2], "final")
        assert workers.begun(policies[1], "final") and not workers.begun(policies[1])
        found, wanted = workers(policies[1], "final"), final.state_dict()
        assert found.keys() == wanted.keys() and not workers.begun(policies[1], "final")
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)
    assert not multiprocessing.active_children()


def test_workers_normalise_as_the_search_does(here: Path) -> None:
    """A policy that is pruned further brings its own normalisation, whatever the model's file says by now."""
    subject = api.open_subject(device="fake", model="nets.py:tiny")
    subject = replace(subject, model=replace(subject.model, mean=(0.9, 0.1, 0.3), std=(0.2, 0.7, 0.4)))
    evaluator = Evaluator(subject.model, subject.graph, load_task(subject.model, data="npz:images.npz", seed=0), seed=0)
    widths = tuple(grid[0] for grid in subject.grids)
    with Workers(1, _recipe(subject)) as workers:
        assert workers(widths) == evaluator.judge(widths)


SEVERAL = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 64, 3), nn.Conv2d(1, 64, 3), nn.Conv2d(64, 96, 3)
        self.d = nn.Linear(96, 4)

    def forward(self, image, depth):
        return self.d(torch.relu(self.c(torch.relu(self.a(image) + self.b(depth)))).mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Two().eval(), (torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))


def inputs():
    torch.manual_seed(1)
    yield torch.randn(60, 3, 16, 16), torch.randn(60, 1, 16, 16)


def score(net):
    (batch,) = inputs()
    return -float((net(*batch) - make()[0](*batch)).square().mean())
"""


@pytest.mark.slow
def test_a_network_of_several_inputs_and_its_policy_open_again_from_elsewhere(
    here: Path, amc_hw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("two.py").write_text(SEVERAL)
    subject = ("--device", "fake", "--model", "two.py:make")
    task = ("--evaluate", "two.py:score", "--calibrate", "two.py:inputs")
    assert amc_hw("profile", *subject).code == 0
    for workers in ("1", "2"):
        search = ("search", *subject, *task, "--latency-ratio", "0.7", "--episodes", "4", "--workers", workers)
        assert (done := amc_hw(*search, "--out", f"run{workers}")).code == 0, done.err
    assert amc_hw("measure", "--policy", "run2/policy.json").code == 0
    assert amc_hw("report", "run1", "run2").code == 0 and Path("run1/report.html").exists()
    both = ("export", "--policy", "run2/policy.json", "--format", "onnx", "--out", "small.onnx")
    assert (done := amc_hw(*both)).code == 0, done.err
    staged = ("search", "--from-policy", "run1/policy.json", "--latency-ratio", "0.9", "--episodes", "3")
    assert (done := amc_hw(*staged, "--workers", "2", "--out", "run3")).code == 0, done.err


@pytest.mark.slow
def test_workers_find_the_file_of_a_policy_that_lies_elsewhere(
    here: Path, amc_hw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amc_hw(*SEARCH, "--episodes", "3", "--out", "run").code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path("latency_tables").symlink_to("../latency_tables")
    data = ("--data", "npz:../images.npz", "--latency-ratio", "0.8", "--episodes", "3", "--workers", "2")
    done = amc_hw("search", "--from-policy", "../run/policy.json", *data, "--out", "more")
    assert done.code == 0, done.err


def test_a_worker_that_dies_is_one_clear_line(here: Path) -> None:
    with Workers(1, _recipe(api.open_subject(device="fake", model="nets.py:tiny"))) as workers:
        widths = api.open_subject(device="fake", model="nets.py:tiny").graph.full_widths
        workers(widths)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        with pytest.raises(FailedError, match="run the same command again"):
            workers(widths)


@pytest.mark.slow
def test_a_script_without_a_guard_is_told(here: Path) -> None:
    script = """
from amc_hw import api
subject = api.open_subject(device="fake", model="nets.py:tiny")
found = dict(data="npz:images.npz", latency_ratio=0.6, episodes=4, method="random", workers=2)
api.search(subject, api.SearchConfig(**found))
"""
    Path("plain.py").write_text(script)
    done = subprocess.run([sys.executable, "plain.py"], capture_output=True, text=True)
    assert done.returncode == 1 and GUARD in done.stderr.splitlines()[-1]
    head, body = script.split("subject", 1)
    lines = f"subject{body}".strip().replace("\n", "\n    ")
    Path("guarded.py").write_text(f'{head}if __name__ == "__main__":\n    {lines}\n')
    subprocess.run([sys.executable, "guarded.py"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddpg", "knapsack", "evolution", "greedy", "sensitivity", "random"])
def test_a_search_with_workers_is_reproducible_and_goes_on(here: Path, amc_hw: Callable, method: str) -> None:
    command = (*SEARCH, "--episodes", "12", "--workers", "2", "--method", method, "--json")
    found = [json.loads(amc_hw(*command, "--out", out).out) for out in ("a", "b")]
    assert found[0]["widths"] == found[1]["widths"]
    journals = [Path(out, "metrics.jsonl").read_bytes().splitlines(keepends=True) for out in ("a", "b")]
    assert journals[0] == journals[1]
    Path("c").mkdir()
    Path("c/metrics.jsonl").write_bytes(b"".join(journals[0][: len(journals[0]) // 2]))
    assert json.loads(amc_hw(*command, "--out", "c").out)["widths"] == found[0]["widths"]
    assert Path("c/metrics.jsonl").read_bytes() == b"".join(journals[0])
    assert not multiprocessing.active_children()


def test_the_number_of_workers_is_checked_and_part_of_the_search(here: Path, amc_hw: Callable) -> None:
    assert amc_hw(*SEARCH, "--workers", "0").mistake == "amc-hw: --workers 0: at least 1"
    assert amc_hw(*SEARCH, "--episodes", "3", "--out", "run").code == 0
    done = amc_hw(*SEARCH, "--episodes", "3", "--out", "run", "--workers", "2")
    assert done.code == 2 and "workers: 1, not 2" in done.mistake


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_workers_end_with_their_search(here: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "amc_hw.cli", *SEARCH, "--episodes", "5000", "--workers", "2", "--out", "run"]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    journal = Path("run/metrics.jsonl")
    until = time.monotonic() + 120
    while time.monotonic() < until and (not journal.exists() or len(journal.read_bytes().splitlines()) < 8):
        time.sleep(0.2)
    if how != signal.SIGKILL:
        # a terminal sends to all processes of the group
        os.killpg(child.pid, how) if how == signal.SIGINT else child.send_signal(how)
        _, error = child.communicate(timeout=60)
        assert child.returncode == 130 and b"Traceback" not in error, error
        assert error.splitlines()[-1].startswith(b"interrupted: the same command goes on"), error
    else:
        child.kill()
        child.wait()
    with pytest.raises(ProcessLookupError):  # none of the group is left
        for _ in range(100):
            os.killpg(child.pid, 0)
            time.sleep(0.1)
