"""How well a classifier does on the examples of all ranks, however unevenly they are shared out: its loss, its metrics.

Averages of the ranks' averages would count the examples of a rank that has few of them more than the others'. Here the
ranks add up sums and counts. B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from pycoll.errors import UsageError


def weighted_loss(scores: Tensor, labels: Tensor, total: int, world: int) -> Tensor:
    """This rank's part of the mean cross-entropy over all ranks' examples, in nats: for `backward`, in fp32, a scalar.

    It is the sum over this rank's examples * world / total. The average of it over the ranks is the mean over all
    examples, hence the average of its gradients (which DataParallel takes) the gradient of that mean: a step does not
    depend on who has which example. A rank may have none.

    Args:
        scores: (B, C), of this rank's examples.
        labels: (B,) int64.
        total: examples of all ranks in this optimizer step, in all its passes where gradients are accumulated.
        world: ranks over which gradients are averaged.

    Raises:
        UsageError: `total` is less than this rank's examples alone, or 0.
    """
    if total < max(1, len(labels)):
        raise UsageError(f"a total of {total} examples: give those of all ranks in the step, {len(labels)} here")
    return F.cross_entropy(scores.float(), labels, reduction="sum") * (world / total)


class Classification:
    """Counts of what was guessed for examples of each class, and what follows from them.

    Each rank adds its own examples; `reduce` makes the counts of all ranks. Where nothing is to be divided by (a class
    that is never guessed, or of which there is no example) a metric is 0, as in scikit-learn with zero_division=0.
    Averages (macro) are over all classes, each counting the same.
    """

    def __init__(self, classes: Sequence[str], confusion: Tensor | None = None) -> None:
        """Without examples, or with the counts `confusion` (C, C)."""
        self.classes = tuple(classes)
        n = len(self.classes)
        self.confusion = torch.zeros(n, n, dtype=torch.int64) if confusion is None else confusion
        """(C, C) int64: row i, column j counts the examples of class i that were taken for class j."""

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Counts examples: (B, C) scores, of which the highest says what is guessed, and (B,) int64 labels.

        Raises UsageError where these are of other classes.
        """
        n = len(self.classes)
        if scores.shape != (len(labels), n):
            raise UsageError(f"scores of shape {tuple(scores.shape)}: give ({len(labels)}, {n}), texts by classes")
        if not bool(((labels >= 0) & (labels < n)).all()):
            raise UsageError(f"labels from {labels.min()} to {labels.max()}: give 0 to {n - 1}, places in the classes")
        cells = labels * n + scores.argmax(1)
        self.confusion += cells.bincount(minlength=n * n).view(n, n)

    def reduce(self, group: dist.ProcessGroup | None = None) -> Classification:
        """That of the examples of all ranks of `group`: one all-reduce, a call that all ranks make."""
        confusion = self.confusion.clone()
        dist.all_reduce(confusion, group=group)
        return Classification(self.classes, confusion)

    @property
    def accuracy(self) -> float:
        """Share of the examples that are guessed right."""
        return float(_share(self.confusion.diagonal().sum(), self.confusion.sum()))

    @property
    def precision(self) -> Tensor:
        """(C,) fp64: of the examples taken for a class, the share that is of it."""
        return _share(self.confusion.diagonal(), self.confusion.sum(0))

    @property
    def recall(self) -> Tensor:
        """(C,) fp64: of the examples of a class, the share that is taken for it."""
        return _share(self.confusion.diagonal(), self.confusion.sum(1))

    @property
    def f1(self) -> Tensor:
        """(C,) fp64: the harmonic mean of precision and recall."""
        return _share(2 * self.confusion.diagonal(), self.confusion.sum(0) + self.confusion.sum(1))

    def summary(self) -> dict[str, float]:
        """One number each: accuracy, and the averages over the classes (macro) of precision, recall and F1."""
        each = {"precision": self.precision, "recall": self.recall, "F1": self.f1}
        return {"accuracy": self.accuracy, **{f"macro {name}": float(values.mean()) for name, values in each.items()}}

    def table(self) -> Table:
        """For a terminal: precision, recall, F1 and examples of each class, then the averages and all examples."""
        table = Table("class", *("precision", "recall", "F1", "examples"))
        each = torch.stack((self.precision, self.recall, self.f1), 1)  # (C, 3)
        rows = zip(self.classes, each.tolist(), self.confusion.sum(1).tolist(), strict=True)
        for name, values, examples in rows:
            table.add_row(Text(name), *(f"{value:.3f}" for value in values), f"{examples:,}")
        table.add_section()
        table.add_row("average", *(f"{value:.3f}" for value in each.mean(0).tolist()), f"{self.confusion.sum():,}")
        return table


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is 0, as part is then."""
    return part / whole.clamp(min=1).double()
