"""What was built and what this machine offers."""

from typing import Any

import torch

from pycoll import _C
from pycoll._build import build_info
from pycoll.tuning import Config
from pycoll.version import __version__


def info() -> dict[str, Any]:
    """What was built and what it found: version, torch, CUDA, SIMD level, cores, memory, and the default `Config`."""
    built = build_info()
    return {
        "pycoll": __version__,
        "torch": torch.__version__,
        "built_against_torch": built["torch"],
        "simd": _C.simd,
        "cuda": built["cuda"],
        "cores": _C.available_cores(),
        "memory_bytes": _C.physical_memory(),
        "shared_memory": "anonymous (memfd), between processes of one user in one network namespace",
        "defaults": vars(Config()),
    }
