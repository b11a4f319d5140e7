"""Anonymous memory that the ranks of a benchmark share, as the driver creates it and passes it on."""

from __future__ import annotations

import mmap
import os

DESCRIPTORS_VARIABLE = "PYCOLL_BENCH_DESCRIPTORS"
SLOT_BYTES = 2**19  # of each rank, before its tensor


def create(world_size: int, largest: int) -> list[int]:
    """For each rank a slot, then a tensor of `largest` bytes. Returns file descriptors, for the caller to close."""
    descriptors = []
    for rank in range(world_size):
        descriptors.append(os.memfd_create(f"pycoll-bench-{rank}", 0))
        os.ftruncate(descriptors[-1], SLOT_BYTES + largest)
    return descriptors


def attach() -> list[mmap.mmap]:
    """The memory of all ranks, in a process that the driver has started."""
    return [mmap.mmap(int(text), 0) for text in os.environ[DESCRIPTORS_VARIABLE].split(",")]
