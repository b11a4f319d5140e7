"""How the ranks of a job find one another: the store that torchrun, mpirun or srun leads to."""

import itertools
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pycoll.errors import UsageError

_files = itertools.count()  # a rank meets the others in the same order everywhere

_LAUNCHERS = (  # variables that hold rank, world size and (parts of) a name of the job
    ("RANK", "WORLD_SIZE", ()),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("PMI_RANK", "PMI_SIZE", ()),
    ("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
)


LONGEST = 1e9
"""Seconds that stand for ever: what clocks and torch's stores can still add up."""


def seconds(timeout: float | timedelta) -> float:
    """A time-out in seconds, at most LONGEST. Raises UsageError unless it is positive."""
    value = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not value > 0:
        raise UsageError(f"pycoll: the timeout must be positive, in seconds, not {timeout}")
    return min(value, LONGEST)


def store_from_env(timeout: float) -> tuple[dist.Store, int, int]:
    """Store, rank and world size, as the launcher's variables say; `timeout` in seconds.

    Raises UsageError where the environment names no rank.
    """
    for rank_key, world_key, job_keys in _LAUNCHERS:
        if rank_key not in os.environ or world_key not in os.environ:
            continue
        rank, world_size = _count_from_env(rank_key), _count_from_env(world_key)
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            return _rendezvous_store(rank, world_size, timeout), rank, world_size
        if rank_key == "RANK":
            raise UsageError(
                "pycoll: RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: start with torchrun"
            )
        return _file_store(job_keys, world_size), rank, world_size
    raise UsageError(
        "pycoll: the environment names no rank: start with torchrun, mpirun or srun, "
        "or give a store, rank and world size"
    )


def _count_from_env(name: str) -> int:
    if not os.environ[name].isdecimal():
        raise UsageError(f"pycoll: the environment variable {name} must be a count, not {os.environ[name]!r}")
    return int(os.environ[name])


_rendezvous_stores: dict[tuple[str, str, int, int], dist.Store] = {}


def _rendezvous_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """The store at MASTER_ADDR. Kept while this process lives: rank 0's may be what serves it, also to late ranks."""
    key = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, world_size)
    if key not in _rendezvous_stores:
        patience = timedelta(seconds=timeout)
        _rendezvous_stores[key] = next(dist.rendezvous("env://", rank, world_size, timeout=patience))[0]
    return _rendezvous_stores[key]


def _file_store(job_keys: Sequence[str], world_size: int) -> dist.Store:
    """Where ranks meet whose launcher gives no address: a file named after the job, which the last one removes."""
    job = "-".join(os.environ[key] for key in job_keys if key in os.environ) or f"launcher-{_launcher_pid()}"
    name = f"pycoll-{os.getuid()}-{''.join(c if c.isalnum() else '-' for c in job)}-{next(_files)}"
    return dist.FileStore(str(Path(tempfile.gettempdir()) / name), world_size)


def _launcher_pid() -> int:
    """The process that started this rank's session (MPICH's proxy), whatever scripts lie between."""
    session = os.getsid(0)
    if session == 0:  # it was started outside this PID namespace, so not by a launcher within
        return os.getppid()
    stat = Path(f"/proc/{session}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])
