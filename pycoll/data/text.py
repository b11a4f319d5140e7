"""Text to learn from: UTF-8 files, or the source of Python's standard library, split into train and validation.

A document is a file. Files are read when they are asked for, so that a folder may hold more than fits in memory.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pycoll.errors import UsageError

DOCUMENT_START = 0
"""The byte that begins each document where a token is a byte, and that counts as one of its bytes everywhere."""
VALIDATION_EVERY = 10
"""One document in this many is kept for validation, or this share of a single document."""
_NOT_DEFAULT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
"""Folders of the standard library left out: installed packages, tests with odd bytes, tables rather than prose."""


class DataError(UsageError):
    """The training text, or the tokens made of it, are missing, empty, too short, damaged or not UTF-8."""


class Documents(Iterable[bytes]):
    """UTF-8 documents, any number of times over; those given as paths are read each time.

    Raises DataError, when iterated, naming the file that cannot be read or is not UTF-8.
    """

    def __init__(self, items: Sequence[bytes | Path]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[bytes]:
        return (item if isinstance(item, bytes) else _read(item) for item in self._items)

    def begun(self) -> Iterator[bytes]:
        """Each document behind its DOCUMENT_START."""
        return (bytes([DOCUMENT_START]) + document for document in self)


@dataclass(frozen=True)
class Text:
    """What there is to learn, and what is kept to see how well it was learned."""

    name: str
    train: Documents
    validation: Documents

    @cached_property
    def digest(self) -> str:
        """Tells whether two runs saw the same text, split alike. The first time, all of it is read."""
        train = hashlib.sha256()
        for document in self.train.begun():
            train.update(document)
        whole = hashlib.sha256(train.digest())
        for document in self.validation.begun():
            whole.update(document)
        return whole.hexdigest()


def read_text(path: Path | None) -> Text:
    """The file or folder at `path`, or by default the source of the running Python's standard library.

    A folder is read with its sub-folders in the order of the paths, hidden entries (".git") left out, and split by
    file: one in VALIDATION_EVERY, or of fewer files the one that comes nearest to that share. A single file is split at
    a line. Raises DataError where there is no text; files that are not UTF-8 are found when they are read.
    """
    name = name_of(path)
    documents: Sequence[bytes | Path] = standard_library() if path is None else _files(path)
    if not documents:
        raise DataError(f"{name} holds no text: give --data a UTF-8 file that is not empty, or a folder of them")
    if len(documents) == 1:
        documents = _cut(*Documents(documents))
    kept = range(VALIDATION_EVERY - 1, len(documents), VALIDATION_EVERY) or (_nearest_share(documents),)
    train = [document for i, document in enumerate(documents) if i not in kept]
    return Text(name, Documents(train), Documents([documents[i] for i in kept]))


def name_of(path: Path | None) -> str:
    """What to call the text at `path`, or the default one."""
    return "the Python standard library" if path is None else str(path)


def read_files(path: Path, pattern: str = "*") -> list[tuple[Path, bytes]]:
    """The file at `path`, or those in the folder and its sub-folders whose names match `pattern`, but for hidden ones;
    each with what it holds, in the order of the paths, without empty ones.

    Raises DataError where one cannot be read or is not UTF-8.
    """
    return [(file, _read(file)) for file in _files(path, pattern)]


def standard_library() -> list[bytes]:
    """The source files of the running Python's standard library that are UTF-8 and not empty, in the order of their
    paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if not _NOT_DEFAULT_TEXT.intersection(path.relative_to(root).parts))
    return [text for path in sorted(paths) if (text := path.read_bytes()) and _undecodable_at(text) is None]


def _files(path: Path, pattern: str = "*") -> list[Path]:
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist: give --data a UTF-8 file or a folder of them")
        visible = (p for p in path.rglob(pattern) if not any(n.startswith(".") for n in p.relative_to(path).parts))
        paths = [path] if path.is_file() else sorted(p for p in visible if p.is_file())
        return [p for p in paths if p.stat().st_size]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read(file: Path) -> bytes:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if (position := _undecodable_at(text)) is not None:
        raise DataError(
            f"{file} is not UTF-8 text (byte {position}): convert it (iconv -t UTF-8), or move it out of --data"
        )
    return text


def _undecodable_at(text: bytes) -> int | None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _nearest_share(documents: Sequence[bytes | Path]) -> int:
    sizes = [len(document) if isinstance(document, bytes) else document.stat().st_size for document in documents]
    wanted = sum(sizes) / VALIDATION_EVERY
    return min(range(len(documents)), key=lambda i: abs(sizes[i] - wanted))


def _cut(document: bytes) -> list[bytes]:
    """One document as two, cut at the end of the line at which the share for validation begins."""
    wanted = len(document) - len(document) // VALIDATION_EVERY
    cut = document.rfind(b"\n", 0, wanted) + 1 or wanted
    return [document[:cut], document[cut:]]
