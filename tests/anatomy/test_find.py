"""What anatomy finds by structure is what the parameters' names say; names are known to this test alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from surgeon.anatomy import Anatomy
from surgeon.anatomy.report import spans
from surgeon.inputs import sample_inputs, text_inputs

SIDES = ("query", "key", "value", "output")


def attention(*leaves: str, cross: bool = False) -> dict[str, str]:
    return {f"{'cross_' if cross else ''}attention.{side}": leaf for side, leaf in zip(SIDES, leaves, strict=True)}


def ffn(up: str, down: str, gate: str | None = None) -> dict[str, str]:
    return {"ffn.up": up, "ffn.down": down} | ({"ffn.gate": gate} if gate else {})


BERT = attention(*(f"attention.self.{s}" for s in SIDES[:3]), "attention.output.dense")
BERT |= ffn("intermediate.dense", "output.dense")
LLAMA = attention(*(f"self_attn.{s}_proj" for s in "qkvo")) | ffn("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
PHI3 = attention(*["self_attn.qkv_proj"] * 3, "self_attn.o_proj")
PHI3 |= ffn("mlp.gate_up_proj", "mlp.down_proj", "mlp.gate_up_proj")
T5_ENCODER = attention(*(f"layer.0.SelfAttention.{s}" for s in "qkvo"))
T5_DECODER = T5_ENCODER | attention(*(f"layer.1.EncDecAttention.{s}" for s in "qkvo"), cross=True)
BART = attention(*(f"self_attn.{s}_proj" for s in ("q", "k", "v", "out"))) | ffn("fc1", "fc2")
BART_CROSS = attention(*(f"encoder_attn.{s}_proj" for s in ("q", "k", "v", "out")), cross=True)
NEOX = attention(*["attention.query_key_value"] * 3, "attention.dense")
NEOX |= ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
ALBERT = attention(*(f"attention.{s}" for s in SIDES[:3]), "attention.dense") | ffn("ffn", "ffn_output")
DEBERTA = {role: leaf + ("_proj" if "self" in leaf else "") for role, leaf in BERT.items()}
EXPERTS = {"moe.gate": "mlp.experts", "moe.up": "mlp.experts", "moe.down": "mlp.experts", "moe.router": "mlp.gate"}

# kind, head, stack -> (layers, module path of layer {}, role -> leaf)
CASES: dict[tuple[str, str], dict[str, tuple[int, str, dict[str, str]]]] = {
    ("bert", "classes"): {"encoder": (2, "bert.encoder.layer.{}", BERT)},
    ("bert", "masked"): {"encoder": (2, "bert.encoder.layer.{}", BERT)},
    ("bert", "tokens"): {"encoder": (2, "bert.encoder.layer.{}", BERT)},
    ("bert", "none"): {"encoder": (2, "encoder.layer.{}", BERT)},
    ("roberta", "classes"): {"encoder": (2, "roberta.encoder.layer.{}", BERT)},
    ("xlm-roberta", "classes"): {"encoder": (2, "roberta.encoder.layer.{}", BERT)},
    ("electra", "classes"): {"encoder": (2, "electra.encoder.layer.{}", BERT)},
    ("distilbert", "classes"): {
        "encoder": (
            2,
            "distilbert.transformer.layer.{}",
            attention(*(f"attention.{s}_lin" for s in ("q", "k", "v", "out"))) | ffn("ffn.lin1", "ffn.lin2"),
        )
    },
    ("albert", "classes"): {"encoder": (2, "albert.encoder.albert_layer_groups.0.albert_layers.0", ALBERT)},
    ("deberta-v2", "classes"): {"encoder": (2, "deberta.encoder.layer.{}", DEBERTA)},
    ("mpnet", "classes"): {
        "encoder": (
            2,
            "mpnet.encoder.layer.{}",
            attention(*(f"attention.attn.{s}" for s in "qkvo")) | ffn("intermediate.dense", "output.dense"),
        )
    },
    ("modernbert", "classes"): {
        "encoder": (
            2,
            "model.layers.{}",
            attention(*["attn.Wqkv"] * 3, "attn.Wo") | ffn("mlp.Wi", "mlp.Wo", "mlp.Wi"),
        )
    },
    ("gpt2", "causal"): {
        "decoder": (
            2,
            "transformer.h.{}",
            attention(*["attn.c_attn"] * 3, "attn.c_proj") | ffn("mlp.c_fc", "mlp.c_proj"),
        )
    },
    ("gptj", "causal"): {
        "decoder": (
            2,
            "transformer.h.{}",
            attention(*(f"attn.{s}_proj" for s in ("q", "k", "v", "out"))) | ffn("mlp.fc_in", "mlp.fc_out"),
        )
    },
    ("gpt_neox", "causal"): {"decoder": (2, "gpt_neox.layers.{}", NEOX)},
    ("falcon", "causal"): {
        "decoder": (
            2,
            "transformer.h.{}",
            {r: leaf.replace("attention.", "self_attention.") for r, leaf in NEOX.items()},
        )
    },
    ("opt", "causal"): {"decoder": (2, "model.decoder.layers.{}", BART)},
    ("llama", "causal"): {"decoder": (2, "model.layers.{}", LLAMA)},
    ("llama", "classes"): {"decoder": (2, "model.layers.{}", LLAMA)},
    ("qwen3", "causal"): {"decoder": (2, "model.layers.{}", LLAMA)},
    ("gemma2", "causal"): {"decoder": (2, "model.layers.{}", LLAMA)},
    ("phi3", "causal"): {"decoder": (2, "model.layers.{}", PHI3)},
    ("mixtral", "causal"): {
        "decoder": (2, "model.layers.{}", {r: leaf for r, leaf in LLAMA.items() if "ffn" not in r} | EXPERTS)
    },
    ("t5", "seq2seq"): {
        "encoder": (2, "encoder.block.{}", T5_ENCODER | ffn("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")),
        "decoder": (1, "decoder.block.{}", T5_DECODER | ffn("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo")),
    },
    ("bart", "seq2seq"): {
        "encoder": (2, "model.encoder.layers.{}", BART),
        "decoder": (1, "model.decoder.layers.{}", BART | BART_CROSS),
    },
}
TWINS = {("bert", "tokens"), ("xlm-roberta", "classes")}
"""Of the sweep: graphs that differ from BERT's and RoBERTa's in the head's shape, and in nothing."""
MODELS = pytest.mark.parametrize(
    ("kind", "head"),
    [pytest.param(*case, id="-".join(case), marks=[pytest.mark.sweep] * (case in TWINS)) for case in CASES],
)


@MODELS
def test_every_role_of_every_layer_is_the_parameter_of_that_name(kind: str, head: str, read: Any) -> None:
    anatomy = read(kind, head).anatomy
    stacks = CASES[kind, head]
    assert anatomy.layers == {stack: layers for stack, (layers, _, _) in stacks.items()}
    wanted = {
        (stack, layer, role, f"{prefix.format(layer)}.{leaf}")
        for stack, (layers, prefix, roles) in stacks.items()
        for layer in range(layers)
        for role, leaf in roles.items()
    }
    found = [(p.stack, p.layer, p.role, p.path) for p in anatomy.projections if p.layer is not None]
    assert {f for f in found if not f[2].endswith(".position")} == wanted
    assert len(found) == len(set(found))
    assert anatomy.notes == ()


@MODELS
def test_widths_and_names_are_those_of_the_parameters(kind: str, head: str, read: Any) -> None:
    reading = read(kind, head)
    parameters = dict(reading.model.named_parameters())
    for p in reading.anatomy.projections:
        sizes = tuple(parameters[p.weight].shape[-2:])
        in_features, out_features = sizes if p.in_first else sizes[::-1]
        assert p.in_features == in_features
        assert p.out_features == (out_features if p.features is None else len(p.features))
        assert p.weight.startswith(p.path)
        assert p.bias is None or parameters[p.bias].shape == (out_features,)
        assert p.input.meta["val"].ndim == p.output.meta["val"].ndim
    for e in reading.anatomy.embeddings:
        assert tuple(parameters[e.weight].shape) == (e.rows, e.width)


@MODELS
def test_slices_of_one_op_share_nothing_and_leave_nothing_out(kind: str, head: str, read: Any) -> None:
    sliced: dict[fx.Node, list[int]] = {}
    anatomy = read(kind, head).anatomy
    for p in anatomy.projections:
        if p.features is not None:
            sliced.setdefault(p.node, []).extend(p.features)
    for p in anatomy.projections:
        if p.node in sliced:
            assert sorted(sliced[p.node]) == list(range(p.output.meta["val"].shape[-1]))


@MODELS
def test_every_layer_joins_once_a_sublayer(kind: str, head: str, read: Any) -> None:
    anatomy = read(kind, head).anatomy
    config = read(kind, head).model.config
    for stack, (layers, _, roles) in CASES[kind, head].items():
        wanted = {"residual.attention", "residual.ffn"}
        wanted |= {"residual.cross_attention"} if "cross_attention.query" in roles else set()
        for layer in range(layers):
            joins = [j for j in anatomy.joins if (j.stack, j.layer) == (stack, layer)]
            assert sorted(j.role for j in joins) == sorted(wanted)
            last = {p.path for p in anatomy.projections if (p.stack, p.layer) == (stack, layer)}
            assert all(j.path in last and j.width == 32 for j in joins)
            cores = [a for a in anatomy.attentions if (a.stack, a.layer) == (stack, layer)]
            assert [a.cross for a in cores] == ([False, True] if "residual.cross_attention" in wanted else [False])
            kv_heads = 1 if kind == "falcon" else getattr(config, "num_key_value_heads", None) or 4
            assert {(a.heads, a.kv_heads, a.head_dim, a.value_dim) for a in cores} == {(4, kv_heads, 8, 8)}


class Values(fx.Interpreter):
    """Runs a trace without dropout and keeps a copy of every value, in-place writes notwithstanding."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        dropped = n.target is torch.ops.aten.dropout.default
        value = self.env[n.args[0]] if dropped else super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


@MODELS
def test_sites_compute_what_they_claim(kind: str, head: str, read: Any) -> None:
    reading = read(kind, head)
    runner = Values(reading.graph_module)
    with torch.no_grad():
        runner.run(*sample_inputs(text_inputs(reading.model), 131, torch.device("cpu")).values())
    at = runner.values
    for p in reading.anatomy.projections:
        if at[p.weight_node].ndim == 2:
            weight = at[p.weight_node] if p.in_first else at[p.weight_node].T
            torch.testing.assert_close(at[p.output], at[p.input] @ weight + (at[p.bias_node] if p.bias_node else 0))
    for e in reading.anatomy.embeddings:
        torch.testing.assert_close(at[e.node], at[e.weight_node][at[e.index]])
    adds: dict[fx.Node, int] = {}
    for j in reading.anatomy.joins:
        adds[j.skip] = adds.get(j.skip, 0) + 1
        assert j.branch in j.add.args
    for j in reading.anatomy.joins:
        if adds[j.skip] == 1:
            torch.testing.assert_close(at[j.add], at[j.skip] + at[j.branch])
    for a in reading.anatomy.attentions:
        assert at[a.query].shape[-1] == at[a.key].shape[-1] == a.head_dim
        assert at[a.key].shape[-2] == at[a.value].shape[-2]


def slices(anatomy: Anatomy) -> dict[str, str]:
    return {p.role: spans(p.features) for p in anatomy.projections if p.features is not None and p.layer == 0}


@pytest.mark.parametrize(
    ("kind", "head", "wanted"),
    [
        ("gpt2", "causal", {"query": "0:32", "key": "32:64", "value": "64:96"}),
        ("modernbert", "classes", {"query": "0:32", "key": "32:64", "value": "64:96", "gate": "0:48", "up": "48:96"}),
        ("phi3", "causal", {"query": "0:32", "key": "32:48", "value": "48:64", "gate": "0:48", "up": "48:96"}),
        ("falcon", "causal", {"query": "0:32", "key": "32:40", "value": "40:48"}),
        ("mixtral", "causal", {"gate": "0:48", "up": "48:96"}),
        (
            "gpt_neox",
            "causal",
            {"query": "0:8, 24:32, … (4 runs)", "key": "8:16, 32:40, … (4 runs)", "value": "16:24, 40:48, … (4 runs)"},
        ),
    ],
)
def test_fused_layouts_are_told_apart(kind: str, head: str, wanted: dict[str, str], read: Any) -> None:
    assert {role.split(".")[1]: text for role, text in slices(read(kind, head).anatomy).items()} == wanted
