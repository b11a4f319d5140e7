"""Checkpoints: whole or absent, exact, and typed errors for what is not one."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pycoll
from pycoll import checkpoint
from pycoll.checkpoint import CheckpointError, Header
from pycoll.models import GPTConfig

TINY = GPTConfig(context=8, n_layer=1, n_head=2, d_model=16)
HEADER = Header(step=3, seen=12, model=asdict(TINY), config={"lr": 0.1}, data_digest="abc", first_loss=5.5)


TENSORS = {
    "model.a": torch.arange(600.0).reshape(20, 30),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "optimizer.a.step": torch.tensor([3.0])[0],
    "optimizer.a.exp_avg": torch.ones(20, 30),
    "empty": torch.empty(0, 3),
}


def test_brings_tensors_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new folder", HEADER, TENSORS)
    assert checkpoint.read_header(path) == HEADER
    tensors = checkpoint.Tensors(path)
    assert tensors.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype, name
    with pytest.raises(CheckpointError, match=r"is damaged .*nothing.*resume from an earlier checkpoint"):
        _ = tensors["nothing"]


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_a_bit_that_has_changed_is_noticed(tmp_path: Path, name: str) -> None:
    first = checkpoint.save(tmp_path, HEADER, TENSORS)
    second = checkpoint.save(tmp_path, replace(HEADER, step=4), TENSORS)
    assert checkpoint.newest_whole(tmp_path) == second
    with safe_open(second, framework="pt") as file:
        metadata = file.metadata()
    changed = {**TENSORS, name: TENSORS[name].clone()}
    changed[name].view(-1).view(torch.uint8)[-1] ^= 1
    save_file(changed, second, metadata)
    tensors = checkpoint.Tensors(second)
    for other in TENSORS.keys() - {name}:
        assert torch.equal(tensors[other], TENSORS[other])
    with pytest.raises(CheckpointError, match=rf"is damaged \({name} has another checksum"):
        _ = tensors[name]
    assert checkpoint.newest_whole(tmp_path) == first
    first.write_bytes(first.read_bytes()[:-1])
    assert checkpoint.newest_whole(tmp_path) is None


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_005, 20):
        checkpoint.save(tmp_path, replace(HEADER, step=step), TENSORS)
        assert len(checkpoint.list_checkpoints(tmp_path)) <= checkpoint.KEPT
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [20, 100_000_005]


def test_copies_under_names_of_the_users_are_left_alone(tmp_path: Path) -> None:
    best = checkpoint.save(tmp_path, HEADER, TENSORS).rename(tmp_path / "checkpoint-best.safetensors")
    for step in (5, 6, 7):
        checkpoint.save(tmp_path, replace(HEADER, step=step), TENSORS)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [6, 7]
    assert checkpoint.find(best) == best and best.exists()


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(pycoll.Error, match=r"cannot be written .*earlier checkpoints"):
        checkpoint.save(tmp_path / "a file", HEADER, TENSORS)


def test_interrupted_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoint.save(tmp_path, HEADER, TENSORS)

    def write_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(first.read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", write_half)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, replace(HEADER, step=4), TENSORS)
    assert checkpoint.find(tmp_path) == first
    assert checkpoint.read_header(first) == HEADER
    second = checkpoint.save(tmp_path, replace(HEADER, step=5), TENSORS)
    assert sorted(tmp_path.iterdir()) == [first, second], "what was half written is gone"


def test_finds_the_newest_of_a_folder_or_the_file_itself(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, replace(HEADER, step=step), TENSORS) for step in (9, 10)]
    assert checkpoint.find(tmp_path) == paths[1]
    assert checkpoint.find(paths[0]) == paths[0]


def test_says_where_no_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint: give --resume"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist: give --resume"):
        checkpoint.find(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 100, 1000])
def test_says_that_a_file_is_damaged(tmp_path: Path, length: int) -> None:
    path = checkpoint.save(tmp_path, HEADER, TENSORS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"is damaged or no checkpoint .*resume from an earlier checkpoint"):
        checkpoint.read_header(path)


def test_says_that_a_file_is_something_else(tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of `pycoll train`"):
        checkpoint.read_header(tmp_path / "other.safetensors")


def test_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, HEADER, TENSORS)
    header = checkpoint.read_header(path)
    checkpoint.require_model(path, header, asdict(TINY))
    other = asdict(replace(TINY, n_layer=2, d_model=32))
    with pytest.raises(CheckpointError, match="d_model is 16 there, 32 here, n_layer is 1 there, 2 here;") as caught:
        checkpoint.require_model(path, header, other)
    assert "context" not in str(caught.value)


@pytest.mark.parametrize("said", ["header", "checksums"])
def test_a_header_that_has_changed_is_noticed(tmp_path: Path, said: str) -> None:
    first = checkpoint.save(tmp_path, HEADER, TENSORS)
    second = checkpoint.save(tmp_path, replace(HEADER, step=4), TENSORS)
    content = second.read_bytes()
    place = content.index(b'\\"step\\": 4' if said == "header" else b'"checksums"')
    second.write_bytes(
        content[:place]
        + content[place:].replace(
            b"4" if said == "header" else b"checksums", b"5" if said == "header" else b"checksumz", 1
        )
    )
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        checkpoint.read_header(second)
    assert checkpoint.newest_whole(tmp_path) == first
