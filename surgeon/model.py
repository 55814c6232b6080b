"""The trainable module of one task: base tensors shared and frozen, its own deltas trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from surgeon.errors import DeltaError
from surgeon.inputs import Input
from surgeon.ledger import Ledger, check_trained, initial
from surgeon.losses import as_often, loss_of, shifted
from surgeon.module import place
from surgeon.packing import packed
from surgeon.probes import Probe, Reader
from surgeon.recompute import recomputed


class TaskModel(nn.Module):
    """Called as the base is; with `labels=` the output has the loss.

    Base tensors appear under checkpoint names and do not require gradients; deltas appear under their ledger names,
    as trained (before the fold). `state_dict` and `load_state_dict` know the task's tensors only.
    """

    _graph: fx.GraphModule
    _twins: dict[tuple[bool, bool], fx.GraphModule]
    accepts_loss_kwargs = False
    """Tells `transformers.Trainer` that the loss is a mean over the batch."""

    def __init__(
        self,
        graph: fx.GraphModule,
        ledger: Ledger,
        inputs: tuple[Input, ...],
        config: Any,
        head: str,
        *,
        labels: Sequence[str] | int | None,
        seed: str,
        kept: Collection[str] = (),
    ) -> None:
        """`kept` names deltas that stay as the base has them: of its own head, in a task that brings none."""
        super().__init__()
        self.ledger = ledger
        self.inputs = inputs
        self.head_name = head  # not `head`: a base may have a module of that name
        self.config = task_config(config, labels)
        self.label_names = (
            None if labels is None else [self.config.id2label[i] for i in range(len(self.config.id2label))]
        )
        module = fx.GraphModule(graph, graph.graph)
        for node in module.graph.nodes:
            if node.op == "call_module":  # it reads `training`, which is each task's own
                module._modules[node.target] = copy.copy(module._modules[node.target])
        # The graph runs unregistered while its children and tensors are registered here, under the names of the ledger.
        object.__setattr__(self, "_graph", module)
        object.__setattr__(self, "_twins", {})
        self.is_gradient_checkpointing = False
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in ledger.deltas:
            self._own(name, None)
        self.names = () if labels is None or isinstance(labels, int) else tuple(labels)
        self._sizes = {} if labels is None else {"labels": labels if isinstance(labels, int) else len(labels)}
        starts, fresh = ledger.parameters(self._sizes), initial(ledger, seed, self._sizes, self.names)
        # Where everything is the task's own, no parameter of the base is left to ask.
        device = next(chain(self.parameters(), fresh.values())).device
        for name, tensor in fresh.items():
            if name in kept:
                default = ledger.deltas[name].default.to(device)
                self._own(name, nn.Parameter(default, requires_grad=False))
            else:
                self._own(name, nn.Parameter(tensor.to(device), requires_grad=not starts[name].frozen))
        self._trained = {n: start for n, start in starts.items() if n not in kept}
        self._kept = frozenset(kept)
        self._replaced = [n for n in ledger.deltas if any(n in fold.outputs for fold in ledger.folds)]
        self._left_out = 0
        self.to(device)  # what is no parameter of the base may still be where it was traced
        self.schedules = [make() for make in ledger.schedules]

    def _own(self, name: str, parameter: nn.Parameter | None) -> None:
        """Put a parameter of this task in place, in modules that no other task shares."""
        owner, _, leaf = name.rpartition(".")
        module: nn.Module = self
        for part in filter(None, owner.split(".")):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module._parameters[leaf] = parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Behind every move to another device or type: what the graph makes itself goes along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next(self.parameters()).device
        for graph in (self._graph, *self._twins.values()):
            place(graph, device)
        self.drop(self._left_out)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        texts: Tensor | None = None,
    ) -> Any:
        """The base's output for the task. Absent masks and token types are filled as the base would.

        `texts` takes the mask's place where a row holds several: the number of each position's text, 0 for none.
        """
        if texts is not None:
            attention_mask = texts
        every = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        }
        given = {name: value for name, value in every.items() if value is not None}
        output = self._run(self._complete(given, labels), self._form(texts is not None))
        targets = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions}
        if any(value is not None for value in targets.values()):
            given_targets = {name: as_often(value, output) for name, value in targets.items() if value is not None}
            loss = loss_of(self.head_name, output, given_targets, self.config)
            if self.training:
                loss = loss + self._penalty()
            output = type(output)(loss=loss, **{k: v for k, v in output.items() if k != "loss"})
        return output

    def _run(self, inputs: Mapping[str, Tensor], graph: fx.GraphModule) -> Any:
        if not self._replaced and not self._dropped:
            return graph(**inputs)
        deployed = self.deployed()
        replaced = {n: deployed[n] for n in self._replaced} | self._dropped
        return functional_call(graph, replaced, (), dict(inputs))

    def _form(self, several: bool) -> fx.GraphModule:
        """The graph, or a twin of it: for several texts a row, for training in less memory. Made when first needed."""
        frugal = self.training and self.is_gradient_checkpointing
        graph = self._twin((True, False), packed, self._graph) if several else self._graph
        return self._twin((several, True), recomputed, graph) if frugal else graph

    def _twin(
        self, key: tuple[bool, bool], make: Callable[[fx.GraphModule], fx.GraphModule], of: fx.GraphModule
    ) -> fx.GraphModule:
        if key not in self._twins:
            self._twins[key] = make(of)
        return self._twins[key]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep fewer values for the backward pass and compute the others again; `transformers.Trainer` calls this."""
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all values for the backward pass."""
        self.is_gradient_checkpointing = False

    def look(self, **inputs: Tensor) -> list[tuple[Probe, Tensor]]:
        """The values that passes marked, for these inputs: how much each fused adapter weighs, say."""
        return Reader(self._graph, self.deployed()).read(self._complete(inputs, None))

    def _penalty(self) -> Tensor | float:
        own = dict(self.named_parameters()) if self.ledger.penalties else {}
        idle = self.ledger.idle(self._dropped)
        counted = [p for p in self.ledger.penalties if not idle.issuperset(p.inputs)]
        return sum((p.fn(*(own[n] for n in p.inputs)) for p in counted), 0.0)

    def drop(self, layers: int = 0) -> None:
        """Leave out what can be dropped in the first `layers` layers of every stack, until told otherwise."""
        self._left_out = layers
        names = self.ledger.dropped(self._left_out)
        device = next(self.parameters()).device
        self._dropped = {n: self.ledger.deltas[n].default.to(device) for n in names}

    def occupied(self, axis: str = "sequence") -> int:
        """How many positions of the base the task's own tokens, as a prompt's, take from an input's axis."""
        deltas = self.ledger.deltas
        sizes = {s: t.shape[a] for name, t in self.deployed().items() for a, s in deltas[name].free.items()}
        return sum(sizes.get(symbol, 0) for symbol, of in self.ledger.positions.items() if of == axis)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What is trained, as groups for an optimiser: one for each factor of the learning rate (LoRA+)."""
        groups: dict[float, list[Tensor]] = {}
        for name, start in self._trained.items():
            parameter = self.get_parameter(name)
            if parameter.requires_grad:
                groups.setdefault(start.rate, []).append(parameter)
        return [{"params": params, "lr": learning_rate * rate} for rate, params in groups.items()]

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's parameters that the graph reads, by checkpoint name: the same ones in the model of every task."""
        own = self.ledger.deltas.keys() | self._trained.keys()
        return {name: parameter for name, parameter in self.named_parameters() if name not in own}

    def _complete(self, given: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        names = [i.name for i in self.inputs]
        if unknown := set(given) - set(names):
            raise DeltaError(f"the traced base takes no {sorted(unknown)}", there_is=names)
        if "decoder_input_ids" in names and "decoder_input_ids" not in given and labels is not None:
            given["decoder_input_ids"] = shifted(labels, self.config)
        for spec in self.inputs:
            if spec.fill is None and spec.name not in given:
                raise DeltaError(f"input '{spec.name}' is missing", there_is=list(given))
        main = given[names[0]]
        return {spec.name: given[spec.name] if spec.name in given else spec.absent(main) for spec in self.inputs}

    def deployed(self) -> dict[str, Tensor]:
        """The task's tensors in the form the graph reads: folded, differentiable; defaults where they are dropped."""
        every = dict(self.named_parameters())
        deployed = self.ledger.deploy({name: every[name] for name in self.ledger.parameters()}, self._dropped)
        return {name: t for name, t in deployed.items() if name not in self._kept}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The task's trained tensors only."""
        prefix = kwargs.get("prefix", "")
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k[len(prefix) :] in self._trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take trained tensors; free sizes may differ. Raises DeltaError where names or shapes do not fit."""
        check_trained(self.ledger, self._trained, state_dict, self._sizes)
        present = dict(self.named_parameters())
        for name, tensor in state_dict.items():
            own = present[name]
            fresh = tensor.detach().to(own.device, own.dtype)
            if own.shape == fresh.shape:
                with torch.no_grad():
                    own.copy_(fresh)
            else:
                self._own(name, nn.Parameter(fresh.clone(), requires_grad=own.requires_grad))
        return torch.nn.modules.module._IncompatibleKeys([], [])


@contextmanager
def on_cpu(models: Iterable[TaskModel]) -> Iterator[None]:
    """Have models, and with them their base, on the CPU until the end of the block."""
    devices = [(model, next(model.parameters()).device) for model in models]
    for model, _ in devices:
        model.cpu()
    try:
        yield
    finally:
        for model, device in devices:
            model.to(device)


def task_config(config: Any, labels: Sequence[str] | int | None) -> Any:
    """The base's configuration with this task's labels."""
    own = copy.deepcopy(config)
    if labels is not None:
        names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        own.id2label = dict(enumerate(names))
        own.label2id = {name: i for i, name in enumerate(names)}
        own.problem_type = "single_label_classification" if len(names) > 1 else own.problem_type
    return own
