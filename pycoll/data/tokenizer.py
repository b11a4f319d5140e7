"""Text to token ids and back: bytes, or byte-level BPE as GPT-2's (Radford et al., 2019; Sennrich et al., 2016).

BPE is the `tokenizers` library's, in its file format (tokenizer.json), which Hugging Face's models share. It is needed
for BPE alone.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pycoll.data.text import DOCUMENT_START, DataError, Documents
from pycoll.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

VOCAB_SIZE = 256
"""Tokens where a token is a byte."""
DOCUMENT_START_NAME = "<|endoftext|>"
"""The token that begins each document, as GPT-2 calls it."""
PIECE_BYTES = 1 << 20
"""Longer documents are encoded piece by piece, which bounds memory and lets threads share them."""
BATCH_BYTES = 16 << 20
"""Text that is encoded at once, about."""
_CUT_WITHIN = 1 << 16
_BETWEEN_WORDS = re.compile(rb"[A-Za-z](?= [A-Za-z])")
"""Where a cut changes no token: a word's space belongs to the word that follows."""


class Tokenizer(ABC):
    """Documents to token ids and back; ids are at least 0 and less than `vocab_size`."""

    name: str
    """How the command line names it."""
    vocab_size: int
    document_start: int
    """The token that begins each document."""
    digest: str
    """Tells whether two tokenizers are the same."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of unsigned 8, 16 and 32 bits that holds all ids, little-endian."""
        return np.dtype(next(d for d in ("<u1", "<u2", "<u4") if self.vocab_size - 1 <= np.iinfo(d).max))

    def encode(self, documents: Iterable[bytes]) -> NDArray[Any]:
        """The tokens of UTF-8 documents one behind the other, each begun by `document_start`: (n,) of `dtype`."""
        return np.concatenate([np.empty(0, self.dtype), *self.encode_in_batches(documents)])

    @abstractmethod
    def encode_in_batches(self, documents: Iterable[bytes]) -> Iterator[NDArray[Any]]:
        """The same in arrays of some million tokens, for text that does not fit in memory."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """(n,) tokens to text; bytes that are not UTF-8 become U+FFFD. See `printable` for what a terminal may show."""


class ByteTokenizer(Tokenizer):
    """A token is a byte, and byte 0 begins a document."""

    name, vocab_size, document_start = "bytes", VOCAB_SIZE, DOCUMENT_START
    digest = "bytes"

    def encode_in_batches(self, documents: Iterable[bytes]) -> Iterator[NDArray[Any]]:
        """See Tokenizer; an array a document."""
        for document in documents:
            yield np.frombuffer(bytes([DOCUMENT_START]) + document, self.dtype)

    def decode(self, tokens: Tensor) -> str:
        """See Tokenizer; a document's start stays as the character that it is."""
        return bytes(tokens.tolist()).decode(errors="replace")


class BPETokenizer(Tokenizer):
    """A token is a byte or what was often seen together. Text that reads like the document's start is only text."""

    def __init__(self, library_tokenizer: "tokenizers.Tokenizer", name: str) -> None:
        """Raises DataError where there is no DOCUMENT_START_NAME among the tokens."""
        self.name, self._tokenizer = name, library_tokenizer
        self._tokenizer.encode_special_tokens = True  # as text: whoever wrote it in a document began none
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        start = self._tokenizer.token_to_id(DOCUMENT_START_NAME)
        if start is None:
            raise DataError(f"{name} has no token {DOCUMENT_START_NAME} to begin documents: give one of GPT-2's kind")
        self.document_start = start
        self.digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "BPETokenizer":
        """A tokenizer.json. Raises DataError where it is missing or damaged, UsageError without the library."""
        library = _library()
        try:
            return cls(library.Tokenizer.from_file(str(path)), str(path))
        except UsageError:
            raise
        except Exception as error:  # The library raises nothing more precise.
            raise DataError(f"{path} is no tokenizer ({error}): give the path of a tokenizer.json") from error

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json. Raises OSError."""
        path.write_text(self._tokenizer.to_str(), encoding="utf-8")

    def encode_in_batches(self, documents: Iterable[bytes]) -> Iterator[NDArray[Any]]:
        """See Tokenizer."""
        batch: list[tuple[bool, str]] = []  # whether a document begins, and a piece of it
        size = 0
        for document in documents:
            for i, piece in enumerate(_pieces(document)):
                batch.append((i == 0, piece))
                size += len(piece)
                if size >= BATCH_BYTES:
                    yield self._encode(batch)
                    batch, size = [], 0
        if batch:
            yield self._encode(batch)

    def decode(self, tokens: Tensor) -> str:
        """See Tokenizer; documents' starts are left out."""
        return self._tokenizer.decode(tokens.tolist())

    def _encode(self, batch: list[tuple[bool, str]]) -> NDArray[Any]:
        encoded = self._tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
        arrays = []
        for (begins, _), encoding in zip(batch, encoded, strict=True):
            ids = [self.document_start, *encoding.ids] if begins else encoding.ids
            arrays.append(np.array(ids, self.dtype))
        return np.concatenate(arrays)


@dataclass(frozen=True)
class BPETraining:
    """A BPE of `vocab_size` tokens that is still to be made from text: the 256 bytes, the start, and what is frequent.

    Raises UsageError for a smaller vocabulary than bytes and the start.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size <= VOCAB_SIZE:
            raise UsageError(f"--tokenizer {self.name}: give at least {VOCAB_SIZE + 1} tokens, the bytes and the start")

    @property
    def name(self) -> str:
        """How the command line names it."""
        return f"bpe:{self.vocab_size}"

    @property
    def digest(self) -> str:
        """Tells apart what the same text is made into."""
        return self.name

    def train(self, documents: Documents) -> BPETokenizer:
        """The same for the same documents, always. Little text may give fewer tokens than asked for.

        Raises UsageError without the library.
        """
        library = _library()
        level = library.pre_tokenizers.ByteLevel
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = level(add_prefix_space=False)  # with GPT-2's pattern
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[DOCUMENT_START_NAME],
            initial_alphabet=sorted(level.alphabet()),  # all bytes, also those that train lacks
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for document in documents for piece in _pieces(document)), trainer)
        return BPETokenizer(tokenizer, self.name)


def choose_tokenizer(choice: str) -> Tokenizer | BPETraining:
    """What --tokenizer names: "bytes", "bpe:4096" (to be made from the text to learn), or a path of a tokenizer.json.

    Raises UsageError, before any text is read, where the choice is none of them or needs what is not installed.
    """
    if choice == "bytes":
        return ByteTokenizer()
    if (size := re.fullmatch(r"bpe:(\d+)", choice)) is not None:
        training = BPETraining(int(size[1]))
        _library()
        return training
    if not Path(choice).is_file():
        raise UsageError(f'--tokenizer is {choice}: give "bytes", "bpe:4096" or the path of a tokenizer.json')
    return BPETokenizer.load(Path(choice))


def printable(text: str) -> str:
    """What a terminal may show of `text`: control characters but tab and newline go."""
    return "".join(character for character in text if character.isprintable() or character in "\t\n")


def _pieces(document: bytes) -> Iterator[str]:
    """The document as strings of at most PIECE_BYTES, cut between words; text without any is cut between characters."""
    start = 0
    while len(document) - start > PIECE_BYTES:
        end = start + PIECE_BYTES
        cuts = [match.end() for match in _BETWEEN_WORDS.finditer(document, max(start, end - _CUT_WITHIN), end)]
        if cuts:
            end = cuts[-1]
        while document[end] & 0xC0 == 0x80:  # amid a character
            end -= 1
        yield document[start:end].decode()
        start = end
    yield document[start:].decode()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            'a BPE needs the library tokenizers: pip install "pycoll[bpe]" (or tokenizers), or give --tokenizer bytes'
        ) from error
    return tokenizers
