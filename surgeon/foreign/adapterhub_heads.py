"""The head that AdapterHub saved beside an adapter."""

from __future__ import annotations

from pathlib import Path

from surgeon.errors import DeltaError
from surgeon.foreign.adapterhub_methods import plain
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.pieces import Classifier, Piece, Whole
from surgeon.spec import HeadName

HEAD = "head_config.json"
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
CLASSES: dict[str, HeadName] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
}


def kind_of(model_class: str) -> HeadName | None:
    """What a class of transformers is for."""
    return next((kind for ending, kind in CLASSES.items() if model_class.endswith(ending)), None)


def read_head(folder: Path, *, allow_pickle: bool) -> tuple[list[Piece], HeadName | None, tuple[str, ...] | None]:
    """The head beside an adapter: the base's own class, or AdapterHub's two layers on the first token."""
    options = Options(read_config(folder / HEAD), str(folder / HEAD))
    tensors, _ = read_tensors(folder, HEAD_WEIGHTS, allow_pickle=allow_pickle)
    if options.get("config", dict) is None:
        return [Whole(name=name, tensor=tensor) for name, tensor in tensors.items()], None, _names(options)
    own, name = Options(options.need("config", dict), options.where), options.need("name", str)
    if own.need("head_type", str) != "classification":
        raise DeltaError(f"a head of type '{own.config['head_type']}' is not read", where=options.where)
    plain(own, {"layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True})
    own.ignore("dropout_prob", "num_labels")
    labels = _names(own)
    own.finish("AdapterHub's head")
    keys = [f"heads.{name}.{i}.{part}" for i in (1, 4) for part in ("weight", "bias")]
    if set(keys) != set(tensors):
        raise DeltaError("the head is not of two layers", where=str(folder), there_is=sorted(tensors))
    dense, dense_bias, weight, bias = (tensors[key] for key in keys)
    return [Classifier(dense=(dense, dense_bias), out=(weight, bias))], "sequence-classification", labels


def _names(options: Options) -> tuple[str, ...] | None:
    """The names of the labels, in their order."""
    named = options.get("label2id", dict)
    return tuple(sorted(named, key=lambda label: named[label])) if named else None
