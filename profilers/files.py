"""Files that are written whole or not at all, and lines that are added whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

from profilers.errors import FailedError, UserError


def write_whole(path: Path, data: bytes) -> None:
    """`data` at `path`, or where a link there leads; until it is there, what was there before. FailedError where it
    cannot be written."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.is_dir():
        raise FailedError(f"cannot write {path}: it is a folder")
    part = path.with_name(path.name + ".part")
    try:
        if path.exists() and not path.is_file():  # a pipe, a terminal, /dev/null: nothing to be replaced
            path.write_bytes(data)
            return
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise FailedError(f"cannot write {path}: {error.strerror}") from error


def check_replaceable(path: Path, mark: bytes) -> None:
    """UserError where there is a file that does not hold `mark`, so was not written by us."""
    with suppress(OSError):  # what cannot be looked at cannot be written, either
        if path.is_file() and path.stat().st_size and mark not in path.read_bytes():
            raise UserError(f"{path} is there already, and not of amc-hw: name another --out, or move it away")


def append_synced(file: FileIO, data: bytes) -> None:
    """Add `data` at the end of an unbuffered file and wait until it is on the disk; on OSError none of it stays."""
    start = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # what is no file cannot be cut
            file.truncate(start)
        raise
