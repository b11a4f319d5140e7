"""Shapes of GPTs by name: those of GPT-2 (Radford et al., 2019), and smaller ones that a few CPU cores can train."""

import torch

from pycoll.models.gpt import GPT, GPTConfig

GPT2_VOCAB = 50257

PRESETS = {
    "nano": GPTConfig(),
    "micro": GPTConfig(context=256, n_layer=6, n_head=6, d_model=192),
    "mini": GPTConfig(context=512, n_layer=6, n_head=6, d_model=384),
    "gpt2": GPTConfig(GPT2_VOCAB, 1024, n_layer=12, n_head=12, d_model=768),
    "gpt2-medium": GPTConfig(GPT2_VOCAB, 1024, n_layer=24, n_head=16, d_model=1024),
    "gpt2-large": GPTConfig(GPT2_VOCAB, 1024, n_layer=36, n_head=20, d_model=1280),
    "gpt2-xl": GPTConfig(GPT2_VOCAB, 1024, n_layer=48, n_head=25, d_model=1600),
}
"""Names and shapes, from 0.9 million parameters to 1.6 billion; nano is GPTConfig's default.

Their vocabularies are bytes, and for GPT-2 its own; another tokenizer wants
`dataclasses.replace(PRESETS[name], vocab_size=...)`.
"""


def count_parameters(config: GPTConfig) -> int:
    """Trained values of a model of this shape, the tied matrix counted once, without memory for them."""
    with torch.device("meta"):
        return GPT(config).n_parameters()
