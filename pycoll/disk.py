"""What is to outlive a crash of the machine, and folders that one process writes to at a time."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """What has been written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path, patience: float) -> Iterator[None]:
    """Within the block no other process is in one about `folder`, on this machine at least; whatever becomes of a
    process, it is then out of it. Nothing is left in the folder.

    Raises BlockingIOError where another is in it for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            except OSError:  # a network's file system, which locks no folders
                break
        yield
    finally:
        os.close(descriptor)
