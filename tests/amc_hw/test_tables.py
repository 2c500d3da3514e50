"""Looking at tables: what the commands print, draw and write, and what they refuse."""

from __future__ import annotations

import csv
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amc_hw import api
from amc_hw import cli as command_line
from amc_hw.errors import FailedError, TableError, UserError
from amc_hw.tables import export_csv, find_table, list_tables, merge_tables, plot_table, show_table
from profilers.ops import OpSpec
from profilers.table import Identity, LatencyTable, Measurement

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def amc_hw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["amc-hw", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def depthwise(width: int) -> OpSpec:
    return OpSpec("depthwise_conv", (width,), 8, 8, width, (3, 3), (1, 1), (1, 1), groups=width)


def pointwise(before: int, after: int) -> OpSpec:
    return OpSpec("conv", (before,), 8, 8, after)


def rows() -> list[Measurement]:
    """A fake device of two operators: blocks of 8 channels."""
    ops = [depthwise(width) for width in range(4, 65, 4)] + [pointwise(a, b) for a in (8, 64) for b in (8, 32, 64)]
    return [Measurement("op", (round(0.01 * -(-op.out_channels // 8) + op.macs / 1e6, 6),), op=op) for op in ops]


def board(path: str = "latency_tables/fake.jsonl", *, threads: int = 1) -> Path:
    table = LatencyTable.open(Path(path), Identity("fake", "formula", "1", threads), {"date": "2026-11-24"})
    table.append(rows())
    return table.path


def test_the_shipped_table_and_ones_own_are_listed(amc_hw: Run) -> None:
    board()
    found = {Path(each["file"]).name: each for each in list_tables()["tables"]}
    assert found["fake.jsonl"]["rows"] == {"op": 22} and found["fake.jsonl"]["identity"]["soc"] == "fake"
    assert found["pixel1.jsonl"]["rows"] == {"op": 174, "network": 6}
    code, out, _ = amc_hw("table", "list")
    assert code == 0 and "fake, formula 1, 1 thread(s), 22 op rows" in out and "Pixel 1" in out


def test_a_table_is_found_by_device_or_file(here: Path) -> None:
    assert find_table("pixel1").name == "pixel1.jsonl"
    with pytest.raises(TableError, match="no latency table of fake: measure one with 'amc-hw profile --device fake'"):
        find_table("fake")
    assert board() == find_table("fake") == Path("latency_tables/fake.jsonl")
    board(f"latency_tables/fake@{'0' * 8}.jsonl", threads=2)
    with pytest.raises(UserError, match="fake has several tables, name one"):
        find_table("fake")
    with pytest.raises(UserError, match="unknown device 'nowhere'"):
        find_table("nowhere")
    with pytest.raises(TableError, match="no latency table"):
        show_table("absent.jsonl")


def test_show_says_what_is_in_it(amc_hw: Run) -> None:
    board()
    found = show_table("fake")
    assert found["identity"]["threads"] == 1 and found["provenance"] == {"date": "2026-11-24"}
    assert found["error_pct"] is None and found["rows"] == {"op": 22}
    assert {each["op"]: (each["points"], each["low"], each["high"]) for each in found["operators"]} == {
        "depthwise_conv 8x8 k3x3 s1": (16, [4], [64]),
        "conv 8x8": (6, [8, 8], [64, 64]),
    }
    code, out, _ = amc_hw("table", "show", "fake")
    assert code == 0 and "16 points  depthwise_conv 8x8 k3x3 s1, widths 4-64" in out and "error: unknown" in out
    code, out, _ = amc_hw("table", "show", "pixel1", "--json")
    assert code == 0 and json.loads(out)["error_pct"] < 4


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_a_staircase_is_drawn(name: str, amc_hw: Run) -> None:
    board()
    code, out, _ = amc_hw("table", "plot", "fake", "--op", "depthwise", "--out", name, "--json")
    assert code == 0
    assert json.loads(out) == {"file": name, "op": "depthwise_conv 8x8 k3x3 s1", "points": 16}
    first = Path(name).read_bytes()
    if name.endswith("png"):
        assert first.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(first).tag.endswith("svg")
        plot_table("fake", op="depthwise", out=Path(name))
        assert Path(name).read_bytes() == first


def test_an_operator_of_two_widths_is_drawn_at_its_largest_input(here: Path) -> None:
    board()
    found = plot_table("fake", op="conv 8x8", out=Path("a.svg"))  # its whole name, and a part of another's
    assert (found["op"], found["points"]) == ("conv 8x8", 3)
    assert plot_table("fake", op=None, out=Path("b.svg"))["op"] == "conv 8x8"


def test_pictures_that_cannot_be_made(amc_hw: Run) -> None:
    board()
    code, _, err = amc_hw("table", "plot", "fake", "--op", "pool", "--out", "a.svg")
    assert code == 2 and "no operator 'pool'" in err and "depthwise_conv 8x8 k3x3 s1" in err
    code, _, err = amc_hw("table", "plot", "fake", "--out", "a.pdf")
    assert code == 2 and "a picture's name ends in .svg or .png" in err
    code, _, err = amc_hw("table", "plot", "fake", "--out", "nowhere/a.svg")
    assert code == 1 and len(err.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["latency_tables"]


def test_merged_tables_hold_every_row_once_in_order(amc_hw: Run) -> None:
    first, second = board("a.jsonl"), board("b.jsonl")
    extra = Measurement("op", (0.5,), op=depthwise(128))
    LatencyTable.read(second).append([extra])
    code, out, _ = amc_hw("table", "merge", str(first), str(second), "--out", "both.jsonl", "--json")
    assert code == 0 and json.loads(out) == {"file": "both.jsonl", "rows": 23}
    both = LatencyTable.read(Path("both.jsonl"))
    assert both.rows == [*rows(), extra]
    assert [each["rows"] for each in both.provenance["merged"]] == [22, 23]
    before = Path("both.jsonl").read_bytes()
    code, _, err = amc_hw("table", "merge", str(first), "--out", "both.jsonl")
    assert code == 2 and "is there already" in err and Path("both.jsonl").read_bytes() == before


def test_tables_of_different_identity_do_not_merge(here: Path) -> None:
    paths = [board("a.jsonl"), board("b.jsonl", threads=2)]
    with pytest.raises(TableError, match="b.jsonl was measured with threads 2, not 1"):
        merge_tables(paths, out=Path("both.jsonl"))
    assert not Path("both.jsonl").exists()


def test_rows_as_comma_separated_values(amc_hw: Run) -> None:
    board()
    assert amc_hw("table", "export-csv", "fake", "--out", "a.csv")[0] == 0
    with Path("a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 22
    assert np.allclose([float(line["median_ms"]) for line in lines], [row.median_ms for row in rows()])
    assert [int(line["macs"]) for line in lines] == [row.op.macs for row in rows() if row.op]
    assert lines[0]["op"] == "depthwise_conv" and lines[0]["kernel"] == "3x3" and lines[0]["in_channels"] == "4"
    with pytest.raises(FailedError):
        export_csv("fake", out=Path("nowhere/a.csv"))
    assert export_csv("pixel1", out=Path("p.csv"))["rows"] == 180


def test_validate_refuses_a_picture_it_cannot_write_before_it_times(amc_hw: Run) -> None:
    assert amc_hw("profile", "--device", "fake")[0] == 0
    before = Path("latency_tables/fake.jsonl").read_bytes()
    code, _, err = amc_hw("validate", "--device", "fake", "--samples", "3", "--plot", "a.txt")
    assert code == 2 and ".svg or .png" in err and Path("latency_tables/fake.jsonl").read_bytes() == before
    code, out, _ = amc_hw("validate", "--device", "fake", "--samples", "3", "--plot", "a.svg", "--json")
    assert code == 0 and json.loads(out)["plot"] == "a.svg" and Path("a.svg").exists()


def test_the_python_api_has_what_the_commands_have() -> None:
    assert {"list_tables", "show_table", "plot_table", "merge_tables", "export_csv", "import_log"} <= set(api.__all__)
