"""What benchmarks put into tensors, and how far results are from exact ones.

NumPy alone, so that ranks without torch use it too. A buffer is a one-dimensional NumPy array; bfloat16, which NumPy
lacks, is held as its bits in uint16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.generic]

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
EPSILON = {
    "float32": 2.0**-24,
    "float64": 2.0**-53,
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
}  # of one rounding, relative

PERIOD = 4099  # a prime: data that lands at a wrong place, by any power of two, is found


def storage(dtype: str) -> np.dtype[np.generic]:
    """The NumPy type that holds elements of `dtype`."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)


def encode(values: NDArray[np.floating], dtype: str) -> Buffer:
    """`values` as a buffer of `dtype`; bfloat16 is cut off, not rounded."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def decode(buffer: Buffer, dtype: str) -> NDArray[np.float64]:
    """The elements of `buffer`, exactly."""
    if dtype == "bfloat16":
        return (buffer.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return buffer.astype(np.float64)


def fill_ones(buffer: Buffer, dtype: str) -> None:
    """The input of a timed sample: ones. In-place sums grow from there; at infinity they stay, at the same speed."""
    buffer.fill(encode(np.ones(1), dtype)[0])


def pattern(rank: int, dtype: str) -> Buffer:
    """One period of the data on which `rank` is checked: uniform in [-1, 1), the same in every process."""
    return encode(np.random.default_rng(rank).uniform(-1, 1, PERIOD), dtype)


def load_pattern(buffer: Buffer, rank: int, dtype: str) -> None:
    """Fills `buffer` with the period of `rank`, again and again."""
    period = pattern(rank, dtype)
    for start in range(0, buffer.size, PERIOD):
        part = buffer[start : start + PERIOD]
        part[:] = period[: part.size]


def expected(world_size: int, dtype: str) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
    """One period of the sum of all ranks' patterns, and of the sum of their absolute values.

    The sum is taken in float64 (for float64: in the platform's long double).
    """
    inputs = [decode(pattern(rank, dtype), dtype) for rank in range(world_size)]
    exact = np.sum(np.array(inputs, np.longdouble), axis=0)
    return exact if dtype == "float64" else exact.astype(np.float64), np.sum(np.abs(inputs), axis=0)


def sum_error(buffer: Buffer, world_size: int, dtype: str) -> float:
    """The largest |result - exact| / sum over ranks of |x|, where `buffer` should hold the sum of all patterns."""
    exact, scale = expected(world_size, dtype)
    worst = 0.0
    for start in range(0, buffer.size, PERIOD):
        got = decode(buffer[start : start + PERIOD], dtype)
        error = np.max(np.abs(got - exact[: got.size]) / scale[: got.size])
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def tolerance(world_size: int, dtype: str) -> float:
    """The largest `sum_error` that roundings alone explain: one for each addition, one for the result."""
    return world_size * EPSILON[dtype]
