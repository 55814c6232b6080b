"""The loss of each head, as transformers computes it, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

LOSSES = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "causal-lm": "ForCausalLM",
    "masked-lm": "ForMaskedLM",
    "seq2seq-lm": "ForMaskedLM",
    "image-classification": "ForImageClassification",
    "audio-classification": "ForSequenceClassification",
}


def loss_of(head: str, output: Any, labels: Mapping[str, Any], config: Any) -> Tensor:
    """The loss of a base with this head: a scalar, the mean over the batch."""
    loss: Callable[..., Tensor] = cast(Any, LOSS_MAPPING[LOSSES[head]])
    if head == "question-answering":
        return loss(output.start_logits, output.end_logits, **labels)
    if head in {"sequence-classification", "image-classification", "audio-classification"}:
        return loss(labels=labels["labels"], pooled_logits=output.logits, config=config)
    if head == "token-classification":
        return loss(labels=labels["labels"], logits=output.logits, config=config)
    return loss(output.logits.contiguous(), labels["labels"], vocab_size=output.logits.shape[-1])


def shifted(labels: Tensor, config: Any) -> Tensor:
    """What a decoder reads where it is to write `labels` [rows, tokens]: the start, and each token but the last."""
    first = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], 1)


def as_often(labels: Tensor, output: Any) -> Tensor:
    """Labels for every row of an output: an ensemble answers each text several times in training."""
    rows = next(t for t in output.values() if isinstance(t, Tensor)).shape[0]
    return labels.repeat(rows // labels.shape[0], *[1] * (labels.dim() - 1))
