"""What was built and what this machine offers."""

from typing import Any

import torch

from pycoll import _C
from pycoll._build import build_info
from pycoll.tuning import Config
from pycoll.version import __version__


def info() -> dict[str, Any]:
    """Version, torch, SIMD level, CUDA built or not and for which architectures, cores, memory, and where ranks may share memory."""
    built = build_info()
    return {
        "pycoll": __version__,
        "torch": torch.__version__,
        "built_against_torch": built["torch"],
        "simd": _C.simd,
        "cuda": built["cuda"],
        "cores": _C.available_cores(),
        "memory_bytes": _C.physical_memory(),
        "shared_memory": "anonymous (memfd), between processes of one user in one network namespace; no /dev/shm needed",
        "defaults": vars(Config()),
    }
