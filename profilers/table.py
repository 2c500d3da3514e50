"""Latency tables: an append-only JSON Lines journal of measurements, one file per identity.

The first line is a header (schema version, unit, identity, provenance), every other line one row of type `op`,
`network`, `calibration` or `validation` with its raw samples. A torn last line is dropped with a warning;
anything else malformed is an error that names file and line.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from profilers.errors import FailedError, TableError
from profilers.files import append_synced
from profilers.ops import OpGraph, OpSpec

SCHEMA_VERSION = 1
ROW_TYPES = ("op", "network", "calibration", "validation")


@dataclass(frozen=True)
class Identity:
    """What a measurement is of. Two tables of different identities never mix."""

    soc: str
    runtime: str
    runtime_version: str
    threads: int = 1
    affinity: str = "any"
    dtype: str = "float32"
    batch: int = 1

    def first_difference(self, other: Identity) -> tuple[str, Any, Any]:
        """The name of the first part that differs from `other`, here and there; ValueError where none does."""
        for part in fields(self):
            here, there = getattr(self, part.name), getattr(other, part.name)
            if here != there:
                return part.name, here, there
        raise ValueError("the identities are equal")

    def digest(self) -> str:
        """A short name, for files."""
        return f"{zlib.crc32(json.dumps(asdict(self), sort_keys=True).encode()):08x}"


@dataclass(frozen=True)
class Measurement:
    """One row: an operator, or a whole network at some widths, with its latency samples in milliseconds.

    samples_ms: raw samples of one inference each (for `op` rows in context: one mean over the faster runs).
    op: for rows of type `op`; graph: the network for all others.
    context: where an `op` row was read: "alone" or "in_context".
    details: anything else worth keeping, for instance the seed of a random network.
    """

    type: str
    samples_ms: tuple[float, ...]
    op: OpSpec | None = None
    graph: OpGraph | None = None
    context: str = "alone"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type not in ROW_TYPES:
            raise ValueError(f"unknown row type {self.type!r}; known: {', '.join(ROW_TYPES)}")
        if (self.op is None) == (self.type == "op") or (self.graph is None) != (self.type == "op"):
            raise ValueError(f"a row of type {self.type} needs {'an op' if self.type == 'op' else 'a graph'}")
        if not self.samples_ms or not all(math.isfinite(ms) and ms > 0 for ms in self.samples_ms):
            raise ValueError("samples_ms must be positive numbers, at least one")

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"type": self.type, "samples_ms": [round(ms, 7) for ms in self.samples_ms]}
        if self.op is not None:
            data |= {"op": self.op.to_json(), "context": self.context}
        if self.graph is not None:
            data["graph"] = self.graph.to_json()
        return data | ({"details": dict(self.details)} if self.details else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        unknown = sorted(set(data) - {"type", "samples_ms", "op", "graph", "context", "details"})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}")
        samples = data["samples_ms"]
        if not isinstance(samples, list) or any(type(ms) not in (int, float) for ms in samples):
            raise ValueError("samples_ms must be a list of numbers")
        details = data.get("details", {})
        if not isinstance(details, dict) or ("anchor" in details and not _positive(details.get("anchor_ms"))):
            raise ValueError("details must be an object, with a positive anchor_ms where it names an anchor")
        return cls(
            type=data["type"],
            samples_ms=tuple(float(ms) for ms in samples),
            op=OpSpec.from_json(data["op"]) if "op" in data else None,
            graph=OpGraph.from_json(data["graph"]) if "graph" in data else None,
            context=data.get("context", "alone"),
            details=details,
        )


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


class LatencyTable:
    """The measurements of one identity, in memory and on disk.

    `open` reads an existing file or starts a new one; `append` adds rows and returns once they are on the disk.
    """

    def __init__(self, path: Path, identity: Identity, provenance: Mapping[str, Any], rows: list[Measurement]) -> None:
        self.path = path
        self.identity = identity
        self.provenance = dict(provenance)
        self.rows = rows

    @classmethod
    def open(cls, path: Path, identity: Identity, provenance: Mapping[str, Any] | None = None) -> LatencyTable:
        """The table at `path`, made if it is not there. TableError if it is of another identity."""
        if not path.exists() or path.stat().st_size == 0 or not _has_header(path):
            _write_header(path, _header_line(identity, provenance or {}))
        table = cls.read(path)
        table.require_identity(identity)
        return table

    @staticmethod
    def read_identity(path: Path) -> Identity | None:
        """Of the table at `path`, from its first line alone; None where that is torn, TableError where it is bad."""
        try:
            with path.open("rb") as file:
                line = file.readline()
        except OSError as error:
            raise TableError(f"cannot read {path}: {error.strerror}") from None
        return _header(path, line)[0] if line.endswith(b"\n") else None

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """The table at `path`, as it is. TableError where it is missing, malformed or of another schema."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise TableError(f"no latency table {path}: measure one with 'amc-hw profile'") from None
        except OSError as error:
            raise TableError(f"cannot read {path}: {error.strerror}") from None
        lines = data.split(b"\n")
        torn = lines.pop()  # what follows the last newline
        if torn.strip():
            warnings.warn(f"{path}: dropped a torn last line ({len(torn)} bytes)", stacklevel=2)
        identity, provenance = _header(path, lines[0] if lines else b"")
        rows = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                rows.append(Measurement.from_json(_parse(path, number, line)))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                why = f"{error} is missing" if isinstance(error, KeyError) else error
                raise TableError(f"{path}:{number}: {why}") from None
        return cls(path, identity, provenance, rows)

    def require_identity(self, identity: Identity) -> None:
        """TableError, naming the first part that differs, where the table is of another identity."""
        if identity != self.identity:
            part, here, wanted = self.identity.first_difference(identity)
            raise TableError(
                f"{self.path} was measured with {part} {here!r}, not {wanted!r}: move the file away, or name another "
                "device"
            )

    def reference_ms(self, anchor: str, member: str = "") -> float | None:
        """Median milliseconds of the network of that digest where it was timed beside others, on that one of several
        devices; None where it never was."""
        times = [
            row.details["anchor_ms"]
            for row in self.rows
            if row.details.get("anchor") == anchor and row.details.get("member", "") == member
        ]
        return statistics.median(times) if times else None

    def append(self, rows: list[Measurement]) -> None:
        """Add rows, in memory and on disk: one write, flushed and synced, under the file's lock."""
        if not rows:
            return
        text = "".join(json.dumps(row.to_json(), separators=(",", ":")) + "\n" for row in rows)
        try:
            with _locked(self.path) as file:
                _drop_torn_line(file)
                begins = file.tell() == 0  # someone moved the table away
                append_synced(file, (_header_line(self.identity, self.provenance) if begins else b"") + text.encode())
        except OSError as error:
            raise FailedError(f"cannot write to {self.path}: {error.strerror}") from error
        self.rows.extend(rows)

    def of_type(self, kind: str) -> list[Measurement]:
        return [row for row in self.rows if row.type == kind]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise TableError(f"{path}:{number}: not a JSON line") from None
    if not isinstance(value, dict):
        raise TableError(f"{path}:{number}: not a JSON object")
    return value


def _header(path: Path, line: bytes) -> tuple[Identity, Mapping[str, Any]]:
    """Identity and provenance of a table from its first line; TableError where this amc-hw cannot read it."""
    header = _parse(path, 1, line)
    version = header.get("schema_version")
    if version != SCHEMA_VERSION:
        age = "newer" if isinstance(version, int) and version > SCHEMA_VERSION else "older"
        raise TableError(
            f"{path}: schema version {version!r} is {age} than {SCHEMA_VERSION}, the one this amc-hw reads"
        )
    if header.get("unit") != "ms":
        raise TableError(f"{path}:1: unit {header.get('unit')!r}, expected 'ms'")
    try:
        return Identity(**header["identity"]), header.get("provenance", {})
    except (KeyError, TypeError) as error:
        raise TableError(f"{path}:1: the header's identity is not complete ({error})") from None


def _has_header(path: Path) -> bool:
    """False where a run was killed while it wrote the header: nothing has been measured yet."""
    return b"\n" in path.read_bytes()


def _header_line(identity: Identity, provenance: Mapping[str, Any]) -> bytes:
    header = {"schema_version": SCHEMA_VERSION, "unit": "ms", "identity": asdict(identity)}
    return json.dumps(header | {"provenance": dict(provenance)}, separators=(",", ":")).encode() + b"\n"


def _write_header(path: Path, line: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as file:
            if b"\n" in file.read():
                return  # another process was first
            file.truncate(0)
            append_synced(file, line)
    except OSError as error:
        raise FailedError(f"cannot write {path}: {error.strerror}") from error


def _drop_torn_line(file: Any) -> None:
    """Leaves the file at its end."""
    file.seek(0)
    data = file.read()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        file.truncate(end)
        file.seek(end)


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """The file opened for reading and writing, locked against other processes of this machine."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def merged(tables: Sequence[LatencyTable], path: Path) -> LatencyTable:
    """A new table at `path` of the rows of tables of one identity, in their order, each as often as the table that has
    it most often; TableError where the identities differ."""
    first, *others = tables
    for other in others:
        other.require_identity(first.identity)
    sources = [{"file": table.path.name, "rows": len(table.rows), "provenance": table.provenance} for table in tables]
    result = LatencyTable.open(path, first.identity, {"merged": sources})
    rows: list[Measurement] = []
    taken: Counter[str] = Counter()
    for table in tables:
        seen: Counter[str] = Counter()
        for row in table.rows:
            key = json.dumps(row.to_json(), sort_keys=True)
            seen[key] += 1
            if seen[key] > taken[key]:
                taken[key] += 1
                rows.append(row)
    result.append(rows)
    return result
