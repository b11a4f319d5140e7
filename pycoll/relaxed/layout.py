"""Where each parameter lies among the shards of `pycoll.ParameterServer`, and what its messages look like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycoll.errors import UnsupportedError


@dataclass(frozen=True)
class Piece:
    """What of a parameter lies in one shard: its elements from `begin` to `end`, at `first` of the shard."""

    place: int
    """Of the parameter, among all."""
    begin: int
    end: int
    first: int

    def of(self, shard: Tensor) -> Tensor:
        """Its part of a shard, shape (end - begin,)."""
        return shard[self.first : self.first + self.end - self.begin]

    def cut(self, values: Tensor) -> Tensor:
        """The same elements of a tensor of the parameter's size."""
        return values.reshape(-1)[self.begin : self.end]


class Layout:
    """Parameters side by side, in equal shards; what does not divide is filled up with zeros.

    A message is a header and a shard, in fp32: of the header, fp64 numbers, the first is 0 where it carries no gradient
    because the worker has ended; the others are the learning rates of the groups.

    Attributes:
        params: in their order.
        shard_size: elements of each shard.
    """

    def __init__(self, params: Sequence[Tensor], world_size: int, groups: int) -> None:
        self.params = list(params)
        self._firsts = [0]
        for param in params:
            self._firsts.append(self._firsts[-1] + param.numel())
        self.shard_size = math.ceil(self._firsts[-1] / world_size)
        self._header = 2 * (1 + groups)  # elements of fp32
        self._pieces = [list(self._pieces_of(rank)) for rank in range(world_size)]

    def pieces(self, rank: int) -> list[Piece]:
        """What lies in the shard of a rank."""
        return self._pieces[rank]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of all shards, (world_size, shard_size), in their shapes."""
        elements = flat.view(-1)
        return [
            elements[first : first + param.numel()].view(param.shape)
            for param, first in zip(self.params, self._firsts[:-1], strict=True)
        ]

    def new_message(self) -> Tensor:
        """Memory for one: that a worker has ended, until it is filled."""
        return torch.zeros(self._header + self.shard_size, dtype=torch.float32, device="cpu")

    def fill(self, messages: Sequence[Tensor], grads: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        """The messages to all servers: gradients of the parameters, and learning rates of the groups.

        Raises:
            UnsupportedError: a gradient is sparse.
        """
        if any(grad is not None and grad.layout != torch.strided for grad in grads):
            raise UnsupportedError("pycoll: a gradient is sparse: make it dense, for an embedding with sparse=False")
        header = torch.tensor([1.0, *rates], dtype=torch.float64)
        for message, pieces in zip(messages, self._pieces, strict=True):
            message[: self._header].view(torch.float64).copy_(header)
            for piece in pieces:
                grad = grads[piece.place]
                to = piece.of(self.gradient(message))
                to.zero_() if grad is None else to.copy_(piece.cut(grad))

    def is_end(self, message: Tensor) -> bool:
        """Whether the worker has ended."""
        return not bool(message[: self._header].view(torch.float64)[0])

    def rates(self, message: Tensor) -> list[float]:
        """Learning rates of the groups."""
        return message[: self._header].view(torch.float64)[1:].tolist()

    def gradient(self, message: Tensor) -> Tensor:
        """Of the shard, shape (shard_size,)."""
        return message[self._header :]

    def _pieces_of(self, rank: int) -> Iterator[Piece]:
        low, high = rank * self.shard_size, (rank + 1) * self.shard_size
        for place, param in enumerate(self.params):
            first = self._firsts[place]
            begin, end = max(first, low), min(first + param.numel(), high)
            if begin < end:
                yield Piece(place, begin - first, end - first, begin - low)
