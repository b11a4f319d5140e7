"""Classification by several ranks: they count and learn as one rank with all examples does, whoever has which."""

from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from groups import run
from torch import Tensor
from torch.nn import functional as F

import pycoll
from pycoll.metrics import Classification, weighted_loss
from pycoll.models import Encoder, EncoderConfig
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)
CONFIG = EncoderConfig(context=8, n_layer=1, n_head=2, d_model=16, n_classes=3)
LENGTHS, LABELS = torch.tensor([8, 3, 0, 5]), torch.tensor([0, 2, 2, 1])
Sizes = tuple[tuple[int, ...], ...]
"""By pass, how many examples each rank has."""
TAUGHT: dict[int, list[Sizes]] = {
    1: [((4,),), ((3,), (1,))],
    2: [((3, 1),), ((4, 0),), ((0, 4),), ((2, 1), (1, 0))],
    3: [((1, 0, 3),), ((1, 1, 0), (0, 1, 1))],
}
"""By number of ranks: how the four examples of a step may be shared out."""
COUNTED = {1: [(11,)], 2: [(7, 4), (0, 11)], 3: [(6, 0, 5), (1, 9, 1)]}
"""By number of ranks: how many of 11 examples each evaluates."""


def make_model() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG)


def texts() -> Tensor:
    return torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(1))


def vector(model: Encoder) -> Tensor:
    """The gradient of all parameters; there must be one of each."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


def shares(sizes: Sizes) -> list[list[slice]]:
    """By pass and rank: which of the examples."""
    ends = iter(accumulate(size for ranks in sizes for size in ranks))
    return [[slice(end - size, end) for size, end in zip(ranks, ends, strict=False)] for ranks in sizes]


def learn(rank: Rank, sizes: Sizes) -> float:
    """How far the gradient is from that of one rank with all examples, relatively."""
    alone = make_model()
    F.cross_entropy(alone(texts(), LENGTHS), LABELS).backward()
    model = pycoll.DataParallel(make_model())
    parts = [ranks[rank.rank] for ranks in shares(sizes)]
    for i, mine in enumerate(parts):
        model.require_backward_grad_sync = i == len(parts) - 1
        scores = model(texts()[mine], LENGTHS[mine])
        weighted_loss(scores, LABELS[mine], total=4, world=rank.world_size).backward()
    wanted = vector(alone)
    return float((vector(model.module) - wanted).norm() / wanted.norm())


def guesses() -> tuple[Tensor, Tensor]:
    """Scores and labels of 11 examples."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(11, 3, generator=generator), torch.randint(3, (11,), generator=generator)


def count(rank: Rank, sizes: tuple[int, ...]) -> list[list[int]]:
    """The counts of all ranks' examples, of which each adds its own in batches of 3."""
    mine = shares((sizes,))[0][rank.rank]
    metrics = Classification(("a", "b", "c"))
    for batch in zip(*(part[mine].split(3) for part in guesses()), strict=True):
        metrics.add(*batch)
    counts = metrics.reduce().confusion.tolist()
    assert metrics.confusion.sum() == sizes[rank.rank], "this rank's own stay as they were"
    return counts


def count_in_a_group(rank: Rank) -> int | None:
    """Examples in a group of all ranks but the first, of which each has as many as its number."""
    group = dist.new_group(range(1, rank.world_size))
    metrics = Classification(("a", "b", "c"))
    metrics.add(torch.zeros(rank.rank, 3), torch.zeros(rank.rank, dtype=torch.int64))
    return int(metrics.reduce(group).confusion.sum()) if rank.rank else None


def as_a_rank(rank: Rank) -> tuple[list[float], list[list[list[int]]], int | None]:
    distances = [learn(rank, sizes) for sizes in TAUGHT[rank.world_size]]
    counts = [count(rank, sizes) for sizes in COUNTED[rank.world_size]]
    return distances, counts, count_in_a_group(rank) if rank.world_size == 3 else None


@pytest.mark.parametrize("world_size", TAUGHT)
def test_ranks_learn_and_count_as_one_does(world_size: int) -> None:
    expected = [[0] * 3 for _ in range(3)]
    for scores, label in zip(*(part.tolist() for part in guesses()), strict=True):
        expected[label][scores.index(max(scores))] += 1
    results = run(as_a_rank, world_size)
    for distances, counts, _ in results:
        assert distances == pytest.approx([0.0] * len(TAUGHT[world_size]), abs=1e-5)
        assert counts == [expected] * len(COUNTED[world_size])
    if world_size == 3:
        assert [in_group for *_, in_group in results] == [None, 3, 3]
