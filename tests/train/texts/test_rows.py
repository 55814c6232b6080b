"""Rows of text: of a prompt with its completion, and of a conversation, only the answer is learned."""

from __future__ import annotations

import json

import pytest

from surgeon.errors import DataError, SpecError
from surgeon.train import Chat, Completion, TrainOptions, train_task
from surgeon.train.batches import encode
from surgeon.train.kinds import kind, room

MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<u> ' + m.content + ' </s> ' }}{% else %}{{ '<a> ' }}"
    "{% generation %}{{ m.content + ' </s> ' }}{% endgeneration %}{% endif %}{% endfor %}"
)
ROW = Completion("w0 is", "c0")
TALK = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "c1"})


@pytest.fixture
def spelled(tokenizer):
    """The words of ids, and what is not learned as a stroke."""
    return lambda ids: " ".join(tokenizer.convert_ids_to_tokens(i) if i >= 0 else "_" for i in ids)


def test_the_prompt_is_read_and_the_completion_with_its_end_is_learned(fresh, tokenizer, spelled):
    rows = [Completion("w1 is", "c1 c2"), Completion("", "c1 c2")]
    first, empty = encode(fresh("llama"), tokenizer, rows, 64)
    assert (spelled(first.input_ids), spelled(first.labels)) == ("w1 is c1 c2 </s>", "_ _ c1 c2 </s>")
    assert (spelled(empty.input_ids), spelled(empty.labels)) == ("c1 c2 </s>", "_ c2 </s>")
    (apart,) = encode(fresh("t5"), tokenizer, rows[:1], 64)
    assert (spelled(apart.input_ids), spelled(apart.labels)) == ("w1 is", "c1 c2 </s>")


@pytest.mark.parametrize("template", [None, MARKED], ids=["plain", "marked"])
def test_of_a_conversation_the_assistants_turns_are_learned(fresh, tokenizer, spelled, template):
    plain, tokenizer.chat_template = tokenizer.chat_template, template or tokenizer.chat_template
    row = Chat((*TALK, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "c3 c4"}))
    (example,) = encode(fresh("llama"), tokenizer, [row], 64)
    tokenizer.chat_template = plain
    assert spelled(example.input_ids) == "<u> w1 w2 </s> <a> c1 </s> <u> w3 </s> <a> c3 c4 </s>"
    assert spelled(example.labels) == "_ _ _ _ _ c1 </s> _ _ _ _ c3 c4 </s>"


def test_a_conversation_for_an_encoder_decoder_learns_its_last_turn(fresh, tokenizer, spelled):
    (example,) = encode(fresh("t5"), tokenizer, [Chat(TALK)], 64)
    assert (spelled(example.input_ids), spelled(example.labels)) == ("<u> w1 w2 </s> <a>", "c1 </s>")
    with pytest.raises(DataError, match="the last message is not the assistant's"):
        encode(fresh("t5"), tokenizer, [Chat((*TALK, {"role": "user", "content": "w3"}))], 64)


def test_what_is_too_long_loses_the_end_of_what_is_learned_and_never_of_the_prompt(fresh, tokenizer, spelled):
    model = fresh("llama")
    (cut,) = encode(model, tokenizer, [Completion("w1 w2", "c1 c2 c3")], 4)
    assert (spelled(cut.labels), cut.cut) == ("_ _ c1 c2", True)
    result = train_task(model, tokenizer, [ROW, Completion("w1", "c1 " * 70)], None, TrainOptions(epochs=1, threads=1))
    assert result.cut == 1
    with pytest.raises(DataError, match=r"row 2: the prompt has 70 tokens, which leaves nothing of 64"):
        encode(model, tokenizer, [ROW, Completion("w1 " * 70, "c1")], 1000)
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
        causal.encode(tokenizer, [ROW], space._replace(end=None))
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
