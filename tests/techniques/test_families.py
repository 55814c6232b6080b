"""Every technique in every family we know, wide and slow: sites found, born right, trained whole, exported alike."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from surgeon.errors import SelectorError
from surgeon.exporters.onnx import OnnxExporter

pytestmark = pytest.mark.sweep

_SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_DROPS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
_DROPS |= {"resid_pdrop": 0.0, "classifier_dropout_prob": 0.0}
KNOWN = ("bert", "roberta", "albert", "distilbert", "gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "t5", "bart")
MORE = {
    "deberta-v2": _SIZES
    | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    | {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
    | {"max_relative_positions": -1},
    "modernbert": _SIZES
    | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "mpnet": _SIZES | {"pad_token_id": 1},
    "electra": _SIZES | {"embedding_size": 16},
    "gptj": {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "falcon": _SIZES | {"multi_query": True, "parallel_attn": True, "bias": False},
    "phi3": _SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": _SIZES | {"num_key_value_heads": 2, "sliding_window": None},
}
CAUSAL = ("gptj", "falcon", "phi3", "mistral")
BIASLESS = ("llama", "qwen3", "gemma2", "t5", "phi3", "mistral", "modernbert")
TECHNIQUES = {
    "lora": {"lora": {"rank": 3, "where": ["attention", "ffn"]}},
    "dora": {"lora": {"rank": 3, "dora": True, "where": ["attention", "ffn"]}},
    "lora_table": {"lora": {"rank": 3, "where": "embedding.token"}},
    "adalora": {"adalora": {"rank": 3, "target_rank": 2}},
    "vera": {"vera": {"rank": 8, "where": ["attention", "ffn"]}},
    "houlsby": {"adapter": {"bottleneck": 5}},
    "pfeiffer": {"adapter": {"bottleneck": 5, "placement": "pfeiffer", "activation": "relu"}},
    "parallel": {"adapter": {"bottleneck": 5, "placement": "parallel"}},
    "bitfit": {"bitfit": {}},
    "prefix": {"prefix": {"length": 4}},
    "prefix_mlp": {"prefix": {"length": 4, "hidden": 6}},
    "prompt": {"prompt": {"length": 4}},
    "p_tuning": {"p_tuning": {"template": "[P]*3 {text} [P]*2"}},
    "p_tuning_v2": {"p_tuning_v2": {"length": 4, "dropout": 0.0}},
}
NOT_BORN_AS_THE_BASE = ("prefix", "prefix_mlp", "prompt", "p_tuning", "p_tuning_v2")
COMPOSED = (TECHNIQUES["lora"], TECHNIQUES["prefix"], TECHNIQUES["parallel"])


@pytest.fixture(scope="module")
def family(lab):
    """A tiny base of a family, the same for every test."""
    made = {}

    def make(kind):
        if kind in KNOWN:
            return lab.base(kind)
        if kind not in made:
            auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSequenceClassification
            torch.manual_seed(0)
            made[kind] = auto.from_config(AutoConfig.for_model(kind, **MORE[kind], **_DROPS)).eval()
            with torch.no_grad():
                for parameter in made[kind].parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return made[kind]

    return make


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", [*KNOWN, *MORE])
def test_a_technique_is_born_as_the_base_and_trained_whole(kind, technique, family, lab):
    model = family(kind)
    if technique == "bitfit" and kind in BIASLESS:
        with pytest.raises(SelectorError, match="no selected site has a bias"):
            lab.operate(model, TECHNIQUES[technique])
        return
    ours = lab.operate(model, TECHNIQUES[technique]).model("a").eval()
    fed = lab.batch(model)
    if technique not in NOT_BORN_AS_THE_BASE:
        assert torch.equal(ours(**fed).logits, model(**fed).logits)
    lab.move(ours)
    ours.train()(**fed).loss.backward()
    idle = [name for name, tensor in lab.own(ours).items() if tensor.grad is None or not tensor.grad.abs().max() > 0]
    assert idle == []
    assert lab.gap(ours.eval()(**fed).logits, model(**fed).logits) > 1e-3


@pytest.mark.parametrize("kind", [*KNOWN, *MORE])
def test_a_composed_graph_is_the_same_in_onnx_runtime(kind, family, lab, tmp_path):
    model = family(kind)
    compiled = lab.operate(model, *COMPOSED)
    ours = lab.move(compiled.model("a")).eval()
    OnnxExporter().export(compiled.program, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "model.onnx", options)
    deltas = {name: tensor.detach().numpy() for name, tensor in ours.deployed().items()}
    fills = {i.name: i.fill for i in compiled.program.inputs}
    for batch, length, pad in ((3, 11, 4), (1, 5, 0), (2, 20, 3)):
        fed = lab.feed(model, batch, length, pad=pad)
        fed = {name: fed.get(name, torch.full_like(fed["input_ids"], fills[name] or 0)) for name in fills}
        arrays = {name: tensor.numpy() for name, tensor in fed.items()}
        seen = fed["attention_mask"].bool().numpy()
        for given, peer in ((arrays | deltas, ours), (arrays, model)):
            with torch.no_grad():
                wanted = peer(**fed).logits.numpy()
            found = session.run(["logits"], given)[0]
            if wanted.ndim == 3 and wanted.shape[:2] == seen.shape:  # what a padded place says is of no use
                found, wanted = found[seen], wanted[seen]
            assert np.abs(found - wanted).max() <= 1e-4
