"""Labelled texts: what is read and how it is split, batches, what bad input says, and that the default teaches."""

import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from pycoll.data import DataError, Examples, Labelled, load_labelled
from pycoll.metrics import Classification, weighted_loss
from pycoll.models import Encoder, EncoderConfig

CONTEXT = 64


@pytest.fixture(scope="module")
def default() -> Labelled:
    return load_labelled(None, CONTEXT)


def texts_of(examples: Examples) -> list[bytes]:
    return [bytes(examples.batch(torch.tensor([i]))[0][0, : examples.offsets.diff()[i]]) for i in range(len(examples))]


def lines_of(labelled: Labelled, part: Examples) -> list[str]:
    """As they would be in a file."""
    labels = [labelled.classes[label] for label in part.labels]
    return [f"{text.decode()}\t{label}" for text, label in zip(texts_of(part), labels, strict=True)]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def numbered(**classes: int) -> list[str]:
    """Lines of each class, one class after another."""
    return [f"text {i} of {name}\t{name}" for name, count in classes.items() for i in range(count)]


def test_every_tenth_line_of_each_class_is_for_validation(tmp_path: Path) -> None:
    lines = numbered(often=57, rare=10, rarest=9)
    labelled = load_labelled(write(tmp_path / "data.tsv", lines), CONTEXT)
    assert labelled.classes == ("often", "rare", "rarest")
    expected = [f"text {i} of often\toften" for i in (9, 19, 29, 39, 49)] + ["text 9 of rare\trare"]
    assert lines_of(labelled, labelled.validation) == expected
    assert lines_of(labelled, labelled.train) == [line for line in lines if line not in expected]
    assert labelled.guessing_accuracy() == pytest.approx(5 / 6)


def test_last_tab_divides_and_blanks_around_labels_do_not_count(tmp_path: Path) -> None:
    lines = ["a\tb\tno", "\tÜbel \r", "  kept as is  \t  no\u00a0", "\x85\x0b\ttwo words", *numbered(a=10)]
    labelled = load_labelled(write(tmp_path / "data", lines), CONTEXT)
    assert labelled.classes == ("a", "no", "two words", "Übel")
    read = ["a\tb\tno", "\tÜbel", "  kept as is  \tno", "\x85\x0b\ttwo words"]
    assert lines_of(labelled, labelled.train)[:4] == read


def test_folder_holds_tsv_files_and_others(tmp_path: Path) -> None:
    lines = numbered(a=12, b=12)
    for i, name in enumerate(("z/1.tsv", "a/2.tsv", "3.tsv")):
        write(tmp_path / name, lines[i::3])
    write(tmp_path / "README.txt", ["no label"])
    write(tmp_path / ".hidden.tsv", ["no label"])
    (tmp_path / "empty.tsv").write_text("")
    labelled = load_labelled(tmp_path, CONTEXT)
    read = lines_of(labelled, labelled.train) + lines_of(labelled, labelled.validation)
    assert sorted(read) == sorted(lines)
    assert len(labelled.validation) == 2
    assert lines_of(labelled, labelled.train)[0] == lines[2], "3.tsv is the first of the paths"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["good\ta", "no tab"], r"data.tsv, line 2 has no tab"),
        (["good\ta", "", "good\ta"], r"data.tsv, line 2 has no tab"),
        (["no label\t \r"], r"data.tsv, line 1 has no label after its last tab"),
        (["text\tlabel\t"], r"data.tsv, line 1 has no label after its last tab"),
        (["text\t\u00a0"], r"data.tsv, line 1 has no label after its last tab"),
        (numbered(a=20), r"data.tsv holds the label 'a' alone"),
        ([], r"data.tsv holds no labelled text"),
        (numbered(a=9, b=9), r"data.tsv leaves nothing for validation: give --data 10 lines"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_labelled(write(tmp_path / "data.tsv", lines), CONTEXT)


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing does not exist"):
        load_labelled(tmp_path / "missing", CONTEXT)
    with pytest.raises(DataError, match="holds no labelled text"):
        load_labelled(tmp_path, CONTEXT)
    (tmp_path / "latin.tsv").write_bytes(b"caf\xe9\ta\n")
    with pytest.raises(DataError, match=r"latin.tsv is not UTF-8 text \(byte 3\)"):
        load_labelled(tmp_path, CONTEXT)


def test_digest_tells_texts_labels_and_order_apart(tmp_path: Path) -> None:
    lines = numbered(a=10, b=10)
    first, *rest = lines
    others = [lines, [*rest, first], [first.replace("\ta", "\tb"), *rest], [f"{first}\ta", *rest]]
    digests = [load_labelled(write(tmp_path / f"{i}.tsv", other), CONTEXT).digest for i, other in enumerate(others)]
    assert len(set(digests)) == len(others)
    assert load_labelled(tmp_path / "0.tsv", 3).digest == digests[0], "the context is the model's"


def test_batches_are_padded_to_their_longest(tmp_path: Path) -> None:
    lines = ["abc\tx", "\ty", "abcdefgh\tx", "e\u00e9\ty", *numbered(x=10)]
    examples = load_labelled(write(tmp_path / "data", lines), 5).train
    tokens, lengths, labels = examples.batch(torch.tensor([2, 1, 3, 0]))
    assert {tokens.dtype, lengths.dtype, labels.dtype} == {torch.int64}
    assert [bytes(row) for row in tokens.tolist()] == [b"abcde", b"\0" * 5, "e\u00e9".encode() + b"\0\0", b"abc\0\0"]
    assert lengths.tolist() == [5, 0, 3, 3]
    assert labels.tolist() == [0, 1, 1, 0]
    assert examples.batch(torch.tensor([0]))[0].tolist() == [[97, 98, 99]]
    assert examples.batch(torch.tensor([1]))[0].tolist() == [[0]], "a model gets at least one token"
    tokens, lengths, labels = examples.batch(torch.zeros(0, dtype=torch.int64))
    assert (tokens.shape, lengths.shape, labels.shape) == ((0, 1), (0,), (0,))


def test_default_is_balanced_and_the_same_each_time(default: Labelled) -> None:
    assert default.classes == ("code", "comment", "docstring")
    assert len(set(default.train.labels.bincount().tolist())) == 1
    assert len(set(default.validation.labels.bincount().tolist())) == 1
    assert len(default.train) > 6000
    assert default.guessing_accuracy() == pytest.approx(1 / 3)
    again = load_labelled(None, CONTEXT)
    assert again.digest == default.digest
    assert torch.equal(again.train.tokens, default.train.tokens)
    assert torch.equal(again.validation.labels, default.validation.labels)


SOURCE = '''\
"""The first line of the module.

    The second 'paragraph' of it
"""
import something  # and why it is imported
# 123456789 ----------
# a comment, which here
## -- goes on over two lines

def function(argument="# no comment"):
    r"""A line in \\raw."""
    short = 1
    text = """no docstring
    # nor a comment, nor code
    """ + argument.upper()
    return call_something(
        argument, text,  # with a comment
        "text over two rows" \\
        "joined by a backslash",
    )
class Class:
    'Of single quotes'
    attribute: int = 0; import something
    "Of double quotes"
'''
EXPECTED = {
    "code": {
        "import something",
        'def function(argument="# no comment"):',
        "return call_something(",
        "argument, text,",
        '"text over two rows"',
        '"joined by a backslash",',
        "class Class:",
        "attribute: int = 0; import something",
    },
    "comment": {"and why it is imported", "a comment, which here", "-- goes on over two lines", "with a comment"},
    "docstring": {
        "The first line of the module.",
        "The second 'paragraph' of it",
        r"A line in \raw.",
        "Of single quotes",
        "Of double quotes",
    },
}


def test_lines_are_what_they_are_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once. Of every class as many, which more lines of a second file make it, so that none is left out."""
    more = {"code": "more_code({})\n", "comment": "# more comments {}\n", "docstring": "'more docstrings {}'\n"}
    lines = [line.format(i) for label, line in more.items() for i in range(len(EXPECTED[label]), 20)]
    again = ["'more comments 19'\n", "# more docstrings 19\n", "more_code(19)\n"]
    files = {"m1.py": SOURCE, "m2.py": "".join(lines + again), "bad.py": "def never(:\n    closed = (((\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    labelled = load_labelled(None, CONTEXT)
    found: dict[str, set[str]] = {name: set() for name in labelled.classes}
    more_found = Counter[str]()
    for line in lines_of(labelled, labelled.train) + lines_of(labelled, labelled.validation):
        text, _, label = line.rpartition("\t")
        if text.startswith("more"):
            more_found[label] += 1
        else:
            found[label].add(text)
    assert found == EXPECTED
    assert more_found == {label: 20 - len(texts) for label, texts in EXPECTED.items()}


def test_a_small_encoder_learns_the_default(default: Labelled) -> None:
    """Code from prose within seconds; comments from docstrings takes minutes."""
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(context=CONTEXT, n_layer=1, n_head=2, d_model=32, n_classes=len(default.classes)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for indices in torch.randperm(len(default.train))[:6400].split(16):
        tokens, lengths, labels = default.train.batch(indices)
        weighted_loss(model(tokens, lengths), labels, total=len(labels), world=1).backward()
        optimizer.step()
        optimizer.zero_grad()
    learned, guessing = Classification(default.classes), Classification(default.classes)
    for indices in torch.arange(len(default.validation)).split(256):
        tokens, lengths, labels = default.validation.batch(indices)
        with torch.no_grad():
            learned.add(model(tokens, lengths), labels)
        guessing.add(torch.eye(3)[torch.zeros_like(labels)], labels)
    assert guessing.accuracy == pytest.approx(default.guessing_accuracy())
    assert guessing.summary()["macro F1"] == pytest.approx(0.5 / 3)
    assert learned.summary()["macro F1"] > 0.4
    assert learned.f1[0] > 0.7
