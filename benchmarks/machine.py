"""Describes the machine that a benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def _first(path: str, key: str) -> str:
    """The first value of `key` in a `key : value` file of /proc, or 'unknown'."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _setting(path: str) -> str:
    """The chosen word of a file such as 'always [madvise] never'."""
    file = Path(path)
    words = file.read_text().split() if file.exists() else []
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def describe() -> dict[str, Any]:
    """CPU, cores, memory, kernel, huge pages, Python, load and date."""
    pages = "/sys/kernel/mm/transparent_hugepage"
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "huge_pages": _setting(f"{pages}/enabled"),
        "huge_pages_shared": _setting(f"{pages}/shmem_enabled"),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # of the minute before the run: other work on these cores
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    return int(_first("/proc/meminfo", "MemAvailable").split()[0]) * 1024
