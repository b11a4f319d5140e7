"""Labelled texts for the reference trainer: files of lines `text<TAB>label`, or lines of Python by what they are.

A token is a byte, as in corpus.py. Of each class one line in VALIDATION_EVERY is kept for validation, counted within
the class in the order of the lines: both parts have the classes in the same shares, whatever the order, and no class is
asked for that was not learned. A class of fewer lines is learned and never asked for.
"""

import hashlib
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pycoll.data.text import VALIDATION_EVERY, DataError, read_files, standard_library

PADDING = 0
LINES_OF_EACH = 8_000
"""Lines of a class of the default texts, at most: what is found within one or two seconds."""
SHORTEST = 10
"""Characters of a default text, at least: shorter ones ("else:", "Note:") are too often of several classes."""
_LAYOUT = {tokenize.ENCODING, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_QUOTED = re.compile(r"""\w*("{3}|'{3}|"|')(.*)\1""", re.DOTALL)


@dataclass(frozen=True)
class Examples:
    """n texts as tokens, and their labels."""

    tokens: Tensor
    """All texts one after another, then one PADDING: uint8."""
    offsets: Tensor
    """(n + 1,) int64: text i is tokens[offsets[i] : offsets[i + 1]]."""
    labels: Tensor
    """(n,) int64: places in Labelled.classes."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The texts at `indices`, (B,) int64 from 0 to n - 1: tokens (B, T), lengths (B,), labels (B,), all int64.

        T is the length of the longest of them, and at least 1: there may be none, or empty ones.
        """
        starts = self.offsets[indices]  # (B,)
        lengths = self.offsets[indices + 1] - starts
        positions = torch.arange(max([1, *lengths.tolist()]))  # (T,)
        inside = positions < lengths.unsqueeze(1)  # (B, T)
        tokens = self.tokens[torch.where(inside, starts.unsqueeze(1) + positions, -1)]
        return tokens.long(), lengths, self.labels[indices]


@dataclass(frozen=True)
class Labelled:
    """Texts of `classes`, sorted by name; `digest` tells whether two runs saw the same texts and labels."""

    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    digest: str

    def guessing_accuracy(self) -> float:
        """Share of validation that is right when the class commonest in train is always guessed."""
        commonest = self.train.labels.bincount().argmax()
        return float((self.validation.labels == commonest).double().mean())


def load_labelled(path: Path | None, context: int) -> Labelled:
    """Reads the file at `path`, or the *.tsv files of that folder, or by default lines of Python's standard library.

    Each line is `text<TAB>label` in UTF-8: the last tab divides, blanks around a label do not count. Texts are cut to
    `context` bytes. The default asks whether a line of source is code, a comment or of a docstring: without its
    indentation, hashes and quotes, each line once, as many of each class. Raises DataError naming the file and the line
    where one has no tab or no label, and where there are fewer than two classes or nothing for validation.
    """
    lines = _library_lines() if path is None else _read_lines(path)
    name = "lines of the Python standard library" if path is None else str(path)
    classes = tuple(sorted({label for _, label in lines}))
    if len(classes) < 2:
        held = f"the label {classes[0]!r} alone" if classes else "no labelled text"
        raise DataError(f"{name} holds {held}: give --data a file of lines 'text<TAB>label', or a folder of *.tsv")
    learned: list[tuple[bytes, str]] = []
    kept: list[tuple[bytes, str]] = []
    seen = Counter[str]()
    for text, label in lines:
        seen[label] += 1
        (learned if seen[label] % VALIDATION_EVERY else kept).append((text, label))
    if not kept:
        raise DataError(f"{name} leaves nothing for validation: give --data {VALIDATION_EVERY} lines of some class")
    digest = hashlib.sha256(b"\n".join(text + b"\t" + label.encode() for text, label in lines)).hexdigest()
    train, validation = (_examples(part, classes, context) for part in (learned, kept))
    return Labelled(name, classes, train, validation, digest)


def _read_lines(path: Path) -> list[tuple[bytes, str]]:
    lines = []
    for file, content in read_files(path, "*.tsv"):
        for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
            text, tab, last = line.rpartition(b"\t")
            if not tab:
                raise DataError(f"{file}, line {number} has no tab: give --data lines 'text<TAB>label'")
            label = last.decode().strip()
            if not label:
                raise DataError(f"{file}, line {number} has no label after its last tab: give it one")
            lines.append((text, label))
    return lines


def _examples(lines: Sequence[tuple[bytes, str]], classes: Sequence[str], context: int) -> Examples:
    texts = [text[:context] for text, _ in lines]
    place = {name: i for i, name in enumerate(classes)}
    return Examples(
        torch.frombuffer(bytearray(b"".join([*texts, bytes([PADDING])])), dtype=torch.uint8),
        torch.tensor([0, *accumulate(map(len, texts))]),
        torch.tensor([place[label] for _, label in lines], dtype=torch.int64),
    )


def _library_lines() -> list[tuple[bytes, str]]:
    """Of files in an order that mixes the subjects, until there is enough of every class."""
    found: dict[str, dict[str, None]] = {"code": {}, "comment": {}, "docstring": {}}
    files = standard_library()
    for i in np.random.default_rng(0).permutation(len(files)):
        if min(map(len, found.values())) >= LINES_OF_EACH:
            break
        with suppress(SyntaxError, tokenize.TokenError):  # a template, or of another Python
            for label, line in _lines_of(files[i]):
                text = line.strip()
                fits = len(text) >= SHORTEST and any(map(str.isalpha, text))
                if fits and not any(text in others for others in found.values()):
                    found[label][text] = None
    count = min(LINES_OF_EACH, *map(len, found.values()))
    chosen = [[(text.encode(), label) for text in _spread(list(texts), count)] for label, texts in found.items()]
    return [line for lines in zip(*chosen, strict=True) for line in lines]


def _spread(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i * len(texts) // count] for i in range(count)]


def _lines_of(source: bytes) -> Iterator[tuple[str, str]]:
    """Label and text of each line, or part of a line, of a Python file."""
    rows = source.decode("utf-8-sig").split("\n")
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield "comment", token.string.lstrip("#")
        elif token.type == tokenize.NEWLINE:
            if [part.type for part in statement] == [tokenize.STRING]:
                yield from (("docstring", line) for line in _QUOTED.sub(r"\2", statement[0].string).split("\n"))
            else:
                yield from (("code", rows[row - 1][columns]) for row, columns in _columns(statement).items())
            statement = []
        elif token.type not in _LAYOUT:
            statement.append(token)


def _columns(statement: Sequence[tokenize.TokenInfo]) -> dict[int, slice]:
    """Where the code is in each row of a statement, without comments; rows of strings of several rows are left out."""
    columns: dict[int, slice] = {}
    strings: set[int] = set()
    for token in statement:
        (row, begin), (last, end) = token.start, token.end
        if row < last:
            strings.update(range(row, last + 1))
        columns[row] = slice(columns[row].start if row in columns else begin, end)
    return {row: place for row, place in columns.items() if row not in strings}
