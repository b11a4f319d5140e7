"""What the ranks of a communicator did last: asked for while it runs, or read from the files that failed ranks left.

Every rank records its last 256 calls, messages and launches in memory that its peers map. A rank that fails writes what
it sees there, of all ranks, to a file in the folder that the environment variable PYCOLL_TRACE names; without it there
are no files. `pycoll trace` reads them.
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from pycoll import _C
from pycoll.errors import UsageError


def parsed(trace: bytes) -> dict[str, Any]:
    """What the extension says, as a dict; `pycoll.trace.dump` lists the fields."""
    return dict(json.loads(trace.decode(errors="replace")))


def group_trace(group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """`Communicator.trace()` of a torch.distributed group over pycoll, by default that of all ranks.

    Raises:
        UsageError: the group is not pycoll's, or this rank is not in it.
        Error: it is closed.
    """
    group = dist.group.WORLD if group is None else group
    try:
        backend = group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    except (AttributeError, RuntimeError) as problem:
        raise UsageError(f"pycoll: there is no such group here: {problem}") from problem
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if not isinstance(backend, _C.Backend):
        raise UsageError(f"pycoll: the group's backend is {backend.name()}, not pycoll")
    return parsed(backend.trace())
