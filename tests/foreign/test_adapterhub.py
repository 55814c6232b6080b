"""Folders that AdapterHub wrote answer as they did there; `make_checkpoints.py` says how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.errors import DeltaError, SpecError
from surgeon.foreign import import_build
from surgeon.foreign.importing import read

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(p.name for p in FIXTURES.iterdir() if "-" in p.name and p.name != "llama-par_bn")


def base_of(case):
    kind = case.partition("-")[0]
    return FIXTURES / kind, "sequence-classification" if kind == "bert" else "causal-lm"


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_answers_as_in_adapterhub(case, foundry, compare):
    base, head = base_of(case)
    oracle = load_file(FIXTURES / case / "oracle.safetensors")
    compiled = foundry.compile(base, head, a=FIXTURES / case)
    fed = {name: oracle[name] for name in ("input_ids", "attention_mask")}
    found, wanted = compare.answers(compiled.model("a").eval(), fed), oracle["logits"].numpy()
    if head == "causal-lm":  # a padded row's own answer is nobody's
        shown = oracle["attention_mask"].bool().numpy()
        found, wanted = found[shown], wanted[shown]
    assert compare.gap(found, wanted) <= 2e-6
    plain = compare.answers(compiled.base.model, fed)
    assert plain.shape != oracle["logits"].shape or compare.gap(plain, oracle["logits"].numpy()) > 1e-3


def test_folders_of_both_libraries_are_one_build(compare, tmp_path):
    """On ONNX Runtime; each with its own technique, width and head."""
    cases = ["bert-seq_bn", "bert-flex_head", "bert-lora", "bert-prefix"]
    import_build({case: FIXTURES / case for case in cases}, str(FIXTURES / "bert"), tmp_path / "build")
    for case in cases:
        oracle = load_file(FIXTURES / case / "oracle.safetensors")
        fed = {name: oracle[name] for name in ("input_ids", "attention_mask")}
        assert compare.gap(compare.served(tmp_path / "build", case, fed), oracle["logits"].numpy()) <= 1e-5


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
        ("bert-seq_bn", {"phm_layer": True}, "phm_layer"),
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
