"""The GPT: shapes, causality, initialisation, weight tying, learning, sampling."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pycoll.models import GPT, GPTConfig
from pycoll.models.gpt import Embedding, LayerNorm

TINY = GPTConfig(vocab_size=64, context=16, n_layer=2, n_head=2, d_model=32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads only wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 7, 16])
def test_scores_every_token_at_every_position(model: GPT, length: int) -> None:
    assert model(random_tokens(3, length)).shape == (3, length, TINY.vocab_size)


def test_later_tokens_change_nothing_before_them(model: GPT) -> None:
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % TINY.vocab_size
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.all(difference[:9] == 0)
    assert torch.all(difference[9:] > 0)


def test_refuses_more_tokens_than_the_context(model: GPT) -> None:
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        model(random_tokens(1, 17))


def test_initialisation_is_that_of_gpt2() -> None:
    torch.manual_seed(0)
    config = replace(TINY, n_layer=8, d_model=64)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("project.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.1), name
        elif name.endswith("norm.weight"):
            assert torch.all(parameter == 1), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_untrained_model_finds_all_tokens_about_equally_likely(model: GPT) -> None:
    tokens = random_tokens(8, 17)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


def test_head_and_embedding_share_one_matrix(model: GPT) -> None:
    d, layers = TINY.d_model, TINY.n_layer
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    assert model.n_parameters() == (TINY.vocab_size + TINY.context) * d + layers * block + 2 * d
    unused = TINY.vocab_size - 1  # A token that is in no input still gets a gradient, from the scores.
    model(torch.zeros(1, 4, dtype=torch.int64)).logsumexp(-1).sum().backward()
    gradient = model.embedding.token.weight.grad
    assert gradient is not None
    assert gradient[unused].abs().max() > 0


def test_learns_a_sequence_by_heart(model: GPT) -> None:
    tokens = random_tokens(1, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    torch.testing.assert_close(model.generate(tokens[:, :1], 16, top_k=1), tokens)


def test_generation_goes_beyond_the_context_and_follows_its_generator(model: GPT) -> None:
    prompt = random_tokens(2, 3)
    first, again, other = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (2, 23)
    assert torch.equal(first[:, :3], prompt)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_top_k_leaves_only_the_likeliest(model: GPT) -> None:
    prompt = random_tokens(1, 4)
    allowed = set(model(prompt)[0, -1].topk(3).indices.tolist())
    drawn = {model.generate(prompt, 1, top_k=3, temperature=10.0)[0, -1].item() for _ in range(30)}
    assert drawn == allowed


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model = GPT(replace(TINY, dropout=0.5))
    tokens = random_tokens(1, 8)
    assert not torch.equal(model(tokens), model(tokens))
    model.generate(tokens, 1)
    assert model.training, "generate() gives the mode back"
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"d_model": 30, "n_head": 4}, r"d_model \(30\) is not a multiple of n_head \(4\)"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"context": -1}, "context is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_refuses_impossible_shapes(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GPTConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_tokens_are_added_in_fp32(dtype: torch.dtype) -> None:
    """Gradients of the weights of norms, and of an embedding whose rows are used again and again."""
    torch.manual_seed(0)
    norm, embedding = LayerNorm(32).to(dtype), Embedding(GPTConfig(vocab_size=4, context=8, d_model=32)).to(dtype)
    x, upstream = torch.randn(512, 8, 32).to(dtype), torch.rand(512, 8, 32).to(dtype)
    tokens = torch.randint(4, (512, 8))
    normalized = norm(x)
    assert normalized.dtype == dtype
    normalized.backward(upstream)
    embedding(tokens).backward(upstream)
    exact = nn.LayerNorm(32).double()
    exact(x.double()).backward(upstream.double())
    rows = torch.zeros(4, 32, dtype=torch.float64).index_add_(0, tokens.flatten(), upstream.double().flatten(0, 1))
    rounding = torch.finfo(dtype).eps
    for gradient, wanted in (
        (norm.weight.grad, exact.weight.grad),
        (norm.bias.grad, exact.bias.grad),
        (embedding.token.weight.grad, rows),
    ):
        assert gradient is not None and wanted is not None and gradient.dtype == dtype
        assert (gradient.double() - wanted).norm() < rounding * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_score_and_generate_about_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=8, n_layer=2, n_head=2, d_model=32))
    tokens = torch.randint(256, (2, 8))
    scores = model(tokens).detach()
    half = model.to(dtype)(tokens)
    assert half.dtype == dtype
    torch.testing.assert_close(half.detach().float(), scores, rtol=0.05, atol=0.05)
    assert model.generate(tokens[:, :1], 4, generator=torch.Generator().manual_seed(0)).shape == (2, 5)
