"""Starts the ranks of a run on this machine through torch's own launcher, and says how they ended."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pycoll.errors import Error


def rank() -> int | None:
    """This process's rank if torchrun or `launch` started it, else None."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs `python -m pycoll.train ARGUMENTS` in `nproc` processes and waits for them.

    Returns the exit status: 0, that of the rank that failed and said why, or 128 + the signal that stopped this process
    (it passes signals on, and lets the ranks save). Raises Error where a rank was killed.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="pycoll-train-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
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
    return 0


def _status(error: ChildFailedError) -> int:
    failed, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    raise Error(f"rank {failed} was killed by {signal.Signals(-failure.exitcode).name}") from error
