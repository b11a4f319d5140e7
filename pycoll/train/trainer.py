"""What each rank of a training run does: torch's DistributedDataParallel around the model, over the chosen backend."""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pycoll import checkpoint
from pycoll.data import Corpus, decode, random_windows, spread_windows, windows_at
from pycoll.errors import Error
from pycoll.models.gpt import GPT
from pycoll.train.config import TrainConfig
from pycoll.train.launch import program
from pycoll.train.optimization import learning_rate, make_optimizer, set_learning_rate
from pycoll.train.progress import Reporter
from pycoll.train.stop import StopRequest

SAMPLE_TEMPERATURE = 0.8
DRAWN_FROM = ("nproc", "batch_size", "grad_accum", "seed")
"""Settings on which the windows of a step depend."""


@dataclass(frozen=True)
class StepResult:
    """One step as all ranks agree on it."""

    loss: float
    """Mean over the windows of all ranks, in nats a byte."""
    norm: float
    """Norm of the gradient before clipping."""
    stop: bool
    """Some rank was asked to stop."""


class Trainer:
    """A run from its first step, or from a checkpoint's, to the last. Needs torch.distributed to be initialised."""

    def __init__(self, config: TrainConfig, corpus: Corpus, out: Path) -> None:
        self.config, self.corpus, self.out = config, corpus, out
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.seed)
        self.model = GPT(config.model)
        self.optimizer = make_optimizer(self.model, config)
        self.done, self.first_loss = 0, math.nan
        self.changed: list[str] = []
        """Settings of DRAWN_FROM in which this run differs from the one it resumes."""
        if config.resume is not None:
            header = checkpoint.read_header(config.resume)
            checkpoint.load(config.resume, self.model, self.optimizer)
            self.done, self.first_loss = header.step, header.first_loss
            self.changed = [name for name in DRAWN_FROM if header.config.get(name) != self._drawn_from(name)]
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.tokens_per_step = self.world * config.grad_accum * config.batch_size * config.model.context
        self.seconds = 0.0
        """Time inside steps, without evaluations and checkpoints."""

    def run(self, stop: StopRequest) -> None:
        """Trains to the end, or until `stop` was asked of any rank; saves either way."""
        reporter = Reporter(self.out, self.done, self.config.steps, self.tokens_per_step) if self.rank == 0 else None
        try:
            self._settle_buckets()
            self._introduce(reporter)
            began, resumed_at = time.monotonic(), self.done
            while self.done < self.config.steps and not self._advance(reporter, stop):
                pass
            loss = self._evaluate(reporter, stop) if self.done == self.config.steps else None
            if loss is not None:
                if reporter:
                    self._conclude(reporter, loss, time.monotonic() - began, self.done - resumed_at)
            elif reporter:
                reporter.close()
                reporter.note(f"stopped after step {self.done}; continue with: {program()} --resume {self.out}")
        finally:
            if reporter:
                reporter.close()
        dist.barrier()  # Ranks leave together, when none of their tensors is in a backend's thread any more.

    def _drawn_from(self, name: str) -> int:
        return self.world if name == "nproc" else getattr(self.config, name)

    def _advance(self, reporter: Reporter | None, stop: StopRequest) -> bool:
        """One step and what is due after it; true if a rank was asked to stop."""
        result = self._step(stop)
        if not math.isfinite(result.loss + result.norm):  # Not to be saved, hence before anything else.
            numbers = f"loss {result.loss}, norm of the gradient {result.norm}"
            raise Error(f"step {self.done} failed ({numbers}): start again, or resume, with a smaller --lr")
        if self.done == 1:
            self.first_loss = result.loss
        last = self.done == self.config.steps
        if reporter:
            reporter.step(self.done, result.loss, self.optimizer.param_groups[0]["lr"], result.norm)
        stopped = result.stop
        if self.done % self.config.eval_every == 0 and not last and not stopped:
            stopped = self._evaluate(reporter, stop) is None
        if self.done % self.config.checkpoint_every == 0 or last or stopped:
            self._save()
        return stopped

    def _step(self, stop: StopRequest) -> StepResult:
        began = time.monotonic()
        config = self.config
        self._seed_step()
        set_learning_rate(self.optimizer, learning_rate(self.done, config))
        inputs, targets = self._windows()  # (grad_accum, batch_size, context) each
        total = torch.zeros(())
        for micro in range(config.grad_accum):
            last = micro == config.grad_accum - 1
            with nullcontext() if last else self.ddp.no_sync():
                loss = _cross_entropy(self.ddp(inputs[micro]), targets[micro]) / config.grad_accum
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        shared = torch.stack((total / self.world, torch.tensor(float(stop.received is not None))))
        dist.all_reduce(shared)  # All ranks must stop after the same step.
        self.seconds += time.monotonic() - began
        return StepResult(float(shared[0]), float(norm), bool(shared[1] > 0))

    def _seed_step(self) -> None:
        """Dropout follows from seed, step and rank, so that no generator's state has to be saved."""
        seed = np.random.SeedSequence((self.config.seed, self.done, self.rank)).generate_state(1)
        torch.manual_seed(int(seed[0]))

    def _windows(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the windows that all ranks draw for this step."""
        config = self.config
        text, context = self.corpus.train, config.model.context
        shape = (self.world, config.grad_accum, config.batch_size)
        starts = random_windows(text, context, (config.seed, self.done), shape)
        return windows_at(text, context, starts[self.rank])

    def _settle_buckets(self) -> None:
        """Lets DDP sort its buckets before the first step rather than after it.

        It does so after the first backward pass of a process, which changes the order in which a ring adds: a resumed
        run would differ from one that never stopped.
        """
        inputs, targets = self._windows()
        _cross_entropy(self.ddp(inputs[0]), targets[0]).backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _evaluate(self, reporter: Reporter | None, stop: StopRequest) -> float | None:
        """Validation loss in nats a byte over the same windows each time, shared out among the ranks.

        None if a rank was asked to stop meanwhile.
        """
        config = self.config
        text, context = self.corpus.validation, config.model.context
        starts = spread_windows(text, context, config.eval_windows)[self.rank :: self.world]
        total = torch.zeros(3, dtype=torch.float64)  # sum of the losses, number of bytes, ranks that were asked to stop
        self.model.eval()
        for first in range(0, len(starts), config.batch_size):
            if stop.received is not None:
                total[2] = 1
                break
            inputs, targets = windows_at(text, context, starts[first : first + config.batch_size])
            mean = float(_cross_entropy(self.model(inputs), targets))
            total[0] += mean * targets.numel()
            total[1] += targets.numel()
        self.model.train()
        dist.all_reduce(total)
        if total[2] > 0:
            return None
        loss = float(total[0] / total[1])
        if reporter:
            reporter.validation(self.done, loss)
        return loss

    def _save(self) -> None:
        if self.rank == 0:
            config = replace(self.config, nproc=self.world)  # torchrun's number may be another than the default
            settings = (asdict(config.model), config.to_dict())
            header = checkpoint.Header(self.done, *settings, self.corpus.digest, self.first_loss)
            checkpoint.save(self.out, header, self.model, self.optimizer)

    def _introduce(self, reporter: Reporter | None) -> None:
        if reporter is None:
            return
        train, validation = len(self.corpus.train), len(self.corpus.validation)
        reporter.note(f"text: {self.corpus.name}, {train:,} bytes to train on and {validation:,} to validate")
        reporter.note(
            f"model: {self.model.n_parameters():,} parameters; {self.world} ranks of {torch.get_num_threads()} threads,"
            f" gradients through {dist.get_backend()}; {self.tokens_per_step:,} tokens a step"
        )
        reporter.note(f"run: {self.out}" + (f", from step {self.done}" if self.done else ""))
        if self.changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.changed)
            reporter.note(f"{names} differs from before: it goes on with other windows, not as it would have")
        reporter.start()

    def _conclude(self, reporter: Reporter, loss: float, seconds: float, steps: int) -> None:
        reporter.close()
        if self.config.sample_bytes:
            prompt = torch.tensor([[ord("\n")]])
            generator = torch.Generator().manual_seed(self.config.seed)
            n = self.config.sample_bytes
            tokens = self.model.generate(prompt, n, temperature=SAMPLE_TEMPERATURE, generator=generator)
            reporter.sample(decode(tokens[0, 1:]))
        unigram = self.corpus.unigram_cross_entropy()
        speed = steps * self.tokens_per_step / self.seconds
        waiting = self._waiting_share()
        reporter.summary(
            {
                "unigram cross-entropy": (f"{unigram:.3f} nats/byte, by counting bytes", unigram),
                "first training loss": (f"{self.first_loss:.3f} nats/byte", self.first_loss),
                "final validation loss": (f"{loss:.3f} nats/byte", loss),
                "seconds": (f"{seconds:.0f}, of them {self.seconds:.0f} in {steps} steps", seconds),
                "tokens/s": (f"{speed:,.0f}", speed),
                "waiting for gradients": (f"{waiting:.1%} of rank 0's steps", waiting),
            }
        )
        reporter.note(f"{self.out} holds the checkpoints; curves: tensorboard --logdir {self.out}")

    def _waiting_share(self) -> float:
        """Share of the steps in which rank 0 had computed its gradients and waited for their sum, as DDP samples it."""
        times = self.ddp._get_ddp_logging_data()  # in ns, averages over the first steps and then every 100th
        waited = times["avg_backward_comm_time"] - times["avg_backward_compute_comm_overlap_time"]
        computed = times["avg_forward_compute_time"] + times["avg_backward_compute_time"]
        return waited / max(1, computed + waited)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> mean loss in nats, a scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
