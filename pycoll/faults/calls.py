"""One call of a script: its sizes and kinds, and which part of whose input ends up where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

NEVER = 1 << 30
AT_THE_END = NEVER - 1
"""Instead of the index before which a call is waited for."""
REDUCED = -1
"""As the source of a piece: the reduction over all ranks."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A collective, the same on all ranks of its group; or a message from one to another.

    Attributes:
        group: as the script numbers it.
        index: of the call in its thread.
        count: elements of a rank's block, or of the tensor where there are no blocks; 0 is a size too.
        root: the rank of the group that is, or that sends.
        peer, tag, any_source: of a message: who receives it, and whether it asks from whom.
        in_place: the output is the input, or the rank's block of it, or the other way round.
        symmetric: the tensors lie in memory that peers map.
        strided: the tensors are not dense.
        listed: blocks are tensors of their own.
        uneven: blocks differ in size.
        wait: None: the call blocks; else the index before which the thread waits for it, or NEVER.
    """

    group: int
    operation: str
    index: int
    count: int
    dtype: str
    op: str
    algorithm: str
    root: int
    peer: int
    tag: int
    any_source: bool
    in_place: bool
    symmetric: bool
    strided: bool
    listed: bool
    uneven: bool
    wait: int | None

    @property
    def reduces(self) -> bool:
        """Whether it combines elements."""
        return bool(self.op)

    def takes_part(self, rank: int) -> bool:
        """Whether a rank of the group makes this call."""
        return self.peer < 0 or rank in (self.root, self.peer)

    def needs(self, rank: int, other: int) -> bool:
        """Whether the call cannot succeed on `rank` before `other` has begun it."""
        return self.peer < 0 or (rank == self.peer and other == self.root)

    def wait_of(self, rank: int) -> int | None:
        """`wait` of a rank of the group. Whoever leaves has received what is sent to it."""
        return AT_THE_END if self.wait == NEVER and rank == self.peer else self.wait

    def __str__(self) -> str:
        what = [f"group {self.group}", f"{self.dtype}[{self.count}]", self.op, self.algorithm]
        what += [f"root {self.root}"] * (self.root >= 0)
        what += [f"to {self.peer}, tag {self.tag}"] * (self.peer >= 0)
        traits = ("any_source", "in_place", "symmetric", "strided", "listed", "uneven")
        what += [name for name in traits if getattr(self, name)]
        if self.wait is not None:
            what.append("not waited for" if self.wait == NEVER else f"waited for before {self.wait}")
        return f"{self.operation}({', '.join(filter(None, what))})"


class Piece(NamedTuple):
    """Consecutive elements of an output: `length` of the pattern of `source`, from its element `start` on."""

    source: int
    start: int
    length: int


class Plan(NamedTuple):
    """One rank's tensors: the lengths of the parts of its input, and the parts of its output.

    `input` is empty, `output` None where a rank has none; `fill` is false where what is in the input does not matter.
    """

    input: Sequence[int]
    output: Sequence[Piece] | None
    fill: bool = True
