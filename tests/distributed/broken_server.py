"""A fork server of `pycoll faults` whose pycoll is broken on purpose; its first argument says how."""

import os
import sys
import time
from typing import Any

from pycoll import Communicator, PeerLostError
from pycoll.faults import script, server

all_reduce = Communicator.all_reduce


def wrong_number(comm: Communicator, x: Any, *args: Any, **more: Any) -> Any:
    result = all_reduce(comm, x, *args, **more)
    out = x if more.get("out") is None else more["out"]
    if comm.rank == 0 and result is out and out.numel():
        out[-1] = 99
    return result


def wrong_error(comm: Communicator, x: Any, *args: Any, **more: Any) -> Any:
    if comm.rank == 0:
        raise PeerLostError("pycoll: rank 1 is lost: its process has died")
    return all_reduce(comm, x, *args, **more)


def leak(comm: Communicator, x: Any, *args: Any, **more: Any) -> Any:
    os.dup(0)
    return all_reduce(comm, x, *args, **more)


def crash(comm: Communicator, x: Any, *args: Any, **more: Any) -> Any:
    if comm.rank == 0:
        os.abort()
    return all_reduce(comm, x, *args, **more)


def hang(comm: Communicator, x: Any, *args: Any, **more: Any) -> Any:
    if comm.rank == 0:
        time.sleep(1000)
    return all_reduce(comm, x, *args, **more)


if __name__ == "__main__":
    Communicator.all_reduce = globals()[sys.argv[1]]  # type: ignore[method-assign]
    if sys.argv[1] == "hang":
        script.PATIENT, server.PATIENCE = 0.5, 2.0
    server.main(int(sys.argv[2]), int(sys.argv[3]))
