"""Where the ranks of a test have their GPUs."""

import pytest
import torch

SHARED, OWN, ALONE = "processes that share a GPU", "a GPU for each rank", "a GPU for each rank, as its only one"


def needs(where: str, world_size: int) -> None:
    """Skips where there are too few GPUs."""
    gpus = torch.cuda.device_count()
    if where != SHARED and gpus < world_size:
        pytest.skip(f"needs {world_size} GPUs, of which there are {gpus}")
