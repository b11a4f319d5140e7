"""What is to outlive a crash of the machine."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """What has been written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
