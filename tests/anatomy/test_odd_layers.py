"""Layers that are laid out in unusual ways."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import fx

from surgeon.anatomy import Anatomy, find
from surgeon.inputs import sample_inputs, text_inputs
from surgeon.trace import trace
from sweep.cases import Case, base

SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}


def traced(kind: str, auto: Any, experts: str | None = None, **changes: Any) -> tuple[fx.GraphModule, Anatomy, Any]:
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    if experts:
        config._experts_implementation = experts
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
    graph_module = trace(model)
    return graph_module, find(graph_module), model


class Values(fx.Interpreter):
    """Keeps every value of a run."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def test_experts_on_the_left_of_their_product_are_rows_as_others() -> None:
    graph_module, anatomy, model = traced(
        "mixtral",
        transformers.AutoModelForCausalLM,
        "batched_mm",
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    assert anatomy.layers == {"decoder": 2}
    assert anatomy.notes == ()
    experts = [p for p in anatomy.projections if p.role in {"moe.gate", "moe.up", "moe.down"} and p.layer == 0]
    assert [(p.role, p.in_features, p.out_features) for p in experts] == [
        ("moe.gate", 32, 48),
        ("moe.up", 32, 48),
        ("moe.down", 48, 32),
    ]
    runner = Values(graph_module)
    with torch.no_grad():
        runner.run(*sample_inputs(text_inputs(model), 131, torch.device("cpu")).values())
    at = runner.values
    for p in experts:
        picked = next(i for i in p.node.all_input_nodes if p.weight_node in i.all_input_nodes)
        weights = at[picked] if p.in_first else at[picked].transpose(-1, -2)
        torch.testing.assert_close(at[p.output], torch.einsum("ni,nio->no", at[p.input], weights))


def test_a_stack_inside_a_bottleneck_belongs_to_its_layer() -> None:
    _, anatomy, _ = traced(
        "mobilebert",
        transformers.AutoModelForSequenceClassification,
        embedding_size=16,
        intra_bottleneck_size=24,
        num_feedforward_networks=3,
    )
    assert anatomy.layers == {"encoder": 2}
    for layer in range(2):
        joins = [j for j in anatomy.joins if j.layer == layer]
        assert sorted((j.role, j.width) for j in joins) == [("residual.attention", 32), *[("residual.ffn", 24)] * 3]
        assert {j.stack for j in joins} == {"encoder"}
        sides = {p.role: p.path for p in anatomy.projections if p.layer == layer and p.role.startswith("attention")}
        home = f"mobilebert.encoder.layer.{layer}.attention"
        assert sides["attention.query"] == f"{home}.self.query"
        assert sides["attention.output"].startswith((home, home.replace("attention", "output")))


def test_what_a_router_remembers_of_the_layer_before_is_no_sublayer() -> None:
    """Each adds what the router before made of the same stream: a sum of two ways, with nothing of its own."""
    sizes = {"moe_intermediate_size": 24, "router_hidden_size": 12, "num_experts": 4, "head_dim": 8}
    auto = transformers.AutoModelForCausalLM
    _, anatomy, _ = traced("zaya", auto, "batched_mm", num_hidden_layers=4, num_key_value_heads=2, **sizes)
    assert anatomy.layers == {"decoder": 4}
    wanted = [(f"residual.{kind}", layer, 32) for layer in range(4) for kind in ("attention", "ffn")]
    assert [(j.role, j.layer, j.width) for j in anatomy.joins] == wanted
    assert {p.role for p in anatomy.projections if ".gate." in p.path} == {"moe.router", "other"}


def test_what_is_added_for_one_mixer_to_read_stands_in_its_layer() -> None:
    """Attention's answer is no part of the stream: the state-space layer that reads it starts from the stream."""
    _, anatomy, _ = traced(
        "zamba2",
        transformers.AutoModelForCausalLM,
        layers_block_type=["linear_attention", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=4,
        attention_head_dim=16,
        num_key_value_heads=4,
        adapter_rank=4,
        num_mem_blocks=1,
    )
    assert anatomy.layers == {"decoder": 2}
    assert [(j.role, j.layer) for j in anatomy.joins] == [
        ("residual.mixer", 0),
        ("residual.attention", 1),
        ("residual.mixer", 1),
    ]


def test_a_decoder_that_attends_to_itself_and_to_the_encoder_in_one_is_a_decoder() -> None:
    """T5Gemma 2, whose masks are made by a vmap outside of a trace."""
    anatomy = find(trace(base(Case("t5gemma2", "sequence-classification"))))
    assert anatomy.layers == {"encoder": 2, "decoder": 2}
    assert {(a.stack, a.role) for a in anatomy.attentions} == {("encoder", "attention"), ("decoder", "attention")}
