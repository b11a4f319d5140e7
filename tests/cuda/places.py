"""Where the ranks of a test have their GPUs, and what else those may be doing."""

import threading
from collections.abc import Callable

import pytest
import torch

SHARED, OWN, ALONE = "processes that share a GPU", "a GPU for each rank", "a GPU for each rank, as its only one"


def needs(where: str, world_size: int) -> None:
    """Skips where there are too few GPUs."""
    gpus = torch.cuda.device_count()
    if where != SHARED and gpus < world_size:
        pytest.skip(f"needs {world_size} GPUs, of which there are {gpus}")


def beside_a_capture(action: Callable[[], object]) -> None:
    """Runs `action` in a thread while this one captures a graph, which must come to its end and replay."""
    written, graph = torch.zeros(10, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written.fill_(3.0)
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()
    graph.replay()
    assert bool((written.cpu() == 3).all())
