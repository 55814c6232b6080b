"""Encoder-decoders write on ONNX Runtime what PyTorch and transformers find likeliest, token by token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import surgeon
from surgeon.audit import audit
from surgeon.compiler import Compiled
from surgeon.errors import BuildError, SpecError
from surgeon.halves import Halves
from surgeon.runtime.document import seal
from surgeon.runtime.files import hash_file
from surgeon.runtime.manifest import DECODER, MANIFEST

if TYPE_CHECKING:
    from techniques.conftest import Lab
    from techniques.encoder_decoders.conftest import Writing

TOKENS = 40
"""More than T5 tells apart by exact distances, and than any prompt has."""
WIDE: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lora": {"rank": 2, "dora": True, "where": ["attention", "cross_attention", "ffn"]}}],
    "prefix": [{"prefix": {"length": 3}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*2 {text} [P]*2"}}],
    "ia3": [{"ia3": {}}, {"prompt": {"place": "after"}}],
    "norms": [{"norm_tuning": {}}, {"compacter": {"divisions": 2, "bottleneck": 4, "norms": False}}],
    "vera": [{"vera": {"rank": 8}}, {"p_tuning_v2": {}}],
    "full": [{"full": {}}],
}
COUNTED: dict[str, list[dict[str, Any]]] = {
    distances: [{"prefix": {"length": 3, "distances": distances}}] for distances in ("before", "first")
}
CASES = [*product(["t5", "bart"], WIDE), *product(["t5"], COUNTED)]
OTHER_SIZES = {
    "lora": {"rank": 3},
    **{technique: {"length": 5} for technique in ("prefix", *COUNTED)},
    "ia3": {"length": 5},
    "norms": {"bottleneck": 6},
}


def uncached(model: nn.Module, source: Sequence[int], count: int) -> list[int]:
    """The likeliest token again and again, each time from all of the text."""
    ids, text = torch.tensor([list(source)]), torch.tensor([[0]])
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=text)
        text = torch.cat([text, output.logits[:, -1:].argmax(-1)], 1)
    return text[0, 1:].tolist()


def check_tokens(lab: Lab, writing: Writing, made: Compiled, session: surgeon.Session) -> None:
    """All rows together and in smaller groups, tasks swapped back and forth, against PyTorch without a cache."""
    given = lab.prompts()
    plain = [writing.by_transformers(made.base.model, source, TOKENS) for source in given]
    wanted = {task: [uncached(made.model(task), source, TOKENS) for source in given] for task in made.tasks}
    for task, batch in (("a", 3), (None, 4), ("b", 1), ("a", 4)):
        found = session.generate(given, task, max_new_tokens=TOKENS, batch=batch)
        assert [list(row.tokens) for row in found] == (wanted[task] if task else plain)
        assert {row.reason for row in found} == {"length"}


KINDS = ["t5", pytest.param("bart", marks=pytest.mark.sweep)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_pytorchs(lab: Lab, writing: Writing, kind: str) -> None:
    made, _, session = writing.built(kind)
    check_tokens(lab, writing, made, session)


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "technique"), CASES)
def test_every_token_is_pytorchs_with_every_technique(
    lab: Lab, writing: Writing, tmp_path: Path, kind: str, technique: str
) -> None:
    made = lab.writers(writing.base(kind), (WIDE | COUNTED)[technique])
    with surgeon.Session(made.save(tmp_path / "build"), threads=1) as session:
        check_tokens(lab, writing, made, session)


@pytest.mark.parametrize(
    ("kind", "technique"), [pytest.param(*case, marks=[pytest.mark.sweep] * (case[1] != "first")) for case in CASES]
)
def test_rows_of_several_tasks_go_on_together_as_alone(
    lab: Lab, writing: Writing, tmp_path: Path, kind: str, technique: str
) -> None:
    """Of other ranks, lengths and widths where a technique has such."""
    made = lab.writers(writing.base(kind), (WIDE | COUNTED)[technique], ("switch", "mixed"))
    if technique in OTHER_SIZES:
        lab.resize(made.model("b"), **OTHER_SIZES[technique])
    given, tasks = lab.prompts(), ["b", "a", None, "b"]
    with surgeon.Session(made.save(tmp_path / "build"), threads=1) as session:
        alone = [session.generate([g], t, max_new_tokens=TOKENS)[0] for g, t in zip(given, tasks, strict=True)]
        assert session.generate(given, tasks, max_new_tokens=TOKENS) == alone
        assert session.generate(given, tasks, max_new_tokens=TOKENS, batch=3) == alone
        assert len(set(alone)) > 1 or kind == "t5", "a tiny T5 may repeat one token, whatever its task"


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_give_the_logits_of_the_whole(writing: Writing, kind: str) -> None:
    made, _, session = writing.built(kind)
    assert isinstance(made.served, Halves)
    draw = torch.Generator().manual_seed(2)
    source, text = (torch.randint(3, 100, (2, n), generator=draw) for n in (9, 6))
    mask = torch.ones_like(source)
    mask[0, 5:] = 0
    whole = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": text}
    model, deltas = made.model("a"), made.model("a").deployed()
    with torch.no_grad():
        wanted = model(**whole).logits
        assert np.allclose(session.run({n: t.numpy() for n, t in whole.items()}, "a")["logits"], wanted, atol=1e-4)

        def run(half: Any, **fed: Tensor) -> dict[str, Tensor]:
            read = {node.target for node in half.graph.nodes if node.op == "get_attr"}
            found: dict[str, Tensor] = functional_call(
                half.graph_module, {n: t for n, t in deltas.items() if n in read}, (), fed
            )
            return found

        bridge = run(made.served.encoder, input_ids=source, attention_mask=mask)
        past = {i.name: i.absent(source) for i in made.served.decoder.inputs if i.cached}
        at = 0
        for size in (1, 3, 1, 1):
            found = run(made.served.decoder, decoder_input_ids=text[:, at : at + size], **bridge, **past)
            assert torch.allclose(found["logits"], wanted[:, at : at + size], atol=1e-4)
            past = {n.replace("present", "past"): t for n, t in found.items() if n.startswith("present")}
            at += size


def test_what_acts_on_the_source_is_read_by_the_encoder_alone(writing: Writing) -> None:
    def read(half: Any) -> set[str]:
        return {str(n.target) for n in half.graph.nodes if n.op == "get_attr" and n.target in half.ledger.deltas}

    halves = writing.built("t5").made.served
    assert isinstance(halves, Halves)
    encoder, decoder = read(halves.encoder), read(halves.decoder)
    assert not encoder & decoder
    assert encoder | decoder == set(halves.encoder.ledger.deltas)
    assert "shared.prompt" in encoder
    assert any("EncDecAttention.v.lora" in name for name in encoder)
    assert any("EncDecAttention.q.lora" in name for name in decoder)


def test_greedy_tokens_are_those_of_generate(lab: Lab, writing: Writing) -> None:
    made, _, session = writing.built("t5")
    model, prompt = writing.merged(made)
    wanted = [writing.by_transformers(model, source, writing.long, prompt=prompt) for source in lab.prompts()]
    assert [list(row.tokens) for row in session.generate(lab.prompts(), "a", max_new_tokens=writing.long)] == wanted


def test_the_halves_are_verified(writing: Writing, tmp_path: Path) -> None:
    build = writing.built("t5").path
    assert max(t.difference or 0 for t in audit(build).tasks) < 1e-4
    wrong = Path(shutil.copytree(build, tmp_path / "build"))
    model = onnx_ir.load(wrong / DECODER)
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    producer = logits.producer()
    assert producer is not None
    other = onnx_ir.node("Neg", [logits])
    other.outputs[0].name, logits.name = "logits", "turned"
    other.outputs[0].type, other.outputs[0].shape = logits.type, logits.shape
    model.graph.insert_after(producer, other)
    model.graph.outputs[0] = other.outputs[0]
    (wrong / DECODER).write_bytes(onnx_ir.to_proto(model).SerializeToString())
    document = json.loads((wrong / MANIFEST).read_text(encoding="utf-8"))
    document["files"][DECODER] = {"sha256": hash_file(wrong / DECODER), "bytes": (wrong / DECODER).stat().st_size}
    (wrong / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")
    with pytest.raises(BuildError, match=r"different answers[\s\S]*the base: [\s\S]*a: "):
        audit(wrong)


@pytest.mark.sweep
def test_votes_are_no_text(lab: Lab, writing: Writing) -> None:
    with pytest.raises(SpecError, match="ensemble"):
        lab.writers(writing.base("t5", small=True), [{"prompt": {"ensemble": 2}}])
