"""What a processor is called, for the identity of a table: boards and machines of another kind are told apart."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

CPUINFO, MODEL = "/proc/cpuinfo", "/proc/device-tree/model"


def processor_name(cpuinfo: str, *, model: str = "", machine: str = "") -> str:
    """By what Linux says: the board (`MODEL`), or what `CPUINFO` names, or the kinds of its cores (ARM servers name
    nothing else), or the architecture."""
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    makers, parts = (re.findall(rf"^CPU {key}\s*:\s*(\S+)$", cpuinfo, re.MULTILINE) for key in ("implementer", "part"))
    cores = sorted({f"{maker}/{part}" for maker, part in zip(makers, parts, strict=False)})
    found = model.strip("\0\n ") or (named[1] if named else " ".join([machine, *cores]))
    return " ".join(found.split()) or "unknown"


def this_processor() -> str:
    """Of the machine that the program stands on."""
    if Path(CPUINFO).exists():
        model = Path(MODEL).read_text() if Path(MODEL).exists() else ""
        return processor_name(Path(CPUINFO).read_text(), model=model, machine=platform.machine())
    try:  # macOS, where `platform` says "arm"
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        brand = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        brand = ""
    return processor_name("", model=brand, machine=platform.processor() or platform.machine())
