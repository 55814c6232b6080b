"""The base: the weights that are in its files and no others, or an error that names what is wrong with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from surgeon.base import load_base, open_base
from surgeon.spec import BaseSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tiny = Callable[..., "PreTrainedModel"]
Refused = Callable[..., str]
RANDOM = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_folder_opens_with_exactly_its_weights(folder: Path) -> None:
    base = open_base(BaseSpec(model=str(folder)))
    state = base.model.state_dict()
    files = load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in files.items())
    assert base.fresh == ()
    assert base.head == "sequence-classification"
    assert base.source == str(folder)
    assert base.tokenizer_path == folder / "tokenizer.json"
    assert base.max_length == 64
    assert not base.model.training


def test_opening_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_base(BaseSpec(model=str(folder), head="token-classification"))
    assert capfd.readouterr() == ("", "")


def test_a_head_the_files_lack_is_drawn_from_the_seed_and_reported(folder: Path) -> None:
    state = torch.random.get_rng_state()
    spec = BaseSpec(model=str(folder), head="question-answering")
    first, again, other = open_base(spec), open_base(spec), open_base(spec, seed=1)
    assert first.fresh == ("qa_outputs.bias", "qa_outputs.weight")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_missing_pooler_is_no_fault_and_a_missing_layer_is(folder: Path, refused: Refused) -> None:
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    assert open_base(BaseSpec(model=str(folder))).fresh == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    edit_weights(folder, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    assert "1 of the 39 tensors that a bert model is made of are missing: bert.encoder.layer.1" in refused(folder)


def test_without_weights_the_base_is_on_the_meta_device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    base = open_base(BaseSpec(model=str(folder)), weights=False)
    assert {parameter.device.type for parameter in base.model.parameters()} == {"meta"}
    assert base.fingerprint == ""
    assert load_base(BaseSpec(config=RANDOM), weights=False).device.type == "meta"


def test_weights_are_float32_unless_the_spec_says_otherwise(folder: Path) -> None:
    edit_config(folder, dtype="bfloat16")
    assert load_base(BaseSpec(model=str(folder))).dtype == torch.float32
    assert load_base(BaseSpec(model=str(folder), dtype="bfloat16")).dtype == torch.bfloat16


def test_weights_in_several_files_open_as_one(folder: Path, refused: Refused) -> None:
    whole = open_base(BaseSpec(model=str(folder)))
    (folder / "model.safetensors").unlink()
    whole.model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert open_base(BaseSpec(model=str(folder))).fingerprint == whole.fingerprint
    next(folder.glob("model-00002-*")).unlink()
    assert "weights are missing: model-00002-" in refused(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "there is no config.json in it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda f: edit_config(f, model_type="berd"), "did you mean 'bert'?"),
        (lambda f: edit_config(f, model_type={}), "no model type that transformers knows"),
        (lambda f: edit_config(f, model_type=None), "no model type that transformers knows"),
        (lambda f: edit_config(f, num_attention_heads=7), "hidden size (32) is not a multiple"),
        (lambda f: edit_config(f, hidden_size="wide"), "config.json does not fit"),
        (lambda f: edit_config(f, num_hidden_layers=3), "16 of the 55 tensors"),
        (lambda f: edit_config(f, num_hidden_layers=1), "16 tensors that config.json has no place for"),
        (lambda f: edit_config(f, hidden_size=64), "weights are of other shapes than config.json says"),
        (lambda f: edit_config(f, num_labels=5), "classifier.bias [2], not [5]"),
        (lambda f: edit_config(f, model_type="gpt2"), "tensors that a gpt2 model is made of are missing"),
        (lambda f: edit_config(f, model_type="vit"), "a vit model has no head 'sequence-classification'"),
        (lambda f: edit_config(f, attn_implementation="some/kernel"), "asks for code from the hub: some/kernel"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "this folder holds an adapter"),
        (lambda f: (f / "model.safetensors").unlink(), "weights are missing: model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles (pytorch_model.bin)"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is truncated or damaged"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            "model.safetensors is truncated or damaged",
        ),
        (
            lambda f: edit_weights(f, lambda t: t["bert.pooler.dense.weight"].__setitem__((3, 5), torch.nan)),
            "bert.pooler.dense.weight holds 1 values that are NaN or infinite, of 1024, first at [3, 5]",
        ),
        (lambda f: edit_weights(f, lambda t: t["classifier.bias"].fill_(torch.inf)), "first at [0]"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"bert.embeddings.LayerNorm.beta2": torch.ones(3)})),
            "1 tensors that config.json has no place for",
        ),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"),
    ],
)
def test_a_damaged_base_is_refused_by_name(
    damage: Callable[[Path], object], said: str, folder: Path, refused: Refused
) -> None:
    damage(folder)
    assert said in refused(folder)


def test_weights_of_another_index_are_refused(folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for text in ("{}", "{", '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(text)
        assert "model.safetensors.index.json" in refused(folder)


def test_code_in_a_folder_does_not_run_unless_the_spec_says_so(folder: Path, tmp_path: Path, refused: Refused) -> None:
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    assert "trust_remote_code: true" in refused(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./none", "there is no such folder"),
        ("/none/at/all", "there is no such folder"),
        ("~/none/at/all", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        (__file__, "the base is a folder, and this is a file"),
        ("nobody/nothing", "not in the local cache, and the hub is switched off"),
        ("a b", "it is no folder here, and the hub says"),
        ("package:surgeon_none/model", "there is no installed package 'surgeon_none'"),
        ("package:json/model", "package 'json' has no such folder"),
        ("package:../x", "this is not of the form"),
        ("package:json/../x", "this is not of the form"),
        ("package:a.b/x", "this is not of the form"),
        ("package:", "this is not of the form"),
    ],
)
def test_a_base_that_is_not_there_is_named(model: str, said: str, refused: Refused) -> None:
    assert said in refused(model)


def test_a_package_is_found_without_running_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    package = tmp_path / "site" / "boxed_base"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package ran')")
    shutil.copytree(folder, package / "deep" / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    base = open_base(BaseSpec(model="package:boxed_base/deep/model"))
    assert base.source == "package:boxed_base/deep/model"
    assert base.fingerprint == open_base(BaseSpec(model=str(folder))).fingerprint
    assert "boxed_base" not in sys.modules
    assert "package:boxed_base/deep/model" in refused("package:boxed_base/shallow")


def test_a_hub_id_opens_from_the_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    repository = tmp_path / "hub" / "models--some--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = open_base(BaseSpec(model="some/base"))
    assert base.source == "some/base"
    assert base.tokenizer_path is not None
    assert "not in the local cache" in refused("some/base", revision="v2")
