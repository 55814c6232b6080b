"""What `make quality` trains: each technique with its learning rate, and the peer that does the same elsewhere.

A technique of the registry that is not named here is trained with its defaults at LoRA's learning rate, without a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon import registry
from surgeon.inputs import Input, text_inputs
from surgeon.ledger import Schedule
from surgeon.model import TaskModel

Surgery = tuple[dict[str, dict[str, Any]], ...]
MakePeer = Callable[[PreTrainedModel, int], nn.Module]
QV = ["query", "value"]
LAST_LINEAR = r".*layer\.\d+\.output\.dense"
RATES = {
    "head": 1e-1, "full": 1e-4, "lora": 1e-3, "dora": 1e-3, "adalora": 1e-2, "qlora": 1e-3, "vera": 1e-2, "ia3": 1e-2,
    "bitfit": 3e-3, "norm_tuning": 3e-3, "adapter": 1e-3, "drop": 1e-3, "compacter": 3e-3, "prefix": 5e-2,
    "prompt": 2e-3, "p_tuning": 1e-3, "p_tuning_v2": 5e-2,
}  # fmt: skip
"""Learning rates, for ours and the peer's alike. Vectors need larger ones than matrices."""
HEAD_RATES = {"prompt": 50.0, "p_tuning": 10.0}
"""What the classifier's is times that: virtual tokens need a small one, with which a classifier learns nothing."""
EPOCHS = {"prompt": 10, "p_tuning": 10, "p_tuning_v2": 10}
"""What takes longer than the others; head-only is shown with as many."""
LEFT_OUT = {"fusion": "it needs adapters of other tasks; see `make quality-fusion`"}


@dataclass(frozen=True)
class Recipe:
    """How a technique is trained. Without a `peer` the table says why not; without `epochs` they are the table's.

    `begin` puts into the peer what ours, which is not trained yet, starts from.
    """

    name: str
    surgery: Surgery
    rate: float
    epochs: int | None
    peer: MakePeer | None = None
    by: str = ""
    begin: Callable[[nn.Module, TaskModel], None] | None = None

    def sides(self, ours: str) -> list[str]:
        """Who trains it."""
        return [ours, self.by] if self.peer else [ours]


def recipes() -> dict[str, Recipe]:
    """Those of every technique that is installed."""
    known: dict[str, tuple[Surgery, MakePeer | None, str]] = {
        "head": ((), _trained(lambda name: False), "plain torch"),
        "full": (({"full": {}},), _trained(lambda name: True), "plain torch"),
        "bitfit": (({"bitfit": {}},), _trained(_is_bias), "plain torch"),
        "norm_tuning": (({"norm_tuning": {}},), _peft(peft.LNTuningConfig, target_modules=["LayerNorm"]), "PEFT"),
        "lora": (({"lora": {"rank": 8}},), _peft(peft.LoraConfig, r=8, lora_alpha=16, target_modules=QV), "PEFT"),
        "dora": (
            ({"lora": {"rank": 8, "dora": True}},),
            _peft(peft.LoraConfig, r=8, lora_alpha=16, target_modules=QV, use_dora=True),
            "PEFT",
        ),
        "ia3": (
            ({"ia3": {}},),
            _peft(
                peft.IA3Config,
                target_modules=rf".*attention\.self\.(key|value)|{LAST_LINEAR}",
                feedforward_modules=LAST_LINEAR,
            ),
            "PEFT",
        ),
        "prompt": (
            ({"prompt": {"length": 20}}, {"head": {"rate": HEAD_RATES["prompt"]}}),
            _peft(
                peft.PromptTuningConfig, HEAD_RATES["prompt"], num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"
            ),
            "PEFT",
        ),
        "p_tuning": (
            ({"p_tuning": {"template": "[P]*10 {text}"}}, {"head": {"rate": HEAD_RATES["p_tuning"]}}),
            _peft(
                peft.PromptEncoderConfig,
                HEAD_RATES["p_tuning"],
                num_virtual_tokens=10,
                encoder_reparameterization_type="LSTM",
                encoder_hidden_size=192,
                encoder_dropout=0.0,
            ),
            "PEFT",
        ),
        "vera": (
            ({"vera": {"rank": 256}},),
            _peft(peft.VeraConfig, r=256, target_modules=QV, vera_dropout=0.0),
            "PEFT",
        ),
        "adalora": (({"adalora": {}},), _adalora, "PEFT"),
        "drop": (({"adapter": {"placement": "pfeiffer"}}, {"drop": {}}), None, ""),
    }
    names = [*registry.names(), *(["dora"] if "dora" in registry.technique("lora").model_fields else [])]
    begins = {"prompt": _same_words, "p_tuning": _same_encoder}
    found = {}
    for name in names:
        surgery, peer, by = known.get(name, (({name: {}},), None, ""))
        if name not in LEFT_OUT:
            rate, epochs = RATES.get(name, RATES["lora"]), EPOCHS.get(name)
            found[name] = Recipe(name, surgery, rate, epochs, peer, by, begins.get(name))
    return found


def _same_words(peer: nn.Module, ours: TaskModel) -> None:
    """Let PEFT's prompt be the words that ours drew: what 20 words come to depends on which they are."""
    rows = peer.get_parameter("model.prompt_encoder.default.embedding.weight")
    (prompt,) = (t for t in ours.deployed().values() if t.shape == rows.shape)
    with torch.no_grad():
        rows.copy_(prompt)


def _same_encoder(peer: nn.Module, ours: TaskModel) -> None:
    """Let PEFT's tokens and their encoder be those that ours drew."""
    parts = {"embedding": "embedding.weight", "lstm": "lstm_head", "mlp": "mlp_head"}
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            if ".p_tuning." in name:
                kind, *rest = name.split(".p_tuning.")[1].split(".")
                own = ".".join(["model.prompt_encoder.default", parts[kind], *rest])
                peer.get_parameter(own).copy_(value)


class Peer(nn.Module):
    """Somebody else's model with what `surgeon.train` asks of a task: so both go through the same loop."""

    head_name = "sequence-classification"

    def __init__(
        self, model: nn.Module, base: PreTrainedModel, schedules: tuple[Schedule, ...] = (), head_rate: float = 1.0
    ) -> None:
        super().__init__()
        self.head_rate = head_rate
        self.model = model
        self.config = base.config
        self.inputs: tuple[Input, ...] = text_inputs(base)
        self.schedules = schedules

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def occupied(self) -> int:
        """Positions that its own tokens take: texts here are far shorter than what is left."""
        return 0

    def trained(self) -> dict[str, nn.Parameter]:
        """What it trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """What it leaves as it is."""
        return {name: p for name, p in self.named_parameters() if not p.requires_grad}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        heads = {name: p for name, p in self.trained().items() if "classifier" in name}
        others = [p for name, p in self.trained().items() if name not in heads]
        groups = [(others, learning_rate), (list(heads.values()), learning_rate * self.head_rate)]
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: p.detach() for name, p in self.trained().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(state_dict[name])


def _trained(wanted: Callable[[str], bool]) -> MakePeer:
    """The base itself with some of its parameters trained, and the classifier."""

    def make(base: PreTrainedModel, steps: int) -> Peer:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("classifier.") or wanted(name))
        return Peer(base, base)

    return make


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _peft(config: Callable[..., peft.PeftConfig], head_rate: float = 1.0, **options: Any) -> MakePeer:
    def make(base: PreTrainedModel, steps: int) -> Peer:
        model = peft.get_peft_model(base, config(task_type=peft.TaskType.SEQ_CLS, **options))
        return Peer(model, base, head_rate=head_rate)

    return make


def _adalora(base: PreTrainedModel, steps: int) -> Peer:
    """PEFT's, with the ranks and the schedule of ours."""
    own = registry.technique("adalora").model_construct()
    first, last = (int(share * steps) if share < 1 else int(share) for share in (own.warmup, own.final))
    config = peft.AdaLoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        target_modules=r".*attention\.self\.(query|key|value)|.*layer.*\.(output|intermediate)\.dense",
        init_r=own.rank,
        target_r=own.target_rank,
        lora_alpha=own.alpha,
        tinit=first,
        tfinal=last,
        deltaT=own.interval,
        orth_reg_weight=own.orthogonal,
        total_step=steps,
    )
    model = peft.get_peft_model(base, config)
    return Peer(model, base, (PeftBudget(model, steps - last),))


class PeftBudget(Schedule):
    """Drives PEFT's own allocation after every step, as its manual says."""

    def __init__(self, model: Any, last: int) -> None:
        self.model, self.last = model, last

    def after(self, model: Any, step: int) -> None:
        self.model.base_model.update_and_allocate(step)

    def settled(self, step: int) -> bool:
        return step >= self.last
