"""A tiny base that is no special case, traced once; surgery on it; and what makes a comparison fair."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.compiler import Compiled, passes
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import read_spec
from surgeon.trace import text_inputs, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgeon.model import TaskModel

ADAMW = {"lr": 1e-3, "weight_decay": 0.0}
NO_DROPOUT = dict.fromkeys(
    ("dropout", "dropout_rate", "attention_dropout", "activation_dropout", "classifier_dropout", "seq_classif_dropout",
     "hidden_dropout", "hidden_dropout_prob", "classifier_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    0.0,
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices: a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tiny: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`base("bert")`: no bias of it is zero, no gain one, nothing drops out; the same object for the same request."""
    known: dict[str, PreTrainedModel] = {}

    def make(kind: str, head: str | None = None, **changes: Any) -> PreTrainedModel:
        key = repr((kind, head, sorted(changes.items())))
        if key not in known:
            known[key] = tiny(kind, head, **NO_DROPOUT, **changes)
            noise = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in known[key].parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        return known[key]

    return make


@pytest.fixture(scope="session")
def operate() -> Callable[..., Compiled]:
    """`operate(model, {"lora": {"rank": 4}}, tasks={"a": {}})`: `surgeon.compile`, with one trace a model."""
    traces: dict[int, tuple[PreTrainedModel, fx.GraphModule]] = {}

    def make(model: PreTrainedModel, *surgery: Mapping[str, Any], tasks: Mapping[str, Any] | None = None) -> Compiled:
        if id(model) not in traces:
            traces[id(model)] = model, trace(model)
        graph_module = twin(traces[id(model)][1])
        spec = read_spec({"surgery": list(surgery), "tasks": tasks or {"a": {}}})
        opened = open_base(model)
        program = Program(
            graph_module=graph_module,
            anatomy=find(graph_module),
            inputs=text_inputs(model),
            config=model.config,
            head=opened.head,
            frozen=frozenset(n for n, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]),
        )
        return Compiled(spec, opened, run_passes(program, list(passes(spec))))

    return make


def twin(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    graph._codegen = graph_module.graph._codegen
    return fx.GraphModule(graph_module, graph)


@pytest.fixture(scope="session")
def apart() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """A copy of a base of which everything is trained, for an oracle to change."""
    return lambda model: copy.deepcopy(model).requires_grad_(True).eval()


@pytest.fixture(scope="session")
def move() -> Callable[..., None]:
    """Move trained tensors off their birth values, where most techniques are the base and test nothing."""

    def moved(model: TaskModel, by: float = 0.2, seed: int = 5) -> None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in model.state_dict():
                parameter = model.get_parameter(name)
                parameter.add_(by * torch.randn(parameter.shape, generator=noise))

    return moved


@pytest.fixture(scope="session")
def feed() -> Callable[..., dict[str, Tensor]]:
    """`feed(model, 3, 11, pad=4)`: ids, and a mask that hides the end (or with `side` the start) of the first row."""

    def make(
        model: PreTrainedModel, batch: int, length: int, *, pad: int = 0, side: str = "right", seed: int = 0
    ) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 100, (batch, length), generator=draw)
        mask = torch.ones_like(ids)
        hidden = slice(length - pad, length) if side == "right" else slice(0, pad)
        ids[0, hidden], mask[0, hidden] = model.config.pad_token_id or 0, 0
        fed = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            fed["decoder_input_ids"] = torch.randint(3, 100, (batch, max(length - 3, 1)), generator=draw)
        return fed

    return make


@pytest.fixture(scope="session")
def labels_for() -> Callable[..., Tensor]:
    """Labels of a batch: classes for a classifier, the text itself for a language model."""

    def make(model: Any, fed: Mapping[str, Tensor], classes: int = 2) -> Tensor:
        text = fed.get("decoder_input_ids", fed["input_ids"])
        if "Classification" in type(model).__name__ or getattr(model, "head", "") == "sequence-classification":
            return torch.arange(len(text)) % classes
        return text

    return make


@pytest.fixture(scope="session")
def gap() -> Callable[..., float]:
    """The largest difference relative to the largest value wanted, of one tensor or of all that belong together."""

    def relative(found: Tensor | Mapping[str, Tensor], wanted: Tensor | Mapping[str, Tensor]) -> float:
        pairs = {"": (found, wanted)} if isinstance(wanted, Tensor) else {n: (found[n], wanted[n]) for n in wanted}
        assert all(mine.shape == other.shape for mine, other in pairs.values())
        differences = [float((mine - other).detach().abs().max()) for mine, other in pairs.values()]
        return max(differences) / max(float(other.detach().abs().max()) for _, other in pairs.values())

    return relative


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """Steps of AdamW on batches drawn by a counter, the same for whoever is trained."""

    def steps(
        model: nn.Module, batch: Callable[[int], Mapping[str, Any]], parameters: Iterable[Tensor], count: int
    ) -> None:
        optimizer = torch.optim.AdamW(list(parameters), **ADAMW)
        for step in range(count):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            optimizer.step()

    return steps
