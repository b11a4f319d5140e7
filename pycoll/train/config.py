"""The settings of a training run, and what they must satisfy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pycoll.errors import UsageError
from pycoll.models.gpt import GPTConfig

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}
"""By the names that settings have for them."""


class ConfigError(UsageError):
    """A setting, or a combination of them, with which no run is possible."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on text, on several processes whose gradients travel through pycoll.

    Without arguments: a small model learns the Python standard library's source, byte by byte, in a few minutes.
    """

    task: Literal["language", "classify"] = "language"
    """What to learn: the next token of text, with a GPT; or to which class a text belongs, with an encoder."""
    data: Path | None = None
    """UTF-8 file or folder to learn, for classify of lines text<TAB>label (*.tsv); by default the source of this
    Python's standard library, and of its lines whether they are code, comment or docstring."""
    tokenizer: str = "bytes"
    """What a token is: bytes; bpe:N, byte pairs, N tokens learned from the text; or a tokenizer.json file."""
    cache: Path = Path("~/.cache/pycoll")
    """Folder for tokens other than bytes, which are made once."""
    out: Path | None = None
    """Folder for checkpoints, TensorBoard events and the summary; by default a new one in runs/."""
    resume: Path | None = None
    """Run folder, or one of its checkpoints, to continue; the other settings are then the run's own by default."""
    dp: int = 2
    """Data-parallel ranks: each learns from other text. dp x tp x pp processes are started on this machine; where
    torchrun starts them, their number sets dp."""
    tp: int = 1
    """Tensor-parallel ranks: attention heads, MLP and vocabulary of one model are divided by them."""
    pp: int = 1
    """Pipeline stages: the blocks of one model are divided by them. --grad-accum is the number of micro-batches."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also divide each sequence, where every one would compute the same (norms, dropout)."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """In which order a pipeline computes; interleaved gives each rank two runs of blocks instead of one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute: cuda, each on the GPU of its number on this machine, in turns where there are fewer GPUs
    than ranks; or cpu. auto is cuda where there is a GPU, pycoll was built for it, and the other settings allow it."""
    backend: Literal["pycoll", "gloo", "nccl"] = "pycoll"
    """What carries the gradients; nccl knows GPUs alone, each of which can be one rank's."""
    optimizer: Literal["sharded", "fused", "torch"] | None = None
    """Who averages gradients and updates weights: sharded is pycoll.DataParallel with ShardedAdam, fused the same with
    FusedAdam, torch its DistributedDataParallel with AdamW. By default sharded over pycoll, torch over the others."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations. 16-bit weights have fp32 masters; --optimizer torch has fp32 weights and autocast.
    With float16 the loss is scaled, so that small gradients count, and steps whose gradients overflow are skipped."""
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """How gradients travel. What int8 rounds away is added to the next step's gradients."""
    sync: Literal["step", "local", "diloco", "async"] = "step"
    """When ranks meet: at each step, to average gradients; local, every --every steps, to average weights (local SGD);
    diloco, then too, for a step by how far they have come (DiLoCo); async, never, as each serves a part of the weights.
    All but step train as --optimizer fused, show rank 0's loss between meetings, and stop when asked at the next one
    (async: at the next evaluation or checkpoint)."""
    every: int = 50
    """Steps between meetings of --sync local and diloco."""
    staleness: int = 2
    """Steps that a rank may be ahead of the slowest with --sync async."""
    restarts: int = 0
    """How often all ranks may start again, from the last whole checkpoint, when one has died or failed.
    (torchrun: --max-restarts.)"""
    seed: int = 0
    """Start of everything random."""
    plan: bool = False
    """Only say how much memory each rank would need, and what it would send, and start nothing."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Sequences of a rank in one forward pass, at most."""
    grad_accum: int = 1
    """Forward and backward passes before an optimizer step."""
    lr: float = 2e-3
    """Learning rate at its peak."""
    min_lr_share: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup: int = 50
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors (biases, norms) have none."""
    beta2: float = 0.99
    """AdamW's memory of squared gradients."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    eval_every: int = 100
    """Steps between evaluations."""
    eval_examples: int | None = None
    """Examples of the validation data in an evaluation, spread over all of it: by default 128 windows, or all texts."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints of the run that are kept."""
    sample_bytes: int = 400
    """Tokens of the text generated at the end; 0 for none."""
    init: Path | None = None
    """Folder of a GPT-2 as Hugging Face's transformers writes it, to begin with instead of random weights; the model
    has its shape. Its tokens: --tokenizer FOLDER/tokenizer.json."""
    export: Path | None = None
    """Folder for the model at the end, as Hugging Face's transformers loads it."""

    checkpoint_activations: bool = False
    """Compute activations again in the backward pass, instead of keeping them: slower, in less memory."""
    compile: bool = False
    """Compile the model's blocks."""
    preset: Literal["nano", "micro", "mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """Shape of the model by name, from 0.9 million to 1.5 billion weights; --model... change it."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """Shape of the model; it has as many tokens as the tokenizer, at least."""

    def __post_init__(self) -> None:
        positive = ("dp", "tp", "pp", "keep", "steps", "batch_size", "grad_accum", "clip", "eval_every", "every")
        for name in (*positive, "lr", "checkpoint_every"):
            if not getattr(self, name) > 0:
                self._refuse(name, "more than 0")
        if self.eval_examples is not None and self.eval_examples < 1:
            self._refuse("eval_examples", "more than 0")
        for name in ("restarts", "seed", "warmup", "weight_decay", "sample_bytes", "staleness"):
            if not getattr(self, name) >= 0:
                self._refuse(name, "at least 0")
        for name in ("beta2", "min_lr_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                self._refuse(name, "at least 0 and less than 1")
        if self.task == "classify":
            for name, only in (("tp", 1), ("pp", 1), ("tokenizer", "bytes"), ("init", None), ("export", None)):
                if getattr(self, name) != only:
                    self._refuse(name, f"{only}, or --task language")
        if self.sync != "step":
            self._check_sync()
        self._check_parts()
        if self.plan and not self.can_be_planned:
            fits = "--task language --optimizer sharded --sync step"
            raise ConfigError(f"--plan knows GPTs and pycoll's optimizers: give {fits}")
        if self.backend != "pycoll":
            only = f"since --backend {self.backend} is what others do, or --backend pycoll"
            for name, allowed in (("optimizer", (None, "torch")), ("wire_dtype", ("float32",))):
                if getattr(self, name) not in allowed:
                    self._refuse(name, f"{allowed[-1]}, {only}")
        if self.device == "cuda" and self.cpu_only is not None:
            self._refuse("device", f"cpu, since {self.cpu_only}")
        if self.backend == "nccl" and self.device == "cpu":
            self._refuse("backend", "gloo or pycoll, or --device cuda")

    def _check_sync(self) -> None:
        """What ranks that do not meet at every step can do."""
        floats = ("float32", "bfloat16") if self.sync == "async" else ("float32", "bfloat16", "float16")
        wires = ("float32", "bfloat16", "float16", "int8") if self.sync == "diloco" else ("float32",)
        allowed: dict[str, tuple[Any, ...]] = {
            "task": ("language",),
            "tp": (1,),
            "pp": (1,),
            "backend": ("pycoll",),
            "optimizer": ("fused", None),
            "dtype": floats,
            "wire_dtype": wires,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                self._refuse(name, f"{values[0]}, or another --sync than {self.sync}")
        if self.sync != "async":
            for name in ("eval_every", "checkpoint_every"):
                if getattr(self, name) % self.every:
                    self._refuse(name, f"a multiple of --every ({self.every}), so that ranks meet no more often for it")

    def _check_parts(self) -> None:
        """What a model can be divided into."""
        shape, stages = self.model, self.pp * self.stages_per_rank
        if self.tp * self.pp > 1 and self.updater != "sharded":
            self._refuse("tp" if self.tp > 1 else "pp", "1, or --optimizer sharded")
        if shape.n_head % self.tp:
            self._refuse("tp", f"a divisor of --model.n-head ({shape.n_head})")
        if self.sequence_parallel and (self.tp == 1 or shape.context % self.tp):
            self._refuse("tp", "more than 1, and a divisor of --model.context, with --sequence-parallel")
        if stages > shape.n_layer:
            self._refuse("pp", f"fewer: each of the {stages} stages needs one of the {shape.n_layer} blocks")
        if self.schedule == "1f1b" and self.grad_accum < self.pp:
            self._refuse("grad_accum", f"at least --pp ({self.pp}), so many micro-batches, or --schedule gpipe")
        if self.schedule == "interleaved" and self.pp > 1 and self.grad_accum % self.pp:
            self._refuse("grad_accum", f"a multiple of --pp ({self.pp}) with --schedule interleaved")

    def _refuse(self, name: str, allowed: str) -> None:
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {allowed}")

    @property
    def updater(self) -> Literal["sharded", "fused", "torch"]:
        """`optimizer`, chosen by `sync` and the backend where it is None."""
        if self.sync != "step":
            return "fused"
        return self.optimizer or ("sharded" if self.backend == "pycoll" else "torch")

    @property
    def cpu_only(self) -> str | None:
        """Why such a run takes place on CPUs; None where it can do so on GPUs too."""
        if self.sync != "step":
            return f"--sync {self.sync} keeps what ranks exchange in memory of the host (pycoll.relaxed)"
        if self.updater == "torch" and self.wire_dtype != "float32":
            return f"--optimizer torch with --wire-dtype {self.wire_dtype} (pycoll.ddp_hook) reads memory of the host"
        return None

    @property
    def can_be_planned(self) -> bool:
        """Whether it is known what such a run needs and sends (plan.py)."""
        return self.task == "language" and self.updater != "torch" and self.sync == "step"

    @property
    def stages_per_rank(self) -> int:
        """Stages of the pipeline on each of its ranks."""
        return 2 if self.schedule == "interleaved" and self.pp > 1 else 1

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The reverse of to_dict. Raises ConfigError where the settings are another version's."""
        names = ("data", "cache", "out", "resume", "init", "export")
        paths = {name: Path(values[name]) for name in names if values.get(name) is not None}
        try:
            return cls(**{**values, **paths, "model": GPTConfig(**values["model"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the run is of another version of pycoll ({error}): start a new one") from error


CLASSIFY = TrainConfig(
    task="classify",
    steps=3000,
    batch_size=8,
    lr=3e-3,
    warmup=100,
    eval_every=500,
    checkpoint_every=1000,
    model=GPTConfig(context=128, n_layer=2, n_head=4, d_model=64),
)
"""What `--task classify` begins with: an encoder that learns the default texts in a few minutes."""
