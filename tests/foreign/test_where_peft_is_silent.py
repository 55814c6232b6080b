"""What PEFT does without a word, we refuse or do right: the rows of the reference's table that an importer meets.

Rows that are others' business, by number: 13 (one task a call here), 16 (no generation here), 17 (the schedule belongs
to `adalora`), 23 and 24 (modules whose weights are read without a call: found in the graph, `tests/anatomy`).
Row 15 cannot be told: a scale set in memory is in no file. Row 18's lost `use_rslora` cannot be told either.
Rows 12 and 19 (tied heads, shared layers) are right, not refused: `lora_tied_head` and `lora_albert` of
`test_peft_import.py`, and below. Row 20 is `lora_biases` there. Row 25: what `all-linear` took is a list in the file.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from surgeon.errors import BaseError, DeltaError, SurgeonError
from surgeon.foreign.importing import assemble, read

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig

CLASSIFIER, CAUSAL = "sequence-classification", "causal-lm"
LORA = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
QUERY = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
MAGNITUDE = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector"


@pytest.fixture(scope="session")
def written(foundry, tmp_path_factory):
    """A LoRA of BERT as PEFT wrote it."""
    path = tmp_path_factory.mktemp("silent") / "foreign"
    return foundry.peft(foundry.base("bert", CLASSIFIER), CLASSIFIER, LoraConfig(**LORA), path)


@pytest.fixture
def foreign(written, tmp_path):
    """A copy of it, to change."""
    own = copy.copy(written)
    object.__setattr__(own, "path", Path(shutil.copytree(written.path, tmp_path / "foreign")))
    return own


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def repeat(tensors):
    for part in "AB":
        tensors[QUERY.format(7, part)] = tensors[QUERY.format(1, part)].clone()


def poison(tensors):
    tensors[QUERY.format(1, "B")][2, 1] = float("nan")


def widen(tensors):
    tensors["base_model.model.classifier.weight"] = torch.zeros(5, 32)


def stretch(tensors):
    for part, axis in (("A", 0), ("B", 1)):
        tensors[QUERY.format(0, part)] = torch.cat([tensors[QUERY.format(0, part)]] * 2, axis)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


ROWS = {
    "1: a target that matches nothing": ({"target_modules": ["query", "value", "qurey"]}, None, "qurey"),
    "2: a saved module that matches nothing": ({"modules_to_save": ["classifier", "scorer"]}, None, "scorer"),
    "7: a module that was selected and is not there": (
        {}, drop(*(QUERY.format(1, x) for x in "AB")), "1 modules that the configuration selects",
    ),
    "8: tensors of a layer that the base has not": ({}, repeat, "no projection bert.encoder.layer.7"),
    "8: tensors that nothing calls for": (
        {}, lambda t: t.update({"base_model.model.extra.weight": torch.ones(2)}), "extra.weight",
    ),
    "9: half of a product": ({}, drop(QUERY.format(0, "B")), "lora_B.weight is missing"),
    "10: no alpha": ({"lora_alpha": ...}, None, "lora_alpha"),
    "10: no rank": ({"r": ...}, None, "`r`"),
    "10: an option that nobody knows": ({"brand_new": 0.5}, None, "brand_new = 0.5"),
    "11: PiSSA unconverted": ({"init_lora_weights": "pissa"}, None, "pissa"),
    "11: PiSSA by iteration": ({"init_lora_weights": "pissa_niter_4"}, None, "pissa_niter_4"),
    "11: OLoRA": ({"init_lora_weights": "olora"}, None, "olora"),
    "14: the rank of before a hotswap": ({}, stretch, "rank 8 in the file and 4"),
    "18: magnitudes without use_dora": ({}, lambda t: t.update({MAGNITUDE: torch.ones(32)}), "lora_magnitude_vector"),
    "22: a head of two sizes": ({}, widen, "bias|weight|labels|size"),
    "NaN": ({}, poison, "NaN or infinity"),
    "another method in the configuration": ({"peft_type": "IA3"}, None, "query"),
    "a method that is not read": ({"peft_type": "OFT"}, None, "'OFT'"),
    "a variant that is not read": ({"alora_invocation_tokens": [3]}, None, "alora_invocation_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_it_is_refused_and_named(row, foreign, foundry):
    changes, damage, says = ROWS[row]
    foreign.config(**changes)
    if damage is not None:
        foreign.tensors(damage)
    with pytest.raises(DeltaError, match=says):
        foundry.compile(foundry.base("bert", CLASSIFIER), CLASSIFIER, a=foreign.path)


def test_the_folder_unharmed_is_taken(foreign, foundry):
    foundry.compile(foundry.base("bert", CLASSIFIER), CLASSIFIER, a=foreign.path)


def test_row_3_the_bare_end_of_a_name_saves_several_modules_and_all_of_them_are_read(foundry, compare, tmp_path):
    base = foundry.base("llama", CAUSAL)
    config = LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}, modules_to_save=["norm"])
    foreign = foundry.peft(base, CAUSAL, config, tmp_path / "norms")
    compiled = foundry.compile(base, CAUSAL, a=foreign.path)
    trained = [d.site for d in compiled.program.ledger.deltas.values() if d.technique == "norm_tuning"]
    assert len(trained) == 5  # two a layer, and the final one
    fed = compare.feed(foreign.model)
    assert compare.gap(compare.answers(compiled.model("a"), fed), compare.answers(foreign.model, fed)) <= 2e-6


def test_row_4_a_classifier_without_a_task_type_is_lost(foundry, tmp_path, tiny):
    """PEFT trained it frozen and did not save it: over a base without a head it was random."""
    bare = tmp_path / "bare"
    tiny("bert").bert.save_pretrained(bare)
    config = LoraConfig(**{**LORA, "task_type": None})
    foreign = foundry.peft(bare, CLASSIFIER, config, tmp_path / "headless")
    with pytest.raises(BaseError, match=r"classifier\.bias"):
        foundry.compile(bare, CLASSIFIER, a=foreign.path)


def test_row_5_a_pooler_that_no_file_holds_was_random(foundry, tmp_path, tiny):
    bare = tmp_path / "bare"
    tiny("bert", "masked-lm").save_pretrained(bare)
    foreign = foundry.peft(bare, CLASSIFIER, LoraConfig(**LORA), tmp_path / "poolerless")
    with pytest.raises(BaseError, match=r"bert\.pooler\.dense\.bias"):
        foundry.compile(bare, CLASSIFIER, a=foreign.path)


def test_row_6_another_base_of_the_same_names(foreign, foundry, tmp_path):
    """The name is all that PEFT keeps; it must end alike."""
    other = Path(shutil.copytree(foundry.base("bert", CLASSIFIER), tmp_path / "other-bert"))
    with pytest.raises(DeltaError, match="says that it was trained on"):
        foundry.compile(other, CLASSIFIER, a=foreign.path)
    foreign.config(base_model_name_or_path="somebody/other-bert-2")
    with pytest.raises(DeltaError, match="says that it was trained on"):
        foundry.compile(other, CLASSIFIER, a=foreign.path)
    foreign.config(base_model_name_or_path="somebody/other-bert")
    foundry.compile(other, CLASSIFIER, a=foreign.path)


def test_row_6_another_revision_of_the_same_base(foreign, foundry):
    """Or another class of it, where PEFT was told no task and wrote the class down instead."""
    base = foundry.base("bert", CLASSIFIER)
    named, studied = foundry.study(base, CLASSIFIER)
    foreign.config(revision="old")
    assemble({"a": read(foreign.path)}, named, foundry.study(base, CLASSIFIER)[1], ignore_base_name=False)
    newer = named.model_copy(update={"revision": "new"})
    with pytest.raises(DeltaError, match=r"trained on .* at old"):
        assemble({"a": read(foreign.path)}, newer, studied, ignore_base_name=False)
    mapping = {"base_model_class": "RobertaForSequenceClassification", "parent_library": "transformers"}
    foreign.config(revision=None, auto_mapping=mapping)
    with pytest.raises(DeltaError, match="trained on a RobertaForSequenceClassification"):
        foundry.compile(base, CLASSIFIER, a=foreign.path)


def test_row_6_another_head_of_the_same_base(foreign, foundry):
    foreign.config(task_type="TOKEN_CLS")
    with pytest.raises(DeltaError, match="token-classification"):
        foundry.compile(foundry.base("bert", CLASSIFIER), CLASSIFIER, a=foreign.path)


@pytest.mark.parametrize(("layers", "says"), [(3, "selects have no tensors"), (1, "no projection|have no")])
def test_rows_7_and_8_a_base_of_another_depth(layers, says, foreign, foundry):
    base = foundry.base("bert", CLASSIFIER, num_hidden_layers=layers)
    foreign.config(base_model_name_or_path=None)
    with pytest.raises(DeltaError, match=says):
        foundry.compile(base, CLASSIFIER, a=foreign.path)


def test_row_8_a_base_of_another_width(foreign, foundry):
    base = foundry.base("bert", CLASSIFIER, hidden_size=16)
    foreign.config(base_model_name_or_path=None)
    with pytest.raises(DeltaError, match="from 32 to 32 in the file"):
        foundry.compile(base, CLASSIFIER, a=foreign.path)


def test_row_11_pissa_that_peft_converted_is_right(foundry, compare, tmp_path):
    """Of rank 2r. (Of a classifier PEFT's conversion leaves the head out: that is row 2's error.)"""
    base = foundry.base("llama", CAUSAL)
    own = {**LORA, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    foreign = foundry.peft(base, CAUSAL, LoraConfig(**own), tmp_path / "pissa")
    with pytest.raises(DeltaError, match="path_initial_model_for_weight_conversion"):
        read(foreign.path)
    start = foundry.peft(base, CAUSAL, LoraConfig(**own), tmp_path / "start", moved=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start.model.peft_config["default"].init_lora_weights = True
        start.model.save_pretrained(tmp_path / "start")
        initial = str(tmp_path / "start")
        foreign.model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    compiled = foundry.compile(base, CAUSAL, a=tmp_path / "plain")
    fed = compare.feed(foreign.model)
    assert compiled.program.ledger.deltas["model.layers.0.self_attn.q_proj.lora_A"].shape[1] == 8
    assert compare.gap(compare.answers(compiled.model("a"), fed), compare.answers(foreign.model, fed)) <= 1e-5


def test_row_12_an_embedding_that_peft_untied_is_refused(foundry, tmp_path):
    base = foundry.base("gpt2", CAUSAL)
    config = LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", "target_modules": ["c_fc"]}, modules_to_save=["wte"])
    foreign = foundry.peft(base, CAUSAL, config, tmp_path / "untied")
    with pytest.raises(DeltaError, match="wte"):
        foundry.compile(base, CAUSAL, a=foreign.path)


def test_row_12_the_copy_of_a_tied_table_tells_another_base(foundry, tmp_path):
    base = foundry.base("gpt2", CAUSAL)
    config = LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", "target_modules": ["lm_head"]})
    foreign = foundry.peft(base, CAUSAL, config, tmp_path / "tied")
    foreign.tensors(lambda t: t["base_model.model.lm_head.base_layer.weight"].mul_(1.01))
    with pytest.raises(DeltaError, match="not the base's"):
        foundry.compile(base, CAUSAL, a=foreign.path)


@pytest.mark.parametrize("build", ["none", "first"])
def test_a_prefix_over_a_bias_by_distance_needs_a_build_that_counts_as_peft(build, foundry, tmp_path):
    """PEFT's T5 has the virtual tokens stand before the text."""
    from peft import PrefixTuningConfig

    base = foundry.base("t5", "seq2seq-lm")
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    foreign = foundry.peft(base, "seq2seq-lm", config, tmp_path / "t5")
    surgery = [{"prefix": {"where": "decoder/attention", "distances": build}}]
    compiled = foundry.operate(base, "seq2seq-lm", {"surgery": surgery, "tasks": {"a": {}}})
    with pytest.raises(DeltaError, match="distances: before"):
        foundry.fill(compiled, "a", foreign.path)


def test_a_prefix_over_a_bias_that_no_table_holds_is_refused(foundry, tmp_path):
    """Bloom's is a slope."""
    from peft import PrefixTuningConfig
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        tmp_path / "base"
    )
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    foreign = foundry.peft(tmp_path / "base", CAUSAL, config, tmp_path / "bloom")
    with pytest.raises(DeltaError, match="bias by distance to its scores, which is looked up in no table"):
        foundry.compile(tmp_path / "base", CAUSAL, a=foreign.path)


@pytest.mark.parametrize("method", ["OFT", "BOFT", "LOHA", "C3A"])
def test_a_method_that_no_technique_has_is_refused_with_a_way_out(method, foundry, tmp_path):
    import peft

    own = {"OFT": {"oft_block_size": 4}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4}}.get(method, {"r": 4})
    make = {"C3A": peft.C3AConfig, "LOHA": peft.LoHaConfig, "OFT": peft.OFTConfig, "BOFT": peft.BOFTConfig}[method]
    config = make(task_type="SEQ_CLS", target_modules=["query"], **own)
    foreign = foundry.peft(foundry.base("bert", CLASSIFIER), CLASSIFIER, config, tmp_path / "other")
    with pytest.raises(DeltaError, match=f"'{method}'") as refused:
        read(foreign.path)
    assert "VERA" in str(refused.value)
    assert "merge_and_unload" in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no checkpoint"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'), "cut or not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "holds list"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights"),
        (cut, "cut"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "--allow-pickle"),
    ],
)  # fmt: skip
def test_damaged_folders(damage, says, foreign):
    damage(foreign.path)
    with pytest.raises(SurgeonError, match=says):
        read(foreign.path)


def test_an_adapter_of_another_name_stands_in_a_folder_of_its_own(foreign, tmp_path):
    outer = tmp_path / "outer"
    shutil.copytree(foreign.path, outer / "other")
    with pytest.raises(DeltaError, match="other"):
        read(outer)
