"""A timing process of its own: one that has done nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

from profilers.errors import DeviceError


def run_module(module: str, *arguments: str, stdin: str | None = None) -> str:
    """What `python -m module` writes to standard output; DeviceError with its last line of standard error, which is the
    whole of it where the process ends with that error's exit code."""
    # the package is found from wherever the parent found it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        *_, last = ["", *done.stderr.strip().splitlines()]
        if last and done.returncode == DeviceError.exit_code:
            raise DeviceError(last)
        raise DeviceError(f"the timing process ended with {done.returncode}: {last or 'no output'}")
    return done.stdout
