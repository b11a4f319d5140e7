"""Fixtures for all tests."""

import threading
from collections.abc import Iterator

import pytest
import torch
from leaks import held_segments, native_threads

torch.set_num_threads(1)  # ranks share the cores, and torch's own threads would count as left behind


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test ends with the threads it began with, and without shared memory."""
    threads, count = set(threading.enumerate()), native_threads()
    yield
    assert held_segments() == []
    assert set(threading.enumerate()) <= threads
    assert native_threads() <= count, "a native thread is left"
