"""How much memory a rank will need at the peak of a step.

Left out: what passes within an operation (a layer's output, a gradient until it is packed), a few bytes for each
parameter and for each token, the interpreter with torch, and the whole model, which every rank makes before it is
divided. What compiled blocks keep (--compile) is not known; the plan is that of blocks as they are written.
"""

import os

from pycoll.buckets.bucket import wire_bytes
from pycoll.models.stage import GPTStage
from pycoll.train.config import DTYPES, TrainConfig
from pycoll.train.planned_part import Part, activation_bytes, itemsize, passed_on_bytes
from pycoll.tuning import Config

MOST_CHANNELS = 4  # csrc/cpu/attach.cpp


def memory_of(part: Part, config: TrainConfig) -> dict[str, int]:
    """Bytes by what they are for, of a rank with this part of the model."""
    sharded = config.updater == "sharded"
    elements = sum(part.buckets)  # with the padding to whole units
    accumulates = config.grad_accum > 1 or config.pp > 1
    wire_dtype = DTYPES[config.wire_dtype]
    wire = sum(wire_bytes(bucket, wire_dtype) for bucket in part.buckets)
    is_wide = config.wire_dtype == "float32"
    added_up = 0 if is_wide or (sharded and not accumulates) else 4 * elements
    as_computed = 0 if is_wide or accumulates else part.n_parameters * itemsize(config)
    states = 2 + (config.dtype != "float32")
    return {
        "parameters": (elements if sharded else part.n_parameters) * itemsize(config),
        "gradients that travel": wire + (4 * elements if config.wire_dtype == "int8" else 0),
        "gradients as computed": as_computed,
        "gradients added up": added_up,
        "optimizer": 4 * states * (elements // config.dp if sharded else part.n_parameters),
        "activations": _activations(part, config),
        "passed on by stages": _passed_on(part, config),
        "communicators": _communicators(config),
    }


def _activations(part: Part, config: TrainConfig) -> int:
    """What autograd keeps of passes whose backward is to come.

    As Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4, count it,
    by what torch's operations on the CPU save of the blocks here.
    """
    kept = _most_in_flight([_kept_by_stage(stage, part, config) for stage in part.stages], part, config)
    if not config.checkpoint_activations:
        return kept
    head = _kept_by_head(part, config) if part.stages[-1].is_last else 0  # gone when blocks are computed again
    return kept + max(_inside_block(config) - head, 0)


def _passed_on(part: Part, config: TrainConfig) -> int:
    """torch.distributed.pipelining has a buffer for each activation and each gradient that arrives, and keeps outputs
    until their backward pass."""
    if config.pp == 1:
        return 0
    size = passed_on_bytes(config)
    inner = sum((not stage.is_first) + (not stage.is_last) for stage in part.stages)
    scores = config.batch_size * config.model.context * part.token_rows * itemsize(config)
    held = []
    for stage in part.stages:
        output = size if not stage.is_last else scores if config.tp == 1 else 0  # else autograd keeps them too
        saved = size if not stage.is_first and _keeps_inputs(config) else 0  # a buffer that is counted there
        held.append(output - saved)
    return config.grad_accum * inner * size + _most_in_flight(held, part, config)


def _most_in_flight(stages: list[int], part: Part, config: TrainConfig) -> int:
    """Of passes through a rank's stages, which keep so many bytes each, as the schedule orders them."""
    if config.pp == 1:
        return stages[0]
    n, later = len(stages), config.pp - 1 - part.pp_rank
    total = config.grad_accum * n
    # Forward passes before the first backward pass, as torch.distributed.pipelining has them; then they take turns.
    ahead = {"gpipe": total, "1f1b": later + 1, "interleaved": (n - 1) * config.pp + 2 * later + 1}[config.schedule]
    forward = [stages[i // config.pp % n] for i in range(total)]
    backward = [stages[n - 1 - i // config.pp % n] for i in range(total)]
    now = most = sum(forward[:ahead])
    for begun, ended in zip(forward[ahead:], backward, strict=False):
        now += begun - ended
        most = max(most, now)
    return most


def _kept_by_stage(stage: GPTStage, part: Part, config: TrainConfig) -> int:
    """By a forward pass of it."""
    passed_on = passed_on_bytes(config)
    kept = len(stage.blocks) * (passed_on if config.checkpoint_activations else _inside_block(config))
    if stage.is_first and config.model.dropout:
        kept += passed_on
    if stage.is_last:
        kept += _kept_by_head(part, config)
    return kept


def _kept_by_head(part: Part, config: TrainConfig) -> int:
    tokens = config.batch_size * config.model.context
    scores = tokens * part.token_rows
    # tensor parallel: as they are, and the sum of each token's exponentials; else probabilities and the count
    loss = scores * itemsize(config) + 4 * tokens if config.tp > 1 else 4 * scores + 4
    return _norm(config) + activation_bytes(config) + loss


def _keeps_inputs(config: TrainConfig) -> bool:
    """Whether autograd keeps what the first block reads, rather than a copy in fp32."""
    return config.checkpoint_activations or itemsize(config) == 4


def _inside_block(config: TrainConfig) -> int:
    model, tokens = config.model, config.batch_size * config.model.context
    whole, passed_on = activation_bytes(config), passed_on_bytes(config)
    linear = whole * 2 + whole * 8 // config.tp  # inputs of qkv and expand; of GELU and the second project
    if model.dropout:  # torch's kernel without fused softmax, in fp32: q, k, v; probabilities, what drops, and both
        heads = config.batch_size * model.n_head // config.tp
        attention = 3 * 4 * (tokens * model.d_model // config.tp + heads * model.context**2)
        masks = 2 * passed_on
    else:  # the one that keeps q, k, v and a logarithm a row
        attention = 3 * whole // config.tp + 4 * tokens * model.n_head // config.tp
        masks = 0
    return 2 * _norm(config) + linear + attention + whole // config.tp + masks


def _norm(config: TrainConfig) -> int:
    """What it reads, in fp32, mean and deviation of each token; copies of weights that have 16 bits, or are shared."""
    tokens = config.batch_size * config.model.context // (config.tp if config.sequence_parallel else 1)
    copies = 2 * 4 * config.model.d_model if itemsize(config) < 4 or config.sequence_parallel else 0
    return 4 * tokens * config.model.d_model + 2 * 4 * tokens + copies


def _communicators(config: TrainConfig) -> int:
    """Staging and links on this machine: of the groups that send, and of the buckets' own communicators."""
    world = config.dp * config.tp * config.pp
    groups = {size for size in (config.dp, config.tp, config.pp) if 1 < size < world}
    sizes = [world, *groups, config.dp]
    if config.tp * config.pp > 1:
        sizes.append(config.tp * config.pp)
    return sum(_scratch(size) for size in sizes)


def _scratch(ranks: int) -> int:
    """At most: memory is taken where it is touched."""
    table = Config()
    channels = min(max(len(os.sched_getaffinity(0)) // ranks, 1), MOST_CHANNELS)
    return channels * (2 * table.slot_bytes + 3 * table.link_slots * table.link_bytes)
