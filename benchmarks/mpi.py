"""Finds the MPIs to compare with, and how to start their ranks.

An MPI is named by a Python environment whose `bin` holds its `mpirun`, and a `python` with mpi4py for it; README.md
says how to make one.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .groups import Launch

VARIABLE = "PYCOLL_BENCH_MPI"  # environments, separated as in PATH

# How each MPI is set up: its defaults, and what was found to be better at some size. README.md tells what was tried.
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "Open MPI": {
        "default": {},
        "no CMA": {"OMPI_MCA_smsc": "^cma", "OMPI_MCA_btl_vader_single_copy_mechanism": "none"},  # of 5 and of 4
        "coll/sm": {"OMPI_MCA_coll_sm_priority": "100"},
    },
    "MPICH": {"default": {}},
}
_PREFIXES = ("OMPI_MCA_", "PRTE_MCA_", "MPIR_CVAR_")  # of the variables by which users set MPIs up


class MpiMissing(ValueError):
    """What was named is no MPI that can be compared with."""


@dataclass(frozen=True)
class Mpi:
    """An MPI that was found: its kind (a key of SETTINGS), version and environment."""

    kind: str
    version: str
    home: Path

    @property
    def name(self) -> str:
        return f"{self.kind} {self.version}"


def homes() -> tuple[Path, ...]:
    """The environments that PYCOLL_BENCH_MPI names."""
    return tuple(Path(entry) for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry)


def find(home: Path) -> Mpi:
    """Asks the environment at `home` which MPI it holds.

    Raises:
        MpiMissing: it holds none.
    """
    home = home.absolute()
    for tool in ("mpirun", "python"):
        if not (home / "bin" / tool).exists():
            raise MpiMissing(
                f"{home} has no bin/{tool}: benchmarks/README.md says how to make an environment with an MPI"
            )
    code = "from mpi4py import MPI; print(MPI.get_vendor()[0], *MPI.get_vendor()[1], sep='\\n')"
    asked = subprocess.run([home / "bin" / "python", "-c", code], capture_output=True, text=True, timeout=60)
    if asked.returncode:
        raise MpiMissing(f"mpi4py does not work in {home}: {asked.stderr.strip()[-500:]}")
    kind, *version = asked.stdout.split("\n")[:4]
    if kind not in SETTINGS:
        raise MpiMissing(f"{home} holds {kind}; the benchmarks know how to start {' and '.join(SETTINGS)}")
    return Mpi(kind, ".".join(version), home)


def launches(mpi: Mpi, world_size: int, dtype: str) -> list[Launch]:
    """One group of ranks for each way to set up `mpi`; none where MPI has no such type."""
    if dtype not in ("float32", "float64"):
        return []
    oversubscribe = ["--oversubscribe"] if mpi.kind == "Open MPI" and world_size > len(os.sched_getaffinity(0)) else []
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # in a container everybody is
    package = Path(__file__).parent
    found = []
    given = {key: value for key, value in os.environ.items() if key.startswith(_PREFIXES)}
    for setting, variables in SETTINGS[mpi.kind].items():
        settings = " ".join(f"{key}={value}" for key, value in {**given, **variables}.items())
        command = [str((mpi.home / "bin" / "mpirun").resolve()), *oversubscribe, "-n", str(world_size)]
        command += [str(mpi.home / "bin" / "python"), "-m", f"{package.name}.mpi_ranks", mpi.name, setting, settings]
        environment = {"PYTHONPATH": str(package.parent), **root, **variables}
        found.append(Launch(f"{mpi.name} ({setting})", command, launcher=True, environment=environment))
    return found
