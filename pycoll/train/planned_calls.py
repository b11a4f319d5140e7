"""Which calls a rank will make in a step, by the trainer's parts as they are written.

Left out: the first step of a process, which measures the norm by calls of its own; steps that a loss scale too large
makes it skip; evaluations and checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pycoll.buckets.bucket import wire_bytes
from pycoll.models.stage import GPTStage
from pycoll.train.config import DTYPES, TrainConfig
from pycoll.train.planned_part import Part, activation_bytes, itemsize, passed_on_bytes
from pycoll.tuning import one_shot_max_bytes


@dataclass(frozen=True)
class Calls:
    """Some of a step, of one name and for one purpose."""

    cause: str
    call: str
    """As traces call it."""
    calls: int
    bytes: int
    """Of this rank's tensors, of all calls, as traces count them: gradients in 8 bits are a byte an element."""
    wire: int
    """What this rank reads from the others' memory, or they write to its own."""


def calls_of(part: Part, config: TrainConfig) -> list[Calls]:
    """Of a rank with this part of the model, in each step."""
    return [some for some in _all_calls(part, config) if some.calls]


def _all_calls(part: Part, config: TrainConfig) -> Iterator[Calls]:
    yield from _update(part, config)
    if config.tp > 1:
        yield from _tensor_parallel(part, config)
    if config.pp > 1:
        yield from _pipeline(part, config)
    yield _collective("loss, stop requests", "all_reduce", config.dp * config.tp * config.pp, 1, 4 * 2)


def _collective(cause: str, call: str, ranks: int, calls: int, size: int) -> Calls:
    """`calls` of them, of `size` bytes each: an all-gather's are of one rank's block, a reduce-scatter's of all."""
    others = ranks - 1
    if call == "all_gather":
        wire = others * size
    elif call == "all_reduce" and size <= one_shot_max_bytes(ranks):
        wire = others * size  # all of each other rank's
    else:
        wire = (2 if call == "all_reduce" else 1) * others * size // ranks
    return Calls(cause, call, calls, calls * size, calls * wire)


def _update(part: Part, config: TrainConfig) -> Iterator[Calls]:
    """Averages and Adam, bucket by bucket: each rank reads its shard of all wires. With ShardedAdam once for the norm
    and once to update, and writes new parameters to all ranks; with FusedAdam once, and writes averages."""
    cause, wire_dtype = "gradients and update", DTYPES[config.wire_dtype]
    elements = sum(part.buckets)
    size = elements * wire_dtype.itemsize
    n, others = len(part.buckets), config.dp - 1
    read = sum(wire_bytes(bucket, wire_dtype) for bucket in part.buckets) * others // config.dp
    if config.updater == "sharded":
        written = elements * itemsize(config) * others // config.dp
        yield Calls(cause, "measure_bucket", n, size, read)
        yield Calls(cause, "update_bucket", n, size, read + written)
    else:
        yield Calls(cause, "reduce_bucket", n, size, read + elements * 4 * others // config.dp)
    # Sums of squares, and which parameters have gradients; the former of all parts of the model.
    yield _collective(cause, "all_reduce", config.dp, 1, 8 * (n + part.bucketed))
    if config.tp * config.pp > 1:
        yield _collective("norm of all parts", "all_reduce", config.tp * config.pp, 1, 8)


def _tensor_parallel(part: Part, config: TrainConfig) -> Iterator[Calls]:
    """Of all passes: what Megatron-LM's f and g do (pycoll/tensor_parallel/functions.py)."""
    for stage in part.stages:
        for cause, per_pass in (("blocks", _in_blocks), ("ends", _beside_blocks)):
            for call, calls, size in per_pass(stage, config):
                yield _collective(f"tensor parallel: {cause}", call, config.tp, calls * config.grad_accum, size)


PerPass = Iterator[tuple[str, int, int]]
"""Collectives of a forward and a backward pass: name, how many, and bytes of each."""


def _in_blocks(stage: GPTStage, config: TrainConfig) -> PerPass:
    """Each block has two pairs of layers, which all ranks enter and leave, forward and backward.

    Where activations are computed again, that ends at the last one that is kept: without dropout before the tokens
    leave the second pair.
    """
    n, width = len(stage.blocks), config.model.d_model
    left_again = (2 if config.model.dropout else 1) * config.checkpoint_activations
    whole = activation_bytes(config)
    if not config.sequence_parallel:
        yield "all_reduce", n * (4 + left_again), whole
        return
    entered_again = 2 * config.checkpoint_activations
    yield "all_gather", n * (4 + entered_again), whole // config.tp
    yield "reduce_scatter", n * (4 + left_again), whole
    yield "all_reduce", 2 * n, 4 * 2 * width  # norms' gradients, in fp32
    yield "all_reduce", 2 * n, itemsize(config) * width  # those of biases


def _beside_blocks(stage: GPTStage, config: TrainConfig) -> PerPass:
    whole, model = activation_bytes(config), config.model
    if stage.is_first:
        if config.sequence_parallel:
            yield "reduce_scatter", 1, whole
            yield "all_gather", 1, whole // config.tp
            positions = model.context // config.tp
            yield "all_gather", 1, positions * model.d_model * itemsize(config)  # their gradients
        else:
            yield "all_reduce", 1, whole
    if stage.is_last:
        if config.sequence_parallel:
            yield "all_gather", 1, whole // config.tp
            yield "reduce_scatter", 1, whole
            yield "all_reduce", 1, 4 * 2 * model.d_model
        else:
            yield "all_reduce", 1, whole
        yield "all_gather", 1, 2 * 4 * config.batch_size * model.context  # of each token's loss two numbers


def _pipeline(part: Part, config: TrainConfig) -> Iterator[Calls]:
    """Activations from stage to stage, gradients back, and those of the tied matrix from its two stages."""
    passes, size = config.grad_accum, passed_on_bytes(config)
    inner = sum(not stage.is_first for stage in part.stages) + sum(not stage.is_last for stage in part.stages)
    n = passes * inner  # sends an activation or a gradient where it gets the other
    yield Calls("pipeline", "send", n, n * size, 0)
    yield Calls("pipeline", "recv", n, n * size, n * size)
    if any(stage.is_first or stage.is_last for stage in part.stages):
        tied = 4 * part.token_rows * config.model.d_model
        yield Calls("tied matrix", "send", 1, tied, 0)
        yield Calls("tied matrix", "recv", 1, tied, tied)
