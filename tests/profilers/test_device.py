"""Device configurations: what is read, what is refused and how, and whose folder wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from profilers.device import DeviceConfig, device_names, load_device, search_folders, shipped
from profilers.errors import UserError

MINIMAL = 'target = "host"\nruntime = "onnxruntime"\n'


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of configurations, empty, in the working directory."""
    folder = tmp_path / "device_configs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.toml").write_text(text)


def test_every_key_is_read(own: Path) -> None:
    keys = 'description = "a phone"\nthreads = 4\nbatch = 2\ndtype = "int8"\nchannel_multiple = 16\n'
    write(own, "pixel", MINIMAL + keys + "min_time_s = 1\nnoise_pct = 12.5\n")
    assert load_device("pixel") == DeviceConfig(
        "pixel", "host", "onnxruntime", "a phone", 4, 2, "int8", 16, min_time_s=1, noise_pct=12.5
    )


def test_what_is_left_out_has_the_documented_default(own: Path) -> None:
    write(own, "board", MINIMAL)
    found = load_device("board")
    assert (found.threads, found.batch, found.dtype, found.channel_multiple) == (1, 1, "float32", 0)
    assert found.name == "board"


def test_the_shipped_devices_are_found_from_any_directory() -> None:
    assert {"fake", "host", "host-ort", "host-litert"} <= set(device_names())
    for name in device_names():
        config = load_device(name)
        assert config.name in (name, "host-ort")
        assert config.channel_multiple == (1 if name == "fake-flops" else 8)


def test_an_alias_is_the_device_it_names(own: Path) -> None:
    assert load_device("host") == load_device("host-ort")
    write(own, "work", 'alias = "host"\n')
    assert load_device("work") == load_device("host-ort")
    assert "work" in device_names()


@pytest.mark.parametrize(
    ("name", "text"), [("work", 'alias = "host-ort"\nthreads = 2\n'), ("work", 'alias = "work"\n')]
)
def test_an_alias_stands_alone_and_names_another(own: Path, name: str, text: str) -> None:
    write(own, name, text)
    with pytest.raises(UserError, match=r"work\.toml: an alias stands alone and names another device"):
        load_device(name)


def test_an_alias_of_nothing_names_what_is_missing(own: Path) -> None:
    write(own, "work", 'alias = "pixel9"\n')
    with pytest.raises(UserError, match="unknown device 'pixel9'"):
        load_device("work")


def test_aliases_in_a_circle_are_refused(own: Path) -> None:
    write(own, "one", 'alias = "two"\n')
    write(own, "two", 'alias = "one"\n')
    with pytest.raises(UserError):
        load_device("one")


def test_the_own_folder_wins_over_the_shipped_one(own: Path) -> None:
    assert load_device("fake").target == "fake"
    write(own, "fake", MINIMAL + "threads = 3\n")
    assert (load_device("fake").target, load_device("fake").threads) == ("host", 3)
    assert device_names().count("fake") == 1
    write(own, "host-ort", MINIMAL + "threads = 2\n")
    assert load_device("host").threads == 2  # the shipped alias leads to the user's device
    assert search_folders("device_configs") == [Path("device_configs"), shipped("device_configs")]


@pytest.mark.parametrize("line", ["thread = 2", 'name = "other"', "[options]\nx = 1"])
def test_an_unknown_key_is_named_with_the_known_ones(own: Path, line: str) -> None:
    write(own, "board", f"{MINIMAL}{line}\n")
    with pytest.raises(UserError, match=r"board\.toml: unknown key '(thread|name|options)'; known: .*threads, batch"):
        load_device("board")


@pytest.mark.parametrize(
    "line",
    [
        'threads = "2"',
        "threads = 2.0",
        "threads = true",
        "dtype = 32",
        "description = []",
        'noise_pct = "low"',
        "min_time_s = false",
        "batch = 1979-05-27",
    ],
)
def test_a_value_of_the_wrong_type_is_named(own: Path, line: str) -> None:
    write(own, "board", f"{MINIMAL}{line}\n")
    with pytest.raises(UserError, match=rf"board\.toml: {line.split()[0]} = .* is of the wrong type"):
        load_device("board")


@pytest.mark.parametrize("key", ["target", "runtime"])
def test_a_device_needs_a_target_and_a_runtime(own: Path, key: str) -> None:
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    write(own, "board", "\n".join(kept))
    with pytest.raises(UserError, match=rf"board\.toml: {key} is missing"):
        load_device("board")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("threads = 0", "threads must be at least 1, not 0"),
        ("batch = -1", "batch must be at least 1, not -1"),
        ("channel_multiple = -1", "channel_multiple must be at least 0, not -1"),
        ("min_time_s = 0", "min_time_s must be positive"),
        ("noise_pct = nan", "noise_pct must be positive"),
        ("slowest_s = 0", "slowest_s must be positive"),
        ('delegate = "gpu"', "delegates are of devices over ADB: leave them out"),
        ('delegate_options = "cl"', "delegates are of devices over ADB: leave them out"),
        ('serial = "A"', "it is not reached over ADB: leave serials and addresses out"),
    ],
)
def test_an_impossible_value_is_named(own: Path, line: str, message: str) -> None:
    write(own, "board", f"{MINIMAL}{line}\n")
    with pytest.raises(UserError, match=f"device board: {message}"):
        load_device("board")


@pytest.mark.parametrize("data", [b"target = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(own: Path, data: bytes) -> None:
    (own / "board.toml").write_bytes(data)
    with pytest.raises(UserError, match=r"board\.toml: not valid TOML"):
        load_device("board")


def test_an_unknown_device_suggests_a_close_one_and_lists_all(own: Path) -> None:
    write(own, "pixel", MINIMAL)
    with pytest.raises(UserError, match=r"unknown device 'pixle': did you mean pixel\? known: .*host-ort.*pixel"):
        load_device("pixle")
    with pytest.raises(UserError, match="unknown device 'xyz'") as refused:
        load_device("xyz")
    assert "did you mean" not in str(refused.value)
    assert "host-litert" in str(refused.value)


def test_a_name_is_no_path(own: Path, tmp_path: Path) -> None:
    write(tmp_path, "secret", MINIMAL)
    with pytest.raises(UserError, match=r"unknown device '\.\./secret'"):
        load_device("../secret")
