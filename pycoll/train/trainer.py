"""What each rank of a training run does, from its settings to the summary; `parallel` is how ranks train together."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pycoll import checkpoint
from pycoll.errors import Error
from pycoll.train import state
from pycoll.train.choose import make_parallel
from pycoll.train.config import DTYPES
from pycoll.train.device import count_gpus, has_room, take_device
from pycoll.train.launch import program, restarted, run_id
from pycoll.train.measure import Meter
from pycoll.train.mesh import Mesh
from pycoll.train.optimization import learning_rate, set_learning_rate
from pycoll.train.plan import make_plan
from pycoll.train.progress import Reporter
from pycoll.train.stop import StopRequest
from pycoll.train.task import Batch, Rows, Task

DRAWN_FROM = ("dp", "batch_size", "grad_accum", "seed")
"""Settings on which the examples of a step depend."""
PART = ("dp", "tp", "pp", "dtype")
"""Settings that say which part of the model is a rank's, and whether its gradients are scaled."""


@dataclass(frozen=True)
class StepResult:
    """One step as all ranks agree on it; as this rank alone knows it, where `Parallel.agrees` says so."""

    loss: float
    """Mean over the batches, in the task's unit."""
    norm: float
    """Norm of the gradient before clipping; not finite where the step was skipped, or has failed."""
    stop: bool
    """Some rank was asked to stop."""


def examples(config: Mapping[str, Any]) -> tuple[int, int]:
    """What follows from DRAWN_FROM: of how many examples a step is, and which."""
    return int(config["dp"]) * int(config["batch_size"]) * int(config["grad_accum"]), int(config["seed"])


def part(config: Mapping[str, Any]) -> list[Any]:
    """What follows from PART: what a rank alone knows is of use to a run in which this is the same."""
    return [config.get(name) for name in PART] + [config.get("schedule") == "interleaved" and config["pp"] > 1]


class Trainer:
    """A run from its first step, or from a checkpoint's, to the last. Needs torch.distributed to be initialised."""

    def __init__(self, task: Task, out: Path) -> None:
        """Raises UsageError where the ranks cannot be divided as the settings say."""
        self.task, self.out = task, out
        self.rank, device = dist.get_rank(), take_device(task.config)
        self.mesh, self.gpus = Mesh(task.config.tp, task.config.pp, device), count_gpus(device)
        self.config = config = replace(task.config, dp=self.mesh.dp)  # torchrun's number may be another one
        torch.manual_seed(config.seed)
        self.meter = Meter(device)
        model = task.make_model()
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.parallel = make_parallel(model, task, self.mesh)
        self.meter.watch(self.parallel.buckets, self.mesh)
        self.done, self.seen, self.first_loss = 0, 0, math.nan
        self.changed: list[str] = []
        """Settings of DRAWN_FROM in which this run differs from the one it resumes."""
        if config.resume is not None:
            header = checkpoint.read_header(config.resume)
            tensors = checkpoint.Tensors(config.resume)
            state.load(tensors, self.parallel.modules, self.parallel.keeper)
            if header.scaler and self.parallel.scaler.is_enabled():
                self.parallel.scaler.load_state_dict(dict(header.scaler))
            own = state.load_own(tensors) if part(header.config) == part(config.to_dict()) else {}
            self.parallel.take_up(tensors, own, header.step)
            self.done, self.seen, self.first_loss = header.step, header.seen, header.first_loss
            if examples(header.config) != examples(config.to_dict()):
                self.changed = [name for name in DRAWN_FROM if header.config.get(name) != getattr(config, name)]
        self.tokens_per_step = task.tokens_per_step(self.mesh)
        self.seconds = 0.0
        """Time inside steps, without evaluations and checkpoints."""
        self.skipped = 0
        """Steps whose scaled gradients overflowed."""

    def run(self, stop: StopRequest) -> None:
        """Trains to the end, or until `stop` was asked of any rank; saves either way."""
        with self.parallel.running():
            self._run(stop)
        dist.barrier()  # Ranks leave together, when none of their tensors is in a backend's thread any more.

    def _run(self, stop: StopRequest) -> None:
        reporter = Reporter(self.out, self.done, self.config.steps, self.tokens_per_step) if self.rank == 0 else None
        try:
            self.parallel.settle(self._batches()[0])
            self._introduce(reporter)
            began, resumed_at = time.monotonic(), self.done
            while self.done < self.config.steps and not self._advance(reporter, stop):
                pass
            verdict = self._evaluate(reporter, stop) if self.done == self.config.steps else None
            if verdict is not None:
                if reporter:
                    self._conclude(reporter, verdict, time.monotonic() - began, self.done - resumed_at)
            elif reporter:
                reporter.close()
                reporter.note(f"stopped after step {self.done}; continue with: {program()} --resume {self.out}")
        except BaseException:
            if reporter:
                with suppress(Error):  # what went wrong first is what counts
                    reporter.close()
            raise

    def _advance(self, reporter: Reporter | None, stop: StopRequest) -> bool:
        """One step and what is due after it; true if a rank was asked to stop."""
        with self.meter.step():
            result = self._step(stop)
        skipped = not math.isfinite(result.norm) and self.parallel.may_skip()
        self.skipped += skipped
        if not (math.isfinite(result.loss) and (skipped or math.isfinite(result.norm))):  # Not to be saved.
            numbers = f"loss {result.loss}, norm of the gradient {result.norm}"
            raise Error(f"step {self.done} failed ({numbers}): start again, or resume, with a smaller --lr")
        if self.done == 1:
            self.first_loss = result.loss
        last = self.done == self.config.steps
        if reporter:
            reporter.step(self.done, result.loss, self.parallel.optimizer.param_groups[0]["lr"], result.norm)
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
        set_learning_rate(self.parallel.optimizer, learning_rate(self.done, config))
        total = self.parallel.accumulate(self._batches())
        norm = self.parallel.step(config.clip)
        self.done += 1
        self.seen += self.task.count(self.seen, self.mesh)
        if not self.parallel.agrees(self.done):
            self.seconds += time.monotonic() - began
            return StepResult(float(total), norm, False)
        share = total / (self.mesh.dp * self.mesh.tp) if self.parallel.knows_loss else torch.zeros_like(total)
        shared = torch.stack((share, torch.full_like(share, float(stop.received is not None))))
        dist.all_reduce(shared)  # All ranks must stop after the same step.
        loss, stopped = shared.tolist()  # A GPU has then done all of the step: nothing else has to wait for it.
        self.seconds += time.monotonic() - began
        return StepResult(loss, norm, stopped > 0)

    def _batches(self) -> list[Batch]:
        """This rank's for the next step, where it computes."""
        return [batch.to(self.mesh.device) for batch in self.task.batches(self.seen, self.mesh)]

    def _seed_step(self) -> None:
        """Dropout follows from seed, step and rank, so that no generator's state has to be saved, the CPU's or a GPU's.
        Tensor-parallel ranks begin alike."""
        place = (self.mesh.dp_rank, self.mesh.pp_rank)
        seed = np.random.SeedSequence((self.config.seed, self.done, *place)).generate_state(1)
        torch.manual_seed(int(seed[0]))

    def _evaluate(self, reporter: Reporter | None, stop: StopRequest) -> dict[str, float] | None:
        """The task's verdict over the same examples each time, shared out among the ranks.

        None if a rank was asked to stop meanwhile.
        """
        self.parallel.meet()
        self.meter.pause()
        totals, stopped = self.task.no_tally().to(self.mesh.device), False
        counts = self.parallel.knows_loss and self.mesh.tp_rank == 0
        for module in self.parallel.modules:
            module.eval()
        for batch in self.task.validation(self.mesh):
            if stopped := self.mesh.any(stop.received is not None):
                break
            here = batch.to(self.mesh.device)
            scores = self.parallel.scores(here)
            if scores is not None:
                totals += self.task.tally(scores, here.targets, self.mesh) * counts
        for module in self.parallel.modules:
            module.train()
        shared = torch.cat((totals, totals.new_full((1,), float(stopped))))
        dist.all_reduce(shared)
        shared = shared.cpu()
        if shared[-1] > 0:
            return None
        verdict = self.task.verdict(shared[:-1])
        if reporter:
            reporter.validation(self.done, verdict)
        return verdict

    def _save(self) -> None:
        self.parallel.meet()
        self.meter.pause()
        tensors = state.gather(self.parallel.modules, self.parallel.keeper, self.mesh)
        tensors |= state.gather_own(self.parallel.own_state())
        if self.rank == 0:
            tensors |= self.parallel.extra_state()
            scaler = self.parallel.scaler.state_dict()
            settings = (self.task.shape(), self.config.to_dict())
            header = checkpoint.Header(
                self.done, self.seen, *settings, self.task.digest, self.first_loss, scaler, run_id()
            )
            checkpoint.save(self.out, header, tensors, keep=self.config.keep)
        dist.barrier()  # Writing may take longer than ranks wait for one another in a step.

    def _introduce(self, reporter: Reporter | None) -> None:
        if reporter is None:
            return
        reporter.note(self.task.description)
        mesh, ranks = self.mesh, f"{dist.get_world_size()} ranks"
        if mesh.divided:
            ranks = f"{mesh.dp} data x {mesh.tp} tensor x {mesh.pp} pipeline parallel ranks"
        reporter.note(
            f"model: {self.n_parameters:,} parameters; {ranks} {self._where()},"
            f" gradients through {dist.get_backend()}; {self.tokens_per_step:,} tokens a step"
        )
        how = f"{self.config.dtype}, gradients travel as {self.config.wire_dtype}"
        if self.config.sync != "step":
            how += f", ranks train together by --sync {self.config.sync}"
        reporter.note(f"optimizer: {self.config.updater}; {how}")
        again = ", started again after a rank had failed" if restarted() else ""
        reporter.note(f"run: {self.out}" + (f", from step {self.done}" if self.done else "") + again)
        if self.changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.changed)
            reporter.note(f"{names} differs from before: it does not go on as it would have")
        if 0 < self.gpus < dist.get_world_size():
            reporter.note("ranks share a GPU: they meet on the host and compute in turns, slower than with one each")
        reporter.start()

    def _where(self) -> str:
        """What the ranks compute on, in words that follow their number."""
        if self.gpus:
            return f"on {self.gpus} x {torch.cuda.get_device_name(self.mesh.device)}"
        return f"of {torch.get_num_threads()} threads"

    def _conclude(self, reporter: Reporter, verdict: dict[str, float], seconds: float, steps: int) -> None:
        reporter.close()
        if (sample := self.task.finish(self._whole_model())) is not None:
            reporter.sample(sample)
        speed = steps * self.tokens_per_step / max(self.seconds, 1e-9)  # none, where all was done before
        unit = self.task.unit
        rows: Rows = {
            **self.task.reference(),
            "first training loss": (f"{self.first_loss:.3f} {unit}", self.first_loss),
            "final validation loss": (f"{verdict['loss']:.3f} {unit}", verdict["loss"]),
            **{f"final {name}": (f"{value:.3f}", value) for name, value in verdict.items() if name != "loss"},
            "seconds": (f"{seconds:.0f}, of them {self.seconds:.0f} in {steps} steps", seconds),
            "tokens/s": (f"{speed:,.0f}", speed),
            **self.task.utilization(speed, self.gpus or dist.get_world_size(), self.mesh.device),
        }
        if (waiting := self.parallel.waiting_share()) is not None:
            rows["waiting for gradients"] = (f"{waiting:.1%} of rank 0's steps", waiting)
        plan = make_plan(self.config)[self.mesh.pp_rank] if self.config.can_be_planned else None
        rows |= self.meter.rows(plan)
        if self.skipped:
            rows["skipped steps"] = (f"{self.skipped}, as scaled gradients overflowed", self.skipped)
        reporter.summary(rows)
        reporter.note(f"{self.out} holds the checkpoints; curves: tensorboard --logdir {self.out}")

    def _whole_model(self) -> nn.Module:
        """As the last checkpoint has it."""
        model = self.task.make_model().to(DTYPES[self.config.dtype] if self.config.updater != "torch" else None)
        written = checkpoint.list_checkpoints(self.out)
        path = written[-1] if written else self.config.resume
        assert path is not None
        state.load_weights(checkpoint.Tensors(path), model)
        size = sum(parameter.nbytes for parameter in model.parameters())
        return model.to(self.mesh.device) if has_room(self.mesh.device, 2 * size) else model
