"""A task as a folder that PEFT loads: the tensors byte for byte, the same answers, and back again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import surgeon
from surgeon.errors import DeltaError, SpecError
from surgeon.foreign import export_task
from surgeon.foreign.peft_writer import write

CLASSIFIER, CAUSAL, SEQ2SEQ = "sequence-classification", "causal-lm", "seq2seq-lm"
LORA = {"lora": {"rank": 4, "alpha": 6, "where": ["attention", "ffn"]}}
# base, head, surgery, labels of the task
CASES = {
    "lora_bert": ("bert", CLASSIFIER, [LORA], 3),
    "lora_roberta": ("roberta", CLASSIFIER, [LORA], 3),
    "lora_distilbert": ("distilbert", CLASSIFIER, [LORA], 3),
    "lora_llama": ("llama", CAUSAL, [LORA], None),
    "lora_gpt2_fused": ("gpt2", CAUSAL, [{"lora": {"rank": 3, "alpha": 5}}], None),
    "lora_tied_head": ("gpt2", CAUSAL, [{"lora": {"rank": 3, "where": ["head.out", "ffn"]}}], None),
    "lora_t5": ("t5", SEQ2SEQ, [LORA], None),
    "lora_ranks": ("bert", CLASSIFIER, [{"lora": {"rank": 4, "rslora": True, "ranks": {"attention.query@1": 2}}}], 2),
    "lora_norms": ("llama", CAUSAL, [LORA, {"norm_tuning": {}}], None),
    "lora_own_biases": ("bert", CLASSIFIER, [LORA, {"bitfit": {"where": ["attention.query", "ffn.up"]}}], 3),
    "lora_all_biases": ("bert", CLASSIFIER, [LORA, {"bitfit": {}}], 3),
    "lora_fused_biases": ("gpt2", CAUSAL, [{"lora": {"rank": 3}}, {"bitfit": {"where": ["attention.value"]}}], None),
    "lora_kept_head": ("bert", CLASSIFIER, [LORA], None),
    "dora_bert": ("bert", CLASSIFIER, [{"lora": {"rank": 4, "dora": True}}], 2),
    "dora_gpt2_fused": ("gpt2", CAUSAL, [{"lora": {"rank": 3, "dora": True}}], None),
    "lora_with_bias": ("llama", CAUSAL, [{"lora": {"rank": 3, "bias": True}}], None),
    "lora_table": ("llama", CAUSAL, [{"lora": {"rank": 3, "where": ["embedding.token", "ffn"]}}], None),
    "adalora": ("bert", CLASSIFIER, [{"adalora": {"rank": 4, "target_rank": 2}}], 2),
    "ia3_bert": ("bert", CLASSIFIER, [{"ia3": {}}], 3),
    "ia3_gpt2": ("gpt2", CAUSAL, [{"ia3": {"where": ["attention.key", "attention.value", "ffn.down"]}}], None),
    "prefix_llama": ("llama", CAUSAL, [{"prefix": {"length": 5, "std": 1.0}}], None),
    "prefix_gpt2_mlp": ("gpt2", CAUSAL, [{"prefix": {"length": 5, "hidden": 8}}], None),
    "p_tuning_v2_llama": ("llama", CAUSAL, [{"p_tuning_v2": {"length": 5, "hidden": 8}}], None),
    "p_tuning_bert": ("bert", CLASSIFIER, [{"p_tuning": {"template": "[P]*4 {text}"}}], 3),
    "p_tuning_gpt2": ("gpt2", CAUSAL, [{"p_tuning": {"template": "[P]*4 {text}", "encoder": "mlp"}}], None),
    "vera_bert": ("bert", CLASSIFIER, [{"vera": {"rank": 24, "where": ["attention.query", "ffn.up"]}}], 3),
    "vera_llama": ("llama", CAUSAL, [{"vera": {"rank": 24, "projection_key": 3}}], None),
    "prompt_bert": ("bert", CLASSIFIER, [{"prompt": {"length": 5}}], 3),
    "prompt_t5": ("t5", SEQ2SEQ, [{"prompt": {"length": 5}}], None),
}


WIDE = {"lora_roberta", "lora_distilbert"}
"""Of the sweep: other names for the same sites, which the import reads in every run."""


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.sweep] * (c in WIDE)) for c in CASES])
def test_peft_loads_the_very_bytes_and_answers_alike(case, foundry, compare, tmp_path):
    kind, head, surgery, labels = CASES[case]
    base = foundry.base(kind, head)
    compiled = foundry.operate(base, head, {"surgery": surgery, "tasks": {"a": {"labels": labels}}})
    model = foundry.moved(compiled.model("a")).eval()
    folder = foundry.written(*write(compiled, "a"), tmp_path / "peft")
    changes = {} if labels is None else {"num_labels": labels}
    theirs = foundry.load(base, head, folder, **changes)
    fed = compare.feed(theirs)
    found, wanted = compare.answers(theirs, fed), compare.answers(model, fed)
    assert compare.gap(compare.answers(compiled.base.model, fed), wanted) > 1e-3 if labels is None else True
    assert compare.gap(found, wanted) <= 5e-6
    stored, held = load_file(folder / "adapter_model.safetensors"), theirs.state_dict()
    for key, tensor in stored.items():
        name = key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        places = [name, name.replace(".ia3_l", ".ia3_l.default"), f"{name}.default"]  # VeRA's have the name last too
        saved = [
            k for k in held if ".modules_to_save.default." in k and k.replace(".modules_to_save.default", "") == key
        ]
        places += saved
        if key == "prompt_embeddings":
            assert held["prompt_encoder.default.embedding.weight"].equal(tensor)
        else:
            assert any(place in held and held[place].equal(tensor) for place in places), key
    if case in ("lora_bert", "lora_llama", "ia3_bert", "prompt_bert", "vera_bert"):
        back = foundry.compile(base, head, a=folder).model("a").state_dict()
        for name, tensor in model.state_dict().items():
            assert back[name].equal(tensor), name


def test_a_trained_task_goes_out_and_comes_back(foundry, compare, tmp_path, surgeon_cli):
    """By the commands; the file is bound to its base."""
    base = foundry.base("bert", CLASSIFIER, num_hidden_layers=1)
    spec = {"base": {"model": str(base)}, "surgery": [LORA], "tasks": {"a": {"labels": 3}, "b": {"labels": 3}}}
    compiled = surgeon.compile(spec)
    foundry.moved(compiled.model("a"))
    compiled.save(tmp_path / "build")
    ran = surgeon_cli("export", tmp_path / "build", "--task", "a", "--to", "peft", "-o", tmp_path / "out", "--json")
    assert json.loads(ran.out)["folder"] == str(tmp_path / "out")
    ran = surgeon_cli("import", tmp_path / "out", "--build", tmp_path / "build", "--task", "b", "--json")
    assert ran.code == 0, ran.err
    fed = compare.feed(compiled.base.model)
    assert (compare.served(tmp_path / "build", "b", fed) == compare.served(tmp_path / "build", "a", fed)).all()
    theirs = foundry.load(base, CLASSIFIER, tmp_path / "out", num_labels=3)
    assert compare.gap(compare.served(tmp_path / "build", "a", fed), compare.answers(theirs, fed)) <= 1e-5
    with pytest.raises(SpecError, match="no format"):
        export_task(tmp_path / "build", "a", tmp_path / "else", to="pefd")


@pytest.mark.parametrize(
    ("surgery", "says"),
    [
        ([{"adapter": {"bottleneck": 4, "norms": False}}], "adapter"),
        ([LORA, {"ia3": {}}], "ia3 and lora"),
        ([{"bitfit": {"where": "attention.query"}}], "bitfit"),
        ([{"ia3": {}}, {"bitfit": {"where": "attention.query"}}], "biases beside a LoRA alone"),
        ([{"prefix": {"length": 3}}], "prefix"),
        ([{"prompt": {"length": 3, "place": "after"}}], "after"),
        ([{"prompt": {"length": 3, "ensemble": 2}}], "ensembles"),
        ([{"p_tuning": {"template": "[P] {text} [P]"}}], "behind it"),
        ([{"p_tuning": {"template": "[P] {text}", "place": "after"}}], "after"),
        ([{"full": {}}], "a whole model"),
        ([{"compacter": {"bottleneck": 4, "norms": False}}], "no bottleneck adapters"),
        ([{"vera": {"rank": 4}}, {"vera": {"rank": 8, "where": "ffn.up"}}], "one pair of matrices"),
    ],
)
def test_what_peft_cannot_hold_is_refused(surgery, says, foundry):
    base = foundry.base("bert", CLASSIFIER)
    compiled = foundry.operate(base, CLASSIFIER, {"surgery": surgery, "tasks": {"a": {"labels": 2}}})
    foundry.moved(compiled.model("a"))
    with pytest.raises(DeltaError, match=says):
        write(compiled, "a")


def test_a_fused_projection_of_one_factor_stays_one(foundry, compare, tmp_path):
    """Three slices with the same A, as an import makes them, are PEFT's single product again; else they are blocks."""
    base = foundry.base("gpt2", CAUSAL)
    where = ["attention.query", "attention.key", "attention.value"]
    compiled = foundry.operate(base, CAUSAL, {"surgery": [{"lora": {"rank": 3, "where": where}}], "tasks": {"a": {}}})
    model = foundry.moved(compiled.model("a"))
    _, tensors = write(compiled, "a")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert tensors[key].shape == (9, 32)
    with torch.no_grad():
        for layer in (0, 1):
            first, *others = (f"transformer.h.{layer}.attn.c_attn.{side}.lora_A" for side in ("query", "key", "value"))
            for other in others:
                model.get_parameter(other).copy_(model.get_parameter(first))
    _, tensors = write(compiled, "a")
    assert tensors[key].shape == (3, 32)


def test_a_task_over_a_base_in_nf4_is_bound_to_that_base(foundry, tmp_path, surgeon_cli):
    base = foundry.base("bert", CLASSIFIER, num_hidden_layers=1)
    spec = {"base": {"model": str(base)}, "tasks": {"a": {"labels": 3}, "b": {"labels": 3}}}
    four = surgeon.compile({**spec, "surgery": [{"qlora": {"rank": 4}}]})
    foundry.moved(four.model("a"))
    four.save(tmp_path / "four")
    surgeon.compile({**spec, "surgery": [LORA]}, out=tmp_path / "plain")
    ran = surgeon_cli("export", tmp_path / "four", "--task", "a", "--to", "peft", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    ran = surgeon_cli("import", tmp_path / "out", "--build", tmp_path / "plain", "--task", "b")
    assert ran.code != 0
    assert "another base" in ran.err
    ran = surgeon_cli("import", tmp_path / "out", "--build", tmp_path / "four", "--task", "b")
    assert ran.code == 0, ran.err
    with surgeon.Session(tmp_path / "four") as session:
        fed = {"input_ids": [[5, 6, 7, 8]]}
        assert (session.run(fed, "a")["logits"] == session.run(fed, "b")["logits"]).all()
