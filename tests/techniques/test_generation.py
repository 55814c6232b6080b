"""Writing texts from a cache on ONNX Runtime: the tokens of transformers' generate, whatever the batch and the task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import surgeon
from surgeon.base import open_base
from surgeon.compiler import begin
from surgeon.errors import CompositionError, SpecError
from surgeon.exporters.masks import window, windows
from surgeon.exporters.shared import shareable
from surgeon.inputs import cached_inputs
from surgeon.runtime.generation import Choice
from surgeon.spec import read_spec
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
    "gemma3_text": [{"lora": {"rank": 4}}, {"adapter": {"bottleneck": 4}}],
    "mistral": [{"lora": {"rank": 4}}, {"ia3": {}}, {"prefix": {"length": 3}}],
    "opt": [{"lora": {"rank": 4}}, {"prefix": {"length": 3}}],
    "gpt_neox": [{"lora": {"rank": 4}}, {"adapter": {"bottleneck": 4}}],
}


Checked = Callable[[str, list[dict[str, Any]]], None]


@pytest.fixture
def checked(lab: Lab, decoding: Decoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    """All rows together and in fewer places, tasks swapped back and forth: every token, and the logits before it."""
    seen: dict[tuple[int, ...], np.ndarray] = {}
    choose = Choice.next

    def spied(choice: Choice, logits: np.ndarray, before: Sequence[int], rng: np.random.Generator) -> int:
        seen[tuple(before)] = logits.copy()
        return choose(choice, logits, before, rng)

    monkeypatch.setattr(Choice, "next", spied)

    def check(kind: str, surgery: list[dict[str, Any]]) -> None:
        made = lab.writers(decoding.base(kind), surgery)
        base, given = made.base.model, lab.prompts()
        with surgeon.Session(made.save(tmp_path / "build"), threads=1) as session:
            wanted: dict[str | None, list[list[int]]] = {}
            for task, batch in (("a", 3), (None, 4), ("b", 1), ("a", 2)):
                model = None if task is None else made.model(task)
                if task not in wanted:
                    wanted[task] = [decoding.by_transformers(base, prompt, LONG, model) for prompt in given]
                found = session.generate(given, task, max_new_tokens=LONG, batch=batch)
                assert [list(row.tokens) for row in found] == wanted[task]
                assert {row.reason for row in found} == {"length"}
                for prompt, tokens in zip(given, wanted[task], strict=True):
                    with torch.no_grad():
                        whole = (model or base)(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, -LONG:]
                    cached = np.stack([seen[(*prompt, *tokens[:at])] for at in range(LONG)])
                    assert lab.gap(torch.from_numpy(cached), whole) < 1e-4

    return check


@pytest.mark.parametrize("kind", SURGERY)
def test_every_token_is_pytorchs(checked: Checked, kind: str) -> None:
    checked(kind, SURGERY[kind])


@pytest.mark.sweep
@pytest.mark.parametrize("kind", WIDE)
def test_every_token_is_pytorchs_elsewhere(checked: Checked, kind: str) -> None:
    checked(kind, WIDE[kind])


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


SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    ("kind", "surgery", "reason"),
    [
        ("mistral", [{"prefix": {"length": 2}}], "a prefix stays in sight"),
        pytest.param(
            "llama",
            [{"prefix": {"where": "attention@0", "length": 2}}],
            "some layers have a prefix and others none",
            marks=SWEEP,
        ),
        pytest.param("gpt2", [{"prompt": {"length": 3}}], "a task acts where a text begins alone", marks=SWEEP),
        pytest.param("gemma2", [{"lora": {}}], "not every attention is a product", marks=SWEEP),
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


@pytest.mark.parametrize(("kind", "wanted"), [("mistral", [16, 16]), ("gemma3_text", [16, 0])])
def test_a_sliding_window_is_the_operators_own(decoding: Decoding, kind: str, wanted: list[int]) -> None:
    opened = open_base(decoding.base(kind))
    inputs = cached_inputs(opened.model)
    program = begin(opened, trace(opened.model, inputs), inputs)
    cores = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    found = windows(program, cores)
    assert found is not None
    assert list(found.values()) == wanted
    assert shareable(program) is None


def test_a_window_is_told_from_what_only_ends_like_one() -> None:
    at, last = torch.arange(12), torch.tensor([[10], [11]])
    past = at <= last
    assert window(past) == 0
    assert window(past & (at > last - 5)) == 5
    assert window(torch.where(past & (at > last - 5), 0.0, torch.finfo(torch.float32).min)) == 5
    blocks = past & (at // 8 == last // 8)
    biased = torch.where(past, (at - last) * 0.5, -torch.inf)
    holed = past & (at != 3)
    both = torch.stack([past, past & (at > last - 5)])
    for other in (blocks, biased, holed, both, past[1:], at <= 11 + 0 * last):
        assert window(other) is None


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
    lab: Lab, kind: str, surgery: list[dict[str, Any]], says: str
) -> None:
    model = lab.base(kind) if kind == "bert" else lab.base(kind, n_layer=1)
    with pytest.raises((SpecError, CompositionError), match=says):
        surgeon.compile({"surgery": surgery, "tasks": {"a": {}}, "export": {"generate": True}}, base=model)
