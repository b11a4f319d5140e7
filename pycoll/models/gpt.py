"""A decoder-only Transformer: pre-norm blocks, causal attention, GPT-2 initialisation and weight tying.

Follows "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019). Each part is a module of its own
with whole tensors going in and out, so that a part can be split over ranks, or a run of blocks moved to another rank,
without touching the others. Letters in the shapes: B sequences, T tokens of one sequence, D = d_model, H heads of D / H
features each, V tokens of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Embedding(nn.Module):
    """Tokens and their positions become features."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.context, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        return self.dropout(self.token(tokens) + self.position(positions))


class Attention(nn.Module):
    """Each token gathers features from itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.project = nn.Linear(config.d_model, config.d_model)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D / H)
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
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """Features become a score for each token of the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, token_embedding: Tensor) -> Tensor:
        """(B, T, D), (V, D) -> (B, T, V). The matrix is the embedding's own (weight tying), hence an argument."""
        return F.linear(self.norm(x), token_embedding)


class GPT(nn.Module):
    """The whole model; `model(tokens)` scores each possible next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = Head(config)
        self._initialize()

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

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64, T <= context -> (B, T, V) scores (logits) of the token that follows each position."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the model's context of {self.config.context}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.embedding.token.weight)

    def n_parameters(self) -> int:
        """Number of trained values, the tied matrix counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        """
        was_training = self.training
        self.eval()
        tokens = prompt
        for _ in range(n_tokens):
            logits = self(tokens[:, -self.config.context :])[:, -1] / temperature  # (B, V)
            if top_k is not None:
                smallest = logits.topk(min(top_k, self.config.vocab_size)).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < smallest, -math.inf)
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat((tokens, following), dim=1)
        self.train(was_training)
        return tokens
