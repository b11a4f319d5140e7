"""Text for the reference trainer: UTF-8 files as byte tokens, split into train and validation, cut into random windows.

A token is a byte. Documents (files) are joined by DOCUMENT_START bytes, so that a model can be asked to begin one.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pycoll.errors import UsageError

DOCUMENT_START = 0
VOCAB_SIZE = 256
VALIDATION_EVERY = 10
"""One document in this many is kept for validation, or this share of a single document."""
_NOT_DEFAULT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
"""Folders of the standard library left out: installed packages, tests with odd bytes, tables rather than prose."""


class DataError(UsageError):
    """The training text is missing, empty, too short or not UTF-8."""


@dataclass(frozen=True)
class Corpus:
    """Text as tokens: `train` and `validation` are (n,) uint8; `digest` tells whether two runs saw the same text."""

    name: str
    train: Tensor
    validation: Tensor
    digest: str

    def unigram_cross_entropy(self) -> float:
        """Nats a byte that validation costs under the byte frequencies of train: what counting bytes reaches.

        Frequencies start at one (Laplace), so that a byte never seen in train has a finite cost.
        """
        train = torch.bincount(self.train.int(), minlength=VOCAB_SIZE).double() + 1
        validation = torch.bincount(self.validation.int(), minlength=VOCAB_SIZE).double()
        return float(-(validation / validation.sum() * (train / train.sum()).log()).sum())


def load_corpus(path: Path | None, context: int) -> Corpus:
    """Reads the file or folder at `path`, or by default the source of the running Python's standard library.

    A folder is read with its sub-folders in the order of the paths, hidden entries (".git") left out, and split by
    file: one in VALIDATION_EVERY, or of fewer files the one that comes nearest to that share. A single file is split at
    a line. Raises DataError where there is no UTF-8 text, or less of it than one window
    of `context` tokens in train and in validation.
    """
    documents = _standard_library() if path is None else _read(path)
    name = "the Python standard library" if path is None else str(path)
    if not documents:
        raise DataError(f"{name} holds no text: give --data a UTF-8 file that is not empty, or a folder of them")
    if len(documents) == 1:
        documents = _cut(documents[0])
    kept = range(VALIDATION_EVERY - 1, len(documents), VALIDATION_EVERY) or (_nearest_share(documents),)
    train = _join([document for i, document in enumerate(documents) if i not in kept])
    validation = _join([documents[i] for i in kept])
    for part, text in (("train", train), ("validation", validation)):
        if len(text) < context + 1:
            raise DataError(
                f"{name} leaves {len(text)} bytes for {part}, fewer than one window of {context + 1}:"
                " give --data more text, or shorten the window with --model.context"
            )
    digest = hashlib.sha256(hashlib.sha256(train).digest() + validation).hexdigest()
    return Corpus(name, _tokens(train), _tokens(validation), digest)


def random_windows(tokens: Tensor, context: int, seed: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Starts of random windows that leave room for the token after them: int64 of `shape`.

    They depend on `seed` alone: every rank may draw the windows of all ranks and take its own, and a run that resumes
    draws again what it would have drawn.
    """
    return torch.from_numpy(np.random.default_rng(seed).integers(len(tokens) - context, size=shape))


def spread_windows(tokens: Tensor, context: int, count: int) -> Tensor:
    """Starts of at most `count` windows, evenly spread and without overlap: (n,) int64."""
    count = min(count, (len(tokens) - 1) // context)
    return torch.arange(count) * (len(tokens) - 1 - context) // max(1, count - 1)


def windows_at(tokens: Tensor, context: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the windows at `starts`, and targets, one token further: two int64 of (*starts.shape, context)."""
    window = tokens[starts.unsqueeze(-1) + torch.arange(context + 1)].long()
    return window[..., :-1], window[..., 1:]


def decode(tokens: Tensor) -> str:
    """(n,) tokens to text; bytes that are not UTF-8 become U+FFFD, and control characters but tab and newline go."""
    text = bytes(tokens.tolist()).decode(errors="replace")
    return "".join(character for character in text if character.isprintable() or character in "\t\n")


def _standard_library() -> list[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if not _NOT_DEFAULT_TEXT.intersection(path.relative_to(root).parts))
    return [text for path in sorted(paths) if (text := path.read_bytes()) and _undecodable_at(text) is None]


def _read(path: Path) -> list[bytes]:
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist: give --data a UTF-8 file or a folder of them")
        visible = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        paths = [path] if path.is_file() else sorted(p for p in visible if p.is_file())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    documents = []
    for file in paths:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        if (position := _undecodable_at(text)) is not None:
            raise DataError(
                f"{file} is not UTF-8 text (byte {position}): convert it (iconv -t UTF-8), or move it out of --data"
            )
        if text:
            documents.append(text)
    return documents


def _undecodable_at(text: bytes) -> int | None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _nearest_share(documents: Sequence[bytes]) -> int:
    wanted = sum(map(len, documents)) / VALIDATION_EVERY
    return min(range(len(documents)), key=lambda i: abs(len(documents[i]) - wanted))


def _cut(document: bytes) -> list[bytes]:
    """One document as two, cut at the end of the line at which the share for validation begins."""
    wanted = len(document) - len(document) // VALIDATION_EVERY
    cut = document.rfind(b"\n", 0, wanted) + 1 or wanted
    return [document[:cut], document[cut:]]


def _join(documents: Sequence[bytes]) -> bytes:
    return b"".join(bytes([DOCUMENT_START]) + document for document in documents)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
