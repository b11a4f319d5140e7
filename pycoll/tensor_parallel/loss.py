"""The cross-entropy of logits that are divided by the vocabulary (Shoeybi et al., 2019, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycoll.errors import UsageError
from pycoll.tensor_parallel.functions import ranks_of, stacked
from pycoll.tensor_parallel.layers import local_places, require_tokens
from pycoll.wide import wide


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What F.cross_entropy(reduction="none") says of all ranks' logits together, on every rank. A collective call.

    The ranks tell one another two numbers for each token, in one call: the logarithm of the sum of their exponentials,
    and the target's logit on the rank that has it.

    Args:
        logits: (..., columns) of this rank: tokens rank * columns to (rank + 1) * columns of the vocabulary.
        targets: (...) int64, the same on all ranks.
        group: of the ranks; None: the default group.
        vocab_size: of the vocabulary where the last columns are padding, which counts for nothing; None: all columns.
        ignore_index: the target of tokens that have no loss.

    Returns:
        (...) losses in nats, in fp32 (float64 of float64 logits); 0 for tokens that are ignored.

    Raises:
        UsageError: the shapes do not fit one another; or a target is none of the vocabulary (on the CPU).
    """
    n, _ = ranks_of(group)
    columns = logits.shape[-1]
    size = n * columns if vocab_size is None else vocab_size
    if logits.shape[:-1] != targets.shape:
        raise UsageError(f"pycoll: targets are {tuple(targets.shape)}, logits {tuple(logits.shape)}: give one a token")
    if not 0 < size <= n * columns:
        raise UsageError(f"pycoll: {n} ranks with logits of {columns} tokens have no vocabulary of {size}")
    counts = targets != ignore_index
    require_tokens(targets.masked_fill(~counts, 0), size)
    return _CrossEntropy.apply(logits, targets, counts, group, size)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came: in 16 bits a third of what they and their fp32 softmax would take."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, counts: Tensor, group: dist.ProcessGroup | None, size: int
    ) -> Tensor:
        columns = logits.shape[-1]
        places, here = local_places(targets, columns, group)
        ctx.real = min(max(size - ranks_of(group)[1] * columns, 0), columns)
        scores = wide(logits)
        chosen = scores.gather(-1, places.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
        parts = stacked(torch.stack((scores[..., : ctx.real].logsumexp(-1), chosen)), group)  # (n, 2, ...)
        total = parts[:, 0].logsumexp(0)
        ctx.save_for_backward(logits, total, places, here, counts)
        return (total - parts[:, 1].sum(0)).masked_fill(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, total, places, here, counts = ctx.saved_tensors
        share = (wide(logits) - total.unsqueeze(-1)).exp_()
        share[..., ctx.real :] = 0
        share.scatter_add_(-1, places.unsqueeze(-1), -here.to(share.dtype).unsqueeze(-1))
        share.mul_(grad.masked_fill(~counts, 0).unsqueeze(-1))
        return share.to(logits.dtype), None, None, None, None
