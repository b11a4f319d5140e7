"""Which parameters can be in buckets, that all ranks mean the same ones (B1), and how they are divided into buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pycoll.buckets.bucket import FLOATS
from pycoll.communicator import Communicator
from pycoll.errors import UnsupportedError, UsageError


def agree(
    params: Sequence[Tensor], communicator: Communicator, wire_dtype: torch.dtype, bucket_bytes: int | None
) -> torch.device:
    """Where the parameters lie; for all ranks alike, unless they differ (B1) or this one cannot do them.

    Raises:
        UsageError: on all ranks: they differ.
        UnsupportedError: a parameter, or parameters on several devices.
    """
    problem: UnsupportedError | None = None
    devices = [*dict.fromkeys(param.device for param in params)]
    try:
        for param in params:
            check(param)
        if len(devices) > 1:
            raise UnsupportedError(
                f"pycoll: parameters are on {', '.join(map(str, devices))}: one GradientBuckets takes one device's"
            )
        told = [f"{tuple(param.shape)} {param.stride()} {param.dtype}" for param in params]
    except UnsupportedError as error:
        problem, told = error, [str(error)]
    digest = hashlib.sha256(f"{told} {wire_dtype} {bucket_bytes}".encode()).digest()
    digests = communicator.all_gather(torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64))
    if problem is not None:
        raise problem
    if not bool((digests == digests[0]).all()):
        others = [rank for rank in range(communicator.world_size) if digests[rank] != digests[0]]
        raise UsageError(
            f"pycoll: the parameters of ranks {others} differ from those of rank 0 in number, shape or dtype, "
            "or wire_dtype and bucket_bytes do: make the same model in the same way on all ranks"
        )
    return devices[0]


def divided(params: Sequence[Tensor], bucket_bytes: int, copies: Callable[[Tensor], int]) -> Iterator[list[Tensor]]:
    """In order, into buckets of one dtype and one number of copies each."""
    filling: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for param in params:
        kind = (param.dtype, copies(param))
        here = filling.setdefault(kind, [])
        here.append(param)
        if 4 * sum(each.numel() for each in here) >= bucket_bytes:
            yield filling.pop(kind)
    yield from filling.values()


def check(param: Tensor) -> None:
    """Raises UnsupportedError for a parameter that cannot be in a bucket."""
    if is_lazy(param) or is_traceable_wrapper_subclass(param):
        raise UnsupportedError(
            f"pycoll: a parameter is {type(param).__name__}, without memory of its own: make lazy modules run once "
            "before, and give local tensors instead of DTensors"
        )
    if param.dtype not in FLOATS:
        raise UnsupportedError(
            f"pycoll: a parameter is {param.dtype}: GradientBuckets take float32, bfloat16 and float16; for others "
            'there is torch\'s DistributedDataParallel over init_process_group("pycoll")'
        )
    if param.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"pycoll: a parameter is on {param.device}: GradientBuckets take those of CPU and CUDA")
    if not torch.ops.aten.is_non_overlapping_and_dense(param) or param.is_inference():
        raise UnsupportedError(
            f"pycoll: a parameter of shape {tuple(param.shape)} and strides {param.stride()} has gaps or overlaps, or "
            "was made in inference mode: make it of a .clone(memory_format=torch.contiguous_format)"
        )
