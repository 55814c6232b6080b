"""A folder that PEFT wrote becomes a task of a build, and ONNX Runtime answers as PEFT does."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

import surgeon
from surgeon.errors import DeltaError, SpecError
from surgeon.foreign import import_build, import_tasks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import (
        AdaLoraConfig,
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        VeraConfig,
    )

CLASSIFIER, CAUSAL, SEQ2SEQ = "sequence-classification", "causal-lm", "seq2seq-lm"
LORA = {"r": 4, "lora_alpha": 6}
VERA = {"r": 24, "projection_prng_key": 5}
BARE = "feature-extraction"
HEADS = {CLASSIFIER: "SEQ_CLS", CAUSAL: "CAUSAL_LM", SEQ2SEQ: "SEQ_2_SEQ_LM", BARE: "FEATURE_EXTRACTION"}
EVERY_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# base, head, configuration without its task type
CASES = {
    "lora_bert": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query", "value"]}),
    "lora_roberta": ("roberta", CLASSIFIER, LoraConfig, LORA),
    "lora_distilbert": ("distilbert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["q_lin", "lin2"]}),
    "lora_albert": ("albert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query", "ffn"]}),
    "lora_llama": ("llama", CAUSAL, LoraConfig, {**LORA, "target_modules": EVERY_LLAMA}),
    "lora_gpt2_fused": ("gpt2", CAUSAL, LoraConfig, {**LORA, "target_modules": ["c_attn", "c_fc"]}),
    "lora_neox_interleaved": ("gpt_neox", CAUSAL, LoraConfig, {**LORA, "target_modules": ["query_key_value"]}),
    "lora_t5": ("t5", SEQ2SEQ, LoraConfig, {**LORA, "target_modules": ["q", "v", "wo"]}),
    "lora_tied_head": ("gpt2", CAUSAL, LoraConfig, {**LORA, "target_modules": ["lm_head", "c_proj"]}),
    "lora_all_linear": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": "all-linear"}),
    "lora_regex": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": r".*layer\.1\..*(query|key)"}),
    "lora_one_layer": (
        "bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query"], "layers_to_transform": [1]},
    ),
    "rslora": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query"], "use_rslora": True}),
    "lora_patterns": (
        "bert", CLASSIFIER, LoraConfig,
        {**LORA, "target_modules": ["query", "value"], "rank_pattern": {"layer.1.attention.self.query": 2},
         "alpha_pattern": {"value": 11}},
    ),
    "lora_biases": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query"], "bias": "all"}),
    "lora_own_biases": ("gpt2", CAUSAL, LoraConfig, {**LORA, "target_modules": ["c_attn"], "bias": "lora_only"}),
    "lora_norms": (
        "llama", CAUSAL, LoraConfig, {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "lora_orthogonal": (
        "bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query"], "init_lora_weights": "orthogonal"},
    ),
    "dora_bert": ("bert", CLASSIFIER, LoraConfig, {**LORA, "target_modules": ["query", "dense"], "use_dora": True}),
    "dora_gpt2_fused": ("gpt2", CAUSAL, LoraConfig, {**LORA, "target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "lora_table": ("llama", CAUSAL, LoraConfig, {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora_with_bias": ("gpt2", CAUSAL, LoraConfig, {**LORA, "target_modules": ["c_attn"], "lora_bias": True}),
    "adalora_bert": (
        "bert", CLASSIFIER, AdaLoraConfig,
        {"init_r": 6, "target_r": 2, "lora_alpha": 9, "target_modules": ["query", "dense"], "total_step": 10},
    ),
    "ia3_bert": ("bert", CLASSIFIER, IA3Config, {}),
    "ia3_gpt2": ("gpt2", CAUSAL, IA3Config, {}),
    "ia3_llama": ("llama", CAUSAL, IA3Config, {}),
    "ia3_t5": ("t5", SEQ2SEQ, IA3Config, {}),
    "vera_bert": ("bert", CLASSIFIER, VeraConfig, {**VERA, "target_modules": ["query", "intermediate.dense"]}),
    "vera_llama": ("llama", CAUSAL, VeraConfig, {**VERA, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "vera_gpt2_fused": ("gpt2", CAUSAL, VeraConfig, {**VERA, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "vera_neox_interleaved": ("gpt_neox", CAUSAL, VeraConfig, {**VERA, "target_modules": ["query_key_value"]}),
    "vera_t5": ("t5", SEQ2SEQ, VeraConfig, {**VERA, "target_modules": ["q", "v", "wi"]}),
    "vera_biases": ("bert", CLASSIFIER, VeraConfig, {**VERA, "target_modules": ["value"], "bias": "vera_only"}),
    "prefix_llama": ("llama", CAUSAL, PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix_gpt2_mlp": ("gpt2", CAUSAL, PrefixTuningConfig, {"num_virtual_tokens": 5, "prefix_projection": True}),
    "prefix_bert": ("bert", BARE, PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix_t5": ("t5", SEQ2SEQ, PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix_bart": ("bart", SEQ2SEQ, PrefixTuningConfig, {"num_virtual_tokens": 5, "prefix_projection": True}),
    "prompt_gpt2": ("gpt2", CAUSAL, PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prompt_bert": ("bert", CLASSIFIER, PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prompt_t5": ("t5", SEQ2SEQ, PromptTuningConfig, {"num_virtual_tokens": 5}),
    "p_tuning_mlp": ("llama", CAUSAL, PromptEncoderConfig, {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    "p_tuning_lstm": (
        "bert", CLASSIFIER, PromptEncoderConfig,
        {"num_virtual_tokens": 5, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
}  # fmt: skip


WIDE = {"vera_neox_interleaved"}
"""Of the sweep: its slices are those of `lora_neox_interleaved`, and its matrices those of `vera_gpt2_fused`."""


@pytest.fixture
def made(foundry, tmp_path):
    """One of the cases: base folder, head, and what PEFT wrote."""

    def make(case, name="foreign", seed=3, labels=None, **changes):
        kind, head, config, options = CASES[case]
        base = foundry.base(kind, head)
        own = config(task_type=HEADS[head], **options | changes)
        numbered = {} if labels is None else {"num_labels": labels}
        return base, head, foundry.peft(base, head, own, tmp_path / name, seed, **numbered)

    return make


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.sweep] * (c in WIDE)) for c in CASES])
def test_a_folder_becomes_a_task_that_answers_as_peft(case, made, compare, foundry):
    base, head, foreign = made(case)
    compiled = foundry.compile(base, head, a=foreign.path)
    fed = compare.feed(foreign.model)
    wanted = compare.answers(foreign.model, fed)
    assert compare.gap(compare.answers(compiled.model("a").eval(), fed), wanted) <= 2e-6
    plain = compare.answers(compiled.base.model, fed)
    assert compare.gap(plain, wanted) > 1e-3


def test_many_folders_are_one_build(made, compare, tmp_path):
    """Techniques, ranks, targets and labels differ; ONNX Runtime answers as PEFT for each, and as the base for none."""
    base, _, first = made("lora_bert", "first")
    folders = {"first": first} | {
        name: made(case, name, seed, **changes)[2]
        for name, case, seed, changes in (
            ("stable", "rslora", 4, {"labels": 3}),
            ("linear", "lora_all_linear", 5, {}),
            ("patterns", "lora_patterns", 6, {"labels": 5}),
            ("scaled", "ia3_bert", 7, {}),
            ("prompted", "prompt_bert", 8, {"labels": 4}),
            ("biased", "lora_biases", 9, {}),
            ("vectors", "vera_bert", 10, {"labels": 3}),
        )
    }
    done = import_build({name: f.path for name, f in folders.items()}, str(base), tmp_path / "build")
    assert [one.task for one in done] == list(folders)
    fed = compare.feed(first.model)
    plain = compare.answers(surgeon.load(tmp_path / "build").base.model, fed)
    with surgeon.Session(tmp_path / "build", threads=1) as session:
        for name, foreign in folders.items():
            wanted = compare.answers(foreign.model, fed)
            assert compare.gap(compare.said(session, name, fed), wanted) <= 1e-5
        assert compare.gap(compare.said(session, None, fed), plain) <= 1e-5


def test_a_folder_is_read_into_a_task_of_a_build(made, compare, tmp_path):
    """Of another rank and scale, beside tasks that stay as they are."""
    base, _, foreign = made("lora_bert", labels=3)
    spec = {
        "base": {"model": str(base)},
        "surgery": [{"lora": {"rank": 8, "alpha": 16}}, {"ia3": {}}],
        "tasks": {"mine": {"labels": ["a", "b", "c"]}, "other": {"labels": 2}},
    }
    surgeon.compile(spec, out=tmp_path / "build")
    fed = compare.feed(foreign.model)
    before = compare.served(tmp_path / "build", "other", fed)
    (done,) = import_tasks({"mine": foreign.path}, tmp_path / "build")
    assert (done.task, done.method, done.parameters) == ("mine", "LORA", 4 * 4 * (32 + 32) + 33 * 3)
    assert compare.gap(compare.served(tmp_path / "build", "mine", fed), compare.answers(foreign.model, fed)) <= 1e-5
    assert (compare.served(tmp_path / "build", "other", fed) == before).all()


def test_variants_share_a_graph(made, compare, foundry):
    """Plain, pruned and weight-decomposed products at the same sites; and each in a build of another kind."""
    base, head, plain = made("lora_bert", "plain")
    folders = {"plain": plain, "dora": made("dora_bert", "dora", 4)[2], "ada": made("adalora_bert", "ada", 5)[2]}
    fed = compare.feed(plain.model)
    compiled = foundry.compile(base, head, **{name: foreign.path for name, foreign in folders.items()})
    ada = {"adalora": {"rank": 8, "where": ["attention", "ffn", "head.dense"]}}
    for name, foreign in folders.items():
        wanted = compare.answers(foreign.model, fed)
        assert compare.gap(compare.answers(compiled.model(name).eval(), fed), wanted) <= 5e-6
    other = foundry.operate(base, head, {"surgery": [ada], "tasks": {name: {"labels": 2} for name in folders}})
    for name in ("plain", "ada"):
        foundry.fill(other, name, folders[name].path)
        found, wanted = (compare.answers(m.eval(), fed) for m in (other.model(name), folders[name].model))
        assert compare.gap(found, wanted) <= 5e-6
    with pytest.raises(DeltaError, match="dora: true"):
        foundry.fill(other, "dora", folders["dora"].path)


def test_where_lora_and_adalora_share_a_site_each_takes_its_own(made, compare, foundry):
    base, head, plain = made("lora_bert", "plain")
    pruned = made("adalora_bert", "pruned", 4, target_modules=["query", "value"])[2]
    where = ["attention.query", "attention.value"]
    surgery = [{"lora": {"rank": 4, "where": where}}, {"adalora": {"rank": 6, "target_rank": 2, "where": where}}]
    both = foundry.operate(base, head, {"surgery": surgery, "tasks": {"plain": {"labels": 2}, "pruned": {"labels": 2}}})
    for name, foreign, technique in (("plain", plain, "lora"), ("pruned", pruned, "adalora")):
        foundry.fill(both, name, foreign.path)
        fed = compare.feed(foreign.model)
        wanted = compare.answers(foreign.model, fed)
        assert compare.gap(compare.answers(both.model(name).eval(), fed), wanted) <= 5e-6
        deltas = both.program.ledger.deltas
        used = {deltas[n].technique for n, t in both.model(name).deployed().items() if t.any() and "lora" in n}
        assert used == {technique}


def test_veras_matrices_that_were_not_saved_are_drawn_again(made, compare, foundry):
    with pytest.warns(UserWarning, match="not save vera_A"):
        base, head, foreign = made("vera_llama", save_projection=False)
    assert not any("vera_A" in name for name in load_file(foreign.path / "adapter_model.safetensors"))
    compiled = foundry.compile(base, head, a=foreign.path)
    fed = compare.feed(foreign.model)
    assert compare.gap(compare.answers(compiled.model("a"), fed), compare.answers(foreign.model, fed)) <= 2e-6


def test_veras_matrices_are_compared_where_they_are_read(made, compare, foundry, tmp_path):
    """Two folders whose matrices agree share a build; others, and matrices drawn from something else, are refused."""
    base, head, first = made("vera_llama", "first")
    wider = made("vera_llama", "wider", 4, target_modules=["q_proj", "down_proj"])[2]
    compiled = foundry.compile(base, head, a=first.path, b=wider.path)
    for task, foreign in (("a", first), ("b", wider)):
        fed = compare.feed(foreign.model)
        assert compare.gap(compare.answers(compiled.model(task), fed), compare.answers(foreign.model, fed)) <= 2e-6
    other_key = made("vera_llama", "key", projection_prng_key=6)[2]
    with pytest.raises(SpecError, match="rank 24, key 6"):
        foundry.compile(base, head, a=first.path, b=other_key.path)
    smaller = made("vera_llama", "smaller", target_modules=["q_proj"])[2]
    with pytest.raises(DeltaError, match=r"shared matrices at model\.layers\.0\.self_attn\.q_proj"):
        foundry.compile(base, head, a=first.path, b=smaller.path)
    first.tensors(lambda t: t["base_model.vera_B"].mul_(1.01))
    with pytest.raises(DeltaError, match="shared matrices"):
        foundry.compile(base, head, a=first.path)


def test_an_encoder_decoders_layers_share_prefixes_as_peft_deals_them(foundry, compare, tmp_path):
    """Three layers read the pairs 0, 2 and 1; on ONNX Runtime too."""
    base = foundry.base("bart", SEQ2SEQ, encoder_layers=3, decoder_layers=3)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    foreign = foundry.peft(base, SEQ2SEQ, config, tmp_path / "dealt")
    import_build({"a": foreign.path}, str(base), tmp_path / "build")
    fed = compare.feed(foreign.model)
    assert compare.gap(compare.served(tmp_path / "build", "a", fed), compare.answers(foreign.model, fed)) <= 1e-5


OWN = "base_model.model.bert.encoder.layer.1.attention.self.query."


def rename(tensors):
    for part in "bd":
        tensors[OWN.replace("query", "qwery") + f"vera_lambda_{part}"] = tensors.pop(f"{OWN}vera_lambda_{part}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop(f"{OWN}vera_lambda_b"), "vera_lambda_b is missing"),
        (lambda t: [t.pop(f"{OWN}vera_lambda_{part}") for part in "bd"], "1 modules that the configuration selects"),
        (lambda t: t.pop("base_model.vera_B"), "not both in the file"),
        (lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"][:8].clone()}), "not of rank 24"),
        (lambda t: t.update({f"{OWN}vera_lambda_d": torch.ones(8)}), "for a rank of 24"),
        (lambda t: t.update({f"{OWN}vera_lambda_b": torch.ones(8)}), r"would be \[8\]"),
        (lambda t: t.update({f"{OWN}vera_lambda_c": torch.ones(8)}), "vera_lambda_c"),
        (lambda t: t["base_model.vera_A"][3].fill_(float("nan")), "NaN"),
        (rename, "selects have no tensors|no projection"),
    ],
)
def test_no_vera_is_read_in_part(damage, says, made, foundry):
    base, head, foreign = made("vera_bert")
    foreign.tensors(damage)
    with pytest.raises(DeltaError, match=says):
        foundry.compile(base, head, a=foreign.path)


@pytest.mark.parametrize(
    ("case", "changes", "damage", "says"),
    [
        ("prefix_bart", {"num_layers": 3}, None, "3 layers"),
        ("prefix_bart", {"num_transformer_submodules": 3}, None, "one stack or two"),
        ("prefix_bart", {"num_transformer_submodules": 1}, None, "no stack"),
        ("prefix_bart", {}, lambda t: t["prompt_embeddings"][0].fill_(float("nan")), "NaN"),
        ("prefix_bart", {}, lambda t: t.update({"prompt_embeddings": t["prompt_embeddings"][1:]}), "5 virtual tokens"),
        ("prefix_bart", {}, lambda t: t.update({"more": torch.ones(2)}), "more"),
        ("prompt_t5", {}, lambda t: t.update({"prompt_embeddings": t["prompt_embeddings"][1:]}), "5 virtual tokens"),
        ("prompt_t5", {}, lambda t: t.update({"rows": t.pop("prompt_embeddings")}), "prompt_embeddings is missing"),
    ],
)  # fmt: skip
def test_no_virtual_tokens_are_read_in_part(case, changes, damage, says, made, foundry):
    base, head, foreign = made(case)
    foreign.config(**changes)
    if damage is not None:
        foreign.tensors(damage)
    with pytest.raises(DeltaError, match=says):
        foundry.compile(base, head, a=foreign.path)
