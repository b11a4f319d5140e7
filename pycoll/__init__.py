"""pycoll: collective communication for PyTorch.

`torch.distributed.init_process_group("pycoll")` after `import pycoll`, or `pycoll.Communicator` directly.
"""

import importlib
from types import ModuleType

from pycoll import _build

_build.check()

import pycoll_autoload  # noqa: E402 - the check comes first
from pycoll.buckets import GradientBuckets  # noqa: E402
from pycoll.communicator import Communicator  # noqa: E402
from pycoll.data_parallel import DataParallel  # noqa: E402
from pycoll.ddp_hook import WireState, ddp_hook  # noqa: E402
from pycoll.errors import (  # noqa: E402
    Error,
    MismatchError,
    PeerLostError,
    TimeoutError,
    UnsupportedError,
    UsageError,
)
from pycoll.info import info  # noqa: E402
from pycoll.local_group import LocalGroup  # noqa: E402
from pycoll.optim import FusedAdam  # noqa: E402
from pycoll.sharded import ShardedAdam  # noqa: E402
from pycoll.trace import group_trace  # noqa: E402
from pycoll.tuning import Config  # noqa: E402
from pycoll.version import __version__  # noqa: E402

pycoll_autoload.register()


def __getattr__(name: str) -> ModuleType:
    """`pycoll.ops` when it is named: few need it, and torch takes its time to register operators."""
    if name != "ops":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("pycoll.ops")


__all__ = [
    "Communicator",
    "Config",
    "DataParallel",
    "Error",
    "FusedAdam",
    "GradientBuckets",
    "LocalGroup",
    "MismatchError",
    "PeerLostError",
    "ShardedAdam",
    "TimeoutError",
    "UnsupportedError",
    "UsageError",
    "WireState",
    "__version__",
    "ddp_hook",
    "group_trace",
    "info",
]
