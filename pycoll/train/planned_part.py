"""Which parameters each rank will have, and in which buckets, before there is a model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycoll.buckets.agreement import divided
from pycoll.buckets.bucket import places
from pycoll.models.gpt import GPT
from pycoll.models.stage import GPTStage
from pycoll.train.config import DTYPES, TrainConfig
from pycoll.tuning import bucket_bytes

SPLIT = ("qkv.weight", "qkv.bias", "project.weight", "expand.weight", "expand.bias", "token.weight")
"""How the names of parameters end that tensor-parallel ranks divide (pycoll.tensor_parallel.parallelize_gpt)."""


@dataclass(frozen=True)
class Part:
    """What a rank at one place of the pipeline has of the model."""

    pp_rank: int
    name: str
    stages: list[GPTStage]
    """Without memory, and not divided by tensor-parallel ranks."""
    n_parameters: int
    buckets: list[int]
    """Elements of each."""
    bucketed: int
    """Parameters in them: tensors."""
    token_rows: int
    """Of the matrix of tokens, where this rank has it."""


def make_parts(config: TrainConfig) -> list[Part]:
    """Of each place in the pipeline, in order."""
    with torch.device("meta"):
        model = GPT(config.model, checkpoint_activations=config.checkpoint_activations)
    return [_make_part(model, config, rank) for rank in range(config.pp)]


def _make_part(model: GPT, config: TrainConfig, pp_rank: int) -> Part:
    count = config.pp * config.stages_per_rank
    stages = [GPTStage(model, index, count) for index in range(pp_rank, count, config.pp)]
    token_rows = math.ceil(config.model.vocab_size / config.tp)
    parameters: list[Tensor] = []
    copies: dict[Tensor, int] = {}
    for name, whole in nn.ModuleList(stages).named_parameters():
        tied, split = name.endswith("token.weight"), name.endswith(SPLIT)
        n = token_rows * config.model.d_model if tied else whole.numel() // (config.tp if split else 1)
        own = torch.empty(n, dtype=DTYPES[config.dtype], device="meta")
        parameters.append(own)
        copies[own] = (1 if split else config.tp) * (2 if tied and config.pp > 1 else 1)
    elements = sum(parameter.numel() for parameter in parameters)
    buckets = divided(parameters[::-1], bucket_bytes(4 * elements), copies.__getitem__)
    return Part(
        pp_rank,
        _name(pp_rank, config),
        stages,
        elements,
        [places(some, config.dp)[1] for some in buckets],
        len(parameters),
        token_rows,
    )


def _name(pp_rank: int, config: TrainConfig) -> str:
    if config.pp == 1:
        return "each rank"
    what = "stage" if config.stages_per_rank == 1 else "stages"
    return f"first {what}" if pp_rank == 0 else f"last {what}" if pp_rank == config.pp - 1 else f"{what} {pp_rank + 1}"


def itemsize(config: TrainConfig) -> int:
    """Of a weight or an activation, in bytes."""
    return DTYPES[config.dtype].itemsize


def activation_bytes(config: TrainConfig) -> int:
    """Of the residual stream of a pass: (B, T, D)."""
    return config.batch_size * config.model.context * config.model.d_model * itemsize(config)


def passed_on_bytes(config: TrainConfig) -> int:
    """Of what a rank has of it between blocks: with sequence parallelism its share of the tokens."""
    return activation_bytes(config) // (config.tp if config.sequence_parallel else 1)
