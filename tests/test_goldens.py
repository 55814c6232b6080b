"""The canonical text of what every technique inserts into every shape of block, as files that people review."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx

from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.compiler import passes
from surgeon.graph_text import graph_text
from surgeon.inputs import text_inputs
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import read_spec
from surgeon.trace import trace

GOLDENS = Path(__file__).parent / "goldens"
ANATOMIES = {
    "post_norm": "bert",
    "pre_norm": "llama",
    "parallel_block": "gpt_neox",
    "fused_qkv": "gpt2",
    "shared_layers": "albert",
    "enc_dec": "t5",
}
# Of one layer, so that a file shows one site of each kind and fits on a screen.
TECHNIQUES = {
    "lora": {"lora": {"rank": 4, "dropout": 0.1, "where": ["attention.query@0", "attention.value@0"]}},
    "lora_dora": {"lora": {"rank": 4, "dora": True, "where": ["attention.query@0", "attention.output@0"]}},
    "lora_table": {"lora": {"rank": 4, "bias": True, "where": ["attention.query@0", "embedding.token"]}},
    "adalora": {"adalora": {"rank": 4, "target_rank": 2, "where": ["attention.query@0", "attention.output@0"]}},
    "vera": {"vera": {"rank": 4, "where": ["attention.query@0", "ffn.up@0"]}},
    "adapter": {"adapter": {"bottleneck": 6, "norms": False, "where": ["residual.attention@0", "residual.ffn@0"]}},
    "adapter_pfeiffer": {"adapter": {"bottleneck": 6, "placement": "pfeiffer", "where": "residual.ffn@0"}},
    "adapter_parallel": {"adapter": {"bottleneck": 6, "placement": "parallel", "where": "residual.ffn@0"}},
    "fusion": {"fusion": {"of": 3, "bottleneck": 6, "where": "residual.ffn@0"}},
    "bitfit": {"bitfit": {"where": ["attention.query@0", "ffn.up@0"]}},
    "prefix": {"prefix": {"length": 5, "where": "attention@0"}},
    "p_tuning_v2": {"p_tuning_v2": {"length": 5, "where": "attention@0"}},
    "head": {"head": {"labels": 5}},
    "qlora": {"qlora": {"rank": 4, "quantise": "attention.query", "where": "attention.query@0"}},
    # Last: it tells the trace that all share that ids and mask are of one size, which renames symbols of later texts.
    "p_tuning": {"p_tuning": {"template": "[P]*3 {text} [P]*2"}},
}
BIASLESS = {"pre_norm", "enc_dec"}
CASES = [
    (technique, anatomy)
    for technique in TECHNIQUES
    for anatomy in ANATOMIES
    if not (technique == "bitfit" and anatomy in BIASLESS)
]


@pytest.fixture(scope="module")
def programs(tiny):
    """A fresh program of an anatomy; its base is traced once."""
    traces = {}

    def fresh(anatomy: str) -> Program:
        if anatomy not in traces:
            model = tiny(ANATOMIES[anatomy])
            traces[anatomy] = open_base(model), trace(model)
        opened, traced = traces[anatomy]
        graph = fx.Graph()
        graph.output(graph.graph_copy(traced.graph, {}))
        graph._codegen = traced.graph._codegen
        graph_module = fx.GraphModule(traced, graph)
        frozen = frozenset(n for n, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()])
        inputs = text_inputs(opened.model)
        return Program(
            graph_module=graph_module,
            anatomy=find(graph_module),
            inputs=inputs,
            config=opened.model.config,
            head=opened.head,
            frozen=frozen,
        )

    return fresh


@pytest.mark.parametrize(("technique", "anatomy"), CASES, ids=["-".join(case) for case in CASES])
def test_what_is_inserted_is_the_golden_text(technique, anatomy, programs, request):
    program = run_passes(programs(anatomy), list(passes(read_spec({"surgery": [TECHNIQUES[technique]]}))))
    text = graph_text(program, only_new=True)
    path = GOLDENS / f"{technique}-{anatomy}.txt"
    if request.config.getoption("--update-goldens"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "if this is meant: `make goldens`, and review the diff"


def test_no_golden_is_left_of_a_case_that_is_no_more():
    assert {path.stem for path in GOLDENS.glob("*.txt")} == {"-".join(case) for case in CASES}
