"""What `--task language` learns: the next token of text, by a GPT."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.data import (
    ByteTokenizer,
    Corpus,
    WindowSampler,
    load_corpus,
    prepare,
    printable,
    spread_windows,
    windows_at,
)
from pycoll.models.flops import model_flops_utilization, peak_of, training_flops_per_token
from pycoll.models.gpt import GPT, GPTConfig
from pycoll.models.hugging_face import TOKENIZER, export_model, import_model, read_shape
from pycoll.tensor_parallel import vocab_parallel_cross_entropy
from pycoll.train.config import ConfigError, TrainConfig
from pycoll.train.mesh import Mesh
from pycoll.train.task import Batch, Rows, Task

SAMPLE_TEMPERATURE = 0.8
WINDOWS = 128
"""Of an evaluation, where the settings do not say how many."""


class Language(Task):
    """Windows of text: inputs and targets, one token further, are (B, T) int64; scores (B, T, V)."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises DataError where there is no text, or too little; UsageError where there is no such tokenizer."""
        if config.init is not None and config.resume is None:
            config = replace(config, model=replace(read_shape(config.init), dropout=config.model.dropout))
        corpus = read(config)
        super().__init__(replace(config, model=with_tokens_of(corpus, config)))
        self.corpus = corpus
        self.name, self.digest = corpus.name, corpus.digest
        self._token = "byte" if isinstance(corpus.tokenizer, ByteTokenizer) else "token"
        self.unit = f"nats/{self._token}"
        train, validation = len(corpus.train), len(corpus.validation)
        self.description = f"text: {self.name}, {train:,} {self._token}s to train on and {validation:,} to validate"
        self._sampler = WindowSampler(train, config.model.context, config.seed)

    def make_model(self) -> GPT:
        """With the weights of --init, where that is given."""
        model = GPT(self.config.model, checkpoint_activations=self.config.checkpoint_activations)
        if self.config.init is not None and self.config.resume is None:
            model.load_state_dict(import_model(self.config.init).state_dict())
        return model

    def count(self, seen: int, mesh: Mesh) -> int:
        return mesh.dp * self.config.grad_accum * self.config.batch_size

    def batches(self, seen: int, mesh: Mesh) -> list[Batch]:
        """Where an epoch ends within a step, the step goes on with the next one."""
        starts = torch.empty(0, dtype=torch.int64)
        while (missing := self.count(seen, mesh) - len(starts)) > 0:
            starts = torch.cat((starts, self._sampler.take(seen + len(starts), missing)))
        mine = starts.view(mesh.dp, self.config.grad_accum, self.config.batch_size)[mesh.dp_rank]
        inputs, targets = windows_at(self.corpus.train, self.config.model.context, mine)
        return [Batch((x,), y) for x, y in zip(inputs, targets, strict=True)]

    def tokens_per_step(self, mesh: Mesh) -> int:
        return self.count(0, mesh) * self.config.model.context

    def loss(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """Mean cross-entropy. With tensor parallelism `scores` are this rank's part of the vocabulary's."""
        if mesh.tp > 1:
            vocabulary = self.config.model.vocab_size
            return vocab_parallel_cross_entropy(scores, targets, mesh.tp_group, vocab_size=vocabulary).mean()
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())

    def validation(self, mesh: Mesh) -> Iterator[Batch]:
        text, context = self.corpus.validation, self.config.model.context
        starts = spread_windows(text, context, self.config.eval_examples or WINDOWS)[mesh.dp_rank :: mesh.dp]
        for some in starts.split(self.config.batch_size) if len(starts) else ():
            inputs, targets = windows_at(text, context, some)
            yield Batch((inputs,), targets)

    def shape(self) -> dict[str, Any]:
        return asdict(self.config.model)

    def no_tally(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def tally(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """Sum of the losses, and number of tokens."""
        loss = self.loss(scores, targets, mesh).double()
        count = torch.full_like(loss, targets.numel())
        return torch.stack((loss * count, count))

    def verdict(self, totals: Tensor) -> dict[str, float]:
        """The loss a token; and a byte, which compares between tokenizers."""
        loss = float(totals[0] / totals[1])
        per_byte = loss / self.corpus.validation_bytes_per_token
        return {"loss": loss} if self._token == "byte" else {"loss": loss, "loss per byte": per_byte}

    def reference(self) -> Rows:
        unigram = self.corpus.unigram_cross_entropy()
        return {"unigram cross-entropy": (f"{unigram:.3f} nats/byte, by counting {self._token}s", unigram)}

    def utilization(self, tokens_per_s: float, processors: int, device: torch.device) -> Rows:
        """MFU as PaLM counts it (pycoll/models/flops.py), of the GPUs' datasheets or of what matrix products reach."""
        flops = training_flops_per_token(self.config.model)
        # CPUs are often slower in 16 bits than in 32, so that their peak is that of fp32.
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, self.config.dtype)
        peak, named = peak_of(device, dtype)
        share = model_flops_utilization(tokens_per_s, flops, processors * peak)
        shown = f"{share:.1%}: tokens/s x {flops:,} FLOP a token (6 N + 12 L H Q T) / {named}"
        return {"MFU": (shown, share)}

    def finish(self, model: nn.Module) -> str | None:
        """Exports the model where asked to, and lets it write."""
        assert isinstance(model, GPT)
        config, tokenizer = self.config, self.corpus.tokenizer
        if config.export is not None:
            export_model(model, config.export, tokenizer)
        if not config.sample_bytes:
            return None
        device = model.embedding.token.weight.device
        generator = torch.Generator(device).manual_seed(config.seed)
        prompt = torch.tensor([[tokenizer.document_start]], device=device)
        n = config.sample_bytes
        tokens = model.generate(prompt, n, temperature=SAMPLE_TEMPERATURE, generator=generator)
        return printable(tokenizer.decode(tokens[0, 1:]))


def with_tokens_of(corpus: Corpus, config: TrainConfig) -> GPTConfig:
    """The model's shape, with at least the tokenizer's vocabulary. Raises ConfigError where --init's has another."""
    tokens = corpus.tokenizer.vocab_size
    strange = tokens > config.model.vocab_size or (config.tokenizer == "bytes" and tokens != config.model.vocab_size)
    if config.init is not None and config.resume is None and strange:
        raise ConfigError(
            f"--tokenizer {config.tokenizer} has {tokens} tokens, the model in {config.init} {config.model.vocab_size}:"
            f" give its own, {config.init / TOKENIZER}"
        )
    return replace(config.model, vocab_size=max(config.model.vocab_size, tokens))


def read(config: TrainConfig) -> Corpus:
    """The text as tokens: bytes in memory, others mapped from the cache."""
    if config.tokenizer == "bytes":
        return load_corpus(config.data, config.model.context)
    corpus = prepare(config.data, config.tokenizer, config.cache.expanduser())
    corpus.require_windows(config.model.context)
    return corpus
