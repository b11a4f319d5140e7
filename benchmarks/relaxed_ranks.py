"""The ranks of `pycoll bench relaxed`: one model, trained by each way in which ranks can train together."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll import DataParallel, FusedAdam
from pycoll.data import Corpus, WindowSampler, load_corpus, share, spread_windows, windows_at
from pycoll.models import GPT
from pycoll.relaxed import DiLoCo, LocalSGD, ParameterServer
from pycoll.train import TrainConfig
from pycoll.train.optimization import adam_settings, learning_rate, set_learning_rate

from .convergence import MODEL

REFERENCE = "synchronous"
POINTS = 40
"""Of a curve."""


@dataclass
class RelaxedBench:
    """Trains a small GPT on the Python standard library's source by each way in which ranks can train together."""

    steps: int = 600
    """Of each rank in each run."""
    every: int = 50
    """Steps between two meetings of local SGD and DiLoCo."""
    seeds: int = 2
    """Runs of each way; a seed draws the first weights and the windows."""
    ranks: int = 2
    """Processes."""
    batch_size: int = 8
    """Sequences of a rank in a step."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """A twentieth of the steps, from one seed: no conclusions."""


@dataclass(frozen=True)
class Way:
    """A model that is trained in one way, on one rank.

    Attributes:
        model: what computes the loss whose gradients count.
        optimizer: whose learning rate is set before each step.
        step: updates the weights by the gradients.
        finish: after the last step: the weights are the same on all ranks.
        sent, received: bytes of gradients or weights to the other ranks, and from them, in a step on average.
        ahead: steps of this rank that the slowest has not made.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    finish: Callable[[], object]
    sent: float
    received: float
    ahead: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class Run:
    """One run: training losses in nats a byte, means over ranks and the steps since the point before; then, how it was.

    Attributes:
        tokens: of all ranks, at each point.
        final: validation loss of the weights in which all ranks end.
        sent, received: bytes of a rank in a step, as of `Way`.
        ahead: of the slowest, in steps, on average over ranks and steps.
    """

    case: str
    seed: int
    tokens: list[int]
    losses: list[float]
    final: float
    sent: float
    received: float
    ahead: float


def synchronous(model: nn.Module, config: TrainConfig) -> Way:
    """Gradients are averaged in every step."""
    parallel = DataParallel(model)
    optimizer = FusedAdam(**adam_settings(model, config))
    share = (config.dp - 1) / config.dp
    buckets = parallel.buckets.buckets
    sent, received = sum(b.wire.nbytes for b in buckets), sum(b.gradients.nbytes for b in buckets)

    def step() -> None:
        optimizer.clip_grad_norm(config.clip)
        optimizer.step()

    return Way(parallel, optimizer, step, lambda: None, sent * share, received * share)


def periodic(make: Callable[[torch.optim.Optimizer], LocalSGD | DiLoCo], model: nn.Module, config: TrainConfig) -> Way:
    """Ranks clip and step alone, and meet from time to time."""
    optimizer = FusedAdam(**adam_settings(model, config))
    meetings = make(optimizer)

    def step() -> None:
        optimizer.clip_grad_norm(config.clip)
        optimizer.step()
        meetings.step()

    sent, received = meetings.bytes_sent / meetings.every, meetings.bytes_received / meetings.every
    return Way(model, optimizer, step, meetings.synchronize, sent, received)


def asynchronous(staleness: int, model: nn.Module, config: TrainConfig) -> Way:
    """Ranks clip alone, and the servers step as gradients come."""
    optimizer = FusedAdam(**adam_settings(model, config))
    server = ParameterServer(optimizer, staleness=staleness)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        server.step()

    def finish() -> None:
        with server:
            pass

    def ahead() -> int:
        return max(0, server.steps - min(server.clocks))

    return Way(model, optimizer, step, finish, server.bytes_sent, server.bytes_received, ahead)


def cases(every: int) -> dict[str, Callable[[nn.Module, TrainConfig], Way]]:
    """By name; the first is what the others are compared with."""
    int8 = partial(DiLoCo, every=every, wire_dtype=torch.int8)
    return {
        REFERENCE: synchronous,
        f"local SGD, every {every}": partial(periodic, partial(LocalSGD, every=every)),
        f"DiLoCo, every {every}": partial(periodic, partial(DiLoCo, every=every)),
        f"DiLoCo, every {every}, int8": partial(periodic, int8),
        **{f"asynchronous, staleness {n}": partial(asynchronous, n) for n in (0, 2, 8)},
    }


def settings(config: RelaxedBench, seed: int) -> TrainConfig:
    """Of one run."""
    return TrainConfig(
        device="cpu",
        dp=config.ranks,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        model=MODEL,
        sample_bytes=0,
    )


def train(rank: int, way: Way, config: TrainConfig, corpus: Corpus) -> tuple[list[float], float]:
    """The losses of this rank's steps, and how far it was ahead of the slowest on average."""
    losses, aheads = [], []
    sampler = WindowSampler(len(corpus.train), MODEL.context, config.seed)
    count = config.dp * config.batch_size
    for step in range(config.steps):
        set_learning_rate(way.optimizer, learning_rate(step, config))
        starts = share(sampler.take(step * count, count), rank, config.dp)
        way.optimizer.zero_grad()
        loss = loss_of(way.model, *windows_at(corpus.train, MODEL.context, starts))
        loss.backward()
        aheads.append(way.ahead())
        way.step()
        losses.append(loss.item())
    return losses, statistics.mean(aheads)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """(B, T), (B, T) -> mean cross-entropy in nats a byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, corpus: Corpus, windows: int) -> float:
    """In nats a byte."""
    starts = spread_windows(corpus.validation, MODEL.context, windows)
    parts = [windows_at(corpus.validation, MODEL.context, some) for some in starts.split(32)]
    return sum(loss_of(model, *part).item() * len(part[0]) for part in parts) / len(starts)


def train_all(rank: int, config: RelaxedBench, folder: Path) -> None:
    """One rank of all runs, in a process of its own; rank 0 writes each run's file."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ranks))
    dist.init_process_group("pycoll", init_method=f"file://{folder}/store", rank=rank, world_size=config.ranks)
    corpus = load_corpus(None, MODEL.context)
    for case, seed, path in planned(config, folder):
        common = settings(config, seed)
        torch.manual_seed(seed)
        model = GPT(MODEL)
        way = cases(config.every)[case](model, common)
        dist.barrier()  # so that all begin at once
        losses, ahead = train(rank, way, common, corpus)
        way.finish()
        found = torch.tensor([*losses, ahead])
        dist.all_reduce(found, dist.ReduceOp.AVG)
        if rank == 0:
            tokens, curve = _curve(found[:-1], config.ranks * config.batch_size * MODEL.context)
            final = validation_loss(model, corpus, 16 if config.quick else 256)
            run = Run(case, seed, tokens, curve, final, way.sent, way.received, found[-1].item())
            path.write_text(json.dumps(asdict(run)))
    dist.barrier()
    dist.destroy_process_group()


def planned(config: RelaxedBench, folder: Path) -> list[tuple[str, int, Path]]:
    """Case, seed and file of each run; seed by seed, so that what else happens on the machine hits all alike."""
    return [
        (case, seed, folder / f"{seed}-{index}.json")
        for seed in range(config.seeds)
        for index, case in enumerate(cases(config.every))
    ]


def _curve(losses: Tensor, tokens_per_step: int) -> tuple[list[int], list[float]]:
    """Tokens, and the mean of the steps since the point before, at no more than POINTS points."""
    parts = losses.split(max(1, len(losses) // POINTS))
    steps = torch.tensor([len(part) for part in parts]).cumsum(0)
    return (steps * tokens_per_step).tolist(), [part.mean().item() for part in parts]
