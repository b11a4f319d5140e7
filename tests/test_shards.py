"""Tokens in files: the same as in memory, made once, whole or not at all; damage is named."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pycoll.data import (
    ByteTokenizer,
    Corpus,
    DataError,
    TokenShards,
    load_corpus,
    open_corpus,
    prepare,
    read_text,
    tokenize,
    windows_at,
    write_corpus,
)

CONTEXT = 8
DIE_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from pycoll.data import ByteTokenizer, prepare
def die(self, documents):
    yield np.frombuffer(b"first", np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)
import numpy as np
ByteTokenizer.encode_in_batches = die
prepare(Path(sys.argv[1]), "bytes", Path(sys.argv[2]))
"""
PREPARE = """
import sys
from pathlib import Path
from pycoll.data import ByteTokenizer, prepare
encode = ByteTokenizer.encode_in_batches
def told(self, documents):
    print("encodes")
    return encode(self, documents)
ByteTokenizer.encode_in_batches = told
print("ready", flush=True)
sys.stdin.readline()
print(prepare(Path(sys.argv[1]), "bytes", Path(sys.argv[2])).digest)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"{i} times {i} is {i * i}.\n" * 20, encoding="utf-8")
    return folder


def everything(tokens: Any) -> list[int]:
    return tokens[torch.arange(len(tokens))].tolist()


def same(left: Corpus, right: Corpus) -> bool:
    return (
        (left.name, left.digest) == (right.name, right.digest)
        and everything(left.train) == everything(right.train)
        and everything(left.validation) == everything(right.validation)
    )


def test_shards_read_as_one_array() -> None:
    whole = torch.arange(1000, 1100)
    parts = [np.asarray(part, np.uint16) for part in np.split(whole.numpy(), [1, 40, 77])]
    tokens = TokenShards(parts)
    assert len(tokens) == 100
    indices = torch.randint(100, (3, 4, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens[indices], whole[indices])
    for here, there in zip(
        windows_at(tokens, CONTEXT, indices[0]), windows_at(whole, CONTEXT, indices[0]), strict=True
    ):
        assert torch.equal(here, there)
    assert tokens[torch.empty(0, 2, dtype=torch.int64)].shape == (0, 2)
    for outside in (-1, 100):
        with pytest.raises(IndexError, match=f"tokens {outside} to {outside} of 100"):
            tokens[torch.tensor([outside])]


def test_bytes_from_files_are_those_in_memory(text: Path, tmp_path: Path) -> None:
    loaded, prepared = load_corpus(text, CONTEXT), prepare(text, "bytes", tmp_path)
    assert same(loaded, prepared)
    assert prepared.unigram_cross_entropy() == loaded.unigram_cross_entropy()
    assert prepared.train_bytes_per_token == prepared.validation_bytes_per_token == 1
    write_corpus(tmp_path / "small", read_text(text), ByteTokenizer(), shard_tokens=900)
    assert len(list((tmp_path / "small").glob("train-*.bin"))) > 5
    assert same(open_corpus(tmp_path / "small"), loaded)
    starts = torch.arange(50) * 7 % (len(loaded.train) - CONTEXT)
    assert torch.equal(
        windows_at(open_corpus(tmp_path / "small").train, CONTEXT, starts)[1],
        windows_at(loaded.train, CONTEXT, starts)[1],
    )


def test_bpe_from_files_stands_for_the_same_text(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    corpus, in_bytes = prepare(text, "bpe:300", tmp_path), load_corpus(text, CONTEXT)
    assert corpus.digest != in_bytes.digest
    assert corpus.tokenizer.vocab_size == 300
    for tokens, ratio, wanted in (
        (corpus.train, corpus.train_bytes_per_token, in_bytes.train),
        (corpus.validation, corpus.validation_bytes_per_token, in_bytes.validation),
    ):
        ids = tokens[torch.arange(len(tokens))]
        assert corpus.tokenizer.decode(ids) == bytes(everything(wanted)).decode().replace("\0", "")
        assert ratio == len(wanted) / len(ids) > 1.5
        assert int((ids == corpus.tokenizer.document_start).sum()) == everything(wanted).count(0)
    assert 0 < corpus.unigram_cross_entropy() < in_bytes.unigram_cross_entropy()
    by_file = prepare(text, str(next(tmp_path.glob("*/tokenizer.json"))), tmp_path)
    assert by_file.digest == corpus.digest, "the same text through the same tokenizer, however it was named"


def test_bpe_learns_from_train_alone(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    other = tmp_path / "other"
    other.mkdir()
    for path in text.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    first = prepare(other, "bpe:300", tmp_path)
    (other / "09.txt").write_text("zebras quizzed " * 50)  # the tenth is for validation
    second = prepare(other, "bpe:300", tmp_path)
    assert first.digest != second.digest
    assert first.tokenizer.digest == second.tokenizer.digest


def test_what_is_there_is_used(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(text, "bytes", tmp_path)

    def refuse(*_: object) -> Iterator[NDArray[Any]]:
        raise AssertionError("encoded again")

    monkeypatch.setattr(ByteTokenizer, "encode_in_batches", refuse)
    assert same(prepare(text, "bytes", tmp_path), first)
    (tmp_path / "copy").symlink_to(text)
    assert prepare(tmp_path / "copy", "bytes", tmp_path).name == str(tmp_path / "copy")


def test_what_a_killed_process_left_is_no_corpus(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, text, cache], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".unfinished"]
    assert same(prepare(text, "bytes", cache), load_corpus(text, CONTEXT))
    assert not list(cache.glob("*.unfinished"))


def test_two_processes_prepare_at_once(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREPARE, text, tmp_path / "cache"]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert {lines[-1] for lines in said} == {load_corpus(text, CONTEXT).digest}
    assert sum(lines.count("encodes") for lines in said) == 2, "train and validation, by one of them"


def test_text_that_changes_meanwhile_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
    encode = ByteTokenizer.encode_in_batches

    def change(self: ByteTokenizer, documents: Any) -> Iterator[NDArray[Any]]:
        (tmp_path / "03.txt").write_text("another")
        return encode(self, documents)

    monkeypatch.setattr(ByteTokenizer, "encode_in_batches", change)
    with pytest.raises(DataError, match="has changed while it was read: run again"):
        prepare(tmp_path, "bytes", tmp_path / ".cache")
    assert [path.suffix for path in (tmp_path / ".cache").iterdir()] == [".lock"]


def shorten(folder: Path) -> None:
    path = folder / "train-00000.bin"
    os.truncate(path, path.stat().st_size - 1)


def alter(folder: Path) -> None:
    with (folder / "validation-00000.bin").open("r+b") as file:
        file.write(b"\xff")


def rewrite(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, r"train-00000.bin has \d+ bytes instead of \d+"),
        (alter, "validation-00000.bin is not what was written"),
        (lambda folder: (folder / "train-00000.bin").unlink(), "No such file .*train-00000.bin"),
        (lambda folder: (folder / "index.json").unlink(), "No such file .*index.json"),
        (lambda folder: (folder / "index.json").write_text("{"), "Expecting property name"),
        (rewrite(parts={}), "train"),
        (rewrite(dtype="uint17"), "uint17"),
        (rewrite(tokenizer={"name": "bpe:300", "digest": "0"}), "tokenizer.json is not bpe:300"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], said: str, text: Path, tmp_path: Path) -> None:
    damage(tokenize(text, "bytes", tmp_path))
    with pytest.raises(DataError, match=rf"is damaged \(.*{said}.*\): remove it; the next run makes it again"):
        prepare(text, "bytes", tmp_path)


def test_another_format_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tokenize(text, "bytes", tmp_path)
    rewrite(format="pycoll-tokens-0")(folder)
    with pytest.raises(DataError, match="has the format pycoll-tokens-0, not pycoll-tokens-1: remove it"):
        open_corpus(folder)


def test_sizes_are_compared_even_without_digests(text: Path, tmp_path: Path) -> None:
    folder = tokenize(text, "bytes", tmp_path)
    alter(folder)
    open_corpus(folder, verify=False)
    shorten(folder)
    with pytest.raises(DataError, match="instead of"):
        open_corpus(folder, verify=False)


def test_cache_that_cannot_be_written_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .*: make room, or give --cache another folder"):
        prepare(text, "bytes", tmp_path / "file" / "cache")

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left on device"):
        prepare(text, "bytes", tmp_path / "full")
    assert [path.suffix for path in (tmp_path / "full").iterdir()] == [".lock"]
