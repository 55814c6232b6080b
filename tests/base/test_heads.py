"""Heads, configurations, models in hand, tokenizers and fingerprints of bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from surgeon.base import fingerprint, load_base, open_base
from surgeon.base.configuration import written_config
from surgeon.base.heads import AUTO, head_of
from surgeon.errors import BaseError, SpecError
from surgeon.spec import BaseSpec, HeadName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tiny = Callable[..., "PreTrainedModel"]
Refused = Callable[..., str]
RANDOM = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
KINDS = ("bert", "roberta", "albert", "distilbert", "gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "t5", "bart")


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
    kind: str, tiny: Tiny, tmp_path: Path, refused: Refused
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
