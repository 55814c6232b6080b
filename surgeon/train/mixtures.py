"""How much each fused adapter weighs in each layer, over a set of texts, and a task without those that weigh least.

Rücklé et al., "AdapterDrop" (arXiv:2010.11918), section 5.2, prune a fusion by these means; Pfeiffer et al.
(arXiv:2005.00247), section 5, draw them. Nothing here knows the technique: it reads what passes marked (`Probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgeon.compiler import load
from surgeon.errors import DeltaError, SpecError, did_you_mean
from surgeon.probes import Probe
from surgeon.runtime.document import read_manifest
from surgeon.train.batches import by_length, load_tokenizer
from surgeon.train.kinds import Classes, room
from surgeon.train.rows import Row, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel


@dataclass(frozen=True)
class Mixture:
    """The mean weights of one site: they sum to one. `entries` are its indices in the order of the weights."""

    site: str
    stack: str
    layer: int | None
    weights: Mapping[str, float]
    symbol: str
    entries: tuple[int, ...]


def mixtures(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> tuple[Mixture, ...]:
    """Mean attention over the fused adapters at every site, over all tokens of `texts` that are no padding.

    Raises DeltaError for a task that fuses nothing.
    """
    kind = Classes(2)  # labels are not looked at
    examples = kind.encode(tokenizer, [Row(text, 0) for text in texts], room(model, tokenizer, max_length))
    pad, device = kind.padding(model, tokenizer), next(model.parameters()).device
    totals: list[tuple[Probe, Tensor]] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for part in by_length(examples, batch_size):
            batch = kind.batch(part, pad, device)
            del batch["labels"]
            found = [(probe, _total(weights, batch["attention_mask"])) for probe, weights in model.look(**batch)]
            totals = [(p, a + b) for (p, a), (_, b) in zip(totals, found, strict=True)] if totals else found
    model.train(training)
    seen = [_mixture(model, probe, total) for probe, total in totals if total.numel()]
    if not seen:
        raise DeltaError("this task fuses no adapters", try_="a task whose surgery has `fusion`")
    return tuple(seen)


def _total(weights: Tensor, mask: Tensor) -> Tensor:
    """The sum over all tokens, of a stack that reads the text without its padding."""
    shown = mask[..., None].to(weights) if weights.shape[:-1] == mask.shape else torch.ones_like(weights)
    return (weights * shown).double().flatten(0, -2).sum(0)


def _mixture(model: TaskModel, probe: Probe, total: Tensor) -> Mixture:
    left = [int(i) for i in model.get_parameter(probe.index)]
    names = [probe.names[i] for i in left]
    means = (total / total.sum()).tolist()
    site = probe.site
    return Mixture(
        site.label, site.stack, site.layer, dict(zip(names, means, strict=True)), probe.symbol, tuple(range(len(left)))
    )


def prune(model: TaskModel, found: Sequence[Mixture], keep: int) -> None:
    """Leave the `keep` entries of the largest weight at every site, in the order they have; sites may differ.

    Raises SpecError for less than one, or where no site has more.
    """
    most = max(len(one.weights) for one in found)
    if not 1 <= keep < most:
        raise SpecError(f"{keep} adapters of {most} cannot be kept", try_=f"from 1 to {most - 1}")
    means: dict[str, Tensor] = {}
    for one in found:  # layers that share their weights are one site for the task
        means[one.symbol] = means.get(one.symbol, 0.0) + torch.tensor(list(one.weights.values()))
    kept = {symbol: mean.topk(min(keep, len(mean))).indices.sort().values for symbol, mean in means.items()}
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        for axis, symbol in model.ledger.free(name).items():
            if symbol in kept:
                tensors[name] = tensors[name].index_select(axis, kept[symbol].to(tensor.device))
    model.load_state_dict(tensors)


def build_mixtures(
    build: str | Path,
    task: str,
    data: str | Path,
    *,
    keep: int | None = None,
    text_column: str = "text",
    max_length: int = 128,
    report: Callable[[str], None] | None = None,
) -> tuple[Mixture, ...]:
    """The mixtures of a task of a build over the texts of a file.

    With `keep`, the task is packed anew with so many adapters a site, and the answer is that of the smaller task.
    """
    build, say = Path(build), report or (lambda _: None)
    tasks = read_manifest(build).tasks
    if task not in tasks:
        raise SpecError(f"there is no task '{task}'", there_is=tasks, try_=did_you_mean(task, tasks))
    texts = read_texts(data, text_column)
    compiled = load(build, writes=False, progress=say)
    model, tokenizer = compiled.model(task), load_tokenizer(build, compiled.base.max_length)
    say("looking at the texts")
    found = mixtures(model, tokenizer, texts, max_length=max_length)
    if keep is not None:
        prune(model, found, keep)
        found = mixtures(model, tokenizer, texts, max_length=max_length)
        say(f"packing {task}")
        compiled.pack(build, task)
    return found
