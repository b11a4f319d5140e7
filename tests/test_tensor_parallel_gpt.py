"""pycoll.tensor_parallel.parallelize_gpt: a split GPT beside the whole one; dropout on ranks, checkpointing, state."""

from __future__ import annotations

from functools import partial

import groups
import pytest
import torch
import torch.distributed as dist
from tensor_parallel_ranks import (
    CONFIG,
    gathered,
    gpt,
    group_of,
    one_rank,
    same_everywhere,
    split_gpt,
    split_loss,
    whole_gradients,
    whole_loss,
    windows,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoll
from pycoll import tensor_parallel as tp
from pycoll.models import GPT, GPTConfig
from pycoll.testing import Rank

Group = dist.ProcessGroup | None
STEPS = 20


def check_gradients(dtype: torch.dtype, sequence: bool, group: Group) -> None:
    """Loss and every gradient; in 16 bits within rounding of the whole model's in fp32."""
    tokens, targets = windows()
    whole = gpt(dtype) if dtype != torch.bfloat16 else gpt(dtype).float()
    expected = whole_loss(whole, tokens, targets)
    expected.backward()
    model = split_gpt(dtype, group, sequence)
    loss = split_loss(model, tokens, targets, group)
    loss.backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    assert same_everywhere(loss, group)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    found = whole_gradients(model, group)
    assert found.keys() == dict(whole.named_parameters()).keys()
    for name, param in whole.named_parameters():
        assert param.grad is not None and found[name].shape == param.shape
        gap = (found[name].to(param.dtype) - param.grad).abs().max() / param.grad.abs().max()
        assert gap < tolerance, (name, float(gap))
    with torch.no_grad():
        logits = model(tokens)
    assert logits.dtype == dtype and logits.shape == (
        *tokens.shape,
        -(-CONFIG.vocab_size // dist.get_world_size(group)),
    )
    size = CONFIG.vocab_size
    scores = tp.gather(logits, group)[..., :size].to(whole(tokens).dtype)
    torch.testing.assert_close(scores, whole(tokens).detach(), rtol=tolerance, atol=2 * tolerance)


def losses(model: GPT, group: Group, split: bool) -> list[float]:
    """Of some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    found = []
    for step in range(STEPS):
        tokens, targets = windows(step % 3)  # few, so that there is something to learn
        loss = split_loss(model, tokens, targets, group) if split else whole_loss(model, tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def check_training(dtype: torch.dtype, sequence: bool, group: Group) -> None:
    """The same curve, and the same weights; a state that is loaded goes on from there."""
    whole, model = gpt(dtype), split_gpt(dtype, group, sequence)
    expected = losses(whole, group, split=False)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert expected[-1] < expected[0]
    assert losses(model, group, split=True) == pytest.approx(expected, rel=tolerance)
    state = tp.full_state_dict(model)
    assert state.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        # Biases of keys have no gradient but rounding, of which AdamW makes steps as of any other's.
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(state[name], value, rtol=10 * tolerance, atol=10 * tolerance)
    again = gpt(dtype)
    again.load_state_dict(state)
    fresh = split_gpt(dtype, group, not sequence)
    before = [param.data_ptr() for param in fresh.parameters()]
    tp.load_full_state_dict(fresh, state)
    assert [param.data_ptr() for param in fresh.parameters()] == before
    for mine, loaded in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, loaded)
    with pytest.raises(pycoll.UsageError, match="the whole parameter"):
        tp.load_full_state_dict(fresh, {**state, "head.norm.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Missing key.*head.norm.bias"):
        tp.load_full_state_dict(fresh, {name: value for name, value in state.items() if name != "head.norm.bias"})
    converted = tp.full_state_dict(fresh.to(torch.bfloat16))
    assert all(torch.equal(converted[name], value.bfloat16()) for name, value in state.items())
    if dist.get_world_size(group) > 1:
        with pytest.raises(pycoll.UsageError, match="generate with a whole model"):
            model.generate(windows()[0], 2)
    assert len(again.generate(windows()[0][:, :1], 2)[0]) == 3


def check_norm(sequence: bool, group: Group) -> None:
    """A norm of the whole gradient: what is split counts on each rank, the rest once."""
    whole, model = gpt(torch.float64), split_gpt(torch.float64, group, sequence)
    whole_loss(whole, *windows()).backward()
    split_loss(model, *windows(), group).backward()
    squares = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for param in model.parameters():
        assert param.grad is not None
        squares[tp.is_split(param)] += param.grad.square().sum()
    total = squares[0] + sum(gathered(squares[1], group))
    wanted = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    assert float(total.sqrt()) == pytest.approx(float(wanted), rel=1e-10)


def check_dropout(sequence: bool, group: Group) -> None:
    """Who draws alike and who does not; generators in step; the same gradients with recomputed activations."""
    model = split_gpt(torch.float64, group, sequence, dropout=0.3)
    states: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: object) -> None:
        states[name] = torch.get_rng_state()

    drawers = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Dropout", "DotProductAttention")
    }
    assert len(drawers) == 1 + 3 * CONFIG.n_layer
    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in drawers.items()]
    torch.manual_seed(8)
    loss = split_loss(model, *windows(), group)
    loss.backward()
    assert same_everywhere(torch.get_rng_state(), group) and same_everywhere(loss, group)
    for name, state in states.items():
        everybody = {each.numpy().tobytes() for each in gathered(state, group)}
        shared = not sequence and "attend" not in name
        assert len(everybody) == (1 if shared else dist.get_world_size(group)), name
    assert states.keys() == drawers.keys()
    for handle in handles:
        handle.remove()
    expected = whole_gradients(model, group)
    after = torch.get_rng_state()
    model.zero_grad()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(8)
    again = split_loss(model, *windows(), group)
    again.backward()
    assert torch.equal(again, loss) and torch.equal(torch.get_rng_state(), after)
    for name, grad in whole_gradients(model, group).items():
        assert torch.equal(grad, expected[name]), name
    model.eval()
    assert torch.equal(split_loss(model, *windows(), group), split_loss(model, *windows(), group))


def check_compiled(sequence: bool, group: Group) -> None:
    """Each block as one graph, its collectives in it; without generated code, for its bits."""
    found = []
    for compiles in (False, True):
        model = split_gpt(torch.float32, group, sequence)
        for block in model.blocks if compiles else ():
            block.compile(fullgraph=True, backend="aot_eager")
        loss = split_loss(model, *windows(), group)
        loss.backward()
        with torch.no_grad():  # compiled anew
            scores = model(windows()[0])
        found.append([loss, scores, *(param.grad for param in model.parameters())])
    for here, there in zip(*found, strict=True):
        assert here is not None and there is not None and torch.equal(here, there)


def check_with_data_parallel(rank: Rank, group: Group) -> None:
    """Pairs that split a model, beside one another: each learns its own sequence, and all the same."""
    beside = [dist.new_group([first, first + 2]) for first in range(2)][rank.rank % 2]
    whole, model = gpt(torch.float32), split_gpt(torch.float32, group, sequence=True)
    parallel = pycoll.DataParallel(model, beside)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = pycoll.ShardedAdam(model.parameters(), buckets=parallel.buckets, **settings)
    reference = torch.optim.AdamW(whole.parameters(), **settings)
    for _ in range(3):
        expected = [whole_loss(whole, *windows(step)) for step in range(2)]
        (sum(expected) / 2).backward()
        tokens, targets = windows(rank.rank // 2)
        loss = tp.vocab_parallel_cross_entropy(parallel(tokens), targets, group, vocab_size=CONFIG.vocab_size).mean()
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected[rank.rank // 2].detach()), rel=1e-4)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    moments = optimizer.state_dict()["state"]
    for index, (param, source) in enumerate(zip(model.parameters(), whole.parameters(), strict=True)):
        moment = tp.merge_tensor(param, moments[index]["exp_avg"])
        wanted = reference.state[source]["exp_avg"]
        torch.testing.assert_close(moment, wanted, rtol=1e-3, atol=1e-5)
        assert torch.equal(tp.split_tensor(param, moment), moments[index]["exp_avg"])


def check_refusals(rank: Rank, group: Group) -> None:
    n = dist.get_world_size(group)
    with pytest.raises(pycoll.UsageError, match=f"n_head is 1, which does not divide by {n} ranks"):
        tp.parallelize_gpt(GPT(GPTConfig(n_head=1)), group)
    with pytest.raises(pycoll.UsageError, match="split already"):
        tp.parallelize_gpt(split_gpt(torch.float32, group, sequence=False), group)
    with pytest.raises(pycoll.UsageError, match=r"\(2, 7, 16\) does not divide"):
        split_gpt(torch.float32, group, sequence=True)(windows(tokens=7)[0])


def models_on_ranks(rank: Rank, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        group = group_of(rank, size)
        for sequence in (False, True):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                check_gradients(dtype, sequence, group)
            check_training(torch.float64 if sequence else torch.float32, sequence, group)
            check_norm(sequence, group)
            check_dropout(sequence, group)
            if size == 2:
                check_compiled(sequence, group)
        check_refusals(rank, group)
        if size < rank.world_size:
            check_with_data_parallel(rank, group)
    gloo = group_of(rank, rank.world_size, "gloo")
    for sequence in (False, True):
        check_gradients(torch.float64, sequence, gloo)


@pytest.mark.parametrize(("ranks", "sizes"), [(2, (2,)), (4, (4, 2))])
def test_a_split_gpt_is_the_whole_one(ranks: int, sizes: tuple[int, ...]) -> None:
    groups.run(models_on_ranks, ranks, sizes)


def test_one_rank_has_the_whole() -> None:
    with one_rank("pycoll"):
        for sequence in (False, True):
            check_gradients(torch.float64, sequence, None)
            check_dropout(sequence, None)
        check_training(torch.float32, False, None)
