"""`amc-hw.toml`: what commands take when a flag is not given. Flags win over it, it wins over the defaults."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amc_hw.errors import UserError
from amc_hw.specs import named_path, parse_spec
from profilers.files import write_whole

FILE = Path("amc-hw.toml")
KEYS: Mapping[str, type] = {
    "device": str,
    "model": str,
    "input": str,
    "checkpoint": str,
    "data": str,
    "evaluate": str,
    "calibrate": str,
    "seed": int,
}


def read_settings(path: Path = FILE) -> dict[str, Any]:
    """What the file says; empty where there is none. UserError on anything but known keys of the right type."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for key, value in found.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}; known: {', '.join(KEYS)}")
        if type(value) is not KEYS[key]:
            raise UserError(f"{path}: {key} = {value!r} must be a {'string' if KEYS[key] is str else 'whole number'}")
    return found


def write_settings(values: Mapping[str, Any], path: Path = FILE) -> None:
    """A new file with `values`; UserError where there is one already."""
    if path.exists():
        raise UserError(f"{path} is there already: edit it, name what to add (--device ...), or remove it first")
    _write(path, ["# Defaults of the amc-hw commands run in this folder; a flag wins over them.", *_lines(values)])


def extend_settings(values: Mapping[str, Any], path: Path = FILE) -> None:
    """Add `values` to a file; UserError where it says otherwise of one of them."""
    known = read_settings(path)
    for key, value in values.items():
        if known.get(key, value) != value:
            raise UserError(f"{path} says {key} = {known[key]!r} already: edit it, or remove it first")
    record_settings(values, path)


def record_settings(values: Mapping[str, Any], path: Path = FILE) -> list[str]:
    """Add the `values` that the file does not name; what it says stays as it is. The keys that were added."""
    if not path.exists():
        write_settings(values, path)
        return list(values)
    known = read_settings(path)
    new = {key: value for key, value in values.items() if key not in known}
    if not new:
        return []
    old = path.read_bytes()
    _write(path, _lines(new), before=old + (b"\n" if old and not old.endswith(b"\n") else b""))
    return list(new)


def check_there(
    *, model: str, checkpoint: Path | None, data: str | None, evaluate: str | None, calibrate: str | None
) -> None:
    """UserError where a file or folder that one of these names is not there."""
    specs = [parse_spec(text) for text in (model, data, evaluate, calibrate) if text]
    for path in (checkpoint, *map(named_path, specs)):
        if path is not None and not Path(path).expanduser().exists():
            raise UserError(f"there is no {str(path)!r} here")


def _write(path: Path, lines: list[str], *, before: bytes = b"") -> None:
    try:
        write_whole(path, before + "".join(f"{line}\n" for line in lines).encode())
    except UnicodeEncodeError:
        raise UserError(f"{path} cannot hold {lines[-1]!r}: it is not valid text") from None


def _lines(values: Mapping[str, Any]) -> list[str]:
    """JSON strings are TOML strings, as long as nothing is written as two surrogates and DEL is escaped."""
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for key, value in values.items()
    ]
