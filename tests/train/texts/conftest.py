"""Models that write text, each compiled once, and a tokenizer of few words with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import surgeon
from surgeon.train import load_tokenizer

WORDS = ["[PAD]", "</s>", "[UNK]", "<u>", "<a>", "is", *(f"w{i}" for i in range(40)), *(f"c{i}" for i in range(40))]
TEMPLATE = "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<a> ') + m.content + ' </s> ' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
WIDE = {"lora": {"rank": 8, "where": ["attention", "ffn"]}}
SURGERY = {"llama": [WIDE], "gpt2": [{"prefix": {"length": 4}}, {"full": {"where": ["ffn"]}}], "t5": [WIDE]}
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "t5": {"dropout_rate": 0.0}}


def _write_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def write_tokenizer():
    """Write the tokenizer into a folder."""
    return _write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(_write_tokenizer(tmp_path_factory.mktemp("tokenizer")), 64)


@pytest.fixture(scope="session")
def compiled(tiny):
    """Bases with larger weights than a fresh one has, so that a delta can turn an answer; made when asked for."""
    known = {}

    def make(name):
        if name not in known:
            base = tiny(name, **NO_DROPOUT.get(name, {}))
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.mul_(1.5 if name == "t5" else 4)
            known[name] = surgeon.compile({"surgery": SURGERY[name], "tasks": {"a": {}}}, base=base)
        return known[name]

    return make


@pytest.fixture
def fresh(compiled):
    """`fresh("llama")`: its task as it was born."""
    born = {}

    def make(name):
        model = compiled(name).model("a")
        born[name] = {n: t.clone() for n, t in model.state_dict().items()}
        return model

    yield make
    for name, tensors in born.items():
        compiled(name).model("a").load_state_dict(tensors)
