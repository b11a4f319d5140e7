"""What pycoll could leave behind in a process."""

import gc
import time
from pathlib import Path


def held_segments() -> list[str]:
    """Shared memory of pycoll that this process maps or has open."""
    gc.collect()
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pycoll" in line]
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except FileNotFoundError:  # the descriptor with which the folder is read
            continue
        if "memfd:pycoll" in target:
            held.append(f"{fd.name} -> {target}")
    return held


def native_threads() -> int:
    """Threads of this process, Python's and others."""
    return len(list(Path("/proc/self/task").iterdir()))


def native_threads_left(before: int, seconds: float = 10) -> int:
    """How many there are beyond `before`; those that were joined are still listed for a moment, which they may have."""
    deadline = time.monotonic() + seconds
    while native_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return max(0, native_threads() - before)


def descriptors() -> int:
    """Open descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings() -> int:
    """Mapped regions of shared memory, files and sockets; private memory comes and goes with the allocator."""
    return sum(" rw-s " in line or " r--s " in line for line in Path("/proc/self/maps").read_text().splitlines())
