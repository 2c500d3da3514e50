"""Commands killed while they write: what was complete stays, the rest is made again, the result is the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "crash_worker.py"
KILLS = 20
SIGKILLED = -9
FILES = {"profile": "latency_tables/fake.jsonl", "search": "run/metrics.jsonl"}
Run = Callable[..., int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One process that imports torch once and runs every command in a fork."""
    process = subprocess.Popen([sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def once(folder: Path, command: str, *, kill_at: int | None = None, **job: Any) -> int:
        job |= {"folder": str(folder), "command": command, "kill_at": kill_at, "journal": FILES[command]}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())["code"]

    yield once
    process.stdin.close()
    assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['write_images'](sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, WORKER, path], check=True)
    return path


def whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def killed_until_done(folder: Path, run: Run, command: str, rng: random.Random, kills: list[bool], **job: Any) -> None:
    """Start `command` again and again until it ends; `kills` gets one entry, whether it was torn, per kill."""
    journal = folder / FILES[command]
    while True:
        before = whole_lines(journal)
        kill_at = rng.randint(1, 3) if len(kills) < KILLS else None
        torn = rng.random() < 0.5
        code = run(folder, command, kill_at=kill_at, torn=torn, seed=rng.randrange(10**6), **job)
        after = journal.read_bytes()
        assert after.startswith(before), "a complete row went away"
        if code == 0:
            assert after == whole_lines(journal)
            return
        assert code == SIGKILLED and kill_at is not None
        kills.append(torn)
        synced = [int(size) for size in (folder / "synced").read_text().split()]
        assert len(whole_lines(journal)) >= max(synced, default=0), "more than the row in flight was lost"
        assert len(synced) >= kill_at - 1 or command == "search"  # which also replaces whole files


def crashed_runs(tmp_path: Path, run: Run, command: str, prepare: Callable[[Path], None], **job: Any) -> list[Path]:
    """Folders of whole runs that were killed KILLS times altogether, torn and between writes."""
    rng, kills, folders = random.Random(7), [], []
    while len(kills) < KILLS:
        folder = tmp_path / f"killed{len(folders)}"
        folder.mkdir()
        prepare(folder)
        killed_until_done(folder, run, command, rng, kills, **job)
        folders.append(folder)
    assert len(kills) == KILLS and 5 <= sum(kills) <= 15  # of both kinds
    return folders


@pytest.mark.slow
def test_a_profile_killed_20_times_has_the_rows_of_one_that_was_not(tmp_path: Path, run: Run) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, "profile") == 0
    expected = (whole / FILES["profile"]).read_bytes().splitlines()
    assert len(expected) > 100
    for folder in crashed_runs(tmp_path, run, "profile", lambda folder: None):
        found = (folder / FILES["profile"]).read_bytes().splitlines()
        assert found[0] == expected[0] and set(found) == set(expected)
        for kind in (b'{"type":"network"', b'{"type":"calibration"'):  # an operator's row may stand there twice
            assert [row for row in found if row.startswith(kind)] == [row for row in expected if row.startswith(kind)]
        assert run(folder, "profile") == 0  # nothing is left to do
        assert (folder / FILES["profile"]).read_bytes().splitlines() == found


@pytest.mark.slow
def test_a_search_killed_20_times_ends_as_one_that_was_not(tmp_path: Path, run: Run, images: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, "profile") == 0
    table = (whole / FILES["profile"]).read_bytes()
    assert run(whole, "search", data=str(images)) == 0

    def prepare(folder: Path) -> None:
        (folder / "latency_tables").mkdir()
        (folder / FILES["profile"]).write_bytes(table)

    def result(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "run/result.json").read_text()) | {"seconds": None}

    for folder in crashed_runs(tmp_path, run, "search", prepare, data=str(images)):
        for name in ("metrics.jsonl", "policy.json"):
            assert (folder / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
        assert result(folder) == result(whole)
        assert (folder / FILES["profile"]).read_bytes() == table
    rows = [json.loads(line) for line in (whole / FILES["search"]).read_text().splitlines()]
    assert sum("widths" in row for row in rows) >= 12 and "confirmed" in rows[-1]
