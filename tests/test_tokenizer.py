"""Tokenizers: what they give back is the text, the same text makes the same BPE, and bad choices say what to give."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pycoll.data import BPETokenizer, BPETraining, ByteTokenizer, DataError, choose_tokenizer, printable
from pycoll.data import tokenizer as module
from pycoll.data.text import Documents
from pycoll.errors import UsageError

WORDS = "the rank that waits for a peer waits for the peer that waits for the rank; "
DOCUMENTS = Documents([(WORDS * 20).encode(), "café\r\n\t\x00 <|endoftext|> 数学 🙂".encode(), b"", b"x" * 50])
TRAIN = """
import sys
from pycoll.data import BPETraining
from pycoll.data.text import Documents
print(BPETraining(300).train(Documents([sys.argv[1].encode(), b"other words"])).digest)
"""


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    return BPETraining(300).train(DOCUMENTS)


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(DOCUMENTS)
    assert tokens.dtype == np.uint8
    assert tokens.tobytes() == b"".join(b"\0" + document for document in DOCUMENTS)
    assert tokenizer.decode(torch.from_numpy(tokens)).encode() == tokens.tobytes()


def test_bpe_gives_the_text_back_in_fewer_tokens(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 300
    tokens = bpe.encode(DOCUMENTS)
    assert tokens.dtype == np.uint16
    starts = np.flatnonzero(tokens == bpe.document_start)
    assert len(starts) == 4, "one a document; where a document spells the token's name, it is text"
    parts = np.split(tokens, starts[1:])
    assert [bpe.decode(torch.from_numpy(part.astype(np.int64))).encode() for part in parts] == list(DOCUMENTS)
    assert len(parts[0]) < len(WORDS) * 20 / 3


def test_any_bytes_have_tokens(bpe: BPETokenizer) -> None:
    every = "".join(map(chr, range(0x800))) + "\U00010348￿"  # hardly any of it was seen in training
    tokens = torch.from_numpy(bpe.encode([every.encode()]).astype(np.int64))
    assert bpe.decode(tokens) == every


def test_long_documents_are_cut_where_no_token_is(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (WORDS * 40 + "tail\n\n  def indented():  pass\n").encode()
    whole = bpe.encode([document, document])
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    monkeypatch.setattr(module, "BATCH_BYTES", 250)
    assert len(list(bpe.encode_in_batches([document, document]))) > 10
    np.testing.assert_array_equal(bpe.encode([document, document]), whole)
    unbroken = ("数学🙂" * 60).encode()
    pieces = list(module._pieces(unbroken))
    assert len(pieces) > 5 and "".join(pieces).encode() == unbroken


def test_training_gives_the_same_bpe_always(bpe: BPETokenizer) -> None:
    digests = set()
    for environ in ({"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "3"}):
        command = [sys.executable, "-c", TRAIN, WORDS * 20]
        done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert digests == {BPETraining(300).train(Documents([(WORDS * 20).encode(), b"other words"])).digest}
    assert digests != {bpe.digest}


def test_little_text_makes_fewer_tokens(bpe: BPETokenizer) -> None:
    small = BPETraining(5000).train(Documents([b"ab ab ab"]))
    assert 257 < small.vocab_size < 270


def test_saved_bpe_is_the_same_when_loaded(bpe: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    loaded = choose_tokenizer(str(path))
    assert isinstance(loaded, BPETokenizer)
    assert (loaded.digest, loaded.vocab_size, loaded.document_start) == (bpe.digest, 300, bpe.document_start)
    np.testing.assert_array_equal(loaded.encode(DOCUMENTS), bpe.encode(DOCUMENTS))


def test_choices() -> None:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    assert isinstance(choose_tokenizer("bytes"), ByteTokenizer)
    assert choose_tokenizer("bpe:4096") == BPETraining(4096)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("words", r'--tokenizer is words: give "bytes", "bpe:4096" or the path'),
        ("bpe:", r"--tokenizer is bpe:"),
        ("bpe:256", r"--tokenizer bpe:256: give at least 257 tokens"),
    ],
)
def test_bad_choices_are_named(choice: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_tokenizer(choice)


def test_bad_files_are_named(bpe: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is no tokenizer .*: give the path of a tokenizer.json"):
        choose_tokenizer(str(path))
    bpe.save(path)
    path.write_text(path.read_text().replace("<|endoftext|>", "<s>"))
    with pytest.raises(DataError, match=r"tokenizer.json has no token <\|endoftext\|> to begin documents"):
        choose_tokenizer(str(path))


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r'needs the library tokenizers: pip install "pycoll\[bpe\]"'):
        choose_tokenizer("bpe:4096")
    assert choose_tokenizer("bytes").vocab_size == 256


def test_a_terminal_is_shown_text_and_nothing_else() -> None:
    assert printable("a\té\n\x1b[31m\0\ufffd") == "a\té\n[31m\ufffd"
