"""A decoder with a tokenizer that writes: texts, conversations, streams, stops, slots that change hands."""

from __future__ import annotations

import copy
import io
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import surgeon
from surgeon.audit import audit
from surgeon.cli import main
from surgeon.compiler import Compiled
from surgeon.errors import BuildError, DataError, SpecError
from surgeon.exporters.genai import not_carried
from surgeon.runtime.generation.chat import Chat

if TYPE_CHECKING:
    from techniques.conftest import Decoding, Lab

LONG = 64
LENGTHS = (5, 1, 9, 14)
CHAT = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('who is ' + message.role + '?') }}{% endif %}
 w5 {{ message.content }} {{ eos_token }}{% endfor %}{% if add_generation_prompt %} w6{% endif %}"""
WORDS = [f"w{i}" for i in range(100)]


@pytest.fixture(scope="module")
def talker(lab: Lab, tmp_path_factory: pytest.TempPathFactory, decoding: Decoding) -> tuple[Compiled, Path]:
    """A LoRA on a base of a folder with a tokenizer of a hundred words."""
    folder = tmp_path_factory.mktemp("talker")
    model = copy.deepcopy(decoding.base("llama", num_hidden_layers=1))
    model.save_pretrained(folder / "base")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w2", eos_token="w3", chat_template=CHAT)
    chatty.save_pretrained(folder / "base")
    spec = {
        "base": {"model": str(folder / "base"), "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 4}}],
        "tasks": {"a": {}},
        "export": {"generate": True},
    }
    made = surgeon.compile(spec)
    lab.move(made.model("a")).eval()
    return made, made.save(folder / "build")


@pytest.fixture(scope="module")
def session(talker: tuple[Compiled, Path]) -> surgeon.Session:
    return surgeon.Session(talker[1], threads=1)


def test_lora_writes_what_generate_does_with_the_product_merged(
    lab: Lab, talker: tuple[Compiled, Path], session: surgeon.Session, decoding: Decoding
) -> None:
    wanted = [decoding.by_transformers(decoding.merged(talker[0]), prompt, LONG) for prompt in lab.prompts()]
    assert [list(r.tokens) for r in session.generate(lab.prompts(), "a", max_new_tokens=LONG)] == wanted


def test_a_part_after_a_cache_gives_the_logits_of_the_whole(lab: Lab, talker: tuple[Compiled, Path]) -> None:
    made, _ = talker
    assert made.served is not None
    ids = torch.tensor(lab.prompts([11]))
    graph = made.served.graph_module
    with torch.no_grad():
        whole = made.base.model(input_ids=ids).logits
        past = {i.name: i.absent(ids) for i in made.served.inputs if i.cached}
        at = 0
        for size in (1, 6, 1, 3):  # deltas of the graph are examples: the base has its own defaults
            part, at = ids[:, at : at + size], at + size
            fed = {"input_ids": part, "attention_mask": torch.ones(1, at, dtype=torch.long), **past}
            found = torch.func.functional_call(graph, made.served.ledger.defaults(), (), fed)
            assert torch.allclose(found["logits"], whole[:, at - 1 : at], atol=1e-5)
            past = {n.replace("present", "past"): t for n, t in found.items() if n.startswith("present")}


def test_a_plain_run_gives_the_next_token(lab: Lab, talker: tuple[Compiled, Path], session: surgeon.Session) -> None:
    ids = np.array(lab.prompts([6]))
    logits = session.run({"input_ids": ids}, "a")["logits"]
    assert logits.shape == (1, 1, 100)
    assert session.generate([ids[0]], "a", max_new_tokens=1)[0].tokens == (int(logits.argmax()),)


def test_a_build_that_writes_is_verified(talker: tuple[Compiled, Path]) -> None:
    assert max(t.difference or 0 for t in audit(talker[1]).tasks) < 1e-4


def test_sampling_follows_the_seed_and_not_the_neighbours(lab: Lab, session: surgeon.Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
    given = lab.prompts()
    together = session.generate(given, "a", seed=7, **options)
    assert together == session.generate(given, "a", seed=7, batch=2, **options)
    alone = [session.generate([p], "a", seed=7 + i, **options)[0] for i, p in enumerate(given)]
    assert together == alone
    assert together != session.generate(given, "a", seed=8, **options)


def test_rows_end_at_different_times_and_others_take_their_slots(lab: Lab, session: surgeon.Session) -> None:
    assert session.manifest.generation is not None
    assert session.manifest.generation.shared
    given = [" ".join(WORDS[i] for i in ids) for ids in lab.prompts((*LENGTHS, 3, 7, 2, 11))]
    whole = session.generate(given, "a", max_new_tokens=24, batch=1)
    stop = [f" {row.text.split()[at]} " for at, row in zip((2, 9, 5), whole, strict=False)]
    alone = session.generate(given, "a", max_new_tokens=24, batch=1, stop=stop)
    assert len({len(row.tokens) for row in alone}) > 3
    for batch in (2, 3, 8):
        assert session.generate(given, "a", max_new_tokens=24, batch=batch, stop=stop) == alone


def test_a_text_ends_at_its_end_token(
    lab: Lab, talker: tuple[Compiled, Path], tmp_path: Path, decoding: Decoding
) -> None:
    made, _ = talker
    tokens = decoding.uncached(made.model("a"), lab.prompts()[0], 8)
    end = tokens[-1]
    made.base.model.generation_config.eos_token_id = [end]
    try:
        with surgeon.Session(made.save(tmp_path / "build")) as session:
            row = session.generate(lab.prompts()[:1], "a")[0]
    finally:
        made.base.model.generation_config.eos_token_id = None
    assert row.reason == "end"
    assert list(row.tokens) == tokens[: tokens.index(end) + 1]
    assert WORDS[end] not in row.text.split()


def test_texts_come_in_pieces_and_stop(session: surgeon.Session) -> None:
    said: dict[int, str] = {0: "", 1: ""}

    def listen(row: int, piece: str) -> None:
        said[row] += piece

    given = ["w3 w4 w5", "w9"]
    whole = session.generate(given, "a", max_new_tokens=20, stream=listen)
    assert [row.text for row in whole] == [said[0], said[1]]
    assert whole[0].text.split() == [WORDS[i] for i in whole[0].tokens]
    word = whole[0].text.split()[5]
    said = {0: "", 1: ""}
    cut = session.generate(given[:1], "a", max_new_tokens=20, stop=[f"{word} ", word, "never"], stream=listen)[0]
    assert cut.reason == "stop"
    assert cut.text == whole[0].text[: whole[0].text.index(word)] == said[0]
    assert session.generate(given[:1], "a", max_new_tokens=20, stop="never")[0].text == whole[0].text


def test_an_interrupted_stream_leaves_the_session_usable(session: surgeon.Session) -> None:
    def interrupt(row: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(["w3 w4"], "a", stream=interrupt)
    assert session.generate(["w3 w4"], "a", max_new_tokens=3)[0].reason == "length"


def test_an_interrupted_command_has_said_what_there_was(
    talker: tuple[Compiled, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Screen(io.StringIO):
        """Interrupts this process at the third piece."""

        def write(self, text: str) -> int:
            written = super().write(text)
            if self.getvalue().count("w") == 3 and text.strip():
                signal.raise_signal(signal.SIGINT)
            return written

    screen, before = Screen(), signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "stdout", screen)
    try:
        code = main(["run", str(talker[1]), "--stream", "w3 w4", "w9"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, len(screen.getvalue().split()), screen.getvalue()[-1]) == (130, 3, "\n")
    assert "interrupted" in capsys.readouterr().err


def test_a_graph_with_the_cache_of_another_build_is_refused(talker: tuple[Compiled, Path], tmp_path: Path) -> None:
    build = Path(shutil.copytree(talker[1], tmp_path / "build"))
    graph = onnx.load(build / "model.onnx", load_external_data=False)
    next(i for i in graph.graph.input if i.name == "past_key_0").type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(graph, build / "model.onnx")
    with pytest.raises(BuildError, match=r"model\.onnx has"):
        surgeon.Session(build)
    with pytest.raises(BuildError, match=r"inputs are not those of the manifest(?s:.*)past_key_0"):
        surgeon.Session(build, verify=False)


def test_a_text_ends_where_the_base_has_no_positions_left(lab: Lab, session: surgeon.Session) -> None:
    row = session.generate(lab.prompts([120]), "a", max_new_tokens=50)[0]
    assert (len(row.tokens), row.reason) == (9, "length")  # 120 read and 8 of the 9 written: 128 positions


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": ["w1", ""]}, "prompt 1 has no tokens"),
        ({"prompts": [[5], []]}, "prompt 1 has no tokens"),
        ({"prompts": "w1"}, "prompts are a list"),
        ({"prompts": [[3, -1]]}, "prompt 0 is no text"),
        ({"prompts": [[1.5]]}, "prompt 0 is no text"),
        ({"prompts": [[3] * 129]}, "prompt 0 has 129 tokens, the base takes 128"),
        ({"prompts": [[3, 1000]]}, "the model cannot run"),
        ({"task": "aa"}, "there is no task 'aa'"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1, "top_k": 0}, "top_k"),
        ({"temperature": 1, "top_p": 1.5}, "top_p"),
        ({"top_p": 0.5}, "need a temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"batch": 0}, "batch"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_does_not_fit_is_said(session: surgeon.Session, options: dict[str, Any], says: str) -> None:
    with pytest.raises((DataError, SpecError), match=says):
        session.generate(**{"prompts": ["w1"], "task": "a", **options})
    assert session.generate(["w1"], "a", max_new_tokens=1)


def test_a_conversation_is_read_as_transformers_writes_it(
    talker: tuple[Compiled, Path], session: surgeon.Session
) -> None:
    _, build = talker
    tokenizer = PreTrainedTokenizerFast.from_pretrained(build.parent / "base")
    messages = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert len(ids) == 9
    assert session.generate([messages], "a", max_new_tokens=9) == session.generate([ids], "a", max_new_tokens=9)
    with pytest.raises(DataError, match="who is nobody"):
        session.generate([[{"role": "nobody", "content": "w9"}]])
    with pytest.raises(DataError, match="no conversation"):
        session.generate([[{"content": "w9"}]])


def test_onnxruntime_genai_writes_the_same_tokens_with_our_task_files(
    lab: Lab, talker: tuple[Compiled, Path], tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    made, _ = talker
    made.base.model.generation_config.eos_token_id = [7, 8]
    try:
        build = made.save(tmp_path / "build")
    finally:
        made.base.model.generation_config.eos_token_id = None
    model = genai.Model(str(build))
    adapters = genai.Adapters(model)
    with surgeon.Session(build, threads=1) as session:
        adapters.load(str(build / session.manifest.tasks["a"].adapter), "a")
        for prompt, task in [(p, t) for p in lab.prompts() for t in (None, "a")]:
            options = genai.GeneratorParams(model)
            options.set_search_options(max_length=len(prompt) + LONG, do_sample=False)
            generator = genai.Generator(model, options)
            if task is not None:
                generator.set_active_adapter(adapters, task)
            generator.append_tokens(np.array([prompt], dtype=np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            found = tuple(generator.get_sequence(0)[len(prompt) :])
            row = session.generate([prompt], task, max_new_tokens=LONG)[0]
            assert found == (row.tokens[:-1] if row.reason == "end" else row.tokens)  # it leaves the end token out


def test_what_genai_cannot_carry_gets_no_folder_of_it(
    lab: Lab, talker: tuple[Compiled, Path], tmp_path: Path, decoding: Decoding
) -> None:
    said: list[str] = []
    build = talker[0].save(tmp_path / "build", progress=said.append)
    assert "no genai_config.json: onnxruntime-genai needs a token that ends a text, and this base names none" in said
    assert not (build / "genai_config.json").exists()
    served = lab.writers(decoding.base("gpt2", n_layer=1), [{"bitfit": {}}, {"prompt": {"length": 3}}]).served
    assert served is not None
    assert not_carried(served, [7]) == "onnxruntime-genai does not carry 'prompt'"


def test_a_template_reaches_nothing() -> None:
    with pytest.raises(DataError, match="unsafe"):
        Chat("{{ ''.__class__.__mro__ }}", {}, "here").render([{"role": "user"}])
    with pytest.raises(DataError, match="unsafe"):
        Chat("{{ messages.append(1) }}", {}, "here").render([{"role": "user"}])
    with pytest.raises(BuildError, match="cannot be read"):
        Chat("{% if %}", {}, "here")


def test_the_command_writes_and_streams(talker: tuple[Compiled, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, build = talker
    common = ["run", str(build), "-t", "a", "w3 w4", "w9", "--tokens", "12", "--temperature", "0.7", "--seed", "3"]
    assert main([*common, "--json"]) == 0
    whole = [row["text"] for row in json.loads(capsys.readouterr().out)]
    for way in ([], ["--stream"]):
        assert main([*common, *way]) == 0
        assert capsys.readouterr().out.splitlines() == whole
    assert main([*common, "--stream", "--chat"]) == 0
    assert capsys.readouterr().out.splitlines() != whole
    assert main([*common, "--stream", "--json"]) == 2


def test_words_need_a_tokenizer(talker: tuple[Compiled, Path], tmp_path: Path) -> None:
    made, _ = talker
    object.__setattr__(made.base, "tokenizer_path", None)
    with surgeon.Session(made.save(tmp_path / "build")) as session:
        assert session.generate([[3]], "a", max_new_tokens=2)[0].text == ""
        for options in ({"prompts": ["w3"]}, {"prompts": [[3]], "stop": "w5"}):
            with pytest.raises(BuildError, match=r"no tokenizer\.json"):
                session.generate(**options)
