"""The folder of a search: a journal of what was expensive, the commands given, the policy and its weights."""

from __future__ import annotations

import fcntl
import importlib.metadata
import io
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amc_hw.errors import FailedError, UserError
from profilers.files import append_synced, write_whole

JOURNAL = "metrics.jsonl"  #: in the folder of a run
Progress = Callable[[int, int, str], None]  #: told (done, total, what there is to say)
PACKAGES = ("amc-hw", "torch", "numpy", "onnxruntime", "ai-edge-litert")


def silent(done: int, total: int, text: str) -> None:
    """Progress that nobody looks at."""


def numbered(base: Path, header: dict[str, Any]) -> Path:
    """The first of `base-1`, `base-2`, ... that holds this very search, or nothing yet."""
    line = json.dumps(header).encode() + b"\n"
    for number in itertools.count(1):
        folder = base.with_name(f"{base.name}-{number}")
        journal = folder / JOURNAL
        if not journal.exists():
            return folder
        with journal.open("rb") as file:
            first = file.readline()
        if first == line or not first.endswith(b"\n"):
            return folder
    raise AssertionError("unreachable")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made where it is missing; UserError where another process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except FileExistsError:
        raise UserError(f"{folder} is a file, not a folder") from None
    except OSError as error:
        raise FailedError(f"cannot write in {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another search is at work in {folder}: wait for it, or name another --out") from None
        yield


class Journal:
    """`metrics.jsonl` of a run: a header that names the search, then one line per result. A torn last line goes; a
    header without results gives way.

    kind: of run, for the messages. UserError where the file is another run's or damaged before its last line,
    FailedError where it cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, kind: str = "search") -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines, size = whole_lines(path, header, kind=kind)
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(size)
            if not lines:
                self._write(header)
        except OSError as error:
            raise FailedError(f"cannot write {path}: {error.strerror}") from error
        self.recorded = lines[1:]

    def append(self, row: dict[str, Any]) -> None:
        try:
            self._write(row)
        except OSError as error:
            raise FailedError(f"cannot write {self.path}: {error.strerror}") from error

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("ab", buffering=0) as file:
            append_synced(file, json.dumps(row).encode() + b"\n")


def whole_lines(path: Path, header: dict[str, Any], *, kind: str) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, header first, and how many bytes they are; none where nothing of it is to be
    kept. Nothing is written. UserError as of `Journal`."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} is damaged before its last line: name another --out")
    if len(lines) == 1 and lines[0] != header:
        return [], 0
    if lines and lines[0] != header:
        key = next(key for key in {**header, **lines[0]} if lines[0].get(key, ...) != header.get(key, ...))
        there, asked = (_said(each.get(key)) for each in (lines[0], header))
        raise UserError(f"{path.parent} holds another {kind} ({key}: {there}, not {asked}): name another --out")
    return lines, len(whole)


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else repr(value)


class Scores:
    """Scores that searches share which ask for the same: question -> answer, in a journal of their own."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path, {"schema_version": 1, "holds": "scores"})
        self._known = {json.dumps(row["question"]): row["score"] for row in self._journal.recorded}

    def knows(self, question: Sequence[Any]) -> bool:
        return json.dumps(question) in self._known

    def score(self, question: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """What `compute` gives, or gave to whoever asked first: a number, or several in a sequence."""
        key = json.dumps(question)
        if key not in self._known:
            self._known[key] = compute()
            self._journal.append({"question": question, "score": self._known[key]})
        return self._known[key]


def record_command(folder: Path) -> None:
    """Add the command line, the date and the versions in use to `commands.jsonl`."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    row = {
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "commands.jsonl").open("ab", buffering=0) as file:
            append_synced(file, json.dumps(row).encode() + b"\n")
    except OSError as error:
        raise FailedError(f"cannot write in {folder}: {error.strerror}") from error


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """A state dict at `path`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def save_json(path: Path, data: dict[str, Any]) -> None:
    """`data` at `path`, whole or not at all."""
    write_whole(path, json.dumps(data, indent=1).encode())
