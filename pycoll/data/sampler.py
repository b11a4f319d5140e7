"""Which items come when: each once an epoch, in an order of the epoch's own, however many ranks share them.

The state of a sampler is a number, `position`: the items that all ranks have seen since the beginning, over all epochs.
Who goes on from it at another world size or batch size gets exactly the items that this epoch has left.

    items = sampler.take(position, world * batch)      # the same on all ranks: those of this step
    mine = share(items, rank, world)                   # some ranks have one fewer, or none, where an epoch ends
    position += len(items)
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycoll.errors import UsageError


class EpochSampler:
    """A permutation of `n` items each epoch, which follows from `seed` and the epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        """Raises UsageError where there are no items, or the seed is negative."""
        if n < 1 or seed < 0:
            raise UsageError(f"a sampler of {n} items with seed {seed}: give at least 1 item, and a seed of at least 0")
        self.n, self.seed = n, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)  # the last permutation asked for

    def epoch(self, position: int) -> int:
        """The epoch, from 0, of the item at `position`."""
        return position // self.n

    def take(self, position: int, count: int) -> Tensor:
        """The items from `position` on: (k,) int64, k = `count`, or as many as the epoch has left.

        Raises UsageError for a negative position or fewer than one item.
        """
        if position < 0 or count < 1:
            raise UsageError(f"{count} items from position {position}: give at least 1, from 0 or later")
        first = position % self.n
        return torch.from_numpy(self._permutation(self.epoch(position))[first : first + count].copy())

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return self._order


class WindowSampler(EpochSampler):
    """Windows of `context` tokens and the token after them; `take` returns their starts, for `windows_at`.

    The text is a ring of `n_tokens`, its first token behind its last. In each epoch it is cut anew, from a token that
    follows from `seed` and the epoch, into `n = n_tokens // context` windows that lie end to end: each token is read
    once and predicted once, but for the n_tokens % context that are left before the cut. Those are others in the next
    epoch, and so are the words that a window begins with.
    """

    def __init__(self, n_tokens: int, context: int, seed: int) -> None:
        """Raises UsageError where there are fewer tokens than one window has, or the seed is negative."""
        if n_tokens <= context:
            raise UsageError(f"{n_tokens} tokens are fewer than one window of {context + 1}: give more text")
        super().__init__(n_tokens // context, seed)
        self.n_tokens, self.context = n_tokens, context

    def take(self, position: int, count: int) -> Tensor:
        """Starts of windows, (k,) int64 less than n_tokens, as EpochSampler.take."""
        cut = int(np.random.default_rng((self.seed, self.epoch(position), 1)).integers(self.n_tokens))
        return (cut + super().take(position, count) * self.context) % self.n_tokens


def share(items: Tensor, rank: int, world: int) -> Tensor:
    """Of (n, ...) items of all ranks those of `rank`: a run of n / world, and one more on the first n % world ranks.

    The runs follow one another in the order of the ranks. A loss that each rank adds up over its items and divides by
    n / world is, averaged over the ranks, the mean over all n, also where they have different numbers of them.
    """
    return items.tensor_split(world)[rank]
