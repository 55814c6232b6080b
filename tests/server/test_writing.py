"""OpenAI's protocol, spoken by its own client: what is written is what the session writes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import surgeon
from surgeon.runtime.document import seal
from surgeon.runtime.manifest import MIXED_DECODER
from surgeon.runtime.taskfile import SUFFIX
from surgeon.server.limits import Limits
from tests.server.conftest import Live, write_task

TEMPLATE = (
    "{% for m in messages %}{{ ('<u> ' if m.role == 'user' else '<a> ') + m.content + ' </s> ' }}{% endfor %}<a> "
)
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]


BASES = {
    "llama": ("causal-lm", {"num_hidden_layers": 1}),
    "bart": ("seq2seq-lm", {"encoder_layers": 1, "decoder_layers": 1}),
}


@pytest.fixture(scope="module")
def built(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        head, sizes = BASES[kind]
        wide = {"initializer_range": 0.3} if kind == "llama" else {"init_std": 0.3}
        tiny(kind, eos_token_id=1, **wide, **sizes).save_pretrained(folder / "base")
        words = {"<p>": 0, "</s>": 1, "[UNK]": 2, "<u>": 3, "<a>": 4, **{f"w{i}": i for i in range(5, 100)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "base" / "tokenizer.json"))
        (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
        surgeon.compile(
            {
                "base": {"model": str(folder / "base"), "head": head},
                "surgery": [{"lora": {"rank": 4}}],
                "tasks": {"a": {}},
                "export": {"generate": True, "modes": ["switch", "mixed"]},
            },
            out=folder / "build",
        )
        return folder / "build"

    return build


TOGETHER = ["switch", "mixed"]


@pytest.fixture(
    scope="module",
    params=[("llama", ["switch"]), ("llama", TOGETHER), ("bart", TOGETHER)],
    ids=["each alone", "together", "from sources together"],
)
def live(
    built: Callable[[str], Path],
    serving: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Live]:
    kind, modes = request.param
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(built(kind), folder / "build")
    manifest = json.loads((folder / "build" / "manifest.json").read_text())
    (folder / "build" / "manifest.json").write_text(json.dumps(seal({**manifest, "modes": modes})))
    with serving(folder / "build", Limits(writers=2, deadline=20)) as server:
        server.session.add_task(write_task(folder / "build", folder / f"b{SUFFIX}", seed=1))
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "a", "b"]


@pytest.mark.parametrize("task", ["base", "b"])
def test_completions_are_the_sessions(live: Live, client: openai.OpenAI, task: str) -> None:
    prompts = ["w5 w6 w7", "w9"]
    right = live.session.generate(prompts, None if task == "base" else task, max_new_tokens=12)
    found = client.completions.create(model=task, prompt=prompts, max_tokens=12, temperature=0)
    assert [choice.text for choice in found.choices] == [row.text for row in right]
    reasons = {"end": "stop", "stop": "stop", "length": "length"}
    assert [choice.finish_reason for choice in found.choices] == [reasons[row.reason] for row in right]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, sum(len(row.tokens) for row in right))
    pieces = ["", ""]
    reasons_ = {}
    for event in client.completions.create(model=task, prompt=prompts, max_tokens=12, temperature=0, stream=True):
        for choice in event.choices:
            pieces[choice.index] += choice.text
            reasons_[choice.index] = choice.finish_reason
    assert pieces == [row.text for row in right]
    assert [reasons_[i] for i in range(2)] == [reasons[row.reason] for row in right]


def test_many_at_once_have_the_texts_of_each_alone(live: Live, client: openai.OpenAI) -> None:
    asked = [(f"w{5 + i} w{20 + 3 * i}", ("a", "b", "base")[i % 3], 3 + 5 * (i % 4)) for i in range(18)]
    right = [
        live.session.generate([prompt], None if task == "base" else task, max_new_tokens=tokens)[0].text
        for prompt, task, tokens in asked
    ]

    def ask(one: tuple[str, str, int]) -> str:
        prompt, task, tokens = one
        found = client.completions.create(model=task, prompt=prompt, max_tokens=tokens, temperature=0)
        return found.choices[0].text

    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, asked)) == right
    end = time.monotonic() + 5
    while b"surgeon_writing_texts 0.0" not in live.call("GET", "/metrics").body and time.monotonic() < end:
        time.sleep(0.01)
    assert b"surgeon_writing_texts 0.0" in live.call("GET", "/metrics").body


def test_token_ids_seeds_stops_and_several_answers(live: Live, client: openai.OpenAI) -> None:
    drawn = {"max_tokens": 8, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    right = live.session.generate([[5, 6, 7]] * 2, "b", max_new_tokens=8, seed=5, temperature=1.5, top_p=0.9)
    found = client.completions.create(model="b", prompt=[5, 6, 7], n=2, **drawn)
    assert [choice.text for choice in found.choices] == [row.text for row in right]
    first = client.completions.create(model="b", prompt="w5", temperature=0, max_tokens=6).choices[0].text
    word = first.split()[2]
    stopped = client.completions.create(model="b", prompt="w5", temperature=0, max_tokens=6, stop=[word]).choices[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", first[: first.index(word)])


def test_conversations(live: Live, client: openai.OpenAI) -> None:
    [right] = live.session.generate([CHAT], "b", max_new_tokens=10)
    asked: dict[str, Any] = {"model": "b", "messages": CHAT, "temperature": 0, "max_completion_tokens": 10}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == right.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == right.prompt
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for event in events for c in event.choices) == right.text
    assert events[-1].usage == found.usage


def test_what_is_not_done_is_told(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no task 'c'"):
        client.completions.create(model="c", prompt="w5")
    for wrong, says in (
        ({"logprobs": 3}, "'logprobs' is not done here"),
        ({"echo": True}, "'echo' is not done here"),
        ({"n": 17}, "16 are the most"),
        ({"n": 0}, "'n' is a whole number"),
        ({"max_tokens": -1}, "'max_tokens' is a whole number"),
        ({"temperature": -1.0}, "temperature is a number from 0"),
        ({"temperature": "hot"}, "'temperature' is a number"),
        ({"top_p": 0}, "top_p is a share"),
        ({"stop": [""]}, "'stop' is a string"),
        ({"prompt": []}, "'prompt' is missing"),
        ({"prompt": ["w5", 3]}, "neither a text"),
        ({"prompt": ""}, "has no tokens"),
        ({"prompt": "w5 " * 65}, "the base takes 64 at most"),
        ({"prompt": [10**6]}, "cannot run on these inputs"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.completions.create(**{"model": "b", "prompt": "w5", **wrong})  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="content is a text"):
        client.chat.completions.create(model="b", messages=[{"role": "user", "content": 3}])  # type: ignore[typeddict-item]
    assert client.completions.create(model="b", prompt="w5").choices[0].text


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "is not JSON"),
        (b"[]", 400, "is not a JSON object"),
        (b" " * ((8 << 20) + 1), 413, "is too large"),
        ({"prompt": "w5"}, 400, "'model' is missing"),
        ({"model": ["a"], "prompt": "w5"}, 400, "'model' is missing"),
        ({"model": "../a", "prompt": "w5"}, 404, "there is no task"),
        ({"model": "a\0", "prompt": "w5"}, 404, "there is no task"),
        ({"model": "x" * 5000, "prompt": "w5"}, 404, "there is no task"),
        ({"model": "a", "prompt": {"text": "w5"}}, 400, "'prompt' is missing"),
        ({"model": "a", "prompt": ["w5"] * 17}, 400, "16 are the most"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_told_so(live: Live, body: Any, status: int, says: str) -> None:
    reply = live.call("POST", "/v1/completions", body)
    assert (reply.status, says in reply.json["error"]["message"]) == (status, True), reply.body


def test_more_texts_than_may_wait_are_told(live: Live, serving: Callable[..., Any]) -> None:
    with serving(live.session._build, Limits(queue=2)) as small:
        asked = {"model": "a", "prompt": ["w5", "w6", "w7"], "max_tokens": 2}
        reply = small.call("POST", "/v1/completions", asked)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert small.call("POST", "/v1/completions", {**asked, "prompt": ["w5", "w6"]}).status == 200


def test_a_stop_writes_what_was_taken_in(live: Live, serving: Callable[..., Any]) -> None:
    asked = {"model": "a", "prompt": "w5 w6", "max_tokens": 50, "temperature": 0}
    right = live.session.generate(["w5 w6"], "a", max_new_tokens=50)[0].text
    with ThreadPoolExecutor(4) as pool:
        with serving(live.session._build) as ending:
            waiting = [pool.submit(ending.call, "POST", "/v1/completions", asked) for _ in range(4)]
            while b"surgeon_writing_texts 4.0" not in ending.call("GET", "/metrics").body and not all(
                f.done() for f in waiting
            ):
                time.sleep(0.001)
        assert [future.result().json["choices"][0]["text"] for future in waiting] == [right] * 4


def test_a_graph_that_cannot_be_opened_fails_those_who_ask_and_nobody_later(
    built: Callable[[str], Path], tmp_path: Path, serving: Callable[..., Any]
) -> None:
    build = Path(shutil.copytree(built("bart"), tmp_path / "build"))
    asked = {"model": "a", "prompt": "w5", "max_tokens": 2}
    with serving(build, Limits(deadline=20)) as server:
        (build / MIXED_DECODER).rename(tmp_path / MIXED_DECODER)
        for _ in range(2):
            reply = server.call("POST", "/v1/completions", asked)
            assert (reply.status, MIXED_DECODER in reply.json["error"]["message"]) == (500, True), reply.body
        (tmp_path / MIXED_DECODER).rename(build / MIXED_DECODER)
        assert server.call("POST", "/v1/completions", asked).status == 200


def test_a_stream_that_nobody_reads_ends(live: Live, client: openai.OpenAI) -> None:
    """The thread that writes for a client who went away is free again for others."""
    for _ in range(6):
        with client.completions.create(model="b", prompt="w5", max_tokens=60, stream=True) as events:
            next(iter(events))
    assert client.completions.create(model="b", prompt="w5", max_tokens=2).choices[0].text


def test_a_deadline_ends_the_writing(live: Live, tmp_path: Path, serving: Callable[..., Any]) -> None:
    build = live.session._build
    with serving(build, Limits(deadline=0.002)) as hurried:
        reply = hurried.call("POST", "/v1/completions", {"model": "a", "prompt": "w5", "max_tokens": 60})
        assert (reply.status, "within the deadline" in reply.json["error"]["message"]) == (504, True)
