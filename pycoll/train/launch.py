"""Starts the ranks of a run on this machine through torch's own launcher, and says how they ended."""

import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pycoll.errors import Error
from pycoll.parent import end_with

LAUNCHER = "PYCOLL_LAUNCHER"
"""The variable that holds the process of `launch`, for the ranks that it starts."""


def rank() -> int | None:
    """This process's rank if torchrun or `launch` started it, else None."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def may_restart() -> bool:
    """Whether the launcher starts the ranks again when one has died, or has done so."""
    return restarted() or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def run_id() -> str | None:
    """The name that torchrun has for the run, the same on all ranks and after restarts; None where it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def program() -> str:
    """What to type for `pycoll train`, here and now."""
    if shutil.which("pycoll"):
        return "pycoll train"
    script = Path(sys.executable).with_name("pycoll")
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"{shown} train" if script.exists() else f"{sys.executable} -m pycoll.train"


def restarted() -> bool:
    """Whether the launcher has started the ranks before, and one of them has died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def end_with_launcher() -> None:
    """A rank that `launch` has started is asked to stop, as by SIGTERM, when that process dies: nobody would start it
    again, nor see how it ends. torchrun's ranks are torchrun's. Raises Error where it has died already."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and not end_with(int(launcher), signal.SIGTERM):
        raise Error("the process that started the ranks has died: start again")


def launch(arguments: Sequence[str], nproc: int, restarts: int) -> int:
    """Runs `python -m pycoll.train ARGUMENTS` in `nproc` processes, again if one dies, and waits for them.

    Returns the exit status: 0, that of the rank that failed and said why, or 128 + the signal that stopped this process
    (it passes signals on, and lets the ranks save). Raises Error where a rank was killed.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Ranks that were asked to stop may take so long to end a step and save (torch 2.13 on; 30 s before).
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ[LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="pycoll-train-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        logging.disable(logging.ERROR)  # The launcher logs each signal and failure; the ranks and we say it shorter.
        try:
            elastic_launch(config, sys.executable)("-m", "pycoll.train", *arguments)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as error:
            return _status(error)
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[LAUNCHER]
    return 0


def _status(error: ChildFailedError) -> int:
    failed, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    raise Error(f"rank {failed} was killed by {signal.Signals(-failure.exitcode).name}") from error
