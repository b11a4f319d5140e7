"""Where ranks compute: what --device asks for and this machine has, and which GPU is whose."""

import os
from typing import Any, Literal

import torch
import torch.distributed as dist

from pycoll._build import build_info
from pycoll.train.config import ConfigError, TrainConfig

CPU = torch.device("cpu")


def without_cuda() -> str | None:
    """Why no rank can compute on a GPU here; None where it can."""
    cuda = build_info()["cuda"]
    if not cuda["built"]:
        return f"pycoll was built without CUDA: {cuda['reason']}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    return None


def kind_of(config: TrainConfig) -> Literal["cpu", "cuda"]:
    """What the ranks compute on. Raises ConfigError where that is not there, and for a backend that cannot serve it."""
    missing = without_cuda()
    if config.device == "cuda" and missing is not None:
        raise ConfigError(
            f"--device is cuda, but {missing}. Give cpu, or auto; or install a CUDA torch and its nvcc where there is a"
            " GPU, and build pycoll anew there"
        )
    kind: Literal["cpu", "cuda"] = "cuda"
    if config.device == "cpu" or config.cpu_only is not None or missing is not None:
        kind = "cpu"
    if config.backend == "nccl" and kind == "cpu":
        raise ConfigError(f"--backend is nccl, which knows GPUs alone, but {missing}: give pycoll, or gloo")
    return kind


def check_device(config: TrainConfig, *, launches: bool) -> None:
    """Before any rank starts. `launches`: this process is to start them all.

    Raises ConfigError as `kind_of`, and where NCCL would have to serve ranks that share a GPU.
    """
    if kind_of(config) == "cpu" or config.backend != "nccl":
        return
    gpus = torch.cuda.device_count()
    ranks = config.dp * config.tp * config.pp if launches else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > gpus and (launches or gpus > 1):  # another launcher may show each rank one GPU, its own
        raise ConfigError(f"--backend nccl needs a GPU for each of {ranks} ranks, and there are {gpus}: give pycoll")


def take_device(config: TrainConfig) -> torch.device:
    """This rank's, made the current one: the GPU of LOCAL_RANK among those that are visible, in turns where ranks
    outnumber them, and the only one under launchers that show each rank one. Needs torch.distributed."""
    if kind_of(config) == "cpu":
        return CPU
    place = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.init()  # before anybody who would choose by LOCAL_RANK alone where nothing has been chosen (DeviceMesh)
    torch.cuda.set_device(device)
    return device


def count_gpus(device: torch.device) -> int:
    """On how many GPUs the ranks compute together; 0 on CPUs. A call that all ranks make."""
    if device.type == "cpu":
        return 0
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, str(torch.cuda.get_device_properties(device).uuid))
    return len({*of_all})


def has_room(device: torch.device, size: int) -> bool:
    """Whether a GPU has so many bytes more; of other devices it is believed."""
    return device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0]
