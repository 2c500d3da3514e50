"""`amc-hw.toml` says what was written into it, and nothing a user wrote there is lost."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amc_hw.errors import FailedError, UserError
from amc_hw.settings import FILE, KEYS, read_settings, record_settings, write_settings

Disk = Callable[[int], AbstractContextManager[None]]

VALUES: dict[str, Any] = {"device": "pixel", "model": "resnet20?num_classes=7", "checkpoint": "a b.pt", "seed": -3}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_settings(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and caught.value.exit_code == 2
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "amc-hw.toml"


def test_what_is_written_is_read(file: Path) -> None:
    assert read_settings(file) == {}
    write_settings(VALUES, file)
    assert read_settings(file) == VALUES
    assert tomllib.loads(file.read_text()) == VALUES
    first, *_ = file.read_text().splitlines()
    assert first.startswith("# ")


def test_the_default_is_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_settings() == {}
    write_settings({"seed": 1})
    assert record_settings({"seed": 2, "device": "host"}) == ["device"]
    assert record_settings({"device": "pixel"}) == []
    assert Path("amc-hw.toml") == FILE and read_settings() == {"seed": 1, "device": "host"}


# The basic plane here, and what lies beyond it below
TEXT = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF))


@given(values=st.fixed_dictionaries({}, optional={k: TEXT if t is str else st.integers() for k, t in KEYS.items()}))
def test_odd_characters_survive(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    values = {
        key: value if isinstance(value, str) else max(-(2**63), min(value, 2**63 - 1)) for key, value in values.items()
    }
    path = tmp_path_factory.mktemp("settings") / "amc-hw.toml"
    write_settings(values, path)
    assert read_settings(path) == values
    path.unlink()
    for key, value in values.items():
        record_settings({key: value}, path)
    assert read_settings(path) == values


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a\r\nb", "\x00\x1f\x7f", "é\u2028", "'''", '"""', "#", ""])
def test_characters_that_toml_is_particular_about(file: Path, text: str) -> None:
    write_settings({"data": f"npz:{text}"}, file)
    assert read_settings(file) == {"data": f"npz:{text}"}


@pytest.mark.parametrize("text", ["\U0001f600", "\U00010000", "a\U0010ffffb"])
def test_characters_beyond_the_basic_plane_survive(file: Path, text: str) -> None:
    write_settings({"checkpoint": text}, file)
    assert read_settings(file) == {"checkpoint": text}


# What cannot be read


def test_an_unknown_key_names_the_known_ones(file: Path) -> None:
    file.write_text('device = "host"\nmodle = "x"\n')
    assert (
        refused(file)
        == f"{file}: unknown key 'modle'; known: device, model, input, checkpoint, data, evaluate, calibrate, seed"
    )
    file.write_text('[device]\nname = "x"\n')
    assert "device = {'name': 'x'} must be a string" in refused(file)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("device = 3", "device = 3 must be a string"),
        ('seed = "3"', "seed = '3' must be a whole number"),
        ("seed = 1.0", "seed = 1.0 must be a whole number"),
        ("seed = true", "seed = True must be a whole number"),
        ('model = ["a"]', "model = ['a'] must be a string"),
        ("checkpoint = 2024-01-01", "must be a string"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(file: Path, line: str, wanted: str) -> None:
    file.write_text(line + "\n")
    assert wanted in refused(file)


@pytest.mark.parametrize("content", [b"device", b'device = "a\n', b"device = \x80", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    refused(file)


def test_a_place_that_cannot_be_read(tmp_path: Path) -> None:
    assert "Is a directory" in refused(tmp_path)
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(tmp_path / "file" / "amc-hw.toml")


# What is there stays


def test_an_existing_file_is_never_overwritten(file: Path, tmp_path: Path) -> None:
    for content in ("", "# mine\n", "not toml at all"):
        file.write_text(content)
        with pytest.raises(
            UserError, match=r"is there already: edit it, name what to add \(--device \.\.\.\), or remove it first"
        ):
            write_settings(VALUES, file)
        assert file.read_text() == content
    with pytest.raises(UserError, match="is there already"):
        write_settings(VALUES, tmp_path)


def test_recording_adds_what_is_missing_and_keeps_the_rest(file: Path) -> None:
    mine = '# our phone\n\ndevice   =   "pixel"  # on my desk\n'
    file.write_text(mine)
    record_settings({"device": "host", "model": "resnet20", "seed": 0}, file)
    assert file.read_text() == mine + 'model = "resnet20"\nseed = 0\n'
    before = file.read_bytes()
    record_settings({"device": "host", "seed": 5}, file)
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("mine", ["", "seed = 4", "# only a comment", "seed = 4\n\n\n"])
def test_recording_behind_any_ending(file: Path, mine: str) -> None:
    file.write_text(mine)
    record_settings({"model": "resnet20"}, file)
    assert file.read_text().startswith(mine)
    assert read_settings(file) == {**tomllib.loads(mine), "model": "resnet20"}


def test_recording_keeps_the_line_ends_of_windows(file: Path) -> None:
    file.write_bytes(b"# mine\r\nseed = 4\r\n")
    record_settings({"model": "resnet20"}, file)
    assert file.read_bytes().startswith(b"# mine\r\nseed = 4\r\n")


def test_recording_without_a_file_writes_one(file: Path) -> None:
    record_settings({"model": "resnet20"}, file)
    assert read_settings(file) == {"model": "resnet20"}


def test_recording_into_a_damaged_file_is_refused_and_changes_nothing(file: Path) -> None:
    file.write_text("device = \n")
    with pytest.raises(UserError, match="not valid TOML"):
        record_settings({"model": "resnet20"}, file)
    assert file.read_text() == "device = \n"


def test_places_that_cannot_be_written(file: Path) -> None:
    for act in (write_settings, record_settings):
        with pytest.raises(FailedError, match="cannot write .*amc-hw.toml: No such file or directory"):
            act(VALUES, file.parent / "none" / "amc-hw.toml")


def full_disk(disk_with: Disk, act: Any, file: Path) -> None:
    """`act` where no file can grow beyond 20 bytes."""
    with disk_with(20), pytest.raises(FailedError, match="cannot write .*: File too large") as caught:
        act(VALUES, file)
    assert caught.value.exit_code == 1


def test_a_full_disk_leaves_the_recorded_file_whole(file: Path, disk_with: Disk) -> None:
    file.write_text("# mine\nseed = 4\n")
    full_disk(disk_with, record_settings, file)
    assert file.read_text() == "# mine\nseed = 4\n"


def test_a_full_disk_leaves_no_part_of_a_new_file(file: Path, disk_with: Disk) -> None:
    full_disk(disk_with, write_settings, file)
    assert not file.exists()
