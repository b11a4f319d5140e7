"""What the tensors of a call hold, and what they ought to hold afterwards.

Each rank's input repeats a pattern of small integers, which is random with the seed and the call. So the result of any
collective is made of repeated patterns too: to know it takes a thousand numbers, however large the message. A prime
period keeps blocks, slots and rounds, which are round numbers, from being exchanged unnoticed. All sums, products and
averages are exact in every type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pycoll.faults.calls import DTYPES, REDUCED, Call, Piece, Plan

PERIODS = (241, 251, 257, 509, 1021)
SPOILT = 77
Allocator = Callable[[int, torch.dtype], Tensor]


class WrongValueError(AssertionError):
    """A call returned without an error, and the numbers are wrong."""


class Patterns:
    """The patterns of one call: of every rank, and of their reduction."""

    def __init__(self, seed: int, thread: int, call: Call, size: int) -> None:
        key = (seed * 64 + thread) * 1024 + call.index
        generator = torch.Generator().manual_seed(key)
        dtype = DTYPES[call.dtype]
        low, high, scale = _limits(call, size)
        shape = (size, PERIODS[key % len(PERIODS)])
        numbers = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64) * scale
        if call.op == "product" and dtype != torch.bool:
            numbers[numbers == 0] = 1  # a zero would hide the others
        self._of_ranks = numbers.to(dtype)
        self._reduced = _reduce(numbers, call.op, size).to(dtype) if call.reduces else None

    def fill(self, tensors: Iterable[Tensor], rank: int) -> None:
        """Writes consecutive parts of the input of `rank`."""
        start = 0
        for x in tensors:
            x.copy_(_repeated(self._of_ranks[rank], start, x.numel()))
            start += x.numel()

    def check(self, x: Tensor, pieces: Sequence[Piece], what: str) -> None:
        """Raises WrongValueError unless `x` consists of `pieces`."""
        begins = accumulate((piece.length for piece in pieces), initial=0)
        for (source, start, length), begin in zip(pieces, begins, strict=False):
            pattern = self._of_ranks[source] if source != REDUCED else self._reduced
            assert pattern is not None, "only reductions are reduced"
            _check(x[begin : begin + length], pattern, start, f"{what}, from element {begin}")


def _limits(call: Call, size: int) -> tuple[int, int, int]:
    """The least and the largest number of an input, and what to multiply it by."""
    dtype = DTYPES[call.dtype]
    if dtype == torch.bool:
        return 0, 1, 1
    unsigned = dtype == torch.uint8
    if call.op in ("", "min", "max"):
        return (0 if unsigned else -100), 100, 1
    if call.op in ("band", "bor", "bxor"):
        return 0, 127, 1
    if call.op == "product":
        return (1 if unsigned else -1), 2, 1
    if call.op == "avg":  # of multiples, so that it is a whole number; and no sum of 8-bit numbers wraps
        return (0 if unsigned else -1), 1, size
    return (0 if unsigned else -4), 4, 1


def _reduce(numbers: Tensor, op: str, size: int) -> Tensor:
    if op in ("sum", "avg"):
        total = numbers.sum(0)
        return total // size if op == "avg" else total
    if op == "product":
        return numbers.prod(0)
    if op in ("min", "max"):
        return numbers.amin(0) if op == "min" else numbers.amax(0)
    combine = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}[op]
    result = numbers[0]
    for other in numbers[1:]:
        result = combine(result, other)
    return result


def _repeated(pattern: Tensor, start: int, length: int) -> Tensor:
    """`length` elements of the endless repetition of `pattern`, from element `start` on."""
    rolled = pattern.roll(-start)
    return rolled.repeat(-(-length // len(pattern)))[:length]


def _check(x: Tensor, pattern: Tensor, start: int, what: str) -> None:
    rolled, period, x = pattern.roll(-start), len(pattern), x.contiguous()
    periods = len(x) // period
    body, tail = x[: periods * period].view(periods, period), x[periods * period :]
    if torch.equal(body, rolled.expand(periods, period)) and torch.equal(tail, rolled[: len(tail)]):
        return
    expected = _repeated(pattern, start, len(x))
    wrong = (x != expected).nonzero().flatten()
    at = int(wrong[0])
    raise WrongValueError(
        f"{what}: {len(wrong)} of {len(x)} elements are wrong, the first is no. {at}: "
        f"{x[at].item()} instead of {expected[at].item()}"
    )


class Buffers:
    """The tensors of one call on one rank.

    Attributes:
        x, out: input and output; None where there is none. In place `out` is `x`, or one is a block of the other.
        xs, outs: their parts; tensors of their own where the call is `listed`.
        is_async: whether the call returns at once.
    """

    def __init__(self, call: Call, plan: Plan, patterns: Patterns, me: int, allocate: Allocator) -> None:
        self._patterns, self._plan = patterns, plan
        self._me, self._name = me, str(call)
        self.is_async = call.wait is not None
        self.input_lengths = list(plan.input)
        self.output_lengths = [piece.length for piece in plan.output or ()]
        inputs, outputs = sum(self.input_lengths), sum(self.output_lengths)

        def tensor(length: int) -> Tensor:
            x = allocate(length * (2 if call.strided else 1), DTYPES[call.dtype])
            return (x[::2] if call.strided else x).fill_(SPOILT)

        self._shared = call.in_place and bool(plan.input) and plan.output is not None
        whole = tensor(max(inputs, outputs)) if self._shared else None
        self.xs = self._parts(call, whole, self.input_lengths, inputs, tensor)
        self.outs = self._parts(call, whole, self.output_lengths, outputs, tensor)
        self.x: Any = self.xs[0] if self.xs else None  # callers know whether there is one
        self.out: Any = self.outs[0] if self.outs else None
        if plan.fill:
            patterns.fill(self.xs, me)

    def _parts(
        self, call: Call, whole: Tensor | None, lengths: Sequence[int], total: int, tensor: Callable[[int], Tensor]
    ) -> list[Tensor]:
        if not lengths:
            return []
        if call.listed:
            return [tensor(n) for n in lengths]
        if whole is None:
            return [tensor(total)]
        return [whole if len(whole) == total else whole.narrow(0, self._me * total, total)]

    def check(self) -> None:
        """Raises WrongValueError unless the output is right, and the input untouched where it is not the output."""
        pieces = self._plan.output or ()
        if len(self.outs) == len(pieces):
            for x, piece in zip(self.outs, pieces, strict=True):
                self._patterns.check(x, [piece], self._name)
        elif self.out is not None:
            self._patterns.check(self.out, pieces, self._name)
        if self._plan.fill and not self._shared:
            start = 0
            for x in self.xs:
                self._patterns.check(x, [Piece(self._me, start, len(x))], f"{self._name}, its input")
                start += len(x)

    def spoil(self) -> None:
        """Overwrites all of it, as a caller may at once when its call has ended, in success or in an error."""
        for x in (*self.xs, *self.outs):
            x.fill_(SPOILT)
