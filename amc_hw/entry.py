"""The program: an interrupt while it is still imported ends it as one does later."""

from __future__ import annotations


def main() -> None:
    try:
        from amc_hw.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()
