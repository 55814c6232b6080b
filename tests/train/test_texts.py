"""Models that write text: of a prompt with its completion, and of a conversation, only the answer is learned."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import surgeon
from surgeon.errors import DataError, SpecError
from surgeon.train import Chat, Completion, TrainOptions, evaluate, kind_of, load_tokenizer, train_task
from surgeon.train.batches import encode
from surgeon.train.builds import Files, train_build
from surgeon.train.kinds import kind, room

WORDS = ["[PAD]", "</s>", "[UNK]", "<u>", "<a>", "is", *(f"w{i}" for i in range(40)), *(f"c{i}" for i in range(40))]
TEMPLATE = "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<a> ') + m.content + ' </s> ' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<u> ' + m.content + ' </s> ' }}{% else %}{{ '<a> ' }}"
    "{% generation %}{{ m.content + ' </s> ' }}{% endgeneration %}{% endif %}{% endfor %}"
)
ROWS = [Completion(f"w{i} is", f"c{i} c{i + 1}" if i % 2 else f"c{i}") for i in range(8)]
OPTIONS = TrainOptions(epochs=2, learning_rate=3e-2, batch_size=4, seed=1, threads=1)
WIDE = {"lora": {"rank": 8, "where": ["attention", "ffn"]}}
SURGERY = {"llama": [WIDE], "gpt2": [{"prefix": {"length": 4}}, {"full": {"where": ["ffn"]}}], "t5": [WIDE]}
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "t5": {"dropout_rate": 0.0}}
TALK = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "c1"})


def write_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), 64)


@pytest.fixture(scope="module")
def compiled(tiny):
    """Bases with larger weights than a fresh one has, so that a delta can turn an answer."""
    found = {}
    for name, surgery in SURGERY.items():
        base = tiny(name, **NO_DROPOUT.get(name, {}))
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(1.5 if name == "t5" else 4)
        found[name] = surgeon.compile({"surgery": surgery, "tasks": {"a": {}}}, base=base)
    return found


@pytest.fixture
def fresh(compiled):
    """`fresh("llama")`: its task as it was born."""
    born = {}

    def make(name):
        model = compiled[name].model("a")
        born[name] = {n: t.clone() for n, t in model.state_dict().items()}
        return model

    yield make
    for name, tensors in born.items():
        compiled[name].model("a").load_state_dict(tensors)


@pytest.mark.parametrize("name", SURGERY)
def test_completions_are_learned(fresh, tokenizer, name):
    model = fresh(name)
    before = evaluate(model, tokenizer, ROWS)
    options = OPTIONS.model_copy(update={"epochs": 30, "learning_rate": 1e-2})
    result = train_task(model, tokenizer, ROWS, ROWS, options)
    after = evaluate(model, tokenizer, ROWS)
    assert (before.exact_match, after.exact_match, after.accuracy) == (0, 1, 1)
    assert result.history[-1].loss < 0.2 * result.history[0].loss
    assert after.perplexity == pytest.approx(np.exp(result.best_loss))
    assert result.best_loss == min(epoch.validation_loss for epoch in result.history)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_batches_of_uneven_lengths_step_as_one_large_batch(fresh, tokenizer, name):
    """Their labels are not as many, so a mean of means would be another step."""
    trained = []
    for size, accumulation in ((8, 1), (3, 3)):
        model = fresh(name)
        start = {n: t.clone() for n, t in model.state_dict().items()}
        update = {"batch_size": size, "gradient_accumulation": accumulation, "epochs": 1, "learning_rate": 1e-3}
        train_task(model, tokenizer, ROWS, None, OPTIONS.model_copy(update=update))
        trained.append({n: t.clone() - start[n] for n, t in model.state_dict().items()})
        model.load_state_dict(start)
    for found, wanted in zip(trained[0].values(), trained[1].values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert max(t.abs().max() for t in trained[0].values()) > 5e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(fresh, tokenizer, name):
    """RoPE and a table of positions; a LoRA and a prefix, which every text sees."""
    model, device = fresh(name), torch.device("cpu")
    rows = [Completion("w1 " * n, "c1 c2 " * m) for n, m in ((4, 2), (1, 1), (2, 1), (0, 1), (3, 2), (1, 2))]
    examples, found = encode(model, tokenizer, rows, 64), []
    for make in (kind_of(model).batch, kind_of(model).packed):
        model.zero_grad()
        batch = make(examples, 0, device)
        loss = model(**batch).loss
        loss.backward()
        own = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((batch["input_ids"].shape, loss.detach(), torch.cat([g.flatten() for g in own])))
    (padded, *alone), (packed, *together) = found
    assert packed[0] < padded[0]
    assert packed[1] == padded[1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_packing_steps_as_padding_does(fresh, tokenizer):
    losses = []
    for packing in (False, True):
        model = fresh("llama")
        start = {n: t.clone() for n, t in model.state_dict().items()}
        result = train_task(model, tokenizer, ROWS, ROWS, OPTIONS.model_copy(update={"packing": packing}))
        losses.append([(epoch.loss, epoch.validation_loss) for epoch in result.history])
        model.load_state_dict(start)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_an_interrupted_run_over_texts_ends_where_an_unbroken_one_does(fresh, tokenizer, tmp_path, packing):
    """Completions and conversations, five steps of six."""
    model = fresh("llama")
    born = {n: t.clone() for n, t in model.state_dict().items()}
    rows = [*ROWS, *(Chat(({"role": "user", "content": f"w{i}"}, TALK[1])) for i in range(4))]
    options = OPTIONS.model_copy(update={"checkpoint_steps": 2, "packing": packing})
    unbroken = train_task(model, tokenizer, rows, ROWS, options)
    wanted = {n: t.clone() for n, t in model.state_dict().items()}

    def interrupt(now):
        if now.step == 5:
            raise KeyboardInterrupt

    model.load_state_dict(born)
    with pytest.raises(KeyboardInterrupt):
        train_task(model, tokenizer, rows, ROWS, options, checkpoint_dir=tmp_path, progress=interrupt)
    resumed = train_task(model, tokenizer, rows, ROWS, options, checkpoint_dir=tmp_path)
    assert (resumed.resumed_from, resumed.steps) == (4, unbroken.steps)
    assert resumed.history == unbroken.history
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


def test_what_cannot_be_packed_is_told(fresh, tokenizer, tiny):
    options = OPTIONS.model_copy(update={"packing": True})
    with pytest.raises(SpecError, match="rows of this task are not packed"):
        train_task(fresh("t5"), tokenizer, ROWS, None, options)
    prompt = surgeon.compile({"surgery": [{"prompt": {"length": 2}}], "tasks": {"a": {}}}, base=tiny("llama"))
    with pytest.raises(SpecError, match="attention takes no mask of the row's own tokens alone"):
        train_task(prompt.model("a"), tokenizer, ROWS, None, options)
    windows = tiny("gemma2", sliding_window=4)
    prefix = surgeon.compile({"surgery": [{"prefix": {"length": 2, "std": 1.0}}], "tasks": {"a": {}}}, base=windows)
    with pytest.raises(SpecError, match="a text that shares its row is read otherwise than alone"):
        train_task(prefix.model("a"), tokenizer, ROWS, None, options)


def spelled(ids):
    return " ".join(WORDS[i] if i >= 0 else "_" for i in ids)


def test_the_prompt_is_read_and_the_completion_with_its_end_is_learned(fresh, tokenizer):
    rows = [Completion("w1 is", "c1 c2"), Completion("", "c1 c2")]
    first, empty = encode(fresh("llama"), tokenizer, rows, 64)
    assert (spelled(first.input_ids), spelled(first.labels)) == ("w1 is c1 c2 </s>", "_ _ c1 c2 </s>")
    assert (spelled(empty.input_ids), spelled(empty.labels)) == ("c1 c2 </s>", "_ c2 </s>")
    (apart,) = encode(fresh("t5"), tokenizer, rows[:1], 64)
    assert (spelled(apart.input_ids), spelled(apart.labels)) == ("w1 is", "c1 c2 </s>")


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
def test_of_a_conversation_the_assistants_turns_are_learned(fresh, tokenizer, template):
    plain, tokenizer.chat_template = tokenizer.chat_template, template
    row = Chat((*TALK, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "c3 c4"}))
    (example,) = encode(fresh("llama"), tokenizer, [row], 64)
    tokenizer.chat_template = plain
    assert spelled(example.input_ids) == "<u> w1 w2 </s> <a> c1 </s> <u> w3 </s> <a> c3 c4 </s>"
    assert spelled(example.labels) == "_ _ _ _ _ c1 </s> _ _ _ _ c3 c4 </s>"


def test_a_conversation_for_an_encoder_decoder_learns_its_last_turn(fresh, tokenizer):
    (example,) = encode(fresh("t5"), tokenizer, [Chat(TALK)], 64)
    assert (spelled(example.input_ids), spelled(example.labels)) == ("<u> w1 w2 </s> <a>", "c1 </s>")
    with pytest.raises(DataError, match="the last message is not the assistant's"):
        encode(fresh("t5"), tokenizer, [Chat((*TALK, {"role": "user", "content": "w3"}))], 64)


def test_what_is_too_long_loses_the_end_of_what_is_learned_and_never_of_the_prompt(fresh, tokenizer):
    model = fresh("llama")
    (cut,) = encode(model, tokenizer, [Completion("w1 w2", "c1 c2 c3")], 4)
    assert (spelled(cut.labels), cut.cut) == ("_ _ c1 c2", True)
    result = train_task(model, tokenizer, [*ROWS, Completion("w1", "c1 " * 70)], None, OPTIONS)
    assert result.cut == 1
    with pytest.raises(DataError, match=r"row 2: the prompt has 70 tokens, which leaves nothing of 64"):
        encode(model, tokenizer, [ROWS[0], Completion("w1 " * 70, "c1")], 1000)
    with pytest.raises(DataError, match=r"row 1: the prompt has 70 tokens, and 64 are kept"):
        encode(fresh("t5"), tokenizer, [Completion("w1 " * 70, "c1")], 1000)


BAD = {
    "no prompt": ({"promt": "a", "completion": "b"}, "there is no column 'prompt'"),
    "empty completion": ({"prompt": "a", "completion": " "}, "column 'completion' holds no text"),
    "prompt a number": ({"prompt": 3, "completion": "b"}, "column 'prompt' holds no text"),
    "no messages": ({"messages": []}, "'messages' holds no list of messages"),
    "a text for messages": ({"messages": "hello"}, "'messages' holds no list of messages"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 is no object with a text under 'role' and 'content'"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
    "a silent assistant": ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant says nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_fit_are_told_with_their_line(tmp_path, case):
    record, words = BAD[case]
    path = tmp_path / "rows.jsonl"
    good = {"messages": list(TALK)}
    path.write_text("\n".join(json.dumps(row) for row in (good, record)))
    with pytest.raises(DataError) as caught:
        kind("causal-lm", 0).read(path, {})
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_columns_may_have_other_names(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,reply\nw1,c1\n")
    (row,) = kind("causal-lm", 0).read(path, {"prompt": "question", "completion": "reply"})
    assert row[:2] == ("w1", "c1")
    with pytest.raises(SpecError, match="rows of this task have no 'promt'"):
        kind("causal-lm", 0).read(path, {"promt": "question"})


def test_what_a_base_does_not_bring_is_told(tokenizer, fresh):
    causal, space = kind("causal-lm", 0), room(fresh("llama"), tokenizer, 64)
    with pytest.raises(DataError, match="names the token that ends a text"):
        causal.encode(tokenizer, ROWS, space._replace(end=None))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(DataError, match="row 1: these are messages, and the base has no chat template"):
        causal.encode(tokenizer, [Chat(TALK)], space)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match="row 1: the base's chat template refuses these messages: only one turn"):
        causal.encode(tokenizer, [Chat(TALK)], space)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match="the base's chat template writes message 2 another way"):
        causal.encode(tokenizer, [Chat((*TALK, TALK[0]))], space)
    tokenizer.chat_template = template


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A build that writes, over a folder with tokenizer and chat template, and rows of both sorts."""
    folder = tmp_path_factory.mktemp("writer")
    base = tiny("llama", initializer_range=0.2)
    base.config.eos_token_id = base.generation_config.eos_token_id = 1
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    spec = {
        "base": {"model": str(folder / "base"), "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 8, "where": ["attention", "ffn"]}}],
        "tasks": {"a": {}},
        "export": {"generate": True},
    }
    surgeon.compile(spec, out=folder / "build")
    lines = [{"prompt": f"w{i} is", "completion": f"c{i} c{i + 1}"} for i in range(4)]
    lines += [{"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"c{i}"}]}
              for i in range(4)]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def weights(build: Path) -> dict[str, torch.Tensor]:
    (path,) = (build / "tasks").glob("a.*.safetensors")
    return load_file(path)


def test_what_is_trained_is_written_by_onnx_runtime(built, tmp_path):
    build, rows = Path(shutil.copytree(built / "build", tmp_path / "build")), built / "rows.jsonl"
    options = TrainOptions(epochs=40, learning_rate=2e-2, batch_size=7, threads=1)
    said: list[str] = []
    result = train_build(build, {"a": Files(rows, rows)}, options=options, report=said.append)
    assert result.history[result.best_epoch - 1].exact_match == 1
    assert not any("cache" in step for step in said)  # what writes is not needed to train
    with surgeon.Session(build, threads=1) as session:
        talk = [{"role": "user", "content": "w3"}]
        found = session.generate(["w2 is", talk], "a")
        assert [(row.text, row.reason) for row in found] == [("c2 c3", "end"), ("c3", "end")]
    with pytest.raises(SpecError, match="loaded without what writes texts"):
        surgeon.load(build, writes=False).save(tmp_path / "again")


def test_two_processes_train_what_one_does(built, tmp_path):
    """Seven of eight rows are in one batch, which does not divide by two, and one alone in another."""
    alone, both = (Path(shutil.copytree(built / "build", tmp_path / name)) for name in ("alone", "both"))
    rows = built / "rows.jsonl"
    options = TrainOptions(epochs=4, learning_rate=5e-3, batch_size=7, threads=1)
    result = train_build(alone, {"a": Files(rows, rows)}, options=options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "surgeon", "train", both, "--task", "a", "--data", rows, "--validation", rows]
    command += ["--epochs", "4", "--lr", "5e-3", "--batch-size", "7", "--threads", "1", "--json"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert told[1][0] == ""
    found = json.loads(told[0][0])
    for epoch, wanted in zip(found["history"], result.history, strict=True):
        assert flat(epoch) == pytest.approx(flat(asdict(wanted)), abs=1e-4)
    one, two = weights(alone), weights(both)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)


def flat(epoch: dict[str, Any]) -> dict[str, float]:
    """An epoch's figures, those of single tasks among them."""
    return {**epoch, **epoch["accuracies"], "accuracies": len(epoch["accuracies"])}
