"""A journal that survives a killed process and a full disk, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amc_hw.errors import FailedError, UserError
from amc_hw.runs import Journal, alone_in, numbered, record_command, save_json, save_weights

Disk = Callable[[int], AbstractContextManager[None]]

HEADER = {"schema_version": 1, "budget": 20.0, "model": "resnet20", "widths": [1, 2]}
ROWS = [{"episode": index, "accuracy": index / 7, "widths": [8, index]} for index in range(3)]


def written(folder: Path, rows: list[dict] = ROWS) -> Path:
    path = folder / "run" / "metrics.jsonl"
    journal = Journal(path, HEADER)
    for row in rows:
        journal.append(row)
    return path


def refused(path: Path, header: dict = HEADER, *, error: type[UserError] = UserError) -> str:
    with pytest.raises(error) as caught:
        Journal(path, header)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_rows_come_back_and_more_can_be_added(tmp_path: Path) -> None:
    path = written(tmp_path)
    journal = Journal(path, HEADER)
    assert journal.recorded == ROWS
    journal.append({"episode": 3})
    assert journal.recorded == ROWS  # what was found, not what was added since
    assert Journal(path, dict(HEADER)).recorded == [*ROWS, {"episode": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [HEADER, *ROWS, {"episode": 3}]


def test_a_new_journal_holds_its_header_and_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "metrics.jsonl"
    assert Journal(path, HEADER).recorded == []
    assert path.read_text() == json.dumps(HEADER) + "\n"


@settings(max_examples=60)
@given(share=st.floats(0, 1))
def test_a_journal_cut_at_any_byte_loses_its_last_line_at_most(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = written(tmp_path_factory.mktemp("cut"))
    whole = path.read_bytes()
    size = round(share * len(whole))
    with path.open("r+b") as file:
        file.truncate(size)
    lines = whole[:size].count(b"\n")
    journal = Journal(path, HEADER)
    assert journal.recorded == ROWS[: max(0, lines - 1)]
    journal.append({"episode": 9})
    assert Journal(path, HEADER).recorded == [*ROWS[: max(0, lines - 1)], {"episode": 9}]
    assert path.read_bytes().endswith(b'}\n{"episode": 9}\n')


def test_a_torn_last_line_is_dropped_even_where_it_could_be_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    for torn in (b'{"episode": 1', b'{"episode": 10}', b"\xff\xfe", b"\x00\x00"):
        before = path.read_bytes()
        path.write_bytes(before + torn)
        assert Journal(path, HEADER).recorded == ROWS
        assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{", b"", b"not json", b'{"episode": 1', b"\x00" * 8, b"[1", b"{}{}"])
@pytest.mark.parametrize("line", [0, 1, 2])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, damage: bytes, line: int) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    assert refused(path) == f"{path} is damaged before its last line: name another --out"
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"\x80abc", b'{"episode": "\xff"}'])
def test_damage_that_is_no_text_is_an_error(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert "is damaged before its last line" in refused(path)


@pytest.mark.parametrize("first", [b"[]", b"3", b"null", b'"text"'])
def test_a_first_line_that_is_no_header_is_an_error(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(first + b"\n")
    assert "is damaged before its last line" in refused(path)


def test_another_search_is_named_by_the_first_key_that_differs(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    message = refused(path, {**HEADER, "model": "resnet56", "widths": []})
    assert message == f"{path.parent} holds another search (model: 'resnet20', not 'resnet56'): name another --out"
    assert "(budget: 20.0, not 0.5)" in refused(path, {**HEADER, "budget": 0.5})
    assert "(seed: None, not 3)" in refused(path, {**HEADER, "seed": 3})
    assert path.read_bytes() == before


def test_a_header_without_results_gives_way(tmp_path: Path) -> None:
    path = written(tmp_path, [])
    assert Journal(path, {**HEADER, "model": "resnet56"}).recorded == []
    assert path.read_text() == json.dumps({**HEADER, "model": "resnet56"}) + "\n"


def test_a_header_with_one_key_more_than_ours_is_another_search(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert "widths" in refused(path, {key: value for key, value in HEADER.items() if key != "widths"})


def test_a_place_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "metrics.jsonl", tmp_path / "file" / "run" / "metrics.jsonl", tmp_path):
        message = refused(path, error=FailedError)
        assert message.startswith(f"cannot write {path}: ")


def test_a_full_disk_is_a_failure_and_no_row_is_lost(tmp_path: Path, disk_with: Disk) -> None:
    path = written(tmp_path)
    journal = Journal(path, HEADER)
    with (
        disk_with(path.stat().st_size + 7),
        pytest.raises(FailedError, match="cannot write .*: File too large") as caught,
    ):
        journal.append({"episode": "x" * 100})
    assert caught.value.exit_code == 1
    assert Journal(path, HEADER).recorded == ROWS
    with disk_with(5), pytest.raises(FailedError, match="cannot write"):
        Journal(tmp_path / "other" / "metrics.jsonl", HEADER)


def test_after_a_full_disk_the_journal_goes_on_where_it_was(tmp_path: Path, disk_with: Disk) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    journal = Journal(path, HEADER)
    with disk_with(len(before) + 7), pytest.raises(FailedError):
        journal.append({"episode": "x" * 100})
    journal.append({"episode": 3})
    assert Journal(path, HEADER).recorded == [*ROWS, {"episode": 3}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left_on_the_device(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", HEADER)
    journal.path = Path("/dev/full")
    with pytest.raises(FailedError, match="cannot write /dev/full: No space left on device"):
        journal.append({"episode": 1})
    for save, name in ((lambda path: save_json(path, {"a": 1}), "a.json"), (_save_a_weight, "a.pt")):
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
        with pytest.raises(FailedError, match=f"cannot write .*{name}: ") as caught:
            save(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / name).exists()


def _save_a_weight(path: Path) -> None:
    save_weights(path, {"weight": torch.arange(100.0)})


# Whole or not at all


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "elsewhere" / "b.json")  # is not there yet
    for value in (1, 2):
        save_json(tmp_path / "a.json", {"a": value})
        assert (tmp_path / "a.json").is_symlink() and json.loads((tmp_path / "elsewhere" / "b.json").read_text()) == {
            "a": value
        }
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["b.json"]


def test_weights_and_json_come_back(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2), "count": torch.tensor(7)}
    save_weights(tmp_path / "w.pt", state)
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    save_json(tmp_path / "x.json", {"b": [1, None], "a": "\u00e9\U0001f600"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": [1, None], "a": "\u00e9\U0001f600"}
    save_json(tmp_path / "x.json", {})
    assert json.loads((tmp_path / "x.json").read_text()) == {}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w.pt", "x.json"]


def test_a_failed_save_leaves_the_earlier_file_whole(tmp_path: Path, disk_with: Disk) -> None:
    weights, data = tmp_path / "w.pt", tmp_path / "x.json"
    _save_a_weight(weights)
    save_json(data, {"a": 1})
    before = weights.read_bytes(), data.read_bytes()
    with disk_with(10):
        with pytest.raises(FailedError, match="cannot write .*w.pt"):
            save_weights(weights, {"weight": torch.zeros(1000)})
        with pytest.raises(FailedError, match="cannot write .*x.json: File too large"):
            save_json(data, {"a": "x" * 100})
    assert (weights.read_bytes(), data.read_bytes()) == before
    for save in (_save_a_weight, lambda path: save_json(path, {})):
        for path in (tmp_path / "none" / "file", weights / "file"):
            with pytest.raises(FailedError, match="cannot write"):
                save(path)


# The commands given


def test_every_command_is_recorded_with_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "a"
    start = datetime.now(UTC).replace(microsecond=0)
    for command in (["amc-hw", "search", "--out", "a b"], ["amc-hw", "search", "--resume"]):
        monkeypatch.setattr(sys, "argv", command)
        record_command(folder)
    rows = [json.loads(line) for line in (folder / "commands.jsonl").read_text().splitlines()]
    assert [row["command"] for row in rows] == [["amc-hw", "search", "--out", "a b"], ["amc-hw", "search", "--resume"]]
    assert all(start <= datetime.fromisoformat(row["date"]) <= datetime.now(UTC) for row in rows)
    assert torch.__version__.startswith(rows[0]["packages"]["torch"])
    assert rows[0]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert os.uname().release in rows[0]["system"]


def test_a_package_that_is_not_there_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amc_hw.runs.PACKAGES", ("torch", "no-such-package"))
    record_command(tmp_path)
    (line,) = (tmp_path / "commands.jsonl").read_text().splitlines()
    packages = json.loads(line)["packages"]
    assert packages["no-such-package"] is None and packages["torch"]


def test_a_folder_that_cannot_be_written_fails_the_command(tmp_path: Path, disk_with: Disk) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedError, match="cannot write in "):
        record_command(tmp_path / "file" / "run")
    with disk_with(20), pytest.raises(FailedError, match="File too large"):
        record_command(tmp_path)


def test_a_search_gets_its_own_folder_back_and_another_a_new_one(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "net-host-latency_ratio0.6"
    first = numbered(base, HEADER)
    assert first.name == "net-host-latency_ratio0.6-1" and not first.exists()
    Journal(first / "metrics.jsonl", HEADER).append({"episode": 0})
    assert numbered(base, dict(HEADER)) == first
    other = HEADER | {"budget": 10.0}
    assert numbered(base, other).name == "net-host-latency_ratio0.6-2"
    (first / "metrics.jsonl").write_bytes(b'{"torn')  # killed in its first line: nothing is lost by going on there
    assert numbered(base, other) == first


def test_two_searches_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with pytest.raises(UserError, match="another search is at work") as error, alone_in(tmp_path / "run"):
            raise AssertionError("both are in")
        assert str(tmp_path / "run") in str(error.value)
    with alone_in(tmp_path / "run"):  # free again
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"), alone_in(tmp_path / "file"):
        raise AssertionError("a file is no folder")
