"""The command line in the process of the tests: importing torch takes longer than most commands."""

from __future__ import annotations

import contextlib
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from amc_hw import api
from amc_hw import cli as command_line

NETS = Path(__file__).parents[1] / "crash_worker.py"  # a user's file with a network of its own weights


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network, its images and its latency table; to be copied, not worked in."""
    folder = tmp_path_factory.mktemp("profiled")
    shutil.copy(NETS, folder / "nets.py")
    runpy.run_path(str(NETS))["write_images"](folder / "images.npz")
    with contextlib.chdir(folder):
        api.profile(api.open_subject(device="fake", model="nets.py:tiny"), progress=lambda *_: None)
    return folder


@pytest.fixture
def here(profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working directory."""
    shutil.copytree(profiled, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line that says what was wrong; progress may stand before it."""
        lines = [line for line in self.err.splitlines() if line.startswith("amc-hw: ")]
        assert len(lines) == 1 and self.err.splitlines()[-1] == lines[0], self.err
        assert self.out == "" and "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def amc_hw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line, in this process and the working directory."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main puts its own there

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["amc-hw", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run
