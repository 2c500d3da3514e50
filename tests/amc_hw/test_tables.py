"""Looking at tables: what the commands print, draw and write, and what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amc_hw import api
from amc_hw.errors import FailedError, TableError, UserError
from amc_hw.tables import CSV_COLUMNS, export_csv, find_table, list_tables, merge_tables, plot_table, show_table
from profilers.device import shipped
from profilers.ops import OpSpec
from profilers.table import Identity, LatencyTable, Measurement

Run = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert code == 0 and "fake, formula 1, 1 thread(s), float32, batch 1, 22 op rows" in out and "Pixel 1" in out


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


def test_a_table_without_operators_is_drawn_from_its_predictions(amc_hw: Run) -> None:
    subject = api.open_subject(device="fake", model="resnet20")
    api.profile(subject, way="networks", progress=lambda *_: None)
    code, out, _ = amc_hw("table", "plot", "fake", "--out", "a.svg", "--json")
    assert code == 0 and json.loads(out)["points"] == 0
    assert "measured" not in "".join(ElementTree.parse("a.svg").getroot().itertext())


def test_a_table_that_cannot_be_read_does_not_hide_the_others(amc_hw: Run) -> None:
    board("latency_tables/a.jsonl")
    Path("latency_tables/newer.jsonl").write_text('{"schema_version": 99}\n')
    code, out, err = amc_hw("table", "list", "--json")
    names = [Path(each["file"]).name for each in json.loads(out)["tables"]]
    assert code == 0 and "a.jsonl" in names and "pixel1.jsonl" in names and "newer.jsonl" not in names
    assert "newer.jsonl: schema version 99 is newer" in err


def test_operators_that_differ_have_names_that_differ(amc_hw: Run) -> None:
    table = LatencyTable.open(Path("latency_tables/fake.jsonl"), Identity("fake", "formula", "1"))
    kernels = [dict(padding=(d, d), dilation=(d, d)) for d in (1, 2, 4)] + [dict(padding=(0, 0)), dict(groups=8)]
    ops = [OpSpec("conv", (c,), 16, 16, c, (3, 3), **({"padding": (1, 1)} | k)) for k in kernels for c in (16, 32)]
    table.append([Measurement("op", (1.0,), op=op) for op in ops])
    names = [each["op"] for each in show_table("fake")["operators"]]
    assert len(set(names)) == len(names) == 6
    assert names[:2] == ["conv 16x16 k3x3 s1", "conv 16x16 k3x3 s1 d2x2"]
    export_csv("fake", out=Path("a.csv"))
    with Path("a.csv").open() as file:
        assert len({tuple(line.values()) for line in csv.DictReader(file)}) == len(ops)


def test_two_tables_of_one_device_are_to_be_named(here: Path) -> None:
    subject = api.open_subject(device="pixel1", model="mobilenet_v1", threads=4)
    LatencyTable.open(Path("latency_tables/pixel1.jsonl"), subject.target.identity())
    with pytest.raises(UserError, match="pixel1 has several tables, name one"):
        find_table("pixel1")


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


# Names and texts, and what stays as it was


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_table_of_ones_own_hides_the_shipped_one_that_it_began_as(here: Path) -> None:
    Path("latency_tables").mkdir()
    own = Path(shutil.copy(shipped("latency_tables") / "pixel1.jsonl", "latency_tables"))  # as import-log does
    assert find_table("pixel1") == own
    assert show_table("pixel1")["file"] == str(own)


def test_where_ones_own_folder_is_the_shipped_one_nothing_stands_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped("latency_tables").parent)
    names = [Path(each["file"]).name for each in list_tables()["tables"]]
    assert names.count("pixel1.jsonl") == 1
    assert show_table("pixel1")["rows"] == {"op": 174, "network": 6}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pixel11", "unknown device 'pixel11': did you mean pixel1?"),
        ("host-ort", "no latency table of host-ort: measure one with 'amc-hw profile --device host-ort'"),
        ("nowhere.jsonl", "no latency table nowhere.jsonl"),
        ("text.jsonl", "text.jsonl:1: not a JSON line"),
    ],
)
def test_a_table_that_is_not_there_or_is_none_is_one_line(amc_hw: Run, name: str, words: str) -> None:
    Path("text.jsonl").write_text("mine\n")
    for command in (("show", name), ("plot", name, "--out", "a.svg"), ("export-csv", name, "--out", "a.csv")):
        code, out, err = amc_hw("table", *command)
        assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1
    assert files() == {"text.jsonl": b"mine\n"}


def test_a_table_whose_runtime_no_device_has_is_not_predicted_from(here: Path) -> None:
    LatencyTable.open(Path("a.jsonl"), Identity("chip", "abacus", "1")).append(rows())
    with pytest.raises(UserError, match="a.jsonl: no device configuration has its runtime, 'abacus'"):
        show_table("a.jsonl")


def test_text_of_the_list_and_of_a_table_that_cannot_tell_its_multiple(amc_hw: Run) -> None:
    LatencyTable.open(board("latency_tables/fake.jsonl").with_name("new.jsonl"), Identity("chip", "runtime", "1", 4))
    assert amc_hw("table", "list")[1].splitlines()[:2] == [
        "latency_tables/fake.jsonl: fake, formula 1, 1 thread(s), float32, batch 1, 22 op rows",
        "latency_tables/new.jsonl: chip, runtime 1, 4 thread(s), float32, batch 1, empty",
    ]
    lines = amc_hw("table", "show", "pixel1")[1].splitlines()
    assert "  channel multiple: not enough widths to tell" in lines
    assert "     2 points  depthwise_conv 112x112 k3x3 s1 relu6, widths 24-32" in lines
    keys = {"file", "identity", "provenance", "rows", "operators", "error_pct", "channel_multiple"}
    assert set(json.loads(amc_hw("table", "show", "pixel1", "--json")[1])) == keys


def test_a_profiled_table_shows_its_multiple_and_its_error(amc_hw: Run) -> None:
    assert amc_hw("profile", "--device", "fake")[0] == 0
    found = show_table("fake")
    assert found["channel_multiple"] == 8  # the formula's
    assert 0 < found["error_pct"] < 4
    lines = amc_hw("table", "show", "fake")[1].splitlines()
    assert "  channel multiple: 8" in lines
    assert f"  error: 90% of networks within {found['error_pct']:.1f}%" in lines


def test_tables_that_overlap_or_nearly_do_merge_in_the_order_of_their_rows(here: Path) -> None:
    a, b, c, d = (Measurement("op", (0.5, 1.0, 0.75), op=depthwise(width)) for width in (4, 5, 6, 7))
    similar = replace(b, samples_ms=(0.5, 1.0, 0.7500001))
    for name, part in (("a.jsonl", [c, a, b]), ("b.jsonl", [b, d, similar, c])):
        LatencyTable.open(Path(name), Identity("chip", "formula", "1"), {"of": name}).append(part)
    before = files()
    assert merge_tables([Path("a.jsonl"), Path("b.jsonl")], out=Path("both.jsonl"))["rows"] == 5
    both = LatencyTable.read(Path("both.jsonl"))
    assert both.rows == [c, a, b, d, similar]
    assert both.provenance["merged"][1] == {"file": "b.jsonl", "rows": 4, "provenance": {"of": "b.jsonl"}}
    assert {name: data for name, data in files().items() if name != "both.jsonl"} == before


@pytest.mark.parametrize(("part", "value"), [("soc", "another chip"), ("runtime_version", "2"), ("dtype", "float16")])
def test_any_part_of_the_identity_keeps_tables_apart(amc_hw: Run, part: str, value: str) -> None:
    other = LatencyTable.open(Path("b.jsonl"), replace(Identity("fake", "formula", "1"), **{part: value}))
    other.append(rows())
    board("a.jsonl")
    before = files()
    code, out, err = amc_hw("table", "merge", "a.jsonl", "b.jsonl", "--out", "both.jsonl")
    assert (code, out) == (2, "") and f"b.jsonl was measured with {part} {value!r}, not " in err
    assert files() == before


def test_a_merge_writes_over_nothing_and_leaves_nothing_where_a_table_is_missing(amc_hw: Run) -> None:
    board("a.jsonl")
    Path("empty.jsonl").touch()
    Path("folder").mkdir()
    before = files()
    for out in ("a.jsonl", "empty.jsonl", "folder"):
        code, _, err = amc_hw("table", "merge", "a.jsonl", "--out", out)
        assert code == 2 and f"{out} is there already: name another --out" in err
    code, _, err = amc_hw("table", "merge", "a.jsonl", "nowhere.jsonl", "--out", "both.jsonl")
    assert code == 2 and "nowhere.jsonl" in err
    assert files() == before


def test_a_csv_by_hand(amc_hw: Run) -> None:
    conv = OpSpec("conv", (3,), 8, 6, 4, (3, 1), (2, 1), (1, 0), activation="relu6")
    measured = [
        Measurement("op", (0.5, 0.25, 1.0), op=conv, context="in_context", details={"anchor_ms": 2.5}),
        Measurement("op", (0.125, 0.25), op=OpSpec("add", (4, 4), 4, 6, 4)),
    ]
    LatencyTable.open(Path("t.jsonl"), Identity("chip", "runtime", "1")).append(measured)
    assert amc_hw("table", "export-csv", "t.jsonl", "--out", "t.csv")[1] == "t.csv: 2 rows\n"
    assert Path("t.csv").read_text().splitlines() == [
        "type,median_ms,samples,op,in_channels,out_channels,height,width,kernel,stride,activation,context,macs,params,"
        "anchor_ms,padding,dilation,groups,fused_add",
        # 3 * 3 * 4 at 4 x 6 outputs; 3 * 3 * 4 and 4
        "op,0.5,3,conv,3,4,8,6,3x1,2x1,relu6,in_context,864,40,2.5,1x0,1x1,1,False",
        "op,0.1875,2,add,4+4,4,4,6,1x1,1x1,none,alone,0,0,,0x0,1x1,1,False",
    ]


def test_every_row_of_the_shipped_table_is_a_line_with_its_numbers(here: Path) -> None:
    export_csv("pixel1", out=Path("p.csv"))
    with Path("p.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS
    for line, row in zip(lines, LatencyTable.read(find_table("pixel1")).rows, strict=True):
        measured = row.op or row.graph
        assert measured is not None
        assert (line["type"], float(line["median_ms"])) == (row.type, row.median_ms)
        assert (int(line["macs"]), int(line["params"])) == (measured.macs, measured.params)
        if row.op is None:
            assert not any(line[column] for column in CSV_COLUMNS[3:12])
        else:
            assert line["in_channels"] == "+".join(map(str, row.op.in_channels))
            assert (int(line["out_channels"]), line["activation"]) == (row.op.out_channels, row.op.activation)


@pytest.mark.parametrize("command", ["export-csv", "plot", "merge"])
def test_a_place_that_cannot_be_written_is_exit_1(amc_hw: Run, command: str) -> None:
    board("a.jsonl")
    before = files()
    code, out, err = amc_hw("table", command, "a.jsonl", "--out", "a.jsonl/out.svg")
    assert (code, out) == (1, "") and "cannot write a.jsonl/out.svg" in err and len(err.splitlines()) == 1
    assert files() == before


def test_a_csv_that_cannot_be_written_whole_leaves_what_was_there(
    amc_hw: Run, disk_with: Callable[[int], AbstractContextManager[None]]
) -> None:
    board("a.jsonl")
    Path("t.csv").write_text(f"{','.join(CSV_COLUMNS)}\nmine\n")
    before = files()
    with disk_with(100):
        code, _, err = amc_hw("table", "export-csv", "a.jsonl", "--out", "t.csv")
    assert code == 1 and "cannot write t.csv" in err
    assert files() == before


@pytest.mark.parametrize(
    ("command", "name"), [(("export-csv", "pixel1"), "mine.py"), (("plot", "pixel1", "--op", "conv 14x14"), "mine.svg")]
)
def test_a_file_of_something_else_is_not_replaced(amc_hw: Run, command: tuple[str, ...], name: str) -> None:
    Path(name).write_text("<svg>mine, of amc-hw</svg>")
    code, out, err = amc_hw("table", *command, "--out", name)
    assert (code, out) == (2, "") and err == (
        f"amc-hw: {name} is there already, and not of amc-hw: name another --out, or move it away\n"
    )
    assert Path(name).read_text() == "<svg>mine, of amc-hw</svg>"
    Path(name).unlink()
    for _ in range(2):  # our own of before is
        assert amc_hw("table", *command, "--out", name)[0] == 0


def test_rows_that_repeat_in_a_table_stay_that_often(here: Path) -> None:
    shipped = find_table("pixel1")
    assert merge_tables([shipped], out=Path("one.jsonl"))["rows"] == 180
    assert merge_tables([shipped, Path("one.jsonl")], out=Path("two.jsonl"))["rows"] == 180
    assert LatencyTable.read(Path("two.jsonl")).rows == LatencyTable.read(shipped).rows


def test_a_folder_is_no_file_to_write(amc_hw: Run) -> None:
    code, _, err = amc_hw("table", "export-csv", "pixel1", "--out", ".")
    assert code == 1 and err == "amc-hw: cannot write .: it is a folder\n"


def test_a_table_whose_header_is_torn_holds_nothing_yet(amc_hw: Run) -> None:
    board("latency_tables/mine.jsonl")
    whole = Path("latency_tables/mine.jsonl").read_bytes()
    Path("latency_tables/fake.jsonl").write_bytes(whole[:20])
    assert {Path(each["file"]).name for each in list_tables()["tables"]} >= {"mine.jsonl"}
    assert "fake.jsonl" not in {Path(each["file"]).name for each in list_tables()["tables"]}
    Path("device_configs").mkdir()
    without_a_multiple = Path("device_configs/mine.toml")
    text = (shipped("device_configs") / "fake.toml").read_text()
    without_a_multiple.write_text("".join(line for line in text.splitlines(True) if "channel_multiple" not in line))
    Path("latency_tables/mine.jsonl").write_bytes(b"")
    done = amc_hw("profile", "--device", "mine", "--model", "mobilenet_v1_cifar?width=0.25", "--dry-run")
    assert done.code == 0, done.err
