"""A policy survives a round trip, and whatever is not one is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amc_hw.errors import FailedError, UserError
from amc_hw.policy import Policy, load_policy

Disk = Callable[[int], AbstractContextManager[None]]

POLICY = Policy(
    model="file.py:factory?width=0.5",
    input_shape=(3, 32, 32),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    data="npz:/data/x.npz",
    widths={"features.0.0": 2, "features.1.3": 1},
    kept={"features.0.0": [0, 7], "features.1.3": [3]},
    checkpoint_sha256="ab" * 32,
    device="host-ort",
    dtype="float32",
)


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(path)
    message = str(caught.value)
    assert message and "\n" not in message and str(path) in message and caught.value.exit_code == 2
    return message


def test_policy_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    for policy in (POLICY, replace(POLICY, checkpoint_sha256=None, weights="other.pt", widths={}, kept={})):
        policy.save(path)
        found = load_policy(path)
        assert found == policy
        assert isinstance(found.input_shape, tuple) and isinstance(found.mean, tuple) and isinstance(found.std, tuple)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]
    with pytest.raises(FrozenInstanceError):
        found.device = "pixel"  # type: ignore[misc]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    widths=st.dictionaries(st.text(), st.integers(1, 20)),
    std=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1),
)
def test_any_text_and_number_survives(
    tmp_path_factory: pytest.TempPathFactory, text: str, widths: dict[str, int], std: list[float]
) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    policy = replace(
        POLICY, model=text, data=text, widths=widths, kept={n: list(range(w)) for n, w in widths.items()}, std=(*std,)
    )
    policy.save(path)
    assert load_policy(path) == policy


def test_file_says_its_schema_version(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    data = json.loads(path.read_text())
    assert data["schema_version"] == 1 and data["widths"] == POLICY.widths and data["kept"] == POLICY.kept
    path.write_text(json.dumps({**data, "schema_version": 2}))
    assert "not of schema version 1" in one_line(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "cannot read policy" in one_line(tmp_path / "none.json")
    assert f"{tmp_path / 'policy.json'}: No such file" in one_line(tmp_path)
    POLICY.save(tmp_path / "policy.json")
    assert load_policy(tmp_path) == POLICY
    (tmp_path / "file").touch()
    assert "Not a directory" in one_line(tmp_path / "file" / "policy.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"not json", b"\xff\xfe\x00", b"[1, 2]", b"\x00" * 10])
def test_files_that_are_no_policy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    assert "is not a policy" in one_line(path)


@pytest.mark.parametrize("content", ['"text"', "null", "3", "true"])
def test_json_that_is_no_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(content)
    assert "is not a policy" in one_line(path)


def test_a_key_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    data, defaults = json.loads(path.read_text()), {"weights", "evaluate", "calibrate", "keep", "threads", "network"}
    defaults.add("sources")
    for key in data:
        if key in defaults:
            continue
        path.write_text(json.dumps({name: value for name, value in data.items() if name != key}))
        assert key in one_line(path)
    path.write_text(json.dumps({name: value for name, value in data.items() if name not in defaults}))
    assert load_policy(path) == POLICY
    path.write_text(json.dumps({**data, "colour": "red"}))
    assert "unknown key 'colour'" in one_line(path)
    path.write_text(json.dumps({**data, "mean": 0.5}))
    assert "is not a policy" in one_line(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": 3},
        {"kept": None},
        {"widths": {"a": "8"}},
        {"model": 7},
        {"threads": "2"},
        {"widths": {"a": 2}, "kept": {"a": ["0", "1"]}},
        {"widths": {"a": 2}, "kept": {"a": [0.5, True]}},
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    one_line(path)


def test_a_full_disk_leaves_the_earlier_policy_whole(tmp_path: Path, disk_with: Disk) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    before = path.read_bytes()
    with disk_with(50), pytest.raises(FailedError, match="cannot write") as caught:
        replace(POLICY, model="x" * 100).save(path)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert path.read_bytes() == before and load_policy(path) == POLICY


def test_a_folder_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="No such file or directory"):
        POLICY.save(tmp_path / "none" / "policy.json")
