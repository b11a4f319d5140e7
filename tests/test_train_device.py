"""--device: which is chosen, what is refused; and that all of a run computes there, shown on a pretended device."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretended_device
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from training import TINY, write_text

from pycoll import checkpoint
from pycoll.models import GPT, GPTConfig, peak_of
from pycoll.models.flops import DATASHEETS
from pycoll.models.gpt import Transformer
from pycoll.tensor_parallel import parallelize_gpt, vocab_parallel_cross_entropy
from pycoll.testing import Processes, Rank
from pycoll.train import ConfigError, TrainConfig, device, trainer
from pycoll.train.config import CLASSIFY
from pycoll.train.main import check, main, parse
from pycoll.train.mesh import Mesh
from pycoll.train.optimization import adam_settings
from pycoll.train.parallel import WholeModel
from pycoll.train.pipeline import Pipeline
from pycoll.train.stop import StopRequest
from pycoll.train.task import Task

# Choosing


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that there are `gpus`, and that pycoll was built with CUDA or not; the GPUs that were made current."""
    current: list[torch.device] = []

    def make(gpus: int, built: bool = True) -> list[torch.device]:
        monkeypatch.setattr(device, "build_info", lambda: {"cuda": {"built": built, "reason": "no nvcc found"}})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return make


@pytest.mark.parametrize(
    ("asked", "gpus", "built", "settings", "expected"),
    [
        ("auto", 1, True, {}, "cuda"),
        ("auto", 0, True, {}, "cpu"),
        ("auto", 1, False, {}, "cpu"),
        ("auto", 1, True, {"sync": "diloco"}, "cpu"),
        ("auto", 1, True, {"optimizer": "torch", "wire_dtype": "int8"}, "cpu"),
        ("auto", 1, True, {"backend": "gloo"}, "cuda"),
        ("cpu", 1, True, {}, "cpu"),
        ("cuda", 1, True, {}, "cuda"),
    ],
)
def test_device_that_is_chosen(
    asked: str, gpus: int, built: bool, settings: dict[str, Any], expected: str, machine: Any
) -> None:
    machine(gpus, built)
    config = TrainConfig(device=asked, eval_every=50, checkpoint_every=50, **settings)  # type: ignore[arg-type]
    assert device.kind_of(config) == expected


@pytest.mark.parametrize(
    ("gpus", "built", "arguments", "said"),
    [
        (0, True, ["--device", "cuda"], r"--device is cuda, but torch .* sees no CUDA GPU. Give cpu, or auto"),
        (1, False, ["--device", "cuda"], r"--device is cuda, but pycoll was built without CUDA: no nvcc found"),
        (0, True, ["--backend", "nccl"], r"--backend is nccl, which knows GPUs alone, but torch .* sees no CUDA GPU"),
        (2, True, ["--backend", "nccl", "--dp", "3"], r"nccl needs a GPU for each of 3 ranks, and there are 2"),
    ],
)
def test_what_cannot_be_is_refused_before_any_process_starts(
    gpus: int, built: bool, arguments: list[str], said: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus, built)
    monkeypatch.setattr("pycoll.train.main.launch", lambda *_: pytest.fail("it was launched"))
    with pytest.raises(ConfigError, match=said):
        main(arguments)


def test_nccl_needs_a_gpu_for_each_rank_that_another_launcher_starts(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    nccl = TrainConfig(backend="nccl", dp=2)
    for gpus in (1, 3):  # one may be each rank's own
        machine(gpus)
        device.check_device(nccl, launches=False)
    machine(2)
    with pytest.raises(ConfigError, match="a GPU for each of 3 ranks, and there are 2"):
        device.check_device(nccl, launches=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "nccl", "device": "cpu"}, "--backend is nccl: give gloo or pycoll, or --device cuda"),
        ({"sync": "async", "device": "cuda"}, "--device is cuda: give cpu, since --sync async keeps what ranks"),
        (
            {"optimizer": "torch", "wire_dtype": "int8", "device": "cuda"},
            r"--device is cuda: give cpu, since --optimizer torch with --wire-dtype int8 \(pycoll.ddp_hook\) reads",
        ),
        ({"backend": "nccl", "wire_dtype": "int8"}, "--wire-dtype is int8: give float32, since --backend nccl is what"),
    ],
)
def test_settings_that_no_machine_can_do_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"), [(1, "3", 0), (2, "3", 1), (4, "3", 3), (8, None, 5)], ids=str
)
def test_gpu_of_a_rank(
    gpus: int, local_rank: str | None, expected: int, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number on the machine, in turns; among all ranks, where no launcher has told it."""
    current = machine(gpus)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert device.take_device(TrainConfig(device="cuda")) == torch.device("cuda", expected)
    assert current == [torch.device("cuda", expected)]
    assert device.take_device(TrainConfig(device="cpu")) == torch.device("cpu") and len(current) == 1


@pytest.mark.parametrize(("was", "is_now"), [("cuda", "auto"), ("cpu", "cpu"), ("auto", "auto")])
def test_a_run_of_a_gpu_goes_on_without_one(was: str, is_now: str, tmp_path: Path) -> None:
    config = TrainConfig(device=was).to_dict()  # type: ignore[arg-type]
    checkpoint.save(tmp_path, checkpoint.Header(1, 1, {}, config, "", 1.0), {"model.x": torch.zeros(1)})
    assert parse(["--resume", str(tmp_path)]).device == is_now
    assert parse(["--resume", str(tmp_path), "--device", "cpu"]).device == "cpu"


def test_peak_of_a_gpu_is_its_datasheets(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("pycoll.models.flops.measured_peak", lambda dtype, device: 5.0)
    for dtype in (torch.bfloat16, torch.float16):
        assert peak_of(gpu, dtype) == (989e12, "989 TFLOP/s, NVIDIA H200's datasheet (dense bf16)")
    assert peak_of(gpu, torch.float32) == (5.0, "fp32 matrix products' FLOP/s")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert "another GPU" not in DATASHEETS and peak_of(gpu, torch.bfloat16) == (5.0, "bf16 matrix products' FLOP/s")


# Computing

LANGUAGE = replace(TINY, dp=2, grad_accum=2, eval_every=3, sample_bytes=0, checkpoint_activations=True)
SENTENCES = replace(
    CLASSIFY, device="cpu", steps=6, batch_size=2, eval_every=3, checkpoint_every=3, eval_examples=90, model=TINY.model
)


class OnDevice(WholeModel):
    """Data parallel by hand, with torch's AdamW: pycoll's own know no pretended device."""

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(task, mesh)
        assert isinstance(model, Transformer)
        self.model = model.to(mesh.device)
        self.modules = [self.model]
        self.optimizer = torch.optim.AdamW(**adam_settings(self.model, task.config), foreach=False)

    def _clip(self, max_norm: float) -> Tensor:
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)


@contextmanager
def computing_on(where: torch.device) -> Iterator[None]:
    """What the trainer asks of a GPU is answered for `where`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_parallel", OnDevice)
        patch.setattr(trainer, "take_device", lambda config: where)
        patch.setattr(trainer, "count_gpus", lambda device: 0)
        with nullcontext() if where.type == "cpu" else pretended_device.Mode():
            yield


def train(config: TrainConfig, out: Path, where: torch.device) -> None:
    with computing_on(where):
        run = trainer.Trainer(check(config, out), out)
        run.run(StopRequest())
        assert {parameter.device for parameter in run.parallel.modules[0].parameters()} == {where}


def pipeline(where: torch.device) -> list[Tensor]:
    """The scores, and the gradient of the tied matrix. (torch's own schedules know no pretended device.)"""
    torch.manual_seed(3)
    mesh = Mesh(1, 2, where)
    model = GPT(GPTConfig(context=8, n_layer=2, n_head=2, d_model=16))
    made = Pipeline(model, mesh, schedule="1f1b", stages_per_rank=1, micro_batches=2, loss=nn.functional.cross_entropy)
    scores = made.forward(torch.randint(256, (4, 8)).to(where))
    assert made.tied is not None and (scores is None) == made.is_first
    made.tied.grad = torch.full_like(made.tied, 1.0 + mesh.pp_rank)
    made._add_tied_up()
    assert mesh.any(mesh.pp_rank == 1) and not mesh.any(False)
    found = [made.tied.grad, *([] if scores is None else [scores])]
    assert {x.device for x in (*found, *made.modules.parameters())} == {where}
    assert bool((made.tied.grad == 3).all())
    return [x.detach().cpu() for x in found]


def tensor_parallel(where: torch.device) -> list[Tensor]:
    """The loss and the gradients of this rank's part, with sequence parallelism."""
    torch.manual_seed(4)
    mesh = Mesh(2, 1, where)
    model = GPT(GPTConfig(vocab_size=31, context=8, n_layer=1, n_head=2, d_model=16)).to(where)
    parallelize_gpt(model, mesh.tp_group, sequence_parallel=True)
    tokens, targets = (torch.randint(31, (2, 8)).to(where) for _ in range(2))
    loss = vocab_parallel_cross_entropy(model(tokens), targets, mesh.tp_group, vocab_size=31).mean()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert {x.device for x in (loss, *gradients)} == {where}
    return [x.detach().cpu() for x in (loss, *gradients)]


def on_both(rank: Rank, text: Path, folder: Path) -> None:
    """All of it on the CPU, and on the pretended device; a run on each goes on from the other's checkpoint."""
    torch.set_num_threads(1)
    rank.init_process_group()
    cpu, there = torch.device("cpu"), pretended_device.register()
    for name, config in (("language", replace(LANGUAGE, data=text)), ("classify", SENTENCES)):
        for where, other in ((cpu, there), (there, cpu)):
            out = folder / name / where.type
            train(config, out, where)
            train(replace(config, resume=out / "checkpoint-00000003.safetensors"), out / "resumed", other)
    for part in (pipeline, tensor_parallel):
        expected = part(cpu)
        with pretended_device.Mode():
            found = part(there)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    with Processes(on_both, 2, write_text(folder), folder) as ranks:
        ranks.results(100)
    return folder


@pytest.mark.parametrize("task", ("language", "classify"))
def test_a_run_computes_on_its_device_alone(task: str, runs: Path) -> None:
    """Steps, evaluations, checkpoints, and going on from them, with the results of the CPU, within rounding."""
    reference, *others = (runs / task / name for name in ("cpu", "gpu", "cpu/resumed", "gpu/resumed"))
    expected = json.loads((reference / "summary.json").read_text())
    for out in others:
        summary = json.loads((out / "summary.json").read_text())
        for name in ("first training loss", "final validation loss"):
            assert summary[name] == pytest.approx(expected[name], rel=1e-5), (out, name)
        weights = load_file(checkpoint.find(reference))
        for name, found in load_file(checkpoint.find(out)).items():
            if "qkv.bias" not in name:  # keys' biases change no score: their gradient is rounding, which Adam enlarges
                torch.testing.assert_close(found, weights[name], rtol=1e-3, atol=1e-5)


def test_the_pretended_device_refuses_what_a_gpu_does(tmp_path: Path) -> None:
    with Processes(refusals, 1) as ranks:
        assert ranks.results(60) == [["add", "add_", "stack", "mm", "copied"]]


def refusals(rank: Rank) -> list[str]:
    there = pretended_device.register()
    told = []
    with pretended_device.Mode():
        here, number, x = torch.ones(2, 2), torch.ones(()), torch.ones(2, 2, device=there)
        for name, call in (
            ("add", lambda: x + here),
            ("add_", lambda: number.add_(x.sum())),
            ("stack", lambda: torch.stack((x.sum(), number))),
            ("mm", lambda: here @ x),
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                call()
            told.append(name)
        assert torch.equal((x + number).to("cpu"), here + 1)
        told.append("copied")
    return told
