"""Fixtures for all tests."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compiled import Compiled, Program, missing
from leaks import held_segments, native_threads, native_threads_left

from pycoll._build import build_info

torch.set_num_threads(1)  # ranks share the cores, and torch's own threads would count as left behind


def program_of(item: pytest.Item) -> Program | None:
    """The C++ program that a test runs, if it does: its parameter of that name."""
    parameters: dict[str, Program] = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("program")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a compiler come last, and before them those that train on GPUs, which take long.

    First come those for which one GPU suffices, and of which a pretended one shows least: time may be short on a GPU.
    Those marked `cuda` are skipped where there is no GPU, or no build for one; `real_gpu` where it is pretended.
    """
    items.sort(key=_turn)
    if _is_fake():
        _skip(items, "real_gpu", "the pretended GPUs of tests/fake_cuda have no matrix products")
    cuda = build_info()["cuda"]
    if not cuda["built"]:
        missing = f"pycoll built without CUDA: {cuda['reason']}"
    elif not torch.cuda.is_available():
        missing = f"torch {torch.__version__} sees no CUDA GPU"
    else:
        return
    _skip(items, "cuda", missing)


def _turn(item: pytest.Item) -> tuple[bool, bool, bool]:
    waits, trains = program_of(item) is not None, item.get_closest_marker("real_gpu") is not None
    return waits, trains, item.path.name != "test_local_group.py"


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _is_fake() -> bool:
    return "libfake_cuda" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """The programs of all tests, begun with the first test, whichever that is."""
    programs = [program for item in request.session.items if (program := program_of(item)) is not None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield Compiled(programs, pool)
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def executable(program: Program, compiled: Compiled) -> Path:
    """A test's parameter `program`, compiled."""
    if reason := missing():
        pytest.skip(reason)
    return compiled.path(program)


@pytest.fixture
def fake_cuda() -> bool:
    """Whether the GPUs are those of tests/fake_cuda, which run few of torch's own kernels."""
    return _is_fake()


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test ends with the threads it began with, and without shared memory."""
    threads, count = set(threading.enumerate()), native_threads()
    yield
    assert held_segments() == []
    assert set(threading.enumerate()) <= threads
    assert native_threads_left(count) == 0
