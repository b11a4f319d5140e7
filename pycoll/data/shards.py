"""Tokens in files: made once, then mapped into memory by every run and every rank, however many there are.

A folder holds the tokens of one text through one tokenizer: shards of raw little-endian ids, tokenizer.json where it is
a BPE, and index.json. It appears whole or not at all, also when the process dies while it writes.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycoll.data.corpus import Corpus
from pycoll.data.text import DataError, Documents, Text, name_of, read_text
from pycoll.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, choose_tokenizer
from pycoll.disk import sync

FORMAT = "pycoll-tokens-1"
INDEX, TOKENIZER = "index.json", "tokenizer.json"
SHARD_TOKENS = 1 << 25
_READ_AT_ONCE = 1 << 24


class TokenShards:
    """Token ids of several files as if they were one array; only what is read comes into memory."""

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        """`shards`: (n,) each, of unsigned integers; memory maps, usually."""
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The tokens at `indices`, int64 of any shape: int64 of that shape. Raises IndexError where there is none."""
        wanted = indices.numpy().ravel()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"tokens {wanted.min()} to {wanted.max()} of {len(self)}")
        tokens = np.empty(wanted.shape, np.int64)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for owner in np.unique(owners):
            shard, here = self._shards[owner], owners == owner
            tokens[here] = shard[wanted[here] - (self._ends[owner] - len(shard))]
        return torch.from_numpy(tokens).view(indices.shape)


def prepare(path: Path | None, tokenizer: str, cache: Path) -> Corpus:
    """The text at `path`, or the default one (`read_text`), through `tokenizer` (`choose_tokenizer`), from files.

    The files are those of `tokenize`, whose errors it raises, and those of `open_corpus`.
    """
    return replace(open_corpus(tokenize(path, tokenizer, cache)), name=name_of(path))


def tokenize(path: Path | None, tokenizer: str, cache: Path) -> Path:
    """The folder of `cache` for the tokens of a text, named by the digest of text and tokenizer; see `prepare`.

    Where it is there already nothing is done, once the text has been read for its digest. A BPE is trained on the train
    part alone. Processes that want the same folder at the same time wait for the one that makes it. The text need not
    fit in memory, but each file of it.

    Raises DataError where the text is none or the cache cannot be written, UsageError where there is no such tokenizer.
    """
    choice = choose_tokenizer(tokenizer)
    text = read_text(path)
    key = hashlib.sha256(f"{FORMAT} {text.digest} {choice.digest}".encode()).hexdigest()[:24]
    folder = cache / key
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / f"{key}.lock"):
                if not folder.exists():
                    made = choice if isinstance(choice, Tokenizer) else choice.train(text.train)
                    write_corpus(folder, text, made)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): make room, or give --cache another folder") from error
    return folder


def write_corpus(folder: Path, text: Text, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS) -> None:
    """Writes `text` as the folder `folder`, which must not exist, a file about every `shard_tokens`.

    Raises OSError where it cannot, DataError where the text is another in the end; either way it leaves nothing.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")  # One name: what a killed process left is removed.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        parts = {
            name: _write_part(unfinished, name, documents, tokenizer, shard_tokens)
            for name, documents in (("train", text.train), ("validation", text.validation))
        }
        if replace(text).digest != text.digest:
            raise DataError(f"{text.name} has changed while it was read: run again when it is complete")
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(unfinished / TOKENIZER)
        index = {
            "format": FORMAT,
            "name": text.name,
            "text": text.digest,
            "tokenizer": {"name": tokenizer.name, "digest": tokenizer.digest},
            "dtype": tokenizer.dtype.name,
            "parts": parts,
        }
        (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)  # The name must not reach the disk before the content.
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def open_corpus(folder: Path, *, verify: bool = True) -> Corpus:
    """What `write_corpus` wrote to `folder`, mapped into memory.

    With `verify` all of it is read once and compared with its digests; without, sizes alone are: enough where another
    rank on this machine has verified. Raises DataError where something is missing or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{folder} has the format {index['format']}, not {FORMAT}: remove it; it is made again")
        tokenizer = BPETokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).exists() else ByteTokenizer()
        said = index["tokenizer"]
        if tokenizer.digest != said["digest"]:
            raise _damaged(folder, f"{TOKENIZER} is not {said['name']} as the tokens were made with")
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.name = said["name"]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        parts = index["parts"]
        train, validation = (
            _open_part(folder, parts[name]["shards"], dtype, verify) for name in ("train", "validation")
        )
        return Corpus(
            index["name"],
            train,
            validation,
            _digest(index["text"], tokenizer),
            tokenizer,
            parts["train"]["bytes"] / len(train),
            parts["validation"]["bytes"] / len(validation),
        )
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(folder, str(error)) from error


def _write_part(
    folder: Path, name: str, documents: Documents, tokenizer: Tokenizer, shard_tokens: int
) -> dict[str, Any]:
    """The files of one part; its entry of the index."""
    size = 0
    shards: list[dict[str, Any]] = []

    def counted() -> Iterator[bytes]:
        nonlocal size
        for document in documents:
            size += 1 + len(document)
            yield document

    def write(arrays: Sequence[NDArray[Any]]) -> None:
        tokens = np.concatenate(arrays)
        path = folder / f"{name}-{len(shards):05d}.bin"
        path.write_bytes(tokens.data)
        shards.append({"file": path.name, "tokens": len(tokens), "sha256": hashlib.sha256(tokens.data).hexdigest()})

    arrays: list[NDArray[Any]] = []
    for array in tokenizer.encode_in_batches(counted()):
        arrays.append(array)
        if sum(map(len, arrays)) >= shard_tokens:
            write(arrays)
            arrays = []
    if arrays:
        write(arrays)
    return {"bytes": size, "shards": shards}


def _open_part(folder: Path, shards: Sequence[Any], dtype: np.dtype[Any], verify: bool) -> TokenShards:
    maps = []
    for shard in shards:
        path, size = folder / shard["file"], shard["tokens"] * dtype.itemsize
        if path.stat().st_size != size:
            raise _damaged(folder, f"{path.name} has {path.stat().st_size} bytes instead of {size}")
        maps.append(np.memmap(path, dtype, mode="r"))
        if verify and _digest_of(path) != shard["sha256"]:
            raise _damaged(folder, f"{path.name} is not what was written")
    return TokenShards(maps)


def _digest(text: str, tokenizer: Tokenizer) -> str:
    """Of a corpus: of bytes it is the text's, as `load_corpus` has it."""
    if isinstance(tokenizer, ByteTokenizer):
        return text
    return hashlib.sha256(f"{text} {tokenizer.digest}".encode()).hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"{folder} is damaged ({what}): remove it; the next run makes it again from the text")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Within the block no other process is; the lock goes with its holder, whatever becomes of it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
