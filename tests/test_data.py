"""Text for the trainer: what is read, how it is split, which windows are drawn, and what bad input says."""

import math
import sysconfig
from pathlib import Path

import pytest
import torch

from pycoll.data import ByteTokenizer, Corpus, DataError, load_corpus, printable, spread_windows, windows_at
from pycoll.errors import UsageError

CONTEXT = 8


def as_bytes(tokens: torch.Tensor) -> bytes:
    assert tokens.dtype == torch.uint8
    return bytes(tokens.tolist())


def write_files(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_default_text_is_the_standard_library() -> None:
    corpus = load_corpus(None, 256)
    assert len(corpus.train) > 2_000_000
    assert 0.02 < len(corpus.validation) / len(corpus.train) < 0.3
    source = Path(sysconfig.get_path("stdlib"), "dataclasses.py").read_bytes()
    assert (source in as_bytes(corpus.train)) != (source in as_bytes(corpus.validation))
    assert corpus.digest == load_corpus(None, 256).digest


def test_default_text_leaves_out_what_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"m{i}.py": f"wanted {i}\n" for i in range(4)}
    unwanted = {"latin.py": b"# \xe9\n", "test/t.py": "tests", "site-packages/s.py": "installed", "x.so": b"\x00"}
    write_files(tmp_path, {**wanted, **unwanted})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = load_corpus(None, CONTEXT)
    assert as_bytes(corpus.train) == b"\0wanted 1\n\0wanted 2\n\0wanted 3\n"
    assert as_bytes(corpus.validation) == b"\0wanted 0\n"


def test_of_few_files_the_one_nearest_a_tenth_is_kept(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": "a" * 1000, "b": "b" * 90, "c": "c" * 10})
    assert as_bytes(load_corpus(tmp_path, CONTEXT).validation) == b"\0" + b"b" * 90


def test_folder_is_split_by_file(tmp_path: Path) -> None:
    texts = {f"folder{i % 3}/{i:02}.txt": f"document {i:02}" for i in range(25)}
    write_files(tmp_path, {**texts, ".git/objects": b"\xff\xfe", "empty.txt": ""})
    corpus = load_corpus(tmp_path, CONTEXT)
    train, validation = (as_bytes(part).split(b"\0")[1:] for part in (corpus.train, corpus.validation))
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(text.encode() for text in texts.values())


def test_single_file_is_split_at_a_line(tmp_path: Path) -> None:
    lines = "".join(f"line number {i}: é\n" for i in range(100))
    (tmp_path / "text").write_text(lines, encoding="utf-8")
    corpus = load_corpus(tmp_path / "text", CONTEXT)
    train, validation = (as_bytes(part).removeprefix(b"\0").decode() for part in (corpus.train, corpus.validation))
    assert train + validation == lines
    assert train.endswith("\n")
    assert 0.08 < len(validation) / len(lines) < 0.12


def test_digest_tells_texts_and_splits_apart(tmp_path: Path) -> None:
    digests = set()
    for i, texts in enumerate(
        [{"a": "x" * 40, "b": "y" * 40}, {"a": "y" * 40, "b": "x" * 40}, {"a": "x" * 40 + "y" * 40}]
    ):
        digests.add(load_corpus(write_files(tmp_path / str(i), dict(texts)), 2).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("texts", "path", "said"),
    [
        ({}, "missing.txt", r"missing.txt does not exist: give --data"),
        ({"empty.txt": ""}, "empty.txt", r"empty.txt holds no text: give --data"),
        ({"folder/empty.txt": ""}, "folder", r"folder holds no text: give --data"),
        ({"latin.txt": b"caf\xe9" * 9}, "latin.txt", r"latin.txt is not UTF-8 text \(byte 3\): convert it"),
        ({"folder/a.txt": "a" * 99, "folder/b.bin": b"\xff"}, "folder", r"b.bin is not UTF-8 text \(byte 0\)"),
        ({"short.txt": "abc\n" * 10}, "short.txt", r"leaves 5 bytes for validation.*--model.context"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, texts: dict[str, str | bytes], path: str, said: str) -> None:
    write_files(tmp_path, texts)
    with pytest.raises(DataError, match=said) as caught:
        load_corpus(tmp_path / path, CONTEXT)
    assert isinstance(caught.value, UsageError)


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write_files(tmp_path, {"secret.txt": "text"})
    monkeypatch.setattr(Path, "read_bytes", refuse)  # Permissions do not stop root, who may run this.
    with pytest.raises(DataError, match=r"secret.txt cannot be read: Permission denied"):
        load_corpus(tmp_path, CONTEXT)


def test_targets_are_one_token_further() -> None:
    tokens = torch.arange(100, dtype=torch.uint8)
    inputs, targets = windows_at(tokens, CONTEXT, torch.tensor([[0, 50], [3, 91]]))
    assert inputs.shape == targets.shape == (2, 2, CONTEXT)
    assert inputs[0, 1].tolist() == list(range(50, 58))
    assert torch.equal(targets, inputs + 1)
    assert targets[1, 1, -1] == 99


@pytest.mark.parametrize(("length", "count", "expected"), [(9, 5, 1), (17, 5, 2), (1000, 5, 5), (41, 5, 5)])
def test_spread_windows_do_not_overlap_and_reach_both_ends(length: int, count: int, expected: int) -> None:
    tokens = torch.zeros(length, dtype=torch.uint8)
    starts = spread_windows(tokens, CONTEXT, count)
    assert len(starts) == expected
    assert starts[0] == 0
    assert torch.all(starts.diff() >= CONTEXT)
    if expected > 1:
        assert starts[-1] + CONTEXT + 1 == length
    windows_at(tokens, CONTEXT, starts)


def test_unigram_cross_entropy_is_what_counting_reaches() -> None:
    train = torch.tensor([0] * 3_000_000 + [1] * 1_000_000, dtype=torch.uint8)
    validation = torch.tensor([0, 1], dtype=torch.uint8)
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert Corpus("", train, validation, "").unigram_cross_entropy() == pytest.approx(expected, abs=1e-3)
    unseen = Corpus("", train, torch.tensor([200], dtype=torch.uint8), "").unigram_cross_entropy()
    assert unseen == pytest.approx(math.log(4_000_256))


def test_decoding_shows_text_and_nothing_else() -> None:
    tokens = torch.tensor(list("a\té\n\x1b[31m\0".encode() + b"\xff"))
    assert printable(ByteTokenizer().decode(tokens)) == "a\té\n[31m\ufffd"
