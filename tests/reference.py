"""What a collective should give: inputs of every dtype, the result in fp64 or integers, and how far off it may be."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = FLOATS + INTEGERS
OPS = ("sum", "avg", "min", "max", "product")
ALGORITHMS = ("one_shot", "two_shot", "ring", "tree")


def inputs(world_size: int, shape: int | Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """One input a rank: normal floats, and integers of the whole range, so that sums wrap."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if dtype.is_floating_point:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(world_size)]
    info = torch.iinfo(dtype)
    return [torch.randint(info.min, info.max, shape, generator=generator, dtype=dtype) for _ in range(world_size)]


def reduced(tensors: Sequence[Tensor], op: str) -> Tensor:
    """The reduction of all ranks' tensors: in fp64 for floats; integers wrap, and averages of them truncate."""
    dtype = tensors[0].dtype
    stack = torch.stack(list(tensors))
    if dtype.is_floating_point:
        stack, dtype = stack.double(), torch.float64
    if op == "sum":
        return stack.sum(0, dtype=dtype)
    if op == "avg":
        total = stack.sum(0, dtype=dtype)
        return total / len(tensors) if dtype.is_floating_point else total.div(len(tensors), rounding_mode="trunc")
    if op == "product":
        return stack.prod(0, dtype=dtype)
    return stack.amin(0) if op == "min" else stack.amax(0)


def allowance(tensors: Sequence[Tensor], op: str) -> Tensor | float:
    """How far the result may be from `reduced`: half a unit in the last place, and the rounding of the accumulation."""
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or op in ("min", "max"):
        return 0.0
    world_size, result = len(tensors), reduced(tensors, op).abs()
    step = 2.0**-53 if dtype == torch.float64 else 2.0**-24  # of the accumulator
    steps = 2 * world_size if dtype == torch.float64 else world_size - 1  # the fp64 reference rounds as well
    if op == "product":
        accumulated = result * (steps * step * 1.01)
    else:
        accumulated = torch.stack(list(tensors)).double().abs().sum(0) * (steps * step)
        if op == "avg":
            accumulated = accumulated / world_size + result * step  # the division rounds too
    return accumulated + half_ulp(result, dtype)


def half_ulp(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype` at `result` (fp64), subnormal numbers included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(result.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(result, info.eps / 2), exponent)


def check(result: Tensor, tensors: Sequence[Tensor], op: str, what: object) -> None:
    """Asserts that `result` is the reduction of `tensors`."""
    expected = reduced(tensors, op)
    assert result.dtype == tensors[0].dtype and result.shape == expected.shape, what
    if not result.dtype.is_floating_point:
        assert torch.equal(result, expected), what
        return
    error = (result.double() - expected).abs()
    assert bool((error <= allowance(tensors, op)).all()), f"{what}: off by up to {error.max()}"


def bits(tensor: Tensor) -> bytes:
    """The memory of a tensor, for comparing bit by bit (a NaN equals itself, zeros of different sign differ)."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
