"""The torch.distributed backend: `init_process_group("pycoll")`. pycoll_autoload.py makes torch know of it."""

import atexit
from typing import Any

from pycoll import _C
from pycoll.tuning import CUDA, Config, native_config

atexit.register(_C.close_backends)


def create(options: Any, _backend_options: Any) -> Any:
    """The backend of one group, as this rank: c10d's `DistributedBackendOptions` in, a `c10d::Backend` out."""
    config = native_config(Config(heap_bytes=0), options.group_size)
    on_gpus = native_config(CUDA, options.group_size)
    return _C.Backend(
        options.store,
        options.group_rank,
        options.group_size,
        f"group {options.group_id}",
        config,
        on_gpus,
        options.timeout.total_seconds(),
    )
