"""Fixtures for all tests."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from leaks import held_segments, native_threads

from pycoll._build import build_info

torch.set_num_threads(1)  # ranks share the cores, and torch's own threads would count as left behind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no GPU, or no build for one."""
    cuda = build_info()["cuda"]
    if not cuda["built"]:
        missing = f"pycoll built without CUDA: {cuda['reason']}"
    elif not torch.cuda.is_available():
        missing = f"torch {torch.__version__} sees no CUDA GPU"
    else:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def fake_cuda() -> bool:
    """Whether the GPUs are those of tests/fake_cuda, which run few of torch's own kernels."""
    return "libfake_cuda" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test ends with the threads it began with, and without shared memory."""
    threads, count = set(threading.enumerate()), native_threads()
    yield
    assert held_segments() == []
    assert set(threading.enumerate()) <= threads
    assert native_threads() <= count, "a native thread is left"
