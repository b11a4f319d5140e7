"""Tokens to train on and to validate with, cut into windows: from any tokenizer, in memory or in files.

Documents (files) follow one another, each begun by its tokenizer's document start, so that a model can be asked to
begin one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pycoll.data.text import DataError, read_text
from pycoll.data.tokenizer import ByteTokenizer, Tokenizer

_COUNTED_AT_ONCE = 1 << 22


class Tokens(Protocol):
    """Token ids that may be larger than memory: a (n,) tensor of integers is one, `TokenShards` another."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The tokens at `indices`, integers of any shape, in that shape. Raises IndexError beyond the end."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Text as tokens; `digest` tells whether two runs saw the same text through the same tokenizer."""

    name: str
    train: Tokens
    validation: Tokens
    digest: str
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    train_bytes_per_token: float = 1.0
    """Bytes of the text, a document's start counted as one, that a token of `train` stands for on average."""
    validation_bytes_per_token: float = 1.0
    """The same of `validation`: nats a token divided by it are nats a byte, which compare between tokenizers."""

    def unigram_cross_entropy(self) -> float:
        """Nats a byte that validation costs under the token frequencies of train: what counting tokens reaches.

        Frequencies start at one (Laplace), so that a token never seen in train has a finite cost.
        """
        train = _counts(self.train, self.tokenizer.vocab_size).double() + 1
        validation = _counts(self.validation, self.tokenizer.vocab_size).double()
        nats = float(-(validation / validation.sum() * (train / train.sum()).log()).sum())
        return nats / self.validation_bytes_per_token

    def require_windows(self, context: int) -> None:
        """Raises DataError where train or validation is shorter than one window of `context` tokens."""
        unit = "bytes" if isinstance(self.tokenizer, ByteTokenizer) else "tokens"
        for part, tokens in (("train", self.train), ("validation", self.validation)):
            if len(tokens) < context + 1:
                raise DataError(
                    f"{self.name} leaves {len(tokens)} {unit} for {part}, fewer than one window of {context + 1}:"
                    " give --data more text, or shorten the window with --model.context"
                )


def load_corpus(path: Path | None, context: int) -> Corpus:
    """The text at `path`, or the default one (`read_text`), as bytes in memory: (n,) uint8 tensors.

    Raises DataError where there is no UTF-8 text, or less of it than one window of `context` tokens in train and in
    validation. `prepare` is for other tokenizers, and for more text than fits in memory.
    """
    text = read_text(path)
    train, validation = (
        torch.frombuffer(bytearray(b"".join(part.begun())), dtype=torch.uint8) for part in (text.train, text.validation)
    )
    corpus = Corpus(text.name, train, validation, text.digest)
    corpus.require_windows(context)
    return corpus


def spread_windows(tokens: Tokens, context: int, count: int) -> Tensor:
    """Starts of at most `count` windows, evenly spread and without overlap: (n,) int64."""
    count = min(count, (len(tokens) - 1) // context)
    return torch.arange(count) * (len(tokens) - 1 - context) // max(1, count - 1)


def windows_at(tokens: Tokens, context: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the windows at `starts`, and targets, one token further: two int64 of (*starts.shape, context).

    Behind the last token comes the first: a window that begins near the end goes on with the first document.
    """
    window = tokens[(starts.unsqueeze(-1) + torch.arange(context + 1)) % len(tokens)].long()
    return window[..., :-1], window[..., 1:]


def _counts(tokens: Tokens, vocab_size: int) -> Tensor:
    """How often each token occurs: (vocab_size,) int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for first in range(0, len(tokens), _COUNTED_AT_ONCE):
        indices = torch.arange(first, min(first + _COUNTED_AT_ONCE, len(tokens)))
        counts += torch.bincount(tokens[indices].long(), minlength=vocab_size)
    return counts
