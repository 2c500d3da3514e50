"""A timing process of its own: one that has done nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from profilers.errors import DeviceError

EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")  #: as a traceback ends; advice may follow it


def run_module(module: str, *arguments: str, stdin: str | None = None) -> str:
    """What `python -m module` writes to standard output; DeviceError with what it ended with: its last line where it
    ends with that error's exit code, else its exception, or its last line where there is none."""
    # the package is found from wherever the parent found it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        if lines and done.returncode == DeviceError.exit_code:
            raise DeviceError(lines[-1])
        said = [line for line in lines if EXCEPTION.match(line)] or lines or ["no output"]
        raise DeviceError(f"the timing process ended with {done.returncode}: {said[-1]}")
    return done.stdout
