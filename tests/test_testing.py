"""pycoll.testing: ranks as threads and as processes, and what they say when they fail."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import pycoll
from pycoll import Communicator, Config
from pycoll.testing import Processes, Rank, run_processes, run_threads

pytestmark = [pytest.mark.usefixtures("leaves_nothing"), pytest.mark.timeout(60)]


def _total(comm: Communicator, factor: float) -> float:
    return comm.all_reduce(torch.tensor(factor * (comm.rank + 1))).item()


def test_results_come_in_rank_order() -> None:
    assert run_threads(lambda comm: (comm.rank, comm.world_size), 3) == [(0, 3), (1, 3), (2, 3)]
    assert run_processes(_total, 3, 2.0) == [12.0] * 3


def test_threads_take_a_config_and_a_timeout() -> None:
    def rank_main(comm: Communicator) -> tuple[float, str]:
        return comm.timeout, repr(comm)

    for timeout, text in run_threads(rank_main, 2, config=Config(channels=2, heap_bytes=0), timeout=7):
        assert timeout == 7 and "2 channels" in text


def test_the_first_error_of_threads_is_raised() -> None:
    """Not the PeerLostError of rank 0, which follows from it."""

    def rank_main(comm: Communicator) -> None:
        if comm.rank == 1:
            raise KeyError("the cause")
        comm.barrier()

    with pytest.raises(KeyError, match="the cause"):
        run_threads(rank_main, 3)


def _fails(comm: Communicator) -> None:
    if comm.rank == 1:
        raise KeyError("the cause")
    comm.barrier()


def test_errors_of_processes_carry_tracebacks() -> None:
    with pytest.raises(pycoll.Error, match=r"rank 1 has failed:(.|\n)*in _fails(.|\n)*KeyError: 'the cause'"):
        run_processes(_fails, 2)


def _hangs(comm: Communicator) -> None:
    if comm.rank == 1:
        time.sleep(60)
    comm.barrier()


def test_processes_that_hang_are_killed() -> None:
    with pytest.raises(pycoll.Error, match=r"ranks \[0, 1\] did not return"):
        run_processes(_hangs, 2, timeout=1.0)


def _talks(rank: Rank) -> str:
    rank.say((rank.rank, rank.world_size, os.getpid(), str(rank.folder)))
    answer = rank.listen()
    if answer == "sleep":
        time.sleep(60)
    with pytest.raises(pycoll.TimeoutError, match="told nothing"):
        rank.listen(0.01)
    return f"heard {answer}"


def test_processes_talk_and_end() -> None:
    with Processes(_talks, 2) as ranks:
        said = [ranks.hear(r) for r in range(2)]
        folder = Path(said[0][3])
        assert said == [(r, 2, ranks.pid(r), str(folder)) for r in range(2)] and folder.is_dir()
        ranks.tell(0, "sleep")
        ranks.tell(1, "hello")
        assert ranks.result(1) == "heard hello"
        assert ranks.exit_code(1) == 0
        with pytest.raises(pycoll.Error, match="rank 0 is silent"):
            ranks.hear(0, 0.05)
        assert ranks.exit_code(0, 0.05) is None
        ranks.kill(0, signal.SIGTERM)
        assert ranks.exit_code(0) == -signal.SIGTERM
        with pytest.raises(pycoll.Error, match="rank 0 has died"):
            ranks.result(0)
    assert not folder.exists()
