"""pycoll.relaxed.ParameterServer when something goes wrong: ranks that are killed, stopped, raise; nothing is left."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from leaks import held_segments
from small_net import loss_of, make_net

import pycoll
from pycoll import Communicator, FusedAdam
from pycoll.relaxed import ParameterServer
from pycoll.testing import Processes, Rank, run_threads

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("leaves_nothing")]


def steps_until(comm: Communicator, staleness: int, at_ten: Callable[[ParameterServer], None]) -> tuple[Any, ...]:
    """Steps for ever, as all ranks do, until something is wrong: what, who is to blame, and why."""
    net = make_net()
    optimizer = FusedAdam(net.parameters())
    try:
        with ParameterServer(optimizer, comm, staleness=staleness) as server:
            for step in range(10**6):
                if step == 10:
                    at_ten(server)
                if step > 10:
                    time.sleep(0.01)
                optimizer.zero_grad()
                loss_of(net, comm.rank, step).backward()
                server.step()
    except (pycoll.Error, ValueError, TypeError) as error:
        return type(error).__name__, getattr(error, "rank", None), str(error)
    return "ended", None, ""


def _worker(rank: Rank, staleness: int, timeout: float, does: str) -> tuple[Any, ...]:
    def at_ten(server: ParameterServer) -> None:
        rank.say("there")
        if rank.rank == 1 and does == "computes":
            time.sleep(60)
        if rank.rank == 0 and does == "ends":
            server.finish()

    found = steps_until(rank.communicator(timeout=timeout), staleness, at_ten)
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return *found, left + held_segments()


@pytest.mark.parametrize(("does", "staleness"), [("steps", 0), ("computes", 3), ("ends", 0)])
def test_a_killed_rank_is_an_error_on_all_others(does: str, staleness: int) -> None:
    with Processes(_worker, 3, staleness, 60.0, does) as ranks:
        for rank in range(3):
            ranks.hear(rank)
        ranks.kill(1)
        for rank in (0, 2):
            kind, blamed, text, left = ranks.result(rank, 20.0)
            assert (kind, blamed, left) == ("PeerLostError", 1, []), text


def test_a_stopped_rank_is_waited_for_until_the_time_out() -> None:
    with Processes(_worker, 2, 2, 2.0, "steps") as ranks:
        ranks.hear(0)
        ranks.hear(1)
        ranks.kill(1, signal.SIGSTOP)
        kind, blamed, text, left = ranks.result(0, 20.0)
        assert (kind, blamed, left) == ("TimeoutError", 1, []) and "rank 0 has waited for rank 1 for 2 s" in text


def test_a_step_may_take_longer_than_the_time_out_while_nobody_waits() -> None:
    def main(comm: Communicator) -> None:
        with ParameterServer(FusedAdam(make_net().parameters()), comm, staleness=0) as server:
            for _ in range(2):
                time.sleep(2.5)
                server.step()

    run_threads(main, 2, timeout=1.5)


def test_a_rank_that_raises_is_lost_to_all_others() -> None:
    def at_ten(server: ParameterServer) -> None:
        if server.rank == 1:
            raise ValueError("of its own")

    results = run_threads(lambda comm: steps_until(comm, 3, at_ten), 3)
    assert results[1][0] == "ValueError"
    for kind, blamed, text in (results[0], results[2]):
        assert (kind, blamed) == ("PeerLostError", 1) and "rank 1 has left" in text, text


def test_a_server_that_fails_is_an_error_on_all_ranks() -> None:
    def at_ten(server: ParameterServer) -> None:
        if server.rank == 1:
            server._server._optimizer.param_groups[0]["betas"] = None

    results = run_threads(lambda comm: steps_until(comm, 0, at_ten), 2)
    assert results[1][0] in ("TypeError", "Error"), "where it failed: in its thread, or in the step that came last"
    kind, blamed, text = results[0]
    assert (kind, blamed) == ("Error", 1) and "its server failed" in text


def test_one_that_is_dropped_leaves_nothing() -> None:
    def main(comm: Communicator) -> None:
        server = ParameterServer(FusedAdam(make_net().parameters()), comm, staleness=0)
        server.step()
        comm.barrier()
        del server
        gc.collect()
        assert comm.closed

    run_threads(main, 2)
