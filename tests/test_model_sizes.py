"""Sizes of models: parameters against the published numbers, operations against those that torch counts."""

import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pycoll.errors import UsageError
from pycoll.models import (
    GPT,
    PRESETS,
    GPTConfig,
    count_parameters,
    measured_peak,
    model_flops_utilization,
    training_flops_per_token,
)

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
"""Of the models that OpenAI released, as Hugging Face counts them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_gpt2_has_as_many_parameters_as_published(name: str) -> None:
    assert count_parameters(PRESETS[name]) == PUBLISHED[name]


def test_small_ones_grow_from_the_default() -> None:
    assert PRESETS["nano"] == GPTConfig()
    counts = [count_parameters(config) for config in PRESETS.values()]
    assert counts == sorted(counts)
    assert counts[0] == GPT(GPTConfig()).n_parameters()
    assert [round(count / 1e6, 1) for count in counts[:3]] == [0.9, 2.8, 10.9]


@pytest.mark.parametrize("tokens", [16, 5])
def test_operations_are_those_that_torch_counts(tokens: int) -> None:
    config = GPTConfig(vocab_size=70, context=16, n_layer=3, n_head=2, d_model=24)
    model, inputs = GPT(config), torch.zeros(4, tokens, dtype=torch.int64)
    # Attention out of plain products: the fused kernel counts its scores once more, as it computes them again.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten()).backward()
    assert training_flops_per_token(config, tokens) == counter.get_total_flops() / inputs.numel()


def test_operations_of_gpt2() -> None:
    config = PRESETS["gpt2"]
    flops = training_flops_per_token(config)
    assert flops == training_flops_per_token(config, 1024)
    assert flops == pytest.approx(6 * PUBLISHED["gpt2"] + 12 * 12 * 768 * 1024, rel=0.01)
    assert model_flops_utilization(1e5, flops, 2 * 1e5 * flops) == pytest.approx(0.5)
    with pytest.raises(UsageError, match="sequences of 1025 tokens: give 1 to 1024"):
        training_flops_per_token(config, 1025)
    assert training_flops_per_token(replace(config, dropout=0.5)) == flops


def test_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0, 30.0, 37.0, 40.0, 45.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    assert measured_peak(size=100) == 2 * 100**3 / 2.0
