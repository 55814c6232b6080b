"""Encoder-decoders write on ONNX Runtime: the tokens of transformers' generate, greedily and by beam search."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast

import surgeon
from surgeon.audit import audit
from surgeon.cli import main
from surgeon.compiler import Compiled
from surgeon.errors import DataError, SpecError
from surgeon.halves import Halves

if TYPE_CHECKING:
    from techniques.conftest import Lab
    from transformers import PreTrainedModel

LONG = 64
LENGTHS = (5, 1, 9, 14)
SMALL = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "bart": {"encoder_layers": 1, "decoder_layers": 1}}
SURGERY: dict[str, list[dict[str, Any]]] = {
    "t5": [{"lora": {"rank": 4, "where": ["attention", "cross_attention"]}}, {"prompt": {"length": 3}}],
    "bart": [{"prefix": {"length": 3}}, {"adapter": {"bottleneck": 4}}],
}
WIDE: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lora": {"rank": 2, "dora": True, "where": ["attention", "cross_attention", "ffn"]}}],
    "prefix": [{"prefix": {"length": 3}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*2 {text} [P]*2"}}],
    "ia3": [{"ia3": {}}, {"prompt": {"place": "after"}}],
    "norms": [{"norm_tuning": {}}, {"compacter": {"divisions": 2, "bottleneck": 4, "norms": False}}],
    "vera": [{"vera": {"rank": 8}}, {"p_tuning_v2": {}}],
    "full": [{"full": {}}],
}


def base(lab: Lab, kind: str, **changes: Any) -> PreTrainedModel:
    """A base with room for long texts that never ends one."""
    room = {"max_position_embeddings": 128} if kind == "bart" else {}
    return lab.base(kind, "seq2seq-lm", eos_token_id=None, **room, **changes)


def uncached(model: nn.Module, source: Sequence[int], count: int) -> list[int]:
    """The likeliest token again and again, each time from all of the text."""
    ids, text = torch.tensor([list(source)]), torch.tensor([[0]])
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=text)
        text = torch.cat([text, output.logits[:, -1:].argmax(-1)], 1)
    return text[0, 1:].tolist()


def by_transformers(
    model: PreTrainedModel, source: Sequence[int], count: int, *, prompt: Tensor | None = None, **options: Any
) -> list[int]:
    """What `generate` writes, with a trained prompt in front of the source."""
    given: Tensor = model.get_input_embeddings()(torch.tensor([list(source)]))
    given = given if prompt is None else torch.cat([prompt.unsqueeze(0), given], 1)
    mask = torch.ones(given.shape[:2], dtype=torch.long)
    generate: Callable[..., Tensor] = model.generate
    found = generate(inputs_embeds=given, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)
    return found[0, 1:].tolist()


def check_tokens(lab: Lab, made: Compiled, session: surgeon.Session, count: int = LONG) -> None:
    """All rows together and in smaller groups, tasks swapped back and forth, against PyTorch without a cache."""
    given = lab.prompts()
    for task, batch in (("a", 3), (None, 4), ("b", 1), ("a", 4)):
        wanted = [
            by_transformers(made.base.model, source, count)
            if task is None
            else uncached(made.model(task), source, count)
            for source in given
        ]
        found = session.generate(given, task, max_new_tokens=count, batch=batch)
        assert [list(row.tokens) for row in found] == wanted
        assert {row.reason for row in found} == {"length"}


Built = tuple[Compiled, Path, surgeon.Session]


@pytest.fixture(scope="module")
def builds(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A build a kind, made when it is asked for; T5's from a folder with a tokenizer of a hundred words."""
    known: dict[str, Built] = {}

    def build(kind: str) -> Built:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            model = copy.deepcopy(base(lab, kind, **SMALL[kind]))
            if kind == "t5":
                model.save_pretrained(folder / "base")
                words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
                words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", model_max_length=LONG)
                fast.save_pretrained(folder / "base")
                model.name_or_path = str(folder / "base")
            made = lab.writers(model, SURGERY[kind])
            path = made.save(folder / "build")
            known[kind] = made, path, surgeon.Session(path, threads=1)
        return known[kind]

    return build


KINDS = ["t5", pytest.param("bart", marks=pytest.mark.sweep)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_pytorchs(lab: Lab, builds: Callable[[str], Built], kind: str) -> None:
    made, _, session = builds(kind)
    check_tokens(lab, made, session)


@pytest.mark.sweep
@pytest.mark.parametrize("technique", WIDE)
@pytest.mark.parametrize("kind", SURGERY)
def test_every_token_is_pytorchs_with_every_technique(lab: Lab, tmp_path: Path, kind: str, technique: str) -> None:
    made = lab.writers(base(lab, kind), WIDE[technique])
    with surgeon.Session(made.save(tmp_path / "build"), threads=1) as session:
        check_tokens(lab, made, session)


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_give_the_logits_of_the_whole(builds: Callable[[str], Built], kind: str) -> None:
    made, _, session = builds(kind)
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


def test_what_acts_on_the_source_is_read_by_the_encoder_alone(builds: Callable[[str], Built]) -> None:
    def read(half: Any) -> set[str]:
        return {str(n.target) for n in half.graph.nodes if n.op == "get_attr" and n.target in half.ledger.deltas}

    halves = builds("t5")[0].served
    assert isinstance(halves, Halves)
    encoder, decoder = read(halves.encoder), read(halves.decoder)
    assert not encoder & decoder
    assert encoder | decoder == set(halves.encoder.ledger.deltas)
    assert "shared.prompt" in encoder
    assert any("EncDecAttention.v.lora" in name for name in encoder)
    assert any("EncDecAttention.q.lora" in name for name in decoder)


def test_beams_are_transformers(lab: Lab, builds: Callable[[str], Built], tmp_path: Path) -> None:
    """Ends among the beams, other lengths preferred, rows in groups; of the base and of what was trained."""
    made, _, _ = builds("t5")
    trained, prompt = merged(made)
    often = by_transformers(made.base.model, lab.prompts()[2], 12, num_beams=3)
    ends = {"eos_token_id": [often[5], often[-1]]}
    lengths: set[int] = set()
    with surgeon.Session(saved(made, tmp_path / "build", **ends), threads=1) as session:
        for task, options in (
            (None, {"beams": 3}),
            (None, {"beams": 4, "length_penalty": 2.0}),
            ("a", {"beams": 3}),
            ("a", {"beams": 3, "length_penalty": -1.5, "early_stopping": True, "repetition_penalty": 1.3}),
        ):
            asked = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
            model, front = (made.base.model, None) if task is None else (trained, prompt)
            wanted = [by_transformers(model, s, 20, prompt=front, **ends, **asked) for s in lab.prompts()]
            for batch in (4, 1):
                rows = session.generate(lab.prompts(), task, max_new_tokens=20, batch=batch, **options)
                assert [list(row.tokens) for row in rows] == wanted
            lengths |= {len(tokens) for tokens in wanted}
    assert len(lengths) > 1


def test_greedy_tokens_are_those_of_generate(lab: Lab, builds: Callable[[str], Built]) -> None:
    made, _, session = builds("t5")
    model, prompt = merged(made)
    wanted = [by_transformers(model, source, LONG, prompt=prompt) for source in lab.prompts()]
    assert [list(row.tokens) for row in session.generate(lab.prompts(), "a", max_new_tokens=LONG)] == wanted


def merged(made: Compiled) -> tuple[PreTrainedModel, Tensor]:
    """The base with the LoRA of task a in its weights, and the task's prompt."""
    model = copy.deepcopy(made.base.model)
    tensors = made.model("a").deployed()
    with torch.no_grad():
        for name in [n for n in tensors if n.endswith("lora_A")]:
            product = tensors[name] @ tensors[name.replace("lora_A", "lora_B")]
            model.get_parameter(name.replace("lora_A", "weight")).add_(product.T)
    return model, tensors["shared.prompt"].detach()


def saved(made: Compiled, out: Path, **said: Any) -> Path:
    """A build of the same graphs whose base has another generation configuration."""
    config = made.base.model.generation_config
    before = {name: getattr(config, name) for name in said}
    try:
        for name, value in said.items():
            setattr(config, name, value)
        return made.save(out)
    finally:
        for name, value in before.items():
            setattr(config, name, value)


RULES: list[dict[str, Any]] = [
    {"forced_bos_token_id": 7, "forced_eos_token_id": 1},
    {"eos_token_id": 1, "min_length": 9, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [4]], "suppress_tokens": [5, 6], "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("rules", RULES)
def test_the_bases_own_rules_hold(
    lab: Lab, builds: Callable[[str], Built], tmp_path: Path, rules: dict[str, Any]
) -> None:
    made, _, session = builds("t5")
    if "eos_token_id" in rules:
        rules = {**rules, "eos_token_id": session.generate(lab.prompts()[:1])[0].tokens[0]}
    with surgeon.Session(saved(made, tmp_path / "build", **rules), threads=1) as ruled:
        for beams in (1, 3):
            wanted = [by_transformers(made.base.model, s, 24, num_beams=beams, **rules) for s in lab.prompts()]
            rows = ruled.generate(lab.prompts(), max_new_tokens=24, beams=beams)
            assert [list(row.tokens) for row in rows] == wanted
    assert wanted != [list(row.tokens) for row in session.generate(lab.prompts(), max_new_tokens=24, beams=3)]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"bad_words_ids": [[3, 4]]}, "bad_words_ids of several tokens"),
        ({"encoder_no_repeat_ngram_size": 3}, "asks for encoder_no_repeat_ngram_size"),
        ({"forced_eos_token_id": [1, 2]}, "names 2 tokens"),
    ],
)
def test_a_rule_that_is_not_done_is_said(
    builds: Callable[[str], Built], tmp_path: Path, said: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        saved(builds("t5")[0], tmp_path / "build", **said)
    assert not (tmp_path / "build").exists()


def test_rows_end_at_different_times_and_no_neighbour_matters(
    lab: Lab, builds: Callable[[str], Built], tmp_path: Path
) -> None:
    made, _, session = builds("t5")
    chance = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.2}
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 7}
    free = session.generate(lab.prompts(), "a", **options, **chance)
    ends = [free[0].tokens[3], free[2].tokens[8]]
    with surgeon.Session(saved(made, tmp_path / "build", eos_token_id=ends), threads=1) as ending:
        for drawn in ({}, chance):
            together = ending.generate(lab.prompts(), "a", **options, **drawn)
            assert not drawn or len({len(row.tokens) for row in together}) > 1
            assert together == ending.generate(lab.prompts(), "a", batch=2, **options, **drawn)
            for i, source in enumerate(lab.prompts()):
                assert together[i : i + 1] == ending.generate([source], "a", **{**options, "seed": 7 + i}, **drawn)


def test_texts_come_in_pieces_and_stop(builds: Callable[[str], Built], capsys: pytest.CaptureFixture[str]) -> None:
    _, path, session = builds("t5")
    said = {0: "", 1: ""}

    def listen(row: int, piece: str) -> None:
        said[row] += piece

    whole = session.generate(["w3 w4 w5", "w9"], "a", max_new_tokens=9, stream=listen)
    assert [row.text for row in whole] == [said[0], said[1]]
    assert whole[0].tokens == session.generate([[3, 4, 5]], "a", max_new_tokens=9)[0].tokens
    word = whole[0].text.split()[-1]
    cut = session.generate(["w3 w4 w5"], "a", max_new_tokens=9, stop=word)[0]
    assert (cut.reason, cut.text) == ("stop", whole[0].text[: whole[0].text.index(word)])
    assert main(["run", str(path), "--task", "a", "--tokens", "9", "w3 w4 w5", "w9"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.text for row in whole]
    assert main(["run", str(path), "--task", "a", "--tokens", "9", "--beams", "3", "w9"]) == 0
    best = session.generate(["w9"], "a", max_new_tokens=9, beams=3)[0]
    assert capsys.readouterr().out.splitlines() == [best.text]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": [[5], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[3] * 62]}, "prompt 0 has 62 tokens, the base takes 61"),
        ({"beams": 0}, "beams is a whole number"),
        ({"beams": 51}, "there are not 51"),
        ({"beams": 2, "stream": print}, "do not go with stream"),
        ({"beams": 2, "temperature": 1.0}, "do not go with a temperature"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 2.0}, "of a beam search"),
        ({"early_stopping": "never", "beams": 2}, "early_stopping"),
    ],
)
def test_what_does_not_fit_is_said(builds: Callable[[str], Built], options: dict[str, Any], says: str) -> None:
    session = builds("t5")[2]
    with pytest.raises((DataError, SpecError), match=says):
        session.generate(**{"prompts": [[5]], "task": "a", **options})
    assert session.generate([[5]], "a", max_new_tokens=1)


def test_a_text_ends_where_the_decoder_has_no_positions_left(builds: Callable[[str], Built]) -> None:
    row = builds("t5")[2].generate([[5]], "a", max_new_tokens=500)[0]
    assert (len(row.tokens), row.reason) == (LONG, "length")  # the source's tokens take none, nor does the last


def test_a_build_that_writes_is_verified(builds: Callable[[str], Built]) -> None:
    assert max(t.difference or 0 for t in audit(builds("t5")[1]).tasks) < 1e-4


@pytest.mark.sweep
def test_votes_are_no_text(lab: Lab) -> None:
    with pytest.raises(SpecError, match="ensemble"):
        lab.writers(base(lab, "t5", **SMALL["t5"]), [{"prompt": {"ensemble": 2}}])
