"""A rank of `pycoll bench training`: steps of a GPT, on whole models and on split ones, all contenders in one process.

Arguments: the cases, as `written` has them, and a file to meet.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import pycoll
from pycoll.models import GPT, PRESETS, GPTConfig
from pycoll.tensor_parallel import merge_tensor, parallelize_gpt, vocab_parallel_cross_entropy

from . import ranks, step_models
from .torch_ranks import facts, serve

DATA, TENSOR = "data", "tensor"
PYCOLL, GLOO = "pycoll", "Gloo"
GLOO_DDP, PYCOLL_DDP = "DDP over Gloo", "DDP over pycoll"
RIVAL = {DATA: GLOO_DDP, TENSOR: GLOO}
"""Whom a kind's contenders are compared with: measured first, for others' weights are compared with its own."""
PARTS = ("forward", "backward", "update")
"""Of a step: averages are among what the backward pass does; the update clips before it, where models are whole."""
HEAD = 64  # features of a head of attention
LARGE = "30M"
MODELS = {
    **{name: PRESETS[name] for name in ("nano", "micro", "mini")},
    LARGE: GPTConfig(vocab_size=4096, context=64, n_layer=9, n_head=8, d_model=512),
}
"""Shapes with a name: the trainer's, and 30.5 million weights for so few tokens that gradients weigh as much."""


def parse_shape(text: str) -> tuple[int, int]:
    """d_model and layers of '512x4'. Raises ValueError where it is none, or has no whole number of heads."""
    d_model, _, layers = text.partition("x")
    if not (d_model.isdecimal() and layers.isdecimal()) or not int(d_model) or int(d_model) % HEAD or not int(layers):
        raise ValueError(f"{text!r} is no shape: write d_model, a multiple of {HEAD}, and layers like 512x4")
    return int(d_model), int(layers)


@dataclass(frozen=True)
class Case:
    """What is learned in a step: `batch` sequences of `tokens`, of each rank's own where the kind is DATA.

    `model` is a name in MODELS, or a shape.
    """

    kind: str
    model: str
    batch: int
    tokens: int

    def key(self, who: str) -> ranks.Key:
        """A contender's."""
        return who, self.model, "private", f"{self.kind} {self.batch} x {self.tokens}"

    def has(self, key: ranks.Key) -> bool:
        """Whether it is a contender's of this case."""
        return key == self.key(key[0])

    def config(self) -> GPTConfig:
        """Of the model. Raises ValueError where there is none."""
        if self.model in MODELS:
            return MODELS[self.model]
        d_model, layers = parse_shape(self.model)
        return GPTConfig(context=self.tokens, n_layer=layers, n_head=d_model // HEAD, d_model=d_model)

    def whole(self) -> GPT:
        """The model that everybody begins with."""
        torch.manual_seed(1)
        return GPT(self.config())


def written(cases: Sequence[Case]) -> str:
    """For the ranks' command line."""
    return json.dumps([astuple(case) for case in cases])


class Contender(ABC):
    """A model, its optimizer, and sequences to learn."""

    def __init__(self, case: Case, seed: int) -> None:
        """`seed`: of the sequences."""
        self.case = case
        shape = case.batch, case.tokens + 1
        drawn = torch.randint(case.config().vocab_size, shape, generator=torch.Generator().manual_seed(seed))
        self.tokens, self.targets = drawn[:, :-1], drawn[:, 1:].contiguous()

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean over the tokens."""

    @abstractmethod
    def update(self) -> None:
        """New weights everywhere, and no gradients."""

    @abstractmethod
    def gap(self, rival: Contender) -> float:
        """How far what one step gives is from what it should, as a share. To be called before any other step."""

    def step(self) -> Iterator[float]:
        """The seconds that each of PARTS takes."""
        start = time.perf_counter()
        loss = self.loss()
        forward = time.perf_counter()
        yield forward - start
        loss.backward()
        backward = time.perf_counter()
        yield backward - forward
        self.update()
        yield time.perf_counter() - backward


Make = Callable[[GPT], tuple[nn.Module, step_models.Parts]]


def sharded(model: GPT) -> tuple[nn.Module, step_models.Parts]:
    """What `pycoll train` does by default: pycoll.DataParallel and pycoll.ShardedAdam."""
    parallel = pycoll.DataParallel(model)
    return parallel, step_models.sharded_parts(parallel)


def ddp(group: dist.ProcessGroup | None, model: GPT) -> tuple[nn.Module, step_models.Parts]:
    """torch's DistributedDataParallel with its fused AdamW."""
    parallel = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    return parallel, step_models.torch_parts(list(model.parameters()), step_models.torch_fused)


class WholeModel(Contender):
    """Each rank has the whole model, and its own sequences: gradients are averaged, clipped and applied."""

    def __init__(self, case: Case, make: Make) -> None:
        super().__init__(case, seed=dist.get_rank())
        self.model = case.whole()
        self._parallel, self._parts = make(self.model)

    def loss(self) -> Tensor:
        scores = self._parallel(self.tokens)  # (B, T, V)
        return F.cross_entropy(scores.flatten(0, 1), self.targets.flatten())

    def update(self) -> None:
        for part in ("clip", "update", "zero_grad"):
            self._parts[part]()

    @torch.no_grad()
    def change(self) -> Tensor:
        """What steps have added to all weights, (N,)."""
        pairs = zip(self.model.parameters(), self.case.whole().parameters(), strict=True)
        return torch.cat([(now - start).flatten() for now, start in pairs])

    def gap(self, rival: Contender) -> float:
        """Of the change of all weights, from the rival's: the difference's norm as a share of the rival's."""
        assert isinstance(rival, WholeModel)
        list(self.step())
        self.first = self.change()
        return float((self.first - rival.first).norm() / rival.first.norm())


class SplitModel(Contender):
    """Each rank has a part of the model; all learn the same sequences."""

    def __init__(self, case: Case, group: dist.ProcessGroup | None) -> None:
        super().__init__(case, seed=0)
        self.group = group
        self.model = parallelize_gpt(case.whole(), group)
        self._optimizer = pycoll.FusedAdam(self.model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        vocabulary = self.case.config().vocab_size
        scores = self.model(self.tokens)
        return vocab_parallel_cross_entropy(scores, self.targets, self.group, vocab_size=vocabulary).mean()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gap(self, rival: Contender) -> float:
        """Of the gradients, from a whole model's, whoever the rival is: the largest, as a share of the norms."""
        whole = self.case.whole()
        F.cross_entropy(whole(self.tokens).flatten(0, 1), self.targets.flatten()).backward()
        self.loss().backward()
        gaps = []
        for param, source in zip(self.model.parameters(), whole.parameters(), strict=True):
            assert param.grad is not None and source.grad is not None
            difference = merge_tensor(param, param.grad) - source.grad
            # Of a bias of keys nothing but rounding is left: its share of its own norm would say nothing.
            gaps.append(difference.norm() / source.grad.norm().clamp(min=1e-3))
        self._optimizer.zero_grad()
        return float(torch.stack(gaps).max())


def contenders(case: Case, gloo: dist.ProcessGroup) -> dict[ranks.Key, Callable[[], Contender]]:
    """Who takes part, the rival first; the default group is pycoll's."""
    if case.kind == TENSOR:
        return {case.key(who): partial(SplitModel, case, group) for who, group in ((GLOO, gloo), (PYCOLL, None))}
    makes: dict[str, Make] = {GLOO_DDP: partial(ddp, gloo), PYCOLL_DDP: partial(ddp, None), PYCOLL: sharded}
    return {case.key(who): partial(WholeModel, case, make) for who, make in makes.items()}


@dataclass
class TrainingRank:
    """Serves the driver of a benchmark as ranks.Rank does, with steps of a model.

    Attributes:
        rank: of this process.
        gloo: a group over it.
        cases: what is measured.
        parts, gap: found so far, by contender: median seconds of each of PARTS; the largest of all ranks' gaps.
    """

    rank: int
    gloo: dist.ProcessGroup
    cases: Sequence[Case]
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    gap: dict[str, float] = field(default_factory=dict)

    def serve(self) -> None:
        """Executes orders until the driver says so, or is gone."""
        self._prepared: dict[ranks.Key, tuple[Contender, list[list[float]]]] = {}
        self._makes = {key: make for case in self.cases for key, make in contenders(case, self.gloo).items()}
        ranks.serve(
            self.rank,
            {
                "contenders": lambda: list(self._makes),
                "facts": lambda: {**facts(), "parts": self.parts, "gap": self.gap},
                "prepare": self._prepare,
                "check": self._check,
                "time": self._time,
                "release": self._release,
            },
        )

    def _prepare(self, key: ranks.Key, count: int, dtype: str) -> None:
        self._prepared[key] = self._makes[key](), []

    def _check(self, key: ranks.Key) -> None:
        contender, _ = self._prepared[key]
        case = contender.case
        rival, _ = self._prepared[case.key(RIVAL[case.kind])]
        own = torch.tensor(contender.gap(rival))
        gaps = [torch.empty(()) for _ in range(dist.get_world_size())]
        dist.all_gather(gaps, own, group=self.gloo)
        self.gap[" ".join(key)] = float(torch.stack(gaps).max())  # NaN where one is

    def _time(self, key: ranks.Key, calls: int) -> float:
        contender, parts = self._prepared[key]
        if contender.case.kind == TENSOR:
            list(contender.step())  # the weights come back to the caches, which a step of many tokens fills anyway
        dist.barrier()
        gc.disable()
        parts += [list(contender.step()) for _ in range(calls)]
        gc.enable()
        return sum(map(sum, parts[-calls:]))

    def _release(self, key: ranks.Key) -> None:
        _, parts = self._prepared.pop(key)
        medians = [statistics.median(seconds) for seconds in zip(*parts, strict=True)]
        self.parts[" ".join(key)] = dict(zip(PARTS, medians, strict=True))


def training_rank(cases: Sequence[Case], store: dist.Store, rank: int, world_size: int) -> TrainingRank:
    """All contenders in each case."""
    dist.init_process_group("pycoll", store=store, rank=rank, world_size=world_size)
    return TrainingRank(rank, dist.new_group(backend="gloo"), cases)


if __name__ == "__main__":
    serve(partial(training_rank, [Case(*values) for values in json.loads(sys.argv[1])]))
