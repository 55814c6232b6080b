"""Names what a model is loaded for, by the classes transformers maps configurations to."""

from __future__ import annotations

from typing import Any, get_args

from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from surgeon.errors import BaseError
from surgeon.spec import HeadName

# An encoder-decoder's one class stands under several heads (seq2seq-lm and masked-lm, say): the first here names it.
AUTO: dict[HeadName, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "image-classification": AutoModelForImageClassification,
    "audio-classification": AutoModelForAudioClassification,
    "feature-extraction": AutoModel,
}
assert set(AUTO) == set(get_args(HeadName))


def auto_class(config: PretrainedConfig, head: HeadName, source: str) -> Any:
    """The auto class to load this head with. Raises BaseError where the model has no such head."""
    auto = AUTO[head]
    remote = getattr(config, "auto_map", None) or {}
    heads = [name for name, other in AUTO.items() if _class_names(config, other) or other.__name__ in remote]
    if head not in heads:
        raise BaseError(f"a {config.model_type} model has no head '{head}'", where=source, there_is=heads)
    names = _class_names(config, auto)
    if len(names) > 1 and not config.architectures:  # among several classes it chooses by this, and fails without
        config.architectures = [names[0]]
    return auto


def head_of(model: PreTrainedModel) -> HeadName:
    """The head of a model in hand. Raises BaseError where it is none of ours."""
    own = {cls.__name__ for cls in type(model).__mro__}
    for head, auto in AUTO.items():
        for named in auto._model_mapping._model_mapping.values():
            if own & set(_listed(named)):
                return head
    for head, auto in AUTO.items():  # a class of the user's own, named as transformers names its own
        if getattr(model, "loss_type", None) == auto.__name__.removeprefix("AutoModel"):
            return head
    raise BaseError(f"{type(model).__name__} has no head that Surgeon knows", there_is=AUTO)


def _class_names(config: PretrainedConfig, auto: Any) -> tuple[str, ...]:
    """The classes an auto class would choose from; read as names, so that none is imported."""
    return _listed(auto._model_mapping._model_mapping.get(config.model_type, ()))


def _listed(found: str | tuple[str, ...]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found)
