"""What ranks that are processes do in tests of pycoll.tensor_parallel: groups, models, and what they are beside."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.models import GPT, GPTConfig
from pycoll.tensor_parallel import is_split, merge_tensor, parallelize_gpt, vocab_parallel_cross_entropy
from pycoll.testing import Rank

CONFIG = GPTConfig(vocab_size=61, context=12, n_layer=2, n_head=4, d_model=16)  # 61: the last rank has padding


def group_of(rank: Rank, size: int, backend: str | None = None) -> dist.ProcessGroup | None:
    """The group of `size` neighbours that this rank is in; None, the default one, where that is all ranks."""
    if size == rank.world_size and backend is None:
        return None
    firsts = range(0, rank.world_size, size)
    groups = [dist.new_group(list(range(first, first + size)), backend=backend) for first in firsts]
    return groups[rank.rank // size]


def gathered(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """All ranks' `x`, by a way that pycoll.tensor_parallel does not go."""
    everybody: list[Tensor] = [torch.empty(0)] * dist.get_world_size(group)
    dist.all_gather_object(everybody, x.detach(), group=group)
    return everybody


def same_everywhere(x: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks have the same bits."""
    return all(torch.equal(each, x.detach()) for each in gathered(x, group))


def seeded(*key: int) -> torch.Generator:
    """Draws that follow from `key`."""
    return torch.Generator().manual_seed(sum(part * 1000**place for place, part in enumerate(key)))


def gpt(dtype: torch.dtype, dropout: float = 0.0) -> GPT:
    """The same model on all ranks; biases and norms, which GPT-2 begins with at 0 and 1, with values of their own."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**vars(CONFIG), "dropout": dropout})).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=seeded(param.numel()), dtype=torch.float64), alpha=0.05)
    return model


def windows(step: int = 0, batch: int = 2, tokens: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (B, T) each, the same on all ranks."""
    drawn = torch.randint(CONFIG.vocab_size, (batch, tokens + 1), generator=seeded(7, step))
    return drawn[:, :-1], drawn[:, 1:]


def whole_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens, as one rank computes it."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def split_loss(model: GPT, tokens: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same of a model that is split."""
    size = model.config.vocab_size
    return vocab_parallel_cross_entropy(model(tokens), targets, group, vocab_size=size).mean()


def split_gpt(dtype: torch.dtype, group: dist.ProcessGroup | None, sequence: bool, dropout: float = 0.0) -> GPT:
    """This rank's part of `gpt`."""
    return parallelize_gpt(gpt(dtype, dropout), group, sequence_parallel=sequence)


def whole_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """By name; those of parameters that are the same on all ranks must be so, too."""
    found = {}
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert is_split(param) or same_everywhere(param.grad, group), name
        found[name] = merge_tensor(param, param.grad)
    return found


@contextmanager
def one_rank(backend: str) -> Iterator[None]:
    """A default group of this process alone."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
