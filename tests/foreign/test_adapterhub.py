"""Folders that AdapterHub wrote answer as they did there; `make_checkpoints.py` says how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from surgeon.errors import DeltaError, SpecError
from surgeon.foreign import import_build
from surgeon.foreign.importing import read

FIXTURES = Path(__file__).parent / "fixtures"
REFUSED = ("llama-ia3", "llama-par_bn")
CASES = sorted(p.name for p in FIXTURES.iterdir() if "-" in p.name and p.name not in REFUSED)
HEADS = {"bert": "sequence-classification", "t5": "seq2seq-lm", "bart": "seq2seq-lm"}
FED = ("input_ids", "attention_mask", "decoder_input_ids")


def base_of(case):
    kind = case.partition("-")[0]
    return FIXTURES / kind, HEADS.get(kind, "causal-lm")


def asked(oracle):
    return {name: oracle[name] for name in FED if name in oracle}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_answers_as_in_adapterhub(case, foundry, compare):
    base, head = base_of(case)
    oracle = load_file(FIXTURES / case / "oracle.safetensors")
    compiled = foundry.compile(base, head, a=FIXTURES / case)
    fed = asked(oracle)
    found, wanted = compare.answers(compiled.model("a").eval(), fed), oracle["logits"].numpy()
    if head == "causal-lm":  # a padded row's own answer is nobody's
        shown = oracle["attention_mask"].bool().numpy()
        found, wanted = found[shown], wanted[shown]
    assert compare.gap(found, wanted) <= 2e-6
    plain = compare.answers(compiled.base.model, fed)
    assert plain.shape != oracle["logits"].shape or compare.gap(plain, oracle["logits"].numpy()) > 1e-3


def test_folders_of_both_libraries_are_one_build(compare, tmp_path):
    """On ONNX Runtime; each with its own technique, width and head."""
    cases = [
        "bert-seq_bn",
        "bert-flex_head",
        "bert-lora",
        "bert-prefix",
        "bert-fusion",
        "bert-static_fusion",
        "bert-ia3",
    ]
    import_build({case: FIXTURES / case for case in cases}, str(FIXTURES / "bert"), tmp_path / "build")
    with surgeon.Session(tmp_path / "build", threads=1) as session:
        for case in cases:
            oracle = load_file(FIXTURES / case / "oracle.safetensors")
            assert compare.gap(compare.said(session, case, asked(oracle)), oracle["logits"].numpy()) <= 1e-5


@pytest.mark.parametrize("case", ["bert-compacter", "gpt2-fusion", "t5-prefix"])
def test_an_adapter_with_a_build_of_its_own_answers_on_onnx_runtime(case, compare, tmp_path):
    oracle = load_file(FIXTURES / case / "oracle.safetensors")
    import_build({"a": FIXTURES / case}, str(base_of(case)[0]), tmp_path / "build")
    found, wanted = compare.served(tmp_path / "build", "a", asked(oracle)), oracle["logits"].numpy()
    if case.startswith("gpt2"):
        shown = oracle["attention_mask"].bool().numpy()
        found, wanted = found[shown], wanted[shown]
    assert compare.gap(found, wanted) <= 1e-5


def test_ia3_behind_the_feed_forward_is_not_the_papers(foundry):
    with pytest.raises(SpecError, match=r"output of decoder/ffn\.down@0"):
        foundry.compile(*base_of("llama-ia3"), a=FIXTURES / "llama-ia3")


def test_encoder_decoders_answer_on_onnx_runtime(compare, tmp_path):
    """Adapters beside cross-attention, products, and prefixes of three kinds of attention, in one build."""
    cases = ["bart-cross_bn", "bart-lora", "bart-prefix"]
    import_build({case: FIXTURES / case for case in cases}, str(FIXTURES / "bart"), tmp_path / "build")
    with surgeon.Session(tmp_path / "build", threads=1) as session:
        for case in cases:
            oracle = load_file(FIXTURES / case / "oracle.safetensors")
            assert compare.gap(compare.said(session, case, asked(oracle)), oracle["logits"].numpy()) <= 1e-5


def test_the_layers_of_a_fusion_find_their_adapters_beside_them(copied, foundry):
    """As `save_adapter_fusion` and `save_all_adapters` leave them. AdapterHub writes the head where one asks for it."""
    folder = copied("bert-fusion")
    (folder / "adapter_setup.json").unlink()
    with pytest.raises(DeltaError, match="the head that was trained with the fusion is not there"):
        read(folder / "one,two")
    for path in folder.glob("*head*"):
        path.rename(folder / "one,two" / path.name)
    found = read(folder / "one,two").pieces
    assert len(found) == len(read(FIXTURES / "bert-fusion").pieces) == 2 + 2
    foundry.compile(*base_of("bert-fusion"), a=folder / "one,two")


def setup(folder, kind):
    path = folder / "adapter_setup.json"
    path.write_text(path.read_text().replace("Fuse", kind))


def option(folder, **changes):
    path = folder / "one,two" / "adapter_fusion_config.json"
    config = json.loads(path.read_text())
    config["config"] |= changes
    path.write_text(json.dumps(config))


def layers(folder, change):
    path = folder / "one,two" / "model_adapter_fusion.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "bert.encoder.layer.0.output.adapter_fusion_layer.one,two."


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f / "two"), "the fused adapter 'two' is not there"),
        (lambda f: setup(f, "Stack"), "only a setup that fuses"),
        (lambda f: option(f, temperature=True), "temperature"),
        (lambda f: option(f, query_before_ln=True), "query_before_ln"),
        (lambda f: option(f, value=False), "other parts"),
        (lambda f: option(f, brand_new=1), "brand_new"),
        (lambda f: layers(f, lambda t: t.pop(FIRST + "key.bias")), "other parts"),
        (lambda f: layers(f, lambda t: t[FIRST + "key.bias"].fill_(float("nan"))), "NaN"),
        (lambda f: layers(f, lambda t: t.update({"x.adapter_fusion_layer.one.key.bias": torch.ones(1)})), "no fusion"),
        (lambda f: layers(f, lambda t: [t.pop(n) for n in list(t) if n.startswith(FIRST)]), "other places"),
        (lambda f: (f / "head_config.json").unlink(), "the head that was trained"),
        (lambda f: shutil.copytree(FIXTURES / "bert-double_seq_bn", f / "two", dirs_exist_ok=True), "cannot be fused"),
    ],
)
def test_no_fusion_is_read_in_part(damage, says, copied):
    folder = copied("bert-fusion")
    damage(folder)
    with pytest.raises(DeltaError, match=says):
        read(folder)


def test_a_parallel_adapter_before_the_norm_is_another_one(foundry):
    with pytest.raises(DeltaError, match="before the norm"):
        foundry.compile(*base_of("llama-par_bn"), a=FIXTURES / "llama-par_bn")


def test_adapters_that_sit_elsewhere_do_not_share_a_graph(foundry):
    with pytest.raises(SpecError, match="different places"):
        foundry.compile(*base_of("bert"), a=FIXTURES / "bert-seq_bn", b=FIXTURES / "bert-par_bn")


@pytest.fixture
def copied(tmp_path):
    return lambda case: Path(shutil.copytree(FIXTURES / case, tmp_path / case))


def test_a_pickle_is_read_behind_a_flag_alone(copied):
    folder = copied("bert-seq_bn")
    tensors = load_file(folder / "adapter.safetensors")
    torch.save(tensors, folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(DeltaError, match="--allow-pickle"):
        read(folder)
    assert len(read(folder, allow_pickle=True).pieces) == 2 + 2
    torch.save({"code": Path("x")}, folder / "pytorch_adapter.bin")
    with pytest.raises(DeltaError, match="no file of tensors alone"):
        read(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("bert-seq_bn", {"use_gating": True}, "use_gating"),
        ("bert-seq_bn", {"phm_layer": True}, "phm_rule"),
        ("bert-compacter", {"shared_W_phm": True}, "shared_W_phm"),
        ("bert-compacter", {"phm_layer": False}, "other parts"),
        ("bert-ia3", {"composition_mode": "add"}, "no LoRA"),
        ("bert-lora", {"composition_mode": "scale"}, "no vector of IA3"),
        ("bert-seq_bn", {"architecture": "prompt_tuning"}, "prompt_tuning"),
        ("bert-seq_bn", {"non_linearity": "gelu_new"}, "gelu_new"),
        ("bert-seq_bn", {"architecture": "reft"}, "reft"),
        ("bert-seq_bn", {"brand_new": 3}, "brand_new"),
        ("bert-seq_bn", {"scaling": "learned"}, "other parts"),
        ("bert-lora", {"use_dora": True}, "use_dora"),
        ("bert-lora", {"r": 4}, "rank 4"),
        ("bert-lora", {"alpha": None}, "alpha"),
        ("llama-prefix", {"flat": False}, "other form"),
    ],
)
def test_what_is_not_understood_is_refused(case, change, says, copied):
    folder = copied(case)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(DeltaError, match=says):
        read(folder)


@pytest.mark.parametrize("damage", ["layer", "extra", "nan", "cut"])
def test_no_folder_is_read_in_part(damage, copied, foundry):
    folder = copied("bert-double_seq_bn")
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        key = "bert.encoder.layer.1.output.adapters.task.adapter_up.bias"
        if damage == "layer":
            tensors = {n: t for n, t in tensors.items() if ".layer.1.output." not in n}
        elif damage == "extra":
            tensors["bert.encoder.layer.1.output.adapters.other.adapter_up.bias"] = tensors[key].clone()
        else:
            tensors[key][3] = float("nan")
        save_file(tensors, path)
    with pytest.raises(
        DeltaError, match={"layer": "no tensors in the file", "nan": "NaN"}.get(damage, "none that|cut")
    ):
        foundry.compile(*base_of("bert"), a=folder)
