"""Layers that split a Transformer over the ranks of a torch.distributed process group, for any model and for our GPT.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019; with
`sequence_parallel`, Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.

functions: the collectives, each with its adjoint as derivative; layers: linear layers, embedding and norm; loss: the
cross-entropy of logits that no rank has whole; random: dropout on several ranks; state: what is split how, and whole
again; gpt: all of it applied to pycoll.models.GPT.

All ranks of the group make the same calls, forward and backward, on the same tokens, and begin with the same weights
and the same random state. Then replicated tensors, and their gradients, are the same on all of them.
"""

from pycoll.tensor_parallel.functions import (
    all_gather,
    copy,
    copy_together,
    gather,
    reduce,
    reduce_scatter,
    split,
)
from pycoll.tensor_parallel.gpt import parallelize_gpt
from pycoll.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    VocabParallelEmbedding,
)
from pycoll.tensor_parallel.loss import vocab_parallel_cross_entropy
from pycoll.tensor_parallel.random import DifferentDraws, different_draws
from pycoll.tensor_parallel.state import (
    full_state_dict,
    is_split,
    load_full_state_dict,
    merge_tensor,
    split_tensor,
)

__all__ = [
    "ColumnParallelLinear",
    "DifferentDraws",
    "RowParallelLinear",
    "SequenceParallelLayerNorm",
    "VocabParallelEmbedding",
    "all_gather",
    "copy",
    "copy_together",
    "different_draws",
    "full_state_dict",
    "gather",
    "is_split",
    "load_full_state_dict",
    "merge_tensor",
    "parallelize_gpt",
    "reduce",
    "reduce_scatter",
    "split",
    "split_tensor",
    "vocab_parallel_cross_entropy",
]
