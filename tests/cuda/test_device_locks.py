"""What waits for a GPU lets Python's other threads run: a host function on a stream may need the interpreter."""

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_communicator import SMALL

from pycoll import LocalGroup
from pycoll.testing import Processes, Rank
from pycoll.tuning import MiB

pytestmark = pytest.mark.cuda
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch uses."""
    if hasattr(ctypes.CDLL(None), "cudaLaunchHostFunc"):
        return ctypes.CDLL(None)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return ctypes.CDLL(next(line.split()[-1] for line in lines if "libcudart" in line))


class Callback:
    """On the current stream, a function in Python that takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.ran = threading.Event()
        self._seconds = seconds
        self._function = HOST_FUNCTION(self._run)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        assert runtime().cudaLaunchHostFunc(stream, self._function, None) == 0

    def _run(self, _: Any) -> None:
        time.sleep(self._seconds)
        self.ran.set()


def _last_tensor(rank: Rank) -> None:
    comm = rank.communicator(cuda_config=SMALL)
    # torch lets go of the lock where it frees a tensor, but not where it frees a storage.
    storage = comm.empty(1000, device="cuda").untyped_storage()
    comm.close()
    callback = Callback(0.3)
    del storage  # unmaps the heap, for which it waits for the GPU
    assert callback.ran.is_set()


def _full_heap(rank: Rank) -> None:
    with rank.communicator(cuda_config=replace(SMALL, heap_bytes=32 * MiB)) as comm:

        def take() -> torch.Tensor:
            return comm.empty(12 * MiB, dtype=torch.uint8, device="cuda")

        first, second = [take()], [take().untyped_storage()]
        comm.all_reduce(first[0])  # the memory may be in use until the stream gets here
        callback = Callback(1.0)
        first.clear()
        found: list[torch.Tensor] = []
        done = [
            in_a_thread(lambda: found.append(take())),  # waits for the callback, and others for it
            in_a_thread(second.clear),
            in_a_thread(comm.device_footprint),
            in_a_thread(lambda: repr(comm)),
        ]
        for thread in done:
            thread.join()
        assert callback.ran.is_set() and len(found) == 1
        found.clear()


def in_a_thread(work: Callable[[], object]) -> threading.Thread:
    """Begins it, and gives it the time to come to where it waits."""
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    return thread


def _local_group(rank: Rank) -> None:
    group = LocalGroup(2)
    group.all_reduce([torch.ones(10, device="cuda") for _ in range(2)])
    callback = Callback(0.3)
    group.all_reduce([torch.ones(10, device="cuda") for _ in range(2)])
    del group  # waits for its last call
    assert callback.ran.is_set()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("waits", (_last_tensor, _full_heap, _local_group))
def test_callbacks_run_while_memory_is_waited_for(waits: Any) -> None:
    with Processes(waits, 1) as ranks:
        ranks.results(30)


AT_EXIT = """
import threading, time
import torch.distributed as dist
import pycoll
comm = pycoll.Communicator(dist.HashStore(), 0, 1)
x = comm.empty(1000, device="cuda")
y = comm.empty(1000, device="cuda")
{closing}
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""


@pytest.mark.parametrize("closing", ("comm.close()", ""))
def test_tensors_that_live_to_the_end_of_the_process(closing: str) -> None:
    code = AT_EXIT.format(closing=closing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
