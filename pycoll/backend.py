"""The torch.distributed backend: `init_process_group("pycoll")`. pycoll_autoload.py makes torch know of it."""

import atexit
from typing import Any

from pycoll import _C
from pycoll.tuning import CUDA, Config, native_config

atexit.register(_C.close_backends)


def configs(world_size: int) -> tuple[_C.Config, _C.Config]:
    """Of a group of so many ranks: on the CPU, and on GPUs. Splits are made with them too."""
    return native_config(Config(heap_bytes=0), world_size), native_config(CUDA, world_size)


def create(options: Any, _backend_options: Any) -> Any:
    """The backend of one group, as this rank: c10d's `DistributedBackendOptions` in, a `c10d::Backend` out."""
    return _C.Backend(
        options.store,
        options.group_rank,
        options.group_size,
        _C.Names(f"group {options.group_id}", options.global_ranks_in_group),
        *configs(options.group_size),
        options.timeout.total_seconds(),
    )
