"""`amc-hw table`: what is listed, shown, drawn, merged and exported agrees with the tables; nothing is overwritten."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from amc_hw import api
from amc_hw import cli as command_line
from amc_hw.tables import CSV_COLUMNS, find_table, read_predictions
from profilers.device import shipped
from profilers.ops import OpSpec
from profilers.table import Identity, LatencyTable, Measurement

NETS = """
import torch
from torch import nn


def tiny():
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)), torch.zeros(1, 3, 8, 8)
"""
TABLE = Path("latency_tables/fake.jsonl")
PIXEL = shipped("latency_tables") / "pixel1.jsonl"
#: of the tiny network, with the widths left open
OPERATORS = ["conv 8x8 k3x3 s1 relu", "conv 8x8 k3x3 s2 relu", "global_avg_pool 4x4", "linear 1x1"]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        assert self.code == 0, self.err
        return self.out.splitlines()

    @property
    def mistake(self) -> str:
        (line,) = self.err.splitlines()
        assert self.code and self.out == "" and line.startswith("amc-hw: "), self.err
        return line


Run = Callable[..., Done]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`amc-hw table`, in this process and the working directory."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main puts its own there

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["amc-hw", "table", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "nets.py").write_text(NETS)
    with chdir(folder):
        api.profile(api.open_subject(device="fake", model="nets.py:tiny"), progress=lambda *_: None)
    return folder


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny network and its latency table on the fake device, to work in."""
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def row(width: int, ms: float) -> Measurement:
    return Measurement("op", (ms, 2 * ms, 3 * ms), op=OpSpec("conv", (3,), 8, 8, width), details={"anchor_ms": 1.5})


def written(name: str, rows: list[Measurement], **identity: Any) -> Path:
    made = LatencyTable.open(Path(name), replace(Identity("chip", "runtime", "1"), **identity), {"of": name})
    made.append(rows)
    return made.path


# Which table


def test_a_name_is_a_device_or_a_file(here: Path) -> None:
    assert find_table("fake") == TABLE
    assert find_table("pixel1") == PIXEL
    assert find_table("other.jsonl") == Path("other.jsonl")
    assert find_table("folder/other") == Path("folder/other")


def test_a_table_of_ones_own_hides_the_shipped_one(here: Path, table: Run) -> None:
    """As `import-log` leaves it: a copy of the shipped table, with more rows."""
    own = Path(shutil.copy(PIXEL, "latency_tables"))
    assert find_table("pixel1") == own
    assert table("show", "pixel1", "--json").json["file"] == str(own)


def test_a_device_with_tables_of_several_identities_asks_for_one(here: Path, table: Run) -> None:
    other = Path(shutil.copy(TABLE, "latency_tables/fake@0123abcd.jsonl"))
    for command in (("show", "fake"), ("export-csv", "fake", "--out", "a.csv"), ("plot", "fake", "--out", "a.svg")):
        done = table(*command)
        assert done.code == 2 and f"fake has several tables, name one: {TABLE}, {other}" in done.mistake
    assert table("show", other, "--json").json["file"] == str(other)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pixel2", "unknown device 'pixel2': did you mean pixel1?"),
        ("host-ort", "no latency table of host-ort: measure one with 'amc-hw profile --device host-ort'"),
        ("nowhere.jsonl", "no latency table nowhere.jsonl"),
        ("nets.jsonl", "nets.jsonl:1: not a JSON line"),
    ],
)
def test_a_table_that_is_not_there_or_none_is_said(here: Path, table: Run, name: str, words: str) -> None:
    shutil.copy("nets.py", "nets.jsonl")
    before = files(here)
    for command in (("show", name), ("plot", name, "--out", "a.svg"), ("export-csv", name, "--out", "a.csv")):
        done = table(*command)
        assert done.code == 2 and words in done.mistake
    assert files(here) == before


def test_a_table_whose_runtime_no_device_has_is_refused(here: Path, table: Run) -> None:
    done = table("show", written("strange.jsonl", [row(4, 0.5)], runtime="abacus"))
    assert done.code == 2 and "no device configuration has its runtime, 'abacus'" in done.mistake


# list


def test_every_table_is_listed_ones_own_first(here: Path, table: Run) -> None:
    found = table("list", "--json").json["tables"]
    assert [each["file"] for each in found] == [str(TABLE), str(PIXEL)]
    rows = LatencyTable.read(TABLE).rows
    assert found[0]["rows"] == {kind: sum(r.type == kind for r in rows) for kind in ("op", "network", "calibration")}
    assert found[1]["rows"] == {"op": 174, "network": 6}
    assert found[1]["identity"] == {
        "soc": "Google Pixel 1 (Snapdragon 821)",
        "runtime": "tflite",
        "runtime_version": "2018, from benchmark_model logs",
        "threads": 1,
        "affinity": "any",
        "dtype": "float32",
        "batch": 1,
    }


def test_the_list_as_text(here: Path, table: Run) -> None:
    written("latency_tables/new.jsonl", [])
    counts = {kind: len(LatencyTable.read(TABLE).of_type(kind)) for kind in ("op", "network", "calibration")}
    assert table("list").lines == [
        f"{TABLE}: fake, formula 1, 1 thread(s), " + ", ".join(f"{n} {kind} rows" for kind, n in counts.items()),
        "latency_tables/new.jsonl: chip, runtime 1, 1 thread(s), empty",
        f"{PIXEL}: Google Pixel 1 (Snapdragon 821), tflite 2018, from benchmark_model logs, 1 thread(s), "
        "174 op rows, 6 network rows",
    ]


def test_where_ones_own_folder_is_the_shipped_one_nothing_is_listed_twice(
    table: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shipped("latency_tables").parent)
    names = [Path(each["file"]).name for each in table("list", "--json").json["tables"]]
    assert names.count("pixel1.jsonl") == 1
    assert table("show", "pixel1", "--json").json["rows"] == {"op": 174, "network": 6}


# show


def test_a_shown_table_says_what_it_holds(here: Path, table: Run) -> None:
    found = table("show", "fake", "--json").json
    assert set(found) == {
        *("file", "identity", "provenance", "rows", "operators", "error_pct", "channel_multiple"),
    }
    there = LatencyTable.read(TABLE)
    assert found["file"] == str(TABLE) and found["provenance"] == there.provenance
    assert found["rows"]["op"] == len(there.of_type("op"))
    assert [each["op"] for each in found["operators"]] == OPERATORS
    for each, kind in zip(found["operators"], ("conv", "conv", "global_avg_pool", "linear"), strict=True):
        assert set(each) == {"op", "points", "low", "high"}
        stride = 2 if "s2" in each["op"] else 1
        ops = {r.op for r in there.rows if r.op and r.op.kind == kind and r.op.stride[0] == stride}
        axes = np.array([op.axes for op in ops])
        assert each["points"] == len(ops)
        assert (each["low"], each["high"]) == (axes.min(axis=0).tolist(), axes.max(axis=0).tolist())
    assert found["channel_multiple"] == 8  # the formula's
    assert found["error_pct"] == read_predictions(TABLE)[1].error_pct < 4.0


def test_a_shown_table_as_text(here: Path, table: Run) -> None:
    found = table("show", "fake", "--json").json
    lines = table("show", "fake").lines
    assert lines[0] == str(TABLE)
    for line in ("  soc: fake", "  threads: 1", "  formula: blocks of 8 channels, 4000000 MACs per ms"):
        assert line in lines
    assert f"  error: 90% of networks within {found['error_pct']:.1f}%" in lines
    assert "  channel multiple: 8" in lines
    points = [each["points"] for each in found["operators"]]
    assert lines[-4] == f"{points[0]:6} points  conv 8x8 k3x3 s1 relu, widths 3-3 by 4-16"
    assert lines[-3] == f"{points[1]:6} points  conv 8x8 k3x3 s2 relu, widths 4-16 by 5-24"
    assert lines[-2] == f"{points[2]:6} points  global_avg_pool 4x4, widths 5-24"


def test_the_shipped_pixel_says_what_it_does_not_know(here: Path, table: Run) -> None:
    found = table("show", "pixel1", "--json").json
    assert found["channel_multiple"] is None  # three networks, whose widths are multiples of 8
    assert len(found["operators"]) == 17
    assert found["error_pct"] == pytest.approx(2.5, abs=0.5)
    lines = table("show", "pixel1").lines
    assert "  channel multiple: not enough widths to tell" in lines
    assert "     2 points  depthwise_conv 112x112 k3x3 s1 relu6, widths 24-32" in lines


def test_a_table_of_operators_alone_knows_no_error(here: Path, table: Run) -> None:
    path = written("ops.jsonl", [row(4, 0.5), row(8, 0.75)], runtime="formula")
    assert table("show", path, "--json").json["error_pct"] is None
    assert "  error: unknown" in table("show", path).lines


# plot


def test_a_picture_of_the_slowest_operator_in_both_formats(here: Path, table: Run) -> None:
    costs = read_predictions(TABLE)[1].families.values()
    assert np.argmax([float(cost(cost.high[None])[0]) for cost in costs]) == 0
    points = len(_measured("k3x3 s1"))
    for name, start in (("a.png", PNG), ("a.svg", b"<?xml")):
        found = table("plot", "fake", "--out", name, "--json").json
        assert found == {"file": name, "op": OPERATORS[0], "points": points}
        assert Path(name).read_bytes().startswith(start)
        assert table("plot", "fake", "--out", name).lines == [f"{name}: {OPERATORS[0]}, {points} measured widths"]


def test_an_operator_of_two_widths_is_drawn_at_its_largest_inputs(here: Path, table: Run) -> None:
    found = table("plot", "fake", "--op", "k3x3 s2", "--out", "a.svg", "--json").json
    at_largest = {op.axes for op in _measured("k3x3 s2") if op.axes[0] >= 0.9 * 16}
    assert found == {"file": "a.svg", "op": OPERATORS[1], "points": len(at_largest)}
    assert 1 < len(at_largest) < len(_measured("k3x3 s2"))


def _measured(part: str) -> set[OpSpec]:
    return {each.op for each in LatencyTable.read(TABLE).rows if each.op is not None and part in str(each.op)}


def test_an_svg_is_xml_and_the_same_bytes_twice(here: Path, table: Run) -> None:
    table("plot", "fake", "--out", "a.svg")
    table("plot", "fake", "--out", "b.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()
    assert ElementTree.parse("a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    table("plot", "fake", "--op", "linear", "--out", "b.svg")
    assert Path("a.svg").read_bytes() != Path("b.svg").read_bytes()


@pytest.mark.parametrize("op", OPERATORS)
def test_any_operator_can_be_drawn_by_a_part_of_its_name(here: Path, table: Run, op: str) -> None:
    assert table("plot", "fake", "--op", op[:-1], "--out", "a.svg", "--json").json["op"] == op


def test_the_points_of_an_operator_of_one_width_are_all_that_were_measured(here: Path, table: Run) -> None:
    found = table("plot", "fake", "--op", "pool", "--out", "a.svg", "--json").json
    assert found["points"] == len({op.axes for op in _measured("global_avg_pool")})


def test_the_shipped_pixel_is_drawn(here: Path, table: Run) -> None:
    found = table("plot", "pixel1", "--op", "depthwise_conv 14x14 k3x3 s1", "--out", "pixel.png", "--json").json
    assert found == {"file": "pixel.png", "op": "depthwise_conv 14x14 k3x3 s1 relu6", "points": 6}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "pizza", "--out", "a.svg"), ("no operator 'pizza'", *OPERATORS)),
        (("--out", "a.txt"), ("a.txt: a picture's name ends in .svg or .png",)),
        (("--out", "svg"), ("svg: a picture's name ends in .svg or .png",)),
    ],
)
def test_what_cannot_be_drawn(here: Path, table: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = files(here)
    done = table("plot", "fake", *arguments)
    assert done.code == 2 and all(word in done.mistake for word in words)
    assert files(here) == before


# merge


def test_a_merged_table_holds_every_row_once_in_order(here: Path, table: Run) -> None:
    a, b, c, d = (row(width, width / 8) for width in (4, 5, 6, 7))
    similar = replace(b, samples_ms=(0.625, 1.25, 1.876))
    paths = [written("a.jsonl", [c, a, b]), written("b.jsonl", [b, d, similar, c])]
    before = files(here)
    assert table("merge", *paths, "--out", "both.jsonl", "--json").json == {"file": "both.jsonl", "rows": 5}
    both = LatencyTable.read(Path("both.jsonl"))
    assert both.rows == [c, a, b, d, similar]
    assert both.identity == Identity("chip", "runtime", "1")
    assert both.provenance == {
        "merged": [
            {"file": "a.jsonl", "rows": 3, "provenance": {"of": "a.jsonl"}},
            {"file": "b.jsonl", "rows": 4, "provenance": {"of": "b.jsonl"}},
        ]
    }
    assert {name: data for name, data in files(here).items() if name != "both.jsonl"} == before
    assert table("merge", *paths, "--out", "again.jsonl").lines == ["again.jsonl: 5 rows"]


def test_a_profiled_table_in_two_parts_merges_to_what_predicts(here: Path, table: Run) -> None:
    whole = LatencyTable.read(TABLE)
    half = len(whole.rows) // 2
    for name, rows in (("first.jsonl", whole.rows[: half + 10]), ("second.jsonl", whole.rows[half:])):
        LatencyTable.open(Path(name), whole.identity).append(rows)
    table("merge", "first.jsonl", "second.jsonl", "--out", "whole.jsonl")
    merged = LatencyTable.read(Path("whole.jsonl"))
    assert list(dict.fromkeys(map(repr, merged.rows))) == list(dict.fromkeys(map(repr, whole.rows)))
    assert table("show", "whole.jsonl", "--json").json["channel_multiple"] == 8


@pytest.mark.parametrize(("part", "value"), [("threads", 2), ("soc", "another chip"), ("dtype", "float16")])
def test_tables_of_different_identities_are_refused_and_no_file_is_left(
    here: Path, table: Run, part: str, value: object
) -> None:
    paths = [written("a.jsonl", [row(4, 0.5)]), written("b.jsonl", [row(5, 0.5)], **{part: value})]
    before = files(here)
    done = table("merge", *paths, "--out", "both.jsonl")
    assert done.code == 2 and f"b.jsonl was measured with {part} {value!r}, not " in done.mistake
    assert files(here) == before


def test_a_file_that_is_there_is_never_merged_into(here: Path, table: Run) -> None:
    paths = [written("a.jsonl", [row(4, 0.5)]), written("b.jsonl", [row(5, 0.5)])]
    Path("empty.jsonl").touch()
    before = files(here)
    for out in ("a.jsonl", "b.jsonl", "nets.py", "empty.jsonl", "latency_tables"):
        done = table("merge", *paths, "--out", out)
        assert done.code == 2 and f"{out} is there already: name another --out" in done.mistake
    assert files(here) == before


def test_a_merge_with_a_table_that_is_not_there_leaves_no_file(here: Path, table: Run) -> None:
    done = table("merge", TABLE, "nowhere.jsonl", "--out", "both.jsonl")
    assert done.code == 2 and "nowhere.jsonl" in done.mistake
    assert not Path("both.jsonl").exists()


# export-csv


def read_csv(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["fake", "pixel1"])
def test_a_csv_has_a_line_per_row_and_its_numbers_are_the_tables(here: Path, table: Run, name: str) -> None:
    rows = LatencyTable.read(find_table(name)).rows
    assert table("export-csv", name, "--out", "t.csv", "--json").json == {"file": "t.csv", "rows": len(rows)}
    lines = read_csv("t.csv")
    assert tuple(lines[0]) == CSV_COLUMNS
    for line, each in zip(lines, rows, strict=True):
        measured = each.op or each.graph
        assert measured is not None
        assert line["type"] == each.type
        assert float(line["median_ms"]) == each.median_ms
        assert int(line["samples"]) == len(each.samples_ms)
        assert (int(line["macs"]), int(line["params"])) == (measured.macs, measured.params)
        anchor_ms = each.details.get("anchor_ms")
        assert line["anchor_ms"] == ("" if anchor_ms is None else str(anchor_ms))
        if each.op is None:
            assert not any(line[column] for column in CSV_COLUMNS[3:12])
        else:
            assert (line["op"], line["context"]) == (each.op.kind, each.context)
            assert line["in_channels"] == "+".join(map(str, each.op.in_channels))
            assert [int(line[key]) for key in ("out_channels", "height", "width")] == [
                *(each.op.out_channels, each.op.height, each.op.width)
            ]
            assert (line["kernel"], line["stride"]) == tuple(f"{a}x{b}" for a, b in (each.op.kernel, each.op.stride))
            assert line["activation"] == each.op.activation


def test_a_csv_by_hand(here: Path, table: Run) -> None:
    conv = OpSpec("conv", (3,), 8, 6, 4, kernel=(3, 1), stride=(2, 1), padding=(1, 0), activation="relu6")
    add = OpSpec("add", (4, 4), 4, 6, 4)
    rows = [
        Measurement("op", (0.5, 0.25, 1.0), op=conv, context="in_context", details={"anchor_ms": 2.5}),
        Measurement("op", (0.125, 0.25), op=add),
    ]
    assert table("export-csv", written("t.jsonl", rows), "--out", "t.csv").lines == ["t.csv: 2 rows"]
    assert Path("t.csv").read_text().splitlines() == [
        "type,median_ms,samples,op,in_channels,out_channels,height,width,kernel,stride,activation,context,macs,params,anchor_ms",
        "op,0.5,3,conv,3,4,8,6,3x1,2x1,relu6,in_context,864,40,2.5",  # 3 * 3 * 4 outputs of 4 x 6; 3 * 3 * 4 and 4
        "op,0.1875,2,add,4+4,4,4,6,1x1,1x1,none,alone,0,0,",
    ]


@pytest.mark.parametrize(
    "command", [("export-csv", "fake"), ("plot", "fake"), ("merge", str(TABLE))], ids=lambda command: command[0]
)
def test_a_place_that_cannot_be_written_is_exit_1(here: Path, table: Run, command: tuple[str, ...]) -> None:
    before = files(here)
    done = table(*command, "--out", "nets.py/out.svg")
    assert done.code == 1 and "cannot write nets.py/out.svg" in done.mistake
    assert files(here) == before


def test_a_folder_is_no_csv(here: Path, table: Run) -> None:
    before = files(here)
    done = table("export-csv", "fake", "--out", "latency_tables")
    assert done.code == 1 and "cannot write latency_tables: Is a directory" in done.mistake
    assert files(here) == before


def test_a_csv_that_could_not_be_written_whole_leaves_the_old_one(
    here: Path, table: Run, disk_with: Callable[[int], Any]
) -> None:
    Path("t.csv").write_text("mine")
    with disk_with(1000):
        done = table("export-csv", "fake", "--out", "t.csv")
    assert done.code == 1 and "cannot write t.csv" in done.mistake
    assert Path("t.csv").read_text() == "mine" and not Path("t.csv.part").exists()
