"""Layers whose weights are divided by the ranks of a group.

Two linear layers make a pair: a column-parallel one, whose output each rank has a part of, and a row-parallel one,
which reads that part and adds all ranks' results up. So a pair costs one collective forward and one backward, and what
lies between (a nonlinearity, attention by heads) needs none.

With `sequence_parallel`, what the pair reads and returns is divided too: each rank has T / n tokens of each sequence,
(B, T / n, D), or (T / n, D) without a batch. The column-parallel layer gathers them, the row-parallel one scatters
what it adds up. Parameters that are used on those tokens alone have but a part of their gradient on each rank: they
pass through `copy`, as here those of norms and row-parallel biases do, so that it is complete.

Initial weights are those of torch's layers, drawn whole on all ranks: with one seed, the values of a model on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.errors import UnsupportedError, UsageError
from pycoll.tensor_parallel.functions import copy, copy_together, enter, gather, leave, ranks_of
from pycoll.tensor_parallel.state import Split, split_parameter
from pycoll.wide import wide


class ColumnParallelLinear(nn.Module):
    """A linear layer of which each rank computes out_features / n outputs.

    Attributes:
        weight: (out_features / n, in_features).
        bias: (out_features / n,), or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
        parts: int = 1,
        gather_output: bool = False,
        sequence_parallel: bool = False,
    ) -> None:
        """
        Args:
            in_features, out_features, bias: of the whole layer, as torch.nn.Linear's.
            group: of the ranks; None: the default group.
            parts: how many layers are fused into this one, each of which is divided: 3 where the outputs are queries,
                keys and values, (3, H, D / H), so that a rank gets heads of all three.
            gather_output: every rank returns all outputs.
            sequence_parallel: every rank reads T / n tokens.

        Raises:
            UsageError: out_features does not divide by parts and ranks.
        """
        super().__init__()
        self.group, self.parts = group, parts
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel
        self._take(nn.Linear(in_features, out_features, bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> ColumnParallelLinear:
        """This rank's part of `linear`; settings are the keyword arguments of the class."""
        with torch.device("meta"):  # weights that nobody draws
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **settings)
        layer._take(linear)
        return layer

    def _take(self, linear: nn.Linear) -> None:
        split = Split(0, linear.out_features, self.group, self.parts)
        self.weight = split_parameter(linear.weight, split)
        self.register_parameter("bias", None if linear.bias is None else split_parameter(linear.bias, split))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, in_features) -> (..., T, out_features / n); with sequence_parallel (..., T / n, in_features)."""
        y = F.linear(enter(x, self.group, self.sequence_parallel), self.weight, self.bias)
        if not self.gather_output:
            return y
        return gather(y.unflatten(-1, (self.parts, -1)), self.group).flatten(-2)


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank reads in_features / n inputs, as column-parallel layers leave them.

    Attributes:
        weight: (out_features, in_features / n).
        bias: (out_features,), the same on all ranks and added once; or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        """
        Args:
            in_features, out_features, bias: of the whole layer, as torch.nn.Linear's.
            group: of the ranks; None: the default group.
            sequence_parallel: every rank returns T / n tokens.

        Raises:
            UsageError: in_features does not divide by the ranks.
        """
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        self._take(nn.Linear(in_features, out_features, bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> RowParallelLinear:
        """This rank's part of `linear`, with its bias; settings are the keyword arguments of the class."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **settings)
        layer._take(linear)
        return layer

    def _take(self, linear: nn.Linear) -> None:
        self.weight = split_parameter(linear.weight, Split(1, linear.in_features, self.group))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, in_features / n) -> (..., T, out_features); with sequence_parallel (..., T / n, out_features)."""
        y = leave(F.linear(x, self.weight), self.group, self.sequence_parallel)
        if self.bias is None:
            return y
        bias = copy(self.bias, self.group) if self.sequence_parallel else self.bias
        return y + bias.to(y.dtype)  # another one under autocast


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has the rows of num_embeddings / n tokens, rounded up; the last ranks have rows
    of zeros where it does not divide. Gradients of a 16-bit row that is used often are added in fp32.

    Attributes:
        weight: (rows, embedding_dim). As a matrix of scores, it makes this rank's part of the logits.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        """
        Args:
            num_embeddings, embedding_dim: of the whole embedding, as torch.nn.Embedding's.
            group: of the ranks; None: the default group.
            sequence_parallel: every rank returns T / n tokens.
        """
        super().__init__()
        self.num_embeddings, self.group, self.sequence_parallel = num_embeddings, group, sequence_parallel
        self._take(nn.Embedding(num_embeddings, embedding_dim))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **settings: Any) -> VocabParallelEmbedding:
        """This rank's part of `embedding`; settings are the keyword arguments of the class.

        Raises:
            UnsupportedError: it has a padding_idx, max_norm, scale_grad_by_freq or sparse gradients.
        """
        for name in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"):
            value = getattr(embedding, name)
            if value is not None and value is not False:
                raise UnsupportedError(f"pycoll: an embedding with {name} is not split: make one without")
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, **settings)
        layer._take(embedding)
        return layer

    def _take(self, embedding: nn.Embedding) -> None:
        self.weight = split_parameter(embedding.weight, Split(0, self.num_embeddings, self.group, pads=True))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., T) int64 -> (..., T, embedding_dim); with sequence_parallel (..., T / n, embedding_dim).

        Raises:
            UsageError: a token is none of the vocabulary (on the CPU; a GPU would have to be waited for).
        """
        require_tokens(tokens, self.num_embeddings)
        places, here = local_places(tokens, len(self.weight), self.group)
        rows = F.embedding(places, wide(self.weight)).to(self.weight.dtype)
        return leave(rows.masked_fill(~here.unsqueeze(-1), 0), self.group, self.sequence_parallel)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm of the tokens that this rank has; the gradients of its weights are those of all tokens.

    Computed in fp32 where its weights, and what it reads and returns, have 16 bits.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """As torch.nn.LayerNorm, on the ranks of `group`; None: the default group."""
        super().__init__(normalized_shape, eps, elementwise_affine, bias)
        self.group = group

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm, group: dist.ProcessGroup | None = None) -> SequenceParallelLayerNorm:
        """One with the parameters of `norm`."""
        layer = cls(norm.normalized_shape, norm.eps, norm.elementwise_affine, norm.bias is not None, group=group)
        for name, param in norm.named_parameters(recurse=False):
            setattr(layer, name, param)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., T / n, D) -> (..., T / n, D)."""
        copies = copy_together([wide(param) for param in self.parameters()], self.group)
        weight, bias = (*copies, None, None)[:2]
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def require_tokens(tokens: Tensor, size: int) -> None:
    """Raises UsageError where the CPU sees a token that is not one of 0 to size - 1: no rank would have its row."""
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= size:
            raise UsageError(f"pycoll: tokens from {low} to {high} are not of a vocabulary of {size}")


def local_places(tokens: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Where tokens are among this rank's `rows` (0 for others'), and whether they are there."""
    places = tokens - ranks_of(group)[1] * rows
    here = (places >= 0) & (places < rows)
    return places.masked_fill(~here, 0), here
