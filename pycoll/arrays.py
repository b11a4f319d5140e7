"""NumPy and CuPy arrays as torch tensors over the same memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from pycoll.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import cupy
    from numpy.typing import NDArray

Array = TypeVar("Array", Tensor, "NDArray[np.generic]", "cupy.ndarray")


def with_index(device: torch.device) -> torch.device:
    """`device`, with the current one's index where it names none."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _is_cupy(x: object) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"


def stream_of(x: object) -> AbstractContextManager[object]:
    """Makes CuPy's current stream torch's, for CuPy arrays."""
    if not _is_cupy(x):
        return nullcontext()
    import cupy

    stream = cupy.cuda.get_current_stream()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=x.device.id))  # type: ignore[attr-defined]


def tensor_of(x: object) -> Tensor:
    """`x` as a torch tensor over the same memory."""
    if isinstance(x, Tensor):
        return x
    if _is_cupy(x):
        return torch.from_dlpack(x)
    if not isinstance(x, np.ndarray):
        raise UnsupportedError(f"pycoll communicates torch tensors, NumPy and CuPy arrays, not {type(x).__name__}")
    if not x.flags.writeable:
        raise UsageError("pycoll: the NumPy array is read-only; pass a writable copy")
    try:
        return torch.from_numpy(x)
    except (TypeError, ValueError) as e:
        advice = "pass a contiguous copy in native byte order, such as numpy.ascontiguousarray(x, dtype=numpy.float32)"
        raise UnsupportedError(f"pycoll cannot use a NumPy array of {x.dtype} ({e}): {advice}") from e


def like(x: Array, result: Tensor) -> Array:
    if isinstance(x, Tensor):
        return result
    if _is_cupy(x):
        import cupy

        return cupy.from_dlpack(result)
    return result.numpy()
