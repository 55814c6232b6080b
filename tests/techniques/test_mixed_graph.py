"""Rows of several tasks in one batch, and several tasks a text, answer as each task alone: any technique, any base."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from surgeon.dataflow import ancestors
from surgeon.errors import CompositionError
from surgeon.mixed import mixed
from surgeon.runtime.bank import Bank

QVF = ["attention.query", "attention.value", "ffn.up"]
SURGERIES = {
    "lora": [{"lora": {"rank": 3, "where": QVF}}],
    "dora": [{"lora": {"rank": 3, "dora": True, "bias": False}}],
    "lora of a table": [{"lora": {"rank": 2, "where": ["embedding.token", "attention.query"]}}],
    "adalora": [{"adalora": {"rank": 4, "target_rank": 2}}],
    "vera": [{"vera": {"rank": 8}}],
    "ia3": [{"ia3": {}}],
    "bitfit": [{"bitfit": {}}],
    "norm_tuning": [{"norm_tuning": {}}],
    "houlsby": [{"adapter": {"bottleneck": 4}}],
    "pfeiffer": [{"adapter": {"bottleneck": 4, "placement": "pfeiffer"}}],
    "parallel": [{"adapter": {"bottleneck": 4, "placement": "parallel"}}],
    "compacter": [{"compacter": {"bottleneck": 8}}],
    "fusion": [{"fusion": {"bottleneck": 4}}],
    "full": [{"full": {}}],
    "head": [{"head": {}}],
    "prefix": [{"prefix": {"length": 3}}],
    "p_tuning_v2": [{"p_tuning_v2": {"length": 3}}, {"lora": {"rank": 3}}],
    "prompt": [{"prompt": {"length": 3}}],
    "prompt after": [{"prompt": {"length": 3, "place": "after"}}, {"ia3": {}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*3 {text} [P]*2"}}],
    "drop": [{"adapter": {"bottleneck": 4}}, {"drop": {"layers": 1}}],
    "many": [{"lora": {"rank": 3}}, {"adapter": {"bottleneck": 4}}, {"ia3": {}}, {"head": {}}],
}
OTHER = {"rank": 6, "bottleneck": 12, "adapters": 3, "columns": 8, "length": 7, "labels": 4}
NO_BIAS = {("llama", "bitfit"), ("t5", "bitfit")}
MATRIX = [
    pytest.param(kind, name, marks=() if kind == "bert" or name == "many" else pytest.mark.sweep)
    for kind in ("bert", "llama", "gpt2", "t5")
    for name in SURGERIES
    if (kind, name) not in NO_BIAS
]


class Alone:
    """A task as the bank takes it, without a file."""

    def __init__(self, model):
        self.info = type("Info", (), {"name": "task", "sizes": {}})
        self._tensors = {n: t.detach().numpy() for n, t in model.ledger.shrink(model.deployed()).items()}

    def tensors(self):
        return self._tensors


def banks(program, models):
    """Arrays as the runtime fills them, entry 0 the base."""
    from types import SimpleNamespace

    deltas = [
        SimpleNamespace(
            name=d.name,
            free=d.free,
            axes=[d.free.get(a, s) for a, s in enumerate(d.shape)],
            dtype=str(d.dtype).removeprefix("torch."),
            padding=d.padding,
        )
        for d in program.ledger.deltas.values()
    ]
    base = {name: t.detach().numpy() for name, t in program.ledger.defaults().items()}
    bank = Bank(SimpleNamespace(deltas=deltas, counted=program.counted), base, len(models))
    tasks = [Alone(model) for model in models]
    for task in tasks:
        task.info.sizes = bank._sizes_of(task.tensors())
    with bank.holding(tasks) as held:
        return {n: torch.from_numpy(a) for n, a in held.arrays.items()}, [held.places[t] for t in tasks]


def two_sizes(lab, kind, surgery):
    """A compiled program, and two moved tasks of it, of other sizes where sizes are free."""
    compiled = lab.operate(lab.base(kind), *surgery, tasks={"a": {}, "b": {}})
    one, two = (lab.move(compiled.model(task), seed=i).eval() for i, task in enumerate("ab"))
    sizes = {s.rpartition(".")[2] for d in compiled.program.ledger.deltas.values() for s in d.free.values()}
    if sizes and not {"adapters", "ensemble"} & sizes:
        lab.resize(two, **OTHER)
        with torch.no_grad():
            for parameter in lab.own(two).values():
                parameter.mul_(0.3)
    return compiled, [one, two]


@pytest.mark.parametrize(("kind", "name"), MATRIX)
def test_a_row_answers_as_its_task_alone(kind, name, lab):
    compiled, models = two_sizes(lab, kind, SURGERIES[name])
    arrays, (a, b) = banks(compiled.program, models)
    graph = mixed(compiled.program).graph_module
    base = lab.base(kind)
    fed = lab.feed(base, 3, 9, pad=2)
    fed = {i.name: fed.get(i.name, torch.full((3, 9), i.fill or 0)) for i in compiled.program.inputs}
    answers = {a: models[0], b: models[1], 0: base}
    for rows, ids in (([0, 1, 2], [b, 0, a]), ([0, 0, 0, 1, 2, 2], [a, b, 0, b, 0, a]), ([2], [b])):
        with torch.no_grad():
            ends = {"rows": torch.tensor(rows), "task_ids": torch.tensor(ids)}
            found = functional_call(graph, arrays, (), {**fed, **ends})["logits"]
            for i, (row, task) in enumerate(zip(rows, ids, strict=True)):
                wanted = answers[task](**{n: t[row : row + 1] for n, t in fed.items()}).logits[0]
                assert lab.gap(found[i][..., : wanted.shape[-1]], wanted) <= 4e-6


def gathers(program):
    """The mixed graph, and where it gathers by `rows`."""
    graph = mixed(program).graph_module.graph
    selections = graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    return graph, [n for n in selections if str(n.args[2]) == "rows"]


def test_layers_below_the_lowest_delta_run_once_a_text(lab):
    """Four values cross at layer 1: its input, q and v before the product is added, and k; and the mask."""
    above = lab.operate(lab.base("bert"), {"lora": {"rank": 2, "where": ["attention.query@1", "attention.value@1"]}})
    graph, crossing = gathers(above.program)
    assert 4 <= len(crossing) <= 5
    assert all(node.args[0].op != "placeholder" for node in crossing)
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert sum(ancestors(n).isdisjoint(crossing) for n in linears) == 6 + 3  # all of layer 0, and q, k, v of layer 1


def test_layers_whose_adapters_are_dropped_for_good_run_once_a_text(lab):
    """With an adapter behind the last layer's feed-forward alone, all linears of both layers lie below it."""
    adapter = {"adapter": {"placement": "pfeiffer", "bottleneck": 5, "norms": False}}
    graph, crossing = gathers(lab.operate(lab.base("bert"), adapter, {"drop": {"layers": 1}}).program)
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert sum(ancestors(n).isdisjoint(crossing) for n in linears) == 2 * 6


def test_where_next_to_nothing_is_shared_the_inputs_are_gathered(lab):
    """A twentieth of the matrices lies before the first product of a LoRA, where the feed-forward is wide."""
    wide = lab.operate(lab.base("bert", intermediate_size=512), {"lora": {"rank": 2}})
    _, crossing = gathers(wide.program)
    assert {node.args[0].name for node in crossing} == {i.name for i in wide.program.inputs}


def test_what_several_rows_answer_together_is_refused(lab):
    compiled = lab.operate(lab.base("bert"), {"prompt": {"length": 3, "ensemble": 2}})
    with pytest.raises(CompositionError, match="rows of several tasks"):
        mixed(compiled.program)
