"""Journals: what is appended comes back, torn lines go, everything else malformed is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers.errors import FailedError, TableError
from profilers.ops import OpSpec
from profilers.table import Identity, LatencyTable, Measurement

IDENTITY = Identity("chip", "runtime", "1.0")
ROW = Measurement("op", (0.5, 0.25, 1.0), op=OpSpec("conv", (3,), 8, 8, 4, kernel=(3, 3), padding=(1, 1)))

GOOD = json.dumps(ROW.to_json())


def table(tmp_path: Path, rows: int = 2) -> Path:
    path = tmp_path / "t.jsonl"
    LatencyTable.open(path, IDENTITY).append([ROW] * rows)
    return path


def test_rows_come_back(tmp_path: Path) -> None:
    found = LatencyTable.read(table(tmp_path))
    assert found.rows == [ROW, ROW]
    assert found.rows[0].median_ms == 0.5
    assert found.identity == IDENTITY


@given(cut=st.integers(1, 200))
def test_a_cut_anywhere_in_the_last_line_loses_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = table(tmp_path_factory.mktemp("t"))
    data = path.read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    path.write_bytes(data[: -min(cut, last - 1)])
    with pytest.warns(UserWarning, match="torn last line"):
        assert LatencyTable.read(path).rows == [ROW]
    with pytest.warns(UserWarning, match="torn last line"):
        reopened = LatencyTable.open(path, IDENTITY)
    reopened.append([ROW])
    assert LatencyTable.read(path).rows == [ROW, ROW]


@pytest.mark.parametrize(
    "line",
    [
        "rubbish",
        "[]",
        '{"type":"op","samples_ms":[1.0]}',
        '{"type":"op","samples_ms":[0]}',
        '{"type":"op","samples_ms":[1.0],"op":[]}',
        '{"type":"network","samples_ms":[1.0],"graph":{"nodes":[1]}}',
        GOOD[:-1] + ',"details":[1]}',
        GOOD[:-1] + ',"details":{"anchor":"a"}}',
        GOOD[:-1] + ',"details":{"anchor":"a","anchor_ms":0}}',
        GOOD[:-1] + ',"details":{"anchor":"a","anchor_ms":"1"}}',
    ],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(TableError, match=r"t\.jsonl:2: "):
        LatencyTable.read(path)


def test_a_table_that_is_moved_away_meanwhile_begins_anew_with_its_header(tmp_path: Path) -> None:
    path = table(tmp_path)
    opened = LatencyTable.open(path, IDENTITY)
    path.rename(tmp_path / "away.jsonl")
    opened.append([ROW])
    opened.append([ROW, ROW])
    found = LatencyTable.read(path)
    assert (found.identity, found.rows) == (IDENTITY, [ROW] * 3)
    assert LatencyTable.read(tmp_path / "away.jsonl").rows == [ROW] * 2


def test_a_reference_is_that_of_one_network_on_one_device(tmp_path: Path) -> None:
    def row(anchor: str, ms: float, **more: str) -> Measurement:
        return replace(ROW, details={"anchor": anchor, "anchor_ms": ms, **more})

    rows = [row("a", 1.0), row("a", 3.0), row("a", 1.2), row("b", 9.0), row("a", 5.0, member="slow"), ROW]
    found = LatencyTable(tmp_path / "t.jsonl", IDENTITY, {}, rows)
    assert [found.reference_ms("a"), found.reference_ms("b"), found.reference_ms("c")] == [1.2, 9.0, None]
    assert found.reference_ms("a", "slow") == 5.0 and found.reference_ms("b", "slow") is None


def test_another_identity_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path)
    with pytest.raises(TableError, match="measured with threads 1, not 2"):
        LatencyTable.open(path, Identity("chip", "runtime", "1.0", threads=2))
    assert LatencyTable.read(path).rows == [ROW, ROW]


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (2, "newer")])
def test_another_schema_version_is_refused(tmp_path: Path, version: int, word: str) -> None:
    path = table(tmp_path)
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"schema_version": version}), *rest]) + "\n")
    with pytest.raises(TableError, match=word):
        LatencyTable.read(path)


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedError, match="cannot write"):
        LatencyTable.open(tmp_path / "file" / "t.jsonl", IDENTITY)


def test_a_failure_is_never_a_number() -> None:
    with pytest.raises(ValueError, match="positive"):
        Measurement("op", (0.0,), op=ROW.op)
