"""A decoder-only Transformer: pre-norm blocks, causal attention, GPT-2 initialisation and weight tying.

Follows "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019). Each part is a module of its own
with whole tensors going in and out, so that a part can be split over ranks, or a run of blocks moved to another rank,
without touching the others. Letters in the shapes: B sequences, T tokens of one sequence, D = d_model, H heads of D / H
features each, V tokens of the vocabulary.

In 16 bits (`model.to(torch.bfloat16)`) norms are computed in fp32, and so are the gradients of their weights and of the
embeddings, sums over all tokens that torch's kernels for the CPU would add in 16 bits. Scores stay in the model's
dtype: the loss is for the caller to compute in fp32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pycoll.errors import UsageError
from pycoll.wide import wide


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. Raises ValueError where no such model exists."""

    vocab_size: int = 256
    """Number of tokens; the trainer's tokens are bytes."""
    context: int = 256
    """Tokens of one sequence, at most."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads of a block."""
    d_model: int = 128
    """Features of a token between blocks; a multiple of n_head."""
    dropout: float = 0.0
    """Share of activations dropped in training."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "n_layer", "n_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.d_model % self.n_head:
            raise ValueError(f"d_model ({self.d_model}) is not a multiple of n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: give at least 0 and less than 1")


class LayerNorm(nn.LayerNorm):
    """Computed in fp32 where its weights, and what it reads and returns, have 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normalized = F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)
        return normalized.to(x.dtype)


class TokenEmbedding(nn.Embedding):
    """A row of features for each token; the gradients of a row that is used often are added in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        return F.embedding(tokens, wide(self.weight)).to(self.weight.dtype)


class Embedding(nn.Module):
    """Tokens and their positions become features."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = TokenEmbedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.context, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        return self.dropout(self.token(tokens) + self.position(positions))


class DotProductAttention(nn.Module):
    """What each token gathers, head by head; it has no weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, T, D / H) each -> (B, H, T, D / H). `mask`: bool, true where a token (row) gathers from another
        (column), of a shape that broadcasts to (B, H, T, T); without it attention is causal."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)


class Attention(nn.Module):
    """Each token gathers features from itself and the tokens before it, or from those that a mask names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.attend = DotProductAttention(config.dropout)
        self.project = nn.Linear(config.d_model, config.d_model)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). `mask`: as for DotProductAttention."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        y = self.attend(q, k, v, mask)  # (B, H, T, D / H)
        return self.residual_dropout(self.project(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two layers applied to each token alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, 4 * config.d_model)
        self.project = nn.Linear(4 * config.d_model, config.d_model)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.residual_dropout(self.project(F.gelu(self.expand(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy and adds its result to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). `mask`: as for DotProductAttention."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """Features become a score for each token of the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.d_model)

    def forward(self, x: Tensor, token_embedding: Tensor) -> Tensor:
        """(B, T, D), (V, D) -> (B, T, V). The matrix is the embedding's own (weight tying), hence an argument."""
        return F.linear(self.norm(x), token_embedding)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, mask: Tensor | None = None, *, again: bool) -> Tensor:
    """(B, T, D) through one after the other; with `again` a backward pass computes what is inside them once more."""
    again = again and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
    return x


class Transformer(nn.Module):
    """Embedding and blocks. A model adds its head, and then initialises the weights of all.


    With `checkpoint_activations`, which may be set at any time, a backward pass computes what is inside a block again
    instead of keeping it (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"): about a third more to
    compute, and the memory of (B, T, D) a block. Gradients are the same bits, also with dropout.
    """

    def __init__(self, config: GPTConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def _initialize(self) -> None:
        """GPT-2: normal weights of deviation 0.02, zero biases; smaller where a block adds to the residual stream,
        so that the stream's variance does not grow with the number of blocks."""
        for name, parameter in self.named_parameters():
            if name.endswith("project.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # The norms' weights stay at one.

    def _features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) int64, T <= context -> (B, T, D), not yet normalised. `mask`: as for DotProductAttention."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the model's context of {self.config.context}")
        return run_blocks(self.blocks, self.embedding(tokens), mask, again=self.checkpoint_activations)

    def n_parameters(self) -> int:
        """Number of trained values, a matrix with two uses counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


class GPT(Transformer):
    """The whole model; `model(tokens)` scores each possible next token."""

    def __init__(self, config: GPTConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__(config, checkpoint_activations=checkpoint_activations)
        self.head = Head(config)
        self._initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64, T <= context -> (B, T, V) scores (logits) of the token that follows each position."""
        return self.head(self._features(tokens), self.embedding.token.weight)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        n_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues (B, T >= 1) int64 by sampling: (B, T + n_tokens).

        `temperature` below 1 prefers likely tokens; `top_k` leaves only that many to choose from. Only the last
        `context` tokens are seen, and they are computed anew for each token.

        Raises UsageError where the model is split over ranks, each of which scores a part of the vocabulary alone.
        """
        if (rows := len(self.embedding.token.weight)) != self.config.vocab_size:
            raise UsageError(
                f"pycoll: this rank scores {rows} of {self.config.vocab_size} tokens: generate with a whole model, "
                "which loads tensor_parallel.full_state_dict of this one"
            )
        was_training = self.training
        self.eval()
        tokens = prompt
        for _ in range(n_tokens):
            logits = self(tokens[:, -self.config.context :])[:, -1].float() / temperature  # (B, V)
            if top_k is not None:
                smallest = logits.topk(min(top_k, self.config.vocab_size)).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < smallest, -math.inf)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat((tokens, following), dim=1)
        self.train(was_training)
        return tokens
