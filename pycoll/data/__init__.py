"""What models learn from: text as tokens, and how ranks share it out."""

from pycoll.data.corpus import (
    Corpus,
    Tokens,
    load_corpus,
    spread_windows,
    windows_at,
)
from pycoll.data.labelled import Examples, Labelled, load_labelled
from pycoll.data.sampler import EpochSampler, WindowSampler, share
from pycoll.data.shards import TokenShards, open_corpus, prepare, tokenize, write_corpus
from pycoll.data.text import DOCUMENT_START, VALIDATION_EVERY, DataError, Text, read_text
from pycoll.data.tokenizer import (
    VOCAB_SIZE,
    BPETokenizer,
    BPETraining,
    ByteTokenizer,
    Tokenizer,
    choose_tokenizer,
    printable,
)

__all__ = [
    "DOCUMENT_START",
    "VALIDATION_EVERY",
    "VOCAB_SIZE",
    "BPETokenizer",
    "BPETraining",
    "ByteTokenizer",
    "Corpus",
    "DataError",
    "EpochSampler",
    "Examples",
    "Labelled",
    "Text",
    "TokenShards",
    "Tokenizer",
    "Tokens",
    "WindowSampler",
    "choose_tokenizer",
    "load_corpus",
    "load_labelled",
    "open_corpus",
    "prepare",
    "printable",
    "read_text",
    "share",
    "spread_windows",
    "tokenize",
    "windows_at",
    "write_corpus",
]
