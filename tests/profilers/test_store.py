from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from profilers.device import load_device, shipped
from profilers.errors import FailedError, TableError
from profilers.ops import OpSpec
from profilers.store import TableStore, begun, table_files
from profilers.table import LatencyTable, Measurement
from profilers.targets import open_target

PLAIN = Path("latency_tables/fake.jsonl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(**changes: int) -> TableStore:
    return TableStore(open_target(replace(load_device("fake"), **changes)))


def row() -> Measurement:
    return Measurement("op", (1.0,), op=OpSpec("conv", (8,), 4, 4, 8))


def test_a_first_table_has_the_devices_name_and_is_made_when_it_is_opened(here: Path) -> None:
    kept = store()
    assert kept.path == PLAIN and kept.find() is None and kept.find_or_empty().rows == []
    assert not PLAIN.exists() and table_files("fake") == []
    kept.open().append([row()])
    assert table_files("fake") == [PLAIN]
    assert kept.read().rows == kept.find_or_empty().rows == [row()]


def test_every_identity_has_a_file_of_its_own(here: Path) -> None:
    one, four = store(), store(threads=4)
    one.open().append([row()])
    assert four.find() is None
    with pytest.raises(TableError, match="was measured with threads 1, not 4: 'amc-hw profile .*' measures a table be"):
        four.read("amc-hw profile --threads 4")
    four.open()
    assert four.path.match("fake@????????.jsonl") and table_files("fake") == [PLAIN, four.path]
    assert four.read().rows == [] and one.read().rows == [row()]


def test_a_table_cut_in_its_header_is_none_and_is_begun_again(here: Path) -> None:
    PLAIN.parent.mkdir()
    PLAIN.write_bytes(b'{"schema_ver')
    kept = store()
    assert not begun(PLAIN) and kept.path == PLAIN and kept.find() is None
    with pytest.raises(TableError, match="no latency table .*fake.jsonl: measure one with"):
        kept.read()
    kept.open()
    assert begun(PLAIN)


def test_a_shipped_table_is_copied_before_it_grows(here: Path) -> None:
    kept = TableStore(open_target(load_device("pixel1")))
    shipped = kept.path
    before = shipped.read_bytes()
    own = kept.open()
    assert own.path == Path("latency_tables/pixel1.jsonl") == kept.path and own.rows == LatencyTable.read(shipped).rows
    own.append([row()])
    assert shipped.read_bytes() == before


def test_another_identity_under_its_name_leaves_a_shipped_table_findable(here: Path) -> None:
    usual = TableStore(open_target(load_device("pixel1")))
    other = TableStore(open_target(replace(load_device("pixel1"), threads=4)))
    LatencyTable.open(Path("latency_tables/pixel1.jsonl"), other.target.identity())
    copied = usual.open()
    assert copied.path.match("latency_tables/pixel1@????????.jsonl") and len(copied.rows) == 180


def test_a_copy_that_cannot_be_made_says_so(here: Path) -> None:
    Path("latency_tables").write_text("a file where the folder should be")
    with pytest.raises(FailedError, match="cannot copy .*pixel1.jsonl to latency_tables"):
        TableStore(open_target(load_device("pixel1"))).open()


def test_what_a_device_that_is_away_needs_is_a_table_of_its_identity(here: Path) -> None:
    away = TableStore(open_target(replace(load_device("pixel1"), threads=4)))
    with pytest.raises(TableError, match="was measured with threads 1, not 4: correct pixel1.toml"):
        away.read()


def test_what_another_process_adds_meanwhile_to_its_copy_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TableStore(open_target(load_device("pixel1")))
    read = Path.read_bytes
    other: list[LatencyTable] = []

    def slowly(path: Path) -> bytes:
        data = read(path)
        if not other:
            monkeypatch.setattr(Path, "read_bytes", read)
            other.append(TableStore(open_target(load_device("pixel1"))).open())
            other[0].append([row()])
        return data

    monkeypatch.setattr(Path, "read_bytes", slowly)
    assert kept.open().rows[-1] == row()
    assert [path.name for path in Path("latency_tables").iterdir()] == ["pixel1.jsonl"]


def test_a_folder_that_is_the_shipped_one_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped("latency_tables").parent)
    assert table_files("pixel1") == [Path("latency_tables/pixel1.jsonl")]
