"""The encoder: padding, empty batches and texts, what its attention reaches, 16 bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.models import Encoder, EncoderConfig

TINY = EncoderConfig(vocab_size=64, context=16, n_layer=2, n_head=2, d_model=32, n_classes=3)
LENGTHS = torch.tensor([16, 9, 1, 0])


@pytest.fixture
def model() -> Encoder:
    """With weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = Encoder(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Encoder, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    scores = model(tokens, lengths)
    F.cross_entropy(scores, torch.arange(len(lengths)) % TINY.n_classes, reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_hand(model: Encoder, text: Tensor) -> Tensor:
    """Scores (C,) of one text (T,), in fp64: softmax and mean written out, and no padding."""
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
            + (weights[f"{name}.bias"])
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embedding.token.weight"][text] + weights["embedding.position.weight"][: len(text)]
    for block in (f"blocks.{i}" for i in range(TINY.n_layer)):
        q, k, v = linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv").chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(y.chunk(TINY.n_head, -1) for y in (q, k, v)), strict=True):
            heads.append((qh @ kh.T / qh.shape[1] ** 0.5).softmax(-1) @ vh)
        x = x + linear(torch.cat(heads, -1), f"{block}.attention.project")
        hidden = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.expand")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"{block}.mlp.project")
    return linear(norm(x, "head.norm").mean(0), "head.score")


@pytest.mark.parametrize("padding", [0, 7])
def test_scores_are_those_of_each_text_alone(model: Encoder, padding: int) -> None:
    """However far it is padded."""
    lengths = torch.tensor([9, 4, 1])
    tokens = random_tokens(3, 9 + padding)
    expected = torch.stack([by_hand(model, text[:n]) for text, n in zip(tokens, lengths, strict=True)])
    assert expected.std(0).min() > 0.01, "else the comparison would say little"
    torch.testing.assert_close(model(tokens, lengths).double(), expected, rtol=1e-4, atol=1e-5)


def test_what_lies_in_the_padding_changes_no_bit(model: Encoder) -> None:
    tokens, other = random_tokens(4, 16), random_tokens(4, 16, seed=2)
    changed = torch.where(torch.arange(16) < LENGTHS.unsqueeze(1), tokens, other)
    assert not torch.equal(tokens, changed)
    assert torch.equal(model(tokens, LENGTHS), model(changed, LENGTHS))
    before, after = gradients(model, tokens, LENGTHS), gradients(model, changed, LENGTHS)
    assert len(before) == len(list(model.parameters()))
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_every_token_reaches_the_scores_of_its_text_alone(model: Encoder) -> None:
    tokens = random_tokens(2, 16)
    before = model(tokens, torch.tensor([16, 16]))
    for place in (0, 8, 15):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % TINY.vocab_size
        after = model(changed, torch.tensor([16, 16]))
        assert torch.all(before[0] != after[0])
        assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 16])
def test_batch_without_texts_has_gradients_of_zero(length: int, dtype: torch.dtype, dropout: float) -> None:
    model = Encoder(replace(TINY, dropout=dropout)).to(dtype)
    tokens, lengths = torch.zeros(0, length, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert model(tokens, lengths).shape == (0, TINY.n_classes)
    left = gradients(model, tokens, lengths)
    assert left.keys() == dict(model.named_parameters()).keys()
    assert all(torch.all(gradient == 0) for gradient in left.values())


@pytest.mark.parametrize("length", [0, 1, 16])
def test_texts_without_tokens_get_finite_numbers(model: Encoder, length: int) -> None:
    """The same for each of them: the head's bias, and what its norm makes of nothing."""
    tokens, lengths = random_tokens(3, length), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(model(tokens, lengths), model.head.score.bias.expand(3, -1))
    for name, gradient in gradients(model, tokens, lengths).items():
        assert torch.all(gradient == 0) or name == "head.score.bias", name
    assert all(torch.all(gradient.isfinite()) for gradient in gradients(model, random_tokens(4, 16), LENGTHS).values())


def test_refuses_more_tokens_than_the_context(model: Encoder) -> None:
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        model(random_tokens(1, 17), torch.tensor([3]))


@pytest.mark.parametrize(
    ("settings", "said"), [({"n_classes": 1}, "n_classes is 1: give at least 2"), ({"n_head": 5}, "not a multiple")]
)
def test_refuses_impossible_shapes(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EncoderConfig(**settings)


def test_untrained_model_finds_all_classes_about_equally_likely() -> None:
    torch.manual_seed(0)
    chances = Encoder(TINY)(random_tokens(8, 16), torch.full((8,), 16)).softmax(-1)
    torch.testing.assert_close(chances, torch.full_like(chances, 1 / 3), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_score_about_the_same(dtype: torch.dtype) -> None:
    """Also a text whose features add up to more than float16 can hold."""
    torch.manual_seed(0)
    model = Encoder(replace(TINY, context=2000))
    nn.init.constant_(model.head.norm.bias, 40.0)
    tokens, lengths = random_tokens(2, 2000), torch.tensor([2000, 5])
    scores = model(tokens, lengths).detach()
    half = model.to(dtype)(tokens, lengths)
    assert half.dtype == dtype
    torch.testing.assert_close(half.detach().float(), scores, rtol=0.02, atol=0.02)
