"""One thread for torch, before anything imports it: tests are small, and machines that run them are busy."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("busy", deadline=None)  # a machine that others use is slow now and then
hypothesis.settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def subnormals() -> Iterator[None]:
    """ONNX Runtime, asked to flush subnormals, leaves the thread that ran it like that; hypothesis wants them."""
    yield
    torch.set_flush_denormal(False)


@contextmanager
def _disk_with(free: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def disk_with() -> Callable[[int], AbstractContextManager[None]]:
    """`disk_with(free)`: files cannot grow beyond `free` bytes; writes end in the middle, as on a full disk."""
    return _disk_with
