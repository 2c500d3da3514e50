"""Devices: which there are, what is there and what is missing, what is put on a phone or a board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amc_hw.errors import TableError, UserError
from profilers.device import device_names, load_device
from profilers.store import TableStore, table_files
from profilers.targets import Probe, Target, open_target
from profilers.targets.adb import AdbTarget


def list_devices() -> dict[str, Any]:
    """Configurations by name, and the latency tables that were measured with them."""
    devices = []
    for name in device_names():
        config = load_device(name)
        devices.append(
            {
                "name": name,
                "target": config.target,
                "runtime": config.runtime,
                "description": config.description,
                "tables": [str(path) for path in table_files(config.name)],
            }
        )
    return {"devices": devices}


def check_device(name: str, *, serials: Sequence[str] = ()) -> dict[str, Any]:
    """What is there and what is missing on a device, or on each of several; `ok` where nothing is."""
    targets = map(open_target, load_device(name).at(serials).members())
    probes = [probe for target in targets for probe in (*target.probes(), *_of_its_table(target))]
    return _probed(name, probes)


def _of_its_table(target: Target) -> list[Probe]:
    """Whether there is a table of a device that is away: nothing else can be had of it."""
    if target.can_time:
        return []
    try:
        table = TableStore(target).read()
    except TableError as error:
        return [Probe("table", False, str(error))]
    return [Probe("table", True, f"{table.path}, {len(table.rows)} rows")]


def _probed(name: str, probes: Sequence[Probe]) -> dict[str, Any]:
    return {"device": name, "ok": all(probe.ok for probe in probes), "probes": [asdict(probe) for probe in probes]}


def setup_device(name: str, *, binary: Path | None = None, serials: Sequence[str] = ()) -> dict[str, Any]:
    """Put a device's runner there, or on each of several; what is there afterwards."""
    return _probed(name, [probe for target in _over_adb(name, serials) for probe in target.setup(binary)])


def clean_device(name: str, *, serials: Sequence[str] = ()) -> dict[str, Any]:
    """Remove all that was put on a device, or on each of several."""
    targets = _over_adb(name, serials)
    for target in targets:
        target.clean()
    return {"device": name, "removed": targets[0].config.workdir}


def _over_adb(name: str, serials: Sequence[str]) -> list[AdbTarget]:
    config = load_device(name).at(serials)
    targets = [target for target in map(open_target, config.members()) if isinstance(target, AdbTarget)]
    if not targets:
        raise UserError(f"device {name} is not reached over ADB: there is nothing to put there or to remove")
    return targets
