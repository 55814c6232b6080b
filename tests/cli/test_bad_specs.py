"""A wrong spec is told with its line and what there is instead; nothing is written."""

from __future__ import annotations

import pytest

AT_ONCE = {  # found while the spec is read
    "an unknown technique": (
        "[lorra: {rank: 8}]",
        ("spec.yaml:2:", "unknown technique 'lorra'", "did you mean 'lora'?"),
    ),
    "an unknown option": ("[lora: {alfa: 16}]", ("spec.yaml:2:", "no option 'alfa'", "did you mean 'alpha'?")),
    "a rank of zero": ("[lora: {rank: 0}]", ("lora.rank", "got 0")),
    "a negative rank": ("[lora: {rank: -4}]", ("lora.rank", "got -4")),
    "a rank that is no number": ("[lora: {rank: many}]", ("lora.rank", "'many'")),
    "a selector that is none": ("[lora: {where: 'attention query'}]", ("attention query",)),
    "layers that run backwards": ("[lora: {where: ffn.up@3-1}]", ("3-1", "backwards")),
}
IN_THE_BASE = {  # found when the anatomy is there
    "an unknown role": (
        "[lora: {where: attention.qerry}]",
        ("spec.yaml:2:", "attention.qerry", "did you mean 'attention.query'?"),
    ),
    "a role that this base lacks": (
        "[lora: {where: cross_attention.query}]",
        ("cross_attention.query", "encoder/attention.query 1"),
    ),
    "one part of a selector that matches nothing": (
        "[lora: {where: [attention.query, ffn.gate]}]",
        ("'ffn.gate'", "ffn.up 1"),
    ),
    "a stack that there is not": ("[lora: {where: decoder/ffn.up}]", ("'decoder'", "encoder/ffn.up 1")),
    "a layer that there is not": ("[lora: {where: 'ffn.up@0,7'}]", ("no layer 7", "1 layers in encoder (0-0)")),
    "a path that there is not": ("[lora: {where: 'name:bert.layer.*'}]", ("name:bert.layer.*", "bert.encoder.layer.0")),
    "a rank larger than the layer": ("[lora: {rank: 33}]", ("33", "32 -> 32", "at most 32")),
    "a role of another kind": ("[adapter: {where: attention.query}]", ("attention.query", "residual.ffn 1")),
    "the same pass twice": ("[lora: {}, lora: {rank: 4}]", ("spec.yaml:2:",)),
    "two passes that train one bias": ("[bitfit: {where: norm}, adapter: {placement: houlsby}]", ("spec.yaml:2:",)),
    "two heads": ("[head: {}, head: {}]", ("spec.yaml:2:",)),
}
TASKS = {
    "no label": ("{mood: {labels: 0}}", ("labels", "at least 2", "got 0")),
    "an empty list of labels": ("{mood: {labels: []}}", ("at least 2", "got 0")),
    "one label": ("{mood: {labels: [good]}}", ("at least 2", "got 1")),
    "a label twice": ("{mood: {labels: [good, good]}}", ("good", "twice")),
    "a name that leaves the folder": ("{../x: {labels: 2}}", ("../x", "cannot be a task's name")),
    "a name that is no file's": ("{'': {labels: 2}}", ("cannot be a task's name",)),
    "a name twice": ("{mood: {labels: 2}, mood: {labels: 3}}", ("'mood' is written twice",)),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_a_mistake_in_the_surgery_is_told_with_its_line(refused, write_spec, unchanged, tmp_path, case):
    surgery, words = AT_ONCE[case]
    spec = write_spec(surgery)
    with unchanged(tmp_path):
        refused(2, words, "compile", spec, "-o", tmp_path / "build")


@pytest.mark.parametrize("case", TASKS)
def test_a_mistake_in_the_tasks_is_told_with_its_line(refused, write_spec, unchanged, tmp_path, case):
    tasks, words = TASKS[case]
    spec = write_spec(tasks=tasks)
    with unchanged(tmp_path):
        refused(2, ("spec.yaml:3:", *words), "compile", spec, "-o", tmp_path / "build")


@pytest.mark.parametrize("case", IN_THE_BASE)
def test_a_surgery_that_does_not_fit_the_base_is_told_what_there_is(refused, write_spec, case):
    surgery, words = IN_THE_BASE[case]
    refused(2, words, "plan", write_spec(surgery))


def test_a_surgery_that_does_not_fit_writes_nothing(refused, write_spec, unchanged, tmp_path):
    spec = write_spec("[lora: {where: ffn.gate}]")
    with unchanged(tmp_path):
        refused(2, ("ffn.gate",), "compile", spec, "-o", tmp_path / "build")


def test_a_base_without_biases_is_told_what_to_do_instead(refused, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "base: {head: causal-lm, config: {model_type: llama, hidden_size: 32, num_hidden_layers: 1, vocab_size: 50, "
        "num_attention_heads: 4, intermediate_size: 64}}\nsurgery: [bitfit]\n".replace("[bitfit]", "[bitfit: {}]")
    )
    refused(2, ("no selected site has a bias", "lora"), "plan", spec)


def test_an_unsupported_order_is_told_and_not_sorted(refused, write_spec):
    # A prefix of one stack sizes that stack's masks once: a second one would not see the first.
    refused(2, ("spec.yaml:2:",), "plan", write_spec("[prefix: {length: 2}, prefix: {length: 3}]"))


def test_every_mistake_is_told_in_one_run(refused, write_spec):
    spec = write_spec("[lorra: {}, lora: {rank: 0}]", tasks="{mood: {labels: 0}}", seed="-1")
    refused(2, ("spec.yaml:2:", "lorra", "lora.rank", "spec.yaml:3:", "spec.yaml:4:", "seed"), "plan", spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("empty",)),
        ("surgery: [lora", ("spec.yaml:", "not YAML")),
        ("- lora\n", ("a spec is a mapping",)),
        ("bases: {}\n", ("no option 'bases'", "did you mean 'base'?")),
        ("base: {model: !!python/object:os.system x}\n", ("tags are not read",)),
        ("surgery: []\n", ("base",)),
    ],
)
def test_a_text_that_is_no_spec_is_told_why(refused, tmp_path, text, words):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    refused(2, words, "plan", path)


def test_a_spec_that_is_not_there_or_no_text_is_told(refused, tmp_path):
    refused(2, ("there is no such spec", "surgeon init"), "plan", tmp_path / "spec.yaml")
    refused(2, ("cannot be read",), "plan", tmp_path)
    (tmp_path / "spec.yaml").write_bytes(b"base: \xff\xfe")
    refused(2, ("not UTF-8",), "plan", tmp_path / "spec.yaml")
