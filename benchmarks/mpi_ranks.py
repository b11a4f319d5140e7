"""A rank of an MPI contender: `Allreduce` in place on a NumPy array, through mpi4py.

Started by mpirun; needs neither torch nor pycoll.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import mpi4py
import numpy as np
from mpi4py import MPI

from . import ranks, values

_TYPES = {"float32": MPI.FLOAT, "float64": MPI.DOUBLE}


def _all_reduce(count: int, dtype: str) -> ranks.Operation:
    buffer = np.zeros(count, values.storage(dtype))
    return ranks.Operation(
        partial(MPI.COMM_WORLD.Allreduce, MPI.IN_PLACE, [buffer, count, _TYPES[dtype]], MPI.SUM), buffer
    )


def main() -> None:
    """Serves the driver as one rank of MPI.COMM_WORLD."""
    world = MPI.COMM_WORLD
    wanted = int(os.environ[ranks.WORLD_VARIABLE])
    if world.size != wanted:
        raise SystemExit(
            f"MPI made a world of {world.size} ranks, not {wanted}: mpi4py and mpirun belong to different MPIs"
        )
    who, algorithm, settings = sys.argv[1:]
    facts = {"mpi4py": mpi4py.__version__, "numpy": np.__version__, "settings": settings}
    contenders = {(who, algorithm, "private", "mpi4py"): _all_reduce}
    ranks.Rank(world.rank, world.size, contenders, world.Barrier, lambda: facts).serve()


if __name__ == "__main__":
    main()
