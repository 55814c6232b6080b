"""One ONNX graph a base, every technique in it: ONNX Runtime answers as PyTorch, at any size, for any task."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import surgeon
from surgeon.exporters.hiding import added
from surgeon.runtime.taskfile import write_adapter

COMPOSED = {
    "bert": [
        {"lora": {"rank": 3, "dropout": 0.1}},
        {"adapter": {"bottleneck": 5}},
        {"bitfit": {"where": ["attention", "ffn"]}},
        {"prefix": {"length": 4}},
        {"head": {}},
    ],
    "llama": [
        {"lora": {"rank": 3, "where": ["attention", "ffn"]}},
        {"adapter": {"bottleneck": 5, "placement": "pfeiffer"}},
        {"prefix": {"length": 4}},
    ],
    "gpt2": [
        {"lora": {"rank": 3}},
        {"bitfit": {}},
        {"adapter": {"bottleneck": 5, "placement": "parallel"}},
        {"prefix": {"length": 4}},
    ],
    "t5": [{"lora": {"rank": 3}}, {"adapter": {"bottleneck": 5}}, {"prefix": {"length": 4}}],
}
DORA = {"lora": {"rank": 3, "dora": True, "where": ["attention.query", "attention.value", "ffn.down"]}}
TABLE = {"lora": {"rank": 2, "bias": True, "where": ["embedding.token", "attention.output"]}}
VERA = {"vera": {"rank": 24, "where": ["attention.query", "ffn.up"]}}
ADALORA = {"adalora": {"rank": 4, "target_rank": 2}}
VARIANTS = {  # of LoRA: composed again, for the kinds that differ
    "bert-dora": ("bert", [DORA, TABLE, {"bitfit": {}}, {"head": {}}]),
    "llama-dora": ("llama", [DORA, TABLE]),
    "gpt2-dora": ("gpt2", [DORA, TABLE, {"bitfit": {}}]),
    "t5-dora": ("t5", [DORA, TABLE]),
    "bert-adalora": ("bert", [ADALORA, VERA, {"lora": {"rank": 3}}, {"bitfit": {}}, {"head": {}}]),
    "llama-adalora": ("llama", [ADALORA, VERA, {"lora": {"rank": 3}}]),
    "gpt2-adalora": ("gpt2", [ADALORA, VERA, {"bitfit": {}}]),
    "t5-adalora": ("t5", [ADALORA, VERA, {"lora": {"rank": 3}}]),
}
DEFAULT = ("bert-dora", "llama-dora", "bert-adalora", "gpt2-adalora")
"""Of the variants; the others are of the sweep."""
SIZES = [(3, 11, 4), (1, 5, 0), (2, 20, 3), (4, 2, 0)]  # batch, length, padding; traced was 2 by 7


class Build:
    """A base with a composed surgery on it, its build open in ONNX Runtime, and tasks in any size."""

    def __init__(self, lab, kind, surgery, folder):
        self.lab, self.kind = lab, kind
        self.base = lab.base(kind)
        labels = {"labels": 4} if {"head": {}} in surgery else {}
        self.compiled = lab.operate(self.base, *surgery, tasks={"a": labels, "b": labels})
        self.folder = self.compiled.save(folder / "build")
        self.session = surgeon.Session(self.folder, threads=1)

    def feed(self, *sizes, **options):
        batch, length, pad = sizes
        return self.lab.feed(self.base, batch, length, pad=pad, **options)

    def sized(self, name, seed=0, **sizes):
        """A task whose free dimensions are these where their symbol ends so; returns the model that has it."""
        self.compiled._models.pop("a", None)
        model = self.compiled.model("a").eval()
        noise = torch.Generator().manual_seed(seed)
        ledger = self.compiled.program.ledger
        tensors = {}
        for key, tensor in model.state_dict().items():
            shape = list(tensor.shape)
            for axis, symbol in ledger.free(key).items():
                shape[axis] = next((n for end, n in sizes.items() if end in symbol.split(".")), shape[axis])
            start = tensor if tensor.shape == tuple(shape) else torch.zeros(shape)
            tensors[key] = start + 0.2 * torch.randn(shape, generator=noise)
        model.load_state_dict(tensors)
        self.add(name, model)
        return model

    def add(self, name, model):
        """Deploy the model's tensors as a task of this name."""
        path = self.folder.parent / f"{name}.onnx_adapter"
        arrays = {n: t.detach().contiguous().numpy() for n, t in model.deployed().items()}
        write_adapter(path, arrays, self.compiled.base.fingerprint)
        self.session.add_task(path, name, replace=True)

    def run(self, fed, task=None):
        return self.session.run({n: t.numpy() for n, t in fed.items()}, task)["logits"]

    def gap(self, fed, task, model):
        with torch.no_grad():
            wanted = model(**fed).logits.numpy()
        found = self.run(fed, task)
        assert found.shape == wanted.shape
        return float(np.abs(found - wanted).max())


@pytest.fixture(scope="module")
def composed_bert(lab, tmp_path_factory):
    return Build(lab, "bert", COMPOSED["bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=COMPOSED)
def build(request, lab, tmp_path_factory, composed_bert):
    if request.param == "bert":
        return composed_bert
    return Build(lab, request.param, COMPOSED[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(
    scope="module",
    params=[pytest.param(v, marks=[] if v in DEFAULT else [pytest.mark.sweep]) for v in VARIANTS],
)
def variant(request, lab, tmp_path_factory):
    return Build(lab, *VARIANTS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(lab, tmp_path_factory):
    return Build(lab, "bert", [], tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def lora(lab, tmp_path_factory):
    surgery = [{"lora": {"rank": 4, "where": ["attention", "ffn"]}}]
    return Build(lab, "bert", surgery, tmp_path_factory.mktemp("lora"))


def test_onnx_equals_torch_on_shapes_that_were_not_traced(build):
    model = build.sized("moved")
    assert max(build.gap(build.feed(*sizes), "moved", model) for sizes in SIZES) <= 1e-4


def test_without_a_task_the_answer_is_the_bases(build):
    for sizes in SIZES:
        fed = build.feed(*sizes)
        with torch.no_grad():
            assert build.lab.gap(torch.from_numpy(build.run(fed)), build.base(**fed).logits) <= 1e-6


def test_variants_answer_as_torch_at_any_rank_and_swap_back_and_forth(variant):
    fed = variant.feed(2, 9, 2)
    models = {task: variant.sized(task, seed=rank, rank=rank) for task, rank in (("one", 1), ("none", 0), ("five", 5))}
    first = {task: variant.run(fed, task) for task in (*models, None)}
    for task, model in models.items():
        assert max(variant.gap(variant.feed(*sizes), task, model) for sizes in SIZES) <= 1e-4
    assert np.abs(first["one"] - first["five"]).max() > 1e-3
    for task in ("five", None, "none", "one", "five", None):
        assert np.array_equal(variant.run(fed, task), first[task])
    with torch.no_grad():
        assert variant.lab.gap(torch.from_numpy(first[None]), variant.base(**fed).logits) <= 1e-6


def test_without_a_task_no_bit_differs_from_the_base_alone(plain, lora, composed_bert):
    """With ONNX Runtime's rewriting off: its fusions see another graph and may round in another order (1e-7)."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    graphs = [ort.InferenceSession(b.folder / "model.onnx", options) for b in (plain, lora, composed_bert)]
    for sizes in SIZES:
        fed = plain.feed(*sizes)
        fed = {**{n: t.numpy() for n, t in fed.items()}, "token_type_ids": np.zeros_like(fed["input_ids"])}
        base, with_lora, with_all = (graph.run(["logits"], fed)[0] for graph in graphs)
        assert np.array_equal(with_lora, base)
        assert np.abs(with_all - base).max() <= 1e-7  # its head is a MatMul where the base has a Gemm: one last bit


def test_a_padded_row_answers_as_the_row_alone(build):
    build.sized("moved")
    fed = build.feed(3, 11, 4)
    row = fed["attention_mask"][0].bool()
    alone = {n: t[:1] if n == "decoder_input_ids" else t[:1, row] for n, t in fed.items()}
    padded, single = build.run(fed, "moved")[:1], build.run(alone, "moved")
    assert np.abs(padded[:, : single.shape[1]] - single).max() <= 1e-5


def test_a_row_of_nothing_but_padding_is_finite_and_touches_no_other(build):
    """No probability of an attention is looked at for NaN, which takes a tenth of a long text's time."""
    graph = onnx.load(build.folder / "model.onnx", load_external_data=False).graph
    assert not [node.name for node in graph.node if node.op_type == "IsNaN"]
    build.sized("moved")
    fed = build.feed(3, 11, 0)
    whole = build.run(fed, "moved")
    fed["attention_mask"][1] = 0
    emptied = build.run(fed, "moved")
    assert np.isfinite(emptied).all()
    assert np.abs(emptied - whole)[[0, 2]].max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_hidden_weighs_nothing_and_a_row_of_it_is_finite(dtype):
    scores = torch.tensor([[-900.0, -700.0]], dtype=dtype)
    for seen, wanted in (([True, False], [1.0, 0.0]), ([False, False], None)):
        weights = torch.softmax(scores + added(torch.tensor([seen]), dtype), -1)
        assert weights.isfinite().all()
        assert wanted is None or weights.tolist() == [wanted]


def test_tasks_swapped_back_and_forth_change_no_bit(build):
    build.sized("one", seed=1)
    build.sized("two", seed=2)
    fed = build.feed(2, 9, 2)
    first = {task: build.run(fed, task) for task in ("one", "two", None)}
    assert not np.array_equal(first["one"], first["two"])
    for task in ("two", None, "one", "one", None, "two"):
        assert np.array_equal(build.run(fed, task), first[task])


@pytest.mark.parametrize("rank", [0, 1, 4, 16])
def test_every_rank_runs_on_one_graph(rank, lora):
    model = lora.sized(f"rank{rank}", rank=rank)
    fed = lora.feed(3, 11, 4)
    assert lora.gap(fed, f"rank{rank}", model) <= 1e-4
    if rank == 0:
        assert np.array_equal(lora.run(fed, "rank0"), lora.run(fed))


@pytest.mark.parametrize("length", [0, 1, 30])
def test_every_prefix_length_runs_on_one_graph(length, build):
    model = build.sized(f"prefix{length}", length=length)
    for shape in ((3, 11, 4), (1, 5, 0)):
        assert build.gap(build.feed(*shape), f"prefix{length}", model) <= 1e-4


def test_sites_of_one_task_may_have_different_ranks_and_none(lora):
    """One symbol a site: ONNX Runtime would reuse buffers between sites of one symbol and fail."""
    model = lora.sized("mixed")
    ranks = [0, 1, 4, 16, 2, 0, 7]
    deltas = lora.compiled.program.ledger.deltas
    symbols = list(dict.fromkeys(s for d in deltas.values() for s in d.free.values()))
    rank_of = {symbol: ranks[i % len(ranks)] for i, symbol in enumerate(symbols)}
    noise = torch.Generator().manual_seed(0)
    model.load_state_dict({n: 0.2 * torch.randn(deltas[n].sized(rank_of), generator=noise) for n in model.state_dict()})
    lora.add("mixed", model)
    for sizes in SIZES:
        assert lora.gap(lora.feed(*sizes), "mixed", model) <= 1e-4
    uniform = lora.sized("uniform", rank=3)
    fed = lora.feed(2, 8, 1)
    before = lora.run(fed, "mixed")
    assert lora.gap(fed, "uniform", uniform) <= 1e-4
    assert np.array_equal(lora.run(fed, "mixed"), before)


def test_the_tasks_of_a_fresh_build_are_the_base_where_the_technique_says_so(lora):
    fed = lora.feed(3, 9, 2)
    assert set(lora.compiled.tasks) <= set(lora.session.tasks)
    for task in lora.compiled.tasks:
        assert np.array_equal(lora.run(fed, task), lora.run(fed))
