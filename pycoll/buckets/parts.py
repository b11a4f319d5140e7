"""One model on several ranks: each has a part of it (tensor or pipeline parallel), and buckets for its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycoll.buckets.bucket import Bucket
from pycoll.communicator import Communicator


@dataclass(frozen=True)
class ModelParts:
    """The ranks that hold the parts of one model."""

    communicator: Communicator
    """Theirs. The ranks that average the same part's gradients are another communicator's, the buckets'."""
    copies: Callable[[Tensor], int]
    """On how many of these ranks there is a copy of a parameter: in the norm of the whole gradient it counts once."""

    def copies_of(self, buckets: Sequence[Bucket]) -> Tensor:
        """Of each bucket's parameters, shape (buckets,), fp64, where they lie."""
        numbers = [self.copies(bucket.params[0]) for bucket in buckets]
        return torch.tensor(numbers, dtype=torch.float64, device=buckets[0].params[0].device)

    def add_up(self, squares: Tensor, copies: Tensor) -> None:
        """Sums of squares of this rank's buckets become the whole model's: their sum, then zeros. A collective call.

        Args:
            squares: shape (buckets,), fp64. All ranks are left with the same bits.
            copies: `copies_of` the buckets.
        """
        total = (squares / copies).sum().reshape(1)
        self.communicator.all_reduce(total)
        squares.zero_()
        squares[:1] = total
