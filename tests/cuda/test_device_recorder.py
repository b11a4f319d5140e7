"""What the recorder and the log say of calls on GPUs."""

import os
from typing import Any

import pytest
import torch
from places import OWN, SHARED, needs

from pycoll.testing import Processes, Rank

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(100)]


def _recorded(rank: Rank, where: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    log = rank.folder / f"log-{rank.rank}"
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ["PYCOLL_LOG"] = "info"
    torch.cuda.set_device(rank.rank if where == OWN else 0)
    with rank.communicator(timeout=30) as comm:
        x = torch.ones(1000, device="cuda")
        comm.all_reduce(x)
        comm.all_reduce(x, "max", algorithm="ring")
        if where == OWN:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                comm.broadcast(x, 1)
        torch.cuda.synchronize()
        mine = comm.trace()["ranks"][rank.rank]
        comm.barrier()
        return mine["launches"], [c for c in mine["calls"] if "gpu" in c], log.read_text()


def _summary(entries: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(e["call"], e["bytes"], e["state"]) for e in entries]


def test_launches_are_recorded() -> None:
    """When they were launched: when a kernel ends nobody asks. What a graph holds is there once."""
    needs(OWN, 2)
    with Processes(_recorded, 2, OWN) as ranks:
        for launches, calls, log in ranks.results(60):
            all_reduce = ("all_reduce", 4000, "launched")
            assert _summary(launches) == [all_reduce, all_reduce, ("broadcast", 4000, "captured")]
            assert [e["sequence"] for e in launches] == [0, 1, 2] and launches[1]["algorithm"] == "ring"
            assert all(e["gpu"] and e["begin_ns"] <= e["end_ns"] and e["channels"] > 0 for e in launches)
            assert calls == []
            assert "info: on GPUs: peers, this one on cuda:" in log


def test_calls_that_the_host_steps_through_are_calls() -> None:
    with Processes(_recorded, 2, SHARED) as ranks:
        for launches, calls, log in ranks.results(60):
            assert launches == []
            assert _summary(calls) == [("all_reduce", 4000, "ended")] * 2
            assert "info: on GPUs: step by step on cuda:0" in log
