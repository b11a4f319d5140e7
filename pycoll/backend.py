"""Registers pycoll with torch.distributed: `init_process_group("pycoll")`."""

import atexit
from typing import Any

import torch.distributed as dist

from pycoll import _C
from pycoll.communicator import native_config
from pycoll.tuning import CUDA, Config


def _create(options: Any, _backend_options: Any) -> Any:
    """Called by torch for each group, on each of its ranks."""
    config = native_config(Config(heap_bytes=0), options.group_size)
    on_gpus = native_config(CUDA, options.group_size)
    return _C.Backend(
        options.store, options.group_rank, options.group_size, config, on_gpus, options.timeout.total_seconds()
    )


def register() -> None:
    """Makes "pycoll" a backend for CPU and CUDA tensors. Importing pycoll does it."""
    if dist.is_available() and not hasattr(dist.Backend, "PYCOLL"):
        dist.Backend.register_backend("pycoll", _create, extended_api=True, devices=["cpu", "cuda"])
        atexit.register(_C.close_backends)
