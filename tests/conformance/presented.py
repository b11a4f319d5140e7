"""What the suite is told about the backend under test. README.md says the same in prose.

The suite decides by the backend's name which tests run, in conditions such as `BACKEND != "gloo"`, in sets such as
`{"gloo"}`, and within some tests. None of them asks what the backend can do. So the module is imported as it is for a
backend that torch knows, and is told the real name afterwards.
"""

from __future__ import annotations

import os
import types
from typing import Any

KNOWN = ("gloo", "mpi", "nccl", "ucc")
"""The names that torch's suite asks for."""


class Name(str):
    """The backend's name, which also equals the one that the suite was imported as.

    Tests use it both ways: `init_process_group(backend=BACKEND)` must have the real one, and `if BACKEND == "gloo"` in
    `_test_accumulate_gradients_no_sync` chooses the CPU's half of the test.
    """

    __slots__ = ("stands_for",)
    stands_for: str

    def __new__(cls, name: str, stands_for: str) -> Name:
        self = super().__new__(cls, name)
        self.stands_for = stands_for
        return self

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == self.stands_for

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def stands_for(backend: str) -> str:
    """The backend that decides which tests run for `backend`."""
    return backend if backend in KNOWN else "gloo"


def present(suite: Any, backend: str, imported_as: str) -> None:
    """Tells the imported `suite` that the tests run over `backend`; nothing, where it was imported as that."""
    if backend == imported_as:
        return
    suite.BACKEND = Name(backend, imported_as)
    os.environ["BACKEND"] = backend
    _profiled(suite, backend)
    _monitored_barrier_for_all()
    _name_in_ddp_logs()


def _profiled(suite: Any, backend: str) -> None:
    """The events `BACKEND:all_reduce` and so on are asked for, as they are with the backends of these lists."""
    for backends in (
        suite.PROFILING_SUPPORTED_BACKENDS,
        suite.CUDA_PROFILING_SUPPORTED_BACKENDS,
        suite.SEND_RECV_PROFILING_SUPPORTED_BACKENDS,
    ):
        backends.append(backend)


def _monitored_barrier_for_all() -> None:
    """`dist.monitored_barrier` refuses every backend that is not called "gloo", before it asks the backend.

    Here it is torch's function still, but the name that it sees is Gloo's; then it calls the group's
    `monitored_barrier`, which any backend can have.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    plain = c10d.monitored_barrier
    seen = {**vars(c10d), "get_backend": lambda group=None: c10d.Backend.GLOO}
    passing = types.FunctionType(plain.__code__, seen, plain.__name__, plain.__defaults__, plain.__closure__)
    dist.monitored_barrier = c10d.monitored_barrier = passing


def _name_in_ddp_logs() -> None:
    """DDP's log calls every registered backend "custom": c10d takes the name from an enumeration, not the backend."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    ddp: Any = DistributedDataParallel
    plain = ddp._get_ddp_logging_data

    def named(self: Any) -> Any:
        data = plain(self)
        if data.get("backend_name") == "custom":
            data["backend_name"] = dist.get_backend(self.process_group)
        return data

    ddp._get_ddp_logging_data = named
