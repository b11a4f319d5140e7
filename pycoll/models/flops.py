"""Floating-point operations of training a GPT, and how much of what a machine could do they are.

Follows "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022), appendix B.
"""

import time

import torch

from pycoll.errors import UsageError
from pycoll.models.gpt import GPTConfig

_TRIALS = 5
DATASHEETS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""FLOP/s of bf16 and fp16 products of dense matrices, as NVIDIA's datasheets have them, by the name that CUDA gives."""


def training_flops_per_token(config: GPTConfig, tokens: int | None = None) -> int:
    """6 N + 12 L H Q T: operations of a forward and a backward pass for each token of sequences of T = `tokens`.

    A multiplication and an addition are two. N counts the weights that tokens are multiplied by: the matrices of the L
    blocks, and the embedding in its second use, as the head; neither biases, norms and positions, nor the look-up.
    12 L H Q T are the scores and the sums that they weight, for H heads of Q features. As in PaLM, attention counts
    in full although a causal mask leaves half of it out, and activations computed again (checkpointing) do not count.

    `tokens` is the model's context by default. Raises UsageError where it is less than 1 or more than the context.
    """
    length = config.context if tokens is None else tokens
    if not 1 <= length <= config.context:
        raise UsageError(f"sequences of {length} tokens: give 1 to {config.context}, the model's context")
    weights = 12 * config.n_layer * config.d_model**2 + config.vocab_size * config.d_model
    return 6 * weights + 12 * config.n_layer * config.d_model * length


def model_flops_utilization(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """MFU: the share of `peak` FLOP/s, of all processors together, that all ranks' `tokens_per_s` need at least."""
    return tokens_per_s * flops_per_token / peak


def measured_peak(
    dtype: torch.dtype = torch.float32, size: int | None = None, device: torch.device | str = "cpu"
) -> float:
    """FLOP/s in the fastest of some products of (size, size) matrices, by this process's threads or on a GPU.

    What a machine can really do, where its vendor's figure is unknown or out of reach. Ranks that share a machine's CPU
    measure at the same time, and their sum is its peak. It takes about a tenth of a second.

    Args:
        dtype: of the matrices.
        size: by default 1024 on the CPU, and 4096 on a GPU, which has less to compute otherwise than it could.
        device: where they lie.
    """
    gpu = torch.device(device).type == "cuda"
    size = size or (4096 if gpu else 1024)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.mm(left, right) if gpu else None  # the first one also chooses and loads a kernel
    fastest = float("inf")
    for _ in range(_TRIALS):
        if gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right, out=product)
        if gpu:
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of one processor, a GPU or this process's threads, and in words whose figure that is.

    In 16 bits it is the datasheet's, where the GPU is one of DATASHEETS, else `measured_peak`.
    """
    bits = torch.finfo(dtype).bits
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if bits == 16 and name in DATASHEETS:
            return DATASHEETS[name], f"{DATASHEETS[name] / 1e12:.0f} TFLOP/s, {name}'s datasheet (dense bf16)"
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return measured_peak(dtype, device=device), f"{short} matrix products' FLOP/s"
