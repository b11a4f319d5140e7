"""What `--task classify` learns: to which class a text belongs, by an encoder."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycoll.data import EpochSampler, Examples, load_labelled, share
from pycoll.metrics import Classification, weighted_loss
from pycoll.models.encoder import Encoder, EncoderConfig
from pycoll.train.config import TrainConfig
from pycoll.train.mesh import Mesh
from pycoll.train.task import Batch, Rows, Task


class Classify(Task):
    """Texts and labels: inputs are tokens (B, T) and lengths (B,), targets (B,), all int64; scores (B, C).

    Each epoch shows every text once. Its last step has what is left, of which ranks have as many as others, one fewer,
    or none.
    """

    unit = "nats"

    def __init__(self, config: TrainConfig) -> None:
        """Raises DataError where there are no labelled texts."""
        super().__init__(config)
        self._labelled = load_labelled(config.data, config.model.context)
        self.name, self.digest = self._labelled.name, self._labelled.digest
        classes = ", ".join(self._labelled.classes)
        train, validation = len(self._labelled.train), len(self._labelled.validation)
        self.description = f"texts: {self.name}, {train:,} to train on and {validation:,} to validate: {classes}"
        self._sampler = EpochSampler(train, config.seed)
        self._total = 1  # examples of all ranks in the step whose batches were made last

    def make_model(self) -> Encoder:
        shape = EncoderConfig(**asdict(self.config.model), n_classes=len(self._labelled.classes))
        return Encoder(shape, checkpoint_activations=self.config.checkpoint_activations)

    def shape(self) -> dict[str, Any]:
        return {**asdict(self.config.model), "classes": list(self._labelled.classes)}

    def count(self, seen: int, mesh: Mesh) -> int:
        return len(self._step(seen, mesh))

    def batches(self, seen: int, mesh: Mesh) -> list[Batch]:
        examples = self._step(seen, mesh)
        self._total = len(examples)
        mine = share(examples, mesh.dp_rank, mesh.dp)
        return [self._batch(part) for part in mine.tensor_split(self.config.grad_accum)]

    def loss(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """This rank's part of the mean cross-entropy over all ranks' examples of the step."""
        return weighted_loss(scores, targets, self._total, mesh.dp * self.config.grad_accum)

    def tokens_per_step(self, mesh: Mesh) -> int:
        """Of an average step, without padding."""
        train = self._labelled.train
        return max(1, self._most(mesh) * len(train.tokens) // len(train))

    def validation(self, mesh: Mesh) -> Iterator[Batch]:
        count = len(self._labelled.validation)
        most = min(count, self.config.eval_examples or count)
        some = torch.arange(most) * count // most
        for part in some[mesh.dp_rank :: mesh.dp].split(self.config.batch_size):
            yield self._batch(part, self._labelled.validation)

    def no_tally(self) -> Tensor:
        n = len(self._labelled.classes)
        return torch.zeros(1 + n * n, dtype=torch.float64)

    def tally(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """Sum of the losses, and the confusion matrix."""
        n = len(self._labelled.classes)
        seen = Classification(self._labelled.classes, targets.new_zeros(n, n))
        seen.add(scores, targets)
        loss = F.cross_entropy(scores.float(), targets, reduction="sum").double().reshape(1)
        return torch.cat((loss, seen.confusion.flatten().double()))

    def verdict(self, totals: Tensor) -> dict[str, float]:
        """Loss, accuracy, averages of precision, recall and F1 over the classes, and F1 of each."""
        classes = self._labelled.classes
        counts = Classification(classes, totals[1:].view(len(classes), -1).long())
        each = zip(classes, counts.f1.tolist(), strict=True)
        loss = float(totals[0] / counts.confusion.sum())
        return {"loss": loss, **counts.summary(), **{f"F1 of {name}": value for name, value in each}}

    def reference(self) -> Rows:
        share = self._labelled.guessing_accuracy()
        return {"guessing accuracy": (f"{share:.3f}, by always naming the commonest class", share)}

    def _most(self, mesh: Mesh) -> int:
        """Examples of a step that does not end an epoch."""
        return mesh.dp * self.config.grad_accum * self.config.batch_size

    def _step(self, seen: int, mesh: Mesh) -> Tensor:
        """The examples of all ranks, (n,) int64."""
        return self._sampler.take(seen, self._most(mesh))

    def _batch(self, indices: Tensor, examples: Examples | None = None) -> Batch:
        tokens, lengths, labels = (examples or self._labelled.train).batch(indices)
        return Batch((tokens, lengths), labels)
