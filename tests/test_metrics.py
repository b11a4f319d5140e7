"""Metrics and the loss of a classifier: against counting by hand, however the examples are shared out."""

import io
import math
from collections.abc import Sequence

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from pycoll.errors import UsageError
from pycoll.metrics import Classification, weighted_loss

CLASSES = ("code", "[red]", "never there", "never guessed")
TRUE = [0, 0, 0, 1, 1, 3, 0, 1, 3, 0, 1]
GUESSED = [0, 1, 0, 1, 2, 0, 0, 1, 1, 0, 0]


def scores_of(guessed: Sequence[int]) -> Tensor:
    """(B, C), highest for what is guessed."""
    noise = torch.rand(len(guessed), len(CLASSES), generator=torch.Generator().manual_seed(0))
    return noise + 2 * F.one_hot(torch.tensor(guessed, dtype=torch.int64), len(CLASSES))


def counted(true: Sequence[int], guessed: Sequence[int]) -> Classification:
    metrics = Classification(CLASSES)
    metrics.add(scores_of(guessed), torch.tensor(true, dtype=torch.int64))
    return metrics


def by_hand(true: Sequence[int], guessed: Sequence[int]) -> dict[str, list[float]]:
    """Precision, recall and F1 of each class, from the examples one by one."""
    precision, recall, f1 = [], [], []
    for c in range(len(CLASSES)):
        right = sum(t == g == c for t, g in zip(true, guessed, strict=True))
        p = right / guessed.count(c) if c in guessed else 0.0
        r = right / true.count(c) if c in true else 0.0
        precision, recall, f1 = [*precision, p], [*recall, r], [*f1, 2 * p * r / (p + r) if right else 0.0]
    return {"precision": precision, "recall": recall, "f1": f1}


def test_metrics_are_those_counted_by_hand() -> None:
    metrics, expected = counted(TRUE, GUESSED), by_hand(TRUE, GUESSED)
    assert metrics.accuracy == pytest.approx(6 / 11)
    for name, values in expected.items():
        assert getattr(metrics, name).tolist() == pytest.approx(values), name
    assert expected["precision"][:2] == [4 / 6, 2 / 4] and expected["recall"][:2] == [4 / 5, 2 / 4]
    assert metrics.summary() == pytest.approx(
        {
            "accuracy": 6 / 11,
            "macro precision": (4 / 6 + 2 / 4) / 4,
            "macro recall": (4 / 5 + 2 / 4) / 4,
            "macro F1": (8 / 11 + 2 / 4) / 4,
        }
    )
    assert metrics.confusion[1].tolist() == [1, 2, 1, 0], "rows are what it is, columns what is guessed"


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11, [0, 11, 0]])
def test_batches_add_up(sizes: list[int]) -> None:
    metrics = Classification(CLASSES)
    for true, scores in zip(torch.tensor(TRUE).split(sizes), scores_of(GUESSED).split(sizes), strict=True):
        metrics.add(scores, true)
    assert torch.equal(metrics.confusion, counted(TRUE, GUESSED).confusion)
    assert metrics.confusion.dtype == torch.int64


def test_without_examples_all_is_zero() -> None:
    metrics = counted([], [])
    assert set(metrics.summary().values()) == {0.0}
    assert torch.all(torch.stack((metrics.precision, metrics.recall, metrics.f1)) == 0)


def test_table_has_a_row_for_each_class_and_the_averages() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(counted(TRUE * 200, GUESSED * 200).table())
    rows = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["code", "0.667", "0.800", "0.727", "1,000"] in rows
    assert ["[red]", "0.500", "0.500", "0.500", "800"] in rows
    assert ["never", "there", "0.000", "0.000", "0.000", "0"] in rows
    assert ["average", "0.292", "0.325", "0.307", "2,200"] in rows


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), r"scores of shape \(2, 3\): give \(2, 4\)"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), r"scores of shape \(2, 4\): give \(3, 4\)"),
        (torch.zeros(2, 4), torch.tensor([1, 4]), "labels from 1 to 4: give 0 to 3"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "labels from -1 to 0: give 0 to 3"),
    ],
)
def test_examples_of_other_classes_are_refused(scores: Tensor, labels: Tensor, said: str) -> None:
    metrics = Classification(CLASSES)
    with pytest.raises(UsageError, match=said):
        metrics.add(scores, labels)
    assert torch.all(metrics.confusion == 0)


@pytest.mark.parametrize("sizes", [[4], [3, 1], [4, 0], [1, 0, 3]])
def test_average_of_the_losses_is_the_mean_over_all_examples(sizes: list[int]) -> None:
    scores, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    parts = zip(scores.split(sizes), labels.split(sizes), strict=True)
    losses = [weighted_loss(*part, total=4, world=len(sizes)) for part in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), F.cross_entropy(scores, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_16_bits_is_computed_in_fp32(dtype: torch.dtype) -> None:
    scores, labels = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(64) % 3
    loss = weighted_loss(scores, labels, total=64, world=1)
    torch.testing.assert_close(loss, F.cross_entropy(scores.float(), labels))
    assert weighted_loss(torch.zeros(2**15, 2, dtype=dtype), torch.zeros(2**15, dtype=torch.int64), 2**15, 1) == (
        pytest.approx(math.log(2))
    ), "a sum beyond float16"


@pytest.mark.parametrize(("total", "here"), [(0, 0), (2, 3)])
def test_a_total_that_leaves_examples_out_is_refused(total: int, here: int) -> None:
    with pytest.raises(UsageError, match=f"a total of {total} examples: .* {here} here"):
        weighted_loss(torch.zeros(here, 2), torch.zeros(here, dtype=torch.int64), total, 2)
