"""Which file holds the latency table of a device."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from profilers.device import search_folders
from profilers.errors import FailedError, TableError
from profilers.table import LatencyTable
from profilers.targets import Target

FOLDER = "latency_tables"


def table_files(device: str | None = None) -> list[Path]:
    """All tables, or those of a device, the user's own first: `NAME.jsonl`, and `NAME@....jsonl` for further
    identities."""
    patterns = ["*.jsonl"] if device is None else [f"{glob.escape(device)}{more}.jsonl" for more in ("", "@*")]
    found: dict[Path, Path] = {}
    for folder in search_folders(FOLDER):
        for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
            found.setdefault(path.resolve(), path)  # in a checkout the two folders are one
    return list(found.values())


def begun(path: Path) -> bool:
    """Whether there is a table with its header; a file that was cut before its end holds nothing yet."""
    return path.exists() and LatencyTable.read_identity(path) is not None


def _copy(path: Path, own: Path) -> None:
    """The copy appears as a whole, and not over one to which another process has added by now."""
    part = own.with_name(f"{own.name}.{os.getpid()}.part")
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(path.read_bytes())
            with suppress(FileExistsError):
                os.link(part, own)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FailedError(f"cannot copy {path} to {own}: {error.strerror}") from error


@dataclass(frozen=True)
class TableStore:
    """The table of the identity that a target has: its methods raise DeviceError where the target is not there to tell,
    and TableError where the file is damaged."""

    target: Target

    @property
    def path(self) -> Path:
        """Where the table lies, or will be written."""
        name, identity = self.target.config.name, self.target.identity()
        for path in table_files(name):
            if LatencyTable.read_identity(path) in (identity, None):
                return path
        plain = Path(FOLDER) / f"{name}.jsonl"
        return self._further(plain) if plain.exists() else plain

    def _further(self, plain: Path) -> Path:
        """The file for this identity where another has the plain name."""
        return plain.with_name(f"{self.target.config.name}@{self.target.identity().digest()}.jsonl")

    def find(self) -> LatencyTable | None:
        """The table as it is; None where there is none, or only of other identities."""
        path = self.path
        return LatencyTable.read(path) if begun(path) else None

    def find_or_empty(self) -> LatencyTable:
        """As `find`, with a table without rows for None; nothing is written."""
        return self.find() or LatencyTable(self.path, self.target.identity(), {}, [])

    def read(self, profile: str = "amc-hw profile") -> LatencyTable:
        """As `find`; TableError for None. profile: the command that measures a table, where the device is here."""
        if (table := self.find()) is not None:
            return table
        here, name = self.target.can_time, self.target.config.name
        others = table_files(name)
        if others and (known := LatencyTable.read_identity(others[0])) is not None:
            part, there, wanted = known.first_difference(self.target.identity())
            beside = f"'{profile}' measures a table beside it" if here else f"correct {name}.toml"
            raise TableError(f"{others[0]} was measured with {part} {there!r}, not {wanted!r}: {beside}")
        how = f"measure one with '{profile}'" if here else "put there what was measured on the device"
        raise TableError(f"no latency table {self.path}: {how}")

    def open(self) -> LatencyTable:
        """The table to add to, in the user's own folder: a shipped one is copied there first."""
        identity, path = self.target.identity(), self.path
        own = Path(FOLDER) / path.name
        if path.exists() and own.exists() and LatencyTable.read_identity(own) not in (identity, None):
            own = self._further(own)  # another one of its name is there
        if path.exists() and not own.exists():
            _copy(path, own)
        return LatencyTable.open(own, identity, self.target.provenance())
