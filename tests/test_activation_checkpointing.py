"""Checkpointed activations: the same gradients from less memory, alone and on two ranks; graphs without a break."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pycoll
from pycoll.models import GPT, GPTConfig
from pycoll.testing import Processes, Rank

CONFIG = GPTConfig(vocab_size=64, context=16, n_layer=3, n_head=2, d_model=32, dropout=0.2)
STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt(checkpoint_activations: bool, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config, checkpoint_activations=checkpoint_activations)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(CONFIG.vocab_size, (4, 17), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # of the dropout
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module, seed: int = 1) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, seed).backward()
    random = torch.rand(1)  # the generator goes on from the same state
    return [random, *(parameter.grad.clone() for parameter in model.parameters())]  # type: ignore[union-attr]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def kept_values(model: GPT) -> int:
    """Numbers that a forward pass keeps for the backward one, without the parameters."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, 1)
    return kept


def test_gradients_are_the_same_bits() -> None:
    kept, again = gradients(gpt(False)), gradients(gpt(True))
    assert same(kept, again)
    assert not same(kept, gradients(gpt(False), seed=2))
    model = gpt(False)
    model.checkpoint_activations = True
    assert same(kept, gradients(model))


def test_without_dropout_too() -> None:
    config = replace(CONFIG, dropout=0.0)
    assert same(gradients(gpt(False, config)), gradients(gpt(True, config)))


def test_blocks_keep_what_they_read_alone() -> None:
    config = replace(CONFIG, n_layer=9)
    blocks = 6
    per_block = [(kept_values(gpt(c, config)) - kept_values(gpt(c))) / blocks for c in (False, True)]
    assert per_block[1] == 4 * 16 * CONFIG.d_model
    assert per_block[0] > 10 * per_block[1]


def test_blocks_are_computed_again_for_gradients_alone() -> None:
    model, calls = gpt(True), []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loss_of(model, 1)
    assert len(calls) == 1
    loss_of(model, 1).backward()
    assert len(calls) == 3


def train(rank: Rank, dtype: torch.dtype, checkpointed: bool) -> list[Tensor]:
    """The averaged gradients of the last step, and the weights after it."""
    folder = rank.folder / f"{dtype}-{checkpointed}"
    folder.mkdir(exist_ok=True)
    model = gpt(checkpointed).to(dtype)
    with replace(rank, folder=folder).communicator() as comm:
        parallel = pycoll.DataParallel(model, comm)
        optimizer = pycoll.ShardedAdam(model.parameters(), lr=1e-2, buckets=parallel.buckets)
        for step in range(STEPS):
            optimizer.zero_grad()
            with parallel.no_sync():
                loss_of(parallel, 100 * step + rank.rank).backward()
            loss_of(parallel, 100 * step + 10 + rank.rank).backward()
            last = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
            optimizer.step()
        return [*last, *(parameter.detach().clone() for parameter in model.parameters())]


def train_both_ways(rank: Rank) -> dict[str, bool]:
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        kept, again = (train(rank, dtype, checkpointed) for checkpointed in (False, True))
        untrained = list(gpt(False).to(dtype).parameters())
        result[f"{dtype} agrees"] = same(kept, again)
        result[f"{dtype} has learned"] = not any(map(torch.equal, kept[len(untrained) :], untrained))
    return result


def test_two_ranks_learn_the_same_bits() -> None:
    with Processes(train_both_ways, 2) as ranks:
        for result in ranks.results():
            assert len(result) == 4 and all(result.values()), result


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_as_one_graph(checkpointed: bool) -> None:
    """`model.compile()` of torch.nn.Module needs nothing of ours; here without generated code, for its bits."""
    config = replace(CONFIG, dropout=0.0)
    wanted = gradients(gpt(False, config))
    model = gpt(checkpointed, config)
    model.compile(fullgraph=True, backend="aot_eager")
    for here, there in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(here, there)
