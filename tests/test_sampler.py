"""Sampling: each item once an epoch, whoever shares and resumes; windows that cover the text."""

import pytest
import torch

from pycoll.data import EpochSampler, WindowSampler, share, windows_at
from pycoll.errors import UsageError


def seen_by_ranks(sampler: EpochSampler, position: int, world: int, batch: int, until: int) -> tuple[list[int], int]:
    """The items of all ranks in steps from `position` to the first position of at least `until`; and that position."""
    seen: list[int] = []
    while position < until:
        items = sampler.take(position, world * batch)
        parts = [share(items, rank, world) for rank in range(world)]
        sizes = [len(part) for part in parts]
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1 and sum(sizes) == len(items)
        seen += torch.cat(parts).tolist()
        position += len(items)
    return seen, position


@pytest.mark.parametrize("n", [1, 7, 60, 101])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_each_item_comes_once_an_epoch(n: int, world: int, batch: int) -> None:
    sampler, position, orders = EpochSampler(n, seed=3), 0, []
    for epoch in range(3):
        assert sampler.epoch(position) == epoch
        items, position = seen_by_ranks(sampler, position, world, batch, (epoch + 1) * n)
        assert position == (epoch + 1) * n, "no step reaches into the next epoch"
        assert sorted(items) == list(range(n))
        orders.append(items)
    if n > 7:
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_who_resumes_at_another_world_gets_what_is_left(before: int, after: int) -> None:
    n, batch = 101, 3
    straight, _ = seen_by_ranks(EpochSampler(n, 0), 0, 1, 1, 3 * n)
    first, position = seen_by_ranks(EpochSampler(n, 0), 0, before, batch, n + n // 2)
    assert n < position < 2 * n
    rest, end = seen_by_ranks(EpochSampler(n, 0), position, after, batch + 1, 3 * n)
    assert end == 3 * n
    assert first + rest == straight


def test_order_follows_from_the_seed_alone() -> None:
    again = EpochSampler(1000, 5)
    again.take(2500, 10)  # another epoch was asked for before
    assert torch.equal(again.take(0, 1000), EpochSampler(1000, 5).take(0, 1000))
    assert not torch.equal(again.take(0, 1000), EpochSampler(1000, 6).take(0, 1000))
    taken = again.take(0, 10)
    taken.zero_()
    assert again.take(0, 10).any(), "what was handed out is a copy"


def test_ranks_have_fewer_or_none_where_an_epoch_ends() -> None:
    items = EpochSampler(10, 0).take(8, 12)
    assert len(items) == 2
    assert [share(items, rank, 4).tolist() for rank in range(4)] == [[items[0]], [items[1]], [], []]


@pytest.mark.parametrize("n_tokens", [9, 16, 100, 1003])
def test_windows_lie_end_to_end_and_reach_every_token(n_tokens: int) -> None:
    context, text = 8, torch.arange(n_tokens)
    sampler = WindowSampler(n_tokens, context, seed=1)
    assert sampler.n == n_tokens // context
    total, cuts = torch.zeros(n_tokens, dtype=torch.int64), set()
    for epoch in range(20):
        starts = sampler.take(epoch * sampler.n, sampler.n)
        inputs, targets = windows_at(text, context, starts)
        for part in (inputs, targets):
            counts = torch.bincount(part.flatten(), minlength=n_tokens)
            assert counts.max() == 1 and counts.sum() == sampler.n * context
        assert torch.equal(targets, (inputs + 1) % n_tokens)
        total += torch.bincount(targets.flatten(), minlength=n_tokens)
        cuts.add(int(starts.min()) % context)
    assert total.min() > 0
    assert len(cuts) > 3 or n_tokens == 9


def test_windows_come_once_each_over_resumed_ranks() -> None:
    sampler = WindowSampler(1003, 8, seed=0)
    straight, _ = seen_by_ranks(sampler, 0, 1, 1, 2 * sampler.n)
    first, position = seen_by_ranks(sampler, 0, 3, 4, sampler.n // 2)
    rest, _ = seen_by_ranks(WindowSampler(1003, 8, seed=0), position, 2, 5, 2 * sampler.n)
    assert first + rest == straight
    assert len(set(straight[: sampler.n])) == sampler.n


def test_impossible_samplers_are_named() -> None:
    with pytest.raises(UsageError, match="a sampler of 0 items with seed 0: give at least 1 item"):
        EpochSampler(0, 0)
    with pytest.raises(UsageError, match="8 tokens are fewer than one window of 9"):
        WindowSampler(8, 8, 0)
    with pytest.raises(UsageError, match="1 items from position -1"):
        EpochSampler(5, 0).take(-1, 1)
    with pytest.raises(UsageError, match="0 items from position 0"):
        EpochSampler(5, 0).take(0, 0)
