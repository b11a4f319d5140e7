"""GPTs as folders of Hugging Face's `transformers`, and back: what GPT2LMHeadModel.from_pretrained loads.

A folder holds config.json, model.safetensors with GPT-2's names (or several files and an index of them) and, of a BPE,
tokenizer.json. GPT-2's linear layers keep their weights as (inputs, outputs), ours as (outputs, inputs).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pycoll.data.tokenizer import BPETokenizer, Tokenizer
from pycoll.errors import Error, UnsupportedError, UsageError
from pycoll.models.gpt import GPT, GPTConfig

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
_OUTSIDE = {
    "embedding.token.weight": "wte.weight",
    "embedding.position.weight": "wpe.weight",
    "head.norm.weight": "ln_f.weight",
    "head.norm.bias": "ln_f.bias",
}
_IN_A_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.project": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.expand": "mlp.c_fc",
    "mlp.project": "mlp.c_proj",
}
_PREFIX = "transformer."
"""Of all weights in what transformers writes; OpenAI's own files lack it."""
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Constants that older files hold beside the weights."""
_ASSUMED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What config.json may say; the first is also what it means where it says nothing."""
_SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "n_embd",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class ModelFolderError(UsageError):
    """The folder is missing or damaged, or its weights are not those of the model that it describes."""


def export_model(model: GPT, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes `model`, in its dtype, and a BPE as files that `transformers` loads; what is there already is replaced.

    Raises Error where they cannot be written.
    """
    state = model.state_dict()
    weights = {
        _PREFIX + theirs: (state[ours].T if turned else state[ours]).contiguous()
        for ours, (theirs, turned) in _names(model.config).items()
    }
    values = {
        "architectures": ["GPT2LMHeadModel"],
        **{name: allowed[0] for name, allowed in _ASSUMED.items()},
        **dict.fromkeys(_DROPOUTS, model.config.dropout),
        **{theirs: getattr(model.config, ours) for ours, theirs in _SIZES.items()},
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer and tokenizer.document_start),
        "dtype": str(model.embedding.token.weight.dtype).removeprefix("torch."),
    }
    unfinished = folder / f"{WEIGHTS}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, unfinished, {"format": "pt"})
        unfinished.replace(folder / WEIGHTS)  # not over the file that `model` itself may be mapped from
        for old in (INDEX, TOKENIZER):
            (folder / old).unlink(missing_ok=True)
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(folder / TOKENIZER)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise Error(f"{folder} cannot be written ({error}): give another folder, or make room") from error


def import_model(folder: Path) -> GPT:
    """The GPT-2 in `folder`, in the dtype of its weights. `BPETokenizer.load` reads the tokenizer.json beside it.

    Raises ModelFolderError where files are missing or damaged, weights missing, unknown or of another shape, and
    UnsupportedError for what differs from GPT-2: activations, norms, untied embeddings.
    """
    config = read_shape(folder)
    with _understood(folder):
        weights = _read_weights(folder)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(_convert(folder, weights, model), assign=True)
    return model


def read_shape(folder: Path) -> GPTConfig:
    """The shape of the GPT-2 in `folder`. Raises as `import_model`."""
    with _understood(folder):
        return _read_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """Whatever else its files are than a GPT-2's is a ModelFolderError."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ModelFolderError(
            f"{folder} is no GPT-2 of Hugging Face's ({type(error).__name__}: {error}): give a folder with {CONFIG} and"
            f" {WEIGHTS}"
        ) from error


def _names(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Our names: theirs, and whether the matrix is turned."""
    names = {ours: (theirs, False) for ours, theirs in _OUTSIDE.items()}
    for layer in range(config.n_layer):
        for ours, theirs in _IN_A_BLOCK.items():
            turned = not ours.endswith("norm")
            names[f"blocks.{layer}.{ours}.weight"] = (f"h.{layer}.{theirs}.weight", turned)
            names[f"blocks.{layer}.{ours}.bias"] = (f"h.{layer}.{theirs}.bias", False)
    return names


def _read_config(values: Mapping[str, Any]) -> GPTConfig:
    for name, allowed in _ASSUMED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise UnsupportedError(f"{name} is {values[name]}: a pycoll.models.GPT has {allowed[0]}")
    if values.get("n_inner") not in (None, 4 * values["n_embd"]):
        raise UnsupportedError(f"n_inner is {values['n_inner']}: a pycoll.models.GPT has {4 * values['n_embd']}")
    dropouts = {values.get(name, 0.1) for name in _DROPOUTS}  # GPT-2's, where nothing is said
    if len(dropouts) > 1:
        raise UnsupportedError(f"{', '.join(_DROPOUTS)} differ: a pycoll.models.GPT has one dropout")
    return GPTConfig(**{ours: values[theirs] for ours, theirs in _SIZES.items()}, dropout=dropouts.pop())


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / INDEX).exists():
        return load_file(folder / WEIGHTS)
    files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / Path(file).name).items()}


def _convert(folder: Path, weights: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """The weights by our names. Raises ModelFolderError, UnsupportedError where they are others than `model` has."""
    theirs = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items() if not name.endswith(_MASKS)}
    head = theirs.pop("lm_head.weight", None)
    names = _names(model.config)
    missing = sorted({name for name, _ in names.values()} - theirs.keys())
    unknown = sorted(theirs.keys() - {name for name, _ in names.values()})
    if missing or unknown:
        raise ModelFolderError(
            f"{folder} holds other weights than its {CONFIG} describes:"
            f" {len(missing)} are missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    if head is not None and not torch.equal(head, theirs["wte.weight"]):
        raise UnsupportedError(f"{folder} has a head of its own: a pycoll.models.GPT shares it with the embedding")
    ours = {name: theirs[their].T.contiguous() if turned else theirs[their] for name, (their, turned) in names.items()}
    for name, parameter in model.named_parameters():
        if ours[name].shape != parameter.shape:
            shape = tuple(ours[name].shape)
            raise ModelFolderError(
                f"{names[name][0]} of {folder} is {shape} for our {name}: {CONFIG} says {tuple(parameter.shape)}"
            )
    return ours
