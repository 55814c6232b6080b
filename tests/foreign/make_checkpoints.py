"""Writes the AdapterHub checkpoints of `fixtures/`: tiny random bases, adapters over them, and what they answer.

AdapterHub needs transformers 4.57, so this runs in an environment of its own:

    python -m venv ah && ah/bin/pip install adapters==1.3.0 torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    ah/bin/python tests/foreign/make_checkpoints.py

A folder is what `save_adapter` wrote, with the answers beside it in `oracle.safetensors`. AdapterHub cannot write a
prefix as safetensors (its tensors share memory): those are written anew from its own `.bin`, tensor by tensor.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import adapters
import torch
from adapters import (
    CompacterConfig,
    DoubleSeqBnConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

FIXTURES = Path(__file__).parent / "fixtures"
BASES = {
    "bert": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 0},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": 1,
             "eos_token_id": 1, "pad_token_id": 0},
    "llama": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 0},
    "t5": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
           "decoder_start_token_id": 0, "eos_token_id": 1},
    "bart": {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 24,
             "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 0,
             "forced_eos_token_id": None},
}  # fmt: skip
AUTO = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}
PREFIX = {"prefix_length": 3, "bottleneck_size": 6}
CASES = {
    "bert-double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "bert-seq_bn": SeqBnConfig(reduction_factor=4),
    "bert-par_bn": ParBnConfig(reduction_factor=4),
    "bert-scaled_par_bn": ParBnConfig(reduction_factor=4, scaling="learned"),
    "bert-lora": LoRAConfig(r=2, alpha=6, intermediate_lora=True, output_lora=True),
    "bert-prefix": PrefixTuningConfig(**PREFIX),
    "bert-flex_head": SeqBnConfig(reduction_factor=4),
    "gpt2-seq_bn": SeqBnConfig(reduction_factor=4),
    "gpt2-lora": LoRAConfig(r=2, alpha=6),
    "llama-double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "llama-prefix": PrefixTuningConfig(**PREFIX, flat=True),
    "llama-par_bn": ParBnConfig(reduction_factor=4),
    "bert-fusion": SeqBnConfig(reduction_factor=4),
    "bert-static_fusion": SeqBnConfig(reduction_factor=4, scaling=2.0),
    "gpt2-fusion": SeqBnConfig(reduction_factor=4),
    "bert-compacter": CompacterConfig(reduction_factor=4, phm_dim=2),
    "bert-ia3": IA3Config(),
    "llama-ia3": IA3Config(),
    "t5-double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "t5-lora": LoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "t5-prefix": PrefixTuningConfig(prefix_length=2, flat=True),
    "bart-cross_bn": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    "bart-seq_bn": SeqBnConfig(reduction_factor=4, leave_out=[0]),
    "bart-lora": LoRAConfig(r=2, alpha=6),
    "bart-prefix": PrefixTuningConfig(**PREFIX),
}


def base(kind: str) -> Path:
    """A tiny base with no tensor at its birth value, in a folder."""
    folder = FIXTURES / kind
    auto = AUTO.get(kind, AutoModelForCausalLM)
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **BASES[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, case: str) -> torch.nn.Module:
    """The base as AdapterHub takes it; `eager`, for its prefixes are wrong in the fused attention."""
    if case == "bert-flex_head":
        model = adapters.AutoAdapterModel.from_pretrained(folder, attn_implementation="eager")
        model.add_classification_head("task", num_labels=3)
        return model
    auto = AUTO.get(case.partition("-")[0], AutoModelForCausalLM)
    model = auto.from_pretrained(folder, attn_implementation="eager")
    adapters.init(model)
    return model


def write(case: str) -> None:
    """One checkpoint and its answers."""
    torch.manual_seed(1)
    model = loaded(Path(case.partition("-")[0]), case)
    if "fusion" in case:
        fused = Fuse("one", "two")
        model.add_adapter("one", config=CASES[case])
        model.add_adapter("two", config=CASES[case].replace(reduction_factor=8))
        model.add_adapter_fusion(fused, "static" if "static" in case else "dynamic")
        model.train_adapter_fusion(fused, unfreeze_adapters=True)
    else:
        model.add_adapter("task", config=CASES[case])
        model.train_adapter("task")
        model.set_active_adapters("task")
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    folder = FIXTURES / case
    shutil.rmtree(folder, ignore_errors=True)
    if "fusion" in case:
        with_head = {"head_setup": True} if case.startswith("bert") else {}
        model.save_adapter_setup(str(folder), fused, **with_head, use_safetensors=True)
    else:
        model.save_adapter(str(folder), "task", use_safetensors="prefix" not in case)
    for pickled in folder.glob("*.bin"):
        tensors = {n: t.clone() for n, t in torch.load(pickled, weights_only=True).items()}
        name = "model_head.safetensors" if "head" in pickled.name else "adapter.safetensors"
        save_file(tensors, folder / name)
        pickled.unlink()
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, 5:], mask[0, 5:] = 0, 0
    fed = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = torch.randint(3, 40, (3, 4), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = model(**fed).logits
    save_file(fed | {"logits": logits}, folder / "oracle.safetensors")


if __name__ == "__main__":
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    os.chdir(FIXTURES)  # AdapterHub writes down by what path it found the base
    for kind in BASES:
        base(kind)
    for case in CASES:
        write(case)
        print(case, sum(path.stat().st_size for path in (FIXTURES / case).rglob("*") if path.is_file()))
