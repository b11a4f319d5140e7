"""pycoll.tensor_parallel's parts, each against whole tensors on one rank: collectives, layers, loss, draws, state."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
from tensor_parallel_ranks import gathered, group_of, one_rank, same_everywhere, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import pycoll
from pycoll import tensor_parallel as tp
from pycoll.testing import Rank

Group = dist.ProcessGroup | None
ALIKE, DIVIDED = True, False
"""Whether all ranks have the same tensor, which counts once, or each its own."""
MAPS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "copy": (tp.copy, ALIKE, DIVIDED),
    "reduce": (tp.reduce, DIVIDED, ALIKE),
    "split": (tp.split, ALIKE, DIVIDED),
    "gather": (tp.gather, DIVIDED, ALIKE),
    "all_gather": (tp.all_gather, DIVIDED, DIVIDED),
    "reduce_scatter": (tp.reduce_scatter, DIVIDED, DIVIDED),
}


def wanted(name: str, everybody: list[Tensor], rank: int, dim: int) -> Tensor:
    """What a map makes of all ranks' tensors."""
    total = torch.stack(everybody).sum(0)
    n = len(everybody)
    results: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: everybody[rank],
        "reduce": lambda: total,
        "split": lambda: everybody[rank].chunk(n, dim)[rank],
        "gather": lambda: torch.cat(everybody, dim),
        "all_gather": lambda: torch.cat(everybody, dim),
        "reduce_scatter": lambda: total.chunk(n, dim)[rank],
    }
    return results[name]()


def drawn(alike: bool, rank: int, shape: tuple[int, ...], strided: bool = False) -> Tensor:
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=seeded(5, 0 if alike else rank + 1), dtype=torch.float64)
    x = x[..., ::2]
    return x if strided else x.contiguous()


def inner(x: Tensor, y: Tensor, alike: bool, group: Group) -> float:
    """The product of two tensors of all ranks."""
    product = (x.detach() * y.detach()).sum()
    return float(product if alike else sum(gathered(product, group)))


def check_map(name: str, shape: tuple[int, ...], dims: list[int], strided: bool, group: Group) -> None:
    """Value and adjoint, <A x, y> = <x, A' y>, and the adjoint's own, in fp64; no argument is modified."""
    rank = dist.get_rank(group)
    fn, alike_in, alike_out = MAPS[name]
    for dim in dims:
        apply = fn if name in ("copy", "reduce") else partial(fn, dim=dim)
        x = drawn(alike_in, rank, shape, strided).requires_grad_()
        before = x.detach().clone()
        out = apply(x, group)
        torch.testing.assert_close(out.detach(), wanted(name, gathered(x, group), rank, dim), rtol=1e-14, atol=1e-14)
        y = drawn(alike_out, rank + 7, tuple(out.shape), strided).requires_grad_()
        kept = y.detach().clone()
        (grad,) = torch.autograd.grad(out, x, y, create_graph=True)
        assert grad.shape == x.shape
        there, back = inner(out, y, alike_out, group), inner(x, grad, alike_in, group)
        assert there == pytest.approx(back, rel=1e-12)
        (again,) = torch.autograd.grad(grad, y, x.detach())
        torch.testing.assert_close(again, out.detach(), rtol=1e-14, atol=1e-14)
        assert torch.equal(x, before) and torch.equal(y, kept), "an argument was modified"


def pair(group: Group, sequence: bool, gelu: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """An MLP, whole and split."""
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(6, 8), nn.GELU() if gelu else nn.Identity(), nn.Linear(8, 6)).double()
    settings: dict[str, Any] = {"group": group, "sequence_parallel": sequence}
    column = tp.ColumnParallelLinear.from_linear(whole[0], **settings)
    return whole, nn.Sequential(
        column, whole[1], tp.RowParallelLinear.from_linear(nn.Linear.double(whole[2]), **settings)
    )


def check_pair(group: Group, sequence: bool, shape: tuple[int, ...], frozen: bool) -> None:
    """Outputs and all gradients; `frozen`: no weight requires one."""
    whole, parts = pair(group, sequence)
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    for model in (whole, parts):
        model.requires_grad_(not frozen)
        model.zero_grad()
    x = drawn(ALIKE, rank, shape, strided=True)
    reference = x.clone().requires_grad_()
    expected = whole(reference)
    y = drawn(ALIKE, rank + 7, tuple(expected.shape))
    expected.backward(y)
    mine = (lambda t: t.chunk(n, -2)[rank]) if sequence else (lambda t: t)
    own = mine(x).detach().requires_grad_()
    out = parts(own)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
    close(out, mine(expected))
    out.backward(mine(y))
    assert own.grad is not None and reference.grad is not None
    close(own.grad, mine(reference.grad))
    for param, source in zip(parts.parameters(), whole.parameters(), strict=True):
        if frozen:
            assert param.grad is None
        else:
            assert param.grad is not None and source.grad is not None
            close(tp.merge_tensor(param, param.grad), source.grad)
    with torch.no_grad():
        assert torch.equal(parts(own), out)


def check_layers(group: Group) -> None:
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for sequence in (False, True):
        for shape in ((3, 4, 6), (1, 4, 6), (4, 6)):
            for frozen in (False, True):
                check_pair(group, sequence, shape, frozen)
    # One seed makes torch's weights; all outputs of three fused layers, in their order.
    torch.manual_seed(2)
    whole = nn.Linear(5, 24)
    torch.manual_seed(2)
    column = tp.ColumnParallelLinear(5, 24, group=group, parts=3, gather_output=True)
    x = torch.randn(2, 3, 5, generator=seeded(1))
    torch.testing.assert_close(column(x), whole(x))
    assert column.weight.shape == (24 // n, 5)
    torch.testing.assert_close(column.weight[: 8 // n], whole.weight[rank * 8 // n : (rank + 1) * 8 // n])
    torch.manual_seed(2)
    row = tp.RowParallelLinear(24, 5, bias=False, group=group)
    torch.manual_seed(2)
    torch.testing.assert_close(tp.merge_tensor(row.weight, row.weight), nn.Linear(24, 5, bias=False).weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert row(column(x).chunk(n, -1)[rank]).dtype == torch.bfloat16
    check_embedding_and_norm(group)


def check_embedding_and_norm(group: Group) -> None:
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 1e-2)):
        torch.manual_seed(4)
        token, norm = nn.Embedding(11, 6).to(dtype), nn.LayerNorm(6).to(dtype)
        nn.init.normal_(norm.bias)
        tokens = torch.randint(11, (3, 4), generator=seeded(2))
        expected = norm(token(tokens))
        y = drawn(ALIKE, 0, (3, 4, 6)).to(dtype)
        expected.backward(y)
        rows = tp.VocabParallelEmbedding.from_embedding(token, group=group, sequence_parallel=True)
        assert len(rows.weight) == -(-11 // n)
        if 0 < rank == n - 1:
            assert torch.equal(rows.weight[-1], torch.zeros(6, dtype=dtype)), "padding"
        own = tp.SequenceParallelLayerNorm.from_layer_norm(norm, group)
        wanted_grads = [p.grad for p in (token.weight, norm.weight, norm.bias)]
        norm.zero_grad()
        out = own(rows(tokens))
        close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        close(out, expected.chunk(n, 1)[rank])
        out.backward(y.chunk(n, 1)[rank])
        for param, grad in zip((rows.weight, own.weight, own.bias), wanted_grads, strict=True):
            assert param is not None and param.grad is not None
            close(tp.merge_tensor(param, param.grad), grad)
        plain = tp.SequenceParallelLayerNorm(6, elementwise_affine=False, group=group)
        close(plain(out), F.layer_norm(out, (6,)))
    with pytest.raises(pycoll.UsageError, match="tokens from 0 to 11 are not of a vocabulary of 11"):
        rows(torch.tensor([[0, 11]]))
    with pytest.raises(pycoll.UnsupportedError, match="with padding_idx"):
        tp.VocabParallelEmbedding.from_embedding(nn.Embedding(4, 2, padding_idx=0), group=group)


def check_loss(group: Group) -> None:
    """Beside F.cross_entropy of the whole logits."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for size, shape, scale in ((8 * n, (3, 5), 1.0), (4 * n - 3, (7,), 1.0), (2, (2, 3), 1.0), (4 * n, (6,), 1e4)):
            columns = -(-size // n)
            make = seeded(9, size)
            whole = (scale * torch.randn(*shape, columns * n, generator=make, dtype=torch.float64)).to(dtype)
            whole[..., size:] = math.inf  # what is in padding counts for nothing
            targets = torch.randint(size, shape, generator=make)
            targets.view(-1)[1] = -1
            reference = whole[..., :size].clone().requires_grad_()
            wide = reference.double() if dtype == torch.float64 else reference.float()
            expected = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=-1)
            upstream = torch.rand(expected.shape, generator=make, dtype=expected.dtype)
            expected.backward(upstream)
            logits = whole.chunk(n, -1)[rank].clone().requires_grad_()
            losses = tp.vocab_parallel_cross_entropy(logits, targets, group, vocab_size=size, ignore_index=-1)
            assert losses.dtype == wide.dtype and losses.shape == targets.shape
            close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance * scale)
            close(losses.flatten(), expected, rtol=1e-6 if dtype == torch.bfloat16 else tolerance)
            losses.backward(upstream.view(shape))
            assert logits.grad is not None and logits.grad.dtype == dtype
            padded = F.pad(reference.grad, (0, columns * n - size))
            close(logits.grad, padded.chunk(n, -1)[rank], atol=tolerance)
    loss = partial(tp.vocab_parallel_cross_entropy, group=group)
    minus = torch.full((1, 2), -math.inf) if rank else torch.zeros(1, 2)  # a rank whose tokens are all impossible
    assert float(loss(minus, torch.tensor([0]))) == pytest.approx(math.log(2))
    with pytest.raises(pycoll.UsageError, match=r"targets are \(3,\), logits \(2, 4\)"):
        loss(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(pycoll.UsageError, match="no vocabulary of 99"):
        loss(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), vocab_size=99)
    with pytest.raises(pycoll.UsageError, match=f"not of a vocabulary of {4 * n - 1}"):
        loss(torch.zeros(2, 4), torch.tensor([0, 4 * n - 1]), vocab_size=4 * n - 1)


def check_draws(group: Group) -> None:
    torch.manual_seed(6)
    drop = tp.DifferentDraws(nn.Dropout(0.5), group)
    x = torch.ones(256)
    first = drop(x)
    masks = gathered(first, group)
    agreements = [float((masks[0] == mask).double().mean()) for mask in masks[1:]]
    assert all(0.3 < agreement < 0.7 for agreement in agreements), "independent of one another"
    assert same_everywhere(torch.get_rng_state(), group)
    assert not torch.equal(drop(x), first)
    torch.manual_seed(6)
    assert torch.equal(drop(x), first), "they follow from the global generator"
    with pytest.raises(KeyError), tp.different_draws(group):
        raise KeyError
    assert same_everywhere(torch.get_rng_state(), group)
    before = torch.get_rng_state()
    assert torch.equal(drop.eval()(x), x) and torch.equal(torch.get_rng_state(), before)


def check_errors(group: Group) -> None:
    n = dist.get_world_size(group)
    for fn in (tp.split, tp.reduce_scatter):
        with pytest.raises(pycoll.UsageError, match=f"does not divide by {n} ranks"):
            fn(torch.zeros(n + 1, n + 1), group)
    for make in (tp.ColumnParallelLinear, tp.RowParallelLinear):
        with pytest.raises(pycoll.UsageError, match=f"{n + 1} features do not divide by {n} ranks"):
            make(n + 1, n + 1, group=group)
    with pytest.raises(pycoll.UsageError, match="in 3 parts"):
        tp.ColumnParallelLinear(2, 2 * n, group=group, parts=3)
    column = tp.ColumnParallelLinear(2, 2 * n, group=group)
    with pytest.raises(pycoll.UsageError, match="the whole parameter"):
        tp.split_tensor(column.weight, torch.zeros(n, 2))
    with pytest.raises(pycoll.UsageError, match="the parameter"):
        tp.merge_tensor(column.weight, torch.zeros(1, 2))


def parts_on_ranks(rank: Rank) -> None:
    pairs, default, gloo = group_of(rank, 2), None, group_of(rank, rank.world_size, "gloo")
    for group in (pairs, default, gloo):
        n = dist.get_world_size(group)
        for name in MAPS:
            for shape, dims in (((2, n, 2 * n), [-1, -2]), ((1, n, 2), [1]), ((n, 2), [-2])):
                for strided in (False, True):
                    check_map(name, shape, dims, strided, group)
        check_loss(group)
    for group in (pairs, default):
        check_layers(group)
        check_draws(group)
        check_errors(group)
    if rank.rank:
        with pytest.raises(pycoll.UsageError, match="not in the group"):
            tp.vocab_parallel_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), outside(rank))
    else:
        outside(rank)


def outside(rank: Rank) -> Group:
    """A group of rank 0 alone."""
    return dist.new_group([0])


def test_parts_are_those_of_the_whole() -> None:
    groups.run(parts_on_ranks, 4)


@pytest.mark.parametrize("backend", ["pycoll", "gloo"])
def test_one_rank_has_the_whole(backend: str) -> None:
    with one_rank(backend):
        for name in MAPS:
            check_map(name, (2, 3, 4), [-1, -2], True, None)
        check_layers(None)
        check_loss(None)
