"""GPTs as Hugging Face's folders: bit for bit there and back, the same scores in transformers, bad folders named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pycoll.data import BPETokenizer, BPETraining, ByteTokenizer
from pycoll.data.text import Documents
from pycoll.errors import Error, UnsupportedError
from pycoll.models import GPT, GPTConfig
from pycoll.models.hugging_face import ModelFolderError, export_model, import_model

CONFIG = GPTConfig(vocab_size=300, context=32, n_layer=3, n_head=4, d_model=48, dropout=0.25)
TEXT = Documents([b"a rank waits for a rank that waits for its peer. " * 30])


def random_model(dtype: torch.dtype = torch.float32) -> GPT:
    """With biases and norms unlike those of an untrained one."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_tokens() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="compares with the library transformers")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_model(random_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(dtype)
    export_model(model, tmp_path)
    back = import_model(tmp_path)
    assert back.config == CONFIG
    assert all(parameter.requires_grad for parameter in back.parameters())
    wanted = model.state_dict()
    assert list(back.state_dict()) == list(wanted)
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, wanted[name]), name
    export_model(back, tmp_path)  # over the file that it was read from
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in import_model(tmp_path).state_dict().items())


def test_shards_and_old_names_are_read(exported: Path) -> None:
    wanted = import_model(exported).state_dict()
    weights = {name.removeprefix("transformer."): x for name, x in load_file(exported / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # the causal mask, as OpenAI's own files hold it
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    names = sorted(weights)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    (exported / "model.safetensors").unlink()
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, exported / file)
    where = {name: file for file, held in files.items() for name in held}
    (exported / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in import_model(exported).state_dict().items())
    export_model(random_model(torch.bfloat16), exported)
    assert import_model(exported).embedding.token.weight.dtype == torch.bfloat16, "the old index is gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_scores_the_same(dtype: torch.dtype, transformers: Any, tmp_path: Path) -> None:
    model, tokens = random_model(dtype), random_tokens()
    export_model(model, tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == dtype
    scores = model.float()(tokens)
    torch.testing.assert_close(theirs.eval().float()(tokens).logits, scores, rtol=0, atol=1e-4)
    assert scores.abs().max() > 1


def test_what_transformers_made_scores_the_same_here(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    shape = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours, tokens = import_model(tmp_path).eval(), random_tokens()
    assert ours.config.dropout == 0.1
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_a_bpe_goes_with_its_model(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    bpe = BPETraining(300).train(TEXT)
    export_model(random_model(), tmp_path, bpe)
    assert BPETokenizer.load(tmp_path / "tokenizer.json").digest == bpe.digest
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == bpe.document_start
    export_model(random_model(), tmp_path, ByteTokenizer())
    assert not (tmp_path / "tokenizer.json").exists(), "it would be another's"


def test_transformers_reads_the_bpe(transformers: Any, tmp_path: Path) -> None:
    bpe = BPETraining(300).train(TEXT)
    export_model(random_model(), tmp_path, bpe)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "its rank waits; \n\n  a peer doesn't"
    assert theirs(text)["input_ids"] == bpe.encode([text.encode()]).tolist()[1:]


def set_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def set_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lambda f: (f / "config.json").unlink(), ModelFolderError, r"is no GPT-2 .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), ModelFolderError, r"is no GPT-2 .*JSONDecodeError"),
        (lambda f: (f / "model.safetensors").unlink(), ModelFolderError, r"is no GPT-2 .*model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), ModelFolderError, r"is no GPT-2 .*Safetensor"),
        (set_config(n_head=5), ModelFolderError, r"is no GPT-2 .*d_model \(48\) is not a multiple of n_head \(5\)"),
        (set_config(n_embd=None), ModelFolderError, r"is no GPT-2 .*TypeError"),
        (set_config(n_layer=4), ModelFolderError, r"12 are missing \['h.3.attn.c_attn.bias', .*, 0 unknown"),
        (set_config(n_layer=2), ModelFolderError, r"0 are missing \[\], 12 unknown \['h.2.attn.c_attn.bias'"),
        (set_config(n_positions=31), ModelFolderError, r"wpe.weight of .* is \(32, 48\) .*says \(31, 48\)"),
        (set_config(model_type="llama"), UnsupportedError, r"model_type is llama: a pycoll.models.GPT has gpt2"),
        (set_config(activation_function="relu"), UnsupportedError, r"activation_function is relu: .* has gelu_new"),
        (set_config(layer_norm_epsilon=1e-6), UnsupportedError, r"layer_norm_epsilon is 1e-06: .* has 1e-05"),
        (set_config(n_inner=100), UnsupportedError, r"n_inner is 100: .* has 192"),
        (set_config(attn_pdrop=0.5), UnsupportedError, r"resid_pdrop, embd_pdrop, attn_pdrop differ"),
        (set_weights(lambda w: w.pop("transformer.wte.weight")), ModelFolderError, r"1 are missing \['wte.weight'\]"),
        (set_weights(lambda w: w.update({"extra": torch.ones(1)})), ModelFolderError, r"1 unknown \['extra'\]"),
        (set_weights(lambda w: w.update({"lm_head.weight": torch.ones(300, 48)})), UnsupportedError, "head of its own"),
    ],
)
def test_bad_folders_are_named(damage: Callable[[Path], None], kind: type[Error], said: str, exported: Path) -> None:
    damage(exported)
    with pytest.raises(kind, match=said):
        import_model(exported)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Error, match=r"file cannot be written .*: give another folder"):
        export_model(random_model(), tmp_path / "file")
