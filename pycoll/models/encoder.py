"""A Transformer encoder that classifies texts: every token gathers from all others, and their mean is scored.

Follows "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (Devlin et al., 2019), but
for the blocks, which are the GPT's own (pre-norm), and for what the classes are read from: the mean over the text's
tokens, not a first token. A first token has to learn to gather before it says anything, for which BERT has its
pre-training, while a mean passes gradients to every token from the first step on; and bytes leave no value of the
vocabulary for it. Letters in the shapes as in gpt.py, and C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycoll.models.gpt import GPTConfig, LayerNorm, Transformer
from pycoll.wide import wide


@dataclass(frozen=True)
class EncoderConfig(GPTConfig):
    """Shape of an Encoder: that of a GPT, and its classes. Raises ValueError where no such model exists.

    The defaults learn the default texts (pycoll.data.load_labelled) in about two minutes of one core.
    """

    context: int = 128
    """Tokens of one text, at most; longer ones are for the caller to cut."""
    n_layer: int = 2
    """Transformer blocks."""
    d_model: int = 64
    """Features of a token between blocks; a multiple of n_head."""
    n_classes: int = 2
    """Classes to tell apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_classes < 2:
            raise ValueError(f"n_classes is {self.n_classes}: give at least 2")


class MeanHead(nn.Module):
    """The features of a text's tokens become a score for each class."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.d_model)
        self.score = nn.Linear(config.d_model, config.n_classes)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D), (B, T) bool, false in the padding -> (B, C). A text of no tokens has the mean 0."""
        kept = wide(self.norm(x)).masked_fill(~valid.unsqueeze(-1), 0.0)  # a sum over tokens
        mean = kept.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        return self.score(mean.to(x.dtype))


class Encoder(Transformer):
    """The whole model; `model(tokens, lengths)` scores each class of each text."""

    def __init__(self, config: EncoderConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__(config, checkpoint_activations=checkpoint_activations)
        self.head = MeanHead(config)
        self._initialize()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) int64 padded with any tokens, T <= context; (B,) int64, tokens that count -> (B, C) scores (logits).

        B may be 0 and so may lengths: a text of no tokens gets the scores that say nothing of it, and a batch of no
        texts has gradients of zero, with which a rank takes part in a step for which it has no text.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        lengths = lengths.unsqueeze(1)
        # In an empty text all gather from the first of the padding, which the head leaves out: nothing rests on what
        # kernels make of a softmax over nothing.
        gathered = positions < lengths.clamp(min=1)  # (B, T)
        x = self._features(tokens, gathered[:, None, None, :])
        return self.head(x, positions < lengths)
