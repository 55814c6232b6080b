"""What a model writes in an unusual form is brought into the usual one: found, rewritten, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.dataflow import ancestors
from surgeon.module import switchable
from surgeon.normalising import normalise
from surgeon.trace import trace
from sweep.chain import attempt, surgery

D, HEADS = 24, 3


def normal(module: nn.Module, *inputs: Tensor, dims: Any = None) -> fx.GraphModule:
    exported = torch.export.export(module.train(), inputs, dynamic_shapes=dims, strict=False)
    unlifted = exported.module(check_guards=False)
    graph_module = fx.GraphModule(unlifted, unlifted.graph)
    normalise(graph_module, module)
    return graph_module


def names(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes}


class Careless(nn.Module):
    """Writes over what it has, and reads it by another name too where `seen`."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x).flatten(1)
        z = y[:, 1:] if self.seen else x.flatten(1)[:, 1:]
        y.masked_fill_(y > 1, 0.0)
        y.add_(x.flatten(1)).clamp_(max=2.0)
        nn.functional.dropout(y, 0.5, training=True, inplace=True)
        return y.sum() + z.sum()


def test_what_is_written_over_is_a_value_of_its_own() -> None:
    x = torch.randn(3, 4, 5)
    graph = normal(Careless(seen=False), x)
    assert not any(name.split(".")[1].endswith("_") for name in names(graph) if name.startswith("aten."))
    y = torch.relu(x).flatten(1)
    wanted = (y.where(y <= 1, 0.0) + x.flatten(1)).clamp(max=2.0).sum() + x.flatten(1)[:, 1:].sum()
    assert torch.allclose(switchable(graph).eval()(x), wanted)


def test_what_another_name_reads_stays_written_over() -> None:
    x = torch.randn(3, 4, 5)
    graph = normal(Careless(seen=True), x)
    assert "aten.masked_fill_.Scalar" in names(graph)
    torch.manual_seed(1)
    found = graph(x)
    torch.manual_seed(1)
    assert torch.equal(found, Careless(seen=True)(x))


class Shifted(nn.Module):
    """Moves a text by one, as a decoder reads it, and writes what begins it in front; a batch of one stays a batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape)
        y[:, 1:] = x[:, :-1].clone()
        y[:, 0] = x.gather(1, (x.ne(0).sum(1) - 1).unsqueeze(-1)).squeeze()
        return y


def test_what_is_written_over_in_part_is_a_value_of_its_own() -> None:
    x = torch.tensor([[5, 6, 0], [7, 8, 9]])
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = normal(Shifted(), x, dims=(dims,))
    assert not any(name.split(".")[1].endswith("_") for name in names(graph) if name.startswith("aten."))
    (given,) = graph.graph.find_nodes(op="placeholder")
    assert given in ancestors(graph.graph.output_node())
    for text in (x, x[:1], torch.tensor([[4, 3, 2, 1]])):
        assert torch.equal(graph(text), Shifted()(text))


class Ending(nn.Module):
    """Packs the places of a text's ends, as many in each row, and takes each row's last."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        ends = ids.eq(2)
        return x[ends, :].view(x.size(0), -1, x.size(-1))[:, -1, :]


def test_the_last_place_that_a_mask_picks_is_each_rows_own() -> None:
    x, ids = torch.randn(2, 5, 3), torch.tensor([[4, 2, 5, 2, 0], [2, 4, 4, 4, 2]])
    graph = normal(Ending(), x, ids)
    assert torch.equal(graph(x, ids), Ending()(x, ids))
    odd = torch.tensor([[4, 2, 5, 2, 2], [4, 4, 4, 4, 4]])  # three ends, and none
    found = graph(x, odd)
    assert torch.equal(found[0], x[0, 4])
    assert found[1].isnan().all()


class Summed(nn.Module):
    """Attention and its projections as Einstein sums, of queries and keys in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Parameter(torch.randn(12, 12)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("b s d, d k -> b s k", x, self.query).view(2, -1, 3, 4)
        k, v = (torch.einsum("kd,bsd->bsk", w, x).view(2, -1, 3, 4) for w in (self.key, self.value))
        scores = torch.einsum("bjhd,bihd->bhij", k, q).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", scores, v).reshape(2, -1, 12)
        return mixed @ self.out + torch.einsum("bsd,bsd->bs", x, x)[..., None]


def test_einsums_that_are_matrix_products_are_spelled_as_such() -> None:
    module, x = Summed(), torch.randn(2, 5, 12)
    graph = normal(module, x)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)) == 1
    torch.testing.assert_close(graph(x), module(x))


class Recurrent(nn.Module):
    """A product of all pairs of tokens that is no attention's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bld,bsd->bls", x, x)


def test_without_a_softmax_sums_of_activations_stay_as_they_are() -> None:
    assert "aten.einsum.default" in names(normal(Recurrent(), torch.randn(2, 5, 12)))


class Idle(nn.Module):
    """Does work that nothing reads, and that drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        nn.functional.dropout(self.unread(x), 0.5, training=True)
        return nn.functional.dropout(x, 0.5, training=True)


def test_what_nothing_reads_is_no_part_of_the_trace_though_it_drops_out() -> None:
    graph = normal(Idle(), torch.randn(2, 5))
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.dropout.default"]


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).half().add_(x)


def test_what_is_rounded_by_being_written_over_stays_written_over() -> None:
    graph = normal(Rounded(), x := torch.randn(3, 4))
    assert "aten.add_.Tensor" in names(graph)
    assert torch.equal(graph(x), Rounded()(x))


class Columns(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ k.permute(0, 1, 3, 2), q @ k.transpose(1, 2).permute(0, 2, 3, 1)


def test_keys_laid_out_as_columns_are_rows_first() -> None:
    q, k = (torch.randn(2, HEADS, n, 8) for n in (4, 6))
    graph = normal(Columns(), q, k)
    rows = [n.args[0] for n in graph.graph.nodes if str(n.target) == "aten.transpose.int"]
    assert any(n.args[1:] == ([0, 2, 1, 3],) for n in rows)
    for found, wanted in zip(graph(q, k), Columns()(q, k), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


class KrausConfig(PretrainedConfig):
    model_type = "kraus"

    def __init__(self, sums: bool = False, **rest: Any) -> None:
        super().__init__(**rest)
        self.sums = sums


class Kraus(PreTrainedModel):
    """Keys laid out as columns, probabilities written over, a batch norm, and numbers in front of integers.

    Or its attention's products as Einstein sums.
    """

    config_class = KrausConfig

    def __init__(self, config: KrausConfig) -> None:
        super().__init__(config)
        self.words, self.norm = nn.Embedding(90, D), nn.BatchNorm1d(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down, self.out = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, config.num_labels)
        self.drop = nn.Dropout(0.2, inplace=True)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = (1.0 - seen)[:, None, None, :]
        x = self.norm(self.words(input_ids).transpose(1, 2)).transpose(1, 2)
        q, k, v = (m(x).view(*x.shape[:2], HEADS, D // HEADS) for m in (self.q, self.k, self.v))
        sums = self.config.sums
        scores = torch.einsum("bihd,bjhd->bhij", q, k) if sums else q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        weights = torch.softmax(scores - 1e4 * hidden, -1)
        weights.masked_fill_(hidden > 0, 0.0)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v) if sums else (weights @ v.transpose(1, 2)).transpose(1, 2)
        x = x + self.o(mixed.flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        return SequenceClassifierOutput(logits=self.out(self.drop((x * seen.unsqueeze(-1)).sum(1))))


@pytest.mark.parametrize("sums", [False, True])
def test_a_model_of_all_these_goes_the_whole_way(sums: bool) -> None:
    """With its attention as products, and as Einstein sums."""
    torch.manual_seed(0)
    model: Any = Kraus(KrausConfig(num_labels=3, pad_token_id=0, sums=sums)).eval()
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2.0)
    graph_module = trace(model)
    anatomy = find(graph_module)
    items = surgery(anatomy)
    assert [(a.heads, a.head_dim) for a in anatomy.attentions] == [(HEADS, D // HEADS)]
    assert set(items) == {"lora", "bitfit", "adapter", "prefix"}
    assert attempt(open_base(model), graph_module, list(items.values())) == "ok"


class Restless(nn.Module):
    """Tries other values in training, as a router does; what it draws besides is read by nobody."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand_like(x)
        if not self.training:
            return x
        with torch.no_grad():
            factor = torch.empty_like(x).uniform_(0.5, 1.5)
        return x * factor + torch.rand_like(x)


def test_what_draws_in_training_is_as_in_evaluation_and_dropout_stays() -> None:
    torch.manual_seed(0)
    model: Any = Kraus(KrausConfig(num_labels=3, pad_token_id=0)).train()
    model.out = nn.Sequential(Restless(), nn.Dropout(0.3), model.out)
    graph_module = trace(model)
    assert all(module.training for module in model.modules())
    read = ancestors(graph_module.graph.output_node())
    drawn = {str(n.target) for n in read if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())}
    assert drawn == {"aten.dropout.default"}
    ids = torch.randint(3, 90, (3, 6))
    found = switchable(graph_module).eval()(ids, torch.ones_like(ids))
    assert torch.allclose(found["logits"], model.eval()(ids).logits, atol=1e-6)
