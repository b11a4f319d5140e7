"""Where the ranks of a test have their GPUs."""

import pytest
import torch

SHARED, OWN = "processes that share a GPU", "a GPU for each rank"


def needs(where: str, world_size: int) -> None:
    """Skips where there are too few GPUs."""
    if where == OWN and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
