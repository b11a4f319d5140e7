"""Checkpoints: whole or absent, exact, and typed errors for what is not one."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pycoll
from pycoll import checkpoint
from pycoll.checkpoint import CheckpointError, Header
from pycoll.models import GPT, GPTConfig

TINY = GPTConfig(context=8, n_layer=1, n_head=2, d_model=16)
HEADER = Header(step=3, model=asdict(TINY), config={"lr": 0.1}, data_digest="abc", first_loss=5.5)


def trained(steps: int = 2) -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        model(torch.randint(256, (2, 8))).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_brings_back_weights_and_optimizer_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path / "new folder", HEADER, model, optimizer)
    torch.manual_seed(9)
    other = GPT(TINY)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    checkpoint.load(path, other, other_optimizer)
    assert checkpoint.read_header(path) == HEADER
    for m, o in ((model, optimizer), (other, other_optimizer)):
        m(torch.arange(8).unsqueeze(0)).logsumexp(-1).sum().backward()
        o.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key]), (name, key)


def test_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (5, 10, 100_000_005, 20):
        checkpoint.save(tmp_path, replace(HEADER, step=step), model, optimizer)
        assert len(checkpoint.list_checkpoints(tmp_path)) <= checkpoint.KEPT
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [20, 100_000_005]


def test_copies_under_names_of_the_users_are_left_alone(tmp_path: Path) -> None:
    model, optimizer = trained()
    best = checkpoint.save(tmp_path, HEADER, model, optimizer).rename(tmp_path / "checkpoint-best.safetensors")
    for step in (5, 6, 7):
        checkpoint.save(tmp_path, replace(HEADER, step=step), model, optimizer)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [6, 7]
    assert checkpoint.find(best) == best and best.exists()


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "a file").touch()
    with pytest.raises(pycoll.Error, match=r"cannot be written .*earlier checkpoints"):
        checkpoint.save(tmp_path / "a file", HEADER, model, optimizer)


def test_interrupted_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    first = checkpoint.save(tmp_path, HEADER, model, optimizer)

    def write_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(first.read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", write_half)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, replace(HEADER, step=4), model, optimizer)
    assert checkpoint.find(tmp_path) == first
    assert checkpoint.read_header(first) == HEADER
    second = checkpoint.save(tmp_path, replace(HEADER, step=5), model, optimizer)
    assert sorted(tmp_path.iterdir()) == [first, second], "what was half written is gone"


def test_finds_the_newest_of_a_folder_or_the_file_itself(tmp_path: Path) -> None:
    model, optimizer = trained()
    paths = [checkpoint.save(tmp_path, replace(HEADER, step=step), model, optimizer) for step in (9, 10)]
    assert checkpoint.find(tmp_path) == paths[1]
    assert checkpoint.find(paths[0]) == paths[0]


def test_says_where_no_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint: give --resume"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist: give --resume"):
        checkpoint.find(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 100, 1000])
def test_says_that_a_file_is_damaged(tmp_path: Path, length: int) -> None:
    path = checkpoint.save(tmp_path, HEADER, *trained())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint .*resume from an earlier checkpoint"):
        checkpoint.read_header(path)


def test_says_that_a_file_is_something_else(tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of `pycoll train`"):
        checkpoint.read_header(tmp_path / "other.safetensors")


def test_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, HEADER, *trained())
    header = checkpoint.read_header(path)
    checkpoint.require_model(path, header, asdict(TINY))
    other = asdict(replace(TINY, n_layer=2, d_model=32))
    with pytest.raises(CheckpointError, match="d_model is 16 there, 32 here, n_layer is 1 there, 2 here;") as caught:
        checkpoint.require_model(path, header, other)
    assert "context" not in str(caught.value)
