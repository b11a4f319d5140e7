"""pycoll.models.GPT on several ranks, by replacing its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.errors import UsageError
from pycoll.models.gpt import GPT, Block, Head
from pycoll.tensor_parallel.functions import enter, ranks_of, split
from pycoll.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    VocabParallelEmbedding,
)
from pycoll.tensor_parallel.random import DifferentDraws
from pycoll.tensor_parallel.state import is_split


def parallelize_gpt(model: GPT, group: dist.ProcessGroup | None = None, *, sequence_parallel: bool = False) -> GPT:
    """Keeps this rank's part of `model`, in place: heads of attention, features of the MLP, tokens of the embedding.

    Afterwards `model(tokens)` scores the tokens of this rank's part of the vocabulary, rounded up:
    (B, T) -> (B, T, ceil(V / n)), for `vocab_parallel_cross_entropy(..., vocab_size=model.config.vocab_size)`; all
    ranks give the same tokens. Names of parameters stay as they were; `full_state_dict` has their whole values.

    Args:
        model: the same on all ranks.
        group: of the ranks; None: the default group.
        sequence_parallel: between the layers that are split, each rank has T / n tokens of each sequence, T of which
            must divide: norms, dropout and the residual stream take 1 / n of the work and the memory.

    Returns:
        `model`.

    Raises:
        UsageError: it is split already; or n_head or 4 * d_model does not divide by the ranks.
    """
    n, _ = ranks_of(group)
    config = model.config
    if any(map(is_split, model.parameters())):
        raise UsageError("pycoll: the model is split already: give parallelize_gpt a whole one")
    for name, size in (("n_head", config.n_head), ("4 * d_model", 4 * config.d_model)):
        if size % n:
            raise UsageError(f"pycoll: {name} is {size}, which does not divide by {n} ranks: take fewer, or change it")
    column = partial(ColumnParallelLinear.from_linear, group=group, sequence_parallel=sequence_parallel)
    row = partial(RowParallelLinear.from_linear, group=group, sequence_parallel=sequence_parallel)
    norm = partial(SequenceParallelLayerNorm.from_layer_norm, group=group)
    draws = partial(DifferentDraws, group=group) if config.dropout else lambda module: module
    for block in cast("list[Block]", model.blocks):
        attention, mlp = block.attention, block.mlp
        _replace(attention, "qkv", partial(column, parts=3))
        _replace(attention, "project", row)
        _replace(mlp, "expand", column)
        _replace(mlp, "project", row)
        attention.n_head //= n
        _replace(attention, "attend", draws)
        if sequence_parallel:
            _replace(block, "attention_norm", norm)
            _replace(block, "mlp_norm", norm)
            _replace(attention, "residual_dropout", draws)
            _replace(mlp, "residual_dropout", draws)
    token = partial(VocabParallelEmbedding.from_embedding, group=group, sequence_parallel=sequence_parallel)
    _replace(model.embedding, "token", token)
    if sequence_parallel:
        _replace(model.embedding, "position", partial(_Positions, group=group))
        _replace(model.embedding, "dropout", draws)
        _replace(model.head, "norm", norm)
    _replace(model, "head", partial(_Head, group=group, sequence_parallel=sequence_parallel))
    return model


def _replace(parent: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> None:
    setattr(parent, name, make(getattr(parent, name)))


class _Positions(nn.Module):
    """Features of the positions that this rank has tokens of."""

    def __init__(self, whole: nn.Embedding, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.group = whole.weight, group

    def forward(self, positions: Tensor) -> Tensor:
        """(T,) int64 -> (T / n, D)."""
        # All are looked up, so that the gradients of all arrive: T rows travel, not as many as the context has.
        return split(F.embedding(positions, self.weight), self.group, dim=0)


class _Head(nn.Module):
    """This rank's part of the logits."""

    def __init__(self, whole: Head, group: dist.ProcessGroup | None, sequence_parallel: bool) -> None:
        super().__init__()
        self.norm, self.group, self.sequence_parallel = whole.norm, group, sequence_parallel

    def forward(self, x: Tensor, token_embedding: Tensor) -> Tensor:
        """(B, T, D), (rows, D) -> (B, T, rows); with sequence_parallel from (B, T / n, D)."""
        return F.linear(enter(self.norm(x), self.group, self.sequence_parallel), token_embedding)
