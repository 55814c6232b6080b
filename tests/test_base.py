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

from surgeon.base import fingerprint, load_base, open_base
from surgeon.base.configuration import written_config
from surgeon.base.heads import AUTO, head_of
from surgeon.errors import BaseError, SpecError
from surgeon.spec import BaseSpec, HeadName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tiny = Callable[..., "PreTrainedModel"]
KINDS = ("bert", "roberta", "albert", "distilbert", "gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "t5", "bart")
RANDOM = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def folder(base_folder: Path, tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny classifier's folder of two layers, to be damaged."""
    copied = Path(shutil.copytree(base_folder, tmp_path / "base"))
    tiny("bert").save_pretrained(copied)
    return copied


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(model: Path | str, **options: Any) -> str:
    with pytest.raises(BaseError) as caught:
        open_base(BaseSpec(model=str(model), **options))
    assert caught.value.exit_code == 1
    assert caught.value.where == str(model)
    return str(caught.value)


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


def test_a_missing_pooler_is_no_fault_and_a_missing_layer_is(folder: Path) -> None:
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


def test_weights_in_several_files_open_as_one(folder: Path) -> None:
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
def test_a_damaged_base_is_refused_by_name(damage: Callable[[Path], object], said: str, folder: Path) -> None:
    damage(folder)
    assert said in refused(folder)


def test_weights_of_another_index_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for text in ("{}", "{", '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(text)
        assert "model.safetensors.index.json" in refused(folder)


def test_code_in_a_folder_does_not_run_unless_the_spec_says_so(folder: Path, tmp_path: Path) -> None:
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
def test_a_base_that_is_not_there_is_named(model: str, said: str) -> None:
    assert said in refused(model)


def test_a_package_is_found_without_running_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_hub_id_opens_from_the_local_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--some--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = open_base(BaseSpec(model="some/base"))
    assert base.source == "some/base"
    assert base.tokenizer_path is not None
    assert "not in the local cache" in refused("some/base", revision="v2")


def test_a_configuration_gives_a_random_base_from_the_seed() -> None:
    spec = BaseSpec(config=RANDOM, head="masked-lm")
    first, again, other = open_base(spec), open_base(spec), open_base(spec, seed=3)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.source, first.max_length, first.tokenizer_path) == ("a random bert", 64, None)
    assert not first.model.training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "berd"}, "did you mean 'bert'?"),
        ({"model_type": 3}, "unknown model type 3"),
        ({"model_type": None}, "it needs a model_type"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'?"),
        ({"hidden_size": "x"}, "a bert configuration does not take this"),
        ({"num_attention_heads": 7}, "is not a multiple of the number of attention heads"),
        ({"hidden_act": "gelou"}, "cannot be built from this configuration"),
    ],
)
def test_a_configuration_that_does_not_fit_is_a_mistake_of_the_spec(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        open_base(BaseSpec(config={**RANDOM, **changes}))
    assert said in str(caught.value)
    assert str(caught.value.where).startswith("base.config")


def test_keys_that_checkpoints_write_beside_the_fields_are_taken() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
              "num_hidden_layers": 1, "vocab_size": 50, "rope_theta": 500.0, "num_labels": 3}  # fmt: skip
    model = load_base(BaseSpec(config=config), weights=False)
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.num_labels == 3


def test_a_head_that_the_model_has_not_is_refused_with_those_it_has() -> None:
    with pytest.raises(BaseError, match="a bert model has no head 'seq2seq-lm'") as caught:
        open_base(BaseSpec(config=RANDOM, head="seq2seq-lm"))
    assert "masked-lm" in str(caught.value)


# Classes of transformers that name their parts unlike the other heads of the same model, and would start at random.
NEVER_FOUND = {("llama", "question-answering"), ("qwen3", "question-answering"), ("bart", "causal-lm")}


def heads(kind: str) -> list[HeadName]:
    return [head for head, auto in AUTO.items() if kind in auto._model_mapping._model_mapping]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_hand_has_the_head_it_was_made_for(kind: str, tiny: Tiny) -> None:
    seen = set()
    for head in heads(kind):
        model = tiny(kind, head)
        assert head_of(model) == head or type(model) in seen  # one class may serve several heads: the first names it
        seen.add(type(model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_opens_from_a_folder_with_its_own_weights_or_with_a_head_reported_fresh(
    kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    own = tiny(kind)
    own.save_pretrained(tmp_path)
    for head in heads(kind):
        if (kind, head) in NEVER_FOUND:
            assert "are missing" in refused(tmp_path, head=head)
            continue
        base = open_base(BaseSpec(model=str(tmp_path), head=head))
        state = base.model.state_dict()
        if type(base.model) is type(own):
            assert base.fresh == ()
            assert base.fingerprint == fingerprint(own)
        assert not any(name.startswith(f"{own.base_model_prefix}.") and "pooler" not in name for name in base.fresh)
        assert set(base.fresh) <= set(state)


def test_a_class_of_the_users_own_has_a_head_too(tiny: Tiny) -> None:
    from transformers import AutoModelForNextSentencePrediction

    made = tiny("bert")
    own = type("Mine", (type(made),), {})(made.config)
    assert head_of(own) == "sequence-classification"
    with pytest.raises(BaseError, match="has no head that Surgeon knows"):
        head_of(AutoModelForNextSentencePrediction.from_config(made.config))


def test_a_model_in_hand_stays_as_it_is(tiny: Tiny) -> None:
    model = tiny("bert").train()
    base = open_base(model)
    assert base.model is model
    assert model.training
    assert base.source == "a model in hand"
    assert base.tokenizer_path is None
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(BaseError, match=r"classifier\.bias holds 1 values"):
        open_base(model)


def test_a_model_in_hand_from_a_folder_has_its_tokenizer(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = open_base(AutoModelForSequenceClassification.from_pretrained(folder))
    assert base.tokenizer_path == folder / "tokenizer.json"
    assert base.fingerprint == open_base(BaseSpec(model=str(folder))).fingerprint


def test_a_tokenizer_of_older_files_is_converted(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    base = open_base(BaseSpec(model=str(folder)))
    assert base.tokenizer_path is not None
    assert '"good"' in base.tokenizer_path.read_text()


@pytest.mark.parametrize(
    ("kind", "positions"), [("bert", 64), ("roberta", 64), ("gpt2", 64), ("opt", 64), ("t5", None)]
)
def test_text_has_the_positions_that_the_table_leaves_it(kind: str, positions: int | None, tiny: Tiny) -> None:
    assert open_base(tiny(kind)).max_length == positions


def test_the_tokenizer_may_allow_less(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    for said, length in ((32, 32), (1e30, 64), ("x", 64)):
        path.write_text(json.dumps({"model_max_length": said}))
        assert open_base(BaseSpec(model=str(folder))).max_length == length


def test_the_fingerprint_changes_with_any_bit_and_with_nothing_else(tiny: Tiny) -> None:
    model = tiny("gpt2")
    before = fingerprint(model)
    assert before == fingerprint(tiny("gpt2")) == fingerprint(model.train())
    assert before != fingerprint(tiny("gpt2", seed=1))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] += 1e-7
    assert before != fingerprint(model)
    assert fingerprint(tiny("gpt2").to(torch.bfloat16)) != before
    assert len(before) == 64


def test_the_fingerprint_knows_classes_and_ties(tiny: Tiny) -> None:
    tied, loose = tiny("gpt2"), tiny("gpt2", tie_word_embeddings=False)
    loose.load_state_dict(tied.state_dict())
    assert fingerprint(tied) != fingerprint(loose)
    same = type("Other", (type(tied),), {})(tied.config)
    same.load_state_dict(tied.state_dict())
    assert fingerprint(same) != fingerprint(tied)


def test_a_written_configuration_may_hold_what_only_the_models_code_reads() -> None:
    config = written_config({"model_type": "deberta-v2", "position_buckets": 8})
    assert config.position_buckets == 8
    with pytest.raises(SpecError, match="position_bucket"):
        written_config({"model_type": "deberta-v2", "position_bucket": 8})
