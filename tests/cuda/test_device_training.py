"""The trainer on a GPU: the CPU's curve, however ranks divide the model, and going on from its checkpoints."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from places import OWN, SHARED, needs

for library in ("rich", "safetensors", "tensorboard", "tyro"):  # which `make gpu` does not bring
    pytest.importorskip(library)

from training import SECONDS, write_text  # noqa: E402 - which need them

from pycoll import checkpoint  # noqa: E402
from pycoll.models import Encoder, EncoderConfig, GPTConfig, measured_peak  # noqa: E402
from pycoll.testing import Processes, Rank  # noqa: E402
from pycoll.train import TrainConfig  # noqa: E402
from pycoll.train.config import CLASSIFY  # noqa: E402
from pycoll.train.main import check, main  # noqa: E402
from pycoll.train.stop import StopRequest  # noqa: E402
from pycoll.train.trainer import Trainer  # noqa: E402

pytestmark = [pytest.mark.cuda, pytest.mark.real_gpu, pytest.mark.timeout(240)]

WINDOWS = 4
"""Of a step, however ranks and micro-batches share them."""
STEPS, HALF = 12, 6
CONFIG = TrainConfig(
    device="cuda",
    dp=1,
    steps=STEPS,
    warmup=4,
    batch_size=1,
    grad_accum=WINDOWS,
    eval_every=STEPS,
    eval_examples=5,
    checkpoint_every=HALF,
    sample_bytes=5,
    model=GPTConfig(context=16, n_layer=4, n_head=4, d_model=32),
)
SENTENCES = replace(CLASSIFY, device="cuda", dp=1, steps=STEPS, eval_every=STEPS, eval_examples=90, model=CONFIG.model)
MIXES: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "grad_accum": WINDOWS // 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "fused": {"dp": 2, "grad_accum": WINDOWS // 2, "optimizer": "fused"},
    "torch": {"dp": 2, "grad_accum": WINDOWS // 2, "optimizer": "torch"},
}
"""Of two ranks, by name."""
ROUGHLY: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "autocast": {"dtype": "bfloat16", "optimizer": "torch"},
    "int8": {"wire_dtype": "int8"},
    "dropout": {"tp": 2, "model": replace(CONFIG.model, dropout=0.1)},
}
"""Whose losses are about as those."""


def train(rank: Rank, configs: dict[str, TrainConfig], folder: Path, where: str) -> list[str]:
    """A rank's part in a run of each, in a folder of its name; on which devices it has computed."""
    torch.set_num_threads(1)
    if where == SHARED:  # as launchers do that show each rank one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["LOCAL_RANK"] = str(rank.rank)
    rank.init_process_group(timeout=120.0)
    devices = []
    for name, config in configs.items():
        trainer = Trainer(check(config, folder / name), folder / name)
        trainer.run(StopRequest())
        devices += [str(p.device) for module in trainer.parallel.modules for p in module.parameters()]
    dist.destroy_process_group()
    return sorted({*devices})


def run(ranks: int, configs: dict[str, TrainConfig], folder: Path, where: str = SHARED) -> list[list[str]]:
    with Processes(train, ranks, configs, folder, where) as processes:
        return processes.results(2 * SECONDS)


def losses(folder: Path) -> tuple[float, float]:
    """The first training loss, and the last of the validation."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["first training loss"], summary["final validation loss"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a rank alone, on the CPU and on a GPU."""
    folder = tmp_path_factory.mktemp("one")
    config = replace(CONFIG, data=text)
    both = {"cuda": config, "classify-cuda": SENTENCES}
    both |= {"cpu": replace(config, device="cpu"), "classify-cpu": replace(SENTENCES, device="cpu")}
    [devices] = run(1, both, folder)
    assert devices == ["cpu", "cuda:0"]
    return folder


def test_a_gpu_gives_the_curve_of_the_cpu(one: Path) -> None:
    for task in ("", "classify-"):
        assert losses(one / f"{task}cuda") == pytest.approx(losses(one / f"{task}cpu"), rel=1e-4), task
    summary = json.loads((one / "cuda" / "summary.json").read_text())
    assert summary["GPU memory"] > 0 and "GPU memory" not in json.loads((one / "cpu" / "summary.json").read_text())


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_any_mix_gives_the_curve_of_the_cpu(where: str, one: Path, text: Path, tmp_path: Path) -> None:
    needs(where, 2)
    config = replace(CONFIG, data=text)
    exact = {name: replace(config, **settings) for name, settings in MIXES.items()}
    rough = {name: replace(exact["dp2"], **settings) for name, settings in ROUGHLY.items()}
    rough["dropout"] = replace(rough["dropout"], dp=1, grad_accum=WINDOWS)
    devices = run(2, {**exact, **rough}, tmp_path, where)
    assert devices == ([["cuda:0"], ["cuda:0"]] if where == SHARED else [["cuda:0"], ["cuda:1"]])
    for name in MIXES:
        assert losses(tmp_path / name) == pytest.approx(losses(one / "cpu"), rel=1e-4), name
    for name in ROUGHLY:
        assert losses(tmp_path / name) == pytest.approx(losses(one / "cpu"), rel=0.03), name


def test_runs_go_on_from_the_other_devices_checkpoints(one: Path, text: Path, tmp_path: Path) -> None:
    halfway = {name: one / name / f"checkpoint-{HALF:08d}.safetensors" for name in ("cpu", "cuda")}
    config = replace(CONFIG, data=text)
    dropping = replace(config, model=replace(CONFIG.model, dropout=0.1))
    configs = {
        "on-cpu": replace(config, device="cpu", resume=halfway["cuda"]),
        "on-cuda": replace(config, resume=halfway["cpu"]),
        "dropout": dropping,
        "resumed": replace(dropping, resume=tmp_path / "dropout" / halfway["cuda"].name),
    }
    run(1, configs, tmp_path)
    for name in ("on-cpu", "on-cuda"):
        assert losses(tmp_path / name)[1] == pytest.approx(losses(one / "cpu")[1], rel=1e-4), name
    # What is drawn on the GPU follows from the seed and the step: a resumed run drops what the straight one did.
    assert losses(tmp_path / "resumed")[1] == pytest.approx(losses(tmp_path / "dropout")[1], rel=1e-5)


def test_the_command(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks, which share a GPU where there is but one."""
    flags = "--steps 4 --warmup 2 --batch-size 2 --eval-every 2 --eval-examples 4 --checkpoint-every 2 --sample-bytes 5"
    model = "--model.context 16 --model.n-layer 1 --model.n-head 2 --model.d-model 16"
    arguments = ["--device", "cuda", "--data", str(text), "--out", str(tmp_path), *flags.split(), *model.split()]
    assert main(arguments) == 0
    said = capfd.readouterr().out
    assert f"2 ranks on {min(2, torch.cuda.device_count())} x {torch.cuda.get_device_name()}" in said
    assert ("ranks share a GPU" in said) == (torch.cuda.device_count() == 1)
    assert checkpoint.read_header(checkpoint.find(tmp_path)).step == 4


def test_a_batch_of_no_texts_has_gradients() -> None:
    model = Encoder(EncoderConfig(context=8, n_layer=1, n_head=2, d_model=16)).cuda()
    scores = model(torch.zeros(0, 8, dtype=torch.int64).cuda(), torch.zeros(0, dtype=torch.int64).cuda())
    scores.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_peak_of_the_gpu() -> None:
    """More than a CPU's, and than nothing."""
    assert measured_peak(torch.bfloat16, device="cuda") > 1e12
