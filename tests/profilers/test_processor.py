"""What a processor is called, by what systems of many kinds say."""

from __future__ import annotations

from pathlib import Path

import pytest

from profilers.processor import CPUINFO, processor_name, this_processor

X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 17\nmodel name\t: AMD EPYC  7B13\n\nprocessor\t: 1\n"


def arm(*parts: str, tail: str = "") -> str:
    """Cores by their part's number, as 64-bit ARM lists them."""
    core = "processor\t: {}\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: {}\n\n"
    return "".join(core.format(number, part) for number, part in enumerate(parts)) + tail


@pytest.mark.parametrize(
    ("cpuinfo", "model", "machine", "name"),
    [
        (X86, "", "x86_64", "AMD EPYC 7B13"),
        (
            arm("0xd08", tail="Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n"),
            "",
            "aarch64",
            "Raspberry Pi 4 Model B Rev 1.4",
        ),
        (arm("0xd08"), "Raspberry Pi 4 Model B Rev 1.4\0", "aarch64", "Raspberry Pi 4 Model B Rev 1.4"),
        (arm("0xd07"), "NVIDIA Jetson Nano Developer Kit\0", "aarch64", "NVIDIA Jetson Nano Developer Kit"),
        (arm("0xd0c", "0xd0c"), "", "aarch64", "aarch64 0x41/0xd0c"),
        (arm("0xd05", "0xd05", "0xd0a"), "", "aarch64", "aarch64 0x41/0xd05 0x41/0xd0a"),
        ("", "Apple M2 Pro\n", "arm", "Apple M2 Pro"),
        ("", "", "riscv64", "riscv64"),
        ("", "", "", "unknown"),
    ],
)
def test_boards_and_processors_are_told_apart(cpuinfo: str, model: str, machine: str, name: str) -> None:
    assert processor_name(cpuinfo, model=model, machine=machine) == name


@pytest.mark.skipif(not Path(CPUINFO).exists(), reason="this is not Linux")
def test_this_machine_has_a_name_of_one_line() -> None:
    assert this_processor() == this_processor() != "unknown"
    assert "\n" not in this_processor() and "\0" not in this_processor()
