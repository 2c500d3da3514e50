"""One thread for torch, before anything imports it: tests are small, and machines that run them are busy."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def subnormals() -> Iterator[None]:
    """ONNX Runtime, asked to flush subnormals, leaves the thread that ran it like that; hypothesis wants them."""
    yield
    torch.set_flush_denormal(False)
